"""Tonight's prompts to a Parquet file, on the public API. Run it from cron or a systemd timer.

    python jobs/nightly.py prompts/2026-08-02.jsonl answers/2026-08-02.parquet

A second run on the same day continues the first one's job, so a crash costs nothing but time. The
date in the file's name is no part of the task's name, so tonight starts from last night's matrix.
Workers are expected to run already (see `workers/`).
"""

from __future__ import annotations

import argparse
import sys

import trbatch


def main(arguments: list[str] | None = None) -> int:
    """Submit, wait, collect. Returns 0, 3 if rows failed, or the exit code of what went wrong."""
    parser = argparse.ArgumentParser(description="Decode tonight's prompts.")
    parser.add_argument("prompts", help="JSONL or Parquet with 'prompt' or 'messages'")
    parser.add_argument("answers", help="Parquet file to write")
    parser.add_argument("--hours", type=float, default=8.0, help="give up after so long")
    parser.add_argument("--max-tokens", type=int, default=256)
    options = parser.parse_args(arguments)
    try:
        job = trbatch.submit(options.prompts, max_tokens=options.max_tokens)
        print(f"job {job.id}, task {job.status().task}", flush=True)
        trbatch.wait(job, timeout=options.hours * 3600)
        receipt = trbatch.collect(job, options.answers)
    except trbatch.TrbatchError as error:
        print(f"error: {error}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(receipt)
    return receipt.exit_code


if __name__ == "__main__":
    sys.exit(main())
