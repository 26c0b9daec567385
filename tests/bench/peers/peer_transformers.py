"""transformers under measurement: a plain greedy loop over its own cache (runs in an environment of its own).

Started with the checkpoint's directory, the number of threads and a mode; speaks ``peer_line``. Modes: ``default`` (what
``from_pretrained`` gives), ``eager`` and ``batched_mm`` (other ways to compute experts), ``compiled`` (torch.compile), ``float32``.
"""

import sys
import time
from typing import Any

from peer_line import answer, decode_figures, keep_stdout, prompts

PRIVATE = keep_stdout()

import torch  # noqa: E402
import transformers  # noqa: E402


class Transformers:
    """One model in one mode, bf16 unless that says otherwise."""

    def __init__(self, path: str, num_threads: int, mode: str) -> None:
        torch.set_num_threads(num_threads)
        dtype = torch.float32 if mode == "float32" else torch.bfloat16
        experts = {"experts_implementation": mode} if mode in ("eager", "batched_mm") else {}
        self._model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **experts).eval()
        if mode == "compiled":
            self._model.forward = torch.compile(self._model.forward, dynamic=True)

    def facts(self) -> dict[str, Any]:
        """Versions."""
        return {"version": transformers.__version__, "torch": torch.__version__}

    @torch.inference_mode()
    def decode(self, batch: int, num_prompt: int, num_generated: int) -> dict[str, Any]:
        """Steps after the first token, all rows at once."""
        ids = torch.tensor(prompts(batch, num_prompt))
        out = self._model(ids, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        for _ in range(num_generated - 1):
            out = self._model(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
        return decode_figures(batch, batch * (num_generated - 1), time.perf_counter() - start)

    @torch.inference_mode()
    def prefill(self, num_prompt: int) -> dict[str, Any]:
        """One forward pass to one token."""
        ids = torch.tensor(prompts(1, num_prompt))
        start = time.perf_counter()
        self._model(ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)
        seconds = time.perf_counter() - start
        return {"tokens_per_s": num_prompt / seconds, "ttft_s": seconds}


if __name__ == "__main__":
    answer(Transformers(sys.argv[1], int(sys.argv[2]), sys.argv[3]), PRIVATE)
