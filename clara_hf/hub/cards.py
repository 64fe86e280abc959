"""Model cards: from a checkpoint's configuration, the record of its run, and its evaluation. Nothing is claimed that no
file holds, and what was not measured is said."""

import json
import os
from dataclasses import MISSING, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import TrainingArguments
from transformers.utils import logging

from modeling_clara import CLaRaConfig
from modeling_clara.configuration_clara import is_hub_id


logger = logging.get_logger(__name__)

CARD_FILE = "README.md"
RESULTS_FILE = "results.json"
# By which a card of this package is told from one that a person wrote.
OWN_CARD = "library_name: clara-hf"
COLUMNS = {"F1": "f1", "EM": "em", "Recall@1": "recall@1", "Recall@5": "recall@5", "both gold in 5": "all_gold@5"}
# Of a card's systems, in its order: others are left to the results file.
SYSTEMS = (
    "clara",
    "clara-before-joint",
    "sup",
    "bm25",
    "dro",
    "gold",
    "text",
    "text-gold",
    "no-memory",
    "wrong-memory",
    "shuffled-memory",
)
PACKAGES = ("clara-hf", "torch", "transformers", "peft", "accelerate", "datasets")
# Settings of a run that are places, bookkeeping or shown elsewhere in the card.
NOT_SHOWN = {
    *("output_dir", "logging_dir", "run_name", "report_to", "hub_token", "hub_model_id", "push_to_hub", "use_cpu"),
    *("train_file", "validation_file", "train_limit", "validation_limit", "model_name_or_path", "prompts_file"),
    *("memory_store", "clara_config", "accelerator_config", "num_processes", "resume", "overwrite", "do_eval"),
    *("eval_strategy", "eval_steps", "save_steps", "save_strategy", "logging_steps", "logging_strategy", "project"),
    *("generation_max_new_tokens", "predict_with_generate", "log_level_replica", "seconds", "data"),
}
STAGES = {
    "scp": "A compressor after salient compressor pretraining (SCP, stage 1).",
    "instruct": "A compressor and generator after instruction tuning (stage 2).",
    "joint": "Retriever and generator after joint training (stage 3): retrieval learned from the answers' loss alone.",
    "contrastive": "A retriever trained from relevance labels: the supervised baseline of joint training.",
    None: "A CLaRa checkpoint.",
}


def make_card(
    folder: str | os.PathLike,
    results_file: str | os.PathLike | None = None,
    repo_id: str | None = None,
    base_licence: str | None = None,
    title: str | None = None,
    subfolder: str = "",
    record: str | os.PathLike | None = None,
    run: dict[str, Any] | None = None,
    state: dict[str, Any] | None = None,
) -> ModelCard:
    """The card of the checkpoint in `folder`.

    Args:
        folder: a checkpoint of this package.
        results_file: a `results.json` of `clara eval`; by default the one in `folder`, if there is one.
        repo_id: where the checkpoint will be, for the commands in the card.
        base_licence: of the base model (an identifier of the Hub, such as "apache-2.0"); a CLaRa checkpoint is a
            derivative of its base and carries its licence. Unknown licences are left to the reader, and said.
        title: heading of the card.
        subfolder: of `repo_id`, where the checkpoint will be.
        record: folder whose `run.json` and `trainer_state.json` tell of the training; by default `folder`.
        run, state: what these hold, where there are none.

    Raises:
        FileNotFoundError: `folder` holds no configuration, or `results_file` is not there.
        ValueError: `folder` holds another kind of model, or `results_file` is no results file.

    Example:

    ```python
    card = make_card("runs/nano/joint", "runs/nano/results.json", "me/clara-nano", base_licence="apache-2.0")
    card.save("runs/nano/joint/README.md")
    ```
    """
    folder = Path(folder)
    config = CLaRaConfig.from_pretrained(folder)
    found = Path(results_file) if results_file is not None else folder / RESULTS_FILE
    if results_file is not None and not found.is_file():
        raise FileNotFoundError(f"results_file: there is no file {found}.")
    results = _read(found) if found.is_file() else None
    if results is not None and not datasets_of(results):
        raise ValueError(f"results_file: {found} is no results file of clara eval (it has no 'systems').")
    record = Path(record or folder)
    run, state = _read(record / "run.json") or run or {}, _read(record / "trainer_state.json") or state or {}
    base = _base(config)
    tables = [] if results is None else [_table(name, part) for name, part in datasets_of(results).items()]
    title = title or (repo_id or folder.resolve().name).rpartition("/")[2]
    data = {
        "title": title,
        "repo_id": repo_id,
        "subfolder": subfolder,
        "config": config,
        "stage": {"summary": STAGES[_stage(run, config)]},
        "adapters": "three LoRA adapters" if config.query_reasoner else "two LoRA adapters",
        "base": base,
        "licence": {"text": base_licence or "that of the base model (not known to the program that wrote this card)"},
        "lora_targets": _text(config.lora_target_modules),
        "weights": "adapters only; the base model is loaded beside them"
        if config.checkpoint_format == "adapter"
        else "adapters and base model",
        "original": _origin(config, run),
        "results_file": found.name,
        "tables": tables,
        "unmeasured": [] if results is None else _unmeasured(results),
        "training": _training(run, state),
        "versions": ", ".join(f"{name} {installed}" for name in PACKAGES if (installed := _installed(name))),
        "metadata": _metadata(config, base, base_licence, results, title),
    }
    return ModelCard(_template().render(data))


def write_card(folder: str | os.PathLike, **options: Any) -> Path:
    """Write [`make_card`]'s card into `folder` as `README.md`; one that a person has written there is kept.

    Returns:
        The card's path.
    """
    path = Path(folder) / CARD_FILE
    if path.is_file() and OWN_CARD not in path.read_text(encoding="utf-8"):
        logger.warning(f"{path} was not written by this package: it is kept.")
        return path
    make_card(folder, **options).save(path)
    return path


def _template() -> jinja2.Template:
    environment = jinja2.Environment(  # Markdown, not HTML: what is filled in comes from configuration and numbers
        loader=jinja2.PackageLoader("clara_hf.hub"),
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,
    )
    return environment.get_template("model_card.md.jinja")


def _metadata(config: CLaRaConfig, base: dict, licence: str | None, results: dict | None, name: str) -> str:
    evaluated = []
    for dataset, part in datasets_of(results or {}).items():
        row = part["systems"].get("clara") or part["systems"].get("gold") or {}
        evaluated += [
            EvalResult(
                task_type="question-answering",
                task_name="Retrieval-augmented question answering",
                dataset_type=dataset or "questions",
                dataset_name=dataset or "questions",
                metric_type=metric,
                metric_name=title,
                metric_value=percent(row[metric]["value"]),
            )
            for title, metric in COLUMNS.items()
            if metric in row
        ]
    card = ModelCardData(
        library_name="clara-hf",
        pipeline_tag="question-answering",
        license=licence,
        base_model=base["name"],
        base_model_relation="adapter" if base["name"] and config.checkpoint_format == "adapter" else None,
        tags=["clara", "retrieval-augmented-generation", "context-compression", "latent-reasoning", "arxiv:2511.18659"],
        model_name=name if evaluated else None,
        eval_results=evaluated or None,
    )
    return card.to_yaml().strip()


def _base(config: CLaRaConfig) -> dict[str, str | None]:
    """The base's name on the Hub; a local folder is named by its last part, which is no id."""
    name = config.base_model_name_or_path
    shape = f"{config.decoder_config.model_type}, {config.decoder_config.num_hidden_layers} layers"
    if not name:
        return {"name": None, "text": f"not recorded ({shape})"}
    if not is_hub_id(name):
        return {"name": None, "text": f"`{Path(name).name}`, a local model ({shape})"}
    return {"name": name, "text": f"[{name}](https://huggingface.co/{name}) ({shape})"}


def _origin(config: CLaRaConfig, run: dict) -> str | None:
    if not config.original:
        return None
    weights = "its weights have been trained on since" if run else "weights are unchanged"
    told = f"Converted from a checkpoint of the paper's own release by `clara convert`; {weights}. "
    told += "Its authors' licence and attribution hold"
    has_names = config.to_dict().get("auto_map", {}).get("AutoModel", "").endswith(".OriginalCLaRa")
    names = ", and `generate_from_questions` and the release's other methods work as before" if has_names else ""
    return f"{told}{names}."


def _stage(run: dict, config: CLaRaConfig) -> str | None:
    if "stage" in run:
        return run["stage"]
    if "data_mix" in run:
        return "scp"
    if "in_batch_negatives" in run:
        return "contrastive"
    if "memory_store" in run or "freeze_query_reasoner" in run:
        return "joint"
    if run:
        return "instruct"
    return "joint" if config.query_reasoner else None


def _training(run: dict, state: dict) -> dict[str, Any] | None:
    if not run:
        return None
    steps, epochs = state.get("global_step"), state.get("epoch")
    tokens = run.get("max_tokens_per_batch")
    size = tokens or run.get("per_device_train_batch_size", 0)
    size *= run.get("gradient_accumulation_steps", 1) * run.get("num_processes", 1)
    size = f"at most {size} tokens" if tokens else f"{size} rows"
    sentence = f"{steps} steps of {size} ({epochs:.2f} epochs)." if steps and epochs else "Steps are not recorded."
    last = next((row for row in reversed(state.get("log_history", [])) if "train_runtime" in row), None)
    hardware = "Hardware and time are not recorded."
    if last is not None:
        device = "CPU" if run.get("use_cpu") else "the accelerator of the run"
        processes = run.get("num_processes", 1)
        number = f"{processes} process{'es' if processes > 1 else ''}"
        hardware = f"{last['train_runtime'] / 60:.1f} minutes in {number} on {device}."
    digests = run.get("digests", {})
    data = [
        {
            "name": f"`{Path(run[name]).name}`",
            "rows": run.get(limit) or "all",
            "digest": digests.get(run[name], "not recorded"),
        }
        for name, limit in (("train_file", "train_limit"), ("validation_file", "validation_limit"))
        if run.get(name)
    ]
    return {"sentence": sentence, "data": data, "hyperparameters": _changed(run), "hardware": hardware}


def _changed(run: dict) -> list[tuple[str, str]]:
    """The run's settings that are not the trainer's defaults."""
    defaults = {known.name: known.default for known in fields(TrainingArguments) if known.default is not MISSING}
    shown = {name: value for name, value in run.items() if name not in NOT_SHOWN and name in defaults}
    changed = {name: value for name, value in shown.items() if _plain(value) != _plain(defaults[name])}
    own = ("temperature", "top_k", "topk_taken_mask", "mse_weight", "data_mix", "max_length", "lora_r", "lora_alpha")
    changed |= {name: run[name] for name in own if run.get(name) is not None}
    return sorted(
        (f"`{name}`", _text(value)) for name, value in changed.items() if value not in (None, False, "", [], {})
    )


def _table(name: str | None, part: dict) -> dict[str, Any]:
    systems = {system: part["systems"][system] for system in SYSTEMS if system in part["systems"]}
    columns = {title: metric for title, metric in COLUMNS.items() if any(metric in row for row in systems.values())}
    rows = [
        {
            "name": f"`{system}`",
            "cells": [_cell(row.get(metric)) for metric in columns.values()],
            "n": max((value["n"] for value in row.values()), default=0),
        }
        for system, row in systems.items()
    ]
    return {"title": name or "All questions", "columns": list(columns), "rows": rows}


def _cell(value: dict | None) -> str:
    if value is None:
        return "–"
    return f"{percent(value['value'])} [{percent(value['low'])}, {percent(value['high'])}]"


def percent(value: float) -> float:
    return round(100 * value, 1)


def _unmeasured(results: dict) -> list[str]:
    named = {system for part in datasets_of(results).values() for system in part["systems"]}
    wanted = {
        "gold": "answers from the right documents",
        "no-memory": "answers without memory",
        "wrong-memory": "answers from another question's memory",
        "bm25": "BM25 over the same candidates",
    }
    return [f"{what} (`{system}`)" for system, what in wanted.items() if system not in named]


def datasets_of(results: dict) -> dict[str | None, dict]:
    """Each data file's part; the layout of single files of earlier versions has it at the top."""
    parts = results.get("datasets") or ({None: results} if "systems" in results else {})
    return {name: part for name, part in parts.items() if part.get("systems")}


def _read(path: Path) -> dict | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON ({error}).") from error
    return values if isinstance(values, dict) else None


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(getattr(value, "value", value), default=str))


def _text(value: Any) -> str:
    return (
        value
        if isinstance(value, str)
        else yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("\n...")
    )


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
