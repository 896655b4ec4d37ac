//! Rows to train on, read when a minibatch needs them.

use std::path::Path;

use policy::transform::RawObservation;

use crate::error::DatasetError;

/// One row of a data set, in the environment's units.
#[derive(Debug, Clone, PartialEq)]
pub struct Demo {
    /// What was seen.
    pub observation: RawObservation,
    /// What the policy learns of it, row-major: the next actions `[action_horizon, width]`, or key points `[points, 2]`.
    pub target: Vec<f32>,
}

/// A data set of demonstrations or scenes. [`DemoSource::read`] is called from another thread than the rest.
pub trait DemoSource: Sync {
    /// Returns the file or folder, for messages.
    fn path(&self) -> &Path;

    /// Returns the number of rows.
    fn len(&self) -> usize;

    /// Returns whether there are no rows.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the prompts of all rows, each once.
    fn prompts(&self) -> &[String];

    /// Returns the shape of every row's target.
    fn target_shape(&self) -> [usize; 2];

    /// Reads these rows: one [`Demo`] for each, in this order.
    ///
    /// # Errors
    /// A row that is not there or cannot be read.
    fn read(&self, rows: &[usize]) -> Result<Vec<Demo>, DatasetError>;
}
