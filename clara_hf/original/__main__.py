"""`python -m clara_hf.original`: convert a checkpoint of the release, or back."""

from clara_hf.program import run_program

from .convert import main


run_program(main)
