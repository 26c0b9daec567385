"""A whole step as a card does it, without a card: no question to the host within it, and no tensor of the host's among a card's.

Runs with ``ANTIPHON_PRETEND_CARD=1``, where the CPU is taken for a card; ``make test`` runs this file in a process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

sys.path.insert(0, str(Path(__file__).parent))

from steps import Model, decodes

from antiphon.device.device import PRETENDS
from antiphon.device.graphs import NotRecordable, TapeGraphs, is_sync
from antiphon.models.loading.checkpoint import Checkpoint
from antiphon.worker.batch_builder import Run

assert PRETENDS, "this file runs with ANTIPHON_PRETEND_CARD=1"
KINDS = ["dense", "moe"]
Mode = Callable[[], Any]


class Syncs(TorchDispatchMode):
    """Operators that ask the host for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.num_operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_operators += 1
        if is_sync(func):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_no_half_asks_the_host_for_a_value(kind: str, tmp_path: Path) -> None:
    model = Model.write(kind, tmp_path)
    chunk = Run(token_ids=list(range(9)), block_ids=[9, 10, 11], first_token=2, num_tokens=7)
    built = model.builder.build([*decodes(5, 9), chunk])
    with torch.inference_mode(), Syncs() as syncs:
        state = model.layers(model.halves.begin(*built))
        model.halves.greedy(state.x_TD)
    assert syncs.found == []
    assert syncs.num_operators > 20  # the mode saw the step


def test_the_counter_sees_a_question() -> None:
    with Syncs() as syncs:
        bool(torch.ones(1).sum() > 0)
    assert syncs.found


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_of_the_host_is_among_the_cards(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.write(kind, tmp_path)  # real, for the batch's numbers
    runs = decodes(5, 9, 3)
    ids, batch = model.builder.build(runs)
    read = Checkpoint.tensor
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def read_really(checkpoint: Checkpoint, *arguments: Any, **options: Any) -> torch.Tensor:
            with _disable_current_modes():
                tensor = read(checkpoint, *arguments, **options)
            return mode.from_tensor(tensor)

        monkeypatch.setattr(Checkpoint, "tensor", read_really)
        copy = torch.Tensor.copy_

        def copy_checked(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            """A torch without CUDA has no copy for a fake card: here it is its rule alone."""
            if not isinstance(target, FakeTensor):
                return copy(target, source, non_blocking)
            assert target.device == source.device
            torch.broadcast_shapes(target.shape, source.shape)
            return target

        monkeypatch.setattr(torch.Tensor, "copy_", copy_checked)
        fake = Model.read(tmp_path, "cuda:0")

        def on_card(tensor: torch.Tensor) -> torch.Tensor:
            return mode.from_tensor(tensor).to("cuda:0")

        assert batch.card is not None
        assert batch.decode_blocks_BM is not None
        assert batch.decode_lens_B is not None
        batch.positions_T, batch.slots_T = on_card(batch.positions_T), on_card(batch.slots_T)
        batch.decode_blocks_BM, batch.decode_lens_B = on_card(batch.decode_blocks_BM), on_card(batch.decode_lens_B)
        state = fake.layers(fake.halves.begin(on_card(ids), batch))
        tokens, values = fake.halves.greedy(state.x_TD)
    assert tokens.device.type == values.device.type == state.x_TD.device.type == "cuda"
    assert tokens.shape == (3,)
    with FakeTensorMode() as mode, pytest.raises(Exception, match="device"):
        torch.empty(2, device="cuda:0") + torch.empty(2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_step_is_a_fresh_one_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model = Model.write(kind, tmp_path)
    with torch.inference_mode():
        ids, batch = model.builder.build(decodes(5, 9, 3))
        for plane in (plane for planes in model.cache.planes for plane in planes):
            plane.normal_()
        before = [[plane.clone() for plane in planes] for planes in model.cache.planes]

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            return model.halves.greedy(model.layers(model.halves.begin(ids, batch)).x_TD)

        recorded, (tokens, values) = TapeGraphs().record(run)
        for lengths in ((5, 9, 3), (8, 1, 12), (2, 11, 4)):
            for planes, kept in zip(model.cache.planes, before, strict=True):
                for plane, old in zip(planes, kept, strict=True):
                    plane.copy_(old)
            fresh = model.step(decodes(*lengths))
            written = [[plane.clone() for plane in planes] for planes in model.cache.planes]
            for planes, kept in zip(model.cache.planes, before, strict=True):
                for plane, old in zip(planes, kept, strict=True):
                    plane.copy_(old)
            new_ids, new = model.builder.build(decodes(*lengths))
            ids.copy_(new_ids)
            batch.positions_T.copy_(new.positions_T)
            batch.slots_T.copy_(new.slots_T)
            assert batch.decode_blocks_BM is not None
            assert new.decode_blocks_BM is not None
            assert batch.decode_lens_B is not None
            assert new.decode_lens_B is not None
            batch.decode_blocks_BM.copy_(new.decode_blocks_BM)
            batch.decode_lens_B.copy_(new.decode_lens_B)
            recorded.replay()
            assert torch.equal(tokens, fresh[0])
            assert torch.equal(values, fresh[1])
            for planes, kept in zip(model.cache.planes, written, strict=True):
                assert all(torch.equal(plane, old) for plane, old in zip(planes, kept, strict=True))


def test_a_question_to_the_host_ends_a_recording(tmp_path: Path) -> None:
    model = Model.write("dense", tmp_path)

    def run() -> None:
        state = model.layers(model.halves.begin(*model.builder.build(decodes(5))))
        bool(torch.isfinite(state.x_TD).all())

    with torch.inference_mode(), pytest.raises(NotRecordable, match="asks the host"):
        TapeGraphs().record(run)
