"""Published data sets' rows, brought into the schema of `clara_hf.data.schema`; `clara_hf.data.convert` is the program.

| format | fields read | gives |
|---|---|---|
| `hotpotqa` | `_id`, `question`, `answer`, `context`, `supporting_facts`, `type`, `level` | 10 candidates |
| `2wikimultihopqa` | as HotpotQA; `answer_id` with `--aliases id_aliases.json` | 10 candidates |
| `musique` | `id`, `question`, `answer`, `answer_aliases`, `paragraphs`, `answerable` | 20 candidates |
| `nq-open` | `question`, `answer`; or `answers` and `ctxs` as in lost-in-the-middle | questions; or candidates |
| `dpr` | `question`, `answers`, `positive_ctxs`, `hard_negative_ctxs`, `negative_ctxs` | candidates |
| `squad` | v1, v2: `data`, `paragraphs`; on the Hub `context`, `question`, `answers` | questions with their passage |
| `triviaqa` | `Data`; on the Hub `question`, `answer`, `entity_pages`, `search_results` | questions; or candidates |
| `flashrag` | `id`, `question`, `golden_answers`, `metadata` with the original's `context` | questions; or candidates |
| `beir` | `queries.jsonl`: `_id`, `text`; with `--qrels qrels/SPLIT.tsv` | questions, `positives` are passage ids |
| `kilt` | `id`, `input`, `output` (`answer`, `provenance`: `wikipedia_id`) | questions, `positives` are page ids |
| `release` | `question`, `docs` or `context` or `content`, answers, `pos_index`, `data_type` | candidates; SCP rows |
| `questions` | the schema itself | the same |

Of the release's rows, `golden_answers` or `gold_answer` are the accepted answers, and a generated `answer` beside them
is kept as `target`. HotpotQA's and 2WikiMultihopQA's forms on the Hub, with columns or JSON in place of pairs, are
taken, too. Questions without candidates, or with one, are input for pools.
"""

import html
import json
import random
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from clara_hf.data.files import shown
from clara_hf.data.schema import check_text, check_texts, parse_example


KINDS = {dict: "objects", str: "strings", object: "values"}


class LeftOut(Exception):
    """A sound row that has no place in an evaluation of retrieval; the message is the reason."""


def hotpotqa(row: dict[str, Any]) -> dict[str, Any]:
    """A question of HotpotQA or 2WikiMultihopQA: `context` is `[[title, sentences], ...]`, gold are the paragraphs that
    `supporting_facts`, `[[title, sentence number], ...]`, name. The Hub's form has columns in place of pairs.
    """
    titles, docs = [], []
    for title, sentences in _pairs(row, "context", ("title", "sentences")):
        check_text("context title", title)
        titles.append(title)
        docs.append(_document(title, " ".join(_listed("context sentences", sentences, str))))
    named = set()
    for title, _ in _pairs(row, "supporting_facts", ("title", "sent_id")):
        check_text("supporting_facts title", title)
        named.add(title)
    if not named <= set(titles):
        raise LeftOut("a supporting paragraph is not in the context")
    return {
        "id": _first(row, "_id", "id"),
        "question": _needed(row, "question"),
        "answers": [_needed(row, "answer")],
        **_pool(docs, [position for position, title in enumerate(titles) if title in named]),
        **{name: row[name] for name in ("type", "level") if row.get(name)},
    }


def two_wiki(row: dict[str, Any], aliases: Mapping[str, list[str]] = MappingProxyType({})) -> dict[str, Any]:
    """As HotpotQA; the other names of the answer's entity (`answer_id`) are accepted, too."""
    example = hotpotqa(row)
    others = aliases.get(str(row.get("answer_id")), [])
    return {**example, "answers": list(dict.fromkeys([*example["answers"], *others]))}


def musique(row: dict[str, Any]) -> dict[str, Any]:
    """A question of MuSiQue; its kind is what its id begins with (`2hop`, `3hop1`, ...)."""
    if row.get("answerable") is False:
        raise LeftOut("the question is not answerable")
    docs, gold = [], []
    paragraphs = _listed("paragraphs", _needed(row, "paragraphs"), dict)
    for position, paragraph in enumerate(paragraphs):
        for name in ("title", "paragraph_text"):
            check_text(f"paragraphs[{position}].{name}", paragraph.get(name))
        docs.append(_document(paragraph["title"], paragraph["paragraph_text"]))
        if paragraph.get("is_supporting"):
            gold.append(position)
    name, answer = str(_needed(row, "id")), _needed(row, "answer")
    check_text("answer", answer)
    return {
        "id": name,
        "question": _needed(row, "question"),
        "answers": list(dict.fromkeys([answer, *_listed("answer_aliases", row.get("answer_aliases") or [], str)])),
        **_pool(docs, gold),
        **({"type": name.split("__")[0]} if "__" in name else {}),
    }


def nq_open(row: dict[str, Any]) -> dict[str, Any]:
    """A question of NQ-Open; or one of lost-in-the-middle, whose `ctxs` are candidates, gold where `isgold`."""
    example = {"question": _needed(row, "question"), "answers": _first(row, "answer", "answers")}
    # Under its own name in messages.
    check_texts("answer" if row.get("answer") is not None else "answers", example["answers"])
    if row.get("id") is not None:
        example["id"] = row["id"]
    docs = _contexts(row, "ctxs")
    gold = [position for position, context in enumerate(row.get("ctxs") or []) if context.get("isgold")]
    return {**example, **(_pool(docs, gold) if docs else {})}


def dpr(row: dict[str, Any]) -> dict[str, Any]:
    """A question of DPR's training data: gold are the `positive_ctxs`; all in an order drawn by the question."""
    positives, others = _contexts(row, "positive_ctxs"), _contexts(row, "hard_negative_ctxs", "negative_ctxs")
    if not positives:
        raise LeftOut("the question has no positive passage")
    example = {"question": _needed(row, "question"), "answers": _needed(row, "answers")}
    pool = _pool([*positives, *others], range(len(positives)))
    order = list(range(len(pool["docs"])))
    random.Random(str(example["question"])).shuffle(order)
    gold = [place for place, position in enumerate(order) if position in pool["pos_index"]]
    return {**example, "docs": [pool["docs"][position] for position in order], "pos_index": gold}


def squad(row: dict[str, Any]) -> dict[str, Any]:
    """A question of SQuAD as on the Hub, with its passage; of a file in SQuAD's own form, see [`unfolded`]."""
    given = _needed(row, "answers")
    texts = given.get("text") if isinstance(given, dict) else given
    texts = [item.get("text") for item in texts] if isinstance(texts, list) and _are(texts, dict) else texts
    if row.get("is_impossible") or texts == []:
        raise LeftOut("the passage does not answer the question")
    check_text("context", row.get("context"))
    if row.get("title"):
        check_text("title", row["title"])
    return {
        **({"id": row["id"]} if row.get("id") is not None else {}),
        "question": _needed(row, "question"),
        "answers": list(dict.fromkeys(_listed("answers", texts, str))),
        "docs": [_document((row.get("title") or "").replace("_", " "), row["context"])],
        "pos_index": [0],
    }


def triviaqa(row: dict[str, Any]) -> dict[str, Any]:
    """A question of TriviaQA, whose gold passages are not known; those with texts (on the Hub) are candidates."""
    answer = _needed(row, "answer")
    if not isinstance(answer, dict):
        raise ValueError(f"'answer' must be an object, but is {shown(answer)}.")
    value = _first(answer, "value", "Value")
    check_text("answer value", value)
    aliases = _listed("aliases", next((answer[name] for name in ("aliases", "Aliases") if answer.get(name)), []), str)
    docs = []
    for name, column in (("entity_pages", "wiki_context"), ("search_results", "search_context")):
        found = row.get(name) or {}
        texts = _listed(column, found.get(column) or [], str) if isinstance(found, dict) else []
        titles = _listed("title", found.get("title") or [""] * len(texts), str) if texts else []
        docs += [_document(title, text) for title, text in zip(titles, texts, strict=False) if text.strip()]
    return {
        **({"id": row["question_id"]} if row.get("question_id") is not None else {}),
        "question": _needed(row, "question"),
        "answers": [value, *(alias for alias in dict.fromkeys(aliases) if alias != value and alias.strip())],
        **(_pool(docs, []) if docs else {}),
    }


def flashrag(row: dict[str, Any]) -> dict[str, Any]:
    """A question of FlashRAG's collection, with candidates where its `metadata` hold the original's paragraphs."""
    example = {"question": _needed(row, "question"), "answers": _needed(row, "golden_answers")}
    check_texts("golden_answers", example["answers"])
    if row.get("id") is not None:
        example["id"] = row["id"]
    rest = row.get("metadata") or {}
    filled = {"_id": "", "id": "", "answer": "-", "question": example["question"]}
    if isinstance(rest, dict) and rest.get("paragraphs"):
        found = musique({**rest, **filled})
    elif isinstance(rest, dict) and rest.get("context") and rest.get("supporting_facts"):
        found = hotpotqa({**rest, **filled})
    else:
        return example
    return {**example, **{name: found[name] for name in ("docs", "pos_index", "type", "level") if name in found}}


def beir(row: dict[str, Any], qrels: Mapping[str, list[str]] = MappingProxyType({})) -> dict[str, Any]:
    """A query of BEIR; most of its sets have no answers: only retrieval can be trained on them."""
    name = str(_needed(row, "_id"))
    if name not in qrels:
        raise LeftOut("the qrels name no relevant passage")
    rest = row.get("metadata")
    rest = rest if isinstance(rest, dict) else {}
    answers = rest.get("answer") or rest.get("answers") or []
    return {
        "id": name,
        "question": _needed(row, "text"),
        "answers": [answers] if isinstance(answers, str) else answers,
        "positives": list(qrels[name]),
    }


def kilt(row: dict[str, Any]) -> dict[str, Any]:
    """A question of a KILT task; its positives are the Wikipedia pages that its provenances name."""
    output = _listed("output", _needed(row, "output"), dict)
    pages = [page for given in output for page in _listed("provenance", given.get("provenance") or [], dict)]
    if any(type(page.get("wikipedia_id")) not in (str, int) for page in pages):
        raise ValueError("every provenance in 'output' needs a 'wikipedia_id'.")
    answers = _listed("answer", [given["answer"] for given in output if given.get("answer")], str)
    return {
        "id": _needed(row, "id"),
        "question": _needed(row, "input"),
        "answers": list(dict.fromkeys(answers)),
        "positives": list(dict.fromkeys(str(page["wikipedia_id"]) for page in pages)),
    }


def release(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the paper's release; of its first stage if it is a paraphrase, or a list of questions of type `qa`."""
    docs = next((row[name] for name in ("docs", "context", "content") if isinstance(row.get(name), list)), None)
    if docs is None:
        raise ValueError("one of 'docs', 'context' and 'content' must be a list of strings.")
    answers, generated = _first(row, "golden_answers", "gold_answer", "answers", "answer"), row.get("answer")
    answers = [answers] if isinstance(answers, str) else answers
    kind = row.get("data_type")
    if kind == "paraphrase" or (kind == "qa" and isinstance(row.get("question"), list)):
        given = _first(row, "answers", "answer", "golden_answers", "gold_answer")
        questions = [] if kind == "paraphrase" else row["question"]
        given = [given] if isinstance(given, str) else given
        return {"data_type": kind, "question": questions, "answers": given, "docs": docs}
    example = {"question": _needed(row, "question"), "answers": answers, "docs": docs}
    if generated is not None and any(
        row.get(name) is not None for name in ("golden_answers", "gold_answer", "answers")
    ):
        example["target"] = generated[0] if isinstance(generated, list) and generated else generated
    example.update({name: row[name] for name in ("id", "pos_index", "type") if row.get(name) not in (None, [])})
    gold = parse_example(example, default_id="1").pos_index
    pool = _pool(docs, gold or [])
    return {**example, "docs": pool["docs"], **({"pos_index": pool["pos_index"]} if gold else {})}


def questions(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the schema as it is."""
    return row


CONVERTERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "hotpotqa": hotpotqa,
    "2wikimultihopqa": two_wiki,
    "musique": musique,
    "nq-open": nq_open,
    "dpr": dpr,
    "squad": squad,
    "triviaqa": triviaqa,
    "flashrag": flashrag,
    "beir": beir,
    "kilt": kilt,
    "release": release,
    "questions": questions,
}

# Fields that carry answers, passages, or which are gold, and the formats that read them. A row that has one which its
# converter does not read is of another format, and would lose it without a word.
READERS = {
    "positive_ctxs": ("dpr",),
    "hard_negative_ctxs": ("dpr",),
    "negative_ctxs": ("dpr",),
    "positive_passages": (),
    "negative_passages": (),
    "ctxs": ("nq-open",),
    "context": ("hotpotqa", "2wikimultihopqa", "squad", "release"),
    "contexts": (),
    "content": ("release",),
    "passages": (),
    "documents": (),
    "supporting_facts": ("hotpotqa", "2wikimultihopqa"),
    "paragraphs": ("musique", "squad"),
    "question_decomposition": ("musique",),
    "data": ("squad",),
    "Data": ("triviaqa",),
    "entity_pages": ("triviaqa",),
    "search_results": ("triviaqa",),
    "golden_answers": ("release", "flashrag"),
    "gold_answer": ("release",),
    "output": ("kilt",),
    "docs": ("release", "questions"),
    "pos_index": ("release", "questions"),
    "positives": ("questions",),
    "annotations": (),
}


def check_format(name: str, row: Mapping[str, Any]) -> None:
    """Whether the row can be one of this format.

    Raises:
        ValueError: it has a field of another; the message names field and format.
    """
    telling = [key for key in READERS if row.get(key) not in (None, [], {}, "")]
    for key in telling:
        if name not in READERS[key]:
            fitting = [other for other in CONVERTERS if all(other in READERS[own] for own in telling)]
            fitting = fitting or [other for other in READERS[key]]
            advice = f"use --format {' or '.join(fitting)}" if fitting else "no format reads it"
            raise ValueError(
                f"--format {name} does not read the field {key!r}, which holds {shown(row[key])}: {advice}."
            )


def unfolded(name: str, row: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The questions of a row, each with its place in it: files of SQuAD and TriviaQA are one object as distributed.

    Raises:
        ValueError: a level is not of the form's kind.
    """
    if name == "triviaqa" and "Data" in row:
        for number, item in enumerate(_listed("Data", row["Data"], dict)):
            renamed = {"question": "Question", "question_id": "QuestionId", "answer": "Answer"}
            yield f", Data[{number}]", {new: item[old] for new, old in renamed.items() if old in item}
    elif name == "squad" and ("data" in row or "paragraphs" in row):
        nested = "data" in row
        for number, article in enumerate(_listed("data", row["data"], dict) if nested else [row]):
            for count, paragraph in enumerate(_listed("paragraphs", article.get("paragraphs"), dict)):
                for last, question in enumerate(_listed("qas", paragraph.get("qas"), dict)):
                    place = f"{f', data[{number}]' if nested else ', '}.paragraphs[{count}].qas[{last}]"
                    yield place, {**question, "title": article.get("title"), "context": paragraph.get("context")}
    else:
        yield "", row


def _needed(row, name):
    if row.get(name) is None:
        raise ValueError(f"the field {name!r} is missing.")
    return row[name]


def _first(row, *names):
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"the field {' or '.join(map(repr, names))} is missing.")


def _listed(name, value, kind):
    if not isinstance(value, list) or any(not isinstance(item, kind) for item in value):
        raise ValueError(f"{name!r} must be a list of {KINDS[kind]}, but is {shown(value)}.")
    return value


def _are(items, kind):
    return all(isinstance(item, kind) for item in items)


def _contexts(row, *names):
    """Passages of the fields `names`, lists of objects with `text` and perhaps `title`."""
    docs = []
    for name in names:
        for position, context in enumerate(_listed(name, row.get(name) or [], dict)):
            check_text(f"{name}[{position}].text", context.get("text"))
            if context.get("title"):
                check_text(f"{name}[{position}].title", context["title"])
            docs.append(_document(context.get("title") or "", context["text"]))
    return docs


def _pairs(row, name, columns):
    value = _needed(row, name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (RecursionError, ValueError) as error:
            raise ValueError(f"{name!r} is no list, nor JSON text of one, but {shown(value)}.") from error
    if isinstance(value, dict):
        if "content" in value:  # FlashRAG's name
            value = {"sentences": value["content"], **value}
        lists = [_listed(f"{name}.{column}", value.get(column), object) for column in columns]
        if len(set(map(len, lists))) > 1:
            raise ValueError(f"the lists {' and '.join(columns)} in {name!r} differ in length.")
        value = list(zip(*lists, strict=True))
    if not isinstance(value, list) or any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in value):
        raise ValueError(f"{name!r} must be a list of pairs ({', '.join(columns)}), but is {shown(value)}.")
    return value


def _document(title, text):
    title, text = (" ".join(html.unescape(part).split()) for part in (title, text))
    return "\n".join(filter(None, [title, text]))


def _pool(docs, gold):
    """Candidates without repeated passages; gold if any copy is."""
    marked: dict[str, bool] = {}
    for position, document in enumerate(docs):
        marked[document] = marked.get(document, False) or position in gold
    return {"docs": list(marked), "pos_index": [index for index, is_gold in enumerate(marked.values()) if is_gold]}
