"""The run's file: strict, changeable by name, and what a resumed run may differ in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mammut.training.run_config import RunConfig, changed, differences, mismatch
from mammut_runtime.errors import InputError
from mammut_runtime.strict import to_dict, to_json


def test_written_and_read_again(small_run: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(to_json(small_run.config))
    assert RunConfig.read(path) == small_run.config
    assert RunConfig.read(path, ["seed=3", "stages.0.schedule=cosine"]).stages[0].schedule == "cosine"


@pytest.mark.parametrize(
    "section", ["", "optimizer", "data", "objective", "parallel", "save", "model.text", "stages.0"]
)
def test_a_typo_is_refused_by_name(small_run: Any, section: str) -> None:
    data: Any = json.loads(to_json(small_run.config))
    at = data
    for key in filter(None, section.split(".")):
        at = at[int(key)] if key.isdigit() else at[key]
    name, value = next(iter(at.items()))
    at["typo_" + name] = value
    with pytest.raises(InputError, match=f"unknown key 'typo_{name}'"):
        RunConfig.from_dict(data, "run.json")
    del at["typo_" + name], at[name]
    with pytest.raises(InputError, match=f"missing key '{name}'"):
        RunConfig.from_dict(data, "run.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.margn=2", "no such key 'margn'; expected one of sources, question_share"),
        ("stages.3.steps=2", "no such key 3; expected one of 0"),
        ("optimizer", "expected KEY=VALUE"),
        ("seed.x=1", "no such key 'x'"),
    ],
)
def test_changes_name_what_they_cannot_find(small_run: Any, change: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        changed(to_dict(small_run.config), [change])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["stages=[]"], "stages: expected at least one"),
        (["stages.0.image_size=8"], "smaller than a patch"),
        (["data.question_share=1"], "questions are not matched"),
        (["data.sources=[]"], "sources: expected at least one"),
        (['stages.0.schedule="continued"'], "no stage before it"),
        (["optimizer.muon=20", 'parallel.strategy="fsdp"'], "needs whole matrices"),
        (["objective.contrastive_weight=0", "objective.caption_weight=0"], "both 0"),
        (['prompts={"caption": "", "ask": "hello"}'], 'expected "caption", and "ask"'),
        (['tokenizer=""'], "expected a tokenizer.json"),
        (["optimizer.beta1=1.5"], "expected a number from"),
        (['parallel.strategy="deepspeed"'], "expected one of 'ddp', 'fsdp'"),
        (["batch_size=1.5"], "expected a whole number"),
    ],
)
def test_what_does_not_go_together_is_refused(small_run: Any, changes: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        small_run.with_(*changes)


def test_batches_divide_or_are_refused(small_run: Any) -> None:
    assert small_run.with_("batch_size=24", "micro_batches=3").local_batch(4) == 2
    with pytest.raises(InputError, match="choose a multiple of 12"):
        small_run.with_("batch_size=20", "micro_batches=3").local_batch(4)


def test_stages_follow_one_another(small_run: Any) -> None:
    config = small_run.with_()
    stages = (config.stages[0], config.stages[0])
    both = RunConfig.from_dict({**to_dict(config), "stages": [to_dict(stage) for stage in stages]}, "config")
    assert both.steps == 12
    assert [both.stage_at(step)[0] for step in (0, 5, 6, 11)] == [0, 0, 1, 1]


def test_a_stage_may_continue_the_curve_of_the_one_before(small_run: Any) -> None:
    one = small_run.with_("stages.0.steps=12")
    plain = to_dict(small_run.with_().stages[0])
    stages = [plain, {**plain, "schedule": "continued", "learning_rate": 0.5}, {**plain, "learning_rate": 1e-4}]
    both = RunConfig.from_dict({**to_dict(one), "stages": stages}, "config")
    assert [both.rate_at(step) for step in range(12)] == [one.rate_at(step) for step in range(12)]
    assert [both.rate_at(step) for step in (12, 13)] == pytest.approx([5e-5, 1e-4])  # its own warm-up again


def test_only_saving_and_logging_may_differ_in_a_resumed_run(small_run: Any) -> None:
    config = small_run.config
    assert mismatch(config, small_run.with_("save.every_steps=99", "save.log_every=7")) == []
    assert mismatch(config, small_run.with_("model.vision.layers=1", "seed=4")) == ["model.vision.layers", "seed"]
    assert differences({"a": {"b": 1}}, {"a": {"c": 1}}) == ["a.b", "a.c"]
