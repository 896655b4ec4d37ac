//! The link to the learner: orders and versions in, trajectories out.

pub mod link;
pub mod incoming;
