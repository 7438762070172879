"""How well a model fills in what it does not see, in numbers that can be compared between trials.

Losses cannot be compared across ratio, patch size or target. The probe can: the same images, and
on each of them the same hidden regions in *pixels*, for every trial of a study. A region is
`probe.unit` pixels wide, a multiple of every patch size, so a patch is hidden whole or not at all.

    probe_psnr@r   dB on hidden pixels of the probe with a share r hidden
    probe_ssim@r   structural similarity, its map averaged over those pixels
    probe_gain     dB above the best trivial filling: at each ratio, the one of FILLINGS whose PSNR,
                   mean over the probe's images, is highest; then the mean over the ratios
    probe_gain/f   dB above the filling f at every ratio
    native_psnr_*  dB at the trial's own unit, strategy and final ratio, as papers plot them

Intensities are in [0, 1], 1 is the data range; PSNR is taken per image, then averaged over images.
Padding is neither hidden nor visible. An image of which nothing is hidden, or nothing visible, is
left out of that number's mean; which images these are of the probe is alike for every trial.

The trivial fillings depend on data and probe alone: a process computes what they reach once.

B batch · C channels · S pixels along every axis · U mask units · P patches · F fillings · R ratios
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainables import counter, distributed
from trainables.atlas import draw_masks, masks_name
from trainables.config import PretrainConfig, ProbeConfig, TrialConfig
from trainables.context import Context
from trainables.data import Dataset
from trainables.data.batches import to_device
from trainables.edges import grid_of
from trainables.fillings import FILLINGS
from trainables.hiding import hide, request_at
from trainables.mae import MAE
from trainables.masking import (
    hidden_units,
    hide_smallest,
    pixels_hidden,
    split_indices,
    unit_to_patch,
)
from trainables.metrics import METRICS
from trainables.pictures import (
    save_reconstruction,
    save_reconstruction_slices,
    to_intensity,
)
from trainables.remembered import remembered
from trainables.scores import psnr

# key -> its score of hidden pixels
PROBED = {key: metric.of_probe for key, metric in METRICS.items() if metric.of_probe is not None}
PICTURES = 4  # validation images that are drawn

# (standardised images (B, C, *S), visible_BV, hidden_BX) -> predicted images, every patch
Reconstruct = Callable[[Tensor, Tensor, Tensor], Tensor]


class Trivial(NamedTuple):
    """What the trivial fillings reach on some of the probe's images."""

    psnr_FRB: Tensor  # dB, of FILLINGS and the probe's ratios in their orders
    best_R: Tensor  # which filling has the highest mean over all of the probe's images

    def of(self, places_B: Tensor) -> Trivial:
        """That of these images alone."""
        return self._replace(psnr_FRB=self.psnr_FRB[:, :, places_B])


_kept: dict[Hashable, Trivial] = {}


class Judge:
    """The probed validation images of a data set, ready on the device for model after model."""

    def __init__(
        self, config: TrialConfig, dataset: Dataset, probe: ProbeConfig, context: Context
    ) -> None:
        self.config, self.dataset, self.probe, self.context = config, dataset, probe, context
        rows = probe_rows(dataset.rows("val"), probe.images)
        self.images = to_device(dataset, rows, context.device, labels=False)
        self.rows = torch.as_tensor(rows, device=context.device)
        self.chunk = max(1, config.pretrain.batch // context.world_size)

    @torch.no_grad()
    def scores(self, model: MAE, teacher: MAE | None) -> dict[str, float]:
        """Each metric's mean over the images; a collective, every worker measures its share."""
        rank, world_size = self.context.rank, self.context.world_size
        mine = torch.arange(rank, len(self.rows), world_size, device=self.context.device)
        names = metric_names(self.probe, self.config)
        trivial = self._trivial()
        zero = torch.zeros((), dtype=torch.float64, device=self.context.device)
        sums, counts = dict.fromkeys(names, zero), dict.fromkeys(names, zero)
        for places_B in torch.split(mine, self.chunk):
            self.context.alive()
            values, is_counted = measure(
                self._reconstruct(model),
                teacher or model,
                self.images.batch(places_B)[0],
                self.rows[places_B],
                self.config,
                self.probe,
                trivial.of(places_B),
                self.dataset.mean,
                self.dataset.std,
                is_padded=self.dataset.is_padded,
            )
            for name, values_B in values.items():
                sums[name] = sums[name] + values_B.double().sum()
                counts[name] = counts[name] + is_counted[name].double().sum()
        both = torch.stack([*sums.values(), *counts.values()])
        totals, counted = distributed.sum_over_workers(both, self.context).chunk(2)
        means = (totals / counted).tolist()
        return {
            name: mean
            for name, mean, count in zip(names, means, counted.tolist(), strict=True)
            if count > 0
        }

    @torch.no_grad()
    def draw(self, model: MAE, folder: Path) -> None:
        """Picture of a few images at the middle one of the probe's ratios; of volumes a sheet."""
        places = torch.arange(len(self.rows), device=self.context.device)
        places = places[:: max(1, len(places) // PICTURES)][:PICTURES]
        images = self.images.batch(places)[0]
        size = images.shape[2:]
        patch = self.config.patch_edges(len(size))
        ratio = sorted(self.probe.ratios)[len(self.probe.ratios) // 2]
        is_hidden_BP, hidden = probe_mask(self.probe, ratio, size, patch, self.rows[places])
        visible_BV, hidden_BX = split_indices(is_hidden_BP, hidden)
        predicted = self._reconstruct(model)(images, visible_BV, hidden_BX)
        mean, std = self.dataset.mean, self.dataset.std
        is_hidden_BS = pixels_hidden(is_hidden_BP, grid_of(size, patch), patch)
        if self.dataset.is_padded:
            is_hidden_BS &= ~images[:, 0].isnan()
        truth, predicted = (to_intensity(values, mean, std) for values in (images, predicted))
        save_reconstruction(folder / "reconstruction.png", truth, is_hidden_BS, predicted)
        if self.dataset.volumes is not None:
            one = slice(len(places) // 2, len(places) // 2 + 1)
            owner = self.dataset.volumes.owner[int(self.rows[places[one]])]
            save_reconstruction_slices(
                folder / "reconstruction-slices.png",
                truth[one],
                is_hidden_BS[one],
                predicted[one],
                self.dataset.volumes.spacings[owner].tolist(),
            )

    def draw_masks(self, model: MAE, teacher: MAE | None, progress: float) -> None:
        """Picture of where the trial hides at this point, on the same few images; on rank 0."""
        if not self.context.is_main:
            return
        places = torch.arange(len(self.rows), device=self.context.device)
        places = places[:: max(1, len(places) // PICTURES)][:PICTURES]
        rows = self.rows[places]
        labels = None
        if self.dataset.is_labelled:
            labelled = to_device(self.dataset, rows.cpu().numpy(), self.context.device)
            labels = labelled.batch(torch.arange(len(rows), device=self.context.device))[1]
        draw_masks(
            self.context.folder / "pictures" / masks_name(progress),
            self.images.batch(places)[0],
            rows,
            self.config,
            progress,
            self.probe.seed,
            teacher or model,
            self.dataset.mean,
            self.dataset.std,
            labels=labels,
            classes=self.dataset.classes,
            is_padded=self.dataset.is_padded,
        )

    def _trivial(self) -> Trivial:
        """What trivial fillings reach, on the device; every worker computes it, as all need it."""
        data = self.dataset
        rows = self.rows.cpu()
        key = (data.fingerprint, data.size, self.probe.model_dump_json(), tuple(rows.tolist()))

        def compute() -> Trivial:
            parts = []
            for places_B in torch.split(torch.arange(len(rows)), self.chunk):
                self.context.alive()
                images = self.images.batch(places_B.to(self.context.device))[0].cpu()
                parts.append(
                    trivial_psnr(
                        images,
                        rows[places_B],
                        self.probe,
                        data.mean,
                        data.std,
                        is_padded=data.is_padded,
                    )
                )
            return best_of(torch.cat(parts, dim=2))

        kept = remembered(_kept, key, compute)
        return Trivial(*(each.to(self.context.device) for each in kept))

    def _reconstruct(self, model: MAE) -> Reconstruct:
        """`model.reconstruct`, at rest."""

        def reconstruct(images: Tensor, visible_BV: Tensor, hidden_BX: Tensor) -> Tensor:
            with at_rest(model, self.config.pretrain, self.context.device):
                return model.reconstruct(images, visible_BV, hidden_BX)

        return reconstruct


@contextlib.contextmanager
def at_rest(model: nn.Module, settings: PretrainConfig, device: torch.device) -> Iterator[None]:
    """The model in eval mode, at the trial's precision, never compiled; then in training mode."""
    # every ratio is another shape, which is not worth compiling for a few images
    eager = (
        torch.compiler.set_stance("force_eager") if settings.compile else contextlib.nullcontext()
    )
    model.eval()
    with eager, distributed.autocast(settings.precision, device):
        yield
    model.train()


def probe_rows(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """`count` of the validation rows, evenly spread; all of them when there are fewer."""
    count = min(count, len(rows))
    return rows[np.arange(count) * len(rows) // max(1, count)]


def probe_mask(
    probe: ProbeConfig, ratio: float, size: Sequence[int], patch: Sequence[int], rows_B: Tensor
) -> tuple[Tensor, int]:
    """(is_hidden_BP, number hidden): from seed, ratio and row, so the same for every trial."""
    unit = probe.unit_edges(len(size))
    patches_per_unit = grid_of(unit, patch)
    assert tuple(map(operator.mul, patches_per_unit, patch)) == unit
    unit_grid = grid_of(size, unit)
    num_units = math.prod(unit_grid)
    hidden = hidden_units(ratio, num_units)
    noise_BU = counter.uniform(probe.seed, f"probe@{ratio!r}", 0, rows_B, num_units)
    is_hidden_BU = hide_smallest(noise_BU, hidden)
    is_hidden_BP = unit_to_patch(is_hidden_BU, unit_grid, patches_per_unit)
    return is_hidden_BP, hidden * math.prod(patches_per_unit)


def native_mask(
    config: TrialConfig,
    seed: int,
    images: Tensor,
    rows_B: Tensor,
    model: MAE | None,
    *,
    is_padded: bool = False,
) -> tuple[Tensor, int]:
    """(is_hidden_BP, number hidden) as the trial itself hides at the end of its schedule."""
    request = request_at(config, 1.0, images, rows_B, model, seed=seed, step=0, is_padded=is_padded)
    return request.to_patches(hide(config, request)), request.hidden_patches


def metric_names(probe: ProbeConfig, config: TrialConfig) -> list[str]:
    """What `measure` measures."""
    per_ratio = [f"{key}@{ratio:g}" for key in PROBED for ratio in probe.ratios]
    means = [*PROBED, "probe_gain", *(f"probe_gain/{key}" for key in FILLINGS)]
    native = ["native_psnr_hidden"]
    if config.model.decoder.attention == "self":  # the other one predicts no visible patch
        native.append("native_psnr_all")
    return [*means, *per_ratio, *native]


def measure(
    reconstruct: Reconstruct,
    asked: MAE | None,
    images: Tensor,
    rows_B: Tensor,
    config: TrialConfig,
    probe: ProbeConfig,
    trivial: Trivial,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    is_padded: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every metric of these images, name -> (B,), 0 where it does not count; and whether it does.

    `images` are standardised (B, C, *S), `trivial` is what trivial fillings reach on them. `asked`:
    whom the trial's strategy asks where to hide.
    """
    size = images.shape[2:]
    patch = config.patch_edges(len(size))
    grid = grid_of(size, patch)
    truth = to_intensity(images, mean, std)
    is_real_BS = ~images[:, 0].isnan() if is_padded else None

    values: dict[str, Tensor] = {}
    is_counted: dict[str, Tensor] = {}

    def note(name: str, values_B: Tensor, is_counted_B: Tensor) -> None:
        values[name], is_counted[name] = torch.where(is_counted_B, values_B, 0.0), is_counted_B

    reached, counted = [], []
    for ratio in probe.ratios:
        is_hidden_BP, hidden = probe_mask(probe, ratio, size, patch, rows_B)
        is_hidden_BS, is_visible_BS = _both(pixels_hidden(is_hidden_BP, grid, patch), is_real_BS)
        is_counted_B = _counts(is_hidden_BS, is_visible_BS)
        predicted = _predict(reconstruct, images, is_hidden_BP, hidden, mean, std)
        for key, score in PROBED.items():
            note(f"{key}@{ratio:g}", score(predicted, truth, is_hidden_BS), is_counted_B)
        reached.append(psnr(predicted, truth, is_hidden_BS))
        counted.append(is_counted_B)
    at_every_B = torch.stack(counted).all(dim=0)
    for key in PROBED:
        found = torch.stack([values[f"{key}@{r:g}"] for r in probe.ratios])
        note(key, found.mean(0), at_every_B)
    for name, gain_B in gains(torch.stack(reached), trivial).items():
        note(name, gain_B, at_every_B)

    with distributed.autocast(config.pretrain.precision, images.device):
        is_hidden_BP, hidden = native_mask(
            config, probe.seed, images, rows_B, asked, is_padded=is_padded
        )
    is_hidden_BS, is_visible_BS = _both(pixels_hidden(is_hidden_BP, grid, patch), is_real_BS)
    is_counted_B = _counts(is_hidden_BS, is_visible_BS)
    predicted = _predict(reconstruct, images, is_hidden_BP, hidden, mean, std)
    note("native_psnr_hidden", psnr(predicted, truth, is_hidden_BS), is_counted_B)
    if "native_psnr_all" in metric_names(probe, config):
        note("native_psnr_all", psnr(predicted, truth, is_hidden_BS | is_visible_BS), is_counted_B)
    return values, is_counted


def trivial_psnr(
    images: Tensor,
    rows_B: Tensor,
    probe: ProbeConfig,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    is_padded: bool = False,
) -> Tensor:
    """dB of each trivial filling on the probe's hidden pixels (F, R, B); NaN where none counts.

    `images` are standardised (B, C, *S), on the CPU.
    """
    size = images.shape[2:]
    unit = probe.unit_edges(len(size))
    truth = to_intensity(images, mean, std)
    is_real_BS = ~images[:, 0].isnan() if is_padded else None
    found_RFB = []
    for ratio in probe.ratios:
        is_hidden_BU, _ = probe_mask(probe, ratio, size, unit, rows_B)
        both = _both(pixels_hidden(is_hidden_BU, grid_of(size, unit), unit), is_real_BS)
        is_counted_B = _counts(*both)
        arrays = [each.numpy() for each in (truth, both[1], both[0])]
        at_ratio_FB = []
        for filling in FILLINGS.values():
            filled = truth.clone()
            for place in is_counted_B.nonzero()[:, 0].tolist():
                image = filling.fill(*(array[place] for array in arrays))
                filled[place] = torch.from_numpy(np.ascontiguousarray(image))
            at_ratio_FB.append(psnr(filled, truth, both[0]).masked_fill(~is_counted_B, math.nan))
        found_RFB.append(torch.stack(at_ratio_FB))
    return torch.stack(found_RFB, dim=1)


def best_of(psnr_FRB: Tensor) -> Trivial:
    """The best filling at each ratio, for all of the probe's images."""
    return Trivial(psnr_FRB, psnr_FRB.nanmean(dim=2).argmax(dim=0))


def gains(psnr_RB: Tensor, trivial: Trivial) -> dict[str, Tensor]:
    """dB above the trivial fillings (B,), means over the ratios: above the best, and above each."""
    ratios_R = torch.arange(len(psnr_RB), device=psnr_RB.device)
    best_B = (psnr_RB - trivial.psnr_FRB[trivial.best_R, ratios_R]).mean(dim=0)
    each_FB = (psnr_RB - trivial.psnr_FRB).mean(dim=1)
    named = {f"probe_gain/{key}": gain_B for key, gain_B in zip(FILLINGS, each_FB, strict=True)}
    return {"probe_gain": best_B, **named}


def _both(is_hidden_BS: Tensor, is_real_BS: Tensor | None) -> tuple[Tensor, Tensor]:
    """(hidden pixels, visible pixels) without padding."""
    if is_real_BS is None:
        return is_hidden_BS, ~is_hidden_BS
    return is_hidden_BS & is_real_BS, ~is_hidden_BS & is_real_BS


def _counts(is_hidden_BS: Tensor, is_visible_BS: Tensor) -> Tensor:
    """Whether an image has something to fill in, and something to see: bool (B,)."""
    return is_hidden_BS.flatten(1).any(dim=1) & is_visible_BS.flatten(1).any(dim=1)


def _predict(
    reconstruct: Reconstruct,
    images: Tensor,
    is_hidden_BP: Tensor,
    hidden: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    predicted = reconstruct(images, *split_indices(is_hidden_BP, hidden))
    # What is no number is black in pictures, but must not be scored as if it were
    return to_intensity(predicted, mean, std).masked_fill(predicted.isnan(), math.nan)
