"""Rewrites a published sentence encoder for serving: weights stay int8 in memory and in products (control speed, offline).

    published   weight_q ─► Cast ─► Mul(scale) ─► MatMul ─► Add(bias)      the runtime unfolds every weight into fp32
    served      DynamicQuantizeMatMul(weight_q, scale, bias)               a quarter of the memory, integer products

Weights keep 7 of their 8 bits: with 8, processors that have no dot product of bytes saturate, and replicas would differ. Prompts
come one by one and without padding, so masks and token types are gone, and attention is one operator. Needs ``onnx``, which
serving does not. Must not know: categories, tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from antiphon.core.errors import CheckpointInvalid

_CONTRIB = "com.microsoft"
_OPSET, _IR_VERSION = 17, 8
_EPSILON = 1e-12
_HEAD_DIMENSIONS = 32  # of every published MiniLM with 384 dimensions
_LARGEST = 64  # of a weight

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Linear:
    """An int8 product: weight [in, out], a scale per output, bias."""

    weight: Array
    scale: Array
    bias: Array


def served_graph(published: bytes) -> bytes:
    """The rewritten model: input ``input_ids`` [batch, sequence], output ``last_hidden_state`` [batch, sequence, D].

    Raises:
        CheckpointInvalid: ``published`` is no int8 MiniLM of the known layout, or onnx is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise CheckpointInvalid("rewriting the sentence encoder needs onnx: pip install onnx") from error
    try:
        model = onnx.load_model_from_string(published)
    except Exception as error:  # the decoder's errors are not onnx's own
        raise CheckpointInvalid(f"the sentence encoder is no ONNX model: {error}") from error
    try:
        arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        linears = _linears(model.graph, arrays)
        graph = _Graph()
        last = graph.embeddings(arrays)
        for layer in range(sum(name.endswith("attention.self.query.bias") for name in linears)):
            last = graph.layer(layer, last, linears, arrays)
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointInvalid(
            f"the sentence encoder has another layout than expected: {type(error).__name__}: {error}"
        ) from error
    return graph.serialised(last)


def _linears(graph: Any, arrays: dict[str, Array]) -> dict[str, _Linear]:
    """Every product by the name of its bias."""
    consumers: dict[str, Any] = {name: node for node in graph.node for name in node.input}
    found = {}
    for name in arrays:
        if not name.endswith("_q"):
            continue
        scaled = consumers[consumers[name].output[0]]
        product = consumers.get(scaled.output[0])
        if product is None or product.op_type != "MatMul":
            continue  # a table of embeddings
        added = consumers[product.output[0]]
        (bias,) = [i for i in added.input if i in arrays]
        scale = arrays[name.removesuffix("_q") + "_scale"]
        found[bias] = _Linear(weight=arrays[name], scale=scale.reshape(-1), bias=arrays[bias])
    return found


class _Graph:
    """A model under construction: nodes in order, initializers by name."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._arrays: dict[str, Array] = {}

    def _node(self, kind: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> str:
        import onnx

        self._nodes.append(onnx.helper.make_node(kind, inputs, [output], name=output, domain=domain, **attributes))
        return output

    def _array(self, name: str, value: Array) -> str:
        self._arrays[name] = np.ascontiguousarray(value)
        return name

    def embeddings(self, arrays: dict[str, Array]) -> str:
        """Word rows unpacked after they are gathered, so that the table stays int8; positions; their norm."""
        prefix = "inner.embeddings."
        words = self._array("words", arrays[f"{prefix}word_embeddings.weight_q"])
        scales = self._array("word_scales", arrays[f"{prefix}word_embeddings.weight_scale"].astype(np.float32))
        positions_SD = arrays[f"{prefix}position_embeddings.weight_q"].astype(np.float32)
        positions_SD = positions_SD * arrays[f"{prefix}position_embeddings.weight_scale"]
        positions_SD = positions_SD + arrays[f"{prefix}token_type_embeddings.weight"][0]
        rows = self._node("Gather", [words, "input_ids"], "word_rows")
        rows = self._node("Cast", [rows], "word_rows_float", to=1)
        rows = self._node("Mul", [rows, self._node("Gather", [scales, "input_ids"], "row_scales")], "word_embeddings")
        shape = self._node("Shape", ["input_ids"], "sequence_length", start=1, end=2)
        starts, axes = self._array("zero", np.zeros(1, np.int64)), self._array("zero_axis", np.zeros(1, np.int64))
        table = self._array("positions", positions_SD.astype(np.float32))
        here = self._node("Slice", [table, starts, shape, axes], "position_rows")
        both = self._node("Add", [rows, here], "embeddings")
        weight = self._array("norm.weight", arrays[f"{prefix}LayerNorm.weight"])
        bias = self._array("norm.bias", arrays[f"{prefix}LayerNorm.bias"])
        return self._node("LayerNormalization", [both, weight, bias], "normed", axis=-1, epsilon=_EPSILON)

    def layer(self, number: int, hidden: str, linears: dict[str, _Linear], arrays: dict[str, Array]) -> str:
        """One transformer layer."""
        prefix, here = f"inner.encoder.layer.{number}.", f"{number}."
        qkv = [linears[f"{prefix}attention.self.{name}.bias"] for name in ("query", "key", "value")]
        joined = _Linear(
            weight=np.concatenate([one.weight for one in qkv], axis=1),
            scale=np.concatenate([one.scale for one in qkv]),
            bias=np.concatenate([one.bias for one in qkv]),
        )
        D = joined.weight.shape[0]
        product = self._linear(f"{here}qkv", hidden, joined)
        import onnx

        parts = [f"{here}{name}" for name in ("query", "key", "value")]
        self._nodes.append(onnx.helper.make_node("Split", [product], parts, name=f"{here}split", axis=-1))
        seen = self._node("MultiHeadAttention", parts, f"{here}attention", domain=_CONTRIB, num_heads=D // _HEAD_DIMENSIONS)
        out = self._linear(f"{here}attention_out", seen, linears[f"{prefix}attention.output.dense.bias"])
        hidden = self._norm(f"{here}attention_norm", out, hidden, f"{prefix}attention.output.LayerNorm", arrays)
        wide = self._linear(f"{here}wide", hidden, linears[f"{prefix}intermediate.dense.bias"])
        active = self._node("Gelu", [wide], f"{here}gelu", domain=_CONTRIB)
        narrow = self._linear(f"{here}narrow", active, linears[f"{prefix}output.dense.bias"])
        return self._norm(f"{here}norm", narrow, hidden, f"{prefix}output.LayerNorm", arrays)

    def _linear(self, name: str, hidden: str, linear: _Linear) -> str:
        halved = np.clip(np.rint(linear.weight / 2.0), -_LARGEST, _LARGEST - 1)
        weight = self._array(f"{name}.weight", halved.astype(np.int8))
        scale = self._array(f"{name}.scale", (2.0 * linear.scale).astype(np.float32))
        bias = self._array(f"{name}.bias", linear.bias.astype(np.float32))
        return self._node("DynamicQuantizeMatMul", [hidden, weight, scale, "", bias], name, domain=_CONTRIB)

    def _norm(self, name: str, hidden: str, residual: str, source: str, arrays: dict[str, Array]) -> str:
        weight = self._array(f"{name}.weight", arrays[f"{source}.weight"])
        bias = self._array(f"{name}.bias", arrays[f"{source}.bias"])
        inputs = [hidden, residual, weight, bias]
        return self._node("SkipLayerNormalization", inputs, name, domain=_CONTRIB, epsilon=_EPSILON)

    def serialised(self, output: str) -> bytes:
        """The model's bytes; equal input gives equal bytes."""
        import onnx

        self._nodes.append(onnx.helper.make_node("Identity", [output], ["last_hidden_state"], name="last_hidden_state"))
        D = self._arrays["norm.bias"].shape[0]
        graph = onnx.helper.make_graph(
            self._nodes,
            "sentence-encoder",
            [onnx.helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["batch", "sequence"])],
            [onnx.helper.make_tensor_value_info("last_hidden_state", onnx.TensorProto.FLOAT, ["batch", "sequence", D])],
            [onnx.numpy_helper.from_array(array, name) for name, array in self._arrays.items()],
        )
        opsets = [onnx.helper.make_opsetid("", _OPSET), onnx.helper.make_opsetid(_CONTRIB, 1)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="antiphon")
        data: bytes = model.SerializeToString(deterministic=True)
        return data
