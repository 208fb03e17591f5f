"""Our own operators in domain ``com.onnxq``, each defined once.

``ops.def`` lists the kernels that exist, ``defs/<op>.py`` holds what an operator means (its body
in standard ONNX), its numpy reference and its documentation, ``cpu/<op>*.cc`` the kernels. A model
that uses an operator carries the body as a model-local function, so it runs on any ONNX Runtime;
where the kernel library is registered, the kernel replaces the body.
"""

if __name__ != "onnxq.custom_ops":
    raise ImportError(
        f"this package is onnxq.custom_ops, not {__name__}: a second copy would define every "
        "operator twice"
    )

from onnxq.custom_ops.registry import (
    DOMAIN,
    Attribute,
    Kernel,
    Operator,
    attach,
    domain_version,
    get,
    kernels,
    make_node,
    names,
)

__all__ = [
    "DOMAIN",
    "Attribute",
    "Kernel",
    "Operator",
    "attach",
    "domain_version",
    "get",
    "kernels",
    "make_node",
    "names",
]
