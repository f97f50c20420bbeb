"""Both passes over one encoding of the pictures, and how their losses become one number.

`TwoPass` is the module that DDP or FSDP wraps: it returns embeddings and the caption loss's sum. The contrastive loss
needs the embeddings of all processes and is taken outside (`weighed`), so that a step can also be put together from
micro-batches (accumulate.py).

Legend: B pictures of this process, each with one text; L length, E embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mammut.model import Mammut
from mammut.training.contrast import global_contrastive
from mammut.training.position_crops import training_positions
from mammut_runtime.errors import InputError
from mammut_runtime.strict import Between

CAPTION_LOGITS = 2**27
"""Vocabulary logits held at once: half a gigabyte in float32, 2,048 tokens of 64,000 words. A batch that has fewer
keeps them for the backward; one that has more makes them again, part by part."""


@dataclass(frozen=True)
class ObjectiveOptions:
    """What a step minimises."""

    contrastive_weight: Annotated[float, Between(0, 1e6)] = 1.0
    """0 leaves the contrastive pass out."""
    caption_weight: Annotated[float, Between(0, 1e6)] = 1.0
    """0 leaves the caption pass out. The paper has both weights at 1."""
    weighting: Literal["fixed", "learned"] = "fixed"
    """learned: each loss L with weight w becomes w exp(-s) L + s / 2 with a trained s (Kendall et al. 2018), so that
    the losses are weighed by how uncertain they are."""
    gamma: Annotated[float, Between(0, 10)] = 1.0
    """Of the focal loss. The paper gives none; 1 is the default of its authors' RO-ViT code."""
    label_smoothing: Annotated[float, Between(0, 0.99)] = 0.0
    """Of the caption loss."""
    position_dropout: Annotated[float, Between(0, 1)] = 0.0
    """Probability that a picture's position embeddings are left out as a whole."""

    def __post_init__(self) -> None:
        if self.contrastive_weight == 0 and self.caption_weight == 0:
            raise InputError("contrastive_weight and caption_weight are both 0; expected at least one loss")


@dataclass(frozen=True)
class PairBatch:
    """Pictures with their texts, on one device. T texts, at most B: one that several pictures share stands once."""

    pixels: Tensor
    """float32[B, 3, S, S], normalised; or of clips float32[B, F, 3, S, S]."""
    text_ids: Tensor
    """int64[T, L]: the texts to match, start to end token, padded."""
    keys: Tensor
    """int64[B]: what text each picture belongs to, see contrast.text_key; ABSENT where it has none."""
    ids: Tensor
    """int64[B, L]: input of the caption pass."""
    targets: Tensor
    """int64[B, L]: the next token at each position."""
    counted: Tensor
    """bool[B, L]: targets the model shall write; padding and prompts do not count."""
    regions: Tensor | None = None
    """float32[B, 4]: see position_crops."""
    kept: Tensor | None = None
    """bool[B]: see position_crops."""
    text_keys: Tensor | None = None
    """int64[B]: of the texts, ABSENT from T on. None: T is B, and texts stand in the order of the pictures."""

    @property
    def keys_of_texts(self) -> Tensor:
        return self.keys if self.text_keys is None else self.text_keys

    def to(self, device: torch.device) -> PairBatch:
        """The same on another device."""
        moved = {n: v.to(device, non_blocking=True) for n, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


class Outputs(NamedTuple):
    """What a forward gives. A tuple, because FSDP looks for the tensors in it."""

    images: Tensor | None
    """float[B, E], unit length; None where the contrastive pass is left out."""
    texts: Tensor | None
    """float[B, E], zero from T on."""
    caption_sum: Tensor | None
    """Negative log-likelihood summed over the counted tokens of this process; None where that pass is left out."""
    scale: Tensor
    bias: Tensor | None
    log_variances: Tensor | None
    """float32[2]: the s of learned weighting, contrastive before caption."""


class Losses(NamedTuple):
    """Scalars, of the whole batch of all processes but for `caption` and `total`, whose mean over processes is."""

    contrastive: Tensor
    caption: Tensor
    total: Tensor


class TwoPass(nn.Module):
    """One picture encoding, both passes."""

    def __init__(
        self,
        model: Mammut,
        options: ObjectiveOptions,
        autocast: torch.dtype | None,
        *,
        most_logits: int = CAPTION_LOGITS,
        sort_lengths: bool = False,
    ) -> None:
        """autocast: bfloat16 for mixed precision, or None. sort_lengths: short and long rows go through the text
        decoder apart, so that one long caption does not lengthen all (not for FSDP, whose processes must all call a
        block equally often, nor for compiled blocks, which want few shapes)."""
        super().__init__()
        self.model, self.options, self.autocast = model, options, autocast
        self.most_logits, self.sort_lengths = most_logits, sort_lengths
        self.log_variances = nn.Parameter(torch.zeros(2)) if options.weighting == "learned" else None

    def forward(self, batch: PairBatch, caption: bool = True) -> Outputs:
        """caption: False leaves the caption pass out whatever the weights say."""
        device = batch.pixels.device.type
        # The casts of weights that autocast keeps must not outlive a forward: one made without a graph has no gradient.
        with torch.autocast(device, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            tokens, images = self._encode(batch)
            both = self.options.contrastive_weight > 0
            texts = self._texts(batch) if both else None
            written = self._caption_sum(tokens, batch) if caption and self.options.caption_weight > 0 else None
        return Outputs(
            images.float() if both else None, texts, written, self.model.logit_scale, self.model.logit_bias,
            self.log_variances,
        )  # fmt: skip

    def _encode(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        if batch.pixels.ndim == 5:  # clips, whose positions are neither cropped nor left out
            tokens, raw = self.model.encode_video(batch.pixels, normalize=False)
            return tokens, F.normalize(raw.float(), dim=-1)
        vision, size = self.model.vision, batch.pixels.shape[-1]
        grid = size // vision.config.patch_size
        positions = training_positions(vision.positions, vision.config.class_token, grid, batch.regions, batch.kept)
        tokens, pooled = functional_call(vision, {"positions": positions}, (batch.pixels,))
        embedding = (self.model.image_projection or self.model.memory_projection)(pooled)
        if self.model.tubes is not None and dist.is_initialized():
            # Another process may have clips in this step; DDP and FSDP wait for gradients of everything that learns.
            embedding = embedding + 0 * sum(p.sum() for p in self.model.tubes.parameters() if p.requires_grad)
        return tokens, F.normalize(embedding.float(), dim=-1)

    def _texts(self, batch: PairBatch) -> Tensor:
        ids, text = batch.text_ids, self.model.text
        lengths = (ids != text.pad_id).sum(dim=1) if text.config.mask_pads else None
        parts = self._by_length(lengths, ids)
        found = torch.cat([self.model.encode_text(ids[rows, :length]) for rows, length in parts]).float()
        if len(parts) > 1:
            found = found[torch.cat([rows for rows, _ in parts]).argsort()]
        return F.pad(found, (0, 0, 0, len(batch.pixels) - len(ids)))

    def _caption_sum(self, tokens: Tensor, batch: PairBatch) -> Tensor:
        places = torch.arange(1, batch.ids.shape[1] + 1, device=tokens.device)
        found = []
        for rows, length in self._by_length((batch.counted * places).amax(dim=1), batch.ids):
            hidden = self.model.text.caption(batch.ids[rows, :length], self.model.memory(tokens[rows]))
            found.append(self.counted_rows(hidden, batch.targets[rows, :length], batch.counted[rows, :length]))
        hidden, targets = (torch.cat(each) for each in zip(*found, strict=True))
        most = max(1, self.most_logits // self.model.config.text.vocab_size)
        total = hidden.new_zeros((), dtype=torch.float32)
        for some, wanted in zip(torch.split(hidden, most), torch.split(targets, most), strict=True):
            if len(hidden) > most and torch.is_grad_enabled():
                part = checkpoint(self._cost, some, wanted, use_reentrant=False)
            else:
                part = self._cost(some, wanted)
            total = total + part
        return total

    def _by_length(self, lengths: Tensor | None, ids: Tensor) -> list[tuple[Any, int]]:
        """Which rows go together, and how many of their columns matter: all, or those up to half the width apart."""
        if not self.sort_lengths or lengths is None:
            return [(slice(None), ids.shape[1])]
        half = ids.shape[1] // 2
        short, long = (torch.nonzero(each)[:, 0] for each in (lengths <= half, lengths > half))
        return [(rows, width) for rows, width in ((short, half), (long, ids.shape[1])) if len(rows)]

    def counted_rows(self, hidden: Tensor, targets: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """float[N, W] and int64[N]: hidden states and targets of the tokens that count."""
        return hidden[counted], targets[counted]

    def _cost(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.model.text.vocabulary_logits(hidden).float()
        return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=self.options.label_smoothing)

    def unused_parameters(self) -> set[str]:
        """Names within `model` that no loss of these options reaches: DDP would wait for their gradients."""
        config, prefixes = self.model.config, set[str]()
        if self.options.caption_weight == 0:
            prefixes |= {"text.cross_blocks.", "text.head"}
            prefixes |= {"memory_projection."} if config.vision.embedding == "own_projection" else set()
        if self.options.contrastive_weight == 0:
            prefixes |= {"image_projection.", "log_logit_scale", "bias"}
            prefixes |= {"vision.final_norm."} if config.vision.final_norm == "after_pool" else set()
        return {name for name, _ in self.model.named_parameters() if name.startswith(tuple(prefixes))}


def weighed(
    outputs: Outputs,
    keys: Tensor,
    counted: int,
    kind: Literal["focal", "infonce"],
    options: ObjectiveOptions,
    text_keys: Tensor | None = None,
) -> Losses:
    """The step's loss from what the forward gave.

    The mean over processes of its gradients, as DDP and FSDP take it, is the gradient of the global loss.

    Args:
        keys: int64[B], of the pictures.
        counted: counted tokens of the whole batch of all processes, see `count_tokens`.
        text_keys: int64[B], of the texts; None: those of the pictures.
    """
    zero = outputs.scale.new_zeros(())
    contrastive = caption = total = zero
    if outputs.images is not None and outputs.texts is not None:
        contrastive = global_contrastive(
            outputs.images, outputs.texts, outputs.scale, outputs.bias, keys, keys if text_keys is None else text_keys,
            kind=kind, gamma=options.gamma,
        )  # fmt: skip
        total = total + share(contrastive, options.contrastive_weight, outputs.log_variances, 0)
    if outputs.caption_sum is not None:
        caption = outputs.caption_sum * (processes() / max(1, counted))
        total = total + share(caption, options.caption_weight, outputs.log_variances, 1)
    return Losses(contrastive, caption, total)


def share(loss: Tensor, weight: float, log_variances: Tensor | None, index: int, regular: bool = True) -> Tensor:
    """A loss as it enters the sum. regular: with its s / 2 (which must be added once a step)."""
    if log_variances is None:
        return weight * loss
    scaled = weight * torch.exp(-log_variances[index]) * loss
    return scaled + log_variances[index] / 2 if regular else scaled


def count_tokens(counted: Tensor) -> int:
    """How many targets count in the whole batch of all processes."""
    number = counted.sum()
    if processes() > 1:
        dist.all_reduce(number)
    return int(number)


def processes() -> int:
    """How many train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def uncertainty_optimum(loss: float, weight: float = 1.0) -> float:
    """The s at which w exp(-s) L + s / 2 is least: log(2 w L)."""
    return math.log(2 * weight * loss)
