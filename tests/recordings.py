"""What was recorded of the published implementation, and how ours is compared with it.

`CLARA_SHARED` names the folder that holds `parity/` with the whole recordings; a part of one lies in `tests/data`.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from conftest import SHARED
from safetensors.torch import load_file

from clara_hf.original.convert import convert
from clara_hf.original.methods import OriginalCLaRa


PARITY = SHARED / "parity"
CASES = sorted(path.parent.name for path in PARITY.glob("*/golden.safetensors"))
# Largest error, relative to the largest value of the recorded tensor. Scores are divided by a temperature of 0.02 in
# the retrieval loss and before the gradients of the query reasoner.
TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
ADAPTERS = {
    "encoder_adapter": "compressor",
    "decoder_adapter": "generator",
    "query_reasoner_adapter": "query_reasoner",
}


def load_case(folder: Path, out: Path, prompts: Path | None) -> SimpleNamespace:
    """A recording, and the model that its checkpoint is converted to."""
    convert(str(folder / "checkpoint"), str(out), prompts=prompts and str(prompts))
    model = OriginalCLaRa.from_pretrained(out, dtype=torch.float32)
    record = json.loads((folder / "golden.json").read_text())
    return SimpleNamespace(
        folder=folder,
        out=out,
        model=model,
        processor=model.processor,
        golden=load_file(folder / "golden.safetensors"),
        record=record,
        inputs=json.loads((folder / "inputs.json").read_text()),
        settings=record["config"],
    )


def assert_close(ours: torch.Tensor, golden: torch.Tensor, name: str, tolerance: float = TOLERANCE) -> None:
    assert tuple(ours.shape) == tuple(golden.shape), name
    error = (ours.detach().double() - golden.double()).abs().max() / golden.double().abs().max().clamp(min=1e-12)
    assert error <= tolerance, f"{name}: {error:.2e}"


def texts_at(case, indices: list[int]) -> list[str]:
    return [case.inputs["documents"][index] for index in indices]


def encoded(case, texts: list[str], questions: bool = False, max_length: int | None = None):
    """Inputs padded to the full length, as the published code does."""
    length = max_length or case.settings["doc_max_length"]
    rows = case.processor.encode_questions(texts) if questions else case.processor.encode_documents(texts)
    return case.processor.pad_encodings(rows, width=length + 3)


def take_gradients(model) -> dict[str, torch.Tensor]:
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    return gradients


def assert_adapter_gradients(case, gradients: dict[str, torch.Tensor], prefix: str, adapters: int) -> None:
    """Every recorded gradient of so many adapters: of one layer, or of several."""
    compared = dict.fromkeys(ADAPTERS, 0)
    for name, golden in case.golden.items():
        if name.startswith(f"{prefix}.grad.") and "_adapter." in name:
            adapter, path = name.removeprefix(f"{prefix}.grad.").split(".", 1)
            module, half = path.rsplit(".", 1)
            ours = gradients[f"decoder.model.{module}.{half}.{ADAPTERS[adapter]}.weight"]
            assert_close(ours, golden, name, GRADIENT_TOLERANCE)
            compared[adapter] += 1
    assert sorted(map(bool, compared.values())) == [False] * (3 - adapters) + [True] * adapters
    assert all(count % 14 == 0 for count in compared.values())
