"""mammut-run caption-video, ask-video and find-video: a thin shell over this package.

A clip that cannot be used does not stop the rest: it is reported, and the command ends with exit code 2 after all
others are done. What concerns all clips, such as a full disk, ends it at once; what was done is kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from mammut_runtime import console
from mammut_runtime.caption_options import CaptionOptions
from mammut_runtime.commands_inputs import ModelSettings, json_option, model_options, text_list
from mammut_runtime.commands_pictures import generation_options
from mammut_runtime.errors import InputError
from mammut_runtime.video.captions import VideoCaptionOptions
from mammut_runtime.video.cues import MergeRule
from mammut_runtime.video.decode import Clip, ClipHealth, quiet_decoder
from mammut_runtime.video.moments import MomentIndex, update_moments
from mammut_runtime.video.sampler import Budget
from mammut_runtime.video.scenes import SceneRule
from mammut_runtime.video.subtitles import Job, Subtitles, jobs_of, write_subtitles

DEFAULT_INDEX = Path("moments.index")
Function = Callable[..., Any]


def scene_options(command: Function) -> Function:
    """Add the options that say where clips are cut."""
    decorators: tuple[Function, ...] = (
        click.option(
            "--longest-scene", type=float, default=10.0, help="Seconds after which one is divided. Default: 10."
        ),
        click.option("--shortest-scene", type=float, default=0.5, help="Cuts sooner than this are none. Default: 0.5."),
        click.option("--cut-difference", type=float, default=24.0, help="Change that is a cut, 0-255. Default: 24."),
        click.option(
            "--frames", type=int, help="Frames of a scene. Default: what the video graph takes; 3 without one."
        ),
        click.option(
            "--merge-likeness", type=float, default=0.75, help="Share of words in common; 2: never. Default: .75."
        ),
    )
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


@click.command("caption-video")
@click.argument("clips", nargs=-1, required=True, metavar="PATHS...")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder for the subtitles."
)
@click.option("--overwrite", is_flag=True, help="Begin anew and replace what is there.")
@click.option(
    "--ray",
    "ray_address",
    metavar="ADDRESS|local",
    help="Share the clips over a Ray cluster, or over this machine's cores. Each worker takes --threads cores; 0: one.",
)
@scene_options
@generation_options
@click.option("--prompt", help="Text that captions continue. Default: the bundle's own.")
@json_option
@model_options
def caption_video(
    settings: ModelSettings,
    clips: Sequence[str],
    out: Path,
    overwrite: bool,
    ray_address: str | None,
    longest_scene: float,
    shortest_scene: float,
    cut_difference: float,
    frames: int | None,
    merge_likeness: float,
    options: CaptionOptions,
    prompt: str | None,
    as_json: bool,
) -> int:
    """Write subtitles for clips: NAME.srt, NAME.vtt and NAME.jsonl.

    PATHS are files and folders (with their subfolders). A run that was stopped goes on where it was when it is started
    again in the same way, and ends with the same bytes.
    """
    quiet_decoder()
    if options.sampled and options.seed is None:
        raise InputError(
            "sampling without --seed gives other captions each time, so a run could not be resumed; add it"
        )
    whole = VideoCaptionOptions(
        SceneRule(difference=cut_difference, shortest_s=shortest_scene, longest_s=longest_scene),
        frames,
        dataclasses.replace(options, prompt=prompt),
        MergeRule(likeness=merge_likeness),
    )
    settings.existing()  # before all clips are opened for their lengths
    run = ClipRun(jobs_of(clips), as_json)
    with run.progress:
        if ray_address is None:
            _caption_here(run, settings, out, whole, overwrite)
        else:
            _caption_on_cluster(run, ray_address, settings, out, whole, overwrite)
    return run.exit_code()


def _caption_here(
    run: ClipRun, settings: ModelSettings, out: Path, options: VideoCaptionOptions, overwrite: bool
) -> None:
    with settings.load() as model:
        for job in run.jobs:
            at = functools.partial(run.at, job)
            try:
                done = write_subtitles(model, job, out, options, overwrite=overwrite, progress=at)
            except InputError as problem:
                run.failed(job, problem)
            else:
                run.done(job, done)


def _caption_on_cluster(
    run: ClipRun, address: str, settings: ModelSettings, out: Path, options: VideoCaptionOptions, overwrite: bool
) -> None:
    from mammut_runtime.video import cluster

    model = cluster.WorkerModel.of(settings.existing(), settings.engine, settings.preprocess)
    with cluster.connected(address, model.engine.threads, lambda text: console.note(f"note: {text}")) as ray:
        for each in cluster.caption_clips(ray, model, run.jobs, out, options, overwrite):
            if each.written is not None:
                run.done(each.job, each.written)
            elif each.problem is not None:
                run.failed(each.job, each.problem)


class ClipRun:
    """What a run over clips shows: a bar in seconds of video with the time left, results, failures."""

    def __init__(self, jobs: Sequence[Job], as_json: bool) -> None:
        self.jobs, self._as_json = jobs, as_json
        self._length_s = {job: announced_s(job.clip) for job in jobs}
        self.progress = console.Progress("seconds of video", max(1, round(sum(self._length_s.values()))))
        self._done_s = 0.0
        self._over = self._failed = 0

    def at(self, job: Job, time_s: float) -> None:
        """The clip at work has come so far."""
        self._show(min(time_s, self._length_s[job]))

    def done(self, job: Job, written: Subtitles) -> None:
        """Show what was written."""
        health = health_note(written.health)
        if self._as_json:
            self.progress.print(console.json_line(written.to_dict()))
        else:
            kept = f", {written.resumed_scenes} scenes from before" if written.resumed_scenes else ""
            cues = "1 cue" if written.cues == 1 else f"{written.cues} cues"
            text = f"{job.clip}: {cues} in {written.duration_s:.1f} s{kept} -> {written.files[0]}"
            self.progress.print(console.printable(text))
        if health:
            self.progress.clear()
            console.note(f"note: {job.clip}: {health}")
        self._end(job)

    def failed(self, job: Job, problem: InputError) -> None:
        """Report a clip that cannot be used."""
        self._failed += 1
        self.progress.clear()
        console.note(f"error: {console.error_line(problem)}")
        if self._as_json:
            self.progress.print(console.json_line({"clip": str(job.clip), "error": console.error_line(problem)}))
        self._end(job)

    def exit_code(self) -> int:
        """0, or 2 after a note if clips failed."""
        if self._failed:
            console.note(f"{self._failed} of {len(self.jobs)} clips could not be used")
        return console.EXIT_USAGE if self._failed else 0

    def _end(self, job: Job) -> None:
        self._over += 1
        self._done_s += self._length_s[job]
        self._show(0.0)

    def _show(self, within_s: float) -> None:
        number = min(self._over + 1, len(self.jobs))
        self.progress(round(self._done_s + within_s), note=f"clip {number}/{len(self.jobs)}")


@click.command("ask-video")
@click.argument("clip", type=click.Path(path_type=Path))
@click.argument("question")
@click.option("--from", "start_s", type=float, default=0.0, help="Seconds from the start. Default: 0.")
@click.option("--to", "end_s", type=float, help="Seconds from the start. Default: the end.")
@click.option("--frames", type=int, help="Frames. Default: what the video graph takes; 8 without one.")
@click.option("--candidates", help="Possible answers, separated by commas, or @FILE with one a line.")
@generation_options
@json_option
@model_options
def ask_video(
    settings: ModelSettings,
    clip: Path,
    question: str,
    start_s: float,
    end_s: float | None,
    frames: int | None,
    candidates: str | None,
    options: CaptionOptions,
    as_json: bool,
) -> None:
    """Answer a question about a clip, or about a part of it."""
    quiet_decoder()
    choices = None if candidates is None else text_list(candidates, "--candidates")
    if choices is not None and options != CaptionOptions():
        raise InputError("the options of generation are for free answers; leave them out with --candidates")
    with settings.load() as model:
        seen = model.encode_video(clip, start_s, end_s, None if frames is None else Budget(frames))
        answer = seen.ask(question, choices, options if choices is None else None)
    if seen.health is not None and (problem := health_note(seen.health)):
        console.note(f"note: {clip}: {problem}")
    if as_json:
        sampling = {"way": seen.way, **seen.sampling.to_dict()}
        console.echo_json({"clip": str(clip), **answer.to_dict(), "sampling": sampling})
        return
    share = f" ({answer.candidates[0].probability:.2f})" if answer.candidates else ""
    click.echo(console.printable(f"{answer.text}{share}"))
    times = ", ".join(f"{each.time_s:.1f}" for each in seen.sampling.frames)
    central = seen.sampling.frames[seen.sampling.central]
    how = "seen together" if seen.way == "video" else f"described: {central.time_s:.1f} s"
    console.note(f"note: frames at {times} s; {how}")


@click.command("find-video")
@click.argument("text")
@click.argument("clips", nargs=-1, required=True, metavar="PATHS...")
@click.option(
    "--index",
    type=click.Path(path_type=Path, dir_okay=False),
    default=DEFAULT_INDEX,
    help=f"Where the moments are kept; only new and changed clips are looked at. Default: {DEFAULT_INDEX}.",
)
@click.option("--rebuild", is_flag=True, help="Begin the index anew, also where it was made with another bundle.")
@click.option("-k", "count", type=click.IntRange(1, 10_000), default=10, help="Moments to find. Default: 10.")
@json_option
@model_options
def find_video(
    settings: ModelSettings, text: str, clips: Sequence[str], index: Path, rebuild: bool, count: int, as_json: bool
) -> int:
    """Find moments of clips by words: score, time and clip of each, best first.

    PATHS are files and folders (with their subfolders).
    """
    quiet_decoder()
    paths = [job.clip for job in jobs_of(clips)]
    with settings.load() as model:
        model.embed_texts([text])  # a text that cannot be used is an error now, not after hours of indexing
        with console.Progress("clips", len(paths)) as progress:
            update = update_moments(model, paths, index, rebuild=rebuild, progress=progress)
        hits = MomentIndex.open(index, model).search(text, count, paths)
    for path, health in update.damaged:
        console.note(f"note: {path}: {health_note(health)}")
    for each in update.unusable:
        console.note(f"error: {each.reason if str(each.path) in each.reason else f'{each.path}: {each.reason}'}")
    for hit in hits:
        if as_json:
            console.echo_json(hit.to_dict())
        else:
            click.echo(console.printable(f"{hit.score:.4f} {hit.start_s:8.1f} - {hit.end_s:.1f} s  {hit.path}"))
    return console.EXIT_USAGE if update.unusable else 0


def announced_s(path: Path) -> float:
    """How long a clip says it is, seconds; 1 where it says nothing, or cannot be opened."""
    try:
        with Clip.open(path) as clip:
            return clip.info.duration_s or 1.0
    except InputError:
        return 1.0


def health_note(health: ClipHealth) -> str:
    """What is wrong with a clip, for people; empty if nothing is."""
    return f"damaged, and used as far as it goes: {health.summary()}" if not health.whole else ""
