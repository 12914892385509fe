"""Which worker this is, and what all of them make of a value."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Place:
    """One of the workers of a run."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def over_workers(self, value: float, reduction: dist.ReduceOp.RedOpType) -> float:
        """What `reduction` makes of every worker's value. Collective."""
        if self.world_size == 1:
            return value
        told = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(told, op=reduction)
        return float(told)
