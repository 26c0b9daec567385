"""The prefill pool: how long a prompt takes, how long it waits, how many cards keep the time to first token (pure arithmetic).

Must not know: how decoding is laid out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from antiphon.planner.cost.formats import Formats, bytes_per_value
from antiphon.planner.cost.formula import Apply, formula, plainly
from antiphon.planner.cost.hardware import Accelerator, Efficiency
from antiphon.planner.cost.model_cost import cache_bytes, prefill_cost
from antiphon.planner.cost.shape import ModelShape
from antiphon.planner.traffic import Traffic

TAIL = 0.05  # times to first token are planned at the 95th percentile
MAX_UTILISATION = 0.95


@formula("s", prompt="row", flops_per_row="flop/row", num_cards="card", flops="flop/card/s", fixed_s="s")
def prefill_time_s(*, prompt: float, flops_per_row: float, num_cards: float, flops: float, fixed_s: float) -> float:
    """One prompt on one instance, bound by computing."""
    return prompt * flops_per_row / (num_cards * flops) + fixed_s


@formula("", rate="request/s", service_s="s/request", num_servers="")
def utilisation(*, rate: float, service_s: float, num_servers: float) -> float:
    """Share of the time that an instance works."""
    return rate * service_s / num_servers


@formula("", load="", num_servers="")
def waiting_chance(*, load: float, num_servers: float) -> float:
    """Chance that a request finds every instance busy (Sakasegawa's approximation)."""
    return load ** ((2 * (num_servers + 1)) ** 0.5 - 1)  # type: ignore[no-any-return]  # a float's power


@formula("s", service_s="s", variation="", num_servers="", load="", chance="", tail="")
def waiting_quantile_s(*, service_s: float, variation: float, num_servers: float, load: float, chance: float, tail: float) -> float:
    """Wait that all but ``tail`` of the requests stay below: an exponential tail with the mean of those that wait."""
    return service_s * (1 + variation * variation) / 2 / (num_servers * (1 - load)) * math.log(max(1.0, chance / tail))


@formula("s", wait_s="s", prefill_s="s", transfer_s="s", num_layers="", first_step_s="s")
def time_to_first_token_s(*, wait_s: float, prefill_s: float, transfer_s: float, num_layers: float, first_step_s: float) -> float:
    """Wait, prompt (its KV moves layer by layer behind the computing), last layer's KV, first decode step."""
    return wait_s + max(prefill_s, transfer_s) + transfer_s / num_layers + first_step_s


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPool:
    """Prefill instances and what they reach."""

    card: Accelerator
    cards_per_instance: int
    num_instances: int
    mean_prefill_s: float
    load: float
    wait_s: float  # 95th percentile
    transfer_s: float  # KV of a long prompt to its decode worker
    ttft_s: float  # 95th percentile

    @property
    def num_cards(self) -> int:
        """Cards of the pool."""
        return self.cards_per_instance * self.num_instances


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillModel:
    """Evaluates prefill pools of one model on one kind of card."""

    shape: ModelShape
    formats: Formats
    card: Accelerator
    efficiency: Efficiency
    traffic: Traffic
    memory_share: float = 0.9

    def prompt_s(self, prompt: float, num_cards: int, apply: Apply = plainly) -> float:
        """Seconds of one prompt on an instance."""
        flops = self.card.flops_in(self.formats.compute) * self.efficiency.compute
        reads_s = (
            self.shape.total_weights
            * bytes_per_value(self.formats.weights)
            / (num_cards * self.card.bandwidth * self.efficiency.memory)
        )
        kernels = sum(count * (layer.attention_kernels + layer.ffn.kernels) for layer, count in self.shape.kinds)
        fixed_s = kernels * self.efficiency.kernel_s
        computing = apply(
            prefill_time_s,
            prompt=prompt,
            flops_per_row=prefill_cost(self.shape, self.formats, prompt).flops,
            num_cards=num_cards,
            flops=flops,
            fixed_s=fixed_s,
        )
        return max(computing, reads_s + fixed_s)

    def service(self, num_cards: int) -> tuple[float, float]:
        """Mean seconds of the traffic's prompts on an instance, and their standard deviation over that mean."""
        times = [(self.prompt_s(prompt, num_cards), share) for prompt, share in self.traffic.prompt_points]
        mean = sum(seconds * share for seconds, share in times)
        second = sum(seconds * seconds * share for seconds, share in times)
        return mean, math.sqrt(max(0.0, second / mean**2 - 1))

    def smallest_instance(self) -> int:
        """Fewest cards that hold the weights and the KV of the longest prompt."""
        weights = self.shape.total_weights * bytes_per_value(self.formats.weights)
        longest = cache_bytes(self.shape, self.formats, self.traffic.longest)
        return max(1, math.ceil((weights + longest) / (self.card.memory_bytes * self.memory_share)))

    def transfer_s(self, num_cards: int, decode_net: float) -> float:
        """Seconds that the KV of a long prompt takes to a decode worker with ``decode_net`` byte/s."""
        size = cache_bytes(self.shape, self.formats, self.traffic.prompt_quantile(1 - TAIL))
        net = min(self.card.nic_bandwidth * min(num_cards, self.card.cards_per_node), decode_net)
        return size / (net * self.efficiency.network)

    def pool(
        self,
        cards_per_instance: int,
        num_instances: int,
        rate: float,
        *,
        first_step_s: float,
        decode_net: float,
        service: tuple[float, float] | None = None,
        apply: Apply = plainly,
    ) -> PrefillPool | None:
        """The pool under ``rate`` requests per second; None when it can't keep up. ``service`` saves computing it again."""
        service_s, variation = self.service(cards_per_instance) if service is None else service
        load = apply(utilisation, rate=rate, service_s=service_s, num_servers=num_instances)
        if load > MAX_UTILISATION:
            return None
        wait_s = 0.0
        if load > 0:
            chance = apply(waiting_chance, load=load, num_servers=num_instances)
            wait_s = apply(
                waiting_quantile_s,
                service_s=service_s,
                variation=variation,
                num_servers=num_instances,
                load=load,
                chance=chance,
                tail=TAIL,
            )
        transfer_s = self.transfer_s(cards_per_instance, decode_net)
        return PrefillPool(
            card=self.card,
            cards_per_instance=cards_per_instance,
            num_instances=num_instances,
            mean_prefill_s=service_s,
            load=load,
            wait_s=wait_s,
            transfer_s=transfer_s,
            ttft_s=apply(
                time_to_first_token_s,
                wait_s=wait_s,
                prefill_s=self.prompt_s(self.traffic.prompt_quantile(1 - TAIL), cards_per_instance, apply),
                transfer_s=transfer_s,
                num_layers=self.shape.num_layers,
                first_step_s=first_step_s,
            ),
        )

    def smallest_pool(
        self, rate: float, *, ttft_s: float, max_cards: int, first_step_s: float, decode_net: float
    ) -> PrefillPool | None:
        """The pool of fewest cards that keeps up with ``rate`` and the time to first token; None when none does."""
        best: PrefillPool | None = None
        size = self.smallest_instance()
        while size <= max_cards:
            limit = max_cards // size if best is None else min(max_cards, best.num_cards - 1) // size
            found = self._fewest_instances(size, limit, rate, ttft_s, first_step_s, decode_net)
            if found is not None:
                best = found
            size *= 2
        return best

    def _fewest_instances(
        self, size: int, limit: int, rate: float, ttft_s: float, first_step_s: float, decode_net: float
    ) -> PrefillPool | None:
        service = self.service(size)

        def pool(count: int) -> PrefillPool | None:
            found = self.pool(size, count, rate, first_step_s=first_step_s, decode_net=decode_net, service=service)
            return found if found is not None and found.ttft_s <= ttft_s else None

        needed = rate * service[0] / MAX_UTILISATION
        low = max(1, math.ceil(needed))
        if low > limit or pool(limit) is None:
            return None
        high = limit
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if pool(middle) is not None else (middle + 1, high)
        return pool(low)
