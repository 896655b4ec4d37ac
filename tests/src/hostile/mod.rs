//! Hostile peers of an engine or a learner, on plain TCP streams and a hand-written ZMTP 3 client.
//!
//! Every attack has its size as parameters, so the same code runs for a second in a test and for minutes in the soak. An attack never
//! panics on network errors: a [`Tally`] counts the attacked process's answers.

mod tally;
mod zmtp;
mod frames;
mod connections;
mod messages;

pub use connections::*;
pub use frames::*;
pub use messages::*;
pub use tally::*;
pub use zmtp::*;

#[cfg(test)]
mod tests {
    use wire::{codec::decode, messages::ToEngine};

    use super::*;

    #[test]
    fn hostile_frames_are_what_they_say() {
        // nils in place of images form a valid message that is 56 times as large in memory; nils in place of other elements are invalid
        assert!(matches!(
            decode(&nil_frame(Nils::ReportImages, 3)),
            Ok(ToEngine::Reports(_))
        ));
        assert!(matches!(decode(&nil_frame(Nils::RowImages, 3)), Ok(ToEngine::Act(_))));
        for nils in [Nils::Reports, Nils::Rows] {
            decode::<ToEngine>(&nil_frame(nils, 3)).expect_err("refused");
        }
        decode::<ToEngine>(&unknown_variant_frame(10)).expect_err("refused");
        assert!(matches!(
            decode(&hello_frame("a robot", "e", 3, 1)),
            Ok(ToEngine::Hello(_))
        ));
        decode::<ToEngine>(&hello_frame(&forged_names()[0], "e", 3, 1)).expect_err("a name with a line break");
    }

    #[test]
    fn zmtp_by_hand_is_zmtp() {
        assert_eq!(greeting(1).len(), 64);
        assert_eq!(ready(), *b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER");
        assert_eq!(frame(MORE, b"ab"), *b"\x01\x02ab");
        let long = frame(0, &[7; 256]);
        assert_eq!(long.get(..9), Some(b"\x02\x00\x00\x00\x00\x00\x00\x01\x00".as_slice()));
        assert_eq!(long.len(), 265);
    }
}
