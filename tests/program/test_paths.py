from pathlib import Path

import pytest

from clara_hf.program.paths import is_plain_name, local_path


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "..\\a", "C:a", "a\0b", 3, None])
def test_a_name_that_could_lead_out_of_its_folder_on_any_system_is_none(name):
    assert not is_plain_name(name)


@pytest.mark.parametrize("name", ["a", "a.b", "...", "a b", "ä-1"])
def test_other_names_are_plain(name):
    assert is_plain_name(name)


@pytest.mark.parametrize("name", ["~s", "~root", "~s/m", "a~", "s#1", "$HOME"])
def test_a_path_is_literal_but_for_the_home_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert local_path(name) == local_path(Path(name)) == tmp_path / name
    assert local_path("~/m") == Path("/home/someone/m") and local_path("~") == Path("/home/someone")
