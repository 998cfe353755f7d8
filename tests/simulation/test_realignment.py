"""Realignment: bridges fitted to the tuned model, sent as a change of the bundle, the same after a restart."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from flwr.app import Message

from ot_federated.bundle import read_manifest, read_tensors, realignment_file
from ot_federated.emulated_model import build_emulated_model
from ot_federated.errors import CheckpointError, ConfigError
from ot_federated.model_owner.compression.bridge_fitting import fit_bridges
from ot_federated.model_owner.compression.calibration import block_states
from ot_federated.model_owner.compression.distillation import Distillation, distillation_loss, target_blocks
from ot_federated.model_owner.realignment import distil_bridges, refit_bridges
from ot_federated.model_owner.splitting import plan_stack, split_tensors, write_bundle
from ot_federated.settings import Scalar
from tests.families import build_family_model, byte_tokenizer, num_blocks
from tests.federations import Federation, is_train_reply, run_federation, write_rows
from tests.invariants.test_resume import resume, stop_in_round, strip_times


def settings_in(directory: Path, **extra: Scalar) -> dict[str, Scalar]:
    text = [{"passage": "Public text of the owner, long enough for a few windows of tokens. " * 4}] * 20
    return {
        "num-server-rounds": 3,
        "offsite.gaps": "bridge",
        "offsite.public-text": str(write_rows(directory / "public.jsonl", text)),
        "offsite.public-text-column": "passage",
        "offsite.calibration-tokens": 1024,
        "offsite.realign-every-rounds": 1,
        "train.learning-rate": 0.02,
        **extra,
    }


def version(run: Federation, server_round: int) -> Path:
    return run.output / "realigned" / f"round-{server_round:04d}"


def test_a_refit_to_the_untouched_model_is_the_bundle_and_to_a_tuned_one_is_better(tmp_path: Path) -> None:
    model = build_family_model("llama")
    windows = torch.randint(4, 260, (24, 64), generator=torch.Generator().manual_seed(0))
    stack = plan_stack(num_blocks=num_blocks, bottom=2, top=1, kept=[4], bridged=True)
    gaps = [(entry.first_block, entry.last_block) for entry in stack if entry.role == "bridge"]
    bridges = fit_bridges(model, windows, gaps, ridge=0.01)
    manifest = write_bundle(
        tmp_path / "bundle",
        model=model,
        tokenizer=byte_tokenizer(),
        stack=stack,
        bridges=bridges,
        compression="uniform+bridge",
    )
    first = read_tensors(tmp_path / "bundle" / "emulator.safetensors")
    again = refit_bridges(model, tmp_path / "bundle", manifest, windows, ridge=0.01)
    assert again.keys() == {name for name in first if name.startswith("bridge.")}
    assert all(torch.equal(again[name], first[name]) for name in again)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("model.layers.1."):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    refitted = refit_bridges(model, tmp_path / "bundle", manifest, windows, ridge=0.01)

    def error(tensors: dict[str, torch.Tensor]) -> float:
        total = 0.0
        for states in block_states(model, windows):
            for number, (begin, end) in enumerate(gaps):
                x, y = states[begin][0], states[end][1]
                mapped = x + x @ tensors[f"bridge.{number}.weight"].T + tensors[f"bridge.{number}.bias"]
                total += float((mapped - y).square().mean())
        return total

    assert error(refitted) < 0.8 * error(again)


def test_only_the_change_travels_and_a_restart_changes_nothing(llama_directory: Path, tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    whole = run_federation(tmp_path / "whole", llama_directory, settings=settings)
    changes = [(version(whole, number) / realignment_file).stat().st_size for number in (1, 2)]
    sizes = whole.summary["bytes"]
    # One cache for both clients: it is filled once.
    assert [whole.rounds[number]["bundle_bytes"] for number in (1, 2, 3)] == [sizes["bundle_per_client"], *changes]
    assert sizes["realignment_per_client"] == sum(changes) < 0.2 * sizes["bundle_per_client"]
    assert all(whole.rounds[number]["num_replies"] == 2 for number in (1, 2, 3))
    manifests = [read_manifest(version(whole, number)) for number in (1, 2)]
    assert len({whole.summary["offsite"]["bundle_digest"], *(manifest.digest for manifest in manifests)}) == 3
    for manifest in manifests:
        assert (tmp_path / "whole" / "received-bundles" / manifest.digest).is_dir()

    stop_in_round(3, tmp_path / "cut", llama_directory, settings)
    resumed = resume(tmp_path / "cut", llama_directory, settings)
    assert resumed.digest == whole.digest
    assert strip_times(resumed) == strip_times(whole)

    without = settings | {"offsite.realign-every-rounds": 0}
    assert run_federation(tmp_path / "without", llama_directory, settings=without).digest != whole.digest


def test_the_best_round_is_scored_with_the_emulator_that_it_was_trained_with(
    llama_directory: Path, tmp_path: Path
) -> None:
    too_long = {"train.learning-rate": 0.5, "train.lr-schedule": "constant", "train.warmup-fraction": 0.0}
    settings = settings_in(tmp_path) | too_long
    best = run_federation(tmp_path / "best", llama_directory, settings=settings | {"evaluation.deliver": "best"})
    delivered = best.summary["delivered"]["round"]
    assert delivered < 3
    short = run_federation(tmp_path / "short", llama_directory, settings=settings | {"num-server-rounds": delivered})
    assert best.summary["rows"] == short.summary["rows"]


def test_bridges_are_distilled_too_and_a_restart_changes_nothing(llama_directory: Path, tmp_path: Path) -> None:
    fitted = settings_in(tmp_path)
    settings = fitted | {"offsite.realign-steps": 3, "offsite.distillation-learning-rate": 1e-3}
    whole = run_federation(tmp_path / "whole", llama_directory, settings=settings)
    plain = run_federation(tmp_path / "plain", llama_directory, settings=fitted)
    changes = [read_tensors(version(run, 1) / realignment_file) for run in (whole, plain)]
    assert changes[0].keys() == changes[1].keys()
    assert not any(torch.equal(changes[0][name], changes[1][name]) for name in changes[0] if name.endswith("weight"))
    assert whole.rounds[2]["bundle_bytes"] == plain.rounds[2]["bundle_bytes"]
    assert not (whole.output / "realigned" / "distillation").exists()

    stop_in_round(3, tmp_path / "cut", llama_directory, settings)
    assert resume(tmp_path / "cut", llama_directory, settings).digest == whole.digest


def test_distilled_bridges_are_nearer_to_the_tuned_model(tmp_path: Path) -> None:
    model = build_family_model("llama")
    windows = torch.randint(4, 260, (24, 64), generator=torch.Generator().manual_seed(0))
    stack = plan_stack(num_blocks=num_blocks, bottom=2, top=1, kept=[4], bridged=True)
    gaps = [(entry.first_block, entry.last_block) for entry in stack if entry.role == "bridge"]
    bundle = tmp_path / "bundle"
    manifest = write_bundle(
        bundle,
        model=model,
        tokenizer=byte_tokenizer(),
        stack=stack,
        bridges=fit_bridges(model, windows, gaps, ridge=0.01),
        compression="uniform+bridge",
    )
    start = {name: tensor for name, tensor in read_tensors(bundle / "emulator.safetensors").items() if "bridge" in name}
    settings = Distillation(num_steps=30, batch_size=8, learning_rate=3e-3, cross_entropy_weight=0.0)
    targets = target_blocks(stack, num_blocks=manifest.num_blocks)

    def loss(bridges: dict[str, torch.Tensor]) -> float:
        parts = split_tensors(model, stack, bridges={})
        emulated = build_emulated_model(
            manifest, {**parts["adapter"], **parts["frozen"], **parts["emulator"], **bridges}
        )
        return float(distillation_loss(model, emulated, windows, targets=targets, settings=settings).detach())

    distilled = distil_bridges(
        model, bundle, manifest, start, windows, settings=settings, checkpoints=tmp_path / "checkpoints"
    )
    assert distilled.keys() == start.keys()
    assert loss(distilled) < 0.98 * loss(start)


def test_who_lost_its_bundle_gets_the_realigned_one_whole_in_the_same_round(
    llama_directory: Path, tmp_path: Path
) -> None:
    def lose(reply: Message) -> list[Message]:
        if is_train_reply(reply, server_round=2, partition=1):
            shutil.rmtree(tmp_path / "received-bundles")
        return [reply]

    settings = settings_in(tmp_path)
    run = run_federation(tmp_path, llama_directory, settings=settings, on_reply=lose)
    sizes = run.summary["bytes"]
    change = (version(run, 2) / realignment_file).stat().st_size
    assert run.rounds[3]["bundle_bytes"] == sizes["bundle_per_client"] + change
    assert run.rounds[3]["num_replies"] == 2


def test_every_second_round_under_secure_aggregation(llama_directory: Path, tmp_path: Path) -> None:
    settings = settings_in(tmp_path) | {
        "num-server-rounds": 4,
        "offsite.realign-every-rounds": 2,
        "strategy.secure-aggregation": True,
    }
    run = run_federation(tmp_path, llama_directory, settings=settings, num_clients=3)
    change = (version(run, 2) / realignment_file).stat().st_size
    sent = [run.rounds[number]["bundle_bytes"] for number in (1, 2, 3, 4)]
    assert sent == [run.summary["bytes"]["bundle_per_client"], 0, change, 0]
    assert all(run.rounds[number]["num_replies"] == 3 for number in (1, 2, 3, 4))


def test_a_lost_version_is_refused(llama_directory: Path, tmp_path: Path) -> None:
    settings = settings_in(tmp_path) | {"num-server-rounds": 4, "offsite.realign-every-rounds": 2}
    stop_in_round(4, tmp_path, llama_directory, settings)
    shutil.rmtree(tmp_path / "run" / "realigned" / "round-0002")
    with pytest.raises(CheckpointError, match=r"round-0002.*is missing"):
        resume(tmp_path, llama_directory, settings)


def test_without_bridges_there_is_nothing_to_realign(llama_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"offsite\.gaps='empty' has none"):
        run_federation(tmp_path, llama_directory, settings={"offsite.realign-every-rounds": 1})
