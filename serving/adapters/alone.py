"""What sets something of the whole process while an adapter is lowered: by one thread at a time.

Adapters are lowered in threads. `warnings.catch_warnings` replaces the process's filters, and PEFT
made without memory replaces `torch.nn.Module.register_parameter`: two threads at once would put
back each other's, and leave the replaced one behind.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Generator
from contextlib import contextmanager

_LOCK = threading.RLock()


@contextmanager
def without_warnings(message: str = "") -> Generator[None]:
    """Ignore warnings that begin with the regular expression `message`; no other thread is in any
    such scope meanwhile."""
    with _LOCK, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message)
        yield


@contextmanager
def peft_alone() -> Generator[None]:
    """The scope of whatever PEFT builds and merges, on CPU: BOFT does not look for its CUDA kernel,
    which it would first compile."""
    from peft.tuners.boft import layer

    with without_warnings():
        compiled = layer.get_fbd_cuda
        layer.get_fbd_cuda = lambda: None
        try:
            yield
        finally:
            layer.get_fbd_cuda = compiled
