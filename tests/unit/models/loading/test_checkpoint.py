"""Checkpoint directories: whole, sliced, sharded, and broken in every way we name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from antiphon.core.errors import CheckpointInvalid
from antiphon.core.ids import FFNShard
from antiphon.models.decoder import AttentionHalves, FFNHalves
from antiphon.models.families import describe
from antiphon.models.loading.checkpoint import Checkpoint
from antiphon.testing import write_tiny_moe


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(7)
    return {
        "w": torch.randn(12, 8, generator=generator),
        "half": torch.randn(6, 4, generator=generator).bfloat16(),
        "vector": torch.randn(10, generator=generator),
        "scalar": torch.tensor(2.5),
    }


@pytest.fixture
def directory(tmp_path, tensors):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path, tensors):
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": tensors["w"]}, tmp_path / "one.safetensors")
    save_file({"half": tensors["half"]}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"w": "one.safetensors", "half": "two.safetensors"})
    return tmp_path


def write_index(directory: Path, weight_map: object) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_whole_tensor_is_read_as_it_was_written(directory, tensors):
    checkpoint = Checkpoint.open(directory)
    assert checkpoint.names == set(tensors)
    for name, expected in tensors.items():
        assert checkpoint.shape(name) == tuple(expected.shape)
        assert checkpoint.dtype(name) == expected.dtype
        assert torch.equal(checkpoint.tensor(name), expected)


def test_rows_and_columns_select_a_part(directory, tensors):
    checkpoint = Checkpoint.open(directory)
    w = tensors["w"]
    assert torch.equal(checkpoint.tensor("w", rows=(3, 7)), w[3:7])
    assert torch.equal(checkpoint.tensor("w", cols=(2, 5)), w[:, 2:5])
    assert torch.equal(checkpoint.tensor("w", rows=(0, 2), cols=(6, 8)), w[0:2, 6:8])
    assert torch.equal(checkpoint.tensor("vector", rows=(4, 9)), tensors["vector"][4:9])


def test_a_part_owns_exactly_its_own_memory(directory):
    checkpoint = Checkpoint.open(directory)
    part = checkpoint.tensor("w", rows=(3, 7), cols=(2, 5))
    assert part.is_contiguous()
    assert part.untyped_storage().nbytes() == 4 * 3 * 4


def test_tensors_outlive_the_files(directory, tensors):
    with Checkpoint.open(directory) as checkpoint:
        part = checkpoint.tensor("w", rows=(0, 5))
    (directory / "model.safetensors").write_bytes(b"")
    assert torch.equal(part, tensors["w"][:5])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
def test_no_file_stays_mapped_after_close(directory):
    with Checkpoint.open(directory) as checkpoint:
        kept = [checkpoint.tensor("w", rows=(0, 5)), checkpoint.tensor("half"), checkpoint.tensor("scalar")]
    assert str(directory) not in Path("/proc/self/maps").read_text()
    assert len(kept) == 3


def test_reading_goes_on_after_close(directory, tensors):
    checkpoint = Checkpoint.open(directory)
    checkpoint.close()
    checkpoint.close()
    assert torch.equal(checkpoint.tensor("vector"), tensors["vector"])


def test_bytes_read_count_only_what_was_asked_for(directory):
    checkpoint = Checkpoint.open(directory)
    assert checkpoint.bytes_read == 0
    checkpoint.tensor("w", rows=(0, 3))
    checkpoint.tensor("half", cols=(0, 1), dtype=torch.float32)
    assert checkpoint.bytes_read == 3 * 8 * 4 + 6 * 2


def test_dtype_converts_the_part(directory, tensors):
    part = Checkpoint.open(directory).tensor("half", rows=(1, 3), dtype=torch.float32)
    assert part.dtype == torch.float32
    assert torch.equal(part, tensors["half"][1:3].float())


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("w", {"rows": (5, 13)}),
        ("w", {"rows": (-1, 3)}),
        ("w", {"cols": (6, 5)}),
        ("vector", {"cols": (0, 1)}),
        ("scalar", {"rows": (0, 1)}),
    ],
)
def test_a_part_outside_the_tensor_is_refused(directory, name, part):
    with pytest.raises(CheckpointInvalid, match=f"tensor '{name}' of shape"):
        Checkpoint.open(directory).tensor(name, **part)


def test_a_missing_tensor_is_named(directory):
    with pytest.raises(CheckpointInvalid, match="has no tensor 'absent'"):
        Checkpoint.open(directory).tensor("absent")


def test_an_unexpected_shape_gives_found_and_needed(directory):
    checkpoint = Checkpoint.open(directory)
    checkpoint.expect("w", (12, 8))
    with pytest.raises(CheckpointInvalid, match=r"'w' has shape \[12, 8\], but the config needs \[12, 9\]"):
        checkpoint.expect("w", (12, 9))


def test_config_is_read_and_generation_config_is_optional(directory):
    assert Checkpoint.open(directory).config["hidden_size"] == 8
    assert Checkpoint.open(directory).generation_config == {}
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert Checkpoint.open(directory).generation_config["eos_token_id"] == [1, 2]


def test_shards_are_read_as_one(sharded, tensors):
    checkpoint = Checkpoint.open(sharded)
    assert checkpoint.names == {"w", "half"}
    assert torch.equal(checkpoint.tensor("half"), tensors["half"])
    assert torch.equal(checkpoint.tensor("w"), tensors["w"])
    assert torch.equal(checkpoint.tensor("half", rows=(2, 3)), tensors["half"][2:3])


def test_the_digest_is_stable_and_sees_each_change(directory, tensors):
    first = Checkpoint.open(directory).digest
    assert Checkpoint.open(directory).digest == first
    (directory / "config.json").write_text('{"hidden_size": 8,  "model_type": "llama"}')
    assert Checkpoint.open(directory).digest == first, "order and spaces of the config are no difference"
    (directory / "config.json").write_text('{"hidden_size": 9, "model_type": "llama"}')
    second = Checkpoint.open(directory).digest
    save_file({**tensors, "w": tensors["w"].T.contiguous()}, directory / "model.safetensors")
    assert len({first, second, Checkpoint.open(directory).digest}) == 3


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(CheckpointInvalid, match="nowhere: no such checkpoint directory"):
        Checkpoint.open(tmp_path / "nowhere")


def test_a_missing_config_is_named(directory):
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointInvalid, match=r"has no config\.json"):
        Checkpoint.open(directory)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_malformed_config_is_named(directory, text):
    (directory / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointInvalid, match=r"config\.json"):
        Checkpoint.open(directory)


def test_a_directory_without_weights_says_what_is_read(directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointInvalid, match="only safetensors"):
        Checkpoint.open(directory)


@pytest.mark.parametrize("kept_bytes", [0, 5, 60, -3])
def test_a_truncated_file_is_found_at_opening(directory, kept_bytes):
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept_bytes])
    with pytest.raises(CheckpointInvalid, match=r"model\.safetensors: not a whole safetensors file"):
        Checkpoint.open(directory)


def test_a_missing_shard_is_named(sharded):
    (sharded / "two.safetensors").unlink()
    with pytest.raises(CheckpointInvalid, match=r"names two\.safetensors, which is not there"):
        Checkpoint.open(sharded)


def test_a_tensor_the_shard_does_not_hold_is_named(sharded):
    write_index(sharded, {"w": "one.safetensors", "half": "one.safetensors"})
    with pytest.raises(CheckpointInvalid, match=r"puts tensor 'half' in one\.safetensors, which does not hold it"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("weight_map", [None, {}, {"w": "../one.safetensors"}, {"w": 3}])
def test_a_malformed_index_is_refused(sharded, weight_map):
    write_index(sharded, weight_map)
    with pytest.raises(CheckpointInvalid, match="weight_map"):
        Checkpoint.open(sharded)


def test_a_type_torch_lacks_is_refused_when_read(directory):
    header = json.dumps({"odd": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    checkpoint = Checkpoint.open(directory)
    with pytest.raises(CheckpointInvalid, match="'odd' is stored as F8_E8M0"):
        checkpoint.tensor("odd")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not list what a process has mapped")
def test_loaded_halves_leave_no_file_mapped(tmp_path):
    checkpoint = Checkpoint.open(write_tiny_moe(tmp_path))
    config, cpu = describe(checkpoint.config), torch.device("cpu")
    held = [
        AttentionHalves(config, checkpoint, torch.float32, cpu, 64),
        FFNHalves(config, checkpoint, torch.float32, cpu, FFNShard(tensor_index=0, num_tensor=1)),
    ]
    assert str(tmp_path / "model.safetensors") not in Path("/proc/self/maps").read_text(), held
