"""The uncompressed baseline: tune a LoRA of the plain base on raw documents.

accelerate launch recipes/text_lora.py --config recipes/nano/text_lora.yaml
accelerate launch recipes/text_lora.py --config recipes/nano/text_lora.yaml --learning_rate 5e-4 --output_dir runs/x
"""

from clara_hf.program import run_program
from clara_hf.program.text_lora import main


if __name__ == "__main__":
    run_program(main)
