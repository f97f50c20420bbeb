"""What stops a run before it does harm: a loss that is not a number or explodes, and too much damaged data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mammut.data.pair_loader import LoadedBatch
from mammut.data.shards import file_sizes
from mammut.training.run_config import RunConfig
from mammut_runtime.errors import MammutError

EXPLODING_STEPS, AVERAGED_STEPS = 3, 50


class LossWatch:
    """Stops a run whose loss is not a number or explodes."""

    def __init__(self, factor: float) -> None:
        self.factor, self.average, self.seen, self.above = factor, 0.0, 0, 0

    def check(self, step: int, losses: dict[str, float], norm: float, kept: str) -> None:
        """Before the weights are changed. Raises MammutError, which says `kept`."""
        loss = losses["loss"]
        shown = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        advice = f"{kept}; train again with a lower learning rate or a longer warm-up"
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise MammutError(f"step {step}: loss or gradient is not finite ({shown}, norm {norm:.4g}); {advice}")
        # From the first loss on, which is the largest of a healthy run; a sum of uncertainties may be below 0.
        exploding = self.seen > 0 and loss > max(self.average * self.factor, self.average + 1.0)
        self.above = self.above + 1 if exploding else 0
        if self.above >= EXPLODING_STEPS:
            raise MammutError(f"step {step}: the loss explodes ({shown}, average before {self.average:.4g}); {advice}")
        if not exploding:
            self.seen += 1
            self.average += (loss - self.average) / min(self.seen, AVERAGED_STEPS)

    def state(self) -> list[float]:
        return [self.average, self.seen, self.above]

    def restore(self, state: list[float]) -> None:
        self.average, self.seen, self.above = state[0], int(state[1]), int(state[2])


class DamageTally:
    """Counts and names what of the data cannot be used, and says when it is too much."""

    def __init__(self, config: RunConfig, paths: tuple[str, ...], note: Callable[[str], None]) -> None:
        """Missing files count at once. Raises MammutError where there are too many."""
        self.options, self.paths, self.note = config.data, paths, note
        self.drawn = self.damaged = 0
        self.last = ""
        self.missing = tuple(path for path, size in file_sizes(paths).items() if size < 0)
        self.broken: dict[str, str] = {}
        self.found = (0, 0)
        for path in self.missing:
            note(f"shard left out: {path}: no such file")
        self.check(0, 0, 0)

    def add(self, batch: LoadedBatch) -> None:
        """Note what this process met."""
        self.drawn += batch.drawn
        self.damaged += len(batch.damaged)
        for name in batch.damaged:
            self.last = name
            self.note(f"left out: {name}")
        for broken in batch.broken_shards:
            path, _, reason = broken.partition(": ")
            if path not in self.missing and path not in self.broken:
                self.broken[path] = reason
                self.note(f"shard cut short or left out: {broken}")

    def counts(self) -> list[int]:
        """What `check` wants, of this process."""
        return [self.drawn, self.damaged, len(self.broken)]

    def check(self, drawn: int, damaged: int, broken: int) -> None:
        """Sums over all processes. Raises MammutError when more is damaged than the config allows."""
        shards, options = len(self.missing) + broken, self.options
        self.found = (damaged, shards)
        if damaged > options.max_damaged_pictures * max(drawn, 1000):
            last = f"; the last here: {self.last}" if self.last else ""
            raise MammutError(
                f"{damaged} of {drawn} samples cannot be used, more than the {options.max_damaged_pictures:.2%} that "
                f"may be (data.max_damaged_pictures){last}"
            )
        if shards > options.max_damaged_shards * len(self.paths):
            names = ", ".join([*self.missing, *self.broken][:5])
            raise MammutError(
                f"{shards} of {len(self.paths)} shards are missing or broken, more than the "
                f"{options.max_damaged_shards:.2%} that may be (data.max_damaged_shards): {names}"
            )

    def state(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "damaged": self.damaged, "broken": self.broken}

    def restore(self, state: dict[str, Any]) -> None:
        self.drawn, self.damaged, self.broken = state["drawn"], state["damaged"], dict(state["broken"])
