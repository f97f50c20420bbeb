"""The contrastive losses in their plain form, over one dense matrix: the reference that contrast.py is held to.

What counts as a positive pair is an argument: training sets with class labels put the same text under many pictures of
one batch, and such pairs must attract, not repel (`same`).

Legend: I pictures, T texts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def same(picture_keys: Sequence[str], text_keys: Sequence[str]) -> Tensor:
    """bool[I, T]: which texts say what a picture shows. Two samples with one key are about the same thing."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys([*picture_keys, *text_keys]))}
    rows = torch.tensor([numbers[key] for key in picture_keys])
    columns = torch.tensor([numbers[key] for key in text_keys])
    return rows[:, None] == columns[None, :]


def focal_contrastive(logits: Tensor, positives: Tensor, gamma: float = 1.0) -> Tensor:
    """The paper's focal loss over all pairs (arXiv 2303.16839 eq. 2-4), summed and divided by the number of pictures.

    Every pair is a yes/no question with probability p of the right answer; its loss is -(1 - p)^gamma log p. The
    matrix holds each pair once, so the paper's image-to-text and text-to-image terms are both this value; their sum is
    twice it, which is what is returned. The paper gives no gamma; 1 is the default of its authors' RO-ViT code.

    Args:
        logits: float[I, T], scaled (and biased) cosines.
        positives: bool[I, T].
        gamma: 0 gives the plain sigmoid loss; larger values look away from pairs that are already right.

    Returns:
        A float32 scalar.
    """
    signed = torch.where(positives, logits, -logits).float()
    # p = sigmoid(signed), so log p = -softplus(-signed) and log(1 - p) = -softplus(signed): never log of a rounded 0.
    loss = torch.exp(-gamma * F.softplus(signed)) * F.softplus(-signed)
    return 2.0 * loss.sum() / logits.shape[0]


def info_nce(logits: Tensor, positives: Tensor) -> Tensor:
    """Softmax over the texts for each picture and over the pictures for each text, averaged.

    Where a row or column has several positives, each is expected to get an equal share of the probability.

    Args:
        logits: float[I, T], scaled cosines.
        positives: bool[I, T]; every row and column needs at least one.

    Returns:
        A float32 scalar, the mean of both directions.
    """
    shares, logits = positives.float(), logits.float()
    to_text = F.cross_entropy(logits, shares / shares.sum(dim=1, keepdim=True))
    to_image = F.cross_entropy(logits.T, (shares / shares.sum(dim=0, keepdim=True)).T)
    return (to_text + to_image) / 2
