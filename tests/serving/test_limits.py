import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest


pytest.importorskip("fastapi")

from clara_hf.memory_store import MemoryStore
from clara_hf.serving.engine import Ask, Busy, Engine, Metrics
from clara_hf.serving.guards import Keys
from clara_hf.serving.library import Library


pytest_plugins = ["served"]
pytestmark = pytest.mark.filterwarnings("ignore:lance is not fork-safe")
KEY = "a-key-of-twenty-letters"
CHAT = "/v1/chat/completions"
FILES = "/v1/vector_stores/documents/files"


def chat(question="Who keeps bees?", **options):
    return {"model": "tiny", "messages": [{"role": "user", "content": question}], **options}


@pytest.fixture
def expected_alone(other_model, store_path):
    store = MemoryStore.open(store_path)
    made = other_model.generate(["Who keeps bees?"], memories=store.get(list(store)), max_new_tokens=8)
    return made.texts[0]


@pytest.fixture
def slow(served_model, monkeypatch):
    """Makes every step of decoding take a while; gives how many steps were taken."""
    steps = []
    forward = served_model.decoder.forward

    def delayed(*args, **kwargs):
        steps.append(time.monotonic())
        time.sleep(0.02)
        return forward(*args, **kwargs)

    monkeypatch.setattr(served_model.decoder, "forward", delayed)
    return steps


def test_a_full_queue_answers_429_with_retry_after_and_the_rest_is_answered(serve, served_model, store_path, slow):
    with serve(served_model, store_path, max_queue=2, max_batch=1) as url:
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            made = list(pool.map(lambda _: httpx.post(url + CHAT, json=chat(max_tokens=10), timeout=60), range(12)))
        statuses = {one.status_code for one in made}
        assert statuses == {200, 429}
        for one in made:
            if one.status_code == 429:
                assert int(one.headers["retry-after"]) >= 1 and one.json()["error"]["code"] == "queue_full"
        assert len({one.json()["choices"][0]["message"]["content"] for one in made if one.status_code == 200}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_stops_its_decoding(serve, served_model, store_path, slow, stream):
    with serve(served_model, store_path) as url:
        with httpx.Client(base_url=url, timeout=60) as client:
            wanted = chat(max_tokens=800, stream=stream, temperature=2.0, seed=1)
            if stream:
                with client.stream("POST", CHAT, json=wanted) as response:
                    assert next(response.iter_text())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(CHAT, json=wanted, timeout=1)
            assert httpx.post(url + CHAT, json=chat(max_tokens=1), timeout=60).status_code == 200
            count = len(slow)
            time.sleep(0.2)
            assert len(slow) == count < 400


def test_many_slow_clients_do_not_keep_others_waiting(serve, served_model, store_path):
    with serve(served_model, store_path, body_seconds=2.0) as url:
        host, port = url.removeprefix("http://").split(":")
        half = [socket.create_connection((host, int(port))) for _ in range(50)]
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{{"
        )
        for number, connection in enumerate(half):
            connection.sendall((head if number % 2 else "GET /health HTT").encode())
        began = time.monotonic()
        assert httpx.post(url + CHAT, json=chat(max_tokens=2), timeout=60).status_code == 200
        assert time.monotonic() - began < 2
        half[1].settimeout(20)
        assert b" 408 " in half[1].recv(200)
        for connection in half:
            connection.close()
        assert httpx.get(url + "/ready").status_code == 200


def test_an_answer_that_takes_too_long_is_504_and_stops(serve, served_model, store_path, slow):
    with serve(served_model, store_path, seconds=0.5) as url:
        made = httpx.post(url + CHAT, json=chat(max_tokens=800, temperature=2.0, seed=1), timeout=60)
        assert made.status_code == 504 and "0.5" in made.json()["error"]["message"]
        time.sleep(0.3)
        count = len(slow)
        time.sleep(0.2)
        assert len(slow) == count


def test_bodies_over_the_limit_get_413_with_and_without_a_length(serve, served_model, store_path):
    with serve(served_model, store_path, max_body_mb=0.01) as url:
        large = json.dumps(chat("x" * 20_000)).encode()
        header = {"content-type": "application/json"}
        for content in (large, iter([large[:9000], large[9000:]])):
            made = httpx.post(url + CHAT, content=content, headers=header)
            assert made.status_code == 413 and "10485" in made.json()["error"]["message"]
        assert httpx.get(url + "/health").status_code == 200


def test_keys_guard_everything_but_health_page_and_metrics(serve, served_model, store_path, tmp_path, capfd):
    (tmp_path / "keys").write_text(f"# ours\n{KEY}\nanother-key-of-twenty\n")
    with serve(served_model, store_path, api_key_file=str(tmp_path / "keys"), ui=True) as url:
        for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {KEY}"}):
            made = httpx.post(url + CHAT, json=chat(), headers=header)
            assert (made.status_code, made.json()["error"]["code"]) == (401, "invalid_api_key")
        for key in (KEY, "another-key-of-twenty"):
            header = {"authorization": f"Bearer {key}"}
            assert httpx.post(url + CHAT, json=chat("A secret?", max_tokens=1), headers=header).status_code == 200
        for path in ("/", "/health", "/ready", "/metrics"):
            assert httpx.get(url + path).status_code == 200
        assert httpx.get(url + "/openapi.json").status_code == 401
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    assert [line["status"] for line in lines if line["route"] == CHAT] == [200, 200]
    assert len({line["id"] for line in lines}) == len(lines) >= 9
    text = json.dumps(lines)
    assert KEY not in text and "secret" not in text


@pytest.mark.parametrize(
    ("text", "fact"), [("", "no key"), ("# only a comment\n", "no key"), ("fifteen-letters\n", "key 1")]
)
def test_a_key_file_without_good_keys_is_refused(tmp_path, text, fact):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ValueError, match=fact):
        Keys(tmp_path / "keys")


def test_other_hosts_and_origins_do_not_get_in(server):
    assert httpx.post(server + CHAT, json=chat(), headers={"host": "evil.example"}).status_code == 400
    plain = httpx.post(server + CHAT, content=json.dumps(chat()), headers={"content-type": "text/plain"})
    assert plain.status_code == 400  # what a page of another origin can send without being asked for leave
    made = httpx.options(
        server + CHAT, headers={"origin": "http://evil.example", "access-control-request-method": "POST"}
    )
    assert "access-control-allow-origin" not in made.headers


def test_a_read_only_service_answers_and_refuses_to_write(serve, served_model, other_model, store_path):
    before = {file: file.stat().st_mtime_ns for file in store_path.rglob("*")}
    with serve(served_model, store_path, read_only=True) as one, serve(other_model, store_path, read_only=True) as two:
        answers = {
            httpx.post(url + CHAT, json=chat(), timeout=60).json()["choices"][0]["message"]["content"]
            for url in (one, two)
        }
        assert len(answers) == 1
        made = httpx.post(one + FILES, json={"text": "More."})
        assert made.status_code == 409 and "read-only" in made.json()["error"]["message"]
        assert httpx.delete(one + FILES + "/x").status_code == 409
    assert {file: file.stat().st_mtime_ns for file in store_path.rglob("*")} == before


def test_an_empty_collection_says_so_and_is_filled(serve, served_model, tmp_path):
    with serve(served_model, tmp_path / "new") as url:
        made = httpx.post(url + CHAT, json=chat(), timeout=60)
        assert made.status_code == 400 and "no documents" in made.json()["error"]["message"]
        assert httpx.post(url + FILES, json={"text": "Mara keeps bees."}, timeout=60).status_code == 200
        assert httpx.post(url + CHAT, json=chat(), timeout=60).status_code == 200


def test_a_batch_in_which_the_model_fails_does_not_end_the_service(serve, served_model, store_path, monkeypatch):
    with serve(served_model, store_path) as url:
        with monkeypatch.context() as patch:
            patch.setattr(served_model, "retrieve", lambda *args, **kwargs: 1 / 0)
            made = httpx.post(url + CHAT, json=chat(), timeout=60)
            assert made.status_code == 500 and "division" not in made.text
        assert httpx.post(url + CHAT, json=chat(), timeout=60).status_code == 200


def test_what_was_added_under_load_is_all_there_and_questions_go_on(serve, served_model, tmp_path):
    with serve(served_model, tmp_path / "new") as url:

        def add(number):
            return httpx.post(url + FILES, json={"text": f"Note {number} of ten.", "file_id": f"n{number}"}, timeout=60)

        with concurrent.futures.ThreadPoolExecutor(5) as pool:
            assert {one.status_code for one in pool.map(add, range(10))} == {200}
        assert len(httpx.get(url + FILES).json()["data"]) == 10


def test_closing_finishes_what_waits(served_model, store_path):
    import asyncio

    async def run():
        engine = Engine(Library.open(store_path, served_model), 10, 4, 0.0, Metrics())

        async def one():
            return [event async for event in engine.answer(Ask("Who?", 2))]

        waiting = [asyncio.create_task(one()) for _ in range(5)]
        await asyncio.sleep(0)
        await asyncio.to_thread(engine.close)
        assert not engine.is_ready
        with pytest.raises(Busy):
            await one()
        return await asyncio.gather(*waiting)

    answers = asyncio.run(run())
    assert len({events[-1].text for events in answers}) == 1 and all(len(events) == 2 for events in answers)


# In a process of its own


@pytest.fixture
def process(served_model, tmp_path):
    """Starts `serve` as a program over a collection in `tmp_path`; returns it and its URL."""
    served_model.save_pretrained(tmp_path / "model")
    served_model.processor.save_pretrained(tmp_path / "model")
    started = []

    def start():
        command = [sys.executable, "-m", "clara_hf.cli", "serve", "--port", "0", "--name", "tiny"]
        command += ["--model", str(tmp_path / "model"), "--store", str(tmp_path / "store")]
        log = open(tmp_path / "log", "w")
        program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ})
        program.log = tmp_path / "log"
        started.append(program)
        line = next((line for line in program.stdout if "http" in line), "")
        assert "http://127.0.0.1:" in line, (tmp_path / "log").read_text()
        return program, line.split(" at ")[1].strip()

    yield start
    for program in started:
        program.kill()
        program.wait()
        program.stdout.close()


def test_kill_during_adds_loses_nothing_that_was_acknowledged(process):
    program, url = process()
    acknowledged = []

    def add():
        for number in range(1000):
            text = f"Note {number}. " + f"Bees of hive {number} fly far over the river Aum. " * 20
            try:
                made = httpx.post(url + FILES, json={"text": text, "file_id": f"n{number}"}, timeout=60)
            except httpx.HTTPError:
                return
            assert made.status_code == 200
            acknowledged.append((f"n{number}", made.json()["passages"]))

    adding = threading.Thread(target=add)
    adding.start()
    while len(acknowledged) < 5:
        time.sleep(0.01)
    time.sleep(0.05)
    program.send_signal(signal.SIGKILL)
    adding.join(60)
    program.wait(60)
    assert 5 <= len(acknowledged) < 1000
    _, url = process()
    found = {one["id"]: one["passages"] for one in httpx.get(url + FILES).json()["data"]}
    assert {name: found.get(name) for name, _ in acknowledged} == dict(acknowledged)
    assert httpx.post(url + CHAT, json=chat(n_docs=5), timeout=60).status_code == 200
    last = f"n{len(acknowledged)}"
    made = httpx.post(url + FILES, json={"text": "Again.", "file_id": last}, timeout=60)
    assert made.status_code in (200, 409)  # 409: it was taken in, and only its acknowledgement was lost


def test_sigterm_finishes_what_runs_and_what_waits_and_ends_with_code_0(process):
    program, url = process()
    httpx.post(url + FILES, json={"text": "Mara keeps bees."}, timeout=60)
    options = chat(max_tokens=400, temperature=2.0, seed=1)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        with httpx.stream("POST", url + CHAT, json={**options, "stream": True}, timeout=60) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            waiting = [pool.submit(httpx.post, url + CHAT, json=options, timeout=60) for _ in range(4)]
            while httpx.get(url + "/metrics").text.count("clara_queue 4.0") == 0:
                time.sleep(0.01)
            program.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert [one.result().status_code for one in waiting] == [200] * 4
    assert rest[-2:] == ["data: [DONE]", ""] or rest[-1] == "data: [DONE]"
    reasons = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in rest if line.startswith("data: {")]
    assert reasons[-1] in ("stop", "length") and len(reasons) > 5
    assert program.wait(60) == 0
    assert "Traceback" not in Path(program.log).read_text()


def test_services_of_one_model_in_one_process_take_turns(serve, served_model, store_path, expected_alone):
    with serve(served_model, store_path, read_only=True) as one, serve(served_model, store_path, read_only=True) as two:
        urls = [one, two] * 10
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            made = list(pool.map(lambda url: httpx.post(url + CHAT, json=chat(max_tokens=8), timeout=60), urls))
    assert {one.json()["choices"][0]["message"]["content"] for one in made} == {expected_alone}
