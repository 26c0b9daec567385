"""The bench against real worker processes, and what it makes of their figures."""

import json

import pytest

from antiphon.apps.bench.engine import BenchDeployment
from antiphon.apps.bench.pictures import draw
from antiphon.apps.bench.setup import BenchSetup
from antiphon.core.errors import InvalidInput
from antiphon.core.ids import Role
from antiphon.testing import write_tiny_llama

NUM_LAYERS = 2


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """One real 1A1F run: its lines, and its time line."""
    checkpoint = write_tiny_llama(tmp_path_factory.mktemp("tiny"))
    setup = BenchSetup(uri=str(checkpoint), wiring="1A1F", dtype="float32", max_model_len=256, trace_steps=True, num_ubatches=2)
    with BenchDeployment(setup) as deployment:
        lines = [deployment.decode(4, num_prompt=16, num_generated=200), deployment.prefill(64, repeats=1)]
    return lines, json.loads(json.dumps(deployment.timeline()))


@pytest.mark.cluster
def test_a_line_has_the_stages_of_both_sides(traced):
    (decode, prefill), _ = traced
    assert decode["num_layers"] == NUM_LAYERS
    assert decode["num_ubatches"] in (1, 2)
    assert decode["ffn_hidden"] in (0.0, 1.0)
    assert 0 < decode["ffn_rows_per_batch"] <= 4
    for share in ("bubble_share", "ffn_bubble_share", "busier_bubble_share", "sample_share", "head_share", "schedule_share"):
        assert 0 <= decode[share] < 1, share
    # A step holds all of its exchanges' attention work, and the batch comes once a step.
    assert decode["t_attention_s"] * decode["exchanges_per_step"] < decode["decode_step_s"]
    assert decode["decode_step_s"] == pytest.approx(4 / decode["tokens_per_s"])
    assert prefill["tokens_per_s"] == pytest.approx(64 / prefill["ttft_s"])


@pytest.mark.cluster
def test_a_trace_shows_ubatches_crossing_between_both_processes_in_causal_order(traced):
    _, timeline = traced
    events = timeline["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert len(names) == 2
    assert timeline["otherData"]["left_out"] == []
    pid = {role: next(pid for pid, name in names.items() if f"({role.value}," in name) for role in (Role.ATTENTION, Role.FFN)}
    arrows = {}
    for event in events:
        if event["ph"] in ("s", "t", "f"):
            arrows.setdefault(event["id"], {})[event["ph"]] = event
    assert len(arrows) > 100 * NUM_LAYERS
    for arrow in arrows.values():
        assert arrow["s"]["pid"] == arrow["f"]["pid"] == pid[Role.ATTENTION]
        assert arrow["t"]["pid"] == pid[Role.FFN]
        assert arrow["s"]["ts"] <= arrow["t"]["ts"] <= arrow["f"]["ts"]
    assert {event["args"]["ubatch"] for event in events if event["ph"] == "X" and event["cat"] == "compute"} == {0}
    assert {event["args"]["layer"] for event in events if event["ph"] == "X" and event["cat"] == "attend"} == set(range(NUM_LAYERS))


@pytest.mark.cluster
def test_the_time_line_says_how_well_its_clocks_are_known(traced):
    _, timeline = traced
    clocks = timeline["otherData"]["clocks"]
    assert len(clocks) == 2
    assert max(clock["uncertainty_us"] for clock in clocks.values()) < 10_000


def test_tracing_reaches_every_pool_and_nothing_else_does(tmp_path):
    plain = BenchSetup(uri="m", wiring="P/D+2A1F").document()
    assert all(pool.env == {} for pool in plain.spec.pools)
    assert {pool.role: pool.replicas for pool in plain.spec.pools} == {"prefill": 1, "attention": 2, "ffn": 1}


def test_processors_are_dealt_out_without_overlap():
    pools = BenchSetup(uri="m", wiring="1A1F", cores=(4, 5, 6, 7)).document().spec.pools
    assert [list(pool.cores) for pool in pools] == [[4, 5], [6, 7]]
    assert [pool.num_threads for pool in pools] == [2, 2]


def test_workers_of_a_shared_wiring_each_have_all_processors_and_begin_with_their_own():
    setup = BenchSetup(uri="m", wiring="1A1F@shared", cores=(4, 5, 6, 7))
    pools = setup.document().spec.pools
    assert [list(pool.cores) for pool in pools] == [[4, 5, 6, 7], [6, 7, 4, 5]]
    assert [pool.num_threads for pool in pools] == [4, 4]
    assert setup.document().spec.shared_cores == {4, 5, 6, 7}


def test_an_unknown_wiring_is_refused_with_the_known_ones():
    with pytest.raises(InvalidInput, match="monolith, P/D, xAyF"):
        BenchSetup(uri="m", wiring="A1F1").document()


LINES = [
    {"bench": "link", "transport": "shm", "num_bytes": size, "mode": "in-place", "median_us": 2.0, "p99_us": 5.0}
    for size in (4096, 65_536)
] + [
    {"bench": "decode", "wiring": "1A1F", "dtype": "bfloat16", "batch": batch, "tokens_per_s": 100.0 * batch, "bubble_share": 0.1,
     "t_attention_s": 1e-4, "t_ffn_s": 2e-4, "t_transfer_s": 1e-5}
    for batch in (1, 8)
] + [
    {"bench": "prefill", "wiring": "monolith", "dtype": "bfloat16", "num_prompt": 128, "tokens_per_s": 900.0},
    {"bench": "mixed", "wiring": "monolith", "dtype": "bfloat16", "rate_per_s": 2.0, "ttft_p50_s": 0.1, "ttft_p90_s": 0.2,
     "ttft_p99_s": None},
]  # fmt: skip


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_every_kind_of_line_gets_a_panel(tmp_path, ending):
    path = tmp_path / f"bench.{ending}"
    draw(LINES, path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    if ending == "svg":
        text = content.decode()
        assert all(f"<!-- {title} -->" in text for title in ("links", "decode", "stages", "prefill", "mixed load"))


def test_a_picture_of_nothing_or_in_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="nothing was measured"):
        draw([], tmp_path / "x.png")
    with pytest.raises(InvalidInput, match="xyz"):
        draw(LINES, tmp_path / "x.xyz")
