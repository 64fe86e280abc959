"""The client against a real server on loopback: retries, limits, structured outputs, the key."""

import asyncio
import email.utils
import json
import socket
import threading
import time
from collections import Counter

import pytest
from scripted_endpoint import Cut, Endpoint, Hang, Say, Status

from clara_hf.program import UsageError
from clara_hf.synthesis.backends import client as client_module
from clara_hf.synthesis.backends.client import ChatClient, ChatRequest, Places, RequestFailed, retry_after
from clara_hf.synthesis.prompts import Prompts


KEY = "sk-very-secret-7d1f"
SCHEMA = {"type": "object", "properties": {"pairs": {"type": "array"}}, "required": ["pairs"]}


@pytest.fixture(autouse=True)
def short_delays(monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_DELAY", 0.01)


def request(passage: str = "The motto of Alva is silver bell.") -> ChatRequest:
    return ChatRequest(Prompts().messages("simple", passage=passage), "pairs", SCHEMA, 0.7, 5)


def ask(url: str, *requests: ChatRequest, **options) -> list:
    """Replies to the requests, or their errors, all asked at once."""

    async def all_of_them():
        settings = {"timeout": 5.0, "max_retries": 3, **options}
        async with ChatClient(url, "scripted", **settings) as client:
            return await asyncio.gather(*map(client.complete, requests), return_exceptions=True)

    return asyncio.run(all_of_them())


FAULTS = {
    "limited": Status(429, headers={"Retry-After": "0"}),
    "server error": Status(500),
    "unavailable": Status(503),
    "hanging": Hang(1.0),
    "cut": Cut(),
    "no JSON": Status(200, "<html>busy</html>"),
    "no choices": Status(200, '{"choices": []}'),
    "deep": Status(200, "[" * 100_000),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_fault_is_tried_again(fault):
    with Endpoint(lambda messages, body, before: FAULTS[fault] if before < 2 else None) as endpoint:
        (reply,) = ask(endpoint.url, request(), timeout=0.5 if fault == "hanging" else 20.0)
        assert "silver bell" in reply.text and reply.prompt_tokens > 0 and reply.completion_tokens > 0
        assert len(endpoint.requests) == 3


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_nobody_asks_before_the_time_that_a_limit_names(form):
    limit, others = 1.2, 0.4
    times = []

    def script(messages, body, before):
        times.append(time.monotonic())
        if len(times) == 1:
            # A date has whole seconds.
            date = email.utils.formatdate(time.time() + limit + 1, usegmt=True)
            return Status(429, headers={"Retry-After": str(limit) if form == "seconds" else date})
        time.sleep(others)

    with Endpoint(script) as endpoint:
        replies = ask(endpoint.url, *(request(letter) for letter in "abcdefgh"), concurrency=4)
    assert all(reply.text for reply in replies) and len(times) == 9
    # Those under way when the limit was met get their replies and leave their places to new ones, which wait as well.
    begun = sorted(moment - times[0] for moment in times)
    assert begun[3] < others and begun[4] >= limit


def test_retry_after_reads_numbers_and_dates_and_no_nonsense():
    assert retry_after("2.5") == 2.5 and retry_after("-3") == 0
    assert 50 < retry_after(email.utils.formatdate(time.time() + 60, usegmt=True)) <= 60
    for value in (None, "", "soon", "nan", "inf", "1e9"):
        assert retry_after(value) == 0


def test_requests_under_way_are_bounded():
    with Endpoint(delay=lambda: 0.05) as endpoint:
        replies = ask(endpoint.url, *(request(f"The motto of A{n} is silver bell.") for n in range(12)), concurrency=3)
        assert all(reply.text for reply in replies)
        assert endpoint.most_at_once == 3


@pytest.mark.parametrize("after", ["0.1", None])
def test_a_limit_below_the_concurrency_loses_no_request(after):
    windows = Counter()
    lock = threading.Lock()

    def script(messages, body, before):
        with lock:
            window = int(time.monotonic() / 0.1)
            windows[window] += 1
            if windows[window] > 3:
                return Status(429, headers={"Retry-After": after} if after else {})

    with Endpoint(script) as endpoint:
        replies = ask(endpoint.url, *(request(str(n)) for n in range(60)), concurrency=30, timeout=20.0, max_retries=8)
        assert all(getattr(reply, "text", None) for reply in replies), replies
        # All of them together, each time, would be several hundred.
        assert len(endpoint.requests) < 60 * 4


def test_places_are_halved_once_for_a_burst_and_come_back():
    async def scenario():
        places = Places(8)
        for _ in range(8):
            await places.__aenter__()
        sent = time.monotonic()
        waiting = [asyncio.create_task(places.limit_met(sent)) for _ in range(8)]
        await asyncio.sleep(0)
        assert places.count == 4 and sum(task.done() for task in waiting) == 4
        new = asyncio.create_task(places.__aenter__())
        for left in range(4):
            places.reply_came()
            if left:
                await places.__aexit__()
        await asyncio.sleep(0)
        # Three left and one place came back; those that met the limit go before the new one.
        assert places.count == 5 and all(task.done() for task in waiting) and not new.done()
        for _ in range(100):
            places.reply_came()
        await new
        # A request alone waits for nobody.
        alone = Places(8)
        await alone.__aenter__()
        await asyncio.wait_for(alone.limit_met(time.monotonic()), 5)
        assert alone.count == 4
        assert places.count == 8

    asyncio.run(scenario())


@pytest.mark.parametrize(("taken", "formats"), [("json_object", 2), ("none", 3)])
def test_structured_outputs_go_down_to_what_the_endpoint_takes(taken, formats):
    def script(messages, body, before):
        structure = body.get("response_format", {"type": "none"})["type"]
        return None if structure == taken else Status(400, '{"error": "unknown field"}')

    async def twice(url):
        async with ChatClient(url, "scripted") as client:
            return [await client.complete(request(passage)) for passage in ("a", "b")]

    with Endpoint(script) as endpoint:
        assert all(reply.text for reply in asyncio.run(twice(endpoint.url)))
        # The second request starts with what is known to work.
        assert len(endpoint.requests) == formats + 1


@pytest.mark.parametrize("code", [404, 500, 501])
def test_a_format_refused_by_another_code_is_left_out_before_giving_up(code):
    def script(messages, body, before):
        return Status(code, '{"error": "no response_format here"}') if "response_format" in body else None

    async def several(url):
        async with ChatClient(url, "scripted", max_retries=1) as client:
            replies = await asyncio.gather(*(client.complete(request(passage)) for passage in "abcdef"))
            return [*replies, await client.complete(request("g"))]

    with Endpoint(script) as endpoint:
        assert all(reply.text for reply in asyncio.run(several(endpoint.url)))
        assert "response_format" not in endpoint.requests[-1] and len(endpoint.requests) <= 19
        (error,) = ask(endpoint.url, request(), structured_outputs="json_schema", max_retries=0)
    assert isinstance(error, UsageError if code == 404 else RequestFailed)


def test_a_secret_that_a_reply_echoes_is_masked():
    with Endpoint(lambda *_: Say(f"key {KEY}, token hidden-token-9f")) as endpoint:
        (reply,) = ask(endpoint.url, request(), api_key=KEY, extra_body={"auth": {"Token": "Bearer hidden-token-9f"}})
        assert reply.text == "key [API key], token [API key]"
        # The request itself holds it, and a word for "no key" is left alone.
        assert endpoint.requests[0]["auth"] == {"Token": "Bearer hidden-token-9f"}
        (reply,) = ask(endpoint.url, request(), api_key="hidden")
        assert "token hidden-token-9f" in reply.text


def test_the_schema_is_sent_and_extra_fields_are_set_or_left_out():
    with Endpoint() as endpoint:
        ask(endpoint.url, request(), extra_body={"top_k": 20, "seed": None})
    (body,) = endpoint.requests
    assert body["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "pairs", "strict": True, "schema": SCHEMA},
    }
    assert body["top_k"] == 20 and "seed" not in body and body["temperature"] == 0.7


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "good "}, {"type": "text", "text": "reply"}],
        [{"type": "thinking", "thinking": [{"type": "text", "text": "bad"}]}, {"type": "text", "text": "good reply"}],
        [{"type": "reasoning", "text": "bad"}, {"type": "output_text", "text": "good"}, " reply"],
        [{"type": "text", "text": {"value": "good reply", "annotations": []}}],
        {"type": "text", "text": "good reply"},
    ],
)
def test_content_in_parts_is_one_text_without_reasoning(content):
    with Endpoint(lambda *_: Say(content, "length")) as endpoint:
        (reply,) = ask(endpoint.url, request())
    assert reply.text == "good reply" and reply.cut


@pytest.mark.parametrize(
    ("reason", "cut"),
    [
        ("length", True),
        ("MAX_TOKENS", True),
        ("content_filter", True),
        ("abort", True),
        ("stop", False),
        ("eos", False),
    ],
)
def test_a_reply_that_the_endpoint_broke_off_is_told_from_a_whole_one(reason, cut):
    with Endpoint(lambda *_: Say('{"correct": true}', reason)) as endpoint:
        (reply,) = ask(endpoint.url, request())
    assert reply.cut == cut


EMPTY = {
    "null": Say(None),
    "blank": Say(" \n"),
    "no parts": Say([]),
    "reasoning in parts": Say([{"type": "thinking", "thinking": "{}"}]),
    "reasoning beside": Say(None, "length", {"reasoning_content": '{"correct": true}'}),
    "tool calls": Say(None, "tool_calls", {"tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}),
    "refusal": Say(None, "stop", {"refusal": "I cannot help with that."}),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_a_reply_without_content_is_an_error_of_its_request(kind):
    poison = EMPTY[kind]
    with Endpoint(lambda messages, body, before: poison if "poison" in messages[-1]["content"] else None) as endpoint:
        bad, *good = ask(endpoint.url, request("poison"), *(request(f"good {n}") for n in range(3)), max_retries=6)
        assert isinstance(bad, RequestFailed) and "without content" in str(bad) and "3 tries" in str(bad)
        assert all(reply.text and not reply.cut for reply in good) and len(endpoint.requests) == 6
    assert all(name in str(bad) for name in poison.fields) and poison.finish_reason in str(bad)
    # One that passes is tried again.
    with Endpoint(lambda messages, body, before: poison if not before else None) as endpoint:
        (reply,) = ask(endpoint.url, request())
        assert "silver bell" in reply.text and len(endpoint.requests) == 2


@pytest.mark.parametrize(
    "said",
    [
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
        [{"type": "extra_forbidden", "loc": ["body", "max_tokens"], "msg": "Extra inputs are not permitted"}],
    ],
)
def test_a_field_that_the_endpoint_does_not_know_is_told_with_its_cure(said):
    def script(messages, body, before):
        return Status(400, json.dumps({"error": {"message": said}})) if "max_tokens" in body else None

    with Endpoint(script) as endpoint:
        (bad,) = ask(endpoint.url, request(), max_tokens=300)
        assert isinstance(bad, RequestFailed)
        cure = json.loads(str(bad).partition("--extra_body '")[2].partition("'")[0])
        assert cure == {"max_tokens": None, "max_completion_tokens": 300}
        (good,) = ask(endpoint.url, request(), max_tokens=300, extra_body=cure)
        assert good.text and endpoint.requests[-1]["max_completion_tokens"] == 300
    with Endpoint(lambda *_: Status(400, '{"error": "max_tokens is too large: 9999"}')) as endpoint:
        (bad,) = ask(endpoint.url, request())
        assert "--extra_body" not in str(bad)


def test_one_request_that_always_fails_is_given_up_where_others_succeed():
    def script(messages, body, before):
        return Status(500) if "poison" in messages[-1]["content"] else None

    with Endpoint(script) as endpoint:
        bad, *good = ask(endpoint.url, request("poison"), *(request(f"good {n}") for n in range(3)))
    assert isinstance(bad, RequestFailed) and "HTTP 500" in str(bad) and "4 tries" in str(bad)
    assert all(reply.text for reply in good)


def test_a_refused_request_is_not_repeated_and_does_not_change_the_format():
    def script(messages, body, before):
        return Status(400, '{"error": {"message": "too long"}}') if "poison" in messages[-1]["content"] else None

    with Endpoint(script) as endpoint:
        (bad,) = ask(endpoint.url, request("poison"))
        assert isinstance(bad, RequestFailed) and "too long" in str(bad)
        assert len(endpoint.requests) == 3  # one per format
        (good,) = ask(endpoint.url, request("good"), structured_outputs="json_schema")
        assert good.text and len(endpoint.requests) == 4


@pytest.mark.parametrize("fault", [Status(500), Hang(0.5), Cut()])
def test_an_endpoint_that_always_fails_stops_the_run_after_a_few(fault):
    async def one_after_the_other(url):
        errors = []
        async with ChatClient(url, "scripted", timeout=0.2, max_retries=1) as client:
            for number in range(4):
                with pytest.raises((RequestFailed, UsageError)) as caught:
                    await client.complete(request(str(number)))
                errors.append(type(caught.value))
        return errors

    with Endpoint(lambda *_: fault) as endpoint:
        assert asyncio.run(one_after_the_other(endpoint.url)) == [RequestFailed] * 3 + [UsageError]


def test_a_limit_that_does_not_end_stops_the_run():
    with Endpoint(lambda *_: Status(429, '{"error": {"message": "quota exceeded"}}')) as endpoint:
        (error,) = ask(endpoint.url, request())
    assert isinstance(error, UsageError) and "quota exceeded" in str(error) and "goes on" in str(error)


def test_no_server_at_the_address():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        (error,) = ask(f"http://127.0.0.1:{held.getsockname()[1]}/v1", request(), max_retries=1)
    assert isinstance(error, UsageError) and "no connection" in str(error) and "127.0.0.1" in str(error)


@pytest.mark.parametrize(
    ("code", "words"), [(401, "--api_key_env"), (402, "credit"), (403, "--api_key_env"), (404, "--base_url")]
)
def test_errors_that_the_user_has_to_mend_stop_at_once_and_never_show_the_key(code, words):
    echo = Status(code, '{"error": {"message": "bad key ' + KEY + '\\u001b[31m given"}}')
    with Endpoint(lambda *_: echo) as endpoint:
        (error,) = ask(endpoint.url, request(), api_key=KEY)
        # A 404 may also mean that the format is not known.
        assert endpoint.headers[0]["Authorization"] == f"Bearer {KEY}"
        assert len(endpoint.requests) == (2 if code == 404 else 1)
    assert isinstance(error, UsageError) and words in str(error)
    assert KEY not in str(error) and "\x1b" not in str(error) and "[API key]" in str(error)


def test_a_redirection_is_not_followed_with_the_key():
    with Endpoint() as other, Endpoint(lambda *_: Status(307, headers={"Location": other.url})) as endpoint:
        (error,) = ask(endpoint.url, request(), api_key=KEY)
        assert isinstance(error, UsageError) and not other.requests


def test_a_reply_without_end_is_not_read(monkeypatch):
    monkeypatch.setattr(client_module, "MAX_REPLY_BYTES", 10_000)
    with Endpoint(lambda *_: Say("x" * 20_000)) as endpoint:
        (error,) = ask(endpoint.url, request())
    assert isinstance(error, RequestFailed) and "10000 bytes" in str(error)


def test_a_reply_of_broken_unicode_can_be_stored():
    with Endpoint(lambda *_: Say("half \ud83d of a pair\x00")) as endpoint:
        (reply,) = ask(endpoint.url, request())
    assert reply.text.encode("utf-8").decode() == "half  of a pair"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://user:hunter2@host/v1", "no password"),
        ("https://host/v1?key=hunter2", "no password"),
        ("localhost:8000/v1", "http://localhost:8000/v1"),
        ("file:///etc/passwd", "http://localhost:8000/v1"),
    ],
)
def test_addresses_that_cannot_be_used(url, words):
    with pytest.raises(UsageError, match=words) as caught:
        ChatClient(url, "scripted")
    assert "hunter2" not in str(caught.value)


def test_a_key_with_white_space_is_refused_without_showing_it():
    with pytest.raises(UsageError) as caught:
        ChatClient("http://localhost/v1", "scripted", "sk-a\nX-Evil: 1")
    assert "sk-a" not in str(caught.value)
