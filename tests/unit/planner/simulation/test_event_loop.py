"""The discrete-event loop against arithmetic: queues, batches, failures, stragglers."""

import random

import pytest

from antiphon.planner.simulation.decode_group import Request
from antiphon.planner.simulation.event_loop import EventLoop, Fault, Service

STEP_S = 0.02


def service(prefill_s=0.1, transfer_s=0.01, step_s=STEP_S):
    return Service(prefill_s=lambda prompt: prefill_s, transfer_s=lambda prompt: transfer_s, step_s=lambda r, t: step_s)


def run(requests, *, until_s=1e6, num_prefill=1, num_groups=1, workers=1, slots=100, served=None, faults=()):
    loop = EventLoop(
        requests,
        num_prefill=num_prefill,
        num_groups=num_groups,
        workers_per_group=workers,
        slots_per_worker=slots,
        service=served or service(),
        faults=faults,
        until_s=until_s,
    )
    loop.run()
    return loop


def request(index=0, arrival_s=0.0, prompt=10, output=5):
    return Request(index=index, prompt=prompt, output=output, arrival_s=arrival_s)


def test_one_request_takes_its_prefill_its_transfer_and_its_steps():
    alone = request()
    run([alone])
    assert alone.first_s == pytest.approx(0.1 + 0.01 + STEP_S)
    assert alone.finish_s == pytest.approx(0.1 + 0.01 + 5 * STEP_S)


def test_a_request_that_arrives_during_a_step_joins_at_the_next_boundary():
    first, second = request(0, output=50), request(1, arrival_s=0.005, output=3)
    run([first, second], num_prefill=2)
    start = 0.11
    assert second.first_s == pytest.approx(start + 2 * STEP_S)  # ready at 0.115, in the step that starts at 0.13
    assert second.finish_s == pytest.approx(start + 4 * STEP_S)
    assert first.finish_s == pytest.approx(start + 50 * STEP_S)


def test_requests_beyond_the_slots_wait_for_one():
    requests = [request(i, output=10) for i in range(3)]
    run(requests, num_prefill=3, slots=1)
    ends = sorted(r.finish_s for r in requests)
    assert ends == pytest.approx([0.11 + 0.2, 0.11 + 0.4, 0.11 + 0.6])


def test_step_times_follow_the_fullest_worker():
    seen = []

    def step_s(rows, tokens):
        seen.append((rows, tokens))
        return STEP_S

    requests = [request(0, prompt=1000, output=30), request(1, prompt=10, output=30)]
    steady = Service(prefill_s=lambda prompt: 0.1, transfer_s=lambda prompt: 0.0, step_s=step_s)
    run(requests, num_prefill=2, workers=2, served=steady)
    assert max(tokens for _, tokens in seen) >= 1000
    assert all(rows == 1 for rows, _ in seen)


def test_the_prefill_queue_waits_as_long_as_queueing_theory_says():
    """M/D/1: the mean wait is rho s / (2 (1 - rho)) (Pollaczek-Khinchine)."""
    rng, at_s, requests = random.Random(5), 0.0, []
    for index in range(20_000):
        at_s += rng.expovariate(7.0)
        requests.append(request(index, arrival_s=at_s, output=1))
    run(requests, served=service(prefill_s=0.1, transfer_s=0.0, step_s=1e-6), slots=10_000)
    waits = [r.finish_s - r.arrival_s - 0.1 for r in requests]
    assert sum(waits) / len(waits) == pytest.approx(0.7 * 0.1 / (2 * 0.3), rel=0.08)


def test_the_mean_batch_obeys_littles_law():
    rng, at_s, requests = random.Random(6), 0.0, []
    while at_s < 500:
        at_s += rng.expovariate(20.0)
        requests.append(request(len(requests), arrival_s=at_s, output=100))
    loop = run(requests, num_prefill=10, num_groups=2, workers=2, until_s=500)
    assert loop.mean_batch() == pytest.approx(20 * 100 * STEP_S / 4, rel=0.05)


def test_a_lost_attention_worker_costs_a_second_prefill_and_no_token():
    alone = request(output=100)
    loop = run([alone], faults=[Fault(at_s=0.5, pool="attention", duration_s=1.0)])
    emitted = int((0.5 - 0.11) / STEP_S)
    assert loop.num_reprefilled == 1
    assert alone.emitted == emitted
    assert alone.first_s == pytest.approx(0.13)  # the tokens already sent stay sent
    # Prefilled again by 0.6, back when the worker is, at 1.5, with what was left to do.
    assert alone.finish_s == pytest.approx(1.5 + (100 - emitted) * STEP_S)


def test_another_worker_takes_over_at_once():
    alone = request(output=100)
    run([alone], workers=2, faults=[Fault(at_s=0.5, pool="attention", duration_s=100.0, worker=0)])
    emitted = int((0.5 - 0.11) / STEP_S)
    assert alone.finish_s == pytest.approx(0.5 + 0.11 + (100 - emitted) * STEP_S, abs=STEP_S)


def test_a_lost_ffn_shard_delays_its_group_and_loses_nothing():
    alone = request(output=100)
    loop = run([alone], faults=[Fault(at_s=0.5, pool="ffn", duration_s=2.0)])
    assert loop.num_reprefilled == 0
    assert alone.finish_s == pytest.approx(0.11 + 100 * STEP_S + 2.0, abs=STEP_S)


def test_a_lost_prefill_instance_gives_its_prompt_to_another():
    alone = request()
    run([alone], num_prefill=2, faults=[Fault(at_s=0.05, pool="prefill", duration_s=50.0, worker=1)])
    assert alone.finish_s == pytest.approx(0.05 + 0.1 + 0.01 + 5 * STEP_S)


def test_a_straggler_slows_its_group_while_it_lasts():
    alone = request(output=1000)
    run([alone], faults=[Fault(at_s=1.11, pool="slow", duration_s=4.0, factor=2.0)])
    assert alone.finish_s == pytest.approx(0.11 + 1000 * STEP_S + 2.0, abs=3 * STEP_S)


def test_every_request_finishes_under_a_storm_of_faults():
    rng = random.Random(9)
    requests = [request(i, arrival_s=i * 0.05, prompt=rng.randint(1, 99), output=rng.randint(1, 60)) for i in range(400)]
    faults = [
        Fault(at_s=rng.uniform(0, 30), pool=rng.choice(["attention", "ffn", "prefill", "slow"]), duration_s=rng.uniform(0, 3),
              group=rng.randrange(3), worker=rng.randrange(4), factor=1.5)
        for _ in range(60)
    ]  # fmt: skip
    run(requests, num_prefill=4, num_groups=3, workers=4, slots=4, faults=sorted(faults, key=lambda f: f.at_s))
    assert all(r.finish_s >= r.first_s > r.arrival_s for r in requests)
