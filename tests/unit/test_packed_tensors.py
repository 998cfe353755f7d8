"""Packing: what comes back, how far it is from what went in, how many bytes it takes, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ot_federated.bundle import PackedTensor
from ot_federated.errors import BundleError
from ot_federated.packed_tensors import group_size, pack, unpack


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sizes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def round_trip(tensor: torch.Tensor, transport: str) -> torch.Tensor:
    arrays, packed = pack({"w": tensor}, transport=transport)
    (back,) = unpack(arrays, packed, dtype=tensor.dtype).values()
    return back


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 200),
    transport=st.sampled_from(["as-is", "bfloat16", "float16", "int8", "int4"]),
    zeros=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_every_form_comes_back_close(rows: int, columns: int, transport: str, zeros: float, seed: int) -> None:
    tensor = matrix(rows, columns, seed=seed)
    tensor[torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < zeros] = 0
    back = round_trip(tensor, transport)
    assert back.shape == tensor.shape
    assert back.dtype == tensor.dtype
    assert torch.equal(back[tensor == 0], tensor[tensor == 0])
    # Half a step and a rounded scale, of a largest number of 4 or 5; int4 may also clip it, by at most 35 %.
    allowed = {"as-is": 0.0, "bfloat16": 0.02, "float16": 0.002, "int8": 0.06, "int4": 1.5}[transport]
    assert float((back - tensor).abs().max()) <= allowed


@pytest.mark.parametrize(("transport", "error", "bits"), [("int8", 0.009, 8.25), ("int4", 0.11, 4.25)])
def test_error_and_size_of_quantised_weights(transport: str, error: float, bits: float) -> None:
    tensor = matrix(64, 4 * group_size)
    relative = float((round_trip(tensor, transport) - tensor).norm() / tensor.norm())
    # Uniform codes of 127 or 7 steps over the largest of 64 normal numbers (2.4 deviations on average).
    assert 0.3 * error < relative < error
    arrays, _ = pack({"w": tensor}, transport=transport)
    assert sizes(arrays) * 8 / tensor.numel() == bits


def test_codes_by_hand() -> None:
    tensor = torch.zeros(1, group_size)
    tensor[0, :3] = torch.tensor([7.0, -7.0, 3.0])
    assert torch.equal(round_trip(tensor, "int4"), tensor)


def test_vectors_stay_exact_and_alone() -> None:
    tensors = {"norm": matrix(33), "w": matrix(4, 33)}
    arrays, packed = pack(tensors, transport="int4")
    assert arrays["norm"] is tensors["norm"]
    assert [entry.name for entry in packed] == ["w"]
    assert pack({"w": matrix(4, 33)}, transport="as-is")[1] == ()


@pytest.mark.parametrize("transport", ["as-is", "int8"])
def test_zeros_are_not_stored(transport: str) -> None:
    tensor = matrix(128, 128).to(torch.bfloat16)
    tensor[matrix(128, 128, seed=1) < 0] = 0
    arrays, packed = pack({"w": tensor}, transport=transport)
    forms = [entry.form for entry in packed]
    assert forms == (["sparse"] if transport == "as-is" else ["sparse", "int8"])
    share = sizes(arrays) / (tensor.numel() * 2)
    # Half of the values and a bit each, of 16 or 8.25 bits.
    assert share == pytest.approx(0.5 + 1 / 16 if transport == "as-is" else 0.5 * 8.25 / 16 + 1 / 16, abs=0.01)
    if transport == "as-is":
        assert torch.equal(round_trip(tensor, transport), tensor)


@pytest.mark.parametrize(
    "damage",
    [
        lambda arrays, entry: (arrays | {"w.codes": arrays["w.codes"][:2]}, entry),
        lambda arrays, entry: (arrays | {"w.codes": arrays["w.codes"].float()}, entry),
        lambda arrays, entry: (arrays | {"w.scales": arrays["w.scales"][:, :1]}, entry),
        lambda arrays, entry: ({"w.codes": arrays["w.codes"]}, entry),
        lambda arrays, entry: (arrays, replace(entry, shape=(4, 100_000))),
        lambda arrays, entry: (arrays, replace(entry, shape=(5, 130))),
        lambda arrays, entry: (arrays, replace(entry, form="sparse")),
    ],
    ids=["rows", "type", "groups", "missing", "columns", "more rows", "form"],
)
def test_what_does_not_fit_is_refused(damage: object) -> None:
    arrays, (entry,) = pack({"w": matrix(4, 130)}, transport="int8")
    arrays, entry = damage(arrays, entry)  # type: ignore[operator]
    with pytest.raises(BundleError, match="w"):
        unpack(arrays, (entry,), dtype=torch.float32)


def test_a_mask_of_another_size_is_refused() -> None:
    tensor = torch.eye(16)
    arrays, _ = pack({"w": tensor}, transport="as-is")
    with pytest.raises(BundleError, match="does not fit its shape"):
        unpack(arrays, (PackedTensor("w", "sparse", (16, 32)),), dtype=torch.float32)
