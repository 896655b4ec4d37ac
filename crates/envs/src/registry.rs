//! Registry of environments.

use crate::{
    env::{EnvError, VecEnv},
    tabletop::{Tabletop, TabletopParams},
};

type Make = fn(usize, toml::Table) -> Result<Box<dyn VecEnv>, EnvError>;

/// All environments; a new environment is one line here.
const REGISTRY: &[(&str, Make)] = &[("tabletop", |n, params| {
    Ok(Box::new(Tabletop::new(n, TabletopParams::parse(params)?)))
})];

/// Makes `num_envs` slots of the environment `name` with `params` (absent keys take the environment's defaults).
///
/// # Errors
/// The name is not registered or a parameter is invalid.
pub fn make(name: &str, num_envs: usize, params: toml::Table) -> Result<Box<dyn VecEnv>, EnvError> {
    let entry = REGISTRY.iter().find(|(known, _)| *known == name);
    let (_, make) = entry.ok_or_else(|| EnvError::Unknown {
        name: name.to_owned(),
        known: REGISTRY.iter().map(|(n, _)| *n).collect::<Vec<_>>().join(", "),
    })?;
    make(num_envs, params)
}
