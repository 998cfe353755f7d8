"""Bundles from a full model: what is cached, what a damaged cache leads to, and loading the model itself."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ot_federated.bundle import Manifest, read_manifest, verify_files
from ot_federated.errors import ArchitectureError, ConfigError, SourceError
from ot_federated.model_owner.full_model import load_full_model, model_fingerprint
from ot_federated.model_owner.preparation import prepare_bundle, recipe_digest
from ot_federated.model_owner.splitting import plan_stack, write_bundle
from tests.families import build_family_model, byte_tokenizer, num_blocks, save_family_model

Prepare = Callable[..., tuple[Path, Manifest]]
text = ["The owner's public text, of which there is enough for a few windows. " * 40]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> Prepare:
    """Return a function that prepares a bundle in a cache of this test's own."""
    monkeypatch.setenv("OT_FEDERATED_CACHE", str(tmp_path / "cache"))
    model = build_family_model("llama")

    def run(*, read: Callable[[], Sequence[str]] = lambda: text, **changes: Any) -> tuple[Path, Manifest]:
        settings = {"bottom": 1, "emulator": 2, "top": 2, "keep": "uniform", "gaps": "bridge", "ridge": 0.01} | changes
        return prepare_bundle(
            model,
            byte_tokenizer(),
            read_public_text=read,
            calibration_tokens=1024,
            recipe=settings,
            say=said.append,
            **settings,
        )

    return run


def refuse_to_read() -> Sequence[str]:
    raise AssertionError("the public text was read")


def test_the_same_recipe_is_followed_once(prepare: Prepare, said: list[str]) -> None:
    directory, manifest = prepare()
    again, same = prepare(read=refuse_to_read)
    assert (again, same.digest) == (directory, manifest.digest)
    assert said[-1] == f"Bundle {manifest.digest[:12]} from the cache"
    other, _ = prepare(ridge=0.5)
    assert other != directory


def test_manifest_describes_what_is_there(prepare: Prepare) -> None:
    directory, manifest = prepare()
    assert read_manifest(directory, digest=manifest.digest).files == manifest.files
    verify_files(directory, manifest)
    assert [entry.role for entry in manifest.stack] == ["bottom", "emulator", "bridge", "emulator", "top", "top"]
    assert manifest.kept_blocks == [1, 5]
    bridge = manifest.stack[2]
    assert (bridge.first_block, bridge.last_block) == (2, 4)
    assert manifest.compression == "uniform+bridge"
    assert manifest.num_blocks == 8
    assert manifest.dtype == "float32"


def test_same_inputs_give_the_same_digest(prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run refuses a bundle of another digest, so making it anew must not give another."""
    _, first = prepare(keep="influence")
    monkeypatch.setenv("OT_FEDERATED_CACHE", str(tmp_path / "other"))
    _, second = prepare(keep="influence")
    assert first.digest == second.digest


@pytest.mark.parametrize("name", ["adapter.safetensors", "manifest.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["altered", "missing"])
def test_a_damaged_bundle_in_the_cache_is_made_anew(prepare: Prepare, name: str, damage: str) -> None:
    directory, manifest = prepare()
    path = directory / name
    if damage == "missing":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)
    directory, again = prepare()
    assert again.digest == manifest.digest
    # What is on disk is what will be sent to the clients.
    verify_files(directory, read_manifest(directory, digest=manifest.digest))


@pytest.mark.parametrize("num_labels", [2, 12])
def test_digest_is_that_of_the_text_on_disk_also_from_the_cache(
    num_labels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config's label table has integer keys, which JSON turns into text and sorts otherwise from eleven on."""
    monkeypatch.setenv("OT_FEDERATED_CACHE", str(tmp_path))
    model = build_family_model("llama")
    model.config.num_labels = num_labels
    for _ in range(2):
        directory, manifest = prepare_bundle(
            model,
            byte_tokenizer(),
            bottom=1,
            emulator=1,
            top=1,
            keep="uniform",
            gaps="empty",
            read_public_text=refuse_to_read,
            calibration_tokens=1024,
            ridge=0.01,
            recipe={},
            say=lambda _: None,
        )
        assert hashlib.sha256((directory / "manifest.json").read_bytes()).hexdigest() == manifest.digest


def test_no_public_text_is_read_where_none_is_needed(prepare: Prepare) -> None:
    _, manifest = prepare(read=refuse_to_read, keep="uniform", gaps="empty")
    assert [entry.role for entry in manifest.stack] == ["bottom", "emulator", "emulator", "top", "top"]


@pytest.mark.parametrize("gaps", ["empty", "bridge"])
@pytest.mark.parametrize("keep", ["uniform", "influence"])
def test_an_emulator_without_blocks(prepare: Prepare, keep: str, gaps: str) -> None:
    directory, manifest = prepare(emulator=0, keep=keep, gaps=gaps)
    verify_files(directory, manifest)
    bridge = ["bridge"] if gaps == "bridge" else []
    assert [entry.role for entry in manifest.stack] == ["bottom", *bridge, "top", "top"]
    assert manifest.kept_blocks == []


def test_influence_keeps_the_blocks_that_do_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OT_FEDERATED_CACHE", str(tmp_path))
    model = build_family_model("llama")
    with torch.no_grad():
        for index in (1, 2, 4):  # these blocks do nothing
            model.model.layers[index].self_attn.o_proj.weight.zero_()
            model.model.layers[index].mlp.down_proj.weight.zero_()
    _, manifest = prepare_bundle(
        model,
        byte_tokenizer(),
        bottom=1,
        emulator=2,
        top=2,
        keep="influence",
        gaps="empty",
        read_public_text=lambda: text,
        calibration_tokens=1024,
        ridge=0.01,
        recipe={},
        say=lambda _: None,
    )
    assert manifest.kept_blocks == [3, 5]


def test_split_that_does_not_fit_is_refused_before_any_work(prepare: Prepare) -> None:
    with pytest.raises(ConfigError, match="the middle has only 5 blocks"):
        prepare(emulator=6, read=refuse_to_read)


def test_recipe_digest_depends_on_content_not_order() -> None:
    assert recipe_digest({"a": 1, "b": [2]}) == recipe_digest({"b": [2], "a": 1})
    assert recipe_digest({"a": 1}) != recipe_digest({"a": 2})


def load(source: Path | str) -> Any:
    return load_full_model(str(source), dtype=torch.float32, device="cpu")


def test_model_directory_is_loaded_frozen(tmp_path: Path) -> None:
    model, tokenizer = load(save_family_model(tmp_path / "m", "gpt2"))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer("a")["input_ids"] == byte_tokenizer()("a")["input_ids"]
    expected = build_family_model("gpt2").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("source", "remedy"),
    [
        ("/no/such/directory", "does not exist"),
        ("./nowhere", "does not exist"),
        ("no-such-org/no-such-model-xyz", "save_pretrained"),  # read as a hub id, which is out of reach here
    ],
)
def test_source_that_is_not_there_is_named(source: str, remedy: str) -> None:
    with pytest.raises(SourceError, match=remedy) as caught:
        load(source)
    assert source in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x00" * 100], ids=["empty", "zeros"])
def test_damaged_weights(tmp_path: Path, content: bytes) -> None:
    directory = save_family_model(tmp_path / "m")
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(SourceError, match="cannot be loaded"):
        load(directory)


def test_weights_of_another_user_are_told_from_missing_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the units of deploy/ meet them; root, which may run this, reads everything."""
    directory = save_family_model(tmp_path / "m")
    weights = directory / "model.safetensors"
    monkeypatch.setattr(os, "access", lambda path, mode: path != weights)
    with pytest.raises(SourceError, match="model.safetensors cannot be read by the user .* chown -R"):
        load(directory)


def test_weights_cut_off_by_a_full_disk(tmp_path: Path) -> None:
    directory = save_family_model(tmp_path / "m")
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(SourceError, match="cannot be loaded"):
        load(directory)


def test_weights_that_lack_a_tensor_are_not_made_up(tmp_path: Path) -> None:
    """transformers fills what is missing with random numbers and a line in the log."""
    from safetensors.torch import load_file, save_file

    directory = save_family_model(tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match="up_proj"):
        load(directory)


def test_unknown_family_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    directory = save_family_model(tmp_path / "m")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    (directory / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ArchitectureError, match=r"'mamba' has no known architecture.*register_architecture"):
        load(directory)


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    directory = save_family_model(tmp_path / "m")
    before = model_fingerprint(str(directory))
    assert before == model_fingerprint(str(directory))
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    after = model_fingerprint(str(directory))
    assert {name for name in before if before[name] != after[name]} == {"model.safetensors"}


def test_fingerprint_of_a_copy_elsewhere_names_the_same_weights(tmp_path: Path) -> None:
    first = model_fingerprint(str(save_family_model(tmp_path / "a")))
    second = model_fingerprint(str(save_family_model(tmp_path / "b")))
    assert {**first, "source": ""} == {**second, "source": ""}


def test_bundle_tells_nothing_of_where_the_model_lives(tmp_path: Path) -> None:
    home = save_family_model(tmp_path / "secret-place")
    model, tokenizer = load_full_model(str(home), dtype=torch.float32, device="cpu")
    stack = plan_stack(num_blocks=num_blocks, bottom=1, top=1, kept=[3], bridged=False)
    write_bundle(
        tmp_path / "bundle", model=model, tokenizer=tokenizer, stack=stack, bridges={}, compression="uniform+empty"
    )
    for path in (tmp_path / "bundle").iterdir():
        assert b"secret-place" not in path.read_bytes(), path.name
