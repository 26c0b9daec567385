import asyncio
from pathlib import Path

import pytest

from antiphon.apps.tiers.model_pool import ModelPool, ModelPoolAsk
from antiphon.coe.tiers.policy import Load, Prefetch, Tier, TierExpert, TierLimits
from antiphon.coe.tiers.pool import TieredPool
from antiphon.core.errors import CheckpointInvalid, Unavailable
from antiphon.core.request import SamplingParams
from antiphon.testing import LocalCluster, wiring, write_tiny_llama

PROMPT = (5, 6, 7, 8)
ASK = ModelPoolAsk(token_ids=PROMPT, sampling=SamplingParams(max_tokens=4, temperature=0.0))


@pytest.fixture
def model_pool(tmp_path: Path):
    checkpoints = {name: write_tiny_llama(tmp_path / name, seed=i) for i, name in enumerate("abc")}
    specs = {name: wiring(path, "monolith", cache={"numBlocks": 64}) for name, path in checkpoints.items()}
    model_pool = ModelPool(specs, checkpoints, tmp_path / "host")
    yield model_pool
    model_pool.close()


async def test_three_models_share_room_for_two_and_answer_as_they_do_alone(model_pool: ModelPool, tmp_path: Path) -> None:
    alone = {}
    for name in "abc":
        with LocalCluster(wiring(tmp_path / name, "monolith", cache={"numBlocks": 64}), tmp_path / name) as cluster:
            alone[name] = tuple(cluster.generate(PROMPT, max_tokens=4))
    experts = [TierExpert(name=n, memory_bytes=1, host_bytes=1, fetch_s=0.1, load_s=0.1) for n in "abc"]
    limits = TierLimits(resident_bytes=2, host_bytes=1, fairness_window_s=5.0, max_group=4)
    async with TieredPool(experts, model_pool, model_pool, limits) as pool:
        for _ in range(2):
            answers = await asyncio.gather(*(pool.submit(name, ASK, 60.0) for name in "abcabc"))
            assert answers == [alone[name] for name in "abcabc"]
        assert len(model_pool.resident) == 2
        assert len(model_pool.copied) <= 1
        assert all(times.convert_s > 0 and times.ready_s > 0 for _, times in pool.stats().loads)


async def test_a_copy_in_host_memory_serves_when_the_disk_is_gone(model_pool: ModelPool, tmp_path: Path) -> None:
    await model_pool.prefetch(Prefetch(expert="a", drop=()), 60.0)
    (tmp_path / "a" / "model.safetensors").unlink()
    times = await model_pool.load(Load(expert="a", evict=(), from_tier=Tier.HOST), 60.0)
    assert times.read_s < times.total_s
    assert len((await model_pool.serve("a", [ASK], 60.0))[0]) == 4


async def test_a_checkpoint_that_is_gone_is_named_and_residents_stay(model_pool: ModelPool, tmp_path: Path) -> None:
    await model_pool.load(Load(expert="b", evict=(), from_tier=Tier.DISK), 60.0)
    for path in (tmp_path / "c").iterdir():
        path.unlink()
    with pytest.raises(CheckpointInvalid, match=r"config\.json"):
        await model_pool.load(Load(expert="c", evict=(), from_tier=Tier.DISK), 60.0)
    assert model_pool.resident == ("b",)
    with pytest.raises(Unavailable):
        await model_pool.serve("c", [ASK], 60.0)
