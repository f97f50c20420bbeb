"""MaMMUT: one picture encoder, one text decoder, one shared embedding space (arXiv 2303.16839)."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mammut.config import MammutConfig, VideoConfig
from mammut.text import TextDecoder
from mammut.transformer import KeysValues
from mammut.tubes import Tubes
from mammut.vision import VisionEncoder
from mammut_runtime.errors import InputError


class Mammut(nn.Module):
    """The whole model.

    Legend: B batch, K sequences sharing a picture, N image tokens, L length, E embedding, V vocabulary.

    Args:
        config: sizes and dialect.
        pad_id: id of the padding token, hidden in the contrastive pass where the dialect masks it.
    """

    def __init__(self, config: MammutConfig, pad_id: int = 0) -> None:
        super().__init__()
        self.config = config
        vision, text = config.vision, config.text
        self.vision = VisionEncoder(vision, config.activation)
        self.tubes = Tubes(config.video, vision) if config.video is not None else None
        self.text = TextDecoder(text, pad_id, config.activation)
        self.memory_projection = nn.Linear(vision.width, text.width, bias=False)
        own = vision.embedding == "own_projection"
        self.image_projection = nn.Linear(vision.width, config.embed_dim, bias=False) if own else None
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(config.logit_scale_init)))
        bias = config.logit_bias_init
        self.bias = None if bias is None else nn.Parameter(torch.tensor(bias))
        self._initialise()

    @property
    def logit_scale(self) -> Tensor:
        """The factor on the cosine similarity, 1 / temperature; a scalar."""
        return self.log_logit_scale.exp()

    @property
    def logit_bias(self) -> Tensor | None:
        """Added to the scaled cosine, or None."""
        return self.bias

    def encode_image(self, pixels: Tensor, normalize: bool = True) -> tuple[Tensor, Tensor]:
        """float32[B, 3, S, S] to tokens float32[B, N, Wv] and the image's embedding float32[B, E], unit length."""
        tokens, pooled = self.vision(pixels)
        return tokens, self._shared_space(pooled, normalize)

    def encode_video(
        self, frames: Tensor, normalize: bool = True, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """A clip, all at once, through the picture's encoder.

        Args:
            frames: float32[B, F, 3, S, S], normalised; F as config.video says.
            positions: `video_positions`, made beforehand (an export makes them a constant).

        Returns:
            tokens float32[B, Nv, Wv] and the clip's embedding float32[B, E], unit length.

        Raises:
            InputError: the model has no tubes, or takes another number of frames.
        """
        tubes = self._tubes()
        if frames.shape[1] != tubes.video.frames:
            raise InputError(f"expected clips of {tubes.video.frames} frames, got {frames.shape[1]}")
        embedded = tubes(frames, self.vision.patch_embedding)
        tokens, pooled = self.vision.encode(embedded, self.video_positions() if positions is None else positions)
        return tokens, self._shared_space(pooled, normalize)

    def video_positions(self) -> Tensor:
        """What is added to a clip's tokens, the class token's first: float32[Nv, Wv]. InputError without tubes."""
        learned = self.vision.positions
        return torch.cat([learned[: int(self.config.vision.class_token)], self._tubes().positions(learned)])

    def _tubes(self) -> Tubes:
        if self.tubes is None:
            raise InputError(
                f"the model {self.config.name!r} has no tubes, so it takes no clips; fine-tune it on clips first"
            )
        return self.tubes

    def _shared_space(self, pooled: Tensor, normalize: bool) -> Tensor:
        embedding: Tensor = (self.image_projection or self.memory_projection)(pooled)
        return F.normalize(embedding, dim=-1) if normalize else embedding

    def encode_text(self, ids: Tensor, normalize: bool = True) -> Tensor:
        """The contrastive pass: int64[B, L] to float32[B, E], unit length. Computes no vocabulary logits."""
        embedding = self.text.contrastive(ids)
        return F.normalize(embedding, dim=-1) if normalize else embedding

    def memory(self, tokens: Tensor) -> list[KeysValues]:
        """Image tokens [B, N, Wv] to each cross block's keys and values [B, H, N, D]: once per picture."""
        projected = self.memory_projection(tokens)
        return [block.keys_values(projected) for block in self.text.cross_blocks]  # type: ignore[operator]

    def caption_logits(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """The caption pass with teacher forcing: tokens [B, N, Wv], ids int64[B, L] to logits float32[B, L, V]."""
        return self.text.vocabulary_logits(self.text.caption(ids, self.memory(tokens)))

    def decode_step(
        self, ids: Tensor, past: list[KeysValues], memory: list[KeysValues]
    ) -> tuple[Tensor, list[KeysValues]]:
        """The caption pass with caches: see TextDecoder.step."""
        return self.text.step(ids, past, memory)

    def empty_past(self, batch: int, beams: int = 1) -> list[KeysValues]:
        """The cache before the first token: per self block, two tensors [batch, beams, H, 0, D]."""
        text = self.config.text
        empty = self.text.positions.new_zeros(batch, beams, text.heads, 0, text.width // text.heads)
        return [(empty, empty)] * text.layers

    def _initialise(self) -> None:
        """Normal(0.02) for embeddings and positions, Xavier for matrices, residual outputs scaled by depth."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        embeddings = [self.vision.positions, self.text.positions, self.text.token_embedding.weight]
        for parameter in [*embeddings, self.vision.class_token, self.text.head]:
            if parameter is not None:
                nn.init.normal_(parameter, std=0.02)
        if self.tubes is not None:
            self.tubes.inflate(self.vision.patch_embedding)


def with_video(model: Mammut, video: VideoConfig) -> Mammut:
    """The same model for clips as well: tubes inflated from its patches, the gate closed. Pictures give what they gave.

    The weights it had are shared with `model`, not copied. A model that has these very tubes is returned as it is;
    other tubes are replaced.

    Raises:
        CheckpointError: the tubes do not fit the encoder.
    """
    if model.config.video == video:
        return model
    config = dataclasses.replace(model.config, video=video)
    with torch.device("meta"):
        new = Mammut(config, model.text.pad_id)
    like = model.vision.patch_embedding.weight
    tubes = Tubes(video, config.vision).to(like.device, like.dtype).requires_grad_(like.requires_grad)
    tubes.inflate(model.vision.patch_embedding)
    new.tubes = tubes
    state = {name: value for name, value in model.named_parameters() if not name.startswith("tubes.")}
    state |= {f"tubes.{name}": value for name, value in tubes.named_parameters()}
    learns = {name: value.requires_grad for name, value in state.items()}
    new.load_state_dict(state, strict=True, assign=True)
    for name, value in new.named_parameters():
        value.requires_grad_(learns[name])
    return new.train(model.training)
