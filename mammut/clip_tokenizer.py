"""The vocabulary of OpenAI's CLIP as a tokenizer.json, for checkpoints that were trained with it (openMaMMUT).

The list of merges in `assets/clip_merges.txt` is CLIP's, under the MIT licence; NOTICE credits it. Everything else
about the tokenizer follows from that list and is written by `mammut_runtime.tokenizer`.
"""

from __future__ import annotations

from importlib import resources

from mammut_runtime.errors import CheckpointError
from mammut_runtime.tokenizer import END, START, WORD_END, byte_alphabet, pack_tokenizer

CLIP_MERGES = 48_894
"""Merges of CLIP's list that are in use; with 512 byte tokens and two special ones they make 49,408 ids."""


def build_clip_tokenizer() -> bytes:
    """CLIP's tokenizer as the content of a tokenizer.json: 49,408 ids, start 49406, end 49407, pad 0 (also `!`).

    Raises CheckpointError where the installed list of merges is incomplete.
    """
    text = resources.files("mammut").joinpath("assets", "clip_merges.txt").read_text(encoding="utf-8")
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in text.splitlines())]
    if len(merges) != CLIP_MERGES:
        raise CheckpointError(
            f"expected {CLIP_MERGES} merges in assets/clip_merges.txt, got {len(merges)}; install mammut-edge again"
        )
    symbols = byte_alphabet()
    final_symbols = [symbol + WORD_END for symbol in symbols]
    merged = [left + right for left, right in merges]
    return pack_tokenizer([*symbols, *final_symbols, *merged, START, END], merges)
