"""The training loop on a real model against a plain loop with torch.optim.AdamW and transformers' own loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ot_federated.training import OptimizerSettings, train
from tests.examples import build_examples
from tests.families import build_family_model

num_steps = 6


examples = build_examples([(9, 2), (14, 3), (6, 4), (11, 2), (14, 3), (7, 4)])
batches = [[0, 1], [2, 3, 4], [5], [1, 0], [4, 2, 3], [5, 0, 1]]


def loss_by_transformers(model: Any, batch: list[int]) -> torch.Tensor:
    """Return the mean over examples of each one's own mean over target tokens, one forward pass an example."""
    losses = []
    for index in batch:
        ids = torch.tensor([examples[index].input_ids])
        labels = ids.clone()
        labels[:, : examples[index].num_context] = -100
        losses.append(model(input_ids=ids, labels=labels).loss)
    return torch.stack(losses).mean()


def train_plainly(model: Any, parameters: dict[str, nn.Parameter], *, proximal_mu: float) -> list[float]:
    model.requires_grad_(False)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, weight_decay=0.1)
    # Two of six steps warm up, then linear to zero.
    factors = [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4]
    losses = []
    for factor, batch in zip(factors, batches, strict=True):
        optimizer.zero_grad()
        loss = loss_by_transformers(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        for name, parameter in parameters.items():
            parameter.grad += proximal_mu * (parameter.detach() - start[name])
        optimizer.param_groups[0]["lr"] = 1e-3 * factor
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("proximal_mu", [0.0, 2.0])
# No families whose keys have a bias: its gradient is zero but for rounding, and AdamW blows rounding up.
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_training_is_plain_adamw(family: str, proximal_mu: float) -> None:
    def trained_part(model: Any) -> dict[str, nn.Parameter]:
        return {name: p for name, p in model.named_parameters() if ".7." in name or ".0." in name}

    plain, ours = build_family_model(family), build_family_model(family)
    start = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    losses = train_plainly(plain, trained_part(plain), proximal_mu=proximal_mu)
    reported: list[float] = []
    result = train(
        ours,
        trained_part(ours),
        examples,
        batches=iter(batches),
        num_steps=num_steps,
        total_steps=num_steps,
        optimizer=OptimizerSettings(
            learning_rate=1e-3,
            lr_schedule="linear",
            warmup_fraction=1 / 3,
            weight_decay=0.1,
            proximal_mu=proximal_mu,
        ),
        max_grad_norm=1.0,
        on_step=lambda step: reported.append(step.loss),
    )
    torch.testing.assert_close(torch.tensor(reported), torch.tensor(losses))
    # Together the steps move a weight by about 3.5e-3. AdamW divides a gradient by its own size, so where that is
    # near zero the last bits of the forward pass decide: a hundredth of the movement is allowed, its sign is not.
    for name, parameter in trained_part(plain).items():
        torch.testing.assert_close(result.weights[name], parameter.detach(), rtol=0, atol=4e-5)
        assert torch.equal(dict(ours.named_parameters())[name], result.weights[name])
    moved = max(float((result.weights[name] - start[name]).abs().max()) for name in result.weights)
    assert moved > 2e-3
    frozen = {name: tensor for name, tensor in ours.state_dict().items() if name not in result.weights}
    assert all(torch.equal(tensor, start[name]) for name, tensor in frozen.items())


def test_proximal_term_matters_here() -> None:
    """Guards the test above: with and without it the plain loops differ by more than its tolerance."""
    ends = []
    for mu in (0.0, 2.0):
        model = build_family_model("llama")
        parameters = {name: p for name, p in model.named_parameters() if ".7." in name}
        train_plainly(model, parameters, proximal_mu=mu)
        ends.append(torch.cat([p.detach().flatten() for p in parameters.values()]))
    assert float((ends[0] - ends[1]).abs().max()) > 1e-4
