//! Exit-code classes of the errors that end the program `learner`.

use std::error::Error;

use process::exit::Class;

use crate::error::LearnerError;

/// Returns the class of an error, or `None` where the error's type determines no class.
pub fn class(error: &(dyn Error + 'static)) -> Option<Class> {
    match error.downcast_ref()? {
        LearnerError::Config(_) | LearnerError::Zero { .. } | LearnerError::Params(_) => Some(Class::Usage),
        LearnerError::Bundle(_)
        | LearnerError::Weights { .. }
        | LearnerError::Contract(_)
        | LearnerError::Reference(_)
        | LearnerError::Dataset { .. }
        | LearnerError::Checkpoint { .. }
        | LearnerError::NoFile { .. }
        | LearnerError::Run { .. } => Some(Class::Data),
        LearnerError::Socket(error) if error.is_wrong_endpoint() => Some(Class::Usage),
        LearnerError::Socket(_)
        | LearnerError::Trajectory { .. }
        | LearnerError::Child { .. }
        | LearnerError::Silence { .. }
        | LearnerError::Refused { .. }
        | LearnerError::Endpoints(_)
        | LearnerError::NetworkEnded => Some(Class::Ring),
        LearnerError::Export(_)
        | LearnerError::Model(_)
        | LearnerError::Advantage(_)
        | LearnerError::Loss(_)
        | LearnerError::Optim(_)
        | LearnerError::Ranks(_)
        | LearnerError::FromDevice { .. }
        | LearnerError::NotOrdered { .. }
        | LearnerError::Io { .. }
        | LearnerError::NoProgram { .. }
        | LearnerError::NoPython
        | LearnerError::NothingMeasured { .. }
        | LearnerError::State(_)
        | LearnerError::Picture { .. } => None,
    }
}

/// Returns the last lines of the log of a child process that ended.
pub fn log_tail<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a str> {
    match error.downcast_ref()? {
        LearnerError::Child { tail, .. } => Some(tail),
        _ => None,
    }
}
