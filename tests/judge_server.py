"""An OpenAI-compatible endpoint in this process that answers as a test tells it to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What the server does: a text makes a proper answer, the rest are ways to misbehave.

    Attributes:
        text: of the answer.
        status: HTTP status; other than 200, an error in OpenAI's form.
        headers: further headers. `retry-after-ms` keeps the client's pauses short.
        raw: sent in place of a completion.
        dribble: seconds between any two bytes.
        content_type: of it.
        drop: close the connection without a word.
        wait: called first; blocks until it returns.
        usage: whether tokens are reported.
    """

    text: str | None = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"retry-after-ms": "1"})
    raw: str | bytes | None = None
    dribble: float = 0.0
    content_type: str = "application/json"
    drop: bool = False
    wait: Callable[[], Any] | None = None
    usage: bool = True


Script = Callable[[str], "Reply | str"]


@dataclass
class Endpoint:
    """A running server and what it has seen.

    Attributes:
        url: the `base_url`.
        requests: bodies of all requests.
        headers: those of each.
        most: most requests under way at once.
    """

    url: str
    script: Script
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    under_way: int = 0
    most: int = 0

    @property
    def prompts(self) -> list[str]:
        """The last message of each request."""
        return [request["messages"][-1]["content"] for request in self.requests]


def completion(text: str | None, prompt: str, usage: bool = True) -> dict[str, Any]:
    """A chat completion; a word is a token."""
    body: dict[str, Any] = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "scripted",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": text},
            }
        ],
    }
    if usage:
        n, m = len(prompt.split()), len((text or "").split())
        body["usage"] = {"prompt_tokens": n, "completion_tokens": m, "total_tokens": n + m}
    return body


@contextmanager
def serve(script: Script) -> Iterator[Endpoint]:
    """Run an endpoint whose `script` maps the last message to what it does."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            prompt = body["messages"][-1]["content"]
            with lock:
                endpoint.requests.append(body)
                endpoint.headers.append({k.lower(): v for k, v in self.headers.items()})
                endpoint.under_way += 1
                endpoint.most = max(endpoint.most, endpoint.under_way)
            try:
                self.answer(prompt, endpoint.script(prompt))
            finally:
                with lock:
                    endpoint.under_way -= 1

        def answer(self, prompt: str, reply: Reply | str) -> None:
            if isinstance(reply, str):
                reply = Reply(reply)
            if reply.wait is not None:
                reply.wait()
            if reply.drop:
                self.close_connection = True
                return
            text: str | bytes
            if reply.raw is not None:
                text = reply.raw
            elif reply.status != 200:
                text = json.dumps({"error": {"message": f"scripted {reply.status}"}})
            else:
                text = json.dumps(completion(reply.text, prompt, reply.usage))
            data = text if isinstance(text, bytes) else text.encode()
            try:
                self.send_response(reply.status)
                self.send_header("content-type", reply.content_type)
                self.send_header("content-length", str(len(data)))
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if reply.dribble:
                    for byte in data:
                        self.wfile.write(bytes([byte]))
                        time.sleep(reply.dribble)
                else:
                    self.wfile.write(data)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Clients that are killed are part of the tests."""

    server = Server(("127.0.0.1", 0), Handler)
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}/v1", script)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
