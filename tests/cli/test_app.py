"""The command line as a whole: start-up, errors, signals, pipes."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest

from onnxq.cli import failure
from onnxq.cli.app import COMMANDS, app
from onnxq.errors import NoopError, PipelineError, Span, SpecError

HEAVY = ("numpy", "onnx", "onnx_ir", "onnxruntime", "rich", "scipy", "tokenizers", "onnxscript")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_nothing_heavy(command: str) -> None:
    code = (
        "import sys\nfrom onnxq.cli.app import app\n"
        f"try: app.main({[command, '--help'] if command else ['--help']!r})\n"
        "except SystemExit as e: assert e.code == 0, e.code\n"
        f"bad = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "assert not bad, bad\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "Usage: onnxq" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_list_of_commands_agrees_with_their_files(name: str) -> None:
    command = app.get_command(click.Context(app), name)
    assert command is not None
    assert command.name == name
    assert command.short_help == COMMANDS[name]


@pytest.mark.parametrize("name", [n for n in COMMANDS if n != "models"])
def test_every_command_has_json_and_debug(name: str) -> None:
    command = app.get_command(click.Context(app), name)
    assert command is not None
    options = {o for p in command.params for o in p.opts}
    assert {"--json", "--debug"} <= options


def test_error_block_points_at_the_place() -> None:
    text = "canonicalize,calibrat{method=mse}"
    error = SpecError("SPEC-X", "there is no pass", "did you mean", span=Span(text, 13, 21))
    assert failure.render(error, colour=False) == (
        "error[SPEC-X]: there is no pass\n"
        "  | canonicalize,calibrat{method=mse}\n"
        "  |              ^^^^^^^^\n"
        "  hint: did you mean"
    )


def test_long_text_is_cut_around_the_place() -> None:
    text = "a" * 200 + "!!" + "b" * 200
    error = SpecError("SPEC-X", "c", span=Span(text, 200, 202))
    _, line, carets = failure.render(error, colour=False).splitlines()
    assert len(line) <= 84
    assert [line[i] for i, c in enumerate(carets) if c == "^"] == ["!", "!"]


@pytest.mark.parametrize(
    ("error", "code", "exit_code"),
    [
        (PipelineError("P", "x"), "P", 2),
        (NoopError("N", "x"), "N", 4),
        (click.UsageError("No such option"), "USAGE", 2),
        (MemoryError(), "UNSUPPORTED-MEMORY", 6),
        (OSError(28, "No space left on device"), "DATA-IO", 5),
        (ModuleNotFoundError("No module named 'gguf'", name="gguf"), "UNSUPPORTED-PACKAGE", 6),
        (ModuleNotFoundError("No module named 'onnxq.x'", name="onnxq.x"), "INTERNAL", 70),
        (KeyError("k"), "INTERNAL", 70),
    ],
)
def test_exit_codes(
    error: Exception, code: str, exit_code: int, monkeypatch: pytest.MonkeyPatch, cli: Any
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("onnxq.runtime.doctor", fail)
    result = cli("doctor", "--json")
    assert result.exit_code == exit_code
    record = json.loads(result.stdout)
    assert record["error"] == code
    assert record["exit_code"] == exit_code
    assert result.stderr.startswith(f"error[{code}]: ")


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    def fail() -> None:
        raise KeyError("k")

    monkeypatch.setattr("onnxq.runtime.doctor", fail)
    assert "Traceback" in CliRunner().invoke(app, ["doctor", "--debug"]).stderr
    assert "Traceback" in CliRunner().invoke(app, ["--debug", "doctor"]).stderr


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["frobnicate"], "see `onnxq --help`"),
        (["passes", "--frobnicate"], "see `onnxq passes --help`"),
        (["inspect"], "see `onnxq inspect --help`"),
        (["bench", "m.onnx", "--threads", "0"], "see `onnxq bench --help`"),
        (["bench", "m.onnx", "--seed", "-1"], "see `onnxq bench --help`"),
        (["run", "m.onnx", "--passes", "w8a8", "--seed", "-1"], "see `onnxq run --help`"),
        (
            ["run", "m.onnx", "--passes", "assign,partiallayers=a", "assign,partialop-types=b"],
            "quote the text of --passes: the shell expands {a,b}; see `onnxq run --help`",
        ),
    ],
)
def test_usage_errors_are_one_block(args: list[str], hint: str, cli: Any) -> None:
    result = cli(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    first, second = result.stderr.splitlines()
    assert first.startswith("error[USAGE]: ")
    assert second == f"  hint: {hint}"


_WAIT = """
import sys, time
import onnxq.runtime
def slow():
    print("ready", flush=True)
    time.sleep(30)
onnxq.runtime.doctor = slow
from onnxq.cli.app import app
app.main(["doctor"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_unwind_and_say_what_is_left(number: signal.Signals) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    child = subprocess.Popen(
        [sys.executable, "-c", _WAIT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.1)
    child.send_signal(number)
    _, stderr = child.communicate(timeout=20)
    assert child.returncode == 128 + number
    assert stderr == "interrupted: nothing was written\n"


def test_an_interrupt_inside_an_import_is_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def importing(*_: Any) -> None:
        try:
            raise failure.Terminated
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error

    monkeypatch.setattr(app, "invoke", importing)
    with pytest.raises(SystemExit) as caught:
        app.main(["doctor"])
    assert caught.value.code == 128 + signal.SIGTERM


def test_closed_pipe_is_quiet() -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m onnxq models list --json | true"],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.stderr == ""


@pytest.mark.parametrize("shell_name", ["bash", "zsh", "fish"])
def test_completion_script_names_our_variable(shell_name: str, cli: Any) -> None:
    result = cli("completion", shell_name)
    assert result.exit_code == 0
    assert "_ONNXQ_COMPLETE" in result.stdout


def test_completion_knows_commands_and_recipes(shell: Any) -> None:
    words = {"_ONNXQ_COMPLETE": "bash_complete", "COMP_WORDS": "onnxq in", "COMP_CWORD": "1"}
    assert shell(**words).stdout == "plain,inspect\n"
    words = {"_ONNXQ_COMPLETE": "bash_complete", "COMP_WORDS": "onnxq passes w8", "COMP_CWORD": "2"}
    assert "plain,w8a8\n" in shell(**words).stdout


def _on_terminal(args: list[str], columns: int, **extra: str) -> str:
    """Output of a command whose stdout and stderr are a terminal of that width."""
    main, side = pty.openpty()
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "COLUMNS": str(columns),
        "TERM": "xterm",
        **extra,
    }
    env = {k: v for k, v in env.items() if v or k != "NO_COLOR"}
    child = subprocess.Popen(
        [sys.executable, "-m", "onnxq", *args], stdout=side, stderr=side, env=env
    )
    os.close(side)
    parts = []
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:
            break
        if not part:
            break
        parts.append(part)
    os.close(main)
    child.wait(timeout=30)
    return b"".join(parts).decode()


def test_no_color_is_honoured() -> None:
    assert "\x1b[" in _on_terminal(["passes", "nope"], 80, NO_COLOR="")
    assert "\x1b[" not in _on_terminal(["passes", "nope"], 80, NO_COLOR="1")
    assert "\x1b[3" not in _on_terminal(["models", "list"], 80, NO_COLOR="1")


@pytest.mark.parametrize("columns", [40, 60])
def test_narrow_terminal_does_not_garble(columns: int) -> None:
    text = _on_terminal(["models", "list"], columns, NO_COLOR="1")
    lines = [line.rstrip("\r") for line in text.split("\n")]
    plain = [
        line.replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[0m", "") for line in lines
    ]
    assert max(len(line) for line in plain) <= columns
    squeezed = "".join(text.split())
    assert "minilm" in squeezed.replace("│", "")
