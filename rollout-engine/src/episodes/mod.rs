//! Which slot does what: orders become resets, reports become questions to the policy, finished episodes become trajectories.
//!
//! No socket and no clock in here: events go in, [`Effects`] come out.

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

/// Most slots of all workers together.
const MAX_ALL_SLOTS: u32 = 65_536;

/// What the policy asks of workers and gives to episodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Rows of an action chunk.
    pub action_chunk: usize,
    /// Width of the environment's action.
    pub env_action_dim: usize,
    /// Whether values are estimated.
    pub critic: bool,
    /// Whether a terminated episode's last observation is valued too.
    pub bootstrap_terminated: bool,
}

/// A message of a worker that breaks the protocol or does not fit the policy.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    /// Another width of actions.
    #[error(
        "environment `{env}` has actions of width {found}, the policy gives {expected} (`env_action_dim` of its bundle)"
    )]
    ActionDim {
        /// Which environment.
        env: String,
        /// The policy's.
        expected: usize,
        /// The environment's.
        found: u32,
    },
    /// Too few or too many slots.
    #[error("worker `{client}` has {found} slots, expected 1 to {MAX_SLOTS}")]
    Slots {
        /// Which worker.
        client: String,
        /// Its slots.
        found: u32,
    },
    /// Too many slots of all workers.
    #[error("worker `{client}` has {found} slots, expected at most {MAX_ALL_SLOTS} of all workers, {present} are here")]
    AllSlots {
        /// Which worker.
        client: String,
        /// Its slots.
        found: u32,
        /// Slots of the others.
        present: u32,
    },
    /// A slot that the worker does not have.
    #[error("expected 0 to {}", .count.saturating_sub(1))]
    Slot {
        /// Slots of the worker.
        count: usize,
    },
    /// A report that does not fit what the slot does.
    #[error("reports {found}, but it {state}")]
    Report {
        /// The report.
        found: &'static str,
        /// What the slot does.
        state: &'static str,
    },
    /// Another number of rewards.
    #[error("{found} rewards, expected {expected}, or 1 to {expected} at the end of the episode")]
    Rewards {
        /// Rows of an action chunk.
        expected: usize,
        /// Rewards of the report.
        found: usize,
    },
    /// A reward that is not finite.
    #[error("reward {0}, expected a finite number")]
    Reward(f32),
    /// No observation though there is one.
    #[error("no observation though the episode did not terminate")]
    NoObservation,
}

/// An observation of a slot, and what is asked about it.
#[derive(Debug)]
pub struct Question {
    /// Its number.
    pub ticket: Ticket,
    /// The observation.
    pub row: ActRow,
}

/// What is to be sent after an event.
#[derive(Debug)]
pub struct Effects<P> {
    /// Commands by worker.
    pub commands: BTreeMap<P, Vec<SlotCommand>>,
    /// Questions for the policy.
    pub questions: Vec<Question>,
    /// Finished episodes.
    pub trajectories: Vec<Trajectory>,
    /// Workers that are turned away.
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

/// An episode that the learner wants.
#[derive(Debug, Clone)]
struct Wanted {
    reset: Reset,
    mode: Mode,
    /// Versions that may make its chunks.
    versions: RangeInclusive<u64>,
}

/// An episode on its way.
#[derive(Debug)]
struct Episode {
    order: u64,
    generation: u64,
    wanted: Wanted,
    prompt: String,
    /// Oldest and newest version of its chunks, once the first is made.
    made_by: Option<(u64, u64)>,
    /// Made by weights that were replaced under the same version number: it begins anew.
    stale: bool,
    chunks: Vec<TrajectoryChunk>,
    /// The record of the chunk that is being executed.
    record: Option<Box<ChunkRecord>>,
    /// It ended by itself; meaningful once it has ended.
    terminated: bool,
    success: bool,
}

#[derive(Debug)]
enum Slot {
    /// The worker has not spoken of it yet.
    Unseen,
    Idle,
    /// Told to reset.
    Resetting(Episode),
    /// Its observation is with the policy.
    Thinking(Episode, u64),
    /// Executes a chunk.
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

/// The assignment of episodes to slots. `P` names a connection.
#[derive(Debug)]
pub struct Assign<P> {
    engine: String,
    shape: Option<Shape>,
    live: Option<u64>,
    order: Option<Order>,
    /// Counts the orders that replaced what was wanted; episodes of an earlier generation are not wanted any more.
    generation: u64,
    pending: VecDeque<Wanted>,
    clients: BTreeMap<P, Client>,
    /// Who has a name, and how many slots there are in sum: workers come and go by the thousand.
    names: BTreeMap<String, P>,
    slots: u32,
    /// Whose chunk a ticket asks for.
    tickets: BTreeMap<u64, (P, u32)>,
    /// Finished but for the value of their last observation.
    bootstraps: BTreeMap<u64, Episode>,
    next_ticket: u64,
    next_trajectory: u64,
    /// The learner does not keep up: no new episode.
    full: bool,
    restarted: u64,
    effects: Effects<P>,
}

impl<P: Ord + Clone> Assign<P> {
    /// Nothing is known yet; `engine` names this session in trajectories.
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

    /// Takes what is to be sent.
    pub fn take_effects(&mut self) -> Effects<P> {
        std::mem::take(&mut self.effects)
    }

    /// Slots of all workers.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// The newest order.
    pub fn order_number(&self) -> Option<u64> {
        self.order.as_ref().map(|o| o.order)
    }

    /// Episodes that were begun anew, because their worker left or their version was replaced.
    pub fn restarted(&self) -> u64 {
        self.restarted
    }

    /// Resets that wait for a slot.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Whether all pending resets wait for a version that is not live yet.
    pub fn parked(&self) -> bool {
        let may_begin = |wanted: &Wanted| self.live.is_some_and(|live| wanted.versions.contains(&live));
        !self.pending.is_empty() && !self.pending.iter().any(may_begin)
    }

    /// A version went live.
    pub fn went_live(&mut self, version: u64, shape: Shape) {
        self.live = Some(version);
        self.shape = Some(shape);
        self.hand_out();
    }

    /// Other weights with the number of the live version are on their way (the learner began anew): no episode begins before
    /// they are live, and those that run begin anew.
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

    /// Whether the buffer of unacknowledged trajectories is full.
    pub fn set_full(&mut self, full: bool) {
        self.full = full;
        self.hand_out();
    }

    /// An order of the learner: replaces the pending resets, or adds to them; the same order again changes nothing. An episode
    /// that runs already and is wanted again (the learner spreads episodes anew when engines come and go) goes on for the new
    /// order.
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

    /// A worker says hello. Its unfinished episodes from an earlier connection begin anew.
    ///
    /// # Errors
    /// It does not fit the policy; what was expected and found.
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

    /// A worker is gone: its unfinished episodes wait for another slot.
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

    /// The episode begins anew in the next idle slot, unless its order was replaced.
    fn requeue(&mut self, episode: Episode) {
        if self.generation == episode.generation {
            self.pending.push_front(episode.wanted);
            self.restarted += 1;
        }
    }

    /// Reports of a worker. One that breaks the protocol is turned away and its episodes begin anew.
    pub fn reports(&mut self, peer: &P, reports: Vec<SlotReport>) {
        if self.shape.is_none() || !self.clients.contains_key(peer) {
            // of before this engine's time, or of a worker that was taken for gone
            self.effects.refusals.push((
                peer.clone(),
                Refusal {
                    request: None,
                    retry: true,
                    reason: "reports of a worker that is not known here: say hello first".to_owned(),
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
                    // so that its episode is not lost when the worker is turned away
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

    /// The policy answered a slot's question with a chunk of `version`. When that is none of the versions that may make the
    /// episode, because another one went live in between, it begins anew.
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

    /// The policy cannot answer a slot's question: its worker is turned away with the reason.
    pub fn failed(&mut self, ticket: u64, reason: &str) {
        if let Some(episode) = self.bootstraps.remove(&ticket) {
            tracing::warn!("value of the last observation: {reason}; the episode begins anew");
            self.requeue(episode);
            self.hand_out();
        } else if let Some((peer, index)) = self.tickets.remove(&ticket) {
            self.turn_away(&peer, format!("slot {index}: {reason}"));
        }
    }

    /// The value of a finished episode's last observation.
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

    /// Gives pending resets to idle slots, the first that the live version may make first.
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
