"""Whatever numbers, files and configs are given: one clear error of the tree, or a plan; never anything else."""

import contextlib
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from antiphon.cli.plan import app
from antiphon.core.errors import AntiphonError, InvalidInput
from antiphon.planner.calibration.fit import calibrate, read_measurements
from antiphon.planner.cost.config import shape_of
from antiphon.planner.cost.hardware import Catalogue
from antiphon.planner.cost.library import find_model, formats_of, read_model
from antiphon.planner.cost.model_cost import model_cost
from antiphon.planner.plan import make_plan
from antiphon.planner.question import Wishes, question
from antiphon.planner.traffic import Traffic

HUGE = 10**400
ODD = [math.inf, -math.inf, math.nan, 0, -1, 1e308, 5e-324, HUGE, True, None, "x", "1e999", [], {}, [[]], 2.5, "3"]
DEEP = "[" * 100_000
odd = st.sampled_from(ODD) | st.floats() | st.integers() | st.text(max_size=4)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("value", ["inf", "nan", "1e308", "-1", "0"])
@pytest.mark.parametrize("option", ["--rate", "--context", "--tpot-ms", "--ttft-ms", "--expert-skew", "--price"])
def test_a_number_out_of_bounds_is_one_error_that_names_its_option(option, value):
    result = run("deploy", "--model", "qwen3-32b", "--hardware", "H800", "--gpus", 8, option, value)
    if result.exit_code == 2:  # typer's own check
        assert option in result.stderr
        return
    assert isinstance(result.exception, InvalidInput), result.exception
    assert option.removeprefix("--").replace("-", "_") == result.exception.field


def test_an_infinite_rate_says_what_is_allowed():
    result = run("deploy", "--model", "deepseek-v3", "--hardware", "H800", "--rate", "inf")
    assert isinstance(result.exception, InvalidInput)
    assert str(result.exception) == "rate: must be from 1e-09 to 1e+09, is inf"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--trace", "x.csv", "--context", "5"], "context"),
        (["--prompt-tokens", "5", "--context", "5"], "context"),
        (["--output-tokens", "5"], "output_tokens"),
        (["--price", "2"], "price"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(options, field):
    result = run("deploy", "--model", "qwen3-32b", "--hardware", "H800", "--gpus", 8, *options)
    assert isinstance(result.exception, InvalidInput)
    assert result.exception.field == field


@given(st.dictionaries(st.sampled_from(["tpot_ms", "ttft_ms", "rate", "context", "expert_skew"]), st.floats(width=64)))
@settings(max_examples=60, deadline=None)
def test_any_wish_gives_a_plan_or_an_error_of_the_tree(wishes):
    with contextlib.suppress(AntiphonError):
        asked = question(Wishes(model="qwen3-32b", fleet=("H800",), gpu_budget=16, **wishes), Catalogue.built_in(), None, None)
        assert make_plan(asked.planner).reason


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("trace.jsonl", b'{"prompt_tokens": Infinity, "output_tokens": 1}'),
        ("trace.jsonl", b'{"prompt_tokens": 1e400, "output_tokens": 1}'),
        ("trace.jsonl", b'{"prompt_tokens": NaN, "output_tokens": 1}'),
        ("trace.jsonl", b'{"prompt_tokens": 1, "output_tokens": 1}\n[1]'),
        ("trace.jsonl", b'{"prompt_tokens": 1, "output_tokens": 1, "arrival_s": NaN}'),
        ("trace.jsonl", b'{"a": ' + DEEP.encode()),
        ("trace.csv", b"prompt_tokens,output_tokens\n\xff,1"),
        ("trace.csv", b"prompt_tokens,output_tokens\n1," + b"9" * 500),
        ("trace.csv", b"prompt_tokens,output_tokens\n1"),
    ],
)
def test_a_broken_trace_is_one_error_that_names_the_file(tmp_path, name, text):
    file = tmp_path / name
    file.write_bytes(text)
    with pytest.raises(InvalidInput, match=name):
        Traffic.from_trace(file)


@given(
    st.dictionaries(
        st.sampled_from(["batch", "context", "decode_step_s", "rows", "num_ubatches", "t_ffn_s", "threads", "model"]), odd
    )
)
@settings(max_examples=40, deadline=None)
def test_any_measurement_is_fitted_or_refused(tmp_path_factory, changed):
    plain = {"model": "m", "wiring": "1A1F", "batch": 1, "context": 10, "decode_step_s": 0.1}
    file = tmp_path_factory.mktemp("fuzz") / "bench.jsonl"
    lines = [{**plain, "batch": batch, "decode_step_s": 0.1 * batch} for batch in (1, 2, 4)] + [{**plain, **changed}]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    with contextlib.suppress(AntiphonError):  # anything else raises
        calibrate(read_measurements(file))


FIELDS = [
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
]
FIELDS += [
    "num_experts",
    "num_experts_per_tok",
    "layer_types",
    "attn_type_list",
    "moe_layers_enum",
    "mlp_only_layers",
    "sliding_window",
]
FIELDS += ["kv_lora_rank", "no_rope_layers", "attention_chunk_size", "no_rope_layer_interval", "quantization_config", "text_config"]
PLAIN = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 100,
    "layer_types": ["full_attention"] * 4,
}


@given(st.dictionaries(st.sampled_from(FIELDS), odd, max_size=3))
@settings(max_examples=300, deadline=None)
def test_any_config_has_a_shape_or_is_refused(changed):
    config = {**PLAIN, **changed}
    with contextlib.suppress(AntiphonError):
        shape = shape_of(config, "fuzz")
        assert model_cost(shape, formats_of(config), 100).decode.flops >= 0


def test_a_config_nested_too_deeply_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"a": ' + DEEP)
    with pytest.raises(AntiphonError, match=r"config\.json"):
        read_model(tmp_path)


@given(
    st.dictionaries(
        st.sampled_from(["flops", "memory_bytes", "bandwidth", "nic_bandwidth", "cards_per_node", "usd_per_hour", "title"]), odd
    )
)
@settings(max_examples=60, deadline=None)
def test_any_accelerator_is_taken_or_refused(changed):
    with contextlib.suppress(AntiphonError):
        card = Catalogue.built_in().extended({"H800": changed}).get("H800")
        model = find_model("qwen3-32b")
        asked = question(
            Wishes(model=model.name, fleet=(card.key,), gpu_budget=8), Catalogue.built_in().including(card), None, None
        )
        assert make_plan(asked.planner).reason


@pytest.mark.parametrize(
    "text",
    [
        b"\xff\xfe\x00",
        b"a: [",
        b"H800: {bandwidth: .inf}",
        b"1: {}",
        b"x: 2020-99-99",
        b"- 1",
        b"",
        b"H800: {nic_bandwidth: 1:30}",
        b"H800: {title: a}\nH800: {title: b}",
    ],
)
def test_a_broken_hardware_file_is_one_error(tmp_path, text):
    file = tmp_path / "cards.yaml"
    file.write_bytes(text)
    with pytest.raises(InvalidInput):
        Catalogue.built_in().with_file(file)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--duration-s", "inf"], "duration_s"),
        (["--failures", "inf"], "failures"),
        (["--rate", "500", "--duration-s", "1e7"], "duration_s"),
    ],
)
def test_a_simulation_without_end_is_refused(options, field):
    known = ["--rate", "1"] if "--rate" not in options else []
    result = run("simulate", "--model", "smollm2-135m", "--hardware", "H800", "--context", 100, *known, *options)
    assert isinstance(result.exception, InvalidInput), result.exception
    assert result.exception.field == field


def test_a_report_that_cannot_be_written_is_one_error(tmp_path):
    result = run("deploy", "--model", "qwen3-32b", "--hardware", "H800", "--gpus", 8, "--html", tmp_path)
    assert isinstance(result.exception, InvalidInput)
    assert result.exception.field == "html"
