"""What the scripts beside it share.

Importing it makes `trbatch` this repository's package, whatever is installed; so they do it first.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT))

import torch

from trbatch.errors import TrbatchError


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser that says what a script's docstring says first, with the option that all have."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file, not to stdout")
    return parser


def deliver(measure: Callable[[Any], dict[str, Any]], options: argparse.Namespace) -> int:
    """Measure, write the figures as JSON, and give the exit code."""
    try:
        text = json.dumps(measure(options), indent=1)
    except TrbatchError as error:
        say(f"error: {error}")
        return error.exit_code
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    return 0


def numbers(text: str) -> list[int]:
    """`8,32` as numbers, each at least 1."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError(text)
    return found


def make_prompts(file: Path, count: int, *, seed: int = 0) -> None:
    """So many different prompts of jobs/make_prompts.py."""
    maker = [sys.executable, str(ROOT / "jobs" / "make_prompts.py"), str(count)]
    with file.open("wb") as rows:
        subprocess.run([*maker, "--seed", str(seed)], stdout=rows, check=True)


def release() -> None:
    """Give memory of engines and networks that are gone back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait(device: torch.device) -> None:
    """Until the device is through with all that was started."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def say(line: str) -> None:
    """Tell whoever waits how far it is."""
    print(line, file=sys.stderr, flush=True)
