#!/usr/bin/env python3
"""Prints success before and after the quickstart.

usage: quickstart_summary.py EVAL_JSON SECONDS
"""

import json
import pathlib
import sys


def main():
    results, seconds = sys.argv[1:]
    before, after = json.loads(pathlib.Path(results).read_text())
    print(f"quickstart: success {before['success']:.2f} -> {after['success']:.2f} on {after['episodes']} episodes, "
          f"{seconds} s, {after['version']} policy versions")


if __name__ == "__main__":
    main()
