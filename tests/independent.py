"""The published computation written out: a decoder in plain torch, low-rank updates by hand.

Nothing of PEFT, of transformers' models or of the package is used; only the base's tokenizer is transformers'.
"""

import json
import random
from pathlib import Path

import torch
from original_checkpoint import PROMPTS
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, silu
from transformers import AutoTokenizer


class Independent:
    """A published checkpoint and its base, in float32.

    `x_` names rows of left-padded batches; adapters are `encoder_adapter`, `decoder_adapter`, `query_reasoner_adapter`.
    """

    def __init__(self, checkpoint: Path):
        self.settings = json.loads((checkpoint / "config.json").read_text())
        base = checkpoint.parent / self.settings["decoder_model_name"]
        self.shape = json.loads((base / "config.json").read_text())
        weights = load_file(base / "model.safetensors") | dict(
            torch.load(checkpoint / "decoder_first_last_layers.pth", weights_only=True)
        )
        self.weights = {name: value.detach().float() for name, value in weights.items()}
        self.adapters = {
            adapter: {name: value.float().requires_grad_() for name, value in values.items() if ".lora_" in name}
            for adapter, values in torch.load(checkpoint / "adapters.pth", weights_only=True).items()
        }
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        length, rate = self.settings["doc_max_length"], self.settings["compr_rate"]
        self.count = length // rate
        distinct = self.settings["different_mem_tokens"]
        self.memory_tokens = [f"<MEM{i}>" for i in range(self.count)] if distinct else ["<MEM>"] * self.count
        extra = list(self.tokenizer.extra_special_tokens)
        self.start = self.tokenizer.bos_token or extra[0]
        added = [*dict.fromkeys(self.memory_tokens), "<AE>", "<ENC>", "<SEP>"]
        self.tokenizer.add_special_tokens({"extra_special_tokens": extra + added})
        self.memory_ids = self.tokenizer.convert_tokens_to_ids(self.memory_tokens)
        first = self.memory_ids[0]
        # A leaf of its own, whose gradient is that of the rows of the memory tokens.
        self.memory_rows = self.weights["model.embed_tokens.weight"][first : max(self.memory_ids) + 1].clone()
        self.memory_rows.requires_grad_()
        self.pad = self.tokenizer.pad_token_id

    # The decoder

    def linear(self, name: str, x: torch.Tensor, adapter: dict) -> torch.Tensor:
        y = x @ self.weights[f"{name}.weight"].T
        if f"{name}.bias" in self.weights:
            y = y + self.weights[f"{name}.bias"]
        return y + 2 * (x @ adapter[f"{name}.lora_A.weight"].T) @ adapter[f"{name}.lora_B.weight"].T

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.shape["rms_norm_eps"]).rsqrt() * self.weights[name]

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary positions 0, 1, … of `x` `[rows, heads, length, width]`, whatever the padding."""
        length, width = x.shape[-2:]
        rope = self.shape.get("rope_parameters") or self.shape
        frequency = rope["rope_theta"] ** (-torch.arange(0, width, 2).float() / width)
        angle = torch.outer(torch.arange(length).float(), frequency).repeat(1, 2)
        left, right = x.chunk(2, dim=-1)
        return x * angle.cos() + torch.cat([-right, left], dim=-1) * angle.sin()

    def attention(self, name: str, x: torch.Tensor, mask: torch.Tensor, adapter: dict) -> torch.Tensor:
        heads, groups, width = (self.shape[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        if f"{name}.qkv_proj.weight" in self.weights:
            parts = self.linear(f"{name}.qkv_proj", x, adapter).split(
                [heads * width, groups * width, groups * width], -1
            )
        else:
            parts = [self.linear(f"{name}.{part}_proj", x, adapter) for part in "qkv"]
        query, key, value = (part.unflatten(-1, (-1, width)).transpose(1, 2) for part in parts)
        if f"{name}.q_norm.weight" in self.weights:
            query, key = self.norm(f"{name}.q_norm.weight", query), self.norm(f"{name}.k_norm.weight", key)
        query, key = self.rotate(query), self.rotate(key)
        key, value = (part.repeat_interleave(heads // groups, dim=1) for part in (key, value))
        length = x.shape[1]
        seen = torch.ones(length, length).tril().bool() & mask.bool()[:, None, None, :]
        # A padding position sees itself, so that its row is finite.
        seen = seen | torch.eye(length).bool()
        scores = (query @ key.transpose(-1, -2) / width**0.5).masked_fill(~seen, float("-inf"))
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        return self.linear(f"{name}.o_proj", mixed, adapter)

    def mlp(self, name: str, x: torch.Tensor, adapter: dict) -> torch.Tensor:
        if f"{name}.gate_up_proj.weight" in self.weights:
            gate, up = self.linear(f"{name}.gate_up_proj", x, adapter).chunk(2, dim=-1)
        else:
            gate, up = (self.linear(f"{name}.{part}_proj", x, adapter) for part in ("gate", "up"))
        return self.linear(f"{name}.down_proj", silu(gate) * up, adapter)

    def hidden(self, adapter: str, embeddings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Last hidden state after the final norm."""
        weights, x = self.adapters[adapter], embeddings
        for layer in range(self.shape["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            x = x + self.attention(f"{name}.self_attn", self.norm(f"{name}.input_layernorm.weight", x), mask, weights)
            x = x + self.mlp(f"{name}.mlp", self.norm(f"{name}.post_attention_layernorm.weight", x), weights)
        return self.norm("model.norm.weight", x)

    def logits(self, embeddings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return self.hidden("decoder_adapter", embeddings, mask) @ head.T

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        first, last = self.memory_ids[0], max(self.memory_ids)
        matrix = self.weights["model.embed_tokens.weight"]
        return torch.cat([matrix[:first], self.memory_rows, matrix[last + 1 :]])[ids]

    # Texts

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def padded(self, rows: list[list[int]], width: int, value: int) -> torch.Tensor:
        return torch.tensor([[value] * (width - len(row)) + row for row in rows])

    def encoder_inputs(self, texts: list[str], max_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [self.ids(f"<ENC>{self.start}{text}{self.tokenizer.eos_token}")[: max_length + 3] for text in texts]
        rows_mask = [[1] * len(row) for row in rows]
        tail = torch.tensor([self.memory_ids] * len(rows))
        return (
            torch.cat([self.padded(rows, max_length + 3, self.pad), tail], dim=1),
            torch.cat([self.padded(rows_mask, max_length + 3, 0), torch.ones_like(tail)], dim=1),
        )

    def prompt(self, kind: str, docs: int, question: str = "", answer: str | None = None) -> str:
        """The chat of the test bases' template."""
        template = PROMPTS[kind]
        user = template["user"] if isinstance(template["user"], str) else random.choice(template["user"])
        user = user.replace("{docs}", ("".join(self.memory_tokens) + "<SEP>") * docs).replace("{question}", question)
        text = f"{self.start}[system]{template['system']}[user]{user}[assistant]"
        return text if answer is None else f"{text}{answer}{self.tokenizer.eos_token}"

    def decoder_inputs(self, prompts: list[str], fulls: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = [self.ids(text) for text in fulls]
        lengths = [len(self.ids(text)) for text in prompts]
        width = max(map(len, rows))
        labels = [[-100] * length + row[length:] for row, length in zip(rows, lengths, strict=True)]
        return (
            self.padded(rows, width, self.pad),
            self.padded([[1] * len(row) for row in rows], width, 0),
            self.padded(labels, width, -100),
        )

    # The published computation

    def encode(self, adapter: str, texts: list[str], max_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Memories `[N, n, H]` and the MSE term."""
        ids, mask = self.encoder_inputs(texts, max_length)
        hidden = self.hidden(adapter, self.embed(ids), mask)
        memory = hidden[:, -self.count :]
        terms = []
        for row in range(len(texts)):
            text = hidden[row, : -self.count][mask[row, : -self.count].bool()].mean(dim=0)
            terms.append((text - memory[row].mean(dim=0)).square().mean())
        return memory, torch.stack(terms).mean()

    def replaced(self, ids: torch.Tensor, memories: torch.Tensor) -> torch.Tensor:
        """Token embeddings in which `memories` `[B, k, n, H]` take the slots of every row."""
        step = self.count + int(self.settings["sep"])
        rows = []
        for row, slots in zip(ids, memories, strict=True):
            first = next(position for position, token in enumerate(row.tolist()) if token in self.memory_ids)
            vectors = list(self.embed(row))
            for slot, memory in enumerate(slots):
                for offset, vector in enumerate(memory):
                    vectors[first + slot * step + offset] = vector
            rows.append(torch.stack(vectors))
        return torch.stack(rows)

    def answer_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

    def topk(self, scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The straight-through matrix `[B, k, N]` and the indices."""
        logits, matrices, chosen = scores / 0.02, [], []
        for row in logits:
            taken, slots, order = torch.zeros_like(row), [], row.argsort(descending=True)[:k]
            for index in order:
                soft = (row + torch.log(1 - taken + 1e-8)).softmax(-1)
                hard = torch.zeros_like(row)
                hard[index] = 1
                slots.append(hard + soft - soft.detach())
                taken = taken + hard
            matrices.append(torch.stack(slots))
            chosen.append(order)
        return torch.stack(matrices), torch.stack(chosen)

    def scores(self, questions: list[str], memories: torch.Tensor, max_length: int) -> torch.Tensor:
        """Cosines `[B, N]` of questions and memories `[B, N, n, H]`."""
        queries = self.encode("query_reasoner_adapter", questions, max_length)[0].flatten(1)[:, None]
        memories = memories.flatten(2)
        return (queries * memories).sum(-1) / (queries.norm(dim=-1) * memories.norm(dim=-1))

    def continuation(self, prompts: list[str], memories: torch.Tensor, steps: int) -> list[list[int]]:
        """Greedy new tokens, each prompt on its own, up to the end token."""
        found = []
        with torch.no_grad():
            for prompt, slots in zip(prompts, memories, strict=True):
                ids, new = torch.tensor([self.ids(prompt)]), []
                embeddings = self.replaced(ids, slots[None])
                while len(new) < steps and self.tokenizer.eos_token_id not in new:
                    logits = self.logits(embeddings, torch.ones(embeddings.shape[:2]))[0, -1]
                    new.append(int(logits.argmax()))
                    embeddings = torch.cat([embeddings, self.embed(torch.tensor([new[-1:]]))], dim=1)
                found.append(new)
        return found
