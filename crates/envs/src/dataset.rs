//! Data sets of the tabletop: demonstrations for SFT and random scenes for vision-language pre-training, as safetensors.
//!
//! Tensors: `images` u8 `[N, cameras, h, w, 3]`, `state` f32 `[N, D]`, `prompt_id` i64 `[N]`; demonstrations have `actions` f32
//! `[N, horizon, A]`, scenes `keypoints` f32 `[N, P, 2]` (x right, y down, in `[0, 1]`). The metadata key `meta` is JSON with `env`
//! and `prompts`.

use std::{collections::HashMap, path::Path};

use policy::{
    bundle::{BundleError, write_atomic},
    noise::{Purpose, fill_normal, stream, uniform},
};
use safetensors::{Dtype, tensor::TensorView};

use crate::{
    env::ResetKey,
    expert,
    tabletop::{ACTION_DIM, COLOURS, Table, TabletopParams},
};

/// Failure to make or write a data set.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DatasetError {
    /// The demonstrator does not succeed often enough.
    #[error("collecting {wanted} demonstrations: only {found} of {tried} episodes succeeded, check `env.demo_params`")]
    TooFew {
        /// Number of requested successful episodes.
        wanted: usize,
        /// Number of successful episodes.
        found: usize,
        /// Number of attempted episodes.
        tried: usize,
    },
    /// The file cannot be written.
    #[error("writing the data set: {0}")]
    Write(#[from] BundleError),
    /// The tensors cannot be laid out.
    #[error("laying out the data set: {0}")]
    Layout(String),
}

#[derive(Default)]
struct Columns {
    rows: usize,
    images: Vec<u8>,
    state: Vec<f32>,
    prompt_id: Vec<i64>,
    /// Actions or key points.
    targets: Vec<f32>,
}

impl Columns {
    fn push(&mut self, table: &Table, params: &TabletopParams) {
        self.rows += 1;
        self.images.extend(table.image(params.image_size).data);
        self.state.extend(table.state());
        self.prompt_id.push(table.colours[0] as i64);
    }

    fn write(self, path: &Path, size: usize, targets: (&str, Vec<usize>)) -> Result<(), DatasetError> {
        let layout = |e: safetensors::SafeTensorError| DatasetError::Layout(e.to_string());
        let n = self.rows;
        let floats = |v: &[f32]| v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let (state, target) = (floats(&self.state), floats(&self.targets));
        let prompt: Vec<u8> = self.prompt_id.iter().flat_map(|x| x.to_le_bytes()).collect();
        let mut target_shape = vec![n];
        target_shape.extend(targets.1);
        let views = [
            (
                "images",
                TensorView::new(Dtype::U8, vec![n, 1, size, size, 3], &self.images).map_err(layout)?,
            ),
            (
                "state",
                TensorView::new(Dtype::F32, vec![n, 4], &state).map_err(layout)?,
            ),
            (
                "prompt_id",
                TensorView::new(Dtype::I64, vec![n], &prompt).map_err(layout)?,
            ),
            (
                targets.0,
                TensorView::new(Dtype::F32, target_shape, &target).map_err(layout)?,
            ),
        ];
        let prompts: Vec<String> = COLOURS.iter().map(|c| format!("pick {c}")).collect();
        let meta = serde_json::json!({ "env": "tabletop", "prompts": prompts }).to_string();
        let metadata = HashMap::from([("meta".to_owned(), meta)]);
        let bytes = safetensors::serialize(views, Some(metadata)).map_err(layout)?;
        Ok(write_atomic(path, &bytes)?)
    }
}

fn key(seed: u64, number: usize) -> ResetKey {
    // demonstrations and scenes use an environment number of their own, which no rollout uses
    ResetKey {
        seed,
        env: u32::MAX,
        episode: number as u64,
        reset_state: None,
        task: None,
    }
}

/// Writes `demos` successful episodes of the demonstrator; one row per env step with the next `horizon` actions (past the end:
/// zero motion, last gripper command). Returns the number of rows.
///
/// # Errors
/// Fewer than about half of the episodes succeed, or the file cannot be written.
pub fn write_demos(
    path: &Path,
    params: &TabletopParams,
    demos: usize,
    horizon: usize,
    seed: u64,
) -> Result<usize, DatasetError> {
    let mut columns = Columns::default();
    let mut found = 0;
    let mut tried = 0;
    while found < demos {
        if tried >= 2 * demos + 16 {
            return Err(DatasetError::TooFew {
                wanted: demos,
                found,
                tried,
            });
        }
        let mut table = Table::draw(&mut key(seed, tried).rng());
        let mut rng = stream(Purpose::Sampling, seed, u64::MAX, tried as u64, 0);
        tried += 1;
        let mut frames: Vec<(Table, [f32; ACTION_DIM])> = Vec::new();
        let success = (0..params.max_episode_steps).any(|_| {
            let before = table;
            let action = expert::act(&before, params, &mut rng);
            frames.push((before, action));
            table.step(action, params)
        });
        if !success {
            continue;
        }
        found += 1;
        let last_grip = frames.last().map_or(-1.0, |(_, a)| a[2]);
        for (t, (frame, _)) in frames.iter().enumerate() {
            columns.push(frame, params);
            for h in 0..horizon {
                columns
                    .targets
                    .extend(frames.get(t + h).map_or([0.0, 0.0, last_grip], |(_, a)| *a));
            }
        }
    }
    let rows = columns.rows;
    columns.write(path, params.image_size, ("actions", vec![horizon, ACTION_DIM]))?;
    Ok(rows)
}

/// Writes random scenes with the positions of named block, zone and gripper. The gripper is open or closed with equal
/// probability. In 35 % of scenes the gripper is near the named block, in 15 % the named block is near the zone.
///
/// # Errors
/// The file cannot be written.
pub fn write_scenes(path: &Path, params: &TabletopParams, scenes: usize, seed: u64) -> Result<(), DatasetError> {
    let mut columns = Columns::default();
    for number in 0..scenes {
        let mut rng = key(seed, number).rng();
        let mut table = Table::draw(&mut rng);
        table.closed = uniform(&mut rng) < 0.5;
        let place = uniform(&mut rng);
        let mut jitter = [0.0; 2];
        fill_normal(&mut rng, &mut jitter);
        let near = |p: [f32; 2]| {
            [
                (p[0] + 0.03 * jitter[0]).clamp(0.02, 0.98),
                (p[1] + 0.03 * jitter[1]).clamp(0.02, 0.98),
            ]
        };
        if place < 0.35 {
            table.gripper = near(table.blocks[0]);
        } else if place < 0.5 {
            table.blocks[0] = near(table.zone);
        }
        columns.push(&table, params);
        columns.targets.extend(table.keypoints().as_flattened());
    }
    columns.write(path, params.image_size, ("keypoints", vec![3, 2]))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use safetensors::SafeTensors;

    use super::*;

    /// Returns a tensor of the file as (shape, values).
    fn floats(file: &[u8], name: &str) -> (Vec<usize>, Vec<f32>) {
        let tensors = SafeTensors::deserialize(file).expect("safetensors");
        let tensor = tensors.tensor(name).expect("tensor");
        assert_eq!(tensor.dtype(), Dtype::F32);
        let values = tensor
            .data()
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect();
        (tensor.shape().to_vec(), values)
    }

    #[test]
    #[expect(clippy::float_cmp, reason = "the file holds the very bits that were computed")]
    fn demonstrations_replay_to_success_and_stand_still_after_it() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("demos.safetensors");
        let params = TabletopParams {
            demo_bias: 0.032,
            demo_noise: 0.1,
            ..TabletopParams::default()
        };
        let horizon = 6;
        let rows = write_demos(&path, &params, 20, horizon, 3).expect("demos");
        assert_eq!(
            fs::read_dir(folder.path()).expect("folder").count(),
            1,
            "no other file is left"
        );
        let file = fs::read(&path).expect("file");
        let (shape, actions) = floats(&file, "actions");
        assert_eq!(shape, [rows, horizon, ACTION_DIM]);
        let (_, states) = floats(&file, "state");
        let step = horizon * ACTION_DIM;
        let mut row = 0;
        for episode in 0..20 {
            // the demonstrator succeeds in each of these episodes (asserted here), so that their numbers have no gap
            let mut table = Table::draw(&mut key(3, episode).rng());
            loop {
                assert_eq!(states[4 * row..4 * row + 4], table.state());
                let chunk = &actions[row * step..(row + 1) * step];
                let done = table.step([chunk[0], chunk[1], chunk[2]], &params);
                row += 1;
                if done {
                    for rest in chunk[ACTION_DIM..].as_chunks::<ACTION_DIM>().0 {
                        assert_eq!(*rest, [0.0, 0.0, chunk[2]]);
                    }
                    break;
                }
                // the chunk of a step continues as the chunk of the next step
                assert_eq!(chunk[ACTION_DIM..], actions[row * step..(row + 1) * step - ACTION_DIM]);
            }
        }
        assert_eq!(row, rows);
    }

    #[test]
    #[expect(clippy::float_cmp, reason = "the file holds the very bits that were computed")]
    fn scenes_show_the_gripper_at_its_key_point() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("scenes.safetensors");
        let scenes = 4000;
        write_scenes(&path, &TabletopParams::default(), scenes, 1).expect("scenes");
        let file = fs::read(&path).expect("file");
        let (shape, points) = floats(&file, "keypoints");
        assert_eq!(shape, [scenes, 3, 2]);
        assert!(points.iter().all(|v| (0.0..=1.0).contains(v)));
        let (_, states) = floats(&file, "state");
        let mut near = [0.0; 2];
        for (point, state) in points.as_chunks::<6>().0.iter().zip(states.as_chunks::<4>().0) {
            let [block, zone, gripper] = [[point[0], point[1]], [point[2], point[3]], [point[4], point[5]]];
            assert_eq!([4.0 * gripper[0] - 2.0, 4.0 * gripper[1] - 2.0], state[..2]);
            near[0] += f64::from(u8::from(crate::tabletop::distance(block, gripper) < 0.15)) / scenes as f64;
            near[1] += f64::from(u8::from(crate::tabletop::distance(block, zone) < 0.15)) / scenes as f64;
        }
        // starts are 0.2 apart, and a jitter of 5 deviations does not occur; 5 standard errors of a share of 4000 are below 0.04.
        // A moved block or gripper may also land near the third point, rarely.
        assert!(
            (near[0] - 0.35).abs() < 0.04 && (near[1] - 0.15).abs() < 0.04,
            "{near:?}"
        );
        let tensors = SafeTensors::deserialize(&file).expect("safetensors");
        assert_eq!(
            tensors.tensor("images").expect("images").shape(),
            [scenes, 1, 32, 32, 3]
        );
        assert_eq!(tensors.tensor("prompt_id").expect("prompts").shape(), [scenes]);
    }

    #[test]
    fn a_demonstrator_that_fails_writes_nothing() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("demos.safetensors");
        let params = TabletopParams {
            demo_bias: 0.2,
            ..TabletopParams::default()
        };
        let refused = write_demos(&path, &params, 5, 4, 1);
        assert!(
            matches!(
                refused,
                Err(DatasetError::TooFew {
                    wanted: 5,
                    found: 0,
                    tried: 26
                })
            ),
            "{refused:?}"
        );
        assert!(!path.exists());
    }
}
