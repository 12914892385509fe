"""Compile the Triton kernels for GPUs of one compute capability (80, say), without a GPU, as they
are called, and tell how much shared memory each takes: a line for each, with its dtype, form and
bytes.
"""

import sys
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from serving.adapters import gpu_low_rank
from serving.engine import gpu_attention

# Heads in a group, and their size.
HEADS = [(1, 8), (4, 128)]
# Of which Triton knows that they are divided by 16, as pointers are.
DIVIDED = {"token_stride", "head_stride", "inputs", "outputs", "part_inputs"}


def main(capability: int) -> None:
    for dtype, itemsize in (("bf16", 2), ("fp32", 4)):
        for group, size in HEADS:
            for decodes in (True, False):
                shape = gpu_attention.tile_shape(group, size, itemsize, decodes)
                form: dict[str, Any] = {"heads": 8 * group, "group": group, "size": size}
                constants = shape | form | {"size_stride": 1}
                shared = compiled(gpu_attention._attend, dtype, constants, capability)
                print("_attend", dtype, f"{group}x{size}", decodes, shared)
        form = {"heads": 32, "size": 128, "width": 128, "most_parts": gpu_attention._MOST_PARTS}
        print("_add_parts", dtype, compiled(gpu_attention._add_parts, dtype, form, capability))
        form = {"tile_tokens": 16, "ranks": 16, "block": 128}
        for kernel in (gpu_low_rank._shrink, gpu_low_rank._expand):
            print(kernel.__name__, dtype, compiled(kernel, dtype, form, capability))


def compiled(kernel: Any, dtype: str, constants: dict[str, Any], capability: int) -> int:
    """Its shared memory, bytes."""
    tensors = {
        "output": dtype, "query": dtype, "keys": dtype, "values": dtype, "x": dtype, "y": dtype,
        "sums": "fp32", "ends": "fp32", "low": "fp32", "slots": "i32",
        "pieces": "i64", "tokens": "i64", "table": "i64", "tiles": "i64",
    }  # fmt: skip
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        plain = "fp32" if name == "scale" else "i32"
        signature[name] = "*" + tensors[name] if name in tensors else plain
        if name in constants:
            signature[name] = "constexpr"
    places = {name: (kernel.arg_names.index(name),) for name in kernel.arg_names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={places[name]: value for name, value in constants.items()},
        attrs={
            places[name]: [["tt.divisibility", 16]]
            for name, kind in signature.items()
            if kind.startswith("*") or name in DIVIDED
        },
    )
    target = GPUTarget("cuda", capability, 32)
    return int(triton.compile(source, target=target).metadata.shared)


main(int(sys.argv[1]))
