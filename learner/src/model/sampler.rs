//! The reference sampler: hybrid ODE-SDE denoising in libtorch, which the exported graphs are checked against.

use policy::{flow::Schedule, noise::StepNoise};
use tch::{Kind, Tensor};

use super::{ModelError, Pi0, PrefixCache, check_shape};

/// One sampled batch of action chunks.
#[derive(Debug)]
pub struct Sample {
    /// Normalised actions, `[B, H, A]`: the last entry of the chain.
    pub actions: Tensor,
    /// `x` before the first step and after each, `[B, K + 1, H, A]`.
    pub chain: Tensor,
    /// Velocities, `[B, K, H, A]`.
    pub velocity: Tensor,
    /// Means of the transitions, `[B, K, H, A]`.
    pub mean: Tensor,
    /// `V_expert` at every step, `[B, K]`; absent without an expert value head.
    pub values: Option<Tensor>,
}

impl Pi0 {
    /// Denoises `noise` `[B, H, A]` (`x` at `t = 1`). Row `b` takes the stochastic row of the schedule at the steps that `stochastic[b]`
    /// names, with their `z` `[H, A]`, and ODE rows elsewhere; no entry is all ODE. Gradients are not recorded.
    ///
    /// # Errors
    /// A shape that does not fit, or a stochastic step outside the schedule.
    pub fn sample(
        &self,
        cache: &PrefixCache,
        state: Option<&Tensor>,
        noise: &Tensor,
        schedule: &Schedule,
        stochastic: &[Vec<StepNoise>],
    ) -> Result<Sample, ModelError> {
        let _guard = tch::no_grad_guard();
        let batch = cache.batch();
        let chunk = self.chunk_shape(batch);
        let elements = (chunk[1] * chunk[2]) as usize;
        check_shape("noise", noise, &chunk)?;
        if !stochastic.is_empty() && stochastic.len() as i64 != batch {
            return Err(ModelError::Elements {
                name: "stochastic".to_owned(),
                expected: batch as usize,
                found: stochastic.len(),
            });
        }
        for drawn in stochastic.iter().flatten() {
            if drawn.step >= schedule.num_steps() {
                return Err(ModelError::Step {
                    found: drawn.step as i64,
                    limit: schedule.num_steps(),
                });
            }
            if drawn.z.len() != elements {
                return Err(ModelError::Elements {
                    name: "z".to_owned(),
                    expected: elements,
                    found: drawn.z.len(),
                });
            }
        }
        let column = |values: &[f32]| Tensor::from_slice(values).to_device(noise.device()).view([-1, 1, 1]);
        let mut x = noise.shallow_clone();
        let (mut chain, mut velocities, mut means, mut values) = (vec![x.shallow_clone()], vec![], vec![], vec![]);
        for (k, ode) in schedule.ode.iter().enumerate() {
            let drawn: Vec<Option<&StepNoise>> = (0..batch as usize)
                .map(|b| stochastic.get(b)?.iter().find(|s| s.step == k))
                .collect();
            let rows = drawn
                .iter()
                .map(|s| {
                    schedule.row(k, s.is_some()).ok_or(ModelError::Step {
                        found: k as i64,
                        limit: schedule.stochastic.len(),
                    })
                })
                .collect::<Result<Vec<_>, _>>()?;
            let t = Tensor::full([batch], ode.t, (Kind::Double, noise.device()));
            let velocity = self.velocity(cache, state, &x, &t)?;
            let c_x: Vec<f32> = rows.iter().map(|r| r.mean_coefficients().0 as f32).collect();
            let c_v: Vec<f32> = rows.iter().map(|r| r.mean_coefficients().1 as f32).collect();
            let mean = &x * column(&c_x) + &velocity.v_t * column(&c_v);
            x = if drawn.iter().any(Option::is_some) {
                // a row without a draw takes the ODE's step, whose `std` is 0: its `z` adds nothing
                let z: Vec<f32> = drawn
                    .iter()
                    .flat_map(|s| s.map_or_else(|| vec![0.0; elements], |s| s.z.clone()))
                    .collect();
                let z = Tensor::from_slice(&z).to_device(noise.device()).view(chunk);
                let std: Vec<f32> = rows.iter().map(|r| r.std as f32).collect();
                let std = match self.noise_std(&velocity.hidden) {
                    Some(learnt) => learnt * column(&std),
                    None => column(&std),
                };
                &mean + z * std
            } else {
                mean.shallow_clone()
            };
            values.extend(self.value_expert(&velocity.hidden));
            chain.push(x.shallow_clone());
            velocities.push(velocity.v_t);
            means.push(mean);
        }
        Ok(Sample {
            actions: x,
            chain: Tensor::stack(&chain, 1),
            velocity: Tensor::stack(&velocities, 1),
            mean: Tensor::stack(&means, 1),
            values: (!values.is_empty()).then(|| Tensor::stack(&values, 1)),
        })
    }
}
