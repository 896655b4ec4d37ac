#!/usr/bin/env python3
"""Draws one frame of MetaWorld without a display; fails with the reason. Needs crates/envs/python on PYTHONPATH."""

from pirl_env_worker.envs import make

frame = make("metaworld", {}).reset(0, 0, 0).images[0]
assert frame.std() > 5, "the frame is blank"
