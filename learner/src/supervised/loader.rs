//! Minibatches of a data set in model units. The next minibatch is read during the training step on the current one.

use std::{sync::mpsc::sync_channel, thread};

use policy::{
    dims::PolicyDims,
    plan::RunPlan,
    transform::{ModelInput, Remark, Transform},
};
use tch::Tensor;

use super::source::DemoSource;
use crate::{
    batch::observation::ObservationBatch,
    error::{DatasetError, LearnerError, Result},
};

/// Kind of a data set's targets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Targets {
    /// Action chunk that follows the observation.
    Actions,
    /// Key points in the images, with their number over all cameras.
    KeyPoints(usize),
}

impl Targets {
    /// Returns the name of the target tensor in a data set.
    pub fn name(self) -> &'static str {
        match self {
            Self::Actions => "actions",
            Self::KeyPoints(_) => "keypoints",
        }
    }
}

/// Rows of a data set, in main memory.
#[derive(Debug)]
pub struct Minibatch {
    /// Row numbers in the data set.
    pub rows: Vec<usize>,
    /// Observations in model units.
    pub observations: ObservationBatch,
    /// Actions in model units, padded, f32 `[n, action_horizon, action_dim]`, or key points `[n, P, 2]` in `[0, 1]`.
    pub targets: Tensor,
}

/// Reader of minibatches of a data set for a policy.
pub struct Loader<'a> {
    source: &'a dyn DemoSource,
    transform: &'a Transform,
    dims: &'a PolicyDims,
    targets: Targets,
}

impl<'a> Loader<'a> {
    /// Creates a loader after a check that the data set fits the policy of a plan: rows, prompts and shape of the targets.
    ///
    /// # Errors
    /// The data set is empty, or a prompt or the shape of the targets does not fit.
    pub fn new(
        plan: &'a RunPlan,
        transform: &'a Transform,
        source: &'a dyn DemoSource,
        targets: Targets,
    ) -> Result<Self> {
        let loader = Self {
            source,
            transform,
            dims: &plan.dims,
            targets,
        };
        loader.check().map_err(|e| loader.error(e))?;
        Ok(loader)
    }

    fn check(&self) -> Result<(), DatasetError> {
        if self.source.is_empty() {
            return Err(DatasetError::Empty);
        }
        for prompt in self.source.prompts() {
            let cut = self.transform.check_prompt(prompt).map_err(DatasetError::Prompt)?;
            self.report(cut.as_slice(), prompt);
        }
        let [length, width] = self.source.target_shape();
        let (fits, expected) = match self.targets {
            Targets::Actions => {
                let expected = [self.dims.action_horizon, self.transform.contract().env_action_dim];
                ([length, width] == expected, format!("{expected:?} of each row"))
            }
            Targets::KeyPoints(points) => {
                let expected = format!("[{points}, 2] of each row, by `pretrain.keypoints` and the cameras");
                ([length, width] == [points, 2], expected)
            }
        };
        if !fits {
            return Err(DatasetError::Shape {
                field: self.targets.name(),
                expected,
                found: vec![length, width],
            });
        }
        // a state of another width is found before the first step
        self.read(&[0]).map(drop)
    }

    /// Logs remarks that were not logged before.
    fn report(&self, remarks: &[Remark], prompt: &str) {
        for line in remarks
            .iter()
            .filter_map(|remark| self.transform.report(remark, prompt))
        {
            tracing::warn!("data set `{}`: {line}", self.source.path().display());
        }
    }

    fn error(&self, source: DatasetError) -> LearnerError {
        LearnerError::Dataset {
            path: self.source.path().to_owned(),
            source,
        }
    }

    /// Returns the number of rows of the data set, at least 1.
    pub fn rows(&self) -> usize {
        self.source.len()
    }

    /// Reads rows of the data set, in the given order.
    ///
    /// # Errors
    /// A row cannot be read or does not fit the policy.
    pub fn load(&self, rows: Vec<usize>) -> Result<Minibatch> {
        let (inputs, targets) = self.read(&rows).map_err(|e| self.error(e))?;
        let n = rows.len() as i64;
        let [length, width] = self.source.target_shape().map(|n| n as i64);
        let width = match self.targets {
            Targets::Actions => self.dims.action_dim as i64,
            Targets::KeyPoints(_) => width,
        };
        Ok(Minibatch {
            observations: ObservationBatch::of(&inputs, self.dims),
            targets: Tensor::from_slice(&targets).view([n, length, width]),
            rows,
        })
    }

    /// Reads observations and targets in model units; the targets are concatenated.
    fn read(&self, rows: &[usize]) -> Result<(Vec<ModelInput>, Vec<f32>), DatasetError> {
        let [length, width] = self.source.target_shape();
        let (mut inputs, mut targets) = (Vec::with_capacity(rows.len()), Vec::new());
        for (row, demo) in rows.iter().copied().zip(self.source.read(rows)?) {
            if demo.target.len() != length * width {
                return Err(DatasetError::Shape {
                    field: self.targets.name(),
                    expected: format!("{length} * {width} numbers of row {row}"),
                    found: vec![demo.target.len()],
                });
            }
            if let Some((column, value)) = demo.target.iter().enumerate().find(|(_, v)| !v.is_finite()) {
                return Err(DatasetError::NotFinite {
                    field: self.targets.name(),
                    row,
                    column,
                    value: *value,
                });
            }
            let observation = |source| DatasetError::Observation { row, source };
            let (input, remarks) = self
                .transform
                .input_with_remarks(&demo.observation)
                .map_err(observation)?;
            self.report(&remarks, &demo.observation.prompt);
            inputs.push(input);
            match self.targets {
                Targets::KeyPoints(_) => targets.extend(demo.target),
                Targets::Actions => {
                    let actions = self
                        .transform
                        .model_actions(&demo.target, width, &demo.observation.state);
                    for action in actions
                        .map_err(|source| DatasetError::Actions { row, source })?
                        .chunks_exact(width)
                    {
                        targets.extend(action);
                        targets.resize(targets.len() + self.dims.action_dim - width, 0.0);
                    }
                }
            }
        }
        Ok((inputs, targets))
    }

    /// Calls `step` with the minibatch of each draw. A draw consists of rows and a value for `step`. Another thread loads the
    /// next minibatch at the same time: at most two minibatches are in memory, whatever the size of the data set.
    ///
    /// # Errors
    /// A minibatch cannot be loaded, or `step` fails; the first error is returned.
    pub fn for_each<D: Send>(
        &self,
        draws: impl Iterator<Item = (Vec<usize>, D)> + Send,
        mut step: impl FnMut(Minibatch, D) -> Result<()>,
    ) -> Result<()> {
        thread::scope(|scope| {
            // the channel has no buffer: the thread holds one minibatch until it is received
            let (sender, minibatches) = sync_channel(0);
            scope.spawn(move || {
                for (rows, drawn) in draws {
                    let loaded = self.load(rows).map(|minibatch| (minibatch, drawn));
                    let failed = loaded.is_err();
                    if sender.send(loaded).is_err() || failed {
                        return;
                    }
                }
            });
            for loaded in minibatches {
                let (minibatch, drawn) = loaded?;
                step(minibatch, drawn)?;
            }
            Ok(())
        })
    }
}
