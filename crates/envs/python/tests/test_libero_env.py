"""Tests of LIBERO's adapter against a stand-in with LIBERO's interface: calls of the adapter and use of the results."""

import pathlib
import re
import sys
import tempfile
import types
import unittest
from unittest import mock

import numpy as np

from pirl_env_worker.envs import WITHOUT_ADAPTER, make
from pirl_env_worker.envs.base import EnvError
from pirl_env_worker.envs.libero_env import axis_angle

TRIALS = 4
ACTION = np.full((1, 7), 0.5, dtype=np.float32)


class Simulator:
    """Stand-in that counts calls; the eef's x is the initial state plus the sum of first action values; success at x >= 2."""

    built: list = []

    def __init__(self, bddl_file_name, camera_heights, camera_widths):
        self.file, self.size, self.open = bddl_file_name, (camera_heights, camera_widths), True
        Simulator.built.append(self)

    def seed(self, seed):
        self.seeded = seed

    def reset(self):
        self.x, self.rests = None, 0

    def set_init_state(self, state):
        self.x = float(state[0])
        return self._observation()

    def step(self, action):
        action = np.asarray(action)
        self.rests += int(np.array_equal(action, [0, 0, 0, 0, 0, 0, -1]))
        self.x += float(action[0])
        return self._observation(), 0.0, self.x >= 2, {}

    def close(self):
        self.open = False

    def _observation(self):
        image = np.zeros((*self.size, 3), dtype=np.uint8)
        image[0, 0] = 200  # the corner that a rotation by 180 degrees moves to the opposite corner
        half = np.sqrt(0.5)
        return {
            "agentview_image": image,
            "robot0_eye_in_hand_image": image // 2,
            "robot0_eef_pos": np.array([self.x, 0.0, 1.0]),
            "robot0_eef_quat": np.array([half, 0.0, 0.0, half]),  # a quarter turn about x
            "robot0_gripper_qpos": np.array([0.04, -0.04]),
        }


class Suite:
    def __init__(self, name, tasks):
        self.name, self.n_tasks = name, tasks

    def get_task(self, index):
        return types.SimpleNamespace(
            name=f"{self.name}/{index}", language=f"do {self.name} {index}", problem_folder=self.name, bddl_file=f"{index}.bddl"
        )

    def get_task_init_states(self, index):
        return np.arange(TRIALS)[:, None] / 10.0


def stand_in():
    core = types.ModuleType("libero.libero")
    core.get_libero_path = lambda kind: f"/{kind}"
    core.benchmark = types.ModuleType("libero.libero.benchmark")
    core.benchmark.get_benchmark = lambda name: lambda: Suite(name, 90 if name == "libero_90" else 10)
    core.envs = types.ModuleType("libero.libero.envs")
    core.envs.OffScreenRenderEnv = Simulator
    package = types.ModuleType("libero")
    package.libero = core
    return {"libero": package, "libero.libero": core, "libero.libero.benchmark": core.benchmark, "libero.libero.envs": core.envs}


class LiberoEnvTest(unittest.TestCase):
    def setUp(self):
        Simulator.built.clear()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        (pathlib.Path(folder.name) / "config.yaml").touch()
        for patch in (mock.patch.dict(sys.modules, stand_in()), mock.patch.dict("os.environ", {"LIBERO_CONFIG_PATH": folder.name})):
            patch.start()
            self.addCleanup(patch.stop)
        self.config = pathlib.Path(folder.name) / "config.yaml"

    def env(self, **params):
        return make("libero", {"image_size": 8, **params})

    def test_the_observation_is_what_the_published_checkpoints_saw(self):
        env = self.env()
        seen = env.reset(1, 3, 0)
        # rotated by 180 degrees: the lit corner is the last one
        self.assertEqual([image[-1, -1, 0] for image in seen.images], [200, 100])
        self.assertEqual([int(image.astype(int).sum()) for image in seen.images], [600, 300])
        np.testing.assert_allclose(seen.state[3:], [np.pi / 2, 0, 0, 0.04, -0.04], atol=1e-6)  # f32
        self.assertEqual(seen.prompt, "do libero_spatial 3")
        self.assertEqual(Simulator.built[0].file, "/bddl_files/libero_spatial/3.bddl")
        self.assertEqual(Simulator.built[0].rests, 15)

    def test_success_ends_the_chunk_and_pays_one(self):
        env = self.env()
        start = float(env.reset(1, 0, 0).state[0])
        steps = int(np.ceil((2 - start) / 0.5))
        result = env.step_chunk(np.repeat(ACTION, 5, axis=0))
        self.assertEqual(result.rewards, [0.0] * (steps - 1) + [1.0])
        self.assertEqual((result.terminated, result.truncated, result.success), (True, False, True))
        with self.assertRaisesRegex(EnvError, "reset before"):
            env.step_chunk(ACTION)

    def test_the_time_limit_truncates_without_success(self):
        env = self.env(max_episode_steps=3)
        env.reset(1, 0, 0)
        result = env.step_chunk(np.zeros((5, 7)))
        self.assertEqual((result.rewards, result.terminated, result.truncated, result.success), ([0.0] * 3, False, True, False))

    def test_the_key_decides_task_and_trial_and_a_group_shares_them(self):
        env = self.env()

        def start(*key, **more):
            seen = env.reset(*key, **more)
            return seen.prompt, float(seen.state[0])

        self.assertEqual(start(1, 2, 3), start(1, 2, 3))
        self.assertEqual({start(1, 2, episode)[0] for episode in range(9)}, {"do libero_spatial 2"})
        self.assertEqual(len({start(1, 2, episode)[1] for episode in range(40)}), TRIALS)
        self.assertEqual(start(1, 2, 3, reset_state=17), start(1, 5, 9, reset_state=17))
        self.assertEqual(start(1, 2, 3, reset_state=17)[0], "do libero_spatial 7")
        self.assertEqual(start(1, 2, 3, task=9)[0], "do libero_spatial 9")

    def test_only_one_simulator_is_open(self):
        env = self.env()
        for number in (0, 1, 1, 0):
            env.reset(1, number, 0)
        self.assertEqual([one.open for one in Simulator.built], [False, False, True])

    def test_the_130_tasks_are_those_of_the_five_suites(self):
        spec = self.env(suite="libero_130").spec()
        self.assertEqual((len(spec.tasks), len(set(spec.tasks)), spec.max_episode_steps), (130, 130, 512))

    def test_only_the_tasks_of_the_list_are_played(self):
        env = self.env(suite="libero_object", tasks=[7, 2])
        self.assertEqual(env.spec().tasks, ["libero_object/7", "libero_object/2"])
        self.assertEqual(env.spec().prompts, ["do libero_object 7", "do libero_object 2"])
        # environments of training, groups, and tasks that an evaluation requests
        keys = [({}, number) for number in range(4)] + [({"reset_state": 5}, 0), ({"task": 0}, 3)]
        played = [env.reset(1, number, 0, **more).prompt[-1] for more, number in keys]
        self.assertEqual(played, ["7", "2", "7", "2", "2", "7"])
        self.assertEqual([pathlib.Path(one.file).stem for one in Simulator.built], ["7", "2", "7", "2", "7"])
        with self.assertRaisesRegex(EnvError, "task index 7 is outside 0..2"):
            env.reset(1, 0, 0, task=7)
        single = self.env(suite="libero_object", tasks=[0])
        starts = [single.reset(1, number, 0, reset_state=number // 8) for number in range(16)]
        self.assertEqual({seen.prompt for seen in starts}, {"do libero_object 0"})
        self.assertEqual(len({float(seen.state[0]) for seen in starts[:8]}), 1)
        self.assertEqual(self.env(suite="libero_130", tasks=[129]).spec().tasks, ["libero_90/89"])

    def test_a_bad_list_of_tasks_is_refused(self):
        for tasks, wanted in [
            (0, "`tasks` is `0`, expected a list"),
            ([], r"`tasks` is `\[\]`, expected a list"),
            ([10], "`tasks` holds `10`, expected whole numbers in 0..10"),
            ([-1], "`tasks` holds `-1`"),
            ([True], "`tasks` holds `True`"),
            ([0.0], "`tasks` holds `0.0`"),
            ([3, 4, 3], "`tasks` holds 3 twice"),
        ]:
            with self.assertRaisesRegex(EnvError, wanted):
                self.env(tasks=tasks)

    def test_bad_input_is_refused_by_name(self):
        with self.assertRaisesRegex(EnvError, "unknown LIBERO suite `libero_11`.*`libero_10`"):
            self.env(suite="libero_11")
        with self.assertRaisesRegex(EnvError, "did you mean `suite`"):
            self.env(suit="libero_10")
        self.config.unlink()
        with self.assertRaisesRegex(EnvError, "import it once by hand"):
            self.env()

    def test_a_missing_simulator_is_one_line(self):
        with mock.patch.dict(sys.modules, {"libero": None, "libero.libero": None}):
            with self.assertRaisesRegex(EnvError, "import LIBERO: .*configs/README.md"):
                self.env()
        self.assertGreaterEqual(len(WITHOUT_ADAPTER), 6)
        for name, reason in WITHOUT_ADAPTER.items():
            with self.assertRaisesRegex(EnvError, f"`{name}` has no adapter yet: {re.escape(reason)}"):
                make(name, {})


class AxisAngleTest(unittest.TestCase):
    def test_it_turns_vectors_as_the_quaternion_does(self):
        random = np.random.default_rng(0)
        for _ in range(20):
            q = random.standard_normal(4)
            q /= np.linalg.norm(q)
            v, w = q[:3], q[3]
            a = axis_angle(q)
            angle = np.linalg.norm(a)
            axis = a / angle
            point = random.standard_normal(3)
            by_quaternion = point + 2 * np.cross(v, np.cross(v, point) + w * point)
            rodrigues = point * np.cos(angle) + np.cross(axis, point) * np.sin(angle) + axis * (axis @ point) * (1 - np.cos(angle))
            np.testing.assert_allclose(rodrigues, by_quaternion, atol=1e-12)  # f64
        np.testing.assert_array_equal(axis_angle([0.0, 0.0, 0.0, 1.0]), np.zeros(3))


if __name__ == "__main__":
    unittest.main()
