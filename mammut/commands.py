"""`mammut-train`: a thin shell over training/ and demo/. For `new` and `run` see commands_run.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mammut.commands_ablate import ablate
from mammut.commands_clips import clips_ablation, clips_eval
from mammut.commands_demo import demo, demo_data, demo_eval
from mammut.commands_detect import detect, detect_eval
from mammut.commands_run import launch, new, repeat, run_command, set_option, start_run
from mammut.commands_video import list_clips
from mammut_runtime import console

if TYPE_CHECKING:
    from mammut.training.loop import Evaluate
    from mammut.training.run_config import RunConfig


def _small(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of runs on one machine."""
    for option in (
        click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in OUT, if there is one."),
        click.option("--minutes", type=float, help="Stop after so long, with a checkpoint; go on with --resume."),
        click.option(
            "--processes", type=click.IntRange(1), default=1, show_default=True, help="One thread each if several."
        ),
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.option(
    "--resume-config",
    type=click.Path(path_type=Path),
    help="Instead of a command: short for `repeat CHECKPOINT OUT`. Begins anew; to go on, see `run --resume`.",
)
@click.option("--out", type=click.Path(path_type=Path), help="With --resume-config: gets the new run.")
@click.pass_context
def cli(context: click.Context, resume_config: Path | None, out: Path | None) -> int | None:
    """Train MaMMUT models on image-text pairs."""
    if context.invoked_subcommand:
        if resume_config or out:
            raise click.UsageError(f"--resume-config and --out go without a command, got {context.invoked_subcommand}")
        return None
    if resume_config is None:
        click.echo(context.get_help())
        return None
    if out is None:
        raise click.UsageError("--resume-config: expected --out with the folder of the new run")
    from mammut.training.loop import stored_config

    return start_run(stored_config(resume_config), out)


for _command in (
    ablate, clips_ablation, clips_eval, demo, demo_data, demo_eval, detect, detect_eval, list_clips, new, repeat,
    run_command,
):  # fmt: skip
    cli.add_command(_command)


@cli.command()
@click.argument("data", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--preset", default="demo", show_default=True, help="demo, tiny, paper-base, paper-huge, openmammut-B-32 ..."
)
@click.option("--init", help="Start from this checkpoint instead of a preset with random weights.")
@click.option("--steps", type=click.IntRange(1), default=2000, show_default=True, help="Length of the run.")
@click.option("--vocab-size", type=int, default=2048, show_default=True, help="Of the tokenizer trained on the texts.")
@_small
@set_option
def fit(
    data: tuple[Path, ...],
    out: Path,
    preset: str,
    init: str | None,
    steps: int,
    vocab_size: int,
    changes: tuple[str, ...],
    **given: Any,
) -> int:
    """Train on your own pairs: `new` and `run` in one, with what suits thousands of pictures.

    DATA are WebDataset tars (KEY.jpg with KEY.json or KEY.txt) or folders with a pairs.jsonl of {"file", "caption"}
    or {"file", "question", "answer"} lines. OUT gets tokenizer.json, config.json, and what `run` writes.
    """
    from mammut.training.recipes import fit_run
    from mammut.training.run_config import RunConfig, changed
    from mammut_runtime.strict import to_dict

    files = [str(path / "pairs.jsonl") if path.is_dir() else str(path) for path in data]
    config = fit_run(files, out, preset=preset, init=init, steps=steps, vocab_size=vocab_size)
    config = RunConfig.from_dict(changed(to_dict(config), changes), "config")
    return _train(config, out, ["run", str(out / "config.json"), str(out)], None, **given)


def _train(
    config: RunConfig, out: Path, again: list[str], evaluate: Evaluate | None, *, processes: int, **given: Any
) -> int:
    """Write OUT/config.json and train; several processes give themselves the command `again`."""
    from mammut.training.run_state import begun
    from mammut_runtime.strict import to_json

    begun(out, given["resume"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_bytes(to_json(config))
    if processes > 1:
        return launch(again, processes, **given)
    return start_run(config, out, evaluate=evaluate, **given)


def main() -> int:
    """The entry point of `mammut-train`."""
    return console.run(cli)


if __name__ == "__main__":  # torchrun -m mammut.commands
    sys.exit(main())
