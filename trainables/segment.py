"""Segmentation: a U-Net Transformer on the pretrained encoder, and its controls.

The loop is in phase.py.

What `segment.encoder` says of the encoder:
- finetune: pretrained, trained further at rates that fall with depth (layer decay), once the
  decoder has learnt alone for a while (`decoder_first`; LP-FT, Kumar et al. 2022), as gradients
  through a decoder that knows nothing yet would undo what the encoder knows;
- frozen: pretrained, never changed, always in evaluation mode;
- random-init: fresh, trained at the full rate everywhere, as there is nothing to preserve.

B images of this worker's part of the batch · K classes · *S pixels along every axis
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from trainables import distributed, surfaces, trivial
from trainables.augment import AUGMENTATIONS
from trainables.beside import in_threads
from trainables.blocks import recompute
from trainables.checkpoint import Saved
from trainables.config import (
    SegmentConfig,
    TrialConfig,
    num_held,
    warmup_images,
)
from trainables.context import Context
from trainables.cost import segment_flops, segment_steps
from trainables.data import Dataset
from trainables.data.batches import free_memory, to_device, whole_volume
from trainables.data.source import tile_within
from trainables.endings import Ending
from trainables.errors import UserError
from trainables.labelled import labelled_rows
from trainables.metrics import TEST, split_scores
from trainables.optimizers import OPTIMIZERS, parameter_groups
from trainables.phase import Learner, Phase, Plan, rung_steps, train
from trainables.pictures import save_segmentation, save_segmentation_slices, to_intensity
from trainables.probe import PICTURES, probe_rows
from trainables.scores import (
    IGNORED,
    Counted,
    Counts,
    Floats,
    ObjectCounts,
    confusion,
    object_counts,
)
from trainables.unetr import UNETR, build_unetr
from trainables.windows import likeliest_between, stitched_scores

DICE_SMOOTHING = 1e-5
STITCHING_SHARE = 0.25  # of the free device memory that a whole image's scores may take


class Judged(NamedTuple):
    """Whole images or a whole volume, and what a model makes of them."""

    truth_BS: Tensor  # labels
    predicted_BS: Tensor  # classes
    instances_BS: NDArray[Any] | None  # of the truth, if the data have them
    spacing: tuple[float, ...]  # mm per voxel; of images 1, as pixels are the unit


def segment(
    config: TrialConfig,
    seed: int,
    dataset: Dataset,
    encoder_state: dict[str, Tensor] | None,
    context: Context,
    resume: Saved | None = None,
) -> Ending:
    """Train on labelled images, or go on from a checkpoint."""
    settings = config.segment
    rows = labelled_rows(settings, dataset, seed)
    plan = make_plan(config, dataset, context, len(rows))
    share = distributed.batch_slice(plan.batch, context, "segment.batch")
    learner = make_learner(config, seed, dataset, encoder_state, context, plan.steps)
    model = learner.model

    def loss_of(images: Tensor, labels: Tensor | None, step: int, samples_B: Tensor) -> Tensor:
        assert labels is not None
        return batch_loss(learner, images, labels, config, seed, context, step, samples_B)

    def measure(steps: range) -> dict[str, float]:
        values = evaluate(model, settings, dataset, "val", context)
        if steps.stop == plan.steps:
            if len(dataset.rows("test")) > 0:
                on_test = evaluate(model, settings, dataset, "test", context)
                values |= {f"{TEST}{name}": value for name, value in on_test.items()}
            values |= without_encoder(config, dataset, rows, context)
        return values

    phase = Phase(
        plan=plan,
        share=share,
        learner=learner,
        images=to_device(dataset, rows, context.device),
        loss_of=loss_of,
        evaluate=measure,
        foreground=settings.foreground,
    )
    ending, _ = train(phase, seed, context, resume)
    if ending is Ending.COMPLETE and context.is_main:
        draw(model, settings, dataset, context, context.folder / "pictures")
        context.keep("pictures")
    return ending


def batch_loss(
    learner: Learner[UNETR],
    images: Tensor,
    labels: Tensor,
    config: TrialConfig,
    seed: int,
    context: Context,
    step: int,
    samples_B: Tensor,
) -> Tensor:
    """Augment and segment: the mean loss of these images, whose places in the batch are given."""
    settings = config.segment
    images, augmented = AUGMENTATIONS[settings.augment.name](
        images, labels, seed, step, samples_B, **settings.augment.options()
    )
    assert augmented is not None
    if context.world_size == 1:  # of several workers, each has to send every gradient
        for parameter in learner.held:
            parameter.requires_grad_(step >= learner.held_steps)
    with distributed.autocast(settings.precision, context.device):
        scores = learner.trained(images)
    return dice_cross_entropy(scores, augmented)


def without_encoder(
    config: TrialConfig, dataset: Dataset, rows: NDArray[np.int64], context: Context
) -> dict[str, float]:
    """Scores of trivial segmenters that may use the labels of `rows`; the same on every rank."""
    patch = config.patch_edges(len(dataset.size))
    found = context.is_main and trivial.scores(dataset, rows, patch, context.device, context.alive)
    everywhere: dict[str, float] = distributed.decided_by_main(found, context)
    return everywhere


def make_learner(
    config: TrialConfig,
    seed: int,
    dataset: Dataset,
    encoder_state: dict[str, Tensor] | None,
    context: Context,
    steps: int,
) -> Learner[UNETR]:
    """The network, with a pretrained encoder if there is one, and its optimiser."""
    settings = config.segment
    held_steps = num_held(settings, steps)
    model = build_unetr(
        config,
        dataset.size,
        dataset.channels,
        len(dataset.classes),
        seed,
        is_padded=dataset.is_padded,
    )
    if encoder_state is not None:
        model.encoder.load_state_dict(encoder_state)
    model = model.to(context.device)
    if context.recomputes:
        recompute(model)
    optimizer = OPTIMIZERS[settings.optimizer.name](
        parameter_groups(model, layer_decay(settings), is_encoder_apart=held_steps > 0),
        settings.batch,
        **settings.optimizer.options(),
    )
    return Learner(
        model,
        distributed.data_parallel(model, context),
        optimizer,
        clip=settings.clip,
        held=tuple(model.encoder.parameters()) if held_steps else (),
        held_steps=held_steps,
    )


def make_plan(config: TrialConfig, dataset: Dataset, context: Context, num_images: int) -> Plan:
    """Turn the length into steps, as many with few labels as with all, to learn from `num_images`.

    An empty split is the user's to mend.
    """
    needed: tuple[Literal["train", "val"], ...] = ("train", "val")
    for split in needed:
        if len(dataset.rows(split)) == 0:
            raise UserError(
                f"data: no labelled image of {dataset.name} is in the {split} split; segmentation "
                f"needs some to learn from and some (val) to be judged on"
            )
    settings = config.segment
    about = (dataset.size, dataset.channels, len(dataset.classes))
    steps = segment_steps(config, *about, len(dataset.rows("train")))
    return Plan(
        phase="segment",
        num_images=num_images,
        batch=settings.batch,
        steps=steps,
        warmup_images=warmup_images(settings, steps),
        flops=segment_flops(config, *about, steps),
        rungs=rung_steps(context.rungs, steps),
    )


def layer_decay(settings: SegmentConfig) -> float | None:
    """What the rate is multiplied by from block to block downwards; None: the full rate for all."""
    return settings.layer_decay if settings.encoder == "finetune" else None


def dice_cross_entropy(scores: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy + 1 - Dice, per image, then the mean over images. (B, K, *S) and (B, *S).

    Pixels labelled 255 take part in neither. Dice is the mean over the classes, without background,
    that the image truly contains; it is left out for an image without any. A loss per image makes
    the mean over equal shares of a batch the mean over the batch, with any number of workers.
    MONAI's DiceCELoss agrees where all is labelled and every class is there, but cannot ignore.
    """
    scores = scores.float()
    is_labelled = truth != IGNORED
    pixels_B = is_labelled.flatten(1).sum(dim=1).clamp(min=1)
    entropy = functional.cross_entropy(scores, truth, ignore_index=IGNORED, reduction="none")
    entropy_B = entropy.flatten(1).sum(dim=1) / pixels_B

    num_classes = scores.shape[1]
    belief = (scores.softmax(dim=1) * is_labelled[:, None]).flatten(2)[:, 1:]
    label = torch.arange(1, num_classes, device=truth.device)[:, None]
    is_class = (truth.flatten(1)[:, None] == label).to(belief.dtype)
    shared_BK = (belief * is_class).sum(dim=2)
    total_BK = belief.sum(dim=2) + is_class.sum(dim=2)
    dice_BK = (2 * shared_BK + DICE_SMOOTHING) / (total_BK + DICE_SMOOTHING)
    is_there_BK = is_class.any(dim=2)
    missing_B = ((1 - dice_BK) * is_there_BK).sum(dim=1) / is_there_BK.sum(dim=1).clamp(min=1)
    return (entropy_B + missing_B).mean()


@torch.no_grad()
def evaluate(
    model: UNETR,
    settings: SegmentConfig,
    dataset: Dataset,
    split: Literal["val", "test"],
    context: Context,
) -> dict[str, float]:
    """Scores of a split's whole images or volumes; a collective, every worker does its share."""
    classes, device = dataset.classes, context.device
    pixels_KK = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=device)
    objects = ObjectCounts(np.zeros((4, 4), np.int64), np.zeros((len(classes), 2), np.int64))
    sums = np.zeros((len(classes), len(surfaces.NAMES)))
    counts = np.zeros(sums.shape, np.int64)

    def on_host() -> Iterator[Judged]:
        for judged in predictions(model, settings, dataset, split, context):
            truth_BS, predicted_BS = judged.truth_BS, judged.predicted_BS
            pixels_KK.add_(confusion(truth_BS, predicted_BS, len(classes)).to(device))
            yield judged._replace(truth_BS=truth_BS.cpu(), predicted_BS=predicted_BS.cpu())

    # on the CPU the model would wait for the processor instead
    threads = 0 if device.type == "cpu" else torch.get_num_threads()
    for found, case in in_threads(partial(_counted, dataset), on_host(), threads):
        context.alive()
        objects = ObjectCounts(*map(np.add, objects, found))
        if case is not None:
            sums, counts = sums + case[0], counts + case[1]
    mine = [pixels_KK.cpu().numpy(), *objects, counts]
    flat = torch.from_numpy(np.concatenate([each.ravel() for each in mine])).to(device)
    summed = distributed.sum_over_workers(flat, context).cpu().numpy()
    ends = np.cumsum([each.size for each in mine])[:-1]
    pixels, sizes, numbers, case_counts = (
        part.reshape(each.shape) for part, each in zip(np.split(summed, ends), mine, strict=True)
    )
    counted = Counted(classes, pixels, ObjectCounts(sizes, numbers))
    if dataset.volumes is not None:
        total = distributed.sum_over_workers(torch.from_numpy(sums).to(device), context)
        counted = counted._replace(case_sums=total.cpu().numpy(), case_counts=case_counts)
    return split_scores(counted)


def _counted(dataset: Dataset, judged: Judged) -> tuple[ObjectCounts, tuple[Floats, Counts] | None]:
    """What is counted of objects, and of volumes of surfaces; labels are on the host."""
    truth, predicted = judged.truth_BS.numpy(), judged.predicted_BS.numpy()
    num_classes = len(dataset.classes)
    found = object_counts(
        truth,
        predicted,
        num_classes,
        dataset.object_edges,
        math.prod(judged.spacing),
        judged.instances_BS,
    )
    if dataset.volumes is None:
        return found, None
    tolerance = dataset.volumes.tolerance
    return found, surfaces.case_sums(truth[0], predicted[0], num_classes, judged.spacing, tolerance)


def predictions(
    model: UNETR,
    settings: SegmentConfig,
    dataset: Dataset,
    split: Literal["val", "test"],
    context: Context,
) -> Iterator[Judged]:
    """This worker's share of a split: batches of images, or one whole after the other.

    Volumes and images that were cut into tiles are put together from their parts. A worker has
    memory for its share of a batch.
    """
    share = max(1, settings.batch // context.world_size)
    settings = settings.model_copy(update={"batch": share})
    rank, world_size, device = context.rank, context.world_size, context.device
    if dataset.tiles is not None:
        images = dataset.cut_images_of(split)[rank::world_size]
        yield from _stitched(model, settings, dataset, images, context)
        return
    if dataset.volumes is not None:
        for volume in dataset.volumes_of(split)[rank::world_size].tolist():
            truth, spacing = dataset.truth_of(volume)
            predicted = predict_volume(
                model, dataset, volume, settings, device, context.alive, as_filed=True
            )
            yield Judged(torch.from_numpy(truth)[None], predicted, None, spacing)
        return
    rows = dataset.rows(split)[rank::world_size]
    resident = to_device(dataset, rows, device)
    for first in range(0, len(rows), settings.batch):
        context.alive()
        places_B = torch.arange(first, min(first + settings.batch, len(rows)), device=device)
        pixels, labels = resident.batch(places_B)
        assert labels is not None
        predicted = predict(model, pixels, settings, device)
        instances = dataset.instances
        if instances is not None:
            instances = instances[rows[first : first + settings.batch]]
        yield Judged(labels, predicted, instances, (1.0,) * len(dataset.size))


def _stitched(
    model: UNETR,
    settings: SegmentConfig,
    dataset: Dataset,
    images: NDArray[np.int64],
    context: Context,
) -> Iterator[Judged]:
    """Images that were cut into tiles, whole again, one after the other.

    Where tiles overlap, a pixel has the class whose mean score over them is highest.
    """
    tiles, device = dataset.tiles, context.device
    assert tiles is not None
    num_classes, size = len(dataset.classes), dataset.size
    rows = np.flatnonzero(np.isin(tiles.owner, images))
    resident = to_device(dataset, rows, device, labels=False)

    def scored() -> Iterator[tuple[int, Tensor]]:
        """(row, scores (K, *tile)), batch by batch, also across images."""
        for first in range(0, len(rows), settings.batch):
            context.alive()
            places_B = torch.arange(first, min(first + settings.batch, len(rows)), device=device)
            pixels, _ = resident.batch(places_B)
            yield from zip(
                rows[first : first + settings.batch].tolist(),
                class_scores(model, pixels, settings, device),
                strict=True,
            )

    for image, its_tiles in groupby(scored(), key=lambda tile: int(tiles.owner[tile[0]])):
        shape = tiles.shapes[image].tolist()
        place = _stitching_place(math.prod(shape), num_classes + 1, device)
        sums_KS = torch.zeros(num_classes, *shape, device=place)
        for row, scores_KT in its_tiles:
            part, there = tile_within(shape, tiles.corners[row].tolist(), size)
            sums_KS[:, *part] += scores_KT[:, *there].to(place)
        labels, instances = dataset.labels_of(image)
        yield Judged(
            torch.from_numpy(labels)[None].to(place),
            sums_KS.argmax(dim=0)[None],  # of sums as of means: a pixel's tiles are as many
            None if instances is None else instances[None],
            (1.0,) * len(size),
        )


def _stitching_place(voxels: int, values: int, device: torch.device) -> torch.device:
    """Where to put scores together: on the host if they would take much of a GPU."""
    num_bytes = voxels * 4 * values
    if device.type == "cuda" and num_bytes > STITCHING_SHARE * free_memory(device):
        return torch.device("cpu")
    return device


@torch.no_grad()
def predict_volume(
    model: UNETR,
    dataset: Dataset,
    volume: int,
    settings: SegmentConfig,
    device: torch.device,
    alive: Callable[[], None] = lambda: None,
    *,
    as_filed: bool = False,
) -> Tensor:
    """The likeliest class of every voxel of a whole volume, uint8 (1, *shape) on the host.

    Windows of the crop's size, `segment.batch` at a time, overlap (see windows.py). On a GPU the
    scores of all classes are put together there if they take little of it.
    `as_filed`: of the voxels of its file, by which it is judged; scores are linear between those
    that the model saw.
    """
    assert dataset.volumes is not None
    shape = dataset.volumes.shapes[volume].tolist()
    values = dataset.channels + len(dataset.classes) + 2
    place = _stitching_place(math.prod(shape), values, device)

    def scores_of(window: Tensor) -> Tensor:
        alive()
        with distributed.autocast(settings.precision, device):
            scores: Tensor = model(window)
        return scores.float()

    model.eval()
    scores = stitched_scores(
        scores_of,
        whole_volume(dataset, volume, place),
        dataset.size,
        len(dataset.classes),
        batch=settings.batch,
        overlap=dataset.volumes.overlap,
        device=device,
    )
    model.train()
    scores_KS = scores[0][:, *(slice(edge) for edge in shape)]
    filed = dataset.volumes.filed
    if not as_filed or filed is None:
        return scores_KS.argmax(dim=0).to(torch.uint8).cpu()[None]
    pairs = zip(filed.grids.spacings[volume], dataset.volumes.spacings[volume], strict=True)
    steps = [float(wanted / seen) for wanted, seen in pairs]
    return likeliest_between(scores_KS, filed.grids.shapes[volume], steps).cpu()[None]


@torch.no_grad()
def predict(model: UNETR, images: Tensor, settings: SegmentConfig, device: torch.device) -> Tensor:
    """The likeliest class of every pixel (B, *S); leaves the model in training mode."""
    return class_scores(model, images, settings, device).argmax(dim=1)


@torch.no_grad()
def class_scores(
    model: UNETR, images: Tensor, settings: SegmentConfig, device: torch.device
) -> Tensor:
    """float32 scores (B, K, *S) of every pixel; leaves the model in training mode."""
    model.eval()
    with distributed.autocast(settings.precision, device):
        scores: Tensor = model(images)
    model.train()
    return scores.float()


def draw(
    model: UNETR, settings: SegmentConfig, dataset: Dataset, context: Context, folder: Path
) -> None:
    """Picture of a few validation images, of volumes a sheet of one: the same for every trial."""
    rows = probe_rows(dataset.rows("val"), PICTURES)
    places_B = torch.arange(len(rows), device=context.device)
    images, truth = to_device(dataset, rows, context.device).batch(places_B)
    assert truth is not None
    predicted = predict(model, images, settings, context.device)
    intensity = to_intensity(images, dataset.mean, dataset.std)
    save_segmentation(folder / "segmentation.png", intensity, truth, predicted)
    if dataset.volumes is not None:
        volume = int(dataset.volumes_of("val")[0])
        levels = dataset.image_of(volume).astype(np.float32)
        save_segmentation_slices(
            folder / "segmentation-slices.png",
            (levels - dataset.low) / (dataset.high - dataset.low),
            dataset.mask_of(volume),
            predict_volume(model, dataset, volume, settings, context.device, context.alive)[0],
            dataset.volumes.spacings[volume].tolist(),
        )
