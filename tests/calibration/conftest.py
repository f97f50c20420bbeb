"""Data to calibrate with, the committed tiny bundle, and quantized copies of it, whole and broken."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from mammut_calibration.activations import layers
from mammut_calibration.collect import CalibrateOptions, calibrate
from mammut_calibration.data import Dataset, open_dataset
from mammut_calibration.table import CalibrationTable
from mammut_runtime.bundle import Bundle, QuantizationInfo, hash_files, write_manifest
from mammut_runtime.canary import canary_picture

TINY = Path(__file__).parent.parent / "data" / "tiny-bundle"


Change = Callable[[onnx.ModelProto], None]


class Maker:
    """What tests are made of."""

    @staticmethod
    def picture(seed: int, size_hw: tuple[int, int] = (40, 48)) -> NDArray[np.uint8]:
        """uint8[H, W, 3]; another one for each seed."""
        tint = np.array([seed * 37 % 90, seed * 53 % 90, seed * 71 % 90])
        return np.clip(canary_picture(seed, size_hw).astype(np.int16) // 2 + tint, 0, 255).astype(np.uint8)

    def png(self, seed: int) -> bytes:
        """The same as a file."""
        return bytes(cv2.imencode(".png", self.picture(seed))[1])

    def folder(self, folder: Path, count: int, captions: bool = True) -> Path:
        """A folder of PNG files p00.png, p01.png, ..., with a caption beside each."""
        folder.mkdir(parents=True, exist_ok=True)
        for seed in range(count):
            (folder / f"p{seed:02d}.png").write_bytes(self.png(seed))
            if captions:
                row = {"caption": f"picture number {seed}", "other": 1}
                (folder / f"p{seed:02d}.json").write_text(json.dumps(row))
        return folder

    def clip(self, path: Path, frames: int, fps: int, still: bool = False) -> Path:
        """An MJPG clip; still: every frame the same."""
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), fps, (48, 40))
        for index in range(frames):
            writer.write(self.picture(1 if still else index))
        writer.release()
        return path

    @staticmethod
    def scaled(part: str, factor: float) -> Change:
        """Multiplies the quantization scales whose names begin with `part`."""

        def change(model: onnx.ModelProto) -> None:
            found = [
                each for each in model.graph.initializer if each.name.startswith(part) and each.name.endswith("_scale")
            ]
            assert len(found) == 1, [each.name for each in found]
            array = onnx.numpy_helper.to_array(found[0]) * np.float32(factor)
            found[0].CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float32), found[0].name))

        return change


@pytest.fixture(scope="session")
def make() -> Maker:
    return Maker()


@pytest.fixture(scope="session")
def options() -> CalibrateOptions:
    return CalibrateOptions(threads=1, max_tokens=6)


@pytest.fixture(scope="session")
def tiny() -> Bundle:
    return Bundle.open(TINY)


@pytest.fixture(scope="session")
def data(make: Maker, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """20 different pictures with captions."""
    return open_dataset([make.folder(tmp_path_factory.mktemp("data") / "pictures", 20)])


@pytest.fixture(scope="session")
def table(tiny: Bundle, data: Dataset, options: CalibrateOptions) -> CalibrationTable:
    return calibrate(tiny, data, options)


@pytest.fixture(scope="session")
def quantized(
    tiny: Bundle, table: CalibrationTable, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Change], Bundle]:
    """Makes a copy of the tiny bundle, one graph in 8 bits (static, by ONNX Runtime's quantizer) and then changed."""

    def make(graph: str, change: Change = lambda model: None) -> Bundle:
        folder = tmp_path_factory.mktemp("quantized") / "bundle"
        shutil.copytree(TINY, folder)
        model = quantize(tiny.graph_path(graph), table, graph)
        change(model)
        (folder / f"{graph}.onnx").write_bytes(model.SerializeToString())
        manifest = dataclasses.replace(
            tiny.manifest,
            precision="int8",
            quantization={graph: QuantizationInfo("int8", "uint8", {})},
            files=hash_files(folder),
        )
        write_manifest(folder, manifest)
        return Bundle.open(folder)

    return make


def quantize(path: Path, table: CalibrationTable, graph: str) -> Any:
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    model = onnx.load(str(path))
    ranges = {
        name: TensorData(lowest=np.float32(each.low), highest=np.float32(each.high))
        for name, each in table.ranges(graph).items()
    }
    weighted = {layer.name for layer in layers(model)}
    products = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.name not in weighted]
    quantizer = QDQQuantizer(
        model,
        True,  # per channel
        False,  # reduce_range
        QuantType.QInt8,
        QuantType.QUInt8,
        TensorsData(CalibrationMethod.MinMax, ranges),
        [],
        products,
        ["MatMul", "Gemm"],
        {"QuantizeBias": False, "WeightSymmetric": True},
    )
    quantizer.quantize_model()
    return quantizer.model.model
