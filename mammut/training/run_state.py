"""Checkpoints of a run: everything to go on from, written so that a crash or a full disk never costs the one before.

    OUT/step-00001000/run.json       config, step, data files with their sizes, code version, processes
                      state.pt       model, averaged weights and optimizers (form "whole"), or
                      sharded/       the same in parts, by torch.distributed.checkpoint (form "sharded")
                      process-0.json where this training process's data streams stand

A checkpoint is written under another name and gets its own when it is whole and on the disk.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded

from mammut.training.optimizers import Average
from mammut.training.parallel import Place
from mammut.training.run_config import RunConfig, mismatch
from mammut_runtime.errors import CheckpointError, InputError, MammutError
from mammut_runtime.strict import from_dict, parse_json, to_json

RUN_FILE, STATE_FILE, SHARDED_FOLDER = "run.json", "state.pt", "sharded"
_MOST_BYTES = 256_000_000
"""Of a run.json: the list of data files may be long."""


_DAMAGE = (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError, CheckpointException)
"""What reading a damaged file may raise."""


@dataclass(frozen=True)
class DataFile:
    path: str
    size_bytes: int
    """-1: was missing."""


@dataclass(frozen=True)
class RunInfo:
    """run.json."""

    format: Literal["mammut-edge run state 1"]
    config: RunConfig
    step: int
    """Steps done."""
    processes: int
    data: tuple[DataFile, ...]
    code: str
    """Version and hash of the code that ran, see code_version."""
    torch: str
    tokenizer_sha256: str


@dataclass(frozen=True)
class Learner:
    """What changes with every step."""

    model: nn.Module
    """As it runs, inside DDP or FSDP."""
    optimizers: tuple[torch.optim.Optimizer, ...]
    average: Average | None

    def state(self, options: StateDictOptions) -> dict[str, Any]:
        """Under names that do not depend on the layout over processes."""
        model, optimizer = get_state_dict(self.model, self.optimizers, options=options)
        state = {"model": model, "optimizer": optimizer}
        if self.average is not None:
            # A state dict's tensors may be the model's own, which get their values back.
            with self.average.in_place():
                averaged = get_model_state_dict(self.model, options=options)
                state["average"] = {n: value.clone() for n, value in averaged.items() if isinstance(value, Tensor)}
        return state

    def restore(self, state: dict[str, Any], options: StateDictOptions) -> None:
        """Take over what `state` gave."""
        if self.average is not None:
            # state["model"] may be the model's own tensors: what they hold must come back, as it does here.
            with self.average.in_place():
                set_model_state_dict(self.model, state["average"], options=options)
        set_state_dict(
            self.model, self.optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
            options=options,
        )  # fmt: skip


def code_version() -> str:
    """Version of the package and the hash of the core's sources: "0.1.0 sha256:..."."""
    digest = hashlib.sha256()
    own = Path(__file__).parents[1]
    for path in sorted(own.rglob("*.py")):
        digest.update(path.relative_to(own).as_posix().encode() + b"\0" + path.read_bytes())
    try:
        version = importlib.metadata.version("mammut-edge")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    return f"{version} sha256:{digest.hexdigest()[:16]}"


def saved_steps(out: Path) -> list[Path]:
    """The run's whole checkpoints, oldest first."""
    return sorted(path for path in out.glob("step-*") if (path / RUN_FILE).is_file())


def begun(out: Path, resume: bool) -> Path | None:
    """The newest checkpoint that OUT holds. InputError where there is one and nobody asked to go on from it."""
    found = saved_steps(out)
    if found and not resume:
        raise InputError(f"{out}: already holds a run ({found[-1].name}); go on with --resume or choose another folder")
    return found[-1] if found else None


def read_info(folder: Path) -> RunInfo:
    """What a checkpoint of a run says about itself. `folder`: step-N, or a run's folder for its newest.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if not (folder / RUN_FILE).is_file() and saved_steps(folder):
        folder = saved_steps(folder)[-1]
    path = folder / RUN_FILE
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{folder}: no checkpoint of a run here; expected step-N with {RUN_FILE}") from error
    return from_dict(RunInfo, parse_json(text, str(path), CheckpointError, _MOST_BYTES), str(path), CheckpointError)


def save_state(
    out: Path,
    info: RunInfo,
    learner: Learner,
    process: bytes,
    place: Place,
    write: Callable[[Any, Path], None] | None = None,
) -> Path:
    """Write a checkpoint; all processes must call. Older ones than the newest `keep` are removed afterwards.

    Args:
        process: what this process needs to go on.
        write: for tests: saves an object to a file.

    Raises:
        MammutError: it could not be written, on any process. The checkpoints before it are as they were.
    """
    name = f"step-{info.step:08d}"
    new = out / f".{name}.partial"
    problem: BaseException | None = None
    if place.main:
        try:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
        except OSError as error:
            problem = error
    _agree(problem, place, out, info.step)
    try:
        (new / f"process-{place.rank}.json").write_bytes(process)
        _write_state(new, info, learner, place, write or torch.save)
        if place.main:
            (new / RUN_FILE).write_bytes(to_json(info))
        _to_disk(new, place)
    except (OSError, RuntimeError, CheckpointException) as error:
        problem = error
    try:
        _agree(problem, place, out, info.step)
    except MammutError:
        if place.main:
            shutil.rmtree(new, ignore_errors=True)
        raise
    if place.main:
        shutil.rmtree(out / name, ignore_errors=True)
        new.rename(out / name)
        _sync(out)
        for old in saved_steps(out)[: -info.config.save.keep]:
            shutil.rmtree(old, ignore_errors=True)
    _meet()
    return out / name


def load_state(folder: Path, info: RunInfo, learner: Learner, place: Place) -> bytes:
    """Put a checkpoint's numbers into the learner; returns what this process had left for itself.

    Raises:
        CheckpointError: it is damaged, or does not fit: said apart.
    """
    whole = info.config.save.form == "whole"
    options = StateDictOptions(full_state_dict=whole)
    try:
        process = (folder / f"process-{place.rank}.json").read_bytes()
        if whole:
            state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True, mmap=True)
        else:
            state = learner.state(options)
            load_sharded(state, checkpoint_id=folder / SHARDED_FOLDER, no_dist=not dist.is_initialized())
    except _DAMAGE as error:
        raise CheckpointError(
            f"{folder}: damaged ({_reason(error)}); remove it to resume from the one before"
        ) from error
    try:
        learner.restore(state, options)
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: does not fit this run's model ({_reason(error)})") from error
    return process


def _reason(error: BaseException) -> str:
    return str(error).split("\n")[0] or type(error).__name__


def check_resumable(folder: Path, stored: RunInfo, now: RunInfo) -> None:
    """Raise InputError where the run that is resumed is not the one that was saved: other model, other data, others."""
    wrong = mismatch(stored.config, now.config)
    if wrong:
        raise InputError(f"{folder}: was saved by a run with other {', '.join(wrong[:5])}; resume with its own config")
    if stored.processes != now.processes:
        raise InputError(f"{folder}: was saved by {stored.processes} processes, not {now.processes}; use as many")
    if stored.tokenizer_sha256 != now.tokenizer_sha256:
        raise InputError(f"{folder}: was saved with another tokenizer; resume with its own")
    if stored.data != now.data:
        before = {file.path: file.size_bytes for file in stored.data}
        changed = [file.path for file in now.data if before.get(file.path) != file.size_bytes]
        missing = [path for path in before if path not in {file.path for file in now.data}]
        names = ", ".join([*changed, *missing][:5]) or "their order"
        raise InputError(f"{folder}: the data is not what it was saved with ({names}); resume on the same files")


def with_step(info: RunInfo, step: int) -> RunInfo:
    """The same after `step` steps."""
    return dataclasses.replace(info, step=step)


def _write_state(new: Path, info: RunInfo, learner: Learner, place: Place, write: Callable[[Any, Path], None]) -> None:
    whole = info.config.save.form == "whole"
    state = learner.state(StateDictOptions(full_state_dict=whole, cpu_offload=whole))
    if not whole:
        save_sharded(state, checkpoint_id=new / SHARDED_FOLDER, no_dist=not dist.is_initialized())
    elif place.main:
        write(state, new / STATE_FILE)


def _agree(problem: BaseException | None, place: Place, out: Path, step: int) -> None:
    """Raise on every process when there was a problem on any."""
    failed = torch.tensor(int(problem is not None), device=place.device)
    if dist.is_initialized():
        dist.all_reduce(failed)
    if int(failed):
        reason = _reason(problem) if problem else "another process says why"
        kept = saved_steps(out)
        before = f"{kept[-1]} is whole; go on from it with --resume" if kept else "there is none before it"
        raise MammutError(f"the checkpoint of step {step} could not be written ({reason}); {before}") from problem


def _to_disk(folder: Path, place: Place) -> None:
    """What this process wrote must be on the disk before the folder gets its name."""
    own = [folder / f"process-{place.rank}.json"]
    if place.main:
        own = [path for path in folder.rglob("*") if path.is_file()]
    else:
        own += list((folder / SHARDED_FOLDER).glob(f"__{place.rank}_*"))
    for path in own:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _meet() -> None:
    if dist.is_initialized():
        dist.barrier()
