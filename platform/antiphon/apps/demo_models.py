"""Two very small models, made on this machine in about a minute each, for the composition demo (control speed).

Byte-level Llamas of 0.2 million parameters, trained from nothing on lines that are drawn here: one spells, reverses and counts
letters, one adds and subtracts in steps. Both are things that a language model of whole-word tokens does badly. Their weights,
size and vocabulary are their own: they differ from the other experts as models, not as prompts. Must not know: routers, serving.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F

SKILLS: Final = ("letters", "sums")
VERSION: Final = 1  # raise it when the recipe changes: it is part of the directory's name

_LAYERS, _HIDDEN, _HEADS, _INTERMEDIATE = 2, 96, 4, 256
_CONTEXT = 256
_THETA = 10_000.0
_STEPS, _BATCH, _LENGTH = 1000, 32, 64
_LEARNING_RATE = 4e-3
_EOS, _QUESTION, _ANSWER = 0, 1, 2  # ids of the special tokens; bytes follow in the order of the byte-level alphabet
_SPECIAL = ("<|end|>", "<|question|>", "<|answer|>")

FORMS: Final = {
    "letters": {
        "spell": ("Spell the word {w}.", "How do you spell {w}?", "spell {w}"),
        "reverse": ("Write {w} backwards.", "Reverse the word {w}.", "reverse {w}"),
        "count": ("How many letters does {w} have?", "Count the letters of {w}.", "count the letters in {w}"),
    },
    "sums": {
        "add": ("What is {a} + {b}?", "Add {a} and {b}.", "How much is {a} plus {b}?"),
        "subtract": ("What is {a} - {b}?", "Subtract {b} from {a}.", "How much is {a} minus {b}?"),
    },
}


def draw(skill: str, source: random.Random) -> tuple[str, str]:
    """A question of the skill and its right answer; words are made up, numbers have two digits."""
    task = source.choice(sorted(FORMS[skill]))
    form = source.choice(FORMS[skill][task])
    if skill == "letters":
        word = "".join(source.choice(string.ascii_lowercase) for _ in range(source.randint(2, 9)))
        return form.format(w=word), _letters(task, word)
    first, second = source.randint(10, 99), source.randint(10, 99)
    if task == "subtract" and first < second:
        first, second = second, first
    return form.format(a=first, b=second), _sum(task, first, second)


def _letters(task: str, word: str) -> str:
    match task:
        case "spell":
            return "-".join(word)
        case "reverse":
            return "-".join(reversed(word))
        case _:
            return " ".join(f"{letter}{place}" for place, letter in enumerate(word, start=1)) + f": {len(word)}"


def _sum(task: str, first: int, second: int) -> str:
    """In steps, units first, as it is done on paper."""
    (tens, units), (more_tens, more_units) = divmod(first, 10), divmod(second, 10)
    if task == "add":
        carry = (units + more_units) // 10
        steps = f"{units}+{more_units}={units + more_units}, {tens}+{more_tens}+{carry}={tens + more_tens + carry}"
        return f"{steps}: {first + second}"
    borrow = int(units < more_units)
    left = units + 10 * borrow
    steps = f"{left}-{more_units}={left - more_units}, {tens}-{more_tens}-{borrow}={tens - more_tens - borrow}"
    return f"{steps}: {first - second}"


def ensure(skill: str, cache: Path, say: Callable[[str], None] = lambda _text: None) -> Path:
    """The checkpoint's directory, made when it is not there yet."""
    path = cache / f"demo-{skill}-{VERSION}"
    if (path / "config.json").is_file():
        return path
    say(f"Training the {skill} expert: a minute or two, once")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{path.name}-", dir=path.parent))
    try:
        write(scratch, train(skill, seed=0))
        os.replace(scratch, path)
    except OSError:
        if not (path / "config.json").is_file():  # else another process was quicker
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return path


def alphabet() -> list[str]:
    """Symbols of the byte-level alphabet, in the order of their ids after the special tokens."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def train(skill: str, *, seed: int, num_steps: int = _STEPS) -> dict[str, torch.Tensor]:
    """Weights under the names of a Llama checkpoint; equal seeds give equal weights on one machine."""
    generator = torch.Generator().manual_seed(seed)
    source = random.Random(seed)
    ids = {symbol: i for i, symbol in enumerate([*_SPECIAL, *alphabet()])}
    weights = _initial(len(ids), generator)
    for weight in weights.values():
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights.values(), lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=num_steps, pct_start=0.1)
    for _ in range(num_steps):
        tokens_BT, target_BT = _batch(skill, source, ids)
        loss = F.cross_entropy(_forward(weights, tokens_BT).flatten(0, 1), target_BT.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        schedule.step()
    return {name: weight.detach() for name, weight in weights.items()}


def write(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """A checkpoint directory as any other: weights, configuration, tokenizer, chat template."""
    from safetensors.torch import save_file
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    save_file(weights, str(path / "model.safetensors"), metadata={"format": "pt"})
    words = {symbol: i for i, symbol in enumerate([*_SPECIAL, *alphabet()])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    tokenizer.save(str(path / "tokenizer.json"))
    files: dict[str, Any] = {
        "tokenizer_config.json": {
            "eos_token": _SPECIAL[_EOS],
            "chat_template": _SPECIAL[_QUESTION] + "{{ messages[-1].content }}" + _SPECIAL[_ANSWER],
        },
        "generation_config.json": {"eos_token_id": _EOS},
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": _HIDDEN,
            "intermediate_size": _INTERMEDIATE,
            "num_hidden_layers": _LAYERS,
            "num_attention_heads": _HEADS,
            "num_key_value_heads": _HEADS,
            "head_dim": _HIDDEN // _HEADS,
            "hidden_act": "silu",
            "vocab_size": len(words),
            "max_position_embeddings": _CONTEXT,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": _THETA},
            "tie_word_embeddings": True,
            "eos_token_id": _EOS,
            "torch_dtype": "float32",
        },
    }
    for name, value in files.items():
        (path / name).write_text(json.dumps(value, indent=1))


def _batch(skill: str, source: random.Random, ids: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and what follows each; only answers are learnt."""
    tokens_BT = torch.zeros(_BATCH, _LENGTH, dtype=torch.long)
    target_BT = torch.full((_BATCH, _LENGTH), -100, dtype=torch.long)
    for b in range(_BATCH):
        question, right = draw(skill, source)
        asked = [_QUESTION, *_encode(question, ids), _ANSWER]
        row = [*asked, *_encode(right, ids), _EOS][: _LENGTH + 1]
        tokens_BT[b, : len(row) - 1] = torch.tensor(row[:-1])
        target_BT[b, len(asked) - 1 : len(row) - 1] = torch.tensor(row[len(asked) :])
    return tokens_BT, target_BT


def _encode(text: str, ids: dict[str, int]) -> list[int]:
    """Byte-level ids; a space is the alphabet's own sign for it."""
    return [ids["Ġ" if symbol == " " else symbol] for symbol in text]


def _initial(vocab_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    def normal(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * scale * columns**-0.5

    weights = {"model.embed_tokens.weight": normal(vocab_size, _HIDDEN), "model.norm.weight": torch.ones(_HIDDEN)}
    for i in range(_LAYERS):
        name = f"model.layers.{i}."
        weights |= {
            name + "input_layernorm.weight": torch.ones(_HIDDEN),
            name + "post_attention_layernorm.weight": torch.ones(_HIDDEN),
            name + "self_attn.q_proj.weight": normal(_HIDDEN, _HIDDEN),
            name + "self_attn.k_proj.weight": normal(_HIDDEN, _HIDDEN),
            name + "self_attn.v_proj.weight": normal(_HIDDEN, _HIDDEN),
            name + "self_attn.o_proj.weight": normal(_HIDDEN, _HIDDEN, 0.5),
            name + "mlp.gate_proj.weight": normal(_INTERMEDIATE, _HIDDEN),
            name + "mlp.up_proj.weight": normal(_INTERMEDIATE, _HIDDEN),
            name + "mlp.down_proj.weight": normal(_HIDDEN, _INTERMEDIATE, 0.5),
        }
    return weights


def _forward(weights: dict[str, torch.Tensor], tokens_BT: torch.Tensor) -> torch.Tensor:
    """Logits, as any Llama gives them."""
    h = F.embedding(tokens_BT, weights["model.embed_tokens.weight"])
    num_rows, length, head_dim = *tokens_BT.shape, _HIDDEN // _HEADS
    angle = torch.arange(length)[:, None] * _THETA ** (-torch.arange(0, head_dim, 2) / head_dim)
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(num_rows, length, _HEADS, head_dim).transpose(1, 2)

    for i in range(_LAYERS):
        name = f"model.layers.{i}."
        x = F.rms_norm(h, (_HIDDEN,), weights[name + "input_layernorm.weight"], 1e-5)
        q, k, v = (heads(F.linear(x, weights[f"{name}self_attn.{p}_proj.weight"])) for p in "qkv")
        mixed = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        h = h + F.linear(mixed.transpose(1, 2).reshape(num_rows, length, _HIDDEN), weights[name + "self_attn.o_proj.weight"])
        x = F.rms_norm(h, (_HIDDEN,), weights[name + "post_attention_layernorm.weight"], 1e-5)
        gated = F.silu(F.linear(x, weights[name + "mlp.gate_proj.weight"])) * F.linear(x, weights[name + "mlp.up_proj.weight"])
        h = h + F.linear(gated, weights[name + "mlp.down_proj.weight"])
    h = F.rms_norm(h, (_HIDDEN,), weights["model.norm.weight"], 1e-5)
    return F.linear(h, weights["model.embed_tokens.weight"])
