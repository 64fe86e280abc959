"""An OpenAI-compatible endpoint on loopback that says what a script says, faults of every kind included."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from benchmarks.synthesis.scripted_teacher import FactTeacher, part_of


class Say(NamedTuple):
    """A good reply with this text, or other content, instead of the teacher's."""

    text: Any
    finish_reason: str = "stop"
    fields: dict[str, Any] = {}


class Status(NamedTuple):
    """An HTTP error, or any response with this body."""

    code: int
    body: str = '{"error": {"message": "scripted"}}'
    headers: dict[str, str] = {}


class Hang(NamedTuple):
    """No reply for so long."""

    seconds: float


class Cut(NamedTuple):
    """The connection is closed behind the first bytes of a reply."""


# (messages, whole body, how often these messages were sent before) -> what happens; `None` is a good reply.
Script = Callable[[list[dict[str, str]], dict[str, Any], int], Any]


class Endpoint:
    """Use as a context manager.

    Attributes:
        url: for `--base_url`.
        requests: bodies of all requests, in the order of their arrival.
        headers: theirs.
        most_at_once: requests that were under way at the same time.
    """

    def __init__(self, script: Script | None = None, teacher: FactTeacher | None = None, delay=lambda: 0.0):
        self.script, self.teacher, self.delay = script, teacher or FactTeacher(), delay
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.errors: list[Exception] = []
        self.most_at_once = self._under_way = 0
        self._before: Counter[str] = Counter()
        self._lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                endpoint.handle(self)

            def log_message(self, *_):
                pass

            def handle(self):
                try:
                    super().handle()
                except ConnectionError:  # the client was killed
                    pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            # Connections that wait to be accepted: many tasks connect at the same moment.
            request_queue_size = 128

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "Endpoint":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
        assert not self.errors, self.errors

    def parts(self) -> list[str]:
        """What was asked for, by the names of the prompts."""
        return [part_of(body["messages"]) for body in self.requests]

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        messages = body["messages"]
        key = json.dumps(messages)
        with self._lock:
            self.requests.append(body)
            self.headers.append(dict(handler.headers))
            before = self._before[key]
            self._before[key] += 1
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
        try:
            time.sleep(self.delay())
            self._respond(handler, messages, self.script(messages, body, before) if self.script else None)
        except (BrokenPipeError, ConnectionResetError):
            handler.close_connection = True
        except Exception as error:
            self.errors.append(error)
            raise
        finally:
            with self._lock:
                self._under_way -= 1

    def _respond(self, handler: BaseHTTPRequestHandler, messages: list[dict], action: Any) -> None:
        if isinstance(action, Hang):
            time.sleep(action.seconds)
            handler.close_connection = True
        elif isinstance(action, Cut):
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{")
            handler.close_connection = True
        elif isinstance(action, Status):
            self._send(handler, action.code, action.body, action.headers)
        else:
            said = action if isinstance(action, Say) else Say(json.dumps(self.teacher.reply(messages)))
            usage = {"prompt_tokens": len(json.dumps(messages)) // 4, "completion_tokens": len(said.text or "") // 4}
            message = {"role": "assistant", "content": said.text, **said.fields}
            choice = {"message": message, "finish_reason": said.finish_reason}
            self._send(handler, 200, json.dumps({"choices": [choice], "usage": usage}), {})

    @staticmethod
    def _send(handler: BaseHTTPRequestHandler, code: int, text: str, headers: dict[str, str]) -> None:
        data = text.encode("utf-8", "surrogatepass")
        handler.send_response(code)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)
