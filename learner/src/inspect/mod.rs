//! Readable description of a configuration before a run: sizes, batch arithmetic, sampling of chunks, meaning and origin of each
//! key, and deliberate differences from the reference.

mod keys;
mod differences;

use std::{collections::BTreeMap, path::Path};

use policy::{
    config::{Origin, Origins, PrefixCachePlace, TokenizerConfig},
    contract::{Contract, ContractError},
    dims::Variant,
    flow::{Mdp, Schedule},
    norm::{NormStats, Normalization},
    params::{ParamSpec, Part, params},
    plan::RunPlan,
    prompt::Tokenizer,
};

use crate::{
    batch::{minibatch::minibatch_count, prefix_store::prefix_bytes},
    collect::sampling::group_count,
    error::Result,
};

/// Size of an f32 in bytes.
const F32: usize = 4;
/// Width of the value column in characters; longer values have their explanation on the next line.
const VALUE_WIDTH: usize = 44;

/// Describes a plan in full; `origins` belong to the configuration of the plan.
///
/// # Errors
/// Configuration, statistics and tokenizer contradict each other, or the keys cannot be listed, which is impossible for a plan loaded
/// from a file.
pub fn describe(plan: &RunPlan, origins: &Origins) -> Result<String> {
    let values = plan.config.keys()?;
    let mut lines = vec![format!("configuration digest {}", plan.config_digest)];
    let files = origins.files().iter().map(|file| file.display().to_string());
    section(&mut lines, "files, a later one wins", files.collect());
    section(&mut lines, "policy", policy(plan));
    section(&mut lines, "robot", robot(plan)?);
    section(&mut lines, "sampling", sampling(plan));
    section(&mut lines, "an iteration", iteration(plan));
    section(
        &mut lines,
        "keys: value, origin, meaning (configs/README.md)",
        explained(plan, &values, origins),
    );
    section(
        &mut lines,
        "differences from the reference that apply (docs/differences.md)",
        differences::applying(&values),
    );
    Ok(lines.join("\n") + "\n")
}

/// Explains every key in a line with value, origin and meaning.
fn explained(plan: &RunPlan, values: &BTreeMap<String, String>, origins: &Origins) -> Vec<String> {
    let loss = plan.config.algorithm.loss_type.as_str();
    let rows: Vec<(String, String, &str)> = values
        .iter()
        .map(|(key, value)| {
            let meaning = keys::meaning(key, loss).unwrap_or("checked by the environment or the method");
            (format!("{key} = {value}"), origin(key, origins), meaning)
        })
        .collect();
    let width = rows.iter().map(|(_, origin, _)| origin.len()).max().unwrap_or(0);
    let mut lines = Vec::new();
    for (value, origin, meaning) in &rows {
        let about = format!("{origin:width$}  {meaning}");
        if value.len() > VALUE_WIDTH {
            lines.push(value.clone());
            lines.push(format!("{:VALUE_WIDTH$}  {about}", ""));
        } else {
            lines.push(format!("{value:VALUE_WIDTH$}  {about}"));
        }
    }
    lines
}

/// Names the origin of a key's value; a file in the folder of the configuration is named relative to the folder.
fn origin(key: &str, origins: &Origins) -> String {
    let folder = origins.files().last().and_then(|file| file.parent());
    match origins.get(key) {
        Some(Origin::File(file)) => {
            let inside = folder.and_then(|folder| file.strip_prefix(folder).ok());
            inside.unwrap_or(file).display().to_string()
        }
        Some(Origin::Set) => "--set".to_owned(),
        None => "default".to_owned(),
    }
}

fn section(lines: &mut Vec<String>, title: &str, body: Vec<String>) {
    lines.push(String::new());
    lines.push(title.to_owned());
    lines.extend(body.into_iter().map(|line| format!("  {line}")));
}

fn grouped(number: usize) -> String {
    crate::digits::grouped(&number.to_string())
}

fn bytes(count: usize) -> String {
    let count = count as f64;
    match count {
        c if c < 1e6 => format!("{:.1} kB", c / 1e3),
        c if c < 1e9 => format!("{:.1} MB", c / 1e6),
        c => format!("{:.2} GB", c / 1e9),
    }
}

fn policy(plan: &RunPlan) -> Vec<String> {
    let dims = &plan.dims;
    let specs = params(dims, &plan.heads);
    let elements = |wanted: &dyn Fn(&ParamSpec) -> bool| -> usize {
        let chosen = specs.iter().filter(|spec| wanted(spec));
        chosen.map(|spec| spec.shape.iter().product::<usize>()).sum()
    };
    let part = |part: Part| elements(&|spec| spec.part == part);
    let tower = elements(&|spec| spec.part == Part::Vlm && spec.name.contains("vision_tower"));
    let trained = part(Part::Expert) + part(Part::NoiseHead) + part(Part::ValueHead);
    let all = trained + part(Part::Vlm);
    let reference = if plan.config.algorithm.velocity.is_some() {
        part(Part::Expert)
    } else {
        0
    };
    let variant = match dims.variant {
        Variant::Pi0 => "pi0",
        Variant::Pi05 => "pi0.5",
    };
    let mut lines = vec![
        format!(
            "{}, {} camera(s) of {} px, {} prefix tokens ({} of the prompt), horizon {} of which {} are executed, action width {} of {}",
            variant,
            dims.cameras,
            dims.vision.image_size,
            dims.cameras * dims.vision.tokens() + dims.prompt_len,
            dims.prompt_len,
            dims.action_horizon,
            plan.config.actor.model.num_action_chunks,
            plan.config.actor.model.env_action_dim,
            dims.action_dim
        ),
        format!("{:>15}  image tower", grouped(tower)),
        format!(
            "{:>15}  language model and projector, frozen as the tower is",
            grouped(part(Part::Vlm) - tower)
        ),
        format!("{:>15}  action expert and projections", grouped(part(Part::Expert))),
    ];
    for (head, name) in [(Part::NoiseHead, "noise head"), (Part::ValueHead, "value head")] {
        if part(head) > 0 {
            lines.push(format!("{:>15}  {name}", grouped(part(head))));
        }
    }
    lines.push(format!("{:>15}  in all, {} trained", grouped(all), grouped(trained)));
    lines.push(format!(
        "learner: {} of weights, {} of gradients and two moments{}; engine: {} of weights; all f32",
        bytes(all * F32),
        bytes(3 * trained * F32),
        if reference > 0 {
            format!(", {} of the reference policy", bytes(reference * F32))
        } else {
            String::new()
        },
        bytes(all * F32)
    ));
    lines
}

/// Checks the contract of the robot and describes the contract. Files that are not there are named, and the rest is checked.
fn robot(plan: &RunPlan) -> Result<Vec<String>> {
    let model = &plan.config.actor.model;
    let mut lines = Vec::new();
    let missing = |path: &Path, what: &str| format!("{what} `{}` does not exist here: not checked", path.display());
    let norm_stats = match model.norm_stats.as_deref() {
        Some(path) if !path.exists() => {
            lines.push(missing(path, "the statistics file"));
            None
        }
        path => path.map(NormStats::load).transpose().map_err(ContractError::from)?,
    };
    let tokenizer = match &model.tokenizer {
        TokenizerConfig::SentencePiece { model } if !model.exists() => {
            lines.push(missing(model, "the tokenizer"));
            None
        }
        config => Some(Tokenizer::from_config(config, None).map_err(ContractError::from)?),
    };
    let mut contract = Contract::of_config(model, norm_stats);
    if contract.norm_stats.is_none() && model.norm_stats.is_some() {
        contract.normalization = Normalization::None;
    }
    contract.check(tokenizer.as_ref())?;
    lines.push(format!(
        "cameras {}; state of {} numbers{}; actions of {} numbers, {}; normalization {}",
        contract.cameras.join(", "),
        contract.state_width(),
        if contract.discrete_state_input {
            ", in words inside the prompt"
        } else {
            ""
        },
        contract.env_action_dim,
        match &contract.delta_actions {
            Some(runs) => format!("differences from the state by the runs {runs:?}"),
            None => "absolute".to_owned(),
        },
        model.normalization.name()
    ));
    lines.extend(contract.warnings().into_iter().map(|line| format!("warning: {line}")));
    Ok(lines)
}

fn sampling(plan: &RunPlan) -> Vec<String> {
    let sampling = plan.sampling(0);
    let schedule = Schedule::of(&sampling);
    let which = match sampling.mdp {
        Mdp::Hybrid => "one stochastic step per chunk, drawn for each environment",
        Mdp::Joint => "all steps stochastic, one likelihood per chunk",
        Mdp::TwoLayer => "all steps stochastic, each a transition of its own",
    };
    let mut lines = vec![format!(
        "{}, {} denoise steps; {}",
        sampling.noise_method.name,
        sampling.num_steps,
        if schedule.drawable == 0 {
            "all deterministic"
        } else {
            which
        }
    )];
    for (k, row) in schedule.stochastic.iter().enumerate() {
        let std = match (&plan.heads.noise, k < schedule.drawable) {
            (_, false) => "deterministic".to_owned(),
            (Some(head), true) => format!("std learned, {} to {}", head.std_range[0], head.std_range[1]),
            (None, true) => format!("std {:.3} in model units", row.std),
        };
        lines.push(format!("step {k}: t {:.3} to {:.3}, {std}", row.t, row.t_next));
    }
    if let Some(anneal) = &plan.config.actor.model.openpi.noise_anneal {
        lines.push(format!(
            "version 0; the level goes from {} to {} until version {}",
            anneal.start, anneal.end, anneal.steps
        ));
    } else if sampling.noise_method.levels.is_some() {
        lines.push(format!("noise level {}", sampling.noise_level));
    }
    lines
}

/// Sizes of an iteration. Numbers of records are upper bounds, known only if `env.params.max_episode_steps` is set.
struct Arithmetic {
    episodes: usize,
    /// Largest number of chunks per episode.
    chunks: Option<usize>,
    /// Samples per record.
    samples: usize,
    /// Expert passes per sample.
    passes: usize,
}

impl Arithmetic {
    fn new(plan: &RunPlan) -> Self {
        let config = &plan.config;
        let train = &config.env.train;
        let steps = config
            .env
            .params
            .get("max_episode_steps")
            .and_then(toml::Value::as_integer);
        let schedule = Schedule::of(&plan.sampling(0));
        let two_layer = config.actor.model.openpi.mdp == Mdp::TwoLayer;
        Self {
            episodes: train.total_num_envs * train.rollout_epoch,
            chunks: steps
                .and_then(|s| usize::try_from(s).ok())
                .map(|s| s.div_ceil(config.actor.model.num_action_chunks)),
            samples: if two_layer { schedule.stochastic_steps() } else { 1 },
            passes: if two_layer || config.algorithm.velocity.is_some() {
                1
            } else {
                schedule.stochastic_steps()
            },
        }
    }

    /// Returns the number of optimizer steps of an epoch over `samples` samples.
    fn steps(plan: &RunPlan, samples: usize) -> usize {
        minibatch_count(samples, plan.config.actor.global_batch_size)
    }
}

fn iteration(plan: &RunPlan) -> Vec<String> {
    let config = &plan.config;
    let train = &config.env.train;
    let a = Arithmetic::new(plan);
    let mut lines = vec![format!(
        "{} environments x {} episode(s) = {} episodes, {} group(s) of {}",
        train.total_num_envs,
        train.rollout_epoch,
        a.episodes,
        group_count(plan),
        config.algorithm.group_size
    )];
    let dims = &plan.dims;
    let cache = prefix_bytes(dims);
    let (global, micro, epochs) = (
        config.actor.global_batch_size,
        config.actor.micro_batch_size,
        config.algorithm.update_epoch as usize,
    );
    if let Some(chunks) = a.chunks {
        let records = a.episodes * chunks;
        let samples = records * a.samples;
        let steps = Arithmetic::steps(plan, samples);
        lines.extend([
            format!("x at most {chunks} chunks = {} records, at most; x {} = {} samples", grouped(records), a.samples, grouped(samples)),
            format!(
                "{} samples / {global} = {steps} optimizer step(s) of about {} samples, each in {} part(s) of at most {micro}",
                grouped(samples),
                samples.div_ceil(steps.max(1)),
                samples.div_ceil(steps.max(1)).div_ceil(micro)
            ),
            format!(
                "x {epochs} epochs = {} optimizer steps per iteration, x {} iterations = {}",
                steps * epochs,
                config.runner.max_epochs,
                grouped(steps * epochs * config.runner.max_epochs as usize)
            ),
            format!(
                "prefixes of all records: {}, {}",
                bytes(cache * records),
                match plan.prefix_cache() {
                    (PrefixCachePlace::Off, _) => "not kept: each runs again in every epoch".to_owned(),
                    (place, bound) => format!("kept ({}) up to {}", place.name(), bytes(bound as usize)),
                }
            ),
        ]);
    } else {
        lines.push(format!(
            "the environment's `max_episode_steps` is not in `env.params`: the number of records is known when the episodes end; \
             about {global} samples per optimizer step in parts of at most {micro}, {epochs} epochs"
        ));
    }
    lines.push(format!(
        "expert passes: {} per chunk in the rollout, {} per sample and epoch in the update; prefix {} per record, worth {:.0} expert passes",
        config.actor.model.num_steps,
        a.passes,
        bytes(cache),
        dims.prefix_flops() as f64 / dims.velocity_flops() as f64
    ));
    lines
}

#[cfg(test)]
mod tests;
