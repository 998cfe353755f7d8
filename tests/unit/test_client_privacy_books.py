"""The books of client-level privacy: exact epsilon over restarts, nothing lost, nothing spent beyond the target."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from ot_federated.cache import atomic_write_bytes
from ot_federated.errors import ConfigError
from ot_federated.model_owner import client_privacy
from ot_federated.model_owner.client_privacy import (
    ClientPrivacyBooks,
    ClientPrivacyError,
    ClientRelease,
    books_file,
    describe_releases,
)
from ot_federated.privacy_accounting import Mechanism, epsilon_of

delta = 1e-5


def release(server_round: int, noise_multiplier: float = 1.5, *, clipping_norm: float = 0.5) -> ClientRelease:
    return ClientRelease(
        server_round=server_round,
        noise_multiplier=noise_multiplier,
        clipping_norm=clipping_norm,
        clients_per_round=200,
    )


def open_books(directory: Path) -> ClientPrivacyBooks:
    return ClientPrivacyBooks(directory, delta=delta)


def one_gaussian(noise_multipliers: Sequence[float]) -> float:
    """Epsilon of all of them as the one Gaussian mechanism that they are: Balle and Wang, ICML 2018, theorem 5."""
    mu = math.sqrt(sum(1 / z**2 for z in noise_multipliers))

    def excess(epsilon: float) -> float:
        return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu)) - delta

    return brentq(excess, 0, 500, xtol=1e-12)


def test_epsilon_after_rounds_and_restarts_is_that_of_one_gaussian(tmp_path: Path) -> None:
    told = []
    for server_round in range(1, 21):
        if server_round in (1, 7, 8, 15):
            books = open_books(tmp_path)  # a restart: everything is read from the disk again
        told.append(books.pay(release(server_round)))
    assert told == pytest.approx([one_gaussian([1.5] * count) for count in range(1, 21)], abs=1e-6)
    assert open_books(tmp_path).epsilon() == pytest.approx(one_gaussian([1.5] * 20), abs=1e-6)


def test_a_repeated_round_counts_and_noise_may_differ(tmp_path: Path) -> None:
    history = [(1, 2.0), (2, 2.0), (2, 3.5), (3, 3.5)]
    for server_round, noise_multiplier in history:
        open_books(tmp_path).pay(release(server_round, noise_multiplier))
    assert open_books(tmp_path).epsilon() == pytest.approx(one_gaussian([z for _, z in history]), abs=1e-6)
    assert open_books(tmp_path).releases == [release(*item) for item in history]


def test_the_clipping_norm_changes_nothing(tmp_path: Path) -> None:
    for server_round, clipping_norm in enumerate((0.1, 3.0, 1e-3), start=1):
        open_books(tmp_path).pay(release(server_round, clipping_norm=clipping_norm))
    assert open_books(tmp_path).epsilon() == pytest.approx(one_gaussian([1.5] * 3), abs=1e-6)


def test_the_line_is_on_the_disk_when_pay_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), sync(descriptor)))
    books = open_books(tmp_path)
    books.pay(release(1))
    assert len(synced) >= 2  # the file, and the directory that names it


def test_a_line_that_cannot_be_written_is_an_error_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    books = open_books(tmp_path)
    books.pay(release(1))
    with monkeypatch.context() as patch:
        patch.setattr(client_privacy, "atomic_write_bytes", lambda path, data: atomic_write_bytes(path / "no", data))
        with pytest.raises(OSError, match="Not a directory|File exists"):
            books.pay(release(2))
    assert books.releases == [release(1)]


# ---- Planning -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rounds", [1, 3, 100])
def test_the_target_is_met_by_all_rounds_together_and_not_wasted(tmp_path: Path, num_rounds: int) -> None:
    books = open_books(tmp_path)
    noise_multiplier = books.plan_noise(noise_multiplier=0.0, target_epsilon=4.0, num_rounds=num_rounds)
    assert 4.0 * 0.995 <= one_gaussian([noise_multiplier] * num_rounds) <= 4.0


def test_a_continued_run_keeps_its_noise(tmp_path: Path) -> None:
    first = open_books(tmp_path).plan_noise(noise_multiplier=0.0, target_epsilon=4.0, num_rounds=10)
    for done in range(1, 11):
        open_books(tmp_path).pay(release(done, first))
        again = open_books(tmp_path).plan_noise(noise_multiplier=0.0, target_epsilon=4.0, num_rounds=10 - done)
        assert again == first


def test_rounds_that_were_paid_twice_make_the_others_noisier_and_the_target_holds(tmp_path: Path) -> None:
    books = open_books(tmp_path)
    first = books.plan_noise(noise_multiplier=0.0, target_epsilon=4.0, num_rounds=10)
    for server_round in (1, 2, 3, 3):  # the crash lost the result of round 3
        books.pay(release(server_round, first))
    later = books.plan_noise(noise_multiplier=0.0, target_epsilon=4.0, num_rounds=7)
    assert later > first * 1.01
    for server_round in range(4, 11):
        books.pay(release(server_round, later))
    assert 4.0 * 0.995 <= books.epsilon() <= 4.0


def test_nothing_is_left_when_the_last_round_was_lost(tmp_path: Path) -> None:
    books = open_books(tmp_path)
    noise_multiplier = books.plan_noise(noise_multiplier=0.0, target_epsilon=4.0, num_rounds=2)
    for server_round in (1, 2):
        books.pay(release(server_round, noise_multiplier))
    with pytest.raises(
        ConfigError, match=r"does not allow 1 more rounds of useful noise: 2 releases cost epsilon=.*larger privacy\.ta"
    ):
        books.plan_noise(noise_multiplier=0.0, target_epsilon=4.0, num_rounds=1)
    assert books.plan_noise(noise_multiplier=0.0, target_epsilon=6.0, num_rounds=1) == noise_multiplier


def test_a_noise_that_was_asked_for_is_taken_whatever_it_costs(tmp_path: Path) -> None:
    assert open_books(tmp_path).plan_noise(noise_multiplier=0.1, target_epsilon=4.0, num_rounds=10) == 0.1


def test_noise_that_protects_nobody_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="privacy.noise-multiplier=1e-06 protects nobody"):
        open_books(tmp_path).plan_noise(noise_multiplier=1e-6, target_epsilon=4.0, num_rounds=10)


# ---- Damage ---------------------------------------------------------------------------------------------------


def rewrite(tmp_path: Path, change) -> None:
    path = tmp_path / books_file
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


def edited(line: str, **fields: object) -> str:
    return json.dumps(json.loads(line) | fields) + "\n"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda lines: lines[1:], "line 1 cannot be read.*it is release 2: lines are missing"),
        (lambda lines: [lines[0], lines[2]], "line 2 cannot be read.*it is release 3"),
        (lambda lines: [lines[0], lines[1], lines[2][:-1]], "line 3.*torn"),
        (lambda lines: [lines[0], lines[1], lines[2][:-9]], "line 3"),
        (lambda lines: ["what?\n", *lines[1:]], "line 1"),
        (lambda lines: ["[]\n", *lines[1:]], "line 1"),
        (lambda lines: [edited(lines[0], unit="example"), *lines[1:]], "line 1.*another schema, unit or adjacency"),
        (lambda lines: [edited(lines[0], noise_multiplier=-1), *lines[1:]], "line 1.*noise_multiplier=-1"),
        (lambda lines: [edited(lines[0], noise_multiplier="x"), *lines[1:]], "line 1"),
    ],
)
def test_damaged_books_are_refused_with_the_line(tmp_path: Path, change, reason: str) -> None:
    books = open_books(tmp_path)
    for server_round in (1, 2, 3):
        books.pay(release(server_round))
    rewrite(tmp_path, change)
    before = books.path.read_bytes()
    for act in (books.epsilon, lambda: books.pay(release(4)), lambda: books.check_rounds(1)):
        with pytest.raises(ClientPrivacyError, match=reason + ".*Restore this file from a backup"):
            act()
    assert books.path.read_bytes() == before


@pytest.mark.parametrize("keep", [0, 1])
def test_books_that_lack_a_round_of_the_checkpoint_are_refused(tmp_path: Path, keep: int) -> None:
    books = open_books(tmp_path)
    for server_round in (1, 2):
        books.pay(release(server_round))
    books.check_rounds(2)
    rewrite(tmp_path, lambda lines: lines[:keep])
    with pytest.raises(ClientPrivacyError, match=f"has done 2 rounds, and .* does not have round {keep + 1}"):
        books.check_rounds(2)


def test_what_is_reported_has_all_that_gives_epsilon_a_meaning(tmp_path: Path) -> None:
    books = open_books(tmp_path)
    for server_round in (1, 2):
        books.pay(release(server_round))
    shown = describe_releases(books.releases, epsilon=books.epsilon(), delta=books.delta)
    assert shown["epsilon"] == epsilon_of([Mechanism(noise_multiplier=1.5, sample_rate=1.0, num_steps=2)], delta=delta)
    assert shown["delta"] == delta
    assert shown["unit"] == "client"
    assert "add-remove-one" in shown["adjacency"]
    assert shown["trusted"].startswith("the server")
    assert (shown["num_releases"], shown["noise_multiplier"], shown["clients_per_round"]) == (2, 1.5, 200)
