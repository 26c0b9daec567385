"""A peer in a process of its own: opens a link to the given address, echoes every message, until it is killed or cut off."""

import sys

from antiphon.core.errors import PeerLost
from antiphon.core.ids import Epoch, WorkerId
from antiphon.transport.base import Hello, LinkLayout
from antiphon.transport.connect.choose import connect_auto

NUM_SLOTS, SLOT_BYTES = 4, 1 << 16


def hello(worker: str, memory: str = "") -> Hello:
    layout = LinkLayout(
        channel="afd",
        num_slots=NUM_SLOTS,
        send_slot_bytes=SLOT_BYTES,
        recv_slot_bytes=SLOT_BYTES,
        fields=(("model", "tiny"), ("dtype", "bfloat16")),
        memory=memory,
    )
    return Hello(worker_id=WorkerId(worker), epoch=Epoch(7), layout=layout)


def main(address: str, memory: str = "") -> None:
    link = connect_auto([address], hello("peer/process/0", memory), timeout_s=20)
    try:
        while True:
            message = link.poll()
            if message is None:
                link.wait(1.0)
                continue
            while (slot := link.acquire()) is None:
                link.wait(1.0)
            slot.data[: message.data.shape[0]].copy_(message.data)
            link.commit(slot, message.header, message.data.shape[0])
            link.release(message)
    except PeerLost:
        link.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
