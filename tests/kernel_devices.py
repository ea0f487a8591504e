"""Where kernels are tested, beside their slow twins.

Where there is no GPU they run in Triton's interpreter; where there is one, compiled on it. A test
file that imports this is skipped where neither is possible.
"""

from __future__ import annotations

import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("neither a GPU that torch can use nor TRITON_INTERPRET=1", allow_module_level=True)
triton = pytest.importorskip("triton", reason="triton is not installed")
tl = triton.language

interpreted = pytest.param(
    "cpu", marks=pytest.mark.skipif(GPU, reason="on a machine with a GPU they are compiled")
)
compiled = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no GPU here")]
)
on_every_device = pytest.mark.parametrize("device", [interpreted, compiled])
