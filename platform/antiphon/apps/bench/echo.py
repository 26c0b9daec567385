"""The far end of a measured link: a process that sends every message back (hot).

Started with the address to connect to, the slot size, "in-place" or "copy", and a processor to stay on (-1: any).
"""

from __future__ import annotations

import os
import sys

import torch

from antiphon.apps.bench.links import hello
from antiphon.core.errors import PeerLost
from antiphon.transport.connect.choose import connect_auto

CONNECT_TIMEOUT_S = 30.0


def main(address: str, slot_bytes: int, mode: str, core: int) -> None:
    """Echo until the link is closed."""
    torch.set_num_threads(1)  # copies of a slot's size gain nothing from more, and a pinned process has but one processor
    if core >= 0:
        os.sched_setaffinity(0, {core})
    link = connect_auto([address], hello("bench/echo/0", slot_bytes), CONNECT_TIMEOUT_S)
    try:
        while True:
            message = link.poll()
            if message is None:
                link.wait(1.0)
                continue
            while (slot := link.acquire()) is None:
                link.wait(1.0)
            num_bytes = message.data.shape[0]
            if mode == "copy":
                slot.data[:num_bytes].copy_(message.data)
            header = bytes(message.header)
            link.release(message)
            link.commit(slot, header, num_bytes)
    except PeerLost:
        link.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
