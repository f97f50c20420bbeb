"""The command mammut-run: a thin shell over the runtime. One module for each group of subcommands."""

from __future__ import annotations

from collections.abc import Sequence

import click

from mammut_runtime import console
from mammut_runtime.commands_bench import bench
from mammut_runtime.commands_build import build
from mammut_runtime.commands_checks import doctor, verify
from mammut_runtime.commands_pictures import ask, caption, match
from mammut_runtime.commands_search import search
from mammut_runtime.detection.commands import detect
from mammut_runtime.detection.commands_vocabulary import vocabulary
from mammut_runtime.doctor import DISTRIBUTION
from mammut_runtime.video.commands import ask_video, caption_video, find_video


@click.group("mammut-run", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name=DISTRIBUTION, message="%(package)s %(version)s")
def cli() -> None:
    """Run a MaMMUT bundle on this device: caption pictures, ask about them, match and find them.

    Exit codes: 0 done; 1 numbers differ from what was promised; 2 the input, an option or a bundle cannot be used, or
    some pictures of many could not; 70 a bug (MAMMUT_DEBUG=1 shows where); 130 interrupted.
    """


for command in (caption, ask, match, detect, vocabulary, search, caption_video, ask_video, find_video):
    cli.add_command(command)
for command in (verify, bench, build, doctor):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point: runs the command line and returns the exit code."""
    return console.run(cli, arguments)
