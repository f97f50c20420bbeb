"""What an export is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mammut.checkpoint import Checkpoint
from mammut_calibration.drift import DriftLimits
from mammut_export.graphs import TASKS, graphs_for, tasks_for
from mammut_export.precisions import AUTO, QUANTIZED, parse_precision
from mammut_export.profiles import ProfileLimits
from mammut_runtime.errors import InputError
from mammut_runtime.manifest import Scheme


@dataclass(frozen=True)
class ExportOptions:
    """What to make. Raises InputError for values out of range."""

    target: str = "onnxruntime"
    """One of precisions.TARGETS."""
    precision: str = "fp32"
    """See precisions.parse_precision; or precisions.AUTO."""
    tasks: tuple[str, ...] | None = None
    """Some of TASKS: only the graphs that they need are made. None: all that the checkpoint can do."""
    max_tokens: int | None = None
    """Longest caption the bundle is made and checked for, new tokens. None: 40, or what the context leaves."""
    tolerance: float | None = None
    """Largest error relative to an output's largest value. None: parity.DEFAULT_TOLERANCE of the precision."""
    pictures: tuple[Path, ...] = ()
    """Files and folders of pictures to check with. None given: pictures drawn here."""
    calibration: tuple[Path, ...] = ()
    """The user's data for quantized precisions: folders of pictures, WebDataset tars, clips. A quarter is held out, and
    judges the bundle."""
    table: Path | None = None
    """A calibration made before, by mammut-calibrate."""
    limits: DriftLimits = field(default_factory=DriftLimits)
    """What a quantized bundle must reach."""
    most_kept: float = 1.0
    """Share of a quantized bundle's layers that may be kept in floating point for it to pass."""
    accept_drift: bool = False
    """Publish a bundle that does not; its manifest, and every `doctor`, say so."""
    largest: ProfileLimits = field(default_factory=ProfileLimits)
    """For tensorrt: what engines are built for at most; their scratch memory grows with it."""
    threads: int = 0
    """For measuring and judging; 0 takes the physical cores."""

    def __post_init__(self) -> None:
        schemes = self.schemes
        if self.tolerance is not None and not 0 < self.tolerance <= 1:
            raise InputError(f"tolerance: expected a number above 0 and at most 1, got {self.tolerance}")
        if not 0 <= self.most_kept <= 1:
            raise InputError(f"most_kept: expected a share from 0 to 1, got {self.most_kept}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(f"max_tokens: expected at least 1, got {self.max_tokens}")
        if self.table is not None and "int8" not in schemes.values() and not self.auto:
            raise InputError("a calibration table is used by int8 and auto only; leave it out")
        if self.largest != ProfileLimits() and self.target != "tensorrt":
            raise InputError(f"--max-batch and --max-beams are for target tensorrt, got {self.target}; leave them out")
        used = self.quantized or (self.target == "tensorrt" and self.precision != "fp32")
        if self.calibration and not used:
            raise InputError(
                f"--calibration is for quantized precisions, and {self.precision} is not; leave it out, or check with "
                f"your pictures by --pictures"
            )
        if self.auto and self.target == "tensorrt":
            raise InputError(
                "precision auto measures on this machine, and TensorRT builds on the device; choose fp16, int8 or int4"
            )

    def resolved(self, checkpoint: Checkpoint) -> ExportOptions:
        """With the tasks for this checkpoint. Raises InputError for what it cannot do."""
        return dataclasses.replace(self, tasks=tasks_for(checkpoint, self.tasks))

    @property
    def graphs(self) -> tuple[str, ...]:
        """Names of the graphs to make; before `resolved`, of all that there may be."""
        return graphs_for(TASKS if self.tasks is None else self.tasks)

    @property
    def auto(self) -> bool:
        return self.precision == AUTO

    @property
    def schemes(self) -> Mapping[str, Scheme]:
        """Graph → precision; with AUTO, before anything was measured, fp32."""
        return parse_precision("fp32" if self.auto else self.precision, self.graphs, self.target)

    @property
    def quantized(self) -> bool:
        """Whether the gate has to be passed."""
        return self.auto or bool(QUANTIZED & set(self.schemes.values()))

    def check_data(self) -> None:
        """Raises InputError where a quantized bundle could not be judged."""
        if self.quantized and not self.calibration and (self.auto or not self.accept_drift):
            raise InputError(
                f"precision {self.precision} changes what the model says, and that is judged on your own pictures: "
                f"give them with --calibration (a folder, a WebDataset tar, clips; about 100 are good)"
            )
