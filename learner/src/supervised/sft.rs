//! Supervised fine-tuning of the action expert by flow matching, on the KV cache of a frozen prefix.

use policy::{
    config::SftConfig,
    flow::training_time,
    noise::{Purpose, below, fill_normal, stream, uniform},
    params::Part,
};
use tch::{Kind, Tensor};

use super::{loader::Loader, prefixes::Prefixes, stage::Stage};
use crate::{error::Result, metrics::MetricsLog, model::Pi0};

/// Trains the expert on demonstrations. Returns the mean loss of the last logging interval of at most 50 steps. At most
/// `kept_bytes` of prefixes are kept for rows that are drawn again; the bound does not change the result.
///
/// # Errors
/// A row cannot be read, a shape does not fit, or the metrics file cannot be written.
pub fn sft(
    policy: &Pi0,
    config: &SftConfig,
    demos: &Loader<'_>,
    kept_bytes: u64,
    seed: u64,
    log: &mut MetricsLog,
) -> Result<f64> {
    let stage = &config.optim;
    policy.store().set_trainable(&[Part::Expert]);
    let params = policy
        .store()
        .part(Part::Expert)
        .map(|(n, t)| (n.to_owned(), t.shallow_clone()))
        .collect();
    let mut training = Stage::new("SFT", stage, params)?;
    let mut rng = stream(Purpose::FlowMatching, seed, 0, 0, 0);
    let (total, batch) = (demos.rows(), stage.batch_size);
    let elements = batch * policy.dims().action_horizon * policy.dims().action_dim;
    let draws = (0..stage.steps).map(|_| {
        let rows: Vec<usize> = (0..batch).map(|_| below(&mut rng, total)).collect();
        let mut noise = vec![0.0f32; elements];
        fill_normal(&mut rng, &mut noise);
        let time: Vec<f64> = (0..batch).map(|_| training_time(uniform(&mut rng))).collect();
        (rows, (noise, time))
    });
    let device = policy.device();
    let mut prefixes = Prefixes::new(policy, total, kept_bytes);
    let (mut recent, mut counted) = (0.0, 0.0);
    let mut last = f64::NAN;
    let mut step = 0;
    demos.for_each(draws, |minibatch, (noise, time)| {
        step += 1;
        let actions = minibatch.targets.to_device(device);
        let noise = Tensor::from_slice(&noise).view_as(&actions).to_device(device);
        let time = Tensor::from_slice(&time).to_device(device);
        let state = minibatch.observations.state.to_device(device);
        let prefix = prefixes.of(&minibatch.rows, &minibatch.observations)?;
        let loss = policy
            .flow_matching_loss(&prefix, Some(&state), &actions, &noise, &time)?
            .loss
            .mean(Kind::Float);
        let report = training.step(&loss)?;
        recent += loss.double_value(&[]);
        counted += 1.0;
        if step % 50 == 0 || step == u64::from(stage.steps) {
            last = recent / counted;
            (recent, counted) = (0.0, 0.0);
            training.bar.set_message(format!("SFT: loss {last:.4}"));
            log.write("sft", step, &[("loss", last), ("grad_norm", report.grad_norm)])?;
        }
        Ok(())
    })?;
    training.bar.finish();
    policy.store().set_trainable(&[]);
    Ok(last)
}
