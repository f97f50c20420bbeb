"""Training on a user's own image-text pairs: finds them, makes or takes a tokenizer, and describes the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mammut import presets
from mammut.bpe_training import train_tokenizer
from mammut.checkpoint import load_checkpoint
from mammut.config import MammutConfig
from mammut.data import Corpus, decode, plain_pair, read_folder, read_tars
from mammut.train import Job, TrainOptions
from mammut_runtime.errors import InputError
from mammut_runtime.preprocess import PreprocessRule
from mammut_runtime.tokenizer import Tokenizer

PROMPTS = {"caption": "", "ask": "question: {question} answer:", "zero_shot": "a photo of {}\n{}"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPARE = 1.17
"""Pictures are kept this much larger than the training size, so that crops stay sharp."""


@dataclass(frozen=True)
class FitOptions:
    """What a run on own pairs needs beside TrainOptions."""

    preset: str = "demo"
    """demo, tiny, paper-base, paper-huge or openmammut-SIZE (see presets.py)."""
    init: str | None = None
    """A checkpoint to start from: its config, tokenizer and preprocessing replace the preset's."""
    vocab_size: int = 2048
    """Of the tokenizer that is trained on the captions, where there is no `init`."""
    max_damaged: float = 0.01
    """Share of pictures that may be unreadable."""


def fit_job(
    sources: Sequence[Path],
    out: Path,
    fit: FitOptions,
    options: TrainOptions,
    warn: Callable[[str], None] = lambda message: None,
) -> Job:
    """Read the pairs and describe the run.

    Args:
        sources: WebDataset tars, and folders with a pairs.jsonl.

    Raises:
        InputError: a source cannot be used, an unknown preset, or texts that the model cannot hold.
        CheckpointError: `init` cannot be loaded.
    """
    if not sources:
        raise InputError("expected at least one WebDataset tar or folder with a pairs.jsonl, got none")
    start = None if fit.init is None else load_checkpoint(fit.init)
    image_size = _preset(fit.preset, 512).vision.image_size if start is None else start.preprocess.size
    corpora = tuple(_corpus(source, round(SPARE * image_size), fit.max_damaged, warn) for source in sources)
    if start is not None:
        tokenizer_json, config, rule, prompts = (
            start.tokenizer_json,
            start.model.config,
            start.preprocess,
            start.prompts,
        )
        weights = {name: value.clone() for name, value in start.model.state_dict().items()}
        options = dataclasses.replace(options, initial="plain")
        return Job(config, tokenizer_json, rule, prompts, corpora, options, out, weights=weights)
    tokenizer_json = train_tokenizer(all_texts(corpora), fit.vocab_size)
    config = _preset(fit.preset, Tokenizer.from_bytes(tokenizer_json).vocab_size)
    rule = PreprocessRule(image_size, MEAN, STD, "bicubic", "squash", 0)
    return Job(config, tokenizer_json, rule, PROMPTS, corpora, options, out)


def all_texts(corpora: Sequence[Corpus]) -> list[str]:
    """Every caption, question and answer."""
    return [
        text
        for corpus in corpora
        for pair in corpus.pairs
        for text in (*pair.captions, *(f"question: {q} answer: {a}" for q, a in pair.questions))
    ]


def _corpus(source: Path, side: int, max_damaged: float, warn: Callable[[str], None]) -> Corpus:
    pairs = list(read_folder(source) if source.is_dir() else read_tars([source], plain_pair))
    # A set counts by its size: every pair of every source is drawn equally often.
    return decode(str(source), pairs, side, weight=float(len(pairs)), max_damaged=max_damaged, warn=warn)


def _preset(name: str, vocab_size: int) -> MammutConfig:
    """The preset with the vocabulary of the trained tokenizer."""
    makers: dict[str, Callable[[], MammutConfig]] = {
        "demo": presets.demo,
        "tiny": presets.tiny,
        "paper-base": presets.paper_base,
        "paper-huge": presets.paper_huge,
        **{f"openmammut-{size}": lambda size=size: presets.openmammut(size) for size in presets.OPENMAMMUT_SIZES},  # type: ignore[misc]
    }
    if name not in makers:
        raise InputError(f"unknown preset {name!r}; expected one of {', '.join(makers)}")
    config = makers[name]()
    text = dataclasses.replace(config.text, vocab_size=vocab_size, embedding_rows=vocab_size)
    return dataclasses.replace(config, text=text)
