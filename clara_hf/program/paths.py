"""Names that users and files give: of something inside a folder, and of a model in a folder or on the Hub."""

from pathlib import Path

from clara_hf.program.errors import UsageError
from clara_hf.program.values import did_you_mean


def is_plain_name(name) -> bool:
    """Whether `name` is the name of something directly inside a folder: no separator, no `..`, not absolute."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(character in name for character in "/\\\0:")
        and Path(name).name == name
    )


def local_path(path: str | Path) -> Path:
    """The absolute path; `~` and `~/` stand for the home folder, any other name that begins with `~` for itself."""
    is_home = Path(path).parts[:1] == ("~",)
    return (Path(path).expanduser() if is_home else Path(path)).absolute()


def check_model_name(argument: str, name: str, revision: str | None = None) -> None:
    """See, without the network, whether a model's name can be one: a folder that is there, or the form of a Hub id.

    `runs/jiont` has that form, but is taken for a mistyped folder where there is a folder `runs`.

    Raises:
        UsageError: names `argument`, `name`, a folder of like name, and how a model on the Hub is named all the same.
    """
    first, slash, _ = name.partition("/")
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    mistyped = slash and revision is None and Path(first).is_dir()
    if Path(name).exists() or not (is_path or mistyped):
        return
    beside = Path(name).parent
    near = [(beside / one.name).as_posix() for one in beside.iterdir() if one.is_dir()] if beside.is_dir() else []
    hub = "" if is_path else f" A model on the Hub is named with its revision, as in {name}@main."
    raise UsageError(f"{argument}: there is no folder {name}{did_you_mean(name, near)}{hub}")
