//! Second set of the trained weights, the reference of a loss; the frozen vision-language model is shared.

use std::collections::BTreeMap;

use policy::{
    config::ReferenceConfig,
    params::{Heads, Part},
};
use tch::{Tensor, no_grad};

use crate::{
    error::{ReferenceError, Result},
    model::Pi0,
};

/// Trained parts of a policy that acts, which a reference copies.
const OWN: [Part; 2] = [Part::Expert, Part::NoiseHead];

fn own(policy: &Pi0) -> impl Iterator<Item = (&str, &Tensor)> {
    OWN.into_iter().flat_map(|part| policy.store().part(part))
}

/// Reference policy of a run.
#[derive(Debug)]
pub struct Reference {
    config: ReferenceConfig,
    policy: Pi0,
    /// Whether the weights are set, from the run's first update or from a checkpoint.
    filled: bool,
}

impl Reference {
    /// Returns a reference of `policy` that copies the trained weights at the start of the first update.
    ///
    /// # Errors
    /// The sizes do not fit together.
    pub fn new(config: ReferenceConfig, policy: &Pi0) -> Result<Self> {
        let store = policy.store().fork(&OWN);
        let heads = Heads {
            value: None,
            noise: policy.noise_head().cloned(),
        };
        Ok(Self {
            config,
            policy: Pi0::new(policy.dims().clone(), &heads, store)?,
            filled: false,
        })
    }

    /// Returns the policy with the reference's weights, without a value head.
    pub fn policy(&self) -> &Pi0 {
        &self.policy
    }

    /// Copies the trained weights at the start of an iteration's updates; except for an acting reference, only if none are set.
    pub fn begin(&mut self, trained: &Pi0) {
        if !self.filled || matches!(self.config, ReferenceConfig::Acting {}) {
            self.mix(trained, 0.0);
            self.filled = true;
        }
    }

    /// Updates a moving-average reference at the end of an iteration's updates: `ref <- decay ref + (1 - decay) trained`.
    pub fn end(&mut self, trained: &Pi0) {
        if let ReferenceConfig::Ema { decay } = self.config {
            self.mix(trained, decay);
        }
    }

    fn mix(&self, trained: &Pi0, keep: f64) {
        no_grad(|| {
            for ((_, own), (_, trained)) in own(&self.policy).zip(own(trained)) {
                let mut own = own.shallow_clone();
                if keep == 0.0 {
                    own.copy_(trained);
                } else {
                    let _own = own.g_mul_scalar_(keep).g_add_(&(trained * (1.0 - keep)));
                }
            }
        });
    }

    /// Returns the weights by name, for a checkpoint; empty if the next update overwrites the weights.
    pub fn state(&self) -> BTreeMap<String, Tensor> {
        if !self.filled || matches!(self.config, ReferenceConfig::Acting {}) {
            return BTreeMap::new();
        }
        own(&self.policy)
            .map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone()))
            .collect()
    }

    /// Restores the weights of a checkpoint; an empty `state` changes nothing.
    ///
    /// # Errors
    /// A tensor is missing, unknown or has a wrong shape; the error names the tensor.
    pub fn restore(&mut self, state: &BTreeMap<String, Tensor>) -> Result<(), ReferenceError> {
        if state.is_empty() {
            return Ok(());
        }
        let own: Vec<(&str, &Tensor)> = own(&self.policy).collect();
        if let Some(name) = state.keys().find(|name| own.iter().all(|(n, _)| n != name)) {
            return Err(ReferenceError::Unknown { name: name.clone() });
        }
        for (name, tensor) in own {
            let name = name.to_owned();
            let Some(found) = state.get(&name) else {
                return Err(ReferenceError::Missing { name });
            };
            let (found_shape, expected) = (found.size(), tensor.size());
            if found_shape != expected {
                return Err(ReferenceError::Shape {
                    name,
                    found: found_shape,
                    expected,
                });
            }
            no_grad(|| tensor.shallow_clone().copy_(found));
        }
        self.filled = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use policy::{config::RunConfig, plan::RunPlan};
    use tch::Device;

    use super::*;
    use crate::model::ParamStore;

    fn close(got: f64, want: f64) -> bool {
        (got - want).abs() < 1e-6
    }

    #[test]
    fn the_reference_shares_what_is_frozen_and_keeps_its_own_expert() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/tabletop_grpo.toml");
        let plan = RunPlan::new(RunConfig::load(&path, &[]).expect("configuration")).expect("plan");
        let store = ParamStore::random(&plan.dims, &plan.heads, 3, Device::Cpu).expect("weights");
        let policy = Pi0::new(plan.dims.clone(), &plan.heads, store).expect("policy");
        let first = |policy: &Pi0, part: Part| policy.store().part(part).next().expect("a tensor").1.shallow_clone();
        let value = |t: &Tensor| t.flatten(0, -1).double_value(&[0]);

        let mut reference = Reference::new(ReferenceConfig::Ema { decay: 0.75 }, &policy).expect("reference");
        assert_eq!(
            first(&policy, Part::Vlm).data_ptr(),
            first(reference.policy(), Part::Vlm).data_ptr()
        );
        assert!(reference.state().is_empty(), "nothing to keep before the first update");
        reference.begin(&policy);
        let start = value(&first(&policy, Part::Expert));
        let _moved = no_grad(|| first(&policy, Part::Expert).g_add_scalar_(1.0));
        assert!(
            close(value(&first(reference.policy(), Part::Expert)), start),
            "it does not move along"
        );
        reference.end(&policy);
        assert!(close(value(&first(reference.policy(), Part::Expert)), start + 0.25));

        let state: BTreeMap<_, _> = reference.state().into_iter().map(|(n, t)| (n, t.copy())).collect();
        let mut again = Reference::new(ReferenceConfig::Ema { decay: 0.75 }, &policy).expect("reference");
        again.restore(&state).expect("fits");
        again.begin(&policy);
        assert!(
            close(value(&first(again.policy(), Part::Expert)), start + 0.25),
            "a restored one is not begun anew"
        );

        let mut acting = Reference::new(ReferenceConfig::Acting {}, &policy).expect("reference");
        acting.begin(&policy);
        acting.end(&policy);
        assert!(close(value(&first(acting.policy(), Part::Expert)), start + 1.0));
        assert!(acting.state().is_empty());
    }
}
