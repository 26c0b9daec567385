"""The compiled convolution and gated delta rule against torch, transformers' own functions, and one token after another."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention, recurrent_kimi_delta_attention
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule

from antiphon.core.errors import Unavailable
from antiphon.models.attention.delta_rule import DeltaInputs, causal_conv, decay, delta_chunks, delta_step, unit
from antiphon.models.native.library import available, build_kernels

NO_SLOTS = torch.empty(0, dtype=torch.int64)


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    try:
        build_kernels()
    except Unavailable as error:
        pytest.skip(f"the kernels can't be compiled here: {error}")
    if not available():
        pytest.skip("the kernels are turned off here")


@dataclass(frozen=True, kw_only=True)
class Size:
    """Heads, key and value dims, and whether the decay is per channel of the key."""

    heads: int
    keys: int
    values: int
    by_channel: bool = False


SIZES = [
    Size(heads=3, keys=8, values=5),
    Size(heads=2, keys=64, values=64),
    Size(heads=2, keys=128, values=128),
    Size(heads=2, keys=16, values=72, by_channel=True),
    Size(heads=2, keys=64, values=64, by_channel=True),
]


def rule_inputs(rows: int, size: Size) -> DeltaInputs:
    torch.manual_seed(rows)
    n, k, v = size.heads, size.keys, size.values
    return DeltaInputs(
        q_TNK=F.normalize(torch.randn(rows, n, k), dim=-1) * k**-0.5,
        k_TNK=F.normalize(torch.randn(rows, n, k), dim=-1),
        v_TNV=torch.randn(rows, n, v),
        g_TNg=-torch.rand(rows, n, k if size.by_channel else 1) * 2.0,
        beta_TN=torch.rand(rows, n),
    )


def states_of(num: int, size: Size) -> torch.Tensor:
    torch.manual_seed(num)
    return torch.randn(num, size.heads, size.keys, size.values)


def rule(x: DeltaInputs, states: torch.Tensor, *, read: list[int], write: list[int], chunks: list[int]) -> torch.Tensor:
    out: torch.Tensor = torch.ops.antiphon.delta_rule(
        *(x.q_TNK, x.k_TNK, x.v_TNV, x.g_TNg, x.beta_TN, states),
        *(torch.tensor(read, dtype=torch.int64), torch.tensor(write, dtype=torch.int64), chunks),
    )
    return out


@pytest.mark.parametrize("size", SIZES)
def test_steps_equal_torch_and_leave_states_where_they_go(size: Size) -> None:
    x, states = rule_inputs(3, size), states_of(6, size)
    expected, after = delta_step(x, states[[0, 2, 2]])
    out = rule(x, states, read=[0, 2, 2], write=[0, 3, 5], chunks=[])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(states[[0, 3, 5]], after, atol=1e-5, rtol=1e-5)
    assert torch.equal(states[[1, 2, 4]], states_of(6, size)[[1, 2, 4]])


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 150])
@pytest.mark.parametrize("size", SIZES)
def test_chunks_equal_torch(size: Size, rows: int) -> None:
    x, states = rule_inputs(rows, size), states_of(2, size)
    expected, after = delta_chunks(x, states[0])
    out = rule(x, states, read=[], write=[], chunks=[0, rows, 0, 1])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(states[1], after, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_both_equal_what_transformers_computes(size: Size) -> None:
    x, states = rule_inputs(70, size), states_of(1, size)
    g = x.g_TNg if size.by_channel else x.g_TNg.squeeze(-1)
    mine = [each[None] for each in (x.q_TNK / size.keys**-0.5, x.k_TNK, x.v_TNV, g, x.beta_TN)]
    options = {"initial_state": states.clone(), "output_final_state": True}
    qwen, kimi = (
        (torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule),
        (chunk_kimi_delta_attention, recurrent_kimi_delta_attention),
    )
    for theirs in kimi if size.by_channel else qwen:
        expected, after = theirs(*mine, **options)
        ours = states.clone()
        out = rule(x, ours, read=[], write=[], chunks=[0, 70, 0, 0])
        torch.testing.assert_close(out, expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours, after, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_a_token_has_the_same_bits_wherever_its_prompt_is_cut_and_whatever_runs_beside_it(size: Size) -> None:
    x = rule_inputs(40, size)
    whole = states_of(3, size)
    out = rule(x, whole, read=[], write=[], chunks=[0, 40, 0, 1])
    for cuts in ([0, 7, 40], [0, 1, 16, 33, 40], list(range(41))):
        parts, states, at = [], states_of(3, size), 0
        for start, end in itertools.pairwise(cuts):
            parts.append(rule(x.rows(start, end), states, read=[], write=[], chunks=[0, end - start, at, 1]))
            at = 1
        assert torch.equal(torch.cat(parts), out)
        assert torch.equal(states[1], whole[1])
    beside = states_of(3, size)
    two = DeltaInputs(**{name: torch.cat((getattr(x, name)[39:], getattr(x, name))) for name in DeltaInputs.__slots__})
    assert torch.equal(rule(two, beside, read=[2], write=[2], chunks=[1, 40, 0, 1])[1:], out)
    first = rule(x.rows(39, 40), states_of(3, size), read=[2], write=[2], chunks=[])
    assert torch.equal(first[0], rule(two, states_of(3, size), read=[2], write=[2], chunks=[1, 40, 0, 1])[0])


def test_strong_decays_overflow_nothing() -> None:
    size = SIZES[1]
    x, states = rule_inputs(64, size), states_of(1, size)
    strong = DeltaInputs(q_TNK=x.q_TNK, k_TNK=x.k_TNK, v_TNV=x.v_TNV, g_TNg=x.g_TNg * 1000.0, beta_TN=x.beta_TN)
    assert torch.isfinite(rule(strong, states, read=[], write=[], chunks=[0, 64, 0, 0])).all()
    assert torch.isfinite(states).all()


def test_rows_and_states_that_are_not_there_are_refused() -> None:
    size = SIZES[0]
    x, states = rule_inputs(4, size), states_of(2, size)
    for read, write, chunks in (
        ([0], [0], [1, 2, 0, 1]),
        ([], [], [0, 4, 0, 2]),
        ([], [], [1, 4, 0, 1]),
        ([-1], [0], [1, 3, 0, 1]),
    ):
        with pytest.raises(RuntimeError):
            rule(x, states, read=read, write=write, chunks=chunks)


DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)]  # bf16: one rounding of the result


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("form", ["qwen", "kimi"])
def test_a_whole_layer_equals_torch(form: str, dtype: torch.dtype, tolerance: float) -> None:
    heads, key_heads, dim, rows = 4, 4 if form == "kimi" else 2, 32, 23
    decays = dim if form == "kimi" else 1
    torch.manual_seed(3)
    qkv, z = torch.randn(rows, (2 * key_heads + heads) * dim) * 3, torch.randn(rows, heads * dim).to(dtype)
    beta, raw = torch.randn(rows, heads).to(dtype), (torch.randn(rows, heads * decays) * 3).to(dtype)
    bias, rate, norm = torch.randn(heads * decays), -torch.rand(heads) * 16, torch.rand(dim) + 0.5
    states = torch.randn(3, heads, dim, dim)
    expected_states = states.double()
    got = torch.ops.antiphon.gated_delta(
        *(qkv, z, beta, raw, bias, rate, norm, states, torch.tensor([0]), torch.tensor([0]), [1, rows - 1, 1, 2]),
        *(key_heads, 1e-6, form == "kimi"),
    )
    q, k, v = qkv.double().split([key_heads * dim, key_heads * dim, heads * dim], dim=1)
    q, k = (unit(part.reshape(rows, key_heads, dim)).repeat_interleave(heads // key_heads, dim=1) for part in (q, k))
    x = DeltaInputs(
        q_TNK=q * dim**-0.5,
        k_TNK=k,
        v_TNV=v.reshape(rows, heads, dim),
        g_TNg=decay(raw.reshape(rows, heads, -1), bias.view(heads, -1), rate.view(heads, 1)).double(),
        beta_TN=beta.double().sigmoid(),
    )
    first, after = delta_step(x.rows(0, 1), expected_states[[0]])
    rest, last = delta_chunks(x.rows(1, rows), expected_states[1])
    gate = z.double().view(rows, heads, dim)
    gate = gate.sigmoid() if form == "kimi" else F.silu(gate)
    expected = (F.rms_norm(torch.cat((first, rest)), (dim,), norm.double(), 1e-6) * gate).reshape(rows, -1).to(dtype)
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(states[[0, 2]], torch.stack((after[0], last)).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("silu", [False, True])
def test_convolution_equals_torch_and_keeps_the_last_inputs(dtype: torch.dtype, silu: bool) -> None:
    taps, width = 4, 150
    torch.manual_seed(4)
    x, weight, bias = torch.randn(2 + 5 + 2, width).to(dtype), torch.randn(taps, width), torch.randn(width)
    tails = torch.randn(6, taps - 1, width).to(dtype)
    before = tails.clone()
    out = torch.ops.antiphon.causal_conv(
        *(x, weight, bias, tails, torch.tensor([0, 4]), torch.tensor([0, 1]), [2, 5, 2, 3, 7, 2, 3, 3], silu)
    )
    windows = [torch.cat((before[0], x[:1])), torch.cat((before[4], x[1:2])), torch.cat((before[2], x[2:]))]
    expected = torch.cat([causal_conv(window, weight, bias) for window in windows])
    torch.testing.assert_close(out, F.silu(expected) if silu else expected, atol=1e-5, rtol=1e-5)
    for slot, window in zip((0, 1, 3), windows, strict=True):
        assert torch.equal(tails[slot], window[-3:])
    assert torch.equal(tails[[2, 4, 5]], before[[2, 4, 5]])
    alone = torch.ops.antiphon.causal_conv(x[1:2], weight, bias, before, torch.tensor([4]), torch.tensor([1]), [], silu)
    assert torch.equal(alone[0], out[1])
