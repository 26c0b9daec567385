"""How evenly rows fall on FFN shards under a skewed expert load, in equal runs and balanced: real gates, real rows, a real split.

    python tests/bench/moe/balance.py [--shards 2] [--zipf 1.2] [--redundant 2] [--seeds 3] [--prompts 96]

A seeded random dots.llm1 whose gates favour experts as Zipf's law does: the correction bias of each layer is found on the rows that
reach it, until its experts have the wanted shares, and is part of the checkpoint. It is served as 1A<shards>F; every FFN worker
counts the rows (of one expert each) that it computes. After half of the traffic the placement is balanced by what was counted (EPLB
with redundant copies) and brought in; the other half of the traffic, other tokens, is what the figures are from. A JSON line per
seed and placement, then the medians, and the worst layer of all seeds.

What balancing can reach depends on how well one half foretells the other: rows of one prompt favour the same experts, so the sample
is as large as the number of prompts. ``worst_layer_fitted`` is the worst layer on the half that the placement was made from, and
``worst_layer_in_hindsight`` that of a placement made from the half it is judged by: what the packing itself costs, and the floor.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path

import torch
import transformers as hf

from antiphon.models.experts.balance import balance, imbalance
from antiphon.models.experts.placement import ExpertPlacement
from antiphon.models.experts.rebalancing import BalancePolicy, decide, since
from antiphon.testing import LocalCluster, wiring

NUM_EXPERTS = 32
PROMPT_TOKENS = 96
TOP_K = 2
NUM_LAYERS = 4
VOCAB = 384


def write_model(path: Path, exponent: float, seed: int) -> None:
    """A checkpoint whose gates choose as Zipf's law says: each layer's correction bias is found on the rows that reach it."""
    torch.manual_seed(seed)
    model = hf.Dots1ForCausalLM(
        hf.Dots1Config(
            hidden_size=64,
            intermediate_size=64,
            moe_intermediate_size=32,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            n_routed_experts=NUM_EXPERTS,
            n_shared_experts=0,
            num_experts_per_tok=TOP_K,
            first_k_dense_replace=0,
            vocab_size=VOCAB,
            max_position_embeddings=512,
            layer_types=["full_attention"] * NUM_LAYERS,
        )
    ).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.dim() > 1 and "embed" not in name:
                tensor.mul_(4.0)
    shares_E = torch.tensor([1.0 / (rank + 1) ** exponent for rank in range(NUM_EXPERTS)])
    shares_E = (shares_E / shares_E.sum()).clamp(max=0.95 / TOP_K)  # an expert is in a row's choice once
    text = torch.randint(2, VOCAB, (32, 128))
    for layer in model.model.layers:
        seen: list[torch.Tensor] = []
        hook = layer.mlp.register_forward_pre_hook(lambda _module, args, seen=seen: seen.append(args[0]))
        wanted_E = shares_E[torch.randperm(NUM_EXPERTS)] / shares_E.sum()
        gate = layer.mlp.gate
        with torch.inference_mode():
            model(text)
            rows_TD = seen[0].reshape(-1, seen[0].shape[-1]).float()
            scores_TE = torch.sigmoid(rows_TD @ gate.weight.float().T)
            bias_E = torch.zeros(NUM_EXPERTS)
            for turn in range(400):
                ids_TK = (scores_TE + bias_E).topk(TOP_K, dim=-1).indices
                found_E = torch.bincount(ids_TK.flatten(), minlength=NUM_EXPERTS) / ids_TK.numel()
                bias_E += 0.3 / (1 + turn / 40) * (wanted_E - found_E) / wanted_E.sqrt()
        gate.e_score_correction_bias.data.copy_(bias_E.clone())
        hook.remove()
    model.save_pretrained(path)


def counts(cluster: LocalCluster) -> tuple[dict[int, list[int]], list[int]]:
    """Rows by layer and expert over all workers, and by worker."""
    total: dict[int, list[int]] = {}
    by_worker = []
    for worker in cluster.ffns:
        mine = 0
        for layer, rows in worker.halves.rows_by_expert().items():
            total[layer] = [a + b for a, b in zip(total.get(layer, [0] * len(rows)), rows, strict=True)]
            mine += sum(rows)
        by_worker.append(mine)
    return total, by_worker


def per_layer(cluster: LocalCluster) -> dict[int, list[int]]:
    """Rows by layer and worker."""
    found: dict[int, list[int]] = {}
    for worker in cluster.ffns:
        for layer, rows in worker.halves.rows_by_expert().items():
            found.setdefault(layer, []).append(sum(rows))
    return found


def talk(cluster: LocalCluster, seed: int, num_prompts: int) -> None:
    """A batch of requests to their end."""
    chance = random.Random(seed)
    for _ in range(num_prompts):
        cluster.submit([chance.randrange(2, 380) for _ in range(PROMPT_TOKENS)], max_tokens=8, ignore_eos=True)
    cluster.run()


def quotient(loads: list[int]) -> float:
    """Largest over mean."""
    return max(loads) * len(loads) / sum(loads)


def run(path: Path, options: argparse.Namespace, seed: int, *, balanced: bool) -> dict[str, float]:
    """Largest over mean rows per shard in the second half of the traffic: over all layers, and of the worst layer."""
    shards = options.shards
    spec = wiring(path, "afd", dtype="float32", expert_groups=shards, cache={"numBlocks": 1024, "prefixCaching": False})
    with LocalCluster(spec, path) as cluster:
        config = cluster.facts.config
        talk(cluster, 2 * seed, options.prompts)
        first, before = counts(cluster)
        layers_before = per_layer(cluster)
        placement = ExpertPlacement.spread(config, shards)
        if balanced:
            policy = BalancePolicy(threshold=1.0, min_gain=0.0, min_rows=1, num_redundant=options.redundant)
            decided = decide(config, placement, first, policy)
            assert decided is not None, "nothing to balance"
            placement = decided
            cluster.rebalance(placement)
            cluster.settle(placement)
        talk(cluster, 2 * seed + 1, options.prompts)
        total, after = counts(cluster)
        second = since(total, first)
        layers = since(per_layer(cluster), layers_before)
        figures = {
            "max_over_mean": quotient([a - b for a, b in zip(after, before, strict=True)]),
            "worst_layer": max(quotient(loads) for loads in layers.values()),
            "hottest_expert_share": max(max(rows) / sum(rows) for rows in first.values()),
        }
        if balanced:
            figures["worst_layer_fitted"] = max(imbalance(rows, placement.groups[n], shards) for n, rows in first.items())
            figures["worst_layer_in_hindsight"] = max(
                imbalance(rows, balance(rows, shards, options.redundant), shards) for rows in second.values()
            )
        return figures


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--zipf", type=float, default=1.2)
    parser.add_argument("--redundant", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=96, help="in each half of the traffic")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, float]]] = {"equal runs": [], "balanced": []}
    with tempfile.TemporaryDirectory() as base:
        for seed in range(options.seeds):
            path = Path(base) / str(seed)
            write_model(path, options.zipf, seed)
            for name, balanced in (("equal runs", False), ("balanced", True)):
                figures = run(path, options, seed, balanced=balanced)
                found[name].append(figures)
                line = {"bench": "moe_balance", "placement": name, "seed": seed, "shards": options.shards, "zipf": options.zipf}
                print(json.dumps({**line, "redundant": options.redundant if balanced else 0, **figures}), flush=True)
    print(f"{'placement':<12}{'max/mean':>10}{'worst layer':>13}{'of all seeds':>14}")
    for name, lines in found.items():
        medians = [statistics.median(line[key] for line in lines) for key in ("max_over_mean", "worst_layer")]
        worst = max(line["worst_layer"] for line in lines)
        print(f"{name:<12}{medians[0]:>10.3f}{medians[1]:>13.3f}{worst:>14.3f}")


if __name__ == "__main__":
    main()
