"""What a pass is, what it may read and write, and what it reports.

A pass is a frozen dataclass. Its fields are its options, ``str(p)`` is its spelling in a pipeline
text, and class variables declare its contract:

- ``requires`` / ``provides`` / ``invalidates`` / ``forbids``: typed artifact keys;
- ``tolerance``: the pass keeps the model's function to that relative error, or ``None`` if it
  changes numerics by intent.

``run(model, ctx)`` edits the model in place and returns a :class:`PassReport` in which every
candidate is either changed or skipped with a reason.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

from onnxq.errors import InternalError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from onnxq.calibration.data import CalibrationData
    from onnxq.calibration.requests import StatRequest
    from onnxq.passes.targets import Target
    from onnxq.passes.work import Executor

T = TypeVar("T")


@runtime_checkable
class Storable(Protocol):
    """An artifact that can be written to disk and read back for a resumed run."""

    def to_storage(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """A JSON-serialisable header and named arrays."""
        ...

    @classmethod
    def from_storage(cls, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Any:
        """The inverse of :meth:`to_storage`."""
        ...


@dataclass(frozen=True)
class Key(Generic[T]):
    """A typed name on the blackboard that passes share.

    Args:
        name: kebab-case, as it is printed in messages.
        type: class of the value, checked at every ``put``.
        doc: one line: what the value says and about which model.
    """

    name: str
    type: type[T]
    doc: str

    def __str__(self) -> str:
        return self.name


class Artifacts:
    """The blackboard: what earlier passes found out, by key."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    def __contains__(self, key: Key[Any]) -> bool:
        return key.name in self._values

    def get(self, key: Key[T]) -> T:
        """The value of ``key``; a missing one is a bug of the caller's declarations."""
        try:
            value: T = self._values[key.name]
        except KeyError:
            raise InternalError(
                "ARTIFACT-MISSING", f"artifact `{key}` was never provided"
            ) from None
        return value

    def put(self, key: Key[T], value: T) -> None:
        """Store ``value``; its type must be the key's."""
        if not isinstance(value, key.type):
            raise InternalError(
                "ARTIFACT-TYPE",
                f"artifact `{key}` must be {key.type.__name__}, not {type(value).__name__}",
            )
        self._values[key.name] = value

    def drop(self, key: Key[Any]) -> None:
        """Forget ``key`` if it is there."""
        self._values.pop(key.name, None)

    def items(self) -> Iterable[tuple[str, Any]]:
        """All (name, value) pairs, in the order in which they were provided."""
        return self._values.items()


class DeclaredArtifacts:
    """The blackboard as one pass sees it: what it did not declare does not exist."""

    def __init__(self, artifacts: Artifacts, owner: Pass) -> None:
        self._artifacts = artifacts
        self._owner = owner
        self._readable = {k.name for k in (*owner.needs(), *owner.uses, *owner.provides)}
        self._writable = {k.name for k in owner.provides}

    def __contains__(self, key: Key[Any]) -> bool:
        self._check(key, self._readable, "read")
        return key in self._artifacts

    def get(self, key: Key[T]) -> T:
        """Read a declared artifact."""
        self._check(key, self._readable, "read")
        return self._artifacts.get(key)

    def put(self, key: Key[T], value: T) -> None:
        """Write an artifact that the pass declares in ``provides``."""
        self._check(key, self._writable, "write")
        self._artifacts.put(key, value)

    def _check(self, key: Key[Any], allowed: set[str], verb: str) -> None:
        if key.name not in allowed:
            raise InternalError(
                "ARTIFACT-UNDECLARED",
                f"pass `{self._owner.name}` tried to {verb} `{key}`, which it does not declare",
            )


@dataclass(frozen=True)
class Change:
    """One thing that a pass did: where, what, and in numbers if it has any."""

    site: str
    what: str
    detail: str = ""


@dataclass(frozen=True)
class Skip:
    """One candidate that a pass left alone, and why."""

    site: str
    reason: str


@dataclass(frozen=True)
class Curve:
    """What a pass weighed against each other, for a plot in the report.

    Args:
        title, x_label, y_label: in words, with units.
        points: (x, y, what it is), by rising x.
        chosen: the point that was chosen.
        limit: a bound on y; None without one.
    """

    title: str
    x_label: str
    y_label: str
    points: tuple[tuple[float, float, str], ...]
    chosen: tuple[float, float]
    limit: float | None = None

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Curve:
        """The inverse of ``dataclasses.asdict``, after a trip through JSON."""
        points = tuple((x, y, what) for x, y, what in raw["points"])
        return cls(**{**raw, "points": points, "chosen": tuple(raw["chosen"])})


@dataclass
class PassReport:
    """What a pass did to each of its candidates."""

    changed: list[Change] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)

    def change(self, site: str, what: str, detail: str = "") -> None:
        """Record that ``site`` was changed."""
        self.changed.append(Change(site, what, detail))

    def skip(self, site: str, reason: str) -> None:
        """Record that ``site`` was a candidate and was left alone."""
        self.skipped.append(Skip(site, reason))

    def note(self, text: str) -> None:
        """Record a fact worth reading that belongs to no single site."""
        self.notes.append(text)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-serialisable data."""
        return dataclasses.asdict(self)


class Progress(Protocol):
    """What a pass calls as it proceeds."""

    def __call__(self, what: str, done: int, total: int | None) -> None:
        """``done`` of ``total`` of ``what``; ``total`` is None while it is not known."""
        ...


def no_progress(what: str, done: int, total: int | None) -> None:
    """The default progress callback: silence."""


@dataclass
class Budget:
    """How many more rewrites a pass may make; ``--bisect`` lowers it to find the first bad one.

    A pass that rewrites site by site asks :meth:`take` before each rewrite and leaves the site
    alone when the answer is no. A pass that never asks is bisected as a whole.
    """

    limit: int | None = None
    sites: list[str] = field(default_factory=list)

    def take(self, site: str) -> bool:
        """Whether ``site`` may be rewritten; a yes is counted."""
        if self.limit is not None and len(self.sites) >= self.limit:
            return False
        self.sites.append(site)
        return True


@dataclass
class Context:
    """What the runner hands to a pass besides the model.

    Args:
        artifacts: the blackboard, restricted to the pass's declarations.
        target: runtime and machine that the output is for.
        data: calibration samples, or None when the run has none.
        holdout: samples that no pass calibrates on, for checks of the output.
        reference: the model as it came in, unchanged, for passes that compare with it.
        upcoming: the passes that run later, in order.
        seed: the only source of randomness.
        threads: for onnxruntime sessions that a pass creates.
        progress: called by passes that take more than a second.
        budget: asked before each rewrite, so that a bad one can be found.
        executor: takes independent tasks; None to run them here.
    """

    artifacts: DeclaredArtifacts
    target: Target
    data: CalibrationData | None
    holdout: CalibrationData | None
    reference: ir.Model
    upcoming: Sequence[Pass] = ()
    seed: int = 0
    threads: int = 1
    progress: Progress = no_progress
    budget: Budget = field(default_factory=Budget)
    executor: Executor | None = None


@dataclass(frozen=True)
class Pass(ABC):
    """Base of all passes; subclasses are frozen dataclasses whose fields are the options."""

    name: ClassVar[str]
    summary: ClassVar[str]
    requires: ClassVar[tuple[Key[Any], ...]] = ()
    uses: ClassVar[tuple[Key[Any], ...]] = ()
    """Keys read when they are there, and done without when not."""
    provides: ClassVar[tuple[Key[Any], ...]] = ()
    invalidates: ClassVar[tuple[Key[Any], ...]] = ()
    forbids: ClassVar[tuple[Key[Any], ...]] = ()
    tolerance: ClassVar[float | None] = None
    needs_data: ClassVar[bool] = False
    may_match_nothing: ClassVar[bool] = False
    """True for passes (cleaning, checks) where nothing to do is a good result."""

    @abstractmethod
    def run(self, model: ir.Model, ctx: Context) -> PassReport:
        """Edit ``model`` in place; say what was changed and what was skipped, and why."""

    def requests(self, model: ir.Model) -> list[StatRequest]:
        """The statistics that this pass wants from the sweep before it, on ``model`` as it is."""
        return []

    def needs(self) -> tuple[Key[Any], ...]:
        """Keys that must be there: ``requires``, and what the options chosen add to it."""
        return self.requires

    def wants_data(self) -> bool:
        """Whether the pass, with the options chosen, takes samples: ``needs_data``, or more."""
        return self.needs_data

    def candidates(self, model: ir.Model) -> list[str]:
        """The sites that the pass would look at, for ``--dry-run``; nothing is changed."""
        return []

    def opset_needed(self, target: Target) -> int:
        """Lowest opset in which what this pass decides can be written for ``target``.

        ``canonicalize`` raises the model to what the passes behind it need.
        """
        return 0

    def options(self) -> dict[str, Any]:
        """Options that differ from their defaults, by field name."""
        found: dict[str, Any] = {}
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if value != default_of(spec):
                found[spec.name] = value
        return found

    def __str__(self) -> str:
        options = " ".join(
            f"{name.replace('_', '-')}={format_option(value)}"
            for name, value in self.options().items()
        )
        return f"{self.name}{{{options}}}" if options else self.name


def default_of(spec: dataclasses.Field[Any]) -> Any:
    """The default of a dataclass field, or ``MISSING``."""
    if spec.default_factory is not dataclasses.MISSING:
        return spec.default_factory()
    return spec.default


_BARE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-+.*?/:@")


def format_option(value: Any) -> str:
    """An option value as the grammar reads it back."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple):
        return "[" + ",".join(format_option(v) for v in value) + "]"
    if isinstance(value, str):
        if value and set(value) <= _BARE and not _looks_typed(value):
            return value
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if value is None:
        return "none"
    raise InternalError("OPTION-TYPE", f"option value {value!r} has no spelling")


def _looks_typed(text: str) -> bool:
    """Whether the grammar could read ``text`` as something else than a text."""
    if text in {"true", "false", "none"}:
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True


Register = Callable[[type[Pass]], type[Pass]]
