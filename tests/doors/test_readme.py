"""The README says what is so: its Python blocks run as written, its commands and files exist."""

import re
from pathlib import Path

from conftest import build_clara


ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run_as_written(base, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 2
    build_clara(base).save_pretrained(tmp_path / "runs" / "nano" / "joint")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["memories"].shape == (2, 4, 32)
    assert names["found"].indices.shape == (1, 2) and names["found"].scores.shape == (1, 2)
    assert len(names["answers"].texts) == 1 and str(names["answers"].indices) in capsys.readouterr().out


def test_files_and_make_targets_that_it_names_exist():
    for path in re.findall(r"(?:recipes|eval|docs|benchmarks)/[\w./-]+\.(?:py|yaml|md)", README):
        assert (ROOT / path).is_file(), path
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile, target
