"""The clips of `make demo`: captioned and asked, with subtitles and contact sheets (OUT/clips).

Where the bundle has a detector, also things found by their names, with boxes drawn (OUT/boxes).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import click
import moving_drawings
from contact_sheet import contact_sheet
from moving_drawings import SHOT_S, Shot

from mammut_runtime import Model, Picture, console
from mammut_runtime.annotate import write_picture
from mammut_runtime.detection.clips import DrawnClip
from mammut_runtime.detection.commands import line_of
from mammut_runtime.detection.drawing import draw_detections
from mammut_runtime.video.captions import VideoCaptionOptions
from mammut_runtime.video.cues import Cue, MergeRule, read_cues
from mammut_runtime.video.decode import quiet_decoder
from mammut_runtime.video.subtitles import Job, write_subtitles

FILMED = Path(__file__).parents[2].parent / "shared" / "data" / "videos"
"""Real clips; not part of a clone."""
FILMED_NAMES = ("bikes.mp4", "bottle-detection.mp4")
LOOKED_FOR = ("red heart", "star", "sun", "evergreen tree", "cloud")
"""Unless the user names something else."""
DETECTIONS_FPS = 5.0


def show_clips(model: Model, out: Path) -> Path:
    """Caption and ask the drawn clip, and caption filmed ones where there are any. Gives the drawn one's file."""
    quiet_decoder()
    folder = out / "clips"
    folder.mkdir(parents=True, exist_ok=True)
    seen = "" if model.watches else "; this bundle has no video graph, so it sees what is there, not how it moves"
    click.echo(f"A clip drawn by runtime/examples/moving_drawings.py (nothing is filmed){seen}:")
    drawn = moving_drawings.write_clip(folder)
    shots = moving_drawings.shots()
    cues = captioned(model, drawn, folder, MergeRule(likeness=2))
    right = sum(_says(cues, number, shot) for number, shot in enumerate(shots))
    click.echo(f"  right: {right} of {len(shots)} captions, {ask(model, drawn, shots)} of {len(shots)} answers")
    for path in (FILMED / name for name in FILMED_NAMES):
        if path.is_file():
            click.echo(
                f"\nA filmed clip, {path.name} of ../shared/data/videos; the model learned from nothing like it:"
            )
            captioned(model, path, folder, MergeRule())
    return drawn


def captioned(model: Model, clip: Path, folder: Path, merge: MergeRule) -> list[Cue]:
    """Write subtitles and a contact sheet of a clip, and print the cues."""
    options = VideoCaptionOptions(merge=merge)
    files = write_subtitles(model, Job(clip, clip.stem), folder, options, overwrite=True).files
    cues = list(read_cues(files[-1]))
    write_picture(folder / f"{clip.stem}.png", contact_sheet(clip, cues))
    for cue in cues:
        times = f"{cue.start_ms / 1000:.1f} - {cue.end_ms / 1000:.1f} s"
        click.echo(console.printable(f"  {times:<16}{cue.text} ({cue.confidence:.2f})"))
    return cues


def ask(model: Model, clip: Path, shots: Sequence[Shot]) -> int:
    """Ask about each shot and print the answers; how many are right."""
    right = 0
    for number, shot in enumerate(shots):
        start_s, end_s = number * SHOT_S, (number + 1) * SHOT_S
        answer = model.encode_video(clip, start_s, end_s).ask(shot.question).text
        right += answer == shot.answer
        click.echo(console.printable(f"  {f'{start_s} - {end_s} s':<16}{shot.question} {answer}"))
    return right


def find_in_pictures(model: Model, pictures: Sequence[tuple[str, Picture]], names: Sequence[str], out: Path) -> None:
    """Find things by their names in pictures with names of their own; print them, and write OUT/boxes/NAME.png."""
    (out / "boxes").mkdir(parents=True, exist_ok=True)
    vocabulary = model.vocabulary(names)
    for name, picture in pictures:
        found = model.detect(picture, vocabulary)
        click.echo(console.printable(f"  {name}: {line_of(found.detections)}"))
        write_picture(out / "boxes" / f"{file_stem(name)}.png", draw_detections(picture.rgb(), found.detections))


def find_in_clip(model: Model, clip: Path, names: Sequence[str], out: Path) -> None:
    """The same in a clip, some frames a second, with a number for each thing that it keeps: OUT/boxes/CLIP.mp4."""
    (out / "boxes").mkdir(parents=True, exist_ok=True)
    with DrawnClip(out / "boxes", clip.stem, DETECTIONS_FPS) as drawn:
        for number, frame in enumerate(model.detect_video(clip, names, DETECTIONS_FPS)):
            drawn.add(frame)
            if number % round(DETECTIONS_FPS * SHOT_S) == round(DETECTIONS_FPS):
                click.echo(console.printable(f"  {clip.name} at {frame.time_s:.1f} s: {line_of(frame.things)}"))


def file_stem(name: str) -> str:
    """The name as a file's, without an ending."""
    return re.sub("[^a-zA-Z0-9]+", "-", name).strip("-")


def _says(cues: Sequence[Cue], number: int, shot: Shot) -> bool:
    """Whether the cue that stands in the middle of a shot has all its words."""
    middle_ms = 1000 * (number + 0.5) * SHOT_S
    text = next((cue.text for cue in cues if cue.start_ms <= middle_ms < cue.end_ms), "")
    return all(word in text for word in shot.words)
