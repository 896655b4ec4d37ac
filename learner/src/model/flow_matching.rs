//! Flow-matching loss of SFT (Lipman et al. 2023, with openpi's direction of time).

use tch::Tensor;

use super::{ModelError, Pi0, PrefixCache, check_shape};

/// Flow-matching loss per element, with its noisy actions and target.
#[derive(Debug)]
pub struct FlowMatching {
    /// `(u_t - v_t)^2` per element, `[B, H, A]`.
    pub loss: Tensor,
    /// Noisy actions `t * noise + (1 - t) * actions`, `[B, H, A]`.
    pub x_t: Tensor,
    /// Target velocity `noise - actions`, `[B, H, A]`.
    pub u_t: Tensor,
}

/// Computes the straight path of flow matching at flow times `time` `[B]`. Returns the noisy actions
/// `t * noise + (1 - t) * actions` and the path's velocity `noise - actions`, both `[B, H, A]`.
pub(crate) fn path(actions: &Tensor, noise: &Tensor, time: &Tensor) -> (Tensor, Tensor) {
    let t = time.to_kind(actions.kind()).view([-1, 1, 1]);
    (noise * &t + actions * (1.0 - &t), noise - actions)
}

impl Pi0 {
    /// Computes the unreduced flow-matching loss `[B, H, A]` for normalized `actions` and standard normal `noise` `[B, H, A]` at
    /// flow times `time` `[B]` (training draws `0.999 * Beta(1.5, 1) + 0.001`). `state` `[B, A]` is read by pi0 only.
    ///
    /// # Errors
    /// A shape does not fit the policy or the batch.
    pub fn flow_matching_loss(
        &self,
        cache: &PrefixCache,
        state: Option<&Tensor>,
        actions: &Tensor,
        noise: &Tensor,
        time: &Tensor,
    ) -> Result<FlowMatching, ModelError> {
        let chunk = self.chunk_shape(cache.batch());
        check_shape("actions", actions, &chunk)?;
        check_shape("noise", noise, &chunk)?;
        check_shape("time", time, &[cache.batch()])?;
        let (x_t, u_t) = path(actions, noise, time);
        let velocity = self.velocity(cache, state, &x_t, time)?;
        Ok(FlowMatching {
            loss: (&u_t - velocity.v_t).square(),
            x_t,
            u_t,
        })
    }
}
