"""The claims about CLaRa, settled on the nano world by runs over several seeds.

python recipes/nano/world.py --out runs/nano/data
python benchmarks/evidence.py benchmarks/evidence/full.yaml
"""

from clara_hf.evaluation.evidence.suite import main
from clara_hf.program import run_program


if __name__ == "__main__":
    run_program(main)
