"""From records to results, and from results to tables."""

import csv
import io
import json

import pytest

from clara_hf.data.schema import QAExample
from clara_hf.evaluation import report
from clara_hf.evaluation.reference import published_figures
from clara_hf.evaluation.report import costs_csv, format_costs, format_tables, scores_csv
from clara_hf.evaluation.results import Results, compare, dataset_results, summarize


def number(value, low, high, n):
    return {"value": value, "low": low, "high": high, "n": n}


RESULTS = {
    "systems": {
        "clara": {"f1": number(0.8125, 0.75, 0.87, 40), "recall@1": number(1, 1, 1, 30), "mrr": number(1, 1, 1, 30)},
        "no-memory": {"f1": number(0, 0, 0, 40)},
    },
    "seconds": 1.0,
    "settings": {"seed": 0},
}


def test_a_metric_is_summarized_over_the_records_that_have_it():
    records = [
        {"scores": {"em": 1.0, "f1": 1.0, "mrr": 0.5}},
        {"scores": {"em": 0.0, "f1": 0.5}},
        {"scores": {}},
    ]
    summary = summarize(records, seed=0)
    assert {name: (entry["value"], entry["n"]) for name, entry in summary.items()} == {
        "em": (0.5, 2),
        "f1": (0.75, 2),
        "mrr": (0.5, 1),
    }
    assert all(entry["low"] <= entry["value"] <= entry["high"] for entry in summary.values())


def test_types_are_summarized_apart():
    kinds = ["single", "two-hop", "two-hop", None]
    examples = [QAExample(str(i), "q", ["a"], ["d"], None, kind) for i, kind in enumerate(kinds)]
    records = {"gold": [{"scores": {"f1": float(i)}} for i in range(4)]}
    results = dataset_results(examples, records, seed=0)
    assert results["systems"]["gold"]["f1"]["n"] == 4
    assert list(results["by_type"]) == ["single", "two-hop"]
    assert results["by_type"]["two-hop"]["gold"]["f1"] | {"low": 1, "high": 2} == number(1.5, 1, 2, 2)
    untyped = [QAExample("1", "q", ["a"], ["d"])]
    assert "by_type" not in dataset_results(untyped, {"gold": records["gold"][:1]}, seed=0)


def test_the_terminal_table_is_aligned_and_says_what_is_missing():
    lines = format_tables(RESULTS).splitlines()
    assert lines[:4] == [
        "system                    F1                   R@1        n",
        "─────────  ─────────────────  ────────────────────  ───────",
        "clara      81.2 [75.0, 87.0]  100.0 [100.0, 100.0]  40 / 30",
        "no-memory     0.0 [0.0, 0.0]                     –   40 / –",
    ]


def test_the_markdown_table_has_as_many_cells_in_every_row_and_a_heading_per_part():
    text = format_tables(
        {"datasets": {"nano": {**RESULTS, "by_type": {"single": RESULTS["systems"]}}, "real": RESULTS}}, "markdown"
    )
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 12 and len({row.count("|") for row in rows[:8]}) == 1
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        *("## nano", "## nano, type single", "## real"),
    ]


COSTS = {
    "clara": {
        **{"compress_ms": 1234.56, "query_ms": 2.0, "decode_ms": 3.0, "total_ms": 1239.56, "total_ms_stored": 5.0},
        **{"prompt_tokens": 40.25, "peak_mib": 100.0},
    },
    "bm25": dict.fromkeys(
        ["compress_ms", "query_ms", "decode_ms", "total_ms", "total_ms_stored", "prompt_tokens", "peak_mib"]
    ),
}
PUBLISHED = [
    {"system": "BM25", "pool": "oracle", "base": "Some-7B", "source": "a paper", "values": {"recall@1": 0.25}},
]


def test_systems_that_are_not_distinguishable_share_a_letter_in_every_form_of_the_table():
    systems = {name: {"f1": number(value, 0, 1, 9)} for name, value in (("x", 0.9), ("y", 0.5), ("z", 0.1))}
    pairs = [("x", "y", 0.2), ("y", "z", 0.2), ("x", "z", 0.001)]
    tests = {"f1": [{"a": a, "b": b, "p_holm": p} for a, b, p in pairs]}
    results = {"systems": systems, "tests": tests}
    lines = format_tables(results).splitlines()
    assert "90.0 [0.0, 100.0] a  " in lines[2] and "50.0 [0.0, 100.0] ab" in lines[3]
    assert "10.0 [0.0, 100.0] b" in format_tables(results, form="markdown")
    rows = list(csv.DictReader(io.StringIO(scores_csv(results))))
    assert [(row["system"], row["letters"], row["value"]) for row in rows] == [
        *(("x", "a", "0.9"), ("y", "ab", "0.5"), ("z", "b", "0.1")),
    ]


def test_tests_cover_every_metric_that_two_systems_have():
    rows = [{"scores": {"f1": float(place % 2), "mrr": 0.5}} for place in range(6)]
    only = [{"scores": {"f1": 0.0}} for _ in range(6)]
    found = compare({"a": rows, "b": only, "c": only}, seed=0)
    assert {metric: len(tests) for metric, tests in found.items()} == {"f1": 3}
    assert (found["f1"][0]["a"], found["f1"][0]["b"], found["f1"][0]["difference"]) == ("a", "b", 0.5)


def test_published_figures_stand_apart_and_are_named_so():
    results = {"datasets": {"hotpotqa_dev": {**RESULTS, "published": PUBLISHED}}}
    text = format_tables(results, form="markdown")
    assert "## published, not measured here: a paper; base Some-7B" in text
    assert "| BM25   |     oracle | 25.0 |" in text
    last = scores_csv(results).splitlines()[-1]
    assert last == 'hotpotqa_dev,,"BM25, oracle",recall@1,0.25,,,,,published: a paper; base Some-7B'


def test_published_figures_without_a_shown_number_or_far_from_the_run_are_in_the_csv_alone():
    more = [
        {**PUBLISHED[0], "system": "covered", "values": {"cover_em": 0.5}},
        {**PUBLISHED[0], "system": "far", "near": False},
    ]
    both = dict.fromkeys(("hotpotqa_10", "hotpotqa_20"), {**RESULTS, "published": [*PUBLISHED, *more]})
    terminal, markdown = (format_tables({"datasets": both}, markdown) for markdown in ("text", "markdown"))
    assert terminal.count("BM25") == 1 and "hotpotqa_10, hotpotqa_20, published" in terminal
    assert "covered" not in terminal and "covered" in markdown
    assert "far" not in terminal + markdown and scores_csv({"datasets": both}).count('"far, oracle"') == 2


@pytest.mark.parametrize(
    ("name", "key"),
    [("hotpot_dev_distractor_v1", "hotpotqa"), ("2wikimultihop.dev", "2wiki"), ("NQ-open.dev", "nq"), ("dev", None)],
)
def test_a_data_file_belongs_to_a_published_data_set_also_under_its_official_name(tmp_path, name, key):
    numbers = {known: {"f1": 50.0} for known in ("nq", "hotpotqa", "2wiki", "musique")}
    path = tmp_path / "figures.json"
    path.write_text(json.dumps({"source": "s", "base": "b", "end_to_end": {"normal": {"x": numbers}}}))
    found = published_figures(path, {name: [QAExample("1", "q", ["a"], ["d"])]})
    assert len(found[name]) == (key is not None)


def test_published_figures_near_a_run_have_its_candidates_and_its_rate(tmp_path):
    at = {rate: {"nq": {"f1": 50.0}} for rate in ("4", "16")}
    pools = {kind: {"text": {"nq": {"f1": 40.0}}, "CLaRa": at} for kind in ("normal", "oracle")}
    path = tmp_path / "figures.json"
    path.write_text(json.dumps({"source": "s", "base": "b", "end_to_end": pools}))
    one, other = QAExample("1", "q", ["a"], ["d"], [0]), QAExample("2", "q", ["a"], ["d"])

    def near(examples, rate):
        rows = published_figures(path, {"nq": examples}, rate)["nq"]
        assert len(rows) == 6 and "rate" not in rows[0]
        return [(row["system"], row["pool"]) for row in rows if row["near"]]

    assert near([one, one], 16) == [("text", "oracle"), ("CLaRa, CR 16", "oracle")]
    assert near([one, other], 8) == [("text", "normal"), ("CLaRa, CR 4", "normal"), ("CLaRa, CR 16", "normal")]
    assert len(near([other], None)) == 6


def test_costs_are_a_table_of_their_own_with_what_was_not_measured_left_open():
    results = {**RESULTS, "costs": COSTS}
    assert "1,234.6" not in format_tables(results)
    lines = format_costs(results).splitlines()
    assert lines[3].split() == ["clara", "1,234.6", "2.0", "3.0", "1,239.6", "5.0", "40.2", "100.0"]
    assert lines[4].split() == ["bm25", *"–––––––"]
    assert costs_csv(results).splitlines()[2] == ",bm25,,,,,,,"


def test_a_bar_in_a_name_does_not_break_the_markdown_table():
    results = {"systems": {"bm25|x": {"f1": number(0.5, 0, 1, 9)}}}
    assert "bm25\\|x" in format_tables(results, form="markdown")


def test_latex_has_a_row_per_system_and_no_character_that_would_break_it():
    results = {"systems": {"bm25_x & 50%": {"f1": number(0.5, 0, 1, 9)}}}
    lines = format_tables(results, "latex").splitlines()
    assert lines[0] == r"\begin{tabular}{lrr}" and lines[-1].startswith("% ")
    assert r"bm25\_x \& 50\% & 50.0 {[}0.0, 100.0] & 9 / -- \\" in lines
    assert [line for line in lines if line.startswith("\\")][1:] == [
        *(r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}"),
    ]


def test_a_page_escapes_what_names_and_texts_hold():
    results = Results({"datasets": {"q": {"systems": {"<b>x</b>": {"f1": number(0.5, 0, 1, 9)}}, "costs": COSTS}}})
    page = results.to_html()
    assert "&lt;b&gt;x&lt;/b&gt;" in page and "<b>x</b>" not in page and "1,234.6" in page
    lens = [{"question": "Who <i>?", "tokens": [("<u", "question"), ("owl", "gold document"), ("x", "neither")]}]
    found = " ".join(report.page("a & b", [{"lens": lens}]).split())
    assert "<title>a &amp; b</title>" in found and "Who &lt;i&gt;?" in found
    assert "<u>&lt;u</u>" in found and "<b>owl</b>" in found and "· x" in found


@pytest.mark.parametrize(
    ("systems", "shown"),
    [
        (["bm25", "bi-encoder BAAI/bge-m3", "dro runs/dro"], ["bm25", "bi-encoder BAAI/bge-m3", "dro runs/dro"]),
        (["bi-encoder /home/me/models/bge/"], ["bi-encoder bge"]),
        (["bi-encoder ./bge", "text-bi-encoder ../x/bge"], ["bi-encoder bge", "text-bi-encoder bge"]),
        (["bi-encoder /a/one/bge", "bi-encoder /a/two/bge"], ["bi-encoder one/bge", "bi-encoder two/bge"]),
        (["bi-encoder /a/bge", "bi-encoder bge"], ["bi-encoder a/bge", "bi-encoder bge"]),
        ([], []),
    ],
)
def test_a_models_path_is_shown_by_what_tells_it_apart(systems, shown):
    assert list(report.shown_systems(systems).values()) == shown


def test_tables_show_no_path_and_their_csv_the_whole_name():
    name = "bi-encoder /home/me/models/bge"
    found = {"systems": {name: RESULTS["systems"]["clara"]}, "costs": {name: dict.fromkeys(report.COST_COLUMNS, 1.0)}}
    results = {"datasets": {"nano": {**found, "judge": {name: {"n": 1, "share": 1.0, "kappa": None}}}}}
    for table in (
        *(report.format_tables(results, form) for form in ("text", "markdown", "latex")),
        report.format_costs(results),
    ):
        assert "bi-encoder bge" in table and "/home" not in table
    assert name in report.scores_csv(results) and name in report.costs_csv(results)
