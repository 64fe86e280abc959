"""The inputs that `fuzz.py` makes: each function makes, from Hypothesis' `draw`, a call of the library."""

import bz2
import gzip
import io
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))

import numpy as np  # noqa: E402
import pandas  # noqa: E402
import pyarrow  # noqa: E402
import pyarrow.parquet  # noqa: E402
import torch  # noqa: E402
from common import arguments  # noqa: E402
from conftest import TEXTS  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from memory_fakes import FakeModel  # noqa: E402

from clara_hf import cli  # noqa: E402
from clara_hf.data.pools import CandidateSettings  # noqa: E402
from clara_hf.data.schema import iter_examples, iter_scp  # noqa: E402
from clara_hf.data.sources import read_rows  # noqa: E402
from clara_hf.memory_store.store import MemoryStore  # noqa: E402
from clara_hf.program import parse  # noqa: E402
from clara_hf.program.models import CLaRaModelArguments  # noqa: E402
from clara_hf.program.training import DataArguments, check_arguments  # noqa: E402
from modeling_clara import CLaRaForRetrievalGeneration  # noqa: E402
from trainers import JointConfig, SCPConfig  # noqa: E402


odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.integers(-3, 40),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["", "no", "off", "null", "auto", "1e3", "2e-2", "</s>", "\ud800", "\0", "é", "../x", "a" * 3000]),
    st.binary(max_size=4),
)
values = st.recursive(
    odd,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def call_of_model(model, draw) -> Callable:
    memories = model.memories
    texts = st.lists(st.one_of(st.text(max_size=20), st.sampled_from(TEXTS), odd), max_size=3)
    forms = st.sampled_from(
        [list, tuple, lambda x: np.array(x, dtype=object), lambda x: pandas.Series(x, dtype=object), set, lambda x: x]
    )
    good = st.sampled_from([["Who?"], ["Who?", "What?"], tuple(["Who?"])])
    question = st.one_of(good, good, texts, values)
    tensors = st.sampled_from(
        [
            memories,
            memories[:1],
            memories[0],
            memories.double(),
            memories.long(),
            memories * float("nan"),
            memories[:0],
            [memories],
            [memories, memories],
            memories.tolist(),
            memories.numpy(),
            None,
            memories.half(),
            memories[:, :, :5],
        ]
    )
    options = (
        "num_beams",
        "max_new_tokens",
        "do_sample",
        "temperature",
        "top_p",
        "top_k",
        "num_return_sequences",
        "eos_token_id",
        "pad_token_id",
        "stop_strings",
        "bad_words_ids",
        "suppress_tokens",
        "repetition_penalty",
        "no_repeat_ngram_size",
        "length_penalty",
        "generation_config",
        "early_stopping",
        "max_length",
        "min_new_tokens",
        "cache_implementation",
        "use_cache",
        "logits_processor",
        "forced_eos_token_id",
        "sequence_bias",
        "output_scores",
        "return_dict_in_generate",
        "n_docs",
        "rerank",
        "expand",
        "nonsense",
    )
    which = draw(
        st.sampled_from(["compress", "retrieve", "generate", "options", "processor", "forward", "forward", "config"])
    )
    if which == "compress":
        given_ = draw(st.one_of(st.builds(lambda f, x: (f, x), forms, texts), values.map(lambda v: (lambda x: x, v))))
        size = draw(st.sampled_from([1, 2, 32]))
        return lambda: model.compress(given_[0](given_[1]), batch_size=size)
    if which == "retrieve":
        asked, given_, count = draw(question), draw(tensors), draw(st.one_of(st.none(), st.integers(-1, 5), odd))
        return lambda: model.retrieve(asked, given_, count)
    if which == "generate":
        asked, rows = draw(question), draw(st.one_of(st.lists(texts, max_size=2), values, st.just([TEXTS[:2]])))
        return lambda: model.generate(asked, documents=rows, max_new_tokens=2)
    if which == "options":
        some = draw(st.dictionaries(st.sampled_from(options), st.one_of(odd, values, st.integers(1, 3)), max_size=2))
        for name in (
            "num_beams",
            "num_return_sequences",
            "max_new_tokens",
            "max_length",
            "min_new_tokens",
        ):  # of a size that ends
            if isinstance(some.get(name), int) and some[name] > 40:
                some[name] = 3
        return lambda: model.generate(["Who?"], memories=memories, **{"max_new_tokens": 2, **some})
    if which == "processor":
        asked, rows, answers = (
            draw(question),
            draw(st.one_of(st.just([TEXTS[:2]]), st.lists(texts, max_size=2), values)),
            draw(st.one_of(st.none(), texts)),
        )
        return lambda: model.processor(asked, rows, answers)
    if which == "config":
        field = draw(
            st.sampled_from(
                [
                    "top_k",
                    "temperature",
                    "doc_max_length",
                    "prompts",
                    "memory_token_ids",
                    "decoder_config",
                    "lora_r",
                    "lora_dropout",
                    "eos_token_id",
                    "checkpoint_format",
                    "document_start",
                    "lora_target_modules",
                    "topk_taken_mask",
                ]
            )
        )
        value = draw(st.one_of(odd, values))
        return lambda: type(model.config)(**{field: value})
    batch = dict(model.batch)
    name = draw(st.sampled_from(sorted(batch)))
    changes = {
        "float": lambda t: t.float(),
        "short": lambda t: t[:, 1:],
        "rows": lambda t: t.repeat(2, 1),
        "far": lambda t: t + 10**6,
        "minus": lambda t: t * -1 - 3,
        "flat": lambda t: t.flatten(),
        "deep": lambda t: t[None],
        "list": lambda t: t.tolist(),
        "none": lambda t: None,
        "empty": lambda t: t[:0],
        "bool": lambda t: t.bool(),
        "int32": lambda t: t.int(),
        "narrow": lambda t: t[:, :1],
    }
    batch[name] = changes[draw(st.sampled_from(sorted(changes)))](batch[name])
    if draw(st.booleans()):
        batch["logits_to_keep"] = draw(odd)
    return lambda: model(**batch)


def yaml_file(folder: Path, draw) -> Callable:
    kinds = draw(
        st.sampled_from(
            [
                (DataArguments, SCPConfig, CLaRaModelArguments),
                (DataArguments, JointConfig, CLaRaModelArguments),
                CandidateSettings,
            ]
        )
    )
    group = kinds if isinstance(kinds, tuple) else (kinds,)
    names = sorted({name for kind in group for name in kind.__dataclass_fields__})
    scalars = st.one_of(
        odd.map(lambda v: json.dumps(v, default=str)),
        st.sampled_from(
            [
                "",
                "no",
                "off",
                "null",
                "~",
                "1e23",
                ".",
                ".nan",
                ".inf",
                "12:30",
                "2024-01-01",
                "${HOME}",
                "${NONE}",
                "{}",
                "[]",
                "{a: 1}",
                "[1, x]",
                "true",
                "'2e-2'",
                "&a [*a]",
                "*b",
                "!!python/none",
                "!x y",
                "|",
                "? a",
                "{temperature: 2e-2}",
                "{top_k: no}",
                "a: b",
                "\t",
                "%",
                "@a",
            ]
        ),
    )
    lines = draw(
        st.lists(st.tuples(st.sampled_from([*names, "nope", "learning_rat", "12"]), scalars), min_size=1, max_size=4)
    )
    text = "".join(f"{name}: {value}\n" for name, value in lines)
    base = {"train_file": "x.jsonl", "model_name_or_path": "m", "use_cpu": "true", "output_dir": str(folder / "never")}
    if isinstance(kinds, tuple):
        text = "".join(f"{name}: {value}\n" for name, value in base.items() if name not in dict(lines)) + text
    data = text.encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 9)) == 0:
        data = damaged(data, draw)
    path = folder / "fuzz.yaml"

    def call():
        path.write_bytes(data)
        found = parse(kinds, ["--config", str(path)])
        if isinstance(kinds, tuple):
            check_arguments(found[0], found[1], {"loss"})

    return call


def damaged(data: bytes, draw) -> bytes:
    """Bytes with a few changed, cut, doubled or put in."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.integers(0, 4)):
            case 0:
                data[place : place + 1] = bytes([draw(st.integers(0, 255))])
            case 1:
                del data[place:]
            case 2:
                data[place:place] = draw(st.binary(max_size=6))
            case 3:
                del data[place : place + draw(st.integers(1, 30))]
            case 4:
                data += data[place : place + 40]
    return bytes(data)


def data_file(folder: Path, sound: dict[str, bytes], draw) -> Callable:
    if draw(st.booleans()):
        row = draw(
            st.dictionaries(
                st.sampled_from(["question", "answers", "docs", "pos_index", "id", "data_type", "gold_answer", "ctxs"]),
                values,
                max_size=6,
            )
        )
        name, content = "odd.jsonl", (json.dumps(row, default=str) + "\n").encode("utf-8", "surrogatepass")
    else:
        # Parquet is decoded in a process of its own, which takes a moment: fewer of them.
        name = draw(st.sampled_from([name for name in sound if not name.endswith(".parquet")] * 4 + ["rows.parquet"]))
        content = damaged(sound[name], draw)
    path = folder / name
    reader = draw(st.sampled_from([iter_examples, iter_scp, read_rows]))

    def call():
        path.write_bytes(content)
        for _ in reader(path):
            pass

    return call


def checkpoint(folder: Path, sound: Path, draw) -> Callable:
    files = sorted(path.name for path in sound.iterdir() if path.suffix in (".json", ".safetensors", ".jinja"))
    name = draw(st.sampled_from([*files, "config.json", "config.json", "processor_config.json"]))
    content = (sound / name).read_bytes()
    if name.endswith(".json") and draw(st.booleans()):
        fields = json.loads(content)
        place = fields if name != "config.json" or draw(st.booleans()) else fields["decoder_config"]
        key = draw(st.sampled_from(sorted(place)))
        place[key] = draw(values)
        if draw(st.integers(0, 4)) == 0:
            del place[key]
        content = json.dumps(fields, default=str).encode("utf-8", "surrogatepass")
    else:
        content = damaged(content, draw)

    def call():
        path = folder / "checkpoint"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(sound, path)
        (path / name).write_bytes(content)
        model = CLaRaForRetrievalGeneration.from_pretrained(path)
        model.generate(["Who?"], documents=[TEXTS[:2]], max_new_tokens=2)

    return call


def store(folder: Path, sound: Path, draw) -> Callable:
    files = sorted(str(path.relative_to(sound)) for path in sound.rglob("*") if path.is_file())
    newest = min(name for name in files if name.startswith("_versions"))  # Lance counts them downwards
    read = [name for name in files if name.startswith("data")] + [newest]
    name = draw(st.one_of(st.sampled_from(files), st.sampled_from(read), st.sampled_from(read)))
    way = draw(st.sampled_from(["damage", "damage", "remove", "folder", "json", "part"]))
    content = damaged((sound / name).read_bytes(), draw)
    record = json.dumps(draw(values), default=str).encode("utf-8", "surrogatepass")

    def call():
        path = folder / "store"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(sound, path)
        if way == "part":
            (path / "_parts").mkdir(exist_ok=True)
            (path / "_parts" / "x.part.json").write_bytes(record)
        else:
            (path / name).unlink()
            if way == "folder":
                (path / name).mkdir()
            elif way != "remove":
                (path / name).write_bytes(record if way == "json" and name.endswith(".json") else content)
        model = FakeModel()
        opened = MemoryStore.open(path, model)
        keys = [key for key in opened.keys(TEXTS) if key in opened]
        found = opened.get(keys)
        right = {key: model.memory(text) for key, text in zip(opened.keys(TEXTS), TEXTS, strict=True)}
        columns = opened.columns(keys, ["text", "number"])
        numbers = {key: number for number, key in enumerate(opened.keys(TEXTS))}
        for key, memory, text, number in zip(keys, found, columns["text"], columns["number"], strict=True):
            if (
                not torch.allclose(memory, right[key].to(memory.dtype), rtol=1e-2, atol=1e-1)
                or text != TEXTS[numbers[key]]
                or number != numbers[key]
            ):
                raise AssertionError(f"silently other content after {way} of {Path(name).parts[0]}")
        opened.search(torch.stack([model.memory(TEXTS[0])]), top_k=2)
        opened.add([*TEXTS, "another text"], {"number": list(range(len(TEXTS) + 1))}, show_progress=False)
        opened.verify(show_progress=False)

    return call


def resumed(folder: Path, sound: Path, draw) -> Callable:
    files = sorted(str(path.relative_to(sound)) for path in sound.rglob("*") if path.is_file() and path.suffix != ".py")
    name, removed = draw(st.sampled_from(files)), draw(st.booleans())
    content = damaged((sound / name).read_bytes(), draw)

    def call():
        out = folder / "run"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(sound, out)
        (out / name).unlink() if removed else (out / name).write_bytes(content)
        told = io.StringIO()
        try:
            with redirect_stderr(told), redirect_stdout(told):
                cli.main(arguments("scp", folder, out))
        except SystemExit as end:
            if end.code not in (0, 1, 2) or (end.code and told.getvalue().count(": error: ") != 1):
                raise AssertionError(f"exit code {end.code} after damage of {name}: {told.getvalue()[-300:]}") from None

    return call


def makers(folder: Path) -> dict[str, tuple[Callable, bool]]:
    """For each kind, what makes a call from Hypothesis' `draw`, and whether it is made in a process of its own."""
    rows = (folder / "questions.jsonl").read_bytes()
    table = io.BytesIO()
    lines = [json.loads(line) for line in rows.splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), table, write_page_checksum=True)
    sound = {"rows.jsonl": rows, "rows.jsonl.gz": gzip.compress(rows), "rows.jsonl.bz2": bz2.compress(rows)}
    sound |= {
        "rows.json": json.dumps(lines).encode(),
        "rows.parquet": table.getvalue(),
        "scp.jsonl": (folder / "scp.jsonl").read_bytes(),
    }
    model = CLaRaForRetrievalGeneration.from_pretrained(folder / "clara")
    model.memories, model.batch = model.compress(TEXTS[:3]), model.processor(["Who?"], [TEXTS[:3]], ["Mara"])
    return {
        "calls": (partial(call_of_model, model), False),
        "yaml": (partial(yaml_file, folder), False),
        "data": (partial(data_file, folder, sound), False),
        "checkpoints": (partial(checkpoint, folder, folder / "clara"), True),
        "stores": (partial(store, folder, folder / "store-sound"), True),
        "runs": (partial(resumed, folder, folder / "run-sound"), True),
    }


def sound_store(path: Path) -> None:
    MemoryStore.open(path, FakeModel(), dtype="float32").add(
        TEXTS, {"number": list(range(len(TEXTS)))}, show_progress=False
    )
