"""mammut-run build: the engines of a bundle for TensorRT, made on this device, and the canary through them."""

from __future__ import annotations

from pathlib import Path

import click

from mammut_runtime import console
from mammut_runtime.bundle import Bundle
from mammut_runtime.commands_inputs import json_option
from mammut_runtime.engine_cache import EngineCache
from mammut_runtime.engines import EngineOptions
from mammut_runtime.engines.tensorrt_jobs import BuildOptions, BuildPlan, BuiltEngine, plan_build, run_plan
from mammut_runtime.model import Model

_USUAL = BuildOptions()


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="BUNDLE")
@click.option("--library", type=click.Choice(["tensorrt", "tensorrt_rtx"]), help="Default: the first that is there.")
@click.option("--gpu", type=int, default=0, help="Number of the GPU, as CUDA counts them. Default: 0.")
@click.option(
    "--engine-cache",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the engines; only for this user's use. Default: ~/.cache/mammut-edge/engines.",
)
@click.option(
    "--workspace-mib",
    type=int,
    default=_USUAL.workspace_mib,
    help=f"Most memory of the GPU for one layer's scratch space. Default: {_USUAL.workspace_mib}.",
)
@click.option(
    "--memory-mib",
    type=int,
    help="Most memory of the machine that a build may hold; it is ended above. Default: all but 256.",
)
@click.option(
    "--compute-capability",
    metavar="X.Y",
    help="Build for a GPU that is not here, such as 8.6, to see that the graphs build (tensorrt_rtx only).",
)
@click.option("--force", is_flag=True, help="Also build what is there already.")
@click.option("--dry-run", is_flag=True, help="Say what would be built, and build nothing.")
@json_option
def build(
    folder: Path,
    library: str | None,
    gpu: int,
    engine_cache: Path | None,
    workspace_mib: int,
    memory_mib: int | None,
    compute_capability: str | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Build the engines of a bundle for TensorRT on this device.

    One graph at a time, in a process of its own. What is done is kept, so an interrupted build goes on where it
    stopped. Afterwards the bundle's canary is replayed through the engines.

    Exit code 0: built, and computes what it should. 1: computes something else. 2: cannot be built here.
    """
    options = BuildOptions(library, gpu, compute_capability, workspace_mib, memory_mib, force)
    plan = plan_build(Bundle.open(folder), EngineCache(engine_cache), options)
    for problem in plan.refused:
        console.note(f"note: {problem}")
    if dry_run:
        _show(plan, [], None, as_json)
        return
    built = _built(plan, options)
    message = None
    if compute_capability is None:
        engines = EngineOptions(library=library, gpu=gpu, engine_cache=engine_cache)
        with Model.load(folder, engines, verify=False) as model:  # verified above
            message = model.replay_canary().message
    _show(plan, built, message, as_json)


def _built(plan: BuildPlan, options: BuildOptions) -> list[BuiltEngine]:
    order, begun = plan.graphs, list[str]()
    with console.Progress("engines", len(order)) as bar:

        def progress(graph: str, phase: str, seconds: float) -> None:
            if graph not in begun:
                begun.append(graph)
                bar.clear()
                console.note(f"building {graph} ({len(begun)} of {len(order)}); this may take minutes")
            bar(len(begun) - 1, note=f"{graph}: {phase} ({seconds:.0f} s)")

        return run_plan(plan, options, progress)


def _show(plan: BuildPlan, built: list[BuiltEngine], canary: str | None, as_json: bool) -> None:
    """built: empty where nothing was to be built."""
    if as_json:
        console.echo_json(
            {
                "bundle": str(plan.bundle.path),
                "library": plan.library.name,
                "library_version": plan.library.version,
                "gpu": plan.gpu.name,
                "compute_capability": plan.gpu.compute_capability,
                "cache": str(plan.cache.folder),
                "missing": plan.graphs if not built else [],
                "engines": [
                    {
                        "graph": each.graph,
                        "path": str(each.path),
                        "size_bytes": each.size_bytes,
                        "seconds": round(each.seconds, 1),
                    }
                    for each in built
                ],
                "canary": canary,
            }
        )
        return
    where = f"{plan.library.name} {plan.library.version}, {plan.gpu.name}, {plan.gpu.compute_capability}"
    click.echo(f"{plan.bundle.path}: {where}; engines in {plan.cache.folder}")
    for each in built:
        how = f"built in {each.seconds:.1f} s" if each.seconds else "was there"
        click.echo(f"{each.graph:<9} {how}, {each.size_bytes / 1e6:.1f} MB")
    if not built:
        click.echo(f"to build: {', '.join(plan.graphs) or 'nothing'}")
    if canary:
        click.echo(canary)
    elif built:
        console.note(f"note: not run: these engines are for compute capability {plan.gpu.compute_capability}, not here")
