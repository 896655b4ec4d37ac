//! KL penalty.

use tch::Tensor;

/// Computes `r - 1 - log r` per element from the log-ratio `log r` (Schulman 2020, "Approximating KL Divergence", estimator k3):
/// not negative, 0 at equal log-probabilities.
///
/// With `r = pi_theta(a) / pi_old(a)` and actions sampled from `pi_old`, the mean is an unbiased estimate of
/// `KL(pi_old || pi_theta)`, and so is its gradient. With `r = pi_ref(a) / pi_theta(a)` and actions of `pi_theta` the mean
/// estimates `KL(pi_theta || pi_ref)` (Shao et al. 2024, "DeepSeekMath", eq. 4). `algorithm.kl_beta` times the mean is added to
/// the policy loss.
pub fn k3(log_ratio: &Tensor) -> Tensor {
    log_ratio.exp() - 1.0 - log_ratio
}
