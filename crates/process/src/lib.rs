//! Process behavior of pirl programs: logging, stopping on a signal, and exit codes.

pub mod log;
pub mod stop;
pub mod exit;
