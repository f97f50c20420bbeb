"""One optimisation step's backward, also where the batch does not fit: micro-batches, the contrastive batch kept whole.

The caption loss is a sum over pictures, so its gradient simply adds up. The contrastive loss is not: every picture is
compared with every text. So embeddings of all micro-batches are computed first, without a graph; the loss over all of
them gives the gradient of each embedding; and a second forward of each micro-batch carries it back (GradCache, Gao et
al. 2021, arXiv 2101.06983). The result equals the big batch's, for one more forward and the memory of one micro-batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor

from mammut.training.objective import Losses, ObjectiveOptions, Outputs, PairBatch, count_tokens, share, weighed

Passes = Callable[..., Outputs]
"""TwoPass, or DDP or FSDP around it."""


def no_sync_needed(last: bool) -> AbstractContextManager[None]:
    """For a single process: there is nobody to exchange gradients with."""
    return contextlib.nullcontext()


def backward_of_step(
    passes: Passes,
    batches: Sequence[PairBatch],
    options: ObjectiveOptions,
    kind: Literal["focal", "infonce"],
    synchronised: Callable[[bool], AbstractContextManager[None]] = no_sync_needed,
) -> Losses:
    """Add the gradient of the whole step to the parameters.

    Args:
        passes: what gives a batch's Outputs.
        batches: this process's micro-batches; as many and as large on every process.
        synchronised: a context for one micro-batch's backward; gets whether it is the last, which alone exchanges
            gradients with the other processes.

    Returns:
        The losses, without a graph.
    """
    counted = count_tokens(torch.stack([batch.counted.sum() for batch in batches]))
    if len(batches) == 1:
        with synchronised(True):
            only = batches[0]
            losses = weighed(passes(only), only.keys, counted, kind, options, only.text_keys)
            losses.total.backward()  # type: ignore[no-untyped-call]
        return Losses(*(loss.detach() for loss in losses))
    found = _embedding_gradients(passes, batches, options, kind)
    caption, total = found.losses.caption, found.losses.total
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        with synchronised(last):
            outputs = passes(batch)
            alone = weighed(outputs._replace(images=None, texts=None), batch.keys, counted, kind, options)
            written = share(alone.caption, options.caption_weight, outputs.log_variances, 1, regular=last)
            (written + found.carried(outputs, index, last)).backward()  # type: ignore[no-untyped-call]
        caption, total = caption + alone.caption.detach(), total + written.detach()
    return Losses(found.losses.contrastive, caption, total)


class _Found:
    """The contrastive loss and its gradients with respect to what each micro-batch's forward gave."""

    def __init__(self, losses: Losses, leaves: Outputs, parts: int) -> None:
        self.losses = losses
        self.images = _grads(leaves.images, parts)
        self.texts = _grads(leaves.texts, parts)
        self.scalars = [_grad(each) for each in (leaves.scale, leaves.bias, leaves.log_variances)]

    def carried(self, outputs: Outputs, index: int, last: bool) -> Tensor:
        """A scalar whose gradient with respect to the outputs is the contrastive loss's."""
        total = outputs.scale.new_zeros(())
        for given, gradients in ((outputs.images, self.images), (outputs.texts, self.texts)):
            if given is not None:
                total = total + (given * gradients[index]).sum()
        if last:  # scale, bias and weights belong to the whole batch
            for given, gradient in zip((outputs.scale, outputs.bias, outputs.log_variances), self.scalars, strict=True):
                if given is not None and gradient is not None:
                    total = total + (given * gradient).sum()
        return total


def _embedding_gradients(
    passes: Passes, batches: Sequence[PairBatch], options: ObjectiveOptions, kind: Literal["focal", "infonce"]
) -> _Found:
    if options.contrastive_weight == 0:
        zero = torch.zeros((), device=batches[0].pixels.device)
        return _Found(Losses(zero, zero, zero), Outputs(None, None, None, zero, None, None), len(batches))
    with torch.no_grad():
        seen = [passes(batch, caption=False) for batch in batches]
    first = seen[0]
    leaves = Outputs(
        _leaf(torch.cat([each.images for each in seen if each.images is not None])),
        _leaf(torch.cat([each.texts for each in seen if each.texts is not None])),
        None,
        first.scale.detach().requires_grad_(),
        _leaf(first.bias),
        _leaf(first.log_variances),
    )
    keys, text_keys = (torch.cat([getattr(b, name) for b in batches]) for name in ("keys", "keys_of_texts"))
    losses = weighed(leaves, keys, 1, kind, options, text_keys)
    losses.total.backward()  # type: ignore[no-untyped-call]
    return _Found(Losses(*(loss.detach() for loss in losses)), leaves, len(batches))


def _leaf(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().clone().requires_grad_()


def _grad(leaf: Tensor | None) -> Tensor | None:
    return None if leaf is None else leaf.grad


def _grads(leaf: Tensor | None, parts: int) -> tuple[Tensor, ...]:
    gradient = _grad(leaf)
    return () if gradient is None else gradient.chunk(parts)
