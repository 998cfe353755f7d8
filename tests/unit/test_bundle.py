"""Manifests from strangers, and files that were altered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ot_federated.bundle import (
    BundleFile,
    StackEntry,
    adapter_prefixes,
    describe_files,
    format_version,
    manifest_name,
    max_manifest_bytes,
    parse_manifest,
    read_manifest,
    read_tensors,
    verify_files,
    weight_files,
)
from ot_federated.errors import BundleError
from ot_federated.model_owner.splitting import plan_stack, write_bundle
from tests.bundles import build_manifest, stack, write_random_bundle
from tests.families import build_family_model, byte_tokenizer, num_blocks

digest = "ab" * 32
valid_files = tuple(BundleFile(name, 7, digest) for name in weight_files)


def altered(change: Callable[[dict[str, Any]], object]) -> bytes:
    """Return a valid manifest's text after ``change`` was applied to its JSON values."""
    raw = json.loads(build_manifest(files=valid_files).to_bytes())
    change(raw)
    return json.dumps(raw).encode()


def name_a_file(name: Any) -> bytes:
    return build_manifest(files=(*valid_files, BundleFile(name, 1, digest))).to_bytes()


def test_parse_is_the_inverse_of_to_bytes() -> None:
    manifest = build_manifest(files=valid_files)
    parsed = parse_manifest(manifest.to_bytes(), digest=manifest.digest)
    assert parsed == manifest
    assert parsed.num_bytes == 21
    assert parsed.file_bytes("emulator.safetensors") == 7
    assert parsed.kept_blocks == [2]


def test_digest_is_that_of_the_text() -> None:
    manifest = build_manifest(files=valid_files)
    assert manifest.digest == hashlib.sha256(manifest.to_bytes()).hexdigest()
    assert replace(manifest, num_blocks=5).digest != manifest.digest


def test_wrong_digest() -> None:
    with pytest.raises(BundleError, match=rf"not {digest}: it was altered. Fetch the bundle again"):
        parse_manifest(build_manifest(files=valid_files).to_bytes(), digest=digest)


def test_other_format_names_both_and_the_remedy() -> None:
    text = altered(lambda raw: raw.update(format=format_version + 1))
    with pytest.raises(BundleError, match=rf"format {format_version + 1}; this version reads {format_version}.*nstall"):
        parse_manifest(text)


def test_too_large_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(BundleError, match=f"at most {max_manifest_bytes}"):
        parse_manifest(b"[" * (max_manifest_bytes + 1))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\x00\xff\xfe garbage",
        b"[]",
        b"7",
        b"null",
        b'"text"',
        b"{}",
        b'{"format": 2}',
        b"[" * 100_000,  # nested too deeply for a parser that recurses
        b'{"format": 2, "stack": 3, "files": []}',
        b'{"format": 2, "stack": [[]], "files": []}',
        altered(lambda raw: raw.pop("dtype")),
        altered(lambda raw: raw.update(surprise=1)),
        altered(lambda raw: raw["stack"][0].pop("index")),
        altered(lambda raw: raw["files"][0].update(mode=0o777)),
        altered(lambda raw: raw.update(stack={})),
    ],
)
def test_garbage_is_a_bundle_error(text: bytes) -> None:
    with pytest.raises(BundleError):
        parse_manifest(text)


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "..",
        ".",
        "",
        ".hidden",
        "-rf",
        "evil\n",
        "evil\x00",
        "C:evil",
        "e" * 129,
        "ünïcode",
        7,
        None,
        ["a"],
    ],
)
def test_names_that_are_more_than_a_plain_file_name(name: Any) -> None:
    with pytest.raises(BundleError, match="only plain file names are accepted"):
        parse_manifest(name_a_file(name))


@pytest.mark.parametrize("name", ["tokenizer.json", "merges.txt", "a.txt", "A_b-c.d..e.model", "e" * 123 + ".json"])
def test_plain_file_names_are_accepted(name: str) -> None:
    assert parse_manifest(name_a_file(name)).files[-1].name == name


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "adapter.pt", "a.pkl", "a.pth", "a.ckpt", "a.npz", "tokenization.py", "a.zip", "a"]
)
def test_files_that_could_hold_code_or_a_pickle(name: str) -> None:
    with pytest.raises(BundleError, match="could hold code or a pickle"):
        parse_manifest(name_a_file(name))


def test_manifest_beyond_what_any_model_needs() -> None:
    files = tuple(BundleFile(f"f{number}.json", 1, "ab" * 32) for number in range(70))
    with pytest.raises(BundleError, match="at most 64 and 1024"):
        parse_manifest(build_manifest(files=files).to_bytes())
    with pytest.raises(BundleError, match="at most 64 and 1024"):
        parse_manifest(build_manifest(stack=stack * 300).to_bytes())
    large = BundleFile("tokenizer.json", 2**30, "ab" * 32)
    with pytest.raises(BundleError, match="accepted of a tokenizer's file"):
        parse_manifest(build_manifest(files=(large,)).to_bytes())


def test_manifest_file_of_ten_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / manifest_name).open("wb") as stream:
        stream.truncate(10 * 2**30)
    with pytest.raises(BundleError, match="10,737,418,240 bytes"):
        read_manifest(tmp_path)


def test_header_of_tensors_beyond_any_model(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(BundleError, match=r"header of 1,099,511,627,776 bytes"):
        read_tensors(path)


@pytest.mark.parametrize("name", [manifest_name, weight_files[0]])
def test_a_file_named_twice_and_the_manifest_itself(name: str) -> None:
    with pytest.raises(BundleError, match="a file twice, or itself"):
        parse_manifest(name_a_file(name))


@pytest.mark.parametrize("num_bytes", [-1, 2**44, 1.5, "7", None])
def test_sizes_that_are_none(num_bytes: Any) -> None:
    with pytest.raises(BundleError, match="the size"):
        parse_manifest(altered(lambda raw: raw["files"][0].update(num_bytes=num_bytes)))


@pytest.mark.parametrize("sha256", ["", "AB" * 32, "ab" * 31, "../" * 10, None])
def test_digests_that_are_none(sha256: Any) -> None:
    with pytest.raises(BundleError, match="is no SHA-256"):
        parse_manifest(altered(lambda raw: raw["files"][0].update(sha256=sha256)))


@pytest.mark.parametrize("missing", weight_files)
def test_missing_weight_file_is_named(missing: str) -> None:
    files = tuple(file for file in valid_files if file.name != missing)
    with pytest.raises(BundleError, match=f"lacks {missing}"):
        parse_manifest(build_manifest(files=files).to_bytes())


@pytest.mark.parametrize("wrong", [(), (StackEntry("head", 0, 0, 0),)])  # type: ignore[arg-type]
def test_stack_that_is_empty_or_has_an_unknown_role(wrong: tuple[StackEntry, ...]) -> None:
    with pytest.raises(BundleError, match="stack"):
        parse_manifest(build_manifest(files=valid_files, stack=wrong).to_bytes())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("config", [1]),
        ("num_blocks", "4"),
        ("dtype", None),
        ("model_type", {"a": 1}),
        ("versions", "1"),
    ],
)
def test_fields_of_another_type(field: str, value: Any) -> None:
    with pytest.raises(BundleError):
        parse_manifest(altered(lambda raw: raw.update({field: value})))


@pytest.mark.parametrize(("field", "value"), [("index", "../0"), ("index", -1), ("first_block", None), ("role", 3)])
def test_stack_entries_of_another_type(field: str, value: Any) -> None:
    with pytest.raises(BundleError):
        parse_manifest(altered(lambda raw: raw["stack"][0].update({field: value})))


def test_verify_accepts_what_was_described(tmp_path: Path) -> None:
    manifest = write_random_bundle(tmp_path / "b")
    verify_files(tmp_path / "b", manifest)
    assert read_manifest(tmp_path / "b", digest=manifest.digest) == manifest


@pytest.mark.parametrize("position", [0, 1234, 2499])
def test_verify_finds_one_flipped_bit(tmp_path: Path, position: int) -> None:
    manifest = write_random_bundle(tmp_path / "b", sizes=(1000, 2500, 10))
    path = tmp_path / "b" / "emulator.safetensors"
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"emulator\.safetensors does not have the digest.*fetch it again"):
        verify_files(tmp_path / "b", manifest)


def test_verify_finds_a_missing_and_a_longer_file(tmp_path: Path) -> None:
    manifest = write_random_bundle(tmp_path / "b")
    longer = tmp_path / "b" / "adapter.safetensors"
    longer.write_bytes(longer.read_bytes() + b"\0")
    with pytest.raises(BundleError, match=r"adapter\.safetensors does not have"):
        verify_files(tmp_path / "b", manifest)
    longer.unlink()
    with pytest.raises(BundleError, match=r"lacks adapter\.safetensors"):
        verify_files(tmp_path / "b", manifest)


def test_directory_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        read_manifest(tmp_path)


def test_describe_leaves_out_manifest_and_directories(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"abc")
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / manifest_name).write_bytes(b"{}")
    (tmp_path / "sub").mkdir()
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert describe_files(tmp_path) == (BundleFile("a.txt", 0, empty), BundleFile("b.txt", 3, abc))


def test_tensors_are_read_back(tmp_path: Path) -> None:
    tensors = {"bottom.0.w": torch.arange(6.0).view(2, 3).bfloat16(), "top.0.b": torch.tensor([1], dtype=torch.int64)}
    save_file(tensors, tmp_path / "t.safetensors")
    read = read_tensors(tmp_path / "t.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"\xff" * 100, b"not tensors"])
def test_unreadable_tensor_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(BundleError, match=r"t\.safetensors is not a readable safetensors file"):
        read_tensors(tmp_path / "t.safetensors")


def test_missing_tensor_file(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"t\.safetensors"):
        read_tensors(tmp_path / "t.safetensors")


def test_adapter_prefixes_follow_the_placement() -> None:
    assert adapter_prefixes(stack) == ("bottom.0.", "top.0.")
    assert adapter_prefixes(stack, placement="bottom") == ("bottom.0.",)
    assert adapter_prefixes(stack, placement="top") == ("top.0.",)


def test_how_the_tokenizer_was_loaded_does_not_change_the_digest(tmp_path: Path) -> None:
    digests = set()
    for offline in (False, True):
        tokenizer = byte_tokenizer()
        tokenizer.init_kwargs["local_files_only"] = offline
        manifest = write_bundle(
            tmp_path / str(offline),
            model=build_family_model("llama"),
            tokenizer=tokenizer,
            stack=plan_stack(num_blocks=num_blocks, bottom=2, top=2, kept=[3], bridged=False),
            bridges={},
            compression="uniform",
        )
        digests.add(manifest.digest)
    assert len(digests) == 1
