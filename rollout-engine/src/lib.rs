//! The rollout engine: serves a policy to env workers and clients, records what training needs, reloads without a gap.

pub mod serve;
pub mod assign;
pub mod queue;
pub mod preprocess;
pub mod backend;
pub mod infer;
pub mod policy_slot;
pub mod inference;
pub mod record;
pub mod learner_link;
pub mod incoming;
pub mod metrics;
pub mod pulse;
pub mod http;
pub mod bench;
