"""The artifact keys that passes share."""

from __future__ import annotations

from typing import Final

from onnxq.calibration.statistics import Statistics
from onnxq.passes.contract import Key
from onnxq.passes.plan import QuantPlan
from onnxq.passes.weights.rounded import RoundedWeights

STATISTICS: Final = Key("statistics", Statistics, "what the last sweep saw of the activations")
PLAN: Final = Key("plan", QuantPlan, "which value gets which format, by whom and why")
ROUNDED: Final = Key("rounded", RoundedWeights, "weights that a solver rounded, by site")
