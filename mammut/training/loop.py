"""The training loop, from the demo on a laptop to many GPUs: one step after another.

What a step is made of is elsewhere: pair_loader.py (data), objective.py and accumulate.py (both passes, one
backward), parallel.py (DDP, FSDP), optimizers.py, run_state.py (checkpoints). A run is decided by its RunConfig and its
data: given both again, and as many processes, it takes the same steps, also when it was stopped in between.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from mammut.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mammut.clip_tokenizer import build_clip_tokenizer
from mammut.data.pair_loader import LoadedBatch, LoaderState, Reading, open_loader
from mammut.data.shards import expand, file_sizes
from mammut.model import Mammut, with_video
from mammut.training.accumulate import backward_of_step
from mammut.training.guards import DamageTally, LossWatch
from mammut.training.initial import structured_start
from mammut.training.lora import add_lora, plain_state
from mammut.training.objective import Losses, PairBatch, TwoPass, processes
from mammut.training.optimizers import Average, freeze, make_optimizers, set_learning_rate
from mammut.training.parallel import Place, Prepared, clip_gradients
from mammut.training.position_crops import draw_kept, draw_regions
from mammut.training.run_config import RunConfig, StageOptions
from mammut.training.run_log import RunLog
from mammut.training.run_state import (
    RUN_FILE,
    DataFile,
    Learner,
    RunInfo,
    begun,
    check_resumable,
    code_version,
    load_state,
    read_info,
    save_state,
    saved_steps,
    with_step,
)
from mammut_runtime.errors import CheckpointError, InputError, MammutError
from mammut_runtime.strict import from_dict, parse_json, to_dict
from mammut_runtime.tokenizer import Tokenizer

Evaluate = Callable[[Checkpoint], Mapping[str, float]]
"""Figures of the model as it would be saved now. Runs on the main process."""
CHECKPOINT_FOLDER = "checkpoint"
LARGEST_SCALE = 100.0
"""InfoNCE's factor on the cosine is kept at or below it, as CLIP and openMaMMUT do; else it grows without end."""


def train(
    config: RunConfig,
    out: Path,
    place: Place,
    *,
    resume: bool = False,
    note: Callable[[str], None] = lambda message: None,
    evaluate: Evaluate | None = None,
    minutes: float | None = None,
) -> Path:
    """Train to the end and write OUT/checkpoint; returns that folder.

    Args:
        out: also gets log.jsonl and the run's own checkpoints (run_state.py).
        resume: go on from the newest of them; where there is none, begin.
        note: gets one line for everything worth knowing: damaged data, where the run goes on.
        evaluate: measures the model on held-out data whenever the run is saved; the figures are logged.
        minutes: stop after so long, as if there were no more steps; the run can be resumed.

    Raises:
        InputError: config, data or the run to be resumed do not fit.
        MammutError: a loss is not finite or explodes, too much data is damaged, or a checkpoint cannot be written.
    """
    began = time.monotonic()
    run = Run(config, out, place, note, evaluate)
    newest = begun(out, resume)
    if newest is not None:
        run.resume(newest)
    with RunLog(out, run.step, config.steps, config.save.tensorboard) if place.main else _Silent() as log:
        run.run(log, None if minutes is None else began + 60 * minutes)
    if run.step < config.steps:
        run.note(f"stopped at step {run.step} of {config.steps}; go on with --resume")
    return run.write_checkpoint()


class Run:
    """The state of a run on this process."""

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        place: Place,
        note: Callable[[str], None],
        evaluate: Evaluate | None = None,
    ) -> None:
        self.config, self.out, self.place, self.evaluate = config, out, place, evaluate
        self.note = note if place.main else _silent
        self.local_batch = config.local_batch(place.size)
        self.sources = tuple(expand(source.files) for source in config.data.sources)
        self.tokenizer_json, model = starting_point(config)
        drawings = tuple(expand(source.drawings) for source in config.data.sources if source.drawings)
        self.info = run_info(config, self.sources + drawings, self.tokenizer_json, place.size)
        self.tally = DamageTally(config, tuple(file.path for file in self.info.data), self.note)
        self.tally.note = note  # from now on each process names what it met
        if config.lora is not None:
            add_lora(model, config.lora)
        if config.optimizer.freeze:
            freeze(model, config.optimizer.freeze)
        if model.tubes is not None and not config.of_clips:
            model.tubes.requires_grad_(False)
        few_shapes = config.parallel.compile or config.parallel.strategy == "fsdp"
        passes = TwoPass(model, config.objective, config.parallel.autocast, sort_lengths=not few_shapes)
        for name in passes.unused_parameters():
            model.get_parameter(name).requires_grad_(False)
        self.model, self.prepared = model, Prepared(passes, config.parallel, place)
        optimizers = make_optimizers(passes, config.model, config.optimizer)
        decay = config.optimizer.average
        average = Average(self.prepared.trained(), decay) if decay else None
        self.learner = Learner(self.prepared.run, optimizers, average)
        self.step = 0
        self.data = LoaderState.beginning(config.data)
        self.watch = LossWatch(config.explode_factor)

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint of this run. Errors as check_resumable's and load_state's."""
        stored = read_info(folder)
        check_resumable(folder, stored, self.info)
        if stored.code != self.info.code:
            self.note(f"{folder}: was saved by other code ({stored.code}); this is {self.info.code}")
        own = load_state(folder, stored, self.learner, self.place)
        process: Any = parse_json(own, f"{folder}: damaged", CheckpointError)
        self.step = stored.step
        self.data = from_dict(LoaderState, process["data"], str(folder), CheckpointError)
        self.watch.restore(process["watch"])
        self.tally.restore(process["damage"])
        self.note(f"going on from {folder}")

    def run(self, log: RunLog | _Silent, until: float | None = None) -> None:
        """Take the remaining steps, or those before `until` (time.monotonic of the main process). Errors as train's."""
        batches: Iterator[LoadedBatch] = iter(())
        opened, began, seen, waited = -1, time.monotonic(), 0, 0.0
        over = False
        while self.step < self.config.steps and not over:
            number, stage = self.config.stage_at(self.step)
            if number != opened:
                batches, opened = self._open(stage), number
            asked = time.monotonic()
            loaded = [next(batches) for _ in range(self.config.micro_batches)]
            waited += time.monotonic() - asked
            for batch in loaded:
                self.data = self.data.after(batch)
                self.tally.add(batch)
            losses, norm, over = self.train_step(loaded, stage, until is not None and time.monotonic() > until)
            over = over or self.step == self.config.steps
            seen += self.config.batch_size
            if self.step % self.config.save.log_every == 0 or over:
                took = max(1e-9, time.monotonic() - began)
                speed = {"pictures_per_s": round(seen / took, 1), "waited_for_data": round(waited / took, 3)}
                log.row(self._row(losses, norm, number, stage) | speed)
                began, seen, waited = time.monotonic(), 0, 0.0
            log.step(self.step)
            if self.step % self.config.save.every_steps == 0 or over:
                self._evaluated(log)
                self.save()

    def train_step(
        self, loaded: list[LoadedBatch], stage: StageOptions, stop: bool = False
    ) -> tuple[dict[str, float], float, bool]:
        """One optimizer step; returns the losses of the global batch, the gradient's norm, and whether the main process
        wants to `stop`, which all then do."""
        config = self.config
        set_learning_rate(self.learner.optimizers, config.rate_at(self.step))
        batches = self._drawn([each.on(self.place.device, config.preprocess) for each in loaded], stage)
        losses = backward_of_step(
            self.prepared, batches, config.objective, config.model.contrastive, self.prepared.synchronised
        )
        self.prepared.finish_backward()
        norm = float(clip_gradients(self.prepared.trained(), config.optimizer.clip))
        measured, (*counts, stops) = _global(losses, [*self.tally.counts(), int(stop and self.place.main)])
        self.tally.check(*counts)
        self.watch.check(self.step, measured, norm, self._last_good())
        for optimizer in self.learner.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if config.model.contrastive == "infonce":
            with torch.no_grad():
                self.model.log_logit_scale.clamp_(max=math.log(LARGEST_SCALE))
        self.step += 1
        if self.learner.average is not None:
            self.learner.average.update(self.step)
        return measured, norm, bool(stops)

    def save(self) -> Path:
        """Write a checkpoint of the run, see save_state."""
        process = {
            "data": to_dict(self.data),
            "watch": self.watch.state(),
            "damage": self.tally.state(),
        }
        if not self.prepared.finite():
            raise MammutError(f"step {self.step}: weights are not finite; {self._last_good()}")
        text = json.dumps(process).encode()
        return save_state(self.out, with_step(self.info, self.step), self.learner, text, self.place)

    def write_checkpoint(self) -> Path:
        """The trained model, as everything else reads it."""
        folder, now = self.out / CHECKPOINT_FOLDER, self.checkpoint()
        if now is not None:
            dtype = torch.float16 if self.config.save.dtype == "float16" else torch.float32
            save_checkpoint(folder, now.model, now.tokenizer_json, now.preprocess, now.prompts, dtype)
        return folder

    def checkpoint(self) -> Checkpoint | None:
        """On the main process a copy of the model, averaged if it is, adapted weights merged; all must call."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        average = self.learner.average
        with contextlib.nullcontext() if average is None else average.in_place():
            gathered = get_model_state_dict(self.prepared.run, options=options)
            if not self.place.main:
                return None
            state: dict[str, Tensor] = {
                name.removeprefix("model."): value.clone()
                for name, value in gathered.items()
                if name.startswith("model.") and isinstance(value, Tensor)
            }
        state = plain_state(state, self.config.lora) if self.config.lora else state
        with torch.device("meta"):
            model = Mammut(self.config.model, pad_id=self.model.text.pad_id)
        model.load_state_dict(state, assign=True)
        model.eval().requires_grad_(False)
        config, source = self.config, f"{self.out} at step {self.step}"
        return Checkpoint(model, self.tokenizer_json, config.preprocess, config.prompts, source, "")

    def _evaluated(self, log: RunLog | _Silent) -> None:
        now = None if self.evaluate is None else self.checkpoint()
        if self.evaluate is not None and now is not None:
            log.row({"step": self.step} | {f"held_out/{name}": v for name, v in self.evaluate(now).items()})

    def _open(self, stage: StageOptions) -> Iterator[LoadedBatch]:
        config = self.config
        reading = Reading(
            self.sources, self.tokenizer_json, config.preprocess, config.prompts, config.model.text.context_length,
            config.model.text.mask_pads, config.data, self.local_batch, stage.image_size, config.seed,
            self.place.rank, self.place.size, config.model.video.frames if config.model.video else 0,
        )  # fmt: skip
        return open_loader(reading, self.data, pin=self.place.device.type == "cuda")

    def _drawn(self, batches: list[PairBatch], stage: StageOptions) -> list[PairBatch]:
        """With position crops and dropout. Drawn anew from the step's number, so there is no state to keep."""
        dropout = self.config.objective.position_dropout
        if not stage.crop_positions and not dropout:
            return batches
        mark = hashlib.sha256(f"{self.config.seed} {self.place.rank} {self.step}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(mark, "big") >> 1)
        device, number = self.place.device, self.local_batch
        return [
            replace(
                batch,
                regions=draw_regions(number, generator).to(device) if stage.crop_positions else None,
                kept=draw_kept(number, dropout, generator).to(device) if dropout else None,
            )
            for batch in batches
        ]

    def _row(self, losses: dict[str, float], norm: float, number: int, stage: StageOptions) -> dict[str, Any]:
        return {
            "step": self.step,
            "stage": number,
            "image_size": stage.image_size,
            "learning_rate": self.config.rate_at(self.step - 1),
            **losses,
            "gradient_norm": norm,
            "logit_scale": float(self.model.log_logit_scale.detach().exp()),
            "damaged_pictures": self.tally.found[0],
            "damaged_shards": self.tally.found[1],
        }

    def _last_good(self) -> str:
        kept = saved_steps(self.out)
        return f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint had been written before"


def _silent(message: str) -> None: ...


@dataclass
class _Silent:
    """The log of a process that does not report."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def row(self, row: dict[str, Any]) -> None: ...

    def step(self, done: int) -> None: ...


def starting_point(config: RunConfig) -> tuple[bytes, Mammut]:
    """The tokenizer and the model a run begins with, on the CPU.

    Raises:
        InputError: they do not belong together.
        CheckpointError: the start checkpoint cannot be read.
    """
    if config.start:
        size = config.model.vision.image_size
        found = load_checkpoint(config.start, image_size=size)
        model, tokenizer_json = found.model, found.tokenizer_json
        if model.config.video is None and config.model.video is not None:
            model = with_video(model, config.model.video)
        if model.config != config.model:
            raise InputError(f"start: {config.start} holds another model than this run describes; make a new config")
        model.train().requires_grad_(True)
        if config.tokenizer and tokenizer_bytes(config.tokenizer) != tokenizer_json:
            raise InputError(f'tokenizer: {config.start} was trained with its own; set tokenizer to ""')
        return tokenizer_json, model
    tokenizer_json = tokenizer_bytes(config.tokenizer)
    tokenizer = Tokenizer.from_bytes(tokenizer_json)
    if tokenizer.vocab_size > config.model.text.vocab_size:
        raise InputError(
            f"tokenizer: {config.tokenizer} has {tokenizer.vocab_size} tokens, the model's vocabulary only "
            f"{config.model.text.vocab_size}"
        )
    torch.manual_seed(config.seed)  # every process begins with the same weights
    model = Mammut(config.model, pad_id=tokenizer.pad_id)
    if config.initial == "structured":
        structured_start(model, config.seed)
    return tokenizer_json, model


def tokenizer_bytes(name: str) -> bytes:
    """Of a tokenizer.json, or "clip". InputError where it cannot be read."""
    if name == "clip":
        return build_clip_tokenizer()
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise InputError(f'tokenizer: {name} cannot be read ({error}); give a tokenizer.json or "clip"') from error


def run_info(config: RunConfig, sources: tuple[tuple[str, ...], ...], tokenizer_json: bytes, number: int) -> RunInfo:
    """What is stored with every checkpoint, at step 0."""
    sizes = file_sizes([path for paths in sources for path in paths])
    files = tuple(DataFile(path, size) for path, size in sizes.items())
    digest = hashlib.sha256(tokenizer_json).hexdigest()
    return RunInfo("mammut-edge run state 1", config, 0, number, files, code_version(), torch.__version__, digest)


def stored_config(checkpoint: Path) -> RunConfig:
    """The config of the run that wrote a checkpoint (step-N, a run's folder, or its checkpoint/ folder).

    Raises:
        CheckpointError: it holds none.
    """
    for folder in (checkpoint, checkpoint.parent):
        try:
            return read_info(folder).config
        except CheckpointError as error:
            problem = error
            if (folder / RUN_FILE).exists():
                raise
    raise problem


def _global(losses: Losses, counts: list[int]) -> tuple[dict[str, float], list[int]]:
    """Means of the losses and sums of the counts over processes."""
    values: Tensor = torch.stack([losses.total, losses.contrastive, losses.caption]).double()
    values = torch.cat([values / processes(), torch.tensor(counts, dtype=values.dtype, device=values.device)])
    if processes() > 1:
        dist.all_reduce(values)
    numbers = values.tolist()
    return dict(zip(("loss", "loss_contrastive", "loss_caption"), numbers, strict=False)), [int(n) for n in numbers[3:]]
