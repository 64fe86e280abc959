"""Published figures beside one's own.

The file holds percent, by section, candidates and system:

    {"source": "...", "base": "...",
     "end_to_end": {"normal": {SYSTEM: {DATASET: {"f1": 50.9, "em": 41.0}}}},
     "retrieval": {"pool": "oracle, 20 candidates", SYSTEM: {DATASET: {"recall@1": 6.6}}},
     "compressor_cover_em": {"normal": {SYSTEM: {DATASET: 54.6}}}}

A system may have a compression rate between its name and the data sets. Further sections are not read.
"""

import json
from pathlib import Path

from eval.data import QAExample
from eval.settings import UsageError


def published_figures(path: str | Path | None, dataset: str, examples: list[QAExample]) -> list[dict]:
    """The published figures for one data file, which belongs to the data set that its name, or its rows' `dataset`,
    begins with.

    Returns:
        One entry per system, candidates and section: `system`, `pool`, `base`, `source` and `values` (from 0 to 1).

    Raises:
        UsageError: the file cannot be read, or has another form.
    """
    if path is None:
        return []
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        names = [dataset.lower(), str(examples[0].extra.get("dataset", "")).lower()]
        found = []
        for section, pool, system, key, values in _leaves(content):
            if any(name.startswith(key.lower()) for name in names):
                values = {"cover_em": values} if section == "compressor_cover_em" else values
                shares = {metric: value / 100 for metric, value in values.items()}
                found.append({"system": system, "pool": pool, "values": shares})
        origin = {"base": content["base"], "source": content["source"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"--reference: {path} has not the form of published figures that eval/reference.py describes ({error!r})."
        ) from error
    return [{**row, **origin} for row in found]


def _leaves(content: dict):
    """Yields section, pool, system, data set and values."""
    for section in ("end_to_end", "compressor_cover_em"):
        for pool, systems in content.get(section, {}).items():
            for system, by in systems.items():
                yield from ((section, pool, name, key, values) for name, key, values in _by_dataset(system, by))
    retrieval = dict(content.get("retrieval", {}))
    pool = retrieval.pop("pool", "")
    for system, by in retrieval.items():
        yield from (("retrieval", pool, name, key, values) for name, key, values in _by_dataset(system, by))


def _by_dataset(system: str, by: dict):
    for key, values in by.items():
        if isinstance(values, dict) and all(isinstance(value, dict) for value in values.values()):
            yield from ((f"{system}, CR {key}", dataset, numbers) for dataset, numbers in values.items())
        else:
            yield system, key, values
