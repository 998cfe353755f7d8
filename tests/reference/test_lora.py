"""Averaging LoRA: FFA-LoRA's mean is the mean of the changes, that of A and B apart is not."""

from __future__ import annotations

from pathlib import Path

from ot_federated.bundle import read_tensors
from ot_federated.emulated_model import load_emulated_model
from ot_federated.tuning import Tuning, merge, prepare_tuning
from tests.reference.tuning_parts import build, random_state


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
