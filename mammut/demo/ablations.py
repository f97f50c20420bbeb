"""The paper's comparisons at the size of a laptop: small models that differ in one thing, same budget, several seeds.

Every row of the table is a run that differs from the row "both" in one choice; a comparison of the paper is a pair of
rows and what should follow (ablation_table.py). What is measured is in ablation_measures.py. Finished runs are lines of
OUT/results.jsonl and are not made again; one that was stopped is begun anew, so a kill costs one run at most.

Rows of one seed see the same pictures in the same order, cropped and recoloured alike: they are drawn once for all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from mammut import presets
from mammut.bpe_training import train_tokenizer
from mammut.checkpoint import load_checkpoint
from mammut.config import MammutConfig
from mammut.data.pair_loader import LoadedBatch, LoaderState, Reading, open_loader
from mammut.data.pairs import Pair
from mammut.data.shards import expand
from mammut.demo import recipe
from mammut.demo.ablation_measures import HeldOut, measure
from mammut.training.loop import CHECKPOINT_FOLDER, Run, tokenizer_bytes
from mammut.training.objective import ObjectiveOptions
from mammut.training.parallel import joined
from mammut.training.recipes import small_set
from mammut.training.run_config import RunConfig, SaveOptions, Source, StageOptions
from mammut.training.run_log import RunLog
from mammut_runtime.errors import InputError
from mammut_runtime.strict import Omissible, to_dict
from mammut_runtime.tokenizer import Tokenizer

STEPS = 160
"""Of each run: half a minute on an idle thread, twice that on a busy machine."""
BATCH = 48
VOCABULARY = 2048
LARGER = 2
"""Times the trained picture size, at which the embeddings are measured once more."""
RESULTS = "results.jsonl"
MOST_BYTES = 4e9


@dataclass(frozen=True)
class Row:
    """One way to train."""

    name: str
    says: str
    """For the table: how it differs from "both"."""
    change: Callable[[RunConfig], RunConfig]


@dataclass(frozen=True)
class Result:
    """One finished run."""

    row: str
    seed: int
    steps: int
    pictures: int
    setup: str
    """A digest of what was trained; results of different setups are not to be mixed."""
    train_s: float
    """Wall-clock, on whatever else the machine was doing."""
    figures: dict[str, float]
    """Shares from 0 to 1; see ablation_measures.measure."""
    options: Annotated[str, Omissible()] = ""
    """Another digest, of how it was trained; "" in results from before there was one, which are taken as they are."""


def rows() -> dict[str, Row]:
    """All rows by name, the one that the others are compared with first."""
    every = (
        Row("both", "both losses, bidirectional text pass, InfoNCE, whole positions, 2 cross blocks", lambda run: run),
        Row("contrastive", "no caption loss", lambda run: _objective(run, caption_weight=0.0)),
        Row("caption", "no contrastive loss", lambda run: _objective(run, contrastive_weight=0.0)),
        Row("causal", "causal mask in the contrastive pass", lambda run: _text(run, contrastive_mask="causal")),
        Row("focal", "focal loss, scale 10 and bias -5 to begin with",
            lambda run: _model(run, contrastive="focal", logit_scale_init=10.0, logit_bias_init=-5.0)),
        Row("focal-plain", "focal loss as printed: scale 1, no bias",
            lambda run: _model(run, contrastive="focal", logit_scale_init=1.0, logit_bias_init=None)),
        Row("cropped", "cropped positional embeddings", _cropped),
        Row("cross-1", "1 cross block", lambda run: _text(run, cross_after=(1,))),
        Row("cross-4", "4 cross blocks", lambda run: _text(run, cross_after=(0, 1, 2, 3))),
    )  # fmt: skip
    return {row.name: row for row in every}


def chosen(names: str) -> list[Row]:
    """Rows from "focal,causal", or all from "". InputError for an unknown name."""
    known = rows()
    wanted = [name.strip() for name in names.split(",") if name.strip()] or list(known)
    for name in wanted:
        if name not in known:
            raise InputError(f"--rows: unknown row {name!r}; expected some of {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(wanted)]


def ablation_model(vocab_size: int) -> MammutConfig:
    """About 1.2 M parameters: 60 px in 25 patches, four blocks of width 96 on either side."""
    demo = presets.demo(vocab_size)
    vision = dataclasses.replace(demo.vision, image_size=60, patch_size=12, width=96, layers=4, heads=2, mlp_width=384)
    text = dataclasses.replace(
        demo.text, context_length=20, width=96, layers=4, heads=2, mlp_width=384, cross_after=(1, 3)
    )
    return dataclasses.replace(demo, name="ablation", vision=vision, text=text, embed_dim=96)


@dataclass(frozen=True)
class Prepared:
    """The data as training reads it, on disk."""

    sources: tuple[Source, ...]
    tokenizer: Path
    digest: str
    """Of all of it."""


def prepare(data: Path, out: Path) -> Prepared:
    """Write OUT/data/*.tar and OUT/tokenizer.json, unless they are there. Errors as recipe.check_folder's."""
    recipe.check_folder(data)
    tokenizer, tars = out / "tokenizer.json", {name: out / "data" / f"{name}.tar" for name in _SHARES}
    if not all(path.is_file() for path in (tokenizer, *tars.values())):
        sets = {name: recipe.Training(pairs, _SHARES[name], even=name in ("flowers", "clothing"))
                for name, pairs in _training_pairs(data).items()}  # fmt: skip
        for name, given in sets.items():
            recipe.write_whole(tars[name], recipe.packed(given))
        recipe.write_whole(tokenizer, train_tokenizer(recipe.tokenizer_texts(sets), VOCABULARY))
    sources = tuple(
        Source((str(path),), "plain" if name == "shapes" else "photo", _SHARES[name]) for name, path in tars.items()
    )
    content = b"".join(hashlib.sha256(path.read_bytes()).digest() for path in (tokenizer, *tars.values()))
    return Prepared(sources, tokenizer, hashlib.sha256(content).hexdigest())


def run_of(row: Row, prepared: Prepared, steps: int, seed: int, batch: int = BATCH) -> RunConfig:
    """What a row trains: the recipe for small sets in one stage, so that a row's choice is all that changes."""
    vocabulary = Tokenizer.from_bytes(prepared.tokenizer.read_bytes()).vocab_size
    model = ablation_model(vocabulary)
    config = small_set(model, prepared.sources, steps, tokenizer=str(prepared.tokenizer))
    stage = StageOptions(steps, model.vision.image_size, 1e-3, min(30, steps // 4), "cosine", False)
    return row.change(
        dataclasses.replace(
            config,
            stages=(stage,),
            data=dataclasses.replace(config.data, workers=0, margin=1.4),
            prompts=recipe.PROMPTS,
            batch_size=batch,
            save=SaveOptions(100, 1, "whole", 20, False, "float32"),
            seed=seed,
        )
    )


def run_rows(
    wanted: Sequence[Row],
    prepared: Prepared,
    held_out: HeldOut,
    out: Path,
    *,
    seeds: int,
    steps: int,
    batch: int = BATCH,
    measure_again: bool = False,
    note: Callable[[str], None] = lambda message: None,
) -> Iterator[Result]:
    """Train and measure what OUT/results.jsonl does not have yet, seed by seed; gives every result as it is there.

    Seed by seed, so that a table of fewer seeds is whole when this is stopped.

    Args:
        measure_again: also measure what is there, from its checkpoint, after measures have changed.

    Raises:
        InputError: OUT has a result of the same row and seed from another setup.
        MammutError: a loss is not finite or explodes, or too much data is damaged.
    """
    for seed in range(seeds):
        batches: list[LoadedBatch] = []
        for row in wanted:
            config = run_of(row, prepared, steps, seed, batch)
            setup = {"setup": setup_digest(config, prepared), "options": options_digest(config)}
            done = next((each for each in read_results(out) if (each.row, each.seed) == (row.name, seed)), None)
            if done is not None and (done.setup, done.options or setup["options"]) != tuple(setup.values()):
                raise InputError(
                    f"{out / RESULTS}: has row {row.name!r}, seed {seed}, of another setup ({done.steps} steps, "
                    f"{done.pictures} pictures; now {steps} steps of {batch}); choose another OUT"
                )
            if done is None:
                note(f"row {row.name}, seed {seed}")
                batches = batches or draw_batches(config)
                done = _finished(row, config, setup, batches, held_out, out)
                keep_result(out, done)
            elif measure_again:
                note(f"row {row.name}, seed {seed}: measured again")
                done = dataclasses.replace(done, figures=_figures(config, _folder(config, row, out), held_out))
                keep_result(out, done)
            yield done


def draw_batches(config: RunConfig) -> list[LoadedBatch]:
    """All that a run of one stage sees, the same for the same seed and data. InputError where it would not fit."""
    stage, sources = config.stages[0], tuple(expand(source.files) for source in config.data.sources)
    size = config.steps * config.batch_size * 3 * stage.image_size**2
    if size > MOST_BYTES:
        raise InputError(f"{config.steps} steps: their pictures are {size / 1e9:.0f} GB, more than 4; take fewer steps")
    reading = Reading(
        sources, tokenizer_bytes(config.tokenizer), config.preprocess, config.prompts,
        config.model.text.context_length, config.model.text.mask_pads, config.data, config.batch_size,
        stage.image_size, config.seed, 0, 1,
    )  # fmt: skip
    return list(itertools.islice(open_loader(reading, LoaderState.beginning(config.data)), config.steps))


def setup_digest(config: RunConfig, prepared: Prepared) -> str:
    """Of the data and of what a row or an option of the command may change, wherever OUT is."""
    parts = {
        "model": to_dict(config.model),
        "objective": to_dict(config.objective),
        "stages": to_dict(config.stages),
        "batch_size": config.batch_size,
        "seed": config.seed,
        "data": prepared.digest,
    }
    return _digest(parts)


def options_digest(config: RunConfig) -> str:
    """Of everything else that decides the outcome and is the same for all rows, but for paths."""
    data = to_dict(config.data)
    data["sources"] = [
        {k: v for k, v in source.items() if k not in ("files", "drawings")} for source in data["sources"]
    ]
    names = ("optimizer", "initial", "preprocess", "prompts", "lora", "micro_batches", "parallel")
    return _digest({"data": data} | {name: to_dict(getattr(config, name)) for name in names})


def _digest(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _finished(
    row: Row, config: RunConfig, setup: dict[str, str], batches: Sequence[LoadedBatch], held_out: HeldOut, out: Path
) -> Result:
    folder, began, stage = _folder(config, row, out), time.monotonic(), config.stages[0]
    with joined("cpu") as place:
        run = Run(config, folder, place, lambda message: None)
        with RunLog(folder, 0, config.steps, tensorboard=False) as log:
            for batch in batches:
                losses, norm, _ = run.train_step([batch], stage)
                log.step(run.step)
                if run.step % config.save.log_every == 0:
                    log.row({"step": run.step, **losses, "gradient_norm": norm})
        run.write_checkpoint()
    took = time.monotonic() - began
    pictures = config.steps * config.batch_size
    figures = _figures(config, folder, held_out)
    return Result(row.name, config.seed, config.steps, pictures, train_s=round(took, 1), figures=figures, **setup)


def _folder(config: RunConfig, row: Row, out: Path) -> Path:
    return out / "runs" / f"{row.name}-{config.seed}"


def _figures(config: RunConfig, folder: Path, held_out: HeldOut) -> dict[str, float]:
    checkpoint, size = str(folder / CHECKPOINT_FOLDER), LARGER * config.model.vision.image_size
    figures = measure(load_checkpoint(checkpoint), config, held_out)
    return figures | measure(load_checkpoint(checkpoint, image_size=size), config, held_out, suffix="@larger")


def read_results(out: Path) -> list[Result]:
    """What OUT/results.jsonl holds; a last line that was cut short is left out. InputError for another file."""
    try:
        lines = (out / RESULTS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(Result(**json.loads(line)))
        except (ValueError, TypeError) as error:
            if number < len(lines):
                raise InputError(f"{out / RESULTS}: line {number} is not one of ours ({error})") from error
    return found


def keep_result(out: Path, result: Result) -> None:
    """One line more, or another one for this row and seed; on disk when this returns.

    Written as a whole new file: a kill leaves the old or the new one.
    """
    kept = {(each.row, each.seed): each for each in read_results(out)}
    kept[result.row, result.seed] = result
    partial = out / f"{RESULTS}.partial"
    with partial.open("w", encoding="utf-8") as file:
        file.write("".join(json.dumps(to_dict(each)) + "\n" for each in kept.values()))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(out / RESULTS)


def _training_pairs(data: Path) -> dict[str, Sequence[Pair]]:
    return {
        "flowers": recipe.labelled_pairs(data, "flowers", "train"),
        "clothing": recipe.labelled_pairs(data, "clothing", "train"),
        "photos": recipe.photo_pairs(data, "train"),
        "shapes": recipe.shape_pairs(data / "easy-vqa" / "train"),
    }


_SHARES = {"flowers": 0.25, "clothing": 0.2, "photos": 0.1, "shapes": 0.45}
"""Of the batch, about. Many shapes: what a small budget can learn to name and to answer about."""


def _objective(run: RunConfig, **changes: float) -> RunConfig:
    objective: ObjectiveOptions = dataclasses.replace(run.objective, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(run, objective=objective)


def _model(run: RunConfig, **changes: Any) -> RunConfig:
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **changes))


def _text(run: RunConfig, **changes: Any) -> RunConfig:
    return _model(run, text=dataclasses.replace(run.model.text, **changes))


def _cropped(run: RunConfig) -> RunConfig:
    stages = tuple(dataclasses.replace(stage, crop_positions=True) for stage in run.stages)
    return dataclasses.replace(run, stages=stages)
