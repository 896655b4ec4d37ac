"""Interface of environments: reset from a key, step an action chunk, observe once."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Callable, Iterable, Protocol

import numpy as np


class EnvError(Exception):
    """Failure to make or step an environment; the text is one lower-case fragment with the remedy."""


@dataclasses.dataclass
class EnvSpec:
    """Sizes and limits of an environment, constant over its life."""

    #: (name, height px, width px) of every image, in the order of `Observation.images`
    cameras: list[tuple[str, int, int]]
    state_dim: int
    action_dim: int
    #: time limit in env steps; an episode that reaches it is truncated
    max_episode_steps: int
    #: names of the tasks that `reset` can choose from
    tasks: list[str]
    #: instruction of each task, one sentence
    prompts: list[str]


@dataclasses.dataclass
class Observation:
    """Observation of the policy: images uint8 [h, w, 3] (row 0 on top), state float32 [state_dim], instruction (one sentence)."""

    images: list[np.ndarray]
    state: np.ndarray
    prompt: str


@dataclasses.dataclass
class ChunkResult:
    """Outcome of one action chunk."""

    #: reward of each executed env step; shorter than the chunk if the episode ended within the chunk
    rewards: list[float]
    #: the task was solved (or failed for good): no value is bootstrapped
    terminated: bool
    #: the time limit was reached: a value is bootstrapped
    truncated: bool
    success: bool


class ChunkEnv(Protocol):
    """One environment, stepped by whole action chunks; frames are rendered once per `observe`, never per step."""

    def spec(self) -> EnvSpec: ...

    def reset(self, seed: int, env: int, episode: int, reset_state: int | None = None, task: int | None = None) -> Observation:
        """Starts the episode of the key (seed, env, episode); equal keys give equal observations, whatever ran before.

        With `reset_state`, (seed, reset_state) selects the scene, the same in every env of a group. `task` is an index into
        `EnvSpec.tasks`. If `task` is None, the index is `reset_state`, or else `env`, modulo the number of tasks.
        """

    def step_chunk(self, actions: np.ndarray) -> ChunkResult:
        """Executes actions f32 [n, action_dim] in order and stops after the step that ends the episode."""

    def observe(self) -> Observation:
        """Returns the current observation; renders every camera once."""

    def render(self) -> np.ndarray:
        """Returns a video frame, uint8 [h, w, 3], which may be larger than the policy's images."""

    def close(self) -> None: ...


#: Second word of a key made from a group's reset state. No env index is as large, so that the streams are distinct.
RESET_STATE_STREAM = 0xFFFF_FFFF_FFFF_FFFF


def scene_key(seed: int, env: int, episode: int, reset_state: int | None) -> list[int]:
    """Returns the entropy words of one episode's scene."""
    if reset_state is not None:
        return [seed, RESET_STATE_STREAM, reset_state]
    return [seed, env, episode]


def scene_generator(key: list[int]) -> np.random.Generator:
    """Returns a generator whose stream depends only on the key."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def checked_actions(actions: np.ndarray, action_dim: int, low: np.ndarray | float, high: np.ndarray | float) -> np.ndarray:
    """Returns actions as f32 [n, action_dim] clipped to the box. Raises `EnvError` for another shape or a nonfinite value."""
    array = np.asarray(actions, dtype=np.float32)
    if array.ndim != 2 or array.shape[1] != action_dim:
        raise EnvError(f"expected actions of shape [n, {action_dim}], found {list(array.shape)}")
    if not np.isfinite(array).all():
        raise EnvError("actions hold a value that is not finite")
    return np.clip(array, low, high)


def stepped(actions: np.ndarray, step: Callable[[np.ndarray], tuple[float, bool, bool, bool]]) -> ChunkResult:
    """Executes a chunk until the episode ends; `step` returns reward, terminated, truncated and success of one action."""
    result = ChunkResult([], False, False, False)
    for action in actions:
        reward, result.terminated, result.truncated, result.success = step(action)
        result.rewards.append(reward)
        if result.terminated or result.truncated:
            break
    return result


def refuse_unknown(params: dict[str, Any], known: Iterable[str]) -> None:
    """Raises `EnvError` that names the first unknown parameter and the nearest known parameter."""
    names = sorted(known)
    for key in params:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"expected one of {', '.join(f'`{n}`' for n in names)}"
            raise EnvError(f"unknown environment parameter `{key}`, {hint}")


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns a box-filtered copy of a uint8 [h, w, 3] image; the sizes need not divide each other."""
    if image.shape[:2] == (height, width):
        return np.ascontiguousarray(image)
    if image.shape[0] % height == 0 and image.shape[1] % width == 0:
        fy, fx = image.shape[0] // height, image.shape[1] // width
        sums = image.reshape(height, fy, width, fx, 3).sum(axis=(1, 3), dtype=np.uint32)
        return ((sums + fy * fx // 2) // (fy * fx)).astype(np.uint8)
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))
