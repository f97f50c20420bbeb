"""What the shipped demo model is trained and judged on: photographs, drawings and plain shapes, and their wording.

Reads the data folder that is not part of a clone (see the model card for its sources and licences). The splits are
fixed here: clothing by sender and flowers as the data says, photographs by key, and for every sixth emoji name the
drawing of one vendor (blobmoji), so that "recognise one vendor's drawing from the other's" can be measured.

Captions and matching texts of photographs are people's own words and the questions about shapes come with their data;
everything else is worded here from labels by templates, and so is synthetic text about real pictures.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mammut.augment import AugmentOptions
from mammut.bpe_training import train_tokenizer
from mammut.data import Corpus, Pair, decode, read_tars
from mammut.presets import demo
from mammut.train import Job, Stage, TrainOptions
from mammut_runtime.errors import InputError
from mammut_runtime.preprocess import PreprocessRule
from mammut_runtime.tokenizer import Tokenizer

DECODED_SIDE = 112
"""Pixels; a little over the training size."""

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


RULE = PreprocessRule(96, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear", "squash", 0)
"""Squash: the whole picture is seen, whatever its shape. Mean and deviation are the usual ones of photographs."""

VOCABULARY = 2048
MINUTES = 53.0
WORKERS = 3


def demo_job(
    data: Path,
    out: Path,
    *,
    minutes: float | None = None,
    workers: int | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> Job:
    """The run that made the shipped checkpoint, or a longer or shorter one. Errors as training_corpora's."""
    corpora = training_corpora(data, warn=warn)
    tokenizer_json = train_tokenizer(corpus_texts(corpora), VOCABULARY)
    options = TrainOptions(
        minutes=MINUTES if minutes is None else minutes,
        batch_size=96,
        workers=WORKERS if workers is None else workers,
        learning_rate=1e-3,
        muon_learning_rate=0.02,
        drop_path=0.0,  # half an hour on a CPU is too short to overfit
        question_share=0.35,
        stages=(Stage(0.75, 64), Stage(1.0, 96)),
        augment=AugmentOptions(min_area=0.4, colour=0.3, erase=0.1),
    )
    vocab_size = Tokenizer.from_bytes(tokenizer_json).vocab_size
    return Job(demo(vocab_size), tokenizer_json, RULE, PROMPTS, tuple(corpora), options, out)


def training_corpora(
    data: Path, side: int = DECODED_SIDE, warn: Callable[[str], None] = lambda message: None
) -> list[Corpus]:
    """Everything the demo is trained on, decoded. About 12,500 pictures, 0.5 GB.

    Raises:
        InputError: the folder is not the data folder (names what is missing), or its pictures are damaged.
    """
    check_folder(data)
    flowers, clothing = (labelled_pairs(data, kind, "train") for kind in ("flowers", "clothing"))
    emoji = [pair for pair in emoji_pairs(data) if not held_out_drawing(pair)]
    shapes = shape_pairs(data / "easy-vqa" / "train")
    return [
        decode("flowers", flowers, side, weight=0.27, sample_weights=_evened(flowers), warn=warn),
        decode("clothing", clothing, side, weight=0.45, sample_weights=_evened(clothing), warn=warn),
        decode("emoji", emoji, side, kind="drawing", weight=0.13, warn=warn),
        decode("photos", photo_pairs(data, "train"), side, weight=0.06, warn=warn),
        decode("shapes", shapes, side, kind="plain", weight=0.09, warn=warn),
    ]


def held_out(data: Path) -> dict[str, list[Pair]]:
    """Pictures that are never trained on, with the caption each should get. Errors as training_corpora's.

    "clothing", "flowers" and "photos" are photographs; "emoji" are one vendor's drawings of names whose other drawing
    was trained on; "shapes" are easy-VQA's test pictures.
    """
    check_folder(data)
    return {
        "clothing": labelled_pairs(data, "clothing", "val"),
        "flowers": labelled_pairs(data, "flowers", "val"),
        "photos": photo_pairs(data, "val"),
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


def corpus_texts(corpora: Sequence[Corpus]) -> list[str]:
    """All texts the tokenizer is trained on, once a sample."""
    texts: list[str] = []
    for corpus in corpora:
        for pair in corpus.pairs:
            texts += pair.captions
            texts += [PROMPTS["ask"].format(question=q) + " " + a for q, a in pair.questions[:3]]
    return texts


def held_out_drawing(pair: Pair) -> bool:
    """Whether this is a blobmoji drawing of the sixth of the names kept for judging, chosen by a hash of the name."""
    return pair.name.startswith("blobmoji") and _hash(pair.captions[0]) % 6 == 0


def emoji_pairs(data: Path) -> list[Pair]:
    """Both vendors' drawings with their Unicode names."""
    with (data / "emoji" / "names.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
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


def photo_pairs(data: Path, split: str) -> list[Pair]:
    """Photographs with a person's description; a tenth of the keys is "val"."""

    def to_pair(name: str, picture: bytes, row: dict[str, Any]) -> Pair | None:
        if (_hash(name) % 10 == 0) != (split == "val"):
            return None
        caption = plain_caption(row["caption"])
        questions = (("is this a drawing?", "no"), ("what is this?", "a photo"))
        return Pair(name, picture, (caption,), (caption,), questions, f"{row['credit']} CC BY 4.0".strip())

    return list(read_tars(sorted((data / "pairs").glob("photos-*.tar")), to_pair))


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
        if row["split"] != split:
            return None
        thing = names[row["label"]]
        forms = (f"a photo of {thing}", thing, f"a picture of {thing}", re.sub("^an? ", "", thing))
        credit = f"Flickr photo {row['flickr_id']}, CC BY 2.0" if kind == "flowers" else "CC0 1.0"
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


def _evened(pairs: Sequence[Pair]) -> list[float]:
    """Weights that make rare captions more frequent: by the inverse root of their count, those below 40 as if 40."""
    counts: dict[str, int] = {}
    for pair in pairs:
        counts[pair.captions[0]] = counts.get(pair.captions[0], 0) + 1
    return [max(40, counts[pair.captions[0]]) ** -0.5 for pair in pairs]


def _hash(text: str) -> int:
    """A number that is the same on every machine and run."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
