//! What crosses a process border: messages, one codec, sockets.

pub mod array;
pub mod messages;
pub mod codec;
pub mod socket;
