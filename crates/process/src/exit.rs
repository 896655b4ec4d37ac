//! End of a program after a failure: one line on standard error, and an exit code by the class of the failure.

use std::{error::Error, io::Write, iter, process::ExitCode};

use policy::{
    bundle::BundleError, config::ConfigError, message::told, norm::NormError, prompt::PromptError,
    weights::WeightsError,
};

/// List of exit codes at the end of a program's `--help`.
pub const CODES: &str = "Exit codes: 0 success, 2 usage or configuration, 3 data or checkpoint, 4 the ring (a connection, or an engine or \
                         learner that rejects or does not answer), 1 anything else";

/// Class of a failure; the discriminant is the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Anything else.
    Other = 1,
    /// Usage or configuration.
    Usage = 2,
    /// Data or checkpoint.
    Data = 3,
    /// The ring: a connection, or a process on its other side.
    Ring = 4,
}

impl Class {
    /// Returns the class of another pirl program's exit code.
    pub fn of_code(code: Option<i32>) -> Self {
        [Self::Usage, Self::Data, Self::Ring]
            .into_iter()
            .find(|class| code == Some(*class as i32))
            .unwrap_or(Self::Other)
    }
}

/// Function that returns the class of one error without looking at its causes; `None` for a type without a class.
pub type Classify = fn(&(dyn Error + 'static)) -> Option<Class>;

/// Returns the class of the outermost error of a chain that has one. `classify` knows the error types of the program.
pub fn class(error: &(dyn Error + 'static), classify: Classify) -> Class {
    iter::successors(Some(error), |error: &&(dyn Error + 'static)| (*error).source())
        .find_map(|error| classify(error).or_else(|| of_policy(error)))
        .unwrap_or(Class::Other)
}

fn of_policy(error: &(dyn Error + 'static)) -> Option<Class> {
    if error.is::<ConfigError>() || matches!(error.downcast_ref(), Some(BundleError::Exists(_))) {
        return Some(Class::Usage);
    }
    let data =
        error.is::<BundleError>() || error.is::<WeightsError>() || error.is::<NormError>() || error.is::<PromptError>();
    data.then_some(Class::Data)
}

/// Ends a program that failed: writes one line `PROGRAM: message` to standard error and returns the exit code.
pub fn failed(program: &str, error: &(dyn Error + 'static), classify: Classify) -> ExitCode {
    // if standard error is closed too, only the exit code reports the failure
    drop(writeln!(std::io::stderr(), "{program}: {}", told(error)));
    ExitCode::from(class(error, classify) as u8)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("a layer")]
    struct Layer(#[source] Box<dyn Error + 'static>);

    #[test]
    fn the_outermost_error_with_a_class_decides() {
        let none: Classify = |_| None;
        let ring: Classify = |error| error.is::<Layer>().then_some(Class::Ring);
        let exists = || BundleError::Exists(PathBuf::new());
        let broken = || BundleError::Io {
            action: "reading",
            path: PathBuf::new(),
            source: std::io::Error::other("a disk"),
        };
        assert_eq!(class(&exists(), none), Class::Usage);
        assert_eq!(class(&Layer(Box::new(broken())), none), Class::Data);
        assert_eq!(class(&Layer(Box::new(Layer(Box::new(broken())))), ring), Class::Ring);
        assert_eq!(
            class(&Layer(Box::new(std::io::Error::other("a disk"))), none),
            Class::Other
        );
    }

    #[test]
    fn a_code_says_its_class() {
        for class in [Class::Other, Class::Usage, Class::Data, Class::Ring] {
            assert_eq!(Class::of_code(Some(class as i32)), class);
        }
        assert_eq!(Class::of_code(None), Class::Other, "ended by a signal");
        assert_eq!(Class::of_code(Some(101)), Class::Other, "a panic");
    }
}
