"""Traces of several clocks land on one time line, in causal order."""

import json
import random

import pytest

from antiphon.telemetry.step_timeline import Exchange, align, chrome, tie
from antiphon.telemetry.step_trace import Event, Mark, StepTrace, WorkerTrace, load, save


class Clock:
    """Reads true time wrongly: an origin of its own, and a rate that is a little off."""

    def __init__(self, origin_s=0.0, drift=0.0):
        self.origin_s, self.drift = origin_s, drift

    def __call__(self, true_s):
        return self.origin_s + true_s * (1 + self.drift)


def simulated(clocks, *, num_exchanges=200, seed=0, spacing_s=1e-3):
    """Attention workers a0, a1 and FFN workers f0, f1, as far as they have clocks, linked as LINKS says."""
    chance = random.Random(seed)
    events = {name: [] for name in clocks}
    for number in range(num_exchanges):
        key = {"step": number, "layer": 0, "ubatch": 0}
        for a in (name for name in clocks if name.startswith("a")):
            sent = number * spacing_s + chance.random() * 1e-4
            received = sent
            for f in (far for near, far in LINKS if near == a and far in clocks):
                arrived = sent + 5e-6 + chance.random() * 4e-5
                start = arrived + chance.random() * 2e-5
                computed = start + 1e-4
                replied = computed + 2e-6
                received = max(received, replied + 5e-6 + chance.random() * 4e-5)
                far = clocks[f]
                events[f] += [
                    Event(mark=Mark.ROWS, start_s=far(arrived), end_s=far(computed), peer=a, rows=3, **key),
                    Event(mark=Mark.COMPUTE, start_s=far(start), end_s=far(replied), rows=3),
                ]
            own = clocks[a]
            events[a] += [
                Event(mark=Mark.STEP, start_s=own(sent - 1e-5), end_s=own(received + 1e-6), step=number),
                Event(mark=Mark.SEND, start_s=own(sent), end_s=own(sent + 1e-6), **key),
                Event(mark=Mark.RECEIVE, start_s=own(sent + 2e-6), end_s=own(received), **key),
            ]
    return [
        WorkerTrace(worker=name, role="attention" if name.startswith("a") else "ffn", pid=7, events=tuple(events[name]))
        for name in clocks
    ]


LINKS = (("a0", "f0"), ("a1", "f0"), ("a1", "f1"))


def test_an_offset_between_clocks_is_found_within_its_stated_uncertainty():
    traces = simulated({"a0": Clock(), "f0": Clock(origin_s=-1234.5)})
    found = align(traces)["f0"]
    assert found.uncertainty_s < 2e-5
    assert found.offset_s == pytest.approx(-1234.5, abs=found.uncertainty_s + 1e-9)


def test_a_drifting_clock_is_followed():
    drift = 5e-5  # 50 us a second: over this trace far more than the bounds leave open
    traces = simulated({"a0": Clock(), "f0": Clock(origin_s=88.0, drift=drift)}, num_exchanges=4000)
    found = align(traces)["f0"]
    assert found.drift == pytest.approx(drift, rel=0.2)
    for true_s in (0.0, 2.0, 4.0):
        assert found.to_reference(88.0 + true_s * (1 + drift)) == pytest.approx(true_s, abs=3e-5)


def test_workers_without_a_common_exchange_are_tied_through_others():
    traces = simulated({"a0": Clock(), "a1": Clock(origin_s=50.0), "f0": Clock(origin_s=-7.0), "f1": Clock(origin_s=900.0)})
    found = align(traces)
    for name, origin_s in (("a1", 50.0), ("f0", -7.0), ("f1", 900.0)):
        assert found[name].to_reference(origin_s + 0.1) == pytest.approx(0.1, abs=found[name].uncertainty_s + 1e-9)


def test_a_worker_that_nothing_ties_to_the_others_is_left_out_by_name():
    traces = simulated({"a0": Clock(), "f0": Clock(), "f1": Clock()})
    alone = WorkerTrace(worker="f1", role="ffn", pid=9, events=(Event(mark=Mark.COMPUTE, start_s=0.0, end_s=1.0),))
    drawn = chrome([*traces[:2], alone])
    assert drawn["otherData"]["left_out"] == ["f1"]
    assert set(drawn["otherData"]["clocks"]) == {"a0", "f0"}


@pytest.mark.parametrize("drift", [0.0, 2e-5])
def test_arrows_lead_from_attention_to_ffn_and_back_in_causal_order(drift):
    clocks = {"a0": Clock(), "a1": Clock(origin_s=1e4), "f0": Clock(origin_s=-31.0, drift=drift), "f1": Clock(origin_s=5.0)}
    drawn = json.loads(json.dumps(chrome(simulated(clocks, num_exchanges=300))))
    processes = {event["pid"]: event["args"]["name"] for event in drawn["traceEvents"] if event["name"] == "process_name"}
    arrows = {}
    for event in drawn["traceEvents"]:
        if event["ph"] in "stf":
            arrows.setdefault(event["id"], {})[event["ph"]] = event
    assert len(arrows) == 3 * 300
    for arrow in arrows.values():
        assert arrow["s"]["ts"] < arrow["t"]["ts"] < arrow["f"]["ts"]
        assert "attention" in processes[arrow["s"]["pid"]]
        assert "ffn" in processes[arrow["t"]["pid"]]
        assert arrow["s"]["pid"] == arrow["f"]["pid"]


def test_every_end_of_an_arrow_lies_within_a_slice_of_its_process():
    drawn = chrome(simulated({"a0": Clock(), "f0": Clock(origin_s=3.0)}, num_exchanges=20))
    slices = [event for event in drawn["traceEvents"] if event["ph"] == "X"]
    for event in drawn["traceEvents"]:
        if event["ph"] in "stf":
            own = [one for one in slices if one["pid"] == event["pid"]]
            assert any(one["ts"] <= event["ts"] <= one["ts"] + one["dur"] for one in own)


def test_clocks_without_a_common_exchange_are_refused():
    with pytest.raises(ValueError, match="common exchange"):
        tie([])


def test_one_exchange_bounds_the_offset_by_its_own_slack():
    found = tie([Exchange(sent_s=0.0, received_s=10.0, arrived_s=103.0, computed_s=105.0)])
    assert (found.offset_s, found.uncertainty_s) == (pytest.approx(99.0), pytest.approx(4.0))


def test_a_trace_survives_the_way_through_a_file(tmp_path):
    trace = StepTrace(capacity=3)
    for number in range(5):
        trace.add(Mark.ROWS, number, number + 0.5, step=number, layer=2, ubatch=1, rows=8, peer="m/attention/0")
    taken = trace.taken(worker="m/ffn/0", role="ffn")
    assert [event.step for event in taken.events] == [2, 3, 4]  # a ring: the oldest go
    save(taken, tmp_path / "steps", epoch=4)
    assert load(tmp_path / "steps") == [taken]


def test_a_file_that_is_no_trace_is_named(tmp_path):
    (tmp_path / "x.steps.json").write_text('{"worker": "w"}')
    with pytest.raises(ValueError, match=r"x\.steps\.json"):
        load(tmp_path)
