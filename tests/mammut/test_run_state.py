"""Checkpoints of a run: what they hold, that they appear whole or not at all, and that a full disk costs nothing."""

from __future__ import annotations

import errno
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mammut.training.loop import Run, train
from mammut.training.parallel import Place
from mammut.training.run_state import RUN_FILE, code_version, read_info, save_state, saved_steps
from mammut_runtime.errors import CheckpointError, MammutError

ALONE = Place(0, 1, torch.device("cpu"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", ["whole", "sharded"])
def test_a_full_disk_leaves_the_checkpoint_before_it_whole(small_run: Any, tmp_path: Path, form: str) -> None:
    """No file may grow past 100 kB: the state of the model does not fit."""
    config, out = small_run.with_("stages.0.steps=3", f'save.form="{form}"'), tmp_path / "out"
    train(config, out, ALONE)
    before = contents(out / "step-00000003")
    run = Run(small_run.with_("stages.0.steps=6", f'save.form="{form}"'), out, ALONE, lambda message: None)
    run.step = 4
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(MammutError, match=r"step 4 could not be written \(.*step-00000003 is whole; go on"):
            run.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in saved_steps(out)] == ["step-00000003"]
    assert contents(out / "step-00000003") == before
    assert not list(out.glob(".step-*"))  # and nothing is left of the attempt
    run.save()  # control: with room it works
    assert [path.name for path in saved_steps(out)] == ["step-00000003", "step-00000004"]


def test_no_space_at_any_file_is_the_same(small_run: Any, tmp_path: Path) -> None:
    run = Run(small_run.config, tmp_path / "out", ALONE, lambda message: None)

    def full(state: Any, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with pytest.raises(MammutError, match=r"No space left on device.*there is none before it"):
        save_state(tmp_path / "out", run.info, run.learner, b"{}", ALONE, write=full)
    assert saved_steps(tmp_path / "out") == []


def test_an_unfinished_checkpoint_is_not_seen(small_run: Any, tmp_path: Path) -> None:
    """As kill -9 in the middle of writing would leave it."""
    out = tmp_path / "out"
    train(small_run.with_("stages.0.steps=3"), out, ALONE)
    shutil.copytree(out / "step-00000003", out / ".step-00000006.partial")
    (out / "step-00000009").mkdir()
    assert [path.name for path in saved_steps(out)] == ["step-00000003"]
    assert read_info(out).step == 3


def test_only_the_newest_are_kept(small_run: Any, tmp_path: Path) -> None:
    train(small_run.with_("stages.0.steps=7", "save.every_steps=2", "save.keep=2"), tmp_path / "out", ALONE)
    assert [path.name for path in saved_steps(tmp_path / "out")] == ["step-00000006", "step-00000007"]


def test_an_edited_or_missing_description_is_refused(small_run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(small_run.with_("stages.0.steps=3"), out, ALONE)
    path = out / "step-00000003" / RUN_FILE
    row = json.loads(path.read_text())
    row["config"]["optimizer"]["wieght_decay"] = 0.1
    path.write_text(json.dumps(row))
    with pytest.raises(CheckpointError, match=r"config\.optimizer: unknown key 'wieght_decay'"):
        read_info(out)
    with pytest.raises(CheckpointError, match="no checkpoint of a run here"):
        read_info(tmp_path)


def test_code_version_is_stable() -> None:
    assert code_version() == code_version()
    assert len(code_version().split("sha256:")[1]) == 16
