"""Names that were read from a file: used only if they cannot lead out of the folder that they belong to."""

from pathlib import Path


def is_plain_name(name) -> bool:
    """Whether `name` is the name of something directly inside a folder: no separator, no `..`, not absolute."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(character in name for character in "/\\\0:")
        and Path(name).name == name
    )
