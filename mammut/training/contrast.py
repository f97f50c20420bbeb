"""The contrastive losses over the global batch of all processes, in memory linear in the local batch.

Texts travel around the ring of processes; each process compares the visiting texts with its own pictures, tile by tile,
and keeps only sums: no process ever holds more than TILE x TILE similarities. Losses and positives mean exactly what
they mean in losses.py, which holds the plain form over one dense matrix.

The gradient with respect to the embeddings is made in the forward pass, when all that it needs is at hand; the backward
only scales it. So there is no communication in the backward that could meet that of DDP or FSDP, and embeddings that
were computed without a graph (see accumulate.py) can be given as well.

Legend: I pictures and T texts of this process, E embedding, R processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from mammut_runtime.errors import InputError

TILE = 1024
"""Pictures and texts compared at once: 4 MB a tile in float32."""

ABSENT = -1
"""Key of a picture or text that takes no part: processes must hold equal numbers of rows, but need not fill them."""

_NEVER = -1e30
"""Logit of a pair that takes no part: finite, so that nothing becomes NaN; its exponential is 0."""


@dataclass(frozen=True)
class Similarity:
    """How a cosine becomes a logit: scale * cosine + bias. Scalars."""

    scale: Tensor
    bias: Tensor


def global_contrastive(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    picture_keys: Tensor,
    text_keys: Tensor,
    *,
    kind: Literal["focal", "infonce"],
    gamma: float = 1.0,
    group: dist.ProcessGroup | None = None,
    tile: int = TILE,
) -> Tensor:
    """The loss of the whole batch, the same number on every process.

    Its gradient is that of the global loss with respect to what this process gave, times the number of processes: DDP
    and FSDP average over processes, and the average is then the gradient of the global loss.

    Args:
        images: float[I, E], unit length; as many on every process.
        texts: float[T, E], unit length; as many on every process.
        scale: factor on the cosine, a scalar.
        bias: added to the scaled cosine, a scalar or None.
        picture_keys: int64[I]. A picture and a text with equal keys are a positive pair, on whichever process they are
            (identical captions are, see `text_key`). Every key occurs among both pictures and texts. ABSENT: the row
            takes no part (a picture without a caption, room left by texts that were equal).
        text_keys: int64[T], the same.
        kind: focal (paper eq. 2-4, summed over pairs and divided by the number of pictures) or infonce.
        gamma: of the focal loss.
        group: the processes; None: all of them, or this one alone where torch.distributed is not in use.
        tile: similarities held at once are at most tile x tile.

    Returns:
        A scalar, float32 (float64 where the embeddings are).

    Raises:
        InputError: shapes that do not belong together.
    """
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
        raise InputError(f"expected embeddings [I, E] and [T, E], got {list(images.shape)} and {list(texts.shape)}")
    if picture_keys.shape != images.shape[:1] or text_keys.shape != texts.shape[:1]:
        raise InputError("expected one key for each picture and each text")
    wide = torch.float64 if images.dtype == torch.float64 else torch.float32
    offset = torch.zeros((), dtype=wide, device=images.device) if bias is None else bias.to(wide)
    out: Tensor = _Contrast.apply(
        images.to(wide), texts.to(wide), scale.to(wide), offset,
        picture_keys, text_keys, _Setting(kind, gamma, tile, group),
    )  # type: ignore[no-untyped-call]  # fmt: skip
    return out


def text_key(text: str) -> int:
    """A 63-bit number for a text, the same on every process and run; equal texts are equal, up to case and blanks."""
    plain = " ".join(text.lower().split())
    return int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class _Setting:
    kind: Literal["focal", "infonce"]
    gamma: float
    tile: int
    group: dist.ProcessGroup | None

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group) if dist.is_initialized() else 1


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        bias: Tensor,
        picture_keys: Tensor,
        text_keys: Tensor,
        setting: _Setting,
    ) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            similar = Similarity(scale, bias)
            run = _focal if setting.kind == "focal" else _info_nce
            loss, gradients = run(images, texts, picture_keys, text_keys, similar, setting)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        return (*(gradient * grads[0] for gradient in gradients), None, None, None)


class _Gradients:
    """What is summed up while the texts go round: gradients of the pictures here, and of scale and bias."""

    def __init__(self, images: Tensor) -> None:
        self.images = torch.zeros_like(images)
        self.scale = images.new_zeros(())
        self.bias = images.new_zeros(())

    def add(self, slope: Tensor, images: Tensor, texts: Tensor, cosine: Tensor, scale: Tensor, rows: slice) -> Tensor:
        """slope: d loss / d logit of a tile. Returns the gradient of the tile's texts."""
        self.images[rows] += scale * (slope @ texts)
        self.scale += (slope * cosine).sum()
        self.bias += slope.sum()
        return scale * (slope.T @ images)


_Found = tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]


def _focal(
    images: Tensor, texts: Tensor, picture_keys: Tensor, text_keys: Tensor, similar: Similarity, setting: _Setting
) -> _Found:
    """One round: a pair's loss and slope depend on nothing but the pair."""
    gradients, total = _Gradients(images), images.new_zeros(())
    factor = 2.0 / _present(picture_keys, images, setting)

    def visit(guests: list[Tensor]) -> None:
        guest_texts, guest_keys, guest_gradient = guests
        for rows, columns in _tiles(len(images), len(guest_texts), setting.tile):
            cosine = images[rows] @ guest_texts[columns].T
            sign = torch.where(picture_keys[rows, None] == guest_keys[None, columns], 1.0, -1.0).to(cosine.dtype)
            signed = sign * (similar.scale * cosine + similar.bias)
            # p = sigmoid(signed): (1 - p)^gamma = exp(-gamma softplus(signed)), -log p = softplus(-signed).
            easy, cost = torch.exp(-setting.gamma * F.softplus(signed)), F.softplus(-signed)
            easy = easy * _takes_part(picture_keys[rows], guest_keys[columns])
            total.add_((easy * cost).sum())
            slope = -easy * (setting.gamma * torch.sigmoid(signed) * cost + torch.sigmoid(-signed)) * sign * factor
            guest_gradient[columns] += gradients.add(
                slope, images[rows], guest_texts[columns], cosine, similar.scale, rows
            )

    _, _, text_gradient = _round([texts, text_keys, torch.zeros_like(texts)], visit, setting)
    loss = _summed(total * factor, setting)
    return loss, _averaged_later(gradients, text_gradient, setting)


def _info_nce(
    images: Tensor, texts: Tensor, picture_keys: Tensor, text_keys: Tensor, similar: Similarity, setting: _Setting
) -> _Found:
    """Two rounds: the first finds the sums over rows (pictures) and columns (texts), the second the gradients."""
    by_picture = _Softmax.empty(len(images), images)

    def count(guests: list[Tensor]) -> None:
        guest_texts, guest_keys, guest_sums = guests
        for rows, columns in _tiles(len(images), len(guest_texts), setting.tile):
            logits = similar.scale * (images[rows] @ guest_texts[columns].T) + similar.bias
            there = _takes_part(picture_keys[rows], guest_keys[columns])
            logits = logits.masked_fill(~there, _NEVER)
            positive = there & (picture_keys[rows, None] == guest_keys[None, columns])
            by_picture.add(logits, positive, rows)
            _Softmax(guest_sums).add(logits.T, positive.T, columns)

    sums = _Softmax.empty(len(texts), texts).sums
    _, _, sums = _round([texts, text_keys, sums], count, setting)
    by_text = _Softmax(sums)
    pictures, number = _present(picture_keys, images, setting), _present(text_keys, images, setting)
    sides = ((by_picture, picture_keys), (by_text, text_keys))
    here = [torch.where(keys >= 0, sums.losses(), 0.0).sum() for sums, keys in sides]
    loss = _summed(here[0] / (2 * pictures) + here[1] / (2 * number), setting)
    gradients = _Gradients(images)

    def slopes(guests: list[Tensor]) -> None:
        guest_texts, guest_keys, guest_sums, guest_gradient = guests
        guest = _Softmax(guest_sums)
        for rows, columns in _tiles(len(images), len(guest_texts), setting.tile):
            cosine = images[rows] @ guest_texts[columns].T
            there = _takes_part(picture_keys[rows], guest_keys[columns])
            logits = (similar.scale * cosine + similar.bias).masked_fill(~there, _NEVER)
            positive = there & (picture_keys[rows, None] == guest_keys[None, columns])
            slope = by_picture.slope(logits, positive, rows) / (2 * pictures)
            slope += guest.slope(logits.T, positive.T, columns).T / (2 * number)
            slope = slope * there
            guest_gradient[columns] += gradients.add(
                slope, images[rows], guest_texts[columns], cosine, similar.scale, rows
            )

    *_, text_gradient = _round([texts, text_keys, sums, torch.zeros_like(texts)], slopes, setting)
    return loss, _averaged_later(gradients, text_gradient, setting)


@dataclass(frozen=True)
class _Softmax:
    """Running sums of a softmax over logits that come in pieces; one row for each picture (or text)."""

    sums: Tensor
    """float[N, 4]: largest logit, sum of exp(logit - largest), sum and number of the positives' logits."""

    @staticmethod
    def empty(rows: int, like: Tensor) -> _Softmax:
        sums = like.new_zeros(rows, 4)
        sums[:, 0] = -torch.inf
        return _Softmax(sums)

    def add(self, logits: Tensor, positive: Tensor, rows: slice) -> None:
        """In place: logits float[n, m] and positive bool[n, m] of these rows."""
        largest, total, right, number = self.sums[rows].unbind(1)
        new = torch.maximum(largest, logits.amax(dim=1))
        total = total * torch.exp(largest - new) + torch.exp(logits - new[:, None]).sum(dim=1)
        right = right + torch.where(positive, logits, 0.0).sum(dim=1)
        self.sums[rows] = torch.stack([new, total, right, number + positive.sum(dim=1)], dim=1)

    def losses(self) -> Tensor:
        """float[N]: log-sum-exp minus the mean logit of the positives."""
        largest, total, right, number = self.sums.unbind(1)
        return largest + total.log() - right / number

    def slope(self, logits: Tensor, positive: Tensor, rows: slice) -> Tensor:
        """float[n, m]: d loss of a row / d logit."""
        largest, total, _, number = self.sums[rows].unbind(1)
        return torch.exp(logits - largest[:, None]) / total[:, None] - positive / number[:, None].clamp(min=1)


def _takes_part(picture_keys: Tensor, text_keys: Tensor) -> Tensor:
    """bool[i, t]."""
    return (picture_keys >= 0)[:, None] & (text_keys >= 0)[None, :]


def _present(keys: Tensor, like: Tensor, setting: _Setting) -> Tensor:
    """How many rows of all processes take part, at least 1; a scalar of the embeddings' type."""
    return _summed((keys >= 0).sum().to(like.dtype), setting).clamp(min=1)


def _averaged_later(gradients: _Gradients, texts: Tensor, setting: _Setting) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Times the number of processes: the engine around us divides by it."""
    size = setting.size
    return gradients.images * size, texts * size, gradients.scale * size, gradients.bias * size


def _tiles(rows: int, columns: int, tile: int) -> list[tuple[slice, slice]]:
    return [
        (slice(row, min(row + tile, rows)), slice(column, min(column + tile, columns)))
        for row in range(0, rows, tile)
        for column in range(0, columns, tile)
    ]


def _round(own: list[Tensor], visit: Callable[[list[Tensor]], None], setting: _Setting) -> list[Tensor]:
    """Send `own` tensors past every process, which may change them in place; returns them as they come home."""
    guests = [tensor.clone() for tensor in own]
    for _ in range(setting.size):
        visit(guests)
        if setting.size > 1:
            guests = _passed_on(guests, setting.group)
    return guests


def _passed_on(guests: list[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Give the guests to the next process and take those of the previous one."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    after, before = (rank + 1) % size, (rank - 1) % size
    if group is not None:
        after, before = dist.get_global_rank(group, after), dist.get_global_rank(group, before)
    arrived = [torch.empty_like(guest) for guest in guests]
    operations = [
        operation
        for index, guest in enumerate(guests)
        for operation in (
            dist.P2POp(dist.isend, guest.contiguous(), after, group, tag=index),
            dist.P2POp(dist.irecv, arrived[index], before, group, tag=index),
        )
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return arrived


def _summed(value: Tensor, setting: _Setting) -> Tensor:
    if setting.size > 1:
        dist.all_reduce(value, group=setting.group)
    return value
