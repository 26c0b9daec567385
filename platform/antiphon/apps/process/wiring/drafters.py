"""Builds the drafter that a document's speculation section asks for (control speed).

All drafters compute in the attention worker's process, whole layers of theirs, in every topology: a draft over the exchange would
cost the round trips that it is to save. Where this process holds the FFN halves as well, shortened models share every weight with
the model; elsewhere it reads the few FFNs that they need. Must not know: how drafts are verified, or when they are asked for.
"""

from __future__ import annotations

from antiphon.apps.process.wiring.resolve import ModelFacts
from antiphon.core.document.serving import SpeculationSpec
from antiphon.core.errors import AntiphonError, InvalidInput, UnsupportedModel
from antiphon.core.ids import FFNShard
from antiphon.engine.speculation.drafter import Drafter
from antiphon.engine.speculation.ngram import NgramDrafter
from antiphon.models.attention.kv_cache import KVCache
from antiphon.models.cache_layout import kv_layout
from antiphon.models.config import DecoderConfig
from antiphon.models.decoder import AttentionHalves, FFNHalves
from antiphon.models.families import describe
from antiphon.models.families.prediction import describe_prediction
from antiphon.models.layers.functional import read_norm
from antiphon.models.layers.linear import Linear
from antiphon.models.loading.checkpoint import Checkpoint
from antiphon.models.loading.source import resolve
from antiphon.models.loading.weights import Weights
from antiphon.worker.speculation.local_decoder import LocalDecoder
from antiphon.worker.speculation.prediction_drafter import Module, PredictionDrafter
from antiphon.worker.speculation.token_drafter import TokenDrafter

FIELD = "spec.speculation"


def build_drafter(spec: SpeculationSpec, facts: ModelFacts, halves: AttentionHalves, ffns: FFNHalves | None) -> Drafter:
    """The drafter. ``ffns``: of the model, where this process holds all of them.

    Raises:
        InvalidInput: the model's own shape rules it out; names the field.
        CheckpointInvalid, UnsupportedModel: the draft model can't be used.
    """
    match spec.drafter:
        case "ngram":
            return NgramDrafter()
        case "model":
            return TokenDrafter("model", _draft_model(spec, facts), facts.config.vocab_size)
        case "layers":
            return TokenDrafter("layers", _leading_layers(spec, facts, halves, ffns), facts.config.vocab_size)
        case "mtp":
            return PredictionDrafter(_modules(spec, facts, halves))


def _draft_model(spec: SpeculationSpec, facts: ModelFacts) -> LocalDecoder:
    assert spec.model is not None  # the document's own check
    field = f"{FIELD}.model"
    if spec.model.uri is None:
        raise InvalidInput(
            f"LLMDeployment {spec.model.deployment_ref!r} is known where both documents are: to serve, and to the operator",
            f"{field}.deploymentRef",
        )
    try:
        checkpoint = Checkpoint.open(resolve(spec.model.uri, spec.model.revision))
        config = describe(checkpoint.config)
        layout = kv_layout(config, facts.dtype, facts.kv.block_size_tokens)
    except AntiphonError as error:
        raise InvalidInput(f"the draft model {spec.model.uri}: {error}", f"{field}.uri") from error
    if layout.has_state:
        raise InvalidInput(
            f"the draft model {spec.model.uri} keeps a state per sequence, which can't be taken back behind a wrong guess",
            f"{field}.uri",
        )
    check_same_vocabulary(facts.checkpoint, facts.config, checkpoint, config, f"{field}.uri")
    max_len = min(facts.max_model_len, config.max_position)
    halves = AttentionHalves(config, checkpoint, facts.dtype, facts.device, max_len)
    ffns = FFNHalves(config, checkpoint, facts.dtype, facts.device, FFNShard())
    checkpoint.close()
    return LocalDecoder(halves, ffns, _cache(spec, facts, config))


def check_same_vocabulary(
    checkpoint: Checkpoint, config: DecoderConfig, drafts: Checkpoint, draft_config: DecoderConfig, field: str
) -> None:
    """Check that a token id means the same to both. Ids behind the last token, which embeddings are padded with, may differ.

    Raises:
        InvalidInput: a token is another one's id in the other, or without tokenizers to compare, the sizes differ.
    """
    ours, theirs = _vocabulary(checkpoint), _vocabulary(drafts)
    if not (ours and theirs) and draft_config.vocab_size != config.vocab_size:
        raise InvalidInput(
            f"the draft model has a vocabulary of {draft_config.vocab_size} tokens, the model of {config.vocab_size}: both must be "
            "the same",
            field,
        )
    if not (ours and theirs):
        return
    for token_id in sorted(ours.keys() | theirs.keys()):
        if ours.get(token_id) != theirs.get(token_id):
            raise InvalidInput(
                f"token {token_id} is {theirs.get(token_id)!r} to the draft model and {ours.get(token_id)!r} to the model: their "
                "vocabularies must be the same",
                field,
            )


def _vocabulary(checkpoint: Checkpoint) -> dict[int, str]:
    """Tokens by id; empty without a tokenizer file, as where token ids are all that is served."""
    from tokenizers import Tokenizer

    path = checkpoint.path / "tokenizer.json"
    if not path.exists():
        return {}
    try:
        words: dict[str, int] = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exceptions
        raise UnsupportedModel(f"{path} can't be read: {error}", FIELD) from error
    return {token_id: word for word, token_id in words.items()}


def _leading_layers(spec: SpeculationSpec, facts: ModelFacts, halves: AttentionHalves, ffns: FFNHalves | None) -> LocalDecoder:
    count, num_layers = spec.layers, facts.config.num_layers
    assert count is not None  # the document's own check
    if count >= num_layers:
        raise InvalidInput(f"{count} layers are not fewer than the model's {num_layers}", f"{FIELD}.layers")
    cut = halves.leading(count)
    if kv_layout(cut.config, facts.dtype, facts.kv.block_size_tokens).has_state:
        raise InvalidInput("the first layers keep a state per sequence, which drafters can't take back", f"{FIELD}.layers")
    if ffns is None:
        ffns = FFNHalves(cut.config, facts.checkpoint, facts.dtype, facts.device, FFNShard(), None, facts.int8)
    else:
        ffns = ffns.leading(count)
    return LocalDecoder(cut, ffns, _cache(spec, facts, cut.config))


def _modules(spec: SpeculationSpec, facts: ModelFacts, halves: AttentionHalves) -> list[Module]:
    checkpoint = facts.checkpoint
    try:
        found = describe_prediction(checkpoint.config, checkpoint.names, describe)
    except UnsupportedModel as error:
        raise InvalidInput(str(error), f"{FIELD}.drafter") from error
    weights = Weights(checkpoint, facts.dtype, facts.device)
    modules = []
    for each in found:
        config = each.decoder
        own = AttentionHalves(config, checkpoint, facts.dtype, facts.device, facts.max_model_len, beside=halves)
        ffns = FFNHalves(config, checkpoint, facts.dtype, facts.device, FFNShard(), None, facts.int8)
        modules.append(
            Module(
                embedding_norm=read_norm(config.norm, weights, each.embedding_norm, config.norm_eps),
                hidden_norm=read_norm(config.norm, weights, each.hidden_norm, config.norm_eps),
                projection=Linear(weights.read(each.projection + ".weight")),
                decoder=LocalDecoder(own, ffns, _cache(spec, facts, config)),
                hands_on_normed=each.hands_on_normed,
            )
        )
    weights.rest()
    return modules


def _cache(spec: SpeculationSpec, facts: ModelFacts, config: DecoderConfig) -> KVCache:
    layout = kv_layout(config, facts.dtype, facts.kv.block_size_tokens)
    num_tokens = spec.cache_tokens
    if facts.num_blocks is not None:  # else the card has room for the model's own blocks once these are there
        num_tokens = min(num_tokens, facts.num_blocks * layout.block_size_tokens)
    return KVCache(layout, layout.num_blocks_for(num_tokens), facts.device)
