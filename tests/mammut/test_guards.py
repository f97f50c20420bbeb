"""When a run stops: the loss's watch and the tally of damaged data, by themselves. (In a run: test_loop.py.)"""

from __future__ import annotations

from typing import Any

import pytest

from mammut.training.guards import DamageTally, LossWatch
from mammut_runtime.errors import MammutError


def test_an_exploding_loss_stops_after_three_steps() -> None:
    watch = LossWatch(3.0)

    def check(loss: float, norm: float = 1.0) -> None:
        watch.check(7, {"loss": loss}, norm, "the last good checkpoint is X")

    for loss in (1400.0, 900.0, 300.0, 90.0, 40.0, 30.0):  # a focal loss on its way down
        check(loss)
    average = watch.average
    for loss in (5 * average, 5 * average, 30.0, 5 * average, 5 * average):  # single outliers are no explosion
        check(loss)
    with pytest.raises(MammutError, match=r"step 7: the loss explodes .* the last good checkpoint is X"):
        check(5 * average)
    with pytest.raises(MammutError, match="not finite"):
        check(1.0, float("inf"))
    restored = LossWatch(3.0)
    restored.restore(watch.state())
    assert restored.state() == watch.state()


def test_damage_is_judged_by_the_sum_of_all_processes(small_run: Any) -> None:
    """This process's own numbers are small; what matters is what `check` is given."""
    config = small_run.with_("data.max_damaged_pictures=0.01", "data.max_damaged_shards=0.25")
    tally = DamageTally(config, tuple(map(str, small_run.shards)), lambda message: None)
    tally.check(drawn=100, damaged=10, broken=1)  # the first thousand count as a thousand
    assert tally.found == (10, 1)
    with pytest.raises(MammutError, match="11 of 100 samples"):
        tally.check(100, 11, 0)
    with pytest.raises(MammutError, match="101 of 10000 samples"):
        tally.check(10_000, 101, 0)
    with pytest.raises(MammutError, match="2 of 4 shards"):
        tally.check(0, 0, 2)


def test_missing_files_count_before_anything_is_read(small_run: Any) -> None:
    notes: list[str] = []
    small_run.shards[0].unlink()
    paths = tuple(str(small_run.folder / f"{index}.tar") for index in range(4))
    DamageTally(small_run.with_("data.max_damaged_shards=0.25"), paths, notes.append)
    assert notes == [f"shard left out: {paths[0]}: no such file"]
    with pytest.raises(MammutError, match="1 of 4 shards"):
        DamageTally(small_run.with_("data.max_damaged_shards=0.2"), paths, notes.append)
