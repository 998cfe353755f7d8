"""What the self-check of per-example gradients finds: each test puts one mistake into a model or a loss."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from ot_federated.data_owner import per_example_gradients
from ot_federated.data_owner.per_example_gradients import (
    PrivacyError,
    clip_factors,
    engine_names,
    open_clipped_gradients,
)
from ot_federated.data_owner.privacy_self_check import SelfCheck, check_per_example_gradients, judge
from ot_federated.errors import ConfigError
from ot_federated.tasks.base import Example
from ot_federated.tasks.language_model import example_losses
from tests.families import build_family_model
from tests.reference.gradient_parts import examples, flatten, single_gradient, trained_part


@pytest.mark.parametrize("engine", engine_names)
def test_automatic_clipping_bounds_influence_by_c(engine: str) -> None:
    model = build_family_model("llama")
    found = check_per_example_gradients(
        model, trained_part(model), engine=engine, max_grad_norm=0.7, clipping="automatic"
    )
    assert found.max_error < 1e-5
    assert 0.9 < found.max_influence < 1


def test_unknown_names_are_refused() -> None:
    model = build_family_model("llama")
    with pytest.raises(ConfigError, match="did you mean 'hooks'"):
        check_per_example_gradients(model, trained_part(model), engine="hook", max_grad_norm=1.0)
    with pytest.raises(ConfigError, match="did you mean 'automatic'"):
        clip_factors(torch.ones(1), max_grad_norm=1.0, clipping="automatc")


@pytest.mark.parametrize("engine", engine_names)
def test_self_check_leaves_the_model(engine: str) -> None:
    model = build_family_model("llama")
    zero = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    zero.data.zero_()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = check_per_example_gradients(model, trained_part(model), engine=engine, max_grad_norm=1.0)
    assert found.max_error < 1e-5
    assert abs(found.max_influence - 1) < 1e-5
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("max_error", "max_influence", "allowed"),
    [
        (1.7e-4, 1 + 2.5e-6, True),  # SmolLM2-135M in float32: rounding, as float64 shows
        (6e-4, 1.0, False),
        (0.0, 1 + 6e-5, False),
        (math.nan, 1.0, False),
        (0.0, math.nan, False),
        (0.2, 0.5, False),  # the least of the mistakes below
    ],
)
def test_rounding_is_told_from_mistakes(max_error: float, max_influence: float, allowed: bool) -> None:
    model = build_family_model("llama")
    measured = SelfCheck(max_error=max_error, max_influence=max_influence)
    for engine in ("hooks", "ghost"):
        with contextlib.nullcontext() if allowed else pytest.raises(PrivacyError, match=r"Set privacy\.engine=loop"):
            judge(model, trained_part(model), measured, engine=engine)


def test_only_loop_has_a_margin_below_float32() -> None:
    model = build_family_model("llama", dtype=torch.bfloat16)
    measured = SelfCheck(max_error=0.01, max_influence=1.001)
    judge(model, trained_part(model), measured, engine="loop")
    with pytest.raises(PrivacyError, match=r"allowed: 0\.0005"):
        judge(model, trained_part(model), measured, engine="hooks")


def use_weight_functionally(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = model.model.layers[0].mlp

    def forward(x: torch.Tensor) -> torch.Tensor:
        return mlp.down_proj(mlp.act_fn(functional.linear(x, mlp.gate_proj.weight)) * mlp.up_proj(x))

    monkeypatch.setattr(mlp, "forward", forward)


def use_weight_twice(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through its layer, and beside it: gradients of the right shape, with a part missing."""
    mlp = model.model.layers[0].mlp

    def forward(x: torch.Tensor) -> torch.Tensor:
        gate = mlp.gate_proj(x) + functional.linear(x, mlp.gate_proj.weight)
        return mlp.down_proj(mlp.act_fn(gate) * mlp.up_proj(x))

    monkeypatch.setattr(mlp, "forward", forward)


def take_the_batch_mean(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over the batch's target tokens, as transformers' own loss with a batch of labels has it."""

    def losses(model: Any, batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        values, counts = example_losses(model, batch)
        return values * counts * len(batch) / counts.sum(), counts

    monkeypatch.setattr(per_example_gradients, "example_losses", losses)


def add_trained_positions(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Position embeddings of one row, which the batch shares by broadcasting."""
    model.positions = nn.Embedding(64, 32)
    block = model.model.layers[7]
    plain = block.forward

    def forward(hidden_states: torch.Tensor, *arguments: Any, **others: Any) -> Any:
        added = model.positions(torch.arange(hidden_states.shape[1])[None])
        return plain(hidden_states + added, *arguments, **others)

    monkeypatch.setattr(block, "forward", forward)


def look_at_the_padding(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An example's loss depends a little on its company: nothing is wrong where all are of one length."""

    def losses(model: Any, batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        values, counts = example_losses(model, batch)
        longest = max(example.length for example in batch)
        padding = torch.tensor([longest - example.length for example in batch])
        return values * (1 + 0.002 * padding), counts

    monkeypatch.setattr(per_example_gradients, "example_losses", losses)


def look_at_the_size(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An example's loss depends a little on how many share its micro-batch."""

    def losses(model: Any, batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        values, counts = example_losses(model, batch)
        return values * (1 + 0.005 * (len(batch) == 2)), counts

    monkeypatch.setattr(per_example_gradients, "example_losses", losses)


Mistake = Callable[[Any, pytest.MonkeyPatch], None]
mistakes: list[Mistake] = [
    use_weight_functionally,
    use_weight_twice,
    take_the_batch_mean,
    add_trained_positions,
    look_at_the_padding,
    look_at_the_size,
]


@pytest.mark.parametrize("engine", ["hooks", "ghost"])
@pytest.mark.parametrize("mistake", mistakes)
def test_self_check_refuses(mistake: Mistake, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_family_model("llama")
    check_per_example_gradients(model, trained_part(model), engine=engine, max_grad_norm=1.0)
    mistake(model, monkeypatch)
    parameters = trained_part(model)
    if "positions" in dict(model.named_children()):
        parameters["positions.weight"] = model.positions.weight
    with pytest.raises(PrivacyError, match=r"^The client refuses to train.*llama model.*privacy\.engine=loop"):
        check_per_example_gradients(model, parameters, engine=engine, max_grad_norm=1.0)
    # The remedy that the message names holds.
    check_per_example_gradients(model, parameters, engine="loop", max_grad_norm=1.0)


@pytest.mark.parametrize("engine", ["hooks", "ghost"])
@pytest.mark.parametrize("mistake", [use_weight_functionally, add_trained_positions])
def test_training_itself_refuses_missing_rows(mistake: Mistake, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an engine that relies on the self-check alone."""
    model: Any = build_family_model("llama")
    mistake(model, monkeypatch)
    parameters = trained_part(model)
    if mistake is add_trained_positions:
        parameters["positions.weight"] = model.positions.weight
    with (
        open_clipped_gradients(model, parameters, engine=engine, micro_batch_size=64) as gradients,
        pytest.raises(PrivacyError, match=r"no gradient for each example of .*privacy\.engine=loop"),
    ):
        gradients.sum(examples, max_grad_norm=1.0)


def test_self_check_sees_a_bound_that_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a clip that is a little off, with the right direction and a plausible size."""
    model = build_family_model("llama")
    monkeypatch.setattr(
        per_example_gradients, "clip_factors", lambda norms, **settings: 1.0001 * clip_factors(norms, **settings)
    )
    with pytest.raises(PrivacyError, match=r"1\.0001 C"):
        check_per_example_gradients(model, trained_part(model), engine="loop", max_grad_norm=1.0)


class LowRank(nn.Module):
    """LoRA: a frozen layer with a trained product of two small ones; the second starts at zero."""

    def __init__(self, base: nn.Module, *, rank: int = 2, functional_a: bool = False) -> None:
        super().__init__()
        self.base = base
        self.lora_a = nn.Linear(32, rank, bias=False)
        self.lora_b = nn.Linear(rank, 32, bias=False)
        nn.init.zeros_(self.lora_b.weight)
        self.functional_a = functional_a

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = functional.linear(x, self.lora_a.weight) + self.lora_a(x) if self.functional_a else self.lora_a(x)
        return self.base(x) + self.lora_b(low)


@pytest.mark.parametrize("engine", engine_names)
@pytest.mark.parametrize("functional_a", [False, True])
def test_low_rank_layers_are_checked_where_they_start_at_zero(functional_a: bool, engine: str) -> None:
    """Catches a check at the start values alone, where A has no gradient and a mistake in it does not show."""
    model: Any = build_family_model("llama")
    torch.manual_seed(0)
    for layer in (model.model.layers[0], model.model.layers[7]):
        layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj, functional_a=functional_a)
    parameters = {name: parameter for name, parameter in model.named_parameters() if "lora" in name}
    if functional_a and engine != "loop":
        with pytest.raises(PrivacyError):
            check_per_example_gradients(model, parameters, engine=engine, max_grad_norm=1.0)
    else:
        assert check_per_example_gradients(model, parameters, engine=engine, max_grad_norm=1.0).max_error < 1e-4
    assert not model.get_parameter("model.layers.0.self_attn.q_proj.lora_b.weight").any()


def test_nothing_to_check_is_refused() -> None:
    model = build_family_model("llama")
    with pytest.raises(PrivacyError, match="no trained weight has a gradient"):
        check_per_example_gradients(model, {"other": nn.Parameter(torch.ones(3))}, engine="loop", max_grad_norm=1.0)


def test_token_mean_can_exceed_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows that the batch's token mean is no harmless variant: one example moves the sum by more than C."""
    model = build_family_model("llama")
    take_the_batch_mean(model, monkeypatch)
    batch = [examples[2]] * 4 + [examples[1]]
    bound = 0.9 * float(single_gradient(model, trained_part(model), examples[2]).norm())
    with open_clipped_gradients(model, trained_part(model), engine="hooks", micro_batch_size=64) as gradients:
        total = flatten(gradients.sum(batch, max_grad_norm=bound))
        without = flatten(gradients.sum(batch[:-1], max_grad_norm=bound))
    assert float((total - without).norm()) > 2.5 * bound
