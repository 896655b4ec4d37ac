#!/usr/bin/env python3
"""Builds the libraries of a fake CUDA runtime, under which the CUDA provider of ONNX Runtime works without a GPU.

usage: generate.py PROVIDER CUDA_TREE OUT_DIR

PROVIDER is libonnxruntime_providers_cuda.so. CUDA_TREE holds include/ and lib/libcudart.so.13 of NVIDIA's wheels. cudart.c has
the calls with a behavior of their own. All other functions are written here, one line of C each: the function names come from
NVIDIA's libcudart and from the list of functions that the provider needs.
"""

import collections
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
CUDART = "libcudart.so.13"
DRIVER = "libcuda.so.1"

# Functions of the runtime that may do nothing and report success.
ACCEPTED = {"cudaDeviceEnablePeerAccess", "cudaDeviceReset", "cudaDeviceSetCacheConfig", "cudaDeviceSetLimit", "cudaFuncSetAttribute",
    "cudaFuncSetCacheConfig", "cudaHostRegister", "cudaHostUnregister", "cudaInitDevice", "cudaKernelSetAttributeForDevice",
    "cudaLibraryUnload", "cudaMemPoolDestroy", "cudaMemPoolSetAccess", "cudaMemPoolSetAttribute", "cudaMemPoolTrimTo",
    "cudaMemPrefetchAsync", "cudaProfilerStart", "cudaProfilerStop", "cudaSetDeviceFlags", "cudaStreamSetAttribute",
    "cudaStreamWaitEvent"}

# The driver functions that a program may call by itself; the provider needs others.
DRIVER_SOURCE = """
extern char *getenv(const char *);
extern int atoi(const char *);
static int devices(void) { const char *n = getenv("FAKE_CUDA_DEVICES"); return n && *n ? atoi(n) : 1; }
int cuInit(unsigned flags) { return devices() ? 0 : 100; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = devices(); return 0; }
"""
HANDLE = "int {name}(void **handle) {{ *handle = malloc(4096); return 0; }}"
SPECIAL = {
    "cublasGetStatusName": 'const char *{name}(int status) {{ return "status of the fake cuBLAS"; }}',
    "cublasGetStatusString": 'const char *{name}(int status) {{ return "status of the fake cuBLAS"; }}',
    "cublasGetMathMode": "int {name}(void *handle, int *mode) {{ *mode = 0; return 0; }}",
    # one way to compute a product is found; 96 bytes are one cublasLtMatmulHeuristicResult_t
    "cublasLtMatmulAlgoGetHeuristic": "int {name}(void *handle, void *operation, void *a, void *b, void *c, void *d, void *wish, int "
        "wanted, char *results, int *found) {{ for (int i = 0; i < 96; i++) results[i] = 0; *found = 1; return 0; }}",
    "cublasCreate_v2": HANDLE, "cublasLtCreate": HANDLE, "cublasLtMatmulDescCreate": HANDLE, "cublasLtMatrixLayoutCreate": HANDLE,
    "cublasLtMatmulPreferenceCreate": HANDLE, "cublasLtMatrixTransformDescCreate": HANDLE,
}
# A function with one of these in its name launches work on the device.
LAUNCHES = ("gemm", "Gemm", "geam", "getr", "copy", "scal")


def symbols(path):
    """Yields (name, version, defined) of the dynamic symbols of a library."""
    out = subprocess.run(["readelf", "--dyn-syms", "-W", path], check=True, capture_output=True, text=True).stdout
    for line in out.splitlines():
        fields = line.split()
        if len(fields) >= 8 and fields[0][:-1].isdigit():
            name, _, version = fields[7].partition("@")
            yield name, version.strip("@"), fields[6] != "UND"


def needed(provider):
    """Returns for each CUDA library that the provider is linked with the functions that the provider calls."""
    out = subprocess.run(["readelf", "-d", "-W", provider], check=True, capture_output=True, text=True).stdout
    libraries = {line.split("[")[1].rstrip("]"): set() for line in out.splitlines() if "(NEEDED)" in line and "[libcu" in line}
    for name, version, defined in symbols(provider):
        if not defined and name.startswith(("cu", "__cuda")):
            libraries[version or DRIVER].add(name)
    return libraries


def one_line(name):
    if name in SPECIAL:
        return SPECIAL[name].format(name=name)
    if name.startswith("cublas") and (any(part in name for part in LAUNCHES) or name in ("cublasLtMatmul", "cublasLtMatrixTransform")):
        return f'int {name}(void) {{ fake_cuda_note("{name}"); return 0; }}'
    return f"int {name}(void) {{ return 0; }}"


def compile_library(soname, sources, out, extra=()):
    """Compiles a shared library whose functions carry the version that NVIDIA's library gives them, which is its name."""
    with tempfile.TemporaryDirectory() as folder:
        version = pathlib.Path(folder) / "version.map"
        version.write_text(f"{soname} {{ global: *; }};\n")
        versions = [f"-Wl,--version-script={version}"] if soname != DRIVER else []
        subprocess.run(["gcc", "-std=gnu11", "-O2", "-Wall", "-Wno-builtin-declaration-mismatch", "-shared", "-fPIC", "-pthread",
            "-Wl,-rpath,$ORIGIN", f"-Wl,-soname,{soname}", *versions, *extra, "-o", out / soname, *sources], check=True)


def runtime(tree, out):
    """Builds libcudart: cudart.c, and a line for each other function that NVIDIA's library exports."""
    exported = {name for name, _, defined in symbols(tree / "lib" / CUDART) if defined and name.startswith(("cuda", "__cuda"))}
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        written = folder / "cudart.so"
        include = f"-I{tree / 'include'}"
        subprocess.run(["gcc", "-std=gnu11", "-shared", "-fPIC", include, "-o", written, HERE / "cudart.c"], check=True)
        rest = exported - {name for name, _, defined in symbols(written) if defined}
        lines = ["extern int fake_cuda_unsupported(const char *);"]
        for name in sorted(rest):
            body = "return 0;" if name in ACCEPTED else f'return fake_cuda_unsupported("{name}");'
            lines.append(f"int {name}(void) {{ {body} }}")
        source = folder / "rest.c"
        source.write_text("\n".join(lines) + "\n")
        compile_library(CUDART, [HERE / "cudart.c", source], out, [include])
    return rest - ACCEPTED


def main():
    provider, tree, out = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
    out.mkdir(parents=True, exist_ok=True)
    libraries = collections.defaultdict(set, needed(provider))
    unsupported = runtime(tree, out)
    missing = libraries[CUDART] & unsupported
    if missing:
        sys.exit(f"fake-cuda: the provider calls functions that the fake runtime does not imitate: {', '.join(sorted(missing))}")
    for soname, names in sorted(libraries.items()):
        if soname == CUDART:
            continue
        lines = ["extern void *malloc(unsigned long);", "extern void fake_cuda_note(const char *);"]
        lines += [DRIVER_SOURCE] * (soname == DRIVER) + [one_line(name) for name in sorted(names)]
        with tempfile.TemporaryDirectory() as folder:
            source = pathlib.Path(folder) / "stubs.c"
            source.write_text("\n".join(lines) + "\n")
            compile_library(soname, [source, out / CUDART], out)
    print(f"  fake CUDA: {len(libraries)} libraries, {len(unsupported)} functions of the runtime report 'not supported'")


if __name__ == "__main__":
    main()
