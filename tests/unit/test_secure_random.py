"""The cryptographic stream: its distributions, and that nothing but the operating system decides it.

Statistical tests draw from a fixed test seed, so they give one answer for ever; the rates say how often another
seed would fail them.
"""

from __future__ import annotations

import copy
import os
import pickle
import random
import time

import numpy as np
import pytest
import torch
from scipy import stats

from ot_federated.secure_random import SecureRandom


def repeatable(seed: bytes = b"tests") -> SecureRandom:
    with pytest.warns(UserWarning, match="test_seed"):
        return SecureRandom(test_seed=seed)


def test_streams_differ_whatever_is_seeded() -> None:
    """Catches a shared or configured seed: two clients, and one client twice, draw different noise."""
    draws = []
    for _ in range(3):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        draws.append(SecureRandom().draw_normals(8))
    assert not (draws[0] == draws[1]).any()
    assert not (draws[1] == draws[2]).any()


def test_stream_goes_on() -> None:
    """Catches a counter that starts anew with every call."""
    stream = SecureRandom()
    assert not (stream.draw_integers(8) == stream.draw_integers(8)).any()
    assert not (stream.draw_normals(8) == stream.draw_normals(8)).any()


def test_test_seed_repeats_and_warns() -> None:
    first, second, other = repeatable(), repeatable(), repeatable(b"other")
    expected = first.draw_normals(9)
    np.testing.assert_array_equal(second.draw_normals(9), expected)
    assert not (other.draw_normals(9) == expected).any()


def test_default_does_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    SecureRandom().draw_normals(3)
    assert not recwarn.list


def test_stream_cannot_be_copied() -> None:
    stream = SecureRandom()
    with pytest.raises(TypeError):
        copy.deepcopy(stream)
    with pytest.raises(TypeError):
        pickle.dumps(stream)


def test_stream_is_refused_after_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SecureRandom()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="fork"):
        stream.draw_normals(1)


def test_key_stream_is_uniform() -> None:
    """Chi-squared over all 256 values of each of the 8 bytes, 100 000 draws; false alarms: 8e-4."""
    octets = repeatable().draw_integers(100_000).view(np.uint8).reshape(-1, 8)
    for column in range(8):
        assert stats.chisquare(np.bincount(octets[:, column], minlength=256)).pvalue > 1e-4


@pytest.mark.parametrize("num", [0, 1, 2, 7, (1 << 20) + 3])
def test_normals_have_the_length(num: int) -> None:
    normals = repeatable().draw_normals(num)
    assert normals.shape == (num,)
    assert np.isfinite(normals).all()


def test_normals_are_standard_normal() -> None:
    """Kolmogorov-Smirnov, moments, tails and neighbours of 2 million; false alarms: 1e-3 in all."""
    normals = repeatable().draw_normals(2_000_000)
    assert stats.kstest(normals, "norm").pvalue > 1e-4
    num = len(normals)
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((normals**power).mean() - moment) < 3.9 * (variance / num) ** 0.5
    for bound in (3.0, 4.0, 4.5):
        expected = num * 2 * stats.norm.sf(bound)
        assert abs((np.abs(normals) > bound).sum() - expected) < 3.9 * expected**0.5
    # Sine and cosine of one angle stand half a piece apart.
    piece = normals[: 1 << 20]
    for values in (piece, piece**2):
        halves = values[: 1 << 19], values[1 << 19 :]
        assert abs(np.corrcoef(*halves)[0, 1]) < 3.9 / (1 << 19) ** 0.5
        assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 3.9 / (1 << 20) ** 0.5


def test_four_million_normals_take_little_time() -> None:
    stream = SecureRandom()
    started = time.perf_counter()
    stream.draw_normals(4_000_000)
    assert time.perf_counter() - started < 1.5  # 0.11 s on a free core


@pytest.mark.parametrize("sample_rate", [0.01, 0.3, 0.9])
def test_poisson_sample_includes_each_on_its_own(sample_rate: float) -> None:
    """Catches fixed, shuffled and equal-sized batches: each index's count is Bin(T, q), sizes are Bin(N, q).

    Chi-squared tests over indices, sizes and pairs; false alarms: 3e-4.
    """
    stream, num_examples, num_draws = repeatable(), 50, 4000
    included = np.zeros((num_draws, num_examples))
    for draw in range(num_draws):
        included[draw, stream.sample_indices(num_examples, sample_rate=sample_rate)] = 1
    variance = sample_rate * (1 - sample_rate)

    def check(values: np.ndarray, mean: float, spread: float) -> None:
        statistic = ((values - mean) ** 2 / spread).sum()
        tail = min(stats.chi2.cdf(statistic, values.size), stats.chi2.sf(statistic, values.size))
        assert tail > 2.5e-5

    check(included.sum(axis=0), num_draws * sample_rate, num_draws * variance)
    check(included.sum(axis=1), num_examples * sample_rate, num_examples * variance)


def test_poisson_sample_at_the_ends() -> None:
    stream = repeatable()
    assert stream.sample_indices(5, sample_rate=1.0) == [0, 1, 2, 3, 4]
    assert stream.sample_indices(5, sample_rate=0.0) == []
    assert stream.sample_indices(0, sample_rate=0.5) == []
