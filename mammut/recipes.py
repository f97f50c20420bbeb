"""Runs to begin with: the paper's pre-training, and fine-tuning for captions, questions and retrieval.

Each is a RunConfig to be edited. Where the paper gives no number, the docstring says what was chosen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from mammut import presets
from mammut.checkpoint import load_checkpoint
from mammut.config import MammutConfig
from mammut.lora import LoraOptions
from mammut.objective import ObjectiveOptions
from mammut.optimizers import OptimizerOptions
from mammut.parallel import ParallelOptions
from mammut.run_config import DataOptions, RunConfig, SaveOptions, StageOptions
from mammut_runtime.errors import InputError
from mammut_runtime.preprocess import PreprocessRule

PROMPTS = {"caption": "", "ask": "question: {question} answer:", "zero_shot": "a photo of {}\n{}"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Recipe = Literal["caption", "ask", "retrieval"]


def model_preset(name: str, vocab_size: int | None = None) -> MammutConfig:
    """A preset by name, with another vocabulary where one is given. InputError for an unknown name."""
    makers = {
        "tiny": presets.tiny,
        "demo": presets.demo,
        "paper-base": presets.paper_base,
        "paper-huge": presets.paper_huge,
    }
    size = name.removeprefix("openmammut-")
    if name not in makers and size not in presets.OPENMAMMUT_SIZES:
        raise InputError(f"unknown model {name!r}; expected {', '.join(makers)} or openmammut-SIZE (openmammut-B-32)")
    config = makers[name]() if name in makers else presets.openmammut(size)
    if vocab_size is None:
        return config
    text = dataclasses.replace(config.text, vocab_size=vocab_size, embedding_rows=vocab_size)
    return dataclasses.replace(config, text=text)


def pretrain(model: MammutConfig, sources: Sequence[str], tokenizer: str) -> RunConfig:
    """The paper's recipe for its own models (section 4): 500,000 steps, then 100,000 with cropped positions; AdamW with
    weight decay 0.01, rate 1e-3, 10,000 steps of warm-up, linear decay; batch 16,384 (huge) or 4,096; both losses at 1;
    pictures resized to 272 and cropped to 224. Not in the paper: a tenth of the rate in the second stage. The small
    presets get a small batch and 2,000 steps: something for a laptop to finish."""
    paper = model.name.startswith(("paper-", "openmammut-"))
    size = model.vision.image_size
    stages: tuple[StageOptions, ...] = (StageOptions(2_000, size, 1e-3, 100, "linear", False),)
    if paper:
        first = StageOptions(500_000, size, 1e-3, 10_000, "linear", False)
        stages = (first, StageOptions(100_000, size, 1e-4, 1_000, "linear", True))
    huge = model.name == "paper-huge"
    return RunConfig(
        format="mammut-edge run 1",
        model=model,
        start="",
        tokenizer=tokenizer,
        preprocess=PreprocessRule(size, MEAN, STD, "bicubic", "squash", 0),
        prompts=PROMPTS,
        data=_data(sources, "pairs", margin=272 / 224, workers=8 if paper else 2),
        objective=ObjectiveOptions(),
        optimizer=OptimizerOptions(),
        lora=None,
        stages=stages,
        batch_size=16_384 if huge else 4_096 if paper else 64,
        micro_batches=1,
        parallel=ParallelOptions("fsdp" if huge else "ddp", "bf16", recompute_blocks=paper),
        save=SaveOptions(1_000 if paper else 200, 3, "sharded" if huge else "whole", 50 if paper else 10, False),
        explode_factor=3.0,
        seed=0,
    )


def finetune(
    recipe: Recipe, start: str, sources: Sequence[str], *, image_size: int | None = None, lora: bool = False
) -> RunConfig:
    """Fine-tuning from a checkpoint of ours or of openMaMMUT; the paper gives no numbers for it.

    caption: both losses, the contrastive at a tenth, so that matching is not forgotten. ask: question as prefix, loss
    on the answer only. retrieval: the contrastive loss alone. A rate of 2e-5 that falls by 0.9 from layer to layer;
    with low-rank adaptation 2e-4.

    Errors as load_checkpoint's.
    """
    found = load_checkpoint(start, image_size=image_size)
    objective = {
        "caption": ObjectiveOptions(contrastive_weight=0.1, caption_weight=1.0),
        "ask": ObjectiveOptions(contrastive_weight=0.0, caption_weight=1.0),
        "retrieval": ObjectiveOptions(contrastive_weight=1.0, caption_weight=0.0),
    }[recipe]
    rate = 2e-4 if lora else 2e-5
    return RunConfig(
        format="mammut-edge run 1",
        model=found.model.config,
        start=start,
        tokenizer="",
        preprocess=found.preprocess,
        prompts=found.prompts,
        data=_data(sources, "ask" if recipe == "ask" else "pairs", margin=1.1, workers=2),
        objective=objective,
        optimizer=OptimizerOptions(layer_decay=1.0 if lora else 0.9),
        lora=LoraOptions() if lora else None,
        stages=(StageOptions(5_000, found.model.config.vision.image_size, rate, 250, "cosine", False),),
        batch_size=256 if recipe == "retrieval" else 64,
        micro_batches=1,
        parallel=ParallelOptions(),
        save=SaveOptions(500, 2, "whole", 10, False),
        explode_factor=3.0,
        seed=0,
    )


def _data(sources: Sequence[str], task: Literal["pairs", "ask"], *, margin: float, workers: int) -> DataOptions:
    return DataOptions(
        sources=tuple(sources),
        task=task,
        workers=workers,
        shuffle=1_000,
        margin=margin,
        mirror=False,
        max_damaged_pictures=0.01,
        max_damaged_shards=0.01,
    )
