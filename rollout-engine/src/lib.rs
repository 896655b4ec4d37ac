//! The rollout engine: serves a policy to env workers and clients, records what training needs, reloads without a gap.
//!
//! Modules stand in the data's order: what uses stands above what is used. A request comes in at [`front`], waits in [`queue`], and
//! is answered on [`device`].

// What ends the program, by its class.
pub mod exit;
pub mod serve;
// The outside: ZeroMQ for env workers and clients, HTTP for operators.
pub mod front;
// The learner's side: orders and versions in, trajectories out.
pub mod learner;
// Which slot runs which episode.
pub mod episodes;
// The threads between the queue and the device.
pub mod inference;
pub mod queue;
pub mod job;
pub mod bench;
// Processors that run policy versions.
pub mod device;
pub mod metrics;
pub mod pulse;
