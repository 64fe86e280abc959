"""Make instruction-tuning data: a language model answers questions from the passages that were retrieved for them.

    python recipes/instruct_data.py --questions pools.jsonl --output_dir instruct/ --model qwen3-32b --base_url URL

A line of the questions has `question` and `docs`, best first (as `recipes/joint_data.py --mode normal` or
`eval/candidates.py` make them), and where known `answers` and `pos_index`. Interrupt it at any time; run
the same command again to resume. `recipes/instruct.py` takes the result as it is.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clara_hf.data.schema import read_jsonl
from clara_hf.program import UsageError, option, parse, write_json
from clara_hf.synthesis.outputs import json_line, written_files
from clara_hf.synthesis.prompts import Answer, ReplyError, Verdict, numbered
from clara_hf.synthesis.session import Session, TeacherArguments, path_identity
from clara_hf.synthesis.store import RunStore, to_json
from clara_hf.synthesis.text import clean_line, clean_text, words


DATA, REJECTED, STATS = "instruct.jsonl", "rejected.jsonl", "stats.json"
OUTPUTS = (DATA, REJECTED, STATS)
QUESTION_BATCH = 1000


@dataclass
class InstructDataArguments(TeacherArguments):
    """Questions with their passages."""

    questions: str = option("", "JSONL: question, docs (best first), and where known answers and pos_index.")
    top_k: int = option(5, "Passages per question: the first of its docs.")

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "top_k")
        if self.backend == "cloze":
            raise UsageError("--backend cloze answers no questions: choose http or transformers.")
        if not Path(self.questions).is_file():
            raise UsageError(f"--questions: there is no file {self.questions!r}.")

    def inputs(self) -> dict[str, Any]:
        return {"questions": path_identity(self.questions)}


def fill_store(args: InstructDataArguments, store: RunStore) -> None:
    """Read the questions.

    Raises:
        UsageError: a line has no question or no documents, or the file has no line.
    """
    if store.meta("complete", False):
        return
    for number, row in enumerate(read_questions(args.questions, args.top_k), start=1):
        if not store.add_item(row["key"], row) and store.meta("documents", 0) < number:
            store.drop({"type": "question", "reason": "duplicate question", "question": row["question"]})
        if number % QUESTION_BATCH == 0:
            store.set_meta(documents=number)
            store.commit()
    if not store.count(None):
        raise UsageError(f"--questions: {args.questions} holds no question.")
    store.set_meta(complete=True)
    store.commit()


def read_questions(path: str, top_k: int) -> Iterator[dict[str, Any]]:
    """Rows with `key`, `id`, `question`, `docs`, `answers` and `pos_index` (the last two may be empty)."""
    for number, row in read_jsonl(path):
        question, answers = row.get("question"), row.get("answers") or []
        docs: Any = row.get("docs")
        if not isinstance(question, str) or not question.strip():
            raise UsageError(f"{path}, line {number}: 'question' must be a text.")
        for name, texts in (("docs", docs), ("answers", answers)):
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise UsageError(f"{path}, line {number}: {name!r} must be a list of texts.")
        positions = row.get("pos_index") or []
        if not isinstance(positions, list) or any(type(index) is not int or index < 0 for index in positions):
            raise UsageError(f"{path}, line {number}: 'pos_index' must be a list of positions in 'docs', from 0.")
        docs = [clean_text(text) for text in docs[:top_k]]
        if not all(text.strip() for text in docs) or not docs:
            raise UsageError(f"{path}, line {number}: 'docs' must hold texts that are not empty.")
        known = {
            "id": str(row.get("id", number)),
            "question": clean_line(question),
            "answers": [clean_line(text) for text in answers if text.strip()],
            "docs": docs,
            "pos_index": [index for index in positions if index < len(docs)],
        }
        yield {"key": to_json([known["question"], docs]), **known}


async def answer_question(item: dict[str, Any], conversation) -> tuple[dict[str, Any], int, int]:
    """The teacher's answer, judged where an answer is known; `fault` says why it cannot be used."""
    documents = numbered(item["docs"])
    made: dict[str, Any] = {"answer": None, "fault": None}
    try:
        reply = await conversation.ask(
            "teach", "teach", Answer, write=True, documents=documents, question=item["question"]
        )
        made["answer"] = clean_line(reply.answer)
        if not reply.answerable or not made["answer"]:
            made["fault"] = "not answerable from the passages"
        elif item["answers"] and not any(holds(made["answer"], known) for known in item["answers"]):
            asked = {"passage": documents, "question": item["question"]}
            values = {**asked, "reference": item["answers"][0], "answer": made["answer"]}
            verdict = await conversation.ask("judge", "judge", Verdict, **values)
            made["fault"] = None if verdict.correct else "differs from the known answer"
    except ReplyError as error:
        made["fault"], made["detail"] = "malformed reply", str(error)
    return made, int(made["fault"] is None), int(made["fault"] is not None)


def holds(text: str, answer: str) -> bool:
    """Whether the answer's words stand in the text, in a row."""
    return f" {' '.join(words(answer))} " in f" {' '.join(words(text))} "


def write_outputs(
    store: RunStore, folder: Path, settings: dict[str, Any], limit: int | None, partial: bool = False
) -> dict[str, Any]:
    """Write the data, what was set aside, and the counts, which say where the run is `partial`; returns the counts."""
    reasons: Counter[str] = Counter()
    kept = count = 0
    with written_files(folder, DATA, REJECTED) as (data, rejected):
        for row in store.dropped(limit):
            reasons[row["reason"]] += 1
            rejected.write(json_line(row))
        for _, item, made in store.finished(limit):
            count += 1
            known = {name: item[name] for name in ("id", "question")}
            fault = "request failed" if "failed" in made else made["fault"]
            if fault:
                reasons[fault] += 1
                row = {**known, "type": "question", "reason": fault, "answer": made.get("answer")}
                detail = made.get("failed") or made.get("detail")
                rejected.write(json_line(row | ({"detail": detail} if detail else {})))
                continue
            kept += 1
            # The first answer is what is trained; the known ones count in evaluation.
            answers = list(dict.fromkeys([made["answer"], *item["answers"]]))
            row = {**known, "answers": answers, "docs": item["docs"], "pos_index": item["pos_index"]}
            data.write(json_line(row))
    totals = store.totals(limit)
    stats = {
        "partial": partial,
        "questions": count,
        "kept": kept,
        "reject_reasons": dict(sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))),
        "prompt_tokens": totals.prompt_tokens,
        "completion_tokens": totals.completion_tokens,
        "settings": settings,
    }
    write_json(folder / STATS, stats)
    return stats


def main(arguments: list[str] | None = None) -> None:
    args: InstructDataArguments = parse(InstructDataArguments, arguments, description=__doc__)
    with Session(args, args.inputs(), OUTPUTS) as session:
        session.prepare()
        with session.partial_files(write_outputs):
            fill_store(args, session.store)
            session.work(answer_question, key="key", unit="question", kept="answers")
        stats = write_outputs(session.store, session.folder, session.settings, args.limit)
    print(
        f"{args.output_dir}: {stats['kept']} of {stats['questions']} questions answered; the others are in {REJECTED}."
    )
    if not stats["kept"]:
        raise UsageError(f"no answer could be used: see {args.output_dir}/rejected.jsonl for the reasons.")
