"""The FFNs of one layer that one shard holds: a slice of a dense FFN, or a bank of experts (hot).

A bank sorts the (row, expert) pairs that arrived by expert, runs each expert once over its rows, and sums each row's results by
weight, so that one row goes back per row that came: in one call of the compiled kernel, or expert by expert in torch. It may be
asked for an expert it does not hold (placements change while rows are in flight): it reads the expert and goes on, which costs a
moment and never a wrong result.

Legend: T rows, D hidden, I intermediate size (of this shard), K ids per row, M = T·K pairs. Must not know: peers, messages.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import torch

from antiphon.core.errors import InvalidInput, UnsupportedModel
from antiphon.core.ids import FFNShard, slice_bounds
from antiphon.device.device import is_card
from antiphon.models.config import Activation, FFNConfig, LayerConfig, MoEConfig
from antiphon.models.experts.on_card import CardExperts
from antiphon.models.experts.packed import Int8Parts, PackedExperts, can_pack
from antiphon.models.experts.reading import ExpertReader, ExpertWeights
from antiphon.models.layers.functional import gated
from antiphon.models.layers.gated_ffn import GatedFFN
from antiphon.models.layers.quantized import AnyLinear, Int8Choice, join_linear
from antiphon.models.loading.weights import Weights


class DenseFFN:
    """One shard of a gated FFN: a slice of the intermediate dimension; the shards' results sum up."""

    def __init__(
        self, config: FFNConfig, weights: Weights, layer: LayerConfig, shard: FFNShard, int8: Int8Choice | None = None
    ) -> None:
        names, prefix = layer.names, layer.prefix + layer.names.ffn
        low, high = slice_bounds(config.intermediate_size, shard.index, shard.num_shards)
        parts = (prefix + names.gate, prefix + names.up)
        gate_up_bias = down_bias = None
        if config.bias:
            gate_up_bias = torch.cat([weights.read(part + ".bias")[low:high] for part in parts])
            # Added once: by the first slice.
            down_bias = weights.read(prefix + names.down + ".bias") if shard.index == 0 else None
        read = weights.part if int8 is None else weights.read
        self._ffn = GatedFFN(
            [read(part + ".weight", rows=(low, high)) for part in parts],
            read(prefix + names.down + ".weight", cols=(low, high)),
            config.activation,
            limit=config.limit,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            int8_gate_up=int8 is not None,
            int8_down=int8 is not None and int8.down,
        )
        gate_up_bytes, down_bytes = self._ffn.num_bytes
        for name in parts:
            weights.hold(name + ".weight", gate_up_bytes // 2)
        weights.hold(prefix + names.down + ".weight", down_bytes)

    @property
    def first_weight(self) -> torch.Tensor | None:
        """See ``GatedFFN.first_weight``."""
        return self._ffn.first_weight

    def compute(self, rows_TD: torch.Tensor) -> torch.Tensor:
        """This slice's partial sum, [T, D]."""
        return self._ffn(rows_TD)


class _Expert:
    """One gated expert, or this shard's slice of it."""

    __slots__ = ("_activation", "_down", "_gate_up", "_limit", "num_bytes")

    def __init__(self, gate_up: AnyLinear, down: AnyLinear, activation: Activation, limit: float | None) -> None:
        self._gate_up = gate_up
        self._down = down
        self._activation = activation
        self._limit = limit
        self.num_bytes = gate_up.num_bytes + down.num_bytes

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return self._down(gated(self._gate_up(rows), self._activation, self._limit))


class _PlainExperts:
    """Experts of one layer as separate linear layers: the reference, and what serves where the kernel can't."""

    def __init__(self, config: MoEConfig, int8_of: Callable[[int], Int8Parts]) -> None:
        self._config = config
        self._num_ids = config.num_ids
        self._int8_of = int8_of
        self._experts: dict[int, _Expert] = {}

    @property
    def held(self) -> frozenset[int]:
        return frozenset(self._experts)

    @property
    def num_bytes(self) -> int:
        return sum(expert.num_bytes for expert in tuple(self._experts.values()))

    def put(self, expert: int, weights: ExpertWeights) -> tuple[int, int]:
        int8, config = self._int8_of(expert), self._config
        gate_up = join_linear((weights.gate, weights.up), weights.gate_up_bias, int8=int8.gate_up)
        down = join_linear((weights.down,), weights.down_bias, int8=int8.down)
        limit = config.shared_limit if expert == config.gate.num_experts else config.limit
        self._experts[expert] = _Expert(gate_up, down, config.activation, limit)
        return gate_up.num_bytes, down.num_bytes

    def drop(self, expert: int) -> None:
        del self._experts[expert]

    def compute(
        self, out_TD: torch.Tensor, counts_E: torch.Tensor, rows_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> int | None:
        num_rows, num_ids = ids_TK.shape
        flat_M = ids_TK.reshape(-1)
        low, high = torch.aminmax(flat_M)
        if int(low) < -1 or int(high) >= self._num_ids:
            raise ValueError("an id is no expert's")
        counts = torch.bincount(flat_M + 1, minlength=self._num_ids + 1)
        num_absent, *num_by_expert = counts.tolist()
        experts = dict(self._experts)
        missing = next((e for e, num_pairs in enumerate(num_by_expert) if num_pairs and e not in experts), None)
        if missing is not None:
            return missing
        counts_E += counts[1:]
        order_M = torch.argsort(flat_M, stable=True)[num_absent:]
        sorted_MD = rows_TD.index_select(0, order_M // num_ids)
        at = 0
        results = []
        for expert, num_pairs in enumerate(num_by_expert):
            if num_pairs:
                results.append(experts[expert](sorted_MD[at : at + num_pairs]))
                at += num_pairs
        if not results:
            out_TD.zero_()
            return None
        # Zeros where a row has fewer experts than ids: their weights are multiplied by something that is a number.
        by_pair = rows_TD.new_zeros(num_rows * num_ids, rows_TD.shape[1])
        by_pair.index_copy_(0, order_M, torch.cat(results))
        weights = weights_TK.masked_fill(ids_TK < 0, 0.0).to(rows_TD.dtype)
        out_TD.copy_(torch.bmm(weights[:, None], by_pair.view(num_rows, num_ids, -1)).squeeze(1))
        return None


class ExpertBank:
    """The experts of one layer that this shard holds.

    ``compute`` belongs to the worker's loop; ``hold`` and ``release`` may run on another thread beside it.
    """

    def __init__(
        self,
        config: MoEConfig,
        weights: Weights,
        layer: LayerConfig,
        shard: FFNShard,
        held: Iterable[int],
        int8: Int8Choice | None = None,
    ) -> None:
        self.config = config
        self.rows_by_expert = torch.zeros(config.num_ids, dtype=torch.int64, device=weights.device)  # since start
        self.num_late_loads = 0  # experts read because rows for them arrived
        self._weights = weights
        self._int8 = int8
        self._reader = ExpertReader(config, weights, layer, shard, keep_four_bit=int8 is None and weights.device.type == "cpu")
        self._reading = threading.Lock()
        self._experts: PackedExperts | CardExperts | _PlainExperts
        is_plain = not config.bias and config.limit is None and config.shared_limit is None and config.activation != "gpt_oss"
        if is_card(weights.device):
            if not is_plain:
                raise UnsupportedModel("experts with biases or bounded activations are not computed on a card yet", "swiglu_limit")
            num_routed = config.gate.num_experts
            self._experts = CardExperts(config.num_ids, num_routed, weights.dtype, weights.device, config.activation)
        elif is_plain and not self._reader.is_four_bit and can_pack(weights.dtype, weights.device, config.activation):
            self._experts = PackedExperts(config.num_ids, weights.dtype, config.activation, self._int8_of)
        else:
            self._experts = _PlainExperts(config, self._int8_of)
        first = tuple(held)
        if not isinstance(self._experts, _PlainExperts):
            self._experts.expect(sum(expert != config.gate.num_experts for expert in first))
        for expert in first:
            self.hold(expert)

    @property
    def held(self) -> frozenset[int]:
        """Ids of the experts held now."""
        return self._experts.held

    @property
    def num_bytes(self) -> int:
        """Bytes of the experts held now."""
        return self._experts.num_bytes

    def hold(self, expert: int) -> None:
        """Read an expert unless it is held. Raises CheckpointInvalid."""
        with self._reading:
            if expert not in self._experts.held:
                self._read(expert)

    def release(self, expert: int) -> None:
        """Let an expert go; rows that still come for it make it come back."""
        with self._reading:
            if expert in self._experts.held:
                self._experts.drop(expert)
                for name in self._reader.keys(expert):
                    self._weights.resident_bytes.pop(name, None)

    @property
    def num_moves(self) -> int:
        """How often a card's weights moved to other addresses; recorded work reads where they were."""
        return self._experts.num_moves if isinstance(self._experts, CardExperts) else 0

    def hold_for(self, ids_TK: torch.Tensor) -> bool:
        """Read the experts of ids in host memory that are not held; False where ids lie on the card and some experts are elsewhere.

        Raises:
            InvalidInput: an id is no expert's.
        """
        assert isinstance(self._experts, CardExperts)  # elsewhere nothing is recorded
        if ids_TK.device.type != "cpu":  # the host does not see them
            return self._experts.holds_all
        try:
            while (missing := self._experts.missing(ids_TK)) is not None:
                self.num_late_loads += 1
                self.hold(missing)
        except ValueError:
            raise self._no_expert(ids_TK) from None
        return True

    def compute_held(self, rows_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """``compute`` on a card for ids, int64 there, that ``hold_for`` has seen: nothing is asked of the card."""
        assert isinstance(self._experts, CardExperts)
        out_TD = torch.empty(rows_TD.shape, dtype=rows_TD.dtype, device=rows_TD.device)
        self._experts.compute_held(out_TD, self.rows_by_expert, rows_TD, ids_TK, weights_TK)
        return out_TD

    def compute(
        self, rows_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, out_TD: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The weighted sum of each row's experts, [T, D]; ids of -1 add nothing.

        Args:
            rows_TD: In the format of the weights.
            ids_TK: int32 or int64.
            weights_TK: fp32.
            out_TD: Where the result goes, in the format of the rows and with rows that are contiguous; None allocates it.

        Raises:
            InvalidInput: an id is no expert's.
        """
        if out_TD is None:
            out_TD = torch.empty(rows_TD.shape, dtype=rows_TD.dtype, device=rows_TD.device)
        try:
            while (missing := self._experts.compute(out_TD, self.rows_by_expert, rows_TD, ids_TK, weights_TK)) is not None:
                self.num_late_loads += 1
                self.hold(missing)
        except ValueError:
            raise self._no_expert(ids_TK) from None
        return out_TD

    def _no_expert(self, ids_TK: torch.Tensor) -> InvalidInput:
        low, high = torch.aminmax(ids_TK)
        return InvalidInput(f"expert ids {int(low)} to {int(high)}, there are {self.config.num_ids}")

    def _int8_of(self, expert: int) -> Int8Parts:
        int8 = self._int8
        if int8 is None or (expert == self.config.gate.num_experts and not int8.shared):
            return Int8Parts(gate_up=False, down=False)
        return Int8Parts(gate_up=True, down=int8.down)

    def _read(self, expert: int) -> None:
        weights = self._reader.read(expert)
        if isinstance(self._experts, _PlainExperts):
            gate_up_bytes, down_bytes = self._experts.put(expert, weights)
        else:
            # Only experts without biases, and not in four bits, go where they are packed.
            assert isinstance(weights.gate, torch.Tensor)
            assert isinstance(weights.up, torch.Tensor)
            assert isinstance(weights.down, torch.Tensor)
            gate_up_bytes, down_bytes = self._experts.put(expert, weights.gate, weights.up, weights.down)
        gate, up, down = self._reader.keys(expert)
        for name in (gate, up):
            self._note(expert, name, gate_up_bytes // 2)
        self._note(expert, down, down_bytes)

    def _note(self, expert: int, name: str, num_bytes: int) -> None:
        self._weights.resident_bytes.pop(name.removesuffix(f"[{expert}]"), None)  # what was read on the way
        self._weights.hold(name, num_bytes)
