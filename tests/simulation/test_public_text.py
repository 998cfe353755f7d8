"""The ablation over public text: its cells, its table, that it goes on, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simulations.benchmarks import public_text
from simulations.benchmarks.public_text import list_cells, main
from tests.families import save_family_model


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("OT_FEDERATED_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "public.txt"
    text.write_text("\n".join(f"Line {i} of the owner's public text says that {i} is {i * i % 7}." for i in range(400)))
    return [
        f"model.source={save_family_model(tmp_path / 'model')}",
        "model.dtype=float32",
        "task.name=causal-lm",
        "offsite.bottom-blocks=2",
        "offsite.top-blocks=2",
        "offsite.emulator-blocks=1",
        "data.max-length=64",
        f"offsite.public-text={text}",
        "offsite.public-text-column=text",
    ]


def test_cells_are_measured_once(settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*settings, "--output-dir", str(tmp_path / "out"), "--tuning-steps", "2", "--held-out", "1024"]
    words += ["--vary", "offsite.calibration-tokens=512,4096", "--emulator", "gaps=empty", "--emulator", "gaps=bridge"]
    assert main(words) == 0
    document = json.loads((tmp_path / "out" / "public_text.json").read_text())
    assert document["command"].startswith("python -m simulations.benchmarks.public_text ")
    cells = document["cells"]
    assert [cell["compression"] for cell in cells] == ["influence+empty"] * 2 + ["influence+bridge"] * 2
    # More text makes a better bridge, and leaves no bridge as it is.
    errors = [cell["fidelity"]["output_error"] for cell in cells]
    assert errors[3] < errors[2] < errors[0] == errors[1]
    assert all(cell["plug_in_loss"] > 0 and cell["build_seconds"] >= 0 for cell in cells)
    assert len((tmp_path / "out" / "public_text.txt").read_text().splitlines()) == 5
    monkeypatch.setattr(public_text, "measure_cell", lambda *_: pytest.fail("a cell was measured again"))
    assert main(words) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vary", "offsite.calibration-tokens=100000"], "reaches into the text to score on"),
        (["--held-out", "100000"], "too few to keep"),
        (["--vary", "offsite.calibration-tokens"], "must be a key and its values"),
        (["--emulator", "keep=gradients"], "did you mean"),
    ],
)
def test_bad_input(words: list[str], message: str, settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*settings, *words]) == 1
    assert message in capsys.readouterr().err


def test_axes_multiply() -> None:
    assert list_cells(["a=1,2"], ["keep=cka x=3", "gaps=empty"]) == [
        ["offsite.keep=cka", "offsite.x=3", "a=1"],
        ["offsite.keep=cka", "offsite.x=3", "a=2"],
        ["offsite.gaps=empty", "a=1"],
        ["offsite.gaps=empty", "a=2"],
    ]
