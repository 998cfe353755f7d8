"""One round of private tuning: policy, self-check, ledger, DP-SGD, and the reply that is kept.

The order is the guarantee. What the policy refuses is not measured; what the self-check refuses is not paid; what
is not paid is not trained; what is trained is kept before it leaves, so that asking again costs nothing and shows
nothing new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load, save

from ot_federated.config import PrivacyConfig
from ot_federated.data_owner.dataset_identity import identify_dataset
from ot_federated.data_owner.differential_privacy import train_privately
from ot_federated.data_owner.fine_tuning import load_private_model
from ot_federated.data_owner.ledger_entries import Release
from ot_federated.data_owner.policy import Policy
from ot_federated.data_owner.privacy_ledger import PrivacyLedger, ledger_root
from ot_federated.data_owner.privacy_self_check import check_per_example_gradients
from ot_federated.privacy_accounting import calibrate_noise_multiplier
from ot_federated.privacy_guarantee import Guarantee
from ot_federated.secure_random import SecureRandom
from ot_federated.tasks.base import AnyExample
from ot_federated.training import OptimizerSettings, StepReport, TrainingResult
from ot_federated.tuning import Tuning

if TYPE_CHECKING:
    import torch

Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True, kw_only=True)
class PrivacySettings:
    """What the run asks of every client.

    Attributes:
        target_epsilon: Epsilon of the whole run, which the noise is calibrated to.
        target_delta: Its delta.
        noise_multiplier: Noise over clipping norm; 0 for the calibrated one.
        max_grad_norm: Clipping norm of one example's gradient.
        clipping: ``flat`` or ``automatic``.
        engine: ``hooks``, ``ghost`` or ``loop``.
        micro_batch_size: Examples in the model at once.
    """

    target_epsilon: float
    target_delta: float
    noise_multiplier: float
    max_grad_norm: float
    clipping: str
    engine: str
    micro_batch_size: int


def build_privacy_settings(config: PrivacyConfig) -> PrivacySettings:
    """Return what the run config asks of every client."""
    return PrivacySettings(
        target_epsilon=config.target_epsilon,
        target_delta=config.target_delta,
        noise_multiplier=config.noise_multiplier,
        max_grad_norm=config.max_grad_norm,
        clipping=config.clipping,
        engine=config.engine,
        micro_batch_size=config.micro_batch_size,
    )


@lru_cache(maxsize=64)
def find_noise_multiplier(*, target_epsilon: float, delta: float, sample_rate: float, num_steps: int) -> float:
    """Return the noise that spends ``target_epsilon`` over all steps of a run; found once a process."""
    return calibrate_noise_multiplier(
        target_epsilon=target_epsilon, delta=delta, sample_rate=sample_rate, num_steps=num_steps
    )


@lru_cache(maxsize=8)
def check_once(directory: str, device: str, tuning: Tuning, engine: str, max_grad_norm: float, clipping: str) -> None:
    """Run the self-check on the bundle's model, once a process."""
    tunable = load_private_model(directory, device, tuning, engine=engine)
    check_per_example_gradients(
        tunable.model, tunable.parameters, engine=engine, max_grad_norm=max_grad_norm, clipping=clipping
    )


def tune_privately(
    directory: Path,
    adapter: Mapping[str, torch.Tensor],
    examples: Sequence[AnyExample],
    *,
    rows: Iterable[Mapping[str, Any]],
    dataset: str,
    policy: Policy,
    settings: PrivacySettings,
    run: str,
    task: str,
    device: str,
    tuning: Tuning,
    client: str,
    server_round: int,
    num_rounds: int,
    batch_size: int,
    num_steps: int,
    optimizer: OptimizerSettings,
    encode: Callable[[TrainingResult], Arrays],
    on_step: Callable[[StepReport], None] | None = None,
) -> tuple[Arrays, Guarantee]:
    """Tune the adapter for one round under differential privacy.

    Args:
        directory: The bundle.
        adapter: fp32 weights that the server sent, by role name.
        examples: The local examples, one a record.
        rows: The records, which identify the data set where it has no name.
        dataset: The owner's name for the data set; empty for its content's digest.
        policy: What the owner allows.
        settings: What the run asks for.
        run: Id of the run, the same after it was resumed.
        task: Name of the task.
        device: Where to train.
        tuning: What trains.
        client: This client's name.
        server_round: The round, from 1.
        num_rounds: Rounds of the run.
        batch_size: Expected batch: q = batch_size / examples.
        num_steps: Steps of this round.
        optimizer: How the weights move along the noisy gradients.
        encode: Turns the result into the arrays that leave.
        on_step: Called after every step.

    Returns:
        The arrays that leave, and the guarantee for everything that ever left this data set.

    Raises:
        PolicyError: If the policy does not allow it.
        PrivacyError: If the model has no correct per-example gradients with this engine.
        BudgetError: If the budget does not cover it.
    """
    sample_rate = min(1.0, batch_size / len(examples))
    sigma = settings.noise_multiplier or find_noise_multiplier(
        target_epsilon=settings.target_epsilon,
        delta=settings.target_delta,
        sample_rate=sample_rate,
        num_steps=num_steps * num_rounds,
    )
    release = Release(
        run=run,
        server_round=server_round,
        client=client,
        noise_multiplier=sigma,
        sample_rate=sample_rate,
        num_steps=num_steps,
        max_grad_norm=settings.max_grad_norm,
        num_examples=len(examples),
    )
    policy.check_request(
        task=task,
        num_rounds=num_rounds,
        num_examples=len(examples),
        release=release,
        target_epsilon=None if settings.noise_multiplier else settings.target_epsilon,
        target_delta=settings.target_delta,
    )
    check_once(str(directory), device, tuning, settings.engine, settings.max_grad_norm, settings.clipping)
    ledger = PrivacyLedger.open(ledger_root(), dataset_id=dataset or identify_dataset(rows))
    with ledger.round_turn(release):
        receipt = ledger.spend(release, budget_epsilon=policy.max_epsilon, delta=policy.delta)
        if receipt.reply is not None:
            return load(receipt.reply), receipt.guarantee
        tunable = load_private_model(str(directory), device, tuning, engine=settings.engine)
        result = train_privately(
            tunable.model,
            tunable.parameters,
            examples,
            start=adapter,
            num_steps=num_steps,
            sample_rate=sample_rate,
            noise_multiplier=sigma,
            max_grad_norm=settings.max_grad_norm,
            clipping=settings.clipping,
            engine=settings.engine,
            micro_batch_size=settings.micro_batch_size,
            optimizer=optimizer,
            first_step=(server_round - 1) * num_steps,
            total_steps=num_rounds * num_steps,
            random=SecureRandom(),
            on_step=on_step,
        )
        arrays = encode(result)
        ledger.save_reply(save(arrays), run=run, server_round=server_round, client=client)
        return arrays, receipt.guarantee
