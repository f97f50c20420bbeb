"""A checkpoint is a folder: config.json, model.safetensors, tokenizer.json. Public openMaMMUT forms are read as well.

`load_checkpoint` takes what a user has: "demo" (shipped), a folder, a weights file, or hf-hub:ORG/NAME. Shapes are
checked against the config from the file's header before the weights are read; pickles are read with weights_only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import re
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mammut import openmammut
from mammut.clip_tokenizer import build_clip_tokenizer
from mammut.config import MammutConfig
from mammut.detection.config import DetectorConfig
from mammut.detection.detector import Detector
from mammut.model import Mammut
from mammut.presets import OPENMAMMUT_SIZES
from mammut.presets import openmammut as openmammut_preset
from mammut.vision import resize_positions
from mammut_runtime.errors import CheckpointError, InputError
from mammut_runtime.preprocess import PreprocessRule
from mammut_runtime.strict import Omissible, from_dict, parse_json, to_json
from mammut_runtime.tokenizer import Tokenizer

DEMO_FOLDER = Path(__file__).parent / "assets" / "demo"
WEIGHTS = "model.safetensors"
DETECTOR = "detector."
"""What the names of a detector's weights begin with."""
PUBLIC_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
CLIP_VOCABULARY = 49_408
MAX_TOKENIZER_BYTES = 64_000_000
OPENMAMMUT_PROMPTS = {
    "caption": "",
    "ask": "question: {question} answer:",
    "zero_shot": "a photo of a {}.",
}
"""openMaMMUT has seen no questions in training; the form is there so that a fine-tuned checkpoint can answer."""


@dataclass(frozen=True)
class CheckpointConfig:
    """config.json."""

    format: Literal["mammut-edge checkpoint 1"]
    model: MammutConfig
    preprocess: PreprocessRule
    prompts: dict[str, str]
    """Prompt form of each task: "caption" (a prefix), "ask" (holds {question}), "zero_shot" (templates, one a line,
    each holding {})."""
    detector: Annotated[DetectorConfig | None, Omissible()] = None
    """How named things are found, or None: this checkpoint does not."""


@dataclass(frozen=True)
class Checkpoint:
    """A model in memory with all that belongs to it."""

    model: Mammut
    """In eval mode, float32, on the CPU."""
    tokenizer_json: bytes
    preprocess: PreprocessRule
    prompts: dict[str, str]
    source: str
    """Where it came from, as the user named it."""
    sha256: str
    """Of the weights file."""
    detector: Detector | None = None
    """On the same model, in eval mode, or None."""

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_bytes(self.tokenizer_json)


def load_checkpoint(
    spec: str | Path, *, image_size: int | None = None, tokenizer_json: bytes | None = None
) -> Checkpoint:
    """Load a checkpoint in any of its forms.

    Args:
        spec: "demo", a folder, a weights file, or "hf-hub:ORG/NAME".
        image_size: another input size than the trained one, pixels; position embeddings are resized.
        tokenizer_json: instead of the checkpoint's own, for weights that come without one.

    Raises:
        CheckpointError: not found, not readable, unknown keys, or tensors that do not fit the config (each named).
        InputError: image_size is smaller than a patch or unreasonably large.
    """
    folder, weights = _locate(str(spec))
    public = weights.name != WEIGHTS
    # The hub's folders are named by a hash.
    called = str(spec).rpartition("/")[2] if str(spec).startswith("hf-hub:") else folder.resolve().name
    parts = _read_public_config(folder, weights, called) if public else _read_own(folder)
    state, config = _read_weights(weights, parts, public)
    own = {name.removeprefix(DETECTOR): state.pop(name) for name in list(state) if name.startswith(DETECTOR)}
    trained_positions = state["vision.positions"]
    if tokenizer_json is None:
        # Public folders may hold a tokenizer.json for another library; their weights were trained with CLIP's.
        clip = public and config.text.vocab_size == CLIP_VOCABULARY
        tokenizer_json = build_clip_tokenizer() if clip else _read_tokenizer(folder)
    tokenizer = Tokenizer.from_bytes(tokenizer_json)
    # More embedding rows than tokens are only unused; a token without a row or a column has no meaning to the model.
    sizes = {"embedding rows": config.text.embedding_rows, "output columns": config.text.vocab_size}
    for name, size in sizes.items():
        if tokenizer.vocab_size > size:
            raise CheckpointError(
                f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, but the model has only {size} {name}; "
                f"use the tokenizer it was trained with"
            )
    preprocess = parts.preprocess
    if image_size is not None and image_size != config.vision.image_size:
        config, state["vision.positions"] = _resized(config, state["vision.positions"], image_size)
        preprocess = dataclasses.replace(preprocess, size=image_size)
    with torch.device("meta"):
        model = Mammut(config, pad_id=tokenizer.pad_id)
    model.load_state_dict(state, strict=True, assign=True)
    model.requires_grad_(False)
    detector = _detector(parts.detector, model.eval(), own, trained_positions)
    return Checkpoint(model, tokenizer_json, preprocess, parts.prompts, str(spec), _sha256(weights), detector)


def save_checkpoint(
    folder: Path,
    model: Mammut,
    tokenizer_json: bytes,
    preprocess: PreprocessRule,
    prompts: dict[str, str],
    dtype: torch.dtype = torch.float32,
    detector: Detector | None = None,
) -> None:
    """Write a checkpoint folder; it appears whole or not at all. An existing folder is replaced.

    Args:
        dtype: of the stored weights; float16 halves the size, loading always gives float32.
        detector: of this very model.
    """
    found = detector.config if detector is not None else None
    config = CheckpointConfig("mammut-edge checkpoint 1", model.config, preprocess, prompts, found)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        new.chmod(0o755)
        (new / "config.json").write_bytes(to_json(config))
        (new / "tokenizer.json").write_bytes(tokenizer_json)
        state = model.state_dict()
        if detector is not None:
            state |= {DETECTOR + name: value for name, value in detector.own_state().items()}
        state = {name: value.detach().to("cpu", dtype).contiguous() for name, value in state.items()}
        save_file(state, new / WEIGHTS)
        (new / WEIGHTS).chmod(0o644)
        if folder.exists():
            # What is not ours to write (a model card, say) stays.
            for extra in folder.iterdir():
                if not (new / extra.name).exists():
                    (shutil.copytree if extra.is_dir() else shutil.copy2)(extra, new / extra.name)
            folder.rename(Path(temporary) / "old")
        new.rename(folder)


# --- finding -------------------------------------------------------------------------------------------------


def _locate(spec: str) -> tuple[Path, Path]:
    """The checkpoint's folder and its weights file."""
    if spec.startswith("hf-hub:"):
        return _locate(str(_download(spec.removeprefix("hf-hub:"))))
    path = DEMO_FOLDER if spec == "demo" else Path(spec)
    if path.is_file():
        if path.suffix not in (".safetensors", ".bin", ".pt"):
            raise CheckpointError(f"{path}: expected a .safetensors, .bin or .pt file, or a folder")
        return path.parent, path
    if not path.is_dir():
        raise CheckpointError(
            f'{spec}: no such checkpoint; expected "demo", a folder, a weights file or hf-hub:ORG/NAME'
        )
    # A public folder may hold a config.json and model.safetensors for another library beside its own files.
    own = not (path / "open_clip_config.json").is_file() and (path / "config.json").is_file()
    for name in (WEIGHTS,) if own else PUBLIC_WEIGHTS:
        if (path / name).is_file():
            return path, path / name
    training = sorted(path.glob("*.pt"))
    if len(training) == 1:
        return path, training[0]
    if training:
        names = ", ".join(p.name for p in training[:8])
        raise CheckpointError(f"{path}: several training checkpoints ({names}); name the file itself")
    raise CheckpointError(
        f"{path}: no weights found; expected config.json + {WEIGHTS}, or open_clip_config.json with one of "
        f"{', '.join(PUBLIC_WEIGHTS)} or epoch_N.pt"
    )


def _download(name: str) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            "hf-hub: needs huggingface-hub; install it with: pip install 'mammut-edge[hub]'"
        ) from error
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise CheckpointError(f"hf-hub:{name}: expected hf-hub:ORG/NAME")
    small = ["config.json", "open_clip_config.json", "tokenizer.json"]
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=small))
        # As in _locate: beside a public config, model.safetensors is another library's copy of the weights.
        public = (folder / "open_clip_config.json").is_file()
        for weights in PUBLIC_WEIGHTS if public else (WEIGHTS,):
            huggingface_hub.snapshot_download(name, allow_patterns=[*small, weights])
            if (folder / weights).is_file():
                break
        return folder
    except Exception as error:  # the library raises its own, requests' and OSErrors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"hf-hub:{name}: cannot be fetched ({type(error).__name__}: {reason}). Without a network, download the "
            f"repository elsewhere and give its folder instead"
        ) from error


# --- reading -------------------------------------------------------------------------------------------------


def _read_own(folder: Path) -> CheckpointConfig:
    path = folder / "config.json"
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return from_dict(CheckpointConfig, parse_json(text, str(path), CheckpointError), str(path), CheckpointError)


def _read_public_config(folder: Path, weights: Path, name: str) -> CheckpointConfig:
    if (folder / "open_clip_config.json").is_file():
        model, preprocess = openmammut.read_config(folder, name)
    else:
        # Sweep checkpoints come without a config, in a folder named mammut_ViT-B-32_s12.8B_...
        found = re.match(r"mammut_ViT-([SMBLH]-\d\d)(_|$)", name)
        if not found or found[1] not in OPENMAMMUT_SIZES:
            raise CheckpointError(
                f"{weights}: no open_clip_config.json beside it, and the folder's name {name!r} does not begin with "
                f"mammut_ViT-SIZE_ (SIZE one of {', '.join(OPENMAMMUT_SIZES)}); put the config beside the weights"
            )
        model = dataclasses.replace(openmammut_preset(found[1]), name=name)
        size = model.vision.image_size
        preprocess = PreprocessRule(size, openmammut.CLIP_MEAN, openmammut.CLIP_STD, "bicubic", "shortest", 0)
    return CheckpointConfig("mammut-edge checkpoint 1", model, preprocess, OPENMAMMUT_PROMPTS)


def _read_tokenizer(folder: Path) -> bytes:
    path = folder / "tokenizer.json"
    try:
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise CheckpointError(f"{path}: larger than {MAX_TOKENIZER_BYTES} bytes; this is not a tokenizer")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); put the tokenizer it was trained with beside the weights"
        ) from error


def _read_weights(path: Path, parts: CheckpointConfig, public: bool) -> tuple[dict[str, Tensor], MammutConfig]:
    """Our state dict in float32, its shapes checked, and the config with the embedding rows the file has."""
    config = parts.model
    if path.suffix == ".safetensors":
        header = _header(path)
        shapes = _shapes(openmammut.unwrap(header, path) if public else header)
        config = _fit_rows(config, shapes) if public else config
        _check_shapes(shapes, _expected_shapes(config, public, parts.detector), path)
        state = openmammut.unwrap(load_file(path), path) if public else load_file(path)
    else:
        state = openmammut.unwrap(_load_pickle(path), path)
        shapes = _shapes(state)
        config = _fit_rows(config, shapes)
        _check_shapes(shapes, _expected_shapes(config, public), path)
    state = openmammut.from_public(state, config) if public else state
    for name, value in state.items():
        if not value.is_floating_point():
            raise CheckpointError(f"{path}: {name}: expected floating-point weights, got {value.dtype}")
        state[name] = value.to(torch.float32).contiguous()
        if not bool(torch.isfinite(state[name]).all()):
            raise CheckpointError(
                f"{path}: {name} holds NaN or infinite values; the file is damaged or training diverged"
            )
    return state, config


def _header(path: Path) -> dict[str, Tensor]:
    """The tensors without their values (on the meta device); safetensors has checked the shapes against the size."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); download or save it again") from error
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def _load_pickle(path: Path) -> object:
    try:
        # Files from before PyTorch 1.6 are no zip archives, and cannot be mapped into memory.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: holds more than tensors and plain values, so it is not opened") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a whole PyTorch file ({reason}); download or save it again") from error


def _fit_rows(config: MammutConfig, shapes: dict[str, tuple[int, ...]]) -> MammutConfig:
    """The public code gives the embedding 49408 rows whatever vocab_size says; newer files follow vocab_size."""
    rows = shapes.get("text.token_embedding.weight", (config.text.vocab_size,))[0]
    if rows in (CLIP_VOCABULARY, config.text.vocab_size):
        return dataclasses.replace(config, text=dataclasses.replace(config.text, embedding_rows=rows))
    return config


def _expected_shapes(
    config: MammutConfig, public: bool, detector: DetectorConfig | None = None
) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = Mammut(config)
        state = model.state_dict()
        if detector is not None:
            state |= {DETECTOR + name: value for name, value in Detector(detector, model).own_state().items()}
        state = openmammut.to_public(state, config) if public else state
    return _shapes(state)


def _detector(
    config: DetectorConfig | None, model: Mammut, state: dict[str, Tensor], positions: Tensor
) -> Detector | None:
    """positions: the model's as they were trained, which the detector's are made from whatever the model's size is."""
    if config is None:
        return None
    detector = Detector(config, model, positions)
    detector.load_own(state)
    return detector.eval().requires_grad_(False)


def _check_shapes(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], path: Path) -> None:
    wrong = [f"{n}: expected {list(expected[n])}, found {list(found[n])}" for n in expected.keys() & found.keys()
             if expected[n] != found[n]]  # fmt: skip
    missing = [f"{n}: missing, expected {list(expected[n])}" for n in expected.keys() - found.keys()]
    unknown = [f"{n}: unknown, found {list(found[n])}" for n in found.keys() - expected.keys()]
    problems = sorted(wrong) + sorted(missing) + sorted(unknown)
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise CheckpointError(f"{path}: tensors do not fit the config: {'; '.join(problems[:5])}{more}")


def _resized(config: MammutConfig, positions: Tensor, image_size: int) -> tuple[MammutConfig, Tensor]:
    vision = dataclasses.replace(config.vision, image_size=image_size) if 0 < image_size <= 4096 else None
    if vision is None or vision.grid < 1:
        raise InputError(f"image size {image_size}: expected {config.vision.patch_size} to 4096 pixels")
    positions = resize_positions(positions, config.vision.class_token, vision.grid)
    return dataclasses.replace(config, vision=vision), positions


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
