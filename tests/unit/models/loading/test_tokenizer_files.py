"""Tokenizers rebuilt from GGUF fields cut, merge and decode as the families' own do.

Expected cuts are written by hand from what each family's tokenizer is known to do, or taken from transformers' classes.
"""

import json

import pytest

from antiphon.core.errors import CheckpointInvalid, UnsupportedModel
from antiphon.models.loading.gguf_file import GgufFile
from antiphon.models.loading.tokenizer_files import WORD_RULES, write_tokenizer

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
TEXTS = [
    "Hello world",
    "the year 1984, and 3.14159 or 1,000,000",
    "def f(x):\n    return x ** 2  # tab\there\r\n\r\n",
    "I'll don't IT'S we'Ve",
    "naïve café Ünïcödé Ελληνικά русский",
    "日本語とEnglish混在、①②③ ½ ٣٤",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 end",
    "   leading and trailing   \n\n\n",
    "tabs\t\tand\u00a0nbsp\u3000wide",
    "\x00\x01control\x7f",
    "combining e\u0301 and \u1e9b\u0323",
    "",
    " ",
    "\n",
]
MERGES = ["t h", "th e", "Ġ t", "Ġt h", "Ġth e", "1 2", "12 3", "Ġ Ġ", "ĠĠ Ġ", "Ċ Ċ", "' s", "l l", "Ġ 1", "H e", "! !"]


def vocabulary():
    from tokenizers.pre_tokenizers import ByteLevel

    return [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]


def rebuilt(tmp_path, *, pre, types=None, merges=MERGES, kind="gpt2", flags=(), tokens=None, ids=()):
    tokens = vocabulary() + SPECIAL if tokens is None else tokens
    writer = gguf.GGUFWriter(tmp_path / "tokenizer.gguf", "llama")
    writer.add_context_length(8192)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens] if types is None else types)
    writer.add_token_merges(merges)
    named = {"bos": tokens.index("<|im_start|>"), "eos": tokens.index("<|im_end|>"), **dict(ids)}
    for name, index in named.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    for name, value in flags:
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    write_tokenizer(GgufFile.open(tmp_path / "tokenizer.gguf"), out)
    (out / "config.json").write_text('{"model_type": "llama"}')
    return transformers.AutoTokenizer.from_pretrained(out)


def cut(tokenizer, text):
    return [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("pre", sorted(WORD_RULES))
@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_back_what_was_encoded(tmp_path, pre, text):
    import unicodedata

    tokenizer = rebuilt(tmp_path, pre=pre)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    expected = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
    assert tokenizer.decode(ids) == expected


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("smollm", "Hello 1234 ab", ["Hello", "Ġ", "1", "2", "3", "4", "Ġab"]),
        ("smollm", "x=10;", ["x", "=", "1", "0", ";"]),
        ("gpt-2", "Hello 1234 ab", ["Hello", "Ġ1234", "Ġab"]),
        ("qwen2", "Hello 1234 ab", ["Hello", "Ġ", "1", "2", "3", "4", "Ġab"]),
        ("qwen2", "I'LL (go)\n\n", ["I", "'LL", "Ġ(", "go", ")ĊĊ"]),
        ("llama-bpe", "Hello 12345 ab", ["Hello", "Ġ", "123", "45", "Ġab"]),
        ("llama-bpe", "a   b", ["a", "ĠĠ", "Ġb"]),
    ],
)
def test_text_is_cut_into_words_as_the_family_does(tmp_path, pre, text, words):
    assert cut(rebuilt(tmp_path, pre=pre), text) == words


def test_each_digit_is_its_own_token_where_merges_would_join_them(tmp_path):
    tokens = rebuilt(tmp_path, pre="smollm").tokenize("in 1123 ways")
    assert tokens[2:8] == ["Ġ", "1", "1", "2", "3", "Ġ"]
    assert rebuilt(tmp_path, pre="gpt-2").tokenize("in 123")[-1] == "123"


@pytest.mark.parametrize("text", TEXTS)
def test_qwen2_ids_equal_those_of_its_own_class(tmp_path, text):
    from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

    tokens = vocabulary() + SPECIAL
    reference = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in MERGES],
    )
    assert rebuilt(tmp_path, pre="qwen2")(text).input_ids == reference(text).input_ids


@pytest.mark.parametrize("text", TEXTS)
def test_gpt2_ids_equal_those_of_its_own_class(tmp_path, text):
    from transformers import GPT2Tokenizer

    tokens = vocabulary() + SPECIAL
    reference = GPT2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in MERGES],
    )
    assert rebuilt(tmp_path, pre="gpt-2")(text).input_ids == reference(text).input_ids


def test_special_tokens_inside_a_chat_are_one_id_each_and_keep_theirs(tmp_path):
    tokenizer = rebuilt(tmp_path, pre="smollm")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"
    ids = tokenizer(chat).input_ids
    first = len(vocabulary())
    assert (ids[0], ids[-2]) == (first + 1, first + 2)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nhi\n"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (first + 1, first + 2)


def test_special_tokens_at_the_front_of_the_vocabulary_keep_their_ids(tmp_path):
    tokenizer = rebuilt(tmp_path, pre="smollm", tokens=SPECIAL + vocabulary())
    assert tokenizer("<|endoftext|><|im_end|>").input_ids == [0, 2]


def test_user_defined_tokens_are_kept_whole_but_not_special(tmp_path):
    tokens = vocabulary() + SPECIAL + ["<think>"]
    types = [3 if token in SPECIAL else 4 if token == "<think>" else 1 for token in tokens]
    tokenizer = rebuilt(tmp_path, pre="qwen2", tokens=tokens, types=types)
    ids = tokenizer("a<think>b").input_ids
    assert ids[1] == len(tokens) - 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>b"


def test_padding_entries_of_the_vocabulary_are_left_out(tmp_path):
    tokens = vocabulary() + SPECIAL + ["[PAD0]", "[PAD1]"]
    types = [3 if token in SPECIAL else 5 if token.startswith("[PAD") else 1 for token in tokens]
    tokenizer = rebuilt(tmp_path, pre="qwen2", tokens=tokens, types=types)
    assert len(tokenizer) == len(tokens) - 2


def test_a_bos_token_is_put_first_where_the_file_or_the_family_says_so(tmp_path):
    bos = len(vocabulary()) + 1
    said = rebuilt(tmp_path, pre="smollm", flags=[("add_bos_token", True)])
    assert said("a").input_ids[0] == bos
    assert said("a", add_special_tokens=False).input_ids[0] != bos
    assert rebuilt(tmp_path, pre="llama-bpe")("a").input_ids[0] == bos
    assert rebuilt(tmp_path, pre="llama-bpe", flags=[("add_bos_token", False)])("a").input_ids[0] != bos
    assert rebuilt(tmp_path, pre="smollm")("a").input_ids[0] != bos


def test_llama3_takes_a_word_that_is_a_token_whole(tmp_path):
    tokens = [*vocabulary(), "zebra", *SPECIAL]
    assert rebuilt(tmp_path, pre="llama-bpe", tokens=tokens).tokenize("zebra") == ["zebra"]
    assert len(rebuilt(tmp_path, pre="smollm", tokens=tokens).tokenize("zebra")) == 5


def test_the_tokenizer_config_holds_template_and_limits(tmp_path):
    rebuilt(tmp_path, pre="smollm")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["chat_template"] == TEMPLATE
    assert config["model_max_length"] == 8192
    assert config["clean_up_tokenization_spaces"] is False


def test_an_unknown_kind_is_refused_by_name(tmp_path):
    with pytest.raises(UnsupportedModel, match="tokenizer of kind 'rwkv'"):
        rebuilt(tmp_path, pre="smollm", kind="rwkv")


def test_an_unknown_word_rule_is_refused_by_name(tmp_path):
    with pytest.raises(UnsupportedModel, match="'viking'; known are"):
        rebuilt(tmp_path, pre="viking")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"types": [1, 1]}, "2 entries for"),
        ({"merges": ["nospace"]}, "holds 'nospace', not two tokens"),
        ({"merges": ["zz yy"]}, "does not fit its tokens"),
        ({"ids": [("eos", 99999)]}, "is 99999, but there are"),
        ({"ids": [("bos", 99999)], "flags": [("add_bos_token", True)]}, "is 99999, but there are"),
    ],
)
def test_fields_that_contradict_each_other_are_named(tmp_path, how, message):
    with pytest.raises(CheckpointInvalid, match=message):
        rebuilt(tmp_path, pre="smollm", **how)
