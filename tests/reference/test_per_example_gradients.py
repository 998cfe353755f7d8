"""Every engine on every family against single examples, transformers' own loss and torch's own autograd."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from ot_federated.data_owner import per_example_gradients
from ot_federated.data_owner.per_example_gradients import (
    PrivacyError,
    clip_factors,
    engine_names,
    open_clipped_gradients,
)
from ot_federated.data_owner.privacy_self_check import check_per_example_gradients
from ot_federated.tasks.base import Example
from ot_federated.tasks.language_model import example_losses
from tests.families import build_family_model, family_names
from tests.reference.gradient_parts import examples, flatten, relative_error, single_gradient, trained_part


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
def test_loop_is_exact_below_float32(family: str) -> None:
    model = build_family_model(family, dtype=torch.bfloat16)
    found = check_per_example_gradients(model, trained_part(model), engine="loop", max_grad_norm=0.1)
    assert found.max_error < 1e-6
    assert found.max_influence < 1 + 1e-6


@pytest.mark.parametrize("engine", ["hooks", "ghost"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("part", ["all", "trained", "frozen"])
def test_examples_are_batched_in_float32_alone(part: str, dtype: torch.dtype, engine: str) -> None:
    """Catches gradients that change by a percent with the company: of weights in float32 too, on a frozen base."""
    model = build_family_model("llama", dtype=dtype if part == "all" else torch.float32)
    parameters = trained_part(model)
    trained = {id(parameter) for parameter in parameters.values()}
    for parameter in model.parameters():
        if part != "all" and (id(parameter) in trained) == (part == "trained"):
            parameter.data = parameter.data.to(dtype)
    with (
        pytest.raises(PrivacyError, match=rf"engine={engine} .* in {str(dtype)[6:]} .*float32, or set .*engine=loop"),
        open_clipped_gradients(model, parameters, engine=engine, micro_batch_size=4),
    ):
        pass
    assert not any(parameter.requires_grad for parameter in model.parameters())


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
