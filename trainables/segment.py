"""Segmentation: a U-Net Transformer on the pretrained encoder, and its controls. A plain loop.

What `segment.encoder` says of the encoder:
- finetune: pretrained, trained further at rates that fall with depth (layer decay);
- frozen: pretrained, never changed, always in evaluation mode;
- random-init: fresh, trained at the full rate everywhere, as there is nothing to preserve.

How it goes on after an interruption is as in pretrain.py.

B images of this worker's part of the batch · K classes · *S pixels along every axis
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trainables import checkpoint, distributed, surfaces
from trainables.augment import AUGMENTATIONS
from trainables.config import SegmentConfig, TrialConfig
from trainables.context import LEAVING, Context
from trainables.cost import segment_flops
from trainables.data import Dataset
from trainables.data.batches import to_device, whole_volume
from trainables.errors import UserError
from trainables.metrics import (
    IGNORED,
    confusion,
    object_counts,
    object_scores,
    overlap_scores,
)
from trainables.metrics import rows as metric_rows
from trainables.optimizers import OPTIMIZERS, learning_rate, parameter_groups, set_learning_rate
from trainables.pictures import save_segmentation, save_segmentation_slices, to_intensity
from trainables.pretrain import (
    HEARTBEAT_SECONDS,
    Counters,
    Plan,
    batches,
    is_epoch_end,
    leave,
    rung_steps,
    running_loss,
    save,
    told_to_stop,
)
from trainables.probe import PICTURES, probe_rows
from trainables.unetr import UNETR, build_unetr
from trainables.windows import stitched_scores

DICE_SMOOTHING = 1e-5
STITCHING_SHARE = 0.25  # of the free device memory that a whole volume's scores may take


def segment(
    config: TrialConfig,
    seed: int,
    dataset: Dataset,
    encoder_state: dict[str, Tensor] | None,
    context: Context,
    resume: tuple[dict[str, Tensor], dict[str, Any]] | None = None,
) -> str:
    """Train on labelled images, or go on from a checkpoint; for the outcome see `run_trial`."""
    device, settings = context.device, config.segment
    plan = make_plan(config, dataset, context)
    share = distributed.batch_slice(plan.batch, context, "segment.batch")
    samples_B = torch.arange(plan.batch, device=device)[share]
    images = to_device(dataset, dataset.rows("train"), device)
    places_B = samples_B.to(images.rows.device)

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
    model = model.to(device)
    optimizer = OPTIMIZERS[settings.optimizer.name](
        parameter_groups(model, layer_decay(settings)), plan.batch, **settings.optimizer.options()
    )
    counters = Counters(phase="segment")
    if resume is not None:
        checkpoint.unpack(model, optimizer, resume[0])
        counters = Counters(**resume[1])
        if counters.step == counters.rung_step and told_to_stop(counters.rows, context):
            return "stopped"
    trained = distributed.data_parallel(model, context)

    distributed.reset_peak_memory(device)
    loss_sum = running_loss(resume, context)
    saved = started = beaten = time.perf_counter()
    first_step = beaten_step = counters.step
    for step, positions in batches(seed, plan, counters.step, images.rows.device):
        pixels, truth = images.draw(
            positions[share], seed, step, places_B, foreground=settings.foreground
        )
        pixels, truth = AUGMENTATIONS[settings.augment.name](
            pixels, truth, seed, step, samples_B, **settings.augment.options()
        )
        with distributed.autocast(settings.precision, device):
            scores = trained(pixels)
        assert truth is not None
        loss = dice_cross_entropy(scores, truth)

        loss.backward()  # type: ignore[no-untyped-call]
        seen = step * plan.batch + plan.batch // 2  # mid-batch, so no step has a rate of 0
        rate = learning_rate(seen, plan.steps * plan.batch, plan.warmup_images)
        set_learning_rate(optimizer, rate)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        loss_sum += loss.detach()
        done = step + 1
        now = time.perf_counter()
        is_due = step == first_step or now - beaten > HEARTBEAT_SECONDS
        if context.is_main and is_due:
            speed = (done - beaten_step) * plan.batch / (now - beaten)
            context.heartbeat("segment", done / plan.steps, speed)
            beaten, beaten_step = now, done

        is_rung = done in plan.rungs
        is_leaving = context.is_leaving("segment", done)
        if not (is_rung or is_epoch_end(done, plan)):
            if is_leaving:
                counters = leave(counters, done, now - started)
                losses = distributed.from_all_workers(loss_sum, context)
                save(counters, model, optimizer, None, context, losses)
                return LEAVING
            continue

        # The only places where the host waits for the device
        summed = distributed.sum_over_workers(loss_sum, context).item() / context.world_size
        loss_sum.zero_()
        now = time.perf_counter()
        counters = replace(
            counters,
            step=done,
            loss_sum=counters.loss_sum + summed,
            device_seconds=counters.device_seconds + now - started,
        )
        if not math.isfinite(counters.loss_sum):
            return "diverged"

        stop = False
        if is_rung:
            values = progress_values(counters, plan, context)
            values |= evaluate(model, settings, dataset, "val", context)
            if done == plan.steps and len(dataset.rows("test")) > 0:
                on_test = evaluate(model, settings, dataset, "test", context)
                values |= {f"test_{name}": value for name, value in on_test.items()}
            rows = metric_rows(
                values,
                phase="segment",
                step=done,
                epoch=done * plan.batch / plan.num_images,
                progress=plan.rungs[done],
                seconds=counters.device_seconds,
            )
            stop = told_to_stop(rows, context)
            counters = replace(
                counters,
                loss_sum=0.0,
                rung_step=done,
                rung_device_seconds=counters.device_seconds,
                rows=rows,
            )
        if is_rung or is_leaving or now - saved > context.checkpoint_seconds:
            save(counters, model, optimizer, None, context)
            saved = time.perf_counter()
        if stop:
            return "stopped"
        if is_leaving and done < plan.steps:
            return LEAVING
        started = time.perf_counter()

    if context.is_main:
        draw(model, settings, dataset, context, context.folder / "pictures")
        context.keep("pictures")
    return "complete"


def make_plan(config: TrialConfig, dataset: Dataset, context: Context) -> Plan:
    """Turn epochs into steps; an empty split is the user's to mend."""
    needed: tuple[Literal["train", "val"], ...] = ("train", "val")
    for split in needed:
        if len(dataset.rows(split)) == 0:
            raise UserError(
                f"data: no labelled image of {dataset.name} is in the {split} split; segmentation "
                f"needs some to learn from and some (val) to be judged on"
            )
    num_images, settings = len(dataset.rows("train")), config.segment
    steps = max(1, round(settings.epochs * num_images / settings.batch))
    per_image = segment_flops(config, dataset.size, dataset.channels, len(dataset.classes))
    warmup = settings.warmup_images
    return Plan(
        num_images=num_images,
        batch=settings.batch,
        steps=steps,
        warmup_images=steps * settings.batch // 20 if warmup is None else warmup,
        flops=(per_image * settings.batch * np.arange(steps + 1)).tolist(),
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
    """Scores of a split's images or whole volumes; a collective, every worker does its share."""
    classes, device = dataset.classes, context.device
    pixels_KK = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=device)
    objects = np.zeros((3, 3), np.int64)
    sums = np.zeros((len(classes), len(surfaces.NAMES)))
    counts = np.zeros(sums.shape, np.int64)
    for truth, predicted, spacing in predictions(model, settings, dataset, split, context):
        pixels_KK += confusion(truth, predicted, len(classes)).to(device)
        labels, guess = truth.cpu().numpy(), predicted.cpu().numpy()
        voxel = math.prod(spacing)
        objects += object_counts(labels, guess, len(classes), dataset.object_edges, voxel)
        if dataset.volumes is not None:
            tolerance = dataset.volumes.tolerance
            case = surfaces.case_sums(labels[0], guess[0], len(classes), spacing, tolerance)
            sums, counts = sums + case[0], counts + case[1]
    whole = [pixels_KK.flatten(), torch.from_numpy(objects).flatten().to(device)]
    whole += [torch.from_numpy(counts).flatten().to(device)]
    summed = distributed.sum_over_workers(torch.cat(whole), context).cpu().numpy()
    pixels, objects_, counts_ = np.split(summed, np.cumsum([pixels_KK.numel(), objects.size]))
    scores = overlap_scores(pixels.reshape(pixels_KK.shape), classes)
    scores |= object_scores(objects_.reshape(objects.shape))
    if dataset.volumes is None:
        return scores
    total = distributed.sum_over_workers(torch.from_numpy(sums).to(device), context).cpu().numpy()
    return scores | surfaces.case_scores(total, counts_.reshape(counts.shape), classes)


def predictions(
    model: UNETR,
    settings: SegmentConfig,
    dataset: Dataset,
    split: Literal["val", "test"],
    context: Context,
) -> Iterator[tuple[Tensor, Tensor, tuple[float, ...]]]:
    """This worker's share of a split: (labels (B, *S), predicted classes (B, *S), mm per voxel).

    Batches of images (whose pixels are the unit), or one whole volume after the other.
    """
    rank, world_size, device = context.rank, context.world_size, context.device
    if dataset.volumes is not None:
        for volume in dataset.volumes_of(split)[rank::world_size].tolist():
            truth = torch.from_numpy(dataset.mask_of(volume))[None]
            spacing = tuple(dataset.volumes.spacings[volume].tolist())
            predicted = predict_volume(model, dataset, volume, settings, device, context.alive)
            yield truth, predicted, spacing
        return
    rows = dataset.rows(split)[rank::world_size]
    images = to_device(dataset, rows, device)
    for places_B in torch.split(torch.arange(len(rows), device=device), settings.batch):
        context.alive()
        pixels, labels = images.batch(places_B)
        assert labels is not None
        yield labels, predict(model, pixels, settings, device), (1.0,) * len(dataset.size)


@torch.no_grad()
def predict_volume(
    model: UNETR,
    dataset: Dataset,
    volume: int,
    settings: SegmentConfig,
    device: torch.device,
    alive: Callable[[], None] = lambda: None,
) -> Tensor:
    """The likeliest class of every voxel of a whole volume, uint8 (1, *shape) on the host.

    Windows of the crop's size, `segment.batch` at a time, overlap (see windows.py). On a GPU the
    scores of all classes are put together there if they take little of it.
    """
    assert dataset.volumes is not None
    shape = dataset.volumes.shapes[volume].tolist()
    num_bytes = math.prod(shape) * 4 * (dataset.channels + len(dataset.classes) + 2)
    place = device
    if device.type == "cuda" and num_bytes > STITCHING_SHARE * torch.cuda.mem_get_info(device)[0]:
        place = torch.device("cpu")

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
    labels = scores[0].argmax(dim=0).to(torch.uint8).cpu()
    return labels[tuple(slice(edge) for edge in shape)][None]


@torch.no_grad()
def predict(model: UNETR, images: Tensor, settings: SegmentConfig, device: torch.device) -> Tensor:
    """The likeliest class of every pixel (B, *S); leaves the model in training mode."""
    model.eval()
    with distributed.autocast(settings.precision, device):
        scores: Tensor = model(images)
    model.train()
    return scores.argmax(dim=1)


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


def progress_values(counters: Counters, plan: Plan, context: Context) -> dict[str, float]:
    """What training itself tells at a rung."""
    steps = counters.step - counters.rung_step
    seconds = counters.device_seconds - counters.rung_device_seconds
    return {
        "loss": counters.loss_sum / steps,
        "images_per_second": steps * plan.batch / max(seconds, 1e-9),
        "device_seconds": counters.device_seconds,
        "flops": plan.flops[counters.step],
        "planned_flops": plan.flops[-1],
        "peak_memory": distributed.peak_memory(context.device),
    }
