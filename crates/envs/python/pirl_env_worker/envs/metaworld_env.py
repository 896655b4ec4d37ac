"""MetaWorld 3.1.1 as a `ChunkEnv`: reproducible scenes, a policy's cameras, the scripted expert."""

from __future__ import annotations

import json
import pathlib
import warnings
from typing import Any

import mujoco
import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP

from . import metaworld_tasks as tasks
from .base import ChunkResult, EnvError, EnvSpec, Observation, checked_actions, refuse_unknown, resized, scene_generator, scene_key, stepped
from .mujoco_render import Camera, FrameRenderer

PARAMS = {
    "task": "reach-v3",  # one task name, a list, or a set: mt50, ml45-train, ml45-test
    "prompts": "",  # JSON file, an object of task -> sentence, as a checkpoint was trained; empty: metaworld_tasks.py
    "cameras": ["corner2"],  # names of `CAMERAS`
    "image_size": 64,  # side of every image in px
    "supersample": 2,  # factor by which frames are rendered larger before box filtering
    "render_quality": "fast",  # fast | full; full has shadows, reflections and 4 samples, at ten times the cost
    "goal_radius": 0.02,  # drawn radius of the goal marker in meters; MetaWorld's is 0.02
    "max_episode_steps": 0,  # 0: by task (metaworld_tasks.py)
    "reward": "sparse",  # sparse: 1 in the step of success; dense: MetaWorld's own 0..10, divided by 10
    "settle_steps": 15,  # zero-action env steps after a reset, not counted
}

#: `corner2` is MetaWorld's camera in the pose of published pi0 recipes (both axes reversed), `corner2_near` its narrow view.
#: The others are free cameras around the work area.
CAMERAS = {
    camera.name: camera
    for camera in (
        Camera("corner2", fovy=60, fixed="corner2", position=(0.75, 0.075, 0.7), flipped=True),
        Camera("corner2_near", fovy=40, fixed="corner2", position=(0.75, 0.075, 0.7), flipped=True),
        Camera("side", fovy=45, lookat=(0.0, 0.72, 0.15), distance=0.95, azimuth=180, elevation=-15),
        Camera("top", fovy=45, lookat=(0.0, 0.72, 0.1), distance=0.95, azimuth=90, elevation=-89),
        Camera("near", fovy=45, lookat=(0.0, 0.72, 0.15), distance=0.95, azimuth=135, elevation=-35),
    )
}

#: Arrays of the model that tasks modify when building a scene.
POSES = ("body_pos", "body_quat", "geom_pos", "geom_quat", "site_pos", "site_quat")

ACTION_DIM = 4  # dx, dy, dz in units of 1 cm per step, gripper effort (-1 opens, +1 closes)
VIDEO_SIZE = 192  # side of a video frame in px
STATE_DIM = 4  # gripper x, y, z in meters, gripper opening 0..1


def _prompts(path: str, names: list[str]) -> list[str]:
    """Returns the sentence of each task: from metaworld_tasks.py, or from the JSON file `path`."""
    if not path:
        return [tasks.PROMPTS[name] for name in names]
    try:
        table = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EnvError(f"read the prompts `{path}`: {error}") from error
    for name in names:
        if not (isinstance(table, dict) and isinstance(table.get(name), str)):
            raise EnvError(f"the prompts `{path}` have no sentence for `{name}`: expected a JSON object of task -> sentence")
    return [table[name] for name in names]


class MetaWorldEnv:
    """One MetaWorld environment of one or several tasks.

    State: the first four numbers of MetaWorld's observation, [gripper x, y, z in meters, opening 0..1]; only the image shows objects
    and goal. An env step lasts 12.5 ms of simulated time. Success terminates; the time limit truncates.
    """

    def __init__(self, params: dict[str, Any]) -> None:
        refuse_unknown(params, PARAMS)
        self._params = {**PARAMS, **params}
        named = self._params["task"]
        self._tasks = tasks.SETS.get(named, [named]) if isinstance(named, str) else list(named)
        for task in self._tasks:
            if task not in tasks.PROMPTS:
                raise EnvError(f"unknown MetaWorld task `{task}`, expected one such as `reach-v3`")
        for choice, allowed in (("render_quality", ("fast", "full")), ("reward", ("sparse", "dense"))):
            if self._params[choice] not in allowed:
                raise EnvError(f"`{choice}` is `{self._params[choice]}`, expected `{allowed[0]}` or `{allowed[1]}`")
        for name in self._params["cameras"]:
            if name not in CAMERAS:
                raise EnvError(f"unknown camera `{name}`, expected one of {', '.join(f'`{n}`' for n in CAMERAS)}")
        for name in ("image_size", "supersample"):
            if not (isinstance(self._params[name], int) and 1 <= self._params[name] <= 4096):
                raise EnvError(f"`{name}` is `{self._params[name]}`, expected a whole number in 1..=4096")
        size = self._params["image_size"]
        limits = [self._params["max_episode_steps"] or tasks.MAX_EPISODE_STEPS.get(t, tasks.DEFAULT_MAX_EPISODE_STEPS) for t in self._tasks]
        self._spec = EnvSpec(
            cameras=[(name, size, size) for name in self._params["cameras"]],
            state_dim=STATE_DIM,
            action_dim=ACTION_DIM,
            max_episode_steps=max(limits),
            tasks=self._tasks,
            prompts=_prompts(self._params["prompts"], self._tasks),
        )
        self._limits = limits
        self._simulators: dict[int, Any] = {}
        self._poses: dict[int, dict[str, np.ndarray]] = {}
        self._task = 0
        self._elapsed = 0
        self._over = True
        self._full_observation = np.zeros(39)

    def spec(self) -> EnvSpec:
        return self._spec

    def reset(self, seed: int, env: int, episode: int, reset_state: int | None = None, task: int | None = None) -> Observation:
        self.reset_scene(seed, env, episode, reset_state, task)
        return self.observe()

    def reset_scene(self, seed: int, env: int, episode: int, reset_state: int | None = None, task: int | None = None) -> None:
        """Does `reset` without rendering."""
        # a group has one task: it is drawn by what the group shares
        self._task = (env if reset_state is None else reset_state) % len(self._tasks) if task is None else task
        if not 0 <= self._task < len(self._tasks):
            raise EnvError(f"task index {task} is outside 0..{len(self._tasks)}")
        sim = self._sim()
        sim.np_random = scene_generator(scene_key(seed, env, episode, reset_state))
        # MetaWorld's own `reset` builds the scene twice, each time from the model state that the last episode left. Here the scene
        # is built once, from the model's initial poses and clean data, and depends only on the key.
        for name, value in self._poses[self._task].items():
            getattr(sim.model, name)[:] = value
        mujoco.mj_resetData(sim.model, sim.data)
        mujoco.mj_forward(sim.model, sim.data)
        sim.curr_path_length = 0
        sim._did_see_sim_exception = False
        sim._prev_obs = sim._get_curr_obs_combined_no_goal()
        self._full_observation = sim.reset_model()
        for _ in range(self._params["settle_steps"]):
            self._full_observation = sim.step(np.zeros(ACTION_DIM, dtype=np.float32))[0]
        mujoco.mj_forward(sim.model, sim.data)
        self._elapsed = 0
        self._over = False

    def step_chunk(self, actions: np.ndarray) -> ChunkResult:
        if self._over:
            raise EnvError("the episode is over, reset before the next chunk")
        return stepped(checked_actions(actions, ACTION_DIM, -1.0, 1.0), self._step)

    def _step(self, action: np.ndarray) -> tuple[float, bool, bool, bool]:
        self._full_observation, reward, _, _, info = self._sim().step(action)
        self._elapsed += 1
        success = bool(info["success"])
        truncated = not success and self._elapsed >= self._limits[self._task]
        self._over = success or truncated
        return float(success) if self._params["reward"] == "sparse" else float(reward) / 10.0, success, truncated, success

    def observe(self) -> Observation:
        size, factor = self._params["image_size"], self._params["supersample"]
        images = [resized(self._frame(CAMERAS[name], size * factor), size, size) for name in self._params["cameras"]]
        state = np.asarray(self._full_observation[:STATE_DIM], dtype=np.float32)
        return Observation(images, state, self._spec.prompts[self._task])

    def render(self) -> np.ndarray:
        return self._frame(CAMERAS[self._params["cameras"][0]], VIDEO_SIZE)

    def close(self) -> None:
        self._simulators.clear()

    # Additional interface for demonstrations and pre-training scenes.

    @property
    def task_index(self) -> int:
        return self._task

    def limit(self, task: int) -> int:
        """Returns the time limit of a task in env steps."""
        return self._limits[task]

    def nudge(self, action: np.ndarray) -> None:
        """Executes one env step outside the episode: no reward, no time, no end."""
        self._full_observation = self._sim().step(action)[0]

    def expert_action(self, bias: np.ndarray) -> np.ndarray:
        """Returns MetaWorld's scripted action f32 [4] in -1..=1, with every object and the goal assumed offset by `bias` (meters)."""
        observation = self._full_observation.copy()
        observation[4:7] += bias
        if np.any(observation[11:14]):  # a second object
            observation[11:14] += bias
        observation[-3:] += bias
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the policies warn that their gain saturates the action box
            action = self._expert().get_action(observation)
        return np.clip(np.asarray(action, dtype=np.float32)[:ACTION_DIM], -1.0, 1.0)

    def keypoints(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the places of the named object, the goal, and the point between the fingers.

        Image coordinates f32 [cameras, 3, 2] in 0..1 (x right, y down), and positions f32 [3, 3] in meters, world.
        """
        sim = self._sim()
        positions = self.positions()
        renderer = self._renderer(self._params["image_size"] * self._params["supersample"])
        in_images = [renderer.project(sim.model, sim.data, CAMERAS[name], positions) for name in self._params["cameras"]]
        return np.stack(in_images), positions.astype(np.float32)

    def positions(self) -> np.ndarray:
        """Returns the three positions of `keypoints`, f64 [3, 3] in meters, world."""
        sim = self._sim()
        goal = np.asarray(sim._target_pos, dtype=np.float64)
        named = goal if self._tasks[self._task] in tasks.NAMES_GOAL else np.asarray(sim._get_pos_objects(), dtype=np.float64)[:3]
        return np.stack([named, goal, sim.tcp_center])

    def workspace(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the corners f64 [3], [3] in meters of the box of gripper targets for pre-training scenes."""
        return np.array([-0.2, 0.5, 0.06]), np.array([0.2, 0.9, 0.35])

    def _sim(self) -> Any:
        if self._task not in self._simulators:
            name = self._tasks[self._task]
            sim = ALL_V3_ENVIRONMENTS[name]()
            sim._set_task_called = True
            sim._freeze_rand_vec = False
            sim.seeded_rand_vec = True
            if sim._partially_observable:
                sim._partially_observable = False
                del sim.sawyer_observation_space
            sim.max_path_length = np.iinfo(np.int64).max  # this adapter enforces the time limit
            if mujoco.mj_name2id(sim.model, mujoco.mjtObj.mjOBJ_SITE, "goal") >= 0:
                sim.model.site("goal").size[0] = self._params["goal_radius"]
            self._poses[self._task] = {name: getattr(sim.model, name).copy() for name in POSES}
            self._simulators[self._task] = (sim, ENV_POLICY_MAP[name]())
        return self._simulators[self._task][0]

    def _expert(self) -> Any:
        self._sim()
        return self._simulators[self._task][1]

    def _frame(self, camera: Camera, size: int) -> np.ndarray:
        sim = self._sim()
        return self._renderer(size).frame(sim.model, sim.data, camera)

    def _renderer(self, size: int) -> FrameRenderer:
        sim = self._sim()
        return FrameRenderer.shared(sim.model_name, sim.model, size, self._params["render_quality"])
