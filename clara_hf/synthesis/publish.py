"""The card of finished data, and their upload to the Hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, DatasetCard, DatasetCardData, HfApi, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

from clara_hf.synthesis.errors import UsageError


CARD = """{data}

# {name}

Data for salient compressor pretraining (SCP) of CLaRa ([arXiv 2511.18659](https://arxiv.org/abs/2511.18659)): questions
with answers, and paraphrases, of {passages} passages. Written and verified by a language model; nobody has read all of
it.

| | |
|---|---|
{rows}

Each line of `scp.jsonl` has `data_type` (`qa` or `paraphrase`), `question` and `answers` (lists of equal length; a
paraphrase has no question), `docs` (the passage) and `passage_id`. `passages.jsonl` says where each passage is from,
`rejected.jsonl` what was set aside and why, `stats.json` how everything was made, `report.html` shows samples.

```python
from datasets import load_dataset

data = load_dataset("{repository}", split="train")
```

Passages keep the licence of the documents that they are cut from.
"""


def push(folder: Path, repository: str, files: tuple[str, ...], stats: dict[str, Any], private: bool = True) -> str:
    """Upload the files of a finished run in one commit; returns its address.

    Raises:
        UsageError: the Hub refuses, or cannot be reached.
    """
    api = HfApi()
    try:
        name = api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True).repo_id
        operations = [CommitOperationAdd(file, str(folder / file)) for file in files if file != "README.md"]
        operations.append(CommitOperationAdd("README.md", card(name.rpartition("/")[2], name, stats).encode()))
        commit = api.create_commit(name, operations, repo_type="dataset", commit_message="SCP data")
    except Exception as error:  # beside the Hub's own errors those of its HTTP library, whichever that is
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"--push_to_hub {repository}: the data are in {folder}, but not uploaded ({reason})."
        ) from error
    return commit.commit_url


def check_name(repository: str) -> None:
    """See before the work whether a data set can be uploaded under this name.

    Raises:
        UsageError: it is no name of a data set, or nobody is logged in.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(f"--push_to_hub must be USER/NAME, but is {repository!r}: {error}") from None
    if not get_token():
        raise UsageError("--push_to_hub needs a token of the Hub: run `hf auth login`, or set HF_TOKEN.")


def card(name: str, repository: str, stats: dict[str, Any]) -> str:
    """The card of a data set; `repository` is where it is loaded from."""
    data = DatasetCardData(
        configs=[{"config_name": "default", "data_files": "scp.jsonl"}],
        task_categories=["question-answering", "text-generation"],
        tags=["clara", "synthetic", "compression"],
    )
    settings = stats["settings"]
    facts = {
        **({"state": "partial, the run is not finished"} if stats["partial"] else {}),
        "pairs": stats["pairs"],
        "paraphrases": stats["paraphrases"],
        "passages without a verified pair": stats["without_pairs"],
        "other passages covered by their pairs": f"{100 * stats['coverage']:.1f}%",
        "model": settings["model"],
        "prompts, version": settings["prompts"],
        "seed": settings["seed"],
    }
    rows = "\n".join(f"| {name} | {str(value).replace('|', ' ')} |" for name, value in facts.items())
    named = {"name": name, "repository": repository, "passages": stats["passages"]}
    text = CARD.format(data=f"---\n{data.to_yaml()}\n---", rows=rows, **named)
    return DatasetCard(text).content
