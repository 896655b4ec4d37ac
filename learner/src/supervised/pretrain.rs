//! Vision-language pre-training by referring localization of the named object, the goal and the gripper.
//!
//! A flow loss alone does not teach a small vision tower to localize. Three read-outs of the same points are trained together:
//! soft-argmax over the image tokens of the prefix output, learned queries on the KV cache of every layer but the first (what the
//! action expert reads), and a linear map of the pooled output (what `V_vlm` reads). The read-outs are dropped afterwards.

use policy::{
    config::PretrainConfig,
    noise::{Purpose, below, fill_normal, stream},
    params::Part,
};
use tch::{Device, Kind, Reduction, Tensor};

use super::{loader::Loader, stage::Stage};
use crate::{
    error::Result,
    metrics::MetricsLog,
    model::{Pi0, Prefix},
};

/// Weight of the pooled read-out in the loss.
const POOLED_WEIGHT: f64 = 0.2;
/// Threshold of the smooth L1 loss in trained units, each a quarter of the image side.
const SMOOTH_L1_BETA: f64 = 0.1;
/// Length of the trained range: coordinates `p` in `[0, 1]` are trained as `4 p - 2`.
const SCALE: f64 = 4.0;

struct ReadOuts {
    /// Points over all cameras, `P = cameras * points per camera`.
    points: i64,
    cameras: i64,
    /// Image tokens of one camera.
    tokens: i64,
    /// Scores and offsets per image token for the points of the same camera, `[3 P / cameras, width]` and bias.
    token: [Tensor; 2],
    /// Queries per layer `[L, P, kv hd]`, read-out `[L, P, kv hd, 2]` and bias `[L, P, 2]`.
    probe: [Tensor; 3],
    /// Linear map of the pooled output, `[2 P, width]` and bias.
    pooled: [Tensor; 2],
    /// Patch centers in trained units, `[tokens, 2]`.
    centres: Tensor,
}

fn leaf(shape: &[i64], std: f64, seed: u64, index: u64, device: Device) -> Tensor {
    let mut data = vec![0.0f32; shape.iter().product::<i64>() as usize];
    if std > 0.0 {
        fill_normal(&mut stream(Purpose::Init, seed, u64::MAX, index, 0), &mut data);
        for value in &mut data {
            *value *= std as f32;
        }
    }
    Tensor::from_slice(&data)
        .view(shape)
        .to_device(device)
        .set_requires_grad(true)
}

impl ReadOuts {
    fn new(policy: &Pi0, points: i64, seed: u64) -> Self {
        let dims = policy.dims();
        let width = dims.vlm.width as i64;
        let kv = (dims.kv_heads * dims.head_dim) as i64;
        let layers = dims.depth as i64 - 1;
        let cameras = dims.cameras as i64;
        let side = dims.vision.image_size / dims.vision.patch;
        let centres: Vec<f32> = (0..side * side)
            .flat_map(|i| [(i % side) as f32, (i / side) as f32].map(|c| (c + 0.5) / side as f32 * 4.0 - 2.0))
            .collect();
        let small = (width as f64).sqrt().recip();
        let leaf = |shape: &[i64], std, index| leaf(shape, std, seed, index, policy.device());
        Self {
            points,
            cameras,
            tokens: dims.vision.tokens() as i64,
            token: [
                leaf(&[3 * points / cameras, width], small, 0),
                leaf(&[3 * points / cameras], 0.0, 1),
            ],
            probe: [
                leaf(&[layers, points, kv], 0.3, 2),
                leaf(&[layers, points, kv, 2], 0.2, 3),
                leaf(&[layers, points, 2], 0.0, 4),
            ],
            pooled: [leaf(&[2 * points, width], small, 5), leaf(&[2 * points], 0.0, 6)],
            centres: Tensor::from_slice(&centres).view([-1, 1, 2]).to_device(policy.device()),
        }
    }

    fn params(&self) -> Vec<(String, Tensor)> {
        let all = self.token.iter().chain(&self.probe).chain(&self.pooled);
        all.enumerate()
            .map(|(i, t)| (format!("read_out.{i}"), t.shallow_clone()))
            .collect()
    }

    /// Computes the read-outs in trained units: from image tokens `[B, P, 2]`, per probed layer `[B, L, P, 2]`, pooled
    /// `[B, P, 2]`.
    fn forward(&self, policy: &Pi0, prefix: &Prefix) -> (Tensor, Tensor, Tensor) {
        let points = self.points;
        let image = prefix.out.narrow(1, 0, self.cameras * self.tokens);
        let read = image.linear(&self.token[0], Some(&self.token[1]));
        let read = read.view([-1, self.cameras, self.tokens, points / self.cameras, 3]);
        let weight = read.narrow(4, 0, 1).softmax(2, Kind::Float);
        let located = (weight * (&self.centres + read.narrow(4, 1, 2))).sum_dim_intlist(2, false, Kind::Float);
        let located = located.flatten(1, 2);

        // [B, L, kv, S, hd] -> [B, L, S, kv hd], layers 1 and up
        let layers = prefix.cache.k.size()[1] - 1;
        let flat = |t: &Tensor| t.narrow(1, 1, layers).permute([0, 1, 3, 2, 4]).flatten(3, 4);
        let (k, v) = (flat(&prefix.cache.k), flat(&prefix.cache.v));
        let mask = prefix.cache.mask.logical_not().view([-1, 1, 1, k.size()[2]]);
        let scores = self.probe[0]
            .unsqueeze(0)
            .matmul(&k.transpose(2, 3))
            .masked_fill(&mask, -1e30);
        let read = scores.softmax(-1, Kind::Float).matmul(&v);
        let probed = (read.unsqueeze(-1) * &self.probe[1]).sum_dim_intlist(3, false, Kind::Float) + &self.probe[2];

        let pooled = policy
            .pooled(prefix)
            .linear(&self.pooled[0], Some(&self.pooled[1]))
            .view([-1, points, 2]);
        (located, probed, pooled)
    }
}

/// Trains image tower, projector and language model on scenes. Returns the mean localization error of the last batch in units of
/// the image side.
///
/// # Errors
/// A row cannot be read, a shape does not fit, or the metrics file cannot be written.
pub fn pretrain(
    policy: &Pi0,
    config: &PretrainConfig,
    scenes: &Loader<'_>,
    seed: u64,
    log: &mut MetricsLog,
) -> Result<f64> {
    let stage = &config.optim;
    policy.store().set_trainable(&[Part::Vlm]);
    let points = config.keypoints * policy.dims().cameras;
    let read_outs = ReadOuts::new(policy, points as i64, seed);
    let mut params: Vec<(String, Tensor)> = policy
        .store()
        .part(Part::Vlm)
        .map(|(n, t)| (n.to_owned(), t.shallow_clone()))
        .collect();
    params.extend(read_outs.params());
    let mut training = Stage::new("pre-training", stage, params)?;
    let mut rng = stream(Purpose::Minibatch, seed, 1, 0, 0);
    let total = scenes.rows();
    let draws = (0..stage.steps).map(|_| ((0..stage.batch_size).map(|_| below(&mut rng, total)).collect(), ()));
    let mut error = f64::NAN;
    let mut step = 0;
    scenes.for_each(draws, |minibatch, ()| {
        step += 1;
        let target = minibatch.targets.to_device(policy.device()) * SCALE - SCALE / 2.0;
        let prefix = minibatch.observations.prefix(policy)?;
        let (located, probed, pooled) = read_outs.forward(policy, &prefix);
        let probe_target = target.unsqueeze(1).expand_as(&probed);
        let loss = located.smooth_l1_loss(&target, Reduction::Mean, SMOOTH_L1_BETA)
            + probed.smooth_l1_loss(&probe_target, Reduction::Mean, SMOOTH_L1_BETA) * probed.size()[1] as f64
            + pooled.smooth_l1_loss(&target, Reduction::Mean, SMOOTH_L1_BETA) * POOLED_WEIGHT;
        let report = training.step(&loss)?;
        if step % 50 == 0 || step == u64::from(stage.steps) {
            let distance = |got: &Tensor| {
                let d = (got - &target).square().sum_dim_intlist(-1, false, Kind::Float).sqrt();
                d.mean(Kind::Float).double_value(&[]) / SCALE
            };
            error = distance(&probed.select(1, -1));
            training
                .bar
                .set_message(format!("pre-training: error {error:.4} of the image"));
            log.write(
                "pretrain",
                step,
                &[
                    ("loss", loss.double_value(&[])),
                    ("grad_norm", report.grad_norm),
                    ("error_probe", error),
                    ("error_tokens", distance(&located)),
                    ("error_pooled", distance(&pooled)),
                ],
            )?;
        }
        Ok(())
    })?;
    training.bar.finish();
    policy.store().set_trainable(&[]);
    Ok(error)
}
