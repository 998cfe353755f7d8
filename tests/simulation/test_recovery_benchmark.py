"""The recovery benchmark on a model that takes milliseconds: cells that resume, candidates, shared rows, the report."""

from __future__ import annotations

import json
import signal
import time
import weakref
from pathlib import Path
from typing import Any

import pytest

from ot_federated.errors import OtFederatedError
from simulations import command_line
from simulations.benchmarks import recovery as benchmark
from simulations.benchmarks.recovery import main
from simulations.benchmarks.recovery_plan import candidate_of, load_plan
from simulations.sweep_cells import cell_file, cell_format
from tests.federations import build_questions, write_rows

plan_text = """
[base]
model.source = "{model}"
model.dtype = "float32"
offsite.bottom-blocks = 1
offsite.top-blocks = 1
offsite.emulator-blocks = 2
offsite.keep = "uniform"
offsite.calibration-tokens = 512
offsite.public-text = "{data}"
train.batch-size = 4
evaluation.max-examples = 6
evaluation.max-validation-examples = 6

[task.questions]
cut = {{ source = "{data}", train = 16, validation = 6, test = 8 }}
data.train = "cut:train"
data.validation = "cut:validation"
data.test = "cut:test"

[emulator.empty]
offsite.gaps = "empty"
candidates.train.learning-rate = [1e-3, 3e-3]

[emulator.bridge]
offsite.gaps = "bridge"

[federation.centralised]
num-clients = 1
num-server-rounds = 1
strategy.min-nodes = 1
train.max-steps = 0

[full]
candidates.epochs = [1, 2]
candidates.evaluation.full-learning-rate = [1e-4, 1e-2]

[[run]]
tasks = ["questions"]
emulators = ["empty", "bridge"]
federations = ["centralised"]
seeds = [0, 1]
"""


@pytest.fixture
def plan(tmp_path: Path, llama_directory: Path) -> Path:
    data = write_rows(tmp_path / "questions.jsonl", build_questions(40))
    file = tmp_path / "tiny.toml"
    file.write_text(plan_text.format(model=llama_directory, data=data))
    return file


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch) -> None:
    """Run cells here: a process of their own costs its imports each time, and the sweep's tests see to that."""

    def simulate(settings, run: Path, *, engine: str, log: Path) -> None:
        words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        if command_line.main(["--engine", engine, "--output", str(run), *words]):
            raise OtFederatedError("the run failed")

    monkeypatch.setattr(benchmark, "simulate", simulate)


def run(plan: Path, *words: str) -> tuple[int, dict[str, Any], Path]:
    directory = plan.parent / "out"
    code = main([str(plan), "--output-dir", str(directory), "--results", str(plan.parent / "results"), *words])
    return code, json.loads((plan.parent / "results" / "tiny.json").read_text()), directory


def test_cells_have_five_rows_share_the_full_models_and_are_not_run_twice(plan: Path, monkeypatch, capsys) -> None:
    code, found, directory = run(plan)
    assert code == 0
    assert len(list(directory.glob("task=*"))) == 5  # two candidates and one chosen, two without candidates
    full = {part["settings"]["seed"]: len(part["candidates"]) for part in found["full_fine_tuning"]}
    assert full == {0: 4, 1: 1}  # measured once a seed, chosen at the first
    first = next(part for part in found["full_fine_tuning"] if part["settings"]["seed"] == 0)
    assert [part["num_steps"] for part in first["candidates"]] == [4, 4, 8, 8]
    cells = found["cells"]
    assert {(cell["emulator"], cell["seed"]) for cell in cells} == {(e, s) for e in ("empty", "bridge") for s in (0, 1)}
    best = min(found["tuning"][:2], key=lambda part: part["validation_loss"])["candidate"]
    assert {json.dumps(cell["candidate"]) for cell in cells if cell["emulator"] == "empty"} == {json.dumps(best)}
    for cell in cells:
        rows = cell["rows"]
        assert len(rows) == 5
        assert all(row["num_examples"] == 6 for row in rows.values())
        gain = rows["full_zero_shot"]["loss"] - rows["full_fine_tuned"]["loss"]
        reached = rows["full_zero_shot"]["loss"] - rows["plug_in"]["loss"]
        assert cell["recovery"]["loss"] == pytest.approx(reached / gain if gain > 0 else None)
        assert cell["value_gap"]["loss"] == pytest.approx(rows["emulator_fine_tuned"]["loss"] - rows["plug_in"]["loss"])
        assert 0 < cell["exact_weight_fraction"] <= 1
        assert 0 < cell["emulator_bytes_fraction"] < 1
        assert 0 < cell["client_flops_fraction"] < 1
        assert cell["client_bytes"] > 0
        assert cell["client_tokens"] > 0
        assert -1 <= cell["predictors"]["gradient_cosine_bottom"] <= 1
    same_seed = [cell["rows"]["full_fine_tuned"] for cell in cells if cell["seed"] == 0]
    assert same_seed[0] == same_seed[1]
    for name in ("tiny.md", "tiny_bytes.png", "tiny_value_gap.png"):
        assert (plan.parent / "results" / name).stat().st_size > 0
    assert "| questions | empty" in capsys.readouterr().out

    monkeypatch.setattr(benchmark, "simulate", lambda *_, **__: pytest.fail("a finished cell ran again"))
    assert run(plan)[1]["cells"] == cells
    (plan.parent / "results" / "tiny.json").unlink()
    code, again, _ = run(plan, "--report")
    assert (code, again["cells"]) == (0, cells)


def test_a_cell_that_fails_is_told_and_the_others_go_on(plan: Path, capsys) -> None:
    plan.write_text(
        plan.read_text().replace('offsite.gaps = "bridge"', 'offsite.gaps = "bridge"\ndata.text-column = "x"')
    )
    text = plan.read_text().replace("[emulator.bridge]\n", '[emulator.bridge]\noffsite.public-text = "none.jsonl"\n')
    plan.write_text(text)
    code, found, _ = run(plan, "--seeds", "3")
    assert code == 1
    assert {cell["emulator"] for cell in found["cells"]} == {"empty"}
    assert {cell["seed"] for cell in found["cells"]} == {3}
    error = capsys.readouterr().err
    assert "FAILED task=questions_emulator=bridge" in error
    assert "none.jsonl" in error


def test_dry_run_lists_cells_and_only_chooses(plan: Path, capsys) -> None:
    assert (
        main([str(plan), "--output-dir", str(plan.parent / "out"), "--dry-run", "--only", "empty", "--only", "seed=1"])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all("emulator=empty" in line and line.startswith("to do") for line in lines[:2])
    assert main([str(plan), "--only", "nothing"]) == 2
    assert "--dry-run" in capsys.readouterr().err
    assert not (plan.parent / "out").exists()


def test_sigterm_ends_the_benchmark_though_its_exception_is_dropped(plan: Path, monkeypatch, capsys) -> None:
    def drop(_cell, _plan, _directory: Path) -> None:
        began.append(_cell)
        thing = Thing()
        reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGTERM))
        del thing
        assert reference() is None
        time.sleep(60)  # cut short by the signal that is sent once more

    class Thing:
        """Something that can be referred to weakly."""

    began: list[object] = []
    monkeypatch.setattr(benchmark, "run_cell", drop)
    assert main([str(plan), "--output-dir", str(plan.parent / "out")]) == 130
    assert len(began) == 1
    assert "interrupted; the same command goes on" in capsys.readouterr().err


def test_a_task_may_have_a_full_fine_tuning_of_its_own(plan: Path) -> None:
    plan.write_text(
        plan.read_text()
        + """
[task.others]
data.train = "x.jsonl"
full.epochs = 3
"""
    )
    full = load_plan(plan).full
    assert [candidate["epochs"] for candidate in full["questions"].candidates] == [1, 1, 2, 2]
    assert full["others"].candidates == ({"epochs": 3},)


def test_later_seeds_wait_for_the_first_ones_choice(plan: Path) -> None:
    cells = [cell for cell in load_plan(plan).cells if cell.point["emulator"] == "empty"]
    directory = plan.parent / "out"
    first, later = cells[:2], cells[2:]
    assert all(benchmark.is_wanted(cell, cells, directory) for cell in first)
    assert not any(benchmark.is_wanted(cell, cells, directory) for cell in later)
    for cell, loss in zip(first, (2.0, 1.0), strict=True):
        path = directory / cell.name / cell_file
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"format": cell_format, "validation_loss": loss}))
    assert [benchmark.is_wanted(cell, cells, directory) for cell in later] == [False, True]
    assert candidate_of(later[1]) == {"train.learning-rate": 3e-3}


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('emulators = ["empty", "bridge"]', 'emulators = ["emty"]', "'empty'"),
        ("seeds = [0, 1]", "", "it takes tasks, emulators, federations, seeds"),
        ("train = 16, ", "", "task.questions.cut"),
        ("[1e-3, 3e-3]", "1e-3", "must be a list of values"),
        ("[1, 2]", "[1, 0]", "full.epochs=0"),
        ("[emulator.bridge]", "[emulator.bridge]\noffsite.gapes = 1", "offsite.gaps"),
        ("[full]", "[fully]", "fully"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(plan: Path, capsys, old: str, new: str, reason: str) -> None:
    plan.write_text(plan.read_text().replace(old, new))
    assert main([str(plan), "--dry-run"]) == 2
    assert reason in capsys.readouterr().err


def test_the_shipped_ablations_differ_from_their_reference_in_what_they_name() -> None:
    cells = load_plan(benchmark.default_plan.with_name("ablations.toml")).cells
    reference = {c.point["federation"]: c.settings for c in cells if c.point["emulator"] == "reference"}
    assert set(reference) == {"centralised", "four-clients"}
    for cell in cells:
        changed = {key for key, value in cell.settings.items() if reference[cell.point["federation"]].get(key) != value}
        assert bool(changed) == (cell.point["emulator"] != "reference")
        assert all(key.startswith(("offsite.", "tuning.", "evaluation.alpha", "train.")) for key in changed)


def test_the_shipped_plan_is_sound() -> None:
    plan = load_plan(benchmark.default_plan)
    names = [cell.name for cell in plan.cells]
    assert len(names) == len(set(names))
    tasks = {cell.point["task"] for cell in plan.cells}
    assert tasks == {"arc-easy", "openbookqa", "sciq", "gsm8k", "wikitext", "cifar10"}
    federated = [cell for cell in plan.cells if str(cell.point["federation"]).startswith("eight-clients")]
    assert all(cell.settings["data.dirichlet-alpha"] == 0.3 for cell in federated)
