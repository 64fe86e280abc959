"""The package as `pyproject.toml` describes it: what is imported, what is declared, what the wheel holds."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomllib


ROOT = Path(__file__).resolve().parents[2]
OURS = {"modeling_clara", "trainers", "clara_hf"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# Distributions whose modules have another name, as far as not all of them are installed everywhere.
MODULES = {
    "bert-score": "bert_score",
    "bm25s": "bm25s",
    "beautifulsoup4": "bs4",
    "faiss-cpu": "faiss",
    "huggingface-hub": "huggingface_hub",
    "json-repair": "json_repair",
    "pylance": "lance",
    "pystemmer": "Stemmer",
    "pyyaml": "yaml",
    "rouge-score": "rouge_score",
    "scikit-learn": "sklearn",
    "sentence-transformers": "sentence_transformers",
}


def normalized(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def declared() -> set[str]:
    project = PROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {normalized(one) for group in groups for one in group} - {"clara-hf"}
    return {MODULES.get(name, name.replace("-", "_")) for name in names}


def imported(path: Path) -> set[str]:
    """Top-level modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found


def test_every_imported_package_is_declared():
    known = declared() | OURS | set(sys.stdlib_module_names)
    files = [path for name in (*OURS, "eval/metrics") for path in (ROOT / name).rglob("*.py")]
    missing = {(path.relative_to(ROOT).as_posix(), name) for path in files for name in imported(path) - known}
    assert not missing and len(files) > 50


def test_what_travels_needs_torch_transformers_and_peft_alone():
    base = {normalized(one).replace("-", "_") for one in PROJECT["project"]["dependencies"]}
    for path in (ROOT / "modeling_clara").glob("*.py"):
        needs = imported(path) - set(sys.stdlib_module_names) - {"modeling_clara"}
        assert needs <= base | {"safetensors", "huggingface_hub", "numpy", "tokenizers"}, path


def test_every_room_and_its_data_are_in_the_wheel():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    rooms = {".".join(path.parent.relative_to(ROOT).parts) for name in OURS for path in (ROOT / name).rglob("*.py")}
    assert rooms <= listed
    data = PROJECT["tool"]["setuptools"]["package-data"]
    for name in OURS:
        for path in (ROOT / name).rglob("*"):
            if path.is_file() and path.suffix not in (".py", ".pyc"):
                globs = [
                    glob
                    for room, globs in data.items()
                    for glob in globs
                    if path.match(f"{room.replace('.', '/')}/{glob}")
                ]
                assert globs, path


def test_python_is_the_one_that_the_libraries_want():
    # transformers of 5.21 and trl of 1.15 and later want 3.11.
    assert PROJECT["project"]["requires-python"] == ">=3.11"


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_a_command_that_starts_quickly(tmp_path):
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        held = set(file.namelist())
        file.extractall(tmp_path / "site")
    for name in OURS:
        for path in (ROOT / name).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert path.relative_to(ROOT).as_posix() in held
    code = "import sys; sys.path.insert(0, 'site'); from clara_hf.cli import main; main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "eval" in done.stdout and "synthesize" in done.stdout
