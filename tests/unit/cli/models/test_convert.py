"""``antiphon convert`` prints what it wrote, and one line when it can't."""

import subprocess
import sys

import pytest

from antiphon.models.loading.checkpoint import Checkpoint

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")


@pytest.fixture
def tiny(tmp_path):
    from tokenizers.pre_tokenizers import ByteLevel

    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*sorted(ByteLevel.alphabet()), "th"])
    writer.add_token_types([1] * 257)
    writer.add_token_merges(["t h"])
    shapes = {"token_embd": (257, 16), "output_norm": (16,), "blk.0.attn_norm": (16,), "blk.0.ffn_norm": (16,)}
    shapes |= {f"blk.0.{name}": (16, 16) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {"blk.0.ffn_gate": (24, 16), "blk.0.ffn_up": (24, 16), "blk.0.ffn_down": (16, 24)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.full(shape, 0.5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "tiny.gguf"


def antiphon(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "antiphon", "convert", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_what_was_written_is_printed(tiny, tmp_path):
    done = antiphon(tiny, tmp_path / "out", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    num_parameters = 257 * 16 + 3 * 16 + 4 * 16 * 16 + 3 * 24 * 16
    for shown in ("LlamaForCausalLM", f"{num_parameters:,}", "257 tokens", "float32"):
        assert shown in done.stdout
    assert len(Checkpoint.open(tmp_path / "out").names) == 11


@pytest.mark.parametrize("source", ["absent.gguf", "hf://org/name"])
def test_an_error_is_one_line(tmp_path, source):
    done = antiphon(source, tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
