"""A DINOv2 backbone in ONNX, as an exporter leaves it: transposed matrices under numbers, two position tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, Dinov2Config, Dinov2Model

from ot_federated.errors import SourceError
from ot_federated.onnx_models import convert_onnx

onnx = pytest.importorskip("onnx")


def write_graph(path: Path, model: Dinov2Model, checkpoint: dict[str, torch.Tensor]) -> None:
    """Write a checkpoint's weights the way an exporter does."""
    tensors, nodes = {}, []
    for name, tensor in checkpoint.items():
        value = tensor.numpy()
        if name == "embeddings.position_embeddings":
            tensors["onnx::Concat_1"], tensors["onnx::Reshape_2"] = value[:, :1], value[:, 1:]
        elif name.startswith("encoder.") and value.ndim == 2:
            number = f"onnx::MatMul_{len(nodes) + 10}"
            tensors[number] = np.ascontiguousarray(value.T)
            module = "/backbone/" + name.removesuffix(".weight").replace("layer.", "layer#").replace(".", "/")
            nodes.append(
                onnx.helper.make_node(
                    "MatMul", ["x", number], ["y"], name=module.replace("layer#", "layer.") + "/MatMul"
                )
            )
        elif name != "embeddings.mask_token":
            tensors[f"backbone.{name}"] = value
    tensors["decoder.bn1.weight"] = np.ones(3, np.float32)
    graph = onnx.helper.make_graph(
        nodes, "g", [], [], [onnx.numpy_helper.from_array(value, name) for name, value in tensors.items()]
    )
    onnx.save(onnx.helper.make_model(graph), str(path))


def test_the_backbone_comes_back(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    model = Dinov2Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "source")
    checkpoint = load_file(tmp_path / "source" / "model.safetensors")
    assert "encoder.layer.0.attention.attention.query.weight" in checkpoint, "the names of the hub's checkpoints"
    write_graph(tmp_path / "model.onnx", model, checkpoint)
    (tmp_path / "out").mkdir()
    convert_onnx(tmp_path / "model.onnx", directory=tmp_path / "out", name="a package")
    loaded, found = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected, got = (each(images).last_hidden_state for each in (model, loaded.eval()))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").crop_size["height"] == 224


def test_what_is_no_backbone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 50)
    with pytest.raises(SourceError, match="no readable ONNX file"):
        convert_onnx(tmp_path / "model.onnx", directory=tmp_path, name="a package")
    graph = onnx.helper.make_graph([], "g", [], [], [onnx.numpy_helper.from_array(np.ones(3, np.float32), "decoder.x")])
    onnx.save(onnx.helper.make_model(graph), str(tmp_path / "model.onnx"))
    with pytest.raises(SourceError, match="no DINOv2 backbone"):
        convert_onnx(tmp_path / "model.onnx", directory=tmp_path, name="a package")
