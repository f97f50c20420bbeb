"""Runs to begin with: the paper's pre-training, small sets of pictures, fine-tuning for captions, questions, retrieval.

Each is a RunConfig to be edited. Where the paper gives no number, the docstring says what was chosen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from mammut import presets
from mammut.bpe_training import train_tokenizer
from mammut.checkpoint import load_checkpoint
from mammut.config import MammutConfig
from mammut.data.augment import AugmentOptions
from mammut.data.pairs import plain_pair
from mammut.data.shards import expand, samples_of
from mammut.training.lora import LoraOptions
from mammut.training.objective import ObjectiveOptions
from mammut.training.optimizers import OptimizerOptions
from mammut.training.parallel import ParallelOptions
from mammut.training.run_config import DataOptions, RunConfig, SaveOptions, Source, StageOptions
from mammut_runtime.errors import InputError
from mammut_runtime.preprocess import PreprocessRule
from mammut_runtime.tokenizer import Tokenizer

PROMPTS = {"caption": "", "ask": "question: {question} answer:", "zero_shot": "a photo of {}\n{}"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Recipe = Literal["caption", "ask", "retrieval", "video-caption", "video-ask"]


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
        initial="plain",
        preprocess=PreprocessRule(size, MEAN, STD, "bicubic", "squash", 0),
        prompts=PROMPTS,
        data=_data(sources, question_share=0.0, margin=272 / 224, workers=8 if paper else 2),
        objective=ObjectiveOptions(),
        optimizer=OptimizerOptions(),
        lora=None,
        stages=stages,
        batch_size=16_384 if huge else 4_096 if paper else 64,
        micro_batches=1,
        parallel=ParallelOptions("fsdp" if huge else "ddp", "bf16", recompute_blocks=paper),
        save=SaveOptions(
            1_000 if paper else 200, 3, "sharded" if huge else "whole", 50 if paper else 10, False, "float32"
        ),
        explode_factor=3.0,
        seed=0,
    )


def finetune(
    recipe: Recipe, start: str, sources: Sequence[str], *, image_size: int | None = None, lora: bool = False
) -> RunConfig:
    """Fine-tuning from a checkpoint of ours or of openMaMMUT; the paper gives no numbers for it.

    caption: both losses, the contrastive at a tenth, so that matching is not forgotten. ask: question as prefix, loss
    on the answer only. retrieval: the contrastive loss alone. A rate of 2e-5 that falls by 0.9 from layer to layer;
    with low-rank adaptation 2e-4. video-caption, video-ask: the same from clips; a model that has seen pictures only
    gets tubes (presets.video_for), which learn at the full rate.

    Errors as load_checkpoint's.
    """
    found = load_checkpoint(start, image_size=image_size)
    model, of_clips, task = found.model.config, recipe.startswith("video-"), recipe.removeprefix("video-")
    if of_clips and model.video is None:
        model = dataclasses.replace(model, video=presets.video_for(model.vision))
    objective = {
        "caption": ObjectiveOptions(contrastive_weight=0.1, caption_weight=1.0),
        "ask": ObjectiveOptions(contrastive_weight=0.0, caption_weight=1.0),
        "retrieval": ObjectiveOptions(contrastive_weight=1.0, caption_weight=0.0),
    }[task]
    rate = 2e-4 if lora else 2e-5
    return RunConfig(
        format="mammut-edge run 1",
        model=model,
        start=start,
        tokenizer="",
        initial="plain",
        preprocess=found.preprocess,
        prompts=found.prompts,
        data=_data(
            sources,
            question_share=1.0 if task == "ask" else 0.0,
            margin=1.1,
            workers=2,
            kind="clip" if of_clips else "photo",
        ),
        objective=objective,
        optimizer=OptimizerOptions(layer_decay=1.0 if lora else 0.9),
        lora=LoraOptions() if lora else None,
        stages=(StageOptions(5_000, model.vision.image_size, rate, 250, "cosine", False),),
        batch_size={"retrieval": 256, "video-caption": 32, "video-ask": 32}.get(recipe, 64),
        micro_batches=1,
        parallel=ParallelOptions(),
        save=SaveOptions(500, 2, "whole", 10, False, "float32"),
        explode_factor=3.0,
        seed=0,
    )


def small_set(
    model: MammutConfig, sources: Sequence[Source], steps: int, *, tokenizer: str = "", start: str = ""
) -> RunConfig:
    """For thousands instead of millions of pictures, within an hour or two on a CPU: what the demo was found with.

    Muon beside AdamW, averaged weights, strong augmentation, a start that suits small sets; three quarters of the
    steps at two thirds of the picture size.

    Args:
        start: a checkpoint to start from instead of random weights; `model` is then its config.
    """
    size, patch = model.vision.image_size, model.vision.patch_size
    small = max(patch, round(size * 2 / 3 / patch) * patch)
    early = max(1, round(0.75 * steps))
    stages = [StageOptions(early, small, 1e-3, min(100, early // 2), "cosine", False)]
    if steps > early:
        stages.append(StageOptions(steps - early, size, 1e-3, 0, "continued", False))
    base = pretrain(model, (), tokenizer or "clip")
    return dataclasses.replace(
        base,
        tokenizer=tokenizer,
        start=start,
        initial="plain" if start else "structured",
        preprocess=dataclasses.replace(base.preprocess, interpolation="bilinear"),
        data=dataclasses.replace(
            base.data,
            sources=tuple(sources),
            question_share=0.35,
            workers=1,
            margin=1.75,
            mirror=True,
            augment=AugmentOptions(min_area=0.4, colour=0.3, erase=0.1),
        ),
        objective=ObjectiveOptions(label_smoothing=0.1),
        optimizer=OptimizerOptions(weight_decay=0.1, beta2=0.98, muon=20.0, average=0.999),
        stages=tuple(stages),
        batch_size=96,
        parallel=ParallelOptions(),
        save=SaveOptions(200, 2, "whole", 50, False, "float16"),
        explode_factor=4.0,
    )


def fit_run(
    files: Sequence[str], out: Path, *, preset: str, init: str | None, steps: int, vocab_size: int
) -> RunConfig:
    """A run on somebody's own pairs; its tokenizer is trained on them and written to OUT, unless there is an `init`.

    Raises:
        InputError: a file cannot be read, an unknown preset, or no texts to learn from.
        CheckpointError: `init` cannot be loaded.
    """
    source = Source(tuple(files), "photo", 1.0)
    if init is not None:
        found = load_checkpoint(init)
        config = small_set(found.model.config, (source,), steps, start=init)
        return dataclasses.replace(config, preprocess=found.preprocess, prompts=found.prompts)
    model_preset(preset)  # before the work
    tokenizer = train_tokenizer(_texts(expand(files)), vocab_size)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_bytes(tokenizer)
    model = model_preset(preset, Tokenizer.from_bytes(tokenizer).vocab_size)
    return small_set(model, (source,), steps, tokenizer=str(out / "tokenizer.json"))


def _texts(paths: Sequence[str]) -> Iterator[str]:
    """Every caption, question and answer."""
    for sample in samples_of(paths):
        try:
            pair = plain_pair("", b"", sample.row)
        except InputError:
            continue  # named when the picture would be trained on
        yield from pair.captions
        yield from (f"question: {question} answer: {answer}" for question, answer in pair.questions)


def _data(
    sources: Sequence[str],
    *,
    question_share: float,
    margin: float,
    workers: int,
    kind: Literal["photo", "clip"] = "photo",
) -> DataOptions:
    return DataOptions(
        sources=(Source(tuple(sources), kind, 1.0),),
        question_share=question_share,
        mixing="samples",
        workers=workers,
        shuffle=1_000,
        margin=margin,
        mirror=False,
        augment=None,
        max_damaged_pictures=0.01,
        max_damaged_shards=0.01,
    )
