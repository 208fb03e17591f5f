"""What ``onnxq run`` does: call the pipeline, then show what it says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxq.cli import console
from onnxq.cli.state import State, current
from onnxq.errors import DataError, EquivalenceError, SpecError

if TYPE_CHECKING:
    from onnxq.cli.evidence import Evidence
    from onnxq.pipeline.summary import RunSummary

_DATA_OPTIONS = ("tokenizer", "images", "samples", "max_length")


def execute(model: Path, passes: str, out: Path | None, options: Mapping[str, Any]) -> int:
    """Run, dry-run or bisect; returns the exit code.

    Raises:
        OnnxqError: see :func:`onnxq.pipeline.run.run`.
    """
    output = model.with_suffix(".q.onnx") if out is None else out
    if options["dry_run"] and options["bisect"]:
        raise SpecError(
            "SPEC-COMBINATION",
            "--dry-run runs no pass, and --bisect runs them all",
            "leave one of them out",
        )
    if options["dry_run"]:
        return _dry_run(model, passes, options["target"])
    if options["bisect"]:
        return _bisect(model, passes, options)
    return _run(model, passes, output, options)


def _run(model: Path, passes: str, output: Path, options: Mapping[str, Any]) -> int:
    from onnxq.pipeline.run import RECIPE_SUFFIX, run

    state = current()
    page: Path | None = options["report"]
    if page is not None:
        _check_page(page, model, output, options)
    if options["calib"] == "random":
        console.notice(
            "calibrating on RANDOM numbers: ranges and accuracy mean nothing for real inputs",
            loud=True,
        )
    state.watch(output, output.with_name(output.name + RECIPE_SUFFIX))
    from onnxq.cli.evidence import Evidence, KeepBaseline, gather

    keeper = KeepBaseline()
    wants_layers = page is not None or options["verbose"]
    with console.progress() as live:
        summary = run(
            model,
            passes,
            out=output,
            calib=options["calib"],
            **{name: options[name] for name in _DATA_OPTIONS},
            target=options["target"],
            seed=options["seed"],
            threads=options["threads"],
            jobs=options["jobs"],
            cluster=options["cluster"],
            min_cosine=options["min_cosine"],
            task=options["task"],
            task_data=options["data"],
            task_limit=options["task_limit"],
            max_drop=options["max_drop"],
            keep_bad=options["force"],
            allow_noop=options["allow_noop"],
            verify=not options["no_verify"],
            dump_dir=options["dump_dir"],
            resume=options["resume"],
            hooks=[keeper] if wants_layers else [],
            progress=live,
        )
        evidence = Evidence()
        if wants_layers:
            evidence = gather(summary, keeper, options, live, histograms=page is not None)
    return _show(summary, evidence, page, state, verbose=options["verbose"])


def _check_page(page: Path, model: Path, output: Path, options: Mapping[str, Any]) -> None:
    """Refuse, before the work, a report that cannot be written or replaces a file of the run."""
    from onnxq.cli.report.html import check_writable
    from onnxq.pipeline.overwrite import refuse_overwrite
    from onnxq.pipeline.run import RECIPE_SUFFIX

    check_writable(page)
    recipe = output.with_name(output.name + RECIPE_SUFFIX)
    if page.resolve() in (output.resolve(), recipe.resolve()):
        raise DataError(
            "DATA-REPORT-IS-OUTPUT",
            f"the report {page} is another file that this run writes",
            "choose another name",
        )
    refuse_overwrite(page, "the report", model, options["calib"], options["tokenizer"])


def _show(
    summary: RunSummary, evidence: Evidence, page: Path | None, state: State, *, verbose: bool
) -> int:
    from onnxq.cli.adapt import run_view
    from onnxq.cli.summary import print_run

    view = run_view(summary, evidence, state.command, with_drawings=page is not None)
    for warning in view.warnings:
        console.notice(warning, loud=True)
    if page is not None:
        from onnxq.cli.report import write

        write(view, page)
    if state.json:
        console.emit({**view.to_json(), "recipe": summary.recipe, "report": page})
        return 0
    print_run(view, verbose=verbose)
    written = [summary.out, summary.recipe] + ([page] if page is not None else [])
    console.notice("written: " + ", ".join(str(path) for path in written))
    return 0


def _dry_run(model: Path, passes: str, target: str | None) -> int:
    from onnxq.pipeline.run import dry_run

    text, found = dry_run(model, passes, target=target)
    if current().json:
        console.emit(
            {
                "status": "dry-run",
                "pipeline": text,
                "passes": [
                    {"number": p.number, "pass": p.spec, "candidates": list(p.candidates)}
                    for p in found
                ],
            }
        )
        return 0
    rows = [
        (str(p.number), p.spec, str(len(p.candidates)), _some(list(p.candidates))) for p in found
    ]
    columns: list[tuple[str, console.Justify]] = [
        ("", "right"),
        ("pass", "left"),
        ("sites", "right"),
        ("would look at", "left"),
    ]
    click.echo(f'--passes "{text}"\n')
    console.print_table("", columns, rows)
    click.echo("sites are those of the model as it is now; nothing was written")
    return 0


def _some(names: list[str], limit: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _bisect(model: Path, passes: str, options: Mapping[str, Any]) -> int:
    from onnxq.calibration.data import open_data
    from onnxq.graph.io import load
    from onnxq.pipeline.bisect import bisect

    if options["calib"] is None:
        raise SpecError(
            "SPEC-BISECT-DATA", "a bisection compares models on samples", "give them with --calib"
        )
    with console.progress() as live:
        loaded = load(model)
        given = {n: options[n] for n in _DATA_OPTIONS if options[n] is not None}
        data = open_data(options["calib"], loaded, **given)
        found = bisect(
            loaded,
            passes,
            data,
            target=options["target"] or "cpu",
            seed=options["seed"] or 0,
            threads=options["threads"] or 1,
            progress=live,
        )
    code = 0 if found.culprit is None else EquivalenceError.exit_code
    if current().json:
        console.emit(found.to_json())
        return code
    columns: list[tuple[str, console.Justify]] = [
        ("", "right"),
        ("pass", "left"),
        ("added", "right"),
        ("error", "right"),
    ]
    rows = [(str(s.number), s.spec, f"{s.added_error:.2e}", f"{s.error:.2e}") for s in found.steps]
    console.print_table("Relative output error after each pass", columns, rows)
    if found.culprit is None:
        click.echo("no pass broke the model")
        return code
    click.echo(f"pass {found.culprit.number} `{found.culprit.spec}` broke the model: {found.why}")
    if found.rewrite is not None:
        click.echo(f"first bad rewrite: {found.rewrite} of {found.rewrites}, at {found.site}")
    return code
