"""The metrics of an evaluation: how a question is scored by each, and its column in the tables."""

from clara_hf.data.schema import QAExample
from clara_hf.metrics.answer_f1.answer_f1 import score_answer
from clara_hf.metrics.grounding.grounding import score_grounding
from clara_hf.metrics.retrieval_recall.retrieval_recall import score_ranking


# Those with a column, and with paired tests: titles, and which of them a terminal has room for.
COLUMNS = {
    "f1": "F1",
    "em": "EM",
    "cover_em": "cover-EM",
    "judged": "judged",
    "grounding": "grounded",
    "recall@1": "R@1",
    "recall@3": "R@3",
    "recall@5": "R@5",
    "all_gold@5": "all@5",
    "mrr": "MRR",
    "ndcg@5": "nDCG@5",
}
TERMINAL = ("f1", "em", "recall@1", "recall@5", "all_gold@5")


def scores_of(
    example: QAExample, ranking: dict | None, answer: dict | None, documents: list[str] | None
) -> dict[str, float]:
    """One question of a system by every metric that applies to it, from 0 to 1; arguments as of
    [`~clara_hf.evaluation.results.question_record`]."""
    scores = {}
    if answer is not None:
        scores.update(score_answer(answer["prediction"], example.answers))
        if answer.get("judged") is not None:
            scores["judged"] = float(answer["judged"])
        grounding = score_grounding(answer["prediction"], documents)["grounding"]
        if documents and grounding is not None:
            scores["grounding"] = grounding
    if ranking is not None and example.pos_index is not None:
        scores.update(score_ranking(ranking["order"], example.pos_index))
    return scores
