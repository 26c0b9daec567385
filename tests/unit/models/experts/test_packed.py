"""The compiled experts and gates against loops in fp64 and against the torch path."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from antiphon.core.errors import Unavailable
from antiphon.models.config import Activation, AttentionConfig, GateConfig, LayerConfig, MoEConfig
from antiphon.models.experts.packed import Int8Parts, PackedExperts
from antiphon.models.experts.routing import Router, Routing
from antiphon.models.layers.rope_config import RopeConfig
from antiphon.models.loading.checkpoint import Checkpoint
from antiphon.models.loading.weights import Weights
from antiphon.models.native.library import available, build_kernels

ALL, NONE = Int8Parts(gate_up=True, down=True), Int8Parts(gate_up=False, down=False)
Parts = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    try:
        build_kernels()
    except Unavailable as error:
        pytest.skip(f"the kernels can't be compiled here: {error}")
    if not available():
        pytest.skip("the kernels are turned off here")


def make(
    sizes: tuple[int, int, int], dtype: torch.dtype, int8: Int8Parts = NONE, activation: Activation = "silu"
) -> tuple[PackedExperts, Parts]:
    hidden, width, num_experts = sizes
    torch.manual_seed(hidden + width)
    parts = [
        tuple((torch.randn(shape) / shape[1] ** 0.5).to(dtype) for shape in ((width, hidden), (width, hidden), (hidden, width)))
        for _ in range(num_experts)
    ]
    packed = PackedExperts(num_experts, dtype, activation, lambda _: int8)
    packed.expect(num_experts)
    for expert, (gate, up, down) in enumerate(parts):
        packed.put(expert, gate, up, down)
    return packed, parts  # type: ignore[return-value]


def case(
    num_rows: int, hidden: int, num_experts: int, k: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = torch.randn(num_rows, hidden).to(dtype)
    ids = torch.stack([torch.randperm(num_experts)[:k] for _ in range(num_rows)]).int()
    return rows, ids, torch.rand(num_rows, k)


def run(packed: PackedExperts, rows: torch.Tensor, ids: torch.Tensor, by: torch.Tensor, num_experts: int) -> torch.Tensor:
    out = torch.full_like(rows, float("nan"))
    assert packed.compute(out, torch.zeros(num_experts, dtype=torch.int64), rows, ids, by) is None
    return out


def expected(
    parts: Parts, rows: torch.Tensor, ids: torch.Tensor, by: torch.Tensor, activation: Activation = "silu"
) -> torch.Tensor:
    out = torch.zeros(rows.shape, dtype=torch.float64)
    for t, row in enumerate(rows.double()):
        for e, weight in zip(ids[t].tolist(), by[t].tolist(), strict=True):
            if e >= 0:
                gate, up, down = (part.double() for part in parts[e])
                hidden = F.silu(gate @ row) if activation == "silu" else F.gelu(gate @ row, approximate="tanh")
                out[t] += weight * (down @ (hidden * (up @ row)))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(64, 32, 4), (100, 36, 5), (256, 160, 3)])
@pytest.mark.parametrize("num_rows", [1, 17, 150])
def test_each_row_gets_its_weighted_sum(dtype: torch.dtype, sizes: tuple[int, int, int], num_rows: int) -> None:
    packed, parts = make(sizes, dtype)
    rows, ids, by = case(num_rows, sizes[0], sizes[2], 2, dtype)
    ids[0, 0] = -1
    wanted = expected(parts, rows, ids, by)
    error = (run(packed, rows, ids, by, sizes[2]).double() - wanted).abs().max()
    assert error < (1e-5 if dtype is torch.float32 else 0.03) * wanted.abs().max()


def test_gelu_is_computed_too() -> None:
    packed, parts = make((64, 64, 2), torch.float32, activation="gelu_tanh")
    rows, ids, by = case(9, 64, 2, 2, torch.float32)
    wanted = expected(parts, rows, ids, by, "gelu_tanh")
    torch.testing.assert_close(run(packed, rows, ids, by, 2).double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int8", [ALL, Int8Parts(gate_up=True, down=False)])
def test_int8_experts_are_those_of_the_rounded_weights(dtype: torch.dtype, int8: Int8Parts) -> None:
    packed, parts = make((96, 64, 3), dtype, int8)
    rows, ids, by = case(40, 96, 3, 2, dtype)

    def rounded(weight: torch.Tensor) -> torch.Tensor:
        step = weight.double().abs().amax(dim=1, keepdim=True) / 127
        return (weight.double() / step).round() * step

    held = [(rounded(gate), rounded(up), rounded(down) if int8.down else down) for gate, up, down in parts]
    wanted = expected(held, rows, ids, by)
    error = (run(packed, rows, ids, by, 3).double() - wanted).abs().max()
    assert error < (1e-5 if dtype is torch.float32 else 0.03) * wanted.abs().max()


@pytest.mark.parametrize("int8", [NONE, ALL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_s_bits_depend_neither_on_its_batch_nor_on_threads(dtype: torch.dtype, int8: Int8Parts) -> None:
    packed, _ = make((128, 96, 4), dtype, int8)
    rows, ids, by = case(90, 128, 4, 3, dtype)
    together = run(packed, rows, ids, by, 4)
    for t in (0, 41, 89):
        assert torch.equal(run(packed, rows[t : t + 1], ids[t : t + 1], by[t : t + 1], 4)[0], together[t])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(run(packed, rows, ids, by, 4), together)
    finally:
        torch.set_num_threads(before)


def test_an_expert_let_go_is_missed_and_its_memory_used_again() -> None:
    packed, parts = make((64, 32, 3), torch.float32)
    rows, ids, by = case(5, 64, 3, 3, torch.float32)
    before = run(packed, rows, ids, by, 3)
    place = packed._table.slots[1].data_ptr()
    packed.drop(1)
    assert packed.held == {0, 2}
    out, counts = torch.empty_like(rows), torch.zeros(3, dtype=torch.int64)
    assert packed.compute(out, counts, rows, ids, by) == 1
    assert counts.sum() == 0, "a batch that could not be computed is not counted"
    packed.put(1, *parts[1])
    assert packed._table.slots[1].data_ptr() == place
    assert torch.equal(run(packed, rows, ids, by, 3), before)


def test_memory_is_not_used_again_while_a_batch_may_read_it() -> None:
    packed, parts = make((64, 32, 3), torch.float32)
    place = packed._table.slots[1].data_ptr()
    packed.drop(1)
    packed.put(1, *parts[1])  # no batch began in between
    assert packed._table.slots[1].data_ptr() != place


GATES = {
    "softmax": GateConfig(num_experts=40, top_k=4),
    "softmax, renormalised": GateConfig(num_experts=40, top_k=4, renormalise=True, scale=2.5),
    "all experts": GateConfig(num_experts=3, top_k=3),
    "one expert": GateConfig(num_experts=1, top_k=1),
    "sigmoid with a bias": GateConfig(num_experts=40, top_k=4, scoring="sigmoid", has_correction_bias=True, renormalise=True),
    "a factor per expert": GateConfig(num_experts=40, top_k=4, has_expert_scale=True),
    "groups by their best": GateConfig(num_experts=40, top_k=4, choice="group_limited", num_groups=8, num_kept_groups=3),
    "groups by their two best": GateConfig(
        num_experts=40,
        top_k=4,
        choice="group_limited",
        num_groups=8,
        num_kept_groups=3,
        group_score="top2_sum",
        scoring="sigmoid",
        has_correction_bias=True,
        renormalise=True,
        scale=2.5,
    ),
}


def router(tmp_path: Path, gate: GateConfig, *, shared: int = 0, has_shared_gate: bool = False) -> Router:
    torch.manual_seed(4)
    tensors = {
        "mlp.gate.weight": torch.randn(gate.num_experts, 70) * 0.3,
        "mlp.gate.e_score_correction_bias": torch.randn(gate.num_experts) * 0.1,
        "mlp.router_scale": torch.rand(1, gate.num_experts) + 0.5,
        "mlp.shared_expert_gate.weight": torch.randn(1, 70) * 0.2,
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    moe = MoEConfig(gate=gate, intermediate_size=8, shared_intermediate_size=shared, has_shared_gate=has_shared_gate)
    attention = AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=8, rope=RopeConfig(inv_freq=(1.0,)), scale=1.0)
    weights = Weights(Checkpoint.open(tmp_path), torch.float32, torch.device("cpu"))
    return Router(moe, weights, LayerConfig(attention=attention, ffn=moe))


def by_torch(made: Router, rows: torch.Tensor) -> Routing:
    packed, made._packed = made._packed, None
    try:
        return made(rows)
    finally:
        made._packed = packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GATES)
def test_the_kernel_s_gate_chooses_as_torch_does(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    made = router(tmp_path, GATES[name], shared=16, has_shared_gate=True)
    assert made._packed is not None
    rows = torch.randn(37, 70).to(dtype)
    got, wanted = made(rows), by_torch(made, rows)
    assert got.ids_TK.tolist() == wanted.ids_TK.tolist()
    torch.testing.assert_close(got.weights_TK, wanted.weights_TK, atol=1e-6, rtol=1e-5)
    assert got.is_full


def test_equal_scores_go_to_the_first_experts(tmp_path: Path) -> None:
    made = router(tmp_path, GATES["softmax, renormalised"])
    routing = made(torch.zeros(2, 70))
    assert routing.ids_TK.tolist() == [[0, 1, 2, 3]] * 2
    assert routing.weights_TK.tolist() == [[0.625] * 4] * 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["softmax", "groups by their two best"])
def test_rows_that_are_not_numbers_are_told_apart(tmp_path: Path, name: str, bad: float) -> None:
    made = router(tmp_path, replace(GATES[name]), shared=16)
    rows = torch.randn(20, 70)
    rows[13, 5] = bad
    routing = made(rows)
    if bad != bad or name == "softmax":
        assert routing.bad_rows == (13,)
        assert set(routing.ids_TK[13].tolist()) == {-1}
        assert not routing.is_full
    kept = [t for t in range(20) if t != 13]
    assert torch.equal(routing.ids_TK[kept], made(rows[kept]).ids_TK)
