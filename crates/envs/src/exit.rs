//! Error classes of the program `env-worker`, for its exit code.

use std::error::Error;

use process::exit::Class;

use crate::{dataset::DatasetError, env::EnvError, worker::WorkerError};

/// Returns the class of one error; `None` for a type without a class.
pub fn class(error: &(dyn Error + 'static)) -> Option<Class> {
    if error.is::<EnvError>() || error.is::<toml::de::Error>() {
        return Some(Class::Usage);
    }
    if error.is::<DatasetError>() {
        return Some(Class::Data);
    }
    error.downcast_ref().map(|error| match error {
        WorkerError::Socket(error) if error.is_wrong_endpoint() => Class::Usage,
        WorkerError::Socket(_) | WorkerError::Refused(_) | WorkerError::Actions { .. } | WorkerError::Slot { .. } => {
            Class::Ring
        }
    })
}
