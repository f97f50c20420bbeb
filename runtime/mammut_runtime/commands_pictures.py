"""mammut-run caption, ask and match: pictures in, one result for each."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
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
from mammut_runtime.generation_openmammut import OpenMammutOptions
from mammut_runtime.model import Model
from mammut_runtime.results import Matches

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
@click.option("--stream", is_flag=True, help="Print the words as they are chosen (greedy or sampled).")
@click.option("--openmammut-rules", is_flag=True, help="Generate by the rules of the public openMaMMUT code.")
@model_options
def caption(
    settings: ModelSettings,
    pictures: Sequence[str],
    options: CaptionOptions,
    prompt: str | None,
    stream: bool,
    openmammut_rules: bool,
    batch_size: int,
    annotate_in: Path | None,
    as_json: bool,
) -> int:
    """Say what is in pictures.

    PICTURES are files, folders (with their subfolders), or - for a list of files on standard input, one a line.
    """
    options = dataclasses.replace(options, prompt=prompt)
    if openmammut_rules and options != CaptionOptions():
        raise InputError("--openmammut-rules has its own settings; leave out the other options of generation")
    if stream and (as_json or openmammut_rules):
        raise InputError("--stream shows words as they come; it does not go with --json or --openmammut-rules")
    with settings.load() as model:
        run = PictureRun(model, pictures, "captions", as_json, annotate_in)
        if stream:
            return _stream(run, options)
        rules = _openmammut_rules(model) if openmammut_rules else options
        with run.progress:
            for shown in run.shown(batch_size):
                for each, found in zip(shown, model.caption_batch([one.seen for one in shown], rules), strict=True):
                    run.line(each, found.to_dict(), found.text)
                    run.finish(each, [found.text])
        return run.exit_code()


def _openmammut_rules(model: Model) -> OpenMammutOptions:
    """The public code's own settings; its length is cut to a decoder that holds less."""
    room = model.manifest.text.context_length
    return OpenMammutOptions(seq_len=min(OpenMammutOptions().seq_len, room), max_seq_len=room)


def _stream(run: PictureRun, options: CaptionOptions) -> int:
    for shown in run.shown(1):
        for each in shown:
            click.echo(console.printable(f"{each.path}: "), nl=False)
            text = ""
            for piece in each.seen.caption_stream(options):
                click.echo(console.printable(piece), nl=False)
                sys.stdout.flush()
                text += piece
            click.echo()
            run.finish(each, [text])
    return run.exit_code()


@click.command()
@picture_options
@click.option("--question", "questions", multiple=True, required=True, help="What to ask; repeat for more questions.")
@click.option("--candidates", help="Possible answers, separated by commas, or @FILE with one a line.")
@click.option("--per-token", is_flag=True, help="Compare candidates by their mean log-likelihood per token.")
@generation_options
@model_options
def ask(
    settings: ModelSettings,
    pictures: Sequence[str],
    questions: Sequence[str],
    candidates: str | None,
    per_token: bool,
    options: CaptionOptions,
    batch_size: int,
    annotate_in: Path | None,
    as_json: bool,
) -> int:
    """Answer questions about pictures.

    Freely, or with the likeliest of given --candidates.

    PICTURES are files, folders (with their subfolders), or - for a list of files on standard input, one a line.
    """
    choices = None if candidates is None else text_list(candidates, "--candidates")
    if choices is not None and options != CaptionOptions():
        raise InputError("the options of generation are for free answers; leave them out with --candidates")
    if choices is None and per_token:
        raise InputError("--per-token compares candidates; give --candidates")
    with settings.load() as model:
        run = PictureRun(model, pictures, "answers", as_json, annotate_in)
        with run.progress:
            for each in itertools.chain.from_iterable(run.shown(batch_size)):
                annotation = []
                for question in questions:
                    answer = each.seen.ask(question, choices, options if choices is None else None, normalise=per_token)
                    text = answer.text
                    if answer.candidates:
                        text += f" ({answer.candidates[0].probability:.2f})"
                    asked = f"{question} " if len(questions) > 1 else ""
                    run.line(each, answer.to_dict(), f"{asked}{text}")
                    annotation.append(f"{question} {text}")
                run.finish(each, annotation)
        return run.exit_code()


@click.command()
@picture_options
@click.option("--texts", help="Texts to compare as they are, separated by commas, or @FILE with one a line.")
@click.option("--classes", help="Names to put into prompt templates, in the same form.")
@click.option("--negatives", help='Texts or names that stand for "none of these", in the same form.')
@click.option("--templates", help="Prompts for --classes, each with {} for the name. Default: the bundle's own.")
@click.option("--top", type=click.IntRange(1), default=5, help="Matches that are printed; --json has all. Default: 5.")
@model_options
def match(
    settings: ModelSettings,
    pictures: Sequence[str],
    texts: str | None,
    classes: str | None,
    negatives: str | None,
    templates: str | None,
    top: int,
    batch_size: int,
    annotate_in: Path | None,
    as_json: bool,
) -> int:
    """Say how well texts fit pictures, best first.

    PICTURES are files, folders (with their subfolders), or - for a list of files on standard input, one a line.
    """
    if (texts is None) == (classes is None):
        raise InputError("give either --texts (compared as they are) or --classes (put into prompt templates)")
    if texts is not None and templates is not None:
        raise InputError("--templates are for --classes; --texts are compared as they are")
    names = text_list(texts, "--texts") if texts is not None else text_list(classes or "", "--classes")
    others = text_list(negatives, "--negatives") if negatives is not None else []
    with settings.load() as model:
        forms = None if texts is not None else text_list(templates, "--templates") if templates else model.templates
        run = PictureRun(model, pictures, "matches", as_json, annotate_in)
        with run.progress:
            for each in itertools.chain.from_iterable(run.shown(batch_size)):
                matches = each.seen.match(names, others, forms)
                text = match_line(matches, top)
                run.line(each, matches.to_dict(), text)
                run.finish(each, text.split(", "))
        return run.exit_code()


def match_line(matches: Matches, top: int) -> str:
    """The best matches with their probabilities, e.g. `a cat 0.93, a dog 0.05`; a winning negative stands in front."""
    best = ", ".join(f"{each.text} {each.probability:.2f}" for each in matches.matches[:top])
    if matches.best is not None:
        return best
    return f"none of these ({matches.negatives[0].text} {matches.negatives[0].probability:.2f}), {best}"
