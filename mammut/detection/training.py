"""Training of a detector on a frozen encoder (or one that learns slowly): the loop behind `mammut-train detect`.

A loop of its own, because that of mammut/training takes image-text pairs through both passes; optimizers, schedule,
averaging, guards and log are the same. A run is decided by its options and data; stopped and resumed, it takes the same
steps.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from mammut.checkpoint import Checkpoint, save_checkpoint
from mammut.detection.config import DetectorConfig, checked
from mammut.detection.detector import Detector
from mammut.detection.feeding import Batch, Fed, batches, digest
from mammut.detection.losses import LossOptions, detection_losses
from mammut.detection.names import class_embeddings
from mammut.training.guards import LossWatch
from mammut.training.optimizers import Average, OptimizerOptions, make_optimizers, schedule, set_learning_rate
from mammut.training.run_log import RunLog
from mammut.training.run_state import code_version
from mammut_runtime.errors import CheckpointError, InputError
from mammut_runtime.strict import Between, from_dict, to_dict

STATE_FILE, CHECKPOINT_FOLDER = "state.pt", "checkpoint"
EXPLODES = 5.0
"""Times its average that a loss must not exceed for some steps."""
_PARTS = 10_000
"""Steps of the schedule of a run that is as long as its minutes."""
_DAMAGE = (
    OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, OverflowError,
    pickle.UnpicklingError,
)  # fmt: skip
"""What reading a damaged file, or taking over what it holds, may raise."""
Evaluate = Callable[[Checkpoint], Mapping[str, float]]


@dataclass(frozen=True)
class DetectRun:
    """How a detector is trained."""

    steps: Annotated[int, Between(1, 100_000_000)] | None
    """Length of the run; None: as many as fit into `minutes`, along which the learning rate then falls."""
    minutes: Annotated[float, Between(0, 1e6)] | None
    """Stop after so long: without steps, over all sittings of the run; with steps, in this one."""
    batch_size: Annotated[int, Between(1, 65_536)] = 32
    learning_rate: Annotated[float, Between(0, 10)] = 2e-3
    warmup: Annotated[float, Between(0, 1)] = 0.03
    """Share of the run in which the rate rises; then it falls along a cosine."""
    optimizer: OptimizerOptions = field(
        default_factory=lambda: OptimizerOptions(weight_decay=0.02, beta2=0.98, average=0.998)
    )
    trunk_rate: Annotated[float, Between(0, 1)] = 0.0
    """The encoder learns so many times slower than the head; 0: it is frozen, and the model stays what it is."""
    losses: LossOptions = field(default_factory=LossOptions)
    names_a_step: Annotated[int, Between(1, 1_000_000)] = 400
    """Names that compete in one step: those of its boxes, and others drawn at random."""
    autocast: Literal["none", "bfloat16"] = "none"
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float16", "float32"] = "float16"
    """Of the weights in the checkpoint, the model's as well: float16 halves the file."""
    seed: int = 0
    threads: Annotated[int, Between(1, 64)] = 1
    """That prepare pictures."""
    log_every: Annotated[int, Between(1, 1_000_000)] = 20
    save_minutes: Annotated[float, Between(0, 1e6)] = 5.0


def train_detector(
    start: Checkpoint,
    config: DetectorConfig,
    feeds: Sequence[Fed],
    novel: frozenset[str],
    run: DetectRun,
    out: Path,
    *,
    resume: bool = False,
    note: Callable[[str], None] = lambda message: None,
    evaluate: Evaluate | None = None,
) -> Path:
    """Train and write OUT/checkpoint, the start's model with a detector; returns that folder.

    Args:
        start: the model; its weights change only where run.trunk_rate says so. A detector of the same sizes that it
            has already is trained on.
        config: of the detector; base_names are filled in.
        feeds: pictures with boxes.
        novel: names that no box is trained with.
        evaluate: measures what would be saved now; its figures are logged.

    Raises:
        InputError: nothing to train on, a config or run out of its limits, or OUT holds another run.
        CheckpointError: the state that OUT holds is damaged.
        MammutError: the loss is not finite or explodes.
    """
    names = {name for fed in feeds for name in fed.source.names} - novel
    if not names:
        raise InputError("no names are left to train: every name of the boxes is held out")
    if start.detector is not None and _same_sizes(start.detector.config, config):
        names |= set(start.detector.config.base_names)
    if run.steps is None and run.minutes is None:
        raise InputError("expected a number of steps, or minutes")
    from_dict(DetectRun, to_dict(run), "run", InputError)
    config = checked(replace(config, base_names=tuple(sorted(names))))
    begun = (out / STATE_FILE).exists()
    if begun and not resume:
        raise InputError(f"{out}: already holds a run; go on with --resume or choose another folder")
    work = _Work(start, config, feeds, run, out, note)
    if begun:
        work.load()
    with RunLog(out, work.step, run.steps or _PARTS, tensorboard=False) as log:
        work.train(log, evaluate)
    return work.write_checkpoint()


class _Work:
    """The state of a run."""

    def __init__(
        self, start: Checkpoint, config: DetectorConfig, feeds: Sequence[Fed], run: DetectRun, out: Path,
        note: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.start, self.run, self.feeds, self.out, self.note = start, run, feeds, out, note
        torch.manual_seed(run.seed)
        self.detector = Detector(config, start.model)
        if start.detector is not None and _same_sizes(start.detector.config, config):
            self.detector.load_own(start.detector.own_state())
        classes = class_embeddings(start.model, start.tokenizer, config.base_names, config.templates)
        self.device = torch.device(run.device)
        self.classes = classes.to(self.device)
        self.detector.to(self.device).train().requires_grad_(True)
        start.model.requires_grad_(False)
        self.optimizers = _optimizers(self.detector, run)
        self.trained = [value for value in self.detector.parameters() if value.requires_grad]
        self.average = Average(self.trained, run.optimizer.average) if run.optimizer.average else None
        self.watch = LossWatch(EXPLODES)
        self.step, self.elapsed_s = 0, 0.0
        self.data = [[fed.source.name, fed.weight, to_dict(fed.jitter), digest(fed.source)] for fed in feeds]

    @property
    def progress(self) -> float:
        """How much of the run is done, from 0 to 1."""
        if self.run.steps is not None:
            return self.step / self.run.steps
        assert self.run.minutes is not None
        return self.elapsed_s / (60 * self.run.minutes)

    def train(self, log: RunLog, evaluate: Evaluate | None) -> None:
        run, config = self.run, self.detector.config
        feed = batches(
            self.feeds, config.base_names, config.image_size, config.fill, self.start.preprocess,
            batch_size=run.batch_size, seed=run.seed, start=self.step, threads=run.threads,
        )  # fmt: skip
        began = time.monotonic() - self.elapsed_s
        here = saved = logged = time.monotonic()
        before = self.step
        with contextlib.closing(feed):
            while self.progress < 1 and not self._sat_long_enough(time.monotonic() - here):
                losses, norm, rate = self.train_step(next(feed))
                self.elapsed_s = time.monotonic() - began
                over = self.progress >= 1
                log.step(self.step if run.steps is not None else min(_PARTS, round(self.progress * _PARTS)))
                if self.step % run.log_every == 0 or over:
                    now = time.monotonic()
                    speed = run.batch_size * (self.step - before) / (now - logged)
                    log.row({"step": self.step, "learning_rate": rate, **losses, "gradient_norm": norm,
                             "pictures_per_s": round(speed, 1), "minutes": round(self.elapsed_s / 60, 2)})  # fmt: skip
                    before, logged = self.step, now
                if time.monotonic() - saved > 60 * run.save_minutes and not over:
                    self._evaluated(log, evaluate)
                    self.save()
                    saved = time.monotonic()
        self._evaluated(log, evaluate)
        self.save()
        if self.progress < 1:
            self.note(f"stopped at step {self.step}; go on with --resume")

    def _sat_long_enough(self, seconds: float) -> bool:
        """Whether a run with steps is to stop here, to be resumed. One without them ends by its progress."""
        return self.run.steps is not None and self.run.minutes is not None and seconds >= 60 * self.run.minutes

    def train_step(self, batch: Batch) -> tuple[dict[str, float], float, float]:
        """One optimizer step; returns losses, the gradient's norm and the learning rate."""
        run = self.run
        share = schedule(min(_PARTS - 1, int(self.progress * _PARTS)), _PARTS, round(run.warmup * _PARTS), "cosine")
        set_learning_rate(self.optimizers, run.learning_rate * share)
        generator = torch.Generator().manual_seed(run.seed * 1_000_003 + self.step)
        batch, classes = self._some_names(batch.on(self.device), generator)
        with torch.autocast(run.device, torch.bfloat16, enabled=run.autocast == "bfloat16"):
            losses = detection_losses(self.detector, batch, classes, run.losses, generator)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        norm = float(nn.utils.clip_grad_norm_(self.trained, run.optimizer.clip or float("inf")))
        measured = {name: float(value.detach()) for name, value in losses.items()}
        self.watch.check(self.step, measured, norm, f"what was saved last is in {self.out}")
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        if self.average is not None:
            self.average.update(self.step)
        return measured, norm, run.learning_rate * share

    def _some_names(self, batch: Batch, generator: torch.Generator) -> tuple[Batch, Tensor]:
        """With the names of this step only: those of its boxes and others that are known in some of its pictures."""
        if len(self.classes) <= self.run.names_a_step:
            return batch, self.classes
        wanted = torch.rand(len(self.classes), generator=generator).to(self.device) * batch.known.any(dim=0)
        wanted[batch.labels[batch.labels >= 0]] = 2.0
        most = max(self.run.names_a_step, int((wanted == 2).sum()))
        chosen = wanted.topk(most).indices.sort().values
        places = torch.full((len(self.classes),), -1, device=self.device)
        places[chosen] = torch.arange(most, device=self.device)
        labels = torch.where(batch.labels >= 0, places[batch.labels.clamp(min=0)], batch.labels)
        known, partial = batch.known[:, chosen], batch.partial[:, chosen]
        return replace(batch, labels=labels, known=known, partial=partial), self.classes[chosen]

    # --- what is kept --------------------------------------------------------------------------------------------

    def checkpoint(self) -> Checkpoint:
        """The start's model with the detector as it would be saved now. Shares its weights: use it at once."""
        return replace(self.start, detector=self.detector, source=f"{self.out} at step {self.step}")

    def write_checkpoint(self) -> Path:
        folder, start = self.out / CHECKPOINT_FOLDER, self.start
        with contextlib.nullcontext() if self.average is None else self.average.in_place():
            dtype = torch.float16 if self.run.dtype == "float16" else torch.float32
            save_checkpoint(folder, start.model, start.tokenizer_json, start.preprocess, start.prompts, dtype,
                            detector=self.detector)  # fmt: skip
        return folder

    def _evaluated(self, log: RunLog, evaluate: Evaluate | None) -> None:
        if evaluate is None:
            return
        with contextlib.nullcontext() if self.average is None else self.average.in_place():
            self.detector.eval()
            log.row({"step": self.step} | {f"held_out/{name}": v for name, v in evaluate(self.checkpoint()).items()})
            self.detector.train()

    def _settings(self) -> dict[str, Any]:
        """What must be the same when a run is resumed."""
        run = to_dict(replace(self.run, minutes=None, threads=1, log_every=1, save_minutes=0.0))
        return {"run": run, "detector": self.detector.config.to_dict(), "start": self.start.sha256, "data": self.data}

    def save(self) -> None:
        """Write OUT/state.pt, whole or not at all."""
        trunk = self.start.model.vision.state_dict() if self.run.trunk_rate else {}
        state = {
            "settings": self._settings(), "step": self.step, "elapsed_s": self.elapsed_s, "code": code_version(),
            "own": self.detector.own_state(), "trunk": trunk,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": [] if self.average is None else self.average.values, "watch": self.watch.state(),
        }  # fmt: skip
        self.out.mkdir(parents=True, exist_ok=True)
        new = self.out / f".{STATE_FILE}.partial"
        with new.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.out / STATE_FILE)

    def load(self) -> None:
        """Go on from OUT/state.pt. Raises CheckpointError where it is damaged, InputError where it is another run's."""
        path = self.out / STATE_FILE
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            now, settings = self._settings(), dict(state["settings"])
            wrong = [name for name in now if settings[name] != now[name]]
            if not wrong:
                self._restore(state)
        except _DAMAGE as error:
            reason = str(error).split("\n")[0] or type(error).__name__
            raise CheckpointError(f"{path}: damaged ({reason}); remove it to begin again") from error
        if wrong:
            raise InputError(f"{path}: was saved by a run with other {', '.join(wrong)}; resume with its own options")
        if state["code"] != code_version():
            self.note(f"{path}: was saved by other code ({state['code']}); this is {code_version()}")
        self.note(f"going on from step {self.step}")

    def _restore(self, state: dict[str, Any]) -> None:
        """Take over a state of this run. Raises one of _DAMAGE where a part of it is of another form."""
        step, elapsed, average, watch = state["step"], state["elapsed_s"], state["average"], state["watch"]
        if type(step) is not int or step < 0 or type(elapsed) not in (int, float) or not 0 <= elapsed < math.inf:
            raise ValueError(f"step {step}, {elapsed} s")
        if type(state["code"]) is not str or len(watch) != 3 or not all(math.isfinite(each) for each in watch):
            raise ValueError("the code's version or the loss watch is of another form")
        wanted = [] if self.average is None else self.average.values
        if [(each.shape, each.dtype) for each in average] != [(each.shape, each.dtype) for each in wanted]:
            raise ValueError("the averaged weights are others")
        if bool(state["trunk"]) != bool(self.run.trunk_rate):
            raise ValueError("the encoder's weights")
        self.detector.load_own(state["own"])
        if state["trunk"]:
            self.start.model.vision.load_state_dict(state["trunk"])
        for optimizer, each in zip(self.optimizers, state["optimizers"], strict=True):
            _load_optimizer(optimizer, each)
        if self.average is not None:
            self.average.values = average
        self.watch.restore(watch)
        self.step, self.elapsed_s = step, float(elapsed)


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """PyTorch compares only how many parameters there are: what else is wrong would show at the first step."""
    wanted = [set(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    if [set(group) for group in optimizer.param_groups] != wanted:
        raise ValueError("the optimizer's groups are of another form")
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                raise ValueError(f"the optimizer's {name} is of another shape than its parameter")


def _same_sizes(one: DetectorConfig, other: DetectorConfig) -> bool:
    """Whether a detector goes on being trained: only prompts and names may be others."""
    return one == replace(other, templates=one.templates, base_names=one.base_names)


def _optimizers(detector: Detector, run: DetectRun) -> tuple[torch.optim.Optimizer, ...]:
    """Of the detector's own parameters, and of the encoder's where it learns. Its positions stay: the detector's are
    made from them once."""
    found = make_optimizers(detector, detector.model.config, run.optimizer)
    if not run.trunk_rate:
        return found
    vision = detector.model.vision
    vision.requires_grad_(True)
    vision.positions.requires_grad_(False)
    slow = make_optimizers(vision, detector.model.config, run.optimizer)
    for optimizer in slow:
        for group in optimizer.param_groups:
            group["share"] *= run.trunk_rate
    return (*found, *slow)
