"""What a bundle holds besides numbers that were measured: graphs, weights, tokenizer, canary, and the manifest."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from mammut.checkpoint import Checkpoint
from mammut_export import onnx_graphs
from mammut_export.canary import make_canary
from mammut_export.graphs import traceable
from mammut_export.precisions import precision_name
from mammut_export.profiles import ProfileLimits, profiles_for
from mammut_export.weights import WeightStore, halve_matrices, move_to_store
from mammut_runtime.bundle import hash_files, write_manifest
from mammut_runtime.detection.rule import DetectionRule
from mammut_runtime.errors import CheckpointError, InputError
from mammut_runtime.manifest import (
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    Canary,
    GraphInfo,
    Manifest,
    ModelInfo,
    Scheme,
    TextRule,
    graph_contract,
)

USUAL_MAX_TOKENS = 40
"""Captions are shorter; each more token makes the check's uncached reference slower."""
TOOLS = ("mammut-edge", "torch", "onnx", "onnxscript", "onnxruntime", "openvino")


def write_bundle(
    folder: Path,
    checkpoint: Checkpoint,
    target: str,
    schemes: Mapping[str, Scheme],
    rule: TextRule,
    progress: Callable[[str], None] = lambda step: None,
    largest: ProfileLimits | None = None,
) -> Manifest:
    """Everything but the report, traced from PyTorch; schemes: fp32 or fp16. The manifest has no parity yet."""
    graphs = write_graphs(folder, checkpoint, schemes, progress)
    progress("computing the canary")
    canary = make_canary(checkpoint, tuple(schemes), rule, precision_name(schemes))
    return complete(folder, checkpoint, target, schemes, graphs, rule, canary, largest)


def complete(
    folder: Path,
    checkpoint: Checkpoint,
    target: str,
    schemes: Mapping[str, Scheme],
    graphs: Mapping[str, GraphInfo],
    rule: TextRule,
    canary: Canary,
    largest: ProfileLimits | None = None,
) -> Manifest:
    """Add tokenizer and manifest to a folder with graphs and weights, so that the runtime can open it."""
    (folder / TOKENIZER_FILE).write_bytes(checkpoint.tokenizer_json)
    with _describing(checkpoint):
        manifest = Manifest(
            target=target,  # type: ignore[arg-type]  # checked by ExportOptions
            precision=precision_name(schemes),  # type: ignore[arg-type]
            opset=onnx_graphs.OPSET,
            made_by=_made_by(checkpoint),
            model=model_info(checkpoint, graphs),
            preprocess=checkpoint.preprocess,
            text=rule,
            detection=detection_rule(checkpoint, graphs),
            graphs=dict(graphs),
            parity={},
            quantization={},
            files=hash_files(folder),
            canary=canary,
        )
    if target == "tensorrt":
        manifest = dataclasses.replace(manifest, profiles=profiles_for(manifest, largest))
    write_manifest(folder, manifest)
    return manifest


def text_rule(checkpoint: Checkpoint, max_tokens: int | None) -> TextRule:
    """How the bundle treats texts.

    Raises InputError for a max_tokens that the context does not hold, CheckpointError for prompts of no known form.
    """
    text, tokenizer = checkpoint.model.config.text, checkpoint.tokenizer
    prompt = 1 + len(tokenizer.encode(checkpoint.prompts.get("caption", "")))
    room = text.context_length - prompt
    if room < 1 or (max_tokens or 1) > room:
        raise InputError(
            f"max_tokens: expected at most {max(room, 0)}, got {max_tokens or 1}; the model has {text.context_length} "
            f"positions and the caption prompt takes {prompt}"
        )
    with _describing(checkpoint):
        return TextRule(
            context_length=text.context_length,
            max_tokens=max_tokens or min(USUAL_MAX_TOKENS, room),
            text_length=text.text_length,
            pad_id=tokenizer.pad_id,
            start_id=tokenizer.start_id,
            end_id=tokenizer.end_id,
            mask_pads=text.mask_pads,
            prompts=checkpoint.prompts,
        )


def model_info(checkpoint: Checkpoint, graphs: Collection[str] = ()) -> ModelInfo:
    """The model's sizes as the manifest states them. graphs: of the bundle; those of clips stand there for "video"."""
    model, config = checkpoint.model, checkpoint.model.config
    bias = model.logit_bias
    video = config.video if "video" in graphs else None
    return ModelInfo(
        name=config.name,
        image_tokens=config.vision.tokens,
        vision_width=config.vision.width,
        embed_dim=config.embed_dim,
        text_width=config.text.width,
        text_layers=config.text.layers,
        cross_layers=len(config.text.cross_after),
        heads=config.text.heads,
        vocab_size=config.text.vocab_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        logit_scale=float(model.logit_scale),
        logit_bias=0.0 if bias is None else float(bias),
        similarity="sigmoid" if config.contrastive == "focal" else "softmax",
        video_frames=video.frames if video is not None else 0,
        video_tokens=config.video_tokens if video is not None else 0,
    )


def detection_rule(checkpoint: Checkpoint, graphs: Collection[str]) -> DetectionRule | None:
    """How the device uses the detector; None where the bundle has none of `graphs` that is one."""
    if checkpoint.detector is None or "detector" not in graphs:
        return None
    config = checkpoint.detector.config
    return DetectionRule(
        size=config.image_size,
        mean=checkpoint.preprocess.mean,
        std=checkpoint.preprocess.std,
        fill=config.fill,
        proposals=config.proposals,
        nms_iou=config.nms_iou,
        threshold=config.threshold,
        templates=config.templates,
        base_names=config.base_names,
        weight_base=config.base_weight,
        weight_novel=config.novel_weight,
        objectness_power=config.objectness_power,
    )


def contract_of(checkpoint: Checkpoint, graphs: Collection[str]) -> dict[str, GraphInfo]:
    """What each graph must be in a bundle that has these."""
    rule = detection_rule(checkpoint, graphs)
    return graph_contract(model_info(checkpoint, graphs), checkpoint.preprocess.size, detection=rule)


def write_graphs(
    folder: Path,
    checkpoint: Checkpoint,
    schemes: Mapping[str, Scheme],
    progress: Callable[[str], None] = lambda step: None,
) -> dict[str, GraphInfo]:
    """Trace the graphs and write their .onnx files and one weights.bin; what the files hold, for the manifest."""
    contract = contract_of(checkpoint, schemes)
    found = {}
    with WeightStore(folder / WEIGHTS_FILE) as store:
        for name, scheme in schemes.items():
            progress(f"tracing {name}")
            onnx_model = onnx_graphs.to_onnx(traceable(name, checkpoint, contract[name]))
            if scheme == "fp16":
                halve_matrices(onnx_model)
            move_to_store(onnx_model, store)
            onnx_graphs.save(onnx_model, folder / contract[name].file)
            found[name] = onnx_graphs.graph_info(onnx_model, contract[name].file)
    for info in found.values():
        onnx_graphs.check_file(folder / info.file)
    return found


@contextlib.contextmanager
def _describing(checkpoint: Checkpoint) -> Iterator[None]:
    """The manifest's dataclasses refuse what a device could not use; here the checkpoint is what is at fault."""
    try:
        yield
    except ValueError as problem:
        raise CheckpointError(f"{checkpoint.source}: no bundle can be made of it: {problem}") from problem


def _made_by(checkpoint: Checkpoint) -> dict[str, str]:
    """Tools and checkpoint. Of a checkpoint's path only the last part: the rest says more of the machine than of it."""
    versions = {}
    for tool in TOOLS:
        try:
            versions[tool] = importlib.metadata.version(tool)
        except importlib.metadata.PackageNotFoundError:
            versions[tool] = "unknown"
    source = checkpoint.source
    name = source if source.startswith("hf-hub:") else Path(source).resolve().name
    return {"checkpoint": _printable(name), "checkpoint_sha256": checkpoint.sha256, **versions}


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else "?" for each in text)[:200]
