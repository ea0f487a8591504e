"""The kernels that draft, count and learn, compiled for a chip that need not be here.

    python tests/compile_drafts.py 90 2,0,1,4 33,3,2,8

Compute capability; then of each case tokens of a tree, orders, task orders and candidates. Prints a
line of JSON for each kernel. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from random_drafts import PATH, SLOTS, TASKS, Case, case
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from trbatch.engine.calibration import PLACES
from trbatch.engine.device_state import Slots
from trbatch.engine.kernels.draft import Trees
from trbatch.engine.kernels.learn import learn

TYPES = {torch.int32: "i32", torch.int64: "i64", torch.bool: "i1", torch.float32: "fp32"}
CPU = torch.device("cpu")


class Launches:
    """Compiles what would be launched, as if for tensors that lie on the device."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)
        self.compiled: list[tuple[str, Any]] = []

    def run(self, kernel: Any, *args: Any, **more: Any) -> None:
        """In place of `JITFunction.run`."""
        given = dict(zip(kernel.arg_names, args, strict=False)) | more
        kinds, values, aligned = {}, {}, {}
        for place, param in enumerate(kernel.params):
            value = given[param.name]
            kinds[param.name] = _kind(value)
            if param.is_constexpr or (_is_one(value) and not param.do_not_specialize):
                kinds[param.name], values[place,] = "constexpr", value
            elif isinstance(value, Tensor) or (value % 16 == 0 and not param.do_not_specialize):
                aligned[place,] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, kinds, values, aligned)
        options = {"num_warps": given["num_warps"]}
        found = triton.compile(source, target=self._target, options=options)
        self.compiled.append((kernel.fn.__name__, found))


def _kind(value: Any) -> str:
    return f"*{TYPES[value.dtype]}" if isinstance(value, Tensor) else "i32"


def _is_one(value: Any) -> bool:
    return isinstance(value, int) and value == 1


def launch(these: Case, size: int) -> None:
    """What a step of trees of `size` tokens launches of these kernels."""
    batch, out = len(these.last), Trees.empty(len(these.last), size, CPU)
    these.draft(out)
    paths = torch.full((3, batch, PATH), -1, dtype=torch.int32)
    these.calibrate(torch.zeros(TASKS, 2, PLACES, dtype=torch.int32), out, *paths)
    candidates = torch.zeros(batch, size, these.matrix.candidates, dtype=torch.int64)
    learn(
        these.matrix, Slots.empty(SLOTS, stops=1, pages=1, longest=1, device=CPU), these.slots,
        out.tokens, out.parents, out.contexts, candidates, torch.zeros(batch, size).bool(),
    )  # fmt: skip


def main() -> None:
    launches = Launches(int(sys.argv[1]))
    JITFunction.run = lambda kernel, *args, **more: launches.run(kernel, *args, **more)
    for text in sys.argv[2:]:
        size, orders, task_orders, k = map(int, text.split(","))
        launch(case(0, 2, orders=orders, task_orders=task_orders, k=k), size)
        for name, kernel in launches.compiled:
            figures = {"shared": kernel.metadata.shared, "ptx": len(kernel.asm["ptx"])}
            print(json.dumps({"case": text, "kernel": name, **figures}), flush=True)
        launches.compiled.clear()


if __name__ == "__main__":
    main()
