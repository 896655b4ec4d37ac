"""Demonstrations for SFT and scenes for pre-training, made with the scripted expert; measurement of the expert's success rate."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np

from . import safetensors
from .envs import make
from .envs.base import EnvError, scene_generator
from .progress import Progress

#: First env indices of demonstrations and scenes, far above those of training workers, so that no training scene is included.
DEMO_FIRST_ENV = 1 << 40
SCENE_FIRST_ENV = 2 << 40
#: Key word that separates the demonstrator's noise stream from the scene's stream.
NOISE_STREAM = 0x6E6F_6973


@dataclasses.dataclass
class Demonstrator:
    """Scripted expert with a calibration error and motion noise."""

    #: assumed offset of objects and goal from their true positions, in meters
    bias: np.ndarray
    #: standard deviation of Gaussian noise on the motion part of an executed action, in action units
    noise: float


def expert_episode(env: Any, demonstrator: Demonstrator, key: tuple[int, int, int], task: int, chunk: int, watch=None) -> tuple[bool, np.ndarray]:
    """Runs one episode of the expert through `step_chunk`. Returns (success, executed actions f32 [steps, A]).

    The expert decides at every env step (`chunk` = 1); with `chunk` > 1 each action is held for `chunk` env steps. The function
    calls `watch(step)` before each decision.
    """
    env.reset_scene(*key, task=task)
    random = scene_generator([*key, NOISE_STREAM])
    executed: list[np.ndarray] = []
    while True:
        if watch is not None:
            watch(len(executed))
        action = env.expert_action(demonstrator.bias)
        action[:3] += demonstrator.noise * random.standard_normal(3).astype(np.float32)
        action = np.clip(action, -1.0, 1.0)
        result = env.step_chunk(np.repeat(action[None], chunk, axis=0))
        executed.extend([action] * len(result.rewards))
        if result.terminated or result.truncated:
            return result.success, np.stack(executed)


def chunk_at(actions: np.ndarray, start: int, horizon: int) -> np.ndarray:
    """Returns actions f32 [horizon, A] from env step `start`; past the end: zero motion, the last gripper command."""
    part = actions[start : start + horizon]
    rest = np.zeros((horizon - len(part), actions.shape[1]), dtype=np.float32)
    rest[:, -1] = actions[-1, -1]
    return np.concatenate([part, rest])


def write_demos(options: Any) -> None:
    """Runs the command `demos`: writes successful expert episodes, one item per `stride` env steps, tasks in turn.

    Tensors: images u8 [N, cameras, h, w, 3], state f32 [N, D], prompt_id i64 [N], actions f32 [N, H, A], episode i64 [N].
    """
    env = make(options.env, options.params)
    spec = env.spec()
    demonstrator = Demonstrator(np.array(options.bias, dtype=np.float64), options.noise)
    rows: dict[str, list] = {name: [] for name in ("images", "state", "prompt_id", "actions", "episode")}
    kept = tried = 0
    progress = Progress("demos", options.episodes)
    start = time.monotonic()
    while kept < options.episodes:
        if tried >= 20 + 10 * options.episodes:
            raise EnvError(f"only {kept} of {tried} expert episodes succeeded, lower `--bias` or `--noise`, or raise `max_episode_steps`")
        task = kept % len(spec.tasks)
        frames: list[tuple[int, Any]] = []

        def watch(step: int) -> None:
            if step % options.stride == 0:
                frames.append((step, env.observe()))

        success, actions = expert_episode(env, demonstrator, (options.seed, DEMO_FIRST_ENV, tried), task, 1, watch)
        tried += 1
        if not success:
            continue
        for step, observation in frames:
            rows["images"].append(np.stack(observation.images))
            rows["state"].append(observation.state)
            rows["prompt_id"].append(task)
            rows["actions"].append(chunk_at(actions, step, options.horizon))
            rows["episode"].append(kept)
        kept += 1
        progress.update(kept, f"{len(rows['state'])} frames, expert success {kept / tried:.2f}")
    count = len(rows["state"])
    meta = {
        "kind": "demos",
        "env": options.env,
        "task": spec.tasks if len(spec.tasks) > 1 else spec.tasks[0],
        "prompts": spec.prompts,
        "cameras": [name for name, _, _ in spec.cameras],
        "params": options.params,
        "seed": options.seed,
        "episodes": kept,
        "stride": options.stride,
        "bias": list(options.bias),
        "noise": options.noise,
        "expert_success": kept / tried,
    }
    tensors = {
        "images": np.stack(rows["images"]),
        "state": np.stack(rows["state"]),
        "prompt_id": np.array(rows["prompt_id"], dtype=np.int64),
        "actions": np.stack(rows["actions"]).astype(np.float32),
        "episode": np.array(rows["episode"], dtype=np.int64),
    }
    safetensors.write(options.out, tensors, meta)
    elapsed = time.monotonic() - start
    print(f"demos: {kept} episodes, {count} frames, expert success {kept / tried:.3f}, {count / elapsed:.1f} frames/s, written to {options.out}")


def write_scenes(options: Any) -> None:
    """Runs the command `scenes`: writes images of random scenes with the positions of named object, goal and gripper.

    Tensors: images u8 [N, cameras, h, w, 3], state f32 [N, D], prompt_id i64 [N], keypoints f32 [N, cameras * 3, 2] (camera-major;
    named object, goal, gripper; 0..1, x right, y down), positions f32 [N, 3, 3] in meters.
    """
    env = make(options.env, options.params)
    spec = env.spec()
    rows: dict[str, list] = {name: [] for name in ("images", "state", "prompt_id", "keypoints", "positions")}
    progress = Progress("scenes", options.count)
    start = time.monotonic()
    low, high = env.workspace()
    for index in range(options.count):
        visit, part = divmod(index, options.per_reset)
        random = scene_generator([options.seed, SCENE_FIRST_ENV, visit, part, NOISE_STREAM])
        if part == 0:
            env.reset_scene(options.seed, SCENE_FIRST_ENV, visit, task=visit % len(spec.tasks))
        wander(env, random, low, high, options.steps)
        observation = env.observe()
        keypoints, positions = env.keypoints()
        rows["images"].append(np.stack(observation.images))
        rows["state"].append(observation.state)
        rows["prompt_id"].append(env.task_index)
        rows["keypoints"].append(keypoints.reshape(-1, 2))
        rows["positions"].append(positions)
        progress.update(index + 1)
    cameras = [name for name, _, _ in spec.cameras]
    meta = {
        "kind": "scenes",
        "env": options.env,
        "task": spec.tasks if len(spec.tasks) > 1 else spec.tasks[0],
        "prompts": spec.prompts,
        "cameras": cameras,
        "keypoints": [f"{camera}/{point}" for camera in cameras for point in ("named", "goal", "gripper")],
        "positions": ["named", "goal", "gripper"],
        "params": options.params,
        "seed": options.seed,
    }
    tensors = {
        "images": np.stack(rows["images"]),
        "state": np.stack(rows["state"]),
        "prompt_id": np.array(rows["prompt_id"], dtype=np.int64),
        "keypoints": np.stack(rows["keypoints"]),
        "positions": np.stack(rows["positions"]),
    }
    safetensors.write(options.out, tensors, meta)
    elapsed = time.monotonic() - start
    print(f"scenes: {options.count} scenes, {options.count / elapsed:.1f} scenes/s, written to {options.out}")


def wander(env: Any, random: np.random.Generator, low: np.ndarray, high: np.ndarray, steps: int) -> None:
    """Moves the gripper for `steps` env steps toward a random target.

    The target is anywhere in the box or, with probability 1/3, near the named object or the goal.
    """
    positions = env.positions()
    if random.random() < 1 / 3:
        target = positions[random.integers(2)] + 0.04 * random.standard_normal(3)
    else:
        target = random.uniform(low, high)
    grip = random.uniform(-1.0, 1.0)
    for _ in range(steps):
        motion = np.clip((target - env.positions()[2]) * 20.0, -1.0, 1.0)
        env.nudge(np.array([*motion, grip], dtype=np.float32))


def check_expert(options: Any) -> None:
    """Runs the command `check-expert`: prints the expert's success per task in this adapter, on the seeds of `demos`."""
    env = make(options.env, options.params)
    spec = env.spec()
    demonstrator = Demonstrator(np.array(options.bias, dtype=np.float64), options.noise)
    for task, name in enumerate(spec.tasks):
        progress = Progress(f"check-expert {name}", options.episodes)
        steps: list[int] = []
        for episode in range(options.episodes):
            success, actions = expert_episode(env, demonstrator, (options.seed, DEMO_FIRST_ENV, episode), task, options.chunk)
            if success:
                steps.append(len(actions))
            progress.update(episode + 1, f"success {len(steps) / (episode + 1):.2f}")
        median, p95 = (np.percentile(steps, [50, 95]) if steps else (float("nan"),) * 2)
        print(
            f"check-expert: {name} success {len(steps)}/{options.episodes} = {len(steps) / options.episodes:.3f}, "
            f"steps median {median:.0f}, 95 % {p95:.0f}, limit {env.limit(task)}"
        )
