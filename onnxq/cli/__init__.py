"""The command line: arguments in, one result out; every decision is made in the layers below.

``main`` is the entry point. One file in ``commands/`` is one command; a command module is imported
only when its command runs, and it imports numpy, onnx, onnxruntime or rich only inside functions,
so that ``onnxq --help`` answers at once.
"""

from __future__ import annotations


def main() -> None:
    """Run the command line with the arguments of this process, and leave with its exit code."""
    from onnxq.cli.app import app

    app.main()
