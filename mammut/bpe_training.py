"""Trains a small byte-level vocabulary on the captions at hand, in the same form and by the same rules as CLIP's.

The `tokenizers` library counts and merges. Its own handling of word ends is not used: it numbers them in the order of a
hash map, so that equal counts fall differently from run to run. Here each byte that ends a word is a character of its
own, known beforehand, and the same captions always give the same file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from mammut_runtime.errors import InputError
from mammut_runtime.tokenizer import END, PAD, START, WORD_END, byte_alphabet, clean, pack_tokenizer, pre_tokenizer

MIN_VOCAB_SIZE = 3 + 2 * 256
"""Three special tokens, and every byte inside a word and at its end: with these any text can be written."""

MAX_VOCAB_SIZE = 2**20
"""Far above any use; keeps a slip of the keyboard from training for hours."""

_FINAL_BASE = 0xE000  # private use: no caption can hold these characters, because pieces are made of byte symbols


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """A tokenizer.json learned from `texts` (cleaned here); `<pad>` is id 0, `<start_of_text>` 1, `<end_of_text>` 2.

    The vocabulary has `vocab_size` ids, or fewer where the texts have too few pairs that occur twice: read the size
    from the result. The same texts give the same bytes. Raises InputError for a size out of range or texts without a
    word.
    """
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise InputError(
            f"expected a vocabulary size from {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}, got {vocab_size}; "
            "2048 to 4096 suits a few thousand captions"
        )
    symbols = byte_alphabet()
    finals = {symbol: chr(_FINAL_BASE + rank) for rank, symbol in enumerate(symbols)}
    merges = _train_merges(_marked_texts(texts, finals), [*symbols, *finals.values()], vocab_size - 3)
    plain = {final: symbol + WORD_END for symbol, final in finals.items()}
    pairs = [(_spell(left, plain), _spell(right, plain)) for left, right in merges]
    # Two pairs may make the same token ("a"+"bc", "ab"+"c"): it has one id, and both merges stay.
    tokens = dict.fromkeys([PAD, START, END, *symbols, *plain.values(), *(left + right for left, right in pairs)])
    return pack_tokenizer(list(tokens), pairs)


def _marked_texts(texts: Iterable[str], finals: dict[str, str]) -> Iterator[str]:
    """Each text as its pieces in byte symbols, the last symbol of each replaced by its final form, joined by spaces."""
    splitter = pre_tokenizer()
    seen = False
    for text in texts:
        pieces = [piece for piece, _ in splitter.pre_tokenize_str(clean(text)) if piece not in (START, END)]
        seen = seen or bool(pieces)
        yield " ".join(piece[:-1] + finals[piece[-1]] for piece in pieces)
    if not seen:
        raise InputError("expected texts with at least one word to learn from, got none; check the captions")


def _train_merges(lines: Iterator[str], alphabet: list[str], size: int) -> list[list[str]]:
    """Merges, best first, over single characters of `alphabet`; `size` counts the alphabet too."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(lines, trainer)
    merges: list[list[str]] = json.loads(model.to_str())["model"]["merges"]
    return merges


def _spell(token: str, plain: dict[str, str]) -> str:
    """A trained token in the file's spelling: its final character, if any, as the byte symbol and the word end."""
    return "".join(plain.get(character, character) for character in token)
