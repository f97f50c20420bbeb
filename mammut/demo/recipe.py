"""What the shipped demo model is trained and judged on: photographs, drawings and plain shapes, and their wording.

Reads the data folder that is not part of a clone (see the model card for its sources and licences). The splits are
fixed here: clothing by sender and flowers as the data says, photographs by key, and for every sixth emoji name the
drawing of one vendor (blobmoji), so that "recognise one vendor's drawing from the other's" can be measured.

Captions and matching texts of photographs are people's own words and the questions about shapes come with their data;
everything else is worded here from labels by templates, and so is synthetic text about real pictures.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import random
import re
import tarfile
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mammut.bpe_training import train_tokenizer
from mammut.checkpoint import load_checkpoint
from mammut.config import VideoConfig
from mammut.data.pairs import Pair, read_tars, square
from mammut.demo.scene_names import SCENE_NAMES
from mammut.presets import demo, demo_video
from mammut.training.recipes import small_set
from mammut.training.run_config import RunConfig, Source, StageOptions
from mammut_runtime.errors import InputError
from mammut_runtime.tokenizer import Tokenizer

FLOWERS = {
    "daisy": "a daisy",
    "dandelion": "a dandelion",
    "roses": "a rose",
    "sunflowers": "a sunflower",
    "tulips": "a tulip",
}
CLOTHING = {
    "Blazer": "a blazer",
    "Blouse": "a blouse",
    "Body": "a baby bodysuit",
    "Dress": "a dress",
    "Hat": "a hat",
    "Hoodie": "a hoodie",
    "Longsleeve": "a long sleeved top",
    "Outwear": "a jacket",
    "Pants": "pants",
    "Polo": "a polo shirt",
    "Shirt": "a shirt",
    "Shoes": "shoes",
    "Shorts": "shorts",
    "Skirt": "a skirt",
    "T-Shirt": "a t shirt",
    "Top": "a sleeveless top",
    "Undershirt": "an undershirt",
}
"""The data's labels and how the demo says them."""

PROMPTS = {"caption": "", "ask": "question: {question} answer:", "zero_shot": "{}"}


VOCABULARY = 2048
TWIN = 0.02
"""Two photographs that differ by less (root mean square of a thumbnail, 0 to 1) are the same, cut or stored anew."""
STEPS = 2866
"""Of the first stage, of 96 pictures each."""
SCENE_STEPS = 1900
"""Of the second, of 192 pictures each."""
REHEARSAL_STEPS = 650
"""Of the third, of 192 pictures."""
MOTION_STEPS = 2150
"""Of the first stage for clips, of 96 clips."""
EVERYTHING_STEPS = 6500
"""Of the second, of 192 pictures or clips."""
DETECTOR_STEPS = 1926
"""Of 16 pictures, see mammut/detection."""


STEPS_OF = {
    "pictures": STEPS,
    "scenes": SCENE_STEPS,
    "rehearsal": REHEARSAL_STEPS,
    "motion": MOTION_STEPS,
    "everything": EVERYTHING_STEPS,
    "detector": DETECTOR_STEPS,
}


@dataclass(frozen=True)
class Training:
    """One kind of training pictures."""

    pairs: Sequence[Pair]
    weight: float
    """Of the batch, about; the five sum to 1."""
    kind: Literal["photo", "drawing", "plain"] = "photo"
    even: bool = False
    """Rare captions are made more frequent."""


def demo_run(data: Path, out: Path, steps: int = STEPS) -> RunConfig:
    """The run that made the shipped checkpoint, on the files that it writes: OUT/data and OUT/tokenizer.json.

    Files that are there already are taken as they are. Errors as training_pairs'.
    """
    folder, tokenizer = out / "data", out / "tokenizer.json"
    sets = training_pairs(data)
    if not tokenizer.is_file():
        write_whole(tokenizer, train_tokenizer(tokenizer_texts(sets), VOCABULARY))
    sources = []
    for name, given in sets.items():
        path = folder / f"{name}.tar"
        if not path.is_file():
            write_whole(path, packed(given))
        sources.append(Source((str(path),), given.kind, given.weight))
    model = demo(Tokenizer.from_bytes(tokenizer.read_bytes()).vocab_size)
    config = small_set(model, sources, steps, tokenizer=str(tokenizer))
    return dataclasses.replace(config, prompts=PROMPTS)


def stage_run(stage: str, data: Path, out: Path, steps: int | None = None) -> RunConfig:
    """A stage of the demo's training but for the detector's; each starts from OUT/STAGE/checkpoint of the one before.

    Errors as training_pairs' and load_checkpoint's.
    """
    if stage == "pictures":
        return demo_run(data, out, steps or STEPS)
    if stage == "scenes":
        return scenes_run(data, out, str(out / "pictures" / "checkpoint"), steps or SCENE_STEPS)
    if stage == "rehearsal":
        return rehearsal_run(data, out, str(out / "scenes" / "checkpoint"), steps or REHEARSAL_STEPS)
    if stage == "motion":
        return motion_run(data, out, str(out / "rehearsal" / "checkpoint"), steps or MOTION_STEPS)
    return everything_run(data, out, str(out / "motion" / "checkpoint"), steps or EVERYTHING_STEPS)


def scenes_run(data: Path, out: Path, start: str, steps: int = SCENE_STEPS) -> RunConfig:
    """The second stage: composed scenes beside everything else, at the full picture size, from the first stage's
    checkpoint. A batch is of one kind, so that a drawing is told from other drawings. Errors as training_pairs'."""
    first = demo_run(data, out)
    folder = out / "data"
    path = folder / "scene-drawings.tar"
    if not path.is_file():
        write_whole(path, packed(Training(scene_pairs(data), 1.0)))
    weights = {"flowers": 0.06, "clothing": 0.11, "emoji": 0.38, "photos": 0.05, "shapes": 0.12}
    shares = {"shapes": 0.6}
    sources = [
        Source((str(folder / f"{name}.tar"),), kind.kind, weights[name], shares.get(name))
        for name, kind in zip(weights, first.data.sources, strict=True)
    ]
    photos = (str(folder / "photos.tar"), str(folder / "flowers.tar"))
    sources.append(Source(photos, "scene", 0.28, 0.5, (str(path),)))
    found = load_checkpoint(start)
    size = found.model.config.vision.image_size
    return dataclasses.replace(
        first,
        model=found.model.config,
        start=start,
        tokenizer="",
        initial="plain",
        data=dataclasses.replace(first.data, sources=tuple(sources), mixing="batches"),
        stages=(StageOptions(steps, size, 1e-3, 100, "cosine", False),),
        batch_size=192,
    )


def rehearsal_run(data: Path, out: Path, start: str, steps: int = REHEARSAL_STEPS) -> RunConfig:
    """The third stage: everything once more at a falling rate, with more questions. Errors as training_pairs'."""
    before = scenes_run(data, out, start, steps)
    weights = {"flowers": 0.1, "clothing": 0.2, "emoji": 0.24, "photos": 0.04, "shapes": 0.2, "scenes": 0.22}
    shares = {"shapes": 0.9, "scenes": 0.65}
    sources = tuple(
        dataclasses.replace(source, weight=weight, question_share=shares.get(name))
        for source, (name, weight) in zip(before.data.sources, weights.items(), strict=True)
    )
    return dataclasses.replace(
        before,
        data=dataclasses.replace(before.data, sources=sources),
        stages=(dataclasses.replace(before.stages[0], learning_rate=7e-4, warmup_steps=min(50, steps // 2)),),
    )


def motion_run(
    data: Path, out: Path, start: str, steps: int = MOTION_STEPS, video: VideoConfig | None = None
) -> RunConfig:
    """With tubes: nothing but clips of moving emoji, until the tubes tell how things move.

    Captions and questions only. video: other tubes than the demo's. Errors as training_pairs'.
    """
    before = everything_run(data, out, start, steps, video)
    moving = dataclasses.replace(before.data.sources[-1], question_share=0.85)
    return dataclasses.replace(
        before,
        data=dataclasses.replace(before.data, sources=(moving,)),
        objective=dataclasses.replace(before.objective, contrastive_weight=0.0),
        stages=(dataclasses.replace(before.stages[0], learning_rate=1e-3, schedule="constant"),),
        batch_size=96,
    )


def everything_run(
    data: Path, out: Path, start: str, steps: int = EVERYTHING_STEPS, video: VideoConfig | None = None
) -> RunConfig:
    """After motion_run: clips and pictures in turn, at a falling rate. Arguments as motion_run's."""
    before = rehearsal_run(data, out, start, steps)
    pictures = before.data.sources
    moving = dataclasses.replace(pictures[-1], kind="moving", weight=1 / 3, question_share=0.75)
    return dataclasses.replace(
        before,
        model=dataclasses.replace(before.model, video=video or demo_video()),
        data=dataclasses.replace(before.data, sources=(*pictures, moving)),
        stages=(dataclasses.replace(before.stages[0], learning_rate=1e-3),),
    )


def box_specs(data: Path, split: str) -> list[str]:
    """The sets with boxes, as `mammut-train detect --boxes` takes them."""
    folders = (data / "boxes" / name for name in ("blood-cells", "playing-cards"))
    return [f"coco:{folder / split}.json:{folder / split}" for folder in folders]


def scene_pairs(data: Path) -> list[Pair]:
    """The drawings that scenes are made of, each called by its bare name. Errors as training_pairs'."""
    drawings = (pair for pair in emoji_pairs(data) if not held_out_drawing(pair) and pair.matches[1] in SCENE_NAMES)
    return [dataclasses.replace(pair, captions=(pair.matches[1],)) for pair in drawings]


def training_pairs(data: Path) -> dict[str, Training]:
    """Everything the demo is trained on, about 12,500 pictures.

    Raises:
        InputError: the folder is not the data folder (names what is missing).
    """
    check_folder(data)
    return {
        "flowers": Training(labelled_pairs(data, "flowers", "train"), 0.27, even=True),
        "clothing": Training(labelled_pairs(data, "clothing", "train"), 0.45, even=True),
        "emoji": Training([pair for pair in emoji_pairs(data) if not held_out_drawing(pair)], 0.13, "drawing"),
        "photos": Training(photo_pairs(data, "train"), 0.06),
        "shapes": Training(evenly_asked(shape_pairs(data / "easy-vqa" / "train")), 0.09, "plain"),
    }


def packed(given: Training) -> bytes:
    """A WebDataset tar in random order, as shards should be; the same pairs give the same bytes."""
    shares = evened(given.pairs) if given.even else [1.0] * len(given.pairs)
    order = random.Random(0).sample(list(zip(given.pairs, shares, strict=True)), len(given.pairs))
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for number, (pair, share) in enumerate(order):
            row = {
                "captions": pair.captions, "matches": pair.matches, "questions": pair.questions, "share": share,
                "name": pair.name, "credit": pair.credit,
            }  # fmt: skip
            suffix = "png" if pair.data.startswith(b"\x89PNG") else "jpg"
            for ending, content in ((suffix, pair.data), ("json", json.dumps(row).encode())):
                member = tarfile.TarInfo(f"{number:06d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def write_whole(path: Path, content: bytes) -> None:
    """A file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)


def held_out(data: Path) -> dict[str, list[Pair]]:
    """Pictures that are never trained on, with the caption each should get. Errors as training_pairs'.

    "clothing", "flowers" and "photos" are photographs; "emoji" are one vendor's drawings of names whose other drawing
    was trained on; "shapes" are easy-VQA's test pictures.
    """
    check_folder(data)
    return {
        "clothing": labelled_pairs(data, "clothing", "val"),
        "flowers": without_twins(labelled_pairs(data, "flowers", "val"), labelled_pairs(data, "flowers", "train")),
        "photos": held_out_photos(data),
        "emoji": [pair for pair in emoji_pairs(data) if held_out_drawing(pair)],
        "shapes": shape_pairs(data / "easy-vqa" / "test"),
    }


def check_folder(data: Path) -> None:
    """Raise InputError unless `data` holds the sets the demo needs."""
    wanted = (
        "pairs/clothing-000.tar",
        "pairs/flowers-000.tar",
        "pairs/photos-000.tar",
        "emoji/names.tsv",
        "easy-vqa/train",
    )
    missing = [name for name in wanted if not (data / name).exists()]
    if missing:
        raise InputError(f"{data}: expected the data folder of the demo recipe, but it has no {', '.join(missing)}")


def tokenizer_texts(sets: Mapping[str, Training]) -> list[str]:
    """All texts the tokenizer is trained on, once a sample."""
    texts: list[str] = []
    for given in sets.values():
        for pair in given.pairs:
            texts += pair.captions
            texts += [PROMPTS["ask"].format(question=q) + " " + a for q, a in pair.questions[:3]]
    return texts


def held_out_drawing(pair: Pair) -> bool:
    """Whether this is a blobmoji drawing of the sixth of the names kept for judging, chosen by a hash of the name."""
    return pair.name.startswith("blobmoji") and _hash(pair.captions[0]) % 6 == 0


def emoji_pairs(data: Path) -> list[Pair]:
    """Both vendors' drawings with their Unicode names."""
    rows = _emoji_rows(data / "emoji" / "names.tsv")
    drawn_twice = {row["file"] for row in rows if row["vendor"] == "blobmoji"} & {
        row["file"] for row in rows if row["vendor"] == "noto"
    }
    pairs = []
    for row in rows:
        if row["vendor"] == "blobmoji" and row["file"] not in drawn_twice:
            continue  # its name could not be learned from the other vendor
        path = data / "emoji" / row["vendor"] / row["file"]
        name = row["name"].replace("“", "").replace("”", "")
        questions = (("what is this?", name), ("what does the emoji show?", name), ("is this a drawing?", "yes"))
        forms = (f"an emoji of {name}", name, f"an emoji: {name}", f"a drawing of {name}")
        pairs.append(
            Pair(f"{row['vendor']}/{row['file']}", path.read_bytes(), forms[:1], forms, questions, "Apache-2.0")
        )
    return pairs


def _emoji_rows(path: Path) -> list[dict[str, Any]]:
    """InputError where a line has no vendor, file or name."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        columns: list[str] = list(reader.fieldnames or ())
        rows: list[dict[str, Any]] = list(reader)
    missing = [key for key in ("vendor", "file", "name") if key not in columns]
    if missing:
        raise InputError(f"{path}: line 1: expected a column {' and '.join(missing)}, got {', '.join(columns)}")
    for number, row in enumerate(rows, 2):
        for key in ("vendor", "file", "name"):
            _text(row, key, f"{path}: line {number}")
    return rows


def _text(row: Mapping[str, Any], key: str, name: str, empty: bool = False) -> str:
    """A field of the record `name`. InputError where it is missing or no text; blank only where it may be `empty`."""
    found = row.get(key)
    if isinstance(found, str) and (empty or found.strip()):
        return found
    got = "nothing" if key not in row else repr(found)[:40]
    raise InputError(f"{name}: {key}: expected a text, got {got}")


def photo_pairs(data: Path, split: str) -> list[Pair]:
    """Photographs with a person's description; a tenth of the keys is "val"."""

    def to_pair(name: str, picture: bytes, row: dict[str, Any]) -> Pair | None:
        if (_hash(name) % 10 == 0) != (split == "val"):
            return None
        caption = plain_caption(_text(row, "caption", name))
        questions = (("is this a drawing?", "no"), ("what is this?", "a photo"))
        credit = f"{_text(row, 'credit', name, empty=True)} CC BY 4.0".strip()
        return Pair(name, picture, (caption,), (caption,), questions, credit)

    return list(read_tars(sorted((data / "pairs").glob("photos-*.tar")), to_pair))


def held_out_photos(data: Path) -> list[Pair]:
    """The photographs of "val" that are not in training under another key, as textbooks share some."""
    return without_twins(photo_pairs(data, "val"), photo_pairs(data, "train"))


def without_twins(pairs: Sequence[Pair], trained: Sequence[Pair]) -> list[Pair]:
    """Those whose 16 x 16 thumbnail is not within TWIN of a trained picture's."""
    known = _thumbnails(trained)
    apart = (np.sqrt(((known - own) ** 2).mean(axis=1)).min(initial=np.inf) for own in _thumbnails(pairs))
    return [pair for pair, distance in zip(pairs, apart, strict=True) if distance > TWIN]


def _thumbnails(pairs: Sequence[Pair]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """float32[N, 768], 0 to 1."""
    found = [square(pair.data, 16, alpha=False).ravel() for pair in pairs]
    return np.array(found, np.float32).reshape(-1, 16 * 16 * 3) / np.float32(255)


def plain_caption(caption: str) -> str:
    """The first sentence without "A photo shows": what is in the picture, in the space the model has."""
    first = re.split(r"(?<=[a-z\)”])\.\s", caption.strip())[0].rstrip(".[] ")
    opening = (
        r"(?i)^(this is |here is )?(an?|the|this) (color |black and white )?(photo|photograph|image|picture)(graph)? "
    )
    return re.sub(opening + r"(shows|of|is|depicts|displays) ", "", first).strip() or first


def shape_pairs(folder: Path) -> list[Pair]:
    """easy-VQA: one coloured shape a picture. Its own questions; the caption is put together from their answers."""
    questions: dict[int, list[tuple[str, str]]] = {}
    for question, answer, number in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
        questions.setdefault(number, []).append((question, answer))
    pairs = []
    for number, asked in sorted(questions.items()):
        path = folder / "images" / f"{number}.png"
        name = shape_name(asked)
        captions = (f"a {name}",) if name else ()
        forms = (f"a {name}", name, f"a picture of a {name}") if name else ()
        pairs.append(Pair(f"shapes/{path.name}", path.read_bytes(), captions, forms, tuple(asked)))
    return pairs


def evenly_asked(pairs: Sequence[Pair]) -> list[Pair]:
    """With questions about what is there, and about what is not, in equal numbers: those that are rarer stand several
    times. As they come, seven of eight ask for a colour or shape that is not there, and a model learns to say so
    without looking."""

    def even(pair: Pair) -> Pair:
        yes_no = [each for each in pair.questions if each[1] in ("yes", "no")]
        there = [(q, a) for q, a in yes_no if (a == "yes") != bool({"not", "no"} & set(q.split()))]
        absent = [each for each in yes_no if each not in there]
        few, many = sorted((there, absent), key=len)
        more = few * (len(many) // len(few) - 1) if few else []
        return dataclasses.replace(pair, questions=(*pair.questions, *more))

    return [even(pair) for pair in pairs]


def shape_name(asked: Sequence[tuple[str, str]]) -> str | None:
    """ "blue circle", as far as the questions give both away."""
    colour, shape = None, None
    for question, answer in asked:
        words = question.rstrip("?").split()
        if answer in ("circle", "rectangle", "triangle"):
            shape = answer
            colour = next((w for w in words if w in _COLOURS), colour)
        elif answer in _COLOURS:
            colour = answer
            shape = next((w for w in words if w in ("circle", "rectangle", "triangle")), shape)
        elif (answer == "yes") != ("not" in words or "no" in words):
            colour = next((w for w in words if w in _COLOURS), colour)
            shape = next((w for w in words if w in ("circle", "rectangle", "triangle")), shape)
    return f"{colour} {shape}" if colour and shape else None


_COLOURS = ("red", "green", "blue", "yellow", "black", "gray", "brown", "teal")


def labelled_pairs(data: Path, kind: str, split: str) -> list[Pair]:
    """Clothing or flowers: worded by templates from the label."""
    names = FLOWERS if kind == "flowers" else CLOTHING
    subject = "flower" if kind == "flowers" else "clothing"

    def to_pair(name: str, picture: bytes, row: dict[str, Any]) -> Pair | None:
        if _text(row, "split", name) != split:
            return None
        if _text(row, "label", name) not in names:
            raise InputError(f"{name}: label: expected one of {', '.join(names)}, got {row['label'][:40]!r}")
        thing = names[row["label"]]
        forms = (f"a photo of {thing}", thing, f"a picture of {thing}", re.sub("^an? ", "", thing))
        credit = f"Flickr photo {_text(row, 'flickr_id', name)}, CC BY 2.0" if kind == "flowers" else "CC0 1.0"
        return Pair(name, picture, forms[:1], forms, _questions(name, thing, subject, list(names.values())), credit)

    return list(read_tars(sorted((data / "pairs").glob(f"{kind}-*.tar")), to_pair))


def _questions(name: str, thing: str, subject: str, things: list[str]) -> tuple[tuple[str, str], ...]:
    """Open and yes/no questions about a labelled photo; as many yes as no."""
    rng = random.Random(_hash(name))
    other = rng.choice([each for each in things if each != thing])
    plain = re.sub("^an? ", "", thing)
    neighbour = "clothing" if subject == "flower" else "flower"
    return (
        ("what is this?", thing),
        (f"what kind of {subject} is this?", plain),
        (f"which {subject} is in the picture?", plain),
        (f"is this {thing}?", "yes"),
        (f"is this {other}?", "no"),
        *rng.sample([("is this a flower?", "yes" if subject == "flower" else "no"),
                     ("is this clothing?", "no" if subject == "flower" else "yes"),
                     (f"is there any {neighbour} in the picture?", "no"),
                     (f"is there any {subject} in the picture?", "yes"),
                     ("is this a drawing?", "no")], 2),
    )  # fmt: skip


def evened(pairs: Sequence[Pair]) -> list[float]:
    """In what share of its turns each is used: rare captions always, frequent ones less, by the inverse root of their
    count (those below 40 as if 40)."""
    counts = Counter(pair.captions[0] for pair in pairs)
    weights = [max(40, counts[pair.captions[0]]) ** -0.5 for pair in pairs]
    return [round(weight / max(weights), 6) for weight in weights]


def _hash(text: str) -> int:
    """A number that is the same on every machine and run."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
