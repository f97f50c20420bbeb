"""`mammut-train list-clips`: published sets of clips as training rows."""

from __future__ import annotations

from pathlib import Path

import click

from mammut_runtime import console

_FILE = click.Path(path_type=Path)


@click.command("list-clips")
@click.argument("kind", type=click.Choice(["msrvtt", "msvd", "questions"]))
@click.argument("annotations", type=_FILE)
@click.argument("folder", type=_FILE)
@click.argument("out", type=_FILE)
@click.option("--split", help="msrvtt: only this split of the file (train, validate, test).")
@click.option("--names", type=_FILE, help="Only the clips named in this text file, one a line.")
@click.option("--partial", is_flag=True, help="Leave out clips that are not in FOLDER, and list them.")
def list_clips(
    kind: str, annotations: Path, folder: Path, out: Path, split: str | None, names: Path | None, partial: bool
) -> None:
    """Write OUT.jsonl for `new video-caption` and `new video-ask` from the published files of MSRVTT (msrvtt), MSVD
    (msvd), MSRVTT-QA or MSVD-QA (questions), with the clips in FOLDER.

    OUT must lie in FOLDER or above it. A list of your own clips has the same form, one JSON object a line:
    {"clip": "a.mp4", "start_s": 1.5, "end_s": 4, "captions": ["..."], "questions": [["what?", "that"]]}
    """
    from mammut.data.published_clips import published_rows, write_rows
    from mammut.evaluation.examples import Problems

    problems = Problems(partial)
    rows = published_rows(kind, annotations, folder, problems, split=split, names=names)  # type: ignore[arg-type]
    write_rows(rows, folder, out)
    for line in problems.missing:
        console.note(f"left out: {line}")
    texts = sum(len(row["questions" if kind == "questions" else "captions"]) for row in rows)
    console.note(f"{out}: {len(rows):,} clips, {texts:,} {'questions' if kind == 'questions' else 'captions'}")
