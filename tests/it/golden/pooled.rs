//! `V_vlm`: compares the value of the pooled prefix with the golden tensors, for every pooling, and the rollouts with this value.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

use integration_tests::{Golden, golden_dir};
use learner::{
    model::{ParamStore, Pi0},
    update::logprob::Executed,
};
use policy::{
    flow::{Sampling, Schedule},
    params::{CriticInput, Heads, Part, Pooling},
    weights::WeightFile,
};
use tch::{Device, Kind, Tensor};

use crate::differences::check_numbers;

use super::{
    network::{CAMERAS, MODES, Setup, close, close_output, encode, float, policy_dims, values},
    rl::{LOGPROB, Recomputed, check_rollout, method, noise_level, sampling},
};

/// Pooling of each recorded case of `value_after_vlm`. Our default is the masked mean of the reference's newer sampler. The reference's
/// main code path includes all text slots with padding, whose rows are means over every key (`mean_padded` here).
const POOLED: [(Pooling, &str); 3] = [
    (Pooling::MeanPadded, "mean_token"),
    (Pooling::First, "first_token"),
    (Pooling::Last, "last_token"),
];

/// Returns the policy of `MODE_vlmvalue` with its encoded observation.
fn pooled_setup(mode: &str, pooling: Pooling) -> Setup {
    let (dims, mut head, executed) = policy_dims(&format!("{mode}_vlmvalue"));
    (head.input, head.pooling) = (CriticInput::Vlm, pooling);
    let file = WeightFile::open(&golden_dir().join(format!("{mode}_vlmvalue_weights.safetensors"))).expect("weights");
    let heads = Heads::value(head);
    let store = ParamStore::zeros(&dims, &heads, Device::Cpu).expect("sizes");
    let parts = [Part::Vlm, Part::Expert, Part::ValueHead];
    store.load(&file, &parts).expect("strict load");
    let policy = Pi0::new(dims, &heads, store).expect("network");
    let golden = Golden::open(&format!("{mode}_vlmvalue"));
    let prefix = tch::no_grad(|| encode(&policy, &golden, "in.image"));
    Setup {
        policy,
        prefix,
        state: float(&golden.get("in.state")),
        executed,
    }
}

fn pooled_value(s: &Setup) -> Tensor {
    let none = Tensor::zeros([0], (Kind::Float, Device::Cpu));
    s.policy.value_vlm(&s.policy.pooled(&s.prefix), &none).expect("value")
}

#[test]
fn value_of_the_pooled_prefix() {
    for mode in MODES {
        let golden = Golden::open(&format!("{mode}_vlmvalue"));
        let sampler = Golden::open(&format!("{mode}_vlmvalue_rlsampler"));
        let s = pooled_setup(mode, Pooling::Mean);
        close_output(&format!("{mode} prefix_out"), &s.prefix.out, &golden.get("prefix_out"));
        let masks = golden.get("prefix_pad_masks");
        close(&format!("{mode} masks"), &s.prefix.cache.mask, &masks, 0.0);
        let masked = pooled_value(&s);
        close_output(
            &format!("{mode} V_vlm masked mean"),
            &masked,
            &sampler.get("masked_mean.value"),
        );

        let mut padded = None;
        for (pooling, case) in POOLED {
            let mut s = pooled_setup(mode, pooling);
            if pooling == Pooling::MeanPadded {
                // the reference leaves out the slots of cameras that its configuration does not have: here no sample has them
                let (tokens, prompt) = (
                    s.policy.dims().vision.tokens() as i64,
                    s.policy.dims().prompt_len as i64,
                );
                let mask = &s.prefix.cache.mask;
                let here: Vec<Tensor> = (0..CAMERAS.len() as i64)
                    .filter(|c| mask.narrow(1, c * tokens, tokens).any().int64_value(&[]) != 0)
                    .map(|c| s.prefix.out.narrow(1, c * tokens, tokens))
                    .chain([s.prefix.out.narrow(1, -prompt, prompt)])
                    .collect();
                s.prefix.out = Tensor::cat(&here, 1);
            }
            let ours = pooled_value(&s);
            close_output(
                &format!("{mode} V_vlm {case}"),
                &ours,
                &golden.get(&format!("{case}.direct_value")),
            );
            // recorded at rollout and recomputed: the value does not depend on the denoise step
            for part in ["prev_values", "re.raw_values"] {
                let name = format!("{case}.{part}");
                close_output(&format!("{mode} {name}"), &ours.unsqueeze(1), &golden.get(&name));
            }
            let steps = golden.get(&format!("{case}.chains")).shape[1] - 1;
            let sampling = sampling(method("flow_sde"), steps, noise_level(mode), false);
            let what = format!("{mode} V_vlm");
            check_rollout(&s, &Schedule::of(&sampling), &golden, case, &what);
            check_likelihood(&s, &sampling, &golden, case, &what);
            if pooling == Pooling::MeanPadded {
                let want = sampler.get("slot_mean.value");
                close_output(&format!("{mode} V_vlm over all slots"), &ours, &want);
                padded = Some(ours);
            }
        }
        let (masked, padded) = (values(&masked), values(&padded.expect("the padded mean")));
        println!("{mode}: V_vlm over valid tokens {masked:?}, over padding too {padded:?}");
        if mode == "pi05" {
            check_numbers("pi05 V_vlm", f64::from(padded[0]), f64::from(masked[0]));
        }
        let gap = masked
            .iter()
            .zip(&padded)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(
            gap > 1e-4,
            "{mode}: the two means should differ on a padded prompt, gap {gap:e}"
        );
    }
}

/// Compares the log-probabilities of a rollout whose value is not of a step: of the executed part as recorded, and of the whole chunk.
fn check_likelihood(s: &Setup, sampling: &Sampling, golden: &Golden, case: &str, what: &str) {
    let dims = s.policy.dims();
    let whole = Executed {
        action_chunk: dims.action_horizon,
        env_action_dim: dims.action_dim,
    };
    for (executed, part) in [(s.executed, "prev_logprobs"), (whole, "re.raw_logprobs")] {
        let ours = Recomputed::of(s, &s.prefix.cache, sampling, golden, case, executed, false).expect("transition");
        let mut want = golden.get(&format!("{case}.{part}"));
        if part.starts_with("re.") {
            assert_eq!(want.shape.remove(1), 1, "one stochastic step");
        }
        close(&format!("{what} {case} {part}"), &ours.out.logprob, &want, LOGPROB);
    }
}
