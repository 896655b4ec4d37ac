"""Drives the unmodified openpi-client for tests: requests of one robot form, answers as JSON lines.

The pixels and states are formulas that `tests/it/websocket.rs` repeats, so that both clients send the same observations.
"""

import argparse
import json
import sys
import threading

import numpy as np
from openpi_client import action_chunk_broker, image_tools, websocket_client_policy

WORDS = ("red", "green", "blue")


def image(number: int, camera: int, side: int = 224) -> np.ndarray:
    y, x, c = np.meshgrid(np.arange(side), np.arange(side), np.arange(3), indexing="ij")
    return ((7 * number + 31 * camera + 5 * y + 11 * x + 13 * c) % 256).astype(np.uint8)


def state(number: int, width: int) -> np.ndarray:
    return (((number + np.arange(width)) % 7) * 0.125 - 0.375).astype(np.float32)


def observation(form: str, number: int) -> dict:
    prompt = {"prompt": f"pick {WORDS[number % 3]}"}
    if form == "libero":
        return {
            "observation/image": image(number, 0),
            "observation/wrist_image": image(number, 1),
            "observation/state": state(number, 8),
            **prompt,
        }
    if form == "droid":
        values = state(number, 8)
        return {
            "observation/exterior_image_1_left": image_tools.resize_with_pad(image(number, 0), 224, 224),
            "observation/wrist_image_left": image_tools.resize_with_pad(image(number, 1), 224, 224),
            "observation/joint_position": values[:7],
            "observation/gripper_position": values[7:],
            **prompt,
        }
    if form == "aloha":
        cameras = ("cam_high", "cam_left_wrist", "cam_right_wrist")
        images = {name: image(number, index).transpose(2, 0, 1) for index, name in enumerate(cameras)}
        return {"state": state(number, 14).astype(np.float64), "images": images, **prompt}
    raise ValueError(f"unknown form {form}")


def damaged(kind: str) -> dict:
    """Returns an observation that the server must reject."""
    obs = observation("libero", 0)
    if kind == "dtype":
        obs["observation/image"] = obs["observation/image"].astype(np.int64)
    elif kind == "endian":
        obs["observation/state"] = obs["observation/state"].astype(">f4")
    elif kind == "camera":
        del obs["observation/wrist_image"]
    elif kind == "extra":
        obs["observation/depth"] = np.zeros((4, 4), np.float32)
    elif kind == "huge":
        obs["observation/image"] = np.zeros(1 << 30, np.uint8)
    else:
        raise ValueError(f"unknown damage {kind}")
    return obs


def say(**line) -> None:
    print(json.dumps(line), flush=True)


def connect(args) -> websocket_client_policy.WebsocketClientPolicy:
    host, port = args.address.rsplit(":", 1)
    return websocket_client_policy.WebsocketClientPolicy(host, int(port), args.key)


def one(args) -> None:
    policy = connect(args)
    say(metadata=policy.get_server_metadata())
    for number in range(args.count):
        answer = policy.infer(observation(args.form, number))
        actions = answer["actions"]
        assert isinstance(actions, np.ndarray) and actions.dtype == np.float32, actions
        say(
            shape=actions.shape,
            actions=actions.ravel().tolist(),
            key=answer["noise_key"],
            infer_ms=answer["server_timing"]["infer_ms"],
            previous="prev_total_ms" in answer["server_timing"],
        )
    broker = action_chunk_broker.ActionChunkBroker(policy, action_horizon=2)
    say(row=broker.infer(observation(args.form, 0))["actions"].shape)


def many(args) -> None:
    """Runs clients at once; reports every client's number of answers."""
    policies = [connect(args) for _ in range(args.clients)]
    answers = [0] * args.clients

    def run(index: int) -> None:
        for number in range(args.count):
            answer = policies[index].infer(observation(args.form, number))
            answers[index] += int(np.isfinite(answer["actions"]).all())

    threads = [threading.Thread(target=run, args=(index,)) for index in range(args.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    say(answers=answers)


def rejected(args) -> None:
    """Reports the error of a request that the server must reject."""
    try:
        connect(args).infer(damaged(args.damage) if args.damage else observation(args.form, 0))
    except Exception as error:  # every kind is reported
        say(kind=type(error).__name__, error=str(error))
    else:
        say(kind="none", error="")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=("one", "many", "rejected"))
    parser.add_argument("address")
    parser.add_argument("--form", default="libero")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--damage")
    parser.add_argument("--key")
    arguments = parser.parse_args()
    sys.exit({"one": one, "many": many, "rejected": rejected}[arguments.command](arguments))
