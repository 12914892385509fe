"""Trainable tokens: rows of an embedding in place of the base's, also where a head is tied to it;
or of a head alone.

PEFT saves the rows and, in the config, which tokens they are of: TRAINABLE_TOKENS, or a LoRA's
`trainable_token_indices`. W'[token] = row, so that W' - W is sparse. Its head with such rows is
x W'ᵀ: it leaves out a bias that the base's head has, in training and after.

    K tokens    H hidden
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cluster.adapter_folder import CONFIG, WEIGHTS, AdapterFolder, fault
from serving.adapters.config import refuse_unread
from serving.adapters.primitives import Delta, LinearDelta, LoweredAdapter
from serving.adapters.target import PREFIX, Target, bare_name, shape_of
from serving.adapters.weights import Sparse, compressed, sharing

_ROWS = ".trainable_tokens_delta"


def lower_trainable_tokens(
    folder: AdapterFolder, tensors: Mapping[str, torch.Tensor], target: Target
) -> LoweredAdapter:
    """A TRAINABLE_TOKENS folder as sparse deltas. Raises AdapterError."""
    refuse_unread(folder, {"token_indices"}, {"target_modules", "init_weights"})
    rows: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        name = bare_name(folder, key)
        if not name.endswith(_ROWS):
            raise fault(folder.path, WEIGHTS, f"has tensor {key!r}, which is no row of tokens")
        rows[name.removesuffix(_ROWS)] = tensor
    deltas: dict[str, Delta] = {}
    add_rows(folder, rows, deltas, target)
    return LoweredAdapter(deltas)


def add_rows(
    folder: AdapterFolder,
    rows: Mapping[str, torch.Tensor],
    deltas: dict[str, Delta],
    target: Target,
) -> None:
    """Put the changed rows of each module in `rows`, and of what is tied to the input embedding if
    that is one, into `deltas`.

    Raises:
        AdapterError: they fit neither the config nor the base, or `deltas` has the module already.
    """
    changed: set[str] = set()
    for module, rows_KH in rows.items():
        weight, change = _change(folder, module, rows_KH, target)
        for tied, _ in sharing(target, weight):
            # PEFT ties others to the input embedding alone, and not those with rows of their own.
            if tied != module and (module != target.input_embedding or tied in rows):
                continue
            if tied in deltas:
                raise fault(
                    folder.path,
                    CONFIG,
                    f"trains tokens of {module!r} and changes {tied!r}, of the same weight, "
                    "otherwise; merge the adapter, or train it without",
                )
            shape = target.modules[tied]
            deltas[tied] = LinearDelta(
                shift_O=None if shape.bias is None else -shape.bias.to(target.dtype),
                sparse=compressed(change, shape, target),
            )
            changed.add(tied)
    asked = _asked(folder)
    names = [str(name) for name in asked] if isinstance(asked, dict) else [""] if asked else []
    missing = next((n for n in names if not any(m.endswith(n) for m in changed)), None)
    if missing is not None:
        raise fault(
            folder.path,
            WEIGHTS,
            f"has no rows for the trainable_token_indices of its config ({missing or asked!r}); "
            "save the adapter anew",
        )


def _change(
    folder: AdapterFolder, module: str, rows_KH: torch.Tensor, target: Target
) -> tuple[torch.Tensor, Sparse]:
    """The weight of a module, and what its trained rows change of it. Raises AdapterError."""
    key = f"{PREFIX}{module}{_ROWS}"
    shape = shape_of(folder, key, module, target)
    weight = shape.parameters.get("weight")
    tokens = _tokens_of(folder, module)
    if not shape.takes_low_rank or weight is None or shape.kind == "transposed":
        raise fault(folder.path, WEIGHTS, f"has {key!r}, whose module has no rows of tokens")
    if shape.is_quantized:
        raise fault(
            folder.path,
            WEIGHTS,
            f"has {key!r}, rows of a module that the base {target.name} keeps in 4 or 8 bits; "
            "serve it over the plain base",
        )
    size, hidden = weight.shape
    if tuple(rows_KH.shape) != (len(tokens), hidden) or max(tokens) >= size:
        raise fault(
            folder.path,
            WEIGHTS,
            f"has {key!r} with shape {tuple(rows_KH.shape)}, where the base {target.name} and "
            f"its config's {len(tokens)} tokens up to {max(tokens)} need "
            f"({len(tokens)}, {hidden}) of {size}; the adapter was made for another base "
            f"({folder.base_model})",
        )
    index_K, order_K = torch.tensor(tokens).sort()
    change_KH = rows_KH.float()[order_K] - weight[index_K.to(weight.device)].float().cpu()
    places_KH = index_K[:, None] * hidden + torch.arange(hidden)
    return weight, Sparse(places_KH.flatten(), change_KH.flatten())


def _asked(folder: AdapterFolder) -> Any:
    return folder.config.get("trainable_token_indices") or folder.config.get("token_indices")


def _tokens_of(folder: AdapterFolder, module: str) -> list[int]:
    """The tokens whose rows a module has, in the order of the rows. Raises AdapterError."""
    tokens = _asked(folder)
    if isinstance(tokens, dict):
        found = [value for name, value in tokens.items() if module.endswith(str(name))]
        tokens = found[0] if found and all(value == found[0] for value in found) else None
    if (
        not isinstance(tokens, list)
        or not tokens
        or not all(type(token) is int and token >= 0 for token in tokens)
        or len(set(tokens)) < len(tokens)
    ):
        raise fault(
            folder.path,
            CONFIG,
            f"has {str(tokens)[:80]!r} for the tokens of {module!r}, not different token ids",
        )
    return tokens
