"""`python -m clara_hf.serving ask|serve`, which `clara ask` and `clara serve` are short for."""

import argparse
import sys

from clara_hf.serving import ask, serve


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="clara", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, module in (("ask", ask), ("serve", serve)):
        command = commands.add_parser(name, help=module.__doc__, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(main=module.main)
    options = parser.parse_args(arguments)
    try:
        options.main(options)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"clara: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
