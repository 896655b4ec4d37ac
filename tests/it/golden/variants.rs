//! Variants of the reference's sampler: annealing, noise levels and ranges, the safe log-probability, heads and what is detached.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use integration_tests::{Golden, assert_close_relative};
use policy::flow::{NoiseAnneal, Schedule};
use policy::params::Part;
use tch::Kind;

use crate::differences::of_the_committed_set;

use super::{
    network::{GRADIENT, MODES, OUTPUT, close, policy_dims, setup, values},
    rl::{
        LOGPROB, Recomputed, check_recompute, check_rollout, groups, heads_of, is_joint, method, noise_level, sampling,
        steps_of,
    },
};

/// What the annealed variants were recorded with.
const ANNEAL: NoiseAnneal = NoiseAnneal {
    start: 0.7,
    end: 0.3,
    steps: 400,
};
/// Variants of the reference that are not built: guidance at evaluation.
const VARIANTS_NOT_BUILT: [&str; 1] = ["rtc"];

#[test]
fn what_is_not_built_is_named() {
    for mode in MODES {
        let variants = groups(&Golden::open(&format!("{mode}_rl_variants")));
        for name in VARIANTS_NOT_BUILT {
            assert!(
                variants.contains(name) || !of_the_committed_set(name),
                "{mode}: `{name}` is listed as not built but not in the file"
            );
        }
    }
}

#[test]
fn variants() {
    for mode in MODES {
        let golden = Golden::open(&format!("{mode}_rl_variants"));
        let (_, value, executed) = policy_dims(&format!("{mode}_model"));
        let (mut seen, usual) = (BTreeMap::new(), noise_level(mode));
        for group in groups(&golden) {
            if VARIANTS_NOT_BUILT.contains(&group.as_str()) {
                continue;
            }
            let (case, name, level) = match group.as_str() {
                "anneal100" => ("anneal100.flow_sde", "flow_sde", None),
                "anneal1000" => ("anneal1000.flow_cps", "flow_cps", None),
                "lvl02" => ("lvl02.flow_sde", "flow_sde", Some(0.2)),
                "k1" => ("k1.flow_sde", "flow_sde", Some(usual)),
                "range" => ("range.flow_noise", "flow_noise", Some(usual)),
                "ignore_last" | "no_value_head" | "safe_logprob" | "chunk_critic" => {
                    (group.as_str(), "flow_sde", Some(usual))
                }
                "nft" => ("nft", "flow_sde", Some(usual)),
                "detach0" | "detach1" => continue,
                other => panic!("{mode}: unknown variant {other}"),
            };
            let mut heads = heads_of(mode, method(name));
            match group.as_str() {
                "range" => heads.noise.as_mut().expect("noise head").std_range = [0.04, 0.3],
                "no_value_head" => heads.value = None,
                "chunk_critic" => {
                    let mut head = value.clone();
                    head.tokens = Some(executed.action_chunk);
                    heads.value = Some(head);
                }
                _ => {}
            }
            let s = setup(mode, &heads);
            let level = level.unwrap_or_else(|| {
                // the name says the version, the level is recorded
                let version = group.trim_start_matches("anneal").parse().expect("anneal{version}");
                let recorded = golden.get(&format!("{case}.noise_level")).data[0];
                let level = ANNEAL.level(version);
                // recorded in f32
                assert!(
                    (level - recorded).abs() < 1e-7,
                    "{mode} {group}: {level} against {recorded}"
                );
                level
            });
            let steps = golden.get(&format!("{case}.chains")).shape[1] - 1;
            let mut sampling = sampling(method(name), steps, level, is_joint(&golden, case));
            sampling.ignore_last = group == "ignore_last";
            sampling.safe_logprob = group == "safe_logprob";
            let schedule = Schedule::of(&sampling);
            let what = format!("{mode} variant");
            check_rollout(&s, &schedule, &golden, case, &what);
            if group == "nft" {
                check_snapshot(&golden, case, steps, level, &what);
                // with all steps recorded the reference keeps the log-probability of the first
                let ours = Recomputed::new(&s, &s.prefix.cache, &sampling, &golden, case, false).expect("transition");
                let recorded = golden.get(&format!("{case}.prev_logprobs"));
                close(
                    &format!("{what} {case}.prev_logprobs"),
                    &ours.at_first_step(),
                    &recorded,
                    LOGPROB,
                );
                seen.insert(group, steps);
                continue;
            }
            if group == "ignore_last" {
                let recorded = steps_of(&golden, case);
                assert!(recorded.iter().flatten().all(|k| *k < schedule.drawable) && schedule.drawable == steps - 1);
            }
            check_recompute(&s, &sampling, &golden, case, "re", &what);
            seen.insert(group, steps);
        }
        println!("{mode}: variants {seen:?}");
        check_detach(mode, &golden);
    }
}

/// What the reference snapshots for NFT at one step is what a record holds already: two neighbours of the chain, its end, and the
/// velocity of the policy that acted.
fn check_snapshot(golden: &Golden, case: &str, steps: usize, noise_level: f64, what: &str) {
    let get = |part: &str| golden.get(&format!("{case}.{part}")).f32();
    let (chains, velocity) = (get("chains"), get("step_v"));
    let level = golden.get(&format!("{case}.nft_noise_level")).data;
    assert!(
        level.iter().all(|l| l.to_bits() == noise_level.to_bits()),
        "{what}: {level:?}"
    );
    let picked = golden.get(&format!("{case}.nft_step_index"));
    let elements = chains.len() / (picked.data.len() * (steps + 1));
    for (b, k) in picked.data.iter().map(|k| *k as usize).enumerate() {
        let own = |part: &str| get(part)[b * elements..(b + 1) * elements].to_vec();
        let chain = |j: usize| chains[(b * (steps + 1) + j) * elements..][..elements].to_vec();
        assert_eq!(own("nft_xcur"), chain(k), "{what}: row {b}");
        assert_eq!(own("nft_xnext"), chain(k + 1), "{what}: row {b}");
        assert_eq!(own("nft_x0"), chain(steps), "{what}: row {b}");
        assert_eq!(
            own("nft_v"),
            velocity[(b * steps + k) * elements..][..elements],
            "{what}: row {b}"
        );
    }
}

/// `detach_critic_input`: same value, gradient only in the head. The recorded values belong to the chain of `lvl02`.
fn check_detach(mode: &str, golden: &Golden) {
    for (case, detach) in [("detach0", false), ("detach1", true)] {
        let s = setup(mode, &heads_of(mode, method("flow_sde")));
        s.policy.store().set_trainable(&[Part::Expert, Part::ValueHead]);
        let steps = golden.get("lvl02.flow_sde.chains").shape[1] - 1;
        let sampling = sampling(method("flow_sde"), steps, 0.2, false);
        let result =
            Recomputed::new(&s, &s.prefix.cache, &sampling, golden, "lvl02.flow_sde", detach).expect("transition");
        let value = result.value().expect("head");
        close(
            &format!("{mode} {case}"),
            &value,
            &golden.get(&format!("{case}.values")),
            OUTPUT,
        );
        value.sum(Kind::Float).backward();
        for name in golden
            .names()
            .iter()
            .filter_map(|n| n.strip_prefix(&format!("{case}.grad.")))
        {
            let grad = s.policy.store().get(name).expect("parameter").grad();
            let want = golden.get(&format!("{case}.grad.{name}"));
            let got = if grad.defined() {
                values(&grad)
            } else {
                vec![0.0; want.data.len()]
            };
            assert_close_relative(&format!("{mode} {case} {name}"), &got, &want, GRADIENT);
        }
    }
}
