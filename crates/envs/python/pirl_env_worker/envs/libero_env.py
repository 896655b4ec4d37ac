"""LIBERO as a `ChunkEnv`: the suites' own initial states, both cameras, a reward of 1 for success.

Written from the public interface of hf-libero 0.1.4 and tested against a stand-in (tests/test_libero_env.py). LIBERO's meshes are
not in any package; therefore the simulator itself was not run with this file.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

import numpy as np

from .base import ChunkResult, EnvError, EnvSpec, Observation, checked_actions, refuse_unknown, resized, scene_generator, scene_key, stepped

#: Suite -> default time limit in env steps.
MAX_EPISODE_STEPS = {"libero_spatial": 240, "libero_object": 240, "libero_goal": 320, "libero_10": 480, "libero_90": 400, "libero_130": 512}
#: Suites of `libero_130`, in order; 130 tasks in total.
PARTS_OF_130 = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")

PARAMS = {
    "suite": "libero_spatial",  # one of MAX_EPISODE_STEPS
    "tasks": None,  # numbers of the suite's tasks to use, in training and evaluation; None: all
    "image_size": 256,  # side of both images in px
    "max_episode_steps": 0,  # 0: by suite
    "settle_steps": 15,  # env steps at rest with an open gripper after a reset, not counted
}

CAMERAS = {"agentview": "agentview_image", "wrist": "robot0_eye_in_hand_image"}
ACTION_DIM = 7  # end-effector motion (3), rotation (3), gripper (-1 opens, +1 closes)
STATE_DIM = 8  # end-effector position in meters, its axis-angle in radians, two finger positions in meters
AT_REST = np.array([0, 0, 0, 0, 0, 0, -1], dtype=np.float32)


class LiberoEnv:
    """One LIBERO environment, which holds the simulator of one task at a time; a change of task builds a new simulator."""

    def __init__(self, params: dict[str, Any]) -> None:
        refuse_unknown(params, PARAMS)
        self._params = {**PARAMS, **params}
        suite, size = self._params["suite"], self._params["image_size"]
        if suite not in MAX_EPISODE_STEPS:
            raise EnvError(f"unknown LIBERO suite `{suite}`, expected one of {', '.join(f'`{n}`' for n in MAX_EPISODE_STEPS)}")
        if not (isinstance(size, int) and 1 <= size <= 4096):
            raise EnvError(f"`image_size` is `{size}`, expected a whole number in 1..=4096")
        self._libero = _import_libero()
        suites = [self._libero.benchmark.get_benchmark(name)() for name in (PARTS_OF_130 if suite == "libero_130" else (suite,))]
        self._tasks = _chosen([(one, index) for one in suites for index in range(one.n_tasks)], self._params["tasks"])
        described = [one.get_task(index) for one, index in self._tasks]
        self._spec = EnvSpec(
            cameras=[(name, size, size) for name in CAMERAS],
            state_dim=STATE_DIM,
            action_dim=ACTION_DIM,
            max_episode_steps=int(self._params["max_episode_steps"] or MAX_EPISODE_STEPS[suite]),
            tasks=[task.name for task in described],
            prompts=[task.language for task in described],
        )
        self._task: int | None = None
        self._sim: Any = None
        self._initial: np.ndarray | None = None
        self._raw: dict[str, np.ndarray] = {}
        self._elapsed = 0
        self._over = True

    def spec(self) -> EnvSpec:
        return self._spec

    def reset(self, seed: int, env: int, episode: int, reset_state: int | None = None, task: int | None = None) -> Observation:
        # a group has one task, therefore selected by the shared reset state
        chosen = (env if reset_state is None else reset_state) % len(self._tasks) if task is None else task
        if not 0 <= chosen < len(self._tasks):
            raise EnvError(f"task index {task} is outside 0..{len(self._tasks)}")
        self._build(chosen)
        random = scene_generator(scene_key(seed, env, episode, reset_state))
        self._sim.seed(int(random.integers(0, 2**31 - 1)))
        self._sim.reset()
        self._raw = self._sim.set_init_state(self._initial[random.integers(len(self._initial))])
        for _ in range(self._params["settle_steps"]):
            self._raw, *_ = self._sim.step(AT_REST)
        self._elapsed = 0
        self._over = False
        return self.observe()

    def step_chunk(self, actions: np.ndarray) -> ChunkResult:
        if self._over:
            raise EnvError("the episode is over, reset before the next chunk")
        return stepped(checked_actions(actions, ACTION_DIM, -1.0, 1.0), self._step)

    def _step(self, action: np.ndarray) -> tuple[float, bool, bool, bool]:
        self._raw, _, done, _ = self._sim.step(action)
        self._elapsed += 1
        success = bool(done)
        truncated = not success and self._elapsed >= self._spec.max_episode_steps
        self._over = success or truncated
        return float(success), success, truncated, success

    def observe(self) -> Observation:
        size = self._params["image_size"]
        images = [resized(_upright(self._raw[key]), size, size) for key in CAMERAS.values()]
        state = [self._raw["robot0_eef_pos"], axis_angle(self._raw["robot0_eef_quat"]), self._raw["robot0_gripper_qpos"]]
        return Observation(images, np.concatenate(state).astype(np.float32), self._spec.prompts[self._task])

    def render(self) -> np.ndarray:
        return np.ascontiguousarray(_upright(self._raw[CAMERAS["agentview"]]))

    def close(self) -> None:
        if self._sim is not None:
            self._sim.close()
        self._sim, self._task, self._over = None, None, True

    def _build(self, task: int) -> None:
        """Builds the simulator of `task` and loads its initial states."""
        if task == self._task:
            return
        self.close()
        suite, index = self._tasks[task]
        described = suite.get_task(index)
        folder = self._libero.get_libero_path("bddl_files")
        size = self._params["image_size"]
        try:
            self._sim = self._libero.envs.OffScreenRenderEnv(
                bddl_file_name=os.path.join(folder, described.problem_folder, described.bddl_file), camera_heights=size, camera_widths=size
            )
            self._initial = np.asarray(suite.get_task_init_states(index))
        except FileNotFoundError as error:
            raise EnvError(f"build LIBERO task `{described.name}`: {error}; LIBERO's assets belong into its folder `assets`") from error
        self._task = task


def _chosen(tasks: list[Any], numbers: Any) -> list[Any]:
    """Returns the tasks with these numbers, in the order of `numbers`; all tasks if `numbers` is None."""
    if numbers is None:
        return tasks
    if not (isinstance(numbers, list) and numbers):
        raise EnvError(f"`tasks` is `{numbers}`, expected a list of task numbers, or no such parameter for all tasks")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(tasks):
            raise EnvError(f"`tasks` holds `{number}`, expected whole numbers in 0..{len(tasks)}")
        if numbers.count(number) > 1:
            raise EnvError(f"`tasks` holds {number} twice, expected every task once")
    return [tasks[number] for number in numbers]


def _import_libero() -> Any:
    """Imports `libero.libero` and the submodules in use. Rejects the first import, which would ask for a folder on the terminal."""
    config = pathlib.Path(os.environ.get("LIBERO_CONFIG_PATH", "~/.libero")).expanduser() / "config.yaml"
    try:
        if not config.is_file():
            raise EnvError(f"LIBERO has no `{config}`: import it once by hand, `echo N | python -c 'import libero.libero'`")
        import libero.libero as core
        import libero.libero.benchmark
        import libero.libero.envs
    except ImportError as error:
        raise EnvError(f"import LIBERO: {error}; install it into the environment of this Python, configs/README.md says how") from error
    return core


def _upright(image: np.ndarray) -> np.ndarray:
    """Returns the image rotated by 180 degrees: LIBERO's cameras are upside down, and the published checkpoints were trained so."""
    return np.asarray(image, dtype=np.uint8)[::-1, ::-1]


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Returns axis times angle (radians, 0..2 pi) of a unit quaternion (x, y, z, w): `2 acos(w) v / |v|` with `v = (x, y, z)`."""
    vector, w = np.asarray(quaternion[:3], dtype=np.float64), float(np.clip(quaternion[3], -1.0, 1.0))
    length = np.sqrt(1.0 - w * w)
    if length < 1e-9:
        return np.zeros(3)
    return vector * (2.0 * np.arccos(w) / length)
