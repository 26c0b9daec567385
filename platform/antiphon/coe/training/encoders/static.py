"""Makes the table of static token vectors: from the sentence encoder, or from the training prompts alone (control speed, offline).

    minilm   every vocabulary token through the sentence encoder, 256 principal directions, weighted by the logarithm of its rank
    lsa      no encoder at hand: words of the prompts, latent semantic analysis of which prompts they stand in

Must not know: categories, experts.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix
from sklearn.decomposition import TruncatedSVD

from antiphon.coe.routing.assets import cache_directory, keep
from antiphon.coe.routing.embedding import StaticEmbedding, quantised
from antiphon.coe.routing.encoder import SentenceEncoder
from antiphon.coe.routing.wordpiece import WordPiece, window
from antiphon.coe.training.data.augment import COURTESY

Floats = npt.NDArray[np.float32]

NUM_DIMENSIONS = 256
_COURTESY_WEIGHT = 0.15
_BATCH = 512
_MAX_WORDS = 20_000


def from_encoder(published: Path, tokens: WordPiece) -> StaticEmbedding:
    """Token vectors of the vocabulary by the published encoder; cached, since they depend on nothing but these files."""
    key = hashlib.sha256(published.read_bytes() + "\n".join(tokens.vocabulary).encode()).hexdigest()[:16]

    def compute() -> Floats:
        encoder = SentenceEncoder(published, tokens, 3)
        ids = range(len(tokens.vocabulary))
        batches = [ids[start : start + _BATCH] for start in range(0, len(ids), _BATCH)]
        return np.concatenate([encoder.encode_ids([[i] for i in batch]) for batch in batches])

    vectors = cached_array(f"token-vectors-{key}", compute).astype(np.float64)
    centred = vectors - vectors.mean(axis=0)
    values, directions = np.linalg.eigh(centred.T @ centred)
    directions = directions[:, np.argsort(-values)[:NUM_DIMENSIONS]]
    weight = np.log(2.0 + np.arange(len(vectors))) * courtesy(tokens)
    table = quantised(centred @ directions * weight[:, None])
    return StaticEmbedding(tokens=tokens, near=table)


def from_prompts(prompts: Sequence[str], seed: int) -> StaticEmbedding:
    """Token vectors from the prompts alone, for machines where the encoder's files can't be had."""
    words: Counter[str] = Counter()
    chars: set[str] = set()
    spell = WordPiece(["[UNK]", "[CLS]", "[SEP]"])
    split = [spell.words(window(prompt, 1024, 256)) for prompt in prompts]
    for found in split:
        words.update(found)
        chars.update(*found)
    frequent = [word for word, count in sorted(words.items(), key=lambda item: (-item[1], item[0])) if count > 1]
    letters = sorted(chars)
    vocabulary = ["[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{c}" for c in letters)]
    vocabulary += [word for word in frequent[:_MAX_WORDS] if len(word) > 1]
    tokens = WordPiece(list(dict.fromkeys(vocabulary)))
    rows, columns = [], []
    for i, prompt in enumerate(prompts):
        ids = sorted(set(tokens.encode(window(prompt, 1024, 256), 320)))
        rows += [i] * len(ids)
        columns += ids
    size = len(tokens.vocabulary)
    present = csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(prompts), size))
    rarity = np.log((1.0 + len(prompts)) / (1.0 + np.bincount(columns, minlength=size)))
    num = max(2, min(NUM_DIMENSIONS // 2, len(prompts) - 1, size - 1))
    svd = TruncatedSVD(num, random_state=seed).fit(present.multiply(rarity).tocsr())
    table = quantised(svd.components_.T * (rarity * courtesy(tokens))[:, None])
    return StaticEmbedding(tokens=tokens, near=table)


def cached_array(name: str, compute: Callable[[], Floats]) -> Floats:
    """The array of that name from the cache directory, or computed and kept there; a broken file is computed again."""
    path = cache_directory() / "coe" / f"{name}.npy"
    try:
        kept: Floats = np.load(path, allow_pickle=False)
    except (OSError, ValueError):
        kept = np.asarray(compute(), np.float32)
        with contextlib.suppress(OSError):  # a read-only cache costs time, not correctness
            keep(path, kept)
    return kept


def courtesy(tokens: WordPiece) -> npt.NDArray[np.float64]:
    """The weight of every token: less for words that speak to the assistant and say nothing about the subject."""
    return np.array([_COURTESY_WEIGHT if token in COURTESY else 1.0 for token in tokens.vocabulary])
