from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from mammut_calibration.plot import PLOT_WIDTH, ranges_html, write_plot
from mammut_calibration.statistics import TensorCollector
from mammut_calibration.table import CalibrationTable
from mammut_runtime.errors import InputError


def pictures(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(each) for each in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_every_tensor_has_its_line_and_the_page_needs_nothing_else(table: CalibrationTable) -> None:
    page = ranges_html(table)
    tensors = sum(map(len, table.graphs.values()))
    assert len(pictures(page)) == tensors + len(table.graphs)
    for graph, found in table.graphs.items():
        assert f"<h2>{graph}: {len(found)} tensors</h2>" in page
        assert all(f">{name}</td>" in page for name in found)
    assert table.header.data_hash in page
    assert not re.search(r"<script|https?:|src=|url\(", page)


def test_marks_stand_where_the_values_are(table: CalibrationTable) -> None:
    collector = TensorCollector()
    collector.add(np.concatenate([np.linspace(-1, 3, 20_000), [100.0]]).astype(np.float32))
    page = ranges_html(CalibrationTable(table.header, {"vision": {"t": collector.result()}}))
    paths = pictures(page)[-1].findall("path")
    marks = {kind: [float(each.attrib["d"][1:].split()[0]) for each in paths if each.attrib["class"] == kind]
             for kind in ("all", "percentile", "entropy")}  # fmt: skip
    middle = PLOT_WIDTH / 2
    assert marks["all"][1] == PLOT_WIDTH and marks["all"][0] < middle
    assert middle < marks["percentile"][1] < marks["all"][1]
    assert "class='wide'>3" in page  # 100 is some 30 times what nearly all values need
    calm = TensorCollector()
    calm.add(np.linspace(-1, 3, 20_000))
    assert "class='wide'" not in ranges_html(
        CalibrationTable(table.header, {"vision": {"t": calm.result()}})
    )  # control


def test_names_cannot_break_the_page(table: CalibrationTable) -> None:
    one = next(iter(table.graphs["vision"].values()))
    page = ranges_html(CalibrationTable(table.header, {"<b>": {"<script>'\"&": one}}))
    assert "<script>" not in page and "<b>" not in page and "&lt;script&gt;" in page


@pytest.mark.parametrize("value", [0.0, 1e-38, 3e38])
def test_extreme_values_are_drawn(table: CalibrationTable, value: float) -> None:
    collector = TensorCollector()
    collector.add(np.full(5, value, np.float32))
    page = ranges_html(CalibrationTable(table.header, {"vision": {"t": collector.result()}, "text": {}}))
    assert pictures(page) and "nan" not in page


def test_a_place_that_cannot_be_written_is_one_error(table: CalibrationTable, tmp_path: Path) -> None:
    write_plot(tmp_path / "a" / "p.html", table)
    with pytest.raises(InputError, match="cannot be written"):
        write_plot(tmp_path / "a" / "p.html" / "q.html", table)
