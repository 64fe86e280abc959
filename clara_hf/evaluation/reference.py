"""Published figures beside one's own.

The file holds percent, by section, candidates and system:

    {"source": "...", "base": "...",
     "end_to_end": {"normal": {SYSTEM: {DATASET: {"f1": 50.9, "em": 41.0}}}},
     "retrieval": {"pool": "oracle, 20 candidates", SYSTEM: {DATASET: {"recall@1": 6.6}}},
     "compressor_cover_em": {"normal": {SYSTEM: {DATASET: 54.6}}}}

A system may have a compression rate between its name and the data sets. Further sections are not read.
"""

import json
import re
from pathlib import Path

from transformers.utils import logging

from clara_hf.data.schema import QAExample
from clara_hf.evaluation.plan import UsageError


logger = logging.get_logger(__name__)


def published_figures(
    path: str | Path | None, files: dict[str, list[QAExample]], rate: float | None = None
) -> dict[str, list[dict]]:
    """The published figures for each data file, which belongs to the data set that its name, or its rows' `dataset`,
    begins with; or whose name begins with the file's first word, as `hotpotqa` does with that of `hotpot_dev_v1`.

    Args:
        rate: the compression rate of the model that is measured.

    Returns:
        Per file one entry per system, candidates and section: `system`, `pool`, `base`, `source`, `values` (from 0 to
        1) and `near`: whether they are for candidates and a compression rate like those of the run, as far as known.

    Raises:
        UsageError: the file cannot be read, or has another form.
    """
    if path is None:
        return {name: [] for name in files}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        origin = {"base": content["base"], "source": content["source"]}
        leaves = list(_leaves(content))
        found: dict[str, list[dict]] = {name: [] for name in files}
        for name, rows in found.items():
            for section, pool, system, at, key, values in leaves:
                if _belongs(name, files[name], key):
                    values = {"cover_em": values} if section == "compressor_cover_em" else values
                    shares = {metric: value / 100 for metric, value in values.items()}
                    label = system if at is None else f"{system}, CR {at}"
                    rows.append({"system": label, "pool": pool, "values": shares, "rate": at, **origin})
            _mark_near(rows, _pool_kind(files[name]), rate)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"--reference: {path} has not the form of published figures that eval/reference.py describes ({error!r})."
        ) from error
    if missing := [name for name, rows in found.items() if not rows]:
        known = ", ".join(dict.fromkeys(key for *_, key, _ in leaves))
        logger.warning(
            f"--reference: {path} has no figures for {', '.join(missing)}: a data file's name must begin with that of "
            f"its data set, one of {known}."
        )
    return found


def _belongs(name: str, examples: list[QAExample], key: str) -> bool:
    for text in (name.lower(), str(examples[0].extra.get("dataset", "")).lower()):
        word = re.split(r"[^a-z0-9]", text, maxsplit=1)[0]
        if text.startswith(key.lower()) or (len(word) >= 4 and key.lower().startswith(word)):
            return True
    return False


def _pool_kind(examples: list[QAExample]) -> str | None:
    """`oracle` where every question has its gold documents, `normal` where some have; `None` where none has."""
    known = sum(bool(one.pos_index) for one in examples)
    return {len(examples): "oracle", 0: None}.get(known, "normal")


def _mark_near(rows: list[dict], kind: str | None, rate: float | None) -> None:
    """Says of each row whether it is near the run, and forgets its rate; all are where none is."""
    for wanted, value in (("pool", kind), ("rate", None if rate is None else f"{rate:g}")):
        fits = [row for row in rows if value is not None and str(row[wanted]).split(",")[0] == value]
        for row in rows:
            is_free = not fits or any(row is one for one in fits) or row[wanted] is None
            row["near"] = row.get("near", True) and is_free
    for row in rows:
        del row["rate"]


def _leaves(content: dict):
    """Yields section, pool, system, compression rate or `None`, data set and values."""
    for section in ("end_to_end", "compressor_cover_em"):
        for pool, systems in content.get(section, {}).items():
            for system, by in systems.items():
                yield from ((section, pool, system, *leaf) for leaf in _by_dataset(by))
    retrieval = dict(content.get("retrieval", {}))
    pool = retrieval.pop("pool", "")
    for system, by in retrieval.items():
        yield from (("retrieval", pool, system, *leaf) for leaf in _by_dataset(by))


def _by_dataset(by: dict):
    for key, values in by.items():
        if isinstance(values, dict) and all(isinstance(value, dict) for value in values.values()):
            yield from ((key, dataset, numbers) for dataset, numbers in values.items())
        else:
            yield None, key, values
