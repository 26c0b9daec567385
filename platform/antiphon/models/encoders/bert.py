"""BERT (arXiv 1810.04805): learned positions, attention both ways, norms behind each sum (hot).

The rows of all texts of a batch are one tensor, without padding: what a text gives does not depend on its neighbours' lengths.
Legend: T rows of all texts, L rows of one, D hidden, N heads, H head dim. Must not know: pooling, requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any

import torch
import torch.nn.functional as F

from antiphon.core.errors import UnsupportedModel
from antiphon.models.families.fields import Fields, refuse
from antiphon.models.loading.checkpoint import Checkpoint
from antiphon.models.loading.weights import Weights

_GELU = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


@dataclass(frozen=True, slots=True, kw_only=True)
class BertConfig:
    """A BERT, as its ``config.json`` has it."""

    num_layers: int
    hidden_size: int
    num_heads: int
    vocab_size: int
    num_types: int
    max_position: int
    norm_eps: float
    gelu: str

    @property
    def fingerprint(self) -> str:
        """Equal for workers that compute the same function."""
        return blake2b(repr(sorted(asdict(self).items())).encode(), digest_size=8).hexdigest()


def describe(raw: Mapping[str, Any]) -> BertConfig:
    """The encoder of a parsed ``config.json``.

    Raises:
        UnsupportedModel: a field that would change results is not supported.
    """
    fields = Fields(raw)
    fields.ignore(
        "attention_probs_dropout_prob", "hidden_dropout_prob", "classifier_dropout", "gradient_checkpointing", "num_labels"
    )
    fields.ignore("intermediate_size", "sentence_transformers", "is_matryoshka", "matryoshka_dimensions")
    fields.ignore("tie_word_embeddings", "eos_token_id", "directionality", "sbert_ce_default_activation_function")
    try:
        refuse(fields, {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False})
        gelu = str(fields.get("hidden_act", "gelu"))
        if gelu not in _GELU:
            raise UnsupportedModel(f"activation {gelu!r} is not supported", "hidden_act")
        config = BertConfig(
            num_layers=int(fields["num_hidden_layers"]),
            hidden_size=int(fields["hidden_size"]),
            num_heads=int(fields["num_attention_heads"]),
            vocab_size=int(fields["vocab_size"]),
            num_types=int(fields.get("type_vocab_size", 2)),
            max_position=int(fields["max_position_embeddings"]),
            norm_eps=float(fields.get("layer_norm_eps", 1e-12)),
            gelu=_GELU[gelu],
        )
        if config.num_heads < 1 or config.hidden_size % config.num_heads:
            raise UnsupportedModel(f"{config.num_heads} heads of a hidden size of {config.hidden_size}", "num_attention_heads")
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedModel(f"config.json of BERT: {error!r}", str(error).strip("'")) from error
    fields.refuse_unread()
    return config


_Linear = tuple[torch.Tensor, torch.Tensor]  # weight and bias


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    qkv: _Linear
    attended: _Linear
    attended_norm: _Linear
    up: _Linear
    down: _Linear
    down_norm: _Linear


class Bert:
    """The encoder with its weights."""

    def __init__(self, config: BertConfig, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        """Reads the weights. Raises CheckpointInvalid."""
        self.config = config
        self.device = device
        weights = Weights(checkpoint, dtype, device)
        at = "bert." if "bert.embeddings.word_embeddings.weight" in checkpoint.names else ""

        def pair(name: str) -> _Linear:
            return weights.read(f"{at}{name}.weight"), weights.read(f"{at}{name}.bias")

        self._words_VD = weights.read(f"{at}embeddings.word_embeddings.weight")
        self._positions_PD = weights.read(f"{at}embeddings.position_embeddings.weight")
        self._types_SD = weights.read(f"{at}embeddings.token_type_embeddings.weight")
        self._norm = pair("embeddings.LayerNorm")
        self._layers = []
        for i in range(config.num_layers):
            layer = f"encoder.layer.{i}."
            parts = [pair(f"{layer}attention.self.{name}") for name in ("query", "key", "value")]
            self._layers.append(
                _Layer(
                    qkv=(torch.cat([weight for weight, _ in parts]), torch.cat([bias for _, bias in parts])),
                    attended=pair(f"{layer}attention.output.dense"),
                    attended_norm=pair(f"{layer}attention.output.LayerNorm"),
                    up=pair(f"{layer}intermediate.dense"),
                    down=pair(f"{layer}output.dense"),
                    down_norm=pair(f"{layer}output.LayerNorm"),
                )
            )
        weights.rest()
        self.resident_bytes = weights.resident_bytes

    def rows(self, texts: Sequence[Sequence[int]], num_first: Sequence[int | None]) -> list[torch.Tensor]:
        """The last layer's rows of each text, [L, D].

        Args:
            texts: token ids, special ones included; none longer than ``max_position``.
            num_first: by text, how many of its tokens are of a pair's first text; None = it is no pair.
        """
        lengths = [len(text) for text in texts]
        ids_T = torch.tensor([token_id for text in texts for token_id in text], dtype=torch.int64, device=self.device)
        positions_T = torch.cat([torch.arange(length, device=self.device) for length in lengths])
        types_T = torch.zeros_like(ids_T)
        at = 0
        for length, first in zip(lengths, num_first, strict=True):
            if first is not None:
                types_T[at + first : at + length] = 1
            at += length
        x_TD = F.embedding(ids_T, self._words_VD) + F.embedding(types_T, self._types_SD)
        x_TD = self._normed(x_TD + F.embedding(positions_T, self._positions_PD), self._norm)
        for layer in self._layers:
            attended_TD = F.linear(self._attend(F.linear(x_TD, *layer.qkv), lengths), *layer.attended)
            x_TD = self._normed(attended_TD + x_TD, layer.attended_norm)
            up_TI = F.gelu(F.linear(x_TD, *layer.up), approximate=self.config.gelu)
            x_TD = self._normed(F.linear(up_TI, *layer.down) + x_TD, layer.down_norm)
        return list(torch.split(x_TD, lengths))

    def _attend(self, qkv_TX: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        num_heads, hidden = self.config.num_heads, self.config.hidden_size
        found = []
        for qkv_LX in torch.split(qkv_TX, lengths):
            q, k, v = (part.view(1, -1, num_heads, hidden // num_heads).transpose(1, 2) for part in qkv_LX.chunk(3, dim=-1))
            found.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, hidden))
        return torch.cat(found)

    def _normed(self, x_TD: torch.Tensor, norm: _Linear) -> torch.Tensor:
        return F.layer_norm(x_TD, (self.config.hidden_size,), *norm, self.config.norm_eps)
