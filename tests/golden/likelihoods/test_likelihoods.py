"""Log-likelihoods of prompts equal transformers', whatever the wiring, the chunks and what the prefix cache holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from antiphon.testing import LocalCluster, wiring, write_tiny_llama

PROMPT = [(7 * i + i * i) % 250 + 3 for i in range(70)]


@pytest.mark.parametrize(("topology", "counts"), [("monolith", {}), ("afd", {"ffn": 2}), ("pd", {}), ("pd-afd", {})])
def test_a_prompt_s_likelihoods_are_those_of_transformers(tmp_path: Path, topology: str, counts: dict[str, int]) -> None:
    checkpoint = write_tiny_llama(tmp_path / "tiny")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        logprobs_TV = torch.log_softmax(model(torch.tensor([PROMPT])).logits[0].float(), dim=-1)
    spec = wiring(checkpoint, topology, scheduler={"maxNumBatchedTokens": 32, "remotePrefillMinTokens": 1}, **counts)  # type: ignore[arg-type]
    with LocalCluster(spec, checkpoint) as cluster:
        cluster.generate(PROMPT, max_tokens=1)  # leaves its prefix in the cache
        prefill = 0 if topology.startswith("pd") else None
        name = cluster.submit(PROMPT, max_tokens=1, num_prompt_logprobs=2, prefill=prefill)
        cluster.run()
        found = cluster.outputs[name].prompt_logprobs
    assert sorted(found) == list(range(1, len(PROMPT)))
    for position, logprob in found.items():
        expected = logprobs_TV[position - 1]
        assert logprob.token_id == PROMPT[position]
        assert logprob.logprob == pytest.approx(float(expected[PROMPT[position]]), abs=1e-4)
        assert [token for token, _ in logprob.top] == expected.topk(2).indices.tolist()
