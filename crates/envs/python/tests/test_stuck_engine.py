"""Tests that an engine with a stuck server thread reports the failure in /healthz, and still ends on SIGTERM."""

import ctypes
import os
import signal
import time
import unittest
import urllib.error
import urllib.request

from programs import ProgramTest

PTRACE_ATTACH = 16
#: Option of waitpid for a thread that this process did not create.
WALL = 0x40000000
#: Longer than the engine's own limits: 5 s until the report, 9 s until the forced end.
PATIENCE = 20


class StuckEngineTest(ProgramTest):
    def healthz(self, http):
        try:
            with urllib.request.urlopen(f"http://{http}/healthz", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def test_a_server_that_stands_still_is_said_and_ended(self):
        process, endpoints = self.engine()
        self.assertEqual(self.healthz(endpoints["http"]), (503, "no policy is live yet\n"))
        # stops only the main thread, which runs the server's loop
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.ptrace(PTRACE_ATTACH, process.pid, None, None) != 0:
            self.skipTest(f"a thread cannot be stopped here: {os.strerror(ctypes.get_errno())}")
        os.waitpid(process.pid, WALL)
        end = time.monotonic() + PATIENCE
        while "the server's loop has not moved" not in self.healthz(endpoints["http"])[1]:
            self.assertLess(time.monotonic(), end, "the engine does not report the failure")
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(PATIENCE), 1)


if __name__ == "__main__":
    unittest.main()
