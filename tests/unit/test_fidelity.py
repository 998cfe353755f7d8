"""Predictors of an emulator: exact where it keeps everything, and against direct computation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ot_federated.bundle import Manifest
from ot_federated.emulated_model import load_emulated_model
from ot_federated.model_owner.compression.fidelity import Fidelity, measure_fidelity
from ot_federated.model_owner.splitting import plan_stack, write_bundle
from tests.families import build_family_model, byte_tokenizer, num_blocks

windows = torch.randint(4, 260, (3, 24), generator=torch.Generator().manual_seed(0))


def measure(directory: Path, family: str, *, bottom: int, top: int, kept: list[int]) -> tuple[Fidelity, Manifest]:
    model = build_family_model(family)
    stack = plan_stack(num_blocks=num_blocks, bottom=bottom, top=top, kept=kept, bridged=False)
    manifest = write_bundle(
        directory, model=model, tokenizer=byte_tokenizer(), stack=stack, bridges={}, compression="test"
    )
    return measure_fidelity(model, load_emulated_model(directory, manifest), manifest, windows), manifest


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_an_emulator_that_keeps_all_is_exact(family: str, tmp_path: Path) -> None:
    found, _ = measure(tmp_path / "b", family, bottom=2, top=2, kept=[2, 3, 4, 5])
    assert found.output_error == 0.0
    assert found.loss == found.full_loss
    assert (found.bottom_cosine, found.top_cosine) == (pytest.approx(1.0), pytest.approx(1.0))


def test_an_emulator_that_drops_blocks(tmp_path: Path) -> None:
    found, manifest = measure(tmp_path / "b", "llama", bottom=2, top=2, kept=[3])
    model, emulated = build_family_model("llama"), load_emulated_model(tmp_path / "b", manifest)
    expected, gradients = [], []
    for one, behind, name in ((model, 6, "model.layers.7"), (emulated, 3, "model.layers.4")):
        parameters = [p.requires_grad_(True) for n, p in one.named_parameters() if n.startswith(name)]
        output = one(input_ids=windows, output_hidden_states=True, use_cache=False)
        loss = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
        expected.append((output.hidden_states[behind].detach(), float(loss.detach())))
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    (ours, full_loss), (theirs, loss_) = expected
    error = ((theirs - ours).square().sum(-1) / ours.square().sum(-1)).mean()
    assert found.output_error == pytest.approx(float(error), rel=1e-5)
    assert found.full_loss == pytest.approx(full_loss, rel=1e-5)
    assert found.loss == pytest.approx(loss_, rel=1e-5)
    assert found.top_cosine is not None
    assert 0 < found.top_cosine < 1


@pytest.mark.parametrize(("bottom", "top"), [(0, 2), (2, 0)])
def test_one_side_alone(bottom: int, top: int, tmp_path: Path) -> None:
    found, _ = measure(tmp_path / "b", "llama", bottom=bottom, top=top, kept=[])
    assert (found.bottom_cosine is None) == (bottom == 0)
    assert (found.top_cosine is None) == (top == 0)
    assert found.output_error > 0
