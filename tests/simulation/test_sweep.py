"""A sweep runs its cells, goes on where it stopped, attacks each, and reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ot_federated.errors import ConfigError, OtFederatedError
from simulations import sweep as sweeps
from simulations.sweep_cells import load_sweep
from tests.families import save_family_model
from tests.federations import build_questions, write_rows

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    model = save_family_model(tmp_path / "model")
    data = write_rows(tmp_path / "train.jsonl", build_questions(60))
    path = tmp_path / "small.toml"
    path.write_text(f"""
description = "small"
[base]
num-clients = 2
num-server-rounds = 1
model.source = "{model}"
model.dtype = "float32"
data.train = "{data}"
data.validation = "{data}"
data.test = "{data}"
offsite = {{ bottom-blocks = 1, emulator-blocks = 2, top-blocks = 1, keep = "uniform", gaps = "empty" }}
train = {{ batch-size = 8, max-steps = 2 }}
privacy = {{ target-delta = 1e-5, engine = "loop" }}
evaluation = {{ max-examples = 8, max-validation-examples = 4 }}
[grid]
seed = [0]
privacy.target-epsilon = ["none", 8]
[[override]]
when = {{ privacy.target-epsilon = "none" }}
train.batch-size = 4
[audit]
candidates = 12
""")
    return path


@pytest.mark.slow  # two runs in processes of their own
def test_a_sweep_runs_resumes_and_reports(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, results = tmp_path / "out", tmp_path / "results"
    words = [str(sweep_file), "--output-dir", str(output)]
    # A cell that was stopped before its first round was done begins again.
    stopped = output / load_sweep(sweep_file).cells[0].name / "run"
    stopped.mkdir(parents=True)
    (stopped / "run_config.json").write_text("{}")
    assert sweeps.main([*words, "--only", "epsilon=none"]) == 0
    assert sweeps.main([*words, "--report"]) == 0
    assert "1 of 1 cells done" in capsys.readouterr().out
    assert sweeps.main([*words, "--dry-run"]) == 0
    listed = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[0] for line in listed] == ["done", "to", "2"]
    assert sweeps.main([*words, "--results", str(results)]) == 0
    report = json.loads((results / "privacy_utility.json").read_text())
    plain, private = sorted(report["cells"], key=lambda cell: cell["target_epsilon"] or 0)
    assert "simulations.sweep" in report["command"]
    assert report["versions"]["opacus"]
    assert report["hardware"]["cores"]
    assert (plain["target_epsilon"], plain["epsilon"], plain["delta"]) == (None, None, None)
    assert private["target_epsilon"] == 8
    assert private["epsilon"] == pytest.approx(8, abs=0.05)
    assert private["delta"] == 1e-5
    for cell in (plain, private):
        assert (cell["num_clients"], cell["seed"], cell["tuning"]) == (2, 0, "full both")
        rows = cell["rows"]
        assert cell["gain"]["loss"] == pytest.approx(rows["full_zero_shot"]["loss"] - rows["plug_in"]["loss"])
        assert set(cell["attacks"]) == {"loss", "reference", "min-k", "rmia"}
        assert cell["audited_epsilon_lower_bound"] >= 0
    assert private["kept_share_of_gain"] == pytest.approx(private["gain"]["loss"] / plain["gain"]["loss"])
    for name in ("utility.png", "audit.png", "attacks.png", "privacy_utility.md", "privacy_utility.csv"):
        assert (results / name).stat().st_size > 100
    # What is done is not run again.
    monkeypatch.setattr(sweeps, "simulate", lambda *_, **__: pytest.fail("a cell that was done is run again"))
    assert sweeps.main(words) == 0
    assert "2 of 2 cells done, 0 failed" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((Path(sweeps.__file__).parent / "sweeps").glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_sweeps_are_valid(path: Path) -> None:
    cells = load_sweep(path).cells
    assert len({cell.name for cell in cells}) == len(cells) > 1
    assert {cell.private for cell in cells} == {True, False}


def test_a_cell_that_fails_does_not_stop_the_others(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = []

    def fail(settings: dict[str, object], run: Path, **_: object) -> None:
        tried.append(settings.get("privacy.target-epsilon"))
        raise OtFederatedError("no memory left")

    monkeypatch.setattr(sweeps, "simulate", fail)
    assert sweeps.main([str(sweep_file), "--output-dir", str(tmp_path / "out")]) == 1
    assert tried == [None, 8]
    told = capsys.readouterr()
    assert told.err.count("no memory left") == 2
    assert "0 of 2 cells done, 2 failed" in told.out
    assert sweeps.main([str(sweep_file), "--output-dir", str(tmp_path / "out"), "--report"]) == 2
    assert "no cell is done" in capsys.readouterr().err


def test_candidates_are_in_by_the_flip_of_a_coin(sweep_file: Path, tmp_path: Path) -> None:
    (cell, _) = load_sweep(sweep_file).cells
    changes = sweeps.write_candidates(cell.settings, tmp_path, num_candidates=12)
    coins = json.loads((tmp_path / "train" / "coins.json").read_text())
    trained = [json.loads(line)["question"] for line in (tmp_path / "train/client-0000.jsonl").open()]
    assert len(trained) == 30 - 12 + sum(coins["included"])
    for candidate, included in zip(coins["candidates"], coins["included"], strict=True):
        assert (candidate["question"] in trained) == included
    assert changes["data.partitioner"] == "files"
    before = (tmp_path / "train/client-0000.jsonl").read_bytes()
    sweeps.write_candidates(cell.settings, tmp_path, num_candidates=12)
    assert (tmp_path / "train/client-0000.jsonl").read_bytes() == before
    (tmp_path / "b").mkdir()
    with pytest.raises(OtFederatedError, match="too few for 16 candidates"):
        sweeps.write_candidates(cell.settings, tmp_path / "b", num_candidates=16)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("[grid]", "[grit]", "'grit', which is not a table"),
        ("seed = [0]", "seed = 0", "must be a list of values"),
        ("seed = [0]", "sead = [0]", "not a key"),
        ('["none", 8]', '["none", -8]', "privacy.target-epsilon"),
        ("when = { privacy.target-epsilon", "when = { privacy.engine", "no axis of"),
        ("candidates = 12", 'candidates = "many"', "a number of examples"),
        ("[base]", "[base", "not valid TOML"),
    ],
)
def test_a_wrong_sweep_is_refused(old: str, new: str, reason: str, sweep_file: Path) -> None:
    text = sweep_file.read_text()
    assert old in text
    sweep_file.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=reason):
        load_sweep(sweep_file)
