//! The reference sampler: hybrid ODE-SDE denoising in libtorch, which the exported graphs are checked against.

use policy::flow::Schedule;
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
    /// Denoises `noise` `[B, H, A]` (`x` at `t = 1`). Row `b` takes the stochastic row of the schedule at step
    /// `stochastic_step[b]`, with `z` `[B, H, A]`, and ODE rows elsewhere; `None` is all ODE. `z` may be left out when no row is
    /// stochastic. Gradients are not recorded.
    ///
    /// # Errors
    /// A shape that does not fit, a stochastic step outside the schedule, or one without `z`.
    pub fn sample(
        &self,
        cache: &PrefixCache,
        state: Option<&Tensor>,
        noise: &Tensor,
        schedule: &Schedule,
        stochastic_step: &[Option<usize>],
        z: Option<&Tensor>,
    ) -> Result<Sample, ModelError> {
        let _guard = tch::no_grad_guard();
        let batch = cache.batch();
        let chunk = self.chunk_shape(batch);
        check_shape("noise", noise, &chunk)?;
        if stochastic_step.len() as i64 != batch {
            return Err(ModelError::Elements {
                name: "stochastic_step".to_owned(),
                expected: batch as usize,
                found: stochastic_step.len(),
            });
        }
        if let Some(step) = stochastic_step.iter().flatten().find(|k| **k >= schedule.num_steps()) {
            return Err(ModelError::Step {
                found: *step as i64,
                limit: schedule.num_steps(),
            });
        }
        match z {
            Some(z) => check_shape("z", z, &chunk)?,
            None if stochastic_step.iter().any(Option::is_some) => return Err(ModelError::NoNoise),
            None => {}
        }
        let column = |values: &[f32]| Tensor::from_slice(values).to_device(noise.device()).view([-1, 1, 1]);
        let mut x = noise.shallow_clone();
        let (mut chain, mut velocities, mut means, mut values) = (vec![x.shallow_clone()], vec![], vec![], vec![]);
        for (k, ode) in schedule.ode.iter().enumerate() {
            let rows: Vec<_> = stochastic_step
                .iter()
                .map(|s| schedule.row(k, *s).copied().unwrap_or(*ode))
                .collect();
            let t = Tensor::full([batch], ode.t, (Kind::Double, noise.device()));
            let velocity = self.velocity(cache, state, &x, &t)?;
            let c_x: Vec<f32> = rows.iter().map(|r| r.mean_coefficients().0 as f32).collect();
            let c_v: Vec<f32> = rows.iter().map(|r| r.mean_coefficients().1 as f32).collect();
            let mean = &x * column(&c_x) + &velocity.v_t * column(&c_v);
            x = match z {
                Some(z) => {
                    let std: Vec<f32> = rows.iter().map(|r| r.std as f32).collect();
                    &mean + z * column(&std)
                }
                None => mean.shallow_clone(),
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
