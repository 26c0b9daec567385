"""What memory a worker's pod needs, and what a download finds in a checkpoint."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from antiphon.apps.process.wiring.cache_room import cache_room
from antiphon.core.document.pools import parse_quantity
from antiphon.core.document.spec import LLMDeploymentSpec
from antiphon.core.errors import InvalidInput
from antiphon.models.cache_layout import kv_layout
from antiphon.models.families import describe
from antiphon_operator.planning.memory import RAY_BYTES, RUNTIME_BYTES, WeightSizes, memory_need, memory_problems
from antiphon_operator.render.settings import Runtime, Settings
from antiphon_operator.weight_sizes import sizes_in

ROOT = Path(__file__).parents[4]
# Of the published config of SmolLM2-135M: 30 layers, hidden 576, FFN 1536, 9 heads, 3 of keys and values, 49152 tokens, tied.
LAYER_ATTENTION = 2 * 576 * 576 + 2 * 576 * 192 + 2 * 576
LAYER_FFN = 3 * 576 * 1536
TOTAL = 2 * (30 * (LAYER_ATTENTION + LAYER_FFN) + 49_152 * 576 + 576)
SMOLLM2 = WeightSizes(total_bytes=TOTAL, ffn_bytes=2 * 30 * LAYER_FFN, kv_bytes_per_token=2 * 30 * 3 * 64 * 2)


def spec(memory: str | None = None, **extra: Any) -> LLMDeploymentSpec:
    pools = [
        {"name": "attention", "role": "attention", "resources": {} if memory is None else {"memory": memory}},
        {"name": "ffn", "role": "ffn", "replicas": 2, "parallelism": {"tensor": 2}},
    ]
    return LLMDeploymentSpec.model_validate({"model": {"uri": "/m"}, "topology": "afd", "pools": pools, **extra})


def test_each_role_counts_its_weights_and_only_attention_the_cache() -> None:
    assert TOTAL == 269_030_016, "parameters as published: 134515008"
    attention, ffn = (memory_need(spec(), pool, SMOLLM2) for pool in spec().pools)
    assert attention.weights == TOTAL - 2 * 30 * LAYER_FFN
    assert ffn.weights == 30 * LAYER_FFN, "half of it each, over two slices"
    assert (attention.kv_cache, ffn.kv_cache) == (1 << 30, 0)
    assert ffn.total == pytest.approx((30 * LAYER_FFN + RUNTIME_BYTES + RAY_BYTES) * 1.1, abs=1)


def test_a_draft_model_counts_where_answers_are_generated() -> None:
    attention, ffn = (memory_need(spec(), pool, replace(SMOLLM2, draft_bytes=1000)).weights for pool in spec().pools)
    assert (attention, ffn) == (TOTAL - 2 * 30 * LAYER_FFN + 1000, 30 * LAYER_FFN)


def test_blocks_count_as_many_tokens_as_they_hold() -> None:
    value = spec(cache={"numBlocks": 100, "blockSizeTokens": 16})
    assert memory_need(value, value.pools[0], SMOLLM2).kv_cache == 1600 * 23_040
    assert memory_need(value, value.pools[0], WeightSizes()).kv_cache is None


def test_a_pool_that_cannot_hold_its_worker_is_named_with_all_figures_and_a_size_that_does() -> None:
    (problem,) = memory_problems(spec("2Gi"), SMOLLM2)
    assert problem.startswith("spec.pools[0].resources.memory: 2Gi (2.00 GiB) is too little for a worker of pool attention")
    for part in ("weights 0.10", "KV cache 1.00", "runtime 0.37", "Ray 0.61", "10% on top", "lower spec.cache.memory"):
        assert part in problem
    enough = problem.partition("raise it to ")[2].partition(",")[0]
    assert list(memory_problems(spec(enough), SMOLLM2)) == []


def test_what_is_not_known_refuses_nothing() -> None:
    assert list(memory_problems(spec("2432Mi"), WeightSizes())) == []


def test_the_example_for_processors_fits_a_node_of_four_cores_and_eight_gibibytes() -> None:
    documents = list(yaml.safe_load_all((ROOT / "deploy/examples/cpu-smollm2.yaml").read_text()))
    value = LLMDeploymentSpec.model_validate(documents[1]["spec"])
    assert list(memory_problems(value, SMOLLM2)) == []
    defaults = Settings(runtime=Runtime(image="w", ray_version="2.60.0"))
    asked = [(p.resources.cpu, p.resources.memory) for p in value.pools for _ in range(p.replicas)]
    asked += [(defaults.head_cpu, defaults.head_memory), (defaults.gateway_cpu, defaults.gateway_memory), ("100m", "384Mi")]
    # What else asks there: a single node of kind (950m, 290Mi), KubeRay's operator (100m, 512Mi), two of ours.
    asked += [("950m", "290Mi"), ("100m", "512Mi"), ("100m", "128Mi"), ("100m", "128Mi")]
    assert sum(parse_quantity(cpu) for cpu, _ in asked) <= 4
    assert sum(parse_quantity(memory or "0") for _, memory in asked) <= 7.5 * 2**30, "what such a node leaves to pods"


@pytest.mark.parametrize("path", sorted((ROOT / "deploy/examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_no_example_asks_for_less_memory_than_its_workers_need(path: Path) -> None:
    for value in yaml.safe_load_all(path.read_text()):
        if value["kind"] == "LLMDeployment":
            assert list(memory_problems(LLMDeploymentSpec.model_validate(value["spec"]), WeightSizes())) == []


def test_a_download_finds_what_the_weights_consist_of(tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.weight": 800,
        "model.layers.0.self_attn.q_proj.weight": 200,
        "model.layers.0.mlp.up_proj.weight": 600,
        "model.layers.0.mlp.experts.3.down_proj.weight": 300,
        "model.layers.0.mlp.gate.weight": 40,
    }
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, size in tensors.items():
        header[name] = {"dtype": "BF16", "shape": [size // 2], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))
    config = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 32,
        "dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert sizes_in(tmp_path) == WeightSizes(total_bytes=1940, ffn_bytes=900, kv_bytes_per_token=2 * 2 * 2 * 8 * 2)


def test_a_checkpoint_of_another_form_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"short")
    (tmp_path / "config.json").write_text("[]")
    assert sizes_in(tmp_path) == WeightSizes()


DELTA = {"num_hidden_layers": 8, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
HYBRIDS: dict[str, dict[str, Any]] = {
    "Qwen3-Next": {
        **DELTA,
        "architectures": ["Qwen3NextForCausalLM"],
        "vocab_size": 100,
        "intermediate_size": 96,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 64,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_conv_kernel_dim": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "Kimi Linear": {
        **DELTA,
        "architectures": ["KimiLinearForCausalLM"],
        "vocab_size": 100,
        "intermediate_size": 96,
        "rms_norm_eps": 1e-6,
        "model_max_length": 64,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "mla_use_nope": True,
        "linear_attn_config": {
            "kda_layers": [1, 2, 3, 5, 6, 7],
            "full_attn_layers": [4, 8],
            "num_heads": 4,
            "head_dim": 16,
            "short_conv_kernel_size": 4,
        },
        "num_experts": 4,
        "num_experts_per_token": 2,
        "moe_intermediate_size": 32,
    },
    "LFM2": {
        **DELTA,
        "architectures": ["Lfm2ForCausalLM"],
        "vocab_size": 100,
        "intermediate_size": 96,
        "norm_eps": 1e-6,
        "max_position_embeddings": 64,
        "conv_L_cache": 3,
        "layer_types": ["conv", "conv", "full_attention", "conv"] * 2,
    },
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_what_is_kept_of_tokens_and_sequences_is_what_a_worker_lays_out(family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**HYBRIDS[family], "dtype": "bfloat16"}))
    laid_out = kv_layout(describe(HYBRIDS[family]), torch.bfloat16, 1)
    found = sizes_in(tmp_path)
    assert (found.kv_bytes_per_token, found.state_bytes) == (laid_out.token_bytes, laid_out.state_bytes)
    assert laid_out.state_bytes > 0


@pytest.mark.parametrize("section", [{}, {"numBlocks": 500}, {"numSnapshots": 3}, {"prefixCaching": False}])
def test_states_count_as_many_slots_as_a_worker_makes(section: dict[str, Any]) -> None:
    layout = kv_layout(describe(HYBRIDS["Qwen3-Next"]), torch.bfloat16, 16)
    sizes = WeightSizes(kv_bytes_per_token=layout.token_bytes, state_bytes=layout.state_bytes)
    value = spec(cache={"memory": "64Mi", **section}, scheduler={"maxNumSeqs": 10})
    room = cache_room(value, layout, 4096, value.cache.host_memory_bytes)
    assert room.num_state_slots is not None
    needed = room.num_blocks * layout.block_bytes + room.num_state_slots * layout.state_bytes
    counted = memory_need(value, value.pools[0], sizes).kv_cache
    assert counted is not None
    assert needed <= counted < needed + layout.block_bytes


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"cache": {"memory": "1Ki"}}, "the 16 tokens of one block"),
        ({"cache": {"memory": "64Mi"}, "model": {"uri": "/m", "maxModelLen": 8192}}, "the 8192 tokens of spec.model.maxModelLen"),
    ],
)
def test_a_cache_that_holds_too_few_tokens_is_refused_before_a_worker_starts(section: dict[str, Any], told: str) -> None:
    (problem,) = memory_problems(spec(**section), SMOLLM2)
    assert problem.startswith(f"spec.cache.memory: {section['cache']['memory']} is too little")
    assert told in problem
    assert list(memory_problems(spec(cache={"memory": "64Mi"}), SMOLLM2)) == [], "contexts are cut to what it holds"


def test_a_worker_whose_cache_holds_no_block_says_so_and_takes_no_requests_of_no_tokens() -> None:
    layout = kv_layout(describe(LLAMA), torch.bfloat16, 16)
    with pytest.raises(InvalidInput, match="hold no block of 16 tokens"):
        cache_room(spec(), layout, 4096, 1024)
    assert cache_room(spec(), layout, 4096, layout.block_bytes).num_blocks == 1


def test_a_cache_without_room_for_its_states_is_refused_before_a_worker_starts() -> None:
    layout = kv_layout(describe(HYBRIDS["Qwen3-Next"]), torch.bfloat16, 16)
    sizes = WeightSizes(kv_bytes_per_token=layout.token_bytes, state_bytes=layout.state_bytes)
    value = spec(cache={"memory": "1Mi"}, scheduler={"maxNumSeqs": 256})
    (problem,) = memory_problems(value, sizes)
    assert problem.startswith("spec.cache.memory: 1Mi (0.00 GiB) is too little for the states of 256 sequences")
    with pytest.raises(InvalidInput, match="take 22,164,480 bytes"):
        cache_room(value, layout, 4096, value.cache.host_memory_bytes)
