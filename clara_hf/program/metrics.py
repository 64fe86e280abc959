"""`compute_metrics` of the stages: answers and rankings on validation questions."""

from collections.abc import Callable

import numpy as np
from datasets import Dataset
from transformers import EvalPrediction

from clara_hf.metrics.answer_f1.answer_f1 import score_answer
from clara_hf.metrics.retrieval_recall.retrieval_recall import score_ranking


def answer_metrics(processor, rows: Dataset) -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` over generated ids: F1 and EM, and Recall@k where candidates were ranked."""

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        predictions = prediction.predictions
        sequences, *rankings = predictions if isinstance(predictions, tuple) else (predictions,)
        pad = processor.config.pad_token_id
        texts = processor.tokenizer.batch_decode(np.where(sequences < 0, pad, sequences), skip_special_tokens=True)
        chosen = rows[prediction.label_ids.tolist()]
        scores = [score_answer(text.strip(), answers) for text, answers in zip(texts, chosen["answers"], strict=True)]
        if rankings:
            found = recalls(rankings[0], chosen["pos_index"])
            scores = [{**score, **own} for score, own in zip(scores, found, strict=True)]
        return means(scores)

    return compute


def ranking_metrics(processor, rows: Dataset) -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` over ranked candidates alone: Recall@k."""

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        return means(recalls(prediction.predictions, rows[prediction.label_ids.tolist()]["pos_index"]))

    return compute


def recalls(rankings: np.ndarray, golds: list[list[int]]) -> list[dict[str, float]]:
    """Recall@k of every question; none where its gold documents are not known."""
    return [recall(ranking, gold) if gold else {} for ranking, gold in zip(rankings, golds, strict=True)]


def means(scores: list[dict[str, float]]) -> dict[str, float]:
    """Mean of every score over the questions that have it."""
    names = dict.fromkeys(name for score in scores for name in score)
    return {name: float(np.mean([score[name] for score in scores if name in score])) for name in names}


def recall(ranking: np.ndarray, gold: list[int]) -> dict[str, float]:
    """Recall@k for the cut-offs that the slots allow."""
    found = [int(index) for index in ranking if index >= 0]
    ks = [k for k in (1, 3, 5) if k <= len(ranking)]
    values = score_ranking(found, gold, ks)
    return {name: value for name, value in values.items() if name.startswith("recall")}
