"""Tests of the general adapter on an environment whose results are computed by hand."""

import unittest

import gymnasium
import numpy as np

from pirl_env_worker.envs import make
from pirl_env_worker.envs.base import EnvError, resized


class Corridor(gymnasium.Env):
    """Point on a line: moves by the action, succeeds at 1, ends at -1; the image's brightness is the position."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 1}
    action_space = gymnasium.spaces.Box(-0.5, 0.5, (1,), np.float32)
    observation_space = gymnasium.spaces.Box(-2, 2, (1,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-0.2, 0.2)
        return np.array([self.x], np.float32), {}

    def step(self, action):
        self.x += float(action[0])
        over = abs(self.x) >= 1
        return np.array([self.x], np.float32), self.x, over, False, {"is_success": self.x >= 1}

    def render(self):
        return np.full((32, 48, 3), int(np.clip(128 + 60 * self.x, 0, 255)), np.uint8)


gymnasium.register("pirl-test/Corridor-v0", Corridor)


def corridor(**params):
    return make("gym", {"id": "pirl-test/Corridor-v0", "image_size": 8, "prompt": "go right", **params})


class GymEnvTest(unittest.TestCase):
    def test_spec_and_observation_agree(self):
        env = corridor()
        spec = env.spec()
        seen = env.reset(1, 2, 3)
        self.assertEqual(spec.cameras, [("image", 8, 8)])
        self.assertEqual((spec.state_dim, spec.action_dim, spec.prompts), (1, 1, ["go right"]))
        self.assertEqual((seen.images[0].shape, seen.images[0].dtype, seen.state.dtype), ((8, 8, 3), np.uint8, np.float32))
        self.assertEqual(seen.prompt, "go right")

    def test_success_in_mid_chunk_ends_it_there(self):
        env = corridor()
        start = env.reset(1, 0, 0).state[0]
        result = env.step_chunk(np.full((5, 1), 9.0))  # clipped to 0.5 per step
        steps = int(np.ceil((1 - start) / 0.5))
        np.testing.assert_allclose(result.rewards, [start + 0.5 * (i + 1) for i in range(steps)], atol=1e-6)  # f32 state
        self.assertEqual((result.terminated, result.truncated, result.success), (True, False, True))
        with self.assertRaises(EnvError):
            env.step_chunk(np.zeros((1, 1)))

    def test_failure_terminates_without_success(self):
        env = corridor()
        env.reset(1, 0, 0)
        result = env.step_chunk(np.full((5, 1), -0.5))
        self.assertEqual((result.terminated, result.success), (True, False))

    def test_time_limit_truncates(self):
        env = corridor(max_episode_steps=3)
        env.reset(1, 0, 0)
        first = env.step_chunk(np.zeros((2, 1)))
        self.assertEqual((len(first.rewards), first.terminated, first.truncated), (2, False, False))
        second = env.step_chunk(np.zeros((2, 1)))
        self.assertEqual((len(second.rewards), second.terminated, second.truncated), (1, False, True))

    def test_the_key_decides_the_scene(self):
        env = corridor()
        place = lambda *key, **more: float(env.reset(*key, **more).state[0])
        self.assertEqual(place(1, 2, 3), place(1, 2, 3))
        self.assertEqual(len({place(1, 2, 3), place(2, 2, 3), place(1, 3, 3), place(1, 2, 4)}), 4)
        self.assertEqual(place(1, 2, 3, reset_state=7), place(1, 5, 9, reset_state=7))

    def test_bad_input_is_refused_by_name(self):
        with self.assertRaisesRegex(EnvError, "did you mean `image_size`"):
            corridor(image_sise=8)
        with self.assertRaisesRegex(EnvError, "not there|make gymnasium environment"):
            make("gym", {"id": "NoSuch-v0"})
        with self.assertRaisesRegex(EnvError, "unknown environment `gin`"):
            make("gin", {})
        env = corridor()
        env.reset(0, 0, 0)
        with self.assertRaisesRegex(EnvError, r"shape \[n, 1\], found \[2, 2\]"):
            env.step_chunk(np.zeros((2, 2)))
        with self.assertRaisesRegex(EnvError, "not finite"):
            env.step_chunk(np.array([[np.nan]]))


class ResizeTest(unittest.TestCase):
    def test_whole_factors_are_rounded_means(self):
        image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        small = resized(image, 3, 4)
        for y in range(3):
            for x in range(4):
                mean = image[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].reshape(4, 3).astype(int).sum(0)
                np.testing.assert_array_equal(small[y, x], (mean + 2) // 4)


if __name__ == "__main__":
    unittest.main()
