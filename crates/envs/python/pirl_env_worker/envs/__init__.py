"""The environments that a worker can drive, by name."""

from __future__ import annotations

from typing import Any

from .base import ChunkEnv, EnvError

#: Simulators that published recipes use and no adapter drives yet, with the reason.
WITHOUT_ADAPTER = {
    "calvin": "its scenes and task oracle come from a source checkout of calvin_env, not from a package",
    "maniskill": "the tasks `PutOnPlateInScene25*` and their meshes are no part of the package mani_skill",
}

#: Names accepted by `make`.
NAMES = ("calvin", "gym", "libero", "maniskill", "metaworld")


def make(name: str, params: dict[str, Any]) -> ChunkEnv:
    """One environment. Raises `EnvError` for an unknown name or parameter. The simulator is imported only here."""
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
