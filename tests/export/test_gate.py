"""The gate on the committed tiny bundle: random weights, real graphs, real engines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest

from mammut_calibration.collect import calibrate
from mammut_calibration.data import Dataset, open_dataset
from mammut_calibration.drift import MEASURES, DriftLimits
from mammut_calibration.layers import layer_errors
from mammut_export import gate as module
from mammut_export.gate import Gate
from mammut_export.measure import here
from mammut_runtime.bundle import Bundle, hash_files, write_manifest
from mammut_runtime.canary import canary_picture
from mammut_runtime.errors import InputError
from mammut_runtime.manifest import TOKENIZER_FILE, GraphInfo, Scheme

TINY = Path(__file__).parent.parent / "data" / "tiny-bundle"
GRAPHS = ("vision", "text", "memory", "decoder")
LOOSE = DriftLimits(*[-1.0] * len(MEASURES))
IMPOSSIBLE = dataclasses.replace(LOOSE, embedding_cosine_mean=1.0)


def folder_of_pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    for seed in range(count):
        tint = np.array([seed * 37 % 90, seed * 53 % 90, seed * 71 % 90])
        picture = np.clip(canary_picture(seed, (40, 48)).astype(np.int16) // 2 + tint, 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"{seed:02d}.png"), picture)
        (folder / f"{seed:02d}.json").write_text(json.dumps({"caption": f"picture number {seed}"}))
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset([folder_of_pictures(tmp_path_factory.mktemp("gate") / "data", 40)])


@pytest.fixture(scope="session")
def reference() -> Bundle:
    return Bundle.open(TINY)


def gate(reference: Bundle, data: Dataset | None, limits: DriftLimits, target: str = "onnxruntime") -> Gate:
    def complete(folder: Path, graphs: Mapping[str, GraphInfo], schemes: Mapping[str, Scheme]) -> None:
        (folder / TOKENIZER_FILE).write_bytes((TINY / TOKENIZER_FILE).read_bytes())
        files = hash_files(folder)
        manifest = dataclasses.replace(
            reference.manifest,
            target=target,  # type: ignore[arg-type]
            graphs=dict(graphs),
            files=files,
        )
        write_manifest(folder, manifest)

    return Gate(reference, target, data, complete, limits=limits, options=here(target, 1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    result = tmp_path / "made"
    result.mkdir()
    return result


@pytest.mark.parametrize(
    ("scheme", "target"),
    [("int8", "onnxruntime"), ("int8-dynamic", "onnxruntime"), ("int4", "onnxruntime"), ("int8", "openvino")],
)
def test_passes(reference: Bundle, data: Dataset, folder: Path, scheme: Scheme, target: str) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")
    made = gate(reference, data, LOOSE, target).make(folder, dict.fromkeys(GRAPHS, scheme))
    assert not made.failures and len(made.rounds) == 1
    assert made.drift is not None and 0.9 < made.drift.measures["embedding_cosine_mean"] < 1
    assert all(each.quantized for each in made.layers)
    assert Bundle.open(folder).path == folder


@pytest.mark.parametrize(
    ("scheme", "target"), [("int8", "onnxruntime"), ("int4", "onnxruntime"), ("int4", "openvino"), ("int8", "tensorrt")]
)
def test_layers_are_kept_until_it_passes(
    reference: Bundle, data: Dataset, folder: Path, scheme: Scheme, target: str
) -> None:
    """Only float32 has a cosine of 1: every layer of the graph at fault must end up kept, in ever larger steps, and
    the graphs that are not at fault stay quantized."""
    if target == "openvino":
        pytest.importorskip("openvino")
    limits = dataclasses.replace(LOOSE, embedding_cosine_min=1 - 1e-6)
    made = gate(reference, data, limits, target).make(folder, dict.fromkeys(GRAPHS, scheme))
    assert not made.failures
    kept = [each.kept for each in made.rounds]
    assert kept[:3] == [0, 2, 6] and made.rounds[0].failures
    assert made.rounds[-1].keep_as["vision"] == "fp32"
    if scheme == "int4":  # 8 bits were tried first
        assert made.rounds[1].keep_as["vision"] in ("int8", "int8-dynamic")
    by_graph = {each.graph: each for each in made.layers}
    assert by_graph["vision"].kept and by_graph["text"].quantized and not by_graph["text"].kept
    assert len(by_graph["vision"].kept) > len(by_graph["vision"].quantized)


def test_control_of_keeping(reference: Bundle, data: Dataset, folder: Path) -> None:
    """What cannot pass is returned with its failures after everything was kept, not tried for ever."""
    made = gate(reference, data, DriftLimits()).make(folder, dict.fromkeys(GRAPHS, "int4"), most_kept=0.0)
    strict = gate(reference, data, IMPOSSIBLE).make(folder, dict.fromkeys(GRAPHS, "int4"), most_kept=0.0)
    assert len(made.rounds) == len(strict.rounds) == 1
    assert strict.failures and "embedding_cosine_mean" in strict.failures[0]


@pytest.mark.parametrize(
    ("scheme", "graph", "limit"),
    [
        ("int8", "vision", {"embedding_cosine_min": 0.8}),
        ("int8-dynamic", "decoder", {"forced_token_agreement": 0.8}),
        ("int4", "text", {"text_cosine_min": 0.97}),
    ],
)
def test_one_broken_scale_is_caught_and_named(
    reference: Bundle,
    data: Dataset,
    folder: Path,
    scheme: Scheme,
    graph: str,
    limit: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The scale of one layer's weights x 4. The control is `test_passes` and the first half here."""
    right = module.write_quantized
    broken: list[str] = []

    def wrong(*args: object, **more: object) -> object:
        result = right(*args, **more)  # type: ignore[arg-type]
        broken.append(break_scale(Path(str(args[1])), graph, result[1]))
        return result

    limits = dataclasses.replace(LOOSE, **limit)
    schemes = dict.fromkeys(GRAPHS, scheme)
    assert not gate(reference, data, limits).make(folder, schemes, most_kept=0.0).failures
    monkeypatch.setattr(module, "write_quantized", wrong)
    made = gate(reference, data, limits).make(folder, schemes, most_kept=0.0)
    assert made.failures
    worst = layer_errors(reference, Bundle.open(folder), data, threads=1)[0]
    assert (worst.graph, worst.layer) == (graph, broken[0])
    assert made.ranking[0].layer == broken[0]


def break_scale(folder: Path, graph: str, layers: tuple[module.QuantizedLayers, ...]) -> str:
    """Four times the scale of the weights of a layer in the middle of the graph; the layer's name."""
    path = folder / f"{graph}.onnx"
    model = onnx.load(path, load_external_data=True)
    names = next(each.quantized for each in layers if each.graph == graph)
    layer = names[len(names) // 2]
    module_name = layer.rpartition("/")[0]
    scales = [
        each
        for each in model.graph.initializer
        if each.name.startswith(module_name + ".") and "scale" in each.name and "weight" in each.name
    ]
    assert len(scales) == 1, [each.name for each in model.graph.initializer if each.name.startswith(module_name)]
    array = onnx.numpy_helper.to_array(scales[0]) * np.float32(4)
    scales[0].CopyFrom(onnx.numpy_helper.from_array(array, scales[0].name))
    onnx.save(model, path)
    return layer


def test_auto_takes_the_fastest_that_passes(
    reference: Bundle, data: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {"fp32": 9.0, "int8": 1.0, "int8-dynamic": 2.0, "int4": 3.0}

    def timed(name: str, paths: Mapping[Scheme, Path], *_: object) -> list[module.GraphTime]:
        return [module.GraphTime(name, scheme, speeds[scheme]) for scheme in paths]

    monkeypatch.setattr(module, "_time_graph", timed)
    assert gate(reference, data, LOOSE).make_fastest(folder).schemes == dict.fromkeys(GRAPHS, "int8")
    made = gate(reference, data, dataclasses.replace(LOOSE, embedding_cosine_mean=1 - 1e-6)).make_fastest(folder)
    assert not made.failures
    assert made.schemes == {"vision": "fp32", "text": "int8", "memory": "int8", "decoder": "int8"}
    assert len(made.times) == 4 * len(GRAPHS)


def test_auto_times_again_what_was_kept_higher(
    reference: Bundle, data: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int4 is the fastest until layers have to be kept for it to pass; the next precision is faster then."""
    speeds = {"fp32": 9.0, "int8": 3.0, "int8-dynamic": 4.0, "int4": 1.0}
    timed_again: set[str] = set()

    def timed(name: str, paths: Mapping[Scheme, Path], *_: object) -> list[module.GraphTime]:
        slower = 5.0 if len(paths) == 2 else 0.0  # a pair is a graph that is timed again
        timed_again.update([name] if slower else [])
        return [module.GraphTime(name, scheme, speeds[scheme] + slower * (scheme == "int4")) for scheme in paths]

    monkeypatch.setattr(module, "_time_graph", timed)
    monkeypatch.setattr(module, "MOST_KEPT_BY_AUTO", 1.0)
    control = gate(reference, data, LOOSE).make_fastest(folder)
    assert control.schemes["vision"] == "int4" and not timed_again
    limits = dataclasses.replace(LOOSE, embedding_cosine_min=0.98)
    made = gate(reference, data, limits).make_fastest(folder)
    assert not made.failures and "vision" in timed_again
    assert made.schemes == {"vision": "int8", "text": "int4", "memory": "int4", "decoder": "int4"}


def test_auto_where_nothing_passes_but_float32(reference: Bundle, data: Dataset, folder: Path) -> None:
    made = gate(reference, data, DriftLimits(*[1.0] * 9)).make_fastest(folder)
    assert not made.failures and set(made.schemes.values()) <= {"fp32", "int8", "int8-dynamic", "int4"}
    assert made.schemes["vision"] == "fp32"


def test_a_table_of_the_pictures_that_judge_is_refused(reference: Bundle, data: Dataset) -> None:
    """The control is a table of the other part."""
    calibration, held_out = data.split()
    table = calibrate(reference, calibration)
    Gate(reference, "onnxruntime", data, lambda *_: None, table=table)
    other = dataclasses.replace(table.header, data_hash=held_out.content_hash)
    with pytest.raises(InputError, match="made from other pictures than --calibration leaves"):
        Gate(reference, "onnxruntime", data, lambda *_: None, table=dataclasses.replace(table, header=other))


def test_auto_measures(reference: Bundle, data: Dataset, folder: Path) -> None:
    made = gate(reference, data, LOOSE).make_fastest(folder)
    assert not made.failures
    assert {(each.graph, each.scheme) for each in made.times} == {
        (graph, scheme) for graph in GRAPHS for scheme in ("fp32", "int8", "int8-dynamic", "int4")
    }
    for graph, scheme in made.schemes.items():
        times = {each.scheme: each.milliseconds for each in made.times if each.graph == graph}
        assert times[scheme] == min(times.values())


def test_without_data(reference: Bundle, folder: Path) -> None:
    made = gate(reference, None, LOOSE).make(folder, dict.fromkeys(GRAPHS, "int4"))
    assert made.drift is None and made.failures == ("the drift was not measured: there were no data",)
    with pytest.raises(InputError, match="int8 needs the ranges of your data; give pictures with --calibration"):
        gate(reference, None, LOOSE).make(folder, dict.fromkeys(GRAPHS, "int8"))
