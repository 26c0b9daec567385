"""Gemma 3 from a GGUF file: weights, config and SentencePiece tokenizer, each against an independent way to the same.

The forward direction (names, norms stored one larger) is written out here; tokens are checked against SentencePiece's own rule,
applied in the plainest way: merge the best-scored neighbours, the leftmost of equals, until none can be.
"""

import itertools
import random

import numpy as np
import pytest
import torch

from antiphon.core.errors import CheckpointInvalid, UnsupportedModel
from antiphon.models.families import describe
from antiphon.models.loading.gguf_convert import convert_gguf
from antiphon.models.loading.gguf_file import GgufFile

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

NAMES = {
    "embed_tokens": "token_embd",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
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
NORMAL, CONTROL, USER, BYTE = 1, 3, 4, 6
WORDS = ["▁t", "in", "▁a", "er", "on", "he", "th", "▁th", "▁the", "the", "her", "▁in", "ing", "aa", "aaa", "aaaa", "é", "né"]


def vocabulary():
    """Tokens, kinds and scores: Gemma's order in small. Files write spaces of user-defined tokens either way."""
    rows = [("<pad>", CONTROL), ("<eos>", CONTROL), ("<bos>", CONTROL), ("<unk>", CONTROL), ("<start_of_turn>", CONTROL)]
    rows += [("\n", USER), ("\n\n", USER), ("  ", USER), ("▁▁▁", USER), ("<table>", USER)]
    rows += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    rows += [(word, NORMAL) for word in WORDS]
    rows += [(letter, NORMAL) for letter in "▁abcdeghinorst<>/.,"]
    scores = [-float(index) if kind == NORMAL else -1000.0 for index, (_, kind) in enumerate(rows)]
    return [token for token, _ in rows], [kind for _, kind in rows], scores


def sentencepiece(text):
    """SentencePiece's rule in the plainest way."""
    tokens, kinds, scores = vocabulary()
    ids = {token: index for index, token in enumerate(tokens) if kinds[index] == NORMAL}
    whole = sorted((token for index, token in enumerate(tokens) if kinds[index] in (USER, CONTROL)), key=len, reverse=True)
    text, found, run = text.replace(" ", "▁"), [], ""

    def merged(run):
        symbols = list(run)
        while True:
            pairs = [(-scores[ids[a + b]], at) for at, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in ids]
            if not pairs:
                break
            _, at = min(pairs)
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        for symbol in symbols:
            yield from [ids[symbol]] if symbol in ids else [tokens.index(f"<0x{byte:02X}>") for byte in symbol.encode()]

    while text:
        taken = next((token for token in whole if text.startswith(token.replace(" ", "▁"))), None)
        if taken is None:
            run, text = run + text[0], text[1:]
            continue
        found += [*merged(run), tokens.index(taken)]
        run, text = "", text[len(taken) :]
    return [*found, *merged(run)]


def tiny_model(**changes):
    torch.manual_seed(5)
    config = transformers.Gemma3TextConfig(
        **{
            "vocab_size": len(vocabulary()[0]),
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 7,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "max_position_embeddings": 128,
            "final_logit_softcapping": None,
            **changes,
        }
    )
    model = transformers.Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3)
    return model


def write(path, model, *, flags=(), scores=None):
    config = model.config
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_sliding_window(config.sliding_window)
    tokens, kinds, made = vocabulary()
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_scores(made if scores is None else scores)
    for name, index in (("bos", 2), ("eos", 1), ("unknown", 3), ("padding", 0)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    for name, value in {"add_bos_token": True, "add_space_prefix": False, **dict(flags)}.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        parts, values = name.split("."), weight.float().numpy()
        if "norm" in parts[-2]:
            values = values + 1.0
        stem = "output_norm" if name == "model.norm.weight" else NAMES[parts[-2]]
        writer.add_tensor(f"blk.{parts[2]}.{stem}.weight" if "layers" in parts else f"{stem}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    path = tmp_path_factory.mktemp("gemma3")
    model = tiny_model()
    convert_gguf(write(path / "model.gguf", model), path / "out", dtype="float32")
    return path / "out", model


def test_transformers_computes_the_same_logits_from_the_result(converted):
    path, model = converted
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert type(loaded) is type(model)
    ids = torch.tensor([[2, *range(270, 295)]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_the_config_is_the_family_s(converted):
    import json

    raw = json.loads((converted[0] / "config.json").read_text())
    described, made = describe(raw), describe({**converted[1].config.to_dict(), "architectures": ["Gemma3ForCausalLM"]})
    assert [layer.attention for layer in described.layers] == [layer.attention for layer in made.layers]
    assert [layer.ffn for layer in described.layers] == [layer.ffn for layer in made.layers]
    assert (described.embed_scale, described.norm, described.tie_embeddings) == (made.embed_scale, made.norm, True)


CHANCE = random.Random(3)
TEXTS = [
    "the theater in the inn",
    "aaaaaaaaa aaa  aa   a    a",
    "né naïve 日本 😀",
    "a\n\n\nb\n\n the<table>in<eos>.",
    " leading and trailing ",
    "\x00\x7f",
    "",
    *("".join(CHANCE.choice("aehinrt  \n<é日") for _ in range(40)) for _ in range(40)),
]


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_sentencepiece_s_and_decode_to_the_text(converted, text):
    tokenizer = transformers.AutoTokenizer.from_pretrained(converted[0])
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == sentencepiece(text)
    assert tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text
    assert tokenizer(text).input_ids == [2, *ids]


def test_a_space_is_put_first_where_the_file_says_so(tmp_path):
    from tokenizers import Tokenizer

    convert_gguf(write(tmp_path / "m.gguf", tiny_model(), flags=[("add_space_prefix", True)]), tmp_path / "out", dtype="float32")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    ids = tokenizer.encode("the inn", add_special_tokens=False).ids
    assert ids == sentencepiece(" the inn")
    assert tokenizer.decode(ids) == "the inn"


@pytest.mark.parametrize("flag", ["remove_extra_whitespaces", "add_eos_token"])
def test_what_would_change_tokens_is_refused_by_name(tmp_path, flag):
    with pytest.raises(UnsupportedModel, match=f"tokenizer.ggml.{flag}"):
        convert_gguf(write(tmp_path / "m.gguf", tiny_model(), flags=[(flag, True)]), tmp_path / "out")


def test_scores_must_be_as_many_as_tokens(tmp_path):
    with pytest.raises(CheckpointInvalid, match=r"'tokenizer\.ggml\.scores' has 2 entries"):
        convert_gguf(write(tmp_path / "m.gguf", tiny_model(), scores=[0.0, 1.0]), tmp_path / "out")


def test_the_27b_scales_scores_by_its_hidden_size_per_head(tmp_path):
    from antiphon.models.loading.gguf_families import family_of, hf_config

    file = GgufFile.open(write(tmp_path / "m.gguf", tiny_model(num_hidden_layers=62)))
    assert hf_config(file, family_of(file), "float32")["query_pre_attn_scalar"] == 48 // 4
