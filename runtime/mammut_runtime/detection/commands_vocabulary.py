"""mammut-run vocabulary, and the options that say what to look for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mammut_runtime import console
from mammut_runtime.commands_inputs import ModelSettings, json_option, model_options, text_list
from mammut_runtime.detection.exemplars import Exemplar, parse_exemplar
from mammut_runtime.detection.vocabulary import Vocabulary
from mammut_runtime.errors import InputError
from mammut_runtime.model import Model

Function = Callable[..., Any]


@dataclass(frozen=True)
class Wanted:
    """What to look for, as the command line says it."""

    names: tuple[str, ...]
    negatives: tuple[str, ...]
    exemplars: tuple[Exemplar, ...]
    templates: tuple[str, ...] | None
    context: bool = True

    @property
    def nothing(self) -> bool:
        return not (self.names or self.exemplars)

    def check_has_names(self) -> None:
        """Raises InputError for options that belong to names, where there are none beside those of a file."""
        given = {"--negatives": self.negatives, "--templates": self.templates, "--no-context": not self.context}
        for option, value in given.items():
            if self.nothing and value:
                raise InputError(f"{option} go with --names; make them a part of the vocabulary's file")

    def make(self, model: Model) -> Vocabulary:
        """The vocabulary, its words embedded. Raises InputError."""
        with console.Progress("names") as progress:
            return model.vocabulary(
                self.names,
                negatives=self.negatives,
                exemplars=self.exemplars,
                templates=self.templates,
                progress=progress,
                context=self.context,
            )


def vocabulary_options(command: Function) -> Function:
    """Add --names, --negatives, --exemplar and --templates; the command gets them as `wanted`."""

    @click.option("--names", help="Names to look for, separated by commas, or @FILE with one a line.")
    @click.option("--negatives", help="Names that compete with them and are not reported, in the same form.")
    @click.option(
        "--exemplar",
        "exemplars",
        multiple=True,
        metavar="NAME=FILE[:x0,y0,x1,y1]",
        help="A picture of a thing (and where it is in it, pixels) in place of its name; may be repeated.",
    )
    @click.option("--templates", help="Prompts for the names, each with {} for the name. Default: the bundle's own.")
    @click.option(
        "--no-context", is_flag=True, help="Compare with these names only, not also with some of the bundle's own."
    )
    @functools.wraps(command)
    def with_wanted(
        *args: Any,
        names: str | None,
        negatives: str | None,
        exemplars: Sequence[str],
        templates: str | None,
        no_context: bool,
        **rest: Any,
    ) -> Any:
        wanted = Wanted(
            tuple(text_list(names, "--names")) if names is not None else (),
            tuple(text_list(negatives, "--negatives")) if negatives is not None else (),
            tuple(parse_exemplar(each) for each in exemplars),
            tuple(text_list(templates, "--templates")) if templates is not None else None,
            not no_context,
        )
        return command(*args, wanted=wanted, **rest)

    return with_wanted


@click.group()
def vocabulary() -> None:
    """Names to detect, kept in a file."""


@vocabulary.command("make")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@vocabulary_options
@click.option("--overwrite", is_flag=True, help="Replace the file if there is one.")
@model_options
def make_vocabulary(settings: ModelSettings, file: Path, wanted: Wanted, overwrite: bool) -> None:
    """Embed names once and keep them in FILE."""
    if wanted.nothing:
        raise InputError("nothing to look for; give --names or --exemplar")
    if file.exists() and not overwrite:
        raise InputError(f"{file}: exists already; give another name, or --overwrite")
    with settings.load() as model:
        made = wanted.make(model)
    made.save(file, overwrite=overwrite)
    for notice in made.notices:
        console.note(f"note: {notice}")
    click.echo(console.printable(f"{file}: {len(made)} names, {len(made.negatives)} negatives"))


@vocabulary.command("combine")
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("files", nargs=-1, required=True, metavar="FILES...", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace OUT if there is one.")
def combine_vocabularies(out: Path, files: Sequence[Path], overwrite: bool) -> None:
    """Put several files into one, OUT; of a name in two, the later file's."""
    both = functools.reduce(lambda first, second: first | second, map(Vocabulary.load, files))
    both.save(out, overwrite=overwrite)
    click.echo(console.printable(f"{out}: {len(both)} names, {len(both.negatives)} negatives"))


@vocabulary.command("show")
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def show_vocabulary(file: Path, as_json: bool) -> None:
    """Print the names of FILE, with what was measured for them."""
    loaded = Vocabulary.load(file)
    for each in loaded.entries:
        if each.kind == "context" and not as_json:
            continue
        if as_json:
            calibration = each.calibration
            console.echo_json(
                {
                    "name": each.name,
                    "kind": each.kind,
                    "negative": each.negative,
                    "novel": each.novel,
                    "temperature": calibration.temperature,
                    "bias": calibration.bias,
                    "threshold": calibration.threshold,
                }
            )
            continue
        threshold = each.calibration.threshold
        parts = [
            "negative" if each.negative else "",
            each.kind if each.kind != "words" else "",
            f"threshold {threshold:.3f}" if threshold is not None else "",
        ]
        described = ", ".join(part for part in parts if part)
        click.echo(console.printable(f"{each.name}{f' ({described})' if described else ''}"))
    if not as_json:
        for key, text in loaded.notes.items():
            console.note(f"{key}: {text}")
