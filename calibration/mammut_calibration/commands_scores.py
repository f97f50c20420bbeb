"""`mammut-calibrate scores`: a thin shell over scores.py, alarms.py, platt.py and scores_page.py."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from mammut_calibration.alarms import AlarmLimit, Footage
from mammut_calibration.scores import NameResult, calibrate_names, calibrated, gather, gather_positives, warnings
from mammut_calibration.scores_page import write_scores_page
from mammut_runtime import console
from mammut_runtime.detection.commands_vocabulary import Wanted, vocabulary_options
from mammut_runtime.detection.vocabulary import Vocabulary
from mammut_runtime.engines import EngineOptions
from mammut_runtime.errors import InputError
from mammut_runtime.model import Model
from mammut_runtime.video.decode import quiet_decoder


@click.command("mammut-calibrate scores", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path))
@vocabulary_options
@click.option("--vocabulary", "vocabulary_file", type=click.Path(path_type=Path), help="Names kept in a file.")
@click.option(
    "--background",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="Clips and pictures WITHOUT the things, such as a day of the camera; may be repeated.",
)
@click.option(
    "--positives",
    type=click.Path(path_type=Path),
    help="Pictures of the things: one folder for each name, called like it.",
)
@click.option(
    "--false-alarms", type=float, required=True, metavar="N", help="Most false alarms in an hour, for each name."
)
@click.option(
    "--fps", type=float, default=1.0, show_default=True, help="Frames that the camera's program looks at in a second."
)
@click.option(
    "--quiet", type=float, default=10.0, show_default=True, help="Seconds after an alarm in which there is no other."
)
@click.option("--confidence", type=float, default=0.95, show_default=True, help="How sure the rate is to hold.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("vocabulary.json"),
    show_default=True,
    help="The vocabulary with what was measured.",
)
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="The page. Default: OUT with .html.")
@click.option("--overwrite", is_flag=True, help="Replace a vocabulary and a page that are there.")
@click.option("--threads", type=click.IntRange(0), default=0, show_default=True, help="0 takes the physical cores.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def scores(
    *,
    bundle: Path,
    wanted: Wanted,
    vocabulary_file: Path | None,
    background: tuple[Path, ...],
    positives: Path | None,
    false_alarms: float,
    fps: float,
    quiet: float,
    confidence: float,
    out: Path,
    plot: Path | None,
    overwrite: bool,
    threads: int,
    as_json: bool,
) -> None:
    """Choose thresholds by how many false alarms an hour are bearable.

    BUNDLE has a detector. What is measured is kept in a vocabulary, and holds for this bundle and these names together:
    names compete for scores.
    """
    quiet_decoder()
    if (vocabulary_file is None) == wanted.nothing:
        raise InputError("give either --names (or --exemplar), or --vocabulary")
    wanted.check_has_names()
    page = plot or out.with_suffix(".html")
    check_places(out, page, overwrite)
    if not 0 < fps < 1e6:
        raise InputError(f"--fps: expected frames a second above 0, got {fps}")
    limit = AlarmLimit(false_alarms, quiet, confidence)
    with Model.load(bundle, EngineOptions(threads=threads)) as model:
        words = wanted.make(model) if vocabulary_file is None else Vocabulary.load(vocabulary_file)
        with console.Progress("files") as progress:

            def note(line: str) -> None:
                progress.clear()
                console.note(line)

            seen = gather(model, words, background, fps, note, progress.advance)
            shown = gather_positives(model, words, positives, note, progress.advance) if positives else {}
    results, looked = calibrate_names(words, seen, shown, limit, fps)
    description = _description(words, limit, looked, fps, len(seen.scores))
    said = list(warnings(results, looked, limit))
    calibrated(words, results, {**description, **_measured(results)}).save(out, overwrite=overwrite)
    write_scores_page(page, description, said, results, seen.scores, shown)
    for line in said:
        console.note(f"note: {line}")
    _report(results, description, out, page, as_json, looked)


def check_places(out: Path, page: Path, overwrite: bool) -> None:
    """Before hours of footage are looked at: that the results can be written, and replace nothing. Makes the folders.

    Raises InputError.
    """
    if out.resolve() == page.resolve():
        raise InputError(f"{out}: is the vocabulary and the page at once; give the page another name with --plot")
    for path, option in ((out, "--out"), (page, "--plot")):
        if path.exists() and not overwrite:
            raise InputError(f"{path}: exists already; give another name with {option}, or --overwrite")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as problem:
            raise InputError(f"{path}: cannot be written ({problem.strerror}); give another place") from problem
    if out.exists() and page.exists() and out.samefile(page):
        raise InputError(f"{out}: is the same file as {page}; give the page another name with --plot")


def _description(words: Vocabulary, limit: AlarmLimit, looked: Footage, fps: float, frames: int) -> dict[str, str]:
    return {
        "asked": f"at most {limit.per_hour:g} false alarms an hour for each name, at {limit.confidence:.0%} confidence",
        "alarm": f"a frame that has the name; no other for {limit.quiet_s:g} s",
        "footage": f"{frames} frames, {looked.hours:.3f} h at {fps:g} frames a second",
        "names": f"{len(words)}, and {len(words.negatives)} negatives",
        "model": f"{words.model}, {words.bundle}",
    }


def _measured(results: list[NameResult]) -> dict[str, str]:
    return {
        f"name {each.name}"[:200]: f"{each.chosen.alarms} alarms, at most {each.chosen.limit_per_hour:.3g} an hour"
        + ("" if each.chosen.shown else " (not what was asked)")
        + ("" if each.found is None else f"; finds {each.found:.1%} of {each.positives} pictures")
        for each in results
    }


def _report(
    results: list[NameResult], description: dict[str, str], out: Path, page: Path, as_json: bool, looked: Footage
) -> None:
    if as_json:
        value: dict[str, Any] = {"vocabulary": str(out), "plot": str(page), "hours": looked.hours, **description}
        console.echo_json({**value, "names": [each.to_dict() for each in results]})
        return
    for each in results:
        found = "" if each.found is None else f", finds {each.found:.1%} of {each.positives} pictures"
        text = (
            f"{each.name}: threshold {each.calibration.threshold:.3f}, {each.chosen.alarms} alarms seen, "
            f"at most {each.chosen.limit_per_hour:.3g} an hour{found}"
        )
        click.echo(console.printable(text))
    click.echo(console.printable(f"vocabulary: {out}"))
    click.echo(console.printable(f"plot:       {page}"))
