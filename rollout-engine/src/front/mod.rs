//! Outer interfaces of the engine: websockets for openpi's clients, ZeroMQ for env workers and clients, HTTP for operators.

pub mod websocket;
pub mod zmq;
mod rows;
pub mod http;
