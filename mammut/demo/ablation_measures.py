"""What the rows of the ablation are compared by: figures of a small model on pictures that no row was trained on.

At the size it was trained with everything; at a larger one, with the positions resized, what follows from its
embeddings alone. A pass that was not trained is not measured.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mammut.checkpoint import Checkpoint
from mammut.data.pairs import Pair
from mammut.demo import recipe
from mammut.demo.evaluate import CHUNK, Judge, on_white
from mammut.training.run_config import RunConfig
from mammut_runtime.preprocess import Preprocessor

SOME = {"flowers": 400, "clothing": 400, "shapes": 400, "photos": 400}
"""Pictures of a kind, at most: drawn once, the same for every row."""
QUESTIONS = 800
NAMED = 200
"""Of the pictures of a kind, those whose names are ranked by the caption pass: it reads every name for each picture."""


@dataclass(frozen=True)
class HeldOut:
    """Pictures that no row is trained on."""

    pairs: Mapping[str, Sequence[Pair]]
    """By kind as recipe.held_out has them; of the shapes those that have a caption."""
    asked: Sequence[tuple[int, str, str]]
    """Number of the shape, question, answer."""
    pixels: dict[tuple[str, int], npt.NDArray[np.uint8]]
    """By kind and size, uint8[N, S, S, 3]: what was prepared before, for every row alike."""


def held_out(data: Path) -> HeldOut:
    """From the data folder. Errors as recipe.check_folder's."""
    found = recipe.held_out(data)
    return some_of({kind: found[kind] for kind in SOME})


def some_of(found: Mapping[str, Sequence[Pair]]) -> HeldOut:
    """No more than SOME of each kind, and QUESTIONS about the shapes."""
    chance, pairs = random.Random(0), dict[str, list[Pair]]()
    for kind, every_one in found.items():
        captioned = [pair for pair in every_one if pair.captions]
        pairs[kind] = chance.sample(captioned, min(SOME[kind], len(captioned)))
    every = [(number, q, a) for number, pair in enumerate(pairs["shapes"]) for q, a in pair.questions]
    return HeldOut(pairs, chance.sample(every, min(QUESTIONS, len(every))), {})


def measure(checkpoint: Checkpoint, config: RunConfig, held: HeldOut, suffix: str = "") -> dict[str, float]:
    """Shares from 0 to 1, named KIND_MEASURE and `suffix`; with a suffix only what follows from embeddings.

    match: the best of all names of the kind is the right one. r1, r5: the right one of all held-out descriptions is the
    best or among five, and the same for pictures of a description, averaged. caption: written exactly. named: of all
    names of the kind, the caption pass finds the right one the most probable. questions: about shapes, answered
    exactly.
    """
    judge, figures = Judge(checkpoint), dict[str, float]()
    both_ways = config.objective.contrastive_weight > 0
    writes = config.objective.caption_weight > 0 and not suffix
    for kind, pairs in held.pairs.items():
        tokens, embeddings = _see(checkpoint, kind, held)
        if both_ways and kind == "photos":
            figures |= {f"photos_{name}": value for name, value in _retrieval(judge, embeddings, pairs).items()}
        elif both_ways:
            figures[f"{kind}_match"] = _match(judge, embeddings, pairs)
        if writes and kind != "photos":
            figures[f"{kind}_caption"] = _caption(judge, tokens, pairs)
            figures[f"{kind}_named"] = _named(judge, tokens, pairs)
        if writes and kind == "shapes":
            figures["questions"] = _questions(judge, tokens, held)
    return {name + suffix: round(value, 6) for name, value in figures.items()}


@torch.no_grad()
def _see(checkpoint: Checkpoint, kind: str, held: HeldOut) -> tuple[Tensor, Tensor]:
    """As Judge.see, pictures prepared only once."""
    rule, at = checkpoint.preprocess, (kind, checkpoint.preprocess.size)
    if at not in held.pixels:
        preprocess = Preprocessor(rule)
        held.pixels[at] = np.stack([preprocess.pixels_u8(on_white(pair)) for pair in held.pairs[kind]])
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (rule.mean, rule.std))
    seen = []
    for part in torch.split(torch.from_numpy(held.pixels[at]), CHUNK):
        seen.append(checkpoint.model.encode_image((part.permute(0, 3, 1, 2).float() / 255 - mean) / std))
    return torch.cat([tokens for tokens, _ in seen]), torch.cat([embedding for _, embedding in seen])


def _match(judge: Judge, embeddings: Tensor, pairs: Sequence[Pair]) -> float:
    names = sorted({pair.captions[0] for pair in pairs})
    best = (embeddings @ judge.embed(names).T).argmax(dim=1).tolist()
    return _share([names[b] == pair.captions[0] for b, pair in zip(best, pairs, strict=True)])


def _retrieval(judge: Judge, embeddings: Tensor, pairs: Sequence[Pair]) -> dict[str, float]:
    texts = [pair.captions[0] for pair in pairs]
    scores = embeddings @ judge.embed(texts).T
    same = torch.tensor([[one == other for other in texts] for one in texts])
    return {f"r{k}": (_recall(scores, same, k) + _recall(scores.T, same, k)) / 2 for k in (1, 5)}


def _recall(scores: Tensor, right: Tensor, k: int) -> float:
    """Share of rows where fewer than k wrong columns score at least as much as the best right one."""
    own = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    ahead = ((scores >= own) & ~right).sum(dim=1)
    return float((ahead < k).float().mean())


def _caption(judge: Judge, tokens: Tensor, pairs: Sequence[Pair]) -> float:
    right = [pair.captions[0] for pair in pairs]
    written = judge.write(tokens, [""] * len(pairs), _longest(judge, right))
    return _share([text == judge.spell(wanted) for text, wanted in zip(written, right, strict=True)])


@torch.no_grad()
def _named(judge: Judge, tokens: Tensor, pairs: Sequence[Pair]) -> float:
    names, model = sorted({pair.captions[0] for pair in pairs}), judge.model
    some = pairs[:NAMED]
    memory = model.memory(tokens[: len(some)])
    ids = torch.from_numpy(judge.checkpoint.tokenizer.tokenize(names, model.config.text.context_length))
    scores = []
    for row in ids:
        row = row[row != model.text.pad_id]
        hidden = model.text.caption(row[:-1].expand(len(some), -1), memory)
        chances = model.text.vocabulary_logits(hidden).log_softmax(dim=-1)
        scores.append(chances[:, torch.arange(len(row) - 1), row[1:]].sum(dim=1))
    best = torch.stack(scores, dim=1).argmax(dim=1).tolist()
    return _share([names[b] == pair.captions[0] for b, pair in zip(best, some, strict=True)])


def _questions(judge: Judge, tokens: Tensor, held: HeldOut) -> float:
    form, right = judge.checkpoint.prompts["ask"], [answer for _, _, answer in held.asked]
    prompts = [form.replace("{question}", question) for _, question, _ in held.asked]
    given = judge.write(tokens[[number for number, _, _ in held.asked]], prompts, _longest(judge, right))
    return _share([answer == judge.spell(wanted) for answer, wanted in zip(given, right, strict=True)])


def _longest(judge: Judge, texts: Sequence[str]) -> int:
    """Tokens: what is longer cannot be right."""
    return max(len(judge.checkpoint.tokenizer.encode(text)) for text in set(texts)) + 1


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / max(1, len(hits))
