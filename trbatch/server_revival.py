"""The embedded server started again, beside a worker that goes on without it meanwhile."""

from __future__ import annotations

import contextlib
import threading

from trbatch import server
from trbatch.errors import TrbatchError


class Revival:
    """Has the server started by a thread: one that hangs is waited for at length, and not here."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Start the server unless it runs, or a try to do so does."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=_try, name="server-revival", daemon=True)
            self._thread.start()


def _try() -> None:
    with contextlib.suppress(TrbatchError):  # it is tried again in the next break
        server.ensure()
