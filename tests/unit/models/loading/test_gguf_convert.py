"""GGUF files written here from seeded transformers models come back as the checkpoints they were made of.

The forward direction (names, order of rotary rows, quantising) is written out independently of the converter.
"""

import json
import random
import resource
import time

import numpy as np
import pytest
import torch

from antiphon.core.errors import AntiphonError, CheckpointInvalid, InvalidInput, UnsupportedModel
from antiphon.models.families import describe
from antiphon.models.loading.checkpoint import Checkpoint
from antiphon.models.loading.gguf_convert import convert_gguf
from antiphon.models.loading.stored.four_bit import FourBit
from antiphon.models.loading.weights import Weights

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD_DIM = {"llama": 16, "qwen2": 16, "qwen3": 32}
NAMES = {
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def tiny_model(architecture, *, tied=False, seed=11, **extra):
    classes = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    config_class = getattr(transformers, f"{classes[architecture]}Config")
    if architecture == "qwen3":
        extra["head_dim"] = HEAD_DIM["qwen3"]
    rope = extra.pop("rope_parameters", {"rope_type": "default", "rope_theta": 50000.0})
    torch.manual_seed(seed)
    config = config_class(**SIZES, tie_word_embeddings=tied, rope_parameters=rope, **extra)
    model = getattr(transformers, f"{classes[architecture]}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():  # norms and biases too, so that a mix-up shows
            weight.copy_(torch.randn_like(weight) * 0.2 + (1.0 if weight.dim() == 1 else 0.0))
    return model


def gguf_name(name):
    parts = name.split(".")
    kind = parts[-1]
    if "layers" in parts:
        return f"blk.{parts[parts.index('layers') + 1]}.{NAMES[parts[-2]]}.{kind}"
    return f"output_norm.{kind}" if name == "model.norm.weight" else f"{NAMES[parts[-2]]}.{kind}"


def interleaved(rows, num_heads):
    """Row i and row i + half of each head become neighbours, as the llama architecture stores them."""
    result = np.empty_like(rows)
    head_dim = rows.shape[0] // num_heads
    for head in range(num_heads):
        for i in range(head_dim // 2):
            result[head * head_dim + 2 * i] = rows[head * head_dim + i]
            result[head * head_dim + 2 * i + 1] = rows[head * head_dim + head_dim // 2 + i]
    return result


def write_gguf(
    path, model, architecture, *, quantisation="F32", fields=(), drop=(), extra_tensors=None, pre="smollm", stored=np.float32
):
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if architecture == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    write_tokenizer(writer, pre)
    for key, value in fields:
        writer.kv_data[0].pop(key, None)  # said once only
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    tied = config.tie_word_embeddings
    for name, weight in model.state_dict().items():
        if (tied and name == "lm_head.weight") or name in drop:
            continue
        values = weight.float().numpy()
        if architecture == "llama" and "q_proj" in name:
            values = interleaved(values, config.num_attention_heads)
        if architecture == "llama" and "k_proj" in name:
            values = interleaved(values, config.num_key_value_heads)
        if quantisation != "F32" and values.ndim == 2:
            kind = gguf.GGMLQuantizationType[quantisation]
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), values.astype(stored))
    for name, values in (extra_tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tokenizer(writer, pre):
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<unk>", "<s>", "</s>", *sorted(ByteLevel.alphabet()), "th", "the"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def logits(model):
    ids = torch.tensor([[1, 17, 200, 33, 33, 90, 5, 250, 2, 64]])
    with torch.no_grad():
        return model(ids).logits


def converted(tmp_path, model, architecture, *, dtype="float32", max_shard_bytes=4 * 2**30, **how):
    path = write_gguf(tmp_path / "model.gguf", model, architecture, **how)
    convert_gguf(path, tmp_path / "out", dtype=dtype, max_shard_bytes=max_shard_bytes)
    return tmp_path / "out"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_float_file_comes_back_bit_for_bit(tmp_path, architecture, tied):
    model = tiny_model(architecture, tied=tied)
    out = converted(tmp_path, model, architecture)
    checkpoint = Checkpoint.open(out)
    expected = model.state_dict()
    if tied:
        del expected["lm_head.weight"]
    assert checkpoint.names == set(expected)
    for name, weight in expected.items():
        assert torch.equal(checkpoint.tensor(name), weight), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_transformers_computes_the_same_logits_from_the_result(tmp_path, architecture, tied):
    model = tiny_model(architecture, tied=tied)
    out = converted(tmp_path, model, architecture)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(model))


def test_the_config_says_what_the_model_was_made_with(tmp_path):
    model = tiny_model("qwen3")
    config = json.loads((converted(tmp_path, model, "qwen3") / "config.json").read_text())
    assert {key: config[key] for key in SIZES} == SIZES
    assert config["head_dim"] == 32
    assert config["rope_theta"] == 50000.0
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 50000.0}
    assert config["tie_word_embeddings"] is False
    assert config["torch_dtype"] == "float32"


@pytest.mark.parametrize(("quantisation", "levels"), [("Q8_0", 127), ("Q4_1", 15)])
def test_quantised_weights_are_off_by_at_most_half_a_step_of_their_block(tmp_path, quantisation, levels):
    model = tiny_model("llama")
    checkpoint = Checkpoint.open(converted(tmp_path, model, "llama", quantisation=quantisation))
    for name, weight in model.state_dict().items():
        found = checkpoint.tensor(name)
        if weight.dim() == 1:
            assert torch.equal(found, weight)
            continue
        blocks, read = weight.unflatten(-1, (-1, 32)), found.unflatten(-1, (-1, 32))
        spread = blocks.abs().amax(-1) if quantisation == "Q8_0" else blocks.amax(-1) - blocks.amin(-1)
        half_step = spread / levels / 2
        scale_rounding = blocks.abs().amax(-1) * 2**-9  # scales are stored in 16 bits
        assert ((blocks - read).abs().amax(-1) <= half_step + scale_rounding).all(), name


def test_bfloat16_output_is_the_float_weights_rounded(tmp_path):
    model = tiny_model("qwen2")
    checkpoint = Checkpoint.open(converted(tmp_path, model, "qwen2", dtype="bfloat16"))
    for name, weight in model.state_dict().items():
        assert torch.equal(checkpoint.tensor(name), weight.bfloat16())


def test_a_large_model_is_written_in_shards_transformers_reads(tmp_path):
    model = tiny_model("llama")
    out = converted(tmp_path, model, "llama", max_shard_bytes=100_000)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(model))
    assert Checkpoint.open(out).names == set(model.state_dict())


def test_shards_written_by_transformers_are_read_back(tmp_path):
    model = tiny_model("qwen2", tied=True)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    checkpoint = Checkpoint.open(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert "lm_head.weight" not in checkpoint.names
    for name in checkpoint.names:
        assert torch.equal(checkpoint.tensor(name), model.state_dict()[name])


def test_llama_biases_are_kept_and_reordered(tmp_path):
    model = tiny_model("llama", attention_bias=True, mlp_bias=True)
    out = converted(tmp_path, model, "llama")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(model))


def llama3_factors(rope):
    """Stretch of each rotary frequency, by transformers' own reckoning."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(**SIZES, rope_parameters=rope)
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, 16, 2).float() / 16)
    return (plain / stretched).numpy()


def test_llama3_rotary_factors_become_their_parameters(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny_model("llama", rope_parameters=dict(rope))
    out = converted(tmp_path, model, "llama", extra_tensors={"rope_freqs.weight": llama3_factors(rope)})
    config = json.loads((out / "config.json").read_text())
    assert config["rope_parameters"] == pytest.approx(rope)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(model))


def test_rotary_factors_of_another_kind_are_refused(tmp_path):
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    with pytest.raises(UnsupportedModel, match="rotary factors of an unknown kind"):
        converted(tmp_path, tiny_model("llama"), "llama", extra_tensors={"rope_freqs.weight": factors})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([("llama.expert_count", 8)], "only dense models"),
        ([("llama.rope.scaling.type", "yarn")], "'yarn', which is not supported"),
        ([("llama.rope.dimension_count", 8)], "heads have 16 dimensions"),
        ([("split.count", 3)], "one of 3 parts"),
    ],
)
def test_what_would_change_results_is_refused_by_name(tmp_path, fields, message):
    with pytest.raises(UnsupportedModel, match=message):
        converted(tmp_path, tiny_model("llama"), "llama", fields=fields)


def test_an_unknown_architecture_is_refused_by_name(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match="architecture 'mamba' can't be converted"):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out")


def test_a_tensor_the_family_does_not_have_is_refused(tmp_path):
    extra = {"blk.0.attn_sinks.weight": np.zeros(4, dtype=np.float32)}
    with pytest.raises(UnsupportedModel, match=r"'blk\.0\.attn_sinks\.weight' is not part of a llama model"):
        converted(tmp_path, tiny_model("llama"), "llama", extra_tensors=extra)


def test_a_missing_tensor_is_named_and_nothing_is_left_behind(tmp_path):
    with pytest.raises(CheckpointInvalid, match=r"has no tensor 'blk\.1\.attn_k\.weight'"):
        converted(tmp_path, tiny_model("llama"), "llama", drop={"model.layers.1.self_attn.k_proj.weight"})
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_failure_while_writing_leaves_nothing_behind(tmp_path):
    with pytest.raises(UnsupportedModel, match=r"'tokenizer\.ggml\.pre' is 'nobody-knows'"):
        converted(tmp_path, tiny_model("llama"), "llama", pre="nobody-knows")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_disk_that_takes_no_more_is_said_and_nothing_is_left_behind(tmp_path):
    """A limit of the process on a file's size stands for a full disk: the system refuses the write in the same place."""
    path = write_gguf(tmp_path / "model.gguf", tiny_model("llama"), "llama")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        with pytest.raises(CheckpointInvalid, match=r"model\.safetensors can't be written: .*large"):
            convert_gguf(path, tmp_path / "out", dtype="float32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("kept_bytes", [0, 3, 100, -5000])
def test_a_truncated_file_is_refused(tmp_path, kept_bytes):
    path = write_gguf(tmp_path / "model.gguf", tiny_model("llama"), "llama")
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(CheckpointInvalid, match="not a whole GGUF file"):
        convert_gguf(path, tmp_path / "out")


def test_an_existing_directory_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(InvalidInput, match="exists already"):
        converted(tmp_path, tiny_model("llama"), "llama")
    assert (tmp_path / "out" / "mine").read_text() == "precious"


@pytest.mark.parametrize("quantisation", ["Q4_0", "Q4_1"])
def test_four_bits_kept_are_the_values_that_the_gguf_library_gives(tmp_path, quantisation):
    path = write_gguf(tmp_path / "model.gguf", tiny_model("llama"), "llama", quantisation=quantisation)
    convert_gguf(path, tmp_path / "exact")
    convert_gguf(path, tmp_path / "kept", dtype="four-bit")
    exact, kept = Checkpoint.open(tmp_path / "exact"), Checkpoint.open(tmp_path / "kept")
    describe(kept.config)
    weights = Weights(kept, torch.float32, torch.device("cpu"))
    for name in exact.names:
        assert torch.equal(weights.read(name), exact.tensor(name, dtype=torch.float32)), name
    held = weights.part("model.layers.0.self_attn.q_proj.weight", rows=(3, 20))
    assert isinstance(held, FourBit)
    assert torch.equal(held.values(torch.float32), exact.tensor("model.layers.0.self_attn.q_proj.weight", rows=(3, 20)))


@pytest.mark.parametrize("quantisation", ["Q8_0", "Q4_1"])
def test_by_default_nothing_of_the_dequantised_weights_is_lost(tmp_path, quantisation):
    path = write_gguf(tmp_path / "model.gguf", tiny_model("llama"), "llama", quantisation=quantisation)
    convert_gguf(path, tmp_path / "out")
    convert_gguf(path, tmp_path / "in32", dtype="float32")
    exact, in32 = Checkpoint.open(tmp_path / "out"), Checkpoint.open(tmp_path / "in32")
    for name in in32.names:
        assert torch.equal(exact.tensor(name, dtype=torch.float32), in32.tensor(name)), name
        assert torch.equal(exact.tensor(name, dtype=torch.bfloat16), in32.tensor(name).bfloat16()), name
    assert exact.config["torch_dtype"] == "bfloat16"  # what "auto" computes in


@pytest.mark.parametrize(("stored", "expected"), [(np.float16, torch.float16), (np.float32, torch.float32)])
def test_a_type_that_holds_the_values_is_kept(tmp_path, stored, expected):
    model = tiny_model("qwen2")
    path = write_gguf(tmp_path / "model.gguf", model, "qwen2", stored=stored)
    convert_gguf(path, tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    assert checkpoint.dtype(name) == expected
    assert torch.equal(checkpoint.tensor(name), model.state_dict()[name].to(expected))


def test_no_damage_to_a_file_hangs_the_reader_or_leaves_the_error_tree(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", tiny_model("llama"), "llama", quantisation="Q4_1")
    whole = path.read_bytes()
    header_bytes = whole.index(b"token_embd.weight") + 2000
    rng = random.Random(7)
    slowest_s, num_refused = 0.0, 0
    damaged = tmp_path / "damaged.gguf"
    for number in range(400):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(header_bytes)
            match rng.randrange(4):
                case 0:
                    data[place] = rng.randrange(256)
                case 1:
                    data[place : place + 8] = rng.choice([0, 1, 2**31, 2**40, 2**63, 2**64 - 1]).to_bytes(8, "little")
                case 2:
                    data[place : place + 4] = rng.choice([0, 8, 9, 2**32 - 1]).to_bytes(4, "little")
                case 3:
                    del data[place : place + rng.randint(1, 40)]
        damaged.write_bytes(data)
        started_s = time.process_time()
        try:
            convert_gguf(damaged, tmp_path / f"out{number}")
        except AntiphonError:
            num_refused += 1
        slowest_s = max(slowest_s, time.process_time() - started_s)
    assert num_refused > 200
    assert slowest_s < 5


def test_counts_the_file_can_not_hold_are_refused_at_once(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", tiny_model("llama"), "llama")
    whole = path.read_bytes()
    for place in (8, 16):  # number of tensors, number of fields
        path.write_bytes(whole[:place] + (2**40).to_bytes(8, "little") + whole[place + 8 :])
        with pytest.raises(CheckpointInvalid, match="are promised, which are not there"):
            convert_gguf(path, tmp_path / "out")
    key = b"tokenizer.ggml.token_type"
    place = whole.index(key) + len(key) + 4 + 4
    path.write_bytes(whole[:place] + (2**50).to_bytes(8, "little") + whole[place + 8 :])
    with pytest.raises(CheckpointInvalid, match="an array has"):
        convert_gguf(path, tmp_path / "out")


@pytest.mark.parametrize("field", ["llama.attention.head_count", "llama.embedding_length"])
def test_a_size_of_zero_is_named(tmp_path, field):
    with pytest.raises(CheckpointInvalid, match=rf"{field}' is 0"):
        converted(tmp_path, tiny_model("llama"), "llama", fields=[(field, 0)])
