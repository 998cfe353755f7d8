"""Images on disk: a folder with a folder of images for each class, as data sets of images are often kept.

``FOLDER/CLASS/*.jpg`` becomes rows ``{image: the file's bytes, label: CLASS}``. With ``FOLDER/train/CLASS/*.jpg``
beside ``FOLDER/test`` the split decides. Files are kept as they are and decoded when they are used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ot_federated.errors import DataError

if TYPE_CHECKING:
    from pyarrow import Table

image_suffixes = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


def find_image_folder(path: Path, *, split: str | None) -> Path | None:
    """Return the folder whose folders are classes: ``path``, or its folder of that split; None if it is neither."""
    if split and (path / split).is_dir() and _classes(path / split):
        path = path / split
    return path if path.is_dir() and any(_images(folder) for folder in _classes(path)) else None


def list_images(path: Path) -> list[Path]:
    """Return the image files of all classes, sorted by class and name.

    Raises:
        DataError: If a class has none.
    """
    files: list[Path] = []
    for folder in _classes(path):
        images = _images(folder)
        if not images:
            raise DataError(
                f"The class {folder.name!r} in {path} has no images ({', '.join(image_suffixes)}): put some there or "
                "remove the folder."
            )
        files += images
    return files


def read_image_folder(path: Path) -> Table:
    """Return a row ``{image, label}`` for each image.

    Raises:
        DataError: If a class has no images, or a file cannot be read.
    """
    import pyarrow

    files = list_images(path)
    try:
        contents = [file.read_bytes() for file in files]
    except OSError as error:
        raise DataError(f"{error.filename} could not be read: {error.strerror}.") from error
    return pyarrow.table(
        {"image": pyarrow.array(contents, type=pyarrow.large_binary()), "label": [file.parent.name for file in files]}
    )


def _classes(path: Path) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in image_suffixes and file.is_file())
