"""Off-screen rendering with MuJoCo: one graphics context per model file and size, shared by all environments of a process."""

from __future__ import annotations

import dataclasses

import mujoco
import numpy as np


@dataclasses.dataclass(frozen=True)
class Camera:
    """Camera of a frame: a camera of the model (`fixed`, moved to `position` if given) or a free camera around `lookat`."""

    name: str
    #: vertical field of view in degrees
    fovy: float
    fixed: str | None = None
    #: meters, in the frame of the camera's body
    position: tuple[float, float, float] | None = None
    #: whether both image axes are reversed
    flipped: bool = False
    #: meters, world
    lookat: tuple[float, float, float] = (0.0, 0.0, 0.0)
    #: meters
    distance: float = 1.0
    #: degrees
    azimuth: float = 0.0
    elevation: float = 0.0


class FrameRenderer:
    """Renderer of any `MjData` of one model file. `quality`: `full` (shadows, reflections, 4 samples, as modeled) or `fast` (none)."""

    _shared: dict[tuple, "FrameRenderer"] = {}

    @classmethod
    def shared(cls, key: str, model: mujoco.MjModel, size: int, quality: str) -> "FrameRenderer":
        """Returns the process's renderer of the model file `key`. Uploads textures and meshes once; models may differ in poses."""
        entry = (key, size, quality)
        if entry not in cls._shared:
            cls._shared[entry] = cls(model, size, quality)
        return cls._shared[entry]

    def __init__(self, model: mujoco.MjModel, size: int, quality: str) -> None:
        self._fast = quality == "fast"
        self._rect = mujoco.MjrRect(0, 0, size, size)
        self._pixels = np.empty((size, size, 3), dtype=np.uint8)
        kept = (model.vis.quality.offsamples, model.vis.quality.shadowsize, model.vis.global_.offwidth, model.vis.global_.offheight)
        if self._fast:
            model.vis.quality.offsamples = 0
            model.vis.quality.shadowsize = 0
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        self._gl = mujoco.GLContext(size, size)
        self._gl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        (model.vis.quality.offsamples, model.vis.quality.shadowsize, model.vis.global_.offwidth, model.vis.global_.offheight) = kept
        self._scene = mujoco.MjvScene(model, maxgeom=10_000)
        self._options = mujoco.MjvOption()
        if self._fast:
            self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0

    def frame(self, model: mujoco.MjModel, data: mujoco.MjData, camera: Camera) -> np.ndarray:
        """Returns one frame, uint8 [size, size, 3], row 0 on top."""
        self._gl.make_current()
        self._place(model, data, camera)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        mujoco.mjr_render(self._rect, self._scene, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._rect, self._context)
        # OpenGL's row 0 is the bottom
        return self._pixels[:, ::-1].copy() if camera.flipped else self._pixels[::-1].copy()

    def project(self, model: mujoco.MjModel, data: mujoco.MjData, camera: Camera, points: np.ndarray) -> np.ndarray:
        """Returns image coordinates f32 [p, 2] of world points f64 [p, 3] in meters.

        Coordinates run from 0 to 1 (x right, y down); points outside the frame have coordinates outside 0..1.
        Pinhole: with depth d = f . (p - o), x = 1/2 + r . (p - o) / (2 d tan(fovy / 2)) and y = 1/2 - u . (p - o) / (2 d tan(fovy / 2)),
        for a square image with camera origin o and unit vectors f forward, u up, r = f x u.
        """
        self._place(model, data, camera)
        eyes = self._scene.camera
        origin = (np.array(eyes[0].pos) + np.array(eyes[1].pos)) / 2
        forward = np.array(eyes[0].forward)
        up = np.array(eyes[0].up)
        offset = np.asarray(points, dtype=np.float64) - origin
        scale = 2 * np.maximum(offset @ forward, 1e-6) * np.tan(np.radians(camera.fovy) / 2)
        x = 0.5 + offset @ np.cross(forward, up) / scale
        y = 0.5 - offset @ up / scale
        if camera.flipped:
            x, y = 1 - x, 1 - y
        return np.stack([x, y], axis=1).astype(np.float32)

    def _place(self, model: mujoco.MjModel, data: mujoco.MjData, camera: Camera) -> None:
        view = mujoco.MjvCamera()
        if camera.fixed is None:
            view.type = mujoco.mjtCamera.mjCAMERA_FREE
            view.lookat[:] = camera.lookat
            view.distance, view.azimuth, view.elevation = camera.distance, camera.azimuth, camera.elevation
            model.vis.global_.fovy = camera.fovy
        else:
            view.type = mujoco.mjtCamera.mjCAMERA_FIXED
            view.fixedcamid = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, camera.fixed)
            model.cam_fovy[view.fixedcamid] = camera.fovy
            if camera.position is not None:
                model.cam_pos[view.fixedcamid] = camera.position
                mujoco.mj_camlight(model, data)
        mujoco.mjv_updateScene(model, data, self._options, None, view, mujoco.mjtCatBit.mjCAT_ALL.value, self._scene)
