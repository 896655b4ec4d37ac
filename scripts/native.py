#!/usr/bin/env python3
"""Installs the two native libraries in a folder: libtorch 2.11.0 (CPU tree) and libonnxruntime 1.31.1.

usage: native.py [--engine-only] [--machine MACHINE] DEPS_DIR

The learner needs both, on x86_64. --engine-only installs libonnxruntime alone, on x86_64 or aarch64. The libraries of a machine other
than this one go to DEPS_DIR/onnxruntime-MACHINE.

Both libraries come from pinned PyPI wheels (version and sha256 below), so every machine has the same bits. Idempotent and
resumable: a finished tree is kept, a complete wheel is not fetched again, and a new tree is made under a temporary name
and renamed when complete.
"""

import argparse
import hashlib
import pathlib
import platform
import shutil
import subprocess
import sys
import zipfile

WHEELS = {
    "torch==2.11.0": ("torch-2.11.0-cp311-cp311-manylinux_2_28_x86_64.whl",
        "7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a"),
    "nvidia-cuda-runtime==13.0.96": (
        "nvidia_cuda_runtime-13.0.96-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548"),
    "nvidia-cuda-cupti==13.0.85": ("nvidia_cuda_cupti-13.0.85-py3-none-manylinux_2_25_x86_64.whl",
        "4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8"),
    "onnxruntime==1.31.1": ("onnxruntime-1.31.1-cp311-cp311-manylinux_2_28_x86_64.whl",
        "5752bd508126ae7c49894d3b9d2e83f0c3d487319246d04c444b393308d7ad7f"),
}
# by machine: the wheels that the engine needs
ENGINE_WHEELS = {
    "x86_64": WHEELS,
    "aarch64": {
        "onnxruntime==1.31.1": ("onnxruntime-1.31.1-cp311-cp311-manylinux_2_28_aarch64.whl",
            "da05378364c44d4407e463982d2bf8d5e4cfea873283757e48beeb41df97b7f3"),
    },
}
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_25", "manylinux_2_17", "manylinux2014")
TORCH_LIBS = ("torch/lib/libc10.so", "torch/lib/libtorch_cpu.so", "torch/lib/libtorch.so", "torch/lib/libgomp.so.1")


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def wheel(requirement, folder, pinned=WHEELS, machine="x86_64"):
    """Returns the path of a pinned wheel; fetches the wheel through pip unless a complete copy exists."""
    name, want = pinned[requirement]
    path = folder / name
    if not (path.exists() and sha256(path) == want):
        print(f"  fetching {requirement}", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:",
            "--python-version", "3.11", "--implementation", "cp", "-d", str(folder)]
        for tag in PLATFORMS:
            command += ["--platform", f"{tag}_{machine}"]
        subprocess.run([*command, requirement], check=True)
    found = sha256(path)
    if found != want:
        path.unlink()
        sys.exit(f"setup: {name} has sha256 {found}, expected {want}; the file was removed, run setup again")
    return path


def extract(archive, keep, out):
    with zipfile.ZipFile(archive) as file:
        for entry in file.infolist():
            if keep(entry.filename):
                file.extract(entry, out)


def torch_tree(deps, wheels):
    target = deps / "libtorch"
    if (target / "complete").exists():
        return
    fresh = deps / "libtorch.new"
    shutil.rmtree(fresh, ignore_errors=True)
    archive = wheel("torch==2.11.0", wheels)
    print("  unpacking libtorch 2.11.0", flush=True)
    extract(archive, lambda n: n in TORCH_LIBS or n.startswith("torch/include/"), fresh)
    extract(wheel("nvidia-cuda-runtime==13.0.96", wheels), lambda n: n.endswith("libcudart.so.13"), fresh)
    extract(wheel("nvidia-cuda-cupti==13.0.85", wheels), lambda n: n.endswith("libcupti.so.13"), fresh)
    # torch-sys compares this file with the version of its bindings
    (fresh / "torch" / "build-version").write_text("2.11.0\n")
    (fresh / "complete").write_text("")
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)


def onnxruntime_tree(deps, wheels, machine):
    name = "onnxruntime" if machine == platform.machine() else f"onnxruntime-{machine}"
    target = deps / name
    if (target / "libonnxruntime.so").exists():
        return
    fresh = deps / f"{name}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    with zipfile.ZipFile(wheel("onnxruntime==1.31.1", wheels, ENGINE_WHEELS[machine], machine)) as file:
        (fresh / "libonnxruntime.so").write_bytes(file.read("onnxruntime/capi/libonnxruntime.so.1.31.1"))
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine-only", action="store_true", help="install libonnxruntime alone")
    parser.add_argument("--machine", default=platform.machine(), help="x86_64 or aarch64; default: this machine's")
    parser.add_argument("deps", type=pathlib.Path, metavar="DEPS_DIR")
    args = parser.parse_args()
    known = list(ENGINE_WHEELS) if args.engine_only else ["x86_64"]
    if args.machine not in known or sys.platform != "linux":
        sys.exit(f"setup: the pinned libraries are for Linux {' and '.join(known)}, this is {sys.platform} {args.machine}")
    wheels = args.deps / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    if not args.engine_only:
        torch_tree(args.deps, wheels)
    onnxruntime_tree(args.deps, wheels, args.machine)
    shutil.rmtree(wheels, ignore_errors=True)


if __name__ == "__main__":
    main()
