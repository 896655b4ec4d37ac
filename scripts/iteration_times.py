#!/usr/bin/env python3
"""Prints the time of an RL iteration by part, and appends the numbers to a file of JSON lines.

usage: iteration_times.py METRICS_JSONL OUT_JSONL
"""

import json
import statistics
import sys

PARTS = ("rollout_seconds", "prefix_seconds", "update_seconds", "publish_seconds")


def main():
    metrics, out = sys.argv[1:]
    with open(metrics) as lines:
        rows = [row for row in map(json.loads, lines) if row["stage"] == "train"]

    def median(name):
        return statistics.median(row[name] for row in rows)

    total = median("iteration_seconds")
    print(f"\none RL iteration of {metrics} (median of {len(rows)}): {total:.2f} s")
    for name in PARTS:
        print(f"  {name:18} {median(name):6.2f} s  {100 * median(name) / total:5.1f} %")
    rates = {
        "learner_records_per_second_all_epochs":
            statistics.median(row["records"] / row["update_seconds"] for row in rows if row["updates"]),
        "env_steps_per_second": statistics.median(row["env_steps"] / row["rollout_seconds"] for row in rows),
        "reload_seconds": median("reload_seconds"),
    }
    for name, value in rates.items():
        print(f"  {name}: {value:.3g}")
    numbers = {name: median(name) for name in (*PARTS, "iteration_seconds")} | rates
    with open(out, "a") as file:
        for name, value in numbers.items():
            unit = "1/s" if name.endswith("per_second") else "s"
            file.write(json.dumps({"name": name, "value": value, "unit": unit, "source": metrics}) + "\n")


if __name__ == "__main__":
    main()
