"""Examples are short, and run."""

import ast
import importlib.util
import json
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def load(name: str, folder: Path = ROOT / "examples"):
    spec = importlib.util.spec_from_file_location(f"example_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_has_fewer_than_a_hundred_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 100


def test_a_folder_is_compressed_once_and_answers(tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    text = "Zora Vinson keeps a goat and comes from Galholm.\n\nDalanta is a poem. It was taken by thieves.\n"
    (tmp_path / "notes" / "a.txt").write_text(text, encoding="utf-8")
    main = load("compress_and_ask").main
    for _ in range(2):
        assert main([str(tmp_path / "notes"), "Which animal does Zora Vinson keep?"]) == "goat"
    assert "a.txt: Zora Vinson keeps a goat" in capsys.readouterr().out


def test_joint_training_from_python_improves_retrieval_on_held_out_questions(tmp_path):
    figures = load("train_joint").main(["--output_dir", str(tmp_path / "run"), "--steps", "20"])
    assert figures["after"]["eval_recall@1"] >= figures["before"]["eval_recall@1"]
    assert figures["after"]["eval_loss"] < figures["before"]["eval_loss"]
    assert (tmp_path / "run" / "config.json").is_file()


def test_evaluation_compares_with_bm25_and_the_controls(tmp_path, capsys):
    rows = load("train_joint").make_rows(12, seed=1)
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = load("evaluate_against_bm25").main([str(questions), "--cache", str(tmp_path / "cache")])
    assert found["gold_f1"] > found["wrong-memory_f1"] and "bm25_recall@1" in found
    assert "no-memory" in capsys.readouterr().out


def test_the_notebook_runs_top_to_bottom(monkeypatch):
    monkeypatch.chdir(ROOT)
    cells = json.loads((ROOT / "examples" / "clara.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            tree = ast.parse("".join(cell["source"]))
            shown = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, "cell", "exec"), names)
            if shown is not None:
                names["shown"] = eval(compile(ast.Expression(shown.value), "cell", "eval"), names)
    assert names["shown"]["right"] == "cat" and names["shown"]["wrong"] != "cat"


def test_the_quick_start_fits_a_screen_and_prints_what_the_readme_shows(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    load("quickstart", ROOT / "recipes/nano/quickstart").main([])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 36 and all(len(line) <= 120 for line in lines if not line.startswith("Q: "))
    shown = (ROOT / "README.md").read_text(encoding="utf-8").partition("```text\n")[2].partition("```")[0].splitlines()
    assert shown[0].partition(" s: ")[2] == lines[0].partition(" s: ")[2] and shown[2:] == lines[7:11]
    found = json.loads((ROOT / "recipes/nano/pretrained/joint/results.json").read_text())["datasets"]["nano-test"]
    (row,) = (line for line in lines if line.startswith("CLaRa after joint training"))
    figures = (f"{100 * found['systems']['clara'][metric]['value']:.1f}" for metric in ("f1", "recall@1", "recall@5"))
    assert row.split()[-3:] == list(figures)
