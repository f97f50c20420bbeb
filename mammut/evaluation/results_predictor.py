"""Detections that somebody computed before, in COCO's results form, judged like a model's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mammut.detection.box_files import BoxFile
from mammut.detection.coco_results import Found, read_results
from mammut.evaluation.examples import Image
from mammut.evaluation.predictor import F32
from mammut_runtime.errors import InputError


class ResultsPredictor:
    """A file of results in a model's place. It knows its boxes by the pictures' ids and can do nothing else."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise InputError(f"--results {path}: no such file; expected a JSON list of detections")
        self._path = path

    @property
    def name(self) -> str:
        return f"{self._path.name} (results)"

    @property
    def templates(self) -> tuple[str, ...]:
        return ()

    @property
    def facts(self) -> dict[str, str]:
        return {"kind": "results", "spec": str(self._path)}

    def found_in(self, file: BoxFile, whole: BoxFile) -> list[Found]:
        """What was found in each picture of `file`, in its order. Raises InputError for results of other data.

        whole: the same set before pictures were left out; results may be of all of it.
        """
        given = read_results(self._path, whole)
        known = {picture.id: found for picture, found in zip(whole.pictures, given, strict=True)}
        return [known[picture.id] for picture in file.pictures]

    @property
    def frames(self) -> int:
        return 0

    def embed_pictures(self, images: Sequence[Image]) -> F32:
        self._refuse()

    def embed_texts(self, texts: Sequence[str]) -> F32:
        self._refuse()

    def caption(self, images: Sequence[Image]) -> list[str]:
        self._refuse()

    def answer(self, images: Sequence[Image], questions: Sequence[Sequence[str]]) -> list[list[str]]:
        self._refuse()

    def detect(self, images: Sequence[Image], names: Sequence[str], most: int) -> list[Found]:
        self._refuse()

    def close(self) -> None:
        """Nothing to free."""

    def _refuse(self) -> NoReturn:
        raise InputError(f"--results {self._path}: results are judged as they are, by --task detect; give a model")
