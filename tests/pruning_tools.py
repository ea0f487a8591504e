"""What tests of `prune` share: what it did, what is left, jobs that are old."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from trbatch import api


def segments(job: api.Job) -> list[str]:
    return job.folder.ledger.names()


def prune_one(*jobs: str, **settings: Any) -> dict[str, Any]:
    (found,) = api.prune(jobs, **settings)
    return {"action": found.action, "reason": found.reason, "bytes": found.bytes}


def make_old(job: api.Job, days: float) -> None:
    """Let all that happened to a job have happened long ago."""
    path = Path(job.path)
    manifest = json.loads((path / "manifest.json").read_text())
    then = time.time() - days * 86400
    manifest["created"] = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(then))
    (path / "manifest.json").write_text(json.dumps(manifest))
    for file in (path / "segments").glob("*.parquet"):
        file.rename(file.with_name(f"{file.name[:-24]}{int(then * 1e6):016d}.parquet"))
    control = path / "control.json"
    if control.exists():
        values = json.loads(control.read_text()) | {"since": then}
        control.write_text(json.dumps(values))


def dataset(job: api.Job) -> list[dict[str, Any]]:
    return pq.read_table(job.collect().output).to_pylist()


def age(path: Path, days: float) -> None:
    """Let a file or a folder with all in it be so old."""
    then = time.time() - days * 86400
    for one in (*path.rglob("*"), path):
        os.utime(one, (then, then))
