"""How a launch of the attention kernel is cut into programs, by sizes and by the device."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton

_MOST_SPLITS, _FEW_SPLITS = 32, 16
_HOPPERS = 232_448  # bytes of shared memory that a program may have: all that is ever chosen fits


class Launch(NamedTuple):
    """How a launch is cut into programs."""

    block_m: int  # rows of one program: nodes x query heads of a K/V head
    block_n: int  # keys that it reads at a time, a divisor of WORD
    splits: int  # programs that share a block of rows
    warps: int
    stages: int  # blocks of keys under way at once


class Chip(NamedTuple):
    """What of a device decides how launches are cut."""

    processors: int
    shared_bytes: int  # of shared memory that one program may have


@cache
def chip_of(device: torch.device) -> Chip:
    """A device's chip; for the interpreter one that is easily busy."""
    if device.type != "cuda":
        return Chip(4, _HOPPERS)
    told = torch.cuda.get_device_properties(device)
    # AMD's has no other.
    most = getattr(told, "shared_memory_per_block_optin", told.shared_memory_per_block)
    return Chip(int(told.multi_processor_count), int(most))


def choose_launch(
    dtype: torch.dtype, chip: Chip, *, dim: int, rows: int, pairs: int, keys: int
) -> Launch:
    """A launch by what is known without looking at the device's tensors.

    Args:
        rows: of the longest sequence: its nodes times the query heads of a K/V head.
        pairs: sequences times K/V heads.
        keys: the most that a sequence can have.
    """
    launch = _quickest(dtype, chip, dim=dim, rows=rows, pairs=pairs)
    while shared_bytes(launch, dtype, dim) > chip.shared_bytes and _smaller(launch) != launch:
        launch = _smaller(launch)
    programs = pairs * triton.cdiv(rows, launch.block_m)
    if 2 * programs > chip.processors:
        return launch
    # Two programs a processor, or some more of few rows; small blocks: each begins at once.
    wanted = 2 * chip.processors / programs
    wanted = math.floor(wanted) if launch.block_m >= 64 else math.ceil(wanted)
    launch = launch._replace(block_n=min(launch.block_n, 32))
    splits = min(wanted, _MOST_SPLITS, triton.cdiv(keys, 2 * launch.block_n))
    if splits > _FEW_SPLITS:  # those that join them read as many as the next power of two
        splits = 1 << (splits.bit_length() - 1)
    return launch._replace(splits=splits)


def _quickest(dtype: torch.dtype, chip: Chip, *, dim: int, rows: int, pairs: int) -> Launch:
    """The launch where there is memory enough, as measured on Hopper chips."""
    block_m = max(16, triton.next_power_of_2(rows))
    if dtype == torch.float32:
        # Products without tensor cores: larger blocks do not fit into registers.
        return Launch(block_m=16, block_n=32, splits=1, warps=8, stages=2)
    if dim > 128:
        block_m = min(block_m, 64)
        return Launch(block_m, block_n=32, splits=1, warps=8 if block_m > 32 else 4, stages=3)
    busy = pairs * triton.cdiv(rows, 128) >= chip.processors
    block_m = min(block_m, 128 if busy else 64)
    # A step of many short rows reads more than it computes: smaller blocks, more programs at once.
    many = block_m == 16 and pairs >= 3 * chip.processors
    warps = 8 if block_m > 64 else 4
    return Launch(block_m, 32 if many else 64, splits=1, warps=warps, stages=3)


def _smaller(launch: Launch) -> Launch:
    """The next one that needs less shared memory, at the least cost in speed; else the same."""
    if launch.stages > 2:
        return launch._replace(stages=launch.stages - 1)
    if launch.block_m > 16:
        return launch._replace(block_m=launch.block_m // 2, warps=4)
    if launch.stages > 1:
        return launch._replace(stages=1)
    return launch._replace(block_n=max(16, launch.block_n // 2))


def shared_bytes(launch: Launch, dtype: torch.dtype, dim: int) -> int:
    """Shared memory that a program needs, at most, on chips with less of it than Hopper's.

    From what Triton 3.7 compiled for them (`tests/test_launch.py`): the queries, keys and values of
    each block under way, weights (where a warp has its rows to itself they stay in registers),
    words of ancestors and positions. Chips before Ampere copy nothing while they compute, and
    multiply in float32.
    """
    m, n, stages, size = launch.block_m, launch.block_n, launch.stages, dtype.itemsize
    wide = max(16, int(triton.next_power_of_2(dim)))
    blocks = max(1, 2 * (stages - 1)) * n * wide * size
    weights = m * n * size if m < 128 else 0
    told = (8 * m + 4 * n) * (stages - 1) + 128  # and what a reduction exchanges
    before_ampere = 4 * (m * wide + n * max(m, 2 * wide if dtype == torch.float32 else wide))
    return max(m * wide * size + blocks + weights + told, before_ampere)
