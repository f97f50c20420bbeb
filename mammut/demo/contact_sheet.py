"""A contact sheet of held-out pictures, drawn by chance, with what the model says: for people to look at."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from mammut.checkpoint import Checkpoint
from mammut.data.pairs import Pair
from mammut.demo import recipe
from mammut.demo.evaluate import Judge, on_white
from mammut_runtime.errors import InputError

COUNTS = {"flowers": 12, "clothing": 16, "emoji": 8, "photos": 6, "shapes": 6}
"""48 pictures."""
COLUMNS = 8
PICTURE, CELL_WIDTH, CELL_HEIGHT = 132, 200, 218
"""Pixels."""
QUESTION = {
    "flowers": "what kind of flower is this?",
    "clothing": "what kind of clothing is this?",
    "emoji": "what is this?",
    "photos": "is this a drawing?",
    "shapes": "what color is the shape?",
}


def draw_sheet(checkpoint: Checkpoint, data: Path, out: Path, seed: int = 0) -> None:
    """Write the sheet as a JPEG, and beside it OUT.md with whom to credit for each picture.

    Under each picture: the truth (T), the caption (C), the answer to a question (A) and the best match (M); green where
    it is right, red where not, grey where right or wrong cannot be told by equality.
    """
    if out.suffix != ".jpg":
        raise InputError(f"{out}: expected a name that ends in .jpg")
    judge, held = Judge(checkpoint), recipe.held_out(data)
    rng = random.Random(seed)
    cells, credits = [], []
    for kind, count in COUNTS.items():
        pairs = rng.sample([pair for pair in held[kind] if pair.captions], count)
        names = sorted({pair.captions[0] for pair in held[kind] if pair.captions})
        cells += [_cell(pair, lines) for pair, lines in zip(pairs, _lines(judge, kind, pairs, names), strict=True)]
        credits += [f"- {pair.name}: {pair.credit or 'easy-VQA, MIT'}" for pair in pairs]
    rows = [np.hstack(cells[start : start + COLUMNS]) for start in range(0, len(cells), COLUMNS)]
    out.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(out), np.vstack(rows)[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
    header = f"Pictures of {out.name}, row by row, and whom to credit:"
    out.with_suffix(".md").write_text("\n".join([header, "", *credits, ""]), encoding="utf-8")


def _lines(judge: Judge, kind: str, pairs: list[Pair], names: list[str]) -> list[list[tuple[str, bool | None]]]:
    """For each picture four texts with whether they are right."""
    tokens, embeddings = judge.see(pairs)
    best = (embeddings @ judge.embed(names).T).argmax(dim=1).tolist()
    captions = judge.write(tokens, [""] * len(pairs))
    answers = judge.ask(tokens, [QUESTION[kind]] * len(pairs))
    rows = []
    for pair, match, caption, answer in zip(pairs, best, captions, answers, strict=True):
        truth = pair.captions[0]
        told = dict(pair.questions).get(QUESTION[kind])
        rows.append([
            (f"T {truth}", None),
            (f"C {caption}", None if kind == "photos" else caption == judge.spell(truth)),
            (f"A {answer}", None if told is None else answer == judge.spell(told)),
            (f"M {names[match]}", names[match] == truth),
        ])  # fmt: skip
    return rows


def _cell(pair: Pair, lines: list[tuple[str, bool | None]]) -> npt.NDArray[np.uint8]:
    """uint8[CELL_HEIGHT, CELL_WIDTH, 3], RGB."""
    cell: npt.NDArray[np.uint8] = np.full((CELL_HEIGHT, CELL_WIDTH, 3), 255, np.uint8)
    picture = on_white(pair)
    scale = PICTURE / max(picture.shape[:2])
    height, width = (max(1, round(side * scale)) for side in picture.shape[:2])
    left = (CELL_WIDTH - width) // 2
    cell[4 : 4 + height, left : left + width] = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    for number, (text, right) in enumerate(lines):
        colour: Any = (90, 90, 90) if right is None else (0, 120, 0) if right else (190, 0, 0)
        shown = text if len(text) <= 33 else text[:31] + ".."
        place = (4, PICTURE + 22 + 18 * number)
        cv2.putText(cell, shown.encode("ascii", "replace").decode(), place, cv2.FONT_HERSHEY_SIMPLEX, 0.36, colour, 1,
                    cv2.LINE_AA)  # fmt: skip
    return cell
