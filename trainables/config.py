"""What one trial is: model, masking, pretraining, segmentation. Pure data, no device, no paths.

The identity of a trial is the hash of its content, so equal settings are the same trial.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    field_validator,
    model_serializer,
    model_validator,
)

from trainables.augment import AUGMENTATIONS
from trainables.edges import Edges, fits, grid_of, in_words, per_axis, simplest
from trainables.losses import LOSSES
from trainables.masking import MASKING
from trainables.named import Choice, named
from trainables.optimizers import OPTIMIZERS
from trainables.schedules import Schedule, ratio_problem
from trainables.settings import digest


def _edges(value: Any) -> Edges:
    edges = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not edges or not all(type(edge) is int and edge >= 1 for edge in edges):
        raise ValueError(
            f"given {value!r}; expected a valid integer from 1 on, or a list of them, one for each "
            f"axis of the images"
        )
    return edges if isinstance(value, list | tuple) else edges[0]


if TYPE_CHECKING:
    EdgesSetting = Edges
    Strategy = Choice
    Loss = Choice
    Optimizer = Choice
    Augmentation = Choice
else:
    _one_edge = {"type": "integer", "minimum": 1}
    _edge_list = {"type": "array", "items": _one_edge, "minItems": 1}
    EdgesSetting = Annotated[
        Any, AfterValidator(_edges), WithJsonSchema({"anyOf": [_one_edge, _edge_list]})
    ]
    Strategy = named({name: strategy.hide for name, strategy in MASKING.items()})
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
Labels = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)]
Clip = Annotated[
    Annotated[float, Field(gt=0)] | None,
    Field(description="longest gradient, to which longer ones are scaled down; null: any"),
]
Precision = Annotated[
    Literal["fast", "fp32", "bf16", "auto"],
    Field(
        description="of products; weights and sums stay fp32. fast: bf16 where the device is "
        "faster in it, GPUs from Ampere on and CPUs with AMX; auto, of release 0.1: on GPUs alone"
    ),
]

LENGTHS = ("epochs", "images", "flops")  # units of how long a phase trains

# Settings that release 0.1 did not have: dotted path -> what it always did
BEFORE_0_2: dict[str, Any] = {
    "model.positions": "pixels",
    "pretrain.clip": None,
    "segment.labels": None,
    "segment.decoder_first": 0.0,
    "segment.image_skip": True,
    "segment.clip": None,
}
# Settings that it had with another default
DEFAULTS_BEFORE_0_2: dict[str, Any] = {
    "segment.layer_decay": 0.75,
    "segment.augment": {"name": "flips"},
    "pretrain.precision": "auto",
    "segment.precision": "auto",
}
# As BEFORE_0_2, of options: (section, setting, name) -> option -> what it always did
OPTIONS_BEFORE_0_2: dict[tuple[str, str, str], dict[str, Any]] = {
    ("masking", "strategy", "amlp"): {"category_reads": "descriptors"},
    ("pretrain", "loss", "rrl"): {"relative_to": "patch"},
    ("pretrain", "augment", "flips"): {"flip_axes": None},
    ("segment", "augment", "flips"): {"flip_axes": None},
    ("pretrain", "augment", "crops"): {"flip_axes": None},
    ("segment", "augment", "crops"): {"flip_axes": None},
}


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
    patch: Annotated[
        EdgesSetting,
        Field(description="edge of a patch in pixels; a list: one for each axis"),
    ] = 8
    positions: Annotated[
        Literal["patches", "pixels"],
        Field(
            description="what position codes count in. patches: as MAE has it, neighbours are "
            "equally far apart at every patch; pixels: in units of 16, so that a place keeps its "
            "code at every patch"
        ),
    ] = "patches"
    decoder: DecoderConfig = DecoderConfig()


class MaskingConfig(Strict):
    strategy: Strategy = Field(default={"name": "random"}, validate_default=True)
    unit: Annotated[
        EdgesSetting | None,
        Field(
            description="edge in pixels of the block hidden as one, or a list of one for each "
            "axis; null: the patch"
        ),
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


class Grown(Strict):
    """A configuration that has got settings since: left out of dumps where they are null.

    So what does not use them looks, and is identified, as it always was.
    """

    NEWER: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = dump(self)
        return {
            key: value
            for key, value in content.items()
            if value is not None or key not in self.NEWER
        }


class LengthConfig(Grown):
    """How long a phase trains, in one of its units.

    Not in seconds: the same seed would not give the same result on another machine, or twice here.
    """

    NEWER = frozenset({"images", "flops"})

    epochs: Positive | None
    images: Annotated[
        Positive | None, Field(description="in place of epochs: images to see, again and again")
    ] = None
    flops: Annotated[
        Annotated[float, Field(gt=0)] | None,
        Field(
            description="in place of epochs: operations of all steps, to the nearest step, so that "
            "patches and ratios are compared at equal compute"
        ),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _in_one_unit(cls, given: Any) -> Any:
        """Whoever names another unit need not take the default back."""
        if not isinstance(given, dict):
            return given
        named = [unit for unit in LENGTHS if given.get(unit) is not None]
        if len(named) > 1 or (not named and "epochs" in given):
            what = " and ".join(named) or "epochs: null"
            raise ValueError(f"given {what}; expected one of {', '.join(LENGTHS)}")
        return {"epochs": None} | given if named else given


class PretrainConfig(LengthConfig):
    epochs: Positive | None = 40
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
    clip: Clip = None
    precision: Precision = "fast"
    compile: bool = False


class SegmentConfig(LengthConfig):
    epochs: Annotated[
        Positive | None,
        Field(description="passes over as many images as are labelled in the whole split"),
    ] = 20
    batch: Positive = 16
    labels: Annotated[
        Labels | None,
        Field(
            description="labelled groups to learn from: a count, or a share below 1; null: all. "
            "Drawn by the seed, each class once before all else, few labels among more; as many "
            "steps as with all"
        ),
    ] = None
    encoder: Literal["finetune", "frozen", "random-init"] = "finetune"
    decoder_first: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="share of the steps in which a pretrained encoder is held, and the decoder "
            "learns alone",
        ),
    ] = 0.2
    optimizer: Optimizer = Field(default={"name": "adamw", "base_lr": 1e-2}, validate_default=True)
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    warmup_images: Annotated[int, Field(ge=0)] | None = None
    foreground: Annotated[
        float,
        Field(ge=0, le=1, description="share of a volume's crops that show one of its classes"),
    ] = 0.33
    features: Annotated[int, Field(ge=4, description="channels of the finest decoder level")] = 16
    image_skip: Annotated[
        bool,
        Field(description="whether the decoder sees the image beside what the encoder makes of it"),
    ] = True
    augment: Augmentation = Field(
        default={"name": "crops", "scale": (0.5, 1.0)}, validate_default=True
    )
    clip: Clip = 0.3
    precision: Precision = "fast"


class TrialConfig(Strict):
    """One complete configuration, without its seed: an arm."""

    model: ModelConfig = ModelConfig()
    masking: MaskingConfig = MaskingConfig()
    pretrain: PretrainConfig = PretrainConfig()
    segment: SegmentConfig = SegmentConfig()

    @property
    def unit(self) -> Edges:
        """Edge of the mask unit in pixels, as given."""
        return self.masking.unit or self.model.patch

    def patch_edges(self, axes: int) -> tuple[int, ...]:
        """Edges of a patch of images with so many axes."""
        return per_axis(self.model.patch, axes, "model.patch")

    def unit_edges(self, axes: int) -> tuple[int, ...]:
        """Edges of a mask unit of images with so many axes."""
        setting = "masking.unit" if self.masking.unit else "model.patch"
        return per_axis(self.unit, axes, setting)

    def patches_per_unit(self, axes: int) -> tuple[int, ...]:
        """How many patches a mask unit has along every axis."""
        return grid_of(self.unit_edges(axes), self.patch_edges(axes))


class ProbeConfig(Strict):
    """The fixed hidden regions on which every trial of a study is judged."""

    unit: Annotated[
        EdgesSetting | None,
        Field(
            description="edge of a hidden region in pixels, or a list of one for each axis; null: "
            "the study's largest patch"
        ),
    ] = None
    ratios: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)] = (
        0.25,
        0.5,
        0.75,
    )
    images: Annotated[Positive, Field(description="validation images that are probed")] = 64
    seed: int = 0

    def unit_edges(self, axes: int) -> tuple[int, ...]:
        """Edges of a hidden region of images with so many axes."""
        assert self.unit is not None, "set once the patches of the study are known"
        return per_axis(self.unit, axes, "probe.unit")


Phase = TypeVar("Phase", PretrainConfig, SegmentConfig)


def arm_id(config: TrialConfig) -> str:
    """Identity of a configuration without its seed."""
    return digest(content_of(config))[:8]


def trial_id(config: TrialConfig, seed: int, data_fingerprint: str) -> str:
    """Identity of a trial: configuration, seed, and the data it is trained on."""
    content = {"config": content_of(config), "seed": seed, "data": data_fingerprint}
    return digest(content)[:12]


def unit_of_length(settings: LengthConfig) -> str:
    """The one of LENGTHS that says how long a phase trains."""
    return next(unit for unit in LENGTHS if getattr(settings, unit) is not None)


def in_epochs(settings: Phase, epochs: int) -> Phase:
    """The same phase for so many epochs, in whatever unit it was given."""
    return settings.model_copy(update={"epochs": epochs, "images": None, "flops": None})


def warmup_images(settings: PretrainConfig | SegmentConfig, steps: int) -> int:
    """Images over which the learning rate of a phase of so many steps rises."""
    given = settings.warmup_images
    return steps * settings.batch // 20 if given is None else given


def num_held(settings: SegmentConfig, steps: int) -> int:
    """Steps in which the decoder learns alone; a random encoder has nothing to be spared."""
    return round(settings.decoder_first * steps) if settings.encoder == "finetune" else 0


def num_labelled(settings: SegmentConfig, num_groups: int) -> int:
    """How many of the labelled groups segmentation learns from; at least one, at most all."""
    asked = settings.labels
    if asked is None:
        return num_groups
    return min(num_groups, asked if isinstance(asked, int) else max(1, round(asked * num_groups)))


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


class Misfit(NamedTuple):
    """A size that does not go together with another one."""

    to: Literal["axes", "image", "patch", "probe"]  # what it does not fit
    text: str


def geometry_misfits(
    config: TrialConfig, size: tuple[int, ...], probe_unit: Edges | None
) -> dict[str, Misfit]:
    """What does not fit together, by dotted path. Empty when the arm can run on such images.

    Without a `probe_unit` the arm is not asked to be comparable.
    """
    axes, shape = len(size), in_words(size)
    found = {}
    given = {"model.patch": config.model.patch, "masking.unit": config.masking.unit}
    for name, edges in given.items():
        if isinstance(edges, tuple) and not fits(edges, axes):
            text = (
                f"{in_words(edges)} has {len(edges)} edges, but an image of {shape} has {axes} axes"
            )
            found[name] = Misfit("axes", text)
    if found:
        return found
    patch, unit = config.patch_edges(axes), config.unit_edges(axes)
    patch_text, unit_text = in_words(config.model.patch), in_words(config.unit)
    if (where := _uneven(patch, size)) is not None:
        text = f"{patch_text} does not divide the image size {shape}{where}"
        found["model.patch"] = Misfit("image", text)
    if (where := _uneven(patch, unit)) is not None:
        text = f"{unit_text} is not a multiple of the patch size {patch_text}{where}"
        found["masking.unit"] = Misfit("patch", text)
    elif (where := _uneven(unit, size)) is not None:
        text = f"{unit_text} does not divide the image size {shape}{where}"
        found["masking.unit"] = Misfit("image", text)
    elif math.prod(grid_of(size, unit)) < 2:
        text = f"{unit_text} is the whole image ({shape}), of which a part is hidden"
        found["masking.unit"] = Misfit("image", text)
    if probe_unit is None:
        return found
    where = _uneven(patch, per_axis(probe_unit, axes, "probe.unit"))
    if where is not None:
        text = (
            f"{patch_text} does not divide the probe's unit {in_words(probe_unit)}{where}, so that "
            f"trials could not be compared on the same pixels"
        )
        found["model.patch"] = Misfit("probe", text)
    return found


def _uneven(edges: Sequence[int], whole: Sequence[int]) -> str | None:
    """None if every edge divides the whole; else along which axes not, unless all are alike."""
    pairs = list(zip(edges, whole, strict=True))
    wrong = [
        f"axis {axis} of {len(pairs)}: {edge} into {pixels}"
        for axis, (edge, pixels) in enumerate(pairs, start=1)
        if pixels % edge
    ]
    if not wrong:
        return None
    return f" ({', '.join(wrong)})" if len(set(pairs)) > 1 else ""


def completed(trial: dict[str, Any]) -> dict[str, Any]:
    """A trial's settings as release 0.1 wrote them, with what went without saying then.

    Sections that are left out stay so.
    """
    whole = dict(trial)
    for path, before in (BEFORE_0_2 | DEFAULTS_BEFORE_0_2).items():
        section, setting = path.split(".")
        if isinstance(whole.get(section), dict):
            whole[section] = {setting: before} | whole[section]
    for (section, setting, name), options in OPTIONS_BEFORE_0_2.items():
        if not isinstance(whole.get(section), dict):
            continue
        given = whole[section].get(setting)
        given = {"name": given} if isinstance(given, str) else given
        if isinstance(given, dict) and given.get("name") == name:
            whole[section] = whole[section] | {setting: options | given}
    return whole


def content_of(config: TrialConfig) -> dict[str, Any]:
    """What makes the identity: equal edges along all axes are one number, however spelt.

    A setting that came later is left out where it says what went without saying before, so that
    trials of earlier releases keep their identity.
    """
    content = config.model_dump(mode="json")
    for path, before in BEFORE_0_2.items():
        section, setting = path.split(".")
        if content[section][setting] == before:
            del content[section][setting]
    for (section, setting, name), options in OPTIONS_BEFORE_0_2.items():
        given = content[section][setting]
        if given["name"] == name:
            content[section][setting] = {
                option: value
                for option, value in given.items()
                if option not in options or value != options[option]
            }
    content["model"]["patch"] = simplest(content["model"]["patch"])
    if content["masking"]["unit"] is not None:
        content["masking"]["unit"] = simplest(content["masking"]["unit"])
    return content
