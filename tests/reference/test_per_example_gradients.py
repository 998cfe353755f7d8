"""Every engine on every family against single examples, transformers' own loss and torch's own autograd.

Also what the self-check finds: each test of it puts one mistake into a model or a loss.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
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
from tests.families import build_family_model, family_names


def build_examples() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 1), (31, 3), (9, 8), (9, 2), (17, 3)]
    return [
        Example(tuple(torch.randint(4, 260, (length,), generator=generator).tolist()), num) for length, num in shapes
    ]


examples = build_examples()


def trained_part(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the first and the last block: what an adapter is."""
    return {name: p for name, p in model.named_parameters() if ".0." in name or ".7." in name}


def flatten(sums: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.flatten().double() for part in sums])


def single_gradient(model: Any, parameters: Mapping[str, nn.Parameter], example: Example) -> torch.Tensor:
    """Return one example's gradient by transformers' own loss."""
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    ids = torch.tensor([example.input_ids])
    labels = ids.clone()
    labels[:, : example.num_context] = -100
    gradients = torch.autograd.grad(model(input_ids=ids, labels=labels).loss, list(parameters.values()))
    model.requires_grad_(False)
    return flatten(gradients)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("engine", engine_names)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", family_names)
def test_clipped_sum_is_that_of_single_examples(family: str, tied: bool, engine: str) -> None:
    """Brute equality and remove-one sensitivity, at a bound that clips every example and at one that clips some."""
    model = build_family_model(family, tied=tied)
    parameters = trained_part(model)
    singles = [single_gradient(model, parameters, example) for example in examples]
    norms = sorted(float(single.norm()) for single in singles)
    with open_clipped_gradients(model, parameters, engine=engine, micro_batch_size=3) as gradients:
        for bound in (0.1 * norms[0], norms[2]):
            expected = sum(single * min(1.0, bound / float(single.norm())) for single in singles)
            total = flatten(gradients.sum(examples, max_grad_norm=bound))
            assert relative_error(total, expected) < 1e-5  # type: ignore[arg-type]
            without = flatten(gradients.sum(examples[:1] + examples[2:], max_grad_norm=bound))
            assert float((total - without).norm()) <= bound * (1 + 1e-5)


@pytest.mark.parametrize("family", family_names)
def test_bfloat16_gradients_are_close_and_bounded(family: str) -> None:
    """hooks within the self-check's margins; loop's influence is C whatever the type; ghost refuses."""
    model = build_family_model(family, dtype=torch.bfloat16)
    parameters = trained_part(model)
    found = check_per_example_gradients(model, parameters, engine="hooks", max_grad_norm=0.1)
    assert found.max_error < 0.1
    assert found.max_influence < 1.01
    assert check_per_example_gradients(model, parameters, engine="loop", max_grad_norm=0.1).max_influence < 1 + 1e-5
    with pytest.raises(PrivacyError, match=r"model\.dtype=float32"):
        check_per_example_gradients(model, parameters, engine="ghost", max_grad_norm=0.1)


@pytest.mark.parametrize("engine", engine_names)
def test_micro_batches_do_not_matter(engine: str) -> None:
    """Catches plain accumulation: the clipped sum over micro-batches is that of the whole batch."""
    model = build_family_model("llama")
    sums = []
    for size in (1, 2, 3, 5, 64):
        with open_clipped_gradients(model, trained_part(model), engine=engine, micro_batch_size=size) as gradients:
            sums.append(flatten(gradients.sum(examples, max_grad_norm=5.0)))
            # Nothing is left over from the batch before.
            torch.testing.assert_close(flatten(gradients.sum(examples, max_grad_norm=5.0)), sums[-1])
            assert not flatten(gradients.sum([], max_grad_norm=5.0)).any()
    for total in sums[1:]:
        assert relative_error(total, sums[0]) < 1e-5


@pytest.mark.parametrize("engine", engine_names)
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_model_is_left_as_it_was(family: str, engine: str) -> None:
    model = build_family_model(family)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    hooks = {name: len(m._forward_hooks) + len(m._backward_hooks) for name, m in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def check() -> None:
        assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
        assert {name: len(m._forward_hooks) + len(m._backward_hooks) for name, m in model.named_modules()} == hooks
        assert all(not vars(parameter) and parameter.grad is None for parameter in model.parameters())
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())

    parameters = trained_part(model)
    with open_clipped_gradients(model, parameters, engine=engine, micro_batch_size=2) as gradients:
        assert list(model.state_dict()) == list(state)
        gradients.sum(examples, max_grad_norm=1.0)
    check()

    def interrupt() -> None:
        with open_clipped_gradients(model, parameters, engine=engine, micro_batch_size=2):
            example_losses(model, examples)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    check()


@pytest.mark.parametrize("engine", engine_names)
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_dropout_is_off(family: str, engine: str) -> None:
    model = build_family_model(family)
    expected = flatten_sum(model, engine="loop")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.5
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.5
    assert relative_error(flatten_sum(model, engine=engine), expected) < 1e-5


def flatten_sum(model: Any, *, engine: str, batch: Sequence[Example] = examples) -> torch.Tensor:
    with open_clipped_gradients(model, trained_part(model), engine=engine, micro_batch_size=64) as gradients:
        return flatten(gradients.sum(batch, max_grad_norm=5.0))


@pytest.mark.parametrize("do_layer_norm_before", [True, False])
def test_opt_without_reshape_gives_equal_logits(do_layer_norm_before: bool) -> None:
    model: Any = build_family_model("opt")
    for layer in model.model.decoder.layers:
        layer.do_layer_norm_before = do_layer_norm_before
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    plain = model(input_ids=ids, attention_mask=mask).logits
    with per_example_gradients._opt_without_reshape(model):
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, plain)
        cached = model.generate(ids[:1], max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(ids[:1], max_new_tokens=4, do_sample=False), cached)


@pytest.mark.parametrize("engine", ["hooks", "ghost"])
def test_opt_with_reshape_is_refused(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches tokens taken for examples."""
    monkeypatch.setattr(per_example_gradients, "_opt_without_reshape", lambda model: contextlib.nullcontext())
    model = build_family_model("opt")
    with pytest.raises(PrivacyError, match=r"opt model.*privacy\.engine=loop"):
        check_per_example_gradients(model, trained_part(model), engine=engine, max_grad_norm=1.0)


@pytest.mark.parametrize("engine", engine_names)
def test_example_with_infinite_gradient_counts_nothing(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches nan in the sum, which would tell that the example was there."""

    def losses(model: Any, batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        values, counts = example_losses(model, batch)
        bad = torch.tensor([math.inf if example is examples[2] else 1.0 for example in batch])
        return values * bad, counts

    model = build_family_model("llama")
    expected = flatten_sum(model, engine=engine, batch=examples[:2] + examples[3:])
    monkeypatch.setattr(per_example_gradients, "example_losses", losses)
    assert relative_error(flatten_sum(model, engine=engine), expected) < 1e-5
    assert not flatten_sum(model, engine=engine, batch=[examples[2]]).any()


def test_clip_factors_by_hand() -> None:
    norms = torch.tensor([0.0, 0.5, 2.0, 8.0, math.inf, math.nan])
    flat = clip_factors(norms, max_grad_norm=2.0, clipping="flat")
    torch.testing.assert_close(flat, torch.tensor([1.0, 1.0, 1.0, 0.25, 0.0, 0.0]))
    automatic = clip_factors(norms, max_grad_norm=2.0, clipping="automatic")
    torch.testing.assert_close(automatic, torch.tensor([200.0, 2 / 0.51, 2 / 2.01, 2 / 8.01, 0.0, 0.0]))
    assert float(clip_factors(torch.tensor(3.0), max_grad_norm=math.inf, clipping="flat")) == 1.0


def test_norms_of_large_tensors_are_exact() -> None:
    """Catches torch's vector_norm, which comes out 5e-4 too small here: the clipped gradient would exceed C."""
    gradients = torch.randn(1, 12_000_000, generator=torch.Generator().manual_seed(0))
    exact = float(gradients.double().square().sum())
    assert abs(float(per_example_gradients._squared_norms(gradients)) / exact - 1) < 1e-6


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
        (2e-3, 1.0, False),
        (0.0, 1 + 2e-5, False),
        (math.nan, 1.0, False),
        (0.0, math.nan, False),
        (0.2, 0.5, False),  # the least of the mistakes below
    ],
)
def test_rounding_is_told_from_mistakes(max_error: float, max_influence: float, allowed: bool) -> None:
    model = build_family_model("llama")
    measured = SelfCheck(max_error=max_error, max_influence=max_influence)
    with contextlib.nullcontext() if allowed else pytest.raises(PrivacyError, match=r"Set privacy\.engine=loop"):
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


Mistake = Callable[[Any, pytest.MonkeyPatch], None]
mistakes: list[Mistake] = [use_weight_functionally, use_weight_twice, take_the_batch_mean, add_trained_positions]


@pytest.mark.parametrize(
    ("engine", "dtype"), [("hooks", torch.float32), ("hooks", torch.bfloat16), ("ghost", torch.float32)]
)
@pytest.mark.parametrize("mistake", mistakes)
def test_self_check_refuses(mistake: Mistake, engine: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_family_model("llama", dtype=dtype)
    check_per_example_gradients(model, trained_part(model), engine=engine, max_grad_norm=1.0)
    mistake(model, monkeypatch)
    parameters = trained_part(model)
    if "positions" in dict(model.named_children()):
        model.positions.to(dtype)
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
        per_example_gradients, "clip_factors", lambda norms, **settings: 1.00005 * clip_factors(norms, **settings)
    )
    with pytest.raises(PrivacyError, match=r"1\.00005 C"):
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
