import base64
import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


pytest.importorskip("fastapi")
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from clara_hf.hub.export import export_generator
from clara_hf.program.models import ModelSource, load_trained
from clara_hf.serving.library import FileEntry, Library, PassageRow


pytest_plugins = ["served"]
pytestmark = pytest.mark.filterwarnings("ignore:lance is not fork-safe")
JOINT = Path(__file__).parents[2] / "recipes" / "nano" / "pretrained" / "joint"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def merged(served_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged")
    export_generator(served_model, folder)
    return folder


def completions_server(folder) -> FastAPI:
    """A completions endpoint of the same form, decoding the merged generator with transformers."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    app = FastAPI()
    app.state.bodies = []

    @app.get("/v1/models")
    def models():
        return {"data": [{"id": "merged"}]}

    @app.post("/v1/completions")
    async def completions(request: Request):
        body = await request.json()
        app.state.bodies.append(body)
        embeds = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
        if body["max_tokens"] == 13:
            return JSONResponse({"object": "error", "message": "out of blocks"}, 400)
        made = model.generate(inputs_embeds=embeds[None], max_new_tokens=body["max_tokens"], do_sample=False)[0]
        ended = made[-1].item() == model.generation_config.eos_token_id
        ids = made[: len(made) - ended].tolist()
        texts = [tokenizer.decode(ids[:end], skip_special_tokens=True) for end in range(len(ids) + 1)]

        def lines():
            given = ""
            for text in [*(one for one in texts if not one.endswith("\ufffd")), texts[-1]]:
                yield f"data: {json.dumps({'choices': [{'index': 0, 'text': text[len(given) :]}]})}\n\n"
                given = text
            last = {"index": 0, "text": "", "finish_reason": "stop" if ended else "length"}
            if body["max_tokens"] != 14:
                yield f"data: {json.dumps({'choices': [last]})}\n\n"
            yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': len(ids)}})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream")

    return app


@pytest.fixture(scope="module")
def remote(merged):
    app = completions_server(merged)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", app
        server.should_exit = True
        thread.join(30)


def chat(question, **options):
    return {"model": "tiny", "messages": [{"role": "user", "content": question}], **options}


def test_the_merged_generator_continues_a_prompt_as_the_model_does(merged, served_model):
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert not any("lora" in name for name, _ in plain.named_parameters())
    for question in ("Who keeps bees?", "Why?"):
        memories = served_model.compress(["Mara keeps bees.", "Oren writes."])
        wanted = served_model.generate([question], memories=memories, rerank=False, max_new_tokens=12)
        prompt = served_model.prompt_embeddings(question, memories)
        made = plain.generate(inputs_embeds=prompt[None], max_new_tokens=12, do_sample=False)
        assert made.tolist() == wanted.sequences.tolist()


def test_answers_decoded_elsewhere_equal_those_decoded_here(serve, other_model, store_path, remote, http):
    url, app = remote
    with serve(other_model, store_path, engine=["vllm", url], read_only=True) as here:
        for question in ("Who keeps bees?", "What is sold?", "Why?"):
            for options in ({}, {"max_tokens": 5}):
                wanted = http.post(CHAT, json=chat(question, **options)).json()
                made = httpx.post(here + CHAT, json=chat(question, **options), timeout=60).json()
                assert made["choices"][0]["message"]["content"] == wanted["choices"][0]["message"]["content"]
                assert made["choices"][0]["finish_reason"] == wanted["choices"][0]["finish_reason"]
                assert made["usage"] == wanted["usage"]
                assert made["clara"] == wanted["clara"]
        with httpx.stream("POST", here + CHAT, json=chat("Why?", stream=True), timeout=60) as response:
            lines = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
        pieces = [line["choices"][0]["delta"].get("content", "") for line in lines]
        assert "".join(pieces) == wanted_text(http, "Why?") and sum(map(bool, pieces)) > 5
        assert set(app.state.bodies[-1]) >= {"model", "prompt_embeds", "max_tokens", "temperature", "stop"}


def wanted_text(http, question):
    return http.post(CHAT, json=chat(question)).json()["choices"][0]["message"]["content"]


def test_a_server_that_fails_or_breaks_off_is_told_and_prompts_that_are_not_finite_are_not_sent(
    serve, other_model, store_path, remote, monkeypatch
):
    url, app = remote
    with serve(other_model, store_path, engine=["vllm", url], read_only=True) as here:
        made = httpx.post(here + CHAT, json=chat("Why?", max_tokens=13), timeout=60)
        assert made.status_code == 502 and "out of blocks" in made.json()["error"]["message"]
        made = httpx.post(here + CHAT, json=chat("Why?", max_tokens=14), timeout=60)
        assert made.status_code == 502 and "finished" in made.json()["error"]["message"]
        sent = len(app.state.bodies)
        plain = type(other_model).prompt_embeddings
        monkeypatch.setattr(type(other_model), "prompt_embeddings", lambda *args: plain(*args) * float("nan"))
        made = httpx.post(here + CHAT, json=chat("Why?"), timeout=60)
        assert made.status_code == 502 and "not finite" in made.json()["error"]["message"]
        assert len(app.state.bodies) == sent
        monkeypatch.undo()
        assert httpx.post(here + CHAT, json=chat("Why?"), timeout=60).status_code == 200


def test_no_server_at_the_url_is_told_at_the_start(serve, served_model, store_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ValueError, match=url):
            with serve(served_model, store_path, engine=["vllm", url]):
                pass


@pytest.mark.vllm
@pytest.mark.slow
def test_a_real_vllm_server_gives_the_same_answers(serve, tmp_path):
    """`CLARA_VLLM` is the command of a vLLM in an environment of its own, if it is not on the path."""
    command = os.environ.get("CLARA_VLLM") or shutil.which("vllm")
    if not command:
        pytest.skip("needs vLLM")
    model = load_trained(ModelSource(str(JOINT)))
    export_generator(model, tmp_path / "merged")
    questions = json.loads((JOINT.parents[1] / "quickstart" / "quickstart.json").read_text())
    documents = questions["documents"]
    library = Library.open(tmp_path / "store", model)
    library.add([FileEntry(f"{n}.txt", [PassageRow(text, "", 0, 0)], 1) for n, text in enumerate(documents)])
    library.close()
    asked = [f"What is said of {text.split()[0]}?" for text in documents][:24]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--enable-prompt-embeds", "--dtype", "float32", "--port", str(port), "--max-model-len", "512"]
    with open(tmp_path / "log", "w") as log, contextlib.ExitStack() as stack:
        program = subprocess.Popen([command, "serve", str(tmp_path / "merged"), *options], stdout=log, stderr=log)
        stack.callback(program.wait)
        stack.callback(program.kill)
        url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 600
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            assert program.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()[-3000:]
            time.sleep(1)
        here = stack.enter_context(serve(model, tmp_path / "store", engine=["vllm", url], read_only=True))
        made = [httpx.post(here + CHAT, json=chat(question), timeout=120).json() for question in asked]
    texts = [one["choices"][0]["message"]["content"] for one in made]
    store = Library.open(tmp_path / "store", model, read_only=True)
    hits = store.search(asked, model.config.top_k)
    wanted = [
        model.generate([q], memories=store.memories([hit.key for hit in row]), rerank=False).texts[0]
        for q, row in zip(asked, hits, strict=True)
    ]
    assert texts == wanted
