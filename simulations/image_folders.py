"""Unpack archives of ``CLASS/IMAGE`` files into the folders of an image classification, the public part apart.

``python -m simulations.image_folders train.tar.gz test.tar.gz --output-dir DIR --num-public 20 --num-validation 20``
writes ``DIR/public/CLASS/``, ``DIR/validation/CLASS/`` and ``DIR/train/CLASS/`` from the first archive, in the order
of the files' names, and ``DIR/test/CLASS/`` from the second; ``--num-train`` and ``--num-test`` keep so many a class.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ot_federated.cache import atomic_write_bytes
from ot_federated.errors import DataError, OtFederatedError
from ot_federated.image_folders import image_suffixes


def read_archive(path: Path) -> dict[str, list[tuple[str, bytes]]]:
    """Return each class's images, by name: the last two parts of a member's path are class and image.

    Raises:
        DataError: If the archive cannot be read or holds no images.
    """
    classes: dict[str, list[tuple[str, bytes]]] = defaultdict(list)
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                place = PurePosixPath(member.name)
                file = archive.extractfile(member) if member.isfile() else None
                if file and place.suffix.lower() in image_suffixes and len(place.parts) > 1:
                    classes[place.parts[-2]].append((place.name, file.read()))
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path} could not be read: {error}.") from None
    if not classes:
        raise DataError(f"{path} holds no images as CLASS/IMAGE.")
    return {name: sorted(images) for name, images in sorted(classes.items())}


def divide(images: Sequence[tuple[str, bytes]], sizes: dict[str, int]) -> dict[str, Sequence[tuple[str, bytes]]]:
    """Return the images of each part in turn; a size of 0 takes all that are left.

    Raises:
        DataError: If there are too few.
    """
    parts, start = {}, 0
    for part, size in sizes.items():
        end = start + size if size else len(images)
        if end > len(images) or end == start:
            raise DataError(f"A class has {len(images)} images, too few for {sizes}. Ask for less.")
        parts[part] = images[start:end]
        start = end
    return parts


def main(arguments: Sequence[str] | None = None) -> int:
    """Unpack the archives that are named; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m simulations.image_folders", description=__doc__)
    parser.add_argument("train", type=Path, help="archive of training images, as CLASS/IMAGE")
    parser.add_argument("test", type=Path, help="archive of test images, as CLASS/IMAGE")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--num-public", type=int, default=20, help="images a class for the owner's public data")
    parser.add_argument("--num-validation", type=int, default=20, help="images a class for the owner's validation")
    parser.add_argument("--num-train", type=int, default=0, help="images a class for the clients; 0: all others")
    parser.add_argument("--num-test", type=int, default=0, help="images a class for the test; 0: all")
    parsed = parser.parse_args(arguments)
    sizes = {"public": parsed.num_public, "validation": parsed.num_validation, "train": parsed.num_train}
    try:
        for archive, parts in ((parsed.train, sizes), (parsed.test, {"test": parsed.num_test})):
            for name, images in read_archive(archive).items():
                for part, chosen in divide(images, parts).items():
                    directory = parsed.output_dir / part / name
                    directory.mkdir(parents=True, exist_ok=True)
                    for file, content in chosen:
                        atomic_write_bytes(directory / file, content)
    except OtFederatedError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{parsed.output_dir}: {', '.join(sorted(path.name for path in parsed.output_dir.iterdir()))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
