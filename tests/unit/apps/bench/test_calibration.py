"""Calibration: losses equal to transformers', thresholds that keep what they promise, served."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import transformers as hf
from typer.testing import CliRunner

from antiphon.apps.bench.calibration import CalibratedModel, read_calibration
from antiphon.cli.models.experts import app
from antiphon.core.errors import InvalidInput
from antiphon.models.experts.skipping import ExpertSkipping
from antiphon.testing import LocalCluster, wiring, write_tiny_moe


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_moe(tmp_path_factory.mktemp("moe") / "model", seed=4)


@pytest.fixture(scope="module")
def own_words(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the model itself says: its loss there is low, and rises when it is not itself."""
    path = tmp_path_factory.mktemp("words") / "calibration.jsonl"
    with LocalCluster(wiring(checkpoint, "monolith", cache={"numBlocks": 64}), checkpoint) as cluster:
        starts = [[3 + n, 50, 9 * n] for n in range(4)]
        words = [start + cluster.generate(start, max_tokens=60, ignore_eos=True) for start in starts]
    path.write_text("\n".join(json.dumps({"token_ids": each}) for each in words))
    return path


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "calibration.jsonl"
    chance = random.Random(2)
    lines = [{"token_ids": [chance.randrange(384) for _ in range(n)]} for n in (2, 40, 17, 90, 64)]
    lines += [{"text": "to bind them all"}, {"messages": [{"role": "user", "content": "one ring"}]}]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return path


def test_the_loss_is_that_of_transformers(checkpoint: Path, calibration: Path) -> None:
    texts = read_calibration(calibration, checkpoint, max_tokens=10_000, max_len=80)
    assert [len(text) for text in texts[:5]] == [2, 40, 17, 80, 64]
    model = hf.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        sums = [float(model(torch.tensor([text]), labels=torch.tensor([text])).loss) * (len(text) - 1) for text in texts]
    measured = CalibratedModel(checkpoint, texts, dtype="float32")
    assert measured.num_predicted == sum(len(text) - 1 for text in texts)
    loss, share = measured.measure(None)
    assert loss == pytest.approx(sum(sums) / measured.num_predicted, abs=1e-4)
    assert share == 0.0


def test_skipping_all_but_the_best_expert_equals_a_model_with_one_expert_a_row(checkpoint: Path, tmp_path: Path) -> None:
    chance = random.Random(5)
    text = tuple(chance.randrange(384) for _ in range(60))
    measured = CalibratedModel(checkpoint, [text], dtype="float32")
    skipping = ExpertSkipping(importance={0: 1.0, 1: 1.0}, threshold=1.0)
    loss, share = measured.measure(skipping)
    assert share == 0.5, "two are chosen, the better one stays"
    # The weight of the one that stays is what it was among two: transformers' experts are computed by hand.
    model = hf.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for layer in model.model.layers:
        block = layer.mlp

        def forward(hidden: torch.Tensor, block: torch.nn.Module = block) -> torch.Tensor:
            rows = hidden.view(-1, hidden.shape[-1])
            scores = torch.softmax(rows @ block.gate.weight.T, dim=-1)
            best, ids = scores.topk(2, dim=-1)
            kept = (best / best.sum(dim=-1, keepdim=True))[:, 0]
            out = torch.zeros_like(rows)
            for i, expert in enumerate(ids[:, 0].tolist()):
                gate, up = (rows[i] @ block.experts.gate_up_proj[expert].T).chunk(2)
                out[i] = kept[i] * ((torch.nn.functional.silu(gate) * up) @ block.experts.down_proj[expert].T)
            return out.view(hidden.shape)

        block.forward = forward
    with torch.inference_mode():
        expected = float(model(torch.tensor([text]), labels=torch.tensor([text])).loss)
    assert loss == pytest.approx(expected, abs=1e-4)


def test_the_command_finds_thresholds_that_serving_takes(checkpoint: Path, own_words: Path, tmp_path: Path) -> None:
    out = tmp_path / "skip.json"
    args = ["skip", str(checkpoint), "--calibration", str(own_words), "--out", str(out), "--allow", "0.2", "--dtype", "float32"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    texts = read_calibration(own_words, checkpoint, max_tokens=20_000, max_len=512)
    measured = CalibratedModel(checkpoint, texts, dtype="float32")
    found = ExpertSkipping.load(out, measured.config)
    assert 0.0 < found.skipped_share < 0.5
    loss, share = measured.measure(found)
    assert loss - measured.measure(None)[0] == pytest.approx(found.loss_rise, abs=1e-6)
    assert found.loss_rise <= 0.2
    assert share == pytest.approx(found.skipped_share)
    with LocalCluster(wiring(checkpoint, "afd", expert_groups=2, experts={"skipFile": str(out)}), checkpoint) as cluster:
        cluster.generate(list(range(3, 60)), max_tokens=8)
        assert 0.0 < cluster.generating[0].worker.halves.skipped_share < 0.5


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object"),
        ('{"token_ids": ["a"]}', "token_ids are not token ids"),
        ('{"text": 3}', "text is not"),
    ],
)
def test_a_line_that_is_no_text_is_refused_by_its_number(checkpoint: Path, tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "calibration.jsonl"
    path.write_text('{"token_ids": [1, 2]}\n' + line + "\n")
    with pytest.raises(InvalidInput, match=rf"line 2: {why}"):
        read_calibration(path, checkpoint, max_tokens=100, max_len=100)


def test_a_file_without_texts_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "calibration.jsonl"
    path.write_text('{"token_ids": [1]}\n')
    with pytest.raises(InvalidInput, match="holds no text of two tokens"):
        read_calibration(path, checkpoint, max_tokens=100, max_len=100)
