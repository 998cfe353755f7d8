"""The architecture table: what is known, how to add to it, and splits that do not fit."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from ot_federated import architectures
from ot_federated.architectures import (
    Architecture,
    check_split,
    cut_config,
    find_architecture,
    get_blocks,
    list_architectures,
    register_architecture,
)
from ot_federated.errors import ArchitectureError, ConfigError
from tests.families import build_family_model, family_names, image_family_names, num_blocks


@pytest.fixture
def own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test register families that later tests do not see."""
    monkeypatch.setattr(architectures, "_table", dict(architectures._table))


def test_the_table_holds_the_families_of_the_method() -> None:
    known = {entry.family for entry in list_architectures().values()}
    assert known >= {"LLaMA", "Mistral", "Qwen", "Gemma", "OPT", "GPT-2", "BLOOM", "GPT-NeoX"}


def test_every_entry_but_an_alias_has_a_small_model_in_the_tests() -> None:
    assert set(list_architectures()) - {*family_names, *image_family_names} <= {"ministral"}


@pytest.mark.parametrize("family", family_names)
def test_table_finds_the_blocks(family: str) -> None:
    model = build_family_model(family)
    assert len(get_blocks(model, find_architecture(model.config))) == num_blocks


def test_unknown_type_names_the_table_and_how_to_register() -> None:
    with pytest.raises(ArchitectureError) as caught:
        find_architecture(SimpleNamespace(model_type="lama"))
    message = str(caught.value)
    assert "'lama'" in message
    assert "did you mean 'llama'" in message
    for known in list_architectures():
        assert known in message
    assert "register_architecture(Architecture(" in message
    assert "model_types=('lama',)" in message


def test_config_without_a_type_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="''"):
        find_architecture(SimpleNamespace())


@pytest.mark.usefixtures("own_table")
def test_a_registered_family_is_found_with_its_blocks() -> None:
    config = AutoConfig.for_model(
        "stablelm", vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2
    )
    with pytest.raises(ArchitectureError, match="stablelm"):
        find_architecture(config)
    register_architecture(Architecture(family="StableLM", model_types=("stablelm",), blocks="model.layers"))
    assert find_architecture(config).family == "StableLM"
    model = AutoModelForCausalLM.from_config(config)
    assert len(get_blocks(model, find_architecture(config))) == 3


@pytest.mark.usefixtures("own_table")
def test_list_is_a_copy() -> None:
    list_architectures().clear()
    assert list_architectures()


def test_gpt2_with_blocks_that_depend_on_their_index_is_refused() -> None:
    config = GPT2Config(n_layer=2, n_embd=8, n_head=2, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ArchitectureError, match="Use a model with scale_attn_by_inverse_layer_idx=False"):
        find_architecture(config)
    config.scale_attn_by_inverse_layer_idx = False
    assert find_architecture(config).family == "GPT-2"


def test_wrong_path_names_the_module_that_is_missing() -> None:
    model = build_family_model("llama")
    with pytest.raises(ArchitectureError, match=r"LlamaForCausalLM has no module 'transformer\.h'"):
        get_blocks(model, Architecture(family="x", model_types=("x",), blocks="transformer.h"))
    with pytest.raises(ArchitectureError, match="is a LlamaMLP, not a ModuleList"):
        get_blocks(model, Architecture(family="x", model_types=("x",), blocks="model.layers.0.mlp"))


@pytest.mark.parametrize(("bottom", "emulator", "top"), [(2, 4, 2), (1, 1, 0), (0, 6, 2), (3, 0, 4), (7, 1, 0)])
def test_splits_that_fit_eight_blocks(bottom: int, emulator: int, top: int) -> None:
    check_split(num_blocks=8, bottom=bottom, emulator=emulator, top=top)


@pytest.mark.parametrize(
    ("bottom", "emulator", "top", "remedy"),
    [
        (4, 0, 4, "Their sum must be below 8"),
        (9, 1, 0, "Their sum must be below 8"),
        (2, 5, 2, "Set offsite.emulator-blocks to at most 4"),
        (7, 2, 0, "Set offsite.emulator-blocks to at most 1"),
    ],
)
def test_splits_that_do_not_fit_eight_blocks(bottom: int, emulator: int, top: int, remedy: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(remedy)) as caught:
        check_split(num_blocks=8, bottom=bottom, emulator=emulator, top=top)
    for setting in (f"bottom-blocks={bottom}", f"emulator-blocks={emulator}", f"top-blocks={top}", "8 blocks"):
        assert setting in str(caught.value)


def test_cut_config_keeps_each_kept_blocks_own_attention() -> None:
    config = build_family_model("gemma3_text").config
    kinds = list(config.layer_types)
    assert len(set(kinds)) == 2  # else the test shows nothing
    position = next(index for index in range(1, len(kinds)) if kinds[index] != kinds[0])
    cut = cut_config(config, find_architecture(config), positions=[0, position, 0])
    assert cut["layer_types"] == [kinds[0], kinds[position], kinds[0]]
    assert cut["num_hidden_layers"] == 3


def test_cut_config_tells_nothing_of_where_the_model_lives() -> None:
    config = build_family_model("gpt2").config
    config._name_or_path = "/home/owner/secret-model"
    config.quantization_config = {"secret": 1}
    cut = cut_config(config, find_architecture(config), positions=[0, 1])
    assert cut["n_layer"] == 2
    assert "secret" not in repr(cut)


def test_config_object_is_left_alone() -> None:
    config = build_family_model("qwen3", dtype=torch.float32).config
    before = config.to_dict()
    cut_config(config, find_architecture(config), positions=[1, 2])
    assert config.to_dict() == before
