"""The text-side joint baseline: a selection model and a generator learn together on raw text (DRO).

accelerate launch recipes/dro.py --config recipes/nano/dro.yaml
accelerate launch recipes/dro.py --config recipes/nano/dro.yaml --num_lists 8 --output_dir runs/x
"""

from clara_hf.program import run_program
from clara_hf.program.stages import dro as main


if __name__ == "__main__":
    run_program(main)
