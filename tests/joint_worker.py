"""One process of a joint training under torchrun: torchrun ... joint_worker.py BASE FOLDER KILLED_RANK

The process of rank KILLED_RANK dies as after kill -9 at its second batch of documents; -1 for none.
"""

import json
import os
import signal
import sys
from pathlib import Path

from conftest import build_clara
from test_trainers import make_trainer

from modeling_clara.memory_store import MemoryStore


def main(base: str, folder: str, killed: str) -> None:
    rank = int(os.environ["RANK"])
    model = build_clara(base, lora_dropout=0.0)
    compress, compressed = model.compress, []

    def counting(documents, **options):
        if rank == int(killed) and compressed:
            os.kill(os.getpid(), signal.SIGKILL)
        compressed.extend(documents)
        return compress(documents, **options)

    model.compress = counting
    MemoryStore.write_bytes = 1
    batches = {"per_device_train_batch_size": 2, "memory_batch_size": 2, "dataloader_num_workers": 1}
    trainer = make_trainer("joint", base, folder, model, rows=rows(), max_steps=2, **batches)
    trainer.train()
    found = {"compressed": compressed, "steps": trainer.state.global_step, "loss": trainer.state.log_history[0]["loss"]}
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))


def rows():
    """Questions with three candidates of sixteen distinct documents of several lengths."""
    from datasets import Dataset
    from memory_fakes import DOCUMENTS

    return Dataset.from_list(
        [
            {"question": "Who?", "answers": ["Mara"], "docs": [DOCUMENTS[(3 * row + i) % 16] for i in range(3)]}
            | {"pos_index": [row % 3]}
            for row in range(12)
        ]
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
