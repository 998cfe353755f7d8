"""Settings under which private training must give what another way of training gives."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from ot_federated.data_owner.differential_privacy import train_privately
from ot_federated.data_owner.per_example_gradients import engine_names
from ot_federated.secure_random import SecureRandom
from ot_federated.tasks.language_model import example_losses
from ot_federated.training import OptimizerSettings, StepReport, TrainingResult, train
from tests.examples import build_examples
from tests.families import build_family_model

num_steps = 5
optimizer = OptimizerSettings(learning_rate=1e-3, lr_schedule="cosine", warmup_fraction=0.25, weight_decay=0.1)
schedule: dict[str, Any] = {"num_steps": num_steps, "first_step": 1, "total_steps": 8}


examples = build_examples([(9, 2), (14, 3), (6, 4), (11, 2), (14, 3), (7, 4)])


def trained_part(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".0." in name or ".7." in name}


def train_with_noise(model: Any, **others: Any) -> TrainingResult:
    """Train with settings that are private, except where ``others`` say so; the same noise every time."""
    private = {
        "sample_rate": 0.5,
        "noise_multiplier": 1.0,
        "max_grad_norm": 0.5,
        "engine": "loop",
        "micro_batch_size": 4,
        "optimizer": optimizer,
    }
    with pytest.warns(UserWarning, match="test_seed"):
        random = SecureRandom(test_seed=b"invariants")
    return train_privately(model, trained_part(model), examples, random=random, **(schedule | private | others))


@pytest.mark.parametrize("engine", engine_names)
@pytest.mark.parametrize("proximal_mu", [0.0, 2.0])
# No families whose keys have a bias: its gradient is zero but for rounding, and AdamW blows rounding up.
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_without_noise_and_clipping_it_is_plain_training(family: str, proximal_mu: float, engine: str) -> None:
    plain, private = build_family_model(family), build_family_model(family)
    start = {name: parameter.detach() + 0.001 for name, parameter in trained_part(plain).items()}
    expected = train(
        plain,
        trained_part(plain),
        examples,
        start=start,
        batches=iter([list(range(len(examples)))] * num_steps),
        optimizer=replace(optimizer, proximal_mu=proximal_mu),
        max_grad_norm=0.0,
        **schedule,
    )
    found = train_with_noise(
        private,
        start=start,
        sample_rate=1.0,
        noise_multiplier=0.0,
        max_grad_norm=math.inf,
        engine=engine,
        optimizer=replace(optimizer, proximal_mu=proximal_mu),
    )
    # Together the steps move a weight by about 3e-3. AdamW divides a gradient by its own size, so where that is
    # near zero the last bits of the forward pass decide: a hundredth of the movement is allowed.
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=4e-5)
    moved = max(float((found.weights[name] - start[name]).abs().max()) for name in start)
    assert moved > 1e-3


@pytest.mark.parametrize("engine", engine_names)
def test_engines_and_micro_batches_agree(engine: str) -> None:
    """Catches plain accumulation and noise for every micro-batch, over whole trajectories with noise."""
    expected = train_with_noise(build_family_model("llama"))
    for micro_batch_size in (1, 2, 6):
        found = train_with_noise(build_family_model("llama"), engine=engine, micro_batch_size=micro_batch_size)
        for name, weight in expected.weights.items():
            # Noise is of the gradient's size here, so that AdamW has no division by nearly nothing.
            torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=1e-6)


class Normed(nn.Module):
    """A feed-forward part behind a batch norm, whose running mean moves when it is in training mode."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.norm = nn.BatchNorm1d(32)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.inner(self.norm(hidden_states.transpose(1, 2)).transpose(1, 2))
        return normed


def digest(state: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        total.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


@pytest.mark.parametrize("engine", engine_names)
def test_frozen_weights_and_buffers_stay(engine: str) -> None:
    """Catches buffers that move (a frozen batch norm counts private batches, without clipping or noise)."""
    model: Any = build_family_model("llama")
    model.model.layers[4].mlp = Normed(model.model.layers[4].mlp).eval()
    trained = trained_part(model)

    def frozen() -> dict[str, torch.Tensor]:
        everything = dict(model.named_buffers()) | dict(model.named_parameters())
        return {name: tensor.detach() for name, tensor in everything.items() if name not in trained}

    before = digest(frozen())
    assert "model.layers.4.mlp.norm.running_mean" in frozen()
    train_with_noise(model, engine=engine)
    assert digest(frozen()) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_last_step_is_returned(dtype: torch.dtype) -> None:
    """Catches a checkpoint chosen by a private score: the weights are those in the model, after the last step."""
    model = build_family_model("llama", dtype=dtype)
    seen: list[torch.Tensor] = []
    losses: list[float] = []
    name = "model.layers.7.mlp.up_proj.weight"
    parameter = model.get_parameter(name)

    def note(_: StepReport) -> None:
        seen.append(parameter.detach().clone())
        with torch.no_grad():
            losses.append(float(example_losses(model, examples)[0].mean()))

    # So much noise that a private score would choose another step than the last.
    result = train_with_noise(model, noise_multiplier=20.0, on_step=note)
    assert min(losses) < losses[-1]
    assert len(seen) == num_steps
    assert result.weights[name].dtype == torch.float32
    assert torch.equal(result.weights[name].to(dtype), seen[-1])
    assert torch.equal(seen[-1], model.get_parameter(name).detach())
    assert not torch.equal(seen[-1], seen[-2])
