r"""How much public text is enough, and for which emulator: ``python -m simulations.benchmarks.public_text``.

One cell is one emulator made from so much text. It is judged on public text that nothing was fitted on: gradient
cosines, output error, and the loss of the plug-in after a short tuning, beside its bytes. ``--vary`` takes a key and
its values, ``--emulator`` a set of ``offsite`` settings; the cells are all their combinations. A cell that is done is
not measured again. Results go to ``simulations/results/public_text.json``, with a table::

    python -m simulations.benchmarks.public_text --vary offsite.calibration-tokens=1024,4096,16384,65536
    python -m simulations.benchmarks.public_text --vary offsite.distillation-steps=0,100,400
    python -m simulations.benchmarks.public_text --name screening --emulator "keep=gradient emulator-blocks=8" \
        --emulator "keep=gradient emulator-blocks=14 transport=int8"
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ot_federated.bundle import Manifest
from ot_federated.cache import atomic_write_text
from ot_federated.config import RunConfig, parse_run_config
from ot_federated.emulated_model import load_emulated_model
from ot_federated.errors import ConfigError, DataError, OtFederatedError
from ot_federated.model_owner.compression.fidelity import measure_fidelity
from ot_federated.model_owner.compression.plug_in_validation import cut_windows, mean_loss, validate_by_plug_in
from ot_federated.model_owner.owner import Parts, load_parts, make_bundle
from ot_federated.model_owner.preparation import prepare_windows
from ot_federated.model_owner.public_data import read_public
from ot_federated.tasks.losses import predicts_tokens
from simulations.benchmarks.environment import write_results
from simulations.command_line import parse_settings


@dataclass(frozen=True)
class Bench:
    """What all cells share: the full model, and public text to tune on and to score on."""

    parts: Parts
    tune_on: torch.Tensor
    score_on: torch.Tensor
    num_steps: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is not measured yet and write the report; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.benchmarks.public_text",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="run-config keys")
    parser.add_argument("--vary", action="append", default=[], metavar="KEY=A,B", help="a key and its values")
    parser.add_argument(
        "--emulator", action="append", default=[], metavar="'KEY=A KEY=B'", help="offsite settings, without offsite."
    )
    parser.add_argument("--tuning-steps", type=int, default=48, help="steps of tuning before the plug-in is scored")
    parser.add_argument("--held-out", type=int, default=8192, help="tokens at the end of the text to score on")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).resolve().parents[1] / "results")
    parser.add_argument("--name", default="public_text", help="name of the result files")
    words = list(sys.argv[1:] if arguments is None else arguments)
    parsed = parser.parse_args(words)
    try:
        cells = measure_all(parsed)
    except OtFederatedError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    command = shlex.join(["python", "-m", "simulations.benchmarks.public_text", *words])
    write_results(parsed.output_dir / f"{parsed.name}.json", command=command, cells=cells)
    table = describe_cells(cells)
    atomic_write_text(parsed.output_dir / f"{parsed.name}.txt", table + "\n")
    sys.stdout.write(table + "\n")
    return 0


def measure_all(parsed: argparse.Namespace) -> list[dict[str, Any]]:
    """Return every cell, from its file where it was measured before with the same settings."""
    bench: Bench | None = None
    cells = []
    for chosen in list_cells(parsed.vary, parsed.emulator):
        config = parse_run_config(parse_settings([*parsed.settings, *chosen]))
        asked = {
            "settings": [*parsed.settings, *chosen],
            "tuning_steps": parsed.tuning_steps,
            "held_out": parsed.held_out,
        }
        digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
        path = parsed.output_dir / f"{parsed.name}_cells" / f"{digest}.json"
        if path.exists():
            cells.append(json.loads(path.read_text(encoding="utf-8")))
            continue
        bench = bench or load_bench(config, num_held_out=parsed.held_out, num_steps=parsed.tuning_steps)
        cell = {"asked": asked, "varied": chosen, **measure_cell(config, bench)}
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, json.dumps(cell, indent=1) + "\n")
        sys.stderr.write(f"{describe_cells([cell])}\n")
        cells.append(cell)
    return cells


def list_cells(vary: Sequence[str], emulators: Sequence[str]) -> list[list[str]]:
    """Return the settings of every cell, as ``key=value``.

    Raises:
        ConfigError: If an axis is not written as a key and its values.
    """
    axes = []
    for axis in vary or ([] if emulators else ["offsite.calibration-tokens=1024,4096,16384,65536"]):
        key, _, values = axis.partition("=")
        if not values:
            raise ConfigError(
                f"--vary={axis!r} must be a key and its values, such as offsite.calibration-tokens=1024,4096."
            )
        axes.append([[f"{key}={value}"] for value in values.split(",")])
    if emulators:
        axes.insert(0, [[f"offsite.{word}" for word in emulator.split()] for emulator in emulators])
    return [list(itertools.chain(*combination)) for combination in itertools.product(*axes)]


def load_bench(config: RunConfig, *, num_held_out: int, num_steps: int) -> Bench:
    """Load the full model and divide the public text: its end to score on, what is before it to tune on.

    Raises:
        DataError: If nothing is left to tune on.
        ConfigError: If the task's model predicts no tokens.
    """
    parts = load_parts(config)
    public = read_public(config, parts, num_tokens=10**7)
    windows = prepare_windows(parts.model, parts.processor, public, num_tokens=10**7)
    if not predicts_tokens(parts.model, windows):
        raise ConfigError(
            f"task.name={config.task.name!r} ends in a classification head, and this compares language models by their "
            "loss on text: take multiple-choice, instruction or causal-lm."
        )
    held_out = max(1, num_held_out // windows.shape[1])
    if len(windows) <= 2 * held_out:
        raise DataError(
            f"The public text has {windows.numel()} tokens, too few to keep {num_held_out} of them apart: give more "
            "with offsite.public-text, or lower --held-out."
        )
    return Bench(parts, windows[:-held_out], windows[-held_out:], num_steps)


def measure_cell(config: RunConfig, bench: Bench) -> dict[str, Any]:
    """Make one emulator and judge it.

    Raises:
        DataError: If its calibration would read the text that it is scored on.
    """
    offsite = config.offsite
    wanted = {"offsite.calibration-tokens": offsite.calibration_tokens}
    if offsite.distillation_steps:
        wanted["offsite.distillation-tokens"] = offsite.distillation_tokens
    for key, number in wanted.items():
        if number > bench.tune_on.numel():
            raise DataError(
                f"{key}={number} reaches into the text to score on: {bench.tune_on.numel()} tokens lie before it."
            )
    model = bench.parts.model
    start = time.perf_counter()
    directory, manifest = make_bundle(config, bench.parts)
    seconds = time.perf_counter() - start
    emulated = load_emulated_model(directory, manifest, device=bench.parts.device)
    fidelity = measure_fidelity(model, emulated, manifest, bench.score_on)
    losses = validate_by_plug_in(
        model,
        emulated,
        manifest,
        tune_on=cut_windows(bench.tune_on),
        score_on=cut_windows(bench.score_on),
        num_steps=bench.num_steps,
        seed=config.seed,
    )
    return {
        **describe_emulator(manifest),
        "fidelity": fidelity.to_dict(),
        "full_loss": mean_loss(model, cut_windows(bench.score_on)),
        "plug_in_loss": losses.plug_in,
        "emulator_tuned_loss": losses.emulator,
        "build_seconds": seconds,
    }


def describe_emulator(manifest: Manifest) -> dict[str, Any]:
    """Return what an emulator is and how large."""
    return {
        "compression": manifest.compression,
        "kept_blocks": manifest.kept_blocks,
        "emulator_bytes_fraction": manifest.file_bytes("emulator.safetensors") / manifest.middle_bytes,
        "exact_weight_fraction": manifest.exact_weight_fraction,
    }


def describe_cells(cells: Sequence[Mapping[str, Any]]) -> str:
    """Return the cells as a table."""
    lines = [
        f"{'bytes':>7}{'exact':>7}{'cos bottom':>12}{'cos top':>9}{'error':>8}{'emulator':>10}{'full':>8}"
        f"{'plug-in':>9}{'em. tuned':>11}{'seconds':>9}  what"
    ]
    for cell in cells:
        fidelity = cell["fidelity"]
        cosines = "".join(
            f"{'-' if fidelity[side] is None else format(fidelity[side], '.3f'):>{width}}"
            for side, width in (("bottom_cosine", 12), ("top_cosine", 9))
        )
        lines.append(
            f"{cell['emulator_bytes_fraction']:>7.1%}{cell['exact_weight_fraction']:>7.1%}{cosines}"
            f"{fidelity['output_error']:>8.3f}{fidelity['loss']:>10.3f}{cell['full_loss']:>8.3f}"
            f"{cell['plug_in_loss']:>9.3f}{cell['emulator_tuned_loss']:>11.3f}{cell['build_seconds']:>9.0f}  "
            f"{cell['compression']}:{len(cell['kept_blocks'])}  {' '.join(cell['varied'])}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
