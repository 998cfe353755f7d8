from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from flwr.app import Array
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ot_federated.errors import ProtocolError
from ot_federated.messages import decode_update, encode_update, read_array

shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
# Within float16's range, so that no difference overflows.
values = st.floats(-1000, 1000, width=32)


def float32(shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float32, shape, elements=values)


pairs = shapes.flatmap(lambda shape: st.tuples(float32(shape), float32(shape)))


@given(tensors=st.dictionaries(st.text(min_size=1, max_size=8), pairs, max_size=3), bf16_reference=st.booleans())
@pytest.mark.parametrize(("dtype", "bits"), [("float32", 24), ("float16", 11), ("bfloat16", 8)])
def test_update_round_trips_within_its_type(
    dtype: str, bits: int, tensors: dict[str, tuple[np.ndarray, np.ndarray]], bf16_reference: bool
) -> None:
    weights = {name: torch.from_numpy(new) for name, (new, _) in tensors.items()}
    reference = {name: torch.from_numpy(old) for name, (_, old) in tensors.items()}
    if bf16_reference:  # a bundle's weights are often bfloat16
        reference = {name: tensor.bfloat16() for name, tensor in reference.items()}
    record = encode_update(weights, reference, dtype=dtype)
    decoded = decode_update(record, reference, dtype=dtype)
    assert decoded.keys() == weights.keys()
    for name, tensor in weights.items():
        difference = tensor.double() - reference[name].double()
        # Half a unit in the last place of the difference (two roundings: to fp32, then to the type), float16's
        # smallest step for subnormals, and half a unit of the fp32 sum.
        allowed = difference.abs() * 2.0 ** -(bits - 1) + 2.0**-24 + tensor.abs().double() * 2.0**-23
        assert decoded[name].shape == tensor.shape
        assert decoded[name].dtype == torch.float32
        assert ((decoded[name].double() - tensor.double()).abs() <= allowed).all()


@given(tensors=st.dictionaries(st.text(min_size=1, max_size=8), pairs, max_size=3))
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_untouched_adapter_arrives_bit_for_bit(
    dtype: str, tensors: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    weights = {name: torch.from_numpy(array) for name, (array, _) in tensors.items()}
    decoded = decode_update(encode_update(weights, weights, dtype=dtype), weights, dtype=dtype)
    assert all(torch.equal(decoded[name], tensor) for name, tensor in weights.items())


def as_npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


honest = as_npy(np.arange(6, dtype=np.float32).reshape(2, 3))


@given(st.data())
def test_an_altered_payload_is_read_as_the_right_shape_or_refused(data: st.DataObject) -> None:
    payload = bytearray(honest)
    for _ in range(data.draw(st.integers(1, 4))):
        # The first 128 bytes are the header: that is where surprises come from.
        payload[data.draw(st.integers(0, 127))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(payload)))
    array = Array(
        dtype="float32", shape=(2, 3), stype="numpy.ndarray", data=bytes(payload[:cut] if cut % 2 else payload)
    )
    try:
        values = read_array(array, name="w", dtype=np.dtype("float32"), shape=(2, 3))
    except ProtocolError:
        return
    assert values.dtype == np.float32
    assert values.shape == (2, 3)
