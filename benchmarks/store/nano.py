"""The nano model over stored memories: what each stored form, and each way to search, costs in F1 and recall.

    python benchmarks/store/nano.py CHECKPOINT --data test.jsonl --others joint_train.jsonl --output_file forms.json
    python benchmarks/store/nano.py CHECKPOINT --data test.jsonl --searches --output_file searches.json
    python benchmarks/store/nano.py CHECKPOINT --data test.jsonl --candidates --forms none fitted1 \\
        --against OTHER --against_form rotated4 --output_file rates.json

All are compared with memories as they are, in bfloat16, on the same questions. The first searches all documents, or,
with `--candidates`, each question's own; the second compares exact search, the index, BM25 and both of them. The third
compares with what another checkpoint, of another compression rate for instance, stores in a form of its own.
"""

import json
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import numpy as np

from clara_hf.evaluation.statistics import bootstrap_interval
from clara_hf.memory_store import MemoryStore
from clara_hf.memory_store.encoding import FORMS
from clara_hf.program import option, parse, run_program, write_json


@dataclass
class NanoArguments:
    """What is compared."""

    checkpoint: str = option(help="A joint checkpoint.", positional=True)
    data: list[str] = option(help="Test questions, of one file or several.")
    output_file: str = option(help="JSON file for the figures.", aliases="--out")
    others: str | None = option(None, "Questions whose documents are in the store too, to be fitted to.")
    other_documents: int = 3000
    questions: int | None = option(None, "Only the first so many.")
    forms: list[str] = option(help="The first is `none`.", default_factory=lambda: list(FORMS))
    candidates: bool = option(False, "Search each question's own candidates.")
    searches: bool = option(False, "Compare searches, not forms.")
    against: str | None = option(None, "Another checkpoint, which all forms are compared with in place of `none`.")
    against_form: str = option("none", "The form that its memories are stored in.", choices=FORMS)


def compare_forms(args: NanoArguments, folder: Path) -> dict:
    """F1 and Recall@5 of a trained model by the form that memories are stored in."""
    wanted = [(args.checkpoint, form) for form in args.forms]
    if args.against is not None:
        wanted.insert(0, (args.against, args.against_form))
    plain, scores, figures = {}, {}, {}
    for checkpoint, form in wanted:
        if checkpoint not in plain:
            plain[checkpoint] = nano_store(replace(args, checkpoint=checkpoint), folder / str(len(plain)))
        store, examples, corpus = plain[checkpoint]
        if form != "none":
            copied = shutil.copytree(store.path, folder / f"{len(plain)}-{form}")
            store = MemoryStore.open(copied, store.model)
            if form.startswith("fitted"):
                store.fit(form=form, show_progress=False)
            else:
                store.recode(form)
        name = f"{checkpoint} {form}" if checkpoint == args.against else form
        if args.candidates:
            scores[name] = answered(store, examples)
        else:
            found = store.search([example.question for example in examples], top_k=5, exact=True)
            scores[name] = scored(store, examples, found.texts, found.keys)
        scores[name]["bytes"] = store.stats()["bytes_per_memory"]
        figures = {"documents": len(corpus), "questions": len(examples), "forms": summary(scores, next(iter(scores)))}
        print(name, json.dumps(figures["forms"][name]), flush=True)
    return figures


def compare_searches(args: NanoArguments, folder: Path) -> dict:
    """F1 and Recall@5 of a trained model over the whole corpus, searched exactly, by the index, and by BM25."""
    from clara_hf.data.retrievers import BM25Retriever

    store, examples, corpus = nano_store(args, folder / "none")
    questions = [example.question for example in examples]
    keys = dict(zip(corpus, store.add(corpus, show_progress=False), strict=True))
    share = store.fit(show_progress=False)["share_of_exact_top_5"]
    bm25 = BM25Retriever(corpus)
    store.index_texts()
    ways = {
        "exact": lambda: store.search(questions, top_k=5, exact=True).texts,
        "indexed": lambda: store.search(questions, top_k=5).texts,
        "hybrid": lambda: store.search(questions, top_k=5, hybrid=True).texts,
        "bm25": lambda: [[corpus[row] for row in rows] for rows in bm25.search(questions, 5)],
    }
    scores = {}
    for name, search in ways.items():
        began = time.process_time()
        texts = search()
        milliseconds = 1e3 * (time.process_time() - began) / len(questions)
        found = scored(store, examples, texts, [[keys[text] for text in some] for some in texts])
        scores[name] = found | {"cpu_ms": milliseconds}
    rows = summary(scores, "exact")
    print(json.dumps(rows, indent=1))
    return {"documents": len(corpus), "questions": len(examples), "share_of_exact_top_5": share, "searches": rows}


def nano_store(args: NanoArguments, folder: Path) -> tuple[MemoryStore, list, list[str]]:
    """A store of the test questions' documents and others, the questions that are asked, and its texts."""
    from clara_hf.data.schema import iter_examples, load_examples
    from modeling_clara import CLaRaForRetrievalGeneration

    model = CLaRaForRetrievalGeneration.from_pretrained(args.checkpoint).eval()
    examples = [example for data in args.data for example in load_examples(data)]
    others = (text for example in iter_examples(args.others) for text in example.docs) if args.others else ()
    own = dict.fromkeys(text for example in examples for text in example.docs)
    corpus = list(dict.fromkeys(chain(own, islice(dict.fromkeys(others), args.other_documents))))
    store = MemoryStore.open(folder, model, dtype="bfloat16")
    store.add(corpus, show_progress=False)
    return store, examples[: args.questions], corpus


def scored(store: MemoryStore, examples: list, texts: list[list[str]], keys: list[list[str]]) -> dict[str, list[float]]:
    """Recall and F1 of each question, answered from the memories of `keys`, whose documents are `texts`."""
    from clara_hf.metrics.answer_f1.answer_f1 import score_answer

    recall, f1 = [], []
    for start in range(0, len(examples), 32):
        part = slice(start, start + 32)
        questions, memories = (
            [example.question for example in examples[part]],
            store.get([some[: store.model.config.top_k] for some in keys[part]]),
        )
        answers = store.model.generate(questions, memories=memories, rerank=False, max_new_tokens=32).texts
        for example, answer, found in zip(examples[part], answers, texts[part], strict=True):
            gold = {example.docs[place] for place in example.pos_index}
            recall.append(len(gold & set(found)) / len(gold))
            f1.append(score_answer(answer, example.answers)["f1"])
    return {"recall": recall, "f1": f1}


def answered(store: MemoryStore, examples: list) -> dict[str, list[float]]:
    """Recall@5 and F1 of each question over its own candidates; as many answer it as the model was trained with."""
    from clara_hf.metrics.answer_f1.answer_f1 import score_answer

    recall, f1 = [], []
    for start in range(0, len(examples), 64):
        some = examples[start : start + 64]
        memories = store.get([store.keys(example.docs) for example in some])
        questions = [example.question for example in some]
        best = store.model.retrieve(questions, memories, n_docs=5).indices.tolist()
        answers = store.model.generate(questions, memories=memories, max_new_tokens=16).texts
        for example, answer, chosen in zip(some, answers, best, strict=True):
            recall.append(len(set(example.pos_index) & set(chosen)) / len(example.pos_index))
            f1.append(score_answer(answer, example.answers)["f1"])
    return {"recall": recall, "f1": f1}


def summary(scores: dict, base: str) -> dict:
    """Means, and paired differences to `base`, in points, with 95% bootstrap intervals."""
    rows = {}
    for name, found in scores.items():
        row = {key: value for key, value in found.items() if key not in ("f1", "recall")}
        for metric in ("f1", "recall"):
            values = np.array(
                [
                    [100 * one, 100 * (one - other)]
                    for one, other in zip(found[metric], scores[base][metric], strict=True)
                ]
            )
            (mean, gap), (low, high) = values.mean(axis=0), bootstrap_interval(values, seed=0)
            row[metric], row[f"{metric}_interval"] = mean, [low[0], high[0]]
            row[f"{metric}_difference"] = [gap, low[1], high[1]]
        rows[name] = row
    return rows


def main(arguments: list[str] | None = None) -> None:
    args = parse(NanoArguments, arguments, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        figures = (compare_searches if args.searches else compare_forms)(args, Path(folder))
    write_json(args.output_file, figures)


if __name__ == "__main__":
    run_program(main)
