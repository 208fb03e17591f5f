"""``python -m onnxq.runtime``: one line that says whether the kernels are there."""

from onnxq.runtime.diagnosis import main

raise SystemExit(main())
