"""A sweep over private data says what it cost: every private cell is a release, and they compose."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from ot_federated.privacy_accounting import Mechanism, epsilon_of
from simulations import sweep as sweeps
from simulations.sweep_cells import Cell, load_sweep

grid = '[grid]\nseed = [0]\nprivacy.target-epsilon = ["none", 8, 3]\n'
delta = 1e-5


def steps(noise_multiplier: float) -> Mechanism:
    return Mechanism(noise_multiplier=noise_multiplier, sample_rate=0.1, num_steps=30)


def finish_cell(cell: Cell, directory: Path) -> None:
    """Leave a cell as if it had been run: two rounds of its own noise, where it has any."""
    sigma = {8: 0.9, 3: 1.4}.get(int(cell.settings.get("privacy.target-epsilon", 0)))
    score = {"loss": 2.0, "accuracy": 0.5}
    result = {
        "format": sweeps.cell_format,
        "target_epsilon": cell.settings.get("privacy.target-epsilon"),
        "epsilon": None,
        "delta": delta if cell.private else None,
        "data": "own.jsonl",
        "tuning": "lora",
        "partitioner": "iid",
        "num_clients": 2,
        "seed": 0,
        "rows": {"full_zero_shot": score, "plug_in": score},
        "gain": {"loss": 1.0, "accuracy": 0.0},
        "seconds": 1.0,
        "releases": [asdict(steps(sigma))] * 2 if cell.private and sigma else [],
        "audited_epsilon_lower_bound": None,
        "attacks": {},
    }
    path = directory / cell.name / sweeps.cell_file
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result))


def run_finished(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(text)
    for cell in load_sweep(file).cells:
        finish_cell(cell, tmp_path / "out")
    monkeypatch.setattr(sweeps, "write_report", lambda *_, **__: None)
    assert sweeps.main([str(file), "--output-dir", str(tmp_path / "out")]) == 0


def test_a_sweep_warns_with_epsilon_of_all_its_cells_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_finished(tmp_path, grid, monkeypatch)
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    together = epsilon_of([steps(0.9), steps(0.9), steps(1.4), steps(1.4)], delta=delta)
    assert together > epsilon_of([steps(0.9), steps(0.9)], delta=delta) + 0.5
    assert f"epsilon {together:.2f} at delta 1e-05 for 2 private cells" in warning
    assert "choose settings on public or proxy data" in warning


def test_a_sweep_without_private_cells_has_nothing_to_warn_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_finished(tmp_path, grid.replace(", 8, 3]", "]"), monkeypatch)
    assert "WARNING" not in capsys.readouterr().out
