"""What attention's launches need of shared memory: compiled for chips that need not be here.

    python tests/compile_attention.py 86 72 101376 bfloat16 128,256

Compute capability, processors, bytes that a program may have, type and head sizes. Prints a line of
JSON for each launch that may be chosen there. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trbatch.engine.kernels import attention
from trbatch.engine.kernels.launch import Chip, Launch, choose_launch

# Few and many short rows, a large tree, many small trees, prompts: (rows, pairs).
STEPS = ((4, 8), (4, 1024), (324, 8), (128, 256), (8192, 512))
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
GROUP = 4


def compiled_bytes(capability: int, launch: Launch, dtype: torch.dtype, dim: int) -> int:
    """Shared memory of a program of a tree's step over windows, the most that there is."""
    operands = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[TYPES[dtype]]
    given: dict[str, Any] = {
        "HEADS": 8 * GROUP, "GROUP": GROUP, "DIM": dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)), "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n, "SPLIT": launch.splits > 1, "PAGE": 16, "WINDOW": 4096,
        "SOFTCAP": 0.0, "CAUSAL": False, "OPERANDS": operands,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }  # fmt: skip
    own = ("query", "new_keys", "new_values", "keys", "values", "out")
    pointers = dict.fromkeys(own, f"*{TYPES[dtype]}")
    pointers |= dict.fromkeys(("starts", "committed", "pages", "positions"), "*i32")
    pointers |= {"levels": "*fp32", "ancestors": "*i64"}
    if launch.splits > 1:
        pointers["out"] = "*fp32"
    kinds, values, aligned = {}, {}, {}
    for place, name in enumerate(attention._attend.arg_names):
        kinds[name] = pointers.get(name, "i32")
        if name in given:
            kinds[name], values[place,] = "constexpr", given[name]
        elif name == "scale":
            kinds[name] = "fp32"
        elif name in pointers or name.endswith(("_head", "_token")):
            aligned[place,] = [["tt.divisibility", 16]]
    source = ASTSource(attention._attend, kinds, values, aligned)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return int(kernel.metadata.shared)


def main() -> None:
    capability, chip = int(sys.argv[1]), Chip(int(sys.argv[2]), int(sys.argv[3]))
    dtype = getattr(torch, sys.argv[4])
    for dim in map(int, sys.argv[5].split(",")):
        chosen = [
            choose_launch(dtype, chip, dim=dim, rows=rows, pairs=pairs, keys=8192)
            for rows, pairs in STEPS
        ]
        for launch in {one._replace(splits=min(2, one.splits)) for one in chosen}:
            needed = compiled_bytes(capability, launch, dtype, dim)
            print(json.dumps({"dim": dim, "bytes": needed, **launch._asdict()}), flush=True)


if __name__ == "__main__":
    main()
