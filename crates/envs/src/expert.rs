//! Scripted expert of the tabletop; with a bias and noise, the miscalibrated demonstrator.

use policy::noise::fill_normal;
use rand_core::Rng;

use crate::tabletop::{MAX_MOVE, Table, TabletopParams, distance};

/// Returns the next action. The demonstrator assumes the block to be `(+demo_bias, -demo_bias)` from its true position. This
/// calibration error stays within the grasp tolerance: the demonstrator succeeds, while a policy trained to copy it often fails.
pub fn act(table: &Table, params: &TabletopParams, rng: &mut impl Rng) -> [f32; 3] {
    let holds_target = table.held == Some(0);
    let goal = if holds_target {
        table.zone
    } else {
        [
            table.blocks[0][0] + params.demo_bias,
            table.blocks[0][1] - params.demo_bias,
        ]
    };
    let to_goal = distance(goal, table.gripper);
    let mut noise = [0.0; 2];
    fill_normal(rng, &mut noise);
    let mut action = [0.0; 3];
    for (axis, a) in action.iter_mut().take(2).enumerate() {
        let d = goal[axis] - table.gripper[axis];
        let shake = if to_goal > 0.03 {
            params.demo_noise * noise[axis]
        } else {
            0.0
        };
        *a = (d / to_goal.max(MAX_MOVE) + shake).clamp(-1.0, 1.0);
    }
    let close = if holds_target {
        to_goal > 0.02
    } else {
        to_goal < 0.015 && !table.closed
    };
    action[2] = if close { 1.0 } else { -1.0 };
    action
}

#[cfg(test)]
mod tests {
    use policy::noise::{Purpose, stream, uniform};

    use super::*;
    use crate::env::ResetKey;

    fn success_rate(params: TabletopParams, episodes: u32, mut policy: impl FnMut(&Table) -> [f32; 3]) -> f64 {
        let won = (0..episodes)
            .filter(|env| {
                let key = ResetKey {
                    seed: 11,
                    env: *env,
                    episode: 0,
                    reset_state: None,
                    task: None,
                };
                let mut table = Table::draw(&mut key.rng());
                (0..params.max_episode_steps).any(|_| table.step(policy(&table), &params))
            })
            .count();
        won as f64 / f64::from(episodes)
    }

    #[test]
    fn the_expert_succeeds_and_chance_does_not() {
        let params = TabletopParams::default();
        let mut rng = stream(Purpose::Sampling, 1, 0, 0, 0);
        assert!(success_rate(params, 500, |t| act(t, &params, &mut rng)) > 0.98);
        let flawed = TabletopParams {
            demo_bias: 0.032,
            demo_noise: 0.1,
            ..params
        };
        let mut rng = stream(Purpose::Sampling, 2, 0, 0, 0);
        assert!(
            success_rate(flawed, 500, |t| act(t, &flawed, &mut rng)) > 0.95,
            "a demonstrator shows successes"
        );
        let mut rng = stream(Purpose::Sampling, 3, 0, 0, 0);
        let chance = success_rate(params, 500, |_| {
            std::array::from_fn(|_| (2.0 * uniform(&mut rng) - 1.0) as f32)
        });
        assert!(chance < 0.03, "{chance}");
    }

    #[test]
    fn without_the_image_or_the_prompt_even_the_expert_fails() {
        let params = TabletopParams::default();
        // without the image the best guess for block and zone is the middle of the table
        let mut rng = stream(Purpose::Sampling, 4, 0, 0, 0);
        let no_image = success_rate(params, 500, |table| {
            let guess = Table {
                blocks: [[0.5, 0.5]; 2],
                zone: [0.5, 0.5],
                ..*table
            };
            act(&guess, &params, &mut rng)
        });
        assert!(no_image < 0.05, "{no_image}");
        // without the prompt a coin toss names one of two blocks; five standard errors of 500 tosses are 0.11
        let mut rng = stream(Purpose::Sampling, 5, 0, 0, 0);
        let mut last_steps = usize::MAX;
        let mut swap = false;
        let no_prompt = success_rate(params, 500, |table| {
            if table.steps < last_steps {
                swap = uniform(&mut rng) < 0.5;
            }
            last_steps = table.steps + 1;
            let [a, b] = table.blocks;
            let held = table.held.map(|h| if swap { 1 - h } else { h });
            let seen = Table {
                blocks: if swap { [b, a] } else { [a, b] },
                held,
                ..*table
            };
            act(&seen, &params, &mut rng)
        });
        assert!(no_prompt < 0.61, "{no_prompt}");
    }
}
