"""Files and data sets of every kind give the same rows, and the sentence for everything that cannot be read."""

import bz2
import csv
import gzip
import json
import os
import random
import re
import tracemalloc

import datasets
import pyarrow.parquet
import pytest
import zstandard

from clara_hf.data.files import write_jsonl
from clara_hf.data.schema import DataError, QAExample, iter_examples, load_examples, load_scp
from clara_hf.data.sources import read_rows, source_name
from clara_hf.program.values import split


ROWS = [
    {
        "id": f"q{number}",
        "question": f'Who, "number {number}", lives\nin 東京?',
        "answers": [f"Mara {number}", "Oren"],
        "docs": ["Mara is here.\nShe sings.", "Oren, too."],
        "pos_index": [1] if number % 2 else [],
        "type": "one-hop" if number % 2 else None,
    }
    for number in range(5)
]
EXAMPLES = [
    QAExample(row["id"], row["question"], row["answers"], row["docs"], row["pos_index"] or None, row["type"])
    for row in ROWS
]


def write_csv(path, rows, delimiter=","):
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        for row in rows:
            cells = {name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()}
            writer.writerow(cells)


def write_json(path, indent=None):
    text = json.dumps(ROWS, indent=indent, ensure_ascii=False).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def dataset(rows=ROWS):
    return datasets.Dataset.from_list(rows)


WRITERS = {
    "rows.jsonl": lambda path: write_jsonl(path, ROWS),
    "rows.jsonl.gz": lambda path: write_jsonl(path, ROWS),
    "rows.json": lambda path: write_json(path, indent=2),
    "array.json.gz": write_json,
    "lines.json": lambda path: write_jsonl(path, ROWS),
    "rows.csv": lambda path: write_csv(path, ROWS),
    "rows.csv.gz": lambda path: write_csv(path, ROWS),
    "rows.tsv": lambda path: write_csv(path, ROWS, "\t"),
    "rows.parquet": lambda path: dataset().to_parquet(str(path)),
    "saved": lambda path: dataset().save_to_disk(str(path)),
    "saved_dict": lambda path: datasets.DatasetDict(only=dataset()).save_to_disk(str(path)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_source_gives_the_same_questions(tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert load_examples(tmp_path / name) == EXAMPLES
    assert load_examples(str(tmp_path / name)) == EXAMPLES


def test_a_folder_like_a_repository_of_the_hub_is_read_by_split(tmp_path):
    WRITERS["rows.jsonl"](tmp_path / "train.jsonl")
    write_jsonl(tmp_path / "test.jsonl", ROWS[:2])
    assert load_examples(f"{tmp_path}#train") == EXAMPLES
    assert load_examples(f"{tmp_path}#test") == EXAMPLES[:2]
    with pytest.raises(DataError, match="it has the splits train, test: add #SPLIT to its name"):
        load_examples(tmp_path)
    with pytest.raises(DataError, match="there is no split 'dev', it has train, test"):
        load_examples(f"{tmp_path}#dev")


def test_configurations_are_chosen_before_the_split(tmp_path):
    for config, rows in (("easy", ROWS[:1]), ("hard", ROWS[1:])):
        dataset(rows).to_parquet(str(tmp_path / config / "validation.parquet"))
    listed = "\n".join(f"- config_name: {name}\n  data_files: {name}/*.parquet" for name in ("easy", "hard"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{listed}\n---\n")
    assert load_examples(f"{tmp_path}#hard/train") == EXAMPLES[1:]
    with pytest.raises(DataError, match="cannot be loaded .*easy.*hard"):
        load_examples(tmp_path)


def test_saved_splits_are_chosen_by_name_and_a_path_may_hold_the_sign(tmp_path):
    saved = datasets.DatasetDict(train=dataset(), test=dataset(ROWS[3:]))
    saved.save_to_disk(str(tmp_path / "a#b"))
    assert load_examples(f"{tmp_path / 'a#b'}#test") == EXAMPLES[3:]
    dataset().save_to_disk(str(tmp_path / "plain"))
    with pytest.raises(DataError, match="saved without splits: leave #test out"):
        load_examples(f"{tmp_path / 'plain'}#test")
    write_jsonl(tmp_path / "c#1.jsonl", ROWS)
    assert load_examples(tmp_path / "c#1.jsonl") == EXAMPLES


def test_a_data_set_of_the_hub_that_cannot_be_had_is_one_sentence():
    with pytest.raises(
        DataError, match=r"^hf://datasets/nobody/nothing@v1#dev: the data set cannot be loaded \(.*\)\.$"
    ):
        load_examples("hf://datasets/nobody/nothing@v1#dev")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("data/hotpot.dev.jsonl.gz", "hotpot.dev"),
        ("a.csv", "a"),
        ("b.json.gz", "b"),
        ("c.parquet", "c"),
        ("hf://datasets/someone/set@v2#distractor/validation", "set-distractor-validation"),
        ("folder#test", "folder-test"),
        ("odd.name", "odd.name"),
    ],
)
def test_sources_have_short_names(source, name):
    assert source_name(source) == name


# What is broken, and where


BROKEN = {
    "question missing": ({"question": None}, "the field 'question' is missing"),
    "gold out of range": ({"pos_index": [2]}, "gold index 2 in 'pos_index' is out of range for 2 docs"),
    "duplicate id": ({"id": "q0"}, "id 'q0' is already used in {first}"),
    "no answers": ({"answers": []}, "'answers' is an empty list"),
    "no docs": ({"docs": []}, "'docs' is an empty list"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize(
    ("name", "where", "first"),
    # A record of the CSV file has two lines, as its question does; the header is the first.
    [
        ("rows.jsonl.gz", "line 3", "line 1"),
        ("rows.csv", "line 7", "line 3"),
        ("rows.tsv", "line 7", "line 3"),
        ("rows.json", "item 3", "item 1"),
        ("rows.parquet", "row 3", "row 1"),
        ("saved", "row 3", "row 1"),
    ],
)
def test_a_broken_row_is_named_with_its_number_in_every_kind_of_file(tmp_path, monkeypatch, name, where, first, case):
    fields, message = BROKEN[case]
    row = {**ROWS[2], **fields}
    if name in ("rows.jsonl.gz", "rows.json"):
        row = {key: value for key, value in row.items() if value is not None}
    elif "line" in where and row["question"] is None:
        where = "line 6"
    rows = [*ROWS[:2], row, *ROWS[3:]]
    monkeypatch.setattr(f"{__name__}.ROWS", rows)
    monkeypatch.setattr(dataset, "__defaults__", (rows,))
    WRITERS[name](tmp_path / name)
    with pytest.raises(DataError, match=rf"^{tmp_path / name}, {where}: {message.format(first=first)}"):
        load_examples(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question,answers,docs\nWho?,Mara,[]\n", "line 2: 'answers' must be a JSON list, but is \"Mara\""),
        ("question,answers\nWho?\n", "line 2: 1 cells, but 2 columns"),
        (f"answers,docs\n[],[{'1' * 5000}]\n", "line 2: 'docs' must be a JSON list, but is \"[111"),
        ("question,question\n", "line 1: a column is named twice: question, question"),
        ('question,docs\n"Who?"x,[]\n', "line 2: malformed CSV, ',' expected after '\"'"),
        ('question,docs\n"Who?\n\n', "line 3: malformed CSV, unexpected end of data"),
        ("question,answers,docs\n", "the file holds no question"),
        ("", "the file holds no question"),
    ],
)
def test_malformed_csv_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        load_examples(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, 3]', "item 2: a JSON object is expected, but the item holds 3"),
        ('[{"a": 1} {"a": 2}]', "item 2: malformed JSON, a comma or the array's end is expected"),
        ('[{"a": 1},]', "item 2: malformed JSON, Expecting value"),
        ('[{"a": 1}', "item 2: malformed JSON, Expecting value"),
        ('[{"a": 1}, {"b": "cut', "item 2: malformed JSON, Unterminated string"),
        ('[{"a": 1}, {"b" 3}, {"c": 4}]', "item 2: malformed JSON, Expecting ':' delimiter"),
        ("[" * 100_000, "item 1: malformed JSON, nested too deeply"),
        (f'[{{"a": {"1" * 5000}}}]', "item 1: malformed JSON, a number has too many digits."),
    ],
)
@pytest.mark.parametrize("chunk", [1, 7, 2**20])
def test_malformed_arrays_are_named_with_the_item(tmp_path, monkeypatch, chunk, text, message):
    monkeypatch.setattr("clara_hf.data.sources.CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert message in str(caught.value)


@pytest.mark.parametrize("chunk", [1, 2, 3, 50, 2**20])
def test_arrays_are_read_whole_whatever_the_size_of_a_read(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("clara_hf.data.sources.CHUNK", chunk)
    rows = [{"text": 'a "quoted" ] } , [ \\ text', "number": 12.5e3, "flag": True}, {}, {"deep": [[{"x": None}]]}]
    for number, text in enumerate((json.dumps(rows), json.dumps(rows, indent=3), "[]", " [ ] ")):
        path = tmp_path / f"{number}.json"
        path.write_text(text)
        assert list(read_rows(path)) == ([] if number > 1 else list(enumerate(rows, start=1)))


def test_damaged_files_are_named_with_the_last_place_read(tmp_path):
    for name in ("array.json.gz", "rows.csv.gz", "rows.parquet"):
        WRITERS[name](tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=rf"^{tmp_path / name}, after (line|item|row) \d+: "):
            load_examples(tmp_path / name)
    (tmp_path / "latin.csv").write_bytes("question\nOù?\n".encode("latin-1"))
    with pytest.raises(DataError, match="latin.csv, after line 0: not UTF-8 text"):
        load_examples(tmp_path / "latin.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: the data set cannot be loaded"):
        load_examples(tmp_path / "empty")


def test_broken_lines_can_be_passed_over(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\nnot json\n\xff\n[]\n{"a": 5}\n')
    errors = []
    assert list(read_rows(path, errors.append)) == [(1, {"a": 1}), (5, {"a": 5})]
    assert [str(error).partition(": ")[0] for error in errors] == [f"{path}, line {number}" for number in (2, 3, 4)]


def test_a_number_with_too_many_digits_is_named_with_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"a": 1}}\n{{"a": {"1" * 5000}}}\n')
    with pytest.raises(DataError, match="a.jsonl, line 2: malformed JSON, a number has too many digits.$"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("name", "text", "broken"),
    [
        ("a.csv", 'a,docs\n1,[]\n2\n3,x\n4,"[""d""]"\n', ["line 3", "line 4"]),
        ("a.json", '[{"a": "1"}, 3, [], {"a": "4"}]', ["item 2", "item 3"]),
    ],
)
def test_broken_records_and_items_can_be_passed_over(tmp_path, name, text, broken):
    path, errors = tmp_path / name, []
    path.write_text(text)
    assert [row["a"] for _, row in read_rows(path, errors.append)] == ["1", "4"]
    assert [str(error).partition(": ")[0] for error in errors] == [f"{path}, {place}" for place in broken]


def test_scp_rows_come_from_every_kind_of_file(tmp_path):
    rows = [{"data_type": "qa", "question": ["Who?"], "answers": ["Mara"], "docs": ["Mara is here."]}] * 2
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "scp.parquet"))
    assert load_scp(tmp_path / "scp.parquet") == rows


# Streaming and writing


@pytest.mark.parametrize("name", ["many.jsonl.gz", "many.csv", "many.json"])
def test_a_long_file_is_read_one_question_at_a_time(tmp_path, monkeypatch, name):
    rows = [{**ROWS[1], "id": str(number), "docs": [f"{number} " * 2500, "x"]} for number in range(600)]
    path = tmp_path / name
    if name.endswith("json"):
        path.write_text(json.dumps(rows))
    else:
        write_csv(path, rows) if name.endswith("csv") else write_jsonl(path, rows)
    monkeypatch.setattr("clara_hf.data.sources.CHUNK", 2**16)
    size = sum(len(row["docs"][0]) for row in rows)
    del rows
    tracemalloc.start()
    try:
        assert sum(1 for _ in iter_examples(path)) == 600
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size / 4


def test_half_a_surrogate_pair_is_written_and_read_as_it_is(tmp_path):
    rows = [{"text": "a\ud800b"}, {"text": "東京"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert [row for _, row in read_rows(tmp_path / "a.jsonl")] == rows


def test_equal_rows_give_equal_files_and_a_failed_write_leaves_the_old_one(tmp_path):
    path = tmp_path / "new" / "a.jsonl.gz"
    assert write_jsonl(path, ROWS) == 5
    before = path.read_bytes()
    os.utime(path, (1, 1))
    write_jsonl(path, iter(ROWS))
    assert path.read_bytes() == before

    def broken():
        yield ROWS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(path, broken())
    assert path.read_bytes() == before and os.listdir(path.parent) == ["a.jsonl.gz"]


# Names, endings and damage


@pytest.mark.parametrize("name", ["q[1]", "q?", "q*", "q{1}", "a::b", "a,b", "q[!a]"])
@pytest.mark.parametrize("kind", ["{}.parquet", "{}.jsonl", "{}/train.jsonl", "{}/train.parquet", "{}/saved"])
def test_a_path_is_a_path_and_never_a_pattern(tmp_path, name, kind):
    decoys = ["q1", "qa", "qq", "b", "q", "a"]
    for folder, rows in [("plain", ROWS), *((decoy, ROWS[:1]) for decoy in decoys)]:
        path = tmp_path / kind.format(folder)
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".jsonl":
            write_jsonl(path, rows)
        elif path.suffix == ".parquet":
            dataset(rows).to_parquet(str(path))
        else:
            dataset(rows).save_to_disk(str(path))
    top = kind.partition("/")[0]
    os.rename(tmp_path / top.format("plain"), tmp_path / top.format(name))
    given = tmp_path / kind.format(name)
    assert load_examples(given) == EXAMPLES
    if "/" in kind and "saved" not in kind:
        assert load_examples(given.parent) == EXAMPLES
    listed = f"{given},{tmp_path / kind.format('q1')}"
    assert split(listed) == [str(given), str(tmp_path / kind.format("q1"))]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, zstandard.compress])
@pytest.mark.parametrize("name", ["rows.jsonl{}", "ROWS.JSON{}", "rows.Csv{}"])
def test_packed_files_are_read_whatever_the_case_and_a_cut_is_told(tmp_path, pack, name):
    ending = {gzip.compress: ".GZ", bz2.compress: ".Bz2", zstandard.compress: ".zst"}[pack]
    plain = tmp_path / name.format("").lower()
    WRITERS[plain.name](plain)
    path = tmp_path / name.format(ending)
    parts = [plain.read_bytes()[:200], plain.read_bytes()[200:]]
    path.write_bytes(b"".join(map(pack, parts)))
    assert load_examples(path) == EXAMPLES and source_name(path) == path.name.split(".")[0]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=rf"^{re.escape(str(path))}, after (line|item) \d+: "):
        load_examples(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=rf"^{re.escape(str(path))}, after line 0: "):
        load_examples(path)


def test_arrow_files_and_other_folders_are_read(tmp_path):
    saved = dataset()
    for name, writer in {"file": pyarrow.ipc.new_file, "stream": pyarrow.ipc.new_stream}.items():
        with writer(tmp_path / f"{name}.arrow", saved.data.table.schema) as out:
            out.write_table(saved.data.table)
        assert load_examples(tmp_path / f"{name}.arrow") == EXAMPLES
    with pytest.raises(DataError, match="rows.parquet.gz"):
        load_examples(tmp_path / "rows.parquet.gz")


def test_a_reader_that_aborts_after_its_last_row_has_read_the_file(tmp_path, monkeypatch):
    pyarrow.parquet.write_table(dataset().data.table, tmp_path / "rows.parquet")
    (tmp_path / "sitecustomize.py").write_text("import atexit, os\natexit.register(os.abort)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert load_examples(tmp_path / "rows.parquet") == EXAMPLES


def test_an_object_over_several_lines_is_one_row(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS[1], indent=2))
    assert load_examples(tmp_path / "a.json") == [EXAMPLES[1]]


def test_text_files_are_rows_of_text_without_a_word_lost(tmp_path, monkeypatch):
    monkeypatch.setattr("clara_hf.data.sources.TEXT_BLOCK", 50)
    for text in ("\n\n".join(["A few words."] * 30), "one\n" * 99, "word " * 80, "中文" * 70):
        (tmp_path / "A.TXT").write_text(text, encoding="utf-8")
        rows = list(read_rows(tmp_path / "A.TXT"))
        assert [number for number, _ in rows] == list(range(1, len(rows) + 1)) and len(rows) > 5
        assert "".join("".join(row["text"] for _, row in rows).split()) == "".join(text.split())


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_whatever_byte_of_a_table_is_wrong_is_one_sentence(tmp_path, form):
    """Flipped bytes give rows, or one sentence with the file's name: no other error, and the process lives."""
    rows = [{"id": str(number), "text": f"some text {number} ü" * 5, "n": [number]} for number in range(40)]
    path = tmp_path / f"t.{form}"
    table = pyarrow.Table.from_pylist(rows)
    if form == "parquet":
        pyarrow.parquet.write_table(table, path, compression="none")
    else:
        with pyarrow.ipc.new_file(path, table.schema) as out:
            out.write_table(table)
    whole, chance, told = path.read_bytes(), random.Random(0), 0
    for _ in range(12):
        damaged = bytearray(whole)
        for _ in range(8):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            list(read_rows(path))
        except DataError as error:
            told += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error)
    assert told > 3


def test_a_string_that_is_no_utf8_is_named_with_its_file(tmp_path):
    array = pyarrow.array([b"good", b"\xff\xfe"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": array}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet.*UTF"):
        list(read_rows(tmp_path / "t.parquet"))


def test_a_reader_that_dies_is_told_with_its_signal(tmp_path, monkeypatch):
    dataset().to_parquet(str(tmp_path / "t.parquet"))
    killer = tmp_path / "worker.py"
    killer.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setattr("clara_hf.data.tables.WORKER", killer)
    with pytest.raises(DataError, match=r"t\.parquet, after row 0: .*signal 11"):
        list(read_rows(tmp_path / "t.parquet"))
