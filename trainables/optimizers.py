"""Optimisers, their parameter groups, and the shape of the learning rate.

To add an optimiser, write a function of (parameter groups, effective batch) with keyword-only
options that returns one of torch, and add it to OPTIMIZERS. It takes its groups from `with_rates`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from trainables.late import Late

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = Late("torch")

Rate = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]

# Last part of the name of what is a place or a token rather than a map: never decayed
TOKENS = ("class_token", "mask_token", "positions", "cls_token", "pos_embed")

_ENCODER = re.compile(r"(?:^|\.)encoder\.")
_ENCODER_PART = re.compile(
    r"(?:^|\.)encoder\.(?:_orig_mod\.)?(embed|class_token|blocks)\b(?:\.(\d+))?"
)


def adamw(
    parameter_groups: list[dict[str, Any]],
    effective_batch: int,
    *,
    base_lr: Rate = 1.5e-4,
    weight_decay: Decay = 0.05,
    betas: tuple[Beta, Beta] = (0.9, 0.95),
) -> torch.optim.Optimizer:
    """AdamW as in MAE; `base_lr` is for a batch of 256 and grows with the batch."""
    groups = with_rates(parameter_groups, base_lr * effective_batch / 256)
    return torch.optim.AdamW(groups, weight_decay=weight_decay, betas=betas, fused=True)


def with_rates(parameter_groups: list[dict[str, Any]], rate: float) -> list[dict[str, Any]]:
    """The groups, each with its share of the rate, from which schedules set out."""
    rates = [rate * group.get("lr_scale", 1.0) for group in parameter_groups]
    return [
        {**group, "lr": own, "initial_lr": own}
        for group, own in zip(parameter_groups, rates, strict=True)
    ]


def parameter_groups(
    model: nn.Module, layer_decay: float | None, *, is_encoder_apart: bool = False
) -> list[dict[str, Any]]:
    """Groups of trained parameters by decay and, with `layer_decay`, by depth in `model.encoder`.

    No decay on biases, norms, tokens and positions. With `layer_decay` the rate falls by that
    factor with each block from the last one down to the embedding (BEiT, 2021). With
    `is_encoder_apart`, groups of the encoder hold nothing else, and say so (`of_encoder`).
    """
    groups: dict[tuple[bool, float, bool], dict[str, Any]] = {}
    depth = _encoder_depth(model) if layer_decay is not None else 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_decayed = parameter.ndim > 1 and name.rsplit(".", 1)[-1] not in TOKENS
        scale = 1.0 if layer_decay is None else layer_decay ** _blocks_above(name, depth)
        of_encoder = is_encoder_apart and _ENCODER.search(name) is not None
        group = groups.setdefault(
            (is_decayed, scale, of_encoder),
            {"params": [], "lr_scale": scale, "of_encoder": of_encoder},
        )
        if not is_decayed:
            group["weight_decay"] = 0.0
        group["params"].append(parameter)
    return list(groups.values())


def learning_rate(images_seen: int, images_total: int, warmup_images: int) -> float:
    """Multiplier: a straight rise over the first `warmup_images`, then half a cosine to 0."""
    if images_seen < warmup_images:
        return images_seen / warmup_images
    fall = (images_seen - warmup_images) / max(1, images_total - warmup_images)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, fall)))


def set_learning_rate(
    optimizer: torch.optim.Optimizer, multiplier: float, of_encoder: float | None = None
) -> None:
    """Every group's rate = what it was built with, times `multiplier`.

    `of_encoder`: the multiplier of the encoder's groups, where it is another one.
    """
    for group in optimizer.param_groups:
        is_other = of_encoder is not None and group["of_encoder"]
        group["lr"] = group["initial_lr"] * (of_encoder if is_other else multiplier)


def _encoder_depth(model: nn.Module) -> int:
    blocks = [_encoder_block(name) for name, _ in model.named_parameters()]
    return max((block for block in blocks if block is not None), default=0)


def _blocks_above(name: str, depth: int) -> int:
    """Steps of decay from the top: 0 for the last norm and all that is not the encoder."""
    block = _encoder_block(name)
    return 0 if block is None else depth + 1 - block


def _encoder_block(name: str) -> int | None:
    """0 for the embedding, 1 for the first block, ...; None outside."""
    found = _ENCODER_PART.search(name)
    if found is None:
        return None
    return int(found[2]) + 1 if found[1] == "blocks" else 0


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": adamw}
