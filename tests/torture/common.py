"""What the torture scripts share: tiny models and data in a folder, and every program as a forked process."""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "training")]

import datasets  # noqa: E402
import torch  # noqa: E402
from conftest import TEXTS, build_base, build_clara  # noqa: E402
from scripted_endpoint import Endpoint  # noqa: E402
from synthesis_runs import write_corpus  # noqa: E402
from test_trainers import QUESTIONS, SCP_ROWS  # noqa: E402
from transformers.utils import logging  # noqa: E402

from clara_hf import cli  # noqa: E402
from clara_hf.synthesis.backends import client  # noqa: E402


STAGES = ("scp", "instruct", "joint", "contrastive", "dro", "text-lora")
PROGRAMS = (*STAGES, "store", "eval", "synthesize", "pools")


def prepare(folder: Path) -> None:
    """Write a base, a checkpoint and data, and import what programs need, so that forked ones start at once."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    client.FIRST_DELAY = 0.01
    for name in PROGRAMS:
        cli.load(name)
    if (folder / "clara").exists():
        return
    build_clara(build_base(folder / "base"), lora_dropout=0.1).save_pretrained(folder / "clara")
    QUESTIONS.to_json(folder / "questions.jsonl")
    SCP_ROWS.to_json(folder / "scp.jsonl")
    documents = [{"id": str(n), "text": f"{TEXTS[n % len(TEXTS)]} Page {n}."} for n in range(60)]
    (folder / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    write_corpus(folder / "corpus.jsonl", 3)


def arguments(program: str, folder: Path, out: Path, url: str = "") -> list[str]:
    """The command line of a small run."""
    training = {
        "model_name_or_path": folder / ("base" if program in ("dro", "text-lora") else "clara"),
        "train_file": folder / ("scp.jsonl" if program == "scp" else "questions.jsonl"),
        "output_dir": out,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if program == "dro":
        training |= {"lora_dropout": 0.1, "candidate_budget": 240}
    elif program == "text-lora":
        training |= {"clara_checkpoint": folder / "clara", "use_peft": True, "lora_r": 4, "lora_dropout": 0.1}
        training |= {"lora_target_modules": "all-linear", "bf16": False, "dataloader_pin_memory": False}
    systems = "clara,text-clara,bm25,gold,no-memory"
    data = {"model": folder / "clara", "data": folder / "questions.jsonl"}
    evaluation = {**data, "systems": systems, "batch_size": 4, "max_new_tokens": 4, "output_dir": out}
    teacher = {"corpus": folder / "corpus.jsonl", "out": out, "model": "scripted", "base-url": url, "timeout": 20}
    teacher |= {"min_passage_tokens": 8, "concurrency": 2, "validation_share": 0}
    pools = {"questions": folder / "questions.jsonl", "output": out / "pools.jsonl", "size": 3}
    options = {"eval": evaluation, "synthesize": teacher, "pools": pools}.get(program, training)
    if program == "store":
        given = ["--model", str(folder / "clara"), "--documents", str(folder / "documents.jsonl"), "--batch_size", "8"]
        return ["store", "build", str(out), *given]
    return [program, *(str(word) for name, value in options.items() for word in (f"--{name}", value))]


def forked(function: Callable[[], object], log: Path) -> int:
    """Call `function` in a forked process, whose output goes to `log`; its exit code, or minus the signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = function() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def serve_teacher() -> tuple[int, str]:
    """Start the scripted teacher as a process; its id and the address."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        with os.fdopen(reading) as pipe:
            return child, pipe.readline().strip()
    with Endpoint() as endpoint:
        os.write(writing, f"{endpoint.url}\n".encode())
        signal.pause()  # until it is killed
    os._exit(0)
