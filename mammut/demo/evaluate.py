"""Every figure of the demo's model card, from the checkpoint and the data folder: `mammut-train demo-eval`.

Pictures go through the runtime's own preprocessing; captions and answers are greedy. Each figure stands beside what a
pixel nearest neighbour (16 x 16 RGB, Euclidean, over the training pictures) and chance reach on the same pictures.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mammut.checkpoint import Checkpoint
from mammut.data.pairs import Pair, read_drawing
from mammut.demo import recipe
from mammut.evaluation.probe import linear_probe
from mammut.evaluation.task_caption import caption_measures
from mammut.model import Mammut
from mammut.training.loop import Evaluate
from mammut_runtime.pictures import read_picture
from mammut_runtime.preprocess import Preprocessor

CHUNK = 128
"""Pictures or sequences at once."""
QUESTIONS = 2000
"""Size of the sample of easy-VQA's test questions."""
MAX_ANSWER = 16
"""Tokens."""
IS_THIS = slice(3, 5)
"""Of a labelled picture's questions: "is this a rose?", once of what it is and once of something else."""

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Judge:
    """A checkpoint ready to be asked. `spell` is how a text looks after its way through the tokenizer."""

    checkpoint: Checkpoint

    @property
    def model(self) -> Mammut:
        return self.checkpoint.model

    def spell(self, text: str) -> str:
        tokenizer = self.checkpoint.tokenizer
        return tokenizer.decode(tokenizer.encode(text)).strip()

    @torch.no_grad()
    def see(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Tokens float32[N, T, W] and embeddings float32[N, E] of pictures; drawings stand on white."""
        preprocess = Preprocessor(self.checkpoint.preprocess)
        pixels = torch.from_numpy(np.stack([preprocess(on_white(pair)) for pair in pairs]))
        seen = [self.model.encode_image(part) for part in torch.split(pixels, CHUNK)]
        return torch.cat([tokens for tokens, _ in seen]), torch.cat([embedding for _, embedding in seen])

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """float32[N, E]."""
        ids = self.checkpoint.tokenizer.tokenize(list(texts), self.model.config.text.context_length)
        return torch.cat([self.model.encode_text(part) for part in torch.split(torch.from_numpy(ids), CHUNK)])

    def write(self, tokens: Tensor, prompts: Sequence[str], max_tokens: int = 31) -> list[str]:
        """Greedy continuations of one prompt a picture ("" for captions)."""
        tokenizer = self.checkpoint.tokenizer
        prompt_ids = [[tokenizer.start_id, *tokenizer.encode(prompt)] for prompt in prompts]
        texts = [""] * len(prompts)
        for length in sorted({len(ids) for ids in prompt_ids}):
            rows = [row for row, ids in enumerate(prompt_ids) if len(ids) == length]
            for start in range(0, len(rows), CHUNK):
                part = rows[start : start + CHUNK]
                ids = torch.tensor([prompt_ids[row] for row in part])
                for row, written in zip(part, greedy_batch(self.model, tokens[part], ids, tokenizer.end_id, max_tokens),
                                        strict=True):  # fmt: skip
                    texts[row] = tokenizer.decode(written).strip()
        return texts

    def ask(self, tokens: Tensor, questions: Sequence[str]) -> list[str]:
        form = self.checkpoint.prompts["ask"]
        return self.write(tokens, [form.replace("{question}", question) for question in questions], MAX_ANSWER)


@torch.no_grad()
def greedy_batch(model: Mammut, tokens: Tensor, prompts: Tensor, end_id: int, max_tokens: int) -> list[list[int]]:
    """The most probable next token again and again, for many pictures at once, with a cache.

    Args:
        tokens: float32[B, N, W].
        prompts: int64[B, L], all of one length.

    Returns:
        For each picture the new ids, without the end token.
    """
    memory, past = model.memory(tokens), model.empty_past(len(tokens))
    room = min(max_tokens, model.config.text.context_length - prompts.shape[1])
    ids, columns = prompts[:, None, :], []
    for _ in range(room):
        logits, past = model.decode_step(ids, past, memory)
        best = logits[:, 0].argmax(dim=-1)
        columns.append(best)
        ids = best[:, None, None]
        if bool((torch.stack(columns, 1) == end_id).any(dim=1).all()):
            break
    written = torch.stack(columns, 1).tolist() if columns else [[] for _ in prompts]
    return [row[: row.index(end_id)] if end_id in row else row for row in written]


def on_white(pair: Pair) -> npt.NDArray[np.uint8]:
    """uint8[H, W, 3]."""
    if "/" not in pair.name or pair.name.startswith("shapes/"):
        return read_picture(pair.data).rgb()
    rgba = read_drawing(pair.data).astype(np.float32)
    alpha = rgba[:, :, 3:] / 255
    return np.round(rgba[:, :, :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def evaluate(checkpoint: Checkpoint, data: Path) -> dict[str, Any]:
    """All figures, as shares from 0 to 1. Takes some minutes. Errors as recipe.held_out's."""
    judge, held = Judge(checkpoint), recipe.held_out(data)
    return {
        "checkpoint_sha256": checkpoint.sha256,
        "clothing": _labelled(judge, held["clothing"], recipe.labelled_pairs(data, "clothing", "train"), "clothing"),
        "flowers": _labelled(judge, held["flowers"], recipe.labelled_pairs(data, "flowers", "train"), "flower"),
        "emoji": _emoji(judge, held["emoji"], data),
        "photos": _photos(judge, held["photos"], recipe.photo_pairs(data, "train")),
        "shapes": _shapes(judge, held["shapes"], recipe.shape_pairs(data / "easy-vqa" / "train")),
    }


def glance(data: Path) -> Evaluate:
    """A held-out look at a model in training: of 120 pictures a kind, the share whose caption is the best match among
    all held-out captions of the kind. Seconds, where `evaluate` takes minutes."""
    held = {kind: [pair for pair in pairs if pair.captions] for kind, pairs in recipe.held_out(data).items()}
    some = {kind: random.Random(0).sample(pairs, min(120, len(pairs))) for kind, pairs in held.items()}

    def look(checkpoint: Checkpoint) -> dict[str, float]:
        judge, found = Judge(checkpoint), {}
        for kind, pairs in some.items():
            names = sorted({pair.captions[0] for pair in held[kind]})
            best = (judge.see(pairs)[1] @ judge.embed(names).T).argmax(dim=1).tolist()
            found[kind] = _share([names[b] == pair.captions[0] for b, pair in zip(best, pairs, strict=True)])
        return found

    return look


def _labelled(judge: Judge, pairs: list[Pair], trained: list[Pair], subject: str) -> dict[str, Any]:
    tokens, embeddings = judge.see(pairs)
    truth = [pair.captions[0] for pair in pairs]
    names = sorted({pair.captions[0] for pair in trained})
    right = [names.index(text) for text in truth]
    scores = embeddings @ judge.embed(names).T
    captions = judge.write(tokens, [""] * len(pairs))
    kinds = [next((q, a) for q, a in pair.questions if q == f"what kind of {subject} is this?") for pair in pairs]
    kind_answers = judge.ask(tokens, [q for q, _ in kinds])
    yes_no = [pair.questions[IS_THIS] for pair in pairs]
    usual: dict[str, Counter[str]] = {}
    for question, answer in (each for pair in trained for each in pair.questions[IS_THIS]):
        usual.setdefault(question, Counter())[answer] += 1
    rows = [row for row, asked in enumerate(yes_no) for _ in asked]
    yes_no_flat = [each for asked in yes_no for each in asked]
    blind = [usual[q].most_common(1)[0][0] if q in usual else "yes" for q, _ in yes_no_flat]
    answers = judge.ask(tokens[rows], [q for q, _ in yes_no_flat])
    per_name = {
        name: round(_share([captions[row] == judge.spell(name) for row, text in enumerate(truth) if text == name]), 4)
        for name in names
        if name in truth
    }
    return {
        "pictures": len(pairs),
        "names": len(names),
        "match_top1": _share([int(best) == r for best, r in zip(scores.argmax(dim=1), right, strict=True)]),
        "caption_exact": _share([c == judge.spell(t) for c, t in zip(captions, truth, strict=True)]),
        "what_kind_exact": _share([g == judge.spell(a) for g, (_, a) in zip(kind_answers, kinds, strict=True)]),
        "yes_no": _share([g == a for g, (_, a) in zip(answers, yes_no_flat, strict=True)]),
        "yes_no_questions": len(yes_no_flat),
        "yes_no_without_the_picture": _share([b == a for b, (_, a) in zip(blind, yes_no_flat, strict=True)]),
        "pixel_neighbour": _share(
            [trained[n].captions[0] == t for n, t in zip(_neighbours(pairs, trained), truth, strict=True)]
        ),
        "pixel_linear_probe": _share([n == r for n, r in zip(_pixel_probe(pairs, trained, names), right, strict=True)]),
        "most_frequent": _share([t == Counter(p.captions[0] for p in trained).most_common(1)[0][0] for t in truth]),
        "chance": 1 / len(names),
        "caption_exact_by_name": per_name,
    }


def _emoji(judge: Judge, pairs: list[Pair], data: Path) -> dict[str, Any]:
    """One vendor's drawing, named among all names, after training on the other vendor's."""
    everything = recipe.emoji_pairs(data)
    trained = [pair for pair in everything if not recipe.held_out_drawing(pair)]
    names = sorted({pair.captions[0] for pair in everything})
    tokens, embeddings = judge.see(pairs)
    forms = ("an emoji of {}", "{}", "an emoji: {}", "a drawing of {}")  # as in training; their mean, as usual
    plain = [name.removeprefix("an emoji of ") for name in names]
    texts = torch.stack([judge.embed([form.format(name) for name in plain]) for form in forms]).mean(dim=0)
    order = (embeddings @ texts.T).argsort(dim=1, descending=True)
    ranked = [[names[i] for i in row[:5].tolist()] for row in order]
    truth = [pair.captions[0] for pair in pairs]
    captions = judge.write(tokens, [""] * len(pairs))
    return {
        "drawings": len(pairs),
        "names": len(names),
        "match_top1": _share([row[0] == t for row, t in zip(ranked, truth, strict=True)]),
        "match_top5": _share([t in row for row, t in zip(ranked, truth, strict=True)]),
        "caption_exact": _share([c == judge.spell(t) for c, t in zip(captions, truth, strict=True)]),
        "pixel_neighbour": _share(
            [trained[n].captions[0] == t for n, t in zip(_neighbours(pairs, trained), truth, strict=True)]
        ),
        "chance": 1 / len(names),
    }


def _photos(judge: Judge, pairs: list[Pair], trained: list[Pair]) -> dict[str, Any]:
    """Captions, and retrieval among the held-out photographs and their descriptions."""
    tokens, embeddings = judge.see(pairs)
    texts = [pair.captions[0] for pair in pairs]
    scores = embeddings @ judge.embed(texts).T
    neighbours = [trained[n].captions[0] for n in _neighbours(pairs, trained)]
    overlap = word_overlap(neighbours, texts)
    every = torch.arange(len(pairs))
    references: list[tuple[str, ...]] = [(text,) for text in texts]
    ciders = {
        name: float(caption_measures(written, references)[1].mean())
        for name, written in (
            ("caption_cider_d", judge.write(tokens, [""] * len(pairs))), ("pixel_neighbour_cider_d", neighbours),
        )
    }  # fmt: skip
    return {
        "pictures": len(pairs),
        **{name: round(value, 4) for name, value in ciders.items()},
        "picture_to_text_r1": _recall(scores, every, 1),
        "picture_to_text_r5": _recall(scores, every, 5),
        "text_to_picture_r1": _recall(scores.T, every, 1),
        "text_to_picture_r5": _recall(scores.T, every, 5),
        "pixel_neighbour_r1": _recall(overlap, every, 1),
        "pixel_neighbour_r5": _recall(overlap, every, 5),
        "chance_r1": 1 / len(pairs),
    }


def _shapes(judge: Judge, pairs: list[Pair], trained: list[Pair]) -> dict[str, Any]:
    everything = [(row, q, a) for row, pair in enumerate(pairs) for q, a in pair.questions]
    asked = random.Random(0).sample(everything, min(QUESTIONS, len(everything)))
    tokens, _ = judge.see(pairs)
    answers = judge.ask(tokens[[row for row, _, _ in asked]], [q for _, q, _ in asked])
    usual: dict[str, Counter[str]] = {}
    for pair in trained:
        for question, answer in pair.questions:
            usual.setdefault(question, Counter())[answer] += 1
    blind = [usual[q].most_common(1)[0][0] if q in usual else "yes" for _, q, _ in asked]
    captioned = [row for row, pair in enumerate(pairs) if pair.captions]
    captions = judge.write(tokens[captioned], [""] * len(captioned))
    right = [answer == given for given, (_, _, answer) in zip(answers, asked, strict=True)]
    open_rows = [row for row, (_, _, answer) in enumerate(asked) if answer not in ("yes", "no")]
    return {
        "questions": len(asked),
        "answers_exact": _share(right),
        "open_questions": len(open_rows),
        "open_answers_exact": _share([right[row] for row in open_rows]),
        "without_the_picture": _share([b == answer for b, (_, _, answer) in zip(blind, asked, strict=True)]),
        "chance": 1 / 13,
        "pictures": len(captioned),
        "caption_exact": _share(
            [c == judge.spell(pairs[row].captions[0]) for c, row in zip(captions, captioned, strict=True)]
        ),
    }


def _pixel_probe(pairs: Sequence[Pair], trained: Sequence[Pair], names: Sequence[str]) -> list[int]:
    """For each picture the name that logistic regression on its 16 x 16 RGB pixels gives it."""
    labels = np.array([names.index(pair.captions[0]) for pair in trained])
    return [int(n) for n in linear_probe(_thumbnails(trained), labels, len(names), _thumbnails(pairs))]


def _neighbours(pairs: Sequence[Pair], trained: Sequence[Pair]) -> list[int]:
    """For each picture the trained picture with the nearest pixels at 16 x 16."""
    wanted, known = _thumbnails(pairs), _thumbnails(trained)
    distance = (known**2).sum(axis=1)[None, :] - 2 * wanted @ known.T
    return [int(n) for n in distance.argmin(axis=1)]


def _thumbnails(pairs: Sequence[Pair]) -> F32:
    """float32[N, 768]."""
    small = [cv2.resize(on_white(pair), (16, 16), interpolation=cv2.INTER_AREA) for pair in pairs]
    return np.stack(small).reshape(len(pairs), -1).astype(np.float32) / np.float32(255)


def word_overlap(given: Sequence[str], texts: Sequence[str]) -> Tensor:
    """float32[len(given), len(texts)]: cosine of word counts, rare words counting more."""
    split = [text.lower().split() for text in [*given, *texts]]
    seen = Counter(word for words in split for word in set(words))
    column = {word: i for i, word in enumerate(sorted(seen))}
    table = torch.zeros(len(split), len(column))
    for row, words in enumerate(split):
        for word in words:
            table[row, column[word]] += float(np.log(1 + len(split) / seen[word]))
    table = torch.nn.functional.normalize(table, dim=1)
    return table[: len(given)] @ table[len(given) :].T


def _recall(scores: Tensor, right: Tensor, k: int) -> float:
    """Share of rows whose right column is among the k best; ties count against it."""
    own = scores.gather(1, right[:, None])
    better = (scores >= own).sum(dim=1) - 1
    return float((better < k).float().mean())


def _share(hits: Sequence[bool]) -> float:
    return round(sum(hits) / max(1, len(hits)), 4)
