"""The tier policy against first-come with LRU eviction on the same simulated traces: throughput, switches, longest wait.

python tests/bench/coe_tiers.py
"""

import statistics

from antiphon.coe.tier_simulation import Service, first_come, play, random_trace
from antiphon.coe.tiers import TierExpert, TierLimits

EXPERTS = {name: TierExpert(name=name, memory_bytes=1, fetch_s=1.5, load_s=0.5) for name in "abcdef"}
LIMITS = TierLimits(resident_bytes=2, host_bytes=3, fairness_window_s=10.0, max_group=16, prefetch=False)
SERVICE = Service(base_s=0.1, per_request_s=0.02)


def main() -> None:
    for rate in (1.0, 2.0, 4.0, 8.0, 16.0):
        faster, fewer, longest = [], [], []
        for seed in range(15):
            trace = random_trace("abcdef", 400, rate, 1.0, 0.3, seed)
            mine, theirs = play(trace, EXPERTS, LIMITS, SERVICE), play(trace, EXPERTS, LIMITS, SERVICE, first_come)
            faster.append(mine.throughput / theirs.throughput)
            fewer.append(mine.num_switches / theirs.num_switches)
            longest.append(max(mine.waits_s))
        print(
            f"{rate:4.0f} requests/s: throughput x{statistics.median(faster):.2f}, switches x{statistics.median(fewer):.2f}, "
            f"longest wait {max(longest):.1f} s (window {LIMITS.fairness_window_s:.0f} s)"
        )


if __name__ == "__main__":
    main()
