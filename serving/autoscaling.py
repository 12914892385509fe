"""How many replicas the load needs, by the tokens that are still to be computed.

Requests differ a thousandfold in length, so their number says little. Ray Serve runs the policy in
its controller, takes means over the look-back, and waits out the delays of the spec; it pickles
this module by value, so nothing of Graft is imported here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

METRIC = "outstanding_tokens"
# A replica goes only if the others would then be at this share of their target: a load between
# two sizes must not add and remove the same replica again and again.
KEPT_FREE = 0.8


def replicas_for(tokens: float, *, target: int, current: int) -> int:
    """The number of replicas at `target` outstanding tokens each."""
    wanted = math.ceil(tokens / target)
    if wanted >= current:
        return wanted
    return min(current, math.ceil(tokens / (target * KEPT_FREE)))


class OutstandingTokens:
    """A policy of Ray Serve's autoscaling; `target` is in tokens per replica."""

    def __init__(self, target: int) -> None:
        self._target = target

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """The wanted number of replicas, and no state."""
        reported: Mapping[Any, float] = ctx.aggregated_metrics.get(METRIC, {})
        tokens = sum(reported.values())
        # Requests that no replica has taken yet are like those that one has.
        queued = ctx.total_queued_requests or 0.0
        taken = ctx.total_num_requests - queued
        if queued and taken > 0:
            tokens *= ctx.total_num_requests / taken
        wanted = replicas_for(tokens, target=self._target, current=ctx.target_num_replicas)
        return max(wanted, 1 if ctx.total_num_requests > 0 else 0), {}
