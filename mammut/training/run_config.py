"""A training run as one file: everything that decides its outcome, read strictly (an unknown key is refused by name).

`mammut-train new` writes one to edit; `mammut-train run` reads it; it is stored in every checkpoint of the run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from mammut.config import MammutConfig
from mammut.data.augment import AugmentOptions
from mammut.training.lora import LoraOptions
from mammut.training.objective import ObjectiveOptions
from mammut.training.optimizers import OptimizerOptions, schedule
from mammut.training.parallel import ParallelOptions
from mammut_runtime.errors import InputError
from mammut_runtime.preprocess import PreprocessRule
from mammut_runtime.strict import Between, from_dict, parse_json, to_dict

Count = Annotated[int, Between(1, 10**9)]
Share = Annotated[float, Between(0, 1)]


@dataclass(frozen=True)
class StageOptions:
    """A part of the run with its own picture size and learning rate schedule."""

    steps: Count
    image_size: Annotated[int, Between(1, 4096)]
    """Pixels; the position embeddings are resized to its grid."""
    learning_rate: Annotated[float, Between(0, 10)]
    """Peak."""
    warmup_steps: Annotated[int, Between(0, 10**9)]
    schedule: Literal["linear", "cosine", "constant", "continued"]
    """How the rate falls to nothing by the end of the stage. The paper: linear. continued: this stage and the one
    before share one curve, that one's (learning_rate and warmup_steps of this one are not used)."""
    crop_positions: bool
    """Cropped positional embeddings, see position_crops.py."""


@dataclass(frozen=True)
class Source:
    """Samples of one kind."""

    files: tuple[str, ...]
    """WebDataset tars (KEY.jpg beside KEY.txt or KEY.json) and JSON Lines files ({"file", "caption"} or {"file",
    "question", "answer"} a line; see plain_pair for all keys). Braces name many: "cc/{00000..00331}.tar". Local paths
    only. Clips: JSON Lines only, with "clip" in the place of "file", and "start_s" and "end_s" where it is a part."""
    kind: Literal["photo", "drawing", "plain", "scene", "clip", "moving"]
    """How `augment` may change its pictures. drawing: transparent, gets a new background each time. plain: position and
    colour carry meaning, so only small shifts. scene: its pictures are backgrounds, on which `drawings` are placed anew
    each time; what is said follows from that (scenes.py). clip: cropped and recoloured, all frames alike, never
    mirrored. moving: as scene, but clips in which the `drawings` move (clip_scenes.py)."""
    weight: Annotated[float, Between(1e-9, 1e9)]
    """How often it is drawn from, relative to the other sources."""
    question_share: Share | None = None
    """Instead of the run's."""
    drawings: tuple[str, ...] = ()
    """Of a scene or moving: tars of transparent pictures, whose captions are the names of what they show."""

    def __post_init__(self) -> None:
        composed = self.kind in ("scene", "moving")
        if composed != bool(self.drawings):
            wanted = "tars of what is placed in the scenes" if composed else f"none for kind {self.kind!r}"
            raise InputError(f"drawings: expected {wanted}, got {list(self.drawings)}")
        if self.kind == "clip" and not all(file.endswith(".jsonl") for file in self.files):
            raise InputError(f"files: clips are listed in .jsonl files, got {list(self.files)}")

    @property
    def of_clips(self) -> bool:
        return self.kind in ("clip", "moving")


@dataclass(frozen=True)
class DataOptions:
    """What is read, and how much of it may be damaged."""

    sources: tuple[Source, ...]
    question_share: Share
    """How often a picture that has both is asked one of its questions instead of being captioned. 0: captions only;
    1: questions only."""
    mixing: Literal["samples", "batches"]
    """Whether each sample of a batch may come from another source, or a whole batch is from one, the same for
    all processes: then the contrastive pass compares like with like."""
    workers: Annotated[int, Between(0, 256)]
    """Loading processes of each training process; 0 loads in between steps."""
    shuffle: Count
    """Samples of a tar that are mixed at a time; 1: as they come. The rows of a JSON Lines file are mixed whole, and
    shards in each epoch anyway."""
    margin: Annotated[float, Between(1, 4)]
    """Pictures are resized to this times the stage's size, then cropped at random. The paper: 272 / 224."""
    mirror: bool
    """Flip half of the photographs left to right."""
    augment: AugmentOptions | None
    """Crop, tilt, recolour and blank (augment.py), for small sets; null: the paper's crop alone."""
    max_damaged_pictures: Share
    """Unreadable samples are named and left out; more than this share of those seen (counted from 1,000 on as such,
    before as of 1,000) ends the run."""
    max_damaged_shards: Share
    """The same for shards that are missing or broken, of all shards."""


@dataclass(frozen=True)
class SaveOptions:
    """When to write what. Nothing here changes what is learned, so a resumed run may differ in it."""

    every_steps: Count
    keep: Count
    """Of the run's own checkpoints, how many of the newest stay."""
    form: Literal["whole", "sharded"]
    """whole: one process gathers and writes one file. sharded: every process writes its part."""
    log_every: Count
    """Steps between logged rows; 1 logs every loss."""
    tensorboard: bool
    """Also write TensorBoard files (needs the extra `tensorboard`)."""
    dtype: Literal["float32", "float16"]
    """Of the weights in checkpoint/. float16: half the bytes."""


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    format: Literal["mammut-edge run 1"]
    model: MammutConfig
    start: str
    """A checkpoint to start from ("demo", a folder, a file, hf-hub:ORG/NAME), or "" for random weights."""
    tokenizer: str
    """A tokenizer.json, "clip", or "" for the start checkpoint's own."""
    initial: Literal["plain", "structured"]
    """Of random weights. structured: see initial.py; helps small sets of pictures."""
    preprocess: PreprocessRule
    """Of the trained model; its mean and deviation are used in training."""
    prompts: dict[str, str]
    """See CheckpointConfig."""
    data: DataOptions
    objective: ObjectiveOptions
    optimizer: OptimizerOptions
    lora: LoraOptions | None
    """Adapt instead of training everything."""
    stages: tuple[StageOptions, ...]
    batch_size: Count
    """Pictures of a step, over all processes."""
    micro_batches: Count
    """Parts in which each process computes its share of the batch. The contrastive loss sees the whole batch."""
    parallel: ParallelOptions
    save: SaveOptions
    explode_factor: Annotated[float, Between(1.01, 1e9)]
    """A loss this many times its recent average, three steps in a row, ends the run."""
    seed: Annotated[int, Between(0, 2**31)]

    def __post_init__(self) -> None:
        if not self.stages:
            raise InputError("stages: expected at least one")
        for stage in self.stages:
            if stage.image_size < self.model.vision.patch_size:
                raise InputError(f"stages: image_size {stage.image_size} is smaller than a patch")
        self._check_clips()
        if self.stages[0].schedule == "continued":
            raise InputError("stages[0]: there is no stage before it to be continued")
        if not self.data.sources:
            raise InputError("data.sources: expected at least one")
        if self.data.question_share == 1 and self.objective.contrastive_weight:
            raise InputError("data.question_share 1: questions are not matched; set objective.contrastive_weight to 0")
        if self.optimizer.muon and self.parallel.strategy == "fsdp":
            raise InputError("optimizer.muon: needs whole matrices; set parallel.strategy to ddp, or muon to 0")
        if "caption" not in self.prompts or "{question}" not in self.prompts.get("ask", ""):
            raise InputError('prompts: expected "caption", and "ask" with {question}')
        if not self.tokenizer and not self.start:
            raise InputError('tokenizer: expected a tokenizer.json or "clip" where there is no start checkpoint')

    def _check_clips(self) -> None:
        kinds = {source.of_clips for source in self.data.sources}
        if True not in kinds:
            return
        if self.model.video is None:
            raise InputError(
                "data.sources: clips are for a model with tubes, and model.video is null; `mammut-train new "
                "video-caption` writes a run that adds them to a model for pictures"
            )
        if False in kinds and self.data.mixing != "batches":
            raise InputError('data.mixing: pictures and clips go into batches of their own; expected "batches"')
        size = self.model.vision.image_size
        if any(stage.image_size != size for stage in self.stages):
            raise InputError(f"stages: expected image_size {size}, the model's own, which its tubes are made for")

    @property
    def of_clips(self) -> bool:
        """Whether any of its sources is of clips."""
        return any(source.of_clips for source in self.data.sources)

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[int, StageOptions]:
        """Number and stage of a step of the run."""
        for number, stage in enumerate(self.stages):
            if step < stage.steps:
                return number, stage
            step -= stage.steps
        raise ValueError("the run is over")

    def rate_at(self, step: int) -> float:
        """Learning rate at a step of the run, before any layer's share of it."""
        number = self.stage_at(step)[0]
        first = max(n for n in range(number + 1) if self.stages[n].schedule != "continued")
        after = [n for n in range(first + 1, len(self.stages)) if self.stages[n].schedule != "continued"]
        curve = self.stages[first : after[0] if after else None]
        kind = curve[0].schedule
        assert kind != "continued"
        at = step - sum(stage.steps for stage in self.stages[:first])
        steps = sum(stage.steps for stage in curve)
        return curve[0].learning_rate * schedule(at, steps, curve[0].warmup_steps, kind)

    def local_batch(self, processes: int) -> int:
        """Pictures of one micro-batch on one process. InputError where the batch does not divide."""
        local, rest = divmod(self.batch_size, processes * self.micro_batches)
        if rest or not local:
            raise InputError(
                f"batch_size {self.batch_size} cannot be split evenly over {processes} processes x "
                f"{self.micro_batches} micro_batches; choose a multiple of {processes * self.micro_batches}"
            )
        return local

    @classmethod
    def from_dict(cls, data: object, where: str) -> RunConfig:
        """Read strictly; InputError names an unknown, missing or ill-typed key."""
        return from_dict(cls, data, where, InputError)

    @classmethod
    def read(cls, path: Path, changes: Sequence[str] = ()) -> RunConfig:
        """A file with `changes` such as "stages.0.steps=100" made to it. Errors as from_dict's."""
        try:
            data = parse_json(path.read_bytes(), str(path), InputError)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error}); `mammut-train new` writes a run to edit") from error
        return cls.from_dict(changed(data, changes), str(path))


def changed(data: Any, changes: Sequence[str]) -> Any:
    """The plain data with "path.to.key=value" changes made in place; values are JSON, or text where they are not.

    Raises:
        InputError: a path that does not exist, named.
    """
    for change in changes:
        path, equals, text = change.partition("=")
        if not equals:
            raise InputError(f"--set {change}: expected KEY=VALUE, such as stages.0.steps=100")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        keys: list[Any] = [int(key) if key.isdigit() else key for key in path.split(".")]
        at = data
        for key in keys[:-1]:
            at = _inside(at, key, path)
        _inside(at, keys[-1], path)
        at[keys[-1]] = value
    return data


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Paths at which two plain values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(key for key in other if key not in one)]
        return [
            each
            for key in keys
            for each in differences(one.get(key), other.get(key), f"{path}.{key}" if path else str(key))
        ]
    return [] if one == other else [path]


def mismatch(stored: RunConfig, given: RunConfig) -> list[str]:
    """What of a run's config may not differ when it is resumed, but does: paths. How it is saved and logged may."""
    found = differences(to_dict(stored), to_dict(given))
    return [path for path in found if not path.startswith("save.")]


def _inside(at: Any, key: Any, path: str) -> Any:
    try:
        return at[key]
    except (KeyError, IndexError, TypeError):
        known = list(at) if isinstance(at, dict) else list(range(len(at))) if isinstance(at, list) else []
        raise InputError(f"--set {path}: no such key {key!r}; expected one of {', '.join(map(str, known))}") from None
