//! The websocket endpoint, which speaks to the unmodified `openpi-client`: observations as msgpack maps, action chunks as replies.
//!
//! The server sends the policy's metadata first. Afterwards each binary message is one observation, and the answer is one binary
//! message with the actions of the whole horizon. A rejected message is answered with one line in a text frame, then the
//! connection is closed, as openpi's server does. All connections share the engine's queue, so their observations are batched.
//!
//! Chunks are sampled in evaluation mode. The noise key of a chunk is (seed 0, env 0, episode = number of the session since the
//! start, chunk = number of the chunk in the session); every reply states the key.
//!
//! The endpoint has a separate thread. Large messages are decoded on other threads, so no connection waits for another one.

mod server;
mod session;
mod observation;
mod reply;
mod numpy;
mod msgpack;
mod arrival;
mod key;

pub use server::{Sources, Websocket, WebsocketError, WebsocketOptions, start};
