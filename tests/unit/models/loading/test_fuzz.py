"""Whatever stands in a checkpoint's files, what is raised is of our own tree of errors."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from antiphon.core.errors import AntiphonError
from antiphon.gateway.text.templates.chat_template import ChatTemplate
from antiphon.gateway.text.tokenizer import TextModel
from antiphon.models.families import describe
from antiphon.models.loading.checkpoint import Checkpoint

ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([0, -1, 10**400, "1e999", 1e308]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


def raw_of(name: str) -> dict[str, Any]:
    config = {
        "Llama": transformers.LlamaConfig,
        "Qwen3Moe": transformers.Qwen3MoeConfig,
        "DeepseekV3": transformers.DeepseekV3Config,
        "Gemma3": transformers.Gemma3TextConfig,
    }[name](num_hidden_layers=2)
    return {**config.to_dict(), "architectures": [f"{name}ForCausalLM"]}


RAW = {name: raw_of(name) for name in ("Llama", "Qwen3Moe", "DeepseekV3", "Gemma3")}


@pytest.mark.parametrize("name", RAW)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_config_raises_anything_else(name: str, data: st.DataObject) -> None:
    raw = copy.deepcopy(RAW[name])
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.sampled_from([*sorted(raw), "rope_scaling", "rope_parameters", "layer_types"]))] = data.draw(ODD)
    try:
        describe(raw)
    except AntiphonError:  # anything else raises
        return


@pytest.mark.parametrize(("name", "field"), [("Llama", "head_dim"), ("DeepseekV3", "qk_rope_head_dim"), ("Gemma3", "head_dim")])
@pytest.mark.parametrize("number", [10**8, 2**62])
def test_a_number_of_a_config_fills_no_memory(name: str, field: str, number: int) -> None:
    with pytest.raises(AntiphonError, match="rotated dimensions"):
        describe({**RAW[name], field: number})


FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json", "chat_template.jinja")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(FILES), st.binary(max_size=60) | ODD.map(lambda value: json.dumps(value).encode()))
def test_no_file_of_a_tokenizer_raises_anything_else(name: str, data: bytes) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        Tokenizer(models.BPE({"a": 0, "b": 1}, [])).save(str(directory / "tokenizer.json"))
        (directory / name).write_bytes(data)
        try:
            TextModel.load(directory).encode("ab")
        except AntiphonError:  # anything else raises
            return


PARTS = [
    "{{ ",
    " }}",
    "{% ",
    " %}",
    "messages",
    "[0]",
    ".content",
    "length",
    "if",
    "endif",
    "for",
    "x",
    " in ",
    "é",
    "'",
    "+",
    "1",
    "/0",
    "**",
    "endfor",
    "{#",
]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([*PARTS, "|"]), max_size=14).map("".join))
def test_no_template_raises_anything_else(source: str) -> None:
    try:
        template = ChatTemplate(source, {})
        template.render([{"role": "user", "content": "a"}], add_generation_prompt=True, variables={})
    except AntiphonError:  # anything else raises
        return


def test_no_damage_to_a_checkpoint_raises_anything_else(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4, 4), "b": torch.ones(3, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    whole = (tmp_path / "model.safetensors").read_bytes()
    for place in range(min(len(whole), 220)):
        for value in (0, 34, 91, 255):
            (tmp_path / "model.safetensors").write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            try:
                with Checkpoint.open(tmp_path) as checkpoint:
                    for name in checkpoint.names:
                        checkpoint.tensor(name)
            except AntiphonError:  # anything else raises
                continue
