"""CLIP's tokenizer against a slow restatement of its rule, on the captions of the conformance kit and on any text."""

from __future__ import annotations

import hashlib
import itertools
import json
import unicodedata
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mammut import clip_tokenizer
from mammut.clip_tokenizer import build_clip_tokenizer
from mammut_runtime.errors import CheckpointError
from mammut_runtime.tokenizer import END, START, Tokenizer, clean

KIT = Path(__file__).resolve().parents[3] / "shared" / "conformance" / "tokenizer"


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return Tokenizer.from_bytes(build_clip_tokenizer())


# --- the rule, restated: no regular expressions, no library, one merge at a time --------------------------------------


def kind_of(character: str) -> str:
    """L letter, N number, S space or dropped (U+0345 where case is ignored), P anything else."""
    if character == "\u0345":
        return "S"
    kind = unicodedata.category(character)[0]
    return "S" if character.isspace() else kind if kind in "LN" else "P"


def slow_pieces(text: str) -> list[str]:
    """The pieces of cleaned text, left to right: special tokens, English endings, letters, one digit, the rest."""
    words = (START, END, "'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
    pieces = []
    at = 0
    while at < len(text):
        rest = text[at : at + len(START)].replace("\u017f", "s")  # the long s is an s where case is ignored
        end = next((at + len(word) for word in words if rest.startswith(word)), at + 1)
        kind = kind_of(text[at])
        if end == at + 1 and kind in "LP":
            while end < len(text) and kind_of(text[end]) == kind:
                end += 1
        if kind != "S":
            pieces.append(text[at:end])
        at = end
    return pieces


@cache
def slow_tables() -> tuple[dict[str, int], dict[tuple[str, str], int], dict[int, str]]:
    """Token ids, merge ranks, and the symbol of each byte, from the list of merges alone."""
    path = Path(clip_tokenizer.__file__).parent / "assets" / "clip_merges.txt"
    merges = [tuple(line.split()) for line in path.read_text(encoding="utf-8").splitlines()]
    ranks = {(left, right): rank for rank, (left, right) in enumerate(merges)}
    printable = [byte for byte in range(256) if 0x20 < byte < 0x7F or (byte > 0xA0 and byte != 0xAD)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    singles = list(symbols.values())
    tokens = [*singles, *(symbol + "</w>" for symbol in singles), *map("".join, merges), START, END]
    return {token: number for number, token in enumerate(tokens)}, ranks, symbols


def slow_encode(text: str) -> list[int]:
    vocab, ranks, symbols = slow_tables()
    ids = []
    for piece in slow_pieces(clean(text)):
        if piece in (START, END):
            ids.append(vocab[piece])
            continue
        parts = [symbols[byte] for byte in piece.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            pairs = list(itertools.pairwise(parts))
            best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                break
            at = pairs.index(best)
            parts[at : at + 2] = ["".join(best)]
        ids += [vocab[part] for part in parts]
    return ids


FRAGMENTS = [
    START, END, START.upper(), "<\u017ftart_of_text>", "<\ufb06art_of_text>", "<&#xFB06;art_of_text>", "<", "!<",
    "<pad>", "'s", "'S", "'\u017f", "'T", "'re", "'VE", "'m", "'LL", "'d", "'", "\u017f", "\u212a", "\u0130",
    "\u0131", "\u00df", "\u03a3", "&amp;lt;", "&lt;", "&#39;", "&nbsp;", "&amp;nbsp;", "&#0;", "&#x80;", "&#xd800;",
    "&", "</w>", "\x00", "\x1c", "\x85", "\u2028", "\u00a0", "\u200b", "\u200d", "\ufeff", "\ud83d", "\ude00",
    "\ud800", "\U0001f600", "\u00c3\u00a9", "\u00e2\u20ac\u2122", "\u2019", "\u201c", "e\u0301", "\u0e20\u0e32",
    "\u0967\u0968", "\u0663", "\u2167", "\u00bd", "\u00b2", "\u4e2d\u6587", "\ud55c\uad6d", "\U0001f1e9\U0001f1ea",
    "...", "_", "10", "9", "\n", " ", "A dog", "supercalifragilistic", "photo of", "\x1b[31m", "#", "\ufffd",
    "\U0010ffff", "\u202e",
]  # fmt: skip


def assigned_long_ago(character: str) -> bool:
    """So that Python and the library agree on what it is, whatever their Unicode versions."""
    return unicodedata.ucd_3_2_0.category(character) != "Cn"


SETTLED = st.characters(max_codepoint=0xFFFF, exclude_categories=()).filter(assigned_long_ago)
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(SETTLED, max_size=8), max_size=12).map("".join)


@settings(max_examples=1000, deadline=None)
@given(TEXTS)
@example("a.<start_of_text><end_of_text>.<end_of_text>")
@example("<\u017ftart_of_text><start_of_text> it'\u017f")
@example("\u03b1\u0345 !\u0345! \u0345")
@example("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 9)
def test_any_text_gets_the_ids_of_the_slow_rule(clip: Tokenizer, text: str) -> None:
    assert clip.encode(text) == slow_encode(text)


def test_the_slow_rule_notices_a_wrong_tokenizer(clip: Tokenizer) -> None:
    """Control: without cleaning, and with special tokens taken anywhere, the same comparison fails."""
    tokenizers = pytest.importorskip("tokenizers")
    stock = tokenizers.Tokenizer.from_buffer(build_clip_tokenizer())
    assert stock.encode("a cat").ids == slow_encode("a cat")
    assert stock.encode("A cat").ids != slow_encode("A cat") == clip.encode("A cat")
    assert stock.encode("a!<end_of_text>").ids != slow_encode("a!<end_of_text>") == clip.encode("a!<end_of_text>")


# --- the vocabulary ---------------------------------------------------------------------------------------------------


def test_numbers_of_clip(clip: Tokenizer) -> None:
    assert (clip.vocab_size, clip.start_id, clip.end_id, clip.pad_id) == (49408, 49406, 49407, 0)
    assert clip.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert clip.tokenize(["a photo of a cat"], 9).tolist() == [[49406, 320, 1125, 539, 320, 2368, 49407, 0, 0]]
    assert clip.decode([0]) == "!"


def test_the_vocabulary_is_the_published_one() -> None:
    path = Path(clip_tokenizer.__file__).parent / "assets" / "clip_merges.txt"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    # A changed list would make public checkpoints read other words.
    assert digest == "d308b7377a8ceaa9707a21614fe8c831b9196e197b7aeb69833359362907af02"
    document = json.loads(build_clip_tokenizer())
    assert document["model"]["vocab"] == slow_tables()[0]
    assert build_clip_tokenizer() == build_clip_tokenizer()


def test_an_incomplete_list_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert build_clip_tokenizer()
    monkeypatch.setattr(clip_tokenizer, "CLIP_MERGES", 48_895)
    with pytest.raises(CheckpointError, match=r"expected 48895 merges .* got 48894; install"):
        build_clip_tokenizer()


def test_ids_in_any_order_decode_as_bytes_do(clip: Tokenizer) -> None:
    vocab, _, symbols = slow_tables()
    tokens = list(vocab)
    byte_of = {symbol: byte for byte, symbol in symbols.items()}
    ids = np.random.default_rng(7).integers(0, len(tokens), size=(500, 6))
    for row in ids:
        spelled = bytes(byte_of[symbol] for number in row for symbol in tokens[number])
        assert clip.decode(row, skip_special=False) == spelled.decode("utf-8", "replace").replace("</w>", " ")


# --- the conformance kit ----------------------------------------------------------------------------------------------


@pytest.mark.shared
def test_captions_of_the_kit(clip: Tokenizer) -> None:
    if not KIT.is_dir():
        pytest.skip("needs ../shared/conformance beside the repository")
    from safetensors.numpy import load_file

    meta = json.loads((KIT / "captions.json").read_text(encoding="utf-8"))
    rows = load_file(KIT / "captions.safetensors")
    texts = [caption["text"] for caption in meta["captions"]]
    assert len(texts) >= 34
    for caption in meta["captions"]:
        assert clip.encode(caption["text"]) == caption["encode"] == slow_encode(caption["text"])
        assert clip.decode(caption["encode"], skip_special=False) == caption["decode_of_encode"]
    assert clip.tokenize(texts, 77).tolist() == rows["ctx77"].tolist()
    assert clip.tokenize(texts, 16).tolist() == rows["ctx16"].tolist()
    for text, ids in zip(texts, (caption["encode"] for caption in meta["captions"]), strict=True):
        assert clip.count_cut(text, 16) == max(0, len(ids) - 14)
    assert clip.decode(rows["ctx77"][0], skip_special=False) == meta["decode_of_full_row_0"]
