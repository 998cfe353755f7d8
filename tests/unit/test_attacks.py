"""Attacks: the published pins, scores by hand, and that each finds what is there and nothing where nothing is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from ot_federated.attacks.canaries import make_canaries, measure_exposure, summarise_exposure
from ot_federated.attacks.membership import (
    area_under_curve,
    judge_attack,
    measure_signals,
    membership_scores,
    roc_curve,
)
from ot_federated.attacks.one_run_audit import audit_one_run, audit_with_best, bound_epsilon
from ot_federated.attacks.token_recovery import measure_random_spans, recover_tokens
from ot_federated.errors import DataError
from ot_federated.tasks.base import Example
from ot_federated.tasks.language_model import example_losses
from tests.families import build_family_model


@pytest.mark.parametrize(
    ("num_examples", "num_guesses", "num_right", "delta", "bound"),
    [
        # From an implementation of the paper's formula that agrees with JAX-Privacy's to 3e-18.
        (1000, 100, 100, 0, 3.4930),
        (1000, 100, 100, 1e-5, 3.4654),
        (1000, 100, 80, 0, 0.9584),
        (1000, 1000, 750, 1e-5, 0.9764),
        (5000, 500, 400, 1e-5, 1.1952),
        (100, 100, 90, 0, 1.6308),
        (100, 20, 20, 0, 1.8227),
    ],
)
def test_bound_of_the_one_run_audit(
    num_examples: int, num_guesses: int, num_right: int, delta: float, bound: float
) -> None:
    found = bound_epsilon(num_examples=num_examples, num_guesses=num_guesses, num_right=num_right, delta=delta)
    assert found == pytest.approx(bound, abs=1e-4)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_bound_holds_for_randomised_response(epsilon: float) -> None:
    """Each coin is told truly with the chance that epsilon allows: the bound is too high in at most 5 % of runs."""
    rng, too_high, num_runs = np.random.default_rng(0), 0, 300
    largest = 0.0
    for _ in range(num_runs):
        included = rng.random(200) < 0.5
        told = included ^ (rng.random(200) > 1 / (1 + np.exp(-epsilon)))
        audit = audit_one_run(told + 0.1 * rng.random(200), included, delta=0.0)
        too_high += audit.epsilon_lower_bound > epsilon
        largest = max(largest, audit.epsilon_lower_bound)
    assert too_high / num_runs <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / num_runs)
    assert largest > epsilon / 3  # and it is no bound of zero that holds for everything


def test_several_scores_share_the_error() -> None:
    included = np.arange(200) % 2 == 0
    perfect, blind = included.astype(float), np.zeros(200)
    both = audit_with_best({"blind": blind, "perfect": perfect}, included, delta=0.0)
    alone = audit_one_run(perfect, included, delta=0.0)
    assert both["score"] == "perfect"
    assert 0 < both["epsilon_lower_bound"] < alone.epsilon_lower_bound


@pytest.mark.parametrize(
    ("scores", "included", "reason"),
    [
        (np.zeros(20), np.zeros(19, bool), "do not go with"),
        (np.full(20, np.nan), np.zeros(20, bool), "not a number"),
        (np.zeros(9), np.zeros(9, bool), "at least 10"),
    ],
)
def test_audit_refuses_what_it_cannot_judge(scores: np.ndarray, included: np.ndarray, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        audit_one_run(scores, included, delta=0.0)


def test_area_and_rates_are_those_of_brute_force() -> None:
    rng = np.random.default_rng(1)
    scores, included = rng.integers(0, 30, 300) / 10 + 0.0, rng.random(300) < 0.4
    members, others = scores[included], scores[~included]
    pairs = (members[:, None] > others).mean() + 0.5 * (members[:, None] == others).mean()
    assert area_under_curve(members, others)[0] == pytest.approx(pairs)
    result = judge_attack(scores, included)
    best = max((members > threshold).mean() for threshold in scores if (others > threshold).mean() <= 0.01)
    assert result["tpr_at_1%"] == pytest.approx(best)
    # One in a thousand of so few non-members is not even one.
    assert result["tpr_at_0.1%"] is None
    assert result["tpr_at_0.1%_interval"] is None
    false_positives, true_positives = roc_curve(scores, included)
    assert np.trapezoid(true_positives, false_positives) == pytest.approx(pairs)


def test_interval_of_the_area_covers_the_truth() -> None:
    rng, covered = np.random.default_rng(2), 0
    for _ in range(200):
        _, low, high = area_under_curve(rng.normal(1, 1, 80), rng.normal(0, 1, 60))
        covered += low <= 0.7602 <= high  # Phi(1 / sqrt(2))
    assert covered >= 180


def test_signals_are_the_losses_of_the_task() -> None:
    model = build_family_model("llama")
    examples = [Example(tuple(range(3, 3 + length)), length - 2) for length in (5, 9, 4)]
    signals = measure_signals(model, examples)
    with torch.no_grad():
        losses, _ = example_losses(model, examples)
    np.testing.assert_allclose(signals.loss, losses.numpy(), rtol=1e-5)
    assert (signals.min_k < -signals.loss + 10).all()


def test_members_that_were_learned_are_found() -> None:
    rng = np.random.default_rng(3)
    included = rng.random(400) < 0.5
    before = rng.normal(3, 1, 400)

    def signals(loss: np.ndarray) -> object:
        return type("Signals", (), {"loss": loss, "min_k": -2 * loss})()

    after = before - 0.5 - 1.5 * included + rng.normal(0, 0.3, 400)
    scores = membership_scores(signals(after), signals(before), population=np.flatnonzero(~included)[:40])  # type: ignore[arg-type]
    areas = {name: judge_attack(values, included)["auc"] for name, values in scores.items()}
    assert areas["reference"] > 0.99
    assert areas["reference"] > areas["loss"] > 0.7
    assert areas["rmia"] > 0.8


def test_exposure_of_a_remembered_and_of_an_unknown_canary() -> None:
    included = np.array([True, True, False, False, False])
    scores = np.array([9.0, 0.0, 1.0, 2.0, 3.0])
    np.testing.assert_allclose(measure_exposure(scores, included), [2.0, 0.0])
    chance = summarise_exposure(np.random.default_rng(0).normal(size=4000), np.arange(4000) % 2 == 0)
    assert chance["mean_bits"] == pytest.approx(chance["chance_bits"], abs=0.1)


def test_canaries_of_each_kind() -> None:
    examples = [Example((5, 6, 7, 8), 3), Example((5, 6, 9), 2)]
    rng = np.random.default_rng(0)
    assert make_canaries(examples, kind="natural", vocabulary_size=50, rng=rng) == examples
    wrong = make_canaries(examples, kind="mislabelled", vocabulary_size=50, rng=rng)
    assert [canary.input_ids for canary in wrong] == [(5, 6, 7, 9), (5, 6, 8)]
    drawn = make_canaries(examples, kind="random", vocabulary_size=50, rng=rng)
    assert [canary.input_ids[canary.num_context :] for canary in drawn] == [(8,), (9,)]
    assert drawn[0].input_ids[:3] != (5, 6, 7)


def gradient_of_first_attention(model: torch.nn.Module, tokens: list[int]) -> dict[str, torch.Tensor]:
    """Return the gradient of the first block's attention inputs on one example."""
    model.zero_grad()
    losses, _ = example_losses(model, [Example(tuple(tokens), 1)])  # type: ignore[arg-type]
    losses.sum().backward()
    attention = model.model.layers[0].self_attn  # type: ignore[union-attr,index]
    return {name: getattr(attention, name).weight.grad for name in ("q_proj", "k_proj", "v_proj")}  # type: ignore[union-attr]


def test_tokens_are_read_from_a_plain_gradient_and_not_from_a_noisy_one() -> None:
    model = build_family_model("llama")
    tokens = [17, 40, 99, 200, 3]
    update = gradient_of_first_attention(model, tokens)
    attention = model.model.layers[0].self_attn
    modules = {name: getattr(attention, name) for name in update}
    plain = recover_tokens(model, update, modules, tokens_used=tokens[:-1])
    assert plain["recovered"] >= 0.75  # the last token is predicted, never read
    assert not plain["at_chance"]
    torch.manual_seed(0)
    noisy = {name: change + torch.randn_like(change) * 100 * change.abs().max() for name, change in update.items()}
    result = recover_tokens(model, noisy, modules, tokens_used=tokens[:-1])
    assert result["at_chance"]
    assert result["recovered"] <= 0.25


def test_chance_is_what_random_spans_find() -> None:
    """Where used tokens share a direction, a random span finds many of them, or none."""
    torch.manual_seed(0)
    unit = functional.normalize(torch.randn(400, 16), dim=1)
    used = np.arange(400) < 40
    share, (low, high), (auc_low, auc_high) = measure_random_spans(unit, used, rank=4)
    assert share == pytest.approx(0.1, abs=0.03)
    assert 0 <= low < share < high < 0.3
    assert auc_low < 0.5 < auc_high
    unit[:40] = functional.normalize(unit[:40] * 0.2 + unit[0], dim=1)
    _, (_, high), (_, auc_high_alike) = measure_random_spans(unit, used, rank=4)
    assert high > 0.4
    assert auc_high_alike > auc_high


def test_no_span_no_recovery() -> None:
    model = build_family_model("llama")
    layer = model.model.layers[0].self_attn.q_proj
    with pytest.raises(DataError, match="no span"):
        recover_tokens(model, {"q": torch.zeros_like(layer.weight)}, {"q": layer}, tokens_used=[1])
