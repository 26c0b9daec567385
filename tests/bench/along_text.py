"""What a served model says at every place of a text, for benches of accuracy: logits by teacher forcing, figures against a base.

The text is written for this and is nobody's: no model has learnt it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer

from antiphon.testing import LocalCluster

TEXT = """The ferry leaves the northern quay at seven, an hour before the market opens, and most of the passengers carry
baskets. On Tuesdays the fishmonger's daughter sells smoked eel from a blue cart beside the ticket window, and
people say that the queue for eel is longer than the queue for tickets. The captain, who has made the crossing
for thirty-one years, steers with one hand and holds a mug of tea in the other. He says that the sea is like a
cat: it sleeps most of the day, and you should not trust it when it does not.

To make the soup, peel four potatoes and cut them into small cubes. Melt a spoon of butter in a heavy pot, add
one chopped onion, and stir until the onion is soft but not brown. Add the potatoes, a litre of water and a
little salt, and let it boil gently for twenty minutes. If you like it smooth, press it through a sieve; if
you like it rough, leave it as it is. Serve it with bread and parsley.

A queue keeps its items in the order in which they came. Each worker takes the oldest item, does the work, and
puts the result into a second queue. When a worker fails, the item that it held goes back to the front of the
first queue, so that no work is lost. This is simple, but it has one weakness: a single item that always makes
workers fail will be tried again and again, and stop everyone else.
"""


def tokens_of(checkpoint: Path, length: int) -> list[int]:
    """The text's first tokens."""
    ids = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(TEXT).ids
    return ids[:length]


def logits_along(cluster: LocalCluster, tokens: list[int], first: int) -> torch.Tensor:
    """fp32 [len(tokens) - first, V]: what follows tokens[:n], for n from ``first`` to all but the last.

    Wants prefix caching, or it is slow.
    """
    halves, seen = cluster.generating[0].worker.halves, []
    compute = halves.logits
    halves.logits = lambda x_RD: seen.append(compute(x_RD)) or seen[-1]  # type: ignore[method-assign,func-returns-value]
    cluster.generate(tokens, max_tokens=1, num_logprobs=0)  # leaves the text's KV behind, made in one go as prompts are
    seen.clear()
    for n in range(first, len(tokens)):
        cluster.generate(tokens[:n], max_tokens=1, num_logprobs=0)
    halves.logits = compute  # type: ignore[method-assign]
    return torch.cat(seen).float()


def against(logits: torch.Tensor, base: torch.Tensor, tokens: list[int], first: int) -> dict[str, float]:
    """How far logits are from a base's at the same places, and how well either foretells the text."""
    log_p, log_q = torch.log_softmax(base, -1), torch.log_softmax(logits, -1)
    error = (logits - base).abs()
    follow = torch.tensor(tokens[first:])[:, None]
    return {
        "positions": len(logits),
        "perplexity": float((-log_q.gather(1, follow).mean()).exp()),
        "perplexity_of_base": float((-log_p.gather(1, follow).mean()).exp()),
        "greedy_agreement": float((logits.argmax(-1) == base.argmax(-1)).float().mean()),
        "mean_kl_nats": float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        "max_logit_error": float(error.max()),
        "mean_logit_error": float(error.mean()),
        "logit_spread": float(base.std()),
    }
