"""mammut-run verify and doctor: is this bundle whole, does it compute here what it should, what is this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import click

from mammut_runtime import console
from mammut_runtime.commands_inputs import BUNDLE_VARIABLE, DEFAULT_BUNDLE, ModelSettings, json_option, model_options
from mammut_runtime.doctor import bundle_bytes, describe, drift_warnings, examine, find_bundles
from mammut_runtime.engines import EngineOptions


@click.command()
@click.argument("folder", required=False, type=click.Path(path_type=Path), metavar="[BUNDLE]")
@json_option
@model_options
def verify(settings: ModelSettings, folder: Path | None, as_json: bool) -> None:
    """Check a bundle's files and replay its canary.

    Exit code 0: whole, and computes here what it did where it was exported. 1: computes something else. 2: damaged.
    """
    if folder is not None:
        settings = ModelSettings(folder, settings.engine, settings.preprocess)
    with settings.load() as model:
        result = model.replay_canary()
        manifest = model.manifest
    warnings = drift_warnings(manifest)
    size = bundle_bytes(settings.bundle)
    if as_json:
        console.echo_json(
            {
                "bundle": str(settings.bundle),
                "model": manifest.model.name,
                "target": manifest.target,
                "precision": manifest.precision,
                "files": len(manifest.files),
                "size_bytes": size,
                "worst_error": result.worst_error,
                "message": result.message,
                "warnings": list(warnings),
            }
        )
        return
    click.echo(
        f"{settings.bundle}: {manifest.model.name}, {manifest.target}, {manifest.precision}: "
        f"{len(manifest.files)} files, {size / 1e6:.1f} MB, all as the manifest says"
    )
    click.echo(result.message)
    for warning in warnings:
        console.note(f"warning: {warning}")


@click.command()
@click.argument("bundles", nargs=-1, type=click.Path(path_type=Path), metavar="[BUNDLES]...")
@click.option("--bundle", "more", multiple=True, type=click.Path(path_type=Path), help="The same as BUNDLES.")
@click.option("--threads", type=int, default=0, help="Threads per graph; 0 takes the physical cores. Default: 0.")
@click.option("--engine", help="onnxruntime runs bundles of every target. Default: the bundle's own.")
@json_option
def doctor(bundles: Sequence[Path], more: Sequence[Path], threads: int, engine: str | None, as_json: bool) -> int:
    """Report what this machine has and whether bundles work.

    Versions, engines, processor, memory; and for each bundle whether it computes here what it should.

    BUNDLES are bundles or folders that hold bundles. Default: the variable MAMMUT_BUNDLE, and build/demo-bundle.
    Exit code 0: all well. 1: a canary does not reproduce. 2: a library or a bundle cannot be used.
    """
    places = [*bundles, *more]
    if not places:
        installed = [Path(each) for each in (os.environ.get(BUNDLE_VARIABLE),) if each]
        places = installed + [DEFAULT_BUNDLE] * DEFAULT_BUNDLE.exists()
    report = examine(find_bundles(places), EngineOptions(threads=threads, engine=engine))
    if as_json:
        console.echo_json(report.to_dict())
    else:
        for line in describe(report):
            click.echo(console.printable(line))
    return report.exit_code
