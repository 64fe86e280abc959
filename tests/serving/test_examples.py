import pytest


pytest.importorskip("fastapi")
pytest.importorskip("openai")

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
