"""What a base's cache holds, measured: configs name heads in many ways and some count others than
those that are cached.

    K key/value heads    D head size
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from cluster.errors import BaseModelError
from serving.adapters import Target


@contextmanager
def running_base() -> Generator[None]:
    """A scope that tries a base: what the base's own code raises where it cannot be run so is a
    BaseModelError, of its first line."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
        raise BaseModelError((str(error).splitlines() or [type(error).__name__])[0]) from error


@torch.inference_mode()
def measured(model: Any, target: Target) -> Target:
    """`target` with the layers, heads and sizes that `model` keeps keys and values of.

    Raises:
        BaseModelError: they are not the same in all layers, or something else is kept.
    """
    own, cross = ([DynamicLayer() for _ in range(target.num_layers)] for _ in range(2))
    ids = torch.zeros(1, 2, dtype=torch.long, device=target.device)
    cache = Cache(layers=list(own))
    inputs: dict[str, Any] = {"input_ids": ids, "past_key_values": cache}
    if target.is_seq2seq:
        inputs["decoder_input_ids"] = ids
        inputs["past_key_values"] = EncoderDecoderCache(cache, Cache(layers=list(cross)))
    layers = [*own, *cross] if target.is_seq2seq else own
    with running_base():
        model(**inputs, use_cache=True)
    shapes = {_shape(layer) for layer in layers}
    shape = shapes.pop()
    if shapes or shape is None:
        raise BaseModelError("its layers do not all keep keys and values of one shape")
    _, heads, _, size = shape
    return replace(target, num_kv_heads=heads, head_size=size)


def _shape(layer: DynamicLayer) -> torch.Size | None:
    """[1, K, tokens, D] of both keys and values; None if they differ or are not there."""
    keys, values = layer.keys, layer.values
    if keys is None or values is None or keys.shape != values.shape:
        return None
    return keys.shape
