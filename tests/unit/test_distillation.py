"""Distillation: its loss against direct computation, what it changes, that it helps, resumes, and may be refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from ot_federated.bundle import StackEntry, read_tensors
from ot_federated.config import parse_run_config
from ot_federated.emulated_model import build_emulated_model, load_emulated_model
from ot_federated.errors import ConfigError, DataError
from ot_federated.model_owner.compression import distillation as module
from ot_federated.model_owner.compression.distillation import (
    Distillation,
    as_received,
    distil,
    distillation_loss,
    emulator_parameters,
    target_blocks,
)
from ot_federated.model_owner.compression.gaps import build_bridges
from ot_federated.model_owner.preparation import hold_out, hold_out_labelled, prepare_bundle
from ot_federated.model_owner.splitting import draft_manifest, plan_stack, split_tensors
from ot_federated.tasks.base import LabelledImage, LabelledText
from tests.families import build_family_model, build_image_model, byte_tokenizer, get_head, num_blocks

windows = torch.randint(4, 260, (12, 32), generator=torch.Generator().manual_seed(0))
settings = Distillation(num_steps=12, batch_size=4, learning_rate=2e-3, validation_steps=0, checkpoint_steps=4)


def start(model: Any, *, kept: list[int], bridged: bool) -> tuple[tuple[StackEntry, ...], dict[str, torch.Tensor]]:
    stack = plan_stack(num_blocks=num_blocks, bottom=2, top=2, kept=kept, bridged=bridged)
    tensors = split_tensors(model, stack, bridges={})["emulator"]
    if bridged:
        stack, bridges = build_bridges(model, windows, stack, tensors, ridge=0.01, in_order=True, rank=0, width=8)
        tensors |= bridges
    return stack, tensors


def build(model: Any, stack: tuple[StackEntry, ...], tensors: dict[str, torch.Tensor]) -> Any:
    parts = split_tensors(model, stack, bridges={})
    return build_emulated_model(
        draft_manifest(model, stack, compression=""), {**parts["adapter"], **parts["frozen"], **tensors}
    )


def hidden_error(model: Any, stack: tuple[StackEntry, ...], tensors: dict[str, torch.Tensor]) -> float:
    alone = replace(settings, hidden_weight=1.0, cross_entropy_weight=0.0)
    targets = target_blocks(stack, num_blocks=num_blocks)
    with torch.no_grad():
        return float(
            distillation_loss(model, build(model, stack, tensors), windows, targets=targets, settings=alone).detach()
        )


def run(model: Any, directory: Path, *, said: list[str] | None = None, **changes: Any) -> dict[str, torch.Tensor]:
    stack, tensors = start(model, kept=[3], bridged=True)
    return distil(
        model,
        stack,
        tensors,
        windows[:-2],
        windows[-2:],
        settings=replace(settings, **changes),
        checkpoints=directory,
        say=(said if said is not None else []).append,
    )


def test_targets_are_the_last_block_stood_for() -> None:
    def targets(**changes: Any) -> list[int]:
        stack = plan_stack(num_blocks=10, bottom=2, top=2, kept=[3, 5], **changes)
        return list(target_blocks(stack, num_blocks=10).values())

    assert targets(bridged=False) == [4, 7]
    assert targets(bridged=True) == [2, 3, 4, 5, 7]
    assert targets(bridged=False, shared=True) == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2"])
def test_loss_is_what_the_text_says(family: str) -> None:
    model = build_family_model(family)
    stack, tensors = start(model, kept=[3], bridged=False)
    emulated = build(model, stack, tensors)
    weights = replace(settings, hidden_weight=30.0, cross_entropy_weight=0.7, kl_weight=0.3)
    found = distillation_loss(model, emulated, windows, targets={2: 5}, settings=weights)
    with torch.no_grad():
        ours, theirs = (m(input_ids=windows, output_hidden_states=True, use_cache=False) for m in (model, emulated))
    t, s = ours.hidden_states[6], theirs.hidden_states[3]
    hidden = ((t - s).square().mean(-1) / t.square().mean(-1)).mean()
    entropy = functional.cross_entropy(theirs.logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    p, q = (functional.log_softmax(o.logits.float(), -1) for o in (ours, theirs))
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    expected = 30 * hidden + 0.7 * entropy + 0.3 * divergence
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("trains", ["all", "bridges"])
def test_it_brings_the_emulator_closer_and_changes_only_what_trains(trains: str, tmp_path: Path) -> None:
    model = build_family_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stack, tensors = start(model, kept=[3], bridged=True)
    result = run(model, tmp_path / "c", trains=trains, cross_entropy_weight=0.0)
    changed = {name.partition(".")[0] for name in tensors if not torch.equal(result[name], tensors[name])}
    assert changed == ({"bridge"} if trains == "bridges" else {"bridge", "emulator"})
    assert result.keys() == tensors.keys()
    assert hidden_error(model, stack, result) < hidden_error(model, stack, tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not (tmp_path / "c").exists()


def test_a_stopped_distillation_goes_on_to_the_same_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_family_model("llama")
    said: list[str] = []
    whole = run(model, tmp_path / "a", validation_steps=1)
    compute, calls = module.distillation_loss, []

    def stop(*arguments: Any, **keywords: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return compute(*arguments, **keywords)

    monkeypatch.setattr(module, "distillation_loss", stop)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "b", validation_steps=1)
    again = run(model, tmp_path / "b", said=said, validation_steps=1)
    assert said[0] == "Distillation goes on at step 8 of 12"
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_distillation_that_harms_the_plug_in_is_not_used(tmp_path: Path) -> None:
    model = build_family_model("llama")
    _, tensors = start(model, kept=[3], bridged=True)
    said: list[str] = []
    # So large a step that it diverges: whether a lesser one harms is a matter of chance in a random model.
    result = run(model, tmp_path / "c", said=said, learning_rate=1e30, validation_steps=2)
    assert all(torch.equal(result[name], tensors[name]) for name in tensors)
    assert [line.split(":")[0] for line in said] == [f"Distilled {step} of 12 steps" for step in (0, 4, 8, 12)]


@pytest.mark.parametrize("trains", ["all", "bridges"])
def test_what_clients_get_is_what_is_taught_and_scored(
    trains: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_family_model("llama")
    stack, tensors = start(model, kept=[3], bridged=True)
    packed = as_received(tensors, transport="int4", dtype=torch.float32)
    manifest = draft_manifest(model, stack, compression="")
    matrices = [name for name, tensor in tensors.items() if tensor.dim() > 1]
    kept = [name for name in matrices if name.startswith("emulator.")]
    seen: dict[str, list[dict[str, torch.Tensor]]] = {"taught": [], "scored": []}

    def watch(function: Any, kind: str) -> Any:
        def watched(teacher: Any, emulated: Any, *arguments: Any, **keywords: Any) -> Any:
            found = emulator_parameters(emulated, manifest, trains="all")
            seen[kind].append({name: parameter.detach().clone() for name, parameter in found.items()})
            return function(teacher, emulated, *arguments, **keywords)

        return watched

    monkeypatch.setattr(module, "distillation_loss", watch(module.distillation_loss, "taught"))
    monkeypatch.setattr(module, "validate_by_plug_in", watch(module.validate_by_plug_in, "scored"))
    changed = replace(settings, trains=trains, validation_steps=1)
    distil(
        model,
        stack,
        tensors,
        windows[:-2],
        windows[-2:],
        settings=changed,
        transport="int4",
        checkpoints=tmp_path / "c",
        say=lambda _: None,
    )
    # What does not train is what clients get, and what trains is scored as they would get it.
    for name in kept:
        assert torch.equal(seen["taught"][-1][name], packed[name]) == (trains == "bridges")
        assert torch.equal(seen["scored"][0][name], packed[name])
    last = seen["scored"][-1]
    again = as_received(last, transport="int4", dtype=torch.float32)
    for name in matrices:
        torch.testing.assert_close(again[name], last[name], rtol=0.02, atol=1e-4)


images = torch.randn(24, 3, 28, 28, generator=torch.Generator().manual_seed(0))
examples = [LabelledImage(image.clone, number % 2) for number, image in enumerate(images)]


def run_on_images(model: Any, directory: Path, said: list[str], *, labelled: bool, **changes: Any) -> Any:
    """Distil a ViT's middle and return the tensors that it started with, and what came of them."""
    stack = plan_stack(num_blocks=num_blocks, bottom=2, top=2, kept=[3], bridged=False)
    tensors = split_tensors(model, stack, bridges={})["emulator"]
    result = distil(
        model,
        stack,
        tensors,
        images[:-8],
        images[-8:],
        settings=replace(settings, validation_steps=2, **changes),
        checkpoints=directory,
        say=said.append,
        labelled=(examples[:-8], examples[-8:]) if labelled else ((), ()),
    )
    return tensors, result


@pytest.mark.parametrize("labelled", [True, False])
def test_a_distillation_that_harms_an_image_model_is_not_used(labelled: bool, tmp_path: Path) -> None:
    model, said = build_image_model("vit"), list[str]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors, result = run_on_images(model, tmp_path / "c", said, labelled=labelled, learning_rate=1e30)
    assert all(torch.equal(result[name], tensors[name]) for name in tensors)
    assert [line.split(":")[0] for line in said] == [f"Distilled {step} of 12 steps" for step in (0, 4, 8, 12)]
    assert all(("plug-in has a loss" if labelled else "relative error") in line for line in said)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_without_labels_the_state_of_the_least_error_is_released(tmp_path: Path) -> None:
    model, said = build_image_model("vit"), list[str]()
    tensors, result = run_on_images(model, tmp_path / "c", said, labelled=False)
    errors = [float(line.rpartition(" ")[2]) for line in said]
    assert min(errors) < errors[0]
    stack = plan_stack(num_blocks=num_blocks, bottom=2, top=2, kept=[3], bridged=False)
    # Of the states behind the whole middle, by hand; its last block is the full model's sixth.
    with torch.no_grad():
        full, emulated = (
            each.vit(images[-8:], output_hidden_states=True).hidden_states
            for each in (model, build(model, stack, result))
        )
    error = ((full[6] - emulated[3]).square().mean(-1) / full[6].square().mean(-1)).mean()
    assert float(error) == pytest.approx(min(errors), abs=1e-4)
    assert any(not torch.equal(result[name], tensors[name]) for name in tensors)


def test_a_head_that_is_still_zero_does_not_judge(tmp_path: Path) -> None:
    model, said = build_image_model("vit"), list[str]()
    with torch.no_grad():
        for parameter in get_head(model).parameters():
            parameter.zero_()
    run_on_images(model, tmp_path / "c", said, labelled=True, num_steps=3)
    assert all("relative error" in line for line in said)


def test_labelled_examples_are_held_out_as_their_images_are() -> None:
    learnt, held_out = hold_out_labelled(tuple(examples), images[:16])
    assert [e.label for e in (*learnt, *held_out)] == [e.label for e in examples[:16]]
    assert all(torch.equal(e.read(), image) for e, image in zip(held_out, hold_out(images[:16])[1], strict=True))
    texts = tuple(LabelledText((5, 6), number % 2) for number in range(40))
    assert tuple(map(len, hold_out_labelled(texts, windows))) == (35, 5)
    assert hold_out_labelled((), windows) == ((), ())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_from_settings_to_a_bundle(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OT_FEDERATED_CACHE", str(tmp_path))
    model = build_family_model(family, dtype=torch.bfloat16)
    directory, manifest = prepare_bundle(
        model,
        byte_tokenizer(),
        bottom=1,
        emulator=2,
        top=2,
        keep="gradient",
        gaps="trained-bridge",
        bridge_width=4,
        shrink="ffn",
        transport="int8",
        distillation=replace(settings, num_steps=3, validation_steps=1),
        distillation_tokens=2048,
        read_public_text=lambda: ["Some public text, of which there is enough for a few windows. " * 40],
        calibration_tokens=512,
        ridge=0.01,
        recipe={},
        say=lambda _: None,
    )
    assert manifest.compression == "gradient+trained-bridge+ffn+int8+distilled-3"
    assert all(entry.width == 4 for entry in manifest.stack if entry.role == "bridge")
    emulated: Any = load_emulated_model(directory, manifest)
    assert torch.isfinite(emulated(input_ids=windows, use_cache=False).logits).all()
    # Adapter and frozen weights are those of the model.
    for name, tensor in read_tensors(directory / "frozen.safetensors").items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_bad_input_is_refused_with_the_choices() -> None:
    with pytest.raises(DataError, match="too little to distil on"):
        hold_out(windows[:1])
    for bad, message in (
        ({"offsite.gaps": "trained-bridge"}, "needs offsite.distillation-steps"),
        ({"offsite.shrink": "magnitude", "offsite.distillation-steps": 5}, "Train bridges alone"),
        ({"offsite.public-text": ""}, r"offsite.keep='influence' needs public text.*uniform"),
        ({"offsite.public-text": "", "offsite.keep": "uniform"}, r"offsite.gaps='bridge' needs.*empty or share"),
        (
            {
                "offsite.public-text": "",
                "offsite.keep": "uniform",
                "offsite.gaps": "empty",
                "offsite.distillation-steps": 1,
            },
            "distillation needs some",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_run_config(bad)
