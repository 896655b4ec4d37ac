//! The ring of processes around the learner.

pub mod native;
pub mod launch;
pub mod hub;

use std::path::Path;

use policy::{config::Launch, plan::RunPlan};

use self::{hub::Hub, launch::Children};
use crate::error::Result;

/// Hub and child processes of a run.
pub(crate) struct Ring {
    /// Hub where engines connect.
    pub(crate) hub: Hub,
    /// Child processes, terminated when this value is dropped.
    pub(crate) children: Children,
}

impl Ring {
    /// Opens the hub; for `launch = "local"`, also starts engine and env workers with `config`. Logs are in `dir`.
    ///
    /// # Errors
    /// The endpoint cannot be bound or a process cannot be started.
    pub(crate) fn start(plan: &RunPlan, dir: &Path, config: &Path) -> Result<Self> {
        let hub = Hub::start(&plan.config.learner.listen)?;
        let mut children = Children::default();
        match plan.config.runner.launch {
            Launch::Local => {
                let engine = children.engine(config, &hub.endpoint, dir)?;
                children.workers(plan, &engine, dir)?;
            }
            Launch::None => tracing::info!(
                "waiting for an engine: rollout-engine serve --config {} --learner {}",
                config.display(),
                hub.endpoint
            ),
        }
        Ok(Self { hub, children })
    }
}
