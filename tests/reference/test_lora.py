"""LoRA against PEFT, for every family: merged, unmerged, and as a PEFT directory; FFA-LoRA's mean is exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from ot_federated.bundle import read_tensors
from ot_federated.emulated_model import load_emulated_model
from ot_federated.model_owner.delivery import deliver_lora
from ot_federated.model_owner.plug_in import plugged_in
from ot_federated.model_owner.splitting import plan_stack, write_bundle
from ot_federated.tuning import Tuning, initial_a, merge, prepare_tuning, start_state, uses_conv1d
from tests.families import build_family_model, byte_tokenizer, family_names, num_blocks

ids = torch.tensor([[5, 9, 200, 33, 7, 41], [8, 100, 3, 77, 12, 4]])


def build(tmp_path: Path, family: str, *, kept: list[int]):
    model = build_family_model(family)
    stack = plan_stack(num_blocks=num_blocks, bottom=2, top=1, kept=kept, bridged=False)
    directory = tmp_path / "bundle"
    manifest = write_bundle(
        directory, model=model, tokenizer=byte_tokenizer(), stack=stack, bridges={}, compression="uniform+empty"
    )
    return model, directory, manifest


def random_state(parameters, *, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.2 * torch.randn(p.shape, generator=generator) for name, p in parameters.items()}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(ids).logits


@pytest.mark.parametrize("freeze_a", [False, True], ids=["lora", "ffa"])
@pytest.mark.parametrize("family", family_names)
def test_merged_plug_in_equals_the_unmerged_model_and_the_peft_directory(
    family: str, freeze_a: bool, tmp_path: Path
) -> None:
    # All middle blocks are kept, so the emulated model with LoRA inside is the full model, unmerged.
    model, directory, manifest = build(tmp_path, family, kept=[2, 3, 4, 5, 6])
    tuning = Tuning(method="lora", lora_r=3, lora_alpha=5.0, freeze_a=freeze_a, seed=4)
    unmerged = load_emulated_model(directory, manifest)
    parameters = prepare_tuning(unmerged, manifest, tuning)
    before = logits(model)
    assert torch.equal(logits(unmerged), before)  # B starts at zero
    state = random_state(parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])
    base = read_tensors(directory / "adapter.safetensors")
    adapter = merge(state, base, tuning, conv1d=uses_conv1d(model))
    with plugged_in(model, adapter, manifest.stack) as plugged:
        after = logits(plugged)
    assert (after - before).abs().max() > 1e-2
    # Merging adds in another order than running A and B does.
    torch.testing.assert_close(after, logits(unmerged), rtol=1e-4, atol=1e-4)
    description = {"base_model": "x"}
    deliver_lora(
        tmp_path / "peft", model=model, state=state, stack=manifest.stack, tuning=tuning, description=description
    )
    loaded = PeftModel.from_pretrained(model, str(tmp_path / "peft"))
    torch.testing.assert_close(logits(loaded), after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("placement", ["bottom", "top"])
def test_only_the_placed_blocks_train_and_change(placement: str, tmp_path: Path) -> None:
    _, directory, manifest = build(tmp_path, "llama", kept=[3])
    tuning = Tuning(method="lora", placement=placement)
    parameters = prepare_tuning(load_emulated_model(directory, manifest), manifest, tuning)
    assert parameters
    assert all(name.startswith(f"{placement}.") for name in parameters)
    adapter = merge(random_state(parameters), read_tensors(directory / "adapter.safetensors"), tuning, conv1d=False)
    assert all(name.startswith(f"{placement}.") for name in adapter)


def test_all_parties_start_from_the_same_numbers(tmp_path: Path) -> None:
    _, directory, manifest = build(tmp_path, "llama", kept=[3])
    base = read_tensors(directory / "adapter.safetensors")
    starts = []
    for torch_seed in (1, 2):
        torch.manual_seed(torch_seed)
        tuning = Tuning(method="lora", seed=9)
        starts.append(
            start_state(prepare_tuning(load_emulated_model(directory, manifest), manifest, tuning), base, tuning)
        )
    assert starts[0].keys() == starts[1].keys()
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    name = next(name for name in starts[0] if "lora_A" in name)
    assert not torch.equal(starts[0][name], initial_a(name, starts[0][name].shape, seed=10))


def test_the_mean_of_ffa_states_is_the_mean_of_their_changes_and_of_lora_states_is_not(tmp_path: Path) -> None:
    _, directory, manifest = build(tmp_path, "llama", kept=[3])
    base = read_tensors(directory / "adapter.safetensors")
    errors = {}
    for freeze_a in (True, False):
        tuning = Tuning(method="lora", freeze_a=freeze_a)
        parameters = prepare_tuning(load_emulated_model(directory, manifest), manifest, tuning)
        states = [random_state(parameters, seed=seed) for seed in (1, 2)]
        mean = {name: (states[0][name] + states[1][name]) / 2 for name in parameters}
        merged = [merge(state, base, tuning, conv1d=False) for state in (*states, mean)]
        errors[freeze_a] = max(
            float(((merged[0][name] + merged[1][name]) / 2 - merged[2][name]).abs().max()) for name in merged[2]
        )
    assert errors[True] < 1e-6
    assert errors[False] > 1e-2
