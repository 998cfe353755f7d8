"""Which middle blocks stay: the paper's own lists, and the ends of the rule."""

from __future__ import annotations

from itertools import pairwise

import pytest

from ot_federated.model_owner.compression.keeping import keep_influential, keep_uniform

# Xiao, Lin, Han, "Offsite-Tuning", 2023: the blocks that the paper's runs kept.
opt_1_3b_2_8_2 = [2, 5, 7, 10, 13, 16, 18, 21]
gpt2_xl_2_16_2 = [2, 5, 8, 11, 13, 16, 19, 22, 25, 28, 31, 34, 36, 39, 42, 45]


@pytest.mark.parametrize(
    ("num_blocks", "bottom", "top", "kept"), [(24, 2, 2, opt_1_3b_2_8_2), (48, 2, 2, gpt2_xl_2_16_2)]
)
def test_uniform_keeps_what_the_paper_kept(num_blocks: int, bottom: int, top: int, kept: list[int]) -> None:
    assert keep_uniform(first=bottom, last=num_blocks - top - 1, num_kept=len(kept)) == kept


@pytest.mark.parametrize(("first", "last", "middle"), [(2, 6, 4), (2, 7, 4), (3, 3, 3), (4, 5, 4)])
def test_one_block_is_the_middle_one(first: int, last: int, middle: int) -> None:
    assert keep_uniform(first=first, last=last, num_kept=1) == [middle]


@pytest.mark.parametrize("num_middle", [1, 2, 7, 22])
def test_all_blocks(num_middle: int) -> None:
    assert keep_uniform(first=4, last=3 + num_middle, num_kept=num_middle) == list(range(4, 4 + num_middle))


@pytest.mark.parametrize("num_middle", [2, 9, 20, 33, 44])
def test_uniform_keeps_distinct_blocks_in_order_with_both_ends(num_middle: int) -> None:
    for num_kept in range(2, num_middle + 1):
        kept = keep_uniform(first=5, last=4 + num_middle, num_kept=num_kept)
        assert len(kept) == num_kept
        assert kept == sorted(set(kept))
        assert kept[0] == 5
        assert kept[-1] == 4 + num_middle
        gaps = [after - before for before, after in pairwise(kept)]
        assert max(gaps) - min(gaps) <= 1  # evenly spaced


def test_influence_keeps_the_largest_ascending() -> None:
    assert keep_influential([0.1, 0.9, 0.3, 0.8], first=4, num_kept=2) == [5, 7]


def test_influence_ties_go_to_the_lower_block() -> None:
    assert keep_influential([0.5, 0.2, 0.5, 0.5], first=0, num_kept=2) == [0, 2]


def test_influence_keeps_none_and_all() -> None:
    assert keep_influential([0.3, 0.1], first=2, num_kept=0) == []
    assert keep_influential([0.3, 0.1], first=2, num_kept=2) == [2, 3]
