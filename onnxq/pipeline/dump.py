"""A run's state on disk after every pass, to look at and to go on from.

``run.json`` says which run the folder belongs to. Pass 3 ``calibrate`` leaves
``03-calibrate.onnx``, ``03-calibrate.statistics.json`` and ``.npz`` for each artifact that it
wrote, and last ``03-calibrate.json``: its report, the model's fingerprint and the hashes of the
artifact files. A step without that last file never happened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from onnxq.errors import DataError
from onnxq.graph import io
from onnxq.graph.atomic import reported, temporary_for
from onnxq.graph.tensors import EXTERNAL, SOURCE, model_nbytes
from onnxq.passes.contract import Change, Curve, PassReport, Skip, Storable

if TYPE_CHECKING:
    import onnx_ir as ir

    from onnxq.passes.contract import Artifacts, Key, Pass
    from onnxq.pipeline.hooks import Step

_RUN: Final = "run.json"
_OURS: Final = re.compile(r"[0-9]{2,}-[\w.-]+\.(onnx|json|npz|data)")
_FORMAT: Final = 1


@dataclass(frozen=True)
class StoredStep:
    """What ``NN-name.json`` says.

    Args:
        artifacts: live artifact names, and the stem of the files that hold each; None where an
            artifact has no stored form.
        hashes: SHA-256 of this step's artifact files, by file name.
    """

    number: int
    name: str
    spec: str
    seconds: float
    cpu_seconds: float
    size: int
    max_error: float | None
    fingerprint: str
    artifacts: Mapping[str, str | None]
    hashes: Mapping[str, str]
    report_json: Mapping[str, Any]

    @property
    def stem(self) -> str:
        """Start of the names of this step's files."""
        return f"{self.number:02d}-{self.name}"

    def report(self) -> PassReport:
        """What the pass did."""
        raw = self.report_json
        return PassReport(
            changed=[Change(**c) for c in raw["changed"]],
            skipped=[Skip(**s) for s in raw["skipped"]],
            notes=list(raw["notes"]),
            curves=[Curve.from_json(c) for c in raw.get("curves", [])],
        )


class Dump:
    """The folder of one run."""

    def __init__(self, folder: Path, passes: Sequence[Pass]) -> None:
        self.folder = folder
        self._passes = passes
        self._live: dict[str, str | None] = {}

    @classmethod
    def open(
        cls, folder: Path, identity: Mapping[str, Any], passes: Sequence[Pass], *, resume: bool
    ) -> Dump:
        """The dump in ``folder``: a new one, or with ``resume`` the one that is there.

        Args:
            folder: is created if it is not there.
            identity: facts that make two runs the same run.
            passes: of the pipeline.
            resume: keep what is there; it must be from a run with the same identity.

        Raises:
            DataError: ``DATA-DUMP-FOLDER``: the folder holds other things; ``DATA-RESUME-STALE``:
                it is from another run.
        """
        dump = cls(folder, passes)
        recorded = dump._recorded()
        if resume and recorded is not None:
            _refuse_stale(folder, recorded, identity)
            return dump
        with reported(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if recorded is None and any(folder.iterdir()):
            raise DataError(
                "DATA-DUMP-FOLDER",
                f"{folder} is not empty and no earlier run's dump",
                "name an empty or a new folder",
            )
        for path in sorted(folder.iterdir()):
            if _OURS.fullmatch(path.name):
                path.unlink()
        dump._write_json(_RUN, {"format": _FORMAT, **identity})
        return dump

    def _recorded(self) -> dict[str, Any] | None:
        path = self.folder / _RUN
        if not path.is_file():
            return None
        found = _read_json(path)
        if found.pop("format", None) != _FORMAT:
            raise _damaged(path, "it has another format")
        return found

    def complete_steps(self) -> list[StoredStep]:
        """The steps that finished, in order, up to the last one that can be gone on from."""
        steps: list[StoredStep] = []
        for number, owner in enumerate(self._passes, start=1):
            path = self.folder / f"{number:02d}-{owner.name}.json"
            if not path.is_file():
                break
            try:
                steps.append(StoredStep(**_read_json(path)))
            except TypeError as error:
                raise _damaged(path, str(error)) from error
        while steps and None in steps[-1].artifacts.values():
            steps.pop()
        return steps

    def write(self, step: Step) -> str:
        """Write the state after ``step``; the model's fingerprint.

        Raises:
            DataError: the folder cannot be written, or the disk is full.
        """
        stem = f"{step.number:02d}-{step.owner.name}"
        io.save(step.model, self.folder / f"{stem}.onnx")
        hashes: dict[str, str] = {}
        written = {key.name for key in step.owner.provides}
        live: dict[str, str | None] = {}
        for name, value in step.artifacts.items():
            if name in written or name not in self._live:
                hashes.update(self._write_artifact(stem, name, value))
                live[name] = stem if isinstance(value, Storable) else None
            else:
                live[name] = self._live[name]
        self._live = live
        fingerprint = io.fingerprint(step.model)
        self._write_json(
            f"{stem}.json",
            {
                "number": step.number,
                "name": step.owner.name,
                "spec": str(step.owner),
                "seconds": step.seconds,
                "cpu_seconds": step.cpu_seconds,
                "size": model_nbytes(step.model),
                "max_error": step.max_error,
                "fingerprint": fingerprint,
                "artifacts": live,
                "hashes": hashes,
                "report_json": step.report.to_json(),
            },
        )
        return fingerprint

    def _write_artifact(self, stem: str, name: str, value: object) -> dict[str, str]:
        if not isinstance(value, Storable):
            return {}
        header, arrays = value.to_storage()
        base = f"{stem}.{name}"
        self._write_json(f"{base}.json", header)
        target = self.folder / f"{base}.npz"
        with reported(target), temporary_for(target) as temporary:
            np.savez(temporary.file, **arrays)  # type: ignore[arg-type]
            temporary.put_in_place()
        return {n: io.file_hash(self.folder / n) for n in (f"{base}.json", f"{base}.npz")}

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        target = self.folder / name
        with reported(target), temporary_for(target) as temporary:
            temporary.file.write(json.dumps(content, indent=1).encode())
            temporary.put_in_place()

    def load_model(self, step: StoredStep, reference: ir.Model) -> ir.Model:
        """The model after ``step``, to be saved as one that comes from ``reference``.

        Raises:
            DataError: ``DATA-RESUME-STALE``: it is not the model that the step recorded.
        """
        path = self.folder / f"{step.stem}.onnx"
        model = io.load(path)
        if io.fingerprint(model) != step.fingerprint:
            raise _stale(self.folder, f"{path.name} has changed since it was written")
        for key in (SOURCE, EXTERNAL):
            model.meta.pop(key, None)
            if key in reference.meta:
                model.meta[key] = reference.meta[key]
        return model

    def load_artifacts(self, steps: Sequence[StoredStep], artifacts: Artifacts) -> None:
        """Put the artifacts as they were after the last of ``steps``.

        Raises:
            DataError: ``DATA-RESUME-STALE``: a file is missing or changed.
        """
        keys: dict[str, Key[Any]] = {k.name: k for p in self._passes for k in p.provides}
        hashes = {name: value for s in steps for name, value in s.hashes.items()}
        for name, stem in steps[-1].artifacts.items():
            files = [f"{stem}.{name}.json", f"{stem}.{name}.npz"]
            for file in files:
                path = self.folder / file
                if not path.is_file() or io.file_hash(path) != hashes.get(file):
                    raise _stale(self.folder, f"{file} is missing or has changed")
            header = _read_json(self.folder / files[0])
            with np.load(self.folder / files[1], allow_pickle=False) as npz:
                arrays = {k: npz[k] for k in npz.files}
            artifacts.put(keys[name], keys[name].type.from_storage(header, arrays))
        self._live = dict(steps[-1].artifacts)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    return found


def _refuse_stale(folder: Path, recorded: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    differing = sorted(k for k in {*recorded, *identity} if recorded.get(k) != identity.get(k))
    if differing:
        raise _stale(folder, f"it was made with another {', another '.join(differing)}")


def _stale(folder: Path, why: str) -> DataError:
    return DataError(
        "DATA-RESUME-STALE",
        f"the run in {folder} cannot be resumed: {why}",
        "start again without --resume, or name another folder",
    )


def _damaged(path: Path, why: str) -> DataError:
    return DataError(
        "DATA-RESUME-DAMAGED",
        f"{path} cannot be used: {why}",
        "start again without --resume",
    )
