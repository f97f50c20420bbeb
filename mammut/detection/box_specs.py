"""How a user names boxes on the command line: coco:FILE:IMAGES or lvis:FILE:IMAGES."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mammut.detection.box_files import BoxFile
from mammut.detection.coco_files import read_coco
from mammut.detection.lvis_files import read_lvis
from mammut_runtime.errors import InputError

_READERS = {"coco": read_coco, "lvis": read_lvis}
EXPECTED = "coco:FILE.json:FOLDER_OF_PICTURES or lvis:FILE.json:FOLDER_OF_PICTURES"


@dataclass(frozen=True)
class BoxSpec:
    """A file of boxes, its form, and where its pictures are."""

    form: str
    file: Path
    images: Path | None
    """None where none was named."""

    def read(self) -> BoxFile:
        """Raises InputError."""
        return _READERS[self.form](self.file)


def parse_box_spec(spec: str) -> BoxSpec:
    """Raises InputError for a text of another form. The last colon separates, unless all of it names a file."""
    form, _, rest = spec.partition(":")
    if form not in _READERS or not rest:
        raise InputError(f"{spec}: expected {EXPECTED}")
    file, _, images = rest.rpartition(":")
    if not file or Path(rest).is_file():
        return BoxSpec(form, Path(rest), None)
    if not images:
        raise InputError(f"{spec}: no folder after the last colon; expected {EXPECTED}")
    return BoxSpec(form, Path(file), Path(images))
