//! Communication between processes: messages, one codec, sockets.

pub mod text;
pub mod array;
pub mod messages;
pub mod codec;
pub mod limits;
mod zmtp;
pub mod socket;
