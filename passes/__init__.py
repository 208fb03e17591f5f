"""Passes: one file a pass, in the folder of what it does.

``prepare/`` cleans the graph, ``transform/`` rewrites it to an equivalent one that quantizes
better, ``decide/`` writes the plan (which value gets which format, and why), ``weights/`` rounds
weights, ``lower/`` turns the plan into Q/DQ nodes or packed operators.
"""

if __name__ != "onnxq.passes":
    raise ImportError(
        f"this package is onnxq.passes, not {__name__}: "
        "a second copy would register every pass twice"
    )
