"""The training loop: repeatable, resumable after kill -9 and in the middle of a shard, stopped by bad input."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mammut.checkpoint import load_checkpoint
from mammut.training.loop import Run, stored_config, train
from mammut.training.parallel import Place
from mammut.training.run_config import RunConfig
from mammut.training.run_log import read_log
from mammut.training.run_state import saved_steps
from mammut_runtime.errors import CheckpointError, InputError, MammutError

ALONE = Place(0, 1, torch.device("cpu"))
COMMAND = [sys.executable, "-m", "mammut.commands"]
KEPT = ("step", "loss", "loss_contrastive", "loss_caption", "gradient_norm", "learning_rate", "damaged_pictures")


def curve(folder: Path) -> list[dict[str, Any]]:
    """What of the log must be equal in equal runs: all but the clock."""
    return [{key: row[key] for key in KEPT} for row in read_log(folder)]


def stopped(config: RunConfig, out: Path, steps: int) -> None:
    """The first steps of a run, as if it had been stopped after saving."""
    run = Run(config, out, ALONE, lambda message: None)
    from mammut.training.run_log import RunLog

    def stop(done: int) -> None:
        if done == steps:
            raise KeyboardInterrupt

    with RunLog(out, 0, config.steps, False) as log:
        log.step = stop  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            run.run(log)
        run.save()


def test_a_run_learns_and_leaves_a_checkpoint(small_run: Any, tmp_path: Path) -> None:
    config = small_run.with_("stages.0.steps=50", "stages.0.learning_rate=0.003", "save.every_steps=100")
    folder = train(config, tmp_path / "out", ALONE)
    rows = read_log(tmp_path / "out")
    assert [row["step"] for row in rows] == list(range(1, 51))
    assert sum(r["loss_caption"] for r in rows[-5:]) < 0.9 * sum(r["loss_caption"] for r in rows[:5])
    assert rows[-1].keys() >= {"pictures_per_s", "waited_for_data", "learning_rate", "gradient_norm", "logit_scale"}
    assert load_checkpoint(folder).model.config == config.model
    assert stored_config(folder) == config and stored_config(tmp_path / "out") == config


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_is_uninterrupted(small_run: Any, tmp_path: Path, workers: int) -> None:
    """Stopped in the middle of a shard and of a stage, with everything random switched on."""
    changes = (
        f"data.workers={workers}", "data.mirror=true", "stages.0.crop_positions=true", "micro_batches=2",
        "objective.position_dropout=0.3", 'objective.weighting="learned"',
    )  # fmt: skip
    config = small_run.with_(*changes)
    train(config, tmp_path / "whole", ALONE)
    stopped(config, tmp_path / "parts", 4)
    train(config, tmp_path / "parts", ALONE, resume=True)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    ours, theirs = (load_checkpoint(tmp_path / name / "checkpoint").model for name in ("parts", "whole"))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    train(dataclasses.replace(config, seed=1), tmp_path / "other", ALONE)
    assert curve(tmp_path / "other") != curve(tmp_path / "whole")  # control


def test_resolution_changes_between_stages(small_run: Any, tmp_path: Path) -> None:
    config = small_run.with_("stages.0.image_size=48", "stages.0.steps=3")
    second = dataclasses.replace(config.stages[0], image_size=32, steps=2, learning_rate=1e-4, warmup_steps=1)
    config = dataclasses.replace(config, stages=(config.stages[0], second))
    train(config, tmp_path / "whole", ALONE)
    rows = read_log(tmp_path / "whole")
    assert [row["image_size"] for row in rows] == [48, 48, 48, 32, 32]
    assert [row["learning_rate"] for row in rows] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-4, 1e-4])
    stopped(config, tmp_path / "parts", 3)
    train(config, tmp_path / "parts", ALONE, resume=True)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def run_process(arguments: list[str], **options: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment, **options)


def test_killed_and_resumed_is_uninterrupted(small_run: Any, tmp_path: Path) -> None:
    """kill -9 at any moment after the first checkpoint; the command is started again."""
    config_file = small_run.write("stages.0.steps=300", "save.every_steps=7", "data.workers=1")
    out = tmp_path / "killed"
    process = run_process([*COMMAND, "run", str(config_file), str(out)])
    until = time.monotonic() + 120
    while not saved_steps(out) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    reached = len(read_log(out))
    assert process.returncode == -signal.SIGKILL and saved_steps(out) and reached < 300
    steps = reached + 5
    # The same run, as far as it is compared, but shorter: only its end is changed, in the stored config too.
    config = small_run.with_("stages.0.steps=300", "save.every_steps=7", "data.workers=1")
    whole, again = (Run(config, tmp_path / name, ALONE, lambda message: None) for name in ("whole", "again"))
    again.resume(saved_steps(out)[-1])
    losses: dict[str, list[float]] = {}
    for name, run in (("whole", whole), ("again", again)):
        losses[name] = first_losses(run, steps)
    assert losses["again"] == losses["whole"][-len(losses["again"]) :]
    logged = [row["loss"] for row in read_log(out)]
    assert logged == losses["whole"][: len(logged)]


def first_losses(run: Run, steps: int) -> list[float]:
    """Losses of the steps up to `steps`, by the loop itself."""
    found: list[float] = []

    class Log:
        def row(self, row: dict[str, Any]) -> None:
            found.append(row["loss"])

        def step(self, done: int) -> None:
            if done == steps:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run(Log())  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(("strategy", "form", "muon"), [("fsdp", "sharded", 0), ("ddp", "whole", 20)])
def test_torchrun_is_resumed_exactly(small_run: Any, tmp_path: Path, strategy: str, form: str, muon: int) -> None:
    """Two processes; the checkpoint of the end is taken away, and the steps from the one before come out the same."""
    config_file = small_run.write(
        f'parallel.strategy="{strategy}"', f'save.form="{form}"', "micro_batches=2", "stages.0.steps=4",
        "parallel.recompute_blocks=true", "data.workers=1", f"optimizer.muon={muon}", "optimizer.average=0.9",
    )  # fmt: skip
    out = tmp_path / "out"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*torchrun, "mammut.commands", "run", str(config_file), str(out)]
    _, messages = run_process(command).communicate(timeout=300)
    whole = curve(out)
    assert [row["step"] for row in whole] == [1, 2, 3, 4], messages
    assert (out / "step-00000003" / "process-1.json").is_file()
    assert (out / "step-00000003" / ("sharded" if form == "sharded" else "state.pt")).exists()
    first = load_checkpoint(out / "checkpoint").model
    shutil.rmtree(out / "step-00000004")
    _, messages = run_process([*command, "--resume"]).communicate(timeout=300)
    assert f"going on from {out}/step-00000003" in messages and curve(out) == whole, messages
    again = load_checkpoint(out / "checkpoint").model
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_a_resumed_run_must_be_the_same_run(small_run: Any, tmp_path: Path) -> None:
    config, out = small_run.with_("stages.0.steps=3"), tmp_path / "out"
    train(config, out, ALONE)
    with pytest.raises(InputError, match="already holds a run"):
        train(config, out, ALONE)
    for change, named in (
        ("model.text.layers=1", r"model\.text\.layers"), ("seed=5", "other seed"), ("batch_size=4", "batch_size"),
        ("optimizer.weight_decay=0.5", r"optimizer\.weight_decay"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=named):
            train(small_run.with_("stages.0.steps=3", change), out, ALONE, resume=True)
    train(small_run.with_("stages.0.steps=3", "save.log_every=2"), out, ALONE, resume=True)  # control
    with small_run.shards[1].open("ab") as file:
        file.write(b"\0" * 10_240)
    with pytest.raises(InputError, match=r"the data is not what it was saved with \(.*1\.tar"):
        train(config, out, ALONE, resume=True)


def test_a_damaged_checkpoint_is_said(small_run: Any, tmp_path: Path) -> None:
    config, out = small_run.with_("stages.0.steps=3"), tmp_path / "out"
    train(config, out, ALONE)
    process = out / "step-00000003" / "process-0.json"
    whole = process.read_bytes()
    process.write_bytes(whole[:20])
    with pytest.raises(CheckpointError, match="step-00000003: damaged: not readable as JSON"):
        train(config, out, ALONE, resume=True)
    process.write_bytes(whole)
    train(config, out, ALONE, resume=True)  # control
    state = out / "step-00000003" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"step-00000003: damaged \(.*remove it to resume from the one before"):
        train(config, out, ALONE, resume=True)
    torch.save({"model": {}, "optimizer": {}}, state)  # whole, but of something else
    with pytest.raises(CheckpointError, match="step-00000003: does not fit this run's model"):
        train(config, out, ALONE, resume=True)


def test_damaged_pictures_are_named_and_skipped_up_to_the_share(
    small_run: Any, tmp_path: Path, write_tar: Any, coloured_samples: Any
) -> None:
    samples = coloured_samples(12)
    samples[3]["png"] = b"not a picture"
    samples[7]["json"] = {"label": 5}
    write_tar(small_run.shards[0], samples)
    notes: list[str] = []
    config = small_run.with_("data.max_damaged_pictures=0.01", "stages.0.steps=9")
    assert train(config, tmp_path / "a", ALONE, note=notes.append).is_dir()
    left_out = [each for each in notes if each.startswith("left out: 0.tar: ")]
    assert {each.split()[3] for each in left_out} == {"00003:", "00007:"}
    assert read_log(tmp_path / "a")[-1]["damaged_pictures"] == len(left_out)
    with pytest.raises(MammutError, match=r"more than the 0\.10% that may be \(data\.max_damaged_pictures\); the last"):
        train(small_run.with_("data.max_damaged_pictures=0.001", "stages.0.steps=9"), tmp_path / "b", ALONE)


def test_missing_and_broken_shards_are_named_and_skipped_up_to_the_share(small_run: Any, tmp_path: Path) -> None:
    small_run.shards[3].unlink()
    small_run.shards[0].write_bytes(b"not a tar" * 200)
    notes: list[str] = []
    config = small_run.with_("data.max_damaged_shards=0.5", "stages.0.steps=9")
    train(config, tmp_path / "a", ALONE, note=notes.append)
    named = [each for each in notes if each.startswith("shard ")]
    assert len(named) == 2 and any("3.tar: no such file" in each for each in named)
    assert read_log(tmp_path / "a")[-1]["damaged_shards"] == 2
    with pytest.raises(MammutError, match="2 of 4 shards are missing or broken, more than the 30"):
        train(small_run.with_("data.max_damaged_shards=0.3", "stages.0.steps=9"), tmp_path / "b", ALONE)
    with pytest.raises(MammutError, match="1 of 4 shards are missing"):
        train(small_run.with_("data.max_damaged_shards=0.1", "stages.0.steps=9"), tmp_path / "c", ALONE)


def test_a_loss_that_is_not_a_number_keeps_the_last_good_checkpoint(
    small_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mammut.model import Mammut

    calls = itertools.count(1)
    plain = Mammut.encode_text

    def poisoned(self: Mammut, ids: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        out = plain(self, ids, normalize)
        return out * float("nan") if next(calls) == 5 else out

    monkeypatch.setattr(Mammut, "encode_text", poisoned)
    with pytest.raises(MammutError, match=r"step 4: loss or gradient is not finite .*step-00000003; train again"):
        train(small_run.config, tmp_path / "out", ALONE)
    kept = saved_steps(tmp_path / "out")
    assert [path.name for path in kept] == ["step-00000003"]
    state = torch.load(kept[0] / "state.pt", weights_only=True)["model"]
    assert all(bool(torch.isfinite(value).all()) for value in state.values())
    train(small_run.config, tmp_path / "out", ALONE, resume=True)  # and it can be gone on from
    assert len(read_log(tmp_path / "out")) == 6


def test_a_wrong_start_is_refused(small_run: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds another model"):
        start = train(small_run.with_("stages.0.steps=1"), tmp_path / "a", ALONE)
        config = small_run.with_("model.text.layers=1", 'tokenizer=""', f'start="{start}"')
        train(config, tmp_path / "d", ALONE)
    with pytest.raises(InputError, match="vocabulary only"):
        config = small_run.with_("model.text.vocab_size=64", "model.text.embedding_rows=64")
        train(config, tmp_path / "b", ALONE)
    with pytest.raises(InputError, match=r"nowhere\.json cannot be read"):
        train(small_run.with_('tokenizer="nowhere.json"'), tmp_path / "c", ALONE)


def test_the_config_is_repeated_from_a_checkpoint(small_run: Any, tmp_path: Path) -> None:
    """`mammut-train --resume-config CHECKPOINT --out OUT`: the same curve again."""
    from mammut.commands import cli
    from mammut_runtime import console

    train(small_run.config, tmp_path / "out", ALONE)
    checkpoint = tmp_path / "out" / "step-00000003"
    info = json.loads((checkpoint / "run.json").read_text())
    assert info["config"]["seed"] == 0 and info["code"].count("sha256:") == 1 and info["processes"] == 1
    assert [Path(file["path"]).name for file in info["data"]] == ["0.tar", "1.tar", "2.tar", "3.tar"]
    arguments = ["--resume-config", str(checkpoint), "--out", str(tmp_path / "again")]
    assert console.run(cli, arguments) == 0
    assert curve(tmp_path / "again") == curve(tmp_path / "out")
