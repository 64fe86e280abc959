"""Puts an SCP checkpoint into `pretrained/scp`: adapters over the base beside it, without code.

accelerate launch recipes/scp.py --config recipes/nano/pretrained/scp_full.yaml
python recipes/nano/pretrained/ship_scp.py                     # runs/nano-scp-full, where scp_full.yaml puts it
python recipes/nano/pretrained/ship_scp.py FOLDER              # another one
"""

import argparse
import os
import shutil
from pathlib import Path

from clara_hf.program import read_json, run_program, write_json
from modeling_clara import CLaRaForRetrievalGeneration


ROOT = Path(__file__).resolve().parents[3]
CARD = "README.md"
OUT = Path(__file__).resolve().parent / "scp"


def ship(source: str | Path, out: Path = OUT) -> None:
    """Write the checkpoint `source` to `out` as an adapter-only one that names its base `../base`."""
    beside = out.with_name(out.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    model = CLaRaForRetrievalGeneration.from_pretrained(source)
    model.config.checkpoint_format = "adapter"
    model.config.base_model_name_or_path = "../base"
    model.save_pretrained(beside)
    for path in beside.glob("*.py"):
        # It is loaded by the package, which has the code.
        path.unlink()
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        values = read_json(beside / name)
        values.pop("auto_map", None)
        write_json(beside / name, values)
    if (out / CARD).exists():
        shutil.copy(out / CARD, beside / CARD)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(beside, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Ship an SCP checkpoint as pretrained/scp.")
    parser.add_argument("source", nargs="?", default=str(ROOT / "runs" / "nano-scp-full"), help="its folder")
    source = parser.parse_args().source
    run_program(lambda: ship(source))
