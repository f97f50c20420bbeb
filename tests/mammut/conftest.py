"""Tiny tensors are fastest on one thread, the more so when several test workers share the machine."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from mammut.bpe_training import train_tokenizer
from mammut.presets import tiny
from mammut.training.recipes import pretrain
from mammut.training.run_config import RunConfig, changed
from mammut_runtime.strict import to_dict, to_json
from mammut_runtime.tokenizer import Tokenizer

torch.set_num_threads(1)


COLOURS = {"red": (40, 40, 200), "green": (40, 180, 40), "blue": (200, 60, 40), "grey": (128, 128, 128)}
"""Blue, green, red."""


def coloured_samples(number: int, start: int = 0) -> list[dict[str, Any]]:
    """Plain pictures with a caption and a question: {"key", "png", "json"}."""
    samples = []
    for index in range(start, start + number):
        name = list(COLOURS)[index % len(COLOURS)]
        pixels = np.full((40, 44, 3), COLOURS[name], np.uint8)
        pixels[: 5 + index % 20, :9] = 255  # no two alike
        row = {"caption": f"a {name} thing number {index}", "question": "which colour?", "answer": name}
        samples.append({"key": f"{index:05d}", "png": cv2.imencode(".png", pixels)[1].tobytes(), "json": row})
    return samples


def write_tar(path: Path, samples: list[dict[str, Any]]) -> None:
    """A WebDataset tar."""
    with tarfile.open(path, "w") as tar:
        for sample in samples:
            for suffix, data in (("png", sample["png"]), ("json", json.dumps(sample["json"]).encode())):
                member = tarfile.TarInfo(f"{sample['key']}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@dataclass(frozen=True)
class SmallRun:
    """A folder with four shards of twelve samples each, a tokenizer, and the config of a run on them."""

    folder: Path
    config: RunConfig

    @property
    def shards(self) -> list[Path]:
        return sorted(self.folder.glob("*.tar"))

    def with_(self, *changes: str) -> RunConfig:
        """The config with changes such as "batch_size=4"."""
        return RunConfig.from_dict(changed(to_dict(self.config), changes), "config")

    def write(self, *changes: str) -> Path:
        """A config file."""
        path = self.folder / "run.json"
        path.write_bytes(to_json(self.with_(*changes)))
        return path


@pytest.fixture
def small_run(tmp_path: Path) -> SmallRun:
    folder = tmp_path / "data"
    folder.mkdir()
    for shard in range(4):
        write_tar(folder / f"{shard}.tar", coloured_samples(12, 12 * shard))
    asked = ["question: which colour? answer:"] * 2
    tokenizer = train_tokenizer([*(f"a {name} thing number 0123456789" for name in COLOURS), *asked, *COLOURS], 600)
    (folder / "tokenizer.json").write_bytes(tokenizer)
    model = tiny(Tokenizer.from_bytes(tokenizer).vocab_size)
    config = pretrain(model, [str(folder / "{0..3}.tar")], str(folder / "tokenizer.json"))
    changes = [
        "batch_size=8", "data.workers=0", "data.shuffle=5", "stages.0.steps=6", "stages.0.warmup_steps=2",
        "save.every_steps=3", "save.log_every=1", 'parallel.precision="fp32"',
    ]  # fmt: skip
    return SmallRun(folder, RunConfig.from_dict(changed(to_dict(config), changes), "config"))


@pytest.fixture(name="coloured_samples")
def _coloured_samples() -> Any:
    return coloured_samples


@pytest.fixture(name="write_tar")
def _write_tar() -> Any:
    return write_tar
