"""Whether a worker's image does what it is for: all modules import, the kernels load, a deployment on Ray answers (build speed).

    python check.py

What this imports leaves bytecode behind, see trim.py.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import antiphon
import antiphon_operator
from antiphon.models.native.library import available

# Of extras that the image does not have: training of compositions, kernels of cards on a machine without.
LEFT_OUT = ("antiphon.coe.judging", "antiphon.coe.training", "antiphon.apps.demo", "antiphon.apps.bench", "antiphon.models.cards")
HIDDEN, LAYERS, INNER, HEAD, HEADS = 64, 2, 128, 16, 4


def import_everything() -> None:
    """Import all modules of ours, and the entries of Ray that its own processes start at."""
    for package in (antiphon, antiphon_operator):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.startswith(LEFT_OUT) and not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    for name in ("ray.serve", "ray.dashboard.head", "ray.dashboard.agent", "ray.autoscaler.v2.monitor", "huggingface_hub", "minio"):
        importlib.import_module(name)


def write_checkpoint(into: Path) -> None:
    """A Llama of two layers with random weights, over bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "</s>": 1} | {letter: 2 + i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(into / "tokenizer.json"))
    vocabulary = tokenizer.get_vocab_size()
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    config = sizes | {"num_key_value_heads": HEADS, "head_dim": HEAD, "vocab_size": vocabulary, "max_position_embeddings": 512}
    names = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    numbers = {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1}
    template = {"chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}", "eos_token": "</s>"}
    (into / "tokenizer_config.json").write_text(json.dumps(template))
    (into / "config.json").write_text(json.dumps(config | names | numbers))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (HIDDEN, INNER)}
        shapes |= {f"{layer}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    torch.manual_seed(0)
    save_file({name: torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()}, into / "model.safetensors")


def main() -> None:
    """Exit with a word about the first thing that fails."""
    import_everything()
    if not available():
        sys.exit("no kernels for the machine that builds the image")
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory))
        command = ["antiphon", "serve", directory, "--topology", "afd", "--ask", "Hello", "--dashboard", "--timeout", "900"]
        subprocess.run(command, check=True, timeout=1200)


if __name__ == "__main__":
    main()
