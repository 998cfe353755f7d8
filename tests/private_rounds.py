"""A data owner's private rounds on a tiny bundle, without a federation around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ot_federated.data_owner.fine_tuning import load_model_once
from ot_federated.data_owner.policy import Policy
from ot_federated.data_owner.private_tuning import PrivacySettings, tune_privately
from ot_federated.model_owner.splitting import plan_stack, write_bundle
from ot_federated.tasks.base import Example
from ot_federated.training import OptimizerSettings, StepReport, TrainingResult
from ot_federated.tuning import Tuning
from tests.families import build_family_model, byte_tokenizer, num_blocks

delta = 1e-5
usual = PrivacySettings(
    target_epsilon=8.0,
    target_delta=delta,
    noise_multiplier=1.0,
    max_grad_norm=0.5,
    clipping="flat",
    engine="loop",
    micro_batch_size=8,
)
whole = Tuning()
generous = Policy(max_epsilon=1e6, delta=delta, min_noise_multiplier=1e-3, max_sample_rate=1.0)


def write_tiny_bundle(directory: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write the bundle of a small random LLaMA: a block of adapter at either end, one of emulator between them."""
    write_bundle(
        directory,
        model=build_family_model("llama", dtype=dtype),
        tokenizer=byte_tokenizer(),
        stack=plan_stack(num_blocks=num_blocks, bottom=1, top=1, kept=[3], bridged=False),
        bridges={},
        compression="uniform+empty",
    )
    return directory


def build_examples(num: int) -> list[Example]:
    """Return short examples of different lengths."""
    generator = torch.Generator().manual_seed(0)
    return [
        Example(tuple(torch.randint(4, 260, (5 + index % 4,), generator=generator).tolist()), 2) for index in range(num)
    ]


@dataclass(frozen=True, kw_only=True)
class PrivateClient:
    """A data owner with 40 examples under a name; its ledger is the environment's.

    Attributes:
        bundle: Directory of the bundle.
        dataset: Name of its data set.
        name: Its own name.
        policy: What it allows.
        settings: What the run asks for.
        batch_size: Expected batch.
        num_examples: How many examples it has.
        num_steps: Steps of a round.
        tuning: What trains.
        num_rounds: Rounds of the run.
    """

    bundle: Path
    dataset: str = "ward-7"
    name: str = "hospital-1"
    policy: Policy = generous
    settings: PrivacySettings = usual
    batch_size: int = 4
    num_examples: int = 40
    num_steps: int = 3
    tuning: Tuning = whole
    num_rounds: int = 10

    def train(
        self,
        server_round: int = 1,
        *,
        run: str = "run-a",
        on_step: Callable[[StepReport], None] | None = None,
        **settings: Any,
    ) -> tuple[dict[str, np.ndarray[Any, Any]], float]:
        """Do one round, with ``settings`` in place of the client's own; return what leaves, and epsilon in all."""
        examples = build_examples(self.num_examples)
        arrays, guarantee = tune_privately(
            self.bundle,
            load_model_once(str(self.bundle), "cpu", self.tuning).reference,
            examples,
            rows=[{"tokens": list(example.input_ids)} for example in examples],
            dataset=self.dataset,
            policy=self.policy,
            settings=replace(self.settings, **settings),
            run=run,
            task="multiple-choice",
            device="cpu",
            tuning=self.tuning,
            client=self.name,
            server_round=server_round,
            num_rounds=self.num_rounds,
            batch_size=self.batch_size,
            num_steps=self.num_steps,
            optimizer=OptimizerSettings(
                learning_rate=1e-3, lr_schedule="constant", warmup_fraction=0.0, weight_decay=0.0
            ),
            encode=as_arrays,
            on_step=on_step,
        )
        return arrays, guarantee.epsilon


def as_arrays(result: TrainingResult) -> dict[str, np.ndarray[Any, Any]]:
    """Return the trained weights as they are."""
    return {name: weight.numpy() for name, weight in result.weights.items()}
