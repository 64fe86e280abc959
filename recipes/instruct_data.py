"""Make instruction-tuning data: a language model answers questions from retrieved passages.

python recipes/instruct_data.py --questions pools.jsonl --out instruct/ --model qwen3-32b --base-url URL --top_k 5
"""

from clara_hf.program import run_program
from clara_hf.synthesis.instruct_data import main


if __name__ == "__main__":
    run_program(main)
