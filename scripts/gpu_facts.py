#!/usr/bin/env python3
"""Measures what the card can do, for the shares of the other steps: copies, a large product, small kernels, the expert's products.

usage: gpu_facts.py

Prints one JSON object per line. Times are medians of CUDA events; small work is timed as replays of a CUDA graph.
"""

import json
import statistics

import torch

GB = 1e9
# the expert's products at batch 1: rows x in x out
PRODUCTS = ((51, 1024, 8192), (51, 4096, 1024), (51, 1024, 2560), (51, 2048, 1024))
# more than the L2 cache of any card
ROTATED = 512e6


def emit(name, value, unit, **more):
    print(json.dumps({"name": name, "value": round(value, 3), "unit": unit} | more), flush=True)


def milliseconds(work, runs):
    """Returns the median time of `work` after three warm-ups, and the largest difference between thirds of the runs, as a share."""
    times = []
    for i in range(runs + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end))
    third = max(1, runs // 3)
    medians = [statistics.median(times[i * third:(i + 1) * third]) for i in range(3)]
    return statistics.median(times), round(max(medians) / min(medians) - 1, 3)


def captured(work):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def copies():
    source = torch.empty(2_000_000_000, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    time, spread = milliseconds(lambda: target.copy_(source), 20)
    emit("device copy", 2 * source.nbytes / GB / time * 1e3, "GB/s", spread=spread)


def large_product():
    n = 8192
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    time, spread = milliseconds(lambda: torch.mm(a, b, out=out), 30)
    emit("bf16 product 8192", 2 * n**3 / time / 1e9, "TFLOP/s", spread=spread)


def small_kernels():
    x = torch.zeros(1024, device="cuda")
    count = 3000

    def work():
        for _ in range(count):
            x.add_(1)
    time, spread = milliseconds(captured(work), 20)
    emit("small kernel in a graph", time * 1e3 / count, "us", spread=spread)
    # without a graph the host's launches are the limit
    time, spread = milliseconds(work, 5)
    emit("small kernel, no graph", time * 1e3 / count, "us", spread=spread)


def expert_products():
    for rows, k, n in PRODUCTS:
        copies = -(-int(ROTATED) // (2 * k * n))
        x = torch.randn(rows, k, dtype=torch.bfloat16, device="cuda")
        out = torch.empty(rows, n, dtype=torch.bfloat16, device="cuda")
        found = {}
        for layout, shape in (("in,out", (k, n)), ("out,in", (n, k))):
            weights = torch.randn(copies, *shape, dtype=torch.bfloat16, device="cuda") * k**-0.5

            def work(weights=weights, turn=layout == "out,in", x=x, out=out):
                for w in weights:
                    torch.mm(x, w.t() if turn else w, out=out)
            time, spread = milliseconds(captured(work), 20)
            found[layout] = time * 1e3 / copies
            if layout == "in,out":
                first = spread
        moved = 2 * (k * n + rows * (k + n))
        emit(f"cublas {rows}x{k}x{n}", found["in,out"], "us", gb_s=round(moved / found["in,out"] / 1e3), out_in_us=round(found["out,in"], 2),
            spread=first)


def transfers():
    size = 1 << 30
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True).random_()
    device = torch.empty(size, dtype=torch.uint8, device="cuda")
    time, _ = milliseconds(lambda: device.copy_(host, non_blocking=True), 10)
    emit("pinned host to device", size / GB / time * 1e3, "GB/s")
    time, _ = milliseconds(lambda: host.copy_(device, non_blocking=True), 10)
    emit("pinned device to host", size / GB / time * 1e3, "GB/s")


def main():
    if not torch.cuda.is_available():
        raise SystemExit("gpu_facts: no CUDA device")
    card = torch.cuda.get_device_properties(0)
    emit("multiprocessors", card.multi_processor_count, "", l2_mb=round(card.L2_cache_size / 1e6), memory_gb=round(card.total_memory / GB, 1),
        sm=f"{card.major}.{card.minor}", torch=torch.__version__)
    for part in (copies, large_product, small_kernels, expert_products, transfers):
        try:
            part()
        except RuntimeError as error:
            print(f"{part.__name__}: {str(error).splitlines()[0]}", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
