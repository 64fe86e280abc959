"""Data-loader workers that read a memory store: from a script as it comes, and gone with the process they work for."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import build_clara
from test_trainers import QUESTIONS


pytestmark = pytest.mark.slow

# Without a main guard, as a user may write it.
SCRIPT = """
import sys
import time
from datasets import Dataset
from trainers import JointConfig, JointTrainer

model, rows, out, steps = sys.argv[1:]
print("the script runs", flush=True)
args = JointConfig(output_dir=out, max_steps=int(steps), dataloader_num_workers=2, use_cpu=True, disable_tqdm=True,
                   per_device_train_batch_size=2, save_strategy="no", logging_steps=1)
trainer = JointTrainer(model=model, args=args, train_dataset=Dataset.from_json(rows))
trainer.train()
print("trained", trainer.state.global_step, flush=True)
"""


@pytest.fixture(scope="module")
def started(base, tmp_path_factory):
    """Starts the script for a number of steps."""
    folder = tmp_path_factory.mktemp("workers")
    build_clara(base).save_pretrained(folder / "model")
    QUESTIONS.to_json(folder / "rows.json")
    (folder / "script.py").write_text(SCRIPT)

    def start(steps: int) -> subprocess.Popen:
        command = [sys.executable, "script.py", "model", "rows.json", f"run{steps}", str(steps)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "HF_HOME": str(folder / "home")}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=folder, env=environment, **pipes)

    return start


def test_a_script_without_a_main_guard_runs_once(started):
    script = started(3)
    output, _ = script.communicate(timeout=300)
    assert script.returncode == 0, output[-3000:]
    assert output.count("the script runs") == 1 and "trained 3" in output


def test_workers_of_a_killed_run_end_with_it(started):
    script = started(100_000)
    for line in script.stdout:
        if "'loss'" in line:
            break
    children = psutil.Process(script.pid).children(recursive=True)
    assert len(children) >= 3, children  # two workers, and what starts them
    script.send_signal(signal.SIGKILL)
    script.wait()
    limit = time.monotonic() + 3
    while any(is_running(child) for child in children) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not [child for child in children if is_running(child)]


def is_running(process: psutil.Process) -> bool:
    """Whether a process runs; one that has ended may still be listed, where nobody asks for its exit code."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
