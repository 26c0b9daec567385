"""llama.cpp under measurement, through llama-cpp-python's plain binding (runs in an environment of its own).

    peer_llama_cpp.py MODEL.gguf THREADS              speaks ``peer_line``
    peer_llama_cpp.py --to-bf16 FROM.gguf TO.gguf     writes the same weights in BF16
    peer_llama_cpp.py --text MODEL.gguf TOKENS.json FIRST      perplexity of the tokens from FIRST on, and memory: a JSON line

Sequences have caches of their own (not one unified cache), as in llama.cpp's batched bench; the greedy token is
numpy's argmax.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peer_line import TEXT_CHUNK, answer, decode_figures, keep_stdout, prompts, resident

PRIVATE = keep_stdout()

import llama_cpp  # noqa: E402
import numpy as np  # noqa: E402

UBATCH = 512  # llama.cpp's own default


class LlamaCpp:
    """One model; a context per measurement, as large as it needs."""

    def __init__(self, path: str, num_threads: int) -> None:
        self._num_threads = num_threads
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"{path} can't be loaded")
        self._num_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def facts(self) -> dict[str, Any]:
        """Version, and the processor's features that the build uses."""
        return {"version": llama_cpp.__version__, "features": llama_cpp.llama_print_system_info().decode()}

    def decode(self, batch: int, num_prompt: int, num_generated: int) -> dict[str, Any]:
        """Steps after the first token, all sequences at once."""
        with self._context(batch, num_prompt + num_generated) as context:
            tokens = np.empty(batch, dtype=np.int64)
            for sequence, ids in enumerate(prompts(batch, num_prompt)):
                with _batch([(token, at, sequence, at == num_prompt - 1) for at, token in enumerate(ids)]) as rows:
                    self._run(context, rows)
                tokens[sequence] = self._greedy(context, [num_prompt - 1])[0]
            start = time.perf_counter()
            for at in range(num_prompt, num_prompt + num_generated - 1):
                with _batch([(int(token), at, sequence, True) for sequence, token in enumerate(tokens)]) as rows:
                    self._run(context, rows)
                tokens[:] = self._greedy(context, range(batch))
            return decode_figures(batch, batch * (num_generated - 1), time.perf_counter() - start)

    def prefill(self, num_prompt: int) -> dict[str, Any]:
        """One prompt to one token."""
        with self._context(1, num_prompt + 8) as context:
            (ids,) = prompts(1, num_prompt)
            start = time.perf_counter()
            with _batch([(token, at, 0, at == num_prompt - 1) for at, token in enumerate(ids)]) as rows:
                self._run(context, rows)
            self._greedy(context, [num_prompt - 1])
            seconds = time.perf_counter() - start
        return {"tokens_per_s": num_prompt / seconds, "ttft_s": seconds}

    @contextmanager
    def _context(self, batch: int, num_tokens: int) -> Iterator[Any]:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = batch * (-(-num_tokens // 256) * 256)
        params.n_batch = max(2048, batch)
        params.n_ubatch = UBATCH
        params.n_seq_max = batch
        params.n_threads = params.n_threads_batch = self._num_threads
        params.kv_unified = False
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError(f"no context of {params.n_ctx} tokens")
        try:
            yield context
        finally:
            llama_cpp.llama_free(context)

    @staticmethod
    def _run(context: Any, rows: Any) -> None:
        status = llama_cpp.llama_decode(context, rows)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def _greedy(self, context: Any, rows: Any) -> list[int]:
        tokens = []
        for row in rows:
            logits = llama_cpp.llama_get_logits_ith(context, row)
            tokens.append(int(np.ctypeslib.as_array(logits, shape=(self._num_vocab,)).argmax()))
        return tokens


@contextmanager
def _batch(rows: list[tuple[int, int, int, bool]]) -> Iterator[Any]:
    """A llama_batch of (token, position, sequence, wants logits)."""
    batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
    try:
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = wanted
        yield batch
    finally:
        llama_cpp.llama_batch_free(batch)


def to_bf16(source: str, target: str) -> None:
    """Write ``source``'s weights in BF16."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_BF16
    params.allow_requantize = True
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    if status:
        raise RuntimeError(f"llama_model_quantize returned {status}")


def perplexity(path: str, tokens: list[int], first: int) -> dict[str, Any]:
    """Of tokens[first:], each after all before it; and what loading and reading them add to the process's memory."""
    before = resident()
    model = LlamaCpp(path, len(os.sched_getaffinity(0)))
    with model._context(1, len(tokens)) as context:
        total = 0.0
        for start in range(0, len(tokens), TEXT_CHUNK):
            chunk = range(start, min(start + TEXT_CHUNK, len(tokens)))
            with _batch([(tokens[at], at, 0, True) for at in chunk]) as rows:
                model._run(context, rows)
            for at in (at for at in chunk if first <= at + 1 < len(tokens)):
                logits = llama_cpp.llama_get_logits_ith(context, at - start)
                row = np.ctypeslib.as_array(logits, shape=(model._num_vocab,)).astype(np.float64)
                total += float(row[tokens[at + 1]] - row.max() - np.log(np.exp(row - row.max()).sum()))
        after = resident()
    places = len(tokens) - first
    used = {key: after[key] - before[key] for key in after}
    return {"positions": places, "perplexity": float(np.exp(-total / places)), **used, **model.facts()}


if __name__ == "__main__":
    if sys.argv[1] == "--to-bf16":
        to_bf16(sys.argv[2], sys.argv[3])
    elif sys.argv[1] == "--text":
        with open(sys.argv[3], encoding="ascii") as text, os.fdopen(PRIVATE, "w") as out:
            out.write(json.dumps(perplexity(sys.argv[2], json.load(text), int(sys.argv[4]))) + "\n")
    else:
        answer(LlamaCpp(sys.argv[1], int(sys.argv[2])), PRIVATE)
