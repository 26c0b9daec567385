from hypothesis import given
from hypothesis import strategies as st

from antiphon.transport.base import HEADER_BYTES, LinkLayout
from antiphon.transport.shm.segment import ENTRY_BYTES, PAGE_BYTES, Segment


def layout(num_slots: int, send: int, recv: int) -> LinkLayout:
    return LinkLayout(channel="afd", num_slots=num_slots, send_slot_bytes=send, recv_slot_bytes=recv, fields=())


SIZES = st.integers(0, 100_000)


@given(num_slots=st.integers(1, 100), send=SIZES, recv=SIZES)
def test_the_parts_of_a_segment_fit_and_do_not_overlap(num_slots: int, send: int, recv: int) -> None:
    segment = Segment.of(layout(num_slots, send, recv), connecting=True)
    parts = []
    for direction in segment.directions:
        parts += [
            (direction.entries, num_slots * ENTRY_BYTES),
            (direction.returns, num_slots * 8),
            (direction.headers, num_slots * HEADER_BYTES),
            (direction.slots, num_slots * direction.stride_bytes),
        ]
        assert direction.slots % PAGE_BYTES == 0
        assert direction.slot_bytes <= direction.stride_bytes
    end = PAGE_BYTES
    for start, length in sorted(parts):
        assert start >= end
        assert start % 8 == 0
        end = start + length
    assert end <= segment.num_bytes


@given(num_slots=st.integers(1, 100), send=SIZES, recv=SIZES)
def test_both_ends_compute_the_same_segment(num_slots: int, send: int, recv: int) -> None:
    connecting = Segment.of(layout(num_slots, send, recv), connecting=True)
    listening = Segment.of(layout(num_slots, recv, send), connecting=False)
    assert connecting == listening
    assert connecting.prefix() == listening.prefix()
