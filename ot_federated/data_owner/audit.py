"""The data owner's rehearsal: train as a round would, on this machine, and attack the result.

Some examples, the candidates, are in the training data by the flip of a coin. The attacks then see what the server
would see: the adapter before and after. Nothing leaves, and nothing is booked in the ledger, because the result goes
to nobody but the data owner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ot_federated.attacks.canaries import make_canaries, summarise_exposure
from ot_federated.attacks.membership import judge_attacks, measure_signals, membership_scores, roc_curve
from ot_federated.attacks.one_run_audit import audit_with_best
from ot_federated.attacks.token_recovery import count_vocabulary, first_attention_layers, recover_tokens
from ot_federated.data_owner.differential_privacy import train_privately
from ot_federated.data_owner.fine_tuning import TunableModel, load_model_once, load_private_model
from ot_federated.data_owner.privacy_self_check import check_per_example_gradients
from ot_federated.errors import ConfigError, DataError
from ot_federated.privacy_accounting import Mechanism, calibrate_noise_multiplier, epsilon_of
from ot_federated.secure_random import SecureRandom
from ot_federated.tasks.base import Example
from ot_federated.training import OptimizerSettings, StepReport, draw_batches, train
from ot_federated.tuning import Tuning

if TYPE_CHECKING:
    from ot_federated.data_owner.private_tuning import PrivacySettings

# What reads the first block's input: the names of attention's input maps over the model families.
attention_inputs = ("q_proj", "k_proj", "v_proj", "query_key_value", "c_attn")
population_share = 0.2
# "rmia" is not among them: it is ranked against examples whose coins are known.
audit_scores = ("loss", "reference")
# One step leaves LoRA's A where it was, because B is zero; after four its update shows its inputs.
num_leaking_steps = 4


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the rehearsal trains: as a client would over a whole run.

    Attributes:
        batch_size: Examples a step; under privacy the expected number.
        num_steps: Steps of all rounds together.
        optimizer: How the weights move.
        max_grad_norm: Clip the batch's gradient to this norm where there is no privacy; 0 for no clipping.
        privacy: DP-SGD's settings; None to train without privacy.
    """

    batch_size: int
    num_steps: int
    optimizer: OptimizerSettings
    max_grad_norm: float = 1.0
    privacy: PrivacySettings | None = None


def audit_data_owner(
    directory: Path,
    examples: Sequence[Example],
    *,
    training: Training,
    tuning: Tuning,
    device: str,
    num_candidates: int,
    canaries: str = "natural",
    num_leaked_examples: int = 2,
    seed: int = 0,
    on_step: Callable[[StepReport], None] | None = None,
) -> dict[str, Any]:
    """Train once with a coin's choice of the candidates, attack the result, and return what the attacks found.

    Args:
        directory: The bundle.
        examples: The local examples.
        training: How to train.
        tuning: What trains.
        device: Where to train.
        num_candidates: Examples whose membership is a coin's flip; more bound epsilon more sharply.
        canaries: What the candidates are made into: ``natural``, ``mislabelled`` or ``random``.
        num_leaked_examples: Examples behind the one update whose tokens are searched for.
        seed: Of coins, canaries and batches without privacy; private batches and noise are never seeded.
        on_step: Called after every training step.

    Returns:
        ``claimed_epsilon`` (None without privacy) and ``delta``; ``one_run_audit``, ``membership`` by attack,
        ``scores`` (of members and of others, by attack), ``curves`` (false and true positive rates), ``exposure`` and
        ``token_recovery``.

    Raises:
        DataError: If there are too few examples.
        PrivacyError: If the model has no correct per-example gradients with the chosen engine.
    """
    if not 10 <= num_candidates <= len(examples):
        raise DataError(
            f"{num_candidates} candidates of {len(examples)} examples: an audit needs at least 10 candidates, and as "
            "many examples. Give it more data, or fewer candidates."
        )
    rng = np.random.default_rng([seed, 2305])
    order = rng.permutation(len(examples))
    chosen = [examples[index] for index in order[:num_candidates]]
    tunable = load_as_trained(directory, device, tuning, training)
    vocabulary = count_vocabulary(tunable.model)
    candidates = make_canaries(chosen, kind=canaries, vocabulary_size=vocabulary, rng=rng)
    included = rng.random(num_candidates) < 0.5
    members = [candidate for candidate, is_in in zip(candidates, included, strict=True) if is_in]
    data = [examples[index] for index in order[num_candidates:]] + members
    noise = find_noise(training, num_examples=len(data), sample_rate=min(1.0, training.batch_size / len(data)))
    reset(tunable, tunable.reference)
    before = measure_signals(tunable.model, candidates)
    run_training(tunable, data, training, noise_multiplier=noise, seed=seed, on_step=on_step)
    after = measure_signals(tunable.model, candidates)
    outsiders = np.flatnonzero(~included)
    # The population is known to the attacker, so it is not attacked.
    population = outsiders[: max(1, int(population_share * len(outsiders)))]
    attacked = np.setdiff1d(np.arange(num_candidates), population)
    scores = membership_scores(after, before, population=population)
    delta = training.privacy.target_delta if training.privacy else 1e-5
    return {
        "claimed_epsilon": claim(training, noise, num_examples=len(data)),
        "delta": delta,
        "num_examples": len(data),
        "num_steps": training.num_steps,
        "canaries": canaries,
        "seed": seed,
        "loss": {"members": float(after.loss[included].mean()), "non_members": float(after.loss[~included].mean())},
        "one_run_audit": audit_with_best({name: scores[name] for name in audit_scores}, included, delta=delta),
        "membership": judge_attacks({name: values[attacked] for name, values in scores.items()}, included[attacked]),
        "scores": {
            name: {
                "members": values[attacked][included[attacked]].tolist(),
                "others": values[attacked][~included[attacked]].tolist(),
            }
            for name, values in scores.items()
        },
        "curves": {name: roc_curve(values[attacked], included[attacked]) for name, values in scores.items()},
        "exposure": summarise_exposure(scores["reference"], included),
        "token_recovery": audit_tokens(
            tunable, shortest(data, num_leaked_examples), training, noise_multiplier=noise, seed=seed
        ),
    }


def load_as_trained(directory: Path, device: str, tuning: Tuning, training: Training) -> TunableModel:
    """Load the emulated model in the type that a round would train it in."""
    if training.privacy is None:
        return load_model_once(str(directory), device, tuning)
    return load_private_model(str(directory), device, tuning, engine=training.privacy.engine)


def shortest(examples: Sequence[Example], num: int) -> list[Example]:
    """Return the ``num`` shortest examples: the fewer tokens, the clearer the span of an update shows them."""
    return sorted(examples, key=lambda example: len(example.input_ids))[:num]


def find_noise(training: Training, *, num_examples: int, sample_rate: float) -> float:
    """Return the noise multiplier that the privacy settings ask for; 0 without privacy."""
    privacy = training.privacy
    if privacy is None:
        return 0.0
    if privacy.target_delta * num_examples >= 1:
        raise ConfigError(
            f"privacy.target-delta={privacy.target_delta:g} is not below 1/{num_examples}, one over the examples: it "
            "would allow to publish one of them. Lower it."
        )
    return privacy.noise_multiplier or calibrate_noise_multiplier(
        target_epsilon=privacy.target_epsilon,
        delta=privacy.target_delta,
        sample_rate=sample_rate,
        num_steps=training.num_steps,
    )


def claim(training: Training, noise_multiplier: float, *, num_examples: int) -> float | None:
    """Return the epsilon that the ledger would book for this training; None without privacy."""
    if training.privacy is None:
        return None
    rate = min(1.0, training.batch_size / num_examples)
    mechanism = Mechanism(noise_multiplier=noise_multiplier, sample_rate=rate, num_steps=training.num_steps)
    return epsilon_of([mechanism], delta=training.privacy.target_delta)


def reset(tunable: TunableModel, values: Mapping[str, torch.Tensor]) -> None:
    """Give what trains these values, by role name."""
    with torch.no_grad():
        for name, parameter in tunable.parameters.items():
            parameter.copy_(values[name])


def run_training(
    tunable: TunableModel,
    examples: Sequence[Example],
    training: Training,
    *,
    noise_multiplier: float,
    seed: int,
    on_step: Callable[[StepReport], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Train from the start values, in place, by the code that a round runs; return the new values in fp32."""
    privacy = training.privacy
    if privacy is None:
        lengths = [len(example.input_ids) for example in examples]
        return train(
            tunable.model,
            tunable.parameters,
            examples,
            start=tunable.reference,
            batches=draw_batches(
                lengths, batch_size=training.batch_size, first_step=0, num_steps=training.num_steps, seed=[seed]
            ),
            num_steps=training.num_steps,
            total_steps=training.num_steps,
            optimizer=training.optimizer,
            max_grad_norm=training.max_grad_norm,
            on_step=on_step,
        ).weights
    check_per_example_gradients(
        tunable.model,
        tunable.parameters,
        engine=privacy.engine,
        max_grad_norm=privacy.max_grad_norm,
        clipping=privacy.clipping,
    )
    return train_privately(
        tunable.model,
        tunable.parameters,
        examples,
        start=tunable.reference,
        num_steps=training.num_steps,
        sample_rate=min(1.0, training.batch_size / len(examples)),
        noise_multiplier=noise_multiplier,
        max_grad_norm=privacy.max_grad_norm,
        clipping=privacy.clipping,
        engine=privacy.engine,
        micro_batch_size=privacy.micro_batch_size,
        optimizer=training.optimizer,
        total_steps=training.num_steps,
        random=SecureRandom(),
        on_step=on_step,
    ).weights


def audit_tokens(
    tunable: TunableModel,
    examples: Sequence[Example],
    training: Training,
    *,
    noise_multiplier: float,
    seed: int,
) -> dict[str, Any] | None:
    """Take a few steps on a few examples, the server's best case, and search their update for the tokens.

    Returns:
        The result of :func:`recover_tokens`, or None where nothing that trains reads the embeddings.
    """
    few_steps = replace(
        training,
        batch_size=len(examples),
        num_steps=num_leaking_steps,
        optimizer=replace(training.optimizer, warmup_fraction=0.0, weight_decay=0.0),
    )
    weights = run_training(tunable, examples, few_steps, noise_multiplier=noise_multiplier, seed=seed)
    reset(tunable, tunable.reference)
    layers = first_attention_layers(tunable.model, tunable.parameters, is_input=reads_embeddings)
    update = {name: (weights[name] - tunable.reference[name]).float() for name in layers}
    if not any(bool(change.abs().max() > 0) for change in update.values()):
        return None
    tokens = [token for example in examples for token in example.input_ids]
    return recover_tokens(tunable.model, update, layers, tokens_used=tokens)


def reads_embeddings(name: str) -> bool:
    """Return whether a parameter, by its role name, multiplies the first block's attention input."""
    parts = name.split(".")
    first = parts[:2] == ["bottom", "0"]
    return first and parts[-1] == "weight" and any(part in attention_inputs for part in parts) and "lora_B" not in parts
