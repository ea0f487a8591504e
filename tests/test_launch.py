"""How the attention kernel is cut into programs on chips with more and with less shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from trbatch.engine.kernels.launch import Chip, Launch, choose_launch, shared_bytes

# By compute capability. H100 and H200, A100, RTX 4090, RTX 3090, T4.
CHIPS = {
    90: Chip(132, 232_448), 80: Chip(108, 166_912), 89: Chip(128, 101_376),
    86: Chip(82, 101_376), 75: Chip(40, 65_536),
}  # fmt: skip
TYPES = (torch.bfloat16, torch.float16, torch.float32)
STEPS = [(rows, pairs) for rows in (4, 12, 32, 64, 324, 8192) for pairs in (8, 64, 256, 1024)]


def launches(chip: Chip, dtype: torch.dtype, dim: int) -> list[Launch]:
    return [
        choose_launch(dtype, chip, dim=dim, rows=rows, pairs=pairs, keys=8192)
        for rows, pairs in STEPS
    ]


@pytest.mark.parametrize("capability", CHIPS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_no_launch_needs_more_shared_memory_than_there_is(
    capability: int, dtype: torch.dtype
) -> None:
    chip = CHIPS[capability]
    for dim in (64, 80, 128, 256):
        for launch in launches(chip, dtype, dim):
            assert shared_bytes(launch, dtype, dim) <= chip.shared_bytes
            assert launch.block_m >= 16 and 64 % launch.block_n == 0


def test_where_there_is_enough_launches_are_those_that_were_measured() -> None:
    chip = CHIPS[90]
    for dtype in TYPES:
        for dim in (64, 80, 96, 128, 192, 256):
            assert launches(chip, dtype, dim) == launches(Chip(132, 1 << 40), dtype, dim)
    how = {"dim": 256, "rows": 324, "keys": 8192, "pairs": 1024}
    assert choose_launch(torch.bfloat16, chip, **how) == Launch(64, 32, 1, 8, 3)
    assert choose_launch(torch.bfloat16, chip, **how | {"dim": 128}) == Launch(128, 64, 1, 8, 3)
    assert choose_launch(torch.bfloat16, CHIPS[89], **how) == Launch(64, 32, 1, 8, 2)
    assert choose_launch(torch.float16, CHIPS[75], **how) == Launch(32, 32, 1, 4, 2)


def test_few_rows_are_shared_among_as_many_programs_as_run_at_once() -> None:
    def chosen(rows: int, pairs: int, keys: int = 1104) -> Launch:
        return choose_launch(torch.bfloat16, CHIPS[90], dim=128, rows=rows, pairs=pairs, keys=keys)

    assert chosen(4, 8) == Launch(16, 32, 16, 4, 3)
    assert chosen(4, 8, keys=8192).splits == 32
    assert chosen(4, 8, keys=100).splits == 2, "each has two blocks or more"
    assert chosen(4, 64).splits == 5
    assert chosen(324, 8) == chosen(324, 8, keys=8192) == Launch(64, 32, 5, 4, 3)
    assert chosen(128, 64) == Launch(64, 64, 1, 4, 3), "as many as run at once by themselves"


# A compilation takes a second or two.
@pytest.mark.parametrize(
    ("capability", "dtype", "dims"),
    [
        (86, "bfloat16", "128,256"),
        pytest.param(75, "float16", "64,128,256", marks=pytest.mark.long),
        pytest.param(75, "float32", "128,256", marks=pytest.mark.long),
        pytest.param(89, "float16", "64,128,256", marks=pytest.mark.long),
        pytest.param(80, "bfloat16", "64,128,256", marks=pytest.mark.long),
        pytest.param(90, "bfloat16", "64,128,256", marks=pytest.mark.long),
    ],
)
def test_what_is_compiled_fits(capability: int, dtype: str, dims: str, tmp_path: Path) -> None:
    chip = CHIPS[capability]
    script = Path(__file__).with_name("compile_attention.py")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(script), str(capability), *map(str, chip), dtype, dims],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["dim"] for one in found} == {int(dim) for dim in dims.split(",")}
    for one in found:
        needed, dim = one.pop("bytes"), one.pop("dim")
        assert needed <= chip.shared_bytes, one
        if capability < 90:
            assert needed <= shared_bytes(Launch(**one), getattr(torch, dtype), dim), one
