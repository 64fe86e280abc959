"""Make joint-training data from synthesized questions: each with candidates to retrieve among.

python recipes/joint_data.py --scp scp/ --out joint/
"""

from clara_hf.program import run_program
from clara_hf.synthesis.joint_data import main


if __name__ == "__main__":
    run_program(main)
