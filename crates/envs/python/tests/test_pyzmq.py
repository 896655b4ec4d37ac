"""Tests of this release against pyzmq: a pyzmq ROUTER and `env-worker`, pyzmq clients and `rollout-engine`."""

import struct
import unittest

import msgpack
import zmq

from pirl_env_worker.wire import WIRE_VERSION
from programs import ProgramTest

TIMEOUT_MS = 20_000
#: Shorter than the silence below: the other side must answer PINGs to stay connected.
HEARTBEAT_MS = 100
SILENCE_MS = 1000


def frame(message):
    payload = msgpack.packb(message)
    return struct.pack("<4sHHI", b"PIRL", WIRE_VERSION, 0, len(payload)) + payload


def unframe(body):
    assert struct.unpack_from("<4sHHI", body) == (b"PIRL", WIRE_VERSION, 0, len(body) - 12)
    return msgpack.unpackb(body[12:])


class PyzmqTest(ProgramTest):
    def setUp(self):
        super().setUp()
        self.context = zmq.Context()
        self.addCleanup(self.context.destroy, 0)

    def socket(self, kind):
        made = self.context.socket(kind)
        self.addCleanup(made.close, 0)
        made.setsockopt(zmq.LINGER, 0)
        made.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        made.setsockopt(zmq.HEARTBEAT_TIMEOUT, 3 * HEARTBEAT_MS)
        return made

    def receive(self, of):
        self.assertTrue(of.poll(TIMEOUT_MS), "nothing came")
        return of.recv_multipart()

    def test_a_pyzmq_router_leads_an_env_worker(self):
        router = self.socket(zmq.ROUTER)
        port = router.bind_to_random_port("tcp://127.0.0.1")
        self.start("env-worker", "serve", "--engine", f"tcp://127.0.0.1:{port}", "--num-envs", "64", "--name", "w")
        peer, body = self.receive(router)
        hello = unframe(body)["hello"]
        self.assertEqual((hello["client"], hello["slots"]), ("w", 64))
        say = lambda message: router.send_multipart([peer, frame(message)])
        say({"welcome": {"version": 7, "action_chunk": 2, "env_action_dim": 3, "cameras": ["base"]}})
        self.assertEqual(len(unframe(self.receive(router)[1])["reports"]), 64)
        # silent except for PINGs: a connection without PONGs would reconnect and send another hello
        self.assertFalse(router.poll(SILENCE_MS))
        reset = lambda slot: {"seed": 1, "env": slot, "episode": 0, "reset_state": None, "task": None, "group": None, "video": False}
        say({"commands": [{"slot": slot, "command": {"reset": reset(slot)}} for slot in range(64)]})
        again, body = self.receive(router)
        self.assertEqual(again, peer)
        self.assertGreater(len(body), 64 * 32 * 32 * 3, "an image of each slot")
        self.assertEqual([report["slot"] for report in unframe(body)["reports"]], list(range(64)))

    def act(self, request, pixels):
        image = {"dtype": "u8", "shape": [pixels], "data": bytes(pixels)}
        key = {"seed": 0, "env": 0, "episode": 0, "chunk": 0}
        row = {"observation": {"images": [image], "state": [0.0], "prompt": "pick red"}, "key": key, "mode": "eval",
            "record": False, "guidance": None}
        return frame({"act": {"request": request, "rows": [row]}})

    def test_pyzmq_clients_are_answered_by_an_engine(self):
        _, endpoints = self.engine()
        for kind in (zmq.DEALER, zmq.REQ):
            client = self.socket(kind)
            client.connect(endpoints["listen"])
            # small, larger than the read-ahead buffer, larger than a socket's buffers
            for request, pixels in enumerate((3, 100_000, 8 << 20)):
                client.send(self.act(request, pixels))
                (body,) = self.receive(client)
                refused = unframe(body)["refused"]
                self.assertEqual((refused["request"], refused["retry"]), (request, True))
            # the engine answers PINGs: the connection and the order of requests outlive the silence
            self.assertFalse(client.poll(SILENCE_MS))
            client.send(b"junk")
            self.assertIn("shorter than the header", unframe(self.receive(client)[0])["refused"]["reason"])


if __name__ == "__main__":
    unittest.main()
