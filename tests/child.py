"""Processes that tests start and end."""

from __future__ import annotations

import subprocess
from types import TracebackType
from typing import Any


class Child(subprocess.Popen[Any]):
    """A process that nobody waits for when the test around it has failed."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(kind, error, traceback)
