//! Outer interfaces of the engine: ZeroMQ for env workers and clients, HTTP for operators.

pub mod zmq;
mod rows;
pub mod http;
