"""Our products of rows with a packed weight against oneDNN's with its reordered one, in turns (a bench).

Usage: python tests/bench/kernels/linear.py [--dtype bfloat16|float32] [--rounds N]. One thread, processor time: other load
disturbs little.
Prints, for each shape and number of rows, the median time of both, oneDNN's over ours (above 1: ours is faster) and the lowest and
highest of that ratio over the rounds.
"""

import argparse

import torch
from turns import in_turns

from antiphon.models.native.library import available

SHAPES = ((960, 576), (3072, 576), (576, 1536), (49152, 576), (6144, 2048), (2048, 8192))  # outputs, inputs
ROWS = (1, 2, 4, 8, 32, 128, 512)
MOST_PRODUCTS = 5e9  # a larger one teaches nothing new
ROUND_S = 0.02


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    torch.set_num_threads(1)
    if not available() or not torch.ops.antiphon.packs(dtype is torch.bfloat16):
        raise SystemExit(f"no kernels of ours serve {arguments.dtype} on this processor")
    print("   outputs x inputs   rows   oneDNN us     ours us   oneDNN / ours")
    for num_outputs, num_inputs in SHAPES:
        weight = (torch.randn(num_outputs, num_inputs) * 0.05).to(dtype)
        reordered, packed = torch.ops.mkldnn._reorder_linear_weight(weight, 32), torch.ops.antiphon.pack_linear(weight)
        for num_rows in ROWS:
            if num_outputs * num_inputs * num_rows > MOST_PRODUCTS:
                continue
            x = torch.randn(num_rows, num_inputs).to(dtype)

            def theirs(x: torch.Tensor = x, weight: torch.Tensor = reordered) -> torch.Tensor:
                result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
                return result

            def ours(x: torch.Tensor = x, weight: torch.Tensor = packed, outputs: int = num_outputs) -> torch.Tensor:
                result: torch.Tensor = torch.ops.antiphon.packed_linear(x, weight, None, outputs, False)
                return result

            compared = in_turns(theirs, ours, rounds=arguments.rounds, round_s=ROUND_S)
            print(f"{f'{num_outputs} x {num_inputs}':>19}  {num_rows:>5} {compared}", flush=True)


if __name__ == "__main__":
    main()
