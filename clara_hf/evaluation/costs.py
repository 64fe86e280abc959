"""What a system costs, per question, as measured on the run."""

from clara_hf.data.schema import QAExample
from clara_hf.evaluation.plan import CHECKPOINTS, SystemSpec
from clara_hf.evaluation.stages import Workplace


COST_COLUMNS = {
    "compress ms": "compress_ms",
    "query ms": "query_ms",
    "decode ms": "decode_ms",
    "all ms": "total_ms",
    "all ms, stored": "total_ms_stored",
    "prompt tokens": "prompt_tokens",
    "peak MiB": "peak_mib",
}


def system_costs(
    work: Workplace, dataset: str, spec: SystemSpec, questions: list[QAExample], asked: dict[str, list[str]]
) -> dict[str, float | None]:
    """Milliseconds, tokens and memory of one system on one data file; `None` for what was not measured.

    Args:
        asked: question id -> the documents that it was answered from.

    Returns:
        `compress_ms`: preparing the documents of a question (compressing, embedding, indexing or shortening them), at
        the measured time per document: all candidates for a ranker that needs that, else those that are answered from;
        both for a `memory-` system, also where its two models have one compressor.
        `query_ms`: ranking; `decode_ms`: answering, its prompt included. `total_ms` is their sum, `total_ms_stored`
        that without `compress_ms`, as for documents that were prepared before. `prompt_tokens`: mean length of the
        prompt. `peak_mib`: on an accelerator, the most that was allocated in a batch; else the most memory that the
        process held after one.
    """
    candidates = sum(len(one.docs) for one in questions) / len(questions)
    given = sum(map(len, asked.values())) / max(1, len(asked))
    checkpoint = CHECKPOINTS.get(spec.ranker)
    parts = []
    if checkpoint is not None:
        parts.append((candidates, work.milliseconds(dataset, f"memories of {checkpoint}")))
    elif spec.ranker is not None:
        parts.append((candidates, work.milliseconds(dataset, spec.ranker)))
    if spec.reader == "memory" and checkpoint != spec.checkpoint:
        parts.append((given, work.milliseconds(dataset, f"memories of {spec.checkpoint}")))
    if spec.shortener is not None:
        parts.append((given, work.milliseconds(dataset, f"texts of {spec.shortener}")))
    answers = work.measured("answers", dataset, spec.label)
    rankings = work.measured("rankings", dataset, spec.ranker) if spec.ranker is not None else []
    times = {
        "compress_ms": _total(count * each for count, each in parts if each is not None),
        "query_ms": _mean(row["ms"] for row in rankings),
        "decode_ms": _mean(row["ms"] for row in answers),
    }
    return {
        **times,
        "total_ms": _total(value for value in times.values() if value is not None),
        "total_ms_stored": _total(times[name] for name in ("query_ms", "decode_ms") if times[name] is not None),
        "prompt_tokens": _mean(row["prompt_tokens"] for row in answers),
        "peak_mib": max((row["mib"] for row in [*rankings, *answers]), default=None),
    }


def _mean(values) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def _total(values) -> float | None:
    values = list(values)
    return sum(values) if values else None
