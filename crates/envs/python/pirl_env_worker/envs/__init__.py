"""The environments that a worker can drive, by name."""

from __future__ import annotations

from typing import Any

from .base import ChunkEnv, EnvError

#: Names accepted by `make`.
NAMES = ("gym", "metaworld")


def make(name: str, params: dict[str, Any]) -> ChunkEnv:
    """One environment. Raises `EnvError` for an unknown name or parameter. The simulator is imported only here."""
    if name == "metaworld":
        from .metaworld_env import MetaWorldEnv

        return MetaWorldEnv(params)
    if name == "gym":
        from .gym_env import GymEnv

        return GymEnv(params)
    raise EnvError(f"unknown environment `{name}`, expected one of {', '.join(f'`{n}`' for n in NAMES)}")
