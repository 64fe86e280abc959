"""The recipes as programs: arguments, folders, and one sentence for what the user can mend."""

import contextlib
import errno
import io
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import TEXTS
from processes import in_process
from transformers import Trainer

from clara_hf.data.schema import iter_examples
from clara_hf.memory_store.store import MemoryStore
from clara_hf.program import UsageError, run_program, write_json
from clara_hf.program.errors import one_sentence
from clara_hf.program.folders import RunFolder
from clara_hf.program.models import CLaRaModelArguments, load_model
from clara_hf.program.training import DataArguments, difference, load_split
from modeling_clara import CLaRaForRetrievalGeneration
from recipes import instruct, joint, scp
from trainers.trainer import CLaRaTrainer


@pytest.fixture
def scp_file(tmp_path):
    rows = [{"data_type": "paraphrase", "question": [], "answers": [text], "docs": [text]} for text in TEXTS]
    path = tmp_path / "scp.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def qa_file(tmp_path):
    rows = [{"question": "Who keeps bees?", "answers": ["Mara"], "docs": TEXTS, "pos_index": [0]} for _ in range(4)]
    path = tmp_path / "qa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def config(tmp_path, base, scp_file):
    """A YAML file for two SCP steps on the tiny base, with every line of it as a value to change."""
    values = {
        "model_name_or_path": base,
        "clara_config": {"doc_max_length": 32, "compression_rate": 8, "lora_r": 4, "lora_alpha": 8},
        "train_file": str(scp_file),
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    }

    def write(**changes) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps({**values, **changes}), encoding="utf-8")
        return str(path)

    return write


def program(monkeypatch, capsys, main, *arguments: str) -> tuple[int, str]:
    """Exit code and error text of a recipe called as a program."""
    monkeypatch.setattr(sys, "argv", ["recipe.py", *arguments])
    try:
        run_program(main)
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


def test_command_line_overrides_yaml_and_checkpoint_loads(config, tmp_path):
    scp.main(["--config", config(), "--output_dir", str(tmp_path / "other"), "--max_steps", "1", "--seed", "3"])
    settings = json.loads((tmp_path / "other" / "run.json").read_text())
    assert (settings["max_steps"], settings["seed"]) == (1, 3)
    assert not (tmp_path / "run").exists()
    model = CLaRaForRetrievalGeneration.from_pretrained(tmp_path / "other")
    assert model.compress(TEXTS[:2]).shape == (2, 4, 32)
    assert not (tmp_path / "other" / "final.partial").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lerning_rate": 0.1}, "lerning_rate"),
        ({"max_steps": "many"}, "max_steps"),
        ({"per_device_train_batch_size": 2.5}, "per_device_train_batch_size"),
        ({"max_steps": [2]}, "max_steps: [2] has the wrong type"),
        ({"use_cpu": "perhaps"}, "use_cpu: 'perhaps' has the wrong type"),
        ({"train_file": 3}, "train_file: 3 has the wrong type"),
        ({"train_file": {"a": 1}}, "train_file: {'a': 1} has the wrong type"),
        ({"dtype": "float33"}, "'float33': did you mean float32?"),
        ({"dtype": "float8_e4m3fn"}, "must be one of auto, float32, bfloat16, float16, but is 'float8_e4m3fn'"),
        ({"learning_rate": None}, "learning_rate is empty: give a number"),
        ({"log_level_replica": "."}, "log_level_replica must be one of"),
        ({"metric_for_best_model": "f2"}, "metric_for_best_model is 'f2': it must be one of loss, token_accuracy"),
        ({"learning_rate": -1.0}, "Invalid learning rate"),
        ({"clara_config": {"doc_max_length": 30, "compression_rate": 8}}, "compression_rate must divide"),
        ({"clara_config": {"lora_rank": 4}}, "line 1: clara_config has no field 'lora_rank': did you mean lora_r"),
        ({"clara_config": "[1"}, "clara_config"),
        ({"clara_config": {"memory_token_ids": True}}, "clara_config.memory_token_ids: True has the wrong type"),
        ({"clara_config": {"decoder_config": 1e23}}, "clara_config.decoder_config: 1e+23 has the wrong type"),
        ({"model_name_or_path": "${NO_SUCH}/x"}, "model_name_or_path: the environment has no variable NO_SUCH"),
        ({"model_name_or_path": "no/such/folder"}, "no/such/folder"),
        ({"train_file": "no-such.jsonl"}, "no-such.jsonl"),
        ({"prompts_file": "no-such.json"}, "no-such.json"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"resume_from_checkpoint": "some"}, "resume_from_checkpoint is 'some', which recipes do not take"),
        ({"eval_strategy": "steps"}, "eval_strategy is 'steps' without a validation_file"),
        ({"eval_on_start": True}, "eval_on_start is true without a validation_file"),
        ({"report_to": "paper"}, "report_to names 'paper', which is not installed"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_no_model(changes, words, config, tmp_path, monkeypatch, capsys):
    code, text = program(monkeypatch, capsys, scp.main, "--config", config(**changes))
    assert code != 0 and words in text and "Traceback" not in text
    assert not (tmp_path / "run").exists()


def test_a_file_of_prompts_that_is_no_json_is_named(config, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.json").write_text("{", encoding="utf-8")
    code, text = program(monkeypatch, capsys, scp.main, "--config", config(prompts_file=str(tmp_path / "prompts.json")))
    assert code != 0 and "prompts.json is no valid JSON" in text


@pytest.mark.parametrize(("config_option", "code"), [(["--config="], 0), (["--config"], 2)])
def test_config_is_given_in_either_form_and_has_a_value(config_option, code, config, monkeypatch, capsys):
    *_, last = config_option
    given = [last + config()] if last.endswith("=") else [last]
    found, text = program(monkeypatch, capsys, scp.main, *given)
    assert found == code and ("--config needs the name" in text) == bool(code)


def test_broken_yaml_and_missing_yaml(config, tmp_path, monkeypatch, capsys):
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1", encoding="utf-8")
    code, text = program(monkeypatch, capsys, scp.main, "--config", str(broken))
    assert code != 0 and "broken.yaml" in text
    code, text = program(monkeypatch, capsys, scp.main, "--config", str(tmp_path / "none.yaml"))
    assert code != 0 and "none.yaml" in text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json", "line 6: malformed JSON"),
        (
            '{"data_type": "qa", "question": ["a"], "answers": ["b", "c"], "docs": ["d"]}',
            "line 6: there are 1 questions",
        ),
        ('{"data_type": "qa", "question": ["a"], "answers": ["b"]}', "line 6: the field 'docs' is missing"),
        (
            '{"data_type": "qa", "question": ["<MEM0>?"], "answers": ["b"], "docs": ["<MEM0>"]}',
            "row 6: question[0] contains",
        ),
        (
            '{"data_type": "qa", "question": ["a?"], "answers": ["<MEM0>"], "docs": ["d"]}',
            "scp.jsonl, row 6: answers[0] contains",
        ),
    ],
)
def test_data_errors_name_the_line(line, words, config, scp_file, monkeypatch, capsys):
    with open(scp_file, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    code, text = program(monkeypatch, capsys, scp.main, "--config", config())
    assert code != 0 and words in text


def test_a_run_that_fails_before_it_trains_leaves_its_folder_free(config, scp_file, tmp_path, monkeypatch, capsys):
    whole = Path(scp_file).read_text(encoding="utf-8")
    Path(scp_file).write_text(whole.replace("docs", "dogs"), encoding="utf-8")
    for changes in ({}, {"learning_rate": -1.0}):
        assert program(monkeypatch, capsys, scp.main, "--config", config(**changes))[0] != 0
        Path(scp_file).write_text(whole, encoding="utf-8")
    assert program(monkeypatch, capsys, scp.main, "--config", config())[0] == 0


def test_folder_of_another_run_is_refused_until_told(config, tmp_path, monkeypatch, capsys, caplog):
    scp.main(["--config", config()])
    before = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns
    code, text = program(monkeypatch, capsys, scp.main, "--config", config(), "--resume", "false")
    assert code == 2 and "--resume true" in text and "--overwrite true" in text
    code, text = program(monkeypatch, capsys, scp.main, "--config", config(learning_rate=0.5))
    assert code == 2 and "learning_rate" in text and "--overwrite true" in text
    free = {"dataloader_num_workers": 1, "save_total_limit": 1, "per_device_eval_batch_size": 1, "report_to": "none"}
    code, text = program(monkeypatch, capsys, scp.main, "--config", config(**free), "--resume", "true")
    assert code == 0 and "reused" in caplog.text
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == before
    code, _ = program(monkeypatch, capsys, scp.main, "--config", config(learning_rate=0.5), "--overwrite", "true")
    assert code == 0 and (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns != before


def test_a_run_of_another_number_of_processes_is_refused_with_its_global_batch(tmp_path):
    now = {"num_processes": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 1}

    def check(settings):
        RunFolder(tmp_path, settings, kept=("memories",), described=difference).check()

    write_json(tmp_path / "run.json", {**now, "num_processes": 2})
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(UsageError, match=r"\(2 there, 4 now\): start 2 again .* global batch.* at 12\."):
        check(now)
    # A run of before the number was recorded, and one of which nothing was trained.
    write_json(tmp_path / "run.json", {name: now[name] for name in now if name != "num_processes"})
    check(now)
    with pytest.raises(UsageError, match="max_steps: 1 there, 5 now"):
        check({**now, "max_steps": 5})
    (tmp_path / "log.jsonl").rename(tmp_path / "memories")
    check({**now, "max_steps": 5})


def damage_silently(path: Path) -> None:
    """Changes one byte of a stored memory, but neither size nor time of its file."""
    store = MemoryStore.open(path)
    memory = store.get([next(iter(store))]).numpy().tobytes()
    (file,) = (path / "data").glob("*.lance")
    content, stat = file.read_bytes(), file.stat()
    assert content.count(memory) == 1
    file.write_bytes(content.replace(memory, bytes([memory[0] ^ 1]) + memory[1:]))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_memories_outlive_failed_and_overwritten_runs_and_are_mended_on_demand(
    config, qa_file, tmp_path, monkeypatch, capsys
):
    compressed, original = [], CLaRaForRetrievalGeneration.compress_encoded

    def counting(self, rows, *arguments, **options):
        compressed.extend(rows)
        return original(self, rows, *arguments, **options)

    monkeypatch.setattr(CLaRaForRetrievalGeneration, "compress_encoded", counting)

    def joint_run(*arguments, **changes) -> tuple[int | str | None, str, int]:
        before = len(compressed)
        given = {"train_file": str(qa_file), "max_steps": 1, "save_strategy": "no", **changes}
        code, text = program(monkeypatch, capsys, joint.main, "--config", config(**given), *arguments)
        return code, text, len(compressed) - before

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", lambda *_, **__: load_model(CLaRaModelArguments("none")))
        code, text, count = joint_run()
    assert code != 0 and count == len(TEXTS)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["memories"]
    assert joint_run(learning_rate=1e-3)[::2] == (0, 0)
    damage_silently(tmp_path / "run" / "memories")
    code, text, count = joint_run("--overwrite", "true")
    assert code != 0 and count == 0 and "a memory in" in text and "Traceback" not in text
    assert "--resume true --verify_memories all makes it" in text
    assert joint_run("--resume", "true", "--verify_memories", "all")[::2] == (0, 1)
    # The fingerprint of a compressor covers this.
    other = {"clara_config": {"doc_max_length": 32, "compression_rate": 8, "lora_r": 4, "lora_alpha": 4}}
    code, text, count = joint_run("--overwrite", "true", **other)
    assert (code, count) == (0, len(TEXTS))


def test_an_error_in_a_data_loader_worker_is_its_last_line():
    stack = 'Original Traceback (most recent call last):\n  File "x.py", line 1\n'
    error = OSError(f"Caught SomeError in DataLoader worker process 0.\n{stack}some.place.SomeError: it is: so\n")
    assert one_sentence(error) == "it is: so"


@pytest.mark.parametrize(("code", "fact"), [(errno.EROFS, "read-only"), (errno.EACCES, "user")])
def test_a_place_that_cannot_be_written_is_named_with_the_reason(code, fact):
    told = one_sentence(OSError(code, os.strerror(code), "/mnt/runs"))
    assert "/mnt/runs" in told and fact in told and "Errno" not in told


def test_folder_with_something_else_is_refused(config, tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("important")
    for option in ("--resume", "--overwrite"):
        code, text = program(monkeypatch, capsys, scp.main, "--config", config(), option, "true")
        assert code != 0 and "holds no run" in text and (tmp_path / "run" / "thesis.tex").exists()


def raise_while_interrupted():
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise TimeoutError("a pool did not end")  # noqa: B904 (as libraries do)


def raise_as_torch_on_a_full_disk():
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")


@pytest.mark.parametrize(
    ("main", "code", "words"),
    [(raise_while_interrupted, 130, "interrupted"), (raise_as_torch_on_a_full_disk, 1, "the disk is full")],
)
def test_interruptions_and_full_disks_are_known_in_every_disguise(main, code, words, monkeypatch, capsys):
    handler = signal.getsignal(signal.SIGINT)
    found, text = program(monkeypatch, capsys, main)
    assert found == code and words in text and "the same command" in text
    assert signal.getsignal(signal.SIGINT) is handler


def interrupt_a_run_and_its_child():
    """Ctrl-C reaches every process of a program; returns how the child ended and what the program said."""
    ended = []

    def main():
        heard, told = os.pipe()
        child = os.fork()
        if not child:
            os.write(told, b"!")
            time.sleep(60)
            os._exit(0)
        os.read(heard, 1)
        os.kill(child, signal.SIGINT)
        ended.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        os.kill(os.getpid(), signal.SIGINT)

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            run_program(main)
        except SystemExit as stop:
            return ended, stop.code, said.getvalue()


def test_only_the_program_itself_speaks_when_it_is_interrupted(tmp_path):
    ended, code, said = in_process(interrupt_a_run_and_its_child, tmp_path)
    assert ended == [128 + signal.SIGINT] and code == 130 and said.count("\n") == 1 and "interrupted" in said


def test_interrupted_run_resumes_to_the_weights_of_an_uninterrupted_one(config, tmp_path, monkeypatch, capsys):
    from safetensors.torch import load_file

    options = ["--config", config(max_steps=4, save_steps=2)]
    scp.main([*options, "--output_dir", str(tmp_path / "whole")])
    original, calls = Trainer.training_step, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", interrupted)
    code, text = program(monkeypatch, capsys, scp.main, *options)
    assert code == 130 and "resume" in text and not (tmp_path / "run" / "config.json").exists()
    # A later checkpoint that was cut off while it was written is passed over.
    (tmp_path / "run" / "checkpoint-3").mkdir()
    (tmp_path / "run" / "checkpoint-3" / "trainer_state.json").write_text('{"global_st')
    code, _ = program(monkeypatch, capsys, scp.main, *options)
    assert code == 0 and len(calls) == 6
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all((expected[key] == found[key]).all() for key in expected)


def test_full_disk_is_said_and_leaves_nothing_that_looks_finished(config, tmp_path, monkeypatch, capsys):
    def full(self, output_dir=None, _internal_call=False):
        if output_dir.endswith("final.partial"):
            os.makedirs(output_dir, exist_ok=True)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Trainer, "save_model", full)
    code, text = program(monkeypatch, capsys, scp.main, "--config", config(save_strategy="no"))
    assert code != 0 and "disk is full" in text
    assert not (tmp_path / "run" / "config.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["x"])
    scp.main(["--config", config(save_strategy="no"), "--resume", "true"])
    assert (tmp_path / "run" / "config.json").exists()


def test_three_stages_hand_their_checkpoints_on_and_train_from_mapped_rows(config, qa_file, tmp_path, monkeypatch):
    files, reads, prepare = [], [], CLaRaTrainer.prepare_rows

    def watched(self, rows):
        examples = prepare(self, rows)
        files.append([data.cache_files[0]["filename"] for data in (rows, examples)])
        return examples

    monkeypatch.setattr(CLaRaTrainer, "prepare_rows", watched)
    monkeypatch.setattr("clara_hf.data.mapped.iter_examples", lambda *a, **k: reads.append(a) or iter_examples(*a, **k))

    def stage(main, start, out, **changes):
        path = config(model_name_or_path=str(start), output_dir=str(tmp_path / out), clara_config=None, **changes)
        main(["--config", path])

    scp.main(["--config", config(output_dir=str(tmp_path / "scp"))])
    stage(instruct.main, tmp_path / "scp", "instruct", train_file=str(qa_file))
    stage(joint.main, tmp_path / "instruct", "joint", train_file=str(qa_file), top_k=2, learning_rate=1e-3)
    (_, made_scp), (rows, made_instruct), (rows_again, made_joint) = files
    assert rows == rows_again and len(reads) == 1, "two stages share what was read and written once"
    assert len({made_scp, made_instruct, made_joint}) == 3
    model = CLaRaForRetrievalGeneration.from_pretrained(tmp_path / "joint")
    assert model.config.query_reasoner and model.config.top_k == 2
    assert CLaRaForRetrievalGeneration.from_pretrained(tmp_path / "instruct").config.query_reasoner is False
    assert len(model.generate(questions=["Who keeps bees?"], documents=[TEXTS], max_new_tokens=3).texts) == 1


def test_limits_take_rows_from_the_start_of_the_files(qa_file, monkeypatch, capsys, config):
    data = DataArguments(str(qa_file), train_limit=3, validation_file=str(qa_file), validation_limit=2)
    told = []
    monkeypatch.setattr("clara_hf.program.training.logger.warning", told.append)
    train, validation = load_split(data, "questions")
    assert (len(train), len(validation)) == (3, 2)
    assert len(told) == 1 and "2 of 2 rows" in told[0], "validation asks what training asks"
    code, error = program(monkeypatch, capsys, scp.main, "--config", config(), "--train_limit", "0")
    assert code == 2 and "train_limit is 0; it must be at least 1" in error
