"""``python -m onnxq``: the same as the ``onnxq`` script."""

from __future__ import annotations

from onnxq.cli import main

if __name__ == "__main__":
    main()
