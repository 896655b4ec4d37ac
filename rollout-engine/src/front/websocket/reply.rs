//! Messages of the server in openpi's form: the metadata, and replies with arrays whose keys are bytes.

use std::time::Duration;

use policy::{bundle::Manifest, noise::NoiseKey};
use serde::{Serialize, Serializer, ser::SerializeMap};
use serde_bytes::Bytes;

/// Bytes of a reply in addition to its actions, at most.
pub(super) const REPLY_OVERHEAD: usize = 1024;

/// An f32 array `[rows, columns]` in openpi's form.
struct Actions<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
}

impl Serialize for Actions<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let data: Vec<u8> = self.values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let mut map = serializer.serialize_map(Some(4))?;
        // openpi-client looks for keys of type bin
        map.serialize_entry(Bytes::new(b"__ndarray__"), &true)?;
        map.serialize_entry(Bytes::new(b"data"), Bytes::new(&data))?;
        map.serialize_entry(Bytes::new(b"dtype"), "<f4")?;
        map.serialize_entry(Bytes::new(b"shape"), &[self.rows, self.columns])?;
        map.end()
    }
}

#[derive(Serialize)]
struct Timing {
    infer_ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    prev_total_ms: Option<f64>,
}

/// A reply to an observation.
#[derive(Serialize)]
struct Reply<'a> {
    actions: Actions<'a>,
    policy_version: u64,
    noise_key: NoiseKey,
    server_timing: Timing,
}

/// Times of a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Times {
    /// From the decoded observation to the answer, including the time in the queue.
    pub(super) infer: Duration,
    /// From the arrival of the previous request of the session to the end of its reply.
    pub(super) previous: Option<Duration>,
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Encodes the reply to an observation; `actions` is `[action_horizon, env_action_dim]`.
pub(super) fn reply(
    actions: &[f32],
    columns: usize,
    version: u64,
    key: NoiseKey,
    times: Times,
) -> Result<Vec<u8>, rmp_serde::encode::Error> {
    let reply = Reply {
        actions: Actions {
            values: actions,
            rows: actions.len() / columns.max(1),
            columns,
        },
        policy_version: version,
        noise_key: key,
        server_timing: Timing {
            infer_ms: millis(times.infer),
            prev_total_ms: times.previous.map(millis),
        },
    };
    rmp_serde::to_vec_named(&reply)
}

/// Encodes the metadata that the server sends first. `key` is the noise key of the session's first chunk.
pub(super) fn metadata(manifest: &Manifest, key: NoiseKey) -> Result<Vec<u8>, rmp_serde::encode::Error> {
    rmp_serde::to_vec_named(&serde_json::json!({
        "server": concat!("pirl rollout-engine ", env!("CARGO_PKG_VERSION")),
        "policy": manifest.dims.variant,
        "policy_version": manifest.policy_version,
        "config_digest": manifest.config_digest,
        "action_horizon": manifest.dims.action_horizon,
        "action_chunk": manifest.action_chunk,
        "env_action_dim": manifest.env_action_dim,
        "cameras": manifest.cameras,
        "mode": "eval",
        "noise_key": key,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_have_keys_of_bytes() {
        let key = NoiseKey {
            seed: 0,
            env: 0,
            episode: 1,
            chunk: 2,
        };
        let times = Times {
            infer: Duration::from_millis(2),
            previous: None,
        };
        let bytes = reply(&[1.0, 2.0], 2, 7, key, times).expect("encodes");
        let hex = policy::config::hex(&bytes);
        let array =
            "84c40b5f5f6e6461727261795f5fc3c40464617461c4080000803f00000040c4056474797065a33c6634c40573686170659201";
        assert!(hex.starts_with(&format!("84a7616374696f6e73{array}02")), "{hex}");
    }
}
