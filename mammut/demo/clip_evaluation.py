"""How well a checkpoint tells what happens in clips it has not seen: `mammut-train clips-eval`.

Answers are greedy and right only where they are the very words. Each kind of question stands beside what is reached
without looking (the answer most frequent in training to the same question), and is asked under several views of the
same clips: all that the model takes, without its tubes, and the middle frame as a still picture. Intervals are over
resampled photographs: clips on one photograph are drawn together.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mammut.checkpoint import Checkpoint
from mammut.config import VideoConfig
from mammut.data.clip_scenes import CLIP_QUESTION_KINDS, ClipScene
from mammut.demo.clips import HeldOutClip, clip_strip, held_out_clips, training_questions, write_sheet
from mammut.demo.evaluate import Judge
from mammut.evaluation.bootstrap import Bootstrap, Interval, mean_of
from mammut.model import Mammut, with_video
from mammut_runtime.errors import InputError

SETS = {"trained drawings": False, "new drawings": True}
"""Held-out photographs behind drawings that were trained on, and behind those that were not."""
VIEWS = ("full", "no tubes", "middle frame")
CLIPS = 900
"""Judged for each figure."""
TRAINING_CLIPS = 2000
"""Whose answers are counted for the baseline."""
CHUNK = 60
"""Clips held at once: 27 MB of pixels at the demo's size."""
CAPTION = "caption"
"""Stands beside the kinds of questions: the caption in the very words."""

View = Callable[[Tensor], Tensor]
"""float32[B, F, 3, S, S], normalised, to tokens float32[B, N, W]."""


@dataclass(frozen=True)
class Viewer:
    """Who is asked, and what of a clip it is shown."""

    checkpoint: Checkpoint
    view: View


@dataclass
class Answers:
    """What was asked of the clips and what was given, in one order."""

    kinds: list[str] = field(default_factory=list)
    photos: list[int] = field(default_factory=list)
    right: dict[str, list[bool]] = field(default_factory=dict)
    """By view, and "without looking"."""


def evaluate_clips(
    checkpoint: Checkpoint,
    data: Path,
    clips: int = CLIPS,
    views: Sequence[str] = VIEWS,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Figures as shares from 0 to 1, by set ("trained drawings", "new drawings"), kind of question, and view.

    Raises:
        InputError: the model takes no clips, or DATA is not the data folder.
    """
    viewers = {name: Viewer(checkpoint, view_of(checkpoint.model, name)) for name in views}
    usual = usual_answers(training_questions(data, TRAINING_CLIPS))
    video = checkpoint.model.config.video
    frames = video.frames if video is not None else 0
    sets = {}
    for name, new in SETS.items():
        size = checkpoint.preprocess.size
        held = held_out_clips(data, clips, frames=frames, size=size, new_drawings=new)
        sets[name] = figures(answered(held, viewers, usual, advance))
    return {
        "checkpoint_sha256": checkpoint.sha256,
        "clips": clips,
        "frames": frames,
        "views": list(views),
        "sets": sets,
    }


def view_of(model: Mammut, name: str) -> View:
    """One of VIEWS of what a model sees of a clip. InputError where it takes no clips."""
    video = model.config.video
    if video is None:
        raise InputError(f"the model {model.config.name!r} takes no clips; fine-tune it on clips first")
    if name == "middle frame":
        return lambda frames: model.encode_image(frames[:, frames.shape[1] // 2])[0]
    seeing = without_tubes(model, video) if name == "no tubes" else model
    return lambda frames: seeing.encode_video(frames)[0]


def without_tubes(model: Mammut, video: VideoConfig) -> Mammut:
    """The model with its patches of a few frames only; positions and gate are those it learned."""
    patch = model.config.vision.patch_size
    patches = dataclasses.replace(video, tubes=tuple(tube for tube in video.tubes if tube.is_patches(patch)))
    fewer = with_video(model, patches)
    if fewer.tubes is not None and model.tubes is not None:
        fewer.tubes.gate = model.tubes.gate
    return fewer


@torch.no_grad()
def answered(
    clips: Iterable[HeldOutClip],
    viewers: Mapping[str, Viewer],
    usual: dict[tuple[str, str], str],
    advance: Callable[[], None] = lambda: None,
) -> Answers:
    """Have everything about every clip asked, and it captioned, by each viewer. All have one tokenizer.

    Args:
        usual: see usual_answers.
        advance: called after each clip.
    """
    judges = {name: Judge(viewer.checkpoint) for name, viewer in viewers.items()}
    spell = next(iter(judges.values())).spell
    answers = Answers(right={name: [] for name in ("without looking", *viewers)})
    for chunk in _chunks(clips):
        scenes = [each.scene for each in chunk]
        asked = [(row, *each) for row, scene in enumerate(scenes) for each in scene.questions]
        answers.kinds += [kind for _, kind, _, _ in asked] + [CAPTION] * len(chunk)
        answers.photos += [chunk[row].photo for row, *_ in asked] + [each.photo for each in chunk]
        truth = [spell(answer) for *_, answer in asked] + [spell(scene.captions[0]) for scene in scenes]
        blind = [spell(usual_answer(usual, scenes[row], kind, question)) for row, kind, question, _ in asked]
        blind += [""] * len(chunk)  # a caption names things: nothing is usual
        answers.right["without looking"] += [a == b for a, b in zip(blind, truth, strict=True)]
        for name, viewer in viewers.items():
            tokens = viewer.view(normalised(scenes, viewer.checkpoint))
            given = judges[name].ask(tokens[[row for row, *_ in asked]], [question for _, _, question, _ in asked])
            given += judges[name].write(tokens, [viewer.checkpoint.prompts["caption"]] * len(chunk))
            answers.right[name] += [a == b for a, b in zip(given, truth, strict=True)]
        for _ in chunk:
            advance()
    return answers


def figures(answers: Answers, bootstrap: Bootstrap = Bootstrap()) -> dict[str, Any]:  # noqa: B008 - frozen
    """By kind of question: how many, and for each view the share that is right with its interval."""
    kinds, groups, found = np.array(answers.kinds), groups_of(answers), {}
    for kind in (*CLIP_QUESTION_KINDS, CAPTION):
        counted = kinds == kind
        row: dict[str, Any] = {"asked": int(counted.sum())}
        for view, right in answers.right.items():
            values = np.array(right, np.float64)
            interval = bootstrap.interval(mean_of(values, counted), len(values), groups)
            row[view] = cell(float(values[counted].mean()) if counted.any() else float("nan"), interval)
        found[kind] = row
    return found


def groups_of(answers: Answers) -> npt.NDArray[np.int64]:
    """int64[N]: which of them are about one photograph."""
    return np.unique(np.array(answers.photos), return_inverse=True)[1].astype(np.int64)


def cell(share: float, interval: Interval) -> dict[str, float]:
    """A figure as it is written."""
    return {"right": round(share, 4), "low": round(interval.low, 4), "high": round(interval.high, 4)}


def usual_answers(clips: Iterable[ClipScene]) -> dict[tuple[str, str], str]:
    """The most frequent answer to each question, by its kind and its form: names are put as {0}, {1}, in the order in
    which the question has them, in both."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for clip in clips:
        for kind, question, answer in clip.questions:
            form, names = _form(question, clip)
            said = f"{{{names.index(answer)}}}" if answer in names else answer
            counts.setdefault((kind, form), Counter())[said] += 1
    return {key: sorted(found.items(), key=lambda each: (-each[1], each[0]))[0][0] for key, found in counts.items()}


def usual_answer(usual: dict[tuple[str, str], str], clip: ClipScene, kind: str, question: str) -> str:
    """What is answered without looking; "" to a question of a form that is not known."""
    form, names = _form(question, clip)
    return usual.get((kind, form), "").format(*names)


def _form(question: str, clip: ClipScene) -> tuple[str, list[str]]:
    """The question with {0}, {1} for names of things, and those names."""
    found: list[str] = []
    form = question
    for name in sorted({thing.name for thing in clip.things}, key=len, reverse=True):
        if f"the {name} " in question or f"the {name}?" in question:
            found.append(name)
    found.sort(key=lambda name: question.find(f"the {name}"))
    for index, name in enumerate(found):
        form = form.replace(f"the {name}", f"the {{{index}}}")
    return form, found


def normalised(scenes: Sequence[ClipScene], checkpoint: Checkpoint) -> Tensor:
    """float32[B, F, 3, S, S] as the model takes them."""
    rule = checkpoint.preprocess
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (rule.mean, rule.std))
    pixels = torch.from_numpy(np.stack([scene.frames for scene in scenes])).permute(0, 1, 4, 2, 3)
    return (pixels.float() / 255 - mean) / std


@torch.no_grad()
def draw_answers(checkpoint: Checkpoint, data: Path, out: Path, clips: int = 12, seed: int = 2) -> None:
    """A sheet of held-out clips with the truth and, behind an arrow, what the model says. Errors as write_sheet's and
    view_of's."""
    judge, see = Judge(checkpoint), view_of(checkpoint.model, "full")
    video = checkpoint.model.config.video
    frames = video.frames if video is not None else 0
    strips, credits = [], []
    for held in held_out_clips(data, clips, frames=frames, size=checkpoint.preprocess.size, seed=seed):
        questions = [question for _, question, _ in held.scene.questions]
        tokens = see(normalised([held.scene], checkpoint))
        said = [
            *judge.write(tokens, [checkpoint.prompts["caption"]]),
            *judge.ask(tokens[[0] * len(questions)], questions),
        ]
        strips.append(clip_strip(held.scene, said))
        credits.append(held.credit)
    write_sheet(out, strips, credits)


def table(found: dict[str, Any]) -> Iterator[str]:
    """The figures for people, a line each."""
    for name, rows in found["sets"].items():
        views = [view for view in next(iter(rows.values())) if view != "asked"]
        yield f"{name}: {found['clips']:,} clips of {found['frames']} frames, percent right [95 % interval]"
        cells = [["", "asked", *views]]
        for kind, row in rows.items():
            cells.append([kind, str(row["asked"]), *(_shown(row[view]) for view in views)])
        yield from _aligned(cells)
        yield ""


def _shown(cell: dict[str, float]) -> str:
    return f"{100 * cell['right']:.1f} [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"


def _aligned(rows: list[list[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for first, *rest in rows:
        yield "  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))])


def _chunks(clips: Iterable[HeldOutClip]) -> Iterator[list[HeldOutClip]]:
    rest = iter(clips)
    while chunk := list(islice(rest, CHUNK)):
        yield chunk
