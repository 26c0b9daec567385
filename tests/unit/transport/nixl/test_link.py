from bisect import bisect_left

import pytest

from antiphon.transport.nixl.link import size_classes


@pytest.mark.parametrize("slot_bytes", [1, 4095, 4096, 4097, 65_536, 100_000, 3 << 20])
def test_every_length_has_a_class_at_most_an_eighth_longer_within_the_slot(slot_bytes: int) -> None:
    classes = size_classes(slot_bytes)
    assert classes == sorted(set(classes))
    assert classes[-1] == slot_bytes
    for num_bytes in {1, slot_bytes, *range(4096, slot_bytes, 1013)}:
        if num_bytes <= slot_bytes:
            size = classes[bisect_left(classes, num_bytes)]
            assert num_bytes <= size <= max(4096, num_bytes + num_bytes // 8 + 1)


def test_a_direction_without_payload_has_the_empty_class_alone() -> None:
    assert size_classes(0) == [0]
