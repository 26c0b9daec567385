"""Two very small models, made on this machine in about a minute, for the composition demo (control speed).

Byte-level Llamas of a tenth of a million parameters, trained from nothing on lines that are drawn here: one knows the Morse code
of letters and digits, one adds and subtracts numbers of two digits in steps. A general model of a thousand times their size does
both badly. Their weights, size and vocabulary are their own: they differ from the other experts as models, not as prompts. One
question in four is kept from training, to see what was learnt. Must not know: routers, serving.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import string
import tempfile
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F

SKILLS: Final = ("morse", "sums")

_LAYERS, _HIDDEN, _HEADS, _INTERMEDIATE = 2, 64, 4, 128
_CONTEXT = 256
_THETA = 100.0  # questions are short
_BATCH = 32
_LEARNING_RATE = 5e-3
_STEPS: Final = {"morse": 500, "sums": 800}
_EOS, _QUESTION, _ANSWER = 0, 1, 2  # ids of the special tokens; bytes follow in the order of the byte-level alphabet
_SPECIAL = ("<|end|>", "<|question|>", "<|answer|>")

FORMS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "morse": {
        "encode": (
            "What is {x} in Morse code?",
            "Write {x} in Morse code.",
            "How is {x} sent in Morse code?",
            "Morse code for {x}",
            "Give me the Morse code of {x}.",
            "Translate {x} to Morse code.",
            "{x} in Morse",
            "How do I tap {x} in Morse code?",
            "What does {x} look like in Morse?",
            "Which dots and dashes are {x}?",
        ),
    },
    "sums": {
        "add": ("What is {a} + {b}?", "Add {a} and {b}.", "How much is {a} plus {b}?"),
        "subtract": ("What is {a} - {b}?", "Subtract {b} from {a}.", "How much is {a} minus {b}?"),
    },
}
_CODES: Final = (
    ".-", "-...", "-.-.", "-..", ".", "..-.", "--.", "....", "..", ".---", "-.-", ".-..", "--",
    "-.", "---", ".--.", "--.-", ".-.", "...", "-", "..-", "...-", ".--", "-..-", "-.--", "--..",
    "-----", ".----", "..---", "...--", "....-", ".....", "-....", "--...", "---..", "----.",
)  # fmt: skip
MORSE: Final = dict(zip(string.ascii_uppercase + string.digits, _CODES, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A question of a skill."""

    task: str  # a key of FORMS[skill]
    text: str
    right: str  # the whole answer that is learnt

    @property
    def held_out(self) -> bool:
        """Whether training leaves this question out: one in four, by its text."""
        return zlib.crc32(self.text.encode()) % 4 == 0


def draw(skill: str, source: random.Random, *, held_out: bool) -> Drawn:
    """A question that training has, or one that it leaves out."""
    while True:
        task = source.choice(sorted(FORMS[skill]))
        form = source.choice(FORMS[skill][task])
        drawn = _morse(task, form, source) if skill == "morse" else _sum(task, form, source)
        if drawn.held_out == held_out:
            return drawn


def _morse(task: str, form: str, source: random.Random) -> Drawn:
    sign = source.choice(sorted(MORSE))
    return Drawn(task=task, text=form.format(x=sign), right=MORSE[sign])


def _sum(task: str, form: str, source: random.Random) -> Drawn:
    """Two numbers of two digits each; the answer goes in steps, units first, as it is done on paper."""
    first, second = source.randint(10, 99), source.randint(10, 99)
    if task == "subtract" and first < second:
        first, second = second, first
    (tens, units), (more_tens, more_units) = divmod(first, 10), divmod(second, 10)
    if task == "add":
        carry = (units + more_units) // 10
        steps = f"{units}+{more_units}={units + more_units}, {tens}+{more_tens}+{carry}={tens + more_tens + carry}"
        result = first + second
    else:
        borrow = int(units < more_units)
        left = units + 10 * borrow
        steps = f"{left}-{more_units}={left - more_units}, {tens}-{more_tens}-{borrow}={tens - more_tens - borrow}"
        result = first - second
    return Drawn(task=task, text=form.format(a=first, b=second), right=f"{steps}: {result}")


def ensure(cache: Path, say: Callable[[str], None] = lambda _text: None) -> dict[str, Path]:
    """The checkpoint's directory of each skill; those that are not there yet are made, side by side."""
    paths = {skill: cache / f"demo-{skill}-{_digest()}" for skill in SKILLS}
    missing = [skill for skill, path in paths.items() if not (path / "config.json").is_file()]
    if missing:
        say(f"Training {' and '.join(missing)}, once: about a minute on idle cores")
        with ProcessPoolExecutor(len(missing), mp_context=get_context("spawn")) as pool:
            for _ in pool.map(_make, missing, [paths[skill] for skill in missing]):
                continue
    return paths


def _digest() -> str:
    """Of this recipe: another one gets directories of its own."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


def _make(skill: str, path: Path) -> None:
    torch.set_num_threads(1)
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


def alphabet() -> list[str]:
    """Symbols of the byte-level alphabet, in the order of their ids after the special tokens."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def train(skill: str, *, seed: int, num_steps: int | None = None) -> dict[str, torch.Tensor]:
    """Weights under the names of a Llama checkpoint; equal seeds give equal weights on one machine."""
    num_steps = _STEPS[skill] if num_steps is None else num_steps
    generator = torch.Generator().manual_seed(seed)
    source = random.Random(seed)
    ids = {symbol: i for i, symbol in enumerate([*_SPECIAL, *alphabet()])}
    weights = _initial(len(ids), generator)
    for weight in weights.values():
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights.values(), lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=num_steps, pct_start=0.1)
    for _ in range(num_steps):
        tokens_BT, target_BT = _batch(skill, source, ids)
        learnt_BT = target_BT >= 0
        loss = F.cross_entropy(_forward(weights, tokens_BT)[learnt_BT], target_BT[learnt_BT])
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
    """Tokens and what follows each; -1 where nothing is learnt: only answers are."""
    rows = []
    for _ in range(_BATCH):
        drawn = draw(skill, source, held_out=False)
        asked = [_QUESTION, *_encode(drawn.text, ids), _ANSWER]
        rows.append((len(asked), [*asked, *_encode(drawn.right, ids), _EOS]))
    length = max(len(row) for _, row in rows) - 1
    tokens_BT = torch.zeros(_BATCH, length, dtype=torch.long)
    target_BT = torch.full((_BATCH, length), -1, dtype=torch.long)
    for b, (num_asked, row) in enumerate(rows):
        tokens_BT[b, : len(row) - 1] = torch.tensor(row[:-1])
        target_BT[b, num_asked - 1 : len(row) - 1] = torch.tensor(row[num_asked:])
    return tokens_BT, target_BT


def _encode(text: str, ids: dict[str, int]) -> list[int]:
    """Byte-level ids; a space is the alphabet's own sign for it."""
    return [ids["Ġ" if symbol == " " else symbol] for symbol in text]


def _initial(vocab_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    def normal(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        drawn: torch.Tensor = torch.randn(rows, columns, generator=generator) * (scale * columns**-0.5)
        return drawn

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
