"""Env worker for simulators that exist only in Python; speaks pirl's wire protocol and runs no policy."""

import os

# MuJoCo reads this at its first import: render without a display
os.environ.setdefault("MUJOCO_GL", "egl")
# Mesa's software renderer: one thread per process, because there are many env workers
os.environ.setdefault("LP_NUM_THREADS", "1")
