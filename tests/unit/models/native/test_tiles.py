"""The kernels for matrix units against plain torch, and what they promise: a row's bits depend on nothing beside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from antiphon.core.errors import Unavailable
from antiphon.models.attention.paged import AttentionBatch, Chunk, paged_attention
from antiphon.models.layers.functional import Rope
from antiphon.models.layers.gated_ffn import GatedFFN
from antiphon.models.layers.linear import Linear
from antiphon.models.layers.quantized import Int8Linear
from antiphon.models.layers.rope_config import RopeConfig
from antiphon.models.native.library import build_kernels, tiles_available


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    try:
        build_kernels()
    except Unavailable as error:
        pytest.skip(f"the kernels can't be compiled here: {error}")
    if not tiles_available():
        pytest.skip("this processor has no matrix units, or they are turned off")


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-2) -> None:
    """bfloat16 keeps 8 bits: compare with the largest value."""
    bound = tolerance * float(expected.float().abs().max())
    assert got.shape == expected.shape
    assert float((got.float() - expected.float()).abs().max()) <= bound


@pytest.mark.parametrize("rows", [1, 5, 16, 17, 32, 33, 47, 64, 200])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (576, 960), (172, 64), (96, 199), (32, 8)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_linear_layer_equals_torch(rows: int, inputs: int, outputs: int, has_bias: bool) -> None:
    torch.manual_seed(rows)
    weight, x = torch.randn(outputs, inputs).bfloat16(), torch.randn(rows, inputs).bfloat16()
    bias = torch.randn(outputs).bfloat16() if has_bias else None
    linear = Linear(weight, bias)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert linear.tiles is not None
    close(linear(x), expected)
    close(linear.in_fp32(x), expected, 1e-5)


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    torch.manual_seed(0)
    x = torch.randn(700, 1536).bfloat16()
    linear = Linear(torch.randn(576, 1536).bfloat16())
    together = linear(x)
    for first, count in [(0, 1), (3, 16), (40, 33), (123, 64), (500, 200)]:
        assert torch.equal(linear(x[first : first + count]), together[first : first + count])


def test_the_best_output_is_the_first_of_the_largest() -> None:
    torch.manual_seed(0)
    weight = torch.randn(1000, 64).bfloat16()
    weight[700] = weight[300] = weight.abs().max(dim=0).values
    x = torch.randn(37, 64).bfloat16()
    x[5] = weight[300]
    linear = Linear(weight)
    ids, values = linear.best(x)
    logits = linear.in_fp32(x)
    assert ids.tolist() == logits.argmax(dim=-1).tolist()
    assert torch.equal(values, logits.max(dim=-1).values)
    assert int(ids[5]) == 300


def test_a_row_that_is_no_number_has_no_number_as_its_best() -> None:
    x = torch.randn(3, 64).bfloat16()
    x[1, 7] = float("nan")
    _, values = Linear(torch.randn(100, 64).bfloat16()).best(x)
    assert torch.isnan(values).tolist() == [False, True, False]


@pytest.mark.parametrize("rows", [1, 20, 64])
@pytest.mark.parametrize(("hidden", "width"), [(576, 1536), (64, 172), (64, 86)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_gated_ffn_equals_torch(rows: int, hidden: int, width: int, has_bias: bool) -> None:
    torch.manual_seed(rows)
    gate_up, down = torch.randn(2 * width, hidden).bfloat16() / 8, torch.randn(hidden, width).bfloat16() / 8
    biases = (torch.randn(2 * width).bfloat16(), torch.randn(hidden).bfloat16()) if has_bias else (None, None)
    x = torch.randn(rows, hidden).bfloat16()
    got = GatedFFN([gate_up], down, "silu", gate_up_bias=biases[0], down_bias=biases[1])(x)
    wide = [None if b is None else b.double() for b in biases]
    gate, up = F.linear(x.double(), gate_up.double(), wide[0]).chunk(2, dim=-1)
    close(got, F.linear(F.silu(gate) * up, down.double(), wide[1]))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Rows as int8 with a scale each holds them."""
    scale = x.double().abs().amax(dim=-1, keepdim=True) / 127.0
    return (x.double() / scale).round() * scale


@pytest.mark.parametrize("rows", [1, 20, 64])
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 960), (172, 50), (64, 16)])
def test_an_int8_layer_equals_the_products_of_its_rounded_parts(rows: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(rows)
    weight, x = torch.randn(outputs, inputs).bfloat16(), torch.randn(rows, inputs).bfloat16()
    close(Int8Linear(weight)(x), F.linear(rounded(x), rounded(weight)))


@pytest.mark.parametrize(("hidden", "width"), [(576, 1536), (64, 172)])
@pytest.mark.parametrize("down_too", [False, True])
def test_an_int8_ffn_is_near_the_whole_one(hidden: int, width: int, down_too: bool) -> None:
    torch.manual_seed(0)
    gate_up, down = torch.randn(2 * width, hidden).bfloat16() / 8, torch.randn(hidden, width).bfloat16() / 8
    x = torch.randn(40, hidden).bfloat16()
    whole = GatedFFN([gate_up], down, "silu")
    int8 = GatedFFN([gate_up], down, "silu", int8_gate_up=True, int8_down=down_too)
    assert sum(int8.num_bytes) < (0.55 if down_too else 0.75) * sum(whole.num_bytes)
    close(int8(x), whole(x), 0.06)


def test_an_int8_row_that_is_no_number_stays_none() -> None:
    x = torch.randn(4, 64).bfloat16()
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    got = Int8Linear(torch.randn(32, 64).bfloat16())(x)
    assert torch.isnan(got).all(dim=1).tolist() == [False, True, True, False]


def test_the_activation_bears_extremes() -> None:
    gate_up = torch.eye(32).bfloat16().repeat(2, 1)
    gate_up[32:] = 1.0 / 32
    x = torch.full((2, 32), 1.0).bfloat16()
    x[0], x[1] = 3e4, -3e4
    got = GatedFFN([gate_up], torch.eye(32).bfloat16(), "silu")(x)
    assert torch.isfinite(got).all()
    assert float(got[1].abs().max()) == 0.0


class Case:
    """A cache of several requests, and rows of one step over it."""

    def __init__(self, heads: int, kv_heads: int, dim: int, block: int, lens: list[int]) -> None:
        torch.manual_seed(0)
        self.heads, self.kv_heads, self.dim, self.block = heads, kv_heads, dim, block
        width = -(-max(lens) // block)
        self.tables = torch.randperm(len(lens) * width).view(len(lens), width).to(torch.int32)
        shape = (len(lens) * width * block, kv_heads, dim)
        self.k, self.v = torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()
        self.lens = torch.tensor(lens)
        angles = torch.outer(torch.arange(2048.0), torch.tensor([100.0 ** (-i / dim) for i in range(dim // 2)]))
        self.cos, self.sin = angles.cos(), angles.sin()

    def slots(self, request: int, first: int, end: int) -> torch.Tensor:
        tokens = torch.arange(first, end)
        return self.tables[request, tokens // self.block].long() * self.block + tokens % self.block

    def batch(self, decodes: list[int], chunks: list[tuple[int, int]]) -> AttentionBatch:
        """Decodes of requests at their last token, then (request, rows) chunks that end there."""
        rows, pieces = [], []
        for request in decodes:
            rows.append(torch.tensor([int(self.lens[request]) - 1]))
        slots = [self.slots(r, int(self.lens[r]) - 1, int(self.lens[r])) for r in decodes]
        at = len(decodes)
        for request, count in chunks:
            end = int(self.lens[request])
            rows.append(torch.arange(end - count, end))
            slots.append(self.slots(request, end - count, end))
            pieces.append(Chunk(first_row=at, num_rows=count, context_slots=self.slots(request, 0, end)))
            at += count
        return AttentionBatch(
            positions_T=torch.cat(rows),
            slots_T=torch.cat(slots),
            block_size_tokens=self.block,
            decode_blocks_BM=self.tables[decodes] if decodes else None,
            decode_lens_B=self.lens[decodes] if decodes else None,
            chunks=pieces,
        )

    def attend(
        self, qkv: torch.Tensor, batch: AttentionBatch, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        k, v = self.k.clone(), self.v.clone()
        out = torch.ops.antiphon.tile_attention(
            *(qkv.clone(), self.cos, self.sin, batch.positions_T, batch.slots_T, k, v, batch.decode_blocks_BM, batch.decode_lens_B),
            *(self.block, batch.chunk_slots, batch.chunk_rows, self.heads, self.dim**-0.5, window or 0, None, None, 1e-6),
        )
        return out, k, v

    def reference(self, qkv: torch.Tensor, batch: AttentionBatch, window: int | None) -> torch.Tensor:
        """In fp32, of inputs rounded as the cache rounds them."""
        heads = qkv.view(qkv.shape[0], -1, self.dim).float()
        rope = Rope(
            RopeConfig(inv_freq=tuple(100.0 ** (-i / self.dim) for i in range(self.dim // 2))),
            2048,
            torch.float32,
            torch.device("cpu"),
        )
        tables = rope.tables(batch.positions_T)
        q = rope.rotate(heads[:, : self.heads], tables).bfloat16().float()
        k, v = self.k.clone(), self.v.clone()
        k[batch.slots_T] = rope.rotate(heads[:, self.heads : self.heads + self.kv_heads], tables).bfloat16()
        v[batch.slots_T] = heads[:, self.heads + self.kv_heads :].bfloat16()
        return paged_attention(q, k.float(), v.float(), batch, self.dim**-0.5, window).flatten(1)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block"), [(9, 3, 64, 16), (4, 2, 32, 16), (8, 8, 64, 4), (40, 2, 128, 32), (6, 1, 96, 16)]
)
@pytest.mark.parametrize("window", [None, 37])
def test_attention_equals_torch(heads: int, kv_heads: int, dim: int, block: int, window: int | None) -> None:
    case = Case(heads, kv_heads, dim, block, [1, 17, 32, 200, 65, 90, 130])
    batch = case.batch([0, 1, 2, 3], [(4, 65), (5, 30), (6, 3)])
    qkv = torch.randn(batch.positions_T.numel(), (heads + 2 * kv_heads) * dim).bfloat16()
    got, _, _ = case.attend(qkv, batch, window)
    close(got, case.reference(qkv, batch, window))


@pytest.mark.parametrize("window", [None, 50])
def test_a_token_has_the_same_bits_as_a_decode_and_within_a_prompt(window: int | None) -> None:
    case = Case(9, 3, 64, 16, [150, 80])
    qkv = torch.randn(150, 15 * 64).bfloat16()
    together, k, v = case.attend(qkv, case.batch([], [(0, 150)]), window)
    case.k, case.v = k, v
    for first, end in [(149, 150), (40, 41), (0, 1), (100, 107), (31, 64)]:
        case.lens[0] = end
        alone = case.batch([0], []) if end == first + 1 else case.batch([], [(0, end - first)])
        got, _, _ = case.attend(qkv[first:end], alone, window)
        assert torch.equal(got, together[first:end])


def test_a_decode_does_not_depend_on_its_batch_or_on_threads() -> None:
    case = Case(9, 3, 64, 16, [33, 100, 64, 7, 150])
    qkv = torch.randn(5, 15 * 64).bfloat16()
    together, _, _ = case.attend(qkv, case.batch([0, 1, 2, 3, 4], []), None)
    for row in range(5):
        alone, _, _ = case.attend(qkv[row : row + 1], case.batch([row], []), None)
        assert torch.equal(alone, together[row : row + 1])
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        again, _, _ = case.attend(qkv, case.batch([0, 1, 2, 3, 4], []), None)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(again, together)
