//! The rollout engine: serves a policy to env workers and clients, records what training needs, reloads without a gap.

pub mod serve;
pub mod assign;
pub mod queue;
pub mod inference;
pub mod preprocess;
pub mod infer;
pub mod record;
pub mod backend;
pub mod policy_slot;
pub mod incoming;
pub mod learner_link;
pub mod metrics;
pub mod http;
pub mod bench;
