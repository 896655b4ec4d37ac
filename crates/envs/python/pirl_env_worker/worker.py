"""Drives the slots of this process against an engine: resets, chunks, reports; reconnects and registers again after a disconnect."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket as host
import sys
import time
from typing import Any

import numpy as np
import zmq
from zmq.utils.monitor import parse_monitor_message

from . import wire
from .envs import make
from .envs.base import ChunkEnv, ChunkResult, EnvError, EnvSpec, Observation

#: Pause between attempts to reach an engine, in milliseconds.
RETRY_MS = 250
#: Longest wait for frames between two checks of the stop flag, in milliseconds.
POLL_MS = 200
#: Seconds without a message from the engine after which a worker sends a heartbeat.
SILENCE = 10.0
#: Largest number of slot reports in one message: the engine infers for these slots while the next slots are stepped.
REPORTS_PER_MESSAGE = 16


class Stop(Exception):
    """Stop requested by SIGTERM or SIGINT."""


class Lost(Exception):
    """Loss of the connection, which must be opened again; the text is the reason."""


class Slot:
    """One environment and whether an episode is active."""

    def __init__(self, env: ChunkEnv) -> None:
        self.env = env
        self._active = False
        self._video = False

    def abandon(self) -> None:
        """Drops the episode; the slot becomes idle."""
        self._active = False

    def run(self, name: str, body: Any, order: list[int | None]) -> dict[str, Any]:
        """Executes a command; returns outcome and observation in the form of a report. `order`: env image of each policy camera."""
        if name == "reset":
            key = (body["seed"], body["env"], body["episode"])
            observation = self.env.reset(*key, reset_state=body["reset_state"], task=body["task"])
            self._active, self._video = True, body["video"]
            return {"outcome": None, "observation": observation_body(observation, order)}
        if not self._active:
            raise EnvError("actions came for a slot without an episode")
        result, frames = self._step(body)
        self._active = not (result.terminated or result.truncated)
        outcome = {
            "rewards": result.rewards,
            "terminated": result.terminated,
            "truncated": result.truncated,
            "success": result.success,
            "frames": [wire.array(frame) for frame in frames],
        }
        return {"outcome": outcome, "observation": observation_body(self.env.observe(), order)}

    def _step(self, actions: np.ndarray) -> tuple[ChunkResult, list[np.ndarray]]:
        if not self._video:
            return self.env.step_chunk(actions), []
        total = ChunkResult([], False, False, False)
        frames = []
        for row in range(len(actions)):
            one = self.env.step_chunk(actions[row : row + 1])
            frames.append(self.env.render())
            total = ChunkResult(total.rewards + one.rewards, one.terminated, one.truncated, one.success)
            if one.terminated or one.truncated:
                break
        return total, frames


def observation_body(observation: Observation, order: list[int | None]) -> dict[str, Any]:
    images = [None if index is None else wire.array(observation.images[index]) for index in order]
    return {"images": images, "state": [float(value) for value in observation.state], "prompt": observation.prompt}


def camera_order(env_cameras: list[str], policy_cameras: list[str]) -> list[int | None]:
    """Returns the index of the env image for each policy camera: by name if the policy has every name, in order if the policy has no name."""
    strangers = [name for name in env_cameras if name not in policy_cameras]
    if strangers and len(strangers) < len(env_cameras):
        raise EnvError(f"the policy has no camera {strangers} of the environment, but the others: found {env_cameras}, expected names of {policy_cameras}")
    if not strangers:
        return [env_cameras.index(name) if name in env_cameras else None for name in policy_cameras]
    if len(env_cameras) > len(policy_cameras):
        raise EnvError(f"the environment has cameras {env_cameras}, the policy only {policy_cameras}: name fewer in the parameter `cameras`")
    return [index if index < len(env_cameras) else None for index in range(len(policy_cameras))]


class Connection:
    """Connected DEALER that detects the loss of its connection."""

    _EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED

    def __init__(self, context: zmq.Context, endpoint: str, stopped) -> None:
        self._stopped = stopped
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, RETRY_MS)
        self._socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_FRAME_BYTES)
        self._monitor = self._socket.get_monitor_socket(self._EVENTS)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        try:
            self._socket.connect(endpoint)
            waited = False
            while self._event(RETRY_MS) != zmq.EVENT_HANDSHAKE_SUCCEEDED:
                if not waited:
                    log(f"waiting for the engine at {endpoint}")
                    waited = True
        except BaseException:
            self.close()
            raise

    def send(self, name: str, body: Any) -> None:
        # the receiver's queue is bounded: wait, but react to a stop or a lost engine
        frame = wire.encode(name, body)
        while True:
            try:
                self._socket.send(frame, zmq.NOBLOCK)
                return
            except zmq.Again:
                self._watch(POLL_MS)

    def receive(self, patience: float) -> tuple[str, Any] | None:
        """Returns the next message, or None after `patience` seconds without a message. Raises `Lost`, `Stop` or `WireError`."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            ready = dict(self._poller.poll(POLL_MS))
            if self._stopped():
                raise Stop
            if self._socket in ready:
                return wire.decode(self._socket.recv_multipart()[-1])
            if self._monitor in ready:
                self._watch(0)
        return None

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)

    def _watch(self, timeout_ms: int) -> None:
        if self._event(timeout_ms) == zmq.EVENT_DISCONNECTED:
            raise Lost("the engine is gone")

    def _event(self, timeout_ms: int) -> int | None:
        ready = self._monitor.poll(timeout_ms)
        if self._stopped():
            raise Stop
        if not ready:
            return None
        return int(parse_monitor_message(self._monitor.recv_multipart())["event"])


def session(connection: Connection, slots: list[Slot], spec: EnvSpec, hello: dict[str, Any]) -> None:
    """Registers and serves until the connection is lost or a stop is requested.

    Raises `Lost`, `Stop`, or `EnvError` if engine and environment do not match.
    """
    for slot in slots:
        slot.abandon()
    connection.send("hello", hello)
    order: list[int | None] | None = None
    while True:
        message = connection.receive(SILENCE)
        if message is None:
            # sending detects a connection that broke silently; an engine that dropped this worker refuses the heartbeat
            connection.send(*(("hello", hello) if order is None else ("reports", [])))
            continue
        name, body = message
        if name == "refused":
            if not body["retry"]:
                raise EnvError(f"the engine refuses this worker: {body['reason']}")
            raise Lost(f"engine: {body['reason']}")
        if name == "welcome":
            if body["env_action_dim"] != spec.action_dim:
                raise EnvError(f"the policy's actions have {body['env_action_dim']} numbers, the environment's {spec.action_dim}")
            order = camera_order([camera for camera, _, _ in spec.cameras], body["cameras"])
            log(f"engine serves policy version {body['version']}, chunks of {body['action_chunk']} actions, {len(slots)} slots of {hello['env']}")
            connection.send("reports", [{"slot": slot, "outcome": None, "observation": None} for slot in range(len(slots))])
            continue
        if order is None:
            raise Lost("commands came before the welcome")
        reports = []
        for index, one in enumerate(body):
            command, argument = one["command"]
            if one["slot"] >= len(slots):
                raise EnvError(f"a command for slot {one['slot']} came, this worker has {len(slots)} slots")
            if command == "act" and argument.dtype != np.float32:
                raise EnvError(f"actions for slot {one['slot']} are `{argument.dtype}`, expected `float32`")
            reports.append({"slot": one["slot"], **slots[one["slot"]].run(command, argument, order)})
            if index + 1 == len(body) or len(reports) == REPORTS_PER_MESSAGE:
                connection.send("reports", reports)
                reports = []


def check_endpoint(endpoint: str) -> None:
    """Raises `EnvError` unless `endpoint` is `tcp://HOST:PORT` on loopback, as the engine requires: frames are not encrypted."""
    name, colon, port = endpoint.removeprefix("tcp://").rpartition(":")
    if not endpoint.startswith("tcp://") or not colon or not port.isdecimal() or int(port) > 65535:
        raise EnvError(f"endpoint `{endpoint}`: expected tcp://HOST:PORT, like tcp://127.0.0.1:5555")
    try:
        loopback = name == "localhost" or ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise EnvError(f"endpoint `{endpoint}` is not on loopback: use 127.0.0.1 and a tunnel (ssh -L, WireGuard) between machines")


def log(text: str) -> None:
    print(f"pirl_env_worker: {text}", file=sys.stderr, flush=True)


def serve(options: Any) -> int:
    """Runs the command `serve` until SIGTERM or SIGINT (exit status 0) or a refusal (exit status 1)."""
    check_endpoint(options.engine)
    stop = False

    def on_signal(_number, _frame) -> None:
        nonlocal stop
        stop = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    slots = [Slot(make(options.env, options.params)) for _ in range(options.num_envs)]
    spec = slots[0].env.spec()
    client = options.name or f"{options.env}-{host.gethostname()}-{os.getpid()}"
    hello = {"client": client, "env": options.env, "action_dim": spec.action_dim, "slots": len(slots)}
    with zmq.Context() as context:
        while True:
            try:
                connection = Connection(context, options.engine, lambda: stop)
                try:
                    session(connection, slots, spec, hello)
                finally:
                    connection.close()
            except Stop:
                log("stopped")
                return 0
            except (Lost, wire.WireError) as error:
                if isinstance(error, wire.WireError) and error.fatal:
                    raise EnvError(str(error)) from error
                log(f"{error}; connecting again")
                time.sleep(RETRY_MS / 1000)
