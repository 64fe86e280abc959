"""How much of a text comes back in the paraphrase that was made from its memory."""

from pathlib import Path

import datasets
import evaluate
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoConfig, AutoTokenizer


_DESCRIPTION = """\
Compares paraphrases with accepted ones, or with the documents that they were made from.

- `rouge1`, `rouge2`, `rougeL`: F-measure of shared words, of shared pairs of words, and of the longest common
  subsequence, by `rouge-score` with Porter stemming, the maximum over the references. Its words are runs of a-z and
  0-9: texts in other scripts score 0.
- `bertscore`: F1 of the greedy matching of contextual embeddings, by `bert-score`, the maximum over the references;
  only where `bertscore_model` names a local folder with an encoder. Not rescaled: values of different encoders cannot
  be compared.

Means over texts; between 0 and 1, `bertscore` between -1 and 1.
"""

_CITATION = """\
@inproceedings{lin-2004-rouge,
    title = {{ROUGE}: A Package for Automatic Evaluation of Summaries},
    author = {Lin, Chin-Yew},
    booktitle = {Text Summarization Branches Out},
    year = {2004},
}
@inproceedings{zhang-etal-2020-bertscore,
    title = {{BERTScore}: Evaluating Text Generation with {BERT}},
    author = {Zhang, Tianyi and Kishore, Varsha and Wu, Felix and Weinberger, Kilian Q. and Artzi, Yoav},
    booktitle = {Proceedings of ICLR},
    year = {2020},
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): the paraphrases to be scored.
    references (`list[list[str]]`): accepted texts for each, at least one.
    bertscore_model (`str`, *optional*): local folder of an encoder and its tokenizer. Nothing is downloaded.
    bertscore_layer (`int`, *optional*): the layer whose states are compared. Default: the last.
    per_example (`bool`, defaults to `False`): lists with one value per text in place of the means.

Returns:
    `dict` with `rouge1`, `rouge2`, `rougeL` and, with a model, `bertscore`.

Examples:

    >>> fidelity = evaluate.load("eval/metrics/paraphrase_fidelity")
    >>> results = fidelity.compute(
    ...     predictions=["Mara keeps owls.", ""], references=[["An owl is kept by Mara", "Mara keeps an owl"], ["Rain"]]
    ... )
    >>> {name: round(value, 3) for name, value in results.items()}
    {'rouge1': 0.429, 'rouge2': 0.2, 'rougeL': 0.429}
"""

ROUGE = ("rouge1", "rouge2", "rougeL")


def score_paraphrase(prediction: str, references: list[str]) -> dict[str, float]:
    """`rouge1`, `rouge2` and `rougeL` of one text, each the maximum over the references.

    Raises:
        ValueError: `references` is empty.
    """
    if not references:
        raise ValueError("A paraphrase without references cannot be scored.")
    scorer = RougeScorer(ROUGE, use_stemmer=True)
    scores = [scorer.score(reference, prediction) for reference in references]
    return {name: max(score[name].fmeasure for score in scores) for name in ROUGE}


def bert_scores(
    predictions: list[str], references: list[list[str]], model: str, layer: int | None = None
) -> list[float]:
    """BERTScore's F1 of each text, the maximum over its references.

    Raises:
        ImportError: bert-score is not installed.
        ValueError: `model` is no local folder, or its tokenizer has no `model_max_length`.
    """
    if not Path(model).is_dir():
        raise ValueError(f"bertscore_model must be a local folder, but is {model!r}.")
    # Imported here: it is an extra, and only this score needs it.
    import bert_score

    if AutoTokenizer.from_pretrained(model).model_max_length > 2**31:
        raise ValueError(f"the tokenizer in {model} has no model_max_length: set it in its tokenizer_config.json.")
    pairs = [(text, reference) for text, given in zip(predictions, references, strict=True) for reference in given]
    _, _, found = bert_score.score(
        [text for text, _ in pairs],
        [reference for _, reference in pairs],
        model_type=str(model),
        num_layers=layer or AutoConfig.from_pretrained(model).num_hidden_layers,
    )
    values = iter(found.tolist())
    return [max(next(values) for _ in given) for given in references]


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ParaphraseFidelity(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
            reference_urls=["https://github.com/google-research/google-research/tree/master/rouge"],
        )

    def _compute(self, predictions, references, bertscore_model=None, bertscore_layer=None, per_example=False):
        if not len(predictions):
            raise ValueError("There is nothing to score: `predictions` is empty.")
        scores = [score_paraphrase(*pair) for pair in zip(predictions, references, strict=True)]
        values = {name: [score[name] for score in scores] for name in ROUGE}
        if bertscore_model is not None:
            values["bertscore"] = bert_scores(predictions, references, bertscore_model, bertscore_layer)
        return values if per_example else {name: sum(column) / len(column) for name, column in values.items()}
