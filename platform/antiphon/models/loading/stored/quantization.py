"""What a config's ``quantization_config`` may say: each field is known and means what is computed, or is refused (control speed).

Must not know: tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from antiphon.core.errors import UnsupportedModel
from antiphon.models.loading.block_scales import CONFIG_FIELD, check_block_scales


def check_quantization(raw: Mapping[str, Any]) -> None:
    """Check that weights stored as a ``config.json`` says can be read.

    Raises:
        UnsupportedModel: names the field that says otherwise.
    """
    section = raw.get(CONFIG_FIELD)
    if section is None:
        return
    if not isinstance(section, Mapping):
        raise UnsupportedModel(f"{CONFIG_FIELD} = {section!r}: expected a section", CONFIG_FIELD)
    method = section.get("quant_method")
    if not isinstance(method, str) or method not in _METHODS:
        name = f"{CONFIG_FIELD}.quant_method"
        raise UnsupportedModel(f"{name} = {method!r} is not supported (only {', '.join(map(repr, _METHODS))})", name)
    _METHODS[method](section)


def expect_fields(
    section: Mapping[str, Any], supported: Mapping[str, tuple[object, ...]], harmless: frozenset[str], prefix: str = CONFIG_FIELD
) -> None:
    """Check fields against the values that they may have.

    Raises:
        UnsupportedModel: names a field with another value, or one that is neither supported nor harmless.
    """
    for key, value in section.items():
        name = f"{prefix}.{key}"
        if key in supported:
            if value not in supported[key]:
                raise UnsupportedModel(f"{name} = {value!r} is not supported (only {supported[key][0]!r})", name)
        elif key not in harmless and value not in (None, False, "", [], {}):
            raise UnsupportedModel(f"{name} = {value!r} is not known: it could change results", name)


def _mxfp4(section: Mapping[str, Any]) -> None:
    # Which tensors are stored as they are shows in their names.
    expect_fields(section, {}, frozenset(("quant_method", "modules_to_not_convert", "dequantize")))


_GPTQ = {"bits": (4,), "checkpoint_format": ("gptq", "gptq_v2", ""), "quant_method": ("gptq",), "lm_head": (False, None)}
# How it was made, and by what; groups and orders show in the tensors.
_GPTQ_HARMLESS = frozenset(
    (
        "backend",
        "batch_size",
        "block_name_to_quantize",
        "cache_block_outputs",
        "damp_auto_increment",
        "damp_percent",
        "dataset",
        "desc_act",
        "disable_exllama",
        "exllama_config",
        "group_size",
        "max_input_length",
        "meta",
        "model_file_base_name",
        "model_name_or_path",
        "model_seqlen",
        "module_name_preceding_first_block",
        "modules_in_block_to_quantize",
        "modules_to_not_convert",
        "pack_dtype",
        "pad_token_id",
        "static_groups",
        "sym",
        "tokenizer",
        "true_sequential",
        "use_cuda_fp16",
        "use_exllama",
    )
)
_AWQ = {"bits": (4,), "version": ("gemm", "GEMM"), "zero_point": (True,), "quant_method": ("awq",)}
_AWQ_HARMLESS = frozenset(
    ("group_size", "modules_to_not_convert", "backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config", "meta")
)


def _gptq(section: Mapping[str, Any]) -> None:
    expect_fields(section, _GPTQ, _GPTQ_HARMLESS)
    _need(section, "bits")


def _awq(section: Mapping[str, Any]) -> None:
    expect_fields(section, _AWQ, _AWQ_HARMLESS)
    _need(section, "bits")


def _need(section: Mapping[str, Any], key: str) -> None:
    if section.get(key) is None:
        raise UnsupportedModel(f"{CONFIG_FIELD}.{key} is missing", f"{CONFIG_FIELD}.{key}")


# Weights of each format of compressed-tensors.
_COMPRESSED: Mapping[str, Mapping[str, tuple[object, ...]]] = {
    "pack-quantized": {"num_bits": (4,), "type": ("int",), "strategy": ("group", "channel", "tensor")},
    "float-quantized": {"num_bits": (8,), "type": ("float",), "strategy": ("channel", "tensor"), "symmetric": (True,)},
    "int-quantized": {"num_bits": (8,), "type": ("int",), "strategy": ("channel", "tensor"), "symmetric": (True,)},
}
_COMPRESSED_FIELDS: Mapping[str, tuple[object, ...]] = {
    "quant_method": ("compressed-tensors",),
    "format": tuple(_COMPRESSED),
    "quantization_status": ("compressed", "frozen"),
}
# Activations are not rounded, whatever is said of them: results are closer to the unrounded model.
_GROUP_HARMLESS = frozenset(("targets", "input_activations", "format", "weights"))
_WEIGHTS_HARMLESS = frozenset(
    ("symmetric", "group_size", "actorder", "observer", "observer_kwargs", "block_structure", "scale_dtype", "zp_dtype")
)


def _compressed(section: Mapping[str, Any]) -> None:
    harmless = frozenset(("config_groups", "ignore", "global_compression_ratio", "version", "sparsity_config"))
    expect_fields(section, _COMPRESSED_FIELDS, harmless)
    _need(section, "format")
    sparsity = section.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        name = f"{CONFIG_FIELD}.sparsity_config"
        raise UnsupportedModel(f"{name}: format {sparsity['format']!r} is not supported", name)
    for key, group in (section.get("config_groups") or {}).items():
        name = f"{CONFIG_FIELD}.config_groups.{key}"
        expect_fields(group, {}, _GROUP_HARMLESS, name)
        kind = group.get("format") or section["format"]
        if kind not in _COMPRESSED:
            raise UnsupportedModel(f"{name}.format = {kind!r} is not supported", f"{name}.format")
        expect_fields(group.get("weights") or {}, _COMPRESSED[kind], _WEIGHTS_HARMLESS, f"{name}.weights")


def _gguf(section: Mapping[str, Any]) -> None:
    expect_fields(section, {"quant_method": ("gguf",), "format": ("lines",)}, frozenset())


_METHODS: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
    "fp8": check_block_scales,
    "mxfp4": _mxfp4,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "gguf": _gguf,
}
