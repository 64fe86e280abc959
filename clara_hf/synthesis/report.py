"""A page to read: what a run came to, with charts, and samples of what was kept and what was set aside.

One file without scripts or anything to load; every text of documents and replies is escaped.
"""

import heapq
import json
from html import escape
from pathlib import Path
from typing import Any

from clara_hf.synthesis.store import digest_of


SAMPLES = 12
SAMPLE_CHARS = 1200
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } table { border-collapse: collapse; }
td, th { padding: .15rem .6rem; text-align: left; vertical-align: top; } td.n { text-align: right; }
.bar { background: #35618f; height: .8rem; display: inline-block; }
.sample { border-top: 1px solid #bbb; padding: .6rem 0; overflow-wrap: anywhere; } .doc { white-space: pre-wrap; }
.kind, .reason { color: #666; } .aside { background: #f5f1ec; padding: .3rem .6rem; }
"""


class Samples:
    """A fixed number of passages, chosen by a hash of seed and number: the same in every run, none preferred."""

    def __init__(self, seed: int):
        self.seed = seed
        self._chosen: list[tuple[int, int, dict, dict, list]] = []

    def add(self, number: int, item: dict[str, Any], made: dict[str, Any], aside: list[dict[str, Any]]) -> None:
        rank = -int.from_bytes(digest_of(self.seed, number)[:8], "big")
        entry = (rank, number, item, made, aside)
        if len(self._chosen) < SAMPLES:
            heapq.heappush(self._chosen, entry)
        elif rank > self._chosen[0][0]:
            heapq.heapreplace(self._chosen, entry)

    def rows(self) -> list[tuple[dict, dict, list]]:
        """Item, record and what was set aside, in the order of the passages."""
        return [entry[2:] for entry in sorted(self._chosen, key=lambda entry: entry[1])]


def write_report(path: Path, stats: dict[str, Any], samples: Samples) -> None:
    """Write the page to `path`."""
    judged = stats["passages"] - stats["failed"]
    facts = [
        ("Passages", f"{stats['passages']:,}" + (" so far: the run is not finished" if stats["partial"] else "")),
        ("without a verified pair", f"{stats['without_pairs']:,}"),
        ("others covered by their pairs", f"{100 * stats['coverage']:.1f}%"),
        ("Pairs", f"{stats['pairs']:,} ({stats['pairs_per_passage']:.1f} per passage)"),
        ("Paraphrases", f"{stats['paraphrases']:,}"),
        ("Set aside", f"{stats['rejected']:,}"),
        ("Requests", f"{stats['requests']:,} ({stats['requests'] / judged if judged else 0:.1f} per passage)"),
        ("Tokens", f"{stats['prompt_tokens']:,} read, {stats['completion_tokens']:,} written"),
        ("Model, prompts", f"{stats['settings']['model']}, version {stats['settings']['prompts']}"),
    ]
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts)
    body = [
        f"<h1>SCP data</h1><table>{rows}</table>",
        _chart("Kinds of pairs", stats["kinds"]),
        _chart("Passages by number of pairs", stats["passages_by_pairs"]),
        _chart("Passages by supplementary rounds", stats["rounds"]),
        _chart("Set aside, by reason", stats["reject_reasons"]),
        "<h2>Samples</h2>",
        *(_sample(*row) for row in samples.rows()),
        f"<h2>Settings</h2><pre>{escape(json.dumps(stats['settings'], indent=2, ensure_ascii=False))}</pre>",
    ]
    page = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>SCP data</title><style>{STYLE}</style>'
    path.write_text(f"{page}</head><body>{''.join(body)}</body></html>\n", encoding="utf-8")


def _chart(title: str, counts: dict[str, int]) -> str:
    """Horizontal bars with their numbers."""
    if not counts:
        return ""
    most = max(counts.values())
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="n">{count:,}</td>'
        f'<td><span class="bar" style="width: {max(1, round(300 * count / most))}px"></span></td></tr>'
        for name, count in counts.items()
    )
    return f"<h2>{escape(title)}</h2><table>{rows}</table>"


def _sample(item: dict[str, Any], made: dict[str, Any], aside: list[dict[str, Any]]) -> str:
    parts = [f"<b>{escape(item['id'])}</b>", f'<p class="doc">{_shown(item["text"])}</p>']
    pairs = "".join(
        f'<li>{_shown(pair["question"])} <b>{_shown(pair["answer"])}</b> <span class="kind">{escape(pair["kind"])}, '
        f"round {pair['round']}</span></li>"
        for pair in made.get("pairs", [])
    )
    parts.append(f"<ol>{pairs}</ol>" if pairs else "")
    if made.get("paraphrase"):
        parts.append(f"<p><i>Paraphrase:</i> {_shown(made['paraphrase'])}</p>")
    for entry in aside[:SAMPLES]:
        content = {name: value for name, value in entry.items() if name not in ("passage_id", "type", "reason")}
        parts.append(
            f'<p class="aside"><span class="reason">{escape(entry["type"])}: {escape(entry["reason"])}</span> '
            f"{_shown(json.dumps(content, ensure_ascii=False))}</p>"
        )
    return f'<div class="sample">{"".join(parts)}</div>'


def _shown(text: str) -> str:
    return escape(text if len(text) <= SAMPLE_CHARS else text[:SAMPLE_CHARS] + " …")
