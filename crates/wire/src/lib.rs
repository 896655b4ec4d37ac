//! What crosses a process border: messages, one codec, sockets.

pub mod array;
pub mod codec;
pub mod messages;
pub mod socket;
