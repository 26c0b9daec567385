"""Whether kernels run in Triton's interpreter, where bfloat16 matrix products are wrong and operands are raised first (control speed).

Triton reads the variable when kernels are decorated, so that it holds for a whole process. Must not know: any kernel.
"""

from __future__ import annotations

import os

RAISE = os.environ.get("TRITON_INTERPRET") == "1"
