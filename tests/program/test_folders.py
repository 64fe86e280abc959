"""Run folders: who works in one, what a kill leaves, and what is refused."""

import os
import signal
import subprocess
import sys

import pytest

from clara_hf.program import RunFolder, UsageError
from clara_hf.program.folders import LOCK_FILE, RUN_FILE


HOLDER = """
import os, sys, time
from clara_hf.program import RunFolder
with RunFolder(sys.argv[1], {"seed": 0}).claimed() as run:
    run.begin()
    if not os.fork():  # a worker that outlives its parent
        time.sleep(20)
        os._exit(0)
    print(os.getpid(), flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_told_who_works_in_the_folder_and_a_dead_one_is_followed(tmp_path):
    folder = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        pid = holder.stdout.readline().strip()
        with pytest.raises(UsageError, match=f"in use by process {pid} on "), RunFolder(folder, {"seed": 0}).claimed():
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        with RunFolder(folder, {"seed": 1}).claimed() as run:
            assert run.record == {"seed": 0} and not run.holds_work()
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.stdout.close()
    assert not folder.exists()


@pytest.mark.parametrize("left", [[], [LOCK_FILE], [LOCK_FILE, RUN_FILE + ".partial"], ["memories", LOCK_FILE]])
def test_what_a_kill_before_the_record_leaves_is_no_other_run(left, tmp_path):
    for name in left:
        (tmp_path / name).touch()
    with RunFolder(tmp_path, {"seed": 0}, kept=("memories",)).claimed() as run:
        run.begin()
        (tmp_path / "work").touch()
    assert {path.name for path in tmp_path.iterdir()} == {RUN_FILE, "work", *set(left) & {"memories"}}


def test_an_equal_run_goes_on_another_is_refused_or_replaced(tmp_path):
    def claim(**options) -> set[str]:
        with RunFolder(tmp_path / "run", {"seed": 0, **options.pop("settings", {})}, **options).claimed() as run:
            run.begin()
            (tmp_path / "run" / f"work-{len(list((tmp_path / 'run').iterdir()))}").touch()
        return {path.name for path in (tmp_path / "run").iterdir()} - {RUN_FILE}

    assert len(claim()) == 1 and len(claim()) == 2
    with pytest.raises(UsageError, match="seed: 0 there, 1 now"):
        claim(settings={"seed": 1})
    with pytest.raises(UsageError, match="--resume true"):
        claim(resume=False)
    assert len(claim(settings={"seed": 1}, overwrite=True)) == 1
    (tmp_path / "run" / RUN_FILE).unlink()
    with pytest.raises(UsageError, match="holds no run"):
        claim(overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        RunFolder(tmp_path / "file", {}).check()


def test_what_fails_before_it_works_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), RunFolder(tmp_path / "run", {}).claimed() as run:
        run.begin()
        raise RuntimeError
    assert not (tmp_path / "run").exists()
