"""The files of a run, written beside in passage order and then put in place: data, what was set aside, report, card."""

import heapq
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from huggingface_hub import CommitOperationAdd, DatasetCard, DatasetCardData, HfApi, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id
from jinja2 import Environment, PackageLoader

from clara_hf.program import UsageError, write_json, write_text, written_beside
from clara_hf.synthesis.store import RunStore, digest_of


DATA, VALIDATION, REJECTED, PASSAGES = "scp.jsonl", "scp_validation.jsonl", "rejected.jsonl", "passages.jsonl"
REPORT, CARD, STATS = "report.html", "README.md", "stats.json"
OUTPUTS = (DATA, VALIDATION, REJECTED, PASSAGES, REPORT, CARD, STATS)
SPLITS = ("train", "validation")
SAMPLES = 12
SAMPLE_CHARS = 1200
CARD_TEXT = """{data}

# {name}

Data for salient compressor pretraining (SCP) of CLaRa ([arXiv 2511.18659](https://arxiv.org/abs/2511.18659)): questions
with answers, and paraphrases, of {passages} passages. Written and verified by a language model; nobody has read all of
it.

| | |
|---|---|
{rows}

Each line of `scp.jsonl`{validation} has `data_type` (`qa` or `paraphrase`), `question` and `answers` (lists of equal
length; a paraphrase has no question), `docs` (the passage) and `passage_id`. `passages.jsonl` says where each passage
is from, `rejected.jsonl` what was set aside and why, `stats.json` how everything was made, `report.html` shows samples.

```python
from datasets import load_dataset

data = load_dataset("{repository}", split="train")
```

Passages keep the licence of the documents that they are cut from.
"""


class Statistics:
    """Counts over a run, taken passage by passage."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.rounds: Counter[int] = Counter()
        self.pairs: Counter[int] = Counter()

    def add(self, made: dict[str, Any], rejected: list[dict[str, Any]]) -> None:
        self.counts["passages"] += 1
        self.reject(rejected)
        if "failed" in made:
            self.counts["failed"] += 1
            self.counts["requests"] += made["requests"]
            return
        self.counts["covered"] += made["covered"]
        self.counts["without_pairs"] += not made["verified"]
        self.counts["pairs"] += len(made["pairs"])
        self.counts["pairs_left_out"] += made["left_out"]
        self.counts["passages_left_out"] += bool(made["left_out"])
        self.counts["paraphrases"] += bool(made["paraphrase"])
        self.counts["requests"] += made["requests"]
        self.kinds.update(pair["kind"] for pair in made["pairs"])
        self.rounds[made["rounds"]] += 1
        self.pairs[len(made["pairs"])] += 1

    def reject(self, rows: list[dict[str, Any]]) -> None:
        self.counts["rejected"] += len(rows)
        self.reasons.update(f"{row['type']}: {row['reason']}" for row in rows)

    def values(self) -> dict[str, Any]:
        counts = self.counts
        judged = counts["passages"] - counts["failed"]
        asked = judged - counts["without_pairs"]
        names = ["passages", "failed", "without_pairs", "pairs", "paraphrases", "rejected", "requests"]
        names += ["pairs_left_out", "passages_left_out", "train_rows", "validation_rows"]
        return {
            **{name: counts[name] for name in names},
            # Of the passages with verified pairs.
            "coverage": counts["covered"] / asked if asked else 0.0,
            "pairs_per_passage": counts["pairs"] / judged if judged else 0.0,
            "kinds": _sorted(self.kinds),
            "rounds": {str(key): self.rounds[key] for key in sorted(self.rounds)},
            "passages_by_pairs": {str(key): self.pairs[key] for key in sorted(self.pairs)},
            "reject_reasons": _sorted(self.reasons),
        }


@dataclass(frozen=True)
class Writing:
    """What of a run's finished items is written, and where; another choice asks for nothing again.

    Attributes:
        keep_uncovered: use the pairs of passages that are not covered in the end; the paper leaves them out.
        reconstruct: write also, for every passage, a row whose target is the passage itself. By these rows a
            compressor learns to keep the words (ICAE's autoencoding task, arXiv 2307.06945); they need no model.
        validation_share: share of the documents whose rows are for validation.
    """

    keep_uncovered: bool = False
    reconstruct: bool = False
    validation_share: float = 0.0


def write_outputs(
    store: RunStore,
    folder: Path,
    settings: dict[str, Any],
    limit: int | None,
    partial: bool = False,
    writing: Writing | None = None,
) -> dict[str, Any]:
    """Write every file of the run from its finished items; returns the statistics.

    One passage is in memory at a time. The files follow from the items, the replies, the settings and `writing` alone.

    Args:
        partial: the run is not at its end, which the statistics and what is read first say.
    """
    writing = writing or Writing()
    settings = {**settings, **vars(writing)}
    statistics, samples = Statistics(), Samples(settings["seed"])
    with written_files(folder, DATA, VALIDATION, REJECTED, PASSAGES) as (train, validation, rejected, passages):
        files = dict(zip(SPLITS, (train, validation), strict=True))
        dropped = 0
        for row in store.dropped(limit):
            statistics.reject([row])
            dropped += 1
            rejected.write(json_line(row))
        for number, item, made in store.finished(limit):
            made = as_written(made, writing.keep_uncovered)
            aside = made["aside"] = rejected_rows(item, made)
            split = split_of(item["document"], writing.validation_share, settings["seed"])
            rows = scp_rows(item, made, writing.reconstruct)
            files[split].writelines(map(json_line, rows))
            statistics.counts[f"{split}_rows"] += len(rows)
            rejected.writelines(map(json_line, aside))
            passages.write(json_line({**passage_row(item, made), "split": split}))
            statistics.add(made, aside)
            samples.add(number, item, made)
    totals = store.totals(limit)
    tokens = {"prompt_tokens": totals.prompt_tokens, "completion_tokens": totals.completion_tokens}
    counts = {"partial": partial, **statistics.values(), "dropped_before_asking": dropped, **tokens}
    stats = {**counts, "settings": settings}
    if not stats["validation_rows"]:
        (folder / VALIDATION).unlink()
    write_json(folder / STATS, stats)
    write_text(folder / REPORT, report(stats, samples))
    write_text(folder / CARD, card("SCP data", "PATH/OF/THIS/FOLDER", stats))
    return stats


@contextmanager
def written_files(folder: Path, *names: str) -> Iterator[list[TextIO]]:
    """Text files to write to, which take their names once all of them are whole."""
    with ExitStack() as renamed:
        paths = [renamed.enter_context(written_beside(folder / name)) for name in names]
        with ExitStack() as closed:
            yield [closed.enter_context(open(path, "w", encoding="utf-8")) for path in paths]


def split_of(document: str, share: float, seed: int) -> str:
    """A document's split, by a hash: the same whatever else there is."""
    return SPLITS[int.from_bytes(digest_of(seed, document)[:4], "big") < share * 2**32]


def as_written(made: dict[str, Any], keep_uncovered: bool) -> dict[str, Any]:
    """A passage's record with the pairs of a passage that is not covered set aside, where they are not to be kept."""
    if "failed" in made or made["covered"] or keep_uncovered or not made["pairs"]:
        return {"left_out": 0, **made}
    reason = "passage not covered" if made["missing"] else "coverage not known"
    aside = [{"type": "pair", "reason": reason, **pair} for pair in made["pairs"]]
    return {**made, "pairs": [], "rejected": [*made["rejected"], *aside], "left_out": len(aside)}


def scp_rows(passage: dict[str, Any], made: dict[str, Any], reconstruct: bool = False) -> list[dict[str, Any]]:
    """Rows of the release's schema: simple pairs, complex pairs, the paraphrase; each where there is one. With
    `reconstruct` another one, in the form of a paraphrase, whose target is the passage."""
    rows = []
    pairs = made.get("pairs", [])
    for simple in (True, False):
        chosen = [pair for pair in pairs if (pair["kind"] == "simple") == simple]
        if chosen:
            questions, answers = [pair["question"] for pair in chosen], [pair["answer"] for pair in chosen]
            rows.append({"data_type": "qa", "question": questions, "answers": answers})
    restated = [made.get("paraphrase"), passage["text"] if reconstruct else None]
    rows += [{"data_type": "paraphrase", "question": [], "answers": [text]} for text in restated if text]
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


class Samples:
    """A fixed number of passages, chosen by a hash of seed and number: the same in every run, none preferred."""

    def __init__(self, seed: int):
        self.seed = seed
        self._chosen: list[tuple[int, int, dict, dict]] = []

    def add(self, number: int, item: dict[str, Any], made: dict[str, Any]) -> None:
        rank = -int.from_bytes(digest_of(self.seed, number)[:8], "big")
        entry = (rank, number, item, made)
        if len(self._chosen) < SAMPLES:
            heapq.heappush(self._chosen, entry)
        elif rank > self._chosen[0][0]:
            heapq.heapreplace(self._chosen, entry)

    def rows(self) -> list[tuple[dict, dict]]:
        """Item and record, in the order of the passages."""
        return [entry[2:] for entry in sorted(self._chosen, key=lambda entry: entry[1])]


def report(stats: dict[str, Any], samples: Samples) -> str:
    """A page to read: charts, and samples of what was kept and what was set aside.

    One file without scripts or anything to load; every text of documents and replies is escaped.
    """
    judged = stats["passages"] - stats["failed"]
    facts = {
        "Passages": f"{stats['passages']:,}" + (" so far: the run is not finished" if stats["partial"] else ""),
        "without a verified pair": f"{stats['without_pairs']:,}",
        "others covered by their pairs": f"{100 * stats['coverage']:.1f}%",
        "Pairs": f"{stats['pairs']:,} ({stats['pairs_per_passage']:.1f} per passage)",
        "Paraphrases": f"{stats['paraphrases']:,}",
        "Set aside": f"{stats['rejected']:,}",
        "Rows": f"{stats['train_rows']:,} for training, {stats['validation_rows']:,} for validation",
        "Requests": f"{stats['requests']:,} ({stats['requests'] / judged if judged else 0:.1f} per passage)",
        "Tokens": f"{stats['prompt_tokens']:,} read, {stats['completion_tokens']:,} written",
        "Model, prompts": f"{stats['settings']['model']}, version {stats['settings']['prompts']}",
    }
    charts = {
        "Kinds of pairs": stats["kinds"],
        "Passages by number of pairs": stats["passages_by_pairs"],
        "Passages by supplementary rounds": stats["rounds"],
        "Set aside, by reason": stats["reject_reasons"],
    }
    environment = Environment(autoescape=True, loader=PackageLoader("clara_hf.synthesis"), keep_trailing_newline=True)
    environment.filters["shown"] = lambda text: text if len(text) <= SAMPLE_CHARS else text[:SAMPLE_CHARS] + " …"
    environment.filters["content"] = aside_content
    settings = json.dumps(stats["settings"], indent=2, ensure_ascii=False)
    values = {"facts": facts, "charts": charts, "samples": samples.rows(), "settings": settings, "limit": SAMPLES}
    return environment.get_template(REPORT).render(values)


def aside_content(entry: dict[str, Any]) -> str:
    """What an entry of `rejected.jsonl` holds beside its kind and reason."""
    content = {name: value for name, value in entry.items() if name not in ("passage_id", "type", "reason")}
    return json.dumps(content, ensure_ascii=False)


def push(folder: Path, repository: str, files: tuple[str, ...], stats: dict[str, Any], private: bool = True) -> str:
    """Upload the files of a finished run in one commit; returns its address.

    Raises:
        UsageError: the Hub refuses, or cannot be reached.
    """
    api = HfApi()
    try:
        name = api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True).repo_id
        data = [file for file in files if file != CARD and (folder / file).is_file()]
        operations = [CommitOperationAdd(file, str(folder / file)) for file in data]
        operations.append(CommitOperationAdd(CARD, card(name.rpartition("/")[2], name, stats).encode()))
        commit = api.create_commit(name, operations, repo_type="dataset", commit_message="SCP data")
    except Exception as error:  # beside the Hub's own errors those of its HTTP library, whichever that is
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"--push_to_hub {repository}: the data are in {folder}, but not uploaded ({reason})."
        ) from error
    return commit.commit_url


def check_name(repository: str) -> None:
    """See before the work whether a data set can be uploaded under this name.

    Raises:
        UsageError: it is no name of a data set, or nobody is logged in.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(f"--push_to_hub must be USER/NAME, but is {repository!r}: {error}") from None
    if not get_token():
        raise UsageError("--push_to_hub needs a token of the Hub: run `hf auth login`, or set HF_TOKEN.")


def card(name: str, repository: str, stats: dict[str, Any]) -> str:
    """The card of a data set; `repository` is where it is loaded from."""
    files = dict(zip(SPLITS, (DATA, VALIDATION), strict=True))
    found = [{"split": name, "path": file} for name, file in files.items() if stats[f"{name}_rows"]]
    data = DatasetCardData(
        configs=[{"config_name": "default", "data_files": found}],
        task_categories=["question-answering", "text-generation"],
        tags=["clara", "synthetic", "compression"],
    )
    settings = stats["settings"]
    facts = {
        **({"state": "partial, the run is not finished"} if stats["partial"] else {}),
        "pairs": stats["pairs"],
        "paraphrases": stats["paraphrases"],
        "passages without a verified pair": stats["without_pairs"],
        "other passages covered by their pairs": f"{100 * stats['coverage']:.1f}%",
        "model": settings["model"],
        "prompts, version": settings["prompts"],
        "seed": settings["seed"],
    }
    rows = "\n".join(f"| {name} | {str(value).replace('|', ' ')} |" for name, value in facts.items())
    named = {"name": name, "repository": repository, "passages": stats["passages"]}
    named["validation"] = f" (for validation: `{VALIDATION}`)" if stats["validation_rows"] else ""
    text = CARD_TEXT.format(data=f"---\n{data.to_yaml()}\n---", rows=rows, **named)
    return DatasetCard(text).content


def json_line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _sorted(counts: Counter) -> dict[str, int]:
    """Most frequent first; equal ones by name."""
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))
