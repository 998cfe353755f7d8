"""Bridges and block influence against direct computation from transformers' own hidden states."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ot_federated.architectures import find_architecture, get_blocks
from ot_federated.errors import DataError
from ot_federated.model_owner.compression.bridge_fitting import fit_bridges
from ot_federated.model_owner.compression.calibration import block_influence, tokenise_public_text
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


def solve_ridge(x: np.ndarray, after: np.ndarray, *, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Fit after - x ~ W x + b by weighted least squares, the penalty as additional rows, which numpy solves by SVD."""
    weight = 1 / np.mean(after**2, axis=1)
    y = after - x
    mean_x, mean_y = (np.average(part, axis=0, weights=weight) for part in (x, y))
    root = np.sqrt(weight)[:, None]
    centred_x, centred_y = root * (x - mean_x), root * (y - mean_y)
    penalty = ridge * np.mean(np.sum(centred_x**2, axis=0))
    rows_x = np.vstack([centred_x, np.sqrt(penalty) * np.eye(x.shape[1])])
    rows_y = np.vstack([centred_y, np.zeros((x.shape[1], y.shape[1]))])
    matrix = np.linalg.lstsq(rows_x, rows_y, rcond=None)[0].T
    return matrix, mean_y - matrix @ mean_x


def hidden_states_behind(
    model: Any, gap: tuple[int, int], bridge: tuple[torch.Tensor, torch.Tensor]
) -> list[np.ndarray]:
    """Return each block's input where a bridge stands for the blocks of a gap."""
    first, last = gap
    blocks = get_blocks(model, find_architecture(model.config))
    inputs: list[torch.Tensor] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])

    def replace(_: Any, _args: Any, output: Any) -> Any:
        bridged = inputs[0] + inputs[0] @ bridge[0].T + bridge[1]
        return (bridged, *output[1:]) if isinstance(output, tuple) else bridged

    handles = [
        blocks[first].register_forward_pre_hook(note, with_kwargs=True),
        blocks[last].register_forward_hook(replace),
    ]
    try:
        return hidden_states(model)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("ridge", [0.01, 1.0])
@pytest.mark.parametrize("family", families)
def test_bridges_are_the_ridge_regression(family: str, ridge: float) -> None:
    """The second bridge is fitted to what the first one leaves it, and to the full model's states behind it."""
    model = build_family_model(family)
    gaps = [(1, 1), (3, 5)]
    bridges = fit_bridges(model, windows, gaps, ridge=ridge)
    assert bridges.keys() == {0, 1}
    full = hidden_states(model)
    emulated = [full, hidden_states_behind(model, gaps[0], bridges[0])]
    for number, (first, last) in enumerate(gaps):
        x, after = (states.reshape(-1, full[0].shape[-1]) for states in (emulated[number][first], full[last + 1]))
        # Products are summed in fp32 over 96 tokens, then in fp64; 1e-3 of the largest entry is their error
        # times the condition number, which the ridge keeps below about 1000.
        for found, expected in zip(bridges[number], solve_ridge(x, after, ridge=ridge), strict=True):
            np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-3 * np.abs(expected).max())


def test_without_a_penalty_it_is_weighted_least_squares() -> None:
    model = build_family_model("llama")
    states = hidden_states(model)
    x, after = (states[index].reshape(-1, 32) for index in (2, 4))
    (found,) = fit_bridges(model, windows, [(2, 3)], ridge=0.0).values()
    root = 1 / np.sqrt(np.mean(after**2, axis=1))[:, None]
    design = np.hstack([x, np.ones((len(x), 1))])
    solution = np.linalg.lstsq(root * design, root * (after - x), rcond=None)[0]
    # A penalty of 1e-6 always remains, so the fit is compared and not the weights.
    predicted = x @ found[0].double().numpy().T + found[1].double().numpy()
    residual, least = root * (predicted - (after - x)), root * (design @ solution - (after - x))
    assert np.mean(least**2) <= np.mean(residual**2) * (1 + 1e-9)
    assert np.mean(residual**2) == pytest.approx(np.mean(least**2), rel=1e-4)
    assert np.mean(residual**2) < 0.9 * np.var(root * (after - x))


def test_a_token_of_enormous_states_does_not_decide_the_fit() -> None:
    """Some models' first token has states a thousand times larger than others: unweighted, it is all that is fitted."""
    model = build_family_model("llama")
    (plain,) = fit_bridges(model, windows, [(2, 3)], ridge=0.01).values()
    with torch.no_grad():
        model.get_input_embeddings().weight[4] *= 1000.0
    with_giant = windows.clone()
    with_giant[:, 0] = 4
    (found,) = fit_bridges(model, with_giant, [(2, 3)], ridge=0.01).values()
    x, after = (states[:, 1:].reshape(-1, 32) for states in (hidden_states(model)[2], hidden_states(model)[4]))

    def error(bridge: tuple[torch.Tensor, torch.Tensor]) -> float:
        residual = x + x @ bridge[0].double().numpy().T + bridge[1].double().numpy() - after
        return float(np.mean(residual**2) / np.mean((after - x) ** 2))

    assert error(found) < 1.5 * error(plain)


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
