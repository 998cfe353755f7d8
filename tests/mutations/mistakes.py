"""The mistakes of ``mistakes.toml``: what is wrong in them, and how they are put into a tree."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

mistakes_file = Path(__file__).with_name("mistakes.toml")


class MistakeError(Exception):
    """A mistake cannot be put in: the code has changed, or the mistake is described wrongly."""


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """One mistake.

    Attributes:
        row: The kind of mistake, one of the file's ``rows``.
        name: What is wrong.
        file: The file that it is in, from the root of the tree.
        edits: Pairs of exact text and what stands there with the mistake; each text occurs once.
        tests: Node ids of tests, every one of which must fail.
    """

    row: str
    name: str
    file: str
    edits: tuple[tuple[str, str], ...]
    tests: tuple[str, ...]

    def apply(self, root: Path) -> None:
        """Put the mistake into the tree at ``root``.

        Raises:
            MistakeError: If a text does not occur exactly once, or the result is not Python.
        """
        path = root / self.file
        path.write_text(self.mutate(path.read_text(encoding="utf-8")), encoding="utf-8")

    def mutate(self, source: str) -> str:
        """Return the source with the mistake.

        Raises:
            MistakeError: If a text does not occur exactly once, or the result is not Python.
        """
        mutated = source
        for old, new in self.edits:
            if (count := mutated.count(old)) != 1:
                raise MistakeError(
                    f"{self.name!r}: this text occurs {count} times in {self.file}, not once; describe the mistake for "
                    f"the code as it is now:\n{old}"
                )
            mutated = mutated.replace(old, new)
        try:
            compile(mutated, self.file, "exec")
        except SyntaxError as error:
            raise MistakeError(f"{self.name!r}: {self.file} would not be Python any more: {error}") from error
        return mutated


def load_mistakes(path: Path = mistakes_file) -> tuple[tuple[str, ...], tuple[Mistake, ...]]:
    """Return the rows and the mistakes, in the file's order.

    Raises:
        MistakeError: If a row has no mistake, a mistake no row or no tests, or two have one name.
    """
    document: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    rows = tuple(document["rows"])
    mistakes = tuple(
        Mistake(
            row=entry["row"],
            name=entry["name"],
            file=entry["file"],
            edits=tuple((edit["old"], edit["new"]) for edit in entry["edits"]),
            tests=tuple(entry["tests"]),
        )
        for entry in document["mistakes"]
    )
    named = {mistake.row for mistake in mistakes}
    if named != set(rows):
        raise MistakeError(f"rows and mistakes do not go together: {sorted(named ^ set(rows))}")
    if len({mistake.name for mistake in mistakes}) != len(mistakes):
        raise MistakeError("two mistakes have one name")
    for mistake in mistakes:
        if not mistake.tests or not mistake.edits:
            raise MistakeError(f"{mistake.name!r} has no tests or no edits: {asdict(mistake)}")
    return rows, mistakes
