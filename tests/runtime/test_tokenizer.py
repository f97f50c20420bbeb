"""The tokenizer's file form, cleaning, rows and decoding, on a vocabulary small enough to check by hand."""

from __future__ import annotations

import html
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mammut_runtime.errors import BundleError, InputError, MammutError
from mammut_runtime.tokenizer import (
    END,
    MAX_FILE_BYTES,
    MAX_TEXT_CHARS,
    PAD,
    START,
    WORD_END,
    Tokenizer,
    byte_alphabet,
    clean,
    pack_tokenizer,
)

MERGES = [("c", "a"), ("ca", "t" + WORD_END), ("d", "o"), ("do", "g" + WORD_END), ("!", "!"), ("!", "!" + WORD_END)]


def small_file(pad: bool = False) -> bytes:
    symbols = byte_alphabet()
    finals = [symbol + WORD_END for symbol in symbols]
    tokens = [*symbols, *finals, *(left + right for left, right in MERGES), *([PAD] if pad else []), START, END]
    return pack_tokenizer(tokens, MERGES)


SMALL = small_file()
CAT, DOG = 513, 515


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer.from_bytes(SMALL)


# --- cleaning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  Two\tCATS\n\nsit ", "two cats sit"),
        ("caf\u00c3\u00a9", "caf\u00e9"),  # mojibake
        ("\u201cquoted\u201d", '"quoted"'),
        ("&amp;lt;b&amp;gt;", "<b>"),  # escaped twice
        ("a\u00a0b\u2028c", "a b c"),
        ("e\u0301", "\u00e9"),
        ("\uff26\uff35\uff2c\uff2c", "full"),
        ("\u039f\u0394\u039f\u03a3", "\u03bf\u03b4\u03bf\u03c2"),  # final sigma
        ("nul\x00 esc\x1b[31m", "nul esc"),
        ("lone \ud800 half", "lone \ufffd half"),
        ("", ""),
    ],
)
def test_clean_repairs_text(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


@given(st.text(st.characters(max_codepoint=0x7E) | st.sampled_from("&;<>#x9\t\r\n\x0b\x1b[m"), max_size=40))
@example("\x0b")
@example("&amp;amp;lt;")
def test_clean_skips_ftfy_only_where_it_changes_nothing(text: str) -> None:
    repaired = html.unescape(html.unescape(ftfy.fix_text(text)))
    assert clean(text) == " ".join(repaired.split()).lower()


def test_clean_refuses_what_is_no_text_and_far_too_long_a_text() -> None:
    assert clean("a" * MAX_TEXT_CHARS) == "a" * MAX_TEXT_CHARS
    with pytest.raises(InputError, match="at most 100000 characters, got 100001"):
        clean("a" * (MAX_TEXT_CHARS + 1))
    with pytest.raises(InputError, match=r"expected a text .*got bytes"):
        clean(b"cat")  # type: ignore[arg-type]


# --- encoding, rows, decoding -----------------------------------------------------------------------------------------


def ids_of(small: Tokenizer, text: str) -> list[int]:
    """Ids of one-symbol tokens: all but the last inside the word, the last with its word end."""
    symbols = byte_alphabet()
    return [*(symbols.index(c) for c in text[:-1]), symbols.index(text[-1]) + 256]


def test_encode_merges_in_order_and_cuts_as_clip_does(small: Tokenizer) -> None:
    assert small.encode("cat Dog") == [CAT, DOG]
    assert small.encode("cats") == [512, *ids_of(small, "ts")]
    assert small.encode("cat's") == [CAT, *ids_of(small, "'s")]
    assert small.encode("12") == [*ids_of(small, "1"), *ids_of(small, "2")]
    assert small.encode("cat!!!") == [CAT, 516, 256]
    assert small.encode("") == small.encode(" \n ") == []


def test_two_characters_that_clip_treats_oddly(small: Tokenizer) -> None:
    """Its pattern ignores case: the long s (bytes C5 BF) counts as an s, and the mark U+0345 as nothing at all."""
    assert small.encode("cat'\u017f") == [CAT, *ids_of(small, "'\u00c5\u00bf")]
    assert small.encode("cat'\u017e") == [CAT, *ids_of(small, "'"), *ids_of(small, "\u00c5\u00be")]  # control: z
    assert small.encode("cat\u0345dog") == [CAT, DOG]
    assert small.encode("cat\u0346dog") == [CAT, *ids_of(small, "\u00cd\u0128"), DOG]  # control: the next mark


def test_a_spelled_out_special_token_counts_only_as_a_piece_of_its_own(small: Tokenizer) -> None:
    assert small.encode("cat<END_of_text>dog") == [CAT, small.end_id, DOG]
    assert small.encode(START + END) == [small.start_id, small.end_id]
    assert small.end_id not in small.encode("!<end_of_text>")
    assert small.encode("cat <pad>") == [CAT, *ids_of(small, "<"), *ids_of(small, "pad"), *ids_of(small, ">")]


def test_rows_are_start_ids_end_pads(small: Tokenizer) -> None:
    rows = small.tokenize(["cat", "cat dog cat dog", ""], 5)
    assert rows.dtype == np.int64
    start, end = small.start_id, small.end_id
    assert rows.tolist() == [[start, CAT, end, 0, 0], [start, CAT, DOG, CAT, end], [start, end, 0, 0, 0]]
    assert small.tokenize([], 5).shape == (0, 5)
    assert small.tokenize(["cat"], 2).tolist() == [[start, end]]


def test_count_cut_says_how_many_tokens_a_row_loses(small: Tokenizer) -> None:
    text = "cat dog cat dog"
    assert [small.count_cut(text, length) for length in (2, 5, 6, 77)] == [4, 1, 0, 0]


def test_pad_id_is_that_of_the_pad_token_if_there_is_one(small: Tokenizer) -> None:
    padded = Tokenizer.from_bytes(small_file(pad=True))
    assert (small.pad_id, small.vocab_size) == (0, 520)
    assert (padded.pad_id, padded.start_id, padded.end_id, padded.vocab_size) == (518, 519, 520, 521)
    assert padded.tokenize(["cat"], 4).tolist() == [[519, CAT, 520, 518]]
    assert padded.decode([519, CAT, 520, 518]) == "cat"
    assert small.decode([small.start_id, CAT, small.end_id, 0]) == "cat !"  # id 0 is a token of its own here


def test_decode_for_people_and_to_the_letter(small: Tokenizer) -> None:
    ids = small.encode("cat's caf\u00e9!!")
    assert small.decode(ids) == "cat 's caf\u00e9 !!"
    ids = [small.start_id, CAT, small.end_id]
    assert small.decode(ids) == "cat"
    assert small.decode(ids, skip_special=False) == "<start_of_text>cat <end_of_text>"
    assert small.decode(np.array(ids)) == "cat"
    assert small.decode([]) == ""


def test_decode_replaces_bytes_that_are_no_text(small: Tokenizer) -> None:
    first_byte_of_two = byte_alphabet().index("\u00c3")
    assert small.decode([first_byte_of_two, CAT]) == "\ufffdcat"


@pytest.mark.parametrize("number", [-1, 520, 2**40])
def test_decode_refuses_ids_of_another_vocabulary(small: Tokenizer, number: int) -> None:
    assert small.decode([519]) == ""
    with pytest.raises(InputError, match=f"token ids from 0 to 519, got {number}"):
        small.decode([number])


@pytest.mark.parametrize("length", [1, 0, -5, 10**9])
def test_rows_of_no_use_are_refused(small: Tokenizer, length: int) -> None:
    with pytest.raises(InputError, match=f"context length from 2 .*got {length}"):
        small.tokenize(["cat"], length)
    with pytest.raises(InputError, match="context length"):
        small.count_cut("cat", length)


def test_one_text_in_place_of_a_list_is_refused(small: Tokenizer) -> None:
    with pytest.raises(InputError, match="list of texts, got one text"):
        small.tokenize("cat", 5)


@given(st.text(st.characters(exclude_categories=()), max_size=60))
def test_any_text_comes_back_but_for_spacing(text: str) -> None:
    tokenizer = Tokenizer.from_bytes(SMALL)
    back = tokenizer.decode(tokenizer.encode(text), skip_special=False)
    assert back.replace(" ", "") == clean(text).replace(" ", "").replace("\u0345", "")  # CLIP drops this mark


def test_the_library_reads_the_same_file_alike(small: Tokenizer) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    stock = tokenizers.Tokenizer.from_buffer(SMALL)
    for text in ("cat's dog, 12 caf\u00e9!!", "cat<end_of_text>dog"):
        ids = stock.encode(clean(text)).ids
        assert ids == small.encode(text)
        assert stock.decode(ids).strip() == small.decode(ids)


def test_loading_and_decoding_import_neither_ftfy_nor_the_library(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from mammut_runtime.tokenizer import Tokenizer, clean
tokenizer = Tokenizer.from_file(sys.argv[1])
tokenizer.decode([513])
tokenizer.encode("")
clean("Plain text, 100 % ASCII")
heavy = {"ftfy", "tokenizers"}
print(sorted(heavy & set(sys.modules)))
tokenizer.encode("caf\\u00e9")
print(sorted(heavy & set(sys.modules)))
"""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(SMALL)
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["[]", "['ftfy', 'tokenizers']"]


# --- the file ---------------------------------------------------------------------------------------------------------


def test_writing_is_deterministic_and_reading_gives_the_vocabulary_back() -> None:
    assert small_file() == SMALL
    assert Tokenizer.from_bytes(SMALL).vocab_size == 512 + len(MERGES) + 2
    assert byte_alphabet()[0] == "!" and len(set(byte_alphabet())) == 256


def test_the_writer_refuses_what_the_reader_would() -> None:
    symbols = byte_alphabet()
    tokens = [*symbols, *(symbol + WORD_END for symbol in symbols), "ab", START, END]
    assert pack_tokenizer(tokens, [("a", "b")])
    with pytest.raises(BundleError, match=r"merges of two tokens into a third.*`ba` out of vocabulary"):
        pack_tokenizer(tokens, [("b", "a")])
    with pytest.raises(BundleError, match="each id from 0 to"):
        pack_tokenizer([*tokens, "ab"], [])
    with pytest.raises(BundleError, match="expected token '<end_of_text>' in 'vocab'"):
        pack_tokenizer(tokens[:-1], [])
    with pytest.raises(BundleError, match="byte symbols in 'vocab', got one with"):
        pack_tokenizer([*tokens, "\u4e2d"], [])
    with pytest.raises(BundleError, match="JSON in UTF-8"):
        pack_tokenizer([*tokens, "\ud800"], [])


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(BundleError, match=r"tokenizer\.json: expected a readable tokenizer file, got: No such file"):
        Tokenizer.from_file(path)
    path.write_bytes(SMALL[:-1])
    with pytest.raises(BundleError, match=r"tokenizer\.json: expected JSON, got"):
        Tokenizer.from_file(path)
    path.write_bytes(SMALL)
    assert Tokenizer.from_file(path).encode("cat") == [CAT]
    assert Tokenizer.from_file(str(path)).encode("cat") == [CAT]


def test_a_file_above_the_size_limit_is_refused_unparsed(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # a hole: takes no disk
    with pytest.raises(BundleError, match="at most 67108864 bytes"):
        Tokenizer.from_file(path)


def edited(*path: str | int, value: Any = None, drop: bool = False) -> bytes:
    """The small file with the value at `path` replaced, or the key dropped."""
    document = json.loads(SMALL)
    place = document
    for step in path[:-1]:
        place = place[step]
    if drop:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected JSON, got"),
        (b"\xff\xfe", "JSON in UTF-8, got other bytes at 0"),
        (b"[]", r"the file to be a JSON object, got \[\]"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 5_000, "expected JSON, got"),
        (edited("surprise", value=1), 'expected no key "surprise" in the file'),
        (edited("decoder", drop=True), "expected key 'decoder' in the file, got none"),
        (edited("truncation", value={"max_length": 8}), "'truncation' in the file to be null"),
        (edited("normalizer", value={"type": "Lowercase"}), "'normalizer' in the file to be null"),
        (edited("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex", value="(a+)+$"), "'pre_tokenizer' in the"),
        (edited("model", value=7), "'model' to be a JSON object, got 7"),
        (edited("model", "type", value="Unigram"), "'type' in 'model' to be \"BPE\", got \"Unigram\""),
        (edited("model", "dropout", value=0.5), "'dropout' in 'model' to be null, got 0.5"),
        (edited("model", "fuse_unk", value=0), "'fuse_unk' in 'model' to be false, got 0"),
        (edited("model", "vocab", value=[]), "'vocab' to be a JSON object"),
        (edited("model", "vocab", value={}), "each id from 0 to -1 once"),
        (edited("model", "vocab", "cat</w>", value=2**70), "each id from 0 to 519 once"),
        (edited("model", "vocab", "cat</w>", value=True), "each id from 0 to 519 once"),
        (edited("model", "vocab", "cat</w>", value=1), "each id from 0 to 519 once"),
        (edited("model", "vocab", "a b", value=520), "byte symbols in 'vocab', got one with ' '"),
        (edited("model", "vocab", "", value=520), "no empty token"),
        (edited("model", "merges", value={}), "'merges' to be a JSON list of texts"),
        (edited("model", "merges", 0, value=["c", "a"]), "'merges' to be a JSON list of texts"),
        (edited("added_tokens", value=None), "'added_tokens' to be a JSON list"),
        (edited("added_tokens", 0, value="x"), "'added_tokens' to be a JSON object"),
        (edited("added_tokens", 0, "content", value="<mask>"), "once each in 'added_tokens', got \"<mask>\""),
        (edited("added_tokens", 0, "content", value=END), "once each in 'added_tokens'|have its id"),
        (edited("added_tokens", 0, "id", value=3), "<start_of_text> to have its id of 'vocab', got 3"),
        (edited("added_tokens", 1, drop=True), "<end_of_text> in 'added_tokens', got none"),
    ],
)
def test_each_kind_of_damage_has_its_message(data: bytes, message: str) -> None:
    assert Tokenizer.from_bytes(SMALL).vocab_size == 520
    with pytest.raises(BundleError, match=message):
        Tokenizer.from_bytes(data)


@pytest.mark.parametrize("merge", ["c", "c a t", "c z", "", " ", "\ud800 a"])
def test_a_merge_that_makes_no_token_is_found_at_the_first_text(merge: str) -> None:
    Tokenizer.from_bytes(edited("model", "merges", 0, value="c a")).check()
    tokenizer = Tokenizer.from_bytes(edited("model", "merges", 0, value=merge), name="my.json")
    with pytest.raises(BundleError, match=r"my\.json: expected merges of two tokens into a third"):
        tokenizer.encode("cat")


def use_all(data: bytes) -> None:
    """Reads a file and, where it is taken, uses it; only an error of ours may come out."""
    try:
        tokenizer = Tokenizer.from_bytes(data)
        tokenizer.tokenize(["A cat's caf\u00e9", "<end_of_text>!"], 8)
        tokenizer.decode(range(tokenizer.vocab_size))
    except MammutError as error:
        assert "expected" in str(error)


@given(st.binary(max_size=200))
def test_fuzz_any_bytes(data: bytes) -> None:
    use_all(data)


@settings(max_examples=300)
@given(st.data())
def test_fuzz_damaged_bytes(data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(SMALL)))
    last = data.draw(st.integers(first, min(len(SMALL), first + 40)))
    use_all(SMALL[:first] + data.draw(st.binary(max_size=20)) + SMALL[last:])


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([START, PAD, "a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300)
@given(st.data())
def test_fuzz_edited_values(data: st.DataObject) -> None:
    document = json.loads(SMALL)
    place: Any = document
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    if data.draw(st.booleans()):
        del place[key]
    else:
        place[key] = data.draw(JSON_VALUES)
    use_all(json.dumps(document).encode())
