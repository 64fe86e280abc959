"""Programs that tests call in their own process, ended as their doors and `clara` end them."""

from clara_hf.program import run_program


def exit_code(main, arguments) -> int:
    try:
        run_program(lambda: main(arguments))
    except SystemExit as end:
        return end.code
