"""Which processors threads run on."""

import os
import subprocess
import sys

import pytest

from antiphon.apps.process.pinning import pin
from antiphon.core.errors import InvalidInput
from antiphon.models.native.library import available

needs_two = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="this machine has fewer than two processors"
)

_EACH = """
import os, sys, torch
from antiphon.apps.process.pinning import pin_each, unpinned
torch.set_num_threads(2)
cores = sorted(os.sched_getaffinity(0))[:2]
pin_each(cores, share=SHARE)
print(cores)
pinned = {int(t): os.sched_getaffinity(int(t)) for t in os.listdir("/proc/self/task") if len(os.sched_getaffinity(int(t))) == 1}
print([(sorted(on)[0], os.sched_getscheduler(thread) == os.SCHED_IDLE) for thread, on in sorted(pinned.items())])
with unpinned():
    print(len(os.sched_getaffinity(0)) > 1)
print(sorted(os.sched_getaffinity(0)))
"""


@needs_two
@pytest.mark.skipif(not available(), reason="no C++ compiler here, so the kernels that pin threads are not built")
@pytest.mark.parametrize("share", [False, True])
def test_each_compute_thread_gets_a_processor_of_its_own_and_others_may_go_anywhere(share):
    code = _EACH.replace("SHARE", str(share))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    cores, pinned, is_free, own = done.stdout.splitlines()
    first, second = eval(cores)
    mine, *others = eval(pinned)
    assert mine == (first, False)  # the worker's own thread runs like any program
    assert {core for core, _ in others} == {second}
    assert any(is_idle for _, is_idle in others) == share  # helpers on shared processors take what is left
    assert is_free == "True"
    assert eval(own) == [first]


def test_a_processor_that_is_not_there_is_named():
    with pytest.raises(InvalidInput, match="4095"):
        pin((4095,))
