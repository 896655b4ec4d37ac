//! How a program of ours runs as a process: what it logs, how it ends when it is told to, and with which exit code.

pub mod log;
pub mod stop;
pub mod exit;
