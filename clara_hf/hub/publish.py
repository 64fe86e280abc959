"""Publish a checkpoint on the Hub: what its use needs, its card and its results, and nothing else of a run's folder.

clara publish RUN_DIR user/repo [--private] [--revision BRANCH] [--adapter_only | --full] [--subfolder NAME]
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError
from transformers.utils import logging

import modeling_clara
from clara_hf.hub.benchmarks import write_benchmarks
from clara_hf.hub.cards import CARD_FILE, OWN_CARD, RESULTS_FILE, make_card
from clara_hf.program import UsageError, option, parse, read_json, run_program, write_json
from modeling_clara import CLaRaConfig, CLaRaForRetrievalGeneration
from modeling_clara.configuration_clara import check_others_can_load, is_hub_id
from modeling_clara.weights_clara import ADAPTERS, CLARA_WEIGHTS, NOTICES, open_repository, push_folder


logger = logging.get_logger(__name__)

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", *(f"{name}/adapter_model.safetensors" for name in ADAPTERS))
WEIGHTS += tuple(f"{name}/adapter_config.json" for name in ADAPTERS)
CODE = "*_clara.py"
READ = ("config.json", "processor_config.json", "tokenizer*", "special_tokens_map.json", "chat_template.jinja")
SHOWN = (RESULTS_FILE, "*.png", "*.svg", *NOTICES)
AUTO_MAPS = {
    "config.json": {
        "AutoConfig": "configuration_clara.CLaRaConfig",
        "AutoModel": "modeling_clara.CLaRaForRetrievalGeneration",
    },
    "processor_config.json": {"AutoProcessor": "processing_clara.CLaRaProcessor"},
}


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    checkpoint_format: str | None = None,
    subfolder: str | None = None,
    results_file: str | os.PathLike | None = None,
    base_licence: str | None = None,
    benchmarks: list[str] | None = None,
) -> str:
    """Upload the checkpoint in `folder` to the Hub, in one commit.

    Args:
        folder: a checkpoint, or a run's folder with a finished model in it.
        repo_id: `user/name`; made if it does not exist.
        private: of a repository that is made.
        revision: branch, made if it does not exist.
        checkpoint_format: `"adapter"` or `"full"`; by default `"adapter"` where the base is named by its Hub id, else
            `"full"`.
        subfolder: of the repository, for several models in one; remote code is at its root in any case, where
            transformers looks for it.
        results_file, base_licence: as [`make_card`] takes them; by default the licence that the base's card declares.
        benchmarks: figures of the results for registered benchmarks, as [`write_benchmarks`] takes them.

    Returns:
        The commit's address.

    Raises:
        UsageError: `folder` holds no checkpoint, its adapters alone would be without a base, a benchmark is not
            registered or has no figure, or the Hub refuses.
    """
    folder, subfolder = Path(folder), (subfolder or "").strip("/")
    if subfolder in ADAPTERS or subfolder.startswith("."):
        raise UsageError(f"subfolder is {subfolder!r}, the name of a part of a checkpoint: give another one.")
    if subfolder and benchmarks:
        raise UsageError(
            "benchmark and subfolder: a leaderboard shows one model of a repository; leave one of them out."
        )
    try:
        if not (folder / "config.json").is_file():
            raise UsageError(f"{folder} holds no finished checkpoint (config.json): give the folder of one.")
        with tempfile.TemporaryDirectory() as staged:
            place = Path(staged, subfolder)
            stage(folder, place, checkpoint_format)
            if results_file is not None:
                (place / RESULTS_FILE).unlink(missing_ok=True)
                shutil.copy(results_file, place / RESULTS_FILE)
            base_licence = base_licence or declared_licence(CLaRaConfig.from_pretrained(folder))
            title = repo_id.rpartition("/")[2]
            card = make_card(
                place, repo_id=repo_id, base_licence=base_licence, title=title, subfolder=subfolder, record=folder
            )
            if benchmarks:
                config, results = CLaRaConfig.from_pretrained(place), read_json(place / RESULTS_FILE)
                write_benchmarks(benchmarks, results, place, f"compression rate {config.rate_in_use}")
            return push(Path(staged), card, repo_id, private=private, revision=revision, inside=subfolder)
    except UsageError:
        raise
    except Exception as error:  # beside the Hub's own errors those of its HTTP library, whichever that is
        raise refusal(repo_id, error) from error


def declared_licence(config: CLaRaConfig, token: str | None = None) -> str | None:
    """The licence that the card of the base on the Hub declares; `None` where there is none, and for a converted
    checkpoint, which has its authors' own."""
    if config.original is not None or not is_hub_id(config.base_model_name_or_path):
        return None
    try:
        found = ModelCard.load(config.base_model_name_or_path, token=token).data.license
    except Exception:  # beside the Hub's own errors those of its HTTP library: the card says that it is not known
        return None
    return found if isinstance(found, str) else None


def stage(folder: Path, place: Path, checkpoint_format: str | None = None) -> None:
    """Put what of the checkpoint `folder` is for others into `place`, but for a card.

    Raises:
        UsageError: it has no weights.
        ValueError: adapters alone over a base that is no Hub id.
    """
    config = CLaRaConfig.from_pretrained(folder)
    config.checkpoint_format = checkpoint_format or ("adapter" if is_hub_id(config.base_model_name_or_path) else "full")
    check_others_can_load(config)
    if not found(folder, WEIGHTS):
        raise UsageError(f"{folder} has no weights: give the folder of a finished checkpoint.")
    place.mkdir(parents=True, exist_ok=True)
    own = CLaRaConfig.from_pretrained(folder).checkpoint_format
    own = own if own == "full" or (folder / CLARA_WEIGHTS).is_file() else "flat"
    if own == config.checkpoint_format:
        link(folder, place, (*WEIGHTS, *READ))
    else:
        model = CLaRaForRetrievalGeneration.from_pretrained(folder, checkpoint_format=config.checkpoint_format)
        model.save_pretrained(place)
    link(folder, place, (*SHOWN, CODE))
    if not (place / "modeling_clara.py").is_file():
        link(Path(modeling_clara.__file__).parent, place, (CODE,))
    for file, classes in AUTO_MAPS.items():
        values, before = read_json(place / file), read_json(folder / file).get("auto_map", {})
        write_json(place / file, {**values, "auto_map": {**classes, **values.get("auto_map", {}), **before}})


def found(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Files of `folder`, as paths within it, that are named so."""
    return sorted({path.relative_to(folder) for name in patterns for path in folder.glob(name) if path.is_file()})


def link(folder: Path, place: Path, patterns: tuple[str, ...]) -> None:
    """Have files of `folder` in `place`, too, without copying them where the file system can."""
    for name in found(folder, patterns):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).unlink(missing_ok=True)
        try:
            os.link((folder / name).resolve(), place / name)
        except OSError:
            shutil.copy(folder / name, place / name)


def push(
    staged: Path, card: ModelCard | None, repo_id: str, token=None, private=None, revision=None, inside="", **options
):
    """Upload what is staged, with `card`, in one commit; a card that a person wrote there is kept.

    Args:
        inside: the model's folder in `staged` and in the repository, whose root gets the code and a card, too.
        options: of `HfApi.upload_folder`.

    Returns:
        The commit's address.
    """
    if card is not None:
        card.validate()
    repo_id = open_repository(repo_id, private, token, revision)
    api = HfApi(token=token)
    for name in {f"{inside}/{CARD_FILE}".lstrip("/"), CARD_FILE} if card is not None else ():
        before = OWN_CARD
        if api.file_exists(repo_id, name, revision=revision):
            before = Path(api.hf_hub_download(repo_id, name, revision=revision)).read_text(encoding="utf-8")
        if OWN_CARD in before:
            (staged / name).write_text(str(card), encoding="utf-8")
        else:
            logger.warning(f"{repo_id}: {name} was not written by this package and is kept.")
    for path in (staged / inside).glob("*.py") if inside else ():
        os.replace(path, staged / path.name)
    options.setdefault("commit_message", f"Upload {inside or 'model'}")
    return push_folder(staged, repo_id, inside, token=token, revision=revision, **options).commit_url


def refusal(repo_id: str, error: Exception) -> UsageError:
    """One sentence for what the Hub, the network or the checkpoint had against an upload."""
    reason = " ".join(str(error).split())
    response = getattr(error, "response", None)  # of the Hub's errors
    if response is None and isinstance(error, (HFValidationError, ValueError, FileNotFoundError)):
        return UsageError(reason)
    if response is not None and response.status_code in (401, 403, 404):
        return UsageError(
            f"the Hub refuses to write to {repo_id} (status {response.status_code}): log in with `hf auth login`, or "
            "set HF_TOKEN to a token that may write there."
        )
    return UsageError(f"the upload to {repo_id} failed ({reason[:300]}): run the same command again.")


@dataclass
class PublishArguments:
    """What `clara publish` uploads, and where to; see [`publish`]."""

    folder: str = option(help="Folder of a finished checkpoint.", positional=True)
    repo_id: str = option(help="user/repo on the Hub; made if it does not exist.", positional=True)
    private: bool | None = option(None, "Make the new repository private.")
    revision: str | None = option(None, "Branch to write to; made if it does not exist.")
    adapter_only: bool = option(False, "Adapters without the base (default for a base named by its Hub id).")
    full: bool = option(False, "Adapters and base (default for any other base).")
    subfolder: str | None = option(None, "Folder of the repository, for several models.")
    results_file: str | None = option(None, "results.json of clara eval; by default the one in the folder.")
    base_licence: str | None = option(
        None, "Licence of the base, by default what its card says.", aliases="--base_license"
    )
    benchmark: list[str] = option(
        help="ID:TASK=[DATA/]METRIC: show a figure of the results on the leaderboard of a registered benchmark, "
        "such as user/qa:default=f1.",
        default_factory=list,
        adds=True,
    )

    def __post_init__(self):
        if self.adapter_only and self.full:
            raise UsageError("adapter_only and full are both set: choose one.")

    @property
    def checkpoint_format(self) -> str | None:
        return "adapter" if self.adapter_only else "full" if self.full else None


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = parse(PublishArguments, arguments, description=__doc__)
    address = publish(
        options.folder,
        options.repo_id,
        options.private,
        options.revision,
        options.checkpoint_format,
        options.subfolder,
        options.results_file,
        options.base_licence,
        options.benchmark,
    )
    print(address)


if __name__ == "__main__":
    run_program(main)
