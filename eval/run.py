"""Compares CLaRa with what one would use instead, on one's own questions.

    python eval/run.py --model runs/nano/joint --data questions.jsonl.gz
    python eval/run.py --model runs/nano/joint --before_joint runs/nano/scp --data a.jsonl,b.jsonl --systems clara,bm25
    python eval/run.py --data questions.jsonl            # no model: the retrieval of BM25 alone

Data: one JSON object per line with `question`, `answers`, `docs` and, where known, `pos_index`, `id`, `type` (see
`eval/data.py`). Prints the table and writes `results.json`, `table.md` and the predictions to the output folder.
"""

import sys
import time
from pathlib import Path


if __name__ == "__main__":
    # A script has its own folder on the path, but not the repository's root.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser, PreTrainedModel
from transformers.utils import logging

from eval.data import DataError, QAExample, load_examples
from eval.metrics.answer_f1.answer_f1 import score_answer
from eval.metrics.retrieval_recall.retrieval_recall import score_ranking
from eval.report import dataset_results, format_tables, holds_run, read_results, write_run
from eval.settings import SYSTEMS, EvalSettings, UsageError
from eval.systems import BM25, Clara, Gold, MemoryReader, NoMemory, System, TextReader, WrongMemory
from modeling_clara import CLaRaConfig, CLaRaForRetrievalGeneration, CLaRaProcessor


logger = logging.get_logger(__name__)


def load_clara(folder: str) -> CLaRaForRetrievalGeneration:
    """A CLaRa checkpoint on this process's device, ready to answer.

    Raises:
        OSError, ValueError: the folder holds no checkpoint, an incomplete one, or another kind of model.
    """
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, CLaRaConfig):
        raise ValueError(f"it holds a {config.model_type} model, not a CLaRa checkpoint.")
    return CLaRaForRetrievalGeneration.from_pretrained(folder).to(PartialState().device).eval()


def load_text_model(folder: str, clara: str) -> tuple[PreTrainedModel, CLaRaProcessor]:
    """A causal language model, with its adapter if the folder holds one, and the processor of `clara`."""
    model = AutoModelForCausalLM.from_pretrained(folder).to(PartialState().device).eval()
    return model, CLaRaProcessor.from_pretrained(clara)


def evaluate_systems(settings: EvalSettings) -> tuple[dict, dict[str, dict[str, list[dict]]]]:
    """Runs every chosen system on every data file; writes nothing.

    Returns:
        The results as in `results.json`, and per data file and system one record per question: `id`, `question`,
        `answers`, `pos_index`, `prediction` and `ranking` (`None` where the system gives none) and `scores`.

    Raises:
        DataError: a data file breaks the schema.
        UsageError: a checkpoint cannot be loaded, or a text cannot be put to it.
    """
    began = time.perf_counter()
    record = settings.record()
    files = {name: load_examples(path) for name, path in settings.files().items()}
    chosen = settings.chosen_systems()
    records = {name: dict.fromkeys(chosen) for name in files}
    memories = {}
    # One checkpoint after the other, so that only one needs to fit into memory.
    for checkpoint in dict.fromkeys(SYSTEMS[system] for system in chosen):
        _run_checkpoint(settings, checkpoint, files, memories, records)
    found = {}
    for name, systems in records.items():
        for system in [system for system, rows in systems.items() if not any(row["scores"] for row in rows)]:
            logger.warning(f"{system} is left out for {name}: no question there has the pos_index that it needs.")
            del systems[system]
        if not systems:
            raise UsageError(f"{name}: none of {', '.join(chosen)} can be scored without pos_index and --model.")
        found[name] = dataset_results(files[name][: settings.limit], systems, settings.seed)
    layout = {"datasets": found} if len(found) > 1 else next(iter(found.values()))
    return {**layout, "seconds": round(time.perf_counter() - began, 1), "settings": record}, records


def _run_checkpoint(settings: EvalSettings, checkpoint: str, files: dict, memories: dict, records: dict) -> None:
    reader = _reader(settings, checkpoint, memories)
    for dataset, examples in files.items():
        corpus = list(dict.fromkeys(document for example in examples for document in example.docs))
        questions = examples[: settings.limit]
        if reader is not None:
            _check_texts(reader, dataset, questions)
        for name in (name for name in records[dataset] if SYSTEMS[name] == checkpoint):
            records[dataset][name] = _records(_system(name, reader, corpus, settings), questions)


def _reader(settings: EvalSettings, checkpoint: str, memories: dict) -> MemoryReader | TextReader | None:
    folder = getattr(settings, checkpoint)
    if folder is None:
        return None
    limits = {"batch_size": settings.batch_size, "max_new_tokens": settings.max_new_tokens}
    try:
        if checkpoint == "text_model":
            return TextReader(*load_text_model(folder, settings.model), **limits)
        model = load_clara(folder)
    except (OSError, ValueError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(f"--{checkpoint}: {folder} cannot be loaded: {reason}") from error
    # Checkpoints with the same compressor make the same memories.
    return MemoryReader(model, memories.setdefault(model.compressor_fingerprint(), {}), **limits)


def _check_texts(reader: MemoryReader | TextReader, dataset: str, examples: list[QAExample]) -> None:
    for example in examples:
        try:
            reader.processor.check_user_texts([example.question], "question")
            reader.processor.check_user_texts(example.docs, "docs")
        except ValueError as error:
            raise UsageError(f"{dataset}, question {example.id!r}: {error}") from error


def _system(name: str, reader: MemoryReader | TextReader | None, corpus: list[str], settings: EvalSettings) -> System:
    if name in ("gold", "text-gold"):
        return Gold(name, reader)
    if name == "no-memory":
        return NoMemory(name, reader)
    if name == "wrong-memory":
        return WrongMemory(name, reader, settings.seed)
    top_k = settings.top_k or (reader.model.config.top_k if reader is not None else None)
    if name == "bm25":
        return BM25(name, reader, top_k, corpus, settings.seed)
    return Clara(name, reader, top_k)


def _records(system: System, examples: list[QAExample]) -> list[dict]:
    rankings = system.rank(examples)
    answers = system.answer(examples, rankings)
    records = []
    for example, ranking, answer in zip(examples, rankings or [None] * len(examples), answers, strict=True):
        scores = {}
        if answer is not None:
            scores.update(score_answer(answer, example.answers))
        if ranking is not None and example.pos_index is not None:
            scores.update(score_ranking(ranking, example.pos_index))
        given = {"id": example.id, "question": example.question, "answers": example.answers}
        given["pos_index"] = example.pos_index
        records.append({**given, "prediction": answer, "ranking": ranking, "scores": scores})
    return records


def run(settings: EvalSettings) -> dict:
    """Evaluates and writes; returns the results, or those of an earlier run with equal settings, data and checkpoints.

    Raises:
        DataError, UsageError: as `evaluate_systems`; or the output folder holds another run's results and `overwrite`
            is not set.
    """
    folder = settings.folder()
    if holds_run(folder) and not settings.overwrite:
        earlier = read_results(folder)
        if earlier is None or earlier.get("settings") != settings.record():
            raise UsageError(f"{folder} holds another run's results: give another --output_dir, or --overwrite.")
        logger.warning(f"{folder} holds these results already, they are reused (--overwrite computes them again).")
        return earlier
    folder.mkdir(parents=True, exist_ok=True)
    results, records = evaluate_systems(settings)
    write_run(folder, results, records)
    return results


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    try:
        parser = HfArgumentParser(EvalSettings)
        settings, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
        if unknown:
            parser.error(f"there is no argument {' '.join(unknown)}")
        results = run(settings)
    except (UsageError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}. The results were not written: mend that and run it again.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted: nothing was written.", file=sys.stderr)
        return 130
    print(format_tables(results))
    print(f"{results['seconds']} s. Results, table and predictions: {settings.folder()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
