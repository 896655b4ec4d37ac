//! Supervised fine-tuning of the action expert by flow matching, on the KV cache of a frozen prefix.

use policy::{
    config::SftConfig,
    flow::training_time,
    noise::{Purpose, below, fill_normal, stream, uniform},
    params::Part,
};
use tch::{Kind, Tensor};

use super::{dataset::Dataset, stage::Stage};
use crate::{error::Result, metrics::MetricsLog, model::Pi0};

/// Trains the expert on demonstrations; returns the mean loss of the last steps.
///
/// # Errors
/// Shapes that do not fit, or a metrics file that cannot be written.
pub fn sft(policy: &Pi0, config: &SftConfig, demos: &Dataset, seed: u64, log: &mut MetricsLog) -> Result<f64> {
    let stage = &config.optim;
    let (cache, _) = demos.observations.frozen_prefix(policy, 256)?;
    policy.store().set_trainable(&[Part::Expert]);
    let params = policy
        .store()
        .part(Part::Expert)
        .map(|(n, t)| (n.to_owned(), t.shallow_clone()))
        .collect();
    let mut training = Stage::new("SFT", stage, params)?;
    let mut rng = stream(Purpose::FlowMatching, seed, 0, 0, 0);
    let total = demos.observations.len() as usize;
    let device = policy.device();
    let (mut recent, mut counted) = (0.0, 0.0);
    let mut last = f64::NAN;
    for step in 0..u64::from(stage.steps) {
        let rows: Vec<i64> = (0..stage.batch_size).map(|_| below(&mut rng, total) as i64).collect();
        let rows = Tensor::from_slice(&rows);
        let actions = demos.targets.index_select(0, &rows).to_device(device);
        let mut noise = vec![0.0f32; actions.numel()];
        fill_normal(&mut rng, &mut noise);
        let noise = Tensor::from_slice(&noise).view_as(&actions).to_device(device);
        let time: Vec<f64> = (0..stage.batch_size)
            .map(|_| training_time(uniform(&mut rng)))
            .collect();
        let time = Tensor::from_slice(&time).to_device(device);
        let state = demos.observations.state.index_select(0, &rows).to_device(device);
        let loss = policy
            .flow_matching_loss(
                &cache.index_select(&rows.to_device(device))?,
                Some(&state),
                &actions,
                &noise,
                &time,
            )?
            .loss
            .mean(Kind::Float);
        let report = training.step(&loss)?;
        recent += loss.double_value(&[]);
        counted += 1.0;
        if step % 50 == 49 || step + 1 == u64::from(stage.steps) {
            last = recent / counted;
            (recent, counted) = (0.0, 0.0);
            training.bar.set_message(format!("SFT: loss {last:.4}"));
            log.write("sft", step + 1, &[("loss", last), ("grad_norm", report.grad_norm)])?;
        }
    }
    training.bar.finish();
    policy.store().set_trainable(&[]);
    Ok(last)
}
