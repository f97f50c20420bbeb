"""What `make demo` shows: captions, answers and matches for sample pictures, printed and written onto the pictures; a
clip with its subtitles and a contact sheet; and, where the bundle has a detector, things found by their names.

    python runtime/examples/demo.py --bundle build/demo-bundle --out build/demo
    python runtime/examples/demo.py --bundle build/demo-bundle --out build/demo --pictures FOLDER    your own
    python runtime/examples/demo.py --bundle build/demo-bundle --out build/demo --names "star,sun"   to look for

Without --pictures it uses drawings made by drawings.py and, where the project's data folder lies beside the checkout,
photographs from it that the model was not trained on, and filmed clips. It says which is which, and how many it got
right. The clips are in demo_clips.py.
"""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import moving_drawings
from demo_clips import LOOKED_FOR, file_stem, find_in_clip, find_in_pictures, show_clips
from drawings import DRAWINGS

from mammut_runtime import InputError, Model, Picture, console, read_picture
from mammut_runtime.annotate import annotate, write_picture
from mammut_runtime.commands_inputs import picture_paths, text_list

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "pairs"
"""The data that the demo model was trained on; not part of a clone."""
QUESTION = "what is this?"
SHAPE_QUESTION = "what shape is in the image?"
SHAPES = ("circle", "rectangle", "triangle")
FLOWERS = {"daisy": "daisy", "dandelion": "dandelion", "roses": "rose", "sunflowers": "sunflower", "tulips": "tulip"}
CLOTHING = {"Dress": "dress", "Shoes": "shoes", "Pants": "pants", "Hat": "hat", "T-Shirt": "t shirt"}
"""Label in the data → how the model names it."""
COLUMNS = (20, 34, 46, 24)
"""Characters of the printed table's columns."""


@dataclass(frozen=True)
class Sample:
    """A picture to show, and what we know about it."""

    name: str
    picture: Picture
    truth: str | None
    """What it shows; None if only the user knows."""
    question: str
    candidates: tuple[str, ...] | None
    """Answers to choose from; None: the model answers freely."""


@click.command("demo")
@click.option("--bundle", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="For the annotated pictures.")
@click.option("--pictures", type=click.Path(path_type=Path), help="Your own: a folder or a file.")
@click.option("--names", help="What to look for, separated by commas, where the bundle has a detector.")
def demo(bundle: Path, out: Path, pictures: Path | None, names: str | None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    wanted = LOOKED_FOR if names is None else text_list(names, "--names")
    with Model.load(bundle) as model:
        if pictures is not None:
            show_own(model, pictures, wanted, out)
        else:
            show_samples(model, out)
            click.echo()
            clip = show_clips(model, out)
            click.echo()
            if model.detects:
                click.echo(f"Looked for by name ({', '.join(wanted)}):")
                write_picture(out / "drawings" / "group.png", moving_drawings.group())
                find_in_pictures(model, [("group", read_picture(out / "drawings" / "group.png"))], wanted, out)
                find_in_clip(model, clip, wanted, out)
                click.echo()
            click.echo("Try your own photographs:  make demo PICTURES=FOLDER")
        detects = model.detects
    click.echo(f"Annotated pictures:        {out}")
    if pictures is None:
        click.echo(f"Subtitles, contact sheets: {out / 'clips'}")
    if detects:
        click.echo(f"Pictures with boxes:       {out / 'boxes'}")


def show_own(model: Model, place: Path, names: Sequence[str], out: Path) -> None:
    """The user's pictures."""
    click.echo(f"Your pictures from {place}:")
    samples = own_pictures(place)
    show(model, samples, (*DRAWINGS, *FLOWERS.values(), *CLOTHING.values()), out)
    if model.detects:
        click.echo(f"\nLooked for by name ({', '.join(names)}):")
        find_in_pictures(model, [(each.name, each.picture) for each in samples], names, out)


def show_samples(model: Model, out: Path) -> None:
    """Drawings, and photographs where there are any."""
    shapes, others = split(drawings(out))
    click.echo("Plain shapes drawn by runtime/examples/drawings.py (no photographs):")
    show(model, shapes, tuple(DRAWINGS), out)
    click.echo("\nEmoji-like things drawn there; the demo model knows few of these and mixes them up:")
    show(model, others, tuple(DRAWINGS), out)
    photos = list(held_out_photos())
    if photos:
        click.echo("\nPhotographs that the model was not trained on (validation split of ../shared/data/pairs):")
        show(model, photos, (*FLOWERS.values(), *CLOTHING.values()), out)


def show(model: Model, samples: Sequence[Sample], classes: Sequence[str], out: Path) -> None:
    """Caption, answer and match each sample; print a line each, and how many were right where we know."""
    classifier = model.classifier(classes)
    right = {"captions": 0, "answers": 0, "matches": 0}
    known = 0
    click.echo(table_line("picture", "caption", "question, answer", "best match"))
    for sample in samples:
        seen = model.encode(sample.picture)
        caption = seen.caption().text
        answer = seen.ask(sample.question, sample.candidates).text
        best = seen.match(classifier).matches[0]
        asked = f"{sample.question} {answer}"
        match = f"{best.text} {best.probability:.2f}"
        click.echo(table_line(sample.name, caption, asked, match))
        lines = [caption, asked, f"best match: {match}"]
        write_picture(out / f"{file_stem(sample.name)}.png", annotate(sample.picture.rgb(), lines))
        if sample.truth is not None:
            known += 1
            right["captions"] += bool(re.search(rf"\b{re.escape(sample.truth)}\b", caption))
            right["answers"] += answer == (sample.truth.split()[-1] if sample.candidates else sample.truth)
            right["matches"] += best.text == sample.truth
    if known:
        counts = ", ".join(f"{count} of {known} {kind}" for kind, count in right.items())
        click.echo(f"  right: {counts}")


def table_line(*cells: str) -> str:
    """Cells in columns; what is too long is cut (the annotated pictures have it whole)."""
    short = (
        text if len(text) < width else text[: width - 4] + "..." for text, width in zip(cells, COLUMNS, strict=True)
    )
    return (
        "  "
        + console.printable("".join(f"{text:<{width}}" for text, width in zip(short, COLUMNS, strict=True))).rstrip()
    )


def split(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Shapes, and the rest."""
    shapes = [sample for sample in samples if sample.question == SHAPE_QUESTION]
    return shapes, [sample for sample in samples if sample not in shapes]


def drawings(out: Path) -> list[Sample]:
    """The drawn pictures, which are also left in OUT/drawings as files."""
    folder = out / "drawings"
    folder.mkdir(exist_ok=True)
    samples = []
    for name, draw in DRAWINGS.items():
        path = folder / f"{name.replace(' ', '-')}.png"
        write_picture(path, draw())
        shape = name.split()[-1] in SHAPES
        question = SHAPE_QUESTION if shape else QUESTION
        samples.append(Sample(name, read_picture(path), name, question, SHAPES if shape else None))
    return samples


def held_out_photos() -> Iterator[Sample]:
    """One photograph of each flower and of some clothes from the validation split; none where the data is absent."""
    for kind, names in (("flowers", FLOWERS), ("clothing", CLOTHING)):
        wanted = dict(names)
        for path in sorted(DATA.glob(f"{kind}-*.tar")):
            yield from _photos(path, wanted, "flower" if kind == "flowers" else "clothing")


def _photos(path: Path, wanted: dict[str, str], kind: str) -> Iterator[Sample]:
    with tarfile.open(path) as tar:
        members = {member.name: member for member in tar.getmembers()}
        for name, member in members.items():
            if not name.endswith(".json") or not wanted:
                continue
            facts = json.load(tar.extractfile(member) or io.BytesIO(b"{}"))
            picture = tar.extractfile(members.get(name.removesuffix("json") + "jpg", member))
            if facts.get("split") == "val" and facts.get("label") in wanted and picture is not None:
                truth = wanted.pop(facts["label"])
                question = f"what kind of {kind} is this?"
                yield Sample(f"photo of {truth}", read_picture(picture.read(), name=name), truth, question, None)


def own_pictures(place: Path) -> list[Sample]:
    """The user's; those that cannot be used are reported and left out."""
    samples = []
    for path in picture_paths([str(place)]):
        try:
            samples.append(Sample(path.stem, read_picture(path), None, QUESTION, None))
        except InputError as problem:
            console.note(f"error: {problem}")
    return samples


if __name__ == "__main__":
    sys.exit(console.run(demo))
