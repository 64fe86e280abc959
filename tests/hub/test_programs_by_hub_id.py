"""Every model argument of the programs that evaluate, given by Hub id, against the Hub of the tests."""

import json
import subprocess
import sys

from conftest import TEXTS, build_base, build_clara
from hub_server import environment_of, hub_server


PROGRAMS = """
from clara_hf.cli import call
models = ["--model", "me/clara@next", "--before_joint", "me/clara", "--sup", "me/clara"]
systems = "clara, clara-before-joint, sup, text-gold"
call("eval", [*models, "--text_model", "me/base", "--data", "rows.jsonl", "--systems", systems, "--output_dir", "table",
              "--max_new_tokens", "3"])
call("analyze", ["--model", "me/clara@next", "--runs", "table", "--output_dir", "lens"])
call("joint", ["--model_name_or_path", "me/clara", "--train_file", "rows.jsonl", "--output_dir", "joint",
               "--max_steps", "1", "--use_cpu", "true", "--save_strategy", "no", "--disable_tqdm", "true"])
"""


def test_models_by_hub_id_are_evaluated_analyzed_and_trained(tmp_path):
    base = build_base(tmp_path / "base")
    build_clara(base, checkpoint_format="full").save_pretrained(tmp_path / "clara")
    rows = [{"question": f"Who keeps {n}?", "answers": ["Mara"], "docs": TEXTS, "pos_index": [n % 4]} for n in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with hub_server() as server:
        server.add("me/base", tmp_path / "base")
        repository = server.add("me/clara", tmp_path / "clara")
        repository.commit("next", repository.files())
        environment = environment_of(server, tmp_path / "cache")
        command = [sys.executable, "-c", PROGRAMS]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    table = (tmp_path / "table/table.md").read_text()
    assert all(f"| {system} " in table for system in ("clara", "clara-before-joint", "sup", "text-gold"))
    recorded = json.loads((tmp_path / "table/results.json").read_text())["settings"]["model"]
    assert recorded == "me/clara@next"
    assert (tmp_path / "joint/config.json").exists() and list((tmp_path / "lens").iterdir())
