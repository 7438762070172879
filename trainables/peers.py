"""Masked autoencoders of other libraries, to be timed beside ours at equal work.

Equal: images and their flips, hidden patches, widths, depths, heads, batch, precision, AdamW. Each
is built and trained as its library says; `timm` is MAE's published code (He et al. 2022) told anew
on timm's blocks. Their own is how they draw, gather and place: see the classes.

B batch · C channels · P patches · V visible · X hidden · Q values of a patch · D width
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainables import distributed
from trainables.augment import AUGMENTATIONS
from trainables.blocks import CONVOLUTION, MLP_RATIO
from trainables.config import SIZES, TrialConfig
from trainables.cross_decoder import HEAD_WIDTH
from trainables.edges import grid_of
from trainables.errors import UserError
from trainables.mae import patchify, pick, positions

BETAS, DECAY, RATE = (0.9, 0.95), 0.05, 1e-4


class Work(NamedTuple):
    """What every contender has to do."""

    config: TrialConfig
    images: Tensor  # (B, C, *S), standardised
    hidden: int  # patches of each image

    @property
    def grid(self) -> tuple[int, ...]:
        size = self.images.shape[2:]
        return grid_of(size, self.config.patch_edges(len(size)))

    @property
    def patches(self) -> int:
        return math.prod(self.grid)

    @property
    def ratio(self) -> float:
        """Of which others hide as many, who round the number of visible patches down."""
        return 1 - (self.patches - self.hidden + 0.5) / self.patches


# (what predicts, what it is asked: images -> (predicted_BXQ, index_BX of hidden patches))
Peer = tuple[nn.Module, Callable[[Tensor], tuple[Tensor, Tensor]]]


class _OnTimm(nn.Module):
    """MAE's reference: (B, C, *S) -> (predicted_BXQ, hidden_BX)."""

    def __init__(self, work: Work, block: Callable[..., nn.Module]) -> None:
        super().__init__()
        encoder, decoder = SIZES[work.config.model.size], work.config.model.decoder
        axes, channels = work.images.ndim - 2, work.images.shape[1]
        width, edges = encoder["width"], work.config.patch_edges(axes)
        self.num_visible = work.patches - work.hidden
        self.embed = CONVOLUTION[axes](channels, width, edges, edges)
        self.encoder = _layers(block, width, encoder["depth"], encoder["heads"])
        self.to_decoder = nn.Linear(width, decoder.width)
        self.decoder = _layers(block, decoder.width, decoder.depth, decoder.width // HEAD_WIDTH)
        self.head = nn.Linear(decoder.width, channels * math.prod(edges))
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.width))
        for name, size in (("places", width), ("decoder_places", decoder.width)):
            self.register_buffer(name, positions(work.grid, edges, size, "patches"))

    places: Tensor
    decoder_places: Tensor

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens_BPD = self.embed(images).flatten(2).transpose(1, 2) + self.places
        batch, patches, _ = tokens_BPD.shape
        order_BP = torch.rand(batch, patches, device=images.device).argsort(dim=1)
        visible_BV, hidden_BX = order_BP.tensor_split([self.num_visible], dim=1)
        first = self.class_token.expand(batch, -1, -1)
        seen = torch.cat([first, pick(tokens_BPD, visible_BV)], dim=1)
        encoded = self.to_decoder(self.encoder(seen))
        masks = self.mask_token.to(encoded.dtype).expand(batch, hidden_BX.shape[1], -1)
        shuffled = torch.cat([encoded[:, 1:], masks], dim=1)
        whole = pick(shuffled, order_BP.argsort(dim=1)) + self.decoder_places
        decoded = self.decoder(torch.cat([encoded[:, :1], whole], dim=1))[:, 1:]
        return pick(self.head(decoded), hidden_BX), hidden_BX


def timm(work: Work) -> Peer:
    """MAE's reference on timm's blocks, in any number of axes."""
    from timm.models.vision_transformer import Block

    model = _OnTimm(work, Block)
    return model, model


def monai(work: Work) -> Peer:
    """MONAI's MaskedAutoEncoderViT."""
    from monai.networks.nets import MaskedAutoEncoderViT

    size, decoder = SIZES[work.config.model.size], work.config.model.decoder
    axes = work.images.ndim - 2
    model = MaskedAutoEncoderViT(
        work.images.shape[1],
        tuple(work.images.shape[2:]),
        work.config.patch_edges(axes),
        hidden_size=size["width"],
        mlp_dim=MLP_RATIO * size["width"],
        num_layers=size["depth"],
        num_heads=size["heads"],
        masking_ratio=work.ratio,
        decoder_hidden_size=decoder.width,
        decoder_mlp_dim=MLP_RATIO * decoder.width,
        decoder_num_layers=decoder.depth,
        decoder_num_heads=decoder.width // HEAD_WIDTH,
        spatial_dims=axes,
        qkv_bias=True,
    )

    def predict(images: Tensor) -> tuple[Tensor, Tensor]:
        every_BPQ, is_hidden_BP = model(images)
        hidden_BX = is_hidden_BP.argsort(dim=1, descending=True, stable=True)[:, : work.hidden]
        return pick(every_BPQ, hidden_BX), hidden_BX

    return model, predict


def lightly(work: Work) -> Peer:
    """lightly's encoder on timm and its decoder, put together as its examples do; 2D squares."""
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import VisionTransformer

    size, decoder = SIZES[work.config.model.size], work.config.model.decoder
    edge, patch = work.images.shape[-1], work.config.model.patch
    if work.images.ndim != 4 or work.images.shape[2] != edge or not isinstance(patch, int):
        raise UserError("lightly: it has masked autoencoders of square images and patches alone")
    channels = work.images.shape[1]
    encoder = MaskedVisionTransformerTIMM(
        VisionTransformer(
            edge,
            patch,
            channels,
            num_classes=0,
            embed_dim=size["width"],
            depth=size["depth"],
            num_heads=size["heads"],
        )
    )
    head = MAEDecoderTIMM(
        work.patches,
        patch,
        channels,
        embed_dim=size["width"],
        decoder_embed_dim=decoder.width,
        decoder_depth=decoder.depth,
        decoder_num_heads=decoder.width // HEAD_WIDTH,
    )
    tokens = work.patches + 1

    def predict(images: Tensor) -> tuple[Tensor, Tensor]:
        batch = len(images)
        kept, masked = utils.random_token_mask((batch, tokens), work.ratio, device=images.device)
        embedded = head.embed(encoder.encode(images=images, idx_keep=kept))
        whole = utils.repeat_token(head.mask_token, (batch, tokens))
        whole = utils.set_at_index(whole.to(embedded.dtype), kept, embedded)
        hidden = utils.get_at_index(head.decode(whole), masked)
        return head.predict(hidden), masked - 1

    return nn.ModuleList([encoder, head]), predict


PEERS: dict[str, Callable[[Work], Peer]] = {"timm": timm, "monai": monai, "lightly": lightly}


def peer_step(name: str, work: Work) -> tuple[Callable[[], Tensor], int]:
    """(one step of training that returns the loss, the number of trained parameters)."""
    try:
        # beside a torch for CPUs alone timm cannot import torchvision by itself
        from trainables import torchvision_mended  # noqa: F401

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what they will change, for whoever writes them
            model, predict = PEERS[name](work)
    except ImportError as error:
        raise UserError(
            f"--beside: {name} cannot be imported ({str(error).splitlines()[0]}); install what is "
            f"missing, or leave it out"
        ) from error
    device, precision = work.images.device, work.config.pretrain.precision
    model = model.to(device).train()
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATE, BETAS, weight_decay=DECAY, fused=True)
    places_B = torch.arange(len(work.images), device=device)
    edges = work.config.patch_edges(work.images.ndim - 2)
    augment = work.config.pretrain.augment

    def step() -> Tensor:
        images, _ = AUGMENTATIONS[augment.name](
            work.images, None, 0, 1, places_B, **augment.options()
        )
        with distributed.autocast(precision, device):
            predicted_BXQ, hidden_BX = predict(images)
            assert hidden_BX.shape[1] == work.hidden
        truth = pick(patchify(images, edges), hidden_BX)
        loss = (predicted_BXQ.float() - truth).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step, sum(each.numel() for each in trained)


def _layers(block: Callable[..., nn.Module], width: int, depth: int, heads: int) -> nn.Sequential:
    blocks = [block(width, heads, MLP_RATIO, qkv_bias=True) for _ in range(depth)]
    return nn.Sequential(*blocks, nn.LayerNorm(width))
