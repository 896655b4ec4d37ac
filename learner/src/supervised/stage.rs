//! Optimizer, learning-rate schedule and progress bar of one supervised stage.

use indicatif::ProgressBar;
use policy::config::StageOptim;
use tch::Tensor;

use crate::{
    error::Result,
    optim::{AdamW, AdamWSettings, Decay, ParamGroup, Schedule, StepReport},
    progress::progress_style,
};

/// Decay rates of `AdamW`'s moments in the supervised stages. The second is small because a stage has only a few thousand steps.
const BETAS: [f64; 2] = [0.9, 0.95];

/// Training of one group of weights; the learning rate rises linearly, then follows a cosine to `min_lr_ratio`.
#[derive(Debug)]
pub(crate) struct Stage {
    optimizer: AdamW,
    schedule: Schedule,
    /// Bar of the completed steps.
    pub(crate) bar: ProgressBar,
}

impl Stage {
    /// Creates a stage named `label` that trains `params`.
    pub(crate) fn new(label: &'static str, config: &StageOptim, params: Vec<(String, Tensor)>) -> Result<Self> {
        let settings = AdamWSettings {
            beta1: BETAS[0],
            beta2: BETAS[1],
            eps: 1e-8,
            clip_norm: Some(config.clip_grad),
        };
        let group = ParamGroup {
            name: label.to_owned(),
            lr: config.lr,
            weight_decay: config.weight_decay,
            params,
        };
        let decay = Decay::Cosine {
            total_steps: u64::from(config.steps),
            min_factor: config.min_lr_ratio,
        };
        Ok(Self {
            optimizer: AdamW::new(settings, vec![group])?,
            schedule: Schedule::warmup(u64::from(config.lr_warmup_steps), decay),
            bar: ProgressBar::new(u64::from(config.steps))
                .with_style(progress_style())
                .with_message(label),
        })
    }

    /// Performs one optimizer step on the gradient of `loss`.
    pub(crate) fn step(&mut self, loss: &Tensor) -> Result<StepReport> {
        self.optimizer.zero_grad();
        loss.backward();
        let factor = self.schedule.factor(self.optimizer.updates());
        self.bar.inc(1);
        Ok(self.optimizer.step(factor)?)
    }
}
