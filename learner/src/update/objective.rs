//! Loss that an update minimizes, on probability ratios or on the velocity.

use policy::plan::RunPlan;

use super::{
    likelihood::{LikelihoodObjective, LikelihoodPasses},
    logprob::StepTable,
    reference::Reference,
    report::CreditReport,
    tally::Pass,
    velocity::{VelocityObjective, VelocityPasses},
};
use crate::{
    batch::{RolloutBatch, minibatch::MicroBatch, prefix_store::PrefixStore},
    error::Result,
    method::{Method, method},
    model::Pi0,
    ranks::Ranks,
};

/// Loss of a run, with its reference policy.
#[derive(Debug)]
pub(super) enum Objective {
    Likelihood(Box<LikelihoodObjective>),
    Velocity(Box<VelocityObjective>),
}

impl Objective {
    /// Builds the loss that the plan names.
    ///
    /// # Errors
    /// The name or a parameter is unknown.
    pub(super) fn new(plan: &RunPlan, policy: &Pi0) -> Result<Self> {
        Ok(match method(plan)? {
            Method::Likelihood(loss) => Self::Likelihood(Box::new(LikelihoodObjective::new(plan, loss, policy)?)),
            Method::Velocity(loss, reference) => {
                Self::Velocity(Box::new(VelocityObjective::new(plan, loss, reference, policy)?))
            }
        })
    }

    /// Returns the reference policy; `None` for a loss without reference.
    pub(super) fn reference(&mut self) -> Option<&mut Reference> {
        match self {
            Self::Velocity(velocity) => Some(&mut velocity.reference),
            Self::Likelihood(likelihood) => likelihood.reference.as_mut(),
        }
    }

    /// Returns whether the records can change the policy; a critic trains on all records.
    pub(super) fn teaches(&self, batch: &RolloutBatch) -> bool {
        match self {
            Self::Velocity(velocity) => velocity.teaches(batch),
            Self::Likelihood(_) => batch.whole.informative,
        }
    }

    /// Prepares the passes of an iteration.
    ///
    /// # Errors
    /// A shape does not fit the policy.
    pub(super) fn passes<'a>(
        &'a self,
        plan: &RunPlan,
        policy: &'a Pi0,
        batch: &'a RolloutBatch,
        prefixes: &'a PrefixStore<'a>,
        iteration: u32,
        ranks: &dyn Ranks,
    ) -> Result<Passes<'a>> {
        Ok(match self {
            Self::Likelihood(likelihood) => {
                let sampling = plan.sampling(u64::from(iteration));
                let table = StepTable::of(&sampling, plan.dims.expert.width, policy.device());
                Passes::Likelihood(likelihood.passes(policy, batch, prefixes, table, iteration))
            }
            Self::Velocity(velocity) => {
                Passes::Velocity(velocity.passes(plan, policy, batch, prefixes, iteration, ranks)?)
            }
        })
    }
}

/// Passes of one iteration.
pub(super) enum Passes<'a> {
    Likelihood(LikelihoodPasses<'a>),
    Velocity(VelocityPasses<'a>),
}

impl Passes<'_> {
    /// Computes the loss of a part of a minibatch. With `compare`, a loss on probability ratios also compares recomputed numbers with
    /// recorded numbers.
    ///
    /// # Errors
    /// A shape does not fit the policy.
    pub(super) fn pass(&self, part: MicroBatch<'_>, epoch: u32, compare: bool) -> Result<Pass> {
        match self {
            Self::Likelihood(likelihood) => likelihood.pass(part, compare),
            Self::Velocity(velocity) => velocity.pass(part, epoch),
        }
    }

    /// Returns whether only the critic trains.
    pub(super) fn critic_warmup(&self) -> bool {
        match self {
            Self::Likelihood(likelihood) => likelihood.critic_warmup,
            Self::Velocity(_) => false,
        }
    }

    /// Returns the credit of the chunks; `None` for a loss on probability ratios.
    pub(super) fn credit(&self) -> Option<CreditReport> {
        match self {
            Self::Likelihood(_) => None,
            Self::Velocity(velocity) => Some(velocity.credit()),
        }
    }
}
