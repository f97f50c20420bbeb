"""`mammut-train new`, `run` and `repeat`: runs that are described by a file, on one process or under torchrun."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mammut_runtime import console
from mammut_runtime.errors import InputError

if TYPE_CHECKING:
    from mammut.training.loop import Evaluate
    from mammut.training.memory_plan import MemoryPlan
    from mammut.training.run_config import RunConfig

set_option = click.option(
    "--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change the config: stages.0.steps=100. Repeatable."
)


def _running(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of the commands that train."""
    for option in (
        click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in OUT, if there is one."),
        click.option("--minutes", type=float, help="Stop after so long, with a checkpoint; go on with --resume."),
        click.option("--dry-run", is_flag=True, help="Print what a run needs on each device; train nothing."),
        click.option("--devices", type=click.IntRange(1), help="For --dry-run: how many. Default: torchrun's, or 1."),
        click.option("--device-memory-gb", type=float, default=80.0, show_default=True, help="For --dry-run."),
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
    ):
        command = option(command)
    return command


@click.command()
@click.argument("recipe", type=click.Choice(["pretrain", "caption", "ask", "retrieval", "video-caption", "video-ask"]))
@click.argument("data", nargs=-1, required=True)
@click.option("--model", help="pretrain: tiny, demo, paper-base, paper-huge, openmammut-B-32 ...")
@click.option("--tokenizer", help='pretrain: a tokenizer.json, or "clip".')
@click.option("--start", help="Fine-tuning: demo, a checkpoint folder or file, or hf-hub:ORG/NAME.")
@click.option("--image-size", type=int, help="Fine-tuning at another picture size, pixels.")
@click.option("--lora", is_flag=True, help="Fine-tuning: train low-rank products beside the frozen model.")
@set_option
def new(
    recipe: str,
    data: tuple[str, ...],
    model: str | None,
    tokenizer: str | None,
    start: str | None,
    image_size: int | None,
    lora: bool,
    changes: tuple[str, ...],
) -> None:
    """Print the config of a run, to be edited and given to `run`.

    DATA are WebDataset tars or JSON Lines files; braces name many: 'cc/{00000..00331}.tar'. For video-caption and
    video-ask they are JSON Lines files of clips; `list-clips` makes them from published sets.
    """
    from mammut.training.recipes import finetune, model_preset, pretrain
    from mammut.training.run_config import RunConfig, changed
    from mammut_runtime.strict import to_dict, to_json

    if recipe == "pretrain":
        if not model or not tokenizer or start or image_size or lora:
            raise InputError("new pretrain: expected --model and --tokenizer, and no --start, --image-size or --lora")
        size = _vocabulary(tokenizer) if model in ("tiny", "demo") else None
        config = pretrain(model_preset(model, size), data, tokenizer)
    else:
        if not start or model or tokenizer:
            raise InputError(f"new {recipe}: expected --start, without --model and --tokenizer")
        config = finetune(recipe, start, data, image_size=image_size, lora=lora)  # type: ignore[arg-type]
    config = RunConfig.from_dict(changed(to_dict(config), changes), "config")
    click.echo(to_json(config).decode(), nl=False)


@click.command("run")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@set_option
@_running
def run_command(config: Path, out: Path, changes: tuple[str, ...], **given: Any) -> int:
    """Train as the file CONFIG says (see `new`).

    OUT gets log.jsonl, the run's own checkpoints step-N/, and at the end checkpoint/. On several devices:
    torchrun --nproc-per-node 8 -m mammut.commands run CONFIG OUT
    """
    from mammut.training.run_config import RunConfig

    return start_run(RunConfig.read(config, changes), out, **given)


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@set_option
@_running
def repeat(checkpoint: Path, out: Path, changes: tuple[str, ...], **given: Any) -> int:
    """Train again, from the beginning, as the run that wrote CHECKPOINT: config, seeds and data are stored in it.

    `mammut-train --resume-config CHECKPOINT --out OUT` is the same. To go on where a run stopped: `run --resume`.
    """
    from mammut.training.loop import stored_config
    from mammut.training.run_config import RunConfig, changed
    from mammut_runtime.strict import to_dict

    config = RunConfig.from_dict(changed(to_dict(stored_config(checkpoint)), changes), str(checkpoint))
    return start_run(config, out, **given)


def start_run(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    minutes: float | None = None,
    evaluate: Evaluate | None = None,
    dry_run: bool = False,
    devices: int | None = None,
    device_memory_gb: float = 80.0,
    device: str = "auto",
) -> int:
    """Train, or plan; returns the exit code: 1 for a plan that does not fit."""
    if dry_run:
        return _plan(config, devices, device_memory_gb)
    from mammut.training.loop import train
    from mammut.training.parallel import joined

    if config.of_clips:
        from mammut_runtime.video.decode import quiet_decoder

        quiet_decoder()  # what is damaged is counted and named
    with joined(device) as place:  # type: ignore[arg-type]
        given: dict[str, Any] = {"resume": resume, "minutes": minutes, "evaluate": evaluate}
        folder = train(config, out, place, note=console.note, **given)
        if place.main:
            console.note(f"checkpoint: {folder}")
    return 0


def launch(arguments: list[str], processes: int, *, resume: bool, minutes: float | None) -> int:
    """Run `mammut-train ARGUMENTS` in several processes of this machine, by torchrun; returns the exit code."""
    import subprocess
    import sys

    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "mammut.commands"]
    more = ["--resume"] * resume + (["--minutes", str(minutes)] if minutes is not None else [])
    code = subprocess.run([sys.executable, "-m", *torchrun, *arguments, *more], check=False).returncode
    if code:
        console.note("a training process failed; its own message, above torchrun's, says why")
    return 2 if code else 0


def _plan(config: RunConfig, devices: int | None, device_memory_gb: float) -> int:
    import os

    from mammut.training.memory_plan import plan_memory

    plan = plan_memory(
        config.model,
        config.objective,
        config.parallel,
        devices=devices or int(os.environ.get("WORLD_SIZE", "1")),
        batch_size=config.batch_size,
        micro_batches=config.micro_batches,
        image_size=max(stage.image_size for stage in config.stages),
        frozen=config.optimizer.freeze,
        lora=config.lora,
        clips=config.of_clips,
    )
    click.echo(plan_text(plan, config, device_memory_gb))
    return 0 if plan.total_bytes <= device_memory_gb * 1e9 else 1


def plan_text(plan: MemoryPlan, config: RunConfig, device_memory_gb: float) -> str:
    """The plan as a small table, gigabytes (10^9 bytes) a device."""
    rows = {
        "parameters": plan.parameter_bytes,
        "gradients": plan.gradient_bytes,
        "optimizer state": plan.optimizer_bytes,
        "gathered by FSDP": plan.gathered_bytes,
        "activations": plan.activation_bytes,
        "total": plan.total_bytes,
    }
    part = f" in {config.micro_batches} micro-batches of {plan.local_batch}" if config.micro_batches > 1 else ""
    kept = "blocks recomputed" if config.parallel.recompute_blocks else "all activations kept"
    lines = [
        f"{config.model.name}: {plan.parameters / 1e6:,.1f} M parameters, {plan.trained / 1e6:,.1f} M trained",
        f"{plan.devices} devices, {plan.strategy}, {config.parallel.precision}, {kept}; batch {config.batch_size}, "
        f"{config.local_batch(plan.devices) * config.micro_batches} pictures a device{part}",
        *(f"{name:>18} {size / 1e9:9.3f} GB" for name, size in rows.items()),
    ]
    fits = plan.total_bytes <= device_memory_gb * 1e9
    verdict = "fits" if fits else "DOES NOT FIT: more devices, fsdp, recompute_blocks or more micro_batches help"
    return "\n".join([*lines, f"{verdict} in {device_memory_gb:g} GB (without what CUDA and NCCL take for themselves)"])


def _vocabulary(tokenizer: str) -> int:
    from mammut.training.loop import tokenizer_bytes
    from mammut_runtime.tokenizer import Tokenizer

    return Tokenizer.from_bytes(tokenizer_bytes(tokenizer)).vocab_size
