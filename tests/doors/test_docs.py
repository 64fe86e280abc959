"""Documentation: its Python runs and prints what it says, its links lead somewhere, its messages are the program's."""

import re
import subprocess
from pathlib import Path

import pytest
from pytest_examples import CodeExample, find_examples


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
