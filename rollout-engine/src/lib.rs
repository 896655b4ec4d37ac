//! The rollout engine: serves a policy to env workers and clients, records what training needs, reloads without a gap.

pub mod assign;
pub mod backend;
pub mod bench;
pub mod http;
pub mod incoming;
pub mod infer;
pub mod inference;
pub mod learner_link;
pub mod metrics;
pub mod policy_slot;
pub mod preprocess;
pub mod queue;
pub mod record;
pub mod serve;
