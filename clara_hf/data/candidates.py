"""Candidate pools for one's own corpus: questions and passages in, questions with `docs` and `pos_index` out.

    python eval/candidates.py --questions q.jsonl --corpus corpus.jsonl --output pools.jsonl
    python eval/candidates.py --questions q.jsonl --corpus corpus.jsonl --output pools.jsonl --mode normal
    python eval/candidates.py --questions q.jsonl --corpus corpus.jsonl --output pools.jsonl --retriever models/bge

A corpus row has a `text`, optionally a `title`, which is put in front of it, and an `id` (default: the row's number). A
question row has `question`, `answers` and, where known, its `positives`: ids of the corpus. Instead of these it may
have `docs` and `pos_index`, as evaluation data do: the gold documents are its positives, and join the corpus where it
lacks them. Without --corpus, the corpus is all `docs` of the questions. Files are of any kind that `eval/data_files.py`
reads.

Beside the output, `<output>.report.json` tells what the pools give away: see `eval/leak_checks.py`.
"""

import json
import shutil
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import HfArgumentParser

from clara_hf.data.corpus import distinct_passages, read_corpus, read_questions, same_text_key
from clara_hf.data.files import write_jsonl, write_text
from clara_hf.data.leak_checks import AnswerFinder, format_report, leak_report
from clara_hf.data.retrievers import Retriever, check_language, make_retriever, random_rows
from clara_hf.data.schema import DataError, parse_example


MODES = ("oracle", "normal")


class PoolError(ValueError):
    """Pools cannot be built as they were asked for."""


def build_candidates(
    questions: Sequence[Mapping[str, Any]],
    corpus: Mapping[str, str],
    retriever: str | Retriever = "bm25",
    size: int = 20,
    mode: str = "oracle",
    seed: int = 0,
    exclude_answers: bool = False,
    show_progress: bool = False,
    language: str = "en",
) -> list[dict[str, Any]]:
    """Gives each question `size` distinct candidates of the corpus, in a random order.

    Passages are the same where they differ only in case and white space: such copies count once, so that a positive is
    never in a pool twice, nor its copy a negative. What the retriever does not find (BM25: no common word) is filled up
    with passages drawn by chance. A question's pool depends on `seed`, its id and the corpus alone.

    Args:
        questions: rows with `question`, `answers`, and optionally `id` (default: the position from 1) and `positives`,
            ids of the corpus. Further keys are kept.
        corpus: passage id -> text.
        retriever: `"bm25"`, the name or folder of a sentence-transformers bi-encoder, or a [`Retriever`] over
            `distinct_passages(corpus)[0]`.
        size: candidates per question (the paper's N).
        mode: `"oracle"`: all positives, filled up with the best-ranked others. `"normal"`: the best `size`, whether
            positives are among them or not.
        seed: of the order and of what is drawn by chance.
        exclude_answers: leave out negatives that contain an accepted answer.
        show_progress: progress bars.
        language: ISO 639-1 code of questions and passages, for BM25's stemmer and stop words.

    Returns:
        The rows with `id`, `docs`, `doc_ids` (ids in the corpus) and `pos_index` (positions of positives in `docs`,
        ascending; empty where none is in the pool).

    Raises:
        PoolError: an unknown mode, a size below 1, a corpus or a question that cannot fill a pool, a positive that is
            not in the corpus, or in oracle mode a question without positives.
    """
    texts, ids, positives = check_pools(questions, corpus, size, mode)
    if isinstance(retriever, str):
        retriever = make_retriever(retriever, texts, show_progress=show_progress, language=language)
    # As many more as could be passed over, so that the pool is filled from the ranking.
    depth = (3 if exclude_answers else 2) * size
    rankings = retriever.search([question["question"] for question in questions], depth)
    pools = []
    for (name, question), gold, ranking in zip(_named(questions), positives, rankings, strict=True):
        chance = np.random.default_rng([seed, zlib.crc32(name.encode())])
        answers = AnswerFinder(question["answers"] if exclude_answers else ())
        pool = dict.fromkeys(gold if mode == "oracle" else ())
        passed = set(pool)
        while len(pool) < size:
            for row in ranking:
                if len(pool) < size and row not in passed:
                    passed.add(row)
                    if row in gold or not answers.found_in(texts[row]):
                        pool[row] = None
            if len(pool) < size and len(passed) == len(texts):
                raise PoolError(
                    f"question {name!r}: only {len(pool)} passages hold none of its answers, {size} are needed."
                )
            # Twice as many each time, should nearly all of them hold an answer.
            ranking = random_rows(chance, len(texts), max(size, len(passed)), passed)
        order = chance.permutation(list(pool)).tolist()
        pools.append(
            {
                **question,
                "id": name,
                "docs": [texts[row] for row in order],
                "doc_ids": [ids[row] for row in order],
                "pos_index": [position for position, row in enumerate(order) if row in gold],
            }
        )
    return pools


def check_pools(
    questions: Sequence[Mapping[str, Any]], corpus: Mapping[str, str], size: int, mode: str
) -> tuple[list[str], list[str], list[set[int]]]:
    """Texts and ids of the corpus without copies, and each question's positives as rows of these.

    Raises:
        PoolError: as [`build_candidates`].
    """
    _check_options(size, mode)
    texts, ids, rows_of = distinct_passages(corpus)
    if len(texts) < size:
        raise PoolError(f"the corpus holds {len(texts)} distinct passages, too few for pools of {size}.")
    found = []
    for name, question in _named(questions):
        positives = question.get("positives") or []
        for positive in positives:
            if positive not in rows_of:
                raise PoolError(f"question {name!r}: its positive {positive!r} is not in the corpus.")
        rows = {rows_of[positive] for positive in positives}
        if mode == "oracle" and not rows:
            raise PoolError(f"question {name!r} has no positives: give them, or use the mode 'normal'.")
        if len(rows) > size:
            raise PoolError(f"question {name!r} has {len(rows)} positives, more than its pool of {size} holds.")
        found.append(rows)
    return texts, ids, found


def _check_options(size, mode):
    if mode not in MODES:
        raise PoolError(f"mode is {mode!r}; it must be 'oracle' or 'normal'.")
    if size < 1:
        raise PoolError(f"size is {size}; it must be at least 1.")


def _named(questions):
    for number, question in enumerate(questions, start=1):
        yield str(number if question.get("id") is None else question["id"]), question


@dataclass
class CandidateSettings:
    """What pools are built from, and how.

    Raises:
        PoolError: an unknown mode, a limit below 1, or the output is there already and `overwrite` is not set.
    """

    questions: str = field(metadata={"help": "Questions: a file, a folder or hf://datasets/USER/NAME#SPLIT."})
    output: str = field(metadata={"help": "Where the pools go: a .jsonl or .jsonl.gz file."})
    corpus: str | None = field(
        default=None, metadata={"help": "Passages, from the same kinds of source. Default: all docs of the questions."}
    )
    retriever: str = field(
        default="bm25", metadata={"help": "bm25, or the folder or Hub name of a sentence-transformers bi-encoder."}
    )
    language: str = field(default="en", metadata={"help": "ISO 639-1 code, for BM25's stemmer and stop words."})
    mode: str = field(
        default="oracle",
        metadata={"help": "oracle: all positives, filled up with retrieved ones. normal: the best retrieved ones."},
    )
    size: int = field(default=20, metadata={"help": "Candidates per question."})
    seed: int = field(default=0, metadata={"help": "Of the candidates' order, and of what is drawn by chance."})
    exclude_answers: bool = field(default=False, metadata={"help": "Leave out negatives that contain an answer."})
    batch_size: int = field(default=32, metadata={"help": "Texts per batch of a bi-encoder."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an earlier output."})

    def __post_init__(self):
        _check_options(self.size, self.mode)
        try:
            check_language(self.language)
        except ValueError as error:
            raise PoolError(f"--language: {error}") from error
        if self.batch_size < 1:
            raise PoolError(f"--batch_size must be at least 1, but is {self.batch_size}.")
        if self.seed < 0:
            raise PoolError(f"--seed must be at least 0, but is {self.seed}.")
        if not self.output.endswith((".jsonl", ".jsonl.gz")):
            raise PoolError(f"--output must end in .jsonl or .jsonl.gz, but is {self.output}.")
        if Path(self.output).exists() and not self.overwrite:
            raise PoolError(f"{self.output} is there already: give another --output, or --overwrite.")

    @property
    def parts(self) -> Path:
        """Folder of the embeddings that an unfinished call has made; the next call goes on from them."""
        return Path(f"{self.output}.unfinished")


def write_pools(settings: CandidateSettings) -> dict:
    """Builds the pools and writes them, and their report; returns the report.

    Raises:
        DataError: a file breaks its schema.
        PoolError: as [`build_candidates`]; or the retriever cannot be loaded.
    """
    corpus = read_corpus(settings.corpus, show_progress=True) if settings.corpus else {}
    given = len(corpus)
    questions = read_questions(settings.questions, corpus, pooled=settings.corpus is None)
    if not corpus:
        raise PoolError(f"--corpus is needed: the questions of {settings.questions} have no docs.")
    # Checked before the corpus is embedded or indexed, which may take long.
    texts, _, _ = check_pools(questions, corpus, settings.size, settings.mode)
    try:
        retriever = make_retriever(
            settings.retriever, texts, settings.batch_size, True, settings.parts, settings.language
        )
    except ImportError as error:
        raise PoolError(f"--retriever {settings.retriever}: {error}: pip install 'clara-hf[retrievers]'.") from error
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise PoolError(f"--retriever: {settings.retriever} cannot be loaded: {reason}") from error
    pools = build_candidates(
        questions, corpus, retriever, settings.size, settings.mode, settings.seed, settings.exclude_answers, True
    )
    shares = [
        len(pool["pos_index"]) / len({same_text_key(corpus[name]) for name in pool["positives"]})
        for pool in pools
        if pool["positives"]
    ]
    report = {
        **leak_report([parse_example(pool, pool["id"], needs_answers=False) for pool in pools], settings.seed),
        "gold_in_pool": float(np.mean(shares)) if shares else None,
        "corpus": {"passages": given, "added_gold": len(corpus) - given, "distinct": len(texts)},
        "settings": {name: value for name, value in vars(settings).items() if name != "overwrite"},
    }
    # The pools come last: where they are, the report is, too.
    write_text(f"{settings.output}.report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_jsonl(settings.output, pools)
    shutil.rmtree(settings.parts, ignore_errors=True)
    return report


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    try:
        parser = HfArgumentParser(CandidateSettings)
        settings, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
        if unknown:
            parser.error(f"there is no argument {' '.join(unknown)}")
        report = write_pools(settings)
    except (PoolError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}. Nothing was written.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "Interrupted: no pools were written. What a bi-encoder has embedded is kept for the same call.",
            file=sys.stderr,
        )
        return 130
    print(format_report(report))
    print(f"{settings.output} and {settings.output}.report.json are written.")
    return 0
