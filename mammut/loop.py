"""The training loop for real data at any scale: one step after another, from a laptop to many GPUs.

What a step is made of is elsewhere: pair_loader.py (data), objective.py and accumulate.py (both passes, one
backward), parallel.py (DDP, FSDP), optimizers.py, run_state.py (checkpoints). A run is decided by its RunConfig and its
data: given both again, and as many processes, it takes the same steps, also when it was stopped in between.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from mammut.accumulate import backward_of_step
from mammut.checkpoint import load_checkpoint, save_checkpoint
from mammut.clip_tokenizer import build_clip_tokenizer
from mammut.guards import DamageTally, LossWatch
from mammut.lora import add_lora, plain_state
from mammut.model import Mammut
from mammut.objective import Losses, PairBatch, TwoPass, processes
from mammut.optimizers import freeze, make_adamw, schedule, set_learning_rate
from mammut.pair_loader import LoadedBatch, LoaderState, Reading, open_loader
from mammut.parallel import Place, Prepared, clip_gradients
from mammut.position_crops import draw_kept, draw_regions
from mammut.run_config import RunConfig, StageOptions
from mammut.run_log import RunLog
from mammut.run_state import (
    RUN_FILE,
    DataFile,
    RunInfo,
    check_resumable,
    code_version,
    load_state,
    read_info,
    save_state,
    saved_steps,
    with_step,
)
from mammut.shards import Position, expand, file_sizes
from mammut_runtime.errors import CheckpointError, InputError, MammutError
from mammut_runtime.tokenizer import Tokenizer

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
) -> Path:
    """Train to the end and write OUT/checkpoint; returns that folder.

    Args:
        out: also gets log.jsonl and the run's own checkpoints (run_state.py).
        resume: go on from the newest of them; where there is none, begin.
        note: gets one line for everything worth knowing: damaged data, where the run goes on.

    Raises:
        InputError: config, data or the run to be resumed do not fit.
        MammutError: a loss is not finite or explodes, too much data is damaged, or a checkpoint cannot be written.
    """
    run = Run(config, out, place, note)
    found = saved_steps(out)
    if found and not resume:
        raise InputError(f"{out}: already holds a run ({found[-1].name}); go on with --resume or choose another folder")
    if found:
        run.resume(found[-1])
    with RunLog(out, run.step, config.steps, config.save.tensorboard) if place.main else _Silent() as log:
        run.run(log)
    return run.write_checkpoint()


class Run:
    """The state of a run on this process."""

    def __init__(self, config: RunConfig, out: Path, place: Place, note: Callable[[str], None]) -> None:
        self.config, self.out, self.place = config, out, place
        self.note = note if place.main else _silent
        self.local_batch = config.local_batch(place.size)
        self.paths = expand(config.data.sources)
        self.tokenizer_json, model = starting_point(config)
        self.info = run_info(config, self.paths, self.tokenizer_json, place.size)
        self.tally = DamageTally(config, self.paths, self.note)
        self.tally.note = note  # from now on each process names what it met
        if config.lora is not None:
            add_lora(model, config.lora)
        if config.optimizer.freeze:
            freeze(model, config.optimizer.freeze)
        passes = TwoPass(model, config.objective, config.parallel.autocast)
        for name in passes.unused_parameters():
            model.get_parameter(name).requires_grad_(False)
        self.model, self.prepared = model, Prepared(passes, config.parallel, place)
        self.optimizer = make_adamw(passes, config.model, config.optimizer)
        self.step = 0
        self.data = LoaderState.beginning(max(1, config.data.workers))
        self.watch = LossWatch(config.explode_factor)

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint of this run. Errors as check_resumable's and load_state's."""
        stored = read_info(folder)
        check_resumable(folder, stored, self.info)
        if stored.code != self.info.code:
            self.note(f"{folder}: was saved by other code ({stored.code}); this is {self.info.code}")
        process = json.loads(load_state(folder, stored, self.prepared.run, self.optimizer, self.place))
        self.step = stored.step
        self.data = LoaderState(tuple(Position(**each) for each in process["positions"]), process["turn"])
        self.watch.restore(process["watch"])
        self.tally.restore(process["damage"])
        self.note(f"going on from {folder}")

    def run(self, log: RunLog | _Silent) -> None:
        """Take the remaining steps. Errors as train's."""
        batches: Iterator[LoadedBatch] = iter(())
        opened, began, seen, waited = -1, time.monotonic(), 0, 0.0
        while self.step < self.config.steps:
            number, stage, at = self.config.stage_at(self.step)
            if number != opened:
                batches, opened = self._open(stage), number
            asked = time.monotonic()
            loaded = [next(batches) for _ in range(self.config.micro_batches)]
            waited += time.monotonic() - asked
            for batch in loaded:
                self.data = self.data.after(batch)
                self.tally.add(batch)
            losses, norm = self.train_step(loaded, stage, at)
            seen += self.config.batch_size
            if self.step % self.config.save.log_every == 0 or self.step == self.config.steps:
                took = max(1e-9, time.monotonic() - began)
                speed = {"pictures_per_s": round(seen / took, 1), "waited_for_data": round(waited / took, 3)}
                log.row(self._row(losses, norm, number, stage) | speed)
                began, seen, waited = time.monotonic(), 0, 0.0
            log.step(self.step)
            if self.step % self.config.save.every_steps == 0 or self.step == self.config.steps:
                self.save()

    def train_step(self, loaded: list[LoadedBatch], stage: StageOptions, at: int) -> tuple[dict[str, float], float]:
        """One optimizer step; returns the losses of the global batch and the gradient's norm."""
        config = self.config
        rate = stage.learning_rate * schedule(at, stage.steps, stage.warmup_steps, stage.schedule)
        set_learning_rate(self.optimizer, rate)
        batches = self._drawn([each.on(self.place.device, config.preprocess) for each in loaded], stage)
        losses = backward_of_step(
            self.prepared, batches, config.objective, config.model.contrastive, self.prepared.synchronised
        )
        self.prepared.finish_backward()
        norm = float(clip_gradients(self.prepared.trained(), config.optimizer.clip))
        measured, counts = _global(losses, self.tally.counts())
        self.tally.check(*counts)
        self.watch.check(self.step, measured, norm, self._last_good())
        self.optimizer.step()
        self.optimizer.zero_grad()
        if config.model.contrastive == "infonce":
            with torch.no_grad():
                self.model.log_logit_scale.clamp_(max=math.log(LARGEST_SCALE))
        self.step += 1
        return measured, norm

    def save(self) -> Path:
        """Write a checkpoint of the run, see save_state."""
        process = {
            "positions": [asdict(each) for each in self.data.positions],
            "turn": self.data.turn,
            "watch": self.watch.state(),
            "damage": self.tally.state(),
        }
        if not self.prepared.finite():
            raise MammutError(f"step {self.step}: weights are not finite; {self._last_good()}")
        text = json.dumps(process).encode()
        return save_state(
            self.out, with_step(self.info, self.step), self.prepared.run, self.optimizer, text, self.place
        )

    def write_checkpoint(self) -> Path:
        """The trained model, as everything else reads it; adapted weights are merged."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        gathered = get_model_state_dict(self.prepared.run, options=options)
        folder = self.out / CHECKPOINT_FOLDER
        if self.place.main:
            state: dict[str, Tensor] = {
                name.removeprefix("model."): value
                for name, value in gathered.items()
                if name.startswith("model.") and isinstance(value, Tensor)
            }
            state = plain_state(state, self.config.lora) if self.config.lora else state
            with torch.device("meta"):
                model = Mammut(self.config.model)
            model.load_state_dict(state, assign=True)
            save_checkpoint(folder, model, self.tokenizer_json, self.config.preprocess, self.config.prompts)
        return folder

    def _open(self, stage: StageOptions) -> Iterator[LoadedBatch]:
        config = self.config
        reading = Reading(
            self.paths, self.tokenizer_json, config.preprocess, config.prompts, config.model.text.context_length,
            config.model.text.mask_pads, config.data, self.local_batch, stage.image_size, config.seed,
            self.place.rank, self.place.size,
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
            "learning_rate": max(group["lr"] for group in self.optimizer.param_groups),
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
        if found.model.config != config.model:
            raise InputError(f"start: {config.start} holds another model than this run describes; make a new config")
        model, tokenizer_json = found.model.train().requires_grad_(True), found.tokenizer_json
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
    return tokenizer_json, Mammut(config.model, pad_id=tokenizer.pad_id)


def tokenizer_bytes(name: str) -> bytes:
    """Of a tokenizer.json, or "clip". InputError where it cannot be read."""
    if name == "clip":
        return build_clip_tokenizer()
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise InputError(f'tokenizer: {name} cannot be read ({error}); give a tokenizer.json or "clip"') from error


def run_info(config: RunConfig, paths: tuple[str, ...], tokenizer_json: bytes, number: int) -> RunInfo:
    """What is stored with every checkpoint, at step 0."""
    files = tuple(DataFile(path, size) for path, size in file_sizes(paths).items())
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
