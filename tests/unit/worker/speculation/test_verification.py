"""Whatever the drafts, a request gets the tokens it would have drawn one by one; a draft that is no number harms nobody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.core.request import FinishReason, RequestId, SamplingParams
from antiphon.core.step import NewRequestData
from antiphon.engine.speculation.speculator import Speculator
from antiphon.testing import LocalCluster, wiring, write_tiny_llama
from antiphon.worker.request_row import RequestRow
from antiphon.worker.speculation import verification
from antiphon.worker.speculation.verification import Drawing, draw_in_turns, end_at_bad_rows, take_best

VOCAB = 13
LENGTH = 7

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.8, "seed": 9, "top_p": 0.8, "frequency_penalty": 1.0, "presence_penalty": 0.5},
    {"temperature": 0.0, "repetition_penalty": 1.7, "min_tokens": 3, "num_logprobs": 2},
]


def row(number: int, kind: int) -> RequestRow:
    new = NewRequestData(
        request_id=RequestId(f"r{number}"),
        token_ids=(1, 2),
        num_prompt_tokens=2,
        block_ids=(),
        num_computed_tokens=1,
        sampling=SamplingParams(max_tokens=50, **KINDS[kind]),
        eos_token_ids=frozenset({0}),
    )
    return RequestRow(new, VOCAB, None)


def model(tokens: list[int]) -> torch.Tensor:
    """Logits that depend on all tokens so far."""
    seed = 7
    for token in tokens:
        seed = (seed * 31 + token + 1) % 2**31
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def one_by_one(number: int, kind: int) -> tuple[list[int], list[Any]]:
    drawn, likelihoods = [], []
    mine = row(number, kind)
    for _ in range(LENGTH + 1):
        drawing = Drawing(row=mine, first_row=0)
        draw_in_turns(model(mine.token_ids)[None], [drawing])
        mine.token_ids += drawing.tokens
        drawn += drawing.tokens
        likelihoods += drawing.logprobs
    return drawn, likelihoods


@settings(max_examples=60, deadline=None)
@given(data=st.data(), kinds=st.lists(st.integers(0, len(KINDS) - 1), min_size=1, max_size=4))
def test_the_tokens_are_those_drawn_one_by_one_and_as_many_as_there_are_drafts_that_are_right(
    data: st.DataObject, kinds: list[int]
) -> None:
    drawings, rows, expected = [], [], []
    for number, kind in enumerate(kinds):
        truth, likelihoods = one_by_one(number, kind)
        drafts = data.draw(st.tuples(*(st.sampled_from([token, token, token, (token + 1) % VOCAB]) for token in truth[:LENGTH])))
        drafts = drafts[: data.draw(st.integers(0, LENGTH))]
        num_right = next((i for i, draft in enumerate(drafts) if draft != truth[i]), len(drafts))
        expected.append((truth[: num_right + 1], likelihoods[: num_right + 1]))
        mine = row(number, kind)
        drawings.append(Drawing(row=mine, first_row=len(rows), drafts=drafts))
        rows += [model([*mine.token_ids, *drafts[:place]]) for place in range(len(drafts) + 1)]
    logits_RV = torch.stack(rows)
    if set(kinds) == {0} and data.draw(st.booleans()):
        take_best(logits_RV.argmax(-1).tolist(), drawings)
    else:
        draw_in_turns(logits_RV, drawings)
    assert [(drawing.tokens, drawing.logprobs) for drawing in drawings] == expected


def test_a_draft_without_a_next_token_ends_the_drawing_and_a_first_row_without_one_leaves_none() -> None:
    mine, other = row(0, 0), row(1, 0)
    drawings = [Drawing(row=mine, first_row=0, drafts=(4, 5)), Drawing(row=other, first_row=3, drafts=(4,))]
    take_best([4, None, 7, None, 3], drawings)
    assert [drawing.tokens for drawing in drawings] == [[4], []]


def test_rows_of_drafts_that_are_no_numbers_are_found() -> None:
    x_RD = torch.ones(5, 3)
    x_RD[2, 1] = float("nan")
    drawings = [Drawing(row=row(0, 0), first_row=0, drafts=(4, 5, 6)), Drawing(row=row(1, 0), first_row=4)]
    end_at_bad_rows(x_RD, drawings)
    assert [drawing.num_good for drawing in drawings] == [2, 1]
    assert [drawing.is_cut_short for drawing in drawings] == [True, False]


def test_a_fault_at_a_later_place_leaves_what_was_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, _ = one_by_one(0, 1)
    mine = row(0, 1)
    drawing = Drawing(row=mine, first_row=0, drafts=truth[:3])
    logits_RV = torch.stack([model([*mine.token_ids, *truth[:place]]) for place in range(4)])
    draw = verification.sample

    def breaks(logits: torch.Tensor, states: Any, positions: Any) -> Any:
        if positions[0] == 2:
            raise RuntimeError("injected")
        return draw(logits, states, positions)

    monkeypatch.setattr(verification, "sample", breaks)
    draw_in_turns(logits_RV, [drawing])
    assert drawing.tokens == truth[:2]


class Poisoned:
    """Drafts right tokens with one among them whose embedding is no number, once."""

    name, priors, is_free = "poisoned", (0.9,), True

    def __init__(self, answer: list[int], size: int, bad: int) -> None:
        self.answer, self.size, self.bad, self.is_done = answer, size, bad, False

    def propose(self, asked: Any) -> Any:
        from antiphon.engine.speculation.drafter import Proposal

        found: dict[RequestId, Proposal] = {}
        if self.is_done:
            return found
        self.is_done = True
        for request_id, wanted in asked.items():
            done = len(wanted.token_ids) - self.size
            drafts = [*self.answer[done : done + 2], self.bad, *self.answer[done + 3 : done + 6]]
            found[request_id] = Proposal(token_ids=tuple(drafts[: wanted.num_drafts]))
        return found

    def forget(self, request_id: RequestId) -> None:
        pass


def test_a_draft_that_is_no_number_is_wiped_out_of_the_cache(tmp_path: Path) -> None:
    """Masked slots are multiplied by zero, so that what it left would spoil the next step."""
    path, prompt, bad = write_tiny_llama(tmp_path), [5, 6, 7, 8, 9], 300
    with LocalCluster(wiring(path, "monolith", cache={"numBlocks": 32}, speculation={}), path) as cluster:
        part = cluster.generating[0]
        part.engine.scheduler.speculator = None
        expected = cluster.generate(prompt, max_tokens=24)
        assert bad not in expected
        with torch.inference_mode():
            part.worker.halves._embed_VD[bad] = float("nan")
            # A tied head would find the token's own logit to be none.
            head = part.worker.halves.head.linear
            part.worker.halves.logits = lambda x_RD: head.in_fp32(part.worker.halves.head.hidden(x_RD)).nan_to_num(nan=-1e9)  # type: ignore[method-assign]
        poisoned = Poisoned(expected, len(prompt), bad)
        part.engine.scheduler.speculator = Speculator(poisoned, max_drafts=5, clock=cluster.clock)
        assert expected[4] not in expected[:4]
        request_id = cluster.submit(prompt, max_tokens=24, num_logprobs=0, eos=[expected[4]])  # before all places are written again
        cluster.run()
        got = cluster.outputs[request_id]
        assert got.finish_reason is FinishReason.STOP
        assert got.token_ids == expected[:5]
        assert part.engine.scheduler.speculator.stats.num_taken > 0
        for planes in part.worker.cache.planes:
            assert all(torch.isfinite(plane).all() for plane in planes)


def test_a_fault_in_a_step_with_drafts_is_tried_without_them(tmp_path: Path) -> None:
    path, prompt = write_tiny_llama(tmp_path), [5, 6] * 6
    with LocalCluster(wiring(path, "monolith", cache={"numBlocks": 32}, speculation={"maxDrafts": 4}), path) as cluster:
        worker, widths = cluster.generating[0].worker, []
        expected = cluster.generate(prompt, max_tokens=20, speculates=False)
        begin = worker.halves.begin

        def breaks_on_drafts(token_ids: torch.Tensor, batch: Any) -> Any:
            widths.append(len(token_ids))
            if 1 < len(token_ids) < len(prompt):
                raise RuntimeError("injected")
            return begin(token_ids, batch)

        worker.halves.begin = breaks_on_drafts  # type: ignore[method-assign]
        assert cluster.generate(prompt, max_tokens=20) == expected
        assert any(width > 1 for width in widths[1:])
