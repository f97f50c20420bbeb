"""Profiles from a manifest's own numbers, and the manifest's check of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mammut_export.profiles import ProfileLimits, activation_bytes, profiles_for
from mammut_runtime.bundle import Bundle
from mammut_runtime.errors import InputError
from mammut_runtime.manifest import GraphInfo, InputProfile, Manifest, halves_between, is_between

TINY = Path(__file__).parent.parent / "data" / "tiny-bundle"


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return replace(Bundle.open(TINY).manifest, target="tensorrt")


def test_profiles(manifest: Manifest) -> None:
    found = profiles_for(manifest)
    assert found["vision"] == {"pixels": InputProfile((1, 3, 32, 32), (1, 3, 32, 32), (8, 3, 32, 32))}
    assert found["text"] == {"ids": InputProfile((1, 2), (1, 12), (8, 24))}
    decoder = found["decoder"]
    assert decoder["ids"] == InputProfile((1, 1, 1), (1, 1, 1), (8, 8, 24))
    assert decoder["past_k.1"] == InputProfile((1, 1, 2, 0, 12), (1, 1, 2, 11, 12), (8, 8, 2, 23, 12))
    assert decoder["cross_v.0"] == InputProfile((1, 2, 16, 12), (1, 2, 16, 12), (8, 2, 16, 12))
    assert decoder.keys() == {tensor.name for tensor in manifest.graphs["decoder"].inputs}


def test_a_manifest_takes_them(manifest: Manifest) -> None:
    assert replace(manifest, profiles=profiles_for(manifest)).profiles["vision"].keys() == {"pixels"}


def test_a_fixed_text_length(manifest: Manifest) -> None:
    fixed = replace(
        manifest, text=replace(manifest.text, text_length=20), canary=replace(manifest.canary, ids=(1,) * 20)
    )
    assert profiles_for(fixed)["text"]["ids"] == InputProfile((1, 20), (1, 20), (8, 20))


def test_memory_grows_with_the_maximum(manifest: Manifest) -> None:
    small = profiles_for(manifest, ProfileLimits(pictures=1, texts=1, beams=1))
    vision = manifest.graphs["vision"]
    assert activation_bytes(vision, small["vision"]) == 4 * 3 * 32 * 32
    assert activation_bytes(vision, profiles_for(manifest)["vision"]) == 8 * 4 * 3 * 32 * 32


@pytest.mark.parametrize("name", ["pictures", "texts", "beams"])
def test_limits_are_checked(name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: expected at least 1, got 0"):
        ProfileLimits(**{name: 0})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"video": {}}, "profiles: unknown key 'video'"),
        ({"vision": {}}, r"profiles\.vision: missing key 'pixels', an input with free sizes"),
        ({"text": {"idz": InputProfile((1,), (1,), (1,))}}, r"profiles\.text: missing key 'ids'"),
        ({"text": {"ids": InputProfile((1, 2), (1, 8), (8, 24)), "x": InputProfile((), (), ())}}, "unknown key 'x'"),
        ({"text": {"ids": InputProfile((1,), (1,), (1,))}}, r"expected 2 sizes each, as int64\[batch, length\] has"),
        ({"text": {"ids": InputProfile((2, 2), (1, 8), (8, 24))}}, "expected minimum <= optimum <= maximum"),
        ({"text": {"ids": InputProfile((1, 2), (1, 8), (8, 4))}}, "expected minimum <= optimum <= maximum"),
        (
            {"vision": {"pixels": InputProfile((1, 3, 32, 32), (1, 3, 32, 32), (8, 3, 64, 64))}},
            "expected 32 throughout, as",
        ),
    ],
)
def test_what_a_manifest_refuses(change: dict[str, Any], words: str, manifest: Manifest) -> None:
    with pytest.raises(ValueError, match=words):
        replace(manifest, profiles=profiles_for(manifest) | change)


def test_one_size_has_one_limit(manifest: Manifest) -> None:
    profiles = profiles_for(manifest)
    decoder = profiles["decoder"] | {"cross_k.0": InputProfile((1, 2, 16, 12), (1, 2, 16, 12), (4, 2, 16, 12))}
    with pytest.raises(
        ValueError, match=r"profiles\.decoder\.cross_k\.0: batch is \(1, 1, 4\), but \(1, 1, 8\) in ids"
    ):
        replace(manifest, profiles=profiles | {"decoder": decoder})


def test_other_targets_have_none(manifest: Manifest) -> None:
    with pytest.raises(ValueError, match="profiles: expected none in a bundle for openvino"):
        replace(manifest, target="openvino", profiles=profiles_for(manifest))


def halved(graph: GraphInfo) -> GraphInfo:
    def typed(tensors: Any) -> Any:
        return tuple(replace(each, dtype="float16") if is_between(each.name) else each for each in tensors)

    return replace(graph, inputs=typed(graph.inputs), outputs=typed(graph.outputs))


def test_half_between_the_graphs(manifest: Manifest) -> None:
    graphs = {name: halved(graph) for name, graph in manifest.graphs.items()}
    assert halves_between(graphs) and not halves_between(manifest.graphs)
    assert replace(manifest, graphs=graphs).graphs == graphs
    with pytest.raises(ValueError, match=r"tokens: expected float32\[batch, 16, 32\], got float16"):
        replace(manifest, graphs=graphs, target="onnxruntime")


def test_all_of_them_or_none(manifest: Manifest) -> None:
    graphs = {name: halved(graph) if name == "decoder" else graph for name, graph in manifest.graphs.items()}
    with pytest.raises(ValueError, match=r"graphs\.vision\.outputs: tokens: expected float16"):
        replace(manifest, graphs=graphs)


def test_nothing_else_is_half(manifest: Manifest) -> None:
    graphs = {name: halved(graph) for name, graph in manifest.graphs.items()}
    outputs = tuple(replace(each, dtype="float16") for each in graphs["vision"].outputs)
    graphs["vision"] = replace(graphs["vision"], outputs=outputs)
    with pytest.raises(ValueError, match=r"embedding: expected float32\[batch, 24\], got float16"):
        replace(manifest, graphs=graphs)
