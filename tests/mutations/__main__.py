"""Put every mistake in, one at a time, run its tests, and write down which of them found it.

``python -m tests.mutations`` first runs all tests that are named on an unchanged copy of the tree, where they must
pass. A mistake whose file and tests have not changed since the last run is not tried again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from simulations.benchmarks.environment import write_results
from tests.mutations.mistakes import Mistake, MistakeError, load_mistakes
from tests.mutations.trees import root, run_tests, tree_copy

results = root / "simulations" / "results" / "privacy_mutations.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if every mistake was found, 1 if one was not, 2 if one could not be tried."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parsed = _build_parser().parse_args(words)
    try:
        rows, mistakes = load_mistakes()
        chosen = [mistake for mistake in mistakes if parsed.only.lower() in f"{mistake.row} {mistake.name}".lower()]
        if not chosen:
            raise MistakeError(f"no mistake has {parsed.only!r} in its row or name")
        for mistake in chosen:
            mistake.mutate((root / mistake.file).read_text(encoding="utf-8"))
        known = read_results(parsed.output)
        left = [mistake for mistake in chosen if parsed.fresh or not is_known(mistake, known)]
        check_unchanged_tree(left)
        for mistake in chosen:
            if mistake in left:
                known[mistake.name] = try_out(mistake)
            say(format_line(known[mistake.name]))
            entries = [known[other.name] for other in mistakes if other.name in known]
            write_results(
                parsed.output,
                command="python -m tests.mutations",
                last_command=shlex.join(["python", "-m", "tests.mutations", *words]),
                num_rows=len(rows),
                num_mistakes=len(entries),
                num_found=sum(entry["found"] for entry in entries),
                mistakes=entries,
            )
    except MistakeError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    missed = [mistake.name for mistake in chosen if not known[mistake.name]["found"]]
    say(f"{len(chosen) - len(missed)} of {len(chosen)} mistakes found" + "".join(f"\n  missed: {m}" for m in missed))
    return 1 if missed else 0


def check_unchanged_tree(mistakes: Sequence[Mistake]) -> None:
    """Run all tests on a tree without a mistake.

    Raises:
        MistakeError: If one does not pass.
    """
    tests = list(dict.fromkeys(test for mistake in mistakes for test in mistake.tests))
    if not tests:
        return
    say(f"{len(tests)} tests on the unchanged tree ...")
    with tree_copy() as tree:
        outcomes = run_tests(tree, tests)
    failed = {test: found for test, found in outcomes.items() if found.outcome != "passed"}
    if failed:
        raise MistakeError(f"tests do not pass without a mistake: {failed}")


def try_out(mistake: Mistake) -> dict[str, Any]:
    """Return what became of one mistake; it is found if every one of its tests failed.

    Raises:
        MistakeError: If it could not be tried.
    """
    began = time.monotonic()
    with tree_copy(mistake) as tree:
        outcomes = run_tests(tree, mistake.tests, imported=mistake.file)
    return {
        "row": mistake.row,
        "name": mistake.name,
        "file": mistake.file,
        "found": all(found.outcome == "failed" for found in outcomes.values()),
        "tests": [{"test": test, **asdict(found)} for test, found in outcomes.items()],
        "seconds": round(time.monotonic() - began, 1),
        "fingerprint": fingerprint(mistake),
    }


def fingerprint(mistake: Mistake) -> str:
    """Return a digest of the mistake, its file, and the files of its tests."""
    files = sorted({mistake.file, *(test.partition("::")[0] for test in mistake.tests)})
    texts = [json.dumps(asdict(mistake), sort_keys=True), *((root / name).read_text("utf-8") for name in files)]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def is_known(mistake: Mistake, known: dict[str, dict[str, Any]]) -> bool:
    """Say whether a mistake was found before, and nothing has changed since."""
    entry = known.get(mistake.name)
    return entry is not None and entry["found"] and entry["fingerprint"] == fingerprint(mistake)


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Return the entries of the last run by name; of those that are still among the mistakes."""
    if not path.exists():
        return {}
    names = {mistake.name for mistake in load_mistakes()[1]}
    entries = json.loads(path.read_text(encoding="utf-8"))["mistakes"]
    return {entry["name"]: entry for entry in entries if entry["name"] in names}


def format_line(entry: dict[str, Any]) -> str:
    """Return what became of a mistake as a line."""
    return f"{'found ' if entry['found'] else 'MISSED'} {entry['seconds']:5.1f} s  {entry['row']}: {entry['name']}"


def say(line: str) -> None:
    """Write a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutations", description="Put every mistake in and see that its tests fail."
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="mistakes with this text in their row or name")
    parser.add_argument("--fresh", action="store_true", help="try again what was found before")
    parser.add_argument("--output", type=Path, default=results)
    return parser


if __name__ == "__main__":
    sys.exit(main())
