#!/usr/bin/env python3
"""Installs the programs of scripts/check in a folder: typos 1.52.0 (a pinned PyPI wheel) and cargo-machete 0.9.2 (built, a minute).

usage: check_tools.py TOOLS_DIR

Idempotent: a program of the right version is kept.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import native

TYPOS = "typos==1.52.0"
WHEELS = {TYPOS: ("typos-1.52.0-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
    "418fd85f7fc11dec14e5482e747f6e916af56da96207cde0cdd69540a4b389f6")}
MACHETE = "cargo-machete@0.9.2"


def typos(tools, place):
    wheels = tools / "wheels"
    wheels.mkdir(exist_ok=True)
    with zipfile.ZipFile(native.wheel(TYPOS, wheels, WHEELS)) as file:
        place.write_bytes(file.read("typos-1.52.0.data/scripts/typos"))
    place.chmod(0o755)
    shutil.rmtree(wheels)


def machete(tools, _):
    print(f"  building {MACHETE}", flush=True)
    # without optimizations and debug information: it runs for seconds
    quick = {"CARGO_PROFILE_DEV_DEBUG": "0"}
    subprocess.run(["cargo", "install", "--quiet", "--locked", "--debug", "--root", str(tools), MACHETE], env=os.environ | quick,
        check=True)


def main():
    tools = pathlib.Path(sys.argv[1])
    (tools / "bin").mkdir(parents=True, exist_ok=True)
    for name, version, make in (("typos", TYPOS, typos), ("cargo-machete", MACHETE, machete)):
        stamp = tools / f"{name}.version"
        if not stamp.exists() or stamp.read_text() != version:
            stamp.unlink(missing_ok=True)
            make(tools, tools / "bin" / name)
            stamp.write_text(version)


if __name__ == "__main__":
    main()
