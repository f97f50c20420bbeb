from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mammut.checkpoint import Checkpoint
from mammut_export import parity
from mammut_export.export import export
from mammut_export.options import ExportOptions
from mammut_export.parity import CaptionParity, OutputParity, Parity, _gap, _Ledger, verify
from mammut_export.samples import drawn_samples
from mammut_runtime.bundle import Bundle
from mammut_runtime.errors import VerificationError

GOOD = OutputParity("vision.embedding", 1e-6, 1e-5, 0.2, "batch 1", 3)


@pytest.fixture
def bundle(tiny: Checkpoint, traced_once: None, tmp_path: Path) -> Bundle:
    export(tiny, tmp_path / "bundle", ExportOptions(max_tokens=6))
    return Bundle.open(tmp_path / "bundle")


def test_a_right_bundle_passes(bundle: Bundle, tiny: Checkpoint) -> None:
    found = verify(bundle.path, bundle.manifest, tiny, drawn_samples(), 5e-5)
    found.check()
    assert {each.output for each in found.outputs} == {
        "vision.tokens", "vision.embedding", "vision.norm", "text.embedding", "text.norm", "memory.cross_k",
        "memory.cross_v", "decoder.logits", "decoder.present_k", "decoder.present_v",
    }  # fmt: skip
    assert all(0 <= each.max_abs_error < each.tolerance for each in found.outputs)
    assert [caption.verdict for caption in found.captions] == ["same"] * 5
    assert found.manifest_entries().keys() == {each.output for each in found.outputs}
    assert 0 <= found.drift < 1e-6 and len(found.timings) == 3


def test_a_slightly_other_model_does_not(bundle: Bundle, tiny: Checkpoint) -> None:
    """Control: one bias in the last block is off by 0.01, which captions may not even notice."""
    import copy

    other = copy.deepcopy(tiny.model)
    other.text.self_blocks[-1].out.bias[3] += 0.01
    found = verify(bundle.path, bundle.manifest, replace(tiny, model=other), drawn_samples(), 5e-5)
    assert {each.output for each in found.outputs if not each.ok} >= {"text.embedding", "decoder.logits"}
    assert next(each for each in found.outputs if each.output == "vision.tokens").ok
    with pytest.raises(VerificationError, match=r"text\.embedding differs by .*tolerance .*Nothing was published"):
        found.check()


def test_an_error_is_relative_to_the_largest_value() -> None:
    ledger = _Ledger()
    ledger.add("decoder.present_k.0", "a", np.float32([1.0, 2.0]), np.float32([1.0, 2.5]))
    ledger.add("decoder.present_k.1", "b", np.float32([100.0]), np.float32([100.1]))
    (found,) = ledger.results(0.01)
    assert (found.output, found.worst_case, found.cases) == ("decoder.present_k", "a", 2)
    assert found.max_abs_error == 0.5 and found.tolerance == pytest.approx(1.001) and found.ok
    assert not ledger.results(0.001)[0].ok


@pytest.mark.parametrize(
    "got",
    [None, np.float32([1, np.nan]), np.float32([np.inf, 1]), np.float32([[1, 1]]), np.float64([1, 1])],
    ids=["missing", "nan", "infinite", "shape", "dtype"],
)
def test_what_is_no_number_is_never_within_tolerance(got: np.ndarray | None) -> None:
    ledger = _Ledger()
    ledger.add("vision.embedding", "good", np.float32([1, 1]), np.float32([1, 1]))
    assert ledger.results(1.0)[0].ok  # the control
    ledger.add("vision.embedding", "bad", got, np.float32([1, 1]))
    (found,) = ledger.results(1.0)
    assert not found.ok and found.worst_case == "bad"
    with pytest.raises(VerificationError, match="differs by inf"):
        Parity(1.0, (found,), (), (), (), 0.0, ()).check()


def test_a_tie_is_said_and_passes_and_a_difference_fails() -> None:
    tie = CaptionParity("cat.jpg", "a cat", (5, 6), (5, 7), "tie", 1e-7)
    Parity(1e-5, (GOOD,), (tie,), (), (), 0.0, ()).check()
    different = replace(tie, verdict="different", gap=0.4)
    with pytest.raises(VerificationError, match=r"the caption of 'cat.jpg' is \[5, 6\], PyTorch's \[5, 7\].*by 0.4"):
        Parity(1e-5, (GOOD,), (different,), (), (), 0.0, ()).check()
    of_a_clip = replace(different, clip=True)
    with pytest.raises(VerificationError, match=r"the caption of a clip of 'cat.jpg' is"):
        Parity(1e-5, (GOOD,), (of_a_clip,), (), (), 0.0, ()).check()


def test_verdict_of_a_caption_that_parts(bundle: Bundle, tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is made to choose otherwise at one place: a tie only if the core's logits are close there."""
    right = parity.greedy_from_tokens

    def second_choice(*arguments: object) -> list[int]:
        ids = right(*arguments)  # type: ignore[arg-type]
        return [*ids[:2], (ids[2] + 1) % 500 + 3, *ids[3:]]

    monkeypatch.setattr(parity, "greedy_from_tokens", second_choice)
    strict = verify(bundle.path, bundle.manifest, tiny, drawn_samples()[:1], 5e-5)
    assert [caption.verdict for caption in strict.captions] == ["different"]
    # Here the "reference" chose worse than the runtime, so the gap is negative; only a close call is a tie.
    (caption,) = strict.captions
    assert caption.gap is not None and abs(caption.gap) > 0.01
    loose = verify(bundle.path, bundle.manifest, tiny, drawn_samples()[:1], 1.0)
    assert [caption.verdict for caption in loose.captions] == ["tie"]


def test_gap_is_taken_where_captions_part(tiny: Checkpoint) -> None:
    import torch

    pixels = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        tokens, _ = tiny.model.encode_image(pixels)
        logits = tiny.model.caption_logits(tokens, torch.tensor([[1, 9, 8]]))[0, -1]
    gap = _gap(tiny, tokens, [1], [9, 8, 5, 2], [9, 8, 7, 7, 2])
    assert gap == pytest.approx(float(logits[7] - logits[5]))
    # One caption ends where the other goes on: the end is a token like the others.
    assert _gap(tiny, tokens, [1], [9, 8, 2], [9, 8, 7, 2]) == pytest.approx(float(logits[7] - logits[2]))
