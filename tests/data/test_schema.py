"""The data schema: what is read, and the sentence for everything that breaks it."""

import gzip
import json

import pytest

from clara_hf.data.schema import DataError, load_examples, load_scp, read_jsonl


GOOD = {"question": "Who?", "answers": ["Mara"], "docs": ["Mara is here.", "Oren is there."], "pos_index": [0]}


def write(path, *rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def changed(**fields):
    return {**GOOD, **fields}


def without(name):
    return {key: value for key, value in GOOD.items() if key != name}


def test_fields_are_kept_and_further_keys_are_extra(tmp_path):
    row = changed(id="q7", type="two-hop", pos_index=[1, 0], dataset="nano", level=3)
    (example,) = load_examples(write(tmp_path / "a.jsonl", row))
    assert (example.id, example.question, example.answers, example.docs) == ("q7", "Who?", ["Mara"], GOOD["docs"])
    assert (example.pos_index, example.type) == ([0, 1], "two-hop")
    assert example.extra == {"dataset": "nano", "level": 3}
    assert example.gold == GOOD["docs"]


def test_id_defaults_to_the_line_number_and_blank_lines_count(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD, b"", changed(id=12), b"  ", GOOD)
    assert [example.id for example in load_examples(path)] == ["1", "12", "5"]


@pytest.mark.parametrize("row", [without("pos_index"), changed(pos_index=None), changed(pos_index=[])])
def test_gold_may_be_unknown(tmp_path, row):
    (example,) = load_examples(write(tmp_path / "a.jsonl", row))
    assert example.pos_index is None and example.gold == []


def test_answers_may_be_missing_only_where_only_retrieval_is_trained(tmp_path):
    for row in (without("answers"), changed(answers=[])):
        (example,) = load_examples(write(tmp_path / "a.jsonl", row), needs_answers=False)
        assert example.answers == []
    with pytest.raises(DataError, match="'answers' must be a list of strings"):
        load_examples(write(tmp_path / "a.jsonl", changed(answers="Mara")), needs_answers=False)
    with pytest.raises(DataError, match="the field 'answers' is missing"):
        load_examples(write(tmp_path / "a.jsonl", without("answers")))


def test_gzip_unicode_and_a_byte_order_mark_are_read(tmp_path):
    row = changed(question="Où est 東京?")
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps(row, ensure_ascii=False).encode()))
    assert load_examples(path)[0].question == "Où est 東京?"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"question": "Who?",', "malformed JSON, .* at column 21"),
        (b'["Who?"]', r'a JSON object is expected, but the line holds \["Who\?"\]'),
        (b'{"question": "\xff"}', "not UTF-8 text"),
        (without("question"), "the field 'question' is missing"),
        (without("answers"), "the field 'answers' is missing"),
        (without("docs"), "the field 'docs' is missing"),
        (changed(question=3), "'question' must be a string, but is 3"),
        (changed(question=" "), "'question' is empty"),
        (changed(answers="Mara"), "'answers' must be a list of strings, but is \"Mara\""),
        (changed(answers=[]), "'answers' is an empty list"),
        (changed(answers=["Mara", ""]), r"'answers\[1\]' is empty"),
        (changed(answers=[None]), r"'answers\[0\]' must be a string, but is null"),
        (changed(docs=[]), "'docs' is an empty list"),
        (changed(docs={"0": "x"}), "'docs' must be a list of strings"),
        (changed(docs=["x", ["y"]]), r"'docs\[1\]' must be a string"),
        (changed(docs=["x", "\n"]), r"'docs\[1\]' is empty"),
        (changed(pos_index=[2]), "gold index 2 in 'pos_index' is out of range for 2 docs"),
        (changed(pos_index=[-1]), "gold index -1 in 'pos_index' is out of range"),
        (changed(pos_index=0), "'pos_index' must be a list of integers, but is 0"),
        (changed(pos_index=[True]), "'pos_index' must be a list of integers"),
        (changed(pos_index=[0.0]), "'pos_index' must be a list of integers"),
        (changed(pos_index=[1, 1]), "'pos_index' names a document twice"),
        (changed(id=1.5), "'id' must be a string, but is 1.5"),
        (changed(id="1"), "id '1' is already used in line 1"),
        (changed(type=2), "'type' must be a string, but is 2"),
        (b'{"question": "\\ud800", "answers": ["a"], "docs": ["b"]}', "'question' holds half a surrogate pair"),
        (b'{"id": "\\ud800", "question": "q", "answers": ["a"], "docs": ["b"]}', "'id' holds half a surrogate pair"),
    ],
)
def test_a_broken_line_is_named_with_file_and_number(tmp_path, row, message):
    path = write(tmp_path / "broken.jsonl", GOOD, row, GOOD)
    with pytest.raises(DataError, match=rf"^{path}, line 2: .*{message}"):
        load_examples(path)


def test_a_long_value_is_shortened_in_the_message(tmp_path):
    with pytest.raises(DataError, match=r"but is \"x+\.\.\.\.$") as caught:
        load_examples(write(tmp_path / "a.jsonl", changed(docs="x" * 5000)))
    assert len(str(caught.value)) < 400


def test_damaged_gzip_is_named_with_the_last_good_line(tmp_path):
    # Poorly compressible rows, so that some lines come before the cut.
    rows = [changed(id=str(number), note=hex(hash((number, 1)))) for number in range(5000)]
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"^{path}, after line [1-9]\d*: .*ended before"):
        load_examples(path)
    path.write_bytes(b"no gzip at all")
    with pytest.raises(DataError, match="after line 0: "):
        load_examples(path)


def test_a_missing_or_empty_file_is_named(tmp_path):
    with pytest.raises(DataError, match="none.jsonl: the file cannot be read"):
        load_examples(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="empty.jsonl: the file holds no question"):
        load_examples(write(tmp_path / "empty.jsonl"))


def test_rows_of_any_schema_come_with_their_line_numbers(tmp_path):
    path = write(tmp_path / "a.jsonl", {"a": 1}, b"", {"b": 2})
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (3, {"b": 2})]


# Rows of the first stage

PAIRS = {"data_type": "qa", "question": ["Who?", "Where?"], "answers": ["Mara", "Here"], "docs": ["Mara is here."]}
PARAPHRASE = {"data_type": "paraphrase", "question": [], "answers": ["Here is Mara."], "docs": ["Mara is here."]}


def test_scp_rows_are_read_as_they_stand(tmp_path):
    path = write(tmp_path / "scp.jsonl", {**PAIRS, "source": "x"}, PARAPHRASE)
    assert load_scp(path) == [PAIRS, PARAPHRASE]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**PAIRS, "data_type": "list"}, "'data_type' must be 'qa' or 'paraphrase', but is \"list\""),
        ({name: PAIRS[name] for name in ("question", "answers", "docs")}, "the field 'data_type' is missing"),
        ({**PAIRS, "answers": ["Mara"]}, "there are 2 questions, but 1 answers"),
        ({**PAIRS, "question": "Who?"}, "'question' must be a list of strings"),
        ({**PAIRS, "question": []}, "'question' is an empty list"),
        ({**PAIRS, "docs": []}, "'docs' is an empty list"),
        ({**PARAPHRASE, "question": ["Who?"]}, "a paraphrase has one answer and an empty list as 'question'"),
        ({**PARAPHRASE, "question": None}, "a paraphrase has one answer and an empty list as 'question'"),
        ({**PARAPHRASE, "answers": ["a", "b"]}, "a paraphrase has one answer"),
    ],
)
def test_a_broken_scp_line_is_named_with_file_and_number(tmp_path, row, message):
    path = write(tmp_path / "scp.jsonl", PAIRS, row)
    with pytest.raises(DataError, match=rf"^{path}, line 2: .*{message}"):
        load_scp(path)


def test_a_file_without_scp_rows_is_named(tmp_path):
    with pytest.raises(DataError, match="scp.jsonl: the file holds no row"):
        load_scp(write(tmp_path / "scp.jsonl"))
