from pathlib import Path

import numpy as np
import pytest

from antiphon.coe.routing.assets import ENCODER, VOCABULARY, resolve
from antiphon.coe.routing.encoder import SentenceEncoder
from antiphon.coe.routing.wordpiece import WordPiece
from antiphon.coe.training.encoders.encoder_graph import served_graph
from antiphon.coe.training.encoders.sentences import encode_sentences, served_encoder
from antiphon.core.errors import CheckpointInvalid

TEXTS = ["What is the capital of France?", "Sort a list of numbers in Python.", "x", "die Katze schläft " * 40]


@pytest.fixture(scope="module")
def published() -> Path:
    try:
        return resolve(ENCODER, fetch=False)
    except CheckpointInvalid:
        pytest.skip("the sentence encoder is not on this machine")


@pytest.fixture(scope="module")
def tokens() -> WordPiece:
    try:
        return WordPiece.from_file(resolve(VOCABULARY, fetch=False))
    except CheckpointInvalid:
        pytest.skip("the vocabulary is not on this machine")


def test_a_file_that_is_no_model_is_refused() -> None:
    pytest.importorskip("onnx")
    with pytest.raises(CheckpointInvalid, match="no ONNX model"):
        served_graph(b"\xff" * 64)


def test_a_model_of_another_layout_is_refused() -> None:
    onnx = pytest.importorskip("onnx")
    empty = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    with pytest.raises(CheckpointInvalid, match="another layout"):
        served_graph(empty.SerializeToString())


def test_the_served_encoder_agrees_with_the_published_one_and_each_text_is_computed_once(
    published: Path, tokens: WordPiece, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx")
    monkeypatch.setenv("ANTIPHON_CACHE", str(tmp_path))
    served, reference = served_encoder(published, tokens, 64), SentenceEncoder(published, tokens, 64)
    assert served_graph(published.read_bytes()) == served.path.read_bytes()
    found = encode_sentences(served, [*TEXTS, TEXTS[0].upper()])
    assert (found[4] == found[0]).all()
    for text, row in zip(TEXTS, found, strict=False):
        assert (served.encode(text) == row).all()
        assert float(row @ reference.encode(text)) > 0.97
    (store,) = (tmp_path / "coe").glob("sentences-*.npy")
    assert len(np.load(store)) == len(TEXTS)
    assert (encode_sentences(served, TEXTS[1:]) == found[1:4]).all()
    store.write_bytes(b"broken")
    assert (encode_sentences(served, TEXTS[:1]) == found[:1]).all()
