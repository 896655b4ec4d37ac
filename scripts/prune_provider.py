#!/usr/bin/env python3
"""Writes a copy of ONNX Runtime's CUDA provider that holds machine code for one compute capability and compresses well.

usage: prune_provider.py PROVIDER OUT --sm 90 --fake FAKE_DIR [--launched FILE]   all kernels except the families below
       prune_provider.py PROVIDER OUT --sm 90 --all-of-sm                         all kernels
       prune_provider.py PROVIDER OUT --sm 90 --only-launched FILE                only kernels that were launched

The provider has some 600 containers of machine code. Each holds the kernels of one source file, once per compute capability. A
container keeps its place and its header, but only the chosen code stays in it; what is behind is zeros, so the file keeps its size
and all addresses, and xz removes the zeros. A launch of a kernel that was removed reports "no kernel image is available".

FAKE_DIR is the fake CUDA runtime (scripts/setup-cuda). The provider is loaded under it to learn which kernel is in which container.
FILE is written by fake_cuda_dump_kernels after runs of the graphs that must work; containers with a launched kernel are always kept.
"""

import argparse
import collections
import ctypes
import pathlib
import re
import struct
import subprocess
import sys
import tempfile

CONTAINER = 0xBA55ED50
CUBIN = 2  # kind of an entry: machine code

# Kernels that no graph of ours uses: our graphs are bf16 and f32, without mixtures of experts, sampling of words and operators of other
# kinds of networks. A container is removed when all of its kernels match.
FAMILIES = {
    "mixtures of experts": r"MoeFCGemm|fused_moe|moe_gemv|GroupProblemShape|expandInputRows",
    "attention in fp16": r"flash_fwd.*6half_t|grp\d+_fp16",
    "attention with a cache of 8 bits and less": r"grp\d+_(\w+_)?(int8|fp8|int4)",
    "products with weights of 8 bits and less": r"GemmFpAIntB|fpA_intB|MatMulFloat\w*[248b]|MatMulBlock\w*Fp[48]|QuantizeActivation",
}
NEUTRAL = re.compile(r"EmptyKernel")  # a helper that every file with the library cub contains


def containers(image, start, end):
    """Yields (offset, offset of the first entry, end) of the containers in a part of the file."""
    at = start
    while at + 16 <= end:
        magic, _, header, size = struct.unpack_from("<IHHQ", image, at)
        if magic == CONTAINER:
            yield at, at + header, at + header + size
            at += header + size
        else:
            at += 8  # filling between two containers


def entries(image, at, end):
    """Yields (offset, end, compute capability or none for other kinds than machine code) of the entries of a container."""
    while at < end:
        kind, _, header, size = struct.unpack_from("<HHIQ", image, at)
        sm, = struct.unpack_from("<I", image, at + 28)
        yield at, at + header + size, sm if kind == CUBIN else None
        at += header + size


def section(path, name):
    """Returns address, offset and size of a section of a library."""
    out = subprocess.run(["readelf", "-SW", path], check=True, capture_output=True, text=True).stdout
    for line in out.splitlines():
        fields = line.partition("]")[2].split()
        if fields and fields[0] == name:
            return tuple(int(field, 16) for field in fields[2:5])
    sys.exit(f"prune-provider: {path} has no section {name}")


def read_kernels(path, library):
    """Returns kernel names by address of their container, and the addresses with a launched kernel."""
    names, launched = collections.defaultdict(list), set()
    for line in pathlib.Path(path).read_text().splitlines():
        address, count, owner, name = line.split("\t")
        if owner == library:
            names[int(address, 16)].append(name)
            if int(count):
                launched.add(int(address, 16))
    return names, launched


def list_kernels(provider, fake):
    """Has ONNX Runtime load the provider under the fake runtime, which thereby learns all kernels."""
    runtime = None
    for library in ("libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10", "libcuda.so.1"):
        loaded = ctypes.CDLL(str(fake / library), mode=ctypes.RTLD_GLOBAL)
        runtime = runtime or loaded
    onnxruntime = ctypes.CDLL(str(provider.with_name("libonnxruntime.so")))
    onnxruntime.OrtGetApiBase.restype = ctypes.POINTER(ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint32))
    functions = onnxruntime.OrtGetApiBase()[0](1)  # the C interface is a table; its order never changes
    environment, settings = ctypes.c_void_p(), ctypes.c_void_p()
    create_environment = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p))(functions[3])
    create_settings = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))(functions[10])
    append_cuda = onnxruntime.OrtSessionOptionsAppendExecutionProvider_CUDA
    append_cuda.restype, append_cuda.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int)
    if create_environment(3, b"prune", ctypes.byref(environment)) or create_settings(ctypes.byref(settings)) or append_cuda(settings, 0):
        sys.exit(f"prune-provider: {provider} does not load under {fake}")
    with tempfile.NamedTemporaryFile() as file:
        runtime.fake_cuda_dump_kernels(file.name.encode())
        return read_kernels(file.name, provider.name)[0]


def family(names):
    """Returns the family of a container when all of its kernels belong to families, else none."""
    found = set()
    for name in names:
        if not NEUTRAL.search(name):
            found.add(next((title for title, pattern in FAMILIES.items() if re.search(pattern, name)), None))
    return None if not found or None in found else min(found)


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("provider", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--sm", type=int, required=True)
    parser.add_argument("--fake", type=pathlib.Path)
    parser.add_argument("--launched", type=pathlib.Path)
    parser.add_argument("--all-of-sm", action="store_true")
    parser.add_argument("--only-launched", type=pathlib.Path)
    options = parser.parse_args()
    if sum(map(bool, (options.fake, options.all_of_sm, options.only_launched))) != 1:
        parser.error("one of --fake, --all-of-sm and --only-launched is needed")

    names, launched = {}, set()
    if options.launched or options.only_launched:
        launched = read_kernels(options.launched or options.only_launched, options.provider.name)[1]
    if options.fake:
        names = list_kernels(options.provider.resolve(), options.fake.resolve())

    image = bytearray(options.provider.read_bytes())
    address, offset, size = section(options.provider, ".nv_fatbin")
    kept = kept_bytes = code = 0
    removed = collections.Counter()
    for at, first, end in list(containers(image, offset, offset + size)):
        here = address + at - offset
        chosen = [bytes(image[a:b]) for a, b, sm in entries(image, first, end) if sm == options.sm]
        code += sum(map(len, chosen))
        title = None
        if here not in launched:
            title = "never launched" if options.only_launched else family(names.get(here, ()))
        if title:
            removed[title] += sum(map(len, chosen))
            chosen = []
        content = b"".join(chosen)
        image[first:end] = content + bytes(end - first - len(content))
        struct.pack_into("<Q", image, at + 8, len(content))
        kept += bool(chosen)
        kept_bytes += len(content)
    if code == 0:
        sys.exit(f"prune-provider: {options.provider} has no machine code for sm_{options.sm}")
    fresh = options.out.with_name(options.out.name + ".new")
    fresh.write_bytes(image)
    fresh.rename(options.out)
    print(f"  sm_{options.sm}: kept {kept} containers, {kept_bytes / 1e6:.1f} of {code / 1e6:.1f} MB of machine code")
    for title, count in removed.most_common():
        print(f"  sm_{options.sm}: removed {count / 1e6:.1f} MB: {title}")


if __name__ == "__main__":
    main()
