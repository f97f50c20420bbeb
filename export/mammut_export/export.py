"""A checkpoint becomes a bundle: graphs, weights, manifest, then the proof through the runtime, then the report.

Everything is written into a hidden folder beside the target. Only when the runtime, opening that folder as a device
will, gives what PyTorch gives does it get its name; on any failure nothing is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from mammut.checkpoint import Checkpoint
from mammut_export import onnx_graphs, report
from mammut_export.canary import make_canary
from mammut_export.graphs import TASKS, graphs_for, traceable
from mammut_export.parity import DEFAULT_TOLERANCE, Parity, verify
from mammut_export.plan import Plan, make_plan
from mammut_export.samples import Sample, load_samples
from mammut_export.weights import WeightStore, halve_matrices, move_to_store
from mammut_runtime.bundle import hash_files, publish, write_manifest
from mammut_runtime.canary import compare
from mammut_runtime.errors import CheckpointError, InputError, VerificationError
from mammut_runtime.manifest import (
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    GraphInfo,
    Manifest,
    ModelInfo,
    QuantizationInfo,
    TextRule,
    graph_contract,
)
from mammut_runtime.model import Model

Target = Literal["onnxruntime"]
Precision = Literal["fp32", "fp16"]
TARGETS: tuple[Target, ...] = get_args(Target)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
USUAL_MAX_TOKENS = 40
"""Captions are shorter; each more token makes the check's uncached reference slower."""
SMALL_PARAMETERS = 50_000_000
TOOLS = ("mammut-edge", "torch", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class ExportOptions:
    """What to make. Raises InputError for values out of range."""

    target: str = "onnxruntime"
    """One of TARGETS."""
    precision: str = "fp32"
    """One of PRECISIONS. fp16 halves the files; engines compute in float32 as before."""
    tasks: tuple[str, ...] = TASKS
    """Some of TASKS: only the graphs that they need are made."""
    max_tokens: int | None = None
    """Longest caption the bundle is made and checked for, new tokens. None: 40, or what the context leaves."""
    tolerance: float | None = None
    """Largest error relative to an output's largest value. None: parity.DEFAULT_TOLERANCE of the precision."""
    pictures: tuple[Path, ...] = ()
    """Files and folders of pictures to check with. None given: pictures drawn here."""

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise InputError(f"target: expected one of {', '.join(TARGETS)}, got {self.target!r}")
        if self.precision not in PRECISIONS:
            raise InputError(f"precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        graphs_for(self.tasks)
        if self.tolerance is not None and not 0 < self.tolerance <= 1:
            raise InputError(f"tolerance: expected a number above 0 and at most 1, got {self.tolerance}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(f"max_tokens: expected at least 1, got {self.max_tokens}")


@dataclass(frozen=True)
class ExportResult:
    """A published bundle, in figures."""

    path: Path
    plan: Plan
    parity: Parity
    bundle_bytes: int
    seconds: float

    @property
    def size_ratio(self) -> float:
        """Bundle bytes over unique weight bytes."""
        return self.bundle_bytes / self.plan.unique_weight_bytes


def plan_export(checkpoint: Checkpoint, options: ExportOptions) -> Plan:
    """What `export` would make, without making it. Raises InputError for max_tokens beyond the model's context."""
    rule = text_rule(checkpoint, options.max_tokens)
    return make_plan(checkpoint.model.config, graphs_for(options.tasks), options.precision, rule.max_tokens)


def export(
    checkpoint: Checkpoint,
    out: Path,
    options: ExportOptions | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> ExportResult:
    """Make the bundle `out`, prove it, publish it.

    overwrite: replace a bundle that is there. progress: is told each step, in a few words.
    Raises VerificationError if the runtime does not give what PyTorch gives; InputError, BundleError and EngineError as
    their names say. After any of them `out` is as it was.
    """
    options = options or ExportOptions()
    started = time.perf_counter()
    plan = plan_export(checkpoint, options)
    samples = load_samples(options.pictures)
    stopwatch = _Stopwatch(progress)
    with publish(out, overwrite) as folder, _few_threads(plan.parameters):
        manifest = _write_bundle(folder, checkpoint, options, plan, stopwatch)
        tolerance = options.tolerance or DEFAULT_TOLERANCE[options.precision]
        parity = verify(folder, manifest, checkpoint, samples, tolerance, stopwatch)
        parity.check()
        _check_canary(folder, manifest)
        stopwatch("writing the report")
        manifest = _with_parity(manifest, parity, options)
        bundle_bytes = _write_report(folder, manifest, plan, parity, samples, stopwatch)
        stopwatch("publishing")
    return ExportResult(out, plan, parity, bundle_bytes, time.perf_counter() - started)


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


def model_info(checkpoint: Checkpoint) -> ModelInfo:
    """The model's sizes as the manifest states them."""
    model, config = checkpoint.model, checkpoint.model.config
    bias = model.logit_bias
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
    )


def write_graphs(
    folder: Path,
    checkpoint: Checkpoint,
    graphs: Sequence[str],
    precision: str,
    progress: Callable[[str], None] = lambda step: None,
) -> dict[str, GraphInfo]:
    """Trace the graphs and write their .onnx files and one weights.bin; what the files hold, for the manifest."""
    contract = graph_contract(model_info(checkpoint), checkpoint.preprocess.size)
    found = {}
    with WeightStore(folder / WEIGHTS_FILE) as store:
        for name in graphs:
            progress(f"tracing {name}")
            onnx_model = onnx_graphs.to_onnx(traceable(name, checkpoint.model, contract[name]))
            if precision == "fp16":
                halve_matrices(onnx_model)
            move_to_store(onnx_model, store)
            onnx_graphs.save(onnx_model, folder / contract[name].file)
            found[name] = onnx_graphs.graph_info(onnx_model, contract[name].file)
    for info in found.values():
        onnx_graphs.check_file(folder / info.file)
    return found


@contextlib.contextmanager
def _few_threads(parameters: int) -> Iterator[None]:
    """Let PyTorch compute a small model on one thread, for the time of an export.

    Its threads wait for each other in a busy loop: on a machine with other work to do, the reference captions of a
    demo-sized model took 60 s with four threads and 0.2 s with one.
    """
    before = torch.get_num_threads()
    if parameters < SMALL_PARAMETERS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Stopwatch:
    """Passes progress on and remembers how long each step took."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self._progress = progress
        self._step, self._start = "", time.perf_counter()
        self.seconds: dict[str, float] = {}

    def __call__(self, step: str) -> None:
        now = time.perf_counter()
        if self._step:
            self.seconds[self._step] = self.seconds.get(self._step, 0.0) + now - self._start
        self._step, self._start = step, now
        self._progress(step)


def _write_bundle(
    folder: Path, checkpoint: Checkpoint, options: ExportOptions, plan: Plan, progress: _Stopwatch
) -> Manifest:
    """All but the report; the manifest has no parity yet."""
    names = tuple(graph.name for graph in plan.graphs)
    graphs = write_graphs(folder, checkpoint, names, options.precision, progress)
    (folder / TOKENIZER_FILE).write_bytes(checkpoint.tokenizer_json)
    progress("computing the canary")
    rule = text_rule(checkpoint, options.max_tokens)
    canary = make_canary(checkpoint, names, rule, options.precision)
    with _describing(checkpoint):
        manifest = Manifest(
            target=options.target,  # type: ignore[arg-type]  # checked by ExportOptions
            precision=options.precision,  # type: ignore[arg-type]
            opset=onnx_graphs.OPSET,
            made_by=_made_by(checkpoint),
            model=model_info(checkpoint),
            preprocess=checkpoint.preprocess,
            text=rule,
            graphs=graphs,
            parity={},
            quantization={},
            files=hash_files(folder),
            canary=canary,
        )
    write_manifest(folder, manifest)
    return manifest


@contextlib.contextmanager
def _describing(checkpoint: Checkpoint) -> Iterator[None]:
    """The manifest's dataclasses refuse what a device could not use; here the checkpoint is what is at fault."""
    try:
        yield
    except ValueError as problem:
        raise CheckpointError(f"{checkpoint.source}: no bundle can be made of it: {problem}") from problem


def _check_canary(folder: Path, manifest: Manifest) -> None:
    """What doctor and verify do on the device must succeed here first."""
    with Model.load(folder, verify=False) as model:
        result = compare(manifest.canary, *model.canary_answers(manifest.canary))
    if not result.ok:
        raise VerificationError(f"{result.message}. Nothing was published")


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


def _with_parity(manifest: Manifest, parity: Parity, options: ExportOptions) -> Manifest:
    quantization = {}
    if options.precision == "fp16":
        measured = {"vision": {"embedding": parity.drift}} if options.pictures else {}
        quantization = {
            graph: QuantizationInfo("float16", "float32", measured.get(graph, {})) for graph in manifest.graphs
        }
    return dataclasses.replace(manifest, parity=parity.manifest_entries(), quantization=quantization)


def _write_report(
    folder: Path, manifest: Manifest, plan: Plan, parity: Parity, samples: Sequence[Sample], stopwatch: _Stopwatch
) -> int:
    """The reports and the final manifest; the bundle's size in bytes."""
    facts = report.Facts(manifest, plan, parity, tuple(samples), stopwatch.seconds)
    report.write(folder, facts)
    write_manifest(folder, dataclasses.replace(manifest, files=hash_files(folder)))
    return sum(path.stat().st_size for path in folder.iterdir())
