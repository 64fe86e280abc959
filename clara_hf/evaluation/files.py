"""The output folder of a run: what an unfinished one leaves there, and what a finished one puts in its place."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clara_hf.evaluation.plan import core_of
from clara_hf.evaluation.report import costs_csv, format_costs, format_tables, scores_csv
from clara_hf.evaluation.settings import UsageError, slug


RESULTS, PREDICTIONS = "results.json", "predictions"
TABLES = ("table.md", "table.csv", "costs.md", "costs.csv")
UNFINISHED, RUN = "unfinished", "run.json"
STAGED = ".eval.tmp"


def holds_run(folder: str | Path) -> bool:
    """Whether a finished run was written to the folder, whole or in part."""
    return any((Path(folder) / name).exists() for name in (RESULTS, *TABLES, PREDICTIONS))


def read_results(folder: str | Path) -> dict | None:
    """The results of a finished run in the folder, or `None`.

    Raises:
        UsageError: the file is damaged.
    """
    path = Path(folder) / RESULTS
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise UsageError(f"{path} is damaged: delete it, or start again with --overwrite.") from error


def claim_unfinished(folder: Path, record: dict, overwrite: bool = False) -> bool:
    """Marks the folder as being worked on with the settings `record`.

    A run whose settings differ in `systems` alone goes on: each system has journals of its own.

    Args:
        overwrite: forget an unfinished run with other settings.

    Returns:
        Whether there was a mark with such settings already, so that the run goes on.

    Raises:
        UsageError: the mark has other settings, and `overwrite` is not set.
    """
    path = folder / UNFINISHED / RUN
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    goes_on = earlier is not None and _goes_on(earlier, record)
    if goes_on:
        # What earlier systems were made with is kept, so that a change is noticed when they are asked for again.
        labels = dict.fromkeys([*earlier.get("systems", ()), *record.get("systems", ())])
        record = {**record, "systems": list(labels), "sha256": _hashes(earlier, record)}
    elif earlier is not None and not overwrite:
        raise UsageError(
            f"{folder} holds an unfinished run with other settings: give another --output_dir, or --overwrite."
        )
    else:
        # Another run's, or what a removal that was interrupted left.
        remove_unfinished(folder)
        path.parent.mkdir(parents=True)
    staged = path.with_suffix(".tmp")
    staged.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(staged, path)
    return goes_on


def _goes_on(earlier: dict, record: dict) -> bool:
    """Whether journals of a run with the settings `earlier` can be used by one with the settings `record`."""
    rest, own = ({k: v for k, v in one.items() if k not in ("systems", "sha256")} for one in (earlier, record))
    hashes = _hashes(earlier, record), _hashes(record, earlier)
    # Systems of two calls, too, may not share a file.
    names = {core_of(label) for one in (earlier, record) for label in one.get("systems", ())}
    return rest == own and hashes[0] == hashes[1] and len(set(map(slug, names))) == len(names)


def _hashes(first: dict, second: dict) -> dict:
    return {**first.get("sha256", {}), **second.get("sha256", {})}


def remove_unfinished(folder: Path) -> None:
    """Forgets an unfinished run; finished results stay."""
    # The mark goes first, so that half of the rest is never taken for a run.
    (folder / UNFINISHED / RUN).unlink(missing_ok=True)
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


def write_run(folder: str | Path, results: dict, records: dict[str, dict[str, list[dict]]]) -> None:
    """Writes `predictions/<system>.jsonl`, the tables and `results.json`, and removes what an unfinished run left.

    Several data files have a folder each in `predictions`. Earlier results go only when everything new is on the disk,
    and `results.json` comes last, so that a folder which has it is whole.

    Args:
        records: per data file, per system, one record per question.
    """
    folder = Path(folder)
    with _staged(folder) as staged:
        for dataset, systems in records.items():
            target = staged / PREDICTIONS / (dataset if len(records) > 1 else "")
            target.mkdir(parents=True)
            for system, rows in systems.items():
                lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                (target / f"{slug(system)}.jsonl").write_text("".join(lines), encoding="utf-8")
        _write_tables(staged, results)
        (folder / RESULTS).unlink(missing_ok=True)
        shutil.rmtree(folder / PREDICTIONS, ignore_errors=True)
        for name in (PREDICTIONS, *TABLES, RESULTS):
            os.replace(staged / name, folder / name)
        remove_unfinished(folder)


def write_tables(folder: Path, results: dict) -> None:
    """Writes the tables and `results.json` of a finished run again; its predictions stay."""
    with _staged(folder) as staged:
        _write_tables(staged, results)
        for name in (*TABLES, RESULTS):
            os.replace(staged / name, folder / name)


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    staged = folder / STAGED
    shutil.rmtree(staged, ignore_errors=True)
    try:
        staged.mkdir(parents=True)
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _write_tables(folder: Path, results: dict) -> None:
    tables = (
        format_tables(results, markdown=True),
        scores_csv(results),
        format_costs(results, markdown=True),
        costs_csv(results),
    )
    for name, text in zip(TABLES, tables, strict=True):
        (folder / name).write_text(text, encoding="utf-8")
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    (folder / RESULTS).write_text(text, encoding="utf-8")
