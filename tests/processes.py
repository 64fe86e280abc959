"""Processes that tests start, without the ten seconds of imports that a new interpreter begins with.

They come from a server that has imported everything and used nothing: after a fork of pytest's own process, in which
Lance has run, writing with Lance can crash. And programs that are called in pytest's own process.
"""

import multiprocessing
import os
import pickle
import signal
import sys
from multiprocessing import forkserver
from pkgutil import resolve_name
from uuid import uuid4

import pytest
import torch.distributed as dist

from clara_hf.program import run_program


IMPORTED = ["memory_fakes", "test_trainers", "recipes.joint", "recipes.scp", "clara_hf.evaluation.run"]
LIMIT = 900  # seconds


def exit_code(main, arguments) -> int:
    """That of a program which is called here, ended as its door and `clara` end it."""
    try:
        run_program(lambda: main(arguments))
    except SystemExit as end:
        return end.code


def start_server() -> None:
    """Start the server, unless it runs already."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        forkserver.ensure_running()


def in_process(function, folder, *arguments):
    """What `function(*arguments)` returns in a process of its own; if it failed the text of its exception, if it was
    killed minus the signal."""
    return _wait([(folder / uuid4().hex, function, arguments)])[0]


def killed_at(owner, name, call, program, arguments):
    """`program(arguments)`, which kills itself without a warning, as the kernel would, at the n-th call of something.

    Args:
        owner: what has the function `name`, as `pkgutil.resolve_name` takes it.
    """
    owner = resolve_name(owner)
    original, calls = getattr(owner, name), []

    def counting(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, name, counting)
    program(arguments)


def in_processes(count, function, folder, *arguments):
    """What `function(rank, *arguments)` returns, or what became of it, in each of `count` processes of one
    `torch.distributed` job; a list by rank."""
    meeting = folder / uuid4().hex
    calls = [(meeting, count, rank, function, arguments) for rank in range(count)]
    return _wait([(meeting.with_suffix(f".{rank}"), _in_job, call) for rank, call in enumerate(calls)])


def _wait(calls):
    start_server()
    context = multiprocessing.get_context("forkserver")
    children = [context.Process(target=_keep_result, args=call) for call in calls]
    for child in children:
        child.start()
    try:
        for child in children:
            child.join(LIMIT)
            assert child.exitcode is not None, "a process hangs"
    finally:
        for child in children:
            child.kill()
    return [child.exitcode or pickle.loads(call[0].read_bytes()) for child, call in zip(children, calls, strict=True)]


def _keep_result(file, function, arguments):
    try:
        result = function(*arguments)
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    file.write_bytes(pickle.dumps(result))


def _in_job(meeting, count, rank, function, arguments):
    # As `torchrun` sets them.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    return function(rank, *arguments)
