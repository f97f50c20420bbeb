"""A checkpoint becomes a bundle: graphs, weights, manifest, then the proof through the runtime, then the report.

Everything is written into a hidden folder beside the target. Only when the runtime, opening that folder as a device
will, gives what PyTorch gives does it get its name; on any failure nothing is left. A quantized bundle is made of a
float32 one that is proved in this way, and is then held against it on the user's data (gate.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mammut.checkpoint import Checkpoint
from mammut_calibration.data import open_dataset
from mammut_calibration.drift import Drift
from mammut_calibration.table import load_table
from mammut_export import report
from mammut_export.canary import make_canary, observed_canary
from mammut_export.contents import complete, text_rule, write_bundle
from mammut_export.gate import Gate, Quantized
from mammut_export.measure import Measured, here, measure
from mammut_export.options import ExportOptions
from mammut_export.parity import DEFAULT_TOLERANCE, Parity, verify
from mammut_export.plan import Plan, make_plan
from mammut_export.precisions import precision_name, quantization_info
from mammut_export.quantize import QuantizedLayers
from mammut_export.range_audit import Audit
from mammut_export.samples import load_samples
from mammut_runtime.bundle import Bundle, hash_files, publish, write_manifest
from mammut_runtime.canary import compare
from mammut_runtime.errors import EngineError, VerificationError
from mammut_runtime.manifest import DriftInfo, GraphInfo, Manifest, QuantizationInfo, Scheme
from mammut_runtime.model import Model
from mammut_runtime.tensorrt_lint import lint_bundle

SMALL_PARAMETERS = 50_000_000
DATA_LIMIT = 512
"""Most pictures taken of the user's data."""


@dataclass(frozen=True)
class ExportResult:
    """A published bundle, in figures."""

    path: Path
    target: str
    plan: Plan
    parity: Parity
    """Of the bundle with PyTorch; of a quantized bundle, of the float32 one that it was made of."""
    bundle_bytes: int
    seconds: float
    quantized: Quantized | None = None
    measured: tuple[Measured, Measured] | None = None
    """The float32 bundle and the quantized one on this machine."""

    @property
    def size_ratio(self) -> float:
        """Bundle bytes over unique weight bytes."""
        counted = self.measured[1].figures["unique_weight_bytes"] if self.measured else self.plan.unique_weight_bytes
        return self.bundle_bytes / counted


def plan_export(checkpoint: Checkpoint, options: ExportOptions) -> Plan:
    """What `export` would make, without making it.

    Raises InputError for max_tokens beyond the model's context, and for tasks that the checkpoint cannot do.
    """
    options = options.resolved(checkpoint)
    return _plan(checkpoint, options.schemes, text_rule(checkpoint, options.max_tokens).max_tokens)


def _plan(checkpoint: Checkpoint, schemes: Mapping[str, Scheme], max_tokens: int) -> Plan:
    detection = checkpoint.detector.config if checkpoint.detector is not None else None
    return make_plan(checkpoint.model.config, schemes, max_tokens, detection)


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
    Raises VerificationError if the runtime does not give what PyTorch gives, or a quantized bundle does not pass the
    gate; InputError, BundleError and EngineError as their names say. After any of them `out` is as it was.
    """
    options = (options or ExportOptions()).resolved(checkpoint)
    options.check_data()
    started = time.perf_counter()
    work = _Work(checkpoint, options, progress)
    with publish(out, overwrite) as folder, _few_threads(work.plan.parameters):
        made = work.from_float32(folder, out) if work.in_two_steps else work.plain(folder)
        work.stopwatch("writing the report")
        bundle_bytes = work.report(folder, made)
        work.stopwatch("publishing")
    return ExportResult(
        out,
        options.target,
        work.plan,
        made.parity,
        bundle_bytes,
        time.perf_counter() - started,
        made.quantized,
        made.measured,
    )


@dataclass(frozen=True)
class _Made:
    """A folder with everything but its report."""

    manifest: Manifest
    parity: Parity
    quantized: Quantized | None = None
    measured: tuple[Measured, Measured] | None = None
    audits: Mapping[str, Audit] = field(default_factory=dict)
    examples: tuple[report.Example, ...] = ()


class _Work:
    """One export: what was asked for, what is known before it begins, and its steps."""

    def __init__(self, checkpoint: Checkpoint, options: ExportOptions, progress: Callable[[str], None]) -> None:
        self._checkpoint, self._options = checkpoint, options
        self._rule = text_rule(checkpoint, options.max_tokens)
        self.plan = plan_export(checkpoint, options)
        self._samples = load_samples(options.pictures)
        self.stopwatch = _Stopwatch(progress)

    @property
    def in_two_steps(self) -> bool:
        """Whether the bundle is made of a float32 one, and not traced as it will be."""
        typed = self._options.target == "tensorrt" and set(self._options.schemes.values()) != {"fp32"}
        return self._options.quantized or typed

    def plain(self, folder: Path) -> _Made:
        """In fp32, or stored in fp16: the same numbers as PyTorch's, but for rounding."""
        options = self._options
        manifest, parity = self._proved(folder, options.target, options.schemes)
        if precision_name(options.schemes) != "fp32":
            drift = {"vision": {"embedding": parity.drift}} if options.pictures else {}
            quantization = {
                graph: quantization_info(scheme, options.target, drift.get(graph))
                for graph, scheme in options.schemes.items()
            }
            manifest = dataclasses.replace(manifest, quantization=quantization)
        return _Made(dataclasses.replace(manifest, parity=parity.manifest_entries()), parity)

    def from_float32(self, folder: Path, out: Path) -> _Made:
        """The float32 bundle beside it first; then what is asked for, held against PyTorch or against the gate."""
        options = self._options
        data = open_dataset(options.calibration, DATA_LIMIT) if options.calibration else None
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.float32.", dir=out.parent) as scratch:
            target = "onnxruntime" if options.target == "tensorrt" else options.target
            _, parity = self._proved(Path(scratch), target, dict.fromkeys(options.graphs, "fp32"))
            reference = Bundle.open(scratch)
            gate = Gate(
                reference,
                options.target,
                data,
                self._complete,
                limits=options.limits,
                table=load_table(options.table) if options.table else None,
                options=here(options.target, options.threads),
                pictures=self._samples,
                progress=self.stopwatch,
            )
            if options.auto:
                made = gate.make_fastest(folder)
            else:
                made = gate.make(folder, options.schemes, most_kept=options.most_kept)
            judged = options.quantized or made.drift is not None
            if judged and made.failures and not options.accept_drift:
                raise VerificationError(_refusal(made))
            if not options.quantized:
                return self._typed(folder, made, gate.audits)
            self.stopwatch("measuring")
            measured = measure(reference, options.threads), measure(Bundle.open(folder), options.threads)
        manifest = self._complete(folder, made.graphs, made.schemes, canary_of_itself=True)
        self.plan = _plan(self._checkpoint, made.schemes, self._rule.max_tokens)
        manifest = dataclasses.replace(
            manifest, quantization=_quantization(made, options.target), drift=_drift_info(made)
        )
        examples = report.examples(made.drift, data) if made.drift and data is not None else ()
        return _Made(manifest, parity, made, measured, gate.audits, examples)

    def _typed(self, folder: Path, made: Quantized, audits: Mapping[str, Audit]) -> _Made:
        """In float16 for TensorRT: nothing is quantized, so it is held against PyTorch, run by ONNX Runtime."""
        manifest = self._complete(folder, made.graphs, made.schemes)
        parity = self._verified(folder, manifest, made.schemes)
        quantization = {graph: quantization_info(scheme, "tensorrt") for graph, scheme in made.schemes.items()}
        manifest = dataclasses.replace(
            manifest, quantization=quantization, parity=parity.manifest_entries(), drift=_drift_info(made)
        )
        return _Made(manifest, parity, audits=audits)

    def report(self, folder: Path, made: _Made) -> int:
        """The reports and the final manifest; the bundle's size in bytes."""
        if made.manifest.target == "tensorrt":
            _check_lint(folder)
        facts = report.Facts(
            made.manifest,
            self.plan,
            made.parity,
            self._samples,
            self.stopwatch.seconds,
            made.quantized,
            made.measured,
            made.examples,
            tuple(line for audit in made.audits.values() for line in audit.describe()),
            "your data" if self._options.calibration else "the pictures above",
        )
        report.write(folder, facts)
        write_manifest(folder, dataclasses.replace(made.manifest, files=hash_files(folder)))
        return sum(path.stat().st_size for path in folder.iterdir())

    def _proved(self, folder: Path, target: str, schemes: Mapping[str, Scheme]) -> tuple[Manifest, Parity]:
        """A bundle traced from PyTorch that gives what PyTorch gives. Raises VerificationError."""
        manifest = write_bundle(
            folder, self._checkpoint, target, schemes, self._rule, self.stopwatch, self._options.largest
        )
        return manifest, self._verified(folder, manifest, schemes)

    def _verified(self, folder: Path, manifest: Manifest, schemes: Mapping[str, Scheme]) -> Parity:
        tolerance = self._options.tolerance or max(DEFAULT_TOLERANCE[scheme] for scheme in schemes.values())
        parity = verify(folder, manifest, self._checkpoint, self._samples, tolerance, self.stopwatch)
        parity.check()
        _check_canary(folder, manifest)
        return parity

    def _complete(
        self,
        folder: Path,
        graphs: Mapping[str, GraphInfo],
        schemes: Mapping[str, Scheme],
        canary_of_itself: bool = False,
    ) -> Manifest:
        """Make the folder a bundle. Its canary is PyTorch's until it can be computed by the bundle itself."""
        scheme = "fp16" if set(schemes.values()) == {"fp16"} else "fp32"
        canary = make_canary(self._checkpoint, tuple(graphs), self._rule, scheme)

        def write() -> Manifest:
            options = self._options
            return complete(
                folder, self._checkpoint, options.target, schemes, graphs, self._rule, canary, options.largest
            )

        manifest = write()
        if not canary_of_itself:
            return manifest
        self.stopwatch("computing the canary")
        canary = observed_canary(Bundle.open(folder), canary)
        return write()


def _refusal(made: Quantized) -> str:
    worst = ", ".join(f"{each.graph}: {each.layer}" for each in made.ranking[:3])
    return (
        f"the quantized bundle differs too much from float32: {'; '.join(made.failures)}"
        + (f". The layers that hurt most: {worst}" if worst else "")
        + ". Nothing was published; try another precision, more pictures, or --accept-drift"
    )


def _quantization(made: Quantized, target: str) -> dict[str, QuantizationInfo]:
    drift = _embedding_drift(made.drift)
    kept = {each.graph: each.kept for each in made.layers}
    schemes = {each.graph: _what_it_is(each) for each in made.layers}
    return {
        graph: quantization_info(scheme, target, drift.get(graph), kept.get(graph, ()))
        for graph, scheme in schemes.items()
    }


def _what_it_is(layers: QuantizedLayers) -> Scheme:
    """A graph's scheme; int8 for an int4 graph whose layers all had to be kept in 8 bits."""
    return "int8" if layers.eight_bits and not layers.quantized else layers.scheme


def _embedding_drift(drift: Drift | None) -> dict[str, dict[str, float]]:
    if drift is None:
        return {}
    cosines = {
        "vision": drift.embedding_cosine_mean,
        "video": drift.clip_cosine_mean,
        "text": drift.text_cosine_mean,
    }
    return {graph: {"embedding": max(0.0, 1 - cosine)} for graph, cosine in cosines.items() if cosine is not None}


def _drift_info(made: Quantized) -> DriftInfo | None:
    if made.drift is None:
        return None
    measures = made.drift.measures
    limits = {name: limit for name, limit in made.limits.to_dict().items() if name in measures}
    return DriftInfo(made.drift.data_hash, made.drift.pictures, measures, limits)


def _check_canary(folder: Path, manifest: Manifest) -> None:
    """What doctor and verify do on the device must succeed here first."""
    with Model.load(folder, here(manifest.target), verify=False) as model:
        result = compare(manifest.canary, model.canary_answers(manifest.canary))
    if not result.ok:
        raise VerificationError(f"{result.message}. Nothing was published")


def _check_lint(folder: Path) -> None:
    """Raises EngineError, which names the node, for what TensorRT would not take."""
    findings = lint_bundle(Bundle.open(folder))
    if findings:
        more = f", and {len(findings) - 1} more" if len(findings) > 1 else ""
        raise EngineError(f"TensorRT would not take it: {findings[0].describe()}{more}")


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
