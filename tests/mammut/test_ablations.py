"""The ablation: rows that differ where they should and only there, resumed runs, intervals, verdicts, the page."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from mammut import presets
from mammut.commands import cli
from mammut.config import MammutConfig
from mammut.demo import ablation_measures, recipe
from mammut.demo.ablation_table import (
    BEGIN,
    CLAIMS,
    COLUMNS,
    END,
    GROUPS,
    Estimate,
    difference,
    estimate,
    markdown,
    verdict,
    write_into,
)
from mammut.demo.ablations import (
    RESULTS,
    Prepared,
    Result,
    chosen,
    keep_result,
    options_digest,
    prepare,
    read_results,
    rows,
    run_of,
    run_rows,
    setup_digest,
)
from mammut_runtime import console
from mammut_runtime.errors import CheckpointError, InputError
from mammut_runtime.strict import to_dict

STEPS, BATCH = 2, 12


def picture(suffix: str, shade: int) -> bytes:
    """Of coarse noise: plain ones would all be taken for the same photograph."""
    blocks = np.random.default_rng(shade).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return bytes(cv2.imencode(suffix, cv2.resize(blocks, (34, 30), interpolation=cv2.INTER_NEAREST))[1])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the demo recipe's form with a few generated pictures of each kind."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("pairs", "emoji", "easy-vqa/train/images", "easy-vqa/test/images"):
        (folder / name).mkdir(parents=True)
    split = ("train", "train", "val")
    tar(folder / "pairs" / "flowers-000.tar",
        [{"label": list(recipe.FLOWERS)[n % 5], "split": split[n % 3], "flickr_id": f"{n}"}
         for n in range(30)])  # fmt: skip
    tar(folder / "pairs" / "clothing-000.tar",
        [{"label": list(recipe.CLOTHING)[n % 17], "split": split[n % 3]} for n in range(51)])  # fmt: skip
    tar(folder / "pairs" / "photos-000.tar", [{"caption": f"A thing number {n}.", "credit": ""} for n in range(40)])
    (folder / "emoji" / "names.tsv").write_text("vendor\tfile\tname\tgroup\tsubgroup\n")
    for part in ("train", "test"):
        asked = [[f"what is the {colour} shape?", "circle", n] for n, colour in enumerate(("red", "blue", "teal"))]
        (folder / "easy-vqa" / part / "questions.json").write_text(json.dumps(asked))
        for n in range(3):
            (folder / "easy-vqa" / part / "images" / f"{n}.png").write_bytes(picture(".png", 60 * n))
    return folder


def tar(path: Path, table: list[dict[str, Any]]) -> None:
    import io
    import tarfile

    with tarfile.open(path, "w") as file:
        for number, row in enumerate(table):
            for suffix, content in (("jpg", picture(".jpg", 5 * number)), ("json", json.dumps(row).encode())):
                member = tarfile.TarInfo(f"{path.stem}-{number}.{suffix}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def prepared(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(data, tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def held(data: Path) -> ablation_measures.HeldOut:
    return ablation_measures.held_out(data)


def finished(names: str, prepared: Prepared, held: ablation_measures.HeldOut, out: Path, **given: Any) -> list[Result]:
    out.mkdir(exist_ok=True)
    options = {"seeds": 1, "steps": STEPS, "batch": BATCH} | given
    return list(run_rows(chosen(names), prepared, held, out, **options))


def weights(out: Path, run: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = load_file(out / "runs" / run / "checkpoint" / "model.safetensors")
    return found


# --- rows ----------------------------------------------------------------------------------------------------


def test_each_row_changes_one_thing(prepared: Prepared) -> None:
    from mammut.training.run_config import differences

    runs = {name: to_dict(run_of(row, prepared, 10, 0)) for name, row in rows().items()}
    changed = {name: set(differences(runs["both"], run)) for name, run in runs.items()}
    start = {"model.logit_scale_init", "model.logit_bias_init"}
    assert changed == {
        "both": set(),
        "contrastive": {"objective.caption_weight"},
        "caption": {"objective.contrastive_weight"},
        "causal": {"model.text.contrastive_mask"},
        "focal": {"model.contrastive"} | start,
        "focal-plain": {"model.contrastive", "model.logit_scale_init"},
        "cropped": {"stages"},
        "cross-1": {"model.text.cross_after"},
        "cross-4": {"model.text.cross_after"},
    }


def test_an_unknown_row_is_named() -> None:
    assert [row.name for row in chosen("focal, causal,focal")] == ["focal", "causal"]
    assert [row.name for row in chosen("")] == list(rows())
    with pytest.raises(InputError, match=r"--rows: unknown row 'focul'; expected some of both, contrastive"):
        chosen("focul")


def test_a_row_again_gives_the_same_and_another_differs(
    prepared: Prepared, held: ablation_measures.HeldOut, tmp_path: Path
) -> None:
    one, other = (finished("both", prepared, held, tmp_path / name)[0] for name in "ab")
    assert dataclasses.replace(one, train_s=0) == dataclasses.replace(other, train_s=0)
    first, second = (weights(tmp_path / name, "both-0") for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
    # Control: any other row, or another seed, ends elsewhere.
    causal = finished("causal", prepared, held, tmp_path / "a")[0]
    assert causal.setup != one.setup
    moved = weights(tmp_path / "a", "causal-0")
    assert moved.keys() == first.keys() and not torch.equal(moved["text.positions"], first["text.positions"])
    finished("both", prepared, held, tmp_path / "b", seeds=2)
    assert not torch.equal(weights(tmp_path / "b", "both-1")["text.positions"], first["text.positions"])


def test_only_what_was_trained_is_measured(prepared: Prepared, held: ablation_measures.HeldOut, tmp_path: Path) -> None:
    both, matching, writing = finished("both,contrastive,caption", prepared, held, tmp_path)
    assert set(both.figures) == {name for group in GROUPS.values() for name in group} | {
        "photos_r1",
        "photos_r1@larger",
        *(f"{kind}_caption" for kind in ("flowers", "clothing", "shapes")),
    }
    assert set(matching.figures) == {
        name for name in both.figures if not name.endswith(("caption", "named", "questions"))
    }
    assert set(writing.figures) == {
        *(f"{kind}_{measure}" for kind in ("flowers", "clothing", "shapes") for measure in ("named", "caption")),
        "questions",
    }
    assert all(0 <= value <= 1 for value in both.figures.values())


# --- kept results --------------------------------------------------------------------------------------------


def test_a_finished_run_is_kept_and_a_stopped_one_made_again(
    prepared: Prepared, held: ablation_measures.HeldOut, tmp_path: Path
) -> None:
    made = finished("caption,focal-plain", prepared, held, tmp_path)
    lines = (tmp_path / RESULTS).read_text().splitlines()
    (tmp_path / RESULTS).write_text(lines[0] + "\n" + lines[1][:40])  # as if killed while writing
    assert read_results(tmp_path) == made[:1]
    kept = tmp_path / "runs" / "caption-0" / "checkpoint" / "model.safetensors"
    before = kept.stat().st_mtime_ns
    again = finished("caption,focal-plain", prepared, held, tmp_path)
    assert kept.stat().st_mtime_ns == before and again[0] == made[0]
    assert again[1].figures == made[1].figures
    assert read_results(tmp_path) == again


def test_what_is_there_can_be_measured_again(
    prepared: Prepared, held: ablation_measures.HeldOut, tmp_path: Path
) -> None:
    made = finished("both,caption", prepared, held, tmp_path)
    keep_result(tmp_path, dataclasses.replace(made[0], figures={"questions": 0.123}))
    assert finished("both,caption", prepared, held, tmp_path)[0].figures == {"questions": 0.123}  # control
    assert finished("both,caption", prepared, held, tmp_path, measure_again=True) == made == read_results(tmp_path)


def test_results_of_another_setup_are_refused(
    prepared: Prepared, held: ablation_measures.HeldOut, tmp_path: Path
) -> None:
    finished("caption", prepared, held, tmp_path)
    finished("caption", prepared, held, tmp_path)  # control
    with pytest.raises(InputError, match=r"has row 'caption', seed 0, of another setup \(2 steps, 24 pictures; now 4"):
        finished("caption", prepared, held, tmp_path, steps=4)


def test_results_of_other_options_are_refused_and_older_ones_taken(
    prepared: Prepared, held: ablation_measures.HeldOut, tmp_path: Path
) -> None:
    (made,) = finished("caption", prepared, held, tmp_path)
    assert made.options and finished("caption", prepared, held, tmp_path) == [made]  # control
    keep_result(tmp_path, dataclasses.replace(made, options=""))
    assert "options" not in (tmp_path / RESULTS).read_text()  # a line as it was before
    assert finished("caption", prepared, held, tmp_path)[0].setup == made.setup
    keep_result(tmp_path, dataclasses.replace(made, options="0" * 16))
    with pytest.raises(InputError, match="of another setup"):
        finished("caption", prepared, held, tmp_path)


def test_the_digest_of_options_tells_training_apart_and_not_folders(prepared: Prepared, tmp_path: Path) -> None:
    config = run_of(rows()["both"], prepared, 10, 0)
    sources = tuple(dataclasses.replace(source, files=("elsewhere.tar",)) for source in prepared.sources)
    moved = run_of(rows()["both"], dataclasses.replace(prepared, sources=sources), 10, 0)
    assert options_digest(moved) == options_digest(config)
    optimizer = dataclasses.replace(config.optimizer, weight_decay=0.123)
    data = dataclasses.replace(config.data, margin=1.5)
    for other in (dataclasses.replace(config, optimizer=optimizer), dataclasses.replace(config, data=data)):
        assert options_digest(other) != options_digest(config)
        assert setup_digest(other, prepared) == setup_digest(config, prepared)  # what it is for


def test_rows_of_a_seed_start_alike_but_for_other_numbers_of_cross_blocks(prepared: Prepared) -> None:
    from mammut.training.loop import starting_point

    def start(row: str) -> torch.Tensor:
        model = starting_point(run_of(rows()[row], prepared, 10, 0))[1]
        return model.get_parameter("vision.blocks.0.mlp.up.weight")

    assert all(torch.equal(start("both"), start(row)) for row in ("causal", "focal", "cropped"))
    assert not any(torch.equal(start("both"), start(row)) for row in ("cross-1", "cross-4"))


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    for seed in range(2):
        keep_result(tmp_path, made_up("both", seed, 0.5))
    assert len(read_results(tmp_path)) == 2  # control
    path = tmp_path / RESULTS
    path.write_text("[1]\n" + path.read_text())
    with pytest.raises(InputError, match=r"results.jsonl: line 1 is not one of ours"):
        read_results(tmp_path)


# --- intervals and verdicts ----------------------------------------------------------------------------------


def made_up(row: str, seed: int, value: float, steps: int = 3) -> Result:
    figures = {name: value for name in (*COLUMNS, *(name for group in GROUPS.values() for name in group))}
    return Result(row, seed, steps, 36, "0" * 16, 60.0, figures)


def test_intervals_are_students() -> None:
    found = Estimate.of([0.1, 0.2, 0.3])
    assert found.mean == pytest.approx(0.2)
    assert found.half == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert found.points() == "20.0 ± 24.8" and found.points(signed=True) == "+20.0 ± 24.8"
    assert Estimate.of([0.5]).points() == "50.0"


def test_differences_are_paired_by_seed() -> None:
    """Seeds differ a lot, rows of a seed always by 0.1: the difference is sure, the means are not."""
    results = [made_up("both", seed, base) for seed, base in enumerate((0.2, 0.5, 0.8))]
    results += [made_up("focal", seed, base + 0.1) for seed, base in enumerate((0.2, 0.5, 0.8))]
    found, alone = difference(results, "focal", "both", ["questions"]), estimate(results, "both", ["questions"])
    assert found is not None and alone is not None
    assert found.mean == pytest.approx(0.1) and found.half == pytest.approx(0, abs=1e-9) and alone.half > 0.5
    assert difference(results, "focal", "causal", ["questions"]) is None
    assert difference([*results, made_up("causal", 7, 0.1)], "causal", "both", ["questions"]) is None


@pytest.mark.parametrize(
    ("expects", "mean", "half", "said"),
    [
        ("higher", 0.05, 0.04, "holds"),
        ("higher", -0.05, 0.04, "does not hold"),
        ("higher", 0.05, 0.06, "not distinguishable"),
        ("higher", 0.05, math.inf, "too few seeds"),
        ("equal", 0.005, 0.01, "holds"),
        ("equal", 0.005, 0.03, "not distinguishable"),
        ("equal", 0.05, 0.04, "does not hold"),
        ("equal", -0.05, 0.02, "does not hold"),
    ],
)
def test_verdicts(expects: Any, mean: float, half: float, said: str) -> None:
    assert verdict(expects, Estimate(mean, half)) == said


def test_claims_name_rows_and_groups_that_exist() -> None:
    for claim in CLAIMS:
        assert {claim.row, claim.other} <= rows().keys() and claim.group in GROUPS


# --- the page ------------------------------------------------------------------------------------------------


def test_tables(tmp_path: Path) -> None:
    results = [made_up("both", seed, 0.5 + 0.01 * seed) for seed in range(3)]
    results += [made_up("causal", seed, 0.4 + 0.01 * seed) for seed in range(3)]
    text = markdown(results)
    assert "6 runs of 3 steps and 36 pictures each, seeds 0, 1, 2; 6 minutes" in text
    assert "| `both` - `causal`: +10.0 ± 0.0 | matching | **holds** |" in text
    assert "| `causal` | -10.0 ± 0.0 | -10.0 ± 0.0 | -10.0 ± 0.0 | -10.0 ± 0.0 |" in text
    assert "| the focal loss matches better than InfoNCE |" in text and "| not run |" in text
    with pytest.raises(InputError, match="runs of several budgets"):
        markdown([*results, made_up("both", 3, 0.5, steps=4)])
    with pytest.raises(InputError, match="no finished runs"):
        markdown([])


def test_the_page_keeps_what_is_around_the_tables(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    write_into(page, "new")
    write_into(page, "newer")
    assert page.read_text() == f"# Title\n\n{BEGIN}\nnewer\n{END}\n\nafter\n"
    write_into(tmp_path / "other.md", "new")
    assert (tmp_path / "other.md").read_text() == f"{BEGIN}\nnew\n{END}\n"
    page.write_text("no such lines")
    with pytest.raises(InputError, match=r"page.md: expected the lines <!-- ablate: begin -->"):
        write_into(page, "new")


def test_the_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page = tmp_path / "out", tmp_path / "page.md"
    arguments = ["ablate", str(data), str(out), "--rows", "caption", "--seeds", "1", "--steps", "1", "--nice", "0"]
    assert console.run(cli, [*arguments, "--write", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "1 runs of 1 steps and 48 pictures each" in printed and printed.strip() in page.read_text()
    assert console.run(cli, ["ablate", str(data), str(out), "--collect"]) == 0  # all rows wanted, none trained
    assert capsys.readouterr().out == printed
    assert console.run(cli, ["ablate", str(data), str(tmp_path / "none"), "--collect"]) == 2
    assert "no finished runs" in capsys.readouterr().err
    page.write_text("no such lines")
    untouched = tmp_path / "untouched"
    assert console.run(cli, ["ablate", str(data), str(untouched), *arguments[3:], "--write", str(page)]) == 2
    assert "expected the lines <!-- ablate: begin -->" in capsys.readouterr().err and not untouched.exists()
    assert console.run(cli, ["ablate", str(tmp_path), str(out)]) == 2
    assert "expected the data folder of the demo recipe" in capsys.readouterr().err


# --- recall, and the field that one row needs ----------------------------------------------------------------


def test_recall_counts_ties_against_and_several_right_ones_for_a_row() -> None:
    scores = torch.tensor([[0.9, 0.9, 0.1], [0.2, 0.8, 0.7], [0.5, 0.4, 0.3]])
    right = torch.eye(3, dtype=torch.bool)
    assert ablation_measures._recall(scores, right, 1) == pytest.approx(1 / 3)
    assert ablation_measures._recall(scores, right, 2) == pytest.approx(2 / 3)
    right[0, 1] = True  # both say it
    assert ablation_measures._recall(scores, right, 1) == pytest.approx(2 / 3)


def test_named_ranks_names_by_what_the_caption_pass_gives_them(
    prepared: Prepared, held: ablation_measures.HeldOut, tmp_path: Path
) -> None:
    from mammut.checkpoint import load_checkpoint
    from mammut.demo.evaluate import Judge

    finished("caption", prepared, held, tmp_path)
    judge = Judge(load_checkpoint(str(tmp_path / "runs" / "caption-0" / "checkpoint")))
    pairs = held.pairs["clothing"]
    tokens, _ = judge.see(pairs)
    names, right = sorted({pair.captions[0] for pair in pairs}), 0
    for each, pair in zip(tokens, pairs, strict=True):
        chances = []
        for name in names:
            ids = torch.from_numpy(judge.checkpoint.tokenizer.tokenize([name], 20))
            targets = ids[:, 1:].masked_fill(ids[:, 1:] == judge.model.text.pad_id, -100)
            logits = judge.model.caption_logits(each[None], ids[:, :-1])
            chances.append(-float(torch.nn.functional.cross_entropy(logits[0], targets[0], reduction="sum")))
        right += names[max(range(len(names)), key=chances.__getitem__)] == pair.captions[0]
    assert ablation_measures._named(judge, tokens, pairs) == pytest.approx(right / len(pairs))


def test_configs_from_before_the_field_are_bidirectional() -> None:
    config = presets.tiny()
    plain = config.to_dict()
    assert "contrastive_mask" not in plain["text"] and MammutConfig.from_dict(plain) == config
    causal = dataclasses.replace(config, text=dataclasses.replace(config.text, contrastive_mask="causal"))
    assert MammutConfig.from_dict(causal.to_dict()) == causal
    plain["text"]["contrastive_mask"] = "both"
    with pytest.raises(CheckpointError, match=r"text.contrastive_mask: expected one of 'bidirectional', 'causal'"):
        MammutConfig.from_dict(plain)


def last_changed(mask: str, mask_pads: bool, ids: torch.Tensor) -> Sequence[bool]:
    """Which positions of the contrastive pass notice that the last real token is another."""
    from mammut.text import TextDecoder

    torch.manual_seed(0)
    config = dataclasses.replace(presets.tiny().text, contrastive_mask=mask, mask_pads=mask_pads)  # type: ignore[arg-type]
    text = TextDecoder(config, pad_id=0, activation="gelu").eval()
    for parameter in text.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    seen: list[torch.Tensor] = []
    text.final_norm.register_forward_hook(lambda module, given, out: seen.append(out))
    other = ids.clone()
    other[:, 3] = 11
    text.contrastive(ids), text.contrastive(other)
    return [not torch.allclose(seen[0][:, at], seen[1][:, at], atol=1e-5) for at in range(ids.shape[1])]


@pytest.mark.parametrize("mask_pads", [True, False])
def test_a_causal_text_pass_does_not_look_ahead(mask_pads: bool) -> None:
    ids = torch.tensor([[1, 5, 9, 2], [1, 7, 3, 2]])
    assert last_changed("causal", mask_pads, ids) == [False, False, False, True]
    assert last_changed("bidirectional", mask_pads, ids) == [True] * 4  # control


def test_a_causal_text_pass_ignores_padding() -> None:
    config = dataclasses.replace(presets.tiny().text, contrastive_mask="causal")
    from mammut.text import TextDecoder

    torch.manual_seed(0)
    text = TextDecoder(config, pad_id=0, activation="gelu").eval()
    ids = torch.tensor([[1, 5, 9, 2]])
    padded = torch.nn.functional.pad(ids, (0, 3))
    torch.testing.assert_close(text.contrastive(ids), text.contrastive(padded), atol=1e-6, rtol=1e-5)
