"""Which GPUs a worker may have, without torch: one process each, that sees no other."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from trbatch.errors import UsageError

VISIBLE = "CUDA_VISIBLE_DEVICES"


def chosen(text: str) -> list[str]:
    """The GPUs that `--gpu` names, as `CUDA_VISIBLE_DEVICES` calls them.

    Numbers count those that this process may see, as torch counts them.

    Args:
        text: `0`, `0,1` or `all`.

    Raises:
        UsageError: it is none of these, or there is no such GPU.
    """
    if text.strip() == "all":
        if not (found := _visible() or _present()):
            raise UsageError("--gpu all: this machine has no GPU", hint="use --device cpu")
        return found
    numbers = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d+", number) for number in numbers):
        raise UsageError(f"--gpu must be a number, numbers with commas, or all; not {text!r}")
    if len(set(numbers)) < len(numbers):
        raise UsageError(f"--gpu {text} names a GPU twice")
    visible = _visible()
    if not visible:
        return numbers
    if missing := [number for number in numbers if int(number) >= len(visible)]:
        raise UsageError(
            f"--gpu {missing[0]}: only {len(visible)} GPUs are visible",
            hint=f"{VISIBLE} is {os.environ[VISIBLE]}",
        )
    return [visible[int(number)] for number in numbers]


def _visible() -> list[str]:
    return [name for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]


def _present() -> list[str]:
    """The numbers of this machine's GPUs, by the driver's program or its device files."""
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return answer.stdout.split()
    except (OSError, subprocess.SubprocessError):  # a driver without its program
        files = Path("/dev").glob("nvidia[0-9]*")
        return sorted((file.name.removeprefix("nvidia") for file in files), key=int)
