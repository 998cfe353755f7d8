"""Bridges and block influence against direct computation from transformers' own hidden states."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ot_federated.errors import DataError
from ot_federated.model_owner.compression.calibration import block_influence, fit_bridges, tokenise_public_text
from tests.families import build_family_model, byte_tokenizer

# 7 windows: the last batch of two is not full.
windows = torch.randint(4, 260, (7, 48), generator=torch.Generator().manual_seed(0))
# One family of each kind: rotary, learned positions, blocks that return tuples, post-norms.
families = ("llama", "gpt2", "bloom", "opt", "gemma2", "gpt_neox")


def hidden_states(model: Any) -> list[np.ndarray]:
    """Return each block's input on all windows at once, in fp64; the last entry is behind the final norm."""
    with torch.no_grad():
        output = model(input_ids=windows, output_hidden_states=True, use_cache=False)
    return [states.double().numpy() for states in output.hidden_states]


def solve_ridge(x: np.ndarray, y: np.ndarray, *, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Fit y ~ W x + b by least squares with the penalty as additional rows, which numpy solves by SVD."""
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    penalty = ridge * np.mean(np.sum(centred_x**2, axis=0))
    rows_x = np.vstack([centred_x, np.sqrt(penalty) * np.eye(x.shape[1])])
    rows_y = np.vstack([centred_y, np.zeros((x.shape[1], y.shape[1]))])
    weight = np.linalg.lstsq(rows_x, rows_y, rcond=None)[0].T
    return weight, y.mean(0) - weight @ x.mean(0)


@pytest.mark.parametrize("ridge", [0.01, 1.0])
@pytest.mark.parametrize("family", families)
def test_bridges_are_the_ridge_regression(family: str, ridge: float) -> None:
    model = build_family_model(family)
    states = hidden_states(model)
    gaps = [(1, 1), (3, 5)]
    bridges = fit_bridges(model, windows, gaps, ridge=ridge)
    assert bridges.keys() == {0, 1}
    for number, (first, last) in enumerate(gaps):
        x, after = (states[index].reshape(-1, states[0].shape[-1]) for index in (first, last + 1))
        weight, bias = solve_ridge(x, after - x, ridge=ridge)
        # Products are summed in fp32 over 96 tokens, then in fp64; 1e-3 of the largest entry is their error
        # times the condition number, which the ridge keeps below about 1000.
        for found, expected in zip(bridges[number], (weight, bias), strict=True):
            np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-3 * np.abs(expected).max())


def test_without_a_penalty_it_is_ordinary_least_squares() -> None:
    model = build_family_model("llama")
    states = hidden_states(model)
    x, after = (states[index].reshape(-1, 32) for index in (2, 4))
    (found,) = fit_bridges(model, windows, [(2, 3)], ridge=0.0).values()
    design = np.hstack([x, np.ones((len(x), 1))])
    solution = np.linalg.lstsq(design, after - x, rcond=None)[0]
    # A penalty of 1e-6 always remains, so the fit is compared and not the weights.
    predicted = x @ found[0].double().numpy().T + found[1].double().numpy()
    residual, least = predicted - (after - x), design @ solution - (after - x)
    assert np.mean(least**2) <= np.mean(residual**2) * (1 + 1e-9)
    assert np.mean(residual**2) == pytest.approx(np.mean(least**2), rel=1e-4)
    assert np.mean(residual**2) < 0.9 * np.var(after - x)


def test_a_bridge_over_a_linear_stretch_is_exact() -> None:
    """Blocks that add a constant are a bridge of zero weight and that constant."""
    model = build_family_model("opt")
    constant = torch.linspace(-1, 1, 32)
    with torch.no_grad():
        for index in (3, 4):
            block = model.model.decoder.layers[index]
            block.self_attn.out_proj.weight.zero_()
            block.self_attn.out_proj.bias.zero_()
            block.fc2.weight.zero_()
            block.fc2.bias.copy_(constant)
    ((weight, bias),) = fit_bridges(model, windows, [(3, 4)], ridge=0.01).values()
    # y = h_out - h_in is subtracted in fp32 where h is about 10.
    torch.testing.assert_close(weight, torch.zeros(32, 32), rtol=0, atol=1e-4)
    torch.testing.assert_close(bias, 2 * constant, rtol=0, atol=1e-4)


def test_fewer_tokens_than_dimensions_still_have_a_solution() -> None:
    (found,) = fit_bridges(build_family_model("llama"), windows[:1, :8], [(2, 3)], ridge=0.01).values()
    assert all(torch.isfinite(tensor).all() for tensor in found)


def test_bridges_have_the_models_type() -> None:
    (found,) = fit_bridges(build_family_model("llama", dtype=torch.bfloat16), windows, [(2, 3)], ridge=0.01).values()
    assert [tensor.dtype for tensor in found] == [torch.bfloat16] * 2


@pytest.mark.parametrize("family", families)
def test_influence_is_one_minus_the_cosine(family: str) -> None:
    model = build_family_model(family)
    states = hidden_states(model)
    even = windows[:6]  # batches of equal size, so that the mean of their means is the mean
    found = block_influence(model, even)
    assert len(found) == 8
    for index in range(7):  # behind block 8 transformers gives the normed states only
        before, after = (states[i][:6].reshape(-1, states[0].shape[-1]) for i in (index, index + 1))
        cosine = (before * after).sum(1) / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1)
        # Cosines near 1 are subtracted from 1 in fp32.
        assert found[index] == pytest.approx(1 - cosine.mean(), abs=1e-6)


def test_influence_weighs_every_token_alike() -> None:
    model = build_family_model("llama")
    per_window = [block_influence(model, window[None]) for window in windows]
    expected = np.mean(per_window, axis=0)
    assert block_influence(model, windows) == pytest.approx(list(expected), abs=1e-6)


def test_a_block_that_does_nothing_has_no_influence() -> None:
    model = build_family_model("llama")
    with torch.no_grad():
        model.model.layers[4].self_attn.o_proj.weight.zero_()
        model.model.layers[4].mlp.down_proj.weight.zero_()
    influence = block_influence(model, windows)
    assert influence[4] == pytest.approx(0.0, abs=1e-6)
    assert min(influence[:4] + influence[5:]) > 1e-3


def test_no_hook_stays_behind() -> None:
    model = build_family_model("llama")
    block_influence(model, windows[:2])
    assert not any(block._forward_hooks for block in model.model.layers)


def test_public_text_becomes_windows_from_its_beginning() -> None:
    texts = [" abcdefgh ", "ijklmnop", "never read " * 50]
    found = tokenise_public_text(byte_tokenizer(), texts, num_tokens=18, max_positions=6)
    assert found.shape == (3, 6)
    assert byte_tokenizer().decode(found.flatten()) == "abcdefgh\n\nijklmnop"


def test_public_text_that_is_too_short_names_the_remedy() -> None:
    with pytest.raises(DataError, match=r"5 tokens, less than one window of 512.*offsite\.gaps=empty"):
        tokenise_public_text(byte_tokenizer(), ["abc"], num_tokens=2048, max_positions=2048)
