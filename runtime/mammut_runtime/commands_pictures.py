"""mammut-run caption, ask and match: pictures in, one result for each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from mammut_runtime import console
from mammut_runtime.caption_options import CaptionOptions
from mammut_runtime.commands_inputs import (
    ModelSettings,
    PictureRun,
    model_options,
    picture_options,
    text_list,
)
from mammut_runtime.errors import InputError

Function = Callable[..., Any]


def generation_options(command: Function) -> Function:
    """Add the options of text generation; the command gets them as `options`, a CaptionOptions."""

    @click.option("--beams", type=int, help="Sequences searched side by side; 1 is greedy. Default: 3.")
    @click.option("--sample", is_flag=True, help="Draw tokens instead of searching.")
    @click.option("--temperature", type=float, help="Sampling: above 1 more varied, below more careful. Default: 1.")
    @click.option("--top-k", type=int, help="Sampling: only the K most probable tokens.")
    @click.option("--top-p", type=float, help="Sampling: only the most probable tokens that have this probability.")
    @click.option("--seed", type=int, help="Sampling: the same seed gives the same text.")
    @click.option("--min-tokens", type=int, default=0, help="Tokens before which the text may not end. Default: 0.")
    @click.option("--max-tokens", type=int, help="Most tokens, the end counted. Default: the bundle's.")
    @click.option("--length-penalty", type=float, default=1.0, help="Beams: above 1 prefers long texts. Default: 1.")
    @click.option("--repetition-penalty", type=float, default=1.0, help="Above 1 avoids repetition. Default: 1.")
    @functools.wraps(command)
    def with_options(
        *args: Any,
        beams: int | None,
        sample: bool,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
        seed: int | None,
        min_tokens: int,
        max_tokens: int | None,
        length_penalty: float,
        repetition_penalty: float,
        **rest: Any,
    ) -> Any:
        if sample and (temperature, top_k, top_p) == (None, None, None):
            temperature = 1.0
        options = CaptionOptions(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            beams=beams,
            length_penalty=length_penalty,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        if seed is not None and not options.sampled:
            raise InputError("--seed has a meaning for sampling only; add --sample or leave it out")
        return command(*args, options=options, **rest)

    return with_options


@click.command()
@picture_options
@generation_options
@click.option("--prompt", help="Text that the caption continues. Default: the bundle's own.")
@click.option("--stream", is_flag=True, help="Print tokens as they come (greedy or sampled).")
@model_options
def caption(
    settings: ModelSettings,
    pictures: Sequence[str],
    options: CaptionOptions,
    prompt: str | None,
    stream: bool,
    batch_size: int,
    annotate_in: Path | None,
    as_json: bool,
) -> int:
    """Say what is in pictures.

    PICTURES are files, folders (with their subfolders), or - for a list of files on standard input, one a line.
    """
    raise NotImplementedError
