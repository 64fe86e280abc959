"""Make joint-training data from synthesized questions: each with candidates to retrieve among.

python recipes/joint_data.py --scp scp/ --output_dir joint/
"""

from clara_hf.cli import load
from clara_hf.program import run_program


if __name__ == "__main__":
    run_program(lambda: load("joint-data")(None))
