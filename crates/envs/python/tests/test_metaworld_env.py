"""Tests of the MetaWorld adapter: scenes, chunks, projection, demonstrations. Skipped where MetaWorld is not installed."""

import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
import unittest

import numpy as np

from pirl_env_worker.envs import make
from pirl_env_worker.envs.base import EnvError

HERE = pathlib.Path(__file__).resolve().parent
PARAMS = {"image_size": 32, "supersample": 1, "cameras": ["side"]}


@unittest.skipUnless(importlib.util.find_spec("metaworld"), "metaworld is not installed")
class MetaWorldTest(unittest.TestCase):
    def test_equal_keys_give_equal_episodes_whatever_ran_before(self):
        actions = np.random.default_rng(0).uniform(-1, 1, (10, 4)).astype(np.float32)
        for task in ("reach-v3", "push-v3", "drawer-open-v3", "hammer-v3", "box-close-v3"):
            env = make("metaworld", {**PARAMS, "task": task})
            fresh = make("metaworld", {**PARAMS, "task": task})
            for episode in range(3):  # disturbs the state that a reset could miss
                env.reset(9, 9, episode)
                env.step_chunk(actions[::-1])
            runs = []
            for one in (env, fresh, env):
                first = one.reset(1, 2, 3)
                one.step_chunk(actions)
                runs.append((first, one.observe(), one.positions()))
            for first, last, positions in runs[1:]:
                np.testing.assert_array_equal(first.images[0], runs[0][0].images[0], task)
                np.testing.assert_array_equal(last.images[0], runs[0][1].images[0], task)
                np.testing.assert_array_equal(last.state, runs[0][1].state, task)
                np.testing.assert_array_equal(positions, runs[0][2], task)

    def test_other_keys_give_other_goals_and_groups_share_one(self):
        env = make("metaworld", {**PARAMS, "task": "reach-v3"})

        def goal(*key, **more):
            env.reset_scene(*key, **more)
            return tuple(env.positions()[1])

        self.assertEqual(len({goal(1, 2, 3), goal(0, 2, 3), goal(1, 0, 3), goal(1, 2, 0)}), 4)
        self.assertEqual(goal(1, 2, 3, reset_state=5), goal(1, 8, 9, reset_state=5))
        self.assertNotEqual(goal(1, 2, 3, reset_state=5), goal(1, 2, 3, reset_state=6))

    def test_sets_of_tasks_and_the_words_of_a_checkpoint(self):
        def tasks(name):
            return make("metaworld", {**PARAMS, "task": name}).spec().tasks

        self.assertEqual([len(set(tasks(name))) for name in ("mt50", "ml45-train", "ml45-test")], [50, 45, 5])
        self.assertEqual(set(tasks("mt50")), set(tasks("ml45-train")) | set(tasks("ml45-test")))
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "prompts.json"
            path.write_text(json.dumps({"reach-v3": "Go there", "push-v3": "Push"}))
            params = {**PARAMS, "task": ["push-v3", "reach-v3"], "prompts": str(path)}
            self.assertEqual(make("metaworld", params).spec().prompts, ["Push", "Go there"])
            with self.assertRaisesRegex(EnvError, "no sentence for `hammer-v3`"):
                make("metaworld", {**params, "task": "hammer-v3"})
            with self.assertRaisesRegex(EnvError, "read the prompts"):
                make("metaworld", {**params, "prompts": str(path) + "x"})

    def test_a_group_has_one_task(self):
        env = make("metaworld", {**PARAMS, "task": ["reach-v3", "push-v3"]})

        def prompt(env_number, reset_state):
            return env.reset(1, env_number, 0, reset_state=reset_state).prompt

        self.assertEqual([prompt(number, 4) for number in (0, 1)], [prompt(0, 6)] * 2)
        self.assertNotEqual(prompt(0, 4), prompt(0, 5))

    def test_the_expert_ends_its_chunk_at_success_with_one_sparse_reward(self):
        env = make("metaworld", {**PARAMS, "task": "reach-v3", "max_episode_steps": 200})
        env.reset(1, 0, 0)
        rewards = []
        for _ in range(60):
            result = env.step_chunk(np.repeat(env.expert_action(np.zeros(3))[None], 3, axis=0))
            rewards += result.rewards
            if result.terminated:
                break
        self.assertTrue(result.success)
        self.assertFalse(result.truncated)
        self.assertEqual(sum(rewards), 1.0)
        self.assertEqual(rewards[-1], 1.0)
        with self.assertRaises(EnvError):
            env.step_chunk(np.zeros((1, 4)))

    def test_standing_still_is_truncated_at_the_limit(self):
        env = make("metaworld", {**PARAMS, "task": "push-v3", "max_episode_steps": 7})
        env.reset(1, 0, 0)
        self.assertEqual(len(env.step_chunk(np.zeros((5, 4))).rewards), 5)
        result = env.step_chunk(np.zeros((5, 4)))
        self.assertEqual((len(result.rewards), result.terminated, result.truncated, result.success), (2, False, True, False))

    def test_the_goal_is_drawn_where_the_projection_says(self):
        # push-v3's goal is the only pure green in its scene
        for camera in ("corner2", "corner2_near", "side", "top", "near"):
            env = make("metaworld", {"task": "push-v3", "cameras": [camera], "image_size": 64, "supersample": 2})
            for episode in range(3):
                image = env.reset(4, 0, episode).images[0].astype(int)
                green = (image[..., 1] > 100) & (image[..., 0] < 90) & (image[..., 2] < 90)
                self.assertTrue(green.any(), f"{camera}: no goal in the picture")
                rows, columns = np.nonzero(green)
                seen = np.array([columns.mean() + 0.5, rows.mean() + 0.5]) / 64
                told = env.keypoints()[0][0, 1]
                # two pixels: the marker is three pixels wide and may be half hidden by the gripper
                np.testing.assert_allclose(told, seen, atol=2 / 64, err_msg=camera)

    def test_unknown_names_are_refused(self):
        for params, text in (({"task": "reach-v9"}, "reach-v9"), ({"cameras": ["corner9"]}, "corner9"), ({"render_qualty": "fast"}, "render_quality")):
            with self.assertRaisesRegex(EnvError, text):
                make("metaworld", params)

    def test_demos_hold_the_experts_chunks(self):
        sys.path.insert(0, str(HERE))
        from test_safetensors import parse

        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder) / "demos.safetensors"
            command = [sys.executable, "-m", "pirl_env_worker", "demos", "--task", "reach-v3,push-v3", "--episodes", "2", "--seed", "3",
                "--horizon", "8", "--stride", "10", "--params", json.dumps(PARAMS), "--out", str(out)]
            subprocess.run(command, check=True, cwd=HERE.parent, timeout=120, capture_output=True)
            meta, tensors = parse(out)
            count = tensors["prompt_id"][1][0]
            self.assertEqual(tensors["images"][1], [count, 1, 32, 32, 3])
            self.assertEqual(tensors["state"][1], [count, 4])
            self.assertEqual(tensors["actions"][1], [count, 8, 4])
            self.assertEqual(meta["prompts"], ["reach the goal", "push the puck to the goal"])
            prompt = np.frombuffer(tensors["prompt_id"][2], np.int64)
            self.assertEqual(set(prompt.tolist()), {0, 1})
            actions = np.frombuffer(tensors["actions"][2], np.float32).reshape(count, 8, 4)
            self.assertLessEqual(np.abs(actions).max(), 1.0)
            # the chunk at step 10 starts where the chunk at step 0 ends, so replaying item 0 leads to item 1's state
            env = make("metaworld", {**PARAMS, "task": ["reach-v3", "push-v3"]})
            from pirl_env_worker.demos import DEMO_FIRST_ENV

            first = env.reset(3, DEMO_FIRST_ENV, 0, task=0)
            state = np.frombuffer(tensors["state"][2], np.float32).reshape(count, 4)
            np.testing.assert_array_equal(first.state, state[0])
            images = np.frombuffer(tensors["images"][2], np.uint8).reshape(count, 32, 32, 3)
            np.testing.assert_array_equal(first.images[0], images[0])


if __name__ == "__main__":
    unittest.main()
