//! Checks of `[pretrain]` and `[sft]`: optimizers of the supervised stages.

use super::range::{fraction, not_negative};
use crate::config::{ConfigError, RunConfig, StageOptim};

/// Checks the sections that are present.
///
/// # Errors
/// Names the key and the value expected.
pub(super) fn check(config: &RunConfig) -> Result<(), ConfigError> {
    if let Some(stage) = &config.pretrain {
        check_optim("pretrain.optim", &stage.optim)?;
    }
    if let Some(stage) = &config.sft {
        check_optim("sft.optim", &stage.optim)?;
    }
    Ok(())
}

fn check_optim(section: &str, optim: &StageOptim) -> Result<(), ConfigError> {
    fraction(&format!("{section}.min_lr_ratio"), optim.min_lr_ratio)?;
    not_negative(&format!("{section}.lr"), optim.lr)?;
    not_negative(&format!("{section}.weight_decay"), optim.weight_decay)
}
