"""Pairs of texts as a ranking model reads them (request speed).

    encoder           [CLS] query [SEP] document [SEP], by the tokenizer's own rule
    decoder           the prompt of Qwen3-Reranker (arXiv 2506.05176, model card) where its markers exist, else the tokenizer's rule

Must not know: workers.
"""

from __future__ import annotations

from dataclasses import dataclass

from antiphon.core.errors import CheckpointInvalid
from antiphon.core.request import Pooling
from antiphon.gateway.text.tokenizer import EncodedText, TextModel
from antiphon.models.pooling.facts import PoolingFacts

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
_BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_BEHIND = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
_NO_YES = ("no", "yes")


@dataclass(frozen=True, slots=True, kw_only=True)
class PairReader:
    """How one model's pairs become prompts."""

    text_model: TextModel
    asks: bool  # with Qwen3-Reranker's prompt
    answer_ids: tuple[int, ...]  # of "no" and "yes", where their logits are the score

    @classmethod
    def of(cls, text_model: TextModel, facts: PoolingFacts) -> PairReader:
        """Raises CheckpointInvalid where a model without classes has no tokens to answer with."""
        asks = not facts.is_encoder and "<|im_start|>" in text_model.special_tokens
        ids: tuple[int, ...] = ()
        if not facts.num_classes:
            found = [text_model.token_id(word) for word in _NO_YES]
            ids = tuple(token_id for token_id in found if token_id is not None)
            if len(ids) != 2:
                raise CheckpointInvalid("a ranking model without classes needs the tokens 'no' and 'yes' in its vocabulary")
        return cls(text_model=text_model, asks=asks, answer_ids=ids)

    def encode(self, query: str, document: str, instruction: str | None, cut: int | None) -> EncodedText:
        """The prompt of a pair; ``cut``: tokens it is cut to, None = it is whole. Raises InvalidInput."""
        if not self.asks:
            return self.text_model.encode_pair(query, document, cut)
        before = self.text_model.encode(_BEFORE, add_special_tokens=False)
        behind = self.text_model.encode(_BEHIND, add_special_tokens=False)
        instruct = INSTRUCTION if instruction is None else instruction
        asked = f"<Instruct>: {instruct}\n<Query>: {query}\n<Document>: {document}"
        middle = self.text_model.encode_plain(asked)
        if cut is not None:
            middle = middle[: max(0, cut - len(before) - len(behind))]
        return EncodedText(token_ids=(*before, *middle, *behind))

    def pooling(self, encoded: EncodedText) -> Pooling:
        """What its engine is asked for."""
        return Pooling(kind="score", token_ids=self.answer_ids, num_first_tokens=encoded.num_first_tokens)
