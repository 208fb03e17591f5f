"""The HTML report of a run: one self-contained page."""

from onnxq.cli.report.html import page, write

__all__ = ["page", "write"]
