"""The command line with a tiny model of random weights: what torture starts as a worker.

Steps are slowed down to `TORTURE_STEP_S` seconds, so that there is something in flight to be lost.
"""

from __future__ import annotations

import os
import sys
import time

from trbatch.config import WorkerConfig
from trbatch.engine_thread import Engine
from trbatch.queue_names import ModelKey


def load_tiny(config: WorkerConfig, model: ModelKey) -> Engine:
    """Stands in for `trbatch.worker.load_engine`."""
    from trbatch.engine.loading import loading

    with loading(model.name):
        import tiny
        import torch

        torch.set_num_threads(1)
        engine = tiny.engine(tiny.loaded(), max_num_seqs=8, tree_size=6)
    step, least = engine.step, float(os.environ.get("TORTURE_STEP_S", "0"))

    def slow_step() -> list:
        begin = time.monotonic()
        finished = step()
        time.sleep(max(0.0, least - (time.monotonic() - begin)))
        return finished

    engine.step = slow_step  # type: ignore[method-assign]
    return engine


if __name__ == "__main__":
    from trbatch import cli, supervisor, worker

    supervisor.COMMAND = (sys.executable, __file__, "worker")
    worker.load_engine = load_tiny
    cli.main()
