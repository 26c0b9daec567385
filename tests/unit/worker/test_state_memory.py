"""What a sequence takes of a worker's memory where all layers have states: as much at 32k tokens as at 1k, by the bytes in use."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from antiphon.core.kv import LIVE_STATES
from antiphon.testing import LocalCluster, wiring

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 65536,
}
DELTA: dict[str, Any] = {
    "layer_types": ["linear_attention"] * 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
}
KIMI: dict[str, Any] = {
    "layer_types": ["linear_attention"] * 2,
    "linear_head_dim": 16,
    "linear_num_heads": 2,
    "mlp_layer_types": ["sparse"] * 2,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, Any] = {
    "gated delta nets": lambda: hf.Qwen3_5ForCausalLM(hf.Qwen3_5TextConfig(**SHAPE, **DELTA)),
    "Kimi Delta Attention": lambda: hf.KimiLinearForCausalLM(hf.KimiLinearConfig(**SHAPE, **KIMI)),
    "convolutions": lambda: hf.Lfm2ForCausalLM(hf.Lfm2Config(**SHAPE, layer_types=["conv"] * 2)),
}


@pytest.fixture(scope="module", params=sorted(MODELS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("states")
    MODELS[request.param]().save_pretrained(path)
    return path


def bytes_of_a_sequence(path: Path, num_tokens: int) -> tuple[int, int, int]:
    """Allocated for one sequence of so many tokens, written while it ran, and the bytes of one state of it."""
    spec = wiring(
        path,
        "monolith",
        model={"uri": str(path), "dtype": "float32", "maxModelLen": num_tokens + 8},
        cache={"prefixCaching": False},
        scheduler={"maxNumSeqs": 1, "maxNumBatchedTokens": 4096},
    )
    chance = random.Random(num_tokens)
    with LocalCluster(spec, path) as cluster:
        cluster.generate([chance.randrange(64) for _ in range(num_tokens)], max_tokens=4)
        cache = cluster.generating[0].worker.cache
        planes = [plane for layer in (*cache.planes, *cache.states) for plane in layer]
        written = sum(int(plane.flatten(1).any(1).sum()) * plane[0].nbytes for plane in planes)
        return sum(plane.untyped_storage().nbytes() for plane in planes), written, cache.layout.state_bytes


def test_a_sequence_takes_as_much_at_32k_tokens_as_at_1k(checkpoint: Path) -> None:
    short, long = (bytes_of_a_sequence(checkpoint, num_tokens) for num_tokens in (1024, 32_768))
    assert short == long
    allocated, written, state = long
    assert written == LIVE_STATES * state
    assert allocated < 8 * state, "the sequence's two, and the one before all first tokens"
