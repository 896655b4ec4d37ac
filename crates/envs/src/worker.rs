//! Loop of the env worker: an engine drives the slots of an environment over the wire.
//!
//! The worker is independent of training: the engine commands each slot to reset or to execute actions. When the engine is silent
//! for long, the worker sends a heartbeat: an empty report, or its registration again before the welcome.

use std::{collections::BTreeMap, time::Duration};

use wire::{
    array::{Array, ArrayError},
    messages::{Command, FromEngine, Hello, Observation, Outcome, SlotReport, ToEngine},
    socket::{SocketError, connect_dealer},
};

use crate::env::{self, Image, ResetKey, VecEnv};

/// Time without a message from the engine after which a worker sends a heartbeat.
const SILENCE: Duration = Duration::from_secs(10);

/// Error that ends a worker.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    /// The connection failed; [`serve`] returns this error only for an invalid endpoint.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The engine refuses this worker.
    #[error("the engine refused this worker: {0}")]
    Refused(String),
    /// The actions have another type, shape or length.
    #[error("command for slot {slot}: {source}")]
    Actions {
        /// Slot of the command.
        slot: u32,
        /// What was expected and what was found.
        source: ArrayError,
    },
    /// The slot does not exist in this worker, or has not been reset.
    #[error("command for slot {slot}, this worker has {slots} and it must be reset before it acts")]
    Slot {
        /// Slot of the command.
        slot: u32,
        /// Number of slots of this worker.
        slots: usize,
    },
}

fn array(image: Image) -> Array {
    Array::u8(&[image.height, image.width, 3], image.data)
}

fn observation(seen: env::Observation) -> Observation {
    Observation {
        images: seen.images.into_iter().map(|i| Some(array(i))).collect(),
        state: seen.state,
        prompt: seen.prompt,
    }
}

/// Serves `env` to the engine until the future is dropped; reconnects when the connection ends.
///
/// # Errors
/// The endpoint is invalid, the engine refuses this worker, or a command is invalid.
pub async fn serve(endpoint: &str, client: &str, env: &mut dyn VecEnv) -> Result<(), WorkerError> {
    loop {
        match session(endpoint, client, env).await {
            Err(WorkerError::Socket(SocketError::Endpoint(e))) => return Err(SocketError::Endpoint(e).into()),
            Err(WorkerError::Socket(SocketError::NotLoopback(e))) => return Err(SocketError::NotLoopback(e).into()),
            Err(WorkerError::Socket(error)) => tracing::warn!("{error}; waiting for the engine at {endpoint}"),
            other => return other,
        }
    }
}

async fn session(endpoint: &str, client: &str, env: &mut dyn VecEnv) -> Result<(), WorkerError> {
    let (mut send, mut receive) = connect_dealer(endpoint).await?;
    let spec = env.spec();
    let slots = env.num_envs();
    let hello = Hello {
        client: client.to_owned(),
        env: spec.name.to_owned(),
        action_dim: spec.action_dim as u32,
        slots: slots as u32,
    };
    send.send(&ToEngine::Hello(hello.clone())).await?;
    let mut video: BTreeMap<u32, bool> = BTreeMap::new();
    let mut welcome = false;
    loop {
        let Ok(message) = tokio::time::timeout(SILENCE, receive.receive::<FromEngine>()).await else {
            // sending detects a connection that broke silently; an engine that dropped this worker refuses the heartbeat
            let sign = if welcome {
                ToEngine::Reports(Vec::new())
            } else {
                ToEngine::Hello(hello.clone())
            };
            send.send(&sign).await?;
            continue;
        };
        match message? {
            FromEngine::Welcome(said) => {
                welcome = true;
                tracing::info!(
                    "engine serves policy version {}, {} slots of {}",
                    said.version,
                    slots,
                    spec.name
                );
                let idle = (0..slots as u32)
                    .map(|slot| SlotReport {
                        slot,
                        outcome: None,
                        observation: None,
                    })
                    .collect();
                send.send(&ToEngine::Reports(idle)).await?;
            }
            FromEngine::Commands(commands) => {
                let mut reports = Vec::with_capacity(commands.len());
                for command in commands {
                    reports.push(apply(env, command.slot, command.command, &mut video, spec.action_dim)?);
                }
                send.send(&ToEngine::Reports(reports)).await?;
            }
            FromEngine::Refused(refusal) if refusal.retry => {
                tracing::warn!("engine: {}; registering again", refusal.reason);
                welcome = false;
                send.send(&ToEngine::Hello(hello.clone())).await?;
            }
            FromEngine::Refused(refusal) => return Err(WorkerError::Refused(refusal.reason)),
            FromEngine::Acted(_) => tracing::warn!("engine answered a request that this worker did not make"),
        }
    }
}

fn apply(
    env: &mut dyn VecEnv,
    slot: u32,
    command: Command,
    video: &mut BTreeMap<u32, bool>,
    action_dim: usize,
) -> Result<SlotReport, WorkerError> {
    let missing = WorkerError::Slot {
        slot,
        slots: env.num_envs(),
    };
    match command {
        Command::Reset(reset) => {
            let key = ResetKey {
                seed: reset.seed,
                env: reset.env,
                episode: reset.episode,
                reset_state: reset.reset_state,
                task: reset.task,
            };
            video.insert(slot, reset.video);
            let seen = env.reset(slot as usize, &key).ok_or(missing)?;
            Ok(SlotReport {
                slot,
                outcome: None,
                observation: Some(observation(seen)),
            })
        }
        Command::Act(actions) => {
            let values = actions
                .to_f32("actions", None)
                .map_err(|source| WorkerError::Actions { slot, source })?;
            if actions.dims().len() != 2 || actions.dims().last() != Some(&action_dim) {
                // the shape comes from the engine and must match this worker's spec
                let source = actions
                    .to_f32("actions", Some(&[values.len() / action_dim.max(1), action_dim]))
                    .err();
                return Err(source.map_or(missing, |source| WorkerError::Actions { slot, source }));
            }
            let frames = video.get(&slot).copied().unwrap_or(false);
            let done = env.step_chunk(slot as usize, &values, frames).ok_or(missing)?;
            let seen = env.observe(slot as usize).map(observation);
            let outcome = Outcome {
                rewards: done.rewards,
                terminated: done.terminated,
                truncated: done.truncated,
                success: done.success,
                frames: done.frames.into_iter().map(array).collect(),
            };
            Ok(SlotReport {
                slot,
                outcome: Some(outcome),
                observation: seen,
            })
        }
    }
}
