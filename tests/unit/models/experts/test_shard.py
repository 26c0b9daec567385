"""Expert banks and gates against loops, one row and one expert at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from antiphon.core.errors import InvalidInput
from antiphon.core.ids import FFNShard
from antiphon.models.config import GateConfig, MoEConfig
from antiphon.models.config import LayerConfig as Layer
from antiphon.models.experts.routing import Router
from antiphon.models.experts.shard import ExpertBank
from antiphon.models.families import describe
from antiphon.models.loading.checkpoint import Checkpoint
from antiphon.models.loading.weights import Weights

EXPERTS, HIDDEN, WIDTH = 5, 12, 7


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"mlp.gate.weight": (EXPERTS, HIDDEN)}
    for e in range(EXPERTS):
        shapes |= {f"mlp.experts.{e}.{part}_proj.weight": (WIDTH, HIDDEN) for part in ("gate", "up")}
        shapes[f"mlp.experts.{e}.down_proj.weight"] = (HIDDEN, WIDTH)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def weights(tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Weights:
    path: Path = tmp_path_factory.mktemp("experts")
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return Weights(Checkpoint.open(path), torch.float32, torch.device("cpu"))


def moe(top_k: int = 2) -> MoEConfig:
    return MoEConfig(gate=GateConfig(num_experts=EXPERTS, top_k=top_k, renormalise=True), intermediate_size=WIDTH)


def layer() -> Layer:
    raw = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": 8,
        "moe_intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "vocab_size": 10,
        "max_position_embeddings": 16,
    }
    described = describe(raw).layers[0]
    return Layer(attention=described.attention, ffn=described.ffn)


def bank(weights: Weights, held: list[int], shard: FFNShard | None = None) -> ExpertBank:
    return ExpertBank(moe(), weights, layer(), FFNShard() if shard is None else shard, held)


def expected(tensors: dict[str, torch.Tensor], rows: torch.Tensor, ids: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(rows)
    for t in range(len(rows)):
        for e, w in zip(ids[t].tolist(), by[t], strict=True):
            if e >= 0:
                gate, up, down = (tensors[f"mlp.experts.{e}.{part}_proj.weight"] for part in ("gate", "up", "down"))
                out[t] += w * (down @ (F.silu(gate @ rows[t]) * (up @ rows[t])))
    return out


CASES = {
    "each row its own": [[0, 1], [2, 3], [4, 0], [1, 4]],
    "one expert gets all rows": [[3, 0], [3, 1], [3, 2], [3, 4]],
    "some experts get none": [[1, 2], [2, 1], [1, 2]],
    "a batch of one": [[4, 2]],
    "rows with fewer experts": [[-1, 2], [-1, -1], [0, -1]],
    "only rows without any": [[-1, -1]],
}


@pytest.mark.parametrize("case", CASES)
def test_the_weighted_sum_of_each_row_s_experts(tensors: dict[str, torch.Tensor], weights: Weights, case: str) -> None:
    ids = torch.tensor(CASES[case])
    torch.manual_seed(1)
    rows, by = torch.randn(len(ids), HIDDEN), torch.rand(ids.shape)
    out = bank(weights, list(range(EXPERTS))).compute(rows, ids, by)
    torch.testing.assert_close(out, expected(tensors, rows, ids, by), atol=1e-5, rtol=1e-5)


def test_slices_of_experts_sum_to_the_whole(tensors: dict[str, torch.Tensor], weights: Weights) -> None:
    ids, rows, by = torch.tensor([[0, 3], [2, 1]]), torch.randn(2, HIDDEN), torch.rand(2, 2)
    parts = [bank(weights, [0, 1, 2, 3], FFNShard.of(i, num_tensor=3)).compute(rows, ids, by) for i in range(3)]
    torch.testing.assert_close(sum(parts), expected(tensors, rows, ids, by), atol=1e-5, rtol=1e-5)


def test_an_expert_that_is_not_held_is_read_when_rows_come_for_it(tensors: dict[str, torch.Tensor], weights: Weights) -> None:
    one = bank(weights, [0])
    ids, rows, by = torch.tensor([[0, 4]]), torch.randn(1, HIDDEN), torch.rand(1, 2)
    torch.testing.assert_close(one.compute(rows, ids, by), expected(tensors, rows, ids, by), atol=1e-5, rtol=1e-5)
    assert one.held == {0, 4}
    assert one.num_late_loads == 1


def test_a_released_expert_is_forgotten_with_its_bytes(weights: Weights) -> None:
    two = bank(weights, [0, 1])
    before = two.num_bytes
    two.release(1)
    assert two.held == {0}
    assert two.num_bytes * 2 == before
    assert "mlp.experts.1.up_proj.weight" not in weights.resident_bytes


def test_rows_are_counted_by_expert(weights: Weights) -> None:
    counted = bank(weights, list(range(EXPERTS)))
    counted.compute(torch.randn(3, HIDDEN), torch.tensor([[0, 3], [3, -1], [3, 4]]), torch.rand(3, 2))
    assert counted.rows_by_expert.tolist() == [1, 0, 0, 3, 1]


@pytest.mark.parametrize("bad", [EXPERTS, -2])
def test_an_id_that_is_no_expert_s_is_refused(weights: Weights, bad: int) -> None:
    with pytest.raises(InvalidInput, match="expert ids"):
        bank(weights, [0]).compute(torch.randn(1, HIDDEN), torch.tensor([[0, bad]]), torch.rand(1, 2))


def test_a_row_that_is_not_numbers_takes_no_expert_and_leaves_others_alone(weights: Weights) -> None:
    router = Router(moe(), weights, layer())
    rows = torch.randn(3, HIDDEN)
    clean = router(rows)
    rows[1, 4] = float("nan")
    routing = router(rows)
    assert routing.bad_rows == (1,)
    assert routing.ids_TK[1].tolist() == [-1, -1]
    assert routing.ids_TK[[0, 2]].tolist() == clean.ids_TK[[0, 2]].tolist()


def test_skipping_drops_small_experts_and_never_the_best(weights: Weights) -> None:
    router = Router(moe(top_k=4), weights, layer())
    rows = torch.randn(50, HIDDEN)
    whole = router(rows)
    router.skip_below = 0.2
    routing = router(rows)
    for ids, kept, by in zip(whole.ids_TK.tolist(), routing.ids_TK.tolist(), whole.weights_TK, strict=True):
        share = (by / by.sum()).tolist()
        assert kept == [e if s >= 0.2 or s == max(share) else -1 for e, s in zip(ids, share, strict=True)]
    assert router.num_chosen == 200
    assert router.num_skipped == sum(e < 0 for row in routing.ids_TK.tolist() for e in row) > 0
