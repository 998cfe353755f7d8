"""Apple's GPUs have no float64: what is summed or solved in it has to leave the device first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from ot_federated.attacks.similarity import linear_cka
from ot_federated.attacks.token_recovery import row_span
from ot_federated.data_owner.differential_privacy import add_noise
from ot_federated.model_owner import head_start
from ot_federated.model_owner.compression import bridge_fitting, calibration, cka_clusters
from ot_federated.secure_random import SecureRandom
from tests.families import build_family_model


class Remote(torch.Tensor):
    """A tensor on a stand-in for such a device, computed on the CPU.

    As there, float64 cannot be made, tensors of two devices do not meet, but for scalars, and ``cpu()`` is the way out.
    """

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function == torch.Tensor.device.__get__:  # type: ignore[attr-defined]  # a getter
            return torch.device("meta")
        leaves = pytree.tree_leaves((args, kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) and not isinstance(leaf, cls) and leaf.dim() for leaf in leaves):
            raise RuntimeError(f"{function}: tensors of two devices")
        with torch._C.DisableTorchFunctionSubclass():
            args, kwargs = pytree.tree_map_only(cls, on_the_cpu, (args, kwargs or {}))
            found = function(*args, **kwargs)
        if function == torch.Tensor.cpu or not any(
            isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(found)
        ):
            return found
        return pytree.tree_map_only(torch.Tensor, on_the_device, found)


def on_the_cpu(tensor: torch.Tensor) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor)  # type: ignore[no-any-return]  # torch does not annotate it


def on_the_device(tensor: torch.Tensor) -> Remote:
    if tensor.dtype == torch.float64:
        raise TypeError("This device has no float64.")
    return tensor.as_subclass(Remote)


def remote(*shape: int) -> Remote:
    return on_the_device(torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))))


def test_the_stand_in_is_such_a_device() -> None:
    tensor = remote(3, 4)
    assert tensor.device.type == "meta"
    with pytest.raises(TypeError, match="no float64"):
        tensor.double()
    with pytest.raises(TypeError, match="no float64"):
        torch.zeros_like(tensor, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="two devices"):
        tensor + torch.ones(3, 4)
    assert torch.equal((2 * tensor).cpu(), 2 * on_the_cpu(tensor))
    assert tensor.cpu().double().dtype == torch.float64
    assert tensor.sum().item() == on_the_cpu(tensor).sum().item()


def test_noise_is_added_on_the_cpu() -> None:
    sums: list[torch.Tensor] = [remote(3, 4), remote(5)]
    with pytest.warns(UserWarning, match="test_seed"):
        random, again = SecureRandom(test_seed=b"device"), SecureRandom(test_seed=b"device")
    # The result goes back to the sums' device, which the stand-in is only for its own tensors.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.Tensor, "to", lambda tensor, device: on_the_device(tensor) if str(device) == "meta" else tensor
        )
        noisy = add_noise(sums, noise_multiplier=1.5, max_grad_norm=0.5, random=random)
    for found, total in zip(noisy, sums, strict=True):
        normals = torch.from_numpy(again.draw_normals(total.numel())).view(total.shape)
        assert isinstance(found, Remote)
        assert torch.equal(on_the_cpu(found), (on_the_cpu(total).double() + 0.75 * normals).float())


@pytest.fixture
def states_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every block's states be on the device, while the model is not."""
    plain = calibration.block_states

    def states(*arguments: Any) -> Iterator[dict[int, tuple[torch.Tensor, torch.Tensor]]]:
        for found in plain(*arguments):
            yield {index: (on_the_device(before), on_the_device(after)) for index, (before, after) in found.items()}

    monkeypatch.setattr(calibration, "block_states", states)
    monkeypatch.setattr(cka_clusters, "block_states", states)
    moments = bridge_fitting._sum_moments
    monkeypatch.setattr(
        bridge_fitting, "_sum_moments", lambda before, after: moments(on_the_device(before), on_the_device(after))
    )


windows = torch.arange(64).view(4, 16) + 4


@pytest.mark.usefixtures("states_on_the_device")
def test_calibration_sums_and_solves_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_family_model("llama")
    found = [
        calibration.block_influence(model, windows),
        bridge_fitting.fit_bridges(model, windows, [(2, 4)], ridge=1e-3),
        bridge_fitting.fit_low_rank_bridges(model, windows, [(2, 4)], ridge=1e-3, rank=2),
        cka_clusters.block_similarity(model, windows, first=1, last=5),
    ]
    monkeypatch.undo()
    expected = [
        calibration.block_influence(model, windows),
        bridge_fitting.fit_bridges(model, windows, [(2, 4)], ridge=1e-3),
        bridge_fitting.fit_low_rank_bridges(model, windows, [(2, 4)], ridge=1e-3, rank=2),
        cka_clusters.block_similarity(model, windows, first=1, last=5),
    ]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_attacks_compute_on_the_cpu() -> None:
    assert linear_cka(remote(8, 4), remote(8, 4)) == pytest.approx(1.0)
    span = row_span(remote(6, 4), max_rank=2)
    assert not isinstance(span, Remote)
    assert span.shape == (4, 2)


def test_a_heads_inputs_leave_the_device_first(monkeypatch: pytest.MonkeyPatch) -> None:
    head = torch.nn.Identity()
    monkeypatch.setattr(head_start, "find_head", lambda *_: head)
    monkeypatch.setattr(head_start, "class_logits", lambda model, batch: head(remote(len(batch), 4)))
    features = head_start.compute_features(build_family_model("llama"), [None] * 3)  # type: ignore[list-item]  # unread
    assert (features.dtype, features.shape) == (torch.float64, (3, 4))
    assert not isinstance(features, Remote)
