"""Families that transformers lacks, against plain references written from their papers' equations, one token sequence at a time."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from antiphon.testing import LocalCluster, wiring

WIRINGS: dict[str, tuple[str, dict[str, int]]] = {
    "monolith": ("monolith", {}),
    "2A3F, experts spread": ("afd", {"attention": 2, "expert_groups": 3}),
    "2A3F, slices": ("afd", {"attention": 2, "ffn": 3}),
}
NUM_TOKENS = 64
HIDDEN, HEADS, HEAD_DIM, VOCAB, LAYERS, EXPERTS, WIDTH = 48, 4, 16, 131, 4, 8, 20

Tensors = dict[str, torch.Tensor]


# ---- the references: dense loops, no cache, nothing shared with the platform ------------------------------------------


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight


def rotated(x: torch.Tensor, theta: float) -> torch.Tensor:
    """x [T, heads, dim]; dimension i turns with dimension i + dim / 2."""
    num_tokens, _, dim = x.shape
    out = x.clone()
    for position in range(num_tokens):
        for i in range(dim // 2):
            angle = position * theta ** (-2 * i / dim)
            first, second = x[position, :, i], x[position, :, i + dim // 2]
            out[position, :, i] = first * math.cos(angle) - second * math.sin(angle)
            out[position, :, i + dim // 2] = first * math.sin(angle) + second * math.cos(angle)
    return out


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal softmax attention; query head n reads K and V head n // (N / K)."""
    num_tokens, num_heads, dim = q.shape
    share = num_heads // k.shape[1]
    out = torch.zeros_like(q)
    for n in range(num_heads):
        scores = q[:, n] @ k[:, n // share].T / math.sqrt(dim)
        scores += torch.full((num_tokens, num_tokens), float("-inf")).triu(1)
        out[:, n] = scores.softmax(-1) @ v[:, n // share]
    return out.reshape(num_tokens, num_heads * dim)


def swiglu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    hidden = x @ gate.T
    return (hidden * torch.sigmoid(hidden) * (x @ up.T)) @ down.T


def step3_attention(x: torch.Tensor, w: Tensors, p: str) -> torch.Tensor:
    """MFA: q = Wq norm(Wc x); all query heads read one K and one V head."""
    q = (rms(x @ w[p + "q_proj.weight"].T, w[p + "inter_norm.weight"]) @ w[p + "wq.weight"].T).view(-1, HEADS, HEAD_DIM)
    k, v = ((x @ w[p + name].T).view(-1, 1, HEAD_DIM) for name in ("k_proj.weight", "v_proj.weight"))
    return attended(rotated(q, 500.0), rotated(k, 500.0), v) @ w[p + "o_proj.weight"].T


def step3_ffn(x: torch.Tensor, w: Tensors, layer: int) -> torch.Tensor:
    p = f"model.layers.{layer}."
    if layer not in (1, 2):  # dense first and last
        return swiglu(x, *(w[p + f"mlp.{part}_proj.weight"] for part in ("gate", "up", "down")))
    out = swiglu(x, *(w[p + f"share_expert.{part}_proj.weight"] for part in ("gate", "up", "down")))
    for t, row in enumerate(x):
        scores = (w[p + "moe.gate.weight"] @ row).softmax(0)
        best = scores.sort(descending=True).indices[:3].tolist()
        for e in best:
            parts = [w[p + f"moe.{part}_proj.weight"][e] for part in ("gate", "up", "down")]
            out[t] += scores[e] / sum(scores[i] for i in best) * swiglu(row, *parts)
    return out


def biased_attention(x: torch.Tensor, w: Tensors, p: str) -> torch.Tensor:
    def project(name: str) -> torch.Tensor:
        return (x @ w[p + name + ".weight"].T + w[p + name + ".bias"]).view(len(x), -1, HEAD_DIM)

    q, k, v = project("q_proj"), project("k_proj"), project("v_proj")
    return attended(rotated(q, 10000.0), rotated(k, 10000.0), v) @ w[p + "o_proj.weight"].T + w[p + "o_proj.bias"]


def pangu_ffn(x: torch.Tensor, w: Tensors, layer: int) -> torch.Tensor:
    """MoGE: softmax over all experts, the best of each of 4 groups, a learned factor on each weight; and the shared expert."""
    p = f"model.layers.{layer}.mlp."
    out = swiglu(x, *(w[p + f"shared_expert.{part}_proj.weight"] for part in ("gate", "up", "down")))
    for t, row in enumerate(x):
        scores = (w[p + "gate.weight"] @ row).softmax(0)
        for group in range(4):
            e = max(range(2 * group, 2 * group + 2), key=lambda i: float(scores[i]))
            parts = [w[p + f"experts.{e}.{part}_proj.weight"] for part in ("gate", "up", "down")]
            out[t] += scores[e] * w[p + "router_scale"][0, e] * swiglu(row, *parts)
    return out


def plain_attention(x: torch.Tensor, w: Tensors, p: str) -> torch.Tensor:
    q, k, v = ((x @ w[p + name].T).view(len(x), -1, HEAD_DIM) for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    return attended(rotated(q, 10000.0), rotated(k, 10000.0), v) @ w[p + "o_proj.weight"].T


def true_experts(scores: torch.Tensor) -> list[int]:
    """Top 4 of 8 experts and 6 null experts; only true experts count."""
    return [e for e in scores.sort(descending=True).indices[:4].tolist() if e < EXPERTS]


def adamoe_ffn(x: torch.Tensor, w: Tensors, layer: int) -> torch.Tensor:
    """True experts' weights sum to one."""
    p = f"model.layers.{layer}.block_sparse_moe."
    out = torch.zeros_like(x)
    for t, row in enumerate(x):
        scores = (w[p + "gate.weight"] @ row).softmax(0)
        true = true_experts(scores)
        for e in true:
            parts = [w[p + f"experts.{e}.{part}.weight"] for part in ("w1", "w3", "w2")]
            out[t] += scores[e] / sum(scores[i] for i in true) * swiglu(row, *parts)
    return out


Shapes = dict[str, tuple[int, ...]]
Half = Callable[[torch.Tensor, Tensors, Any], torch.Tensor]


def reference(w: Tensors, token_ids: list[int], attention: Half, ffn: Half) -> torch.Tensor:
    x = w["model.embed_tokens.weight"][token_ids]
    for layer in range(LAYERS):
        p = f"model.layers.{layer}."
        x = x + attention(rms(x, w[p + "input_layernorm.weight"]), w, p + "self_attn.")
        x = x + ffn(rms(x, w[p + "post_attention_layernorm.weight"]), w, layer)
    return rms(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


# ---- checkpoints -------------------------------------------------------------------------------------------------------


def gated(prefix: str, width: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Shapes:
    gate, up, down = (f"{prefix}{name}.weight" for name in names)
    return {gate: (width, HIDDEN), up: (width, HIDDEN), down: (HIDDEN, width)}


def qkvo(p: str, num_kv: int, *, bias: bool = False) -> Shapes:
    rows = {"q_proj": HEADS * HEAD_DIM, "k_proj": num_kv * HEAD_DIM, "v_proj": num_kv * HEAD_DIM, "o_proj": HIDDEN}
    shapes: Shapes = {f"{p}{name}.weight": (size, HEADS * HEAD_DIM if name == "o_proj" else HIDDEN) for name, size in rows.items()}
    return shapes | ({f"{p}{name}.bias": (size,) for name, size in rows.items()} if bias else {})


def step3_layer(i: int) -> Shapes:
    p = f"model.layers.{i}."
    rank = 24
    shapes = qkvo(p + "self_attn.", 1) | {
        p + "self_attn.q_proj.weight": (rank, HIDDEN),
        p + "self_attn.inter_norm.weight": (rank,),
        p + "self_attn.wq.weight": (HEADS * HEAD_DIM, rank),
    }
    if i not in (1, 2):
        return shapes | gated(p + "mlp.", 52)
    stacked = {name: (EXPERTS, *shape) for name, shape in gated(p + "moe.", WIDTH).items()}
    return shapes | stacked | gated(p + "share_expert.", 30) | {p + "moe.gate.weight": (EXPERTS, HIDDEN)}


def pangu_layer(i: int) -> Shapes:
    p = f"model.layers.{i}."
    shapes = qkvo(p + "self_attn.", 2, bias=True) | gated(p + "mlp.shared_expert.", 44)
    shapes |= {p + "mlp.gate.weight": (EXPERTS, HIDDEN), p + "mlp.router_scale": (1, EXPERTS)}
    for e in range(EXPERTS):
        shapes |= gated(p + f"mlp.experts.{e}.", WIDTH)
    return shapes


def adamoe_layer(i: int) -> Shapes:
    p = f"model.layers.{i}."
    shapes = qkvo(p + "self_attn.", 2) | {p + "block_sparse_moe.gate.weight": (EXPERTS + 6, HIDDEN)}
    for e in range(EXPERTS):
        shapes |= gated(p + f"block_sparse_moe.experts.{e}.", WIDTH, ("w1", "w3", "w2"))
    return shapes


COMMON: dict[str, Any] = {"hidden_size": HIDDEN, "vocab_size": VOCAB, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
COMMON |= {"head_dim": HEAD_DIM, "rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "float32"}
STEP3: dict[str, Any] = {
    "architectures": ["Step3TextForCausalLM"],
    "num_attention_groups": 1,
    "max_seq_len": 512,
    "max_position_embedding": 512,
    "rope_theta": 500.0,
    "share_q_dim": 24,
    "intermediate_size": 52,
    "moe_intermediate_size": WIDTH,
    "moe_num_experts": EXPERTS,
    "moe_top_k": 3,
    "norm_expert_weight": True,
    "share_expert_dim": 30,
    "moe_layers_enum": "1,2",
}
PANGU: dict[str, Any] = {
    "architectures": ["PanguProMoEForCausalLM"],
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": WIDTH,
    "shared_expert_intermediate_size": 44,
    "rope_theta": 10000.0,
}
ADAMOE: dict[str, Any] = {
    "architectures": ["AdaMoEMixtralForCausalLM"],
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 4,
    "num_null_experts": 6,
    "intermediate_size": WIDTH,
    "rope_theta": 10000.0,
}
FAMILIES: dict[str, tuple[dict[str, Any], Callable[[int], Shapes], Half, Half]] = {
    "step3": (STEP3, step3_layer, step3_attention, step3_ffn),
    "pangu_pro_moe": (PANGU, pangu_layer, biased_attention, pangu_ffn),
    "adamoe": (ADAMOE, adamoe_layer, plain_attention, adamoe_ffn),
}


def write(family: str, path: Path) -> Tensors:
    config, layer, _, _ = FAMILIES[family]
    shapes: Shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    shapes["model.norm.weight"] = (HIDDEN,)
    for i in range(LAYERS):
        shapes |= layer(i)
        shapes |= {f"model.layers.{i}.{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    torch.manual_seed(6)
    tensors = {
        name: 1.0 + 0.2 * torch.randn(shape) if "norm" in name or "scale" in name else torch.randn(shape) * 0.15
        for name, shape in shapes.items()
    }
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({**COMMON, **config}))
    return tensors


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors, Half, Half]:
    path = tmp_path_factory.mktemp(request.param)
    return path, write(request.param, path), *FAMILIES[request.param][2:]


@pytest.mark.parametrize("name", WIRINGS)
def test_tokens_and_logits_equal_the_papers_equations(tiny: tuple[Path, Tensors, Half, Half], name: str) -> None:
    path, tensors, attention, ffn = tiny
    chance = random.Random(7)
    prompt = [chance.randrange(VOCAB) for _ in range(21)]
    topology, counts = WIRINGS[name]
    spec = wiring(path, topology, cache={"numBlocks": 64}, scheduler={"maxNumBatchedTokens": 16}, **counts)
    with LocalCluster(spec, path) as cluster:
        seen: list[torch.Tensor] = []
        halves = cluster.generating[0].worker.halves
        compute = halves.logits
        halves.logits = lambda x_RD: seen.append(compute(x_RD)) or seen[-1]  # type: ignore[method-assign,func-returns-value]
        answer = cluster.generate(prompt, max_tokens=NUM_TOKENS, num_logprobs=0)  # or no logits are made
    expected = reference(tensors, prompt + answer, attention, ffn)[len(prompt) - 1 : -1]
    assert answer == expected.argmax(-1).tolist()
    torch.testing.assert_close(torch.cat(seen), expected, atol=1e-4, rtol=0)


def test_a_null_expert_costs_no_transfer_and_no_flop(tmp_path: Path) -> None:
    tensors = write("adamoe", tmp_path)
    chance = random.Random(8)
    prompt = [chance.randrange(VOCAB) for _ in range(240)]
    spec = wiring(tmp_path, "afd", attention=1, expert_groups=3, cache={"numBlocks": 64})
    with LocalCluster(spec, tmp_path) as cluster:
        answer = cluster.generate(prompt, max_tokens=20)
        workers = cluster.ffns
    chosen: list[tuple[int, list[int]]] = []  # the layer and the true experts of every row that was computed

    def noting(x: torch.Tensor, w: Tensors, layer: int) -> torch.Tensor:
        scores_TE = (x @ w[f"model.layers.{layer}.block_sparse_moe.gate.weight"].T).softmax(-1)
        chosen.extend((layer, true_experts(scores)) for scores in scores_TE)
        return adamoe_ffn(x, w, layer)

    reference(tensors, prompt + answer[:-1], plain_attention, noting)
    assert any(not experts for _, experts in chosen), "some rows choose null experts alone"
    for worker in workers:
        held = {layer: bank.held for layer, bank in worker.halves.banks.items()}
        sent = [(layer, held[layer] & set(experts)) for layer, experts in chosen]
        assert worker.stats.num_rows == sum(bool(experts) for _, experts in sent), "rows travel only for an expert held here"
        counted = {layer: sum(rows) for layer, rows in worker.halves.rows_by_expert().items()}
        assert counted == {n: sum(len(experts) for layer, experts in sent if layer == n) for n in counted}
