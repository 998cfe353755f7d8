"""Every input that fuzzing kept, and every one that once crashed a parser, in every run of the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzzing.__main__ import build_checked, corpus_root
from tests.fuzzing.targets import targets


def inputs(name: str) -> list[Path]:
    return sorted((corpus_root / name).glob("*"))


@pytest.mark.parametrize("name", targets)
def test_every_kept_input_is_read_or_refused(name: str) -> None:
    check = build_checked(name)
    for data in targets[name].seeds():
        check(data)
    for path in inputs(name):
        try:
            check(path.read_bytes())
        except BaseException as error:
            raise AssertionError(f"{path} crashes {name}: {type(error).__name__}: {error}") from error


def test_the_corpus_is_small() -> None:
    files = [path for path in corpus_root.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3 * 2**20
    assert {path.parent.name for path in files} <= targets.keys()


def test_a_parser_that_raises_anything_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: a parser that lets a ValueError through is reported."""

    def parse(data: bytes) -> None:
        int(data)

    monkeypatch.setitem(targets, "manifest", targets["manifest"].__class__(lambda: parse, list))
    with pytest.raises(ValueError, match="invalid literal"):
        build_checked("manifest")(b"x")
