"""Text to token ids and back, by the rule of the CLIP family, from one `tokenizer.json`.

The file is in the form of the Hugging Face `tokenizers` library, restricted to the one kind of tokenizer our models
use: byte-level pair merges with a `</w>` word end and CLIP's way of cutting text into pieces. This module alone reads
and writes that form; `mammut.clip_tokenizer` and `mammut.bpe_training` supply vocabularies.

Every part of the file is checked here before the library sees it, because the library answers damage with bare
exceptions and panics. Two things are put off until they are needed, to start fast on a device: the library's own tables
(a model that only writes captions never builds them) and the import of ftfy (plain ASCII text does not need it).
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mammut_runtime.errors import BundleError, InputError

START, END, PAD = "<start_of_text>", "<end_of_text>", "<pad>"
"""The special tokens. A file must have START and END; without PAD rows are padded with id 0, as CLIP does."""

WORD_END = "</w>"
"""What marks the last symbol of a piece in the vocabulary; it becomes a space in decoded text."""

MAX_FILE_BYTES = 64 * 2**20
"""A tokenizer.json above this is refused unread. CLIP's 49,408 tokens take 1.5 MB."""

MAX_TEXT_CHARS = 100_000
"""A text above this is refused: models read tens of tokens, and cleaning can cost 25 microseconds a character."""

_SPLIT = r"<[sſ]tart_of_text>|<end_of_text>|'[sſ]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"
# CLIP compiles its pattern to ignore case and applies it to lower-case text. That matters for two characters that
# lower() keeps, spelled out here: the long s counts as an s, and U+0345, a Greek mark with a letter for its upper case,
# is neither a letter nor anything else, so CLIP drops it. Ignoring case in the library's own regular expressions goes
# further (`st` would match the ligature U+FB06). Found by trying every character of Unicode 16: no other one differs.

_PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Removed", "invert": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}
_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "Replace", "pattern": {"String": WORD_END}, "content": " "},
    ],
}
_OUTER: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "normalizer": None,
    "pre_tokenizer": _PRE_TOKENIZER,
    "post_processor": None,
    "decoder": _DECODER,
}
_MODEL: dict[str, Any] = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": WORD_END,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}
_ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}

_REMEDY = "export the bundle or download the checkpoint again"

_PLAIN = re.compile(r"[\t\n\r -%'-~]*")  # printable ASCII without '&': ftfy and html.unescape leave it as it is


def clean(text: str) -> str:
    """Text as CLIP-family models were trained to see it: repaired, without HTML escapes, single spaces, lower case.

    Raises InputError for what is not a string, and above MAX_TEXT_CHARS.
    """
    if not isinstance(text, str):
        raise InputError(f"expected a text (str), got {type(text).__name__}; pass one string per text")
    if len(text) > MAX_TEXT_CHARS:
        raise InputError(f"expected a text of at most {MAX_TEXT_CHARS} characters, got {len(text)}; shorten it")
    if _PLAIN.fullmatch(text) is None:
        import ftfy  # 90 ms on a desktop core, so only where a text needs it

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def byte_alphabet() -> tuple[str, ...]:
    """The 256 characters that stand for bytes inside vocabularies, in the order of CLIP's first 256 token ids.

    Printable Latin-1 stands for itself; the other bytes, in order, are U+0100 and up.
    """
    return tuple(_byte_of_symbol())


def pack_tokenizer(tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> bytes:
    """A tokenizer.json for `tokens` (position = id, special tokens among them) and `merges` (best first), as UTF-8.

    Raises BundleError where the result would not be readable, for example a merge of tokens that do not exist.
    """
    added = [{"id": tokens.index(name), "content": name} | _ADDED for name in (PAD, START, END) if name in tokens]
    vocab = {token: number for number, token in enumerate(tokens)}
    # Merges as one string each: a third less to parse than pairs, and older versions of the library read only this.
    model = _MODEL | {"vocab": vocab, "merges": [f"{left} {right}" for left, right in merges]}
    data = json.dumps(_OUTER | {"added_tokens": added, "model": model}, ensure_ascii=False, separators=(",", ":"))
    encoded = data.encode("utf-8", errors="surrogatepass")
    Tokenizer.from_bytes(encoded, "new tokenizer").check()
    return encoded


def pre_tokenizer() -> Any:
    """What cuts cleaned text into pieces of byte symbols: a `tokenizers.pre_tokenizers.Sequence`."""
    from tokenizers import pre_tokenizers

    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([_make_splitter(), to_bytes])


class Tokenizer:
    """Encodes and decodes text by one vocabulary. Immutable after loading, safe to share between threads.

    Cutting into pieces follows the Unicode tables of the `tokenizers` library; characters that were assigned after them
    count as punctuation.
    """

    def __init__(self, tables: _Tables) -> None:
        self._tables = tables
        self._encoder: Any = None
        self._splitter: Any = None
        self._texts: list[str] | None = None

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Reads a tokenizer.json. Raises BundleError for a file that is missing, too large, or of another form."""
        path = Path(path)
        try:
            with path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            reason = error.strerror or str(error)
            raise BundleError(f"{path}: expected a readable tokenizer file, got: {reason}; check the path") from error
        return cls(_read_tables(data, str(path)))

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "tokenizer.json") -> Tokenizer:
        """Reads the content of a tokenizer.json; `name` is what errors call it. Raises as `from_file` does."""
        return cls(_read_tables(data, name))

    def check(self) -> None:
        """Does now what would be done at the first text: raises BundleError where a merge names no token."""
        self._build_encoder()

    @property
    def start_id(self) -> int:
        """Id that opens every row."""
        return self._tables.start_id

    @property
    def end_id(self) -> int:
        """Id that closes every row."""
        return self._tables.end_id

    @property
    def pad_id(self) -> int:
        """Id that fills a row after its end: that of `<pad>`, or 0 where the vocabulary has none (CLIP: also `!`)."""
        return self._tables.pad_id

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included; ids are 0 .. vocab_size - 1."""
        return len(self._tables.vocab)

    def clean(self, text: str) -> str:
        """The text as `encode` sees it; the same as the module's `clean`."""
        return clean(text)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without start and end. A spelled-out `<end_of_text>` or start gives its id, as in CLIP."""
        cleaned = clean(text)
        if not cleaned:
            return []
        encoder = self._build_encoder()
        if START not in cleaned and END not in cleaned:
            return self._encode_plain(encoder, cleaned)
        # Only a special token that is a piece of its own counts: in "wow!<end_of_text>" piece "!<" swallows its start.
        ids: list[int] = []
        done = 0
        for piece, (first, last) in self._splitter.pre_tokenize_str(cleaned):
            if piece in (START, END):
                ids += self._encode_plain(encoder, cleaned[done:first])
                ids.append(self._tables.vocab[piece])
                done = last
        return ids + self._encode_plain(encoder, cleaned[done:])

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD. Pieces are separated by single spaces ("don 't stop !").

        skip_special=True leaves the special tokens out and strips the ends. False is the public decode to the letter:
        special tokens are spelled out and the last piece keeps its space. Raises InputError for an id out of range.
        """
        texts = self._build_texts()
        parts = []
        for number in ids:
            if not 0 <= number < len(texts):
                raise InputError(
                    f"expected token ids from 0 to {len(texts) - 1}, got {number}; "
                    "the ids come from a model with another vocabulary"
                )
            if not (skip_special and number in self._tables.special_ids):
                parts.append(texts[number])
        byte_of = _byte_of_symbol()
        text = bytes(byte_of[symbol] for symbol in "".join(parts)).decode("utf-8", errors="replace")
        # After decoding, as the public rule does: ids that happen to spell the word end also become a space.
        text = text.replace(WORD_END, " ")
        return text.strip() if skip_special else text

    def tokenize(self, texts: Sequence[str], context_length: int) -> NDArray[np.int64]:
        """Rows for the text tower, int64[N, context_length]: start, ids, end, then pad. Too long a text loses its tail.

        `count_cut` says how much. Raises InputError for a context_length below 2 or a single string in place of a list.
        """
        if isinstance(texts, (str, bytes)):
            raise InputError("expected a list of texts, got one text; put it in a list")
        _check_context(context_length)
        rows = np.full((len(texts), context_length), self.pad_id, dtype=np.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = [self.start_id, *self.encode(text)[: context_length - 2], self.end_id]
            row[: len(ids)] = ids
        return rows

    def count_cut(self, text: str, context_length: int) -> int:
        """How many tokens of a text `tokenize` cuts off for want of room; 0 when it fits."""
        _check_context(context_length)
        return max(0, len(self.encode(text)) + 2 - context_length)

    def _encode_plain(self, encoder: Any, cleaned: str) -> list[int]:
        ids: list[int] = encoder.encode(cleaned, add_special_tokens=False).ids
        return ids

    def _build_encoder(self) -> Any:
        if self._encoder is None:
            import tokenizers

            encoder = tokenizers.Tokenizer(self._build_model())
            encoder.pre_tokenizer = pre_tokenizer()
            self._splitter = _make_splitter()
            self._encoder = encoder  # last, so that another thread never sees half of it
        return self._encoder

    def _build_model(self) -> Any:
        from tokenizers import models

        tables = self._tables
        try:
            pairs = [(left, right) for left, right in (merge.split(" ") for merge in tables.merges)]
            return models.BPE(tables.vocab, pairs, end_of_word_suffix=WORD_END)
        except Exception as error:  # the library raises nothing narrower for a merge that makes no token
            raise BundleError(
                f"{tables.name}: expected merges of two tokens into a third, got: {error}; {_REMEDY}"
            ) from error

    def _build_texts(self) -> list[str]:
        if self._texts is None:
            vocab = self._tables.vocab
            self._texts = sorted(vocab, key=vocab.__getitem__)
        return self._texts


@dataclass(frozen=True)
class _Tables:
    """What a checked tokenizer.json says: every id from 0 up is used once, every token is made of byte symbols."""

    name: str
    vocab: dict[str, int]
    merges: list[str]
    start_id: int
    end_id: int
    pad_id: int
    special_ids: frozenset[int]


def _read_tables(data: bytes, name: str) -> _Tables:
    try:
        vocab, merges, special = _parse(data)
    except RecursionError as error:
        raise BundleError(f"{name}: expected a tokenizer file, got JSON nested too deeply; {_REMEDY}") from error
    except ValueError as error:
        raise BundleError(f"{name}: {error}; {_REMEDY}") from error
    return _Tables(name, vocab, merges, special[START], special[END], special.get(PAD, 0), frozenset(special.values()))


def _parse(data: bytes) -> tuple[dict[str, int], list[str], dict[str, int]]:
    """Vocabulary, merges and special ids. Raises ValueError with what was expected and what was found."""
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"expected a tokenizer file of at most {MAX_FILE_BYTES} bytes, got more")
    try:
        document = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"expected JSON in UTF-8, got other bytes at {error.start}") from error
    except ValueError as error:
        raise ValueError(f"expected JSON, got: {error}") from error
    _check_fields(document, _OUTER, ("added_tokens", "model"), "the file")
    _check_fields(document["model"], _MODEL, ("vocab", "merges"), "'model'")
    vocab = _check_vocab(document["model"]["vocab"])
    merges = _check_merges(document["model"]["merges"])
    return vocab, merges, _check_added(document["added_tokens"], vocab)


def _check_fields(found: object, fixed: dict[str, Any], free: tuple[str, ...], where: str) -> None:
    """Exactly the keys of `fixed` and `free`; those of `fixed` with exactly its values."""
    if not isinstance(found, dict):
        raise ValueError(f"expected {where} to be a JSON object, got {_brief(found)}")
    if unknown := found.keys() - fixed.keys() - set(free):
        raise ValueError(f"expected no key {_brief(min(unknown))} in {where}, got one")
    if missing := (fixed.keys() | set(free)) - found.keys():
        raise ValueError(f"expected key {min(missing)!r} in {where}, got none")
    for key, value in fixed.items():
        # Compared as JSON text, because to Python 0 == False.
        if json.dumps(found[key], sort_keys=True) != json.dumps(value, sort_keys=True):
            raise ValueError(f"expected {key!r} in {where} to be {_brief(value)}, got {_brief(found[key])}")


def _check_vocab(vocab: object) -> dict[str, int]:
    if not isinstance(vocab, dict):
        raise ValueError(f"expected 'vocab' to be a JSON object, got {_brief(vocab)}")
    if set(map(type, vocab.values())) != {int} or set(vocab.values()) != set(range(len(vocab))):
        raise ValueError(f"expected each id from 0 to {len(vocab) - 1} once in 'vocab', got others")
    symbols = byte_alphabet()
    if strange := set("".join(vocab)) - set(symbols):
        raise ValueError(f"expected tokens of byte symbols in 'vocab', got one with {min(strange)!r}")
    if "" in vocab:
        raise ValueError("expected no empty token in 'vocab', got one")
    for token in chain(symbols, (symbol + WORD_END for symbol in symbols), (START, END)):
        if token not in vocab:
            raise ValueError(f"expected token {token!r} in 'vocab', got none")
    return vocab


def _check_merges(merges: object) -> list[str]:
    # Whether the tokens exist is left to the library, which looks each one up anyway: a loop here took 40 ms of 90.
    if not isinstance(merges, list) or not set(map(type, merges)) <= {str}:
        raise ValueError("expected 'merges' to be a JSON list of texts, got others")
    return merges


def _check_added(added: object, vocab: dict[str, int]) -> dict[str, int]:
    if not isinstance(added, list):
        raise ValueError(f"expected 'added_tokens' to be a JSON list, got {_brief(added)}")
    special: dict[str, int] = {}
    for entry in added:
        _check_fields(entry, _ADDED, ("id", "content"), "'added_tokens'")
        content, number = entry["content"], entry["id"]
        if content not in (PAD, START, END) or content in special:
            raise ValueError(f"expected {PAD}, {START} and {END} once each in 'added_tokens', got {_brief(content)}")
        if type(number) is not int or vocab.get(content) != number:
            raise ValueError(f"expected {content} to have its id of 'vocab', got {_brief(number)}")
        special[content] = number
    for name in (START, END):
        if name not in special:
            raise ValueError(f"expected {name} in 'added_tokens', got none")
    return special


def _check_context(context_length: int) -> None:
    if not 2 <= context_length <= MAX_TEXT_CHARS:
        raise InputError(
            f"expected a context length from 2 to {MAX_TEXT_CHARS}, got {context_length}; use the one in the manifest"
        )


def _brief(value: object) -> str:
    """A value for an error message: JSON, at most 60 characters."""
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 60 else text[:57] + "..."


def _make_splitter() -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(_SPLIT), behavior="removed", invert=True)


@cache
def _byte_of_symbol() -> dict[str, int]:
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(0x100 + rank): byte for rank, byte in enumerate(other)}
