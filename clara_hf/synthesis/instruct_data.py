"""Make instruction-tuning data: a language model answers questions from the passages that were retrieved for them.

    python recipes/instruct_data.py --questions pools.jsonl --out instruct/ --model qwen3-32b --base-url URL --top_k 5

A line of the questions has `question` and `docs`, best first (as `recipes/joint_data.py --mode normal` or
`eval/candidates.py` make them), and where known `answers` and `pos_index`. Stop it whenever you like: the same command
goes on. `recipes/instruct.py` takes the result as it is.
"""

import sys

from clara_hf.synthesis.errors import UsageError, check_installed


check_installed()

from clara_hf.synthesis.instruct import OUTPUTS, InstructDataArguments, answer_question, fill_store, write_outputs
from clara_hf.synthesis.session import Session
from clara_hf.synthesis.settings import parse_arguments


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(InstructDataArguments, sys.argv[1:] if arguments is None else arguments)
    with Session(args, args.inputs(), OUTPUTS) as session:
        session.prepare()
        with session.partial_files(write_outputs):
            fill_store(args, session.store)
            session.work(answer_question, key="key", unit="question", kept="answers")
        stats = write_outputs(session.store, session.folder, session.settings, args.limit)
    print(f"{args.out}: {stats['kept']} of {stats['questions']} questions answered; the others are in rejected.jsonl.")
    if not stats["kept"]:
        raise UsageError(f"no answer could be used: see {args.out}/rejected.jsonl for the reasons.")
