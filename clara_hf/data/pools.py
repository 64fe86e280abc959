"""Candidate pools for your own corpus: questions and passages in, questions with `docs` and `pos_index` out.

    python eval/candidates.py --questions q.jsonl --corpus corpus.jsonl --output pools.jsonl
    python eval/candidates.py --questions q.jsonl --corpus corpus.jsonl --output pools.jsonl --mode normal
    python eval/candidates.py --questions q.jsonl --corpus corpus.jsonl --output pools.jsonl --retriever models/bge

A corpus row has a `text`, optionally a `title`, which is put in front of it, and an `id` (default: the row's number). A
question row has `question`, `answers` and, where known, its `positives`: ids of the corpus. Instead of these it may
have `docs` and `pos_index`, as evaluation data do: the gold documents are its positives, and join the corpus where it
lacks them. Without --corpus, the corpus is all `docs` of the questions. Files are of any kind that
`clara_hf.data.sources` reads.

Beside the output, `<output>.report.json` tells what the pools give away: see `clara_hf.data.leak_checks`.
"""

import hashlib
import json
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from clara_hf.data.files import DataError, check_output, shown, write_jsonl
from clara_hf.data.leak_checks import AnswerFinder, format_report, leak_report
from clara_hf.data.retrievers import Retriever, check_language, make_retriever, random_rows
from clara_hf.data.schema import check_text, check_texts, parse_example
from clara_hf.data.sources import read_rows, unit_of
from clara_hf.program import UsageError, option, parse, read_json, write_json
from clara_hf.program.errors import loading
from clara_hf.program.paths import check_model_name


MODES = ("oracle", "normal")
TEXTS = ("text", "contents", "content")


class PoolError(UsageError):
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


def read_corpus(source: str | Path, show_progress: bool = False) -> dict[str, str]:
    """Passages by id: `text` (or `contents`, `content`) behind its `title`, if it has one, and a line break.

    Raises:
        DataError: a row has no text, an id is used twice, or there is no row at all.
    """
    corpus: dict[str, str] = {}
    unit = unit_of(source)
    rows = read_rows(source)
    for number, row in tqdm(rows, desc="reading the corpus", unit=" passages", disable=not show_progress, leave=False):
        try:
            # An id that is null is none, as in clara_hf.data.schema.
            name = str(next((row[key] for key in ("id", "_id") if row.get(key) is not None), number))
            field_name = next((name for name in TEXTS if name in row), "text")
            check_text(field_name, row.get(field_name))
            if name in corpus:
                raise ValueError(f"id {name!r} is already used.")
            corpus[name] = f"{row['title']}\n{row[field_name]}" if row.get("title") else row[field_name]
        except ValueError as error:
            raise DataError(f"{source}, {unit} {number}: {error}") from error
    if not corpus:
        raise DataError(f"{source}: the file holds no passage.")
    return corpus


def read_questions(source: str | Path, corpus: dict[str, str], pooled: bool = False) -> list[dict[str, Any]]:
    """Questions for [`build_candidates`], whose gold documents become `positives`.

    Args:
        source: rows with `question` and optionally `answers`, `id` and `positives`, or `docs` and `pos_index`.
        corpus: passages by id; gold documents that it lacks are added under new ids, so that they are candidates of
            other questions, too.
        pooled: all `docs` are added, not the gold ones alone.

    Raises:
        DataError: a row breaks the schema, an id is used twice, or there is no question at all.
    """
    ids = {same_text_key(text): name for name, text in corpus.items()}
    unit, questions = unit_of(source), []
    numbers: dict[str, int] = {}
    for number, row in read_rows(source):
        try:
            question = _question(row, str(number))
            if question["id"] in numbers:
                raise ValueError(f"id {question['id']!r} is already used in {unit} {numbers[question['id']]}.")
        except ValueError as error:
            raise DataError(f"{source}, {unit} {number}: {error}") from error
        numbers[question["id"]] = number
        gold = [question["docs"][position] for position in question.pop("pos_index")]
        for text in [*gold, *(question["docs"] if pooled else ())]:
            if (key := same_text_key(text)) not in ids:
                ids[key] = _unused_id(corpus)
                corpus[ids[key]] = text
        question["positives"] = question["positives"] or [ids[same_text_key(text)] for text in gold]
        del question["docs"]
        questions.append(question)
    if not questions:
        raise DataError(f"{source}: the file holds no question.")
    return questions


def _unused_id(corpus):
    return next(name for number in count(len(corpus)) if (name := f"doc:{number}") not in corpus)


def _question(row, default_id):
    positives = row.get("positives") or []
    if not isinstance(positives, list) or any(type(name) not in (str, int) for name in positives):
        raise ValueError(f"'positives' must be a list of ids, but is {shown(positives)}.")
    if row.get("docs"):
        example = parse_example(row, default_id, needs_answers=False)
        checked = {"docs": example.docs, "pos_index": example.pos_index or [], "id": example.id}
    else:
        if "question" not in row:
            raise ValueError("the field 'question' is missing.")
        check_text("question", row["question"])
        if row.get("answers", []) != []:
            check_texts("answers", row["answers"])
        checked = {"docs": [], "pos_index": [], "id": default_id if row.get("id") is None else str(row["id"])}
    return {"answers": [], **row, **checked, "positives": [str(name) for name in positives]}


def distinct_passages(corpus: Mapping[str, str]) -> tuple[list[str], list[str], dict[str, int]]:
    """Texts of the corpus without copies, the ids of their first occurrence, and for every id the row of its text."""
    texts: list[str] = []
    ids, rows_of = [], {}
    seen: dict[str, int] = {}
    for name, text in corpus.items():
        row = seen.setdefault(same_text_key(text), len(texts))
        rows_of[name] = row
        if row == len(texts):
            texts.append(text)
            ids.append(name)
    return texts, ids, rows_of


def same_text_key(text: str) -> str:
    """What two texts share when they differ only in case and white space."""
    return " ".join(text.casefold().split())


@dataclass
class CandidateSettings:
    """What pools are built from, and how.

    Raises:
        PoolError: an unknown mode, or a limit below 1.
        UsageError: the output is there already, with other settings, and `overwrite` is not set.
    """

    questions: str = option(help="Questions: a file, a folder or hf://datasets/USER/NAME#SPLIT.")
    output: str = option(help="Where the pools go: a .jsonl or .jsonl.gz file.")
    corpus: str | None = option(None, "Passages, from the same kinds of source. Default: all docs of the questions.")
    retriever: str = option("bm25", "bm25, or the folder or Hub name of a sentence-transformers bi-encoder.")
    language: str = option("en", "ISO 639-1 code, for BM25's stemmer and stop words.")
    mode: str = option(
        "oracle", "oracle: all positives, filled up with retrieved ones. normal: the best retrieved ones."
    )
    size: int = option(20, "Candidates per question.")
    seed: int = option(0, "Random seed for the candidates' order and for random candidates.")
    exclude_answers: bool = option(False, "Leave out negatives that contain an answer.")
    batch_size: int = option(32, "Texts per batch of a bi-encoder.")
    overwrite: bool = option(False, "Replace an earlier output.")

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
        if self.retriever != "bm25":
            check_model_name("--retriever", self.retriever)
        # The same pools, made before, are not refused: see `finished`.
        check_output(self.output, self.overwrite or self.earlier() is not None)

    @property
    def recorded(self) -> dict:
        """What of the settings decides what is in the pools."""
        return {name: value for name, value in vars(self).items() if name != "overwrite"}

    def earlier(self) -> dict | None:
        """The report of pools that lie at `output` and were made with these settings."""
        report = Path(f"{self.output}.report.json")
        if not Path(self.output).is_file() or not report.is_file():
            return None
        found = read_json(report)
        return found if isinstance(found, dict) and found.get("settings") == self.recorded else None

    @property
    def parts(self) -> Path:
        """Folder of the embeddings that an unfinished call has made; the next call goes on from them."""
        return Path(f"{self.output}.unfinished")


def write_pools(settings: CandidateSettings) -> dict:
    """Builds the pools and writes them, and their report; returns the report. Pools that lie there already, from the
    same settings, questions and passages, are left as they are.

    Raises:
        DataError: a file breaks its schema.
        PoolError: as [`build_candidates`].
        UsageError: the retriever cannot be loaded, or the output was made from other questions or passages.
    """
    corpus = read_corpus(settings.corpus, show_progress=True) if settings.corpus else {}
    given = len(corpus)
    questions = read_questions(settings.questions, corpus, pooled=settings.corpus is None)
    if not corpus:
        raise PoolError(f"--corpus is needed: the questions of {settings.questions} have no docs.")
    inputs = rows_digest(questions, corpus)
    earlier = None if settings.overwrite else settings.earlier()
    if earlier is not None:
        if earlier.get("inputs") == inputs:
            return earlier
        raise UsageError(
            f"{settings.output} was made from other questions or passages: give another --output, or --overwrite."
        )
    # Checked before the corpus is embedded or indexed, which may take long.
    texts, _, _ = check_pools(questions, corpus, settings.size, settings.mode)
    with loading("--retriever", settings.retriever):
        retriever = make_retriever(
            settings.retriever, texts, settings.batch_size, True, settings.parts, settings.language
        )
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
        "inputs": inputs,
        "settings": settings.recorded,
    }
    # The pools come last: where they are, the report is, too, and it is theirs.
    Path(settings.output).unlink(missing_ok=True)
    write_json(f"{settings.output}.report.json", report)
    write_jsonl(settings.output, pools)
    shutil.rmtree(settings.parts, ignore_errors=True)
    return report


def rows_digest(questions: Sequence[Mapping[str, Any]], corpus: Mapping[str, str]) -> str:
    """SHA-256 of questions and passages, in their order."""
    digest = hashlib.sha256()
    for row in (*questions, *corpus.items()):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def main(arguments: list[str] | None = None) -> None:
    """The program, see the top of this file."""
    settings = parse(CandidateSettings, arguments, description=__doc__)
    was_there = not settings.overwrite and Path(settings.output).exists()
    print(format_report(write_pools(settings)))
    how = "were complete; --overwrite makes them anew" if was_there else "are written"
    print(f"{settings.output} and {settings.output}.report.json {how}.")
