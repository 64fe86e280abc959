"""The evidence suite: variants × seeds are trained and evaluated, and claims about them settled.

    clara evidence benchmarks/evidence/full.yaml
    clara evidence benchmarks/evidence/full.yaml --only joint sup --seeds 0 1

Every run has a folder that is named by its content: settings, data, starting checkpoint and code. A finished one is
reused, an interrupted one resumed; evaluations resume from their cache. The report follows from these alone.
"""

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from transformers.utils import logging

import modeling_clara
import trainers
from clara_hf.data.files import content_digest
from clara_hf.data.schema import QAExample, load_examples
from clara_hf.evaluation.cache import digest
from clara_hf.evaluation.evaluator import Evaluator
from clara_hf.evaluation.evidence.claims import Claim, settle
from clara_hf.evaluation.evidence.conditions import ALL, lens_records, store_in_form, with_candidates
from clara_hf.evaluation.evidence.report import write_report
from clara_hf.evaluation.plan import parse_system
from clara_hf.evaluation.systems.loading import model_hash
from clara_hf.memory_store.encoding import ROTATED
from clara_hf.program import RunFolder, UsageError, parse, stages
from clara_hf.program.models import ModelSource


logger = logging.get_logger(__name__)
STAGES = {
    "scp": stages.scp,
    "instruct": stages.instruct,
    "joint": stages.joint,
    "contrastive": stages.contrastive,
    "dro": stages.dro,
}
LENSES = ("lens", "lens-before-joint")
# Where a run lies, and where it reads memories, does not change it.
PLACES = ("output_dir", "memory_store", "dataset_num_proc")
FILES = ("train_file", "validation_file", "prompts_file")


@dataclass(kw_only=True)
class Variant:
    """One way to train, by a recipe; or, with `of`, another way to ask what a variant has trained.

    Parameters:
        stage (`str`): scp, instruct, joint, contrastive or dro.
        config (`str`): the recipe's YAML file.
        arguments (`dict`): what differs from it.
        after (`str`, *optional*): the variant whose run of the same seed it starts from.
        of (`str`, *optional*): the variant whose runs are asked, in place of `stage`, `config` and `arguments`.
        systems (`list[str]`): what is evaluated with it, see [`~clara_hf.evaluation.plan`]; `dro` for a run of that
            stage; `lens` and `lens-before-joint`, see [`~clara_hf.evaluation.evidence.conditions.lens_records`].
            None: it is only started from.
        candidates (`int` or `"all"`, *optional*): candidates of a question, see
            [`~clara_hf.evaluation.evidence.conditions.with_candidates`]; those of the file by default.
        memory_form (`str`, *optional*): the form in which memories are stored, rotated8, rotated4 or rotated2.
        rate (`int`, *optional*): at which of several compression rates of its checkpoint it is asked; not by lenses.
    """

    stage: str | None = field(default=None, metadata={"choices": list(STAGES)})
    config: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    after: str | None = None
    of: str | None = None
    systems: list[str] = field(default_factory=lambda: ["clara"])
    candidates: int | str | None = None
    memory_form: str | None = field(default=None, metadata={"choices": list(ROTATED)})
    rate: int | None = None

    def __post_init__(self):
        trains = self.stage is not None and self.config is not None
        if trains == (self.of is not None) or self.of is not None and (self.arguments or self.after):
            raise UsageError("a variant has stage and config, or of, the name of another one, and no arguments.")
        if self.candidates is not None and self.candidates != ALL and not int(self.candidates) > 0:
            raise UsageError(f"candidates must be a number of at least 1, or {ALL}, but is {self.candidates!r}.")
        if self.rate is not None and (self.memory_form or any(lens in self.systems for lens in LENSES)):
            raise UsageError(f"rate is {self.rate}, which goes with neither memory_form nor lenses: leave one out.")

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe's values."""
        try:
            return yaml.safe_load(Path(self.config or "").read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise UsageError(f"config {self.config} cannot be read: {' '.join(str(error).split())}.") from error

    @property
    def values(self) -> dict[str, Any]:
        """The recipe's values and what overrides them."""
        return {**self.recipe, **self.arguments}


@dataclass(kw_only=True)
class EvidenceSettings:
    """What is run, and which claims it settles."""

    output_dir: str = field(metadata={"help": "Folder of runs, evaluations and report."})
    test_file: str = field(metadata={"help": "Questions to evaluate on."})
    limit: int | None = field(default=None, metadata={"help": "Take only this many of them from the start."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "A run of every variant for each."})
    only: list[str] | None = field(
        default=None,
        metadata={"help": "Variants to run, besides those that they start from; claims about others are not settled."},
    )
    batch_size: int = field(default=64, metadata={"help": "Questions, or documents, per batch of an evaluation."})
    max_new_tokens: int = field(default=12, metadata={"help": "Limit of an answer's length in tokens."})
    variants: dict[str, Variant] = field(default_factory=dict, metadata={"help": "By name."})
    claims: dict[str, Claim] = field(default_factory=dict, metadata={"help": "By name."})

    def __post_init__(self):
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UsageError(f"seeds is {self.seeds}: give at least one, each once.")
        if not Path(self.test_file).is_file():
            raise UsageError(f"test_file: there is no file {self.test_file}.")
        known = []
        for name, variant in self.variants.items():
            if variant.after is not None and variant.after not in known:
                raise UsageError(f"variants.{name}.after is {variant.after!r}: name a variant that stands before it.")
            if variant.of is not None and (variant.of not in known or self.variants[variant.of].of is not None):
                raise UsageError(f"variants.{name}.of is {variant.of!r}: name a variant that trains before it.")
            if " " in name:
                raise UsageError(f"variants: {name!r} has a space, which separates a variant from a system in claims.")
            known.append(name)
        for name, variant in self.variants.items():
            self._check_systems(name, variant)
        for name, claim in self.claims.items():
            self._check_sides(name, claim)
        if self.only is not None:
            self.variants = self._with_what_they_need(self.only)

    def _check_systems(self, name: str, variant: Variant) -> None:
        is_dro = (variant if variant.of is None else self.variants[variant.of]).stage == "dro"
        for system in variant.systems:
            if system in LENSES and not is_dro or system == "dro" and is_dro:
                continue
            try:
                missing = parse_system(system).missing(() if is_dro else ("model", "before_joint"))
            except ValueError as error:
                raise UsageError(f"variants.{name}.systems: {error}.") from error
            if missing is not None:
                raise UsageError(f"variants.{name}.systems has {system!r}, which its runs cannot be asked as.")

    def _check_sides(self, name: str, claim: Claim) -> None:
        for variant, system in () if claim.not_run else claim.sides:
            if variant not in self.variants or system not in self.variants[variant].systems:
                raise UsageError(f"claims.{name} names {f'{variant} {system}'!r}, but no variant has such a system.")

    def _with_what_they_need(self, chosen: list[str]) -> dict[str, Variant]:
        unknown = [name for name in chosen if name not in self.variants]
        if unknown or not chosen:
            raise UsageError(f"only is {chosen}: give names of variants, {', '.join(self.variants)}.")
        needed = set(chosen)
        for name in reversed(self.variants):
            if name in needed:
                needed |= {self.variants[name].after, self.variants[name].of}
        return {name: variant for name, variant in self.variants.items() if name in needed}


class Suite:
    """Runs, evaluations and verdicts of one set of settings; everything is kept in `settings.output_dir`."""

    def __init__(self, settings: EvidenceSettings):
        self.settings, self.out = settings, Path(settings.output_dir)
        self.code = {stage: code_digest(stage) for stage in STAGES}
        self.folders: dict[tuple[str, int], Path] = {}

    @cached_property
    def examples(self) -> list[QAExample]:
        return load_examples(self.settings.test_file)

    def folder(self, name: str, seed: int) -> Path:
        """Where a run is, or will be."""
        variant = self.settings.variants[name]
        if variant.of is not None:
            return self.folder(variant.of, seed)
        values = {key: value for key, value in variant.values.items() if key not in PLACES}
        for key in FILES:
            if values.get(key) is not None:
                path = Path(values[key])
                if not path.is_file():
                    raise UsageError(f"variants.{name}: {key}: there is no file {path}.")
                values[key] = content_digest(path.parent, [path])
        if variant.after is not None:
            values["model_name_or_path"] = self.folder(variant.after, seed).name
        else:
            values["model_name_or_path"] = model_hash(ModelSource(values["model_name_or_path"]))
        return self.out / "runs" / f"{name}-{seed}-{digest(variant.stage, values, seed, self.code[variant.stage])[:10]}"

    def start(self, name: str, seed: int) -> str:
        """The checkpoint that a run starts from."""
        variant = self.settings.variants[name]
        if variant.of is not None:
            return self.start(variant.of, seed)
        after = variant.after and str(self.folder(variant.after, seed))
        return after or str(variant.values["model_name_or_path"])

    def train(self, name: str, seed: int) -> None:
        """Carry out a run, or what is left of it."""
        variant, folder = self.settings.variants[name], self.folder(name, seed)
        values = {**variant.arguments, "model_name_or_path": self.start(name, seed), "output_dir": folder, "seed": seed}
        # What only other variants set is left out: on a command line, null would be a text.
        values = {key: value for key, value in values.items() if value is not None or key in variant.recipe}
        words = [word for key, value in values.items() for word in (f"--{key}", as_word(value))]
        logger.warning(f"{folder.name}")
        STAGES[variant.stage](["--config", variant.config, *words])

    def evaluate(self, name: str, seed: int) -> dict[str, list[dict]]:
        """Records of every question, by system."""
        variant, settings = self.settings.variants[name], self.settings
        folder, start = str(self.folder(name, seed)), self.start(name, seed)
        examples = self.examples if variant.candidates is None else with_candidates(self.examples, variant.candidates)
        records = {}
        for lens in filter(LENSES.__contains__, variant.systems):
            asked = examples[: settings.limit]
            kept = self.out / "lens" / f"{Path(folder).name}-{lens}-{digest([asdict(one) for one in asked])[:10]}.json"
            kept.parent.mkdir(exist_ok=True)
            records[lens] = lens_records(folder if lens == "lens" else start, asked, kept)
        systems = [system for system in variant.systems if system not in LENSES]
        if not systems:
            return records
        options = {"limit": settings.limit, "batch_size": settings.batch_size}
        options |= {"max_new_tokens": settings.max_new_tokens, "cache_dir": self.out / "cache"}
        if any("before-joint" in system for system in systems):
            options["before_joint"] = ModelSource(start, rate=variant.rate)
        if variant.memory_form is not None:
            options["memory_store"] = store_in_form(folder, variant.memory_form, self.out / "stores")
        is_dro = self.trained(name).stage == "dro"
        labels = {f"dro {folder}" if is_dro and system == "dro" else system: system for system in systems}
        results = Evaluator(examples, list(labels), **options)(
            None if is_dro else ModelSource(folder, rate=variant.rate)
        )
        found = next(iter(results.records.values()))
        return records | {labels[label]: rows for label, rows in found.items()}

    def trained(self, name: str) -> Variant:
        """The variant that a name's runs are trained by."""
        variant = self.settings.variants[name]
        return variant if variant.of is None else self.settings.variants[variant.of]

    def run(self) -> dict:
        """Train, evaluate, settle, report; returns what the report holds. All variants of a seed come before the
        next seed."""
        with RunFolder(self.out, {"suite": "evidence"}).claimed() as folder:
            for name in self.settings.variants:
                self.folder(name, self.settings.seeds[0])  # what is missing shows before anything is trained
            folder.begin()
            found = {}
            for seed in self.settings.seeds:
                for name, variant in self.settings.variants.items():
                    if variant.of is None:
                        self.train(name, seed)
                    found[name, seed] = self.evaluate(name, seed) if variant.systems else {}
            evidence = self.settle(found)
            write_report(evidence, self.out)
        return evidence

    def settle(self, found: dict[tuple[str, int], dict[str, list[dict]]]) -> dict:
        """Verdicts, and the means of every system, from the records of all evaluations."""
        seeds = self.settings.seeds
        types = [one.type for one in self.examples][: self.settings.limit]

        def scores(metric: str, kind: str | None) -> dict[tuple[str, str], np.ndarray]:
            """`[seeds, questions]` by variant and system, of questions of a type."""
            values = {}
            for name in self.settings.variants:
                for system in found[name, seeds[0]]:
                    rows = [[one["scores"].get(metric, np.nan) for one in found[name, s][system]] for s in seeds]
                    chosen = [at for at, own in enumerate(types) if kind in (None, own)]
                    array = np.array(rows, dtype=np.float64)[:, chosen]
                    if not np.isnan(array).all():
                        values[name, system] = array
            return values

        claims = {name: settle(claim, scores(claim.metric, claim.type)) for name, claim in self.settings.claims.items()}
        trained = {name: variant for name, variant in self.settings.variants.items() if variant.of is None}
        means = {metric: scores(metric, None) for metric in ("f1", "recall@1", "recall@5")}
        return {
            "claims": claims,
            "means": means,
            "runs": [self.folder(name, seed).name for name in trained for seed in seeds],
            "seeds": seeds,
            "questions": len(types),
            "commit": commit(),
            "code": {stage: code for stage, code in self.code.items() if stage in {v.stage for v in trained.values()}},
            "settings": {name: [v.stage, v.config, v.arguments] for name, v in trained.items()},
        }


def as_word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def code_digest(stage: str) -> str:
    """Of all that trains at a stage: a run by other code is another run. DRO's own code trains at its stage only."""
    places = [Path(package.__file__).parent for package in (modeling_clara, trainers)]
    files = [(path.relative_to(place), path) for place in places for path in sorted(place.rglob("*.py"))]
    files = [(name, path) for name, path in files if stage == "dro" or "dro" not in name.parts]
    return hashlib.sha256(b"\0".join(str(name).encode() + path.read_bytes() for name, path in files)).hexdigest()[:16]


def commit() -> str:
    """Of the repository that this code lies in."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(arguments: list[str] | None = None) -> None:
    """`clara evidence CONFIG.yaml`, with options that override it."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    settings = parse(EvidenceSettings, arguments, description=__doc__.split("\n")[0])
    evidence = Suite(settings).run()
    for name, row in evidence["claims"].items():
        logger.warning(f"{name}: {row['verdict']}")
    logger.warning(f"Report: {Path(settings.output_dir) / 'evidence.md'}")
