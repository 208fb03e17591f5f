"""What the benchmarks share: child processes that are measured, interleaved timing, tables.

Not a benchmark itself. Every file beside this one makes one claim and runs alone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

ROOT = Path(__file__).parents[1]
JOBS = Path(__file__).with_name("_jobs.py")
POLL_SECONDS = 0.005
JOB_SECONDS = 600.0
MB = 1e6

T = TypeVar("T")
Better = Literal["lower", "higher"]


def shared_folder() -> Path:
    """The folder with the evaluation data and models.

    Raises:
        SystemExit: it is not there.
    """
    folder = Path(os.environ.get("ONNXQ_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        raise SystemExit(f"no data in {folder}; set ONNXQ_SHARED to the folder with data/")
    return folder


def spread(items: Sequence[T], count: int) -> list[T]:
    """``count`` items, evenly spread from the first to the last."""
    if count >= len(items):
        return list(items)
    last = len(items) - 1
    return [items[round(i * last / max(1, count - 1))] for i in range(count)]


def parser(doc: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", action="store_true", help="one JSON object a line")
    made.add_argument("--quick", action="store_true", help="small samples: does it run at all?")
    return made


@contextmanager
def workspace() -> Iterator[Path]:
    """A temporary folder for the models of one benchmark."""
    with tempfile.TemporaryDirectory(prefix="onnxq-bench-") as folder:
        yield Path(folder)


@dataclass(frozen=True)
class Cost:
    """What a child process took.

    Attributes:
        cpu_s: user and system time of the process and its children, from its start: the import
            of Python and of the packages counts.
        wall_s: time from start to end.
        peak_mb: largest resident memory, 10**6 bytes, of the process and its children together;
            pages that two of them map count twice.
        own_mb: the same of the process alone.
        error: first line of what it failed with, or None.
        result: what the job returned.
    """

    cpu_s: float = 0.0
    wall_s: float = 0.0
    peak_mb: float = 0.0
    own_mb: float = 0.0
    error: str | None = None
    result: Mapping[str, Any] = field(default_factory=dict)


def run_job(job: str, *, python: Path | None = None, **options: Any) -> Cost:
    """Run a job of ``_jobs.py`` in a fresh process and measure it.

    Args:
        job: name of the function.
        python: interpreter of another environment, where a peer is installed.
        **options: what the job is given.
    """
    known = [str(ROOT), *([] if python else sys.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(known)}
    with tempfile.TemporaryDirectory(prefix="onnxq-job-") as folder:
        answer = Path(folder) / "answer.json"
        request = json.dumps({"job": job, "answer": str(answer), **options}, default=str)
        began = time.perf_counter()
        child = subprocess.Popen(
            [str(python or sys.executable), str(JOBS), request],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=folder,  # a peer that litters the working directory litters this one
            env=environment,
            text=True,
            start_new_session=True,
        )
        tree = _TreeMemory(child.pid)
        try:
            _, stderr = child.communicate(timeout=JOB_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            return Cost(
                wall_s=JOB_SECONDS, peak_mb=tree.stop(), error=f"not done in {JOB_SECONDS:g} s"
            )
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            raise
        wall = time.perf_counter() - began
        peak = tree.stop()
        if not answer.is_file():
            lines = stderr.strip().splitlines()
            why = lines[-1] if lines else "no message"
            return Cost(wall_s=wall, peak_mb=peak, error=f"exit code {child.returncode}: {why}")
        told = json.loads(answer.read_text())
    return Cost(
        cpu_s=told["cpu_s"],
        wall_s=wall,
        peak_mb=max(peak, told["peak_mb"]),
        own_mb=told["peak_mb"],
        error=told["error"],
        result=told["result"],
    )


class _TreeMemory:
    """Watches the resident memory of a process and its children, summed, from a thread.

    A sum counts when two looks in a row saw it: between vfork and exec a child shows its parent's
    memory as its own, for less than a millisecond.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """The peak, in 10**6 bytes."""
        self._done.set()
        self._thread.join()
        return self._peak / MB

    def _watch(self) -> None:
        before = 0
        while not self._done.wait(POLL_SECONDS):
            now = sum(_resident(pid) for pid in _tree(self._pid))
            self._peak = max(self._peak, min(before, now))
            before = now


def _tree(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(p for child in children for p in _tree(int(child)))]


def _resident(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def open_session(path: Path, threads: int) -> Any:
    """A CPU session with our operators registered, that does not spin while another one runs."""
    import onnxruntime

    from onnxq.runtime import usable_library

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that wait for the next run of their session would take the time of the others.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    library = usable_library()
    if library is not None:
        options.register_custom_ops_library(str(library.path))
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class Timing:
    """Latency of one model.

    Attributes:
        ms: median wall time of a run.
        cpu_ms: median processor time of a run, over all threads.
        speedup: median over the rounds of the baseline's time divided by this one's.
        cpu_speedup: the same of processor times; little disturbed by other load.
    """

    ms: float
    cpu_ms: float
    speedup: float
    cpu_speedup: float


def interleave(
    runs: Mapping[str, Callable[[], object]], rounds: int, baseline: str, warm_up: int = 3
) -> dict[str, Timing]:
    """Time all runs in one process, in turn: A B C, B C A, C A B, ...

    Speed-ups are of runs in the same round, so that a machine that slows down for a while slows
    down both.
    """
    names = list(runs)
    for name in names:
        for _ in range(warm_up):
            runs[name]()
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            began, cpu_began = time.perf_counter(), time.process_time()
            runs[name]()
            cpu[name].append(time.process_time() - cpu_began)
            wall[name].append(time.perf_counter() - began)
    return {
        name: Timing(
            statistics.median(wall[name]) * 1e3,
            statistics.median(cpu[name]) * 1e3,
            _paired(wall[baseline], wall[name]),
            _paired(cpu[baseline], cpu[name]),
        )
        for name in names
    }


def _paired(reference: Sequence[float], other: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(reference, other, strict=True))


def time_models(
    paths: Mapping[str, Path], feeds: Mapping[str, Any], threads: int, rounds: int, baseline: str
) -> dict[str, Timing]:
    """Interleaved latency of models that take equal inputs; all sessions are made first."""
    sessions = {name: open_session(path, threads) for name, path in paths.items()}

    def runner(session: Any) -> Callable[[], object]:
        given = {a.name: feeds[a.name] for a in session.get_inputs()}
        return lambda: session.run(None, given)

    return interleave({n: runner(s) for n, s in sessions.items()}, rounds, baseline)


@dataclass(frozen=True)
class Column:
    """A column of a table: the key of a figure, its heading, format and direction."""

    key: str
    title: str
    unit: str
    better: Better
    form: str = "{:.2f}"


@dataclass
class Row:
    """One configuration: ``label`` in the table, and its figures by column key."""

    name: str
    label: str
    ours: bool = False
    figures: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    def cell(self, column: Column) -> str:
        """The figure as text, or a dash."""
        value = self.figures.get(column.key)
        return "-" if value is None else column.form.format(value)


def print_table(title: str, rows: Iterable[Row], columns: Sequence[Column]) -> None:
    """A table for people; ours in bold, failures in words."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title)
    table.add_column("")
    for column in columns:
        table.add_column(column.title, justify="right")
    failed = []
    for row in rows:
        table.add_row(
            row.label,
            *(row.cell(c) if row.error is None else "failed" for c in columns),
            style="bold" if row.ours else "",
        )
        if row.error is not None:
            failed.append(f"{row.label} failed: {row.error}")
    width = None if sys.stdout.isatty() else 150
    console = Console(width=width)
    console.print(table)
    for line in failed:
        console.print(escape(line), style="red")


def markdown_table(rows: Iterable[Row], columns: Sequence[Column]) -> str:
    """The same as Markdown."""
    lines = [
        "| | " + " | ".join(c.title for c in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for row in rows:
        label = f"**{row.label}**" if row.ours else row.label
        if row.error is None:
            cells = [f"**{row.cell(c)}**" if row.ours else row.cell(c) for c in columns]
        else:
            cells = [f"failed: `{row.error[:80]}`", *([""] * (len(columns) - 1))]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def compare_rows(
    case: str, ours: Row, peers: Iterable[Row], columns: Sequence[Column]
) -> Iterator[dict[str, Any]]:
    """One JSON object for each peer and figure; ``ratio`` above 1 means that ours is better."""
    for peer in peers:
        for column in columns:
            mine, other = ours.figures.get(column.key), peer.figures.get(column.key)
            if mine is None or (other is None and peer.error is None):
                continue
            yield {
                "case": f"{case} {column.key}",
                "ours": mine,
                "peer": other,
                "peer_name": peer.name,
                "ratio": _ratio(mine, other, column.better),
                "unit": column.unit,
                "better": column.better,
                **({"peer_error": peer.error} if peer.error else {}),
                **({"ours_error": ours.error} if ours.error else {}),
            }


def _ratio(mine: float, other: float | None, better: Better) -> float | None:
    if not mine or not other:
        return None
    return mine / other if better == "higher" else other / mine


def emit(objects: Iterable[Mapping[str, Any]]) -> None:
    """Print JSON objects, one a line."""
    for entry in objects:
        print(json.dumps(entry), flush=True)


def machine() -> str:
    """The processor, the number of CPUs that this process may use, and the library's version."""
    import onnxruntime

    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    flags = Path("/proc/cpuinfo").read_text()
    level = next((n for n in ("avx512_vnni", "avx_vnni", "avx2") if n in flags), "no AVX2")
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, {level}, onnxruntime {onnxruntime.__version__}"
