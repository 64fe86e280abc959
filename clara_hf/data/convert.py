"""Brings published data sets into the schema of `clara_hf.data.schema`, or into rows of the first stage.

    python eval/convert.py --format hotpotqa --input hotpot_dev_distractor_v1.json --output hotpotqa_dev.jsonl.gz
    python eval/convert.py --format nq-open --input NQ-open.dev.jsonl --output questions.jsonl
    python eval/convert.py --format squad --to scp --input train-v1.1.json --output scp_train.jsonl

Formats and the fields that are read: `clara_hf.data.converters`. Files are of any kind that `clara_hf.data.sources`
reads. Every malformed row is named; then nothing is written, unless `--skip_malformed`. An output that holds other rows
is replaced only with `--overwrite`.

`--to scp` makes data for the first stage from questions that people wrote: for each passage, or set of passages that
one question needs, a row with the list of its questions and the answers that stand in it; with `--reconstruct true`
also one whose target is the passage itself, by which a compressor learns to keep the words.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from clara_hf.data.converters import (
    CONVERTERS,
    LeftOut,
    beir,
    check_format,
    two_wiki,
    unfolded,
)
from clara_hf.data.files import DataError, check_output, holds_jsonl, write_jsonl
from clara_hf.data.leak_checks import AnswerFinder
from clara_hf.data.schema import check_text, check_texts, parse_example, parse_scp
from clara_hf.data.sources import read_rows, unit_of
from clara_hf.program import UsageError, parse


SHOWN_ERRORS = 20


class Conversion:
    """The rows of a source in the schema, one after the other, and what became of the others.

    Args:
        source: a file of any kind that `clara_hf.data.sources` reads.
        form: one of `CONVERTERS`.
        converter: instead of the form's own.

    Attributes:
        errors: one sentence for each malformed row.
        left_out: how many sound rows were left out, by reason.
    """

    def __init__(self, source: str, form: str, converter: Callable[[dict[str, Any]], dict[str, Any]] | None = None):
        self.source, self.form, self.converter = source, form, converter or CONVERTERS[form]
        self.errors: list[str] = []
        self.left_out: Counter[str] = Counter()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        unit = unit_of(self.source)
        earlier: dict[str, str] = {}
        for number, row in read_rows(self.source, lambda error: self.errors.append(str(error))):
            place = ""
            try:
                for place, item in unfolded(self.form, row):
                    where = f"{unit} {number}{place}"
                    try:
                        converted = self._converted(item, f"{number}{place}", where, earlier)
                    except LeftOut as reason:
                        self.left_out[str(reason)] += 1
                    except ValueError as error:
                        self.errors.append(f"{self.source}, {where}: {error}")
                    else:
                        yield converted
            except ValueError as error:  # the row's levels
                self.errors.append(f"{self.source}, {unit} {number}{place}: {error}")

    def _converted(self, row, number, where, earlier):
        check_format(self.form, row)
        converted = self.converter(row)
        if "data_type" in converted:
            parse_scp(converted)
            return converted
        needs_answers = self.form != "beir"
        if "docs" in converted:
            parse_example(converted, number, needs_answers)
        else:
            check_text("question", converted["question"])
            if needs_answers or converted["answers"] != []:
                check_texts("answers", converted["answers"])
        converted = {"id": str(converted.pop("id", number)), **converted}
        if (first := earlier.setdefault(converted["id"], where)) != where:
            raise ValueError(f"id {converted['id']!r} is already used in {first}.")
        return converted


class SCPRows:
    """Rows of the first stage from questions with gold passages.

    Args:
        questions: a [`Conversion`], or rows of the schema.
        left_out: is told how many questions were left out, by reason.
        reconstruct: whether every passage by itself is also the target of a row, once.
    """

    def __init__(self, questions: Iterable[dict[str, Any]], left_out: Counter[str], reconstruct: bool = False):
        self.questions, self.left_out, self.reconstruct = questions, left_out, reconstruct

    def __iter__(self) -> Iterator[dict[str, Any]]:
        pairs: dict[frozenset[str], tuple[tuple[str, ...], dict[str, str]]] = {}
        for row in self.questions:
            passages = tuple(row["docs"][position] for position in row.get("pos_index") or ()) if "docs" in row else ()
            answer = next((answer for answer in row["answers"] if _stands_in(answer, passages)), None)
            if not passages:
                self.left_out["no gold passage is known"] += 1
            elif answer is None:
                self.left_out["no gold passage holds an accepted answer"] += 1
            else:
                pairs.setdefault(frozenset(passages), (passages, {}))[1].setdefault(row["question"], answer)
        restated: set[str] = set()
        for passages, given in pairs.values():
            row = {"data_type": "qa", "question": list(given), "answers": list(given.values()), "docs": list(passages)}
            parse_scp(row)
            yield row
            for passage in passages if self.reconstruct else ():
                if passage not in restated:
                    restated.add(passage)
                    yield {"data_type": "paraphrase", "question": [], "answers": [passage], "docs": [passage]}


def _stands_in(answer, passages):
    finder = AnswerFinder([answer])
    # Yes and no stand in no passage.
    return not finder.needles or any(map(finder.found_in, passages))


def convert(
    conversion: Conversion,
    output: str,
    skip_malformed: bool = False,
    to: str = "questions",
    overwrite: bool = True,
    reconstruct: bool = False,
) -> int:
    """Writes the converted rows as JSONL, or with `to="scp"` rows of the first stage, see [`SCPRows`]; returns how
    many.

    A file that holds these rows already is left as it is.

    Raises:
        DataError: the source cannot be read, there is no sound row, or, without `skip_malformed`, a malformed one.
        UsageError: the output holds something else, and `overwrite` is not set.
    """
    sound = _sound(conversion, skip_malformed)
    rows = SCPRows(sound, conversion.left_out, reconstruct) if to == "scp" else sound
    if overwrite or not Path(output).exists():
        return write_jsonl(output, rows)
    if (number := holds_jsonl(output, rows)) is None:
        raise UsageError(f"{output} is there already and holds other rows: give another --output, or --overwrite.")
    return number


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


def read_qrels(path: str) -> dict[str, list[str]]:
    """BEIR's relevant passages by query: a table of `query-id`, `corpus-id`, `score`, of which scores above 0 count.

    Raises:
        DataError: a row breaks this form.
    """
    relevant: dict[str, list[str]] = {}
    for number, row in read_rows(path):
        try:
            query, passage, score = str(row["query-id"]), str(row["corpus-id"]), float(row["score"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}, {unit_of(path)} {number}: 'query-id', 'corpus-id' and 'score' are expected."
            ) from error
        if score > 0:
            relevant.setdefault(query, []).append(passage)
    return relevant


@dataclass
class ConversionSettings:
    """What is converted, and where it goes.

    Raises:
        UsageError: arguments that exclude each other, or an output that cannot be written.
    """

    format: str = field(metadata={"help": "What the input is.", "choices": tuple(CONVERTERS)})
    input: str = field(metadata={"help": "A file, a folder or hf://datasets/USER/NAME#SPLIT."})
    output: str = field(metadata={"help": "A .jsonl or .jsonl.gz file."})
    to: str = field(default="questions", metadata={"help": "What the output is.", "choices": ("questions", "scp")})
    reconstruct: bool = field(default=False, metadata={"help": "With --to scp: passages as their own targets, too."})
    aliases: str | None = field(default=None, metadata={"help": "2WikiMultihopQA's id_aliases.json."})
    qrels: str | None = field(default=None, metadata={"help": "BEIR's qrels/SPLIT.tsv."})
    skip_malformed: bool = field(default=False, metadata={"help": "Write the sound rows, naming the others."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an output that holds other rows."})

    def __post_init__(self):
        if self.aliases and self.format != "2wikimultihopqa":
            raise UsageError(f"--aliases is for the format 2wikimultihopqa, not for {self.format}.")
        if bool(self.qrels) != (self.format == "beir"):
            raise UsageError(f"--qrels is for the format beir, which needs it; --format is {self.format}.")
        if self.to == "scp" and self.format in ("beir", "kilt"):
            raise UsageError(f"--to scp needs gold passages, which the format {self.format} names by their ids only.")
        if self.reconstruct and self.to != "scp":
            raise UsageError(f"--reconstruct adds rows of the first stage: give --to scp, not --to {self.to}.")
        check_output(self.output, overwrite=True)  # what is there is compared with what is converted

    def conversion(self) -> Conversion:
        """What there is to convert, with the files beside the input.

        Raises:
            DataError: one of these cannot be read.
        """
        converter = None
        if self.aliases:
            converter = partial(two_wiki, aliases=read_aliases(self.aliases))
        if self.qrels:
            converter = partial(beir, qrels=read_qrels(self.qrels))
        return Conversion(self.input, self.format, converter)


def main(arguments: list[str] | None = None) -> None:
    """The program, see the top of this file."""
    settings = parse(ConversionSettings, arguments, description=__doc__)
    conversion = settings.conversion()
    was_there = not settings.overwrite and Path(settings.output).exists()
    try:
        rows = convert(
            conversion, settings.output, settings.skip_malformed, settings.to, settings.overwrite, settings.reconstruct
        )
    finally:
        for message in conversion.errors[:SHOWN_ERRORS]:
            print(message, file=sys.stderr)
        if len(conversion.errors) > SHOWN_ERRORS:
            print(f"... and {len(conversion.errors) - SHOWN_ERRORS} more.", file=sys.stderr)
        for reason, count in conversion.left_out.items():
            print(f"{count} rows left out: {reason}.", file=sys.stderr)
    print(f"{settings.output}: {rows} rows{', which it held already' if was_there else ''}.")
