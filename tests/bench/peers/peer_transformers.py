"""transformers under measurement: a plain greedy loop over its own cache (runs in an environment of its own).

Started with the checkpoint's directory and the number of threads; speaks ``peer_line``.
"""

import sys
import time
from typing import Any

from peer_line import answer, decode_figures, keep_stdout, prompts

PRIVATE = keep_stdout()

import torch  # noqa: E402
import transformers  # noqa: E402


class Transformers:
    """One model, eager, bf16."""

    def __init__(self, path: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()

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
    answer(Transformers(sys.argv[1], int(sys.argv[2])), PRIVATE)
