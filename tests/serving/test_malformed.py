"""Requests that are not what they should be, made by Hypothesis; `CLARA_MALFORMED=2000` makes that many."""

import copy
import json
import os
from collections import Counter

import httpx
import pytest


pytest.importorskip("fastapi")
hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st


pytest_plugins = ["served"]
pytestmark = pytest.mark.filterwarnings("ignore:lance is not fork-safe")
COUNT = int(os.environ.get("CLARA_MALFORMED", "150"))
MESSAGES = [{"role": "user", "content": "Who keeps bees?"}]
GOOD = {
    "/v1/chat/completions": {
        **{"model": "tiny", "messages": MESSAGES, "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "seed": 1, "n": 1},
        **{"stop": ["x"], "stream": False, "documents": ["A text.", {"text": "B", "title": "t"}], "n_docs": 1},
        **{"query_words": 2, "user": "me", "metadata": {"a": "b"}, "logprobs": False},
    },
    "/v1/completions": {"model": "tiny", "prompt": ["Who?"], "max_tokens": 1, "stop": "x", "echo": False},
    "/v1/embeddings": {"model": "tiny", "input": ["a"], "encoding_format": "float", "input_type": "query"},
    "/v1/rerank": {"model": "tiny", "query": "Who?", "documents": ["a", "b"], "top_n": 1, "return_documents": True},
    "/v1/vector_stores/documents/search": {
        "query": "Who?",
        "max_num_results": 1,
        "ranking_options": {"ranker": "auto"},
    },
    "/v1/vector_stores/documents/files": {"text": "A.", "filename": "a.pdf", "attributes": {"a": 1.5}},
    "/v1/feedback": {"question": "Who?", "answer": "x", "rating": "up", "correction": "y"},
}
ODD_TEXTS = st.sampled_from(
    [
        "",
        " ",
        "\x00",
        "\ud800",
        "<MEM0>",
        "<SEP>",
        "a" * 9000,
        "../../etc/passwd",
        "{docs}",
        "٣",
        "1e999",
        "\u202e",
        "'; --",
    ]
)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**63, -(2**63), 10**400, -1, 0, float("nan"), float("inf"), -float("inf"), 1e308]),
    st.floats(),
    ODD_TEXTS,
    st.text(max_size=20),
    st.lists(st.one_of(st.none(), st.integers(), ODD_TEXTS, st.just([])), max_size=4),
    st.dictionaries(st.text(max_size=5), st.one_of(st.none(), st.integers(), st.text(max_size=5)), max_size=3),
    st.just([[[[[[]]]]]]),
)
ODD_BODIES = st.one_of(
    st.binary(max_size=200),
    st.just(b"[" * 100_000),
    st.just(b'{"a":' * 50_000),
    st.just(b'{"model": 1' + b"0" * 6000 + b"}"),
    st.just(b'\xff\xfe{"model": "tiny"}'),
    st.just(b""),
)


@st.composite
def requests(draw):
    """Method, path, headers and body of a request with something wrong."""
    path = draw(st.sampled_from(sorted(GOOD)))
    method, header = "POST", {"content-type": "application/json"}
    body = copy.deepcopy(GOOD[path])
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(
            st.sampled_from(["replace", "replace", "replace", "drop", "add", "raw", "path", "method", "header"])
        )
        if isinstance(body, bytes) or kind == "raw":
            body = draw(ODD_BODIES)
        elif kind in ("replace", "drop"):
            place = body
            while True:
                names = list(place) if isinstance(place, dict) else list(range(len(place)))
                if not names:
                    break
                name = draw(st.sampled_from(names))
                if isinstance(place[name], (dict, list)) and place[name] and draw(st.booleans()):
                    place = place[name]
                    continue
                if kind == "replace":
                    place[name] = copy.deepcopy(draw(ODD))  # what is drawn may be shared
                else:
                    del place[name]
                break
        elif kind == "add":
            body[draw(st.text(max_size=8))] = copy.deepcopy(draw(ODD))
        elif kind == "path":
            path = draw(
                st.sampled_from([f"{path}/x", f"{path}/%00", f"{path}/..%2f", "/v1/%ff", f"{path}//", "/v1/models/%20"])
            )
        elif kind == "method":
            method = draw(st.sampled_from(["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"]))
        else:
            header = draw(
                st.sampled_from(
                    [
                        {},
                        {"content-type": "text/plain"},
                        {"content-type": "application/json; charset=utf-99"},
                        {"content-type": "multipart/form-data"},
                        {"content-type": "application/json", "authorization": "Bearer \xff"},
                        {"content-type": "application/json", "content-encoding": "gzip"},
                        {"content-type": "application/json", "host": "elsewhere"},
                    ]
                )
            )
    return method, path, header, body if isinstance(body, bytes) else json.dumps(body).encode()


def test_malformed_requests_get_one_clear_sentence_and_the_server_goes_on(server):
    statuses = Counter()
    with httpx.Client(base_url=server, timeout=60) as client:

        @settings(
            max_examples=COUNT,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            derandomize=COUNT < 1000,
        )
        @hypothesis.given(requests())
        def check(request):
            method, path, headers, body = request
            headers = {name: value.encode("latin-1") for name, value in headers.items()}
            made = client.request(method, path, headers=headers, content=body)
            statuses[made.status_code] += 1
            assert made.status_code < 500, made.text
            if made.status_code >= 400 and method != "HEAD" and "elsewhere" not in str(headers):
                error = made.json()["error"]
                assert error["message"] and len(error["message"]) < 700 and "\n" not in error["message"]
                assert "Traceback" not in made.text and 'File "' not in made.text

        check()
        print(dict(statuses))
        assert sum(count for status, count in statuses.items() if status >= 400) > COUNT // 2
        assert client.get("/health").status_code == 200
        body = {"model": "tiny", "messages": MESSAGES}
        assert client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]


def test_the_schema_lists_errors_in_the_shape_that_they_have(http):
    schema = http.get("/openapi.json").json()
    for path in GOOD:
        listed = schema["paths"][path.replace("/documents/", "/{collection}/")]["post"]["responses"]
        assert "422" not in listed and listed["4XX"]["content"]["application/json"]["schema"]["$ref"].endswith(
            "ErrorReply"
        )
    made = http.post("/v1/rerank", json={}).json()
    assert set(made) == {"error"} and set(made["error"]) == set(schema["components"]["schemas"]["Fault"]["required"])


@pytest.mark.parametrize(
    ("path", "change", "facts"),
    [
        ("/v1/chat/completions", {"max_tokens": 0}, ["max_tokens", "greater than or equal to 1"]),
        ("/v1/chat/completions", {"messages": []}, ["messages", "at least 1"]),
        ("/v1/chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, ["messages.0.role", "'user'"]),
        ("/v1/chat/completions", {"messages": [{"role": "system", "content": "x"}]}, ["messages", "'user'"]),
        ("/v1/chat/completions", {"tools": []}, ["tools", "not supported"]),
        ("/v1/chat/completions", {"to\nols": []}, ["to ols", "not supported"]),
        ("/v1/chat/completions", {"max_tokens": 1024}, ["max_tokens", "1024", "tokens"]),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "<SEP>"}]}, ["<SEP>", "reserves"]),
        ("/v1/chat/completions", {"stop": [""]}, ["stop"]),
        ("/v1/embeddings", {"input": [1, 2]}, ["input"]),
        ("/v1/embeddings", {"dimensions": 3}, ["dimensions", "3", "128"]),
        ("/v1/vector_stores/documents/files", {"data": "eA=="}, ["text", "data"]),
        ("/v1/vector_stores/other/search", {}, ["other", "documents"]),
    ],
)
def test_a_refusal_names_the_field_and_what_is_right(http, path, change, facts):
    known = GOOD.get(path) or GOOD["/v1/vector_stores/documents/search"]
    body = json.dumps({**known, **change})  # with half a surrogate pair, as httpx would not send it
    made = http.post(path, content=body, headers={"content-type": "application/json"})
    assert made.status_code in (400, 404)
    message = made.json()["error"]["message"]
    assert all(fact in message for fact in facts) and "\n" not in message
