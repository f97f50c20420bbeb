"""mammut-run as a user meets it: a whole bundle whose graphs are functions, so every call takes milliseconds."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mammut_runtime import commands, commands_inputs
from mammut_runtime.canary import canary_picture
from mammut_runtime.commands_inputs import picture_paths, pictures_in, text_list
from mammut_runtime.engines.fake import FakeEngine
from mammut_runtime.errors import InputError
from mammut_runtime.pictures import read_picture


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


Run = Callable[..., Done]


@pytest.fixture
def run(toy_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs mammut-run in this process; its bundle is the toy bundle, and every bundle gets the toy's functions."""
    names = {"vision": "_vision", "text": "_text", "memory": "_memory"}

    def open_engine(path: Path, *_: object) -> FakeEngine:
        owner, name = (toy_bundle, names[path.stem]) if path.stem in names else (toy_bundle.toy, "_run")
        return FakeEngine(lambda feeds: getattr(owner, name)(feeds))

    monkeypatch.setattr("mammut_runtime.model.open_engine", open_engine)
    monkeypatch.chdir(tmp_path)  # the checkout may have a build/demo-bundle
    monkeypatch.setenv(commands_inputs.BUNDLE_VARIABLE, str(toy_bundle.folder))

    def call(*arguments: object) -> Done:
        capsys.readouterr()
        code = commands.main([str(each) for each in arguments])
        return Done(code, *capsys.readouterr())

    return call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures, one of them in a subfolder; a damaged one; and files that are no pictures."""
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    save(folder / "b.png", 1)
    save(folder / "inner" / "a.PNG", 2)
    save(folder / ".hidden" / "c.png", 3)
    (folder / "damaged.jpg").write_bytes(b"\xff\xd8\xff no picture")
    (folder / "notes.txt").write_text("no picture")
    return folder


def save(path: Path, seed: int) -> None:
    whole, data = cv2.imencode(".png", canary_picture(seed, (20, 30)))
    assert whole
    path.write_bytes(data.tobytes())


# ---- caption ----


def test_caption_of_a_folder_goes_on_after_a_damaged_picture(run: Run, folder: Path) -> None:
    done = run("caption", folder)
    assert done.code == 2
    lines = done.out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(folder / "b.png"), str(folder / "inner" / "a.PNG")]
    assert done.err.count("error: ") == 1 and "damaged.jpg" in done.err
    assert done.err.endswith("1 of 3 pictures could not be used\n")
    (folder / "damaged.jpg").unlink()  # control
    again = run("caption", folder)
    assert again.code == 0 and again.out == done.out and again.err == ""


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_json_has_a_line_for_each_picture_also_for_a_damaged_one(run: Run, folder: Path, batch_size: int) -> None:
    done = run("caption", folder, "--json", "--batch-size", batch_size)
    by_name = {Path(each["path"]).name: each for each in done.json}
    assert done.code == 2 and set(by_name) == {"b.png", "a.PNG", "damaged.jpg"}
    assert set(by_name["b.png"]) == {"path", "text", "ids", "score", "log_probability", "finished", "notices"}
    assert "damaged.jpg" in by_name["damaged.jpg"]["error"]
    assert by_name["b.png"] == run("caption", folder / "b.png", "--json").json[0]


def test_a_missing_file_is_reported_like_a_damaged_one(run: Run, folder: Path) -> None:
    done = run("caption", folder / "none.png", folder / "b.png", "--json")
    assert done.code == 2 and "error" in done.json[0] and "text" in done.json[1]


def test_options_of_generation_reach_the_model(run: Run, folder: Path) -> None:
    def ids(*options: object) -> list[int]:
        done = run("caption", folder / "b.png", "--json", *options)
        assert done.code == 0, done.err
        found: list[int] = done.json[0]["ids"]
        return found

    assert len(ids("--beams", 1, "--min-tokens", 5, "--max-tokens", 6)) >= 5
    assert ids("--max-tokens", 1, "--beams", 1) == ids("--beams", 1)[:1]
    assert ids("--sample", "--seed", 3) == ids("--temperature", 1.0, "--seed", 3)
    assert len({tuple(ids("--sample", "--temperature", 3, "--seed", seed)) for seed in range(5)}) > 1
    assert ids("--top-k", 1, "--seed", 1) == ids("--beams", 1)
    assert ids("--prompt", "a cat") != ids()


def test_streaming_gives_the_greedy_caption(run: Run, folder: Path) -> None:
    assert run("caption", folder / "b.png", "--stream").out == run("caption", folder / "b.png", "--beams", 1).out


def test_a_lowered_length_is_noted_once(run: Run, folder: Path) -> None:
    done = run("caption", folder / "b.png", folder / "inner", "--max-tokens", 500)
    assert done.code == 0 and done.err.count("note: max_tokens 500 lowered to 12") == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (["--beams", "0"], "beams must be"),
        (["--temperature", "-1"], "temperature must be"),
        (["--seed", "1"], "--seed has a meaning for sampling only"),
        (["--beams", "3", "--sample"], "exclude each other"),
        (["--threads", "-1"], "threads must be"),
        (["--prompt", " "], "the prompt is empty"),
        (["--stream", "--json"], "--stream"),
        (["--stream", "--beams", "2"], "cannot stream"),
        (["--openmammut-rules", "--beams", "2"], "--openmammut-rules"),
        (["--batch-size", "0"], "1<=x<=256"),
        (["--bundle", "nowhere"], "no such bundle"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(run: Run, folder: Path, options: list[str], message: str) -> None:
    done = run("caption", folder / "b.png", *options)
    assert done.code == 2 and done.err.startswith("error: ") and message in done.err and done.err.count("\n") == 1


def test_annotated_copies_are_written_and_never_collide(run: Run, folder: Path, tmp_path: Path) -> None:
    save(folder / "inner" / "b.png", 4)
    done = run("caption", folder / "b.png", folder / "inner", "--annotate", tmp_path / "out" / "deep")
    assert done.code == 0
    written = sorted((tmp_path / "out" / "deep").iterdir())
    assert [each.name for each in written] == ["a.png", "b-2.png", "b.png"]
    drawn, original = read_picture(written[2]).rgb(), read_picture(folder / "b.png").rgb()
    assert drawn.shape[1] == 330 and drawn.shape[0] > 220, "enlarged to 320 pixels or more, and a band below"
    assert (drawn[5:220:11, 5::11] == original).all()


def test_an_annotated_copy_never_takes_the_place_of_a_given_picture(run: Run, folder: Path) -> None:
    before = (folder / "b.png").read_bytes()
    assert run("caption", folder / "b.png", "--annotate", folder).code == 0
    assert (folder / "b.png").read_bytes() == before and (folder / "b-2.png").is_file()
    assert run("caption", folder / "b.png", "--annotate", folder / "apart").code == 0  # control
    assert [each.name for each in (folder / "apart").iterdir()] == ["b.png"]


def test_annotated_copies_that_cannot_be_written(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that cannot be made is noticed before any picture is looked at, a full disk when it is full."""
    (folder / "file").touch()
    done = run("caption", folder / "b.png", "--annotate", folder / "file" / "inner")
    assert (done.code, done.out) == (2, "") and done.err.count("\n") == 1
    assert "error: --annotate: " in done.err and "cannot be written (Not a directory); give another" in done.err

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(commands_inputs, "write_picture", full)
    done = run("caption", folder / "b.png", "--annotate", folder / "out")
    assert done.code == 2 and "b.png cannot be written (No space left on device)" in done.err


def test_a_picture_that_is_too_large_says_what_to_do(run: Run, folder: Path) -> None:
    header = bytearray((folder / "b.png").read_bytes())
    header[16:24] = (20_000).to_bytes(4, "big") + (10_000).to_bytes(4, "big")
    (folder / "large.png").write_bytes(header)
    done = run("caption", folder / "large.png")
    assert done.code == 2 and "; shrink it first (in Python, read_picture takes a larger max_pixels)" in done.err


# ---- ask and match ----


def test_ask_freely_and_among_candidates(run: Run, folder: Path) -> None:
    free = run("ask", folder / "b.png", "--question", "cat?", "--json").json[0]
    assert free["question"] == "cat?" and free["candidates"] == []
    chosen = run("ask", folder / "b.png", "--question", "cat?", "--candidates", "two, dog,cat", "--json").json[0]
    assert sorted(each["text"] for each in chosen["candidates"]) == ["cat", "dog", "two"]
    assert chosen["text"] == chosen["candidates"][0]["text"]
    several = run("ask", folder / "b.png", "--question", "cat?", "--question", "dog?", "--candidates", "two,dog")
    assert several.code == 0 and [" cat? " in line for line in several.out.splitlines()] == [True, False]


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "Missing option '--question'"),
        (["--question", " "], "the question is empty"),
        (["--question", "a", "--candidates", ","], "--candidates: expected texts"),
        (["--question", "a", "--candidates", "a,a"], "given twice"),
        (["--question", "a", "--candidates", "a,b", "--beams", "2"], "free answers"),
        (["--question", "a", "--per-token"], "--per-token"),
    ],
)
def test_ask_refuses(run: Run, folder: Path, options: list[str], message: str) -> None:
    done = run("ask", folder / "b.png", *options)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1


def test_match_texts_classes_and_negatives(run: Run, folder: Path, tmp_path: Path) -> None:
    texts = run("match", folder / "b.png", "--texts", "a cat, a dog,two birds", "--json").json[0]
    assert {each["text"] for each in texts["matches"]} == {"a cat", "a dog", "two birds"}
    cosines = [each["cosine"] for each in texts["matches"]]
    assert cosines == sorted(cosines, reverse=True) and texts["best"] == texts["matches"][0]
    listed = tmp_path / "classes.txt"
    listed.write_text("cat\ndog\n\n", "utf-8")
    classes = run("match", folder / "b.png", "--classes", f"@{listed}", "--json").json[0]
    own = run("match", folder / "b.png", "--classes", "cat,dog", "--templates", "a photo of a {}.,the {}", "--json")
    assert classes == own.json[0] and {each["text"] for each in classes["matches"]} == {"cat", "dog"}
    best = texts["best"]["text"]
    rest = ",".join(each["text"] for each in texts["matches"][1:])
    done = run("match", folder / "b.png", "--texts", rest, "--negatives", best)
    assert "none of these" in done.out
    assert len(run("match", folder / "b.png", "--texts", "cat,dog,bird", "--top", 2).out.split(", ")) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "either --texts"),
        (["--texts", "a", "--classes", "b"], "either --texts"),
        (["--texts", "a", "--templates", "{}"], "--templates are for --classes"),
        (["--classes", "a", "--templates", "no braces"], "must hold {} once"),
        (["--texts", "@nowhere.txt"], "--texts @nowhere.txt: cannot be read (No such file or directory); give a text"),
        (["--texts", "@."], "--texts @.: cannot be read (Is a directory)"),
    ],
)
def test_match_refuses(run: Run, folder: Path, options: list[str], message: str) -> None:
    done = run("match", folder / "b.png", *options)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1


# ---- search ----


def test_search_finds_a_picture_by_itself(run: Run, folder: Path, tmp_path: Path) -> None:
    index = tmp_path / "photos.index"
    made = run("search", "index", folder, index)
    assert made.code == 2 and "2 pictures (2 added" in made.out and "damaged.jpg" in made.err
    (folder / "damaged.jpg").unlink()
    again = run("search", "index", folder, index, "--json")
    assert again.code == 0 and again.json[0]["added"] == 0 and again.json[0]["pictures"] == 2
    hits = run("search", "query", index, "--picture", folder / "b.png", "--json").json
    assert hits[0]["score"] == pytest.approx(1, abs=1e-5) and Path(hits[0]["path"]) == folder / "b.png"
    by_words = run("search", "query", index, "--text", "a cat", "-k", "1")
    assert by_words.code == 0 and len(by_words.out.splitlines()) == 1


def test_search_refuses(run: Run, folder: Path, tmp_path: Path) -> None:
    assert "either --text or --picture" in run("search", "query", tmp_path / "i").err
    assert run("search", "query", tmp_path / "none.index", "--text", "cat").code == 2
    assert run("search", "index", tmp_path / "nowhere", tmp_path / "i").code == 2


# ---- verify, doctor, bench ----


def test_verify_tells_whole_damaged_and_different_apart(
    run: Run, toy_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run("verify", toy_bundle.folder)
    assert done.code == 0 and "canary reproduced" in done.out
    assert run("verify", "--json").json[0]["worst_error"] < 1e-5
    vision = toy_bundle._vision

    def other(feeds: Any) -> Any:
        outputs = vision(feeds)
        return outputs | {"embedding": outputs["embedding"][:, ::-1]}

    monkeypatch.setattr(toy_bundle, "_vision", other)
    differs = run("verify", toy_bundle.folder)
    assert differs.code == 1 and "canary differs" in differs.err and differs.err.count("\n") == 1
    (toy_bundle.folder / "weights.bin").write_bytes(b"x")
    damaged = run("verify", toy_bundle.folder)
    assert damaged.code == 2 and "sha256" in damaged.err


def test_doctor_reports_every_bundle(run: Run, toy_bundle: Any, make_bundle: Any, tmp_path: Path) -> None:
    (tmp_path / "bundles").mkdir()
    broken = make_bundle(tmp_path / "bundles" / "broken").folder
    (broken / "weights.bin").write_bytes(b"x")
    done = run("doctor", toy_bundle.folder, tmp_path / "bundles", "--json")
    first, second = done.json[0]["bundles"]
    assert done.code == 2 and first["ok"] and not second["ok"] and "sha256" in second["problem"]
    alone = run("doctor")
    assert alone.code == 0 and "canary reproduced" in alone.out and "onnxruntime" in alone.out


def test_bench_ends_in_one_json_line(run: Run) -> None:
    done = run("bench", "--repeats", "1", "--tokens", "4")
    assert done.code == 0, done.err
    result = json.loads(done.out.splitlines()[-1])
    assert result["tokens"] in (3, 4) and result["encode_ms"] > 0 and result["text_64_ms"] > 0
    assert result["bundle_bytes"] > 0 and result["versions"]["numpy"] == np.__version__
    assert len(run("bench", "--repeats", "1", "--json").out.splitlines()) == 1


# ---- which pictures ----


def test_a_list_on_stdin(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"{folder / 'b.png'}\n\n{folder / 'inner' / 'a.PNG'}\r\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    done = run("caption", "-")
    assert done.code == 0 and len(done.out.splitlines()) == 2


@pytest.mark.parametrize("given", ["", "\n\r\n"])
def test_an_empty_list_on_stdin_is_an_error(run: Run, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever made the list has failed. The control is the list in the test above."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    done = run("caption", "-")
    assert (done.code, done.out) == (2, "")
    assert done.err == "error: -: no pictures in the list on standard input; expected their paths, one a line\n"


def test_folders_are_searched_without_what_is_hidden(folder: Path, tmp_path: Path) -> None:
    assert [each.name for each in pictures_in(folder)] == ["b.png", "damaged.jpg", "a.PNG"]
    assert list(picture_paths([str(folder / "notes.txt")])) == [folder / "notes.txt"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no pictures in this folder"):
        pictures_in(tmp_path / "empty")


def test_text_lists(tmp_path: Path) -> None:
    assert text_list(" a cat, a dog,", "--texts") == ["a cat", "a dog"]
    path = tmp_path / "texts.txt"
    path.write_bytes("\ufeffa cat, black\r\na dog\n\n".encode())
    assert text_list(f"@{path}", "--texts") == ["a cat, black", "a dog"]
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="expected UTF-8"):
        text_list(f"@{path}", "--texts")


def test_help_and_version(run: Run) -> None:
    assert run("--version").out.startswith("mammut-edge ")
    shown = run("--help").out
    for name in ("caption", "ask", "match", "search", "verify", "bench", "doctor"):
        assert f"\n  {name} " in shown and run(name, "--help").code == 0
    bare = run()
    assert bare.code == 2 and "Commands:" in bare.err
