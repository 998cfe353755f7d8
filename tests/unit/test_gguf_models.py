from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ot_federated.errors import SourceError
from ot_federated.gguf_models import convert_gguf

gguf = pytest.importorskip("gguf")

vocabulary = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("a", "b", "1", "2", "Ġ", "ĠĠ", "Ċ"),
    *(chr(code) for code in range(ord("c"), ord("z") + 1)),
]
width, blocks, heads, inner = 32, 2, 4, 64


def write_gguf(path: Path, *, pre: str, nan: bool = False) -> dict[str, np.ndarray]:
    """Write a LLaMA of two blocks with tied embeddings, its matrices quantised to Q4_1; return its tensors."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(blocks)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3, 3, 3] + [1] * (len(vocabulary) - 3))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(vocabulary), width),
        "output_norm.weight": (width,),
    }
    for block in range(blocks):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{block}.{name}.weight"] = (width, width)
        for name, shape in (
            ("ffn_gate", (inner, width)),
            ("ffn_up", (inner, width)),
            ("ffn_down", (width, inner)),
        ):
            shapes[f"blk.{block}.{name}.weight"] = shape
        for name in ("attn_norm", "ffn_norm"):
            shapes[f"blk.{block}.{name}.weight"] = (width,)
    tensors = {}
    kind = gguf.GGMLQuantizationType.Q4_1
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        if nan and name == "output_norm.weight":
            values[0] = np.nan
        if len(shape) == 2:
            packed = gguf.quants.quantize(values, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
            values = gguf.quants.dequantize(packed, kind)
        else:
            writer.add_tensor(name, values)
        tensors[name] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    directory = tmp_path_factory.mktemp("gguf")
    tensors = write_gguf(directory / "tiny.gguf", pre="smollm")
    convert_gguf(directory / "tiny.gguf", directory=directory / "model", name="tiny==1")
    return directory / "model", tensors


def test_weights_are_the_dequantised_ones_and_tied(converted: tuple[Path, dict[str, np.ndarray]]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    directory, tensors = converted
    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    pairs = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    }
    for key, name in pairs.items():
        np.testing.assert_array_equal(model.state_dict()[key].numpy(), tensors[name])
    assert torch.isfinite(model(torch.arange(5)[None]).logits).all()


def test_model_is_unmarked_and_names_no_path(converted: tuple[Path, dict[str, np.ndarray]]) -> None:
    directory, _ = converted
    config = json.loads((directory / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["architectures"], config["tie_word_embeddings"]) == (["LlamaForCausalLM"], True)
    generation = json.loads((directory / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1, 2, 2)
    for path in directory.glob("*.json"):
        assert str(directory.parent) not in path.read_text()


def load_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def test_tokenizer_has_its_template_and_splits_digits(converted: tuple[Path, dict[str, np.ndarray]]) -> None:
    tokenizer = load_tokenizer(converted[0])
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert tokenizer.decode(tokenizer("a  12 b").input_ids) == "a  12 b"


def test_other_tokenizers_stay_as_transformers_reads_them(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", pre="gpt-2")
    convert_gguf(tmp_path / "tiny.gguf", directory=tmp_path / "model", name="tiny")
    # GPT-2's rule leaves the last space to the word after it.
    assert load_tokenizer(tmp_path / "model").tokenize("a  12") == ["a", "Ġ", "Ġ", "1", "2"]


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", pre="gpt-2", nan=True)
    with pytest.raises(SourceError, match=r"model\.norm\.weight has values that are not finite"):
        convert_gguf(tmp_path / "tiny.gguf", directory=tmp_path / "model", name="tiny")


def test_callers_random_state_is_left_alone(tmp_path: Path) -> None:
    import torch

    write_gguf(tmp_path / "tiny.gguf", pre="gpt-2")
    before = torch.get_rng_state()
    convert_gguf(tmp_path / "tiny.gguf", directory=tmp_path / "model", name="tiny")
    assert torch.equal(before, torch.get_rng_state())
