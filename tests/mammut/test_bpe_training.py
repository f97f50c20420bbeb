"""Training a small vocabulary: special ids, size, nothing lost, and the same bytes each time."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mammut.bpe_training import MIN_VOCAB_SIZE, train_tokenizer
from mammut_runtime.errors import InputError
from mammut_runtime.tokenizer import END, PAD, START, Tokenizer, clean

COLOURS = ["red", "green", "blue", "yellow", "black", "white"]
THINGS = ["shirt", "t-shirt", "dress", "shoe", "flower", "caf\u00e9", "dog", "cat", "car"]
CAPTIONS = [f"A photo of a {colour} {thing}, don't you see?" for colour in COLOURS for thing in THINGS]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.from_bytes(train_tokenizer(CAPTIONS, 560))


def test_special_ids_and_size(trained: Tokenizer) -> None:
    assert (trained.pad_id, trained.start_id, trained.end_id, trained.vocab_size) == (0, 1, 2, 560)
    assert trained.tokenize(["red"], 6)[0].tolist()[-1] == trained.pad_id
    document = json.loads(train_tokenizer(CAPTIONS, 560))
    assert [token for token, _ in zip(document["model"]["vocab"], range(3), strict=False)] == [PAD, START, END]


def test_frequent_words_become_one_token(trained: Tokenizer) -> None:
    assert len(trained.encode("a photo of a red")) == 5
    assert len(trained.encode("zebra")) > 1
    assert trained.decode(trained.encode("A photo of a RED caf\u00e9!")) == "a photo of a red caf\u00e9 !"


@given(st.text(st.characters(exclude_categories=()), max_size=60))
def test_unseen_text_loses_nothing_but_spacing(text: str) -> None:
    tokenizer = Tokenizer.from_bytes(SMALLEST)
    back = tokenizer.decode(tokenizer.encode(text), skip_special=False)
    assert back.replace(" ", "") == clean(text).replace(" ", "").replace("\u0345", "")  # CLIP drops this mark


SMALLEST = train_tokenizer(["cat"], MIN_VOCAB_SIZE)


def test_too_few_repeated_pairs_give_a_smaller_vocabulary() -> None:
    assert Tokenizer.from_bytes(train_tokenizer(["cat"], 5000)).vocab_size == MIN_VOCAB_SIZE
    assert Tokenizer.from_bytes(train_tokenizer(["cat cat"], 5000)).vocab_size == MIN_VOCAB_SIZE + 2


def test_the_order_of_texts_does_not_matter_but_the_texts_do() -> None:
    data = train_tokenizer(CAPTIONS, 560)
    assert data == train_tokenizer(iter(CAPTIONS[::-1]), 560)
    assert data != train_tokenizer([*CAPTIONS, "zebra zebra zebra"], 700)


def test_other_processes_train_the_same_bytes() -> None:
    """Equal counts abound here; the library's own word ends would break the ties by the order of a hash map."""
    words = ["".join(letters) for letters in itertools.permutations("abcde", 4)]
    code = (
        "import hashlib, sys\n"
        "from mammut.bpe_training import train_tokenizer\n"
        "print(hashlib.sha256(train_tokenizer(sys.stdin.read().splitlines(), 700)).hexdigest())\n"
    )
    texts = "\n".join(words * 2)
    digests = {hashlib.sha256(train_tokenizer(texts.splitlines(), 700)).hexdigest()}
    for seed in "123":
        run = subprocess.run(
            [sys.executable, "-c", code], input=texts, env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        digests.add(run.stdout.strip())
    assert len(digests) == 1


def test_special_tokens_in_captions_are_not_learned() -> None:
    plain = train_tokenizer(["cat dog"] * 4, 600)
    assert train_tokenizer([f"{START} cat {END} dog"] * 4, 600) == plain
    assert train_tokenizer(["cat start dog"] * 4, 600) != plain


@pytest.mark.parametrize("size", [0, -1, MIN_VOCAB_SIZE - 1, 2**20 + 1])
def test_sizes_out_of_range_are_refused(size: int) -> None:
    with pytest.raises(InputError, match=f"vocabulary size from 515 to 1048576, got {size}"):
        train_tokenizer(CAPTIONS, size)


@pytest.mark.parametrize("texts", [[], ["", " \n"], [START]])
def test_texts_without_a_word_are_refused(texts: list[str]) -> None:
    assert train_tokenizer([*texts, "cat"], 600)
    with pytest.raises(InputError, match="at least one word"):
        train_tokenizer(texts, 600)
