"""What a GPU computes is what the CPU does, for every method at once."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from side_by_side import TOLERANCE, SideBySide

from serving.engine import ScoreRequest

PROMPT = list(range(60, 100))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_method_gives_the_same_on_both(bases: Callable[[str], Path], tmp_path: Path) -> None:
    setup = SideBySide(bases("llama"), tmp_path, "llama")
    cpu, cuda = (setup.make_engine(device=device) for device in ("cpu", "cuda"))
    scored = [ScoreRequest(PROMPT, variant) for variant in (None, *setup.folders)]
    for asked, one, other in zip(scored, cpu.score(scored), cuda.score(scored), strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0, msg=str(asked.adapter))
    requests = setup.requests(PROMPT, logprobs=5)
    mixed = cuda.generate(requests)
    assert [r.token_ids for r in mixed] == [r.token_ids for r in cpu.generate(requests)]
    setup.assert_as_peft(requests, mixed)
    cuda.check()
