"""Command line `python -m pirl_env_worker serve | demos | scenes | check-expert`."""

from __future__ import annotations

import argparse
import json
import sys

from .envs import NAMES
from .envs.base import EnvError


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="pirl_env_worker", description="env worker for simulators that exist only in Python")
    commands = root.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--env", default="metaworld", choices=NAMES, help="environment (default: metaworld)")
        sub.add_argument("--params", default="{}", type=json_object, help="parameters of the environment, a JSON object")
        return sub

    def scripted(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--task", help="task name or several separated by commas; same as the parameter `task`")
        sub.add_argument("--seed", type=natural, default=0, help="run seed (default: 0)")

    def flaws(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--bias", type=three, default=(0.0, 0.0, 0.0), metavar="X,Y,Z", help="calibration error of the expert in meters (write --bias=-0.01,0,0)")
        sub.add_argument("--noise", type=float, default=0.0, help="std of Gaussian noise on the motion, in action units")

    serve = command("serve", "drive environments against a rollout engine")
    serve.add_argument("--engine", default="tcp://127.0.0.1:5555", help="endpoint of the engine (default: tcp://127.0.0.1:5555)")
    serve.add_argument("--num-envs", type=positive, required=True, help="environments (slots) of this process, stepped in turn")
    serve.add_argument("--name", help="name that this worker keeps across reconnects (default: made of environment, host and process id)")

    demos = command("demos", "write demonstrations of the scripted expert")
    scripted(demos)
    flaws(demos)
    demos.add_argument("--episodes", type=positive, required=True, help="successful episodes to write")
    demos.add_argument("--horizon", type=positive, required=True, help="actions per item")
    demos.add_argument("--stride", type=positive, default=1, help="env steps from one item to the next (default: 1)")
    demos.add_argument("--out", required=True, help="safetensors file to write")

    scenes = command("scenes", "write random scenes with key points, for vision-language pre-training")
    scripted(scenes)
    scenes.add_argument("--count", type=positive, required=True, help="scenes to write")
    scenes.add_argument("--per-reset", type=positive, default=4, help="scenes from one reset (default: 4)")
    scenes.add_argument("--steps", type=positive, default=12, help="env steps of gripper motion before each scene (default: 12)")
    scenes.add_argument("--out", required=True, help="safetensors file to write")

    check = command("check-expert", "measure the scripted expert's success")
    scripted(check)
    flaws(check)
    check.add_argument("--episodes", type=positive, default=50, help="episodes per task (default: 50)")
    check.add_argument("--chunk", type=positive, default=1, help="env steps that one expert action is held for (default: 1)")
    return root


def json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, found `{text}`")
    return value


def natural(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"expected a whole number in 0..2^63, found `{text}`")
    return int(text)


def positive(text: str) -> int:
    if natural(text) == 0:
        raise argparse.ArgumentTypeError("expected a number above 0")
    return int(text)


def three(text: str) -> tuple[float, float, float]:
    parts = text.split(",")
    try:
        x, y, z = (float(part) for part in parts)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected three numbers X,Y,Z, found `{text}`") from error
    return x, y, z


def main() -> int:
    options = parser().parse_args()
    if getattr(options, "task", None):
        names = options.task.split(",")
        options.params["task"] = names if len(names) > 1 else names[0]
    try:
        if options.command == "serve":
            from .worker import serve

            return serve(options)
        if options.env != "metaworld":
            raise EnvError(f"`{options.command}` needs a scripted expert, which `{options.env}` does not have; use `--env metaworld`")
        from . import demos

        {"demos": demos.write_demos, "scenes": demos.write_scenes, "check-expert": demos.check_expert}[options.command](options)
        return 0
    except (EnvError, OSError) as error:
        print(f"pirl_env_worker: {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
