"""``sklearn:digits[:SPLIT]``: 1797 scanned digits of 8 x 8 pixels, which come with scikit-learn.

For a try of the vision task where no other images are at hand. Alpaydin, Kaynak, "Optical Recognition of Handwritten
Digits", UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49, its test half. The splits are drawn
once and for all: train 1000, public 200, validation 200, test 397.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from ot_federated.errors import SourceError, nearest_match
from ot_federated.package_assets import choose_split

if TYPE_CHECKING:
    from datasets import Dataset

prefix = "sklearn:"
split_sizes = {"train": 1000, "public": 200, "validation": 200, "test": 397}


def is_sklearn_source(source: str) -> bool:
    """Say whether ``source`` is written as one of scikit-learn's sets."""
    return source.startswith(prefix)


def load_digits_table(source: str, *, split: str | None) -> Dataset:
    """Return the rows ``{image: PNG bytes, label: "0" to "9"}`` of ``sklearn:digits[:SPLIT]``.

    Raises:
        SourceError: If scikit-learn is not installed, or there is no such set or split.
    """
    from datasets import Dataset
    from PIL import Image

    name, _, own_split = source.removeprefix(prefix).partition(":")
    if name != "digits":
        raise SourceError(
            f"{source!r} is no known set{nearest_match(name, ('digits',))}: write sklearn:digits[:SPLIT]."
        )
    wanted = choose_split(source, available=list(split_sizes), split=own_split or split)
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise SourceError(
            f"{source!r} needs scikit-learn: pip install 'ot-federated[vision]', or give images of your own."
        ) from error
    digits = load_digits()
    start = 0
    order = np.random.default_rng(0).permutation(len(digits.target))
    for known, size in split_sizes.items():
        chosen = order[start : start + size]
        if known == wanted:
            break
        start += size
    images = []
    for pixels in digits.images[chosen]:  # 8 x 8, from 0 to 16
        buffer = io.BytesIO()
        Image.fromarray(np.minimum(pixels * 16, 255).astype(np.uint8)).save(buffer, format="PNG")
        images.append(buffer.getvalue())
    return Dataset.from_dict({"image": images, "label": [str(label) for label in digits.target[chosen]]})
