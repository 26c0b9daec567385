"""Doors that ended by themselves: what ended them is what is told."""

import asyncio

import pytest

from antiphon.apps.serve.door_thread import DoorThread, OnBound
from antiphon.core.errors import Unavailable


def test_doors_that_failed_to_open_say_why_and_can_be_closed_at_any_moment() -> None:
    async def serve(stop: asyncio.Event, on_bound: OnBound) -> None:
        raise Unavailable("can't listen on 127.0.0.1:80: address in use")

    for _ in range(300):  # the thread may be anywhere between its loop's end and its own
        doors = DoorThread("router", serve, stop_timeout_s=5.0)
        try:
            with pytest.raises(Unavailable, match="address in use"):
                doors.wait_open(5.0)
        finally:
            doors.close()
            doors.close()
