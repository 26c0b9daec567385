"""Expert pools under change: copies, rebalancing while serving, lost workers, poisoned rows. Tokens never differ."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from antiphon.core.request import FinishReason
from antiphon.models.experts.placement import ExpertPlacement
from antiphon.testing import LocalCluster, wiring

EXPERTS = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    model = hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=101,
            max_position_embeddings=256,
            num_experts=EXPERTS,
            num_experts_per_tok=3,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=20,
        )
    ).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.dim() > 1 and "embed" not in name:
                tensor.mul_(4.0)
    path = tmp_path_factory.mktemp("pool")
    model.save_pretrained(path)
    return path


def prompts() -> list[list[int]]:
    chance = random.Random(1)
    return [[chance.randrange(101) for _ in range(n)] for n in (3, 20, 33, 7)]


def spec_of(checkpoint: Path, **counts: int) -> Any:
    return wiring(checkpoint, "afd", cache={"numBlocks": 64}, transport={"numUbatches": 2}, **counts)


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path) -> list[list[int]]:
    with LocalCluster(wiring(checkpoint, "monolith", cache={"numBlocks": 64}), checkpoint) as cluster:
        ids = [cluster.submit(p, max_tokens=24) for p in prompts()]
        cluster.run()
        return [cluster.outputs[i].token_ids for i in ids]


def placements(cluster: LocalCluster, num_groups: int) -> list[ExpertPlacement]:
    """Different ones, with and without copies."""
    chance = random.Random(9)
    config = cluster.facts.config
    return [
        ExpertPlacement.balanced(config, {n: [chance.random() ** 4 for _ in range(EXPERTS)] for n in range(3)}, num_groups, extra)
        for extra in (0, 2, 4, 8)
    ]


@pytest.mark.parametrize("slices", [1, 2])
def test_rebalancing_while_serving_changes_no_token(checkpoint: Path, undisturbed: list[list[int]], slices: int) -> None:
    with LocalCluster(spec_of(checkpoint, attention=2, ffn=slices, expert_groups=2), checkpoint) as cluster:
        ids = [cluster.submit(p, max_tokens=24, on=i % 2) for i, p in enumerate(prompts())]
        for placement in placements(cluster, 2):
            for _ in range(4):
                cluster.step()
            cluster.rebalance(placement)
            cluster.step()
            cluster.settle(placement)
            for worker in cluster.ffns:
                for number, bank in worker.halves.banks.items():
                    assert sorted(bank.held) == placement.held(bank.config, number, worker.halves.shard.expert_index)
        cluster.run()
        assert [cluster.outputs[i].token_ids for i in ids] == undisturbed
        assert not any(bank.num_late_loads for worker in cluster.ffns for bank in worker.halves.banks.values())


def test_attention_workers_may_switch_before_ffn_workers_hold_what_they_ask_for(
    checkpoint: Path, undisturbed: list[list[int]]
) -> None:
    with LocalCluster(spec_of(checkpoint, expert_groups=3), checkpoint) as cluster:
        ids = [cluster.submit(p, max_tokens=24) for p in prompts()]
        for placement in placements(cluster, 3):
            cluster.rebalance(placement)
            cluster.settle(ExpertPlacement.spread(cluster.facts.config, 3))
            for _ in range(5):
                cluster.step()
        cluster.run()
        assert [cluster.outputs[i].token_ids for i in ids] == undisturbed


def test_a_replica_killed_during_a_rebalance_loses_no_token(checkpoint: Path, undisturbed: list[list[int]]) -> None:
    with LocalCluster(spec_of(checkpoint, expert_groups=2, ffn_replicas=2), checkpoint) as cluster:
        ids = [cluster.submit(p, max_tokens=24) for p in prompts()]
        for _ in range(3):
            cluster.step()
        placement = placements(cluster, 2)[2]
        # One replica of each group has taken the new placement up, the other dies before it could.
        for worker in cluster.ffns[2:]:
            worker.halves.hold(placement)
        cluster.rebalance(placement)
        for worker in cluster.ffns[:2]:
            compute = worker.halves.compute

            def die(*args: Any, compute: Any = compute, worker: Any = worker) -> Any:
                worker.side.close()  # with the rows taken and no answer sent
                return compute(*args)

            worker.halves.compute = die  # type: ignore[method-assign]
        cluster.run()
        assert [cluster.outputs[i].token_ids for i in ids] == undisturbed
        assert cluster.generating[0].worker.afd.times.num_resent > 0


def test_rows_go_only_to_shards_that_hold_one_of_their_experts(checkpoint: Path) -> None:
    with LocalCluster(spec_of(checkpoint, expert_groups=4), checkpoint) as cluster:
        seen: list[int] = []
        for worker in cluster.ffns:
            compute = worker.halves.compute
            group = worker.halves.shard.expert_index

            def spy(number: int, rows: Any, ids: Any, weights: Any, compute: Any = compute, group: int = group) -> Any:
                owners = {e: (e * 4 // EXPERTS,) for e in range(EXPERTS)}
                for row in ids.tolist():
                    routed = [e for e in row if 0 <= e < EXPERTS]
                    seen.append(len(routed))
                    assert routed, "a row came for no routed expert"
                    assert all(group in owners[e] for e in routed)
                return compute(number, rows, ids, weights)

            worker.halves.compute = spy  # type: ignore[method-assign]
        cluster.generate(prompts()[1], max_tokens=5)
        assert sum(seen) == 3 * 3 * (20 + 4), "every choice of every row and layer was computed once"


def test_a_poisoned_request_ends_with_the_gate_s_name_and_harms_no_other(checkpoint: Path, undisturbed: list[list[int]]) -> None:
    with LocalCluster(spec_of(checkpoint, expert_groups=2), checkpoint) as cluster:
        embed = cluster.generating[0].worker.halves._embed_VD
        poisoned = next(t for t in range(101) if not any(t in p + out for p, out in zip(prompts(), undisturbed, strict=True)))
        kept = embed[poisoned].clone()
        embed[poisoned] = float("nan")
        bad = cluster.submit([5, poisoned, 7], max_tokens=4, request_id="bad")
        ids = [cluster.submit(p, max_tokens=24) for p in prompts()]
        cluster.run()
        assert cluster.outputs[bad].finish_reason is FinishReason.ERROR
        assert "the gate of model.layers.0" in str(cluster.outputs[bad].error)
        assert [cluster.outputs[i].token_ids for i in ids] == undisturbed
        embed[poisoned] = kept
        again = [cluster.submit(p, max_tokens=24) for p in prompts()]
        cluster.run()
        assert [cluster.outputs[i].token_ids for i in again] == undisturbed, "its blocks hold no NaN for those who get them next"


def strange_token(*texts: list[int]) -> int:
    return next(t for t in range(101) if not any(t in text for text in texts))


def test_a_prefill_worker_hands_over_no_kv_that_is_not_numbers(checkpoint: Path, undisturbed: list[list[int]]) -> None:
    scheduler = {"maxNumBatchedTokens": 16, "remotePrefillMinTokens": 8}  # several chunks a prompt
    with LocalCluster(wiring(checkpoint, "pd-afd", cache={"numBlocks": 64}, scheduler=scheduler), checkpoint) as cluster:
        decode, prefill = cluster.generating[0], cluster.prefilling[0]
        seen_nan: list[bool] = []
        load = decode.worker.cache.load

        def spy(layer: int, slots_T: torch.Tensor, data: torch.Tensor) -> None:
            seen_nan.append(bool(data.view(torch.float32).isnan().any()))
            load(layer, slots_T, data)

        decode.worker.cache.load = spy  # type: ignore[method-assign]
        broken = prompts()[2][15]
        prefill.worker.halves._embed_VD[broken] = float("nan")  # as a fault of that machine's memory would
        ids = [cluster.submit(p, max_tokens=24, prefill=0) for p in prompts()]
        cluster.run()
        assert [cluster.outputs[i].token_ids for i in ids] == undisturbed, "the decode worker computes it by itself"
        assert decode.engine.scheduler.stats.num_kv_failures >= 1
        decode.worker.halves._embed_VD[broken] = float("nan")
        bad = cluster.submit([5, *prompts()[2]], max_tokens=4, prefill=0)
        cluster.run()
        assert "the gate of model.layers.0" in str(cluster.outputs[bad].error)
        assert seen_nan
        assert not any(seen_nan)
        assert prefill.engine.scheduler.blocks.num_free_blocks == cluster.facts.num_blocks


def test_a_poisoned_prompt_is_refused_each_time_and_spoils_no_shared_prefix(checkpoint: Path) -> None:
    chance = random.Random(12)
    prefix = [chance.randrange(100) for _ in range(40)]
    spec = wiring(
        checkpoint, "afd", expert_groups=2, cache={"numBlocks": 64, "blockSizeTokens": 8}, scheduler={"maxNumBatchedTokens": 16}
    )
    with LocalCluster(spec, checkpoint) as cluster:
        expected = cluster.generate(prefix, max_tokens=24)
    poisoned = strange_token(prefix, expected)
    with LocalCluster(spec, checkpoint) as cluster:
        cluster.generating[0].worker.halves._embed_VD[poisoned] = float("nan")
        good = cluster.submit(prefix, max_tokens=24)
        for _ in range(6):
            cluster.step()  # past its prompt: whoever comes next takes its blocks as a prefix
        for _ in range(2):
            bad = cluster.submit([*prefix, poisoned, *prefix], max_tokens=4)
            early = cluster.submit([poisoned, *prefix], max_tokens=4)
            cluster.run()
            for request_id in (bad, early):
                assert cluster.outputs[request_id].finish_reason is FinishReason.ERROR
                assert "the gate of model.layers.0" in str(cluster.outputs[request_id].error)
                assert cluster.outputs[request_id].token_ids == []
        assert cluster.outputs[good].token_ids == expected
        assert cluster.generate(prefix, max_tokens=24) == expected, "its cached blocks are as they were"
