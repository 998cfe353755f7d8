"""Image backbones that sit inside Python packages as ONNX, turned into a ``save_pretrained`` directory.

ONNX is a graph with weights. An exporter keeps a parameter's name where the graph uses it as it is, and renames what
it folded: the matrix of a linear layer stands transposed under a number, and is known by the MatMul that uses it; the
position table stands as two, the class token's and the patches'. Weights are written under the names that DINOv2's
checkpoints on the hub have, which every release of transformers reads.

Maxime Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", 2023,
https://arxiv.org/abs/2304.07193.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ot_federated.errors import SourceError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = dict[str, NDArray[np.float32]]

# Of the graph's nodes; the rest of the package's model, a decoder, is left out.
prefix = "backbone."
patch_size = 14
head_width = 64
# As DINOv2 was trained.
image_mean, image_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
image_size = 224


def convert_onnx(onnx_file: Path, *, directory: Path, name: str) -> None:
    """Write the DINOv2 backbone in ``onnx_file`` into ``directory``: weights, config, image processor's config.

    Args:
        onnx_file: The graph.
        directory: Where to write.
        name: What the file is called in messages.

    Raises:
        SourceError: If onnx is not installed, or the file is no such backbone.
    """
    from safetensors.numpy import save_file
    from transformers import Dinov2Config

    weights = read_backbone(onnx_file, name=name)
    hidden_size = weights["layernorm.weight"].shape[0]
    num_patches = weights["embeddings.position_embeddings"].shape[1] - 1
    num_layers = 1 + max(int(found[1]) for key in weights if (found := re.match(r"encoder\.layer\.(\d+)\.", key)))
    config = Dinov2Config(
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // head_width,
        image_size=round(num_patches**0.5) * patch_size,
        patch_size=patch_size,
        architectures=["Dinov2Model"],
    )
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": image_mean,
        "image_std": image_std,
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")


def read_backbone(onnx_file: Path, *, name: str) -> Arrays:
    """Return the backbone's weights in fp32 under the names of DINOv2's checkpoints.

    Raises:
        SourceError: If onnx is not installed, or the file is no such backbone.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise SourceError(
            f"{name} holds ONNX weights, which need the onnx package: pip install 'ot-federated[vision]', or give "
            "model.source another model."
        ) from error
    try:
        graph: Any = onnx.load(str(onnx_file)).graph
        found = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    except Exception as error:  # protobuf raises kinds of its own
        raise SourceError(f"{name}: {onnx_file.name} is no readable ONNX file ({type(error).__name__}).") from error
    weights: Arrays = {
        key.removeprefix(prefix): np.ascontiguousarray(value, dtype=np.float32)
        for key, value in found.items()
        if key.startswith(prefix)
    }
    for node in graph.node:
        # /backbone/encoder/layer.0/attention/attention/key/MatMul multiplies by that layer's matrix, from the right.
        matrix = found.get(node.input[1]) if node.op_type == "MatMul" else None
        module = node.name.strip("/").replace("/", ".").removesuffix(".MatMul")
        if matrix is not None and module.startswith(prefix):
            weights[module.removeprefix(prefix) + ".weight"] = np.ascontiguousarray(matrix.T, dtype=np.float32)
    weights["embeddings.position_embeddings"] = _join_positions(found, weights, name=name)
    # Of pretraining alone, and not in the graph.
    weights["embeddings.mask_token"] = np.zeros_like(weights["embeddings.cls_token"][:, 0])
    return weights


def _join_positions(found: Arrays, weights: Arrays, *, name: str) -> NDArray[np.float32]:
    width = weights["layernorm.weight"].shape[0] if "layernorm.weight" in weights else 0
    tables = [
        value
        for key, value in found.items()
        if not key.startswith(prefix) and value.ndim == 3 and value.shape[2] == width
    ]
    tables.sort(key=lambda table: table.shape[1])
    if [table.shape[1] > 1 for table in tables] != [False, True]:
        raise SourceError(f"{name} holds no DINOv2 backbone: its position tables were not found.")
    return np.concatenate(tables, axis=1).astype(np.float32)
