"""General adapter of gymnasium environments with `rgb_array` rendering and a one-dimensional Box action."""

from __future__ import annotations

import importlib
from typing import Any

import gymnasium
import numpy as np

from .base import ChunkResult, EnvError, EnvSpec, Observation, checked_actions, refuse_unknown, resized, scene_generator, scene_key, stepped

PARAMS = {
    "id": None,  # gymnasium id, required
    "import": "",  # module that registers the id, imported first
    "kwargs": {},  # further arguments of gymnasium.make
    "prompt": "",  # the task as a sentence; empty: the id
    "image_size": 64,  # side of the square image in px
    "image_key": "",  # key of the image in a dict observation; empty: the rendered frame
    "state_key": "",  # key of the state in a dict observation; empty: the whole observation if it is a vector
    "success_key": "is_success",  # key in `info`; absent: success is termination
    "max_episode_steps": 200,
}


class GymEnv:
    """One gymnasium environment as a `ChunkEnv`. The state is the observation vector, flattened to float32."""

    def __init__(self, params: dict[str, Any]) -> None:
        refuse_unknown(params, PARAMS)
        self._params = {**PARAMS, **params}
        if not self._params["id"]:
            raise EnvError("environment parameter `id` is missing, give a gymnasium id such as `Pendulum-v1`")
        try:
            if self._params["import"]:
                importlib.import_module(self._params["import"])
            self._env = gymnasium.make(self._params["id"], render_mode="rgb_array", **self._params["kwargs"])
        except (ImportError, gymnasium.error.Error, TypeError) as error:
            raise EnvError(f"make gymnasium environment `{self._params['id']}`: {error}") from error
        box = self._env.action_space
        if not isinstance(box, gymnasium.spaces.Box) or len(box.shape) != 1:
            raise EnvError(f"expected a one-dimensional Box action space, found `{box}`")
        self._low, self._high = box.low, box.high
        self._prompt = self._params["prompt"] or self._params["id"]
        self._observation, _ = self._env.reset(seed=0)
        self._elapsed = 0
        self._over = False
        self._spec = EnvSpec(
            cameras=[("image", self._params["image_size"], self._params["image_size"])],
            state_dim=len(self._state()),
            action_dim=box.shape[0],
            max_episode_steps=int(self._params["max_episode_steps"]),
            tasks=[self._params["id"]],
            prompts=[self._prompt],
        )

    def spec(self) -> EnvSpec:
        return self._spec

    def reset(self, seed: int, env: int, episode: int, reset_state: int | None = None, task: int | None = None) -> Observation:
        del task  # there is only one task
        word = int(scene_generator(scene_key(seed, env, episode, reset_state)).integers(0, 2**31 - 1))
        self._observation, _ = self._env.reset(seed=word)
        self._elapsed = 0
        self._over = False
        return self.observe()

    def step_chunk(self, actions: np.ndarray) -> ChunkResult:
        if self._over:
            raise EnvError("the episode is over, reset before the next chunk")
        return stepped(checked_actions(actions, self._spec.action_dim, self._low, self._high), self._step)

    def _step(self, action: np.ndarray) -> tuple[float, bool, bool, bool]:
        self._observation, reward, terminated, truncated, info = self._env.step(action.astype(self._env.action_space.dtype))
        self._elapsed += 1
        success = bool(info.get(self._params["success_key"], terminated))
        truncated = not terminated and (bool(truncated) or self._elapsed >= self._spec.max_episode_steps)
        self._over = bool(terminated) or truncated
        return float(reward), bool(terminated), truncated, success

    def observe(self) -> Observation:
        size = self._params["image_size"]
        key = self._params["image_key"]
        frame = self._observation[key] if key else self._env.render()
        return Observation([resized(np.asarray(frame, dtype=np.uint8), size, size)], self._state(), self._prompt)

    def render(self) -> np.ndarray:
        return np.ascontiguousarray(self._env.render())

    def close(self) -> None:
        self._env.close()

    def _state(self) -> np.ndarray:
        key = self._params["state_key"]
        observation = self._observation
        if key:
            observation = observation[key]
        elif isinstance(observation, dict):
            raise EnvError(f"the observation is a dict, set `state_key` to one of {sorted(observation)}")
        return np.asarray(observation, dtype=np.float32).reshape(-1)
