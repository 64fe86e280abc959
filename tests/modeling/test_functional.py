"""Scores, positions and cross entropy on tensors, without a model."""

import importlib
import math
import sys
import types

import pytest
import torch

import modeling_clara
from modeling_clara.functional_clara import cosine_scores, memory_bank, position_ids, positions_to_keep
from modeling_clara.loss_clara import cross_entropy


CPU = torch.device("cpu")


def test_cosine_scores_flatten_memories_and_are_at_least_float32():
    queries, memories = torch.randn(2, 3, 4), torch.randn(5, 3, 4)
    expected = [
        [sum((q * m).flatten().tolist()) / math.sqrt((q * q).sum() * (m * m).sum()) for m in memories] for q in queries
    ]
    assert torch.allclose(cosine_scores(queries, memories), torch.tensor(expected), atol=1e-6)
    assert torch.allclose(cosine_scores(3 * queries, memories), torch.tensor(expected), atol=1e-6)
    assert cosine_scores(queries.bfloat16(), memories.bfloat16()).dtype == torch.float32
    assert cosine_scores(queries.double(), memories.double()).dtype == torch.float64
    assert cosine_scores(queries, torch.zeros(1, 3, 4)).tolist() == [[0.0], [0.0]]


def test_cosine_scores_keep_full_precision_under_autocast():
    queries, memories = torch.randn(2, 3, 4), torch.randn(5, 3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = cosine_scores(queries, memories)
    assert scores.dtype == torch.float32 and torch.equal(scores, cosine_scores(queries, memories))


def test_positions_count_from_the_first_attended_token():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    "labels, count",
    [
        ([[-100, -100, 5, 6]], 3),
        ([[-100, -100, -100, 6], [-100, 5, 6, 7]], 4),
        ([[1, 2, 3, 4]], 5),
        ([[-100, -100, -100, -100]], 1),
    ],
)
def test_the_positions_that_predict_a_label_are_kept(labels, count):
    assert positions_to_keep(torch.tensor(labels)) == count
    assert positions_to_keep(None) == 0


def test_cross_entropy_over_the_kept_positions_equals_that_over_all():
    logits = torch.randn(2, 6, 9, dtype=torch.float64)
    labels = torch.tensor([[-100, -100, -100, 4, 5, 6], [-100, -100, -100, -100, 7, -100]])
    tokens = [(0, 3, 4), (0, 4, 5), (0, 5, 6), (1, 4, 7)]
    total = -sum(logits[row, place - 1].log_softmax(-1)[token] for row, place, token in tokens)
    for kept in (4, 5, 6):
        assert torch.allclose(cross_entropy(logits[:, -kept:], labels, None), total / 4)
        assert torch.allclose(cross_entropy(logits[:, -kept:], labels, torch.tensor(10)), total / 10)
        assert torch.allclose(cross_entropy(logits[:, -kept:], labels, 8), total / 8)


def test_a_batch_without_labels_costs_nothing_and_gives_no_nan():
    logits = torch.randn(2, 1, 9, requires_grad=True)
    loss = cross_entropy(logits, torch.full((2, 6), -100), None)
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_a_bank_joins_the_memories_of_all_questions_and_says_where_each_ones_are():
    rows = [torch.randn(2, 3, 4), torch.randn(0, 3, 4), torch.randn(3, 3, 4)]
    bank, index = memory_bank(rows, 3, (3, 4), CPU, allow_none=True)
    assert torch.equal(bank, torch.cat(rows))
    assert index.tolist() == [[0, 1, -1], [-1, -1, -1], [2, 3, 4]]
    shared, index = memory_bank(rows[2], 2, (3, 4), CPU)
    assert torch.equal(shared, rows[2]) and index.tolist() == [[0, 1, 2], [0, 1, 2]]
    with pytest.raises(ValueError, match=r"memories\[1\] is empty"):
        memory_bank(rows, 3, (3, 4), CPU)


def test_another_copy_of_the_code_leaves_this_one_s_attention_as_it_is(clara, monkeypatch):
    # As `trust_remote_code` imports one for every checkpoint.
    copy = types.ModuleType("copy_of_clara")
    copy.__path__ = list(modeling_clara.__path__)
    monkeypatch.setitem(sys.modules, copy.__name__, copy)
    texts = ["a", "a b c d e f g"]
    expected = clara.compress(texts)
    importlib.import_module(f"{copy.__name__}.decoding_clara")
    assert torch.equal(clara.compress(texts), expected)
