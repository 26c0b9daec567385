"""Every family that transformers has, in halves, against transformers: logits within 1e-4 and 64 equal greedy tokens in fp32."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from antiphon.models.experts.placement import ExpertPlacement
from antiphon.models.head import SlicedHead
from antiphon.testing import LocalCluster, unsettle, wiring

WIRINGS: dict[str, tuple[str, dict[str, int]]] = {
    "monolith": ("monolith", {}),
    "2A3F, experts spread": ("afd", {"attention": 2, "expert_groups": 3}),
    "2A3F, slices": ("afd", {"attention": 2, "ffn": 3}),
    "1A4F, both": ("afd", {"ffn": 2, "expert_groups": 2}),
    "P/D + AFD": ("pd-afd", {"attention": 2, "expert_groups": 2}),
}
NUM_TOKENS = 64

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 92,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 199,
    "max_position_embeddings": 256,
}
LATENT: dict[str, Any] = {"q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "beta_fast": 32,
    "beta_slow": 1,
}
DEEPSEEK: dict[str, Any] = {**SHAPE, **LATENT, "num_key_value_heads": 4, "n_routed_experts": 8, "moe_intermediate_size": 36}

DELTA: dict[str, Any] = {
    **SHAPE,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
DELTA_MOE: dict[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 36,
    "shared_expert_intermediate_size": 40,
}

FAMILIES: dict[str, Callable[[], Any]] = {
    "qwen3_next": lambda: hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(**DELTA, **DELTA_MOE, mlp_only_layers=[1])),
    "qwen3_5": lambda: hf.Qwen3_5ForCausalLM(hf.Qwen3_5TextConfig(**DELTA)),
    "qwen3_5_moe": lambda: hf.Qwen3_5MoeForCausalLM(
        hf.Qwen3_5MoeTextConfig(**{k: v for k, v in DELTA.items() if k != "intermediate_size"}, **DELTA_MOE)
    ),
    "lfm2": lambda: hf.Lfm2ForCausalLM(
        hf.Lfm2Config(**{**SHAPE, "num_hidden_layers": 4}, full_attn_idxs=[1, 3], block_multiple_of=8, conv_bias=True)
    ),
    "kimi_linear": lambda: hf.KimiLinearForCausalLM(
        hf.KimiLinearConfig(
            **{**SHAPE, **LATENT, "num_hidden_layers": 4, "num_key_value_heads": 4, "q_lora_rank": None},
            num_local_experts=8,
            num_experts_per_tok=3,
            n_group=2,
            topk_group=1,
            moe_intermediate_size=36,
            linear_head_dim=16,
            linear_num_heads=3,
            layer_types=["linear_attention", "full_attention"] * 2,
            pad_token_id=0,
        )
    ),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            **SHAPE,
            head_dim=24,
            sliding_window=20,
            query_pre_attn_scalar=40,
            attn_logit_softcapping=1.5,
            final_logit_softcapping=3.0,
            attn_implementation="eager",  # the one that bounds scores
        )
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **{**SHAPE, "num_hidden_layers": 7},
            head_dim=24,
            sliding_window=20,
            query_pre_attn_scalar=40,
            final_logit_softcapping=3.0,
        )
    ),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**SHAPE)),
    "gpt_oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **SHAPE,
            head_dim=24,
            num_local_experts=8,
            num_experts_per_tok=3,
            sliding_window=20,
            swiglu_limit=0.5,
            rope_parameters={k: v for k, v in YARN.items() if not k.startswith("mscale")} | {"truncate": False},
        )
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SHAPE, num_local_experts=8, sliding_window=37)),
    "qwen2_moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(
            **SHAPE,
            num_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=36,
            shared_expert_intermediate_size=50,
            mlp_only_layers=[1],
        )
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(
            **SHAPE, head_dim=24, num_experts=10, num_experts_per_tok=4, moe_intermediate_size=36, norm_topk_prob=True
        )
    ),
    "olmoe": lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(**SHAPE, num_experts=8, num_experts_per_tok=3, clip_qkv=0.4)),
    "phimoe": lambda: hf.PhimoeForCausalLM(
        hf.PhimoeConfig(**SHAPE, num_local_experts=6, attention_bias=True, lm_head_bias=True, router_jitter_noise=0.2)
    ),
    "dots1": lambda: hf.Dots1ForCausalLM(
        hf.Dots1Config(
            **SHAPE,
            n_routed_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=36,
            n_shared_experts=2,
            first_k_dense_replace=1,
            n_group=4,
            topk_group=2,
            norm_topk_prob=True,
            routed_scaling_factor=1.7,
            sliding_window=40,
            max_window_layers=2,
        )
    ),
    "deepseek_v2": lambda: hf.DeepseekV2ForCausalLM(
        hf.DeepseekV2Config(
            **DEEPSEEK,
            num_experts_per_tok=3,
            n_shared_experts=2,
            first_k_dense_replace=1,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.0,
        )
    ),
    "deepseek_v2-lite": lambda: hf.DeepseekV2ForCausalLM(
        hf.DeepseekV2Config(**{**DEEPSEEK, "q_lora_rank": None}, num_experts_per_tok=3, rope_parameters=YARN)
    ),
    "deepseek_v3": lambda: hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(
            **DEEPSEEK, num_experts_per_tok=3, first_k_dense_replace=1, n_group=4, topk_group=2, rope_parameters=YARN
        )
    ),
    "deepseek_v32": lambda: hf.DeepseekV32ForCausalLM(
        hf.DeepseekV32Config(
            **DEEPSEEK,
            num_experts_per_tok=3,
            first_k_dense_replace=1,
            n_group=4,
            topk_group=2,
            rope_parameters=YARN,
            index_topk=24,
            index_n_heads=16,  # fewer have many scores of exactly 0, and which of equals is chosen nobody says
            index_head_dim=16,
        )
    ),
    "glm4_moe": lambda: hf.Glm4MoeForCausalLM(
        hf.Glm4MoeConfig(
            **SHAPE,
            head_dim=24,
            attention_bias=True,
            use_qk_norm=True,
            n_routed_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=36,
            n_shared_experts=2,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.7,
        )
    ),
    "glm4_moe-air": lambda: hf.Glm4MoeForCausalLM(
        hf.Glm4MoeConfig(
            **SHAPE,
            n_routed_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=36,
            first_k_dense_replace=2,
            norm_topk_prob=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.75},
        )
    ),
    "glm4_moe_lite": lambda: hf.Glm4MoeLiteForCausalLM(
        hf.Glm4MoeLiteConfig(**DEEPSEEK, num_experts_per_tok=3, attention_bias=True)
    ),
    "glm_moe_dsa": lambda: hf.GlmMoeDsaForCausalLM(
        hf.GlmMoeDsaConfig(
            **DEEPSEEK,
            num_experts_per_tok=3,
            first_k_dense_replace=1,
            index_topk=24,
            index_n_heads=16,
            index_head_dim=20,  # of which 8 are rotated
        )
    ),
    "step3p7": lambda: hf.Step3p7ForConditionalGeneration(
        hf.Step3p7Config(
            text_config={
                **SHAPE,
                "num_hidden_layers": 4,
                "head_dim": 16,
                "n_routed_experts": 8,
                "num_experts_per_tok": 3,
                "moe_intermediate_size": 36,
                "share_expert_dim": 28,
                "sliding_window": 20,
                "num_sliding_attention_heads": 6,
                "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
                "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
                "moe_router_scaling_factor": 1.7,
                "swiglu_limits": [0.0, 0.0, 0.3, 0.0],
                "swiglu_limits_shared": [0.2, 0.0, 0.2, 0.1],
                "rope_theta": [5000.0, 100.0, 100.0, 5000.0],
                "partial_rotary_factors": [0.5, 1.0, 1.0, 0.5],
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 2.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 32.0,
                    "original_max_position_embeddings": 64,
                },
            },
            vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28},
        )
    ),
    "longcat_flash": lambda: hf.LongcatFlashForCausalLM(
        hf.LongcatFlashConfig(
            **LATENT,
            hidden_size=64,
            ffn_hidden_size=92,
            num_layers=2,
            num_attention_heads=4,
            vocab_size=199,
            max_position_embeddings=256,
            n_routed_experts=8,
            zero_expert_num=4,
            moe_topk=4,
            expert_ffn_hidden_size=36,
            head_dim=8,
            routed_scaling_factor=1.5,
        )
    ),
}


@pytest.fixture(scope="module")
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    torch.manual_seed(3)
    model = FAMILIES[request.param]().eval()
    unsettle(model)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    if request.param == "kimi_linear":
        name_dense_layers_as_published(path)
    if request.param.startswith(("qwen3_next", "qwen3_5")):
        add_prediction_tensors(path)
    return path, model


def name_dense_layers_as_published(path: Path) -> None:
    """transformers saves dense layers under the name that the published checkpoints have for experts only."""
    tensors = load_file(path / "model.safetensors")
    dense = re.compile(r"block_sparse_moe\.(gate|up|down)_proj")
    save_file({dense.sub(r"mlp.\1_proj", name): each for name, each in tensors.items()}, path / "model.safetensors")


def add_prediction_tensors(path: Path) -> None:
    """The published checkpoints hold a layer that predicts a second token, which transformers drops: nothing may come of it."""
    tensors = load_file(path / "model.safetensors")
    tensors["mtp.fc.weight"] = torch.ones(SHAPE["hidden_size"], 2 * SHAPE["hidden_size"])
    tensors |= {
        name.replace("model.layers.1.", "mtp.layers.0."): 1 + each for name, each in tensors.items() if ".layers.1." in name
    }
    save_file(tensors, path / "model.safetensors")


def watch_logits(cluster: LocalCluster) -> list[torch.Tensor]:
    """What generating workers compute from now on, batch by batch, for requests that ask for logprobs."""
    seen: list[torch.Tensor] = []
    for part in cluster.generating:
        compute = part.worker.halves.logits

        def logits(x_RD: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor] = compute) -> torch.Tensor:
            seen.append(compute(x_RD))
            return seen[-1]

        part.worker.halves.logits = logits  # type: ignore[method-assign]
        begin = part.worker.halves.head.begin

        def in_slices(x_RD: torch.Tensor, *, best_only: bool, begin: Callable[..., SlicedHead] = begin) -> SlicedHead:
            run = begin(x_RD, best_only=best_only)
            go_on = run.go_on

            def noted() -> bool:
                is_over = go_on()
                if is_over and run.result is not None and run.result.logits_RV is not None:
                    seen.append(run.result.logits_RV)
                return is_over

            run.go_on = noted  # type: ignore[method-assign]
            return run

        part.worker.halves.head.begin = in_slices  # type: ignore[method-assign]
    return seen


def check(model: Any, prompt: list[int], answer: list[int], ours: torch.Tensor) -> None:
    """The answer is transformers' own, and its logits are among ours: rows of a batch come in the scheduler's order."""
    with torch.inference_mode():
        theirs = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
    assert theirs.argmax(dim=-1).tolist() == answer
    assert torch.cdist(theirs, ours, p=torch.inf).amin(dim=1).max() < 1e-4


# Families whose caches, masks or experts are unlike the others': all that can happen to a request happens to them at once, below.
DISTURBED = (
    "deepseek_v32",
    "gemma2",
    "glm_moe_dsa",
    "gpt_oss",
    "kimi_linear",
    "lfm2",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_next",
    "step3p7",
)
ALONE = ("monolith", "2A3F, slices")
CASES = [(family, name) for family in sorted(FAMILIES) for name in WIRINGS if family not in DISTURBED or name in ALONE]


@pytest.mark.parametrize(("tiny", "name"), CASES, indirect=["tiny"])
def test_tokens_and_logits_equal_transformers(tiny: tuple[Path, Any], name: str) -> None:
    path, model = tiny
    chance = random.Random(4)
    prompts = [[chance.randrange(SHAPE["vocab_size"]) for _ in range(n)] for n in (1, 19, 90)]
    topology, counts = WIRINGS[name]
    spec = wiring(
        path,
        topology,
        cache={"numBlocks": 64},
        scheduler={"maxNumBatchedTokens": 48, "remotePrefillMinTokens": 8},
        transport={"numUbatches": 2},
        **counts,
    )
    with LocalCluster(spec, path) as cluster:
        seen = watch_logits(cluster)
        ids = [
            cluster.submit(
                prompt,
                max_tokens=NUM_TOKENS,
                num_logprobs=0,
                on=i % len(cluster.generating),
                prefill=0 if "pd" in topology else None,
            )
            for i, prompt in enumerate(prompts)
        ]
        cluster.run()
        answers = [cluster.outputs[request_id].token_ids for request_id in ids]
        ours = torch.cat(seen)
    for prompt, answer in zip(prompts, answers, strict=True):
        check(model, prompt, answer, ours)


def die_with_rows_taken(worker: Any) -> None:
    """The worker's next message is taken and never answered."""

    def die(*_args: Any) -> Any:
        worker.side.close()
        return torch.zeros(1)

    worker.halves.compute = die


@pytest.mark.parametrize("tiny", DISTURBED, indirect=True)
def test_nothing_that_happens_to_requests_changes_a_token(tiny: tuple[Path, Any]) -> None:
    path, model = tiny
    chance = random.Random(8)
    stem = [chance.randrange(SHAPE["vocab_size"]) for _ in range(48)]
    prompts = [stem, *([*stem[:n], *(chance.randrange(SHAPE["vocab_size"]) for _ in range(9))] for n in (48, 33, 48, 16))]
    has_experts = hasattr(model.config.get_text_config(), "num_experts_per_tok")
    spec = wiring(
        path,
        "pd-afd",
        attention=2,
        expert_groups=3 if has_experts else 1,
        ffn=1 if has_experts else 3,
        ffn_replicas=2,
        cache={"numBlocks": 8, "blockSizeTokens": 16, "snapshotBlocks": 1},
        scheduler={"maxNumBatchedTokens": 32, "remotePrefillMinTokens": 8},
        transport={"numUbatches": 2},
    )
    with LocalCluster(spec, path) as cluster:
        seen = watch_logits(cluster)
        first = [cluster.submit(stem, max_tokens=NUM_TOKENS, num_logprobs=0, on=on, prefill=0) for on in (0, 1)]
        cluster.run()  # from now on workers hold the stem
        ids = [cluster.submit(p, max_tokens=NUM_TOKENS, num_logprobs=0, on=i % 2, prefill=0) for i, p in enumerate(prompts[1:])]
        for _ in range(9):
            cluster.step()
        die_with_rows_taken(cluster.ffns[0])
        for _ in range(9):
            cluster.step()
        if has_experts:
            load = {n: [chance.random() ** 4 for _ in range(cluster.facts.config.num_experts)] for n in range(9)}
            cluster.rebalance(ExpertPlacement.balanced(cluster.facts.config, load, 3, 3))
        cluster.run()
        answers = [cluster.outputs[name].token_ids for name in (first[0], *ids)]
        assert max(cluster.outputs[name].last.num_cached_tokens for name in ids) > 0
        assert sum(part.engine.scheduler.stats.num_preemptions for part in cluster.generating) > 0
        assert sum(part.worker.afd.times.num_resent for part in cluster.generating) > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        check(model, prompt, answer, torch.cat(seen))
