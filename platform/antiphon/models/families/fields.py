"""Reading ``config.json`` so that nothing is overlooked: a field that could matter and no one has read is refused (control speed).

Must not know: families.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from antiphon.core.errors import UnsupportedModel
from antiphon.models.config import Activation

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}

# Fields that don't change what a served token is: training, bookkeeping, defaults of generation, hints to other programs.
_HARMLESS = frozenset(
    (
        "_attn_implementation",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "aux_loss_alpha",
        "auto_map",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "dtype",
        "embd_pdrop",
        "embedding_dropout",
        "ep_size",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "is_llama_config",
        "label2id",
        "max_length",
        "model_type",
        "num_nextn_predict_layers",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "problem_type",
        "resid_pdrop",
        "return_dict",
        "router_aux_loss_coef",
        "router_z_loss_coef",
        "seq_aux",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "use_cache",
        "use_return_dict",
    )
)


class Fields(Mapping[str, Any]):
    """A parsed config that remembers which of its fields were read."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._raw = raw
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return self._raw[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._raw)

    def __len__(self) -> int:
        return len(self._raw)

    def ignore(self, *keys: str) -> None:
        """Say of fields that they have no effect here."""
        self._read.update(keys)

    def refuse_unread(self) -> None:
        """Refuse a field that was not read and is set to anything but nothing.

        Raises:
            UnsupportedModel: names the first such field.
        """
        for key in sorted(self._raw.keys() - self._read - _HARMLESS):
            value = self._raw[key]
            if value is not None and value is not False and value not in ("", 0, [], {}):
                raise UnsupportedModel(f"{key} = {value!r} is not known to this family: it could change results", key)


def activation(raw: Mapping[str, Any], key: str = "hidden_act") -> Activation:
    """The FFN's activation.

    Raises:
        UnsupportedModel: it is another one.
    """
    name = str(raw.get(key, "silu"))
    if name not in _ACTIVATIONS:
        raise UnsupportedModel(f"activation {name!r} is not supported", key)
    return _ACTIVATIONS[name]


def refuse(raw: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse fields that are present with another value than the one our computation has.

    Raises:
        UnsupportedModel: names the first such field.
    """
    for key, value in expected.items():
        found = raw.get(key)
        if found is not None and found != value:
            raise UnsupportedModel(f"{key} = {found!r} is not supported (only {value!r})", key)


def optional_number(raw: Mapping[str, Any], key: str) -> float | None:
    """A number, or None where the field is absent or null."""
    value = raw.get(key)
    return None if value is None else float(value)


def eos_ids(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids, which configs give as one id, several or none."""
    eos = raw.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(int(token_id) for token_id in eos) if isinstance(eos, list) else (int(eos),)
