"""Make SCP data from your own documents with any language model: verified questions and paraphrases.

    python recipes/synthesize.py --corpus docs.jsonl --output_dir scp/ --model qwen3-32b --base_url http://host:8000/v1
    python recipes/synthesize.py --corpus docs/ --output_dir scp/ --backend cloze
    python recipes/synthesize.py --corpus docs/ --output_dir scp/ --model PATH --backend transformers

Interrupt it at any time; run the same command again to resume. See docs/synthesis.md.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clara_hf.data.documents import Columns, Document, corpus_files, read_dataset, read_files
from clara_hf.program import UsageError, option, parse
from clara_hf.synthesis.backends.cloze import cloze_passage
from clara_hf.synthesis.checks import PassageChecks
from clara_hf.synthesis.leaks import LeakIndex
from clara_hf.synthesis.outputs import OUTPUTS, Writing, as_written, check_name, push, write_outputs
from clara_hf.synthesis.passages import PassageMaker, estimated_starts, tokenizer_file, tokenizer_starts
from clara_hf.synthesis.rounds import RoundLimits, synthesize_passage
from clara_hf.synthesis.session import Session, TeacherArguments, files_identity, path_identity
from clara_hf.synthesis.store import RunStore
from clara_hf.synthesis.teacher import Work
from clara_hf.synthesis.text import clean_line


# Documents per transaction while they are cut.
DOCUMENT_BATCH = 500
EXCERPT = 200


@dataclass
class SynthesisArguments(TeacherArguments):
    """Documents, passages, rounds and checks of SCP data synthesis."""

    corpus: list[str] = option(help="JSONL, Parquet or text files, or folders.", default_factory=list)
    dataset: str | None = option(None, "In place of --corpus: a data set on the Hub or on disk.")
    dataset_config: str | None = option(None, "Configuration of the data set.")
    dataset_split: str = option("train", "Split of the data set.")
    text_column: str = option("text", "Column or key of the text.")
    title_column: str = option("title", "Column or key of the title, which is put in front of passages.")
    id_column: str = option("id", "Column or key of the document's id, if it has one.")
    language: str = option("en", "Language of the documents, for splitting sentences: en, de, zh, …")
    tokenizer: str | None = option(None, "Counts tokens: folder or Hub name of the base model. Default: an estimate.")
    passage_tokens: int = option(256, "Budget of a passage: the model's doc_max_length.")
    min_passage_tokens: int = option(16, "Shorter passages are set aside.")
    max_rounds: int = option(10, "Supplementary rounds for facts that no pair covers.")
    paraphrase_attempts: int = option(3, "Paraphrases to ask for until one is faithful.")
    keep_uncovered: bool = option(False, "Write also the verified pairs of passages that are not covered in the end.")
    reconstruct: bool = option(False, "Write also, for every passage, a row whose target is the passage itself.")
    validation_share: float = option(0.02, "Share of the documents that are written to scp_validation.jsonl.")
    answer_overlap: float = option(0.7, "Share of a simple answer's words that must be the passage's; 0: any.")
    exclude: list[str] = option(help="Files with texts that must not leak in.", default_factory=list)
    exclude_ngram: int = option(13, "Words in a row that count as a leak.")
    push_to_hub: str | None = option(None, "USER/NAME: upload the data, with a card.")
    public: bool = option(False, "Make the uploaded data set public.")

    def __post_init__(self):
        super().__post_init__()
        if bool(self.corpus) == bool(self.dataset):
            raise UsageError("name the documents by --corpus or by --dataset, one of the two.")
        self.at_least(1, "passage_tokens", "min_passage_tokens", "paraphrase_attempts", "exclude_ngram")
        self.at_least(0, "max_rounds", "answer_overlap")
        if not re.fullmatch("[a-z]{2,3}(-[A-Za-z0-9]+)*", self.language):
            raise UsageError(f"--language must be an ISO 639 code such as en, de or zh, but is {self.language!r}.")
        if not 0 <= self.validation_share < 1:
            raise UsageError(f"--validation_share must be at least 0 and less than 1, but is {self.validation_share}.")
        if self.push_to_hub:
            check_name(self.push_to_hub)
        if self.min_passage_tokens > self.passage_tokens:
            raise UsageError("--min_passage_tokens must not be more than --passage_tokens.")

    @property
    def columns(self) -> Columns:
        return Columns(self.text_column, self.title_column, self.id_column)

    def inputs(self) -> dict[str, Any]:
        """What the files are that the run depends on, whatever their paths."""
        return {
            "corpus": files_identity(corpus_files(self.corpus, self.output_dir)) if self.corpus else None,
            "dataset": path_identity(self.dataset),
            "exclude": files_identity((Path(file), "") for file in self.exclude) if self.exclude else None,
            "tokenizer": path_identity(tokenizer_file(self.tokenizer) if self.tokenizer else None),
        }

    def documents(self) -> Iterator[Document]:
        if self.dataset:
            return read_dataset(self.dataset, self.dataset_config, self.dataset_split, self.columns)
        return read_files(corpus_files(self.corpus, self.output_dir), self.columns)


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
    limits = RoundLimits(args.max_rounds, args.paraphrase_attempts)
    rules = args.backend == "cloze"

    async def work(item: dict[str, Any], conversation) -> tuple[dict[str, Any], int, int]:
        checks = PassageChecks(item["text"], conversation.teacher.prompts, leaks, args.answer_overlap)
        if rules:
            made = cloze_passage(item, checks, args.language, args.seed)
        else:
            made = await synthesize_passage(item["text"], conversation, checks, limits)
        shown = as_written(made, args.keep_uncovered)
        return made, len(shown["pairs"]), len(shown["rejected"])

    return work


def main(arguments: list[str] | None = None) -> None:
    args: SynthesisArguments = parse(SynthesisArguments, arguments, description=__doc__)
    leaks = LeakIndex(args.exclude, args.exclude_ngram)
    write = partial(write_outputs, writing=Writing(args.keep_uncovered, args.reconstruct, args.validation_share))
    with Session(args, args.inputs(), OUTPUTS) as session:
        session.prepare()
        with session.partial_files(write):
            fill_store(args, session.store, leaks)
            session.work(passage_work(args, leaks), key="text", unit="passage", kept="pairs")
        stats = write(session.store, session.folder, session.settings, args.limit)
    print(
        f"{args.output_dir}: {stats['pairs']} pairs and {stats['paraphrases']} paraphrases of {stats['passages']} "
        f"passages; {stats['rejected']} set aside, see rejected.jsonl and report.html."
    )
    if stats["pairs_left_out"]:
        print(
            f"{stats['pairs_left_out']} verified pairs are not among them, since their {stats['passages_left_out']} "
            "passages hold facts that no pair covers: the same command with --keep_uncovered true writes them, too."
        )
    if not stats["train_rows"] and not stats["validation_rows"]:
        raise UsageError(f"no pair and no paraphrase passed: see {args.output_dir}/rejected.jsonl for the reasons.")
    if args.push_to_hub:
        print(push(session.folder, args.push_to_hub, OUTPUTS, stats, private=not args.public))
