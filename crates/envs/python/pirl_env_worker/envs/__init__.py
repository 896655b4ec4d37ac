"""Environments that a worker can drive, by name."""

from __future__ import annotations

from typing import Any

from .base import ChunkEnv, EnvError

#: Simulators of published recipes that have no adapter yet, with the reason.
WITHOUT_ADAPTER = {
    "behavior": "BEHAVIOR-1K needs Isaac Sim, OmniGibson and its scenes, which no package holds",
    "calvin": "its scenes and task oracle come from a source checkout of calvin_env, not from a package",
    "gsenv": "its splats and robot come from a source checkout of ManiSkill-GS, not from a package",
    "isaaclab": "the task `Isaac-Stack-Cube-Franka-IK-Rel-Visuomotor-Rewarded-v0` is in RLinf's fork of Isaac Lab and needs Isaac Sim",
    "maniskill": "the tasks `PutOnPlateInScene25*` and their meshes are not part of the package mani_skill",
    "robotwin": "its tasks and assets come from a source checkout of RoboTwin, not from a package",
}

#: Names accepted by `make`.
NAMES = tuple(sorted(["gym", "libero", "metaworld", *WITHOUT_ADAPTER]))


def make(name: str, params: dict[str, Any]) -> ChunkEnv:
    """Returns one environment, importing its simulator. Raises `EnvError` for an unknown name or parameter."""
    if name == "metaworld":
        from .metaworld_env import MetaWorldEnv

        return MetaWorldEnv(params)
    if name == "gym":
        from .gym_env import GymEnv

        return GymEnv(params)
    if name == "libero":
        from .libero_env import LiberoEnv

        return LiberoEnv(params)
    if name in WITHOUT_ADAPTER:
        raise EnvError(f"environment `{name}` has no adapter yet: {WITHOUT_ADAPTER[name]}; to add one, implement `ChunkEnv` as envs/libero_env.py does")
    raise EnvError(f"unknown environment `{name}`, expected one of {', '.join(f'`{n}`' for n in NAMES)}")
