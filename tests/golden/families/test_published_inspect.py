"""antiphon inspect on the published config of every family with states, windows or sparse attention, and of GLM.

The tensors are those that transformers would save for the config: names and shapes in a file's header, with no data behind it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers.core_model_loading import revert_weight_conversion
from typer.testing import CliRunner

from antiphon.cli.models.inspect import app

CONFIGS = Path(__file__).parents[2] / "unit/models/families/test_published.py"

# By name there: bytes of KV a token and of a state, from the sizes in their reports; in bf16, states in fp32 beside bf16 tails.
FAMILIES: dict[str, tuple[int, int]] = {
    "Gemma 2 2B": (26 * 2 * 4 * 256 * 2, 0),
    "gpt-oss-20b": (24 * 2 * 8 * 64 * 2, 0),
    "Step-3.7-Flash, the text of a published checkpoint": (45 * 2 * 8 * 128 * 2, 0),
    "DeepSeek-V3.2": (61 * (512 + 64 + 128) * 2, 0),
    "GLM-4.5": (92 * 2 * 8 * 128 * 2, 0),
    "GLM-4.5-Air": (46 * 2 * 8 * 128 * 2, 0),
    "GLM-4.7-Flash": (47 * (512 + 64) * 2, 0),
    "GLM-5": (78 * (512 + 64 + 128) * 2, 0),
    "Qwen3-Next-80B-A3B": (12 * 2 * 2 * 256 * 2, 36 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)),
    "Qwen3.5-35B-A3B": (10 * 2 * 2 * 256 * 2, 30 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)),
    "Kimi-Linear-48B-A3B": (7 * (512 + 64) * 2, 20 * (32 * 128 * 128 * 4 + 3 * 3 * 4096 * 2)),
    "LFM2-1.2B": (6 * 2 * 8 * 64 * 2, 10 * 2 * 2048 * 2),
}
MAX_FILE_BYTES = 4 * 2**30  # as published checkpoints are cut
PREDICTION: dict[str, dict[str, tuple[int, ...]]] = {  # some of the tensors that predict further tokens, by their published names
    "Step-3.7-Flash, the text of a published checkpoint": {
        "model.layers.45.eh_proj.weight": (4096, 8192),
        "model.layers.47.transformer.shared_head.output.weight": (128896, 4096),
    },
    "DeepSeek-V3.2": {
        "model.layers.61.eh_proj.weight": (7168, 14336),
        "model.layers.61.mlp.experts.0.up_proj.weight": (2048, 7168),
    },
    "GLM-4.5": {
        "model.layers.92.eh_proj.weight": (5120, 10240),
        "model.layers.92.shared_head.norm.weight": (5120,),
        "model.layers.92.mlp.experts.159.up_proj.weight": (1536, 5120),
    },
    "GLM-4.5-Air": {"model.layers.46.eh_proj.weight": (4096, 8192), "model.layers.46.embed_tokens.weight": (151552, 4096)},
    "Qwen3-Next-80B-A3B": {"mtp.fc.weight": (2048, 4096), "mtp.layers.0.mlp.experts.0.up_proj.weight": (512, 2048)},
    "Qwen3.5-35B-A3B": {"mtp.fc.weight": (2048, 4096), "mtp.layers.0.self_attn.o_proj.weight": (2048, 4096)},
}
EXPERTS = re.compile(r"(?<!shared_)experts\.(\d+\.|gate_up_proj|down_proj)|\.moe\.(gate|up|down)_proj\.")
SHARED = re.compile(r"shared_experts?\.(gate|up|down)_proj|share_expert\.")
KIMI_DENSE = re.compile(r"block_sparse_moe\.(gate|up|down)_proj")
DENSE = re.compile(r"(mlp|feed_forward)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.")


@pytest.fixture(scope="module")
def published() -> Mapping[str, Any]:
    spec = importlib.util.spec_from_file_location("published_configs", CONFIGS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: raw for name, (raw, _, _) in module.MODELS.items()}


def tensors_of(raw: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes as transformers saves them, nothing allocated."""
    made = getattr(hf, raw["architectures"][0])
    config = made.config_class(**{k: v for k, v in raw.items() if k not in ("architectures", "model_type", "quantization_config")})
    with torch.device("meta"):
        model = made(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, dict(model.state_dict())).items()}
    if config.get_text_config().tie_word_embeddings:
        del shapes["lm_head.weight"]
    if raw["architectures"] == ["KimiLinearForCausalLM"]:  # which transformers saves dense layers of under the experts' name
        shapes = {KIMI_DENSE.sub(r"mlp.\1_proj", name): shape for name, shape in shapes.items()}
    return {name: shape for name, shape in shapes.items() if name.startswith(("model.", "lm_head.")) and "vision" not in name}


def write_headers(path: Path, raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A checkpoint in files that are as long as their headers say, and have no data."""
    files: list[dict[str, Any]] = [{}]
    at = 0
    for name, shape in shapes.items():
        if at > MAX_FILE_BYTES:
            files.append({})
            at = 0
        end = at + 2 * math.prod(shape)
        files[-1][name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    for number, header in enumerate(files):
        text = json.dumps(header).encode()
        with (path / f"model-{number}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + max(entry["data_offsets"][1] for entry in header.values()))
    index = {name: f"model-{number}.safetensors" for number, header in enumerate(files) for name in header}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (path / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if key != "quantization_config"}))


def shown(output: str) -> dict[str, int]:
    """The numbers of the table by their label."""
    rows = re.findall(r"^ *(\S[^\d\n]*?) {2,}([\d,]+)", output, re.MULTILINE)
    return {label.strip(): int(number.replace(",", "")) for label, number in rows}


@pytest.mark.parametrize("name", FAMILIES)
def test_inspect_says_parameters_by_role_and_the_bytes_of_kv_and_state(
    published: Mapping[str, Any], name: str, tmp_path: Path
) -> None:
    raw, (kv_bytes, state_bytes) = published[name], FAMILIES[name]
    shapes, more = tensors_of(raw), PREDICTION.get(name, {})
    write_headers(tmp_path, raw, {**shapes, **more})
    result = CliRunner().invoke(app, [str(tmp_path), "--groups", "2"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    said = shown(result.output)
    roles = {"routed experts": EXPERTS, "shared experts": SHARED, "dense FFNs": DENSE}
    expected = dict.fromkeys(roles, 0)
    for each, shape in shapes.items():
        role = next((role for role, pattern in roles.items() if pattern.search(each)), None)
        if role is not None:
            expected[role] += math.prod(shape)
    assert {role: said.get(role, 0) for role in roles} == expected
    assert said["parameters"] == sum(map(math.prod, shapes.values()))
    assert said.get("multi-token prediction", 0) == sum(map(math.prod, more.values()))
    assert said["KV per token"] == kv_bytes
    assert said.get("state per sequence", 0) == state_bytes
