#!/usr/bin/env python3
"""Prints a Markdown table of success before and after training, one row per name over all seeds.

usage: compare_table.py OUT/NAME-seedN...
"""

import json
import pathlib
import re
import statistics
import sys


def main():
    rows = {}
    for folder in map(pathlib.Path, sys.argv[1:]):
        before, after = json.loads((folder / "eval.json").read_text())
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        train = [line for line in lines if line["stage"] == "train"]
        rows.setdefault(re.sub(r"-seed\d+$", "", folder.name), []).append(
            (before["success"], after["success"], train[-1]["episodes"]))
    print("| run | before | after, mean (each seed) | training episodes |\n|---|---|---|---|")
    for name, seeds in rows.items():
        first, last, episodes = zip(*seeds)
        each = ", ".join(f"{a:.2f}" for a in last)
        print(f"| {name} | {statistics.mean(first):.2f} | {statistics.mean(last):.2f} ({each}) | {statistics.mean(episodes):.0f} |")


if __name__ == "__main__":
    main()
