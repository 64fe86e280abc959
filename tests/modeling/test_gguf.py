"""GGUF files as bases: dequantized once, then a base as any other, wherever a base can be named."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from clara_hf.program.models import CLaRaModelArguments, load_model
from clara_hf.synthesis.backends.local_model import LocalModel
from modeling_clara import CLaRaForRetrievalGeneration
from modeling_clara.quantization_clara import dequantized


gguf = pytest.importorskip("gguf", reason='GGUF files need gguf: pip install "clara-hf[gguf]"')
FILE = "tiny.Q8_0.gguf"
SMALL = {"doc_max_length": 32, "compression_rate": 8, "lora_r": 4}
# Names of GGUF for the modules of a Llama.
MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
ENDS = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def gguf_name(key: str) -> str:
    if key in ENDS:
        return ENDS[key]
    if key == "lm_head.weight":
        return "output.weight"
    _, _, layer, module = key.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{MODULES[module]}.weight"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in GGUF's order, which pairs the halves that are rotated together."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory) -> Path:
    """The tiny Llama base as a GGUF file: matrices in 8 bits where their width allows it, else float32."""
    place = tmp_path_factory.mktemp("gguf")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    config, backend = model.config, json.loads(tokenizer.backend_tokenizer.to_str())
    writer = gguf.GGUFWriter(str(place / FILE), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    special = set(tokenizer.all_special_tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    for key, value in model.state_dict().items():
        value = value.float().numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            value = interleaved(value, heads) if part in key else value
        if value.ndim > 1 and value.shape[1] % 32 == 0:  # blocks of 32 share a scale
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name(key), gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(key), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
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
