"""For tests, ours and our users': a whole deployment in one process, tiny models, a hand-set clock (control speed).

``LocalCluster`` wires real engines and FFN workers over loopback links and steps them in turn, so that a test of any topology is
deterministic and needs no process. Must not know: pytest.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from antiphon.apps.process.wiring.build import AttentionPart, build_attention, build_ffn
from antiphon.apps.process.wiring.resolve import ModelFacts, resolve_model
from antiphon.apps.process.wiring.sizes import afd_layout, ffn_parallelism, kv_link_layout, num_ubatches
from antiphon.connectors.afd.expert_map import ExpertMap
from antiphon.core.document.spec import LLMDeploymentSpec
from antiphon.core.errors import DeadlineExceeded, ErrorInfo
from antiphon.core.ids import Epoch, FFNShard, Role, WorkerId
from antiphon.core.request import FinishReason, Request, RequestId, RequestOutput, SamplingParams, TokenLogprob
from antiphon.device.device import CPU, Device, open_device
from antiphon.models.experts.placement import ExpertPlacement
from antiphon.transport.base import Hello
from antiphon.transport.loopback import loopback_pair
from antiphon.worker.ffn_worker import FFNWorker

CARD_VARIABLE = "ANTIPHON_TEST_CARD"  # 1: workers of a LocalCluster compute on this machine's card


class FakeClock:
    """Seconds that pass only when told."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        """The time now."""
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now_s += seconds


@dataclass(slots=True, kw_only=True)
class Generated:
    """What one request has got so far."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: dict[int, TokenLogprob] = field(default_factory=dict)
    finish_reason: FinishReason | None = None
    error: ErrorInfo | None = None
    last: RequestOutput | None = None


def wiring(
    uri: str | Path,
    topology: str,
    *,
    attention: int = 1,
    ffn: int = 1,
    expert_groups: int = 1,
    prefill: int = 1,
    ffn_replicas: int = 1,
    dtype: str = "float32",
    **sections: Mapping[str, Any],
) -> LLMDeploymentSpec:
    """A spec of xAyF: ``ffn`` slices x ``expert_groups``, ``ffn_replicas`` workers each. ``sections`` are camelCase overrides."""
    pools: list[dict[str, Any]] = []
    if topology == "monolith":
        pools.append({"name": "monolith", "role": "monolith", "replicas": attention})
    if topology == "pd":
        pools.append({"name": "decode", "role": "decode", "replicas": attention})
    if topology in ("pd", "pd-afd"):
        pools.append({"name": "prefill", "role": "prefill", "replicas": prefill})
    if topology in ("afd", "pd-afd"):
        pools.append({"name": "attention", "role": "attention", "replicas": attention})
        pools.append(
            {
                "name": "ffn",
                "role": "ffn",
                "replicas": ffn * expert_groups * ffn_replicas,
                "parallelism": {"tensor": ffn, "expert": expert_groups},
            }
        )
    raw: dict[str, Any] = {"model": {"uri": str(uri), "dtype": dtype}, "topology": topology, "pools": pools}
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values}
    return LLMDeploymentSpec.model_validate(raw)


class LocalCluster:
    """Every worker of a deployment in this process. Not thread-safe."""

    def __init__(self, spec: LLMDeploymentSpec, checkpoint_dir: str | Path, clock: Callable[[], float] | None = None) -> None:
        self.spec = spec
        self.clock = clock if clock is not None else FakeClock()
        # The same tests run on a card where ``make gpu`` asks for it.
        device = CPU
        if os.environ.get(CARD_VARIABLE) == "1":  # as the document says how much, not all of the card: others may stand beside it
            device = Device(torch=open_device("cuda", 0.9, CARD_VARIABLE).torch)
        self.facts: ModelFacts = resolve_model(spec, str(checkpoint_dir), "test", device)
        self.outputs: dict[RequestId, Generated] = {}
        self.ffns: list[FFNWorker] = []
        self.generating: list[AttentionPart] = []
        self.prefilling: list[AttentionPart] = []
        self._links = itertools.count()
        for pool in spec.pools:
            for index in range(pool.replicas):
                self._add(pool.worker_role, WorkerId(f"test/{pool.name}/{index}"), index)
        self._connect()

    def _add(self, role: Role, worker_id: WorkerId, index: int) -> None:
        if role is Role.FFN:
            tensor, expert = ffn_parallelism(self.spec)
            shard = FFNShard.of(index % (tensor * expert), num_tensor=tensor, num_expert=expert)
            self.ffns.append(build_ffn(self.facts, shard, Epoch(1)))
            return
        part = build_attention(self.facts, self.spec, role, worker_id, Epoch(1), self._take, self.clock, index=index, hold_s=0.2)
        (self.prefilling if role is Role.PREFILL else self.generating).append(part)

    def _connect(self) -> None:
        for a, part in enumerate(self.generating):
            if part.ffn is None:
                for f in range(len(self.ffns)):
                    self.connect_ffn(a, f)
            for p, prefill in enumerate(self.prefilling):
                near, far = loopback_pair(
                    Hello(
                        worker_id=WorkerId(f"test/generating/{a}"),
                        epoch=Epoch(1),
                        layout=kv_link_layout(self.facts, decode_end=True),
                    ),
                    Hello(
                        worker_id=WorkerId(f"test/prefill/{p}"), epoch=Epoch(1), layout=kv_link_layout(self.facts, decode_end=False)
                    ),
                )
                assert part.decode_side is not None
                assert prefill.prefill_side is not None
                part.decode_side.add_link(near)
                prefill.prefill_side.add_link(far)

    def connect_ffn(self, attention: int, ffn: int) -> None:
        """Link an attention worker to an FFN worker."""
        worker, part = self.ffns[ffn], self.generating[attention]
        ubatches = num_ubatches(self.spec, Role.ATTENTION)
        number = next(self._links)
        near, far = loopback_pair(
            Hello(
                worker_id=WorkerId(f"test/attention/{attention}"),
                epoch=Epoch(1),
                layout=afd_layout(self.facts, self.spec, worker.halves.shard, attention_end=True, ubatches=ubatches),
            ),
            Hello(
                worker_id=WorkerId(f"test/ffn/{ffn}/{number}"),
                epoch=Epoch(1),
                layout=afd_layout(self.facts, self.spec, worker.halves.shard, attention_end=False, ubatches=ubatches),
            ),
        )

        def pump() -> None:
            worker.pump()

        near.on_poll = pump
        part.worker.afd.add_link(worker.halves.shard.index, near)
        worker.side.add_link(far)

    def rebalance(self, placement: ExpertPlacement) -> None:
        """Bring a new placement in while requests run: hold, switch, and with ``settle`` let go of the rest."""
        for worker in self.ffns:
            worker.halves.hold(placement)
        for part in self.generating:
            part.worker.rebalance(ExpertMap(self.facts.config, placement))

    def settle(self, placement: ExpertPlacement) -> None:
        """Let FFN workers release what the placement in use does not want of them."""
        for worker in self.ffns:
            worker.halves.release(placement)

    # ---- use ---------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int],
        *,
        request_id: str | None = None,
        on: int = 0,
        prefill: int | None = None,
        deadline_s: float | None = None,
        eos: Sequence[int] = (),
        output: Sequence[int] = (),
        **sampling: Any,
    ) -> RequestId:
        """Submit to generating worker ``on``; ``prefill`` names a prefill worker by index, ``output`` is what another made.
        Greedy unless told otherwise.
        """
        params = {"max_tokens": 16, "temperature": 0.0, **sampling}
        name = RequestId(request_id if request_id is not None else f"request-{len(self.outputs)}")
        self.outputs[name] = Generated()
        self.generating[on].engine.submit(
            Request(
                request_id=name,
                prompt_token_ids=tuple(prompt),
                output_token_ids=tuple(output),
                sampling=SamplingParams(**params),
                eos_token_ids=frozenset(eos),
                arrival_s=self.clock(),
                deadline_s=deadline_s,
                prefill_worker=None if prefill is None else f"test/prefill/{prefill}",
            )
        )
        return name

    def step(self) -> bool:
        """One step of every engine; False when all were idle."""
        busy = [part.engine.step() for part in (*self.prefilling, *self.generating)]
        return any(busy) or any(part.engine.scheduler.has_requests for part in (*self.prefilling, *self.generating))

    def run(self, max_steps: int = 100_000) -> None:
        """Step until every request has ended.

        Raises:
            DeadlineExceeded: not within max_steps.
        """
        for _ in range(max_steps):
            if not self.step() and all(g.finish_reason is not None for g in self.outputs.values()):
                return
        raise DeadlineExceeded(f"requests did not end within {max_steps} steps")

    def generate(self, prompt: Sequence[int], **options: Any) -> list[int]:
        """Run one request to its end; its tokens."""
        name = self.submit(prompt, **options)
        self.run()
        return self.outputs[name].token_ids

    def close(self) -> None:
        """Close all links; idempotent."""
        for part in (*self.generating, *self.prefilling):
            part.close()
        for worker in self.ffns:
            worker.side.close()

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _take(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            got = self.outputs.get(output.request_id)
            if got is None:
                continue  # a hand-off on a prefill worker
            got.token_ids += output.new_token_ids
            got.logprobs += output.logprobs
            got.prompt_logprobs.update(output.prompt_logprobs)
            got.last = output
            if output.finish_reason is not None:
                got.finish_reason = output.finish_reason
                got.error = output.error


def unsettle(model: torch.nn.Module) -> None:
    """Fresh models have zero biases, unit norms and weights so small that experts hardly matter: a mistake would hide."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("bias") or "norm" in name:
                tensor.add_(torch.randn_like(tensor) * 0.2)
            elif tensor.dim() > 1 and "embed" not in name:
                tensor.mul_(4.0)


def write_tiny_llama(path: Path, *, vocab_size: int = 384, seed: int = 0) -> Path:
    """A checkpoint directory of a random two-layer Llama with a byte-level tokenizer and a chat template; about 200 kB.

    Its answers mean nothing, but every byte string can be asked, so that whole systems can be tested in seconds.
    """
    return _write_tiny(path, vocab_size, seed, num_experts=0)


def write_tiny_moe(path: Path, *, num_experts: int = 8, vocab_size: int = 384, seed: int = 0) -> Path:
    """The same with a mixture of experts in each layer (Qwen3-MoE, two of ``num_experts`` per row)."""
    return _write_tiny(path, vocab_size, seed, num_experts=num_experts)


def _write_tiny(path: Path, vocab_size: int, seed: int, num_experts: int) -> Path:
    from safetensors.torch import save_file
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    path.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    hidden, intermediate, heads, kv_heads, head_dim, layers = 48, 96, 4, 2, 12, 2

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.25

    def ffn(prefix: str) -> dict[str, torch.Tensor]:
        return {
            prefix + "gate_proj.weight": weight(intermediate, hidden),
            prefix + "up_proj.weight": weight(intermediate, hidden),
            prefix + "down_proj.weight": weight(hidden, intermediate),
        }

    tensors = {"model.embed_tokens.weight": weight(vocab_size, hidden), "model.norm.weight": torch.ones(hidden)}
    for i in range(layers):
        name = f"model.layers.{i}."
        tensors |= {
            name + "input_layernorm.weight": torch.ones(hidden),
            name + "post_attention_layernorm.weight": torch.ones(hidden),
            name + "self_attn.q_proj.weight": weight(heads * head_dim, hidden),
            name + "self_attn.k_proj.weight": weight(kv_heads * head_dim, hidden),
            name + "self_attn.v_proj.weight": weight(kv_heads * head_dim, hidden),
            name + "self_attn.o_proj.weight": weight(hidden, heads * head_dim),
        }
        if num_experts == 0:
            tensors |= ffn(name + "mlp.")
            continue
        tensors |= {
            name + "self_attn.q_norm.weight": torch.ones(head_dim),
            name + "self_attn.k_norm.weight": torch.ones(head_dim),
            name + "mlp.gate.weight": weight(num_experts, hidden),
        }
        for expert in range(num_experts):
            tensors |= ffn(f"{name}mlp.experts.{expert}.")
    save_file(tensors, str(path / "model.safetensors"), metadata={"format": "pt"})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|im_start|>", "<|im_end|>"]
    words = {symbol: i for i, symbol in enumerate([*special, *alphabet])}
    words |= {f"<filler_{i}>": i for i in range(len(words), vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(path / "tokenizer.json"))
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    kind: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if num_experts:
        kind = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_experts": num_experts,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": intermediate,
            "norm_topk_prob": True,
        }
    files: dict[str, Any] = {
        "config.json": {
            **kind,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "hidden_act": "silu",
            "vocab_size": vocab_size,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": True,
            "eos_token_id": 1,
            "torch_dtype": "float32",
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": template,
            "eos_token": "<|im_end|>",
        },
        "generation_config.json": {"eos_token_id": 1},
    }
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    return path
