//! `AdamW` with a float32 master copy, parameter groups and a global gradient-norm clip.
//!
//! A parameter of another type than float32 (bfloat16) has a float32 master: the step changes the master, whose rounded value is
//! copied to the parameter. Updates far smaller than a bfloat16 ulp therefore add up instead of being lost. A
//! float32 parameter is its own master.

use std::collections::{BTreeMap, BTreeSet};

use tch::{Kind, TchError, Tensor};

use super::{OptimError, Result};
use crate::ranks::Ranks;

/// Settings of the optimizer that all groups share.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWSettings {
    /// Decay of the first moment, in [0, 1).
    pub beta1: f64,
    /// Decay of the second moment, in [0, 1).
    pub beta2: f64,
    /// Summand of the root of the second moment, above 0.
    pub eps: f64,
    /// Largest L2 norm of the gradient of all groups together; `None` disables the clip, and the norm is still reported.
    pub clip_norm: Option<f64>,
}

impl AdamWSettings {
    fn check(&self) -> Result<()> {
        for (name, found) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&found) {
                return Err(OptimError::Setting {
                    name,
                    range: "in [0, 1)",
                    found,
                });
            }
        }
        let clip_norm = self.clip_norm.map(|clip_norm| ("clip_norm", clip_norm));
        for (name, found) in [("eps", self.eps)].into_iter().chain(clip_norm) {
            if found <= 0.0 || !found.is_finite() {
                return Err(OptimError::Setting {
                    name,
                    range: "above 0",
                    found,
                });
            }
        }
        Ok(())
    }
}

/// Parameters that share a learning rate.
#[derive(Debug)]
pub struct ParamGroup {
    /// Name of the group, for instance `actor` or `value_head`.
    pub name: String,
    /// Learning rate before the schedule's factor.
    pub lr: f64,
    /// Decoupled weight decay per unit of learning rate.
    pub weight_decay: f64,
    /// Name and leaf tensor of each parameter.
    pub params: Vec<(String, Tensor)>,
}

/// Result of one optimizer step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// L2 norm of the gradient of all groups, before the clip.
    pub grad_norm: f64,
    /// Whether the step was skipped: the norm was not finite, parameters and moments are unchanged.
    pub skipped: bool,
}

#[derive(Debug)]
struct Slot {
    name: String,
    param: Tensor,
    /// Float32 copy of a parameter of another type.
    master: Option<Tensor>,
    m: Tensor,
    v: Tensor,
    /// Steps of this parameter; parameters without a gradient do not step.
    steps: i64,
}

#[derive(Debug)]
struct Group {
    lr: f64,
    weight_decay: f64,
    slots: Vec<Slot>,
}

/// Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2).
#[derive(Debug)]
pub struct AdamW {
    settings: AdamWSettings,
    groups: Vec<Group>,
    updates: i64,
    skipped: i64,
}

impl AdamW {
    /// Creates an optimizer with zero moments. The parameters are leaf tensors, updated in place.
    pub fn new(settings: AdamWSettings, groups: Vec<ParamGroup>) -> Result<Self> {
        settings.check()?;
        let mut names = BTreeSet::new();
        let mut built = Vec::with_capacity(groups.len());
        for group in groups {
            for (name, found) in [("lr", group.lr), ("weight_decay", group.weight_decay)] {
                if found < 0.0 || !found.is_finite() {
                    return Err(OptimError::Setting {
                        name,
                        range: "finite and not negative",
                        found,
                    });
                }
            }
            let mut slots = Vec::with_capacity(group.params.len());
            for (name, param) in group.params {
                if !names.insert(name.clone()) {
                    return Err(OptimError::Duplicate { name });
                }
                slots.push(Slot::new(name, param)?);
            }
            built.push(Group {
                lr: group.lr,
                weight_decay: group.weight_decay,
                slots,
            });
        }
        Ok(Self {
            settings,
            groups: built,
            updates: 0,
            skipped: 0,
        })
    }

    /// Returns the number of optimizer steps, without skipped steps.
    pub fn updates(&self) -> u64 {
        self.updates.unsigned_abs()
    }

    /// Resets the gradients of all parameters.
    pub fn zero_grad(&mut self) {
        for slot in self.groups.iter_mut().flat_map(|group| &mut group.slots) {
            slot.param.zero_grad();
        }
    }

    /// Sums the gradients over the ranks. A parameter that a backward pass reached on any rank has a gradient on all ranks
    /// afterwards.
    ///
    /// # Errors
    /// The exchange between ranks or a tensor operation failed.
    pub fn sum_gradients(&mut self, ranks: &dyn Ranks) -> Result<()> {
        let slots = || self.groups.iter().flat_map(|group| &group.slots);
        let mut reached: Vec<f64> = slots().map(|slot| f64::from(u8::from(slot.grad().is_some()))).collect();
        ranks.sum_in_place(&mut reached)?;
        let mut gradients = Vec::with_capacity(reached.len());
        for (slot, reached) in slots().zip(reached) {
            if reached > 0.0 {
                gradients.push(slot.grad_or_zeros()?);
            }
        }
        Ok(ranks.sum(&mut gradients)?)
    }

    /// Returns the L2 norm of the gradient of all groups together; 0 without any gradient.
    pub fn grad_norm(&self) -> Result<f64> {
        let norms = self
            .groups
            .iter()
            .flat_map(|group| &group.slots)
            .filter_map(Slot::grad)
            // norm of each tensor in float32, sum of squares in float64: one transfer from the device
            .map(|grad| grad.f_to_kind(Kind::Float)?.f_norm()?.f_to_kind(Kind::Double))
            .collect::<Result<Vec<_>, TchError>>()?;
        if norms.is_empty() {
            return Ok(0.0);
        }
        let squares = Tensor::f_stack(&norms, 0)?.f_square()?.f_sum(Kind::Double)?;
        Ok(squares.f_double_value(&[])?.sqrt())
    }

    /// Updates the parameters with their current gradients; `lr_factor` is the schedule's factor of this step.
    ///
    /// The gradient is scaled by `min(1, clip_norm / (norm + 1e-6))`. If the norm is not finite, nothing changes
    /// and the step counts as skipped. A parameter that no backward pass has reached yet is unchanged. The
    /// gradients are kept until [`AdamW::zero_grad`].
    pub fn step(&mut self, lr_factor: f64) -> Result<StepReport> {
        let grad_norm = self.grad_norm()?;
        if !grad_norm.is_finite() {
            self.skipped += 1;
            return Ok(StepReport {
                grad_norm,
                skipped: true,
            });
        }
        let clip_coefficient = self
            .settings
            .clip_norm
            .map_or(1.0, |clip| (clip / (grad_norm + 1e-6)).min(1.0));
        let settings = self.settings;
        tch::no_grad(|| {
            for group in &mut self.groups {
                let (lr, weight_decay) = (group.lr * lr_factor, group.weight_decay);
                for slot in &mut group.slots {
                    slot.step(&settings, lr, weight_decay, clip_coefficient)
                        .map_err(|source| OptimError::Update {
                            name: slot.name.clone(),
                            source,
                        })?;
                }
            }
            Ok::<_, OptimError>(())
        })?;
        self.updates += 1;
        Ok(StepReport {
            grad_norm,
            skipped: false,
        })
    }

    /// Returns the state on which the next step depends in addition to the parameters: `m.NAME`, `v.NAME`, `steps.NAME`,
    /// `master.NAME` (of parameters that are not float32), and `updates`, `skipped`.
    ///
    /// The tensors are views of the live state, which the next step changes.
    pub fn state(&self) -> BTreeMap<String, Tensor> {
        let mut state = BTreeMap::new();
        for slot in self.groups.iter().flat_map(|group| &group.slots) {
            state.insert(format!("m.{}", slot.name), slot.m.shallow_clone());
            state.insert(format!("v.{}", slot.name), slot.v.shallow_clone());
            state.insert(format!("steps.{}", slot.name), Tensor::from(slot.steps));
            if let Some(master) = &slot.master {
                state.insert(format!("master.{}", slot.name), master.shallow_clone());
            }
        }
        state.insert("updates".to_owned(), Tensor::from(self.updates));
        state.insert("skipped".to_owned(), Tensor::from(self.skipped));
        state
    }

    /// Restores a state that [`AdamW::state`] returned, bit for bit. The set of names, the types and the shapes must equal
    /// this optimizer's; a rejected state changes nothing. A parameter with a master is set to the rounded master.
    pub fn load_state(&mut self, saved: &BTreeMap<String, Tensor>) -> Result<()> {
        let own = self.state();
        for (name, tensor) in &own {
            let found = saved
                .get(name)
                .ok_or_else(|| OptimError::MissingState { name: name.clone() })?;
            if found.kind() != tensor.kind() || found.size() != tensor.size() {
                let describe = |tensor: &Tensor| format!("{:?} {:?}", tensor.kind(), tensor.size());
                let (expected, found) = (describe(tensor), describe(found));
                return Err(OptimError::StateShape {
                    name: name.clone(),
                    expected,
                    found,
                });
            }
        }
        if let Some(name) = saved.keys().find(|name| !own.contains_key(*name)) {
            return Err(OptimError::UnknownState { name: name.clone() });
        }
        let tensor = |name: String| {
            saved
                .get(&name)
                .map(Tensor::shallow_clone)
                .ok_or(OptimError::MissingState { name })
        };
        tch::no_grad(|| {
            for slot in self.groups.iter_mut().flat_map(|group| &mut group.slots) {
                slot.m.f_copy_(&tensor(format!("m.{}", slot.name))?)?;
                slot.v.f_copy_(&tensor(format!("v.{}", slot.name))?)?;
                slot.steps = tensor(format!("steps.{}", slot.name))?.f_int64_value(&[])?;
                if let Some(master) = &mut slot.master {
                    master.f_copy_(&tensor(format!("master.{}", slot.name))?)?;
                    slot.param.f_copy_(master)?;
                }
            }
            Ok::<_, OptimError>(())
        })?;
        self.updates = tensor("updates".to_owned())?.f_int64_value(&[])?;
        self.skipped = tensor("skipped".to_owned())?.f_int64_value(&[])?;
        Ok(())
    }
}

impl Slot {
    fn new(name: String, param: Tensor) -> Result<Self> {
        let value = param.detach();
        let master = if param.kind() == Kind::Float {
            None
        } else {
            Some(value.f_to_kind(Kind::Float)?)
        };
        let zeros = || Tensor::f_zeros(value.size(), (Kind::Float, value.device()));
        Ok(Self {
            m: zeros()?,
            v: zeros()?,
            name,
            param,
            master,
            steps: 0,
        })
    }

    fn grad(&self) -> Option<Tensor> {
        let grad = self.param.grad();
        grad.defined().then_some(grad)
    }

    /// Returns the gradient. If no backward pass has reached the parameter, creates a gradient of zeros by a backward pass:
    /// libtorch offers no other way.
    fn grad_or_zeros(&self) -> Result<Tensor, TchError> {
        if let Some(grad) = self.grad() {
            return Ok(grad);
        }
        self.param.f_mul_scalar(0.0)?.f_sum(self.param.kind())?.f_backward()?;
        Ok(self.param.grad())
    }

    /// Applies Loshchilov and Hutter 2019, algorithm 2, lines 5 to 12, with the bias corrections folded into the step size.
    fn step(&mut self, settings: &AdamWSettings, lr: f64, weight_decay: f64, scale: f64) -> Result<(), TchError> {
        let Some(grad) = self.grad() else { return Ok(()) };
        let mut grad = grad.f_to_kind(Kind::Float)?;
        if scale < 1.0 {
            grad = grad.f_mul_scalar(scale)?;
        }
        self.steps += 1;
        let power = self.steps as f64;
        let bias1 = 1.0 - settings.beta1.powf(power);
        let bias2 = 1.0 - settings.beta2.powf(power);
        // an in-place operation returns another handle of the same tensor
        let m = self.m.f_lerp_(&grad, 1.0 - settings.beta1)?;
        let squared = grad.f_square()?.f_mul_scalar_(1.0 - settings.beta2)?;
        let v = self.v.f_mul_scalar_(settings.beta2)?.f_add_(&squared)?;
        let denominator = v.f_sqrt()?.f_div_scalar_(bias2.sqrt())?.f_add_scalar_(settings.eps)?;
        let change = m.f_div(&denominator)?.f_mul_scalar_(-lr / bias1)?;
        let rounded = self.master.is_some();
        let master = self.master.as_mut().unwrap_or(&mut self.param);
        let updated = master.f_mul_scalar_(1.0 - lr * weight_decay)?.f_add_(&change)?;
        if rounded {
            self.param.f_copy_(&updated)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: AdamWSettings = AdamWSettings {
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        clip_norm: Some(1.0),
    };

    fn leaf(values: &[f32], kind: Kind) -> Tensor {
        Tensor::from_slice(values).to_kind(kind).set_requires_grad(true)
    }

    fn adamw(lr: f64, params: Vec<(&str, &Tensor)>) -> AdamW {
        let params = params
            .into_iter()
            .map(|(name, param)| (name.to_owned(), param.shallow_clone()))
            .collect();
        AdamW::new(
            SETTINGS,
            vec![ParamGroup {
                name: "actor".to_owned(),
                lr,
                weight_decay: 0.0,
                params,
            }],
        )
        .unwrap()
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        Vec::try_from(tensor.to_kind(Kind::Float)).unwrap()
    }

    #[test]
    fn steps_below_a_bfloat16_ulp_add_up_in_the_master() {
        // the ulp of bfloat16 at 1.0 is 2^-7; 100 steps of 1e-4 change the weight by 0.01, a single step is lost in rounding
        let weight = leaf(&[1.0], Kind::BFloat16);
        let mut optimizer = adamw(1e-4, vec![("w", &weight)]);
        for step in 1..=100 {
            optimizer.zero_grad();
            weight.sum(Kind::Float).backward();
            optimizer.step(1.0).unwrap();
            if step == 1 {
                assert_eq!(values(&weight), [1.0]);
            }
        }
        let master = optimizer.state()["master.w"].double_value(&[0]);
        assert!((master - 0.99).abs() < 1e-5, "{master}");
        assert!((values(&weight)[0] - 0.99).abs() < 4e-3);
    }

    #[test]
    fn a_gradient_that_is_not_finite_changes_nothing_and_is_counted() {
        let weight = leaf(&[1.0, 2.0], Kind::Float);
        let mut optimizer = adamw(0.1, vec![("w", &weight)]);
        (&weight * f64::INFINITY).sum(Kind::Float).backward();
        let report = optimizer.step(1.0).unwrap();
        assert!(report.skipped && !report.grad_norm.is_finite());
        let skipped = optimizer.state()["skipped"].int64_value(&[]);
        assert_eq!((optimizer.updates(), skipped), (0, 1));
        assert_eq!(values(&weight), [1.0, 2.0]);
        assert_eq!(values(&optimizer.state()["m.w"]), [0.0, 0.0]);
    }

    #[test]
    fn a_parameter_without_gradient_stays() {
        let (moved, frozen) = (leaf(&[1.0], Kind::Float), leaf(&[1.0], Kind::Float));
        let mut optimizer = adamw(0.1, vec![("moved", &moved), ("frozen", &frozen)]);
        moved.sum(Kind::Float).backward();
        optimizer.step(1.0).unwrap();
        assert!(values(&moved)[0] < 1.0);
        assert_eq!(values(&frozen), [1.0]);
    }

    #[test]
    fn a_restored_optimizer_takes_the_same_next_step_bit_for_bit() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let run = |steps: std::ops::Range<i32>, weight: &Tensor, optimizer: &mut AdamW| {
                for step in steps {
                    optimizer.zero_grad();
                    (weight.square() * f64::from(step + 1)).sum(Kind::Float).backward();
                    optimizer.step(0.5).unwrap();
                }
            };
            let weight = leaf(&[0.3, -1.7, 2.2], kind);
            let mut optimizer = adamw(0.01, vec![("w", &weight)]);
            run(0..3, &weight, &mut optimizer);
            let saved: BTreeMap<String, Tensor> = optimizer
                .state()
                .into_iter()
                .map(|(name, tensor)| (name, tensor.copy()))
                .collect();
            let again = weight.detach().copy().set_requires_grad(true);
            run(3..6, &weight, &mut optimizer);
            let mut restored = adamw(0.01, vec![("w", &again)]);
            restored.load_state(&saved).unwrap();
            assert_eq!(restored.updates(), 3);
            run(3..6, &again, &mut restored);
            assert_eq!(values(&weight), values(&again));
            assert_eq!(optimizer.state(), restored.state());
        }
    }

    #[test]
    fn a_state_of_other_parameters_is_refused_and_changes_nothing() {
        let weight = leaf(&[1.0, 2.0], Kind::Float);
        let mut optimizer = adamw(0.1, vec![("w", &weight)]);
        let refused = |optimizer: &mut AdamW, state: &BTreeMap<String, Tensor>| {
            optimizer.load_state(state).unwrap_err().to_string()
        };
        let mut state = optimizer.state();
        state.insert("m.w".to_owned(), Tensor::from_slice(&[1.0f32]));
        assert_eq!(
            refused(&mut optimizer, &state),
            "optimizer state `m.w` needs Float [2], found Float [1]"
        );
        state.remove("m.w");
        assert!(refused(&mut optimizer, &state).contains("no tensor `m.w`"));
        let mut state = optimizer.state();
        state.insert("m.other".to_owned(), Tensor::from(0.0f32));
        assert!(refused(&mut optimizer, &state).contains("unknown tensor `m.other`"));
        assert_eq!(values(&optimizer.state()["m.w"]), [0.0, 0.0]);
    }

    #[test]
    fn names_are_unique_and_settings_in_range() {
        let weight = leaf(&[1.0], Kind::Float);
        let params = || {
            vec![
                ("w".to_owned(), weight.shallow_clone()),
                ("w".to_owned(), weight.shallow_clone()),
            ]
        };
        let group = |lr, params| {
            vec![ParamGroup {
                name: "actor".to_owned(),
                lr,
                weight_decay: 0.0,
                params,
            }]
        };
        assert!(matches!(
            AdamW::new(SETTINGS, group(0.1, params())),
            Err(OptimError::Duplicate { .. })
        ));
        assert!(matches!(
            AdamW::new(SETTINGS, group(-0.1, vec![])),
            Err(OptimError::Setting { name: "lr", .. })
        ));
        let wrong = AdamWSettings { beta2: 1.0, ..SETTINGS };
        assert!(matches!(
            AdamW::new(wrong, vec![]),
            Err(OptimError::Setting { name: "beta2", .. })
        ));
    }
}
