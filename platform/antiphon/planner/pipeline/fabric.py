"""What attention and FFN say to each other: bytes per row, link time, the sparsest MoE a fabric feeds (pure arithmetic).

Pure arithmetic. Between pools, a row enters each FFN node that holds one of its experts once, over that node's NICs, and spreads
inside over the scale-up links. Among cards that do both halves (expert parallelism), a row is sent to each of its experts' cards:
over the NIC of its card, or over the scale-up links to cards of the same node; out (dispatch) and back (combine). Must not know:
schedules.
"""

from __future__ import annotations

from dataclasses import dataclass

from antiphon.planner.cost.formats import Formats, bytes_per_value
from antiphon.planner.cost.formula import Apply, formula, plainly
from antiphon.planner.cost.hardware import Accelerator
from antiphon.planner.cost.shape import FFN, FLOPS_PER_WEIGHT, ModelShape


@formula(
    "",
    hidden="value/row",
    exchange_bytes="byte/value",
    num_layers="",
    flops="flop/card/s",
    weight_bytes="byte/value",
    flops_per_weight="flop/value/row",
    bandwidth="byte/card/s",
    net="byte/s",
    stage_s="s",
)
def sparsity_bound(
    *,
    hidden: float,
    exchange_bytes: float,
    num_layers: float,
    flops: float,
    weight_bytes: float,
    flops_per_weight: float,
    bandwidth: float,
    net: float,
    stage_s: float,
) -> float:
    """Least activated share: rows that fill the card (B_dense / S) must cross the server's NICs within one stage."""
    return (hidden * exchange_bytes) * (flops * weight_bytes / (flops_per_weight * bandwidth)) * num_layers / (net * stage_s)


@formula("row", flops="flop/card/s", weight_bytes="byte/value", flops_per_weight="flop/value/row", bandwidth="byte/card/s")
def dense_batch(*, flops: float, weight_bytes: float, flops_per_weight: float, bandwidth: float) -> float:
    """Rows from which a dense FFN is bound by computing: operations per byte of weights reach the roofline."""
    return flops * weight_bytes / (flops_per_weight * bandwidth)


@formula("row", dense_batch="row", sparsity="")
def moe_batch(*, dense_batch: float, sparsity: float) -> float:
    """Rows from which a mixture of experts is bound by computing."""
    return dense_batch / sparsity


@formula("", num_nodes="", experts_per_row="")
def node_share(*, num_nodes: float, experts_per_row: float) -> float:
    """Share of the rows that a node must see, experts being drawn evenly."""
    return 1 - (1 - 1 / num_nodes) ** experts_per_row  # type: ignore[no-any-return]  # a float's power


@formula("s", rows="row", share="", hidden="value/row", bytes_per_value="byte/value", bandwidth="byte/s", latency_s="s")
def link_s(*, rows: float, share: float, hidden: float, bytes_per_value: float, bandwidth: float, latency_s: float) -> float:
    """Time of one ubatch's rows on a link, one way."""
    return rows * share * hidden * bytes_per_value / bandwidth + latency_s


@formula("s", rows="row", copies="", share="", hidden="value/row", bytes_per_value="byte/value", bandwidth="byte/s")
def copies_s(*, rows: float, copies: float, share: float, hidden: float, bytes_per_value: float, bandwidth: float) -> float:
    """Time in which a card sends each of its rows to the share of its experts that one kind of link leads to."""
    return rows * copies * share * hidden * bytes_per_value / bandwidth


@formula("s", rows="row", hidden="value/row", bytes_per_value="byte/value", num_cards="", bandwidth="byte/s", latency_s="s")
def sum_over_cards_s(
    *, rows: float, hidden: float, bytes_per_value: float, num_cards: float, bandwidth: float, latency_s: float
) -> float:
    """Time in which cards add up rows that each has a part of: all parts are sent once to be added, and once as sums."""
    return 2 * (num_cards - 1) / num_cards * rows * hidden * bytes_per_value / bandwidth + latency_s


def min_sparsity(
    card: Accelerator,
    shape: ModelShape,
    formats: Formats,
    *,
    tpot_s: float,
    num_stages: int = 3,
    network_efficiency: float = 1.0,
    apply: Apply = plainly,
) -> float:
    """Least sparsity S (activated / total) at which FFN servers of ``card`` can be filled through their NICs.

    Both directions share a stage of tpot_s / num_stages; above 1 means that not even a dense FFN can be fed.
    """
    return apply(
        sparsity_bound,
        hidden=shape.hidden_size,
        exchange_bytes=bytes_per_value(formats.a2f) + bytes_per_value(formats.f2a),
        num_layers=shape.num_layers,
        flops=card.flops_in(formats.compute),
        weight_bytes=bytes_per_value(formats.weights),
        flops_per_weight=FLOPS_PER_WEIGHT,
        bandwidth=card.bandwidth,
        net=card.nic_bandwidth * card.cards_per_node * network_efficiency,
        stage_s=tpot_s / num_stages,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """Seconds of one layer's exchange for one ubatch, and bytes through the busiest node's NICs."""

    a2f_s: float
    f2a_s: float
    node_bytes: float  # per layer and ubatch, there and back

    @property
    def total_s(self) -> float:
        """There and back."""
        return self.a2f_s + self.f2a_s


NO_EXCHANGE = Exchange(a2f_s=0.0, f2a_s=0.0, node_bytes=0.0)


def num_nodes(card: Accelerator, num_cards: int) -> int:
    """Nodes that hold ``num_cards`` cards."""
    return -(-num_cards // card.cards_per_node)


def exchange(
    ffn: FFN,
    hidden: int,
    formats: Formats,
    *,
    rows: float,
    attention: Accelerator,
    num_attention: int,
    ffn_card: Accelerator,
    num_ffn: int,
    colocated: bool,
    network_efficiency: float,
    latency_s: float,
    tensor: int = 1,
    apply: Apply = plainly,
) -> Exchange:
    """The exchange of ``rows`` rows between the two sides of one layer.

    Colocated sides are the same cards: within one node only the scale-up links carry rows, and one card exchanges nothing. When
    all cards are one attention rank (``tensor`` of them), every card has all rows and only adds up results.
    """
    if colocated and num_attention == 1:
        return NO_EXCHANGE
    if colocated and tensor == num_attention:
        back = apply(
            sum_over_cards_s,
            rows=rows,
            hidden=hidden,
            bytes_per_value=bytes_per_value(formats.f2a),
            num_cards=num_attention,
            bandwidth=attention.scale_up_bandwidth * network_efficiency,
            latency_s=latency_s,
        )
        return Exchange(a2f_s=0.0, f2a_s=back, node_bytes=0.0)
    if colocated and ffn.num_experts:
        a_card = rows / num_attention
        return _all_to_all(ffn, hidden, formats, a_card, attention, num_attention, network_efficiency, latency_s, apply)
    ffn_nodes, attention_nodes = num_nodes(ffn_card, num_ffn), num_nodes(attention, num_attention)
    draws = ffn.experts_per_row if ffn.num_experts else 0
    spread = apply(node_share, num_nodes=ffn_nodes, experts_per_row=draws) if draws else 1.0
    card_share = apply(node_share, num_nodes=num_ffn, experts_per_row=draws) if draws else 1.0
    one_domain = attention.key == ffn_card.key and num_attention + num_ffn <= ffn_card.cards_per_node
    crosses_nodes = not (one_domain or (colocated and ffn_nodes == 1))
    seconds = []
    for name in (formats.a2f, formats.f2a):
        size = bytes_per_value(name)
        on_links = [0.0]
        if num_ffn > 1:  # rows spread inside the FFN node over its scale-up links
            on_links.append(
                apply(
                    link_s,
                    rows=rows,
                    share=card_share,
                    hidden=hidden,
                    bytes_per_value=size,
                    bandwidth=ffn_card.scale_up_bandwidth * network_efficiency,
                    latency_s=latency_s,
                )
            )
        if crosses_nodes:
            ffn_net = ffn_card.nic_bandwidth * min(num_ffn, ffn_card.cards_per_node)
            attention_net = attention.nic_bandwidth * min(num_attention, attention.cards_per_node)
            sides = ((spread, ffn_net), (spread * ffn_nodes / attention_nodes, attention_net))
            on_links.extend(
                apply(
                    link_s,
                    rows=rows,
                    share=share,
                    hidden=hidden,
                    bytes_per_value=size,
                    bandwidth=net * network_efficiency,
                    latency_s=latency_s,
                )
                for share, net in sides
            )
        seconds.append(max(on_links))
    per_row = hidden * (bytes_per_value(formats.a2f) + bytes_per_value(formats.f2a))
    busiest = rows * per_row * max(spread, spread * ffn_nodes / attention_nodes) if crosses_nodes else 0.0
    return Exchange(a2f_s=seconds[0], f2a_s=seconds[1], node_bytes=busiest)


def _all_to_all(
    ffn: FFN,
    hidden: int,
    formats: Formats,
    rows: float,
    card: Accelerator,
    num_cards: int,
    network_efficiency: float,
    latency_s: float,
    apply: Apply,
) -> Exchange:
    """Dispatch and combine of ``rows`` rows a card among cards that hold the experts evenly."""
    near = min(card.cards_per_node, num_cards)
    links = (
        (1 - near / num_cards, card.nic_bandwidth * network_efficiency),
        ((near - 1) / num_cards, card.scale_up_bandwidth * network_efficiency),
    )
    seconds = [
        latency_s
        + max(
            apply(
                copies_s,
                rows=rows,
                copies=ffn.experts_per_row,
                share=share,
                hidden=hidden,
                bytes_per_value=bytes_per_value(name),
                bandwidth=bandwidth,
            )
            for share, bandwidth in links
        )
        for name in (formats.a2f, formats.f2a)
    ]
    per_row = hidden * (bytes_per_value(formats.a2f) + bytes_per_value(formats.f2a))
    return Exchange(
        a2f_s=seconds[0], f2a_s=seconds[1], node_bytes=near * rows * ffn.experts_per_row * (1 - near / num_cards) * per_row
    )
