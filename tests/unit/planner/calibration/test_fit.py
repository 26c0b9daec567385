"""Calibration predicts batches it has not seen, from noisy and from plain records."""

import json

import numpy as np
import pytest

from antiphon.core.errors import InvalidInput
from antiphon.planner.calibration.curves import fit_curve
from antiphon.planner.calibration.fit import Measurement, calibrate, read_measurements
from antiphon.planner.pipeline.ubatches import StageTimes, step_s

SEEN, HELD_OUT = (2, 4, 6, 12, 16, 24, 48, 96), frozenset({1, 8, 32, 64})
NUM_LAYERS = 30

# Seconds of a product of B rows with cold 576 x 1536 bf16 weights, as measured on two cores.
LINEAR_S = {1: 107e-6, 8: 101e-6, 32: 210e-6, 64: 337e-6, 256: 1118e-6}


def dense_stage(rows, context):
    """Weights are read in any case, then operations count; KV grows with the context."""
    attention = 60e-6 + max(40e-6, 1.5e-6 * rows) + 2e-9 * rows * context
    return attention, 30e-6 + max(110e-6, 4.5e-6 * rows)


def moe_stage(rows, context):
    """The batch touches more and more of 32 experts, four a row."""
    touched = 32 * (1 - (1 - 4 / 32) ** rows)
    return 80e-6 + 2e-6 * rows + 2e-9 * rows * context, 40e-6 + 9e-6 * touched + 2e-6 * rows


def measured(stage, wiring, noise, seed=0, num_ubatches=1):
    rng = np.random.default_rng(seed)
    points = []
    for batch in (*SEEN, *sorted(HELD_OUT)):
        rows = batch / num_ubatches
        attention, ffn = stage(rows, 192)
        transfer = 8e-6 + 4e-8 * rows
        head = 3e-3 + 1.5e-4 * batch
        times = StageTimes(attention_s=attention, a2f_s=transfer, ffn_s=ffn, f2a_s=transfer)
        layers = NUM_LAYERS * (attention + ffn) if wiring == "monolith" else step_s([(times, NUM_LAYERS)], num_ubatches)
        shake = rng.normal(1, noise, size=4)
        points.append(
            Measurement(
                model="tiny",
                wiring=wiring,
                batch=batch,
                context=192,
                decode_step_s=(layers + head) * shake[0],
                t_attention_s=attention * shake[1],
                t_ffn_s=ffn * shake[2],
                t_transfer_s=transfer * shake[3],
                num_layers=NUM_LAYERS,
                num_ubatches=num_ubatches,
                rows=rows,
            )
        )
    return points


@pytest.mark.parametrize("stage", [dense_stage, moe_stage])
@pytest.mark.parametrize(("wiring", "num_ubatches"), [("monolith", 1), ("1A1F", 2)])
@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_unseen_batches_are_predicted_within_fifteen_percent(stage, wiring, num_ubatches, noise):
    for seed in range(3):
        points = measured(stage, wiring, noise, seed, num_ubatches)
        _, comparisons = calibrate(points, HELD_OUT)
        unseen = [c for c in comparisons if c.held_out]
        assert {c.measurement.batch for c in unseen} == HELD_OUT
        assert max(abs(c.error) for c in unseen) < 0.15


def test_small_batches_that_stay_whole_are_fitted_with_those_that_are_cut():
    whole, cut = (measured(dense_stage, "1A1F", 0.01, num_ubatches=m) for m in (1, 2))
    points = [p for p in whole if p.batch <= 8] + [p for p in cut if p.batch > 8]
    fitted, comparisons = calibrate(points, HELD_OUT)
    assert len(fitted) == 1
    assert max(abs(c.error) for c in comparisons if c.held_out) < 0.15


def test_what_no_form_has_is_interpolated_between_measured_batches():
    """A kernel that works in tiles of 16 rows and has a faster path for up to 4."""
    seconds = {b: 1e-3 + 2e-5 * 16 * -(-b // 16) - (3e-4 if b <= 4 else 0) for b in (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)}
    curve = fit_curve([(b, 1, s) for b, s in seconds.items() if b not in HELD_OUT])
    for batch in HELD_OUT:
        assert curve(batch, 1) == pytest.approx(seconds[batch], rel=0.15)


def test_stages_that_add_up_predict_through_the_pipeline():
    fitted, _ = calibrate(measured(dense_stage, "1A1F", 0.0, num_ubatches=2), HELD_OUT)
    assert fitted[0].method == "stages"
    stages = fitted[0].stages(16, 192)
    assert stages.ffn_s == pytest.approx(dense_stage(16, 192)[1], rel=0.05)


def test_stages_that_do_not_add_up_leave_the_step_to_predict():
    import dataclasses

    points = [dataclasses.replace(p, t_attention_s=p.decode_step_s) for p in measured(dense_stage, "monolith", 0.0)]
    fitted, comparisons = calibrate(points, HELD_OUT)
    assert fitted[0].method == "step"
    assert fitted[0].stages(8, 192) is not None
    assert max(abs(c.error) for c in comparisons) < 0.15


def test_a_measured_product_is_fitted_by_a_knee():
    curve = fit_curve([(batch, 1, seconds) for batch, seconds in LINEAR_S.items()])
    for batch, seconds in LINEAR_S.items():
        assert curve(batch, 1) == pytest.approx(seconds, rel=0.1)


def test_context_and_rows_are_told_apart():
    points = [(b, c, 1e-3 + 1e-5 * b + 2e-8 * b * c) for b in (1, 4, 16, 64) for c in (128, 1024, 4096)]
    curve = fit_curve(points)
    assert curve(32, 2048) == pytest.approx(1e-3 + 1e-5 * 32 + 2e-8 * 32 * 2048, rel=0.01)


def test_coefficients_are_never_negative():
    curve = fit_curve([(1, 10, 5.0), (2, 10, 4.0), (4, 10, 3.0), (8, 10, 2.0)])
    assert min(curve.fixed_s, curve.per_row_s, curve.per_cached_token_s, curve.bend_s) >= 0


def test_too_few_batches_are_refused_by_name():
    points = [Measurement(model="m", wiring="1A1F", batch=b, context=9, decode_step_s=1.0) for b in (1, 2)]
    with pytest.raises(InvalidInput, match=r"m, 1A1F: .*3 batch sizes, has 2"):
        calibrate(points)


def test_records_are_read_and_other_lines_and_fields_skipped(tmp_path):
    file = tmp_path / "bench.jsonl"
    record = {
        "kind": "decode", "model": "smollm2-135m", "wiring": "1A1F", "batch": 8, "context": 192, "threads": 1,
        "decode_step_s": 0.0312, "t_attention_s": 2.1e-4, "t_ffn_s": 3.3e-4, "t_transfer_s": 1.2e-5, "rows": 4,
        "num_layers": 30, "num_ubatches": 2, "dtype": "bfloat16", "tokens_per_s": 256.4,
    }  # fmt: skip
    lines = [{"kind": "transport", "bytes": 4096, "round_trip_us": 3.0}, record]
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    (point,) = read_measurements(file)
    assert point == Measurement(
        model="smollm2-135m", wiring="1A1F", batch=8, context=192, decode_step_s=0.0312, t_attention_s=2.1e-4,
        t_ffn_s=3.3e-4, t_transfer_s=1.2e-5, num_layers=30, num_ubatches=2, rows=4, threads=1,
    )  # fmt: skip
    assert point.has_stages


@pytest.mark.parametrize(
    ("text", "wrong"),
    [("{", "line 1"), ("[1]", "no JSON object"), ('{"decode_step_s": 1}', "model"), ('{"a": 1}', "no decode measurement")],
)
def test_a_wrong_file_is_refused_with_its_line(tmp_path, text, wrong):
    (tmp_path / "b.jsonl").write_text(text)
    with pytest.raises(InvalidInput, match=wrong):
        read_measurements(tmp_path / "b.jsonl")
