"""Test base class that starts the programs of this release and ends all of them with the test."""

import json
import pathlib
import socket
import subprocess
import tempfile
import time
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[4]
PROGRAMS = ROOT / "target/release"
START_SECONDS = 20


@unittest.skipUnless((PROGRAMS / "rollout-engine").is_file(), "the programs are not built: scripts/setup")
class ProgramTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def start(self, name, *arguments):
        log = open(self.folder / f"{name}.log", "wb")
        self.addCleanup(log.close)
        process = subprocess.Popen([PROGRAMS / name, *arguments], stderr=log, cwd=ROOT)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def engine(self):
        """Starts an engine without policy and learner; returns its process and its endpoints `listen` and `http`."""
        endpoints = self.folder / "endpoints.json"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            absent = free.getsockname()[1]
        process = self.start(
            "rollout-engine", "serve", "--config", "configs/quickstart.toml", "--learner", f"tcp://127.0.0.1:{absent}",
            "--state-dir", str(self.folder / "engine"), "--endpoints-file", str(endpoints),
        )
        end = time.monotonic() + START_SECONDS
        while not endpoints.exists():
            self.assertLess(time.monotonic(), end, "the engine opened no endpoint")
            time.sleep(0.02)
        return process, json.loads(endpoints.read_text())
