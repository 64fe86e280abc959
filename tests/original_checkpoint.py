"""Random checkpoints in the layout of the paper's release, written without the package."""

import json
from pathlib import Path

import torch
from conftest import build_base
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer


ADAPTERS = ("decoder_adapter", "encoder_adapter", "query_reasoner_adapter")
EXTRA_TOKENS = ["<|turn|>", "<|over|>"]
PROMPTS = {
    "answer": {"system": "Reply shortly.", "user": "Notes:\n{docs}\n\nQ:{question}", "assistant": "{answer}"},
    "qa": {"system": "Ask and reply.", "user": "Notes:\n{docs}", "assistant": "Q: {question}\nR: {answer}"},
    "paraphrase": {
        "system": "Say it again.",
        "user": ["Notes: {docs} in other words", "What is {docs}?", "{docs} means"],
        "assistant": "{paraphrase}",
    },
}


def build_original_base(folder: Path, architecture: str = "mistral", padded_rows: int = 0) -> Path:
    """A tiny base in bfloat16; one without a beginning token has extra special tokens, in the older file format.

    They take padding rows, of which there must be enough.
    """
    build_base(folder, architecture, padded_rows=padded_rows)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.bos_token is None:
        tokenizer.add_special_tokens({"extra_special_tokens": EXTRA_TOKENS})
        tokenizer.save_pretrained(folder)
        path = folder / "tokenizer_config.json"
        values = json.loads(path.read_text())
        values |= {"additional_special_tokens": values.pop("extra_special_tokens"), "extra_special_tokens": {}}
        path.write_text(json.dumps(values))
    model.save_pretrained(folder)
    return folder


def write_original(
    folder: Path,
    base: Path,
    doc_max_length: int = 32,
    compr_rate: int = 8,
    distinct: bool = True,
    rank: int = 4,
    top_k: int = 2,
    sep: bool = True,
    adapters: tuple[str, ...] = ADAPTERS,
    copies: tuple[str, ...] = (),
    stage: str = "stage2",
    seed: int = 0,
) -> Path:
    """Write `config.json`, `adapters.pth` and `decoder_first_last_layers.pth` to `folder`, whose base is beside it."""
    draw = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(base)
    memory = [f"<MEM{i}>" for i in range(doc_max_length // compr_rate)] if distinct else ["<MEM>"]
    known = len(tokenizer)
    rows = known + len(memory) + 3

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=draw) * 0.2).to(torch.bfloat16)

    layers = {}
    for name, parameter in model.named_parameters():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            added = random(rows - known, parameter.shape[1])
            layers[name] = nn.Parameter(torch.cat([parameter.detach()[:known], added]), requires_grad=False)
    values = {}
    for adapter in adapters:
        values[adapter] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                values[adapter][f"{name}.lora_A.weight"] = random(rank, module.in_features)
                values[adapter][f"{name}.lora_B.weight"] = random(module.out_features, rank)
        if adapter in copies:
            values[adapter] |= {name: matrix.detach().clone() for name, matrix in layers.items()}
    folder.mkdir(parents=True)
    torch.save(values, folder / "adapters.pth")
    torch.save(layers, folder / "decoder_first_last_layers.pth")
    config = {
        "model_type": "CLaRa",
        "decoder_model_name": base.name,
        "doc_max_length": doc_max_length,
        "compr_rate": compr_rate,
        "different_mem_tokens": distinct,
        "optimize_mem_tokens": True,
        "sep": sep,
        "lora": True,
        "lora_r": rank,
        "generation_top_k": top_k,
        "training_stage": stage,
        "attn_implementation": None,
        "max_new_tokens": 128,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_prompts(path: Path) -> Path:
    path.write_text(json.dumps(PROMPTS))
    return path


def write_code(path: Path) -> Path:
    """A modelling file with the prompts as literals, which fails when it is run."""
    prompts = PROMPTS
    path.write_text(f'''
raise RuntimeError("this file must not be run")

VARIANTS = {prompts["paraphrase"]["user"]!r}


class Model:
    def ask(self, docs, questions, answers):
        """Notes on {{docs}}."""
        system_text = {prompts["qa"]["system"]!r}
        user_text = f"Notes:\\n{{docs}}"
        messages = [{{"role": "system", "content": system_text}}, {{"role": "user", "content": user_text}}]
        pairs = [f"Q: {{q}}\\nR: {{a}}" for q, a in zip(questions, answers)]
        return messages, "\\n".join(pairs)

    def say_again(self, docs, answer):
        system_text = {prompts["paraphrase"]["system"]!r}
        user_text = pick(VARIANTS).format(docs=docs)
        return [{{"role": "system", "content": system_text}}, {{"role": "user", "content": user_text}}]

    def reply(self, docs, query, answer=None):
        system = {prompts["answer"]["system"]!r}
        user = "Notes:\\n" + docs + f"\\n\\nQ:{{query}}"
        if not docs:
            raise ValueError(f"{{docs}} for {{query}}")
        return [{{"role": "system", "content": system}}, {{"role": "user", "content": user.strip()}}]

    def log(self, documents):
        return f"{{documents}} are many"
''')
    return path
