"""Brings published data sets into the schema of `eval/data.py`.

    python eval/convert.py --format hotpotqa --input hotpot_dev_distractor_v1.json --output hotpotqa_dev.jsonl.gz
    python eval/convert.py --format nq-open --input NQ-open.dev.jsonl --output questions.jsonl

Formats and the fields that are read: `eval/converters.py`. Files are of any kind that `eval/data_files.py` reads. Every
malformed row is named; then nothing is written, unless `--skip_malformed`.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from clara_hf.data.converters import CONVERTERS, LeftOut, read_aliases, two_wiki
from clara_hf.data.files import write_jsonl
from clara_hf.data.schema import DataError, check_text, check_texts, parse_example, parse_scp
from clara_hf.data.sources import read_rows, unit_of


SHOWN_ERRORS = 20


class Conversion:
    """The rows of a source in the schema, one after the other, and what became of the others.

    Args:
        source: a file of any kind that `eval/data_files.py` reads.
        converter: one of `CONVERTERS`.

    Attributes:
        errors: one sentence for each malformed row.
        left_out: how many sound rows were left out, by reason.
    """

    def __init__(self, source: str, converter: Callable[[dict[str, Any]], dict[str, Any]]):
        self.source = source
        self.converter = converter
        self.errors: list[str] = []
        self.left_out: Counter[str] = Counter()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        unit, numbers = unit_of(self.source), {}
        for number, row in read_rows(self.source, lambda error: self.errors.append(str(error))):
            try:
                converted = self.converter(row)
                _check(converted, str(number))
                if "data_type" not in converted:
                    converted = {"id": str(converted.pop("id", number)), **converted}
                    earlier = numbers.setdefault(converted["id"], number)
                    if earlier != number:
                        raise ValueError(f"id {converted['id']!r} is already used in {unit} {earlier}.")
            except LeftOut as reason:
                self.left_out[str(reason)] += 1
            except ValueError as error:
                self.errors.append(f"{self.source}, {unit} {number}: {error}")
            else:
                yield converted


def _check(row, default_id):
    if "data_type" in row:
        parse_scp(row)
    elif "docs" in row:
        parse_example(row, default_id)
    else:
        check_text("question", row["question"])
        check_texts("answers", row["answers"])


def convert(conversion: Conversion, output: str, skip_malformed: bool = False) -> int:
    """Writes the converted rows as JSONL; returns how many.

    Raises:
        DataError: the source cannot be read, there is no sound row, or, without `skip_malformed`, a malformed one.
    """
    return write_jsonl(output, _sound(conversion, skip_malformed))


def _sound(conversion, skip_malformed):
    empty = True
    for row in tqdm(conversion, desc="converting", unit=" rows", leave=False):
        empty = False
        yield row
    if conversion.errors and not skip_malformed:
        count = len(conversion.errors)
        raise DataError(
            f"{conversion.source}: {count} malformed, nothing was written (--skip_malformed leaves them out)."
        )
    if empty:
        raise DataError(f"{conversion.source}: there is no row to write.")


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Brings published data sets into the evaluation schema.")
    parser.add_argument("--format", required=True, choices=CONVERTERS, help="What the input is.")
    parser.add_argument("--input", required=True, help="A file, a folder or hf://datasets/USER/NAME#SPLIT.")
    parser.add_argument("--output", required=True, help="A .jsonl or .jsonl.gz file.")
    parser.add_argument("--aliases", help="2WikiMultihopQA's id_aliases.json.")
    parser.add_argument("--skip_malformed", action="store_true", help="Write the sound rows, naming the others.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an earlier output.")
    given = parser.parse_args(arguments)
    if not given.output.endswith((".jsonl", ".jsonl.gz")):
        parser.error(f"--output must end in .jsonl or .jsonl.gz, but is {given.output}")
    if given.aliases and given.format != "2wikimultihopqa":
        parser.error("--aliases is for the format 2wikimultihopqa")
    if Path(given.output).exists() and not given.overwrite:
        parser.error(f"{given.output} is there already: give another --output, or --overwrite")
    conversion = Conversion(given.input, CONVERTERS[given.format])
    try:
        if given.aliases:
            conversion.converter = partial(two_wiki, aliases=read_aliases(given.aliases))
        rows = convert(conversion, given.output, given.skip_malformed)
        outcome = f"{given.output}: {rows} rows."
    except DataError as error:
        outcome = f"error: {error}"
    except OSError as error:
        outcome = f"error: {error}. Nothing was written."
    except KeyboardInterrupt:
        print("Interrupted: nothing was written.", file=sys.stderr)
        return 130
    _print_errors(conversion.errors)
    for reason, count in conversion.left_out.items():
        print(f"{count} rows left out: {reason}.", file=sys.stderr)
    failed = outcome.startswith("error: ")
    print(outcome, file=sys.stderr if failed else sys.stdout)
    return 2 if failed else 0


def _print_errors(errors):
    for message in errors[:SHOWN_ERRORS]:
        print(message, file=sys.stderr)
    if len(errors) > SHOWN_ERRORS:
        print(f"... and {len(errors) - SHOWN_ERRORS} more.", file=sys.stderr)
