"""What the split does when a peer goes away or misbehaves, with real workers in one process."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from antiphon.connectors.headers import Header, Kind
from antiphon.core.errors import CorruptMessage, LayoutMismatch, PeerLost
from antiphon.core.ids import Epoch, FFNShard, WorkerId
from antiphon.core.request import FinishReason, RequestId
from antiphon.testing import LocalCluster, wiring
from antiphon.transport.base import Hello, Link
from antiphon.transport.loopback import loopback_pair

VOCAB = 101


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(4)
    path = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def prompts(num: int, length: int = 40) -> list[list[int]]:
    chance = random.Random(num)
    return [[chance.randrange(VOCAB) for _ in range(length)] for _ in range(num)]


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path) -> list[list[int]]:
    with LocalCluster(wiring(checkpoint, "monolith", cache={"numBlocks": 64}), checkpoint) as cluster:
        ids = [cluster.submit(p, max_tokens=20) for p in prompts(4)]
        cluster.run()
        return [cluster.outputs[i].token_ids for i in ids]


def links_of(cluster: LocalCluster, ffn: int) -> list[Link]:
    return list(cluster.ffns[ffn].side._links)


@pytest.mark.parametrize("after_exchanges", [0, 1, 2, 7, 20, 33])
def test_a_replica_takes_over_mid_layer_and_no_token_changes(
    checkpoint: Path, undisturbed: list[list[int]], after_exchanges: int
) -> None:
    spec = wiring(checkpoint, "afd", ffn_replicas=2, cache={"numBlocks": 64}, transport={"numUbatches": 2})
    with LocalCluster(spec, checkpoint) as cluster:
        answered = 0
        used = cluster.ffns[0]
        compute = used.halves.compute

        def dies_in_the_middle(layer: int, rows: torch.Tensor) -> torch.Tensor:
            nonlocal answered
            if answered == after_exchanges:
                for link in links_of(cluster, 0):
                    link.close()
            answered += 1
            return compute(layer, rows)

        used.halves.compute = dies_in_the_middle  # type: ignore[method-assign]
        ids = [cluster.submit(p, max_tokens=20) for p in prompts(4)]
        cluster.run()
        assert [cluster.outputs[i].token_ids for i in ids] == undisturbed
        assert cluster.generating[0].worker.afd.times.num_resent > 0
        assert cluster.ffns[1].stats.num_rows > 0


def test_a_lost_ffn_worker_that_comes_back_in_time_costs_no_token(checkpoint: Path, undisturbed: list[list[int]]) -> None:
    with LocalCluster(wiring(checkpoint, "afd", cache={"numBlocks": 64}), checkpoint) as cluster:
        ids = [cluster.submit(p, max_tokens=20) for p in prompts(4)]
        for _ in range(5):
            cluster.step()
        for link in links_of(cluster, 0):
            link.close()
        cluster.connect_ffn(0, 0)
        cluster.run()
        assert [cluster.outputs[i].token_ids for i in ids] == undisturbed


def test_an_ffn_that_stays_away_ends_the_requests_with_a_retryable_error_and_the_worker_lives(
    checkpoint: Path, undisturbed: list[list[int]]
) -> None:
    with LocalCluster(wiring(checkpoint, "afd", cache={"numBlocks": 64}), checkpoint) as cluster:
        ids = [cluster.submit(p, max_tokens=20) for p in prompts(4)]
        for _ in range(5):
            cluster.step()
        for link in links_of(cluster, 0):
            link.close()
        cluster.run()
        for request_id in ids:
            got = cluster.outputs[request_id]
            assert got.finish_reason is FinishReason.ERROR
            assert got.error is not None
            assert got.error.code == "peer_lost"
        assert cluster.generating[0].engine.scheduler.blocks.num_free_blocks == 64
        cluster.connect_ffn(0, 0)
        again = cluster.submit(prompts(4)[0], max_tokens=20)
        cluster.run()
        assert cluster.outputs[again].token_ids == undisturbed[0]


def test_ffn_workers_join_while_serving(checkpoint: Path, undisturbed: list[list[int]]) -> None:
    spec = wiring(checkpoint, "afd", attention=2, ffn_replicas=2, cache={"numBlocks": 64})
    with LocalCluster(spec, checkpoint) as cluster:
        ids = [cluster.submit(p, max_tokens=20, on=i % 2) for i, p in enumerate(prompts(4))]
        cluster.run()
        assert [cluster.outputs[i].token_ids for i in ids] == undisturbed
        assert all(ffn.stats.num_rows > 0 for ffn in cluster.ffns), "attention workers spread over replicas"


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_a_prefill_worker_lost_at_any_moment_is_made_up_for(checkpoint: Path, undisturbed: list[list[int]], steps: int) -> None:
    spec = wiring(checkpoint, "pd", cache={"numBlocks": 64}, scheduler={"maxNumBatchedTokens": 16, "remotePrefillMinTokens": 4})
    with LocalCluster(spec, checkpoint) as cluster:
        ids = [cluster.submit(p, max_tokens=20, prefill=0) for p in prompts(4)]
        for _ in range(steps):
            cluster.step()
        side = cluster.prefilling[0].prefill_side
        assert side is not None
        for peer in list(side._peers.values()):
            peer.link.close()
        cluster.run()
        assert [cluster.outputs[i].token_ids for i in ids] == undisturbed
        assert cluster.generating[0].engine.scheduler.blocks.num_free_blocks == 64
        for _ in range(50):
            cluster.step()
        assert cluster.prefilling[0].engine.scheduler.blocks.num_free_blocks == 64, "the prefill side leaks nothing"


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_an_abort_during_the_hand_off_frees_both_sides(checkpoint: Path, steps: int) -> None:
    spec = wiring(checkpoint, "pd", cache={"numBlocks": 64}, scheduler={"maxNumBatchedTokens": 16, "remotePrefillMinTokens": 4})
    with LocalCluster(spec, checkpoint) as cluster:
        request_id = cluster.submit(prompts(1, 200)[0], max_tokens=20, prefill=0)
        for _ in range(steps):
            cluster.step()
        cluster.generating[0].engine.abort(RequestId(request_id))
        cluster.run()
        for _ in range(50):
            cluster.step()
        assert cluster.outputs[request_id].finish_reason is FinishReason.ABORT
        for part in (*cluster.generating, *cluster.prefilling):
            assert part.engine.scheduler.blocks.num_free_blocks == 64
            assert part.engine.scheduler.num_running == 0


def test_a_zombie_s_late_answer_is_dropped(checkpoint: Path, undisturbed: list[list[int]]) -> None:
    with LocalCluster(wiring(checkpoint, "afd", ffn_replicas=2, cache={"numBlocks": 64}), checkpoint) as cluster:
        ids = [cluster.submit(p, max_tokens=20) for p in prompts(4)]
        for _ in range(3):
            cluster.step()
        link = links_of(cluster, 0)[0]
        slot = link.acquire()
        assert slot is not None
        slot.data.fill_(1)
        stale = Header(kind=Kind.F2A, epoch=0, step=4, layer=0, dtype=1, rows=4, num_bytes=4 * 32 * 4)
        link.commit(slot, stale.pack(), stale.num_bytes)
        cluster.run()
        assert [cluster.outputs[i].token_ids for i in ids] == undisturbed


@pytest.mark.parametrize(
    "damage",
    [
        lambda h: b"\0" * 64,
        lambda h: h[:8] + b"\xff" * 8 + h[16:],
        lambda h: h[:32] + b"\xff\xff\0\0" + h[36:],
        lambda h: Header(kind=Kind.A2F, epoch=1, layer=999, dtype=1, rows=1, num_bytes=128).pack(),
        lambda h: Header(kind=Kind.A2F, epoch=1, layer=0, dtype=9, rows=1, num_bytes=128).pack(),
        lambda h: Header(kind=Kind.A2F, epoch=1, layer=0, dtype=1, rows=7, num_bytes=128).pack(),
        lambda h: Header(kind=Kind.KV, epoch=1, layer=0, dtype=1, rows=1, num_bytes=128).pack(),
    ],
)
def test_an_ffn_worker_drops_a_peer_that_sends_nonsense_and_names_it(checkpoint: Path, damage: object) -> None:
    with LocalCluster(wiring(checkpoint, "afd", cache={"numBlocks": 64}), checkpoint) as cluster:
        layout = links_of(cluster, 0)[0]
        assert layout.peer == "test/attention/0"
        from antiphon.apps.process.wiring.sizes import afd_layout

        near, far = loopback_pair(
            Hello(
                worker_id=WorkerId("test/stranger/0"),
                epoch=Epoch(1),
                layout=afd_layout(cluster.facts, cluster.spec, FFNShard(), attention_end=True, ubatches=1),
            ),
            Hello(
                worker_id=WorkerId("test/ffn/0"),
                epoch=Epoch(1),
                layout=afd_layout(cluster.facts, cluster.spec, FFNShard(), attention_end=False, ubatches=1),
            ),
        )
        cluster.ffns[0].side.add_link(far)
        slot = near.acquire()
        assert slot is not None
        good = Header(kind=Kind.A2F, epoch=1, layer=0, dtype=1, rows=1, num_bytes=128).pack()
        near.commit(slot, damage(good), 128)  # type: ignore[operator]
        cluster.ffns[0].pump()
        error = cluster.ffns[0].side.refusals[-1]
        assert isinstance(error, CorruptMessage)
        assert error.peer == "test/stranger/0"
        with pytest.raises(PeerLost):
            near.poll()
        assert cluster.generate(prompts(1)[0], max_tokens=3)


def test_peers_of_another_model_or_revision_do_not_pair(checkpoint: Path) -> None:
    with LocalCluster(wiring(checkpoint, "afd", cache={"numBlocks": 64}), checkpoint) as cluster:
        from dataclasses import replace

        from antiphon.apps.process.wiring.sizes import afd_layout

        other = replace(cluster.facts, revision="another", fingerprint="ffff")
        with pytest.raises(LayoutMismatch, match=r"model .* revision another"):
            loopback_pair(
                Hello(
                    worker_id=WorkerId("a"),
                    epoch=Epoch(1),
                    layout=afd_layout(other, cluster.spec, FFNShard(), attention_end=True, ubatches=1),
                ),
                Hello(
                    worker_id=WorkerId("f"),
                    epoch=Epoch(1),
                    layout=afd_layout(cluster.facts, cluster.spec, FFNShard(), attention_end=False, ubatches=1),
                ),
            )
