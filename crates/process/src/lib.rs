//! How a program of ours runs as a process: what it logs, and how it ends when it is told to.

pub mod log;
pub mod stop;
