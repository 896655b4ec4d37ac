//! Reading and checking `algorithm.velocity.params`.

use serde::de::DeserializeOwned;

/// The parameters of a method; an unknown one is refused.
pub(super) fn parameters<T: DeserializeOwned>(params: &toml::Table) -> Result<T, String> {
    T::deserialize(params.clone()).map_err(|e| e.message().to_owned())
}

/// Checks a range of flow times.
pub(super) fn check_times(min: f64, max: f64) -> Result<(), String> {
    if 0.0 < min && min < max && max < 1.0 {
        Ok(())
    } else {
        Err(format!(
            "`t_min` = {min}, `t_max` = {max}, expected 0 < t_min < t_max < 1"
        ))
    }
}

/// Checks a number that must be above 0.
pub(super) fn check_positive(name: &str, value: f64) -> Result<(), String> {
    if value.is_finite() && value > 0.0 {
        Ok(())
    } else {
        Err(format!("`{name}` = {value}, expected a number above 0"))
    }
}
