"""mammut-run search: an index of a folder of pictures, and questions to it."""

from __future__ import annotations

from pathlib import Path

import click

from mammut_runtime import console
from mammut_runtime.commands_inputs import ModelSettings, json_option, model_options
from mammut_runtime.errors import InputError
from mammut_runtime.search import PictureIndex, update_index


@click.group()
def search() -> None:
    """Find pictures in a folder."""


@search.command("index")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("index", type=click.Path(path_type=Path))
@click.option("--rebuild", is_flag=True, help="Begin anew, also where the index was made with another bundle.")
@click.option("--batch-size", type=click.IntRange(1, 256), default=8, help="Pictures computed together. Default: 8.")
@json_option
@model_options
def make_index(
    settings: ModelSettings, folder: Path, index: Path, rebuild: bool, batch_size: int, as_json: bool
) -> int:
    """Make or update an index of a folder.

    The file INDEX gets the pictures in FOLDER and its subfolders. Only new and changed pictures are looked at. It may
    be interrupted at any time: what is done is kept.
    """
    with settings.load() as model, console.Progress("pictures") as progress:
        update = update_index(model, folder, index, progress=progress, batch_size=batch_size, rebuild=rebuild)
    for each in update.skipped:
        console.note(f"error: {each.reason if each.path in each.reason else f'{each.path}: {each.reason}'}")
    if as_json:
        console.echo_json({"index": str(index), **update.to_dict()})
    else:
        click.echo(
            f"{index}: {update.pictures} pictures ({update.added} added, {update.changed} changed, "
            f"{update.removed} removed, {len(update.skipped)} cannot be used)"
        )
    return console.EXIT_USAGE if update.skipped else 0


@search.command("query")
@click.argument("index", type=click.Path(path_type=Path))
@click.option("--text", help="Words to find pictures for.")
@click.option("--picture", type=click.Path(path_type=Path), help="A picture to find similar ones for.")
@click.option("-k", "count", type=click.IntRange(1), default=10, help="Pictures to find. Default: 10.")
@json_option
@model_options
def query_index(
    settings: ModelSettings, index: Path, text: str | None, picture: Path | None, count: int, as_json: bool
) -> None:
    """Find pictures by words or by another picture.

    Prints cosine and path of each, best first.
    """
    if (text is None) == (picture is None):
        raise InputError("give either --text or --picture")
    with settings.load() as model:
        opened = PictureIndex.open(index, model)
        hits = opened.search(text if text is not None else model.encode(picture or ""), count)
        for hit in hits:
            path = opened.folder / hit.path
            if as_json:
                console.echo_json({"path": str(path), "score": hit.score})
            else:
                click.echo(console.printable(f"{hit.score:.4f} {path}"))
