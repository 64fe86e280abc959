"""The command `clara`: every program under one name, each the same code as its door in the repository."""

import importlib
import os
import sys

from clara_hf.program import UsageError, run_program
from clara_hf.program.arguments import choose
from clara_hf.program.machine import keep_freed_memory


# Name: module and function, the extra whose packages it needs, and what it does. Imported only when it is called.
COMMANDS = {
    "scp": ("clara_hf.program.stages:scp", "train", "Train stage 1: compress documents."),
    "instruct": ("clara_hf.program.stages:instruct", "train", "Train stage 2: answer from given memories."),
    "joint": ("clara_hf.program.stages:joint", "train", "Train stage 3: retrieve and answer, from answers alone."),
    "contrastive": ("clara_hf.program.stages:contrastive", "train", "Train the retriever from relevance labels."),
    "dro": ("clara_hf.program.stages:dro", "train", "Train the baseline that retrieves and answers in raw text."),
    "text-lora": ("clara_hf.program.text_lora:main", "train", "Train the baseline on raw text."),
    "cost": ("clara_hf.program.cost:main", "train", "Compute memory, time and size that a recipe needs."),
    "synthesize": ("clara_hf.synthesis.synthesize:main", "synthesis", "Make SCP data from documents by a teacher."),
    "instruct-data": ("clara_hf.synthesis.instruct_data:main", "synthesis", "Make stage 2 data by a teacher."),
    "joint-data": ("clara_hf.synthesis.joint_data:main", "synthesis", "Make stage 3 data from synthesized pairs."),
    "pools": ("clara_hf.data.pools:main", "eval", "Find candidates for questions in a corpus."),
    "convert-data": ("clara_hf.data.convert:main", "data", "Convert a published data set."),
    "convert": ("clara_hf.original.convert:main", "train", "Convert a published checkpoint."),
    "export-generator": ("clara_hf.hub.export:main", "train", "Write the generator as a plain causal model."),
    "publish": ("clara_hf.hub.publish:main", "hub", "Upload a checkpoint, its card and results to the Hub."),
    "store": ("clara_hf.memory_store.program:main", "train", "Build, search and maintain a memory store."),
    "eval": ("clara_hf.evaluation.run:main", "eval", "Compare a model with the alternatives on questions."),
    "analyze": ("clara_hf.evaluation.analyze:main", "eval", "Draw and explain what an evaluation found."),
    "evidence": ("clara_hf.evaluation.evidence.suite:main", "eval", "Settle claims by runs over several seeds."),
    "ask": ("clara_hf.serving.ask:main", "serve", "Ask your own files in the terminal."),
    "serve": ("clara_hf.serving.serve:main", "serve", "Serve a model and a collection, in OpenAI's form."),
}
TRAINING = ("scp", "instruct", "joint", "contrastive", "dro", "text-lora")
# Options of `accelerate launch` that a training command hands on.
LAUNCH = (
    "--config_file",
    "--num_processes",
    "--num_machines",
    "--machine_rank",
    "--main_process_ip",
    "--main_process_port",
)


def main(arguments: list[str] | None = None) -> None:
    """Call one command as a program.

    Raises:
        SystemExit: always, with the command's exit code.
    """
    sys.argv[0] = "clara"
    run_program(lambda: run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int | None:
    """Call one command; a training command through `accelerate launch` where its options are given."""
    does = {name: sentence for name, (_, _, sentence) in COMMANDS.items()}
    name = choose("clara", does, arguments, "Continuous Latent Reasoning for Hugging Face.")
    launch, rest = launch_options(arguments[1:])
    if launch and name in TRAINING:
        command = [sys.executable, "-m", "accelerate.commands.launch", *launch, "-m", "clara_hf.cli", name, *rest]
        os.execv(sys.executable, command)
    return call(name, arguments[1:])


def call(name: str, arguments: list[str]) -> int | None:
    """Import a command and call it."""
    function = load(name)
    keep_freed_memory()  # PyTorch is loaded only now
    return function(arguments)


def launch_options(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The options of `accelerate launch` among `arguments`, with their values, and the others."""
    launch, rest, words = [], [], iter(arguments)
    for word in words:
        name, given, _ = word.partition("=")
        if name in LAUNCH:
            launch += [word] if given else [word, *([next(words)] if word != arguments[-1] else [])]
        else:
            rest.append(word)
    return launch, rest


def load(name: str):
    """The function of a command.

    Raises:
        UsageError: a package is missing; the message has the extra that brings it.
    """
    place, extra, _ = COMMANDS[name]
    module, function = place.split(":")
    try:
        return getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("clara_hf", "modeling_clara", "trainers"):
            raise
        raise UsageError(f"{error.name} is not installed: run pip install 'clara-hf[{extra}]'.") from error


if __name__ == "__main__":
    main()
