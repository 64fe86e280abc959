"""A finished nano model at work, in a minute: compress, retrieve, answer, and what it scored on unseen documents.

    make quickstart
    python recipes/nano/quickstart/quickstart.py --question "Which animal does Zora Vinson keep?"

It needs torch, transformers and peft. Documents and questions are of the nano world's test split, whose names and
entities the model has never seen; the questions share no word with their documents but a name.
"""

import argparse
import json
import logging
import shutil
import textwrap
import time
from pathlib import Path


# PEFT imports bitsandbytes where it is installed, whose missing kernel means nothing here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from transformers import TextStreamer  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from modeling_clara import CLaRaForRetrievalGeneration  # noqa: E402


HERE = Path(__file__).resolve().parent
SHOWN_SYSTEMS = {
    "clara": "CLaRa after joint training",
    "clara-before-joint": "before joint training",
    "bm25": "BM25, same generator",
    "gold": "right documents' memories",
    "no-memory": "no memory",
    "wrong-memory": "another question's memory",
}
COLUMNS = {"F1": "f1", "Recall@1": "recall@1", "Recall@5": "recall@5"}


def answer(model: CLaRaForRetrievalGeneration, question: str, documents: list[str], memories) -> None:
    """Stream the answer to one question, then the documents that it was given from, a line each, with their scores."""
    width = shutil.get_terminal_size((120, 40)).columns - 9
    print(f"\nQ: {question}\nA: ", end="", flush=True)
    streamer = TextStreamer(model.processor.tokenizer, skip_special_tokens=True)
    given = model.generate(questions=[question], memories=memories, max_new_tokens=16, streamer=streamer)
    for score, place in zip(given.scores[0].tolist(), given.indices[0].tolist(), strict=True):
        print(f"   {score:.2f}  {textwrap.shorten(documents[place], width, placeholder=' …')}")


def table(results: dict) -> str:
    """The main figures of a results file, as aligned text."""
    (found,) = (results.get("datasets") or {"": results}).values()
    lines = [f"{'percent, 600 unseen questions':30}" + "".join(f"{title:>10}" for title in COLUMNS)]
    for name, title in SHOWN_SYSTEMS.items():
        row = found["systems"].get(name, {})
        cells = (f"{100 * row[metric]['value']:.1f}" if metric in row else "–" for metric in COLUMNS.values())
        lines.append(f"{title:30}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE.parent / "pretrained" / "joint"), help="a CLaRa checkpoint")
    parser.add_argument("--question", help="a question of your own about the documents, in place of the four shown")
    parser.add_argument("--documents", action="store_true", help="print all documents in full first")
    args = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    shown = json.loads((HERE / "quickstart.json").read_text(encoding="utf-8"))
    documents = shown["documents"]
    model = CLaRaForRetrievalGeneration.from_pretrained(args.model).eval()
    began = time.perf_counter()
    memories = model.compress(documents)
    seconds = time.perf_counter() - began
    size = sum(len(row) for row in model.processor.encode_documents(documents)) / len(documents)
    print(
        f"{len(documents)} documents compressed in {seconds:.1f} s: {memories.shape[1]} vectors each, "
        f"in place of {size:.0f} tokens on average."
    )
    if args.documents:
        print("\n".join(documents))
    for question in [args.question] if args.question else shown["questions"]:
        answer(model, question, documents, memories)
    results = Path(args.model, "results.json")
    if results.is_file():
        print("\n" + table(json.loads(results.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
