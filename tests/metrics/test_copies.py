"""Each metric's folder works alone: copied anywhere, in a process that has none of this repository's packages."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clara_hf.metrics.answer_f1.answer_f1 import normalize_answer
from clara_hf.metrics.grounding.grounding import normalized_words


METRICS = Path(__file__).parents[2] / "eval" / "metrics"
NAMES = sorted(path.name for path in METRICS.iterdir() if (path / f"{path.name}.py").exists())
PROGRAM = """
import json, sys
for name in ("clara_hf", "modeling_clara", "trainers"):
    sys.modules[name] = None  # importing it fails
import evaluate
given = json.loads(sys.argv[1])
found = {}
for name, arguments in given.items():
    metric = evaluate.load(name)
    found[name] = {"value": metric.compute(**arguments)}
    try:
        found[name]["empty"] = metric.compute(predictions=[], references=[])
    except ValueError as error:
        found[name]["empty"] = str(error)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_copies_load_from_a_folder_without_this_repository(tmp_path):
    for name in NAMES:
        shutil.copytree(METRICS / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    texts = {"predictions": ["in Paris, France"], "references": [["Paris"]]}
    given = {name: texts for name in NAMES if name != "retrieval_recall"}
    # `retrieve` pads the rows of questions with fewer candidates.
    given["retrieval_recall"] = {"predictions": [[2, 0, 1], [0, -1, -1]], "references": [[0], [0]], "ks": [1]}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(given)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["answer_f1"]["value"] == {"em": 0, "f1": 0.5, "cover_em": 1}
    assert found["grounding"]["value"] == {"grounding": pytest.approx(1 / 3), "grounded": 0, "n": 1}
    assert found["retrieval_recall"]["value"] == {
        **{"recall@1": 0.5, "precision@1": 0.5, "all_gold@1": 0.5, "ndcg@1": 0.5, "mrr": 0.75},
    }
    assert found["paraphrase_fidelity"]["value"]["rouge1"] == pytest.approx(0.5)
    assert found["grounding"]["empty"] == {"grounding": None, "grounded": None, "n": 0}
    for name in set(NAMES) - {"grounding"}:
        assert "`predictions` is empty" in found[name]["empty"] and found[name]["empty"].count("\n") == 0


def test_the_two_metrics_that_read_words_read_the_same_ones():
    for text in (
        "The Battle of Guam.",
        "a theatre, an ant",
        "L'Été «x»",
        "rock-n-roll 12.5",
        "東京",
        "",
        "İzmir\tA\u00a0the",
    ):
        assert normalized_words(text) == normalize_answer(text).split()
