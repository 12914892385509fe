"""Which worker of a run this is, and values reduced over all of them. Knows torch alone."""

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

    def reduce(self, value: float, reduction: dist.ReduceOp.RedOpType) -> float:
        """What `reduction` makes of every worker's value. Collective."""
        if self.world_size == 1:
            return value
        reduced = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(reduced, op=reduction)
        return float(reduced)
