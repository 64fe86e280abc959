"""Systems compared on questions: an object that is called with a model, also from a Trainer."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from clara_hf.data.schema import QAExample, load_examples, parse_example
from clara_hf.data.sources import source_name
from clara_hf.evaluation.cache import Cache
from clara_hf.evaluation.plan import Options
from clara_hf.evaluation.results import Results
from clara_hf.evaluation.work import Work
from clara_hf.program.models import ModelSource


class Evaluator:
    """Compares CLaRa with what one would use instead, on the same questions, and says what is more than chance.

    What is computed is kept by its content (system, model, question, documents): a call with a further system, file or
    seed, or a larger `limit`, computes what is missing. Batches are fixed when they are begun, so that a call that was
    killed and is repeated ends in the same results.

    Args:
        examples: questions: a file, folder or data set on the Hub, as in `clara_hf.data.sources`, a list of rows or of
            [`QAExample`], or several of these by name.
        systems: names, as in [`~clara_hf.evaluation.plan`], as a list or with commas between. Default: those that have
            what they need.
        cache_dir: where predictions are kept. `None`: in this object, for its next calls.
        options: fields of [`~clara_hf.evaluation.plan.Options`]: `before_joint`, `sup`, `text_model`, `limit`, `seed`,
            `batch_size`, `max_tokens_per_batch`, `max_new_tokens`, `top_k`, `text_doc_max_length`, `llmlingua_rate`,
            `memory_store`.

    Raises:
        DataError: a file breaks the schema.
        ValueError: a row breaks it.
        UsageError: an option is out of range.

    Example:

    >>> rows = [
    ...     {"question": "Who keeps an owl?", "answers": ["Mara"], "docs": ["Rain fell.", "Mara keeps an owl."],
    ...      "pos_index": [1]},
    ...     {"question": "What fell?", "answers": ["Rain"], "docs": ["Rain fell.", "Mara slept."], "pos_index": [0]},
    ... ]
    >>> results = Evaluator(rows, "bm25")()
    >>> results.metrics()["bm25_recall@1"]
    1.0
    """

    def __init__(self, examples, systems: str | list[str] | None = None, *, cache_dir=None, **options):
        self.options = Options(systems=systems, **options)
        several = examples if isinstance(examples, Mapping) else {_name_of(examples): examples}
        self.sources = {name: str(one) for name, one in several.items() if isinstance(one, (str, Path))}
        self.examples = {name: _read(one) for name, one in several.items()}
        self.cache = Cache(cache_dir)

    @property
    def questions(self) -> dict[str, list[QAExample]]:
        """Per data file, those that are asked."""
        return {name: rows[: self.options.limit] for name, rows in self.examples.items()}

    def work(self, model=None) -> Work:
        """What there is to do for a model, which is checked, but not yet loaded; arguments as of a call."""
        return Work(self.options, model, self.examples, self.cache)

    def __call__(self, model=None) -> Results:
        """Evaluates.

        Args:
            model: the CLaRa model: a folder, a name on the Hub, or an object. `None`: systems that need none.

        Returns:
            Scores with intervals, paired tests and costs, and every prediction.

        Raises:
            UsageError: a system lacks its checkpoint, a model cannot be loaded, a text cannot be put to it, or there is
                nothing to score.
        """
        return self.results(self.work(model))

    def results(self, work: Work) -> Results:
        """Carries out what there is to do, and says what came of it."""
        began = time.perf_counter()
        datasets, records = work.run()
        options = {**self.options.recorded(), "systems": [spec.label for spec in work.plan]}
        model = work.model.setting if isinstance(work.model, ModelSource) else None
        data: dict[str, Any] = {"datasets": datasets, "checkpoints": work.checkpoints}
        data |= {"seconds": round(time.perf_counter() - began, 1)}
        data |= {"settings": {"data": self.sources, "model": model, **options, "sha256": work.hashes}}
        return Results(data, records)


class EvaluatorCallback(TrainerCallback):
    """Calls an [`Evaluator`] with the model at every evaluation of a Trainer.

    The figures join the evaluation's metrics as `eval_<system>_<metric>` (with several data files
    `eval_<dataset>_<system>_<metric>`), where `metric_for_best_model` finds them, and the log history.

    Args:
        evaluator: what to call. Models of other stages are its options.
        names: the metrics to take.

    Example:

    ```python
    evaluator = Evaluator("questions.jsonl", "clara,bm25,gold", limit=200)
    trainer = JointTrainer(model, args, train_dataset=rows, callbacks=[EvaluatorCallback(evaluator)])
    ```
    """

    def __init__(self, evaluator: Evaluator, names: Sequence[str] = ("f1", "em", "recall@1", "recall@5")):
        self.evaluator = evaluator
        self.names = tuple(names)

    def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs):
        found = self.evaluator(model).metrics(self.names)
        found = {f"eval_{name}": value for name, value in found.items()}
        state.log_history.append({**found, "step": state.global_step, "epoch": state.epoch})
        if metrics is not None:
            metrics.update(found)


def _name_of(examples) -> str:
    return source_name(str(examples)) if isinstance(examples, (str, Path)) else "questions"


def _read(examples) -> list[QAExample]:
    if isinstance(examples, (str, Path)):
        return load_examples(examples)
    rows = []
    for number, row in enumerate(examples, start=1):
        try:
            rows.append(row if isinstance(row, QAExample) else parse_example(row, str(number)))
        except ValueError as error:
            raise ValueError(f"examples, row {number}: {error}") from error
    if not rows:
        raise ValueError("examples holds no question.")
    if len({row.id for row in rows}) < len(rows):
        raise ValueError("examples: an id is used twice.")
    return rows
