"""The losses against slow versions of themselves."""

import math
from functools import partial

import pytest
import torch

from trainers.losses import contrastive_loss


TEMPERATURE = 0.07


def slow_contrastive_loss(scores, golds: list[set[int]], temperature: float, positives: str) -> torch.Tensor:
    """Question by question and candidate by candidate, over lists that have no padding."""
    total = 0.0
    for row, gold in zip(scores, golds, strict=True):
        if positives == "all":
            for place in gold:
                others = [score for number, score in enumerate(row) if number == place or number not in gold]
                everything = sum(torch.exp(score / temperature) for score in others)
                total = total - torch.log(torch.exp(row[place] / temperature) / everything) / len(gold)
            continue
        everything = sum(torch.exp(score / temperature) for score in row)
        relevant = sum(torch.exp(row[place] / temperature) for place in gold)
        total = total - torch.log(relevant / everything)
    return total / len(scores)


@pytest.fixture
def ragged():
    """Scores `[3, 5]` float64 of questions with 5, 2 and 3 candidates, their masks, and the same as lists."""
    counts, golds = [5, 2, 3], [{1, 4}, {0}, {0, 1, 2}]
    scores = 2 * torch.rand(3, 5, dtype=torch.float64) - 1
    is_candidate = torch.arange(5) < torch.tensor(counts).unsqueeze(1)
    is_positive = torch.tensor([[place in gold for place in range(5)] for gold in golds])
    scores = scores.masked_fill(~is_candidate, float("-inf"))
    return scores, is_positive, is_candidate, counts, golds


@pytest.mark.parametrize("positives", ["one", "all"])
def test_contrastive_loss_and_its_gradient_equal_the_slow_ones(ragged, positives):
    scores, is_positive, is_candidate, counts, golds = ragged
    padded = scores.clone().requires_grad_()
    loss = contrastive_loss(padded, is_positive, is_candidate, TEMPERATURE, positives)
    loss.backward()
    rows = [row[:count].clone().requires_grad_() for row, count in zip(scores, counts, strict=True)]
    slow = slow_contrastive_loss(rows, golds, TEMPERATURE, positives)
    slow.backward()
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, slow, rtol=1e-12, atol=1e-12)
    for row, count in enumerate(counts):
        torch.testing.assert_close(padded.grad[row, :count], rows[row].grad, rtol=1e-10, atol=1e-12)
        assert torch.equal(padded.grad[row, count:], torch.zeros(5 - count, dtype=torch.float64))


@pytest.mark.parametrize("positives", ["one", "all"])
def test_contrastive_loss_has_the_gradient_of_finite_differences(ragged, positives):
    _, is_positive, _, _, _ = ragged
    scores = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    is_candidate = torch.ones(3, 5, dtype=torch.bool)
    loss = partial(
        contrastive_loss,
        is_positive=is_positive,
        is_candidate=is_candidate,
        temperature=TEMPERATURE,
        positives=positives,
    )
    assert torch.autograd.gradcheck(loss, (scores,))


def test_what_stands_at_masked_candidates_does_not_count(ragged):
    scores, is_positive, is_candidate, _, _ = ragged
    expected = contrastive_loss(scores, is_positive, is_candidate, TEMPERATURE)
    for value in (1.0, -1.0, 1e6):
        filled = scores.masked_fill(~is_candidate, value)
        assert torch.equal(contrastive_loss(filled, is_positive, is_candidate, TEMPERATURE), expected)


def test_all_positives_are_asked_for_where_one_would_be_enough():
    scores, every = torch.tensor([[0.9, -0.9, 0.0]]), torch.ones(1, 3, dtype=torch.bool)
    both = torch.tensor([[True, True, False]])
    assert contrastive_loss(scores, both, every, 0.02).item() == pytest.approx(0.0, abs=1e-6)
    assert contrastive_loss(scores, both, every, 0.02, "all").item() == pytest.approx(22.5)
    for positives in ("one", "all"):
        assert contrastive_loss(scores, ~every, every, 0.02, positives).item() == math.inf


def test_contrastive_loss_of_known_cases():
    every = torch.ones(1, 4, dtype=torch.bool)
    first = torch.tensor([[True, False, False, False]])
    equal = torch.zeros(1, 4)
    assert contrastive_loss(equal, first, every, 0.02).item() == pytest.approx(math.log(4))
    assert contrastive_loss(equal, every, every, 0.02).item() == 0.0
    # The paper's temperature against scores that differ by as much as cosines can.
    assert contrastive_loss(torch.tensor([[-1.0, 1, 1, 1]]), first, every, 0.02).item() == pytest.approx(
        100 + math.log(3)
    )
    assert contrastive_loss(equal.bfloat16(), first, every, 0.02).dtype == torch.float32
