"""Answer quality: exact match, token F1 and cover exact match, each the maximum over the accepted answers."""

import re
import string
from collections import Counter

import datasets
import evaluate


_DESCRIPTION = """\
Compares short answers with the accepted ones after SQuAD v1.1's normalisation: lower case, without ASCII punctuation,
without the articles a, an and the, white space collapsed.

- `em`: the answer equals an accepted one.
- `f1`: harmonic mean of token precision and recall. As in HotpotQA's script it is 0 when the answer or the accepted
  answer is "yes", "no" or "noanswer" and the two differ. As in SQuAD v1.1 it is 0 when no token is shared, and so when
  both are empty.
- `cover_em`: every token of an accepted answer occurs in the answer, in any order.

Each is the maximum over the accepted answers of a question, then the mean over questions, between 0 and 1.
"""

_CITATION = """\
@inproceedings{rajpurkar-etal-2016-squad,
    title = {{SQuAD}: 100,000+ Questions for Machine Comprehension of Text},
    author = {Rajpurkar, Pranav and Zhang, Jian and Lopyrev, Konstantin and Liang, Percy},
    booktitle = {Proceedings of EMNLP},
    year = {2016},
}
@inproceedings{yang-etal-2018-hotpotqa,
    title = {{HotpotQA}: A Dataset for Diverse, Explainable Multi-hop Question Answering},
    author = {Yang, Zhilin and Qi, Peng and Zhang, Saizheng and Bengio, Yoshua and Cohen, William W. and
        Salakhutdinov, Ruslan and Manning, Christopher D.},
    booktitle = {Proceedings of EMNLP},
    year = {2018},
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): the answers to be scored.
    references (`list[list[str]]`): the accepted answers of each question, at least one.
    per_example (`bool`, defaults to `False`): lists with one value per question in place of the means.

Returns:
    `dict` with `em`, `f1` and `cover_em`.

Examples:

    >>> answer_f1 = evaluate.load("eval/metrics/answer_f1")
    >>> results = answer_f1.compute(
    ...     predictions=["The Battle of Guam", "in Paris, France"], references=[["Battle of Guam"], ["Paris", "Lyon"]]
    ... )
    >>> {name: round(value, 3) for name, value in results.items()}
    {'em': 0.5, 'f1': 0.75, 'cover_em': 1.0}
    >>> answer_f1.compute(predictions=["no", "yes"], references=[["no"], ["no one"]], per_example=True)
    {'em': [1.0, 0.0], 'f1': [1.0, 0.0], 'cover_em': [1.0, 0.0]}
"""

ANSWER_METRICS = ("em", "f1", "cover_em")
_CLOSED_ANSWERS = ("yes", "no", "noanswer")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces (SQuAD v1.1)."""
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answer: str) -> float:
    """1.0 where the two are equal after normalisation."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def token_f1(prediction: str, answer: str) -> float:
    """F1 of the two bags of normalised tokens; yes, no and noanswer count only as a whole."""
    prediction, answer = normalize_answer(prediction), normalize_answer(answer)
    if prediction != answer and (prediction in _CLOSED_ANSWERS or answer in _CLOSED_ANSWERS):
        return 0.0
    predicted, expected = prediction.split(), answer.split()
    shared = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * shared / (len(predicted) + len(expected)) if shared else 0.0


def cover_exact_match(prediction: str, answer: str) -> float:
    """1.0 where every normalised token of `answer` occurs in `prediction`.

    An answer that normalises to nothing is covered only by a prediction that does, too.
    """
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(answer).split()
    return float(set(expected) <= set(predicted) if expected else not predicted)


def score_answer(prediction: str, answers: list[str]) -> dict[str, float]:
    """`em`, `f1` and `cover_em` of one answer, each the maximum over the accepted answers.

    Raises:
        ValueError: `answers` is empty.
    """
    if not answers:
        raise ValueError("A question without accepted answers cannot be scored.")
    return {
        "em": max(exact_match(prediction, answer) for answer in answers),
        "f1": max(token_f1(prediction, answer) for answer in answers),
        "cover_em": max(cover_exact_match(prediction, answer) for answer in answers),
    }


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class AnswerF1(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
            reference_urls=[
                "https://rajpurkar.github.io/SQuAD-explorer/",
                "https://github.com/hotpotqa/hotpot/blob/master/hotpot_evaluate_v1.py",
            ],
        )

    def _compute(self, predictions, references, per_example=False):
        if not len(predictions):
            raise ValueError("There is nothing to score: `predictions` is empty.")
        scores = [score_answer(*pair) for pair in zip(predictions, references, strict=True)]
        values = {name: [score[name] for score in scores] for name in ANSWER_METRICS}
        return values if per_example else {name: sum(column) / len(column) for name, column in values.items()}
