"""A decoder whose hidden patches ask visible ones, never each other (CrossMAE, Fu et al. 2025).

Each hidden patch is predicted on its own, so any part of them can be left out, and nothing grows
with the square of their number. Each block reads a mixture of its own of all the encoder's layers,
the embedding among them. Visible patches are nobody's question, so they are not predicted.

As published (paper and code, whose rules these are; no code is theirs): the class token is mixed
and attended to like any other; a mixture is normed, block by block, and goes from the encoder's
width straight into keys and values, without the encoder's last norm, a common embedding, or a
second code of its place; the questions are the mask token plus fixed positions; biases everywhere
but in the mixing, whose weights start as those of a linear layer do (Xavier uniform).

B batch · N encoder tokens (class first) · L encoder layers and the embedding · M decoder blocks
X hidden patches · P patches · D encoder width · E decoder width · H heads · Q values of one patch
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainables.blocks import Recomputable, attention, layer_norm

HEAD_WIDTH = 64  # as attention kernels like it


class CrossBlock(Recomputable):
    """Attention of the questions to the encoder's tokens, then an MLP; both behind a norm."""

    def __init__(self, encoder_width: int, width: int) -> None:
        super().__init__()
        self.question_norm = layer_norm(width)
        self.source_norm = layer_norm(encoder_width)
        self.question = nn.Linear(width, width)
        self.key_value = nn.Linear(encoder_width, 2 * width)
        self.project = nn.Linear(width, width)
        self.mlp_norm = layer_norm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(
        self, tokens_BXE: Tensor, source_BND: Tensor, is_key: Tensor | None = None
    ) -> Tensor:
        """Questions and the mixture that answers them -> tokens_BXE."""
        query_BHX = _heads(self.question(self.question_norm(tokens_BXE)))
        key, value = self.key_value(self.source_norm(source_BND)).chunk(2, dim=-1)
        found_BHX = attention(query_BHX, _heads(key), _heads(value), is_key)
        tokens_BXE = tokens_BXE + self.project(found_BHX.transpose(1, 2).flatten(2))
        tokens_BXE = tokens_BXE + self.mlp(self.mlp_norm(tokens_BXE))
        return tokens_BXE


class CrossDecoder(nn.Module):
    """Cross-attention from hidden patches to all layers of the encoder."""

    positions: Tensor

    def __init__(
        self,
        positions: Tensor,
        values: int,
        encoder_width: int,
        encoder_depth: int,
        width: int,
        depth: int,
    ) -> None:
        """`positions` (P, width) are the fixed codes of the places, `values` those of a patch."""
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.layer_mix = nn.Parameter(torch.zeros(depth, 1 + encoder_depth))
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.ModuleList(CrossBlock(encoder_width, width) for _ in range(depth))
        self.norm = layer_norm(width)
        self.head = nn.Linear(width, values)

    def forward(
        self, layers: Sequence[Tensor], hidden_BX: Tensor, is_key: Tensor | None = None
    ) -> Tensor:
        """The embedding and each block's output (B, N, D), un-normed -> predictions_BXQ.

        `is_key` (B, 1, 1, N): which tokens are attended to; None: all.
        """
        # One product reads every layer once; a weighted sum for each block would do so M times
        sources_MBND = torch.einsum("ml,lbnd->mbnd", self.layer_mix, torch.stack(list(layers)))
        tokens_BXE = self.mask_token + self.positions[hidden_BX]
        for block, source_BND in zip(self.blocks, sources_MBND, strict=True):
            tokens_BXE = block(tokens_BXE, source_BND, is_key)
        predictions_BXQ: Tensor = self.head(self.norm(tokens_BXE))
        return predictions_BXQ


def _heads(tokens: Tensor) -> Tensor:
    """(B, N, E) -> (B, H, N, 64)."""
    batch, count, width = tokens.shape
    return tokens.reshape(batch, count, width // HEAD_WIDTH, HEAD_WIDTH).transpose(1, 2)
