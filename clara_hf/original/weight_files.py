"""Weights of models that are larger than memory: read and written tensor by tensor, and put in place as a whole."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging

from clara_hf.program.paths import is_plain_name


MAX_FILE_BYTES = 2 * 10**9


class ConversionError(ValueError):
    """A checkpoint that cannot be converted; the message is one sentence for the user."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, where libraries say what is wrong."""
    return str(error).strip().split("\n")[0]


class WeightFiles:
    """Tensors of a model's safetensors files, in a folder or on the Hub, read one by one.

    Raises:
        OSError: there are none; with `local_files_only`, none on this machine.
    """

    def __init__(self, source: str, subfolder: str = "", local_files_only: bool = False):
        self._options = {"subfolder": subfolder, "local_files_only": local_files_only}
        self._source = source
        self.file_of: dict[str, str]
        try:
            # An index beside a single file is one of an earlier save.
            with self._open(SAFE_WEIGHTS_NAME) as file:
                self.file_of = dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
        except OSError:
            index = self._path(SAFE_WEIGHTS_INDEX_NAME)
            with open(index, encoding="utf-8") as file:
                self.file_of = json.load(file)["weight_map"]
            for tensor, name in self.file_of.items():
                if not is_plain_name(name):
                    raise ConversionError(
                        f"{index} places {tensor} in {name!r}, which is no file of its folder"
                    ) from None

    def _path(self, name: str) -> str:
        return cast(str, cached_file(self._source, name, **self._options))  # it raises where there is none

    @contextmanager
    def _open(self, name: str) -> Iterator:
        path = self._path(name)
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except SafetensorError as error:
            raise ConversionError(f"{path} is truncated, or no safetensors file: {error}") from error

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def get(self, name: str) -> torch.Tensor:
        with self._open(self.file_of[name]) as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        """Names, file by file."""
        return iter(sorted(self.file_of, key=lambda name: (self.file_of[name], name)))

    def __len__(self) -> int:
        return len(self.file_of)


def write_json(path: str, values: dict) -> None:
    """Write `values` as an indented JSON file."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=2, sort_keys=True)
        file.write("\n")


def write_weights(folder: str, names: list[str], get: Callable[[str], torch.Tensor]) -> None:
    """Write the tensors that `get` returns for `names` to safetensors files of about 2 GB and their index."""
    files: list[list[str]] = []
    group, size = {}, 0
    for name in logging.tqdm(names, desc="Writing weights"):
        group[name] = get(name)
        size += group[name].nbytes
        if size >= MAX_FILE_BYTES or name == names[-1]:
            save_file(group, os.path.join(folder, f"part-{len(files)}"), metadata={"format": "pt"})
            files.append(list(group))
            group, size = {}, 0
    index: dict[str, str] = {}
    for position, members in enumerate(files):
        name = f"model-{position + 1:05d}-of-{len(files):05d}.safetensors"
        os.replace(os.path.join(folder, f"part-{position}"), os.path.join(folder, name))
        index |= dict.fromkeys(members, name)
    write_json(os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME), {"metadata": {}, "weight_map": index})
