"""How much of an answer stands in the text that was selected for it."""

import re
import string

import datasets
import evaluate


_DESCRIPTION = """\
Compares the tokens of an answer with those of the documents that it was given from, after SQuAD v1.1's normalisation:
lower case, without ASCII punctuation, without the articles a, an and the.

- `grounding`: share of the answer's tokens that occur in any of the documents; repeated tokens count each time. Answers
  "yes", "no" and "noanswer", and those without any token, have none and are left out of the mean.
- `grounded`: 1 where all of them do, else 0; left out as above.

Means over questions, between 0 and 1; `None` where no answer counts. The share is known as K-Precision; it tells of
faithfulness to the documents, not of correctness.
"""

_CITATION = """\
@article{adlakha-etal-2024-evaluating,
    title = {Evaluating Correctness and Faithfulness of Instruction-Following Models for Question Answering},
    author = {Adlakha, Vaibhav and BehnamGhader, Parishad and Lu, Xing Han and Meade, Nicholas and Reddy, Siva},
    journal = {Transactions of the Association for Computational Linguistics},
    volume = {12},
    year = {2024},
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): the answers.
    references (`list[list[str]]`): the documents that each answer was given from.
    per_example (`bool`, defaults to `False`): lists with one value per question, `None` where it does not count, in
        place of the means.

Returns:
    `dict` with `grounding`, `grounded`, and, of the means, `n`, the number of answers that count.

Examples:

    >>> grounding = evaluate.load("eval/metrics/grounding")
    >>> documents = [["Velholm is a town.", "Mara keeps an owl."], ["It is dark."], ["x"]]
    >>> grounding.compute(predictions=["Mara, in the big Velholm", "dark", "yes"], references=documents)
    {'grounding': 0.75, 'grounded': 0.5, 'n': 2}
"""

CLOSED_ANSWERS = ("yes", "no", "noanswer")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized_words(text: str) -> list[str]:
    """Words in lower case, without ASCII punctuation and articles (SQuAD v1.1)."""
    # As in answer_f1, which is not imported: a metric's folder loads alone.
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def score_grounding(prediction: str, documents: list[str]) -> dict[str, float | None]:
    """`grounding` and `grounded` of one answer; `None` where it is yes, no, or has no token."""
    words = normalized_words(prediction)
    if not words or " ".join(words) in CLOSED_ANSWERS:
        return {"grounding": None, "grounded": None}
    known = {word for document in documents for word in normalized_words(document)}
    found = sum(word in known for word in words)
    return {"grounding": found / len(words), "grounded": float(found == len(words))}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Grounding(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
            reference_urls=["https://arxiv.org/abs/2307.16877"],
        )

    def _compute(self, predictions, references, per_example=False):
        scores = [score_grounding(*pair) for pair in zip(predictions, references, strict=True)]
        if per_example:
            return {name: [score[name] for score in scores] for name in ("grounding", "grounded")}
        counted = [score for score in scores if score["grounding"] is not None]
        means = {
            name: sum(score[name] for score in counted) / len(counted) if counted else None
            for name in ("grounding", "grounded")
        }
        return {**means, "n": len(counted)}
