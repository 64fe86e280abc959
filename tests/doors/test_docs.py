"""Documentation: its Python runs and prints what it says, its links lead somewhere, its messages are the program's."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from pytest_examples import CodeExample, find_examples

from clara_hf.cli import LAUNCH, call


ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
# Blocks over a checkpoint, a store or a server of the reader's own.
PLACEHOLDERS = (
    '"OUT"',
    "user/",
    '"PATH"',
    "me/",
    "hf://",
    "localhost",
    "127.0.0.1",
    'store = MemoryStore.open("corpus"',
)


def blocks(page: Path) -> list[CodeExample]:
    found = [example for example in find_examples(page) if example.prefix == "python"]
    return [example for example in found if not any(part in example.source for part in PLACEHOLDERS)]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name_of)
def test_python_blocks_of_a_page_run_in_order_and_print_what_they_say(page, monkeypatch, tmp_path, capsys):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "docs"}
    for example in blocks(page):
        capsys.readouterr()
        exec(compile(example.source, f"{page.name}, line {example.start_line}", "exec"), names)
        said = re.findall(r"^# ?> (.*)$", example.source, re.MULTILINE)
        assert not said or capsys.readouterr().out.splitlines() == said


def shell_commands(page: Path) -> list[list[str]]:
    """The words of each command in the shell blocks of a page."""
    found = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(found).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


# Programs by their doors in the repository, and in the wheel.
DOORS = {f"recipes/{name}.py": name.replace("_", "-") for name in ("scp", "joint_data", "instruct_data", "synthesize")}
DOORS |= {"eval/run.py": "eval", "eval/analyze.py": "analyze", "eval/candidates.py": "pools"}
DOORS |= {"eval/convert.py": "convert-data", "clara_hf.original.convert": "convert"}
LAUNCHERS = ("accelerate", "torchrun", "python")


def test_options_of_the_shell_blocks_are_known_to_their_programs(capsys):
    commands = [words for page in PAGES for words in shell_commands(page)]
    seen = set()
    for words in commands:
        place = next((index for index, word in enumerate(words) if word in DOORS), None)
        if words[0] not in ("clara", *LAUNCHERS) or (words[0] in LAUNCHERS and place is None):
            continue
        name, given = (words[1], words[2:]) if words[0] == "clara" else (DOORS[words[place]], words[place + 1 :])
        with pytest.raises(SystemExit) as stop:
            call(name, [*(given[:1] if name == "store" else []), "--help"])  # `clara store` has commands of its own
        known, seen = set(re.findall(r"--[\w-]+", capsys.readouterr().out)), seen | {name}
        options = {word.partition("=")[0] for word in given if word.startswith("--")}
        assert stop.value.code == 0 and options <= known | set(LAUNCH), (name, options - known)
    assert {"ask", "synthesize", "scp", "joint-data", "joint", "eval", "publish", "serve", "pools", "convert"} <= seen


def test_the_six_commands_for_your_own_documents_run(tmp_path, monkeypatch, capsys):
    """As the page has them, with the nano model for the base and a teacher that is at hand."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "docs").mkdir()
    shown = json.loads((ROOT / "recipes/nano/quickstart/quickstart.json").read_text(encoding="utf-8"))
    for index, text in enumerate(shown["documents"]):
        (tmp_path / "docs" / f"{index}.txt").write_text(text, encoding="utf-8")
    few_steps = "--max_steps 2 --use_cpu true --disable_tqdm true"
    added = {
        "ask": ["--once", shown["questions"][0]],
        "scp": few_steps.split(),
        "joint-data": ["--validation_share", "0.3", "--size", "8"],
        "joint": few_steps.split(),
        "eval": ["--limit", "2", "--systems", "clara,bm25,gold,no-memory"],
    }
    commands = shell_commands(ROOT / "docs/your_documents.md")
    assert [words[:1] for words in commands] == [["clara"]] * 6
    for words in commands:
        line = shlex.join(words[1:]).replace("user/clara-mistral-7b", "recipes/nano/pretrained/joint")
        line = line.replace("--model qwen3-32b --base_url http://localhost:8000/v1", "--backend cloze")
        name, *given = shlex.split(line.replace("recipes/mistral-7b/", "recipes/nano/"))
        assert not call(name, [*given, *added.get(name, [])])
    said = capsys.readouterr().out
    assert "glassblower" in said and "bm25" in said.lower()


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target or target.startswith("mailto:"):
            continue
        place, _, anchor = target.partition("#")
        found = (page.parent / place).resolve() if place else page
        assert found.exists(), target
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_make_targets_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"(?<![\w/])(?:recipes|eval|docs|benchmarks|tests|examples)/[\w./-]+\.(?:py|yaml|md)", text):
        assert (ROOT / path).is_file(), path
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([\w-]+)", text, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile, target


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "index.html").is_file()


def test_every_message_of_the_troubleshooting_page_is_in_the_source():
    files = subprocess.check_output(["git", "ls-files", "modeling_clara", "clara_hf", "trainers"], cwd=ROOT, text=True)
    source = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in files.split() if name.endswith(".py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)
    page = (ROOT / "docs/reference/troubleshooting.md").read_text(encoding="utf-8")
    shown = re.findall(r"`([^`]*)`\*\*", page)
    assert len(shown) > 8
    for message in shown:
        for part in filter(None, (part.strip(" …") for part in message.split("…"))):
            assert part in joined, part
