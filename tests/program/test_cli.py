"""The command `clara`: what it lists, how it dispatches, and what a training command hands to accelerate."""

import importlib.util
import os
import subprocess
import sys

import pytest

from clara_hf import cli


def call(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "clara_hf.cli", *arguments], capture_output=True, text=True)


def test_help_lists_all_commands_without_importing_torch():
    code = (
        "import atexit, sys; from clara_hf.cli import main\n"
        "atexit.register(lambda: print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules))))\n"
        "main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and all(name in done.stdout for name in cli.COMMANDS)
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_a_function_of_a_module_that_is_there(name):
    place, extra, does = cli.COMMANDS[name]
    module, _ = place.split(":")
    assert importlib.util.find_spec(module) is not None and callable(cli.load(name)) and does.endswith(".")


def test_a_command_that_is_unknown_or_lacks_a_package_is_one_sentence(monkeypatch, capsys):
    done = call("joynt")
    assert done.returncode == 2 and "joynt" in done.stderr and "Traceback" not in done.stderr
    monkeypatch.setitem(sys.modules, "clara_hf.data.convert", None)
    monkeypatch.setitem(cli.COMMANDS, "convert-data", ("no_such_package:main", "data", "x."))
    with pytest.raises(SystemExit) as stop:
        cli.main(["convert-data"])
    assert stop.value.code == 2 and "clara-hf[data]" in capsys.readouterr().err


def test_arguments_and_exit_codes_are_the_command_s_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["scp", "--lerning_rate", "1"])
    assert (
        stop.value.code == 2 and "clara scp: error" in (said := capsys.readouterr().err) and "--learning_rate" in said
    )
    # From elsewhere than the repository there is no default recipe.
    with pytest.raises(SystemExit) as stop:
        cli.main(["scp"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "--config" in said and "--train_file" in said


def test_training_commands_are_launched_by_accelerate_where_its_options_are_given(monkeypatch):
    called = []
    monkeypatch.setattr(os, "execv", lambda *given: called.append(given) or sys.exit(0))
    with pytest.raises(SystemExit):
        cli.main(["joint", "--config", "x.yaml", "--num_processes", "2", "--config_file=ds.yaml", "--seed", "3"])
    ((_, command),) = called
    assert command[1:] == [
        *("-m", "accelerate.commands.launch", "--num_processes", "2", "--config_file=ds.yaml"),
        *("-m", "clara_hf.cli", "joint", "--config", "x.yaml", "--seed", "3"),
    ]
