"""Run as a program: save over an old output in forked children that die in the middle.

    python save_faults.py FOLDER EXTERNAL KIND

For every fault point a child starts ``save`` and meets the fault; the parent looks at what is left,
then saves again and looks at that. One JSON object a line is printed. KIND is a signal name, an
errno name, ``FSIZE`` for a real file size limit, or ``READONLY`` for a folder of another user.
A fault point is a number of bytes written, or a call (``fsync``, ``replace``) by its number.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from onnxq.errors import OnnxqError
from onnxq.graph import atomic, io

CLEAN, REFUSED, INTERRUPTED = 0, 5, 130


class Faulty:
    """A file that meets ``fault`` once ``limit`` bytes were written, all of them on the disk."""

    def __init__(self, file: IO[bytes], limit: int, fault: Callable[[], None]) -> None:
        self._file, self._limit, self._fault = file, limit, fault

    def write(self, data: bytes) -> int:
        if self._limit >= 0 and len(data) > self._limit:
            self._file.write(data[: self._limit])
            self._file.flush()
            self._limit = -1
            self._fault()
        self._limit -= len(data) if self._limit >= 0 else 0
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def counted(call: Callable[..., Any], number: int, fault: Callable[[], None]) -> Callable[..., Any]:
    """``call``, with the fault before its ``number``-th use (after it when negative)."""
    used = 0

    def wrapper(*args: Any, **options: Any) -> Any:
        nonlocal used
        used += 1
        if used == number:
            fault()
        result = call(*args, **options)
        if used == -number:
            fault()
        return result

    return wrapper


def install(point: str, fault: Callable[[], None]) -> None:
    """Arrange the fault at ``point`` in this process."""
    place, _, number = point.partition(":")
    if place == "byte":
        real = os.fdopen
        budget = int(number)
        atomic.os.fdopen = lambda *a, **k: Faulty(real(*a, **k), budget, fault)  # type: ignore
    elif place == "fsync":
        atomic.os.fsync = counted(os.fsync, int(number), fault)
    elif place == "replace":
        atomic.Path.replace = counted(Path.replace, int(number), fault)  # type: ignore


def fault_of(kind: str) -> Callable[[], None]:
    if kind.startswith("SIG"):
        return lambda: os.kill(os.getpid(), signal.Signals[kind])
    code = getattr(errno, kind)

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    return fail


def child(source: Path, target: Path, external: bool, kind: str, point: str) -> int:
    """Save with the fault installed; the exit code says how it ended."""
    model = io.load(source)
    try:
        if kind == "FSIZE":
            size = int(point.partition(":")[2])
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        elif kind == "READONLY":
            target.parent.chmod(0o555)
            if os.geteuid() == 0:
                os.setuid(65534)
        else:
            install(point, fault_of(kind))
        io.save(model, target, external=external)
    except OnnxqError as error:
        print(error.code, file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        return INTERRUPTED
    return CLEAN


def listing(folder: Path) -> dict[str, str]:
    return {entry.name: io.file_hash(entry) for entry in sorted(folder.iterdir())}


def run_point(base: Path, source: Path, external: bool, kind: str, point: str) -> dict[str, Any]:
    folder = base / point.replace(":", "_").replace("-", "m")
    folder.mkdir()
    target = folder / "out.onnx"
    io.save(io.load(base / "old.onnx"), target, external=external)
    old = listing(folder)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = child(source, target, external, kind, point)
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    folder.chmod(0o755)
    after = listing(folder)
    loads = io.fingerprint(io.load(target))
    io.save(io.load(source), target, external=external)
    resumed = listing(folder)
    return {
        "point": point,
        "status": os.waitstatus_to_exitcode(status),
        "old": old,
        "after": after,
        "fingerprint": loads,
        "resumed": resumed,
    }


def main() -> None:
    base, external, kind = Path(sys.argv[1]), sys.argv[2] == "external", sys.argv[3]
    source = base / "new.onnx"
    clean = base / "clean"
    clean.mkdir()
    saved = io.save(io.load(source), clean / "out.onnx", external=external)
    sizes = [path.stat().st_size for path in (saved.path, saved.data_path) if path]
    offsets = sorted({0, 1, *(size * i // 12 for size in sizes for i in range(12)), sizes[0] - 1})
    points = [f"byte:{offset}" for offset in offsets]
    if kind == "READONLY":
        points = ["all:0"]
    elif kind != "FSIZE":
        files = len(sizes)
        calls = range(1, files + 1)
        points += [f"fsync:{i}" for i in range(1, 4 * files + 1)]
        points += [f"replace:{i}" for i in calls] + [f"replace:-{i}" for i in calls]
    print(json.dumps({"clean": listing(clean)}))
    for point in points:
        print(json.dumps(run_point(base, source, external, kind, point)), flush=True)


if __name__ == "__main__":
    main()
