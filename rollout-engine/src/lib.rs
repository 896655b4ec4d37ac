//! The rollout engine: serves a policy to env workers and clients, records chunks for training, swaps policy versions without a
//! pause.
//!
//! Modules are in the order of the data: a module stands above the modules that it uses. A request arrives at [`front`], waits in
//! [`queue`], and is answered on [`device`].

// Exit-code classes of errors.
pub mod exit;
pub mod serve;
// Outer interfaces: websockets, ZeroMQ, HTTP.
pub mod front;
// The learner's side: orders and versions in, trajectories out.
pub mod learner;
// Assignment of episodes to slots.
pub mod episodes;
// The threads between the queue and the device.
pub mod inference;
pub mod queue;
pub mod job;
pub mod bench;
pub mod compare;
pub mod rehearse;
// Processors that run policy versions.
pub mod device;
pub mod metrics;
pub mod pulse;
