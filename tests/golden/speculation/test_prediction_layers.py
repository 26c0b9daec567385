"""Drafts of a checkpoint's layers for multi-token prediction are what the description of DeepSeek-V3 (arXiv 2412.19437 §2.2) gives.

Qwen3-Next's differ in names, in sharing one projection and norms, and in that a module goes on from what it made behind its norm.
transformers does not run these layers. The reference here computes the equations on whole sequences, without any cache, around
transformers' own decoder layers; checkpoints are random, of few tokens, so that drafts are taken now and then.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from transformers.generation.candidate_generator import MTPCandidateGenerator

from antiphon.core.errors import InvalidInput
from antiphon.core.request import RequestId
from antiphon.engine.speculation.drafter import DraftAsked, Proposal
from antiphon.engine.speculation.speculator import Speculator
from antiphon.testing import LocalCluster, wiring, write_tiny_llama

VOCAB, LAYERS = 7, 2
NUM_TOKENS, SAMPLED = 20, 2  # of each request; the one that is not greedy
SHAPE: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": VOCAB, "max_position_embeddings": 256,
    "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0, "moe_intermediate_size": 24, "num_experts_per_tok": 2,
    "n_routed_experts": 6, "tie_word_embeddings": False,
}  # fmt: skip


def deepseek(num_layers: int) -> Any:
    return hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(
            **SHAPE, num_hidden_layers=num_layers, num_key_value_heads=4, q_lora_rank=20, kv_lora_rank=16, qk_nope_head_dim=8,
            qk_rope_head_dim=8, v_head_dim=12, first_k_dense_replace=1, n_group=2, topk_group=1, n_shared_experts=1,
        )
    )  # fmt: skip


def glm(num_layers: int) -> Any:
    return hf.Glm4MoeForCausalLM(
        hf.Glm4MoeConfig(
            **SHAPE, num_hidden_layers=num_layers, num_key_value_heads=2, head_dim=12, attention_bias=True, use_qk_norm=True,
            n_group=2, topk_group=1,
        )
    )  # fmt: skip


def glm_flash(num_layers: int) -> Any:
    return hf.Glm4MoeLiteForCausalLM(
        hf.Glm4MoeLiteConfig(
            **SHAPE, num_hidden_layers=num_layers, num_key_value_heads=4, q_lora_rank=20, kv_lora_rank=16, qk_nope_head_dim=8,
            qk_rope_head_dim=8, v_head_dim=12,
        )
    )  # fmt: skip


def glm_sparse(num_layers: int) -> Any:
    return hf.GlmMoeDsaForCausalLM(
        hf.GlmMoeDsaConfig(
            **SHAPE, num_hidden_layers=num_layers, num_key_value_heads=4, q_lora_rank=20, kv_lora_rank=16, qk_nope_head_dim=8,
            qk_rope_head_dim=8, v_head_dim=12, first_k_dense_replace=1, index_topk=12, index_head_dim=20,
            index_n_heads=64,  # few would all be negative for some tokens: their scores would be 0 alike, and any choice right
        )
    )  # fmt: skip


def step(num_layers: int) -> Any:
    text = {
        **SHAPE, "num_hidden_layers": num_layers, "num_key_value_heads": 2, "head_dim": 12, "share_expert_dim": 20,
        "sliding_window": 9, "num_sliding_attention_heads": 6,
        "layer_types": ["full_attention", "sliding_attention", *["sliding_attention"] * (num_layers - 2)],
        "mlp_layer_types": ["dense", "sparse", *["dense"] * (num_layers - 2)],
    }  # fmt: skip
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    return hf.Step3p7ForConditionalGeneration(hf.Step3p7Config(text_config=text, vision_config=vision))


DELTA: dict[str, Any] = {
    "head_dim": 16, "num_key_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 12, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}  # fmt: skip


def hybrid(num_layers: int) -> dict[str, Any]:
    kinds = ["linear_attention", "full_attention", *["full_attention"] * (num_layers - 2)]
    known = {name: value for name, value in SHAPE.items() if name != "n_routed_experts"}
    return {**known, **DELTA, "num_hidden_layers": num_layers, "layer_types": kinds}


def qwen3_next(num_layers: int) -> Any:
    experts: dict[str, Any] = {"num_experts": 6, "shared_expert_intermediate_size": 20, "mlp_only_layers": [0]}
    return hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(**hybrid(num_layers), **experts))


def qwen3_5(num_layers: int) -> Any:
    left = ("moe_intermediate_size", "num_experts_per_tok")
    return hf.Qwen3_5ForCausalLM(hf.Qwen3_5TextConfig(**{k: v for k, v in hybrid(num_layers).items() if k not in left}))


@dataclass(frozen=True, slots=True)
class Kind:
    make: Callable[[int], Any]
    inner: str = ""  # before the module's norm and head
    head: str = "shared_head.head"
    own_heads: bool = False
    plus_one: bool = False  # norms centred on zero
    is_apart: bool = False  # modules are under "mtp.", and share all but their layers


KINDS = {
    "deepseek_v3": Kind(deepseek),
    "glm4_moe": Kind(glm),
    "glm4_moe_lite": Kind(glm_flash),
    "glm_moe_dsa": Kind(glm_sparse),
    "step3p5": Kind(step, inner="transformer.", head="shared_head.output", own_heads=True, plus_one=True),
    "qwen3_next": Kind(qwen3_next, plus_one=True, is_apart=True),
    "qwen3_5": Kind(qwen3_5, plus_one=True, is_apart=True),
}


class Reference:
    """§2.2 on whole sequences."""

    def __init__(self, kind: Kind, model: Any, modules: list[dict[str, torch.Tensor]]) -> None:
        self.kind, self.modules = kind, modules
        self.text = model.model.language_model if hasattr(model.model, "language_model") else model.model
        self.head = model.lm_head.weight
        self.blocks = [self._only(range(LAYERS + i, LAYERS + i + 1), final=False) for i in range(len(modules))]
        self.main = self._only(range(LAYERS), final=True)

    def _only(self, layers: range, *, final: bool) -> Any:
        part = copy.deepcopy(self.text)
        part.layers = torch.nn.ModuleList(part.layers[i] for i in layers)
        part.config.num_hidden_layers = len(layers)
        if getattr(part.config, "layer_types", None):
            part.config.layer_types = [self.text.config.layer_types[i] for i in layers]
        if not final:
            part.norm = torch.nn.Identity()
        return part

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.text.config.rms_norm_eps)
        return normed * (1.0 + weight if self.kind.plus_one else weight)

    @torch.no_grad()
    def drafts(self, tokens: Sequence[int], count: int) -> list[int]:
        known, embed = list(tokens), self.text.embed_tokens.weight
        hidden = self.main(input_ids=torch.tensor([known[:-1]]), use_cache=False).last_hidden_state[0]
        inputs = made = hidden
        for place in range(count):
            number = min(place, len(self.modules) - 1)
            module = self.modules[number]
            beside = torch.tensor(known[number + 1 :])  # the token number + 1 behind each row's; the last of them is a draft
            if place > number:  # beyond the last module: one more row of it, of what it made last
                hidden = torch.cat([inputs, made[-1:]])
            inputs = hidden
            joined = torch.cat([self.norm(embed[beside], module["enorm"]), self.norm(inputs, module["hnorm"])], dim=-1)
            made = self.blocks[number](inputs_embeds=(joined @ module["eh_proj"].T)[None], use_cache=False).last_hidden_state[0]
            head = module.get("head", self.head)
            known.append(int((self.norm(made[-1], module["shared_norm"]) @ head.T).argmax()))
            made = self.norm(made, module["shared_norm"]) if self.kind.is_apart else made
            hidden = made
        return known[len(tokens) :]


def write(path: Path, kind: Kind, num_modules: int) -> Reference:
    torch.manual_seed(5)
    model = kind.make(LAYERS + num_modules).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                tensor.add_(torch.randn_like(tensor) * 0.2)
            elif tensor.dim() > 1:
                tensor.mul_(6.0)
    model.save_pretrained(path)
    tensors, modules = load_file(path / "model.safetensors"), []
    first = next(name for name in tensors if name.endswith("layers.0.input_layernorm.weight"))
    layers = first.removesuffix("0.input_layernorm.weight")
    for i in range(num_modules):
        size = SHAPE["hidden_size"]
        unit = 0.0 if kind.plus_one else 1.0
        module = {name: unit + 0.2 * torch.randn(size) for name in ("enorm", "hnorm", "shared_norm")}
        module["eh_proj"] = torch.randn(size, 2 * size) * 0.2
        if kind.is_apart:
            modules.append(modules[0] if modules else module)
            continue
        prefix = f"{layers}{LAYERS + i}."
        tensors |= {f"{prefix}{name}.weight": module[name] for name in ("enorm", "hnorm", "eh_proj")}
        tensors[f"{prefix}{kind.inner}shared_head.norm.weight"] = module["shared_norm"]
        if kind.own_heads:
            module["head"] = torch.randn(VOCAB, size)
            tensors[f"{prefix}{kind.inner}{kind.head}.weight"] = module["head"]
        modules.append(module)
    if kind.is_apart:
        names = {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "shared_norm": "norm", "eh_proj": "fc"}
        for i in range(num_modules):
            own = f"{layers}{LAYERS + i}."
            tensors = {name.replace(own, f"mtp.layers.{i}."): tensor for name, tensor in tensors.items()}
        tensors |= {f"mtp.{theirs}.weight": modules[0][ours] for ours, theirs in names.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((path / "config.json").read_text())
    section = raw.get("text_config", raw)
    section |= {"num_hidden_layers": LAYERS}
    if kind.is_apart:  # the published configs of Qwen3-Next do not count them
        section["layer_types"] = section["layer_types"][:LAYERS]
    else:
        section["num_nextn_predict_layers"] = num_modules
    section.pop("per_layer_config", None)
    for name in ("layer_types", "mlp_layer_types", "indexer_types") if section is raw else ():
        if raw.get(name):
            raw[name] = raw[name][:LAYERS]
    (path / "config.json").write_text(json.dumps(raw))
    return Reference(kind, model, modules)


class Always(Speculator):
    """As many drafts as there may be, whatever they bring."""

    def _counts(self, ids: Sequence[RequestId], proposals: Sequence[Proposal], num_rows: int, room: int) -> list[int]:
        super()._counts(ids, proposals, num_rows, room)
        return [len(proposal.token_ids) for proposal in proposals]


class Recording:
    """Notes what a drafter was asked and said."""

    def __init__(self, drafter: Any) -> None:
        self.drafter = drafter
        self.name, self.is_free, self.priors = drafter.name, drafter.is_free, drafter.priors
        self.said: list[tuple[list[int], int, Proposal | None]] = []  # of greedy requests
        self.num_taken = self.num_preemptions = 0

    def propose(self, asked: Mapping[RequestId, DraftAsked]) -> Mapping[RequestId, Proposal]:
        found: Mapping[RequestId, Proposal] = self.drafter.propose(asked)
        greedy = {name: each for name, each in asked.items() if each.sampling is not None and each.sampling.greedy}
        self.said += [(list(each.token_ids), each.num_drafts, found.get(name)) for name, each in greedy.items()]
        return found

    def forget(self, request_id: RequestId) -> None:
        self.drafter.forget(request_id)


def prompt(n: int) -> list[int]:
    return [1 + (3 * n + i * i) % (VOCAB - 1) for i in range(5 + 7 * n)]


def run(
    path: Path, topology: str, *, drafts: int | None, requests: Sequence[int] = range(4), **sections: Any
) -> tuple[list[list[int]], list[Recording]]:
    speculation = {} if drafts is None else {"speculation": {"drafter": "mtp", "maxDrafts": drafts}}
    base: dict[str, Any] = {
        "cache": {"numBlocks": 64, "blockSizeTokens": 4, "prefixCaching": False},
        "scheduler": {"maxNumBatchedTokens": 32},
    }
    with LocalCluster(wiring(path, topology, **{**base, **sections, **speculation}), path) as cluster:
        recordings = []
        for part in cluster.generating if drafts is not None else ():
            speculator = part.engine.scheduler.speculator
            assert speculator is not None
            recordings.append(Recording(speculator.drafter))
            part.engine.scheduler.speculator = Always(recordings[-1], max_drafts=drafts or 1, clock=cluster.clock)
        ids = [
            cluster.submit(prompt(n), max_tokens=NUM_TOKENS, seed=n, temperature=0.8 if n == SAMPLED else 0.0,
                           prefill=0 if "pd" in topology else None)
            for n in requests
        ]  # fmt: skip
        cluster.run()
        assert [cluster.outputs[each].error for each in ids] == [None] * len(ids)
        for part, recording in zip(cluster.generating, recordings, strict=False):
            assert part.engine.scheduler.speculator is not None
            recording.num_preemptions = part.engine.scheduler.stats.num_preemptions
            recording.num_taken = part.engine.scheduler.speculator.stats.num_taken
            assert recording.drafter.sequences.num_free_blocks == cluster.facts.num_blocks
        return [cluster.outputs[each].token_ids for each in ids], recordings


PUBLISHED_AND_MORE = [
    *[("deepseek_v3", 1), ("deepseek_v3", 2), ("glm4_moe", 1), ("glm4_moe_lite", 1), ("glm_moe_dsa", 1)],
    *[("step3p5", 3), ("qwen3_next", 1), ("qwen3_next", 2), ("qwen3_5", 1)],
]


@pytest.fixture(scope="module", params=PUBLISHED_AND_MORE, ids=str)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    name, num_modules = request.param
    path = tmp_path_factory.mktemp(name)
    return path, write(path, KINDS[name], num_modules)


@pytest.mark.parametrize("topology", ["monolith", "afd"])
def test_drafts_are_those_of_the_description_and_no_token_changes(checkpoint: tuple[Path, Reference], topology: str) -> None:
    path, reference = checkpoint
    plain, _ = run(path, topology, drafts=None)
    found, (recording,) = run(path, topology, drafts=4)
    assert found == plain
    assert len(recording.said) > 15
    for tokens, count, proposal in recording.said:
        assert proposal is not None, "with no prefix cached, every hidden state is there"
        assert list(proposal.token_ids) == reference.drafts(tokens, count)
    assert recording.num_taken > 2


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_drafts_and_acceptance_are_those_of_transformers_own_generation(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which runs these layers for families that have one of them, and tells their tensors by the layers of published models."""
    kind, said = KINDS[name], []
    write(tmp_path, kind, 1)
    draft = MTPCandidateGenerator.get_candidates

    def noted(self: Any, input_ids: torch.Tensor, *args: Any, **options: Any) -> Any:
        found, logits = draft(self, input_ids, *args, **options)
        if logits is not None:
            said.append((input_ids[0].tolist(), found[0, input_ids.shape[1] :].tolist()))
        return found, logits

    monkeypatch.setattr(MTPCandidateGenerator, "get_candidates", noted)
    monkeypatch.setattr(type(kind.make(1)), "_keys_to_ignore_on_load_unexpected", [rf"model\.layers\.{LAYERS}.*"])
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for n in {*range(4)} - {SAMPLED}:
        (answer,), (recording,) = run(tmp_path, "monolith", drafts=1, requests=[n])  # none waits for another's prompt
        said.clear()
        asked = torch.tensor([prompt(n)])
        whole = model.generate(asked, use_mtp=True, do_sample=False, max_new_tokens=NUM_TOKENS)[0].tolist()
        assert whole == prompt(n) + answer
        ours = [(tokens, list(proposal.token_ids)) for tokens, _, proposal in recording.said if proposal is not None]
        theirs = [(at, drafts) for at, drafts in said if len(at) < len(whole) - 1]  # the last token needs no draft
        assert len(ours) > 5
        assert ours == theirs
        assert recording.num_taken == sum(whole[len(at)] == draft for at, (draft,) in theirs)


def test_preempted_requests_and_those_with_cached_or_moved_beginnings_answer_the_same(checkpoint: tuple[Path, Reference]) -> None:
    path, _ = checkpoint
    plain, _ = run(path, "monolith", drafts=None)
    few = {"numBlocks": 24, "blockSizeTokens": 4, "prefixCaching": True}
    for topology, cache in (("monolith", few), ("pd", {"numBlocks": 64, "blockSizeTokens": 4})):
        found, (recording,) = run(path, topology, drafts=3, cache=cache)
        assert found == plain
        assert recording.num_preemptions > 0 or topology == "pd"
        assert any(proposal is not None for _, _, proposal in recording.said)


def test_a_checkpoint_without_such_layers_is_refused_by_name(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "llama")
    with pytest.raises(InvalidInput, match="multi-token prediction") as refused:
        LocalCluster(wiring(path, "monolith", speculation={"drafter": "mtp"}), path)
    assert refused.value.field == "spec.speculation.drafter"


def test_a_text_beside_a_vision_tower_has_the_same_modules(tmp_path: Path) -> None:
    reference = write(tmp_path / "text", KINDS["qwen3_5"], 1)
    path = tmp_path / "published"
    path.mkdir()
    tensors = load_file(tmp_path / "text" / "model.safetensors")
    beside = {"model.language_model." + name.removeprefix("model.") if name.startswith("model.") else name: tensor
              for name, tensor in tensors.items()}  # fmt: skip
    save_file(beside, path / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((tmp_path / "text" / "config.json").read_text())
    raw = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "text_config": text}
    (path / "config.json").write_text(json.dumps(raw))
    _, (recording,) = run(path, "monolith", drafts=2)
    assert len(recording.said) > 15
    for tokens, count, proposal in recording.said:
        assert proposal is not None
        assert list(proposal.token_ids) == reference.drafts(tokens, count)
