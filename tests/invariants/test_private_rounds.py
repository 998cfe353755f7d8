"""What a data owner pays, trains and sends, through the real path of a private round, over rounds, runs and crashes.

Each test names the mistake that it catches.
"""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ot_federated import privacy_accounting
from ot_federated.data_owner import per_example_gradients, private_tuning
from ot_federated.data_owner.audit import Training, load_as_trained
from ot_federated.data_owner.fine_tuning import load_model_once, load_private_model
from ot_federated.data_owner.policy import PolicyError
from ot_federated.data_owner.privacy_ledger import BudgetError, PrivacyLedger, ledger_root, list_ledgers
from ot_federated.secure_random import SecureRandom
from ot_federated.tasks.base import Example
from ot_federated.tasks.language_model import example_losses
from ot_federated.training import MasterWeights, OptimizerSettings, StepReport
from ot_federated.tuning import Tuning
from tests.private_rounds import PrivateClient, delta, generous, write_tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("private") / "bundle")


@pytest.fixture(autouse=True)
def own_ledgers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OT_FEDERATED_LEDGERS", str(tmp_path / "ledgers"))


@pytest.fixture(autouse=True)
def coarse_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared here is equal on every grid; on a coarse one it is quick."""
    monkeypatch.setattr(privacy_accounting, "num_grid_points", 2**12)
    monkeypatch.setattr(privacy_accounting, "num_composed_points", 2**16)


@pytest.fixture
def client(bundle: Path) -> PrivateClient:
    return PrivateClient(bundle=bundle)


@pytest.fixture
def no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every example a gradient of zero once training begins, so that what moves the weights is noise alone."""

    def losses(model: Any, batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        values, counts = example_losses(model, batch)
        return 0 * values, counts

    plain = private_tuning.train_privately

    def train(*arguments: Any, **others: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(per_example_gradients, "example_losses", losses)
            return plain(*arguments, **others)

    monkeypatch.setattr(private_tuning, "train_privately", train)


def open_ledger(dataset: str = "ward-7") -> PrivacyLedger:
    return PrivacyLedger.open(ledger_root(), dataset_id=dataset)


def flatten(arrays: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    return np.concatenate([arrays[name].ravel() for name in sorted(arrays)])


# One life of a client's process: rounds of a run, and perhaps a violent end.
process = """
import os, signal, sys
from pathlib import Path
from ot_federated import privacy_accounting
privacy_accounting.num_grid_points, privacy_accounting.num_composed_points = 2**12, 2**16
from tests.private_rounds import PrivateClient

bundle, run, first, last, sigma, end = sys.argv[1:]
client = PrivateClient(bundle=Path(bundle))

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

for server_round in range(int(first), int(last) + 1):
    client.train(server_round, run=run, noise_multiplier=float(sigma))
    print("sent", server_round, flush=True)
if end == "in training":
    client.train(int(last) + 1, run=run, noise_multiplier=float(sigma), on_step=die)
if end == "in writing":
    os.fsync = die  # the new ledger is written under another name, in part or whole, and not yet in its place
    client.train(int(last) + 1, run=run, noise_multiplier=float(sigma))
"""


@pytest.mark.slow
def test_ledger_epsilon_is_that_of_one_shot_accounting(client: PrivateClient) -> None:
    """Catches an accountant made anew per round, per run or per process: 20 rounds, 2 runs, 3 restarts.

    The first process is killed in training (its round is paid, and paid again when it is trained again), the second
    while it writes the ledger (its round is not paid yet), the third ends as it should.
    """
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    lives = [
        ("run-a", 1, 5, "1.1", "in training"),
        ("run-a", 6, 12, "1.1", "in writing"),
        ("run-b", 1, 4, "0.9", ""),
        ("run-b", 5, 8, "0.9", ""),
    ]
    sent = 0
    for run, first, last, sigma, end in lives:
        command = [sys.executable, "-c", process, str(client.bundle), run, str(first), str(last), sigma, end]
        found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert found.returncode == (-9 if end else 0), found.stderr
        sent += found.stdout.count("sent")
        if end == "in writing":
            assert list((ledger_root() / "ward-7").glob(".ledger.jsonl.*.partial"))
    assert sent == 20
    paid = [(entry.release.run, entry.release.server_round) for entry in open_ledger().entries]
    assert paid == [("run-a", n) for n in (1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10, 11, 12)] + [
        ("run-b", n) for n in range(1, 9)
    ]
    steps = {(1.1, 0.1): 13 * 3, (0.9, 0.1): 8 * 3}
    accountant = PLDAccountant(value_discretization_interval=privacy_accounting._grid_width(steps, coarsening=1))
    for (sigma, rate), num_steps in steps.items():
        accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(sigma)), num_steps)
    assert open_ledger().epsilon(delta=delta) == pytest.approx(accountant.get_epsilon(delta), abs=1e-6)


def test_epsilon_of_a_receipt_is_of_all_rounds_and_runs(client: PrivateClient) -> None:
    """Catches a budget that begins anew with every round or run: each receipt is the ledger's epsilon, and it grows."""
    epsilons = []
    for run, server_round in [("run-a", 1), ("run-a", 2), ("run-b", 1), ("run-b", 2)]:
        epsilon = client.train(server_round, run=run)[1]
        assert epsilon == open_ledger().epsilon(delta=delta)
        epsilons.append(epsilon)
    assert epsilons == sorted(set(epsilons))
    tight = replace(client, policy=replace(generous, max_epsilon=epsilons[-1] + 0.01))
    with pytest.raises(BudgetError, match="Nothing was trained or spent"):
        tight.train(1, run="run-c")
    assert len(open_ledger().entries) == 4


def test_a_round_asked_again_while_it_trains_is_paid_once(client: PrivateClient) -> None:
    """Catches a second payment, and a second update of one round, when a server asks again too soon."""
    begun, may_go_on = threading.Event(), threading.Event()

    def wait(_report: StepReport) -> None:
        begun.set()
        assert may_go_on.wait(60)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.train, 1, on_step=wait)
        assert begun.wait(60)
        again = pool.submit(client.train, 1)
        assert not wait_for([again], timeout=1).done
        may_go_on.set()
        (sent, epsilon), (sent_again, epsilon_again) = first.result(60), again.result(60)
    assert np.array_equal(flatten(sent), flatten(sent_again))
    assert epsilon == epsilon_again
    assert len(open_ledger().entries) == 1


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize("noise_multiplier", [3.0, 0.0], ids=["given", "calibrated"])
@pytest.mark.parametrize("engine", per_example_gradients.engine_names)
def test_what_is_trained_is_what_was_paid(
    client: PrivateClient, engine: str, noise_multiplier: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a sigma, C, q, number of steps or N in training that is not the one in the ledger, in any engine.

    The standard deviation of 464 640 normals is within 1 % (9 standard errors), the number of sampled examples within
    5 of its standard errors; false alarms: 4e-6 in all.
    """
    gradients: list[torch.Tensor] = []
    seen: list[int] = []
    plain, sample = MasterWeights.step, SecureRandom.sample_indices

    def step(self: MasterWeights, found: Sequence[torch.Tensor], *, rate_factor: float) -> None:
        gradients.append(torch.cat([gradient.flatten().double() for gradient in found]))
        plain(self, found, rate_factor=rate_factor)

    def count(random: Any, num_examples: int, *, sample_rate: float) -> list[int]:
        found: list[int] = sample(random, num_examples, sample_rate=sample_rate)
        seen.extend(found)
        return found

    monkeypatch.setattr(MasterWeights, "step", step)
    monkeypatch.setattr(SecureRandom, "sample_indices", count)
    replace(client, num_steps=30).train(engine=engine, noise_multiplier=noise_multiplier)
    (entry,) = open_ledger().entries
    paid = entry.release
    assert len(gradients) == paid.num_steps == 30
    noise = torch.cat(gradients) * paid.sample_rate * paid.num_examples
    assert abs(float(noise.std()) / (paid.noise_multiplier * paid.max_grad_norm) - 1) < 0.01
    trials = paid.num_examples * paid.num_steps
    assert abs(len(seen) - trials * paid.sample_rate) <= 5 * math.sqrt(trials * paid.sample_rate)


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize(
    ("engine", "expected"), [("hooks", torch.float32), ("ghost", torch.float32), ("loop", torch.bfloat16)]
)
@pytest.mark.parametrize("tuning", [Tuning(), Tuning(method="lora", lora_r=2)], ids=["full", "lora"])
def test_a_bundle_in_bfloat16_is_trained_in_the_engines_type(
    tuning: Tuning, engine: str, expected: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a default that is refused on every device with bfloat16, and batches in a type that has no bound."""
    bundle = write_tiny_bundle(tmp_path / "bundle", dtype=torch.bfloat16)
    plain = load_model_once(str(bundle), "cpu", tuning).reference
    before = {file.name: file.read_bytes() for file in bundle.iterdir()}
    types = []
    train = private_tuning.train_privately

    def note(model: Any, *arguments: Any, **others: Any) -> Any:
        types.append({parameter.dtype for parameter in model.parameters()})
        return train(model, *arguments, **others)

    monkeypatch.setattr(private_tuning, "train_privately", note)
    update, _ = PrivateClient(bundle=bundle, tuning=tuning).train(engine=engine)
    assert types == [{expected}]
    # And so does the rehearsal.
    settings = replace(PrivateClient(bundle=bundle).settings, engine=engine)
    optimizer = OptimizerSettings(learning_rate=1e-3, lr_schedule="constant", warmup_fraction=0.0, weight_decay=0.0)
    training = Training(batch_size=4, num_steps=1, optimizer=optimizer, privacy=settings)
    assert load_as_trained(bundle, "cpu", tuning, training).model.dtype == expected
    assert load_as_trained(bundle, "cpu", tuning, replace(training, privacy=None)).model.dtype == torch.bfloat16
    # What the update is a difference to is the bundle's adapter, whatever type it was trained in.
    reference = load_private_model(str(bundle), "cpu", tuning, engine=engine).reference
    assert {name: tensor.dtype for name, tensor in reference.items()} == {n: t.dtype for n, t in plain.items()}
    assert all(torch.equal(tensor, plain[name]) for name, tensor in reference.items())
    assert {file.name: file.read_bytes() for file in bundle.iterdir()} == before
    moved = max(float(np.abs(update[name] - plain[name].float().numpy()).max()) for name in plain)
    # AdamW at a constant rate of 1e-3 moves a weight by at most that in each of three steps, and about.
    assert 1e-3 < moved < 4e-3


def test_noise_is_new_in_every_round_and_at_every_client(client: PrivateClient) -> None:
    """Catches noise from a shared or configured seed: all that is configured is equal, and what is sent is not."""
    certain = replace(client, batch_size=client.num_examples)  # q = 1: the batches are equal, so noise alone differs
    sent = []
    for run, name, dataset in [("run-a", "h-1", "a"), ("run-a", "h-1", "b"), ("run-a", "h-2", "c"), ("r", "h-1", "d")]:
        torch.manual_seed(0)
        np.random.seed(0)
        sent.append(flatten(replace(certain, name=name, dataset=dataset).train(run=run)[0]))
    for index, first in enumerate(sent):
        for other in sent[:index]:
            # AdamW's first steps have nearly one size; a third of the weights differ in sign alone.
            assert np.mean(first != other) > 0.3


def test_a_crash_in_training_is_paid_in_full(client: PrivateClient) -> None:
    """Catches a ledger that is written after training: the steps are on the disk before the first of them."""
    seen: list[int] = []

    def crash(report: Any) -> None:
        seen.extend(entry.release.num_steps for entry in open_ledger().entries)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.train(on_step=crash)
    assert seen == [3]
    client.train()
    assert [entry.release.server_round for entry in open_ledger().entries] == [1, 1]


def test_a_crash_before_the_reply_is_kept_lets_nothing_leave(
    client: PrivateClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a reply that leaves before it is kept: asked again, the client would train, and show, something new."""
    with monkeypatch.context() as patch:
        patch.setattr(PrivacyLedger, "save_reply", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            client.train()
    first, epsilon = client.train()
    assert len(open_ledger().entries) == 2
    again, same = client.train()
    assert len(open_ledger().entries) == 2
    assert same == epsilon
    np.testing.assert_array_equal(flatten(again), flatten(first))


def test_a_round_asked_for_twice_trains_nothing(client: PrivateClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a retry that is a second release."""
    first, epsilon = client.train()
    monkeypatch.setattr(private_tuning, "train_privately", None)
    again, same = client.train()
    assert same == epsilon
    assert len(open_ledger().entries) == 1
    np.testing.assert_array_equal(flatten(again), flatten(first))


def test_calibration_is_for_all_rounds_of_the_run(client: PrivateClient) -> None:
    """Catches noise that is calibrated to one round, or to a delta that is not the target's."""
    short = replace(client, num_rounds=2)
    for server_round in (1, 2):
        epsilon = short.train(server_round, noise_multiplier=0.0, target_epsilon=3.0)[1]
    assert 2.9 < epsilon <= 3.0


def test_what_the_policy_refuses_is_neither_measured_nor_paid(
    client: PrivateClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_tuning, "check_once", None)
    careful = replace(client, policy=replace(generous, min_noise_multiplier=2.0))
    with pytest.raises(PolicyError, match="noise multiplier 1"):
        careful.train()
    assert list_ledgers(ledger_root()) == []
