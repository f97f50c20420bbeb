"""Parameter counts against the published ones (paper section 1 and LAION's model_profile.csv)."""

from __future__ import annotations

import pytest
import torch

from mammut import presets
from mammut.config import MammutConfig
from mammut.model import Mammut

OPENMAMMUT_MILLIONS = {
    "S-32": 85.62, "S-16": 84.79, "S-14": 84.74, "M-32": 134.73, "M-16": 133.63, "M-14": 133.57,
    "B-32": 183.02, "B-16": 290.52, "B-14": 181.27, "L-32": 510.63, "L-16": 508.42, "L-14": 508.29,
    "H-32": 1191.06, "H-16": 1188.30, "H-14": 1188.14,
}  # fmt: skip


def meta(config: MammutConfig) -> Mammut:
    with torch.device("meta"):
        return Mammut(config)


def millions(module: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize("size", presets.OPENMAMMUT_SIZES)
def test_openmammut_sizes_have_the_published_parameter_counts(size: str) -> None:
    assert millions(meta(presets.openmammut(size))) == pytest.approx(OPENMAMMUT_MILLIONS[size], abs=0.006)


def test_paper_base_is_vit_b_86m_and_a_128m_decoder() -> None:
    model = meta(presets.paper_base())
    cross = millions(model.text.cross_blocks)
    assert millions(model.vision) == pytest.approx(86, rel=0.01)
    assert millions(model.text) - cross == pytest.approx(128, rel=0.01)
    assert len(model.text.cross_blocks) == 4


def test_paper_huge_is_vit_h_630m_a_1b_decoder_and_420m_of_cross_attention() -> None:
    model = meta(presets.paper_huge())
    cross = millions(model.text.cross_blocks)
    assert millions(model.vision) == pytest.approx(630, rel=0.01)
    assert cross == pytest.approx(420, rel=0.02)
    assert millions(model.text) - cross == pytest.approx(1000, rel=0.06)
    assert millions(model) == pytest.approx(2000, rel=0.01)  # "2B total params"


def test_the_demo_fits_fifteen_megabytes_in_float16() -> None:
    assert millions(meta(presets.demo())) * 2 < 14.9


def test_an_unknown_size_is_an_error() -> None:
    with pytest.raises(KeyError):
        presets.openmammut("X-32")
