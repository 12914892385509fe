"""What the machine adds to the tensors of a worker on CPU: its allocator, and its libraries.

Both are asked, not modelled: the tensors' sizes are played through this machine's own malloc, in a
process that never touches the memory, and the libraries are loaded in one that does nothing else.
`python -m training.heap` is either child; it imports no more than it needs.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cluster.memory import HEAP_BLOCK_BYTES, keep_freed_memory, peak_memory_mib
from cluster.tasks import Task

# torch asks for aligned blocks. Beside each tensor live small objects of its own (sizes, strides,
# views, autograd's nodes); they fall into the gaps that aligned blocks leave, and so keep freed
# ones apart: with these sizes the peaks of real workers come out (docs/benchmarks.md).
_ALIGNMENT = 64
_SMALL_BLOCKS = (16, 32, 48, 64, 80)
_GRAIN = 2**16  # in which touched memory is counted
Event = tuple[int, int]


def resident_bytes(events: Sequence[Event], mapped: int) -> int:
    """The most that was resident at once.

    Args:
        events: (number, bytes) of a new tensor, (number, 0) of its end.
        mapped: Tensors below this number lie in a mapped file, not in the heap.
    """
    return int(_child("replay", json.dumps({"events": events, "mapped": mapped})))


def runtime_mib(base: str, *, zero: bool, task: Task = "causal_lm") -> float:
    """What a worker's process holds beside the tensors of the model in `base`, in MiB."""
    return float(_child("runtime", json.dumps({"base": base, "zero": zero, "task": task})))


def _child(task: str, document: str) -> Any:
    code = [sys.executable, "-m", "training.heap", task]
    path = os.pathsep.join(path for path in sys.path if path)
    result = subprocess.run(
        code, input=document, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    if result.returncode:
        raise RuntimeError(f"training.heap {task}: {result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


class _Heap:
    """Blocks of this process's malloc, none of them ever written to."""

    def __init__(self) -> None:
        keep_freed_memory()  # as a worker does
        self._libc: Any = ctypes.CDLL(None)
        self._libc.malloc.restype = ctypes.c_void_p
        self._libc.malloc.argtypes = [ctypes.c_size_t]
        self._libc.free.argtypes = [ctypes.c_void_p]
        self._touched: set[int] = set()
        self._outside = 0
        self._held: dict[int, tuple[int, list[int]]] = {}

    @property
    def resident_bytes(self) -> int:
        """What would be resident if each block had been written to."""
        return self._outside + len(self._touched) * _GRAIN

    def take(self, number: int, size: int, *, is_mapped: bool) -> None:
        """A tensor's memory."""
        at, block = ctypes.c_void_p(), ctypes.c_size_t(size)
        # A mapping of its own, gone when it is freed; or more than this machine promises.
        is_outside = is_mapped or size >= HEAP_BLOCK_BYTES
        if is_outside or self._libc.posix_memalign(ctypes.byref(at), _ALIGNMENT, block):
            self._outside += size
            self._held[number] = (size, [])
            return
        start = int(at.value or 0)
        self._touched.update(range(start // _GRAIN, (start + size - 1) // _GRAIN + 1))
        small = [int(self._libc.malloc(small)) for small in _SMALL_BLOCKS]
        self._held[number] = (0, [start, *small])

    def give_back(self, number: int) -> None:
        """The end of a tensor."""
        outside, blocks = self._held.pop(number)
        self._outside -= outside
        for block in blocks:
            self._libc.free(block)


def _replay(document: dict[str, Any]) -> int:
    heap, peak = _Heap(), 0
    for number, size in document["events"]:
        if size:
            heap.take(number, size, is_mapped=number < document["mapped"])
            peak = max(peak, heap.resident_bytes)
        else:
            heap.give_back(number)
    return peak


def _runtime(document: dict[str, Any]) -> float:
    """Load what a worker loads, and let each library make what it makes at first use."""
    import ray.train
    import torch

    import training.worker
    from cluster.base_model import empty_base
    from cluster.linear import KEPT_SHAPES, linear

    assert ray.train
    assert training.worker
    keep_freed_memory()
    torch.set_num_threads(1)
    if document["zero"]:
        import deepspeed

        assert deepspeed
    empty_base(document["base"], task=document["task"], labels=("one", "other"))
    layer = torch.nn.Linear(512, 512)
    layer(torch.ones(256, 512)).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()
    for rows in range(256, 256 + KEPT_SHAPES):  # a run's micro-batches have any number of tokens
        linear(torch.ones(rows, 512), layer.weight.detach())
    return peak_memory_mib()


if __name__ == "__main__":
    asked = json.loads(sys.stdin.read())
    # Ray Train runs a worker's function in a thread, where malloc has another kind of arena.
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(_replay if sys.argv[1] == "replay" else _runtime, asked)
        print(json.dumps(found.result()))
