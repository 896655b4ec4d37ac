//! Variants of the reference's sampler: annealing, noise levels and ranges, the safe log-probability, heads and detached gradients.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use integration_tests::{Golden, assert_close, assert_close_relative, output_tolerance};
use policy::{
    flow::{NoiseAnneal, NoiseMethod, Schedule},
    guidance::Guidance,
    params::Part,
};
use tch::{Kind, Tensor};

use super::{
    network::{GRADIENT, MODES, at, close, close_output, policy_dims, setup, values},
    rl::{
        LOGPROB, Recomputed, check_recompute, check_rollout, groups, heads_of, is_joint, method, noise_level, sampling,
        steps_of,
    },
};

/// Annealing of the recorded variants.
const ANNEAL: NoiseAnneal = NoiseAnneal {
    start: 0.7,
    end: 0.3,
    steps: 400,
};
/// Executed rows of the previous chunk in the recording of `rtc`; its other settings follow.
const EXECUTED_ROWS: usize = 1;
const DELAY: usize = 2;
const MAX_WEIGHT: f64 = 5.0;

/// A chunk that continues the previous chunk, by the reference's correction after every ODE step.
#[test]
fn guided_chunks() {
    for mode in MODES {
        let golden = Golden::open(&format!("{mode}_rl_variants"));
        let s = setup(mode, &heads_of(mode, NoiseMethod::ODE));
        let (previous, chains) = (golden.get("rtc.prev_model_actions"), golden.get("rtc.chains"));
        let (steps, horizon, width) = (chains.shape[1] - 1, chains.shape[2], chains.shape[3]);
        let guidance: Vec<Guidance> = (0..chains.shape[0])
            .map(|b| {
                let rest = at(&previous, b).f32()[EXECUTED_ROWS * width..].to_vec();
                Guidance::new(rest, width, horizon, DELAY, MAX_WEIGHT)
            })
            .collect();
        let mut x: Vec<Vec<f32>> = (0..chains.shape[0])
            .map(|b| at(&at(&golden.get("rtc.noise"), b), 0).f32())
            .collect();
        for (k, row) in Schedule::new(NoiseMethod::ODE, steps, 0.0, false)
            .ode
            .iter()
            .enumerate()
        {
            let shape = [x.len() as i64, horizon as i64, width as i64];
            let x_t = Tensor::from_slice(&x.concat()).view(shape);
            let t = Tensor::full([x.len() as i64], row.t, (Kind::Double, tch::Device::Cpu));
            let step = || s.policy.velocity(&s.prefix.cache, Some(&s.state), &x_t, &t);
            let v = tch::no_grad(step).expect("velocity").v_t;
            let (c_x, c_v) = row.mean_coefficients();
            let mean = values(&(&x_t * c_x + v * c_v));
            for ((b, x), mean) in x.iter_mut().enumerate().zip(mean.chunks(horizon * width)) {
                x.copy_from_slice(mean);
                guidance[b].correct(x, width, k, steps);
                let want = at(&at(&chains, b), k + 1);
                assert_close(
                    &format!("{mode} rtc row {b} step {k}"),
                    x,
                    &want,
                    output_tolerance(&want) * MAX_WEIGHT,
                );
            }
        }
        let (got, want) = (x.concat(), golden.get("rtc.actions"));
        assert_close(
            &format!("{mode} rtc actions"),
            &got,
            &want,
            output_tolerance(&want) * MAX_WEIGHT,
        );
    }
}

#[test]
fn variants() {
    for mode in MODES {
        let golden = Golden::open(&format!("{mode}_rl_variants"));
        let (_, value, executed) = policy_dims(&format!("{mode}_model"));
        let (mut seen, usual) = (BTreeMap::new(), noise_level(mode));
        for group in groups(&golden) {
            if group == "rtc" {
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
                // the name has the version, the level is recorded
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

/// Checks that a record holds the reference's snapshot for NFT at one step: two neighbors of the chain, its end, and the acting policy's
/// velocity.
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

/// Compares `detach_critic_input`: the same value, with a gradient only in the head. The recorded values belong to the chain of `lvl02`.
fn check_detach(mode: &str, golden: &Golden) {
    for (case, detach) in [("detach0", false), ("detach1", true)] {
        let s = setup(mode, &heads_of(mode, method("flow_sde")));
        s.policy.store().set_trainable(&[Part::Expert, Part::ValueHead]);
        let steps = golden.get("lvl02.flow_sde.chains").shape[1] - 1;
        let sampling = sampling(method("flow_sde"), steps, 0.2, false);
        let result =
            Recomputed::new(&s, &s.prefix.cache, &sampling, golden, "lvl02.flow_sde", detach).expect("transition");
        let value = result.value().expect("head");
        close_output(
            &format!("{mode} {case}"),
            &value,
            &golden.get(&format!("{case}.values")),
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
