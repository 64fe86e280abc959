"""`python -m clara_hf.serving ask|serve`: the commands `clara ask` and `clara serve`."""

import argparse
import sys

from clara_hf.program import run_program
from clara_hf.serving import ask, serve


COMMANDS = {"ask": ask.main, "serve": serve.main}


def main(arguments: list[str] | None = None) -> None:
    """Calls a command as a program.

    Raises:
        SystemExit: always, with the command's exit code.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m clara_hf.serving", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    name = parser.parse_args(arguments[:1]).command
    sys.argv[0] = f"clara {name}"
    run_program(lambda: COMMANDS[name](arguments[1:]))


if __name__ == "__main__":
    main()
