//! Losses on the velocity itself, without any likelihood, one file per method: a noisy action on the straight path of a recorded
//! chunk, the velocity there of the trained and of a reference policy, and a credit that says how good the chunk was.
//!
//! `x_t = (1 - t) a + t eps` with the recorded action `a` and fresh noise `eps`; its flow-matching target is `u = eps - a` (Lipman et
//! al. 2023, with openpi's direction of time).

mod method;
mod params;
mod flow_ipo;
mod nft;

pub use self::{
    method::{Episodes, Velocities, VelocityLoss},
    params::ParamsError,
};

/// Makes a method from `algorithm.velocity.params`, or says what is wrong with them.
pub type Build = fn(&toml::Table) -> Result<Box<dyn VelocityLoss>, ParamsError>;

/// The one table of methods without likelihood.
pub const VELOCITY_LOSSES: &[(&str, Build)] = &[("flow_ipo", flow_ipo::build), ("nft", nft::build)];

/// The method of this name (`algorithm.loss_type` of the configuration); see [`VELOCITY_LOSSES`].
pub fn velocity_loss(name: &str) -> Option<Build> {
    VELOCITY_LOSSES
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, build)| *build)
}

#[cfg(test)]
mod tests;
