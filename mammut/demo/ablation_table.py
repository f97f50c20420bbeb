"""The table of the ablation: means over seeds, paired differences, and what the paper says beside what came out.

Intervals are Student's t over seeds: they say how much initial weights and the order of the data matter, on this one
set of held-out pictures. Differences are paired: rows of one seed saw the same pictures, and began with the same
weights, but for those with another number of cross blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

from mammut.demo.ablations import LARGER, Result, rows
from mammut_runtime.errors import InputError

Verdict = Literal["holds", "does not hold", "not distinguishable", "too few seeds"]
BEGIN, END = "<!-- ablate: begin -->", "<!-- ablate: end -->"
"""The command writes between these lines of a page, and nothing else of it."""
EQUAL_WITHIN = 0.02
"""What still counts as equal where the paper says so: its own equal rows are up to two points apart."""

_MATCHING = ("flowers_match", "clothing_match", "shapes_match", "photos_r5")
GROUPS: Mapping[str, tuple[str, ...]] = {
    "matching": _MATCHING,
    "matching, larger": tuple(f"{name}@larger" for name in _MATCHING),
    "naming": ("flowers_named", "clothing_named", "shapes_named"),
    "questions": ("questions",),
}
"""What a comparison is judged by: the mean of a few figures, which wavers less than each of them."""

COLUMNS = {
    "flowers_match": "matched: flowers",
    "clothing_match": "clothing",
    "shapes_match": "shapes",
    "photos_r1": "photos R@1",
    "photos_r5": "photos R@5",
    "flowers_named": "named: flowers",
    "clothing_named": "clothing",
    "shapes_named": "shapes",
    "flowers_caption": "written: flowers",
    "clothing_caption": "clothing",
    "shapes_caption": "shapes",
    "questions": "questions",
}


@dataclass(frozen=True)
class Claim:
    """Something the paper found: `row` does as said, compared with `other`, in `group`."""

    says: str
    row: str
    other: str
    group: str
    expects: Literal["higher", "equal"]
    paper: str
    """Its figures (picture to text / text to picture), from its ablation tables unless said otherwise."""


CLAIMS = (
    Claim("both losses match as well as the contrastive alone", "both", "contrastive", "matching", "equal",
          "COCO R@1 54.3 / 38.7 against 54.8 / 38.2"),
    Claim("both losses answer better than the caption loss alone", "both", "caption", "questions", "higher",
          "VQA 71.7 against 69.9"),
    Claim("a bidirectional text pass matches better than a causal one", "both", "causal", "matching", "higher",
          "COCO R@1 54.9 / 38.8 against 53.0 / 37.5"),
    Claim("the focal loss matches better than InfoNCE", "focal", "both", "matching", "higher",
          "no figure of its own; chosen for smaller batches"),
    Claim("cropped positions match better in larger pictures", "cropped", "both", "matching, larger", "higher",
          "no figure of its own; RO-ViT: +2.4 APr in detection"),
    Claim("2 cross blocks answer better than 1", "both", "cross-1", "questions", "higher", "VQA 70.8 against 68.7"),
    Claim("4 cross blocks answer better than 2", "cross-4", "both", "questions", "higher", "VQA 71.5 against 70.8"),
    Claim("2 cross blocks match better than 1", "both", "cross-1", "matching", "higher",
          "COCO R@1 56.6 / 40.1 against 55.3 / 39.6"),
    Claim("4 cross blocks match as well as 2", "cross-4", "both", "matching", "equal",
          "COCO R@1 55.7 / 39.9 against 56.6 / 40.1"),
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval; mean - half to mean + half."""

    mean: float
    half: float
    """Infinite where there is one seed only."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """From at least one value and at most eleven."""
        if len(values) < 2:
            return cls(values[0], math.inf)
        return cls(mean(values), _T_975[len(values) - 2] * stdev(values) / math.sqrt(len(values)))

    def points(self, signed: bool = False) -> str:
        """In percentage points: "51.2 ± 3.4"."""
        number = f"{100 * self.mean:+.1f}" if signed else f"{100 * self.mean:.1f}"
        return number if math.isinf(self.half) else f"{number} ± {100 * self.half:.1f}"


_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t at 97.5 %, for 1 to 10 degrees of freedom."""
MOST_SEEDS = len(_T_975) + 1


def estimate(results: Sequence[Result], row: str, figures: Sequence[str]) -> Estimate | None:
    """The mean of these figures over the seeds of a row; None where one of them was not measured."""
    values = _by_seed(results, row, figures)
    return Estimate.of(list(values.values())) if values else None


def difference(results: Sequence[Result], row: str, other: str, figures: Sequence[str]) -> Estimate | None:
    """`row` minus `other` over the seeds that both have; None where there is none."""
    one, two = _by_seed(results, row, figures), _by_seed(results, other, figures)
    values = [one[seed] - two[seed] for seed in sorted(one.keys() & two.keys())]
    return Estimate.of(values) if values else None


def verdict(expects: Literal["higher", "equal"], found: Estimate) -> Verdict:
    """Whether an interval bears out, contradicts or leaves open what the paper found."""
    low, high = found.mean - found.half, found.mean + found.half
    if math.isinf(found.half):
        return "too few seeds"
    if expects == "equal":
        if max(-low, high) <= EQUAL_WITHIN:
            return "holds"
        return "does not hold" if low > 0 or high < 0 else "not distinguishable"
    return "holds" if low > 0 else "does not hold" if high < 0 else "not distinguishable"


def markdown(results: Sequence[Result]) -> str:
    """The tables, for a page. InputError where there are no results, or results of several budgets."""
    if not results:
        raise InputError("no finished runs; expected results.jsonl in OUT, which `mammut-train ablate` writes")
    budgets = sorted({(each.steps, each.pictures) for each in results})
    if len(budgets) > 1:
        raise InputError(f"runs of several budgets (steps, pictures): {budgets}; they cannot be compared")
    steps, pictures = budgets[0]
    seeds = sorted({each.seed for each in results})
    minutes = sum(each.train_s for each in results) / 60
    head = (
        f"{len(results)} runs of {steps} steps and {pictures:,} pictures each, seeds {', '.join(map(str, seeds))}; "
        f"{minutes:.0f} minutes of training in all. Percent, with 95 % intervals over seeds."
    )
    parts = (head, _figures(results), "**The paper's directions**", _claims(results), "**Each row minus `both`**",
             _differences(results))  # fmt: skip
    return "\n\n".join(parts)


def check_page(page: Path) -> None:
    """What write_into would refuse, before there is anything to write. Errors as its."""
    _around(page)


def write_into(page: Path, text: str) -> None:
    """Put the tables between the page's BEGIN and END lines; a page that is not there is begun.

    Raises:
        InputError: the page has no such lines, or cannot be written.
    """
    before, after = _around(page)
    try:
        page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{page}: cannot be written ({error})") from error


def _around(page: Path) -> tuple[str, str]:
    """What stands before and after the tables."""
    if not page.parent.is_dir():
        raise InputError(f"{page}: cannot be written; {page.parent} is not a folder")
    try:
        old = page.read_text(encoding="utf-8") if page.exists() else f"{BEGIN}\n{END}\n"
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{page}: cannot be read ({error})") from error
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"{page}: expected the lines {BEGIN} and {END}, between which the tables are put")
    return before, after


def _figures(results: Sequence[Result]) -> str:
    larger = f"matching at {LARGER} x the size"
    lines = [_line(["row", "differs in", *COLUMNS.values(), larger]), _line(["---"] * (len(COLUMNS) + 3))]
    for row in _present(results):
        cells = [_cell(estimate(results, row, [name])) for name in COLUMNS]
        cells.append(_cell(estimate(results, row, GROUPS["matching, larger"])))
        lines.append(_line([f"`{row}`", rows()[row].says if row in rows() else "", *cells]))
    return "\n".join(lines)


def _claims(results: Sequence[Result]) -> str:
    lines = [_line(["the paper", "its figures", "here, difference in points", "judged by", ""]), _line(["---"] * 5)]
    for claim in CLAIMS:
        found = difference(results, claim.row, claim.other, GROUPS[claim.group])
        judged = "not run" if found is None else f"**{verdict(claim.expects, found)}**"
        here = _cell(found, signed=True) if found is None else f"`{claim.row}` - `{claim.other}`: {found.points(True)}"
        lines.append(_line([claim.says, claim.paper, here, claim.group, judged]))
    return "\n".join(lines)


def _differences(results: Sequence[Result]) -> str:
    lines = [_line(["row", *GROUPS]), _line(["---"] * (len(GROUPS) + 1))]
    for row in _present(results):
        if row != "both":
            cells = [_cell(difference(results, row, "both", figures), signed=True) for figures in GROUPS.values()]
            lines.append(_line([f"`{row}`", *cells]))
    return "\n".join(lines)


def _present(results: Sequence[Result]) -> list[str]:
    """Names of the rows with results, in the order of rows()."""
    names = {each.row for each in results}
    return [*(name for name in rows() if name in names), *sorted(names - rows().keys())]


def _by_seed(results: Sequence[Result], row: str, figures: Sequence[str]) -> dict[int, float]:
    own = [each for each in results if each.row == row and all(name in each.figures for name in figures)]
    return {each.seed: mean(each.figures[name] for name in figures) for each in own}


def _cell(found: Estimate | None, signed: bool = False) -> str:
    return "-" if found is None else found.points(signed)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
