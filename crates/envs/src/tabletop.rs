//! Embedded tabletop: pick the named block and place the block in the zone, seen from above.
//!
//! Lengths are in units of the table's side. Success needs the image (positions) and the prompt (which block). A failed grasp is
//! not terminal: the gripper may open and try again.

use policy::noise::{below, uniform};
use rand_core::Rng;
use serde::{Deserialize, Serialize};

use crate::{
    env::{ChunkOutcome, EnvError, EnvSpec, Image, Observation, ResetKey, VecEnv},
    raster::Canvas,
};

/// Color names in the prompt.
pub const COLOURS: [&str; 3] = ["red", "green", "blue"];
const COLOUR_RGB: [[f32; 3]; 3] = [[0.9, 0.1, 0.1], [0.1, 0.8, 0.2], [0.15, 0.25, 0.95]];
const ZONE_RGB: [f32; 3] = [0.90, 0.85, 0.20];
const OPEN_RGB: [f32; 3] = [1.0; 3];
const CLOSED_RGB: [f32; 3] = [0.45; 3];
const BACKGROUND: f32 = 0.12;
const BLOCK_RADIUS: f32 = 0.06;
const ZONE_RADIUS: f32 = 0.09;
const GRIPPER_RADIUS: f32 = 0.04;
/// Side of a video frame in pixels.
const VIDEO_SIZE: usize = 160;
/// Width of an action: dx, dy, grip.
pub const ACTION_DIM: usize = 3;
/// Largest move of one env step along an axis.
pub const MAX_MOVE: f32 = 0.06;

/// Parameters; the defaults are those of the published task.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TabletopParams {
    /// Side of the observation's image in pixels.
    pub image_size: usize,
    /// Distance from gripper to block center below which a grasp succeeds.
    pub grasp_tol: f32,
    /// Distance from block center to zone center below which a block counts as placed.
    pub place_tol: f32,
    /// Time limit in env steps.
    pub max_episode_steps: usize,
    /// Demonstrator only: constant calibration error `(+b, -b)` of the assumed block position.
    pub demo_bias: f32,
    /// Demonstrator only: standard deviation of the movement noise, in action units.
    pub demo_noise: f32,
    /// Whether to replace the image by a uniform gray (ablation: a policy must fail).
    pub blank_image: bool,
    /// Whether to replace the prompt by a prompt without a color (ablation: a policy must fail).
    pub blank_prompt: bool,
}

impl Default for TabletopParams {
    fn default() -> Self {
        Self {
            image_size: 32,
            grasp_tol: 0.05,
            place_tol: 0.08,
            max_episode_steps: 40,
            demo_bias: 0.0,
            demo_noise: 0.0,
            blank_image: false,
            blank_prompt: false,
        }
    }
}

impl TabletopParams {
    /// Reads the parameters of a configuration.
    ///
    /// # Errors
    /// A key is unknown, a type is wrong or a value is out of range.
    pub fn parse(params: toml::Table) -> Result<Self, EnvError> {
        let bad = |detail: String| EnvError::Params {
            name: "tabletop".to_owned(),
            detail,
        };
        let parsed: Self = params
            .try_into()
            .map_err(|e: toml::de::Error| bad(e.message().to_owned()))?;
        if !(8..=512).contains(&parsed.image_size) {
            return Err(bad(format!("`image_size` is {}, expected 8 to 512", parsed.image_size)));
        }
        if parsed.max_episode_steps == 0 {
            return Err(bad("`max_episode_steps` is 0, expected at least 1".to_owned()));
        }
        // a NaN fails every comparison below
        for (name, value) in [("grasp_tol", parsed.grasp_tol), ("place_tol", parsed.place_tol)] {
            if !(value > 0.0 && value <= 1.0) {
                return Err(bad(format!("`{name}` is {value}, expected above 0 and at most 1")));
            }
        }
        if !(-1.0..=1.0).contains(&parsed.demo_bias) {
            return Err(bad(format!("`demo_bias` is {}, expected -1 to 1", parsed.demo_bias)));
        }
        if !(0.0..=10.0).contains(&parsed.demo_noise) {
            return Err(bad(format!("`demo_noise` is {}, expected 0 to 10", parsed.demo_noise)));
        }
        Ok(parsed)
    }
}

/// Full state of one table.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Table {
    /// Gripper position.
    pub gripper: [f32; 2],
    /// Whether the gripper is closed.
    pub closed: bool,
    /// Index of the held block; `None` if no block is held.
    pub held: Option<usize>,
    /// Position of the held block minus gripper position.
    pub offset: [f32; 2],
    /// Block positions; block 0 is the target.
    pub blocks: [[f32; 2]; 2],
    /// Color numbers of the blocks, indices into [`COLOURS`].
    pub colours: [usize; 2],
    /// Zone position.
    pub zone: [f32; 2],
    /// Env steps since the reset.
    pub steps: usize,
}

/// Returns the Euclidean distance.
pub fn distance(a: [f32; 2], b: [f32; 2]) -> f32 {
    (a[0] - b[0]).hypot(a[1] - b[1])
}

impl Table {
    /// Draws a start state: four points in `[0.12, 0.88]^2`, all pairs at least 0.2 apart, and two of three colors.
    pub fn draw(rng: &mut impl Rng) -> Self {
        let points = loop {
            let points: [[f32; 2]; 4] =
                std::array::from_fn(|_| std::array::from_fn(|_| (0.12 + 0.76 * uniform(rng)) as f32));
            let apart = (0..4).all(|i| (0..i).all(|j| distance(points[i], points[j]) >= 0.2));
            if apart {
                break points;
            }
        };
        let first = below(rng, 3);
        let second = (first + 1 + below(rng, 2)) % 3;
        Self {
            gripper: points[3],
            closed: false,
            held: None,
            offset: [0.0; 2],
            blocks: [points[0], points[1]],
            colours: [first, second],
            zone: points[2],
            steps: 0,
        }
    }

    /// Makes `task` (a color number) the named color. Positions are unchanged; a distractor of the named color gets the old
    /// color. Returns `None` for an unknown color number.
    #[must_use]
    pub fn with_task(mut self, task: usize) -> Option<Self> {
        COLOURS.get(task)?;
        if self.colours[1] == task {
            self.colours[1] = self.colours[0];
        }
        self.colours[0] = task;
        Some(self)
    }

    /// Executes one env step with the action `[dx, dy, grip]`; returns whether the goal is reached.
    pub fn step(&mut self, action: [f32; 3], params: &TabletopParams) -> bool {
        let action = action.map(|a| if a.is_nan() { 0.0 } else { a.clamp(-1.0, 1.0) });
        for (position, a) in self.gripper.iter_mut().zip(action) {
            *position = (*position + MAX_MOVE * a).clamp(0.02, 0.98);
        }
        let close = action[2] > 0.0;
        let gripper = self.gripper;
        if close && !self.closed && self.held.is_none() {
            // a grasp happens only on the edge from open to closed
            let nearest = usize::from(distance(self.blocks[1], gripper) < distance(self.blocks[0], gripper));
            let block = self.blocks[nearest];
            if distance(block, gripper) < params.grasp_tol {
                self.held = Some(nearest);
                self.offset = [block[0] - gripper[0], block[1] - gripper[1]];
            }
        }
        if !close {
            self.held = None;
        }
        self.closed = close;
        if let Some(block) = self.held.and_then(|held| self.blocks.get_mut(held)) {
            *block = [gripper[0] + self.offset[0], gripper[1] + self.offset[1]];
        }
        self.steps += 1;
        distance(self.blocks[0], self.zone) < params.place_tol && self.held != Some(0)
    }

    /// Returns whether the other block was placed in the zone. This failure ends the episode, so that a policy cannot ignore the
    /// prompt and try both blocks.
    pub fn misplaced(&self, params: &TabletopParams) -> bool {
        distance(self.blocks[1], self.zone) < params.place_tol && self.held != Some(1)
    }

    /// Returns the image from above, `[size, size, 3]`.
    pub fn image(&self, size: usize) -> Image {
        let mut canvas = Canvas::new(size, BACKGROUND);
        canvas.disc(self.zone, ZONE_RADIUS, ZONE_RGB);
        for (block, colour) in self.blocks.iter().zip(self.colours) {
            canvas.disc(
                *block,
                BLOCK_RADIUS,
                COLOUR_RGB.get(colour).copied().unwrap_or_default(),
            );
        }
        canvas.disc(
            self.gripper,
            GRIPPER_RADIUS,
            if self.closed { CLOSED_RGB } else { OPEN_RGB },
        );
        canvas.image()
    }

    /// Returns the proprioceptive state `[4 x - 2, 4 y - 2, closed, holding]`, the last two -1 or 1; not *which* block is held.
    pub fn state(&self) -> [f32; 4] {
        let sign = |b: bool| if b { 1.0 } else { -1.0 };
        [
            4.0 * self.gripper[0] - 2.0,
            4.0 * self.gripper[1] - 2.0,
            sign(self.closed),
            sign(self.held.is_some()),
        ]
    }

    /// Returns the instruction.
    pub fn prompt(&self) -> String {
        format!("pick {}", COLOURS.get(self.colours[0]).copied().unwrap_or_default())
    }

    /// Returns named block, zone and gripper, the targets of vision-language pre-training, as image coordinates in `[0, 1]`.
    pub fn keypoints(&self) -> [[f32; 2]; 3] {
        [self.blocks[0], self.zone, self.gripper]
    }
}

/// Vectorized tabletop environment.
#[derive(Debug)]
pub struct Tabletop {
    params: TabletopParams,
    tables: Vec<Option<Table>>,
}

impl Tabletop {
    /// Returns an environment of `num_envs` slots, none of them reset.
    pub fn new(num_envs: usize, params: TabletopParams) -> Self {
        Self {
            params,
            tables: vec![None; num_envs],
        }
    }

    fn look(&self, table: &Table) -> Observation {
        let size = self.params.image_size;
        let image = if self.params.blank_image {
            Canvas::new(size, BACKGROUND).image()
        } else {
            table.image(size)
        };
        let prompt = if self.params.blank_prompt {
            "pick".to_owned()
        } else {
            table.prompt()
        };
        Observation {
            images: vec![image],
            state: table.state().to_vec(),
            prompt,
        }
    }
}

impl VecEnv for Tabletop {
    fn spec(&self) -> EnvSpec {
        EnvSpec {
            name: "tabletop",
            cameras: vec!["top".to_owned()],
            action_dim: ACTION_DIM,
            max_episode_steps: self.params.max_episode_steps,
            prompts: COLOURS.iter().map(|c| format!("pick {c}")).collect(),
        }
    }

    fn num_envs(&self) -> usize {
        self.tables.len()
    }

    fn reset(&mut self, slot: usize, key: &ResetKey) -> Option<Observation> {
        let drawn = Table::draw(&mut key.rng());
        let table = match key.task {
            Some(task) => drawn.with_task(task as usize)?,
            None => drawn,
        };
        *self.tables.get_mut(slot)? = Some(table);
        Some(self.look(&table))
    }

    fn observe(&self, slot: usize) -> Option<Observation> {
        self.tables.get(slot)?.as_ref().map(|table| self.look(table))
    }

    fn step_chunk(&mut self, slot: usize, actions: &[f32], frames: bool) -> Option<ChunkOutcome> {
        let params = self.params;
        let table = self.tables.get_mut(slot)?.as_mut()?;
        let mut outcome = ChunkOutcome::default();
        for action in actions.as_chunks::<ACTION_DIM>().0 {
            let success = table.step(*action, &params);
            outcome.rewards.push(if success { 1.0 } else { 0.0 });
            if frames {
                outcome.frames.push(table.image(VIDEO_SIZE));
            }
            outcome.success = success;
            outcome.terminated = success || table.misplaced(&params);
            outcome.truncated = !outcome.terminated && table.steps >= params.max_episode_steps;
            if outcome.terminated || outcome.truncated {
                break;
            }
        }
        Some(outcome)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(seed: u64, env: u32, episode: u64) -> ResetKey {
        ResetKey {
            seed,
            env,
            episode,
            reset_state: None,
            task: None,
        }
    }

    #[test]
    fn a_start_depends_on_its_key_alone() {
        let mut one = Tabletop::new(1, TabletopParams::default());
        let mut many = Tabletop::new(9, TabletopParams::default());
        many.reset(3, &key(1, 8, 8)).expect("slot");
        let alone = one.reset(0, &key(7, 2, 5)).expect("slot");
        assert_eq!(alone, many.reset(6, &key(7, 2, 5)).expect("slot"));
        assert_ne!(alone, one.reset(0, &key(7, 2, 6)).expect("slot"));
        assert_ne!(alone, one.reset(0, &key(8, 2, 5)).expect("slot"));
        let group = |env| ResetKey {
            reset_state: Some(4),
            ..key(7, env, 0)
        };
        assert_eq!(
            one.reset(0, &group(1)).expect("slot"),
            many.reset(1, &group(2)).expect("slot")
        );
    }

    #[test]
    fn a_grasp_happens_only_on_the_closing_edge() {
        let params = TabletopParams::default();
        let mut table = Table::draw(&mut key(1, 1, 1).rng());
        table.gripper = [0.5, 0.5];
        table.blocks = [[0.8, 0.5], [0.2, 0.2]];
        table.step([0.0, 0.0, 1.0], &params);
        table.gripper = table.blocks[0];
        table.step([0.0, 0.0, 1.0], &params);
        assert_eq!(table.held, None, "closed before it arrived");
        table.step([0.0, 0.0, -1.0], &params);
        table.step([0.0, 0.0, 1.0], &params);
        assert_eq!(table.held, Some(0));
        table.step([-1.0, 0.0, 1.0], &params);
        assert!(
            (table.blocks[0][0] - (0.8 - MAX_MOVE)).abs() < 1e-6,
            "the block moves along"
        );
    }

    #[test]
    fn the_time_limit_truncates() {
        let mut env = Tabletop::new(
            1,
            TabletopParams {
                max_episode_steps: 6,
                ..TabletopParams::default()
            },
        );
        env.reset(0, &key(1, 1, 1)).expect("slot");
        let first = env.step_chunk(0, &[0.0; 12], false).expect("slot");
        assert!(!first.truncated && !first.terminated && first.rewards.len() == 4);
        let second = env.step_chunk(0, &[0.0; 12], false).expect("slot");
        assert!(second.truncated && !second.terminated && second.rewards.len() == 2);
    }

    #[test]
    fn pixels_of_a_known_scene() {
        let table = Table {
            gripper: [0.1, 0.9],
            closed: false,
            held: None,
            offset: [0.0; 2],
            blocks: [[0.515_625, 0.515_625], [0.9, 0.1]],
            colours: [0, 2],
            zone: [0.1, 0.1],
            steps: 0,
        };
        let image = table.image(32);
        let pixel = |row: usize, column: usize| &image.data[(row * 32 + column) * 3..][..3];
        // the center of pixel (16, 16) is the block's center: pure red, round(255 * 0.9) = 230 (229.5), round(25.5) = 26
        assert_eq!(pixel(16, 16), [230, 26, 26]);
        // far from everything: the background, round(255 * 0.12) = 31
        assert_eq!(pixel(16, 2), [31, 31, 31]);
        // two columns from the center: distance 2/32, coverage (0.06 - 0.0625) * 32 + 0.5 = 0.42:
        // 255 (0.12 + 0.42 (0.9 - 0.12)) = 114.1 and 255 (0.12 + 0.42 (0.1 - 0.12)) = 28.5 (28.458)
        assert_eq!(pixel(16, 18), [114, 28, 28]);
    }

    #[test]
    fn parameters_out_of_range_are_refused_by_name() {
        let refusal = |text: &str| {
            let params = text.parse().expect("TOML");
            TabletopParams::parse(params)
                .err()
                .map(|e| e.to_string())
                .unwrap_or_default()
        };
        assert_eq!(refusal("grasp_tol = 0.05\ndemo_bias = -0.03\ndemo_noise = 0.1"), "");
        for key in ["grasp_tol", "place_tol", "demo_bias", "demo_noise"] {
            for value in ["nan", "inf", "-2.0"] {
                assert!(
                    refusal(&format!("{key} = {value}")).contains(&format!("`{key}` is")),
                    "{key} = {value}"
                );
            }
        }
        assert!(refusal("grasp_tl = 0.05").contains("grasp_tl"));
    }

    #[test]
    fn a_named_task_changes_colours_only() {
        let mut env = Tabletop::new(1, TabletopParams::default());
        for (task, colour) in (0u32..).zip(COLOURS) {
            for episode in 0..20 {
                let drawn = Table::draw(&mut key(5, 0, episode).rng());
                let named = ResetKey {
                    task: Some(task),
                    ..key(5, 0, episode)
                };
                let seen = env.reset(0, &named).expect("slot");
                assert_eq!(seen.prompt, format!("pick {colour}"));
                let table = env.tables[0].expect("reset");
                assert_ne!(table.colours[0], table.colours[1]);
                assert_eq!(
                    table,
                    Table {
                        colours: table.colours,
                        ..drawn
                    }
                );
            }
        }
        assert!(
            env.reset(
                0,
                &ResetKey {
                    task: Some(3),
                    ..key(5, 0, 0)
                }
            )
            .is_none(),
            "there is no fourth colour"
        );
    }

    #[test]
    fn success_in_the_last_step_is_no_truncation() {
        let mut env = Tabletop::new(
            1,
            TabletopParams {
                max_episode_steps: 3,
                ..TabletopParams::default()
            },
        );
        env.reset(0, &key(1, 1, 1)).expect("slot");
        let table = env.tables[0].as_mut().expect("reset");
        table.steps = 2;
        table.blocks[0] = table.zone;
        let outcome = env
            .step_chunk(0, &[0.0, 0.0, -1.0, 0.0, 0.0, -1.0], false)
            .expect("slot");
        assert_eq!(outcome.rewards, [1.0], "the chunk stops at success");
        assert!(outcome.success && outcome.terminated && !outcome.truncated);
    }

    #[test]
    fn actions_that_are_no_numbers_stand_still_and_infinite_ones_are_clipped() {
        let params = TabletopParams::default();
        let start = Table::draw(&mut key(1, 1, 1).rng());
        let after = |action| {
            let mut table = start;
            table.step(action, &params);
            table
        };
        assert_eq!(after([f32::NAN; 3]), after([0.0; 3]));
        assert_eq!(
            after([f32::INFINITY, f32::NEG_INFINITY, f32::INFINITY]),
            after([1.0, -1.0, 1.0])
        );
    }

    #[test]
    fn the_bounded_painter_agrees_with_painting_every_pixel() {
        for (episode, size) in [(0, 32), (1, 32), (2, 48), (3, 17)] {
            let table = Table::draw(&mut key(9, 0, episode).rng());
            let colour = |block: usize| COLOUR_RGB[table.colours[block]];
            let discs = [
                (table.zone, 0.09, ZONE_RGB),
                (table.blocks[0], 0.06, colour(0)),
                (table.blocks[1], 0.06, colour(1)),
                (table.gripper, 0.04, OPEN_RGB),
            ];
            let image = table.image(size);
            for (place, byte) in image.data.iter().enumerate() {
                let (row, column, channel) = (place / (3 * size), place / 3 % size, place % 3);
                let at = |i: usize| (i as f64 + 0.5) / size as f64;
                let mut value = 0.12;
                for (centre, radius, rgb) in discs {
                    let apart = (at(column) - f64::from(centre[0])).hypot(at(row) - f64::from(centre[1]));
                    let alpha = ((radius - apart) * size as f64 + 0.5).clamp(0.0, 1.0);
                    value += (f64::from(rgb[channel]) - value) * alpha;
                }
                // half a step of u8, and f32 against f64
                assert!(
                    (f64::from(*byte) - 255.0 * value).abs() < 0.5 + 1e-3,
                    "{episode} {row} {column} {channel}"
                );
            }
        }
    }

    proptest! {
        #[test]
        fn the_state_stays_on_the_table(
            // `ANY` includes NaN and the infinities, which the default strategy of f32 omits
            actions in proptest::collection::vec(proptest::array::uniform3(proptest::num::f32::ANY), 1..60),
            env in 0u32..50,
        ) {
            let params = TabletopParams::default();
            let mut table = Table::draw(&mut key(3, env, 0).rng());
            for action in actions {
                table.step(action, &params);
                for p in [table.gripper, table.blocks[0], table.blocks[1]] {
                    prop_assert!(p.iter().all(|v| (-0.05..=1.05).contains(v)), "{table:?}");
                }
                prop_assert!(table.state().iter().all(|v| (-2.0..=2.0).contains(v)), "{table:?}");
            }
        }
    }
}
