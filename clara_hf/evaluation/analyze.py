"""Plot and explain what runs of `eval/run.py` found.

    python eval/analyze.py --runs runs/eval/joint-test --output_dir runs/analysis
    python eval/analyze.py --runs runs/eval/cr4,runs/eval/cr16,runs/eval/cr64 --output_dir runs/rates

For the first run: the logit lens of the query reasoner, document means beside memory means, scores of gold documents
and of the rest, and how far the top score can be relied on; for all runs together, answer F1 over the compression rate.
Writes `report.html`, which holds tables and pictures and needs no network, each picture as PNG and SVG, and
`analysis.json` with the numbers behind them. See `docs/evaluation.md`.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from clara_hf.data.schema import QAExample, load_examples
from clara_hf.data.sources import digest_of, is_digest_of
from clara_hf.evaluation.analysis import plots
from clara_hf.evaluation.analysis.latents import logit_lens, mean_states, project
from clara_hf.evaluation.plan import CHECKPOINTS, file_name, model_source
from clara_hf.evaluation.report import figure_part, html_parts, page
from clara_hf.evaluation.results import RESULTS, Results
from clara_hf.evaluation.run import recorded_files
from clara_hf.evaluation.statistics import calibration_error, reliability, scored_rankings, separation
from clara_hf.evaluation.systems.loading import load_clara, model_hash
from clara_hf.program import UsageError, option, parse, read_json, write_json, write_text
from clara_hf.program.errors import loading
from clara_hf.program.folders import release_lock, take_lock
from clara_hf.program.models import ModelSource
from clara_hf.program.values import split


logger = logging.get_logger(__name__)
PAGE, NUMBERS, STAGED = "report.html", "analysis.json", ".analysis.tmp"
LENS_ROWS = 20


@dataclass
class AnalysisSettings:
    """What is analysed.

    Raises:
        UsageError: a run is not there or not finished, or a limit is too low.
    """

    runs: list[str] = option(help="Output folders of evaluations; the first is analysed in depth.")
    output_dir: str = option(help="Folder for the page and the plots.")
    model: ModelSource | None = option(None, "CLaRa checkpoint of the first run, if it is no longer where it was.")
    limit: int = option(200, "Maximum number of questions, and of documents, that the model encodes.")
    projection: str = option("pca", "pca, or tsne (needs scikit-learn).")
    seed: int = option(0, "Random seed for t-SNE and for the choice of documents.")
    overwrite: bool = option(False, "Replace an analysis in the output folder.")

    def __post_init__(self):
        self.runs = split(self.runs) if isinstance(self.runs, str) else list(self.runs)
        self.model = model_source("--model", self.model)
        if self.limit < 10:
            raise UsageError(f"--limit must be at least 10, but is {self.limit}.")
        if self.seed < 0:
            raise UsageError(f"--seed must be at least 0, but is {self.seed}.")
        if self.projection not in ("pca", "tsne"):
            raise UsageError(f"--projection must be pca or tsne, but is {self.projection!r}.")
        self.results()
        if not self.overwrite and self.earlier() is None and (Path(self.output_dir) / NUMBERS).exists():
            raise UsageError(
                f"{self.output_dir} holds an analysis of other runs or with other options: give another --output_dir, "
                "or --overwrite."
            )

    @property
    def recorded(self) -> dict:
        """What makes the analysis what it is: settings, and digests of the results."""
        settings = {name: value for name, value in asdict(self).items() if name not in ("output_dir", "overwrite")}
        return {**settings, "sha256": {run: digest_of(str(Path(run, RESULTS)), "sha256") for run in self.runs}}

    def earlier(self) -> dict | None:
        """The numbers of an analysis of the same results with the same settings in the output folder."""
        path = Path(self.output_dir, NUMBERS)
        numbers = read_json(path) if path.is_file() else None
        same = isinstance(numbers, dict) and numbers.get("settings") == json.loads(json.dumps(self.recorded))
        return numbers if same else None

    def results(self) -> dict[str, Results]:
        """The results of every run, by its folder."""
        found = {}
        for folder in self.runs:
            results = Results.load(folder)
            if results is None:
                raise UsageError(f"--runs: {folder} holds no finished run of eval/run.py.")
            found[folder] = results
        if not found:
            raise UsageError("--runs names no folder.")
        return found


class Analysis:
    """Gathers pictures, tables and numbers of runs in a folder.

    Args:
        settings: what to look into.
        folder: where the pictures go.

    Attributes:
        numbers: what the pictures show, as it stands in `analysis.json`.
        parts: the page, piece by piece.
    """

    def __init__(self, settings: AnalysisSettings, folder: Path):
        self.settings = settings
        self.folder = folder
        self.results = settings.results()
        self.run, self.first = next(iter(self.results.items()))
        self.numbers: dict = {"settings": settings.recorded, "datasets": {}}
        self.parts: list[dict] = []

    def make(self) -> None:
        """Everything that the runs allow."""
        self._tables()
        self._rates()
        asked = self.first.data["settings"]
        files = recorded_files(asked)
        for path in files.values():
            if not is_digest_of(asked["sha256"][path], path):
                raise self._changed("--runs", path)
        model = self._model(asked)
        for dataset, path in files.items():
            examples = load_examples(path)[: asked["limit"]]
            numbers: dict[str, Any] = {}
            self.numbers["datasets"][dataset] = numbers
            self.parts.append({"heading": f"What happens inside: {dataset}", "level": 2})
            self._scores(dataset, numbers)
            if model is not None:
                self._lens(model, dataset, examples, numbers)
                self._means(model, dataset, examples, numbers)

    def _changed(self, argument: str, place: object) -> UsageError:
        return UsageError(f"{argument}: {place} is not what {self.run} was made with: evaluate again.")

    def _model(self, asked: dict):
        """The CLaRa checkpoint of the first run, or `None`; what else it was made with is not loaded."""
        recorded = asked["model"]
        recorded = ModelSource(**recorded) if isinstance(recorded, dict) else recorded and ModelSource(recorded)
        source = self.settings.model or model_source("--model", recorded)
        if source is None:
            return None
        if recorded is not None:
            found = model_hash(source, *filter(None, [asked["memory_store"]]))
            if asked["sha256"].get(str(recorded), found) != found:
                raise self._changed("--model", source)
        with loading("--model", source):
            return load_clara(source)

    # Tables, and what all runs show together

    def _tables(self) -> None:
        for folder, results in self.results.items():
            self.parts += [{"heading": f"Run {folder}", "level": 2}, *html_parts(results.data)]

    def _rates(self) -> None:
        datasets = dict.fromkeys(dataset for results in self.results.values() for dataset in results.datasets)
        for dataset in datasets:
            curves = _curves(self.results.values(), dataset)
            rates = {point["rate"] for points in curves.values() for point in points}
            if len(rates) > 1:
                self.numbers.setdefault("rates", {})[dataset] = curves
                files = plots.plot_rates(curves, self.folder, f"rates-{file_name(dataset)}")
                shows = f"Answer F1 over the compression rate, {dataset}."
                self._show(
                    files, shows, "Vertical bars: 95% bootstrap intervals of each run; points of one rate are spread."
                )

    # The first run from inside

    def _scores(self, dataset: str, numbers: dict) -> None:
        for system, checkpoint in CHECKPOINTS.items():
            records = self.first.records.get(dataset, {}).get(system)
            if not records:
                continue
            found = scored_rankings(records, self.first.data["checkpoints"][checkpoint]["temperature"])
            if found is None:
                continue
            by_score, by_share = (reliability(values, found.right) for values in (found.top, found.confidence))
            error = calibration_error(by_share)
            numbers[system] = {"auc": separation(found), "ece": error, "by_score": by_score, "by_softmax": by_share}
            self._show(
                plots.plot_scores(found, system, self.folder, f"scores-{file_name(dataset)}-{system}"),
                f"Scores that {system} gives to gold documents and to all other candidates.",
                f"A gold document's is the higher one with probability {separation(found):.3f} (ROC AUC over all "
                f"questions; {len(found.gold)} gold documents, {len(found.rest)} others).",
            )
            self._show(
                plots.plot_reliability(
                    by_score, by_share, error, self.folder, f"reliability-{file_name(dataset)}-{system}"
                ),
                f"How often the document that {system} ranks first is a gold one, over its score and over its share in "
                "the softmax of the candidates' scores.",
                f"Ten bins of equal size over {len(found.top)} questions, 95% Wilson intervals. Expected calibration "
                f"error of the softmax at the model's temperature: {error:.3f}.",
            )

    def _lens(self, model, dataset: str, examples: list[QAExample], numbers: dict) -> None:
        rows = logit_lens(model, examples[: self.settings.limit], self.settings.seed)
        if not rows:
            return
        kinds = [kind for row in rows for _, kind in row.tokens]
        shares = {kind: kinds.count(kind) / len(kinds) for kind in ("question", "gold document", "neither")}
        gold, other = (float(np.mean([getattr(row, name) for row in rows])) for name in ("gold", "other"))
        numbers["lens"] = {"shares": shares, "only_in_gold": gold, "only_in_other_candidate": other}
        numbers["lens"]["rows"] = [asdict(row) for row in rows]
        self.parts.append({"heading": "Logit lens of the query reasoner", "level": 3})
        asked, neither = shares["question"], shares["neither"]
        self.parts.append(
            {
                "text": (
                    f"The output head applied to the query vectors. Of the ten strongest tokens, {100 * asked:.1f}% "
                    f"stand in the question (underlined), {100 * gold:.1f}% do not, but stand in a gold document "
                    f"(bold), {100 * neither:.1f}% stand in neither. For comparison: {100 * other:.1f}% do not stand "
                    f"in the question, but in as many other candidates, drawn at random. {len(rows)} questions; the "
                    f"first {min(LENS_ROWS, len(rows))} are shown."
                )
            }
        )
        self.parts.append({"lens": rows[:LENS_ROWS]})

    def _means(self, model, dataset: str, examples: list[QAExample], numbers: dict) -> None:
        documents = list(dict.fromkeys(document for one in examples for document in one.docs))
        chosen = np.random.default_rng(self.settings.seed).permutation(len(documents))[: self.settings.limit]
        if len(chosen) < 3:
            return
        texts, memories = mean_states(model, [documents[place] for place in sorted(chosen)])
        own = _cosines(texts, memories)
        matched = float((own.argmax(axis=1) == np.arange(len(own))).mean())
        numbers["means"] = {
            "documents": len(own),
            "mse": float(((texts - memories) ** 2).mean()),
            "cosine_own": float(own.diagonal().mean()),
            "cosine_others": float(own[~np.eye(len(own), dtype=bool)].mean()),
            "nearest_is_own": matched,
        }
        with loading("--projection", self.settings.projection):
            points = project(np.concatenate([texts, memories]), self.settings.projection, self.settings.seed)
        method = {"pca": "principal component", "tsne": "t-SNE dimension"}[self.settings.projection]
        texts, memories = np.split(points, 2)
        files = plots.plot_means(texts, memories, method, self.folder, f"means-{file_name(dataset)}")
        self._show(
            files,
            "Mean hidden state of a document's tokens, and mean of its memory vectors.",
            f"{len(own)} documents; lines join the two means of one. Cosine of a document's mean with its own "
            f"memory's, both less the mean over all documents: {numbers['means']['cosine_own']:.3f} on average; with "
            f"another's: {numbers['means']['cosine_others']:.3f}. Its own is the nearest for {100 * matched:.0f}%.",
        )

    def _show(self, files: list[str], shows: str, caption: str) -> None:
        svg = next(file for file in files if file.endswith(".svg"))
        self.parts.append(figure_part(self.folder / svg, shows, caption))


def _curves(runs, dataset: str) -> dict[str, list[dict]]:
    """Per system that answers, its F1 in every run, by the compression rate of the run's model."""
    curves: dict[str, list[dict]] = {}
    for results in runs:
        made, found = results.data["checkpoints"].get("model"), results.datasets.get(dataset)
        if made is None or found is None:
            continue
        for system, summary in found["systems"].items():
            if "f1" in summary:
                ends = {name: summary["f1"][name] for name in ("value", "low", "high")}
                curves.setdefault(system, []).append({"rate": made["compression_rate"], **ends})
    return {system: sorted(points, key=lambda point: point["rate"]) for system, points in curves.items()}


def _cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Cosines of all pairs, `[n, n]`, after taking off what all have in common."""
    left, right = (rows - rows.mean(axis=0) for rows in (left, right))
    left, right = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (left, right))
    return left @ right.T


def analyze(settings: AnalysisSettings) -> dict:
    """Makes an analysis and writes it when it is whole; returns the numbers, or those of the same one made before.

    Raises:
        UsageError: another process works in the output folder, or a run is not what it was.
    """
    folder = Path(settings.output_dir)
    if not settings.overwrite and (earlier := settings.earlier()) is not None:
        logger.warning(f"{folder} holds this analysis already: it is reused.")
        return earlier
    lock = take_lock(folder)
    staged = folder / STAGED
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        analysis = Analysis(settings, staged)
        analysis.make()
        write_text(staged / PAGE, page("CLaRa evaluation", analysis.parts))
        write_json(staged / NUMBERS, analysis.numbers)
        (folder / NUMBERS).unlink(missing_ok=True)  # which come last: where they are, the pictures are theirs
        for path in sorted(staged.iterdir(), key=lambda path: path.name == NUMBERS):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        release_lock(folder, lock)
    return analysis.numbers


def main(arguments: list[str] | None = None) -> None:
    """The program, see the top of this file."""
    settings = parse(AnalysisSettings, arguments, description=__doc__)
    analyze(settings)
    print(f"Page, pictures and numbers: {Path(settings.output_dir) / PAGE}")
