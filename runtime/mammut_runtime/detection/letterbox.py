"""A picture of any shape inside a square, and its boxes there and back.

The one definition of the geometry: the device, the exporter and the training all use it. Coordinates are continuous,
in pixels: (0, 0) is the outer corner of the first pixel, (width, height) that of the last one, so a box around the
whole picture is (0, 0, width, height), whatever its scale.

The picture is shrunk or enlarged until its long side is the square's, and stands in the middle of it. Both sides are
whole numbers of pixels afterwards, so the two axes may differ in scale by a fraction of a pixel; `scale_x` and
`scale_y` say exactly what was done, and boxes are mapped by them, not by a common nominal scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import cv2
import numpy as np
import numpy.typing as npt

from mammut_runtime.errors import InputError

U8 = npt.NDArray[np.uint8]
Real = TypeVar("Real", bound=np.floating[Any])

FILL = 127
"""Grey of the padding, unless a rule says otherwise: the middle, hence near zero for every usual mean."""
MAX_SIDE = 1 << 24
"""Longest side in pixels; float32 tells whole pixels apart up to here."""


@dataclass(frozen=True)
class Letterbox:
    """Where a picture of height x width pixels stands in a square of size x size pixels."""

    height: int
    width: int
    """Of the picture, pixels."""
    size: int
    """Side of the square, pixels."""
    resized_height: int
    resized_width: int
    """Of the picture in the square, pixels, at least 1 each."""
    pad_top: int
    pad_left: int
    """Padding before it, pixels; what is left over stands behind it."""

    @classmethod
    def fit(cls, height: int, width: int, size: int) -> Letterbox:
        """The largest upright place for the picture, in the middle. Raises InputError for sides below 1 pixel."""
        for name, value in (("height", height), ("width", width), ("size", size)):
            if not 1 <= value <= MAX_SIDE:
                raise InputError(f"{name}: expected 1 to {MAX_SIDE:,} pixels, got {value}")
        longest = max(height, width)
        resized_height = max(1, (2 * height * size + longest) // (2 * longest))  # rounded, in whole numbers
        resized_width = max(1, (2 * width * size + longest) // (2 * longest))
        return cls(
            height,
            width,
            size,
            resized_height,
            resized_width,
            (size - resized_height) // 2,
            (size - resized_width) // 2,
        )

    @property
    def scale_x(self) -> float:
        """Pixels of the square per pixel of the picture, along its width."""
        return self.resized_width / self.width

    @property
    def scale_y(self) -> float:
        """The same along its height."""
        return self.resized_height / self.height

    @property
    def scale(self) -> float:
        """That of the long side, which is the nominal one."""
        return self.size / max(self.height, self.width)

    def apply(self, image: U8, fill: int = FILL) -> U8:
        """The square, uint8[D, D, 3]; channels stay in the order of the picture.

        image: uint8[H, W, 3] of the size this was made for. Shrinking averages areas, enlarging is bilinear.
        fill: value of the padding. Raises InputError for another size or type.
        """
        if image.dtype != np.uint8 or image.shape != (self.height, self.width, 3):
            raise InputError(
                f"expected uint8[{self.height}, {self.width}, 3], got {image.dtype}{list(image.shape)}; "
                f"make the letterbox with the size of the picture"
            )
        resized: Any = image
        if (self.resized_height, self.resized_width) != (self.height, self.width):
            shrinks = self.resized_height <= self.height and self.resized_width <= self.width
            method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
            resized = cv2.resize(image, (self.resized_width, self.resized_height), interpolation=method)
        square = np.full((self.size, self.size, 3), fill, np.uint8)
        bottom, right = self.pad_top + self.resized_height, self.pad_left + self.resized_width
        square[self.pad_top : bottom, self.pad_left : right] = resized
        return square

    def to_input(self, boxes: npt.NDArray[Real]) -> npt.NDArray[Real]:
        """Boxes [..., 4] xyxy in pixels of the picture to pixels of the square; the same shape and type, not clipped.

        Computed in float64. Raises InputError for another shape.
        """
        return _moved(boxes, self._scales(), self._pads(), inverse=False)

    def to_picture(self, boxes: npt.NDArray[Real]) -> npt.NDArray[Real]:
        """The inverse of `to_input`. Boxes that reach into the padding leave the picture: `boxes.clipped` cuts them."""
        return _moved(boxes, self._scales(), self._pads(), inverse=True)

    def _scales(self) -> npt.NDArray[np.float64]:
        return np.array([self.scale_x, self.scale_y] * 2)

    def _pads(self) -> npt.NDArray[np.float64]:
        return np.array([self.pad_left, self.pad_top] * 2, np.float64)


def _moved(
    boxes: npt.NDArray[Real], scales: npt.NDArray[np.float64], pads: npt.NDArray[np.float64], inverse: bool
) -> npt.NDArray[Real]:
    if boxes.ndim < 1 or boxes.shape[-1] != 4 or not np.issubdtype(boxes.dtype, np.floating):
        raise InputError(
            f"expected boxes as floating point [..., 4] (x0, y0, x1, y1), got {boxes.dtype}{list(boxes.shape)}"
        )
    wide = boxes.astype(np.float64)
    moved = (wide - pads) / scales if inverse else wide * scales + pads
    return moved.astype(boxes.dtype)
