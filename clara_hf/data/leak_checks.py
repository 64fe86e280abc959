"""What candidate pools give away: whether gold documents can be told from the rest without reading the question.

A pool whose positives differ from its negatives in source, style or place lets a ranker score well for a wrong reason.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from clara_hf.data.schema import QAExample


if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


KS = (1, 3, 5)
CLOSED_ANSWERS = ("", "yes", "no", "noanswer")
MAX_QUESTIONS = 2000  # of the question-blind baseline; more would only narrow its error
REGULARIZATION = 0.01  # scikit-learn's C
BYTE_ORDER_MARK = "\ufeff"
LENGTHS = 32  # classes of a document's length, each half as long again as the one before


class AnswerFinder:
    """Looks for accepted answers in texts, word by word after SQuAD's normalisation; not for yes and no.

    Args:
        answers: accepted answers.
    """

    def __init__(self, answers: Iterable[str]):
        # Imported here, as below: the metrics come with `evaluate`, which imports torch.
        from clara_hf.metrics.answer_f1.answer_f1 import normalize_answer

        self.normalize = normalize_answer
        normalized = dict.fromkeys(map(normalize_answer, answers))
        self.needles = [f" {answer} " for answer in normalized if answer not in CLOSED_ANSWERS]

    def found_in(self, text: str) -> bool:
        """Whether the text contains any of the answers."""
        if not self.needles:
            return False
        # A byte order mark would else be a letter of the word behind it.
        text = f" {self.normalize(text.replace(BYTE_ORDER_MARK, ' '))} "
        return any(needle in text for needle in self.needles)


def leak_report(examples: Sequence[QAExample], seed: int = 0) -> dict:
    """What the pools of `examples` give away; shares and recalls between 0 and 1.

    Returns:
        - `questions`, `with_gold` (questions whose gold documents are known), `candidates` (mean per question);
        - `answer_in_gold`, `answer_in_negatives`: shares of the questions with gold in which a gold document, or any
          other, contains an accepted answer, among questions whose answer is not yes or no; `negatives_with_answer`:
          share of their negatives that do, which may be unlabelled positives;
        - `random`, `file_order`, `question_blind`: Recall@k of ranking by chance (its expectation), in the file's
          order, and by a classifier that sees documents only, never the question (`None`
          with fewer than 20 questions). All are `None` where no question has gold.
    """
    known = [example for example in examples if example.pos_index]
    looked = [_answer_counts(example) for example in known if AnswerFinder(example.answers).needles]
    negatives = sum(count for _, _, count in looked)
    report: dict[str, Any] = {
        "questions": len(examples),
        "with_gold": len(known),
        "candidates": float(np.mean([len(example.docs) for example in examples])),
        "answer_in_gold": _mean(gold > 0 for gold, _, _ in looked),
        "answer_in_negatives": _mean(found > 0 for _, found, _ in looked),
        "negatives_with_answer": sum(found for _, found, _ in looked) / negatives if negatives else None,
        "random": None,
        "file_order": None,
        "question_blind": None,
    }
    if known:
        report["random"] = {f"recall@{k}": _mean(min(k / len(example.docs), 1.0) for example in known) for k in KS}
        report["file_order"] = _recalls(known, [list(range(len(example.docs))) for example in known])
    if len(known) >= 20:
        chosen = np.random.default_rng(seed).permutation(len(known))[:MAX_QUESTIONS]
        sample = [known[index] for index in chosen]
        report["question_blind"] = _recalls(sample, blind_rankings(sample, seed))
    return report


def format_report(report: dict) -> str:
    """The report as a few lines, in percent, with what to make of them."""
    lines = [
        f"{report['questions']} questions, {report['candidates']:.1f} candidates each; "
        f"{report['with_gold']} with gold documents among them."
    ]
    if report.get("gold_in_pool") is not None:
        lines.append(f"Gold documents in the pools: {_percent(report['gold_in_pool'])}, the ceiling of every Recall.")
    lines.append(f"A gold document holds an accepted answer: {_percent(report['answer_in_gold'])} of the questions.")
    lines.append(
        f"Another candidate does: {_percent(report['answer_in_negatives'])} of the questions, "
        f"{_percent(report['negatives_with_answer'])} of the candidates (unlabelled positives?)."
    )
    rows = {
        "by chance": "random",
        "in the file's order": "file_order",
        "by a question-blind classifier": "question_blind",
    }
    for label, name in rows.items():
        if report[name] is not None:
            recalls = " / ".join(_percent(report[name][f"recall@{k}"]) for k in KS)
            lines.append(f"Recall@{'/'.join(map(str, KS))} {label}: {recalls}")
    lines.append("A blind ranking well above chance means: gold documents can be told by their style or place.")
    return "\n".join(lines)


def blind_rankings(examples: Sequence[QAExample], seed: int = 0) -> list[list[int]]:
    """Rankings by a logistic classifier over the words, punctuation and length of each document alone.

    It learns which distinct documents are gold for any question. Each is scored by the one of two classifiers that did
    not see it, so that what counts is how gold documents are written, not which they are.

    Args:
        examples: questions with known gold documents.
    """
    gold: dict[str, bool] = {}
    for example in examples:
        for position, document in enumerate(example.docs):
            gold[document] = gold.get(document, False) or position in (example.pos_index or [])
    from sklearn.linear_model import LogisticRegression

    documents, labels = list(gold), np.fromiter(gold.values(), dtype=bool)
    features, values = _features(documents), np.zeros(len(documents))
    folds = np.random.default_rng(seed).permutation(len(documents)) % 2
    for fold in (0, 1):
        train, test = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        if len(test) and len(set(labels[train])) == 2:
            classifier = LogisticRegression(C=REGULARIZATION, solver="liblinear", random_state=seed)
            scores = classifier.fit(features[train], labels[train]).decision_function(features[test])
            # Two classifiers' scores stand beside each other in a pool.
            values[test] = (scores - scores.mean()) / (scores.std() + 1e-6)
    score_of = dict(zip(documents, values.tolist(), strict=True))
    return [
        sorted(range(len(example.docs)), key=lambda position: -score_of[example.docs[position]]) for example in examples
    ]


def _features(documents: Sequence[str]) -> "csr_matrix":
    """Which words and signs each document has, and a class of its length."""
    from scipy.sparse import csr_matrix, hstack
    from sklearn.feature_extraction.text import HashingVectorizer

    pattern = r"\w+|[^\w\s]"
    words = HashingVectorizer(
        n_features=2**16, binary=True, norm=None, alternate_sign=False, lowercase=False, token_pattern=pattern
    )
    sizes = [len(words.build_tokenizer()(document)) for document in documents]
    classes = np.minimum(2 * np.log2(np.add(sizes, 1)), LENGTHS - 1).astype(int)
    lengths = csr_matrix((np.ones(len(sizes)), (range(len(sizes)), classes)), (len(sizes), LENGTHS))
    return hstack([words.transform(documents), lengths], format="csr")


def _answer_counts(example: QAExample) -> tuple[int, int, int]:
    finder = AnswerFinder(example.answers)
    found = [finder.found_in(document) for document in example.docs]
    positions = example.pos_index or []
    gold = sum(found[position] for position in positions)
    return gold, sum(found) - gold, len(found) - len(positions)


def _recalls(examples, rankings):
    from clara_hf.metrics.retrieval_recall.retrieval_recall import score_ranking

    scores = [score_ranking(ranking, example.pos_index) for ranking, example in zip(rankings, examples, strict=True)]
    return {f"recall@{k}": _mean(score[f"recall@{k}"] for score in scores) for k in KS}


def _mean(values) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values else None


def _percent(share):
    return "–" if share is None else f"{100 * share:.1f}%"
