"""Processes, results and the table of scripts/gpu."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import threading
import time

# the reply of a machine may hold only the end of the output
TABLE_CHARACTERS = 11_000
LINE = 150
TAIL_LINES = 15
LOG_BYTES_PER_CALL = 400_000


class StepFailed(Exception):
    """A step's failure: one line, and the last lines of its output."""

    def __init__(self, line, tail=()):
        super().__init__(line)
        self.tail = list(tail)


def middle_cut(line, most):
    """Shortens a line; begin and end say most."""
    return line if len(line) <= most else f"{line[:most // 3]} [...] {line[-(most - most // 3 - 7):]}"


class Results:
    """Numbers and failures of a run: OUT/results.jsonl, OUT/log.txt and OUT/table.txt."""

    def __init__(self, out):
        self.out = out
        self.card = "none"
        self.rows, self.notes, self.lock = [], [], threading.RLock()
        # adds to a row what the driver knows, before the row is written
        self.complete = lambda row: {}
        self.begin, self.took = time.monotonic(), {}
        for name in ("results.jsonl", "log.txt", "table.txt"):
            (out / name).write_text("")

    def add(self, step, name, value, unit, **more):
        row = {"step": step, "name": name, "value": value, "unit": unit, "card": self.card} | more
        row |= self.complete(row)
        with self.lock:
            self.rows.append(row)
            with (self.out / "results.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")

    def note(self, step, line, tail=()):
        """Records a failure or a step that was left out."""
        self.add(step, "note", None, "", note=line, tail=list(tail))
        with self.lock:
            self.notes.append((step, line, list(tail)))

    def log(self, heading, text):
        if len(text) > LOG_BYTES_PER_CALL:
            text = text[:LOG_BYTES_PER_CALL // 2] + "\n[...]\n" + text[-LOG_BYTES_PER_CALL // 2:]
        with self.lock, (self.out / "log.txt").open("a") as file:
            file.write(f"==== {heading}\n{text.rstrip()}\n\n")

    def value(self, name):
        with self.lock:
            return next((row["value"] for row in reversed(self.rows) if row["name"] == name), None)

    def table(self):
        """Returns the numbers and the failures as text, with fewer lines of output per failure the more failures there are."""
        with self.lock:
            rows = [row for row in self.rows if row["name"] != "note"]
            steps = ", ".join(f"{name} {seconds:.0f}" for name, seconds in self.took.items())
            lines = [f"card {self.card}; seconds of the steps: {steps}"]
            for row in rows:
                shown = f"{row['value']:.4g}" if isinstance(row["value"], float) else str(row["value"])
                more = " ".join(f"{k}={v}" for k, v in row.items() if k not in ("step", "name", "value", "unit", "card", "k", "b", "runs"))
                lines.append(f"{row['step']:8} {row['name']:34} {shown:>9} {row['unit']:7} {more}".rstrip()[:LINE])
            notes = [f"{step}: {middle_cut(line, 2 * LINE)}" for step, line, _ in self.notes]
            # the tails share the characters that the rest leaves
            left = TABLE_CHARACTERS - sum(len(line) + 1 for line in lines + notes)
            tails = sum(1 for _, _, tail in self.notes if tail)
            each = max(1, min(TAIL_LINES, left // (LINE + 5) // max(1, tails)))
            if notes:
                lines.append("notes")
            for note, (_, _, tail) in zip(notes, self.notes):
                lines += [note, *(f"    {middle_cut(line, LINE)}" for line in tail[-each:])]
        text = "\n".join(lines) + "\n"
        if len(text) > TABLE_CHARACTERS:
            text = text[:TABLE_CHARACTERS - 40] + "\n[cut; OUT/table.txt is whole]\n"
        (self.out / "table.txt").write_text("\n".join(lines) + "\n")
        return text


class Processes:
    """Child processes, each in a session of its own, so that a group is ended as a whole."""

    def __init__(self):
        self.groups, self.lock, self.closed = set(), threading.Lock(), False

    def start(self, argv, **options):
        with self.lock:
            if self.closed:
                raise StepFailed("the run is over")
            child = subprocess.Popen([str(a) for a in argv], start_new_session=True, stdin=subprocess.DEVNULL, **options)
            self.groups.add(child.pid)
        return child

    def end(self, child):
        """Ends the child's group, also when the child itself has ended, and waits for the child."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        with self.lock:
            self.groups.discard(child.pid)

    def close(self):
        with self.lock:
            self.closed = True
            for group in self.groups:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(group, signal.SIGKILL)


class Step:
    """One step: its processes' output becomes results, its deadline holds for all its processes."""

    def __init__(self, name, results, processes, scratch, seconds, env):
        self.name, self.results, self.processes, self.scratch, self.env = name, results, processes, scratch, env
        self.deadline = time.monotonic() + seconds

    def left(self):
        return self.deadline - time.monotonic()

    def emit(self, name, value, unit, **more):
        self.results.add(self.name, name, value, unit, **more)

    def call(self, argv, seconds=None, what=None, env=None, ok=(0,), during=None):
        """Runs a program and returns its output. Lines of JSON with a name and a value become results, also of a program that fails.

        `env` replaces the environment, `during` is called every second with the program's process number.
        """
        what = what or pathlib.Path(str(argv[0])).name
        seconds = min(self.left(), seconds or self.left())
        if seconds < 1:
            raise StepFailed(f"{what}: no time left")
        self.scratch.mkdir(parents=True, exist_ok=True)
        path = self.scratch / f"{self.name}-{time.monotonic_ns()}.log"
        begin, late = time.monotonic(), False
        with path.open("wb") as file:
            try:
                child = self.processes.start(argv, stdout=file, stderr=subprocess.STDOUT, env=self.env if env is None else env)
            except OSError as error:
                raise StepFailed(f"{what}: {error.strerror}: {error.filename or argv[0]}") from error
            try:
                while child.poll() is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(min(1.0, max(0.01, seconds - (time.monotonic() - begin))))
                    if child.poll() is None and time.monotonic() - begin >= seconds:
                        late = True
                        break
                    if during and child.poll() is None:
                        during(child.pid)
            finally:
                self.processes.end(child)
        text = path.read_bytes().decode(errors="replace").replace("\r", "\n")
        path.unlink()
        took = time.monotonic() - begin
        self.results.log(f"{self.name}: {' '.join(map(str, argv))} [{took:.1f} s, {'time-out' if late else f'exit {child.returncode}'}]", text)
        for row in json_lines(text):
            if {"name", "value", "unit"} <= row.keys() and not {"step", "card"} & row.keys():
                self.emit(**row)
        if late or child.returncode not in ok:
            lines = [line for line in text.splitlines() if line.strip() and not line.startswith("{")]
            last = lines.pop().strip() if lines else "no output"
            if late:
                raise StepFailed(f"{what}: stopped after {took:.0f} s: {last}", lines[-TAIL_LINES:])
            raise StepFailed(f"{what}: exit {child.returncode}: {last}", lines[-TAIL_LINES:])
        return text


def json_lines(text):
    """Returns the JSON objects among the lines of a program's output."""
    found = []
    for line in text.splitlines():
        if line.startswith("{"):
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
    return found
