"""Intervals and paired tests."""

import numpy as np
import pytest

from clara_hf.evaluation import statistics
from clara_hf.evaluation.statistics import (
    bootstrap_interval,
    holm,
    intervals,
    letters,
    paired_tests,
    permutation_test,
    wilson_interval,
)


def test_the_interval_of_a_share_is_that_of_the_binomial():
    shares = np.repeat([[1.0], [0.0]], 500, axis=0)
    (low,), (high,) = bootstrap_interval(shares, seed=0)
    expected = 1.96 * np.sqrt(0.25 / 1000)
    assert low == pytest.approx(0.5 - expected, abs=0.004) and high == pytest.approx(0.5 + expected, abs=0.004)


def test_intervals_cover_the_mean_as_often_as_they_say():
    chance = np.random.default_rng(0)
    samples = chance.normal(size=(100, 300)) ** 2
    low, high = bootstrap_interval(samples, seed=1)
    assert 0.88 <= np.mean((low <= 1) & (high >= 1)) <= 0.98


def test_intervals_depend_on_the_seed_and_on_nothing_else(monkeypatch):
    values = np.random.default_rng(0).random((50, 3))
    first = np.stack(bootstrap_interval(values, seed=3))
    assert (first == np.stack(bootstrap_interval(values, seed=3))).all()
    assert not (first == np.stack(bootstrap_interval(values, seed=4))).all()
    alone = np.stack(bootstrap_interval(values[:, 1:2], seed=3))
    assert alone[:, 0] == pytest.approx(first[:, 1])
    monkeypatch.setattr(statistics, "BLOCK", 50 * 7)
    assert np.stack(bootstrap_interval(values, seed=3)) == pytest.approx(first, abs=0.02)


def test_equal_values_have_an_interval_without_width():
    low, high = bootstrap_interval(np.ones((7, 1)), seed=0)
    assert low == high == 1
    with pytest.raises(ValueError, match="no value"):
        bootstrap_interval(np.ones((0, 1)), seed=0)


def test_questions_without_a_value_do_not_count():
    chance = np.random.default_rng(0)
    values = chance.random((400, 2))
    values[100:, 1] = np.nan
    low, high = bootstrap_interval(values, seed=0)
    alone = np.stack(bootstrap_interval(values[:100, 1:], seed=0))
    assert low[0] < values[:, 0].mean() < high[0]
    assert (low[1], high[1]) == pytest.approx(tuple(alone[:, 0]), abs=0.02)


def test_wilsons_interval_is_the_textbooks():
    assert wilson_interval(9, 10) == pytest.approx((0.5958, 0.9821), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0, 1.9600**2 / (20 + 1.9600**2)), abs=1e-4)


def test_shares_of_zero_and_one_have_intervals_with_a_width_and_other_scores_those_of_the_bootstrap():
    values = np.column_stack([np.zeros(30), np.ones(30), np.arange(30) % 2, np.linspace(0, 1, 30)])
    values[20:, 1] = np.nan
    low, high = intervals(values, seed=0)
    assert (low[0], high[0]) == wilson_interval(0, 30) and high[0] > 0.1
    assert (low[1], high[1]) == wilson_interval(20, 20) and low[1] < 0.9
    assert (low[2], high[2]) == wilson_interval(15, 30)
    assert (low[3], high[3]) == tuple(end[3] for end in bootstrap_interval(values, seed=0))


# Paired tests


def test_the_p_value_of_wins_and_losses_is_that_of_the_sign_test():
    # 9 wins and 2 losses in 11 questions that differ: 2 * P(at least 9 of 11) = 2 * (55 + 11 + 1) / 2048.
    differences = np.array([1.0] * 9 + [-1.0] * 2 + [0.0] * 30)[:, None]
    (p,) = permutation_test(differences, seed=0)
    assert p == pytest.approx(2 * 67 / 2048, abs=0.006)


def test_p_values_are_uniform_where_systems_are_alike():
    chance = np.random.default_rng(1)
    p = permutation_test(chance.normal(size=(60, 400)), seed=0)
    assert abs((p < 0.05).mean() - 0.05) < 0.03 and abs((p < 0.5).mean() - 0.5) < 0.08


def test_missing_questions_change_nothing():
    differences = np.random.default_rng(0).normal(0.2, 1, size=(80, 1))
    longer = np.concatenate([differences, np.full((20, 1), np.nan)])
    assert permutation_test(longer, seed=0) == pytest.approx(permutation_test(differences, seed=0), abs=0.01)


def test_permutations_do_not_depend_on_the_size_of_blocks_more_than_by_chance(monkeypatch):
    differences = np.random.default_rng(0).normal(0.2, 1, size=(80, 3))
    whole = permutation_test(differences, seed=0)
    assert (whole == permutation_test(differences, seed=0)).all()
    monkeypatch.setattr(statistics, "BLOCK", 80 * 7)
    assert permutation_test(differences, seed=0) == pytest.approx(whole, abs=0.015)


def test_a_difference_beyond_all_flips_has_the_least_p_value_and_never_zero():
    assert permutation_test(np.ones((200, 1)), seed=0).tolist() == [1 / 10_001]


def test_holm_is_the_textbook_example():
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_a_pair_is_compared_on_the_questions_that_both_answered():
    nan = np.nan
    scores = {"a": np.array([1.0, 1, 1, nan]), "b": np.array([0.0, 1, nan, 1]), "c": np.array([nan, nan, nan, 0.5])}
    tests = {(test["a"], test["b"]): test for test in paired_tests(scores, seed=0)}
    assert set(tests) == {("a", "b"), ("b", "c")}
    assert (tests["a", "b"]["difference"], tests["a", "b"]["n"]) == (0.5, 2)
    assert tests["a", "b"]["low"] == 0 and tests["a", "b"]["high"] == 1 and tests["a", "b"]["p"] == 1


def test_a_clear_difference_is_found_and_chance_is_not():
    chance = np.random.default_rng(0)
    base = chance.random(300)
    scores = {"better": base + 0.2, "base": base, "like": base + chance.normal(0, 0.3, 300)}
    tests = {(test["a"], test["b"]): test for test in paired_tests(scores, seed=0)}
    assert tests["better", "base"]["p_holm"] < 0.001 and tests["base", "like"]["p_holm"] > 0.05
    assert tests["better", "base"]["low"] == pytest.approx(0.2)


def test_two_systems_share_a_letter_exactly_if_no_test_tells_them_apart():
    chance = np.random.default_rng(0)
    for _ in range(50):
        names = [f"s{number}" for number in range(7)]
        values = {name: chance.random() for name in names}
        tests = [
            {"a": a, "b": b, "p_holm": float(chance.choice([0.01, 0.5]))}
            for place, a in enumerate(names)
            for b in names[place + 1 :]
        ]
        found = letters(values, tests)
        for test in tests:
            assert bool(set(found[test["a"]]) & set(found[test["b"]])) == (test["p_holm"] > 0.05)
        assert "a" in found[max(values, key=values.get)]


def test_letters_go_from_the_best_down():
    tests = [
        {"a": "x", "b": "y", "p_holm": 0.2},
        {"a": "y", "b": "z", "p_holm": 0.2},
        {"a": "x", "b": "z", "p_holm": 0},
    ]
    assert letters({"z": 0.1, "y": 0.5, "x": 0.9}, tests) == {"x": "a", "y": "ab", "z": "b"}
