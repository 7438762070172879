"""The pretrained encoder as a file that timm loads: safetensors, and JSON that says how.

The weights are renamed and reshaped, nothing else: the fixed positions become timm's `pos_embed`,
the linear layer on cut patches its convolution. timm has no vision transformer for volumes: their
encoder keeps its own names, and trainables.mae.Encoder loads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from trainables import durable
from trainables.config import TrialConfig
from trainables.errors import StorageError, UserError
from trainables.fillings import gain_of
from trainables.mae import Encoder
from trainables.tensors import save_tensors

if TYPE_CHECKING:
    from trainables.data import Dataset

TIMM_MODEL = "vit_tiny_patch16_224"  # a plain vision transformer; every number of it is replaced
WEIGHTS, DESCRIPTION = "encoder.safetensors", "encoder.json"


def export_encoder(
    folder: Path,
    encoder: Encoder,
    config: TrialConfig,
    seed: int,
    dataset: Dataset,
    results: Mapping[str, float],
) -> None:
    """Write encoder.safetensors and, last, encoder.json into `folder`."""
    is_flat = len(dataset.size) == 2
    if is_flat:
        build: dict[str, Any] = {"timm": {"model": TIMM_MODEL, "kwargs": timm_kwargs(encoder)}}
    else:
        build = {"encoder": own_kwargs(encoder, config, dataset)}
    description = {
        **build,
        "input": {
            "channels": dataset.channels,
            "size": list(dataset.size),
            "low": dataset.low,
            "high": dataset.high,
            "mean": list(dataset.mean),
            "std": list(dataset.std),
            "standardise": "((pixels - low) / (high - low) - mean) / std, per channel",
        },
        "usage": usage(dataset) if is_flat else own_usage(dataset),
        "pretraining": {
            "config": config.model_dump(mode="json"),
            "seed": seed,
            "data": {"name": dataset.name, "fingerprint": dataset.fingerprint},
            "gain": _gain(results),
            "results": dict(results),
        },
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with durable.replacing(folder / WEIGHTS, only_writer=True) as aside:
            save_tensors(timm_weights(encoder) if is_flat else own_weights(encoder), aside)
        with durable.replacing(folder / DESCRIPTION, only_writer=True) as aside:
            aside.write_text(json.dumps(description, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise StorageError(f"{folder}: the encoder could not be written ({error})") from error


def _gain(results: Mapping[str, float]) -> dict[str, Any] | None:
    """How much better it fills in hidden pixels than trivial fillings; None if not measured."""
    gain = gain_of(results)
    if gain is None:
        return None
    return {"decibels": gain.decibels, "over": gain.over, "is_learnt": gain.is_learnt}


def timm_kwargs(encoder: Encoder) -> dict[str, Any]:
    """Arguments of timm.create_model that build the same network without its head."""
    patch, channels = encoder.patch, encoder.channels
    return {
        "img_size": [cells * edge for cells, edge in zip(encoder.grid, patch, strict=True)],
        "patch_size": list(patch),
        "in_chans": channels,
        "embed_dim": encoder.width,
        "depth": encoder.depth,
        "num_heads": encoder.heads,
        "num_classes": 0,
    }


def timm_weights(encoder: Encoder) -> dict[str, Tensor]:
    """The state_dict of timm's VisionTransformer that computes what `encoder` does."""
    if len(encoder.grid) != 2:
        raise UserError(
            f"export: timm's vision transformer takes images of 2 axes, this encoder has "
            f"{len(encoder.grid)}"
        )
    state = {name: value.detach().cpu() for name, value in encoder.state_dict().items()}
    patch, width = encoder.patch, encoder.width
    kernel = state.pop("embed.weight").reshape(width, *patch, encoder.channels)
    positions = nn.functional.pad(encoder.positions.cpu(), (0, 0, 1, 0))  # none for the class token
    renamed = {
        "patch_embed.proj.weight": kernel.permute(0, 3, 1, 2),
        "patch_embed.proj.bias": state.pop("embed.bias"),
        "cls_token": state.pop("class_token"),
        "pos_embed": positions[None],
        **state,
    }
    return {name: value.contiguous() for name, value in renamed.items()}


def own_kwargs(encoder: Encoder, config: TrialConfig, dataset: Dataset) -> dict[str, Any]:
    """Arguments of trainables.mae.Encoder that build the same network."""
    return {
        "size_name": config.model.size,
        "patch": encoder.patch,
        "image_size": list(dataset.size),
        "channels": encoder.channels,
        "position_unit": config.model.positions,
        "is_padded": encoder.is_padded,
    }


def own_weights(encoder: Encoder) -> dict[str, Tensor]:
    """What trainables.mae.Encoder.load_state_dict takes."""
    return {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}


def own_usage(dataset: Dataset) -> list[str]:
    """Lines of Python that load an encoder that timm has no class for."""
    size = ", ".join(map(str, dataset.size))
    return [
        "import json, pathlib, torch; from safetensors.torch import load_file; "
        "from trainables.mae import Encoder, patchify",
        f"about = json.loads(pathlib.Path('{DESCRIPTION}').read_text())['encoder']",
        f"encoder = Encoder(**about).eval(); encoder.load_state_dict(load_file('{WEIGHTS}'))",
        f"tokens = encoder(patchify(torch.zeros(1, {dataset.channels}, {size}), about['patch']))",
    ]


def usage(dataset: Dataset) -> list[str]:
    """Three lines of Python that load the encoder from the folder of the two files."""
    size = ", ".join(map(str, dataset.size))
    return [
        "import json, pathlib, timm, torch; "
        f"about = json.loads(pathlib.Path('{DESCRIPTION}').read_text())['timm']",
        f"encoder = timm.create_model(about['model'], checkpoint_path='{WEIGHTS}', "
        "**about['kwargs']).eval()",
        f"tokens = encoder.forward_features(torch.zeros(1, {dataset.channels}, {size}))",
    ]
