"""`mammut-eval`: a thin shell over evaluate.py. Which data goes to which task is decided in sets.py."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mammut.evaluation.bootstrap import Bootstrap
from mammut.evaluation.corruptions import CORRUPTIONS
from mammut.evaluation.evaluate import Evaluation, Report, evaluate
from mammut.evaluation.examples import Problems
from mammut.evaluation.outcome import TaskOptions
from mammut.evaluation.page import write_page
from mammut.evaluation.predictor import Predictor, PredictorOptions, open_predictor
from mammut.evaluation.report import lines, write_json
from mammut.evaluation.results_predictor import ResultsPredictor
from mammut.evaluation.sets import NEEDS, TASKS, DataChoice, read_names, read_novel, read_templates, task_of
from mammut_runtime import console
from mammut_runtime.errors import InputError

_FILE = click.Path(path_type=Path)


def _options(*groups: tuple[Any, ...]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def apply(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return apply


_DATA = (
    click.option("--task", type=click.Choice(TASKS), required=True),
    click.option("--images", "places", type=_FILE, multiple=True,
                 help="All but detect: WebDataset tars; a folder with a folder for each class; or, with --annotations, "
                      "the folder of their pictures or clips. Several times for several."),
    click.option("--annotations", type=_FILE, multiple=True,
                 help="COCO, Karpathy or Flickr30K captions; VQAv2 (both files), MSRVTT-QA, MSVD-QA, easy-VQA."),
    click.option("--boxes", metavar="FORM:FILE:IMAGES",
                 help="detect: coco: or lvis:, the file of boxes, the folder of its pictures."),
    click.option("--results", type=_FILE, multiple=True,
                 help="detect: a COCO results file in a model's place; :IMAGES is then only for the page."),
    click.option("--write-results", type=_FILE, help="detect: write what MODEL finds there, in COCO's results form."),
    click.option("--novel", type=_FILE, help="detect: a file of names, one a line, to report apart. LVIS: the rare."),
    click.option("--split", help='Of tars and Karpathy\'s files; "all" for every one. Default: test for Karpathy\'s.'),
    click.option("--train", type=_FILE, multiple=True, help="few-shot: pictures to learn from. Default: --images."),
    click.option("--train-split", default="train", show_default=True, help="few-shot: the split of --train, if any."),
    click.option("--limit", type=click.IntRange(1), help="Judge so many pictures, drawn by --seed."),
    click.option("--partial", is_flag=True, help="Go on without what is missing or damaged; the report names it."),
)  # fmt: skip
_WORDING = (
    click.option("--templates", default="imagenet", show_default=True,
                 help="Of names of classes: imagenet (80), model (its own), or a file with one a line."),
    click.option("--names", type=_FILE, help='JSON {"label": "name in prompts"}.'),
    click.option("--shots", default="1,2,4,8,16", show_default=True, help="few-shot: pictures of each class."),
    click.option("--draws", type=click.IntRange(1), default=5, show_default=True, help="few-shot: random choices."),
    click.option("--beams", type=click.IntRange(1, 64), default=1, show_default=True),
    click.option("--max-tokens", type=click.IntRange(1), default=30, show_default=True),
)  # fmt: skip
_RUN = (
    click.option(
        "--corrupt",
        multiple=True,
        type=click.Choice(["all", *CORRUPTIONS]),
        help="Also under corrupted pictures, 5 severities each.",
    ),
    click.option("--resamples", type=click.IntRange(100), default=1000, show_default=True),
    click.option("--confidence", type=click.FloatRange(50, 99.9), default=95.0, show_default=True, help="Percent."),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
    click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True),
    click.option("--threads", type=click.IntRange(0), default=0, help="0: all cores."),
    click.option("--device", default="cpu", show_default=True, help="Of a checkpoint: cpu or cuda."),
    click.option("--json", "json_file", type=_FILE, help="Write every figure there."),
    click.option("--html", "html_file", type=_FILE, help="Write a page with hits and misses there."),
)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", required=False)
@click.argument("other", required=False)
@_options(_DATA, _WORDING, _RUN)
def cli(model: str | None, other: str | None, json_file: Path | None, html_file: Path | None, **given: Any) -> None:
    """Judge MODEL, a bundle or a checkpoint, and compare OTHER with it.

    Both take what mammut-run and mammut-export take: a bundle's folder, "demo", a checkpoint's folder, hf-hub:ORG/NAME.
    """
    for path in (json_file, html_file, given["write_results"]):  # found out now, not after hours
        if path is not None and not path.absolute().parent.is_dir():
            raise InputError(f"{path}: expected a file in a folder that is there; make {path.parent} first")
    specs = [spec for spec in (model, other) if spec is not None]
    results: tuple[Path, ...] = given["results"]
    if not specs and not results:
        raise click.UsageError("Missing argument 'MODEL'.")
    if len(specs) + len(results) > 2:
        raise InputError(f"expected at most two to compare, got {len(specs)} models and {len(results)} --results")
    if results and (given["task"] != "detect" or given["corrupt"]):
        raise InputError("--results: judged by --task detect as they are, without --corrupt; leave it out")
    if given["write_results"] is not None and (given["task"] != "detect" or len(specs) != 1 or results):
        raise InputError("--write-results: takes what one model finds by --task detect; leave out the other")
    report = _evaluated(specs, given)
    for line in lines(report):
        click.echo(console.printable(line))
    if json_file:
        write_json(json_file, report)
        console.note(f"figures: {json_file}")
    if html_file:
        write_page(html_file, report)
        console.note(f"page: {html_file}")


def _evaluated(specs: list[str], given: dict[str, Any]) -> Report:
    name: str = given["task"]
    problems = Problems(partial=given["partial"])
    choice = DataChoice(given["places"], given["annotations"], given["split"], given["train"], given["train_split"],
                        given["limit"], given["seed"], given["boxes"])  # fmt: skip
    keys = ("batch_size", "threads", "beams", "max_tokens", "device")
    options = PredictorOptions(**{key: given[key] for key in keys})
    with contextlib.ExitStack() as stack:
        data, task = task_of(name, choice, problems)
        predictors: list[Predictor] = []
        for spec in specs:
            predictor = open_predictor(spec, NEEDS[name], options)
            stack.callback(predictor.close)
            predictors.append(predictor)
        predictors += [ResultsPredictor(path) for path in given["results"]]
        workspace = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mammut-eval-")))
        progress = stack.enter_context(console.Progress(name))
        comparing = console.Progress("comparing")
        stack.callback(comparing.clear)
        task_options = TaskOptions(
            workspace=workspace,
            problems=problems,
            batch_size=given["batch_size"],
            advance=progress.advance,
            ranked=comparing,
            templates=read_templates(given["templates"]),
            names=read_names(given["names"]),
            novel=read_novel(given["novel"]),
            write_results=given["write_results"],
            shots=_shots(given["shots"]),
            draws=given["draws"],
            seed=given["seed"],
        )
        kinds = tuple(CORRUPTIONS) if "all" in given["corrupt"] else tuple(dict.fromkeys(given["corrupt"]))
        bootstrap = Bootstrap(given["resamples"], given["confidence"] / 100, given["seed"])
        return evaluate(Evaluation(name, data, task, bootstrap, kinds, _settings(given)), predictors, task_options)


def _settings(given: dict[str, Any]) -> dict[str, str]:
    """What the figures depend on besides models and data, as texts."""
    words = ["beams", "max_tokens"]
    of_task = {
        "classify": ["templates", "names"], "few-shot": ["train", "train_split", "shots", "draws"],
        "caption": words, "vqa": words, "detect": ["boxes", "results", "novel", "names"],
    }  # fmt: skip
    keys = [
        "places",
        "annotations",
        "split",
        "limit",
        "seed",
        "resamples",
        "confidence",
        *of_task.get(given["task"], []),
    ]
    names = {"places": "images"}
    return {names.get(key, key): _text(given[key]) for key in keys if given[key] not in (None, ())}


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(str(each) for each in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shots(text: str) -> tuple[int, ...]:
    try:
        shots = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        shots = ()
    if not shots or shots[0] < 1:
        raise InputError(f"--shots: expected numbers of at least 1, such as 1,2,4, got {text!r}")
    return shots


def main() -> int:
    """The entry point of `mammut-eval`."""
    # FFmpeg writes to the terminal what it thinks of damaged clips; we name them ourselves. Read when it is first used.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    return console.run(cli)
