//! Reading and checking `algorithm.velocity.params`.

use serde::de::DeserializeOwned;

/// What is wrong with the parameters of a method.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ParamsError {
    /// A parameter that is missing, unknown or of another type. The text is the inner error's own without its line break.
    #[error("{}", .0.message())]
    Read(toml::de::Error),
    /// A range of flow times that is empty or not inside 0 to 1.
    #[error("`t_min` = {min}, `t_max` = {max}, expected 0 < t_min < t_max < 1")]
    Times {
        /// Start given.
        min: f64,
        /// End given.
        max: f64,
    },
    /// A number that must be above 0.
    #[error("`{name}` = {value}, expected a number above 0")]
    NotPositive {
        /// Which parameter.
        name: &'static str,
        /// Number given.
        value: f64,
    },
}

/// The parameters of a method; an unknown one is refused.
pub(super) fn parameters<T: DeserializeOwned>(params: &toml::Table) -> Result<T, ParamsError> {
    T::deserialize(params.clone()).map_err(ParamsError::Read)
}

/// Checks a range of flow times.
pub(super) fn check_times(min: f64, max: f64) -> Result<(), ParamsError> {
    if 0.0 < min && min < max && max < 1.0 {
        Ok(())
    } else {
        Err(ParamsError::Times { min, max })
    }
}

/// Checks a number that must be above 0.
pub(super) fn check_positive(name: &'static str, value: f64) -> Result<(), ParamsError> {
    if value.is_finite() && value > 0.0 {
        Ok(())
    } else {
        Err(ParamsError::NotPositive { name, value })
    }
}
