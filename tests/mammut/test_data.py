"""Reading pairs: both forms, damage, missing files; and what batches are made of them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from mammut.augment import Augmenter, AugmentOptions
from mammut.batches import SHORT, Batcher
from mammut.bpe_training import train_tokenizer
from mammut.data import Corpus, Pair, decode, plain_pair, read_folder, read_tars
from mammut_runtime.errors import InputError
from mammut_runtime.preprocess import PreprocessRule
from mammut_runtime.tokenizer import Tokenizer

RULE = PreprocessRule(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", "squash", 0)


def picture(
    colour: tuple[int, int, int] = (200, 30, 30), side: int = 20, suffix: str = ".png", alpha: bool = False
) -> bytes:
    pixels = np.full((side, side, 3), colour, np.uint8)[:, :, ::-1]
    if alpha:
        pixels = np.dstack([pixels, np.zeros((side, side), np.uint8)])
        pixels[5:15, 5:15, 3] = 255
    return bytes(cv2.imencode(suffix, np.ascontiguousarray(pixels))[1])


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_folder(folder: Path, rows: list[object], pictures: dict[str, bytes]) -> Path:
    for name, data in pictures.items():
        (folder / name).write_bytes(data)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_tars_with_json_and_text(tmp_path: Path) -> None:
    members = {
        "a.jpg": picture(suffix=".jpg"),
        "a.json": json.dumps({"caption": "a red square", "other": 1}).encode(),
        "b.png": picture(),
        "b.txt": b"another one\n",
        "c.json": b'{"caption": "no picture"}',
    }
    pairs = list(read_tars([write_tar(tmp_path / "x.tar", members)], plain_pair))
    assert [pair.captions for pair in pairs] == [("a red square",), ("another one",)]
    assert pairs[0].data == members["a.jpg"]
    assert pairs[0].name == "x.tar: a"


def test_tar_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        list(read_tars([tmp_path / "none.tar"], plain_pair))
    (tmp_path / "bad.tar").write_bytes(b"not a tar at all" * 100)
    with pytest.raises(InputError, match="cannot be read as a WebDataset tar"):
        list(read_tars([tmp_path / "bad.tar"], plain_pair))
    broken = write_tar(tmp_path / "json.tar", {"a.png": picture(), "a.json": b"{oops"})
    with pytest.raises(InputError, match=r"json\.tar: a: its json member is not JSON"):
        list(read_tars([broken], plain_pair))


def test_folder_with_captions_and_questions(tmp_path: Path) -> None:
    rows: list[object] = [
        {"file": "a.png", "caption": "a red square"},
        "",
        {"file": "a.png", "question": "what color?", "answer": "red"},
    ]
    pairs = list(read_folder(write_folder(tmp_path, rows, {"a.png": picture()})))
    assert [(pair.captions, pair.questions) for pair in pairs] == [
        (("a red square",), ()),
        ((), (("what color?", "red"),)),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON"),
        ("[1]", 'expected an object with the key "file"'),
        ({"file": "gone.png", "caption": "x"}, "does not exist"),
        ({"file": "../a.png", "caption": "x"}, "leaves the folder"),
        ({"file": "/etc/hostname", "caption": "x"}, "leaves the folder"),
        ({"file": "a.png"}, "expected a caption or a question"),
        ({"file": "a.png", "caption": ""}, "to be texts"),
        ({"file": "a.png", "caption": 3}, "to be texts"),
        ({"file": "a.png", "question": "what?"}, "need each other"),
    ],
)
def test_folder_errors_name_the_line(tmp_path: Path, row: object, message: str) -> None:
    good = {"file": "a.png", "caption": "fine"}
    folder = write_folder(tmp_path, [good, row], {"a.png": picture()})
    with pytest.raises(InputError, match=message) as caught:
        list(read_folder(folder))
    assert "pairs.jsonl:2" in str(caught.value)
    assert len(list(read_folder(write_folder(tmp_path, [good], {})))) == 1  # control


def test_missing_index(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"pairs\.jsonl: no such file"):
        list(read_folder(tmp_path))


def test_damaged_pictures_are_named_and_counted() -> None:
    good = [Pair(f"good {n}", picture(), ("a",)) for n in range(9)]
    bad = Pair("the bad one", picture()[:60], ("b",))
    messages: list[str] = []
    corpus = decode("set", [*good, bad], 16, max_damaged=0.1, warn=messages.append)
    assert len(corpus) == 9 and corpus.pictures.shape == (9, 3, 16, 16)
    assert len(messages) == 1 and "the bad one" in messages[0]
    with pytest.raises(InputError, match=r"1 of 10 pictures are unreadable.*the bad one"):
        decode("set", [*good, bad], 16, max_damaged=0.05)
    with pytest.raises(InputError, match="holds no image-text pairs"):
        decode("set", [], 16)


def test_drawings_keep_their_transparency_also_in_palettes() -> None:
    corpus = decode("set", [Pair("x", picture(alpha=True), ("a",))], 20, kind="drawing")
    assert corpus.pictures.shape == (1, 4, 20, 20)
    assert corpus.pictures[0, 3, 0, 0] == 0 and corpus.pictures[0, 3, 10, 10] == 255
    assert corpus.pictures[0, :, 10, 10].tolist() == [200, 30, 30, 255]
    Image = pytest.importorskip("PIL.Image")
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([0, 0, 0, 200, 30, 30])
    palette.paste(0, (0, 0, 5, 5))
    stream = io.BytesIO()
    palette.save(stream, "PNG", transparency=0)
    pictures = decode("set", [Pair("x", stream.getvalue(), ("a",))], 20, kind="drawing").pictures
    assert pictures[0, 3, 0, 0] == 0 and pictures[0, :, 10, 10].tolist() == [200, 30, 30, 255]


@pytest.fixture
def corpora() -> list[Corpus]:
    photos = [
        Pair("p0", picture((250, 0, 0)), ("a red thing",), ("a red thing", "red"), (("what is this?", "red"),)),
        Pair("p1", picture((0, 250, 0)), ("a green thing, " + "very " * 20 + "green",)),
        Pair("p2", picture((0, 0, 250)), (), (), (("is it blue?", "yes"),)),
    ]
    drawing = [Pair("d0", picture(alpha=True), ("a drawing",))]
    return [decode("photos", photos, 40), decode("drawings", drawing, 40, kind="drawing")]


def batcher(
    corpora: list[Corpus], question_share: float = 0.5, seed: int = 0, context_length: int = 48
) -> tuple[Batcher, Tokenizer]:
    texts = [text for corpus in corpora for pair in corpus.pairs for text in (*pair.captions, *sum(pair.questions, ()))]
    tokenizer = Tokenizer.from_bytes(train_tokenizer([*texts, "question: answer:"], 530))
    made = Batcher(
        corpora,
        tokenizer,
        RULE,
        context_length,
        augment=AugmentOptions(),
        ask_form="question: {question} answer:",
        question_share=question_share,
        generator=torch.Generator().manual_seed(seed),
    )
    return made, tokenizer


def test_a_batch_says_what_its_pictures_show(corpora: list[Corpus]) -> None:
    made, tokenizer = batcher(corpora)
    batch = made.draw(60, 32)
    assert batch.pixels.shape == (60, 3, 32, 32) and bool(torch.isfinite(batch.pixels).all())
    assert sorted(batch.text_keys) == ["a drawing", "a green thing, " + "very " * 20 + "green", "a red thing"]
    assert sum(map(len, batch.text_ids)) == 3
    assert {len(part.ids[0]) > SHORT - 1 for part in batch.sequences} == {True, False}  # short and long apart
    rows = torch.cat([part.pictures for part in batch.sequences])
    assert sorted(rows.tolist()) == list(range(60))
    red = batch.matched[[key == "a red thing" for key in batch.picture_keys]]
    for part in batch.sequences:
        for row, index in enumerate(part.pictures.tolist()):
            given = tokenizer.decode(part.ids[row].tolist())
            written = tokenizer.decode(part.targets[row][part.counted[row]].tolist()).strip()
            if index in red.tolist():
                asked = "question" in given
                assert written == ("red" if asked else "a red thing")
                assert bool(part.counted[row][0]) != asked  # a question's words are given, not written
            last = part.targets[row][part.counted[row]][-1]
            assert int(last) == tokenizer.end_id


def test_an_answer_has_room_however_long_the_question(corpora: list[Corpus]) -> None:
    for context_length in (48, 8):  # 48: control, everything fits
        made, tokenizer = batcher(corpora, question_share=1.0, context_length=context_length)
        for part in made.draw(40, 32).sequences:
            assert part.ids.shape[1] < context_length
            assert bool(part.counted.any(dim=1).all())
            assert bool(((part.targets == tokenizer.end_id) & part.counted).any(dim=1).all())


def test_pictures_without_captions_stay_out_of_the_contrastive_pass(corpora: list[Corpus]) -> None:
    made, _ = batcher(corpora, question_share=0.0)
    batch = made.draw(80, 32)
    assert len(batch.matched) < 80 and len(batch.matched) == len(batch.picture_keys)
    only_questions, _ = batcher([decode("q", [Pair("q", picture(), (), (), (("is it?", "yes"),))], 40)])
    batch = only_questions.draw(4, 32)
    assert len(batch.matched) == 0 and batch.text_ids == ()


def test_the_same_seed_gives_the_same_batch(corpora: list[Corpus]) -> None:
    first, second, other = (batcher(corpora, seed=seed)[0].draw(16, 32) for seed in (3, 3, 4))
    assert torch.equal(first.pixels, second.pixels)
    assert first.picture_keys == second.picture_keys
    assert not torch.equal(first.pixels, other.pixels)  # control


def test_drawings_stand_on_their_background() -> None:
    generator = torch.Generator().manual_seed(0)
    augmenter = Augmenter(AugmentOptions(colour=0.0), RULE.mean, RULE.std, generator)
    clear = torch.zeros(8, 4, 32, 32, dtype=torch.uint8)
    scenes = torch.randint(0, 255, (3, 3, 32, 32), dtype=torch.uint8, generator=generator)
    only_background = augmenter.drawings(clear, scenes, 32)
    assert float(only_background.std()) > 0.1  # nothing of a wholly transparent drawing is seen, the backgrounds differ
    solid = torch.full((8, 4, 32, 32), 255, dtype=torch.uint8)
    solid[:, :3] = 0
    middle = augmenter.drawings(solid, scenes, 32)[:, :, 12:20, 12:20]
    assert float(middle.max()) < -0.9  # black, where normalised black is -1
