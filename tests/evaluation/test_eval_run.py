"""The evaluation from end to end: with a model made of rules, whose scores are known, and with a tiny real one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import build_clara
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from processes import exit_code
from scripted_endpoint import Endpoint, Say
from transformers import AutoModelForCausalLM

from clara_hf.evaluation import reference, report
from clara_hf.evaluation.evaluator import Evaluator
from clara_hf.evaluation.plan import DEFAULT_SYSTEMS
from clara_hf.evaluation.run import EvalSettings, main
from clara_hf.evaluation.systems import loading
from clara_hf.evaluation.systems.bm25 import BM25
from clara_hf.memory_store.store import MemoryStore
from modeling_clara import CLaRaForRetrievalGeneration


ROOT = Path(__file__).parents[2]
PEOPLE = {"Mara": "Velholm", "Oren": "Brask", "Tilda": "Quern", "Jost": "Amsel"}
DOCS = [f"{name} lives in {city}" for name, city in PEOPLE.items()]


class RuleModel:
    """Has the CLaRa model's verbs. A memory is a document's number; the best candidate is the one with the question's
    name, or the last such with `worst_first`; an answer is the last word of that document, else of the first given."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, worst_first=False, fingerprint="one"):
        self.config = SimpleNamespace(num_memory_tokens=1, hidden_size=1, top_k=1)
        self.processor = SimpleNamespace(check_user_texts=self.check_user_texts, encode_prompts=self.encode_prompts)
        self.worst_first, self.fingerprint, self.compressed = worst_first, fingerprint, []

    def compressor_fingerprint(self):
        return self.fingerprint

    def check_user_texts(self, texts, argument):
        if any("<MEM>" in text for text in texts):
            raise ValueError(f"{argument} contains '<MEM>'.")

    def encode_prompts(self, questions, num_documents):
        return {"attention_mask": torch.tensor(num_documents)[:, None]}

    def compress(self, documents, batch_size, show_progress, max_tokens_per_batch=None):
        self.compressed.extend(documents)
        return torch.tensor([[[float(DOCS.index(document))]] for document in documents])

    def retrieve(self, questions, memories, n_docs):
        indices = torch.full((len(questions), n_docs), -1)
        for row, (question, numbers) in enumerate(zip(questions, memories, strict=True)):
            order = sorted(range(len(numbers)), key=lambda place: not self._about(question, numbers[place]))
            indices[row, : len(order)] = torch.tensor(order[::-1] if self.worst_first else order)
        return SimpleNamespace(indices=indices, scores=-indices.float())

    def generate(self, questions, memories, rerank, do_sample, max_new_tokens):
        assert rerank is False and do_sample is False
        return SimpleNamespace(texts=[self._answer(*pair) for pair in zip(questions, memories, strict=True)])

    def _answer(self, question, numbers):
        best = sorted(numbers, key=lambda number: not self._about(question, number))
        return DOCS[int(best[0])].split()[-1] if best else "nowhere"

    def _about(self, question, number):
        return DOCS[int(number)].split()[0] in question


def rows():
    """Four questions over four documents; the last question does not know its gold document."""
    kinds = ["single", "single", "two-hop", "two-hop"]
    questions = [
        {"id": name, "question": f"Where does {name} live?", "answers": ["The Moon", city], "docs": DOCS, "type": kind}
        for (name, city), kind in zip(PEOPLE.items(), kinds, strict=True)
    ]
    for number in range(3):
        questions[number]["pos_index"] = [number]
    return questions


def write(path, questions):
    path.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    return str(path)


@pytest.fixture
def data(tmp_path):
    questions = rows()
    for number, question in enumerate(questions):
        question["answers"] = [question["answers"][1], f"another name {number}"]
    return write(tmp_path / "people.jsonl", questions)


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Folders with rule models in place of checkpoints: after joint training, before it, and its supervised twin."""
    found = {"joint": RuleModel(), "before": RuleModel(worst_first=True), "sup": RuleModel(fingerprint="other")}
    for name in found:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(f'"{name}"')
    made = {"top_k": 1, "compression_rate": 4}
    monkeypatch.setattr(loading, "load_clara", lambda source: found[source.folder.name])
    monkeypatch.setattr(loading, "describe_clara", lambda source: (made, found[source.folder.name].processor))
    return found


@pytest.fixture
def arguments(tmp_path, data, models):
    folders = ["--model", str(tmp_path / "joint"), "--before_joint", str(tmp_path / "before")]
    return [*folders, "--data", data, "--output_dir", str(tmp_path / "out"), "--batch_size", "3"]


def read(folder):
    """The results of a run with one data file."""
    whole = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    (found,) = whole["datasets"].values()
    return {**found, **whole}


def values(systems, metric):
    return {name: (row[metric]["value"], row[metric]["n"]) for name, row in systems.items() if metric in row}


def test_every_system_gets_the_scores_that_its_rules_give(tmp_path, arguments, capsys):
    assert exit_code(main, [*arguments, "--sup", str(tmp_path / "sup")]) == 0
    results = read(tmp_path / "out")
    expected_f1 = {
        **{"clara": (1, 4), "clara-before-joint": (0, 4), "sup": (1, 4), "bm25": (1, 4), "gold": (1, 3)},
        **{"no-memory": (0, 4), "wrong-memory": (0, 3)},
    }
    assert list(results["datasets"]) == ["people"] and {"by_type", "seconds", "settings"} <= set(results)
    assert list(results["systems"]) == [name for name in DEFAULT_SYSTEMS if name in expected_f1]
    for metric in ("f1", "em", "cover_em"):
        assert values(results["systems"], metric) == expected_f1
    ranked = {"clara": 1, "clara-before-joint": 0, "sup": 1, "bm25": 1}
    assert values(results["systems"], "recall@1") == {name: (value, 3) for name, value in ranked.items()}
    assert values(results["systems"], "all_gold@5") == {name: (1, 3) for name in ranked}
    assert results["systems"]["clara-before-joint"]["mrr"]["value"] == pytest.approx(0.25)
    low = 1 / (1 + 1.96**2 / 4)  # Wilson's
    assert results["systems"]["clara"]["f1"] == {"value": 1.0, "low": pytest.approx(low, abs=1e-4), "high": 1.0, "n": 4}
    assert values(results["by_type"]["two-hop"], "f1")["gold"] == (1, 1)
    assert values(results["by_type"]["single"], "recall@1")["clara"] == (1, 2)
    printed = capsys.readouterr().out
    assert "clara-before-joint" in printed and "type two-hop" in printed
    assert "wrong-memory" in (tmp_path / "out/table.md").read_text(encoding="utf-8")


def test_answers_are_compared_with_the_documents_that_they_were_given_from(tmp_path, arguments):
    assert exit_code(main, arguments) == 0
    # The rule's answer is a word of the document; without documents there is nothing to stand in.
    grounded = values(read(tmp_path / "out")["systems"], "grounding")
    assert grounded["wrong-memory"] == (1, 3) and grounded["clara"] == (1, 4) and "no-memory" not in grounded


def test_predictions_are_kept_per_question_with_their_scores(tmp_path, arguments):
    assert exit_code(main, arguments) == 0
    lines = (tmp_path / "out/predictions/gold.jsonl").read_text(encoding="utf-8").splitlines()
    first, *_, last = map(json.loads, lines)
    assert (first["id"], first["prediction"], first["ranking"], first["pos_index"]) == ("Mara", "Velholm", None, [0])
    assert first["scores"] == {"em": 1.0, "f1": 1.0, "cover_em": 1.0, "grounding": 1.0}
    assert (last["id"], last["prediction"], last["scores"]) == ("Jost", None, {})
    ranked = json.loads((tmp_path / "out/predictions/clara.jsonl").read_text(encoding="utf-8").splitlines()[1])
    assert ranked["ranking"] == [1, 0, 2, 3] and ranked["scores"]["recall@1"] == 1


def test_documents_are_compressed_once_per_compressor(tmp_path, arguments, models):
    assert exit_code(main, [*arguments, "--sup", str(tmp_path / "sup")]) == 0
    assert models["joint"].compressed == DOCS and models["sup"].compressed == DOCS
    assert models["before"].compressed == []


def test_top_k_and_limit_are_obeyed(tmp_path, arguments):
    assert exit_code(main, [*arguments, "--systems", "clara-before-joint", "--top_k", "4", "--limit", "2"]) == 0
    results = read(tmp_path / "out")
    assert values(results["systems"], "f1") == {"clara-before-joint": (1, 2)}


def test_several_data_files_stand_under_their_names(tmp_path, arguments, data):
    other = write(tmp_path / "others.jsonl", rows()[:2])
    arguments[arguments.index(data)] = f"{data},{other}"
    assert exit_code(main, [*arguments, "--systems", "gold,clara"]) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert list(results) == ["datasets", "checkpoints", "seconds", "settings"]
    assert list(results["datasets"]) == ["people", "others"]
    assert values(results["datasets"]["others"]["systems"], "f1") == {"clara": (1, 2), "gold": (1, 2)}
    assert (tmp_path / "out/predictions/others/clara.jsonl").exists()


def test_without_a_model_only_the_retrieval_of_bm25_is_measured(tmp_path, data):
    assert exit_code(main, ["--data", data, "--output_dir", str(tmp_path / "out")]) == 0
    results = read(tmp_path / "out")
    assert list(results["systems"]) == ["bm25"]
    assert EvalSettings(data=data, systems="bm25,cross-encoder a/b").folder().name == "bm25-cross-encoder-a-b-people"
    assert "f1" not in results["systems"]["bm25"] and results["systems"]["bm25"]["recall@1"]["n"] == 3


def test_systems_without_what_they_need_are_left_out(tmp_path, arguments, data):
    for question in (questions := rows()):
        question.pop("pos_index", None)
    write(Path(data), questions)
    assert exit_code(main, arguments) == 0
    assert list(read(tmp_path / "out")["systems"]) == ["clara", "clara-before-joint", "bm25", "no-memory"]


def test_a_finished_run_with_equal_settings_is_reused_and_another_is_refused(tmp_path, arguments, models, capsys):
    assert exit_code(main, arguments) == 0
    written = (tmp_path / "out/results.json").read_bytes()
    table = capsys.readouterr().out
    models["joint"].compress = None
    assert exit_code(main, arguments) == 0
    assert capsys.readouterr().out == table
    assert exit_code(main, [*arguments, "--top_k", "2"]) == 2
    assert f"{tmp_path / 'out'} holds another run's results" in (error := capsys.readouterr().err)
    assert "--output_dir" in error and "--overwrite" in error
    # What would leave something out is another run, too.
    for fewer in (["--systems", "clara"], ["--limit", "3"]):
        assert exit_code(main, [*arguments, *fewer]) == 2
    (tmp_path / "joint/config.json").write_text('"retrained"')
    assert exit_code(main, arguments) == 2
    assert (tmp_path / "out/results.json").read_bytes() == written


def test_overwrite_repeats_the_run_and_gives_the_same_numbers(tmp_path, arguments):
    assert exit_code(main, arguments) == 0
    first = read(tmp_path / "out")
    assert exit_code(main, [*arguments, "--overwrite"]) == 0
    assert read(tmp_path / "out")["systems"] == first["systems"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--systems", "clara,bm52"], "--systems: there is no system 'bm52', choose from clara, clara-before"),
        (["--systems", "sup"], "--systems: sup needs --sup."),
        (["--systems", "bi-encoder"], "--systems: bi-encoder needs the NAME of a model behind it, as in"),
        (["--systems", "bm25 words"], "--systems: bm25 takes no NAME, but is followed by 'words'."),
        (["--systems", "clara,clara"], "--systems: clara and clara would share a file: name one of them once."),
        (["--llmlingua_rate", "0.5"], "--llmlingua_rate must be at least 1, but is 0.5."),
        (["--reference", "none.json"], "--reference: there is no file none.json."),
        (["--systems", ","], "--systems names no system."),
        (["--systems", "memory-sup"], "--systems: memory-sup needs --sup."),
        (["--sup", "no/such/folder"], "--sup: there is no folder no/such/folder."),
        (["--data", "none.jsonl"], "--data: there is no file none.jsonl."),
        (["--data", ","], "--data names no file."),
        (["--limit", "0"], "--limit must be at least 1, but is 0."),
        (["--batch_size", "-1"], "--batch_size must be at least 1, but is -1."),
        (["--seed", "-1"], "--seed must be at least 0, but is -1."),
    ],
)
def test_what_cannot_be_carried_out_is_one_sentence_and_exit_code_2(tmp_path, arguments, capsys, changes, message):
    assert exit_code(main, [*arguments, *changes]) == 2
    error = capsys.readouterr().err
    assert " error: " in error and message in error and error.count("\n") == 1
    assert not (tmp_path / "out/results.json").exists()


def test_unknown_arguments_end_with_exit_code_2(arguments, capsys):
    assert exit_code(main, [*arguments, "--sistems", "clara"]) == 2
    error = capsys.readouterr().err
    assert "--sistems" in error and "did you mean --systems" in error


def test_questions_may_come_from_other_kinds_of_files(tmp_path, data):
    Dataset.from_list([json.loads(line) for line in Path(data).read_text().splitlines()]).save_to_disk(tmp_path / "set")
    (tmp_path / "array.json").write_text("[" + ",".join(Path(data).read_text().splitlines()) + "]")
    sources = f"{tmp_path / 'set'},{tmp_path / 'array.json'},{data}"
    assert exit_code(main, ["--data", sources, "--output_dir", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out/results.json").read_text())["datasets"]
    assert list(found) == ["set", "array", "people"]
    assert found["set"]["systems"] == found["array"]["systems"] == found["people"]["systems"]


def test_data_files_must_have_different_names(tmp_path, data, capsys):
    assert exit_code(main, ["--data", f"{data},{data}"]) == 2
    assert "would share the name 'people'" in capsys.readouterr().err


def test_a_broken_line_is_named_and_earlier_results_stay(tmp_path, arguments, data, capsys):
    assert exit_code(main, arguments) == 0
    before = (tmp_path / "out/results.json").read_bytes()
    questions = rows()
    questions[2]["pos_index"] = [4]
    write(Path(data), questions)
    assert exit_code(main, [*arguments, "--overwrite"]) == 2
    assert "people.jsonl, line 3: gold index 4 in 'pos_index' is out of range for 4 docs" in capsys.readouterr().err
    assert (tmp_path / "out/results.json").read_bytes() == before


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_broken_file_leaves_no_mark_that_would_stop_the_mended_one(tmp_path, arguments, data, overwrite):
    sound = Path(data).read_text()
    Path(data).write_text(sound + '{"question": "Who"')
    assert exit_code(main, [*arguments, *overwrite]) == 2
    assert not (tmp_path / "out").exists()
    Path(data).write_text(sound)
    assert exit_code(main, arguments) == 0


def test_a_text_that_the_model_cannot_read_is_named_by_its_question(arguments, data, capsys):
    questions = rows()
    questions[1]["question"] = "What is <MEM>?"
    write(Path(data), questions)
    assert exit_code(main, arguments) == 2
    assert "people, question 'Oren': question contains '<MEM>'." in capsys.readouterr().err


def test_questions_that_share_their_answer_have_no_wrong_memory_and_that_is_told(tmp_path, arguments, data, capsys):
    same = [{**question, "answers": ["Velholm"]} for question in rows()]
    write(Path(data), same)
    assert exit_code(main, [*arguments, "--systems", "wrong-memory"]) == 2
    error = capsys.readouterr().err
    assert "people: nothing can be scored: wrong-memory needs another question with other answers" in error
    assert not (tmp_path / "out").exists()
    assert exit_code(main, [*arguments, "--systems", "wrong-memory,gold"]) == 0
    assert list(read(tmp_path / "out")["systems"]) == ["gold"]


def test_the_twins_ranking_is_read_by_the_models_generator(tmp_path, arguments, models):
    own = RuleModel(fingerprint="other", worst_first=True)
    own._answer = lambda question, numbers: "its own"
    models["sup"] = own
    arguments += ["--sup", str(tmp_path / "sup"), "--systems"]
    assert exit_code(main, [*arguments, "memory-sup,sup,clara"]) == 0
    systems = read(tmp_path / "out")["systems"]
    assert list(systems) == ["clara", "sup", "memory-sup"]
    # The last candidate but for the question's own, read by the rule of the model.
    assert values(systems, "recall@1") == {"clara": (1, 3), "sup": (0, 3), "memory-sup": (0, 3)}
    lines = {name: (tmp_path / f"out/predictions/{name}.jsonl").read_text().splitlines() for name in systems}
    read_by = {name: [json.loads(line)["prediction"] for line in found] for name, found in lines.items()}
    assert read_by["sup"] == ["its own"] * 4 and read_by["memory-sup"] == ["Amsel"] * 3 + ["Quern"]
    assert (
        exit_code(main, [*arguments[:-1], "--systems", "memory-sup,gold", "--output_dir", str(tmp_path / "alone")]) == 0
    )
    assert read(tmp_path / "alone")["systems"]["memory-sup"] == systems["memory-sup"]


def verdict(messages, body, before):
    """Right is what an accepted answer is; what is said of Brask is no verdict."""
    asked = json.loads(messages[0]["content"].split("\n\n")[1])
    if asked["answer"] == "Brask":
        return Say("I cannot tell.")
    # The judge is stricter than F1 with one question.
    return Say(json.dumps({"correct": asked["answer"] in asked["accepted"] and "Tilda" not in asked["question"]}))


def test_a_judge_is_asked_once_per_answer_and_set_beside_f1(tmp_path, arguments, models, monkeypatch):
    assert exit_code(main, arguments) == 0
    monkeypatch.setattr(RuleModel, "generate", None)  # the answers are there
    monkeypatch.setenv("JUDGE_KEY", "a-key-of-some-length")
    with Endpoint(verdict) as endpoint:
        judged = [*arguments, "--judge", endpoint.url, "--judge_model", "m", "--judge_key_env", "JUDGE_KEY"]
        assert exit_code(main, judged) == 0
        asked = {body["messages"][0]["content"] for body in endpoint.requests}
        assert endpoint.headers[0]["Authorization"] == "Bearer a-key-of-some-length"
        assert {body["model"] for body in endpoint.requests} == {"m"}
        results, count = read(tmp_path / "out"), len(endpoint.requests)
        assert exit_code(main, [*judged, "--overwrite"]) == 0
        # A verdict is asked for again only where there was none.
        assert all('"answer": "Brask"' in body["messages"][0]["content"] for body in endpoint.requests[count:])
    assert len(asked) == count
    # Of four answers from memories three are right: one has no verdict, one is not good enough for the judge.
    gold = results["systems"]["gold"]
    assert (gold["f1"]["value"], gold["judged"]["value"], gold["judged"]["n"]) == (1, 0.5, 2)
    assert results["judge"]["gold"] == {"n": 2, "share": 0.5, "kappa": 0.0}
    table = (tmp_path / "out/table.md").read_text()
    assert "judge beside F1" in table and "| judged |" in table.replace("  ", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--judge", "http://127.0.0.1:9/v1"], "--judge_model"),
        (["--judge_model", "m"], "--judge"),
        (["--judge", "ftp://host", "--judge_model", "m"], "--judge must be an address such as"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_one_sentence(tmp_path, arguments, capsys, options, message):
    assert exit_code(main, [*arguments, *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_nothing_to_score_is_an_error(tmp_path, data, capsys):
    for question in (questions := rows()):
        question.pop("pos_index", None)
    write(Path(data), questions)
    assert exit_code(main, ["--data", data, "--output_dir", str(tmp_path / "out")]) == 2
    assert "nothing can be scored: bm25 needs pos_index, or --model to answer with." in capsys.readouterr().err


def test_a_file_without_anything_to_score_stops_a_run_before_it_begins(tmp_path, data, monkeypatch, capsys):
    questions = [{name: value for name, value in row.items() if name != "pos_index"} for row in rows()]
    other = write(tmp_path / "unknown.jsonl", questions)
    monkeypatch.setattr(BM25, "load", None)
    assert exit_code(main, ["--data", f"{data},{other}", "--output_dir", str(tmp_path / "out")]) == 2
    assert "unknown: nothing can be scored: bm25 needs" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [(KeyboardInterrupt(), 130, "interrupted"), (OSError(28, "No space left on device"), 1, "No space left on device")],
)
def test_interruption_and_a_full_disk_are_one_sentence(arguments, monkeypatch, capsys, error, code, message):
    def fail(*_):
        raise error

    monkeypatch.setattr(report, "scores_csv", fail)
    assert exit_code(main, arguments) == code
    assert message in capsys.readouterr().err


# A tiny real model


@pytest.fixture
def checkpoint(clara, tmp_path):
    clara.save_pretrained(tmp_path / "clara")
    return str(tmp_path / "clara")


def test_all_systems_run_with_a_real_checkpoint_and_repeat_exactly(tmp_path, checkpoint, base, data):
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules="all-linear"))
    adapted.save_pretrained(tmp_path / "text")
    options = {"before_joint": checkpoint, "sup": checkpoint, "text_model": str(tmp_path / "text"), "max_new_tokens": 4}
    first, second = (Evaluator(data, **options)(checkpoint) for _ in range(2))
    (found,) = first.datasets.values()
    assert list(found["systems"]) == list(DEFAULT_SYSTEMS)
    counts = {name: row["f1"]["n"] for name, row in found["systems"].items()}
    assert counts == {name: 3 if name in ("gold", "text-gold", "wrong-memory") else 4 for name in DEFAULT_SYSTEMS}
    (again,) = second.datasets.values()
    assert second.records == first.records
    assert again["systems"] == found["systems"] and again["tests"] == found["tests"]


@pytest.mark.parametrize("kind", ["empty", "without weights", "another model"])
def test_a_folder_without_a_clara_model_is_one_sentence(tmp_path, checkpoint, base, data, capsys, kind):
    (tmp_path / "empty").mkdir()
    (tmp_path / "clara/model.safetensors").unlink()
    folder = {"empty": tmp_path / "empty", "without weights": checkpoint, "another model": base}[kind]
    assert exit_code(main, ["--model", str(folder), "--data", data, "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f" error: --model: {folder}" in error and error.count("\n") == 1


def test_the_script_runs_from_any_folder(tmp_path, data):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "eval/run.py"), "--data", "people.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head = done.stdout.splitlines()[0].split()
    assert head[:2] == ["system", "R@1"] and done.stdout.splitlines()[2].startswith("bm25")
    assert (tmp_path / "runs/eval/bm25-people/results.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", pytest.param("cp1252", marks=pytest.mark.long)])
def test_a_terminal_that_cannot_print_gets_the_table_in_what_it_can(tmp_path, data, encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    command = [sys.executable, str(ROOT / "eval/run.py"), "--data", data, "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "bm25" in done.stdout.decode(encoding)
    assert "–" in (tmp_path / "out/costs.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_models_are_named_as_on_the_hub_with_and_without_a_revision(tmp_path, checkpoint, data):
    """What the Hub's own client keeps of a model, in place of the Hub."""
    kept, commit = tmp_path / "hub" / "models--user--clara", "0123456789012345678901234567890123456789"
    shutil.copytree(checkpoint, kept / "snapshots" / commit)
    (kept / "refs").mkdir()
    for name in ("main", "v1"):
        (kept / "refs" / name).write_text(commit)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [
        sys.executable,
        str(ROOT / "eval/run.py"),
        "--data",
        data,
        "--systems",
        "clara,gold",
        "--max_new_tokens",
        "3",
    ]
    for model in ("user/clara@v1", checkpoint):
        out = tmp_path / f"out{len(model)}"
        done = subprocess.run(
            [*command, "--model", model, "--output_dir", str(out)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    named, local = (tmp_path / f"out{len(model)}" for model in ("user/clara@v1", checkpoint))
    assert read(named)["systems"] == read(local)["systems"]
    assert commit in read(named)["settings"]["sha256"]["user/clara@v1"]


def test_memories_of_a_store_give_the_same_answers_and_are_added_once(tmp_path, checkpoint, data, monkeypatch):
    arguments = ["--model", checkpoint, "--data", data, "--systems", "clara,gold", "--max_new_tokens", "4"]
    store = ["--memory_store", str(tmp_path / "store")]
    assert exit_code(main, [*arguments, "--output_dir", str(tmp_path / "plain")]) == 0
    assert exit_code(main, [*arguments, *store, "--output_dir", str(tmp_path / "first")]) == 0
    monkeypatch.setattr(CLaRaForRetrievalGeneration, "compress", None)
    assert exit_code(main, [*arguments, *store, "--output_dir", str(tmp_path / "second")]) == 0
    plain, first, second = (read(tmp_path / name) for name in ("plain", "first", "second"))
    assert plain["systems"] == first["systems"] == second["systems"]
    compress = [results["costs"]["clara"]["compress_ms"] for results in (plain, first, second)]
    assert compress[0] > 0 and compress[1] > 0 and compress[2] is None
    costs = plain["costs"]["clara"]
    assert costs["total_ms"] == pytest.approx(costs["compress_ms"] + costs["total_ms_stored"])


def test_a_recoded_store_reuses_no_answer_of_its_earlier_form(tmp_path, checkpoint, data):
    arguments = ["--model", checkpoint, "--data", data, "--systems", "clara,gold", "--max_new_tokens", "4"]
    arguments += ["--memory_store", str(tmp_path / "store"), "--output_dir"]
    assert exit_code(main, [*arguments, str(tmp_path / "plain")]) == 0
    MemoryStore.open(tmp_path / "store", CLaRaForRetrievalGeneration.from_pretrained(checkpoint)).recode("rotated2")
    assert exit_code(main, [*arguments, str(tmp_path / "fresh")]) == 0
    assert exit_code(main, [*arguments, str(tmp_path / "plain")]) == 2
    assert exit_code(main, [*arguments, str(tmp_path / "plain"), "--overwrite", "true"]) == 0
    plain, fresh = (
        {path.relative_to(tmp_path / name): path.read_text() for path in (tmp_path / name).rglob("predictions/*.jsonl")}
        for name in ("plain", "fresh")
    )
    assert plain and plain == fresh


def test_a_store_of_another_compressor_is_one_sentence(tmp_path, checkpoint, base, data, capsys):
    MemoryStore.open(tmp_path / "store", build_clara(base, seed=5))
    arguments = ["--model", checkpoint, "--data", data, "--memory_store", str(tmp_path / "store")]
    assert exit_code(main, [*arguments, "--output_dir", str(tmp_path / "out")]) == 2
    assert "error: --memory_store: the memories in" in capsys.readouterr().err


# Settings from a file, and published figures


def test_a_yaml_file_gives_settings_that_the_command_line_overrides(tmp_path, data):
    (tmp_path / "e.yaml").write_text(
        f"data: [{data}]\nsystems: [bm25]\nlimit: 2\nseed: 3\nmodel: null\noverwrite: true\n"
    )
    assert (
        exit_code(main, [f"--config={tmp_path / 'e.yaml'}", "--limit", "1", "--output_dir", str(tmp_path / "out")]) == 0
    )
    results = read(tmp_path / "out")
    assert (results["settings"]["seed"], results["settings"]["limit"]) == (3, 1)
    assert results["systems"]["bm25"]["recall@1"]["n"] == 1


def test_published_figures_stand_beside_the_measured_ones_of_their_data_set(tmp_path, data, capsys, monkeypatch):
    figures = {
        "source": "a paper",
        "base": "Some-7B",
        "end_to_end": {"normal": {"CLaRa": {"16": {"people": {"f1": 50.0, "em": 40.0}, "others": {"f1": 1.0}}}}},
        "retrieval": {"pool": "oracle", "BM25": {"people": {"recall@1": 25.0}}},
        "compressor_cover_em": {"normal": {"text": {"peo": 54.0}}},
    }
    (tmp_path / "figures.json").write_text(json.dumps(figures))
    arguments = ["--data", data, "--output_dir", str(tmp_path / "out"), "--reference", str(tmp_path / "figures.json")]
    assert exit_code(main, arguments) == 0
    published = read(tmp_path / "out")["published"]
    assert [(row["system"], row["pool"], row["base"], row["values"]) for row in published] == [
        ("CLaRa, CR 16", "normal", "Some-7B", {"f1": 0.5, "em": 0.4}),
        ("text", "normal", "Some-7B", {"cover_em": 0.54}),
        ("BM25", "oracle", "Some-7B", {"recall@1": 0.25}),
    ]
    assert "## published, not measured here: a paper; base Some-7B" in (tmp_path / "out/table.md").read_text()
    names = ("table.md", "table.csv")
    tables = [(tmp_path / "out" / name).read_text() for name in names]
    # A finished run takes them up, too, and loses nothing when it is repeated without them.
    later = ["--data", data, "--output_dir", str(tmp_path / "later")]
    assert exit_code(main, later) == 0 and "published" not in read(tmp_path / "later")
    predictions = (tmp_path / "later/predictions/bm25.jsonl").stat()
    for more in (["--reference", str(tmp_path / "figures.json")], []):
        assert exit_code(main, [*later, *more]) == 0
        assert read(tmp_path / "later")["published"] == published
        assert [(tmp_path / "later" / name).read_text() for name in names] == tables
    assert (tmp_path / "later/predictions/bm25.jsonl").stat() == predictions
    assert "published, not measured here: a paper" in capsys.readouterr().out
    other = write(tmp_path / "unknown.jsonl", rows())
    told = []
    monkeypatch.setattr(reference.logger, "warning", told.append)
    arguments[1:4] = [f"{data},{other}", "--output_dir", str(tmp_path / "both")]
    assert exit_code(main, arguments) == 0 and len(told) == 1
    assert "has no figures for unknown: a data file's name must begin with" in told[0]


@pytest.mark.parametrize("content", ["[]", "{", '{"end_to_end": {"normal": 3}}', '{"retrieval": {"x": {"people": 5}}}'])
def test_a_reference_of_another_form_is_one_sentence(tmp_path, data, capsys, content):
    (tmp_path / "figures.json").write_text(content)
    assert (
        exit_code(
            main, ["--data", data, "--reference", str(tmp_path / "figures.json"), "--output_dir", str(tmp_path / "o")]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert "has not the form of published figures" in error and error.count("\n") == 1
