"""Cues: a text and when it stands. Their merging, and how SRT, WebVTT and JSON lines write them.

Times are whole milliseconds. `merged` takes scenes in order and gives cues in order; it refuses scenes that are not, so
what it gives is monotone and never overlaps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from mammut_runtime.errors import InputError
from mammut_runtime.strict import Between, Length, from_dict, parse_json
from mammut_runtime.video.sampler import FrameRef

Milliseconds = Annotated[int, Between(0, 10**10)]
Probability = Annotated[float, Between(0, 1)]
SUFFIXES = (".srt", ".vtt", ".jsonl")
VTT_HEAD = "WEBVTT\n\n"
_ARROW = re.compile(r"-{2,}>")
"""What a reader of SRT takes for a line of times; with any number of dashes, or replacing it would leave another."""


@dataclass(frozen=True)
class Cue:
    """A text that holds from start to end; of one scene, or of several alike."""

    start_ms: Milliseconds
    end_ms: Milliseconds
    """Above start_ms; the next cue starts here or later."""
    text: Annotated[str, Length(0, 100_000)]
    confidence: Probability
    """exp of the mean log-probability per token, the end counted: comparable between texts of different length."""
    ids: tuple[int, ...]
    """The text's tokens."""
    token_confidence: tuple[Probability, ...]
    """Of each token, given those before it."""
    frames: tuple[FrameRef, ...]
    """The frames that were encoded."""
    central: int
    """Which of them was described, counted from 0."""
    of_frames: int
    """Frames of the clip between start and end."""
    scenes: int = 1
    """How many scenes were merged."""

    def to_dict(self) -> dict[str, Any]:
        """Times in seconds, and everything else."""
        return {
            "start_s": self.start_ms / 1000,
            "end_s": self.end_ms / 1000,
            "text": self.text,
            "confidence": self.confidence,
            "ids": list(self.ids),
            "token_confidence": list(self.token_confidence),
            "frames": [each.to_dict() for each in self.frames],
            "central": self.central,
            "of_frames": self.of_frames,
            "scenes": self.scenes,
        }


@dataclass(frozen=True)
class MergeRule:
    """When neighbouring scenes become one cue. Raises InputError for values out of range."""

    likeness: float = 0.75
    """Words in both texts / words in any of them, from which on they say the same; above 1 merges nothing."""
    longest_s: float = 60.0
    """No cue gets longer than this by merging: it also bounds what one cue has to list."""

    def __post_init__(self) -> None:
        if not (0 < self.likeness <= 2 and 0 < self.longest_s <= 86_400):
            raise InputError(
                f"expected likeness above 0 and at most 2, longest_s above 0 and at most 86400, got {self.likeness} "
                f"and {self.longest_s}"
            )


def merged(scenes: Iterable[Cue], rule: MergeRule | None = None) -> Iterator[Cue]:
    """Neighbours that say nearly the same as one cue, with the text that the model is surest of.

    Raises InputError for scenes that overlap, go backwards, or have no length.
    """
    rule = rule or MergeRule()
    waiting: Cue | None = None
    for scene in scenes:
        if scene.start_ms >= scene.end_ms or (waiting is not None and scene.start_ms < waiting.end_ms):
            raise InputError(f"scenes are not in order: one from {scene.start_ms} to {scene.end_ms} ms comes too late")
        if waiting is None:
            waiting = scene
        elif _belong_together(waiting, scene, rule):
            waiting = _together(waiting, scene)
        else:
            yield waiting
            waiting = scene
    if waiting is not None:
        yield waiting


def likeness(one: str, other: str) -> float:
    """Words in both texts / words in any of them, 0 to 1; order and case do not count. 1 if neither has words."""
    first, second = (set(re.findall(r"\w+", text.casefold())) for text in (one, other))
    return len(first & second) / len(first | second) if first or second else 1.0


def _belong_together(waiting: Cue, scene: Cue, rule: MergeRule) -> bool:
    short_enough = scene.end_ms - waiting.start_ms <= 1000 * rule.longest_s
    return short_enough and scene.start_ms == waiting.end_ms and likeness(waiting.text, scene.text) >= rule.likeness


def _together(first: Cue, second: Cue) -> Cue:
    better = second if second.confidence > first.confidence else first
    shift = len(first.frames) if better is second else 0
    return replace(
        better,
        start_ms=first.start_ms,
        end_ms=second.end_ms,
        frames=first.frames + second.frames,
        central=better.central + shift,
        of_frames=first.of_frames + second.of_frames,
        scenes=first.scenes + second.scenes,
    )


def srt(number: int, cue: Cue) -> str:
    """A cue as SRT, `number` counted from 1. Empty for a cue without text."""
    text = _one_line(cue.text)
    if not text:
        return ""
    return f"{number}\n{_clock(cue.start_ms, ',')} --> {_clock(cue.end_ms, ',')}\n{_ARROW.sub('->', text)}\n\n"


def vtt(cue: Cue) -> str:
    """A cue as WebVTT; the file begins with VTT_HEAD. Empty for a cue without text."""
    text = _one_line(cue.text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f"{_clock(cue.start_ms, '.')} --> {_clock(cue.end_ms, '.')}\n{text}\n\n" if text else ""


def json_line(cue: Cue, bundle: str) -> str:
    """A cue as a line of JSON, with the bundle's hash."""
    return json.dumps({**cue.to_dict(), "bundle": bundle}, allow_nan=False) + "\n"


def read_cues(path: Path) -> Iterator[Cue]:
    """The cues of a .jsonl file, as `json_line` wrote them; times of frames are whole milliseconds there.

    Raises InputError for a file that cannot be read, or has other lines.
    """
    hint = "expected the .jsonl file that caption-video wrote"
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                value = parse_json(line, where, InputError)
                try:
                    plain = dict(value)  # type: ignore[call-overload]
                    del plain["bundle"]
                    times = {f"{end}_ms": round(1000 * plain.pop(f"{end}_s")) for end in ("start", "end")}
                except (TypeError, ValueError, KeyError, OverflowError) as problem:
                    raise InputError(f"{where}: no cue; {hint}") from problem
                yield from_dict(Cue, times | plain, where, InputError, hint)
    except OSError as problem:
        raise InputError(f"{path}: cannot be read ({problem.strerror or problem}); {hint}") from problem


def _one_line(text: str) -> str:
    """What a subtitle may hold: a blank line would end it, and control characters have no place in it."""
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())


def _clock(milliseconds: int, point: str) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}{point}{rest:03d}"
