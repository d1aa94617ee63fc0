"""Writing ONNX by hand: nodes with fresh names, constants, and joining graphs that share tensors by name.

Opsets of everything we write stand here. What the nodes compute is left to the files that add them.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, compose, helper, numpy_helper

from export.features import OPSET

OPSETS = {"": OPSET, "ai.onnx.ml": 5, "com.microsoft": 1}
IR_VERSION = 9  # of opset 17 to 20


class Nodes:
    """A graph in the making. Every method that adds a node returns the name of its output."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._count = 0
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []

    def name(self, hint: str) -> str:
        """Return a name nobody has used yet."""
        self._count += 1
        return f"{self._prefix}{hint}_{self._count}"

    def constant(self, value: npt.ArrayLike, dtype: npt.DTypeLike) -> str:
        """Add a constant tensor."""
        name = self.name("constant")
        self.initializers.append(numpy_helper.from_array(np.array(value, dtype=dtype), name))
        return name

    def add(self, op: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Add a node of one output, called `output` where given."""
        name = output or self.name(op.lower())
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def extend(self, node: NodeProto) -> str:
        """Add a finished node of one output."""
        self.nodes.append(node)
        return str(node.output[0])

    def graph(self, inputs: Sequence[ValueInfoProto], outputs: Sequence[ValueInfoProto]) -> GraphProto:
        """Close the graph."""
        return helper.make_graph(self.nodes, self._prefix or "graph", inputs, outputs, self.initializers)


def float32(name: str, *shape: int | str) -> ValueInfoProto:
    """Describe a float32 tensor."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


def join(
    parts: Iterable[tuple[str, GraphProto]], inputs: Sequence[ValueInfoProto], outputs: Sequence[ValueInfoProto]
) -> ModelProto:
    """Join graphs, in order of computation, into one model; each part's prefix goes before its inner names.

    Tensors named in any part's inputs or outputs keep their name: that is how the parts connect.
    """
    nodes: list[NodeProto] = []
    initializers: list[TensorProto] = []
    for prefix, graph in parts:
        inner = GraphProto()
        inner.CopyFrom(graph)
        if prefix:
            inner = compose.add_prefix_graph(inner, prefix, rename_inputs=False, rename_outputs=False)
        for node in inner.node:
            node.ClearField("doc_string")  # the exporter writes a stack trace into each
            node.ClearField("metadata_props")
        nodes += inner.node
        initializers += inner.initializer
    model = helper.make_model(
        helper.make_graph(nodes, "voltwatch", inputs, outputs, initializers),
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in OPSETS.items()],
        ir_version=IR_VERSION,
        producer_name="voltwatch",
    )
    onnx.checker.check_model(model)
    return model
