"""What SRT, WebVTT and JSON lines say is read back by small readers of these formats: same times, same words.

The readers are written here from the formats' descriptions, and know nothing of cues.py.
"""

from __future__ import annotations

import html
import itertools
import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mammut_runtime.errors import InputError
from mammut_runtime.video.cues import VTT_HEAD, Cue, MergeRule, json_line, merged, read_cues, srt, vtt
from mammut_runtime.video.sampler import FrameRef

Read = tuple[int, int, str]
"""Start and end, milliseconds, and the text."""


def cue(start_ms: int, end_ms: int, text: str, confidence: float = 0.5) -> Cue:
    return Cue(start_ms, end_ms, text, confidence, (1,), (confidence,), (FrameRef(0, start_ms / 1000),), 0, 1)


def milliseconds(clock: str) -> int:
    found = re.fullmatch(r"(\d{2,}):([0-5]\d):([0-5]\d)[.,](\d{3})", clock)
    assert found, clock
    hours, minutes, seconds, rest = map(int, found.groups())
    return ((hours * 60 + minutes) * 60 + seconds) * 1000 + rest


def read_srt(text: str) -> list[Read]:
    """Blocks between blank lines: a number, times, text. Any line with an arrow would be taken for times."""
    found = []
    for number, block in enumerate(filter(None, text.split("\n\n")), 1):
        first, times, *lines = block.split("\n")
        assert first == str(number) and len(lines) == 1 and "-->" not in lines[0]
        begin, end = re.fullmatch(r"(\S+,\d{3}) --> (\S+,\d{3})", times).groups()  # type: ignore[union-attr]
        found.append((milliseconds(begin), milliseconds(end), lines[0]))
    return found


def read_vtt(text: str) -> list[Read]:
    """The head, then blocks: times, text with character references. A bare < would begin a tag."""
    head, *blocks = text.split("\n\n")
    assert head == "WEBVTT"
    found = []
    for block in filter(None, blocks):
        times, *lines = block.split("\n")
        assert len(lines) == 1 and not set("<>") & set(lines[0]) and "-->" not in lines[0]
        assert re.sub(r"&(amp|lt|gt);", "", lines[0]).count("&") == 0
        begin, end = re.fullmatch(r"(\S+\.\d{3}) --> (\S+\.\d{3})", times).groups()  # type: ignore[union-attr]
        found.append((milliseconds(begin), milliseconds(end), html.unescape(lines[0])))
    return found


def written(cues: list[Cue]) -> tuple[str, str]:
    numbered = (srt(number, each) for number, each in enumerate((c for c in cues if srt(1, c)), 1))
    return "".join(numbered), VTT_HEAD + "".join(map(vtt, cues))


texts = st.text(max_size=40) | st.text(alphabet="-> &<;\n\r\tab7\u2028", max_size=20)
spans = st.lists(st.tuples(st.sampled_from([0, 0, 1, 90_000]), st.integers(1, 5_000_000), texts), max_size=12)


@given(spans)
@example([(0, 1, "--->")])
@example([(0, 1, "a\n\n2\n00:00:00,000 --> 00:00:01,000\nb")])
@example([(0, 1, "&amp; &lt;b>")])
@example([(360_000_000, 1, "after a hundred hours")])
def test_what_is_written_is_read_back(spans: list[tuple[int, int, str]]) -> None:
    cues, at = [], 0
    for pause, length, text in spans:
        cues.append(cue(at + pause, at + pause + length, text))
        at += pause + length
    subtitles, web = written(cues)
    shown = [each for each in read_vtt(web)]
    expected = [" ".join("".join(c if c.isprintable() else " " for c in each.text).split()) for each in cues]
    assert [text for _, _, text in shown] == [each for each in expected if each]
    assert [each[:2] for each in shown] == [(c.start_ms, c.end_ms) for c, t in zip(cues, expected, strict=True) if t]
    plain = read_srt(subtitles)
    assert [each[:2] for each in plain] == [each[:2] for each in shown]
    assert [re.sub("-+>", ">", each[2]) for each in plain] == [re.sub("-+>", ">", each[2]) for each in shown]
    lines = [json.loads(json_line(each, "b" * 64)) for each in cues]
    assert [each["text"] for each in lines] == [each.text for each in cues]
    assert [round(each["start_s"] * 1000) for each in lines] == [each.start_ms for each in cues]


@settings(deadline=None)
@given(spans)
def test_json_lines_are_read_back_as_cues(spans: list[tuple[int, int, str]]) -> None:
    cues, at = [], 0
    for pause, length, text in spans:
        cues.append(cue(at + pause, at + pause + length, text))
        at += pause + length
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_text("".join(json_line(each, "b" * 64) for each in cues), encoding="utf-8")
        assert list(read_cues(path)) == cues


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no json\n", "line 2: not readable as JSON"),
        ("[1]\n", "line 2: no cue; expected the .jsonl file that caption-video wrote"),
        ('{"start_s": 0, "end_s": 1}\n', "line 2: no cue"),
        ('{"bundle": "b", "start_s": "x", "end_s": 1}\n', "line 2: no cue"),
        ('{"bundle": "b", "start_s": 0, "end_s": 1}\n', "line 2: missing key 'text'"),
    ],
)
def test_other_lines_are_refused(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(json_line(cue(0, 1, "a"), "b") + line)
    reader = read_cues(tmp_path / "a.jsonl")
    assert next(reader) == cue(0, 1, "a")  # control
    with pytest.raises(InputError, match=message):
        next(reader)
    with pytest.raises(InputError, match="cannot be read"):
        next(read_cues(tmp_path / "none.jsonl"))


@given(spans, st.floats(0.1, 2), st.floats(0.1, 1000))
def test_files_of_merged_scenes_are_monotone_and_never_overlap(
    spans: list[tuple[int, int, str]], like: float, longest_s: float
) -> None:
    scenes, at = [], 0
    for pause, length, text in spans:
        scenes.append(cue(at + pause, at + pause + length, text[:3], len(text) / 40))
        at += pause + length
    for read, text in zip((read_srt, read_vtt), written(list(merged(scenes, MergeRule(like, longest_s)))), strict=True):
        found = read(text)
        assert all(begin < end for begin, end, _ in found)
        assert all(one[1] <= two[0] for one, two in itertools.pairwise(found))


@pytest.mark.parametrize("arrow", ["-->", "--->", "------>"])
def test_no_arrow_survives_in_a_subtitle(arrow: str) -> None:
    assert srt(1, cue(0, 1, f"a {arrow} b")).endswith("\na -> b\n\n")
    assert arrow.replace("-->", "->") != arrow, "control: a plain replacement changes it"
    assert srt(1, cue(0, 1, "a -> b")).endswith("\na -> b\n\n")  # control: what is no arrow of theirs stays


def test_the_reader_here_sees_overlaps_and_stray_arrows() -> None:
    """Control: the readers above do refuse what they should."""
    overlapping = srt(1, cue(0, 2000, "a")) + srt(2, cue(1000, 3000, "b"))
    one, two = read_srt(overlapping)
    assert one[1] > two[0]
    with pytest.raises(AssertionError):
        read_srt("1\n00:00:00,000 --> 00:00:01,000\na --> b\n\n")
    with pytest.raises(AssertionError):
        read_vtt(VTT_HEAD + "00:00:00.000 --> 00:00:01.000\na < b\n\n")
