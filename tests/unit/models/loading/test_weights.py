"""What one worker reads of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from antiphon.core.errors import CheckpointInvalid
from antiphon.models.loading.checkpoint import WEIGHTS, Checkpoint
from antiphon.models.loading.weights import Weights
from antiphon.testing import write_tiny_llama

NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("stored", [torch.int8, torch.uint8, torch.int32, torch.bool])
def test_whole_numbers_that_no_format_explains_are_no_weights(tmp_path: Path, stored: torch.dtype) -> None:
    write_tiny_llama(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({**tensors, NAME: (tensors[NAME] * 100).to(stored)}, tmp_path / WEIGHTS)
    weights = Weights(Checkpoint.open(tmp_path), torch.float32, torch.device("cpu"))
    with pytest.raises(CheckpointInvalid, match="codes of an unknown format"):
        weights.read(NAME)
    assert weights.read(NAME, dtype=stored).dtype is stored
    other = NAME.replace("q_proj", "k_proj")
    assert torch.equal(weights.read(other), tensors[other])
