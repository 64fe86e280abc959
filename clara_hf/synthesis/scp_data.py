"""From documents to SCP data: which passages there are, and what is written of each into the output files."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clara_hf.synthesis.checks import PassageChecks
from clara_hf.synthesis.documents import Columns, Document, corpus_files, read_dataset, read_files
from clara_hf.synthesis.errors import UsageError
from clara_hf.synthesis.leaks import LeakIndex
from clara_hf.synthesis.passages import PassageMaker, estimated_starts, tokenizer_file, tokenizer_starts
from clara_hf.synthesis.rounds import RoundLimits, synthesize_passage
from clara_hf.synthesis.runner import Work
from clara_hf.synthesis.settings import TeacherArguments, files_identity, path_identity
from clara_hf.synthesis.store import RunStore
from clara_hf.synthesis.text import clean_line


# Documents per transaction while they are cut.
DOCUMENT_BATCH = 500
EXCERPT = 200


@dataclass
class SynthesisArguments(TeacherArguments):
    """Documents, passages, rounds and checks of SCP data synthesis."""

    corpus: list[str] = field(default_factory=list, metadata={"help": "JSONL, Parquet or text files, or folders."})
    dataset: str | None = field(default=None, metadata={"help": "Instead: a data set of the Hub, or one on disk."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    dataset_split: str = field(default="train", metadata={"help": "Its split."})
    text_column: str = field(default="text", metadata={"help": "Column or key of the text."})
    title_column: str = field(default="title", metadata={"help": "Of the title, which is put in front of passages."})
    id_column: str = field(default="id", metadata={"help": "Of the document's id, if it has one."})
    language: str = field(default="en", metadata={"help": "Of the documents, for cutting sentences: en, de, zh, …"})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Counts tokens: folder or Hub name of the base model. Default: an estimate."}
    )
    passage_tokens: int = field(default=256, metadata={"help": "Budget of a passage: the model's doc_max_length."})
    min_passage_tokens: int = field(default=16, metadata={"help": "Shorter passages are set aside."})
    max_rounds: int = field(default=10, metadata={"help": "Supplementary rounds for facts that no pair covers."})
    paraphrase_attempts: int = field(default=3, metadata={"help": "Paraphrases to ask for until one is faithful."})
    keep_uncovered: bool = field(
        default=False, metadata={"help": "Use the pairs of passages that are not covered in the end."}
    )
    answer_overlap: float = field(
        default=0.7, metadata={"help": "Share of a simple answer's words that must be the passage's; 0: any."}
    )
    exclude: list[str] = field(default_factory=list, metadata={"help": "Files with texts that must not leak in."})
    exclude_ngram: int = field(default=13, metadata={"help": "Words in a row that count as a leak."})
    push_to_hub: str | None = field(default=None, metadata={"help": "USER/NAME: upload the data, with a card."})
    public: bool = field(default=False, metadata={"help": "Make the uploaded data set public."})

    def __post_init__(self):
        super().__post_init__()
        if bool(self.corpus) == bool(self.dataset):
            raise UsageError("name the documents by --corpus or by --dataset, one of the two.")
        self.at_least(1, "passage_tokens", "min_passage_tokens", "paraphrase_attempts", "exclude_ngram")
        self.at_least(0, "max_rounds", "answer_overlap")
        if not re.fullmatch("[a-z]{2,3}(-[A-Za-z0-9]+)*", self.language):
            raise UsageError(f"--language must be an ISO 639 code such as en, de or zh, but is {self.language!r}.")
        if self.push_to_hub:
            from clara_hf.synthesis.publish import check_name

            check_name(self.push_to_hub)
        if self.min_passage_tokens > self.passage_tokens:
            raise UsageError("--min_passage_tokens must not be more than --passage_tokens.")

    @property
    def columns(self) -> Columns:
        return Columns(self.text_column, self.title_column, self.id_column)

    def inputs(self) -> dict[str, Any]:
        """What the files are that the run depends on, whatever their paths."""
        return {
            "corpus": files_identity(corpus_files(self.corpus, self.out)) if self.corpus else None,
            "dataset": path_identity(self.dataset),
            "exclude": files_identity((Path(file), "") for file in self.exclude) if self.exclude else None,
            "tokenizer": path_identity(tokenizer_file(self.tokenizer) if self.tokenizer else None),
        }

    def documents(self) -> Iterator[Document]:
        if self.dataset:
            return read_dataset(self.dataset, self.dataset_config, self.dataset_split, self.columns)
        return read_files(corpus_files(self.corpus, self.out), self.columns)


def fill_store(args: SynthesisArguments, store: RunStore, leaks: LeakIndex) -> None:
    """Cut documents into passages until there are as many as `--limit` asks for; goes on where it stopped.

    Raises:
        UsageError: the documents cannot be read, or there is not one passage.
    """
    done, complete = store.meta("documents", 0), store.meta("complete", False)
    if complete or args.limit is not None and store.count(None) >= args.limit:
        return
    starts = tokenizer_starts(args.tokenizer) if args.tokenizer else estimated_starts
    maker = PassageMaker(starts, args.passage_tokens, args.min_passage_tokens, args.language, leaks)
    count, number, full = store.count(None), 0, False
    with tqdm(desc="Cutting documents", unit="document", initial=done, dynamic_ncols=True) as bar:
        for number, document in enumerate(args.documents(), start=1):
            if number <= done:
                continue
            count += store_passages(store, maker, document)
            bar.update()
            full = args.limit is not None and count >= args.limit
            if full or number % DOCUMENT_BATCH == 0:
                store.set_meta(documents=number)
                store.commit()
            if full:
                return
    if not count:
        raise UsageError(
            f"{', '.join(args.corpus) or args.dataset} holds no usable passage: {number} documents were read, and what "
            "they hold is shorter than --min_passage_tokens, no prose, or excluded."
        )
    store.set_meta(documents=number, complete=True)
    store.commit()


def store_passages(store: RunStore, maker: PassageMaker, document: Document) -> int:
    """Add a document's passages, in the open transaction; returns how many are new and usable."""
    added = 0
    # Two files may number their documents alike, and two folders hold files of one name.
    document = replace(document, id=store.unique_name(clean_line(document.id)))
    for passage, fault in maker.passages(document):
        if fault is None:
            if store.add_item(passage.text, asdict(passage)):
                added += 1
                continue
            fault = "duplicate passage"
        place = {"document": passage.document, "source": passage.source, "place": passage.place}
        kind = "document" if not passage.text else "passage"
        store.drop(
            {"type": kind, "reason": clean_line(fault), "id": passage.id, **place, "text": passage.text[:EXCERPT]}
        )
    return added


def passage_work(args: SynthesisArguments, leaks: LeakIndex) -> Work:
    """What is done with one passage."""
    limits = RoundLimits(args.max_rounds, args.paraphrase_attempts, args.keep_uncovered)

    async def work(item: dict[str, Any], conversation) -> tuple[dict[str, Any], int, int]:
        checks = PassageChecks(item["text"], conversation.teacher.prompts, leaks, args.answer_overlap)
        made = await synthesize_passage(item["text"], conversation, checks, limits)
        return made, len(made["pairs"]), len(made["rejected"])

    return work


def scp_rows(passage: dict[str, Any], made: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the release's schema: simple pairs, complex pairs, the paraphrase; each where there is one."""
    rows = []
    pairs = made.get("pairs", [])
    for simple in (True, False):
        chosen = [pair for pair in pairs if (pair["kind"] == "simple") == simple]
        if chosen:
            questions, answers = [pair["question"] for pair in chosen], [pair["answer"] for pair in chosen]
            rows.append({"data_type": "qa", "question": questions, "answers": answers})
    if made.get("paraphrase"):
        rows.append({"data_type": "paraphrase", "question": [], "answers": [made["paraphrase"]]})
    return [{**row, "docs": [passage["text"]], "passage_id": passage["id"]} for row in rows]


def rejected_rows(passage: dict[str, Any], made: dict[str, Any]) -> list[dict[str, Any]]:
    """What was set aside of one passage, with reasons."""
    if "failed" in made:
        return [{"passage_id": passage["id"], "type": "passage", "reason": "request failed", "detail": made["failed"]}]
    rows = [{"passage_id": passage["id"], **entry} for entry in made["rejected"]]
    if not made["verified"] or made["missing"]:
        reason = "passage not covered" if made["verified"] else "no verified pair"
        rows.append({"passage_id": passage["id"], "type": "passage", "reason": reason, "missing": made["missing"]})
    return rows


def passage_row(passage: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """Where a passage is from and how it went."""
    told = {name: passage[name] for name in ("id", "document", "source", "place", "start", "end")}
    if "failed" in made:
        return {**told, "status": "failed"}
    status = "covered" if made["covered"] else "not covered" if made["verified"] else "no verified pair"
    kinds = [pair["kind"] for pair in made["pairs"]]
    return {**told, "status": status, "rounds": made["rounds"], "kinds": kinds, "paraphrase": bool(made["paraphrase"])}
