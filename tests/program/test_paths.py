import pytest

from clara_hf.program.paths import is_plain_name


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "..\\a", "C:a", "a\0b", 3, None])
def test_a_name_that_could_lead_out_of_its_folder_on_any_system_is_none(name):
    assert not is_plain_name(name)


@pytest.mark.parametrize("name", ["a", "a.b", "...", "a b", "ä-1"])
def test_other_names_are_plain(name):
    assert is_plain_name(name)
