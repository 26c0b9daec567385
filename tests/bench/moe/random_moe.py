"""Writes a random Qwen3-MoE checkpoint, the same on every machine: for measuring what needs experts but no answers.

    python tests/bench/moe/random_moe.py DIR [--seed 0] [--expert-width 384] [--hybrid]

Hidden 512, 12 layers, 32 experts of which 4 serve a token. ``--hybrid``: shaped like Qwen3-Next, three layers of gated delta
nets to one of gated attention, and a shared expert; beside others:

    python tests/bench/peers/peers.py --model DIR --systems transformers monolith 1A1F --batch 32

transformers makes and writes it; its tokenizer knows single bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM


def write(path: Path, seed: int, expert_width: int, *, hybrid: bool = False) -> int:
    """Write the checkpoint; its number of parameters."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": 32_000,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "moe_intermediate_size": expert_width,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config: Qwen3MoeConfig | Qwen3NextConfig
    model: Any
    if hybrid:
        config = Qwen3NextConfig(
            **shape,
            shared_expert_intermediate_size=expert_width,
            linear_key_head_dim=64,
            linear_value_head_dim=64,
            linear_num_key_heads=4,
            linear_num_value_heads=8,
        )
        model = Qwen3NextForCausalLM(config).to(torch.bfloat16)
    else:
        config = Qwen3MoeConfig(**shape)
        model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2)
    model.save_pretrained(path)
    write_tokenizer(path, config.vocab_size)
    return sum(weights.numel() for weights in model.parameters())


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """A tokenizer of bytes: servers want one, and no text is measured."""
    words = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"<filler_{number}>" for number in range(vocab_size - len(words))]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(path / "tokenizer.json"))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--expert-width", type=int, default=256)
    parser.add_argument("--hybrid", action="store_true")
    args = parser.parse_args()
    print(f"{args.path}: {write(args.path, args.seed, args.expert_width, hybrid=args.hybrid):,} parameters")
