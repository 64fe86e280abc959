"""GGUF files as bases: dequantized once, then a base as any other, wherever a base can be named."""

from pathlib import Path

import pytest
import torch
from gguf_files import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from clara_hf.program.models import CLaRaModelArguments, load_model
from clara_hf.synthesis.backends.local_model import LocalModel
from modeling_clara import CLaRaForRetrievalGeneration
from modeling_clara.quantization_clara import dequantized


pytest.importorskip("gguf", reason='GGUF files need gguf: pip install "clara-hf[gguf]"')
FILE = "tiny.Q8_0.gguf"
SMALL = {"doc_max_length": 32, "compression_rate": 8, "lora_r": 4}


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("gguf")
    write_gguf(base, place / FILE)
    return place


def test_the_dequantized_base_computes_what_the_file_was_made_from(folder, base):
    place = dequantized(folder, FILE)
    model, original = (AutoModelForCausalLM.from_pretrained(name).eval() for name in (place, base))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    text = "The market of Velholm is held on Thursdays."
    encoded = AutoTokenizer.from_pretrained(place)(text, return_tensors="pt")
    assert encoded["input_ids"].tolist() == [AutoTokenizer.from_pretrained(base).encode(text)]
    with torch.no_grad():
        torch.testing.assert_close(model(**encoded).logits, original(**encoded).logits, atol=0.05, rtol=0.05)


def test_it_is_written_once_and_not_reused_for_another_file(folder, tmp_path):
    for path in folder.glob("*.gguf"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tiny.Q8_0-bfloat16.partial-1").mkdir()  # of a process that was killed
    place = Path(dequantized(tmp_path, FILE, torch.bfloat16))
    assert place.name == "tiny.Q8_0-bfloat16" and (place / "model.safetensors").is_file()
    written = (place / "model.safetensors").stat().st_mtime_ns
    assert dequantized(str(tmp_path), FILE, "bfloat16") == str(place)
    assert (place / "model.safetensors").stat().st_mtime_ns == written
    assert sorted(path.name for path in tmp_path.iterdir()) == [place.name, FILE]
    with open(tmp_path / FILE, "ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match="tiny.Q8_0-bfloat16"):
        dequantized(tmp_path, FILE, "bfloat16")
    with pytest.raises(FileNotFoundError, match="other.gguf"):
        dequantized(tmp_path, "other.gguf")


def test_adapters_over_it_find_their_base_again(folder, tmp_path):
    args = CLaRaModelArguments(str(folder), gguf_file=FILE, clara_config={**SMALL, "checkpoint_format": "adapter"})
    model = load_model(args)
    documents = ["Velholm is a town on the river Aum."]
    model.save_pretrained(tmp_path / "adapters")
    again = CLaRaForRetrievalGeneration.from_pretrained(tmp_path / "adapters")
    torch.testing.assert_close(again.compress(documents), model.compress(documents), atol=0, rtol=0)
    direct = CLaRaForRetrievalGeneration.from_base(folder, gguf_file=FILE, **SMALL)
    assert direct.config.base_model_name_or_path == model.config.base_model_name_or_path == dequantized(folder, FILE)


def test_synthesis_reads_it_in_process(folder):
    local = LocalModel(str(folder), max_tokens=4, gguf_file=FILE)
    assert local.model.name_or_path == dequantized(folder, FILE) and local.tokenizer.chat_template
