"""Choose what is delivered by the plug-in's loss on the owner's public validation data: which round, which alpha.

Clients tune against an emulator, and what is best for it is not best for the full model: a second pass often improves
the one and hurts the other. The full and the plugged-in solution are connected by a path of low loss (Kaiyan Zhang et
al., "CRaSh", EMNLP 2023, https://arxiv.org/abs/2310.15477, figure 6), so a factor alpha on the change is worth looking
for; it costs one evaluation for each alpha. Test data has no part in it. Of what clients sent this is post-processing:
no guarantee of privacy changes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ot_federated.cache import atomic_directory, file_sha256
from ot_federated.errors import CheckpointError
from ot_federated.logs import logger
from ot_federated.model_owner.evaluation import score_with_progress
from ot_federated.model_owner.owner import Owner
from ot_federated.tuning import scale_change

State = Mapping[str, torch.Tensor]
_weights = "state.safetensors"


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What is delivered.

    Attributes:
        state: What is plugged in.
        server_round: The round that it comes from.
        alpha: The factor on its change.
        losses: The plug-in's loss on the validation data for each alpha that was tried, in nats per token.
    """

    state: dict[str, torch.Tensor]
    server_round: int
    alpha: float = 1.0
    losses: dict[float, float]


def choose_alpha(alphas: Sequence[float], loss_of: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """Return the alpha of the lowest loss, of equal ones that nearest to 1, and all losses."""
    losses = {alpha: loss_of(alpha) for alpha in alphas}
    return min(losses, key=lambda alpha: (losses[alpha], abs(alpha - 1))), losses


def choose_delivery(owner: Owner, state: State, *, start: State) -> Chosen:
    """Return what is delivered: the last or the best round's state, its change scaled by the best alpha.

    Args:
        owner: The owner; its settings say what is chosen from.
        state: The last round's state.
        start: Start values of what trains.
    """
    server_round = owner.config.num_server_rounds
    if owner.config.evaluation.deliver == "best" and (best := BestRound.load(best_directory(owner))) is not None:
        state, server_round = best.state, best.server_round
        logger.info("round %d is delivered: its plug-in's validation loss is the lowest, %.3f", server_round, best.loss)

    def scaled(alpha: float) -> dict[str, torch.Tensor]:
        return scale_change(state, start, owner.tuning, alpha=alpha)

    alphas = owner.config.evaluation.tried_alphas
    if not alphas:
        return Chosen(state=dict(state), server_round=server_round, losses={})
    alpha, losses = choose_alpha(alphas, lambda alpha: validation_loss(owner, scaled(alpha), title=f"alpha {alpha:g}"))
    logger.info("alpha %g of %s: validation loss %.3f", alpha, owner.config.evaluation.alphas, losses[alpha])
    return Chosen(state=scaled(alpha), server_round=server_round, alpha=alpha, losses=losses)


def interpolate(before: State, after: State, alpha: float) -> dict[str, torch.Tensor]:
    """Return ``before + alpha (after - before)``, tensor by tensor."""
    return {name: torch.lerp(before[name], tensor, alpha) for name, tensor in after.items()}


def choose_step(
    owner: Owner, before: State, after: State, *, between: Callable[[State, State, float], State] = interpolate
) -> tuple[dict[str, torch.Tensor], float]:
    """Return the state on the way from one to the other with the lowest validation loss of the plug-in, and its alpha.

    Args:
        owner: The owner; its settings say which alphas are tried.
        before: The state that the round began with.
        after: The state that it ended with.
        between: Gives the state at an alpha.
    """
    alpha, losses = choose_alpha(
        owner.config.evaluation.tried_alphas,
        lambda alpha: validation_loss(owner, between(before, after, alpha), title=f"alpha {alpha:g}"),
    )
    logger.info("the round's update is scaled by alpha %g: validation loss %.3f", alpha, losses[alpha])
    return dict(between(before, after, alpha)), alpha


def validation_loss(owner: Owner, state: State, *, title: str) -> float:
    """Return the plug-in's loss on the owner's validation data, in nats per token."""
    with owner.plugged_in(state) as model:
        return score_with_progress(owner.task, model, owner.validation, title=title).loss


def describe_delivery(chosen: Chosen) -> dict[str, object]:
    """Return what ``summary.json`` says of what was delivered."""
    return {
        "round": chosen.server_round,
        "alpha": chosen.alpha,
        "validation_losses": {f"{alpha:g}": loss for alpha, loss in chosen.losses.items()},
    }


def best_directory(owner: Owner) -> Path:
    """Return where the best round so far is kept."""
    return owner.run.path / "best-round"


def note_round(owner: Owner, state: State, *, server_round: int, loss: float) -> None:
    """Keep a round's state where it is the best so far and the best is to be delivered."""
    if owner.config.evaluation.deliver == "best" and server_round > 0:
        best = BestRound.load(best_directory(owner))
        if best is None or loss < best.loss:
            BestRound(server_round, loss, dict(state)).save(best_directory(owner))


def forget_best_after(owner: Owner, last_round: int) -> None:
    """Drop the best round where it lies behind the one that a run goes on from: it will come again, or not."""
    best = BestRound.load(best_directory(owner))
    if best is not None and best.server_round > last_round:
        shutil.rmtree(best_directory(owner))


@dataclass(frozen=True)
class BestRound:
    """The round whose plug-in had the lowest validation loss."""

    server_round: int
    loss: float
    state: dict[str, torch.Tensor]

    def save(self, directory: Path) -> None:
        """Write it, all of it or nothing."""
        with atomic_directory(directory, replace=True) as partial:
            save_file({name: tensor.contiguous() for name, tensor in self.state.items()}, partial / _weights)
            fields = {"round": self.server_round, "loss": self.loss, "sha256": file_sha256(partial / _weights)}
            (partial / "state.json").write_text(json.dumps(fields, indent=2))

    @classmethod
    def load(cls, directory: Path) -> BestRound | None:
        """Read it back; None where there is none.

        Raises:
            CheckpointError: If it is damaged.
        """
        if not directory.is_dir():
            return None
        try:
            fields = json.loads((directory / "state.json").read_text())
            if file_sha256(directory / _weights) != fields["sha256"]:
                raise ValueError(f"{_weights} does not have the digest that was saved with it")
            return cls(int(fields["round"]), float(fields["loss"]), load_file(directory / _weights))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(
                f"{directory} cannot be read ({error}). Delete it, and resume with evaluation.deliver=last."
            ) from error
