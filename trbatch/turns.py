"""How long a thread that computes may keep the others of its process waiting."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

SWITCH_S = 0.0002  # Python's own is 5 ms


@contextmanager
def quick_turns() -> Iterator[None]:
    """Let threads change places quickly.

    An engine's thread lets go of Python's lock many times a step, whenever it starts something on
    the device, and must not wait for its turn each time while another thread writes rows.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
