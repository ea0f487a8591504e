"""trbatch: batch inference with Token Recycling.

    import trbatch

    job = trbatch.submit("prompts.jsonl", max_tokens=128)  # a worker decodes it
    job.wait()
    receipt = job.collect("answers.parquet")

    for completion in trbatch.generate(["Say hello."]):    # in this process, without a queue
        print(completion.text)

Importing this package imports neither torch nor the queue; a name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trbatch.api import (
        cancel,
        collect,
        generate,
        pause,
        prune,
        report,
        resume,
        retry,
        status,
        submit,
        wait,
    )
    from trbatch.config import JobSpec, SamplingParams
    from trbatch.errors import TrbatchError

__version__ = "0.1.0"
__all__ = [
    "JobSpec",
    "SamplingParams",
    "TrbatchError",
    "cancel",
    "collect",
    "generate",
    "pause",
    "prune",
    "report",
    "resume",
    "retry",
    "status",
    "submit",
    "wait",
]

_HOMES = {
    "JobSpec": "trbatch.config",
    "SamplingParams": "trbatch.config",
    "TrbatchError": "trbatch.errors",
    "cancel": "trbatch.api",
    "collect": "trbatch.api",
    "generate": "trbatch.api",
    "pause": "trbatch.api",
    "prune": "trbatch.api",
    "report": "trbatch.api",
    "resume": "trbatch.api",
    "retry": "trbatch.api",
    "status": "trbatch.api",
    "submit": "trbatch.api",
    "wait": "trbatch.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trbatch' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
