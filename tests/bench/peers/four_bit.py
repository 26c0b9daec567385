"""A GGUF file's four bits kept in memory, ours beside llama.cpp's in one run: perplexity of a text, and what the process holds.

    python tests/bench/peers/four_bit.py                                SmolLM2's own Q4_1 file
    python tests/bench/peers/four_bit.py --gguf FILE --length 512
    python tests/bench/peers/four_bit.py --llama-cpp PYTHON             an interpreter that has llama_cpp, instead of making one

A JSON line a system, each in a process of its own: ours with the file's numbers in fp32 and in bf16, ours in four bits computing in
either, llama.cpp with the file as it is. All read the same token ids. ``resident_bytes``: what loading and reading the text add to
the process's memory (VmRSS, mapped files with it); ``anonymous_bytes``: without mapped files; ``weight_bytes``: ours, as counted.
llama.cpp rounds activations to 8 bits, we don't. Where it can't be had its line says why.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from peer_environments import RECIPES, PeerAbsent, default_cache, python_of
from peer_line import TEXT_CHUNK, resident
from peers import DEMO_MODEL

HERE = Path(__file__).parent
FIRST = 16  # tokens before the first place
CHOICES = (("exact", "float32"), ("exact", "bfloat16"), ("four-bit", "float32"), ("four-bit", "bfloat16"))  # stored, computed
TIMEOUT_S = 1200.0


def ours(checkpoint: Path, dtype: str, tokens: list[int]) -> dict[str, Any]:
    """In this process: the text as one prompt, and its tokens' likelihoods."""
    from antiphon.testing import LocalCluster, wiring

    before = resident()
    model = {"uri": str(checkpoint), "dtype": dtype, "maxModelLen": len(tokens) + 8}
    cache, scheduler = {"numBlocks": len(tokens) // 16 + 2}, {"maxNumBatchedTokens": TEXT_CHUNK}
    spec = wiring(checkpoint, "monolith", dtype=dtype, model=model, cache=cache, scheduler=scheduler)
    with LocalCluster(spec, checkpoint) as cluster:
        name = cluster.submit(tokens, max_tokens=1, num_prompt_logprobs=0)
        cluster.run()
        likelihoods = cluster.outputs[name].prompt_logprobs
        after, weight_bytes = resident(), sum(cluster.generating[0].resident_bytes.values())
    places = [at for at in likelihoods if at >= FIRST]
    mean = sum(likelihoods[at].logprob for at in places) / len(places)
    used = {key: after[key] - before[key] for key in after}
    return {"positions": len(places), "perplexity": math.exp(-mean), **used, "weight_bytes": weight_bytes}


def _child(*command: object) -> dict[str, Any]:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=TIMEOUT_S, cwd=HERE, check=False)
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        raise PeerAbsent(f"{command[0]} {command[1]} ended with {done.returncode}: {''.join(last)}")
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def main() -> None:
    """Print a line a system."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", default=DEMO_MODEL, help="file or uri")
    parser.add_argument("--length", type=int, default=256, help="tokens of the text")
    parser.add_argument("--llama-cpp", type=Path, help="an interpreter that has llama_cpp")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where peers' environments are kept")
    parser.add_argument("--ours", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ours:
        checkpoint, dtype, text = args.ours
        print(json.dumps(ours(Path(checkpoint), dtype, json.loads(Path(text).read_text()))))
        return
    from antiphon.models.loading.gguf_convert import convert_gguf
    from antiphon.models.loading.source import open_gguf, resolve

    sys.path.insert(0, str(HERE.parent))
    from along_text import tokens_of

    with tempfile.TemporaryDirectory() as scratch, open_gguf(args.gguf) as file:
        converted = {"exact": resolve(args.gguf), "four-bit": Path(scratch) / "four-bit"}
        convert_gguf(file, converted["four-bit"], dtype="four-bit")
        text = Path(scratch) / "tokens.json"
        text.write_text(json.dumps(tokens_of(converted["exact"], args.length)))
        for stored, dtype in CHOICES:
            line = {"bench": "four_bit", "system": "antiphon", "stored": stored, "computed": dtype}
            said = _child(sys.executable, HERE / "four_bit.py", "--ours", converted[stored], dtype, text)
            print(json.dumps(line | said), flush=True)
        line = {"bench": "four_bit", "system": "llama-cpp", "stored": "four-bit"}
        try:
            python = args.llama_cpp or python_of(RECIPES["llama-cpp"], args.cache)
            said = _child(python, HERE / "peer_llama_cpp.py", "--text", file, text, FIRST)
        except PeerAbsent as error:
            said = {"absent": str(error)}
        print(json.dumps(line | said), flush=True)


if __name__ == "__main__":
    main()
