//! Assignment of episodes to slots: orders become resets, reports become questions to the policy, finished episodes become
//! trajectories.
//!
//! The module has no socket and no clock: events go in, [`Effects`] come out.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::RangeInclusive,
};

use policy::noise::NoiseKey;
use wire::messages::{
    ActRow, ActedRow, ChunkRecord, Command, Hello, MAX_SLOTS, Mode, Observation, Order, Outcome, Refusal, Reset,
    SlotCommand, SlotReport, Trajectory, TrajectoryChunk,
};

use crate::job::Ticket;

/// Maximum number of slots over all workers.
const MAX_ALL_SLOTS: u32 = 65_536;

/// Sizes and heads of the policy that the assignment reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Rows of an action chunk.
    pub action_chunk: usize,
    /// Width of the environment's action.
    pub env_action_dim: usize,
    /// Whether the policy estimates values.
    pub critic: bool,
    /// Whether the last observation of a terminated episode is valued too.
    pub bootstrap_terminated: bool,
}

/// A message of a worker that breaks the protocol or does not match the policy.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    /// The environment's actions have a wrong width.
    #[error(
        "environment `{env}` has actions of width {found}, the policy gives {expected} (`env_action_dim` of its bundle)"
    )]
    ActionDim {
        /// Name of the environment.
        env: String,
        /// Width in the policy's bundle.
        expected: usize,
        /// Width of the environment's actions.
        found: u32,
    },
    /// The worker has no slots or too many.
    #[error("worker `{client}` has {found} slots, expected 1 to {MAX_SLOTS}")]
    Slots {
        /// Name of the worker.
        client: String,
        /// Slots of the worker.
        found: u32,
    },
    /// All workers together have too many slots.
    #[error("worker `{client}` has {found} slots, expected at most {MAX_ALL_SLOTS} of all workers, {present} are here")]
    AllSlots {
        /// Name of the worker.
        client: String,
        /// Slots of the worker.
        found: u32,
        /// Slots of the other workers.
        present: u32,
    },
    /// The worker has no slot of this index.
    #[error("expected 0 to {}", .count.saturating_sub(1))]
    Slot {
        /// Slots of the worker.
        count: usize,
    },
    /// The report does not match the state of the slot.
    #[error("reports {found}, but it {state}")]
    Report {
        /// Kind of the report.
        found: &'static str,
        /// State of the slot.
        state: &'static str,
    },
    /// The report has a wrong number of rewards.
    #[error("{found} rewards, expected {expected}, or 1 to {expected} at the end of the episode")]
    Rewards {
        /// Rows of an action chunk.
        expected: usize,
        /// Rewards of the report.
        found: usize,
    },
    /// A reward is not finite.
    #[error("reward {0}, expected a finite number")]
    Reward(f32),
    /// The observation of a running or truncated episode is missing.
    #[error("no observation though the episode did not terminate")]
    NoObservation,
}

/// An observation of a slot, with the kind of answer.
#[derive(Debug)]
pub struct Question {
    /// Ticket of the answer.
    pub ticket: Ticket,
    /// The observation.
    pub row: ActRow,
}

/// Messages to send after an event.
#[derive(Debug)]
pub struct Effects<P> {
    /// Commands by worker.
    pub commands: BTreeMap<P, Vec<SlotCommand>>,
    /// Questions for the policy.
    pub questions: Vec<Question>,
    /// Finished episodes.
    pub trajectories: Vec<Trajectory>,
    /// Refusals of workers' messages.
    pub refusals: Vec<(P, Refusal)>,
}

impl<P> Default for Effects<P> {
    fn default() -> Self {
        Self {
            commands: BTreeMap::new(),
            questions: Vec::new(),
            trajectories: Vec::new(),
            refusals: Vec::new(),
        }
    }
}

/// An ordered episode that has not started.
#[derive(Debug, Clone)]
struct Wanted {
    reset: Reset,
    mode: Mode,
    /// Versions that may sample the episode's chunks.
    versions: RangeInclusive<u64>,
}

/// A running episode.
#[derive(Debug)]
struct Episode {
    order: u64,
    generation: u64,
    wanted: Wanted,
    prompt: String,
    /// Oldest and newest version of the episode's chunks; `None` before the first chunk.
    made_by: Option<(u64, u64)>,
    /// Whether the episode has chunks from weights that were replaced under the same version number; such an episode restarts.
    stale: bool,
    chunks: Vec<TrajectoryChunk>,
    /// The record of the chunk that is being executed.
    record: Option<Box<ChunkRecord>>,
    /// Whether the episode terminated; meaningful after its end.
    terminated: bool,
    success: bool,
}

#[derive(Debug)]
enum Slot {
    /// The worker has not reported the slot yet.
    Unseen,
    Idle,
    /// The reset was sent.
    Resetting(Episode),
    /// The policy computes a chunk for the ticket.
    Thinking(Episode, u64),
    /// The worker executes a chunk.
    Acting(Episode),
}

impl Slot {
    fn episode_mut(&mut self) -> Option<&mut Episode> {
        match self {
            Self::Unseen | Self::Idle => None,
            Self::Resetting(e) | Self::Thinking(e, _) | Self::Acting(e) => Some(e),
        }
    }

    fn episode(self) -> Option<Episode> {
        match self {
            Self::Unseen | Self::Idle => None,
            Self::Resetting(e) | Self::Thinking(e, _) | Self::Acting(e) => Some(e),
        }
    }
}

#[derive(Debug)]
struct Client {
    name: String,
    slots: Vec<Slot>,
}

/// The assignment of episodes to slots. `P` identifies a connection.
#[derive(Debug)]
pub struct Assign<P> {
    engine: String,
    shape: Option<Shape>,
    live: Option<u64>,
    order: Option<Order>,
    /// Number of orders that replaced the pending resets; episodes of an earlier generation are not restarted.
    generation: u64,
    pending: VecDeque<Wanted>,
    clients: BTreeMap<P, Client>,
    /// Connection of each worker's name; with `slots`, the sum of all slots, kept because thousands of workers connect and
    /// disconnect.
    names: BTreeMap<String, P>,
    slots: u32,
    /// The slot of each open ticket.
    tickets: BTreeMap<u64, (P, u32)>,
    /// Finished episodes that wait for the value of their last observation.
    bootstraps: BTreeMap<u64, Episode>,
    next_ticket: u64,
    next_trajectory: u64,
    /// Whether the buffer of unacknowledged trajectories is full; no episode starts then.
    full: bool,
    restarted: u64,
    effects: Effects<P>,
}

impl<P: Ord + Clone> Assign<P> {
    /// Creates an empty assignment; `engine` is the name of this session in trajectories.
    pub fn new(engine: String) -> Self {
        Self {
            engine,
            shape: None,
            live: None,
            order: None,
            generation: 0,
            pending: VecDeque::new(),
            clients: BTreeMap::new(),
            names: BTreeMap::new(),
            slots: 0,
            tickets: BTreeMap::new(),
            bootstraps: BTreeMap::new(),
            next_ticket: 0,
            next_trajectory: 1,
            full: false,
            restarted: 0,
            effects: Effects::default(),
        }
    }

    /// Returns and clears the messages to send.
    pub fn take_effects(&mut self) -> Effects<P> {
        std::mem::take(&mut self.effects)
    }

    /// Returns the number of slots over all workers.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// Returns the number of the newest order.
    pub fn order_number(&self) -> Option<u64> {
        self.order.as_ref().map(|o| o.order)
    }

    /// Returns the number of restarted episodes, because the worker disconnected or the version was replaced.
    pub fn restarted(&self) -> u64 {
        self.restarted
    }

    /// Returns the number of resets that wait for a slot.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Returns whether every pending reset waits for a version that is not live yet.
    pub fn parked(&self) -> bool {
        let may_begin = |wanted: &Wanted| self.live.is_some_and(|live| wanted.versions.contains(&live));
        !self.pending.is_empty() && !self.pending.iter().any(may_begin)
    }

    /// Records that a version is live.
    pub fn went_live(&mut self, version: u64, shape: Shape) {
        self.live = Some(version);
        self.shape = Some(shape);
        self.hand_out();
    }

    /// Retires the live version: the learner restarted and announced other weights with the same number. No episode starts before
    /// these are live, and running episodes restart.
    pub fn retire(&mut self) {
        self.live = None;
        for episode in self
            .clients
            .values_mut()
            .flat_map(|c| &mut c.slots)
            .filter_map(Slot::episode_mut)
        {
            episode.stale = true;
        }
        for episode in self.bootstraps.values_mut() {
            episode.stale = true;
        }
    }

    /// Sets whether the buffer of unacknowledged trajectories is full.
    pub fn set_full(&mut self, full: bool) {
        self.full = full;
        self.hand_out();
    }

    /// Accepts an order of the learner, which replaces the pending resets or adds to them; a repeated order changes nothing. A
    /// running episode that is ordered again continues under the new order. (The learner redistributes episodes when engines
    /// connect and disconnect.)
    pub fn take_order(&mut self, order: Order) {
        if self.order.as_ref() == Some(&order) {
            return;
        }
        let wanted = order.batches.iter().flat_map(|batch| {
            batch.resets.iter().map(|reset| Wanted {
                reset: reset.clone(),
                mode: batch.mode,
                versions: batch.oldest..=batch.newest,
            })
        });
        if order.replaces {
            self.generation += 1;
            self.pending = wanted.collect();
        } else {
            let (evaluation, training): (Vec<_>, Vec<_>) = wanted.partition(|wanted| wanted.mode == Mode::Eval);
            for wanted in evaluation.into_iter().rev() {
                self.pending.push_front(wanted);
            }
            self.pending.extend(training);
        }
        let slots = self
            .clients
            .values_mut()
            .flat_map(|c| &mut c.slots)
            .filter_map(Slot::episode_mut);
        for episode in slots.chain(self.bootstraps.values_mut()) {
            let fits = |wanted: &Wanted| {
                let allowed = |version| wanted.versions.contains(&version);
                wanted.reset == episode.wanted.reset
                    && wanted.mode == episode.wanted.mode
                    && episode
                        .made_by
                        .is_none_or(|(oldest, newest)| allowed(oldest) && allowed(newest))
            };
            if !episode.stale
                && let Some(place) = self.pending.iter().position(fits)
                && let Some(wanted) = self.pending.remove(place)
            {
                episode.wanted = wanted;
                episode.order = order.order;
                episode.generation = self.generation;
            }
        }
        self.order = Some(order);
        self.hand_out();
    }

    /// Registers a worker. Unfinished episodes of its earlier connection restart.
    ///
    /// # Errors
    /// The worker does not match the policy or a limit; the error has the expected and the found value.
    pub fn hello(&mut self, peer: P, hello: &Hello) -> Result<(), WorkerError> {
        if let Some(shape) = self.shape
            && hello.action_dim as usize != shape.env_action_dim
        {
            return Err(WorkerError::ActionDim {
                env: hello.env.clone(),
                expected: shape.env_action_dim,
                found: hello.action_dim,
            });
        }
        if hello.slots == 0 || hello.slots > MAX_SLOTS as u32 {
            return Err(WorkerError::Slots {
                client: hello.client.clone(),
                found: hello.slots,
            });
        }
        if let Some(earlier) = self.names.get(&hello.client).cloned() {
            self.gone(&earlier);
        }
        self.gone(&peer);
        if self.slots() + hello.slots > MAX_ALL_SLOTS {
            return Err(WorkerError::AllSlots {
                client: hello.client.clone(),
                found: hello.slots,
                present: self.slots(),
            });
        }
        let slots = (0..hello.slots).map(|_| Slot::Unseen).collect();
        self.slots += hello.slots;
        self.names.insert(hello.client.clone(), peer.clone());
        self.clients.insert(
            peer,
            Client {
                name: hello.client.clone(),
                slots,
            },
        );
        self.hand_out();
        Ok(())
    }

    /// Removes a disconnected worker; its unfinished episodes wait for another slot.
    pub fn gone(&mut self, peer: &P) {
        let Some(client) = self.clients.remove(peer) else {
            return;
        };
        self.slots -= client.slots.len() as u32;
        self.names.remove(&client.name);
        for slot in client.slots.into_iter().rev() {
            if let Some(episode) = slot.episode() {
                self.requeue(episode);
            }
        }
        self.tickets.retain(|_, (p, _)| p != peer);
        self.hand_out();
    }

    /// Restarts the episode in the next idle slot, unless its order was replaced.
    fn requeue(&mut self, episode: Episode) {
        if self.generation == episode.generation {
            self.pending.push_front(episode.wanted);
            self.restarted += 1;
        }
    }

    /// Handles reports of a worker. A report that breaks the protocol is refused, the worker is removed and its episodes restart.
    pub fn reports(&mut self, peer: &P, reports: Vec<SlotReport>) {
        if self.shape.is_none() || !self.clients.contains_key(peer) {
            // sent before this engine started, or by a worker that was removed
            self.effects.refusals.push((
                peer.clone(),
                Refusal {
                    request: None,
                    retry: true,
                    reason: "reports of an unregistered worker: register first".to_owned(),
                },
            ));
            return;
        }
        for report in reports {
            let slot = report.slot;
            if let Err(error) = self.report(peer, report) {
                self.turn_away(peer, format!("slot {slot}: {error}"));
                return;
            }
        }
        self.hand_out();
    }

    fn turn_away(&mut self, peer: &P, reason: String) {
        self.effects.commands.remove(peer);
        self.effects.refusals.push((
            peer.clone(),
            Refusal {
                request: None,
                retry: false,
                reason,
            },
        ));
        self.gone(peer);
    }

    fn report(&mut self, peer: &P, report: SlotReport) -> Result<(), WorkerError> {
        let (Some(shape), Some(client)) = (self.shape, self.clients.get_mut(peer)) else {
            return Ok(());
        };
        let count = client.slots.len();
        let index = report.slot;
        let slot = client
            .slots
            .get_mut(index as usize)
            .ok_or(WorkerError::Slot { count })?;
        match (std::mem::replace(slot, Slot::Idle), report.outcome, report.observation) {
            (old, None, None) => {
                if let Some(episode) = old.episode() {
                    self.requeue(episode);
                }
                self.tickets.retain(|_, (p, s)| !(p == peer && *s == index));
                Ok(())
            }
            (Slot::Resetting(mut episode), None, Some(seen)) => {
                episode.prompt.clone_from(&seen.prompt);
                self.ask(peer, index, episode, seen);
                Ok(())
            }
            (Slot::Acting(episode), Some(outcome), seen) => self.executed(peer, index, episode, outcome, seen, shape),
            (other, outcome, seen) => {
                let found = match (&outcome, &seen) {
                    (None, _) => "an observation without an outcome",
                    (Some(_), None) => "an outcome without an observation",
                    (Some(_), Some(_)) => "an outcome with an observation",
                };
                let state = match &other {
                    Slot::Unseen | Slot::Idle => "is idle",
                    Slot::Resetting(_) => "was told to reset",
                    Slot::Thinking(..) => "waits for its actions",
                    Slot::Acting(_) => "executes a chunk",
                };
                if let Some(slot) = self.clients.get_mut(peer).and_then(|c| c.slots.get_mut(index as usize)) {
                    // the episode is kept for the restart when the worker is removed
                    *slot = other;
                }
                Err(WorkerError::Report { found, state })
            }
        }
    }

    fn executed(
        &mut self,
        peer: &P,
        index: u32,
        mut episode: Episode,
        outcome: Outcome,
        seen: Option<Observation>,
        shape: Shape,
    ) -> Result<(), WorkerError> {
        let (executed, full) = (outcome.rewards.len(), shape.action_chunk);
        let goes_on = !outcome.terminated && !outcome.truncated;
        let problem = if executed > full || executed == 0 || (executed < full && goes_on) {
            Some(WorkerError::Rewards {
                expected: full,
                found: executed,
            })
        } else if let Some(reward) = outcome.rewards.iter().find(|r| !r.is_finite()) {
            Some(WorkerError::Reward(*reward))
        } else if !outcome.terminated && seen.is_none() {
            Some(WorkerError::NoObservation)
        } else {
            None
        };
        if let Some(problem) = problem {
            self.requeue(episode);
            return Err(problem);
        }
        if episode.stale {
            self.requeue(episode);
            return Ok(());
        }
        let frames = if episode.wanted.reset.video {
            outcome.frames
        } else {
            Vec::new()
        };
        episode.chunks.push(TrajectoryChunk {
            record: episode.record.take(),
            rewards: outcome.rewards,
            frames,
        });
        episode.success |= outcome.success;
        if outcome.terminated || outcome.truncated {
            episode.terminated = outcome.terminated;
            let wanted = shape.critic && (!outcome.terminated || shape.bootstrap_terminated);
            match seen {
                Some(seen) if wanted && episode.wanted.mode == Mode::Train => {
                    let ticket = self.ticket();
                    self.effects.questions.push(Question {
                        ticket: Ticket::Bootstrap(ticket),
                        row: row(&episode, seen),
                    });
                    self.bootstraps.insert(ticket, episode);
                }
                _ => self.finish(episode, None),
            }
        } else if let Some(seen) = seen {
            self.ask(peer, index, episode, seen);
        }
        Ok(())
    }

    fn ticket(&mut self) -> u64 {
        self.next_ticket += 1;
        self.next_ticket
    }

    fn ask(&mut self, peer: &P, index: u32, episode: Episode, seen: Observation) {
        let ticket = self.ticket();
        self.effects.questions.push(Question {
            ticket: Ticket::Chunk(ticket),
            row: row(&episode, seen),
        });
        self.tickets.insert(ticket, (peer.clone(), index));
        if let Some(slot) = self.clients.get_mut(peer).and_then(|c| c.slots.get_mut(index as usize)) {
            *slot = Slot::Thinking(episode, ticket);
        }
    }

    fn finish(&mut self, episode: Episode, final_value: Option<f32>) {
        let id = self.next_trajectory;
        self.next_trajectory += 1;
        self.effects.trajectories.push(Trajectory {
            id,
            engine: self.engine.clone(),
            order: episode.order,
            reset: episode.wanted.reset,
            mode: episode.wanted.mode,
            prompt: episode.prompt,
            chunks: episode.chunks,
            terminated: episode.terminated,
            success: episode.success,
            final_value,
        });
    }

    /// Accepts a chunk of `version` for a slot's question. The episode restarts when `version`, live only
    /// since the question, may not sample this episode.
    pub fn acted(&mut self, ticket: u64, version: u64, row: ActedRow) {
        let Some((peer, index)) = self.tickets.remove(&ticket) else {
            return;
        };
        let Some(slot) = self
            .clients
            .get_mut(&peer)
            .and_then(|c| c.slots.get_mut(index as usize))
        else {
            return;
        };
        match std::mem::replace(slot, Slot::Idle) {
            Slot::Thinking(mut episode, asked) if asked == ticket => {
                if episode.stale || !episode.wanted.versions.contains(&version) {
                    self.requeue(episode);
                    self.hand_out();
                    return;
                }
                let (oldest, newest) = episode.made_by.unwrap_or((version, version));
                episode.made_by = Some((oldest.min(version), newest.max(version)));
                episode.record = row.record;
                *slot = Slot::Acting(episode);
                let command = SlotCommand {
                    slot: index,
                    command: Command::Act(row.actions),
                };
                self.effects.commands.entry(peer).or_default().push(command);
            }
            other => *slot = other,
        }
    }

    /// Handles a slot's question that the policy cannot answer: the worker is refused with the reason.
    pub fn failed(&mut self, ticket: u64, reason: &str) {
        if let Some(episode) = self.bootstraps.remove(&ticket) {
            tracing::warn!("value of the last observation: {reason}; the episode restarts");
            self.requeue(episode);
            self.hand_out();
        } else if let Some((peer, index)) = self.tickets.remove(&ticket) {
            self.turn_away(&peer, format!("slot {index}: {reason}"));
        }
    }

    /// Accepts the value of a finished episode's last observation.
    pub fn bootstrapped(&mut self, ticket: u64, value: Option<f32>) {
        match self.bootstraps.remove(&ticket) {
            Some(episode) if episode.stale => {
                self.requeue(episode);
                self.hand_out();
            }
            Some(episode) => self.finish(episode, value),
            None => {}
        }
    }

    /// Assigns pending resets to idle slots, in order, skipping resets that the live version may not sample.
    fn hand_out(&mut self) {
        let (Some(order), Some(live)) = (self.order_number(), self.live) else {
            return;
        };
        if self.full || self.pending.is_empty() {
            return;
        }
        for (peer, client) in &mut self.clients {
            for (index, slot) in client.slots.iter_mut().enumerate() {
                if !matches!(slot, Slot::Idle) {
                    continue;
                }
                let next = self.pending.iter().position(|wanted| wanted.versions.contains(&live));
                let Some(wanted) = next.and_then(|place| self.pending.remove(place)) else {
                    return;
                };
                let command = SlotCommand {
                    slot: index as u32,
                    command: Command::Reset(wanted.reset.clone()),
                };
                self.effects.commands.entry(peer.clone()).or_default().push(command);
                *slot = Slot::Resetting(Episode {
                    order,
                    generation: self.generation,
                    wanted,
                    prompt: String::new(),
                    made_by: None,
                    stale: false,
                    chunks: Vec::new(),
                    record: None,
                    terminated: false,
                    success: false,
                });
            }
        }
    }
}

fn row(episode: &Episode, observation: Observation) -> ActRow {
    let reset = &episode.wanted.reset;
    let chunk = episode.chunks.len() as u32;
    let key = NoiseKey {
        seed: reset.seed,
        env: reset.env,
        episode: reset.episode,
        chunk,
    };
    ActRow {
        observation,
        key,
        mode: episode.wanted.mode,
        record: episode.wanted.mode == Mode::Train,
        guidance: None,
    }
}

#[cfg(test)]
mod tests;
