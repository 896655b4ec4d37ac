#!/usr/bin/env python3
"""Installs the CUDA build of ONNX Runtime 1.31.1 in a folder, and a fake CUDA runtime for machines without a GPU.

usage: native_cuda.py DEPS_DIR

DEPS_DIR/onnxruntime-cuda   libonnxruntime.so and its two provider libraries, for a GPU or for the fake
DEPS_DIR/cuda-headers       headers and libcudart of NVIDIA's wheels; only the build of the fake reads them
DEPS_DIR/fake-cuda          the fake: libcudart.so.13 and the other libraries that the provider is linked with

All wheels are pinned by version and sha256. Idempotent and resumable: a finished tree is kept, and a new tree is made under a
temporary name and renamed when complete. The fake is built again when its sources have changed.
"""

import hashlib
import pathlib
import platform
import shutil
import subprocess
import sys
import zipfile

import native

RUNTIME, CRT, GPU = "nvidia-cuda-runtime==13.0.96", "nvidia-cuda-crt==13.0.88", "onnxruntime-gpu==1.31.1"
WHEELS = {
    RUNTIME: native.WHEELS[RUNTIME],
    CRT: ("nvidia_cuda_crt-13.0.88-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        "2c8043c7c9e02492716426e9919fc78d2c5b3b2a7a768a88e952676b08aa55a4"),
    GPU: ("onnxruntime_gpu-1.31.1-cp311-cp311-manylinux_2_28_x86_64.whl",
        "e26c475fe361b2015f45b4b824bd13f0bb20204e59b62814e6f0acd5f3d491a6"),
}
# name in the wheel -> our name
LIBRARIES = {
    "onnxruntime/capi/libonnxruntime.so.1.31.1": "libonnxruntime.so",
    "onnxruntime/capi/libonnxruntime_providers_shared.so": "libonnxruntime_providers_shared.so",
    "onnxruntime/capi/libonnxruntime_providers_cuda.so": "libonnxruntime_providers_cuda.so",
}
FAKE_SOURCES = pathlib.Path(__file__).resolve().parent.parent / "tests" / "fake-cuda"


def onnxruntime_tree(deps, wheels):
    target = deps / "onnxruntime-cuda"
    if not all((target / name).exists() for name in LIBRARIES.values()):
        fresh = deps / "onnxruntime-cuda.new"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        with zipfile.ZipFile(native.wheel(GPU, wheels, WHEELS)) as archive:
            for entry, name in LIBRARIES.items():
                with archive.open(entry) as source, open(fresh / name, "wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
    return target


def headers_tree(deps, wheels):
    target = deps / "cuda-headers"
    if not target.exists():
        fresh = deps / "cuda-headers.new"
        shutil.rmtree(fresh, ignore_errors=True)
        for requirement in (RUNTIME, CRT):
            native.extract(native.wheel(requirement, wheels, WHEELS), lambda n: n.endswith((".h", ".hpp", "/libcudart.so.13")), fresh)
        fresh.rename(target)
    return target / "nvidia" / "cu13"


def fake_tree(deps, wheels, provider):
    target = deps / "fake-cuda"
    sources = [FAKE_SOURCES / "cudart.c", FAKE_SOURCES / "generate.py"]
    want = hashlib.sha256("".join([GPU, RUNTIME, CRT, *map(native.sha256, sources)]).encode()).hexdigest()
    stamp = target / "complete"
    if stamp.exists() and stamp.read_text() == want:
        return
    fresh = deps / "fake-cuda.new"
    shutil.rmtree(fresh, ignore_errors=True)
    subprocess.run([sys.executable, str(sources[1]), str(provider), str(headers_tree(deps, wheels)), str(fresh)], check=True)
    (fresh / "complete").write_text(want)
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)


def main():
    if platform.machine() != "x86_64" or sys.platform != "linux":
        sys.exit(f"setup-cuda: the pinned libraries are for Linux x86_64, this is {sys.platform} {platform.machine()}")
    deps = pathlib.Path(sys.argv[1])
    wheels = deps / "wheels-cuda"
    wheels.mkdir(parents=True, exist_ok=True)
    tree = onnxruntime_tree(deps, wheels)
    fake_tree(deps, wheels, tree / "libonnxruntime_providers_cuda.so")
    shutil.rmtree(wheels)


if __name__ == "__main__":
    main()
