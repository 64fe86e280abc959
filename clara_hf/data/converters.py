"""Published data sets' rows, brought into the schema of `eval/data.py`; `eval/convert.py` is the program.

| format | fields read | gives |
|---|---|---|
| `hotpotqa` | `_id`, `question`, `answer`, `context`, `supporting_facts`, `type`, `level` | 10 candidates |
| `2wikimultihopqa` | as HotpotQA; `answer_id` with `--aliases id_aliases.json` | 10 candidates |
| `musique` | `id`, `question`, `answer`, `answer_aliases`, `paragraphs`, `answerable` | 20 candidates |
| `nq-open` | `question`, `answer`; or `answers` and `ctxs` as in lost-in-the-middle | questions; or candidates |
| `kilt` | `id`, `input`, `output` (`answer`, `provenance`: `wikipedia_id`) | questions, `positives` are page ids |
| `release` | `question`, `docs` or `context` or `content`, an answer, `pos_index`, `data_type` | candidates; SCP rows |

The release's answer is `answer`, `answers`, `golden_answers` or `gold_answer`, the first of these that is there.

HotpotQA's form on the Hub is taken, too. Questions without candidates are input for `eval/candidates.py`.
"""

import html
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from clara_hf.data.files import DataError, shown
from clara_hf.data.schema import check_text, check_texts, parse_example
from clara_hf.data.sources import read_rows, unit_of


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


def read_aliases(path: str) -> dict[str, list[str]]:
    """2WikiMultihopQA's `id_aliases.json`, one object per line: `Q_id`, `aliases`, `demonyms`.

    Raises:
        DataError: a row breaks this form.
    """
    aliases = {}
    for number, row in read_rows(path):
        names = [*(row.get("aliases") or []), *(row.get("demonyms") or [])]
        if not isinstance(row.get("Q_id"), str) or any(not isinstance(name, str) for name in names):
            raise DataError(f"{path}, {unit_of(path)} {number}: 'Q_id', 'aliases' and 'demonyms' are expected.")
        aliases[row["Q_id"]] = [name for name in names if name.strip()]
    return aliases


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
    contexts = _listed("ctxs", row.get("ctxs") or [], dict)
    for position, context in enumerate(contexts):
        check_text(f"ctxs[{position}].text", context.get("text"))
        if context.get("title"):
            check_text(f"ctxs[{position}].title", context["title"])
    docs = [_document(context.get("title") or "", context["text"]) for context in contexts]
    gold = [position for position, context in enumerate(contexts) if context.get("isgold")]
    return {**example, **(_pool(docs, gold) if docs else {})}


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
    answers = _first(row, "answer", "answers", "golden_answers", "gold_answer")
    answers = [answers] if isinstance(answers, str) else answers
    kind = row.get("data_type")
    if kind == "paraphrase" or (kind == "qa" and isinstance(row.get("question"), list)):
        questions = [] if kind == "paraphrase" else row["question"]
        return {"data_type": kind, "question": questions, "answers": answers, "docs": docs}
    example = {"question": _needed(row, "question"), "answers": answers, "docs": docs}
    example.update({name: row[name] for name in ("id", "pos_index", "type") if row.get(name) not in (None, [])})
    gold = parse_example(example, default_id="1").pos_index
    pool = _pool(docs, gold or [])
    return {**example, "docs": pool["docs"], **({"pos_index": pool["pos_index"]} if gold else {})}


CONVERTERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "hotpotqa": hotpotqa,
    "2wikimultihopqa": two_wiki,
    "musique": musique,
    "nq-open": nq_open,
    "kilt": kilt,
    "release": release,
}


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


def _pairs(row, name, columns):
    value = _needed(row, name)
    if isinstance(value, dict):
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
