import socket
import subprocess
import sys

import pytest


pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

from served import NOTES


pytest_plugins = ["served"]
pytestmark = pytest.mark.filterwarnings("ignore:lance is not fork-safe")
QUESTION = "Who keeps bees?"


@pytest.mark.parametrize(
    ("name", "needs"),
    [("langchain_documents", "langchain_openai"), ("llamaindex_documents", "llama_index.llms.openai_like")],
)
def test_an_example_answers_and_retrieves_through_the_service(name, needs, server, http, monkeypatch, capsys):
    pytest.importorskip(needs)
    monkeypatch.syspath_prepend("examples")
    example = __import__(name)
    example.main(["--url", server, QUESTION])
    out = capsys.readouterr().out
    body = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}]}
    assert out.strip().startswith(
        http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    )
    found = http.post("/v1/vector_stores/documents/search", json={"query": QUESTION, "max_num_results": 5}).json()[
        "data"
    ]
    for hit in found:
        assert f"{hit['score']:.3f}  {hit['filename']}: {NOTES[hit['filename']][:80]}" in out


@pytest.mark.slow
def test_replicas_behind_ray_serve_answer_and_stream_as_one_service_does(http, served_model, store_path, tmp_path):
    pytest.importorskip("ray.serve")
    for part in (served_model, served_model.processor):
        part.save_pretrained(tmp_path / "tiny")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "examples/ray_serve.py", "--model", str(tmp_path / "tiny"), "--store", str(store_path)]
    command += ["--cpus", "0.5", "--port", str(port)]
    with open(tmp_path / "log", "w") as log:
        program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        line = next((line for line in program.stdout if line.startswith("Serving")), "")
        assert str(port) in line, (tmp_path / "log").read_text()[-3000:]
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        body = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}]}
        wanted = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        for _ in range(4):
            assert client.chat.completions.create(**body).choices[0].message.content == wanted
        pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**body, stream=True)]
        assert "".join(pieces) == wanted and sum(map(bool, pieces)) > 5
        with pytest.raises(openai.ConflictError, match="read-only"):
            client.vector_stores.files.create("documents", file_id="x", extra_body={"text": "More."})
    finally:
        program.terminate()
        program.wait(60)
        program.stdout.close()
