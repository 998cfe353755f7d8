"""Image classification by a head on a vision transformer.

Images of any mode become RGB: transparency is laid on white, 16-bit greys are scaled to 8. Sizes are the image
processor's business.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ot_federated.errors import DataError
from ot_federated.tasks.base import LabelledImage, Progress, Row, Score
from ot_federated.tasks.classification_model import score_classes
from ot_federated.tasks.labels import find_class, number_classes

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedModel

# Above this, Pillow's own limit, a file of a few kilobytes can fill gigabytes.
max_pixels = 89_478_485
# An image processor that sets the shorter side makes of a thin strip of a few pixels an image of gigabytes.
max_aspect_ratio = 50
num_images_per_batch = 16


class ImageClassification:
    """The image-classification task.

    Args:
        processor: The model's image processor.
        classes: Names of the classes, in the order of the head.
        image_column: Column with the image: a file's bytes, ``{"bytes": ...}``, or a Pillow image.
        label_column: Column with the label: a class's name or number.
    """

    name = "image-classification"

    def __init__(
        self, processor: Any, *, classes: Sequence[str], image_column: str = "image", label_column: str = "label"
    ) -> None:
        self.processor = processor
        self.image_column = image_column
        self.label_column = label_column
        self._numbers = number_classes(classes)

    def encode(self, rows: Iterable[Row]) -> list[LabelledImage]:
        """Return one example a row; each image is opened once here, so that a wrong one is found before training."""
        examples = []
        for number, row in enumerate(rows):
            label = find_class(row[self.label_column], self._numbers, column=self.label_column, row=number)
            open_image(row[self.image_column], column=self.image_column, row=number)
            examples.append(LabelledImage(partial(self._read, row[self.image_column], number), label))
        return examples

    def read_images(self, rows: Iterable[Row]) -> torch.Tensor:
        """Return the images of rows, ``(rows, channels, height, width)``; labels are not looked at."""
        return torch.stack([self._read(row[self.image_column], number) for number, row in enumerate(rows)])

    def score(self, model: PreTrainedModel, rows: Sequence[Row], *, on_progress: Progress | None = None) -> Score:
        """Score the model on images: cross-entropy and accuracy."""
        return score_classes(model, self.encode(rows), batch_size=num_images_per_batch, on_progress=on_progress)

    def _read(self, value: Any, number: int) -> torch.Tensor:
        image = convert_image(open_image(value, column=self.image_column, row=number), row=number)
        pixels: torch.Tensor = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels


def open_image(value: Any, *, column: str, row: int) -> Image.Image:
    """Return a cell's image, not decoded yet.

    Raises:
        DataError: If it is none, larger than ``max_pixels``, or a strip.
    """
    from PIL import Image

    data = value.get("bytes") if isinstance(value, Mapping) else value
    if isinstance(data, Image.Image):
        image = data
    elif isinstance(data, bytes):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                image = Image.open(io.BytesIO(data))
        # Pillow's readers raise whatever a damaged file makes them run into.
        except Exception as error:
            raise DataError(
                f"Row {row}: {column!r} holds no image that can be read ({type(error).__name__}). Write it again as "
                "JPEG or PNG, or leave it out."
            ) from None
    else:
        raise DataError(
            f"Row {row}: {column!r} holds {type(data).__name__}, not an image file's bytes. Set data.image-column."
        )
    if image.width * image.height > max_pixels:
        raise DataError(f"Row {row}: the image has {image.width} x {image.height} pixels. Make it smaller.")
    if max(image.size) > max_aspect_ratio * min(image.size):
        raise DataError(
            f"Row {row}: the image has {image.width} x {image.height} pixels; its longer side may be at most "
            f"{max_aspect_ratio} times the shorter. Cut it, or leave it out."
        )
    return image


def convert_image(image: Image.Image, *, row: int) -> Image.Image:
    """Return the image in RGB, whatever its mode.

    Raises:
        DataError: If the file is damaged or of a mode without a meaning as colour.
    """
    from PIL import Image

    try:
        if image.mode == "RGB":
            image.load()
            return image
        if image.mode.startswith("I") or image.mode == "F":
            values = np.asarray(image, dtype=np.float64)
            highest = 65535.0 if image.mode.startswith("I") else 1.0
            if not np.isfinite(values).all() or values.min() < 0 or values.max() > highest:
                raise DataError(
                    f"Row {row}: an image of mode {image.mode} must have values from 0 to {highest:g}. Save it in 8 "
                    "bits, as L or RGB."
                )
            return Image.fromarray((values * (255.0 / highest)).round().astype(np.uint8)).convert("RGB")
        if "A" in image.mode or "transparency" in image.info:
            whole = image.convert("RGBA")
            white = Image.new("RGBA", whole.size, "white")
            return Image.alpha_composite(white, whole).convert("RGB")
        return image.convert("RGB")
    except DataError:
        raise
    except Exception as error:  # as above
        raise DataError(
            f"Row {row}: the image is damaged, or its mode {image.mode} cannot be turned into RGB "
            f"({type(error).__name__}). Write it again as JPEG or PNG, or leave it out."
        ) from None
