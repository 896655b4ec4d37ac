//! Speed of the update for each place of the prefix cache, on records that the policy draws from random observations.

use std::fmt;

use policy::{
    config::{BootstrapType, PrefixCachePlace},
    dims::{PolicyDims, Variant},
    noise::{NoiseKey, Purpose, below, fill_normal, stream},
    params::Part,
    plan::{DEFAULT_PREFIX_CACHE_MB, RunPlan},
};
use tch::{Device, Kind, Tensor};
use wire::messages::Trajectory;

use crate::{
    batch::{RolloutBatch, observation::ObservationBatch},
    error::{LearnerError, Result, io},
    model::{ParamStore, Pi0},
    ranks::OneRank,
    update::{
        Updater,
        reference_records::{act, episode},
    },
};

/// Compared places; the first is the baseline of the speed ratios.
const PLACES: [PrefixCachePlace; 3] = [PrefixCachePlace::Off, PrefixCachePlace::Memory, PrefixCachePlace::Disk];

/// Measurement of one place.
#[derive(Debug, Clone)]
pub struct Measured {
    /// The measured place.
    pub place: PrefixCachePlace,
    /// Seconds of an update, prefixes included: the median over the repeats.
    pub seconds: f64,
    /// Records times epochs, over `seconds`.
    pub samples_per_second: f64,
    /// Speed relative to `off`: the median of the repeats' ratios.
    pub over_off: f64,
    /// Bytes of stored prefixes, the largest over the repeats.
    pub kept_bytes: u64,
    /// Largest absolute difference of a weight from the same weight after the update with `off`.
    pub weight_gap: f32,
}

/// Result of [`update`].
#[derive(Debug, Clone)]
pub struct Table {
    dims: PolicyDims,
    records: usize,
    epochs: u32,
    micro_batch: usize,
    threads: usize,
    repeats: usize,
    /// Measurements in the order off, memory, disk.
    pub places: Vec<Measured>,
}

/// Updates a fresh policy on the same records with each place of the prefix cache, `repeats` times in turn. The table compares
/// the speeds and the final weights with `off`.
///
/// # Errors
/// `records` or `repeats` is 0, the configuration's algorithm cannot be built, or no update was made.
pub fn update(plan: &RunPlan, records: usize, repeats: usize) -> Result<Table> {
    for (what, count) in [("--records", records), ("--repeats", repeats)] {
        if count == 0 {
            return Err(LearnerError::Zero { what });
        }
    }
    let actor = &plan.config.actor;
    tch::set_num_threads(actor.threads as i32);
    let acting = network(plan)?;
    let trajectories = episodes(plan, &acting, records)?;
    // after the critic's warm-up, critic and actor are both updated
    let iteration = actor.optim.critic_warmup_epochs;
    let batch = RolloutBatch::new(plan, trajectories, 0, &OneRank)?.to_device(acting.device());
    // folder for the file of `disk`, separate from the run's folder
    let scratch = std::env::temp_dir().join(format!("pirl-bench-{}", std::process::id()));
    let mut runs: Vec<Vec<(f64, u64)>> = vec![Vec::new(); PLACES.len()];
    let mut weights: Vec<Vec<f32>> = Vec::new();
    for _ in 0..repeats {
        weights.clear();
        for (place, runs) in PLACES.into_iter().zip(&mut runs) {
            let mut plan = plan.clone();
            plan.config.runner.output_dir.clone_from(&scratch);
            plan.config.actor.prefix_cache = Some(place);
            plan.config.actor.prefix_cache_mb = match place {
                PrefixCachePlace::Off => None,
                _ => Some(actor.prefix_cache_mb.unwrap_or(DEFAULT_PREFIX_CACHE_MB)),
            };
            let policy = network(&plan)?;
            let report = Updater::new(&plan, &policy, &OneRank)?.update(&batch, iteration)?;
            if report.updates == 0 {
                return Err(LearnerError::NothingMeasured { records });
            }
            runs.push((report.prefix_seconds + report.update_seconds, report.prefix_cache_bytes));
            let parts = [Part::Expert, Part::NoiseHead, Part::ValueHead];
            let all = parts.into_iter().flat_map(|part| policy.store().export(part));
            weights.push(all.flat_map(|(_, _, data)| data).collect());
        }
    }
    if scratch.exists() {
        std::fs::remove_dir(&scratch).map_err(io("removing", &scratch))?;
    }
    let off: Vec<f64> = runs.first().into_iter().flatten().map(|run| run.0).collect();
    let samples = (records * plan.config.algorithm.update_epoch as usize) as f64;
    let places = PLACES.into_iter().zip(&runs).zip(&weights).map(|((place, runs), own)| {
        let seconds = median(runs.iter().map(|run| run.0).collect());
        let reference = weights.first().into_iter().flatten();
        Measured {
            place,
            seconds,
            samples_per_second: samples / seconds,
            over_off: median(off.iter().zip(runs).map(|(off, run)| off / run.0).collect()),
            kept_bytes: runs.iter().map(|run| run.1).max().unwrap_or(0),
            weight_gap: reference.zip(own).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max),
        }
    });
    Ok(Table {
        dims: plan.dims.clone(),
        records,
        epochs: plan.config.algorithm.update_epoch,
        micro_batch: actor.micro_batch_size,
        threads: actor.threads,
        repeats,
        places: places.collect(),
    })
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ratio = |dims: &PolicyDims| dims.prefix_flops() as f64 / dims.velocity_flops() as f64;
        writeln!(
            f,
            "prefix {:.1} MFLOP, expert pass {:.2} MFLOP: {:.0} to 1 (published pi0: {:.0} to 1)",
            self.dims.prefix_flops() as f64 / 1e6,
            self.dims.velocity_flops() as f64 / 1e6,
            ratio(&self.dims),
            ratio(&PolicyDims::published(Variant::Pi0)),
        )?;
        writeln!(
            f,
            "{} records, {} epochs, micro-batches of at most {}, {} threads, median of {} repeats in turn\n",
            self.records, self.epochs, self.micro_batch, self.threads, self.repeats
        )?;
        writeln!(
            f,
            "prefix_cache  update s  samples/s  over off  kept MB  largest weight difference"
        )?;
        for measured in &self.places {
            writeln!(
                f,
                "{:12} {:9.2} {:10.1} {:8.2}x {:8.1}  {:e}",
                measured.place.name(),
                measured.seconds,
                measured.samples_per_second,
                measured.over_off,
                measured.kept_bytes as f64 / 1e6,
                measured.weight_gap
            )?;
        }
        Ok(())
    }
}

fn network(plan: &RunPlan) -> Result<Pi0> {
    let store = ParamStore::random(
        &plan.dims,
        &plan.heads,
        plan.config.runner.seed,
        Device::cuda_if_available(),
    )?;
    Ok(Pi0::new(plan.dims.clone(), &plan.heads, store)?)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Makes episodes of one chunk each; every second episode succeeds.
fn episodes(plan: &RunPlan, policy: &Pi0, records: usize) -> Result<Vec<Trajectory>> {
    let seed = plan.config.runner.seed;
    let numbers: Vec<usize> = (0..records).collect();
    // the remaining episodes join the last whole group
    let group = plan.config.algorithm.group_size.max(1);
    let last_group = (records / group).saturating_sub(1);
    let mut all = Vec::with_capacity(records);
    for part in numbers.chunks(plan.config.actor.micro_batch_size) {
        let keys: Vec<NoiseKey> = part
            .iter()
            .map(|env| NoiseKey {
                seed,
                env: *env as u32,
                episode: 0,
                chunk: 0,
            })
            .collect();
        let made = act(plan, policy, &observations(&plan.dims, seed, part), &keys, 0)?;
        all.extend(made.into_iter().zip(part).map(|(record, env)| {
            let success = env % 2 == 0;
            let mut rewards = vec![0.0; plan.config.actor.model.num_action_chunks];
            if let Some(first) = rewards.first_mut() {
                *first = f32::from(success);
            }
            let bootstrap = plan.config.algorithm.bootstrap_type == BootstrapType::Always;
            Trajectory {
                final_value: bootstrap.then_some(0.0),
                ..episode(record, (env / group).min(last_group) as u64, rewards, success)
            }
        }));
    }
    Ok(all)
}

/// Draws pixels, states and prompts; every second prompt fills half of its slots.
fn observations(dims: &PolicyDims, seed: u64, numbers: &[usize]) -> ObservationBatch {
    let (side, cameras) = (dims.vision.image_size, dims.cameras);
    let count = numbers.len() as i64;
    let (mut images, mut state, mut prompt, mut mask) = (vec![], vec![], vec![], vec![]);
    for number in numbers {
        let mut rng = stream(Purpose::SelfTest, seed, *number as u64, 0, 0);
        images.extend((0..cameras * side * side * 3).map(|_| below(&mut rng, 256) as u8));
        let mut own = vec![0.0f32; dims.action_dim];
        fill_normal(&mut rng, &mut own);
        state.extend(own);
        let valid = if number % 2 == 0 {
            dims.prompt_len
        } else {
            dims.prompt_len.div_ceil(2)
        };
        for slot in 0..dims.prompt_len {
            mask.push(slot < valid);
            prompt.push(if slot < valid {
                below(&mut rng, dims.vocab) as i64
            } else {
                0
            });
        }
    }
    ObservationBatch {
        images: Tensor::from_slice(&images).view([count, cameras as i64, side as i64, side as i64, 3]),
        image_mask: Tensor::ones([count, cameras as i64], (Kind::Bool, Device::Cpu)),
        prompt: Tensor::from_slice(&prompt).view([count, -1]),
        prompt_mask: Tensor::from_slice(&mask).view([count, -1]),
        state: Tensor::from_slice(&state).view([count, -1]),
    }
}
