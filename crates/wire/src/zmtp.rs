//! ZMTP 3.1 with the NULL mechanism, as bytes: greeting, commands, frame headers (rfc.zeromq.org/spec/37). Uses no socket.

use crate::limits::MAX_COMMAND_BYTES;

/// Size of a greeting in bytes.
pub(crate) const GREETING_BYTES: usize = 64;
/// Size of the longest frame header in bytes: flags and a 64-bit length.
pub(crate) const MAX_HEADER_BYTES: usize = 9;

const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;
/// Mechanism name, padded to 20 bytes.
const NULL: [u8; 20] = *b"NULL\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// Violation of the protocol or of a limit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ZmtpError {
    #[error("its greeting is not one of ZMTP 3: it speaks another protocol")]
    Greeting,
    #[error("its greeting has ZMTP version {0}, expected 3")]
    Version(u8),
    #[error("its greeting has another security mechanism, expected NULL")]
    Mechanism,
    #[error("its handshake is broken: {0}")]
    Handshake(&'static str),
    #[error("it is a {found} socket, expected {expected}")]
    SocketType { found: String, expected: &'static str },
    #[error("it rejected the handshake: {0}")]
    Rejected(String),
    #[error("a frame has the flags {0:#04x}")]
    Flags(u8),
    #[error("a frame announces {found} bytes, expected at most {most}")]
    Long { found: u64, most: usize },
    #[error("a message has more than {0} parts")]
    Parts(usize),
    #[error("a first part of a message has {0} bytes, expected an empty delimiter")]
    Delimiter(u64),
}

/// Type of a socket on this side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SocketType {
    Router,
    Dealer,
}

impl SocketType {
    fn name(self) -> &'static str {
        match self {
            Self::Router => "ROUTER",
            Self::Dealer => "DEALER",
        }
    }

    /// Returns the socket types that the peer may have, as a list and as text for an error.
    fn peers(self) -> (&'static [&'static str], &'static str) {
        match self {
            Self::Router => (&["DEALER", "REQ", "ROUTER"], "DEALER, REQ or ROUTER"),
            Self::Dealer => (&["ROUTER", "REP", "DEALER"], "ROUTER, REP or DEALER"),
        }
    }
}

/// Returns the greeting of this side.
pub(crate) fn greeting() -> [u8; GREETING_BYTES] {
    let mut bytes = [0u8; GREETING_BYTES];
    let head = [0xff, 0, 0, 0, 0, 0, 0, 0, 1, 0x7f, 3, 1];
    for (byte, value) in bytes.iter_mut().zip(head.into_iter().chain(NULL)) {
        *byte = value;
    }
    bytes
}

/// Checks the part of a peer's greeting that has arrived, so that an invalid greeting is rejected early.
pub(crate) fn check_greeting(bytes: &[u8]) -> Result<(), ZmtpError> {
    let wrong = |index: usize, right: fn(u8) -> bool| bytes.get(index).is_some_and(|b| !right(*b));
    if wrong(0, |b| b == 0xff) || wrong(9, |b| b == 0x7f) {
        return Err(ZmtpError::Greeting);
    }
    if let Some(version) = bytes.get(10)
        && *version < 3
    {
        return Err(ZmtpError::Version(*version));
    }
    let mechanism = bytes.get(12..bytes.len().min(32)).unwrap_or_default();
    if mechanism.iter().zip(NULL).any(|(found, right)| *found != right) {
        return Err(ZmtpError::Mechanism);
    }
    Ok(())
}

/// Frame header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FrameHeader {
    pub(crate) more: bool,
    pub(crate) command: bool,
    pub(crate) bytes: u64,
}

/// Reads a frame header; returns the header and its length, or `None` while bytes are missing.
pub(crate) fn frame_header(bytes: &[u8]) -> Result<Option<(FrameHeader, usize)>, ZmtpError> {
    let Some(flags) = bytes.first().copied() else {
        return Ok(None);
    };
    let (more, long, command) = (flags & MORE != 0, flags & LONG != 0, flags & COMMAND != 0);
    if flags & !(MORE | LONG | COMMAND) != 0 || (more && command) {
        return Err(ZmtpError::Flags(flags));
    }
    let length = if long { 8 } else { 1 };
    let Some(field) = bytes.get(1..=length) else {
        return Ok(None);
    };
    let bytes = field.iter().fold(0u64, |n, b| (n << 8) | u64::from(*b));
    Ok(Some((FrameHeader { more, command, bytes }, 1 + length)))
}

/// Returns the header of the last frame of a message, and its length.
pub(crate) fn message_header(bytes: usize) -> ([u8; MAX_HEADER_BYTES], usize) {
    let mut header = [0u8; MAX_HEADER_BYTES];
    let [flags, short, ..] = &mut header;
    if let Ok(length) = u8::try_from(bytes) {
        *short = length;
        return (header, 2);
    }
    *flags = LONG;
    for (byte, value) in header.iter_mut().skip(1).zip((bytes as u64).to_be_bytes()) {
        *byte = value;
    }
    (header, MAX_HEADER_BYTES)
}

/// Returns a command as a whole frame; this side sends only short commands.
fn command(name: &str, body: &[u8]) -> Vec<u8> {
    let length = 1 + name.len() + body.len();
    let mut frame = vec![COMMAND, length as u8, name.len() as u8];
    frame.extend_from_slice(name.as_bytes());
    frame.extend_from_slice(body);
    frame
}

/// Returns the READY command of this side.
pub(crate) fn ready(own: SocketType) -> Vec<u8> {
    let mut body = Vec::new();
    for (name, value) in [("Socket-Type", own.name()), ("Identity", "")] {
        body.push(name.len() as u8);
        body.extend_from_slice(name.as_bytes());
        body.extend_from_slice(&(value.len() as u32).to_be_bytes());
        body.extend_from_slice(value.as_bytes());
    }
    command("READY", &body)
}

/// Splits a command's body into name and data.
fn split_command(body: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = body.split_first()?;
    rest.split_at_checked(usize::from(*length))
}

/// Checks the size of a command frame before the frame is read.
pub(crate) fn check_command(bytes: u64) -> Result<usize, ZmtpError> {
    let long = ZmtpError::Long {
        found: bytes,
        most: MAX_COMMAND_BYTES,
    };
    let size = usize::try_from(bytes).ok().filter(|size| *size <= MAX_COMMAND_BYTES);
    size.ok_or(long)
}

/// Checks that a peer's READY command has a socket type compatible with `own`.
pub(crate) fn check_ready(body: &[u8], own: SocketType) -> Result<(), ZmtpError> {
    let broken = ZmtpError::Handshake("its first command has no name");
    let (name, mut rest) = split_command(body).ok_or(broken)?;
    if name == b"ERROR" {
        let text = rest.get(1..).unwrap_or_default();
        return Err(ZmtpError::Rejected(crate::text::shown(&String::from_utf8_lossy(text))));
    }
    if name != b"READY" {
        return Err(ZmtpError::Handshake("its first command is not READY"));
    }
    let broken = || ZmtpError::Handshake("a property of READY is cut");
    while !rest.is_empty() {
        let (key, after) = split_command(rest).ok_or_else(broken)?;
        let (length, after) = after.split_first_chunk::<4>().ok_or_else(broken)?;
        let length = u32::from_be_bytes(*length) as usize;
        let (value, after) = after.split_at_checked(length).ok_or_else(broken)?;
        if key.eq_ignore_ascii_case(b"Socket-Type") {
            let (allowed, expected) = own.peers();
            if allowed.iter().any(|name| name.as_bytes() == value) {
                return Ok(());
            }
            let found = crate::text::shown(&String::from_utf8_lossy(value));
            return Err(ZmtpError::SocketType { found, expected });
        }
        rest = after;
    }
    Err(ZmtpError::Handshake("READY names no Socket-Type"))
}

/// Returns the PONG for a PING; `None` for any other command.
pub(crate) fn pong(body: &[u8]) -> Option<Vec<u8>> {
    let (name, data) = split_command(body)?;
    // two bytes of time-to-live, then a context of at most 16 bytes
    let context = data.get(2..).filter(|context| name == b"PING" && context.len() <= 16)?;
    Some(command("PONG", context))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn greeting_is_that_of_the_specification() {
        let bytes = greeting();
        assert_eq!((bytes[0], bytes[9], bytes[10], bytes[11]), (0xff, 0x7f, 3, 1));
        assert_eq!(&bytes[12..16], b"NULL");
        assert!(
            bytes[16..].iter().all(|b| *b == 0),
            "padding, as-server and filler are zero"
        );
        for end in 0..=GREETING_BYTES {
            assert_eq!(check_greeting(&bytes[..end]), Ok(()), "{end} bytes");
        }
        for (index, value, error) in [
            (0, b'G', ZmtpError::Greeting),
            (9, 0, ZmtpError::Greeting),
            (10, 1, ZmtpError::Version(1)),
            (12, b'C', ZmtpError::Mechanism),
            (16, b'X', ZmtpError::Mechanism),
        ] {
            let mut wrong = bytes;
            wrong[index] = value;
            assert_eq!(check_greeting(&wrong[..=index]), Err(error));
        }
    }

    #[test]
    fn headers_are_those_of_the_specification() {
        for (bytes, header) in [
            (0, vec![0, 0]),
            (255, vec![0, 255]),
            (256, vec![2, 0, 0, 0, 0, 0, 0, 1, 0]),
            (1 << 20, vec![2, 0, 0, 0, 0, 0, 16, 0, 0]),
        ] {
            let (written, length) = message_header(bytes);
            assert_eq!(written[..length], header);
            let read = frame_header(&header).expect("right").expect("whole");
            let expected = FrameHeader {
                more: false,
                command: false,
                bytes: bytes as u64,
            };
            assert_eq!(read, (expected, length));
            assert_eq!(frame_header(&header[..length - 1]), Ok(None));
        }
        for flags in [5, 8, 0x80, 0xff] {
            assert_eq!(frame_header(&[flags, 0]), Err(ZmtpError::Flags(flags)));
        }
    }

    #[test]
    fn ready_is_checked() {
        let ready = ready(SocketType::Dealer);
        assert_eq!(&ready[..8], b"\x04\x29\x05READY");
        assert_eq!(usize::from(ready[1]), ready.len() - 2);
        assert_eq!(check_ready(&ready[2..], SocketType::Router), Ok(()));
        for end in 2..20 {
            assert!(check_ready(&ready[2..end], SocketType::Router).is_err(), "cut at {end}");
        }
        let publisher = b"\x05READY\x0bSocket-Type\x00\x00\x00\x03PUB";
        let error = check_ready(publisher, SocketType::Router)
            .expect_err("rejected")
            .to_string();
        assert_eq!(error, "it is a PUB socket, expected DEALER, REQ or ROUTER");
        let error = check_ready(b"\x05ERROR\x04full", SocketType::Dealer).expect_err("rejected");
        assert_eq!(error, ZmtpError::Rejected("full".to_owned()));
    }

    #[test]
    fn ping_is_answered_with_its_context() {
        assert_eq!(pong(b"\x04PING\x00\x14hello"), Some(b"\x04\x0a\x04PONGhello".to_vec()));
        assert_eq!(pong(b"\x04PING\x00"), None);
        assert_eq!(pong(b"\x04PONGhello"), None);
        assert_eq!(pong(&[b"\x04PING\x00\x14".as_slice(), &[7; 17]].concat()), None);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            drop(check_greeting(&bytes));
            drop(check_ready(&bytes, SocketType::Router));
            drop(pong(&bytes));
            if let Ok(Some((_, length))) = frame_header(&bytes) {
                prop_assert!(length <= bytes.len());
            }
        }
    }
}
