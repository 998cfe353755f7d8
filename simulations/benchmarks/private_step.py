"""What a private step costs: ``python -m simulations.benchmarks.private_step [key=value ...]``.

One step of ``train`` against one step of ``train_privately`` on the same batch of real questions, in one process, on
the bundle that the default run would send. A sample rate of 1 makes the batch of every private step the same one,
drawn by the same code as ever. Modes take turns in every repetition, so that a machine that slows down slows all of
them; medians over all steps but the first of each turn, which pays for memory and hooks.

A private step computes in the type in which a client would: ``hooks`` and ``ghost`` in float32, whatever ``dtype``.
What the client's self-check refuses is not timed: the reason stands in its place.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ot_federated.config import RunConfig, parse_run_config
from ot_federated.data_owner.differential_privacy import train_privately
from ot_federated.data_owner.fine_tuning import TunableModel, load_model_once, load_private_model
from ot_federated.data_owner.per_example_gradients import PrivacyError, engine_names
from ot_federated.data_owner.privacy_self_check import check_per_example_gradients
from ot_federated.devices import choose_device
from ot_federated.model_owner.owner import prepare
from ot_federated.reporting.run_directory import RunDirectory
from ot_federated.secure_random import SecureRandom
from ot_federated.settings import Scalar
from ot_federated.sources import load_table
from ot_federated.tasks.base import Example
from ot_federated.tasks.losses import continuations
from ot_federated.training import StepReport, build_optimizer_settings, draw_batches, train
from ot_federated.tuning import build_tuning
from simulations.benchmarks.environment import write_results
from simulations.command_line import build_request

results = Path(__file__).parent.parent / "results" / "private_step.json"
target_ratio = 1.35
tunings: dict[str, dict[str, Scalar]] = {
    "lora": {"tuning.method": "lora"},
    "ffa-lora": {"tuning.method": "lora", "tuning.freeze-lora-a": True},
    "full": {"tuning.method": "full"},
}
noise_multiplier, max_grad_norm = 1.0, 1.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure.

    Attributes:
        settings: The run config: model, split, data.
        dtype: The model's type: ``float32``, ``bfloat16`` or ``auto``.
        tuning: A name in ``tunings``.
        engines: Engines to measure.
        batch_size: Examples a step; a private step takes them through the model in one piece, as the plain one does.
        num_batches: Batches to measure on.
        num_repetitions: Turns of each mode on each batch.
        num_steps: Timed steps a turn.
    """

    settings: Mapping[str, Scalar]
    dtype: str
    tuning: str
    engines: Sequence[str]
    batch_size: int
    num_batches: int
    num_repetitions: int
    num_steps: int


def measure(plan: Plan) -> list[dict[str, Any]]:
    """Return one row for each engine: seconds of a plain and of a private step, and their ratio."""
    config = parse_run_config({**plan.settings, "model.dtype": plan.dtype, **tunings[plan.tuning]})
    directory, batches = prepare_inputs(config, batch_size=plan.batch_size, num_batches=plan.num_batches)
    tuning, device = build_tuning(config), choose_device()
    tunable = load_model_once(str(directory), device, tuning)
    common = {
        "tuning": plan.tuning,
        "dtype": str(tunable.model.dtype).removeprefix("torch."),
        "num_trained": sum(parameter.numel() for parameter in tunable.parameters.values()),
        "batch_size": plan.batch_size,
        "tokens_per_batch": [sum(len(example.input_ids) for example in batch) for batch in batches],
    }
    rows, modes = [], {"plain": _plain_turn(tunable, config)}
    for engine in plan.engines:
        private = load_private_model(str(directory), device, tuning, engine=engine)
        refusal = _refusal(private, engine=engine)
        if refusal:
            rows.append({**common, "engine": engine, "refused": refusal})
        else:
            modes[engine] = _private_turn(private, config, engine=engine)
    seconds: dict[str, list[float]] = {name: [] for name in modes}
    for _, batch in itertools.product(range(plan.num_repetitions), batches):
        for name, turn in modes.items():
            seconds[name] += turn(batch, plan.num_steps)
    plain = median(seconds["plain"])
    for engine in [name for name in modes if name != "plain"]:
        private_seconds = median(seconds[engine])
        rows.append(
            {
                **common,
                "engine": engine,
                "plain_seconds": round(plain, 4),
                "private_seconds": round(private_seconds, 4),
                "ratio": round(private_seconds / plain, 3),
                "num_steps_timed": len(seconds[engine]),
            }
        )
    return rows


def prepare_inputs(config: RunConfig, *, batch_size: int, num_batches: int) -> tuple[Path, list[list[Example]]]:
    """Return the bundle of ``config`` and batches of its training data, drawn as plain training draws them."""
    with tempfile.TemporaryDirectory() as directory:
        owner = prepare(config, RunDirectory(Path(directory)))
    columns = config.columns
    rows = load_table(config.data.train, split="train", columns=list(columns.values()))
    examples = continuations(owner.task.encode(rows.select(range(min(rows.num_rows, 64 * batch_size)))))
    lengths = [example.length for example in examples]
    drawn = draw_batches(lengths, batch_size=batch_size, first_step=0, num_steps=num_batches, seed=[config.seed])
    return owner.bundle, [[examples[index] for index in batch] for batch in drawn]


Turn = Callable[[Sequence[Example], int], list[float]]


class _Clock:
    """A step callback that keeps how long each step took; the first one of a turn is dropped."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._ends: list[float] = []

    def __call__(self, report: StepReport) -> None:
        if self._device != "cpu":
            torch.accelerator.synchronize()
        self._ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self._ends)]


def _plain_turn(tunable: TunableModel, config: RunConfig) -> Turn:
    def turn(batch: Sequence[Example], num_steps: int) -> list[float]:
        clock, everyone = _Clock(tunable.model.device.type), list(range(len(batch)))
        batches: Iterator[list[int]] = itertools.repeat(everyone)
        train(
            tunable.model,
            tunable.parameters,
            batch,
            start=tunable.reference,
            batches=batches,
            num_steps=num_steps + 1,
            total_steps=num_steps + 1,
            optimizer=build_optimizer_settings(config.train),
            max_grad_norm=max_grad_norm,
            on_step=clock,
        )
        return clock.seconds()

    return turn


def _private_turn(tunable: TunableModel, config: RunConfig, *, engine: str) -> Turn:
    def turn(batch: Sequence[Example], num_steps: int) -> list[float]:
        clock = _Clock(tunable.model.device.type)
        train_privately(
            tunable.model,
            tunable.parameters,
            batch,
            start=tunable.reference,
            num_steps=num_steps + 1,
            sample_rate=1.0,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            engine=engine,
            micro_batch_size=len(batch),
            optimizer=build_optimizer_settings(config.train),
            total_steps=num_steps + 1,
            random=SecureRandom(),
            on_step=clock,
        )
        return clock.seconds()

    return turn


def _refusal(tunable: TunableModel, *, engine: str) -> str:
    """Return why a client would refuse this engine on this model; empty where it would not."""
    try:
        check_per_example_gradients(tunable.model, tunable.parameters, engine=engine, max_grad_norm=max_grad_norm)
    except PrivacyError as error:
        return str(error)
    return ""


def format_row(row: dict[str, Any]) -> str:
    """Return a row as a line."""
    head = f"{row['tuning']:<9}{row['dtype']:<10}{row['engine']:<7}"
    if "refused" in row:
        return f"{head}refused: {row['refused']}"
    return f"{head}plain {row['plain_seconds']:.3f} s  private {row['private_seconds']:.3f} s  ratio {row['ratio']:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the table and the result file."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parsed = _build_parser().parse_intermixed_args(words)
    command = shlex.join(["python", "-m", "simulations.benchmarks.private_step", *words])
    settings = build_request(parsed.settings, engine="in-process", output=None, command=command).run_config
    rows: list[dict[str, Any]] = []
    for dtype, tuning in itertools.product(parsed.dtypes, parsed.tunings):
        plan = Plan(
            settings=settings,
            dtype=dtype,
            tuning=tuning,
            engines=parsed.engines,
            batch_size=parsed.batch_size,
            num_batches=parsed.batches,
            num_repetitions=parsed.repetitions,
            num_steps=parsed.steps,
        )
        measured = measure(plan)
        for row in measured:
            print(format_row(row), flush=True)
        rows += measured
        # After every model: whoever stops early keeps what was measured.
        write_results(
            parsed.output, command=command, model=settings["model.source"], target_ratio=target_ratio, rows=rows
        )
    return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m simulations.benchmarks.private_step",
        description="Time a private training step against a plain one on the same batch.",
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="run config: model, split, data")
    parser.add_argument("--dtypes", type=_names, default=["float32", "bfloat16"], help="types of the model, by comma")
    parser.add_argument("--tunings", type=_names, default=list(tunings), help=f"of {', '.join(tunings)}")
    parser.add_argument("--engines", type=_names, default=list(engine_names), help=f"of {', '.join(engine_names)}")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=2, help="different batches")
    parser.add_argument("--repetitions", type=int, default=5, help="turns of each mode on each batch")
    parser.add_argument("--steps", type=int, default=2, help="timed steps a turn")
    parser.add_argument("--output", type=Path, default=results)
    return parser


def _names(text: str) -> list[str]:
    return text.split(",")


if __name__ == "__main__":
    sys.exit(main())
