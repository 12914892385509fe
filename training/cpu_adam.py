"""DeepSpeed's AdamW for parameters in CPU memory: vector instructions and every core.

DeepSpeed compiles it at first use on each machine, in a minute or so, and keeps the result. Knows
no ZeRO; imported only where a spec asks for it.
"""

from __future__ import annotations

import fcntl
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder  # type: ignore[attr-defined] # by accelerator
from torch.utils.cpp_extension import get_default_build_root

from cluster.errors import SpecError


class CpuAdam(DeepSpeedCPUAdam):
    """AdamW whose update follows from gradients, moments and the number of the step alone."""

    def __init__(self, groups: Iterable[dict[str, Any]], **options: Any) -> None:
        """Options are `torch.optim.AdamW`'s. Raises SpecError where it cannot be compiled."""
        _compile()
        super().__init__(groups, adamw_mode=True, **options)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """See torch.optim.Optimizer. A state's step may be a tensor, as AdamW's is."""
        for moments in self.state.values():
            moments["step"] = int(moments["step"])
        # The compiled side multiplies its bias corrections up from step to step, where a resumed
        # run would begin with powers: rounded otherwise. One made anew always begins.
        first = self.param_groups[0]
        self.ds_opt_adam.create_adam(
            self.opt_id, first["lr"], *first["betas"], first["eps"], first["weight_decay"],
            self.adam_w_mode, False,
        )  # fmt: skip
        return super().step(closure)


def build_folder() -> Path:
    """Where it is compiled and kept, below TORCH_EXTENSIONS_DIR or torch's own place."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    version = f"py{sys.version_info.major}{sys.version_info.minor}-torch{torch.__version__}"
    return Path(root, f"graft-{version}")


def _compile() -> None:
    # ninja comes with DeepSpeed, beside an interpreter whose scripts need not be on the path.
    scripts, path = sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)
    if scripts not in path.split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([path, scripts])
    try:
        _load(build_folder())
    except Exception as error:  # compilers fail in many ways
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SpecError(
            f"optimizer.kind cpu_adam: DeepSpeed cannot compile it here ({reason}); install a C++ "
            "compiler on every node, or take adamw"
        ) from error


def _load(folder: Path) -> None:
    """One process of a machine at a time. Torch's own lock is a file, which whoever is killed while
    it compiles leaves behind, and for which everybody waits from then on; this one ends with its
    process, and the folder is Graft's alone, so a file that is there then is such a one."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "compiling").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (folder / "cpu_adam" / "lock").unlink(missing_ok=True)
        before = os.environ.get("TORCH_EXTENSIONS_DIR")
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
        try:
            CPUAdamBuilder().load(verbose=False)
        finally:
            del os.environ["TORCH_EXTENSIONS_DIR"]
            if before is not None:
                os.environ["TORCH_EXTENSIONS_DIR"] = before
