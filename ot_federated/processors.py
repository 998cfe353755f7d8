"""What turns rows into a model's inputs and travels with it: a tokenizer, or an image processor.

Of transformers' image processors those on Pillow and numpy are used, though torchvision may be there: it gives other
numbers, and parties that have it and parties that have not would train on different pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ot_federated.architectures import Architecture, block_config
from ot_federated.errors import BundleError, ConfigError

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

    Processor = PreTrainedTokenizerBase | BaseImageProcessor

image_processor_file = "preprocessor_config.json"


def load_processor(place: str, *, kind: str, **arguments: Any) -> Processor:
    """Load the processor of a model that reads ``kind``: ``text`` or ``image``; no code from the source is run."""
    from transformers import AutoImageProcessor, AutoTokenizer

    if kind == "image":
        processor: Processor = AutoImageProcessor.from_pretrained(
            place, trust_remote_code=False, backend="pil", **arguments
        )
    else:
        processor = AutoTokenizer.from_pretrained(place, trust_remote_code=False, **arguments)
    return processor


def build_image_processor(described: Mapping[str, Any]) -> Processor:
    """Return the image processor that ``preprocessor_config.json`` with this content stands for."""
    with TemporaryDirectory() as directory:
        (Path(directory) / image_processor_file).write_text(json.dumps(described))
        return load_processor(directory, kind="image")


def load_bundle_processor(directory: Path) -> Processor:
    """Load the processor that stands in a bundle's directory; code that lies beside it is never run.

    Raises:
        BundleError: If its files are not those of a processor.
    """
    kind = "image" if (directory / image_processor_file).is_file() else "text"
    try:
        return load_processor(str(directory), kind=kind, local_files_only=True)
    except (KeyboardInterrupt, SystemExit):
        raise
    # Whatever comes of files that a stranger wrote. A panic of the Rust library is no Exception.
    except BaseException as error:
        name = "image processor" if kind == "image" else "tokenizer"
        raise BundleError(
            f"The bundle's {name} cannot be loaded ({type(error).__name__}). It was altered, or made by another "
            "release of transformers."
        ) from error


def set_image_size(processor: Any, size: int, *, architecture: Architecture, config: Any) -> None:
    """Let a processor give images of ``size`` pixels a side; the whole of a square image, the middle of another.

    Raises:
        ConfigError: If the model's patches do not tile such an image.
    """
    patch = int(block_config(config, architecture).patch_size)
    if size % patch:
        lower = max(patch, size // patch * patch)
        raise ConfigError(
            f"data.image-size={size} is no multiple of the {patch} pixels of this model's patches: take {lower} or "
            f"{lower + patch}."
        )
    square = {"height": size, "width": size}
    processor.size = {"shortest_edge": size} if "shortest_edge" in dict(processor.size) else square
    if getattr(processor, "crop_size", None):
        processor.crop_size = square
