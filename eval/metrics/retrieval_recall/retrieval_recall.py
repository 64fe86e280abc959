"""Ranking quality among the candidates of a question, with binary relevance."""

import math

import datasets
import evaluate


_DESCRIPTION = """\
Compares the ranking of a question's candidates with the positions of its gold documents.

- `recall@k`: gold documents among the first k, over all gold documents.
- `precision@k`: gold documents among the first k, over k (also where there are fewer than k candidates).
- `all_gold@k`: 1 where every gold document is among the first k.
- `ndcg@k`: discounted cumulative gain with binary relevance, over that of the best possible ranking.
- `mrr`: 1 over the rank of the first gold document; 0 where none is ranked.

Means over questions, between 0 and 1. A ranking may be cut: what is not in it counts as not found. Positions of -1,
with which rows of unequal length are padded, are passed over.
"""

_CITATION = """\
@article{jarvelin-kekalainen-2002-cumulated,
    title = {Cumulated gain-based evaluation of {IR} techniques},
    author = {J{\\"a}rvelin, Kalervo and Kek{\\"a}l{\\"a}inen, Jaana},
    journal = {ACM Transactions on Information Systems},
    volume = {20},
    number = {4},
    pages = {422--446},
    year = {2002},
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[list[int]]`): candidate positions of each question, best first, without repetition; -1
        is padding, as in `retrieve`'s `indices`.
    references (`list[list[int]]`): positions of the gold documents of each question, at least one.
    ks (`list[int]`, defaults to `[1, 3, 5]`): the cut-offs.
    per_example (`bool`, defaults to `False`): lists with one value per question in place of the means.

Returns:
    `dict` with `recall@k`, `precision@k`, `all_gold@k` and `ndcg@k` for each k, and `mrr`.

Examples:

    >>> retrieval_recall = evaluate.load("eval/metrics/retrieval_recall")
    >>> results = retrieval_recall.compute(predictions=[[2, 0, 1], [1, 0, 2]], references=[[0], [0, 1]], ks=[1, 2])
    >>> {name: round(value, 3) for name, value in results.items()}  # doctest: +NORMALIZE_WHITESPACE
    {'recall@1': 0.25, 'precision@1': 0.5, 'all_gold@1': 0.0, 'ndcg@1': 0.5,
     'recall@2': 1.0, 'precision@2': 0.75, 'all_gold@2': 1.0, 'ndcg@2': 0.815, 'mrr': 0.75}
    >>> retrieval_recall.compute(predictions=[[2, 0], [1]], references=[[0], [0, 1]], per_example=True)["recall@3"]
    [1.0, 0.5]
"""

KS = (1, 3, 5)


def score_ranking(ranking: list[int], gold: list[int], ks: tuple[int, ...] = KS) -> dict[str, float]:
    """`recall@k`, `precision@k`, `all_gold@k` and `ndcg@k` for each k, and `mrr`, of one question.

    Args:
        ranking: candidate positions, best first; -1 is padding.
        gold: positions of the gold documents.
        ks: the cut-offs, at least 1 each.

    Raises:
        ValueError: no gold document, a cut-off below 1, a negative position, or a candidate that is ranked twice.
    """
    if not gold:
        raise ValueError("A question without gold documents has no retrieval score.")
    if min(ks, default=1) < 1:
        raise ValueError(f"Every cut-off in ks must be at least 1, but ks is {list(ks)}.")
    ranking = [candidate for candidate in ranking if candidate != -1]
    if min([*ranking, *gold]) < 0:
        raise ValueError(f"A position is negative: ranking {list(ranking)}, gold {list(gold)}.")
    if len(set(ranking)) < len(ranking):
        raise ValueError(f"A candidate is ranked twice: {list(ranking)}.")
    gold = set(gold)
    ranks = [rank for rank, candidate in enumerate(ranking, start=1) if candidate in gold]
    scores = {}
    for k in ks:
        found = sum(rank <= k for rank in ranks)
        scores[f"recall@{k}"] = found / len(gold)
        scores[f"precision@{k}"] = found / k
        scores[f"all_gold@{k}"] = float(found == len(gold))
        scores[f"ndcg@{k}"] = _gain(ranks, k) / _gain(range(1, len(gold) + 1), k)
    scores["mrr"] = 1 / ranks[0] if ranks else 0.0
    return scores


def _gain(ranks, k):
    return sum(1 / math.log2(rank + 1) for rank in ranks if rank <= k)


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class RetrievalRecall(evaluate.Metric):
    def _info(self):
        positions = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": positions, "references": positions}),
            reference_urls=["https://en.wikipedia.org/wiki/Evaluation_measures_(information_retrieval)"],
        )

    def _compute(self, predictions, references, ks=KS, per_example=False):
        if not len(predictions):
            raise ValueError("There is nothing to score: `predictions` is empty.")
        scores = [score_ranking(*pair, ks=tuple(ks)) for pair in zip(predictions, references, strict=True)]
        values = {name: [score[name] for score in scores] for name in scores[0]}
        return values if per_example else {name: sum(column) / len(column) for name, column in values.items()}
