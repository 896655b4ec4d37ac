"""Env worker for simulators that exist in Python alone: it speaks pirl's wire protocol and runs no policy."""

import os

# read by MuJoCo when it is first imported: draw without a display
os.environ.setdefault("MUJOCO_GL", "egl")
# Mesa's software renderer: one thread per process, since env workers are many
os.environ.setdefault("LP_NUM_THREADS", "1")
