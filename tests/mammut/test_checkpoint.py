"""Checkpoints in every form, and what is said of damaged ones."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mammut import openmammut, presets
from mammut.bpe_training import train_tokenizer
from mammut.checkpoint import OPENMAMMUT_PROMPTS, load_checkpoint, save_checkpoint
from mammut.clip_tokenizer import build_clip_tokenizer
from mammut.config import MammutConfig
from mammut.model import Mammut
from mammut_runtime.errors import CheckpointError, InputError
from mammut_runtime.preprocess import PreprocessRule

TOKENIZER = train_tokenizer(["a red cat", "two dogs on a green field"], 520)
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
IDS = torch.tensor([[1, 5, 9, 2], [1, 7, 3, 2]])


def rule(size: int) -> PreprocessRule:
    return PreprocessRule(size, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bicubic", "shortest", 0)


def outputs(model: Mammut) -> list[torch.Tensor]:
    tokens, embedding = model.encode_image(PIXELS)
    return [embedding, model.encode_text(IDS), model.caption_logits(tokens, IDS)]


def seeded(config: MammutConfig) -> Mammut:
    torch.manual_seed(0)
    return Mammut(config).eval()


@pytest.fixture
def own(tmp_path: Path) -> Path:
    folder = tmp_path / "own"
    save_checkpoint(folder, seeded(presets.tiny(520)), TOKENIZER, rule(32), OPENMAMMUT_PROMPTS)
    return folder


def public_config(folder: Path, config: MammutConfig) -> None:
    vision, text = config.vision, config.text
    model = {
        "custom_text": True,
        "embed_dim": config.embed_dim,
        "vision_cfg": {
            "image_size": vision.image_size, "layers": vision.layers, "width": vision.width,
            "head_width": vision.width // vision.heads, "patch_size": vision.patch_size, "pool_type": "avg_all",
            "final_ln_after_pool": True,
        },
        "text_cfg": {
            "vocab_size": text.vocab_size, "width": text.width, "heads": text.heads, "layers": text.layers,
            "cross_attn_ratio": 2, "does_full_decoding": True, "has_mlp": text.mlp_in_crossed_blocks,
        },
    }  # fmt: skip
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))


def public_folder(folder: Path, form: str, rows: int = 520) -> tuple[Path, Mammut]:
    """A public checkpoint with random weights, in one of the published forms; `rows` of the token embedding."""
    config = openmammut.openmammut_config(
        name="tiny-public", image_size=32, patch_size=8, vision=(2, 32, 2, 128), text=(4, 24, 2),
        mlp_in_crossed_blocks=False, vocab_size=520, embedding_rows=rows,
    )  # fmt: skip
    model = seeded(config)
    folder.mkdir()
    public_config(folder, config)
    (folder / "tokenizer.json").write_bytes(TOKENIZER)
    state = {name: value.contiguous() for name, value in openmammut.to_public(model.state_dict(), config).items()}
    if form == "safetensors":
        save_file(state, folder / "open_clip_model.safetensors")
    elif form == "bin":
        torch.save(state, folder / "open_clip_pytorch_model.bin")
    else:
        optimizer = torch.optim.AdamW(model.parameters())
        model.encode_text(IDS).sum().backward()
        optimizer.step()
        training = {f"module.{name}": value for name, value in state.items()}
        torch.save(
            {"epoch": 7, "name": "run", "state_dict": training, "optimizer": optimizer.state_dict()},
            folder / "epoch_7.pt",
        )
        model.load_state_dict(openmammut.from_public(state, config))
    return folder, model


def test_save_and_load_give_the_same_numbers(own: Path) -> None:
    loaded = load_checkpoint(own)
    for got, want in zip(outputs(loaded.model), outputs(seeded(presets.tiny(520))), strict=True):
        assert torch.equal(got, want)
    assert loaded.preprocess == rule(32) and loaded.prompts == OPENMAMMUT_PROMPTS
    assert loaded.tokenizer.encode("a red cat") and len(loaded.sha256) == 64


def test_float16_halves_the_file_and_loads_as_float32(own: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    save_checkpoint(half, seeded(presets.tiny(520)), TOKENIZER, rule(32), OPENMAMMUT_PROMPTS, dtype=torch.float16)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (half, own)]
    assert sizes[0] < 0.6 * sizes[1]
    model = load_checkpoint(half).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(outputs(model)[0], outputs(seeded(presets.tiny(520)))[0], atol=2e-3, rtol=0)


def test_saving_again_keeps_a_model_card(own: Path) -> None:
    (own / "README.md").write_text("card")
    save_checkpoint(own, seeded(presets.tiny(520)), TOKENIZER, rule(32), OPENMAMMUT_PROMPTS)
    assert (own / "README.md").read_text() == "card"
    assert not [p for p in own.parent.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("form", ["safetensors", "bin", "pt"])
def test_public_forms_give_the_same_numbers(tmp_path: Path, form: str) -> None:
    folder, model = public_folder(tmp_path / "public", form)
    loaded = load_checkpoint(folder)
    for got, want in zip(outputs(loaded.model), outputs(model), strict=True):
        assert torch.equal(got, want)


def test_older_spellings_of_the_same_tensors_are_read(tmp_path: Path) -> None:
    """A logit_scale of shape [1] and DistributedDataParallel's prefix, in safetensors as in pickles."""
    folder, model = public_folder(tmp_path / "public", "safetensors")
    path = folder / "open_clip_model.safetensors"
    state = load_file(path)
    save_file({f"module.{k}": v for k, v in (state | {"logit_scale": state["logit_scale"].reshape(1)}).items()}, path)
    for got, want in zip(outputs(load_checkpoint(folder).model), outputs(model), strict=True):
        assert torch.equal(got, want)
    save_file(state | {"logit_scale": torch.zeros(2)}, path)  # control
    with pytest.raises(CheckpointError, match=r"logit_scale: expected \[\], found \[2\]"):
        load_checkpoint(folder)


def test_a_file_in_the_old_format_is_read(tmp_path: Path) -> None:
    folder, model = public_folder(tmp_path / "public", "bin")
    path = folder / "open_clip_pytorch_model.bin"
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    assert torch.equal(outputs(load_checkpoint(folder).model)[0], outputs(model)[0])


def test_files_of_another_library_beside_public_weights_are_left_alone(tmp_path: Path) -> None:
    folder, model = public_folder(tmp_path / "public", "safetensors")
    (folder / "config.json").write_text('{"model_type": "clip"}')
    (folder / "model.safetensors").write_bytes(b"theirs")
    assert torch.equal(outputs(load_checkpoint(folder).model)[0], outputs(model)[0])


def test_a_weights_file_can_be_named_itself(tmp_path: Path) -> None:
    folder, _ = public_folder(tmp_path / "public", "pt")
    (folder / "epoch_9.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"several training checkpoints \(epoch_7.pt, epoch_9.pt\)"):
        load_checkpoint(folder)
    assert load_checkpoint(folder / "epoch_7.pt").model.config.text.layers == 4


def test_a_sweep_folder_names_its_own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public sweep has <full_name>/epoch_N.pt and no config file."""
    folder, model = public_folder(tmp_path / "mammut_ViT-B-32_s12.8B_datacomp", "pt")
    (folder / "open_clip_config.json").unlink()
    monkeypatch.setattr("mammut.checkpoint.openmammut_preset", lambda size: {"B-32": model.config}[size])
    assert load_checkpoint(folder).model.config.name == "mammut_ViT-B-32_s12.8B_datacomp"
    other = folder.rename(tmp_path / "something_else")
    with pytest.raises(CheckpointError, match=r"no open_clip_config.json beside it"):
        load_checkpoint(other)


def test_another_image_size_resizes_the_positions(own: Path) -> None:
    loaded = load_checkpoint(own, image_size=48)
    assert loaded.model.vision.positions.shape == (9, 32)
    assert loaded.preprocess.size == 48 and loaded.model.config.vision.image_size == 48
    loaded.model.encode_image(torch.zeros(1, 3, 48, 48))
    for bad in (0, 8, 10**6):
        with pytest.raises(InputError, match="expected 16 to 4096 pixels"):
            load_checkpoint(own, image_size=bad)


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    state: dict[str, Any] = load_file(path) | {k.replace("__", "."): v for k, v in changes.items()}
    save_file({k: v for k, v in state.items() if v is not None}, path)


def test_wrong_shapes_are_named_with_expected_and_found(own: Path) -> None:
    load_checkpoint(own)  # control
    edit_weights(own, text__positions=torch.zeros(25, 24))
    with pytest.raises(CheckpointError, match=r"text.positions: expected \[24, 24\], found \[25, 24\]"):
        load_checkpoint(own)


def test_missing_and_unknown_tensors_are_named(own: Path) -> None:
    edit_weights(own, text__positions=None, extra=torch.zeros(3))
    with pytest.raises(CheckpointError, match=r"text.positions: missing.*extra: unknown, found \[3\]"):
        load_checkpoint(own)


def test_nan_weights_are_named(own: Path) -> None:
    edit_weights(own, text__positions=torch.full((24, 24), float("nan")))
    with pytest.raises(CheckpointError, match=r"text.positions holds NaN"):
        load_checkpoint(own)


def test_truncated_files_are_refused(own: Path, tmp_path: Path) -> None:
    path = own / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_checkpoint(own)
    folder, _ = public_folder(tmp_path / "public", "bin")
    path = folder / "open_clip_pytorch_model.bin"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="not a whole PyTorch file"):
        load_checkpoint(folder)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('ran')",))


def test_a_pickle_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    folder, _ = public_folder(tmp_path / "public", "bin")
    torch.save({"state_dict": Hostile()}, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        load_checkpoint(folder)
    with pytest.raises(SystemExit, match="ran"):  # control: a plain unpickling does run it
        pickle.loads(pickle.dumps(Hostile()))


def test_tokenizers_must_fit(own: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="only 520 embedding rows"):
        load_checkpoint(own, tokenizer_json=train_tokenizer(["many different words here"] * 3, 530))
    # 49,408 rows and fewer columns, as the public code makes them: the tokenizer must fit the columns.
    folder, padded = public_folder(tmp_path / "padded", "safetensors", rows=49_408)
    assert padded.text.token_embedding.weight.shape[0] == 49_408
    found = load_checkpoint(folder)
    assert found.tokenizer_json == TOKENIZER and found.model.config.text.embedding_rows == 49_408
    large = train_tokenizer(["many different words here"] * 3, 530)
    for given in (large, build_clip_tokenizer()):
        with pytest.raises(CheckpointError, match="only 520 output columns"):
            load_checkpoint(folder, tokenizer_json=given)
    folder, _ = public_folder(tmp_path / "public", "bin")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="put the tokenizer it was trained with beside"):
        load_checkpoint(folder)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such checkpoint"):
        load_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="no weights found"):
        load_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"expected a .safetensors, .bin or .pt file"):
        load_checkpoint(tmp_path / "notes.txt")


def test_the_hub_offline_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"cannot be fetched.*Without a network, download"):
        load_checkpoint("hf-hub:laion/no-such-model-here")
    with pytest.raises(CheckpointError, match="expected hf-hub:ORG/NAME"):
        load_checkpoint("hf-hub:nonsense")


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_the_hub_is_asked_for_one_file_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Also where another library's model.safetensors lies beside the public weights."""
    remote, model = public_folder(tmp_path / "remote", form)
    (remote / "model.safetensors").write_bytes(b"another library's")
    local = tmp_path / "snapshots" / "0123abcd"
    local.mkdir(parents=True)

    def download(name: str, allow_patterns: list[str]) -> str:
        assert name == "laion/openMaMMUT-tiny"
        for pattern in allow_patterns:
            if (remote / pattern).is_file():
                shutil.copy(remote / pattern, local)
        return str(local)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    loaded = load_checkpoint("hf-hub:laion/openMaMMUT-tiny")
    assert torch.equal(outputs(loaded.model)[0], outputs(model)[0])
    assert loaded.model.config.name == "openMaMMUT-tiny"
    assert not (local / "model.safetensors").exists()


def test_the_hub_library_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"mammut-edge\[hub\]"):
        load_checkpoint("hf-hub:laion/model")
