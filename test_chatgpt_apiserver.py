"""Tests of chatgpt_apiserver.py: real sockets on port 0, bytes, subprocesses.

In the order of the module.  Run them with `python3 -m pytest`; nothing but pytest
is needed, and no network beyond this machine.
"""

from __future__ import annotations

import asyncio
import base64
import bisect
import calendar
import collections
import contextlib
import contextvars
import csv
import email.utils
import errno
import faulthandler
import functools
import gc
import gzip
import inspect
import io
import json
import math
import os
import pathlib
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
import urllib.request
import uuid
import zlib
from pathlib import Path
from typing import NamedTuple

import pytest

import chatgpt_apiserver as apiserver
from chatgpt_apiserver import (
    APIError,
    APIRequest,
    ConfigurationError,
    Connection,
    FunctionController,
    HTTPClient,
    Limits,
    Opcode,
    OpenAIController,
    ProtocolError,
    Server,
    User,
    UserStore,
    WebSocket,
    WebSocketProtocol,
    encode_frame,
    handshake_key,
)

# -----------------------------------------------------------------------------
# Harness: a client, an upstream and an agent that speak bytes
# -----------------------------------------------------------------------------

KEY = "test-key"
MODULE = Path(apiserver.__file__).resolve()
# Which end of a websocket masks.
SERVER, CLIENT = False, True
TEXT, BINARY, CONTINUATION = Opcode.TEXT, Opcode.BINARY, Opcode.CONTINUATION
PING, PONG, CLOSE = Opcode.PING, Opcode.PONG, Opcode.CLOSE
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
CHAT_URL = "/v1/chat/completions"
STREAM = {**CHAT, "stream": True}

# One timeout for everything: a test that hangs dies with its traceback.
faulthandler.dump_traceback_later(300, exit=True)


def run(work, timeout=20):
    """Run a coroutine to its end, in an event loop of its own."""
    return asyncio.run(asyncio.wait_for(work, timeout))


def flow(test=None, *, timeout=20, **options):
    """Run an async test in an event loop of its own, started with what it needs.

    Only a test with options is decorated: the end of this file does it for all others.
    Its parameters may be a `server` with these options, its `log`, a `client`, a
    registered `agent`, a `gate` (a PoolGate) or an `upstream` behind it and that one's
    `controller`, with the options `gate`, `behave` and `controller`; or `upstreams` and
    `controllers`, when these two are lists.
    """
    if test is None:
        return functools.partial(flow, timeout=timeout, **options)
    signature = inspect.signature(test)
    known = "server log client agent gate upstream controller upstreams controllers"
    parts = signature.parameters.keys() & {*known.split()}

    async def run_with_parts(tmp_path, arguments):
        made = {"log": Log()}
        started = {**options, **(made if "log" in parts else {})}
        gate = started.pop("gate", {})
        async with contextlib.AsyncExitStack() as stack:
            enter = stack.enter_async_context
            if "behave" in options or any(p.startswith(("up", "con")) for p in parts):
                behaves = started.pop("behave", None)
                own = started.pop("controller", {})
                behaves = behaves if isinstance(behaves, list) else [behaves]
                started["options"] = own if isinstance(own, list) else [own]
                server, ups, cs = await enter(pool_of(tmp_path, *behaves, **started))
                made.update(upstreams=ups, controllers=cs, upstream=ups[0])
                made["controller"] = cs[0]
            else:
                server = await enter(serving(tmp_path, **started))
            made["server"] = server
            if "gate" in parts:
                made["gate"] = PoolGate(**gate)
                server.add(made["gate"].controller)
            if "client" in parts:
                made["client"] = await enter(Client(server.port))
            if "agent" in parts:
                made["agent"] = await enter(Agent(server))
            await test(**arguments, **{name: made[name] for name in parts})

    @functools.wraps(test)
    def run_test(**arguments):
        if not parts:
            return run(test(**arguments), timeout)
        wanted = {k: v for k, v in arguments.items() if k in signature.parameters}
        return run(run_with_parts(arguments["tmp_path"], wanted), timeout)

    names = dict.fromkeys([*signature.parameters, *["tmp_path"] * bool(parts)])
    kind = inspect.Parameter.KEYWORD_ONLY
    asked = [inspect.Parameter(name, kind) for name in names if name not in parts]
    run_test.__signature__ = signature.replace(parameters=asked)
    return run_test


def cases(names, *values, **options):
    """Decorate a test: run it once for each of these values of its arguments."""
    return pytest.mark.parametrize(names, values, **options)


async def until(condition, timeout=5.0):
    """Wait until condition() is true, and return its value."""
    end = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def serving(tmp_path, *controllers, **options):
    """Start a server with these controllers and its users.json in tmp_path."""
    options.setdefault("users", str(tmp_path / "users.json"))
    server = Server(KEY, port=0, **options)
    for controller in controllers:
        server.add(controller)
    async with server:
        yield server


@pytest.fixture
def constant(monkeypatch):
    """Change constants of the module for one test: constant(LINGER_TIMEOUT=0.1)."""

    def change(**values):
        for name, value in values.items():
            monkeypatch.setattr(apiserver, name, value)

    return change


class Log(apiserver.Log):
    """A log whose lines a test can read."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def write(self, line):
        self.lines.append(line)

    @property
    def text(self):
        return "\n".join(self.lines)


@pytest.fixture
def certificate(tmp_path):
    """A server's TLS options, its files in tmp_path, and a client's context for it."""
    files = {"tls_cert": TEST_CERT, "tls_key": TEST_KEY, "ca": TEST_CA}
    for name, text in files.items():
        files[name] = str(tmp_path / f"{name}.pem")
        Path(files[name]).write_text(text)
    return files, ssl.create_default_context(cafile=files.pop("ca"))


class Reply(NamedTuple):
    """An answer: status, headers (a dict, lower case), content, whether it is whole."""

    status: int
    headers: dict
    content: bytes
    whole: bool = True

    def json(self):
        return json.loads(self.content)

    def events(self):
        """The data of its server-sent events."""
        return [e[6:] for e in self.content.decode().split("\n\n") if e[:6] == "data: "]


class Client:
    """A keep-alive HTTP client on a bare socket: `async with Client(port) as c`."""

    def __init__(self, port, host="127.0.0.1", tls=None):
        self.port, self.host, self.tls = port, host, tls

    async def __aenter__(self):
        streams = await asyncio.open_connection(self.host, self.port, ssl=self.tls)
        self.reader, self.writer = streams
        return self

    async def __aexit__(self, *exc_info):
        self.writer.transport.abort()

    def send(self, data):
        self.writer.write(data)

    async def read_head(self):
        """Read the head of the next answer: status and headers."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        lines = head.split("\r\n")
        pairs = (line.partition(":") for line in lines[1:] if line)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        return int(lines[0].split()[1]), headers

    async def read_chunk(self):
        """Read the next chunk: b"" is the last, None an end of the connection."""
        try:
            size = int(await self.reader.readuntil(b"\r\n"), 16)
        except asyncio.IncompleteReadError as error:
            assert not error.partial
            return None
        return (await self.reader.readexactly(size + 2))[:-2]

    async def first_chunk(self):
        """Read the first chunk of an answer of status 200."""
        assert (await self.read_head())[0] == 200
        return await self.read_chunk()

    async def read_chunks(self):
        """Read all chunks to the end of the answer, which sets whole."""
        chunks = []
        while chunk := await self.read_chunk():
            chunks.append(chunk)
        self.whole = chunk is not None
        return b"".join(chunks)

    async def read_rest(self):
        """Read all chunks to the end of the answer, without heartbeat comments."""
        return (await self.read_chunks()).replace(b": keep-alive\n\n", b"")

    async def read_reply(self, method="GET"):
        """Read the next answer."""
        status, headers = await self.read_head()
        self.whole = True
        if method == "HEAD" or status in (101, 204, 304):
            content = b""
        elif "content-length" in headers:
            content = await self.reader.readexactly(int(headers["content-length"]))
        elif "transfer-encoding" in headers:
            content = await self.read_chunks()
        else:
            content = await self.reader.read()
        return Reply(status, headers, content, self.whole)

    async def request(self, method, path, body=None, key=KEY, headers=()):
        """Send a request and read its answer; body is bytes, or sent as JSON."""
        self.send(request_bytes(method, path, body, key, headers))
        return await self.read_reply(method)


def request_bytes(method, path, body=None, key=KEY, headers=()):
    """Encode a request; body is bytes, or sent as JSON."""
    content = b"" if body is None else body
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
    lines += [f"Authorization: Bearer {key}"] if key else []
    lines += [f"{name}: {value}" for name, value in headers]
    names = [name.lower() for name, _ in headers]
    if body is not None and "transfer-encoding" not in names:
        lines.append(f"Content-Length: {len(content)}")
    return "\r\n".join([*lines, "", ""]).encode() + content


async def ask(port, method, path, body=None, key=KEY, headers=()):
    """Send a request on a new connection and read its answer."""
    async with Client(port) as client:
        return await client.request(method, path, body, key, headers)


async def raw(port, data, timeout=5):
    """Send data and read everything up to the end of the connection."""
    async with Client(port) as client:
        client.send(data)
        return await asyncio.wait_for(client.reader.read(), timeout)


def completion(content="Hi there", model="m", **more):
    """A chat.completion as an upstream would send it."""
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    body = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1}
    return {**body, "model": model, "choices": [choice], "usage": usage, **more}


def chunk(content=None, finish_reason=None, **more):
    """One encoded event of a chat stream."""
    delta = {} if content is None else {"content": content}
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    body = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1}
    body = {**body, "model": "m", "choices": [choice], **more}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def http_reply(content, status=200, content_type="application/json", headers=()):
    """Encode an upstream's whole answer."""
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    lines = [f"HTTP/1.1 {status} X", f"Content-Type: {content_type}"]
    lines += [f"{name}: {value}" for name, value in headers]
    lines.append(f"Content-Length: {len(content)}")
    return "\r\n".join([*lines, "", ""]).encode() + content


STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


def chunked(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


class UpstreamRequest(NamedTuple):
    line: str
    headers: dict
    content: bytes

    def json(self):
        return json.loads(self.content)


GOOD_REPLY = http_reply(completion())


def sends(*steps, models=("m",)):
    """An upstream's behaviour: list its models, and take these steps otherwise.

    Bytes are written, an Event is awaited, a number is slept for, and a function
    is called with the writer, such as those below that end a connection.
    """

    async def behave(request, writer):
        if "/models " in request.line:
            writer.write(http_reply({"data": [{"id": name} for name in models]}))
            return
        for step in filter(None, steps):
            if isinstance(step, bytes):
                writer.write(step)
                await writer.drain()
            elif isinstance(step, asyncio.Event):
                await step.wait()
            elif callable(step):
                step(writer)
            else:
                await asyncio.sleep(step)

    return behave


def streams(*steps, end=b"0\r\n\r\n"):
    """An upstream's behaviour: a stream of these events and the steps between them."""
    steps = (chunked(step) if isinstance(step, bytes) else step for step in steps)
    return sends(STREAM_HEAD, *steps, end)


def connection_close(writer):
    writer.close()


def connection_drop(writer):
    writer.transport.abort()


def connection_cut(writer):
    """Reset the connection."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class Upstream:
    """A fake upstream: `async with Upstream(behave) as upstream`.

    behave  bytes that answer each request, or an async function of an
            UpstreamRequest and a writer

    requests collects the requests; ended counts the connections that have ended.
    """

    def __init__(self, behave=None, tls=None):
        self.behave = http_reply(completion()) if behave is None else behave
        self.tls = tls
        self.requests = []
        self.connections = 0
        self.ended = 0

    async def __aenter__(self):
        listening = asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls)
        self.server = await listening
        self.port = self.server.sockets[0].getsockname()[1]
        self.url = f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}/v1"
        self.tasks = set()
        return self

    async def __aexit__(self, *exc_info):
        self.server.close()
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def controller(self, **options):
        options = {"api_key": "UPSTREAMSECRET", "name": f"up-{self.port}", **options}
        return OpenAIController(base_url=self.url, **options)

    async def _serve(self, reader, writer):
        task = asyncio.current_task()
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        self.connections += 1
        try:
            while True:
                request = await self._read(reader)
                self.requests.append(request)
                if isinstance(self.behave, bytes):
                    writer.write(self.behave)
                else:
                    # Notices a hang-up while behave does not read.
                    working = asyncio.ensure_future(self.behave(request, writer))
                    gone = asyncio.ensure_future(reader.read(1))
                    try:
                        race = asyncio.wait(
                            [working, gone], return_when="FIRST_COMPLETED"
                        )
                        await race
                        if not working.done():
                            break
                        working.result()
                    finally:
                        working.cancel()
                        gone.cancel()
                        await asyncio.wait({gone})
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.ended += 1
            writer.transport.abort()

    async def _read(self, reader):
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, _, fields = head.partition("\r\n")
        pairs = (field.partition(": ") for field in fields.split("\r\n") if field)
        headers = {name.lower(): value for name, _, value in pairs}
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        return UpstreamRequest(line, headers, content)


@contextlib.asynccontextmanager
async def pool_of(tmp_path, *behaves, options=None, **more):
    """A server over upstreams that behave like this: (server, upstreams, controllers).

    options are those of the first controllers, in place of their names (up0, ...), one
    model (m) and the server's limits.
    """
    async with contextlib.AsyncExitStack() as stack:
        upstreams, controllers = [], []
        for number, behave in enumerate(behaves):
            upstreams.append(await stack.enter_async_context(Upstream(behave)))
            named = {"name": f"up{number}", "models": ["m"]}
            named["limits"] = more.get("limits", Limits())
            named.update(*(options or [])[number : number + 1])
            controllers.append(upstreams[-1].controller(**named))
        made = serving(tmp_path, *controllers, **more)
        yield await stack.enter_async_context(made), upstreams, controllers


@contextlib.asynccontextmanager
async def beside(work):
    """Run a task during the block."""
    task = asyncio.ensure_future(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@contextlib.asynccontextmanager
async def posting(server, body=STREAM, path=CHAT_URL, key=KEY, headers=()):
    """A client that has posted this to a server or a port and has read nothing."""
    async with Client(getattr(server, "port", server)) as client:
        client.send(request_bytes("POST", path, body, key, headers))
        yield client


@contextlib.contextmanager
def refused(status, error=ProtocolError, match=None):
    """Expect an error of this status in the block, or none if that is None."""
    if status is None:
        yield
        return
    with pytest.raises(error, match=match) as caught:
        yield
    assert caught.value.status == status


@contextlib.contextmanager
def takes(least, most, clock=time.monotonic):
    """Expect the block to take this many seconds."""
    began = clock()
    yield
    assert least <= clock() - began < most


@contextlib.contextmanager
def traced():
    """Trace memory: `with traced() as memory`; memory() returns (bytes held, peak)."""
    tracemalloc.start()
    try:
        yield tracemalloc.get_traced_memory
    finally:
        tracemalloc.stop()


def handshake(path, *fields):
    """Encode a websocket's handshake; fields may contain its Host."""
    fields = {"Host": "localhost", **dict(fields)}
    lines = [f"GET {path} HTTP/1.1", "Upgrade: websocket", "Connection: Upgrade"]
    lines += ["Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {handshake_key()}"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    return "\r\n".join([*lines, "", ""]).encode()


class Peer:
    """The peer of a websocket of this side, on bare streams."""

    def __init__(self, side, reader, writer):
        self.side = CLIENT if side is SERVER else SERVER
        self.reader, self.writer = reader, writer
        self.protocol = WebSocketProtocol(self.side, max_size=1 << 30)
        self.events = []

    async def event(self):
        """Read the next (opcode, payload); None at the end of the connection."""
        while not self.events:
            data = await self.reader.read(65536)
            if not data:
                return None
            self.events += self.protocol.receive(data)
            assert self.protocol.error is None
        return self.events.pop(0)


class Agent(Peer):
    """A fake agent of version 1: `async with Agent(server) as agent`.

    The block begins once it is registered, which cannot be seen for a mere port.
    """

    def __init__(self, server, path="/client/register", id=None, headers=(), hello=""):
        self.server, self.port = server, getattr(server, "port", server)
        self.path, self.remembered = path, id
        self.headers, self.hello = headers, hello

    async def __aenter__(self):
        await self.connect()
        first = await self.receive()
        assert first["message"] == "Connection id" and first["data"] == ""
        self.id = self.remembered or first["id"]
        await self.send(self.id, "Connection id", self.hello)
        if isinstance(self.server, Server):
            await until(lambda: self.id in self.server.agents)
        return self

    async def connect(self):
        streams = await asyncio.open_connection("127.0.0.1", self.port)
        super().__init__(SERVER, *streams)
        self.writer.write(handshake(self.path, *self.headers))
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        self.status = int(head.split()[1])
        if self.status != 101:
            raise ConnectionError(head)

    async def __aexit__(self, *exc_info):
        self.writer.transport.abort()

    async def receive(self):
        """Read the next message, a dict, and answer the pings before it."""
        while True:
            event = await self.event()
            if event[0] is PING:
                self.writer.write(self.protocol.pong(event[1]))
            elif event[0] is TEXT:
                return json.loads(event[1])
            else:
                raise ConnectionError(f"the server ended the websocket: {event}")

    async def send(self, id, message, data="", **more):
        text = json.dumps({"id": id, "message": message, "data": data, **more})
        self.writer.write(self.protocol.send(text))

    async def request(self):
        """Read the next ChatGptRequest: its id and its data."""
        while True:
            message = await self.receive()
            if message["message"] == "ChatGptRequest":
                return message["id"], json.loads(message["data"])

    async def reply(self, id, content, conversation_id="conv-1", response_id="resp-1"):
        data = {"response_id": response_id, "conversation_id": conversation_id}
        data = json.dumps({**data, "content": content})
        await self.send(id, "ChatGptResponse", data)

    async def echo(self):
        """Answer every request with "echo:" and its content."""
        while True:
            id, data = await self.request()
            await self.reply(id, "echo:" + data["content"])


class Program:
    """The server as a subprocess: `with Program("0", KEY) as program`.

    The port is read off the start screen; lines collects stderr.

    program  command to run with the arguments, in place of the server
    """

    def __init__(self, *arguments, cwd=None, env=None, program=(), **options):
        self.process = subprocess.Popen(
            [*(program or (sys.executable, str(MODULE))), *arguments],
            cwd=cwd,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            **{"stdin": subprocess.DEVNULL, **options},
        )
        self.lines = []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        for line in self.process.stderr:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self.lines.append(None)  # the end
            self._changed.notify_all()

    def wait_for(self, pattern, timeout=10):
        """Wait for a line of stderr that matches pattern, and return the match."""
        end = time.monotonic() + timeout
        with self._changed:
            while True:
                for line in self.lines:
                    match = line is not None and re.search(pattern, line)
                    if match:
                        return match
                left = end - time.monotonic()
                assert left > 0 and None not in self.lines, self.lines
                self._changed.wait(left)

    @property
    def port(self):
        return int(self.wait_for(r"listens on https?://\S+:(\d+)")[1])

    @property
    def stderr(self):
        return "\n".join(line for line in self.lines if line is not None)

    def signal(self, number):
        self.process.send_signal(number)

    def end(self, timeout=15):
        """Wait for its end and the end of stderr; return the exit status."""
        status = self.process.wait(timeout)
        self._thread.join(timeout)
        return status

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        if self.process.poll() is None:
            self.process.kill()
        self.end()
        self.process.stderr.close()


def fetch(port, method, path, body=None, key=KEY, headers=()):
    """Send a request from synchronous code and read its answer."""
    return run(ask(port, method, path, body, key, headers))


def run_python(*arguments, cwd, env=None):
    """Run Python to its end with the module importable: a CompletedProcess."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(MODULE.parent), **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# -----------------------------------------------------------------------------
# Limits and timeouts. Errors
# -----------------------------------------------------------------------------


def test_limits_are_set_by_name_for_one_object_only():
    limits = Limits(head_timeout=0.1, head_size=100, connections=0)
    assert (limits.head_timeout, limits.head_size) == (0.1, 100)
    assert limits.keep_alive_requests == 1000
    assert (Limits().head_timeout, Limits().head_size) == (10.0, 32 * 1024)


@cases("name", "head_timeuot", "__init__", "_x", "")
def test_an_unknown_limit_is_refused(name):
    with pytest.raises(TypeError, match="no limit named"):
        Limits(**{name: 1})


@cases("value", -1, -0.001, math.nan, math.inf, 1e12, True, "5", None, [], b"5")
def test_a_limit_must_be_a_sensible_number(value):
    with pytest.raises(ValueError, match="head_size must be a number"):
        Limits(head_size=value)


@cases(
    "type, statuses",
    ("invalid_request_error", (400, 413)),
    ("authentication_error", (401,)),
    ("permission_error", (403,)),
    ("not_found_error", (404,)),
    ("rate_limit_error", (429,)),
    ("server_error", (500, 504)),
)
def test_an_api_error_takes_its_type_from_its_status_unless_given_one(type, statuses):
    for status in statuses:
        assert APIError(status, "no").type == type
        assert APIError(status, "no", type="mine").type == "mine"
        assert str(APIError(status, "no")) == "no"


# -----------------------------------------------------------------------------
# HTTP/1.1 messages (RFC 9110, 9112). No I/O
# -----------------------------------------------------------------------------
#
# The names of refusals have the rule's number in RELIABILITY.md, section 1.1.  Heads
# are parsed whole and byte by byte; limits are tried one below, at and one above.


def http_head(*fields, line=b"GET / HTTP/1.1", host=(b"Host: a",)):
    """A request's head."""
    return b"\r\n".join([line, *host, *fields, b"", b""])


def http_answer(*fields, line=b"HTTP/1.1 200 OK"):
    """An answer's head."""
    return b"\r\n".join([line, *fields, b"", b""])


def http_feed(parse, data, pieces=()):
    """Parse data in pieces of these sizes: the result (or None), and what is left."""
    buffer = bytearray()
    at = 0
    result = None
    for size in (*pieces, len(data)):
        buffer += data[at : at + size]
        at += size
        result = result or parse(buffer)
        if at >= len(data):
            break
    return result, bytes(buffer)


def http_bytewise(data):
    return [1] * len(data)


def http_request(data):
    """Parse the request at the front of data, whole and byte by byte."""
    parse = apiserver.parse_request_head
    request, rest = http_feed(parse, data)
    again, rest_again = http_feed(parse, data, http_bytewise(data))
    assert (request is None) == (again is None)
    assert rest == rest_again
    if request is not None:
        assert request == again
        assert apiserver.keeps_alive(request) == apiserver.keeps_alive(again)
    return request


def http_status(parse, data):
    """The status with which parse refuses data, whole and byte by byte, or None."""
    statuses = []
    for pieces in ((), http_bytewise(data)):
        try:
            parse(data, pieces)
            statuses.append(None)
        except ProtocolError as error:
            statuses.append(error.status)
    assert statuses[0] == statuses[1]
    return statuses[0]


def http_refusal(data, *args):
    parse = apiserver.parse_request_head
    return http_status(functools.partial(http_feed, lambda b: parse(b, *args)), data)


def http_answer_refusal(data):
    parse = apiserver.parse_response_head
    return http_status(functools.partial(http_feed, parse), data)


def http_decode(data, pieces=()):
    """Decode chunked content: the content, whether it is complete, what is left."""
    decoder = apiserver.ChunkedDecoder()
    content = bytearray()

    def parse(buffer):
        content.extend(decoder.decode(buffer))

    rest = http_feed(parse, data, pieces)[1]
    return bytes(content), decoder.complete, rest


def http_chunk_refusal(data):
    return http_status(http_decode, data)


# --- A request's head


def test_request_head_is_taken_off_the_front_of_the_buffer():
    fields = b"POST /v1/x?a=b?c HTTP/1.1\r\nHOST: a\r\nX-A:\t one \r\nx-a:two\r\nE:\r\n"
    buffer = bytearray(fields + b"Content-Length: 3\r\n\r\nabcGET /")
    request = apiserver.parse_request_head(buffer)
    assert (request.method, request.version) == ("POST", "HTTP/1.1")
    assert request.target == "/v1/x?a=b?c"
    assert (request.path, request.query) == ("/v1/x", "a=b?c")
    assert request.headers == {"host": "a", "x-a": "one, two", "e": ""}
    assert request.content_length == 3
    assert buffer == b"abcGET /"


def test_heads_that_differ_only_in_their_length_are_parsed_once():
    requests = []
    for length in (b"0", b"12", b"000000000000007", b"12"):
        for name in (b"Content-Length: ", b"content-length: "):
            head = http_head(b"X-Z: " + name[:1], name + length, b"Y: z")
            request = http_request(head + b"content")
            assert request.content_length == int(length)
            requests.append(request)
    assert requests[0].headers is requests[4].headers
    assert requests[0].headers == {"host": "a", "x-z": "C", "y": "z"}


def test_empty_lines_before_a_request_are_dropped():
    for count in range(4):
        assert http_request(b"\r\n" * count + http_head()).path == "/"
    assert http_request(b"\r\n" * 3) is None


def test_rule_1_lines_end_in_cr_lf():
    head = http_head(b"X: y")
    for match in re.finditer(b"\r\n", head):
        before, after = head[: match.start()], head[match.end() :]
        for content in (b"", b"content"):
            assert http_refusal(before + b"\n" + after + content) == 400
        assert http_refusal(before + b"\r" + after + http_head()) == 400
    assert http_refusal(head.replace(b"\r\n", b"\n")) == 400
    assert http_refusal(head.replace(b"\r\n", b"\r") + http_head()) == 400
    assert http_refusal(b"\n\n") == 400


@cases("code", *range(9), *range(10, 32), 127)
def test_rule_1_control_characters_in_a_head_are_refused(code):
    byte = bytes([code])
    assert http_refusal(http_head(b"X: a" + byte + b"b") + http_head()) == 400
    assert http_refusal(http_head(b"X" + byte + b": b") + http_head()) == 400
    assert http_refusal(http_head(line=b"GET /" + byte + b" HTTP/1.1")) == 400
    assert http_answer_refusal(http_answer(b"X: a" + byte + b"b") * 2) == 502
    assert http_answer_refusal(http_answer(line=b"HTTP/1.1 200 " + byte) * 2) == 502


@cases(
    "expected, heads",
    (0, "X: CL: 5"),
    (5, "CL: 5|CL:  \t5 |CL: 000000000000005"),
    (999999999999999, "CL: 999999999999999"),
    (None, "TE: chunked|TE:\tChunked "),
    (400, "CL:|CL: 0000000000000005|CL: +5|CL: -5|CL: 5_0|CL: 0x5|CL: 5e1|CL: 5 5"),
    (400, "CL: 5,5|CL: 5;|CL: \xb2|CL: \xd9\xa5|CL: \xa05|CL: 5\r\nCL: 5"),
    (400, "CL: 5\r\nCL: 6"),
    (400, "CL: 5\r\nTE: chunked|TE: gzip\r\nCL: 5|TE: chunked\r\nTE: chunked"),
    (400, "TE: chunked\r\nTE: identity|TE: \x0bchunked|CL: " + "9" * 5000),
    (501, "TE: chunked, chunked|TE: gzip, chunked|TE: chunked, identity|TE: xchunked"),
    (501, "TE: chunked;q=1|TE: \xa0chunked|TE:"),
)
@cases("length", "Content-Length", "content-length")
def test_rules_2_and_3_the_length_of_content(expected, heads, length):
    """A cached head that differs only in its length makes no difference."""
    heads = heads.replace("CL", length).replace("TE", "Transfer-Encoding")
    for head in heads.split("|"):
        data = http_head(head.encode("latin-1"))
        for _ in range(2):
            for known in (b"Content-Length: 5", b"Transfer-Encoding: chunked", b"X: y"):
                assert http_refusal(http_head(known)) is None
            if expected in (400, 501):
                assert http_refusal(data) == expected
            else:
                assert http_request(data).content_length == expected
        if expected is None:
            assert http_refusal(data.replace(b"HTTP/1.1", b"HTTP/1.0")) == 400


@cases(
    "line",
    *'X : y|X\t: y| X: y|\tX: y|: y|X|X y: z|"X": y|X(): y|X/: y|X@: y'.split("|"),
    *"X[]: y|X{}: y|Ö: y|ſ: y".split("|"),
)
def test_rule_5_a_header_name_is_a_token_before_its_colon(line):
    line = line.encode()
    assert http_refusal(http_head(line)) == 400
    assert http_refusal(http_head(b"A: b", line, b"C: d")) == 400
    assert http_answer_refusal(http_answer(line)) == 502


def test_characters_allowed_in_names_and_values():
    name, value = b"!#$%&'*+-.^_`|~09AZaz", b"\t a\tb \x80\xff\xa0 \t"
    request = http_request(http_head(name + b":" + value))
    assert request.headers[name.lower().decode()] == "a\tb \x80\xff\xa0"


@cases(
    "head",
    http_head(b"X: y", b" folded"),
    http_head(b"X: y", b"\tfolded"),
    b"GET / HTTP/1.1\r\n Host: a\r\n\r\n",
    *(start + http_head() for start in (b" ", b"\t", b"\r", b"\x00", b" \r\n")),
)
def test_rule_5_folded_lines_and_bytes_before_the_first_line_are_refused(head):
    assert http_refusal(head) == 400


def test_rule_5_host_exactly_once_in_1_1():
    assert http_refusal(http_head(host=())) == 400
    assert http_refusal(http_head(b"Host: a")) == 400
    assert http_refusal(http_head(b"HOST: b")) == 400
    old = http_request(http_head(line=b"GET / HTTP/1.0", host=()))
    assert (old.version, old.path) == ("HTTP/1.0", "/")
    assert http_refusal(http_head(b"Host: a", line=b"GET / HTTP/1.0")) == 400


@cases(
    "name",
    *("Authorization", "Content-Length", "Content-Type", "Host", "Sec-WebSocket-Key"),
    *("Sec-WebSocket-Version", "Transfer-Encoding", "Upgrade"),
)
def test_rule_5_fields_that_must_not_be_repeated(name):
    field = f"{name}: 1".encode()
    assert http_refusal(http_head(field, b"X: y", field.lower(), host=())) == 400
    assert http_answer_refusal(http_answer(field, field)) == 502


@cases(
    "status, hosts",
    (None, "a|a.b-c_d:8080|a:|127.0.0.1:80|[::1]:80|[::ffff:127.0.0.1]|a%41%C3%a4"),
    (400, "a%4|a%zz|%:80||a b|a, b|a/b|a?b|a@b|a#b|a\\b|a:80:80|a:8x|a:+80|a:123456"),
    (400, "[::1|[]|[::1]a|::1|\xe4|a:\xb2|<script>"),
)
def test_rule_5_syntax_of_the_host_field(status, hosts):
    for host in hosts.split("|"):
        head = http_head(host=[b"Host: " + host.encode("latin-1")])
        assert http_refusal(head) == status, host


@cases(
    "status, lines",
    (None, b"GET / HTTP/1.1|GET / HTTP/1.0|get-it! / HTTP/1.1"),
    (505, b"GET / HTTP/1.2|GET / HTTP/0.9|GET / HTTP/2.0|PRI * HTTP/2.0"),
    (400, b"GET / http/1.1|GET / HTTP/1.1 |GET / HTTP/1.10|GET / HTTP/11|GET / HTTP/1"),
    (400, b"GET / HTTP/1.\xb2|GET / XHTTP/1.1|GET /|GET|GET  / HTTP/1.1"),
    (400, b"GET /  HTTP/1.1|GET\t/\tHTTP/1.1|GET / x HTTP/1.1| GET / HTTP/1.1"),
    (400, b" / HTTP/1.1|G(T / HTTP/1.1|G:T / HTTP/1.1|G\xc4T / HTTP/1.1"),
    (400, b"GET /\xc3\xa4 HTTP/1.1|GET /\x7f HTTP/1.1|\x16\x03\x01\x02\x00"),
)
def test_rule_6_the_request_line(status, lines):
    for line in lines.split(b"|"):
        assert http_refusal(http_head(line=line)) == status, line


@cases(
    "start, path, query",
    ("GET /", "/", ""),
    ("GET /a%2Fb/../c?x=%20&y", "/a%2Fb/../c", "x=%20&y"),
    ("GET /a?", "/a", ""),
    ("GET /?http://b/", "/", "http://b/"),
    ("GET //[", "//[", ""),
    ("GET //b/c", "//b/c", ""),
    ("GET /a:b@c[]", "/a:b@c[]", ""),
    ("OPTIONS *", "*", ""),
    ("GET http://a:80/b?c", "/b", "c"),
    ("GET HTTPS://A:80", "/", ""),
    ("GET http://a:80?c/d", "/", "c/d"),
)
def test_rule_6_targets_are_split_into_path_and_query(start, path, query):
    head = http_head(line=f"{start} HTTP/1.1".encode(), host=[b"Host: a:80"])
    request = http_request(head)
    assert (request.path, request.query) == (path, query)
    assert request.target == start.partition(" ")[2]


@cases(
    "start",
    *("GET *", "OPTIONS **", "GET a", "GET ?a", "GET http:/a:80/", "GET http://"),
    *("GET http://a/", "GET http://x@a:80/", "GET http://a:80@b/", "GET http://a:80#/"),
    *("GET http://[", "GET ftp://a:80/", "GET http://b/", "CONNECT a:80"),
)
def test_rule_6_malformed_targets_and_other_hosts_are_refused(start):
    head = http_head(line=f"{start} HTTP/1.1".encode(), host=[b"Host: a:80"])
    assert http_refusal(head) == 400


@cases(
    "version, kept, values",
    ("1.1", True, "absent||keep-alive|closed"),
    ("1.1", False, "close|Upgrade,  CLOSE|keep-alive, close"),
    ("1.1", False, "keep-alive\r\nConnection: close"),
    ("1.0", True, "Keep-Alive|x, keep-alive"),
    ("1.0", False, "absent||keep-alive, close"),
)
def test_version_and_connection_field_decide_whether_to_keep_alive(
    version, kept, values
):
    for value in values.split("|"):
        fields = [f"Connection: {value}".encode()] * (value != "absent")
        head = http_head(*fields, line=f"GET / HTTP/{version}".encode())
        assert apiserver.keeps_alive(http_request(head)) is kept
        head = http_answer(*fields, line=f"HTTP/{version} 200".encode())
        answer = apiserver.parse_response_head(bytearray(head))
        assert apiserver.keeps_alive(answer) is (kept and version == "1.1")


# --- Limits on heads, as they arrive (rule 7)


@cases("more, good", (-1, True), (0, True), (1, False))
def test_a_request_line_a_header_line_and_their_number_have_limits(more, good):
    line = b"GET /" + b"a" * (8192 - 14 + more) + b" HTTP/1.1"
    assert len(line) == 8192 + more
    assert http_refusal(http_head(line=line)) == (None if good else 414)
    # Even before its end: the last byte may be its CR.
    assert http_refusal(b"A /" + b"a" * (8190 + more)) == (None if good else 414)
    field = b"X: " + b"a" * (8192 - 3 + more)
    assert http_refusal(http_head(field, b"Y: z")) == (None if good else 431)
    assert http_refusal(http_head(*[b"X: y"] * (99 + more))) == (None if good else 431)


@cases(
    "status, reason, starts",
    (400, "https was sent to an http", b"\x16\x03\x01\x02\x00\x01\x00\x01\n\n"),
    (400, "malformed", b"\x80\x2e\x01|\x00|{| GET|\r\nGET\t/|GET\r"),
    (400, "malformed", b"GET  / HTTP/1.1\r\n|GET /\r\n"),  # HTTP/0.9
    (400, "malformed", b"SSH-2.0-OpenSSH_9.6\r\n"),
    (400, "malformed", b"PROXY TCP4 10.0.0.1 10.0.0.2 5 80\r\n"),
    (400, "malformed", b"\r\n\r\n\x00\r\nQUIT\n"),  # PROXY, version 2
    (400, "CR LF", b"GET /\n|GET / HTTP/1.1\nHost: a"),
    (505, "only HTTP/1.1", b"PRI * HTTP/2.0\r\n"),
    (501, "the method is too long", b"A" * 65 + b" / HTTP/1.1\r\n"),
    (None, "", b"GET /\x01\x01\x01|\r|GET / HTTP/1.1\r\nHost"),  # the line is not whole
)
def test_bytes_that_cannot_become_a_request_are_refused_at_once(status, reason, starts):
    for start in starts.split(b"|"):
        assert http_refusal(start) == status, start
        with refused(status, match=reason):
            apiserver.parse_request_head(bytearray(start))


@cases("more, status", (-1, None), (0, None), (1, 431))
def test_a_whole_head_has_a_largest_size(more, status):
    rows = [b"X: " + b"a" * 7000] * 4
    pad = b"a" * (32 * 1024 - len(http_head(*rows, b"Y: ")) + more)
    head = http_head(*rows, b"Y: " + pad)
    with refused(status, match="head is over"):
        assert apiserver.parse_request_head(bytearray(head)).path == "/"
    head = http_head(b"X: " + b"a" * (100 + more - len(http_head(b"X: "))))
    assert http_refusal(head + b"more", 100) == status


@cases("more, status", (-1, None), (0, None), (1, 502))
def test_an_upstreams_head_has_a_largest_size(more, status):
    """64 KiB and 200 fields; a status line or a field may take up all of it."""
    size = 64 * 1024
    field = http_answer(b"X: ")
    field = field[:-4] + b"a" * (size + more - len(field)) + field[-4:]
    line = b"HTTP/1.1 200 " + b"a" * (size + more - 17) + b"\r\n\r\n"
    for head in (field, line):
        assert len(head) == size + more
        with refused(status):
            apiserver.parse_response_head(bytearray(head))
    assert http_answer_refusal(http_answer(*[b"X: y"] * (200 + more))) == status


def http_bytewise_head(data):
    http_feed(apiserver.parse_request_head, data, http_bytewise(data))


def http_fields(data):
    apiserver.parse_fields(data.decode("latin-1").split("\r\n"), 10**6, 10**6)


def http_bytewise_chunks(data):
    http_decode(data, http_bytewise(data))


@cases(
    "read, data",
    (http_bytewise_head, b"GET / HTTP/1.1\r\n" + b"X: %b\r\n" % (b"a" * 300) * 100),
    *(
        (http_bytewise_head, b"GET / HTTP/1.1\r\n" + row * (32000 // len(row)))
        for row in b"a:\r\n|\r\ra|\r\n\ra|:|a".split(b"|")
    ),
    (http_fields, b"a" * 32000 + b"\r\n"),
    (http_fields, b"a:" * 16000 + b"\n"),
    (http_fields, (b"a: b" + b" " * 300 + b"\r\n") * 90 + b"\x00"),
    (http_fields, b"x" + b":\t \t" * 8000),
    (http_fields, b"a:\r\n" * 8000 + b"b"),
    (http_fields, b"a: b\r\n" * 5000),
    (http_fields, b"a:" + b" \t" * 16000 + b"\x00\r\n"),
    (http_bytewise_chunks, b"1\r\na\r\n" * 15_000),
    (http_bytewise_chunks, b"0\r\n" + b"a: b\r\n" * 1300),
    (http_bytewise_chunks, b"1;" + b"x" * 250),
    ids=lambda value: repr(value)[:40],
)
def test_rule_7_parsing_takes_linear_time(read, data):
    """29 KiB in segments of one byte once took 3 s of CPU."""
    most = 0.5 if read is http_fields else 1.5
    with takes(0, most, time.process_time), contextlib.suppress(ProtocolError):
        read(data)


def test_long_lines_are_not_cached():
    known = apiserver._cached_field.cache_info
    for size, more in ((256, 1), (257, 0)):
        line, before = "x-long: ".ljust(size, "b"), known().currsize
        for _ in range(2):
            assert apiserver.parse_fields([line], 1, 1000) == {"x-long": line[8:]}
        assert known().currsize == min(before + more, known().maxsize)


# --- Answers


def test_an_answers_head_may_be_cut_anywhere():
    data = http_answer(b"A: b", b"a: c", line=b"HTTP/1.0 404 N\xf6t\tfound ") + b"xyz"
    for cut in range(len(data)):
        answer, rest = http_feed(apiserver.parse_response_head, data, [cut])
        assert (answer.version, answer.status) == ("HTTP/1.0", 404)
        assert answer.headers == {"a": "b, c"}
        assert rest == b"xyz"


@cases(
    "status, lines",
    (None, b"HTTP/1.1 200 OK|HTTP/1.1 200 |HTTP/1.1 200|HTTP/1.1 599 x"),
    (502, b"HTTP/1.1 099 x|HTTP/1.1 600 x|HTTP/1.1 20 x|HTTP/1.1 2000 x|HTTP/1.1 200x"),
    (502, b"HTTP/1.1 +20 x|HTTP/1.1 2_0 x|HTTP/1.1 \xb2\xb20 x|HTTP/1.1  200 x"),
    (502, b"HTTP/2 200 x|HTTP/1.2 200 x|http/1.1 200 OK|ICY 200 OK|GET / HTTP/1.1|"),
    (502, b" HTTP/1.1 200 OK|HTTP/1.1 200 OK\nA: b|HTTP/1.1 200 OK\r\nA: b\n"),
)
def test_status_line(status, lines):
    for line in lines.split(b"|"):
        assert http_answer_refusal(http_answer(line=line)) == status, line


@cases(
    "answer_to, fields, expected",
    ("GET 200", [], apiserver.UNTIL_CLOSE),
    ("GET 200", ["Content-Length: 7"], 7),
    ("GET 200", ["Transfer-Encoding: CHUNKED"], None),
    ("POST 500", ["Content-Length: 0"], 0),
    ("HEAD 200", ["Content-Length: 7"], 0),
    ("HEAD 200", ["Transfer-Encoding: chunked"], 0),
    ("HEAD 200", [], 0),
    ("GET 204", ["Content-Length: 7"], 0),
    ("GET 304", ["Content-Length: 7"], 0),
    ("GET 100", [], 0),
    ("GET 101", [], 0),
    ("GET 103", ["Transfer-Encoding: chunked"], 0),
    ("GET 200", ["Content-Length: -1"], 400),
    ("GET 200", ["Content-Length: 5", "Transfer-Encoding: chunked"], 400),
    ("GET 200", ["Transfer-Encoding: gzip, chunked"], 501),
    ("GET 200", ["Transfer-Encoding: chunked", "1.0"], 400),
)
def test_length_of_an_answer(answer_to, fields, expected):
    method, status = answer_to.split()
    line = b"HTTP/1.%d %b x" % ("1.0" not in fields, status.encode())
    fields = [field.encode() for field in fields if field != "1.0"]
    head = apiserver.parse_response_head(bytearray(http_answer(*fields, line=line)))
    with refused(expected if expected in (400, 501) else None):
        assert apiserver.response_length(method, head) == expected


# --- Content


HTTP_CHUNKS = (
    b'5;a="b"\r\nhello\r\n000A \t;x\r\n\r\n0\r\n\r\n12\n\r\n1\r\n\xff\r\n'
    b"00\r\nX: y\r\nContent-Length: 3\r\n\r\nGET /"
)


def test_chunked_content_may_be_cut_anywhere_twice():
    expected = (b"hello\r\n0\r\n\r\n12\n\xff", True, b"GET /")
    assert http_decode(HTTP_CHUNKS) == expected
    assert http_decode(HTTP_CHUNKS, http_bytewise(HTTP_CHUNKS)) == expected
    for first in range(len(HTTP_CHUNKS)):
        for second in range(1, len(HTTP_CHUNKS) - first, 3):
            assert http_decode(HTTP_CHUNKS, [first, second]) == expected


def test_a_complete_decoder_leaves_the_next_message_in_the_buffer():
    for length, data in ((None, b"0\r\n\r\n"), (0, b""), (2, b"ab")):
        decoder = apiserver.content_decoder(length)
        decoder.decode(bytearray(data))
        buffer = bytearray(b"\r\nGET / HTTP/1.1\r\n\r\n")
        assert decoder.complete and decoder.decode(buffer) == b""
        assert buffer == b"\r\nGET / HTTP/1.1\r\n\r\n"
        decoder.end()


@cases(
    "data",
    *(
        b"g\r\n|\r\n| 1\r\na\r\n|1 \r\na\r\n|+1\r\na\r\n|-1\r\na\r\n|0x1\r\na\r\n|"
        b"1_0\r\n|1.0\r\n|1,1\r\n|\xd9\xa1\r\na\r\n|1\x00\r\na\r\n|;a\r\n|1;\n\r\na\r|"
        b"1;a\rb\r\na\r\n|1;a\nb\r\na\r\n|1;a\x00\r\na\r\n|1;a\x7f\r\na\r\n|"
        b"1\n\r\na\r\n|1\r\r\na\r\n|1\r\nab|1\r\na\n|1\r\na\rb|1\r\na\r\r\n|1\r\na0\r|"
        b"2\r\nab2\r\nab|0\r\nX : y\r\n\r\n|0\r\nX\r\n\r\n|0\r\n X: y\r\n\r\n|"
        b"0\r\nX: y\r\n folded\r\n\r\n|0\r\nX: a\rb\r\n\r\n|0\r\nX: a\x00b\r\n\r\n|"
        b"0\r\nX: y\n\r\n\r\n|0\r\nX: y\n\n|0\r\n\n|0\r\nHost: a\r\nHost: b\r\n\r\n"
    ).split(b"|"),
)
def test_rule_4_malformed_chunks_are_refused(data):
    assert http_chunk_refusal(data) == 400


def test_a_chunks_size_line_has_a_largest_length():
    for size, status in ((255, None), (256, None), (257, 400)):
        line = b"1;" + b"x" * (size - 2) + b"\r\na\r\n0\r\n\r\n"
        assert http_chunk_refusal(line) == status
        assert http_chunk_refusal(b"1;" + b"x" * (size - 2) + b"\r") == status
    assert http_chunk_refusal(b"1;" + b"x" * 256) == 400  # before its end
    assert http_chunk_refusal(b"f" * 15 + b"\r\n") is None
    assert http_chunk_refusal(b"f" * 16 + b"\r\n") == 400
    assert http_chunk_refusal(b"0" * 15 + b"1\r\n") == 400


def test_all_chunk_extensions_together_have_a_largest_size():
    lines = (b"1;" + b"x" * 126 + b"\r\na\r\n") * 127
    for last, status in ((127, None), (128, None), (129, 400)):
        data = lines + b"1;" + b"x" * (last - 2) + b"\r\na\r\n"
        assert http_chunk_refusal(data) == status


def test_trailers_have_a_largest_number_and_size():
    for count, status in ((31, None), (32, None), (33, 431)):
        data = b"0\r\n" + b"X: y\r\n" * count + b"\r\n"
        assert http_chunk_refusal(data) == status
    for size, status in ((8191, None), (8192, None), (8193, 431)):
        trailers = b"X: " + b"a" * (size - 7) + b"\r\n\r\n"
        assert len(trailers) == size
        assert http_chunk_refusal(b"0\r\n" + trailers) == status
    assert http_chunk_refusal(b"0\r\n" + b"a" * 8191) is None
    assert http_chunk_refusal(b"0\r\n" + b"a" * 8192) == 431


@cases("length", *range(4))
def test_content_of_a_known_length(length):
    for cut in range(5):
        decoder = apiserver.content_decoder(length)
        buffer = bytearray(b"abcd"[:cut])
        content = decoder.decode(buffer)
        assert decoder.complete is (cut >= length)
        buffer += b"abcd"[cut:]
        content += decoder.decode(buffer)
        assert (content, buffer) == (b"abcd"[:length], b"abcd"[length:])
        assert decoder.complete


def test_content_may_end_with_its_connection():
    decoder = apiserver.content_decoder(apiserver.UNTIL_CLOSE)
    buffer = bytearray(b"ab")
    assert decoder.decode(buffer) == b"ab" and not buffer
    assert not decoder.complete
    decoder.end()
    assert decoder.complete


@cases("length, data", (3, b"ab"), (None, b"1\r\na\r\n0\r\n"))
def test_a_connection_that_ends_before_its_content_is_an_error(length, data):
    decoder = apiserver.content_decoder(length)
    decoder.decode(bytearray(data))
    with refused(400):
        decoder.end()


# --- Content codings


def http_inflate(coding, data, pieces=()):
    """Decode coded content that is sent in chunks; return it and the largest piece."""
    decoder = apiserver.content_decoder(None, coding)
    content = [b""]

    def parse(buffer):
        while piece := decoder.decode(buffer):
            content.append(piece)

    sent = apiserver.encode_chunk(data) if data else b""
    http_feed(parse, sent + apiserver.LAST_CHUNK, pieces)
    assert decoder.complete
    return b"".join(content), max(map(len, content))


def raw_deflate(data):
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    return compressor.compress(data) + compressor.flush()


CODINGS = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "deflate, bare": raw_deflate,
    "gzip, in members": lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:]),
}


@cases("name", *CODINGS)
def test_coded_content_is_inflated_however_it_is_cut(name):
    coding = name.split(",")[0]
    for data in (b"", b"x", b'{"a": 1}' * 9, random.Random(1).randbytes(70_000)):
        coded = CODINGS[name](data)
        assert http_inflate(coding, coded)[0] == data
        if len(data) < 100:
            assert http_inflate(coding, coded, http_bytewise(coded * 2))[0] == data
    assert http_inflate(coding, b"")[0] == b""  # no content has no coding


def test_inflated_content_comes_in_small_pieces():
    data = bytes(range(256)) * 10_000
    content, largest = http_inflate("gzip", gzip.compress(data))
    assert content == data and largest == apiserver.PIECE_SIZE


@cases("name", *CODINGS)
def test_damaged_or_cut_coded_content_is_refused(name):
    coding = name.split(",")[0]
    data = b'{"a": 12345}'
    whole, member = CODINGS[name](data), len(gzip.compress(data[:9]))
    bad = [whole[:size] for size in range(1, len(whole)) if size != member]
    bad += [whole + b"x", whole + b"more", b"\xff" * 30, b'{"a": 1}']
    for data in bad:
        with refused(400):
            http_inflate(coding, data)


@cases("coding", "gzip", "deflate")
def test_a_bomb_is_refused_before_it_inflates(coding):
    for size, status in ((8 * 1024 * 1024, None), (64 * 1024 * 1024, 413)):
        data = CODINGS[coding](bytes(size))
        with traced() as memory:
            with refused(status, match="inflates"):
                http_inflate(coding, data)
            assert memory()[1] < 32 * 1024 * 1024


@cases(
    "expected, fields",
    ("", "|identity|None"),
    ("gzip", "GZip|x-gzip"),
    ("deflate", "identity, deflate"),
    (415, "br|zstd|gzip, gzip|gzip;q=1"),
)
def test_content_coding(expected, fields):
    assert apiserver.content_coding(apiserver.Headers()) == ""
    for field in fields.split("|"):
        headers = apiserver.Headers({"content-encoding": field})
        with refused(415 if expected == 415 else None, match=re.escape(field)):
            assert apiserver.content_coding(headers) == expected


# --- What we send


def test_encoded_head_is_what_the_parser_reads():
    fields = [("Host", "a"), ("X-A", "\t\xe4 b"), ("Empty", "")]
    head = apiserver.encode_head("GET /x HTTP/1.1", fields)
    assert head == b"GET /x HTTP/1.1\r\nHost: a\r\nX-A: \t\xe4 b\r\nEmpty: \r\n\r\n"
    request = apiserver.parse_request_head(bytearray(head))
    assert request.headers == {"host": "a", "x-a": "\xe4 b", "empty": ""}
    assert apiserver.encode_head("HTTP/1.1 200 OK", []) == b"HTTP/1.1 200 OK\r\n\r\n"


@cases("code", *range(9), *range(10, 32), 127, 0x100, 0x2028, 0xD800)
def test_rule_9_heads_we_send_never_contain_control_characters(code):
    bad = "a" + chr(code) + "b"
    for line, fields in (
        (f"GET /{bad} HTTP/1.1", []),
        (f"HTTP/1.1 200 {bad}", []),
        ("HTTP/1.1 200 OK", [("A", "b"), (bad, "x")]),
        ("HTTP/1.1 200 OK", [("X", bad), ("A", "b")]),
        ("HTTP/1.1 200 OK", [("X", chr(code))]),
    ):
        with refused(500):
            apiserver.encode_head(line, fields)


def test_encoded_chunks():
    assert apiserver.encode_chunk(b"a" * 27) == b"1b\r\n" + b"a" * 27 + b"\r\n"


def test_dates_are_english_and_in_gmt():
    assert apiserver.http_date(784111777) == "Sun, 06 Nov 1994 08:49:37 GMT"
    assert apiserver.http_date(0) == "Thu, 01 Jan 1970 00:00:00 GMT"
    assert apiserver.http_date(1709164800) == "Thu, 29 Feb 2024 00:00:00 GMT"


# --- Anything at all

HTTP_SEEDS = [
    http_head(b"X: y", b"Content-Length: 3", line=b"POST /a?b HTTP/1.1") + b"abc",
    http_head(b"Connection: close", line=b"GET http://a/ HTTP/1.0"),
    b"\r\n" + http_head(b"Transfer-Encoding: chunked") + b"3\r\nabc\r\n0\r\n\r\n",
    http_answer(b"Content-Length: 5", b"A: b") + b"hello",
    http_answer(b"Transfer-Encoding: chunked", line=b"HTTP/1.1 503"),
    HTTP_CHUNKS,
    b"3\r\nabc\r\n0\r\nA: b\r\n\r\n",
]
HTTP_PIECES = (
    b"\r|\n|\r\n|\r\n\r\n|:| |\t|\x00|0|;|,|\xff|Host: a\r\n|Content-Length: 1\r\n|[|*|"
    b"HTTP/1.1|Transfer-Encoding: chunked\r\n|/|?|ffffffff"
).split(b"|")


def http_fuzzed(rng, seeds, pieces):
    """Random bytes, or pieces in any order, or a message with a few changes."""
    kind = rng.random()
    if kind < 0.1:
        return bytes(rng.getrandbits(8) for _ in range(rng.randrange(60)))
    if kind < 0.3:
        return b"".join(rng.choices(pieces, k=rng.randrange(12)))
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(data) + 1)
        change = rng.randrange(4)
        if change == 0:
            data[at:at] = rng.choice(pieces)
        elif change == 1:
            del data[at : at + rng.randint(1, 4)]
        elif change == 2 and at < len(data):
            data[at] = rng.getrandbits(8)
        else:
            data[at:] = rng.choice(seeds)[rng.randrange(20) :]
    return bytes(data)


def http_cuts(rng, data):
    return [rng.randint(1, 9) for _ in range(len(data))]


def http_parse(parse, data, pieces=()):
    """Parse a head from data in pieces: it, whether it is complete, what is left."""
    head, rest = http_feed(parse, data, pieces)
    return head and (*head, apiserver.keeps_alive(head)), head is not None, rest


@cases(
    "parse, seeds",
    (functools.partial(http_parse, apiserver.parse_request_head), HTTP_SEEDS),
    (functools.partial(http_parse, apiserver.parse_response_head), HTTP_SEEDS),
    (http_decode, HTTP_SEEDS[-2:]),
    ids=["request", "response", "chunks"],
)
@cases("small", False, True)
def test_how_bytes_are_cut_never_changes_the_result(parse, seeds, small, constant):
    if small:
        constant(REQUEST_LINE_SIZE=80, HEADER_LINE_SIZE=60, RESPONSE_HEAD_SIZE=120)
        constant(CHUNK_LINE_SIZE=20, CHUNK_EXTENSIONS_SIZE=40, TRAILER_SIZE=30)
    rng = random.Random(4)

    def outcome(data, pieces=()):
        try:
            return parse(data, pieces)
        except ProtocolError:
            return "error"

    seen = set()
    for _ in range(1200):
        data = http_fuzzed(rng, seeds, HTTP_PIECES)
        whole = outcome(data)
        seen.add(whole if whole == "error" else whole[1])
        for pieces in (http_bytewise(data), http_cuts(rng, data)):
            assert outcome(data, pieces) == whole, data
    assert seen == {"error", True, False}


# -----------------------------------------------------------------------------
# WebSocket (RFC 6455). No I/O
# -----------------------------------------------------------------------------
#
# frame() builds frames, invalid ones too, and shares no code with the module.


BOTH_SIDES = pytest.mark.parametrize("side", [SERVER, CLIENT], ids=["server", "client"])
MASKING_KEY = bytes.fromhex("37fa213d")


def frame(opcode, payload=b"", fin=True, key=MASKING_KEY, announce=None, width=None):
    """Encode a frame, masked with key unless that is None.

    announce  length to write in place of the true one
    width     bytes of extended length (0, 2, 8) in place of the shortest
    """
    size = len(payload) if announce is None else announce
    if width is None:
        width = 0 if size < 126 else 2 if size < 65536 else 8
    short = {0: size, 2: 126, 8: 127}[width]
    head = bytes([fin << 7 | opcode, (0x80 if key else 0) | short])
    head += size.to_bytes(width, "big") if width else b""
    if key is None:
        return head + payload
    return head + key + bytes(byte ^ key[i % 4] for i, byte in enumerate(payload))


part = functools.partial(frame, fin=False)  # which more fragments follow


def key_for(side):
    """The masking key of the frames that side receives."""
    return MASKING_KEY if side is SERVER else None


def receive_all(data, side=SERVER, cuts=(), **limits):
    """Feed data cut at these places; return the events and the error's close code."""
    protocol = WebSocketProtocol(side, **limits)
    events = []
    for start, end in zip((0, *cuts), (*cuts, len(data))):
        events += protocol.receive(data[start:end])
    return events, protocol.error and protocol.error.close_code


def close_code(data, side=SERVER, **limits):
    """The close code of the error in data, or None."""
    return receive_all(data, side, **limits)[1]


# --- The handshake's keys.


def test_handshake_key_is_16_fresh_bytes():
    keys = {handshake_key() for _ in range(100)}
    assert len(keys) == 100
    assert {len(apiserver.base64.b64decode(key, validate=True)) for key in keys} == {16}


# --- Masks.


# From 6,144 bytes on another algorithm is used.
@cases("size", 0, 1, 2, 3, 4, 5, 125, 6143, 6144, 6145, 6147, 9999)
def test_mask_is_xor_with_the_repeated_key_at_every_size(size):
    data = random.Random(size).getrandbits(8 * size + 1).to_bytes(size + 1, "big")[1:]
    for key in (b"\0\0\0\0", b"\xff\0\x80\x01", MASKING_KEY):
        masked = apiserver.apply_mask(bytearray(data), key)
        assert type(masked) is bytes
        assert masked == bytes(byte ^ key[i % 4] for i, byte in enumerate(data))
        assert apiserver.apply_mask(masked, key) == data


# --- Frame heads.


@cases("size", 0, 125, 126, 65535, 65536)
@BOTH_SIDES
def test_only_the_head_is_taken_off_the_front(side, size):
    key = key_for(side)
    whole = frame(BINARY, b"x" * size, key=key)
    buffer = bytearray(whole)
    head = apiserver.parse_frame_head(buffer, not side, 65536)
    assert head == apiserver.FrameHead(True, BINARY, size, key)
    assert bytes(buffer) == whole[len(whole) - size :]


def test_every_first_byte_is_accepted_or_refused_at_once():
    accepted = set()
    for first in range(256):
        try:
            assert apiserver.parse_frame_head(bytearray([first]), True, 100) is None
            accepted.add(first)
        except apiserver.WebSocketError as error:
            assert error.close_code == 1002
    assert accepted == {0x00, 0x01, 0x02, 0x80, 0x81, 0x82, 0x88, 0x89, 0x8A}


@cases(
    "code, frames",
    (1002, [frame(0x3), frame(PING, b"x" * 126), frame(PONG, announce=65536)]),
    (1002, [frame(CLOSE, announce=5, width=2), frame(TEXT, key=None)]),
    (1002, [frame(TEXT, announce=size, width=2) for size in (0, 125)]),
    (1002, [frame(TEXT, announce=size, width=8) for size in (125, 65535)]),
    (1002, [frame(TEXT, announce=1 << 63), frame(TEXT, announce=(1 << 64) - 1)]),
    (1009, [frame(TEXT, announce=(1 << 63) - 1)]),
    (1002, [frame(CONTINUATION), part(CONTINUATION)]),
    (1002, [part(TEXT) + frame(TEXT), part(BINARY) + part(TEXT)]),
    (1002, [frame(CLOSE, b"\x03")]),
    (1007, [frame(CLOSE, b"\x03\xe8" + bad) for bad in (b"\xff", b"\xc3")]),
    (1007, [frame(TEXT, b"\xff"), frame(TEXT, b"\xc3")]),
)
def test_illegal_frames_are_refused(code, frames):
    """Bits and opcodes of the first byte are tried above."""
    good = frame(TEXT, b"good")
    for illegal in frames:
        assert receive_all(good + illegal) == ([(TEXT, "good")], code)
        every_cut = range(1, len(good + illegal))
        assert receive_all(good + illegal, cuts=every_cut)[1] == code


@cases(
    "head, side, code",
    ("8105", SERVER, 1002),
    ("8185", CLIENT, 1002),  # not masked, masked
    ("89fe", SERVER, 1002),
    ("81fe0001", SERVER, 1002),  # a large ping; 1, in two bytes
    ("82ff0000000000010000", SERVER, 1009),  # 65,536, too large
)
def test_a_bad_head_is_refused_before_all_of_it_has_arrived(head, side, code):
    assert close_code(bytes.fromhex(head), side, max_size=65535) == code


# --- Receiving: the examples of RFC 6455 section 5.7.


@cases(
    "wire, side, expected",
    ("810548656c6c6f", CLIENT, (TEXT, "Hello")),
    ("818537fa213d7f9f4d5158", SERVER, (TEXT, "Hello")),
    ("010348656c80026c6f", CLIENT, (TEXT, "Hello")),
    ("890548656c6c6f", CLIENT, (PING, b"Hello")),
    ("8a8537fa213d7f9f4d5158", SERVER, (PONG, b"Hello")),
    ("827e0100" + "ab" * 256, CLIENT, (BINARY, b"\xab" * 256)),
    ("827f0000000000010000" + "ab" * 65536, CLIENT, (BINARY, b"\xab" * 65536)),
    ids=lambda value: str(value)[:24],
)
def test_the_rfcs_examples_may_be_cut_anywhere(wire, side, expected):
    data = bytes.fromhex(wire)
    cuts = range(len(data) + 1) if len(data) < 999 else (0, 1, 9, 10, 11, 40000, 65545)
    for cut in cuts:
        assert receive_all(data, side, [cut]) == ([expected], None)
    assert receive_all(data, side, range(1, len(data))) == ([expected], None)


# --- Fragments.


def fragments(opcode, *payloads, key=MASKING_KEY):
    """A message in fragments."""
    opcodes = [opcode, *[CONTINUATION] * (len(payloads) - 1)]
    ends = [*[False] * (len(payloads) - 1), True]
    rows = zip(opcodes, payloads, ends)
    return b"".join(frame(code, text, fin=end, key=key) for code, text, end in rows)


@cases(
    "data, events, code",
    (fragments(TEXT, b"a", b"", b"b", b"c") * 2, [(TEXT, "abc")] * 2, None),
    # Control frames may come between fragments, even of a message that is full.
    (
        part(TEXT, b"x" * 100) + frame(PING, b"y" * 125) + frame(PONG) + frame(0),
        [(PING, b"y" * 125), (PONG, b""), (TEXT, "x" * 100)],
        None,
    ),
    # A whole message cannot be continued; one cut off by a close is dropped.
    (frame(TEXT, b"a") + frame(CONTINUATION, b"b"), [(TEXT, "a")], 1002),
    (part(TEXT, b"a") + frame(CLOSE, b"\x03\xe8"), [(CLOSE, (1000, ""))], None),
    (frame(CLOSE), [(CLOSE, (1005, ""))], None),
    # A message may not end in half a character, and it is not kept for the next.
    (part(TEXT, b"\xe2\x82"), [], None),
    (fragments(TEXT, b"\xe2\x82", b""), [], 1007),
    (fragments(TEXT, b"\xe2", b"\x82\xac") * 3, [(TEXT, "€")] * 3, None),
    (fragments(BINARY, b"\xff", b"\xff"), [(BINARY, b"\xff\xff")], None),
)
def test_fragments(data, events, code):
    for cuts in ((), [8], range(1, len(data))):
        assert receive_all(data, cuts=cuts, max_size=100) == (events, code)


@cases("frames, code", (6, None), (7, None), (8, 1008))
def test_a_message_has_at_most_so_many_fragments(frames, code, constant):
    constant(MESSAGE_FRAGMENTS=7)
    pieces = [part(TEXT), *[part(CONTINUATION)] * (frames - 2)]
    whole = b"".join(pieces) + frame(CONTINUATION)
    assert close_code(whole) == code
    # Counted per message, without control frames.
    whole = frame(TEXT) * 9 + b"".join(frame(PING) + p for p in pieces)
    assert close_code(whole + frame(CONTINUATION)) == code


# --- Sizes.


@cases("limit", 10, 125, 126, 65535, 65536)
@cases("over, code", (-1, None), (0, None), (1, 1009))
def test_a_message_may_have_max_size_and_not_a_byte_more(limit, over, code):
    payload = b"x" * (limit + over)
    events, error = receive_all(frame(BINARY, payload), max_size=limit)
    assert error == code
    assert events == ([] if code else [(BINARY, payload)])


@cases("over, code", (-1, None), (0, None), (1, 1009))
def test_the_sizes_of_fragments_are_added_up(over, code):
    data = fragments(BINARY, b"x" * 60, b"x" * 30, b"x" * (10 + over))
    for cuts in ((), range(1, len(data))):
        assert receive_all(data, cuts=cuts, max_size=100)[1] == code
        assert receive_all(data + data, cuts=cuts, max_size=100)[1] == code


@BOTH_SIDES
def test_the_modules_limits_are_the_defaults(side):
    size, count = apiserver.DEFAULT_LIMITS.message_size, apiserver.MESSAGE_FRAGMENTS
    key = key_for(side)
    first, more = part(TEXT, key=key), part(CONTINUATION, key=key)
    for over, codes in ((0, (None, None)), (1, (1009, 1008))):
        large = frame(TEXT, announce=size + over, key=key)
        many = first + more * (count - 1 + over)
        assert (close_code(large, side), close_code(many, side)) == codes


# --- UTF-8.


@cases(
    "good, bad_bytes",
    (b"", b"\x80"),  # a continuation byte alone
    (b"", b"\xc0\xc1\xf5\xff"),  # overlong, at the first byte; beyond U+10FFFF
    ("κόσμε".encode(), b"\xf5"),
    (b"\xe0", b"\x9f"),
    (b"\xf0", b"\x8f"),  # overlong, at the second byte
    (b"\xed", b"\xa0\xbf"),  # surrogates
    (b"\xf4", b"\x90"),  # beyond U+10FFFF, Autobahn 6.4
    (b"\xc3", b"("),
    (b"\xe2\x82", b"("),
    (b"\xf0\x9f", b"("),
    (b"\xf0\x9f\x98", b"\xf0"),
)
def test_a_bad_byte_in_text_is_refused_at_once(good, bad_bytes):
    for bad in bad_bytes:
        text = good + bytes([bad]) + b"never read"
        in_fragments = fragments(TEXT, *(text[i : i + 1] for i in range(len(text))))
        for data, heads in ((frame(TEXT, text), 6), (in_fragments, 6 * len(good) + 6)):
            last = heads + len(good)
            protocol = WebSocketProtocol(SERVER)
            for i in range(last):
                assert protocol.receive(data[i : i + 1]) == []
            assert protocol.error is None
            assert protocol.receive(data[last : last + 1]) == []
            assert protocol.error.close_code == 1007


def test_text_of_every_character_may_be_cut_between_any_bytes():
    characters = "\0\x7f\x80\u07ff\u0800\ud7ff\ue000\ufeff\uffff\U00010000\U0010ffff"
    data = characters.encode()
    for cut in range(len(data) + 1):
        whole = fragments(TEXT, data[:cut], data[cut:])
        for cuts in ((), range(1, len(whole))):
            assert receive_all(whole, cuts=cuts) == ([(TEXT, characters)], None)


# --- The end.


def test_only_close_codes_allowed_on_the_wire_are_accepted():
    legal = {*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)}
    for code in (*range(5100), 0xFFFF):
        expected = ([(CLOSE, (code, "ok"))], None) if code in legal else ([], 1002)
        data = frame(CLOSE, code.to_bytes(2, "big") + b"ok")
        assert receive_all(data) == expected


def test_nothing_after_a_close_is_read():
    protocol = WebSocketProtocol(SERVER)
    data = frame(CLOSE, b"\x03\xe8") + frame(TEXT, b"late") + b"\xff"
    assert protocol.receive(data) == [(CLOSE, (1000, ""))]
    assert protocol.close_received
    assert protocol.receive(frame(TEXT, b"later")) == []
    assert protocol.error is None


def test_nothing_after_an_error_is_read_and_nothing_before_it_is_lost():
    protocol = WebSocketProtocol(SERVER)
    data = frame(TEXT, b"echo me") + frame(PING) + frame(0x3)
    assert protocol.receive(data) == [(TEXT, "echo me"), (PING, b"")]
    error = protocol.error
    assert error.close_code == 1002
    assert protocol.receive(frame(TEXT, b"late")) == []
    assert protocol.error is error
    assert not protocol.close_received


@cases("end", frame(CLOSE), frame(0x3))
def test_bytes_after_the_end_are_not_kept(end):
    protocol = WebSocketProtocol(SERVER)
    protocol.receive(end)
    with traced() as memory:
        for _ in range(100):
            protocol.receive(b"x" * 65536)
        assert memory()[0] < 65536


def test_errors_do_not_quote_the_payload():
    protocol = WebSocketProtocol(SERVER)
    protocol.receive(frame(TEXT, b"secret\xff"))
    assert "secret" not in str(protocol.error)
    assert protocol.error.__cause__ is protocol.error.__context__ is None


# --- Sending.


@cases("size", 0, 1, 125, 126, 65535, 65536, 100_000)
def test_frames_have_the_shortest_length_and_clients_use_fresh_masks(size):
    payload = b"x" * size
    assert encode_frame(BINARY, payload, SERVER) == frame(BINARY, payload, key=None)
    keys = set()
    for _ in range(8):
        wire = encode_frame(BINARY, payload, CLIENT)
        key = wire[len(wire) - size - 4 : len(wire) - size]
        assert wire == frame(BINARY, payload, key=key)
        keys.add(key)
    assert len(keys) > 4


@cases("sender, receiver", (SERVER, CLIENT), (CLIENT, SERVER))
def test_one_side_receives_what_the_other_sends(sender, receiver):
    protocol = WebSocketProtocol(sender)
    events = [
        *[(TEXT, "Grüße"), (BINARY, b"\xff" * 70_000), (TEXT, ""), (BINARY, b"")],
        *[(PING, b""), (PING, b"?" * 125), (PONG, b"!"), (CLOSE, (4000, "über"))],
    ]
    wire = b"".join(protocol.send(message) for _, message in events[:4])
    wire += protocol.ping() + protocol.ping(b"?" * 125) + protocol.pong(b"!")
    wire += protocol.close(4000, "über")
    for step in (1000, 65536, len(wire)):
        cuts = range(step, len(wire), step)
        assert receive_all(wire, receiver, cuts) == (events, None)


def test_close_is_sent_once():
    protocol = WebSocketProtocol(SERVER)
    assert not protocol.close_sent
    assert protocol.close() == bytes.fromhex("880203e8")
    assert protocol.close_sent
    assert protocol.close(1011, "again") == b""


@cases(
    "code, reason, payload",
    *((code, "why", b"") for code in (1005, 1006, 1015)),  # these are never sent
    (1000, "", b"\x03\xe8"),
    (4000, "why", b"\x0f\xa0why"),
    (1000, "\ud800", b"\x03\xe8?"),
)
def test_a_close_frame_has_its_code_and_reason(code, reason, payload):
    wire = WebSocketProtocol(SERVER).close(code, reason)
    assert wire == frame(CLOSE, payload, key=None)


def test_after_our_close_pongs_are_dropped_and_sending_is_an_error():
    protocol = WebSocketProtocol(CLIENT)
    protocol.close()
    assert protocol.pong(b"") == b""
    for message in ("late", b"", None):
        with pytest.raises(ConnectionError):
            protocol.ping() if message is None else protocol.send(message)


def test_a_close_leaves_the_other_direction_open():
    protocol = WebSocketProtocol(SERVER)
    protocol.close()
    data = frame(TEXT, b"on its way") + frame(CLOSE, b"\x03\xe8")
    assert protocol.receive(data) == [(TEXT, "on its way"), (CLOSE, (1000, ""))]
    protocol = WebSocketProtocol(SERVER)
    protocol.receive(frame(CLOSE))
    assert protocol.send("last") == frame(TEXT, b"last", key=None)


@cases("code", 0, 999, 1004, 1016, 2999, 5000, 70_000, -1)
def test_closing_with_an_illegal_code_raises_valueerror(code):
    protocol = WebSocketProtocol(SERVER)
    with pytest.raises(ValueError):
        protocol.close(code)
    assert not protocol.close_sent


@cases("length", 122, 123, 124, 200)
def test_reason_is_cut_to_123_bytes_between_characters(length):
    reasons = ("x" * length, "é" * length, "x" + "€" * length, "xy" + "😀" * length)
    for reason in reasons:
        wire = WebSocketProtocol(SERVER).close(1000, reason)
        ((_, (_, kept)),) = WebSocketProtocol(CLIENT).receive(wire)
        longer = reason[: len(kept) + 1]
        assert reason.startswith(kept)
        assert longer == reason == kept or len(longer.encode()) > 123


def test_what_cannot_be_encoded_raises_valueerror():
    with pytest.raises(ValueError):
        WebSocketProtocol(SERVER).ping(b"x" * 126)
    with pytest.raises(UnicodeEncodeError):
        WebSocketProtocol(SERVER).send("\ud800")


# --- Anything at all.


def random_stream(rng, key):
    """Some frames, mostly legal, a few bytes of them changed at times."""
    frames = []
    for _ in range(rng.randrange(1, 8)):
        opcode = rng.choice([0, 0, 1, 1, 2, 9, 10, 8, rng.randrange(16)])
        payload = rng.choice([b"", b"hi", "é€😀".encode(), b"\x03\xe8", b"x" * 130])
        fin = opcode >= 8 or rng.random() < 0.6
        frames.append(frame(opcode, payload, fin=fin, key=key))
    stream = bytearray(b"".join(frames))
    for _ in range(rng.choice([0, 0, 1, 3])):
        stream[rng.randrange(len(stream))] = rng.randrange(256)
    return bytes(stream)


@BOTH_SIDES
def test_how_bytes_are_cut_never_changes_the_events_or_the_error(side, constant):
    constant(MESSAGE_FRAGMENTS=3)
    rng = random.Random(6456)
    seen = set()
    for i in range(8000):
        random_data = random_stream if i % 8 else lambda rng, _: rng.randbytes(20)
        data = random_data(rng, key_for(side))
        whole = receive_all(data, side, max_size=200)
        cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(9)))
        assert receive_all(data, side, cuts, max_size=200) == whole
        seen.add(whole[1])
    assert seen == {None, 1002, 1007, 1008, 1009}  # the streams try everything


# --- Time and memory.


@cases("opcode", TEXT, BINARY)
@BOTH_SIDES
def test_small_pieces_take_linear_time(side, opcode):
    """2 MiB in 131,072 pieces: half a second, or minutes if each moves the rest."""
    size = 2 * 1024 * 1024
    head = frame(opcode, announce=size, key=key_for(side) and bytes(4))
    protocol = WebSocketProtocol(side)
    protocol.receive(head)
    started = time.perf_counter()
    for _ in range(size // 16 - 1):
        assert not protocol.receive(b"0123456789abcdef")
    (message,) = protocol.receive(b"0123456789abcdef")
    assert time.perf_counter() - started < 10
    assert len(message[1]) == size


def test_small_frames_that_arrive_together_take_linear_time():
    """1.7 MiB in one piece took seven times as long when each frame moved the rest."""
    data = frame(BINARY, b"x") * 250_000
    seconds = []
    for size in (16 * 1024, len(data)):
        protocol = WebSocketProtocol(SERVER)
        began = time.process_time()
        pieces = (data[at : at + size] for at in range(0, len(data), size))
        assert sum(len(protocol.receive(piece)) for piece in pieces) == 250_000
        seconds.append(time.process_time() - began)
    assert seconds[1] < 4 * seconds[0]


def test_a_message_in_pieces_takes_little_more_memory_than_its_bytes():
    """Pieces kept as str or bytes objects would take 30 times as much."""
    size = 64 * 1024
    protocol = WebSocketProtocol(CLIENT)
    protocol.receive(frame(TEXT, announce=size, key=None))
    with traced() as memory:
        for _ in range(size // 2 - 1):
            protocol.receive(b"\xc3")
            protocol.receive(b"\xa9")
        assert memory()[0] < 2 * size


# -----------------------------------------------------------------------------
# API messages and server-sent events. No I/O
# -----------------------------------------------------------------------------


def api_refusal(parse, *args):
    """The APIError(400) that parse raises."""
    with pytest.raises(APIError) as caught:
        parse(*args)
    assert caught.value.status == 400
    return caught.value


# --- JSON as it is read


@cases(
    "content",
    *(
        b'| |{|{}{}|{"a": 1,}|{"a": NaN}|{"a": Infinity}|{"a": -Infinity}|{"a": 1e999}|'
        b'{"a": -1e999}|{"a": 01}|{"a": "\n"}|{"a": "\xff"}|{"a": "\xed\xa0\x80"}|'
        b'\xef\xbb\xbf{}|\x00|"a"|[]|null|1'
    ).split(b"|"),
    b"{'a': 1}",
    '{"a": 1}'.encode("utf-16"),
    b'{"a": ' + b"1" * 401 + b"}",
    b'{"a": -' + b"1" * 5000 + b"}",
    b'{"a": ' + b"1" * 1_000_000 + b"}",
    b"[" * 200_000,
    b"[" * 200_000 + b"]" * 200_000,
    b'{"a":' * 200_000,
    ids=lambda content: repr(content[:12]),
)
def test_content_that_is_no_json_object_is_refused(content):
    with takes(0, 1, time.process_time):
        assert len(str(api_refusal(apiserver.parse_object, content))) < 200


@cases(
    "content, value",
    (b' \r\n\t{"a": 0} \n', {"a": 0}),
    (b'{"a": 1, "a": 2}', {"a": 2}),
    (b'{"a": "\\ud800"}', {"a": "\ud800"}),
    (b'{"a": "\\u0000"}', {"a": "\0"}),
    (b'{"": []}', {"": []}),
    (b'{"a": ' + b"1" * 400 + b"}", {"a": int("1" * 400)}),
    (b'{"a": 1.5e-999}', {"a": 0.0}),
    (b'{"a": "' + b"x" * 1_000_000 + b'"}', {"a": "x" * 1_000_000}),
    ids=lambda value: repr(value)[:12],
)
def test_odd_json_objects_are_accepted(content, value):
    assert apiserver.parse_object(content) == value


def test_json_errors_name_line_and_column():
    error = api_refusal(apiserver.parse_object, b'{"a": 1,\n "b" 2}')
    assert "line 2 column 6" in error.message


def test_json_is_written_on_one_line_in_utf_8():
    value = {"a": "ä\n\u2028😀", "b": [None, True], "c": ["\ud800", "\udfff\\\ud800x"]}
    data = apiserver.encode_json(value)
    assert b"\n" not in data and json.loads(data) == value
    assert "ä".encode() in apiserver.encode_json(["ä"])


# --- What an answer's body is


JSON_TYPE, EVENTS_TYPE = "application/json", "text/event-stream"


@cases(
    "kind, contents",
    (JSON_TYPE, b"{|[1]"),
    (EVENTS_TYPE, b"data: x|event: x|id: 1|retry: 9|: comment"),
    (None, b"|dat|retry"),
    ("", b'data; x|<html>|"text"|ID3|\x00'),
)
@cases("before", b"", b"\xef\xbb\xbf", b"\n" * 500, b" \r\n\t")
def test_first_bytes_decide_the_type_of_a_body(before, kind, contents):
    for content in contents.split(b"|"):
        start = apiserver.body_start(before + content)
        assert start == content
        assert apiserver.body_type(start) == kind


@cases(
    "kind, labels",
    (EVENTS_TYPE, "text/event-stream|Text/Event-Stream; charset=UTF-8"),
    (JSON_TYPE, "application/json|APPLICATION/JSON ;charset=utf-8"),
    (JSON_TYPE, "application/problem+json"),
    *((other, other) for other in ("text/plain", "audio/mpeg", "application/jsonl")),
    ("", ""),
)
def test_content_types_are_compared_without_case_and_parameters(kind, labels):
    for label in labels.split("|"):
        assert apiserver.labelled_type(label) == kind


@cases("delimited", True, False)
@cases(
    "contents, good",
    (b'{"choices": []}|[{"choices": 1}]\r\n \n', (True, True)),
    (b'|  \n|{"choices": [|{"text": "half|{"a": "b"} <!-- proxy -->', (False, False)),
    (b'{"choices": [{"a": 1}', (True, False)),  # a peer that gives a length sent it all
)
def test_truncated_json_is_not_an_answer(contents, good, delimited):
    for content in contents.split(b"|"):
        with refused(None if good[not delimited] else 502):
            assert apiserver.dialect_of(CHAT_URL).check(content, delimited) is None


# --- Errors in others' words


@cases(
    "value, message, words",
    ({"error": {"message": "No", "code": "X_y", "type": "t"}}, "No", {"x_y", "t"}),
    ({"type": "error", "error": {"type": "t", "message": "No"}}, "No", {"t"}),
    ({"error": "No"}, "No", set()),
    ({"error": 5}, "5", set()),
    ({"error": "No", "code": "c", "status": 500}, "No", {"c"}),
    ({"error": ["No", "no"]}, "No; no", set()),
    ({"error": {"message": {"a": 1}}}, '{"a":1}', set()),
    ({"error": {"code": 429, "status": "BUSY"}}, "", {"busy"}),
    ({"detail": "No"}, "No", set()),
    ({"errors": [{"message": "No"}]}, "No", set()),
    ({"detail": {"message": "No", "code": "c"}}, "No", {"c"}),
    ({"detail": {"error": {"message": "No", "code": "c"}}}, "No", {"c"}),
    ({"detail": [{"loc": [1, "n"], "msg": "No", "type": "t"}]}, "1.n: No", {"t"}),
    ({"detail": [{"msg": "No", "type": "t"}, {"msg": "b"}]}, "No; b", {"t"}),
    ({"object": "error", "message": "No", "type": "T", "code": 4}, "No", {"t"}),
    ({"message": "No", "code": "c"}, "No", {"c"}),
    ([{"error": {"message": "No", "status": "S"}}], "No", {"s"}),
    ({"error": {"message": "No", "details": [5, {}, {"reason": "D"}]}}, "No", {"d"}),
    ids=repr,
)
def test_errors_are_found_in_every_shape(value, message, words):
    error = apiserver.find_error(value)
    assert (error.message, error.words) == (message, words)


@cases(
    "value",
    *[None, 5, "error", [], [5], {}, {"error": None}, {"error": {}}, {"detail": ""}]
    + [{"choices": [], "message": "x"}, {"data": [{"error": 1}]}, completion()],
    ids=lambda value: repr(value)[:30],
)
def test_values_that_hold_no_error(value):
    assert apiserver.find_error(value) is None


@cases(
    "code, type, shown",
    ("context_length_exceeded", "t", "context_length_exceeded"),
    (None, "server_error", "server_error"),
    ("the user's words", "server_error", "server_error"),
    ("MY PASSWORD IS", "s3cret!", ""),
    ("hello_Alice", None, ""),
    ("a\nb", "\u0430", ""),
    ("", "", ""),
)
def test_only_a_plain_word_of_an_error_is_kept(code, type, shown):
    error = apiserver.ErrorObject("words of the prompt", type, code)
    assert error.summary == shown


# --- Models


@cases(
    "value, names",
    ({"object": "list", "data": [{"id": "a"}, {"id": "b"}]}, ["a", "b"]),
    ({"models": [{"name": "llama3:8b", "model": "x"}]}, ["llama3:8b"]),
    ({"models": [{"name": "models/gemini-pro"}]}, ["gemini-pro"]),
    ({"models": ["a"]}, ["a"]),
    ([{"id": "a", "name": "A"}, "b"], ["a", "b"]),
    ({"data": [{"id": "a"}, {"no": 1}, None, 3, {"id": 5}, "", "\ud800"]}, ["a"]),
    ({"data": [{"id": "a"}], "models": [{"name": "b"}]}, ["a"]),
    ({"data": []}, []),
    ({"data": None}, None),
    ({"data": {"id": "a"}}, None),
    ({"error": {"message": "No"}}, None),
    ({}, None),
    ("a", None),
    ids=repr,
)
def test_a_list_of_models_is_read_in_every_shape(value, names):
    for before in (b"", b"\xef\xbb\xbf\n "):
        assert apiserver.model_names(before + json.dumps(value).encode()) == names


def test_a_list_of_models_that_is_not_json_is_none():
    for content in (b"", b"<html>", b'{"data": [', b"[" * 100_000):
        assert apiserver.model_names(content) is None


def test_chats_go_to_the_first_chat_model():
    others = """text-embedding-3-large whisper-1 tts-1-hd gpt-4o-transcribe bge-m3
        sora-2 bge-reranker-v2 dall-e-3 omni-moderation-latest gpt-image-1 Qwen3-Rerank
        nomic-embed-text stable-diffusion-xl NV-Embed-v2"""
    assert apiserver.chat_model(others.split()) is None
    assert apiserver.chat_model([*others.split(), "qwen3", "llama3"]) == "qwen3"
    assert apiserver.chat_model([]) is None


# --- Forms


def form(*parts, boundary="B", end="--"):
    """Multipart content of (head, value) parts."""
    lines = [f"--{boundary}\r\n{head}\r\n\r\n{value}\r\n" for head, value in parts]
    return f"{''.join(lines)}--{boundary}{end}\r\n".encode()


FORM = "multipart/form-data; boundary=B"
FORM_FILE = ('Content-Disposition: form-data; name="file"; filename="model"', "ID3")


@cases(
    "head",
    'Content-Disposition: form-data; name="model"',
    "Content-Disposition: form-data; name=model",
    'content-disposition:form-data;name="model"',
    'CONTENT-DISPOSITION: FORM-DATA; NAME = "model"',
    'Content-Type: text/plain\r\nContent-Disposition: form-data; name="model"',
    'Content-Disposition: form-data; x="a; name=\\"no\\""; name="model"',
)
@cases("content_type", FORM, 'Multipart/Form-Data; charset=utf-8; BOUNDARY="B"')
def test_a_forms_model_is_found_and_its_alias_replaced(head, content_type):
    for parts in ([FORM_FILE, (head, "alias")], [(head, "alias"), FORM_FILE]):
        content = form(*parts)
        request = APIRequest("/v1/audio/x", content, form=content_type)
        assert request.model == "alias"
        assert request.encode() == request.encode("alias") == content
        assert request.encode("real/one") == content.replace(b"alias", b"real/one")


@cases(
    "content",
    form(FORM_FILE),
    form(('Content-Disposition: form-data; name="model2"', "x")),
    form(('Content-Disposition: form-data; filename="name=model"', "x")),
    form(("X: form-data; name=model", "x")),
    form(('Content-Disposition: form-data; name="model"', "x"), boundary="C"),
    form(('Content-Disposition: form-data; name="model"', "x"))[:-8],
    b"--B",
    b"",
    ids=lambda content: repr(content[:50]),
)
def test_a_form_without_a_field_model_names_none(content):
    request = APIRequest("/v1/audio/x", content, form=FORM)
    assert request.model is None and request.encode("real") == content
    assert APIRequest("/v1/x", content, form="text/plain").model is None


@cases("size, status", (2048, None), (2049, 400), (1_000_000, 400))
def test_a_models_name_has_a_largest_size(size, status):
    """It is kept in the journal, and made a regular expression; a form's is shorter."""
    body = {**CHAT, "model": "m" * size}
    for make in (
        lambda: APIRequest("/v1/x", body=body),
        lambda: apiserver.parse_chat_request(json.dumps(body).encode()),
    ):
        with refused(status, APIError):
            assert make().model == body["model"]


FORM_MODEL = ('Content-Disposition: form-data; name="model"', "mine")


@cases(
    "content_type, parts",
    (FORM, [FORM_MODEL]),
    (FORM, [("Content-Disposition: form-data; x=1; name=x; name=model", "theirs")]),
    (FORM, [("Content-Disposition: form-data; name*=utf-8''model", "theirs")]),
    (FORM, [("Content-Disposition: form-data; name*0=mod; name*1=el", "theirs")]),
    (FORM, [('Content-Disposition: form-data; name="mo\\del"', "theirs")]),
    (FORM, [("X: y\r\nContent-Disposition: form-data;\r\n name=model", "theirs")]),
    (FORM, [("X: y\nContent-Disposition: form-data; name=model", "theirs")]),
    (FORM, [("X: y\r\nContent-Disposition : form-data; name=model", "theirs")]),
    (FORM, [("Content-Disposition: x; name=x\r\n" + FORM_MODEL[0], "theirs")]),
    (FORM, [(FORM_MODEL[0], "theirs" + " " * 1000)]),
    (FORM, [("Content-Disposition: form-data; name=x; y=" + "z" * 9000, "theirs")]),
    ('multipart/form-data; x="; boundary=B"; boundary=C', []),
    ("multipart/form-data; boundary=B; boundary*=''C", []),
)
def test_an_ambiguous_form_is_refused(content_type, parts):
    """The user may be allowed the model we see, and not the one the upstream sees."""
    content = form(FORM_MODEL, *parts)
    with pytest.raises(APIError, match="field 'model' is ambiguous or malformed"):
        APIRequest("/v1/audio/x", content, form=content_type)


def test_a_form_begins_with_a_part():
    """Go's JSON decoder stops after the first value: Ollama would take its model."""
    content = form(FORM_MODEL)
    assert APIRequest("/v1/x", b"\r\n" + content, form=FORM).model == "mine"
    with pytest.raises(APIError, match="field 'model' is ambiguous or malformed"):
        APIRequest("/v1/x", b'{"model": "theirs"}\r\n' + content, form=FORM)


def test_a_form_of_a_million_parts_is_not_split():
    content = b"--axy" * 1_000_000
    with traced() as memory:
        assert apiserver.find_form_field(content, "x; boundary=a", "model") is None
        assert memory()[1] < 2 * len(content)


def test_a_long_form_is_recognised_by_its_start_and_end():
    """A digest of all of it would block the loop and take six times its memory."""
    one, other = (b"--%b\r\n" % name + b"-" * 20_000_000 for name in (b"a", b"b"))
    with traced() as memory:
        digest = APIRequest("/v1/audio/x", one).digest
        assert memory()[1] < 10_000_000
    assert APIRequest("/v1/audio/x", other).digest == digest
    assert APIRequest("/v1/audio/x", one + b"-").digest != digest


# --- Chat requests


@cases(
    "param, values",
    ("model", 'null|""|5|["m"]'),
    ("messages", 'null|"Hello"|{}'),
    ("stream", '"true"|1|[]'),
)
@cases("name", str, str.capitalize)
def test_the_error_names_a_bad_or_missing_field_of_a_chat_request(param, values, name):
    body = {name("model"): "m", name("messages"): []}
    bodies = [{**body, name(param): json.loads(value)} for value in values.split("|")]
    if body.pop(name(param), None) is not None:
        bodies.append(body)
    for body in bodies:
        error = api_refusal(apiserver.parse_chat_request, json.dumps(body).encode())
        assert error.param == param
        assert f"'{param}'" in error.message
        assert error.type == "invalid_request_error"


def test_a_chat_request_is_parsed_and_forwarded_unchanged():
    content = (
        b' {"temperature": 0, "model": "m","messages":[{"role":"user"}, 5, "x"],'
        b'"new": {"x": 1.10}, "stream": null, "e": "\\u00e4"}\n'
    )
    request = apiserver.parse_chat_request(content)
    assert (request.model, request.stream, request.wants_usage) == ("m", False, False)
    assert request.path == "/v1/chat/completions"
    assert request.content == content
    assert request.encode() == request.encode("m") == content
    assert not request.counts_usage


@cases(
    "wants, values",
    (True, [{"include_usage": True}]),
    (False, [{"include_usage": False}, {"include_usage": 1}, {}, None, [], "x"]),
)
def test_usage_is_counted_for_a_stream_whose_client_does_not_want_it(wants, values):
    for options in values:
        body = {"model": "m", "messages": [], "stream": True, "stream_options": options}
        request = APIRequest(CHAT_URL, body=body)
        assert (request.wants_usage, request.counts_usage) == (wants, not wants)
        assert not APIRequest("/v1/responses", body=body).counts_usage
        body["stream"] = False
        assert not APIRequest("/v1/completions", body=body).counts_usage


@cases("capital", "Model Messages Stream Temperature", "")
def test_capitalised_keys_are_forwarded_in_lower_case(capital):
    """The original's examples have them; arguments of tools are left alone."""
    plain = {
        "model": "m",
        "messages": [{"role": "user", "content": "Hi"}, {"role": "user"}, 5],
        "stream": True,
        "temperature": 0,
        "tools": [{"function": {"parameters": {"properties": {"Model": {}}}}}],
        "metadata": {"Key": 1},
    }
    names = {name.lower(): name for name in capital.split()}
    body = {names.get(key, key): value for key, value in plain.items()}
    messages = [{"Role": "user", "Content": "Hi"}, *plain["messages"][1:]]
    body[names.get("messages", "messages")] = messages
    request = apiserver.parse_chat_request(json.dumps(body).encode())
    assert (request.model, request.stream) == ("m", True)
    assert json.loads(request.encode()) == plain == request.body


@cases("other", "Model", "MODEL", "mODEl")
def test_two_spellings_of_model_are_refused(other):
    """One reader would use the first, another the last."""
    for names in (("model", other), (other, "model")):
        for messages in ("messages", "Messages"):
            content = json.dumps({**dict.fromkeys(names, "a"), messages: []}).encode()
            assert api_refusal(apiserver.parse_chat_request, content).param == "model"
    # Elsewhere the word may be: in a key below, in a value, in another key.
    plain = rb'{"model": "m", "x": {"model": "\u006d"}, "y": "model", "model2": 1}'
    assert not apiserver.names_two_models(plain)


@cases(
    "content",
    b'{"model":"m","messages":[],"stream":true}',
    b' \n\t{ "model": "m", "messages": [ ], "stream": true, "x": 1.10 }\n ',
    b'{"stream":true,"model":"m","messages":[{"role":"user","content":"{}"}]}',
)
def test_the_option_for_usage_is_appended_to_the_clients_bytes(content):
    request = apiserver.parse_chat_request(content)
    assert request.counts_usage
    sent = request.encode(include_usage=True)
    assert sent.startswith(content.rstrip()[:-1])
    usage = {"stream_options": {"include_usage": True}}
    assert json.loads(sent) == {**json.loads(content), **usage}
    assert request.content == content


@cases("key", "stream\\u005foptions", "Stream_Options", "stream")
def test_no_spelling_of_stream_options_turns_off_usage(key):
    """Of two equal keys the last counts, and Go ignores case."""
    content = b'{"model": "m", "messages": [], "stream": true, "%b": true}'
    request = apiserver.parse_chat_request(content % key.encode())
    sent = request.encode(include_usage=True)
    *_, last = json.loads(sent, object_pairs_hook=list)
    assert last == ("stream_options", [("include_usage", True)])


@cases("options", None, "x", {"include_usage": False}, {"include_usage": None, "b": 1})
def test_the_option_for_usage_joins_other_stream_options(options):
    body = {"model": "m", "messages": [], "stream": True, "stream_options": options}
    request = apiserver.parse_chat_request(json.dumps(body).encode())
    sent = json.loads(request.encode("m", include_usage=True))
    others = options if isinstance(options, dict) else {}
    assert sent == {**body, "stream_options": {**others, "include_usage": True}}
    assert json.loads(request.encode()) == body


def test_an_alias_changes_only_the_model():
    body = {"x": "ä\ud800", "model": "alias", "messages": [{"a": 0.1}], "n": None}
    request = apiserver.parse_chat_request(json.dumps(body).encode())
    sent = json.loads(request.encode("real"))
    assert sent == {**body, "model": "real"} and list(sent) == list(body)
    assert request.model == "alias" and request.body["model"] == "alias"
    with_usage = json.loads(request.encode("real", include_usage=True))
    assert with_usage == {**sent, "stream_options": {"include_usage": True}}
    request = APIRequest("/v1/audio/transcriptions", b"\xff--form")
    assert request.encode("real", include_usage=True) == b"\xff--form"  # no JSON


def test_deep_nesting_is_a_400_wherever_the_stack_ends():
    """The encoder may be called deeper in the stack than the parser was."""

    def encode(request, frames):
        return encode(request, frames - 1) if frames else request.encode("real")

    for depth in (*range(800, 1010, 3), 5000, 20_000, 100_000):
        nested = b"[" * depth + b"]" * depth
        content = b'{"model": "m", "messages": [], "x": ' + nested + b"}"
        try:
            request = apiserver.parse_chat_request(content)
            assert encode(request, 40).count(b"[") == depth + 1
        except APIError as error:
            assert error.status == 400


# --- Messages as text


def says(role, content):
    return {"role": role, "content": content}


def text_part(text):
    return {"type": "text", "text": text}


@cases(
    "messages, text",
    ([], ""),
    ([says("user", "Hi")], "Hi"),
    ([says("system", "S")], "S"),
    ([{"content": "a"}, says("tool", "b")], "User: a\n\nTool: b"),
    ([says("user", "Hi"), 5, None, "x"], "Hi"),
    ([says("user", None)], ""),
    ([{"role": "user"}], ""),
    ([says(7, 7), {}], "7: \n\nUser: "),
    ([says("system", "S"), says("assistant", None)], "System: S\n\nAssistant: "),
    ([says("user", [text_part("a"), {"type": "image_url"}, text_part("b")])], "a\nb"),
    ([says("user", [text_part("a"), text_part(5), "x"])], "a"),
)
def test_messages_as_one_text(messages, text):
    assert apiserver.messages_text(messages) == text


def test_usage_is_estimated_at_a_token_for_four_bytes():
    texts = {"": 0, "1234": 1, "12345": 2, "ä" * 4: 2, "\ud800": 1}
    assert {text: apiserver.estimate_tokens(text) for text in texts} == texts


# --- Answers made here


def api_events(data):
    """The data of the events, without comments."""
    return [event for _, event in apiserver.split_events(data) if event is not None]


def api_chunks(data):
    """The chunks of a stream up to its [DONE]."""
    *events, done = api_events(data)
    assert done == b"[DONE]"
    return [json.loads(event) for event in events]


def test_a_completion_has_every_field_clients_read():
    usage = apiserver.usage_object(apiserver.Usage(1, 0, 1))
    whole = apiserver.chat_completion("m", {"content": "Hi"}, usage)
    assert list(whole) == ["id", "object", "created", "model", "choices", "usage"]
    assert re.fullmatch("chatcmpl-[0-9a-f]{24}", whole["id"])
    assert (whole["object"], whole["usage"]) == ("chat.completion", usage)
    assert abs(whole["created"] - time.time()) < 10
    message = {"role": "assistant", "content": "Hi", "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    assert whole["choices"] == [choice]
    calls = apiserver.chat_completion("m", {"tool_calls": [{"id": "c"}]})
    assert calls["choices"][0]["finish_reason"] == "tool_calls"
    assert apiserver.chat_completion("m", {})["id"] != whole["id"]


def tool_call(id, name="f", arguments="{}"):
    function = {"name": name, "arguments": arguments}
    return {"id": id, "type": "function", "function": function}


TWO_CALLS = [tool_call("1"), tool_call("2", "g", '{"a": "\\n"}')]
API_COMPLETIONS = [
    apiserver.chat_completion("m", {"content": "Hi ä\n\n😀"}),
    apiserver.chat_completion("m", {"content": ""}, {"prompt_tokens": 1}),
    apiserver.chat_completion("m", {"refusal": "No."}),
    apiserver.chat_completion("m", {"content": "a", "reasoning_content": "hm"}),
    apiserver.chat_completion("m", {"tool_calls": TWO_CALLS}),
    apiserver.chat_completion("m", {"content": "a"}),
]
CHOICES = API_COMPLETIONS[-1]["choices"]
CHOICES.append({**CHOICES[0], "index": 1, "finish_reason": "length"})


@cases("number", *range(len(API_COMPLETIONS)))
def test_a_completion_survives_being_streamed_and_joined(number):
    whole = json.loads(json.dumps(API_COMPLETIONS[number]))
    builder = apiserver.CompletionBuilder()
    for chunk in api_chunks(apiserver.ChatWriter.relay(whole)):
        assert chunk["object"] == "chat.completion.chunk"
        builder.add(chunk)
    result = builder.result()
    for choice in result["choices"]:
        for call in choice["message"].get("tool_calls", []):
            call.pop("index", None)
    assert result == API_COMPLETIONS[number]


def test_usage_comes_in_the_last_event_of_a_stream():
    whole = apiserver.chat_completion("m", {"content": "Hi"}, {"total_tokens": 3})
    *chunks, last = api_chunks(apiserver.ChatWriter.relay(whole))
    assert (last["choices"], last["usage"]) == ([], {"total_tokens": 3})
    for chunk in chunks:
        assert chunk["choices"] and "usage" not in chunk
        assert chunk["id"] == whole["id"] and chunk["created"] == whole["created"]


def test_streamed_chunks_are_joined():
    def delta(index=0, reason=None, **delta):
        return {"index": index, "delta": delta, "finish_reason": reason}

    def call(index, id=None, **function):
        return {"index": index, "function": function, **({"id": id} if id else {})}

    builder = apiserver.CompletionBuilder()
    for choices in (
        None,
        [delta(role="assistant", content="")],
        [delta(content="He"), delta(1, content="x")],
        [delta(content="llo", role="assistant")],
        [delta(tool_calls=[call(0, "c0", name="f", arguments="")])],
        [delta(tool_calls=[call(0, arguments='{"a"'), call(1, "c1", name="g")])],
        [delta(tool_calls=[call(0, arguments=":1}"), call(1, arguments="{}")])],
        [{"index": 1, "delta": None, "finish_reason": "stop"}],
        [delta(reason="tool_calls")],
        [],
    ):
        builder.add({"id": "1", "model": "m", "created": 5, "choices": choices})
    builder.add({"choices": [], "usage": {"total_tokens": 9}})
    result = builder.result()
    first, second = result["choices"]
    assert (result["id"], result["model"], result["created"]) == ("1", "m", 5)
    assert result["usage"] == {"total_tokens": 9}
    message = first["message"]
    assert (message["role"], message["content"]) == ("assistant", "Hello")
    calls = [(c["id"], *c["function"].values()) for c in message["tool_calls"]]
    assert calls == [("c0", "f", '{"a":1}'), ("c1", "g", "{}")]
    assert (first["finish_reason"], second["finish_reason"]) == ("tool_calls", "stop")
    assert second["message"]["content"] == "x"


@cases(
    "pieces, calls",
    ([("1", "f", '{"a"'), (None, None, ":1}")], [("1", "f", '{"a":1}')]),
    (
        [("1", "f", "{"), (None, None, "}"), ("2", "g", "["), (None, None, "]")],
        [("1", "f", "{}"), ("2", "g", "[]")],
    ),
    ([("1", "f", "{"), ("1", None, "}")], [("1", "f", "{}")]),
    (
        [("1", "f", "{"), ("2", "g", ""), ("1", None, "}")],
        [("1", "f", "{}"), ("2", "g", "")],
    ),
    ([(None, "f", "{}"), (None, "g", "{}")], [(None, "f", "{}"), (None, "g", "{}")]),
    ([("", "f", "{}")], [("", "f", "{}")]),
)
def test_tool_call_pieces_without_an_index_continue_the_last_call(pieces, calls):
    builder = apiserver.CompletionBuilder()
    for piece in pieces:
        builder.add({"choices": [{"delta": {"tool_calls": [tool_call(*piece)]}}]})
    made = builder.result()["choices"][0]["message"]["tool_calls"]
    assert [(call["id"], *call["function"].values()) for call in made] == calls


def test_calls_counted_from_1_and_lists_in_pieces_are_joined():
    builder = apiserver.CompletionBuilder()
    for index, text in (1, '{"a"'), (2, "{}"), (1, ":1}"):
        call = {"index": index, "function": {"arguments": text}}
        delta = {"tool_calls": [call], "reasoning_details": [{"text": text}]}
        builder.add({"choices": [{"delta": delta}]})
    message = builder.result()["choices"][0]["message"]
    calls = [call["function"]["arguments"] for call in message["tool_calls"]]
    assert calls == ['{"a":1}', "{}"]
    assert [part["text"] for part in message["reasoning_details"]] == [
        '{"a"',
        "{}",
        ":1}",
    ]


def test_refusals_logprobs_and_fingerprint_of_a_stream_are_kept():
    builder = apiserver.CompletionBuilder()
    for token, refusal in (("a", "I "), ("b", "won't")):
        logprobs = {"content": [{"token": token}], "refusal": None}
        choice = {"index": 0, "delta": {"refusal": refusal}, "logprobs": logprobs}
        builder.add({"choices": [choice], "system_fingerprint": "fp"})
    result = builder.result()
    [choice] = result["choices"]
    assert result["system_fingerprint"] == "fp"
    message = choice["message"]
    assert (message["refusal"], message["content"]) == ("I won't", None)
    assert choice["logprobs"]["content"] == [{"token": "a"}, {"token": "b"}]


def test_objects_of_a_stream_are_joined():
    builder = apiserver.CompletionBuilder()
    for function, audio in (
        ({"name": "f", "arguments": ""}, {"id": "a", "transcript": "H"}),
        ({"arguments": '{"a"'}, {"id": "a", "data": "AAAA"}),
        ({"arguments": ": 1}"}, {"transcript": "i", "data": "BBBB", "expires_at": 5}),
    ):
        delta = {"function_call": function, "audio": audio}
        builder.add({"choices": [{"index": 0, "delta": delta}]})
    message = builder.result()["choices"][0]["message"]
    assert message["function_call"] == {"name": "f", "arguments": '{"a": 1}'}
    audio = {"id": "a", "transcript": "Hi", "data": "AAAABBBB", "expires_at": 5}
    assert message["audio"] == audio


def test_an_empty_head_before_the_first_choice_is_not_the_answers():
    """Azure's results of its filter come first."""
    builder = apiserver.CompletionBuilder()
    empty = {"id": "", "model": "", "created": 0, "choices": []}
    for chunk in {**empty, "prompt_filter_results": []}, {"id": "c", "created": 5}:
        builder.add(chunk)
    result = builder.result()
    assert (result["id"], result["model"], result["created"]) == ("c", "", 5)


def test_joining_tool_calls_and_logprobs_takes_linear_time():
    """Or one answer of 16 MiB would stop the server for minutes."""
    builder = apiserver.CompletionBuilder()
    piece = {"index": 0, "function": {"arguments": "x" * 1000}}
    with takes(0, 2, time.process_time):
        for number in range(10_000):
            delta = {"tool_calls": [piece, {"id": f"call-{number}"}]}
            choice = {"delta": delta, "logprobs": {"content": [{}]}}
            builder.add({"choices": [choice]})
    [choice] = builder.result()["choices"]
    assert len(choice["message"]["tool_calls"]) == 10_001
    assert len(choice["logprobs"]["content"]) == 10_000


def test_joining_a_stream_takes_linear_time():
    """Or 90 GB would have to be copied."""
    builder = apiserver.CompletionBuilder()
    delta = {"role": "assistant", "content": "x" * 20_000}
    with takes(0, 2, time.process_time):
        for _ in range(3000):
            builder.add({"choices": [{"index": 0, "delta": delta}]})
        message = builder.result()["choices"][0]["message"]
    assert message["role"] == "assistant" and len(message["content"]) == 60_000_000


def test_error_object_has_all_four_fields():
    error = apiserver.error_object(APIError(404, "No", code="model_not_found"))
    type, code = "not_found_error", "model_not_found"
    assert error == {"message": "No", "type": type, "param": None, "code": code}
    error = apiserver.error_object(APIError(500, "No", upstream_status=503))
    assert error["upstream_status"] == 503


@cases(
    "content, usage",
    (b"", ()),
    (b'{"usage": {"prompt_tokens": "3"}}', ()),
    (b'{"prompt_tokens": 3}', ()),
    (json.dumps(completion()).encode(), (3, 0, 4)),
    (b'{"usage":{"input_tokens":5,"output_tokens" :\n6,"":{"_tokens":9}}}', (5, 0, 6)),
    (json.dumps({"text": '"usage": {"total_tokens": 9}'}).encode(), ()),
    (b'{"usage":{"total_tokens":1},"x":{"usage":{"total_tokens":2}}}', (1,)),
    (b'{"metadata":{"usage":{"total_tokens":2}}}', ()),
    (b'{"usage":{"total_tokens":1},"user":"a","metadata":{"usage":"2"}}\n', (1,)),
    (b'{"usage":{"total_tokens":1},"choices":[{"a":"}"}],"object":"usage"}', (1,)),
    (b'{"usage":{"total_tokens":2,"more":{"total_tokens":3}}}', (2,)),
    (b'{"usage":{"total_tokens":' + b"9" * 4000 + b"}}", ()),
    (b'{"usage": null}', ()),
    (b'{"usage":{"prompt_tokens":-1,"completion_tokens":"2"}}', ()),
)
def test_usage_is_found_in_an_answers_bytes(content, usage):
    assert apiserver.find_usage(content) == apiserver.Usage(*usage)


@cases(
    "fields, usage",
    ("prompt=9 completion=1 prompt.cached=8", (9, 8, 1)),
    ("prompt=9 completion=1 prompt.cached=10", (9, 0, 1)),  # more than were sent
    ("input=9 output=1 input.cached=8", (9, 8, 1)),
    ("input=1 output=4 cache_read_input=10 cache_creation_input=5", (16, 10, 4)),
    # DashScope's prompt_tokens include those of the cache.
    ("prompt=9 prompt.cached=2 prompt.cache_creation_input=7", (9, 2, 0)),
)
def test_cached_tokens_are_found_in_every_dialect(fields, usage):
    counts = {}
    for path, count in (field.split("=") for field in fields.split()):
        outer, _, name = path.rpartition(".")
        inner = counts.setdefault(f"{outer}_tokens_details", {}) if outer else counts
        inner[f"{name}_tokens"] = int(count)
    content = json.dumps({"usage": counts}).encode()
    assert apiserver.find_usage(content) == apiserver.Usage(*usage)


def test_usage_before_a_large_answer_is_found_without_parsing_that(monkeypatch):
    """Jina's embeddings follow it; a client's metadata may come after both."""
    read, sizes = apiserver.read_json, []
    patched = lambda text: sizes.append(len(text)) or read(text)
    monkeypatch.setattr(apiserver, "read_json", patched)
    counts = {"total_tokens": 5, "prompt_tokens": 5}
    answer = {"object": "list", "usage": counts, "data": ["x"] * 50_000}
    for more, parsed in (({}, 100), ({"metadata": {"usage": 0}}, 10**6)):
        content = json.dumps({**answer, **more}).encode()
        assert apiserver.find_usage(content) == apiserver.Usage(5)
        assert max(sizes) < parsed


def test_what_an_answer_repeats_of_its_request_is_no_usage():
    """A client could use up a controller's limit for all others."""
    tool = {"parameters": {"usage": {"total_tokens": 10**12}, "x": "x" * 100_000}}
    content = json.dumps({"object": "assistant", "tools": [tool]}).encode()
    assert apiserver.find_usage(content) == apiserver.Usage()


# --- Server-sent events


def api_feed(stream, data, pieces=()):
    """Feed a stream data in pieces of these sizes, and its end; what it relays."""
    out = []
    at = 0
    for size in (*pieces, len(data)):
        out.append(stream.receive(data[at : at + size]))
        at += size
    return b"".join(out) + stream.end()


def api_cuts(data):
    """Sizes of pieces: whole, byte by byte, and with every single cut."""
    return ((), [1] * len(data), *([cut] for cut in range(1, len(data))))


def api_every_cut(make, data):
    """(stream, relayed) for data in all these cuts."""
    for pieces in api_cuts(data):
        stream = make()
        yield stream, api_feed(stream, data, pieces)


@cases(
    "expected, forms",
    ([b"a", b"b"], b"data: a\n\ndata: b\n\n|data: a\r\n\r\ndata: b\r\n\r\n"),
    ([b"a", b"b"], b"data: a\r\rdata: b\r\r|data: a\r\n\ndata: b\n\r\n"),
    ([b"a", b"b"], b"\n\n\ndata: a\n\n\n\n\ndata: b\n\n"),
    ([b"a", b"b"], b"data: a\n\ndata: b|data: a\r\n\r\ndata: b\r\n"),
    ([b"a", b" b"], b"data:a\n\ndata:  b\n\n"),
    ([b"a"], b"\xef\xbb\xbfdata: a\n\n|: hello\n\ndata: a\n\n:\n\n|data: a\n\n\r\n  "),
    ([b"a"], b": hello\ndata: a\n: there\n\n|event: x\nid: 1\nretry: 5\ndata: a\n\n"),
    ([b"a\nb\n"], b"data: a\ndata: b\ndata\ndata:\n\n"),
    ([b"a\nb"], b"data: a\r\ndata: b\r\n\r\n|data: a\rdata: b\r\r"),
    ([b"{\xc3\xa4 \xf0\x9f\x98\x80}"], b"data: {\xc3\xa4 \xf0\x9f\x98\x80}\n\n"),
    ([], b"datax: a\nxdata: b\n data: c\n\n|"),
)
def test_events_are_the_same_in_every_form_and_cut(expected, forms):
    for data in forms.split(b"|"):
        for stream, out in api_every_cut(apiserver.EventStream, data):
            assert api_events(out) == expected
            assert out.startswith(data.rstrip(b"\r\n "))  # relayed as it came
            assert stream.began is bool(expected)
            assert stream.ended


def test_a_block_ends_after_its_last_whole_event():
    decoder = apiserver.SSEDecoder()
    whole = b"data: a\n\ndata: b\n\n"
    assert decoder.receive(whole + b"data: c") == whole
    assert decoder.receive(b"\n") == b""
    assert decoder.receive(b"\n: x") == b"data: c\n\n"
    assert (decoder.end(), decoder.end()) == (b": x\n\n", b"")


def test_a_stream_does_not_begin_with_comments():
    stream = apiserver.EventStream()
    assert stream.receive(b": keep-alive\n\n") == b": keep-alive\n\n"
    for data, began in ((b"", False), (b"event: x\n", False), (b"data: y\n\n", True)):
        stream.receive(data)
        assert stream.began is began


@cases("end", b"\n", b"\r\n")
@cases("names", b"||", b": hi\n||", b"event: a\n||event: b\n")
def test_events_separated_by_single_newlines_are_accepted_however_cut(names, end):
    """Not in the standard, but some send them: one-api and others split at lines."""
    events = [b'{"a": 1}', b'{"b": "\\n"}', b"[DONE]"]
    lines = [b"%bdata: %b\n" % row for row in zip(names.split(b"|"), events)]
    data = b"".join(lines).replace(b"\n", end)
    for stream, out in api_every_cut(apiserver.EventStream, data):
        assert api_events(out) == events and stream.began


@cases("end", b"\n", b"\r\n", b"\r")
def test_events_separated_by_single_newlines_keep_their_names(end):
    """Anthropic's SDK skips events without one."""
    start, stop = b'{"type": "message_start"}', b'{"type": "message_stop"}'
    lines = b"event: message_start", b"data: " + start, b"event: message_stop"
    data = end.join((*lines, b"data: " + stop, b""))
    for _, out in api_every_cut(apiserver.MessagesStream, data):
        events = re.findall(rb"event: (\w+)\s+data: (.*)", out)
        assert events == [(b"message_start", start), (b"message_stop", stop)]


def test_a_last_event_without_a_newline_is_separate_however_cut():
    events = [b'{"choices": [{"finish_reason": "stop"}]}', b"[DONE]"]
    data = b"data: " + b"\ndata: ".join(events)
    for _, out in api_every_cut(apiserver.CompletionStream, data):
        assert api_events(out) == events


def test_an_event_of_several_lines_stays_one():
    """Lines of one JSON text are not events of their own."""
    data = b'data: {"a":\ndata: [1,\ndata: 2]}\n\ndata: {"b": 1}\n\n'
    for _, out in api_every_cut(apiserver.EventStream, data):
        assert out == data
        assert json.loads(api_events(out)[0]) == {"a": [1, 2]}


@cases("size, good", (99, True), (100, True), (101, False))
def test_one_event_has_a_largest_size(size, good):
    data = b"data: a\n\n" + b"data: " + b"b" * (size - 6)
    for pieces in ((), [1] * len(data), [9, 90]):
        stream = apiserver.CompletionStream(max_size=100)
        with refused(None if good else 413):
            assert api_feed(stream, data + (chunk("", "stop") + DONE) * good, pieces)
    # Several events together may be larger.
    assert apiserver.SSEDecoder(100).receive(b"data: a\n\n" * 100 + b"d")


@cases("row", *b"x|\n|\r|\r\n|a\r\n|data: \n\n|\nx|\rx|id: 1\n".split(b"|"))
def test_events_in_small_pieces_take_linear_time(row):
    """Four times the bytes take at most eight times as long, not sixteen."""

    def seconds(length):
        data = b"data: " * (row != b"id: 1\n") + row * (length // len(row))
        size = 10 if row == b"x" else 100
        stream = apiserver.EventStream()
        began = time.process_time()
        for at in range(0, len(data), size):
            stream.receive(data[at : at + size])
        stream.end()
        return time.process_time() - began

    tries = ((seconds(250_000), seconds(1_000_000)) for _ in range(5))
    assert any(long < 8 * short + 0.01 for short, long in tries)


# --- Streams of completions


def api_ends_early(data):
    """Check that every cut of data ends in an error of the stream."""
    for pieces in api_cuts(data):
        stream = apiserver.CompletionStream()
        with refused(502):
            api_feed(stream, data, pieces)
        assert stream.ended


@cases(
    "data",
    chunk("He\u00e4") + b": hi\n\n" + chunk("llo\n\n") + chunk(None, "stop") + DONE,
    chunk("[DONE]") + chunk("data: [DONE]\n\n", "stop") + DONE,
    chunk("Hi", error=None) + chunk('"error": {"message"}', "stop") + DONE,
)
def test_a_stream_is_relayed_unchanged_up_to_done(data):
    """[DONE] as a text does not end it."""
    late = chunk("late") + b'data: {"error": {}}\n\n' + DONE + b"data: x"
    for whole in (data, data + late):
        for stream, out in api_every_cut(apiserver.CompletionStream, whole):
            assert out == data
            assert stream.error is None and stream.began and stream.ended


@cases("end", *b":[DONE]\n\n|: [DONE] \r\n\r\n|: [DONE]|:[DONE]\r".split(b"|"))
def test_done_is_recognised_in_every_form(end):
    data = chunk("Hi") + b"data" + end
    for stream, out in api_every_cut(apiserver.CompletionStream, data):
        _, last = api_events(out)
        assert last.strip() == b"[DONE]" and stream.ended


def test_done_is_added_after_a_finish_reason():
    data = chunk("Hi") + chunk(None, "length")
    for _, out in api_every_cut(apiserver.CompletionStream, data):
        assert out == data + DONE
    spaced = b'data: {"choices": [{"finish_reason": "stop"}]}\r\r'
    assert api_feed(apiserver.CompletionStream(), spaced) == spaced + DONE


@cases(
    "data",
    b"",
    b": comment\n\n",
    chunk("Hi"),
    chunk("Hi") + chunk(" there"),
    chunk('"finish_reason": "stop"'),
    chunk("Hi") + b'data: {"usage": {"total_tokens": 1}, "choices": []}\n\n',
    b"data: nonsense\n\n",
    ids=repr,
)
def test_a_stream_without_a_finish_reason_has_failed(data):
    api_ends_early(data)


def test_half_an_event_at_the_end_is_dropped():
    first, last = chunk("Hi"), chunk("!", "stop")
    for cut in range(1, len(last) - 3):
        stream = apiserver.CompletionStream()
        with pytest.raises(ProtocolError):
            api_feed(stream, first + last[:cut])
    api_ends_early(first + last[:-9])
    for missing in (1, 2):  # without its blank line the event is whole
        out = api_feed(apiserver.CompletionStream(), first + last[:-missing])
        assert api_events(out) == api_events(first + last + DONE)
    usage = chunk(choices=[], usage={"total_tokens": 1})
    out = api_feed(apiserver.CompletionStream(), first + last + usage[:-9])
    assert api_events(out) == api_events(first + last + DONE)


@cases(
    "error, expected",
    ({"message": "No", "code": "x"}, ("No", "x")),
    (5, ("5", None)),
    ("Overloaded", ("Overloaded", None)),
)
@cases("before", b"", chunk("Hi"), ids=["first", "later"])
def test_an_error_event_ends_a_stream(before, error, expected):
    event = b"event: error\ndata: " + json.dumps({"error": error}).encode() + b"\n\n"
    data = before + event + chunk("late", "stop") + DONE
    for stream, out in api_every_cut(apiserver.CompletionStream, data):
        assert out == before
        assert (stream.error.message, stream.error.code) == expected
        assert stream.began and stream.ended


def test_usage_the_client_did_not_want_is_counted_and_hidden():
    """Unless it comes with a choice."""
    usage = {"prompt_tokens": 3, "total_tokens": 7}
    text = chunk("Hi", usage=None) + chunk('"usage"', "stop", usage=None)
    data = text + chunk(choices=[], usage=usage) + DONE
    choice = chunk("Hi", "stop", usage=usage) + DONE
    hidden = [(True, data, text + DONE), (False, data, data), (True, choice, choice)]
    for hide, sent, relayed in hidden:
        make = functools.partial(apiserver.CompletionStream, hide)
        for stream, out in api_every_cut(make, sent):
            assert (out, stream.usage) == (relayed, apiserver.Usage(3))


@cases(
    "event",
    *(
        b'data: {"choices": null, "usage": null}\n\n|data: ["usage", "error"]\n\n|'
        b'data: {"choices": null, "error": null}\n\n|data: {"usage" "error"\n\n|'
        b'data: "error"\n\n|data: "usage" \xff\xfe "error"\n\n|'
        b'data: {"usage": [], "error": ""}\n\n|data: \n\n|event: "error"\n\n'
    ).split(b"|"),
    b'data: {"error": ' + b"[" * 5000 + b"\n\n",
    b'data: {"usage": ' + b"1" * 5000 + b"}\n\n",
    ids=lambda event: repr(event[:30]),
)
def test_odd_events_are_relayed_unchanged(event):
    data = chunk("Hi") + event + chunk(None, "stop") + DONE
    for pieces in ((), [1] * len(data), [len(data) // 2]):
        stream = apiserver.CompletionStream(hide_usage=True)
        assert api_feed(stream, data, pieces) == data
        assert stream.error is None and stream.usage == apiserver.Usage()


@cases("end", b"\r\n", b"\r")
def test_other_line_ends_change_nothing(end):
    usage = chunk(choices=[], usage={"total_tokens": 7})
    plain = chunk("Hi") + chunk(None, "stop") + usage + DONE + chunk("late")
    data = plain.replace(b"\n", end)
    for stream, out in api_every_cut(lambda: apiserver.CompletionStream(True), data):
        assert api_events(out) == api_events(chunk("Hi") + chunk(None, "stop") + DONE)
        assert stream.usage == apiserver.Usage(7)


@cases(
    "whole, last",
    (True, '"finish_reason": "stop"|"finish_reason":"tool_calls"'),
    (False, '"finish_reason": ""|"finish_reason": null'),
    (False, '"text": "\\"finish_reason\\": \\"stop\\""'),
)
def test_only_a_non_empty_finish_reason_finishes_a_choice(whole, last):
    for field in last.split("|"):
        data = b'data: {"choices": [{%b}]}\n\n' % field.encode()
        if whole:
            for _, out in api_every_cut(apiserver.CompletionStream, data):
                assert out == data + DONE
        else:
            api_ends_early(data)


def test_every_requested_choice_has_to_finish():
    make = functools.partial(apiserver.CompletionStream, choices=2)
    data = chunk("a") + chunk(None, "stop")
    with pytest.raises(ProtocolError):
        api_feed(make(), data)
    for _, out in api_every_cut(make, data + chunk(None, "length")):
        assert out.endswith(DONE)


# --- Streams of responses and messages


def typed(kind, **fields):
    """One event of a typed stream, in bytes."""
    data = json.dumps({"type": kind, **fields}).encode()
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)


MESSAGE_USAGE = {"input_tokens": 3, "cache_read_input_tokens": 5}
MESSAGE_START = typed("message_start", message={"usage": MESSAGE_USAGE})
RESPONSE_CREATED = typed("response.created", response={"id": "r"}, sequence_number=0)
MESSAGE_DELTA = typed("message_delta", usage={"output_tokens": 9})
MESSAGE_EVENTS = [MESSAGE_START, typed("ping"), MESSAGE_DELTA]
RESPONSE_EVENTS = [RESPONSE_CREATED, typed("response.output_text.delta", delta="error")]


def response_end(name):
    return typed(f"response.{name}", response={"usage": {"input_tokens": 3}})


TYPED_STREAMS = [
    (apiserver.MessagesStream, MESSAGE_EVENTS, typed("message_stop"), (8, 5, 9)),
    *(
        (apiserver.ResponsesStream, RESPONSE_EVENTS, response_end(name), (3, 0, 0))
        for name in ("completed", "incomplete", "failed")
    ),
]


@cases("make, events, last, usage", *TYPED_STREAMS)
def test_only_its_last_event_completes_a_typed_stream(make, events, last, usage):
    """It is relayed unchanged and its usage counted."""
    data = b"".join([*events, last])
    for stream, out in api_every_cut(make, data):
        assert out == data
        assert stream.ended and stream.error is None and stream.usage == usage
    halves = [events[:number] for number in range(1, len(events) + 1)]
    for half in (*halves, [*events, last[:-9]]):
        with refused(502):
            api_feed(make(), b"".join(half))


@cases("make, events, last, usage", *TYPED_STREAMS[:2])
def test_an_error_event_ends_a_typed_stream(make, events, last, usage):
    for error in ({"error": {"message": "No", "type": "t"}}, {"message": "No"}):
        data = events[0] + typed("error", **error) + last
        for stream, out in api_every_cut(make, data):
            assert out == events[0]
            assert stream.ended and stream.error.message == "No"


def test_text_in_a_typed_stream_does_not_end_it():
    text = 'x "message_stop" "type": "error"'
    data = MESSAGE_START + typed("content_block_delta", delta={"text": text})
    data += b'data: "message_stop"\n\ndata: ["error"]\n\ndata: {"type": []}\n\n'
    stream = apiserver.MessagesStream()
    with pytest.raises(ProtocolError):
        api_feed(stream, data)
    assert stream.error is None


# --- Errors in each dialect


LATE_ERROR = APIError(400, "too\nlong", type="t", param="p", code="c")
OPENAI_ERROR = {"message": "too\nlong", "type": "t", "param": "p", "code": "c"}
MESSAGES_ERROR = {"type": "invalid_request_error", "message": "too\nlong"}


@cases(
    "paths, name, error",
    (f"{CHAT_URL} /v1/completions", b"", {"error": OPENAI_ERROR}),
    ("/v1/messages", b"event: error\n", {"type": "error", "error": MESSAGES_ERROR}),
    ("/v1/embeddings /v1/audio/speech /v1/messages/count_tokens", b"", None),
)
def test_a_late_error_is_an_event_of_its_dialect_if_that_has_one(paths, name, error):
    for path in paths.split():
        event = apiserver.dialect_of(path).late_error(LATE_ERROR, None)
        if error is None:
            assert event == b""
            continue
        start, end = name + b"data: ", b"\n\n"
        assert event.startswith(start) and event.endswith(end)
        assert event.count(b"\n") == name.count(b"\n") + 2
        assert json.loads(event[len(start) :]) == error


def test_a_late_error_of_responses_is_flat_or_a_failed_response():
    dialect = apiserver.dialect_of("/v1/responses")
    stream = dialect.open_stream(APIRequest("/v1/responses"), 1000)
    error = {"code": "c", "message": "too\nlong"}
    flat = {"type": "error", "sequence_number": 0, **error, "param": "p"}
    failed = {"id": "r", "status": "failed", "error": error}
    failed = {"type": "response.failed", "sequence_number": 2, "response": failed}
    begun = RESPONSE_CREATED + typed("response.x")
    for data, expected in ((b"", flat), (begun, failed)):
        stream.receive(data)
        name, error = dialect.late_error(LATE_ERROR, stream).split(b"\n", 1)
        assert name == b"event: " + expected["type"].encode()
        assert json.loads(error[6:]) == expected


@cases(
    "kind, statuses",
    ("invalid_request_error", (400, 405)),
    ("authentication_error", (401,)),
    ("billing_error", (402,)),
    ("permission_error", (403,)),
    ("not_found_error", (404,)),
    ("request_too_large", (413,)),
    ("rate_limit_error", (429,)),
    ("api_error", (500, 502)),
    ("overloaded_error", (503,)),
    ("timeout_error", (504,)),
)
@cases("path", "", "/count_tokens", "/batches")
def test_errors_below_messages_have_anthropics_types(path, kind, statuses):
    for status in statuses:
        dialect = apiserver.dialect_of(f"/v1/messages{path}")
        error = json.loads(dialect.error_content(APIError(status, "No")))
        assert error == {"type": "error", "error": {"type": kind, "message": "No"}}
    # Anthropic's clients retry an `overloaded_error`.
    cancelled = json.loads(dialect.error_content(APIError(503, "No", code="cancelled")))
    assert cancelled["error"]["type"] == "api_error"


@cases("late", False, True)
@cases(
    "upstreams, kind",
    ("overloaded_error", "overloaded_error"),
    ("rate_limit_error", "rate_limit_error"),
    ("authentication_error", "api_error"),  # the client would blame its own key
    ("invented_error", "api_error"),
)
def test_an_upstreams_type_is_kept_where_clients_act_on_it(upstreams, kind, late):
    dialect = apiserver.dialect_of("/v1/messages")
    error = apiserver.ControllerError("No", type=upstreams)
    content = dialect.error_content(error)
    if late:
        content = dialect.late_error(error, None).split(b"data: ")[1]
    assert json.loads(content)["error"] == {"type": kind, "message": "No"}


@cases("path", "/v1/message", "/v1/messagesx", CHAT_URL)
def test_errors_of_other_paths_have_openais_shape(path):
    content = apiserver.dialect_of(path).error_content(APIError(400, "No"))
    assert list(json.loads(content)) == ["error"]


@cases("path", "/v1/messages/other", "/v1/messages/count_tokens")
def test_streams_below_messages_need_no_last_event(path):
    stream = apiserver.dialect_of(path).open_stream(APIRequest(path), 1000)
    assert stream.receive(b"data: a\n\n") + stream.end() == b"data: a\n\n"


# --- Requests


def test_the_parsed_json_of_a_large_request_is_not_kept():
    """It is up to 30 times as large: a few would fill the memory."""
    head = b'{"model": "m", "messages": [], "stream": true, "z": ['
    for size, kept in ((apiserver.APIRequest.KEPT_SIZE, True), (4_000_000, False)):
        room = size - len(head) - 4
        content = head + b"{}," * (room // 3) + b" " * (room % 3) + b"{}]}"
        assert len(content) == size
        with traced() as memory:
            request = apiserver.parse_chat_request(content)
            assert (memory()[0] > size) is kept
        assert (request.model, request.stream) == ("m", True)
        assert request.body["model"] == "m"
        assert json.loads(request.encode("real"))["model"] == "real"


# --- Anything at all

USAGE_CHUNK = chunk(choices=[], usage={"a": 1})
API_SEEDS = [
    chunk("Hi") + chunk("ä😀", "stop", usage=None) + DONE,
    (chunk("Hi", "stop") + USAGE_CHUNK + DONE).replace(b"\n", b"\r\n"),
    b": x\n\n" + chunk("x") + b'data: {"error": {"message": "No"}}\n\n',
    b"\xef\xbb\xbfevent: a\rdata: b\rdata: c\r\rdata: [DONE]\r\r",
]
API_PIECES = (
    b'\n|\r|\r\n|\n\n|\r\r|data: |data:|:|\xff|"error"|"usage"|[DONE]|"finish_reason":"'
    b'|{|}|\x00|data: {"error":1}\n\n|data: {"usage":{},"choices":[]}\n\n|null'
).split(b"|")


def api_outcome(make, data, pieces):
    stream = make()
    try:
        out = api_feed(stream, data, pieces)
    except ProtocolError as error:
        return error.status, stream.began, stream.error, stream.usage
    return api_events(out), stream.began, stream.error, stream.usage


def test_how_bytes_are_cut_never_changes_the_events_of_a_stream():
    rng = random.Random(30)
    hiding = functools.partial(apiserver.CompletionStream, True)
    makers = [apiserver.EventStream, apiserver.CompletionStream, hiding]
    seen = set()
    for _ in range(700):
        data = http_fuzzed(rng, API_SEEDS, API_PIECES)
        make = rng.choice(makers)
        whole = api_outcome(make, data, ())
        seen.add(whole[0] == 502)
        assert api_outcome(make, data, [1] * len(data)) == whole, data
        assert api_outcome(make, data, http_cuts(rng, data)) == whole, data
    assert seen == {True, False}


def test_any_bytes_are_a_chat_request_or_a_400():
    rng = random.Random(31)
    seeds = [
        json.dumps({**CHAT, "stream": True, "stream_options": {}}).encode(),
        b'{"Model": "m", "Messages": [{"Role": "user", "Content": [{"text": "a"}]}]}',
        b'{"model": "\\ud800", "messages": [1.5, {"role": null}], "x": {"y": []}}',
    ]
    pieces = rb'{ } [ ] , : " \u 1e999 NaN - null true 1 "model" "messages" "stream":1,'
    pieces = [*pieces.split(), b"\xff"]
    good = 0
    for _ in range(3000):
        data = http_fuzzed(rng, seeds, pieces)
        try:
            request = apiserver.parse_chat_request(data)
            for options in ({}, {"model": "x"}, {"include_usage": True}):
                assert isinstance(json.loads(request.encode(**options)), dict)
            apiserver.messages_text(request.body["messages"])
            good += 1
        except APIError as error:
            assert error.status == 400
    assert good > 100


# -----------------------------------------------------------------------------
# Connections
# -----------------------------------------------------------------------------
#
# Most tests have a Connection and the bare socket of its peer.

# A certificate authority, and the certificates it signed for one key: for this
# machine, for another name, one that expired in 2020.  The others are valid to 2120.
TEST_CA = """\
-----BEGIN CERTIFICATE-----
MIIBVjCB/aADAgECAgEBMAoGCCqGSM49BAMCMBIxEDAOBgNVBAMMB1Rlc3QgQ0Ew
IBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBIxEDAOBgNVBAMMB1Rl
c3QgQ0EwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAARRFVIWZxBbYnXgkHswAu6m
Jgz+iOHeuQHxB6nvs8349EeV53VlC6iOMXZcPrQAUy59hlhfc3/Luw+lrjSj3knf
o0IwQDAPBgNVHRMBAf8EBTADAQH/MA4GA1UdDwEB/wQEAwIBBjAdBgNVHQ4EFgQU
QRU81d7lS7ddzXEOuIiQuf+N9DowCgYIKoZIzj0EAwIDSAAwRQIgVJxR1h/5mF+9
0tT6h4SVAbNVZJY68K0TM+oeQvsyBgICIQC0WAI7YiZoXWjOFSVXcWWgxxoyC1UK
iY+SpczpBdnN4w==
-----END CERTIFICATE-----
"""
TEST_CERT = """\
-----BEGIN CERTIFICATE-----
MIIBuDCCAV2gAwIBAgIBAjAKBggqhkjOPQQDAjASMRAwDgYDVQQDDAdUZXN0IENB
MCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAPMQ0wCwYDVQQDDARn
b29kMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEpUT3P6sPppRuva+Ni5HNx5b0
prrgjFV3VRicmy5JnoHFiuN+A9cNuz7HT/E3oz9CuWkfUY3qNId9rbbZ9h7fyKOB
pDCBoTAMBgNVHRMBAf8EAjAAMA4GA1UdDwEB/wQEAwIHgDATBgNVHSUEDDAKBggr
BgEFBQcDATAsBgNVHREEJTAjgglsb2NhbGhvc3SHBH8AAAGHEAAAAAAAAAAAAAAA
AAAAAAEwHwYDVR0jBBgwFoAUQRU81d7lS7ddzXEOuIiQuf+N9DowHQYDVR0OBBYE
FB0TVNdPqXcPDMeXcgjUiO91yEM8MAoGCCqGSM49BAMCA0kAMEYCIQCUWI9jJfxs
nEf6GqXMHkL+YGJMNv2hkVg80UX0+ZQzhAIhAPSYcKXS8ynBg7rljiKhg8Ofxnjl
yjUjEERl4/k7mX2o
-----END CERTIFICATE-----
"""
TEST_CERT_WRONG_NAME = """\
-----BEGIN CERTIFICATE-----
MIIBqTCCAU6gAwIBAgIBAzAKBggqhkjOPQQDAjASMRAwDgYDVQQDDAdUZXN0IENB
MCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAQMQ4wDAYDVQQDDAV3
cm9uZzBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABKVE9z+rD6aUbr2vjYuRzceW
9Ka64IxVd1UYnJsuSZ6BxYrjfgPXDbs+x0/xN6M/QrlpH1GN6jSHfa222fYe38ij
gZQwgZEwDAYDVR0TAQH/BAIwADAOBgNVHQ8BAf8EBAMCB4AwEwYDVR0lBAwwCgYI
KwYBBQUHAwEwHAYDVR0RBBUwE4IRZWxzZXdoZXJlLmV4YW1wbGUwHwYDVR0jBBgw
FoAUQRU81d7lS7ddzXEOuIiQuf+N9DowHQYDVR0OBBYEFB0TVNdPqXcPDMeXcgjU
iO91yEM8MAoGCCqGSM49BAMCA0kAMEYCIQCTXd+nAjxjHx8K/jCZ4BjDu3V0VFRn
Svro04L2wnsKDAIhAN6zQXf769grHipEi1MGnztQOWqd3j9gtA8S0wXw+rJp
-----END CERTIFICATE-----
"""
TEST_CERT_EXPIRED = """\
-----BEGIN CERTIFICATE-----
MIIBuDCCAV6gAwIBAgIBBDAKBggqhkjOPQQDAjASMRAwDgYDVQQDDAdUZXN0IENB
MB4XDTIwMDEwMTAwMDAwMFoXDTIwMDIwMTAwMDAwMFowEjEQMA4GA1UEAwwHZXhw
aXJlZDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABKVE9z+rD6aUbr2vjYuRzceW
9Ka64IxVd1UYnJsuSZ6BxYrjfgPXDbs+x0/xN6M/QrlpH1GN6jSHfa222fYe38ij
gaQwgaEwDAYDVR0TAQH/BAIwADAOBgNVHQ8BAf8EBAMCB4AwEwYDVR0lBAwwCgYI
KwYBBQUHAwEwLAYDVR0RBCUwI4IJbG9jYWxob3N0hwR/AAABhxAAAAAAAAAAAAAA
AAAAAAABMB8GA1UdIwQYMBaAFEEVPNXe5Uu3Xc1xDriIkLn/jfQ6MB0GA1UdDgQW
BBQdE1TXT6l3DwzHl3II1IjvdchDPDAKBggqhkjOPQQDAgNIADBFAiEA6eGyCcn9
5x6JLpRY2UXbvJdldlyO38aOl/F8JgBZuXsCIH2FhFJeoH3JdY20A/CcQS8s3j1g
wVXPois/UuyTk2Zr
-----END CERTIFICATE-----
"""
TEST_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgExGSDK+TiPBMQRo5
n9Jyy8Pbb2eMxejINOyyymk30jyhRANCAASlRPc/qw+mlG69r42Lkc3HlvSmuuCM
VXdVGJybLkmegcWK434D1w27PsdP8TejP0K5aR9Rjeo0h32tttn2Ht/I
-----END PRIVATE KEY-----
"""


def tls_server_context(tmp_path, certificate=TEST_CERT):
    """A TLS server's context for this machine; a client's ca_file is ca.pem."""
    (tmp_path / "ca.pem").write_text(TEST_CA)
    (tmp_path / "server.pem").write_text(certificate + TEST_KEY)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    return context


@contextlib.asynccontextmanager
async def connection_pair(**limits):
    """An accepted Connection, and the streams of its peer."""
    loop = asyncio.get_running_loop()
    made = loop.create_future()
    limits = Limits(**limits)
    factory = functools.partial(Connection, limits, made.set_result)
    server = await loop.create_server(factory, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    connection = await made
    try:
        yield connection, reader, writer
    finally:
        connection.abort()
        writer.transport.abort()
        server.close()


@contextlib.asynccontextmanager
async def connection_server(serve, tls=None, **limits):
    """A server of Connections at a port; errors in serve(connection) fail the test."""
    loop = asyncio.get_running_loop()
    limits = Limits(**limits)
    tasks = []

    def made(connection):
        tasks.append(loop.create_task(serve(connection)))

    factory = functools.partial(Connection, limits, made)
    server = await loop.create_server(factory, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result


async def connection_trickle(writer, data, interval=0.02):
    """Write data byte by byte."""
    with contextlib.suppress(ConnectionError):
        for i in range(len(data)):
            writer.write(data[i : i + 1])
            await writer.drain()
            await asyncio.sleep(interval)


# --- Reading


async def test_deadline_can_be_moved_both_ways():
    async with connection_pair(head_timeout=0.01) as (connection, _, writer):
        now = connection.loop.time()
        connection.set_deadline(now + 60)
        writer.write(b"a")
        assert await connection.receive()
        connection.set_deadline(now + 0.05)
        with pytest.raises(asyncio.TimeoutError):
            await connection.receive()


@cases("size, reading", (999, True), (1000, True), (1001, False))
async def test_reading_pauses_when_too_much_is_buffered(size, reading, constant):
    constant(PIPELINED_SIZE=1000)
    async with connection_pair() as (connection, _, writer):
        writer.write(bytes(size))
        await until(lambda: len(connection.buffer) == size)
        assert connection.transport.is_reading() is reading
        connection.buffer.clear()
        writer.write(b"more")
        assert await connection.receive()  # reading resumes
        assert connection.buffer == b"more"


# --- Writing


async def test_a_client_that_reads_is_not_cut_when_others_write():
    """The buffer may even grow meanwhile."""
    async with connection_pair(write_timeout=0.8) as (connection, reader, _):
        connection.write(bytes(20 * 1024 * 1024))
        draining = asyncio.ensure_future(connection.drain())
        await asyncio.sleep(0)
        await reader.readexactly(6 * 1024 * 1024)
        connection.write(bytes(20 * 1024 * 1024))
        await asyncio.sleep(1.0)  # the first interval is over
        assert not draining.done()
        await reader.readexactly(34 * 1024 * 1024)
        await draining


async def test_two_tasks_may_drain_at_once():
    async with connection_pair() as (connection, reader, _):
        connection.write(bytes(16 * 1024 * 1024))
        assert not connection.writable and connection.unsent
        drains = [asyncio.ensure_future(connection.drain()) for _ in range(2)]
        await reader.readexactly(16 * 1024 * 1024)
        await asyncio.gather(*drains)
        await connection.drain()  # nothing to wait for


async def test_drain_and_write_raise_once_the_peer_has_left():
    async with connection_pair() as (connection, _, writer):
        connection.write(bytes(16 * 1024 * 1024))
        draining = asyncio.ensure_future(connection.drain())
        await asyncio.sleep(0)
        connection_cut(writer)
        with pytest.raises(ConnectionResetError):
            await draining
        with pytest.raises(ConnectionResetError):
            connection.write(b"more")


# --- The end


async def test_close_sends_what_was_written():
    async with connection_pair() as (connection, reader, _):
        connection.write(bytes(8 * 1024 * 1024))
        connection.close()
        assert len(await reader.read()) == 8 * 1024 * 1024


async def test_close_does_not_wait_forever(constant):
    constant(LINGER_TIMEOUT=0.1)
    async with connection_pair() as (connection, _, _writer):
        connection.write(bytes(16 * 1024 * 1024))
        connection.close()
        await until(lambda: connection.lost)


async def test_a_tls_connection_may_be_closed_twice_and_ends(tmp_path, constant):
    """The peer does not answer close_notify; later calls do no harm."""
    constant(LINGER_TIMEOUT=0.2)
    accepted = []

    async def serve(connection):
        connection.write(b"x")
        assert connection.tls
        connection.close()
        connection.close()
        accepted.append(connection)

    context = tls_server_context(tmp_path)
    async with connection_server(serve, context) as port:
        trusting = ssl.create_default_context(cafile=tmp_path / "ca.pem")
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.setblocking(False)
            wire, sent = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = trusting.wrap_bio(wire, sent, server_hostname="127.0.0.1")
            while not accepted:  # the handshake by hand, and then nothing more
                with contextlib.suppress(ssl.SSLWantReadError):
                    tls.do_handshake()
                with contextlib.suppress(BlockingIOError):
                    sock.send(sent.read())
                    wire.write(sock.recv(65536))
                await asyncio.sleep(0.001)
            (connection,) = accepted
            await until(lambda: connection.lost)
        assert connection.unsent == 0 and connection.closing
        with pytest.raises(ConnectionResetError):
            connection.write(b"late")
        connection.abort()


async def test_an_answer_can_be_read_while_the_request_is_still_sent():
    """RFC 9112 section 9.6: without lingering, an RST may destroy it."""
    async with connection_pair() as (connection, reader, writer):
        writer.write(bytes(10_000))
        await connection.receive()
        connection.write(b"413 and why")
        async with beside(connection.linger()) as lingering:
            await asyncio.sleep(0)
            for _ in range(10):
                writer.write(bytes(10_000))
                await writer.drain()
                await asyncio.sleep(0.005)
            assert await reader.read() == b"413 and why"
            assert not lingering.done()
            writer.close()
            await lingering


@cases("limits", {"LINGER_TIMEOUT": 0.1}, {"LINGER_TIMEOUT": 60, "LINGER_SIZE": 50_000})
async def test_lingering_is_limited_in_time_and_bytes(limits, constant):
    """Bytes do not extend the time."""
    constant(**limits)
    async with connection_pair() as (connection, _, writer):
        large = "LINGER_SIZE" in limits
        data, interval = (bytes(1024 * 1024), 0) if large else (bytes(1000), 0.01)
        writer.write(data[: len(data) * large])
        async with beside(connection_trickle(writer, data, interval)):
            await asyncio.wait_for(connection.linger(), 5)
            await until(lambda: connection.lost)


@cases("eof_is_hangup", True, False)
@cases("end", "fin", "rst")
async def test_a_hang_up_is_reported_once(eof_is_hangup, end):
    async with connection_pair() as (connection, _, writer):
        calls = []
        connection.eof_is_hangup = eof_is_hangup
        connection.on_hangup = lambda: calls.append(1)
        writer.write_eof() if end == "fin" else connection_cut(writer)
        await until(lambda: connection.eof)
        # After its EOF a peer may still be reading.
        assert len(calls) == (end == "rst" or eof_is_hangup)
        connection.abort()
        await until(lambda: connection.lost)
        assert len(calls) == 1


async def test_a_hang_up_is_reported_only_to_a_waiting_receive():
    async with connection_pair() as (connection, _, writer):
        calls = []
        connection.on_hangup = lambda: calls.append(1)
        receiving = asyncio.ensure_future(connection.receive())
        await asyncio.sleep(0)
        connection_cut(writer)
        assert await receiving is False and not calls


async def test_accepted_sockets_have_keepalive_and_nodelay():
    async with connection_pair() as (connection, _, _writer):
        sock = connection.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert connection.peer == "127.0.0.1" and not connection.tls


async def test_a_transport_need_not_be_a_subclass_of_asyncios():
    """uvloop's is not: it only has to have the methods."""

    class Transport:
        def set_write_buffer_limits(self, high, low):
            self.limits = (high, low)

        def get_extra_info(self, name, default=None):
            return default

    connection, transport = apiserver.Connection(), Transport()
    connection.connection_made(transport)
    assert connection.transport is transport
    assert transport.limits == (64 * 1024, 16 * 1024)


# --- HTTPClient


@contextlib.asynccontextmanager
async def connection_streams(serve, tls=None):
    """A server at a port whose connections serve(reader, writer) handles."""
    tasks = set()

    async def served(reader, writer):
        tasks.add(asyncio.current_task())
        try:
            await serve(reader, writer)
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(served, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def client_of(behave=None, tls=None, **options):
    """A fake upstream that behaves like this, and an HTTPClient for it."""
    async with Upstream(behave, tls=tls) as upstream:
        with contextlib.closing(HTTPClient(upstream.url, **options)) as client:
            yield upstream, client


async def get(client, target="/x", max_size=1024 * 1024, **options):
    """GET target and read the answer to its end: status and content."""
    answer = await client.request("GET", target, [], **options)
    try:
        return answer.status, await answer.read_all(max_size)
    finally:
        await answer.aclose()


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


async def test_requests_share_a_connection():
    async with client_of(OK) as (upstream, client):
        for _ in range(3):
            assert await get(client) == (200, b"ok")
        answer = await client.request("POST", "/y?z", [("X-A", "b")], b"content")
        assert await answer.read_all(2) == b"ok"
        assert upstream.connections == 1
        last = upstream.requests[-1]
        assert last.line == "POST /v1/y?z HTTP/1.1" and last.content == b"content"
        assert last.headers["host"] == f"127.0.0.1:{upstream.port}"
        assert (last.headers["content-length"], last.headers["x-a"]) == ("7", "b")
        client.close()
        await until(lambda: upstream.ended == 1)


async def test_a_connection_made_for_a_cancelled_request_is_closed():
    async with client_of() as (upstream, client):
        asking = asyncio.ensure_future(client.request("GET", "/x", []))
        dialing = None
        while dialing is None:
            await asyncio.sleep(0)
            named = {task.get_coro().__name__: task for task in asyncio.all_tasks()}
            dialing = named.get("_connect")
        while not dialing.done():
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking])
        assert asking.cancelled() and dialing.result().transport
        await until(lambda: upstream.connections == upstream.ended == 1)
        assert upstream.requests == []


@cases(
    "answer",
    b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\n\r\nok",  # ends with the connection
)
async def test_a_connection_that_will_close_is_not_kept(answer):
    end = None if b"Length" in answer else connection_close
    async with client_of(sends(answer, end)) as (upstream, client):
        assert await get(client) == await get(client) == (200, b"ok")
        assert upstream.connections == 2
        await until(lambda: upstream.ended == 2)


async def test_an_answer_not_read_to_its_end_costs_its_connection():
    async with client_of(sends(STREAM_HEAD + chunked(b"one"))) as (upstream, client):
        answer = await client.request("GET", "/", [])
        assert await answer.read() == b"one"
        await answer.aclose()
        await until(lambda: upstream.ended == 1)
        assert await answer.read() == b""


def coded_reply(coding, data, framing="length"):
    """A 200 with this Content-Encoding; framing: "length", "chunked" or "close"."""
    head = f"HTTP/1.1 200 OK\r\nX: y\r\nContent-Encoding: {coding}\r\n"
    if framing == "length":
        head += f"Content-Length: {len(data)}\r\n"
    elif framing == "chunked":
        head += "Transfer-Encoding: chunked\r\n"
        data = b"".join(chunked(data[n : n + 7]) for n in range(0, len(data), 7))
        data += apiserver.LAST_CHUNK
    return f"{head}\r\n".encode() + data


@cases("end", connection_close, connection_cut)
async def test_a_request_is_replayed_when_its_kept_connection_has_died(end):
    """Once, and only before any byte of an answer; on a new connection it fails."""

    async def behave(request, writer):
        steps = [OK if len(upstream.requests) in works else end]
        await sends(*steps)(request, writer)

    async with client_of(behave) as (upstream, client):
        works = {1, 3}
        assert await get(client) == await get(client) == (200, b"ok")
        assert upstream.connections == 2 and len(upstream.requests) == 3
        works = set()
        for requests in (5, 6):  # the first one's replay fails, too
            with pytest.raises(ConnectionResetError):
                await get(client)
            assert len(upstream.requests) == requests
        await until(lambda: upstream.ended == upstream.connections)


async def test_a_kept_connections_408_is_about_its_idle_time():
    """RFC 9110 section 15.5.9; on a new connection it answers the request."""

    async def behave(request, writer):
        kept = len(upstream.requests) == 2
        await sends(http_reply(b"", 408) if kept or always else OK)(request, writer)

    async with client_of(behave) as (upstream, client):
        always = False
        assert await get(client) == await get(client) == (200, b"ok")
        assert upstream.connections == 2 and len(upstream.requests) == 3
        client.close()
        always = True
        assert await get(client) == (408, b"")
        assert len(upstream.requests) == 4


async def test_a_late_408_is_an_answer_on_a_kept_connection_too(constant):
    """As Azure's: asking again would take, and cost, as much again."""
    constant(EARLY_ANSWER_TIME=0.05)

    async def behave(request, writer):
        late = sends(0.1, http_reply(b"", 408))
        await (late if len(upstream.requests) > 1 else sends(OK))(request, writer)

    async with client_of(behave) as (upstream, client):
        assert await get(client) == (200, b"ok")
        assert await get(client) == (408, b"")
        assert len(upstream.requests) == 2


@cases("begun", b"HTTP/1.1 103 Early Hints\r\n\r\n", b"H", b"HTTP/1.1 200 OK\r\n")
async def test_a_request_whose_answer_had_begun_is_not_replayed(begun):
    """Not even after an interim answer: the upstream may have acted on it."""

    async def behave(request, writer):
        steps = [OK] if len(upstream.requests) == 1 else [begun, connection_close]
        await sends(*steps)(request, writer)

    async with client_of(behave) as (upstream, client):
        assert await get(client) == (200, b"ok")
        with pytest.raises(ConnectionResetError):
            await client.request("POST", "/", [], b"x")
        assert len(upstream.requests) == 2


@cases("framing", "length", "chunked", "close")
@cases("coding", "gzip", "deflate", "none", "", "Identity")
async def test_a_coded_answer_is_read_although_none_was_requested(coding, framing):
    text = b"some text " * 50_000
    data = CODINGS.get(coding, bytes)(text)
    end = connection_close if framing == "close" else None
    reply = sends(coded_reply(coding, data, framing), end)
    async with client_of(reply) as (upstream, client):
        for _ in range(2):
            answer = await client.request("GET", "/", [])
            assert "content-encoding" not in answer.headers
            assert coding != "gzip" or "content-length" not in answer.headers
            assert await answer.read_all(len(text)) == text
        assert upstream.connections == (2 if framing == "close" else 1)


async def test_an_inflated_answer_has_the_limit_of_a_plain_one():
    reply = coded_reply("gzip", gzip.compress(bytes(500_000)))
    async with client_of(reply) as (_, client):
        with pytest.raises(ProtocolError, match="over 400000 bytes"):
            await get(client, max_size=400_000)


async def test_inflating_an_answer_does_not_block_the_loop():
    reply = coded_reply("gzip", gzip.compress(b"some text " * 200_000))
    async with client_of(reply) as (_, client):
        answer = await client.request("GET", "/", [])
        await until(lambda: answer._connection.buffer.endswith(reply[-9:]))
        turns = 0

        async def count():
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        async with beside(count()):
            assert len(await answer.read_all(2_000_000)) == 2_000_000
        assert turns > 20


@cases(
    "reply",
    coded_reply("br", b"x"),
    coded_reply("gzip", b"{}"),
    coded_reply("gzip", gzip.compress(b"{}")[:-1]),
    coded_reply("gzip", gzip.compress(b"{}") + b"garbage", "chunked"),
    coded_reply("gzip", gzip.compress(b"{}")[:-5], "close"),
)
async def test_an_answer_that_cannot_be_inflated_is_an_error(reply):
    end = None if b"Length" in reply or b"chunked" in reply else connection_close
    async with client_of(sends(reply, end)) as (_, client):
        with pytest.raises(ProtocolError):
            await get(client)


@cases("end", connection_close, connection_cut)
@cases(
    "data",
    b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf",
    STREAM_HEAD + chunked(b"half"),
    STREAM_HEAD + b"9\r\nhalf",
    STREAM_HEAD + chunked(b"half") + b"0\r\n",
)
async def test_an_answer_cut_short_is_never_complete(data, end):
    async with client_of(sends(data, end)) as (_, client):
        with pytest.raises((ProtocolError, ConnectionResetError)):
            await get(client)


@cases(
    "data",
    STREAM_HEAD + b"x\r\nok\r\n0\r\n\r\n",
    STREAM_HEAD + b"2\r\nokXX0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nok",
    STREAM_HEAD.replace(b"\r\n\r\n", b"\r\nContent-Length: 2\r\n\r\n") + b"ok",
    b"HTTP/1.1 OK\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n",
    b"\x15\x03\x01\x00\x02\x02\x16\r\n\r\n",
)
async def test_a_malformed_answer_is_refused_and_its_connection_is_not_kept(data):
    async with client_of(data) as (upstream, client):
        for number in (1, 2):
            with pytest.raises(ProtocolError):
                await get(client)
            await until(lambda number=number: upstream.ended == number)


@cases(
    "start, more",
    (b"HTTP/1.1 200 OK\r\n", b"X: " + b"y" * 100 + b"\r\n"),
    (b"HTTP/1.1 200 OK\r\nX: ", b"y" * 1000),
    (b"HTTP/1.1 200 ", b"O" * 1000),
    (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 201 + b"\r\n", b""),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999999\r\n\r\n", b""),
    (STREAM_HEAD, chunked(b"x" * 10_000)),
    (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 10_000),
    ids="fields field status-line interim 201-fields declared chunked close".split(),
)
async def test_endless_heads_and_content_are_given_up(start, more):
    """At once if a length is declared, or else when the limit is reached."""
    sent = 0

    async def behave(request, writer):
        nonlocal sent
        writer.write(start)
        while more:
            writer.write(more * 100)
            sent += len(more) * 100
            await writer.drain()
            await asyncio.sleep(0)
        await asyncio.sleep(60)

    async with client_of(behave) as (upstream, client):
        with pytest.raises(ProtocolError):
            await asyncio.wait_for(get(client, max_size=100_000), 5)
        await until(lambda: upstream.ended == 1)
        assert sent < 16 * 1024 * 1024


@cases("count, works", (0, True), (16, True), (17, False))
async def test_interim_answers_are_skipped_up_to_a_limit(count, works):
    statuses = [(100, 102, 103)[i % 3] for i in range(count)]
    interim = b"".join(b"HTTP/1.1 %d X\r\nA: b\r\n\r\n" % status for status in statuses)
    async with Upstream(interim + OK) as upstream:
        with refused(None if works else 502):
            assert await get(HTTPClient(upstream.url)) == (200, b"ok")


@cases("size, works", (999, True), (1000, True), (1001, False))
@cases("framing", "length", "chunked", "chunks", "close")
async def test_an_answer_has_a_largest_size(size, works, framing):
    body, last = b"x" * size, b"0\r\n\r\n"
    steps = {
        "length": [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size, body],
        "chunked": [STREAM_HEAD, chunked(body), last],
        "chunks": [STREAM_HEAD, chunked(b"x") * size, last],
        "close": [b"HTTP/1.1 200 OK\r\n\r\n", body, connection_close],
    }
    async with client_of(sends(*steps[framing])) as (_, client):
        with refused(None if works else 413):
            assert await get(client, max_size=1000) == (200, body)


@cases("later", False, True, ids=["same-packet", "later"])
async def test_bytes_after_an_answer_never_reach_the_next_request(later):
    """Response splitting: such a connection is closed."""
    poison = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nPOISON"

    async def behave(request, writer):
        writer.write(OK if later else OK + poison)
        if later:
            await arrived.wait()
            writer.write(poison)
            await writer.drain()
            poisoned.set()

    async with client_of(behave) as (upstream, client):
        for number in range(1, 21):
            arrived, poisoned = asyncio.Event(), asyncio.Event()
            assert await get(client) == (200, b"ok")
            assert upstream.connections == number
            if later:
                arrived.set()
                await poisoned.wait()
                await until(lambda: all(c.buffer for c in client._idle))
        client.close()
        await until(lambda: upstream.ended == 20)


@cases("status", 301, 302, 303, 307, 308)
async def test_a_redirect_is_not_followed(status):
    """The key would go wherever an upstream sends it."""
    async with Upstream(OK) as elsewhere:
        answer = http_reply(b"no", status, headers=[("Location", elsewhere.url)])
        async with Upstream(answer) as upstream:
            assert await get(HTTPClient(upstream.url)) == (status, b"no")
        assert elsewhere.connections == 0


async def test_a_line_break_in_a_request_is_refused_before_anything_opens():
    async with client_of(OK) as (upstream, client):
        for target, field in [("/\r\nX: y", "z"), ("/", "z\r\nX: y")]:
            with pytest.raises(ProtocolError):
                await client.request("GET", target, [("A", field)])
        with pytest.raises(ProtocolError):
            await WebSocket.connect(upstream.url, fields=[("A", "b\r\nC: d")])
        assert upstream.connections == 0


async def test_idle_connections_are_closed_after_a_time():
    limits = Limits(idle_upstream_timeout=0.1)
    async with client_of(OK, limits=limits) as (upstream, client):
        await get(client)
        await asyncio.sleep(0.05)
        await asyncio.gather(get(client), get(client))  # opens a second one
        assert upstream.connections == 2 and upstream.ended == 0
        await until(lambda: upstream.ended == 2)
        assert await get(client) == (200, b"ok")


async def test_the_number_of_idle_connections_is_limited(constant):
    constant(IDLE_CONNECTIONS=2)

    async def behave(request, writer):
        await until(lambda: len(upstream.requests) == 3)
        writer.write(OK)

    async with client_of(behave) as (upstream, client):
        await asyncio.gather(*(get(client) for _ in range(3)))
        await until(lambda: upstream.ended == 1)
        client.close()
        await until(lambda: upstream.ended == 3)


@cases("size", 2, 70_000)  # after so much without a reader, the connection is paused
async def test_an_idle_connection_that_the_upstream_closes_is_forgotten(size):
    reply = http_reply(bytes(size))
    steps = sends(reply[:-size], 0.02, reply[-size:])
    async with client_of(steps) as (upstream, client):
        answer = await client.request("GET", "/", [])
        await until(lambda: len(answer._connection.buffer) == size)
        await answer.read_all(size)
        for task in upstream.tasks:
            task.cancel()
        await until(lambda: not client._idle)
        assert await get(client) == (200, bytes(size))
        assert len(upstream.requests) == 2  # no replay was needed


async def test_a_cancelled_request_closes_its_connection():
    async with Upstream(sends(60)) as upstream:
        work = asyncio.ensure_future(get(HTTPClient(upstream.url)))
        await until(lambda: upstream.requests)
        work.cancel()
        await until(lambda: upstream.ended == 1, 1)


# --- Early answers


def early(*steps):
    """Serve one request: take these steps when its head has been read."""

    async def serve(reader, writer):
        line = (await reader.readuntil(b"\r\n\r\n")).decode()
        await sends(*steps, 60)(UpstreamRequest(line, {}, b""), writer)

    return serve


REFUSAL = http_reply({"error": {"message": "too large for me"}}, 413)


@cases("size", 100, 200_000, 12_000_000)
@cases("end", connection_close, connection_cut, None)
@cases("delay", 0, 0.1)
async def test_an_answer_before_the_end_of_the_request_is_read(size, end, delay):
    """RFC 9112 section 9.5: unread content turns a close into a reset."""
    async with connection_streams(early(delay, REFUSAL, end)) as port:
        client = HTTPClient(f"http://127.0.0.1:{port}")
        for _ in range(3):
            answer = await client.request("POST", "/", [], bytes(size))
            assert answer.status == 413
            assert b"too large for me" in await answer.read_all(1000)
            await answer.aclose()
            if size == 12_000_000:
                assert not client._idle  # the rest of the content was not sent
            client.close()


@cases(
    "tls, early_answer, works",
    (True, REFUSAL, True),
    (False, REFUSAL[:-10], True),  # a reset in the content leaves the status
    (False, b"", False),
    (False, b"HTTP/1.1 413 Payload Too La", False),
)
async def test_half_an_early_answer_is_read_but_no_half_head(
    tmp_path, tls, early_answer, works
):
    context = tls_server_context(tmp_path) if tls else None
    serve = early(early_answer, connection_close if tls else connection_cut)
    async with connection_streams(serve, context) as port:
        options = {"ca_file": str(tmp_path / "ca.pem")} if tls else {}
        client = HTTPClient(f"http{'s' * tls}://127.0.0.1:{port}", **options)
        with contextlib.nullcontext() if works else pytest.raises(ConnectionError):
            answer = await client.request("POST", "/", [], bytes(12_000_000))
            assert answer.status == 413 and b"too large" in await answer.read_all(1000)


@cases("limits, deadline", ({"write_timeout": 0.2}, 60), ({}, 0.2))
async def test_an_upstream_that_takes_no_content_is_given_up(limits, deadline):
    async with connection_streams(early()) as port:
        client = HTTPClient(f"http://127.0.0.1:{port}", limits=Limits(**limits))
        end = asyncio.get_running_loop().time() + deadline
        with pytest.raises(asyncio.TimeoutError):
            await client.request("POST", "/", [], bytes(12_000_000), deadline=end)


async def test_the_first_byte_timeout_starts_after_the_content():
    async def behave(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(0.4)
        await reader.readexactly(12_000_000)
        writer.write(OK)
        await asyncio.sleep(60)

    async with connection_streams(behave) as port:
        limits = Limits(first_byte_timeout=0.3)
        client = HTTPClient(f"http://127.0.0.1:{port}", limits=limits)
        answer = await client.request("POST", "/", [], bytes(12_000_000))
        assert await answer.read_all(2) == b"ok"


# --- Deadlines


@cases(
    "data, limits, options",
    (b"", {"first_byte_timeout": 0.1}, {}),
    (b"", {}, {"first_byte_timeout": 0.1}),
    (b"HTTP/1.1 200 OK\r\nContent-Le", {"first_byte_timeout": 0.1}, {}),
    (OK[:-1], {"silence_timeout": 0.1}, {}),
    (STREAM_HEAD + chunked(b"one"), {"silence_timeout": 0.1}, {}),
    ids=["hang", "hang-option", "hang-headers", "hang-body", "hang-stream"],
)
async def test_a_silent_upstream_is_given_up(data, limits, options):
    behave = sends(data, 60)
    async with client_of(behave, limits=Limits(**limits)) as (upstream, client):
        with pytest.raises(asyncio.TimeoutError):
            await get(client, **options)
        await until(lambda: upstream.ended == 1)


@cases(
    "start, more, limits, deadline",
    (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", {"first_byte_timeout": 0.15}, 60),
    (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", {}, 0.15),
    (STREAM_HEAD, chunked(b"x"), {}, 0.15),
    ids=["head", "head-deadline", "content"],
)
async def test_a_trickle_does_not_extend_a_deadline(start, more, limits, deadline):
    behave = sends(start, *[more, 0.02] * 150)
    async with client_of(behave, limits=Limits(**limits)) as (_, client):
        end = asyncio.get_running_loop().time() + deadline
        with takes(0.1, 2), pytest.raises(asyncio.TimeoutError):
            await get(client, deadline=end)


async def test_a_slow_stream_may_take_its_time_if_it_is_not_silent():
    limits = Limits(silence_timeout=0.5, first_byte_timeout=0.5)
    async with client_of(streams(*[0.05, b"x"] * 12), limits=limits) as (_, client):
        assert await get(client) == (200, b"x" * 12)


async def test_the_last_chunk_gets_only_a_moment():
    async def behave(request, writer):
        pause = 0.02 if len(upstream.requests) == 1 else 60
        await streams(b"one", pause)(request, writer)

    async with client_of(behave) as (upstream, client):
        for _ in range(2):
            answer = await client.request("GET", "/", [])
            assert await answer.read() == b"one"
            await asyncio.wait_for(answer.finish(), 5)
            await answer.aclose()
            assert upstream.connections == 1
        await until(lambda: upstream.ended == 1)


# --- Connecting


@contextlib.contextmanager
def black_hole(host="127.0.0.1", port=0):
    """A port with a full backlog: connections are neither accepted nor refused."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind((host, port))
        listener.listen(0)
        address = listener.getsockname()
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(address)
        yield address[1]


def refusing_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


async def test_a_refused_connection_fails_at_once_and_the_log_names_its_address(
    server, log
):
    address = f"127.0.0.1:{refusing_port()}"
    server.add(OpenAIController("k", name="one", base_url=f"http://{address}/v1"))
    with takes(0, 1):
        reply = await chat(server)
    assert chat_error(reply)["message"] == "one: nothing listens there"
    assert f"one: nothing listens there (http://{address}/v1)" in log.text


@cases("abort", False, True)
async def test_a_connection_closed_in_the_tls_handshake_says_so(abort):
    """asyncio's own error for it has no text."""

    async def close(reader, writer):
        await reader.read(1)
        writer.transport.abort() if abort else writer.close()

    async with connection_streams(close) as port:
        with pytest.raises(ConnectionResetError) as caught:
            await get(HTTPClient(f"https://127.0.0.1:{port}"))
    problem = "it hung up during the TLS handshake; is it http?"
    assert apiserver.connection_problem(caught.value) == problem


def test_connection_problems_are_never_empty():
    errors = OSError(), ConnectionResetError(), asyncio.TimeoutError()
    for error in (*errors, ProtocolError(502, "")):
        problem = apiserver.connection_problem(error)
        assert re.search(r"\w{4}", problem) and "None" not in problem


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse")
async def test_a_black_hole_is_given_up_after_connect_timeout():
    with black_hole() as port:
        limits = Limits(connect_timeout=0.2)
        client = HTTPClient(f"http://127.0.0.1:{port}", limits=limits)
        with takes(0.15, 2), pytest.raises(asyncio.TimeoutError):
            await get(client)


async def test_the_next_address_is_tried_when_the_first_is_dead():
    """Refused, or unanswered for a moment (RFC 8305)."""
    async with Upstream(OK) as upstream, contextlib.AsyncExitStack() as stack:
        dead = ["127.0.0.2"]
        if sys.platform == "linux":
            stack.enter_context(black_hole("127.0.0.3", upstream.port))
            dead.append("127.0.0.3")
        asked = []

        def resolve(host, port):
            asked.append((host, port))
            return [*dead, "127.0.0.1"]

        client = HTTPClient(f"http://name.example:{upstream.port}", resolve=resolve)
        with takes(0, 3):  # connect_timeout is 10
            assert await get(client) == (200, b"ok")
        assert asked == [("name.example", upstream.port)]
        assert upstream.requests[0].headers["host"] == (f"name.example:{upstream.port}")


@cases(
    "found, problem",
    (socket.gaierror(8, "not known"), "name.example could not be resolved: not known"),
    (None, "name.example has no address"),
)
async def test_a_name_without_an_address_is_reported(found, problem):
    def resolve(host, port):
        if found:
            raise found
        return []

    client = HTTPClient("http://name.example", resolve=resolve)
    for _ in range(2):
        with pytest.raises(OSError, match=problem):
            await get(client)


async def test_a_hanging_resolver_is_called_once_and_given_up():
    """All requests wait for the same lookup, whose late answer is used."""
    answered = threading.Event()
    asked = []

    def resolve(host, port):
        asked.append(host)
        answered.wait(20)
        return ["127.0.0.1"]

    async with Upstream(OK) as upstream:
        options = {"resolve": resolve, "limits": Limits(connect_timeout=0.1)}
        client = HTTPClient(f"http://name.example:{upstream.port}", **options)
        requests = (get(client) for _ in range(3))
        results = await asyncio.gather(*requests, return_exceptions=True)
        assert {type(r) for r in results} == {asyncio.TimeoutError}
        assert len(asked) == 1
        answered.set()
        await until(lambda: client._lookup.done())
        assert await get(client) == (200, b"ok")


def test_a_hanging_resolver_does_not_keep_the_process_alive(tmp_path):
    """Threads of the default executor are joined at exit."""
    program = textwrap.dedent("""
        import asyncio, threading, chatgpt_apiserver as a
        async def main():
            client = a.HTTPClient('http://name.example',
                limits=a.Limits(connect_timeout=0.1),
                resolve=lambda host, port: threading.Event().wait())
            try:
                await client.request('GET', '/', [])
            except asyncio.TimeoutError:
                print('given up')
        asyncio.run(main())
    """)
    done = run_python("-c", program, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "given up\n", "")


@cases("url", "ftp://x", "x", "http://", "http:///v1", "")
def test_a_url_without_a_host_or_known_scheme_is_refused(url):
    with pytest.raises(ValueError, match="is not an http or https URL"):
        HTTPClient(url)


@cases(
    "url, authority, path",
    ("http://host", "host", ""),
    ("http://host:80/v1/", "host", "/v1"),
    ("https://host:443/a/b", "host", "/a/b"),
    ("https://host:80", "host:80", ""),
    ("ws://host:8080/k/x", "host:8080", "/k/x"),
    ("wss://host", "host", ""),
    ("http://[::1]:8080", "[::1]:8080", ""),
)
def test_a_url_is_split_into_authority_and_path(url, authority, path):
    address = apiserver.Address.of(url)
    assert (address.authority, address.path) == (authority, path)
    assert address.scheme in ("http", "https")


# --- TLS


@cases(
    "certificate, options, works",
    (TEST_CERT, {"ca_file": "ca.pem"}, True),
    (TEST_CERT, {}, False),  # unknown to the system
    (TEST_CERT, {"ca_file": "none.pem"}, False),
    (TEST_CERT_EXPIRED, {"ca_file": "ca.pem"}, False),
    (TEST_CERT_WRONG_NAME, {"ca_file": "ca.pem"}, False),
    (TEST_CERT_WRONG_NAME, {"verify": False}, True),
    ids=["ca", "unknown-ca", "no-ca", "expired", "wrong-name", "not-verified"],
)
@cases("host", "127.0.0.1", "localhost")
async def test_certificates_are_checked(tmp_path, certificate, options, works, host):
    """An unverified connection is never used."""
    context = tls_server_context(tmp_path, certificate)
    missing = options.get("ca_file") == "none.pem"
    if "ca_file" in options:
        options = {"ca_file": str(tmp_path / options["ca_file"])}
    async with Upstream(OK, tls=context) as upstream:
        url, addresses = f"https://{host}:{upstream.port}", ["127.0.0.1"]
        client = HTTPClient(url, resolve=lambda host, port: addresses, **options)
        if works:
            assert await get(client) == await get(client) == (200, b"ok")
            assert upstream.connections == 1
        else:
            error = FileNotFoundError if missing else ssl.SSLCertVerificationError
            with pytest.raises(error) as caught:
                await get(client)
            # ca_file does not help with another name or an expired certificate.
            untrusted = certificate is TEST_CERT and not missing
            problem = apiserver.connection_problem(caught.value)
            assert ("set ca_file" in problem) == untrusted
        assert len(upstream.requests) == 2 * works


async def test_a_tls_stream_cut_short_is_an_error(tmp_path):
    data = STREAM_HEAD + chunked(b"x" * 300_000)
    tls, ca_file = tls_server_context(tmp_path), str(tmp_path / "ca.pem")
    behave = sends(data, connection_cut)
    async with client_of(behave, tls, ca_file=ca_file) as (_, client):
        with pytest.raises((ProtocolError, OSError)):
            await get(client)


@cases("answer", b"", b"HTTP/1.1 400 No TLS\r\n\r\n", ids=["hang", "plain"])
async def test_a_tls_handshake_that_hangs_or_is_plain_text_fails(answer):
    async def serve(reader, writer):
        await reader.read(1)
        writer.write(answer)
        await asyncio.sleep(60)

    async with connection_streams(serve) as port:
        client = HTTPClient(f"https://127.0.0.1:{port}", limits=Limits(tls_timeout=0.2))
        with takes(0, 3), pytest.raises(OSError):
            await get(client)


async def test_plain_bytes_before_the_tls_handshake_are_refused():
    """An attacker on the path could answer for the upstream."""
    context = apiserver.client_tls_context(None, 0, True)
    async with connection_pair() as (connection, _, writer):
        writer.write(OK)
        await until(lambda: connection.buffer)
        with pytest.raises(ConnectionResetError, match="before the TLS handshake"):
            await connection.start_tls(context, "127.0.0.1")


async def test_a_ca_file_without_a_certificate_is_named(tmp_path):
    file = tmp_path / "ca.pem"
    file.write_text("no certificate")
    async with Upstream(OK) as upstream:
        url = f"https://127.0.0.1:{upstream.port}"
        with pytest.raises(OSError) as caught:
            await get(HTTPClient(url, ca_file=str(file)))
    problem = apiserver.connection_problem(caught.value)
    assert problem == "its ca_file holds no certificate (PEM)"


async def test_equal_tls_settings_share_a_context(tmp_path):
    def context(ca_file, verify=True):
        changed = os.stat(ca_file).st_mtime_ns if ca_file else 0
        return apiserver.client_tls_context(ca_file, changed, verify)

    file = tmp_path / "ca.pem"
    file.write_text(TEST_CA)
    assert context(None) is context(None) is not context(None, False)
    assert context(str(file)) is context(str(file)) is not context(None)
    before = context(str(file))
    os.utime(file, ns=(1, 1))
    assert context(str(file)) is not before


# --- Proxies


class Proxy:
    """A proxy that answers CONNECT, and connects both sides after a 200.

    answer  bytes, or None for no answer
    end     a function of the writer that ends the connection

    heads collects the heads of requests.
    """

    def __init__(self, answer=b"HTTP/1.1 200 OK\r\n\r\n", end=None):
        self.answer, self.end = answer, end
        self.heads = []

    async def serve(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.heads.append(head)
        writer.write(self.answer or b"")
        if self.end is not None:
            self.end(writer)
        if b" 200 " not in (self.answer or b"") or self.end:
            await asyncio.sleep(60)
        host, _, port = head.split()[1].rpartition(":")
        there, back = await asyncio.open_connection(host, int(port))
        try:
            await asyncio.gather(self.relay(reader, back), self.relay(there, writer))
        finally:
            back.transport.abort()

    async def relay(self, reader, writer):
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    def serving(self):
        return connection_streams(self.serve)


@cases("tls", True, False)
async def test_everything_goes_through_the_proxys_tunnel(tmp_path, tls):
    context = tls_server_context(tmp_path) if tls else None
    proxy, ca_file = Proxy(), str(tmp_path / "ca.pem")
    async with Upstream(OK, tls=context) as upstream, proxy.serving() as port:
        options = {"proxy": f"http://us%40er:p%3Aw@127.0.0.1:{port}"}
        client = HTTPClient(upstream.url, ca_file=tls and ca_file or None, **options)
        assert await get(client, "/x?y") == await get(client) == (200, b"ok")
        client.close()
    (head,) = proxy.heads
    authority = f"127.0.0.1:{upstream.port}"
    assert head.startswith(f"CONNECT {authority} HTTP/1.1\r\n")
    assert f"Host: {authority}\r\n" in head
    credentials = base64.b64encode(b"us@er:p:w").decode()
    assert f"Proxy-Authorization: Basic {credentials}\r\n" in head
    request = upstream.requests[0]
    assert request.line == "GET /v1/x?y HTTP/1.1"
    assert request.headers["host"] == authority
    assert "proxy-authorization" not in request.headers


@cases(
    "answer, end",
    (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", None),
    (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n", None),
    (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\n\r\n", None),
    (b"garbage\r\n\r\n", None),
    (b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", None),  # spoke too early
    (b"HTTP/1.1 200 OK\r\n\r\n", connection_close),  # in the TLS handshake
    (b"HTTP/1.1 200 OK\r\n\r\n", connection_cut),
    (None, None),  # hangs
    (None, connection_close),
    (None, connection_cut),
    (b"HTTP/1.1 200", connection_close),
)
async def test_a_failing_proxy_is_never_bypassed(tmp_path, answer, end):
    proxy = Proxy(answer, end)
    tls = tls_server_context(tmp_path)
    async with Upstream(OK, tls=tls) as upstream, proxy.serving() as port:
        options = {"limits": Limits(connect_timeout=0.3, tls_timeout=0.3)}
        options.update(ca_file=str(tmp_path / "ca.pem"))
        client = HTTPClient(upstream.url, proxy=f"http://127.0.0.1:{port}", **options)
        with pytest.raises((OSError, asyncio.TimeoutError, ProtocolError)) as why:
            await get(client)
        if answer and b" 407 " in answer:
            assert "the proxy refused the tunnel: status 407" in str(why.value)
        assert len(proxy.heads) == 1 and upstream.connections == 0


@cases("certificate", TEST_CERT_EXPIRED, TEST_CERT_WRONG_NAME)
async def test_certificates_are_checked_behind_a_proxy_too(tmp_path, certificate):
    tls = tls_server_context(tmp_path, certificate)
    async with Proxy().serving() as port:
        options = {"proxy": f"http://127.0.0.1:{port}"}
        options["ca_file"] = str(tmp_path / "ca.pem")
        async with client_of(OK, tls, **options) as (upstream, client):
            with pytest.raises(ssl.SSLCertVerificationError):
                await get(client)
            assert upstream.requests == []


# --- WebSocket


@contextlib.asynccontextmanager
async def websocket_pair(side=SERVER, max_size=None, **limits):
    """A WebSocket, and a peer that sends and receives frames."""
    async with connection_pair(**limits) as (connection, reader, writer):
        websocket = WebSocket(connection, side, max_size=max_size)
        yield websocket, FramePeer(side, reader, writer)


class FramePeer(Peer):
    """A peer that sends frames."""

    def frame(self, opcode, payload=b""):
        return encode_frame(opcode, payload, self.side)

    def send(self, opcode, payload=b""):
        self.writer.write(self.frame(opcode, payload))


async def websocket_echo(connection, websockets=None):
    """Serve a connection: accept a websocket and send every message back."""
    request = await connection.read(apiserver.parse_request_head)
    websocket = WebSocket.accept(connection, request)
    if websockets is not None:
        websockets.append(websocket)
    async for message in websocket:
        await websocket.send(message)


@cases("tls", False, True)
async def test_websocket_carries_messages_both_ways(tmp_path, tls):
    context = tls_server_context(tmp_path) if tls else None
    accepted = []

    async def serve(connection):
        await websocket_echo(connection, accepted)

    async with connection_server(serve, context) as port:
        options = {"ca_file": str(tmp_path / "ca.pem")} if tls else {}
        url = f"ws{'s' * tls}://127.0.0.1:{port}/path"
        websocket = await WebSocket.connect(url, **options)
        for message in ["Hello", "", b"", b"\x00\xff", "é" * 40_000, b"x" * 300_000]:
            await websocket.send(message)
            assert await websocket.receive() == message
        await websocket.aclose(4001, "enough")
        assert websocket.connection.closing
        assert (accepted[0].close_code, accepted[0].close_reason) == (4001, "enough")
        assert websocket.close_code == 4001
        with pytest.raises(ConnectionError):
            await websocket.send("late")


async def test_the_server_can_close_a_websocket_too():
    closed = asyncio.Event()

    async def serve(connection):
        request = await connection.read(apiserver.parse_request_head)
        websocket = WebSocket.accept(connection, request)
        await websocket.send("last")
        await websocket.aclose(1001, "going away")
        assert websocket.close_code == 1001 and connection.closing
        closed.set()

    async with connection_server(serve) as port:
        websocket = await WebSocket.connect(f"ws://127.0.0.1:{port}")
        assert [message async for message in websocket] == ["last"]
        assert (websocket.close_code, websocket.close_reason) == (1001, "going away")
        await websocket.aclose()
        await asyncio.wait_for(closed.wait(), 5)
        await until(lambda: websocket.connection.lost)


@cases(
    "url, target",
    ("ws://127.0.0.1:{}", "/"),
    ("ws://127.0.0.1:{}/", "/"),
    ("http://127.0.0.1:{}/k/token/client/register", "/k/token/client/register"),
    ("ws://127.0.0.1:{}/a/?b=c&d=/e", "/a/?b=c&d=/e"),
    ("ws://127.0.0.1:{}?x", "/?x"),
)
async def test_a_websocket_handshake_goes_where_the_url_says(url, target):
    requests = []

    async def serve(connection):
        request = await connection.read(apiserver.parse_request_head)
        requests.append(request)
        WebSocket.accept(connection, request)

    async with connection_server(serve) as port:
        fields = [("Authorization", "Bearer key")]
        websocket = await WebSocket.connect(url.format(port), fields=fields)
        websocket.connection.abort()
        (request,) = requests
        assert request.target == target
        assert request.headers["host"] == f"127.0.0.1:{port}"
        assert request.headers["authorization"] == "Bearer key"


ACCEPTED = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: WebSocket\r\n"
    b"Connection: keep-alive, upgrade\r\nSec-WebSocket-Accept: %b\r\n\r\n"
)


@contextlib.asynccontextmanager
async def handshake_server(answer, end=None):
    """A server that answers a handshake; %b becomes the accept key."""

    async def serve(reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        key = re.search("Sec-WebSocket-Key: (.*)\r\n", head)[1]
        writer.write(answer.replace(b"%b", apiserver.accept_key(key).encode()))
        if end is not None:
            end(writer)
        await reader.read()

    async with connection_streams(serve) as port:
        yield f"ws://127.0.0.1:{port}"


@cases(
    "answer, status",
    *((http_reply(b"", status), status) for status in (401, 403, 503, 200)),
    (http_reply(b"", 302, headers=[("Location", "ws://elsewhere")]), 302),
    (ACCEPTED.replace(b"%b", b"dGhlIHNhbXBsZSBub25jZQ=="), 502),
    *(
        (ACCEPTED.replace(field, b"X: y"), 502)
        for field in ACCEPTED.split(b"\r\n")[1:4]
    ),
    (ACCEPTED[:-2] + b"Sec-WebSocket-Extensions: x\r\n\r\n", 502),
    (ACCEPTED[:-2] + b"Sec-WebSocket-Protocol: x\r\n\r\n", 502),
    (b"garbage\r\n\r\n", 502),
)
async def test_a_refused_handshake_raises_its_status(answer, status):
    problem = None if status == 502 else f"the websocket was refused: {status} "
    async with handshake_server(answer) as url:
        with refused(status, match=problem):
            await WebSocket.connect(url)


@cases(
    "answer, end, error",
    (b"", connection_close, ConnectionResetError),
    (b"HTTP/1.1 101 Sw", connection_cut, ConnectionResetError),
    (b"", None, asyncio.TimeoutError),
    (b"HTTP/1.1 101 Sw", None, asyncio.TimeoutError),
)
async def test_a_websocket_handshake_without_an_answer_is_given_up(answer, end, error):
    async with handshake_server(answer, end) as url:
        with pytest.raises(error):
            await WebSocket.connect(url, limits=Limits(head_timeout=0.1))


async def test_a_websocket_needs_a_certificate_that_holds(tmp_path):
    context = tls_server_context(tmp_path)
    async with connection_server(websocket_echo, context) as port:
        with pytest.raises(ssl.SSLCertVerificationError):
            await WebSocket.connect(f"wss://127.0.0.1:{port}")
        websocket = await WebSocket.connect(f"wss://127.0.0.1:{port}", verify=False)
        await websocket.aclose()
    # The handler whose TLS handshake failed was never started.


async def test_frames_in_the_packet_of_the_servers_handshake_are_read():
    async with handshake_server(ACCEPTED + encode_frame(TEXT, b"one", SERVER)) as url:
        websocket = await WebSocket.connect(url)
        assert await websocket.receive() == "one"
        websocket.connection.abort()


HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


async def test_frames_in_the_packet_of_the_clients_handshake_are_read():
    async with connection_server(websocket_echo) as port, Client(port) as client:
        peer = FramePeer(SERVER, client.reader, client.writer)
        client.send(HANDSHAKE + peer.frame(TEXT, b"one") + peer.frame(TEXT, b"two"))
        _, headers = await client.read_head()
        assert headers["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        assert [await peer.event() for _ in "12"] == [(TEXT, "one"), (TEXT, "two")]


async def test_an_end_right_after_the_handshake_leaves_nothing_open():
    """It came while the connection still was allowed to stay half open."""
    async with connection_pair() as (connection, _, writer):
        writer.write_eof()
        await until(lambda: connection.eof)
        websocket = WebSocket(connection, CLIENT)
        assert await websocket.receive() is None
        assert websocket.close_code == 1006
        await until(lambda: connection.lost)


@cases(
    "change, status",
    ((b"GET", b"POST"), 400),
    ((b"HTTP/1.1", b"HTTP/1.0"), 400),
    ((b"Upgrade: websocket", b"Upgrade: h2c"), 400),
    ((b"Connection: upgrade", b"Connection: close"), 400),
    ((b"Host: a", b"Host: a\r\nContent-Length: 1"), 400),
    ((b"Host: a", b"Host: a\r\nTransfer-Encoding: chunked"), 400),
    ((b"-Version: 13", b"-Version: 8"), 426),
    ((b"Sec-WebSocket-Version: 13\r\n", b""), 426),
    ((b"bXBsZSBub25jZQ==", b"bXBsZSBub25jZQ="), 400),
    ((b"bXBsZSBub25jZQ==", b"bXBsZSBub25jZR=="), 400),  # stray bits
    ((b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n", b""), 400),
)
async def test_a_malformed_handshake_is_refused(change, status):
    async with connection_pair() as (connection, _, writer):
        assert change[0] in HANDSHAKE
        writer.write(HANDSHAKE.replace(*change))
        with refused(status):
            request = await connection.read(apiserver.parse_request_head)
            WebSocket.accept(connection, request)
        assert connection.bytes_sent == 0


# --- WebSocket: pings and dead peers


@BOTH_SIDES
async def test_pings_are_answered(side):
    async with websocket_pair(side) as (websocket, peer):
        receiving = asyncio.ensure_future(websocket.receive())
        peer.send(PING, b"one")
        peer.send(PONG, b"nobody asked")
        peer.send(PING, b"")
        assert await peer.event() == (PONG, b"one")
        assert await peer.event() == (PONG, b"")
        peer.send(TEXT, b"text")
        assert await receiving == "text"


@BOTH_SIDES
@cases("sign", PONG, TEXT, PING)
async def test_silence_is_pinged_and_any_byte_answers_the_ping(side, sign):
    limits = {"ping_interval": 0.03, "pong_timeout": 5}
    async with serving_websocket(side, **limits) as (_, peer, serving):
        for _ in range(4):
            event = await peer.event()
            while event[0] is PONG:
                event = await peer.event()
            assert event == (PING, b"")
            peer.send(sign)
        assert not serving.done()


async def until_closed(websocket):
    """All messages, up to the end."""
    return [message async for message in websocket]


@contextlib.asynccontextmanager
async def serving_websocket(side=SERVER, **limits):
    """A websocket_pair() and the task that receives the websocket's messages."""
    async with websocket_pair(side, **limits) as (websocket, peer):
        async with beside(until_closed(websocket)) as serving:
            await asyncio.sleep(0)
            yield websocket, peer, serving


@BOTH_SIDES
async def test_a_peer_that_answers_no_ping_is_cut(side):
    """A ping, a silence, 1011."""
    limits = {"ping_interval": 0.05, "pong_timeout": 0.1}
    async with websocket_pair(side, **limits) as (websocket, peer):
        with takes(0.12, 3):
            assert await until_closed(websocket) == []
        assert websocket.close_code == 1011
        await until(lambda: websocket.connection.lost)
        with contextlib.suppress(ConnectionResetError):
            assert await peer.event() == (PING, b"")


async def test_a_busy_peer_is_pinged_but_not_cut():
    limits = {"ping_interval": 0.02, "pong_timeout": 0.02}
    async with serving_websocket(**limits) as (websocket, peer, serving):
        websocket.busy_until = math.inf
        for _ in range(5):
            assert await peer.event() == (PING, b"")
        assert not serving.done()
        websocket.busy_until = 0.0
        assert await serving == [] and websocket.close_code == 1011


@BOTH_SIDES
async def test_a_peer_on_a_slow_line_is_not_cut_while_it_takes_a_message(side):
    """A request of 32 MiB takes minutes there, and the ping waits behind it."""
    limits = {"ping_interval": 0.05, "pong_timeout": 0.05}
    async with serving_websocket(side, **limits) as (websocket, peer, serving):
        for transport in (websocket.connection.transport, peer.writer.transport):
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32768)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
        websocket.write(b"x" * 16_000_000)
        for _ in range(60):
            await peer.reader.readexactly(50_000)
            await asyncio.sleep(0.01)
        assert not serving.done()
        with takes(0, 2):  # it has stopped reading
            assert await serving == [] and websocket.close_code == 1011


async def test_a_custom_heartbeat_replaces_the_ping():
    async with serving_websocket(ping_interval=0.02) as (websocket, peer, _):
        websocket.heartbeat = lambda: websocket.write("ping")
        assert await peer.event() == (TEXT, "ping")


# --- WebSocket: floods and violations


@BOTH_SIDES
@cases("opcode", PING, PONG)
async def test_a_flood_of_control_frames_is_ended(side, opcode, constant):
    """After a burst 1008; the frames that follow are not served."""
    constant(CONTROL_FRAME_BURST=5, CONTROL_FRAME_RATE=0)
    async with serving_websocket(side) as (websocket, peer, serving):
        for _ in range(5):
            peer.send(opcode)
        peer.send(TEXT, b"fine")
        if opcode is PING:
            for _ in range(5):
                assert await peer.event() == (PONG, b"")
        flood = [peer.frame(opcode), peer.frame(TEXT, b"not served")]
        close = (1000).to_bytes(2, "big")
        peer.writer.write(b"".join([*flood, peer.frame(CLOSE, close)]))
        assert (await peer.event())[1][0] == 1008
        peer.writer.close()
        assert await serving == ["fine"]
        assert websocket.close_code == 1008


async def test_control_frames_are_allowed_again_with_time(constant):
    constant(CONTROL_FRAME_BURST=2, CONTROL_FRAME_RATE=50)
    async with serving_websocket() as (_, peer, serving):
        for _ in range(10):
            peer.send(PING, b"x")
            assert await peer.event() == (PONG, b"x")
            await asyncio.sleep(0.04)
        assert not serving.done()


async def test_pings_of_a_peer_that_does_not_read_get_one_late_pong(constant):
    """Which does not count as another control frame."""
    constant(CONTROL_FRAME_BURST=4, CONTROL_FRAME_RATE=0)
    async with serving_websocket() as (websocket, peer, serving):
        big = asyncio.ensure_future(websocket.send(bytes(16 * 1024 * 1024)))
        await asyncio.sleep(0)
        assert not websocket.connection.writable
        for number in (b"1", b"2", b"3"):
            peer.send(PING, number)
        peer.send(TEXT, b"pinged")
        await until(lambda: websocket._pending_pong == b"3")
        assert (await peer.event())[0] is BINARY
        await big
        assert await peer.event() == (PONG, b"3")  # at once
        peer.send(PING, b"4")
        assert await peer.event() == (PONG, b"4")
        assert not serving.done()
        peer.send(PING, b"5")
        assert (await peer.event())[1][0] == 1008
        peer.writer.close()
        assert await serving == ["pinged"]


@BOTH_SIDES
@cases(
    "breach, code",
    (lambda key: frame(0x3, key=key), 1002),
    (lambda key: frame(TEXT, b"\xff", key=key), 1007),
    (lambda key: frame(BINARY, announce=101, key=key), 1009),
    (lambda key: b"".join(part(opcode, key=key) for opcode in (2, 0, 0, 0, 0)), 1008),
)
async def test_a_violation_is_answered_with_a_close_frame(side, breach, code, constant):
    """Messages before it are still served, in order."""
    constant(MESSAGE_FRAGMENTS=4)

    async def echo():
        async for message in websocket:
            await websocket.send(message)

    size = {"max_size": 100} if side is CLIENT else {"message_size": 100}
    async with websocket_pair(side, **size) as (websocket, peer):
        async with beside(echo()) as serving:
            data = [peer.frame(TEXT, b"before"), peer.frame(PING, b"!")]
            data += [breach(key_for(side)), peer.frame(TEXT, b"after")]
            peer.writer.write(b"".join(data))
            assert await peer.event() == (TEXT, "before")
            assert await peer.event() == (PONG, b"!")
            close = await peer.event()
            assert close[1][0] == code and close[1][1]
            assert await peer.event() is None
            peer.writer.close()
            await serving
            assert websocket.close_code == code
            await until(lambda: websocket.connection.lost)


# --- WebSocket: the end


@BOTH_SIDES
@cases(
    "payload, received",
    (b"", (1005, "")),
    (b"\x03\xe8", (1000, "")),
    (b"\x0f\xa0bye", (4000, "bye")),
)
async def test_the_peers_close_is_answered(side, payload, received, constant):
    constant(CLOSE_TIMEOUT=0.1)
    async with websocket_pair(side) as (websocket, peer):
        data = [peer.frame(TEXT, b"x"), peer.frame(CLOSE, payload)]
        peer.writer.write(b"".join([*data, peer.frame(TEXT, b"not served")]))
        assert await until_closed(websocket) == ["x"]
        assert (websocket.close_code, websocket.close_reason) == received
        assert await peer.event() == (CLOSE, (received[0], ""))
        # The server closes TCP at once, the client gives it time to.
        assert await peer.event() is None
        await until(lambda: websocket.connection.lost)


@BOTH_SIDES
async def test_an_unanswered_close_ends_in_an_abort(side, constant):
    """Messages that arrive meanwhile are dropped."""
    constant(CLOSE_TIMEOUT=0.1)
    async with websocket_pair(side) as (websocket, peer):
        with takes(0.05, 3):
            closing = asyncio.ensure_future(websocket.aclose(1001, "going"))
            assert await peer.event() == (CLOSE, (1001, "going"))
            peer.send(TEXT, b"still here")
            await closing
        assert websocket.close_code == 1006
        await until(lambda: websocket.connection.lost)


async def test_a_server_that_closes_but_keeps_tcp_open_is_left(constant):
    """The deadline of the last receive() does not apply to the closing."""
    constant(CLOSE_TIMEOUT=0.2)
    async with websocket_pair(CLIENT, ping_interval=0.05) as (websocket, peer):
        peer.send(CLOSE)
        with takes(0.15, 5):  # all of CLOSE_TIMEOUT
            assert await websocket.receive() is None
            await websocket.aclose()
        await until(lambda: websocket.connection.lost)


@BOTH_SIDES
async def test_a_peer_that_vanishes_is_1006(side):
    for end in (connection_close, connection_cut):
        async with websocket_pair(side) as (websocket, peer):
            end(peer.writer)
            assert await until_closed(websocket) == []
            assert websocket.close_code == 1006
            await until(lambda websocket=websocket: websocket.connection.lost)
            websocket.ping()  # too late, but no error
            websocket.close()
            with pytest.raises(ConnectionError):
                websocket.write("late")


async def test_a_peer_that_does_not_read_is_dropped(constant):
    """The receiving task learns the reason."""
    constant(UNREAD_SIZE=8 * 1024 * 1024)
    async with serving_websocket() as (websocket, _, serving):
        with pytest.raises(ConnectionError):
            for _ in range(64):
                assert websocket.connection.unsent <= 9 * 1024 * 1024
                websocket.write(bytes(1024 * 1024))
        assert await serving == []
        assert websocket.close_code == 1008
        assert websocket.close_reason == "it has stopped reading"


async def test_a_slow_reader_delays_sending_but_not_receiving():
    async with websocket_pair() as (websocket, peer):
        sending = asyncio.ensure_future(websocket.send(bytes(16 * 1024 * 1024)))
        peer.send(TEXT, b"meanwhile")
        assert await websocket.receive() == "meanwhile"
        assert not sending.done()
        assert len((await peer.event())[1]) == 16 * 1024 * 1024
        await sending


# -----------------------------------------------------------------------------
# Users (users.json)
# -----------------------------------------------------------------------------
#
# Most of these are about crashes: at a random moment (kill), at each call (faults),
# between any two calls (power cuts, in a model of a file system that loses
# everything it may).


ONE_USER = b'{"users": [\n{"user_id": "u1", "token": "t1", "name": "Zo\xc3\xab"}\n]}\n'


@pytest.fixture
def path(tmp_path):
    """The path of users.json."""
    return tmp_path / "users.json"


def write_users(path, *ids):
    users = [{"user_id": name, "token": f"token-{name}"} for name in ids]
    path.write_text(json.dumps({"users": users}))


def tokens_in(path):
    users = json.loads(path.read_bytes())["users"]
    return {user["user_id"]: user["token"] for user in users}


def statuses_of(results):
    return [getattr(result, "status", 200) for result in results]


def temporary_files(folder):
    return list(pathlib.Path(folder).glob("*.tmp"))


def opened(path, **options):
    store = UserStore(str(path), **options)
    store.load()
    return store


@contextlib.asynccontextmanager
async def running_store(path, **options):
    """Load a store from path for the block; store.lines has what it reports."""
    lines = []
    store = opened(path, report=lines.append, **options)
    store.lines = lines
    try:
        yield store
    finally:
        await store.aclose()


def run_store(path, scenario, **options):
    """Run scenario(store) in a loop with a store on path and return its result."""

    async def main():
        async with running_store(path, **options) as store:
            return await scenario(store)

    return asyncio.run(main())


CHILD_IMPORTS = """
import asyncio, json, os, random, resource, signal, sys, time
from chatgpt_apiserver import APIError, UserStore
"""


def in_child(script, *arguments):
    """A process that runs script with the module importable."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD_IMPORTS + script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(MODULE.parent)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


# --- Users


async def test_nothing_is_written_until_a_user_is_added(tmp_path):
    UserStore(str(tmp_path / "no such folder" / "users.json"))
    async with running_store(tmp_path / "users.json") as store:
        assert store.users == [] and store.find("") is None
        await store.refresh()
        with pytest.raises(APIError, match="User not found"):
            await store.delete("nobody")
        assert os.listdir(tmp_path) == []
        await store.add()
        assert sorted(os.listdir(tmp_path)) == ["users.json", "users.json.lock"]


async def test_added_users_are_found_by_token_here_and_after_a_restart(path):
    async with running_store(path) as store:
        plain = await store.add()
        agent = await store.add(name="Jürgen 王", role="agent")
        for number, user in enumerate((plain, agent)):
            assert store.find(user.token).line == store.users[number].line == user.line
        assert (agent.name, agent.role) == ("Jürgen 王", "agent")
        assert (plain.name, plain.role) == ("", "user")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = opened(path)
    assert [user.user_id for user in again.users] == [plain.user_id, agent.user_id]
    assert again.find(agent.token).name == "Jürgen 王"
    lines = path.read_text("utf-8").splitlines()
    assert len(lines) == 4 and "Jürgen 王" in lines[2]  # one user a line, readable


async def test_a_deleted_token_is_refused(path):
    async with running_store(path) as store:
        user = await store.add()
        await store.delete(user.user_id)
        assert store.find(user.token) is None and store.users == []
        with refused(404, APIError, "^User not found$"):
            await store.delete(user.user_id)
    assert tokens_in(path) == {}


@cases(
    "field, value",
    *(("role", "admin"), ("role", [])),
    *(("name", value) for value in (5, "a\nb", "x" * 201, "\ud800")),
)
def test_a_bad_name_or_role_is_refused(tmp_path, field, value):
    with refused(400, APIError, field):
        run_store(tmp_path / "users.json", lambda store: store.add(**{field: value}))
    assert os.listdir(tmp_path) == []


def test_repr_never_shows_a_token():
    user = User({"user_id": "u", "token": "sesame", "note": "sesame"})
    assert "sesame" not in repr(user)


ODD = "|t1 | t1|T1|\0|\ud800|\udcff\udc00|\xff\xe9|😀".split("|") + ["t" * 100_000]


@cases("token", *ODD, ids=lambda token: ascii(token[:9]))
def test_any_string_may_be_looked_up_as_a_token(path, token):
    path.write_bytes(ONE_USER)
    store = opened(path)
    assert store.find(token) is None and store.find("t1").user_id == "u1"
    assert len({apiserver.token_digest(other) for other in ODD}) == len(ODD)


@cases(
    "name, values, problem",
    ("note", "1", ": unknown field"),
    ("user_id", '7|""|"admin"', ": expected"),
    ("token", 'null|""|"ses ame"|"é"', ""),
    ("name", "null", ""),
    ("role", '"admin"|[]', ""),
    ("limit", "[]", ": expected"),
    ("limit", '"10 requests"', ": expected a limit such as"),
    ("models", '"gpt"', ": expected a list"),
    ("expires", '"soon"|"2027-13-01"', ": "),
    ("expires", '"soon"', ": expected a time"),
    ("max_concurrency", "0", ": expected"),
    ("sha256", '"00"', ": expected either"),
    ("old", '{"expires": "x"}|{"token": "x", "expires": "soon"}', ": expected"),
)
def test_a_field_that_is_not_understood_refuses_the_file(path, name, values, problem):
    """A misspelt limit must not mean no limit."""
    for value in values.split("|"):
        user = {"user_id": "u", "token": "t", name: json.loads(value)}
        path.write_text(json.dumps({"users": [user]}))
        with pytest.raises(ConfigurationError, match=rf"users\[0\]\.{name}{problem}"):
            opened(path)


# --- Reading


def test_every_truncation_is_refused(tmp_path, path):
    for length in range(len(ONE_USER) - 1):  # the last byte is only a newline
        path.write_bytes(ONE_USER[:length])
        with pytest.raises(ConfigurationError) as refused:
            opened(path)
        assert str(path) in str(refused.value) and "\n" not in str(refused.value)
        assert path.read_bytes() == ONE_USER[:length]
    assert os.listdir(tmp_path) == ["users.json"]


def test_every_flipped_bit_is_refused_or_gives_whole_users(path):
    """A flipped letter may go unnoticed, but never gives half a user."""
    for position in range(len(ONE_USER)):
        for bit in range(8):
            damaged = bytearray(ONE_USER)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                (user,) = opened(path).users
                assert user.user_id and user.token
            except ConfigurationError as error:
                assert "t1" not in str(error)
            assert path.read_bytes() == damaged


@cases(
    "content, problem",
    ("", "empty"),
    ("\0" * 100, "line 1, column 1"),
    ("\ufeff", "line 1, column 1"),
    *((text, 'expected {"users": [...]}') for text in ("[]", "null", "{}")),
    ('{"users": {}}', 'expected {"users": [...]}'),
    ('{"users": [], "version": 3}', "'version'"),
    ('{"users": [\n\n  5]}', "users[0]: expected an object"),
    ('{"users": [\n  {"user_id": "a",\n  token}]}', "line 3, column 3"),
    ('{"users": [{"token": "sesame"}]}', "users[0].user_id"),
    ('{"users": [USER}, {"user_id": "u", "token": "x"}]}', "users[1].user_id"),
    ('{"users": [USER}, {"user_id": "v", "token": "sesame"}]}', "users[1].token"),
    ('{"users": [USER}, OTHER, "old": {"token": "sesame"}}]}', "users[1].old.token"),
    ('{"users": [USER, "token": "b"}]}', "users[0].token: duplicate key"),
    ('{"users": [], "users": []}', "users: duplicate key"),
    ('{"users": [USER, "max_concurrency": NaN}]}', "whole number"),
    ('{"users": [], "note": ' + "[" * 200_000, "nesting"),
    ('{"users": []} {}', "line 1, column 15"),
    ("{'users': []}", "line 1, column 2"),
    ids=lambda value: ascii(value[:40]),
)
def test_a_mistake_is_reported_in_one_line_with_its_place(path, content, problem):
    content = content.replace("USER", '{"user_id": "u", "token": "sesame"')
    content = content.replace("OTHER", '{"user_id": "v", "token": "x"')
    path.write_text(content, "utf-8")
    with pytest.raises(ConfigurationError) as caught:
        opened(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and problem in message
    assert "\n" not in message and "sesame" not in message
    assert path.read_text("utf-8") == content


def test_a_file_that_cannot_be_read_is_refused(tmp_path, path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "odd").write_bytes(b'{"users":\n []\xff}')
    for odd, problem in [
        (tmp_path, "expected a regular file"),
        (tmp_path / "pipe", "expected a regular file"),
        (tmp_path / "missing" / "users.json", "its folder does not exist"),
        (tmp_path / "pipe" / "users.json", "Not a directory"),
        (tmp_path / "odd", "line 2, column 4: not UTF-8"),
    ]:
        with pytest.raises(ConfigurationError, match=problem):
            opened(odd)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    lines = []
    UserStore(str(path), report=lines.append).load()
    assert "its folder is not writable" in lines[0]  # a warning: it is readable
    write_users(path, "a")

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(apiserver, "open", refuse, raising=False)
    with pytest.raises(ConfigurationError, match="users.json: Permission denied"):
        opened(path)


def test_limits_of_a_file_that_is_read(path):
    """At the limit and one past it."""
    write_users(path, "a", "b")
    size = path.stat().st_size
    assert len(opened(path, limits=Limits(users=2, users_file_size=size)).users) == 2
    with pytest.raises(ConfigurationError, match="users: expected at most 1"):
        opened(path, limits=Limits(users=1))
    with pytest.raises(ConfigurationError, match=f"expected at most {size - 1} bytes"):
        opened(path, limits=Limits(users_file_size=size - 1))


# --- Writing


@cases(
    "limits, fit",
    ({"users": 3}, 3),
    ({"users_file_size": 0}, 3),
    ({"users_file_size": -1}, 2),
)
def test_limits_of_added_users(path, limits, fit):
    """At the limit and one past it; refused additions do not affect the others."""

    async def many(store, count=5):
        adds = [store.add() for _ in range(count)]
        return await asyncio.gather(*adds, return_exceptions=True)

    if "users_file_size" in limits:  # of three users
        run_store(path, lambda store: many(store, 3))
        limits = {"users_file_size": path.stat().st_size + limits["users_file_size"]}
        path.unlink()
    results = run_store(path, many, limits=Limits(**limits))
    assert statuses_of(results) == [200] * fit + [507] * (5 - fit)
    assert len(opened(path, limits=Limits(**limits)).users) == fit


@cases("more, status, name", (0, 507, ""), (100, None, "b" * 80))
def test_no_change_makes_the_file_too_large_to_read(path, more, status, name):
    write_users(path, "a")
    limits = Limits(users_file_size=path.stat().st_size + more)
    with refused(status, APIError):
        run_store(path, lambda s: s.update("a", {"name": "b" * 80}), limits=limits)
    assert opened(path, limits=limits).users[0].name == name


async def test_waiting_changes_are_written_together(path, monkeypatch):
    syncs = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: syncs.append(fd) or fsync(fd))

    async with running_store(path) as store:
        users = await asyncio.gather(*[store.add() for _ in range(500)])
        assert len({user.token for user in users}) == 500
        assert all(store.find(user.token) for user in users)
        deletes = [store.delete(user.user_id) for user in users[::2]]
        gone = [store.delete(users[0].user_id), store.delete("nobody")]
        results = await asyncio.gather(*deletes, *gone, return_exceptions=True)
        assert statuses_of(results) == [200] * 250 + [404] * 2
    assert len(tokens_in(path)) == 250
    assert 4 <= len(syncs) <= 300  # two for each write; 1,500 if each had its own


async def test_a_cancelled_change_does_not_affect_others(tmp_path, path, monkeypatch):
    release = threading.Event()
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: release.wait(10) and fsync(fd))
    async with running_store(path) as store:

        def adding(what):
            names = [f"{what} {n}" for n in range(3)]
            return [asyncio.ensure_future(store.add(name=name)) for name in names]

        first = adding("first")
        await until(lambda: temporary_files(tmp_path))  # the write is under way
        second = adding("second")
        await asyncio.sleep(0)
        first[1].cancel()
        second[1].cancel()
        release.set()
        results = await asyncio.gather(*first, *second, return_exceptions=True)
        cancelled = [isinstance(result, asyncio.CancelledError) for result in results]
        assert cancelled == [False, True, False] * 2
        names = {user.name for user in store.users}
        assert {"first 0", "first 2", "second 0", "second 2"} <= names
        assert "second 1" not in names  # it was still waiting
    assert {user.name for user in opened(path).users} == names


async def test_a_bug_during_a_write_leaves_no_caller_waiting(path, monkeypatch):
    async with running_store(path) as store:
        with monkeypatch.context() as patch:
            patch.setattr(apiserver, "encode_users", lambda users: 1 / 0)
            adds = store.add(), store.add()
            results = await asyncio.gather(*adds, return_exceptions=True)
        assert [type(result) for result in results] == [ZeroDivisionError] * 2
        await store.add()


def test_aclose_finishes_waiting_changes_and_ends_the_thread(path):
    """Then the store may be used in another loop."""

    async def session():
        store.load()
        adds = [asyncio.ensure_future(store.add()) for _ in range(20)]
        await asyncio.sleep(0)
        await store.aclose()
        assert len([add for add in adds if store.find(add.result().token)]) == 20
        with refused(503, APIError):
            await store.add()
        await store.refresh()
        await store.aclose()
        assert not [t for t in threading.enumerate() if t.name.startswith("users")]

    store = UserStore(str(path))
    for count in (20, 40):
        asyncio.run(session())
        assert len(store.users) == count


# --- Crashes and faults

CHURN = """
store = UserStore(sys.argv[1])
store.load()
async def churn():
    mine = []
    while True:
        if mine and dice.random() < 0.4:
            user = mine.pop(dice.randrange(len(mine)))
            say("deleting", user.user_id, user.token)
            await store.delete(user.user_id)
            say("deleted", user.user_id, user.token)
        else:
            user = await store.add()
            say("added", user.user_id, user.token)
            mine.append(user)
dice = random.Random(sys.argv[2])
say = lambda *words: os.write(1, (" ".join(words) + "\\n").encode())
async def main():
    await asyncio.gather(*[churn() for _ in range(4)])
asyncio.run(main())
"""


def test_a_kill_at_any_moment_loses_no_acknowledged_change(tmp_path, path):
    dice = random.Random(41)
    present, gone = {}, set()
    for seed in range(8):
        child = in_child(CHURN, path, seed)
        output = b"".join(child.stdout.readline() for _ in range(dice.randrange(1, 60)))
        time.sleep(dice.uniform(0, 0.005))  # to a random moment of a write
        child.kill()
        output += child.stdout.read()  # communicate() skips what readline() buffered
        child.communicate()
        for line in output.decode().splitlines():
            what, user_id, token = line.split()
            if what == "added":
                present[user_id] = token
            elif what == "deleting":
                del present[user_id]  # from now on either is right
            else:
                gone.add(token)
        on_disk = tokens_in(path)
        assert present.items() <= on_disk.items()
        assert not gone & set(on_disk.values())
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        store = opened(path)
        assert all(store.find(token) for token in present.values())
        assert temporary_files(tmp_path) == []
    assert present and gone


class Recorder:
    """Records the store's system calls."""

    def __init__(self, monkeypatch):
        self.calls = []
        self.names = {}  # of open descriptors
        for name in ("open", "write", "fsync", "replace", "unlink"):
            monkeypatch.setattr(os, name, self.recorded(getattr(os, name), name))

    def recorded(self, function, name):
        def call(*arguments, **options):
            result = function(*arguments, **options)
            if name == "open":
                self.names[result] = os.path.basename(arguments[0])
                arguments = (self.names[result], bool(arguments[1] & os.O_CREAT))
            elif name == "replace":
                arguments = tuple(os.path.basename(path) for path in arguments)
            elif name == "write":
                arguments = (self.names[arguments[0]], bytes(arguments[1][:result]))
            elif name == "fsync":
                arguments = (self.names[arguments[0]],)
            self.calls.append((name, *arguments))
            return result

        return call


def after_power_cut(calls, content, name):
    """All contents that name may have if the power is cut after calls.

    Unsynced data is there wholly, partly or not at all; unsynced names are the old
    or the new ones.
    """
    data, synced = {"old": content}, {"old": content}
    names, possible = {name: "old"}, {"old"}
    for call, *arguments in calls:
        if call == "open" and arguments[1]:
            data[arguments[0]] = synced[arguments[0]] = b""
            names[arguments[0]] = arguments[0]
        elif call == "write":
            data[arguments[0]] += arguments[1]
        elif call == "fsync" and arguments[0] in data:
            synced[arguments[0]] = data[arguments[0]]
        elif call == "fsync":  # the folder
            possible = {names[name]}
        elif call == "replace":
            names[arguments[1]] = names.pop(arguments[0])
            possible.add(names[name])
    for file in possible:
        yield data[file]
        if synced[file] != data[file]:
            yield from (synced[file], data[file][: len(data[file]) // 2 + 1])


async def test_a_power_cut_between_calls_loses_no_acknowledged_change(
    path, monkeypatch
):
    write_users(path, "a", "b", "c")
    before = path.read_bytes()
    recorder = Recorder(monkeypatch)
    answers = [(0, frozenset(tokens_in(path)))]

    async with running_store(path) as store:
        for change in (store.add, lambda: store.delete("b"), store.add):
            await change()
            known = frozenset(user.user_id for user in store.users)
            answers.append((len(recorder.calls), known))
    names = [call[0] for call in recorder.calls]
    one_write = ["open", "open", "write", "fsync", "replace", "open", "fsync"]
    assert names == one_write * 3  # lock, temporary file, ..., folder
    for cut in range(len(recorder.calls) + 1):
        answered = max(n for n, (calls, _) in enumerate(answers) if calls <= cut)
        allowed = [known for _, known in answers[answered : answered + 2]]
        for content in after_power_cut(recorder.calls[:cut], before, "users.json"):
            assert frozenset(apiserver.parse_users(content)) in allowed


class Fault:
    """Makes the nth system call of the store's thread fail."""

    CALLS = ("open", "write", "fsync", "replace", "close", "stat", "fstat", "utime")

    def __init__(self, monkeypatch):
        self.countdown = 0  # 0: nothing fails
        self.hit = ""
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self.failing(getattr(os, name), name))

    def failing(self, function, name):
        def call(*arguments, **options):
            if threading.current_thread().name.startswith("users") and self.countdown:
                self.countdown -= 1
                if not self.countdown:
                    self.hit = name
                    if name == "close":
                        function(*arguments)  # even a failing close() closes
                    raise OSError(errno.EIO, "Fault")
                if name == "write" and len(arguments[1]) > 1:  # a short write
                    arguments = (arguments[0], arguments[1][: len(arguments[1]) // 2])
            return function(*arguments, **options)

        return call


@cases("there", True, False)
async def test_whichever_call_fails_nothing_changes(
    tmp_path, path, monkeypatch, constant, there
):
    constant(GONE_AFTER=0)
    fault = Fault(monkeypatch)
    hits = set()
    async with running_store(path) as store:
        if there:
            await store.add(name="first")
        before = path.read_bytes() if there else None
        never_reached = 0
        for n in range(1, 100):
            users = store.users
            fault.hit, fault.countdown = "", n
            try:
                await store.add(name="second")
            except APIError as error:
                assert error.status == 500
                assert re.search("Fault|folder does not exist", error.message)
                assert error.message.endswith("; nothing was changed")
                assert [u.line for u in store.users] == [u.line for u in users]
                assert (path.read_bytes() if path.exists() else None) == before
            else:
                assert fault.hit in ("", "close")  # of the lock, after the commit
                never_reached, fault.countdown = fault.countdown, 0
                await store.delete(store.users[-1].user_id)
            hits.add(fault.hit)
            assert temporary_files(tmp_path) == []
            user = await store.add()
            assert store.find(user.token) and user.user_id in tokens_in(path)
            await store.delete(user.user_id)
            if there:
                before = path.read_bytes()
            else:
                path.unlink()
                await store.refresh()
            if never_reached:
                break
    assert {"open", "write", "fsync", "replace", "close", "stat", "fstat"} <= hits


async def test_a_failed_rollback_is_not_reported_as_no_change(path, monkeypatch):
    """Neither can the folder be synced, nor the old file be restored."""

    def fail(*_):
        monkeypatch.setattr(os, "fsync", fail)
        raise OSError(errno.EIO, "Input/output error")

    async with running_store(path) as store:
        await store.add()
        with monkeypatch.context() as patch:
            patch.setattr(apiserver, "sync_folder", fail)
            with pytest.raises(APIError, match="may or may not have changed"):
                await store.add()
            assert len(store.users) == 1
        await store.refresh()
        assert len(store.users) == 2 and "1 added" in store.lines[-1]


FULL = """
store = UserStore(sys.argv[1])
store.load()
async def main():
    size = os.path.getsize(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, resource.RLIM_INFINITY))
    try:
        await store.add()
    except APIError as error:
        print(error.status, error.message)
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    await store.add()
    print(len(store.users))
asyncio.run(main())
"""


def test_a_full_disk_is_reported_and_survived(tmp_path, path):
    write_users(path, "a")
    output = in_child(FULL, path).communicate()[0].decode().splitlines()
    refusal = "500 users.json could not be written: File too large; nothing was changed"
    assert output == [refusal, "2"]
    assert len(tokens_in(path)) == 2 and temporary_files(tmp_path) == []


def test_only_stale_temporary_files_are_removed_at_the_start(tmp_path, path):
    write_users(path, "a")
    stale = [f"users.json.{pid}.0123456789abcdef.tmp" for pid in (1, 4194304)]
    others = ["users.json.tmp", "other.json.1.0123456789abcdef.tmp", "users.json.bak"]
    for name in stale + others:
        (tmp_path / name).write_text("{")
    assert len(opened(path).users) == 1
    assert {*os.listdir(tmp_path)} == {*others, "users.json", "users.json.lock"}


def test_a_start_does_not_disturb_another_servers_write(path, monkeypatch):
    """The temporary file of a write in progress is not stale."""
    replace = os.replace
    starts, threads = [], []

    def replace_while_another_starts(source, target):
        threads.append(threading.Thread(target=lambda: starts.append(opened(path))))
        threads[-1].start()
        threads[-1].join(0.05)  # it is waiting for the lock
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_while_another_starts)
    user = run_store(path, lambda store: store.add())
    for thread in threads:
        thread.join(10)
    assert starts[0].find(user.token)


# --- Changes made by hand and by other servers


async def test_a_good_edit_is_adopted_and_reported_once(path):
    write_users(path, "a", "b")
    async with running_store(path) as store:
        await store.refresh()
        write_users(path, "b", "c", "d")
        for _ in range(3):
            await store.refresh()
        assert store.find("token-c") and not store.find("token-a")
        os.utime(path)  # not an edit
        await store.refresh()
        path.write_text(path.read_text().replace("token-c", "other-c"))
        await store.refresh()
        assert store.find("other-c") and not store.find("token-c")
    counts = "2 added, 1 removed", "0 added, 0 removed, 1 edited"
    assert store.lines == [f"users.json changed: 3 users ({many})" for many in counts]


async def test_a_bad_edit_keeps_the_old_users_and_is_never_overwritten(path):
    write_users(path, "a")
    half = '{"users": [\n  {"user_id": "a", "tok'
    async with running_store(path) as store:
        path.write_text(half)
        for _ in range(3):
            await store.refresh()
        assert store.find("token-a")
        changes = store.add(), store.delete("a")
        for error in await asyncio.gather(*changes, return_exceptions=True):
            assert error.status == 500
            assert re.search("line 2, column .*nothing was changed", error.message)
        assert path.read_text() == half
        (line,) = store.lines
        assert "stay in force" in line and "\n" not in line
        write_users(path, "a", "b")
        await store.add()
        assert sorted(tokens_in(path)) == sorted(user.user_id for user in store.users)
        assert len(store.users) == 3
        assert store.lines[1:] == ["users.json changed: 2 users (1 added, 0 removed)"]


async def test_a_removed_file_is_no_users_a_removed_folder_an_error(tmp_path, constant):
    constant(GONE_AFTER=0)
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    path = folder / "users.json"
    write_users(path, "a")
    async with running_store(path) as store:
        folder.rename(elsewhere)
        for _ in range(2):
            await store.refresh()
        assert store.find("token-a") and "its folder does not exist" in store.lines[0]
        with pytest.raises(APIError, match="could not be written: No such file"):
            await store.add()
        elsewhere.rename(folder)
        await store.refresh()
        path.unlink()
        for _ in range(2):
            await store.refresh()
        assert store.users == []
        await store.add()
        assert len(tokens_in(path)) == 1
    removed = "users.json was removed: 0 users (0 added, 1 removed)"
    assert len(store.lines) == 4 and store.lines[-1] == removed


async def test_a_stores_own_writes_are_not_reported_as_edits(path):
    async def poll():
        while True:
            await store.refresh()

    async with running_store(path) as store, beside(poll()):
        for _ in range(30):
            await asyncio.gather(store.add(), store.add())
    assert store.lines == []


def test_two_versions_never_have_the_same_stamp(path):
    """Not even with equal sizes and inodes and a clock that stands still."""
    newest = time.time_ns() + 3600 * 10**9  # or has been set back
    for n in range(1, 10):
        stamp = apiserver.replace_file(str(path), b"%d" % n, newest)
        assert stamp == apiserver.stamp_of(path.stat())
        assert stamp[0] > newest
        newest = stamp[0]


SHARE = """
store = UserStore(sys.argv[1])
store.load()
mine, gone, dice = [], [], random.Random(sys.argv[2])
async def poll():
    while True:
        await store.refresh()
        await asyncio.sleep(store.limits.users_poll_interval)
async def churn():
    for _ in range(50):
        if mine and dice.random() < 0.4:
            user = mine.pop()
            await store.delete(user.user_id)
            gone.append(user.token)
        else:
            mine.append(await store.add())
async def main():
    polling = asyncio.ensure_future(poll())
    print(json.dumps("ready"), flush=True)
    sys.stdin.readline()
    await asyncio.gather(*[churn() for _ in range(4)])
    print(json.dumps([[user.token for user in mine], gone]), flush=True)
    present, deleted = json.loads(sys.stdin.readline())
    deadline = time.monotonic() + 1
    right = lambda: all(map(store.find, present)) and not any(map(store.find, deleted))
    while not right() and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    print(json.dumps([right(), len(store.users)]), flush=True)
asyncio.run(main())
"""


def test_two_servers_on_one_file_lose_nothing(path):
    children = [in_child(SHARE, path, seed) for seed in range(2)]

    def exchange(line=""):
        """Send each child a line, and return the next line of each."""
        for child in children:
            child.stdin.write(line.encode())
            child.stdin.flush()
        assert all(select.select([c.stdout], [], [], 15)[0] for c in children)
        return [json.loads(child.stdout.readline() or "null") for child in children]

    try:
        assert exchange() == ["ready"] * 2
        present, gone = map(sum, zip(*exchange("go\n")), ([], []))
        expected = [[True, len(present)]] * 2
        assert exchange(json.dumps([present, gone]) + "\n") == expected
        assert set(tokens_in(path).values()) == set(present)
        assert len(present) + 2 * len(gone) == 400
    finally:
        for child in children:
            child.kill()
            child.communicate()


def test_a_lock_that_is_never_released_is_an_error_not_a_hang(tmp_path):
    lock = str(tmp_path / "users.json.lock")
    with apiserver.file_lock(lock):
        second = apiserver.file_lock(lock, timeout=0.02)
        with pytest.raises(OSError, match="another process"), second:
            pass
    with apiserver.file_lock(lock):
        pass


# --- Where the file is


def test_a_symlink_stays_and_its_target_is_replaced(tmp_path):
    folder = tmp_path / "volume"
    folder.mkdir()
    target, link = folder / "data.json", tmp_path / "users.json"
    link.symlink_to(target)  # to nothing yet
    run_store(link, lambda store: store.add())
    user = run_store(link, lambda store: store.add())
    assert link.is_symlink() and user.user_id in tokens_in(target)
    assert {*os.listdir(tmp_path)} == {"users.json", "volume"}
    assert {*os.listdir(folder)} == {"data.json", "data.json.lock"}


async def test_a_file_mounted_by_itself_is_an_error_with_a_cure(path, monkeypatch):
    write_users(path, "a")

    def busy(*_):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(os, "replace", busy)
    async with running_store(path) as store:
        with refused(500, APIError, "mount the folder, not the file"):
            await store.add()
    (line,) = store.lines
    assert "mount the folder, not the file" in line
    assert list(tokens_in(path)) == ["a"] and temporary_files(path.parent) == []


def test_a_planted_temporary_file_is_not_written_through(tmp_path, monkeypatch):
    path, victim = tmp_path / "users.json", tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr(apiserver.secrets, "token_hex", lambda size: "0" * 16)
    (tmp_path / f"users.json.{os.getpid()}.{'0' * 16}.tmp").symlink_to(victim)
    store = UserStore(str(path))  # not loaded: a start would have removed it
    with pytest.raises(APIError, match="File exists"):
        asyncio.run(store.add())
    assert victim.read_text() == "precious"


# --- Size


def test_a_hundred_thousand_users(path):
    """CPU time: load 0.6 s, add 0.05 s, find 0.5 us."""
    ids = range(99_950)
    fields = ({"user_id": f"id-{n:032}", "token": f"token-{n:030}"} for n in ids)
    path.write_bytes(apiserver.encode_users({n: User(f) for n, f in enumerate(fields)}))
    with takes(0, 3, time.process_time):
        store = opened(path)

    async def add_and_find():
        with takes(0, 6, time.process_time):
            for _ in range(30):
                await store.add()
        with takes(0, 0.5, time.process_time):
            for _ in range(10_000):
                store.find("no such token")
        await store.aclose()

    asyncio.run(add_and_find())


# -----------------------------------------------------------------------------
# Limits and usage
# -----------------------------------------------------------------------------

NOON = calendar.timegm((2026, 11, 27, 12, 0, 0))


@pytest.fixture
def clock(monkeypatch):
    """A list of one: the time of users' limits and of usage; at first it is NOON."""
    clock = [NOON]
    monkeypatch.setattr(apiserver, "unix_time", lambda: clock[0])
    return clock


@pytest.fixture
def usage_file(tmp_path):
    """Where usage.jsonl is, or will be."""
    return tmp_path / "usage.jsonl"


def ledger(path):
    """A ledger on a file, as of a server that has just started."""
    made = apiserver.Ledger(str(path), print)
    made.load()
    return made


def count_request(ledger, user="ada", model="m", failures=0, usage=()):
    """Record a user's request to the controller c."""
    ledger.record(user, model, "c", failures, apiserver.Usage(*usage))


def ledger_requests(made):
    return made.report(["user"], "", "9999")["total"]["requests"]


def used_of(limit):
    """What is used of each quota."""
    return [used for _, used, _ in limit.state()]


@cases(
    "written, quotas",
    ("1000 requests/day", "1000 requests/day"),
    (" 5 tokens / month ", "5 tokens/month"),
    ({"tokens": 9, "per": "week"}, "9 tokens/week"),
    ({"requests": 1, "tokens": 2, "per": "hour"}, "1 requests/hour, 2 tokens/hour"),
    (["1 requests/hour", {"tokens": 2, "per": "day"}], "1 requests/hour, 2 tokens/day"),
)
def test_a_limit_may_be_written_in_several_forms(written, quotas):
    parsed = apiserver.parse_quotas(written)
    assert ", ".join(f"{most} {what}/{per}" for most, what, per in parsed) == quotas


@cases(
    "written",
    *("", "10 request/day", "x requests/day", "-1 requests/day", "0 tokens/day"),
    *("0.5 requests/day", "10 requests", "10 requests/year", "10 apples/day"),
    *([], [[]], [["1 requests/day"]], 5, True, None, {}, {"requests": 5}),
    *({"per": "day"}, {"requests": "5", "per": "day"}, {"requests": 0, "per": "day"}),
    *({"requests": True, "per": "day"}, {"requests": 5, "per": "day", "x": 1}),
)
def test_a_limit_that_is_misspelt_is_refused(written):
    with pytest.raises(ValueError, match="expected a limit"):
        apiserver.parse_quotas(written)


@cases(
    "per, now, start, end",
    ("minute", "2026-12-31 23:59:59", "2026-12-31 23:59:00", "2027-01-01 00:00:00"),
    ("hour", "2026-11-27 09:59:59", "2026-11-27 09:00:00", "2026-11-27 10:00:00"),
    ("day", "2026-02-28 12:00:00", "2026-02-28 00:00:00", "2026-03-01 00:00:00"),
    ("week", "2026-11-29 23:59:59", "2026-11-23 00:00:00", "2026-11-30 00:00:00"),
    ("week", "2026-11-30 00:00:00", "2026-11-30 00:00:00", "2026-12-07 00:00:00"),
    ("month", "2026-12-31 23:00:00", "2026-12-01 00:00:00", "2027-01-01 00:00:00"),
    ("month", "2028-02-29 00:00:00", "2028-02-01 00:00:00", "2028-03-01 00:00:00"),
)
def test_windows_are_those_of_the_calendar_in_utc(per, now, start, end):
    form = "%Y-%m-%d %H:%M:%S"
    times = [calendar.timegm(time.strptime(t, form)) for t in (now, start, end)]
    assert apiserver.window_bounds(per, times[0] + 0.9) == tuple(times[1:])


@cases("per, used", ("minute", 0), ("hour", 3), ("day", 3), ("week", 3), ("month", 3))
def test_a_new_limit_counts_what_was_used_in_its_window(clock, per, used):
    """Use is kept by the hour: a minute's limit begins at nothing."""
    ledger = apiserver.Ledger(None)
    clock[0] += 60
    for _ in range(3):
        count_request(ledger)
    clock[0] += 1740
    limit = ledger.limit_of("ada", apiserver.parse_quotas(f"3 requests/{per}"))
    assert used_of(limit) == [used]
    count_request(ledger)
    assert used_of(limit) == [used + 1]


def test_ever_new_models_of_a_user_fill_no_memory(clock):
    """A function without models answers to any name."""
    ledger = apiserver.Ledger(None)
    for number in range(1000):
        count_request(ledger, "u", f"{number}-" * 100)
    count_request(ledger, "v", "999")
    clock[0] += 3600
    count_request(ledger, "u", "999")
    rows = ledger.report(["user", "model"], "2000-01-01", "2100-01-01")["data"]
    found = {(row["user"], row["model"]): row["requests"] for row in rows}
    assert len(found) == apiserver.HOURLY_MODELS + 3
    assert found["u", "other"] == 1000 - apiserver.HOURLY_MODELS
    assert found["v", "999"] == found["u", "999"] == 1
    assert max(len(model) for _, model in found) == 200


def test_a_window_that_turns_between_two_looks_is_not_used_up(monkeypatch):
    times = [1_800_000_000.0, 1_800_000_059.9, 1_800_000_060.1]
    monkeypatch.setattr(apiserver, "unix_time", lambda: times.pop(0))
    limit = apiserver.UsageLimit(apiserver.parse_quotas("1 requests/minute"))
    limit.count(1)
    assert limit.over() is None and not times


def test_a_clock_that_is_set_back_gives_nothing_back(clock):
    limit = apiserver.UsageLimit(apiserver.parse_quotas("2 requests/hour"))
    limit.count(requests=2)
    clock[0] -= 7200
    assert limit.over()[1] == 2
    clock[0] += 3 * 3600
    assert limit.over() is None


@cases("per", "hour", "day", "week", "month")
def test_a_clock_that_was_set_years_ahead_uses_nothing_up(clock, per):
    ledger = apiserver.Ledger(None)
    quotas = apiserver.parse_quotas([f"3 requests/{per}", "3 requests/minute"])
    limit = ledger.limit_of("ada", quotas)
    count_request(ledger)
    clock[0] += 4 * 365 * 86400
    for _ in range(3):
        count_request(ledger)
    assert limit.over()[1] == 3
    clock[0] = NOON
    kept = 0 if per == "hour" else 1  # of hours only the present one is kept
    assert used_of(limit) == [kept, 0]
    other = ledger.limit_of("ada", apiserver.parse_quotas(f"9 requests/{per}"))
    assert used_of(other) == [kept]
    assert ledger_requests(ledger) == 4


@cases("per", "day", "week", "month")
def test_a_clock_that_was_set_years_back_forgives_nothing(clock, per):
    ledger = apiserver.Ledger(None)
    limit = ledger.limit_of("ada", apiserver.parse_quotas(f"3 requests/{per}"))
    for now in (NOON, NOON - 10 * 365 * 86400, NOON):
        clock[0] = now
        count_request(ledger)
    assert used_of(limit) == [2]


@cases("name", None, "usage.jsonl")
def test_hours_of_past_days_take_no_memory(tmp_path, clock, name):
    """Neither with a file to which nothing is written."""
    made = apiserver.Ledger(name and str(tmp_path / name))
    with traced() as memory:
        for _ in range(30 * 24):
            count_request(made, usage=(1, 0, 2))
            clock[0] += 3600
        gc.collect()
        assert memory()[0] < 60_000
    rows = made.report(["day"], "2026-11-28", "2026-11-29")["data"]
    assert [(row["requests"], row["output"]) for row in rows] == [(24, 48)] * 2


def test_days_long_gone_leave_the_memory(clock, constant):
    constant(USAGE_LIFETIME=5)
    made = apiserver.Ledger(None)
    for _ in range(20):
        count_request(made)
        clock[0] += 86400
    assert 5 <= ledger_requests(made) <= 6


async def test_two_ledgers_on_one_file_count_together(usage_file):
    one, two = ledger(usage_file), ledger(usage_file)
    limit = two.limit_of("ada", apiserver.parse_quotas("5 requests/day"))
    assert limit.over() is None
    for _ in range(3):
        count_request(one, usage=(2, 1, 3))
        count_request(two, failures=1)
    for made in (one, two, one, two):
        await made.flush()
    assert ledger_requests(one) == ledger_requests(two) == 6
    assert limit.over()[1] == 6 and ledger_requests(ledger(usage_file)) == 6
    lines = [json.loads(line) for line in usage_file.read_text().splitlines()]
    assert [line["requests"] for line in lines] == [3, 3] and len(lines[0]) == 9
    assert lines[0]["input"] == 6 and lines[1]["failures"] == 3


def test_a_controller_that_is_named_as_a_user_has_its_own_limit():
    ledger = apiserver.Ledger(None)
    count_request(ledger, "c")
    count_request(ledger, "bob")
    count_request(ledger, "c")
    limit = apiserver.UsageLimit(apiserver.parse_quotas("9 requests/day"))
    ledger.watch("controller", "c", limit)
    user = ledger.limit_of("c", apiserver.parse_quotas("9 requests/day"))
    assert (used_of(limit), used_of(user)) == ([3], [2])


async def test_late_lines_of_others_count_in_their_own_hour(usage_file, clock):
    late, one = ledger(usage_file), ledger(usage_file)
    quotas = ["5 requests/hour", "6 requests/day"]
    limits = [one.limit_of("ada", apiserver.parse_quotas(quotas))]
    limits.append(apiserver.UsageLimit(apiserver.parse_quotas(quotas)))
    one.watch("controller", "c", limits[1])
    assert b"limit-requests: 5\r" in limits[0].fields(clock[0])
    for _ in range(3):
        count_request(late)
    clock[0] += 3600
    count_request(late)
    await late.flush()
    await one.flush()
    shown = b"limit-requests: 6\r\nx-ratelimit-remaining-requests: 1"
    for limit in limits:
        assert used_of(limit) == [1, 4] and shown in limit.fields(clock[0])
    for _ in range(2):
        count_request(late)
    clock[0] += 86400
    await late.flush()
    await one.flush()
    assert used_of(limits[0]) == [0, 0] and ledger_requests(one) == 6


class Homes:
    """nginx's `hash $credential consistent`: 160 points for each server (ketama)."""

    def __init__(self, servers):
        points = {}
        for server in servers:
            start = zlib.crc32(server.replace(":", "\0").encode())
            point = 0
            for _ in range(160):
                before = point.to_bytes(4, "little")
                point = zlib.crc32(before, start)
                points.setdefault(point, server)
        self._servers = [points[point] for point in sorted(points)]
        self._points = sorted(points)

    def of(self, credential):
        at = bisect.bisect_left(self._points, zlib.crc32(credential.encode()))
        return self._servers[at % len(self._servers)]


INSTANCES = [f"127.0.0.{number}:18910" for number in range(1, 21)]


def test_a_lost_instance_moves_only_its_own_credentials():
    """20 instances, 10,000 credentials."""
    ring = Homes(INSTANCES)
    # As nginx 1.22 answered when it was asked.
    asked = "14 9 16 17 14 4 8 6 18 8"
    homes = [ring.of(f"token-{n}") for n in range(10)]
    assert homes == [f"127.0.0.{number}:18910" for number in asked.split()]
    dice = random.Random(1)
    tokens = [str(uuid.UUID(int=dice.getrandbits(128))) for _ in range(10_000)]
    before = {token: ring.of(token) for token in tokens}
    shares = collections.Counter(before.values())
    assert len(shares) == 20 and max(shares.values()) < 1.35 * len(tokens) / 20
    for lost in INSTANCES:
        ring = Homes([server for server in INSTANCES if server != lost])
        moved = {t: ring.of(t) for t in tokens if ring.of(t) != before[t]}
        assert moved.keys() == {t for t in tokens if before[t] == lost}
        # Nobody gets all of them: an instance that falls does not topple the next.
        taken = collections.Counter(moved.values())
        assert max(taken.values()) < len(moved) / 4


@cases("shared, users", (False, 10_000), (True, 1000))
@flow
async def test_limits_after_an_instance_is_lost(tmp_path, clock, shared, users):
    """With a file for each machine a token's second home counts anew, until the first
    is back; with one file for all only what the lost one had not yet written is used
    twice."""
    quotas, lost = apiserver.parse_quotas("5 requests/day"), INSTANCES[6]
    used = {f"token-{n}": 0 for n in range(users)}
    homes = Homes(INSTANCES)
    first = {token: homes.of(token) for token in used}

    def started(name):
        return ledger(tmp_path / ("all" if shared else name.replace(":", "-")))

    ledgers = {name: started(name) for name in INSTANCES}

    async def turn(requests, flush=True):
        homes = Homes(ledgers)
        for token in used:
            made = ledgers[homes.of(token)]
            limit = made.limit_of(token, quotas)
            for _ in range(requests):
                if limit.over() is None:
                    count_request(made, token)
                    used[token] += 1
        for made in (*ledgers.values(), *ledgers.values()) if flush else ():
            await made.flush()

    def use_of(moved):
        return {n for t, n in used.items() if (first[t] == lost) is moved}

    await turn(3)
    await turn(1, flush=False)
    del ledgers[lost]  # it is killed, and what it had not written is gone
    await turn(9)
    assert use_of(moved=False) == {5}
    assert use_of(moved=True) == ({5 + 1} if shared else {4 + 5})
    ledgers[lost] = started(lost)
    await turn(9)
    assert use_of(moved=False) == {5}
    assert use_of(moved=True) == ({5 + 1} if shared else {2 * 5 + 1})


KILLED = """
from chatgpt_apiserver import Ledger, Usage
async def main():
    made = Ledger(sys.argv[1])
    made.load()
    print(made.report([], "", "9999")["total"]["requests"], flush=True)
    while True:
        for _ in range(3):
            made.record("ada", "m", "c", 0, Usage(1))
            print("r", end="", flush=True)
        await made.flush()
        print("w", end="", flush=True)
asyncio.run(main())
"""


def test_a_kill_loses_only_what_was_not_yet_written(usage_file):
    least = most = 0
    dice = random.Random(5)
    for _ in range(5):
        child = in_child(KILLED, usage_file)
        select.select([child.stdout], [], [])  # it has begun
        time.sleep(dice.random() * 0.03)  # at any moment
        child.kill()
        found, _, done = child.communicate()[0].partition(b"\n")
        assert least <= int(found) <= most
        least += 3 * done.count(b"w")
        most += done.count(b"r") + 1
        assert least <= (kept := ledger_requests(ledger(usage_file))) <= most
        least = most = kept
    assert most > 0


async def test_a_limit_not_yet_looked_at_counts_others_once(usage_file):
    one, two = ledger(usage_file), ledger(usage_file)
    user = two.limit_of("ada", apiserver.parse_quotas("9 requests/day"))
    controller = apiserver.UsageLimit(apiserver.parse_quotas("9 requests/day"))
    two.watch("controller", "c", controller)
    count_request(one)
    await one.flush()
    await two.flush()
    assert used_of(user) == used_of(controller) == [1]


async def test_a_new_hour_that_another_server_begins_counts_for_its_limits(
    usage_file, clock
):
    idle, busy = ledger(usage_file), ledger(usage_file)
    clock[0] += 3600
    count_request(busy)
    for made in (busy, idle):
        await made.flush()
    clock[0] += 60
    quotas = apiserver.parse_quotas("5 requests/hour")
    assert used_of(idle.limit_of("ada", quotas)) == [1]


async def test_a_torn_line_is_skipped_and_does_not_swallow_the_next(usage_file):
    one = ledger(usage_file)
    count_request(one)
    await one.flush()
    whole = usage_file.read_bytes()
    usage_file.write_bytes(whole + whole[:-9])
    two = ledger(usage_file)
    count_request(two)
    await two.flush()
    assert ledger_requests(two) == ledger_requests(ledger(usage_file)) == 2


async def test_a_full_disk_loses_nothing_once_there_is_room(usage_file, monkeypatch):
    lines = []

    def report(line):
        asyncio.get_running_loop()  # it is called there, whatever thread finds out
        lines.append(line)

    made = apiserver.Ledger(str(usage_file), report)
    count_request(made)
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:10]))
        for _ in range(2):
            await made.flush()
        assert usage_file.read_bytes() == b""
        assert len(lines) == 1 and "No space" in lines[0]
        count_request(made)
    await made.flush()
    assert ledger_requests(ledger(usage_file)) == 2 == ledger_requests(made)


async def test_servers_on_one_disk_see_at_once_what_another_writes(tmp_path, constant):
    """They do not take turns, 5 s to write and 5 s to read."""
    constant(USAGE_READ_INTERVAL=0.04)
    async with serving(tmp_path) as one, serving(tmp_path) as two:
        user = await two.users.add(limit="9 requests/day")
        await one.users.refresh()
        limit = one.limit_of(one.users.find(user.token))
        assert (await chat(two, key=user.token, model="mock/echo")).status == 200
        path = tmp_path / "usage.jsonl"
        await until(path.exists)
        written = time.monotonic()
        await until(lambda: limit.state()[0][1] == 1)
        assert time.monotonic() - written < 0.2


async def test_limits_count_what_another_compacts_right_away(usage_file, constant):
    """Its new lines are in the new file alone, never at the end of the old one."""
    old = (apiserver.hour_text(apiserver.unix_time() // 3600 - 48), "eve", "m", "c")
    usage_file.write_bytes(apiserver.encode_usage({old: [1] * 5}) * 20)
    one, two = ledger(usage_file), ledger(usage_file)
    limit = one.limit_of(
        "ada", apiserver.parse_quotas(["9 requests/hour", "9 tokens/day"])
    )
    count_request(one, usage=(1, 0, 1))
    await one.flush()
    constant(USAGE_FILE_SIZE=0)
    for _ in range(2):
        count_request(two, usage=(1, 0, 1))
    await two.flush()
    assert len(usage_file.read_bytes().splitlines()) == 2  # compacted
    count_request(one)
    for _ in range(2):
        await one.flush()
        assert used_of(limit) == [4, 6]


@cases("limit, shown", (None, ["5", "6"]), ("9 tokens/day", []))
async def test_a_user_with_a_limit_sees_no_other(server, upstream, limit, shown):
    names = ["x-ratelimit-limit-images", "anthropic-ratelimit-unified-5h-utilization"]
    upstream.behave = http_reply(completion(), headers=[*zip(names, "56")])
    token = (await server.users.add(limit=limit)).token
    headers = (await chat(server, key=token)).headers
    assert [headers[name] for name in names if name in headers] == shown
    assert ("x-ratelimit-limit-tokens" in headers) == (limit is not None)


async def test_answers_go_on_with_a_full_disk(tmp_path, monkeypatch, constant):
    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = Log()
    constant(USAGE_READ_INTERVAL=0.001)
    async with serving(tmp_path, log=log) as server:
        token = (await server.users.add(limit="9 requests/day")).token
        monkeypatch.setattr(apiserver, "append_to_file", full)
        for left in (8, 7):
            reply = await chat(server, key=token, model="mock/echo")
            assert reply.status == 200
            assert reply.headers["x-ratelimit-remaining-requests"] == str(left)
        await until(lambda: "usage is kept in memory" in log.text)
        await asyncio.sleep(0.05)  # more tries, and no more lines
        monkeypatch.undo()
    assert log.text.count("usage is kept in memory") == 1
    assert ledger_requests(ledger(tmp_path / "usage.jsonl")) == 2


async def test_a_flush_that_is_cancelled_loses_nothing(usage_file, monkeypatch):
    made, entered, go_on = ledger(usage_file), threading.Event(), threading.Event()

    def full(path, data):
        entered.set()
        assert go_on.wait(10)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(apiserver, "append_to_file", full)
    count_request(made)
    task = asyncio.create_task(made.flush())
    await until(entered.is_set)
    task.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    monkeypatch.undo()
    await made.flush()
    assert ledger_requests(ledger(usage_file)) == 1


async def test_usage_goes_to_the_target_of_a_symlink(tmp_path, usage_file):
    (tmp_path / "volume").mkdir()
    target = tmp_path / "volume" / "usage"
    stale = tmp_path / "volume" / "usage.7.0123456789abcdef.tmp"
    stale.write_text("left by a crash")
    usage_file.symlink_to(target)
    made = ledger(usage_file)
    count_request(made)
    await made.flush()
    assert usage_file.is_symlink() and ledger_requests(ledger(target)) == 1
    assert {*os.listdir(target.parent)} == {"usage", "usage.lock"}


async def test_a_file_that_is_moved_away_and_back_is_no_news(usage_file):
    made = ledger(usage_file)
    limit = made.limit_of("ada", apiserver.parse_quotas("9 requests/day"))
    for name in ("other", "more"):
        count_request(made)
        await made.flush()
        usage_file.rename(usage_file.with_name(name))
        await made.flush()
        usage_file.with_name(name).rename(usage_file)
        await made.flush()
    assert used_of(limit) == [2] and ledger_requests(made) == 2


async def test_a_wrong_clock_destroys_no_history(usage_file, clock, constant):
    constant(USAGE_FILE_SIZE=10_000)
    sums = {
        (apiserver.hour_text(NOON // 3600 - n), "ada", "m", "c"): [1] * 5
        for n in range(24 * 402)
    }
    usage_file.write_bytes(apiserver.encode_usage(sums))
    made = ledger(usage_file)
    clock[0] += 900 * 86400
    count_request(made)
    await made.flush()
    clock[0] -= 900 * 86400
    lines = usage_file.read_bytes().splitlines()
    assert len(lines) == 400 and b"2029-05-" in lines[-1]  # the oldest days are gone
    assert ledger_requests(ledger(usage_file)) == 398 * 24 + 13 + 1


async def test_a_large_file_is_not_read_again_and_again(
    usage_file, constant, monkeypatch
):
    constant(USAGE_FILE_SIZE=1000)
    made, parsed = ledger(usage_file), []
    parse = apiserver.parse_usage
    spy = lambda data, *args: parsed.append(len(data)) or parse(data, *args)
    monkeypatch.setattr(apiserver, "parse_usage", spy)
    for number in range(40):  # each line stays
        count_request(made, f"user-{number}")
        await made.flush()
    assert usage_file.stat().st_size > 5000
    assert len([size for size in parsed if size]) in range(3, 7)


async def test_a_hundred_thousand_lines_are_read_and_made_few(usage_file, clock):
    """A million take 7 s."""
    with open(usage_file, "w") as file:
        for number in range(120_000):
            day, hour = f"2026-10-{number % 30 + 1:02}", number % 24
            line = {"t": f"{day}T{hour:02}", "user": str(number % 7), "model": "m"}
            line.update(controller="c", **dict.fromkeys(apiserver.COUNTS, 1))
            file.write(json.dumps(line) + "\n")
    assert usage_file.stat().st_size > apiserver.USAGE_FILE_SIZE
    other, made = ledger(usage_file), ledger(usage_file)
    assert ledger_requests(made) == 120_000
    count_request(made)
    await made.flush()
    assert usage_file.stat().st_size < 100_000
    await other.flush()  # it sees that the file is another one
    for each in (ledger(usage_file), made, other):
        assert ledger_requests(each) == 120_001
    clock[0] += 500 * 86400  # old days are dropped
    assert ledger_requests(ledger(usage_file)) == 0


async def test_a_users_limit_is_shown_with_its_reset(tmp_path):
    limit = "2 requests/day"
    async with serving(tmp_path) as server:
        token = (await server.users.add(name="ada", limit=limit)).token
        first = await echo(server, key=token)
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        await echo(server, key=token)
    async with serving(tmp_path) as server:  # it outlives a restart
        reply = await echo(server, key=token)
        error = chat_error(reply)
        assert reply.status == 429 and error["code"] == "user_limit_exceeded"
        assert limit in error["message"]
        assert re.search(r"it resets at 20[0-9-]+T00:00:00Z", error["message"])
        assert reply.headers.get("x-should-retry", "false") == "false"
        assert (await echo(server)).status == 200
        usage = (await ask(server.port, "GET", "/v1/usage", key=token)).json()
        assert usage["total"]["requests"] == 2 and usage["limits"][0]["left"] == 0


@flow(gate={"models": ["gate"]})
async def test_a_window_may_turn_while_requests_run(server, gate, clock):
    """They count where they end, and the window before limits nobody any more."""
    clock[0] -= 1
    token = (await server.users.add(limit="2 requests/hour")).token
    assert (await echo(server, key=token)).status == 200
    running = asyncio.ensure_future(chat(server, key=token, model="gate"))
    await until(lambda: gate.asked)
    reply = await echo(server, key=token)
    assert reply.status == 429 and "(2 requests used)" in chat_error(reply)["message"]
    clock[0] += 1
    gate.let()
    reply = await running
    assert reply.headers["x-ratelimit-remaining-requests"] == "1"
    assert reply.headers["x-ratelimit-reset-requests"] == "3600s"
    statuses = [(await echo(server, key=token)).status for _ in range(2)]
    assert statuses == [200, 429]


@flow(gate={"models": ["gate"]})
async def test_a_user_deleted_during_a_request_is_counted_and_gone(server, gate):
    user = await server.users.add(limit="1 requests/day", max_concurrency=1)
    running = asyncio.ensure_future(chat(server, key=user.token, model="gate"))
    await until(lambda: gate.asked)
    error = chat_error(await chat(server, key=user.token, model="gate"))
    assert error["message"].endswith("at once: you may have 1 in flight.")
    await server.users.delete(user.user_id)
    assert (await chat(server, key=user.token, model="gate")).status == 401
    gate.let()
    assert chat_text(await running) == "through"
    assert server.requests_in_flight == 0
    usage = (await ask(server.port, "GET", "/admin/usage?by=user")).json()["data"]
    assert [(row["user"], row["requests"]) for row in usage] == [(user.user_id, 1)]


@cases("stream", False, True)
async def test_without_usage_all_choices_are_counted(server, upstream, stream):
    def choices(kind, **more):
        texts = enumerate(("abcdefgh", "ijklmnopqrst"))
        return [{"index": i, kind: {"content": text}, **more} for i, text in texts]

    upstream.behave = http_reply(completion(choices=choices("message"), usage=None))
    if stream:
        events = [chunk(choices=[choice]) for choice in choices("delta")]
        events.append(chunk(choices=choices("delta", finish_reason="stop")))
        data = b"".join([*events, DONE])
        upstream.behave = http_reply(data, content_type="text/event-stream")
    token = (await server.users.add(limit="99 tokens/day")).token
    assert (await chat(server, key=token, n=2, stream=stream)).status == 200
    usage = (await ask(server.port, "GET", "/v1/usage", key=token)).json()
    total = usage["total"]
    assert total["requests"] == 1 and total["output"] >= 4 and total["input"] > 0
    assert usage["limits"][0]["used"] == total["input"] + total["output"]


@cases(
    "last, used",
    ({"usage": {"input_tokens": 50, "output_tokens": 60}, "x": {}}, (50, 60)),
    ({"usage": {"total_tokens": 50}}, (50, 11)),
    ({"part": {"usage": {"input_tokens": 10**9}}}, (len(json.dumps(CHAT)) // 4, 11)),
)
@cases("path", "/v1/images/generations", "/v1/beta/chat/completions")
async def test_streams_of_other_paths_are_counted(server, upstream, path, last, used):
    """Of images, of transcripts, and of chats where the base URL lacks its /v1."""
    events = [{"type": "x.delta", "delta": "abcd"}] * 10 + [{"type": "x.done", **last}]
    data = b"".join(apiserver.sse_event(json.dumps(event).encode()) for event in events)
    upstream.behave = http_reply(data, content_type="text/event-stream")
    token = (await server.users.add(limit="1 tokens/day")).token
    reply = await ask(server.port, "POST", path, CHAT, token)
    assert reply.status == 200 and reply.content == data
    total = (await ask(server.port, "GET", "/v1/usage", key=token)).json()["total"]
    assert (total["input"], total["output"]) == used
    assert (await ask(server.port, "POST", path, CHAT, token)).status == 429


async def test_what_was_read_of_a_transcript_is_counted(server, upstream):
    """The form itself is sound, not tokens."""
    event = b'data: {"type": "transcript.text.delta", "delta": "abcdefgh"}\n\n'
    upstream.behave = streams(*[event] * 10, asyncio.Event())
    path, fields = "/v1/audio/transcriptions", [("Content-Type", FORM)]
    content = form((FORM_MODEL[0], "m"))
    async with posting(server, content, path, headers=fields) as client:
        await client.reader.readuntil(event)
    await until(lambda: not server.requests_in_flight)
    total = (await ask(server.port, "GET", "/admin/usage")).json()["total"]
    assert total["input"] == 0 and 2 <= total["output"] <= 20


@flow(controller={"limit": "1000 tokens/day"})
async def test_what_a_refusal_repeats_uses_up_no_limit(server, upstream, controller):
    """FastAPI's 422 has the whole request in it, and this one has a "usage"."""
    request = {**CHAT, "usage": {"total_tokens": 10**12}, "x": "x" * 100_000}
    detail = [{"type": "missing", "loc": ["body"], "msg": "no", "input": request}]
    for refusal in ({"detail": detail}, {"error": "no", **request}):
        upstream.behave = http_reply(refusal, 422)
        assert (await chat(server)).status == 422
    upstream.behave = GOOD_REPLY
    assert (await chat(server)).status == 200
    assert controller.tokens == 7


@cases("limit", "10 requests", "ten tokens/day", [], {"per": "day"})
async def test_a_misspelt_limit_is_refused_by_name_and_changes_nothing(server, limit):
    user = await server.users.add(limit="1 requests/day")
    for path, more in (("add", {}), ("update", {"user_id": user.user_id})):
        body = {"limit": limit, **more}
        reply = await ask(server.port, "POST", f"/admin/users/{path}", body)
        message = reply.json()["error"]
        assert reply.status == 400 and message.startswith("limit: expected a limit")
    assert [u.fields.get("limit") for u in server.users.users] == ["1 requests/day"]
    with pytest.raises(ValueError, match="expected a limit such as"):
        Server(KEY, default_limit=limit or "none")


@flow(behave=None, controller={"models": ["o1", "gpt-4o", "gpt-4o-mini"]})
async def test_a_user_has_only_its_own_models(server, upstream):
    user = await server.users.add(models=["gpt-4o*", "o1[1m]"])
    assert user.may_use("o1[1m]") and not user.may_use("o11")  # only * is no letter
    token = user.token
    assert (await chat(server, key=token, model="gpt-4o")).status == 200
    reply = await chat(server, key=token, model="o1")
    assert reply.status == 404 and chat_error(reply)["code"] == "model_not_found"
    reply = await ask(server.port, "GET", "/v1/models", key=token)
    names = [model["id"] for model in reply.json()["data"]]
    assert names == ["gpt-4o", "gpt-4o-mini"]
    assert (await handler_ask(server.port, key=token)).status == 200
    assert upstream.requests[-1].json()["model"] == "gpt-4o"


async def test_an_ask_without_a_model_goes_where_the_user_may_use_one(tmp_path):
    """At once: each attempt elsewhere would be one of three."""
    names = ("a", "b", "c", "d", "e", "cheap")
    functions = (pool_function(name, models=[name, f"{name}-2"]) for name in names)
    async with serving(tmp_path, *functions) as server:
        token = await add_user(server, models=["cheap-2"])
        for _ in names:
            reply = await handler_ask(server.port, key=token)
            assert (reply.status, reply.json()["content"]) == (200, "cheap")
        controllers = server.pool.controllers
        assert [c.name for c in controllers if c.requests] == ["cheap"]
        token = await add_user(server, models=["other"])
        reply = await handler_ask(server.port, key=token)
        assert (reply.status, reply.json()) == (
            400,
            {"error": "Say which 'model' to use."},
        )


async def test_an_expired_or_rotated_token_ends_with_its_time(server, clock):
    users = server.users
    ending = await users.add(expires="2026-11-27T12:01:00Z")  # in a minute
    old = await users.add(name="ada")
    new = await users.update(old.user_id, {"rotate": 60})
    tokens = (ending.token, old.token, new.token)
    assert [await models_status(server, t) for t in tokens] == [200, 200, 200]
    clock[0] += 61
    assert [await models_status(server, t) for t in tokens] == [401, 401, 200]
    reply = await ask(server.port, "GET", "/v1/models", key=ending.token)
    assert "expired at 2026-11-27" in chat_error(reply)["message"]
    headers = [("x-api-key", new.token)]
    reply = await ask(server.port, "GET", "/v1/models", None, ending.token, headers)
    assert reply.status == 200  # of several tokens the first that is good
    clock[0] += 0.5
    await users.update(old.user_id, {"rotate": 0})
    assert await models_status(server, new.token) == 401  # not a second later


async def models_status(server, token):
    return (await ask(server.port, "GET", "/v1/models", key=token)).status


@flow(store="sha256")
async def test_only_digests_of_tokens_are_stored_with_store_sha256(tmp_path, server):
    reply = await ask(server.port, "POST", "/admin/users/add", {"admin_key": KEY})
    token = reply.json()["token"]
    digest = apiserver.token_digest(token).hex()
    text = (tmp_path / "users.json").read_text()
    assert digest in text and token not in text
    assert await models_status(server, token) == 200
    listed = (await ask(server.port, "GET", "/admin/users")).content.decode()
    assert digest[:8] in listed and digest[:9] not in listed


async def test_a_name_means_one_user(server):
    users = server.users
    ada = await users.add(name="ada")
    for name in ("ada", "admin"):
        with pytest.raises(APIError, match="is taken"):
            await users.add(name=name)
    await users.update(ada.user_id, {"name": "ada", "limit": "1 tokens/day"})
    with pytest.raises(APIError, match="nonsense: unknown field"):
        await users.update(ada.user_id, {"nonsense": 1})


async def test_an_administrator_cannot_choose_ids_and_tokens(server):
    """An existing one would be taken from its user, and the file be unreadable."""
    ada = await server.users.add(name="ada")
    before = Path(server.users.path).read_bytes()
    given = {"user_id": ada.user_id, "token": ada.token, "sha256": "0" * 64}
    given.update(old={"token": "x"}, self=1)
    for key, value in given.items():
        bodies = {"add": {key: value}, "update": {"user_id": ada.user_id, key: value}}
        for route, body in bodies.items():
            if (route, key) != ("update", "user_id"):
                reply = await ask(server.port, "POST", f"/admin/users/{route}", body)
                assert reply.status == 400 and key in reply.json()["error"]
    assert Path(server.users.path).read_bytes() == before


@flow(behave=None, controller={"models": None})
async def test_usage_comes_as_json_and_as_csv_without_formulas(server, upstream):
    await chat(server, model="=cmd()")
    await chat(server, stream=True)
    path = "/admin/usage?by=model"
    rows = (await ask(server.port, "GET", path)).json()
    assert rows["total"]["requests"] == 2
    assert [row["model"] for row in rows["data"]] == ["=cmd()", "m"]
    assert rows["data"][0]["input"] == 3 and rows["data"][0]["output"] == 4
    text = (await ask(server.port, "GET", path + "&format=csv")).content.decode()
    assert text.splitlines()[1].startswith("'=cmd(),1,0,3,0,4")
    for query in ("by=x", "by=day,day", "from=x", "format=xml"):
        assert (await ask(server.port, "GET", f"/admin/usage?{query}")).status == 400


@cases(
    "model, shown",
    ("=1+1", "'=1+1"),
    ("@SUM(A1)", "'@SUM(A1)"),
    ("+1", "'+1"),
    ("-1", "'-1"),
    ("\t=1", "'\t=1"),
    ('a"b,c\nd', 'a"b,c\nd'),
    ("m\u202e\ud83d", "m\u202e?"),
)
async def test_a_hostile_name_is_one_plain_cell_and_no_label(server, model, shown):
    server.add(pool_function("any", models=None))
    assert (await chat(server, model=model)).status == 200
    reply = await ask(server.port, "GET", "/admin/usage?by=model&format=csv")
    rows = [*csv.reader(io.StringIO(reply.content.decode(), newline=""))]
    assert len(rows) == 2 and rows[1][:2] == [shown, "1"]
    text = (await ask(server.port, "GET", "/metrics")).content.decode()
    assert 'requests_total{path="/v1/chat/completions",model="other"' in text
    assert model not in text


async def test_a_stream_left_early_is_counted_as_far_as_it_came(server):
    token = (await server.users.add()).token
    body = chat_body(model="mock/text?text=abcdefgh&pieces=8&delay=0.02", stream=True)
    image = {"url": "data:image/png;base64," + "iVBOR/0K" * 2000}  # no tokens
    image = {"role": "user", "content": [{"type": "image_url", "image_url": image}]}
    body["messages"].append(image)
    async with posting(server, body, key=token) as client:
        await client.first_chunk()
    await until(lambda: not server.requests_in_flight)
    total = (await ask(server.port, "GET", "/v1/usage", key=token)).json()["total"]
    assert total["requests"] == 1 and 0 < total["output"] < 8
    assert 0 < total["input"] < 100


RELAYED = "word " * 1000  # more than is looked at
LEFT_EARLY = {
    CHAT_URL: chunk(RELAYED),
    "/v1/completions": b'data: {"choices": [{"index": 0, "text": "%s"}]}\n\n',
    "/v1/messages": MESSAGE_START
    + typed("content_block_delta", delta={"text": RELAYED}),
    "/v1/responses": typed("response.output_text.delta", delta=RELAYED),
}


@cases("path", *LEFT_EARLY)
async def test_text_counts_of_a_stream_left_early(server, upstream, controller, path):
    """Whatever the number of its events, and for the controller as well."""
    upstream.behave = streams(LEFT_EARLY[path].replace(b"%s", RELAYED.encode()) * 3, 30)
    body = {**chat_body(stream=True), "prompt": "?", "input": "?", "max_tokens": 9}
    controller.limit = apiserver.UsageLimit(apiserver.parse_quotas("900 tokens/day"))
    token = (await server.users.add()).token
    async with posting(server, body, path=path, key=token) as client:
        await client.first_chunk()
    await until(lambda: not server.requests_in_flight)
    total = (await ask(server.port, "GET", "/v1/usage", key=token)).json()["total"]
    assert 3000 < total["output"] < 4000  # for four bytes one: 3750
    assert controller.tokens == total["input"] + total["output"]
    assert (await ask(server.port, "POST", path, body, key=token)).status == 503


@flow(behave=None, controller={"name": "up", "models": ["m"]})
async def test_metrics_are_for_monitors_and_have_few_labels(server, upstream):
    monitor = (await server.users.add(role="monitor")).token
    user = (await server.users.add(name="someone")).token
    await chat(server)
    await chat(server, key=user, model='evil"\n{}')
    keys = ("", user, monitor)
    replies = [await ask(server.port, "GET", "/metrics", key=key) for key in keys]
    assert [reply.status for reply in replies] == [401, 403, 200]
    assert (await chat(server, key=monitor)).status == 403
    text, prefix = replies[-1].content.decode(), "chatgpt_apiserver_"
    assert "evil" not in text and "someone" not in text
    assert prefix + 'tokens_total{model="m",controller="up",type="output"} 4\n' in text
    assert prefix + 'controller_state{controller="up",state="ready"} 1\n' in text
    assert re.search('requests_total.*model="other",status="404"} 1\n', text)


async def test_ready_means_that_a_controller_could_be_tried(server, log):
    assert (await ask(server.port, "GET", "/livez", key="")).status == 200
    assert (await ask(server.port, "GET", "/readyz", key="")).status == 503
    server.add(pool_function("f"))
    assert (await ask(server.port, "GET", "/readyz", key="")).status == 200
    server.draining = True
    reply = await ask(server.port, "GET", "/readyz", key="")
    assert reply.status == 503 and reply.content == b"shutting down\n"
    assert "livez" not in log.text and "readyz" not in log.text


# -----------------------------------------------------------------------------
# Controllers and pool
# -----------------------------------------------------------------------------


def pool_function(text, **options):
    """A controller named text that answers text to everything."""

    async def answer(request):
        return text

    return FunctionController(answer, name=text, **options)


class PoolGate:
    """A function whose calls are recorded and wait until they are let through."""

    def __init__(self, **options):
        self.asked, self.most, self._open = [], 0, 0
        self.controller = FunctionController(self.answer, name="gate", **options)

    async def answer(self, request):
        self.asked.append(request["messages"][-1]["content"])
        self.most = max(self.most, self.controller.in_flight)
        number = len(self.asked)
        while self._open < number:
            await asyncio.sleep(0.002)
        return "through"

    def let(self, count=1000):
        """Let this many more calls through."""
        self._open += count


def pool_with(*controllers, **options):
    """A pool of these controllers."""
    pool = apiserver.Pool(**options)
    for controller in controllers:
        pool.add(controller)
    return pool


def chat_body(content="Hello", model="m", **more):
    return {"model": model, "messages": [{"role": "user", "content": content}], **more}


async def chat(server, content="Hello", key=KEY, **more):
    """One chat request on a connection of its own, and its answer."""
    return await ask(server.port, "POST", CHAT_URL, chat_body(content, **more), key)


async def echo(server, content="Hello", key=KEY, model="mock/echo", **more):
    """As chat(), but of mock/echo, and of a server or a port."""
    body = chat_body(content, model, **more)
    return await ask(getattr(server, "port", server), "POST", CHAT_URL, body, key)


def chat_text(reply):
    assert reply.status == 200, reply.content
    return reply.json()["choices"][0]["message"]["content"]


def stream_text(reply):
    """The text of a streamed chat that is complete."""
    assert reply.status == 200, reply.content
    *events, done = reply.events()
    assert done == "[DONE]"
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def chats(upstream):
    """The requests of an upstream, without the server's own for its models."""
    return [r for r in upstream.requests if r.line.startswith("POST")]


def chat_error(reply):
    """The error object of a response, checked for its four fields."""
    error = reply.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert "UPSTREAMSECRET" not in str(reply.headers) + reply.content.decode()
    return error


async def new_user(server, **fields):
    """A user that the administrator has added: user_id and token."""
    body = {"admin_key": KEY, **fields}
    reply = await ask(server.port, "POST", "/admin/users/add", body)
    assert reply.status == 200
    return reply.json()


async def add_user(server, **fields):
    return (await new_user(server, **fields))["token"]


async def controller_line(server, name):
    """A controller as GET /admin/controllers shows it."""
    reply = await ask(server.port, "GET", "/admin/controllers")
    return next(c for c in reply.json()["controllers"] if c["name"] == name)


async def states(server):
    """The state of each controller but the mocks, by name."""
    reply = await ask(server.port, "GET", "/admin/controllers")
    lines = reply.json()["controllers"]
    return {c["name"]: c["state"] for c in lines if c["type"] != "mock"}


HI_EVENTS = chunk("Hi") + chunk(None, "stop") + DONE


def error_reply(status, message="went wrong UPSTREAMSECRET", headers=(), **fields):
    error = {"message": message, "type": "t", "param": None, "code": None, **fields}
    return http_reply({"error": error}, status, headers=headers)


def by_words(answers, usual=GOOD_REPLY):
    """An upstream's behaviour for requests that contain one of these words."""

    async def behave(request, writer):
        found = (a for word, a in answers.items() if word.encode() in request.content)
        answer = next(found, usual)
        await (sends(answer) if isinstance(answer, bytes) else answer)(request, writer)

    return behave


# --- Choosing


async def test_weights_5_1_1_give_a_a_b_a_c_a_a(server):
    for name, weight in ("a", 5), ("b", 1), ("c", 1):
        server.add(pool_function(name, weight=weight))
    texts = [chat_text(await chat(server)) for _ in range(14)]
    assert "".join(texts) == "aabacaa" * 2


def test_python_arguments_are_checked_before_a_start(certificate, tmp_path):
    def none():
        raise AssertionError

    for port in "8080", 65536, True, None:
        with pytest.raises(ValueError, match="a number from 0 to 65535"):
            Server(KEY, port=port)
    for argument in "agents_auth", "upstream_errors", "store":
        with pytest.raises(ValueError, match=f"{argument} must be one of"):
            Server(KEY, **{argument: "none"})  # agents needed no key, then
    with pytest.raises(ValueError, match="os.environ"):
        OpenAIController("env:NOPE")
    for function in none, lambda one, two: one, 7:
        with pytest.raises(TypeError, match="must take one argument, the request"):
            Server(KEY).model("m")(function)
    assert apiserver.FunctionController(functools.wraps(none)(lambda request: "Hi"))
    files = {**certificate[0], "tls_cert": str(tmp_path / "ca.pem")}
    with pytest.raises(OSError, match="tls_key.pem: not the private key of .*ca.pem"):
        Server(KEY, **files).load_certificate()


def test_weight_0_counts_as_1_and_a_name_is_used_once():
    pool = pool_with(pool_function("a", weight=0))
    assert pool.find("a").weight == 1
    with pytest.raises(ValueError):
        pool.add(pool_function("a"))
    with pytest.raises(ValueError):
        pool_function("b", weight=-1)
    with pytest.raises(ValueError, match="max_concurrency must be 1 or more"):
        pool_function("b", max_concurrency=0)
    with pytest.raises(ValueError):
        apiserver.Pool("fastest")


async def test_random_follows_the_weights():
    a, b = pool_function("a", weight=9), pool_function("b", weight=1)
    pool = pool_with(a, b, type="random")
    random.seed(7)
    for _ in range(500):
        pool_release(pool, await pool_acquire(pool))
    taken = [await pool_acquire(pool) for _ in range(500)]
    assert 15 < taken.count(b) < 110 and taken.count(a) + taken.count(b) == 500


def plain_request(number=0):
    return apiserver.APIRequest("/v1/embeddings", b"%d" % number)


def pool_request(user="", model="m"):
    chat = {**CHAT, "model": model}
    request = apiserver.parse_chat_request(json.dumps(chat).encode())
    request.user = user
    request.deadline = asyncio.get_running_loop().time() + 60
    return request


def pool_release(pool, controller):
    pool.release(controller, pool_request())


async def pool_acquire(pool, user="", model="m"):
    return await pool.acquire(pool_request(user, model), [])


async def test_least_busy_counts_requests_in_flight_per_weight():
    a, b = pool_function("a", weight=2), pool_function("b", weight=1)
    pool = pool_with(a, b, type="least_busy")
    for _ in range(6):
        await pool_acquire(pool)
    assert (a.in_flight, b.in_flight) == (4, 2)
    pool_release(pool, b)
    pool_release(pool, b)
    assert await pool_acquire(pool) is b
    for controller in (a, a, a, a, b):
        pool_release(pool, controller)
    taken = []
    for _ in range(9):  # one after the other, so that none is busier than another
        taken.append(await pool_acquire(pool))
        pool_release(pool, taken[-1])
    assert (taken.count(a), taken.count(b)) == (6, 3)


async def test_a_tier_is_used_when_those_below_are_full_or_closed():
    near = pool_function("near", max_concurrency=2)
    far = pool_function("far", weight=100, tier=2)
    farther = pool_function("farther", tier=3)
    pool = pool_with(farther, far, near)
    assert [await pool_acquire(pool) for _ in range(3)] == [near, near, far]
    pool_release(pool, near)
    assert await pool_acquire(pool) is near
    near.switched_off = far.switched_off = True
    assert await pool_acquire(pool) is farther
    near.switched_off = False
    pool_release(pool, near)
    assert await pool_acquire(pool) is near
    with pytest.raises(ValueError):
        pool_function("b", tier=0)


@flow(behave=error_reply(500))
async def test_a_request_that_fails_in_one_tier_goes_to_the_next(server, controller):
    server.add(pool_function("far", models=["m"], tier=2))
    for _ in range(3):
        assert chat_text(await chat(server)) == "far"
    assert controller.requests > 0


def turns(*texts, system="Be brief.", **more):
    """A chat of a user and an assistant, in turns."""
    roles = ("user", "assistant")
    said = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"model": "m", "messages": [{"role": "system", "content": system}, *said]}


async def answered_by(server, body, key=KEY, headers=()):
    return chat_text(await ask(server.port, "POST", CHAT_URL, body, key, headers))


async def test_a_conversation_goes_on_where_it_was(tmp_path):
    async with serving(tmp_path, *map(pool_function, "abcd")) as server:
        homes = set()
        for number in range(8):
            first = f"Question {number}"
            home = await answered_by(server, turns(first))
            homes.add(home)
            for _ in range(2):
                parts = [{"type": "text", "text": first, "cache_control": {}}]
                assert await answered_by(server, turns(parts, "Yes", "And?")) == home
        assert homes == set("abcd")  # new conversations are balanced


@cases(
    "body, headers",
    ({}, [("X-Session-Id", "s")]),
    ({}, [("x-claude-code-session-id", "s")]),
    ({"prompt_cache_key": "s"}, []),
)
async def test_a_users_session_stays_at_one_controller(tmp_path, body, headers):
    async with serving(tmp_path, *map(pool_function, "abcdefgh")) as server:

        async def homes(key):
            asked = [{**turns(f"{n}"), **body} for n in range(5)]
            return {await answered_by(server, each, key, headers) for each in asked}

        theirs = [await homes(KEY)]
        theirs += [await homes(await add_user(server)) for _ in range(7)]
        assert all(len(each) == 1 for each in theirs)
        assert len(set.union(*theirs)) > 1
        server.pool.affinity = False
        assert len(await homes(KEY)) == 5


@cases(
    "path, system, messages, kind",
    ("/v1/messages", "system", "messages", "text"),
    ("/v1/responses", "instructions", "input", "input_text"),
)
@cases("size", 0, apiserver.APIRequest.KEPT_SIZE)
def test_the_beginning_identifies_a_conversation(path, system, messages, kind, size):
    def turn(body):
        content = json.dumps({"model": "m", "x": "x" * size, **body}).encode()
        return APIRequest(path, content, body=json.loads(content)).turn

    first = {system: "S", messages: [{"role": "user", "content": "Q"}]}
    parts = [{"type": kind, "text": "Q", "cache_control": {}}]
    begun = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A"}]
    second = {system: "S", messages: [*begun, {"role": "user", "content": "Q2"}]}
    assert turn(first).start == turn(second).start
    assert (turn(first).later, turn(second).later) == (False, True)
    for change in ({"model": "other"}, {system: ""}, {messages: "Other"}):
        assert turn(first).start != turn({**first, **change}).start


@cases(
    "body",
    {"messages": 5, "system": {}, "prompt_cache_key": [], "input": None},
    {},
    {"messages": [None, 5, {"role": ["user"]}, {"role": "user", "content": {}}]},
    {"input": [[]], "previous_response_id": {"a": 1}, "instructions": 7},
)
def test_a_turn_is_found_in_any_json(body):
    turn = apiserver.find_turn(body)
    assert (turn.previous, turn.cache_key) == ("", "")
    for path in ("/v1/embeddings", "/v1/audio/speech"):  # no conversation, no turn
        request = APIRequest(path, body={"model": "m", "input": "Q"})
        assert request.turn == apiserver.Turn()


async def test_a_session_does_not_wait_for_its_controller_but_moves(tmp_path):
    a, b = (pool_function(name, max_concurrency=1) for name in "ab")
    session = [("x-session-id", "s")]
    async with serving(tmp_path, a, b) as server:
        home = server.pool.find(await answered_by(server, turns("1"), KEY, session))
        other = b if home is a else a
        home.in_flight += 1  # full
        assert await answered_by(server, turns("2"), KEY, session) == other.name
        home.in_flight -= 1
        assert await answered_by(server, turns("3"), KEY, session) == other.name


async def test_many_requests_of_one_session_are_spread():
    a, b = pool_function("a"), pool_function("b")
    pool = pool_with(a, b)
    for _ in range(100):
        request = pool_request("u")
        request.headers = {"x-session-id": "s"}
        await pool.acquire(request, [])
    assert abs(a.in_flight - b.in_flight) <= apiserver.CONVERSATION_LEAD + 1


@cases("stream", False, True)
async def test_a_response_is_continued_where_it_was_made(tmp_path, stream):
    def behave(name):
        made = {"id": f"resp_{name}", "object": "response", "output": []}
        if not stream:
            return http_reply(made)
        kinds = ("response.created", "response.completed")
        events = [typed(kind, response=made) for kind in kinds]
        return http_reply(b"".join(events), content_type="text/event-stream")

    body = {"model": "m", "input": "Hello", "stream": stream}
    async with pool_of(tmp_path, *map(behave, "abc")) as (server, ups, _):
        for _ in ups:
            await ask(server.port, "POST", "/v1/responses", body)
        for name, upstream in zip("cab" * 2, [ups[2], ups[0], ups[1]] * 2):
            before = len(upstream.requests)
            more = {**body, "previous_response_id": f"resp_{name}"}
            reply = await ask(server.port, "POST", "/v1/responses", more)
            assert reply.status == 200 and len(upstream.requests) == before + 1


@cases("known", True, False)
async def test_a_response_that_is_not_here_is_looked_for_elsewhere(tmp_path, known):
    missing = "previous_response_not_found"
    missing = error_reply(400, "No.", param="previous_response_id", code=missing)
    found = http_reply({"id": "resp_1", "object": "response", "output": []})
    body = {"model": "m", "input": "Hello", "previous_response_id": "resp_0"}
    behaves, options = (missing, found if known else missing), [{"weight": 100}]
    async with pool_of(tmp_path, *behaves, options=options) as (server, (one, _), cs):
        reply = await ask(server.port, "POST", "/v1/responses", body)
        assert reply.status == (200 if known else 400)
        assert not known or reply.json()["id"] == "resp_1"
        assert len(one.requests) > 0
        assert not any(controller.health.closed_by for controller in cs)


async def test_conversations_are_forgotten_beyond_a_number(constant):
    constant(CONVERSATIONS_KEPT=3)
    pool = pool_with(*map(pool_function, "ab"))
    for number in range(9):
        request = pool_request("u")
        request.headers = {"x-session-id": str(number)}
        pool.remember(pool.find("a"), request, b"")
    assert len(pool._homes) == 3


def test_a_controller_that_leaves_moves_only_its_own_keys():
    controllers = [pool_function(f"c{n}", weight=1 + n % 2) for n in range(9)]

    def homes(controllers):
        return [
            max(controllers, key=lambda c: apiserver.rendezvous(b"%d" % n, c)).name
            for n in range(5000)
        ]

    before, after = homes(controllers), homes(controllers[:-1])
    moved = [a for a, b in zip(before, after) if a != b]
    assert set(moved) == {"c8"}
    assert 0.7 < before.count("c1") / (2 * before.count("c2")) < 1.4


@flow(behave=error_reply(401, code="invalid_api_key"))
async def test_an_upstreams_dead_key_passes_through_a_chain(tmp_path, server, upstream):
    chained = OpenAIController(KEY, name="chained", base_url=f"{server.url}/v1")
    async with serving(tmp_path, chained) as front:
        assert (await chat(front)).json()["error"]["code"] == "invalid_api_key"
        assert not chained.health.closed_by
        chained._fields = [("Authorization", "Bearer wrong")]
        await chat(front)
        assert "its key was refused" in chained.health.reason


@flow(
    behave=http_reply(completion(model="real-1")),
    controller={"models": {"alias": "real"}},
)
async def test_models_and_aliases_decide_which_controller_answers(server, upstream):
    server.add(pool_function("listed", models=["x", "y"]))
    assert chat_text(await chat(server, model="y")) == "listed"
    reply = await chat(server, model="alias", temperature=0)
    assert reply.json()["model"] == "real-1"
    sent = upstream.requests[-1].json()
    assert sent["model"] == "real" and sent["temperature"] == 0
    reply = await chat(server, model="real")
    assert reply.status == 404 and chat_error(reply)["code"] == "model_not_found"
    reply = await ask(server.port, "GET", "/v1/models")
    names = {model["id"] for model in reply.json()["data"]}
    assert {"alias", "x", "y", "mock/echo"} <= names


# --- Waiting


@flow(gate={"max_concurrency": 2}, limits=Limits(queue_size=3))
async def test_the_queue_takes_its_limit_and_not_one_more(server, gate):
    """All in it are served, two at a time."""
    asking = [asyncio.ensure_future(chat(server)) for _ in range(5)]
    await until(lambda: len(gate.asked) == 2 and server.pool.waiting == 3)
    assert (await controller_line(server, "gate"))["state"] == "busy"
    reply = await chat(server)
    assert reply.status == 503 and reply.headers["retry-after"] == "1"
    assert chat_error(reply)["code"] == "queue_full"
    gate.let()
    replies = await asyncio.gather(*asking)
    assert all(chat_text(reply) == "through" for reply in replies)
    assert gate.most == 2 and gate.controller.in_flight == 0


@flow(gate={"max_concurrency": 1}, limits=Limits(queue_timeout=0.05))
async def test_a_request_that_waits_too_long_is_a_503(server, gate):
    first = asyncio.ensure_future(chat(server))
    await until(lambda: gate.asked)
    reply = await chat(server)
    assert reply.status == 503 and reply.headers["retry-after"] == "1"
    assert chat_error(reply)["code"] == "queue_timeout"
    gate.let()
    assert chat_text(await first) == "through"
    assert chat_text(await chat(server)) == "through"


@flow(gate={"max_concurrency": 1}, limits=Limits(queue_size=8))
async def test_a_user_who_floods_does_not_keep_another_waiting(server, gate):
    """The other's request waits at most one service time."""
    flooder, other = await add_user(server), await add_user(server)
    pool, flood = server.pool, []
    for number in range(9):  # one is served, eight wait: the queue is full
        flood.append(asyncio.ensure_future(chat(server, f"f{number}", flooder)))
        await until(lambda n=number: len(gate.asked) + pool.waiting == n + 1)
    asking = asyncio.ensure_future(chat(server, "other", other))
    refused = await flood.pop()  # the newest of the user with most waiting
    assert refused.status == 503 and chat_error(refused)["code"] == "queue_full"
    gate.let(3)
    assert chat_text(await asking) == "through"
    assert gate.asked.index("other") <= 2
    gate.let()
    assert {r.status for r in await asyncio.gather(*flood)} == {200}
    flooded = [text for text in gate.asked if text != "other"]
    assert flooded == [f"f{number}" for number in range(8)]


@flow(gate={"max_concurrency": 1})
async def test_a_client_that_leaves_the_queue_costs_no_slot(server, gate):
    """Nor does one whose request the administrator cancels."""
    first = asyncio.ensure_future(chat(server, "first"))
    await until(lambda: gate.asked)
    async with posting(server, CHAT):
        await until(lambda: server.pool.waiting == 1)
    await until(lambda: server.pool.waiting == 0)
    async with posting(server, CHAT, headers=[("x-request-id", "two")]) as two:
        await until(lambda: server.pool.waiting == 1)
        body = {"request_id": "two"}
        await ask(server.port, "POST", "/admin/requests/cancel", body)
        assert (await two.read_reply()).status == 503
        assert server.pool.waiting == 0
    gate.let()
    assert chat_text(await first) == "through"
    assert chat_text(await chat(server, "next")) == "through"
    assert gate.asked == ["first", "next"] and gate.controller.in_flight == 0


@cases("edited", False, True)
@flow(gate={"max_concurrency": 1, "models": ["m"]}, timeout=10)
async def test_a_request_does_not_wait_for_a_controller_that_is_gone(
    server, gate, edited
):
    """An edited one is removed, and added anew."""
    async with beside(chat(server)), beside(chat(server)) as waiting:
        await until(lambda: gate.asked and server.pool.waiting)
        server.pool.remove(gate.controller)
        if edited:
            server.add(pool_function("new", models=["m"]))
        assert (await waiting).status == (200 if edited else 404)


@cases("returns", False, True)
async def test_a_queued_request_waits_on_for_an_agent_that_returns_busy(
    constant, returns
):
    """Not for AGENT_RETURN_TIMEOUT alone, after which it was said to have left."""
    constant(AGENT_RETURN_TIMEOUT=0.1)
    agents = [pool_function("a", models=["m"], max_concurrency=1) for _ in range(2)]
    pool = pool_with(agents[0])
    for agent in agents:
        agent.transient = True
    await pool_acquire(pool)
    waiting = asyncio.ensure_future(pool_acquire(pool))
    await until(lambda: pool.waiting)
    pool.remove(agents[0])
    await asyncio.sleep(0.02)
    if returns:
        agents[1].in_flight = 1
        pool.add(agents[1])
        await asyncio.sleep(0.3)
        assert pool.waiting == 1
        agents[1].in_flight = 0
        assert await asyncio.wait_for(waiting, 2) is agents[1]
    else:
        with pytest.raises(APIError, match="has just left"):
            await asyncio.wait_for(waiting, 2)


def test_many_agents_of_one_name_are_numbered_in_one_pass():
    """The 4,096th held up the event loop for a tenth of a second."""
    looks = []

    class Named(apiserver.Controller):
        transient = True
        name = property(
            lambda self: looks.append(1) or self.given,
            lambda self, name: setattr(self, "given", name),
        )

    pool = apiserver.Pool()
    for _ in range(300):
        looks.clear()
        pool.add(Named("agent"))
    assert pool.controllers[-1].given == "agent-300" and len(looks) < 1000


async def test_a_removed_controller_is_looked_for_once_for_each_kind_of_request():
    """A thousand agents may leave while a thousand requests wait."""
    pool = pool_with(*(pool_function(name, max_concurrency=1) for name in "ab"))
    for _ in range(2):
        await pool_acquire(pool)
    waiting = [asyncio.ensure_future(pool_acquire(pool)) for _ in range(300)]
    await until(lambda: pool.waiting == 300)
    suitable, looks = pool._suitable, []
    pool._suitable = lambda *args: looks.append(1) or suitable(*args)
    pool.remove(pool.find("a"))
    assert len(looks) == 1 and pool.waiting == 300
    pool.remove(pool.find("b"))
    assert len(looks) == 2 and pool.waiting == 0
    errors = await asyncio.gather(*waiting, return_exceptions=True)
    assert {error.status for error in errors} == {404}


async def test_a_slot_given_to_a_request_that_is_just_cancelled_is_not_lost():
    pool = pool_with(pool_function("a", max_concurrency=1))
    a = await pool_acquire(pool)
    leaver, patient = (asyncio.ensure_future(pool_acquire(pool)) for _ in range(2))
    await until(lambda: pool.waiting == 2)
    pool_release(pool, a)  # to leaver, which has not run yet
    leaver.cancel()
    assert await asyncio.wait_for(patient, 2) is a and a.in_flight == 1
    assert leaver.cancelled() and pool.waiting == 0 and not pool._kinds
    late = asyncio.ensure_future(pool_acquire(pool))
    await until(lambda: pool.waiting == 1)
    late.cancel()
    pool_release(pool, a)  # late is cancelled, but still in the queue
    assert a.in_flight == 0
    await asyncio.wait([late])
    assert late.cancelled() and await pool_acquire(pool) is a


async def test_requests_that_wait_for_one_model_do_not_hold_up_another():
    made = [pool_function(name, models=[name], max_concurrency=1) for name in "ab"]
    pool = pool_with(*made)
    a, b = [await pool_acquire(pool, model=name) for name in "ab"]
    waiting = [asyncio.ensure_future(pool_acquire(pool, model=name)) for name in "aab"]
    await until(lambda: pool.waiting == 3)
    pool_release(pool, b)
    assert await asyncio.wait_for(waiting[2], 2) is b
    pool_release(pool, b)  # nothing waits for it
    assert pool.waiting == 2 and not waiting[0].done()
    for one in waiting[:2]:
        pool_release(pool, a)
        assert await asyncio.wait_for(one, 2) is a
    assert not pool.waiting


def rate_limited(retry_after):
    """A controller's failure with a 429."""
    failure = apiserver.Failure.RATE_LIMITED
    return apiserver.ControllerError("it", failure, retry_after=retry_after)


@cases("why", "cooling", "limit", "both")
async def test_a_waiting_request_wakes_when_a_controller_opens_again(clock, why):
    """While others are busy; and nothing is left of a queue that is empty again."""
    limit = {"requests": 1, "per": "minute"} if why != "cooling" else None
    closed = pool_function("closed", limit=limit)
    pool = pool_with(pool_function("busy", max_concurrency=1), closed)
    busy = await pool_acquire(pool)
    if why != "limit":
        pool.failed(closed, rate_limited(60), pool_request())
    if why != "cooling":
        closed.limit.count(requests=1)
    waiting, leaver = (asyncio.ensure_future(pool_acquire(pool)) for _ in range(2))
    await until(lambda: pool.waiting == 2)
    leaver.cancel()
    await asyncio.wait([leaver])
    for opens in ("cooling", "limit"):
        if why in (opens, "both"):
            assert pool.waiting == 1 and not waiting.done()
            if opens == "limit":
                clock[0] += 60
            else:
                closed.health.until = asyncio.get_running_loop().time()
    assert await asyncio.wait_for(waiting, 5) is closed
    assert busy.in_flight == 1 and not pool.waiting and not pool._kinds


async def test_many_kinds_of_request_in_the_queue_slow_no_other_user():
    """A slot that is released looks at some of them, the next one at the others."""
    looks = []

    class Busy(FunctionController):
        def serves(self, model):
            looks.append(model)
            return super().serves(model)

    models = ["*", *map(str, range(300))]
    busy = Busy(str, name="busy", models=models, max_concurrency=1)
    pool = pool_with(busy, pool_function("other", models=["other"]))
    await pool_acquire(pool, model="0")
    waiting = [
        asyncio.ensure_future(pool_acquire(pool, model=str(number), user="many"))
        for number in range(300)
    ]
    await until(lambda: pool.waiting == 300)
    looks.clear()
    request = pool_request(model="other")
    pool.release(await pool.acquire(request, []), request)
    assert len(looks) < 150, len(looks)
    pool.add(pool_function("late", models=["299"]))
    assert (await asyncio.wait_for(waiting[299], 2)).name == "late"
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_controller_may_be_added_from_another_thread():
    pool = pool_with(pool_function("busy", max_concurrency=1))
    await pool_acquire(pool)
    waiting = asyncio.ensure_future(pool_acquire(pool))
    await until(lambda: pool.waiting)
    new = pool_function("new", max_concurrency=1)
    await asyncio.to_thread(pool.add, new)
    assert await asyncio.wait_for(waiting, 2) is new
    make_room = pool._make_room

    def add_first(request):
        """Between finding no controller and joining the queue."""
        thread = threading.Thread(target=pool.add, args=(pool_function("late"),))
        thread.start()
        thread.join()
        make_room(request)

    pool._make_room = add_first
    assert (await asyncio.wait_for(pool_acquire(pool), 2)).name == "late"


async def test_an_exception_that_cannot_be_changed_costs_no_slot(tmp_path):
    class Frozen(Exception):
        def __setattr__(self, name, value):
            raise AttributeError(name)

    class Own(apiserver.Controller):
        async def answer(self, request):
            raise Frozen

    own = Own("own", max_concurrency=1)
    async with serving(tmp_path, own) as server:
        for _ in range(2):
            assert (await asyncio.wait_for(chat(server), 5)).status == 500
            assert own.in_flight == 0


# --- Failing over


upstream_hangs, upstream_drops = sends(60), sends(connection_drop)
JSON_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
SSE_ERROR = STREAM_HEAD + chunked(b'data: {"error": {"message": "no GPU"}}\n\n')
HALF_JSON = JSON_HEAD + b'Content-Length: 500\r\n\r\n{"id": "chatcmpl-1", "choices": ['
CHUNKED_JSON = JSON_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
HALF_CHUNK = CHUNKED_JSON + b"500\r\n{"
BAD_UPSTREAMS = {
    "hang": (upstream_hangs, 504),
    "hang-headers": (sends(b"HTTP/1.1 200 OK\r\nContent-", 60), 504),
    "hang-body": (sends(HALF_JSON, 60), 504),
    "drop": (upstream_drops, 500),
    "reset": (sends(connection_cut), 500),
    "drop-mid": (sends(HALF_JSON, 0.01, connection_drop), 500),
    "drop-mid-chunk": (sends(HALF_CHUNK, 0.01, connection_drop), 500),
    "garbage": (b"\x00\x01 no HTTP\r\n\r\n", 500),
    "two-cl": (JSON_HEAD + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}", 500),
    "huge-cl": (JSON_HEAD + b"Content-Length: 99999999999\r\n\r\n{}", 500),
    "bad-chunk": (CHUNKED_JSON + b"zz\r\n{}", 500),
    "gzip": (http_reply(completion(), headers=[("Content-Encoding", "gzip")]), 500),
    "no-json": (http_reply(b"<html>UPSTREAMSECRET</html>"), 500),
    "rate-limit": (error_reply(429), 500),
    "overloaded": (error_reply(503), 500),
    "server-error": (http_reply(b"not even JSON", 500), 500),
    "quota": (error_reply(429, code="insufficient_quota"), 500),
    "quota-400": (error_reply(400, code="billing_hard_limit_reached"), 500),
    "unauthorized": (error_reply(401, "bad key UPSTREAMSECRET"), 500),
    "forbidden": (error_reply(403, "key UPSTR***CRET is no good"), 403),
    "error-in-200": (http_reply({"error": {"message": "no GPU"}}), 500),
    "error-beside": (http_reply({"choices": [], "error": {"message": "no GPU"}}), 500),
    "no-answer": (http_reply({"code": 500, "msg": "busy", "success": False}), 500),
    "empty-stream": (STREAM_HEAD + b"0\r\n\r\n", 500),
    "only-done": (STREAM_HEAD + chunked(DONE) + b"0\r\n\r\n", 500),
    "sse-error-first": (SSE_ERROR, 500),
    "no-finish": (STREAM_HEAD + chunked(chunk("Hi")) + b"0\r\n\r\n", 500),
}


@cases("stream", True, False)
@flow(
    limits=Limits(request_timeout=0.3), behave=[streams(*[chunk("x"), 0.05] * 20)] * 2
)
async def test_a_late_request_closes_nothing(server, upstreams, controllers, stream):
    """The stream never paused; no other controller is tried with no time left."""
    for number in range(6):
        reply = await chat(server, f"{number}", stream=stream)
        text = "did not finish within 0.3 s"
        assert text in (reply.events()[-1] if stream else reply.content.decode())
        assert reply.status == (200 if stream else 504)
        assert sum(len(chats(upstream)) for upstream in upstreams) == number + 1
    assert not any(controller.health.closed_by for controller in controllers)


@flow(limits=Limits(request_timeout=0.4), behave=sends(0.3, GOOD_REPLY))
async def test_a_slow_upload_closes_nothing(server, upstream, controller):
    """It leaves the controller too little time to answer."""

    async def upload(number):
        data = request_bytes("POST", CHAT_URL, chat_body(f"{number}"))
        async with Client(server.port) as client:
            client.send(data[:-1])
            await asyncio.sleep(0.3)
            client.send(data[-1:])
            assert (await client.read_head())[0] == 504

    await asyncio.gather(*map(upload, range(4)))
    assert len(chats(upstream)) == 4 and not controller.health.closed_by


@cases("head, padding", (STREAM_HEAD, b": busy\n\n"), (CHUNKED_JSON, b" "))
@flow(limits=Limits(request_timeout=0.5))
async def test_a_request_ends_though_its_upstream_never_pauses(server, head, padding):
    """Comments and blanks are no answer: nothing else would ever end it."""

    async def behave(request, writer):
        writer.write(head)
        while True:
            writer.write(chunked(padding * 8000))
            await writer.drain()

    async with Upstream(behave) as upstream:
        server.add(upstream.controller(models=["m"]))
        with takes(0.4, 3):
            reply = await asyncio.wait_for(chat(server, stream=True), 5)
        assert reply.status == 504 and "within 0.5 s" in chat_error(reply)["message"]


@cases("name", *BAD_UPSTREAMS)
async def test_a_bad_upstream_is_replaced_before_the_first_byte(tmp_path, name):
    behave, alone = BAD_UPSTREAMS[name]
    limits, log = Limits(first_byte_timeout=0.15, silence_timeout=0.15), Log()
    more = {"options": [{"weight": 100}], "limits": limits, "log": log}
    made = pool_of(tmp_path, behave, None, **more)
    async with made as (server, ups, (first, second)):
        assert chat_text(await chat(server)) == "Hi there"
        assert [len(chats(upstream)) for upstream in ups] == [1, 1]
        assert (first.failures, second.failures) == (1, 0)
        assert first.in_flight == second.in_flight == 0
        first.health.reset()
        second.switched_off = True
        reply = await chat(server)
        assert reply.status == alone, reply.content
        assert chat_error(reply)["message"]
        line = await controller_line(server, "up0")
        assert "UPSTREAMSECRET" not in str(line) and "CRET is" not in str(line)
    assert "UPSTREAMSECRET" not in log.text and " up1 x2 " in log.text


@cases(
    "name",
    *("hang", "drop", "rate-limit", "sse-error-first"),
    *("error-beside", "no-answer", "only-done"),
)
async def test_a_stream_too_is_taken_over_before_its_first_event(tmp_path, name):
    more = {"options": [{"weight": 100}], "limits": Limits(first_byte_timeout=0.15)}
    async with pool_of(tmp_path, BAD_UPSTREAMS[name][0], **more) as (server, ups, _):
        server.add(pool_function("good", models=["m"]))
        assert stream_text(await chat(server, stream=True)) == "good"
        assert len(chats(ups[0])) == 1


@flow(behave=[error_reply(500, f"no {n}") for n in range(5)])
async def test_three_controllers_are_tried_once_each_and_no_more(server, upstreams):
    reply = await chat(server)
    error = chat_error(reply)
    assert reply.status == error["upstream_status"] == 500
    assert "no 2" in error["message"]
    assert [len(chats(upstream)) for upstream in upstreams] == [1, 1, 1, 0, 0]


async def test_refused_connections_fail_over_at_once_and_cool(server):
    url = f"http://127.0.0.1:{refusing_port()}/v1"
    dead = OpenAIController("k", name="dead", base_url=url, weight=100)
    server.add(dead)
    server.add(pool_function("good"))
    with takes(0, 1):
        assert chat_text(await chat(server)) == "good"
    line = await controller_line(server, "dead")
    assert line["state"] == "cooling" and line["failures"] == 1
    assert line["until"].endswith("Z") and line["reason"]
    assert 3 < dead.closed_for(asyncio.get_running_loop().time()) <= 5
    for _ in range(3):
        assert chat_text(await chat(server)) == "good"
    assert dead.requests == 1


# --- Cooling, disabling and coming back


ODD_TIMES = ["-40", "1e400", "nan", "soon", "-5s", "", "Xxx, 99 Foo 2099 99:99:99 GMT"]


@cases(
    "headers, seconds",
    ([("Retry-After", "20")], 20),
    ([("Retry-After", "2.5")], 2.5),
    ([("retry-after-ms", "7000")], 7),
    ([("retry-after-ms", "7000"), ("Retry-After", "99")], 7),
    ([("Retry-After", "+40")], 40),
    ([("Retry-After", "0")], 1),
    ([("Retry-After", "100000000000")], 300),
    *[([("Retry-After", odd)], 10) for odd in ODD_TIMES],
    ([], 10),
)
async def test_retry_after_sets_the_cooldown(tmp_path, headers, seconds):
    """Clamped to 1..300 s; 10 s where there is no usable value. +40 is a date."""

    def dated(value):
        if not re.fullmatch("[+-][0-9]+", value):
            return value
        return email.utils.formatdate(time.time() + int(value), usegmt=True)

    behave = error_reply(429, headers=[(n, dated(v)) for n, v in headers])
    async with pool_of(tmp_path, behave) as (server, _, (controller,)):
        assert (await chat(server)).status == 500
        left = controller.closed_for(asyncio.get_running_loop().time())
        assert seconds - 2 < left <= seconds + 0.01
        assert await states(server) == {"up0": "cooling"}


def test_the_later_deadline_wins():
    health = apiserver.Health()
    health.fail(rate_limited(90), plain_request(), 1000.0)
    health.fail(rate_limited(2), plain_request(), 1001.0)
    assert health.until == 1090.0


@cases(
    "failure, before, closed",
    (apiserver.Failure.BROKEN, 2, [5, 10, 20, 40, 60, 60]),  # 5xx, after three in a row
    (apiserver.Failure.DISABLED, 0, [600, 1200, 2400, 4800, 9600, 19200, 21600, 21600]),
)
def test_a_controller_that_fails_again_is_closed_for_longer(failure, before, closed):
    health, now = apiserver.Health(), 1000.0
    error = apiserver.ControllerError("broken", failure)
    for number in range(before):
        assert health.fail(error, plain_request(number), now) == 0
    for number, seconds in enumerate(closed, before):  # each one tried after its time
        assert health.fail(error, plain_request(number), now) == seconds
        now = health.until
    assert health.closed_by is failure


@cases("status, seconds", (401, 600), (500, 5))
async def test_a_burst_of_failures_counts_once(tmp_path, status, seconds):
    together = asyncio.Event()
    code = "invalid_api_key" if status == 401 else None
    behave = sends(together, error_reply(status, "no", code=code))
    async with pool_of(tmp_path, behave) as (server, (upstream,), (controller,)):
        asking = [asyncio.ensure_future(chat(server, f"{n}")) for n in range(8)]
        await until(lambda: len(chats(upstream)) == 8)
        together.set()
        await asyncio.gather(*asking)
        left = controller.health.until - asyncio.get_running_loop().time()
        assert seconds - 4 < left <= seconds


@flow(limits=Limits(cool_first=0.3))
async def test_recovery_begins_with_one_trial(server, upstream, controller, log):
    go_on = asyncio.Event()
    upstream.behave = by_words(
        {"BAD": error_reply(500)}, usual=sends(go_on, GOOD_REPLY)
    )
    for number in range(3):
        assert (await chat(server, f"BAD {number}")).status == 500
    assert controller.closed_for(asyncio.get_running_loop().time())
    asking = [asyncio.ensure_future(chat(server)) for _ in range(5)]
    await until(lambda: server.pool.waiting == 4 and len(chats(upstream)) == 4)
    go_on.set()
    assert {r.status for r in await asyncio.gather(*asking)} == {200}
    assert log.text.count("is back") == 1
    assert (await controller_line(server, controller.name))["reason"] == ""


async def test_an_older_answer_does_not_end_a_cooldown(server, upstream, controller):
    go_on = asyncio.Event()
    busy = error_reply(429, headers=[("Retry-After", "20")])
    upstream.behave = by_words({"slow": sends(go_on, GOOD_REPLY)}, usual=busy)
    slow = asyncio.ensure_future(chat(server, "slow"))
    await until(lambda: controller.in_flight)
    assert (await chat(server)).status == 500
    go_on.set()
    assert chat_text(await slow) == "Hi there"
    assert await states(server) == {"up0": "cooling"}
    assert (await chat(server)).status == 503


@cases("first", True, False)
@flow(limits=Limits(queue_timeout=3, cool_rate_limited_max=1))
async def test_long_streams_keep_nothing_closed(server, upstream, controller, first):
    """Whether it began before the cooling, or tries the controller after it."""
    end = asyncio.Event()
    busy = error_reply(429, headers=[("Retry-After", "1")])
    long = streams(chunk("a"), end, chunk("b", "stop") + DONE)
    upstream.behave = by_words({"long": long, "BAD": busy})
    loop = asyncio.get_running_loop()

    async def cools():
        assert (await chat(server, "BAD")).status == 500
        controller.health.until = loop.time() + 0.1
        await until(lambda: controller.closed_for(loop.time()) == 0)

    if not first:
        await cools()
    stream = asyncio.ensure_future(chat(server, "long", stream=True))
    await until(lambda: len(chats(upstream)) == 2 - first)
    if first:
        await cools()
    assert chat_text(await chat(server)) == "Hi there"
    end.set()
    assert (await stream).events()[-1] == "[DONE]"


@flow(
    behave=[error_reply(429), None],
    controller=[{"account": "acme", "weight": 100}, {"account": "acme"}],
)
async def test_controllers_of_one_account_cool_together(server, upstreams):
    server.add(pool_function("third", models=["m"]))
    assert chat_text(await chat(server)) == "third"
    assert (await states(server))["up1"] == "cooling"
    assert chats(upstreams[1]) == []


def of_models(**behaves):
    """Behave by the request's model; models without a behaviour answer."""
    return by_words({f'"model": "{model}"': b for model, b in behaves.items()})


TWO_MODELS = {"options": [{"models": ["a", "b"]}]}
BUSY = error_reply(429, headers=[("Retry-After", "20")])


@cases("behave, asked", (BUSY, 1), (error_reply(503), 3))
async def test_one_of_several_models_cools_alone(tmp_path, behave, asked):
    """As with OpenRouter's free models, or one of the upstreams behind an agent."""
    log, behave = Log(), of_models(a=behave)
    async with pool_of(tmp_path, behave, **TWO_MODELS, log=log) as (server, [up], _):
        server.add(pool_function("other", models=["a"], tier=2))
        for number in range(5):
            assert chat_text(await chat(server, f"{number}", model="a")) == "other"
        assert len(chats(up)) == asked
        assert chat_text(await chat(server, model="b")) == "Hi there"
        assert (await states(server))["up0"] == "ready"
        reason = (await controller_line(server, "up0"))["reason"]
        assert re.fullmatch(r"a: status (429|503) t", reason)
        assert "up0 (only a) cooling down for" in log.text


@cases("first", {"model": "a2"}, None)
async def test_one_model_of_several_names_cools_alone(tmp_path, first):
    """An alias, or a question that names none, is no second model that fails."""
    options, log = [{"models": {"a": "real", "a2": "real", "b": "b"}}], Log()
    behave = of_models(real=BUSY)
    async with pool_of(tmp_path, behave, options=options, log=log) as (server, [up], _):
        if first:
            await chat(server, **first)
        else:
            await ask(server.port, "POST", "/api/ask", {"content": "Hi"})
        for content in "123":
            reply = await ask(server.port, "POST", "/api/ask", {"content": content})
            assert reply.status == 503
        assert (await chat(server, model="a")).status == 503 and len(chats(up)) == 1
        assert chat_text(await chat(server, model="b")) == "Hi there"
        assert (await states(server)) == {"up0": "ready"}
        assert "up0 (only real) cooling down for 20 s" in log.text


async def test_a_model_that_cools_alone_is_not_asked_before_its_time(tmp_path):
    behave = of_models(a=BUSY)
    async with pool_of(tmp_path, behave, **TWO_MODELS) as (server, [up], _):
        assert [(await chat(server, model="a")).status for _ in "12"] == [500, 503]
        reply = await chat(server, model="a")
        assert 18 <= int(reply.headers["retry-after"]) <= 20 and len(chats(up)) == 1
        assert "status 429" in chat_error(reply)["message"]
        body = {"name": "up0"}
        await ask(server.port, "POST", "/admin/controllers/enable", body)
        assert (await chat(server, model="a")).status == 500 and len(chats(up)) == 2


async def test_two_models_that_fail_in_a_row_close_all(tmp_path):
    """Then it is the controller's failure, whatever the model."""
    behave = of_models(a=BUSY, b=BUSY)
    options = [{"models": ["a", "b", "c"]}]
    async with pool_of(tmp_path, behave, options=options) as (server, [up], _):
        for model in "acb":
            await chat(server, model=model)
        assert (await states(server)) == {"up0": "ready"}  # c has answered
        await ask(server.port, "POST", "/admin/controllers/enable", {"name": "up0"})
        for model in "ab":
            assert (await chat(server, model=model)).status == 500
        assert (await states(server)) == {"up0": "cooling"}
        assert (await chat(server, model="c")).status == 503 and len(chats(up)) == 5


@flow(limits=Limits(cool_first=0.3), controller=[{"models": ["a", "b"]}])
async def test_a_model_that_cooled_alone_is_tried_and_back(server, upstream, log):
    upstream.behave = of_models(a=by_words({"BAD": error_reply(500)}))
    for number in range(3):
        assert (await chat(server, f"BAD {number}", model="a")).status == 500
    health = server.pool.find("up0").health
    assert health.parts["a"].closed_by and not health.closed_by
    await until(lambda: health.of("a").until < asyncio.get_running_loop().time())
    assert (await chat(server, "BAD 3", model="a")).status == 500
    assert "(only a) cooling down for 0 s" in log.text and not health.closed_by
    assert chat_text(await chat(server, model="a")) == "Hi there"  # the last resort
    assert "up0 is back" in log.text and not health.parts


@cases(
    "headers, after",
    ([("Retry-After", "7")], "7"),
    ([], "10"),
    ([("Retry-After", "120")], None),
)
async def test_a_503_while_all_cool_names_the_soonest(tmp_path, headers, after):
    late = error_reply(429, headers=[("Retry-After", "200")])
    soon = error_reply(429, headers=headers)
    async with pool_of(tmp_path, soon, late) as (server, _, _):
        reply = await chat(server)
        assert reply.status == 500 and chat_error(reply)["upstream_status"] == 429
        reply = await chat(server)
        assert reply.status == 503
        assert chat_error(reply)["code"] == "no_controllers_available"
        assert reply.headers.get("retry-after") == after
        assert after or reply.headers["x-should-retry"] == "false"
    for errors, statuses in [("pass", [429, 429]), ("map", [500, 503])]:
        async with pool_of(tmp_path, late, upstream_errors=errors) as (server, _, _):
            assert [(await chat(server)).status for _ in range(2)] == statuses


@cases("status", 400, 402, 429)
@cases(
    "error",
    {"error": {"code": "insufficient_quota"}},
    {"error": {"type": "billing_hard_limit_reached"}},
    {"error": {"code": "invalid_api_key"}},
    {"detail": {"code": "account_deactivated"}},
    {"object": "error", "code": "billing_not_active"},
    [{"error": {"code": 400, "details": [{"reason": "API_KEY_INVALID"}]}}],
)
async def test_a_dead_keys_code_disables_at_once(server, upstream, log, status, error):
    """Whatever the status; the upstream's message about it is kept nowhere."""
    answer = http_reply(error, status)
    quota = "insufficient_quota"
    reason = quota if quota in str(error) else "its key was refused"
    upstream.behave = answer
    reply = await chat(server)
    assert reply.status == 500 and reason in chat_error(reply)["message"]
    line = await controller_line(server, "up0")
    assert line["state"] == "disabled" and reason in line["reason"]
    reply = await chat(server)
    assert reply.status == 503 and len(chats(upstream)) == 1
    assert reply.headers["x-should-retry"] == "false"
    assert "disabled for 600 s" in log.text


# --- Whose fault it is


QUOTE = "ALICE-SECRET"  # from one user's prompt
QUOTED = {"message": f"near: {QUOTE}", "type": QUOTE, "code": QUOTE}
QUOTING_EVENT = b'data: {"error": %b}\n\n' % json.dumps(QUOTED).encode()
QUOTING_STATUSES = "400 401 402 403 404 409 413 422 429 500 501 503 529"
QUOTING_ANSWERS = {
    **{s: http_reply({"error": QUOTED}, s) for s in QUOTING_STATUSES.split()},
    "text": http_reply({"error": QUOTE}, 500),
    "detail": http_reply({"detail": [{"msg": QUOTE, "type": QUOTE}]}, 500),
    "list": http_reply([{"error": {**QUOTED, "status": QUOTE}}], 429),
    "html": http_reply(b"<html>%b" % QUOTE.encode(), 500, "text/html"),
    "redirect": http_reply(b"", 302, headers=[("Location", f"/{QUOTE}")]),
    "phrase": b"HTTP/1.1 500 %b\r\nContent-Length: 0\r\n\r\n" % QUOTE.encode(),
    "label": http_reply(b"x", content_type=QUOTE),
    "coding": http_reply(b"x", headers=[("Content-Encoding", QUOTE)]),
    "retry": http_reply({}, 429, headers=[("Retry-After", QUOTE)]),
    "200": http_reply({"error": QUOTED}),
    "neither": http_reply(QUOTE.encode()),
    "framing": b"HTTP/1.1 200 OK\r\nContent-Length: %b\r\n\r\n" % QUOTE.encode(),
    "event": http_reply(QUOTING_EVENT, content_type="text/event-stream"),
    "late": http_reply(chunk("Hi") + QUOTING_EVENT, content_type="text/event-stream"),
}


@cases("stream", False, True)
@cases("shape", *QUOTING_ANSWERS)
async def test_no_user_reads_what_another_one_sent(tmp_path, shape, stream):
    """Not in a 503, not in what the administrator sees, not in the log."""
    log = Log()
    behave = by_words({QUOTE: QUOTING_ANSWERS[shape]})
    async with pool_of(tmp_path, behave, log=log) as (server, _, _):
        alice, bob = await add_user(server), await add_user(server)
        for number in range(4):
            own = await chat(server, f"{QUOTE} {number}", alice, stream=stream)
            assert own.status != 503 or number
        if shape in ("400", "403", "409", "500", "429", "text", "list", "event"):
            first = (await chat(server, QUOTE, alice)).content.decode()
            assert QUOTE in first or "cooling" in first
        seen = [(await chat(server, key=bob)).content]
        for path in ("/admin/controllers", "/admin/status", "/metrics"):
            seen.append((await ask(server.port, "GET", path)).content)
        assert QUOTE not in b"".join(seen).decode()
    assert QUOTE not in log.text


@cases(
    "model, says, unknown",
    ("m", "The model `m` does not exist", True),
    ("m", 'model "m" not found, try pulling it first', True),
    ("m", "'max_tokens' is not supported with the model m.", True),
    ("llama3", "model 'llama3:latest' not found", True),
    ("gemini-x", "models/gemini-x is not found for API version v1", True),
    ("m", "The model does not exist in my memory", False),
    ("gpt-4", "The model gpt-4.1 does not exist", False),
    ("gpt-4", "The model gpt-4-turbo does not exist", False),
)
def test_an_unknown_model_is_named_as_a_word_of_its_own(model, says, unknown):
    error = apiserver.ErrorObject(says)
    assert apiserver.says_unknown_model(error, model) == unknown
    other_field = error._replace(param="max_tokens")
    assert not apiserver.says_unknown_model(other_field, model)


LARGE = "Request too large for gpt-4o on tokens per min (TPM): Limit 9, Requested 99"
TOO_LARGE = {"message": LARGE, "code": "rate_limit_exceeded", "type": "tokens"}
STATUSES_OF_ONE = """302 308 400 401 402 403 404 408 409 413 422 425 499 500 501 503
    504 529"""
ANSWERS_TO_ONE = {
    **{status: error_reply(status) for status in STATUSES_OF_ONE.split()},
    "code in words": error_reply(400, "insufficient_quota invalid_api_key", code="b"),
    "garbage": http_reply(b"garbage"),
    "empty": http_reply(b""),
    "half": http_reply(b'{"choices": ['),
    "no http": b"garbage\r\n\r\n",
    "error in 200": http_reply({"error": {"message": "roles must alternate"}}),
    "error event": http_reply(b'data: {"error": {"message": "no"}}\n\n'),
    "gone": upstream_drops,
    "too large 413": error_reply(413, **TOO_LARGE),
    "too large 429": error_reply(429, **TOO_LARGE),
}


@cases("count", 1, 3)
@cases("answer", *ANSWERS_TO_ONE)
async def test_one_request_closes_nothing(tmp_path, answer, count):
    """However often, to however many controllers it is sent, streamed or not."""
    behave = by_words({"BAD": ANSWERS_TO_ONE[answer]})
    async with pool_of(tmp_path, *[behave] * count) as (server, _, controllers):
        alice, bob = await add_user(server), await add_user(server)
        for stream in (False, False, True, True):
            assert (await chat(server, "BAD", alice, stream=stream)).status >= 400
        assert (await chat(server, key=bob)).status == 200
        assert set((await states(server)).values()) == {"ready"}
        assert not any(c.health.closed_by for c in controllers)


@cases("stream", False, True)
@flow(behave=[None] * 2, limits=Limits(response_size=10_000))
async def test_answers_that_are_too_large_close_nothing(
    server, upstreams, controllers, stream
):
    """A client asks for as many embeddings, or such long ones, as it likes."""
    for upstream in upstreams:
        events = streams(*[chunk("x" * 9000)] * 2, chunk("", "stop") + DONE)
        upstream.behave = events if stream else http_reply(completion("x" * 10**6))
    for number in range(4):
        assert (await chat(server, f"{number}")).status == 500
    assert not any(controller.health.closed_by for controller in controllers)


@cases("stream", False, True)
@cases("status", 400, 402, 403, 404, 409, 413, 415, 422, 451)
async def test_a_refusal_is_the_clients_when_all_refuse(tmp_path, status, stream):
    """Byte for byte, to any route; no fail-over and no cooling."""
    content = b'{ "error": {"message": "the prompt", "param": "messages", "x": 1.0} }'
    behave = by_words({"BAD": http_reply(content, status)})
    async with pool_of(tmp_path, *[behave] * 3) as (server, ups, cs):
        for count in range(1, 5):
            reply = await chat(server, "BAD", stream=stream)
            assert (reply.status, reply.content) == (status, content)
            asked = sum(len(chats(upstream)) for upstream in ups)
            assert asked == (3 if status in (402, 403) else 1) * count
        reply = await handler_ask(server.port, "BAD", model="m")
        assert (reply.status, reply.json()) == (status, {"error": "the prompt"})
        assert {*(await states(server)).values()} == {"ready"}
        assert status in (402, 403) or not any(c.failures for c in cs)


@cases("shape", "json", "event", "late")
@cases(
    "code, status, asked, state",
    (400, 400, 1, "ready"),
    ("400", 400, 1, "ready"),
    (429, 500, 2, "cooling"),
    (502, 500, 2, "ready"),
    (1001, 500, 2, "ready"),
)
async def test_an_error_within_a_200_is_judged_by_its_code(
    tmp_path, shape, code, status, asked, state
):
    """As OpenRouter reports its providers' errors."""
    error = {"error": {"message": "UPSTREAMSECRET is wrong", "code": code}}
    event = apiserver.sse_event(json.dumps(error).encode())
    before = chunk("Hi") if shape == "late" else b": PROCESSING\n\n"
    behave = http_reply(error) if shape == "json" else streams(before, event)
    async with pool_of(tmp_path, behave, behave) as (server, ups, _):
        reply = await chat(server, stream=True)
        if shape == "late":
            assert reply.status == 200 and "*** is wrong" in reply.events()[-1]
            asked = 1
        else:
            found = chat_error(reply)
            upstream_status = code if code in (429, 502) else 500
            assert reply.status == status and "*** is wrong" in found["message"]
            assert found.get("upstream_status", 500) == upstream_status
        assert sum(len(chats(upstream)) for upstream in ups) == asked
        found = [*(await states(server)).values()]
        assert found.count(state) == (2 if state == "ready" else asked)


RESPONSE = {"id": "r", "object": "response", "output": []}


@cases("code, state", ("rate_limit_exceeded", "cooling"), (None, "ready"))
@cases("stream, sent", (True, True), (True, False), (False, False), (False, True))
async def test_a_failed_response_is_its_controllers_failure(
    tmp_path, code, state, stream, sent
):
    """Relayed as it came if the response had begun, else asked for elsewhere."""
    response = {**RESPONSE, "error": {"code": code, "message": "no"}}
    failed = typed("response.failed", response=response)
    late, good = RESPONSE_CREATED + failed, RESPONSE_CREATED + response_end("completed")
    behave = streams(RESPONSE_CREATED, 0.1, failed) if sent else streams(late)
    more = {"options": [{"weight": 100}]}
    async with pool_of(tmp_path, behave, streams(good), **more) as (server, ups, cs):
        body = {"model": "m", "input": "Hello", "stream": stream}
        reply = await ask(server.port, "POST", "/v1/responses", body)
        begun = stream and sent
        assert reply.status == 200 and reply.whole
        assert not stream or reply.content == (late if begun else good)
        assert [len(chats(upstream)) for upstream in ups] == [1, not begun]
        assert [controller.failures for controller in cs] == [1, 0]
        assert [*(await states(server)).values()] == [state, "ready"]


@flow(behave=http_reply({"request_id": "f15c114e"}))
async def test_a_deferred_chat_is_answered_with_its_id(server, upstream, controller):
    """As xAI does: GET /v1/chat/deferred-completion/{request_id} has the answer."""
    for number in range(3):
        reply = await chat(server, f"{number}", deferred=True)
        assert (reply.status, reply.json()) == (200, {"request_id": "f15c114e"})
    assert not controller.failures and not controller.health.closed_by


@cases("code", "server_is_overloaded", "slow_down", "internal_server_error")
@cases("stream", True, False)
async def test_a_response_that_failed_by_overload_is_asked_for_elsewhere(
    tmp_path, code, stream
):
    error = {"code": code, "message": "at capacity"}
    response = {**RESPONSE, "status": "failed", "error": error}
    failed = RESPONSE_CREATED + typed("response.failed", response=response)
    behave = streams(failed) if stream else http_reply(response)
    good = streams(RESPONSE_CREATED + response_end("completed"))
    more = {"options": [{"weight": 100}]}
    async with pool_of(tmp_path, behave, good, **more) as (server, ups, cs):
        body = {"model": "m", "input": "Hello", "stream": stream}
        reply = await ask(server.port, "POST", "/v1/responses", body)
        assert reply.status == 200 and b"at capacity" not in reply.content
        assert [len(chats(upstream)) for upstream in ups] == [1, 1]
        assert [controller.failures for controller in cs] == [1, 0]


@cases("stream", True, False)
async def test_a_failed_response_may_be_its_requests_fault(tmp_path, stream):
    """Three images that cannot be read must not cool a key for everybody."""
    error = {"code": "invalid_image_format", "message": "a WEBP, please"}
    response = {**RESPONSE, "status": "failed", "error": error}
    failed = RESPONSE_CREATED + typed("response.failed", response=response)
    behave = streams(failed) if stream else http_reply(response)
    async with pool_of(tmp_path, behave, behave) as (server, ups, cs):
        for number in range(6):
            body = {"model": "m", "input": f"{number}", "stream": stream}
            reply = await ask(server.port, "POST", "/v1/responses", body)
            assert reply.status == (200 if stream else 400)
            assert b"a WEBP, please" in reply.content
        assert sum(len(chats(upstream)) for upstream in ups) == 6
        assert not any(c.failures or c.health.closed_by for c in cs)


@cases("end", connection_close, connection_cut)
async def test_the_head_of_half_a_refusal_counts(tmp_path, end):
    half = error_reply(429, headers=[("Retry-After", "20")])[:-9]
    behave = sends(half, 0.05, end)
    async with pool_of(tmp_path, behave) as (server, _, [controller]):
        reply = await chat(server)
        assert chat_error(reply)["upstream_status"] == 429
        assert reply.headers["retry-after"] == "20"
        assert controller.health.closed_by is apiserver.Failure.RATE_LIMITED


def test_a_failure_is_evidence_once_a_minute_for_each_user_and_content():
    health = apiserver.Health(Limits(cool_failures=3))
    broken = apiserver.ControllerError("broken")

    def fail(user, number, now):
        request = plain_request(number)
        request.user = user
        return health.fail(broken, request, now)

    assert not any(fail("alice", 0, now) for now in range(50))
    assert not fail("bob", 0, 50)
    assert not fail("bob", 0, 59)
    assert fail("alice", 0, 61)  # of a monitor, say, that sends the same each minute
    health = apiserver.Health(Limits(cool_failures=2))
    assert not fail("alice", 0, 0)
    health.succeed()
    assert not fail("alice", 1, 1)
    assert fail("alice", 0, 1)  # counted anew


def test_many_failing_requests_cost_little_time_and_memory():
    health = apiserver.Health()
    broken = apiserver.ControllerError("broken")
    with takes(0, 0.5, time.process_time):
        for number in range(10_000):
            health.fail(broken, plain_request(number), 1.0)
    assert len(health._seen) <= 1000


def test_an_upload_that_is_sent_again_has_a_new_boundary_and_the_same_digest():
    """SDKs draw a boundary for each try: three tries of one file are one request."""
    digests = {
        APIRequest("/v1/x", form(FORM_FILE, boundary=b), form="").digest
        for b in ("B", "a-b'c", "----WebKit1")
    }
    assert len(digests) == 1
    other = form((FORM_FILE[0], "ID4"))
    assert APIRequest("/v1/x", other, form="").digest not in digests
    assert plain_request(1).digest != plain_request(2).digest


# --- Doubtful keys


def pool_probes(upstream):
    return [r for r in upstream.requests if r.line.startswith("GET /v1/models ")]


@cases("status", 401, 402, 403)
async def test_a_key_is_disabled_only_when_a_probe_is_refused_too(tmp_path, status):
    refused = [False]

    async def behave(request, writer):
        plain = request.line.startswith("GET")
        bad = refused[0] if plain else b"BAD" in request.content
        writer.write(error_reply(status) if bad else GOOD_REPLY)

    async with pool_of(tmp_path, behave, None) as (server, (first, _), (up0, _)):
        for number in range(6):
            assert (await chat(server, f"BAD {number}")).status == 200
        await until(lambda: pool_probes(first))
        assert (await states(server))["up0"] == "ready"
        assert len(pool_probes(first)) == 1  # a minute
        server.pool._probes.popitem()[1].cancel()  # the minute is over
        refused[0] = True
        while up0.health.closed_by is None:
            assert (await chat(server, "BAD again")).status == 200
        assert (await states(server))["up0"] == "disabled"
        assert len(pool_probes(first)) == 2
        assert pool_probes(first)[1].headers["authorization"] == "Bearer UPSTREAMSECRET"
        server.pool.remove(up0)  # agents come and go, and their probes with them
        assert not server.pool._probes


async def test_a_restricted_key_that_may_not_list_models_stays_in_use(tmp_path):
    async def behave(request, writer):
        bad = request.line.startswith("GET") or b"BAD" in request.content
        writer.write(error_reply(403) if bad else GOOD_REPLY)

    async with pool_of(tmp_path, behave) as (server, (upstream,), _):
        for text, status in ("good", 200), ("BAD", 403):
            assert (await chat(server, text)).status == status
        await until(lambda: chats(upstream)[2:])  # the key is tested
        assert chats(upstream)[2].headers["content-type"] == "application/json"
        for text, status in ("BAD", 403), ("good", 200):
            assert (await chat(server, text)).status == status


@cases("status", 401, 403)
async def test_a_key_for_chats_alone_stays_in_use(server, upstream, status):
    """A user may try what the key may not do; it is tested where it worked."""

    async def behave(request, writer):
        chats_only = request.line.startswith(f"POST {CHAT_URL} ")
        writer.write(GOOD_REPLY if chats_only else error_reply(status))

    upstream.behave = behave
    assert (await chat(server)).status == 200
    reply = await ask(server.port, "POST", "/v1/embeddings", {**CHAT, "input": "x"})
    assert reply.status == {401: 500, 403: 403}[status]
    await until(lambda: chats(upstream)[2:])
    assert (await chat(server)).status == 200


# --- The last one standing


@flow(behave=by_words({"BAD": error_reply(500)}))
async def test_the_last_one_is_tried_although_it_is_broken_for_all(server, upstream):
    for number in range(4):
        assert (await chat(server, f"BAD {number}")).status == 500
    assert await states(server) == {"up0": "cooling"}
    assert len(chats(upstream)) == 4
    assert (await chat(server, "new")).status == 200
    assert await states(server) == {"up0": "ready"}


@cases("cool_first", 0.01, 60)
async def test_a_long_trial_keeps_no_other_request_out(tmp_path, constant, cool_first):
    """An answer that is not streamed shows nothing for minutes."""
    constant(TRIAL_TIME=0.1)
    behave = by_words({"long": sends(60), "BAD": error_reply(500)})
    limits = Limits(cool_first=cool_first)
    async with pool_of(tmp_path, behave, limits=limits) as (server, (upstream,), _):
        alice, bob = await add_user(server), await add_user(server)
        for number in range(3):
            await chat(server, f"BAD {number}", alice)
        async with beside(chat(server, "long", alice)):
            await until(lambda: len(chats(upstream)) == 4)
            assert (await asyncio.wait_for(chat(server, key=bob), 2)).status == 200
            assert (await chat(server, "x", bob)).status == 200


@cases(
    "answer, left",
    (error_reply(429, headers=[("Retry-After", "20")]), 20),
    (error_reply(400, code="invalid_api_key"), None),
    (error_reply(429, code="insufficient_quota"), None),
)
async def test_the_last_one_is_not_tried_while_closed(server, upstream, answer, left):
    upstream.behave = answer
    await chat(server)
    reply = await chat(server, "another")
    assert reply.status == 503 and len(chats(upstream)) == 1
    if left is None:
        assert "retry-after" not in reply.headers
    else:
        assert left - 3 <= int(reply.headers["retry-after"]) <= left


async def test_a_refused_connection_is_tried_again_where_it_is_the_only_one(tmp_path):
    async with Upstream() as upstream:
        upstream.server.close()
        await upstream.server.wait_closed()
        async with serving(tmp_path, upstream.controller(name="up")) as server:
            assert (await chat(server)).status == 500
            assert await states(server) == {"up": "cooling"}
            again = await asyncio.start_server(
                upstream._serve, "127.0.0.1", upstream.port
            )
            assert (await chat(server, "b")).status == 200
            again.close()


# --- Which controller has a model


def with_models(*names, code="model_not_found", status=404, says="does not exist"):
    """An upstream that lists these models and has no others."""

    async def behave(request, writer):
        if request.line.startswith("GET"):
            writer.write(http_reply({"data": [{"id": name} for name in names]}))
            return
        model = request.json()["model"]
        message = f"The model '{model}' {says}."
        error = http_reply({"error": {"message": message, "code": code}}, status)
        writer.write(GOOD_REPLY if model in names else error)

    return behave


ANY = {"models": None}


@cases(
    "status, code, says",
    (404, "model_not_found", "x"),
    (503, "model_not_found", "x"),
    (400, "unknown_model", ""),
    (404, None, "does not exist"),
    (403, None, "not found, try pulling it first"),
    (400, 400, "is not supported"),
)
async def test_an_unknown_model_is_tried_at_the_next_one(tmp_path, code, says, status):
    lacks = with_models(code=code, says=says, status=status)
    options = [{"models": {"m": "real"}, "weight": 9}]
    async with pool_of(tmp_path, lacks, None, options=options) as (server, ups, _):
        alice, bob = await add_user(server), await add_user(server)
        for number in range(3):
            assert (await chat(server, f"{number}", alice)).status == 200
        assert len(chats(ups[0])) == 1
        await chat(server, "x", bob)  # a message may quote, and counts for one user
        by_code = isinstance(code, str)
        assert len(chats(ups[0])) == (1 if by_code else 2)
        assert set((await states(server)).values()) == {"ready"}


async def test_an_unknown_model_concerns_one_controller_model_and_path(tmp_path):
    async def behave(request, writer):
        lacks = b"embeddings" in request.line.encode() or b'"x"' in request.content
        error = error_reply(404, "no model m or x", code="model_not_found")
        writer.write(error if lacks else GOOD_REPLY)

    embeddings = "/v1/embeddings"
    options = [{"models": None, "weight": 9}, ANY]
    async with pool_of(tmp_path, behave, None, options=options) as (server, ups, _):
        for path, model, asked in (
            (embeddings, "m", 1),
            (embeddings, "m", 1),
            (CHAT_URL, "x", 2),
            (CHAT_URL, "x", 2),
            (CHAT_URL, "m", 3),
            (embeddings, "m", 4),
        ):
            if asked == 4:
                server.pool._unknown.clear()  # the minute is over
            reply = await ask(server.port, "POST", path, chat_body(model=model))
            assert len(chats(ups[0])) == asked, (path, model, reply.content)


async def test_a_named_model_that_its_upstream_lacks_is_logged_once(tmp_path):
    log = Log()
    async with pool_of(tmp_path, with_models("x"), log=log) as (server, _, _):
        for model in "mnm":
            await chat(server, model=model)
    assert log.text.count("up0: it does not know 'm', one of its models") == 1
    assert log.text.count("does not know") == 1  # nobody claims that it has n


@cases("count", 1, 2)
async def test_the_last_ones_are_tried_although_they_lack_the_model(tmp_path, count):
    behaves, options = [with_models("x")] * count, [ANY] * count
    async with pool_of(tmp_path, *behaves, options=options) as (server, ups, _):
        for times in (1, 2):
            reply = await chat(server)
            assert reply.status == 404 and "'m'" in reply.content.decode()
            assert [len(chats(upstream)) for upstream in ups] == [times] * count


async def test_unknown_models_fill_no_memory():
    pool = pool_with(pool_function("a"))
    error = apiserver.ControllerError("no", apiserver.Failure.UNKNOWN_MODEL)
    for number in range(1500):
        pool.failed(pool.find("a"), error, pool_request(model=f"m{number}"))
    assert len(pool._unknown) == 1000


@cases("how", "names", "lists", "latest")
async def test_controllers_that_name_the_model_go_first(tmp_path, how):
    """Also when it fails: what is meant for the next room goes to no cloud."""
    local = with_models("m:latest" if how == "latest" else "m")
    answer = by_words({"BAD": error_reply(500)})

    async def behave(request, writer):
        await (local if request.line.startswith("GET") else answer)(request, writer)

    options = [{"models": None, "weight": 9}, {} if how == "names" else ANY]
    async with pool_of(tmp_path, None, behave, options=options) as (server, ups, cs):
        await until(lambda: how == "names" or cs[1].listed)
        for number in range(4):
            assert (await chat(server, f"{number}")).status == 200
            assert (await chat(server, f"BAD {number}")).status == 500
        assert (len(chats(ups[0])), len(chats(ups[1]))) == (0, 8)
        assert (await chat(server, model="another")).status == 200
        assert len(chats(ups[0])) == 1


async def test_a_request_waits_for_the_first_lists_that_may_name_its_model(tmp_path):
    listed, limits = asyncio.Event(), Limits(connect_timeout=0.5)

    def lists_after(event, model):
        async def behave(request, writer):
            if request.line.startswith("GET"):
                await event.wait()
            await with_models(model)(request, writer)

        return behave

    behaves = with_models("n"), lists_after(listed, "m")
    async with pool_of(tmp_path, *behaves, options=[ANY] * 2) as (server, ups, cs):
        await until(lambda: cs[0].listed)
        async with beside(chat(server)) as waiting:
            assert (await chat(server, model="n")).status == 200  # without waiting
            listed.set()
            assert (await waiting).status == 200
        assert [len(chats(upstream)) for upstream in ups] == [1, 1]
        async with Upstream(lists_after(asyncio.Event(), "z")) as late:
            server.add(late.controller(name="late", models=None, limits=limits))
            with takes(0.4, 5):
                assert (await chat(server, model="n")).status == 200
                assert (await chat(server, model="z")).status == 200


@flow(behave=None, controller={"models": {"m:latest": "real"}})
async def test_an_alias_with_latest_serves_the_plain_name(server, upstream):
    assert (await chat(server, model="m")).status == 200
    assert chats(upstream)[0].json()["model"] == "real"


@cases("listed", "local", "local:latest")
async def test_an_agents_model_waits_for_it_to_come_back(tmp_path, constant, listed):
    async with pool_of(tmp_path, None, options=[ANY]) as (server, (cloud,), _):
        async with Agent(server, hello=agent_hello(models=[listed])):
            (agent,) = await until(lambda: list(server.agents.values()))
            assert agent.serves("local") == apiserver.NAMED
            assert agent.serves("latest") == apiserver.NOT
        await until(lambda: not server.agents)
        async with beside(chat(server, model="local")):
            await until(lambda: server.pool.waiting)
            assert (await chat(server, model="other")).status == 200
            assert len(chats(cloud)) == 1
            constant(AGENT_RETURN_WINDOW=0.0)  # it does not come back
            assert (await chat(server, model="local")).status == 200


async def test_agents_that_come_and_go_with_names_fill_no_memory(server, constant):
    constant(LEFT_MODELS=6)
    for number in range(3):
        names = [*(f"{number}-{n}" for n in range(4)), "x" * 2049, 5, "\ud800"]
        async with Agent(server, hello=agent_hello(models=names)):
            (agent,) = await until(lambda: list(server.agents.values()))
            assert list(agent.models) == names[:4]
        await until(lambda: not server.agents)
    assert [*server.pool._left] == ["1-3", *names[:4], None]


async def test_a_large_first_message_of_an_agent_is_not_kept(server):
    hello = agent_hello(models=["x" * 3_000_000])
    with traced() as memory:
        async with Agent(server, hello=hello):
            await until(lambda: memory()[0] < 500_000, 2)


async def test_an_unreadable_list_of_models_is_logged_once(tmp_path):
    log = Log()

    async def behave(request, writer):
        at_v1 = request.line.startswith("GET /v1/models ")
        writer.write(http_reply(b"a key?", 401) if at_v1 else http_reply(b"no", 404))

    async with Upstream(behave) as upstream, Upstream(http_reply(b"<html>")) as odd:
        url = upstream.url.removesuffix("/v1")
        made = OpenAIController("", name="a", base_url=url), odd.controller(name="b")
        async with serving(tmp_path, *made, log=log) as server:
            for _ in range(2):
                await server.pool.refresh_models()
    cure = f"a: its base_url lacks /v1; it should be {upstream.url}"
    assert log.text.count(cure) == 1
    assert log.text.count("b: its list of models cannot be read (status 200)") == 1


# --- What we add, and what upstreams encode


@cases("status", 400, 422)
@cases(
    "said, again",
    ({"error": {"message": "unknown field"}}, True),
    ({"detail": [{"loc": ["body", "stream_options"], "msg": "extra"}]}, True),
    ({"error": {"param": "include_usage", "message": "no"}}, True),
    (b"<html>bad request</html>", True),
    ({"error": {"message": "must alternate", "param": "messages"}}, False),
    ({"error": {"message": "too long", "code": "context_length_exceeded"}}, False),
    ({"detail": [{"loc": ["body", "messages"], "msg": "empty"}]}, False),
)
async def test_stream_options_are_left_out_if_refused(tmp_path, said, again, status):
    """And from then on only if that has helped: no user can switch the counting off
    for others with a bad request."""
    stream = http_reply(chunk("Hi", "stop") + DONE, content_type="text/event-stream")
    refusal = http_reply(said, status)
    behave = by_words({"BAD": refusal, "stream_options": refusal}, usual=stream)
    async with pool_of(tmp_path, behave) as (server, (upstream,), _):
        assert (await chat(server, "BAD", stream=True)).status == status
        for count in (2, 3) if again else (1, 2):
            reply = await chat(server, stream=True)
            assert reply.status == (200 if again else status)
            assert len(chats(upstream)) == count + 1 + again
        assert "stream_options" in chats(upstream)[1 + again].json()


@cases("mistakes, size", (1, 2_000_000), (400_000, 1))
async def test_a_refusal_may_repeat_a_large_request(
    server, upstream, controller, mistakes, size
):
    """As FastAPI's, which has all of the input in it; that must not stop the loop."""
    mistake = json.dumps({"loc": ["body", "x"], "msg": "no", "input": "i" * size})
    said = f'{{"detail": [{", ".join([mistake] * mistakes)}]}}'.encode()
    upstream.behave = http_reply(said, 422)
    with takes(0, 1, time.process_time):
        reply = await chat(server, stream=True)
    assert (reply.status, reply.content) == (422, said)
    assert len(chats(upstream)) == 1 and not controller.failures


async def test_events_in_gzip_are_relayed_as_they_come(server, upstream):
    go_on, deflate = asyncio.Event(), zlib.compressobj(wbits=31)
    first, last = chunk("first"), chunk("b", "stop") + DONE
    one = deflate.compress(first) + deflate.flush(zlib.Z_SYNC_FLUSH)
    two = deflate.compress(last) + deflate.flush()
    head = STREAM_HEAD[:-2] + b"Content-Encoding: gzip\r\n\r\n"
    upstream.behave = sends(head, chunked(one), go_on, chunked(two) + b"0\r\n\r\n")
    async with posting(server) as client:
        _, headers = await client.read_head()
        assert "content-encoding" not in headers
        assert await client.read_chunk() == first
        go_on.set()
        assert await client.read_chunk() == last


# --- What an answer is, and whether it is complete

ODD_BEGINNINGS = [b"", b"\n\r\n", b"\xef\xbb\xbf", b": hi\n\n" * 9, b"retry: 10\n"]
ODD_LABELS = ["text/plain", "application/json", "TEXT/EVENT-STREAM", "x"]


@cases("label", *ODD_LABELS)
@cases("before", *ODD_BEGINNINGS)
async def test_events_are_events_whatever_the_label(server, upstream, before, label):
    events = chunk("Hi ") + chunk("there", "stop") + DONE
    upstream.behave = http_reply(before + events, content_type=label)
    reply = await chat(server, stream=True)
    assert reply.status == 200
    assert reply.content.endswith(events)
    assert reply.headers["content-type"].startswith("text/event-stream")
    reply = await chat(server)
    assert reply.headers["content-type"] == "application/json"
    assert chat_text(reply) == "Hi there"
    assert reply.json()["choices"][0]["finish_reason"] == "stop"
    assert (await handler_ask(server.port)).json()["content"] == "Hi there"


@cases("label", "text/event-stream", "text/html", "x")
async def test_json_is_json_whatever_it_is_called(server, upstream, label):
    content = b"\xef\xbb\xbf" + b"\n" * 5000 + json.dumps(completion()).encode()
    upstream.behave = http_reply(content, 200, label)
    reply = await chat(server)
    assert chat_text(reply) == "Hi there"
    assert reply.headers["content-type"] == "application/json"
    reply = await chat(server, stream=True)
    assert "text/event-stream" in reply.headers["content-type"]
    assert stream_text(reply) == "Hi there"
    *_, last, done = reply.events()
    assert json.loads(last)["choices"][0]["finish_reason"] == "stop"
    assert done == "[DONE]"


async def test_json_that_is_no_generated_text_never_becomes_a_stream(server, upstream):
    content = b'[{"index": 0, "score": NaN}]'
    upstream.behave = http_reply(content, 200, "application/json")
    reply = await ask(server.port, "POST", "/v1/rerank", STREAM)
    assert reply.status == 200 and reply.content == content


def test_an_answer_with_an_unknown_status_is_no_stream_and_leaves_nothing_behind():
    dialect = apiserver.dialect_of("/v1/responses")
    before = len(dialect.writer.TEMPLATES)
    with pytest.raises(LookupError):
        dialect.writer.relay({**ANSWERS["/v1/responses"], "status": "queued"})
    assert len(dialect.writer.TEMPLATES) == before


TEXT_CHOICE = {"index": 0, "text": "Hi", "logprobs": None, "finish_reason": "length"}
TOKENS = {"input_tokens": 3, "output_tokens": 4}
ANSWERS = {
    "/v1/completions": {
        **{"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m"},
        **{"choices": [TEXT_CHOICE], "usage": {"prompt_tokens": 3}},
    },
    "/v1/messages": {
        **{"id": "msg_1", "type": "message", "role": "assistant", "model": "m"},
        "content": [
            {"type": "thinking", "thinking": "Hm", "signature": "s"},
            {"type": "text", "text": "Hi"},
            {"type": "tool_use", "id": "t", "name": "f", "input": {"a": [1]}},
            {"type": "web_search_tool_result", "tool_use_id": "t", "content": []},
        ],
        **{"stop_reason": "stop_sequence", "stop_sequence": "#", "usage": TOKENS},
    },
    "/v1/responses": {
        **{"id": "resp_1", "object": "response", "model": "m", "status": "incomplete"},
        "output": [
            {"type": "reasoning", "id": "r", "summary": []},
            {"type": "message", "id": "o", "content": [{"text": "Hi", "x": 1}]},
            {"type": "function_call", "id": "i", "call_id": "c", "name": "f"},
        ],
        "usage": TOKENS,
    },
}


@cases("path", *ANSWERS)
async def test_an_answer_becomes_what_was_asked_for(server, upstream, path):
    """A stream of one that is whole, and one answer of a stream."""
    ask_for = functools.partial(ask, server.port, "POST", path)
    upstream.behave = http_reply(ANSWERS[path])
    events = (await ask_for(STREAM)).content
    assert b'"Hi"' in events and events.startswith((b"data: ", b"event: "))
    cut = events[: events.rindex(b'"finish_reason"' if b"DONE" in events else b"event")]
    for stream in (events, cut):
        upstream.behave = http_reply(stream, content_type="text/event-stream")
        reply = await ask_for(CHAT)
        assert reply.headers["content-type"] == "application/json"
        assert (reply.status == 200) == (stream is events)
        assert reply.status == 500 or reply.json() == ANSWERS[path]
    broken = b'{"choices": [5], "type": "content_block_delta"}'
    upstream.behave = http_reply(re.sub(rb"{.*}", broken, events))
    assert (await ask_for(CHAT)).status == 500


@cases(
    "path, content, more",
    (CHAT_URL, b'{"choices": [{"message": {"content": "half', {}),
    ("/v1/embeddings", b'{"data": [{"embedding": [1, 2', {"input": "x"}),
    ("/v1/messages", b'{"content": [{"text": "half"}]', {"max_tokens": 1}),
    ("/v1/responses", b'{"output": [{}]', {"input": "x"}),
)
async def test_half_an_answer_is_taken_over_by_another(tmp_path, path, content, more):
    """And a complete one without a length is accepted."""
    head = JSON_HEAD + b"Connection: close\r\n\r\n"
    good = {"choices": [], "data": [], "content": [], "output": []}
    whole = head + json.dumps(good).encode() + b"\n"
    behaves = (sends(data, connection_close) for data in (head + content, whole))
    async with pool_of(tmp_path, *behaves, options=[{"weight": 9}]) as (server, ups, _):
        reply = await ask(server.port, "POST", path, {**CHAT, **more})
        assert reply.status == 200 and reply.json()["data"] == []
        assert len(chats(ups[0])) == len(chats(ups[1])) == 1


ERROR_EVENT = b'data: {"error": {'
TYPED_ERROR = b'event: error\ndata: {"type": "error", "error": {'
BEGUN_STREAMS = {
    CHAT_URL: (chunk("Hi", ""), ERROR_EVENT),
    "/v1/completions": (b'data: {"choices": [{"text": "a"}]}\n\n', ERROR_EVENT),
    "/v1/messages": (MESSAGE_START, TYPED_ERROR),
    "/v1/responses": (RESPONSE_CREATED, b"event: response.failed\ndata: {"),
}


@cases("path", *BEGUN_STREAMS)
async def test_a_broken_stream_ends_in_an_error_of_its_dialect(server, upstream, path):
    begun, error = BEGUN_STREAMS[path]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    upstream.behave = sends(head + begun, connection_close)
    reply = await ask(server.port, "POST", path, {**STREAM, "input": "x"})
    assert reply.status == 200 and not reply.whole
    assert reply.content.startswith(begun + error)
    assert b"[DONE]" not in reply.content


@cases("cut", False, True)
async def test_speech_is_relayed_as_it_comes(server, upstream, cut):
    """One that breaks off does so for the client."""
    go_on = asyncio.Event()
    audio = b'data: {"not": an event\n\n\xff\xfb'  # nor judged by how it begins
    head = STREAM_HEAD.replace(b"text/event-stream", b"audio/mpeg")
    end = connection_close if cut else chunked(audio) + b"0\r\n\r\n"
    body = {"model": "m", "input": "Hello", "voice": "alloy"}
    upstream.behave = sends(head, chunked(audio), go_on, end)
    async with posting(server, body, "/v1/audio/speech") as client:
        status, headers = await client.read_head()
        assert status == 200 and headers["content-type"] == "audio/mpeg"
        assert await client.read_chunk() == audio
        go_on.set()
        assert await client.read_rest() == (b"" if cut else audio)
        assert client.whole is not cut
    old = request_bytes("POST", "/v1/audio/speech", body).replace(b"1.1", b"1.0", 1)
    with pytest.raises(ConnectionResetError) if cut else contextlib.nullcontext():
        assert (await raw(server.port, old)).endswith(2 * audio)


@cases("stream", False, True)
@cases("status, length", (200, b"Content-Length: 0\r\n"), (204, b""))
@flow(controller={"models": ["m"]})
async def test_an_empty_answer_is_an_answer(client, upstream, status, length, stream):
    upstream.behave = b"HTTP/1.1 %d X\r\n%b\r\n" % (status, length)
    for _ in range(2):  # or the second answer would be taken for the first
        reply = await client.request("POST", "/v1/x", {**CHAT, "stream": stream})
        assert (reply.status, reply.content) == (status, b"")


@cases(
    "path, kind, status, sandboxed",
    ("/v1/x", "text/html", 200, True),
    ("/v1/x", "application/json, text/html", 200, True),
    (CHAT_URL, "text/html", 400, True),
    (CHAT_URL, "text/html", 200, False),  # labelled as what it is
)
@flow(controller={"models": ["m"]})
async def test_an_answer_runs_in_no_browser(
    server, upstream, path, kind, status, sandboxed
):
    """A page's form can post to /k/<token>; on our origin, it could read the key."""
    csp = [("Content-Security-Policy", "default-src *")]
    upstream.behave = http_reply(completion(), status, kind, csp)
    reply = await ask(server.port, "POST", path, CHAT)
    assert reply.status == status
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert (reply.headers["content-security-policy"] == "sandbox") is sandboxed
    if not sandboxed:
        assert reply.headers["content-type"] == "application/json"


@flow(behave=b"", controller={"name": "one"})
async def test_a_reason_is_one_line_without_a_key_or_a_name(server, upstream, log):
    """In the log, in later answers, in the administrator's list."""
    text = "UPSTREAMSECRET\n2026-01-01 00:00:00 admin GET / \x1b[2J"
    upstream.behave = error_reply(429, text)
    said = [chat_error(await chat(server))["message"] for _ in range(2)]
    assert said[0].startswith("one: ***\n2026")
    assert said[1].endswith(" one: status 429 t") and "one: one:" not in said[1]
    assert (await controller_line(server, "one"))["reason"] == "status 429 t"
    assert re.search(r"one cooling down for 10 s: (?!one)", log.text)
    assert "UPSTREAMSECRET" not in log.text and "\x1b" not in log.text
    assert not any("\n" in line for line in log.lines)


@cases("scheme", "http", "https")
async def test_a_dead_proxy_is_named_as_the_cause(server, scheme):
    async with Upstream() as upstream:
        url = upstream.url.replace("http", scheme, 1)
        proxy = f"http://127.0.0.1:{refusing_port()}"
        server.add(OpenAIController("k", name="one", base_url=url, proxy=proxy))
        reply = await chat(server)
        message = reply.json()["error"]["message"]
        assert (reply.status, message) == (500, "one: nothing listens at its proxy")
        assert await states(server) == {"one": "cooling"}
        assert upstream.connections == 0


async def test_own_limits_hold_until_the_next_window(tmp_path, clock):
    clock[0] += 10  # ten seconds into its minute
    log = Log()
    requests = pool_function("requests", limit={"requests": 2, "per": "minute"})
    async with serving(tmp_path, requests, log=log) as server:
        assert [(await chat(server)).status for _ in range(3)] == [200, 200, 503]
        line = await controller_line(server, "requests")
        assert line["state"] == "disabled" and "2 requests/minute" in line["reason"]
        clock[0] += 25  # 25 s left
        reply = await chat(server)
        assert reply.status == 503 and reply.headers["retry-after"] == "25"
        text = "requests gets no requests for 50 s: its limit of 2 requests/minute"
        assert log.text.count(text) == log.text.count("gets no requests") == 1
        enable = "/admin/controllers/enable"
        await ask(server.port, "POST", enable, {"name": "requests"})
        assert (await controller_line(server, "requests"))["state"] == "ready"
        assert [(await chat(server)).status for _ in range(3)] == [200, 200, 503]
        clock[0] += 25
        assert [(await chat(server)).status for _ in range(3)] == [200, 200, 503]
    made = {"limit": {"tokens": 14, "per": "hour"}}  # an answer takes 7
    async with pool_of(tmp_path, None, options=[made], log=log) as (server, _, (one,)):
        assert [(await chat(server)).status for _ in range(3)] == [200, 200, 503]
        assert one.tokens == 14
        assert (
            log.text.count("up0 gets no requests for 3540 s: its limit of 14 tok") == 1
        )
        clock[0] += 3600
        assert (await chat(server)).status == 200


async def test_the_administrator_disables_and_enables(server, gate):
    async def post(what, name="gate", key=KEY):
        path = f"/admin/controllers/{what}"
        return (await ask(server.port, "POST", path, {"name": name}, key)).status

    running = asyncio.ensure_future(chat(server))
    await until(lambda: gate.asked)
    assert await post("disable") == 200
    gate.let()
    assert chat_text(await running) == "through"
    line = await controller_line(server, "gate")
    assert line["state"] == "disabled" and line["until"] is None
    reply = await chat(server)
    assert reply.status == 503 and "retry-after" not in reply.headers
    assert reply.headers["x-should-retry"] == "false"
    assert await post("enable") == 200
    assert chat_text(await chat(server)) == "through"
    assert await post("disable", "nobody") == 404
    assert await post("disable", key=await add_user(server)) == 403


@flow(gate={"max_concurrency": 1})
async def test_enabling_a_controller_wakes_what_waits(server, gate):
    server.add(spare := pool_function("spare"))
    spare.switched_off = True
    first = asyncio.ensure_future(chat(server))
    await until(lambda: gate.asked)
    second = asyncio.ensure_future(chat(server))
    await until(lambda: server.pool.waiting)
    body = {"admin_key": KEY, "name": "spare"}
    await ask(server.port, "POST", "/admin/controllers/enable", body, key=None)
    assert chat_text(await second) == "spare"
    gate.let()
    await first


async def test_an_agent_cannot_take_a_controllers_name_from_it(server):
    """/admin/controllers, limits and metrics mean the configured one by it."""
    hello = agent_hello(name="up", models=[])
    async with Agent(server, hello=hello):
        up = pool_function("up")
        server.add(up)
        assert server.pool.find("up") is up
        async with Agent(server, hello=hello):
            names = sorted(agent.name for agent in server.agents.values())
            assert names == ["up-2", "up-3"] and server.pool.find("up") is up
            text = (await ask(server.port, "GET", "/metrics")).content.decode()
            samples = [line.rsplit(" ", 1)[0] for line in text.splitlines()]
            assert len(samples) == len(set(samples))


# --- Functions and mocks


async def gives_pieces_in_the_loop(request):
    yield "Hi "
    await asyncio.sleep(0)
    yield {"content": request["messages"][-1]["content"]}


async def gives_a_completion(request):
    return completion("Hi " + request["messages"][-1]["content"])


def gives_text_in_a_thread(request):
    assert threading.current_thread() is not threading.main_thread()
    return "Hi Hello"


def gives_pieces(request):
    yield "Hi "
    yield None  # as chunk.choices[0].delta.content often is
    yield "Hello"


FUNCTIONS = [
    gives_pieces_in_the_loop,
    gives_a_completion,
    gives_text_in_a_thread,
    gives_pieces,
    lambda request: {"content": "Hi Hello"},
    lambda request: iter(["Hi ", "Hello"]),
]


@cases("function", *FUNCTIONS)
async def test_every_kind_of_function_answers_streamed_and_whole(server, function):
    assert server.model("f")(function) is function
    reply = await chat(server, model="f")
    assert chat_text(reply) == "Hi Hello"
    body = reply.json()
    assert body["object"] == "chat.completion" and body["usage"]["total_tokens"]
    assert body["choices"][0]["finish_reason"] == "stop"
    options = {"stream": True, "stream_options": {"include_usage": True}}
    reply = await chat(server, model="f", **options)
    assert stream_text(reply) == "Hi Hello"
    events = [json.loads(event) for event in reply.events()[:-1]]
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    reasons = [c["finish_reason"] for e in events for c in e["choices"]]
    assert reasons[-1] == "stop" and events[-1]["usage"]["total_tokens"]
    reply = await chat(server, model="f", stream=True)
    assert b'"usage"' not in reply.content  # for it was not asked for
    reply = await handler_ask(server.port, model="f")
    assert reply.status == 200 and reply.json()["content"] == "Hi Hello"


@cases("function", lambda request: "", lambda request: [], lambda request: iter([None]))
async def test_an_answer_without_text_is_an_empty_one(server, function):
    """As of a program that prints nothing. Clients expect null beside tool calls."""
    server.model("f")(function)
    assert chat_text(await chat(server, model="f")) == ""


@cases("stream", False, True)
async def test_what_a_functions_completion_lacks_is_added(server, stream):
    """As a stub returns it; a client waits for finish_reason, or requires an id."""
    message = {"content": "Hi"}
    server.model("f")(lambda request: {"choices": [{"message": message}]})
    options = {"stream_options": {"include_usage": True}} if stream else {}
    reply = await chat(server, model="f", stream=stream, **options)
    events = reply.events()[:-1] if stream else [reply.content]
    bodies = [json.loads(event) for event in events]
    assert all(body["id"] and body["object"] and body["model"] for body in bodies)
    last = [choice for body in bodies for choice in body["choices"]][-1]
    assert (last["index"], last["finish_reason"]) == (0, "stop")
    assert bodies[-1]["usage"]["completion_tokens"] == 1


@cases("stream", False, True)
@cases("choices", [{"delta": {"content": "Hi"}}], [])
async def test_a_chunk_is_no_message_of_a_function(server, stream, choices):
    server.model("f")(lambda request: iter([{"choices": choices}]))
    assert (await chat(server, model="f", stream=stream)).status == 500


@cases(
    "function",
    lambda request: {"tool_calls": [tool_call("call-1")]},
    lambda request: iter([{"tool_calls": [{"index": 0, **tool_call("call-1")}]}]),
)
async def test_a_function_may_call_tools(tmp_path, function):
    """In a stream alone a call has an index."""
    call, function = tool_call("call-1"), FunctionController(function)
    async with serving(tmp_path, function) as server:
        streamed = (await chat(server, stream=True)).events()
        delta = json.loads(streamed[0])["choices"][0]["delta"]
        assert delta["tool_calls"] == [{"index": 0, **call}]
        choice = (await chat(server)).json()["choices"][0]
        assert choice["message"]["tool_calls"] == [call]
        assert choice["finish_reason"] == "tool_calls"


@cases("first", tool_call("call-1", arguments="{"), {"function": {"arguments": "{"}})
@cases("more", {}, {"index": None})
async def test_tool_calls_that_come_one_by_one_are_not_taken_for_one(
    tmp_path, first, more
):
    def answer(request):
        for call in (first, tool_call("call-2", arguments="{")):
            yield {"tool_calls": [{**call, **more}]}
            yield {"tool_calls": [{"function": {"arguments": "}"}, **more}]}

    async with serving(tmp_path, FunctionController(answer)) as server:
        *events, _ = (await chat(server, stream=True)).events()
        deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:4]]
        assert [d["tool_calls"][0]["index"] for d in deltas] == [0, 0, 1, 1]


async def test_a_function_changes_only_its_own_request(tmp_path, tape):
    """Another controller and the tape get it as it came."""

    def spoils(request):
        request["messages"][0].clear()
        raise ValueError

    def answer(request):
        request["messages"].insert(0, {"role": "system", "content": "Be kind"})
        return request["messages"][1]["content"]

    functions = [FunctionController(f, models=["m"]) for f in (spoils, answer)]
    functions[0].weight = 100
    async with serving(tmp_path, *functions, tape=f"{tape}:auto") as server:
        for _ in range(2):
            assert chat_text(await chat(server)) == "Hello"
            await until(lambda: os.path.getsize(tape))
        assert [f.requests for f in functions] == [1, 1]


@cases("model, path", ("f", CHAT_URL), ("mock/echo", "/v1/embeddings"))
async def test_a_large_request_to_a_function_is_parsed_in_threads(
    server, monkeypatch, model, path
):
    threads = []

    def parse_object(content):
        threads.append(threading.current_thread())
        return json.loads(content)

    server.model("f")(lambda request: "Hi")
    monkeypatch.setattr(apiserver, "parse_object", parse_object)
    body = {**chat_body("x" * 2_000_000, model), "input": "x"}
    assert (await ask(server.port, "POST", path, body)).status == 200
    assert threads and threading.main_thread() not in threads


@cases("stream", False, True)
async def test_an_apierror_of_a_function_is_the_answer(tmp_path, stream):
    fields = {"type": "teapot", "param": "messages", "code": "tea"}

    async def refuses(request):
        raise APIError(418, "tea only", **fields)

    async def refuses_late(request):
        await refuses(request)
        yield

    for function in (refuses, refuses_late):
        first = FunctionController(function, name="first", weight=100)
        async with serving(tmp_path, first, pool_function("other")) as server:
            for _ in range(4):
                reply = await chat(server, stream=stream)
                assert reply.status == 418
                assert chat_error(reply) == {"message": "tea only", **fields}
            assert (await controller_line(server, "first"))["state"] == "ready"


@flow(limits=Limits(request_timeout=0.5))
async def test_a_context_variable_of_a_function_is_one_requests(server, client):
    """On the next, as on each, a time limit holds, and a hang-up ends it."""
    variable = contextvars.ContextVar("variable", default="none")

    def plain(request):
        before = variable.get()
        variable.set("set")
        return before

    @server.model("waits")
    async def waits(request):
        plain(request)
        if request["messages"][0]["content"] == "wait":
            await asyncio.sleep(9)
        return plain(request)

    server.add(FunctionController(plain, models=["plain"], max_concurrency=1))
    for model, content, status, text in (
        *2 * (("plain", "", 200, "none"),),
        *2 * (("waits", "", 200, "set"), ("waits", "wait", 504, None)),
    ):
        messages = [{"role": "user", "content": content}]
        body = {"model": model, "messages": messages}
        reply = await client.request("POST", CHAT_URL, body)
        assert reply.status == status
        assert text is None or chat_text(reply) == text
        assert variable.get() == "none"
    client.send(request_bytes("POST", CHAT_URL, body))
    await until(lambda: server.requests_in_flight)
    connection_drop(client.writer)
    await until(lambda: not server.requests_in_flight, timeout=0.4)


@cases("stream", False, True)
async def test_a_context_variable_of_a_generator_holds_until_its_end(server, stream):
    variable = contextvars.ContextVar("variable", default="none")

    def spell(request):
        token = variable.set("set")
        yield from (variable.get() for _ in range(3))
        variable.reset(token)
        yield variable.get()

    server.model("generator")(spell)
    server.model("returned")(lambda request: spell(request))
    for model in ("generator", "returned"):
        body = {"model": model, "messages": [], "stream": stream}
        reply = await ask(server.port, "POST", CHAT_URL, body)
        assert reply.status == 200
        text = reply.content.decode()
        assert text.count('"set"') == 3 * stream
        assert '"none"' in text if stream else '"setsetsetnone"' in text
        assert '"error"' not in text


@cases(
    "status, fields, answer",
    (429, {"retry_after": "5"}, (429, "5", None)),
    (400, {"code": 1234, "param": b"p"}, (400, None, "1234")),
    ("429", {}, (500, None, None)),
    (200, {}, (500, None, None)),
)
async def test_an_apierror_of_odd_values_is_answered(server, status, fields, answer):
    @server.model("odd")
    def odd(request):
        raise APIError(status, ValueError("no"), **fields)

    reply = await chat(server, model="odd")
    error = chat_error(reply)
    after = reply.headers.get("retry-after")
    assert (reply.status, after, error["code"]) == answer
    assert error["message"] == ("no" if answer[0] != 500 else "odd failed; see the log")


@cases(
    "error",
    ValueError("at /home/secret"),
    FileNotFoundError(2, "No such file", "/home/secret"),
    ConnectionRefusedError("10.0.0.7 secret"),
    asyncio.TimeoutError("secret"),
    StopIteration("secret"),
    KeyError("secret"),
    SystemExit("secret"),
    GeneratorExit("secret"),
    pytest.fail.Exception("secret"),  # a BaseException
    *[asyncio.CancelledError("secret")] * (sys.version_info >= (3, 11)),
    ids=lambda error: type(error).__name__,
)
async def test_clients_learn_nothing_of_a_functions_bug(tmp_path, caplog, error):
    def plain(request):
        raise error

    async def generator(request):
        raise error
        yield

    for function in (plain, generator):
        controller = FunctionController(function, name="f")
        async with serving(tmp_path, controller) as server:
            for stream in (False, True, False, False):
                reply = await chat(server, stream=stream)
                assert reply.status == 500 and b"secret" not in reply.content
                assert chat_error(reply)["message"]
            assert (await controller_line(server, "f"))["state"] == "ready"
            assert controller.in_flight == 0
    assert "secret" in caplog.text


def test_ctrl_c_in_a_function_still_ends_the_program(tmp_path):
    code = """
import asyncio, signal, chatgpt_apiserver as c
async def presses_ctrl_c(request):
    signal.raise_signal(signal.SIGINT)
async def main():
    request = c.parse_chat_request(b'{"model": "m", "messages": []}')
    pool = c.Pool()
    pool.add(c.FunctionController(presses_ctrl_c))
    async with pool.call(request):
        pass
asyncio.new_event_loop().run_until_complete(main())
"""
    done = run_python("-c", code, cwd=tmp_path)
    assert done.returncode not in (0, 1) and "KeyboardInterrupt" in done.stderr


CHUNK = {"object": "chat.completion.chunk", "choices": [{"delta": {"content": "a"}}]}


@cases("result", None, 5, b"bytes", {"content": object()}, [CHUNK, CHUNK])
async def test_a_function_that_returns_nonsense_fails_alone(tmp_path, result):
    f = FunctionController(lambda request: result, name="f", models=["f"])
    async with serving(tmp_path, f, pool_function("g", models=["g"])) as server:
        for stream in (False, True):
            assert (await chat(server, model="f", stream=stream)).status == 500
        assert f.in_flight == 0
        assert chat_text(await chat(server, model="g")) == "g"


async def test_a_generator_that_fails_later_ends_with_an_error(tmp_path, caplog):
    async def answer(request):
        yield "a"
        raise ValueError("secret")

    controller = FunctionController(answer, name="f")
    async with serving(tmp_path, controller) as server:
        reply = await chat(server, stream=True)
        assert reply.events()[-1].startswith('{"error"')
        assert b"[DONE]" not in reply.content and b"secret" not in reply.content
        assert controller.in_flight == 0
        assert (await chat(server)).status == 500


async def test_generators_are_closed_when_the_client_leaves(tmp_path, caplog):
    closed, log = [], Log()

    async def in_the_loop(request):
        try:
            while True:
                yield "word "
                await asyncio.sleep(0.01)
        finally:
            closed.append(in_the_loop)

    def in_a_thread(request):
        try:
            while True:
                yield "word "
                time.sleep(0.05)
        finally:
            closed.append(in_a_thread)

    for function in (in_the_loop, in_a_thread):
        controller = FunctionController(function)
        async with serving(tmp_path, controller, log=log) as server:
            async with posting(server) as client:
                await client.first_chunk()
            await until(lambda f=function: f in closed, 2)
            await until(lambda c=controller: c.in_flight == 0, 2)
    assert "internal error" not in log.text
    assert not [r for r in caplog.records if r.name == "chatgpt_apiserver"]


async def test_a_generator_that_exits_when_it_is_closed_fails_alone(server):
    async def exits(request):
        try:
            while True:
                yield "word " * 1000
        finally:
            raise SystemExit

    server.model("m")(exits)
    async with posting(server) as client:
        await client.first_chunk()
    await until(lambda: not server.requests_in_flight)
    assert (await echo(server)).status == 200
    assert server.pool.find("m").in_flight == 0


async def test_an_async_iterator_is_closed_when_its_client_leaves(server):
    closed = asyncio.Event()

    class Stream:
        async def __anext__(self):
            await asyncio.sleep(0.01)
            return "word "

        async def close(self):
            closed.set()

    server.model("m")(lambda request: Stream())
    async with posting(server) as client:
        await client.first_chunk()
    await asyncio.wait_for(closed.wait(), 1)


@flow(limits=Limits(response_size=1_000_000))
async def test_a_function_without_end_is_cut_where_its_answer_is_kept(server):
    """Not streamed, or in messages, whose last event repeats the text."""
    closed = []

    async def endless(request):
        try:
            while len(closed) < 100:
                yield b"x" * 10_000 if request["messages"][0]["content"] else "Hi " * 9
        finally:
            closed.append(True)

    server.model("m")(endless)
    for content in ("as bytes", ""):
        assert (await chat(server, content)).status == 500
    body = chat_body("", stream=True)
    reply = await ask(server.port, "POST", "/v1/messages", body)
    assert b"\n\nevent: error\n" in reply.content[-300:] and len(closed) == 3


async def test_an_abandoned_generator_occupies_one_thread(server, monkeypatch):
    """A second one polled until it could be closed."""
    monkeypatch.setattr(FunctionController, "THREADS", 2)
    waiting, resume, closed = threading.Event(), threading.Event(), []

    def answer(request):
        try:
            yield "Hi"
            if request["messages"][0]["content"] == "wait":
                waiting.set()
                resume.wait(10)
                yield "too late"
        finally:
            closed.append(request["messages"][0]["content"])

    server.model("m")(answer)
    async with posting(server, chat_body("wait", stream=True)):
        await until(waiting.is_set)
    await until(lambda: not server.requests_in_flight)
    await asyncio.sleep(0.1)
    assert chat_text(await asyncio.wait_for(chat(server), 5)) == "Hi"
    assert closed == ["Hello"]
    resume.set()
    await until(lambda: closed == ["Hello", "wait"])


async def test_a_function_that_hangs_is_cut_at_the_deadline(tmp_path):
    async def hangs(request):
        await asyncio.sleep(60)

    async def hangs_later(request):
        yield "a"
        await asyncio.sleep(60)

    limits = Limits(request_timeout=0.2)
    for function in (hangs, hangs_later):
        controller = FunctionController(function)
        async with serving(tmp_path, controller, limits=limits) as server:
            assert (await asyncio.wait_for(chat(server), 3)).status == 504
            reply = await asyncio.wait_for(chat(server, stream=True), 3)
            assert reply.status == 504 or '"error"' in reply.events()[-1]
            assert controller.in_flight == 0 and b"[DONE]" not in reply.content


async def test_mocks_answer_by_name_only(server):
    assert chat_text(await chat(server, "Say this", model="mock/echo")) == "Say this"
    assert chat_text(await chat(server, model="mock/text?text=")) == ""
    reply = await chat(server, model="gpt-4o")
    assert reply.status == 404 and "agent" in chat_error(reply)["message"]
    reply = await ask(server.port, "POST", "/api/ask", {"content": "Hi"})
    assert reply.status == 503
    assert reply.json()["error"].startswith("No available clients")
    reply = await chat(server, model="mock/429")
    assert reply.status == 429 and reply.headers["retry-after"] == "1"
    assert (await chat(server, model="mock/500")).status == 500
    assert (await chat(server, model="mock/slow?seconds=0")).status == 200
    assert (await chat(server, model="mock/slow?seconds=x")).status == 400
    reply = await chat(server, model="mock/slow?second=1")
    assert reply.status == 400 and "'second'" in chat_error(reply)["message"]
    reply = await chat(server, model="mock/cut?events=2", stream=True)
    assert reply.events()[-1].startswith('{"error"') and len(reply.events()) == 3
    assert (await controller_line(server, "mock"))["state"] == "ready"


DIALECT_REQUESTS = {
    "/v1/completions": {"prompt": "Hello you"},
    "/v1/responses": {"input": "Hello you"},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hello you"}]},
}


def dialect_text(path, answer):
    """The text of a whole answer."""
    if path == "/v1/completions":
        return answer["choices"][0]["text"]
    if path == "/v1/responses":
        return answer["output"][0]["content"][0]["text"]
    return answer["content"][0]["text"]


@cases("model", "mock/echo", "shout")
@cases("path", *DIALECT_REQUESTS)
async def test_a_string_becomes_an_answer_in_each_dialect(server, path, model):
    @server.model("shout")
    def shout(request):
        return request["messages"][-1]["content"].upper()

    expected = "Hello you" if model == "mock/echo" else "HELLO YOU"
    body = {"model": model, "max_tokens": 9, **DIALECT_REQUESTS[path]}
    whole = await ask(server.port, "POST", path, body)
    assert whole.status == 200
    assert dialect_text(path, whole.json()) == expected
    assert whole.json()["usage"]
    reply = await ask(server.port, "POST", path, {**body, "stream": True})
    assert reply.status == 200 and reply.whole
    text = ""
    for event in (line for line in reply.content.decode().split("\n\n") if line):
        data = event.split("data: ")[1]
        chunk = {} if data == "[DONE]" else json.loads(data)
        if path == "/v1/completions":
            text += (chunk.get("choices") or [{"text": ""}])[0]["text"]
        else:
            assert event.startswith(f"event: {chunk['type']}\n")
            piece = chunk.get("delta", "")
            text += piece if isinstance(piece, str) else piece.get("text", "")
    assert text == expected


@cases("stream", False, True)
async def test_a_mock_calls_tools_in_each_dialect(server, stream):
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    body = {**chat_body("Paris", "mock/echo"), "input": "Paris"}
    for path, offered in (
        ("/v1/messages", {"input_schema": schema}),
        ("/v1/responses", {"type": "function", "parameters": schema}),
    ):
        tools = [{"name": "weather", **offered}]
        body = {**body, "tools": tools, "stream": stream, "max_tokens": 9}
        text = (await ask(server.port, "POST", path, body)).content.decode()
        assert '"weather"' in text and "city" in text and "Paris" in text
        assert ("tool_use" in text) == (path == "/v1/messages")


@cases(
    "asked, path, ends",
    ("no", "/v1/completions", ['"finish_reason": "stop"']),
    ("no", "/v1/messages", ['"stop_reason": "refusal"']),
    ("no", "/v1/responses", ["""{"type": "refusal", "refusal": "I won't"}"""]),
    ("cut", "/v1/messages", ['"stop_reason": "max_tokens"']),
    ("cut", "/v1/responses", ['"incomplete", "error"', '"max_output_tokens"']),
)
async def test_a_refusal_or_a_cut_is_one_in_each_dialect(tmp_path, asked, path, ends):
    def answer(request):
        if request["messages"][-1]["content"] == "no":
            return iter([{"refusal": "I "}, {"refusal": "won't"}])
        return completion(choices=[{**TEXT_CHOICE, "message": {"content": "won't"}}])

    async with serving(tmp_path, FunctionController(answer)) as server:
        body = {**chat_body(asked), "max_tokens": 9, "input": asked, "prompt": asked}
        for stream in (False, True):
            reply = await ask(server.port, "POST", path, {**body, "stream": stream})
            text = reply.content.decode()
            assert reply.status == 200 and reply.whole
            assert all(word in text for word in ["won't", *ends]), text


@cases(
    "path, field, value, status",
    ("/v1/messages", "messages", None, 400),
    ("/v1/messages/count_tokens", "messages", {}, 400),
    ("/v1/responses", "input", 5, 400),
    ("/v1/responses", "input", "Hi", 200),
    ("/v1/completions", "prompt", ["one", "two"], 400),  # two choices, at OpenAI
    ("/v1/completions", "prompt", [1, 2], 400),
    ("/v1/completions", "prompt", ["one"], 200),
    ("/v1/completions", "prompt", None, 200),
)
async def test_a_function_is_not_called_with_less_than_was_asked(
    server, path, field, value, status
):
    body = {"model": "mock/echo", "max_tokens": 9, field: value}
    reply = await ask(server.port, "POST", path, body)
    assert reply.status == status and (
        status == 200 or field in reply.json()["error"]["message"]
    )


@cases("value, count", ([1, 2, 3], 1), ([[1], [2]], 2), (["a", "b"], 2), ([], 0))
async def test_a_mock_embeds_each_text(server, value, count):
    body = {"model": "mock/echo", "input": value}
    reply = await ask(server.port, "POST", "/v1/embeddings", body)
    assert len(reply.json()["data"]) == count


async def test_texts_around_a_tool_call_are_items_of_their_own(tmp_path):
    async def answer(request):
        call = {"tool_calls": [tool_call("c")]}
        for delta in ({"content": "a"}, "", call, "", "b", ""):  # "" ends nothing
            yield delta

    async with serving(tmp_path, FunctionController(answer)) as server:
        body = {**chat_body("?"), "stream": True, "max_tokens": 9, "input": "?"}
        for path, place in (("messages", "index"), ("responses", "output_index")):
            reply = await ask(server.port, "POST", f"/v1/{path}", body)
            events = [json.loads(data) for data in api_events(reply.content)]
            places = [event[place] for event in events if place in event]
            assert places == sorted(places) and set(places) == {0, 1, 2}
        done = events[-1]["response"]["output"]
        types = [item["type"] for item in done]
        assert types == ["message", "function_call", "message"]
        assert len({item["id"] for item in done}) == 3
        body["stream"] = False
        for path, key, expected in (
            ("messages", "content", ["text", "tool_use", "text"]),
            ("responses", "output", types),
        ):
            whole = (await ask(server.port, "POST", f"/v1/{path}", body)).json()
            assert [item["type"] for item in whole[key]] == expected


async def test_a_tool_call_without_an_id_gets_one(server):
    """Two nulls in one response: OpenAI's SDK raises RuntimeError."""
    functions = [{"function": {"name": name, "arguments": "{}"}} for name in "fg"]
    server.model("f")(lambda request: {"tool_calls": functions})
    body = {**chat_body("?", "f"), "max_tokens": 9, "input": "?"}
    for path, items, id in (
        ("messages", "content", "id"),
        ("responses", "output", "call_id"),
    ):
        whole = (await ask(server.port, "POST", f"/v1/{path}", body)).json()
        first, second = (item[id] for item in whole[items])
        assert first != second and first.startswith("call_")


@cases("known_by", "index", "index from 1", "first index", "later index", "id", None)
async def test_a_tool_call_in_pieces_is_one_item(tmp_path, known_by):
    """As a function that relays another API's stream gives it."""

    def answer(request):
        yield "Look:"
        for index in (0, 1):
            at = index + (known_by == "index from 1")
            place = {"index": at} if "index" in str(known_by) else {}
            place = {"id": f"c{index}"} if known_by == "id" else place
            first = {} if known_by == "later index" else place
            place = {} if known_by == "first index" else place
            yield {"tool_calls": [{**first, **tool_call(f"c{index}", arguments="")}]}
            for piece in ('{"a"', f":{index}}}"):
                yield {"tool_calls": [{**place, "function": {"arguments": piece}}]}

    async with serving(tmp_path, FunctionController(answer)) as server:
        body = {**chat_body("?"), "max_tokens": 9, "input": "?"}
        for path, key in (("messages", "partial_json"), ("responses", "arguments")):
            body["stream"] = False
            whole = await ask(server.port, "POST", f"/v1/{path}", body)
            body["stream"] = True
            reply = await ask(server.port, "POST", f"/v1/{path}", body)
            found = re.findall(rf'"{key}": "({{.*?}})"', reply.content.decode())
            assert list(dict.fromkeys(found)) == [r"{\"a\":0}", r"{\"a\":1}"], path
            for text in (reply.content, whole.content):
                assert b"c0" in text and b"c1" in text
        message = (await chat(server)).json()["choices"][0]["message"]
        found = [call["function"]["arguments"] for call in message["tool_calls"]]
        assert message["content"] == "Look:" and found == ['{"a":0}', '{"a":1}']
        *events, _ = (await chat(server, stream=True)).events()
        deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
        pieces = [call for delta in deltas for call in delta.get("tool_calls", ())]
        assert [call["index"] for call in pieces] == [0, 0, 0, 1, 1, 1]
        assert [call["id"] for call in pieces if "id" in call] == ["c0", "c1"]


async def test_what_a_mock_echoes_in_each_dialect(server):
    """A tool's result, too; a system message behind what was said is passed over, for
    Claude Code puts one there."""
    result = {"type": "tool_result", "tool_use_id": "t", "content": "sunny"}
    output = {"type": "function_call_output", "call_id": "t", "output": "sunny"}
    more = {"max_tokens": 9, "tools": [{"type": "function", "name": "f"}]}
    turn = CLAUDE_CODE_TURN["messages"][:2]
    for path, body, text in (
        (
            "/v1/messages",
            {"messages": [{"role": "user", "content": [result]}]},
            "sunny",
        ),
        ("/v1/responses", {"input": [output]}, "sunny"),
        ("/v1/messages", {"messages": turn, "tools": []}, "<system-reminder>\nrun"),
    ):
        asked = {"model": "mock/echo", **more, **body}
        reply = await ask(server.port, "POST", path, asked)
        assert dialect_text(path, reply.json()) == text


# As Claude Code 2.1 and Codex 0.171 send a turn, with other texts.
CLAUDE_CODE_TURN = json.loads("""{"messages": [
    {"role": "user", "content": [{"type": "text", "text": "<system-reminder>"},
        {"type": "text", "text": "run", "cache_control": {"type": "ephemeral"}}]},
    {"role": "system", "content": "Available agent types"},
    {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "Hm", "signature": "s"},
        {"type": "text", "text": "I do."},
        {"type": "tool_use", "id": "1", "name": "Bash", "input": {"a": 1}},
        {"type": "tool_use", "id": "2", "name": "Bash", "input": {}}]},
    {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "1", "content": "one"},
        {"type": "tool_result", "tool_use_id": "2",
            "content": [{"type": "text", "text": "two"}]},
        {"type": "text", "text": "go on"}]}],
    "system": [{"type": "text", "text": "You are"}, {"type": "text", "text": "it."}],
    "tools": [
        {"name": "Bash", "description": "Runs", "input_schema": {"type": "object"}}],
    "max_tokens": 32000, "thinking": {"type": "adaptive"},
    "output_config": {"effort": "high"}, "metadata": {"user_id": "{}"}}""")
CODEX_TURN = json.loads("""{"instructions": "You are\\nit.", "input": [
    {"type": "message", "role": "user", "content": [
        {"type": "input_text", "text": "<system-reminder>"},
        {"type": "input_text", "text": "run"}]},
    {"type": "message", "role": "system", "content": [
        {"type": "input_text", "text": "Available agent types"}]},
    {"type": "reasoning", "summary": [], "encrypted_content": "e"},
    {"type": "message", "role": "assistant", "content": [
        {"type": "output_text", "text": "I do."}]},
    {"type": "function_call", "call_id": "1", "name": "Bash",
        "arguments": "{\\"a\\": 1}"},
    {"type": "custom_tool_call", "call_id": "2", "name": "Bash", "input": "{}"},
    {"type": "function_call_output", "call_id": "1", "output": "one"},
    {"type": "custom_tool_call_output", "call_id": "2", "output": [
        {"type": "input_text", "text": "two"}]},
    {"type": "message", "role": "user", "content": "go on"}],
    "tools": [
        {"type": "web_search", "external_web_access": false},
        {"type": "function", "name": "Bash", "description": "Runs", "strict": false,
            "parameters": {"type": "object"}}],
    "store": false, "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "k"}""")


async def test_a_responses_usage_has_every_field_that_the_sdk_requires(server):
    body = {"model": "mock/echo", "input": "x"}
    reply = await ask(server.port, "POST", "/v1/responses", body)
    details = {"cached_tokens": 0, "cache_write_tokens": 0}
    assert reply.json()["usage"]["input_tokens_details"] == details


PNG = {"type": "base64", "media_type": "image/png", "data": "AA=="}


@cases(
    "path, key, kind, image, url",
    (
        "/v1/messages",
        "messages",
        "text",
        {"type": "image", "source": PNG},
        {"url": "data:image/png;base64,AA=="},
    ),
    (
        "/v1/messages",
        "messages",
        "text",
        {"type": "image", "source": {"type": "url", "url": "https://a/b"}},
        {"url": "https://a/b"},
    ),
    (
        "/v1/responses",
        "input",
        "input_text",
        {"type": "input_image", "image_url": "data:x", "detail": "low"},
        {"url": "data:x", "detail": "low"},
    ),
    ("/v1/responses", "input", "input_text", {"type": "input_file"}, None),
)
async def test_a_function_sees_an_image_as_in_a_chat(
    server, path, key, kind, image, url
):
    seen = []

    @server.model("m")
    def look(request):
        seen.extend(request["messages"])
        return "done"

    messages = [{"role": "user", "content": [{"type": kind, "text": "What?"}, image]}]
    reply = await ask(server.port, "POST", path, {"model": "m", key: messages})
    assert reply.status == 200
    shown = {"type": "image_url", "image_url": url} if url else image
    content = [{"type": "text", "text": "What?"}, shown]
    assert seen == [{"role": "user", "content": content}]


@cases(
    "path, key, kind",
    ("/v1/messages", "messages", "text"),
    ("/v1/responses", "input", "input_text"),
)
async def test_a_function_sees_an_empty_message(server, path, key, kind):
    seen = []

    @server.model("m")
    def last(request):
        seen.append(request["messages"][-1])
        return "done"

    messages = [{"role": "user", "content": [{"type": kind, "text": ""}]}]
    reply = await ask(server.port, "POST", path, {"model": "m", key: messages})
    assert reply.status == 200
    assert seen == [{"role": "user", "content": ""}]


@cases(
    "path, body",
    ("/v1/messages?beta=true", CLAUDE_CODE_TURN),
    ("/v1/responses", CODEX_TURN),
    ids=["claude-code", "codex"],
)
async def test_a_function_sees_a_coding_agents_turn_as_a_chat(server, path, body):
    """Texts as strings, and tools' calls with the ids that their results name."""
    seen = []

    @server.model("m")
    def turn(request):
        seen.append((request["messages"], request["tools"]))
        return "done"

    assert (await ask(server.port, "POST", path, {**body, "model": "m"})).status == 200
    calls = [tool_call("1", "Bash", '{"a": 1}'), tool_call("2", "Bash")]
    function = {"name": "Bash", "description": "Runs", "parameters": {"type": "object"}}
    ((messages, tools),) = seen
    assert tools == [{"type": "function", "function": function}]
    assert messages == [
        {"role": "system", "content": "You are\nit."},
        {"role": "user", "content": "<system-reminder>\nrun"},
        {"role": "system", "content": "Available agent types"},
        {"role": "assistant", "content": "I do.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "one"},
        {"role": "tool", "tool_call_id": "2", "content": "two"},
        {"role": "user", "content": "go on"},
    ]


async def test_a_function_is_not_called_to_count_tokens(tmp_path):
    """Claude Code counts a part at a time; refused, it asks for answers to them."""
    called = []
    tools = [{"name": "t", "input_schema": {"type": "object", "title": "y" * 400}}]
    path = "/v1/messages/count_tokens?beta=true"
    controller = FunctionController(called.append, models=["m"])
    async with serving(tmp_path, controller) as server:
        for more, low in (({}, 100), ({"tools": tools}, 200), ({"system": "z"}, 100)):
            for model in ("m", "mock/text"):
                body = chat_body("x" * 400, model, **more)
                reply = await ask(server.port, "POST", path, body)
                assert low <= reply.json()["input_tokens"] < low + 50
    assert called == []


async def test_mock_embeddings_are_equal_for_equal_texts(server):
    """They wait, refuse and break off as in a chat."""

    async def asked(model="mock/echo", **more):
        body = {"model": model, "input": ["a", "b", "a"], **more}
        return await ask(server.port, "POST", "/v1/embeddings", body)

    one, two, three = (e["embedding"] for e in (await asked()).json()["data"])
    assert one == three != two and len(one) == 8
    data = (await asked(encoding_format="base64")).json()["data"]
    packed = struct.unpack("<8f", base64.b64decode(data[0]["embedding"]))
    assert packed == pytest.approx(one, abs=1e-6)
    with takes(0.1, 60):
        assert (await asked("mock/slow?seconds=0.1")).status == 200
    times = [(await asked("mock/429?times=1")).status for _ in range(2)]
    assert times == [429, 200]
    for model, status in (
        ("mock/429", 429),
        ("mock/500", 500),
        ("mock/cut", 500),
        ("mock/garbage", 500),
        ("mock/echo?x=1", 400),
        ("mock/slow?seconds=x", 400),
        ("mock/cut?events=10001", 400),  # that without end held up everybody
    ):
        assert (await asked(model)).status == status


@flow(behave=None, controller=ANY)
async def test_a_mocks_name_is_asked_of_no_upstream(server, upstream):
    for model, status in (("mock/echo", 200), ("mock/echo2", 404)):
        assert (await chat(server, model=model)).status == status
    assert chats(upstream) == []


@cases(
    "model, stream",
    ("mock/echo", False),
    ("mock/echo", True),
    ("mock/cut?events=5000", True),
)
async def test_a_mocks_long_answer_holds_up_no_other_request(server, model, stream):
    words = "a b " * 100_000
    long = asyncio.ensure_future(chat(server, words, model=model, stream=stream))
    await until(lambda: server.requests_in_flight)
    answered = 0
    while not long.done():
        assert (await ask(server.port, "GET", "/health")).status == 200
        answered += 1
    assert answered > 3
    content = (await long).content
    assert model != "mock/echo" or content.count(b"a b a b") > 1000


BLANKS = " " * 40_000


@cases("before, after", ("", BLANKS), (f"a{BLANKS}b", ""), (" a\t b", BLANKS))
async def test_blanks_hold_up_no_other_request(server, before, after):
    """A search for words in quadratic time stopped the server for 12 seconds."""
    with takes(0, 2):
        expected = before or after
        assert chat_text(await echo(server, before + after)) == expected
        assert stream_text(await echo(server, before + after, stream=True)) == expected


# --- Slow and stalled clients


async def upstream_endless(request, writer):
    writer.write(STREAM_HEAD)
    block = chunked(b"".join(chunk("x" * 100) for _ in range(40)))
    while True:
        writer.write(block)
        await writer.drain()


@flow(timeout=40, behave=upstream_endless)
async def test_slow_readers_hold_up_only_the_upstream(server, upstream, controller):
    """What waits in the server is bounded, however fast the upstream is."""
    server.add(pool_function("f", models=["f"]))
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(5):
            client = await stack.enter_async_context(posting(server))
            client.writer.transport.pause_reading()
        connections = server._handlers
        await until(lambda: len(connections) == 5)
        await until(lambda: not any(c.writable for c in connections), 15)
        assert chat_text(await chat(server, model="f")) == "f"
        assert (await ask(server.port, "GET", "/health")).status == 200
        assert max(c.unsent for c in connections) < 1024 * 1024
    await until(lambda: controller.in_flight == 0)
    await until(lambda: upstream.ended >= 5)


@flow(behave=upstream_endless, limits=Limits(write_timeout=0.3))
async def test_a_client_that_stops_reading_is_reset(server, upstream, controller, log):
    """With an RST, so that what was not sent leaves the kernel."""
    async with posting(server) as client:
        client.writer.transport.pause_reading()
        await until(lambda: controller.in_flight == 1)
        await until(lambda: controller.in_flight == 0, 10)
        client.writer.transport.resume_reading()
        with pytest.raises(ConnectionResetError):
            while await client.reader.read(1 << 20):
                pass
    await until(lambda: upstream.ended == upstream.connections)
    # Its access line says 200, too.
    await until(lambda: "POST /v1/chat/completions 200" in log.text)
    assert log.text.count("disconnected a client that read nothing for 0.3 s") == 1


@pytest.mark.skipif(not hasattr(socket, "TCP_NOTSENT_LOWAT"), reason="no such option")
@pytest.mark.skipif(sys.platform != "linux", reason="measures Linux's buffers")
@flow(behave=upstream_endless, limits=Limits(write_timeout=0.6))
async def test_a_client_that_reads_slowly_but_steadily_is_not_cut(server):
    """L14 counts bytes taken: what the kernel hoards must not hide them.

    64 KiB in each quarter of write_timeout; without WRITE_UNSENT_SIZE the kernel
    takes 2.5 MB first, and then nothing until a third of them has been read.
    """
    loop = asyncio.get_running_loop()
    data = request_bytes("POST", CHAT_URL, STREAM)
    with await slow_socket(server.port, data, 64 * 1024) as sock:
        end = loop.time() + 2.4
        while loop.time() < end:
            taken = 0
            while taken < 64 * 1024:
                piece = await loop.sock_recv(sock, 64 * 1024 - taken)
                assert piece, "it was closed"
                taken += len(piece)
            await asyncio.sleep(0.15)


@flow(behave=upstream_endless, limits=Limits(request_timeout=0.6))
async def test_a_slow_client_holds_a_slot_until_its_request_is_late(
    server, controller, log
):
    data = request_bytes("POST", CHAT_URL, STREAM)
    with await slow_socket(server.port, data):
        await until(lambda: controller.in_flight)
        await until(lambda: not controller.in_flight, timeout=3)
    await until(lambda: "broken off" in log.text)


# --- The log and the clock


async def test_a_log_that_is_not_read_drops_lines_and_counts_them():
    """Writing never waits."""
    reading, writing = os.pipe()
    try:
        log = apiserver.Log(writing)
        with takes(0, 5):
            for number in range(30_000):
                log.write(f"line {number} " + "x" * 80)
                if number % 1000 == 0:
                    await asyncio.sleep(0)
        text = b""
        while b"dropped" not in text:
            text += os.read(reading, 1 << 20)
            log.flush()
        lines = text.decode().split("\n")
        numbers = [int(line.split()[1]) for line in lines if line[:4] == "line"]
        assert numbers == list(range(len(numbers))) and numbers[-1] < 20_000
        dropped = int(re.search(r"\((\d+) lines of this log", text.decode())[1])
        assert dropped + len(numbers) <= 30_000 and dropped > 9_000
    finally:
        os.close(reading)
        os.close(writing)


def test_a_long_line_of_the_log_is_whole_and_a_dead_reader_is_no_error():
    reading, writing = os.pipe()
    log = apiserver.Log(writing)
    log.write("x" * 10_000)
    log.write("next")
    assert os.read(reading, 1 << 20) == b"x" * 10_000 + b"\nnext\n"
    os.close(reading)
    log.write("to a closed pipe")
    log.report("to a closed pipe")
    os.close(writing)
    log.write("to a closed file")


def test_only_one_function_reads_the_clock():
    """No timeout and no cooling can depend on a clock that jumps."""
    source = MODULE.read_text()
    asked = re.findall(r"(?:time|datetime)\.(?:time|time_ns|now|today)\(.*", source)
    assert len(asked) == 1 and asked[0] in inspect.getsource(apiserver.unix_time)
    assert not re.search(r"(?:import|from) (?:datetime|time import)", source)


@cases("jump", 86400, -86400, -2_000_000_000)
@flow(
    behave=error_reply(429),
    gate={"models": ["g"], "limit": {"requests": 9, "per": "day"}},
)
async def test_a_clock_that_jumps_disturbs_nothing(server, gate, monkeypatch, jump):
    now, offset = time.time, [0]
    monkeypatch.setattr(time, "time", lambda: max(0.0, now() + offset[0]))
    assert (await chat(server)).status == 500
    running = asyncio.ensure_future(chat(server, model="g"))
    await until(lambda: gate.asked)
    offset[0] = jump
    gate.let()
    assert chat_text(await running) == "through"
    assert chat_text(await chat(server, model="g")) == "through"
    assert (await chat(server)).status == 503
    line = await controller_line(server, "up0")
    assert line["state"] == "cooling" and line["until"]


# --- For a long time


def resident_size():
    """This process's memory in bytes, 0 where that is unknown."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def open_files():
    return len(os.listdir("/dev/fd"))


@flow(timeout=60, behave=by_words({"true": streams(HI_EVENTS)}))
async def test_thousands_of_requests_leave_nothing_behind(server):
    """Tasks, files and memory are as before."""

    async def use(client, count):
        for number in range(count):
            body = chat_body(stream=bool(number % 2))
            assert (await client.request("POST", CHAT_URL, body)).status == 200

    async with Client(server.port) as one, Client(server.port) as two:
        await asyncio.gather(use(one, 200), use(two, 200))
        tasks, files, size = len(asyncio.all_tasks()), open_files(), resident_size()
        await asyncio.gather(use(one, 700), use(two, 700))
        assert len(asyncio.all_tasks()) <= tasks + 2
        assert open_files() <= files + 2
        assert resident_size() < size + 8 * 1024 * 1024
        for _ in range(100):  # connections that come and go
            assert (await chat(server)).status == 200
        await until(lambda: len(asyncio.all_tasks()) <= tasks + 2)
        assert open_files() <= files + 2


# --- The tape


@pytest.fixture
def tape(tmp_path):
    """Where taping() records."""
    return tmp_path / "chat.jsonl"


def taping(tmp_path, behave=None, mode="auto", **options):
    """A server that records an upstream in chat.jsonl; what pool_of() gives."""
    tape = f"{tmp_path}/chat.jsonl:{mode}"
    return pool_of(tmp_path, behave, tape=tape, **options)


def tape_lines(path):
    # Empty ones are none: who appends while another does may see its line half written.
    return [json.loads(line) for line in path.read_bytes().splitlines() if line]


def recorded(content, answer="Hi there", path=CHAT_URL):
    """A line of a tape, in bytes."""
    pieces = [(0.0, json.dumps(completion(answer)).encode())]
    return apiserver.Recording(path, content, 200, "application/json", pieces).encode()


USAGE = {"input_tokens": 3, "output_tokens": 4}
USAGE_EVENT = chunk(choices=[], usage={"prompt_tokens": 3, "completion_tokens": 4})
TEXT_CHOICES = {"choices": [{"text": "Hi", "finish_reason": "stop"}]}
DIALECT_ANSWERS = {
    CHAT_URL: (
        completion(),
        [chunk("Hi "), chunk("th\u00e9re") + chunk(None, "stop"), USAGE_EVENT, DONE],
    ),
    "/v1/completions": (
        {**TEXT_CHOICES, "usage": {}},
        [apiserver.sse_event(json.dumps(TEXT_CHOICES).encode()), DONE],
    ),
    "/v1/embeddings": ({"data": [{"embedding": [0.5]}]}, None),
    "/v1/responses": (
        {"id": "resp_1", "output": [], "usage": USAGE},
        [RESPONSE_CREATED, typed("response.completed", response={"usage": USAGE})],
    ),
    "/v1/messages": (
        {"type": "message", "content": [], "usage": USAGE},
        [
            typed("message_start", message={"usage": USAGE}),
            typed("message_delta", delta={}, usage=USAGE),
            typed("message_stop"),
        ],
    ),
}


def piecewise(pieces, content_type="text/event-stream", pause=0.03):
    """Behaviour of an upstream: these pieces, and a pause after each."""
    head = STREAM_HEAD.replace(b"text/event-stream", content_type.encode())
    steps = (step for piece in pieces for step in (chunked(piece), pause))
    return sends(head, *steps, b"0\r\n\r\n")


async def pieces_of(server, body=STREAM, path=CHAT_URL, headers=()):
    """The chunks in which a stream reaches its client."""
    async with posting(server, body, path, headers=headers) as client:
        chunks = [await client.first_chunk()]
        while chunks[-1]:
            chunks.append(await client.read_chunk())
        assert chunks.pop() == b""  # the last one
        return chunks


@cases("stream", False, True)
@cases("path", *DIALECT_ANSWERS)
async def test_a_tape_replays_each_dialect_as_recorded(tmp_path, tape, path, stream):
    """After a restart, without the upstream: the same bytes, pieces and usage."""
    whole, pieces = DIALECT_ANSWERS[path]
    if stream and pieces is None:
        pytest.skip("has no streams")
    behave = piecewise(pieces) if stream else http_reply(whole)
    body = {**chat_body(), "input": "Hello", "stream": stream}

    async def answered(server):
        reply = await ask(server.port, "POST", path, body)
        chunks = await pieces_of(server, body, path) if stream else None
        await until(lambda: not server.requests_in_flight)
        usage = (await ask(server.port, "GET", "/v1/usage")).json()["total"]
        return reply.status, reply.headers["content-type"], reply.content, chunks, usage

    async with taping(tmp_path, behave, "record", usage="-") as (server, _, _):
        first = await answered(server)
    async with serving(tmp_path, tape=str(tape), usage="-") as server:
        assert await answered(server) == first
    assert first[0] == 200 and first[4]["requests"] == 1 + stream
    if path not in ("/v1/completions", "/v1/embeddings"):
        assert first[4]["output"] == 4 * (1 + stream)
        assert first[2] in (b"".join(pieces or []), json.dumps(whole).encode()) or (
            path == CHAT_URL and b"usage" not in first[2]  # for it was not asked for
        )


async def test_a_tape_keeps_the_time_of_each_piece(tmp_path, tape):
    pieces = [chunk("a"), chunk("b"), chunk(None, "stop"), DONE]
    async with taping(tmp_path, piecewise(pieces, pause=0.1)) as (server, _, _):
        chunks = await pieces_of(server)
    (line,) = tape_lines(tape)
    times = [seconds for seconds, _ in line["pieces"]]
    assert times == sorted(times) and times[-1] > 0.25
    for speed, least in ((0, 0), (1, times[-1]), (0.5, 2 * times[-1])):
        again = apiserver.TapeController(str(tape), speed=speed)
        async with serving(tmp_path, again) as server:
            began = time.monotonic()
            assert await pieces_of(server) == chunks
            assert time.monotonic() - began >= least
            assert speed or time.monotonic() - began < times[-1]


async def test_a_tape_holds_no_secret_and_no_header(tmp_path, tape):
    """Not even in a refusal that repeats the upstream's key."""
    wrong = error_reply(400, "bad: UPSTREAMSECRET sk-12345678")
    good = http_reply(completion(), headers=[("x-secret", "HEADER")])
    made = taping(tmp_path, by_words({"wrong": wrong}, usual=good), "record")
    async with made as (server, _, _):
        headers = [("x-session-id", "HEADER"), ("cookie", "HEADER")]
        path = f"{CHAT_URL}?key=HEADER"
        await ask(server.port, "POST", path, CHAT, headers=headers)
        wrong = await ask(server.port, "POST", path, chat_body("wrong"))
        assert wrong.status == 400 and b"SECRET" not in wrong.content
    good, _ = tape_lines(tape)
    text = json.dumps(CHAT, sort_keys=True, separators=(",", ":"))
    digest = apiserver.hashlib.sha256(text.encode()).hexdigest()
    ((_, piece),) = good.pop("pieces")
    assert json.loads(piece) == completion()
    expected = {"tape": 1, "path": CHAT_URL, "sha256": digest, "content": CHAT}
    expected.update(status=200, content_type="application/json")
    assert [*good.items()] == [*expected.items()]
    written = tape.read_bytes().lower()
    for secret in (KEY, "UPSTREAMSECRET", "HEADER", "authorization", "bearer", "sk-1"):
        assert secret.lower().encode() not in written
    assert stat.S_IMODE(tape.stat().st_mode) == 0o600
    async with serving(tmp_path, tape=str(tape)) as server:
        again = await chat(server, "wrong")
        assert (again.status, again.content) == (400, wrong.content)


async def test_failures_are_not_recorded(tmp_path, tape):
    """A 429, a 500, a cut stream, one whose client has left, half a JSON, an error."""
    begun = [STREAM_HEAD, chunked(chunk("Hel"))]
    error = chunked(b'data: {"error": {"message": "no"}}\n\n')
    failures = {status: error_reply(status) for status in ("401", "429", "500")}
    failures["half"] = http_reply(b'{"choices": [')
    breaks = {"cut": connection_drop, "wrong": error, "no-finish": b"0\r\n\r\n"}
    failures |= {kind: sends(*begun, end) for kind, end in breaks.items()}
    behave = by_words({**failures, "held": sends(*begun, 60)})
    made = pool_of(tmp_path, behave, tape=f"{tape}:record")
    async with made as (server, (upstream,), (controller,)):
        for kind in failures:
            controller.health.reset()
            await chat(server, kind, stream=kind in breaks)
        assert len(chats(upstream)) == 7
        async with posting(server, chat_body("held", stream=True)) as client:
            await client.first_chunk()
        await until(lambda: not server.requests_in_flight)
    assert tape.read_bytes() == b""


async def test_an_answer_that_is_too_large_is_not_recorded(tmp_path, tape):
    log, limits = Log(), Limits(response_size=3000)
    behave = streams(*[chunk("x" * 100)] * 20, chunk(None, "stop"), DONE)
    made = taping(tmp_path, behave, "record", limits=limits, log=log)
    async with made as (server, _, _):
        assert (await chat(server, stream=True)).events()[-1] == "[DONE]"
        await until(lambda: "too large to record" in log.text)
    assert tape.read_bytes() == b""


async def test_a_full_disk_costs_the_recording_alone(tmp_path, tape, monkeypatch):
    log, write = Log(), os.write

    def full(fd, data):
        return write(fd, data[:9] if data.startswith(b'{"tape"') else data)

    async with taping(tmp_path, log=log) as (server, (upstream,), _):
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            assert (await chat(server)).status == 200
            await until(lambda: "not recorded: [Errno 28]" in log.text)
        assert tape.read_bytes() == b""
        for _ in range(2):
            assert (await chat(server)).status == 200
        assert len(upstream.requests) == 2 and len(tape_lines(tape)) == 1


@cases("mode, status", ("auto", 200), ("record", 200), ("replay", 500))
async def test_a_tape_that_can_no_longer_be_read_stops_replay_alone(
    tmp_path, tape, mode, status
):
    log = Log()
    tape.write_bytes(b"")
    async with taping(tmp_path, mode=mode, log=log) as (server, _, _):
        tape.unlink()
        tape.mkdir()
        reply = await chat(server)
        assert reply.status == status
        if status == 500:
            assert chat_error(reply)["message"] == "chat.jsonl: Is a directory"
        else:
            await until(lambda: "not recorded: [Errno 21]" in log.text)


async def test_a_miss_names_the_nearest_recording_and_what_differs(tmp_path, tape):
    far = chat_body("other", temperature=1, tools=[], user="PRIVATE")
    near = chat_body("PRIVATE", temperature=0.5)
    system, user = {"role": "system", "content": "Be brief."}, near["messages"][0]
    near["messages"] = [system, user]
    tape.write_bytes(recorded(far) + b"\n" + recorded(near) + recorded(far))
    differs = "of this request; the nearest is line 3, which differs in "
    other = [system, {**user, "content": "SECRET"}]
    async with serving(tmp_path, tape=str(tape)) as server:
        for path, change, what in (
            (CHAT_URL, {"messages": other}, differs + "messages[1].content."),
            (CHAT_URL, {"messages": [system]}, differs + "messages[1]."),
            (CHAT_URL, {"stream": True}, differs + "stream."),
            ("/v1/messages", {"max_tokens": 1}, "of /v1/messages."),
        ):
            reply = await ask(server.port, "POST", path, {**near, **change})
            error = reply.json()["error"]  # in its own shape
            assert (reply.status, error["type"]) == (404, "not_found_error")
            assert error.get("code", "no_recording") == "no_recording"
            assert error["message"] == f"chat.jsonl has no recording {what}"
        # Mocks do not answer, either.
        assert (await chat(server, model="mock/echo")).status == 404


@cases("id", "tape", apiserver.TapeController.id)
async def test_no_agent_takes_the_tapes_place(tmp_path, tape, id):
    tape.write_bytes(recorded(CHAT, "taped"))
    async with serving(tmp_path, tape=str(tape)) as server:
        async with Agent(server.port, id=id) as agent, beside(agent.echo()):
            await handler_agents(server, 1)
            for _ in range(3):
                assert chat_text(await chat(server)) == "taped"


async def test_auto_asks_once_and_record_asks_each_time(tmp_path, tape):
    answers = iter(range(100))

    async def behave(request, writer):
        writer.write(http_reply(completion(str(next(answers)))))

    async def text(server, content="Hello"):
        return chat_text(await chat(server, content))

    async with taping(tmp_path, behave) as (server, (upstream,), _):
        # Of equal requests at once, the first is recorded.
        first = set(await asyncio.gather(*(text(server) for _ in range(5))))
        asked = len(upstream.requests)
        assert asked == len(first) and await text(server) in first
        for _ in range(2):  # so large that it is parsed each time
            assert await text(server, "x" * 1_500_000) == str(asked)
        assert len(upstream.requests) == asked + 1 and len(tape_lines(tape)) == 2
    async with taping(tmp_path, behave, "record") as (server, _, _):
        assert await text(server) != (last := await text(server))
    async with taping(tmp_path, behave, "replay") as (server, (upstream,), _):
        assert await text(server) == await text(server) == last
        async with Upstream() as late:
            server.add(late.controller(name="late", models=None))
            assert await text(server) == last
            await asyncio.sleep(0.1)
            assert late.requests == upstream.requests == []  # not even for models
    assert len(tape_lines(tape)) == 4


async def test_lines_that_are_no_recordings_are_skipped_and_logged(tmp_path, tape):
    """One that a crash has torn, one of another version, a conflict's marker."""
    log = Log()
    whole, torn = recorded(chat_body("whole")), recorded(chat_body("torn"))
    later = recorded(chat_body("later")).replace(b'"tape": 1', b'"tape": 2')
    before = whole + later + b"<<<<<<< ours\n"
    tape.write_bytes(before + torn[:-20])
    async with taping(tmp_path, log=log) as (server, (upstream,), _):
        assert "skipped lines that are not recordings: 2, 3, 4" in log.text
        for text in ("whole", "later", "torn", "torn"):
            assert (await chat(server, text)).status == 200
        assert len(upstream.requests) == 2
    assert tape.read_bytes().startswith(before)
    lines = tape.read_bytes().split(b"\n")
    assert lines[3] == torn[:-20] and len(lines) == 7  # the next one begins a line
    async with serving(tmp_path, tape=str(tape)) as server:
        assert (await chat(server, "torn")).status == 200


@cases("content", b'{"users": []}\n', b'{"tape": 2}\n')
def test_a_file_that_is_no_tape_stops_the_start_unchanged(tmp_path, tape, content):
    tape.write_bytes(content)
    bad = "it is not a tape of version 1"
    for file, says in (
        *[(f"{tape}:{mode}", bad) for mode in ("replay", "record", "auto")],
        (f"{tmp_path}/none.jsonl", 'No such file or .*"auto" records one: --tape F'),
        (f"{tmp_path}/none/chat.jsonl:record", "No such file or directory$"),
    ):
        with pytest.raises(ConfigurationError, match=says):
            run(Server(KEY, port=0, tape=file).start())
    assert tape.read_bytes() == content


async def test_two_servers_may_write_one_tape(tmp_path, tape):
    texts = [f"{number} " + "x" * 5000 for number in range(20)]
    async with (
        taping(tmp_path) as (one, (up,), _),
        taping(tmp_path) as (two, (upstream,), _),
    ):
        asked = [chat(server, text) for text in texts for server in (one, two)]
        replies = await asyncio.gather(*asked)
        assert {reply.status for reply in replies} == {200}
        count = len(up.requests) + len(upstream.requests)
        for server in (two, one):  # each knows what the other has written
            for text in texts:
                await chat(server, text)
        assert len(up.requests) + len(upstream.requests) == count
    said = {line["content"]["messages"][0]["content"] for line in tape_lines(tape)}
    assert said == {*texts}


async def test_what_another_server_has_just_written_is_not_missed(tmp_path, constant):
    """Between a look at the file and our own line."""
    append = apiserver.append_to_file
    others = [recorded(chat_body("theirs"), "theirs")]

    def overtaken(path, data):
        if data and others:
            append(path, others.pop())
        return append(path, data)

    async with taping(tmp_path) as (server, (upstream,), _):
        constant(append_to_file=overtaken)
        for text in ("ours", "theirs", "ours"):
            reply = await chat(server, text)
            assert chat_text(reply) == ("theirs" if text == "theirs" else "Hi there")
        assert len(upstream.requests) == 1


async def test_an_edited_tape_is_read_again_and_its_content_wins(tmp_path, tape):
    """Also over its SHA-256; a status that somebody wrote there is the answer."""
    tape.write_bytes(recorded(chat_body("old"), "one"))
    async with serving(tmp_path, tape=str(tape)) as server:
        assert b"one" in (await chat(server, "old")).content
        edited = tape.read_bytes().replace(b'"old"', b'"new"')
        spaced = edited.replace(b"one", b"two").replace(b'","role', b'" ,"role')
        tape.write_bytes(spaced)
        assert b"two" in (await chat(server, "new")).content
        assert (await chat(server, "old")).status == 404
        tape.write_bytes(edited.replace(b'"status": 200', b'"status": 429'))
        for _ in range(4):  # and closes nothing
            reply = await chat(server, "new")
            assert reply.status == 429 and b"one" in reply.content
        for change in (
            (b'[[0.0, "', b'[[0.0, ""'),
            (b'"path": "', b'"path": 5, "x": "'),
        ):
            tape.write_bytes(recorded(chat_body("x")) + recorded(CHAT).replace(*change))
            reply = await chat(server)  # named, or it would be looked for in vain
            message = reply.json()["error"]["message"]
            assert reply.status == 404
            assert message.endswith(" Line 2 is not a recording.")


async def test_fields_that_are_ignored_make_no_difference(tmp_path, tape):
    async def asked(server, user, number):
        body = chat_body(user=user, metadata={"run": number})
        return await ask(server.port, "POST", CHAT_URL, body)

    made = functools.partial(apiserver.TapeController, str(tape))
    async with Upstream() as upstream:
        record = made(mode="auto", ignore=["user", "metadata"])
        up = upstream.controller(models=["m"])
        async with serving(tmp_path, up, record) as server:
            for user in ("a", "b"):
                assert (await asked(server, user, 1)).status == 200
        assert len(upstream.requests) == 1
    for ignore, status in ((["user", "metadata"], 200), (["user"], 404), ([], 404)):
        async with serving(tmp_path, made(ignore=ignore)) as server:
            reply = await asked(server, "a", 2)
            assert reply.status == status
            if status == 404:
                assert "differs in metadata.run." in reply.json()["error"]["message"]


async def test_a_tape_takes_forms_and_binary_answers(tmp_path, tape):
    """A form's boundary is drawn anew each time; speech is no text."""
    speech = [b"\xff\xfb\x90" * 100, b"\xc3", b"\xa9", b"end"]
    path = "/v1/audio/transcriptions"

    def asked(boundary):
        fields = (("model", "m"), ("file", "\x00\r\n--x"))
        head = 'Content-Disposition: form-data; name="%s"'
        parts = [(head % name, value) for name, value in fields]
        kind = f"multipart/form-data; boundary={boundary}"
        return form(*parts, boundary=boundary) + b"\xff", path, [("Content-Type", kind)]

    async def answers(server, boundary):
        content, path, headers = asked(boundary)
        reply = await ask(server.port, "POST", path, content, headers=headers)
        return reply.status, reply.headers["content-type"], reply.content

    made = taping(tmp_path, piecewise(speech, "audio/mpeg"))
    async with made as (server, (upstream,), _):
        first = await answers(server, "one")
        assert first == (200, "audio/mpeg", b"".join(speech))
        assert await answers(server, "two") == first
        assert len(upstream.requests) == 1
    async with serving(tmp_path, tape=str(tape)) as server:
        assert await answers(server, "three") == first
        content, path, headers = asked("four")
        assert await pieces_of(server, content, path, headers) == speech
    (line,) = tape_lines(tape)
    assert b"--boundary\r\n" in base64.b64decode(line["content"])
    assert line["pieces"][-1][1:] == ["end"] and line["pieces"][0][2] == "base64"


@flow(timeout=60)
async def test_100_mb_of_tape_are_opened_in_a_second_and_not_held(tmp_path, tape):
    """Much faster than they are parsed, if they are as we wrote them."""
    pieces = [(number / 50, chunk(" word")) for number in range(50)]
    pieces.append((1.0, chunk(None, "stop") + DONE))
    kind, text = "text/event-stream", "NUMBER " + 'say "x"\n' * 100
    line = apiserver.Recording(CHAT_URL, chat_body(text), 200, kind, pieces).encode()
    count = 100_000_000 // len(line) + 1

    def numbered(number):
        """The line with this number, and the SHA-256 of its content."""
        data = line.replace(b'"NUMBER', b'"%d' % number)
        content = data[data.index(b'"content": ') + 11 : data.index(b', "status": ')]
        digest = apiserver.hashlib.sha256(content).hexdigest().encode()
        return re.sub(rb"[0-9a-f]{64}", digest, data, count=1)

    with open(tape, "wb") as file:
        file.writelines(map(numbered, range(count)))
    assert tape.stat().st_size > 99_000_000

    def loaded():
        began = time.process_time()
        controller = apiserver.TapeController(str(tape))
        controller.load()
        return controller, time.process_time() - began

    best = min(loaded()[1] for _ in range(3))
    began = time.process_time()
    for _ in range(count):
        json.loads(line)
    assert best < min(1.0, 0.7 * (time.process_time() - began))
    with traced() as memory:
        controller, _ = loaded()
        assert memory()[1] < 10_000_000
    assert f"recordings: {count}" in str(controller)
    async with serving(tmp_path, controller) as server:
        last = text.replace("NUMBER", str(count - 1))
        assert (await chat(server, last)).status == 200
        # A miss looks at all of it, and other requests go on meanwhile.
        miss = asyncio.ensure_future(chat(server, "?"))
        slowest = 0.0
        while not miss.done():
            began = time.monotonic()
            assert (await ask(server.port, "GET", "/health")).status == 200
            slowest = max(slowest, time.monotonic() - began)
        assert (await miss).status == 404 and slowest < 1.0


async def test_a_tape_records_functions_and_asks(tmp_path, tape):
    tape.symlink_to("target.jsonl")
    function = FunctionController(lambda request: "HELLO", models=["shout"])
    async with serving(tmp_path, function, tape=f"{tape}:record") as server:
        first = await handler_ask(server.port, model="shout")
        assert first.json()["content"] == "HELLO"
    async with serving(tmp_path, tape=str(tape)) as server:
        reply = await handler_ask(server.port, model="shout")
        assert reply.json()["content"] == "HELLO"
        assert (await ask(server.port, "GET", "/readyz")).status == 200
        line = await controller_line(server, "tape")
        assert line["requests"] == 1 and line["tokens"] > 0 and line["type"] == "tape"


async def test_a_browser_agents_answer_to_an_ask_is_not_recorded(tmp_path, tape):
    """It keeps the conversation, which could not go on after a replay."""
    async with serving(tmp_path, tape=f"{tape}:record") as server:
        async with Agent(server) as agent, beside(agent.echo()):
            assert (await handler_ask(server.port)).json()["content"] == "echo:Hello"
            assert "echo:" in chat_text(await chat(server))
    assert [line["content"] for line in tape_lines(tape)] == [CHAT]


def test_a_tape_in_the_configuration(load, tmp_path):
    def tapes(*args, **kwargs):
        config = load(*args, **kwargs)
        made = [apiserver.make_controller(c, config.limits) for c in config.controllers]
        return [(c.file, c.mode, c.speed, c.ignore) for c in made if c.type == "tape"]

    cwd, none = os.getcwd(), frozenset()
    assert tapes(["1", "k", "--tape", "a:b"]) == [(f"{cwd}/a:b", "replay", 0, none)]
    assert tapes(["1", "k", "-tape=a:auto"]) == [(f"{cwd}/a", "auto", 0, none)]
    # A key in the environment is recorded: the tape is no upstream.
    config = load(["1", "k", "--tape", "a:auto"], {"OPENAI_API_KEY": "sk-x"})
    assert sorted(c["name"] for c in config.controllers) == ["openai-1", "tape"]
    entry = {"type": "tape", "file": "a.jsonl", "mode": "record", "speed": 1}
    entry["ignore"] = ["user"]
    ((file, *rest),) = tapes(["1", "k"], file={"controllers": [entry]})
    assert file.endswith("/a.jsonl") and rest == ["record", 1, frozenset({"user"})]
    for entries, more, place in [
        ([{"type": "tape"}], {}, "controllers[0].file"),
        ([{**entry, "mode": "x"}], {}, "controllers[0].mode"),
        ([{**entry, "weight": 1}], {}, "controllers[0].weight"),
        ([{**entry, "speed": -1}], {}, "controllers[0].speed"),
        ([entry, {**entry, "name": "b"}], {}, "controllers[1]"),
        ([entry], {"tape": "b"}, "controllers[1].name"),
    ]:
        with pytest.raises(ConfigurationError, match=re.escape(place)):
            load(["1", "k"], file={"controllers": entries, **more})
    with pytest.raises(ValueError, match="mode must be one of"):
        apiserver.TapeController("a", mode="x")


def test_only_what_a_tape_has_is_listed_while_it_replays(tmp_path, tape):
    quoted = {**CHAT, "model": 'a "b"', "tools": [{"name": '"model":"x"'}]}
    edited = recorded({**CHAT, "model": "first"}).replace(b'"first"', b'"edited"')
    tape.write_bytes(recorded(CHAT) + recorded(quoted) + edited)
    with Program("0", KEY, "--tape", "chat.jsonl", cwd=tmp_path) as program:
        line = program.wait_for("^  Tape +(.*)")[1]
        assert line == f"{tape} (replay only; recordings: 3)"
        assert fetch(program.port, "POST", CHAT_URL, CHAT).json() == completion()
        models = fetch(program.port, "GET", "/v1/models").json()["data"]
        assert {model["id"] for model in models} == {"m", 'a "b"', "edited"}
        program.wait_for("SHA-256")  # the last line of the start screen
        assert not any("mock/echo" in line for line in program.lines)
    tape.write_bytes(b"no tape")
    done = run_python(str(MODULE), "0", KEY, "--tape", "chat.jsonl:auto", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


# -----------------------------------------------------------------------------
# Metrics
# -----------------------------------------------------------------------------


async def status_of(server):
    """GET /admin/status, and its requests by their ids."""
    server._status = (-math.inf, b"", "")  # made anew
    reply = await ask(server.port, "GET", "/admin/status")
    assert reply.status == 200
    status = reply.json()
    return status, {request["request_id"]: request for request in status["requests"]}


@flow(behave=[error_reply(500, "you said: PROMPT", code="overloaded"), None])
async def test_status_shows_what_happened_to_a_request_but_no_prompt(server, upstreams):
    """Of two controllers the first one fails: both attempts are there."""
    headers = [("x-request-id", "mine"), ("User-Agent", "a client")]
    body = chat_body("PROMPT")
    await ask(server.port, "POST", CHAT_URL, body, headers=headers)
    status, requests = await status_of(server)
    assert "PROMPT" not in json.dumps(status)
    request = requests["mine"]
    tries = [(a["controller"], bool(a["reason"])) for a in request["attempts"]]
    assert tries == [("up0", True), ("up1", False)]
    assert (request["controller"], request["status"]) == ("up1", 200)
    assert (request["input"], request["output"]) == (3, 4)
    assert 0 <= request["first_byte"] <= request["duration"] < 5
    assert (request["user"], request["client"]) == ("admin", "a client")
    assert not request["failed"]
    assert {c["name"] for c in status["controllers"]} >= {"up0", "up1"}


async def test_status_shows_why_requests_failed(server):
    """Those of the ask API, too, but no other routes."""
    server.add(pool_function("a", models=["a"]))
    for model, key in (("b", KEY), ("a", "wrong")):
        body, headers = chat_body(model=model), [("x-request-id", model)]
        await ask(server.port, "POST", CHAT_URL, body, key, headers)
    await handler_ask(server.port, "PROMPT", model="a")
    await ask(server.port, "GET", "/v1/models")
    status, requests = await status_of(server)
    assert "PROMPT" not in json.dumps(status)
    paths = sorted(request["path"] for request in requests.values())
    assert paths == ["/api/ask", CHAT_URL, CHAT_URL]
    assert requests["b"]["failed"] and requests["b"]["status"] == 404
    assert requests["b"]["code"] == "model_not_found"
    assert "'b' does not exist" in requests["b"]["error"]
    assert (requests["a"]["status"], requests["a"]["user"]) == (401, "")


@cases("stream", False, True)
@cases("code", "context_length_exceeded", "you wrote: a secret")
async def test_status_quotes_no_word_of_a_refusal(server, upstream, code, stream):
    upstream.behave = error_reply(
        400, "you wrote: a secret", type="a secret", code=code
    )
    headers = [("x-request-id", "mine")]
    for path, body in (
        (CHAT_URL, {**CHAT, "stream": stream}),
        ("/api/ask", {"content": "x", "model": "m"}),
    ):
        reply = await ask(server.port, "POST", path, body, headers=headers)
        assert reply.status == 400 and b"a secret" in reply.content
        status, requests = await status_of(server)
        assert "a secret" not in json.dumps(status)
        mine = requests["mine"]
        assert (mine["status"], mine["failed"]) == (400, True)
        if path == CHAT_URL:
            assert mine["code"] == (code if "_" in code else "")


@flow(
    behave=by_words(
        {"break": streams(chunk("Hel"), connection_drop)}, streams(chunk("Hel"), 60)
    )
)
async def test_status_shows_streams_that_broke_off_and_clients_that_left(server):
    headers = [("x-request-id", "broken")]
    body = chat_body("break", stream=True)
    await ask(server.port, "POST", CHAT_URL, body, headers=headers)
    async with posting(server, headers=[("x-request-id", "left")]) as client:
        await client.read_head()
    await until(lambda: not server.running_requests)
    _, requests = await status_of(server)
    broken, left = requests["broken"], requests["left"]
    assert (broken["status"], broken["failed"]) == (200, True)
    assert broken["error"] and broken["code"] == "upstream_error"
    assert (left["status"], left["failed"]) == (499, False)


async def test_status_is_one_snapshot_a_second_with_an_etag(server):
    first = await ask(server.port, "GET", "/admin/status")
    await chat(server, model="mock/echo")
    second = await ask(server.port, "GET", "/admin/status")
    assert second.content == first.content
    async with Client(server.port) as client:
        for etag in (first.headers["etag"], f'"x", W/{first.headers["etag"]}'):
            known = [("If-None-Match", etag)]
            reply = await client.request("GET", "/admin/status", headers=known)
            assert (reply.status, reply.content) == (304, b"")


@cases("stream", False, True)
async def test_cancelling_a_request_frees_its_upstream(server, upstream, stream):
    upstream.behave = sends(*[STREAM_HEAD, chunked(chunk("Hel"))] * stream, 60)
    body, headers = {**CHAT, "stream": stream}, [("x-request-id", "mine")]
    async with posting(server, body, headers=headers) as client:
        await until(lambda: chats(upstream))
        if stream:
            assert b"Hel" in await client.first_chunk()
        _, requests = await status_of(server)
        assert requests["mine"]["status"] is None
        assert requests["mine"]["attempts"][0]["reason"] == ""
        path, body = "/admin/requests/cancel", {"request_id": "mine"}
        reply = await ask(server.port, "POST", path, body)
        assert reply.json() == {"message": "Request cancelled"}
        if stream:
            assert b'"code": "cancelled"' in await client.read_chunk()
        else:
            reply = await client.read_reply()
            assert reply.status == 503
            assert reply.headers["x-should-retry"] == "false"
        await until(lambda: upstream.ended)
        _, requests = await status_of(server)
        assert requests["mine"]["code"] == "cancelled"
        assert (await ask(server.port, "POST", path, body)).status == 404


async def test_a_request_that_is_cancelled_too_late_is_no_failure(server, upstream):
    upstream.behave = sends(STREAM_HEAD, chunked(chunk("Hi", "stop") + DONE), 60)
    async with posting(server, headers=[("x-request-id", "mine")]) as client:
        assert (await client.read_reply()).events()[-1] == "[DONE]"
        path, body = "/admin/requests/cancel", {"request_id": "mine"}
        assert (await ask(server.port, "POST", path, body)).status == 200
        await until(lambda: not server.running_requests)
    (record,) = server.journal.requests()
    assert (record.status, record.failed, record.error) == (200, False, ("", ""))


@flow(limits=Limits(request_timeout=0.8))
async def test_a_time_limit_still_holds_after_a_cancelled_request(server, client, gate):
    request = request_bytes("POST", CHAT_URL, CHAT, headers=[("x-request-id", "mine")])
    for count, status in ((1, 503), (2, 504)):
        client.send(request)
        await until(lambda n=count: len(gate.asked) == n)
        if status == 503:
            path, body = "/admin/requests/cancel", {"request_id": "mine"}
            assert (await ask(server.port, "POST", path, body)).status == 200
        assert (await client.read_reply()).status == status


@flow(limits=Limits(request_timeout=0.3))
async def test_a_time_limit_still_holds_after_a_function_swallows_one(server, client):
    asked = []

    @server.model("m")
    async def answer(request):
        asked.append(request)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if len(asked) > 1:
                raise
            return "what there is so far"

    for status in (200, 504):
        client.send(request_bytes("POST", CHAT_URL, CHAT))
        assert (await client.read_reply()).status == status


def journal_record(ended, user="ada", status=200):
    usage = apiserver.Usage(2, 0, 3)
    failed = status >= 400
    error = ("code", "words") if failed else ("", "")
    how = ("POST", CHAT_URL, "m", status, error, failed, [], 0.0, usage, "", "")
    return apiserver.RequestRecord(f"id-{ended}", 0, ended, ended, user, *how)


def test_requests_without_a_user_push_no_others_out_of_the_journal():
    journal = apiserver.Journal()
    for number in range(1, 301):
        journal.add(journal_record(number))
    for number in range(301, 1001):
        journal.add(journal_record(number, user=""))
    kept = [record.started for record in journal.requests()]
    assert kept[:2] == [1000, 999] and len(kept) == 220
    assert kept[-200:] == [*range(300, 100, -1)]


def test_activity_is_counted_in_slots_and_forgotten_after_ten_minutes():
    journal = apiserver.Journal()
    journal.add(journal_record(1001.0))
    journal.add(journal_record(1009.9, status=500))
    journal.add(journal_record(1015.0))
    activity = journal.activity(1025.0)
    assert activity["requests"][-2:] == [2, 1] and sum(activity["requests"]) == 3
    assert activity["failures"][-2:] == [1, 0] and activity["tokens"][-2:] == [10, 5]
    assert journal.activity(1012.0)["requests"][-1] == 2
    assert sum(journal.activity(1700.0)["requests"]) == 0


def test_ever_new_names_of_agents_fill_no_memory():
    metrics = apiserver.Metrics()
    for number in range(1000):
        tries = [(f"agent-{number}", 1.0, "")]
        record = journal_record(3.0)._replace(started=1.0, attempts=tries)
        metrics.observe(record, CHAT_URL, f"model-{number}")
    text, prefix = metrics.text([]), "chatgpt_apiserver_"
    for name in ("attempts_total", "requests_total", "queue_wait_seconds_count"):
        assert text.count(f"{prefix}{name}{{") == metrics.MAX_NAMES + 1
    assert prefix + 'attempts_total{controller="other",result="ok"} 800' in text


# -----------------------------------------------------------------------------
# The page
# -----------------------------------------------------------------------------
#
# In a real browser, driven over its DevTools websocket with our own WebSocket.

HTML = [("Accept", "text/html,application/xhtml+xml")]


async def test_a_browser_gets_the_page_and_others_a_text(tmp_path):
    async with serving(tmp_path) as server:
        page = await ask(server.port, "GET", "/", key=None, headers=HTML)
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.headers["vary"] == "Accept"
        assert page.content.startswith(b"<!DOCTYPE html>")
        text = await ask(server.port, "GET", "/", key=None)
        assert text.headers["content-type"].startswith("text/plain")
        head = await ask(server.port, "HEAD", "/", key=None, headers=HTML)
        assert head.headers["content-length"] == str(len(page.content))
    async with serving(tmp_path, page=False) as server:
        text = await ask(server.port, "GET", "/", key=None, headers=HTML)
        assert text.headers["content-type"].startswith("text/plain")


def test_the_page_loads_nothing_from_elsewhere_and_writes_no_markup():
    page = apiserver.PAGE
    namespace = "http://www.w3.org/2000/svg"
    assert set(re.findall(r"https?://[^\"'`\s]*", page)) <= {namespace}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write", page)
    assert not re.search(r"\b(src|style|on[a-z]+)\s*=\s*[\"']", page)
    assert not re.search(r"navigator\.clipboard|crypto\.subtle|document\.cookie", page)
    assert len(page.splitlines()) <= 700


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """The port of a browser's DevTools."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no chromium is installed")
    folder = tmp_path_factory.mktemp("browser")
    # The last one: plain http from another machine, where browsers offer less.
    options = """--headless --no-sandbox --disable-gpu --disable-dev-shm-usage
        --no-first-run --disable-background-networking --remote-debugging-port=0"""
    options = [*options.split(), f"--user-data-dir={folder}"]
    options.append("--host-resolver-rules=MAP elsewhere.test 127.0.0.1")
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [path, *options, "about:blank"], stderr=log, start_new_session=True
        )
    port_file = folder / "DevToolsActivePort"
    try:
        end = time.monotonic() + 30
        while not port_file.exists():
            if process.poll() is not None or time.monotonic() > end:
                pytest.skip(f"{path} does not start: {(folder / 'log').read_text()}")
            time.sleep(0.05)
        yield int(port_file.read_text().split()[0])
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Tab:
    """A page in a browser: `async with Tab(browser, url) as tab`.

    It signs in if there is a key, and must cause no error.
    """

    def __init__(self, browser, url, width=1280, key=KEY):
        self.browser, self.url, self.width, self.key = browser, url, width, key

    async def __aenter__(self):
        reply = await ask(self.browser, "PUT", "/json/new?about:blank", key=None)
        self.id = reply.json()["id"]
        self.websocket = await WebSocket.connect(
            f"ws://127.0.0.1:{self.browser}/devtools/page/{self.id}"
        )
        self.errors = []  # and breaches of the page's policy
        self.calls = 0
        await self.do("Runtime.enable")
        await self.do("Log.enable")
        size = {"width": self.width, "height": 900, "deviceScaleFactor": 1}
        await self.do("Emulation.setDeviceMetricsOverride", mobile=False, **size)
        await self.do("Page.navigate", url=self.url)
        await self.until("document.readyState === 'complete' && location.port")
        if self.key:
            await self.sign_in(self.key)
        return self

    async def __aexit__(self, *exc_info):
        await ask(self.browser, "GET", f"/json/close/{self.id}", key=None)
        self.websocket.connection.abort()
        assert exc_info[0] or not self.errors, self.errors

    async def do(self, method, **params):
        self.calls += 1
        call = {"id": self.calls, "method": method, "params": params}
        self.websocket.write(json.dumps(call))
        while True:
            message = json.loads(await self.websocket.receive())
            if message.get("id") == self.calls:
                return message["result"]
            params, kind = message.get("params", {}), message["method"]
            entry = params.get("entry", {})
            logged = entry.get("level") == "error" and entry["source"] != "network"
            dialog = "Page.javascriptDialogOpening"
            if logged or kind in ("Runtime.exceptionThrown", dialog):
                self.errors.append(params)

    async def js(self, code):
        """The value of an expression in the page."""
        done = await self.do(
            "Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in done, (code, done)
        return done["result"].get("value")

    async def until(self, code, timeout=20.0):
        end = time.monotonic() + timeout
        while not await self.js(f"Boolean({code})"):
            assert time.monotonic() < end, await self.js("document.body.innerText")
            await asyncio.sleep(0.03)

    async def sees(self, text):
        await self.until(f"document.body.innerText.includes({json.dumps(text)})")

    async def fill(self, selector, text):
        field = f"document.querySelector({selector!r})"
        await self.js(f"{field}.value = {json.dumps(text)}")

    async def click(self, selector):
        await self.until(f"document.querySelector({selector!r})")
        await self.js(f"document.querySelector({selector!r}).click()")

    async def sign_in(self, key=KEY):
        await self.until("!document.querySelector('#door').hidden")
        await self.fill("#door input", key)
        await self.click("#door button")


@flow(timeout=60)
async def test_page_signs_in_and_out_and_says_when_a_key_is_wrong(server, browser):
    async with Tab(browser, server.url, key=None) as tab:
        await tab.sign_in("wrong")
        await tab.sees("Invalid")
        await tab.sign_in()
        await tab.sees("nothing is connected")
        assert await tab.js("sessionStorage.getItem('key')") == KEY
        await tab.click("#leave")
        await tab.sees("Signed out.")
        assert await tab.js("sessionStorage.getItem('key')") is None


@flow(timeout=60)
async def test_page_shows_a_user_only_what_a_token_may_see(server, browser):
    token = await add_user(server)
    async with Tab(browser, server.url, key=token) as tab:
        await tab.sees("Try it")
        text = await tab.js("document.body.innerText")
        assert "Overview" not in text and "Users" not in text


@flow(timeout=60, behave=http_reply({}, 429, headers=[("Retry-After", "20")]))
async def test_page_shows_a_controller_that_fails_and_cools(server, browser):
    async with Tab(browser, server.url) as tab:
        await tab.sees("working")
        assert (await chat(server)).status == 500
        await tab.sees("0 of 1 controllers available")
        await tab.sees("cooling, back in 1")
        await tab.click("#calls .story")
        await tab.sees("sent to up0, which failed: ")
        await tab.click("#controllers .turn")  # Enable
        await tab.sees("working")


@flow(timeout=60)
async def test_page_cancels_a_running_request(server, client, browser):
    async with Tab(browser, server.url) as tab:
        body = chat_body(model="mock/slow?seconds=60")
        client.send(request_bytes("POST", CHAT_URL, body))
        await tab.sees("running, ")
        await tab.click("#calls .cancel:not([hidden])")
        await tab.sees("503 cancelled")
        assert (await client.read_reply()).status == 503


@flow(timeout=60)
async def test_page_adds_a_user_whose_token_works_and_deletes_it(server, browser):
    url = f"http://elsewhere.test:{server.port}/#users"
    async with Tab(browser, url) as tab:
        assert await tab.js("isSecureContext") is False
        await tab.click("#add_user")
        await tab.fill("#account [name=name]", "ada")
        await tab.fill("#account [name=limit]", "4 requests/day")
        await tab.click("#account .main")
        await tab.sees("A token for ada")
        token = await tab.js("document.querySelector('#result pre').textContent")
        assert (await chat(server, key=token, model="mock/echo")).status == 200
        await tab.click("#result button")
        await tab.sees("0 of 4 requests/day")
        await tab.click('a[href="#usage"]')
        await tab.sees("mock/echo")
        await tab.click('a[href="#users"]')
        await tab.sees("1 of 4 requests/day")
        await tab.js("window.confirm = () => true")
        await tab.click("#people .delete")
        await tab.until("!document.querySelector('#people tbody')")
        assert (await ask(server.port, "GET", "/v1/models", key=token)).status == 401


@flow(timeout=60, behave=streams(*[chunk("word "), 0.02] * 3000))
async def test_page_streams_a_chat_and_stops_it(server, upstream, browser):
    async with Tab(browser, f"{server.url}/#try") as tab:
        await tab.sees("System prompt")
        await tab.fill("[name=model]", "m")
        await tab.fill("#ask textarea", "<script>Hello</script>")
        await tab.js("document.querySelector('#ask textarea').focus()")
        key = {"key": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        await tab.do("Input.dispatchKeyEvent", type="keyDown", **key)
        await tab.sees("word word word")
        await tab.sees("per second")
        await tab.click("#ask button")
        await tab.sees("stopped; first token after")
        await until(lambda: upstream.ended)
        await tab.sees("<script>Hello</script>")
        body = chats(upstream)[0].json()
        assert body["messages"][0]["content"] == "<script>Hello</script>"


@flow(timeout=60)
async def test_page_says_how_a_machine_joins_and_when_it_has(tmp_path, browser):
    if shutil.which("curl") is None:
        pytest.skip("no curl is installed")
    models = http_reply({"data": [{"id": "llama"}]})
    async with serving(tmp_path) as server, Upstream(models) as upstream:
        async with Tab(browser, server.url) as tab:
            await tab.click("#add_machine")
            await tab.fill("#account [name=name]", "box")
            await tab.click("#account .main")
            await tab.sees("waiting for box")
            line = await tab.js("document.querySelector('#result pre').textContent")
            line = line.replace("python3", sys.executable)
            line += f" --upstream {upstream.url}"
            process = await asyncio.create_subprocess_shell(
                f"exec 2>&1; {line}", cwd=tmp_path, start_new_session=True
            )
            try:
                await tab.sees("box has joined")
            finally:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()


@flow(timeout=60)
async def test_page_says_when_the_server_is_silent(server, browser):
    async with Tab(browser, server.url) as tab:
        await tab.sees("nothing is connected")
        await server.shutdown()
        await tab.until("document.body.className === 'stale'")
        await tab.sees("no answer for ")


@cases("width", 1280, 390)
@flow(timeout=60)
async def test_page_takes_any_name_as_text_and_keeps_its_width(server, browser, width):
    name = "<script>alert(1)</script><img src=x onerror=alert(1)>" + "w" * 150
    server.add(pool_function(name, models=[name]))
    headers = [("User-Agent", name), ("x-request-id", name[:120])]
    for model in (name, "<b>" + name):
        body = chat_body(model=model)
        await ask(server.port, "POST", CHAT_URL, body, headers=headers)
    async with Tab(browser, server.url, width) as tab:
        await tab.sees("404 model_not_found")
        await tab.js("document.querySelectorAll('.story').forEach(b => b.click())")
        await tab.sees(name)
        wide = "document.documentElement.scrollWidth"
        assert await tab.js(wide) <= await tab.js("innerWidth")
        assert await tab.js("document.images.length") == 0


@flow(timeout=60)
async def test_page_works_below_a_proxys_path(server, browser):
    """As behind nginx with `location /llm/ { proxy_pass http://server/; }`."""

    async def forward(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        path = head.split()[1].decode()
        there, back = await asyncio.open_connection("127.0.0.1", server.port)
        head = head.replace(b" /llm/", b" /", 1)
        head = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head)
        if path.startswith("/llm/"):
            back.write(head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
            while data := await there.read(65536):
                writer.write(data)
        writer.close()
        back.close()

    proxy = await asyncio.start_server(forward, "127.0.0.1", 0)
    port = proxy.sockets[0].getsockname()[1]
    async with Tab(browser, f"http://127.0.0.1:{port}/llm/") as tab:
        await tab.sees("nothing is connected")
        await tab.js("location.hash = '#try'")
        await tab.until(f"curl.textContent.includes(':{port}/llm/v1/chat')")
    proxy.close()


# -----------------------------------------------------------------------------
# Request handler
# -----------------------------------------------------------------------------

UUID_FORM = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


async def handler_agents(server, count):
    await until(lambda: len(server.agents) == count)


# --- HTTP


async def test_requests_on_one_connection_are_answered_in_order(client):
    named = request_bytes("GET", "/status", headers=[("x-request-id", "b")])
    keyless = request_bytes("POST", "/api/ask", {"content": "x"}, key="")
    health = request_bytes("GET", "/health")
    client.send(health + named + keyless + request_bytes("HEAD", "/health") + health)
    assert (await client.read_reply()).content == b"OK"
    second = await client.read_reply()
    assert second.json() == {"status": "ok"}
    assert second.headers["x-request-id"] == "b"
    third = await client.read_reply()
    assert third.status == 401
    assert third.json() == {"error": "API key not provided"}
    head = await client.read_reply("HEAD")
    assert head.status == 200 and head.headers["content-length"] == "2"
    assert (await client.read_reply()).content == b"OK"


async def slow_socket(port, data, window=4096):
    """A socket with a small window that has sent data."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, ("127.0.0.1", port))
    await loop.sock_sendall(sock, data)
    return sock


async def test_a_client_that_pipelines_unread_gets_one_answer_buffered(server):
    data = request_bytes("GET", "/agent.py", key="") * 200
    with await slow_socket(server.port, data):
        await until(lambda: server._handlers)
        (connection,) = server._handlers
        await until(lambda: connection.unsent)
        await asyncio.sleep(0.2)  # for the others, which must not come
        assert connection.unsent < 200_000  # nor all of it: anybody may ask


@flow(limits=Limits(total_content_size=3_000_000))
async def test_an_answer_that_is_not_read_counts_as_its_users_content(server):
    key, words = await add_user(server), {"content": "x" * 1_000_000}
    body = {"model": "mock/echo", "messages": [{"role": "user", **words}]}
    async with posting(server, body, key=key) as slow:
        slow.writer.transport.pause_reading()
        await until(lambda: server.content_size and not server.requests_in_flight)
        assert (await ask(server.port, "POST", CHAT_URL, body, key)).status == 503
        assert (await ask(server.port, "POST", CHAT_URL, body)).status == 200
        slow.writer.transport.resume_reading()
        assert (await slow.read_reply()).status == 200
    await until(lambda: not server.content_size)
    assert (await ask(server.port, "POST", CHAT_URL, body, key)).status == 200


@flow(limits=Limits(total_content_size=5_000_000))
async def test_answers_that_one_user_does_not_read_shut_out_no_other(server):
    key, words = await add_user(server), {"content": "x" * 1_000_000}
    server.model("m")(lambda request: 2 * words["content"])
    async with contextlib.AsyncExitStack() as slow:
        for _ in range(4):
            client = posting(server, {**STREAM, "stream": False}, key=key)
            client = await slow.enter_async_context(client)
            client.writer.transport.pause_reading()
        await until(lambda: server.content_size and not server.requests_in_flight)
        await until(lambda: server.content_size < 4_100_000)  # two are kept
        body = {"model": "mock/echo", "messages": [{"role": "user", **words}]}
        reply = await ask(server.port, "POST", CHAT_URL, body, await add_user(server))
        assert reply.status == 200


@cases(
    "line, kept",
    ("HTTP/1.1\r\nHost: x", True),
    ("HTTP/1.1\r\nHost: x\r\nConnection: close", False),
    ("HTTP/1.0", False),
    ("HTTP/1.0\r\nConnection: keep-alive", True),
)
async def test_the_client_decides_whether_its_connection_is_kept(client, line, kept):
    request = f"GET /health {line}\r\n\r\n".encode()
    client.send(request)
    reply = await client.read_reply()
    field = reply.headers.get("connection", "")
    assert field == ("close" if not kept else "" if "1.1" in line else field)
    if kept:
        client.send(request)
        assert (await client.read_reply()).content == b"OK"
    else:
        assert await client.reader.read() == b""


async def test_public_routes(server):
    health = await ask(server.port, "GET", "/health", key="")
    assert health.content == b"OK" and "text/plain" in str(health.headers)
    status = await ask(server.port, "GET", "/status", key="wrong")
    assert status.json() == {"status": "ok"}
    about = await ask(server.port, "GET", "/", key="")
    assert b"http://localhost/v1" in about.content
    assert b"/client/register" in about.content
    source = await ask(server.port, "GET", "/agent.py", key="")
    assert source.content == MODULE.read_bytes()
    absolute = f"http://localhost:{server.port}/status"
    request = f"GET {absolute} HTTP/1.1\r\nHost: localhost:{server.port}"
    answer = await raw(server.port, f"{request}\r\nConnection: close\r\n\r\n".encode())
    assert answer.endswith(b'{"status": "ok"}')


@cases(
    "method, path, status, allow",
    ("GET", "/nothing", 404, None),
    ("POST", "/", 405, "GET, HEAD, OPTIONS"),
    ("PUT", "/admin/users/add", 405, "POST, OPTIONS"),
    ("GET", "/v1/chat/completions", 405, "POST, OPTIONS"),
    ("GET", "/chat/completions", 405, "POST, OPTIONS"),
    ("POST", "/v1/models/x", 405, "GET, HEAD, OPTIONS"),
    ("GET", "/v1/responses", 404, None),
    ("DELETE", "/v1/files/x", 404, None),
    ("GET", "/v1", 404, None),
)
async def test_unknown_paths_and_methods(server, method, path, status, allow):
    reply = await ask(server.port, method, path)
    assert reply.status == status
    assert reply.headers.get("allow") == allow
    error = reply.json()["error"]
    if path.startswith(("/v1", "/chat")):
        assert list(error) == ["message", "type", "param", "code"]
    else:
        assert isinstance(error, str)


@cases("path", "/v1/chat/completions", "/api/ask", "/nothing")
async def test_a_preflight_is_answered_before_authentication(server, path):
    wanted = [("Access-Control-Request-Headers", "authorization, x-odd")]
    origin = [("Origin", "https://example.org"), *wanted]
    reply = await ask(server.port, "OPTIONS", path, key="", headers=origin)
    assert reply.status == 204 and "content-length" not in reply.headers
    assert reply.headers["access-control-allow-origin"] == "*"
    assert reply.headers["access-control-allow-headers"] == "authorization, x-odd"
    assert "access-control-allow-credentials" not in reply.headers


async def test_other_web_pages_may_not_read_administration(server):
    for path in ("/admin/users", "/admin/controllers", "/api/connections"):
        for method in ("OPTIONS", "GET"):
            reply = await ask(server.port, method, path)
            assert reply.status in (200, 204)
            names = [n for n in reply.headers if n.startswith("access-control")]
            assert names == []
    reply = await ask(server.port, "POST", CHAT_URL, key="")
    assert reply.status == 401
    assert reply.headers["access-control-allow-origin"] == "*"


@flow(limits=Limits(ask_content_size=100))
async def test_content_is_asked_for_only_after_key_and_length(server, constant):
    """Expect: 100-continue."""
    expect = [("Expect", "100-continue")]
    constant(LINGER_TIMEOUT=0.05)

    async def first_line(key, length, expect=expect):
        headers = [*expect, ("Content-Length", str(length))]
        async with Client(server.port) as client:
            client.send(request_bytes("POST", "/api/ask", None, key, headers))
            return await client.read_head()

    assert (await first_line(KEY, 100))[0] == 100
    status, headers = await first_line("wrong", 100)
    assert (status, headers["connection"]) == (401, "close")
    assert (await first_line(KEY, 101))[0] == 413
    assert (await first_line(KEY, 10, [("Expect", "tea")]))[0] == 417


async def test_a_refusal_says_whether_the_connection_goes_on(server, constant):
    """Content that has not arrived costs the connection."""
    constant(LINGER_TIMEOUT=0.05)
    async with Client(server.port) as client:
        reply = await client.request("POST", "/nothing", b"x" * 100)
        assert "connection" not in reply.headers
        assert (await client.request("GET", "/health")).status == 200
    headers = [("Content-Length", "100")]
    async with Client(server.port) as client:
        client.send(request_bytes("POST", "/nothing", headers=headers))
        reply = await client.read_reply()
        assert reply.status == 404 and reply.headers["connection"] == "close"
        assert await client.reader.read() == b""


async def test_http_to_an_https_port_is_logged(tmp_path, certificate):
    log = Log()
    async with serving(tmp_path, **certificate[0], log=log) as server:
        await raw(server.port, request_bytes("GET", "/health"))
        await until(lambda: "sent http to an https port; use https://" in log.text)


async def test_what_is_no_request_is_answered_at_once_and_logged(server, log):
    hello = b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03"
    answer = await raw(server.port, hello, timeout=2)
    assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"https was sent to an http port; use http://" in answer
    assert b"\r\nx-request-id: " in answer
    for data, status in ((b"GET /\r\n", b"400"), (b"A" * 10_000, b"414")):
        answer = await raw(server.port, data, timeout=2)
        assert answer.startswith(b"HTTP/1.1 " + status)
    line = "127.0.0.1 sent no valid request: https was sent to an http port"
    await until(lambda: line in log.text)


@flow(limits=Limits(head_timeout=0.2))
async def test_a_slow_head_is_answered_408(server, constant):
    """A byte now and then does not extend the deadline."""
    constant(LINGER_TIMEOUT=0.05)
    began = time.monotonic()
    assert await raw(server.port, b"") == b""  # silent: nothing to answer
    async with Client(server.port) as client:
        client.send(request_bytes("GET", "/health"))
        await client.read_reply()

        async def trickle():
            for byte in b"GET /health HTTP/1.1\r\nX-Long: " + b"x" * 1000:
                client.send(bytes([byte]))
                await asyncio.sleep(0.02)

        async with beside(trickle()):
            reply = await client.read_reply()
    assert reply.status == 408 and reply.headers["connection"] == "close"
    assert reply.headers["x-request-id"]
    assert 0.35 < time.monotonic() - began < 3


@flow(limits=Limits(keep_alive_timeout=0.1, keep_alive_requests=3))
async def test_an_idle_connection_is_closed_without_a_word(server):
    """And the last response of so many says that it is the last."""
    async with Client(server.port) as client:
        await client.request("GET", "/health")
        assert await client.reader.read() == b""
    async with Client(server.port) as client:
        for last in (False, False, True):
            reply = await client.request("GET", "/health")
            assert ("connection" in reply.headers) is last
        assert await client.reader.read() == b""


@cases("chunked_body", False, True)
@cases(
    "path, limit",
    ("/v1/chat/completions", "content_size"),
    ("/v1/embeddings", "content_size"),
    ("/api/ask", "ask_content_size"),
    ("/admin/users/add", "admin_content_size"),
)
async def test_content_size_has_a_limit(tmp_path, path, limit, chunked_body, constant):
    """Content of that size is read, a byte more is 413."""
    constant(LINGER_TIMEOUT=0.05)
    async with serving(tmp_path, limits=Limits(**{limit: 1000})) as server:
        for size, status in ((999, 400), (1000, 400), (1001, 413)):
            body, headers = b"x" * size, []
            if chunked_body:
                body = chunked(body[:500]) + chunked(body[500:]) + b"0\r\n\r\n"
                headers = [("Transfer-Encoding", "chunked")]
            reply = await ask(server.port, "POST", path, body, headers=headers)
            assert reply.status == status
            if path.startswith("/v1"):
                assert reply.json()["error"]["type"] == "invalid_request_error"


@flow(limits=Limits(total_content_size=1000))
async def test_all_content_in_memory_has_a_limit(server, constant):
    constant(LINGER_TIMEOUT=0.05)
    async with Client(server.port) as other:
        head = request_bytes("POST", "/api/ask", headers=[("Content-Length", "900")])
        other.send(head + b"x" * 899)  # and the last one never
        await until(lambda: server.content_size == 899)
        small = await ask(server.port, "POST", "/api/ask", b"x" * 101)
        assert small.status == 400
        large = await ask(server.port, "POST", "/api/ask", b"x" * 102)
        assert large.status == 503 and large.headers["retry-after"] == "1"
    await until(lambda: server.content_size == 0)


@flow(limits=Limits(total_content_size=1000))
async def test_one_users_uploads_leave_room_for_the_others(server, constant):
    constant(LINGER_TIMEOUT=0.05)
    users = [await server.users.add(name=name) for name in ("ada", "bob")]
    ada, bob = [user.token for user in users]

    async def status(token, size):
        content = b"x" * size
        return (await ask(server.port, "POST", "/api/ask", content, token)).status

    async with Client(server.port) as client:
        client.send(request_bytes("POST", "/api/ask", b"x" * 500, ada)[:-100])
        await until(lambda: server.content_size == 400)
        await server.users.update(users[0].user_id, {"max_concurrency": 9})
        assert await status(ada, 101) == 503
        assert await status(ada, 100) == 400  # no JSON
        assert await status(bob, 501) == 503
        assert await status(bob, 500) == 400
        assert await status(KEY, 600) == 400


@flow(limits=Limits(total_content_size=300))
async def test_content_that_is_only_announced_takes_no_room(server):
    async with Client(server.port) as idle:
        idle.send(request_bytes("POST", "/api/ask", b"x" * 290)[:-290])
        await until(lambda: any(h.exchange for h in server._handlers.values()))
        body = {"content": "Hello", "model": "mock/echo"}
        assert (await ask(server.port, "POST", "/api/ask", body)).status == 200
        idle.send(b"x" * 290)
        assert (await idle.read_reply()).status == 400  # no JSON
        body["content"] = "x" * 300
        assert (await ask(server.port, "POST", "/api/ask", body)).status == 503


@cases(
    "trickles, limit",
    (False, {"content_read_timeout": 0.3}),
    (True, {"content_rate": 10_000}),
    (True, {"content_rate": 0, "request_timeout": 0.3}),
    ids=["silence", "too slow", "too late"],
)
@cases("coded", False, True)
async def test_slow_content_is_answered_408(tmp_path, coded, trickles, limit, constant):
    constant(LINGER_TIMEOUT=0.05, CONTENT_RATE_AFTER=0.2)
    length = ("Transfer-Encoding", "chunked")
    length = length if coded else ("Content-Length", "100000")

    async def trickle():
        while trickles:
            client.send(chunked(b"x") if coded else b"x")
            await asyncio.sleep(0.02)

    async with serving(tmp_path, limits=Limits(**limit)) as server:
        async with posting(server, None, "/api/ask", headers=[length]) as client:
            async with beside(trickle()):
                reply = await asyncio.wait_for(client.read_reply(), 5)
            assert reply.status == 408 and reply.headers["connection"] == "close"
            assert not server.content_size


async def test_a_refusal_can_be_read_by_a_client_that_still_sends(server):
    """No RST overtakes the answer."""
    async with posting(server, b"x" * 250_000, "/admin/users/add") as client:
        await asyncio.sleep(0.1)
        assert (await client.read_reply()).status == 413
        assert await client.reader.read() == b""


@flow(behave=http_reply(completion("x" * 12_000_000)))
async def test_a_slow_client_gets_the_whole_answer_before_the_end(server, constant):
    constant(LINGER_TIMEOUT=0.05)
    data = request_bytes("POST", CHAT_URL, CHAT, headers=[("Connection", "close")])
    loop, size = asyncio.get_running_loop(), 0
    with await slow_socket(server.port, data) as sock:
        await until(lambda: server.pool.controllers[-1].tokens)
        await asyncio.sleep(0.3)  # longer than LINGER_TIMEOUT
        while piece := await loop.sock_recv(sock, 1 << 20):
            size += len(piece)
    assert size > 12_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="measures Linux's buffers")
@cases("end", "close", "shutdown", "shutdown after the reply")
async def test_what_the_kernel_does_not_take_is_sent_before_the_end(
    server, constant, end
):
    """So little that the server need not wait for a slow client, but not cut either."""
    constant(LINGER_TIMEOUT=0.05)
    go_on, loop, answer = asyncio.Event(), asyncio.get_running_loop(), b""

    @server.model("m")
    async def answer_later(request):
        await go_on.wait()
        return "x" * 60_000

    headers = [("Connection", "close")] if end == "close" else []
    data = request_bytes("POST", CHAT_URL, CHAT, headers=headers)
    async with contextlib.AsyncExitStack() as stack:
        sock = stack.enter_context(await slow_socket(server.port, data))
        await until(lambda: server.running_requests)
        (connection,) = server._handlers
        if end == "shutdown":
            await stack.enter_async_context(beside(server.shutdown()))
            await until(lambda: server.draining)
        go_on.set()
        await until(lambda: connection.unsent)
        if end == "shutdown after the reply":
            await stack.enter_async_context(beside(server.shutdown()))
        await asyncio.sleep(0.2)  # longer than LINGER_TIMEOUT
        while piece := await loop.sock_recv(sock, 1 << 20):
            answer += piece
        await until(lambda: connection.lost)
    assert answer.count(b"x") >= 60_000


POST = "POST / HTTP/1.1\r\nHost: x\r\n"
CHUNKED_POST = (
    f"POST /api/ask HTTP/1.1\r\nHost: x\r\nAuthorization: {KEY}\r\n"
    "Transfer-Encoding: chunked\r\n\r\n"
)


@cases(
    "data, status",
    (POST + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", 400),
    ("GET / HTTP/2.0\r\nHost: x\r\n", 505),
    (CHUNKED_POST + "5\r\nhello\n0\r\n", 400),
    (CHUNKED_POST + "5;a\nb\r\n", 400),
)
async def test_nothing_behind_a_broken_request_is_read(server, constant, data, status):
    """One answer, then the end; the messages' tests have all that can be broken."""
    constant(LINGER_TIMEOUT=0.05)
    smuggled = "\r\n0\r\n\r\nGET /status HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = await raw(server.port, (data + smuggled).encode())
    head, _, content = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert isinstance(json.loads(content)["error"], str)


JSON_BODIES = [
    b"[" * 200_000,
    b'{"model": ' + b"1" * 5000 + b"}",
    b'{"model": NaN, "content": NaN, "admin_key": NaN}',
    b'{"model": "\xff"}',
    b"\xef\xbb\xbf{}",
    b"[]",
    b"{",
    b'{"model": {}, "messages": {}, "content": {}, "admin_key": {}, "name": {}}',
    b'{"model": [], "messages": [], "content": [], "user_id": [], "role": []}',
    b'{"model": 5, "messages": null, "content": "", "user_id": 5, "name": 5}',
    b'{"model": "m", "model": 5, "content": "x", "content": 5, "role": "x"}',
    b'{"content": "x", "parent_id": {}, "conversation_id": [], "role": null}',
]


PATHS_OF_JSON = f"{CHAT_URL} /v1/embeddings /api/ask /admin/users/add"


@cases("path", *PATHS_OF_JSON.split(), "/admin/users/delete")
async def test_odd_json_is_refused_and_never_an_internal_error(client, path):
    for body in JSON_BODIES:
        # /admin takes 64 KiB.
        reply = await client.request("POST", path, body[:60_000])
        assert reply.status == 400, (body[:80], reply.content)
        assert reply.json()["error"]


@cases(
    "content", "\ud800", "x" * 1_200_000, "\x00\u2028\x7f.", '"usage" "error" [DONE]'
)
async def test_odd_text_is_served(server, content):
    """Lone surrogates, a megabyte, control characters."""
    assert chat_text(await echo(server, content)) == content
    assert stream_text(await echo(server, content, stream=True)) == content


async def test_a_non_ascii_key_is_a_wrong_key(server):
    for value in (b"Bearer \xff\xfe", "Schl\u00fcssel".encode(), b"Bearer \x80"):
        request = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        data = request + b"Authorization: " + value + b"\r\n\r\n"
        head, _, content = (await raw(server.port, data)).partition(b"\r\n\r\n")
        assert head.split()[1] == b"401"
        assert json.loads(content)["error"]["message"] == "Invalid API key"
    for key in ("\u00fc", "\ud800", "\u0661"):
        reply = await ask(server.port, "POST", "/admin/users/add", {"admin_key": key})
        assert reply.status == 401
        assert reply.json() == {"error": "Invalid admin key"}


async def test_a_bug_in_a_route_shows_only_a_request_id(tmp_path, monkeypatch, caplog):
    async def broken(exchange):
        raise ValueError("SECRET of the handler")

    log = Log()
    route = apiserver.ROUTES["/status"]._replace(answer=broken)
    monkeypatch.setitem(apiserver.ROUTES, "/status", route)
    # As the program does it; caplog sees what an embedding program would.
    monkeypatch.setattr(apiserver.logger, "handlers", [apiserver.LogHandler(log)])
    async with serving(tmp_path, log=log) as server, Client(server.port) as client:
        headers = [("x-request-id", "mine")]
        reply = await client.request("GET", "/status", headers=headers)
        assert reply.status == 500 and reply.headers["connection"] == "close"
        assert "mine" in reply.json()["error"] and b"SECRET" not in reply.content
        assert await client.reader.read() == b""
        assert (await ask(server.port, "GET", "/health")).status == 200
        lines = [line for line in log.lines if "mine failed" in line]
        assert len(lines) == 1 and "(ValueError in broken, " in lines[0]
        assert "SECRET" not in log.text
    assert [r.name for r in caplog.records] == ["chatgpt_apiserver"]


async def test_an_upgrade_to_h2c_is_ignored(server, upstream):
    upgrade = [("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", "h2c")]
    upgrade.append(("HTTP2-Settings", "AAMAAABkAARAAAAAAAIAAAAA"))
    assert (await ask(server.port, "GET", "/status", headers=upgrade)).status == 200
    reply = await ask(server.port, "POST", CHAT_URL, CHAT, headers=upgrade)
    assert reply.status == 200
    [sent] = chats(upstream)
    assert not {"http2-settings", "upgrade"} & set(sent.headers)


async def test_a_handshake_with_content_is_refused(server):
    for length in (("Content-Length", "5"), ("Transfer-Encoding", "chunked")):
        with pytest.raises(ConnectionError, match="400"):
            await Agent(server.port, headers=[length]).connect()
    assert (await ask(server.port, "GET", "/client/register")).status == 400
    upgrade = [("Connection", "Upgrade"), ("Upgrade", "websocket")]
    upgrade += [("Sec-WebSocket-Version", "8"), ("Sec-WebSocket-Key", "x")]
    reply = await ask(server.port, "GET", "/client/register", headers=upgrade)
    assert reply.status == 426
    assert reply.headers["sec-websocket-version"] == "13"


async def test_bytes_behind_a_handshake_are_its_first_frame(server, client):
    hello = json.dumps({"id": "early-bird", "message": "Connection id"})
    frame = apiserver.WebSocketProtocol(CLIENT).send(hello)
    client.send(handshake("/client/register") + frame)
    assert (await client.read_head())[0] == 101
    await until(lambda: "early-bird" in server.agents)


@cases(
    "own, kept",
    *((own, True) for own in ("abc-123", "x" * 128, "two words")),
    *((own, False) for own in ("x" * 129, "tab\tbed", "\u00fc", "")),
)
async def test_the_request_id_is_the_clients_own_if_it_can_be(server, own, kept):
    seen = set()
    for path in ("/health", "/nothing", "/v1/models"):
        line = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        data = f"{line}x-request-id: {own}\r\n\r\n".encode("latin-1")
        answer = await raw(server.port, data)
        seen.add(re.search(rb"x-request-id: ([^\r]+)", answer)[1].decode())
    if kept:
        assert seen == {own}
    else:
        assert own not in seen and len(seen) == 3


CLIMBING_PATHS = """/v1/../x /v1/a/.. /v1/%2e%2e/x /v1/.%2E /v1/./x /v1/..;/x /v1/..\\x
    /v1/..%5cx /v1/%252e%252e/x /v1/a/..;b /v1/../admin/users /v1//../admin/users
    /v1/v1/../../admin/users"""
SECOND_FORMS = """/admin//users /admin/users/ //admin/users /health/ //health /api//ask
    /client//register"""


async def test_no_path_climbs(server, upstream):
    """The upstream's key is for what is under its base URL, however lenient it is,
    and a proxy in front that guards /admin/ must not be passed."""
    for path in (CLIMBING_PATHS + " " + SECOND_FORMS).split():
        for method, body in (("GET", None), ("POST", CHAT)):
            assert (await ask(server.port, method, path, body)).status == 404, path
    assert chats(upstream) == []
    for path in ("/admin/users?", "/admin/controllers?"):  # too many query fields
        reply = await ask(server.port, "GET", path + "a&" * 500, key="")
        assert reply.status in (400, 401)


async def test_a_reset_leaves_no_trace(server, client, log, monkeypatch, caplog):
    def cut(exchange):
        connection_cut(client.writer)

    monkeypatch.setattr(apiserver.Exchange, "log", cut)
    client.send(b"nonsense\r\n\r\n")
    await until(lambda: server._handlers)
    await until(lambda: not server._handlers)
    assert "failed" not in log.text and caplog.records == []


# --- Trust


@cases(
    "fields, answer",
    ([("Authorization", "KEY")], 200),
    ([("authorization", "bearer   KEY")], 200),
    ([("x-api-key", "KEY")], 200),
    ([("api-key", "KEY")], 200),
    ([("x-goog-api-key", "KEY")], 200),
    ([("Authorization", "Bearer oauth"), ("x-api-key", "KEY")], 200),
    ([("Authorization", "Basic eDp5"), ("x-goog-api-key", "KEY")], 200),
    ([("Authorization", "Bearer KEY"), ("x-api-key", "other")], 200),
    ([("x-api-key", "wrong"), ("api-key", "KEY")], 200),
    ([("Authorization", "wrong"), ("x-api-key", "other")], "Invalid API key"),
    ([("Authorization", "Basic KEY")], "Invalid API key"),
    ([("Authorization", "Bearer KE")], "Invalid API key"),
    ([("Authorization", "")], "API key not provided"),
    ([("Cookie", "KEY")], "API key not provided"),
)
async def test_a_credential_has_several_forms(server, fields, answer):
    body = {"content": "hi", "model": "mock/echo"}
    for token in (KEY, await add_user(server)):
        own = [(name, value.replace("KEY", token)) for name, value in fields]
        reply = await ask(server.port, "POST", "/api/ask", body, "", own)
        if answer == 200:
            assert reply.status == 200, reply.content
        else:
            assert reply.status == 401 and "www-authenticate" in reply.headers
            assert reply.json() == {"error": answer}
            assert token.encode() not in reply.content


async def test_a_credential_may_be_in_the_path(server, log):
    token = await add_user(server, role="agent")
    far = [("X-Forwarded-For", "192.0.2.1")]
    for good in (KEY, token):
        async with Agent(server, f"/k/{good}/client/register", headers=far):
            assert len(server.agents) == 1
        await handler_agents(server, 0)
    with pytest.raises(ConnectionError, match="401"):
        await Agent(server.port, "/k/WRONGTOKEN/client/register").connect()
    for path in ("/k/WRONGTOKEN", "/k/WRONGTOKEN/nothing", "/k/"):
        reply = await ask(server.port, "GET", path, key="")
        assert reply.status == 404 and b"WRONGTOKEN" not in reply.content
    await ask(server.port, "GET", "/k/a/k/WRONGTOKEN", key="")
    for secret in (KEY, token, "WRONGTOKEN"):
        assert secret not in log.text


async def test_what_each_role_may_do(server):
    user = await add_user(server)
    agent = await add_user(server, role="agent")
    table = [
        ("POST", "/api/ask", {"content": "x", "model": "mock/echo"}, 200, 403),
        ("GET", "/v1/models", None, 200, 403),
        ("POST", CHAT_URL, {**CHAT, "model": "mock/echo"}, 200, 403),
        ("POST", "/v1/embeddings", {"model": "x"}, 404, 403),
        ("GET", "/api/connections", None, 403, 403),
        ("GET", "/admin/users", None, 403, 403),
        ("POST", "/admin/users/add", {}, 403, 403),
        ("POST", "/admin/users/delete", {"user_id": "x"}, 403, 403),
        ("GET", "/admin/controllers", None, 403, 403),
        ("POST", "/admin/controllers/enable", {"name": "mock"}, 403, 403),
        ("POST", "/admin/controllers/disable", {"name": "mock"}, 403, 403),
        ("GET", "/admin/status", None, 403, 403),
        ("POST", "/admin/requests/cancel", {"request_id": "x"}, 403, 403),
        ("GET", "/admin/usage?by=model", None, 403, 403),
        ("GET", "/client/register", None, 403, 400),
    ]
    for method, path, body, *statuses in table:
        for key, status in zip((user, agent), statuses):
            reply = await ask(server.port, method, path, body, key)
            assert (path, reply.status) == (path, status)
        if path.startswith("/admin"):
            assert (await ask(server.port, method, path, body, "wrong")).status == 401


async def test_a_missing_field_of_an_administrators_request_is_named(server):
    for path, name in (
        ("/admin/requests/cancel", "request_id"),
        ("/admin/controllers/enable", "name"),
        ("/admin/controllers/disable", "name"),
        ("/admin/users/update", "user_id"),
        ("/admin/users/delete", "user_id"),
    ):
        for body, problem in (
            ({"id": "x"}, "is missing"),
            ({name: 7}, "must be a string"),
        ):
            reply = await ask(server.port, "POST", path, body)
            assert reply.status == 400
            assert reply.json() == {"error": f"'{name}' {problem}."}


async def test_an_admin_key_may_be_in_the_body_query_or_header(server):
    add, users = ("POST", "/admin/users/add"), ("GET", "/admin/users")
    for (method, path), query, admin_key, key, error in (
        (add, "", KEY, "", None),
        (add, "", None, KEY, None),
        (users, f"?admin_key={KEY}", None, "", None),
        (add, "", "wrong", "", "Invalid admin key"),
        (add, "", "wrong", KEY, "Invalid admin key"),
        (users, "?admin_key=wrong", None, "", "Invalid admin key"),
        (add, "", None, "", "Admin key not provided"),
        (users, "?admin_key=", None, "", "Admin key not provided"),
    ):
        body = {} if admin_key is None else {"admin_key": admin_key}
        body = body if method == "POST" else None
        reply = await ask(server.port, method, path + query, body, key)
        assert reply.status == (401 if error else 200)
        assert not error or reply.json() == {"error": error}
        assert not error or KEY.encode() not in reply.content


async def test_no_number_of_wrong_keys_locks_anybody_out(client):
    """Behind a proxy all clients have one address: a count would hit the others."""
    for number in range(30):
        key = f"wrong{number}"
        assert (await client.request("GET", "/v1/models", key=key)).status == 401
    assert (await client.request("GET", "/v1/models")).status == 200


ORIGINS = (
    "https://evil.example null http://localhost:8080 https://chatgpt.com.evil.example"
)
HOSTS = "rebound.example:8080 localhost.evil.example 192.0.2.2 127.0.0.1.evil.example"
NOT_LOCAL = [("Origin", origin) for origin in ORIGINS.split()]
NOT_LOCAL += [("Host", host) for host in HOSTS.split()]
NOT_LOCAL += [("Forwarded", "for=192.0.2.1"), ("X-Forwarded-For", "127.0.0.1")]
NOT_LOCAL += [("X-Real-IP", "127.0.0.1"), ("via", "")]


async def handshake_status(server, path, *fields, source=None):
    """The status of a websocket's handshake, perhaps from another address."""
    sock = socket.create_connection(("127.0.0.1", server.port), 5, source)
    reader, writer = await asyncio.open_connection(sock=sock)
    writer.write(handshake(path, *fields))
    head = await reader.readuntil(b"\r\n\r\n")
    writer.transport.abort()
    return int(head.split()[1])


@cases("field", *NOT_LOCAL, ids=": ".join)
async def test_only_a_user_of_this_machine_needs_no_key(server, log, field):
    key = ("Authorization", f"Bearer {KEY}")
    for path, fields, statuses in (
        ("/client/register", (), (403,)),
        ("/client/register", (key,), (101,)),
        (f"/k/{KEY}/client/register", (), (101,)),
        ("/api/connections", (), (401, 403)),
        ("/api/connections", (key,), (200,)),
    ):
        assert await handshake_status(server, path, field, *fields) in statuses
    assert "/k/<token>" in log.text


@cases(
    "field",
    *(("Origin", "https://chat.openai.com"), ("Origin", "https://chatgpt.com")),
    *(("Origin", "moz-extension://2f0d9cd2"), ("Origin", "chrome-extension://abcdef")),
    *(("Host", "127.0.0.1:8080"), ("Host", "[::1]:8080")),
    *(("Host", "LOCALHOST:8080"), ("Host", "127.9.9.9")),
    ids=": ".join,
)
async def test_a_user_of_this_machine_needs_no_key(server, field):
    for path, status in (("/client/register", 101), ("/api/connections", 200)):
        assert await handshake_status(server, path, field) == status
        wrong = ("x-api-key", "wrong")  # a credential that is sent must be right
        assert await handshake_status(server, path, field, wrong) == 401


@cases(
    "addresses, here",
    ("127.0.0.1 ::1 ::ffff:127.0.0.1 [::1] localhost", True),
    ("192.0.2.2 ::ffff:192.0.2.2 :: 0.0.0.0 fd00::2", False),
)
def test_a_loopback_address_in_every_spelling(addresses, here):
    for address in addresses.split():
        assert apiserver.is_loopback(address) is here
    assert not apiserver.is_loopback("")


async def test_a_peer_at_another_address_is_not_this_machine(server):
    address = "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        with contextlib.suppress(OSError):
            sock.connect(("192.0.2.1", 9))  # sends nothing
            address = sock.getsockname()[0]
    if apiserver.is_loopback(address):
        pytest.skip("this machine has no other address")
    status = functools.partial(handshake_status, server, source=(address, 0))
    for path, refused in (("/client/register", 403), ("/api/connections", 401)):
        assert await status(path) == refused
        assert await handshake_status(server, path) in (101, 200)
    assert await status(f"/k/{KEY}/client/register") == 101


async def test_http_1_0_comes_from_a_proxy_and_needs_a_key(server):
    """nginx's defaults add no header, set a loopback Host and speak HTTP/1.0."""
    for version, status in ((b"1.1", b"200"), (b"1.0", b"401")):
        request = b"GET /api/connections HTTP/%b\r\nHost: localhost\r\n"
        request = request % version + b"Connection: close\r\n\r\n"
        assert (await raw(server.port, request)).split()[1] == status


@cases(
    "auth, near, far, listing",
    ("local", 101, 403, 200),
    ("key", 401, 401, 401),
    ("open", 101, 101, 200),
)
async def test_agents_auth_decides_who_needs_a_key(tmp_path, auth, near, far, listing):
    origin = ("Origin", "https://evil.example")
    async with serving(tmp_path, agents_auth=auth) as server:
        for path, fields, status in (
            ("/client/register", (), near),
            ("/client/register", (origin,), far),
            ("/api/connections", (), listing),
            ("/api/connections", (origin,), 401),
        ):
            assert await handshake_status(server, path, *fields) == status


# --- The ask API


async def handler_ask(port, content="Hello", key=KEY, **fields):
    return await ask(port, "POST", "/api/ask", {"content": content, **fields}, key)


async def test_an_agent_answers_an_ask(server, agent):
    ids = {"conversation_id": "<optional>", "parent_id": "<optional>"}
    async with beside(handler_ask(server.port, **ids)) as asking:
        id, data = await agent.request()
        assert list(data) == ["message_id", "conversation_id", "parent_id", "content"]
        assert data["content"] == "Hello" and data["conversation_id"] == ""
        assert UUID_FORM.fullmatch(data["message_id"])
        assert UUID_FORM.fullmatch(data["parent_id"])
        await agent.reply(id, "Hi", "conv", "resp")
        reply = await asking
    assert reply.status == 200
    expected = {"id": "", "response_id": "resp", "conversation_id": "conv"}
    expected.update(content="Hi", error="")
    assert [*reply.json().items()] == [*expected.items()]
    ids = {"conversation_id": "conv", "parent_id": "resp"}
    async with beside(handler_ask(server.port, **ids)) as asking:
        id, data = await agent.request()
        assert (data["conversation_id"], data["parent_id"]) == ("conv", "resp")
        await agent.reply(id, "Ho", "conv", "resp2")
        assert (await asking).json()["content"] == "Ho"


@cases(
    "body, status, text",
    (b"{", 400, "JSON"),
    ({"content": ""}, 400, "content"),
    ({"content": ["x"]}, 400, "content"),
    ({"content": "x", "conversation_id": "c"}, 400, "together"),
    ({"content": "x", "parent_id": "p"}, 400, "together"),
    ({"content": "x", "conversation_id": 5, "parent_id": "p"}, 400, "conversation"),
    ({"content": "x", "model": 5}, 400, "model"),
    ({"content": "x", "conversation_id": "c", "parent_id": "p"}, 404, "exist"),
    ({"content": "x", "model": "<optional>"}, 503, "No available clients"),
    ({"content": "x", "conversation_id": None, "parent_id": ""}, 503, "No ava"),
    ({"content": "x", "model": "mock/500"}, 500, "fails"),
    ({"content": "x", "model": "mock/429"}, 429, "busy"),
)
async def test_an_ask_that_is_refused_says_why(server, body, status, text):
    began = time.monotonic()
    reply = await ask(server.port, "POST", "/api/ask", body)
    assert reply.status == status and time.monotonic() - began < 2
    assert list(reply.json()) == ["error"] and text in reply.json()["error"]


async def test_an_ask_without_a_model_goes_where_one_is_known(tmp_path):
    """One controller is down, and one lists nothing."""
    async with Upstream() as gone:
        down = gone.controller(name="down", weight=100)
    async with Upstream(sends(GOOD_REPLY, models=())) as empty:
        no_list = empty.controller(name="empty", weight=100)
        knows = pool_function("knows", models=["some"])
        async with serving(tmp_path, no_list, down, knows) as server:
            for _ in range(4):
                reply = await handler_ask(server.port)
                assert (reply.status, reply.json()["content"]) == (200, "knows")
            assert not chats(empty) and not no_list.health.closed_by
            knows.switched_off = True
            reply = await handler_ask(server.port)
            assert reply.status == 400 and "model" in reply.json()["error"]


@cases(
    "limits, status",
    (Limits(content_size=30_000), 413),
    (Limits(total_content_size=50_000), 503),
    (Limits(total_content_size=100_000), 200),
)
async def test_a_short_ask_counts_with_its_conversation(tmp_path, limits, status):
    held = []

    def answer(request):
        held.append(server.content_size)
        return 2 * request["messages"][0]["content"]

    talker = FunctionController(answer, name="talker", models=["m"])
    async with serving(tmp_path, talker, limits=limits) as server:
        reply = await handler_ask(server.port, "x" * 18_000)
        answer = reply.json()
        ids = {"parent_id": answer["response_id"]}
        ids["conversation_id"] = answer["conversation_id"]
        reply = await handler_ask(server.port, "Hi", **ids)
        assert reply.status == status and server.content_size == 0
        assert status != 200 or held[-1] > 54_000


async def test_an_ask_waits_a_moment_for_an_agent_that_has_just_left(server):
    async with Agent(server):
        assert len(server.agents) == 1
    await handler_agents(server, 0)
    async with beside(handler_ask(server.port)) as asking:
        await until(lambda: server.pool.waiting)
        async with Agent(server) as agent, beside(agent.echo()):
            assert (await asking).json()["content"] == "echo:Hello"


@flow(behave=http_reply(completion(response_id="x", error=None)))
async def test_a_conversation_kept_here_can_branch(server, upstream):
    """Upstreams keep none: the messages on the way to parent_id are sent along.

    An answer that looks like one of this API is still an upstream's.
    """

    async def say(content, conversation_id="", parent_id=""):
        ids = {"conversation_id": conversation_id, "parent_id": parent_id}
        reply = await handler_ask(server.port, content, **ids, model="m")
        assert reply.status == 200, reply.content
        answer = reply.json()
        names = ["id", "response_id", "conversation_id", "content", "error"]
        assert list(answer) == names and answer["content"] == "Hi there"
        sent = chats(upstream)[-1]
        assert sent.line.startswith("POST /v1/chat/completions ")
        assert sent.json()["model"] == "m"
        words = [m["content"] for m in sent.json()["messages"]]
        return answer["conversation_id"], answer["response_id"], words

    talk, first, sent = await say("one")
    assert UUID_FORM.fullmatch(talk) and UUID_FORM.fullmatch(first)
    assert sent == ["one"]
    same, second, sent = await say("two", talk, first)
    assert same == talk and sent == ["one", "Hi there", "two"]
    _, _, sent = await say("branch", talk, first)
    assert sent == ["one", "Hi there", "branch"]
    _, _, sent = await say("three", talk, second)
    assert sent == ["one", "Hi there", "two", "Hi there", "three"]
    ids = {"conversation_id": talk, "parent_id": str(uuid.uuid4())}
    assert (await handler_ask(server.port, **ids)).status == 404


async def test_a_conversation_belongs_to_the_user_who_began_it(server):
    other = await add_user(server)
    begun = (await handler_ask(server.port, model="mock/echo")).json()
    ids = {"conversation_id": begun["conversation_id"]}
    ids["parent_id"] = begun["response_id"]
    reply = await handler_ask(server.port, key=other, model="mock/echo", **ids)
    assert reply.status == 404
    assert reply.json() == {"error": "Conversation doesn't exist"}
    assert (await handler_ask(server.port, model="mock/echo", **ids)).status == 200


@cases("limit", {"conversations": 2}, {"conversations_size": 500})
async def test_conversations_are_bounded(tmp_path, limit):
    """The least recently used go first."""
    async with serving(tmp_path, limits=Limits(**limit)) as server:

        async def say(**ids):
            return await handler_ask(server.port, "x", model="mock/echo", **ids)

        begun = [(await say()).json() for _ in range(3)]
        for number, status in ((0, 404), (2, 200)):
            parent = begun[number]["response_id"]
            talk = begun[number]["conversation_id"]
            assert (await say(conversation_id=talk, parent_id=parent)).status == status


def test_the_kept_size_of_conversations_stays_right():
    """What has been forgotten must not count for ever."""
    kept = apiserver.Conversations(Limits(conversations=2))
    for id in "123":
        kept.add("u", id, None, "a", "", "question", "answer")
    assert kept.find("u", "1") is None
    # It was being answered meanwhile.
    kept.add("u", "1", None, "b", "a", "question", "answer")
    assert kept.find("u", "1") is None
    for _ in range(5):
        kept.add("u", "3", "agent")  # now it is an agent's
    assert kept._size == sum(c.size for c in kept._kept.values()) < 1000


@cases("limit", {"conversations": 5}, {"conversations_size": 50_000})
def test_one_user_does_not_evict_anothers_conversations(limit):
    kept = apiserver.Conversations(Limits(**limit))
    kept.add("bob", "1", None, "a", "", "question", "answer")
    for number in range(20):
        kept.add("eve", f"{number}", None, "a", "", "\u4e2d" * 5000, "answer")
    assert kept.find("bob", "1") and kept.find("eve", "19")
    assert len(kept._kept) == 5


def test_many_small_conversations_do_not_evict_a_large_one():
    kept = apiserver.Conversations(Limits(conversations=10, conversations_size=10_000))
    for id in ("1", "2"):
        kept.add("bob", id, None, "a", "", "x" * 2000, "answer")
    for number in range(20):
        kept.add("eve", f"{number}", None, "a", "", "question", "answer")
    assert kept.find("bob", "1") and kept.find("eve", "19") and len(kept._kept) == 10
    for _ in range(10):
        kept.add("bob", "3", "agent")
        kept.add("eve", "19", "agent")
    for key in [*kept._kept]:
        kept._remove(key)
    assert kept._size == 0 and not kept._weights


async def test_a_huge_conversation_id_of_an_agent_is_not_kept(server, agent):
    for size in (200, 201):
        async with beside(handler_ask(server.port)) as asking:
            id, _ = await agent.request()
            await agent.reply(id, "Hello", conversation_id="c" * size)
            assert (await asking).json()["conversation_id"] == "c" * size
    assert [len(id) for _, id in server.conversations._kept] == [200]


async def test_a_conversation_stays_with_its_agent(server, constant):
    """While that is gone, too; one that comes back with its id is the same agent."""
    constant(AGENT_RETURN_TIMEOUT=0.05)
    ids = {"conversation_id": "conv-1", "parent_id": "resp-1"}
    async with Agent(server) as first, beside(first.echo()):
        assert (await handler_ask(server.port)).status == 200
        async with Agent(server):  # it answers nothing
            await handler_agents(server, 2)
            for _ in range(4):
                assert (await handler_ask(server.port, **ids)).status == 200
    async with Agent(server) as third, beside(third.echo()):
        await until(lambda: list(server.agents) == [third.id])
        reply = await handler_ask(server.port, **ids)
        assert reply.status == 500
        assert reply.json() == {"error": "Connection no longer exists"}
        again = Agent(server.port, id=first.id)
        async with again, beside(again.echo()):
            await handler_agents(server, 2)
            assert (await handler_ask(server.port, **ids)).status == 200


async def test_two_agents_may_hand_out_the_same_conversation_id(server):
    other = await add_user(server)
    async with Agent(server) as first, Agent(server) as second:
        asked = []

        async def answer(agent, name):
            while True:
                id, _ = await agent.request()
                asked.append(name)
                await agent.reply(id, name)

        async with beside(answer(first, "first")), beside(answer(second, "second")):
            mine = (await handler_ask(server.port)).json()["content"]
            theirs = (await handler_ask(server.port, key=other)).json()["content"]
            assert {mine, theirs} == {"first", "second"}
            ids = {"conversation_id": "conv-1", "parent_id": "resp-1"}
            for key, name in ((KEY, mine), (other, theirs)) * 2:
                reply = await handler_ask(server.port, key=key, **ids)
                assert reply.json()["content"] == name


async def test_a_conversation_kept_here_may_go_on_at_a_browser_agent(server):
    """It does not know the id: it gets the whole text, and the ids stay ours."""
    reply = (await handler_ask(server.port, "one", model="mock/echo")).json()
    talk = reply["conversation_id"]
    async with Agent(server) as agent:
        ids = {"conversation_id": talk, "parent_id": reply["response_id"]}
        async with beside(handler_ask(server.port, "two", **ids)) as asking:
            id, data = await agent.request()
            assert data["conversation_id"] == ""
            assert data["content"] == "User: one\n\nAssistant: one\n\nUser: two"
            await agent.reply(id, "deux", "theirs", "their-answer")
            answer = (await asking).json()
        assert answer["content"] == "deux"
        assert answer["conversation_id"] == talk
    ids["parent_id"] = answer["response_id"]
    reply = await handler_ask(server.port, "three", model="mock/echo", **ids)
    assert reply.status == 200 and reply.json()["content"] == "three"


@cases(
    "models, names, model",
    (None, ("text-embedding-3-large", "whisper-1", "qwen3", "llama"), "qwen3"),
    ({"alias": "real"}, (), "real"),
    (None, (), None),
)
async def test_an_ask_takes_its_controllers_first_model(tmp_path, models, names, model):
    """Also before the list has come."""
    behave, options = sends(GOOD_REPLY, models=names), [{"models": models}]
    async with pool_of(tmp_path, behave, options=options) as (server, (up,), _):
        reply = await handler_ask(server.port)
        if model is None:
            assert reply.status == 400 and "model" in reply.json()["error"]
        else:
            assert chats(up)[-1].json()["model"] == model
        if models:
            reply = await handler_ask(server.port, model="other")
            assert reply.status == 404 and "other" in reply.json()["error"]


# --- Agents


@cases("dies", False, True)
async def test_an_agent_that_fails_or_dies_is_replaced(tmp_path, dies):
    async with serving(tmp_path) as server, Agent(server) as first:
        async with Agent(server) as second:
            asked = []

            async def behave(agent):
                while True:
                    id, _ = await agent.request()
                    asked.append(agent)
                    if len(asked) > 1:
                        await agent.reply(id, "alive")
                    elif dies:
                        agent.writer.transport.abort()
                    else:
                        await agent.send(id, "error", "no", error={})

            async with beside(behave(first)), beside(behave(second)):
                reply = await handler_ask(server.port)
                assert reply.json()["content"] == "alive" and len(asked) == 2


@flow(limits=Limits(request_timeout=0.5))
async def test_a_request_that_an_agent_does_not_take_ends_in_time(server):
    body = {**CHAT, "text": "x" * 20_000_000}  # more than the kernel takes
    async with Agent(server, hello=agent_hello()) as agent:
        agent.writer.transport.pause_reading()
        with takes(0, 3):
            answers = await asyncio.gather(*(chat(server, **body) for _ in range(2)))
        assert [answer.status for answer in answers] == [504, 504]
        assert server.agents[agent.id].in_flight == 0


@flow(limits=Limits(ask_timeout=0.2))
async def test_a_silent_agent_times_out_and_its_late_answer_is_dropped(server, agent):
    """Late, unknown and repeated answers disturb no other request."""
    reply = await handler_ask(server.port)
    assert reply.status == 504 and list(reply.json()) == ["error"]
    late, _ = await agent.request()
    async with beside(handler_ask(server.port, "two")) as asking:
        id, data = await agent.request()
        assert data["content"] == "two"
        await agent.reply(late, "late")
        await agent.reply("unknown", "unknown")
        await agent.reply(id, "right")
        await agent.reply(id, "again")
        assert (await asking).json()["content"] == "right"
    async with beside(handler_ask(server.port, "three")) as asking:
        id, _ = await agent.request()
        await agent.reply(id, "third")
        assert (await asking).json()["content"] == "third"


@cases(
    "message, data, more",
    ("error", "It broke", {"error": {}}),
    ("error", {"a": 1}, {"error": {}}),
    ("error", "", {"error": {}}),
    ("ChatGptResponse", "no JSON", {}),
    ("ChatGptResponse", "[]", {}),
    ("ChatGptResponse", '{"content": 5}', {}),
    ("ChatGptResponse", None, {}),
    ("ApiEnd", "", {}),
    ("ApiResponse", "{}", {}),
    ("error", "x" * 100_000, {}),
)
async def test_a_failed_answer_fails_one_request(server, agent, message, data, more):
    """The agent stays, and gets the next one."""
    for _ in range(4):
        async with beside(handler_ask(server.port)) as asking:
            id, _ = await agent.request()
            await agent.send(id, message, data, **more)
            reply = await asking
        assert reply.status == 500
        error = reply.json()["error"]
        assert error[-1:].isalnum() and len(error) < 4200
        if data == "It broke":
            assert "It broke" in error
    async with beside(handler_ask(server.port)) as asking:
        id, _ = await agent.request()
        await agent.reply(id, "well again")
        assert (await asking).json()["content"] == "well again"


async def test_malformed_messages_of_an_agent_do_no_harm(server, agent, log):
    numeral = '{"id": 5, "message": "error", "data": ' + "1" * 5000 + "}"
    messages = ["no JSON", "", "[" * 100_000, b"\xff\xfe binary", numeral]
    messages += r"""[]
        5
        null
        {"message": "ChatGptResponse"}
        {"id": {}, "message": "ChatGptResponse", "data": {}}
        {"id": [], "message": [], "data": []}
        {"id": null, "message": {}, "data": null}
        {"id": 5, "message": "Models", "data": "[5]"}
        {"id": "x", "message": "Connection id", "data": "again"}
        {"id": "\ud800", "message": "ChatGptResponse", "data": "\ud800"}""".split("\n")
    messages.append(b'{"id": "x", "message": "ping"}')
    async with beside(handler_ask(server.port)) as asking:
        id, _ = await agent.request()
        for message in messages:
            agent.writer.write(agent.protocol.send(message))
        await agent.reply(id, "still here")
        assert (await asking).json()["content"] == "still here"
    assert list(server.agents) == [agent.id]
    assert "failed" not in log.text


@cases("claimed", "", "a b", "x" * 129, "a;b", "a=b", "\u00fc", 5, {}, "mock")
async def test_an_id_that_cannot_be_a_cookie_or_is_a_name_is_not_taken(
    server, agent, claimed
):
    async with Agent(server) as other:
        pass
    assert UUID_FORM.fullmatch(agent.id) and agent.id != other.id
    odd = Agent(server)
    await odd.connect()
    first = await odd.receive()
    await odd.send(claimed, "Connection id")
    await until(lambda: first["id"] in server.agents or claimed == 5)
    odd.writer.transport.abort()


@cases("hello", "[2]", '{"paused": true, "models": ["x"], "max_concurrency": 0}')
async def test_nonsense_in_an_original_agents_hello_is_ignored(server, hello):
    async with Agent(server, hello=hello) as agent, beside(agent.echo()):
        assert chat_text(await chat(server)) == "echo:Hello"


async def test_an_agent_that_comes_back_takes_over(server, agent):
    """And what the old one, which may be dead, has not answered."""
    asking = asyncio.ensure_future(handler_ask(server.port))
    await agent.request()
    async with Agent(server.port, id=agent.id) as new, beside(new.echo()):
        assert (await asyncio.wait_for(asking, 2)).status == 200
        while (event := await agent.event())[0] is not CLOSE:
            pass
        assert event[1][0] == 4000
        assert list(server.agents) == [agent.id]
        reply = await ask(server.port, "GET", "/api/connections")
        assert [c["Id"] for c in reply.json()["connections"]] == [agent.id]
        assert (await handler_ask(server.port)).status == 200
        reply = await ask(server.port, "GET", "/admin/controllers")
        types = [c["type"] for c in reply.json()["controllers"]]
        assert types.count("agent") == 1


async def test_a_stranger_does_not_get_a_live_agents_id(server, agent):
    token = await add_user(server, role="agent")
    async with Agent(server.port, f"/k/{token}/client/register", id=agent.id):
        await handler_agents(server, 2)
        assert server.agents[agent.id].credential == "this machine"
        [stranger] = [id for id in server.agents if id != agent.id]
        assert UUID_FORM.fullmatch(stranger)


async def test_a_controller_may_later_get_an_agents_id_as_its_name(server, agent):
    server.add(FunctionController(str, name=agent.id))
    homes = [controller.home for controller in server.pool.controllers]
    assert len({*homes}) == len(homes) == 3


async def test_an_agent_gets_one_request_at_a_time(server, agent):
    asks = [handler_ask(server.port, text) for text in ("one", "two")]
    asks = [asyncio.ensure_future(each) for each in asks]
    id, data = await agent.request()
    await until(lambda: server.pool.waiting == 1)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(agent.request(), 0.05)
    await agent.reply(id, data["content"])
    id, data = await agent.request()
    await agent.reply(id, data["content"])
    assert [(await each).json()["content"] for each in asks] == ["one", "two"]


async def test_an_answer_as_its_client_leaves_frees_the_agent(server, client, agent):
    client.send(request_bytes("POST", "/api/ask", {"content": "one"}))
    id, _ = await agent.request()
    # Both are there before the server sees either.
    await agent.reply(id, "eins")
    client.writer.get_extra_info("socket").shutdown(socket.SHUT_WR)
    await until(lambda: server.requests_in_flight == 0, 1)
    assert server.agents[agent.id].in_flight == 0


@cases("answers", True, False)
async def test_an_agent_without_a_client_is_busy_until_it_answers(tmp_path, answers):
    """Or until its deadline."""
    limits = Limits(ask_timeout=10 if answers else 0.5)
    async with serving(tmp_path, limits=limits) as server, Agent(server) as agent:
        async with posting(server, {"content": "one"}, "/api/ask"):
            id, _ = await agent.request()
        await until(lambda: server.requests_in_flight == 0, 1)
        assert (await states(server))[server.agents[agent.id].name] == "busy"
        async with beside(handler_ask(server.port, "two")) as asking:
            await until(lambda: server.pool.waiting == 1)
            if answers:
                await agent.reply(id, "too late")
            second, data = await agent.request()
            assert data["content"] == "two"
            await agent.reply(second, "zwei")
            assert (await asking).json()["content"] == "zwei"


@flow(limits=Limits(ping_interval=0.1, pong_timeout=0.3))
async def test_an_idle_agent_is_pinged_and_dropped_when_dead(server, agent):
    for _ in range(3):
        message = await asyncio.wait_for(agent.receive(), 5)
        assert message["message"] == "ping" and message["id"]
        await agent.send(message["id"], "pong")
    assert agent.id in server.agents
    # From here on it is silent, also to websocket pings.
    with takes(0, 4):
        await handler_agents(server, 0)


@flow(limits=Limits(ping_interval=0.05, pong_timeout=0.05, ask_timeout=10))
async def test_a_busy_agent_is_not_dropped_for_its_silence(server, agent):
    async with beside(handler_ask(server.port)) as asking:
        id, _ = await agent.request()
        await asyncio.sleep(0.5)  # many intervals, and no pong
        await agent.reply(id, "slow but sure")
        assert (await asking).json()["content"] == "slow but sure"


@flow(limits=Limits(ping_interval=0.1, pong_timeout=0.4, ask_timeout=0.45))
async def test_an_agent_that_answers_too_late_is_not_dropped(server, agent):
    """While it works it answers no ping, and it would not come back."""
    for wait in (0.65, 0):
        async with beside(handler_ask(server.port)) as asking:
            id, _ = await agent.request()
            await asyncio.sleep(wait)
            await agent.reply(id, "here it is")
            assert (await asking).status == (504 if wait else 200)


async def test_an_agent_that_does_not_send_its_id_is_disconnected(server, constant):
    constant(FIRST_MESSAGE_TIMEOUT=0.1)
    agent = Agent(server)
    await agent.connect()
    assert (await agent.receive())["message"] == "Connection id"
    event = await asyncio.wait_for(agent.event(), 5)
    assert event[0] is CLOSE and event[1][0] == 1008
    agent.writer.transport.abort()
    assert server.agents == {}


@flow(limits=Limits(agents=1))
async def test_the_number_of_agents_has_a_limit(server):
    async with Agent(server):
        with pytest.raises(ConnectionError, match="503"):
            await Agent(server.port).connect()
    await handler_agents(server, 0)
    async with Agent(server):
        assert len(server.agents) == 1


@cases("how", "deleted", "edited", "expired")
async def test_the_end_of_its_token_disconnects_an_agent(
    tmp_path, server, monkeypatch, how
):
    user = await server.users.add(role="agent", expires="2099-01-01")
    own = Agent(server, headers=[("Authorization", user.token)])
    admins = Agent(server, headers=[("Authorization", KEY)])
    async with own, admins, Agent(server) as local:
        if how == "deleted":
            body = {"admin_key": KEY, "user_id": user.user_id}
            await ask(server.port, "POST", "/admin/users/delete", body)
        elif how == "edited":
            (tmp_path / "users.json").write_text('{"users": []}')
        else:
            monkeypatch.setattr(apiserver, "unix_time", lambda: 4.2e9)
        await handler_agents(server, 2)
        assert {*server.agents} == {admins.id, local.id}
        while (closing := await own.event())[0] is not CLOSE:
            pass
        assert closing[1][0] == 1008


async def test_the_log_tells_why_the_server_closed_an_agents_connection(server):
    log = []
    server.report = log.append
    user = await server.users.add(role="agent")
    agent = apiserver.Agent(
        server.url, key=user.token, name="box", controllers=[says_hi()], log=AgentLog()
    )
    async with beside(agent.serve_forever()):
        await until(lambda: server.agents)
        await server.users.delete(user.user_id)
        server.dismiss_agents()
        line = "agent box left (1008 its key is no longer valid)"
        await until(lambda: line in log)


@flow(agents_auth="open")
async def test_an_agent_stays_only_while_it_would_be_admitted(server):
    user = await server.users.add(role="agent")
    keyless = Agent(server, headers=[("X-Forwarded-For", "192.0.2.1")])
    async with keyless, Agent(server, headers=[("x-api-key", user.token)]) as keyed:
        await server.users.update(user.user_id, {"rotate": 60})
        server.dismiss_agents()
        assert len(server.agents) == 2  # the old token is good for a minute
        server.keyless_agents = "local"  # by a reload
        await until(lambda: {*server.agents} == {keyed.id})
        body = {"user_id": user.user_id, "rotate": 0}
        await ask(server.port, "POST", "/admin/users/update", body)
        assert not server.agents


async def test_connections_are_listed_as_the_original_did(server):
    reply = await ask(server.port, "GET", "/api/connections", key="")
    assert reply.json() == {"connections": []}
    async with Agent(server) as agent, beside(agent.echo()):
        reply = await ask(server.port, "GET", "/api/connections")
        [row] = reply.json()["connections"]
        assert list(row)[:4] == ["Ws", "Id", "Heartbeat", "LastMessageTime"]
        assert row["Ws"] == {} and row["Id"] == agent.id
        assert row["LastMessageTime"] == "0001-01-01T00:00:00Z"
        form = re.compile(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ")
        assert form.fullmatch(row["Heartbeat"])
        await handler_ask(server.port)
        reply = await ask(server.port, "GET", "/api/connections")
        assert form.fullmatch(reply.json()["connections"][0]["LastMessageTime"])


@cases("stream", False, True)
async def test_a_browser_agent_answers_chat_completions(server, agent, stream):
    system = {"role": "system", "content": "Be brief."}
    body = chat_body([{"type": "text", "text": "Hello"}], "gpt-x", stream=stream)
    body["messages"].insert(0, system)
    async with beside(ask(server.port, "POST", CHAT_URL, body)) as asking:
        id, data = await agent.request()
        assert data["content"] == "System: Be brief.\n\nUser: Hello"
        await agent.reply(id, "Hi")
        reply = await asking
    if stream:
        assert stream_text(reply) == "Hi" and b"usage" not in reply.content
        chunks = [json.loads(event) for event in reply.events()[:-1]]
        assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    else:
        assert chat_text(reply) == "Hi"
        body = reply.json()
        names = ["id", "object", "created", "model", "choices", "usage"]
        assert list(body) == names and body["model"] == "gpt-x"
        assert body["id"].startswith("chatcmpl-")
        assert body["usage"]["completion_tokens"] == 1


async def test_paths_that_a_browser_agent_cannot_answer_go_elsewhere(server, agent):
    body = {"model": "m", "input": "x"}
    assert (await ask(server.port, "POST", "/v1/embeddings", body)).status == 404
    async with Upstream(http_reply({"data": []})) as upstream:
        server.add(upstream.controller())
        for _ in range(4):
            reply = await ask(server.port, "POST", "/v1/embeddings", body)
            assert reply.status == 200


# --- The OpenAI API


@flow(behave=http_reply(completion(odd={"x": [1.50]})))
async def test_unknown_fields_arrive_byte_for_byte(server, upstream):
    """And so does the query."""
    body = (
        b'{ "model":"m",  "temperature": 0, "messages":[{"role":"user","content":'
        b'"\\u00e9\xc3\xa9"}], "next_year": {"b":1.0e5,"a":[ ]},"top_p":1.00 }'
    )
    query = "?api-version=2026-01-01&x=%20y"
    form = [("Content-Type", "application/x-www-form-urlencoded")]  # curl -d
    completions = "/v1/completions" + query
    for path in (CHAT_URL, "/chat/completions", CHAT_URL + query, completions):
        reply = await ask(server.port, "POST", path, body, headers=form)
        sent = chats(upstream)[-1]
        assert sent.content == body
        assert sent.headers["content-type"] == "application/json"
        assert sent.line == f"POST /v1{path.removeprefix('/v1')} HTTP/1.1"
        assert reply.content == upstream.behave.partition(b"\r\n\r\n")[2]
    old = {"Model": "m", "Messages": [{"Role": "user", "Content": "x"}]}
    await ask(server.port, "POST", CHAT_URL, {**old, "temperature": 0})
    assert chats(upstream)[-1].json() == chat_body("x", temperature=0)


@flow(behave=b"")
async def test_header_fields_travel_both_ways_but_private_ones(server, upstream):
    on = {"anthropic-version": "2023-06-01", "OpenAI-Beta": "assistants=v2"}
    on |= {"Idempotency-Key": "abc", "User-Agent": "sdk/1", "X-Request-Id": "mine"}
    on["X-Latin"] = "caf\u00e9"
    names = """Cookie Origin Referer Forwarded X-Forwarded-For X-Forwarded-Odd X-Real-IP
        Via x-api-key api-key x-goog-api-key OpenAI-Organization OpenAI-Project TE
        Keep-Alive Proxy-Authorization Accept-Encoding X-Hop"""
    private = dict.fromkeys(names.split(), "PRIVATE")
    private["Connection"] = "keep-alive, X-Hop"
    back = {"x-ratelimit-remaining": "7", "openai-processing-ms": "12"}
    names = """Set-Cookie Server OpenAI-Organization OpenAI-Project X-Request-Id X-Hop
        Anthropic-Organization-Id Anthropic-Workspace-Id Keep-Alive
        X-LiteLLM-Key-Spend X-LiteLLM-Key-Max-Budget X-LiteLLM-Model-API-Base
        Alt-Svc Clear-Site-Data NEL Report-To Strict-Transport-Security
        Access-Control-Max-Age X-Accel-Redirect X-Sendfile"""  # two speak to a proxy
    hidden = dict.fromkeys(names.split(), "PRIVATE")
    hidden["Connection"] = "keep-alive, x-hop"
    answer = [*back.items(), *hidden.items()]
    upstream.behave = http_reply(completion(), headers=answer)
    upstream.requests.clear()
    headers = [*on.items(), *private.items()]
    request = request_bytes("POST", CHAT_URL, CHAT, headers=headers)
    async with Client(server.port) as client:
        client.send(request.decode().encode("latin-1"))
        reply = await client.read_reply()
    assert reply.status == 200, reply.content
    [sent] = chats(upstream)
    assert sent.headers["authorization"] == "Bearer UPSTREAMSECRET"
    assert sent.headers["host"] == f"127.0.0.1:{upstream.port}"
    assert sent.headers["accept-encoding"] == "identity"
    for name, value in on.items():
        assert sent.headers.get(name.lower()) == value, name
    assert "PRIVATE" not in str(sent.headers)
    assert back.items() <= reply.headers.items()
    assert "PRIVATE" not in str(reply.headers)
    assert reply.headers["access-control-allow-origin"] == "*"
    assert reply.headers["x-request-id"] == "mine"


@cases("change, param", ({"stream": "true"}, "stream"), (b"", None))
async def test_an_invalid_chat_is_400_with_the_field(server, upstream, change, param):
    body = change if isinstance(change, bytes) else {**CHAT, **change}
    reply = await ask(server.port, "POST", CHAT_URL, body)
    assert reply.status == 400 and chat_error(reply)["param"] == param
    assert chat_error(reply)["type"] == "invalid_request_error"
    assert chats(upstream) == []


@cases("passes", False, True)
@cases("status", 401, 403, 429, 500, 503)
async def test_upstream_errors_decides_what_the_client_gets(tmp_path, status, passes):
    error = {"message": "UPSTREAMSECRET says no", "type": "odd", "code": "why"}
    answer = http_reply({"error": error}, status, headers=[("Retry-After", "7")])
    how = "pass" if passes else "map"
    async with pool_of(tmp_path, answer, upstream_errors=how) as (server, _, _):
        reply = await chat(server)
        if status == 403:  # it may be about the prompt, and goes through
            assert reply.status == 403
            assert reply.json() == {"error": {**error, "message": "*** says no"}}
            return
        assert reply.status == (status if passes and status != 401 else 500)
        assert reply.headers["retry-after"] == "7"
        said = chat_error(reply)
        assert said["upstream_status"] == status
        assert (said["type"], said["code"]) == ("odd", "why")


@flow(behave=None, controller={"models": ["only"]})
async def test_unknown_models_are_404(server, upstream, tmp_path):
    for path in (CHAT_URL, "/v1/embeddings"):
        reply = await ask(server.port, "POST", path, CHAT)
        assert reply.status == 404 and chat_error(reply)["code"] == "model_not_found"
    async with serving(tmp_path) as server:
        reply = await chat(server)
        assert reply.status == 404
        assert "connect an agent" in chat_error(reply)["message"]
        reply = await chat(server, key=await add_user(server))  # a user cannot
        assert "GET /v1/models lists" in chat_error(reply)["message"]
        reply = await chat(server, model="mock/nope?times=1")
        assert reply.status == 404
        assert "mock models are mock/echo, mock/text" in chat_error(reply)["message"]
        body = chat_body(model="mock/echo")
        reply = await ask(server.port, "POST", "/v1/audio/speech", body)
        assert reply.status == 404
        assert "no controller with it answers /v1/aud" in chat_error(reply)["message"]
    async with serving(tmp_path, mocks=False) as server:
        reply = await chat(server, model="mock/echo")
        assert "connect an agent" in chat_error(reply)["message"]


@flow(behave=sends(models=["org/m 1", "b"]), controller={"models": None})
async def test_models_are_listed(server):
    await until(lambda: server.pool.controllers[-1].listed)
    reply = await ask(server.port, "GET", "/v1/models")
    assert reply.json()["object"] == "list"
    models = {model["id"]: model for model in reply.json()["data"]}
    assert {"org/m 1", "b", "mock/echo"} <= set(models)
    assert set(models["b"]) == {"id", "object", "created", "owned_by"}
    for path in ("org/m%201", "org%2Fm%201", "%6frg/m%201"):
        reply = await ask(server.port, "GET", f"/v1/models/{path}")
        assert reply.status == 200 and reply.json() == models["org/m 1"]
    reply = await ask(server.port, "GET", "/v1/models/none")
    assert reply.status == 404 and chat_error(reply)["code"] == "model_not_found"


async def test_other_paths_go_to_the_controller_of_the_model(tmp_path):
    replies = [http_reply({"object": name}) for name in ("one", "two")]
    options = [{"models": ["a"]}, {"models": ["b"]}]
    async with pool_of(tmp_path, *replies, options=options) as (server, ups, _):
        body = b'{"model": "b", "input" :"x"}'
        path = "/v1/embeddings?odd=1"
        assert (await ask(server.port, "POST", path, body)).json() == {"object": "two"}
        [sent] = chats(ups[1])
        assert sent.content == body and sent.line == f"POST {path} HTTP/1.1"
        content = form(FORM_FILE, ('Content-Disposition: form-data; name="model"', "a"))
        kind = ("Content-Type", FORM)
        path = "/v1/audio/transcriptions"
        reply = await ask(server.port, "POST", path, content, headers=[kind])
        assert reply.json() == {"object": "one"}
        [sent] = chats(ups[0])
        assert sent.content == content and sent.headers["content-type"] == FORM
        content = content.replace(b'name="model"', b'name="other"')
        reply = await ask(server.port, "POST", path, content, headers=[kind])
        assert reply.status == 400 and chat_error(reply)["param"] == "model"


# --- Streams


async def test_a_stream_is_relayed_as_it_comes(server, upstream):
    go_on = asyncio.Event()
    first, second = chunk("Hel"), chunk("lo", "stop")
    upstream.behave = streams(first, go_on, second, DONE)
    async with Client(server.port) as client:
        for _ in range(2):
            client.send(request_bytes("POST", CHAT_URL, STREAM))
            status, headers = await client.read_head()
            assert status == 200 and headers["x-request-id"]
            assert headers["content-type"] == "text/event-stream; charset=utf-8"
            assert headers["cache-control"] == "no-cache"
            assert headers["x-accel-buffering"] == "no"
            assert await client.read_chunk() == first
            go_on.set()
            assert await client.read_rest() == second + DONE
            go_on.clear()
    assert upstream.connections <= 2


@cases("wanted", False, True)
async def test_usage_is_shown_only_on_request(server, upstream, controller, wanted):
    last = chunk(choices=[], usage=completion()["usage"])
    upstream.behave = streams(chunk("Hi"), chunk(None, "stop"), last, DONE)
    options = {"stream_options": {"include_usage": True}}
    body = {**STREAM, **(options if wanted else {})}
    reply = await ask(server.port, "POST", CHAT_URL, body)
    assert (b"total_tokens" in reply.content) is wanted
    assert reply.content.endswith(DONE)
    assert chats(upstream)[-1].json() == {**STREAM, **options}
    assert (await controller_line(server, "up0"))["tokens"] == 7


@flow(
    behave=streams(chunk("Hi", "stop") + DONE, 60),
    limits=Limits(heartbeat_interval=0.05),
)
async def test_no_comment_follows_the_end_of_a_stream(server, client):
    """While the upstream's last chunk is waited for, on one connection."""
    for _ in range(2):
        reply = await client.request("POST", CHAT_URL, STREAM)
        assert reply.content == chunk("Hi", "stop") + DONE
        await asyncio.sleep(0.2)


async def test_comments_begin_a_200_whatever_failed_before(tmp_path):
    """The status of a controller that failed is not passed on."""
    go_on = asyncio.Event()
    failing = error_reply(500, headers=[("X-Failed", "yes")])
    slow = streams(go_on, chunk("Hi", "stop"), DONE)
    options, limits = [{"weight": 9}], Limits(heartbeat_interval=0.1)
    made = pool_of(tmp_path, failing, slow, options=options, limits=limits)
    async with made as (server, (first, _), _), posting(server) as client:
        status, headers = await client.read_head()
        assert len(chats(first)) == 1
        assert status == 200 and "x-failed" not in headers
        for _ in range(2):
            assert await client.read_chunk() == b": keep-alive\n\n"
        go_on.set()
        assert await client.read_rest() == chunk("Hi", "stop") + DONE


BROKEN_ENDINGS = {
    "no finish": (b"0\r\n\r\n", "ended before"),
    "bad chunk": (b"zz\r\n", "chunk's size"),
    "error event": (
        chunked(b'data: {"error": {"message": "GPU lost"}}\n\n'),
        "status 500",
    ),
    "half an event": (chunked(b'data: {"choices": [') + b"0\r\n\r\n", "ended before"),
    "reset": (connection_cut, "was reset"),
    "close": (connection_close, "ended too early"),
    "silence": (60, "was silent"),
    "huge": (chunked(b"data: " + b"x" * 3000), "over 2000 bytes"),
}


@cases("end, reason", *BROKEN_ENDINGS.values(), ids=BROKEN_ENDINGS)
async def test_a_failure_in_mid_stream_is_one_error_event(tmp_path, end, reason):
    """No [DONE], no invented finish_reason, no other answer behind the first; and a
    line in the log, for the access line says 200.  An id is no such line."""
    go_on, log = asyncio.Event(), Log()
    behave = sends(STREAM_HEAD, chunked(chunk("Hel")), go_on, end)
    more = {"limits": Limits(silence_timeout=0.2, response_size=2000), "log": log}
    made = pool_of(tmp_path, behave, options=[{"weight": 100}], **more)
    async with made as (server, _, (first,)):
        server.add(pool_function("other", models=["m"]))
        async with posting(server, headers=[("x-request-id", "up1 is back")]) as client:
            assert await client.first_chunk() == chunk("Hel")
            go_on.set()
            rest = await client.read_rest()
            assert rest.startswith(b'data: {"error": {"message": ')
            assert rest.count(b"data: ") == 1 and b"[DONE]" not in rest
            assert not client.whole and await client.reader.read() == b""
        assert first.failures == 1 and first.in_flight == 0
        text = (await ask(server.port, "GET", "/metrics")).content.decode()
        assert 'attempts_total{controller="up0",result="failed"} 1' in text
    line = rf" request up1_is_back broke off: up0.* {reason}"
    assert len(re.findall(line, log.text)) == 1 and "up1 is" not in log.text


@flow(behave=streams(chunk("Hi", "stop"), DONE))
async def test_a_stream_in_http_1_0_ends_with_its_connection(server):
    request = request_bytes("POST", CHAT_URL, STREAM).decode()
    request = request.replace("HTTP/1.1", "HTTP/1.0")
    head, _, content = (await raw(server.port, request.encode())).partition(b"\r\n\r\n")
    assert b"Transfer-Encoding" not in head
    assert content == chunk("Hi", "stop") + DONE


# --- Clients as they are


async def test_a_path_under_v1_has_one_form(server, upstream):
    for path in """/v1//chat/completions /v1/chat/completions/ //v1/chat/completions
        /v1/v1/chat/completions /v1/v1//chat//completions// /chat/completions/
        /v1/%63hat/completions /v1/chat%252Fcompletions /v1/Chat/Completions%20
        /v1/chat\\completions;x=1 /v1/%76%31/chat;x/completions%3Fx""".split():
        assert (await ask(server.port, "POST", path, CHAT)).status == 200, path
        assert chats(upstream)[-1].line == f"POST {CHAT_URL} HTTP/1.1"
    assert (await ask(server.port, "POST", "/v1/X%2fy;z", CHAT)).status == 200
    assert chats(upstream)[-1].line == "POST /v1/X%2fy;z HTTP/1.1"
    for path in ("/v1/models/", "//v1/models", "/v1/v1/models", "/models", "/models/m"):
        assert (await ask(server.port, "GET", path)).status == 200


async def test_a_base_url_without_v1_serves_every_known_endpoint(server):
    body = {"model": "mock/echo", "input": "x", "prompt": "x", "messages": []}
    for path in apiserver.DIALECTS:
        with_v1 = await ask(server.port, "POST", path, body)
        without = await ask(server.port, "POST", path.removeprefix("/v1"), body)
        assert without.status == with_v1.status, path
    assert (await ask(server.port, "GET", "/models/mock%2Fecho")).status == 200
    for path in ("/modelsx", "/completions/x"):  # all others stay as they are
        assert (await ask(server.port, "POST", path, body)).status == 404


@cases("base", "/v2", "/openai/v1", "/v1/chat/completions")
async def test_a_wrong_base_url_is_named_where_an_sdk_shows_it(server, upstream, base):
    for method, end in (("GET", "/models"), ("POST", "/chat/completions")):
        reply = await ask(server.port, method, base + end, CHAT)
        assert reply.status == 404
        error = reply.json()["error"]["message"]
        assert "base URL for API clients ends in /v1" in error
    assert chats(upstream) == []
    reply = await ask(server.port, "GET", f"/k/{KEY}")
    assert "nothing at GET /. The" in reply.json()["error"]
    reply = await ask(server.port, "DELETE", "/v1/files/x")
    assert "base URL" not in reply.json()["error"]["message"]


async def test_a_protocol_that_is_not_spoken_is_refused_at_once(server):
    websocket = [("Upgrade", "websocket"), ("Connection", "Upgrade")]
    reply = await ask(server.port, "GET", "/v1/responses", headers=websocket)
    assert reply.status == 426 and reply.headers["upgrade"] == "websocket"
    assert reply.headers["connection"] == "Upgrade"
    last = [*websocket, ("Connection", "close")]
    reply = await ask(server.port, "GET", "/v1/responses", headers=last)
    assert reply.headers["connection"] == "Upgrade, close"
    reply = await ask(server.port, "GET", "/v1/realtime", headers=websocket)
    assert reply.status == 501


@cases("path", "client_secrets", "sessions/", "%2e/calls")
@cases(
    "start, status",
    *(("/v1/realtime", 501), ("/v1/%72ealTime", 404), ("/v1/chatkit", 404)),
)
async def test_no_key_of_the_upstreams_account_is_handed_out(
    server, upstream, start, status, path
):
    """One for the realtime API or for ChatKit would be outside all limits."""
    body = {"model": "m", "session": {"type": "realtime"}}
    reply = await ask(server.port, "POST", f"{start}/{path}", body)
    assert reply.status == status and chats(upstream) == []


@cases("coding", "gzip", "GZIP", "x-gzip", "deflate", "identity")
async def test_a_compressed_request_is_read(server, upstream, coding):
    content = json.dumps(CHAT).encode()
    encode = {"deflate": zlib.compress, "identity": bytes}.get(coding, gzip.compress)
    coded = [("Content-Encoding", coding)]
    sent = encode(content)
    assert (await ask(server.port, "POST", CHAT_URL, sent, headers=coded)).status == 200
    [asked] = chats(upstream)
    assert asked.content == content and "content-encoding" not in asked.headers
    sent = encode(b'{"content": "Hi", "model": "mock/echo"}')
    reply = await ask(server.port, "POST", "/api/ask", sent, headers=coded)
    assert reply.json()["content"] == "Hi"


@cases(
    "coding, content, status",
    ("zstd", b"x", 415),
    ("br", b"x", 415),
    ("gzip, gzip", b"x", 415),
    ("gzip", b"garbage", 400),
    ("gzip", gzip.compress(json.dumps(CHAT).encode())[:-9], 400),
    ("gzip", gzip.compress(b"{" + b" " * 30_000_000, 9), 413),
)
@flow(limits=Limits(content_size=1_000_000))
async def test_what_cannot_be_decompressed_is_refused(server, coding, content, status):
    coded = [("Content-Encoding", coding)]
    reply = await ask(server.port, "POST", CHAT_URL, content, headers=coded)
    assert reply.status == status
    if status == 415:
        assert "gzip" in reply.headers["accept-encoding"]
        assert coding in reply.json()["error"]["message"]
    assert server.content_size == 0


@cases("limits", Limits(content_size=9_000), Limits(total_content_size=9_000))
async def test_nothing_follows_content_that_was_refused_midway(tmp_path, limits):
    bomb = gzip.compress(bytes(1_000_000))
    post = request_bytes("POST", CHAT_URL, bomb, headers=[("Content-Encoding", "gzip")])
    async with serving(tmp_path, limits=limits) as server:
        pad = [("pad", "a" * len(bomb))]  # longer than what would be discarded
        more = request_bytes("GET", "/health", headers=pad)
        answer = await raw(server.port, post + more + request_bytes("GET", "/status"))
    assert answer.count(b"HTTP/1.1 ") == 1 and b"Connection: close" in answer


@cases("path", "/v1/messages", "/v1/messages/count_tokens")
@cases(
    "body, key, status, kind",
    ({"model": "none", "messages": []}, KEY, 404, "not_found_error"),
    (b"{", KEY, 400, "invalid_request_error"),
    ({"model": 5}, KEY, 400, "invalid_request_error"),
    ({"model": "m"}, "wrong", 401, "authentication_error"),
    ({"model": "down"}, KEY, 503, "overloaded_error"),
    ({"model": "bad"}, KEY, 500, "api_error"),
)
@flow(
    behave=[error_reply(500)] * 2,
    controller=[{"models": ["down"]}, {"models": ["bad"]}],
)
async def test_errors_of_messages_are_anthropics(
    server, controllers, path, body, key, status, kind
):
    controllers[0].switched_off = True
    reply = await ask(server.port, "POST", path, body, key)
    error = reply.json()
    assert (reply.status, error["type"]) == (status, "error")
    assert error["error"]["type"] == kind and error["error"]["message"]


async def test_anthropics_clients_get_models_in_their_own_shape(server):
    server.add(pool_function("f", models=["a", "b"]))
    version = [("anthropic-version", "2023-06-01")]
    listed = (await ask(server.port, "GET", "/v1/models", headers=version)).json()
    assert (listed["has_more"], listed["last_id"]) == (False, "b")
    last = listed["data"][-1]
    assert (last["type"], last["display_name"]) == ("model", "b")
    reply = await ask(server.port, "GET", "/v1/models")
    assert reply.json()["data"][-1]["object"] == "model"


async def test_a_model_may_be_left_out_where_one_alone_could_be_meant(tmp_path):
    async with pool_of(tmp_path, None, options=[ANY]) as (server, _, _):
        for path in ("/v1/moderations", "/v1/images/generations", "/v1/x"):
            for body in ({"input": "x"}, {"input": "x", "model": None}):
                assert (await ask(server.port, "POST", path, body)).status == 200
        reply = await ask(server.port, "POST", CHAT_URL, {"messages": []})
        assert reply.status == 400 and chat_error(reply)["param"] == "model"
    async with pool_of(tmp_path, None, None, options=[ANY, ANY]) as (server, _, _):
        for path, status in (("/v1/moderations", 200), ("/v1/images/edits", 400)):
            assert (await ask(server.port, "POST", path, {})).status == status


@cases("kind", "json", "form")
@flow(controller=ANY)
async def test_a_request_that_names_two_models_is_refused(server, upstream, kind):
    """Two readers take two: a user could get one that is not the user's own."""
    key = await add_user(server, models=["m"])
    head = 'Content-Disposition: form-data; name="model"'
    headers = [("Content-Type", FORM)] if kind == "form" else []
    if kind == "form":
        bodies = [form((head, "m"), FORM_FILE, (head, "other"))]
        bodies.append(form((head, "m"), *[FORM_FILE] * 120, (head, "other")))
    else:  # Go's JSON, and so Ollama, ignores case and takes the last
        bodies = [{"model": "m", "MODEL": "o"}, {"Model": "o", "model": "m"}]
        bodies += [{**CHAT, "mOdel": "o"}, b'{"model": "o", "model": "m"}']
        bodies += [rb'{"mo\u0064el": "o", "model": "m"}']
    for body in bodies:
        for path in ("/v1/images/edits", "/v1/embeddings"):
            reply = await ask(server.port, "POST", path, body, key, headers)
            assert reply.status == 400 and chat_error(reply)["param"] == "model"
    assert chats(upstream) == []


@flow(controller=ANY)
async def test_a_restricted_user_names_no_other_model_beside_the_own(server, upstream):
    """In a query, in LiteLLM's paths, or as a fallback of OpenRouter's or LiteLLM's."""
    key = await add_user(server, models=["m", "n"])
    for more, query, status in (
        ({"models": ["m", "n"]}, "?model=m", 200),
        ({"models": ["m", "other"]}, "", 404),
        ({"fallbacks": [{"m": ["other"]}]}, "", 404),
        ({"context_window_fallbacks": [{"m": ["other"]}]}, "", 404),
        ({"content_policy_fallbacks": ["other"]}, "", 404),
        ({"user_config": {"model_list": [{"model_name": "m"}]}}, "", 404),
        ({"models": None, "fallbacks": []}, "", 200),
        ({}, "?model=m&mod%65l=other", 404),
    ):
        for path in (CHAT_URL, "/v1/x"):
            body = {**CHAT, **more}
            reply = await ask(server.port, "POST", path + query, body, key)
            assert reply.status == status, (path, more, query)
    for path in ("/v1/engines/other", "/v1/openai/Deployments/other"):
        reply = await ask(server.port, "POST", f"{path}/chat/completions", CHAT, key)
        assert reply.status == 404
    assert len(chats(upstream)) == 4


# --- Late errors


@cases("status", 400, 403, 404, 429, 500)
@cases(
    "path, begins",
    (CHAT_URL, b'data: {"error"'),
    ("/v1/completions", b'data: {"error"'),
    ("/v1/messages", b'event: error\ndata: {"type": "error", "error": {'),
    ("/v1/responses", b'event: error\ndata: {"type": "error", "sequence_number"'),
)
async def test_an_error_after_comments_ends_a_stream(tmp_path, path, begins, status):
    go_on, limits = asyncio.Event(), Limits(heartbeat_interval=0.02)
    behave = sends(go_on, http_reply({"error": {"message": "too\nlong"}}, status))
    async with pool_of(tmp_path, behave, limits=limits) as (server, _, _):
        async with posting(server, {**STREAM, "input": "x"}, path) as client:
            assert await client.first_chunk() == b": keep-alive\n\n"
            go_on.set()
            rest = await client.read_rest()
            assert not client.whole
            assert rest.startswith(begins) and b"too\\nlong" in rest
            assert rest.count(b"data: ") == 1 and b"[DONE]" not in rest


@cases(
    "path, kind, wait, interval",
    (CHAT_URL, b"text/event-stream", 0.05, 0),
    ("/v1/audio/speech", b"audio/mpeg", 0.1, 0.02),
)
async def test_no_comments_in_audio_or_if_off(tmp_path, path, kind, wait, interval):
    data = chunk("Hi", "stop"), DONE
    head = STREAM_HEAD.replace(b"text/event-stream", kind)
    behave = sends(wait, head, chunked(data[0]), 0.1, chunked(data[1]) + b"0\r\n\r\n")
    limits = Limits(heartbeat_interval=interval)
    async with pool_of(tmp_path, behave, limits=limits) as (server, _, _):
        reply = await ask(server.port, "POST", path, STREAM)
        assert reply.status == 200 and reply.content == b"".join(data)
        assert reply.headers["content-type"].startswith(kind.decode())


# --- What one user can do to all


@flow(limits=Limits(total_content_size=50_000_000))
async def test_json_of_many_small_values_counts_as_large_as_it_gets(server):
    """A few bodies below every limit would take gigabytes."""
    head = b'{"model": "mock/echo", "messages": [{"content": "Hi"}], "z": ['
    counts = ((b"{},", 1000, 200), (b"{},", 200_000, 200), (b"{},", 300_000, 413))
    for value, count, status in (*counts, (b"0,", 900_000, 200)):
        body = head + value * count + b"{}]}"
        reply = await ask(server.port, "POST", CHAT_URL, body)
        assert reply.status == status, reply.content
        assert server.content_size == 0


@cases(
    "listen, tls, expected",
    ("0.0.0.0", False, 401),
    ("127.0.0.1", False, 101),
    ("127.0.0.1", True, 401),
)
async def test_agents_need_no_key_only_on_a_local_server_without_tls(
    tmp_path, certificate, listen, tls, expected
):
    """TLS means that other machines are expected."""
    files, context = certificate if tls else ({}, None)
    async with serving(tmp_path, listen=listen, **files) as server:
        for fields, status in (((), expected), ((("Authorization", KEY),), 101)):
            async with Client(server.port, tls=context) as client:
                client.send(handshake("/client/register", *fields))
                assert (await client.read_head())[0] == status


# --- Clients that leave


@cases("leaves", connection_drop, connection_cut, lambda writer: writer.write_eof())
@cases("phase", "before head", "after head", "in mid-stream", "in a flood", "whole")
async def test_a_hang_up_ends_the_upstreams_work(server, upstream, log, phase, leaves):
    steps = {
        "after head": [STREAM_HEAD],
        "in mid-stream": [STREAM_HEAD, chunked(chunk("Hi"))],
        "in a flood": [STREAM_HEAD, *[chunked(chunk("x" * 1000))] * 100_000],
    }.get(phase, [])
    body = CHAT if phase == "whole" else STREAM
    upstream.behave = sends(*steps, 60)
    async with posting(server, body) as client:
        if len(steps) > 1:
            await client.first_chunk()
        await until(lambda: chats(upstream))
        await until(lambda: server.requests_in_flight == 1)
        ended = upstream.ended
        leaves(client.writer)
        await until(lambda: upstream.ended > ended, 1.5)
        await until(lambda: server.requests_in_flight == 0, 1)
    assert [c.in_flight for c in server.pool.controllers] == [0, 0]
    assert "failed" not in log.text and "cooling" not in log.text


@flow(behave=streams(HI_EVENTS, 30))
async def test_leaving_at_done_leaves_no_connection(server, upstream, controller):
    """Also where the upstream's last chunk never comes."""
    for leave in (lambda writer: None, connection_cut):
        async with posting(server) as client:
            await client.reader.readuntil(b"[DONE]")
            leave(client.writer)
    await until(lambda: upstream.ended == upstream.connections == 2)
    assert not controller.in_flight


async def test_leaving_at_done_leaves_no_call_at_an_agent(server):
    head = json.dumps({"status": 200, "content_type": "text/event-stream"})
    async with Agent(server, hello=agent_hello()) as agent:
        async with posting(server) as client:
            id, _ = await agent_call(agent)
            await agent.send(id, "ApiResponse", head)
            await agent.send(id, "ApiData", HI_EVENTS.decode())
            await client.reader.readuntil(b"[DONE]")
            connection_cut(client.writer)
        controller = server.agents[agent.id]
        await until(lambda: not controller._calls and not controller.in_flight)


async def test_a_hang_up_during_the_retry_without_usage_closes_both(server, upstream):
    refusal = error_reply(400, "no", headers=[("Connection", "close")])
    upstream.behave = by_words({"stream_options": sends(refusal, 30)}, usual=sends(30))
    async with posting(server):
        await until(lambda: len(upstream.requests) == 2)
    await until(lambda: upstream.ended == upstream.connections == 2)


@cases(
    "model, leaves",
    *[(name, False) for name in ("mock/echo", "mock/500", "none", "drops", "fails")],
    *[(name, leaves) for name in ("silent", "gate") for leaves in (False, True)],
)
async def test_what_a_request_holds_is_freed_with_it(tmp_path, model, leaves):
    """It may be 32 MiB."""
    limits = Limits(first_byte_timeout=0.3, queue_timeout=0.1, cool_failures=1000)
    behaves = (upstream_hangs, upstream_drops, error_reply(500))
    options = [{"models": [m], "limits": limits} for m in ("silent", "drops", "fails")]
    gate = PoolGate(models=["gate"], max_concurrency=1)
    body = json.dumps({**chat_body(model=model), "z": "x" * 1_000_000}).encode()

    async def one(server):
        async with posting(server, body) as client:
            if not leaves:
                assert (await client.read_reply()).status
            else:
                await until(lambda: server.requests_in_flight > 1)

    made = pool_of(tmp_path, *behaves, options=options, limits=limits)
    async with made as (server, ups, _):
        server.add(gate.controller)
        async with beside(chat(server, model="gate")):
            await until(lambda: gate.asked)
            await one(server)  # what is made only once
            with traced() as memory:
                together = 1 if leaves else 5
                for _ in range(15 // together):
                    await asyncio.gather(*(one(server) for _ in range(together)))
                    await until(lambda: len(server._handlers) == 1)
                await asyncio.sleep(0.05)  # for what ends after the connection
                for upstream in ups:
                    upstream.requests.clear()
                # The five connections of an upstream hold their last one.
                assert memory()[0] < 8_000_000


# --- Administration


async def test_users_are_added_listed_and_deleted(server):
    reply = await ask(server.port, "GET", f"/admin/users?admin_key={KEY}", key="")
    assert reply.json() == {"users": []}
    user = await new_user(server)
    assert list(user) == ["user_id", "token"]
    assert all(UUID_FORM.fullmatch(value) for value in user.values())
    named = await new_user(server, name="Ada", role="agent")
    reply = await ask(server.port, "GET", "/admin/users")
    assert reply.json()["users"] == [user, {**named, "name": "Ada", "role": "agent"}]
    assert await models_status(server, user["token"]) == 200
    body = {"admin_key": KEY, "user_id": user["user_id"]}
    reply = await ask(server.port, "POST", "/admin/users/delete", body, "")
    assert reply.json() == {"message": "User deleted"}
    assert await models_status(server, user["token"]) == 401
    reply = await ask(server.port, "POST", "/admin/users/delete", body, "")
    assert reply.status == 404 and reply.json() == {"error": "User not found"}


@flow(behave=GOOD_REPLY)
async def test_controllers_are_listed_with_what_they_have_done(server):
    assert (await chat(server)).status == 200
    line = await controller_line(server, "up0")
    fields = "name type weight models state reason until in_flight requests"
    assert list(line) == [*fields.split(), "failures", "tokens"]
    assert (line["requests"], line["failures"], line["tokens"]) == (1, 0, 7)


@cases("limit", "user_requests_in_flight", "user_requests_per_minute")
async def test_one_users_requests_have_a_limit(tmp_path, limit):
    limits = Limits(**{limit: 2})
    async with pool_of(tmp_path, sends(60), limits=limits) as (server, (upstream,), _):
        other = await add_user(server)
        async with posting(server, CHAT), posting(server, CHAT):
            await until(lambda: len(chats(upstream)) == 2)
            reply = await chat(server)
            assert reply.status == 429
            assert reply.json()["error"]["type"] == "rate_limit_error"
            assert (await echo(server, key=other)).status == 200
        await until(lambda: server.requests_in_flight == 0)
        status = 200 if limit == "user_requests_in_flight" else 429
        assert (await echo(server)).status == status


@flow(behave=sends(60), limits=Limits(requests_in_flight=1))
async def test_requests_in_flight_have_a_limit(server, upstream):
    async with posting(server, CHAT):
        await until(lambda: chats(upstream))
        reply = await chat(server)
        assert reply.status == 503 and reply.headers["retry-after"] == "1"


# -----------------------------------------------------------------------------
# Server and program
# -----------------------------------------------------------------------------

needs_posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals")


def is_refused(port, host="127.0.0.1"):
    try:
        socket.create_connection((host, port), 2).close()
    except ConnectionRefusedError:
        return True
    return False


def entry(name, upstream=None, **more):
    """A controller of a configuration file, with a model of its name.

    Nothing listens there without an upstream.
    """
    url = upstream.url if upstream else "http://127.0.0.1:9"
    config = {"api_key": "k", "base_url": url}
    models = {"models": [name]} if upstream else {}
    return {"type": "openai", "name": name, "config": config, **models, **more}


def write_config(folder, *controllers, **settings):
    """Write a chatgpt-apiserver.json into a folder."""
    settings = {**settings, "controllers": controllers} if controllers else settings
    (folder / "chatgpt-apiserver.json").write_text(json.dumps(settings))


@contextlib.contextmanager
def program_in(folder, *options, key=KEY, env=None, **more):
    """The program on a free port, in this folder and in a quiet environment.

    It is ended with the block, and must exit with 0.
    """
    names = ("OPENAI_API_KEY", "API_KEY", "CONFIG_FILE", "CONFIG_PATH")
    env = {**dict.fromkeys(names, ""), "HOME": str(folder), **(env or {})}
    with Program("0", key, *options, cwd=folder, env=env, **more) as program:
        yield program
        ending = program.process.poll() is not None or "shutting down" in program.stderr
        if not ending:  # a signal to one that is nearly gone would kill it
            assert program.port  # it has started
            program.signal(signal.SIGTERM)
        assert program.end() == 0
        assert "Traceback" not in program.stderr


def reload(program, pattern, folder=None, *controllers, **settings):
    """Write the configuration if a folder is given, send SIGHUP, await a line."""
    assert program.port
    if folder is not None:
        write_config(folder, *controllers, **settings)
    program.signal(signal.SIGHUP)
    program.wait_for(pattern)


# --- In Python


async def test_async_with_leaves_nothing_behind(tmp_path):
    tasks, files = asyncio.all_tasks(), sorted(os.listdir("/dev/fd"))
    server = Server(KEY, port=0, users=str(tmp_path / "users.json"))
    assert server.url == "" and KEY not in repr(server)
    async with server:
        assert server.url == f"http://127.0.0.1:{server.port}"
        async with Client(server.port) as idle, Agent(server):
            assert (await idle.request("GET", "/health")).content == b"OK"
            await until(lambda: server.agents)
            assert (await echo(server)).status == 200
    assert asyncio.all_tasks() == tasks
    assert is_refused(server.port)
    await until(lambda: len(os.listdir("/dev/fd")) <= len(files))
    assert server.agents == {} and server._handlers == {}
    assert not (tmp_path / "users.json").exists()


async def test_a_server_runs_again_and_again(tmp_path):
    """In a loop, in a thread, with what it holds: users, upstreams, threads."""

    def in_a_thread(server):
        with server.running() as url:
            port = int(url.rpartition(":")[2])
            for model in ("mock/echo", "plain", "up"):
                assert run(echo(port, model=model)).status == 200
        assert is_refused(port)

    async with Upstream() as upstream:
        server = Server(KEY, port=0, users=str(tmp_path / "users.json"))
        server.model("plain")(lambda request: "Hi")
        server.add(upstream.controller(models=["up"]))
        for count in (1, 2, 3):
            async with server:
                for model in ("mock/echo", "plain", "up"):
                    assert (await echo(server, model=model)).status == 200
                token = await add_user(server)
                assert (await echo(server, key=token)).status == 200
            await asyncio.to_thread(in_a_thread, server)
            assert len(tokens_in(tmp_path / "users.json")) == count
    names = [t.name for t in threading.enumerate()]
    assert "server" not in names, names


def test_running_raises_what_kept_it_from_starting(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = Server(KEY, port=port, users=str(tmp_path / "users.json"))
        with pytest.raises(OSError), server.running():
            pytest.fail("it started on a port that is taken")
        with pytest.raises(OSError):
            run(server.start())
    with pytest.raises(ZeroDivisionError), server.running() as url:
        assert url.endswith(f":{port}")
        assert fetch(port, "GET", "/health").content == b"OK"
        raise ZeroDivisionError  # it comes out of the block, and the server ends
    assert is_refused(port)


def test_running_ends_quietly_if_the_server_has_shut_down(tmp_path):
    server = Server(KEY, port=0, users=str(tmp_path / "users.json"))

    @server.model("m")
    async def stops(request):
        server.request_shutdown()
        return "Bye"

    for _ in range(2):
        with server.running():
            thread = next(t for t in threading.enumerate() if t.name == "server")
            assert chat_text(run(chat(server))) == "Bye"
            thread.join(5)
        assert is_refused(server.port)


def test_running_ends_although_a_function_does_not(tmp_path):
    path, limits = str(tmp_path / "users.json"), Limits(drain_timeout=0.1)
    server, called = Server(KEY, port=0, users=path, limits=limits), threading.Event()

    @server.model("m")
    async def never_ends(request):
        called.set()
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(60)

    with server.running():
        client = socket.create_connection(("127.0.0.1", server.port))
        client.sendall(request_bytes("POST", CHAT_URL, chat_body()))
        assert called.wait(5)
        began = time.monotonic()
    client.close()
    assert time.monotonic() - began < 10  # 3 s for the function to notice
    assert server.requests_in_flight == server.pool.find("m").in_flight == 0


def test_running_ends_the_tasks_that_functions_have_started(tmp_path):
    server = Server(KEY, port=0, users=str(tmp_path / "users.json"))
    started, cleaned_up = [], []

    async def work():
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)  # needs a running loop
            cleaned_up.append(True)

    @server.model("m")
    async def starts_work(request):
        started.append(asyncio.create_task(work()))
        return "started"

    with server.running():
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(request_bytes("POST", CHAT_URL, chat_body()))
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
    assert cleaned_up and started[0].cancelled()


async def test_two_servers_in_one_loop_are_independent(tmp_path, server):
    async with Server("other", port=0, users=str(tmp_path / "two.json")) as two:
        assert server.port != two.port
        assert (await echo(server)).status == 200
        assert (await echo(server, key="other")).status == 401
        assert (await echo(two, key="other")).status == 200
    assert (await echo(server)).status == 200 and is_refused(two.port)
    with pytest.raises(RuntimeError, match="already"):  # its sockets would be lost
        await server.start()


@cases("key", "", None)
def test_a_server_without_a_key_cannot_be_made(key):
    with pytest.raises((ValueError, TypeError)):
        Server(key)


SILENT = """
import asyncio, sys, threading, time, json, urllib.request
from chatgpt_apiserver import Server, Limits

server = Server("secret", port=0)

@server.model("plain")
def plain(request):
    return "Hi"

@server.model("words")
def words(request):
    yield "a"

def ask(url, model, stream=False):
    body = {"model": model, "stream": stream, "messages": [{"content": "Hello"}]}
    request = urllib.request.Request(
        url + "/v1/chat/completions", json.dumps(body).encode(),
        {"Authorization": "Bearer secret"})
    try:
        answer = urllib.request.urlopen(request)
    except urllib.request.HTTPError as error:
        answer = error
    with answer:
        return answer.read()

for _ in range(2):
    with server.running() as url:
        for model in ("plain", "words", "mock/echo"):
            assert ask(url, model) and b"[DONE]" in ask(url, model, True)

async def main():
    before = asyncio.all_tasks()
    two = Server("secret", port=0, limits=Limits(drain_timeout=0.1))
    async with server, two:
        for url in (server.url, two.url):
            await asyncio.to_thread(ask, url, "mock/echo")
        slow = asyncio.create_task(asyncio.to_thread(ask, two.url, "mock/slow", True))
        while not two.requests_in_flight:
            await asyncio.sleep(0.01)
    assert b"shutting down" in await slow
    assert asyncio.all_tasks() == before

asyncio.run(main())
end = time.monotonic() + 5
while threading.active_count() > 1 and time.monotonic() < end:
    time.sleep(0.01)
assert threading.active_count() == 1, threading.enumerate()
"""


def test_development_mode_finds_nothing_to_warn_about(tmp_path):
    done = run_python("-X", "dev", "-W", "error", "-c", SILENT, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "users.json").exists()


async def test_ipv6_is_answered_on_the_same_port(tmp_path):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    for options in ({}, {"listen": "::1"}):
        async with serving(tmp_path, **options) as server:
            assert not options or server.url == f"http://[::1]:{server.port}"
            assert is_refused(server.port) is bool(options)
            async with Client(server.port, "::1") as client:
                assert (await client.request("GET", "/health")).content == b"OK"


async def test_https_and_wss_with_a_certificate(tmp_path, certificate):
    files, context = certificate
    async with serving(tmp_path, **files) as server:
        assert server.url.startswith("https://127.0.0.1:")
        async with Client(server.port, tls=context) as client:
            for stream in (False, True):
                body = chat_body(model="mock/echo", stream=stream)
                reply = await client.request("POST", CHAT_URL, body)
                assert reply.status == 200 and b"Hello" in reply.content
            about = (await client.request("GET", "/")).content
            assert b"https://" in about and b"wss://" in about
        # A peer that speaks no TLS, and one that is silent.
        assert b"HTTP/1.1 200" not in await raw(server.port, b"GET / HTTP/1.1\r\n\r\n")
        with socket.create_connection(("127.0.0.1", server.port)):
            async with Client(server.port, tls=context) as client:
                assert (await client.request("GET", "/health")).status == 200


# --- Connections


@flow(limits=Limits(connections=4))
async def test_an_idle_connection_gives_way_and_no_more_are_taken(server, gate):
    """Also when many come in the same turn of the loop."""
    async with contextlib.AsyncExitStack() as stack:

        async def connect():
            return await stack.enter_async_context(Client(server.port))

        idle = await connect()
        assert (await idle.request("GET", "/health")).status == 200
        busy = [await connect() for _ in range(3)]
        for client in busy:
            client.send(request_bytes("POST", CHAT_URL, CHAT))
        await until(lambda: len(gate.asked) == 3)
        surplus = await asyncio.gather(*(connect() for _ in range(20)))
        ends = [asyncio.ensure_future(c.reader.read()) for c in (*surplus, idle)]
        await until(lambda: sum(end.done() for end in ends) == 20)
        refused = [end for end in ends if end.done() and end.result()]
        assert len(refused) == 19, "the idle one's place was free"
        assert refused[0].result().startswith(b"HTTP/1.1 503 ")
        assert len(server._handlers) == 4
        gate.let()
        for client in busy:
            assert (await client.read_reply()).status == 200
        for end in ends:
            end.cancel()


async def test_connections_that_reset_at_once_leave_nothing(server, log):
    """No file stays open, and the log does not list them."""

    def storm(port):
        for _ in range(400):
            sock = socket.create_connection(("127.0.0.1", port))
            linger = struct.pack("ii", 1, 0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            sock.close()

    assert (await echo(server)).status == 200
    files, tasks, lines = open_files(), len(asyncio.all_tasks()), len(log.lines)
    await asyncio.to_thread(storm, server.port)
    assert (await echo(server)).status == 200
    await until(lambda: not server._handlers)
    await until(lambda: open_files() <= files + 1)
    assert len(asyncio.all_tasks()) <= tasks
    assert len(log.lines) <= lines + 1


@needs_posix
def test_few_files_are_enough_and_the_surplus_is_answered(tmp_path):
    def few_files():
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    def flood(port):
        headers = [("Content-Length", "9"), ("Expect", "100-continue")]
        with contextlib.ExitStack() as stack:

            def connect():
                sock = socket.create_connection(("127.0.0.1", port), timeout=10)
                return stack.enter_context(sock)

            begun = [connect() for _ in range(16)]
            for sock in begun:  # each begins a request, and so is not idle
                sock.sendall(request_bytes("POST", CHAT_URL, headers=headers))
                assert sock.recv(100).startswith(b"HTTP/1.1 100 ")
            for sock in [connect() for _ in range(24)]:
                assert sock.recv(100).startswith(b"HTTP/1.1 503 ")
            assert select.select(begun, [], [], 0.1)[0] == []

    with program_in(tmp_path, preexec_fn=few_files) as program:
        flood(program.port)
        reply = fetch(program.port, "POST", "/admin/users/add", {"admin_key": KEY})
        assert reply.status == 200
        assert run(echo(program.port, key=reply.json()["token"])).status == 200
    assert not re.search(r"EMFILE|Too many open files", program.stderr)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_idle_connections_cost_little(tmp_path):
    """With some hundreds: at most 12 KiB each, and /health is answered."""

    def size(pid):
        text = Path(f"/proc/{pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) * 1024

    async def check(port, pid):
        async with contextlib.AsyncExitStack() as stack:
            for count in (20, 400):
                for _ in range(count):
                    client = await stack.enter_async_context(Client(port))
                    reply = await client.request("GET", "/health", key=None)
                    assert reply.status == 200
                if count == 20:
                    before = size(pid)
            each = (size(pid) - before) / 400
            assert each < 12 * 1024, each
            with takes(0, 2):
                for _ in range(20):
                    assert (await ask(port, "GET", "/health", key=None)).status == 200

    write_config(tmp_path, limits={"connections": 1000})
    with program_in(tmp_path) as program:
        run(check(program.port, program.process.pid))


# --- The start


def test_the_start_screen_shows_what_to_do_and_no_key(tmp_path):
    key = "a-very-secret-key"
    with program_in(tmp_path, key=key) as program:
        port = program.port
        url = f"http://127.0.0.1:{port}"
        program.wait_for("mock/echo")
        digest = program.wait_for("SHA-256 of agent.py: ([0-9a-f]{64})")[1]
        first = f"chatgpt_apiserver {apiserver.__version__} listens on {url}"
        command = f"curl -fsS {url}/agent.py | python3 - agent {url} "
        socket_url = f"ws://127.0.0.1:{port}/client/register"
        parts = [first, command, socket_url, f"curl {url}/v1/chat/completions"]
        for part in (*parts, f"{url}/v1", "--listen 0.0.0.0", "none yet", "users.json"):
            assert part in program.stderr, part
        # The curl lines do what they say.
        assert run(echo(port, key=key)).status == 200
        source = fetch(port, "GET", "/agent.py", key=None).content
        assert apiserver.hashlib.sha256(source).hexdigest() == digest
        assert os.listdir(tmp_path) == []
        reply = fetch(port, "POST", "/admin/users/add", {"admin_key": key}, key=None)
        assert reply.status == 200 and "users.json" in os.listdir(tmp_path)
    assert key not in program.stderr and "secret" not in program.stderr
    assert reply.json()["token"] not in program.stderr


def test_a_name_that_is_no_address_here_is_an_error_with_its_cure(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(OSError, match="foo: Name .*; try 0.0.0.0 or ::"):
        apiserver.open_sockets("foo", 0)


@cases(
    "arguments, status, part",
    (["0"], 2, "API"),
    (["TAKEN", KEY], 1, "in use"),
    (["0", KEY, "--listen", "192.0.2.1"], 1, "does not have that address"),
    (["0", KEY, "--users", "broken.json"], 2, "broken.json"),
    (["0", KEY, "--config_file", "missing.json"], 2, "missing.json"),
    (["0", KEY, "--tls-cert", "broken.json", "--tls-key", "broken.json"], None, ""),
    (["0", KEY, "--tls-cert", "broken.json"], 1, "own file with --tls-key"),
)
def test_a_start_that_fails_is_one_line_and_a_status(tmp_path, arguments, status, part):
    """2 for a mistake, 1 where the system refuses; never a traceback."""
    (tmp_path / "broken.json").write_text('{"users": [')
    with socket.create_server(("127.0.0.1", 0)) as sock:
        taken = str(sock.getsockname()[1])
        arguments = [taken if a == "TAKEN" else a for a in arguments]
        env = {"API_KEY": "", "CHATGPT_APISERVER_API_KEY": ""}
        done = run_python(str(MODULE), *arguments, cwd=tmp_path, env=env)
    code, lines = done.returncode, done.stderr.strip().split("\n")
    assert code == status or (status is None and code in (1, 2)), done.stderr
    assert part.lower() in lines[-1].lower() and "Traceback" not in done.stderr
    assert len(lines) == 1 or "usage" in done.stderr.lower(), done.stderr
    assert (tmp_path / "broken.json").read_text() == '{"users": ['
    assert taken not in arguments or taken in lines[-1], "it names the port"


async def test_openai_api_key_in_the_environment_is_a_controller(tmp_path):
    async with Upstream() as upstream:
        env = {"OPENAI_API_KEY": "sk-UPSTREAMSECRET", "OPENAI_BASE_URL": upstream.url}
        with program_in(tmp_path, env=env) as program:
            assert chat_text(await echo(program.port, model="m")) == "Hi there"
            authorization = upstream.requests[-1].headers["authorization"]
            assert authorization == "Bearer sk-UPSTREAMSECRET"
            program.wait_for("Controllers +openai")
            assert "OPENAI_API_KEY" in program.stderr
            assert "UPSTREAMSECRET" not in program.stderr


# --- The log


async def test_the_access_line_shows_user_request_and_result_but_no_secret(tmp_path):
    async with Upstream(error_reply(500)) as bad, Upstream() as good:
        one, two = entry("one", bad, weight=9), entry("two", good)
        write_config(tmp_path, *({**e, "models": ["m"]} for e in (one, two)))
        with program_in(tmp_path, "--verbose", key="ADMINSECRET") as program:
            port = program.port
            body = {"admin_key": "ADMINSECRET", "name": "joe"}
            reply = await ask(port, "POST", "/admin/users/add", body, key=None)
            token, headers = reply.json()["token"], [("x-request-id", "req-1")]
            path, body = f"{CHAT_URL}?q=QUERYSECRET", chat_body("PROMPTSECRET")
            reply = await ask(port, "POST", path, body, token, headers)
            assert reply.status == 200 and reply.headers["x-request-id"] == "req-1"
            line = program.wait_for(".* req-1$")[0]
            await ask(port, "GET", "/admin/users?admin_key=ADMINSECRET", key=None)
            await ask(port, "GET", "/admin/users?admin_key=WRONGSECRET", key=None)
            await ask(port, "GET", f"/k/{token}/v1/models?x={token}", key=None)
            await ask(port, "GET", f"/k/{token}/nothing", key=None)
            await ask(port, "GET", "/health", key="WRONGSECRET")
            await echo(port, key="WRONGSECRET", model="m")
            evil = "m\n2026-01-01 00:00:00 admin POST /x 200\x1b[2J\u202e \x00"
            await echo(port, "x", "ADMINSECRET", model=evil)
    assert re.fullmatch(
        r"[0-9-]{10} [0-9:]{8} joe POST /v1/chat/completions 200 m two x2"
        r" [0-9.]+ [0-9.]+ ms [0-9]+ B 127.0.0.1 req-1",
        line,
    ), line
    for secret in ("SECRET", token, "\x1b", "\u202e", "\x00"):
        assert secret not in program.stderr, secret
    assert not any(line.startswith("2026-01-01") for line in program.lines if line)
    assert program.stderr.count(" POST /v1/chat/completions ") == 3
    assert "connection from 127.0.0.1" in program.stderr  # as with --verbose alone


@needs_posix
@cases("closed", "held", "the pipe", "2>&-", "<&- 2>&-", "<&- >&- 2>&-")
async def test_a_log_without_a_reader_is_no_reason_to_stop(tmp_path, closed):
    """Stdin closed, stderr a closed pipe or none, or one that is not read: nothing
    lands elsewhere, and no request is held up."""
    port = refusing_port()
    command = f"exec {sys.executable} {MODULE} {port} {KEY}"
    reading, writing = os.pipe()
    redirect = closed if "&" in closed else ""
    process = subprocess.Popen(
        ["sh", "-c", f"{command} {redirect}"], cwd=tmp_path, stderr=writing
    )
    os.close(writing)
    if closed != "held":
        os.close(reading)
    try:
        await until(lambda: not is_refused(port), 10)
        data = await raw(port, b"GET /health HTTP/1.0\r\n\r\n")
        assert data.startswith(b"HTTP/1.1 200") and data.endswith(b"\r\n\r\nOK")
        async with Client(port) as client:
            for _ in range(900 if closed == "held" else 5):  # 100 KB, into 64 KB
                assert (await client.request("GET", "/health")).status == 200
        reply = await ask(port, "POST", "/admin/users/add", {"admin_key": KEY})
        assert reply.status == 200
        assert chat_text(await echo(port)) == "Hello"
        assert len(tokens_in(tmp_path / "users.json")) == 1
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 10) == 0
    finally:
        process.kill()
        process.wait()
        if closed == "held":
            os.close(reading)


# --- Signals


@needs_posix
@cases("number", signal.SIGTERM, signal.SIGINT)
async def test_an_idle_program_ends_at_once(tmp_path, number):
    """Idle keep-alives are closed, agents get close 1001."""
    with program_in(tmp_path) as program:
        port = program.port
        async with Client(port) as idle, Client(port) as half, Agent(port) as agent:
            assert (await idle.request("GET", "/health")).status == 200
            half.send(b"GET /health HTTP/1.1\r\n")  # and no more: no request runs
            program.wait_for("agent .* joined")
            with takes(0, 1.5):
                program.signal(number)
                assert await idle.reader.read() == b""
                event = await agent.event()
                assert event[0] is CLOSE and event[1][0] == 1001
                agent.writer.write(agent.protocol.close(1001))
                await asyncio.to_thread(program.end)
    assert f"shutting down ({number.name})" in program.stderr


@needs_posix
async def test_a_running_stream_may_finish_and_nothing_new_begins(tmp_path):
    body = chat_body("Hello you", "mock/slow?seconds=0.8", stream=True)
    with program_in(tmp_path) as program:
        port = program.port
        async with posting(port, body) as client:
            await echo(port)  # the server has read what came before
            program.signal(signal.SIGTERM)
            program.wait_for("s; requests in flight: 1")
            assert is_refused(port)
            reply = await client.read_reply()
            assert reply.events()[-1] == "[DONE]" and b"you" in reply.content
            assert await client.reader.read() == b""


@needs_posix
@cases("twice", False, True)
async def test_what_does_not_finish_is_cut_by_time_or_a_second_signal(tmp_path, twice):
    write_config(tmp_path, limits={"drain_timeout": 30 if twice else 0.3})
    body = chat_body(model="mock/slow?seconds=60", stream=True)
    with program_in(tmp_path) as program:
        port = program.port
        async with posting(port, body) as client:
            await echo(port)
            with takes(0, 3):
                program.signal(signal.SIGTERM)
                program.wait_for("s; requests in flight: 1")
                if twice:
                    program.signal(signal.SIGTERM)
                    program.wait_for("ending at once")
                assert (await client.read_head())[0] == 503
                assert b"shutting down" in await client.reader.read()
                await asyncio.to_thread(program.end)


@needs_posix
def test_a_signal_during_the_start_ends_it_cleanly(tmp_path):
    for delay in (0.12, 0.2, 0.26, 0.32):
        command = [sys.executable, str(MODULE), "0", KEY]
        process = subprocess.Popen(
            command, cwd=tmp_path, stderr=subprocess.PIPE, text=True
        )
        time.sleep(delay)  # any moment will do
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=10)
        assert process.returncode in (0, -signal.SIGTERM), stderr
        assert "Traceback" not in stderr and "Error" not in stderr


@needs_posix
@flow(timeout=30)
async def test_sighup_swaps_controllers_and_cuts_nothing(tmp_path):
    go_on = asyncio.Event()
    slow = sends(go_on, http_reply(completion("old")))
    async with Upstream(slow) as old, Upstream() as kept, Upstream() as new:
        write_config(tmp_path, entry("old", old), entry("kept", kept))
        with program_in(tmp_path) as program:
            port = program.port
            assert (await echo(port, model="kept")).status == 200
            running = asyncio.ensure_future(echo(port, model="old"))
            await until(lambda: chats(old))

            (tmp_path / "chatgpt-apiserver.json").write_text('{"controllers": [')
            reload(program, "not reloaded: .*chatgpt-apiserver.json")
            # No other file is read in place of the one that has gone.
            (tmp_path / "chatgpt-apiserver.json").unlink()
            (tmp_path / "config").mkdir()
            write_config(tmp_path / "config", controllers=[])
            reload(program, "not reloaded: chatgpt-apiserver.json is not there")
            assert (await echo(port, model="kept")).status == 200

            controllers = (entry("kept", kept), entry("new", new))
            more = {"pool": {"type": "random"}, "upstream_errors": "pass"}
            line = "configuration reloaded; controllers: kept, new"
            reload(program, line, tmp_path, *controllers, **more)
            assert (await echo(port, model="new")).status == 200
            assert (await echo(port, model="old")).status == 404
            go_on.set()
            assert chat_text(await running) == "old"
            reply = await ask(port, "GET", "/admin/controllers")
            lines = {line["name"]: line for line in reply.json()["controllers"]}
            assert set(lines) == {"mock", "kept", "new"}
            assert lines["kept"]["requests"] == 2

            settings = {"controllers": [], "port": 1, "api_key": "other"}
            reload(program, "controllers: none", tmp_path, **settings)
            assert (await echo(port)).status == 200


@needs_posix
async def test_an_edited_controller_keeps_its_list_of_models(tmp_path):
    async with Upstream(with_models("m")) as upstream:
        edited = {**entry("a"), "config": entry("a", upstream)["config"]}
        write_config(tmp_path, edited)
        with program_in(tmp_path) as program:
            assert (await echo(program.port, model="m")).status == 200
            upstream.behave = http_reply(b"busy", 503)
            reload(program, "controllers: a", tmp_path, {**edited, "weight": 2})
            await until(lambda: len(upstream.requests) == 3)  # its list again
            models = (await ask(program.port, "GET", "/v1/models")).json()["data"]
            assert "m" in [model["id"] for model in models]


@needs_posix
async def test_an_edited_controller_keeps_its_limit_and_stays_disabled(tmp_path):
    """Also where its default name goes to another one, which has neither."""
    async with Upstream() as upstream, Upstream() as other:
        one, two = entry("m", upstream), entry("n", other)
        del one["name"], two["name"]
        one["limit"] = "1 requests/month"
        write_config(tmp_path, one)
        with program_in(tmp_path) as program:
            assert (await echo(program.port, model="m")).status == 200
            heavy = {**one, "weight": 2}
            reload(program, "controllers: openai-1, openai-2", tmp_path, two, heavy)
            line = await controller_line(program, "openai-2")
            assert line["reason"] == "its limit of 1 requests/month is used up"
            enable, disable = "/admin/controllers/enable", "/admin/controllers/disable"
            await ask(program.port, "POST", enable, {"name": "openai-2"})
            # At another server, the old name's requests are those of the other one.
            key = (apiserver.hour_text(time.time() // 3600), "ada", "n", "openai-1")
            with open(tmp_path / "usage.jsonl", "ab") as file:
                file.write(apiserver.encode_usage({key: [1] * 5}))
            await asyncio.sleep(1)  # it reads them twice a second
            assert (await controller_line(program, "openai-2"))["state"] == "ready"
            await ask(program.port, "POST", disable, {"name": "openai-2"})
            twin = {**one, "name": "twin"}
            reload(program, "openai-2, twin", tmp_path, two, one, twin)
            line = await controller_line(program, "openai-2")
            assert line["reason"] == "disabled by the administrator"
            assert (await echo(program.port, model="n")).status == 200
            # A copy has a limit of its own.
            await ask(program.port, "POST", enable, {"name": "openai-2"})
            await ask(program.port, "POST", enable, {"name": "twin"})
            assert (await echo(program.port, model="m")).status == 200
            assert (await echo(program.port, model="m")).status == 200


@needs_posix
async def test_a_reload_changes_what_a_tape_does(tmp_path):
    async with Upstream() as upstream:
        up = entry("m", upstream)
        tape = {"type": "tape", "file": "chat.jsonl", "mode": "auto"}
        write_config(tmp_path, up, tape)
        with program_in(tmp_path) as program:
            port = program.port
            assert (await echo(port, model="m")).status == 200
            tape["mode"] = "replay"
            reload(program, "reloaded; controllers: tape, m", tmp_path, tape, up)
            models = (await ask(port, "GET", "/v1/models")).json()["data"]
            assert [model["id"] for model in models] == ["m"]
            assert (await echo(port, model="m")).status == 200
            assert (await echo(port, model="m", stream=True)).status == 404
            reload(program, "reloaded; controllers: m", tmp_path, up)
            assert (await echo(port, model="m")).status == 200
            (tmp_path / "chat.jsonl").write_text("no tape")
            reload(program, "not reloaded: .*it is not a tape", tmp_path, tape)
            assert (await echo(port, model="m")).status == 200
        assert len(upstream.requests) == 3


@needs_posix
async def test_sighup_loads_a_renewed_certificate_but_no_bad_one(tmp_path, certificate):
    anybody = ssl._create_unverified_context()

    async def shown(port):
        async with Client(port, tls=anybody) as client:
            return client.writer.get_extra_info("ssl_object").getpeercert(True)

    cert, key = certificate[0].values()
    with program_in(tmp_path, "--tls-cert", cert, "--tls-key", key) as program:
        port = program.port
        old = ssl.PEM_cert_to_DER_cert(TEST_CERT)
        assert await shown(port) == old
        Path(cert).write_text("half of a certificate")
        reload(program, "certificate not reloaded: .*tls_cert.pem")
        assert await shown(port) == old
        Path(cert).write_text(TEST_CERT_WRONG_NAME)
        async with Client(port, tls=anybody) as client:
            program.signal(signal.SIGHUP)
            new = ssl.PEM_cert_to_DER_cert(TEST_CERT_WRONG_NAME)
            end = time.monotonic() + 5
            while await shown(port) != new:
                assert time.monotonic() < end
            assert (await client.request("GET", "/health")).status == 200


@needs_posix
@flow(timeout=30)
async def test_sighup_takes_a_controller_with_an_agents_name_and_changes(tmp_path):
    """An agent's name is a label of its own, which must not confuse a reload."""
    async with Upstream() as one, Upstream(http_reply(completion("two"))) as two:
        write_config(tmp_path, controllers=[])
        with program_in(tmp_path) as program:
            port = program.port
            async with Agent(port, hello=agent_hello(name="gpu", models=[])):
                program.wait_for("agent gpu joined")
                reload(program, "controllers: gpu", tmp_path, entry("gpu", one))
                assert chat_text(await echo(port, model="gpu")) == "Hi there"
                write_config(tmp_path, entry("gpu", two))
                program.signal(signal.SIGHUP)
                end = time.monotonic() + 5
                while chat_text(await echo(port, model="gpu")) != "two":
                    assert time.monotonic() < end, "waited in vain"
                    await asyncio.sleep(0.02)
                agents = (await ask(port, "GET", "/api/connections")).json()
                assert len(agents["connections"]) == 1
        assert "Error" not in program.stderr


async def test_a_slow_tls_client_gets_all_of_a_large_answer(
    tmp_path, certificate, constant
):
    """asyncio's TLS takes a large write whole and calls nothing unsent."""
    constant(LINGER_TIMEOUT=0.1)
    size = 40_000_000  # far more than the kernel takes
    options, context = certificate
    options = {**options, "limits": Limits(keep_alive_timeout=0.1)}
    async with serving(tmp_path, **options) as server:
        server.model("m")(lambda request: "x" * size)
        async with Client(server.port, tls=context) as client:
            body = {**STREAM, "stream": False}
            client.send(request_bytes("POST", CHAT_URL, body))
            for _ in range(5):
                await client.reader.readexactly(1_000_000)
                await asyncio.sleep(0.1)
                assert server.content_size
            await client.reader.readexactly(size - 5_000_000)


@pytest.mark.skipif(sys.platform != "linux", reason="measures Linux's buffers")
async def test_a_slow_tls_client_gets_the_end_of_a_last_answer(
    tmp_path, certificate, constant
):
    constant(LINGER_TIMEOUT=0.1)
    options, context = certificate
    close = [("Connection", "close")]
    data = request_bytes("POST", CHAT_URL, CHAT, headers=close)

    def fetch_slowly(port):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", port))
            with context.wrap_socket(sock, server_hostname="127.0.0.1") as tls:
                tls.sendall(data)
                time.sleep(0.5)  # longer than LINGER_TIMEOUT
                return b"".join(iter(lambda: tls.recv(1 << 20), b""))

    async with serving(tmp_path, **options) as server:
        server.model("m")(lambda request: "x" * 100_000)
        answer = await asyncio.to_thread(fetch_slowly, server.port)
    assert answer.count(b"x") >= 100_000


async def test_a_tls_handshake_that_never_ends_is_dropped(tmp_path, certificate):
    tasks = asyncio.all_tasks()
    async with serving(tmp_path, **certificate[0]) as server:
        known = asyncio.all_tasks()
        silent = socket.create_connection(("127.0.0.1", server.port))
        await until(lambda: asyncio.all_tasks() - known)
    with silent:
        assert not asyncio.all_tasks() - tasks


@needs_posix
def test_settings_for_a_restart_are_compared_with_those_in_force(tmp_path):
    changed = {"users": "other.json", "metrics": {"users": True}}
    with program_in(tmp_path) as program:
        for name, settings in (("one", changed), ("two", changed), ("three", {})):
            reload(program, f"controllers: {name}$", tmp_path, entry(name), **settings)
    assert program.stderr.count("only a restart changes users, metrics.users") == 2


@needs_posix
@flow(timeout=30)
async def test_sighup_changes_limits_and_forgets_no_state(tmp_path):
    async with Upstream(upstream_hangs) as hangs, Upstream() as upstream:
        kept = entry("kept", hangs)
        m = entry("m", upstream, limit={"requests": 1, "per": "month"})
        write_config(tmp_path, kept, m)
        with program_in(tmp_path) as program:
            port = program.port
            reply = await ask(port, "GET", "/", headers=HTML)
            assert reply.headers["content-type"].startswith("text/html")
            assert (await echo(port, model="m")).status == 200
            assert (await echo(port, model="m")).status == 503
            more = {
                "page": False,
                "store": "sha256",
                "default_limit": "1 requests/day",
                "limits": {"first_byte_timeout": 0.2, "connections": 9},
            }
            line = "only a restart changes limits.connections"
            reload(program, line, tmp_path, kept, {**m, "weight": 2}, **more)
            program.wait_for("reloaded; controllers: kept, m")
            assert (await echo(port, model="m")).status == 503
            assert (await asyncio.wait_for(echo(port, model="kept"), 10)).status == 504
            reply = await ask(port, "GET", "/", headers=HTML)
            assert reply.headers["content-type"].startswith("text/plain")
            reply = await ask(port, "POST", "/admin/users/add", {"admin_key": KEY})
            token = reply.json()["token"]
            assert token not in (tmp_path / "users.json").read_text()
            statuses = [(await echo(port, key=token)).status for _ in range(2)]
            assert statuses == [200, 429]
        assert "Error" not in program.stderr


@needs_posix
def test_a_closed_terminal_ends_the_server(tmp_path):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    with program_in(tmp_path, stdin=theirs) as program:
        # Sent by a person, for the terminal is there.
        reload(program, "configuration reloaded")
        os.close(theirs)
        os.close(ours)
        reload(program, "shutting down .SIGHUP")


def test_the_start_screen_is_whole_with_many_controllers(tmp_path):
    names = [f"a-long-name-for-a-controller-{n}" for n in range(300)]
    write_config(tmp_path, *map(entry, names))
    with program_in(tmp_path) as program:
        program.wait_for("SHA-256 of agent.py")
        assert names[19] in program.stderr and "and 280 more" in program.stderr
        assert "mock/echo" in program.stderr


# -----------------------------------------------------------------------------
# Agent
# -----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def agents_do_not_wait(constant):
    """Agents redial and look at their servers again within a test's time."""
    constant(REDIAL_FIRST=0.05, REDIAL_MAX=0.2, LOOK_INTERVAL=0.02)


class AgentLog(list):
    """A log that keeps its lines."""

    report = write = list.append

    def has(self, text):
        return any(text in line for line in self)


@contextlib.asynccontextmanager
async def agent_of_all(urls, *controllers, **options):
    """An agent of several servers at work, its lines in agent.log."""
    options = {"key": KEY, "name": "box", **options}
    options.setdefault("log", AgentLog())
    options.setdefault("controllers", controllers or None)
    agent = apiserver.Agent(*urls, **options)
    agent.log = options["log"]
    agent.task = asyncio.ensure_future(agent.serve_forever())
    try:
        yield agent
    finally:
        agent.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await agent.task


@contextlib.asynccontextmanager
async def agent_of(server, *controllers, **options):
    """An agent of one server (or a port), once it is registered."""
    port = getattr(server, "port", server)
    async with agent_of_all([f"127.0.0.1:{port}"], *controllers, **options) as agent:
        if server is not port:
            await until(lambda: agent.id in server.agents)
        yield agent


def link_of(agent):
    """Its one connection."""
    (link,) = agent.links.values()
    return link


class AgentServer:
    """A fake server that speaks bytes to one agent after the other."""

    def __init__(self, status=101):
        self.status, self.heads, self.said = status, [], []

    async def __aenter__(self):
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info):
        self.server.close()
        if self.heads:
            self.writer.transport.abort()

    async def _serve(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.heads.append(head)
        self.writer = writer
        if self.status != 101:
            closing = [("Connection", "close")]
            writer.write(http_reply(b"", self.status, headers=closing))
            writer.close()
            return
        key = head.split("Sec-WebSocket-Key: ")[1].split("\r\n")[0]
        writer.write(ACCEPTED.replace(b"%b", apiserver.accept_key(key).encode()))
        self.protocol = WebSocketProtocol(SERVER)
        self.send("fresh-id", "Connection id")
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                events = self.protocol.receive(data)
                self.said += [json.loads(e[1]) for e in events if e[0] is TEXT]

    def send(self, id, message, data=""):
        data = data if isinstance(data, str) else json.dumps(data)
        text = json.dumps({"id": id, "message": message, "data": data})
        self.writer.write(self.protocol.send(text))

    async def heard(self, *messages, id=None):
        """The first message of these kinds (for an id) that the agent has sent."""

        def found():
            said = (s for s in self.said if id in (None, s["id"]))
            return [s for s in said if s["message"] in messages]

        return (await until(found))[0]

    def ask(self, id, path=CHAT_URL, body=CHAT, **more):
        data = {"method": "POST", "path": path, "body": body, **more}
        self.send(id, "ApiRequest", data)

    async def request(self, id, path, body=CHAT, **more):
        """The agent's answer to an ApiRequest: the head and the content."""
        self.ask(id, path, body, **more)
        await self.heard("ApiEnd", "error", id=id)
        mine = [said for said in self.said if said["id"] == id]
        heads = [json.loads(s["data"]) for s in mine if s["message"] == "ApiResponse"]
        content = "".join(s["data"] for s in mine if s["message"] == "ApiData")
        return (heads or [None])[0], content


def agent_hello(**more):
    """A version 2 agent's announcement, for the harness's Agent."""
    return json.dumps({"version": 2, "name": "fake", "models": ["m"], **more})


async def agent_call(agent):
    """The next ApiRequest that the harness's Agent gets: its id and its data."""
    while True:
        message = await agent.receive()
        if message["message"] == "ApiRequest":
            return message["id"], json.loads(message["data"])


async def agent_upstream(request, writer):
    """An upstream that has everything: a list, chats, embeddings, sound."""
    events = [chunk("Hi "), chunk("thé"), chunk("re"), chunk(None, "stop"), DONE]
    for word, answer in (
        ("/speech", http_reply(bytes(range(256)) * 300, content_type="audio/mpeg")),
        ("/embeddings", http_reply({"data": [], "text": "日本" * 30000})),
        ("/transcriptions", http_reply({"text": str(len(request.content))})),
        ("/models", http_reply({"data": [{"id": "m"}, {"id": "n"}]})),
    ):
        if word in request.line:
            return writer.write(answer)
    await by_words({'"stream": true': streams(*events)})(request, writer)


# An upstream that begins a stream, and does not end it.
agent_begins = by_words(
    {'"stream": true': sends(STREAM_HEAD, chunked(chunk("Hi ")), 20)}, usual=sends(20)
)


def says_hi():
    return FunctionController(lambda request: "Hi", models=["m"])


@contextlib.asynccontextmanager
async def agent_before(tmp_path, behave, models=("m",), **options):
    """A server, an agent of it and the agent's upstream: all three."""
    async with Upstream(behave) as upstream, serving(tmp_path, **options) as server:
        made = upstream.controller(models=models and list(models))
        async with agent_of(server, made) as agent:
            yield server, agent, upstream


@contextlib.contextmanager
def agent_program(tmp_path, *options, command=f"{sys.executable} -c print(1)"):
    """Two programs: a server, and an agent of it that runs a command as model "m"."""
    options += ("--key", KEY, "--command", command, "--models", "m")
    with program_in(tmp_path) as server:
        url = f"http://127.0.0.1:{server.port}"
        with Program("agent", url, *options, cwd=tmp_path) as agent:
            yield server, agent


@cases(
    "scheme, tls, words, cure",
    ("https", False, "it does not speak TLS (", "; is it http?"),
    ("http", True, "it closed the connection without an answer", "; is it https?"),
    ("https", True, "its certificate is not trusted (unable to get local issuer", ""),
)
async def test_a_wrong_scheme_is_reported_with_its_cure(
    tmp_path, certificate, scheme, tls, words, cure
):
    """To clients that want an upstream's model, and by an agent."""
    async with serving(tmp_path, **(certificate[0] if tls else {})) as far:
        url = f"{scheme}://127.0.0.1:{far.port}"
        upstream = OpenAIController("", base_url=f"{url}/v1", name="up", models=["m"])
        async with serving(tmp_path, upstream) as server:
            message = chat_error(await chat(server))["message"]
            assert f"up: {words}" in message and cure in message
        async with agent_of_all([url], FunctionController(str, models=["f"])) as agent:
            await until(lambda: agent.log.has(f"cannot be reached: {words}"))
            assert agent.log.has(cure)


async def test_an_agent_answers_whole_and_streamed(tmp_path):
    made = agent_before(tmp_path, agent_upstream, None)
    async with made as (server, agent, upstream):
        assert (await chat(server)).json() == completion()
        assert stream_text(await chat(server, stream=True)) == "Hi thére"
        assert agent.log.has("as box, serving m, n")
        listed = await ask(server.port, "GET", "/v1/models")
        assert {"m", "n"} < {m["id"] for m in listed.json()["data"]}
        # One connection to the upstream: no call was cut at its end.
        assert upstream.connections == 1


async def test_an_agent_carries_any_path_and_any_content(tmp_path):
    async with agent_before(tmp_path, agent_upstream, None) as (server, _, upstream):
        body = {"model": "n", "input": "x", "new_field": 0.0}
        reply = await ask(server.port, "POST", "/v1/embeddings", body)
        assert reply.json()["text"] == "日本" * 30000
        assert upstream.requests[-1].json() == body
        reply = await ask(server.port, "POST", "/v1/audio/speech", body)
        assert reply.content == bytes(range(256)) * 300
        assert reply.headers["content-type"] == "audio/mpeg"
        form = b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n'
        form += b"--B\r\n\r\n" + bytes(range(256)) + b"\r\n--B--\r\n"
        fields = [("Content-Type", FORM), ("OpenAI-Beta", "v=1")]
        path = "/v1/audio/transcriptions?x=%20"
        reply = await ask(server.port, "POST", path, form, headers=fields)
        assert reply.json() == {"text": str(len(form))}
        seen = upstream.requests[-1]
        assert seen.content == form and seen.headers["openai-beta"] == "v=1"
        assert seen.headers["authorization"] == "Bearer UPSTREAMSECRET"
        assert seen.line.startswith(f"POST {path} ")


@cases("status", 400, 429)
async def test_an_agents_upstream_refuses_and_the_client_sees_why(tmp_path, status):
    answer = error_reply(status, "it is bad")
    answer = answer.replace(b"\r\n", b"\r\nRetry-After: 7\r\n", 1)
    made = agent_before(tmp_path, answer, upstream_errors="pass")
    async with made as (server, _, _):
        reply = await chat(server)
        assert reply.status == status and b"it is bad" in reply.content
        assert status == 400 or reply.headers["retry-after"] == "7"


async def test_an_agents_upstream_may_refuse_stream_options(tmp_path):
    usual = streams(chunk("Hi", "stop"), DONE)
    refusal = error_reply(400, "stream_options?")
    behave = by_words({"stream_options": refusal}, usual)
    async with agent_before(tmp_path, behave) as (server, _, upstream):
        for asked in (3, 4):  # the server and the agent learn it once each
            reply = await chat(server, stream=True)
            assert reply.status == 200 and len(upstream.requests) == asked


async def test_a_slow_client_of_an_agent_holds_up_no_other(server):
    async def flood(request):
        for _ in range(300 if request["messages"][0]["content"] == "much" else 2):
            yield "x" * 60_000

    async with agent_of(server, FunctionController(flood, models=["m"])):
        async with posting(server, chat_body("much", stream=True)) as slow:
            await slow.read_head()
            slow.writer.transport.pause_reading()
            with takes(0, 5):
                asks = (chat(server, stream=True) for _ in range(20))
                for reply in await asyncio.gather(*asks):
                    assert reply.status == 200 and reply.events()[-1] == "[DONE]"
            # 18 MB are more than the 8 MiB that wait for one call, and than
            # what sockets hold: the client gets an error, and its call is cut.
            (controller,) = server.agents.values()
            await until(lambda: not controller._calls)
            slow.writer.transport.resume_reading()
            text = (await slow.reader.read()).decode()
            assert "client_too_slow" in text and "[DONE]" not in text
            assert (await chat(server, stream=True)).status == 200


async def test_a_client_that_leaves_ends_the_work_of_the_agents_upstream(tmp_path):
    async with agent_before(tmp_path, agent_begins) as (server, agent, upstream):
        for count, body in ((1, CHAT), (2, STREAM)):
            async with posting(server, body) as client:
                await until(lambda count=count: len(upstream.requests) == count)
                if body is STREAM:
                    await client.read_head()
            await until(lambda count=count: upstream.ended == count, 1)
            await until(lambda: not link_of(agent).calls)
        assert agent.id in server.agents  # and stays


async def test_an_agent_that_dies_in_mid_stream_is_an_error_event(tmp_path):
    async with agent_before(tmp_path, agent_begins) as (server, agent, upstream):
        async with posting(server) as client:
            await client.read_head()
            await until(lambda: link_of(agent).calls)
            link_of(agent).websocket.connection.reset()
            text = (await client.reader.read()).decode()
            assert '"code": "agent_lost"' in text and "[DONE]" not in text
            await until(lambda: upstream.ended == 1)


async def test_what_an_agent_drops_before_the_first_byte_goes_to_another(server):
    asked = []

    async def die(request):
        asked.append("first")
        link_of(first).websocket.connection.reset()
        await asyncio.sleep(20)

    async def answer(request):
        asked.append("second")
        return "from the second"

    async with agent_of(server, FunctionController(die, models=["m"])) as first:
        async with agent_of(server, FunctionController(answer, models=["m"])):
            while "first" not in asked:
                assert chat_text(await chat(server)) == "from the second"
            assert asked[-2:] == ["first", "second"]


async def test_an_agent_comes_back_to_a_restarted_server_with_its_id(tmp_path):
    async with contextlib.AsyncExitStack() as stack:
        async with serving(tmp_path) as server:
            agent = await stack.enter_async_context(agent_of(server, says_hi()))
            port, id = server.port, agent.id
        assert not agent.task.done()
        again = apiserver.Server(KEY, port=port, users=str(tmp_path / "users.json"))
        async with again:
            await until(lambda: list(again.agents) == [id])
            assert (await chat(again)).status == 200
        closed = [line for line in agent.log if "the connection to" in line]
        assert "1001" in closed[0] and "redialling" in closed[0]


@cases("role, words", (None, "(401)"), ("user", "(403)"))
async def test_a_refused_key_is_logged_once_and_retried(server, constant, role, words):
    constant(REDIAL_MAX=0.02)
    key = (await server.users.add(role=role)).token if role else "wrong"
    log = AgentLog()
    server.access = log.write
    async with agent_of(server.port, says_hi(), key=key) as agent:
        await until(lambda: len(log) > 2)
        assert len(agent.log) == 1 and words in agent.log[0]
        assert "--key" in agent.log[0] and key not in agent.log[0]


async def test_a_draining_agent_finishes_and_gets_no_more(server, client, constant):
    constant(AGENT_RETURN_TIMEOUT=0.05)
    go = asyncio.Event()

    async def wait(request):
        yield "Hi "
        await go.wait()
        yield "there"

    async with agent_of(server, FunctionController(wait, models=["m"])) as agent:
        client.send(request_bytes("POST", CHAT_URL, STREAM))
        await client.read_head()
        (controller,) = server.agents.values()
        agent.request_shutdown()
        await until(lambda: controller not in server.pool.controllers)
        assert (await chat(server)).status == 503 and not agent.task.done()
        go.set()
        text = (await client.reader.readuntil(b"0\r\n\r\n")).decode()
        assert "there" in text and "[DONE]" in text
        await asyncio.wait_for(agent.task, 5)
        assert controller.websocket.close_code == 1001 and not server.agents


async def test_a_second_shutdown_request_ends_an_agent_at_once(server):
    gate = PoolGate(models=["m"])
    async with agent_of(server, gate.controller) as agent:
        asking = asyncio.ensure_future(chat(server))
        await until(lambda: link_of(agent).calls)
        agent.request_shutdown()
        agent.request_shutdown()
        await asyncio.wait_for(agent.task, 5)
        reply = await asking
        assert reply.status == 500 and b"agent_lost" in reply.content


async def test_an_agent_waits_for_its_upstreams_list_and_follows_it(tmp_path, constant):
    constant(MODELS_INTERVAL=0.02)
    names = []

    async def behave(request, writer):
        writer.write(http_reply({"data": [{"id": name} for name in names]}))

    async with Upstream(behave) as upstream, serving(tmp_path) as server:
        controller = upstream.controller(name="up")
        async with agent_of(server.port, controller) as agent:
            await until(lambda: agent.log)
            assert "nothing to serve yet" in agent.log[0] and "up" in agent.log[0]
            assert not server.agents
            names.append("one")
            await until(lambda: server.agents)
            (controller,) = server.agents.values()
            assert list(controller.models) == ["one"]
            names[:] = ["two", "three"]
            await until(lambda: list(controller.models) == ["two", "three"])
            names.clear()
            await until(lambda: controller.models == {})
            assert not controller.serves(None)
            assert agent.log.has("now serving two, three")


async def test_an_agent_logs_what_is_listed_in_place_of_its_models(server):
    async with Upstream(sends(b"", models=("a", "b:latest"))) as upstream:
        found = upstream.controller(name="up")
        async with agent_of(server.port, found, models=["x", "y"]) as agent:
            await until(lambda: agent.log.has("up: it lists a, b:latest, but not x, y"))
            assert not server.agents
        found = upstream.controller(name="up")
        async with agent_of(server, found, models=["b"]) as agent:
            assert agent.log.has("serving b:latest")
        # A list may be incomplete: what is named is served all the same.
        named = upstream.controller(name="up", models={"alias": "x", "b": "b"})
        async with agent_of(server, named, models=["alias", "b"]) as agent:
            assert agent.log.has("serving alias, b")
            assert len(agent.log) == 1


def test_an_agent_finds_the_programs_on_this_machine(monkeypatch):
    agent = apiserver.Agent("http://127.0.0.1:8080")
    urls = [upstream.base_url for upstream in agent.pool.controllers]
    # Not the server itself.
    assert urls == [f"http://127.0.0.1:{port}/v1" for port in (11434, 8000, 1234)]
    agent = apiserver.Agent("http://elsewhere:8080")
    assert len(agent.pool.controllers) == 4


@cases(
    "url, expected",
    ("http://h:8080", "http://h:8080/client/register"),
    ("https://h/", "https://h/client/register"),
    ("ws://h:1", "http://h:1/client/register"),
    ("wss://h/a/b/", "https://h/a/b/client/register"),
    ("h:8080", "http://h:8080/client/register"),
    ("[::1]:8080", "http://[::1]:8080/client/register"),
    ("http://h/k/T", "http://h/k/T/client/register"),
    ("http://h/v1", "http://h/client/register"),
    ("https://h/proxy/v1/", "https://h/proxy/client/register"),
    ("http://h/v1/client/register", "http://h/client/register"),
    ("ws://h/client/register", "http://h/client/register"),
    *((odd, None) for odd in ("", "ftp://h", "http://", "http://h:x", "http://u:p@h")),
    *((odd, None) for odd in ("http://h/\r\nX: y", "http://h/?q")),
)
def test_where_an_agent_dials_in(url, expected):
    if expected is None:
        with pytest.raises(ValueError, match="expected the URL of a server"):
            apiserver.register_url(url)
    else:
        assert apiserver.register_url(url) == expected


PATH_ATTACKS = [
    *r"""/api/tags /v1 /v1/ /v1/../api/tags /v1/x/../../api/tags /v1/.. /v1/.
        /v1//evil.example/x //evil.example/v1/x http://evil.example/v1/x /v1/..%2fapi
        /v1/%2e%2e/api/tags /v1/%252e%252e/x /v1/x%00 /v1/..;/x /v1/x;/../../y
        /v1/\..\x /v1/x#y /v1/ｘ /V1/x @evil.example/v1/x""".split(),
    *("/v1/x y", "/v1/x\r\nHost: evil", "/v1/x HTTP/1.1\r\n\r\nGET /api/tags"),
    *("/v1/x?a\nb", "", None, 7, {"v1": 1}),
]


async def test_a_malicious_server_reaches_nothing_but_the_api():
    async with Upstream(agent_upstream) as upstream, AgentServer() as server:
        async with agent_of(server.port, upstream.controller(models=["m"])):
            await server.heard("Connection id")
            for number, path in enumerate(PATH_ATTACKS):
                head, _ = await server.request(f"c{number}", path)
                assert head["status"] == 400, path
            fields = {"Host": "evil", "authorization": "Bearer evil", "x-a": "b\r\nc"}
            fields.update({"cookie": "c", "x-ok": "1", "x-n": 1, "a b": "c"})
            assert upstream.requests == []
            head, content = await server.request("last", CHAT_URL, headers=fields)
            assert head["status"] == 200 and json.loads(content) == completion()
            (request,) = upstream.requests
            assert request.headers["authorization"] == "Bearer UPSTREAMSECRET"
            assert "evil" not in str(request.headers)
            assert request.headers["x-ok"] == "1"
            assert {"cookie", "x-a", "x-n"}.isdisjoint(request.headers)


NONSENSE = r"""
[]
{}
7
{"message": 1}
{"id": [], "message": "ApiRequest", "data": {}}
{"id": "\ud800", "message": "ping"}
{"id": "a", "message": "ApiCancel", "data": ""}
{"id": "a", "message": "ApiRequest", "data": "[["}
{"id": "a", "message": "ChatGptRequest", "data": "7"}
{"id": "a", "message": "nonsense"}"""


async def test_nonsense_from_a_server_does_not_end_an_agent():
    async with AgentServer() as server, agent_of(server.port, says_hi()):
        await server.heard("Connection id")
        for number, message in enumerate([*NONSENSE.split("\n"), "[" * 10_000]):
            server.writer.write(server.protocol.send(message))
            head, _ = await server.request(f"good {number}", CHAT_URL)
            assert head["status"] == 200 and len(server.heads) == 1, message


@cases("sender", "server", "agent")
async def test_a_flood_of_messages_that_are_logged_is_ended(server, constant, sender):
    """A terminal is not to be filled up from afar, nor a disk."""
    constant(CONTROL_FRAME_BURST=10, CONTROL_FRAME_RATE=0)
    kinds = ["Resume", "Pause"] * 20
    if sender == "agent":
        async with Agent(server, hello=agent_hello(paused=True)) as agent:
            for kind in kinds:
                await agent.send(agent.id, kind)
            await until(lambda: not server.agents)
        return
    async with AgentServer() as fake, agent_of(fake.port, says_hi()) as agent:
        await fake.heard("Connection id")
        for kind in kinds:
            fake.send("id", kind)
        await until(lambda: agent.log.has("ended (1008 too many control frames)"))
        assert sum("d by 127" in line for line in agent.log) == 10


async def test_an_agent_takes_no_more_calls_than_it_announced():
    gate = PoolGate(models=["m"])
    async with AgentServer() as server:
        async with agent_of(server.port, gate.controller, max_concurrency=2) as agent:
            hello = json.loads((await server.heard("Connection id"))["data"])
            expected = {"version": 2, "name": "box", "models": ["m"], "paused": False}
            assert hello == {**expected, "max_concurrency": 2}
            for number in range(5):
                server.ask(f"c{number}")
            refusal = await server.heard("error")
            assert refusal["id"] == "c2" and refusal["data"] == apiserver.AGENT_FULL
            link = link_of(agent)
            assert len(link.calls) == 2
            server.send("c0", "ApiCancel")
            await until(lambda: len(link.calls) == 1)
        assert not link.calls and not agent.links


async def test_a_slow_server_slows_the_upstream():
    made = 0

    async def flood(request):
        nonlocal made
        while True:
            made += 1
            yield "x" * 60_000

    async with AgentServer() as server:
        async with agent_of(server.port, FunctionController(flood, models=["m"])):
            await server.heard("Connection id")
            server.writer.transport.pause_reading()
            server.ask("c", body=STREAM)
            seen = -1
            while seen != made or not made:  # until it stands still
                seen = made
                await asyncio.sleep(0.1)
            assert made * 60_000 < 12 * 1024 * 1024  # what sockets hold
            server.writer.transport.resume_reading()
            await until(lambda: made > seen + 100)


async def test_a_close_without_a_reason_is_logged_as_one():
    async with AgentServer() as server, agent_of(server.port, says_hi()) as agent:
        await server.heard("Connection id")
        server.writer.write(server.protocol.close(1000, ""))
        await until(lambda: agent.log.has(" ended (1000) (redialling)"))


async def test_a_silent_server_is_dropped_and_dialled_again():
    limits = Limits(ping_interval=0.05, pong_timeout=0.05)
    async with AgentServer() as server:
        async with agent_of(server.port, says_hi(), limits=limits) as agent:
            await server.heard("Connection id")
            server.send("its-id", "Connection id", '{"version": 2}')
            await until(lambda: len(server.heads) > 1)
            await until(lambda: server.said[-1]["id"] == "its-id")
            assert agent.log.has("1011 no answer to a ping")


@cases(
    "status, words, longest",
    (404, "is its path right", 1.0),
    (400, "does a proxy forward Upgrade", 1.0),  # nginx without more than proxy_pass
    (426, "does a proxy forward Upgrade", 1.0),
    (301, "redirects", 1.0),
    (503, "503", 0.06),  # a restart is over soon, and a proxy in front answers 503
)
async def test_an_agent_logs_a_servers_refusal_once_and_backs_off(
    constant, monkeypatch, status, words, longest
):
    constant(REDIAL_SOON=0.06, REDIAL_MAX=1.0)
    waits = []
    monkeypatch.setattr(random, "uniform", lambda _, most: waits.append(most) or 0)
    async with AgentServer(status=status) as server:
        async with agent_of(server.port, says_hi()) as agent:
            await until(lambda: len(waits) > 6)
            (line,) = agent.log
            assert words in line and "127.0.0.1" in line
    assert max(waits) == longest


async def test_an_agent_logs_the_name_it_got(server):
    async with agent_of(server, says_hi()) as one, agent_of(server, says_hi()) as two:
        await until(lambda: two.log.has(" calls this agent box-2"))
        names = [server.agents[agent.id].name for agent in (one, two)]
        assert names == ["box", "box-2"] and not one.log.has("calls this agent")


def agent_command(script, **options):
    function = apiserver.command_model([sys.executable, "-c", script], **options)
    return FunctionController(function, name="program", models=["m"])


@cases(
    "script, whole, expected",
    ("import sys; print(sys.stdin.read()[::-1], end='')", False, "olleH"),
    ("import json, sys; print(json.load(sys.stdin)['model'])", True, "m\n"),
    ("print('é' * 99999, end='')", False, "é" * 99999),
    ("import sys; sys.stderr.write('x' * 999999); print(1)", False, "1\n"),
    ids=["text", "json", "much", "complaints"],
)
async def test_a_program_answers(server, monkeypatch, script, whole, expected):
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8")
    async with agent_of(server, agent_command(script, whole=whole)):
        assert chat_text(await chat(server)) == expected


async def test_a_program_that_fails_is_an_error_with_its_status(server, caplog):
    script = "import sys; print('Hi', flush=True); sys.exit('no model here')"
    async with agent_of(server, agent_command(script)):
        reply = await chat(server)
        assert reply.status == 500
        assert reply.json()["error"]["message"].endswith("exited with status 1")
        reply = await chat(server, stream=True)
        assert "Hi" in reply.events()[0] and "status 1" in reply.events()[-1]
        # Its output is for its owner, in the log of its own machine.
        assert "no model here" not in str(reply.events())
        assert "status 1: no model here" in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="process groups")
@cases("seconds", 60, 0)
async def test_a_program_is_killed_with_its_children_when_the_client_leaves(
    tmp_path, seconds
):
    """Also when the program itself has ended."""
    script = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        f"print('Hi', flush=True); time.sleep({seconds})"
    )

    def gone(pid):
        try:
            with open(f"/proc/{pid}/stat") as file:
                return file.read().split()[2] == "Z"  # dead, and not yet collected
        except OSError:
            pass
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            return False
        return True

    async with serving(tmp_path) as server, agent_of(server, agent_command(script)):
        async with Client(server.port) as client:
            client.send(request_bytes("POST", CHAT_URL, STREAM))
            await client.read_head()
            await asyncio.sleep(0 if seconds else 0.5)
        pid = int((tmp_path / "pid").read_text())
        await until(lambda: gone(pid))


async def test_a_finished_call_is_not_cancelled_and_late_messages_are_dropped(server):
    head = json.dumps({"status": 200, "content_type": "text/event-stream"})
    events = HI_EVENTS.decode()
    async with Agent(server, hello=agent_hello()) as agent:
        about = json.loads((await agent.receive())["data"])
        assert about == {"version": 2, "name": "fake"}
        asking = asyncio.ensure_future(ask(server.port, "POST", CHAT_URL, STREAM))
        id, data = await agent_call(agent)
        assert data["method"] == "POST" and data["path"] == CHAT_URL
        await agent.send("unknown", "ApiData", "nobody's")
        await agent.send(id, "ApiResponse", head)
        await agent.send(id, "ApiResponse", head)
        await agent.send(id, "ApiData", events)
        assert (await asking).content == events.encode()
        await agent.send(id, "ApiEnd")
        await agent.send(id, "ApiEnd")
        asking = asyncio.ensure_future(ask(server.port, "POST", CHAT_URL, CHAT))
        message = await agent.receive()
        assert message["message"] == "ApiRequest"  # and no ApiCancel
        await agent.send(message["id"], "error", "no luck")
        reply = await asking
        assert reply.status == 500 and b"fake failed: no luck" in reply.content
        assert reply.json()["error"]["code"] == "agent_error"
        assert agent.id in server.agents


@cases(
    "messages",
    [("ApiResponse", "nonsense")],
    [("ApiResponse", '{"status": "200"}')],
    [("ApiResponse", '{"status": true}')],
    [("ApiResponse", '{"status": 101}')],
    [("ApiResponse", '{"status": 99999}')],
    [("ApiEnd", "")],
    [("ApiData", "{}")],
    [("ApiResponse", '{"status": 200}'), ("ApiEnd", "")],
    [("ApiResponse", '{"status": 200}'), ("ApiData", "<html>"), ("ApiEnd", "")],
    [("ApiResponse", '{"status": 200, "encoding": "base64"}'), ("ApiData", "é")],
    [("ApiResponse", '{"status": 200}'), ("error", "it broke")],
    [("ApiResponse", '{"status": 200}'), ("ChatGptResponse", "{}"), ("ApiEnd", "")],
    [("ApiResponse", '{"status": 503, "retry_after": "x\\r\\ny"}'), ("ApiEnd", "")],
)
async def test_a_broken_agents_call_is_answered_by_another(tmp_path, messages):
    async with Upstream() as upstream, serving(tmp_path) as server:
        server.add(upstream.controller(models=["m"]))
        async with Agent(server, hello=agent_hello()) as agent:
            controller = server.agents[agent.id]
            while not controller.requests:
                asking = asyncio.ensure_future(ask(server.port, "POST", CHAT_URL, CHAT))
                await until(lambda t=asking: controller.requests or t.done())
            id, _ = await agent_call(agent)
            for kind, data in messages:
                await agent.send(id, kind, data)
            assert (await asking).json() == completion()
            assert not controller._calls and controller.in_flight == 0


@cases("kind", "text/plain\r\nSet-Cookie: x", "text/plain" + 100_000 * "x", ids=len)
async def test_an_agents_content_type_cannot_break_the_answer(server, kind):
    head = {"status": 200, "content_type": kind}
    async with Agent(server, hello=agent_hello()) as agent:
        asking = asyncio.ensure_future(ask(server.port, "POST", "/v1/rerank", CHAT))
        id, _ = await agent_call(agent)
        await agent.send(id, "ApiResponse", json.dumps(head))
        await agent.send(id, "ApiData", "Hi")
        await agent.send(id, "ApiEnd")
        reply = await asking
        assert reply.status == 200 and "set-cookie" not in reply.headers
        assert reply.headers["content-type"] == "application/octet-stream"


@cases("status", 204, 205)
@cases("kind", "text/plain", "text/event-stream", "application/json")
async def test_content_after_a_status_without_it_is_dropped(server, status, kind):
    head = json.dumps({"status": status, "content_type": kind})
    async with Agent(server, hello=agent_hello()) as agent:
        asking = asyncio.ensure_future(ask(server.port, "POST", "/v1/rerank", CHAT))
        id, _ = await agent_call(agent)
        for kind, data in (("ApiResponse", head), ("ApiData", "Hi"), ("ApiEnd", "")):
            await agent.send(id, kind, data)
        reply = await asking
        assert (reply.status, reply.content) == (status, b"")
        assert "transfer-encoding" not in reply.headers


@cases("hello", agent_hello(), "")
@flow(limits=Limits(agent_message_size=10_000))
async def test_a_request_too_large_for_an_agent_does_not_end_it(server, hello):
    """Nor does it keep it busy."""
    async with Agent(server, hello=hello) as agent:
        assert (await chat(server, "x" * 10_000)).status == 413
        assert (await states(server))[server.agents[agent.id].name] == "ready"


@flow(limits=Limits(silence_timeout=0.4))
async def test_what_an_agent_sends_just_in_time_is_in_time(server):
    """And so is what comes before its next deadline."""
    head = json.dumps({"status": 200, "content_type": "text/event-stream"})
    async with Agent(server, hello=agent_hello()) as agent:
        async with beside(chat(server, stream=True)) as asking:
            id, _ = await agent_call(agent)
            await agent.send(id, "ApiResponse", head)
            await agent.send(id, "ApiData", chunk("a").decode())
            await asyncio.sleep(0.1)  # the server waits for more
            await agent.send(id, "ApiData", chunk("b").decode())
            time.sleep(0.5)  # the loop finds the message and the timer at once
            await asyncio.sleep(0.1)
            await agent.send(id, "ApiData", (chunk(None, "stop") + DONE).decode())
            await agent.send(id, "ApiEnd")
            assert (await asking).content.endswith(DONE)


async def test_a_hundred_agents_at_once(tmp_path):
    before = asyncio.all_tasks()
    async with serving(tmp_path) as server, contextlib.AsyncExitStack() as stack:
        for _ in range(100):
            await stack.enter_async_context(agent_of(server.port, pool_function("Hi")))
        await handler_agents(server, 100)
        replies = await asyncio.gather(*(chat(server) for _ in range(200)))
        assert {reply.status for reply in replies} == {200}
        counts = [agent.requests for agent in server.agents.values()]
        assert counts == [2] * 100
        # All are cut at once, and come back, some before others have been missed.
        before_cut = set(server.agents.values())
        for agent in before_cut:
            agent.websocket.connection.reset()
        await until(lambda: not before_cut & {*server.agents.values()})
        await handler_agents(server, 100)
        assert len(server.pool.controllers) == 101
    assert asyncio.all_tasks() == before


# --- An agent of several servers


@contextlib.asynccontextmanager
async def two_servers(tmp_path, **options):
    async with serving(tmp_path, **options) as one:
        async with serving(tmp_path, **options) as two:
            yield one, two


def serving_urls(*servers):
    return [f"127.0.0.1:{server.port}" for server in servers]


async def test_an_agent_serves_several_servers_independently(tmp_path):
    async with serving(tmp_path) as one, contextlib.AsyncExitStack() as stack:
        async with serving(tmp_path) as two:
            urls = serving_urls(one, two)
            agent = await stack.enter_async_context(agent_of_all(urls, says_hi()))
            for server in (one, two):
                await until(lambda server=server: agent.id in server.agents)
                assert (await ask(server.port, "POST", CHAT_URL, CHAT)).status == 200
            before = one.agents[agent.id]
        reply = await ask(one.port, "POST", CHAT_URL, CHAT)
        assert reply.status == 200 and one.agents[agent.id] is before
        for url in urls:
            assert agent.log.has(f"connected to {url} as box, serving m")
        assert agent.log.has(f"{urls[1]} ended (1001")
        assert not agent.log.has(f"{urls[0]} ended")


async def test_a_draining_agent_joins_no_server_and_takes_no_call():
    gate = PoolGate(models=["m"])
    async with AgentServer() as one, AgentServer() as two:
        two.send = lambda *message: None  # its greeting comes late
        urls = serving_urls(one, two)
        async with agent_of_all(urls, gate.controller) as agent:
            await one.heard("Connection id")
            one.ask("first")
            await until(lambda: gate.asked and two.heads)
            agent.request_shutdown()
            await one.heard("Drain")
            AgentServer.send(two, "late", "Connection id")
            one.ask("second")
            assert (await one.heard("error", id="second"))[
                "data"
            ] == apiserver.AGENT_FULL
            gate.let()
            await one.heard("ApiEnd", id="first")
            await asyncio.wait_for(agent.task, 5)
            assert two.said == []


async def test_a_call_ends_before_the_next_one_begins(tmp_path, constant):
    """An upstream's last chunk may come late: its agent was "full", for 250 ms."""
    constant(AGENT_FULL_PAUSE=60.0)
    behave = streams(HI_EVENTS, 0.05)
    async with Upstream(behave) as upstream, serving(tmp_path) as server:
        made = upstream.controller(models=["m"])
        async with agent_of(server, made, max_concurrency=1):
            for _ in range(3):
                replies = [chat(server, stream=True) for _ in range(2)]
                for reply in await asyncio.gather(*replies):
                    assert reply.content.endswith(DONE)


async def test_a_cancelled_call_holds_up_no_other(server, constant):
    constant(AGENT_FULL_PAUSE=60.0)

    async def answer(request):
        try:
            yield "Hi"
            if len(request["messages"][-1]["content"]) > 5:
                await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.3)  # as to end a program

    controller = FunctionController(answer, models=["m"])
    async with agent_of(server, controller, max_concurrency=1):
        async with posting(server, chat_body("leaves", stream=True)) as client:
            await client.read_head()
            asking = asyncio.ensure_future(chat(server, "waits"))
            await until(lambda: server.pool.waiting)
        assert (await asyncio.wait_for(asking, 5)).status == 200


async def test_an_agents_maximum_holds_over_all_its_servers(tmp_path):
    gate = PoolGate(models=["m"])
    async with two_servers(tmp_path) as servers:
        urls = serving_urls(*servers)
        async with agent_of_all(urls, gate.controller, max_concurrency=2) as agent:
            for server in servers:
                await until(lambda server=server: agent.id in server.agents)
            asks = [asyncio.ensure_future(chat(s)) for s in (*servers, *servers)]
            await until(lambda: len(gate.asked) == 2)
            await asyncio.sleep(2 * apiserver.AGENT_FULL_PAUSE)
            assert len(gate.asked) == 2 and len(agent._running()) == 2
            gate.let()
            # Requests that found it full have waited, and it was no failure.
            assert {(await asked).status for asked in asks} == {200}
            assert gate.most == 2
            for server in servers:
                full = server.agents[agent.id]
                assert (full.requests, full.failures) == (2, 0)


async def test_a_server_that_found_an_agent_full_gets_its_turn(constant):
    """The other has requests waiting, and asks the moment a call has ended."""
    constant(AGENT_FULL_PATIENCE=0.2)
    gate = PoolGate(models=["m"])
    async with AgentServer() as one, AgentServer() as two:
        urls = serving_urls(one, two)
        async with agent_of_all(urls, gate.controller, max_concurrency=1):
            for server in (one, two):
                await server.heard("Connection id")
            one.ask("first")
            await until(lambda: gate.asked)
            two.ask("too early")
            await two.heard("error", id="too early")
            await asyncio.sleep(0.25)
            two.ask("still full")
            await two.heard("error", id="still full")
            gate.let(1)
            await one.heard("ApiEnd", id="first")
            one.ask("again at once")
            assert await one.heard("error", "ApiEnd", id="again at once") == {
                "id": "again at once",
                "message": "error",
                "data": apiserver.AGENT_FULL,
            }
            gate.let()
            assert (await two.request("at last", CHAT_URL))[0]["status"] == 200
            assert (await one.request("and then", CHAT_URL))[0]["status"] == 200


@flow(limits=Limits(queue_timeout=0.4))
async def test_an_agent_that_is_full_for_too_long_is_a_503(server):
    async with Agent(server, hello=agent_hello()) as agent:
        asking = asyncio.ensure_future(ask(server.port, "POST", CHAT_URL, CHAT))
        for _ in range(2):
            id, _ = await agent_call(agent)
            await agent.send(id, "error", apiserver.AGENT_FULL)
        while not asking.done():
            with contextlib.suppress(asyncio.TimeoutError):
                id, _ = await asyncio.wait_for(agent_call(agent), 0.5)
                await agent.send(id, "error", apiserver.AGENT_FULL)
        reply = await asking
        assert reply.status == 503 and reply.headers["retry-after"] == "1"
        (controller,) = server.agents.values()
        assert controller.failures == 0 and controller.in_flight == 0


@pytest.fixture
def found(monkeypatch):
    """The addresses of pool.example, which is resolved again and again."""
    found = ["127.0.0.2"]
    real = socket.getaddrinfo

    def resolve(host, port, *arguments, **options):
        if host != "pool.example":
            return real(host, port, *arguments, **options)
        if not found:
            raise socket.gaierror("there is no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in found]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(apiserver, "SERVER_LOOK_UP_INTERVAL", 0.02)
    monkeypatch.setattr(apiserver, "REDIAL_SOON", 0.02)
    return found


async def test_an_address_that_is_gone_is_dialled_no_longer(tmp_path, found):
    """Behind a load balancer, a server's addresses change all the time."""
    async with serving(tmp_path, listen="0.0.0.0") as server:
        url = f"http://pool.example:{server.port}"
        async with agent_of_all([url], says_hi()) as agent:
            await until(lambda: agent.id in server.agents)
            first = server.agents[agent.id]
            for number in range(3, 6):
                found.append(f"127.0.0.{number}")
                await until(lambda: len(agent.links) == 2)
                found.pop()
                await until(lambda: len(agent.links) == 1)
            assert first in server.agents.values()


async def test_every_address_of_a_servers_name_is_dialled(tmp_path, found):
    async with contextlib.AsyncExitStack() as stack:
        one = await stack.enter_async_context(serving(tmp_path, listen="127.0.0.2"))
        users = str(tmp_path / "users.json")
        two = apiserver.Server(KEY, port=one.port, listen="127.0.0.3", users=users)
        url = f"http://pool.example:{one.port}"
        async with two, agent_of_all([url], says_hi()) as agent:
            await until(lambda: agent.id in one.agents)
            assert not two.agents
            found.append("127.0.0.3")  # a replica more
            await until(lambda: agent.id in two.agents)
            assert agent.log.has(f"pool.example:{one.port} (127.0.0.3)")
            first = one.agents[agent.id]
            found.clear()  # the name server is down: all goes on
            await asyncio.sleep(0.1)
            assert len(agent.links) == 2 and first in one.agents.values()
            found.append("127.0.0.3")  # one less: it may finish, and is not redialled
            links = agent.links.values()
            await until(lambda: [link.wanted for link in links] == [False, True])
            assert first in one.agents.values()
            first.websocket.connection.reset()
            await until(lambda: len(agent.links) == 1)
            await asyncio.sleep(0.1)
            assert not one.agents and agent.id in two.agents


async def test_an_ending_agent_does_not_wait_to_redial(server, constant, monkeypatch):
    constant(REDIAL_FIRST=60, REDIAL_SOON=60, REDIAL_MAX=60)
    monkeypatch.setattr(random, "uniform", max)
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    urls = [f"127.0.0.1:{server.port}", f"127.0.0.1:{port}"]
    async with agent_of_all(urls, says_hi()) as agent:
        await until(lambda: agent.id in server.agents)
        await until(lambda: agent.log.has("redialling"))
        with takes(0, 0.8):
            agent.request_shutdown()
            await agent.task


async def test_two_ways_to_one_server_are_one_registration(server):
    urls = [f"127.0.0.1:{server.port}", f"localhost:{server.port}"]
    async with agent_of_all(urls, says_hi()) as agent:
        await until(lambda: agent.id in server.agents)
        await asyncio.sleep(0.3)
        assert len(server.agents) == 1 and len(agent.links) == 2
        assert len(agent.log) == 1 and agent.log.has("connected to")
        (link,) = (link for link in agent.links.values() if link.websocket)
        first = server.agents[agent.id]
        link.websocket.connection.reset()  # whichever is free comes at once
        await until(lambda: server.agents.get(agent.id, first) is not first)
        await asyncio.sleep(0.3)
        assert sum(bool(link.websocket) for link in agent.links.values()) == 1


async def test_a_paused_agent_stays_and_gets_no_requests(tmp_path):
    async with two_servers(tmp_path) as servers:
        urls = serving_urls(*servers)
        async with agent_of_all(urls, says_hi(), paused=True) as agent:
            for server in servers:
                await until(lambda server=server: agent.id in server.agents)
                assert (await ask(server.port, "POST", CHAT_URL, CHAT)).status == 503
                state = server.agents[agent.id].describe(0.0)
                assert state["state"] == "paused" and "owner" in state["reason"]
            assert agent.log.has("; paused")
            agent.pause(False)
            for server in servers:
                paused = server.agents[agent.id]
                await until(lambda paused=paused: not paused.paused)
                assert (await ask(server.port, "POST", CHAT_URL, CHAT)).status == 200


@cases(
    "off, on",
    (("agents/pause", {}), ("agents/pause", {"paused": False})),
    (("agents/pause", {"id": "box"}), ("agents/pause", {"id": "box", "paused": False})),
    (("controllers/disable", {}), ("controllers/enable", {})),
    ids=["pause", "by-name", "disable"],
)
async def test_an_agent_stays_paused_when_it_comes_back(tmp_path, off, on):
    async with serving(tmp_path) as server, agent_of(server, says_hi()) as agent:

        async def post(path, more, key=KEY):
            body = {"id": agent.id, "name": server.agents[agent.id].name, **more}
            return (await ask(server.port, "POST", f"/admin/{path}", body, key)).status

        assert await post(*off) == 200
        assert (await ask(server.port, "POST", CHAT_URL, CHAT)).status == 503
        before = server.agents[agent.id]
        before.websocket.connection.reset()
        await until(lambda: server.agents.get(agent.id) not in (None, before))
        reply = await ask(server.port, "POST", CHAT_URL, CHAT)
        assert reply.status == 503
        how = f"or paused; {agent.name}: paused by the administrator"
        assert chat_error(reply)["message"].endswith(how)
        for _ in range(3):
            assert await post(*on) == 200
        assert (await ask(server.port, "POST", CHAT_URL, CHAT)).status == 200
        await until(lambda: agent.log.has("resumed by"))
        # Again when it came back, as its own screen began anew; and no second Resume.
        said = [line.split()[0] for line in agent.log if "d by " in line]
        assert said == ["paused", "paused", "resumed"]
        for wrong, status in ({"id": "x"}, 404), ({"id": None}, 400), ({"id": 7}, 400):
            assert await post("agents/pause", wrong) == status
        assert await post(*off, key="no") == 401


async def test_an_agent_logs_that_its_upstream_refuses_the_key():
    error = {"error": {"message": "no", "code": "invalid_api_key"}}
    async with Upstream(http_reply(error, 401)) as upstream, AgentServer() as server:
        async with agent_of(server.port, upstream.controller(name="up")) as agent:
            await until(lambda: agent.log)
            assert "up: its key is refused (status 401)" in agent.log[0]
            await asyncio.sleep(0.1)
            assert len(agent.log) == 1


async def test_an_endless_list_of_models_does_not_hold_up_an_agent(server):
    async def behave(request, writer):
        writer.write(JSON_HEAD + b"\r\n")
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.01)

    limits = Limits(connect_timeout=0.2)
    async with Upstream(behave) as endless:
        upstream = endless.controller(name="endless", limits=limits)
        async with agent_of(server, upstream, says_hi(), limits=limits):
            assert (await chat(server)).status == 200


# --- As a program


@needs_posix
def test_a_signal_pauses_an_agent_and_resumes_it(tmp_path):
    with agent_program(tmp_path, "--pause") as (server, agent):
        agent.wait_for("; paused")
        for status, line in [(200, "is no longer paused"), (503, "is paused")]:
            agent.signal(signal.SIGUSR1)
            server.wait_for(line)
            assert fetch(server.port, "POST", CHAT_URL, CHAT).status == status


@needs_posix
@cases("action", signal.SIG_DFL, signal.SIG_IGN)
def test_an_agent_ends_with_its_terminal_but_not_under_nohup(tmp_path, action):
    """Or a killed one would leave its running programs behind."""
    ignore = functools.partial(signal.signal, signal.SIGHUP, action)
    options = ("agent", "127.0.0.1:1", "--command", "cat")
    with Program(*options, cwd=tmp_path, preexec_fn=ignore) as agent:
        agent.wait_for("redialling")
        agent.signal(signal.SIGHUP)
        time.sleep(0.2)
        agent.signal(signal.SIGTERM)
        assert agent.end() == 0
        assert ("(SIGHUP)" in agent.stderr) == (action is signal.SIG_DFL)


async def test_an_agent_that_is_piped_in_serves_until_ctrl_c(tmp_path, server):
    """As in `curl .../agent.py | python3 - agent ...`."""
    url = f"ws://localhost:{server.port}/k/{KEY}"
    command = f"'{sys.executable}' -c 'print(42)'"
    options = ["agent", url, "--command", command, "-models", "answer", "-v"]
    with open(MODULE, "rb") as source:
        process = subprocess.Popen(
            [sys.executable, "-", *options],
            cwd=tmp_path,
            stdin=source,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    try:
        await until(lambda: server.agents, 10)
        assert "42" in chat_text(await chat(server, model="answer"))
        process.send_signal(signal.SIGINT)
        _, text = await asyncio.to_thread(process.communicate)
        assert process.returncode == 0, text
        assert "serving answer" in text and "shutting down (SIGINT)" in text
        assert "answer 200" in text and KEY not in text
        await until(lambda: not server.agents)
    finally:
        process.kill()
        process.wait()


@cases(
    "arguments, words",
    ([], "expected the URL of a server"),
    (["h", "--hlep"], "unknown option --hlep"),
    (["h", "--command", "no-such-program"], "there is no such program in PATH"),
    (["h", "--upstream", "ftp://x"], "upstream: expected"),
    (["h", "--upstream", "x", "--command", "y"], "only one of"),
    (["h", "--max-concurrency", "0"], "expected a number"),
    (["h", "--ca-file", "/nonexistent"], "ca-file: expected"),
    (["h", "--config_file", "/nonexistent"], "config_file: expected"),
    (["h", "--key", "a b"], "printable ASCII"),
)
def test_a_mistake_in_an_agents_arguments_is_one_line(arguments, words, capsys):
    assert apiserver.main(["agent", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@cases(
    "upstream, base_url",
    ("localhost:11434", "http://localhost:11434/v1"),
    ("http://h:1/", "http://h:1/v1"),
    ("https://h/v1", "https://h/v1"),
    ("mock", "http://mock/v1"),  # no mocks here
    ("https://h/openai/v2/", "https://h/openai/v2"),
)
def test_an_agents_upstream_may_be_written_as_people_do(upstream, base_url):
    argv = ["h", "--upstream", upstream, "--upstream-key", "K", "--models", "a, b"]
    agent = apiserver.build_agent(argv, {"API_KEY": "T"}, None)
    (controller,) = agent.pool.controllers
    assert controller.base_url == base_url and list(controller.models) == ["a", "b"]
    assert agent.fields == [("Authorization", "Bearer T")]


@cases(
    "argv, expected",
    (["http://h", "SECRET"], "a key goes after --key"),
    (["h", "sk-SECRET-0a1b2c3d"], "a key goes after --key"),
    (["h", "--key", "SECRET\nx"], "key: expected a token: printable ASCII, no space"),
    (["h", "--key", "<API_KEY>"], "key: expected a token"),
)
def test_a_key_in_the_wrong_place_is_not_dialled(argv, expected):
    with pytest.raises(ConfigurationError) as caught:
        apiserver.build_agent(argv, {}, None)
    assert expected in str(caught.value) and "SECRET" not in str(caught.value)


def test_an_agent_dials_several_servers():
    servers = ["my-server", "other:8080", "third.example", "ws://fourth"]
    agent = apiserver.build_agent([*servers, "--key", "k"], {}, None)
    assert len(agent.urls) == 4


def test_an_agent_serves_the_controllers_of_a_configuration(tmp_path):
    """Within its limits."""
    limits = {"request_timeout": 7, "drain_timeout": 3}
    write_config(tmp_path, {"models": ["m"], **OPENAI}, limits=limits)
    options = ["h", "--config_file", str(tmp_path / "chatgpt-apiserver.json")]
    agent = apiserver.build_agent(options, {}, None)
    (controller,) = agent.pool.controllers
    assert isinstance(controller, OpenAIController) and list(controller.models) == ["m"]
    for each in (agent.limits, agent.pool.limits, controller.health.limits):
        assert (each.request_timeout, each.drain_timeout) == (7, 3)
    write_config(tmp_path)
    with pytest.raises(ConfigurationError, match="controllers: expected at least one"):
        apiserver.build_agent(options, {}, None)


def test_the_help_of_an_agent_is_short(capsys):
    with pytest.raises(SystemExit):
        apiserver.main(["agent", "--help"])
    text = capsys.readouterr().out
    assert text.count("\n") <= 30 and max(map(len, text.splitlines())) <= 80
    assert "agent <URL>" in apiserver.HELP


@needs_posix
def test_an_agent_that_sleeps_is_missed_and_comes_back(tmp_path):
    """As a laptop whose lid is closed and opened again."""
    write_config(tmp_path, limits={"ping_interval": 0.3, "pong_timeout": 0.3})
    with agent_program(tmp_path) as (server, agent):
        agent.wait_for("connected to")
        agent.signal(signal.SIGSTOP)
        server.wait_for(r"left \(1011 no answer to a ping\)")
        agent.signal(signal.SIGCONT)
        agent.wait_for("redialling")
        run(until(lambda: server.stderr.count(" joined from ") == 2, 10))
        assert chat_text(fetch(server.port, "POST", CHAT_URL, CHAT)) == "1\n"


@needs_posix
def test_what_goes_wrong_in_an_agent_is_one_line_of_its_log(tmp_path):
    program = tmp_path / "prog"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    with agent_program(tmp_path, command=str(program)) as (server, agent):
        agent.wait_for("connected to")
        program.unlink()
        assert fetch(server.port, "POST", CHAT_URL, CHAT).status == 500
        agent.wait_for(r"prog failed.*FileNotFoundError in ")
        assert "Traceback" not in agent.stderr


# -----------------------------------------------------------------------------
# Configuration and command line
# -----------------------------------------------------------------------------

OPENAI = {"type": "openai", "config": {"api_key": "sk-SECRET"}}


@pytest.fixture
def load(tmp_path, monkeypatch):
    """load(arguments, environ, file), in an empty folder with this file."""
    monkeypatch.chdir(tmp_path)

    def load(args=("8080", "my-key"), environ=None, file=None):
        if file is not None:
            text = file if isinstance(file, str) else json.dumps(file)
            (tmp_path / "chatgpt-apiserver.json").write_text(text)
        return apiserver.load_config(list(args), environ or {})

    return load


def mistake(load, *args, **kwargs):
    """The line that a wrong configuration ends with; it contains no secret."""
    with pytest.raises(apiserver.ConfigurationError) as caught:
        load(*args, **kwargs)
    line = str(caught.value)
    assert line and len(line.splitlines()) == 1
    assert "SECRET" not in line
    return line


def test_two_arguments_are_enough_and_the_rest_has_defaults(load):
    config = load(["8080", "my-key"])
    assert (config.port, config.api_key, config.listen) == (8080, "my-key", "")
    assert (config.users, config.tls_cert, config.tls_key) == ("users.json", None, None)
    assert (config.pool, config.agents_auth) == ("balanced", None)
    assert (config.upstream_errors, config.controllers) == ("map", [])
    assert (config.path, config.notes, config.verbose) == (None, [], False)
    assert vars(config.limits) == {}


# --- Arguments


@cases(
    "args",
    "8080 k -listen 0.0.0.0",  # the seed's docker-compose
    "8080 k --listen 0.0.0.0",
    "-listen=0.0.0.0 8080 k",
    "8080 --listen 0.0.0.0 k",
    "--listen=0.0.0.0 8080 -- k",
)
def test_options_go_anywhere_with_one_dash_or_two(load, args):
    config = load(args.split())
    assert (config.port, config.api_key, config.listen) == (8080, "k", "0.0.0.0")


def test_a_dash_as_the_key_means_the_environment_variable(load):
    assert load(["80", "-"], {"API_KEY": "from-env"}).api_key == "from-env"
    environ = {"API_KEY": "short", "CHATGPT_APISERVER_API_KEY": "long"}
    assert load(["80", "-"], environ).api_key == "short"
    assert "API_KEY" in mistake(load, ["80", "-"])
    assert load(["8080", "--", "-abc"]).api_key == "-abc"  # after two dashes


@cases("option", "-config_file", "--config_file", "--config-file", "-config-file")
def test_config_file_is_written_with_a_dash_or_underscore(load, tmp_path, option):
    (tmp_path / "a.json").write_text('{"port": 1}')
    assert load([option, "a.json"], {"API_KEY": "k"}).port == 1


@cases(
    "args, expected",
    ([], "python3 chatgpt_apiserver.py 8080 <"),
    (["8080"], "no API key"),
    (["8080", ""], "api_key: expected a key"),
    (["8080", "<API_KEY>"], "api_key: expected a key"),
    (["8080", "SECRET\u00e9"], "printable ASCII, no space or newline"),
    (["8080", "SECRET\n"], "printable ASCII, no space or newline"),
    (["70000", "k"], "port: expected a port from 0 to 65535"),
    (["", "k"], "port: expected"),
    (["1", "k", "--tape", "a.jsonl:rec"], "tape: 'rec' is not a mode, expected "),
    (["\u0668\u0660", "k"], "port: expected"),
    (["SECRET", "8080"], "port: expected a port from 0 to 65535, before the key"),
    (["-1", "k"], "command line: "),
    (["8080", "k", "SECRET"], "expected no more than a port and a key"),
    (["8080", "-SECRET"], "unknown option"),
    (["8080", "k", "--lisen", "::"], "unknown option --lisen"),
    (["8080", "k", "-confg_file=x"], "unknown option --confg_file"),
    (["8080", "k", "-list", "::"], "unknown option"),  # no abbreviations
    (["8080", "k", "--listen"], "--listen: expected one argument"),
    (["8080", "k", "--verbose=SECRET"], "--verbose: ignored explicit argument"),
    (["8080", "k", "--listen", "0.0.0.0:80"], "listen: expected an address without"),
    (["8080", "k", "--listen", "256.0.0.1"], "listen: expected an address"),
    (["8080", "k", "--listen", "a b"], "listen: expected an address"),
    (["8080", "k", "--users", "a\nb"], "users: expected the path"),
    (["8080", "k", "--tls-cert", "."], "tls_cert: expected the path of a readable"),
    (["8080", "k", "--tls-key", __file__], "tls_key: expected a tls_cert"),
    (["--config_file", "no.json"], "no.json: cannot be read: No such file"),
    (["--config_file", ""], "config_file: expected the path of a file"),
)
def test_mistaken_arguments_are_one_line(load, args, expected):
    assert expected in mistake(load, args)


@cases("listen", "", *"0.0.0.0 :: localhost my_host.example-1.com fe80::1%eth0".split())
def test_listen_takes_addresses_and_names(load, listen):
    assert load(["80", "k", "--listen", listen]).listen == listen
    assert load(["80", "k", "--listen", "[::1]"]).listen == "::1"


def test_a_certificate_argument_is_not_paired_with_the_key_in_the_file(load):
    file = {"tls_cert": __file__, "tls_key": __file__}
    assert load(file=file).tls_key == __file__
    config = load(["80", "k", "--tls-cert", __file__], file=file)
    assert (config.tls_cert, config.tls_key) == (__file__, None)


def test_help_is_short_and_names_each_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        apiserver.load_config(["8080", "--help"], {})
    lines = capsys.readouterr().out.splitlines()
    assert caught.value.code == 0
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    defaults = """<port>=8080|<API_KEY>=API_KEY|--listen=this machine only
        |--tls-cert=http|--users=users.json|--tls-key=certificate|-v, --verbose=off
        |--config_file=none|--config_path=/etc/chatgpt-apiserver"""
    for row in defaults.split("|"):
        option, default = row.strip().split("=")
        assert default in text.split(f" {option} ")[-1].split(" --")[0]
    assert "--version" in text and "--help" in text
    assert text.count("python3 chatgpt_apiserver.py") == 4


@cases("help, flags", (apiserver.HELP, ()), (apiserver.AGENT_HELP, ("json", "pause")))
def test_the_help_names_all_options(help, flags):
    list_of_them = help.partition("\noptions,")[2]  # after the examples
    named = {n.replace("-", "_") for n in re.findall("--([a-z_-]+)", list_of_them)}
    others = {*flags, "verbose", "version", "help"}
    for name in named - others:
        assert apiserver.read_arguments([f"-{name}", "x"], help) == ([], {name: "x"})
    for name in others - {"version", "help"}:
        assert apiserver.read_arguments([f"--{name}"], help, flags)[1] == {name: True}
    assert others < named


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit):
        apiserver.load_config(["--version"], {})
    assert apiserver.__version__ in capsys.readouterr().out


# --- Arguments over environment over file over defaults


POOL_TYPE, RANDOM = "CHATGPT_APISERVER_POOL_TYPE", {"pool": {"type": "random"}}


@cases(
    "attribute, args, environ, file, expected",
    ("port", [], {}, {}, 8080),
    ("port", [], {}, {"port": "1"}, 1),  # the seed's
    ("port", [], {"CHATGPT_APISERVER_PORT": "2"}, {"port": 1}, 2),
    ("port", [], {"CHATGPT_APISERVER_PORT": ""}, {"port": 1}, 1),
    ("port", ["3"], {"CHATGPT_APISERVER_PORT": "2"}, {"port": 1}, 3),
    ("port", ["0"], {}, {"port": 1}, 0),
    ("port", ["3"], {"CHATGPT_APISERVER_PORT": "nonsense"}, {}, 3),
    ("listen", [], {}, {"listen": "::1"}, "::1"),
    ("listen", [], {"CHATGPT_APISERVER_LISTEN": "::"}, {"listen": "::1"}, "::"),
    ("listen", ["-listen", "h"], {"CHATGPT_APISERVER_LISTEN": "::"}, {}, "h"),
    ("listen", ["-listen", ""], {"CHATGPT_APISERVER_LISTEN": "::"}, {}, ""),
    ("api_key", [], {}, {"api_key": "f"}, "f"),
    ("api_key", [], {"API_KEY": "e"}, {"api_key": "f"}, "e"),
    ("api_key", [], {"API_KEY": "e", "CHATGPT_APISERVER_API_KEY": "E"}, {}, "E"),
    ("api_key", ["1", "a"], {"API_KEY": "not a key"}, {"api_key": "f"}, "a"),
    ("pool", [], {}, RANDOM, "random"),
    ("pool", [], {}, {"pool": {}}, "balanced"),
    ("pool", [], {POOL_TYPE: "least_busy"}, RANDOM, "least_busy"),
    ("agents_auth", [], {}, {"agents": {"auth": "open"}}, "open"),
    ("upstream_errors", [], {}, {"upstream_errors": "pass"}, "pass"),
    ("verbose", ["-v"], {}, {}, True),
    ("verbose", ["-verbose"], {}, {}, True),
)
def test_arguments_win_over_environment_over_file(
    load, attribute, args, environ, file, expected
):
    environ = {"API_KEY": "k", **environ} if file.get("api_key") is None else environ
    assert getattr(load(args, environ, file), attribute) == expected


@cases(
    "environ, expected",
    ({"CHATGPT_APISERVER_PORT": "SECRET"}, "CHATGPT_APISERVER_PORT: expected"),
    ({"CHATGPT_APISERVER_LISTEN": ":80"}, "APISERVER_LISTEN: expected an address"),
    ({POOL_TYPE: "SECRET"}, 'expected "balanced" or "random" or'),
    ({"API_KEY": "<API_KEY>"}, "environment: API_KEY: expected a key"),
    ({"OPENAI_API_KEY": "SECRET two"}, "environment: OPENAI_API_KEY: expected a key"),
    (
        {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": "api"},
        "OPENAI_BASE_URL: expected",
    ),
    (
        {"OPENAI_API_KEY": "k", "https_proxy": "socks5://u:SECRET@h:1"},
        "environment: https_proxy: expected a proxy such as http://host:port",
    ),
    ({"CONFIG_FILE": "no.json"}, "no.json: cannot be read"),
)
def test_a_mistake_in_the_environment_is_one_line(load, environ, expected):
    assert expected in mistake(load, [], environ)


# --- Where the file is


def test_the_file_is_looked_for_in_order(load, tmp_path):
    """The last place, /etc, is not tried: it is not ours."""
    for port, folder in [(3, "config"), (2, ".config"), (1, ".")]:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "chatgpt-apiserver.json").write_text(f'{{"port": {port}}}')
        assert load([], {"API_KEY": "k"}).port == port
    assert load([], {"API_KEY": "k"}).path == "chatgpt-apiserver.json"


P1, P2 = (f"p{n}/chatgpt-apiserver.json" for n in (1, 2))


@cases(
    "args, environ, expected",
    (["--config_path", "p1"], {"CONFIG_PATH": "p2"}, 1),
    (["--config_path", "p1"], {"CONFIG_FILE": P2}, 1),
    (["--config_path", "p1", "--config_file", P2], {}, 2),
    ([], {"CONFIG_PATH": "p2"}, 2),
    ([], {"CONFIG_PATH": "p2", "CHATGPT_APISERVER_CONFIG_PATH": "p1"}, 1),
    ([], {"CONFIG_FILE": P2, "CONFIG_PATH": "p1"}, 2),
    ([], {"CONFIG_FILE": "", "CONFIG_PATH": ""}, 3),
    ([], {"CHATGPT_APISERVER_CONFIG_FILE": P1, "CONFIG_FILE": P2}, 1),
)
def test_a_named_file_goes_before_the_search(load, tmp_path, args, environ, expected):
    for port, path in ((1, P1), (2, P2)):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text(f'{{"port": {port}}}')
    config = load(args, {"API_KEY": "k", **environ}, {"port": 3})
    assert config.port == expected


def test_a_named_folder_without_the_file_leaves_the_search_to_go_on(load, tmp_path):
    (tmp_path / "empty").mkdir()
    config = load(["80", "k", "--config_path", "empty"], file={"listen": "::"})
    assert config.listen == "::" and config.path == "chatgpt-apiserver.json"


def test_a_file_that_cannot_be_read_is_a_mistake(load, tmp_path):
    """Docker makes a folder when the file to be mounted is not there."""
    file = tmp_path / "chatgpt-apiserver.json"
    file.mkdir()
    assert "chatgpt-apiserver.json: cannot be read" in mistake(load)
    file.rmdir()
    file.write_bytes("{}".encode("utf-16"))
    assert mistake(load) == "chatgpt-apiserver.json: line 1, column 1: not UTF-8"
    assert load(file="\ufeff{}").path == "chatgpt-apiserver.json"


def test_paths_in_a_file_are_relative_to_the_servers_file(load, tmp_path):
    folder = tmp_path / "config"
    (folder / "keys").mkdir(parents=True)
    (folder / "ca.pem").write_text(TEST_CA)
    (folder / "keys" / "a.json").write_text('{"api_key": "a", "ca_file": "ca.pem"}')
    file = {"users": "u.json", "tls_cert": "ca.pem"}
    file["controllers"] = [{"type": "openai", "config_file": "keys/a.json"}]
    (folder / "chatgpt-apiserver.json").write_text(json.dumps(file))
    config = load()
    assert config.users == os.path.join("config", "u.json")
    assert config.tls_cert == os.path.join("config", "ca.pem")
    assert config.controllers[0]["api_key"] == "a"
    assert config.controllers[0]["ca_file"] == os.path.join("config", "ca.pem")


# --- What is in the file


def test_the_seeds_example_is_read(load, tmp_path):
    (tmp_path / "openai.json").write_text('{"api_key": "second"}')
    text = """{"port": "8080", "pool": {"type": "balanced"}, "controllers": [
        {"type": "openai", "weight": 5, "config": {"api_key": "first"}},
        {"type": "openai", "config_file": "openai.json"}]}"""
    one, two = load(file=text).controllers
    assert (one["name"], one["weight"], one["api_key"]) == ("openai-1", 5, "first")
    expected = {"type": "openai", "name": "openai-2", "api_key": "second"}
    assert two == {**expected, "proxy": None}


WITH_PROXY = {"api_key": "k", "proxy": "http://u:p@proxy:3128/"}


@cases(
    "entry, expected",
    *((entry, entry) for entry in ({"weight": 0}, {"name": "gpu"}, {"tier": 2})),
    *(({"models": m}, {"models": m}) for m in (["a", "b"], {"a": "real"})),
    ({"models": ["env:MODEL"]}, {"models": ["real"]}),
    ({"max_concurrency": 4, "account": "x"}, {"max_concurrency": 4, "account": "x"}),
    ({"limit": {"tokens": 9, "per": "day"}}, {"limit": {"tokens": 9, "per": "day"}}),
    ({"config": {"api_key": ""}}, {"api_key": ""}),
    ({"config": {"api_key": "env:KEY"}}, {"api_key": "from-env"}),
    ({"config": WITH_PROXY}, {"api_key": "k", "proxy": "http://u:p@proxy:3128"}),
    *(
        ({"config": {"api_key": "k", **config}}, {"api_key": "k", **config})
        for config in (
            {"base_url": "http://[::1]:11434/v1//"},
            {"verify": False, "first_byte_timeout": 5},
        )
    ),
)
def test_a_controller_has_what_is_written_and_nothing_else(load, entry, expected):
    environ = {"KEY": "from-env", "MODEL": "real"}
    plain = load(file={"controllers": [OPENAI]}).controllers[0]
    written = load(environ=environ, file={"controllers": [{**OPENAI, **entry}]})
    assert written.controllers == [{**plain, **expected}]


def test_limits_are_changed_by_name_and_retired_ones_ignored(load):
    limits = {"redial_max": 3, "header_count": 7, "agents": 3, "head_timeout": 0.05}
    config = load(file={"limits": limits})
    assert config.notes == ["no longer settings, ignored: header_count, redial_max"]
    assert (config.limits.head_timeout, config.limits.agents) == (0.05, 3)
    assert config.limits.head_size == apiserver.Limits.head_size
    assert not hasattr(config.limits, "header_count")
    assert not apiserver.RETIRED_LIMITS & set(vars(Limits))


def test_values_come_from_the_environment(load):
    file = {"port": "env:P", "api_key": "env:K", "users": "env:U"}
    config = load([], {"P": "81", "K": "env:K", "U": "u.json"}, file)
    assert (config.port, config.api_key, config.users) == (81, "env:K", "u.json")


def controllers(*entries):
    return {"controllers": list(entries)}


def openai(**config):
    return controllers({"type": "openai", "config": {"api_key": "SECRET", **config}})


@cases(
    "file, expected",
    # The document
    ("", "line 1, column 1: not JSON"),
    ('{"port": 1,\n "listen" "::"}', "line 2, column 11: not JSON"),
    ('{"port": 1,}', "comma"),  # newer Pythons say so themselves
    ("[]", "expected an object, got a list"),
    ('{"port": 1, "port": 2}', "port: duplicate key"),
    (
        '{"controllers": [{"config": {"api_key": "SECRET", "api_key": "SECRET"}}]}',
        "controllers[0].config.api_key: duplicate key",
    ),
    ('{"port": ' + "9" * 5000 + "}", ""),  # 3.9 and later differ in what
    ("[" * 200_000, "nesting too deep"),
    ('{"limits": {"head_timeout": NaN}}', "limits.head_timeout: expected seconds"),
    ('{"limits": {"head_timeout": 1e999}}', "limits.head_timeout: expected seconds"),
    # Keys
    ({"prot": 1}, "prot: unknown key"),
    ({"API_KEY": "SECRET"}, "API_KEY: unknown key"),
    ({"x\ny": 1}, r'"x\ny": unknown key'),
    ({"limits": {"head_timeuot": 1}}, "limits.head_timeuot: unknown key"),
    ({"head_timeout": 1}, 'head_timeout: unknown key; it belongs in "limits"'),
    ({"base_url": "http://a/v1"}, 'base_url: unknown key; it belongs in "config"'),
    (
        {"limits": {"default_limit": "1 requests/day"}},
        "limits.default_limit: unknown key; it belongs in the outermost object",
    ),
    ({"limits": {"__init__": 1}}, "limits.__init__: unknown key"),
    ({"pool": {"kind": "random"}}, "pool.kind: unknown key"),
    (controllers(OPENAI, {"wieght": 1}), "controllers[1].wieght: unknown key"),
    # Types
    ({"port": None}, "port: expected a port from 0 to 65535, got null"),
    ({"port": True}, "port: expected a port from 0 to 65535, got a boolean"),
    ({"listen": ["::"]}, "without a port, such as 0.0.0.0 or ::, got a list"),
    ({"pool": "x"}, 'pool: expected an object, got a string; write {"type": ...}'),
    ({"agents": "x"}, 'agents: expected an object, got a string; write {"auth": ...}'),
    ({"controllers": {}}, "controllers: expected a list, got an object"),
    (controllers(OPENAI, 5), "controllers[1]: expected an object, got a number"),
    # Values
    ({"port": "80 "}, "port: expected a port from 0 to 65535"),
    ({"api_key": "<API_KEY>"}, "api_key: expected a key of your own"),
    (
        {"pool": {"type": "SECRET"}},
        'pool.type: expected "balanced" or "random" or "least_busy"',
    ),
    ({"agents": {"auth": "none"}}, 'agents.auth: expected "local" or "key" or "open"'),
    ({"upstream_errors": ""}, 'upstream_errors: expected "map" or "pass"'),
    (
        {"limits": {"head_size": 1.5}},
        "limits.head_size: expected a whole number from 0, got a number",
    ),
    ({"limits": {"head_timeout": "5"}}, "expected seconds, above 0, got a string"),
    ({"tls_cert": "\0"}, "tls_cert: expected the path of a readable file"),
    ({"affinity": "no"}, "affinity: expected true or false"),
    # Controllers
    (controllers({"type": "claude"}), 'controllers[0].type: expected "openai"'),
    (controllers({"type": "openai"}), '[0]: expected either "config" or "config_file"'),
    (controllers({"config": {}}), "controllers[0].config.api_key: expected a key"),
    (controllers({"config_file": "no.json"}), "[0].config_file: expected the path"),
    (
        controllers({"config_file": "chatgpt-apiserver.json"}),
        "chatgpt-apiserver.json: controllers: unknown key",
    ),
    (
        controllers({**OPENAI, "name": "openai-2"}, OPENAI),
        "name: controllers[0] has",
    ),
)
def test_a_mistake_in_the_file_is_one_line_with_its_place(load, file, expected):
    line = mistake(load, file=file)
    assert line.startswith("chatgpt-apiserver.json: ") and expected in line


NAMES = '.models: expected ["name"] or {"alias": "name"}, not empty, without patterns'


@cases(
    "key, value, expected",
    ("base_url", "http://a/v1", '.base_url: unknown key; it belongs in "config"'),
    ("config_file", "chatgpt-apiserver.json", ": expected either"),
    ("weight", 10**400, ".weight: expected a whole number"),
    ("max_concurrency", 0, ".max_concurrency: expected a whole number from 1"),
    ("tier", 0, ".tier: expected a whole number from 1"),
    *(("models", odd, NAMES) for odd in ([], "m", ["gpt-4*"], {"gpt-*": "m"})),
    ("models", ["m", 5], ".models[1]: expected"),
    ("models", {"a": ""}, ".models.a: expected"),
    ("limit", {"per": "day"}, ".limit: expected a limit"),
    ("name", "mock", ".name: expected another name"),
    ("name", "a\nb", ".name: expected printable text"),
    ("name", "first", ".name: controllers[0] has"),
)
def test_a_mistake_in_a_controller_has_its_place(load, key, value, expected):
    file = controllers({**OPENAI, "name": "first"}, {**OPENAI, key: value})
    assert f"controllers[1]{expected}" in mistake(load, file=file)


A_KEY = 'expected a key of printable ASCII without spaces or newlines, or "" for none'
BAD_URLS = """api.openai.com/v1 https://u:SECRET@h/v1 https://h/v1?key=SECRET
    https://h:70000/v1 https://h:0/v1 https://[::1/v1 https:///v1"""


@cases(
    "key, value, expected",
    ("weight", 5, 'unknown key; it belongs in "controllers", beside "config"'),
    ("baseurl", "x", "unknown key"),
    ("verify", "no", "expected true or false, got a string"),
    ("api_key", 12345, A_KEY + ", got a number"),
    ("api_key", "SECRET two", A_KEY),
    ("api_key", "env:NOT_SET", "the environment variable NOT_SET is not set"),
    ("api_key", "env:sk-SECRET", "the environment variable named here is not set"),
    ("base_url", "ftp://h", "expected the http or https URL"),
    *(("base_url", url, "expected") for url in [*BAD_URLS.split(), "https://h/v1\n"]),
    ("proxy", "socks5://h:1", "expected a proxy such as http://host:port"),
    ("proxy", "http://u:SECRET@h:1/path", "expected a proxy"),
    ("proxy", "http://u:SEC#RET@h:1", "expected a proxy"),
    ("first_byte_timeout", 0, "expected seconds, above 0"),
    ("ca_file", "no.pem", "expected the path of a file with a certificate (PEM)"),
    ("ca_file", "chatgpt-apiserver.json", "expected the path of a file with a cert"),
)
def test_a_mistake_in_a_config_has_its_place(load, key, value, expected):
    line = mistake(load, file=openai(**{key: value}))
    assert f"controllers[0].config.{key}: {expected}" in line


def test_a_mistake_in_a_config_file_names_that_file(load, tmp_path):
    file = controllers({"type": "openai", "config_file": "a.json"})
    for content in ('{"api_key": 5}', "{}"):
        (tmp_path / "a.json").write_text(content)
        assert mistake(load, file=file).startswith("a.json: api_key: expected a key")


# --- The environment's upstream and proxy


def test_openai_api_key_is_a_controller_when_the_file_has_none(load):
    environ = {"OPENAI_API_KEY": "sk-SECRET", "OPENAI_BASE_URL": "http://ollama/v1/"}
    config = load(environ=environ, file={})
    (controller,) = config.controllers
    assert (controller["name"], controller["api_key"]) == ("openai-1", "sk-SECRET")
    assert controller["base_url"] == "http://ollama/v1/"
    assert config.notes == [
        "controller openai-1 from OPENAI_API_KEY in the environment"
    ]
    ignored = load(environ={"OPENAI_API_KEY": "k"}, file={"controllers": [OPENAI]})
    (note,) = ignored.notes
    assert note == "OPENAI_API_KEY is not used: chatgpt-apiserver.json has controllers"
    del environ["OPENAI_BASE_URL"]
    plain = load(environ=environ, file={"controllers": [OPENAI]})
    assert plain.notes == [] and len(plain.controllers) == 1
    same = load(environ=environ, file={"controllers": []})
    assert same.controllers == plain.controllers


@cases(
    "url, environ, expected",
    ("https://h/v1", {}, None),
    ("https://h/v1", {"https_proxy": "http://p:1/"}, "http://p:1"),
    ("https://h/v1", {"HTTPS_PROXY": "http://p:1"}, "http://p:1"),
    ("https://h/v1", {"https_proxy": "p:1", "HTTPS_PROXY": "q:1"}, "http://p:1"),
    ("https://h/v1", {"https_proxy": "", "HTTPS_PROXY": "http://q:1"}, None),
    ("https://h/v1", {"https_proxy": "p:1"}, "http://p:1"),
    ("https://h/v1", {"http_proxy": "http://p:1"}, None),
    ("http://h/v1", {"https_proxy": "http://p:1"}, None),
    ("http://h/v1", {"https_proxy": "socks5://not:used"}, None),
)
def test_https_proxy_holds_for_https_urls(load, url, environ, expected):
    config = load(environ=environ, file=openai(base_url=url))
    assert config.controllers[0]["proxy"] == expected
    environ = {**environ, "OPENAI_API_KEY": "k", "OPENAI_BASE_URL": url}
    assert load(environ=environ, file={}).controllers[0]["proxy"] == expected


def test_a_controllers_own_proxy_wins_over_the_environments(load):
    environ = {"https_proxy": "http://p:1", "no_proxy": "*"}
    config = load(environ=environ, file=openai(proxy="http://own:1"))
    assert config.controllers[0]["proxy"] == "http://own:1"


NO_PROXIES = "|*|.|h.example.com|EXAMPLE.com|.example.com|ample.com|other.org|com|,| , "
NO_PROXIES += "|other.org, example.com|example.com:8443|example.com:443|[::1]|::1|x*"
NO_PROXIES += "|h.example.com.|..example.com|example.com:"


@cases("host", "h.example.com", "H.Example.Com:8443", "[::1]:443", "[::1]")
def test_no_proxy_means_what_it_means_to_urllib(load, host):
    for no_proxy in NO_PROXIES.split("|"):
        environ = {"https_proxy": "http://p:1", "NO_PROXY": no_proxy}
        config = load(environ=environ, file=openai(base_url=f"https://{host}/v1"))
        bypass = urllib.request.proxy_bypass_environment(host, {"no": no_proxy})
        expected = None if bypass else "http://p:1"
        assert config.controllers[0]["proxy"] == expected, no_proxy


# --- Secrets and nonsense


def test_repr_shows_no_secret(load):
    file = openai(proxy="http://user:SECRET@proxy:1")
    text = repr(load(["80", "SECRET", "-listen", "::"], file=file))
    assert "SECRET" not in text and "openai-1" in text and "::" in text


def mutated(value, rng):
    """A JSON document with one item replaced, renamed or removed."""
    odd = json.loads("""[null, true, 0, -1, 1e400, 1000000000000000000000000000000, "",
        "env:X", "env:", "\\ud800", "x\\ny", [], {}, [[]], {"a": []}, "http://[",
        "<API_KEY>", NaN]""")
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        changed = dict(value)
        item = changed.pop(key)
        if rng.random() < 0.9:
            renamed = rng.choice(["", "\n", key + "x", "\ud800"])
            new = key if rng.random() < 0.9 else renamed
            changed[new] = mutated(item, rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.85:
        index = rng.randrange(len(value))
        return [*value[:index], mutated(value[index], rng), *value[index + 1 :]]
    return rng.choice(odd)


def test_tiers_and_affinity_are_settings(load, tmp_path):
    file = {**controllers({**OPENAI, "name": "a", "tier": 2}), "affinity": False}
    config = load(file=file)
    config.users = str(tmp_path / "users.json")
    pool = apiserver.build_server(config, None).pool
    assert (pool.affinity, pool.find("a").tier) == (False, 2)
    assert apiserver.build_server(load(file={}), None).pool.affinity


def test_mutated_documents_are_a_config_or_one_line(load, tmp_path):
    rng = random.Random(50)
    whole = json.loads(
        """{"port": "8080", "listen": "::", "api_key": "k",
        "users": "u.json", "pool": {"type": "random"}, "agents": {"auth": "key"},
        "limits": {"agents": 1}, "upstream_errors": "pass", "tls_cert": "TLS",
        "tls_key": "TLS", "controllers": [
            {"type": "openai", "name": "a", "weight": 2, "models": {"a": "b"},
                "max_concurrency": 2, "account": "x",
                "limit": {"requests": 1, "tokens": 2, "per": "hour"},
                "config": {"api_key": "SECRET", "base_url": "https://h:1/v1",
                    "proxy": "http://u:SECRET@p:1", "ca_file": "TLS", "verify": false,
                    "first_byte_timeout": 3.5}},
            {"type": "openai", "models": ["m", "n"], "config": {"api_key": ""}}]
        }""".replace("TLS", __file__)
    )
    assert len(load(file=whole).controllers) == 2
    outcomes = set()
    for _ in range(600):
        document = whole
        for _ in range(rng.choice([1, 1, 2, 5])):
            document = mutated(document, rng)
        text = json.dumps(document)
        if rng.random() < 0.2:
            cut = rng.randrange(len(text) + 1)
            odd = rng.choice(["", "\0", '"', "}", "\n", "9" * 99])
            text = text[:cut] + odd + text[cut:]
        try:
            config = load([], {"X": "x", "API_KEY": "k"}, text)
            assert 0 <= config.port <= 65535 and config.api_key and repr(config)
            outcomes.add("config")
        except apiserver.ConfigurationError as error:
            assert len(str(error).splitlines()) == 1 and "SECRET" not in str(error)
            assert str(error).startswith(("chatgpt-apiserver.json: ", "tls_key: "))
            str(error).encode()
            outcomes.add("mistake")
    assert outcomes == {"config", "mistake"}


# -----------------------------------------------------------------------------
# README.md
# -----------------------------------------------------------------------------


def readme():
    return MODULE.with_name("README.md").read_text(encoding="utf-8")


class Block(NamedTuple):
    """A block of README.md, with the number of its first line."""

    line: int
    language: str
    text: str


def readme_blocks():
    text = readme()
    found = re.finditer(r"^```(\w+)\n(.*?\n)```$", text, re.M | re.S)
    return [Block(text[: m.start()].count("\n") + 2, m[1], m[2]) for m in found]


def readme_block(start):
    """The block of README.md that begins so."""
    (text,) = [block.text for block in readme_blocks() if block.text.startswith(start)]
    return text


SERVER_SCRIPT = "import asyncio\nfrom chatgpt_apiserver import Log, Server"
AGENT_SCRIPT = "import asyncio\nfrom chatgpt_apiserver import Agent"
TAPE_COMMAND = f"OPENAI_API_KEY=sk-... python3 {MODULE.name} 8080 secret --tape"
# What the test below does not run, and why.
README_NOT_RUN = {
    "python3 -m venv": "this is how these tests are run",
    "ANTHROPIC_BASE_URL": (
        "wants Claude Code and Codex; 2.1.197 and 0.171.0 were run by hand"
    ),
    SERVER_SCRIPT: "it has a test of its own",
    AGENT_SCRIPT: "it has a test of its own",
    "import pytest, chatgpt_apiserver": "it has a test of its own",
    TAPE_COMMAND: "it has a test of its own",
    "# /etc/systemd": "a test has systemd read it",
    "sudo install": "it changes the machine",
    "docker run": "a test has no Docker",
    "# kubernetes.yaml": "a test has no Kubernetes",
    "# A user's token": "a test has nginx read it",
    "global": "a test has HAProxy read it",
}


class Pasted(Program):
    """A line of shell that goes on running, with all that it has started."""

    def __init__(self, command, **options):
        options["start_new_session"] = True
        super().__init__(command, program=("sh", "-c"), **options)

    def __exit__(self, *exc_info):
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            self._thread.join(5)  # until none of them can say anything
        super().__exit__()


class Newcomer:
    """Somebody who pastes README.md's blocks into a shell, in one folder.

    An address that is an example becomes ours; servers and agents go on running, a
    server until the next one is started.
    """

    def __init__(self, folder, upstream):
        self.folder, self.upstream = folder, upstream
        self.server, self._running = None, []
        self.url = self.said = self.token = self.user_id = ""
        (folder / ".curlrc").write_text("silent\nshow-error\nmax-time = 10\n")
        (folder / MODULE.name).symlink_to(MODULE)
        tls_server_context(folder)
        (folder / "cert.pem").write_text(TEST_CERT)
        (folder / "key.pem").write_text(TEST_KEY)
        python = folder / "python3"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        self.env = {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "CURL_HOME": str(folder),
            "CURL_CA_BUNDLE": str(folder / "ca.pem"),
            "SSL_CERT_FILE": str(folder / "ca.pem"),
            "PYTHONUNBUFFERED": "1",
            "OPENAI_BASE_URL": upstream,
            "FIRST_KEY": "sk-first",
            "SECOND_KEY": "sk-second",
            "https_proxy": "http://127.0.0.1:9",  # nobody asks OpenAI itself
            "no_proxy": "localhost",
        }

    def ours(self, text):
        """A text of README.md with what stands here in place of its examples."""
        for pattern, value in {
            r"https?://(localhost|my-server):8080": self.url,
            r"my-server:8080": self.url.rpartition("/")[2],
            r"http://localhost:(11434|9000)/v1": self.upstream,
            rf"({MODULE.name}) 8080 ": r"\1 0 ",
            r"--key TOKEN$": f"--key TOKEN --upstream {self.upstream}",
            r"^curl (?!-f)": "curl --fail-with-body ",
            r"TOKEN": self.token,
            r'"user_id": "..."': f'"user_id": "{self.user_id}"',
        }.items():
            text = re.sub(pattern, value, text)
        return text

    def paste(self, block):
        """Do with a block what its language says."""
        getattr(self, block.language)(block.text)

    def sh(self, text):
        command = ""
        for line in text.splitlines():
            command += line + "\n"
            try:
                shlex.split(command.replace("\\\n", " \\"))
            except ValueError:
                continue  # it goes on
            self._command(self.ours(command.rstrip()))
            command = ""
        assert not command, command

    def _command(self, command):
        if " agent " in command:
            self.said = self._start(command).wait_for(".*connected to .*")[0]
        elif MODULE.name in command:
            if self.server:
                self._running.remove(self.server)
                self.server.__exit__()
            self.server = self._start(command)
            found = self.server.wait_for(r"listens on (https?)://\S+:(\d+)")
            self.url = f"{found[1]}://localhost:{found[2]}"
        else:
            self.said = self._run(command)
            answer = apiserver.read_json(self.said.encode())
            if "/admin/users/add" in command:
                self.token, self.user_id = answer["token"], answer["user_id"]

    def _start(self, command):
        self._running.append(Pasted(command, cwd=self.folder, env=self.env))
        return self._running[-1]

    def close(self):
        for program in self._running:
            program.__exit__()

    def _run(self, command):
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=self.folder,
            env={**os.environ, **self.env},
            capture_output=True,
            text=True,
            timeout=15,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), f"{done.stdout}{done.stderr}"
        return done.stdout

    def text(self, text):
        """It is what the last command has said; dots stand for anything."""
        pattern = ".*".join(map(re.escape, self.ours(text).strip().split("...")))
        assert re.search(pattern, self.said), (text, self.said)

    def json(self, text):
        """A configuration."""
        (self.folder / "chatgpt-apiserver.json").write_text(self.ours(text))
        self._command(self.ours(readme_blocks()[0].text.strip()))
        for controller in json.loads(text)["controllers"]:
            self.server.wait_for(rf"\b{controller['name']}\b")


@pytest.mark.skipif(not shutil.which("curl"), reason="there is no curl")
@flow(timeout=60)
async def test_the_readmes_blocks_do_what_it_says(tmp_path):
    """In its order, in one folder; a mistake in any of them is told with its line."""
    blocks = readme_blocks()
    starts = {
        start: [b for b in blocks if b.text.startswith(start)]
        for start in README_NOT_RUN
    }
    assert {start for start, found in starts.items() if len(found) != 1} == set()
    models = {"data": [{"id": "llama3.1"}, {"id": "qwen3"}]}

    async def serve(request, writer):
        listed = request.line.startswith("GET")
        writer.write(http_reply(models if listed else completion()))

    async with Upstream(serve) as upstream:
        newcomer = Newcomer(tmp_path, upstream.url.replace("127.0.0.1", "localhost"))
        try:
            for block in blocks:
                if not block.text.startswith(tuple(README_NOT_RUN)):
                    try:
                        await asyncio.to_thread(newcomer.paste, block)
                    except Exception as error:
                        raise AssertionError(f"README.md:{block.line}") from error
        finally:
            newcomer.close()


@cases(
    "program, arguments, start, file, bad",
    ("nginx", "-t -c", "# A user's token", "nginx.conf", "warn"),
    ("haproxy", "-c -f", "global", "haproxy.cfg", "WARN"),
    (
        "systemd-analyze",
        "verify --man=no",
        "# /etc/systemd",
        "chatgpt-apiserver@.service",
        "chatgpt-apiserver",
    ),
    (
        "systemd-analyze",
        "verify --man=no",
        "# /etc/systemd, with the lines for TLS",
        "chatgpt-apiserver@.service",
        "chatgpt-apiserver",
    ),
    (
        "systemd-analyze",
        "verify --man=no",
        "# /etc/systemd, with the line for an agent",
        "chatgpt-agent.service",
        "chatgpt-agent",
    ),
)
def test_others_read_the_readmes_lines(tmp_path, program, arguments, start, file, bad):
    if not shutil.which(program):
        pytest.skip(f"there is no {program}")

    def said(*words):
        return subprocess.run(words, capture_output=True, text=True, check=False)

    if program == "haproxy" and re.search(
        r"version (?:1|2\.[0-5])\.", said("haproxy", "-v").stdout
    ):
        pytest.skip("HAProxy is older than 2.6")
    tls_server_context(tmp_path)
    cert = tmp_path / "cert.pem"
    cert.write_text(TEST_CERT + TEST_KEY)
    start, _, change = start.partition(", with the ")
    lines = readme_block(start)
    if change:
        words = " ".join(readme().split())
        more = re.search("^# For TLS append: (--listen .*)$", lines, re.M)[1]
        agent = re.search("with `(ExecStart=[^`]+ agent [^`]+)`", words)[1]
        command = re.search("^ExecStart=.*$", lines, re.M)[0]
        tls = "TLS" in change
        lines = lines.replace(command, f"{command} {more}" if tls else agent)
        lines, count = re.subn("^#Load", "Load", lines, flags=re.M)
        assert count == 2
    lines = lines.replace("/usr/bin/python3", sys.executable)
    lines = lines.replace("/etc/haproxy", str(tmp_path))
    lines = lines.replace("listen 443 ", f"listen unix:{tmp_path}/socket ")
    if program == "nginx":
        lines = re.sub("/etc/letsencrypt/[^;]*", str(cert), lines)
    if program == "nginx":
        begin = f"pid {tmp_path}/pid; error_log {tmp_path}/log; events {{}}\n"
        lines = f"{begin}http {{\n{lines}}}\n"
    (tmp_path / file).write_text(lines)
    done = said(program, *arguments.split(), str(tmp_path / file))
    assert bad not in done.stderr, done.stderr
    assert program == "systemd-analyze" or done.returncode == 0, done.stderr


def test_the_readmes_scripts_serve_as_printed(tmp_path):
    """The server at a port of ours, and the agent with its address and key."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    server = readme_block(SERVER_SCRIPT).replace("8080", str(port))
    agent = readme_block(AGENT_SCRIPT).replace(
        "https://my-server:8080", f"localhost:{port}"
    )
    agent = agent.replace("TOKEN", "my-secret-key").replace('"shout"', '"loud"')
    body = chat_body("hello", "shout"), chat_body("hello", "loud")
    start = functools.partial(
        Program,
        *("-X", "dev", "-W", "error", "-c"),
        program=(sys.executable,),
        cwd=tmp_path,
        env={"PYTHONPATH": str(MODULE.parent)},
    )
    with start(server), start(agent) as program:
        program.wait_for("connected to .*, serving loud")
        for each in body:
            reply = fetch(port, "POST", CHAT_URL, each, key="my-secret-key")
            assert chat_text(reply) == "HELLO"


def readme_table(head):
    """The rows of the table with this head, each a list of its cells."""
    rows = readme().partition(f"\n| {head} ")[2].partition("\n\n")[0].splitlines()
    return [re.split(r" ?\| ?", row)[1:-1] for row in rows[2:]]


def names_in(cells):
    return [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]


def test_the_readmes_tables_have_every_setting_and_no_other():
    def inner_names(shape):
        for key, inner in shape.items():
            if isinstance(inner, dict) and key != "limits":
                yield from [*inner, *inner_names(inner)]

    keys = names_in(row[0] for row in readme_table("key |"))
    assert sorted(keys) == sorted(apiserver.file_keys())
    kinds = {**apiserver.CONTROLLER_KEYS, **apiserver.TAPE_KEYS}
    keys = names_in(row[0] for row in readme_table("key of a controller |"))
    assert sorted(keys) == sorted(kinds)
    inner = {*inner_names(apiserver.file_keys()), *inner_names(kinds)}
    assert [key for key in inner if not re.search(f'[`"]{key}[`"]', readme())] == []


def test_the_readmes_limits_are_the_sources():
    text = " ".join(row[1] for row in readme_table("of |"))
    units = {"KiB": 1024, "MiB": 1024**2, "h": 3600}
    found = re.findall(r"`(\w+)` ([\d.]+) ?([A-Za-z]*)", text)
    told = {name: float(number) * units.get(unit, 1) for name, number, unit in found}
    assert told == {k: v for k, v in vars(Limits).items() if not k.startswith("_")}


def test_the_readme_names_every_route_and_no_other():
    cells = [row[0] for row in readme_table("route |")]
    told = [word for cell in cells for word in re.findall(r"[` ](/[^`]*)`", cell)]
    told = ["/v1/" if path == "/v1/..." else path.replace("{id}", "") for path in told]
    assert sorted(told) == sorted(apiserver.ROUTES)


@flow
async def test_the_readme_names_every_metric_and_no_other(server):
    rows = readme_table("about |")
    told = {apiserver.Metrics.PREFIX + name for name in names_in(r[1] for r in rows)}
    told.update(re.findall("`(process_[a-z_]+)`", readme()))
    names = apiserver.Metrics.METRICS
    there = {apiserver.Metrics.PREFIX + name for name in names}  # once there is one
    text = (await ask(server.port, "GET", "/metrics")).content.decode()
    assert told == there | set(re.findall("^# TYPE ([a-z_]+)", text, re.M))


def test_the_readme_names_every_option_and_variable_and_no_other():
    cells = [row[1] for row in readme_table("key |")]
    told = [name for cell in cells for name in re.findall("`(.*?)`", cell)]
    heads = re.findall("^  [<-].{17}", apiserver.HELP, re.M)
    options = [name for head in heads for name in re.findall("<.*?>|--?[a-z_-]+", head)]
    settings = apiserver.SETTINGS.values()
    variables = [name for setting in settings for name in setting.variables]
    variables += [s.variables[0] for s in apiserver.LOCATION_SETTINGS.values()]
    upstream = ["OPENAI_API_KEY", "OPENAI_BASE_URL"]
    assert sorted(told) == sorted([*options, *variables, *upstream])


def run_pytest(folder, code):
    """Run a test file in a folder; what pytest says."""
    (folder / "test_it.py").write_text(code)
    pytest_options = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
    done = run_python(*pytest_options, "test_it.py", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@flow
async def test_a_readme_tape_is_recorded_once_and_replayed(tmp_path):
    """The command in README.md but for the port, and the fixture with its tape."""
    command = readme_block(TAPE_COMMAND).split()
    assert command[:4] == ["OPENAI_API_KEY=sk-...", "python3", MODULE.name, "8080"]
    key, arguments = command[0].partition("=")[2], ["0", *command[4:]]
    async with Upstream(piecewise([chunk("Hi"), chunk(None, "stop"), DONE])) as up:
        env = {"OPENAI_API_KEY": key, "OPENAI_BASE_URL": up.url}
        with Program(*arguments, cwd=tmp_path, env=env) as program:
            program.wait_for("Tape .*chat.jsonl .auto; recordings: 0")
            reply = await ask(program.port, "POST", CHAT_URL, STREAM, "secret")
            assert reply.status == 200
            await until((tmp_path / "chat.jsonl").read_bytes)  # then it may be killed
    changed = re.search('`(Server\\("secret", .*?tape=.*?) users=', readme())[1]
    code = readme_block("import pytest, chatgpt_apiserver")
    code = code.replace('Server("secret", port=0,', changed)
    code += f"""
import json, urllib.request

def test_replay(base_url):
    for _ in range(2):
        request = urllib.request.Request(
            base_url + "/chat/completions",
            {json.dumps(STREAM).encode()!r},
            {{"Authorization": "Bearer secret"}},
        )
        with urllib.request.urlopen(request) as reply:
            assert reply.read() == {reply.content!r}
"""
    assert "1 passed" in await asyncio.to_thread(run_pytest, tmp_path, code)


def test_a_readme_fixture_serves_each_test(tmp_path):
    """The fixture in README.md, as it stands there."""
    code = readme_block("import pytest, chatgpt_apiserver")
    code += textwrap.dedent("""
        def test_one(base_url):
            assert base_url.startswith("http://127.0.0.1:") and base_url.endswith("/v1")

        def test_two(base_url):
            test_one(base_url)
    """)
    assert "2 passed" in run_pytest(tmp_path, code)


# Run the async tests above that flow() has not decorated, for they have no options.
globals().update(
    {
        name: flow(test)
        for name, test in globals().items()
        if name.startswith("test_") and inspect.iscoroutinefunction(test)
    }
)
