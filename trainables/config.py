"""What one trial is: model, masking, pretraining, segmentation. Pure data, no device, no paths.

The identity of a trial is the hash of its content, so equal settings are the same trial.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from trainables.augment import AUGMENTATIONS
from trainables.losses import LOSSES
from trainables.masking import MASKING
from trainables.named import Choice, named
from trainables.optimizers import OPTIMIZERS
from trainables.schedules import Schedule, ratio_problem

if TYPE_CHECKING:
    Strategy = Choice
    Loss = Choice
    Optimizer = Choice
    Augmentation = Choice
else:
    Strategy = named(MASKING)
    Loss = named(LOSSES)
    Optimizer = named(OPTIMIZERS)
    Augmentation = named(AUGMENTATIONS)

# width, depth, heads of the encoder; head width is 64 as attention kernels like it
SIZES: dict[str, dict[str, int]] = {
    "pico": {"width": 64, "depth": 4, "heads": 1},
    "nano": {"width": 128, "depth": 6, "heads": 2},
    "tiny": {"width": 192, "depth": 12, "heads": 3},
    "small": {"width": 384, "depth": 12, "heads": 6},
    "base": {"width": 768, "depth": 12, "heads": 12},
    "large": {"width": 1024, "depth": 24, "heads": 16},
    "huge": {"width": 1280, "depth": 32, "heads": 20},
}

Positive = Annotated[int, Field(ge=1)]


class Strict(BaseModel):
    """Unknown keys are errors; a resolved configuration never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DecoderConfig(Strict):
    attention: Annotated[
        Literal["self", "cross"],
        Field(description="self: MAE's, over all patches; cross: CrossMAE's, hidden to visible"),
    ] = "self"
    depth: Positive = 2
    width: Annotated[int, Field(ge=64, multiple_of=64, description="heads are 64 wide")] = 128
    predicted: Annotated[
        float, Field(gt=0, le=1, description="share of hidden patches predicted; cross only")
    ] = 1.0


class ModelConfig(Strict):
    size: Literal["pico", "nano", "tiny", "small", "base", "large", "huge"] = "tiny"
    patch: Annotated[Positive, Field(description="edge of a patch in pixels")] = 8
    decoder: DecoderConfig = DecoderConfig()


class MaskingConfig(Strict):
    strategy: Strategy = Field(default={"name": "random"}, validate_default=True)
    unit: Annotated[
        Positive | None,
        Field(description="edge in pixels of the block hidden as one; null: the patch"),
    ] = None
    ratio: Schedule = Field(default={"name": "constant"}, validate_default=True)
    secondary: Annotated[
        float,
        Field(ge=0, lt=1, description="share of visible units shown as a shared token (UM-MAE)"),
    ] = 0.0

    @field_validator("ratio")
    @classmethod
    def _ratio_is_a_share(cls, ratio: Choice) -> Choice:
        problem = ratio_problem(ratio)
        if problem is not None:
            raise ValueError(problem)
        return ratio


class PretrainConfig(Strict):
    epochs: Positive = 40
    batch: Annotated[Positive, Field(description="images per step over all workers")] = 64
    optimizer: Optimizer = Field(default={"name": "adamw"}, validate_default=True)
    warmup_images: Annotated[
        Annotated[int, Field(ge=0)] | None,
        Field(description="null: a twentieth of the planned images"),
    ] = None
    loss: Loss = Field(default={"name": "mean"}, validate_default=True)
    visible_weight: Annotated[
        float, Field(ge=0, description="weight of the loss on visible pixels")
    ] = 0.0
    visible_mean: Annotated[
        Literal["per_region", "all_patches"],
        Field(description="average hidden and visible patches each by themselves, or together"),
    ] = "per_region"
    target: Literal["pixels", "normalised"] = "pixels"
    augment: Augmentation = Field(default={"name": "flips"}, validate_default=True)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False


class SegmentConfig(Strict):
    epochs: Positive = 20
    batch: Positive = 16
    encoder: Literal["finetune", "frozen", "random-init"] = "finetune"
    optimizer: Optimizer = Field(default={"name": "adamw", "base_lr": 1e-2}, validate_default=True)
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.75
    warmup_images: Annotated[int, Field(ge=0)] | None = None
    features: Annotated[int, Field(ge=4, description="channels of the finest decoder level")] = 16
    augment: Augmentation = Field(default={"name": "flips"}, validate_default=True)
    precision: Literal["auto", "fp32", "bf16"] = "auto"


class TrialConfig(Strict):
    """One complete configuration, without its seed: an arm."""

    model: ModelConfig = ModelConfig()
    masking: MaskingConfig = MaskingConfig()
    pretrain: PretrainConfig = PretrainConfig()
    segment: SegmentConfig = SegmentConfig()

    @property
    def unit(self) -> int:
        """Edge of the mask unit in pixels."""
        return self.masking.unit or self.model.patch


class ProbeConfig(Strict):
    """The fixed hidden regions on which every trial of a study is judged."""

    unit: Annotated[
        Positive | None,
        Field(description="edge of a hidden region in pixels; null: the study's largest patch"),
    ] = None
    ratios: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)] = (
        0.25,
        0.5,
        0.75,
    )
    images: Annotated[Positive, Field(description="validation images that are probed")] = 64
    seed: int = 0


def canonical_json(value: Any) -> str:
    """One text for equal content: sorted keys, no spaces, shortest floats that read back equal."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def arm_id(config: TrialConfig) -> str:
    """Identity of a configuration without its seed."""
    return digest(config.model_dump(mode="json"))[:8]


def trial_id(config: TrialConfig, seed: int, data_fingerprint: str) -> str:
    """Identity of a trial: configuration, seed, and the data it is trained on."""
    content = {"config": config.model_dump(mode="json"), "seed": seed, "data": data_fingerprint}
    return digest(content)[:12]


def conflicts(config: TrialConfig) -> dict[str, str]:
    """Settings that are valid one by one and exclude each other: dotted path -> why."""
    errors = {}
    decoder = config.model.decoder
    if decoder.attention == "cross" and config.pretrain.visible_weight > 0:
        errors["pretrain.visible_weight"] = (
            f"{config.pretrain.visible_weight:g} asks for visible patches to be reconstructed, but "
            f"a decoder with cross-attention has no queries for them; set it to 0, or "
            f"model.decoder.attention to self"
        )
    if decoder.attention == "self" and decoder.predicted < 1:
        errors["model.decoder.predicted"] = (
            f"{decoder.predicted:g} is for a decoder with cross-attention: with self-attention "
            f"every hidden patch has to be there; set it to 1, or model.decoder.attention to cross"
        )
    return errors


def geometry_errors(config: TrialConfig, size: tuple[int, ...], probe_unit: int) -> dict[str, str]:
    """What does not fit together: dotted path -> why. Empty when the arm can run on such images."""
    shape = "x".join(map(str, size))
    errors = {}
    patch, unit = config.model.patch, config.unit
    if any(edge % patch for edge in size):
        errors["model.patch"] = f"{patch} does not divide the image size {shape}"
    if unit % patch:
        errors["masking.unit"] = f"{unit} is not a multiple of the patch size {patch}"
    elif any(edge % unit for edge in size):
        errors["masking.unit"] = f"{unit} does not divide the image size {shape}"
    elif math.prod(edge // unit for edge in size) < 2:
        errors["masking.unit"] = f"{unit} is the whole image ({shape}), of which a part is hidden"
    if probe_unit % patch:
        errors["model.patch"] = (
            f"{patch} does not divide the probe's unit {probe_unit}, so that trials could not be "
            f"compared on the same pixels"
        )
    return errors
