"""Progress line on standard error: redrawn in place on a terminal, otherwise one line every ten seconds."""

from __future__ import annotations

import sys
import time


class Progress:
    """Counter of `total` items of work, named by `label`."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total = label, max(total, 1)
        self._start = time.monotonic()
        self._shown = 0.0 if sys.stderr.isatty() else self._start
        self._every = 0.2 if sys.stderr.isatty() else 10.0

    def update(self, done: int, note: str = "") -> None:
        """Shows that `done` items are finished; `note` is appended."""
        now = time.monotonic()
        if now - self._shown < self._every and done < self._total:
            return
        self._shown = now
        elapsed = now - self._start
        remaining = elapsed / done * (self._total - done) if done else 0.0
        line = f"{self._label} {done}/{self._total} ({elapsed:.0f} s, {remaining:.0f} s left) {note}".rstrip()
        if sys.stderr.isatty():
            end = "\n" if done >= self._total else ""
            sys.stderr.write(f"\r\033[K{line}{end}")
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()
