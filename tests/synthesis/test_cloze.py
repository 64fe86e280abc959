"""Questions from one's own text without a language model: salient spans, the same checks, the same files."""

import json
import random

import pytest
from synthesis_runs import files, rows

from clara_hf.data.schema import load_scp
from clara_hf.program import UsageError
from clara_hf.synthesis import instruct_data, synthesize
from clara_hf.synthesis.backends.cloze import BLANK, MAX_PAIRS, cloze_passage, sentences, spans
from clara_hf.synthesis.checks import PassageChecks
from clara_hf.synthesis.leaks import LeakIndex
from clara_hf.synthesis.prompts import Prompts


PROMPTS = Prompts()
TEXT = (
    "The Hevelius Bridge was opened on 12 May 1911 by Queen Maud of Norway. It is 340 metres long and carries 22% of "
    "the traffic between Tarn and Upper Selby. Dr. Anna Weiss, who was born in 1868, designed it for $2.5 million. "
    "However, Weiss never saw it finished."
)


def make(text: str = TEXT, title: str = "", language: str = "en", **options) -> dict:
    head = f"{title}\n" if title else ""
    item = {"text": head + text, "start": 7, "end": 7 + len(text)}
    return cloze_passage(item, PassageChecks(item["text"], PROMPTS, LeakIndex()), language, **options)


def run(corpus: str, out, *options: str) -> dict:
    arguments = ["--corpus", corpus, "--output_dir", str(out), "--backend", "cloze", "--min_passage_tokens", "8"]
    synthesize.main([*arguments, *options])
    return json.loads((out / "stats.json").read_text(encoding="utf-8"))


def test_names_numbers_and_dates_are_found():
    found = {(s.kind, part[s.start : s.end]) for part in sentences(TEXT, "en") for s in spans(part, TEXT)}
    assert found >= {
        ("date", "12 May 1911"),
        ("year", "1868"),
        ("number", "340"),
        ("number", "22%"),
        ("number", "$2.5 million"),
        ("name", "Hevelius Bridge"),
        ("name", "Queen Maud of Norway"),
        ("name", "Upper Selby"),
    }
    # Neither what is capitalised as a sentence's first word, nor a part of a number.
    assert not {text for _, text in found} & {"The", "It", "However", "12", "2", "5", "911"}


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("As of September 2017, Indiana had 16 wind farms.", ["September 2017", "Indiana", "16"]),
        ("On the November 19, 1999, episode Carpenter won.", ["November 19, 1999", "Carpenter"]),
        ("On the Lucala River lies Kalandula.", ["Lucala River", "Kalandula"]),
        ("In New York it rains.", ["New York"]),
    ],
)
def test_what_follows_an_empty_first_word_is_a_span_of_its_own(sentence, expected):
    assert [sentence[span.start : span.end] for span in spans(sentence, sentence)] == expected


@pytest.mark.parametrize("title", ["", "Hevelius Bridge"])
def test_a_question_is_its_sentence_without_the_answer(title):
    pairs = make(title=title)["pairs"]
    assert len(pairs) >= 3
    for pair in pairs:
        masked = pair["question"].rpartition(": ")[2].removesuffix("?")
        assert masked.count(BLANK) == 1 and masked.replace(BLANK, pair["answer"]) in TEXT
        assert pair["answer"] not in pair["question"] and pair["kind"] == "simple"


def test_a_sentence_that_points_back_is_asked_for_only_with_a_title():
    without, with_title = (
        [pair["question"] for pair in make("It was led by Anna Weiss until 1880.", title)["pairs"]]
        for title in ("", "Tarn Works")
    )
    assert not without and with_title and all('"Tarn Works"' in question for question in with_title)


def test_an_answer_that_the_question_still_holds_is_not_asked_for():
    made = make("In 1868 the Weiss Bridge was built by Weiss.")
    assert [pair["answer"] for pair in made["pairs"]] == ["1868"]


def test_pairs_go_through_the_checks_of_a_models_pairs():
    made = make("The Weiss Bridge of 1868 " + "and so on " * 40 + "was built by Anna Korr.")
    assert not made["pairs"] and {entry["reason"] for entry in made["rejected"]} == {"length of the question"}


def test_other_languages_and_texts_without_a_span_raise_nothing():
    made = make("Die Brücke wurde 1911 von Königin Maud eröffnet.", language="de")
    assert {pair["answer"] for pair in made["pairs"]} & {"1911", "Königin Maud"}
    assert not any("Which" in pair["question"] for pair in made["pairs"])
    for text in (
        "nothing to ask for here, is there.",
        "天文台位于山上。" * 5,
        "1 2 3 " * 50,
        "A. B. C. " * 40,
        "— " * 50,
    ):
        assert not make(text)["covered"] or make(text)["pairs"]


def test_one_passage_gives_a_bounded_number_and_the_seed_chooses():
    text = " ".join(f"Weiss of Tarn met Lady Korr{'abcdefghijklmnop'[n]}a in {1801 + n}." for n in range(16))
    first, again, other = make(text, seed=1), make(text, seed=1), make(text, seed=2)
    assert first == again and first != other and len(first["pairs"]) == len(other["pairs"]) == MAX_PAIRS


def test_a_run_needs_no_model_and_is_the_same_whenever_it_is_stopped(tmp_path):
    chance, lines = random.Random(3), []
    for number in range(40):
        year = chance.randint(1700, 1990)
        text = f"Castle Orr {number} was sold to Count Belmar in {year}. The garden of Orr holds {number + 40} oaks."
        lines.append(json.dumps({"id": f"d{number}", "title": f"Castle {number}", "text": text}))
    corpus = tmp_path / "docs.jsonl"
    corpus.write_text("\n".join(lines), encoding="utf-8")
    stats = run(str(corpus), tmp_path / "whole", "--validation_share", "0.2")
    assert stats["requests"] == 0 and stats["pairs"] > 80 and stats["validation_rows"] > 0
    assert stats["settings"]["model"] == "cloze" and stats["paraphrases"] == 0
    run(str(corpus), tmp_path / "parts", "--validation_share", "0.2", "--limit", "7")
    run(str(corpus), tmp_path / "parts", "--validation_share", "0.2", "--concurrency", "1")
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    for row in load_scp(tmp_path / "whole" / "scp.jsonl"):
        assert all(answer in row["docs"][0] for answer in row["answers"])
    assert {row["split"] for row in rows(tmp_path / "whole" / "passages.jsonl")} == {"train", "validation"}
    # The same checks as for a model's pairs.
    (tmp_path / "test.txt").write_text("was sold to Count Belmar in\n", encoding="utf-8")
    with pytest.raises(UsageError, match="no usable passage"):
        run(str(corpus), tmp_path / "leak", "--exclude", str(tmp_path / "test.txt"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--backend", "cloze", "--model", "m"], "--model"),
        (["--backend", "http"], "--model"),
        (["--backend", "cloze", "--extra_body", '{"a": 1}'], "--extra_body"),
        (["--backend", "http", "--model", "m", "--gguf_file", "x.gguf"], "--gguf_file"),
    ],
)
def test_what_a_backend_does_not_take_is_refused(options, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        synthesize.main(["--corpus", "x", "--output_dir", str(tmp_path / "out"), *options])


def test_passages_are_written_as_their_own_targets_of_finished_runs_too(tmp_path):
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "out"
    texts = [TEXT, "nothing that a rule would ask for stands in these words, and there are enough of them to be kept"]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    before = run(str(corpus), out)
    stats = run(str(corpus), out, "--reconstruct", "true")
    written = load_scp(str(out / "scp.jsonl"))
    own = [row for row in written if row["data_type"] == "paraphrase"]
    assert [row["answers"] for row in own] == [row["docs"] for row in own] == [[text] for text in texts]
    assert stats["train_rows"] == before["train_rows"] + 2 and stats["settings"]["reconstruct"] is True
    # Rows that were written for this only are data enough.
    corpus.write_text(json.dumps({"text": texts[1]}) + "\n", encoding="utf-8")
    assert run(str(corpus), tmp_path / "other", "--reconstruct", "true")["train_rows"] == 1


def test_rules_answer_no_questions(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "Who?", "docs": ["x"]}\n', encoding="utf-8")
    arguments = ["--questions", str(tmp_path / "q.jsonl"), "--output_dir", str(tmp_path / "out"), "--backend", "cloze"]
    with pytest.raises(UsageError, match="--backend cloze"):
        instruct_data.main(arguments)
