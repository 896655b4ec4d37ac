//! Messages for an engine: valid ones, and ones that cost more memory than their bytes.

use policy::plan::RunPlan;
use wire::{
    codec::{WIRE_VERSION, encode},
    messages::{ActRequest, Hello, Mode, ToEngine},
};

use crate::ring::row;

/// Returns an encoded request of `rows` equal rows.
pub fn act_frame(plan: &RunPlan, request: u64, rows: usize, record: bool) -> Vec<u8> {
    let mut one = row(plan, 1, Mode::Eval);
    one.record = record;
    let rows = vec![one; rows];
    encode(&ToEngine::Act(ActRequest { request, rows })).expect("a request that can be encoded")
}

/// Returns an encoded registration of a worker.
pub fn hello_frame(client: &str, env: &str, action_dim: u32, slots: u32) -> Vec<u8> {
    let hello = Hello {
        client: client.to_owned(),
        env: env.to_owned(),
        action_dim,
        slots,
    };
    encode(&ToEngine::Hello(hello)).expect("a hello that can be encoded")
}

/// Returns a frame with a valid header around any payload.
pub fn enveloped(payload: &[u8]) -> Vec<u8> {
    let mut bytes = b"PIRL".to_vec();
    bytes.extend_from_slice(&WIRE_VERSION.to_le_bytes());
    bytes.extend_from_slice(&[0, 0]);
    bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// Appends a text in `MessagePack`.
pub(super) fn text(out: &mut Vec<u8>, value: &str) {
    out.push(0xdb);
    out.extend_from_slice(&(value.len() as u32).to_be_bytes());
    out.extend_from_slice(value.as_bytes());
}

/// Appends an array of nils in `MessagePack`.
fn nil_array(out: &mut Vec<u8>, count: usize) {
    out.push(0xdd);
    out.extend_from_slice(&(count as u32).to_be_bytes());
    out.resize(out.len() + count, 0xc0);
}

/// Place of the nils of [`nil_frame`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nils {
    /// In place of reports.
    Reports,
    /// In place of the images of one report.
    ReportImages,
    /// In place of the rows of a request.
    Rows,
    /// In place of the images of one row of a request.
    RowImages,
}

/// Returns a frame with `count` nils, one byte each, in place of elements that are large in memory.
pub fn nil_frame(nils: Nils, count: usize) -> Vec<u8> {
    let mut out = vec![0x81];
    let observation = |out: &mut Vec<u8>| {
        text(out, "observation");
        out.push(0x83);
        text(out, "images");
        nil_array(out, count);
        text(out, "state");
        out.push(0x90);
        text(out, "prompt");
        text(out, "pick red");
    };
    match nils {
        Nils::Reports => {
            text(&mut out, "reports");
            nil_array(&mut out, count);
        }
        Nils::ReportImages => {
            text(&mut out, "reports");
            out.extend_from_slice(&[0x91, 0x83]);
            text(&mut out, "slot");
            out.push(0);
            text(&mut out, "outcome");
            out.push(0xc0);
            observation(&mut out);
        }
        Nils::Rows | Nils::RowImages => {
            text(&mut out, "act");
            out.push(0x82);
            text(&mut out, "request");
            out.push(1);
            text(&mut out, "rows");
            if nils == Nils::Rows {
                nil_array(&mut out, count);
            } else {
                out.extend_from_slice(&[0x91, 0x85]);
                observation(&mut out);
                text(&mut out, "key");
                out.push(0x84);
                for name in ["seed", "env", "episode", "chunk"] {
                    text(&mut out, name);
                    out.push(0);
                }
                text(&mut out, "mode");
                text(&mut out, "eval");
                text(&mut out, "record");
                out.push(0xc2);
                text(&mut out, "guidance");
                out.push(0xc0);
            }
        }
    }
    enveloped(&out)
}

/// Returns a frame whose message has an unknown name of `bytes` bytes.
pub fn unknown_variant_frame(bytes: usize) -> Vec<u8> {
    let mut out = vec![0x81];
    text(&mut out, &"x".repeat(bytes));
    out.push(0xc0);
    enveloped(&out)
}

/// Returns names that forge log lines, drive a terminal, or are long.
pub fn forged_names() -> Vec<String> {
    vec![
        "robot\n2026-01-01T00:00:00.000000Z  INFO FORGED policy version 999 is live".to_owned(),
        "robot\r\nFORGED second line\r\n\r\n".to_owned(),
        "\u{1b}[2J\u{1b}[31mFORGED red\u{1b}]0;title\u{7}".to_owned(),
        "robot\u{202e}DEGROF\u{0}\u{8}\u{8}\u{7f}\u{85}\u{2028}".to_owned(),
        "FORGED".repeat((1 << 20) / 6),
        String::new(),
    ]
}
