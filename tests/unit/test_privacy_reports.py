"""The reports of sweeps and of rehearsals: shares, intervals, tables, and what is not measured twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ot_federated.config import parse_run_config
from ot_federated.errors import ConfigError
from simulations.benchmarks import data_leak
from simulations.benchmarks.data_leak_report import describe_levels, summarise_levels
from simulations.benchmarks.model_leak import describe_releases, offered_emulators, read_emulator
from simulations.command_line import parse_settings
from simulations.sweep_report import describe_cells, interval_of, kept_share, series, write_report


def cell(target: float | None, *, seed: int, loss: float, **others: Any) -> dict[str, Any]:
    return {
        "task": "classification",
        "data": "a.jsonl",
        "model": "m",
        "tuning": "ffa-lora r=4 top",
        "partitioner": "iid",
        "num_clients": 2,
        "seed": seed,
        "target_epsilon": target,
        "epsilon": target,
        "delta": None if target is None else 1e-5,
        "rows": {"full_zero_shot": {"loss": 3.0, "accuracy": 0.5}, "plug_in": {"loss": loss, "accuracy": 0.8}},
        "gain": {"loss": 3.0 - loss, "accuracy": 0.3},
        "audited_epsilon_lower_bound": 0.1,
        "attacks": {"reference": {"auc": 0.6, "tpr_at_1%": 0.02}},
        "seconds": 10.0,
        **others,
    }


def test_what_a_private_run_keeps_of_the_gain() -> None:
    cells = [
        cell(None, seed=0, loss=1.0),
        cell(None, seed=1, loss=2.0),
        cell(8, seed=0, loss=1.5),
        cell(8, seed=1, loss=2.5),
        cell(8, seed=2, loss=1.5),
    ]
    assert kept_share(cells[0], cells) is None
    assert kept_share(cells[2], cells) == pytest.approx(1.5 / 2.0)  # of the same seed
    assert kept_share(cells[3], cells) == pytest.approx(0.5 / 1.0)
    assert kept_share(cells[4], cells) == pytest.approx(1.5 / 1.5)  # no such seed: of the mean
    assert kept_share(cell(8, seed=0, loss=1.5, tuning="full both"), cells) is None


def test_interval_over_seeds() -> None:
    assert interval_of([2.0]) == (2.0, 2.0, 2.0)
    centre, low, high = interval_of([1.0, 2.0, 3.0])
    # Student's t with two degrees of freedom: 4.303 standard errors.
    assert (centre, high - centre, centre - low) == pytest.approx((2.0, 4.303 / 3**0.5, 4.303 / 3**0.5))


def test_table_and_lines_go_from_small_epsilon_to_none() -> None:
    cells = [cell(8, seed=0, loss=1.5), cell(None, seed=0, loss=1.0), cell(1, seed=0, loss=2.0)]
    (line,) = series(cells, lambda result: (result["rows"]["plug_in"]["loss"], None)).values()
    assert [(epsilon, value) for epsilon, value, _, _ in line] == [(1, 2.0), (8, 1.5), (None, 1.0)]
    # One seed has the interval of its own examples, several that over seeds.
    own = lambda result: (result["gain"]["loss"], [0.0, 9.0])  # noqa: E731
    assert [point[2:] for point in series(cells, own, name="gain")["gain"]] == [(0.0, 9.0)] * 3
    twice = [cell(8, seed=0, loss=1.0), cell(8, seed=1, loss=1.0)]
    assert series(twice, own)["ffa-lora r=4 top"] == [(8, 2.0, 2.0, 2.0)]
    rows = describe_cells(cells).splitlines()
    assert [row.split("|")[3].strip() for row in rows[2:]] == ["none", "8.00", "1.00"]
    assert "75%" in rows[3]
    assert describe_cells([]) == "no cell is done"


def test_report_files(tmp_path: Path) -> None:
    cells = [cell(None, seed=0, loss=1.0), cell(8, seed=0, loss=1.5)]
    write_report(cells, tmp_path, command="python -m simulations.sweep a.toml")
    document = json.loads((tmp_path / "privacy_utility.json").read_text())
    assert document["command"] == "python -m simulations.sweep a.toml"
    assert [entry["kept_share_of_gain"] for entry in document["cells"]] == [None, 0.75]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".json", ".md", ".png", ".png", ".png"]


def report(level: str, *, bound: float, recovered: float = 0.2) -> dict[str, Any]:
    rates = {"auc": 0.6, "auc_interval": [0.5, 0.7], "tpr_at_1%": None, "tpr_at_0.1%": None}
    scores = {"members": [2.0] * 30 + [0.5] * 30, "others": [float(number) / 60 for number in range(60)]}
    return {
        "claimed_epsilon": None if level == "none" else float(level),
        "delta": 1e-5,
        "num_examples": 100,
        "num_steps": 10,
        "loss": {"members": 1.0, "non_members": 2.0},
        "one_run_audit": {"epsilon_lower_bound": bound},
        "membership": {"loss": rates, "reference": rates},
        "scores": {"loss": scores, "reference": scores},
        "exposure": {"mean_bits": 2.0, "chance_bits": 1.4},
        "token_recovery": {
            "recovered": recovered,
            "chance": 0.1,
            "chance_interval": [0.05, 0.2],
            "auc": 0.5,
            "at_chance": True,
        },
    }


def rehearse_in(calls: list[tuple[str, int]], *, bound: float) -> Any:
    def rehearse(_bundle: Any, _examples: Any, *, level: str, seed: int, **_: Any) -> dict[str, Any]:
        calls.append((level, seed))
        return report(level, bound=bound + 0.1 * seed)

    return rehearse


def test_rehearsals_are_resumed_and_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(data_leak, "prepare", lambda *_, **__: (tmp_path, []))
    monkeypatch.setattr(data_leak, "rehearse", rehearse_in(calls, bound=0.5))
    words = ["--levels", "none:1,1:2", "--output-dir", str(tmp_path)]
    assert data_leak.main(words) == 0
    assert calls == [("none", 0), ("1", 0), ("1", 1)]
    document = json.loads((tmp_path / "data_leak.json").read_text())
    assert len(document["cells"]) == 3
    plain, private = document["levels"]
    assert (plain["claimed_epsilon"], private["claimed_epsilon"]) == (None, 1.0)
    assert private["largest_lower_bound"] == pytest.approx(0.6)
    assert (private["num_below_claim"], private["num_runs"]) == (2, 2)
    # The non-members of one run are too few to allow one in a hundred of them; those of two runs are enough.
    assert plain["attacks"]["loss"]["tpr_at_1%"] is None
    assert private["attacks"]["loss"]["tpr_at_1%"][0] == pytest.approx(0.5)
    assert private["attacks"]["loss"]["tpr_at_0.1%"] is None
    shown = capsys.readouterr().out
    assert "2 of 2" in shown
    assert "too few non-members" in shown
    # One more seed runs alone; other settings run anew.
    assert data_leak.main(["--levels", "none:1,1:3", "--output-dir", str(tmp_path)]) == 0
    assert calls[3:] == [("1", 2)]
    assert data_leak.main([*words, "train.batch-size=3"]) == 0
    assert len(calls) == 7
    # A bound above the claim is the failure that this is there to show.
    monkeypatch.setattr(data_leak, "rehearse", rehearse_in(calls, bound=0.95))
    assert data_leak.main([*words, "train.batch-size=4"]) == 1


def test_levels_of_privacy() -> None:
    assert data_leak.parse_levels("none:5,8,3.5:2", num_seeds=20) == [("none", 5), ("8", 20), ("3.5", 2)]
    for wrong in ("non", "-1", "8:0", "8:x", ""):
        with pytest.raises(ConfigError, match="--levels has"):
            data_leak.parse_levels(wrong, num_seeds=20)
    plain, private = data_leak.configure({}, "none"), data_leak.configure({}, "3")
    assert (plain.privacy.mode, private.privacy.mode, private.privacy.target_epsilon) == ("none", "example", 3.0)


def test_a_level_that_trains_nothing_that_reads_tokens() -> None:
    cells = [{"level": "none", "seed": 0, **report("none", bound=1.0), "token_recovery": None}]
    (level,) = summarise_levels(cells)
    assert (level["tokens_recovered"], level["num_token_runs"]) == (None, 0)
    assert "nothing trains that reads them" in describe_levels([level])


def test_every_emulator_that_is_offered_has_a_name_that_is_read() -> None:
    names = offered_emulators(["3"])
    assert len(set(names)) == len(names) == 4 * 3 + 1 + 4 + 2
    for name in names:
        offsite = parse_run_config(parse_settings(read_emulator(name))).offsite
        assert name.startswith(f"{offsite.keep}+{offsite.gaps}")
        assert offsite.emulator_blocks == 3
    offsite = parse_run_config(parse_settings(read_emulator("cka+share+svd+ffn+int4+distilled-7:5"))).offsite
    assert (offsite.keep, offsite.gaps, offsite.emulator_blocks) == ("cka", "share", 5)
    assert (offsite.shrink, offsite.transport, offsite.distillation_steps) == ("svd+ffn", "int4", 7)
    with pytest.raises(ConfigError, match="offsite.shrink='squeeze' is not one of"):
        parse_run_config(parse_settings(read_emulator("uniform+bridge+squeeze:5")))


def test_two_releases_reveal_the_blocks_of_both() -> None:
    ends = [{"role": "bottom"}, {"role": "top"}]

    def report(name: str, *kept: int) -> dict[str, Any]:
        return {"emulator_name": name, "kept_blocks": kept, "cka": ends, "exact_weights": {"by_block": [0] * 8}}

    table = describe_releases([report("a", 2, 4), report("same", 2, 4), report("b", 3, 4)])
    assert table.splitlines()[2:] == ["| a and b | 2 | 2 | 3 of 6 |"]
    assert describe_releases([report("a", 2, 4)]) == ""
