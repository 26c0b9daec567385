"""Qwen3-Embedding and Qwen3-Reranker, random, in halves or whole: their vectors and scores are transformers'."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from antiphon.core.request import Pooling
from antiphon.testing import LocalCluster, wiring

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 92,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 199,
    "max_position_embeddings": 256,
}
PROMPTS = [[(7 * i + i * i + start) % 190 + 3 for i in range(length)] for start, length in ((0, 70), (5, 1), (9, 33))]
WIRINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "monolith": ("monolith", {}),
    "1A2F": ("afd", {"ffn": 2}),
}


def vectors(
    checkpoint: Path, topology: str, counts: dict[str, Any], pooling: Pooling, task: str = "auto"
) -> list[tuple[float, ...]]:
    """Of the prompts, in chunks, once without and once with a prefix in the cache."""
    spec = wiring(checkpoint, topology, model={"task": task}, scheduler={"maxNumBatchedTokens": 32}, **counts)
    with LocalCluster(spec, checkpoint) as cluster:
        cluster.submit(PROMPTS[0], max_tokens=1, pooling=pooling)
        cluster.run()
        names = [cluster.submit(prompt, max_tokens=1, pooling=pooling) for prompt in PROMPTS]
        cluster.run()
        lasts = [cluster.outputs[name].last for name in names]
    assert lasts[0] is not None
    assert lasts[0].num_cached_tokens > 0
    assert all(last is not None and last.error is None and last.new_token_ids == () for last in lasts)
    return [last.vector for last in lasts if last is not None]


def close(found: Sequence[Sequence[float]], expected: Sequence[torch.Tensor]) -> bool:
    return all(torch.allclose(torch.tensor(f), e, atol=1e-5) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("bare", [False, True], ids=["names with a prefix", "names without"])
@pytest.mark.parametrize("name", WIRINGS)
def test_an_embedding_is_the_last_token_s_normalised(tmp_path: Path, name: str, bare: bool) -> None:
    """As Qwen3-Embedding is published: its modules.json asks for the last token; its tensors have no prefix and no head."""
    torch.manual_seed(0)
    model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**SHAPE, tie_word_embeddings=False)).eval()
    model.save_pretrained(tmp_path)
    if bare:
        tensors = load_file(tmp_path / "model.safetensors")
        bared = {key.removeprefix("model."): value for key, value in tensors.items() if not key.startswith("lm_head")}
        save_file(bared, tmp_path / "model.safetensors")
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}))
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    written = [{"idx": i, "path": path, "type": f"sentence_transformers.models.{kind}"} for i, (path, kind) in enumerate(modules)]
    (tmp_path / "modules.json").write_text(json.dumps(written))
    with torch.inference_mode():
        hidden = [model.model(torch.tensor([prompt])).last_hidden_state[0, -1] for prompt in PROMPTS]
    topology, counts = WIRINGS[name]
    found = vectors(tmp_path, topology, counts, Pooling(kind="embed"))
    assert close(found, [torch.nn.functional.normalize(x, dim=0) for x in hidden])


@pytest.mark.parametrize("name", WIRINGS)
def test_a_ranker_without_classes_gives_the_logits_of_the_tokens_asked_for(tmp_path: Path, name: str) -> None:
    torch.manual_seed(1)
    model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**SHAPE, tie_word_embeddings=True)).eval()
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        logits = [model(torch.tensor([prompt])).logits[0, -1, [17, 4]] for prompt in PROMPTS]
    topology, counts = WIRINGS[name]
    assert close(vectors(tmp_path, topology, counts, Pooling(kind="score", token_ids=(17, 4)), task="rerank"), logits)


@pytest.mark.parametrize("num_labels", [1, 2])
def test_a_ranker_with_classes_gives_theirs(tmp_path: Path, num_labels: int) -> None:
    torch.manual_seed(2)
    config = hf.Qwen3Config(**SHAPE, num_labels=num_labels, pad_token_id=0)
    model = hf.Qwen3ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        logits = [model(torch.tensor([prompt])).logits[0] for prompt in PROMPTS]
    assert close(vectors(tmp_path, "monolith", {}, Pooling(kind="score")), logits)


def test_a_model_refuses_what_it_is_not_for(tmp_path: Path) -> None:
    hf.Qwen3ForCausalLM(hf.Qwen3Config(**SHAPE)).save_pretrained(tmp_path)
    for task, wrong in (("generate", Pooling(kind="embed")), ("embed", None), ("embed", Pooling(kind="score", token_ids=(1,)))):
        with LocalCluster(wiring(tmp_path, "monolith", model={"task": task}), tmp_path) as cluster:
            name = cluster.submit(PROMPTS[1], max_tokens=1, pooling=wrong)
            cluster.run()
            error = cluster.outputs[name].error
        assert error is not None
        assert error.code == "invalid_value"
