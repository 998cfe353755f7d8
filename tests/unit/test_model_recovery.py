"""Recovery attacks and the owner's audit on models where the right answer is known."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from ot_federated.architectures import find_architecture, get_blocks
from ot_federated.attacks.model_recovery import blocks_revealed, rebuild, recovered_fraction
from ot_federated.attacks.similarity import linear_cka
from ot_federated.bundle import Manifest, read_manifest
from ot_federated.errors import ConfigError
from ot_federated.model_owner.compression.bridge_fitting import fit_bridges
from ot_federated.model_owner.release_audit import (
    Yardstick,
    add_recovery,
    attacks,
    compare_releases,
    compare_states,
    describe_exposure,
    run_attack,
    value_gap,
    window_examples,
)
from ot_federated.model_owner.splitting import plan_stack, write_bundle
from ot_federated.tasks.multiple_choice import MultipleChoice
from ot_federated.training import StepReport
from tests.families import build_family_model, byte_tokenizer

windows = torch.randint(3, 250, (8, 64), generator=torch.Generator().manual_seed(0))


def write(model, directory: Path, kept: list[int], *, bridged: bool = False) -> Manifest:
    """Write a bundle with one adapter block at either end."""
    depth = len(get_blocks(model, find_architecture(model.config)))
    stack = plan_stack(num_blocks=depth, bottom=1, top=1, kept=kept, bridged=bridged)
    runs = [(entry.first_block, entry.last_block) for entry in stack if entry.role == "bridge"]
    return write_bundle(
        directory,
        model=model,
        tokenizer=byte_tokenizer(),
        stack=stack,
        bridges=fit_bridges(model, windows, runs, ridge=0.01) if runs else {},
        compression="test",
    )


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=windows[:2]).logits


def test_cka_is_blind_to_rotation_and_scale_and_equals_the_formula() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(50, width, generator=generator) for width in (6, 4))
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    assert linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1.0)
    centre = torch.eye(50).double() - 1 / 50
    k, m = (centre @ (z @ z.T).double() @ centre for z in (x, y))
    assert linear_cka(x, y) == pytest.approx(float((k * m).sum() / (k.norm() * m.norm())))
    assert linear_cka(x, torch.ones(50, 2)) == 0.0
    with pytest.raises(ValueError, match="50 and 49 tokens"):
        linear_cka(x, y[:49])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_repeating_recovers_everything_where_dropped_blocks_equal_kept_ones(family: str, tmp_path: Path) -> None:
    model = build_family_model(family)
    blocks = get_blocks(model, find_architecture(model.config))
    kept = 1
    for position in range(2, len(blocks) - 1):
        blocks[position].load_state_dict(copy.deepcopy(blocks[kept].state_dict()))
    write(model, tmp_path / "bundle", [kept], bridged=True)
    rebuilt, gaps = rebuild(tmp_path / "bundle", start="repeat")
    torch.testing.assert_close(logits(rebuilt), logits(model))
    assert {name.partition(".")[0] for name in gaps} == {str(i) for i in range(2, len(blocks) - 1)}
    fresh, _ = rebuild(tmp_path / "bundle", start="fresh")
    assert not torch.allclose(logits(fresh), logits(model), atol=1e-2)


def test_the_emulator_as_it_is_keeps_its_bridges(tmp_path: Path) -> None:
    model = build_family_model("llama")
    write(model, tmp_path / "bundle", [1], bridged=True)
    emulator, trained = rebuild(tmp_path / "bundle", start="emulator")
    assert len(get_blocks(emulator, find_architecture(emulator.config))) == 4
    assert any(name == "2.weight" for name in trained)
    with pytest.raises(ConfigError, match="start='magic'"):
        rebuild(tmp_path / "bundle", start="magic")


def test_exact_weights_are_counted_by_comparison(tmp_path: Path) -> None:
    model = build_family_model("llama")
    blocks = get_blocks(model, find_architecture(model.config))
    manifest = write(model, tmp_path / "bundle", [1, 3], bridged=True)
    exposure = describe_exposure(tmp_path / "bundle", model)
    assert [index for index, share in enumerate(exposure["by_block"]) if share == 1] == [0, 1, 3, len(blocks) - 1]
    assert exposure["fraction"] == pytest.approx(manifest.exact_weight_fraction)
    with torch.no_grad():
        blocks[3].mlp.up_proj.weight.add_(0.5)
    changed = describe_exposure(tmp_path / "bundle", model)
    assert 0 < changed["by_block"][3] < 1
    assert changed["fraction"] < exposure["fraction"]


def test_states_before_the_first_gap_are_the_full_models(tmp_path: Path) -> None:
    model = build_family_model("llama")
    write(model, tmp_path / "bundle", [1], bridged=True)
    entries = compare_states(tmp_path / "bundle", model, windows)
    assert [entry["role"] for entry in entries] == ["bottom", "emulator", "bridge", "top"]
    assert entries[0]["cka"] == pytest.approx(1.0)
    assert entries[1]["cka"] == pytest.approx(1.0)
    assert entries[2]["cka"] < 0.999


def test_recovered_share() -> None:
    assert recovered_fraction(attack=-2.0, emulator=-4.0, full=-1.0) == pytest.approx(2 / 3)
    assert recovered_fraction(attack=-4.0, emulator=-4.0, full=-1.0) == 0
    assert recovered_fraction(attack=0.5, emulator=0.6, full=0.6) is None
    (result,) = add_recovery(
        [{"public_loss": 3.0, "task_loss": 2.0, "task_accuracy": None}],
        full={"public_loss": 2.0, "task_loss": 3.0, "task_accuracy": None},
        emulator={"public_loss": 4.0, "task_loss": 2.5, "task_accuracy": None},
    )
    assert result["recovered"] == {"public_loss": 0.5, "task_loss": None}


def test_two_releases_reveal_what_one_did_not(tmp_path: Path) -> None:
    model = build_family_model("llama")
    depth = len(get_blocks(model, find_architecture(model.config)))
    first = write(model, tmp_path / "a", [1])
    second = write(model, tmp_path / "b", [2])
    assert blocks_revealed([first]) == [0, 1, depth - 1]
    together = compare_releases([first, second])
    assert together["new_since_first"] == [2]
    assert compare_releases([first, first])["new_since_first"] == []


def test_value_gap() -> None:
    rows = {"plug_in": {"loss": 2.0, "accuracy": 0.7}, "emulator_fine_tuned": {"loss": 2.5, "accuracy": 0.6}}
    assert value_gap(rows) == {"loss": 0.5, "accuracy": pytest.approx(0.1)}
    assert value_gap({"plug_in": None}) == {"loss": None, "accuracy": None}


def test_attacks_train_on_what_their_budget_allows(tmp_path: Path) -> None:
    model = build_family_model("llama")
    write(model, tmp_path / "bundle", [1], bridged=True)
    rows = [{"question": "a?", "choices": ["x", "y"], "answer": 0}] * 4
    task = MultipleChoice(byte_tokenizer(), max_length=32)
    examples = window_examples(windows)
    yardstick = Yardstick(task=task, rows=rows, public_examples=examples[:2])
    data = {"public": examples[2:], "client": task.encode(rows)}
    for attack in attacks:
        steps: list[StepReport] = []
        results = run_attack(
            attack,
            tmp_path / "bundle",
            device="cpu",
            yardstick=yardstick,
            data=data,
            budgets=[0, 1024, 2048],
            batch_size=4,
            on_step=steps.append,
        )
        assert [result["budget"] for result in results] == ([0, 1024, 2048] if attack.data else [0])
        if attack.data == "public":
            assert len(steps) == 2048 // (4 * 64)
            assert results[-1]["public_loss"] != results[0]["public_loss"]
        if attack.data == "client":
            assert results[-1]["task_loss"] < results[0]["task_loss"]


def test_bundle_is_untouched_by_attacks(tmp_path: Path) -> None:
    model = build_family_model("llama")
    manifest = write(model, tmp_path / "bundle", [1])
    before = {path.name: path.read_bytes() for path in (tmp_path / "bundle").iterdir()}
    attacked, parameters = rebuild(tmp_path / "bundle", start="repeat")
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(1.0)
    del attacked
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "bundle").iterdir()}
    assert read_manifest(tmp_path / "bundle").digest == manifest.digest
    assert json.loads(before["manifest.json"])
