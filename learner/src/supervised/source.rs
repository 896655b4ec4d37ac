//! Rows of a data set, read on demand for a minibatch.

use std::path::Path;

use policy::transform::RawObservation;

use crate::error::DatasetError;

/// One row of a data set, in the environment's units.
#[derive(Debug, Clone, PartialEq)]
pub struct Demo {
    /// Observation of the row.
    pub observation: RawObservation,
    /// Training target, row-major: the next actions `[action_horizon, width]`, or key points `[points, 2]`.
    pub target: Vec<f32>,
}

/// Data set of demonstrations or scenes. [`DemoSource::read`] is called from another thread than the other methods,
/// after a first call for the check of the data set.
pub trait DemoSource: Sync {
    /// Returns the file or folder, for error messages.
    fn path(&self) -> &Path;

    /// Returns the number of rows.
    fn len(&self) -> usize;

    /// Returns whether the data set has no rows.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the distinct prompts of all rows.
    fn prompts(&self) -> &[String];

    /// Returns the shape of every row's target.
    fn target_shape(&self) -> [usize; 2];

    /// Reads one [`Demo`] per row, in the given order.
    ///
    /// # Errors
    /// A row does not exist or cannot be read.
    fn read(&self, rows: &[usize]) -> Result<Vec<Demo>, DatasetError>;
}
