"""Straight-through top-k: the hard choice forward, the gradient of each slot's softmax backward."""

import itertools
import math

import pytest
import torch

from modeling_clara import straight_through_topk


EPSILON = 1e-8
MASKS = ("exact", "published")


def slow_selection(row: list[float], k: int) -> list[int]:
    """The k best candidates of one row, best first, the earlier of equals first."""
    return sorted(range(len(row)), key=lambda candidate: (-row[candidate], candidate))[:k]


def slow_soft_row(row: list[float], taken: list[int], temperature: float, mask: str) -> list[float]:
    """softmax(s / t + log(mask + eps)) over one row, in plain floats (eps = 0 for the exact mask)."""
    logits = []
    for candidate, score in enumerate(row):
        left = 0.0 if candidate in taken else 1.0
        left += EPSILON if mask == "published" else 0.0
        logits.append(score / temperature + math.log(left) if left > 0 else -math.inf)
    top = max(logits)
    powers = [math.exp(logit - top) for logit in logits]
    return [power / sum(powers) for power in powers]


def slow_gradient(scores: torch.Tensor, coefficients: torch.Tensor, k: int, temperature: float, mask: str):
    """d sum(Z * coefficients) / d scores: every slot's softmax Jacobian, slots taken before it being constants."""
    rows, candidates = scores.shape
    gradient = torch.zeros(rows, candidates, dtype=torch.float64)
    for b in range(rows):
        row = scores[b].tolist()
        chosen = slow_selection(row, k)
        for j in range(k):
            p = slow_soft_row(row, chosen[:j], temperature, mask)
            mean = sum(p[n] * coefficients[b, j, n].item() for n in range(candidates))
            for n in range(candidates):
                gradient[b, n] += p[n] * (coefficients[b, j, n].item() - mean) / temperature
    return gradient


def soft_rows(scores: torch.Tensor, indices: torch.Tensor, temperature: float, mask: str) -> torch.Tensor:
    """The softmax row of every slot, with the choice `indices` held fixed."""
    rows = [
        slow_soft_row(row, chosen[:j], temperature, mask)
        for row, chosen in zip(scores.tolist(), indices.tolist(), strict=True)
        for j in range(len(chosen))
    ]
    return torch.tensor(rows, dtype=scores.dtype).view(*indices.shape, -1)


def gradient_of(scores, coefficients, **options):
    scores = scores.clone().requires_grad_(True)
    weights, _ = straight_through_topk(scores, **options)
    (weights * coefficients).sum().backward()
    return scores.grad


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_forward_value_is_exactly_the_one_hot_rows_of_the_best_candidates(mask, dtype):
    scores = torch.rand(5, 9).mul(2).sub(1).to(dtype)
    weights, indices = straight_through_topk(scores.requires_grad_(True), 4, temperature=0.02, taken_mask=mask)
    expected = [slow_selection(row, 4) for row in scores.tolist()]
    assert indices.tolist() == expected
    assert weights.dtype == dtype and weights.shape == (5, 4, 9)
    assert torch.equal(weights, torch.nn.functional.one_hot(torch.tensor(expected), 9).to(dtype))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("temperature, spread", [(0.02, 0.05), (0.02, 1.0), (0.5, 1.0)])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_gradient_equals_the_formula(mask, temperature, spread, k):
    scores = torch.randn(4, 6, dtype=torch.float64) * spread
    coefficients = torch.randn(4, k, 6, dtype=torch.float64)
    gradient = gradient_of(scores, coefficients, k=k, temperature=temperature, taken_mask=mask)
    expected = slow_gradient(scores, coefficients, k, temperature, mask)
    assert (gradient - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("mask", MASKS)
def test_gradcheck_against_the_soft_rows_with_the_choice_held_fixed(mask):
    # The value is that of the soft rows, the gradient is the selection's: gradcheck compares one with the other.
    def soft_value_with_straight_through_gradient(scores):
        weights, indices = straight_through_topk(scores, 3, 0.3, taken_mask=mask)
        return weights - weights.detach() + soft_rows(scores.detach(), indices, 0.3, mask)

    scores = torch.tensor([[0.9, 0.1, 0.5, -0.3], [0.2, 0.4, 0.6, 0.8]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(soft_value_with_straight_through_gradient, scores)


def test_masks_agree_on_close_scores_and_differ_where_a_taken_candidate_leads_by_far():
    coefficients = torch.randn(1, 2, 3, dtype=torch.float64)
    close = torch.tensor([[0.51, 0.50, 0.49]], dtype=torch.float64)
    spread = torch.tensor([[0.90, 0.10, 0.05]], dtype=torch.float64)
    options = {"k": 2, "temperature": 0.02}

    def both(scores):
        return [gradient_of(scores, coefficients, taken_mask=mask, **options) for mask in MASKS]

    exact, published = both(close)
    assert torch.allclose(exact, published, rtol=1e-6)
    exact, published = both(spread)
    # 0.8 / 0.02 = 40 is far above 18.4: the published second slot keeps its mass on the first candidate.
    assert exact.abs().max() > 1.0
    assert published.abs().max() < 1e-6


def test_later_slots_have_no_mass_on_taken_candidates_under_the_exact_mask():
    scores = torch.randn(2, 5, dtype=torch.float64)
    _, indices = straight_through_topk(scores, 3, 0.02)
    for b in range(2):
        coefficients = torch.zeros(2, 3, 5, dtype=torch.float64)
        coefficients[b, 2, indices[b, 0]] = 1.0
        assert gradient_of(scores, coefficients, k=3, temperature=0.5).abs().max() == 0.0


def test_equal_scores_are_taken_in_the_order_of_the_candidates():
    scores = torch.tensor([[0.5] * 40, [0.1] * 20 + [0.7] * 20])
    _, indices = straight_through_topk(scores, 25)
    assert indices[0].tolist() == list(range(25))
    assert indices[1].tolist() == list(range(20, 40)) + list(range(5))


@pytest.mark.parametrize("mask", MASKS)
def test_k_equal_to_the_number_of_candidates_is_a_permutation_with_finite_gradient(mask):
    scores = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weights, indices = straight_through_topk(scores, 4, taken_mask=mask)
    assert torch.equal(indices.sort(dim=-1).values, torch.arange(4).expand(3, 4))
    assert torch.equal(weights.sum(dim=1), torch.ones(3, 4, dtype=torch.float64))
    (weights * torch.randn_like(weights)).sum().backward()
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("mask", MASKS)
def test_a_ragged_row_equals_the_row_alone_and_spare_slots_are_empty(mask):
    scores = torch.randn(3, 5, dtype=torch.float64)
    counts = [5, 2, 1]
    candidate_mask = torch.tensor([[n < count for n in range(5)] for count in counts])
    scores[~candidate_mask] = 100.0
    coefficients = torch.randn(3, 3, 5, dtype=torch.float64)
    options = {"temperature": 0.1, "taken_mask": mask}
    weights, indices = straight_through_topk(scores, 3, candidate_mask=candidate_mask, **options)
    gradient = gradient_of(scores, coefficients, k=3, candidate_mask=candidate_mask, **options)
    for b, count in enumerate(counts):
        used = min(3, count)
        alone = scores[b : b + 1, :count]
        expected, expected_indices = straight_through_topk(alone, used, **options)
        assert torch.equal(weights[b, :used, :count], expected[0])
        assert torch.equal(indices[b, :used], expected_indices[0])
        assert not weights[b, used:].any() and not weights[b, :, count:].any()
        assert (indices[b, used:] == -1).all()
        expected = gradient_of(alone, coefficients[b : b + 1, :used, :count], k=used, **options)
        assert torch.allclose(gradient[b, :count], expected[0], atol=1e-12)
        assert not gradient[b, count:].any()


def test_a_row_without_any_candidate_is_empty_and_without_gradient():
    scores = torch.randn(2, 3)
    candidate_mask = torch.tensor([[True] * 3, [False] * 3])
    weights, indices = straight_through_topk(scores, 2, candidate_mask=candidate_mask)
    assert not weights[1].any() and indices[1].tolist() == [-1, -1]
    gradient = gradient_of(scores, torch.randn(2, 2, 3), k=2, candidate_mask=candidate_mask)
    assert torch.isfinite(gradient).all() and not gradient[1].any() and gradient[0].any()


@pytest.mark.parametrize("mask", MASKS)
def test_a_nan_score_makes_nan_weights_in_its_own_row_only(mask):
    scores = torch.tensor([[0.1, math.nan, 0.3], [0.1, 0.2, math.nan]])
    candidates = torch.tensor([[True, True, True], [True, True, False]])
    weights, indices = straight_through_topk(scores, 2, candidate_mask=candidates, taken_mask=mask)
    assert weights[0, 0].isnan().all() and weights[1].isfinite().all() and indices[1].tolist() == [1, 0]


def test_extreme_scores_and_temperatures_give_no_nan():
    scores = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]])
    for temperature in (0.0, 1e-9, 0.02, 1e6):
        for mask in MASKS:
            weights, _ = straight_through_topk(scores, 3, temperature, taken_mask=mask)
            gradient = gradient_of(scores, torch.randn(2, 3, 3), k=3, temperature=temperature, taken_mask=mask)
            assert torch.equal(weights.sum(dim=1), torch.ones(2, 3))
            assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"k": 4}, r"k must be between 1 and the number of candidates \(3\), got 4"),
        ({"k": 0}, r"k must be between 1 .* got 0"),
        ({"k": 2, "taken_mask": "hard"}, "taken_mask must be one of .*'exact', 'published'.*, got 'hard'"),
        ({"k": 2, "estimator": "reinforce"}, "estimator must be one of .*'gumbel'.*, got 'reinforce'"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        straight_through_topk(torch.zeros(2, 3), **arguments)


def test_scores_of_another_rank_are_refused_with_their_shape():
    with pytest.raises(ValueError, match=r"scores must have the shape \[batch, candidates\], got \[3\]"):
        straight_through_topk(torch.zeros(3), 1)


@pytest.mark.parametrize("mask", MASKS)
def test_soft_slots_hold_the_softmax_rows_with_their_gradient(mask):
    scores = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    candidate_mask = torch.tensor([[True] * 5, [True] * 4 + [False], [True] + [False] * 4])
    options = {"k": 2, "temperature": 0.3, "candidate_mask": candidate_mask, "taken_mask": mask}
    weights, indices = straight_through_topk(scores, estimator="soft", **options)
    hard, expected_indices = straight_through_topk(scores, **options)
    assert torch.equal(indices, expected_indices) and not weights[2, 1].any()
    for b, count in enumerate((5, 4, 1)):
        chosen = indices[b : b + 1, : min(count, 2)]
        expected = soft_rows(scores.detach()[b : b + 1, :count], chosen, 0.3, mask)
        torch.testing.assert_close(weights[b, : min(count, 2), :count].detach(), expected[0])
    # Straight-through has the value of the choice and this gradient.
    coefficients = torch.randn_like(weights)
    soft, straight = (
        torch.autograd.grad((found * coefficients).sum(), scores, retain_graph=True)[0] for found in (weights, hard)
    )
    torch.testing.assert_close(soft, straight)


def test_gumbel_slots_are_drawn_from_the_softmax_without_replacement():
    draws = 40_000
    scores = torch.tensor([0.03, 0.0, 0.05, -0.4], dtype=torch.float64).expand(draws, -1)
    torch.manual_seed(0)
    weights, indices = straight_through_topk(scores, 2, 0.05, estimator="gumbel")
    assert torch.equal(weights.argmax(dim=-1), indices) and torch.equal(
        weights.sum(dim=-1), torch.ones(draws, 2).double()
    )
    first = (scores[0] / 0.05).softmax(-1)
    for one, two in itertools.permutations(range(3), 2):
        expected = (first[one] * first[two] / (1 - first[one])).item()
        share = (indices == torch.tensor([one, two])).all(dim=1).double().mean().item()
        assert abs(share - expected) < 4.5 * (expected * (1 - expected) / draws) ** 0.5
