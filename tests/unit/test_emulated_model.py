"""The emulated model: memory shared between processes, and adapters that do not reach the file."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ot_federated.data_owner.fine_tuning import load_model_once
from ot_federated.emulated_model import adapter_parameters, load_adapter, load_emulated_model
from ot_federated.errors import BundleError
from ot_federated.model_owner.splitting import plan_stack, write_bundle
from tests.families import build_family_model, byte_tokenizer


@pytest.fixture
def bundle(tmp_path: Path):
    model = build_family_model("llama")
    stack = plan_stack(num_blocks=8, bottom=1, top=1, kept=[2, 4], bridged=False)
    directory = tmp_path / "bundle"
    manifest = write_bundle(
        directory, model=model, tokenizer=byte_tokenizer(), stack=stack, bridges={}, compression="uniform+empty"
    )
    return directory, manifest


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_frozen_weights_are_mapped_from_the_file_not_copied(bundle):
    directory, manifest = bundle
    model = load_emulated_model(directory, manifest)
    pointer = dict(model.named_parameters())["model.layers.1.mlp.up_proj.weight"].data_ptr()
    path = str(directory / "emulator.safetensors")
    mapped = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(path)
    ]
    assert any(start <= pointer < end for start, end in mapped)


def test_an_adapter_is_written_to_memory_not_to_the_file(bundle):
    directory, manifest = bundle
    before = hashlib.sha256((directory / "adapter.safetensors").read_bytes()).hexdigest()
    model = load_emulated_model(directory, manifest)
    adapter = {name: torch.full_like(p, 0.25) for name, p in adapter_parameters(model, manifest).items()}
    load_adapter(model, adapter, manifest)
    assert all(bool((p == 0.25).all()) for p in adapter_parameters(model, manifest).values())
    assert hashlib.sha256((directory / "adapter.safetensors").read_bytes()).hexdigest() == before


@pytest.mark.parametrize("dtype", ["no_such_type", "int64", "nn"])
def test_a_type_that_weights_cannot_have_is_refused(bundle, dtype: str):
    directory, manifest = bundle
    with pytest.raises(BundleError, match=f"'{dtype}' is none that weights have"):
        load_emulated_model(directory, replace(manifest, dtype=dtype))


def test_a_process_loads_the_model_once(bundle):
    directory, _ = bundle
    load_model_once.cache_clear()
    assert load_model_once(str(directory), "cpu").model is load_model_once(str(directory), "cpu").model


def test_an_adapter_of_another_model_is_refused(bundle):
    directory, manifest = bundle
    model = load_emulated_model(directory, manifest)
    with pytest.raises(BundleError, match=r"top\.7"):
        load_adapter(model, {"top.7.mlp.up_proj.weight": torch.zeros(48, 32)}, manifest)
