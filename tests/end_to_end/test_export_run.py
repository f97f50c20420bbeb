"""From a published form of checkpoint to an answer on a device: both commands as a user starts them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mammut import openmammut
from mammut.bpe_training import train_tokenizer
from mammut.checkpoint import load_checkpoint
from mammut.generate import greedy
from mammut.model import Mammut
from mammut_runtime.preprocess import Preprocessor
from mammut_runtime.tokenizer import Tokenizer

torch.set_num_threads(1)
IMAGE_SIZE = 48
"""Not the trained 40, and no whole number of patches of 14: position embeddings are resized, pixels are left over."""


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An openMaMMUT checkpoint as it is published: class token, blocks without MLP, quick GELU, unmasked pads."""
    folder = tmp_path_factory.mktemp("published") / "mammut-tiny"
    folder.mkdir()
    tokenizer_json = train_tokenizer(["a red cat and a blue dog"] * 2, 540)
    vocab_size = Tokenizer.from_bytes(tokenizer_json).vocab_size
    config = {
        "model_cfg": {
            "embed_dim": 32, "custom_text": True, "quick_gelu": True,
            "vision_cfg": {
                "image_size": 40, "layers": 2, "width": 48, "head_width": 24, "patch_size": 14,
                "output_tokens": True, "pool_type": "avg_all", "final_ln_after_pool": True,
            },
            "text_cfg": {
                "context_length": 40, "vocab_size": vocab_size, "width": 32, "heads": 2, "layers": 4,
                "output_tokens": True, "cross_attn_ratio": 2, "does_full_decoding": True, "has_mlp": False,
            },
        },
        "preprocess_cfg": {"size": 40},
    }  # fmt: skip
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes(tokenizer_json)
    shapes, _ = openmammut.read_config(folder, "tiny")
    text = dataclasses.replace(shapes.text, embedding_rows=vocab_size)
    model = Mammut(dataclasses.replace(shapes, text=text)).requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    state = openmammut.to_public(model.state_dict(), model.config)
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("device") / "bundle"
    printed = _run("mammut_export.commands", checkpoint_folder, out, "--image-size", IMAGE_SIZE, "--max-tokens", 8)
    assert "captions: 5 of 5 the same token for token" in printed.stdout
    assert printed.stderr == ""
    return out


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(3).integers(0, 256, (90, 70, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "noise.png"), pixels)
    return tmp_path / "noise.png"


def test_from_a_published_checkpoint_to_answers(bundle: Path, checkpoint_folder: Path, picture: Path) -> None:
    """One test, because the export takes most of its time."""
    (line,) = _json_lines(_run_on(bundle, "caption", "--json", "--beams", 1, picture))
    assert line["ids"] == _caption_of_the_core(checkpoint_folder, picture)
    (matches,) = _json_lines(_run_on(bundle, "match", "--json", "--texts", "a cat, a dog", picture))
    assert {each["text"] for each in matches["matches"]} == {"a cat", "a dog"}
    (answer,) = _json_lines(_run_on(bundle, "ask", "--json", "--question", "what is it?", picture))
    assert isinstance(answer["text"], str)
    assert "canary reproduced" in _run_on(bundle, "verify").stdout
    # This dialect counts pads, so texts are checked with them; and it was exported for another picture size.
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["text"]["text_length"] == 40 == len(manifest["canary"]["ids"])
    assert manifest["preprocess"]["size"] == IMAGE_SIZE and manifest["model"]["image_tokens"] == 1 + 3 * 3


def _caption_of_the_core(checkpoint_folder: Path, picture: Path) -> list[int]:
    checkpoint = load_checkpoint(checkpoint_folder, image_size=IMAGE_SIZE)
    pixels = Preprocessor(checkpoint.preprocess)(cv2.imread(str(picture)), color="bgr")
    start, end = checkpoint.tokenizer.start_id, checkpoint.tokenizer.end_id
    (ids,) = greedy(checkpoint.model, torch.from_numpy(pixels)[None], [start], end, 8)
    return ids


def _run_on(bundle: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return _run("mammut_runtime.commands", *arguments, "--bundle", bundle)


def _run(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, by its entry point."""
    code = f"import sys; from {module} import main; sys.exit(main())"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *(str(each) for each in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done


def _json_lines(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]
