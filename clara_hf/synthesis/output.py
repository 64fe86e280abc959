"""The files of a finished run, written beside in passage order and then put in place, `stats.json` last."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from clara_hf.synthesis.publish import card
from clara_hf.synthesis.report import Samples, write_report
from clara_hf.synthesis.scp_data import passage_row, rejected_rows, scp_rows
from clara_hf.synthesis.store import RunStore


DATA, REJECTED, PASSAGES, STATS, REPORT = "scp.jsonl", "rejected.jsonl", "passages.jsonl", "stats.json", "report.html"
CARD = "README.md"
OUTPUTS = (DATA, REJECTED, PASSAGES, REPORT, CARD, STATS)


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
        names = ("passages", "failed", "without_pairs", "pairs", "paraphrases", "rejected", "requests")
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


def write_outputs(
    store: RunStore, folder: Path, settings: dict[str, Any], limit: int | None, partial: bool = False
) -> dict[str, Any]:
    """Write every file of the run from its finished items; returns the statistics.

    One passage is in memory at a time. The files follow from the items, the replies and the settings alone.

    Args:
        partial: the run is not at its end, which the statistics and what is read first say.
    """
    statistics, samples = Statistics(), Samples(settings["seed"])
    paths = {name: folder / f"{name}.partial" for name in OUTPUTS}
    with (
        open(paths[DATA], "w", encoding="utf-8") as data,
        open(paths[REJECTED], "w", encoding="utf-8") as rejected,
        open(paths[PASSAGES], "w", encoding="utf-8") as passages,
    ):
        dropped = 0
        for row in store.dropped(limit):
            statistics.reject([row])
            dropped += 1
            rejected.write(json_line(row))
        for number, item, made in store.finished(limit):
            rows, aside = scp_rows(item, made), rejected_rows(item, made)
            data.writelines(map(json_line, rows))
            rejected.writelines(map(json_line, aside))
            passages.write(json_line(passage_row(item, made)))
            statistics.add(made, aside)
            samples.add(number, item, made, aside)
    totals = store.totals(limit)
    tokens = {"prompt_tokens": totals.prompt_tokens, "completion_tokens": totals.completion_tokens}
    counts = {"partial": partial, **statistics.values(), "dropped_before_asking": dropped, **tokens}
    stats = {**counts, "settings": settings}
    paths[STATS].write_text(json.dumps(stats, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_report(paths[REPORT], stats, samples)
    paths[CARD].write_text(card("SCP data", "PATH/OF/THIS/FOLDER", stats), encoding="utf-8")
    for name in OUTPUTS:
        os.replace(paths[name], folder / name)
    return stats


def json_line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _sorted(counts: Counter) -> dict[str, int]:
    """Most frequent first; equal ones by name."""
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))
