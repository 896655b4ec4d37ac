//! Every tensor of the golden files is read by a test, or is listed here with a reason.

use integration_tests::{Golden, golden_dir};

use crate::differences::of_the_committed_set;

/// Files, by the name without `MODE_`, and the tensors that tests read. `*` is one part of a dotted name, `**` any remaining parts.
const READ: &[(&str, &[&str])] = &[
    // loading is strict, and checked gradients are removed from a list that must end empty
    ("weights", &["**"]),
    ("vlmvalue_weights", &["**"]),
    ("rl_heads", &["**"]),
    ("train_grads", &["**"]),
    ("rl_flow_sde_grads", &["**"]),
    ("rl_flow_noise_grads", &["**"]),
    (
        "model",
        &[
            "in.image.*",
            "in.image_mask.*",
            "in.state",
            "in.tokenized_prompt",
            "in.tokenized_prompt_mask",
            "pre.image.*",
            "vis.*.patch_pos_emb",
            "vis.*.last_hidden",
            "vis.*.projected",
            "prefix.embs",
            "prefix.out",
            "prefix.pad_masks",
            "prefix.position_ids",
            "prefix.k.*",
            "prefix.v.*",
            "step.x_t",
            "step.t",
            "step.time_sincos",
            "step.suffix_embs",
            "step.suffix_out",
            "step.position_ids",
            "step.adarms_cond",
            "step.v_t",
            "ode.noise",
            "ode4.*",
            "ode10.*",
            "train.actions",
            "train.noise",
            "train.time",
            "train.x_t",
            "train.u_t",
            "train.loss",
            "train.loss_mean",
            "train.joint_prefix_out",
            "train.joint_suffix_out",
        ],
    ),
    ("model_bf16", &["step.v_t", "ode4.actions"]),
    ("rl_flow_sde", RL),
    ("rl_flow_cps", RL),
    ("rl_flow_noise", RL),
    ("rl_flow_ode", RL),
    ("rl_variants", VARIANTS),
    (
        "vlmvalue",
        &[
            "in.**",
            "noise",
            "prefix_out",
            "prefix_pad_masks",
            "*.actions",
            "*.chains",
            "*.denoise_inds",
            "*.direct_value",
            "*.prev_logprobs",
            "*.prev_values",
            "*.re.raw_logprobs",
            "*.re.raw_values",
        ],
    ),
    ("vlmvalue_rlsampler", &["masked_mean.value", "slot_mean.value"]),
    ("real_geom", &["time.t", "time.emb1024", "time.emb1024_f64"]),
    // by a separate list
    ("preproc", &["**"]),
    ("rlinf_advantages", &["*.in.**", "*.out.advantages", "*.out.returns"]),
    ("rlinf_helpers", &["*.in.**", "*.out.out"]),
    ("rlinf_optim", &["*.in.**", "*.out.lr", "*.out.*", "*.out.*.**"]),
    (
        "rlinf_embodied_pipeline",
        &[
            "*.in.rewards",
            "*.in.dones",
            "*.in.values",
            "*.out.rewards",
            "*.out.dones",
            "*.out.loss_mask",
            "*.out.loss_mask_sum",
            "*.out.pre.rewards",
            "*.out.pre.dones",
            "*.out.pre.values",
            "*.out.pre.loss_mask",
            "*.out.scores",
            "*.out.advantages",
            "*.out.returns",
        ],
    ),
    ("rlinf_losses", LOSSES),
    ("rlinf_policy_loss", LOSSES),
];

/// Tensors of the files by noise method: step grids, rollouts, and the actor's outputs for the same and for perturbed weights.
const RL: &[&str] = &[
    "grid4.*",
    "grid10.*",
    "newpol.**",
    "*.noise",
    "*.actions",
    "*.chains",
    "*.denoise_inds",
    "*.prev_logprobs",
    "*.prev_values",
    "*.step_mean",
    "*.step_std",
    "*.step_v",
    "*.step_value",
    "*.re.*",
    "*.new.*",
    "*.grad_coef.*",
    "*.grad_scalar",
];

/// Tensors of the variants, whose names may have a dot: `k1.flow_sde`.
const VARIANTS: &[&str] = &[
    "rtc.noise",
    "rtc.prev_model_actions",
    "rtc.chains",
    "rtc.actions",
    "anneal100.flow_sde.**",
    "anneal1000.flow_cps.**",
    "lvl02.flow_sde.**",
    "k1.flow_sde.**",
    "range.flow_noise.**",
    "ignore_last.**",
    "no_value_head.**",
    "safe_logprob.**",
    "chunk_critic.**",
    "nft.**",
    "detach0.**",
    "detach1.**",
];

const LOSSES: &[&str] = &[
    "*.in.**",
    "*.out.loss",
    "*.out.grad.*",
    "*.out.pre.*",
    "*.out.metric.__sum__/**",
    "*.out.metric.actor/policy_loss",
    "*.out.metric.actor/policy_loss_abs",
    "*.out.metric.actor/ratio",
    "*.out.metric.actor/ratio_abs",
    "*.out.metric.actor/clipped_ratio",
    "*.out.metric.actor/dual_cliped_ratio",
    "*.out.metric.actor/approx_kl",
    "*.out.metric.actor/clip_fraction",
    "*.out.metric.actor/proximal_ratio",
    "*.out.metric.actor/dual_clip_fraction",
    "*.out.metric.actor/behav_clip_fraction",
    "*.out.metric.critic/value_loss",
    "*.out.metric.critic/value_clip_ratio",
];

/// Tensors that no test reads, each with the reason.
const NOT_READ: &[(&str, &str, &str)] = &[
    (
        "model",
        "prefix.att_masks",
        "masks are inside the network: what comes out under them is compared",
    ),
    ("model", "prefix.att_2d", "as above"),
    ("model", "step.suffix_pad_masks", "as above"),
    ("model", "step.suffix_att_masks", "as above"),
    ("model", "step.att_2d", "as above"),
    ("model", "rope.inv_freq", "keys are compared after their rotation"),
    (
        "model_bf16",
        "prefix.*",
        "activations of 8 bits: their effect on velocity and actions is compared",
    ),
    ("model_bf16", "prefix.*.*", "as above"),
    ("model_bf16", "rope.*", "as above"),
    (
        "real_geom",
        "**",
        "primitives inside the network are compared at the golden sizes",
    ),
    (
        "rl_variants",
        "rtc.denoise_inds",
        "a guided chunk is not a sample: it has no log-probability",
    ),
    ("rl_variants", "rtc.prev_logprobs", "as above"),
    ("rl_variants", "rtc.prev_values", "as above"),
    (
        "rlinf_embodied_pipeline",
        "*.in.loss_mask",
        "the masks are those of the first episodes: they are compared as `pre.loss_mask`",
    ),
    (
        "rlinf_embodied_pipeline",
        "*.in.loss_mask_sum",
        "lock-step layout of the reference",
    ),
    (
        "rlinf_embodied_pipeline",
        "*.out.pre.loss_mask_sum",
        "lock-step layout of the reference",
    ),
    // the cases of `preprocess_embodied_batch` put rollouts side by side: the tests start from the result
    (
        "rlinf_embodied_pipeline",
        "c021.in.*",
        "lock-step layout of the reference",
    ),
    (
        "rlinf_embodied_pipeline",
        "c022.in.*",
        "lock-step layout of the reference",
    ),
    (
        "rlinf_embodied_pipeline",
        "c023.in.*",
        "lock-step layout of the reference",
    ),
    (
        "rlinf_embodied_pipeline",
        "c024.in.*",
        "lock-step layout of the reference",
    ),
    (
        "rlinf_embodied_pipeline",
        "*.out.prev_values",
        "lock-step layout of the reference",
    ),
    (
        "rlinf_losses",
        "*.out.metric.actor/proximal_approx_kl",
        "ours is the KL to the policy that acted, which `target_kl` bounds",
    ),
    ("rlinf_policy_loss", "*.out.metric.actor/proximal_approx_kl", "as above"),
    (
        "rlinf_losses",
        "*.out.metric.actor/token_num",
        "the reference's own bookkeeping",
    ),
    ("rlinf_losses", "*.out.metric.actor/policy_loss_mbs_mean", "as above"),
    (
        "rlinf_losses",
        "*.out.metric.actor/average_version",
        "as above; here `staleness_mean`",
    ),
    ("rlinf_losses", "*.out.metric.actor/current_version", "as above"),
    (
        "rlinf_losses",
        "*.out.metric.actor/behav_approx_kl",
        "no metric of ours",
    ),
    ("rlinf_losses", "*.out.metric.actor/clipped_proximal_ratio", "as above"),
    ("rlinf_policy_loss", "*.out.metric.actor/behav_approx_kl", "as above"),
    (
        "rlinf_policy_loss",
        "*.out.metric.actor/clipped_proximal_ratio",
        "as above",
    ),
];

fn fits(pattern: &str, name: &str) -> bool {
    match (pattern.split_once('.'), name.split_once('.')) {
        _ if pattern == "**" => true,
        (Some((first, pattern)), Some((part, name))) => (first == "*" || first == part) && fits(pattern, name),
        // a metric's name has its stage and a slash
        (None, _) => match pattern.strip_suffix("**") {
            Some(start) => name.starts_with(start),
            None => (pattern == "*" && !name.contains('.')) || pattern == name,
        },
        (Some(_), None) => false,
    }
}

#[test]
fn every_recorded_tensor_is_read_or_named() {
    let mut files = 0;
    let mut left = Vec::new();
    for entry in std::fs::read_dir(golden_dir()).expect("the golden folder") {
        let name = entry.expect("entry").file_name().into_string().expect("a name");
        let Some(stem) = name.strip_suffix(".safetensors") else {
            continue;
        };
        files += 1;
        let file = stem.trim_start_matches("pi05_").trim_start_matches("pi0_");
        let read = READ
            .iter()
            .filter(|(of, _)| *of == file)
            .flat_map(|(_, patterns)| *patterns);
        let named = NOT_READ
            .iter()
            .filter(|(of, ..)| *of == file)
            .map(|(_, pattern, _)| pattern);
        let patterns: Vec<&&str> = read.chain(named).collect();
        let names = Golden::open(stem).names();
        left.extend(
            names
                .into_iter()
                .filter(|tensor| !patterns.iter().any(|pattern| fits(pattern, tensor)))
                .map(|tensor| format!("{stem}: {tensor}")),
        );
    }
    assert!(files > 0);
    println!("{files} files, {} tensors that no test names", left.len());
    // another set may record more
    assert!(left.is_empty() || !of_the_committed_set("tensors"), "{left:#?}");
}

#[test]
fn patterns_are_of_dotted_names() {
    for (pattern, name) in [
        ("**", "a.b.c"),
        ("*.re.*", "single0.re.values"),
        ("*.in.**", "c001.in.p0.actor.w"),
        ("ode4.*", "ode4.t"),
        ("*.out.metric.__sum__/**", "c001.out.metric.__sum__/count"),
    ] {
        assert!(fits(pattern, name), "{pattern} {name}");
    }
    for (pattern, name) in [
        ("*.re.*", "single0.re"),
        ("*", "a.b"),
        ("ode4.*", "ode10.t"),
        ("*.re.*", "a.re.b.c"),
    ] {
        assert!(!fits(pattern, name), "{pattern} {name}");
    }
}
