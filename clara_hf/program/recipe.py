"""What every stage's recipe does: parse, claim the folder, load data and model, train, save."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np
from datasets import Dataset
from transformers import EvalPrediction, set_seed

from clara_hf.data.schema import QAExample, iter_examples
from clara_hf.metrics.answer_f1.answer_f1 import score_answer
from clara_hf.metrics.retrieval_recall.retrieval_recall import score_ranking
from clara_hf.program.training import (
    CLaRaModelArguments,
    DataArguments,
    UsageError,
    check_folder,
    checkpoint_to_resume,
    claimed_folder,
    is_finished,
    load_model,
    parse,
    quieten,
    train_stage,
)
from trainers.trainer import CLaRaTrainer, CLaRaTrainingArguments


def read_questions(path: str) -> Iterator[dict]:
    """Rows of the question-answering schema, checked line by line."""
    return map(qa_row, iter_examples(path))


def read_labelled_questions(path: str) -> Iterator[dict]:
    """The same for training a retriever from labels: rows need no answers."""
    return map(qa_row, iter_examples(path, needs_answers=False))


def qa_row(example: QAExample) -> dict:
    return {
        "id": example.id,
        "question": example.question,
        "answers": example.answers,
        "docs": example.docs,
        "pos_index": example.pos_index or [],
    }


def load_split(data: DataArguments, read: Callable[[str], Iterable[dict]]) -> tuple[Dataset, Dataset | None]:
    """Training and validation data, up to their limits."""
    train = Dataset.from_list(list(islice(read(data.train_file), data.train_limit)))
    if data.validation_file is None:
        return train, None
    return train, Dataset.from_list(list(islice(read(data.validation_file), data.validation_limit)))


def check_user_texts(processor, files: dict[str | None, Dataset | None]) -> None:
    """Raise where a text holds a token that the model reserves.

    Raises:
        UsageError: names file, row (from 1) and token.
    """
    for file, rows in files.items():
        seen: set[str] = set()
        for name in ("question", "answers", "docs") if rows is not None else ():
            for number, given in enumerate(rows[name][:], start=1):
                texts = [text for text in ([given] if isinstance(given, str) else given) if text not in seen]
                try:
                    if texts:
                        processor.check_user_texts(texts, name)
                except ValueError as error:
                    raise UsageError(f"{file}, row {number}: {error}") from error
                seen.update(texts)


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


def train_recipe(
    trainer_class: type[CLaRaTrainer],
    config_class: type[CLaRaTrainingArguments],
    default_config: str,
    read: Callable[[str], Iterable[dict]],
    make_metrics: Callable,
    arguments: list[str] | None,
) -> None:
    """Carry out one stage as the YAML and command line say; a finished run is reused.

    Raises:
        UsageError, DataError, ValueError, OSError: one sentence that says what to mend.
    """
    types = (DataArguments, config_class, CLaRaModelArguments)
    data_args, training_args, model_args = parse(types, default_config, arguments)
    quieten(training_args)
    check_folder(data_args, model_args, training_args)
    if not data_args.overwrite and is_finished(training_args.output_dir):
        return
    checkpoint = checkpoint_to_resume(data_args, training_args)
    # The first process may write what all read.
    with training_args.main_process_first(desc="loading data"):
        train, validation = load_split(data_args, read)
    # Fresh adapters are drawn at random: alike in every process, and in a run that starts again.
    set_seed(training_args.seed)
    model = load_model(model_args)
    check_user_texts(model.processor, {data_args.train_file: train, data_args.validation_file: validation})
    # What an overwritten run left: the memories are used again if this model's compressor made them.
    options = {"replace_memories": data_args.overwrite} if hasattr(training_args, "memory_store") else {}
    with claimed_folder(data_args, model_args, training_args):
        trainer = trainer_class(
            model=model,
            args=training_args,
            train_dataset=train,
            eval_dataset=validation,
            compute_metrics=make_metrics(model.processor, validation) if validation is not None else None,
            **options,
        )
        train_stage(trainer, checkpoint)
