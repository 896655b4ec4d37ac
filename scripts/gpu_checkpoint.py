#!/usr/bin/env python3
"""Writes a pi0 checkpoint of random bf16 weights under openpi's names, as wide as a trained network's weights.

usage: gpu_checkpoint.py NAMES.txt OUT.safetensors [--threads N]

NAMES.txt has a tensor per line: name, shape and type between tabs, as tests/golden/real_tensor_names_pi0.txt. The tensors are drawn on the
CPU by many threads and written to their places in the file; the same names give the same file.
"""

import argparse
import concurrent.futures
import json
import math
import os
import pathlib
import re
import time

import torch

# openpi's files hold the tied embedding once, under the output head's name
ALIAS = "language_model.embed_tokens.weight"
# no computation reads the expert's output head
UNUSED = "gemma_expert.lm_head.weight"
BLOCK = 1 << 22


def tensors(text):
    """Returns (name, shape) of the tensors of a checkpoint."""
    rows = [line.split("\t") for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, json.loads(shape)) for name, shape, _ in rows if not name.endswith((ALIAS, UNUSED))]


def spread(name, shape):
    """Returns mean and deviation of a tensor's values."""
    if len(shape) > 1:
        # position embeddings are added to patches of about this size
        return 0.0, 0.02 if "position_embedding" in name else math.prod(shape[1:]) ** -0.5
    if name.endswith(".bias"):
        return 0.0, 0.02
    # LayerNorm multiplies by w, Gemma's norm by 1 + w
    return (1.0 if re.search(r"layer_?norm", name) and "vision_tower" in name else 0.0), 0.1


def header(names):
    """Returns the file's head and the offset of each tensor's first byte."""
    table, end = {}, 0
    for name, shape in names:
        begin, end = end, end + 2 * math.prod(shape)
        table[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}} | table).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + entry["data_offsets"][0] for name, entry in table.items()}, len(head) + end


def write(names, path, threads):
    head, places, size = header(names)
    torch.set_num_threads(1)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        os.truncate(file, size)
        os.pwrite(file, head, 0)

        def block(seed, name, shape, start, count):
            mean, deviation = spread(name, shape)
            values = torch.empty(count).normal_(mean, deviation, generator=torch.Generator().manual_seed(seed))
            left, place = memoryview(values.to(torch.bfloat16).view(torch.int16).numpy()).cast("B"), places[name] + 2 * start
            while left:
                done = os.pwrite(file, left, place)
                left, place = left[done:], place + done
        jobs = [(name, shape, start, min(BLOCK, math.prod(shape) - start)) for name, shape in names
            for start in range(0, math.prod(shape), BLOCK)]
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(block, seed, *job) for seed, job in enumerate(jobs)]:
                done.result()
    finally:
        os.close(file)
    return size


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("names", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--threads", type=int, default=max(1, len(os.sched_getaffinity(0)) - 2))
    args = parser.parse_args()
    begin = time.perf_counter()
    size = write(tensors(args.names.read_text()), args.out, args.threads)
    print(json.dumps({"name": "checkpoint written", "value": round(time.perf_counter() - begin, 1), "unit": "s", "gb": round(size / 1e9, 2)}))


if __name__ == "__main__":
    main()
