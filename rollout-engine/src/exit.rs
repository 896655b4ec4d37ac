//! Exit-code classes of the errors of the program `rollout-engine`.

use std::error::Error;

use process::exit::Class;
use wire::socket::SocketError;

use crate::{
    device::{DeviceError, sampler::SampleError, versions::PolicyError},
    front::{http::HttpError, websocket::WebsocketError},
    rehearse::RehearseError,
    serve::ServeError,
};

/// A command line that cannot be executed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UsageError {
    /// The learner's endpoint has port 0.
    #[error(
        "`learner.listen = \"{0}\"` names no port to connect to: pass --learner with the learner's endpoint, or --standalone"
    )]
    NoPort(String),
    /// A batch size or a number of batches is 0.
    #[error("`--batch` and `--batches` must be at least 1")]
    NoBatch,
    /// An option of another provider.
    #[error("`--without-cuda-graphs` is for `--provider cuda`")]
    NoCuda,
    /// A number of cameras that the policy does not have.
    #[error("`--cameras` has {found}, expected 1 to {all}")]
    Cameras {
        /// Number on the command line.
        found: usize,
        /// Cameras of the policy.
        all: usize,
    },
}

/// Returns the class of one error; `None` where the type of the error determines no class.
pub fn class(error: &(dyn Error + 'static)) -> Option<Class> {
    if error.is::<UsageError>() {
        return Some(Class::Usage);
    }
    let serve = error.downcast_ref().map(of_serve);
    let load = || {
        error
            .downcast_ref()
            .map(of_policy)
            .or_else(|| error.downcast_ref().map(of_device))
    };
    let rehearse = || error.downcast_ref().map(of_rehearse);
    let endpoint = || error.downcast_ref().map(of_socket);
    serve.or_else(load).or_else(rehearse).or_else(endpoint)
}

fn of_rehearse(error: &RehearseError) -> Class {
    match error {
        RehearseError::Sample(SampleError::Device(error)) => of_device(error),
        RehearseError::Sample(_) | RehearseError::Image(_) => Class::Other,
        RehearseError::Observation(_) | RehearseError::Norm(_) | RehearseError::NotFinite { .. } => Class::Data,
    }
}

fn of_serve(error: &ServeError) -> Class {
    match error {
        ServeError::Device(error) => of_device(error),
        ServeError::Policy { source, .. } => of_policy(source),
        ServeError::Socket(error) => of_socket(error),
        ServeError::Http(HttpError::Address(_))
        | ServeError::Websocket(WebsocketError::Address(_) | WebsocketError::Key(_)) => Class::Usage,
        ServeError::Http(HttpError::Bind { .. }) | ServeError::Websocket(WebsocketError::Bind { .. }) => Class::Ring,
        ServeError::State { .. }
        | ServeError::Endpoints(_)
        | ServeError::Metrics(_)
        | ServeError::Thread(_)
        | ServeError::Inference => Class::Other,
    }
}

fn of_policy(error: &PolicyError) -> Class {
    match error {
        PolicyError::Device(error) => of_device(error),
        PolicyError::Sample(_) => Class::Other,
        PolicyError::Bundle(_)
        | PolicyError::Prompt(_)
        | PolicyError::SelfTest { .. }
        | PolicyError::NotFinite { .. }
        | PolicyError::Reference { .. }
        | PolicyError::Other { .. } => Class::Data,
    }
}

fn of_device(error: &DeviceError) -> Class {
    match error {
        DeviceError::Provider { .. } => Class::Usage,
        DeviceError::Flavour { .. }
        | DeviceError::Load { .. }
        | DeviceError::Graph { .. }
        | DeviceError::GraphType { .. }
        | DeviceError::Weights { .. }
        | DeviceError::Output { .. } => Class::Data,
        DeviceError::NoLibrary
        | DeviceError::Library { .. }
        | DeviceError::Run { .. }
        | DeviceError::Contract { .. }
        | DeviceError::Cuda { .. }
        | DeviceError::Memory { .. }
        | DeviceError::Busy
        | DeviceError::Rows { .. }
        | DeviceError::Path { .. }
        | DeviceError::NoImage { .. }
        | DeviceError::NotFinite { .. }
        | DeviceError::Lost { .. }
        | DeviceError::Prompt { .. }
        | DeviceError::Prefix
        | DeviceError::Slot(_)
        | DeviceError::Closed => Class::Other,
    }
}

fn of_socket(error: &SocketError) -> Class {
    if error.is_wrong_endpoint() {
        Class::Usage
    } else {
        Class::Ring
    }
}
