//! The link to the learner: receives orders and versions, sends trajectories.

pub mod link;
pub mod incoming;
