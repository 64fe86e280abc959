"""Make SCP data from one's own documents with any language model: verified questions and paraphrases.

    python recipes/synthesize.py --corpus docs.jsonl --out scp/ --model qwen3-32b --base-url http://localhost:8000/v1
    python recipes/synthesize.py --corpus docs/ --out scp/ --model PATH --backend transformers

Stop it whenever you like: the same command goes on. docs/synthesis.md tells what it does.
"""

import sys

from clara_hf.synthesis.errors import UsageError, check_installed


check_installed()

from clara_hf.synthesis.leaks import LeakIndex
from clara_hf.synthesis.output import OUTPUTS, write_outputs
from clara_hf.synthesis.scp_data import SynthesisArguments, fill_store, passage_work
from clara_hf.synthesis.session import Session
from clara_hf.synthesis.settings import parse_arguments


def main(arguments: list[str] | None = None) -> None:
    args: SynthesisArguments = parse_arguments(SynthesisArguments, sys.argv[1:] if arguments is None else arguments)
    leaks = LeakIndex(args.exclude, args.exclude_ngram)
    with Session(args, args.inputs(), OUTPUTS) as session:
        session.prepare()
        with session.partial_files(write_outputs):
            fill_store(args, session.store, leaks)
            session.work(passage_work(args, leaks), key="text", unit="passage", kept="pairs")
        stats = write_outputs(session.store, session.folder, session.settings, args.limit)
    print(
        f"{args.out}: {stats['pairs']} pairs and {stats['paraphrases']} paraphrases of {stats['passages']} passages; "
        f"{stats['rejected']} set aside, see rejected.jsonl and report.html."
    )
    if not stats["pairs"] and not stats["paraphrases"]:
        raise UsageError(f"no pair and no paraphrase passed: see {args.out}/rejected.jsonl for the reasons.")
    if args.push_to_hub:
        from clara_hf.synthesis.publish import push

        print(push(session.folder, args.push_to_hub, OUTPUTS, stats, private=not args.public))
