"""`clara ask`: ask your own files in the terminal."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from clara_hf.program import UsageError, option, parse
from clara_hf.program.models import ModelSource, load_trained
from clara_hf.program.values import Text, convert
from clara_hf.serving.decoding import TextStream
from clara_hf.serving.documents import Skipped, SourceFile, Unreadable, find_files, read_file
from clara_hf.serving.library import CHUNK, FileEntry, Hit, Library
from modeling_clara import CLaRaForRetrievalGeneration


MODEL = "model"


@dataclass
class AskArguments:
    """What is asked, and how."""

    paths: list[str] = option(help="Text, Markdown, HTML and PDF files, and folders of them.", positional=True)
    model: ModelSource | None = option(
        None, "Checkpoint: a folder, or a name on the Hub; once the collection is built, it is known."
    )
    store: str | None = option(None, "Folder of the collection (default: beside the first path, its name with .clara).")
    n_docs: int | None = option(None, "Passages that an answer is made from (default: the model's).")
    max_tokens: int = option(64, "Maximum number of tokens per answer.")
    once: str | None = option(None, "Answer this question and end.")
    json: bool = option(False, "With --once: one JSON object on stdout.")

    def __post_init__(self):
        if self.json and self.once is None:
            raise UsageError("--json is for --once QUESTION: give both")


def main(arguments: list[str] | None = None) -> None:
    """Runs `clara ask`.

    Raises:
        UsageError, OSError, ValueError: a path, model or store is not what it must be.
    """
    options = parse(AskArguments, arguments, description=__doc__)
    first = Path(options.paths[0])
    store = Path(options.store) if options.store else first.resolve().with_name(first.resolve().name + ".clara")
    files, skipped = find_files(options.paths, leave_out=store)
    library = open_library(store, options.model)
    try:
        skipped += take_in(library, files, show_progress=sys.stderr.isatty())
        tell_skipped(skipped)
        if len(library) == 0:
            raise UsageError(f"nothing in {' '.join(options.paths)} can be asked: all of it was skipped")
        if options.once is not None:
            answer_once(library, options.once, options, skipped)
        else:
            converse(library, options)
    finally:
        library.close()


def open_library(store: Path, model: ModelSource | None) -> Library:
    """The collection at `store` with its model, whose name it remembers.

    Raises:
        UsageError: no model is named, and none is remembered.
    """
    if model is None:
        name = Library.remembered(store, MODEL)
        if name is None:
            raise UsageError(f"--model is needed to build {store}: give a checkpoint's folder, or its name on the Hub")
        model = convert(Text(name), ModelSource, f"the model of {store}")
    if Path(model.model_name_or_path).exists():
        model.model_name_or_path = str(Path(model.model_name_or_path).resolve())
    library = Library.open(store, load_trained(model))
    setting = model.setting
    library.remember(MODEL, setting if isinstance(setting, str) else json.dumps(setting))
    return library


def take_in(library: Library, files: list[SourceFile], show_progress: bool) -> list[Skipped]:
    """Brings the collection up to the files on disk: new and changed ones are read, those that are gone are removed.

    Returns:
        What cannot be taken in.
    """
    known = {file.name: file for file in library.files() if file.changed is not None}
    for name in known.keys() - {file.name for file in files}:
        library.remove(known[name].id)
    skipped: list[Skipped] = []
    waiting: list[FileEntry] = []
    with tqdm(total=sum(file.bytes for file in files), unit="B", unit_scale=True, disable=not show_progress) as bar:
        for file in files:
            old = known.get(file.name)
            bar.set_description(file.name[-40:])
            if old is None or (old.bytes, old.changed) != (file.bytes, file.changed):
                try:
                    rows, unusable = library.split(read_file(file))
                    skipped += [Skipped(file.name, reason) for reason in unusable]
                    if not rows:
                        raise Unreadable("no passage of it can be used")
                    waiting.append(
                        FileEntry(file.name, rows, file.bytes, file.changed, replaces=old.id if old else None)
                    )
                except Unreadable as error:
                    skipped.append(Skipped(file.name, str(error)))
                    if old:
                        library.remove(old.id)
            # Small files together: each step writes to the disk and waits for it.
            if sum(len(entry.rows) for entry in waiting) >= CHUNK:
                library.add(waiting)
                waiting = []
            bar.update(file.bytes)
        library.add(waiting)
    return skipped


def tell_skipped(skipped: list[Skipped]) -> None:
    if skipped:
        print(f"Skipped {len(skipped)}:", file=sys.stderr)
        for one in skipped:
            print(f"  {one.name}: {one.reason}", file=sys.stderr)


class Terminal:
    """Prints an answer's tokens as `generate` makes them; a transformers streamer."""

    def __init__(self, model: CLaRaForRetrievalGeneration, out):
        tokenizer = model.processor.tokenizer
        self.ids: list[int] = []
        self.text = TextStream(lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
        self.out = out

    def put(self, value: torch.Tensor) -> None:
        self.ids += value.flatten().tolist()
        print(self.text.piece(self.ids), end="", file=self.out, flush=True)

    def end(self) -> None:
        print(self.text.piece(self.ids, last=True), file=self.out, flush=True)


def answer(library: Library, question: str, options: AskArguments, out=None) -> tuple[str, list[Hit]]:
    """The answer, printed to `out` as it is made, and the passages that it is made from.

    Raises:
        ValueError: the question is empty or holds a token that the model reserves.
    """
    model = library.model
    model.processor.check_user_texts([question], "questions")
    hits = library.search([question], options.n_docs or model.config.top_k)[0]
    memories = library.memories([hit.key for hit in hits])
    streamer = None if out is None else Terminal(model, out)
    made = model.generate(
        [question], memories=memories, rerank=False, max_new_tokens=options.max_tokens, streamer=streamer
    )
    return made.texts[0], hits


def answer_once(library: Library, question: str, options: AskArguments, skipped: list[Skipped]) -> None:
    text, hits = answer(library, question, options, None if options.json else sys.stdout)
    if options.json:
        found = {"question": question, "answer": text, "documents": [asdict(hit) for hit in hits]}
        print(json.dumps({**found, "skipped": [asdict(one) for one in skipped]}, ensure_ascii=False))
    else:
        tell_sources(hits)


def converse(library: Library, options: AskArguments) -> None:
    if sys.stdin.isatty():
        print(f"{len(library.files())} files, {len(library)} passages. Ask a question; an empty line ends.")
    for question in _questions():
        try:
            _, hits = answer(library, question, options, sys.stdout)
            tell_sources(hits)
        except ValueError as error:
            print(error, file=sys.stderr)


def _questions() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    try:
        while question := input("\n> ").strip():
            yield question
    except EOFError:
        pass


def tell_sources(hits: list[Hit]) -> None:
    for number, hit in enumerate(hits, start=1):
        place = ", ".join(filter(None, (hit.place, f"passage {hit.number}")))
        text = " ".join(hit.text.split())
        print(f"  [{number}] {hit.score:.3f}  {hit.filename} ({place}): {text[:90]}{'…' if len(text) > 90 else ''}")
