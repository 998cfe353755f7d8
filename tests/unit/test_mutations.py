"""Every mistake can still be put in, names tests that exist, and the runner tells found from missed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutations.__main__ import main
from tests.mutations.mistakes import Mistake, MistakeError, load_mistakes
from tests.mutations.trees import root, run_tests, tree_copy

rows, mistakes = load_mistakes()


@pytest.mark.parametrize("mistake", mistakes, ids=lambda mistake: mistake.name)
def test_a_mistake_can_be_put_in_and_its_tests_exist(mistake: Mistake) -> None:
    source = (root / mistake.file).read_text(encoding="utf-8")
    assert mistake.mutate(source) != source
    for test in mistake.tests:
        path, _, name = test.partition("::")
        assert re.search(rf"^def {name.partition('[')[0]}\(", (root / path).read_text(encoding="utf-8"), re.MULTILINE)


def find(name: str) -> Mistake:
    return next(mistake for mistake in mistakes if mistake.name == name)


def test_mistakes_are_found_and_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "mutations.json"
    words = ["--only", "delta has a default", "--output", str(output)]
    assert main(words) == 0
    found = json.loads(output.read_text())
    (entry,) = found["mistakes"]
    assert (found["num_mistakes"], found["num_found"], entry["found"]) == (1, 1, True)
    (test,) = entry["tests"]
    assert test["outcome"] == "failed"
    assert test["reason"] == "Failed: DID NOT RAISE TypeError"
    assert "1 of 1 mistakes found" in capsys.readouterr().out
    # What was found is not tried again, unless it should be.
    assert main(words) == 0
    assert "on the unchanged tree" not in capsys.readouterr().out
    assert json.loads(output.read_text())["mistakes"] == [entry]
    assert main([*words, "--fresh"]) == 0
    assert "on the unchanged tree" in capsys.readouterr().out
    # What was not chosen stays.
    assert main(["--only", "the unit may be empty", "--fresh", "--output", str(output)]) == 0
    names = [other["name"] for other in json.loads(output.read_text())["mistakes"]]
    assert names == ["delta has a default", "the unit may be empty"]


@pytest.mark.parametrize("name", ["the ledger is not flushed to the disk", "more steps"])
def test_a_mistake_fails_its_tests(name: str) -> None:
    mistake = find(name)
    test = mistake.tests[0]
    with tree_copy(mistake) as tree:
        assert run_tests(tree, [test], imported=mistake.file)[test].outcome == "failed"


def test_what_is_no_mistake_is_missed() -> None:
    """Guards the runner: a change that breaks nothing, on the same path, leaves the tests as they were."""
    mistake = replace(find("delta has a default"), edits=(("    delta: float\n", "    delta: float  # a number\n"),))
    with tree_copy(mistake) as tree:
        outcomes = run_tests(tree, mistake.tests, imported=mistake.file)
    assert [outcome.outcome for outcome in outcomes.values()] == ["passed"]


def test_code_that_has_changed_is_refused() -> None:
    mistake = find("delta has a default")
    with pytest.raises(MistakeError, match=r"occurs 0 times in .*, not once"):
        replace(mistake, edits=(("no such text", ""),)).mutate("delta: float")
    with pytest.raises(MistakeError, match=r"occurs 2 times"):
        replace(mistake, edits=(("delta", "d"),)).mutate("delta, delta")
    with pytest.raises(MistakeError, match="would not be Python any more"):
        replace(mistake, edits=(("delta", "("),)).mutate("delta")
    with tree_copy() as tree, pytest.raises(MistakeError, match="could not be run"):
        run_tests(tree, ["tests/unit/test_privacy_guarantee.py::test_no_such_test"])


def test_a_row_without_a_mistake_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mistakes.toml"
    path.write_text('rows = ["a", "b"]\n[[mistakes]]\nrow = "a"\nname = "n"\nfile = "f"\nedits = []\ntests = ["t"]\n')
    with pytest.raises(MistakeError, match=r"\['b'\]"):
        load_mistakes(path)
    assert set(rows) == {mistake.row for mistake in mistakes}
