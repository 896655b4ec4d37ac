//! What the engine shows to the outside: ZeroMQ for env workers and clients, HTTP for operators.

mod rows;
pub mod zmq;
pub mod http;
