"""Bundles whose digests are right and whose sender is not: what a client builds from them, and what it never runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ot_federated.bundle import Manifest, check_config
from ot_federated.data_owner.fine_tuning import load_processor_once
from ot_federated.emulated_model import load_emulated_model
from ot_federated.errors import BundleError
from ot_federated.model_owner.splitting import plan_stack, write_bundle
from ot_federated.processors import load_bundle_processor
from tests.families import build_family_model, byte_tokenizer, num_blocks


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    directory = tmp_path_factory.mktemp("hostile") / "bundle"
    stack = plan_stack(num_blocks=num_blocks, bottom=1, top=1, kept=[3], bridged=False)
    manifest = write_bundle(
        directory,
        model=build_family_model("llama"),
        tokenizer=byte_tokenizer(),
        stack=stack,
        bridges={},
        compression="uniform+empty",
    )
    return directory, manifest


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_config_never_names_code_to_fetch(bundle: tuple[Path, Manifest], name: str) -> None:
    """transformers reads ``someone/kernel`` here as native code to download from the hub and run."""
    directory, manifest = bundle
    hostile = replace(manifest, config={**manifest.config, name: "someone/kernel"})
    try:
        model = load_emulated_model(directory, hostile)
    except BundleError:
        return
    assert model.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize("field", ["auto_map", "quantization_config", "_name_or_path"])
def test_config_fields_that_would_load_something_else_do_not(bundle: tuple[Path, Manifest], field: str) -> None:
    directory, manifest = bundle
    value: dict[str, Any] = {
        "auto_map": {"AutoModelForCausalLM": "someone/repo--modeling.Model"},
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "_name_or_path": "someone/repo",
    }
    hostile = replace(manifest, config={**manifest.config, field: value[field]})
    try:
        model = load_emulated_model(directory, hostile)
    except BundleError:
        return
    assert type(model).__module__.startswith("transformers.")


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "no such function"},
        {"hidden_size": -1},
        {"num_attention_heads": 0},
        {"rope_parameters": "text"},
        {"vocab_size": 10**15},
        {"num_hidden_layers": "three"},
        {"num_hidden_layers": 4000},
        {"num_labels": 2**20},
        {"max_position_embeddings": 2**25},
    ],
    ids=lambda change: "-".join(map(str, next(iter(change.items())))),
)
def test_config_that_makes_no_model_is_a_bundle_error(bundle: tuple[Path, Manifest], change: dict[str, Any]) -> None:
    directory, manifest = bundle
    with pytest.raises(BundleError):
        load_emulated_model(directory, replace(manifest, config={**manifest.config, **change}))


def test_code_beside_the_tokenizer_is_not_run(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "tokenization_evil.Evil"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenization_evil.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\nclass Evil: pass\n")
    tokenizer = load_processor_once(str(tmp_path))
    assert tokenizer("a")["input_ids"] == byte_tokenizer()("a")["input_ids"]
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("field", ["auto_map", "_attn_implementation"])
def test_code_in_a_config_inside_the_config_is_refused(field: str) -> None:
    with pytest.raises(BundleError, match=field):
        check_config({"vision_config": {"hidden_size": 8, field: "someone/kernel"}})
    with pytest.raises(BundleError, match="hidden_size"):
        check_config({"vision_config": {"hidden_size": 2**40}})


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[" * 100_000, b"\xff", b'{"version": "1.0", "model": {"type": "BPE", "vocab": 1}}']
)
def test_tokenizer_that_is_none_is_a_bundle_error(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(text)
    with pytest.raises(BundleError, match="tokenizer cannot be loaded"):
        load_bundle_processor(tmp_path)
