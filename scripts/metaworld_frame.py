#!/usr/bin/env python3
"""Draw one frame of MetaWorld without a display; fails with the reason when that does not work. Needs crates/envs/python on PYTHONPATH."""

from pirl_env_worker.envs import make

frame = make("metaworld", {}).reset(0, 0, 0).images[0]
assert frame.std() > 5, "the frame is blank"
