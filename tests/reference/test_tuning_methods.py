"""Every tuning method in every family: one change of the model, whether merged, unmerged, delivered or scaled.

PEFT's own loader is the reference where it has the method.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.utils import constants

from ot_federated import architectures
from ot_federated.bundle import read_tensors
from ot_federated.data_owner.per_example_gradients import PrivacyError
from ot_federated.data_owner.privacy_self_check import check_per_example_gradients
from ot_federated.emulated_model import load_emulated_model
from ot_federated.errors import ConfigError, PlugInError
from ot_federated.model_owner.delivery import deliver_state
from ot_federated.model_owner.plug_in import full_model_names, plugged_in
from ot_federated.model_owner.splitting import plan_stack, write_bundle
from ot_federated.tuning import (
    Tuning,
    full_places,
    initial_a,
    is_mergeable,
    load_bottlenecks,
    merge,
    prepare_tuning,
    scale_change,
    start_state,
    tuned_unmerged,
    uses_conv1d,
)
from ot_federated.tuning.methods import check_family, methods
from tests.families import build_family_model, byte_tokenizer, family_names, family_param
from tests.reference.tuning_parts import build, build_image_model, logits, pixels, random_state

settings = {
    "full": Tuning(),
    "lora": Tuning(method="lora", lora_r=3, lora_alpha=5.0, seed=4),
    "ffa": Tuning(method="lora", lora_r=3, lora_alpha=5.0, freeze_a=True, seed=4),
    "ia3": Tuning(method="ia3"),
    "bitfit": Tuning(method="bitfit"),
    "bottleneck": Tuning(method="bottleneck", bottleneck_size=5, seed=4),
}
without_biases = ("llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text")
pairs = [
    pytest.param(name, family, id=f"{name}-{family}")
    for name in settings
    for family in family_names
    if not (name == "bitfit" and family in without_biases)
]


def test_the_matrix_has_every_method() -> None:
    assert {tuning.method for tuning in settings.values()} == methods.keys()


@pytest.mark.parametrize(("name", "family"), pairs)
def test_round_trip(name: str, family: str, tmp_path: Path) -> None:
    # All middle blocks are kept, or are the adapter's: the emulated model with a state in it is the full model, tuned
    # and unmerged.
    tuning = settings[name]
    model, directory, manifest = build(tmp_path, family, kept=[2, 3, 5, 6], spread=[4])
    base = read_tensors(directory / "adapter.safetensors")
    emulated = load_emulated_model(directory, manifest)
    parameters = prepare_tuning(emulated, manifest, tuning)
    before = logits(model)
    assert torch.equal(logits(emulated), before)  # at its start a method changes nothing
    start = start_state(parameters, base, tuning)
    assert all(torch.equal(start[key], parameter) for key, parameter in parameters.items())
    state = {key: start[key] + change for key, change in random_state(parameters).items()}
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(state[key])
    after = logits(emulated)
    assert (after - before).abs().max() > 1e-2

    # Unmerged in the full model, which comes back bit for bit.
    names = [key for key, _ in model.named_parameters()]
    places = full_places(model, manifest.stack, tuning)
    with tuned_unmerged(places, state, tuning) as tuned:
        torch.testing.assert_close(logits(tuned), after)
    assert [key for key, _ in model.named_parameters()] == names
    assert torch.equal(logits(model), before)

    # Merged. Merging adds in another order than running the parts does.
    if is_mergeable(tuning):
        adapter = merge(state, base, tuning, conv1d=uses_conv1d(model))
        assert adapter.keys() == full_model_names(model, manifest.stack).keys()
        with plugged_in(model, adapter, manifest.stack) as plugged:
            torch.testing.assert_close(logits(plugged), after, rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(ConfigError, match="cannot be merged"):
            merge(state, base, tuning, conv1d=False)

    # A change scaled by 0 is none, by 1 is itself, by 1/2 is neither.
    for alpha, expected in ((0.0, before), (1.0, after)):
        with tuned_unmerged(places, scale_change(state, start, tuning, alpha=alpha), tuning) as tuned:
            torch.testing.assert_close(logits(tuned), expected)
    with tuned_unmerged(places, scale_change(state, start, tuning, alpha=0.5), tuning) as tuned:
        assert (logits(tuned) - before).abs().max() > 1e-3
        assert (logits(tuned) - after).abs().max() > 1e-3

    # Delivered, and loaded as its user would.
    if name in ("full", "bitfit"):
        return
    deliver_state(
        tmp_path / "delivered",
        model=model,
        state=state,
        stack=manifest.stack,
        tuning=tuning,
        description={"base_model": "x", "tuning_method": tuning.method},
    )
    if tuning.method == "bottleneck":
        loaded = load_bottlenecks(model, tmp_path / "delivered")
    else:
        loaded = PeftModel.from_pretrained(model, str(tmp_path / "delivered"))
    torch.testing.assert_close(logits(loaded), after, rtol=1e-4, atol=1e-4)


image_settings = {name: tuning for name, tuning in settings.items() if tuning.method != "ia3"}


@pytest.mark.parametrize("name", image_settings)
@pytest.mark.parametrize("family", ["vit", "dinov2", family_param("timm_wrapper")])
def test_round_trip_of_an_image_model_with_its_head(family: str, name: str, tmp_path: Path) -> None:
    tuning = replace(image_settings[name], placement="top")
    model = build_image_model(family)
    stack = plan_stack(num_blocks=3, bottom=1, top=1, kept=[1], bridged=False)
    directory = tmp_path / "bundle"
    manifest = write_bundle(
        directory, model=model, tokenizer=byte_tokenizer(), stack=stack, bridges={}, compression="uniform+empty"
    )
    base = read_tensors(directory / "adapter.safetensors")
    emulated = load_emulated_model(directory, manifest)
    parameters = prepare_tuning(emulated, manifest, tuning)
    heads = {"head.weight", "head.bias"}
    assert heads < parameters.keys()
    assert {key.partition(".")[0] for key in parameters} == {"head", "top"}
    before = model(pixels).logits
    torch.testing.assert_close(emulated(pixels).logits, before)
    start = start_state(parameters, base, tuning)
    state = {key: start[key] + change for key, change in random_state(parameters).items()}
    places = full_places(model, stack, tuning)
    with tuned_unmerged(places, state, tuning) as tuned:
        after = tuned(pixels).logits
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(model(pixels).logits, before)
    with tuned_unmerged(places, scale_change(state, start, tuning, alpha=0.0), tuning) as tuned:
        torch.testing.assert_close(tuned(pixels).logits, before)
    if is_mergeable(tuning):
        adapter = merge(state, base, tuning, conv1d=False)
        with plugged_in(model, adapter, stack, placement="top") as plugged:
            torch.testing.assert_close(plugged(pixels).logits, after, rtol=1e-4, atol=1e-4)
    if tuning.method in ("full", "bitfit"):
        return
    description = {"base_model": "x", "tuning_method": tuning.method}
    target = tmp_path / "delivered"
    deliver_state(target, model=model, state=state, stack=stack, tuning=tuning, description=description)
    if tuning.method == "bottleneck":
        loaded = load_bottlenecks(model, target)
    else:
        loaded = PeftModel.from_pretrained(model, str(target))
    torch.testing.assert_close(loaded(pixels).logits, after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", without_biases)
def test_a_family_without_biases_is_refused_with_the_choices(family: str) -> None:
    model = build_family_model(family)
    with pytest.raises(ConfigError, match=r"biases.*none\. Take full, lora, ia3 or bottleneck"):
        check_family(model, Tuning(method="bitfit"))


@pytest.mark.parametrize(("method", "choices"), [("ia3", "full, lora or bottleneck"), ("bottleneck", "full or lora")])
def test_an_unknown_family_is_refused_with_the_choices(
    method: str, choices: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING, "llama")
    bare = replace(architectures.list_architectures()["llama"], sublayer_outputs=())
    monkeypatch.setitem(architectures._table, "llama", bare)
    with pytest.raises(ConfigError, match=f"tuning.method='{method}'.*llama model.*Take {choices}"):
        check_family(build_family_model("llama"), Tuning(method=method))


@pytest.mark.parametrize("name", settings)
def test_checking_a_family_leaves_no_trace(name: str) -> None:
    model = build_family_model("gpt2")
    before = {key: parameter.clone() for key, parameter in model.named_parameters()}
    check_family(model, settings[name])
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("placement", ["bottom", "top", "spread"])
@pytest.mark.parametrize("name", settings)
def test_only_the_placed_blocks_train_and_change(name: str, placement: str, tmp_path: Path) -> None:
    model, directory, manifest = build(tmp_path, "opt", kept=[3], spread=[2, 5])
    tuning = replace(settings[name], placement=placement)
    parameters = prepare_tuning(load_emulated_model(directory, manifest), manifest, tuning)
    assert parameters
    assert all(key.startswith(f"{placement}.") for key in parameters)
    state = random_state(parameters)
    if is_mergeable(tuning):
        adapter = merge(state, read_tensors(directory / "adapter.safetensors"), tuning, conv1d=False)
        assert all(key.startswith(f"{placement}.") for key in adapter)
    blocks = {"bottom": {"0", "1"}, "top": {"7"}, "spread": {"2", "5"}}[placement]
    places = full_places(model, manifest.stack, tuning)
    assert {places.full_name(key).split(".")[3] for key in state} == blocks


@pytest.mark.parametrize("name", ["lora", "ffa", "bottleneck"])
def test_all_parties_start_from_the_same_numbers(name: str, tmp_path: Path) -> None:
    _, directory, manifest = build(tmp_path, "llama", kept=[3])
    base = read_tensors(directory / "adapter.safetensors")
    starts = []
    for torch_seed in (1, 2):
        torch.manual_seed(torch_seed)
        parameters = prepare_tuning(load_emulated_model(directory, manifest), manifest, settings[name])
        starts.append(start_state(parameters, base, settings[name]))
    assert starts[0].keys() == starts[1].keys()
    assert all(torch.equal(starts[0][key], starts[1][key]) for key in starts[0])


def test_a_seed_of_its_own_gives_another_start() -> None:
    shape = torch.Size((3, 4))
    assert not torch.equal(initial_a("x", shape, seed=9), initial_a("x", shape, seed=10))
    assert not torch.equal(initial_a("x", shape, seed=9), initial_a("y", shape, seed=9))


def test_bottlenecks_fit_their_own_model_alone(tmp_path: Path) -> None:
    model, _, manifest = build(tmp_path, "llama", kept=[3])
    tuning = settings["bottleneck"]
    places = full_places(model, manifest.stack, tuning)
    parameters = methods["bottleneck"].inject(places, tuning)
    state = random_state(parameters)
    methods["bottleneck"].remove(places)
    target = tmp_path / "delivered"
    description = {"base_model": "x", "tuning_method": "bottleneck"}
    deliver_state(target, model=model, state=state, stack=manifest.stack, tuning=tuning, description=description)
    with pytest.raises(PlugInError, match="is no layer of this model"):
        load_bottlenecks(build_family_model("opt"), target)
    (target / "adapter.json").write_text(json.dumps({"tuning_method": "lora"}))
    with pytest.raises(PlugInError, match="holds an adapter of 'lora'"):
        load_bottlenecks(model, target)


@pytest.mark.parametrize("engine", ["hooks", "ghost", "loop"])
@pytest.mark.parametrize("name", ["ia3", "bitfit", "bottleneck"])
def test_every_engine_is_exact_for_every_method_or_refuses(name: str, engine: str, tmp_path: Path) -> None:
    """Per-example gradients for DP-SGD; LoRA and whole blocks are in test_per_example_gradients."""
    for family in ("opt", "gpt2"):
        _, directory, manifest = build(tmp_path / family, family, kept=[3])
        emulated = load_emulated_model(directory, manifest)
        parameters = prepare_tuning(emulated, manifest, settings[name])
        for key, change in random_state(parameters).items():
            parameters[key].data = parameters[key].data + change
        if name == "ia3" and engine != "loop":
            with pytest.raises(PrivacyError, match=r"Set privacy\.engine=loop"):
                check_per_example_gradients(emulated, parameters, engine=engine, max_grad_norm=0.5)
            continue
        found = check_per_example_gradients(emulated, parameters, engine=engine, max_grad_norm=0.5)
        assert found.max_error < 1e-5
        assert abs(found.max_influence - 1) < 1e-5


def test_a_state_that_does_not_fit_is_refused_and_the_model_unchanged(tmp_path: Path) -> None:
    model, _, manifest = build(tmp_path, "llama", kept=[3])
    tuning = settings["bottleneck"]
    before = logits(model)
    places = full_places(model, manifest.stack, tuning)
    with pytest.raises(ConfigError, match="does not fit"), tuned_unmerged(places, {}, tuning):
        pass
    assert torch.equal(logits(model), before)
