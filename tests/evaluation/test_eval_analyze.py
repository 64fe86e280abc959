"""The numbers behind the pictures, and a page that needs nothing but itself."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXTS, build_clara
from PIL import Image
from processes import exit_code

from clara_hf.data.schema import QAExample
from clara_hf.evaluation.analysis import latents, plots
from clara_hf.evaluation.analysis.latents import logit_lens, mean_states, project
from clara_hf.evaluation.analyze import main
from clara_hf.evaluation.run import main as evaluate
from clara_hf.evaluation.statistics import calibration_error, reliability, scored_rankings, separation
from clara_hf.program.folders import release_lock, take_lock


# Scores


def record(scores, gold):
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    return {"ranking": order, "candidate_scores": [scores[place] for place in order], "pos_index": gold}


def test_rankings_are_taken_apart_into_gold_and_rest():
    found = scored_rankings([record([0.1, 0.9, 0.5], [2]), record([0.4, 0.3], [0, 1]), record([0.2], None)], 0.1)
    assert sorted(found.gold) == [0.3, 0.4, 0.5] and sorted(found.rest) == [0.1, 0.9]
    assert found.top.tolist() == [0.9, 0.4] and found.right.tolist() == [False, True]
    expected = torch.tensor([0.9, 0.5, 0.1]).div(0.1).softmax(0)[0].item()
    assert found.confidence[0] == pytest.approx(expected)
    assert scored_rankings([record([0.2], None), {**record([1.0], [0]), "candidate_scores": None}], 0.1) is None


def test_separation_is_the_share_of_pairs_in_the_right_order():
    chance = np.random.default_rng(0)
    rows = [record(chance.integers(0, 6, 5).tolist(), [int(chance.integers(5))]) for _ in range(30)]
    found = scored_rankings(rows, 1.0)
    pairs = (found.gold[:, None] > found.rest) + 0.5 * (found.gold[:, None] == found.rest)
    assert separation(found) == pytest.approx(pairs.mean())


def test_reliability_bins_are_equal_and_their_intervals_are_wilsons():
    values = np.arange(40) / 40
    right = values > 0.5
    rows = reliability(values, right, bins=4)
    assert [row["n"] for row in rows] == [10] * 4 and [row["right"] for row in rows] == [0, 0, 0.9, 1]
    # Wilson's interval for 9 of 10: 0.596 to 0.982.
    assert (rows[2]["low"], rows[2]["high"]) == pytest.approx((0.596, 0.982), abs=0.002)
    assert rows[0]["low"] == 0 and rows[3]["high"] == pytest.approx(1)
    assert calibration_error(rows) == pytest.approx(
        np.mean([abs(row["value"] - row["right"]) for row in rows]), abs=1e-9
    )


# Latents


def test_means_are_those_of_the_compressors_hidden_states(clara):
    seen = []
    hook = clara.decoder.base_model.register_forward_hook(lambda _, __, output: seen.append(output.last_hidden_state))
    inputs = clara.processor.pad_encodings(clara.processor.encode_documents(TEXTS[:1]))
    with torch.no_grad():
        memories, _ = clara.encode("compressor", **inputs)
    hook.remove()
    texts, means = mean_states(clara, TEXTS[:3], batch_size=2)
    count = clara.config.num_memory_tokens
    assert means[0] == pytest.approx(memories[0].mean(dim=0).numpy(), abs=1e-5)
    assert texts[0] == pytest.approx(seen[0][0, :-count].mean(dim=0).numpy(), abs=1e-5)
    assert texts.shape == means.shape == (3, clara.config.hidden_size)


def test_the_lens_says_where_the_strongest_tokens_stand(clara, monkeypatch):
    tokenizer, head = clara.processor.tokenizer, clara.get_output_embeddings().weight
    one = QAExample("1", "Where is Velholm?", ["Aum"], ["the lanterns of sailors", "The glassblower keeps bees"], [1])

    def strongest(word):
        (token,) = tokenizer.encode(word, add_special_tokens=False)[-1:]
        row = head[token] / head[token].norm() ** 2
        monkeypatch.setattr(clara, "encode_questions", lambda questions, batch_size: 50 * row.expand(1, 2, -1))
        (found,) = logit_lens(clara, [one, QAExample("2", "Who?", ["x"], ["y"])], seed=0, count=1)
        return found

    asked, gold, other = strongest(" Velholm"), strongest(" bees"), strongest(" lanterns")
    assert [kind for row in (asked, gold, other) for _, kind in row.tokens] == ["question", "gold document", "neither"]
    assert [(row.gold, row.other) for row in (asked, gold, other)] == [(0, 0), (1, 0), (0, 1)]


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_projections_keep_two_clusters_apart_and_repeat(method):
    if method == "tsne":
        pytest.importorskip("sklearn")
    chance = np.random.default_rng(0)
    points = np.concatenate([chance.normal(0, 1, (20, 8)), chance.normal(9, 1, (20, 8))])
    flat = project(points, method, seed=0)
    assert flat.shape == (40, 2) and (flat == project(points, method, seed=0)).all()
    centers = flat[:20].mean(axis=0), flat[20:].mean(axis=0)
    assert np.linalg.norm(centers[0] - centers[1]) > 2 * flat[:20].std()


# The whole


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base) -> list[str]:
    """Two finished runs, of models with compression rates 8 and 16."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [
        {
            # With what ends a line in Unicode, but not in JSONL.
            "question": f"What about\u2028 {text.split()[place]}?\x85",
            "answers": [text.split()[-1]],
            "docs": TEXTS[:4],
            "pos_index": [place],
            "type": "single",
        }
        for place in range(4)
        for text in TEXTS
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for rate in (8, 16):
        build_clara(base, compression_rate=rate).save_pretrained(folder / f"model{rate}")
        options = {"model": folder / f"model{rate}", "data": folder / "data.jsonl", "output_dir": folder / f"run{rate}"}
        options |= {"systems": "clara,bm25,gold", "max_new_tokens": 4}
        assert exit_code(evaluate, [str(part) for name, value in options.items() for part in (f"--{name}", value)]) == 0
    return [str(folder / "run8"), str(folder / "run16")]


def test_an_analysis_is_one_page_that_holds_everything(tmp_path, runs):
    assert exit_code(main, ["--runs", ",".join(runs), "--output_dir", str(tmp_path / "out")]) == 0
    out = tmp_path / "out"
    names = ["means-data", "rates-data", "reliability-data-clara", "scores-data-clara"]
    expected = sorted(
        [f"{name}.{kind}" for name in names for kind in ("png", "svg")] + ["analysis.json", "report.html"]
    )
    assert sorted(path.name for path in out.iterdir()) == expected
    for name in names:
        assert min(Image.open(out / f"{name}.png").size) > 400
    page = (out / "report.html").read_text(encoding="utf-8")
    # Nothing is loaded: every picture is in the page, and there is no script, link or style from elsewhere.
    assert (
        len(re.findall(r'<img src="data:image/svg\+xml;base64,', page)) == 4 == page.count("<img") == page.count("alt=")
    )
    assert not re.search(r"<script|<link|@import|url\(|src=\"(?!data:)|href=", page)
    for text in ("Logit lens", "cost per question", "nDCG@5", "type single", "share a letter"):
        assert text in page
    numbers = json.loads((out / "analysis.json").read_text(encoding="utf-8"))
    results = [json.loads((Path(run) / "results.json").read_text()) for run in runs]
    curve = numbers["rates"]["data"]["gold"]
    assert [(point["rate"], point["value"]) for point in curve] == [
        (rate, found["datasets"]["data"]["systems"]["gold"]["f1"]["value"])
        for rate, found in zip((8, 16), results, strict=True)
    ]
    shares = numbers["datasets"]["data"]["lens"]["shares"]
    assert sum(shares.values()) == pytest.approx(1) and len(numbers["datasets"]["data"]["lens"]["rows"]) == 20


def test_an_analysis_repeated_is_reused_another_needs_overwrite_and_none_is_disturbed(tmp_path, runs, capsys):
    out = tmp_path / "out"
    arguments = ["--runs", runs[0], "--output_dir", str(out)]
    assert exit_code(main, arguments) == 0
    first = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".svg", ".html")}
    assert "rates-data.svg" not in first
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert exit_code(main, arguments) == 0
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == times
    assert exit_code(main, [*arguments, "--seed", "1"]) == 2
    assert "give another --output_dir, or --overwrite" in capsys.readouterr().err
    lock = take_lock(out)
    assert exit_code(main, [*arguments, "--overwrite"]) == 2
    assert f"{out} is in use" in capsys.readouterr().err
    release_lock(out, lock)
    assert exit_code(main, [*arguments, "--overwrite"]) == 0
    assert first == {name: (out / name).read_bytes() for name in first}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--runs", "no/such/run"], "--runs: no/such/run holds no finished run of eval/run.py."),
        (["--runs", ","], "--runs names no folder."),
        (["--seed", "-1"], "--seed must be at least 0, but is -1."),
        (["--limit", "3"], "--limit must be at least 10, but is 3."),
        (["--projection", "umap"], "--projection must be pca or tsne, but is 'umap'."),
        (["--model", "no/such/model"], "--model: there is no folder no/such/model."),
    ],
)
def test_what_cannot_be_analysed_is_one_sentence(tmp_path, runs, capsys, changes, message):
    assert exit_code(main, ["--runs", runs[0], "--output_dir", str(tmp_path / "out"), *changes]) == 2
    error = capsys.readouterr().err
    assert f" error: {message}" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_a_run_was_not_made_with_is_refused(tmp_path, runs, capsys):
    folder = Path(runs[0]).parent
    other, moved = str(folder / "model16"), shutil.copytree(folder / "model8", tmp_path / "moved")
    arguments = ["--runs", runs[0], "--output_dir", str(tmp_path / "out"), "--model"]
    assert exit_code(main, [*arguments, other]) == 2
    assert f" error: --model: {other} is not what {runs[0]} was made with" in capsys.readouterr().err
    # A run whose data have changed, and one whose twin, which is not looked into, is no longer there.
    shutil.copytree(runs[0], tmp_path / "run")
    results = json.loads((tmp_path / "run/results.json").read_text())
    results["settings"]["sup"] = "no/such/folder"
    (tmp_path / "run/results.json").write_text(json.dumps(results))
    arguments[1] = str(tmp_path / "run")
    assert exit_code(main, [*arguments, str(moved)]) == 0
    (data,) = (name for name in results["settings"]["sha256"] if name.endswith(".jsonl"))
    results["settings"]["sha256"][data] = "0"
    (tmp_path / "run/results.json").write_text(json.dumps(results))
    assert exit_code(main, [*arguments, str(moved), "--overwrite"]) == 2
    assert f"--runs: {data} is not what {tmp_path / 'run'} was made with" in capsys.readouterr().err


def test_every_system_of_a_picture_has_a_mark_and_line_of_its_own(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, *_: drawn.extend(figure.axes[0].containers))
    point = {"value": 0.5, "low": 0.4, "high": 0.6}
    plots.plot_rates({str(n): [{"rate": rate, **point} for rate in (4, 16)] for n in range(20)}, tmp_path, "rates")
    assert len({(bars[0].get_marker(), bars[0].get_linestyle()) for bars in drawn}) == 20


def test_unknown_arguments_of_an_analysis_are_named(tmp_path, runs, capsys):
    assert exit_code(main, ["--runs", runs[0], "--output_dir", str(tmp_path / "out"), "--projektion", "pca"]) == 2
    error = capsys.readouterr().err
    assert "--projektion" in error and "did you mean --projection" in error


def test_an_interrupted_analysis_leaves_nothing(tmp_path, runs, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(latents, "_lens_row", interrupt)
    assert exit_code(main, ["--runs", runs[0], "--output_dir", str(tmp_path / "out")]) == 130
    assert not (tmp_path / "out").exists()
