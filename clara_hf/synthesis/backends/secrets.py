"""Secrets in the fields of a request: found by their names, and hidden in whatever is written."""

import re
from collections.abc import Iterator
from typing import Any


# `api_key`, `Authorization`, `access-token`; not `max_tokens` or `stop_token_ids`.
SECRET_NAME = re.compile(
    r"(?:key|secret|password|passwd|authorization|auth|credentials?|bearer|cookie|token)$", re.IGNORECASE
)
HIDDEN = "[hidden]"


def masked(value: Any, secret: bool = False) -> Any:
    """The value with every text in a field of a secret's name hidden."""
    if isinstance(value, dict):
        return {name: masked(part, secret or bool(SECRET_NAME.search(str(name)))) for name, part in value.items()}
    if isinstance(value, list):
        return [masked(part, secret) for part in value]
    return HIDDEN if secret and isinstance(value, str) and value else value


def secrets_of(value: Any, secret: bool = False) -> Iterator[str]:
    """The texts that `masked` hides; of `Bearer ...` also what stands behind the word."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from secrets_of(part, secret or bool(SECRET_NAME.search(str(name))))
    elif isinstance(value, list):
        for part in value:
            yield from secrets_of(part, secret)
    elif secret and isinstance(value, str):
        yield value
        yield from value.split()[1:]
