"""Tests of the wire frames byte by byte, and of a worker process against an engine in this test."""

import json
import pathlib
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import unittest

import msgpack
import numpy as np
import zmq

from pirl_env_worker import wire
from pirl_env_worker.envs.base import EnvError
from pirl_env_worker.worker import camera_order, check_endpoint

HERE = pathlib.Path(__file__).resolve().parent
TIMEOUT_MS = 30_000


VERSION = 4


def frame(message, version=VERSION):
    payload = msgpack.packb(message)
    return b"PIRL" + struct.pack("<HHI", version, 0, len(payload)) + payload


def f32(*rows):
    values = np.array(rows, "<f4")
    return {"dtype": "f32", "shape": list(values.shape), "data": values.tobytes()}


class WireTest(unittest.TestCase):
    def test_a_hello_is_these_bytes(self):
        # written by hand from the MessagePack specification
        body = (b"\x81" b"\xa5hello" b"\x84" b"\xa6client\xa1w" b"\xa3env\xa3gym" b"\xaaaction_dim\x04" b"\xa5slots\x02")
        want = b"PIRL" + struct.pack("<HHI", VERSION, 0, len(body)) + body
        self.assertEqual(wire.encode("hello", {"client": "w", "env": "gym", "action_dim": 4, "slots": 2}), want)

    def test_numbers_with_a_point_are_single_floats_and_arrays_are_little_endian(self):
        got = wire.encode("x", {"rewards": [1.5], "images": [wire.array(np.array([[1, 2]], np.uint8)), None]})
        self.assertIn(b"\xa7rewards\x91\xca\x3f\xc0\x00\x00", got)
        self.assertIn(b"\x83\xa5dtype\xa2u8\xa5shape\x92\x01\x02\xa4data\xc4\x02\x01\x02\xc0", got)

    def test_commands_are_read(self):
        reset = {"seed": 2**64 - 1, "env": 3, "episode": 4, "reset_state": None, "task": 1, "group": None, "video": False}
        name, body = wire.decode(frame({"commands": [{"slot": 0, "command": {"reset": reset}}, {"slot": 1, "command": {"act": f32([1, 2], [3, 4])}}]}))
        self.assertEqual((name, body[0]), ("commands", {"slot": 0, "command": ("reset", reset)}))
        np.testing.assert_array_equal(body[1]["command"][1], [[1, 2], [3, 4]])

    def test_broken_frames_are_refused_with_the_rule(self):
        good = frame({"refused": {"request": None, "retry": True, "reason": "x"}})
        act = lambda array: frame({"commands": [{"slot": 0, "command": {"act": array}}]})
        cases = [
            (b"", "shorter than the header"),
            (b"HTTP" + good[4:], "another protocol"),
            (frame({}, version=9), f"wire version 9, expected {VERSION}"),
            (good[:-1], "announces"),
            (good + b"\0", "announces"),
            (b"PIRL" + struct.pack("<HHI", VERSION, 0, 1) + b"\xc1", "no MessagePack"),
            (b"PIRL" + struct.pack("<HHI", VERSION, 0, 5000) + b"\x91" * 5000, "no MessagePack"),
            (frame({"welcom": {}}), "welcome"),
            (frame({"refused": {"request": None, "retry": 1, "reason": "x"}}), "`refused.retry`: expected true or false"),
            (frame({"refused": {"request": -1, "retry": True, "reason": "x"}}), "unsigned 64-bit"),
            (frame({"refused": {"request": 1, "retry": True, "reason": "x", "more": 1}}), "more"),
            (act({"dtype": "f32", "shape": [2, 4], "data": b"\0" * 31}), "32 bytes of shape"),
            (act({"dtype": "f64", "shape": [1], "data": b"\0" * 8}), "`f32` or `u8`"),
            (act({"dtype": "f32", "shape": [2**32 - 1] * 9, "data": b""}), "bytes of shape"),
        ]
        for bytes_, text in cases:
            with self.assertRaisesRegex(wire.WireError, text.replace("[", r"\[")):
                wire.decode(bytes_)


class RulesTest(unittest.TestCase):
    def test_cameras_go_by_name_else_in_order(self):
        self.assertEqual(camera_order(["b", "a"], ["a", "b", "c"]), [1, 0, None])
        self.assertEqual(camera_order(["side"], ["base", "wrist"]), [0, None])
        with self.assertRaises(EnvError):
            camera_order(["side", "top"], ["base"])
        with self.assertRaisesRegex(EnvError, r"no camera \['side'\].*found \['base', 'side'\], expected names of \['base', 'wrist'\]"):
            camera_order(["base", "side"], ["base", "wrist"])

    def test_only_loopback_is_an_endpoint(self):
        for good in ("tcp://127.0.0.1:5", "tcp://localhost:5", "tcp://[::1]:5"):
            check_endpoint(good)
        for bad in ("127.0.0.1:5", "tcp://127.0.0.1", "tcp://127.0.0.1:x", "tcp://10.0.0.1:5", "tcp://example.org:5"):
            with self.assertRaises(EnvError):
                check_endpoint(bad)


#: A module for `--params {"import": ...}`: state and image brightness count env steps; the third succeeds if the action is positive.
COUNTER = """
import gymnasium, numpy as np
class Counter(gymnasium.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 1}
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    observation_space = gymnasium.spaces.Box(-9, 9, (1,), np.float32)
    def __init__(self, render_mode=None): self.render_mode = render_mode
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed); self.n = 0
        return np.zeros(1, np.float32), {}
    def step(self, action):
        self.n += 1
        done = self.n == 3 and action[0] > 0
        return np.array([self.n], np.float32), float(done), done, False, {}
    def render(self): return np.full((4, 4, 3), self.n, np.uint8)
gymnasium.register("pirl-test/Counter-v0", Counter)
"""


class Engine:
    """ROUTER on a fixed port that checks the frames with its own parser."""

    def __init__(self, context, port):
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.endpoint = f"tcp://127.0.0.1:{port}"
        self.socket.bind(self.endpoint)
        self.peer = None

    def receive(self):
        if not self.socket.poll(TIMEOUT_MS):
            raise AssertionError("the worker is silent")
        self.peer, body = self.socket.recv_multipart()
        magic, version, zero, length = struct.unpack_from("<4sHHI", body)
        assert (magic, version, zero, length) == (b"PIRL", VERSION, 0, len(body) - 12)
        return msgpack.unpackb(body[12:])

    def send(self, message):
        self.socket.send_multipart([self.peer, message if isinstance(message, bytes) else frame(message)])

    def welcome(self):
        self.send({"welcome": {"version": 7, "action_chunk": 2, "env_action_dim": 2, "cameras": ["base", "wrist"]}})
        assert self.receive() == {"reports": [{"slot": s, "outcome": None, "observation": None} for s in (0, 1)]}

    def reset(self, slot, video=False):
        reset = {"seed": 1, "env": slot, "episode": 0, "reset_state": None, "task": None, "group": None, "video": video}
        return {"slot": slot, "command": {"reset": reset}}

    def close(self):
        """Closes the socket; the port is free on return."""
        if self.socket.closed:
            return
        monitor = self.socket.get_monitor_socket(zmq.EVENT_CLOSED)
        self.socket.unbind(self.endpoint)
        monitor.poll(TIMEOUT_MS)
        self.socket.disable_monitor()
        monitor.close(0)
        self.socket.close(0)


class WorkerTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        (self.folder / "counter_env.py").write_text(textwrap.dedent(COUNTER))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.context = zmq.Context()
        self.addCleanup(self.context.destroy, 0)

    def start(self, slots=2):
        params = {"id": "pirl-test/Counter-v0", "import": "counter_env", "image_size": 2, "prompt": "count", "max_episode_steps": 5}
        command = [sys.executable, "-m", "pirl_env_worker", "serve", "--engine", f"tcp://127.0.0.1:{self.port}", "--env", "gym",
            "--params", json.dumps(params), "--num-envs", str(slots), "--name", "w1"]
        paths = {"PYTHONPATH": f"{HERE.parent}:{self.folder}", "PATH": "/usr/bin:/bin"}
        process = subprocess.Popen(command, env=paths, stderr=subprocess.PIPE, text=True)
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def meet(self):
        engine = Engine(self.context, self.port)
        self.addCleanup(engine.close)
        self.assertEqual(engine.receive(), {"hello": {"client": "w1", "env": "gym", "action_dim": 2, "slots": 2}})
        engine.welcome()
        return engine

    def finish(self, process, number=signal.SIGTERM):
        process.send_signal(number)
        _, log = process.communicate(timeout=30)
        self.assertEqual(process.returncode, 0, log)
        self.assertNotIn("Traceback", log)
        return log

    def test_an_episode_to_success_and_one_to_the_time_limit(self):
        process = self.start()
        engine = self.meet()
        picture = lambda n: {"dtype": "u8", "shape": [2, 2, 3], "data": bytes([n] * 12)}
        seen = lambda n: {"images": [picture(n), None], "state": [float(n)], "prompt": "count"}
        engine.send({"commands": [engine.reset(0), engine.reset(1, video=True)]})
        self.assertEqual(engine.receive(), {"reports": [{"slot": s, "outcome": None, "observation": seen(0)} for s in (0, 1)]})

        go, stay = f32([1, 0], [1, 0]), f32([-1, 0], [-1, 0])
        engine.send({"commands": [{"slot": 1, "command": {"act": stay}}, {"slot": 0, "command": {"act": go}}]})
        reports = engine.receive()["reports"]
        self.assertEqual([r["slot"] for r in reports], [1, 0])
        quiet = {"rewards": [0.0, 0.0], "terminated": False, "truncated": False, "success": False}
        video = lambda n: {"dtype": "u8", "shape": [4, 4, 3], "data": bytes([n] * 48)}
        self.assertEqual(reports[0], {"slot": 1, "outcome": {**quiet, "frames": [video(1), video(2)]}, "observation": seen(2)})
        self.assertEqual(reports[1], {"slot": 0, "outcome": {**quiet, "frames": []}, "observation": seen(2)})

        engine.send({"commands": [{"slot": 0, "command": {"act": go}}]})
        done = {"rewards": [1.0], "terminated": True, "truncated": False, "success": True, "frames": []}
        self.assertEqual(engine.receive(), {"reports": [{"slot": 0, "outcome": done, "observation": seen(3)}]})
        engine.send({"commands": [{"slot": 1, "command": {"act": stay}}]})
        engine.receive()
        engine.send({"commands": [{"slot": 1, "command": {"act": stay}}]})
        late = {"rewards": [0.0], "terminated": False, "truncated": True, "success": False, "frames": [video(5)]}
        self.assertEqual(engine.receive(), {"reports": [{"slot": 1, "outcome": late, "observation": seen(5)}]})
        self.finish(process)

    def test_it_waits_for_an_engine_and_says_hello_again_after_each_loss(self):
        process = self.start()
        self.assertIn("waiting for the engine", process.stderr.readline())
        for _ in range(2):
            engine = self.meet()
            engine.send({"commands": [engine.reset(0)]})
            engine.receive()
            engine.close()
        log = self.finish(process)
        self.assertIn("the engine is gone; connecting again", log)

    def test_a_malformed_frame_is_one_line_and_a_fresh_hello(self):
        process = self.start()
        engine = self.meet()
        engine.send(b"PIRL" + struct.pack("<HHI", VERSION, 0, 5) + b"\x81")
        self.assertIn("hello", engine.receive())
        engine.welcome()
        log = self.finish(process, signal.SIGINT)
        self.assertEqual(log.count("frame announces 5 payload bytes and carries 1; connecting again"), 1)

    def test_an_engine_that_does_not_know_it_hears_hello_again(self):
        process = self.start()
        engine = self.meet()
        engine.send({"refused": {"request": None, "retry": True, "reason": "say hello first"}})
        self.assertIn("hello", engine.receive())
        engine.welcome()
        self.assertIn("say hello first; connecting again", self.finish(process))

    def test_a_policy_of_another_width_ends_it_with_one_line(self):
        process = self.start()
        engine = Engine(self.context, self.port)
        self.addCleanup(engine.close)
        engine.receive()
        engine.send({"welcome": {"version": 7, "action_chunk": 2, "env_action_dim": 3, "cameras": ["base"]}})
        _, log = process.communicate(timeout=30)
        self.assertEqual(process.returncode, 1)
        self.assertIn("the policy's actions have 3 numbers, the environment's 2", log.splitlines()[-1])
        self.assertNotIn("Traceback", log)

    def test_another_release_ends_it_with_one_line(self):
        process = self.start()
        engine = Engine(self.context, self.port)
        self.addCleanup(engine.close)
        engine.receive()
        engine.send(frame({}, version=VERSION + 1))
        _, log = process.communicate(timeout=30)
        self.assertEqual(process.returncode, 1)
        self.assertIn(f"wire version {VERSION + 1}, expected {VERSION}", log.splitlines()[-1])


if __name__ == "__main__":
    unittest.main()
