#!/usr/bin/env python3
"""An OpenAI-compatible API in front of upstreams, agents and Python functions.

    python chatgpt_apiserver.py 8080 my-secret-key        start the server
    python chatgpt_apiserver.py --help                    list its options

One file, standard library only, Python 3.9 or newer.  It can also be imported:

    server = Server(api_key="secret", port=0)

    @server.model("shout")
    def shout(request):
        return request["messages"][-1]["content"].upper()

    with server.running() as url:
        ...                               # clients use url + "/v1" as base URL

The file reads downward; a section uses only names defined above it:

    Limits and timeouts      every bound, with its reason
    Errors                   raised anywhere, answered in one place
    HTTP/1.1 messages        bytes in, messages and bytes out; no I/O
    WebSocket                the same for RFC 6455, in both roles
    API messages, events     the same for the OpenAI API's JSON and streams
    Connections              Connection, HTTPClient, WebSocket on asyncio
    Users, limits, usage     users.json; usage.jsonl, counted by the Ledger
    Controllers              upstream, agent, function, tape: one interface
    Pool                     balance, queue, fail over, cool down
    Metrics                  recent requests, and the text for Prometheus
    The page                 what browsers get
    The log                  never blocks on a slow reader
    Conversations            the history behind /api/ask
    Exchange                 one request and its reply
    Routes                   access rules and handlers
    Request handler          a connection's requests, one after the other
    Server                   shared state; sockets, tasks, start and stop
    Agent                    the side that dials in: the handler's mirror
    Configuration            file, environment, command line; main

A request takes one path: Connection receives bytes, parse_request_head() parses
them into a Request, RequestHandler makes it an Exchange, follow_route() authenticates
and reads the content, the route builds an APIRequest, Pool.call() picks a Controller,
and its answer() asks an upstream (HTTPClient), an agent (WebSocket) or a function.
The answer comes back the same way: Answer.read() returns bytes as they arrive,
Call.read() checks and counts them, Reply writes them, Exchange waits for a slow client.

The first event of a stream is awaited before the status is sent: until then, a failed
attempt moves on to another controller or becomes a true HTTP status.  When a client
hangs up, the task serving it is cancelled and closes everything it has opened.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import bisect
import calendar
import codecs
import contextlib
import contextvars
import enum
import errno
import fnmatch
import functools
import gc
import hashlib
import hmac
import http
import inspect
import ipaddress
import itertools
import json
import logging
import math
import os
import random
import re
import secrets
import select
import signal
import socket
import ssl
import stat
import struct
import sys
import threading
import time
import traceback
import urllib.parse
import uuid
import zlib
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
)
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeVar, cast

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__version__ = "1.0.0"
__all__ = [
    "APIError",
    "Agent",
    "ConfigurationError",
    "Controller",
    "FunctionController",
    "Limits",
    "Log",
    "OpenAIController",
    "Server",
    "TapeController",
    "WebSocket",
    "main",
]

T = TypeVar("T")
K = TypeVar("K")
F = TypeVar("F", bound=Callable[..., Any])
JSONObject = dict[str, Any]
logger = logging.getLogger("chatgpt_apiserver")

# -----------------------------------------------------------------------------
# Limits and timeouts
# -----------------------------------------------------------------------------
#
# Sizes are checked before anything is stored.  Every limit can be changed: in Python
# with Limits(head_timeout=5.0), in the configuration file under "limits".  Sizes are
# in bytes, timeouts and intervals in seconds; 0 means "off" only where noted.


class Limits:
    """The limits and timeouts of one server.

    Keyword arguments change them by name.  Raise TypeError for an unknown name,
    and ValueError for a value that is not a number or is out of range.
    """

    # --- Request head.  Read before anything is known about the sender, so kept
    # small; h11 takes 16 KiB, nginx 32.
    head_size = 32 * 1024
    # From accept, or the first byte, to the blank line.  One absolute deadline:
    # a byte now and then does not extend it (slowloris).
    head_timeout = 10.0

    # --- Request content.
    content_size = 32 * 1024 * 1024  # /v1: images and audio come inline
    ask_content_size = 1024 * 1024  # /api/ask: one text message
    admin_content_size = 64 * 1024
    total_content_size = 256 * 1024 * 1024  # with unread answers; half for a user
    content_read_timeout = 15.0  # between two reads
    content_rate = 512  # bytes per second on average, enforced after 10 s

    # --- Connections from clients.
    keep_alive_timeout = 75.0  # as nginx: longer than the proxies in front
    keep_alive_requests = 1000
    write_timeout = 30.0  # a peer that takes no byte for this long is cut off
    connections = 0  # 0: derived from the open file limit, at most 4,096
    requests_in_flight = 4096
    user_requests_in_flight = 0  # 0: off
    user_requests_per_minute = 0  # 0: off

    # --- Waiting for a free controller.
    queue_size = 1024
    queue_timeout = 30.0

    # --- Websockets and agents.
    agents = 4096
    message_size = 4 * 1024 * 1024  # accepted from an agent
    agent_message_size = 48 * 1024 * 1024  # accepted by an agent: request content
    ping_interval = 20.0  # shorter than the 60 s of NATs and proxies
    pong_timeout = 20.0  # any byte counts as an answer
    ask_timeout = 120.0  # silence of a version 1 agent; the original's value

    # --- Upstreams.
    connect_timeout = 10.0  # includes DNS; also for CONNECT and lists of models
    tls_timeout = 10.0
    first_byte_timeout = 300.0
    silence_timeout = 120.0  # between two reads of an answer
    heartbeat_interval = 15.0  # comments to a waiting streaming client; 0: off
    request_timeout = 900.0  # from reading a request to the end of its answer
    response_size = 64 * 1024 * 1024  # an answer that is not streamed
    event_size = 8 * 1024 * 1024  # one event; the unread part of an agent's answer
    idle_upstream_timeout = 30.0  # most servers close idle ones after 60 s or more

    # --- Failing over and cooling down.
    attempts = 3  # different controllers tried for one request
    cool_rate_limited = 10.0  # after a 429 without a usable Retry-After
    cool_rate_limited_max = 300.0
    cool_refused = 5.0  # after a refused connection
    cool_failures = 3  # failures in a row before cooling
    cool_first = 5.0  # doubling each time ...
    cool_max = 60.0  # ... up to this
    disabled_first = 600.0  # quota or key: retried after this, doubling ...
    disabled_max = 6 * 3600.0  # ... up to this

    # --- Stored data.
    conversations = 10_000  # of /api/ask, where the controller keeps none
    conversations_size = 64 * 1024 * 1024
    conversation_lifetime = 24 * 3600.0
    users = 100_000
    users_file_size = 32 * 1024 * 1024
    users_poll_interval = 0.5  # for edits by hand or by another server

    # Docker kills 10 s after SIGTERM; requests in flight may finish before.
    drain_timeout = 8.0

    def __init__(self, **changes: float) -> None:
        for name, value in changes.items():
            if name.startswith("_") or not hasattr(Limits, name):
                raise TypeError(f"there is no limit named {name!r}")
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{name} must be a number")
            if not 0 <= value < 1e12:  # also refuses NaN
                raise ValueError(f"{name} must be a number from 0 to 1e12")
            if isinstance(getattr(Limits, name), int) and value != int(value):
                raise ValueError(f"{name} must be a whole number")
            if value == 0 and name in ABOVE_ZERO:
                raise ValueError(f"{name} must be greater than 0")
            setattr(self, name, value)


# A timeout of 0 would let nothing finish, an interval of 0 would be a busy loop.
ABOVE_ZERO = frozenset(
    name
    for name in vars(Limits)
    if name.endswith(("_timeout", "_interval")) and name != "heartbeat_interval"
) | {"attempts", "cool_failures"}

DEFAULT_LIMITS = Limits()

# Bytes of content handled at once, where the choice is ours.
PIECE_SIZE = 64 * 1024


# -----------------------------------------------------------------------------
# Errors
# -----------------------------------------------------------------------------
#
# Raised where the problem is seen, answered in one place.  Messages are for people:
# what happened and what to do.  None contains a key.


class ProtocolError(Exception):
    """The peer broke HTTP (RFC 9110, 9112); status is for the response."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class WebSocketError(Exception):
    """The peer broke RFC 6455; close_code (section 7.4.1) is for our close frame."""

    def __init__(self, close_code: int, message: str) -> None:
        super().__init__(message)
        self.close_code = close_code


class APIError(Exception):
    """A refused request: the status and error object of the response.

    status       HTTP status, 400 to 599
    message      for people: what happened and what to do
    type         OpenAI's error type; by default the usual one for the status
    param, code  OpenAI's fields, or None
    retry_after  seconds until a retry makes sense, or None
    upstream_status  the upstream's status, if that is the reason

    The log gets reason, never message: that may quote the prompt.
    """

    TYPES: ClassVar = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        429: "rate_limit_error",
    }

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        upstream_status: int | None = None,
    ) -> None:
        super().__init__(message)
        # Functions raise it: a mistake must fail there, and not in the response.
        if not isinstance(status, int) or not 400 <= status <= 599:
            raise ValueError(f"status must be an integer from 400 to 599: {status!r}")
        usual = "server_error" if status >= 500 else "invalid_request_error"
        self.status = status
        self.message = str(message)
        self.type = str(type or self.TYPES.get(status, usual))
        self.param = None if param is None else str(param)
        self.code = None if code is None else str(code)
        self.retry_after = None if retry_after is None else float(retry_after)
        self.upstream_status = upstream_status
        self.reason = f"status {status} {code or self.type}"


class Failure(enum.Enum):
    """What a failed attempt says about its controller."""

    NONE = "nothing: the next request might succeed"
    RATE_LIMITED = "it is rate limited"
    REFUSED = "it refuses connections"
    BROKEN = "it sent a 5xx, timed out or was unreadable: perhaps an accident"
    DISABLED = "its key is invalid or its quota is used up"
    KEY_DOUBTED = "it refused the request, because of the prompt or of the key"
    UNKNOWN_MODEL = "it does not have this model"
    FULL = "nothing: it is busy and will have room again in a moment"


class ControllerError(APIError):
    """A controller failed.  Before any output, another one may be tried.

    The client's status is 500, or 504 if the controller was silent for too long.

    reason   our own words: kept, logged and shown to other users
    detail   the controller's words, if any.  They may quote the request, so only
             its client sees them
    refusal  status, headers and content of an answer that refused the request; the
             client gets it if all other controllers refuse, too
    """

    def __init__(
        self,
        reason: str,
        failure: Failure = Failure.BROKEN,
        *,
        detail: str = "",
        status: int = 500,
        type: str | None = None,
        **fields: Any,
    ) -> None:
        type = type or "upstream_error"
        super().__init__(status, detail or reason, type=type, **fields)
        self.reason = reason
        self.failure = failure
        self.refusal: tuple[int, dict[str, str], bytes] | None = None


class ConfigurationError(Exception):
    """Arguments or a file cannot be used: print one line and exit with 2."""


# -----------------------------------------------------------------------------
# HTTP/1.1 messages (RFC 9110, 9112). No I/O
# -----------------------------------------------------------------------------
#
# One parser for both directions: requests from clients and responses from upstreams
# differ only in the start line.  It is strict, since leniency leads to request
# smuggling: two readers must never disagree on where a message ends.  A parser takes
# bytes off the front of a buffer and returns None when it needs more.

# Sizes are bytes.  nginx takes lines of 8 KiB, Envoy and http.client 100 fields.
REQUEST_LINE_SIZE = 8 * 1024
METHOD_SIZE = 64  # a longer one is 501 (RFC 9112 section 3)
HEADER_LINE_SIZE = 8 * 1024
HEADER_COUNT = 100
RESPONSE_HEAD_SIZE = 64 * 1024
RESPONSE_HEADER_COUNT = 200
CHUNK_LINE_SIZE = 256  # a chunk's size with its extensions
CHUNK_EXTENSIONS_SIZE = 16 * 1024  # in one message; they are ignored
TRAILER_SIZE = 8 * 1024
TRAILER_COUNT = 32
CACHED_HEAD_SIZE = 2048  # larger heads are not cached
CACHED_LINE_SIZE = 256  # longer lines are not: they would let anybody fill the memory

_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_REQUEST_LINE = re.compile(rf"({_TOKEN}) ([\x21-\x7e]+) HTTP/([0-9]\.[0-9])", re.ASCII)
_LINE_START = re.compile(rf"({_TOKEN}( |$)|\r?$)".encode())
_STATUS_LINE = re.compile(
    r"(HTTP/1\.[01]) ([1-5][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*)?", re.ASCII
)
# Rejects obs-fold, a space before the colon, bare CR or LF, NUL and all other control
# characters but HTAB.  Unambiguous, so a mismatch is found in linear time.
_FIELD_LINE = re.compile(rf"({_TOKEN}):([\t\x20-\x7e\x80-\xff]*)", re.ASCII)
_CONTROLS = bytes((*range(9), *range(10, 32), 127))  # all but HTAB
_LENGTH = re.compile(r"[0-9]{1,15}", re.ASCII)
_LENGTH_LINE = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: ([0-9]{1,15})\r\n")
_HOST = re.compile(
    r"(?:(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+|\[[0-9A-Fa-f:.]+\])"
    r"(?::[0-9]{0,5})?",
    re.ASCII,
)
_ABSOLUTE = re.compile(r"https?://([^/?]*)(.*)", re.ASCII | re.IGNORECASE)
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})([ \t]*;[\t\x20-\x7e\x80-\xff]*)?")

# Fields that make a message ambiguous when repeated, even with equal values.
_SINGLE_FIELDS = frozenset(
    "authorization content-length content-type host sec-websocket-key"
    " sec-websocket-version transfer-encoding upgrade".split()
)
# Fields for the next hop only (RFC 9110 section 7.6.1).
HOP_BY_HOP = frozenset(
    "connection keep-alive proxy-authenticate proxy-authorization proxy-connection"
    " te trailer transfer-encoding upgrade".split()
)
REASONS = {status.value: status.phrase for status in http.HTTPStatus}


class Headers(dict[str, str]):
    """Header fields by name in lower case; repeated ones are joined with ", "."""

    relayed: dict[str, str] | None = None  # the fields to forward, once computed

    def tokens(self, name: str) -> list[str]:
        """Return the members of a comma-separated field, in lower case."""
        return [item.strip().lower() for item in self.get(name, "").split(",")]


class Request(NamedTuple):
    """The head of a request."""

    method: str
    target: str
    version: str  # "HTTP/1.1" or "HTTP/1.0"
    path: str  # still percent-encoded
    query: str
    headers: Headers  # without Content-Length; shared by equal requests
    content_length: int | None  # bytes, or None if the content is chunked


class Response(NamedTuple):
    """The head of a response."""

    version: str
    status: int
    headers: Headers


def keeps_alive(head: Request | Response) -> bool:
    """Whether the connection may stay open after a message (RFC 9112 section 9.3)."""
    headers = head.headers
    tokens = headers.tokens("connection") if "connection" in headers else ()
    if head.version == "HTTP/1.1":
        return "close" not in tokens
    asked = isinstance(head, Request) and "keep-alive" in tokens
    return asked and "close" not in tokens


def _take_head(buffer: bytearray, max_size: int) -> list[str] | None:
    """Take the lines of a complete head (or trailers); ProtocolError if too large."""
    # A head may arrive byte by byte, and each byte searches all of it: rfind takes
    # 4 us for 32 KiB, find 14, a regex 200.
    if buffer.rfind(b"\r\n\r\n", 0, max_size) < 0:
        # After any other blank line, the sender believes that the head is complete.
        blank = (buffer.rfind(line, 0, max_size) for line in (b"\n\n", b"\n\r\n"))
        if buffer.startswith(b"\n") or max(blank) >= 0:
            raise ProtocolError(400, "lines must end in CR LF")
        if len(buffer) >= max_size:
            raise ProtocolError(431, f"the head is over {max_size} bytes")
        return None
    end = buffer.find(b"\r\n\r\n")
    lines = buffer[:end].decode("latin-1").split("\r\n")
    del buffer[: end + 4]
    return lines


def _parse_field(line: str) -> tuple[str, str]:
    match = _FIELD_LINE.fullmatch(line)
    if match is None:
        raise ProtocolError(400, "a header field is malformed")
    return match[1].lower(), match[2].strip("\t ")


# Clients repeat most lines in every request: from the cache, one takes 0.1 us, not 0.5.
_cached_field = functools.lru_cache(maxsize=1024)(_parse_field)


def parse_fields(lines: list[str], max_count: int, max_line: int) -> Headers:
    """Parse field lines, given without CRLF (RFC 9112 section 5).

    Raise ProtocolError(400) for a malformed line and for a field that must not be
    repeated, ProtocolError(431) for too many fields or one that is too long.
    """
    if len(lines) > max_count:
        raise ProtocolError(431, f"more than {max_count} header fields")
    if sum(map(len, lines)) > max_line and max(map(len, lines)) > max_line:
        raise ProtocolError(431, f"a header field is over {max_line} bytes")
    fields = [
        _cached_field(line) if len(line) <= CACHED_LINE_SIZE else _parse_field(line)
        for line in lines
    ]
    headers = Headers(fields)
    if len(headers) < len(fields):
        headers.clear()
        for name, value in fields:
            if name in headers and name in _SINGLE_FIELDS:
                raise ProtocolError(400, f"more than one {name} field")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def _parse_request_line(line: str) -> tuple[str, str, str]:
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise ProtocolError(400, "the request line is malformed")
    method, target, version = match.groups()
    if len(method) > METHOD_SIZE:
        raise ProtocolError(501, "the method is too long")
    if version not in ("1.1", "1.0"):
        raise ProtocolError(505, "only HTTP/1.1 and HTTP/1.0 are supported")
    return method, target, f"HTTP/{version}"


def _check_start(buffer: bytearray) -> None:
    """Refuse at once what cannot become a request: else it waits for head_timeout."""
    if buffer.startswith(b"\x16"):  # a TLS handshake record
        raise ProtocolError(400, "https was sent to an http port; use http://")
    end = buffer.find(b"\n", 0, REQUEST_LINE_SIZE + 2)
    if end >= 0 and buffer[end - 1 : end] != b"\r":
        raise ProtocolError(400, "lines must end in CR LF")
    if end >= 0:
        _parse_request_line(buffer[: end - 1].decode("latin-1"))
    elif len(buffer) > REQUEST_LINE_SIZE + 1:
        raise ProtocolError(414, f"the first line is over {REQUEST_LINE_SIZE} bytes")
    elif not _LINE_START.match(buffer):
        raise ProtocolError(400, "the request line is malformed")


def _parse_request(head: bytes) -> Request:
    lines = head[:-4].decode("latin-1").split("\r\n")
    if len(lines[0]) > REQUEST_LINE_SIZE:
        raise ProtocolError(414, f"the first line is over {REQUEST_LINE_SIZE} bytes")
    method, target, version = _parse_request_line(lines[0])
    headers = parse_fields(lines[1:], HEADER_COUNT, HEADER_LINE_SIZE)
    if version == "HTTP/1.1" and "host" not in headers:
        raise ProtocolError(400, "the Host field is missing")
    path, query = split_target(method, target, headers)
    length = content_length(headers, version)
    headers.pop("content-length", None)
    return Request(method, target, version, path, query, headers, length)


_cached_request = functools.lru_cache(maxsize=512)(_parse_request)


def parse_request_head(
    buffer: bytearray, max_size: int = DEFAULT_LIMITS.head_size
) -> Request | None:
    """Take a request head off the front of buffer, or return None if it needs more.

    max_size limits the whole head, in bytes.  Raise ProtocolError: 400 malformed,
    414 and 431 too large, 501 unsupported transfer coding or overlong method, 505
    another version (RFC 9112 sections 3 and 6).
    """
    while buffer.startswith(b"\r\n"):  # section 2.2: some send it after content
        del buffer[:2]
    size = buffer.find(b"\r\n\r\n", 0, max_size) + 4
    if size < 4:
        _check_start(buffer)
        _take_head(buffer, max_size)  # raises if it can no longer become a head
        return None
    # Most heads of a client differ only in their Content-Length.  The cache takes
    # 1.6 us, parsing 4.7.
    head = bytes(buffer[:size])
    length = _LENGTH_LINE.search(head)
    if length is not None:
        head = head[: length.start(1)] + b"0" + head[length.end(1) :]
    is_short = size <= CACHED_HEAD_SIZE
    request = _cached_request(head) if is_short else _parse_request(head)
    del buffer[:size]
    return request if length is None else Request(*request[:-1], int(length[1]))


@functools.lru_cache(maxsize=16)
def _parse_status_line(line: str) -> tuple[str, int]:
    match = _STATUS_LINE.fullmatch(line)
    if match is None:
        raise ProtocolError(502, "no HTTP/1.1 status line")
    return match[1], int(match[2])


def parse_response_head(buffer: bytearray) -> Response | None:
    """Take a response head off the front of buffer; ProtocolError(502) if invalid."""
    try:
        lines = _take_head(buffer, RESPONSE_HEAD_SIZE)
        if lines is None:
            return None
        version, status = _parse_status_line(lines.pop(0))
        headers = parse_fields(lines, RESPONSE_HEADER_COUNT, RESPONSE_HEAD_SIZE)
    except ProtocolError as error:
        raise ProtocolError(502, f"unreadable answer: {error}") from None
    return Response(version, status, headers)


def split_target(method: str, target: str, headers: Headers) -> tuple[str, str]:
    """Return path and query of a request target (RFC 9112 section 3.2).

    Raise ProtocolError(400) for a malformed target or Host, and for an absolute form
    whose authority is not the Host.  Not urllib.parse.urlsplit(): it raises
    ValueError on targets such as "//[".
    """
    host = headers.get("host")
    if host is not None and not _HOST.fullmatch(host):
        raise ProtocolError(400, "the Host field is malformed")
    if target == "*" and method == "OPTIONS":
        return "*", ""
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is not None:
        if host is not None and absolute[1].lower() != host.lower():
            raise ProtocolError(400, "the target and the Host field name two hosts")
        target = absolute[2]
    elif not target.startswith("/"):
        raise ProtocolError(400, "the request target is malformed")
    path, _, query = target.partition("?")
    return path or "/", query


def content_length(headers: Headers, version: str = "HTTP/1.1") -> int | None:
    """Return the length of a request's content in bytes, or None if it is chunked.

    Without either field there is no content (RFC 9112 section 6.3).  Raise
    ProtocolError(400) if two readers could disagree on where the message ends
    (request smuggling, section 11.2): both fields present, a length that is
    repeated, signed or not decimal, a coding in HTTP/1.0; ProtocolError(501) for
    a transfer coding other than chunked (section 6.1).
    """
    coding = headers.get("transfer-encoding")
    length = headers.get("content-length")
    if coding is not None:
        if length is not None or version == "HTTP/1.0":
            raise ProtocolError(
                400, "Transfer-Encoding with Content-Length or HTTP/1.0"
            )
        if coding.lower() != "chunked":
            raise ProtocolError(501, "the only transfer coding supported is chunked")
        return None
    if length is None:
        return 0
    # int() alone accepts '+5', '5_0' and non-ASCII digits, and raises ValueError
    # beyond 4300 digits.
    if not _LENGTH.fullmatch(length):
        raise ProtocolError(400, "the Content-Length field is malformed")
    return int(length)


UNTIL_CLOSE = sys.maxsize  # the length of content that ends when its connection does


def response_length(method: str, response: Response) -> int | None:
    """Return a response's content length: bytes, None if chunked, or UNTIL_CLOSE.

    Raise what content_length() raises if it is ambiguous (RFC 9112 section 6.3).
    """
    headers = response.headers
    if method == "HEAD" or response.status < 200 or response.status in (204, 304):
        return 0
    if "content-length" not in headers and "transfer-encoding" not in headers:
        return UNTIL_CLOSE
    return content_length(headers, response.version)


class ContentDecoder:
    """Takes a message's content off a buffer as it arrives.

    This one: content of a length in bytes (RFC 9112 section 6.2), or UNTIL_CLOSE.
    """

    complete = False  # the last byte was taken; the next message follows in the buffer
    pending = False  # decode() may return more without new input

    def __init__(self, length: int) -> None:
        self._left = length
        self.complete = length == 0

    def decode(self, buffer: bytearray) -> bytes:
        """Return what has arrived, maybe b""; ProtocolError(400) for bad chunks."""
        piece = bytes(buffer[: self._left])
        del buffer[: self._left]
        if self._left != UNTIL_CLOSE:
            self._left -= len(piece)
            self.complete = self._left == 0
        return piece

    def end(self) -> None:
        """Note that the connection ended; ProtocolError(400) if that is too early."""
        self.complete = self.complete or self._left == UNTIL_CLOSE
        if not self.complete:
            raise ProtocolError(400, "the connection ended too early")


@functools.lru_cache(maxsize=256)  # the same few sizes recur
def _chunk_size(line: bytes) -> int:
    match = _CHUNK_LINE.fullmatch(line)
    if match is None:
        raise ProtocolError(400, "a chunk's size is malformed")
    return int(match[1], 16)


class ChunkedDecoder(ContentDecoder):
    """Chunked content (RFC 9112 section 7.1); extensions and trailers are dropped.

    Each CR LF is verified: a reader that just skips two bytes after a chunk can be
    tricked into seeing another message than its neighbour.
    """

    def __init__(self) -> None:
        self._left = 0  # bytes of the current chunk, with its CR LF
        self._extensions = 0  # bytes, of all chunks
        self._trailers = False  # the last chunk has been read

    def decode(self, buffer: bytearray) -> bytes:
        data = bytes(buffer)  # slicing it takes 0.4 us a chunk, the bytearray 0.7
        pieces: list[bytes] = []
        at = 0
        while not self._trailers:
            if not self._left:
                end = data.find(b"\r\n", at, at + CHUNK_LINE_SIZE + 2)
                if end < 0:
                    if len(data) - at > CHUNK_LINE_SIZE + 1:  # 1 for a CR without LF
                        raise ProtocolError(400, "a chunk's size line is too long")
                    break
                line = data[at:end]
                if len(line) > 15:
                    self._extensions += len(line)
                    if self._extensions > CHUNK_EXTENSIONS_SIZE:
                        raise ProtocolError(400, "too many chunk extensions")
                self._left = _chunk_size(line) + 2
                if self._left == 2:
                    self._trailers = True
                    at = end  # leave the CR LF: trailers parse like a head's fields
                    break
                at = end + 2
            end = at + self._left
            content, tail = data[at : end - 2], data[end - 2 : end]
            if not b"\r\n".startswith(tail):
                raise ProtocolError(400, "a chunk does not end in CR LF")
            pieces.append(content)
            at += len(content)
            self._left -= len(content)
            if tail != b"\r\n":  # incomplete
                break
            at = end
            self._left = 0
        del buffer[:at]
        if self._trailers and not self.complete:
            lines = _take_head(buffer, TRAILER_SIZE + 2)
            if lines is not None:
                parse_fields(lines[1:], TRAILER_COUNT, TRAILER_SIZE)
                self.complete = True
        return b"".join(pieces)


# Content may inflate to this many times its size, as with Apache's mod_deflate; JSON
# reaches 10 to 50.  The first bytes are free: a long line of blanks is no bomb.
INFLATED_RATIO = 200
INFLATED_FREE = 8 * 1024 * 1024


class InflatingDecoder(ContentDecoder):
    """Inflates gzip or deflate content as it arrives (RFC 9110 section 8.4.1).

    framing takes the compressed content off the buffer.  decode() returns at most
    PIECE_SIZE bytes, so a slow reader holds back the inflation, too.

    decode() and end() raise ProtocolError: 400 for content that is damaged, cut short
    or followed by more bytes, 413 for more than INFLATED_RATIO times its size.
    """

    def __init__(self, coding: str, framing: ContentDecoder) -> None:
        self.complete = framing.complete  # true if there is no content at all
        self._coding = coding
        self._framing = framing
        self._stream: Any = None  # zlib's
        self._compressed = b""  # received, not yet inflated
        self._bytes_in = self._bytes_out = 0

    def decode(self, buffer: bytearray) -> bytes:
        piece = self._inflate(b"") or self._inflate(self._framing.decode(buffer))
        self.pending = bool(piece)
        if self._framing.complete and not piece:
            self.end()
        return piece

    def end(self) -> None:
        self._framing.end()
        if self._compressed or not (self._stream is None or self._stream.eof):
            raise ProtocolError(400, f"the {self._coding} content is cut short")
        self.complete = True

    def _inflate(self, data: bytes) -> bytes:
        """Add data to the input and return the next bytes, b"" if it needs more."""
        self._bytes_in += len(data)
        self._compressed += data
        piece = b""
        while not piece:
            if self._stream is None or self._stream.eof:
                if len(self._compressed) < 2:
                    return b""
                self._stream = self._next_stream()
            try:
                piece = self._stream.decompress(self._compressed, PIECE_SIZE)
            except zlib.error:
                reason = f"the {self._coding} content is damaged"
                raise ProtocolError(400, reason) from None
            self._compressed = self._stream.unconsumed_tail or self._stream.unused_data
            if not self._compressed:
                break
        self._bytes_out += len(piece)
        if self._bytes_out > INFLATED_FREE + INFLATED_RATIO * self._bytes_in:
            reason = f"the content inflates to over {INFLATED_RATIO} times its size"
            raise ProtocolError(413, reason)
        return piece

    def _next_stream(self) -> Any:
        if self._coding == "gzip":  # may have several members (RFC 1952)
            return zlib.decompressobj(31)
        if self._stream is not None:
            raise ProtocolError(400, "bytes follow the end of the deflate content")
        # "deflate" means zlib's format, but some send it raw (section 8.4.1.2).
        start = self._compressed[:2]
        is_zlib = start[0] & 15 == 8 and int.from_bytes(start, "big") % 31 == 0
        return zlib.decompressobj(15 if is_zlib else -15)


def content_coding(headers: Headers) -> str:
    """Return "gzip", "deflate", or "" for none; ProtocolError(415) for any other."""
    if "content-encoding" not in headers:
        return ""
    # "none" is not a coding, but widely sent to keep proxies from compressing.
    plain = ("identity", "none", "")
    names = [name for name in headers.tokens("content-encoding") if name not in plain]
    coding = ", ".join(names).replace("x-gzip", "gzip")
    if coding not in ("gzip", "deflate", ""):
        raise ProtocolError(415, f"the content coding {coding[:40]} is not supported")
    return coding


def content_decoder(length: int | None, coding: str = "") -> ContentDecoder:
    """Return a decoder for a length (None for chunked) and a content_coding()."""
    decoder = ChunkedDecoder() if length is None else ContentDecoder(length)
    return InflatingDecoder(coding, decoder) if coding else decoder


def end_to_end(
    headers: dict[str, str], private: frozenset[str], prefixes: tuple[str, ...]
) -> dict[str, str]:
    """Return the fields of a message that a gateway forwards.

    Left out are those named by Connection (RFC 9110 section 7.6.1), the private
    ones, HOP_BY_HOP among them, and all that begin with one of the prefixes.
    """
    fields = {
        name: value
        for name, value in headers.items()
        if name not in private and not name.startswith(prefixes)
    }
    if "connection" in headers:
        for name in headers["connection"].split(","):
            fields.pop(name.strip().lower(), None)
    return fields


def encode_head(
    start_line: str, fields: Iterable[tuple[str, str]], ready: bytes = b""
) -> bytes:
    """Return the bytes of a head; ready holds further fields, as trusted lines.

    Raise ProtocolError(500) if another line has a control character (header
    injection) or is not Latin-1.
    """
    lines = [start_line, *map(": ".join, fields), ""]
    try:
        head = "\r\n".join(lines).encode("latin-1")
    except UnicodeEncodeError:
        raise ProtocolError(500, "a header field is not Latin-1") from None
    # Two after each line are ours.  Counting takes 0.3 us, a search for others 2.
    controls = len(head) - len(head.translate(None, _CONTROLS))
    if controls != 2 * (len(lines) - 1):
        raise ProtocolError(500, "a header field has a control character")
    return head + ready + b"\r\n"


def encode_chunk(data: bytes) -> bytes:
    """Return data as one chunk; an empty one would end the content."""
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"


@functools.lru_cache(maxsize=2)
def http_date(timestamp: int) -> str:
    """Return a Unix time as a Date value (RFC 9110 section 5.6.7), in any locale."""
    day, month, date, clock, year = time.asctime(time.gmtime(timestamp)).split()
    return f"{day}, {date:0>2} {month} {year} {clock} GMT"


# -----------------------------------------------------------------------------
# WebSocket (RFC 6455). No I/O
# -----------------------------------------------------------------------------
#
# Bytes in, messages out, and bytes to send back.  A WebSocketProtocol never sees
# a socket or a clock: feed it received bytes and write what its methods return.  One
# class serves both sides, which differ only in masking: the client masks, the server
# does not.  No extensions, hence no compression bombs.

MESSAGE_FRAGMENTS = 1024  # frames of one message
CONTROL_BIT = 0x8  # of an opcode: a control frame (section 5.5) ...
CONTROL_PAYLOAD_SIZE = 125  # ... and the largest payload of one


class Opcode(enum.IntEnum):
    """What a frame carries (RFC 6455 section 5.2)."""

    CONTINUATION = 0x0
    TEXT = 0x1
    BINARY = 0x2
    CLOSE = 0x8
    PING = 0x9
    PONG = 0xA


def accept_key(key: str) -> str:
    """Return the Sec-WebSocket-Accept for a Sec-WebSocket-Key (section 4.2.2)."""
    digest = hashlib.sha1(
        (key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode(),
        usedforsecurity=False,  # or Pythons built for FIPS refuse SHA-1
    ).digest()
    return base64.b64encode(digest).decode()


def handshake_key() -> str:
    """Return a fresh Sec-WebSocket-Key for a client's handshake (section 4.1)."""
    return base64.b64encode(secrets.token_bytes(16)).decode()


def apply_mask(data: bytes | bytearray, masking_key: bytes) -> bytes:
    """Mask or unmask data with a key of 4 bytes (section 5.3): the same operation."""
    # As two big integers: 0.4 us for 64 bytes and 1.8 ms for 1 MiB, on 3.9 and 3.11.
    size = len(data)
    mask = (masking_key * (size // 4 + 1))[:size]
    number = int.from_bytes(data, "big") ^ int.from_bytes(mask, "big")
    return number.to_bytes(size, "big")


class FrameHead(NamedTuple):
    """The part of a frame before its payload (section 5.2)."""

    fin: bool  # the last frame of its message
    opcode: Opcode
    length: int  # of the payload, in bytes
    masking_key: bytes | None  # 4 bytes from a client, None from a server


# The valid first bytes of a frame.  All others are refused: a reserved bit, an unknown
# opcode, a fragmented control frame (sections 5.2 and 5.4).
FIRST_BYTES = {
    fin << 7 | opcode: (fin, opcode)
    for fin in (False, True)
    for opcode in Opcode
    if fin or not opcode & CONTROL_BIT
}

# Lengths that announce an extended one: its size in bytes, the smallest value that
# needs it, and the first value that is too large (the top bit must be 0).
EXTENDED_LENGTHS = {126: (2, 126, 1 << 16), 127: (8, 1 << 16, 1 << 63)}


def parse_frame_head(
    buffer: bytearray, masked: bool, max_size: int
) -> FrameHead | None:
    """Take the head of one frame (section 5.2) off the front of buffer.

    buffer    bytes received and not yet parsed; a complete head is removed,
              an incomplete one is left untouched
    masked    whether it must be masked: a client's is, a server's is not (section 5.1)
    max_size  largest payload accepted in a data frame, in bytes; a control frame
              has its own limit, since it may arrive between the last fragments

    Return the head, or None when more bytes are needed.  Raise WebSocketError(1002)
    if the peer broke section 5, WebSocketError(1009) if the announced payload is too
    large.  Each byte is checked as it arrives, an extended length once complete.
    """
    if not buffer:
        return None
    if buffer[0] not in FIRST_BYTES:
        raise WebSocketError(1002, f"no frame begins with 0x{buffer[0]:02x}")
    if len(buffer) < 2:
        return None
    fin, opcode = FIRST_BYTES[buffer[0]]
    length = buffer[1] & 0x7F
    if masked is not (buffer[1] >= 0x80):
        raise WebSocketError(1002, "a client must mask its frames, a server must not")
    if opcode & CONTROL_BIT:
        if length > CONTROL_PAYLOAD_SIZE:
            raise WebSocketError(1002, "control frame larger than 125 bytes")
        max_size = CONTROL_PAYLOAD_SIZE
    end = 2
    if length in EXTENDED_LENGTHS:
        width, smallest, too_large = EXTENDED_LENGTHS[length]
        end += width
        if len(buffer) < end:
            return None
        length = int.from_bytes(buffer[2:end], "big")
        if not smallest <= length < too_large:
            raise WebSocketError(1002, "payload length not in its shortest form")
    if length > max_size:
        raise WebSocketError(1009, "message too large")
    masking_key = None
    if masked:
        end += 4
        if len(buffer) < end:
            return None
        masking_key = bytes(buffer[end - 4 : end])
    del buffer[:end]
    return FrameHead(fin, opcode, length, masking_key)


def encode_frame(opcode: Opcode, payload: bytes, masks: bool) -> bytes:
    """Return one unfragmented frame, as one bytes object for a single write."""
    first, mask_bit = 0x80 | opcode, 0x80 if masks else 0
    length = len(payload)
    if length < 126:
        head = bytes((first, mask_bit | length))
    else:
        short, width = (126, 2) if length < 1 << 16 else (127, 8)
        head = bytes((first, mask_bit | short)) + length.to_bytes(width, "big")
    if not masks:
        return head + payload
    # With a predictable key, an attacker who chooses the payload chooses the bytes
    # on the wire and could speak HTTP to a proxy in between (section 10.3).
    masking_key = secrets.token_bytes(4)
    return b"".join((head, masking_key, apply_mask(payload, masking_key)))


def is_close_code(code: int) -> bool:
    """Whether a close frame may carry code (section 7.4 and IANA's registry).

    1004 is reserved; 1005, 1006 and 1015 are for local use, never on the wire.
    """
    return 1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999


def parse_close(payload: bytes) -> tuple[int, str]:
    """Return code and reason of a close frame; 1005 if it is empty (section 7.1.5).

    Raise WebSocketError(1002) for an invalid code or half a code, and
    UnicodeDecodeError for a reason that is not UTF-8.
    """
    if not payload:
        return 1005, ""
    code = int.from_bytes(payload[:2], "big")  # below 256 if there is only one byte
    if not is_close_code(code):
        raise WebSocketError(1002, "close frame without a valid code")
    return code, payload[2:].decode()


# Opcode and payload.  TEXT: a whole message as str, BINARY: as bytes; PING and PONG:
# at most 125 bytes; CLOSE: (code, reason).
WebSocketEvent = tuple[Opcode, Any]


def take_payload(buffer: bytearray, frame: FrameHead, taken: int) -> bytes | bytearray:
    """Take and unmask what has arrived of a payload, after taken bytes of it."""
    missing = frame.length - taken
    piece = buffer[:missing]
    del buffer[:missing]
    if frame.masking_key is None:
        return piece
    shift = taken % 4
    return apply_mask(piece, frame.masking_key[shift:] + frame.masking_key[:shift])


def parse_messages(
    buffer: bytearray, masked: bool, max_size: int
) -> Iterator[WebSocketEvent | None]:
    """Yield the events that the bytes in buffer complete, and None when it needs more.

    Raise WebSocketError and UnicodeDecodeError.  Text is checked as it arrives, sizes
    before the payload arrives.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    # Unmasked, so far.  A list of tiny pieces would take many times max_size.
    message = bytearray()
    kind = Opcode.BINARY  # of that message
    fragments = 0  # frames of it; 0 between messages
    while True:
        frame = parse_frame_head(buffer, masked, max_size - len(message))
        if frame is None:
            yield None
            continue
        if frame.opcode & CONTROL_BIT:  # it may come between fragments (section 5.4)
            while len(buffer) < frame.length:
                yield None
            payload = bytes(take_payload(buffer, frame, 0))
            is_close = frame.opcode is Opcode.CLOSE
            yield frame.opcode, parse_close(payload) if is_close else payload
            continue
        continues = frame.opcode == Opcode.CONTINUATION
        if continues is not (fragments > 0):
            raise WebSocketError(1002, "fragments of a message out of order")
        fragments += 1
        if fragments > MESSAGE_FRAGMENTS:
            raise WebSocketError(1008, "message in too many fragments")
        if not continues:
            kind = frame.opcode
        end = len(message) + frame.length
        while True:
            at = len(message)
            message += take_payload(buffer, frame, at - end + frame.length)
            if len(message) == end and frame.fin:
                break
            if kind is Opcode.TEXT:
                if not at:
                    decoder.reset()  # it never sees the end of a message
                decoder.decode(message[at:])
                # It waits for a surrogate's third byte; the second is invalid already.
                if b"\xed\xa0" <= decoder.getstate()[0] < b"\xee":
                    raise WebSocketError(1007, "text is not valid UTF-8")
            if len(message) == end:
                break
            yield None
        if frame.fin:
            fragments = 0
            yield kind, message.decode() if kind is Opcode.TEXT else bytes(message)
            message.clear()


class WebSocketProtocol:
    """One side of a websocket, after the handshake: turns bytes into events and back.

        for opcode, payload in protocol.receive(data):
            ...  # a PING gets pong(payload), a CLOSE gets close(payload[0])
        if protocol.error:
            write(protocol.close(protocol.error.close_code, str(protocol.error)))

    masks     whether we are the client
    max_size  largest message accepted, in bytes: the sum of its fragments
    """

    def __init__(
        self, masks: bool, max_size: int = DEFAULT_LIMITS.message_size
    ) -> None:
        self.masks = masks
        self.error: WebSocketError | None = None  # a violation: ends receiving
        self.close_received = False  # ends receiving, too
        self.close_sent = False  # ends sending
        self._buffer = bytearray()  # received, not yet parsed
        self._events = parse_messages(self._buffer, not masks, max_size)

    # --- Receiving.

    def receive(self, data: bytes) -> list[WebSocketEvent]:
        """Return the events that data, cut anywhere, completes.

        Never raises for what the peer sent: a violation ends the list and sets error,
        so that the events before it are still served.  Look at error after each call.
        After an error or a CLOSE, all further bytes are ignored.

        error.close_code is 1002 for a violation of section 5, 1007 for text that is
        not UTF-8, 1008 for too many fragments and 1009 for a message too large.
        """
        events: list[WebSocketEvent] = []
        if self.error or self.close_received:
            return events
        self._buffer += data
        try:
            while not self.close_received:
                event = next(self._events)
                if event is None:
                    break
                events.append(event)
                self.close_received = event[0] is Opcode.CLOSE
        except UnicodeDecodeError:
            self.error = WebSocketError(1007, "text is not valid UTF-8")
        except WebSocketError as error:
            # Its traceback would hold this frame, and so the error and our buffer.
            self.error = error.with_traceback(None)
        return events

    # --- Sending.  Each method returns bytes to write.  After our close frame, pong()
    # and close() return b"", the others raise ConnectionError.

    def send(self, data: str | bytes) -> bytes:
        """Return data as one message: str as text, bytes as binary.

        Raise UnicodeEncodeError for a lone surrogate.
        """
        if isinstance(data, str):
            return self._encode(Opcode.TEXT, data.encode())
        return self._encode(Opcode.BINARY, data)

    def ping(self, payload: bytes = b"") -> bytes:
        """Return a ping, with at most 125 bytes for the pong to repeat."""
        return self._encode(Opcode.PING, payload)

    def pong(self, payload: bytes) -> bytes:
        """Return the answer to a ping: a pong with the same payload."""
        return b"" if self.close_sent else self._encode(Opcode.PONG, payload)

    def close(self, code: int = 1000, reason: str = "") -> bytes:
        """Return our close frame, or b"" if it has been sent.

        A reason that does not fit is cut between two characters.  The frame is empty
        for 1005, 1006 and 1015, which never go on the wire (section 7.4.1).  Raise
        ValueError for any other code that must not be sent.
        """
        if self.close_sent:
            return b""
        payload = b""
        if code not in (1005, 1006, 1015):
            if not is_close_code(code):
                raise ValueError(f"{code} is not a close code")
            fits = reason.encode(errors="replace")[: CONTROL_PAYLOAD_SIZE - 2]
            payload = code.to_bytes(2, "big") + fits.decode(errors="ignore").encode()
        frame = self._encode(Opcode.CLOSE, payload)
        self.close_sent = True
        return frame

    def _encode(self, opcode: Opcode, payload: bytes) -> bytes:
        """Return a frame.  Raise ConnectionError after our close (section 5.5.1)."""
        if self.close_sent:
            raise ConnectionError("the websocket has been closed")
        if opcode & CONTROL_BIT and len(payload) > CONTROL_PAYLOAD_SIZE:
            raise ValueError("a control frame holds at most 125 bytes")
        return encode_frame(opcode, payload, self.masks)


# -----------------------------------------------------------------------------
# API messages and server-sent events. No I/O
# -----------------------------------------------------------------------------
#
# Only what is needed to route, count and end a request is parsed; everything else is
# relayed unchanged.  A body's type is judged by its bytes, not by its label.  Chat
# completions, completions, responses and messages each have a class, a Dialect, for
# what sets them apart.


def _parse_int(digits: str) -> int:
    # json sets no limit, and int() takes quadratic time before 3.9.14.
    if len(digits) > 400:
        raise ValueError("a number is too long")
    return int(digits)


def _parse_float(digits: str) -> float:
    number = float(digits)  # digits may be NaN or Infinity, too
    if not math.isfinite(number):  # JSON cannot represent it
        raise ValueError("a number is not finite")
    return number


_STRICT_DECODER = json.JSONDecoder(
    parse_int=_parse_int, parse_float=_parse_float, parse_constant=_parse_float
)


def parse_object(content: bytes) -> JSONObject:
    """Return the JSON object in content.  Raise APIError(400) for anything else."""
    problem = " must be a JSON object"
    try:
        body = _STRICT_DECODER.decode(content.decode("utf-8"))
        if isinstance(body, dict):
            return body
    except UnicodeDecodeError:
        problem = " is not UTF-8"
    except RecursionError:
        problem = "'s JSON is nested too deeply"
    except json.JSONDecodeError as error:
        problem = f" is not JSON (line {error.lineno} column {error.colno})"
    except ValueError as error:
        problem = f" is not JSON: {error}"
    raise APIError(400, f"The request{problem}.")


def names_two_models(content: bytes) -> bool:
    """Whether a JSON object has two keys "model": an upstream may take the first.

    Not for every request: the search takes as long as parsing.
    """
    if content.count(b'"model"') < 2 and content.find(b"\\u006") < 0:  # an escaped "m"
        return False
    try:
        pairs = json.loads(content, object_pairs_hook=list)
    except RecursionError:  # it was parsed with a shallower stack
        return True
    return [name for name, _ in pairs].count("model") > 1


def read_json(content: bytes | str) -> Any:
    """Return the JSON value in a response, or None if it is not JSON."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def as_object(value: Any) -> JSONObject:
    """Return value if it is an object, else {}: upstreams send anything."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """Return value if it is a list, else []."""
    return value if isinstance(value, list) else []


_to_text = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
_to_ascii = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def encode_json(value: Any) -> bytes:
    """Return value as JSON on one line, in readable UTF-8."""
    # backslashreplace turns half a surrogate pair into its JSON escape.
    return _to_text(value).encode("utf-8", "backslashreplace")


def unix_time() -> float:
    """Return the time of day, for people and quotas; deadlines use the loop's clock."""
    return time.time()


def rfc3339(timestamp: float) -> str:
    """Format a Unix time as "2026-01-31T12:00:00Z"."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(timestamp))


def random_id(prefix: str) -> str:
    """Return a new id such as "chatcmpl-1f..."; 0.5 us where uuid4 takes 2.4."""
    return prefix + os.urandom(12).hex()


# --- Response bodies: type, error, models


JSON_TYPE = "application/json"
EVENTS_TYPE = "text/event-stream"
_FIELDS = (b"data:", b"event:", b"id:", b"retry:", b":")


def body_start(content: bytes) -> bytes:
    """Return content without its byte order mark and leading white space.

    Some APIs send blank lines for minutes while they work on an answer.
    """
    return content.lstrip(b"\xef\xbb\xbf \t\r\n")


def body_type(start: bytes) -> str | None:
    """Return JSON_TYPE, EVENTS_TYPE or "" by a body's first bytes; None if too few."""
    if start[:1] in (b"{", b"["):
        return JSON_TYPE
    if start.startswith(_FIELDS):
        return EVENTS_TYPE
    # b"dat" may become a field, and so may b"".
    return None if any(field.startswith(start) for field in _FIELDS) else ""


def labelled_type(content_type: str) -> str:
    """Return the media type of a Content-Type field (RFC 9110 section 8.3.1)."""
    media_type = content_type.partition(";")[0].strip().lower()
    return JSON_TYPE if media_type.endswith("+json") else media_type


class ErrorObject(NamedTuple):
    """The error in a response, whatever its shape there."""

    message: str = ""  # may quote the request: only for the user who made it
    type: str | None = None  # as in the OpenAI API, like the next two
    code: str | None = None
    param: str | None = None
    words: frozenset[str] = frozenset()  # code, type, status, reason, in lower case
    passed_on: bool = False  # a server like this one passed it on from its upstream
    status: int = 500  # the HTTP status that its code or type stands for

    @property
    def summary(self) -> str:
        """The code or type if it is a plain word, and so safe to store and show."""
        words = (self.code or "", self.type or "")
        return next(filter(_PLAIN_WORD.fullmatch, words), "")


# The form of the APIs' own codes.  Anything else may quote the request.
_PLAIN_WORD = re.compile("[a-z]+(?:_[a-z0-9]+)*", re.ASCII)
REFUSAL_SIZE = 1024 * 1024
_ERROR_STATUS = re.compile("[45][0-9][0-9]", re.ASCII)
_STATUSES = {kind: status for status, kind in APIError.TYPES.items()}
_STATUSES.update(invalid_request_error=400, rate_limit_exceeded=429, server_error=500)
# As in server_is_overloaded, slow_down, internal_error, vector_store_timeout.
_OUTAGE = re.compile("server|internal|overloaded|slow_down|unavailable|timeout")


def find_error(value: Any) -> ErrorObject | None:
    """Return the error in a response's parsed JSON, or None.

    Known shapes are those of OpenAI, Anthropic, Gemini (a list), vLLM
    ("object": "error") and FastAPI ("detail"), and a plain string.
    """
    body = as_object(value[0] if isinstance(value, list) and value else value)
    for key in ("error", "detail", "errors"):
        if body.get(key):
            error = _read_error(body[key], body)
            is_response = body.get("object") == "response"
            # Any other code is about the request, such as invalid_image.
            known = any(w in _STATUSES or _OUTAGE.search(w) for w in error.words)
            if is_response and error.code and not known:
                error = error._replace(status=400)
            return error
    is_error = body.get("object") == "error" or "message" in body
    return _read_error(body, body) if is_error and "choices" not in body else None


def find_refusal(content: bytes) -> ErrorObject | None:
    """Return the error in the content of an answer that refuses a request, or None.

    A large one repeats the request, once for each mistake in it if it is FastAPI's.
    It is not parsed: 30 MB of it stopped the loop for 19 s.
    """
    small = len(content) <= REFUSAL_SIZE
    return find_error(read_json(body_start(content))) if small else None


def _read_error(inner: Any, outer: JSONObject) -> ErrorObject:
    if isinstance(inner, list) and inner:
        errors = [_read_error(item, {}) for item in inner[:100]]
        texts = (e.message or e.type or str(item) for e, item in zip(errors, inner))
        return errors[0]._replace(message="; ".join(texts), type=None, code=None)
    if not isinstance(inner, dict):
        return ErrorObject(str(inner), words=_words(outer))
    if isinstance(inner.get("error"), (dict, str)):  # {"detail": {"error": ...}}
        return _read_error(inner["error"], inner)
    place = ".".join(map(str, as_list(inner.get("loc"))))  # FastAPI's
    message = inner.get("message") or inner.get("msg") or ""
    text = message if isinstance(message, str) else _to_ascii(message)
    fields = {key: value for key, value in inner.items() if isinstance(value, str)}
    code, kind, words = str(inner.get("code")), fields.get("type", ""), _words(inner)
    status = max((_STATUSES[word] for word in words & _STATUSES.keys()), default=500)
    return ErrorObject(
        f"{place}: {text or kind}" if place else text,
        fields.get("type"),
        fields.get("code"),
        fields.get("param") or place or None,
        words,
        "upstream_status" in inner,
        int(code) if _ERROR_STATUS.fullmatch(code) else status,
    )


def _words(fields: JSONObject) -> frozenset[str]:
    details = [as_object(item) for item in as_list(fields.get("details"))]
    values = [fields.get(key) for key in ("code", "type", "status", "reason")]
    values += [detail.get("reason") for detail in details]
    return frozenset(value.lower() for value in values if isinstance(value, str))


def error_object(error: APIError) -> JSONObject:
    """Return the OpenAI API's error object, always with all four fields."""
    return {
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": error.code,
        **({"upstream_status": error.upstream_status} if error.upstream_status else {}),
    }


def model_names(content: bytes) -> list[str] | None:
    """Return the models in a response to GET /v1/models, or None if it has no list.

    The response is {"data": [{"id": ...}]} (OpenAI), {"models": [{"name": ...}]}
    (Ollama, Gemini) or a bare list (Together).
    """
    value = read_json(body_start(content))
    if isinstance(value, dict):
        value = value.get("data", value.get("models"))
    if not isinstance(value, list):
        return None
    items = [item if isinstance(item, dict) else {"id": item} for item in value]
    named = [item.get("id") or item.get("name") for item in items]
    names = [name for name in named if isinstance(name, str) and name.isprintable()]
    return [name.removeprefix("models/") for name in names if name]


# Names of models that cannot chat.
_NO_CHAT = re.compile(
    "embed|rerank|whisper|transcri|tts|dall-e|image|moderation|diffusion|^bge|^sora"
)


def chat_model(names: Iterable[str]) -> str | None:
    """Return the first of these models that can chat, or None."""
    return next((name for name in names if not _NO_CHAT.search(name.lower())), None)


# --- Usage


class Usage(NamedTuple):
    """Tokens that a request used; input includes cached_input."""

    input: int = 0
    cached_input: int = 0
    output: int = 0

    @property
    def total(self) -> int:
        return self.input + self.output


def read_usage(value: Any) -> Usage:
    """Return the token counts in a usage object of any dialect."""
    fields = as_object(value)
    details = fields.get("prompt_tokens_details") or fields.get("input_tokens_details")
    fields = {"cached_tokens": as_object(details).get("cached_tokens"), **fields}

    def count(key: str) -> int:
        number = fields.get(key)
        return number if type(number) is int and 0 < number < 1 << 48 else 0

    sent = count("prompt_tokens") or count("input_tokens")
    output = count("completion_tokens") or count("output_tokens")
    if not sent and not output:
        sent = count("total_tokens")  # some report only this for embeddings
    # Anthropic's input_tokens exclude those read from the cache or written to it.
    read = count("cache_read_input_tokens")
    hits = count("cached_tokens")
    all_sent = sent + read + count("cache_creation_input_tokens")
    return Usage(all_sent, hits if 0 < hits <= sent else read, output)


def find_usage(content: bytes) -> Usage:
    """Return the token counts in a response, mostly without parsing all of it.

    Metadata that the client chose may follow, with a "usage" of its own: the last one
    is the response's if what follows it closes one object.
    """
    at = content.rfind(b'"usage"')  # inside a string, its quotes would be escaped
    if at < 0:
        return Usage()
    end = b"{" + content[at:]
    comes_first = at <= PIECE_SIZE < len(end)
    if comes_first and read_json(content[:at] + b'"":0}'):  # and not inside a value
        # Jina's vectors follow it: parsing 20 MB of them takes 200 ms.
        end = end[: end.find(b"}") + 1] + b"}"
    whole = read_json(end.decode("utf-8", "replace")) or read_json(content)
    return read_usage(as_object(whole).get("usage"))


def estimate_tokens(text: str) -> int:
    """Estimate the number of tokens in text: one for every four bytes of UTF-8."""
    return (len(text.encode("utf-8", "replace")) + 3) // 4


def usage_object(usage: Usage) -> JSONObject:
    """Return usage as a chat completion's usage object."""
    return {
        "prompt_tokens": usage.input,
        "completion_tokens": usage.output,
        "total_tokens": usage.total,
    }


# --- Multipart forms


_BOUNDARY = re.compile(
    r';\s*boundary[*0-9]*\s*=\s*(?:"([^"]{1,70})"|([^\s";,]{1,70}))', re.I
)
_PART_HEAD = re.compile(rb"[ \t]*(?:\r\n[!-9;-~]+:[^\r\n]*)*\r\n\r\n")
_DISPOSITION = re.compile(rb"\r\ncontent-disposition:([^\r\n]*)", re.I)
_PARAMETER = re.compile(
    rb';\s*([a-z0-9*]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s";]*))', re.I
)
_MAX_PARTS = 100


def find_form_field(content: bytes, content_type: str, name: str) -> slice | None:
    """Return the place of a field in multipart/form-data (RFC 7578 section 4.2).

    Raise APIError(400) if an upstream could find another value than we do: it might
    be a model that the user must not use.
    """
    problem = f"The form's field {name!r} is ambiguous or malformed (RFC 7578)."
    unclear = APIError(400, problem, param=name)
    field = None
    boundaries = _BOUNDARY.findall(content_type)
    if not boundaries:
        return None
    if len(boundaries) > 1:
        raise unclear
    delimiter = b"--" + "".join(boundaries[0]).encode("latin-1")
    at = content.find(delimiter)
    if content[: max(0, at)].strip():  # maybe JSON, which Go reads up to its end
        raise unclear
    for _ in range(_MAX_PARTS):
        end = content.find(b"\r\n" + delimiter, at + 1)
        if at < 0 or end < 0:
            return field
        # Finding the parameters alone of a 32 MiB head would take 4 s.
        head = _PART_HEAD.match(content, at + len(delimiter), min(end, at + 8192))
        if head is None:
            raise unclear
        parameters = _PARAMETER.findall(b"".join(_DISPOSITION.findall(head[0])))
        names = [found for found in parameters if found[0][:4].lower() == b"name"]
        for key, quoted, token in names:
            if len(names) > 1 or b"*" in key or b"\\" in quoted:
                raise unclear
            if (quoted or token) == name.encode():
                if field is not None or end - head.end() > 1000:
                    raise unclear
                field = slice(head.end(), end)
        at = end + 2
    raise APIError(400, f"A form may have at most {_MAX_PARTS} parts.", param=name)


# --- Chat messages


def content_text(content: Any) -> str:
    """Return the text of a message's content, which is a string or a list of parts."""
    if isinstance(content, str):
        return content
    parts = (part.get("text") for part in as_list(content) if isinstance(part, dict))
    return "\n".join(part for part in parts if isinstance(part, str))


def delta_text(delta: JSONObject) -> str:
    """Return the text of a delta or message of the assistant's, even of a refusal."""
    return content_text(delta.get("content")) or content_text(delta.get("refusal"))


def messages_text(messages: Any) -> str:
    """Return a whole chat as one string, for an agent that accepts only one.

    A single message becomes its content; several each start with their role.
    """
    texts = [
        (str(message.get("role", "user")), content_text(message.get("content")))
        for message in as_list(messages)
        if isinstance(message, dict)
    ]
    if len(texts) == 1:
        return texts[0][1]
    return "\n\n".join(f"{role.capitalize()}: {text}" for role, text in texts)


def choice_of(
    key: str, value: Any, reason: Any = None, index: int = 0, logprobs: Any = None
) -> JSONObject:
    """Return one choice of an answer; key is "message", "delta" or "text"."""
    if key == "message":
        value = {"role": "assistant", "content": None, "refusal": None, **value}
    return {"index": index, key: value, "logprobs": logprobs, "finish_reason": reason}


def chat_completion(model: str, message: JSONObject, usage: Any = None) -> JSONObject:
    """Return a chat.completion object with one message from the assistant."""
    reason = "tool_calls" if message.get("tool_calls") else "stop"
    return {
        "id": random_id("chatcmpl-"),
        "object": "chat.completion",
        "created": int(unix_time()),
        "model": model,
        "choices": [choice_of("message", message, reason)],
        "usage": usage,
    }


class CompletionBuilder:
    """Assembles the chunks of a stream into one chat.completion."""

    HEAD = ("id", "created", "model", "system_fingerprint", "service_tier")

    def __init__(self) -> None:
        self._whole: JSONObject = {"id": None, "object": "chat.completion"}
        self._whole.update(created=None, model=None, choices=[], usage=None)
        self._choices: dict[int, JSONObject] = {}
        # By object and key, the object and pieces of a text, which are joined at the
        # end: += would copy the text each time.
        self._texts: dict[tuple[int, str], tuple[JSONObject, list[str]]] = {}

    def add(self, chunk: JSONObject) -> None:
        """Add one chat.completion.chunk."""
        for key in self.HEAD:
            if not self._whole.get(key) and chunk.get(key) is not None:
                self._whole[key] = chunk[key]  # Azure's first one has "" and 0
        self._whole["usage"] = chunk.get("usage") or self._whole["usage"]
        for choice in chunk.get("choices") or []:
            index = choice.get("index", 0)
            empty = choice_of("message", {}, None, index)
            whole = self._choices.setdefault(index, empty)
            delta = choice.get("delta") or {"content": choice.get("text")}
            self._add_delta(whole["message"], delta)
            if logprobs := choice.get("logprobs"):
                whole["logprobs"] = whole["logprobs"] or dict.fromkeys(logprobs)
                self._add_delta(whole["logprobs"], logprobs)
            if choice.get("finish_reason"):
                whole["finish_reason"] = choice["finish_reason"]

    def _add_delta(self, message: JSONObject, delta: JSONObject) -> None:
        for key, value in delta.items():
            text = message.get(key)
            if key == "tool_calls":
                self.add_tool_calls(message.setdefault(key, {}), value or [])
            elif isinstance(value, dict) and isinstance(text, dict):
                self._add_delta(text, value)  # function_call, audio
            elif key in ("role", "id"):
                message[key] = value or text
            elif isinstance(value, str) and isinstance(text, str):
                place = (id(message), key)
                self._texts.setdefault(place, (message, [text]))[1].append(value)
            elif isinstance(value, list):
                message[key] = text = text if isinstance(text, list) else []
                text.extend(value)
            elif value is not None:
                message[key] = value

    @staticmethod
    def find_tool_call(calls: dict[Any, JSONObject], piece: JSONObject) -> Any:
        """Return the key of the call that a piece belongs to: its index, if it has one.

        Gemini and others send no index.  Then a piece with a new id, or with a name
        and no id, starts a call; any other continues the last one.
        """
        index, id = piece.get("index"), piece.get("id")
        if index is not None:
            return index  # some begin at 1
        recent = [*itertools.islice(reversed(calls), 16)]  # in linear time
        known = [n for n in recent if id and calls[n]["id"] == id]
        begins = id or (piece.get("function") or {}).get("name") or not calls
        free = (n for n in itertools.count(len(calls)) if n not in calls)
        return next(free) if begins and not known else (known or recent)[0]

    @classmethod
    def add_tool_calls(cls, calls: dict[Any, JSONObject], pieces: list[Any]) -> None:
        """Add pieces of tool calls, each to its call."""
        for piece in pieces:
            id, empty = piece.get("id"), {"name": "", "arguments": ""}
            call = {"id": id, "type": "function", "function": empty}
            call = calls.setdefault(cls.find_tool_call(calls, piece), call)
            call["id"] = call["id"] or id
            whole = call["function"]
            for key, value in (piece.get("function") or {}).items():
                text, whole[key] = whole.get(key, ""), ""
                text += value or ""  # in place: this is the only reference to it
                whole[key] = text

    def result(self) -> JSONObject:
        """Return the chat.completion."""
        for (_, key), (message, pieces) in self._texts.items():
            message[key] = "".join(pieces)
        for choice in self._choices.values():
            if "tool_calls" in (message := choice["message"]):
                message["tool_calls"] = [*message["tool_calls"].values()]
        self._whole["choices"] = [c for _, c in sorted(self._choices.items())]
        return self._whole


class TextBuilder(CompletionBuilder):
    """Assembles the chunks of a stream of completions."""

    def result(self) -> JSONObject:
        whole = super().result()
        for choice in whole["choices"]:
            choice["text"] = choice.pop("message")["content"] or ""
        return {**whole, "object": "text_completion"}


class ItemsBuilder(CompletionBuilder):
    """Assembles the events of messages or responses; a content block is a choice."""

    def add(self, event: JSONObject) -> None:
        kind, index = event.get("type"), event.get("index", 0)
        self._whole = event.get("message") or event.get("response") or self._whole
        if kind == "content_block_start":
            self._choices[index] = {"message": event["content_block"]}
        elif kind == "content_block_delta":
            delta = {k: v for k, v in event["delta"].items() if k != "type"}
            if "citation" in delta:
                delta = {"citations": [delta["citation"]]}
            self._add_delta(self._choices[index]["message"], delta)
        elif kind == "message_delta":
            usage = {**(self._whole.get("usage") or {}), **(event.get("usage") or {})}
            self._whole = {**self._whole, **event["delta"], "usage": usage}

    def result(self) -> JSONObject:
        whole = super().result()
        for block in (choice["message"] for choice in whole.pop("choices")):
            if "partial_json" in block:
                block["input"] = as_object(read_json(block.pop("partial_json")))
            whole["content"].append(block)
        return whole


# --- Server-sent events


def sse_event(data: bytes, name: str = "") -> bytes:
    """Return a server-sent event with one line of data, and its name if any."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + data + b"\n\n"


DONE_EVENT = sse_event(b"[DONE]")
HEARTBEAT = b": keep-alive\n\n"

_LINE_END = rb"(?:\r\n|\n|\r(?!\n))"
_EVENT_END = re.compile(_LINE_END + _LINE_END)  # {2} would take four times as long
_DATA = re.compile(rb"(?:^[\xef\xbb\xbf]*|(?<=[\r\n]))data: ?([^\r\n]*)")
_DATA_LINE = re.compile(rb"(?:^|[\r\n])data:([^\r\n]*)(?:\r\n|\n|\r)")
_NEXT_EVENT = (b"data:", b"event:")
_LAST_LINES = re.compile(rb"(?<![^\r\n])(?:data)?:[^\r\n]*")  # of events, by line


class SSEDecoder:
    """Cuts a stream of server-sent events after its last complete event.

    Lines may end in LF, CR LF or CR, as in the WHATWG specification.  Some servers
    omit the blank line after an event; if the first one lacks it, each gets one.
    """

    def __init__(self, max_size: int = DEFAULT_LIMITS.response_size) -> None:
        self._max_size = max_size
        self._rest = bytearray()
        self._searched = 0  # no complete line of data begins before this
        self._by_line: bool | None = None  # whether each line of data is an event

    def receive(self, data: bytes) -> bytes:
        """Return all complete events.  Raise ProtocolError(413) for a huge one."""
        rest, by_line = self._rest, self._by_line
        if by_line is False and not rest and data.endswith(b"\n\n"):
            return data
        searched = max(0, len(rest) - 7)  # do not search a huge event again
        rest += data
        ends = (b"\n", b"\r")
        if by_line is None and any(rest.find(end, searched) >= 0 for end in ends):
            self._detect_line_mode()  # at most a few times per line
        if self._by_line:
            end = max(rest.rfind(b"\n", searched), rest.rfind(b"\r", searched)) + 1
        elif rest.find(b"\r", searched) >= 0:
            matches = _EVENT_END.finditer(rest, searched)
            end = max((match.end() for match in matches), default=0)
        else:
            end = rest.rfind(b"\n\n", searched) + 2
            end = 0 if end == 1 else end
        if len(rest) - end > self._max_size:
            raise ProtocolError(413, f"an event is over {self._max_size} bytes")
        block = bytes(rest[:end])
        del rest[:end]
        self._searched = max(0, self._searched - end)
        return _LAST_LINES.sub(rb"\g<0>\n", block) if self._by_line else block

    def _detect_line_mode(self) -> None:
        """Learn how events end, once something follows the first line of data."""
        rest, at = self._rest, self._searched
        line = _DATA_LINE.search(rest, at)
        if line is None:
            self._searched = max(at, rest.rfind(b"\n", at), rest.rfind(b"\r", at))
            return
        following = bytes(rest[line.end() : line.end() + 7])
        if any(name.startswith(following) for name in _NEXT_EVENT):
            return
        # A line with half a JSON value is part of an event of many lines.
        is_next = following.startswith(_NEXT_EVENT)
        self._by_line = is_next and read_json(bytes(line[1])) is not None

    def end(self) -> bytes:
        """Return what is left when the stream has ended, terminated as an event."""
        rest = bytes(self._rest)
        self._rest.clear()
        return rest + b"\n\n" if rest.strip() else b""


def split_events(block: bytes) -> Iterator[tuple[bytes, bytes | None]]:
    """Yield each event of a block as it came, with its data or None."""
    at = 0
    for match in _EVENT_END.finditer(block):
        raw = block[at : match.end()]
        at = match.end()
        yield raw, event_data(raw)
    if at < len(block):  # by line, a block may end with the next event's name
        yield block[at:], None


def event_data(raw: bytes) -> bytes | None:
    """Return an event's data lines joined by LF, or None if it has no data."""
    data = b"\n".join(_DATA.findall(raw))
    return data if data.strip() else None


# What is generated: strings in the events of any dialect.
_TEXTS = re.compile(
    r'"(?:\w*content|text|delta|thinking|reasoning|arguments|partial_json)"\s*:\s*'
    r'"([^"\\]*(?:\\.[^"\\]*)*)'
)


class EventStream:
    """A stream of events being relayed, unchanged.

    hide_usage  count the usage event, but do not relay it: the client did not ask
    choices     how many choices must finish

    A subclass for each dialect parses the events that matter.
    """

    WORDS: ClassVar[tuple[str, ...]] = ()  # an event without any is relayed unparsed
    ENDS: ClassVar[tuple[str, ...]] = ()  # event types that end the stream
    ANSWER = ""  # field with the answer so far, in the first event and some others
    LAST = b""  # appended to a complete stream that lacks it

    def __init__(
        self,
        hide_usage: bool = False,
        choices: int = 1,
        max_size: int = DEFAULT_LIMITS.response_size,
    ) -> None:
        self.began = False  # whether an event has been seen; comments do not count
        self.ended = False  # nothing more will be relayed
        self.error: ErrorObject | None = None  # from an error event: it is not relayed
        self.failure: ErrorObject | None = None  # from response.failed: it is relayed
        self.usage = Usage()  # so far
        self.events = 0  # number of events so far, roughly
        # Of the last blocks: how each starts, its size, and its number of events.
        self._recent: deque[tuple[str, int, int]] = deque(maxlen=4)
        self.answer: JSONObject = {}  # as the first event has it
        self._hide_usage = hide_usage
        self._unfinished = choices if self.WORDS else 0  # choices still to finish
        self._decoder = SSEDecoder(max_size)

    def receive(self, data: bytes) -> bytes:
        """Return the bytes to relay for the bytes received."""
        if self.ended:
            return b""
        block = self._decoder.receive(data)
        if not self.began and block:
            nothing = (None, b"[DONE]")
            self.began = block[:7] == b"data: {" or event_data(block) not in nothing
        # A search takes 0.1 us in a str and 0.3 in bytes; parsing an event takes 5.
        text = block.decode("latin-1")
        count = text.count("data:")
        self.events += count
        self._recent.append((text[:1024], len(text), count))
        if self._is_plain(block, text):
            return block
        kept = []
        for raw, event in split_events(block):
            if event is None or self._process(event):
                kept.append(raw)
            if self.ended:
                break
        return b"".join(kept)

    def _is_plain(self, block: bytes, text: str) -> bool:
        """Return whether a block needs no parsing; text is the block, decoded."""
        return not any(word in text for word in self.WORDS)

    def estimate(self) -> int:
        """Estimate the tokens so far: one an event, or one for four bytes of text."""
        starts, sizes, counts = zip(*self._recent, ("", 0, 0))
        sample = "".join(starts)
        share = len("".join(_TEXTS.findall(sample))) / (len(sample) or 1)
        size = share * sum(sizes) / (sum(counts) or 1)
        return int(self.events * max(1, size / 4))

    def _process(self, data: bytes) -> bool:
        """Process an event and return whether to relay it."""
        event = as_object(read_json(data))  # anything but JSON is relayed
        answer = as_object(event.get(self.ANSWER))
        kind = event.get("type")
        if event.get("error") or "error" in (kind, event.get("object")):
            self.error = find_error(event if event.get("error") else {"error": event})
            self.ended = True
            return False
        self.answer = self.answer or answer
        self.ended = kind in self.ENDS
        if kind == "response.failed":
            self.failure = find_error(answer) or ErrorObject()
        # The last event's counts are cumulative, but may omit the input's.
        new = read_usage(answer.get("usage") or event.get("usage"))
        self.usage = Usage(*(now or seen for now, seen in zip(new, self.usage)))
        hidden = self._hide_usage and isinstance(event.get("usage"), dict)
        return not hidden or bool(event.get("choices"))

    def end(self) -> bytes:
        """Return the last bytes to relay.  Raise ProtocolError(502) if incomplete."""
        rest = b"" if self.ended else self._decoder.end()
        data = event_data(rest) or b""
        # Half an event does not count, nor does its finish_reason.
        complete = data.strip() == b"[DONE]" or read_json(data) is not None
        block = self.receive(rest) if complete or not self.WORDS else b""
        if self.ended:
            return block
        self.ended = True
        if self._unfinished > 0:
            raise ProtocolError(502, "the stream ended before the answer was complete")
        return block + self.LAST


_NO_USAGE = '"usage":null'  # in each event but the last, from some servers
_FINISHED = re.compile(r'"finish_reason"\s*:\s*"[^"]')


class CompletionStream(EventStream):
    """Chunks of (chat) completions.  Nothing is relayed after [DONE] or an error."""

    WORDS = ('"error"', '"usage"', "[DONE]")
    LAST = DONE_EVENT

    def _is_plain(self, block: bytes, text: str) -> bool:
        # Two plain searches first: the regular expression takes 20 times as long.
        if self._unfinished > 0 and (
            '"finish_reason":"' in text or '"finish_reason": "' in text
        ):
            self._unfinished -= len(_FINISHED.findall(text))
        if '"error"' in text:
            return False
        if '"usage"' in text and text.count('"usage"') != text.count(_NO_USAGE):
            return False
        if "[DONE]" in text:  # unless it is quoted, or not at the end
            at_end = (b"\n\n" + block).endswith(b"\n\n" + DONE_EVENT)
            self.ended = at_end and text.count("[DONE]") == 1
            return self.ended
        return True

    def _process(self, data: bytes) -> bool:
        self.ended = data.strip() == b"[DONE]"
        plain = b'"error"' not in data and b'"usage"' not in data
        return plain or super()._process(data)


class OtherStream(EventStream):
    """Events of any other path: whatever they are, they are relayed."""

    def _is_plain(self, block: bytes, text: str) -> bool:
        if '"usage"' in text:
            found = (find_usage(data or b"") for _, data in split_events(block))
            self.usage = max((self.usage, *found), key=lambda usage: usage.total)
        return True


class ResponsesStream(EventStream):
    """Events of responses."""

    ANSWER = "response"
    ENDS = ("response.completed", "response.incomplete", "response.failed")
    WORDS = ('"error"', '"response.created"', *(f'"{kind}"' for kind in ENDS))


class MessagesStream(EventStream):
    """Events of messages."""

    ANSWER = "message"
    ENDS = ("message_stop",)
    WORDS = ('"error"', '"message_')


# --- Generated answers, in each dialect


class ChatWriter:
    """Writes a generated answer in a dialect; this class, as a chat completion.

    head          its id, created and model
    input_tokens  number of tokens in the request

    delta() and end() write a stream, from a chat's deltas.  From a chat.completion,
    events() writes a whole stream, and answer() one JSON object.
    """

    ID = "chatcmpl-"
    OBJECT = "chat.completion.chunk"

    def __init__(self, head: JSONObject, input_tokens: int = 0) -> None:
        self.head = {**head, "id": head["id"].replace("chatcmpl-", self.ID)}
        self.input_tokens = input_tokens
        self._role = {"role": "assistant"}
        self._calls: dict[Any, JSONObject] = {}  # ids and places of tool calls

    def _event(self, choices: list[JSONObject], **more: Any) -> bytes:
        head = {"id": None, "object": self.OBJECT, **self.head}
        return sse_event(encode_json({**head, "choices": choices, **more}))

    def _choice(self, delta: JSONObject, *fields: Any) -> JSONObject:
        calls = []
        for piece in delta.get("tool_calls") or ():
            key = CompletionBuilder.find_tool_call(self._calls, piece)
            call = {"id": None, "index": len(self._calls)}
            call = self._calls.setdefault(key, call)
            if call["id"]:  # once: clients join the pieces' ids
                piece = {k: v for k, v in piece.items() if k != "id"}
            call["id"] = call["id"] or piece.get("id")
            calls.append({**piece, "index": call["index"]})
        if calls:  # those of a stream have an index, which clients count from 0
            delta = {**delta, "tool_calls": calls}
        return choice_of("delta", delta, *fields)

    def delta(self, delta: JSONObject) -> bytes:
        """Return the events for {"content": text} or {"tool_calls": [...]}."""
        role, self._role = self._role, {}
        return self._event([self._choice({**role, **delta})])

    def end(self, finish_reason: str, usage: Usage) -> bytes:
        """Return the last events."""
        last = self._event([self._choice(self._role, finish_reason)])
        return last + self._event([], usage=usage_object(usage)) + DONE_EVENT

    def answer(self, completion: JSONObject) -> JSONObject:
        """Return a chat.completion as this dialect's answer."""
        return completion

    def events(self, completion: JSONObject) -> bytes:
        """Return a chat.completion as this dialect's whole stream."""
        keys = (*self.head, "system_fingerprint")
        self.head.update({k: completion[k] for k in keys if completion.get(k)})
        events = []
        for choice in completion.get("choices") or []:
            index, self._calls = choice.get("index", 0), {}
            delta = {k: v for k, v in choice["message"].items() if v is not None}
            whole = self._choice(delta, None, index, choice.get("logprobs"))
            last = self._choice({}, choice.get("finish_reason"), index)
            events += [self._event([whole]), self._event([last])]
        if completion.get("usage"):
            events.append(self._event([], usage=completion["usage"]))
        return b"".join(events) + DONE_EVENT

    @classmethod
    def relay(cls, answer: JSONObject) -> bytes:
        """Return an answer that is in this dialect as its whole stream."""
        return cls({"id": "", "created": 0, "model": ""}).events(answer)


class CompletionsWriter(ChatWriter):
    """Writes completions: text instead of messages."""

    ID = "cmpl-"
    OBJECT = "text_completion"

    def _choice(self, delta: JSONObject, *fields: Any) -> JSONObject:
        return choice_of("text", delta_text(delta), *fields[:2])

    def answer(self, completion: JSONObject) -> JSONObject:
        choices = [
            self._choice(choice["message"], choice.get("finish_reason"), index)
            for index, choice in enumerate(completion["choices"])
        ]
        head = {**self.head, "object": self.OBJECT}
        return {**completion, **head, "choices": choices}

    @classmethod
    def relay(cls, answer: JSONObject) -> bytes:
        return sse_event(encode_json(answer)) + DONE_EVENT


Templates = dict[str, list[tuple[str, list[str]]]]


def parse_templates(text: str, prefix: str = "", more: str = "") -> Templates:
    """Parse lines of templates: when to send an event, its name, and its fields.

    $name stands for a value, or for the template of a line "name = ...".  Where name
    is a moment, that is the item then complete, and the moment "stop" follows.  Each
    event's name gets the prefix, and each event has more, behind its type.
    """
    templates: Templates = defaultdict(list)
    lines = text.replace("\n    ", " ")
    for when, name, template in re.findall(r"(\w+) (=|[\w.]+)(.*)", lines):
        if name != "=":
            name = prefix + name
            template = f'{{"type": "{name}"{more}{template}}}'
        templates[when].append((name, re.split(r"\$(\w+)", template)))
    return dict(templates)  # an unknown moment raises KeyError


class MessagesWriter(ChatWriter):
    """Writes messages: items (text, tool calls), announced as they begin and end."""

    ID = "msg_"
    ITEMS = "content"
    BEGUN: ClassVar[JSONObject] = {"content": [], "stop_reason": None}
    STOPS: ClassVar = {
        "tool_calls": "tool_use",
        "length": "max_tokens",
        "content_filter": "refusal",
    }
    CUTS: ClassVar[JSONObject] = {}  # "incomplete_details" by finish_reason
    TEMPLATES: ClassVar = parse_templates("""
answer = {"id": $id, "type": "message", "role": "assistant", "model": $model,
    "content": $items, "stop_reason": $stop_reason, "stop_sequence": $stop_sequence,
    "usage": $counts}
counts = {"input_tokens": $input, "output_tokens": $output}
begin message_start, "message": $answer
text content_block_start, "index": $index,
    "content_block": {"type": "text", "text": ""}
piece content_block_delta, "index": $index,
    "delta": {"type": "text_delta", "text": $text}
text_end = {"type": "text", "text": $text}
call content_block_start, "index": $index,
    "content_block": {"type": "tool_use", "id": $item, "input": {}, "name": $name}
call content_block_delta, "index": $index,
    "delta": {"type": "input_json_delta", "partial_json": $text}
call = {"type": "tool_use", "id": $item, "input": $args, "name": $name}
thinking content_block_start, "index": $index,
    "content_block": {"type": "thinking", "thinking": "", "signature": ""}
thinking content_block_delta, "index": $index,
    "delta": {"type": "thinking_delta", "thinking": $thinking}
thinking content_block_delta, "index": $index,
    "delta": {"type": "signature_delta", "signature": $signature}
thinking = $whole
other content_block_start, "index": $index, "content_block": $whole
other = $whole
stop content_block_stop, "index": $index
completed message_delta, "usage": $counts,
    "delta": {"stop_reason": $stop_reason, "stop_sequence": $stop_sequence}
completed message_stop
""")
    # The moments of a whole item, by its type; "other" by default.
    _TEXT, _CALL = ("text", "piece", "text_end"), ("call",)
    MOMENTS: ClassVar = {"text": _TEXT, "message": _TEXT, "thinking": ("thinking",)}
    MOMENTS.update(tool_use=_CALL, function_call=_CALL)

    def __init__(self, head: JSONObject, input_tokens: int = 0) -> None:
        absent = dict.fromkeys(("stop_reason", "stop_sequence", "details"))
        super().__init__({"signature": "", **absent, **head}, input_tokens)
        self._items: list[JSONObject] = []  # complete
        self._pieces: list[str] = []  # of the current text
        self._refused = False
        self._tool_calls: dict[Any, JSONObject] = {}  # as far as they have arrived
        self._calls_written = 0
        self._events: list[bytes] = []  # not yet returned
        self._numbers = itertools.count()
        status = {"status": "in_progress", "usage": None}
        self._emit("begin", input=input_tokens, output=0, **status)

    def _render(self, template: list[str], values: JSONObject) -> str:
        parts = template[:]
        for at in range(1, len(parts), 2):  # every second one is a name
            if parts[at] in values:
                parts[at] = _to_text(values[parts[at]])
            else:
                parts[at] = self._render(self.TEMPLATES[parts[at]][0][1], values)
        return "".join(parts)

    def _emit(self, when: str, /, **values: Any) -> None:
        """Add the events of a moment, and keep the item that it completes."""
        index = len(self._items)
        place = {"index": index, "item": f"msg_{index}", "items": self._items}
        self._values = values = {**self.head, **place, **values}
        for name, template in self.TEMPLATES[when]:
            if name == "=":
                item = json.loads(self._render(template, values))
                self._emit("stop", whole=item)
                self._items.append(item)
            else:
                values["number"] = next(self._numbers)
                text = self._render(template, values)
                data = text.encode("utf-8", "backslashreplace")  # as encode_json()
                self._events.append(sse_event(data, name))

    def delta(self, delta: JSONObject) -> bytes:
        text = delta_text(delta)
        self._refused = self._refused or bool(delta.get("refusal"))
        if text:
            if not self._pieces:
                self._complete_items()
                self._emit("text")
            self._emit("piece", text=text)
            self._pieces.append(text)
        calls = as_list(delta.get("tool_calls"))
        if calls and self._pieces:
            self._complete_items()
        CompletionBuilder.add_tool_calls(self._tool_calls, calls)
        events, self._events = self._events, []
        return b"".join(events)

    def _complete_items(self) -> None:
        """Complete the text or the tool calls so far: something else follows."""
        text, self._pieces = "".join(self._pieces), []
        if text:
            part = {"part": {"type": "refusal", "refusal": text}}
            self._emit("text_end", text=text, **(part if self._refused else {}))
        for call in [*self._tool_calls.values()][self._calls_written :]:
            name, text = call["function"]["name"], call["function"]["arguments"]
            args = as_object(read_json(text))
            id = call["id"] or random_id("call_")  # SDKs refuse null
            self._emit("call", item=id, name=name, text=text, args=args)
        self._calls_written = len(self._tool_calls)

    def end(self, finish_reason: str, usage: Usage) -> bytes:
        self._complete_items()
        stop = "refusal" if self._refused else self.STOPS.get(finish_reason, "end_turn")
        details = self.CUTS.get(finish_reason)
        status = "incomplete" if details else "completed"
        ends = {"status": status, "stop_reason": stop, "details": details}
        self._emit(status, **ends, **usage._asdict(), total=usage.total)
        return self.delta({})

    def events(self, completion: JSONObject) -> bytes:
        choice = completion["choices"][0]
        usage = read_usage(completion.get("usage"))
        begun = self._items or self._pieces or self._tool_calls
        delta = b"" if begun else self.delta(choice["message"])
        return delta + self.end(choice.get("finish_reason") or "stop", usage)

    def answer(self, completion: JSONObject) -> JSONObject:
        self.events(completion)
        _, template = self.TEMPLATES["answer"][0]
        answer: JSONObject = json.loads(self._render(template, self._values))
        return answer

    @classmethod
    def relay(cls, answer: JSONObject) -> bytes:
        writer = cls({"id": "", "answer": {**answer, **cls.BEGUN}})
        for item in answer[cls.ITEMS]:
            id, args = item.get("call_id") or item.get("id"), item.get("input")
            text = item.get("text", item.get("arguments"))
            if text is None:
                text = _to_text(args) if args else content_text(item.get("content"))
            wholes = dict.fromkeys(("whole", "message", "function"), item)
            values = {**item, **wholes, "item": id, "text": text, "args": args}
            for when in cls.MOMENTS.get(item["type"], ("other",)):
                writer._emit(when, **values)
        values = {**answer, "answer": answer, "counts": answer.get("usage")}
        writer._emit(answer.get("status") or "completed", **values)
        return writer.delta({})


class ResponsesWriter(MessagesWriter):
    """Writes responses, whose events are numbered."""

    ID = "resp_"
    ITEMS = "output"
    BEGUN: ClassVar = {"output": [], "status": "in_progress"}
    CUTS: ClassVar = {
        "length": {"reason": "max_output_tokens"},
        "content_filter": {"reason": "content_filter"},
    }
    TEMPLATES: ClassVar = parse_templates(
        """
answer = {"id": $id, "object": "response", "created_at": $created, "model": $model,
    "status": $status, "error": null, "incomplete_details": $details,
    "instructions": null, "temperature": null, "top_p": null, "metadata": {},
    "output": $items, "parallel_tool_calls": true, "tool_choice": "auto", "tools": [],
    "usage": $usage}
usage = {"input_tokens": $input, "output_tokens": $output, "total_tokens": $total,
    "input_tokens_details": {"cached_tokens": $cached_input, "cache_write_tokens": 0},
    "output_tokens_details": {"reasoning_tokens": 0}}
message = {"type": "message", "id": $item, "role": "assistant", "status": "completed",
    "content": [$part]}
part = {"type": "output_text", "text": $text, "annotations": []}
function = {"type": "function_call", "id": $item, "call_id": $item, "name": $name,
    "status": "completed", "arguments": $text}
place = "item_id": $item, "output_index": $index
begin created, "response": $answer
begin in_progress, "response": $answer
text output_item.added, "output_index": $index, "item": {"type": "message",
    "id": $item, "role": "assistant", "status": "in_progress", "content": []}
text content_part.added, "part": {"type": "output_text", "text": "",
    "annotations": []}, $place, "content_index": 0
piece output_text.delta, "delta": $text, "logprobs": [], $place, "content_index": 0
text_end output_text.done, "text": $text, "logprobs": [], $place, "content_index": 0
text_end content_part.done, "part": $part, $place, "content_index": 0
text_end = $message
call output_item.added, "output_index": $index, "item": {"type": "function_call",
    "id": $item, "call_id": $item, "name": $name, "status": "in_progress",
    "arguments": ""}
call function_call_arguments.delta, "delta": $text, $place
call function_call_arguments.done, "arguments": $text, "name": $name, $place
call = $function
other output_item.added, "output_index": $index, "item": $whole
other = $whole
stop output_item.done, "output_index": $index, "item": $whole
completed completed, "response": $answer
incomplete incomplete, "response": $answer
failed failed, "response": $answer
""",
        prefix="response.",
        more=', "sequence_number": $number',
    )


# Tool calls and results: parts of a message in messages, separate items in responses.
_CALLS = ("tool_use", "function_call", "custom_tool_call")
_RESULTS = ("tool_result", "function_call_output", "custom_tool_call_output")
_THOUGHTS = ("thinking", "redacted_thinking")  # no place for them in a chat


def chat_part(part: JSONObject) -> JSONObject:
    """Return another dialect's text or image as that of a chat; others unchanged."""
    kind, source = part.get("type"), as_object(part.get("source"))
    if kind in ("input_text", "output_text", "text"):
        return {"type": "text", "text": part.get("text")}
    url = part.get("image_url") if kind == "input_image" else source.get("url")
    if kind == "image" and source.get("type") == "base64":
        url = f"data:{source.get('media_type')};base64,{source.get('data')}"
    if kind in ("input_image", "image") and isinstance(url, str):
        detail = {"detail": part["detail"]} if part.get("detail") else {}
        return {"type": "image_url", "image_url": {"url": url, **detail}}
    return part


def chat_messages(items: Any, system: Any = None) -> list[JSONObject]:
    """Return a string or another dialect's items as the messages of a chat.

    system  the system text beside them, as a string or in parts
    """
    messages: list[JSONObject] = []
    if system:
        messages.append({"role": "system", "content": content_text(system)})
    if isinstance(items, str):
        messages.append({"role": "user", "content": items})
    for item in map(as_object, as_list(items)):
        content = item.get("content")
        parts = [*map(as_object, as_list(content))]
        shown, calls = [], []
        for part in (item, *parts):
            kind = part.get("type")
            id = part.get("call_id") or part.get("tool_use_id") or part.get("id")
            if kind in _CALLS:
                arguments = part.get("arguments", part.get("input"))
                if not isinstance(arguments, str):
                    arguments = encode_json(arguments).decode()
                function = {"name": part.get("name"), "arguments": arguments}
                calls.append({"id": id, "type": "function", "function": function})
            elif kind in _RESULTS:
                text = content_text(part.get("output", part.get("content")))
                messages.append({"role": "tool", "tool_call_id": id, "content": text})
            elif kind not in _THOUGHTS and part is not item:
                shown.append(chat_part(part))
        if parts:
            content = content_text(shown) if all("text" in p for p in shown) else shown
        if "role" in item and (shown or not parts):
            messages.append({"role": item["role"], "content": content})
        if calls and (not messages or messages[-1]["role"] != "assistant"):
            messages.append({"role": "assistant", "content": None})
        if calls:
            messages[-1].setdefault("tool_calls", []).extend(calls)
    return messages


def chat_tools(tools: Any) -> list[Any]:
    """Return another dialect's tools as those of a chat."""
    found = []
    for tool in map(as_object, as_list(tools)):
        function = {key: tool[key] for key in ("name", "description") if key in tool}
        parameters = tool.get("parameters") or tool.get("input_schema") or {}
        function = tool.get("function") or {**function, "parameters": parameters}
        if "name" in function:  # without one, the provider runs it
            found.append({"type": "function", "function": function})
    return found


# --- Dialects


_SAYS_ERROR = re.compile(rb'"error"\s*:\s*[^\sn]')  # not null
_ANSWER_ID = re.compile(rb'"id"\s*:\s*"([^"\\]{1,200})"')


class Dialect:
    """What is specific to one path of the API; this class, to all other paths.

    answer_key     a key in every answer and no error; if given, bodies are judged by
                   their first bytes, not by their label
    default_model  "model" may be omitted, as in the OpenAI API
    counts         the answer is the number of tokens in a request
    """

    asks_usage = False  # a stream has usage only if stream_options asks for it
    continues = False  # a request may name an earlier answer to continue
    # What parses the stream of an answer, what makes one answer of it, and what writes
    # generated text as one.
    stream: ClassVar[type[EventStream]] = OtherStream
    builder: ClassVar[type[CompletionBuilder]] = CompletionBuilder
    writer: ClassVar[type[ChatWriter]] = ChatWriter
    # A request's fields with the messages and the system text, unless it is a chat.
    messages = system = ""
    error_event = ""  # the name of an error event, if it needs one

    def __init__(
        self, answer_key: bytes = b"", default_model: bool = False, counts: bool = False
    ) -> None:
        self.judged = answer_key != b""
        # Answers are text, generated token by token.
        self.generates = self.judged and self.stream is not OtherStream
        self.answer_key = answer_key
        self.default_model = default_model
        self.counts = counts

    def open_stream(self, request: APIRequest, max_size: int) -> EventStream:
        """Return the EventStream for the answer to a request."""
        stream = self.stream if self.generates else OtherStream
        return stream(request.counts_usage, request.choices, max_size)

    def check(self, content: bytes, delimited: bool) -> ErrorObject | None:
        """Return the error in a response's JSON, if any.

        delimited  whether the framing marks its end.  If not, a lost connection looks
                   like a closed one, and only the JSON shows which it was.

        Raise ProtocolError(502) for an incomplete answer.
        """
        complete = not self.judged or content.rstrip()[-1:] in (b"}", b"]")
        if not complete or (not delimited and read_json(content) is None):
            raise ProtocolError(502, "its answer is incomplete")
        answered = content.find(self.answer_key) >= 0  # "in" takes 0.2 us more
        if answered and not (self.generates and _SAYS_ERROR.search(content)):
            return None
        value = read_json(content)
        if answered and as_object(value).get(self.answer_key[1:-1].decode()):
            return None
        error = find_error(value)
        lacks_key = error is None and not answered and self.stream is CompletionStream
        if lacks_key and "request_id" not in as_object(value):  # xAI answers it later
            raise ProtocolError(502, 'its answer lacks "choices"')
        return error

    def error_content(self, error: APIError) -> bytes:
        """Return an error as the content of a response."""
        return encode_json({"error": error_object(error)})

    def late_error(self, error: APIError, stream: EventStream | None) -> bytes:
        """Return an error as a stream's last event; b"" where no such event exists."""
        if not self.generates:
            return b""
        return sse_event(self.error_content(error), self.error_event)

    def chat(self, body: JSONObject) -> JSONObject:
        """Return a request's body with a chat's messages and tools; APIError(400)."""
        if not self.messages:
            return body
        items = body.get(self.messages)
        if not isinstance(items, (str, list)):
            text = f"'{self.messages}' must be a list."
            raise APIError(400, text, param=self.messages)
        messages = chat_messages(items, body.get(self.system))
        return {**body, "messages": messages, "tools": chat_tools(body.get("tools"))}

    def answer_id(self, content: bytes) -> str:
        """Return the id that a later request continues from, given the first bytes."""
        found = _ANSWER_ID.search(content) if self.continues else None
        return found[1].decode("utf-8", "replace") if found else ""


class ChatDialect(Dialect):
    """/v1/chat/completions."""

    asks_usage = True
    stream = CompletionStream


class CompletionsDialect(ChatDialect):
    """/v1/completions: the same, with text instead of messages."""

    builder = TextBuilder
    writer = CompletionsWriter

    def chat(self, body: JSONObject) -> JSONObject:
        prompts = body.get("prompt") or ""
        [prompt, *others] = prompts if isinstance(prompts, list) else [prompts]
        if others or not isinstance(prompt, str):
            raise APIError(400, "'prompt' must be one string here.", param="prompt")
        return {**body, "messages": chat_messages(prompt)}


class ResponsesDialect(Dialect):
    """/v1/responses."""

    stream = ResponsesStream
    builder = ItemsBuilder
    writer = ResponsesWriter
    messages = "input"
    system = "instructions"
    continues = True

    def late_error(self, error: APIError, stream: EventStream | None) -> bytes:
        fields = {"code": error.code or error.type, "message": error.message}
        event: JSONObject = {**fields, "param": error.param}
        name = "error"
        if stream is not None and stream.answer:
            failed = {**stream.answer, "status": "failed", "error": fields}
            name, event = "response.failed", {"response": failed}
        number = 0 if stream is None else stream.events
        start = {"type": name, "sequence_number": number}
        return sse_event(encode_json({**start, **event}), name)


class MessagesDialect(Dialect):
    """/v1/messages, and its errors for all paths below it."""

    stream = MessagesStream
    builder = ItemsBuilder
    writer = MessagesWriter
    messages = "messages"
    system = "system"
    error_event = "error"
    ERROR_TYPES: ClassVar = {
        **APIError.TYPES,
        402: "billing_error",
        413: "request_too_large",
        503: "overloaded_error",
        504: "timeout_error",
    }
    # An upstream's own, which clients wait for and retry; others would blame the key.
    PASSED_TYPES = ("overloaded_error", "rate_limit_error", "timeout_error")

    def error_content(self, error: APIError) -> bytes:
        kind = "api_error" if error.status >= 500 else "invalid_request_error"
        if error.type in self.PASSED_TYPES:
            kind = error.type
        elif error.code != "cancelled":  # by a person: do not invite a retry
            kind = self.ERROR_TYPES.get(error.status, kind)
        fields = {"type": kind, "message": error.message}
        return encode_json({"type": "error", "error": fields})


CHAT_PATH = "/v1/chat/completions"
EMBEDDINGS_PATH = "/v1/embeddings"
MESSAGES_PATH = "/v1/messages"
DIALECTS: dict[str, Dialect] = {
    CHAT_PATH: ChatDialect(b'"choices"'),
    "/v1/completions": CompletionsDialect(b'"choices"'),
    "/v1/responses": ResponsesDialect(b'"output"'),
    MESSAGES_PATH: MessagesDialect(b'"content"'),
    f"{MESSAGES_PATH}/count_tokens": MessagesDialect(counts=True),
    EMBEDDINGS_PATH: Dialect(b'"data"'),
    "/v1/moderations": Dialect(default_model=True),
}
_OTHER_DIALECT = Dialect()
_BELOW_MESSAGES = MessagesDialect()


def dialect_of(path: str) -> Dialect:
    """Return the dialect of a path."""
    is_below = path.startswith(f"{MESSAGES_PATH}/")
    return DIALECTS.get(path, _BELOW_MESSAGES if is_below else _OTHER_DIALECT)


# --- Recordings: the lines of a tape


TAPE_VERSION = 1


def canonical_json(value: Any) -> bytes:
    """Return JSON that is the same for equal values: sorted keys, no white space."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


class Recording(NamedTuple):
    """A request and its answer: one line of a tape.

    content  a JSON object, or anything else as base64
    pieces   the answer as it arrived, each piece with the seconds since the request
    """

    path: str
    content: Any
    status: int
    content_type: str
    pieces: list[tuple[float, bytes]]

    def encode(self) -> bytes:
        """Return its line, beginning with the fields that identify the request."""
        content = canonical_json(self.content)
        digest = hashlib.sha256(content).hexdigest()
        head = {"tape": TAPE_VERSION, "path": self.path, "sha256": digest}
        pieces = [[seconds, *_piece_text(piece)] for seconds, piece in self.pieces]
        rest = {"status": self.status, "content_type": self.content_type}
        start, end = encode_json(head)[:-1], encode_json({**rest, "pieces": pieces})[1:]
        return start + b', "content": ' + content + b", " + end + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> Recording | None:
        """Return the recording in a line; None if invalid or of another version."""
        fields = as_object(read_json(line))
        with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError):
            path, content, status, kind, pieces = (fields[key] for key in cls._fields)
            pieces = [
                (float(seconds), base64.b64decode(text) if coding else text.encode())
                for seconds, text, *coding in pieces
            ]
            known = fields["tape"] == TAPE_VERSION and isinstance(path, str)
            if known and 200 <= status < 600 and kind.isascii() and kind.isprintable():
                return cls(path, content, status, kind, pieces)
        return None


def _piece_text(piece: bytes) -> tuple[str, ...]:
    try:
        return (piece.decode(),)
    except UnicodeDecodeError:
        return (base64.b64encode(piece).decode(), "base64")


def differing_fields(one: Any, other: Any, place: str = "") -> Iterator[str]:
    """Yield where two contents differ, as "messages[0].content": never the values."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            where = f"{place}.{key}".lstrip(".")
            yield from differing_fields(one.get(key), other.get(key), where)
    elif isinstance(one, list) and isinstance(other, list):
        for index, pair in enumerate(itertools.zip_longest(one, other)):
            yield from differing_fields(*pair, f"{place}[{index}]")
    elif one != other or type(one) is not type(other):
        yield place or "content"


# --- Requests


class Turn(NamedTuple):
    """A request's place in a conversation, as far as its body shows."""

    previous: str = ""  # the response that it continues
    cache_key: str = ""  # chosen by the client for requests with a common prefix
    start: str = ""  # model, system text and the user's first message
    later: bool = False  # whether more messages follow


def find_turn(body: JSONObject) -> Turn:
    """Return the Turn of a request to chat/completions, messages or responses.

    Only text counts: clients move their cache marks from turn to turn.
    """
    items = body.get("messages", body.get("input"))
    messages = [{"content": items}] if isinstance(items, str) else as_list(items)
    users = (n for n, m in enumerate(messages, 1) if as_object(m).get("role") == "user")
    count = next(users, len(messages))
    begin = [body.get("system"), body.get("instructions")]
    begin += [as_object(message).get("content") for message in messages[:count]]
    texts = [*map(content_text, begin), str(body.get("model"))]
    previous, cache_key = body.get("previous_response_id"), body.get("prompt_cache_key")
    return Turn(
        previous if isinstance(previous, str) else "",
        cache_key if isinstance(cache_key, str) else "",
        "\0".join(texts) if messages else "",
        len(messages) > count,
    )


def plain_form(content: bytes) -> bytes:
    """Return content, with a constant boundary if it is a form: SDKs vary theirs."""
    if content[:2] != b"--":
        return content
    boundary = content[:72].partition(b"\r\n")[0]
    return content.replace(boundary, b"--boundary")


class APIRequest:
    """A request to a controller, parsed as far as routing needs.

    path, query  of a POST: "/v1/chat/completions", and what follows "?"
    content      bytes as the client sent them
    body         the JSON object in content, if it is one
    form         its Content-Type otherwise
    headers      request fields to forward to an upstream

    Raise APIError(400) for an invalid field.
    """

    # Parsed JSON takes up to 30 times its bytes: above this size it is not kept.
    KEPT_SIZE = 1024 * 1024
    MODEL_SIZE = 2048  # characters: names are kept, matched and logged

    model: str | None = None  # the model asked for
    model_field: slice | None = None  # where a form has the model
    fallbacks: Iterable[Any] = ()  # more models, as OpenRouter and LiteLLM take them
    stream = False  # server-sent events are wanted
    wants_usage = False  # the client wants the usage event of a stream
    choices = 1  # number of choices in a completion
    id = ""  # x-request-id, for the log
    user = ""  # the queue is fair between users
    agent_id: str | None = None  # the only agent (or tape) that can answer
    recording: Recording | None = None  # its answer on a tape
    # For /api/ask: content, conversation_id and parent_id, for an agent that keeps
    # the conversation itself; for all others, body has the messages.
    ask: tuple[str, str, str] | None = None
    deadline = math.inf  # when to give up, on the loop's clock
    may_use: Callable[[str], bool] = bool  # whether its user may use a model
    # Called when the wait in the queue is over and a controller gets the request.
    on_asked: Callable[[], None] | None = None

    _body: JSONObject | None = None
    _has_options = False

    def __init__(
        self,
        path: str,
        content: bytes = b"",
        *,
        query: str = "",
        body: JSONObject | None = None,
        form: str = "",
        headers: dict[str, str] | None = None,
    ) -> None:
        self.path = path
        self.query = query
        self.dialect = dialect_of(path)
        self.content = content
        self.is_json = body is not None
        self.headers = headers or {}
        if body is None:
            self.model_field = find_form_field(content, form, "model")
            if self.model_field is not None:
                self.model = content[self.model_field].decode("utf-8", "replace")
        else:
            self._read_body(body)
            if len(content) <= self.KEPT_SIZE:
                self._body = body
            elif self.dialect.generates:
                self.turn = find_turn(body)
        if self.model is not None and len(self.model) > self.MODEL_SIZE:
            raise APIError(400, "The model's name is too long.", param="model")

    def _read_body(self, body: JSONObject) -> None:
        model = body.get("model")
        stream = body.get("stream")
        if "model" in body and not _OTHER_SPELLINGS.isdisjoint(body):
            raise APIError(400, "'model' appears twice.", param="model")
        if model is not None and not isinstance(model, str):
            raise APIError(400, "'model' must be a string.", param="model")
        if stream is not None and not isinstance(stream, bool):
            raise APIError(400, "'stream' must be true or false.", param="stream")
        self.model = model or None
        self.stream = bool(stream)
        self._has_options = "stream_options" in body
        options = as_object(body.get("stream_options"))
        self.wants_usage = options.get("include_usage") is True
        if not _FALLBACKS.isdisjoint(body):
            lists = (body[key] or [] for key in _FALLBACKS & body.keys())
            lists = (x if isinstance(x, list) else [x] for x in lists)
            self.fallbacks = [*itertools.chain(*lists)]
        choices = body.get("n")
        self.choices = choices if type(choices) is int and 1 <= choices <= 128 else 1

    @property
    def body(self) -> JSONObject:
        """The content's JSON object, parsed again each time if it is large."""
        return self.parse() if self._body is None else self._body

    def parse(self) -> JSONObject:
        """Return the content's JSON object, for the caller to change."""
        if not self.is_json:
            raise APIError(400, "The request must be a JSON object.")
        return parse_object(self.content)

    @property
    def target(self) -> str:
        """Path and query."""
        return f"{self.path}?{self.query}" if self.query else self.path

    @functools.cached_property
    def digest(self) -> bytes:
        """A SHA-256 of the content: the same for a request that is sent again."""
        content, size = self.content, self.KEPT_SIZE // 2
        if len(content) > 2 * size:  # 32 MiB would block the event loop for 0.1 s
            content = content[:size] + content[-size:] + b"%d" % len(content)
        return hashlib.sha256(plain_form(content)).digest()

    @functools.cached_property
    def turn(self) -> Turn:
        """Its place in a conversation."""
        body = self._body if self.dialect.generates else None
        return find_turn(body or {})

    @property
    def session(self) -> str:
        """The client's name for the conversation, or ""."""
        get, claude = self.headers.get, "x-claude-code-session-id"
        return get("x-session-id") or get(claude) or self.turn.cache_key

    @property
    def counts_usage(self) -> bool:
        """Whether the server itself must ask for the stream's usage."""
        return self.stream and not self.wants_usage and self.dialect.asks_usage

    def encode(self, model: str | None = None, include_usage: bool = False) -> bytes:
        """Return the content for an upstream, changed as little as possible.

        model          its name there, if different
        include_usage  ask for the usage event of a stream
        """
        same = model in (None, self.model)
        if same and not include_usage:
            return self.content
        if model is not None and not self.is_json:
            field, name = self.model_field, model.encode("utf-8", "replace")
            if field is None:
                return self.content
            return self.content[: field.start] + name + self.content[field.stop :]
        if same and not self._has_options:
            # Append the field to the client's own bytes.  It must be the last: Go's
            # JSON matches "Stream_Options", too, and uses the last one.
            start = self.content.rstrip()[:-1]
            return start + b',"stream_options":{"include_usage":true}}'
        body = dict(self.body)
        if model is not None:
            body["model"] = model
        if include_usage:
            options = as_object(body.get("stream_options"))
            body["stream_options"] = {**options, "include_usage": True}
        try:
            return encode_json(body)
        except RecursionError:  # it was parsed with a shallower stack
            raise APIError(400, "The request's JSON is nested too deeply.") from None


# Go's JSON matches "Model" as "model", and uses the last one.
_SPELLINGS = map("".join, itertools.product(*zip("model", "MODEL")))
_OTHER_SPELLINGS = {*_SPELLINGS} - {"model"}
# The fields of OpenRouter and LiteLLM that name more models.
_FALLBACKS = frozenset(
    "models fallbacks context_window_fallbacks content_policy_fallbacks"
    " user_config".split()
)


def _lower_keys(fields: Any) -> Any:
    if not isinstance(fields, dict):
        return fields
    lower = {key: key.lower() for key in fields}
    return {key if lower[key] in fields else lower[key]: fields[key] for key in fields}


def parse_chat_request(content: bytes) -> APIRequest:
    """Parse a chat request.  Raise APIError(400) for an invalid field.

    Capitalized keys ("Model", and in messages), as in the original Go gateway's own
    examples, are converted to lower case.
    """
    body = parse_object(content)
    if "messages" not in body or "model" not in body:
        body = _lower_keys(body)
        content = encode_json(body)
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise APIError(400, "'messages' must be a list.", param="messages")
    if content.find(b'"Role"') >= 0 and any(  # 0.2 us instead of checking each
        "Role" in as_object(message) and "role" not in message for message in messages
    ):
        body["messages"] = [_lower_keys(message) for message in messages]
        content = encode_json(body)
    if not body.get("model"):
        raise APIError(400, "'model' is missing.", param="model")
    return APIRequest(CHAT_PATH, content, body=body)


# -----------------------------------------------------------------------------
# Connections: the one place where asyncio meets the wire formats
# -----------------------------------------------------------------------------
#
# Everything stands on Connection: accepted sockets, upstream sockets, websockets.  It
# owns the buffer that the parsers take from, writes, waits for a slow peer, keeps one
# absolute deadline and notices the end.  It is a Protocol and not a pair of streams:
# those cost 12.4 us a request instead of 8.7 and see a hang-up only while reading.


PIPELINED_SIZE = 64 * 1024  # bytes read ahead while a request is served
# Bytes buffered for a slow peer when we start to wait for it, and when we go on.
WRITE_HIGH_WATER = 64 * 1024
WRITE_LOW_WATER = 16 * 1024
# Bytes unsent in the kernel.  By default it takes megabytes, and then nothing until a
# third is gone: a client at 30 KB/s looked stalled.
WRITE_UNSENT_SIZE = 16 * 1024
# After an error response, the rest of the request is read and discarded for a moment:
# closing with unread bytes sends an RST, which can destroy the response.
LINGER_TIMEOUT = 2.0  # seconds
LINGER_SIZE = 256 * 1024


@contextlib.contextmanager
def time_limit(when: float, error: Exception) -> Iterator[None]:
    """Raise error in the body at a time on the loop's clock.

    asyncio.timeout_at() needs Python 3.11.  Before 3.12, wait_for() can lose a
    cancellation, and it runs the body in a task of its own: generators that hold a
    cancel scope, as those of HTTP clients do, cannot be resumed from another task.

    Before 3.11, a cancellation in the same turn of the loop is taken for the timer's:
    the task gets error, and has to notice by itself that its client is gone.
    """
    task = asyncio.current_task()
    assert task is not None
    expired = False

    def expire() -> None:
        nonlocal expired
        expired = True
        task.cancel()

    timer = asyncio.get_running_loop().call_at(when, expire)
    others = 0  # other cancellations
    try:
        try:
            yield
        finally:
            timer.cancel()
            # A function may have swallowed ours: it must not count any longer.
            if expired and hasattr(task, "uncancel"):
                others = task.uncancel()
    except asyncio.CancelledError:
        if not expired or others:
            raise
        raise error from None


class Connection(asyncio.Protocol):
    """One TCP or TLS connection.

    Only one task may read.  Several may write; writes do not mix.
    """

    def __init__(
        self,
        limits: Limits = DEFAULT_LIMITS,
        on_made: Callable[[Connection], None] | None = None,
        on_lost: Callable[[Connection], None] | None = None,
    ) -> None:
        self.limits = limits
        self.loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport  # from connection_made() on
        self._socket: asyncio.Transport  # the same, or the one below TLS
        self.buffer = bytearray()  # received, not yet parsed
        self.eof = False  # the peer has sent its last byte
        self.lost = False  # the connection is gone ...
        self.error: Exception | None = None  # ... for this reason, if there is one
        self.writable = True  # drain() would return at once
        self._flowing = True  # the transport takes more
        self._held = bytearray()  # for a TLS transport, see _feed()
        self.stalled = False  # reset, as the peer took no byte for write_timeout
        self.tls = False
        # Called once if the peer hangs up while no task is reading.  After an EOF, it
        # may still be waiting for a response, or may have been killed.
        self.on_hangup: Callable[[], object] | None = None
        self.eof_is_hangup = False
        self.bytes_sent = 0
        self.peer = ""  # IP address, or "" if there is none
        self._on_made = on_made
        self._on_lost = on_lost
        # The result is whether the deadline has passed.  An exception would hold its
        # traceback, and so the frames that hold the future.
        self._reader: asyncio.Future[bool] | None = None
        self._writers: list[asyncio.Future[bool]] = []
        self.reading = True  # the transport is not paused
        self._deadline = self.loop.time() + limits.head_timeout
        self._timer: asyncio.TimerHandle | None = None

    # --- Called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._use(transport)
        self._socket = self.transport
        if self._on_made is not None:
            self._on_made(self)

    def _use(self, transport: asyncio.BaseTransport) -> None:
        # Not asserted: uvloop's transports do not inherit from asyncio's.
        self.transport = transport = cast(asyncio.Transport, transport)
        transport.set_write_buffer_limits(WRITE_HIGH_WATER, WRITE_LOW_WATER)
        name = transport.get_extra_info("peername")
        self.peer = str(name[0]) if isinstance(name, tuple) else ""
        self.tls = transport.get_extra_info("sslcontext") is not None
        tune(transport.get_extra_info("socket"))

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        reader = self._reader
        if reader is not None:
            self._reader = None
            if not reader.done():
                reader.set_result(False)
        elif len(self.buffer) > PIPELINED_SIZE and self.reading:
            # No task is reading: hold the peer back.  Not earlier, since a paused
            # transport sees neither FIN nor RST.
            self.reading = False
            self.transport.pause_reading()

    def eof_received(self) -> bool:
        self.eof = True
        self._wake()
        # A TLS transport cannot stay half open, and warns about it.
        return not self.tls

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self.error = exc
        self.eof = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake()
        self._release_writers()
        if self._on_lost is not None:
            self._on_lost(self)

    def _wake(self) -> None:
        """Wake the reading task at the peer's EOF or the connection's end."""
        reader, self._reader = self._reader, None
        if reader is not None:
            if not reader.done():
                reader.set_result(False)
        elif self.on_hangup is not None and (self.lost or self.eof_is_hangup):
            hangup, self.on_hangup = self.on_hangup, None
            hangup()

    def pause_writing(self) -> None:
        self.writable = self._flowing = False

    def resume_writing(self) -> None:
        self._flowing = True
        self._feed()

    def _release_writers(self) -> None:
        for writer in self._writers:
            if not writer.done():
                writer.set_result(False)
        self._writers.clear()

    async def start_tls(self, context: ssl.SSLContext, host: str | None = None) -> None:
        """Start TLS within tls_timeout: as the client of host, or else as a server.

        Raise OSError (ssl.SSLError is one) or asyncio.TimeoutError, after closing.
        """
        try:
            if self.buffer:  # these bytes would pass for decrypted ones
                raise ConnectionResetError("it sent bytes before the TLS handshake")
            transport = None
            with contextlib.suppress(ConnectionResetError):  # asyncio's has no text
                transport = await self.loop.start_tls(
                    self.transport,
                    self,
                    context,
                    server_side=host is None,
                    server_hostname=host,
                    ssl_handshake_timeout=self.limits.tls_timeout,
                )
            if transport is None:
                hint = "" if host is None else "; is it http?"
                raise ConnectionResetError(f"it hung up during the TLS handshake{hint}")
        except BaseException:
            # asyncio reports a failed handshake to its caller only.
            self.transport.abort()
            if not self.lost:
                self.connection_lost(None)
            raise
        self._use(transport)

    # --- Reading

    def set_deadline(self, when: float) -> None:
        """Set the loop time at which receive() times out.

        Postponing costs next to nothing: the running timer looks again when it fires.
        """
        self._deadline = when
        if self._timer is not None and when < self._timer.when():
            self._timer.cancel()
            self._timer = None

    def _on_timer(self) -> None:
        self._timer = None
        if self._reader is None:
            return
        if self.loop.time() < self._deadline:
            self._timer = self.loop.call_at(self._deadline, self._on_timer)
        elif not self._reader.done():
            self._reader.set_result(True)

    def resume_reading(self) -> None:
        """Undo the pause of data_received(), which hides the peer's end, too."""
        self.reading = True
        self.transport.resume_reading()

    async def receive(self) -> bool:
        """Wait for more bytes: False at the end, TimeoutError at the deadline."""
        if self.eof:
            return False
        size = len(self.buffer)
        if not self.reading:
            self.resume_reading()
        if self._timer is None:
            self._timer = self.loop.call_at(self._deadline, self._on_timer)
        self._reader = self.loop.create_future()
        try:
            if await self._reader:
                raise asyncio.TimeoutError
        finally:
            self._reader = None
        return len(self.buffer) > size or not self.eof

    async def read(self, parse: Callable[[bytearray], T | None]) -> T | None:
        """Return what parse takes off the buffer, or None if the peer ends first.

        Raise what parse raises, and asyncio.TimeoutError at the deadline.
        """
        while True:
            event = parse(self.buffer) if self.buffer else None
            if event is not None or not await self.receive():
                return event

    async def read_content(
        self, decoder: ContentDecoder, timeout: float, deadline: float = math.inf
    ) -> bytes:
        """Return the next piece of a message's content; b"" once it is complete.

        timeout   longest silence, in seconds
        deadline  latest loop time

        Raise ProtocolError for malformed or incomplete content, ConnectionResetError
        and asyncio.TimeoutError.
        """
        while True:
            if self.loop.time() >= deadline:  # the timer gets no turn without a pause
                raise asyncio.TimeoutError
            ready = self.buffer or decoder.pending
            piece = decoder.decode(self.buffer) if ready else b""
            if decoder.pending:  # 64 MiB inflate from 320 KiB, in 60 ms: let others run
                await asyncio.sleep(0)
            if piece or decoder.complete:
                return piece
            self.set_deadline(min(self.loop.time() + timeout, deadline))
            if not await self.receive():
                if self.error is not None:
                    raise ConnectionResetError("the connection was reset")
                decoder.end()

    # --- Writing

    def write(self, data: bytes) -> None:
        """Send data or buffer it, see drain(); ConnectionResetError if it is closed."""
        if self.lost or self.transport.is_closing():
            raise ConnectionResetError("the connection is closed")
        self.bytes_sent += len(data)
        if self._held or (self.tls and len(data) > PIECE_SIZE):
            self._held += data
            self.writable = False
            self._feed()
        else:
            self.transport.write(data)

    def _feed(self) -> None:
        """Pass on what is held back, while the transport takes it.

        From Python 3.11 on, TLS passes on all that it gets and calls none of it unsent.
        """
        while self._held and self._flowing:
            piece = bytes(self._held[:PIECE_SIZE])
            del self._held[:PIECE_SIZE]
            self.transport.write(piece)
        if self._flowing:
            self.writable = True
            self._release_writers()

    async def drain(self, *, or_receive: bool = False) -> None:
        """Wait until the peer has taken enough of what was written.

        Raise ConnectionResetError if it hangs up, or is reset because it takes no byte
        for write_timeout.

        or_receive  return as well when the peer answers, ends or hangs up, for
                    receive() to handle; raise asyncio.TimeoutError for a peer that
                    takes no byte, and at the deadline
        """
        while not self.writable and not self.lost:
            if or_receive and (self.buffer or self.eof):
                return
            writer: asyncio.Future[bool] = self.loop.create_future()
            self._writers.append(writer)
            if or_receive:
                self._reader = writer
                if self._timer is None:
                    self._timer = self.loop.call_at(self._deadline, self._on_timer)
            taken = self.bytes_sent - self.unsent
            timer = self.loop.call_later(
                self.limits.write_timeout, self._cut_if_stalled, taken, writer
            )
            try:
                if await writer:
                    raise asyncio.TimeoutError
            finally:
                timer.cancel()
                if or_receive:
                    self._reader = None
        if self.stalled and or_receive:
            raise asyncio.TimeoutError
        if self.lost and not or_receive:
            raise ConnectionResetError("the connection was closed")

    async def flush(self) -> None:
        """Wait as drain() does, but until the socket has taken everything."""
        await self.drain()
        while self.unsent:
            # From Python 3.11 on, TLS pauses us at once, and resumes when the
            # transport below it does: that one holds something, and comes first.
            for transport in (self._socket, self.transport):
                transport.set_write_buffer_limits(0)
            await self.drain()

    def _cut_if_stalled(self, taken: int, writer: asyncio.Future[bool]) -> None:
        # The buffer's size does not tell: another task may have filled it up.
        if self.bytes_sent - self.unsent <= taken:
            self.stalled = True
            self.reset()
        elif not writer.done():
            writer.set_result(False)

    @property
    def unsent(self) -> int:
        """Bytes written that the socket has not taken yet."""
        if self.lost:
            return 0
        return self._socket.get_write_buffer_size() + len(self._held)

    @property
    def closing(self) -> bool:
        """Whether it is too late to write."""
        return self.lost or self.transport.is_closing()

    # --- The end

    def close(self) -> None:
        """Close once everything is sent, after LINGER_TIMEOUT at the latest."""
        if self.lost:
            return
        if self.unsent or self.tls:
            self.loop.call_later(LINGER_TIMEOUT, self.abort)
        if not self.closing:  # after a second close, Python 3.11 cannot abort TLS
            if self._held:
                self.transport.write(bytes(self._held))
            self.transport.close()

    def abort(self) -> None:
        """Close at once."""
        if not self.lost:
            self.transport.abort()

    def reset(self) -> None:
        """Close with an RST: after a plain abort, the kernel keeps what it has not sent
        for a peer that does not read (2.8 MB measured)."""
        sock = self.transport.get_extra_info("socket")
        if sock is not None and not self.lost:
            on = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, on)
        self.abort()

    async def linger(self) -> None:
        """Close after a last response to a peer that may still be sending."""
        if not self.lost and self.transport.can_write_eof():
            with contextlib.suppress(OSError):  # it has just been reset
                self.transport.write_eof()
        self.set_deadline(self.loop.time() + LINGER_TIMEOUT)
        taken = len(self.buffer)
        with contextlib.suppress(asyncio.TimeoutError):
            while taken < LINGER_SIZE:
                self.buffer.clear()
                if not await self.receive():
                    break
                taken += len(self.buffer)
        self.close()


# After 60 s of silence, four probes 15 s apart find out whether the peer has vanished.
_TCP_OPTIONS = {
    "KEEPIDLE": 60,
    "KEEPINTVL": 15,
    "KEEPCNT": 4,
    # A second small write would wait 40 ms for an ACK.
    "NODELAY": 1,
    "NOTSENT_LOWAT": WRITE_UNSENT_SIZE,
}


def tune(sock: Any) -> None:
    """Set a socket's options, as far as the system supports them."""
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _TCP_OPTIONS.items():
        option = getattr(socket, f"TCP_{name}", None)
        if option is not None:
            with contextlib.suppress(OSError):  # all are optional
                sock.setsockopt(socket.IPPROTO_TCP, option, value)


class Address(NamedTuple):
    """A URL's scheme ("http" or "https"), host, port and path prefix."""

    scheme: str
    host: str
    port: int
    path: str

    @classmethod
    def of(cls, url: str) -> Address:
        """Parse an http, https, ws or wss URL; ValueError if it is none."""
        parts = urllib.parse.urlsplit(url)
        scheme = {"ws": "http", "wss": "https"}.get(parts.scheme, parts.scheme)
        if scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not an http or https URL")
        port = parts.port or (443 if scheme == "https" else 80)
        return cls(scheme, parts.hostname, port, parts.path.rstrip("/"))

    @property
    def authority(self) -> str:
        """Host and port as in a Host field: without the scheme's default port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        default = 443 if self.scheme == "https" else 80
        return host if self.port == default else f"{host}:{self.port}"

    def unanswered(self) -> ConnectionResetError:
        """Return the error for a new connection that ends without a byte."""
        hint = "" if self.scheme == "https" else "; is it https?"
        return ConnectionResetError(f"it closed the connection without an answer{hint}")


# OpenSSL's X509_V_ERR codes for a certificate of an issuer that we do not know.
_UNKNOWN_ISSUER = (2, 18, 19, 20, 21)


def connection_problem(error: Exception) -> str:
    """Return why a connection failed, in words for people, and what to do about it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        unknown = error.verify_code in _UNKNOWN_ISSUER
        cure = "; to trust it, set ca_file (an agent's --ca-file)" if unknown else ""
        return f"its certificate is not trusted ({error.verify_message}){cure}"
    if isinstance(error, ssl.SSLError):
        return f"it does not speak TLS ({error.reason or error}); is it http?"
    if isinstance(error, socket.gaierror):
        return error.strerror or str(error)
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)  # asyncio's message has addresses, too
    return str(error) or f"it failed ({type(error).__name__})"


def look_up(host: str, port: int) -> list[str]:
    """Return a host's addresses from the system's resolver; OSError if none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(item[4][0]) for item in found))


class Answer:
    """A controller's answer while it arrives: its head, then piece by piece.

    status     HTTP status
    headers    by name in lower case
    content    the whole content, or a generator of its pieces
    delimited  whether its framing marks its end
    """

    delimited = True

    def __init__(
        self,
        status: int,
        headers: dict[str, str],
        content: bytes | AsyncGenerator[bytes, None] = b"",
    ) -> None:
        self.status = status
        self.headers = headers
        self._content = content

    async def read(self) -> bytes:
        """Return the next bytes as they arrive; b"" at the end."""
        content = self._content
        if isinstance(content, bytes):
            self._content = b""
            return content
        async for piece in content:
            await asyncio.sleep(0)  # if it never awaits, it must not block the loop
            if piece:
                return piece
        return b""

    async def read_all(self, max_size: int) -> bytes:
        """Return the whole content; ProtocolError(413) if it is over max_size bytes."""
        pieces: list[bytes] = []
        size = 0
        while size <= max_size:
            piece = await self.read()
            if not piece:
                return pieces[0] if len(pieces) == 1 else b"".join(pieces)
            pieces.append(piece)
            size += len(piece)
        raise ProtocolError(413, f"the answer is over {max_size} bytes")

    def keep(self) -> None:
        """Keep the recording, if there is one: the answer was complete and valid."""

    async def finish(self) -> None:
        """Read the little that may follow a stream's last event."""

    async def aclose(self) -> None:
        """Stop an answer that is not read to its end."""
        if not isinstance(self._content, bytes):
            await self._content.aclose()


NEXT_ADDRESS_DELAY = 0.25  # seconds, as RFC 8305 section 8 advises
INTERIM_RESPONSES = 16  # 1xx before the final response
# A 408 that comes later is about the request, as Azure's after a minute.
EARLY_ANSWER_TIME = 1.0  # seconds
IDLE_CONNECTIONS = 1024  # kept per upstream; a new one costs 155 us, and TLS


@functools.lru_cache(maxsize=16)
def client_tls_context(
    ca_file: str | None, changed: int, verify: bool
) -> ssl.SSLContext:
    """Return a context that checks servers' certificates; changed: ca_file's mtime.

    Clients share it: making one takes 20 ms and 900 KiB.
    """
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError:
        raise OSError("its ca_file holds no certificate (PEM)") from None
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class HTTPClient:
    """An HTTP/1.1 client for one address, with keep-alive.

    base_url   "https://host[:port][/prefix]"
    proxy      "http://[user:password@]host:port", which gets a CONNECT (RFC 9110
               section 9.3.6); never bypassed
    ca_file    certificates to trust (PEM) instead of the system's
    verify     False accepts any certificate
    resolve    look_up() or a replacement, called in a thread

    Connects at the first request.  Follows no redirects: an upstream must not
    choose where keys are sent.
    """

    def __init__(
        self,
        base_url: str,
        *,
        proxy: str | None = None,
        ca_file: str | None = None,
        verify: bool = True,
        limits: Limits = DEFAULT_LIMITS,
        resolve: Callable[[str, int], list[str]] = look_up,
    ) -> None:
        self.address = Address.of(base_url)
        self.limits = limits
        self._host = ("Host", self.address.authority)
        self._proxy = Address.of(proxy) if proxy else None
        self._next_hop = self._proxy or self.address
        self._proxy_fields: list[tuple[str, str]] = []
        self._ca_file = ca_file
        self._verify = verify
        self._resolve = resolve
        self._idle: dict[Connection, float] = {}  # since when; the newest is last
        self._sweeper: asyncio.TimerHandle | None = None
        self._lookup: Future[list[str] | str] | None = None
        if proxy and "@" in proxy:
            parts = urllib.parse.urlsplit(proxy)
            pair = f"{parts.username or ''}:{parts.password or ''}"
            basic = base64.b64encode(urllib.parse.unquote(pair).encode()).decode()
            self._proxy_fields = [("Proxy-Authorization", f"Basic {basic}")]

    # --- Requests

    async def request(
        self,
        method: str,
        target: str,
        fields: Iterable[tuple[str, str]],
        content: bytes = b"",
        *,
        first_byte_timeout: float | None = None,
        deadline: float = math.inf,
    ) -> ClientResponse:
        """Send a request and return its response once the head has arrived.

        target is appended to the base URL's prefix.  Raise OSError (also for TLS
        and certificates), asyncio.TimeoutError, ProtocolError(502).
        """
        head = [self._host, *fields]
        if content or method not in ("GET", "HEAD"):
            head.append(("Content-Length", str(len(content))))
        line = f"{method} {self.address.path}{target} HTTP/1.1"
        message = encode_head(line, head) + content
        wait = first_byte_timeout or self.limits.first_byte_timeout
        answer = None
        connection = self._take_idle()
        if connection is not None:
            soon = connection.loop.time() + EARLY_ANSWER_TIME
            answer = await self._exchange(connection, method, message, wait, deadline)
            is_early = connection.loop.time() < soon
            if answer is not None and answer.status == 408 and is_early:
                await answer.aclose()  # it was idle for too long
                answer = None
        if answer is None:  # an idle one may have been closed, which is no failure
            connection = await self.open()
            answer = await self._exchange(connection, method, message, wait, deadline)
        if answer is None:
            raise self.address.unanswered()
        return answer

    async def _exchange(
        self,
        connection: Connection,
        method: str,
        message: bytes,
        timeout: float,
        deadline: float,
    ) -> ClientResponse | None:
        """Send a request, return its response; None if the connection ends first.

        A response may come before the request is sent: 413, 401 and 429 do, and are
        often followed by a reset (RFC 9112 section 9.5).
        """
        answer = None
        loop = connection.loop
        try:
            try:
                connection.write(message)
            except ConnectionResetError:
                return None
            if not connection.writable:
                longest = loop.time() + self.limits.request_timeout
                connection.set_deadline(min(longest, deadline))
                await connection.drain(or_receive=True)
            connection.set_deadline(min(loop.time() + timeout, deadline))
            for interim in range(INTERIM_RESPONSES + 1):
                head = await connection.read(parse_response_head)
                if head is None:
                    if connection.buffer or interim:
                        raise ConnectionResetError("its response head is incomplete")
                    return None
                if head.status >= 200:
                    answer = ClientResponse(self, connection, method, head, deadline)
                    return answer
                if head.status == 101:
                    break
            raise ProtocolError(502, "it sent only interim responses")
        finally:
            if answer is None:
                connection.abort()

    # --- Connections

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection, _ = self._idle.popitem()
            connection.on_hangup = None
            if not connection.buffer:
                return connection
            connection.abort()  # unsolicited bytes are not our response
        return None

    def keep(self, connection: Connection) -> None:
        """Keep a connection for other requests after a complete response."""
        if (
            connection.eof
            or connection.buffer
            or connection.unsent  # the response came before the whole request was sent
            or len(self._idle) >= IDLE_CONNECTIONS
        ):
            connection.abort()
            return
        if not connection.reading:
            connection.resume_reading()
        connection.eof_is_hangup = True
        connection.on_hangup = functools.partial(self._drop, connection)
        loop = connection.loop
        self._idle[connection] = loop.time()
        if self._sweeper is None:
            timeout = self.limits.idle_upstream_timeout
            self._sweeper = loop.call_later(timeout, self._sweep, loop)

    def _drop(self, connection: Connection) -> None:
        self._idle.pop(connection, None)
        connection.abort()

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        self._sweeper = None
        oldest = loop.time() - self.limits.idle_upstream_timeout
        for connection, since in list(self._idle.items()):
            if since > oldest:
                self._sweeper = loop.call_later(since - oldest, self._sweep, loop)
                break
            self._drop(connection)

    def close(self) -> None:
        """Close the idle connections; those in use close after their responses."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        for connection in list(self._idle):
            self._drop(connection)

    async def open(self) -> Connection:
        """Return a new connection, maybe via proxy; OSError, asyncio.TimeoutError."""
        try:
            connection = await self._dial()
        except ConnectionRefusedError:
            where = "there" if self._proxy is None else "at its proxy"
            raise ConnectionRefusedError(f"nothing listens {where}") from None
        try:
            if self._proxy is not None:
                await self._tunnel(connection)
            if self.address.scheme == "https":
                file = self._ca_file
                changed = os.stat(file).st_mtime_ns if file else 0
                context = client_tls_context(file, changed, self._verify)
                await connection.start_tls(context, self.address.host)
        except BaseException:
            connection.abort()
            raise
        return connection

    async def _dial(self) -> Connection:
        """Return a connection to whichever of the host's addresses answers first.

        While one does not, the next is tried beside it (RFC 8305 section 5).
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + self.limits.connect_timeout
        failure = OSError(f"{self._next_hop.host} has no address")
        attempts: set[asyncio.Task[Connection]] = set()
        try:
            with time_limit(end, asyncio.TimeoutError()):
                addresses = await self.addresses()
                while addresses or attempts:
                    if addresses:
                        attempt = self._connect(addresses.pop(0))
                        attempts.add(loop.create_task(attempt))
                    done, _ = await asyncio.wait(
                        attempts,
                        timeout=NEXT_ADDRESS_DELAY if addresses else None,
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                    for task in done:
                        attempts.remove(task)
                        try:
                            return task.result()
                        except OSError as error:
                            failure = error
            raise failure
        finally:
            for task in attempts:  # another one may have connected just now
                if not task.cancel() and task.exception() is None:
                    task.result().abort()

    async def _connect(self, address: str) -> Connection:
        connection, port = Connection(self.limits), self._next_hop.port
        await connection.loop.create_connection(lambda: connection, address, port)
        return connection

    async def addresses(self) -> list[str]:
        """Return the host's or proxy's addresses; OSError, asyncio.TimeoutError."""
        host, port = self._next_hop.host, self._next_hop.port
        with contextlib.suppress(ValueError):
            return [str(ipaddress.ip_address(host))]
        if self._lookup is None or self._lookup.done():
            # One at a time, in a daemon thread of its own: a resolver that hangs must
            # neither delay other lookups nor keep the process alive.
            self._lookup = Future()
            self._lookup.set_running_or_notify_cancel()  # cannot be cancelled
            arguments = (self._lookup, host, port)
            threading.Thread(target=self._look_up, args=arguments, daemon=True).start()
        end = asyncio.get_running_loop().time() + self.limits.connect_timeout
        with time_limit(end, asyncio.TimeoutError()):
            found = await asyncio.wrap_future(self._lookup)
        if isinstance(found, str):
            raise OSError(f"{host} could not be resolved: {found}")
        return [*found]

    def _look_up(self, lookup: Future[list[str] | str], host: str, port: int) -> None:
        try:
            lookup.set_result(self._resolve(host, port))
        except (OSError, UnicodeError) as error:
            lookup.set_result(connection_problem(error))

    async def _tunnel(self, connection: Connection) -> None:
        host, port = self.address.host, self.address.port
        authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        fields = [("Host", authority), *self._proxy_fields]
        connection.write(encode_head(f"CONNECT {authority} HTTP/1.1", fields))
        connection.set_deadline(connection.loop.time() + self.limits.connect_timeout)
        head = await connection.read(parse_response_head)
        if head is None or not 200 <= head.status < 300 or connection.buffer:
            status = "no answer" if head is None else f"status {head.status}"
            raise ConnectionRefusedError(f"the proxy refused the tunnel: {status}")


class ClientResponse(Answer):
    """An upstream's answer; its connection is kept if it is read to the end."""

    def __init__(
        self,
        client: HTTPClient,
        connection: Connection,
        method: str,
        head: Response,
        deadline: float,
    ) -> None:
        super().__init__(head.status, head.headers)
        self._client = client
        self._connection: Connection | None = connection
        self._deadline = deadline
        try:
            self._length = response_length(method, head)
            coding = content_coding(head.headers)
        except ProtocolError as error:
            raise ProtocolError(502, f"unreadable answer: {error}") from None
        self._decoder = content_decoder(self._length, coding)
        self.delimited = self._length != UNTIL_CLOSE
        self._keep_alive = keeps_alive(head) and self.delimited
        # We never ask for a coding, but some compress all the same.
        if head.headers.pop("content-encoding", None) is not None:
            head.headers.pop("content-length", None)

    async def read(self) -> bytes:
        """Return the next bytes of the content as they arrive; b"" at its end.

        Raise ProtocolError if it is malformed or incomplete, OSError, and
        asyncio.TimeoutError after silence_timeout.
        """
        if self._connection is None:
            return b""
        try:
            piece = await self._connection.read_content(
                self._decoder, self._client.limits.silence_timeout, self._deadline
            )
        except (ConnectionResetError, ProtocolError):
            if self.status < 400:
                raise
            piece = b""  # it refused our content and hung up; the head says why
            self._release()
        if self._decoder.complete:
            self._release()
        return piece

    async def read_all(self, max_size: int) -> bytes:
        connection, length = self._connection, self._length
        if connection is None or length is None or length == UNTIL_CLOSE:
            return await super().read_all(max_size)
        if length > max_size:
            raise ProtocolError(413, f"the answer is over {max_size} bytes")
        piece = self._decoder.decode(connection.buffer)  # usually all of it
        if not self._decoder.complete:
            return piece + await super().read_all(max_size)
        self._release()
        return piece

    async def finish(self) -> None:
        """Wait a moment for the last chunk after [DONE], which may come in a segment of
        its own: without it, the connection could not be kept."""
        deadline = asyncio.get_running_loop().time() + 0.2
        self._deadline = min(self._deadline, deadline)
        with contextlib.suppress(OSError, asyncio.TimeoutError, ProtocolError):
            while await self.read():
                pass

    async def aclose(self) -> None:
        self._release()

    def _release(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self._decoder.complete and self._keep_alive:
            self._client.keep(connection)
        else:
            connection.abort()


CLOSE_TIMEOUT = 5.0  # seconds, for the closing handshake
UNREAD_SIZE = 64 * 1024 * 1024  # bytes buffered for a peer that does not read
CONTROL_FRAME_RATE = 20  # pings and pongs a second ...
CONTROL_FRAME_BURST = 100  # ... after this many at once


class WebSocket:
    """A websocket on a connection, in either role.

        async for message in websocket:  # str for text, bytes for binary
            await websocket.send(message)

    The loop ends when the peer closes, hangs up or breaks the protocol; close_code
    is the reason (RFC 6455 section 7.1.5).  Iterating also answers pings and detects a
    vanished peer, so one task has to do it all the time.
    """

    def __init__(
        self, connection: Connection, masks: bool, *, max_size: int | None = None
    ) -> None:
        self.connection = connection
        self.limits = limits = connection.limits
        self.close_code = 1006
        self.close_reason = ""
        self._own_close = (0, "")  # the code and the reason that we closed with
        self.busy_until = 0.0  # loop time; until then, a missing pong means nothing
        self.headers = Headers()  # of the server's response to our handshake
        self.heartbeat: Callable[[], None] | None = None  # called in place of ping()
        self._protocol = WebSocketProtocol(masks, max_size or limits.message_size)
        # Received and not yet served, the next one last: a deque takes 600 bytes.
        self._events: list[WebSocketEvent] = []
        self._ended = False
        self._silences = 0  # intervals without a byte
        self._taken = math.inf  # bytes taken until the last one, if more were waiting
        self._pending_pong: bytes | None = None
        self._control_frames = float(CONTROL_FRAME_BURST)  # a token bucket
        self._refilled = connection.loop.time()
        connection.eof_is_hangup = True

    @classmethod
    def accept(
        cls,
        connection: Connection,
        request: Request,
        fields: Iterable[tuple[str, str]] = (),
        *,
        max_size: int | None = None,
    ) -> WebSocket:
        """Answer a client's handshake with 101 (RFC 6455 section 4.2).

        fields are further header fields of the response.  Raise ProtocolError: 400
        for an invalid handshake, 426 for another version than 13.
        """
        headers = request.headers
        key = headers.get("sec-websocket-key", "")
        if request.method != "GET" or request.version != "HTTP/1.1":
            raise ProtocolError(400, "a websocket handshake must be an HTTP/1.1 GET")
        if (
            "websocket" not in headers.tokens("upgrade")
            or "upgrade" not in headers.tokens("connection")
            or request.content_length != 0
        ):
            raise ProtocolError(400, "this address is for websockets only")
        if headers.get("sec-websocket-version") != "13":
            raise ProtocolError(426, "only websocket version 13 is supported")
        if not re.fullmatch(r"[A-Za-z0-9+/]{21}[AQgw]==", key):
            raise ProtocolError(400, "the Sec-WebSocket-Key field is malformed")
        response = [
            ("Upgrade", "websocket"),
            ("Connection", "Upgrade"),
            ("Sec-WebSocket-Accept", accept_key(key)),
            *fields,
        ]
        connection.write(encode_head("HTTP/1.1 101 Switching Protocols", response))
        return cls(connection, masks=False, max_size=max_size)

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        fields: Iterable[tuple[str, str]] = (),
        ca_file: str | None = None,
        verify: bool = True,
        max_size: int | None = None,
        limits: Limits = DEFAULT_LIMITS,
        resolve: Callable[[str, int], list[str]] = look_up,
    ) -> WebSocket:
        """Open a websocket to a ws, wss, http or https URL (RFC 6455 section 4.1).

        fields are further header fields of the handshake; it offers no extension
        and no subprotocol.  Raise ProtocolError with the response's status if it is
        not 101 (401 and 403: the key is refused), ProtocolError(502) if it is invalid,
        OSError (also for TLS), and asyncio.TimeoutError.
        """
        client = HTTPClient(
            url, ca_file=ca_file, verify=verify, limits=limits, resolve=resolve
        )
        parts = urllib.parse.urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        key = handshake_key()
        handshake = [
            ("Host", client.address.authority),
            ("Upgrade", "websocket"),
            ("Connection", "Upgrade"),
            ("Sec-WebSocket-Key", key),
            ("Sec-WebSocket-Version", "13"),
            *fields,
        ]
        head = encode_head(f"GET {target} HTTP/1.1", handshake)
        connection = await client.open()
        try:
            connection.write(head)
            connection.set_deadline(connection.loop.time() + limits.head_timeout)
            response = await connection.read(parse_response_head)
            if response is None:
                raise client.address.unanswered()
            cls._check_handshake(response, key)
        except BaseException:
            connection.abort()
            raise
        websocket = cls(connection, masks=True, max_size=max_size)
        websocket.headers = response.headers
        return websocket

    @staticmethod
    def _check_handshake(response: Response, key: str) -> None:
        """Raise ProtocolError unless the server's response accepts our handshake."""
        status, headers = response.status, response.headers
        if status != 101:
            reason = f"{status} {REASONS.get(status, '')}".rstrip()
            raise ProtocolError(status, f"the websocket was refused: {reason}")
        if (
            "websocket" not in headers.tokens("upgrade")
            or "upgrade" not in headers.tokens("connection")
            or headers.get("sec-websocket-accept") != accept_key(key)
        ):
            raise ProtocolError(502, "its handshake response is invalid")
        if "sec-websocket-extensions" in headers or "sec-websocket-protocol" in headers:
            raise ProtocolError(502, "it chose an extension that was not offered")

    def __aiter__(self) -> WebSocket:
        return self

    async def __anext__(self) -> str | bytes:
        message = await self.receive()
        if message is None:
            raise StopAsyncIteration
        return message

    async def receive(self) -> str | bytes | None:
        """Return the next message, or None when there will be no more."""
        # Events are served in order: what came before a close or a violation is
        # still answered.
        while not self._ended:
            if self._events:
                opcode, payload = self._events.pop()
                if not opcode & CONTROL_BIT:
                    message: str | bytes = payload
                    return message
                self._take_control(opcode, payload)
            elif (error := self._protocol.error) is not None:
                self._end(error.close_code, str(error))
                self._write(self._protocol.close(error.close_code, str(error)))
                await self.connection.linger()
            else:
                await self._read()
        return None

    async def _read(self) -> None:
        connection = self.connection
        if not connection.buffer:
            self._send_pong()
            limits = self.limits
            wait = limits.pong_timeout if self._silences else limits.ping_interval
            connection.set_deadline(connection.loop.time() + wait)
            try:
                if not await connection.receive():
                    self._end(1006)
                    connection.close()
                    return
            except asyncio.TimeoutError:
                self._on_silence()
                return
        self._silences = 0
        data = bytes(connection.buffer)
        connection.buffer.clear()
        self._events = self._protocol.receive(data)[::-1]

    def _on_silence(self) -> None:
        """Handle an interval without a byte: ping the peer, then give up."""
        connection = self.connection
        taken = connection.bytes_sent - connection.unsent
        # Our ping waits behind a large message, which a slow line takes minutes for.
        taking = self._silences > 0 and taken > self._taken
        self._taken = taken if connection.unsent else math.inf
        busy = connection.loop.time() < self.busy_until
        self._silences = 0 if taking or busy else self._silences + 1
        if self._silences > 1:
            self._end(1011, "no answer to a ping")
            self._write(self._protocol.close(1011, self.close_reason))
            self.connection.reset()  # it would not read a close frame either
        elif self.heartbeat is not None:
            self.heartbeat()
        else:
            self.ping()

    def _take_control(self, opcode: Opcode, payload: Any) -> None:
        if opcode is Opcode.CLOSE:
            self._end(*payload)
            self.close(payload[0])
            if not self._protocol.masks:  # section 7.1.1: the server closes TCP
                self.connection.close()
        elif not self.flooded() and opcode is Opcode.PING:
            # A peer that does not read gets one pong later, for its latest ping
            # (section 5.5.3), and not a buffer full of them.
            self._pending_pong = payload
            self._send_pong()

    def flooded(self) -> bool:
        """Count a ping, a pong or a message like them; too many end the websocket."""
        now = self.connection.loop.time()
        self._control_frames += (now - self._refilled) * CONTROL_FRAME_RATE
        self._control_frames = min(self._control_frames, CONTROL_FRAME_BURST) - 1
        self._refilled = now
        if self._control_frames >= 0:
            return False
        self._protocol.error = WebSocketError(1008, "too many control frames")
        self._events.clear()  # later ones are not served
        return True

    def _send_pong(self) -> None:
        if self._pending_pong is not None and self.connection.writable:
            self._write(self._protocol.pong(self._pending_pong))
            self._pending_pong = None

    def _end(self, code: int, reason: str = "") -> None:
        """Record how it ended; only the first reason counts."""
        if not self._ended:
            self._ended = True
            self.close_code = code
            agrees = code == self._own_close[0]  # it repeats the code alone
            self.close_reason = reason or (self._own_close[1] if agrees else "")

    def _write(self, frame: bytes) -> None:
        """Write a frame, or drop it if the peer is gone."""
        with contextlib.suppress(ConnectionResetError):
            self.connection.write(frame)

    @property
    def closing(self) -> bool:
        """Whether our close frame has been sent."""
        return self._protocol.close_sent

    def ping(self) -> None:
        """Send a ping."""
        if not self._protocol.close_sent:
            self._write(self._protocol.ping())

    def write(self, message: str | bytes) -> None:
        """Send a message without waiting for a slow peer.

        Raise ConnectionError if the websocket is closed.  A peer that leaves more than
        UNREAD_SIZE bytes unread is cut off.
        """
        if self.connection.unsent > UNREAD_SIZE:
            self._end(1008, "it has stopped reading")
            self.connection.reset()
        self.connection.write(self._protocol.send(message))

    async def send(self, message: str | bytes) -> None:
        """Send a message, and wait for a slow peer; ConnectionError if closed."""
        self.write(message)
        if not self.connection.writable:
            await self.connection.drain()
            self._send_pong()

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Start the closing handshake; the task that iterates sees its end."""
        if not self.connection.lost and not self._protocol.close_sent:
            self._own_close = (code, reason)
            self._write(self._protocol.close(code, reason))
            self.connection.loop.call_later(CLOSE_TIMEOUT, self.connection.abort)

    async def aclose(self, code: int = 1000, reason: str = "") -> None:
        """Close, and wait at most CLOSE_TIMEOUT for the peer to close, too."""
        self.close(code, reason)
        while await self.receive() is not None:
            pass
        connection = self.connection
        connection.set_deadline(connection.loop.time() + CLOSE_TIMEOUT)
        with contextlib.suppress(asyncio.TimeoutError):
            while await connection.receive():  # the server closes TCP first
                connection.buffer.clear()
        connection.close()


# -----------------------------------------------------------------------------
# Users, limits, usage
# -----------------------------------------------------------------------------
#
# users.json is the truth.  A change is made to a copy, the copy is written (lock,
# temporary file, fsync, replace, fsync of the folder), and only then does it take
# effect and get its answer.  Changes that arrive during a write share the next one.
# People and other servers edit the file too, so it is checked before each write and
# twice a second; a file that cannot be read is never overwritten.
#
# The Ledger records each finished request once.  User and controller limits, reports
# and the page read from it; usage.jsonl gets one increment a line.

ROLES = ("user", "agent", "monitor")
# Windows has the second only, all others the first.
OPEN_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
Stamp = tuple[int, int, int]  # mtime_ns, size, inode: changes with the content
ABSENT: Stamp = (0, 0, 0)


class User:
    """A user: an entry of users.json that has passed user_problem().

    user_id, name, role   role is "user", "agent" or "monitor"
    token, digest         token is "" if only its SHA-256 is stored
    quotas                from "limit"; None: the default limit applies
    models                patterns of the allowed models ("gpt-4o*"); None: all
    expires               Unix time, or infinity
    max_concurrency       concurrent requests, 0 for no limit
    old_digest, old_until  the previous token, and when it expires
    """

    __slots__ = tuple(
        "digest expires fields line max_concurrency models name old_digest old_until"
        " quotas role token user_id".split()
    )

    def __init__(self, fields: dict[str, Any], token: str | None = None) -> None:
        self.fields = fields
        self.user_id: str = fields["user_id"]
        self.token: str = fields.get("token", "") if token is None else token
        self.digest = stored_digest(fields)
        self.name: str = fields.get("name", "")
        self.role: str = fields.get("role", "user")
        limit = fields.get("limit")
        self.quotas = None if limit is None else parse_quotas(limit)
        self.models: list[str] | None = fields.get("models")
        self.expires = parse_time(fields.get("expires"))
        self.max_concurrency: int = fields.get("max_concurrency") or 0
        old = fields.get("old") or {}
        self.old_digest = stored_digest(old) if old else b""
        self.old_until = parse_time(old.get("expires"))
        # Encoded once, so that writing 100,000 users is one join.
        self.line = encode_json(fields)

    @property
    def label(self) -> str:
        """Name and id, for the log."""
        return f"{self.name} ({self.user_id})" if self.name else self.user_id

    def may_use(self, model: str) -> bool:
        """Whether the user may use a model."""
        return self.models is None or any(
            fnmatch.fnmatchcase(model, pattern.replace("[", "[[]"))  # "sonnet[1m]"
            for pattern in self.models
        )

    def public_json(self) -> bytes:
        """Return the user for GET /admin/users, any digest truncated."""
        if self.token and "old" not in self.fields:
            return self.line
        fields = {key: value for key, value in self.fields.items() if key != "old"}
        if not self.token:
            fields["sha256"] = fields["sha256"][:8]
        return encode_json(fields)


@functools.lru_cache(maxsize=1024)  # many users share one value
def parse_time(value: str | None) -> float:
    """Parse an RFC 3339 date or time into Unix time; None is infinity.

    Without an offset it is UTC; a date alone is its end.  Raise ValueError.
    """
    if value is None:
        return math.inf
    text = re.sub(r"\.[0-9]+", "", value.upper().replace(" ", "T"))
    if "T" not in text:
        return parse_time(f"{text}T00:00:00Z") + 86400
    at = time.strptime(text, "%Y-%m-%dT%H:%M:%S" + ("%z" if len(text) > 19 else ""))
    return calendar.timegm(at) - (at.tm_gmtoff or 0)


def token_digest(token: str) -> bytes:
    """Return the SHA-256 of a token, the key for user lookups.

    Looking up the token itself would compare secrets byte by byte, and the timing
    would reveal how much of a guess is right.  Comparing digests reveals nothing:
    nobody can steer towards a digest without knowing its token.
    """
    # Header values may contain surrogates, which UTF-8 refuses.
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def stored_digest(fields: dict[str, Any]) -> bytes:
    """Return the digest of the "token", or the one stored as "sha256"."""
    if "token" in fields:
        return token_digest(fields["token"])
    return bytes.fromhex(fields["sha256"])


class Quota(NamedTuple):
    """An amount of requests or tokens per calendar window, in UTC."""

    amount: int
    unit: str  # "requests" or "tokens"
    per: str  # "minute", "hour", "day", "week" (from Monday) or "month"

    def __str__(self) -> str:
        return f"{self.amount} {self.unit}/{self.per}"


UNITS = ("requests", "tokens")
PERIODS = ("minute", "hour", "day", "week", "month")
_QUOTA = re.compile(
    rf"\s*0*([1-9][0-9]{{0,14}})\s+({'|'.join(UNITS)})\s*/\s*({'|'.join(PERIODS)})\s*"
)
QUOTA_WORDS = (
    'such as "1000 requests/day" (requests or tokens; minute, hour, day, week or month)'
)


@functools.lru_cache(maxsize=1024)  # many users share one value
def parse_quota(text: str) -> Quota:
    """Parse a quota such as "1000 requests/day".  Raise ValueError."""
    match = _QUOTA.fullmatch(text)
    if match is None:
        raise ValueError(f"expected a limit {QUOTA_WORDS}")
    return Quota(int(match[1]), match[2], match[3])


def parse_quotas(value: Any) -> list[Quota]:
    """Parse "limit": a string, an object, or a list of them.  Raise ValueError.

    The object is {"requests": n, "tokens": n, "per": "day"}.
    """
    texts: list[Any] = []
    for item in value if isinstance(value, list) and value else [value]:
        if isinstance(item, dict):
            units = [(unit, n) for unit, n in item.items() if unit != "per"]
            # parse_quota() refuses the repr of anything but a whole number.
            texts += [f"{n!r} {unit}/{item.get('per')}" for unit, n in units] or [""]
        else:
            texts.append(item)
    return [parse_quota(text if isinstance(text, str) else "") for text in texts]


def has_type(value: Any, types: Any) -> bool:
    """As isinstance(), but True is not a number."""
    return isinstance(value, types) and (type(value) is not bool or types is bool)


class Expected(NamedTuple):
    """The check for a single value."""

    words: str  # follow "expected" in a message
    test: Callable[[Any], Any]  # for values of these types; may raise ValueError
    types: Any = str  # one or a tuple, as for isinstance

    def fits(self, value: Any) -> bool:
        """Whether a value passes the check."""
        with contextlib.suppress(ValueError):
            return has_type(value, self.types) and bool(self.test(value))
        return False


def one_of(*words: str) -> Expected:
    """Expect one of these strings."""
    return Expected(" or ".join(map(json.dumps, words)), words.__contains__)


def whole_number(least: int) -> Expected:
    """Expect a whole number, within reason."""
    words = f"a whole number from {least}"
    return Expected(words, lambda value: least <= value < 10**12, int)


LIMIT = Expected(f"a limit {QUOTA_WORDS}", parse_quotas, (str, dict, list))
USER_FIELDS = {
    "user_id": Expected(  # usage of the API key counts as admin's
        'a string, neither empty nor "admin"', lambda id: id not in ("", "admin")
    ),
    # A header could carry no other token; an empty one would let everybody in.
    "token": Expected("visible ASCII characters", re.compile("[!-~]+").fullmatch),
    "sha256": Expected(
        "64 lower-case hex digits", re.compile("[0-9a-f]{64}").fullmatch
    ),
    "name": Expected(
        "at most 200 printable characters",
        lambda name: len(name) <= 200 and name.isprintable(),
    ),
    "role": Expected('"user", "agent" or "monitor"', ROLES.__contains__),
    "limit": LIMIT,
    "models": Expected(
        'a list of names such as ["gpt-4o*"]',
        lambda models: all(isinstance(model, str) and model for model in models),
        list,
    ),
    "expires": Expected(
        'a time such as "2027-01-31" or "2027-01-31T12:00:00Z"', parse_time
    ),
    "max_concurrency": whole_number(1),
    "old": Expected("a token and its expiry", lambda old: not user_problem(old), dict),
}
NEVER_NULL = ("user_id", "token", "sha256", "name", "role")
# What the administrator may set.  Ids and tokens are generated: a duplicate would
# take over another user's, and the file could not be read again.
SETTABLE = ("name", "role", "limit", "models", "expires", "max_concurrency")
Users = dict[str, User]  # by user_id, in the file's order


def encode_users(users: Users) -> bytes:
    """Encode users.json: one user a line, for editors and diff."""
    lines = b",\n".join([user.line for user in users.values()])
    return b'{"users": [\n' + lines + b"\n]}\n"


def parse_users(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Users:
    """Parse users.json: {"users": [{"user_id": "...", "token": "..."}, ...]}.

    Raise ConfigurationError with the line and column, or the place (users[3].token),
    and what was expected, but never a token.
    """
    if not data:
        # A crash without fsync leaves this; it does not mean "no users".
        raise ConfigurationError('the file is empty, expected {"users": []}')
    document: dict[Any, Any] = as_object(load_json(data))
    if None in document:
        raise ConfigurationError(f"{quote_key(document[None])}: duplicate key")
    entries = document.pop("users", None)
    if not isinstance(entries, list):
        raise ConfigurationError('expected {"users": [...]}')
    if len(entries) > limits.users:
        raise ConfigurationError(f"users: expected at most {limits.users:,}")
    for key in document:
        raise ConfigurationError(f'expected only "users", got {key!r} as well')
    users: Users = {}
    owners: dict[bytes, str] = {}  # user_ids by token digest
    for index, fields in enumerate(entries):
        problem = user_problem(fields, "user_id")
        if not problem:
            user = User(fields)
            if user.user_id in users:
                problem = f".user_id: another user has the id {user.user_id!r}"
            for place, digest in ("token", user.digest), ("old.token", user.old_digest):
                owner = owners.setdefault(digest, user.user_id)
                if digest and owner != user.user_id:
                    problem = f".{place}: user {owner!r} has the same token"
        if problem:
            raise ConfigurationError(f"users[{index}]{problem}")
        users[user.user_id] = user
    return users


def user_problem(fields: Any, *needed: str) -> str:
    """Return what is wrong with fields, or "".  They need a token or its digest."""
    if not isinstance(fields, dict):
        return ": expected an object"
    if None in fields:
        return f".{quote_key(fields[None])}: duplicate key"
    if "token" in fields and "sha256" in fields:
        return '.sha256: expected either "token" or "sha256"'
    credential = "sha256" if "sha256" in fields else "token"
    for key in (*needed, credential, *fields):
        expected, value = USER_FIELDS.get(key), fields.get(key)
        if expected is None:
            return f".{key}: unknown field"
        if not expected.fits(value) and (value is not None or key in NEVER_NULL):
            return f".{key}: expected {expected.words}"
    return ""


def load_json(data: bytes) -> Any:
    """Parse a file's UTF-8 JSON, its objects built by unique_keys().

    Raise ConfigurationError, with line and column if known.
    """
    try:
        text = data.decode("utf-8-sig")  # editors on Windows write a byte order mark
        return json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        line, column, problem = error.lineno, error.colno, f"not JSON: {error.msg}"
        if text[: error.pos].rstrip().endswith(","):
            problem += " (a comma too many?)"
    except UnicodeDecodeError as error:
        lines = data[: error.start].split(b"\n")
        line, column, problem = len(lines), len(lines[-1]) + 1, "not UTF-8"
    except (ValueError, RecursionError):  # 5,000 digits, 1,000 brackets
        text = "a number is too long or the nesting too deep"
        raise ConfigurationError(text) from None
    raise ConfigurationError(f"line {line}, column {column}: {problem}")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str | None, Any]:
    """Return a JSON object as a dict, or {None: key} if a key is repeated."""
    content: dict[str | None, Any] = {}
    for key, value in pairs:
        if key in content:
            return {None: key}
        content[key] = value
    return content


def quote_key(key: str) -> str:
    """Return a key for a message: short, and on one line."""
    return key if re.fullmatch("[A-Za-z0-9_-]{1,40}", key) else json.dumps(key[:40])


@contextlib.contextmanager
def file_lock(path: str, timeout: float = 5.0) -> Iterator[None]:
    """Hold the lock file at path, which all servers on one users.json share.

    The file is never removed: another process may be waiting for it.  Raise OSError,
    also if another process (stopped?) holds the lock for more than timeout seconds.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | OPEN_FLAGS, 0o600)
    try:
        deadline = time.monotonic() + timeout
        while not try_lock(fd):
            if time.monotonic() > deadline:
                raise OSError(errno.ETIMEDOUT, "another process holds its lock")
            time.sleep(0.002)
        yield
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)  # releases the lock, as does the end of the process


def try_lock(fd: int) -> bool:
    """Take the lock if it is free.  Return whether it was."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def sync(fd: int) -> None:
    """Flush a file or folder to the disk itself."""
    if sys.platform == "darwin":
        # fsync stops at the drive's cache there; some file systems have only that.
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


def sync_folder(folder: str) -> None:
    """Make a replaced name durable: a power cut could bring the old one back."""
    if sys.platform != "win32":  # which has no such call
        fd = os.open(folder, os.O_RDONLY)
        try:
            sync(fd)
        finally:
            os.close(fd)


def replace_file(path: str, data: bytes, newer_than: int) -> Stamp:
    """Atomically replace path by a new file of mode 0600.

    Return its stamp, with an mtime_ns above newer_than.  After an OSError the old
    file is still in place, and no temporary file remains.
    """
    temporary = f"{path}.{os.getpid()}.{secrets.token_hex(8)}.tmp"
    # O_EXCL, O_NOFOLLOW: another user with write access to the folder cannot plant
    # this name to redirect the write, or to read what is written.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | OPEN_FLAGS
    fd = os.open(temporary, flags, 0o600)
    try:
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(fd, rest) :]
            if os.fstat(fd).st_mtime_ns <= newer_than:
                # File system clocks tick in milliseconds, and freed inodes are reused
                # at once: without this, two versions may have the same stamp.
                os.utime(temporary, ns=(newer_than + 1, newer_than + 1))
            # Before the replace, or a power cut may keep the name and lose the data.
            # A failed fsync drops the dirty pages, and a second one would succeed
            # without writing them: never retry on the same file.
            sync(fd)
            stamp = stamp_of(os.fstat(fd))
        finally:
            os.close(fd)
        replace_name(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return stamp


def remove_temporary_files(path: str) -> None:
    """Remove the temporary files that crashes have left beside path."""
    folder, name = os.path.split(path)
    ours = re.compile(re.escape(name) + r"\.[0-9]+\.[0-9a-f]{16}\.tmp").fullmatch
    with contextlib.suppress(OSError):
        if any(map(ours, os.listdir(folder))):
            # Another server may be using one, but not while we hold the lock.
            with file_lock(path + ".lock"):
                for entry in filter(ours, os.listdir(folder)):
                    os.unlink(os.path.join(folder, entry))


def replace_name(source: str, target: str) -> None:
    """Call os.replace(); on Windows, retry while the target is being read."""
    for _ in range(5 if sys.platform == "win32" else 0):
        try:
            os.replace(source, target)
            return
        except PermissionError:
            time.sleep(0.05)
    os.replace(source, target)


def stamp_of(found: os.stat_result) -> Stamp:
    """Return what distinguishes one version of a file from another."""
    return found.st_mtime_ns, found.st_size, found.st_ino


def append_to_file(path: str, lines: bytes) -> Stamp:
    """Append lines, all or none, and return the new stamp; a new file is mode 0600."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | OPEN_FLAGS, 0o600)
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        if lines and size:
            os.lseek(fd, -1, os.SEEK_END)
            # The rest of a line torn by a crash must not swallow the next one.
            lines = lines if os.read(fd, 1) == b"\n" else b"\n" + lines
        if os.write(fd, lines) < len(lines):  # a full disk
            os.ftruncate(fd, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return stamp_of(os.fstat(fd))
    finally:
        os.close(fd)


Change = Callable[[Users], User]  # applied to a copy; raises APIError
GONE_AFTER = 5.0  # seconds until a missing file means that there are no users


class UserStore:
    """The users in memory, and the file that holds them.

    path    users.json, or a symlink to it; the file may be missing, its folder not
    store   what to keep of new tokens: "token" or "sha256"
    report  called in the event loop with one line for people

    The constructor touches no file, and nothing is written until a user is added.
    Apart from load(), one thread does all file access; it replaces the users as a
    whole, so that readers need no lock.
    """

    def __init__(
        self,
        path: str,
        *,
        store: str = "token",
        limits: Limits = DEFAULT_LIMITS,
        report: Callable[[str], object] = lambda line: None,
    ) -> None:
        self.store = store
        self.path = os.path.abspath(path)  # a later chdir must not move it
        self.limits = limits
        self._name = os.path.basename(path)
        self._report = report
        self._users: Users = {}
        self._by_digest: dict[bytes, User] = {}
        self._seen: Stamp | None = None  # the version read last; None: read again
        self._broken = ""  # why the file cannot be read, and so must not be written
        self._waiting: deque[tuple[Change, Future[User]]] = deque()  # thread-safe
        self._executor: Executor | None = None
        self._closed = False
        self._gone_at = math.inf  # when the file was first found missing

    @property
    def users(self) -> list[User]:
        """All users, in the file's order."""
        return list(self._users.values())

    def find(self, token: str) -> User | None:
        """Return the user with this token, or None.  Any str is accepted."""
        digest = token_digest(token)
        user = self._by_digest.get(digest)
        if user is not None and digest != user.digest:  # the previous token
            return user if unix_time() < user.old_until else None
        return user

    def load(self) -> None:
        """Read the file at startup, without writing to it.

        Raise ConfigurationError, one line, if it or its folder cannot be used.
        """
        self._closed = False
        self._seen, self._broken = None, ""
        self._gone_at = -math.inf  # at startup a missing file means no users at once
        remove_temporary_files(self._target)
        self._adopt(self._read_changed() or {})
        if not os.access(os.path.dirname(self._target), os.W_OK | os.X_OK):
            self._report(
                f"{self.path}: its folder is not writable: users cannot be changed"
            )

    async def add(self, /, **settings: Any) -> User:
        """Add a user with a new id and token, on disk when this returns.

        settings are those of SETTABLE.  The user returned carries its token, even if
        only a digest is kept.  Raise APIError, with nothing changed: 400 for an invalid
        setting, 507 past a limit, 500 if the file cannot be written.
        """
        token = str(uuid.uuid4())  # 122 bits from os.urandom()
        fields = {"user_id": str(uuid.uuid4()), **self._credential(token)}
        user = self._build(fields, settings)
        await self._change(lambda users: self._put(users, user))
        return User(user.fields, token)

    async def update(self, user_id: str, settings: dict[str, Any]) -> User:
        """Change a user's settings; None removes one.

        {"rotate": seconds} issues a new token and keeps the old one valid that long, or
        until the next rotation.  Otherwise the user returned carries no token.  Raise
        APIError as add() does, and 404.
        """
        seconds = settings.pop("rotate", None)
        if seconds is not None and (type(seconds) is not int or not 0 <= seconds < 1e9):
            text = "rotate must be a whole number of seconds"
            raise APIError(400, text, param="rotate")
        token = "" if seconds is None else str(uuid.uuid4())

        def change(users: Users) -> User:
            fields = known_user(users, user_id).fields.copy()
            if seconds is not None:
                until = rfc3339(unix_time() + seconds + (seconds > 0))  # 0: at once
                keys = {"token", "sha256"} & fields.keys()
                old = {key: fields.pop(key) for key in keys}
                fields.update(self._credential(token), old={**old, "expires": until})
            return self._put(users, self._build(fields, settings))

        return User((await self._change(change)).fields, token)

    def _credential(self, token: str) -> dict[str, str]:
        """Return the field that stores a new token."""
        if self.store == "sha256":
            return {"sha256": token_digest(token).hex()}
        return {"token": token}

    @staticmethod
    def _build(fields: dict[str, Any], settings: dict[str, Any]) -> User:
        """Build a user from fields and new settings.  APIError(400) names a bad one."""
        for key in settings:
            if key not in SETTABLE:
                raise APIError(400, f"{key[:100]}: unknown field", param=key[:100])
        fields = {k: v for k, v in {**fields, **settings}.items() if v is not None}
        problem = user_problem(fields, "user_id")
        if problem:
            key, _, expected = problem[1:].partition(": ")
            raise APIError(400, f"{key}: {expected}", param=key)
        return User(fields)

    def _put(self, users: Users, user: User) -> User:
        """Add or replace a user.  APIError: 400 for a taken name, 507 past a limit."""
        known = users.get(user.user_id)
        if known is None and len(users) >= self.limits.users:
            raise APIError(507, f"The limit of {self.limits.users:,} users is reached")
        lines = [other.line for other in users.values() if other is not known]
        size = len(encode_users({})) + sum(map(len, lines)) + len(lines) * len(",\n")
        if size + len(user.line) > self.limits.users_file_size:
            raise APIError(507, f"{self._name} has reached its maximum size")
        # A name in the log must identify one user.
        taken = user.name == "admin" or any(
            other.name == user.name and other is not known for other in users.values()
        )
        if user.name and taken:
            raise APIError(400, f"name: {user.name!r} is taken", param="name")
        users[user.user_id] = user
        return user

    async def delete(self, user_id: str) -> None:
        """Delete a user.  From then on its token is refused, even after a crash.

        Raise APIError: 404 for an unknown id, 500 if the file cannot be written.
        """
        if user_id not in self._users:
            await self.refresh()  # an unknown id causes no write and no lock file
            known_user(self._users, user_id)
        await self._change(lambda users: users.pop(known_user(users, user_id).user_id))

    async def refresh(self) -> None:
        """Load what a person or another server has written.

        A broken file is reported once; until it is repaired the previous users stay
        in force, and none can be added, changed or deleted.
        """
        if not self._closed:
            await self._in_thread(self._reread)

    async def aclose(self) -> None:
        """Finish pending changes and end the thread; load() reopens the store."""
        self._closed = True
        executor, self._executor = self._executor, None
        if executor is not None:
            # First in, first out: all earlier work is done once this has run.
            last = asyncio.get_running_loop().run_in_executor(executor, int)
            executor.shutdown(wait=False)
            await last
            executor.shutdown()  # joins an idle thread

    def _in_thread(self, function: Callable[[], None]) -> asyncio.Future[None]:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, "users")
        self._loop = asyncio.get_running_loop()
        return self._loop.run_in_executor(self._executor, function)

    async def _change(self, change: Change) -> User:
        if self._closed:
            raise APIError(503, "The server is shutting down")
        answer: Future[User] = Future()
        self._waiting.append((change, answer))
        self._in_thread(self._commit)  # a no-op if the previous commit has taken it
        # Cancelling the caller withdraws its change if that is still queued.
        return await asyncio.wrap_future(answer)

    # --- In the thread.

    def _report_in_loop(self, line: str) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._report, line)

    def _commit(self) -> None:
        """Apply all waiting changes in one write, then answer each of them."""
        batch = []
        while self._waiting:
            change, answer = self._waiting.popleft()
            if answer.set_running_or_notify_cancel():  # not if it was cancelled
                batch.append((change, answer))
        try:
            if batch:
                self._write(batch)
        except Exception as error:
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(error)

    def _write(self, batch: list[tuple[Change, Future[User]]]) -> None:
        """Write changes, put them in force and answer them.

        An invalid change is refused alone.  Raise APIError(500) if the file could not
        be written.
        """
        done = []
        try:
            with file_lock(self._target + ".lock"):
                self._reread()
                if self._broken:
                    raise self._not_written(self._broken)
                users = self._users.copy()
                for change, answer in batch:
                    try:
                        done.append((answer, change(users)))
                    except APIError as error:
                        answer.set_exception(error)
                if done:
                    self._save(users)
        except OSError as error:
            reason = error.strerror or str(error)
            if error.errno == errno.EBUSY:  # from replacing a mount point
                reason = "it is a mount point; mount the folder, not the file"
            self._report_in_loop(self._not_written(reason).message)
            raise self._not_written(reason) from error
        for answer, user in done:
            answer.set_result(user)

    def _not_written(self, reason: str) -> APIError:
        message = f"{self._name} could not be written: {reason}; nothing was changed"
        return APIError(500, message)

    def _save(self, users: Users) -> None:
        """Write users to the file; after an OSError it is unchanged."""
        target, old = self._target, self._seen or ABSENT
        self._seen = None
        seen = replace_file(target, encode_users(users), newer_than=old[0])
        try:
            sync_folder(os.path.dirname(target))
        except OSError as error:
            # The new file may not survive a power cut: put the old one back.
            try:
                if old == ABSENT:
                    os.unlink(target)
                else:
                    replace_file(target, encode_users(self._users), newer_than=seen[0])
            except OSError:  # the next refresh reads whatever is there
                message = f"{self._name} may or may not have changed: {error.strerror}"
                raise APIError(500, message) from error
            raise
        self._seen = seen
        self._adopt(users)

    def _adopt(self, users: Users) -> None:
        """Put users in force."""
        self._users = users
        self._by_digest = {user.old_digest: user for user in users.values()}
        self._by_digest.update({user.digest: user for user in users.values()})

    def _reread(self) -> None:
        """Adopt the file if it has changed.  Never raises."""
        try:
            users = self._read_changed()
        except ConfigurationError as error:
            if str(error) != self._broken:
                self._broken = str(error)
                self._report_in_loop(f"{error}; the previous users stay in force")
            return
        if users is None:
            return
        old, new = self._users, users
        added, removed = len(new.keys() - old.keys()), len(old.keys() - new.keys())
        edited = sum(old[key].line != new[key].line for key in new.keys() & old.keys())
        self._adopt(users)
        if added or removed or edited or self._broken:
            counts = f"{added:,} added, {removed:,} removed"
            counts += f", {edited:,} edited" if edited else ""
            what = "was removed" if self._seen == ABSENT else "changed"
            self._report_in_loop(f"{self._name} {what}: {len(new):,} users ({counts})")
        self._broken = ""

    # --- The file as it is.

    @property
    def _target(self) -> str:
        """The file to replace: a symlink's current target."""
        return os.path.realpath(self.path)

    def _stat(self) -> Stamp:
        """Return the file's stamp.  Raise ConfigurationError or OSError."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            # A missing folder (unmounted?) does not mean that there are no users.
            if os.path.isdir(os.path.dirname(self._target)):
                return ABSENT
            raise ConfigurationError("its folder does not exist") from None
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would block for ever
            raise ConfigurationError("expected a regular file")
        return stamp_of(found)

    def _read_changed(self) -> Users | None:
        """Return the users in the file, or None if it has not changed.

        Raise ConfigurationError, one line that names the file.
        """
        seen, self._seen = self._seen, None  # a failed read is tried again
        try:
            found, now = self._stat(), time.monotonic()
            gone = found == ABSENT
            self._gone_at = min(self._gone_at, now) if gone else math.inf
            # Editors briefly move the file away.
            if found == seen or (gone and now - self._gone_at < GONE_AFTER):
                self._seen = seen
                return None
            if gone:
                self._seen = ABSENT
                return {}
            limit = int(self.limits.users_file_size)
            with open(self.path, "rb") as file:
                seen = stamp_of(os.fstat(file.fileno()))
                data = file.read(limit + 1)
            self._seen = seen
            if len(data) > limit:
                raise ConfigurationError(f"expected at most {limit:,} bytes")
            return parse_users(data, self.limits)
        except (ConfigurationError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigurationError(f"{self.path}: {reason}") from None


def known_user(users: Users, user_id: str) -> User:
    """Return the user with this id.  Raise APIError(404)."""
    if user_id not in users:
        raise APIError(404, "User not found")
    return users[user_id]


# --- Limits and usage


def window_bounds(per: str, now: float) -> tuple[int, int]:
    """Return the start and end of the calendar window around now, as Unix times."""
    if per == "month":
        year, month = time.gmtime(now)[:2]
        start = calendar.timegm((year, month, 1, 0, 0, 0))
        return start, start + calendar.monthrange(year, month)[1] * 86400
    seconds = {"minute": 60, "hour": 3600, "day": 86400, "week": 7 * 86400}[per]
    monday = 4 * 86400  # 1970 began on a Thursday
    start = int((now - monday) // seconds) * seconds + monday
    return start, start + seconds


class Window:
    """One calendar window: its bounds, and the counts at its start."""

    __slots__ = ("before", "end", "first_hour", "last_hour", "start")

    def __init__(
        self, per: str, now: float, requests: int = 0, tokens: int = 0
    ) -> None:
        self.start, self.end = window_bounds(per, now)
        self.first_hour = hour_text(self.start // 3600)
        self.last_hour = hour_text((self.end - 1) // 3600)
        self.before = {"requests": requests, "tokens": tokens}

    def add(self, requests: int, tokens: int) -> None:
        """Add usage in this window that the limit itself has not counted."""
        self.before["requests"] -= requests
        self.before["tokens"] -= tokens


class UsageLimit:
    """The quotas of a user or a controller, and what it has used of them.

    history  returns the earlier usage in a new window, as requests and tokens

    Counts only grow, and each window remembers its starting counts.  Until a window
    ends, the first quotas to run out are thus one fixed count of requests and one of
    tokens; a request is checked against these two alone.
    """

    def __init__(self, quotas: list[Quota]) -> None:
        self.quotas = quotas
        self.history: Callable[[str, Window], tuple[int, int]] = lambda *_: (0, 0)
        self.reported = False  # that it is used up; once per window
        self._windows: dict[str, Window] = {}  # by period
        self._since = self._until = 0.0  # the windows hold between these times
        self._requests = self._tokens = 0  # in this object's lifetime
        self._tightest: dict[str, Quota] = {}  # with the least left, by unit
        self._most_requests = self._most_tokens = sys.maxsize  # counts that exhaust it
        self._fields = b""  # HTTP fields for one second, with %d for what is left
        self._second = 0
        units = [unit in {quota.unit for quota in quotas} for unit in UNITS]
        self._units = slice(not units[0], 1 + units[1])  # of (requests, tokens)

    def _renew_windows(self, now: float) -> None:
        """Replace the windows that have ended."""
        if self._since <= now < self._until:
            return
        for per in dict.fromkeys(quota.per for quota in self.quotas):
            known = self._windows.get(per)
            # A clock set back by up to a day stays in the present window.
            if known is not None and known.start - 86400 <= now < known.end:
                continue
            self._windows[per] = new = Window(per, now, self._requests, self._tokens)
            self.reported = False
            # Usage is stored by the hour, so a minute's is unknown.
            if per != "minute":
                new.add(*self.history(per, new))
        self._since = max(w.start for w in self._windows.values()) - 86400
        self._until = min(w.end for w in self._windows.values())
        self._find_tightest()

    def _find_tightest(self) -> None:
        ends = {q: self._windows[q.per].before[q.unit] + q.amount for q in self.quotas}
        most = dict.fromkeys(UNITS, sys.maxsize)
        for quota in sorted(ends, key=lambda q: (q.unit, -ends[q])):
            self._tightest[quota.unit] = quota
            most[quota.unit] = ends[quota]
        self._most_requests, self._most_tokens = most.values()
        self._second = 0

    def count(self, requests: int = 0, tokens: int = 0, now: float = 0.0) -> None:
        """Add current usage."""
        self._renew_windows(now or unix_time())
        self._requests += requests
        self._tokens += tokens

    def count_elsewhere(self, hour: str, requests: int, tokens: int) -> None:
        """Add what another server counted in an hour."""
        self._renew_windows(unix_time())
        for window in self._windows.values():
            if window.first_hour <= hour <= window.last_hour:
                window.add(requests, tokens)
        self._find_tightest()

    def stored(self) -> dict[str, tuple[int, int]]:
        """Return the stored usage in each present window, by period."""
        self._renew_windows(unix_time())
        kept = [item for item in self._windows.items() if item[0] != "minute"]
        return {per: self.history(per, window) for per, window in kept}

    def add_stored(self, earlier: dict[str, tuple[int, int]]) -> None:
        """Add what was stored after stored() had returned earlier."""
        for per, now in self.stored().items():
            more = (max(0, a - b) for a, b in zip(now, earlier[per]))
            self._windows[per].add(*more)
        self._find_tightest()

    def state(self) -> list[tuple[Quota, int, int]]:
        """Return each quota, how much of it is used, and the Unix time of its reset."""
        self._renew_windows(unix_time())
        counts = {"requests": self._requests, "tokens": self._tokens}
        windows = [(quota, self._windows[quota.per]) for quota in self.quotas]
        return [(q, counts[q.unit] - w.before[q.unit], w.end) for q, w in windows]

    def over(self, running: int = 0) -> tuple[Quota, int, int] | None:
        """Return the exhausted quota, as in state(), or None.

        running  admitted requests that are not yet counted; here they are used
        """
        self._renew_windows(unix_time())
        requests = self._requests + running
        if requests < self._most_requests and self._tokens < self._most_tokens:
            return None
        coming = {"requests": running, "tokens": 0}
        # state() may renew a window: then None.
        state = ((q, used + coming[q.unit], end) for q, used, end in self.state())
        return next((s for s in state if s[1] >= s[0].amount), None)

    def fields(self, now: float) -> bytes:
        """Return OpenAI's x-ratelimit fields, for the quotas with the least left."""
        if not self._second <= now < self._second + 1:  # windows end on full seconds
            self._renew_windows(unix_time())
            self._second = second = int(now)
            self._fields = "".join(
                f"x-ratelimit-limit-{unit}: {q.amount}\r\n"
                f"x-ratelimit-remaining-{unit}: %d\r\n"
                f"x-ratelimit-reset-{unit}: {self._windows[q.per].end - second}s\r\n"
                for unit, q in self._tightest.items()
            ).encode()
        # The present request is counted when it ends; show it as used.
        requests = self._most_requests - self._requests - 1
        tokens = self._most_tokens - self._tokens
        left = (requests if requests > 0 else 0, tokens if tokens > 0 else 0)
        return self._fields % left[self._units]

    def reset(self) -> None:
        """Restore the full quotas before their windows end."""
        for window in self._windows.values():
            window.before.update(requests=self._requests, tokens=self._tokens)
        self.reported = False
        self._find_tightest()

    def exceeded(self) -> tuple[float, str] | None:
        """Return the seconds until the exhausted quota is reset, and which it is."""
        over = self.over()
        if over is None:
            return None
        return max(0.0, over[2] - unix_time()), f"its limit of {over[0]} is used up"


COUNTS = ("requests", "failures", "input", "cached_input", "output")
# Servers that share the file see each other's counts within 5 s: they write within
# 4.5 s, which bounds what a kill loses, and read twice a second.
USAGE_READ_INTERVAL = 0.5  # seconds
USAGE_WRITE_TURNS = 9  # reads per write
USAGE_FILE_SIZE = 16 * 1024 * 1024  # above it the file is compacted, if that helps
USAGE_LIFETIME = 400  # days
HOURLY_MODELS = 100  # per user, then "other": each is a line that stays
COLUMNS = ("day", "user", "model", "controller")
Key = tuple[str, str, str, str]  # hour (UTC, "2026-11-27T09"), user, model, controller
Sums = dict[Key, list[int]]  # one number for each of COUNTS
Row = tuple[Key, list[int]]


def bounded(name: str, names: set[str], most: int) -> str:
    """Return the name to count under: "other" once there are too many names.

    Clients choose model names and agents their own; new ones must not fill memory.
    """
    if len(names) < most:
        names.add(name)
    return name if name in names else "other"


class Ledger:
    """Who used what: the one place that counts, for limits, reports and people.

    path    usage.jsonl: increments, one JSON object a line.  None: only in memory
    report  called with lines for people

    record() only notes counts; readers add them up first.  Every 4.5 s new counts are
    appended to the file.  Sums are daily: hours matter only to hourly limits, which
    need the present hour alone.
    """

    def __init__(
        self, path: str | None, report: Callable[[str], object] = lambda line: None
    ) -> None:
        self._file = None if path is None else UsageFile(os.path.realpath(path))
        self._report = report
        self._problem = ""  # the file's, as last reported
        # By day and user, then by model and controller.
        self._days: dict[str, dict[str, dict[tuple[str, str], list[int]]]] = {}
        # This hour's, by user, model and controller; not yet added up.
        self._recorded: dict[tuple[str, str, str], list[int]] = {}
        self._unwritten: Sums = {}  # added up, but not yet in the file
        self._limits: dict[str, dict[str, UsageLimit]] = {"user": {}, "controller": {}}
        self._hour = Window("hour", 0)  # the present one
        self._this_hour: dict[tuple[str, str], list[int]] = {}  # by kind and name
        self._models: dict[str, set[str]] = {}  # this hour's, by user

    # --- Counting

    def record(
        self, user: str, model: str, controller: str, failures: int, usage: Usage
    ) -> None:
        """Count one finished request."""
        (sent, cached, output), now = usage, unix_time()
        limit = self._limits["user"].get(user)
        if limit is not None:  # before the sums, which its history reads
            limit.count(1, sent + output, now)
        self._keep_hour(now)
        counts = self._recorded.get((user, model, controller))
        if counts is None:
            models = self._models.setdefault(user, set())
            key = (user, bounded(model[:200], models, HOURLY_MODELS), controller)
            counts = self._recorded.setdefault(key, [0] * len(COUNTS))
        counts[0] += 1
        counts[1] += failures
        counts[2] += sent
        counts[3] += cached
        counts[4] += output

    def _keep_hour(self, now: float) -> None:
        """Begin a new hour once the present one has ended."""
        if not self._hour.start <= now < self._hour.end:
            self._begin_hour()

    def _begin_hour(self) -> None:
        self._add_up()
        self._hour = Window("hour", unix_time())
        self._this_hour, self._models = {}, {}
        unwritten, self._unwritten = self._unwritten, {}
        for (hour, *names), counts in unwritten.items():
            key = (kept_hour(hour, self._hour.first_hour), *names)
            _add(self._unwritten, key, counts)
        # By number, not by the clock, which may be wrong for a moment.
        while len(self._days) > USAGE_LIFETIME:
            del self._days[min(self._days)]

    def _add_up(self) -> None:
        """Add the recorded counts to the sums."""
        recorded, self._recorded = self._recorded, {}
        for names, counts in recorded.items():
            key = (self._hour.first_hour, *names)
            self._count(key, counts)
            if self._file is not None:
                _add(self._unwritten, key, counts)

    def _count(self, key: Key, counts: list[int]) -> None:
        hour, user, model, controller = key
        sums = self._days.setdefault(hour[:10], {}).setdefault(user, {})
        _add(sums, (model, controller), counts)
        if hour == self._hour.first_hour:
            _add(self._this_hour, ("user", user), counts)
            _add(self._this_hour, ("controller", controller), counts)

    def limit_of(self, user: str, quotas: list[Quota]) -> UsageLimit:
        """Return a user's limit, a new one if its quotas have changed."""
        limit = self._limits["user"].get(user)
        if limit is None or (limit.quotas is not quotas and limit.quotas != quotas):
            limit = UsageLimit(quotas)
            self.watch("user", user, limit)
        return limit

    def watch(self, kind: str, name: str, limit: UsageLimit) -> None:
        """Feed a user's or controller's limit with earlier and other servers' usage."""
        self._limits[kind][name] = limit
        limit.history = functools.partial(self._used, kind, name)

    def forget_controller(self, name: str) -> None:
        """Stop feeding a controller's limit: another one may get its name."""
        self._limits["controller"].pop(name, None)

    def _used(self, kind: str, name: str, per: str, window: Window) -> tuple[int, int]:
        """Return a user's or controller's requests and tokens in a window."""
        self._keep_hour(unix_time())
        self._add_up()
        if per == "hour":
            found = [self._this_hour.get((kind, name), [0] * len(COUNTS))]
        else:
            days = window.first_hour[:10], window.last_hour[:10]
            rows = self._rows(*days, name if kind == "user" else None)
            found = [c for key, c in rows if kind == "user" or key[3] == name]
        return sum(c[0] for c in found), sum(c[2] + c[4] for c in found)

    def _rows(self, first: str, last: str, user: str | None) -> Iterator[Row]:
        """Yield the counts of all users, or one, from first day to last."""
        for day, users in self._days.items():
            if first <= day <= last:
                for name in users if user is None else users.keys() & {user}:
                    for names, counts in users[name].items():
                        yield (day, name, *names), counts

    def report(
        self, by: list[str], first: str, last: str, user: str | None = None
    ) -> dict[str, Any]:
        """Sum up the days from first to last, grouped by some of COLUMNS.

        {"data": [{"day", "user", "model", ...counts}], "total": {...counts}}
        """
        self._add_up()
        sums: dict[tuple[str, ...], list[int]] = {}
        total = [0] * len(COUNTS)
        for names, counts in self._rows(first, last, user):
            row = dict(zip(COLUMNS, names))
            _add(sums, tuple(row[column] for column in by), counts)
            total = [a + b for a, b in zip(total, counts)]
        data = [
            {**dict(zip(by, key)), **dict(zip(COUNTS, sums[key]))}
            for key in sorted(sums)
        ]
        return {"data": data, "total": dict(zip(COUNTS, total))}

    # --- The file

    def load(self) -> None:
        """Read earlier usage at startup."""
        self._begin_hour()
        if self._file is not None:
            self._file.read_to = ABSENT
            remove_temporary_files(self._file.path)
            _, lines, _ = self._file.exchange({})
            self._count_lines(lines.items(), replaced=True)

    async def flush(self, write: bool = True) -> None:
        """Read what other servers have appended, and append our own new counts."""
        self._add_up()
        if self._file is None:
            return
        pending = Sums()
        if write:
            pending, self._unwritten = self._unwritten, {}
        loop, exchange = asyncio.get_running_loop(), self._file.exchange
        work = loop.run_in_executor(None, exchange, pending)
        cancelled = False
        while not work.done():
            try:
                await asyncio.wait([work])
            except asyncio.CancelledError:  # the thread keeps running: wait for it
                cancelled = True
        written, lines, replaced = work.result()
        own = pending.items() if replaced else ()
        self._count_lines([*lines.items(), *own], replaced)
        for key, counts in () if written else pending.items():
            _add(self._unwritten, key, counts)
        if cancelled:
            raise asyncio.CancelledError

    def _count_lines(self, lines: Iterable[Row], replaced: bool) -> None:
        """Count lines of the file; if it was replaced, they are all of it."""
        assert self._file is not None
        self._keep_hour(unix_time())  # or those of a new hour count in no hour
        problem = self._file.problem
        if problem and problem != self._problem:
            self._report(problem)
        self._problem = problem
        stored: list[tuple[UsageLimit, Any]] = []
        if replaced:
            for limits in self._limits.values():
                stored += [(limit, limit.stored()) for limit in limits.values()]
            self._days.clear()
            self._this_hour.clear()
            lines = [*lines, *self._unwritten.items()]
        for key, counts in lines:
            hour, user, _, controller = key
            names = () if replaced else (("user", user), ("controller", controller))
            for kind, name in names:
                limit = self._limits[kind].get(name)
                if limit is not None:  # before the sums, which its history reads
                    limit.count_elsewhere(hour, counts[0], counts[2] + counts[4])
            self._count(key, counts)
        for limit, earlier in stored:
            limit.add_stored(earlier)


class UsageFile:
    """usage.jsonl, used from a thread; other servers append to and compact it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.read_to = ABSENT  # the stamp of what was read; its size is the position
        self.problem = ""  # why it could not be read or written
        self._next_size = 0  # in bytes; above it, try to compact it

    def exchange(self, pending: Sums) -> tuple[bool, Sums, bool]:
        """Read what other servers have appended, then append pending.

        Return whether pending was written, the lines read, and whether these are all
        lines, of a file that was replaced.
        """
        written, lines, replaced = False, Sums(), False
        try:
            # Reading whole lines needs no lock.
            lock = file_lock(f"{self.path}.lock")
            with lock if pending else contextlib.nullcontext():
                lines, replaced = self._read()
                if pending:
                    self.read_to = append_to_file(self.path, encode_usage(pending))
                    written = True
                    self.problem = ""
                    self._compact()
        except OSError as error:
            reason = error.strerror or error
            self.problem = f"{self.path}: {reason}; usage is kept in memory"
        return written, lines, replaced

    def _read(self) -> tuple[Sums, bool]:
        """Return the new lines, or all lines and True if the file was replaced.

        Another server may have compacted it.  If it is missing, nothing is new: it may
        come back as it was.
        """
        try:
            at_time, size, inode = stamp_of(os.stat(self.path))
        except FileNotFoundError:
            return Sums(), False
        _, at, known = self.read_to
        replaced = known != inode or size < at
        at = 0 if replaced else at
        data = b""
        if size > at:
            with open(self.path, "rb") as file:
                file.seek(at)
                data = file.read(size - at)
        whole = data.rfind(b"\n") + 1
        self.read_to = (at_time, at + whole, inode)
        return parse_usage(data[:whole]), replaced and known != 0

    def _compact(self) -> None:
        """Merge the lines of each past day, if that halves a large file."""
        if self.read_to[1] <= max(USAGE_FILE_SIZE, self._next_size):
            return
        with open(self.path, "rb") as file:
            merged = parse_usage(file.read(), "")
        # By number, not by the clock, which may be wrong for a moment.
        days = sorted({key[0][:10] for key in merged})[-USAGE_LIFETIME:]
        data = encode_usage({k: c for k, c in merged.items() if k[0] >= days[0]})
        if len(data) < self.read_to[1] // 2:
            self.read_to = replace_file(self.path, data, newer_than=0)
            sync_folder(os.path.dirname(self.path))
        self._next_size = self.read_to[1] * 3 // 2  # reading it all takes seconds


def parse_usage(data: bytes, first: str | None = None) -> Sums:
    """Add up the lines of usage.jsonl, ignoring torn ones and those before first.

    first is an hour; by default the expired lines are ignored.  Past days lose their
    hours.  4 us a line: startup may read a million.
    """
    now = int(unix_time() // 3600)
    present = hour_text(now)
    first = hour_text(now - 24 * USAGE_LIFETIME) if first is None else first
    sums: Sums = {}
    same: dict[str, str] = {}  # interned names: one string each, not one per line
    for line in data.splitlines():
        try:
            fields = json.loads(line)
            hour, names = fields["t"], [str(fields[key]) for key in COLUMNS[1:]]
            counts = [fields[key] for key in COUNTS]
            if hour >= first and {*map(type, counts)} == {int}:
                user, model, controller = map(same.setdefault, names, names)
                _add(sums, (kept_hour(hour, present), user, model, controller), counts)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return sums


def kept_hour(hour: str, present: str) -> str:
    """Return the hour to store, for past days their first one."""
    return hour if hour >= present[:10] else hour[:10] + "T00"


def _add(sums: dict[Any, list[int]], key: Any, counts: Iterable[int]) -> None:
    known = sums.get(key)
    sums[key] = [*counts] if known is None else [a + b for a, b in zip(known, counts)]


@functools.lru_cache(maxsize=4)
def hour_text(hour: int) -> str:
    """Format an hour since 1970 as in usage.jsonl: "2026-11-27T09"."""
    return time.strftime("%Y-%m-%dT%H", time.gmtime(hour * 3600))


def encode_usage(sums: Sums) -> bytes:
    """Encode sums as lines of usage.jsonl."""
    keys = ("t", *COLUMNS[1:], *COUNTS)
    rows = [dict(zip(keys, (*names, *counts))) for names, counts in sums.items()]
    return b"".join([encode_json(row) + b"\n" for row in rows])


# -----------------------------------------------------------------------------
# Controllers
# -----------------------------------------------------------------------------
#
# A controller answers API requests: an upstream, an agent or a Python function.
# They differ only in answer(); selection, cooldown and recovery are the same for
# all.  Exceptions leave a controller unchanged: only the pool judges them.


# How long a failed request is remembered: its retries are no new evidence.
EVIDENCE_TIME = 60.0  # seconds
# How long one trial keeps other requests out: it may take minutes to answer.
TRIAL_TIME = 5.0  # seconds


def keep_newest(kept: dict[K, T], key: K, value: T, most: int) -> None:
    """Put an entry at the end of kept; of more than most, drop the oldest."""
    kept.pop(key, None)
    kept[key] = value
    if len(kept) > most:
        del kept[next(iter(kept))]


class Health:
    """Whether a controller, or all controllers of one account, may get requests.

    A failure closes it for some time.  Then one real request is let through as a
    trial, and the next answer opens it again.

    One of several models may be rate limited or broken alone.  Then it is closed alone,
    unless another one fails before any has answered.

    until      when the trial may begin, on the loop's clock
    closed_by  the failure that closed it, or None while it is open
    reason     why, in our own words: everybody may read it
    trial      the trial request; after trial_until there may be another
    parts      the same for single models, by their names there
    """

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self.limits = limits
        self.until = 0.0
        self.closed_by: Failure | None = None
        self.reason = ""
        self.trial: APIRequest | None = None
        self.trial_until = 0.0
        self.parts: dict[str, Health] = {}
        self._failed: set[str] = set()  # models, since the last answer; two suffice
        self._failures = 0  # in a row
        self._seen: dict[tuple[str, bytes], float] = {}  # when each request failed
        self._cooldowns = self._disablings = 0  # since the last success

    def of(self, model: str | None) -> Health:
        """Return the health that decides about a model: the part, if closed longer."""
        part = self.parts.get(model or "")
        return self if part is None or part.until <= self.until else part

    def fail(
        self,
        error: ControllerError,
        request: APIRequest,
        now: float,
        model: str | None = None,
    ) -> float:
        """Record a failure; return the seconds it should close for, 0 for none.

        model  the request's model, if it is one of several
        """
        limits = self.limits
        seconds = 0.0
        if model and error.failure in (Failure.RATE_LIMITED, Failure.BROKEN):
            part = self.parts.get(model) or Health(limits)
            keep_newest(self.parts, model, part, 100)  # clients choose the names
            alone = part.fail(error, request, now)
            if not self.closed_by and self._failed <= {model}:
                self._failed = {model}
                return alone
        if error.failure is Failure.RATE_LIMITED:
            seconds = limits.cool_rate_limited
            if error.retry_after is not None:
                seconds = max(1.0, min(error.retry_after, limits.cool_rate_limited_max))
        elif error.failure is Failure.REFUSED:
            seconds = limits.cool_refused
        elif error.failure is Failure.DISABLED:
            # Requests in flight when it was disabled fail, too: a burst of failures
            # doubles the time once.
            if self.closed_by is not Failure.DISABLED or now >= self.until:
                doubled = limits.disabled_first * 2**self._disablings
                seconds = min(doubled, limits.disabled_max)
                self._disablings = min(self._disablings + 1, 30)
        elif error.failure is Failure.BROKEN and self._is_new(request, now):
            self._failures += 1
            # After a cooldown, one failure is enough.
            enough = self._failures >= limits.cool_failures or self.closed_by
            if enough and now >= self.until:
                seconds = min(limits.cool_first * 2**self._cooldowns, limits.cool_max)
                self._cooldowns = min(self._cooldowns + 1, 30)
        if seconds and now + seconds > self.until:  # the later deadline wins
            self.until = now + seconds
            self.closed_by = error.failure
            self.reason = error.reason
            self.trial = None
        return seconds

    def _is_new(self, request: APIRequest, now: float) -> bool:
        """Whether a failed request is new evidence about the controller.

        A retry is not: else one user's broken request would close every controller.
        """
        key = (request.user, request.digest)
        if self._seen.get(key, -math.inf) > now - EVIDENCE_TIME:
            return False
        keep_newest(self._seen, key, now, 1000)  # clients make any number fail
        return True

    def begin(self, request: APIRequest, now: float, model: str | None = None) -> bool:
        """Record that an answer has begun; return whether that opened it.

        Before its time is up only the trial can: other answers are to requests that
        were sent before it closed.
        """
        part = self.parts.get(model or "")
        opened = part is not None and part.begin(request, now)
        if not self.closed_by or (now < self.until and self.trial is not request):
            return opened
        self._open()
        return True

    def succeed(self, model: str | None = None) -> None:
        """Record a complete answer: it clears earlier failures, unless closed."""
        self._failed.clear()
        part = self.parts.get(model or "")
        if part is not None and not part.closed_by:
            del self.parts[model or ""]
        if not self.closed_by:
            self._failures = self._cooldowns = self._disablings = 0
            self._seen = {}

    def on_trial(self, now: float) -> bool:
        """Whether a trial is under way that keeps other requests out."""
        return self.trial is not None and now < self.trial_until

    def _open(self) -> None:
        self.until = 0.0
        self.closed_by = None
        self.reason = ""
        self.trial = None

    def reset(self) -> None:
        """Open it, and forget all failures."""
        self._open()
        self.parts.clear()
        self.succeed()


NOT, ANY, NAMED = range(3)  # how a controller serves a model
# Fragments of API keys; the ids of organisations and projects.
_SECRETS = re.compile(r"\b(?:sk-|org-|proj_)[\w*.…-]{4,}")


class Controller:
    """Answers API requests; the base class of all kinds.

    name             unique in its pool
    weight           share of requests, relative to the others
    models           names it answers for: a list, or {alias: its own name};
                     None for any
    max_concurrency  requests in flight at once, or None for no limit
    limit            "1000 requests/day", or whatever else parse_quotas() takes
    account          controllers with the same account cool down together
    tier             gets a request only when every lower tier is full, closed or
                     lacks the model: paid keys behind machines of one's own
    """

    type = "controller"
    by_name_only = False  # only for requests that name one of its models
    transient = False  # comes and goes; is renamed where its name is taken
    keeps_conversations = False  # those of /api/ask
    own_code = False  # its exceptions come from the program that embeds us
    lists_models = False  # its list of models can be read
    final = False  # a refusal is its answer, and never counts as a failure
    id = ""  # what APIRequest.agent_id refers to
    base_url = "/v1"  # shown to people
    secret = ""  # its API key
    THREADS = 32  # of its own, at most

    def __init__(
        self,
        name: str,
        *,
        weight: float = 1,
        models: Iterable[str] | dict[str, str] | None = None,
        max_concurrency: int | None = None,
        limit: Any = None,
        account: str | None = None,
        tier: int = 1,
    ) -> None:
        if weight < 0:
            raise ValueError("weight must not be negative")
        if tier < 1:
            raise ValueError("tier must be 1 or more")
        if max_concurrency is not None and max_concurrency < 1:
            raise ValueError("max_concurrency must be 1 or more, or None")
        self.name = name
        self.weight = weight or 1
        self.models = None if models is None else dict(models_table(models))
        self.listed: dict[str, str] = {}  # its own list of models, once read
        self.list_problem = ""  # why it could not be read: reported once
        self.max_concurrency = max_concurrency
        self.limit = UsageLimit(parse_quotas(limit)) if limit else None
        self.account = account
        self.tier = tier
        self.health = Health()
        self.switched_off = False  # by the administrator
        self.paused = False  # by an agent's owner
        self.current = 0.0  # of smooth weighted round robin
        self.in_flight = 0  # requests that hold a slot
        self.requests = 0
        self.failures = 0
        self.tokens = 0
        self.works_at = ""  # a path where its key was good for an answer
        self.report: Callable[[str], None] = lambda line: None  # the pool's
        # (model, path) that it answers only without stream_options.
        self._without_options: set[tuple[str | None, str]] = set()
        self._threads: ThreadPoolExecutor | None = None  # its own, if it needs any

    @property
    def home(self) -> str:
        """What its conversations are remembered by; an agent's id may be any name."""
        return f"\0{self.id}" if self.id else self.name

    async def answer(self, request: APIRequest) -> Answer:
        """Send a request; return once the head of the answer has arrived.

        This is for controllers that speak the API: they implement _send().  Others
        override it.  Raise APIError, OSError, asyncio.TimeoutError or ProtocolError.
        """
        model = request.model
        if model is None and request.ask is not None:
            if not self.known_models():
                await self.refresh_models()
            model = self._own_model(request)
        model = self.real_name(model)
        key = (model, request.path)
        include_usage = request.counts_usage and key not in self._without_options
        size, encode = len(request.content), request.encode
        content = await run_large(size, encode, model, include_usage)
        answer = await self._send(request, content)
        if not include_usage or answer.status not in (400, 422):
            return answer
        try:
            # Often with the whole request in it, as from FastAPI.
            content = await answer.read_all(int(self.health.limits.response_size))
        finally:
            await answer.aclose()
        if not may_be_about_stream_options(content):
            return Answer(answer.status, answer.headers, content)
        content = await run_large(size, encode, model, False)
        again = await self._send(request, content)
        # Only this proves that our field was refused.  Bounded: clients name models.
        if again.status < 300 and len(self._without_options) < 1000:
            self._without_options.add(key)
        return again

    def _own_model(self, request: APIRequest) -> str:
        """Return the model for a question that names none.  ControllerError(400)."""
        model = self.default_model(request)
        if model is None:
            raise ControllerError(  # another controller may have one
                f"no usable model of {self.name} is known",
                Failure.NONE,
                detail="Say which 'model' to use.",
                status=400,
                type="invalid_request_error",
                param="model",
            )
        return model

    async def _send(self, request: APIRequest, content: bytes) -> Answer:
        """Send a request once, with this content."""
        raise NotImplementedError

    async def probe(self, path: str = "") -> int:
        """Test its key with a plain request; return the status, or 0 for none."""
        return 0

    def answers(self, path: str) -> bool:
        """Whether it handles requests to a path."""
        return True

    def serves(self, model: str | None) -> int:
        """Return how it serves a model: NOT, NAMED, or ANY if it takes all models.

        A request without a model (None) suits every controller that has one.
        """
        if self.models is None:  # any, but only the mocks serve the mocks' names
            if model is not None and model.startswith("mock/"):
                return NOT
            return NAMED if has_model(self.listed, model) else ANY
        if model is None:
            return ANY if self.models else NOT
        return NAMED if has_model(self.models, model) else NOT

    def real_name(self, model: str | None) -> str | None:
        """Return its own name for a model."""
        models = self.models or {}
        return models.get(model or "") or models.get(f"{model}:latest", model)

    def known_models(self) -> Iterable[str]:
        """Return the models it is known to have."""
        return self.models or self.listed

    def default_model(self, request: APIRequest) -> str | None:
        """Return the first known model that can chat and that the user may use."""
        return chat_model(filter(request.may_use, self.known_models()))

    @property
    def has_room(self) -> bool:
        """Whether it could take a request, its health aside."""
        most = self.max_concurrency
        full = most is not None and self.in_flight >= most
        if full or self.switched_off or self.paused:
            return False
        return self.limit is None or self.limit.over() is None

    def model_of(self, request: APIRequest) -> str | None:
        """Return its own name for a request's model, also for one it would choose."""
        if request.model is None and request.ask is not None:
            return self.real_name(self.default_model(request))
        return self.real_name(request.model)

    def part_of(self, request: APIRequest) -> str | None:
        """Return a request's model if any model is closed alone: nearly never."""
        return self.model_of(request) if self.health.parts else None

    def health_for(self, request: APIRequest | None) -> Health:
        """Return the health that decides about a request; None: about most."""
        health = self.health
        if request is None or not health.parts:
            return health
        return health.of(self.model_of(request))

    def available(self, now: float, request: APIRequest | None = None) -> bool:
        """Whether it can take a request now."""
        health = self.health_for(request)
        # After a cooldown one request goes through as the trial, not a crowd.
        if health.closed_by and (now < health.until or health.on_trial(now)):
            return False
        return self.has_room

    def last_resort(self, request: APIRequest) -> bool:
        """Whether it is closed for a reason that may have passed by itself.

        Then it gets what nothing else could answer, as nginx does with a single
        server; but not before a 429's time is up, nor with a dead key.
        """
        closed_by = self.health_for(request).closed_by
        return closed_by in (Failure.BROKEN, Failure.REFUSED) and self.has_room

    def closed_for(self, now: float, request: APIRequest | None = None) -> float:
        """Return the seconds until it may get requests again; 0 if it may now."""
        return self.closed(now, request)[0]

    def closed(
        self, now: float, request: APIRequest | None = None
    ) -> tuple[float, str, str]:
        """Return closed_for(), with the state and the reason to show."""
        if self.switched_off:
            how = "paused" if self.id else "disabled"  # an agent has an id
            return math.inf, "disabled", f"{how} by the administrator"
        if self.paused:
            return math.inf, "paused", "paused by its owner"
        exceeded = None if self.limit is None else self.limit.exceeded()
        if exceeded is not None:
            return exceeded[0], "disabled", exceeded[1]
        health = self.health_for(request)
        state = "disabled" if health.closed_by is Failure.DISABLED else "cooling"
        reason = health.reason.removeprefix(f"{self.name}: ")
        return max(0.0, health.until - now), state, reason

    def describe(self, now: float) -> dict[str, Any]:
        """Return its entry in GET /admin/controllers, without its key."""
        closed, state, reason = self.closed(now)
        if not closed:
            state = "ready" if self.available(now) else "busy"
            parts = self.health.parts.items()
            reasons = [f"{m[:80]}: {p.reason}" for m, p in parts if p.until > now]
            reason = "; ".join(reasons).replace(f"{self.name}: ", "")
        until = rfc3339(unix_time() + closed) if 0 < closed < math.inf else None
        return {
            "name": self.name,
            "type": self.type,
            "weight": self.weight,
            "models": None if self.models is None else list(self.models),
            "state": state,
            "reason": reason,
            "until": until,
            "in_flight": self.in_flight,
            "requests": self.requests,
            "failures": self.failures,
            "tokens": self.tokens,
        }

    def status(self, now: float) -> dict[str, Any]:
        """Return its entry in GET /admin/status."""
        more = {"max_concurrency": self.max_concurrency, "tier": self.tier}
        return {**self.describe(now), "id": self.name, **more}

    async def refresh_models(self) -> None:
        """Read its list of models, if it has one; on failure keep the old list."""

    def inherit(self, known: Controller) -> None:
        """Take over from a controller that this one replaces, if it fits."""
        if known.base_url == self.base_url:
            self.listed = known.listed
            if known.secret == self.secret:  # whatever its name was
                self.switched_off = known.switched_off
                quotas = [limit and limit.quotas for limit in (known.limit, self.limit)]
                if quotas[0] == quotas[1]:  # and only one inherits it
                    self.limit, known.limit = known.limit, None

    def redact(self, text: str) -> str:
        """Return text without secrets: its key, and the parts that servers repeat."""
        if self.secret:
            text = text.replace(self.secret, "***")
        return _SECRETS.sub("***", text)

    def _in_thread(self, work: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """Run a function in a thread of the controller's own."""
        if self._threads is None:
            most = self.max_concurrency or self.THREADS
            self._threads = ThreadPoolExecutor(most, f"{self.type}-{self.name}")
        loop, run = asyncio.get_running_loop(), contextvars.copy_context().run
        return loop.run_in_executor(self._threads, run, work, *args)

    def close(self) -> None:
        """Release idle connections and threads."""
        threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(wait=self.THREADS == 1)  # the tape's still writes


async def run_large(size: int, work: Callable[..., T], *arguments: Any) -> T:
    """Return work(*arguments), done in a thread if it is for a large content."""
    if size <= APIRequest.KEPT_SIZE:
        return work(*arguments)
    return await asyncio.to_thread(work, *arguments)


def may_be_about_stream_options(content: bytes) -> bool:
    """Whether a refusal may concern the field we added: it names it, or no cause."""
    if len(content) > REFUSAL_SIZE:  # it repeats the request, and so our field
        return False
    error = find_refusal(content) or ErrorObject()
    named = b"stream_options" in content or b"include_usage" in content
    return named or (error.param is None and error.code is None)


def has_model(models: dict[str, str], model: str | None) -> bool:
    """Whether models has a model; Ollama's "llama3.1" means "llama3.1:latest"."""
    return model in models or f"{model}:latest" in models


def models_table(models: Iterable[str] | dict[str, str]) -> dict[str, str]:
    """Return {name: real name} from either form of "models"."""
    return models if isinstance(models, dict) else {name: name for name in models}


def json_answer(value: Any) -> Answer:
    """Return an answer made here: value as JSON, or bytes as they are."""
    content = value if isinstance(value, bytes) else encode_json(value)
    return Answer(200, {"content-type": JSON_TYPE}, content)


# --- Upstreams


OPENAI_URL = "https://api.openai.com/v1"
ANTHROPIC_URL = "https://api.anthropic.com/v1"


KEY_STATUSES = (401, 402, 403)  # they may be about the key


class OpenAIController(Controller):
    """An upstream: an OpenAI-compatible API and its key.

    api_key             "" for a server that needs none
    base_url            as for the OpenAI SDK: "/chat/completions" is appended
    auth                how the key is sent: "bearer", or "x-api-key" (Anthropic's)
    proxy, ca_file, verify  as for HTTPClient
    first_byte_timeout  seconds until the answer begins

    The other arguments are Controller's.
    """

    type = "openai"
    lists_models = True
    LIST_FIELDS: ClassVar[list[tuple[str, str]]] = []

    def __init__(
        self,
        api_key: str,
        *,
        name: str = "openai",
        base_url: str = OPENAI_URL,
        auth: str = "bearer",
        proxy: str | None = None,
        ca_file: str | None = None,
        verify: bool = True,
        first_byte_timeout: float | None = None,
        limits: Limits = DEFAULT_LIMITS,
        resolve: Callable[[str, int], list[str]] = look_up,
        **options: Any,
    ) -> None:
        if api_key and api_key.startswith("env:"):
            raise ValueError('api_key: "env:" is for files; use os.environ["NAME"]')
        super().__init__(name, **options)
        # As the OpenAI SDKs take it, from what people paste.
        url = base_url.rstrip("/").removesuffix("/chat/completions")
        self.base_url = url.rstrip("/")
        self.first_byte_timeout = first_byte_timeout
        self.limits = limits
        self.secret = api_key
        self._fields = [("Accept-Encoding", "identity")]
        if api_key and auth == "x-api-key":
            self._fields.append(("x-api-key", api_key))
        elif api_key:
            self._fields.append(("Authorization", f"Bearer {api_key}"))
        self._client = HTTPClient(
            self.base_url,
            proxy=proxy,
            ca_file=ca_file,
            verify=verify,
            limits=limits,
            resolve=resolve,
        )

    async def _send(self, request: APIRequest, content: bytes) -> Answer:
        return await self._client.request(
            "POST",
            request.target[3:],  # without "/v1", which the base URL has
            [*self._fields, *request.headers.items()],
            content,
            first_byte_timeout=self.first_byte_timeout,
            deadline=request.deadline,
        )

    # --- Its models

    async def _ask(self, target: str, content: bytes = b"") -> tuple[int, bytes]:
        """Return a short answer's status and content; 0 and the reason on failure.

        This is a GET, or a POST of JSON.  It may take connect_timeout in all.
        """
        end = asyncio.get_running_loop().time() + self.limits.connect_timeout
        fields = [*self._fields, *self.LIST_FIELDS]
        fields += [("Content-Type", JSON_TYPE)] if content else []
        method = "POST" if content else "GET"
        try:
            with time_limit(end, asyncio.TimeoutError()):
                answer = await self._client.request(method, target, fields, content)
                try:
                    return answer.status, await answer.read_all(PIECE_SIZE * 64)
                finally:
                    await answer.aclose()
        except asyncio.TimeoutError:
            return 0, b"it was silent for too long"
        except (OSError, ProtocolError) as error:
            return 0, connection_problem(error).encode()

    async def refresh_models(self) -> None:
        status, content = await self._ask("/models")
        names = model_names(content) if status == 200 else None
        problem = f"its list of models cannot be read (status {status})"
        if names is not None:
            self.listed, problem = models_table(names), ""
        elif not status:
            problem = f"no answer to GET /models: {self.redact(content.decode())}"
        elif status in (401, 403):
            problem = f"its key is refused (status {status})"
        elif status == 404 and (await self._ask("/v1/models"))[0] in (200, 401):
            problem = f"its base_url lacks /v1; it should be {self.base_url}/v1"
        if problem and problem != self.list_problem:
            self.report(f"{self.name}: {problem}")
        self.list_problem = problem

    async def probe(self, path: str = "") -> int:
        answer = self._ask(path[3:], b"{}") if path else self._ask("/models")
        return (await answer)[0]

    def close(self) -> None:
        self._client.close()


class AnthropicController(OpenAIController):
    """Anthropic's API: an upstream that speaks messages and nothing else."""

    type = "anthropic"
    LIST_FIELDS: ClassVar = [("anthropic-version", "2023-06-01")]

    def __init__(self, api_key: str, **options: Any) -> None:
        own = {"name": "anthropic", "base_url": ANTHROPIC_URL, "auth": "x-api-key"}
        super().__init__(api_key, **{**own, **options})

    def answers(self, path: str) -> bool:
        return path == MESSAGES_PATH or path.startswith(f"{MESSAGES_PATH}/")


# --- Agents


def envelope(id: str, message: str, data: str = "") -> str:
    """Return a message between server and agent, as JSON."""
    # json takes 3 us to build an encoder for each object, and 0.2 us for a string.
    return (
        f'{{"id":{_to_ascii(id)},"message":{_to_ascii(message)},'
        f'"data":{_to_ascii(data)}}}'
    )


def open_envelope(text: str | bytes) -> tuple[str, str, str]:
    """Return a message's id, kind and data; "" for an unusable id or data."""
    message = as_object(read_json(text))
    id, data = message.get("id"), message.get("data")
    return str(id or ""), str(message.get("message")), data if type(data) is str else ""


# The "error" of an agent that is full, maybe with other servers' calls: no failure.
AGENT_FULL = "the agent has as many calls as it may"
AGENT_FULL_PAUSE = 0.25  # seconds until the agent is tried again
# The server's id, in its response to an agent's handshake.  An agent that finds it at
# two addresses keeps one connection.
SERVER_ID_FIELD = "x-server-id"


class AgentController(Controller):
    """An agent (version 2, this file): it dialed in, and takes any API request.

    id          of the agent; its conversations are bound to it
    credential  what it registered with; an agent that reclaims an id needs the same
    hello       how it described itself in its first message
    """

    type = "agent"
    transient = True
    ENDS = ("ApiEnd", "error")  # these end a call
    # Messages that belong to a call; one of the other version fails it.
    REPLIES = (*ENDS, "ApiResponse", "ApiData", "ChatGptResponse")

    def __init__(
        self, id: str, websocket: WebSocket, credential: str, hello: JSONObject
    ) -> None:
        name, most = hello.get("name"), hello.get("max_concurrency")
        usable = isinstance(most, int) and 0 < most <= 10_000
        super().__init__("", max_concurrency=most if usable else 8)
        if isinstance(name, str) and name.isprintable():
            self.name = name[:64]
        self.paused = hello.get("paused") is True
        self._set_models(hello.get("models"))
        self.id = id
        self.credential = credential
        self.websocket = websocket
        self.user: User | None = None  # whose token that is, if it is one
        self.limits = websocket.limits
        # Admits it again as when it came, or raises APIError.
        self.authorize: Callable[[], None] = lambda: None
        # Called when it wants no new calls.
        self.on_drain: Callable[[Controller], None] = lambda controller: None
        self.debug: Callable[[str], None] = lambda line: None
        self.heard_at = unix_time()
        self.asked_at: float | None = None
        self._loop = websocket.connection.loop
        self._calls: dict[str, AgentCall] = {}
        # The call of a version 1 agent.  While it works it answers no ping, and it
        # works on when the client disconnects: no other call before it is done.
        self._busy_with = ""

    def _set_models(self, models: Any) -> None:
        """Set the models it serves; until it sends a list, it serves any."""
        if isinstance(models, list):
            names = (m for m in models if isinstance(m, str) and m.isprintable())
            usable = (name for name in names if len(name) <= APIRequest.MODEL_SIZE)
            self.models = models_table(itertools.islice(usable, 1000))

    @property
    def has_room(self) -> bool:
        return self._loop.time() >= self.websocket.busy_until and super().has_room

    def status(self, now: float) -> JSONObject:
        """Return its entry in GET /admin/status, with its id and its user."""
        user = "" if self.user is None else self.user.name or self.user.user_id
        return {**super().status(now), "id": self.id, "user": user}

    def tell(self, message: str, data: str = "", id: str = "") -> None:
        """Send a message that needs no reply; do nothing if the agent has left."""
        self.debug(f"to {self.name}: {message!r}")
        with contextlib.suppress(ConnectionError):
            self.websocket.write(envelope(id or self.id, message, data))

    async def serve(self) -> None:
        """Read the agent's messages until it leaves."""
        # The id and the name it has here: both may differ from those it began with.
        self.tell("Connection id", _to_ascii({"version": 2, "name": self.name}))
        if self.switched_off:  # since before it came back
            self.tell("Pause")
        try:
            async for message in self.websocket:
                self._receive(*open_envelope(message))
                del message  # may be large, and the next may take long to arrive
        finally:
            self.websocket.heartbeat = None  # else a reference cycle

    def lose_calls(self) -> None:
        """Fail all running calls: the agent has left."""
        reason = f"{self.name} has left"
        for call in self._calls.values():
            call.fail(ControllerError(reason, Failure.NONE, code="agent_lost"))

    def _receive(self, id: str, kind: str, data: str) -> None:
        """Handle one message; unknown ones are dropped."""
        self.heard_at = unix_time()
        self.debug(f"from {self.name}: {kind[:40]!r}")
        if kind in self.REPLIES:
            ended = kind in self.ENDS
            call = self._calls.pop(id, None) if ended else self._calls.get(id)
            if call is not None:  # else it was cancelled: a late reply is no error
                call.put(kind, data)
            if id == self._busy_with:
                self.websocket.busy_until = 0.0
        elif self.websocket.flooded():  # each of these may be a line in the log
            return
        elif kind == "Models":
            self._set_models(read_json(data))
        elif kind == "Drain":
            self.on_drain(self)
        elif kind in ("Pause", "Resume") and self.paused != (kind == "Pause"):
            self.paused = not self.paused
            how = "paused" if self.paused else "no longer paused"
            self.report(f"agent {self.name} is {how}")

    async def _send(self, request: APIRequest, content: bytes) -> Answer:
        """Send any request; return the answer once its head is there."""
        head = {"method": "POST", "path": request.target, "headers": request.headers}
        if request.is_json:  # JSON goes in as it is
            text = f'{_to_ascii(head)[:-1]},"body":{content.decode()}}}'
        else:
            body = base64.b64encode(content).decode()
            text = _to_ascii({**head, "encoding": "base64", "body": body})
        id, timeout = random_id("call-"), self.limits.first_byte_timeout
        call, kind, data = await self._ask(id, "ApiRequest", text, timeout, request)
        if (kind, data) == ("error", AGENT_FULL):  # leave it alone for a moment
            self.websocket.busy_until = self._loop.time() + AGENT_FULL_PAUSE
            reason = f"{self.name} is busy with requests from other servers"
            raise ControllerError(
                reason, Failure.FULL, status=503, code="agent_full", retry_after=1
            )
        call.begin(kind, data)
        return call

    async def _ask(
        self, id: str, message: str, data: str, timeout: float, request: APIRequest
    ) -> tuple[AgentCall, str, str]:
        """Begin a call; return it with the kind and data of the first reply."""
        text = envelope(id, message, data)
        if len(text) > self.limits.agent_message_size:  # the agent would hang up
            reason = "The request is too large for an agent."
            raise ControllerError(reason, Failure.NONE, status=413)
        call = self._calls[id] = AgentCall(self, id, request.deadline)
        self.asked_at = unix_time()
        self.debug(f"to {self.name}: {message!r}")
        try:
            with time_limit(request.deadline, asyncio.TimeoutError()):
                # One large request at a time: several could exceed the write buffer.
                await self.websocket.connection.drain()
                if id == self._busy_with:
                    deadline = min(self._loop.time() + timeout, request.deadline)
                    self.websocket.busy_until = deadline
                await self.websocket.send(text)
            kind, data = await call.get(timeout)
            return call, kind, data
        except BaseException:
            self.cancel(id)
            raise

    def cancel(self, id: str) -> None:
        """Forget a call, and tell the agent to stop working on it."""
        if self._calls.pop(id, None) is not None:
            self.tell("ApiCancel", id=id)


class TextAgent(AgentController):
    """An original agent (version 1): takes one string, and keeps conversations."""

    keeps_conversations = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.max_concurrency = 1
        self.websocket.heartbeat = self._ping

    def answers(self, path: str) -> bool:
        return path == CHAT_PATH

    def tell(self, message: str, data: str = "", id: str = "") -> None:
        """Do nothing: it understands none of these messages."""

    def _ping(self) -> None:
        """Ping the websocket and, as the original server did, by a message."""
        self.websocket.ping()
        super().tell("ping", id=str(uuid.uuid4()))

    async def answer(self, request: APIRequest) -> Answer:
        """Send one string, and wait for one string."""
        conversation_id = parent_id = ""
        if request.ask is not None and (request.agent_id or not request.ask[1]):
            content, conversation_id, parent_id = request.ask
        else:  # it does not keep this conversation: send all of it as one string
            content = await run_large(
                len(request.content), lambda: messages_text(request.body["messages"])
            )
        self._busy_with = id = str(uuid.uuid4())
        data = {
            "message_id": id,
            "conversation_id": conversation_id,
            "parent_id": parent_id or str(uuid.uuid4()),
            "content": content,
        }
        timeout, text = self.limits.ask_timeout, _to_ascii(data)
        call, kind, text = await self._ask(id, "ChatGptRequest", text, timeout, request)
        await call.aclose()  # there is only one reply
        reply = as_object(read_json(text))
        answer = reply.get("content")
        if kind != "ChatGptResponse" or not isinstance(answer, str):
            raise call.failure(kind, text)
        usage = Usage(estimate_tokens(content), 0, estimate_tokens(answer))
        message = {"content": answer}
        body = chat_completion(request.model or "", message, usage_object(usage))
        if request.ask is not None:
            for key in ("response_id", "conversation_id"):
                body[key] = str(reply.get(key) or "")
        return json_answer(body)


class AgentCall(Answer):
    """One call on an agent's socket, and the agent's replies.

    Replies wait here until they are read, at most event_size bytes of them: the
    socket is shared, and must never wait for one slow client.  Once begun, the call
    is the answer: ApiResponse, any number of ApiData, ApiEnd.
    """

    MESSAGE_COST = 128  # bytes of memory for each, even without data

    def __init__(self, agent: AgentController, id: str, deadline: float) -> None:
        super().__init__(0, {})
        self._agent, self._id, self._deadline = agent, id, deadline
        self._loop = agent.websocket.connection.loop
        self._messages: deque[tuple[str, str]] = deque()
        self._size = 0
        self._waiter: asyncio.Future[None] | None = None
        self._error: ControllerError | None = None
        self._base64 = self._ended = False

    # --- Messages

    def put(self, kind: str, data: str) -> None:
        """Add a message; fail the call if too much is waiting."""
        self._messages.append((kind, data))
        self._size += len(data) + self.MESSAGE_COST
        if self._size > self._agent.limits.event_size + self.MESSAGE_COST:
            reason = "the client read too slowly: too much of the answer is waiting"
            self.fail(ControllerError(reason, Failure.NONE, code="client_too_slow"))
            self._agent.cancel(self._id)
        self._wake()

    def fail(self, error: ControllerError) -> None:
        """Have get() raise an error once it has returned what is waiting."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def failure(self, kind: str, data: str) -> ControllerError:
        """Return the error for a reply; only this call's client reads its words."""
        failure = Failure.BROKEN if self.status else Failure.NONE
        words = data[:4096] if kind == "error" else "its answer is unreadable"
        reason = f"{self._agent.name} failed"
        detail = words and f"{reason}: {words}"
        return ControllerError(reason, failure, detail=detail, code="agent_error")

    async def get(self, timeout: float) -> tuple[str, str]:
        """Return the kind and data of the next message.

        Raise asyncio.TimeoutError after timeout seconds or at the deadline, and
        ControllerError if the call has failed.
        """
        deadline = min(self._loop.time() + timeout, self._deadline)
        while not self._messages:
            if self._error is not None:
                raise self._error
            if self._loop.time() >= deadline:
                raise asyncio.TimeoutError
            self._waiter = self._loop.create_future()
            timer = self._loop.call_at(deadline, self._wake)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
        kind, data = self._messages.popleft()
        self._size -= len(data) + self.MESSAGE_COST
        return kind, data

    # --- The answer

    def begin(self, kind: str, data: str) -> None:
        """Take the head of the answer from the first reply; ControllerError."""
        head = as_object(read_json(data))
        status = head.get("status")
        if kind != "ApiResponse" or type(status) is not int or not 200 <= status < 600:
            self._agent.cancel(self._id)
            raise self.failure(kind, data)
        content_type = str(head.get("content_type", ""))
        if not re.fullmatch("[ -~]{0,200}", content_type):
            content_type = "application/octet-stream"
        self.status = status
        self.headers = {"content-type": content_type}
        if isinstance(head.get("retry_after"), (int, float)):
            self.headers["retry-after"] = str(head["retry_after"])
        self._base64 = head.get("encoding") == "base64"

    async def read(self) -> bytes:
        while not self._ended:
            kind, data = await self.get(self._agent.limits.silence_timeout)
            if kind == "error":
                raise self.failure(kind, data)
            if kind == "ApiData" and data:
                return self._decode(data)
            self._ended = kind == "ApiEnd"
        return b""

    async def finish(self) -> None:
        """Wait a moment for ApiEnd: before that, aclose() cancels the call."""
        self._deadline = min(self._deadline, self._loop.time() + 0.2)
        with contextlib.suppress(asyncio.TimeoutError, APIError):
            while await self.read():
                pass

    def _decode(self, data: str) -> bytes:
        if not self._base64:
            return data.encode("utf-8", "replace")
        try:
            return base64.b64decode(data, validate=True)
        except ValueError:  # or its subclass binascii.Error
            raise ControllerError(f"{self._agent.name} sent bad base64") from None

    async def aclose(self) -> None:
        self._agent.cancel(self._id)  # a no-op once it has ended


# --- Python functions


Pieces = AsyncGenerator[Any, None]


class FunctionController(Controller):
    """A Python function that answers chats in any dialect.

    function(request) takes the request's parsed JSON; on every path, "messages" and
    "tools" have the form of chat completions.  It may be plain (then it runs in a
    thread), async, a generator or an async generator.  Its result is

    - a string: the answer's text;
    - an iterator or a list of strings, streamed as they come (or of dicts: deltas);
    - a dict: a whole message, such as {"tool_calls": [...]}, or a whole
      chat.completion with "choices";
    - bytes: the answer's JSON, or whole events of its stream, sent as they are.

    An APIError that it raises is the answer.  Of any other exception the client
    learns only that the function failed.  The other arguments are Controller's.
    """

    type = "function"
    own_code = True

    def __init__(
        self,
        function: Callable[[dict[str, Any]], Any],
        *,
        name: str | None = None,
        **options: Any,
    ) -> None:
        own_name = str(getattr(function, "__name__", "function"))
        with contextlib.suppress(ValueError):  # a builtin may have no signature
            try:
                inspect.signature(function, follow_wrapped=False).bind({})
            except TypeError:
                text = f"{own_name}() must take one argument, the request"
                raise TypeError(text) from None
        super().__init__(name or own_name, **options)
        self._function = function

    def answers(self, path: str) -> bool:
        dialect = dialect_of(path)
        return dialect.generates or dialect.counts

    def default_model(self, request: APIRequest) -> str | None:
        return next(filter(request.may_use, self.models or (self.name,)), None)

    async def answer(self, request: APIRequest) -> Answer:
        model = request.model or self._own_model(request)
        body, sent = await run_large(len(request.content), self._read, request)
        # Without this, Claude Code has one token generated, only to count.
        if request.dialect.counts:
            return json_answer({"input_tokens": sent})
        body["model"] = model
        writer = request.dialect.writer(self.head(model), sent)
        with time_limit(request.deadline, self._late()):
            context = contextvars.copy_context()
            result = await self._call(body, context)
        if isinstance(result, bytes):
            return json_answer(result)
        pieces = self._pieces(request, result, context)
        if request.stream:
            head = {"content-type": EVENTS_TYPE}
            return Answer(200, head, self._events(pieces, writer))
        return await self._joined(pieces, writer, result)

    @staticmethod
    def _read(request: APIRequest) -> tuple[JSONObject, int]:
        """Return a request as its function gets it, and an estimate of its tokens."""
        # It is the function's own: the same request may go to another controller.
        body = request.dialect.chat(request.parse())
        sent = estimate_tokens(messages_text(body.get("messages")))
        if request.dialect.counts and body["tools"]:
            sent += estimate_tokens(_to_ascii(body["tools"]))
        return body, sent

    def head(self, model: str) -> dict[str, Any]:
        """Return the id, created and model of an answer."""
        now = int(unix_time())
        return {"id": random_id("chatcmpl-"), "created": now, "model": model}

    def _late(self) -> ControllerError:
        reason = f"{self.name} took too long"
        return ControllerError(reason, Failure.NONE, status=504)

    async def _call(self, body: JSONObject, context: contextvars.Context) -> Any:
        function = self._function
        if (
            inspect.isasyncgenfunction(function)
            or inspect.isgeneratorfunction(function)
            or inspect.iscoroutinefunction(function)
        ):
            result = function(body)  # runs none of its code yet
        else:
            # Through next(): a future cannot carry a StopIteration that it raises.
            result = await self._next(map(function, [body]), [], context)
        return await result if inspect.isawaitable(result) else result

    @staticmethod
    def _advance(
        pieces: Any, abandoned: list[bool], context: contextvars.Context
    ) -> Any:
        """Return the next piece, in a thread; close a generator since abandoned."""
        try:  # all in one context: a generator's variables, and decimal.localcontext()
            return context.run(next, pieces, _END)
        except (GeneratorExit, KeyboardInterrupt) as error:  # no Ctrl-C comes here
            raise RuntimeError(f"it raised {error!r}") from error
        finally:
            if abandoned:
                context.run(pieces.close)

    @staticmethod
    def _size(piece: Any) -> int:
        """Return how many bytes of an answer a piece holds; four are one token."""
        if isinstance(piece, bytes):
            return len(piece)
        calls = piece.get("tool_calls")
        text = delta_text(piece) + (_to_ascii(calls) if calls else "")
        return len(text.encode("utf-8", "replace"))

    async def _pieces(
        self, request: APIRequest, result: Any, context: contextvars.Context
    ) -> Pieces:
        """Yield a function's result as pieces of a message, or bytes as they are."""
        if isinstance(result, (str, dict)):
            yield {"content": result} if isinstance(result, str) else result
            return
        pieces = iter(result) if isinstance(result, (list, tuple)) else result
        if not hasattr(pieces, "__anext__") and not hasattr(pieces, "__next__"):
            kind = type(result).__name__
            raise TypeError(f"{self.name} returned {kind}, not a str, dict or iterator")
        abandoned: list[bool] = []
        try:
            while True:
                with time_limit(request.deadline, self._late()):
                    piece = await self._next(pieces, abandoned, context)
                if piece is _END:
                    break
                is_whole = isinstance(piece, (bytes, dict))
                if as_object(piece).get("object") == ChatWriter.OBJECT:
                    raise TypeError(f"{self.name} yielded a chunk, not its delta")
                # Chunks of other APIs often have no text: content None.
                text = "" if piece is None else str(piece)
                yield piece if is_whole else {"content": text}
        finally:
            if hasattr(pieces, "aclose"):
                await pieces.aclose()
            elif inspect.iscoroutinefunction(close := getattr(pieces, "close", None)):
                await close()
            elif hasattr(pieces, "close"):
                abandoned.append(True)  # first: _advance() looks after next()
                if not hasattr(pieces, "gi_running"):
                    self._in_thread(pieces.close)  # not awaited
                elif not pieces.gi_running:
                    self._in_thread(context.run, pieces.close)

    def _check_size(self, size: int) -> None:
        if size > self.health.limits.response_size:
            raise ProtocolError(413, "its answer is too large")

    async def _joined(self, pieces: Pieces, writer: ChatWriter, result: Any) -> Answer:
        """Return all pieces as one answer; bytes may be JSON or events."""
        builder, raw, size = CompletionBuilder(), bytearray(), 0
        builder.add({"choices": [{}]})
        try:
            async for piece in pieces:
                await asyncio.sleep(0)  # it may never await, and would block the loop
                size += self._size(piece)
                self._check_size(size)
                if isinstance(piece, bytes):
                    raw += piece
                else:
                    builder.add({"choices": [{"delta": piece}]})
                    if isinstance(writer, MessagesWriter):  # it keeps their order
                        writer.delta(piece)
        finally:
            await pieces.aclose()
        if raw:
            return json_answer(bytes(raw))
        message = builder.result()["choices"][0]["message"]
        if not any(map(message.get, ("content", "refusal", "tool_calls"))):
            message["content"] = ""  # null is for tool calls: clients would fail
        if isinstance(result, dict):  # with every field that the function has set
            message = result
        if "choices" not in message:
            message = {"choices": [{"message": message}]}
        return json_answer(writer.answer(self._whole(message, writer)))

    def _whole(self, given: JSONObject, writer: ChatWriter) -> JSONObject:
        """Return a function's chat.completion with all that clients count on."""
        choices, size = [], 0
        for index, choice in enumerate(given["choices"]):
            message = choice["message"]
            size += self._size(message)
            reason = "tool_calls" if message.get("tool_calls") else "stop"
            usual = choice_of("message", message, reason, index)
            own = {k: v for k, v in choice.items() if v is not None and k != "message"}
            choices.append({**usual, **own})
        if not choices:
            raise ValueError("a chat.completion without a choice")
        usage = usage_object(Usage(writer.input_tokens, 0, -(-size // 4)))
        whole = {**chat_completion("", {}, usage), **writer.head}
        whole.update({k: v for k, v in given.items() if v is not None})
        return {**whole, "choices": choices}

    async def _events(self, pieces: Pieces, writer: ChatWriter) -> Pieces:
        """Yield the pieces as the events of a stream."""
        size, reason = 0, "stop"
        try:
            async for piece in pieces:
                if isinstance(piece, bytes):
                    yield piece
                elif "choices" in piece:  # a whole chat.completion
                    yield writer.events(self._whole(piece, writer))
                    return
                else:
                    size += self._size(piece)
                    if isinstance(writer, MessagesWriter):  # it keeps the text
                        self._check_size(size)
                    reason = "tool_calls" if piece.get("tool_calls") else reason
                    yield writer.delta(piece)
        finally:
            await pieces.aclose()
        yield writer.end(reason, Usage(writer.input_tokens, 0, -(-size // 4)))

    async def _next(
        self, pieces: Any, abandoned: list[bool], context: contextvars.Context
    ) -> Any:
        if not hasattr(pieces, "__anext__"):
            return await self._in_thread(self._advance, pieces, abandoned, context)
        try:
            return await pieces.__anext__()
        except StopAsyncIteration:
            return _END


_END = object()  # of an iterator


# --- Mock models: always there, used only by name


class MockController(FunctionController):
    """The mock models: to try the server with, and to test clients against.

    They answer only for their own names.  Parameters are part of the name, as in
    "mock/slow?seconds=3"; with "id" and "created" an answer is always the same.
    """

    type = "mock"
    by_name_only = True

    def __init__(self) -> None:
        super().__init__(self._say, name="mock", models=list(self.MODELS))
        self._refused: Counter[str] = Counter()  # by name with parameters

    def serves(self, model: str | None) -> int:
        return NAMED if (model or "").partition("?")[0] in self.MODELS else NOT

    async def _say(self, body: JSONObject) -> Pieces:
        generate, defaults = self.MODELS[body["model"].partition("?")[0]]
        return generate(self, body, {**defaults, **self._parameters(body["model"])})

    def _parameters(self, model: str) -> JSONObject:
        """Parse the parameters behind "?"; APIError(400)."""
        name, _, query = model.partition("?")
        values: JSONObject = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        for key in values:
            mistake = ""
            if key not in {**self.MODELS[name][1], "id": "", "created": 0}:
                mistake = f"{name} has no parameter {key[:40]!r}."
            elif key not in ("text", "id"):
                try:
                    values[key] = float(values[key])
                except ValueError:
                    values[key] = math.nan
                # The others are seconds or counts: no answer may take for ever.
                most = 1e12 if key == "created" else 10_000
                if not 0 <= values[key] <= most:  # refuses NaN, too
                    mistake = f"{key!r} must be a number from 0 to {most:.0f}."
            if mistake:
                raise APIError(400, mistake, param="model")
        return values

    def answers(self, path: str) -> bool:
        return super().answers(path) or path == EMBEDDINGS_PATH

    async def answer(self, request: APIRequest) -> Answer:
        if request.path != EMBEDDINGS_PATH:
            return await super().answer(request)
        with time_limit(request.deadline, self._late()):
            async for piece in await self._say({"model": request.model}):
                if isinstance(piece, bytes):
                    return json_answer(piece)
                # Delays, refusals and failures are as in a chat.
        return json_answer(
            await run_large(len(request.content), self._embeddings, request)
        )

    @staticmethod
    def _embeddings(request: APIRequest) -> JSONObject:
        """Return a vector of eight numbers for each text, the same for equal texts."""
        value = request.body.get("input")
        items = value if isinstance(value, list) else [value]
        if items and all(type(item) is int for item in items):  # one text's tokens
            items = [items]
        texts = [*map(str, items)]
        is_packed = request.body.get("encoding_format") == "base64"
        data = []
        for index, text in enumerate(texts[:2048]):
            digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
            vector: Any = [byte / 127.5 - 1 for byte in digest[:8]]
            if is_packed:
                vector = base64.b64encode(struct.pack("<8f", *vector)).decode()
            data.append({"object": "embedding", "index": index, "embedding": vector})
        tokens = sum(map(estimate_tokens, texts))
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": request.model, "usage": usage}

    def head(self, model: str) -> JSONObject:
        options, head = self._parameters(model), super().head(model)
        head["id"] = options.get("id") or head["id"]
        head["created"] = int(options.get("created", head["created"]))
        return head

    async def echo(self, body: JSONObject, options: JSONObject) -> Pieces:
        """Repeat the last message word by word; given tools, call the first one.

        "?seconds=5" delays the answer; "?times=2" refuses two requests in all.
        """
        await asyncio.sleep(options.get("seconds", 0))
        if self._refused[body["model"]] < options.get("times", 0):
            if len(self._refused) < 10_000:  # clients choose the names
                self._refused[body["model"]] += 1
            raise APIError(429, "This mock is busy.", retry_after=1)
        messages = [*map(as_object, as_list(body.get("messages")))] or [{}]
        # Claude Code sends a system message after the user's.
        own = ("system", "developer")
        last = ([m for m in messages if m.get("role") not in own] or messages)[-1]
        text = content_text(last.get("content"))
        if body.get("tools") and last.get("role") != "tool":
            function = {"name": "tool", **(body["tools"][0].get("function") or {})}
            properties = (function.get("parameters") or {}).get("properties") or {}
            arguments = encode_json({next(iter(properties), "text"): text}).decode()
            call = {"name": function["name"], "arguments": arguments}
            id = options.get("id") or random_id("call_")
            yield {"tool_calls": [{"id": id, "type": "function", "function": call}]}
            return
        at, words = 0, re.finditer(r"\S+", text)  # \s*\S+ is quadratic on blanks
        for word in itertools.islice(words, 10_000):  # the rest is one piece
            yield text[at : word.end()]
            at = word.end()
        if not at or text[at:].strip():
            yield text[at:]

    async def text(self, body: JSONObject, options: JSONObject) -> Pieces:
        """Answer "?text=..." in "pieces=3", each after "delay=0.5" seconds."""
        text, count = options["text"], max(1, int(options["pieces"]))
        size = max(1, -(-len(text) // count))
        for at in range(0, len(text) or 1, size):
            await asyncio.sleep(options["delay"])
            yield text[at : at + size]

    async def fail(self, body: JSONObject, options: JSONObject) -> Pieces:
        """Fail with 500."""
        raise APIError(500, "This mock always fails.")
        yield

    async def cut(self, body: JSONObject, options: JSONObject) -> Pieces:
        """Break off after "?events=3" events."""
        for number in range(int(options["events"])):
            yield f"{number} "
        raise ControllerError("This mock always breaks off.", Failure.NONE)

    async def garbage(self, body: JSONObject, options: JSONObject) -> Pieces:
        """Answer half a JSON object; in a stream, as the data of an event."""
        garbage = b'{"id": "chatcmpl-garbage", "choices": [{'
        # Anthropic's SDK skips events without a name.
        event = sse_event(garbage, "message_start")
        yield event if body.get("stream") else garbage

    # The generator of each, and the defaults of its parameters.
    MODELS: ClassVar[dict[str, tuple[Callable[..., Pieces], JSONObject]]] = {
        "mock/echo": (echo, {}),
        "mock/text": (text, {"text": "Hello from the mock.", "pieces": 1, "delay": 0}),
        "mock/slow": (echo, {"seconds": 5}),
        "mock/429": (echo, {"times": math.inf}),
        "mock/500": (fail, {}),
        "mock/cut": (cut, {"events": 3}),
        "mock/garbage": (garbage, {}),
    }


# --- The tape: answers recorded once, and replayed


class RecordedAnswer(Answer):
    """An answer being relayed; up to size bytes of it are kept for the recording."""

    def __init__(self, answer: Answer, size: int, write: Callable[..., None]) -> None:
        super().__init__(answer.status, answer.headers)
        self.delimited = answer.delimited
        self.pieces: list[tuple[float, bytes]] = []  # with the loop's time of each
        self.room = size
        self._answer, self._write = answer, write

    async def read(self) -> bytes:
        piece = await self._answer.read()
        self.room -= len(piece)
        if piece and self.room >= 0:
            self.pieces.append((asyncio.get_running_loop().time(), piece))
        return piece

    def keep(self) -> None:
        self._write(self)

    async def finish(self) -> None:
        await self._answer.finish()

    async def aclose(self) -> None:
        await self._answer.aclose()


class TapeController(Controller):
    """Records the answers of the other controllers, and replays them.

    file    one JSON object a line: text to be read, edited and kept in git
    mode    "replay": no other controller gets a request; "record": every answer is
            added, and for equal requests the last one counts; "auto": recorded
            answers are replayed, others fetched and added
    speed   0 replays at once, 1 in the original time, 2 in half of it
    ignore  fields of a request that make no difference

    One thread does all work with the file, in order.
    """

    type = "tape"
    final = True
    id = "(tape)"  # no agent can have it
    THREADS = 1
    MODES = ("replay", "record", "auto")

    def __init__(
        self,
        file: str,
        *,
        mode: str = "replay",
        speed: float = 0,
        ignore: Iterable[str] = (),
        name: str = "tape",
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        super().__init__(name)
        if mode not in self.MODES:
            raise ValueError(f"mode must be one of {', '.join(self.MODES)}")
        self.file = os.path.realpath(file)
        self.mode = mode
        self.speed = speed
        self.ignore = frozenset(ignore)
        self.limits = limits
        self.alone = mode == "replay"  # no other controller gets a request
        self.by_name_only = not self.alone
        self._index: dict[bytes, int] = {}  # where the line of each key begins
        self._stamp = ABSENT  # of the file when it was indexed

    def __str__(self) -> str:
        mode = "replay only" if self.alone else self.mode
        return f"{self.file} ({mode}; recordings: {len(self._index)})"

    # --- In the loop

    def load(self) -> None:
        """Index the file; ConfigurationError if it cannot be used."""
        try:
            others = ", ".join(map(str, self._load()[:10]))
        except OSError as error:
            text = f"{self.file}: {error.strerror}"
            if self.alone and isinstance(error, FileNotFoundError):
                text += '; mode "auto" records one: --tape FILE:auto'
            raise ConfigurationError(text) from None
        if others:
            self.report(f"{self.file}: skipped lines that are not recordings: {others}")

    def serves(self, model: str | None) -> int:
        return NOT  # see look_up()

    async def look_up(self, request: APIRequest) -> None:
        """Find the recording of a request, and direct the request to the tape."""
        try:
            if self.mode != "record":
                request.recording = await self._in_thread(self._find, request)
        except OSError as error:  # in mode "auto", recording the answer reports it
            if self.alone:
                text = f"{os.path.basename(self.file)}: {error.strerror}"
                raise APIError(500, text) from None
        if self.alone or request.recording is not None:
            request.agent_id = self.id

    async def answer(self, request: APIRequest) -> Answer:
        found = request.recording
        if found is None:
            raise await self._in_thread(self._miss, request)
        kind = {"content-type": found.content_type}
        return Answer(found.status, kind, self._replay(found))

    async def _replay(self, recording: Recording) -> AsyncGenerator[bytes, None]:
        began = asyncio.get_running_loop().time()
        for seconds, piece in recording.pieces:
            if self.speed:
                passed = asyncio.get_running_loop().time() - began
                await asyncio.sleep(seconds / self.speed - passed)
            yield piece

    async def ask(self, controller: Controller, request: APIRequest) -> Answer:
        """Have a controller answer; record the answer if it is whole and good."""
        started = asyncio.get_running_loop().time()
        answer = await controller.answer(request)
        is_ask = request.ask is not None  # a browser agent alone can continue it
        if controller is self or (is_ask and controller.keeps_conversations):
            return answer

        def write(good: RecordedAnswer) -> None:
            if good.room < 0:
                self.report(f"{self.name}: an answer was too large to record")
                return
            pieces = [(round(at - started, 3), piece) for at, piece in good.pieces]
            if good.status >= 300:  # it may repeat part of the key
                text = b"".join(piece for _, piece in pieces).decode("utf-8", "replace")
                pieces = [(0.0, controller.redact(text).encode())]
            kind = good.headers.get("content-type", "")
            done = self._in_thread(self._write, request, good.status, kind, pieces)
            done.add_done_callback(self._report_failure)

        return RecordedAnswer(answer, int(self.limits.response_size), write)

    def _report_failure(self, done: asyncio.Future[None]) -> None:
        error = None if done.cancelled() else done.exception()
        if error is not None:
            self.report(f"{self.name}: an answer was not recorded: {error}")

    # --- In the thread

    def _content(self, request: APIRequest) -> Any:
        """Return the content of a request as it is recorded."""
        if request.is_json:
            return request.body
        return base64.b64encode(plain_form(request.content)).decode()

    def _comparable(self, content: Any) -> Any:
        if not self.ignore or not isinstance(content, dict):
            return content
        return {key: content[key] for key in content if key not in self.ignore}

    def _key(self, path: str, content: Any) -> bytes:
        digest = hashlib.sha256(canonical_json(self._comparable(content))).digest()
        return digest + path.encode("utf-8", "replace")

    def _line_key(self, line: bytes) -> tuple[bytes, Any] | None:
        """Return the key and the model of a line, or None if it is not a recording.

        A line as we write it is not parsed: 100 MB would take seconds.
        """
        head = None if self.ignore else _TAPE_HEAD.match(line)
        if head is not None and line.endswith(b"]}\n"):
            content = line[head.end() : line.find(_TAPE_CONTENT_END)]
            digest = hashlib.sha256(content).digest()
            if digest.hex().encode() == head[2]:
                model = _TAPE_MODEL.match(content, max(0, content.rfind(b'"model":"')))
                return digest + head[1], model and json.loads(model[1])
        found = Recording.parse(line)
        if found is None:
            return None
        model = as_object(found.content).get("model")
        return self._key(found.path, found.content), model

    def _load(self) -> list[int]:
        """Index the file if it has changed: people and other servers write to it.

        Return the numbers of the lines that are not recordings.
        """
        if not self.alone:
            append_to_file(self.file, b"")  # creates it
        stamp = stamp_of(os.stat(self.file))
        if stamp == self._stamp:
            return []
        index: dict[bytes, int] = {}
        models: dict[Any, None] = {}
        others: list[int] = []
        at = 0
        with open(self.file, "rb") as file:
            for number, line in enumerate(file, 1):
                found = self._line_key(line)
                if found is not None:
                    index[found[0]] = at
                    models[found[1]] = None
                elif line.strip():
                    others.append(number)
                at += len(line)
        if others and not index:  # never append to a file that is not a tape
            text = f"it is not a tape of version {TAPE_VERSION}"
            raise OSError(errno.EINVAL, text)
        self._index, self._stamp = index, stamp
        if self.alone:  # in other modes the upstreams may no longer have them
            self.listed = models_table(m for m in models if isinstance(m, str))
        return others

    def _find(self, request: APIRequest) -> Recording | None:
        self._load()
        key = self._key(request.path, self._content(request))
        if key not in self._index:
            return None
        with open(self.file, "rb") as file:
            file.seek(self._index[key])
            found = Recording.parse(file.readline())
        if found is None:  # its pieces have been edited, and do not parse
            del self._index[key]
        return found

    def _write(self, request: APIRequest, *answer: Any) -> None:
        self._load()
        content = self._content(request)
        key = self._key(request.path, content)
        if self.mode == "auto" and key in self._index:
            return  # an equal request was first
        line = Recording(request.path, content, *answer).encode()
        before, now = self._stamp, append_to_file(self.file, line)
        if now[1] - before[1] in (len(line), len(line) + 1):  # no other has written
            self._index[key] = now[1] - len(line)
            self._stamp = now

    def _miss(self, request: APIRequest) -> APIError:
        """Return the error for a missing recording, which names the nearest one."""
        wanted, least = self._comparable(self._content(request)), 1000
        nearest = broken = ""
        with open(self.file, "rb") as file:
            for number, line in enumerate(file, 1):
                found = Recording.parse(line)
                if found is None and line.strip():
                    broken = f" Line {number} is not a recording."
                if found is None or found.path != request.path:
                    continue
                differing = differing_fields(wanted, self._comparable(found.content))
                fields = list(itertools.islice(differing, least))
                if 0 < len(fields) < least:
                    least = len(fields)
                    nearest = f"line {number}, which differs in {fields[0]}"
        name = os.path.basename(self.file)
        text = f"{name} has no recording of {request.path}."
        if nearest:
            text = f"{name} has no recording of this request; the nearest is {nearest}."
        return APIError(404, text + broken, code="no_recording")


def tape_arguments(text: str) -> dict[str, Any]:
    """Return a TapeController's arguments from "FILE[:MODE]"; ConfigurationError."""
    file, _, mode = text.rpartition(":")
    if mode in TapeController.MODES:
        return {"file": file, "mode": mode}
    if file.endswith(".jsonl"):
        modes = " or ".join(TapeController.MODES)
        raise ConfigurationError(f"tape: {mode!r} is not a mode, expected {modes}")
    return {"file": text}


_TAPE_HEAD = re.compile(
    rb'\{"tape": %d, "path": "([^"\\]+)", "sha256": "([0-9a-f]{64})", "content": '
    % TAPE_VERSION
)
_TAPE_MODEL = re.compile(rb'"model":("(?:[^"\\]|\\.)*")')
_TAPE_CONTENT_END = b', "status": '  # cannot occur in canonical JSON


# -----------------------------------------------------------------------------
# Pool
# -----------------------------------------------------------------------------
#
# The pool chooses a controller for each request, queues requests fairly while all
# controllers are busy, and fails over as long as nothing has reached the client.
# It judges whose fault a failure is: what one request causes is that request's;
# only what a fresh, plain request would meet too is the controller's.
# `async with pool.call(request)` holds a slot and an answer, and releases both.

# Codes of a dead key or account, whatever the status.
_DEAD_KEY_CODES = frozenset(
    "insufficient_quota billing_hard_limit_reached invalid_api_key api_key_invalid"
    " account_deactivated billing_not_active access_terminated".split()
)
_UNKNOWN_MODEL_CODES = frozenset(["model_not_found", "unknown_model"])
# Another controller may have made the response that is continued.
_ELSEWHERE_CODES = frozenset(["previous_response_not_found"])
_CONTENT_CODES = frozenset(["content_policy_violation", "content_filter"])
_UNKNOWN_MODEL = re.compile(
    r"not found|not exist|n't exist|unknown|invalid|not a valid|no such|not supported"
    r"|unsupported|not available|not loaded",
    re.IGNORECASE,
)
# Statuses below 500 that are not the request's fault.
_BROKEN_STATUSES = frozenset([407, 408, 425])
# How long a controller gets no requests for a model that it does not have.
UNKNOWN_MODEL_TIME = 60.0  # seconds
PROBE_INTERVAL = 60.0  # seconds between two probes of one controller's key
# How long a request waits for an agent that has just left, and how long ago that
# may have been.
AGENT_RETURN_TIMEOUT = 5.0  # seconds
AGENT_RETURN_WINDOW = 30.0  # seconds
LEFT_MODELS = 10_000  # remembered, of agents that have left
UNKNOWN_MODELS = 1000  # remembered: clients choose the names of models
CONVERSATIONS_KEPT = 10_000  # whose controllers are remembered
# The queue is also served at this interval: cooldowns end, controllers are added.
QUEUE_INTERVAL = 0.1  # seconds
# Kinds of requests tried for each user when a slot is released.  While a thousand
# kinds of one user waited, each request of all others took 2.8 ms instead of 0.4.
QUEUE_KINDS = 32
# A conversation leaves its controller when that has this many more requests in flight
# than another: one user must not fill a controller that others need.
CONVERSATION_LEAD = 16


def parse_retry_after(headers: dict[str, str]) -> float | None:
    """Return the seconds to wait by Retry-After or retry-after-ms, or None."""
    text = headers.get("retry-after", "")
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        elif text[-3:] == "GMT":
            import email.utils  # takes 10 ms, and hardly any server sends a date

            date = email.utils.parsedate_to_datetime(text)
            seconds = date.timestamp() - unix_time()
        else:
            seconds = float(text)
    except (ValueError, TypeError, OverflowError):
        return None
    return seconds if 0 <= seconds < math.inf else None


def says_unknown_model(error: ErrorObject, model: str | None) -> bool:
    """Whether an error's message says that the model does not exist."""
    text = error.message[:500]
    if model is None or "model" not in text.lower():
        return False
    if error.param not in (None, "model"):  # another field is not supported
        return False
    # As a word of its own: "that model cannot" does not name a model "a".
    word = rf"(?<![\w.-]){re.escape(model)}(?![\w-]|\.\w)"
    return re.search(word, text) is not None and (
        "not_found_error" in error.words or _UNKNOWN_MODEL.search(text) is not None
    )


def judge_refusal(
    controller: Controller,
    model: str | None,
    status: int,
    headers: dict[str, str],
    error: ErrorObject,
) -> ControllerError | None:
    """Classify an answer of 300 and above; None if the fault is the request's.

    Codes and statuses decide.  The message does so only for an unknown model, and
    for a single request over the minute's tokens: that is refused with the code of
    a rate limit (OpenAI 429, Groq 413), but others would not be.
    """
    name, words = controller.name, error.words
    named = controller.real_name(model)
    unknown = status in (400, 403, 404) and says_unknown_model(error, named)
    rules = (  # the first that applies decides
        # A passed-on code is about the key of one of its upstreams.
        (words & _DEAD_KEY_CODES and not error.passed_on, Failure.DISABLED),
        (error.message.startswith("Request too large"), Failure.NONE),
        (status == 429 or "rate_limit_exceeded" in words, Failure.RATE_LIMITED),
        # one-api sends this with a 503.
        (unknown or words & _UNKNOWN_MODEL_CODES, Failure.UNKNOWN_MODEL),
        (status in KEY_STATUSES and not words & _CONTENT_CODES, Failure.KEY_DOUBTED),
        (status < 400 or status == 501 or words & _ELSEWHERE_CODES, Failure.NONE),
        (status >= 500 or status in _BROKEN_STATUSES, Failure.BROKEN),
    )
    failure = next((failure for applies, failure in rules if applies), None)
    if failure is None:
        return None
    reason = f"status {status} {error.summary}".rstrip()
    detail = error.message[:4096]
    if status < 400:
        reason = detail = f"it sent a redirect ({status}), which is not followed"
    elif status == 401 or failure is Failure.DISABLED:
        detail = ""  # it may repeat part of the key
        if status == 401 or "quota" not in reason:
            reason = f"its key was refused ({reason})"
    return ControllerError(
        f"{name}: {reason}",
        failure,
        detail=detail and f"{name}: {detail}",
        type=error.type,
        code=error.code,
        retry_after=parse_retry_after(headers),
        upstream_status=status,
    )


def home_keys(request: APIRequest, response_id: str) -> list[bytes]:
    """Return 16 bytes for a user's response, and for the conversation, if known."""
    model, session, start = request.model or "", request.session, request.turn.start
    conversation = ("session", model, session) if session else ("start", model, start)
    texts = [
        "\0".join((request.user, *names)).encode("utf-8", "replace")
        for names in (("response", response_id), conversation)
        if names[-1]
    ]
    return [hashlib.blake2b(text, digest_size=16).digest() for text in texts]


def rendezvous(key: bytes, controller: Controller) -> float:
    """Return how well a controller suits a key.

    When a controller leaves, only the keys that it suited best move.  Each one is the
    best for a share of the keys that equals its share of the weight.
    """
    name = controller.home.encode("utf-8", "replace")
    digest = hashlib.blake2b(key + name, digest_size=8).digest()
    share = ((int.from_bytes(digest, "big") >> 12) + 0.5) / 2**52  # between 0 and 1
    return -controller.weight / math.log(share)


class Waiter(NamedTuple):
    """A request in the queue."""

    request: APIRequest
    tried: list[Controller]  # where it has failed
    kind: tuple[Any, ...]  # requests of equal kinds fit the same controllers
    # The controller where it holds a slot now, the error that it gets, or None: what
    # it waits for has changed, so decide anew.
    outcome: asyncio.Future[Controller | APIError | None]


class Pool:
    """The controllers, and the requests that wait for them.

    type    "balanced" (smooth weighted round robin), "random" or "least_busy"
            (fewest requests in flight per weight)
    affinity  a conversation stays at its controller: its prompt is cached there
    report  called with each line for people
    debug   called with a line for each attempt
    """

    TYPES = ("balanced", "random", "least_busy")

    def __init__(
        self,
        type: str = "balanced",
        *,
        affinity: bool = True,
        limits: Limits = DEFAULT_LIMITS,
        report: Callable[[str], None] = lambda line: None,
        debug: Callable[[str], None] = lambda line: None,
    ) -> None:
        if type not in self.TYPES:
            raise ValueError(f"type must be one of {', '.join(self.TYPES)}")
        self.type = type
        self.affinity = affinity
        self.limits = limits
        self.report = report
        self.debug = debug
        self.controllers: list[Controller] = []
        self.tape: TapeController | None = None  # one of them
        self._queue: dict[str, deque[Waiter]] = {}  # by user, in turn order
        self._kinds: Counter[tuple[Any, ...]] = Counter()  # of the queued requests
        self._timer: asyncio.TimerHandle | None = None  # see _serve_queue()
        # When the last agent with each model left, and under None the last of all.
        self._left: dict[str | None, float] = {}
        # (controller, model, path, user or "" for all): until when it lacks the model.
        self._unknown: dict[tuple[Controller, str | None, str, str], float] = {}
        self._probes: dict[Controller, asyncio.Task[None]] = {}  # of their keys
        # Whose list of models is being read for the first time.
        self._listing: dict[Controller, asyncio.Task[None]] = {}
        self._homes: dict[bytes, str] = {}  # of conversations, oldest first
        self._several = False  # controllers to choose from

    # --- Its controllers

    def add(self, controller: Controller) -> None:
        """Add a controller; ValueError if another one has its name.

        Counts, limits and metrics go by name.  If one of the two is an agent, that
        one is renamed instead.
        """
        name = controller.name
        taken = self.find(name)
        if taken is not None:
            agent = controller if controller.transient else taken
            if not agent.transient:
                raise ValueError(f"there is already a controller named {name!r}")
            names = {c.name for c in self.controllers}
            numbered = (f"{name}-{number}" for number in itertools.count(2))
            agent.name = next(other for other in numbered if other not in names)
        if isinstance(controller, TapeController):
            if self.tape is not None:
                raise ValueError("there is already a tape")
            self.tape = controller
        new, account = Health(self.limits), controller.account
        shared = (c.health for c in self.controllers if c.account == account)
        controller.health = new if account is None else next(shared, new)
        controller.report = self.report
        self.controllers.append(controller)
        self._several = sum(not c.by_name_only for c in self.controllers) > 1

    def remove(self, controller: Controller) -> None:
        """Remove a controller; its requests in flight run to their end."""
        if controller in self.controllers:
            self.controllers.remove(controller)
            self.tape = None if controller is self.tape else self.tape
            if controller in self._probes:
                self._probes.pop(controller).cancel()
            unknown = self._unknown.items()
            self._unknown = {k: v for k, v in unknown if k[0] is not controller}
            if controller.transient:
                now = asyncio.get_running_loop().time()
                for model in (*(controller.models or ()), None):
                    keep_newest(self._left, model, now, LEFT_MODELS)
            if self._queue:
                self._settle_stranded()

    @property
    def reachable(self) -> list[Controller]:
        """The controllers that can get requests: only the tape while it replays."""
        alone = self.tape is not None and self.tape.alone
        return [c for c in self.controllers if c is self.tape or not alone]

    def find(self, name: str) -> Controller | None:
        """Return the controller with this name, or None."""
        return next((c for c in self.controllers if c.name == name), None)

    def close(self) -> None:
        """Close all controllers, and cancel the probes of their keys."""
        for probe in self._probes.values():
            probe.cancel()
        self._probes.clear()
        for controller in self.controllers:
            controller.close()

    async def refresh_models(self, *new: Controller) -> None:
        """Read the lists of models of these or all controllers, concurrently."""
        loop = asyncio.get_running_loop()
        wanted = (c for c in self.reachable if not new or c in new)
        readers = [c for c in wanted if c.lists_models and c.models is None]
        tasks = {c: loop.create_task(c.refresh_models()) for c in readers}
        first = {c: t for c, t in tasks.items() if not (c.listed or c.list_problem)}
        self._listing.update(first)
        try:
            await asyncio.gather(*tasks.values())
        finally:
            for controller in first:
                self._listing.pop(controller, None)

    # --- Choosing

    def _suitable(self, request: APIRequest, now: float) -> list[Controller]:
        """Return the controllers that could serve a request if they were free.

        Those that name or list its model exclude all others: what is meant for the
        machine in the next room must not go to an outside API, even while that
        machine's agent is expected back.  Other models go to those that take any.
        """
        if request.agent_id is not None:
            return [c for c in self.controllers if c.id == request.agent_id]
        model, path = request.model, request.path
        ways: tuple[list[Controller], ...] = ([], [], [])
        for controller in self.controllers:
            if controller.answers(path):
                ways[controller.serves(model)].append(controller)
        able = ways[NAMED] or ways[ANY]
        if model is None and request.ask is not None:
            able = [
                c for c in able if not c.known_models() or c.default_model(request)
            ] or able
        if model and not ways[NAMED] and self._has_just_left(model, now):
            return []
        if self._unknown and len(able) > 1:
            able = [c for c in able if not self._is_unknown(c, request, now)] or able
        return able

    def _is_unknown(self, c: Controller, request: APIRequest, now: float) -> bool:
        """Whether a controller is known to lack the model."""
        keys = ((c, request.model, request.path, user) for user in ("", request.user))
        return any(self._unknown.get(key, 0.0) > now for key in keys)

    def _choose(
        self, request: APIRequest, tried: list[Controller], now: float
    ) -> Controller | None:
        """Return the controller that gets a request now, or None."""
        suitable = self._suitable(request, now)
        left = [c for c in suitable if c not in tried] if tried else suitable
        free = [c for c in left if c.available(now, request)]
        if not free:
            return self._last_standing(left, request, now)
        if len(free) > 1:
            lowest = min(c.tier for c in free)
            free = [c for c in free if c.tier == lowest]
        if len(free) == 1:
            return free[0]
        home = self._home(request, free) if self.affinity else None
        if home is not None:
            return home
        if self.type == "random":
            return random.choices(free, [c.weight for c in free])[0]
        if self.type == "least_busy":
            least = min(c.in_flight / c.weight for c in free)
            free = [c for c in free if c.in_flight / c.weight == least]
        # Smooth weighted round robin, as in nginx: weights 5, 1, 1 give a a b a c a a.
        # Equally busy ones take turns, too: else one key would get all light load.
        for controller in free:
            controller.current += controller.weight
        best = max(free, key=lambda c: c.current)
        best.current -= sum(c.weight for c in free)
        return best

    def _home(self, request: APIRequest, free: list[Controller]) -> Controller | None:
        """Return the free controller that a conversation prefers, or None.

        That is the one that had it last.  After a restart, or on another server, it
        is the first by rendezvous hashing: every server finds the same one, and a
        controller that leaves moves only its own conversations.  The first request
        of a conversation without a name is balanced: no cache has its prompt yet.
        """
        turn, session = request.turn, request.session
        if not (turn.previous or session or turn.later):
            return None
        keys = home_keys(request, turn.previous)
        by_name = {c.home: c for c in free}
        homes = (self._homes.get(key, "") for key in keys)
        known = [by_name[home] for home in homes if home in by_name]
        if not known and not session and not turn.later:
            return None
        best = known[0] if known else max(free, key=lambda c: rendezvous(keys[-1], c))
        least = min(c.in_flight for c in free)
        return best if best.in_flight < least + CONVERSATION_LEAD else None

    def remember(
        self, controller: Controller, request: APIRequest, content: bytes
    ) -> None:
        """Remember which controller has a conversation; content starts the answer."""
        if self.affinity and self._several:
            for key in home_keys(request, request.dialect.answer_id(content)):
                keep_newest(self._homes, key, controller.home, CONVERSATIONS_KEPT)

    @staticmethod
    def _last_standing(
        left: list[Controller], request: APIRequest, now: float
    ) -> Controller | None:
        """Return the controller to try although all are closed, or None."""
        if any(not c.closed_for(now, request) for c in left):
            return None  # one is only busy: wait for it
        able = ((c.health_for(request), c) for c in left if c.last_resort(request))
        closed = [(health.until, c) for health, c in able if not health.on_trial(now)]
        return min(closed, key=lambda pair: pair[0], default=(0.0, None))[1]

    def needs_model(self, request: APIRequest) -> bool:
        """Whether a request must name a model: no single controller is meant."""
        own = [c for c in self.controllers if not c.by_name_only]
        able = sum(c.answers(request.path) for c in own)
        return able != 1 and not request.dialect.default_model

    async def acquire(
        self, request: APIRequest, tried: list[Controller]
    ) -> Controller | None:
        """Take a slot at a controller, maybe after waiting; release() it.

        Return None when every controller that is left has been tried.  Raise
        APIError: 404 when no controller has the model, 503 when there is none, all
        are closed, the queue is full or the wait was too long, 500 when the agent
        of the conversation is gone.
        """
        if self._listing and request.model:
            await self._await_lists(request)
        now = asyncio.get_running_loop().time()
        controller = self._choose(request, tried, now)
        if controller is not None:
            self._take(controller, request)
            return controller
        wait = self._may_wait(request, tried, now)
        if wait is None:
            return None
        self._make_room(request)
        return await self._wait(request, tried, *wait)

    async def _await_lists(self, request: APIRequest) -> None:
        """Wait for first lists of models while one may decide who gets the request."""
        timeout, first = self.limits.connect_timeout, asyncio.FIRST_COMPLETED
        while True:
            able = self._suitable(request, asyncio.get_running_loop().time())
            lists = [t for c, t in self._listing.items() if c in able and not t.done()]
            if len(able) < 2 or not lists:
                return
            done, _ = await asyncio.wait(lists, timeout=timeout, return_when=first)
            if not done:
                return

    def _may_wait(
        self, request: APIRequest, tried: list[Controller], now: float
    ) -> tuple[float, APIError] | None:
        """Return how many seconds a request may wait, and the error after them.

        Return None if an earlier attempt's error is all that is left.  Raise APIError
        if there is nothing to wait for.
        """
        suitable = self._suitable(request, now)
        left = [c for c in suitable if c not in tried]
        if any(c.last_resort(request) or not c.closed_for(now, request) for c in left):
            timeout = min(self.limits.queue_timeout, max(0.0, request.deadline - now))
            message = f"All controllers have been busy for {timeout:.0f} seconds."
            return timeout, APIError(503, message, code="queue_timeout", retry_after=1)
        if tried:
            return None
        if suitable:
            raise self._all_closed(suitable, request, now)
        if request.agent_id is not None:
            raise APIError(500, "Connection no longer exists", code="agent_lost")
        error = self._no_controller(request)
        if request.model and self._has_just_left(request.model, now):
            text = f"The agent that has the model {request.model!r} has just left."
            error = APIError(503, text, code="agent_lost", retry_after=5)
        elif not self._has_just_left(None, now):
            raise error
        return AGENT_RETURN_TIMEOUT, error

    def _has_just_left(self, model: str | None, now: float) -> bool:
        """Whether an agent that may return in a moment had a model; None: any."""
        at = self._left.get(model) or self._left.get(f"{model}:latest", -math.inf)
        return now - at < AGENT_RETURN_WINDOW

    def _no_controller(self, request: APIRequest) -> APIError:
        """Return the error for a request that no controller could serve."""
        cure = "connect an agent or configure a controller (the start screen shows how)"
        mocks = [m for c in self.controllers if c.by_name_only for m in c.models or ()]
        only_mocks = all(c.by_name_only for c in self.controllers)
        if only_mocks and request.ask is not None:
            text = f"No available clients: {cure}."
            return APIError(503, text, code="no_controllers")
        if any(c.serves(request.model) for c in self.controllers):
            what = f"The model {request.model!r} exists here, but no controller with it"
            return APIError(404, f"{what} answers {request.path}.", param="model")
        if mocks and (request.model or "").startswith("mock/"):
            return self.unknown_model(
                request, f"the mock models are {', '.join(mocks)}"
            )
        if only_mocks and not request.user:  # the administrator can
            return self.unknown_model(request, cure)
        return self.unknown_model(request)

    @staticmethod
    def unknown_model(
        request: APIRequest, cure: str = "GET /v1/models lists those that do"
    ) -> APIError:
        """Return the error for a model that no controller has."""
        return APIError(
            404,
            f"The model {request.model!r} does not exist here: {cure}.",
            type="invalid_request_error",
            param="model",
            code="model_not_found",
        )

    def _all_closed(
        self, controllers: list[Controller], request: APIRequest, now: float
    ) -> APIError:
        soonest = min(controllers, key=lambda c: c.closed_for(now, request))
        seconds, _, reason = soonest.closed(now, request)
        causes = {c.health_for(request).closed_by for c in controllers}
        first = " first back:" if seconds < math.inf else ""
        return APIError(
            503,
            "All controllers for this request are cooling down, disabled or paused;"
            f"{first} {soonest.name}: {reason}",
            code="no_controllers_available",
            retry_after=seconds,
            upstream_status=429 if causes == {Failure.RATE_LIMITED} else None,
        )

    # --- Waiting

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return sum(map(len, self._queue.values()))

    async def _wait(
        self,
        request: APIRequest,
        tried: list[Controller],
        timeout: float,
        error: APIError,
    ) -> Controller | None:
        """Wait in the queue for a slot; raise error after timeout seconds."""
        loop = asyncio.get_running_loop()
        model = request.model or request.may_use  # without one, the user decides
        kind = (model, request.path, request.agent_id, *tried)
        waiter = Waiter(request, tried, kind, loop.create_future())
        self._queue.setdefault(request.user, deque()).append(waiter)
        self._kinds[waiter.kind] += 1
        if self.waiting == 1:
            self._serve_queue()
        timer = loop.call_later(timeout, self._time_out, waiter, error)
        try:
            outcome = await waiter.outcome
        except asyncio.CancelledError:
            if waiter.outcome.cancelled():
                self._settle(waiter, error)
            else:  # it was settled just before its client disconnected
                unused = waiter.outcome.result()
                if isinstance(unused, Controller):
                    self.release(unused, request)
            raise
        finally:
            timer.cancel()
        if isinstance(outcome, APIError):
            raise outcome
        return outcome or await self.acquire(request, tried)

    def _make_room(self, request: APIRequest) -> None:
        """If the queue is full, refuse the last request of the user with the most."""
        if self.waiting < self.limits.queue_size:
            return
        full = APIError(
            503, "Too many requests are waiting.", code="queue_full", retry_after=1
        )
        own = len(self._queue.get(request.user, ()))
        longest = max(self._queue.values(), key=len, default=deque())
        if own + 1 >= len(longest):
            raise full
        self._settle(longest[-1], full)

    def _settle(self, waiter: Waiter, outcome: Controller | APIError | None) -> None:
        """Take a request out of the queue, with its outcome."""
        user = waiter.request.user
        queue = self._queue.get(user, deque())
        if waiter in queue:
            queue.remove(waiter)
            self._kinds[waiter.kind] -= 1
            if not self._kinds[waiter.kind]:
                del self._kinds[waiter.kind]
            if not queue:
                del self._queue[user]
        if not waiter.outcome.done():
            waiter.outcome.set_result(outcome)

    def _time_out(self, waiter: Waiter, error: APIError) -> None:
        """Settle a request that has waited long enough, or for an agent to return."""
        now = asyncio.get_running_loop().time()
        # Back, but busy: wait for it as for any other.
        back = error.code != "queue_timeout" and self._suitable(waiter.request, now)
        self._settle(waiter, None if back else error)

    def _settle_stranded(self) -> None:
        """Settle the queued requests for which no controller is left to wait for."""
        now, stranded = asyncio.get_running_loop().time(), {}
        for waiter in [*itertools.chain(*self._queue.values())]:
            if waiter.kind not in stranded:  # a thousand requests, a few kinds
                suitable = self._suitable(waiter.request, now)
                stranded[waiter.kind] = not {*suitable}.difference(waiter.tried)
            if stranded[waiter.kind]:
                self._settle(waiter, None)

    def _serve_queue(self) -> None:
        """Serve the queue now, and at intervals until it is empty."""
        if self._timer is not None:
            self._timer.cancel()
        self.wake()
        if self._queue:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(QUEUE_INTERVAL, self._serve_queue)

    def wake(self, kinds: int = sys.maxsize) -> None:
        """Give free slots to queued requests, one to each user in turn.

        kinds  of requests to try for each user; _serve_queue() finds the others
        """
        now = asyncio.get_running_loop().time()
        unservable: set[tuple[Any, ...]] = set()
        while any(
            self._serve(user, unservable, kinds, now) for user in list(self._queue)
        ):
            pass

    def _serve(
        self, user: str, unservable: set[tuple[Any, ...]], kinds: int, now: float
    ) -> bool:
        """Give a slot to the first of a user's requests that can have one."""
        most = min(len(unservable) + kinds, len(self._kinds))
        for waiter in self._queue[user]:
            if len(unservable) >= most:
                break
            if waiter.outcome.done() or waiter.kind in unservable:  # done: cancelled
                continue
            controller = self._choose(waiter.request, waiter.tried, now)
            if controller is None:
                unservable.add(waiter.kind)
                continue
            self._take(controller, waiter.request)
            self._settle(waiter, controller)
            if user in self._queue:  # to the end
                self._queue[user] = self._queue.pop(user)
            return True
        return False

    def _take(self, controller: Controller, request: APIRequest) -> None:
        controller.in_flight += 1
        health = controller.health_for(request)
        if health.closed_by:
            now = asyncio.get_running_loop().time()
            health.trial, health.trial_until = request, now + TRIAL_TIME

    def release(self, controller: Controller, request: APIRequest) -> None:
        """Release a slot, and serve the queue with it."""
        controller.in_flight -= 1
        for health in (controller.health, *controller.health.parts.values()):
            if health.trial is request:
                health.trial = None
        if self._queue:
            self.wake(QUEUE_KINDS)

    # --- Judging answers and failures

    def failed(
        self, controller: Controller, error: ControllerError, request: APIRequest
    ) -> None:
        """Record a failed attempt."""
        if error.failure is Failure.FULL:
            return
        controller.failures += 1
        if error.failure is Failure.UNKNOWN_MODEL:
            self._remember_unknown(controller, error, request)
        elif error.failure is not Failure.KEY_DOUBTED:
            self._close(controller, error, request)
        elif controller not in self._probes:
            work = self._check_key(controller, request)
            self._probes[controller] = asyncio.get_running_loop().create_task(work)

    def _close(
        self, controller: Controller, error: ControllerError, request: APIRequest
    ) -> None:
        """Cool a controller down, or disable it, if the failure calls for it."""
        whole, now = controller.health, asyncio.get_running_loop().time()
        model, known = controller.model_of(request), controller.known_models()
        health = whole.of(model)
        before = (health is whole, health.until > now, health.closed_by)
        several = len({*map(controller.real_name, itertools.islice(known, 100))}) > 1
        seconds = whole.fail(error, request, now, model if several else None)
        health = whole.of(model)
        # Report it once, not for every request in flight.
        if seconds and before != (
            health is whole,
            health.until > now,
            health.closed_by,
        ):
            name = controller.name
            reason = error.reason.removeprefix(f"{name}: ")
            name += "" if health is whole else f" (only {str(model)[:80]})"
            disabled = health.closed_by is Failure.DISABLED
            state = "disabled" if disabled else "cooling down"
            self.report(f"{name} {state} for {seconds:.0f} s: {reason}")

    def _remember_unknown(
        self, controller: Controller, error: ControllerError, request: APIRequest
    ) -> None:
        """Remember for a while that a controller does not have the model.

        A code counts for all users.  A message may quote the request, so it counts
        for that user only.
        """
        user = "" if error.code in _UNKNOWN_MODEL_CODES else request.user
        key = (controller, request.model, request.path, user)
        if key not in self._unknown and controller.serves(request.model) == NAMED:
            text = f"it does not know {request.model!r}, one of its models"
            self.report(f"{controller.name}: {text}")
        until = asyncio.get_running_loop().time() + UNKNOWN_MODEL_TIME
        keep_newest(self._unknown, key, until, UNKNOWN_MODELS)

    async def _check_key(self, controller: Controller, request: APIRequest) -> None:
        """Probe the key with a plain request of our own, at most once a minute.

        A 403 may concern the prompt or the key.  A user who can provoke one must not
        disable the key for everybody.
        """
        status = await controller.probe()
        if status in KEY_STATUSES and controller.works_at:
            # A restricted key works, but may not list models, or embed.
            status = await controller.probe(controller.works_at)
        if status in KEY_STATUSES and controller in self.controllers:
            reason = f"{controller.name}: its key was refused (status {status})"
            refused = ControllerError(reason, Failure.DISABLED, upstream_status=status)
            self._close(controller, refused, request)
        await asyncio.sleep(PROBE_INTERVAL)
        self._probes.pop(controller, None)

    def began(self, controller: Controller, request: APIRequest) -> None:
        """Record that an answer has begun: the controller may be back."""
        now, model = asyncio.get_running_loop().time(), controller.part_of(request)
        if controller.health.begin(request, now, model):
            self.report(f"{controller.name} is back")

    def succeeded(
        self, controller: Controller, request: APIRequest, usage: Usage
    ) -> None:
        """Record a complete answer and its usage."""
        self.began(controller, request)
        if usage.total and request.dialect.judged:
            controller.works_at = request.path
        self.count(controller, tokens=usage.total)
        controller.health.succeed(controller.part_of(request))

    def count(self, controller: Controller, requests: int = 0, tokens: int = 0) -> None:
        """Count an attempt, or the tokens of an answer, complete or not."""
        controller.requests += requests
        controller.tokens += tokens
        limit = controller.limit
        if limit is None:
            return
        limit.count(requests, tokens)
        exceeded = None if limit.reported else limit.exceeded()
        if exceeded is not None:  # once in each window
            limit.reported = True
            seconds, why = exceeded
            self.report(
                f"{controller.name} gets no requests for {seconds:.0f} s: {why}"
            )

    def call(self, request: APIRequest) -> Call:
        """Return the Call of a request: `async with pool.call(request) as call`."""
        return Call(self, request)


def ends_task(caught: BaseException) -> bool:
    """Whether an exception is meant for the current task.

    Any other is a controller's failure, even one that would end the event loop or
    pass for a client that disconnects: functions raise SystemExit, pytest.fail() and
    the CancelledError of something they await.
    """
    if isinstance(caught, asyncio.CancelledError):
        cancelling = getattr(asyncio.current_task(), "cancelling", None)
        return cancelling is None or cancelling() > 0  # None before Python 3.11
    if isinstance(caught, KeyboardInterrupt):  # Ctrl-C arrives in the main thread
        return threading.current_thread() is threading.main_thread()
    # A task that never ended is closed when its loop no longer runs.
    return isinstance(caught, GeneratorExit) and asyncio._get_running_loop() is None


# An image, a sound or a file inside a request: its bytes are not tokens.
_INLINE = re.compile(rb'[",][A-Za-z0-9+/_\\-]{1000,}')  # some write \/ for /


class Call:
    """A request's way through the pool; once entered, its answer has begun.

    status      of the answer; 0 until it has begun
    headers     of the answer, by name in lower case
    content     the whole content, or None: then read() returns it piece by piece
    stream      follows the events of a stream; None for other answers
    controller  the one that answered, or was tried last
    tries       of each one that was tried: its name, when, and why it failed or ""
    ended       whether read() has returned everything
    usage       the tokens it took, as far as they are known

    Entering raises APIError; so does read() when the answer breaks off.
    """

    def __init__(self, pool: Pool, request: APIRequest) -> None:
        self.pool = pool
        self.request = request
        self._max_size = int(pool.limits.response_size)
        self.status = 0
        self.headers: dict[str, str] = {}
        self.content: bytes | None = None
        self.stream: EventStream | None = None
        self.controller: Controller | None = None
        self.tries: list[tuple[str, float, str]] = []
        self.began_at = 0.0  # when the answer began; of a stream, its first event
        self.ended = False
        self.usage = Usage()
        self._answer: Answer | None = None
        self._first = b""  # read from the answer, not yet returned

    @property
    def is_raw(self) -> bool:
        """Whether an answer has begun that is neither JSON nor events."""
        return bool(self.status and self.content is None and self.stream is None)

    async def __aenter__(self) -> Call:
        tried: list[Controller] = []
        errors: list[ControllerError] = []
        limits, began = self.pool.limits, asyncio.get_running_loop().time()
        if self.pool.tape is not None:
            await self.pool.tape.look_up(self.request)
        while len(tried) < limits.attempts and not (errors and self._is_late()):
            controller = await self.pool.acquire(self.request, tried)
            if controller is None:
                break
            tried.append(controller)
            error = await self._attempt(controller)
            if error is None:
                return self
            waited = asyncio.get_running_loop().time() - began
            if error.failure is Failure.FULL and waited < limits.queue_timeout:
                tried.pop()  # wait for it as for any busy one
                self.tries.pop()
                self.pool.count(controller, requests=-1)
                continue
            errors.append(error)
        if errors[0].refusal and all(error.refusal for error in errors):
            self.status, self.headers, self.content = errors[0].refusal
            return self
        try:
            raise errors[-1]
        finally:
            del error, errors  # they hold this frame, which holds them

    def _is_late(self) -> bool:
        """Whether the deadline has passed: another attempt would be cut off."""
        return asyncio.get_running_loop().time() >= self.request.deadline

    async def _attempt(self, controller: Controller) -> ControllerError | None:
        """Try one controller; return None once its answer has begun, or its error."""
        request = self.request
        self.controller = controller
        started = asyncio.get_running_loop().time()
        self.tries.append((controller.name, started, ""))
        self.pool.count(controller, requests=1)
        if request.on_asked is not None:
            request.on_asked()
        self.pool.debug(f"attempt {len(self.tries)}: {controller.name}")
        try:
            tape = self.pool.tape
            if tape is None:
                self._answer = await controller.answer(request)
            else:
                self._answer = await tape.ask(controller, request)
            self.content = self.stream = None  # left by an earlier attempt
            self._first = b""
            await self._begin(controller, self._answer)
            self.status = self._answer.status  # no failover from here on
            if self.status < 300:
                self.pool.remember(controller, request, self.content or self._first)
            self.began_at = asyncio.get_running_loop().time()
            return None
        except BaseException as caught:  # functions raise SystemExit, too
            try:
                if ends_task(caught):
                    raise
                error = self._explain(controller, caught)
            finally:
                await self._release(controller)
            if not isinstance(error, ControllerError):
                raise error from None
            if error.failure is not Failure.FULL:
                which = f"attempt {len(self.tries)} of {request.id or 'a request'}"
                # Only the log tells the address: the reason is for clients, too.
                refused = error.failure is Failure.REFUSED
                where = f" ({controller.base_url})" if refused else ""
                self.pool.report(f"{which} failed: {error.reason}{where}")
            return error

    async def __aexit__(self, *exc_info: object) -> None:
        if self._answer is None or self.controller is None:
            return  # all refused
        if self.stream is not None and not self.ended:  # cut short, by either side
            usage = self.stream.usage  # so far; messages begin with a small number
            output = max(usage.output, self.stream.estimate())
            self.usage = self._estimate(usage, output)
            self.pool.count(self.controller, tokens=self.usage.total)
        await self._release(self.controller)

    def _estimate(self, usage: Usage, output: int) -> Usage:
        """Return usage, its gaps filled by estimates if text is generated."""
        request = self.request
        if self.stream is None and not request.dialect.generates:
            return usage
        sent = usage.input
        if request.is_json and not sent:
            sent = len(_INLINE.sub(b"", request.content)) // 4
        return Usage(sent, usage.cached_input, output)

    async def _release(self, controller: Controller) -> None:
        """Release the answer, then the slot."""
        answer, self._answer = self._answer, None
        try:
            if answer is not None:
                try:
                    if self.ended:
                        await answer.finish()
                finally:  # many clients hang up at [DONE]: that cancels finish()
                    await answer.aclose()
        except BaseException as caught:  # a function's, from its "finally"
            if isinstance(caught, Exception) or ends_task(caught):
                raise
            raise RuntimeError(f"closing an answer raised {caught!r}") from caught
        finally:
            self.pool.release(controller, self.request)

    # --- The answer

    async def _begin(self, controller: Controller, answer: Answer) -> None:
        """Read an answer until it can be passed on: whole, or its first piece."""
        request = self.request
        self.headers = answer.headers
        if answer.status >= 300:
            content = await answer.read_all(self._max_size)
            self.content = self._judge(controller, answer, content)
        else:
            empty = answer.status in (204, 205)  # whatever follows
            kind = "" if empty else await self._kind(answer)
            if kind == EVENTS_TYPE:
                await self._begin_events()
            elif kind == JSON_TYPE:
                content = self._first + await answer.read_all(self._max_size)
                error = request.dialect.check(content, answer.delimited)
                if error is not None:
                    raise self._event_error(error)
                self.content = content
                if request.dialect.judged:  # its label may be wrong
                    self.headers["content-type"] = JSON_TYPE
                if request.stream and request.dialect.generates:
                    self._make_stream(content)
            elif request.dialect.judged:
                raise ProtocolError(502, "it sent neither JSON nor events")
            else:
                self._first = b"" if empty else await answer.read()
                self.content = None if self._first else b""
        if self.content is None:
            self.pool.began(controller, request)
        else:
            self._first = b""
            if answer.status < 300:  # a refusal may repeat a "usage" of the request's
                self.usage = find_usage(self.content)
                if not any(self.usage):
                    self.usage = self._estimate(self.usage, len(self.content) // 4)
            self.pool.succeeded(controller, request, self.usage)
            answer.keep()

    async def _kind(self, answer: Answer) -> str:
        """Return the media type of an answer, by its first bytes if we know the API."""
        if not self.request.dialect.judged:
            return labelled_type(answer.headers.get("content-type", ""))
        kind = None
        while kind is None:
            piece = await answer.read()
            self._first = body_start(self._first + piece)
            kind = body_type(self._first) if piece else ""
        return kind

    async def _begin_events(self) -> None:
        """Read up to the first event, or to the end if the client wants no stream."""
        request = self.request
        self.stream = stream = request.dialect.open_stream(request, self._max_size)
        self._first = stream.receive(self._first)
        if request.dialect.generates and not request.stream:
            self.content = await self._gather(stream)
            return
        while not stream.began and stream.error is None:
            if stream.ended:
                raise ProtocolError(502, "its stream was empty")
            self._first = await self._next_block(stream)
        if stream.error is not None and event_data(self._first) is None:
            raise self._event_error(stream.error)
        if (failure := self._failure(stream)) is not None:
            raise failure

    def _judge(self, controller: Controller, answer: Answer, content: bytes) -> bytes:
        """Return content if the request is at fault; else raise ControllerError."""
        if controller.final:
            return content
        text = controller.redact(content.decode("utf-8", "surrogateescape"))
        content = text.encode("utf-8", "surrogateescape")
        status, headers = answer.status, answer.headers
        found = find_refusal(content)
        if found is None and status == 404:
            where = controller.base_url + self.request.path[3:]
            self.pool.report(f"{controller.name}: 404 at {where}; wrong base_url?")
        refusal, model = found or ErrorObject(), self.request.model
        error = judge_refusal(controller, model, status, headers, refusal)
        if error is None:
            return content
        # Never a 401: the client would blame its own key.
        closes_nothing = (Failure.KEY_DOUBTED, Failure.UNKNOWN_MODEL, Failure.NONE)
        if 400 <= status < 500 and status != 401 and error.failure in closes_nothing:
            error.refusal = (status, headers, content)
        raise error

    def _event_error(self, error: ErrorObject) -> APIError:
        """Return the error for an error object in an answer with status 200."""
        controller, status = self.controller, error.status
        assert controller is not None
        judged = judge_refusal(controller, self.request.model, status, {}, error)
        if judged is not None:
            return judged
        text = controller.redact(error.message) or f"status {status}"
        return APIError(
            status, text, type=error.type, param=error.param, code=error.code
        )

    def _failure(self, stream: EventStream) -> ControllerError | None:
        """Return the error of a failed response, unless its request is at fault."""
        error = None if stream.failure is None else self._event_error(stream.failure)
        return error if isinstance(error, ControllerError) else None

    async def _next_block(self, stream: EventStream) -> bytes:
        assert self._answer is not None
        piece = await self._answer.read()
        return stream.receive(piece) if piece else stream.end()

    async def _gather(self, stream: EventStream) -> bytes:
        """Return a stream that the client did not ask for as one answer."""
        builder, block, size = self.request.dialect.builder(), self._first, 0
        while True:
            size += len(block)
            if size > self._max_size:
                raise ProtocolError(413, "its answer is too large")
            content = self._build(builder, block, stream)
            if stream.ended:
                break
            block = await self._next_block(stream)
        if stream.error is not None:
            raise self._event_error(stream.error)
        if (failure := self._failure(stream)) is not None:
            raise failure
        if not stream.began:
            raise ProtocolError(502, "its stream was empty")
        self.stream = None
        self.headers = {"content-type": JSON_TYPE}
        return content

    @staticmethod
    def _build(builder: CompletionBuilder, block: bytes, stream: EventStream) -> bytes:
        """Add a block of events; return the whole answer at the end of its stream."""
        try:
            for _, data in split_events(block):
                if data is not None and data.strip() != b"[DONE]":
                    builder.add(json.loads(data))
            whole = stream.ended and stream.error is None
            return encode_json(builder.result()) if whole else b""
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ProtocolError(502, "its stream has a broken event") from None

    def _make_stream(self, content: bytes) -> None:
        """Turn a whole answer into the stream that the client asked for."""
        dialect = self.request.dialect
        try:
            events = dialect.writer.relay(parse_object(content))
        except (APIError, LookupError, TypeError, AttributeError):
            raise ProtocolError(502, "its answer cannot be streamed") from None
        self.content = None
        self.headers = {"content-type": EVENTS_TYPE}
        self.stream = dialect.open_stream(self.request, self._max_size)
        self._first = self.stream.receive(events)

    async def read(self) -> bytes:
        """Return the next bytes for the client; b"" at the end.

        Raise ControllerError if the answer breaks off: nothing follows then.
        """
        block, self._first = self._first, b""
        stream = self.stream
        assert self._answer is not None and self.controller is not None
        try:
            if stream is None:
                block = block or await self._answer.read()
            else:
                while not block and not stream.ended:
                    block = await self._next_block(stream)
                if stream.error is not None and not block:
                    raise self._event_error(stream.error)
        except BaseException as caught:
            if ends_task(caught):
                raise
            error = self._explain(self.controller, caught)
            which = f"request {self.request.id}" if self.request.id else "a request"
            self.pool.report(f"{which} broke off: {error.reason}")
            raise error from None
        whole = not block if stream is None else stream.ended and stream.error is None
        if whole and not self.ended:
            self.ended = True
            if stream is not None:
                output = stream.usage.output or stream.estimate()
                self.usage = self._estimate(stream.usage, output)
            failure = None if stream is None else self._failure(stream)
            if failure is not None:
                self._explain(self.controller, failure)
                self.pool.count(self.controller, tokens=self.usage.total)
            else:
                self.pool.succeeded(self.controller, self.request, self.usage)
                self._answer.keep()
        return block

    def _explain(self, controller: Controller, caught: BaseException) -> APIError:
        """Turn an exception into an error for the client, and record the failure."""
        name = controller.name
        if isinstance(caught, ControllerError):
            error = caught
            error.message = controller.redact(error.message)
        elif isinstance(caught, APIError):
            return caught
        elif controller.own_code:  # the log alone repeats its words
            logger.warning("%s failed: %s", name, caught, exc_info=caught)
            error = ControllerError(f"{name} failed; see the log", Failure.NONE)
        # First: asyncio.TimeoutError is an OSError from Python 3.11 on.
        elif isinstance(caught, asyncio.TimeoutError):
            error = ControllerError(f"{name} was silent for too long", status=504)
            if self._is_late():  # the upload, say, took most of the time
                seconds = self.pool.limits.request_timeout
                text = f"{name} did not finish within {seconds:g} s"
                error = ControllerError(text, Failure.NONE, status=504)
        elif isinstance(caught, ConnectionRefusedError):
            error = ControllerError(f"{name}: {caught}", Failure.REFUSED)
        elif isinstance(caught, (OSError, ProtocolError)):
            error = ControllerError(f"{name}: {connection_problem(caught)}")
            if getattr(caught, "status", 0) == 413:  # what the request asked for
                error.failure = Failure.NONE
        else:
            logger.warning("%s failed", name, exc_info=caught)
            error = ControllerError(f"{name} failed; see the log", Failure.NONE)
        self.pool.failed(controller, error, self.request)
        self.tries[-1] = (*self.tries[-1][:2], error.reason)
        # Its frames hold the request's content, in a reference cycle.  By a method:
        # a frozen dataclass refuses assignment.
        caught.with_traceback(None)
        return error


# -----------------------------------------------------------------------------
# Metrics
# -----------------------------------------------------------------------------
#
# What the server reports about itself, to people and to monitoring.  No content of
# requests is kept here.


class RequestRecord(NamedTuple):
    """Where a request went and how it ended, without its content.

    time is when it started, in Unix seconds; all other times are the event loop's.
    """

    request_id: str
    time: float
    started: float
    ended: float | None  # None while it runs
    user: str  # "" without a valid key
    method: str
    path: str
    model: str
    status: int
    error: tuple[str, str]  # its code, and a message that does not quote the request
    failed: bool  # whether the client got an error; not if it disconnected
    attempts: list[tuple[str, float, str]]  # see Call.tries
    began_at: float  # when its answer began, or 0
    usage: Usage
    address: str
    client: str

    def as_json(self) -> dict[str, Any]:
        """Return it as in GET /admin/status; times are seconds since its start."""

        def since(when: float | None) -> float | None:
            return round(when - self.started, 3) if when else None

        return {
            "request_id": self.request_id,
            "time": round(self.time, 3),
            "user": self.user,
            "method": self.method,
            "path": self.path[:200],
            "model": self.model[:200],
            "controller": self.attempts[-1][0] if self.began_at else "",
            "attempts": [
                {
                    "controller": name,
                    "asked": since(asked),
                    "reason": reason.removeprefix(f"{name}: "),
                }
                for name, asked, reason in self.attempts
            ],
            "first_byte": since(self.began_at),
            "duration": since(self.ended),
            "status": self.status if self.ended else None,
            "failed": self.failed,
            "code": self.error[0],
            "error": self.error[1],
            **self.usage._asdict(),
            "address": self.address,
            "client": self.client,
        }


class Journal:
    """The last requests, and the activity of the last ten minutes."""

    REQUESTS = 200
    # Requests without a valid key are kept apart, so that they evict no others.
    STRANGERS = 20
    SLOT = 10.0  # seconds
    SLOTS = 60

    def __init__(self) -> None:
        self._requests: deque[RequestRecord] = deque(maxlen=self.REQUESTS)
        self._strangers: deque[RequestRecord] = deque(maxlen=self.STRANGERS)
        # By the loop's time // SLOT: requests, failures, tokens.
        self._slots: dict[int, list[int]] = {}

    def add(self, record: RequestRecord) -> None:
        """Add a request that has ended."""
        assert record.ended is not None
        (self._requests if record.user else self._strangers).append(record)
        slot = self._slots.setdefault(int(record.ended / self.SLOT), [0, 0, 0])
        slot[0] += 1
        slot[1] += record.failed
        slot[2] += record.usage.total
        if len(self._slots) > self.SLOTS + 1:
            del self._slots[min(self._slots)]

    def requests(self) -> list[RequestRecord]:
        """Return the requests kept, latest first."""
        both = [*self._requests, *self._strangers]
        return sorted(both, key=lambda record: record.started, reverse=True)

    def activity(self, now: float) -> dict[str, list[int]]:
        """Return requests, failures and tokens for each slot before the current one."""
        current = int(now / self.SLOT)
        numbers = range(current - self.SLOTS, current)
        counts = zip(*(self._slots.get(number, (0, 0, 0)) for number in numbers))
        return dict(zip(("requests", "failures", "tokens"), map(list, counts)))

    def first_bytes(self) -> dict[str, float]:
        """Return each controller's median time to first byte, in seconds."""
        times: dict[str, list[float]] = {}
        for record in self._requests:
            if record.began_at:
                name, asked, _ = record.attempts[-1]
                times.setdefault(name, []).append(record.began_at - asked)
        return {name: round(sorted(ts)[len(ts) // 2], 3) for name, ts in times.items()}


class Histogram:
    """A Prometheus histogram with fixed bounds."""

    BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

    def __init__(self) -> None:
        self._counts = [0] * (len(self.BOUNDS) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect.bisect_left(self.BOUNDS, value)] += 1
        self._sum += value

    def lines(self, name: str, labels: str) -> Iterator[str]:
        """Yield its samples; none before the first value."""
        if not any(self._counts):
            return
        total = 0
        for bound, count in zip((*self.BOUNDS, "+Inf"), self._counts):
            total += count
            yield f'{name}_bucket{{{labels},le="{bound}"}} {total}'
        yield f"{name}_sum{{{labels}}} {self._sum:.6f}"
        yield f"{name}_count{{{labels}}} {total}"


_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def metric_labels(**labels: str) -> str:
    """Return labels in the text format, without braces."""
    pairs = ((name, value.translate(_ESCAPES)) for name, value in labels.items())
    return ",".join(f'{name}="{value}"' for name, value in pairs)


class Metrics:
    """The content of GET /metrics: Prometheus text, version 0.0.4.

    The number of labels is bounded: unknown models and paths are "other".

    users  whether to count by user, too
    """

    PREFIX = "chatgpt_apiserver_"
    # A name that ends in _seconds is a histogram.
    METRICS: ClassVar = {
        "requests_total": "Finished requests.",
        "tokens_total": "Tokens; input includes cached_input.",
        "attempts_total": "Attempts at a controller, by result.",
        "rejected_total": "Requests refused before any attempt, by reason.",
        "user_requests_total": "Finished requests, by user.",
        "user_tokens_total": "Tokens, by user.",
        "request_duration_seconds": "From a request's head to the end of its answer.",
        "time_to_first_token_seconds": "From an attempt's start to its first byte.",
        "time_per_output_token_seconds": "Time per token after the first byte.",
        "queue_wait_seconds": "From a request's head to its first attempt.",
    }

    MAX_NAMES = 200  # controllers, and models, with labels of their own

    def __init__(self, users: bool = False) -> None:
        self._users = users
        self._controllers: set[str] = set()
        self._models: set[str] = set()
        # By name, then by labels: a Histogram, or [a total].
        self._series: dict[str, Any] = {
            name: defaultdict(Histogram if name.endswith("_seconds") else lambda: [0])
            for name in self.METRICS
        }
        self._kinds: dict[tuple[Any, ...], list[Any]] = {}  # see _series_of()

    def observe(self, record: RequestRecord, path: str, model: str) -> None:
        """Count a request that has ended."""
        ended, attempts, began = record.ended, record.attempts, record.began_at
        assert ended is not None
        name, asked, reason = attempts[-1] if attempts else ("", 0.0, "")
        result = ("failed" if reason else "ok") if attempts else ""
        kind = (path, model, record.status, name, result)
        requests, duration, *of_answer = self._kinds.get(kind) or self._series_of(kind)
        requests[0] += 1
        duration.observe(ended - record.started)
        if attempts:
            attempt, wait, first, pace, sent, cached, output = of_answer
            usage = record.usage
            attempt[0] += 1
            wait.observe(attempts[0][1] - record.started)
            sent[0] += usage.input
            cached[0] += usage.cached_input
            output[0] += usage.output
            if began:
                first.observe(began - asked)
            if began and usage.output:
                pace.observe((ended - began) / usage.output)
            for name, _, _ in attempts[:-1]:
                name = bounded(name, self._controllers, self.MAX_NAMES)
                self._find("attempts_total", controller=name, result="failed")[0] += 1
        else:
            reason = record.error[0] if record.user else "unauthorized"
            self._find("rejected_total", reason=reason or str(record.status))[0] += 1
        if self._users and record.user:
            self._find("user_requests_total", user=record.user)[0] += 1
            self._find("user_tokens_total", user=record.user)[0] += record.usage.total

    def _series_of(self, kind: tuple[str, str, int, str, str]) -> list[Any]:
        """Look up the series for one kind of request, and cache them."""
        (path, model, status, name, result), find = kind, self._find
        model = bounded(model, self._models, self.MAX_NAMES)
        series = [
            find("requests_total", path=path, model=model, status=str(status)),
            find("request_duration_seconds", path=path, model=model),
        ]
        if result:
            name = bounded(name, self._controllers, self.MAX_NAMES)
            both = {"model": model, "controller": name}
            series += [
                find("attempts_total", controller=name, result=result),
                find("queue_wait_seconds", model=model),
                find("time_to_first_token_seconds", **both),
                find("time_per_output_token_seconds", **both),
                *(find("tokens_total", **both, type=type) for type in Usage._fields),
            ]
        if len(self._kinds) >= 1000:  # its names are not bounded
            self._kinds.clear()
        self._kinds[kind] = series
        return series

    def _find(self, metric: str, **labels: str) -> Any:
        return self._series[metric][metric_labels(**labels)]

    def text(self, gauges: Iterable[tuple[str, str, str, float]]) -> str:
        """Return all of it; gauges are (name, help, labels, value), grouped by name."""
        lines: list[str] = []

        def add(name: str, help: str, kind: str, samples: list[str]) -> None:
            kind = "counter" if name.endswith("_total") else kind
            head = [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]
            lines.extend(head + samples if samples else [])

        for metric, help in self.METRICS.items():
            name = self.PREFIX + metric
            samples: list[str] = []
            for labels, series in self._series[metric].items():
                if isinstance(series, Histogram):
                    samples += series.lines(name, labels)
                else:
                    samples.append(f"{name}{{{labels}}} {series[0]}")
            add(name, help, "histogram", samples)
        for (name, help), group in itertools.groupby(gauges, lambda gauge: gauge[:2]):
            samples = [
                (f"{name}{{{labels}}}" if labels else name) + f" {number:.15g}"
                for _, _, labels, number in group
            ]
            add(name, help, "gauge", samples)
        return "\n".join(lines) + "\n"


def process_gauges() -> Iterator[tuple[str, str, str, float]]:
    """Yield the process metrics of Prometheus' own libraries, as far as available."""
    cpu = os.times()
    yield "process_cpu_seconds_total", "User and system time.", "", cpu[0] + cpu[1]
    with contextlib.suppress(OSError, ValueError, IndexError):  # Linux
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = [int(number) for number in file.read().split()]
        page = os.sysconf("SC_PAGE_SIZE")
        yield "process_virtual_memory_bytes", "Virtual memory.", "", pages[0] * page
        yield "process_resident_memory_bytes", "Memory in use.", "", pages[1] * page
        open_files = len(os.listdir("/proc/self/fd"))
        yield "process_open_fds", "Open files.", "", open_files
    if os.name == "posix":
        import resource

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        yield "process_max_fds", "Open files allowed.", "", most


# -----------------------------------------------------------------------------
# The page
# -----------------------------------------------------------------------------
#
# What a browser shows at "/".  The text is constant, so that its policy can name it
# by digest; all data come from the API's routes, with the key that was entered.

PAGE = r"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>chatgpt_apiserver</title>
<link rel="icon" href="data:,">
<style>
:root {
  color-scheme: light dark;
  --ground: light-dark(#fafaf8, #121315); --raised: light-dark(#fff, #1b1c1f);
  --ink: light-dark(#1c1d1f, #e7e7e4); --quiet: light-dark(#696d74, #93979e);
  --line: light-dark(#e6e6e2, #2b2d31); --ok: light-dark(#1a8050, #48b983);
  --warn: light-dark(#b07408, #dda041); --bad: light-dark(#c2332c, #f0726a);
  --run: light-dark(#1f63c6, #76a9f7);
}
* { box-sizing: border-box; margin: 0; padding: 0; font: inherit; color: inherit; }
[hidden] { display: none !important; }
html { background: var(--ground); scrollbar-gutter: stable; }
body {
  max-width: 76rem; margin: 0 auto; padding: 0 1.5rem 4rem; color: var(--ink);
  font: 14px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums;
}
h1, h2 { font-size: 1.0625rem; font-weight: 600; letter-spacing: -.01em; }
small, label, th, dt, summary, .plain { color: var(--quiet); font-size: .8125rem; }
button, input, select, textarea {
  padding: .375rem .625rem; border: 1px solid var(--line); border-radius: 6px;
  background: var(--raised); color: var(--ink); font-size: .875rem;
}
label > input, textarea { display: block; width: 100%; margin-top: .25rem; }
label > [type=checkbox] { display: inline; width: auto; accent-color: var(--ink); }
button, summary { cursor: pointer; white-space: nowrap; }
button.main { background: var(--ink); border-color: var(--ink); color: var(--ground); }
button.plain { padding: 0; border: 0; background: none; color: var(--quiet); }
pre {
  padding: .75rem; border: 1px solid var(--line); border-radius: 6px; user-select: all;
  font: .75rem/1.6 monospace; white-space: pre-wrap; word-break: break-all;
}
form { display: grid; gap: .875rem; align-content: start; }
.row { display: flex; align-items: baseline; gap: .5rem 1rem; flex-wrap: wrap; }
.grow, .row > h2 { flex: 1; }
.dot::before {
  content: ""; display: inline-block; width: .5rem; height: .5rem; margin-right: .5rem;
  border-radius: 50%; background: var(--colour, var(--quiet)); opacity: var(--shade, 1);
}
header { padding: 1.25rem 0 1rem; }
dl {
  display: grid; grid-template-columns: repeat(3, 1fr) 2fr 2fr;
  border: solid var(--line); border-width: 1px 0;
}
dl div { position: relative; padding: .75rem 1rem; border-left: 1px solid var(--line); }
dl div:first-child { padding-left: 0; border: 0; }
dd { font-size: 1.5rem; line-height: 1.3; letter-spacing: -.02em; white-space: nowrap; }
dl svg { position: absolute; right: 0; bottom: 0; width: 62%; height: 2.75rem; }
path { fill: var(--line); vector-effect: non-scaling-stroke; }
path + path { fill: none; stroke: var(--quiet); }
.stale :is(dl, main) { opacity: .4; }
nav { display: flex; gap: 1.5rem; border-bottom: 1px solid var(--line); }
nav a { padding: .75rem 0; color: var(--quiet); text-decoration: none; }
nav a[aria-current=true] { color: var(--ink); box-shadow: 0 1px var(--ink); }
section { margin-top: 2rem; }
section > .row { min-height: 2.5rem; }
table { width: 100%; table-layout: fixed; border-collapse: collapse; }
thead, tbody { border-bottom: 1px solid var(--line); }
th { text-align: left; font-weight: 400; }
th, td { padding: .5rem 1rem .5rem 0; vertical-align: baseline; white-space: nowrap; }
td, td * { overflow: hidden; text-overflow: ellipsis; }
td button + button { margin-left: .75rem; }
.tall { max-height: 44rem; margin-right: -1rem; padding-right: 1rem; overflow: auto; }
th.wide { width: 21%; }
th.mid { width: 16%; }
th.act { width: 5rem; }
.num { text-align: right; }
:is(th, td):last-child { padding-right: 0; text-align: right; }
.reason { white-space: normal; overflow-wrap: anywhere; max-height: 4.2em; }
#calls td { cursor: pointer; }
small + svg { display: block; width: 100%; height: 3px; background: var(--line); }
td.tale { padding: .25rem 0 1.25rem; white-space: normal; text-align: left; }
.tale svg { width: 100%; height: 6px; margin-bottom: .5rem; border-radius: 3px; }
.tale p { display: grid; grid-template-columns: 4rem 1fr; overflow-wrap: anywhere; }
table:not(:has(tbody))::after {
  content: attr(data-empty); display: table-caption; caption-side: bottom;
  padding: 2rem 15%; color: var(--quiet); text-align: center;
}
#plot svg { display: block; width: 100%; height: 11rem; fill: var(--ink); }
#try { display: grid; grid-template-columns: 17rem minmax(0, 1fr); gap: 2.5rem; }
#turns { min-height: 26rem; }
#turns p { margin-bottom: 1.25rem; white-space: pre-wrap; overflow-wrap: anywhere; }
#turns p:nth-child(odd) {
  width: fit-content; max-width: 85%; margin-left: auto; padding: .5rem .875rem;
  border-radius: 12px; background: var(--line);
}
#turns small, td small { display: block; scroll-margin: 6rem; }
#ask { position: sticky; bottom: 1rem; display: flex; gap: .5rem; }
#ask > * { margin: 0; padding: .625rem .875rem; }
dialog {
  width: min(40rem, calc(100vw - 2rem)); margin: 10vh auto auto; padding: 1.5rem;
  border: 1px solid var(--line); border-radius: 12px; background: var(--ground);
}
dialog form, summary { margin: .875rem 0 .5rem; }
#door { max-width: 21rem; margin: 22vh auto 0; }
@media (max-width: 700px) {
  body { padding: 0 1rem 3rem; }
  header .grow { flex-basis: 100%; order: 1; }
  dl { grid-template-columns: repeat(3, 1fr); }
  dl div:nth-child(n + 4) { grid-column: span 3; padding-left: 0; border: 0; }
  #try { grid-template-columns: minmax(0, 1fr); gap: 1.5rem; }
  thead { display: none; }
  tr { display: grid; grid-template-columns: repeat(3, 1fr); padding: .5rem 0; }
  td { padding: 0 .75rem 0 0; }
  td.wide { grid-column: span 2; }
  td:last-child:not(.num) { grid-column: 3; align-self: end; }
  #usage td:first-child { grid-column: span 3; }
  td.tale { grid-column: span 3; }
  td.num { text-align: left; }
  .num::before { content: attr(data-label); display: block; color: var(--quiet); }
}
</style>
<form id="door" method="dialog" hidden>
  <h1>chatgpt_apiserver</h1>
  <input type="password" autocomplete="current-password" required
    aria-label="Key" placeholder="API key or user token">
  <button class="main">Open</button><small role="status"></small>
</form>
<div id="room" hidden>
  <header class="row">
    <h1>chatgpt_apiserver <small id="version"></small></h1>
    <span class="grow"><span id="health" class="admin" role="status"></span></span>
    <button id="leave" class="plain">Sign out</button>
  </header>
  <dl class="admin">
    <div><dt>Up<dd id="uptime">–</div>
    <div><dt>In flight<dd id="in_flight">–</div>
    <div><dt>Waiting<dd id="waiting">–</div>
    <div><dt>Requests a minute<dd id="requests">–<dd></div>
    <div><dt>Tokens a minute<dd id="tokens">–<dd></div>
  </dl>
  <nav>
    <a href="#overview" class="admin">Overview</a><a href="#try">Try it</a>
    <a href="#users" class="admin">Users</a><a href="#usage">Usage</a>
  </nav>
  <main>
  <div id="overview" hidden>
    <section>
      <div class="row"><h2>Controllers</h2>
        <button id="add_machine">Add a machine</button></div>
      <div class="tall"><table id="controllers" data-empty="Nothing is connected:
        add a machine, or set OPENAI_API_KEY. Until then mock/echo answers."><thead><tr>
        <th class="wide" data-small="kind">Name
        <th class="wide" data-small="reason">State<th class="mid">Models
        <th class="num">In flight<th class="num">Requests<th class="num">Failed
        <th class="num">Tokens<th class="num">First byte<th class="act" data-do="turn">
      </table></div>
    </section>
    <section>
      <div class="row"><h2>Requests</h2>
        <label><input id="failed" type="checkbox"> failed only</label></div>
      <table id="calls" data-empty="No requests."><thead><tr>
        <th class="act" data-do="story">Age<th class="mid">User<th class="mid">Model
        <th class="mid">Controller<th class="wide">Status<th class="num">First byte
        <th class="num">Tokens/s<th class="num">Tokens<th class="act" data-do="cancel">
      </table>
    </section>
  </div>
  <section id="try" hidden>
    <form id="settings">
      <label>Model <input name="model" list="models" value="mock/echo"></label>
      <datalist id="models"></datalist>
      <label>System prompt <textarea name="system" rows="4"></textarea></label>
      <label>Temperature <input name="temperature" type="number" step="0.1"></label>
      <label><input name="stream" type="checkbox" checked> stream</label>
      <details><summary>as curl</summary><pre id="curl"></pre></details>
      <details><summary>as Python</summary><pre id="python"></pre></details>
    </form>
    <div>
      <div id="turns"></div>
      <form id="ask" method="dialog">
        <textarea class="grow" rows="1" placeholder="Ask" aria-label="Ask"></textarea>
        <button class="main">Send</button>
      </form>
    </div>
  </section>
  <section id="users" hidden>
    <div class="row"><h2>Users</h2><button id="add_user">Add a user</button></div>
    <table id="people" data-empty="No users yet."><thead><tr>
      <th class="wide" data-small="role">Name<th class="wide">Limits
      <th class="mid">Models<th>Expires<th class="wide" data-do="edit rotate delete">
    </table>
    <button id="more_users" class="plain" hidden>Show more</button>
  </section>
  <section id="usage" hidden>
    <div class="row"><h2>Tokens by day</h2>
      <select id="by" aria-label="By"><option value="model">by model
        <option class="admin" value="user">by user</select>
      <button id="csv" class="admin">CSV</button></div>
    <div id="limits"></div>
    <div id="plot" role="img" aria-label="Tokens by day"></div>
    <small id="since"></small>
    <table id="sums" data-empty="No usage yet."><thead><tr>
      <th class="wide">Name<th class="num">Requests<th class="num">Failed
      <th class="num">Input<th class="num">Cached<th class="num">Output
    </table>
  </section>
  </main>
</div>
<dialog id="account">
  <h2></h2>
  <form>
    <label>Name <input name="name" required maxlength="80"></label>
    <label>Limits <input name="limit" placeholder="none; or 1000 requests/day"></label>
    <label>Models <input name="models" placeholder="all; or gpt-4o*, llama3.1"></label>
    <label>Expires <input name="expires" placeholder="never; or 2027-01-31"></label>
    <div class="row"><button class="main">Save</button>
      <button class="plain" formmethod="dialog" formnovalidate>Cancel</button></div>
  </form>
</dialog>
<dialog id="result"><h2></h2><div></div><form method="dialog" class="row">
  <small class="grow" role="status"></small><button class="main">Done</button>
</form></dialog>
<script type="module">
// Data become text here, never markup: put() and make() see to that.
const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
const base = location.pathname.replace(/\/*$/, "/"); // behind a proxy: its prefix
const origin = (location.origin + base).slice(0, -1);
const whole = new Intl.NumberFormat("en").format;
const short = new Intl.NumberFormat("en", {notation: "compact"}).format;
let key = sessionStorage.getItem("key"), admin = false, timer = 0;
let status = null, etag = ""; // of the last /admin/status
let awaited = ""; // the machine expected to join
let heard = 0, skew = 0; // seconds: time of the last answer, lead of the server's clock
const now = () => Date.now() / 1000 + skew;

async function call(path, body, options = {}) {
  const headers = {Authorization: `Bearer ${key}`, ...options.headers};
  if (body) Object.assign(options, {method: "POST", body: JSON.stringify(body)});
  const answer = await fetch(base + path, {cache: "no-store", ...options, headers});
  if (answer.ok || answer.status === 304) return answer;
  let error = await answer.text();
  try { error = JSON.parse(error).error; } catch { /* a proxy's page */ }
  throw Object.assign(Error(error?.message ?? error), {status: answer.status});
}
const ask = async (path, body) => (await call(path, body)).json();
onunhandledrejection = ({reason}) => alert(reason.message); // from a click

// --- Elements, tables, drawings, times
function put(element, text) { // unchanged text stays selected
  if (element.textContent !== String(text)) element.textContent = text;
  return element;
}
function make(tag, fields, ...children) {
  const element = Object.assign(document.createElement(tag), fields);
  element.append(...children);
  return element;
}
function paint(element, colour) {
  element.classList.add("dot");
  element.style.setProperty("--colour", colour && `var(--${colour})`);
}
function draw(tag, attributes, ...children) {
  const shape = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const name in attributes) shape.setAttribute(name, attributes[name]);
  shape.append(...children);
  return shape;
}
const valuesOf = form => Object.fromEntries(new FormData(form));
const drawing = (viewBox, ...shapes) =>
  draw("svg", {viewBox, preserveAspectRatio: "none"}, ...shapes);

// A row for the heads of a table: a text under each heading, or buttons.
function newRow(heads) {
  const body = make("tbody"), row = body.insertRow();
  row.onclick = ({target}) => target.tagName === "BUTTON" || $(".story", row)?.click();
  for (const head of heads) {
    const label = head.textContent.trim(), cell = row.insertCell();
    cell.className = head.className;
    cell.dataset.label = label;
    if (label) cell.append(make("span", {className: label.replace(/\W/, "_")}));
    if (head.dataset.small) cell.append(make("small", {className: head.dataset.small}));
    for (const name of head.dataset.do?.split(" ") ?? []) {
      const onclick = () => actions[name](body.item, body);
      cell.append(make("button", {className: `plain ${name}`, onclick}));
    }
  }
  return body;
}

// A row for each item; existing rows keep their focus.  show() returns a row's texts,
// some with a colour, and may change the row itself.
function table(id, items, idOf, show) {
  const parent = $(id);
  const rows = new Map([...parent.tBodies].map(body => [body.id, body]));
  let last = parent.tHead;
  for (const item of items) {
    const id = `${parent.id} ${idOf(item)}`;
    const body = Object.assign(rows.get(id) ?? newRow($$("th", parent)), {id, item});
    rows.delete(id);
    if (last.nextElementSibling !== body) last.after(body);
    last = body;
    for (const [name, value] of Object.entries(show(item, body))) {
      const [text, colour] = [value].flat(), place = put($(`.${name}`, body), text);
      place.title = String(text).length > 12 ? text : "";
      if (colour !== undefined) paint(place, colour);
    }
  }
  while (last.nextElementSibling) last.nextElementSibling.remove();
}

function age(s) {
  const units = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const [size, unit] = units.find(([size]) => s >= size) ?? [1, "s"];
  return `${Math.max(0, Math.floor(s / size))} ${unit}`;
}
const took = s => s === null ? "–" : s < 10 ? `${s.toFixed(2)} s` : age(s);

// --- Overview
function sparkline(id, slots) { // ten minutes, in slots of ten seconds
  const top = Math.max(...slots, 1);
  const line = slots.map((n, i) => `${i} ${19 - n / top * 17}`).join("L");
  put($(id), short(slots.slice(-6).reduce((a, b) => a + b)));
  $(`${id} + dd`).replaceChildren(drawing("0 0 59 20",
    draw("path", {d: `M0 20L${line}L59 20`}), draw("path", {d: `M${line}`})));
}

const colours = {
  ready: "ok", busy: "run", cooling: "warn", paused: "warn", disabled: "bad"};
const isOff = controller => ["cooling", "disabled"].includes(controller.state);
const verb = controller => isOff(controller) ? "Enable" : "Disable";

function showControllers(all) {
  all.sort((a, b) => isOff(b) - isOff(a)); // those that need attention first
  table("#controllers", all, c => c.name, c => {
    const left = c.until && Date.parse(c.until) / 1000 - now();
    const state = c.state + (left > 0 ? `, back in ${age(left)}` : "");
    return {
      Name: c.name, kind: c.tier > 1 ? `${c.type}, tier ${c.tier}` : c.type,
      State: [state, colours[c.state]], reason: c.reason,
      Models: c.models ? c.models.join(", ") : "any",
      In_flight: c.in_flight + (c.max_concurrency ? ` of ${c.max_concurrency}` : ""),
      Requests: whole(c.requests), Failed: whole(c.failures), Tokens: short(c.tokens),
      First_byte: took(c.first_byte), turn: verb(c),
    };
  });
}

// The state of a request: words and a colour.
function outcome(r) {
  const [words, colour] = r.attempts.length ? ["running", "run"] : ["waiting", ""];
  if (r.duration === null) return [`${words}, ${age(now() - r.time)}`, colour];
  if (r.status === 499) return ["client left", ""];
  return r.failed ? [`${r.status} ${r.code}`, "bad"] : [r.status, "ok"];
}

function showCalls() {
  const shown = status.requests.filter(r => r.failed || !$("#failed").checked);
  table("#calls", shown, r => r.time + r.request_id, (r, body) => {
    const writing = r.duration - r.first_byte, tries = r.attempts.length;
    $(".cancel", body).hidden = r.duration !== null;
    if (body.rows[1]) showStory(body.rows[1].cells[0], r);
    return {
      story: age(now() - r.time), User: r.user || "–", Model: r.model || "–",
      Controller: (r.controller || "–") + (tries > 1 ? ` ×${tries}` : ""),
      Status: outcome(r), First_byte: took(r.first_byte), cancel: "Cancel",
      Tokens_s: r.output > 1 && writing > .1 ? (r.output / writing).toFixed(1) : "–",
      Tokens: tokens(r) ? short(tokens(r)) : "–",
    };
  });
}

// The story of a request: a bar of where its time went, and each step in words.
function showStory(cell, r) {
  const end = Math.max(r.duration ?? now() - r.time, .001), bars = [], steps = [];
  const bar = (x, to, colour) => bars.push(draw(
    "rect", {x, width: Math.max(to - x, 0), height: 1, fill: `var(--${colour})`}));
  const step = (at, words) => steps.push(make("p", {}, make("small", {}, at), words));
  step(took(0), `${r.method} ${r.path} from ${r.address}, ${r.client || "–"}`);
  bar(0, r.attempts[0]?.asked ?? end, "line");
  r.attempts.forEach(({controller, asked, reason}, i) => {
    const next = r.attempts[i + 1]?.asked ?? end;
    const first = reason ? next : Math.min(r.first_byte ?? end, end);
    bar(asked, first, reason ? "bad" : "quiet");
    bar(first, next, "run");
    step(took(asked), `sent to ${controller}${reason && `, which failed: ${reason}`}`);
  });
  if (r.first_byte !== null) step(took(r.first_byte), "first byte");
  if (r.duration !== null) step(took(end), outcome(r)[0] + (r.error && `: ${r.error}`));
  if (tokens(r)) step("tokens",
    `${whole(r.input)} in (${whole(r.cached_input)} cached), ${whole(r.output)} out`);
  step("id", r.request_id);
  if (cell.ended) return; // keep a selection
  cell.ended = r.duration !== null;
  cell.replaceChildren(drawing(`0 0 ${end} 1`, ...bars), ...steps);
}

function show() {
  const silent = Date.now() / 1000 - heard, stale = silent > 5;
  document.body.classList.toggle("stale", stale);
  const own = status.controllers.filter(c => c.type !== "mock");
  const open = own.filter(c => !isOff(c)).length;
  const [colour, words] = stale ? ["bad", `no answer for ${age(silent)}`]
    : status.draining ? ["warn", "shutting down"]
    : !own.length ? ["", "nothing is connected"]
    : open === own.length ? ["ok", "working"]
    : [open ? "warn" : "bad", `${open} of ${own.length} controllers available`];
  paint(put($("#health"), words), colour);
  for (const id of ["version", "in_flight", "waiting"]) put($(`#${id}`), status[id]);
  put($("#uptime"), age(now() - status.started));
  sparkline("#requests", status.activity.requests);
  sparkline("#tokens", status.activity.tokens);
  if (awaited && own.some(c => c.user === awaited))
    paint(put($("#result small"), `${awaited} has joined`), "ok");
  if ($("#overview").hidden) return;
  showControllers(own);
  showCalls();
}

async function poll() {
  try {
    const answer = await call("admin/status", undefined, {
      headers: etag && {"If-None-Match": etag}, signal: AbortSignal.timeout(5000)});
    if (answer.status === 200) status = await answer.json();
    etag = answer.headers.get("ETag");
    heard = Date.now() / 1000;
    skew = Date.parse(answer.headers.get("Date")) / 1000 - heard;
  } catch (error) {
    if (error.status === 401) return leave(error.message);
  }
  if (!key) return; // signed out meanwhile
  show();
  clearTimeout(timer);
  timer = setTimeout(poll, document.hidden ? 20000 : 2000);
}

// --- Try it
const turns = []; // the chat so far, as messages
let stopping = null; // the AbortController of the question not yet answered

function chat(question) {
  const {model, system, temperature, stream} = valuesOf($("#settings"));
  const messages = [...turns, {role: "user", content: question}];
  if (system) messages.unshift({role: "system", content: system});
  return {
    model, messages, ...(temperature && {temperature: Number(temperature)}),
    ...(stream && {stream: true, stream_options: {include_usage: true}}),
  };
}

async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = "", piece; !(piece = await reader.read()).done;) {
    const lines = (text + piece.value).split(/\r?\n/);
    text = lines.pop();
    for (const line of lines)
      if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
  }
}

async function send(question) {
  const body = chat(question), began = performance.now();
  const text = make("span"), note = make("small", {}, "…");
  $("#turns").append(make("p", {}, question), make("p", {}, text, note));
  stopping = new AbortController();
  put($("#ask button"), "Stop");
  let first = 0, count = 0;
  try {
    const answer = await call("v1/chat/completions", body, {signal: stopping.signal});
    for await (const event of body.stream ? eventsOf(answer) : [await answer.json()]) {
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices?.[0]?.delta ?? event.choices?.[0]?.message;
      text.append(delta?.content || delta?.reasoning_content || "");
      first ||= text.textContent && performance.now();
      count = event.usage?.completion_tokens ?? count + 1;
      const speed = count / (performance.now() - first) * 1000;
      put(note, `first token after ${took((first - began) / 1000)}, ${count} tokens`
        + (first && speed < 1e4 ? `, ${speed.toFixed(1)} per second` : ""));
      note.scrollIntoView({block: "nearest"});
    }
    const content = text.textContent;
    turns.push({role: "user", content: question}, {role: "assistant", content});
  } catch (error) {
    if (error.name === "AbortError") note.prepend("stopped; ");
    else paint(put(note, error.message), "bad");
  }
  stopping = null;
  put($("#ask button"), "Send");
  snippets();
}

function snippets() {
  const json = JSON.stringify(chat("Hello"));
  put($("#curl"), `curl ${origin}/v1/chat/completions \\
  -H "Authorization: Bearer $OPENAI_API_KEY" \\
  -d '${json.replaceAll("'", "'\\''")}'`);
  put($("#python"), `import json, openai
client = openai.OpenAI(base_url="${origin}/v1")
request = json.loads(${JSON.stringify(json)})
print(client.chat.completions.create(**request))`);
}

async function showTry() {
  snippets();
  const {data} = await ask("v1/models");
  $("#models").replaceChildren(...data.map(({id}) => make("option", {value: id})));
}

// --- Users
async function showUsers() {
  const count = $$("#people tbody").length + 100;
  const page = await ask(`admin/users?from=0&count=${count}`);
  $("#more_users").hidden = page.users.length >= page.total;
  table("#people", page.users, user => user.user_id, (user, body) => {
    $(".Limits", body).replaceChildren(...(user.limits ?? []).map(limitBar));
    return {
      Name: user.name || user.user_id, role: user.role ?? "user",
      Models: user.models?.join(", ") ?? "all", Expires: user.expires ?? "never",
      edit: "Edit", rotate: "Rotate", delete: "Delete",
    };
  });
}

// How much of a limit is used, in words and as a bar.
function limitBar({limit, used, maximum, reset}) {
  const width = Math.min(used / maximum, 1), fill = width < 1 ? "ink" : "bad";
  const until = width < 1 ? "" : `, resets in ${age(Date.parse(reset) / 1000 - now())}`;
  return make("div", {}, make("small", {}, `${short(used)} of ${limit}${until}`),
    drawing("0 0 1 1", draw("rect", {width, height: 1, fill: `var(--${fill})`})));
}

function openAccount(title, user, save) {
  put($("#account h2"), title);
  for (const input of $$("#account input")) {
    input.value = [user[input.name] ?? []].flat().join(", ");
    input.parentNode.hidden = user.role === "agent" && input.name !== "name";
  }
  $("#account form").onsubmit = async event => {
    if (event.submitter?.formNoValidate) return;
    event.preventDefault(); // stay open if saving fails
    const {name, limit, models, expires} = valuesOf(event.target);
    const list = text => text ? text.split(/ *, */) : null;
    const lists = {limit: list(limit), models: list(models)};
    await save({name, ...lists, expires: expires || null});
    $("#account").close();
  };
  $("#account").showModal();
}

function showOnce(title, texts, machine = "") {
  awaited = machine;
  put($("#result h2"), title);
  put($("#result small"), machine ? `waiting for ${machine}` : "shown only once")
    .className = "grow";
  $("#result div").replaceChildren(...Object.entries(texts).map(([name, text], i) => {
    const summary = make("summary", {}, name);
    return make("details", {open: !i}, summary, make("pre", {}, text));
  }));
  $("#result").showModal();
}

async function showToken(name, {token}) {
  showOnce(`A token for ${name}`, {
    "Token": token,
    "Python": `client = openai.OpenAI(base_url="${origin}/v1", api_key="${token}")`,
    "curl": `curl ${origin}/v1/models -H "Authorization: Bearer ${token}"`,
    "Claude Code": `ANTHROPIC_BASE_URL=${origin} ANTHROPIC_AUTH_TOKEN=${token} claude`,
    "Codex": `export OPENAI_API_KEY=${token}
codex -c model_provider=own -c 'model_providers.own={name="own", wire_api="responses",
  base_url="${origin}/v1", env_key="OPENAI_API_KEY"}'`,
  });
  await showUsers();
}

async function addMachine({name}) {
  const {token} = await ask("admin/users/add", {name, role: "agent"});
  showOnce("Run this on the machine", {"It dials out; no port is opened": `\
curl -fsS ${origin}/agent.py -o agent.py &&
python3 -c "import hashlib, sys; sys.exit('${status.agent_sha256}' !=
  hashlib.sha256(open('agent.py', 'rb').read()).hexdigest())" &&
python3 agent.py agent ${origin} --key ${token}`}, name);
}

const later = () => setTimeout(poll, 1000); // a status may be a second old
const act = (path, body, then = later) => ask(`admin/${path}`, body).then(() => then());
const actions = {
  turn: c => act(`controllers/${verb(c).toLowerCase()}`, {name: c.name}),
  cancel: r => act("requests/cancel", {request_id: r.request_id}),
  delete: ({user_id, name}) => confirm(`Delete ${name || user_id}?`)
    && act("users/delete", {user_id}, showUsers),
  edit: user => openAccount(`Edit ${user.name}`, user, fields =>
    act("users/update", {user_id: user.user_id, ...fields}, showUsers)),
  async rotate({user_id, name}) {
    if (confirm(`A new token for ${name || user_id}? The old one works one more hour.`))
      await showToken(name, await ask("admin/users/update", {user_id, rotate: 3600}));
  },
  story(r, body) {
    if (body.rows[1]) return body.deleteRow(1);
    const cell = body.insertRow().insertCell();
    showStory(Object.assign(cell, {colSpan: 9, className: "tale"}), r);
  },
};

// --- Usage
const DAYS = 30;
const tokens = ({input, output}) => input + output;
const day = back => new Date((now() - back * 86400) * 1000).toISOString().slice(0, 10);

async function showUsage() {
  const by = $("#by").value, path = admin ? "admin/usage" : "v1/usage";
  const days = Array.from({length: DAYS}, (_, i) => day(DAYS - 1 - i));
  const {data, limits} = await ask(`${path}?from=${days[0]}&by=day,${by}`);
  const sums = Object.entries(Object.groupBy(data, line => line[by])).map(
    ([name, lines]) => {
      const sum = field => lines.reduce((total, line) => total + line[field], 0);
      const days = new Map(lines.map(line => [line.day, tokens(line)]));
      return {name, days, requests: sum("requests"), failures: sum("failures"),
        input: sum("input"), cached: sum("cached_input"), output: sum("output")};
    });
  sums.sort((a, b) => tokens(b) - tokens(a));
  const tops = days.map(() => 0), bars = [];
  const shades = sums.map((sum, rank) => Math.max(.85 * .6 ** rank, .07));
  sums.forEach((sum, rank) => days.forEach((date, i) => {
    const height = sum.days.get(date) ?? 0, opacity = shades[rank];
    tops[i] += height;
    bars.push(draw("rect", {x: i + .1, y: -tops[i], width: .8, height, opacity},
      draw("title", {}, `${date} ${sum.name}: ${whole(height)}`)));
  }));
  const top = Math.max(...tops, 1);
  $("#plot").replaceChildren(drawing(`0 ${-top} ${DAYS} ${top}`, ...bars));
  put($("#since"), `${days[0]} to today, at most ${short(top)} a day`);
  table("#sums", sums, sum => sum.name, (sum, body) => {
    body.style.setProperty("--shade", shades[sums.indexOf(sum)]);
    return {Name: [sum.name, "ink"], Requests: whole(sum.requests),
      Failed: whole(sum.failures), Input: short(sum.input), Cached: short(sum.cached),
      Output: short(sum.output)};
  });
  $("#limits").replaceChildren(...(limits ?? []).map(limitBar));
}

async function saveCSV() {
  const answer = await call(`admin/usage?format=csv&from=${day(DAYS - 1)}`);
  const href = URL.createObjectURL(await answer.blob());
  make("a", {href, download: "usage.csv"}).click();
}

// --- Signing in and out, navigation
async function enter(typed) {
  sessionStorage.setItem("key", key = typed);
  const answer = await call("admin/status").catch(error => error);
  admin = answer.status === 200;
  if (!admin && answer.status !== 403) return leave(answer.message); // 403: a user
  for (const element of $$(".admin")) element.hidden = !admin;
  $("#door").hidden = true;
  $("#room").hidden = false;
  if (admin) await poll();
  await go();
}

function leave(words) {
  clearTimeout(timer);
  sessionStorage.removeItem("key");
  key = null;
  $("#door").hidden = false;
  $("#room").hidden = true;
  put($("#door small"), words);
}

async function go() {
  const places = {overview: show, try: showTry, users: showUsers, usage: showUsage};
  const hashes = $$("nav a:not([hidden])").map(link => link.hash);
  const hash = hashes.includes(location.hash) ? location.hash : hashes[0];
  for (const place of $$("main > *")) place.hidden = `#${place.id}` !== hash;
  for (const link of $$("nav a")) link.ariaCurrent = String(link.hash === hash);
  await places[hash.slice(1)]();
}

onhashchange = go;
document.onvisibilitychange = () => admin && poll();
$("#leave").onclick = () => leave("Signed out.");
$("#failed").oninput = showCalls;
$("#settings").oninput = snippets;
$("#more_users").onclick = showUsers;
$("#by").oninput = showUsage;
$("#csv").onclick = saveCSV;
$("#add_machine").onclick = () =>
  openAccount("Add a machine", {role: "agent", name: "gpu-box"}, addMachine);
$("#add_user").onclick = () => openAccount("Add a user", {}, async fields =>
  showToken(fields.name, await ask("admin/users/add", fields)));
$("#door").onsubmit = () => enter($("#door input").value.trim());
$("#ask").onsubmit = () => {
  const question = $("#ask textarea").value.trim();
  if (stopping) return stopping.abort();
  $("#ask textarea").value = "";
  if (question) send(question);
};
$("#ask textarea").onkeydown = event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!stopping) $("#ask").requestSubmit();
};
if (key) enter(key);
else leave("Your key stays in this tab and is forgotten when it closes.");
</script>
"""


def _page_policy() -> str:
    """Return the Content-Security-Policy: only the page's own style and script."""
    texts = re.findall(r"<(?:style|script)[^>]*>(.*?)</(?:style|script)>", PAGE, re.S)
    digests = [hashlib.sha256(text.encode()).digest() for text in texts]
    style, script = (base64.b64encode(digest).decode() for digest in digests)
    return (
        f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}';"
        " require-trusted-types-for 'script'; connect-src 'self'; img-src data:;"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


PAGE_FIELDS = (
    ("Content-Type", "text/html; charset=utf-8"),
    ("Content-Security-Policy", _page_policy()),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-cache"),
    ("Vary", "Accept"),
)


# -----------------------------------------------------------------------------
# The log
# -----------------------------------------------------------------------------
#
# Lines for people and access lines go to standard error.  A request never waits for
# the log, and text from outside cannot break a line or move a cursor.


class Log:
    """Writes lines to standard error once per turn of the loop, and never blocks.

    If a pipe is full, lines are dropped and counted: a stuck reader must not block
    requests.
    """

    MAX_SIZE = 1024 * 1024  # bytes buffered
    PIECE_SIZE = 4096  # PIPE_BUF: a pipe that polls as writable takes it whole

    def __init__(self, fd: int = 2) -> None:
        self._fd = fd
        self._waiting = bytearray()
        self._dropped = 0  # lines
        self._scheduled = False

    def write(self, line: str) -> None:
        """Add a line, without its LF."""
        if len(self._waiting) >= self.MAX_SIZE:
            self._dropped += 1
            return
        self._waiting += line.encode("utf-8", "backslashreplace") + b"\n"
        if not self._scheduled:
            try:
                asyncio.get_running_loop().call_soon(self.flush)
                self._scheduled = True
            except RuntimeError:  # no loop runs yet, or any more
                self.flush()

    def report(self, line: str) -> None:
        """Add a line for people, with the time, on one line whatever it contains."""
        if not line.isprintable():  # from an upstream's message, say
            line = "".join(char if char.isprintable() else " " for char in line)
        self.write(f"{clock_text(int(unix_time()))} {line}")

    def flush(self) -> None:
        """Write as much as the reader takes now; retry the rest later."""
        self._scheduled = False
        waiting = self._waiting
        if self._dropped and len(waiting) < self.MAX_SIZE // 2:
            waiting += b"(%d lines of this log were dropped)\n" % self._dropped
            self._dropped = 0
        while waiting:
            size = waiting.rfind(b"\n", 0, self.PIECE_SIZE) + 1 or self.PIECE_SIZE
            with contextlib.suppress(OSError, ValueError):  # closed: drop it
                if os.name == "posix" and not select.select([], [self._fd], [], 0)[1]:
                    break
                os.write(self._fd, waiting[:size])
            del waiting[:size]
        if waiting:
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop().call_later(0.2, self.flush)
                self._scheduled = True


class LogHandler(logging.Handler):
    """Writes logging records to a Log, one line each, with where an error occurred.

    Of an exception only the type is logged: its text may quote a request.
    """

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            line += f" ({type(error).__name__}"
            for frame in traceback.extract_tb(error.__traceback__, -1):
                name = os.path.basename(frame.filename)
                line += f" in {frame.name}, {name} line {frame.lineno}"
            line += ")"
        self._log.report(line)


@functools.lru_cache(maxsize=2)
def clock_text(timestamp: int) -> str:
    """Format a Unix time as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(timestamp))


def _plain(text: str) -> str:
    """Return text for the log: short and without control characters."""
    text = " ".join(text[:80].split())
    return text if text.isprintable() else ascii(text)[1:-1]


def _word(text: str) -> str:
    """Return text for the log, as one word."""
    return _plain(text).replace(" ", "_")


@functools.lru_cache(maxsize=256)
def access_words(
    user: str, method: str, path: str, status: int, model: str, controller: str
) -> str:
    """Return the part of an access line that many requests share."""
    path = re.sub("/k/[^/]*", "/k/***", path)  # hide the token
    texts = (_word(user), method, path, str(status), _word(model), _word(controller))
    return " ".join(text or "-" for text in texts)


# -----------------------------------------------------------------------------
# Conversations
# -----------------------------------------------------------------------------
#
# /api/ask takes one question at a time.  The earlier ones, and their answers, are
# kept here or by the agent.


class Conversation:
    """A conversation of /api/ask.

    agent_id  the agent that keeps it, or None if it is kept here, as a tree of
              questions with their answers
    """

    def __init__(self, agent_id: str | None) -> None:
        self.agent_id = agent_id
        self.used_at = time.monotonic()
        self.size = 0
        self.turns: dict[str, tuple[str, ...]] = {}  # parent's id, question, answer

    def messages(self, id: str) -> list[dict[str, str]]:
        """Return the chat up to an answer; [] if the agent has it; APIError(404)."""
        if self.agent_id is not None:
            return []
        if id not in self.turns:
            raise APIError(404, "Conversation doesn't exist: no such parent_id")
        messages: list[dict[str, str]] = []
        while id in self.turns:
            id, question, answer = self.turns[id]
            messages.append({"role": "assistant", "content": answer})
            messages.append({"role": "user", "content": question})
        return messages[::-1]


class Conversations:
    """The conversations of /api/ask, by user and id, the least recently used first.

    A conversation belongs to the user who began it: two agents may hand out the same
    id, and no user may continue another's conversation, or evict it with many.
    """

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._kept: OrderedDict[tuple[str, str], Conversation] = OrderedDict()
        self._size = 0
        # By user: the sum of their sizes, and _each for every one: both limits count.
        self._weights: Counter[str] = Counter()
        self._each = int(limits.conversations_size / max(1, limits.conversations))

    def find(self, user_id: str, id: str) -> Conversation | None:
        """Return the user's conversation with this id, or None."""
        self._evict()
        conversation = self._kept.get((user_id, id))
        if conversation is not None:
            conversation.used_at = time.monotonic()
            self._kept.move_to_end((user_id, id))
        return conversation

    def add(
        self, user_id: str, id: str, agent_id: str | None, turn_id: str = "", *turn: str
    ) -> None:
        """Add a turn: the parent's id, question and answer; then apply the limits.

        An agent keeps its turns itself; a single empty one stands for them here.
        """
        conversation = self.find(user_id, id)
        if conversation is None or conversation.agent_id != agent_id:
            if turn and turn[0]:
                return  # the parent was evicted while this was being answered
            self._remove((user_id, id))
            conversation = self._kept[user_id, id] = Conversation(agent_id)
            self._weights[user_id] += self._each
        if turn_id not in conversation.turns:
            size = 200 + sum(map(sys.getsizeof, turn))
            conversation.size += size
            self._size += size
            self._weights[user_id] += size
        conversation.turns[turn_id] = turn
        self._evict()

    def _evict(self) -> None:
        """Remove conversations beyond the limits: the oldest of the user with most."""
        limits, weights = self._limits, self._weights
        while self._kept:
            key, oldest = next(iter(self._kept.items()))
            if time.monotonic() - oldest.used_at <= limits.conversation_lifetime:
                few = len(self._kept) <= limits.conversations
                if few and self._size <= limits.conversations_size:
                    break
                most = max(weights, key=weights.__getitem__)
                key = next(key for key in self._kept if key[0] == most)
            self._remove(key)

    def _remove(self, key: tuple[str, str]) -> None:
        conversation = self._kept.pop(key, None)
        if conversation is not None:
            self._size -= conversation.size
            self._weights[key[0]] -= conversation.size + self._each
            if not self._weights[key[0]]:
                del self._weights[key[0]]


# -----------------------------------------------------------------------------
# Exchange: one request and its reply
# -----------------------------------------------------------------------------
#
# Each request gets an Exchange.  It reads the content, sends the request through the
# pool, and reports the result to the log, the journal and the ledger.  Its Reply
# writes the response.  Neither knows what a path means; the routes below do.

# Seconds of grace before the rate of arriving content is checked.
CONTENT_RATE_AFTER = 10.0

# Request fields that are not forwarded to an upstream, and response fields that are
# not forwarded to the client.
_PRIVATE_REQUEST_FIELDS = HOP_BY_HOP | frozenset(
    "accept-encoding api-key authorization content-encoding content-length cookie"
    " expect forwarded host x-goog-api-key"
    # These name the client's account; the forwarded key belongs to another.
    " openai-organization openai-project origin referer via x-api-key x-real-ip".split()
)
_PRIVATE_REQUEST_PREFIXES = ("x-forwarded-",)
_PRIVATE_RESPONSE_FIELDS = HOP_BY_HOP | frozenset(
    "content-length date server set-cookie x-request-id"
    # Browsers would keep these for our own origin; Cloudflare sends half of them.
    " alt-svc clear-site-data nel report-to strict-transport-security"
    # These name the account of our key, or an address behind LiteLLM.
    " openai-organization openai-project anthropic-organization-id"
    " anthropic-workspace-id x-litellm-model-api-base".split()
)
# The second and third tell a proxy in front of us to send a file instead; the last
# begins what our key at LiteLLM has spent, and may spend.
_PRIVATE_RESPONSE_PREFIXES = (
    "access-control-",
    "x-accel-",
    "x-sendfile",
    "x-litellm-key-",
)
_LIMITED_PREFIXES = (
    *_PRIVATE_RESPONSE_PREFIXES,
    "x-ratelimit-",
    "anthropic-ratelimit-",
)
Fields = Iterable[tuple[str, str]]
_JSON_FIELDS = (("Content-Type", "application/json"),)
# RFC 9110 sections 11.6.1, 12.5.3 and 15.5.22; RFC 6455 section 4.4.
_ERROR_FIELDS = {
    401: [("WWW-Authenticate", "Bearer")],
    415: [("Accept-Encoding", "gzip, deflate")],
    426: [("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13")],
}
_EVENT_FIELDS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # or nginx holds events back
}
_NO_CORS = ("/admin", "/api/connections")  # pages of other origins may not read these
# What SDKs append to a base URL.
_ENDPOINTS = ("/models", *(path[len("/v1") :] for path in DIALECTS))


@functools.lru_cache(maxsize=64)  # 2 us
def lenient_path(path: str) -> str:
    """Return a path as the most lenient server would read it."""
    plain = urllib.parse.unquote(urllib.parse.unquote(path)).lower()
    return re.sub(r"[;?#\s\0][^/]*", "", plain.replace("\\", "/"))


def normal_path(path: str) -> str:
    """Return the canonical form of a path of the API, and any other path unchanged.

    Base URLs are pasted with an extra slash, without /v1, or with a second one.
    """
    if path in DIALECTS:  # nearly always
        return path
    # The upstream may accept more spellings: they share one dialect, and its limits.
    for plain in (lenient_path(path), path):
        plain = re.sub("/+", "/", plain).rstrip("/")
        plain = re.sub("^(/v1)+(?=/v1/)", "", plain)
        if plain in _ENDPOINTS or plain.startswith("/models/"):
            plain = f"/v1{plain}"
        if plain in DIALECTS:
            return plain
    return plain if plain.startswith("/v1/") else path


def refusal_error(status: int, content: bytes) -> APIError:
    """Return the error in an answer that refuses a request."""
    error = find_refusal(content) or ErrorObject()
    message = error.message or f"The upstream answered with status {status}."
    return APIError(
        status, message, type=error.type, param=error.param, code=error.code
    )


class Sent(enum.Enum):
    """How much of a reply has been written."""

    NOTHING = "nothing: any status is possible"
    HEAD = "the head, and perhaps some content: the status is fixed"
    ALL = "all of it: another byte would begin the next reply"


class Reply:
    """Writes the response to one request: whole, or as a stream."""

    sent = Sent.NOTHING
    status = 0  # 0 until its head is made
    close = False  # the connection closes after it
    limit: UsageLimit | None = None  # the user's, for x-ratelimit fields
    first_byte_at = 0.0  # when its head was made, on the loop's clock
    _head = b""  # not yet written
    _heartbeat: asyncio.TimerHandle | None = None
    _written_at = 0.0

    def __init__(
        self, connection: Connection, request: Request, fields: list[tuple[str, str]]
    ) -> None:
        self.connection = connection
        self.request = request
        self.fields = fields  # sent whatever the response
        # Bytes of the request's content to discard; unknown for chunks, and once a
        # decoder has taken some.
        length = request.content_length
        self.content_left: float = math.inf if length is None else length

    def _make_head(self, status: int, fields: list[tuple[str, str]]) -> bytes:
        if self.content_left > len(self.connection.buffer):
            self.close = True  # the rest of it would be taken for a request
        fields += self.fields
        now = unix_time()
        fields.append(("Date", http_date(int(now))))
        options = ["Upgrade"] if status == 426 else []  # RFC 9110 section 7.8
        if self.close:
            options.append("close")
        elif self.request.version == "HTTP/1.0" and not options:
            options.append("keep-alive")
        if options:
            fields.append(("Connection", ", ".join(options)))
        limit = b"" if self.limit is None else self.limit.fields(now)
        line = f"HTTP/1.1 {status} {REASONS.get(status, '')}"
        head = encode_head(line, fields, limit)
        self.sent = Sent.HEAD
        self.status = status
        self.first_byte_at = self.connection.loop.time()
        return head

    def send(self, status: int, content: bytes, fields: Fields = _JSON_FIELDS) -> None:
        """Send a whole response in one write."""
        head = [*fields]
        has_content = status not in (204, 304)
        if has_content:
            head.append(("Content-Length", str(len(content))))
        data = self._make_head(status, head)
        if has_content and self.request.method != "HEAD":
            data += content
        self.sent = Sent.ALL
        self.connection.write(data)

    def send_text(self, text: str, type: str = "text/plain", status: int = 200) -> None:
        """Send text with a content type."""
        self.send(status, text.encode("utf-8", "replace"), [("Content-Type", type)])

    def begin(self, status: int, fields: Mapping[str, str]) -> None:
        """Begin a stream; its head goes out with the first block."""
        head = [*fields.items()]
        if self.request.version == "HTTP/1.1":
            head.append(("Transfer-Encoding", "chunked"))
        else:
            self.close = True
        self._head = self._make_head(status, head)

    def write(self, block: bytes, last: bool = False) -> None:
        """Send a block of a stream in one write."""
        chunked = self.request.version == "HTTP/1.1"
        data, self._head = self._head, b""
        if block:
            data += encode_chunk(block) if chunked else block
        if last:
            self.sent = Sent.ALL
            if chunked:
                data += LAST_CHUNK
        self._written_at = self.connection.loop.time()
        self.connection.write(data)

    # --- Heartbeats

    def start_heartbeat(self) -> None:
        """Send a comment in every long silence from now on, or proxies hang up."""
        interval = self.connection.limits.heartbeat_interval
        if self._heartbeat is None and interval:
            loop = self.connection.loop
            self._written_at = loop.time()
            self._heartbeat = loop.call_later(interval, self._beat)

    def _beat(self) -> None:
        connection = self.connection
        now, interval = connection.loop.time(), connection.limits.heartbeat_interval
        if self.sent is Sent.ALL:
            return
        due = self._written_at + interval
        if now >= due:
            due = now + interval
            with contextlib.suppress(ConnectionError):
                if connection.writable:
                    if self.sent is Sent.NOTHING:
                        self.begin(200, _EVENT_FIELDS)
                    self.write(HEARTBEAT)
        self._heartbeat = connection.loop.call_at(due, self._beat)

    def stop_heartbeat(self) -> None:
        """Stop sending comments."""
        if self._heartbeat is not None:
            self._heartbeat.cancel()

    def switch_protocols(self) -> None:
        """Note that a 101 was sent: no reply and no other request can follow."""
        self.status = 101
        self.sent = Sent.ALL
        self.content_left = 0
        self.close = True


class Exchange:
    """One request and its outcome."""

    user: User | None = None  # set once authenticated
    allowed = ""  # the methods of its path
    model = ""  # as requested
    call: Call | None = None  # its way through the pool, from admission to end()
    cancelled: APIError | None = None  # why, unless the client hung up
    error = ("", "")  # what went wrong: a code, and a message that quotes nobody
    outcome = ""  # for the access line, where the status does not tell
    reserved = 0  # bytes of memory, for its content

    def __init__(
        self, server: Server, connection: Connection, request: Request
    ) -> None:
        path, self.token = request.path, ""
        while path.startswith("/k/"):  # for agents that can only set an endpoint
            self.token, slash, rest = path[3:].partition("/")
            path = slash + rest
        self.server = server
        self.connection = connection
        self.request = request
        self.path = path = normal_path(path)
        own_id = request.headers.get("x-request-id", "")
        usable = 0 < len(own_id) <= 128 and own_id.isascii() and own_id.isprintable()
        own_id = own_id if usable else random_id("req_")
        self.id = own_id.replace(" ", "_")  # one word, for the log
        self.time = unix_time()
        self.started = connection.loop.time()
        self._bytes_before = connection.bytes_sent
        fields = [("x-request-id", own_id)]
        if not path.startswith(_NO_CORS):
            fields.append(("Access-Control-Allow-Origin", "*"))
        self.reply = Reply(connection, request, fields)

    @property
    def query(self) -> dict[str, str]:
        """The query's parameters by name, without empty ones."""
        return dict(urllib.parse.parse_qsl(self.request.query))

    # --- Reading

    async def read_content(self, max_size: float) -> bytes:
        """Read the content; APIError(413, 503), ProtocolError, asyncio.TimeoutError."""
        connection, limits = self.connection, self.server.limits
        length = self.request.content_length
        coding = content_coding(self.request.headers)
        if length is not None:
            if length > max_size:
                raise APIError(413, f"The content is over {max_size:.0f} bytes.")
            if length <= len(connection.buffer) and not coding:
                content = bytes(connection.buffer[:length])
                del connection.buffer[:length]
                self.reply.content_left = 0
                self.reserve(length)
                return content
        self._continue()
        decoder = content_decoder(length, coding)
        self.reply.content_left = math.inf
        pieces = bytearray()
        began = connection.loop.time()
        deadline = self.started + limits.request_timeout
        while not decoder.complete:
            piece = await connection.read_content(
                decoder, limits.content_read_timeout, deadline
            )
            pieces += piece
            if len(pieces) > max_size:
                raise APIError(413, f"The content is over {max_size:.0f} bytes.")
            self.reserve(len(piece))  # as it arrives: an announced length is free
            seconds = connection.loop.time() - began
            slow = len(pieces) < seconds * limits.content_rate
            if slow and seconds > CONTENT_RATE_AFTER:
                raise asyncio.TimeoutError
        self.reply.content_left = 0
        return bytes(pieces)

    def _continue(self) -> None:
        """Send 100 Continue to a client that waits for it."""
        expect = self.request.headers.get("expect")
        if expect is None or self.request.version == "HTTP/1.0":
            return
        if expect.lower() != "100-continue":
            raise ProtocolError(417, "the only Expect supported is 100-continue")
        if not self.connection.buffer:
            self.connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    @property
    def user_id(self) -> str | None:
        """The user's id, or None.  A reload replaces all User objects."""
        return None if self.user is None else self.user.user_id

    @property
    def _content_share(self) -> float:
        """The user's share of total_content_size, in bytes.

        Half of it, or one user's slow uploads could shut out all others.
        """
        total = self.server.limits.total_content_size
        return total if self.user in (None, self.server.admin) else total / 2

    def reserve(self, size: int) -> None:
        """Reserve memory for content, or release it (negative size).  APIError(503)."""
        server = self.server
        total = server.content_size + size
        if size > 0 and total > (share := self._content_share):
            own = sum(e.reserved for e in server.exchanges if e.user_id == self.user_id)
            if own + size > share or total > server.limits.total_content_size:
                text = "Too much content is arriving at once; try again."
                raise APIError(503, text, retry_after=1)
        server.content_size = total
        self.reserved += size

    async def parse(self, parser: Callable[[bytes], T], content: bytes) -> T:
        """Parse content, in a thread if it is large: JSON takes 10 ms a MiB."""
        if len(content) <= PIECE_SIZE:
            return parser(content)
        # An upper bound once it is parsed: "[[[[]]]],..." takes 37 times its size.
        costs = ((b",", 40), (b'"', 25), (b"[", 75), (b"{", 160))  # bytes, measured
        size = sum(content.count(mark) * cost for mark, cost in costs)
        if size > self._content_share:
            raise APIError(413, "The request's JSON has too many values.")
        self.reserve(size)
        try:
            return await run_large(len(content), parser, content)
        finally:
            if len(content) > APIRequest.KEPT_SIZE:
                self.reserve(-size)

    # --- Controllers' answers

    async def answer(self, request: APIRequest) -> None:
        """Send a request through the pool, and its answer to the client."""
        headers = self.request.headers
        if headers.relayed is None:  # identical heads share a Headers
            headers.relayed = end_to_end(
                headers, _PRIVATE_REQUEST_FIELDS, _PRIVATE_REQUEST_PREFIXES
            )
        request.headers = dict(headers.relayed)
        # curl -d labels JSON as a form.
        if request.is_json or "content-type" not in request.headers:
            request.headers["content-type"] = "application/json"
        call = await self.relay(request)
        if call.content is None:
            return
        if self.reply.sent is not Sent.NOTHING:  # a heartbeat has fixed the status
            raise refusal_error(call.status, call.content)
        if call.status >= 400:
            self._note_error(refusal_error(call.status, call.content))
        self.reply.send(call.status, call.content, self._relayed_fields(call).items())

    async def relay(self, request: APIRequest) -> Call:
        """Send a request through the pool; return its call once it has ended.

        A stream is sent on as it arrives.  A whole answer is in call.content, for
        the caller to send.
        """
        assert self.user is not None
        server, connection, user = self.server, self.connection, self.user
        self.model = (request.model or "").partition("?")[0]  # mocks take parameters
        if user.models is not None:
            await self._check_model(request, user)
        self.reply.limit = server.limit_of(user)
        server.begin_request(self, user)
        self.call = call = server.pool.call(request)
        request.user = user.user_id
        request.id = self.id
        request.deadline = self.started + server.limits.request_timeout
        connection.eof_is_hangup = True  # do not pay for an answer that nobody reads
        if connection.eof:
            raise ConnectionResetError("the client disconnected")
        if request.stream and request.dialect.generates:  # else it may be audio
            request.on_asked = self.reply.start_heartbeat
        try:
            async with call:
                if call.content is None:
                    await self._relay_stream(call)
                    connection.eof_is_hangup = False  # all is sent
        except asyncio.CancelledError:
            if self.cancelled is None or connection.closing:
                raise
            raise self.cancelled from None
        return call

    async def _check_model(self, request: APIRequest, user: User) -> None:
        """Raise APIError(404) for a model that the user may not use, as if unknown."""
        content = request.content
        if request.is_json and await run_large(len(content), names_two_models, content):
            raise APIError(400, "'model' appears twice.", param="model")
        request.may_use = user.may_use
        if request.model is None and request.ask is None:
            raise APIError(400, "'model' is missing.", param="model")
        named = urllib.parse.parse_qs(request.query).get("model", [])
        named += [] if request.model is None else [request.model]
        # In LiteLLM and Azure these paths name a model, which wins.
        by_path = re.search("/(engines|deployments)/", lenient_path(request.path))
        for model in (*named, *request.fallbacks):
            if by_path or not isinstance(model, str) or not user.may_use(model):
                raise self.server.pool.unknown_model(request)

    async def _relay_stream(self, call: Call) -> None:
        connection, reply = self.connection, self.reply
        if call.stream is not None:
            reply.start_heartbeat()
        while not call.ended:
            block = await call.read()
            if reply.sent is Sent.NOTHING:
                kind = {} if call.is_raw else _EVENT_FIELDS
                reply.begin(call.status, {**self._relayed_fields(call), **kind})
            reply.write(block, last=call.ended)
            if not connection.writable:
                late = APIError(504, "The client reads the answer too slowly.")
                with time_limit(call.request.deadline, late):  # it holds a slot
                    await connection.drain()

    def _relayed_fields(self, call: Call) -> dict[str, str]:
        """Return the fields of an answer that are forwarded to the client."""
        limited = self.reply.limit is not None  # then the x-ratelimit fields are ours
        prefixes = _LIMITED_PREFIXES if limited else _PRIVATE_RESPONSE_PREFIXES
        fields = end_to_end(call.headers, _PRIVATE_RESPONSE_FIELDS, prefixes)
        # A form of another site can post to /k/<token>: no HTML of an agent's may run
        # here, where the page keeps the API key.
        fields["x-content-type-options"] = "nosniff"
        if call.stream is None and fields.get("content-type") != JSON_TYPE:
            fields["content-security-policy"] = "sandbox"
        return fields

    def cancel(self, why: APIError) -> None:
        """End the request as if the client had hung up, but tell the client why."""
        if self.reply.sent is Sent.ALL and self.connection.writable:
            return  # only the upstream's end is still awaited: this is no failure
        if self.connection.on_hangup is not None and self.cancelled is None:
            self.cancelled = why
            self.connection.on_hangup()

    # --- Errors

    def fail(self, error: APIError) -> None:
        """Answer with an error: as a status, or as the last event of a stream."""
        self._note_error(error)
        error.with_traceback(None)  # as in Call._explain()
        reply, call = self.reply, self.call
        if reply.sent is Sent.NOTHING:
            self.send_error(error)
            return
        # Close without the last chunk: a client that does not know the event still
        # sees that the stream is incomplete.
        reply.close = True
        self.outcome, last = "broken off", b""
        if call is not None and not call.is_raw and reply.sent is Sent.HEAD:
            last = call.request.dialect.late_error(error, call.stream)
            if last and not self.connection.closing:
                reply.write(last)
        if not last and self.request.version == "HTTP/1.0":
            self.connection.reset()  # there, a plain end is that of a whole answer
        self.connection.close()

    def send_error(self, error: APIError) -> None:
        """Send an error in the shape that clients of its path expect."""
        status, passed = error.status, error.upstream_status or 0
        if self.server.upstream_errors == "pass" and (passed == 429 or passed >= 500):
            status = passed
        fields = [*_JSON_FIELDS, *_ERROR_FIELDS.get(status, ())]
        seconds = error.retry_after
        if seconds is not None and seconds <= 30:
            fields.append(("Retry-After", str(max(1, math.ceil(seconds)))))
        elif seconds is not None:
            fields.append(("x-should-retry", "false"))
        if status == 405:
            fields.append(("Allow", self.allowed))
        if self.path.startswith("/v1") or self.path.endswith(_ENDPOINTS):
            content = dialect_of(self.path).error_content(error)
        else:
            content = encode_json({"error": error.message})
        self.reply.send(status, content, fields)

    def _note_error(self, error: APIError) -> None:
        """Note for the journal what went wrong, in our own words only."""
        text = f"status {error.status}"
        if self.call is None or not self.call.tries:
            text = error.message[:200]
        elif isinstance(error, ControllerError):
            text = error.reason
        code = ErrorObject(type=error.type, code=error.code).summary
        self.error = (code, text)

    # --- The end

    def end(self) -> None:
        """Release its resources, write the access line and record the request."""
        server, call = self.server, self.call
        if self.cancelled is not None:
            task = asyncio.current_task(self.connection.loop)
            if task is not None and hasattr(task, "uncancel"):
                task.uncancel()  # or the connection's next time limits would not hold
        self.connection.eof_is_hangup = False
        self.reply.stop_heartbeat()
        self.reserve(-self.reserved)
        if call is not None and self.user is not None:
            server.end_request(self, self.user)
        if self.reply.status != 101:  # a websocket's was written with the 101
            self.log()
        if self.request.method == "POST" and self.path.startswith(("/v1/", "/api/ask")):
            record = self.record(self.connection.loop.time())
            server.count(record, None if call is None else self.user)
        self.call = None  # or its content would live as long as the connection

    async def drain(self) -> None:
        """Wait for a slow client; what it has not read counts as its user's content.

        Once the user's other answers take up the share, it is cut off: they would shut
        out everybody.
        """
        same = [e for e in self.server.exchanges if e.user_id == self.user_id]
        unread = sum(e.reserved for e in same if e.reply.sent is Sent.ALL)
        if unread > self._content_share:
            who = self.user_name
            self.server.report(f"disconnected a client of {who}: it reads too slowly")
            self.connection.reset()
        self.reserved = self.connection.unsent if self.user is not None else 0
        self.server.content_size += self.reserved
        try:
            if self.reply.close:
                await self.connection.flush()
            else:
                await self.connection.drain()
        finally:
            self.reserve(-self.reserved)

    @property
    def user_name(self) -> str:
        """The user's name in the log and the journal; "" if unknown."""
        return "" if self.user is None else self.user.name or self.user.user_id

    def log(self) -> None:
        """Write the access line: time, user, request, result, controller, duration."""
        access = self.server.access
        if access is None or self.path in ("/livez", "/readyz"):  # frequent probes
            return
        reply, connection, call = self.reply, self.connection, self.call
        now = connection.loop.time()
        controller, attempts = "", 0
        if call is not None and call.controller is not None:
            controller, attempts = call.controller.name, len(call.tries)
        first = (reply.first_byte_at or now) - self.started
        words = access_words(
            self.user_name[:80],
            self.request.method,
            self.path,
            reply.status or 499,  # as nginx: the client closed the request
            self.model[:80],
            controller[:80],
        )
        access(
            f"{clock_text(int(unix_time()))} {words} x{attempts} {first * 1e3:.1f}"
            f" {(now - self.started) * 1e3:.1f} ms"
            f" {connection.bytes_sent - self._bytes_before} B"
            f" {connection.peer or '-'} {self.id}"
            f"{f' {self.outcome}' if self.outcome else ''}"
        )

    def record(self, ended_at: float | None = None) -> RequestRecord:
        """Return the request's entry in the journal."""
        call = self.call
        left = self.outcome == "client left"
        return RequestRecord(
            self.id,
            self.time,
            self.started,
            ended_at,
            self.user_name,
            self.request.method,
            self.path,
            self.model,
            499 if left else self.reply.status,
            self.error,
            self.error != ("", "") and not left and ended_at is not None,
            [] if call is None else call.tries,
            0.0 if call is None else call.began_at,
            Usage() if call is None else call.usage,
            self.connection.peer,
            self.request.headers.get("user-agent", "")[:80],
        )


# -----------------------------------------------------------------------------
# Routes: access rules and handlers
# -----------------------------------------------------------------------------
#
# A route is a function that takes an Exchange.  It sends a response, or returns JSON
# to send; RequestHandler answers what it raises.  The table at the end says who may
# use a route and what is read before it runs.

# Seconds for an agent's first message; then its websocket is closed.
FIRST_MESSAGE_TIMEOUT = 10.0

_KEY_FIELDS = ("x-api-key", "api-key", "x-goog-api-key")  # beside Authorization
_FORWARDING_FIELDS = ("forwarded", "x-forwarded-for", "x-real-ip", "via")
# Where the original browser agents run.  No other web page may become an agent.
_AGENT_ORIGINS = ("https://chat.openai.com", "https://chatgpt.com")
_AGENT_ORIGIN_SCHEMES = ("moz-extension://", "chrome-extension://")
# The original's quickstart, pasted verbatim, sends "<optional>".
_ABSENT = (None, "", "<optional>")

_ABOUT = """chatgpt_apiserver {version}

An OpenAI-compatible API in front of upstreams, agents and Python functions.

  Base URL for clients   {scheme}://{host}/v1   (Authorization: Bearer <token>)
  Agents connect to      {ws}://{host}/client/register
  Be an agent            curl -fsS {scheme}://{host}/agent.py \\
                           | python3 - agent {scheme}://{host} --key TOKEN
  Ask in one line        POST {scheme}://{host}/api/ask   {{"content": "Hello"}}
"""


# --- Access


class Access(enum.Enum):
    """Who may use a route; see authorize()."""

    ANYBODY = "no key is needed"
    USER = "the API key, or a user's token"
    AGENT = "an agent's token, the API key, or no key from this machine"
    LOCAL = "the API key, or no key from this machine"
    MONITOR = "the API key, or a monitor's token"
    ADMIN = "the API key, also as admin_key in the query or the content"


# Why a token is refused, by its role.
_REFUSALS = {
    "user": "A user's token can only use /v1 and /api/ask.",
    "agent": "An agent's token can only register an agent.",
    "monitor": "A monitor's token can only read /metrics.",
}


def authorize(exchange: Exchange, access: Access, body: JSONObject) -> None:
    """Check that a request may use a route, and set exchange.user.

    Raise APIError: 401 for a missing, wrong or expired key, 403 for a valid one that
    may not use the route.
    """
    if access is Access.ANYBODY:
        return
    server = exchange.server
    tokens = credentials(exchange)
    if access is Access.ADMIN:
        key = body.pop("admin_key", exchange.query.get("admin_key"))
        tokens = [key] if isinstance(key, str) else tokens
    if not tokens:
        admit_keyless(exchange, access)
        return
    user, now = None, unix_time()
    for token in tokens:
        found = server.authenticate(token)
        user = user or found  # an expired one, unless another is valid
        if found is not None and now < found.expires:
            user = found
            break
    if user is None:
        name = "admin" if access is Access.ADMIN else "API"
        raise APIError(401, f"Invalid {name} key", code="invalid_api_key")
    exchange.user = user
    if user is not server.admin:
        if user.role != access.name.lower():
            raise APIError(403, _REFUSALS[user.role])
        if now >= user.expires:
            text = f"This token expired at {rfc3339(user.expires)}; ask for another."
            raise APIError(401, text, code="expired")


def credentials(exchange: Exchange) -> list[str]:
    """Return the tokens of a request, in the order in which they are tried.

    Some are not for us: a client may add its own OAuth token, or a proxy's password.
    """
    headers = exchange.request.headers
    value = headers.get("authorization", "")
    scheme, _, token = value.partition(" ")
    tokens = [token.strip() if scheme.lower() == "bearer" else value]
    tokens += [headers[name] for name in _KEY_FIELDS if name in headers]
    return [token for token in (*tokens, exchange.token) if token]


def admit_keyless(exchange: Exchange, access: Access) -> None:
    """Admit a request without a key where that is allowed; APIError(401, 403)."""
    name = "Admin" if access is Access.ADMIN else "API"
    missing = APIError(401, f"{name} key not provided", code="invalid_api_key")
    if access not in (Access.AGENT, Access.LOCAL):
        raise missing
    server, peer = exchange.server, exchange.connection.peer
    auth = server.agents_auth
    if access is Access.AGENT and auth == "open":
        return
    reason = not_local(exchange.request, peer)
    if not reason and auth == "key":
        reason = "every agent needs a key here"
    if not reason:
        return
    if access is Access.LOCAL:
        raise missing
    server.report(
        f"an agent from {peer} was refused: it has no key, and {reason}."
        " To let it in, set its endpoint to host:port/k/<token>"
    )
    status = 403 if auth == "local" else 401
    raise APIError(status, f"An agent without a key is refused: {reason}.")


def not_local(request: Request, peer: str) -> str:
    """Return why a request is not from this machine's own user, "" if it is."""
    headers = request.headers
    if not is_loopback(peer):
        return "it comes from another machine"
    if request.version == "HTTP/1.0":  # nginx's default, without a forwarding field
        return "it came in HTTP/1.0, as from a proxy"
    if any(name in headers for name in _FORWARDING_FIELDS):
        return "it was forwarded by a proxy"
    host = headers.get("host", "")
    if not is_loopback(re.sub(r":[0-9]*$", "", host)):
        return "its Host header names another machine"  # DNS rebinding
    origin = headers.get("origin")
    # Python's websocket-client sends the server's own origin.  So does our page, but
    # it runs only its own script (Content-Security-Policy).
    good = (*_AGENT_ORIGINS, f"http://{host}", f"https://{host}")
    if origin is None or origin in good or origin.startswith(_AGENT_ORIGIN_SCHEMES):
        return ""
    return f"it comes from a web page ({_word(origin)})"


def is_loopback(address: str) -> bool:
    """Whether an address or a name (in a Host field, without port) is this machine."""
    host = address.strip("[]").lower()
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    mapped = getattr(ip, "ipv4_mapped", None)  # ::ffff:127.0.0.1
    return (mapped or ip).is_loopback


# --- For clients: the API


async def do_chat_completions(exchange: Exchange, content: bytes) -> None:
    """POST /v1/chat/completions, streamed or whole."""
    request = await exchange.parse(parse_chat_request, content)
    request.query = exchange.request.query
    await exchange.answer(request)


async def do_api(exchange: Exchange, content: bytes) -> None:
    """POST /v1/...: passed through to a controller that has the model."""
    content_type = exchange.request.headers.get("content-type", "")
    path, query = exchange.path, exchange.request.query
    if content_type.lower().startswith("multipart/form-data"):
        request = APIRequest(path, content, query=query, form=content_type)
    else:
        body = await exchange.parse(parse_object, content)
        request = APIRequest(path, content, query=query, body=body)
    if request.model is None and exchange.server.pool.needs_model(request):
        raise APIError(400, "'model' is missing.", param="model")
    await exchange.answer(request)


async def do_models(exchange: Exchange) -> JSONObject:
    """GET /v1/models: the controllers' models, in the client's dialect."""
    models = list_models(exchange)
    more = {}
    if "anthropic-version" in exchange.request.headers:
        ids: list[str | None] = [*models] or [None]
        more = {"has_more": False, "first_id": ids[0], "last_id": ids[-1]}
    return {"object": "list", "data": [*models.values()], **more}


def list_models(exchange: Exchange) -> dict[str, JSONObject]:
    """Return the models that the user may use, by name."""
    assert exchange.user is not None
    owners: dict[str, str] = {}
    for controller in exchange.server.pool.reachable:
        for name in controller.known_models():
            if exchange.user.may_use(name):
                owners.setdefault(name, controller.type)
    if "anthropic-version" in exchange.request.headers:
        like = {"type": "model", "created_at": "1970-01-01T00:00:00Z"}
        return {name: {**like, "id": name, "display_name": name} for name in owners}
    plain: JSONObject = {"object": "model", "created": 0}
    return {name: {"id": name, **plain, "owned_by": owners[name]} for name in owners}


async def do_model(exchange: Exchange) -> JSONObject:
    """GET /v1/models/{id}."""
    id = urllib.parse.unquote(exchange.path[len("/v1/models/") :])
    model = list_models(exchange).get(id)
    if model is None:
        raise APIError(404, f"The model {id!r} does not exist.", code="model_not_found")
    return model


# --- For clients: the ask API


async def do_ask(exchange: Exchange, body: JSONObject) -> JSONObject:
    """POST /api/ask: answer one question, perhaps within a conversation."""
    assert exchange.user is not None
    question = body.get("content")
    if not isinstance(question, str) or not question:
        raise APIError(400, "'content' must be a non-empty string.")
    conversation_id = optional_string(body, "conversation_id")
    parent_id = optional_string(body, "parent_id")
    if bool(conversation_id) != bool(parent_id):
        raise APIError(
            400,
            "conversation_id and parent_id go together: send the conversation_id"
            " and the response_id of the answer to continue from.",
        )
    model = optional_string(body, "model")
    conversation, messages = None, []
    if conversation_id:
        kept = exchange.server.conversations
        conversation = kept.find(exchange.user.user_id, conversation_id)
        if conversation is None:
            raise APIError(404, "Conversation doesn't exist")
        messages = conversation.messages(parent_id)
    size = sum(200 + len(message["content"]) for message in messages)
    if size > exchange.server.limits.content_size:
        raise APIError(413, "The conversation is too long; begin a new one.")
    exchange.reserve(size)
    chat: JSONObject = {
        "messages": [*messages, {"role": "user", "content": question}],
        **({"model": model} if model else {}),
    }
    content = await run_large(size, encode_json, chat)
    exchange.reserve(len(content) - size)
    headers = {"content-type": "application/json"}
    request = APIRequest(CHAT_PATH, content, body=chat, headers=headers)
    request.ask = (question, conversation_id, parent_id)
    if conversation is not None:
        request.agent_id = conversation.agent_id
    call = await exchange.relay(request)
    if call.status >= 300:
        raise refusal_error(call.status, call.content or b"")
    return keep_answer(exchange, conversation, call)


def string_field(body: JSONObject, name: str) -> str:
    """Return a required string; APIError(400)."""
    value = body.get(name)
    if not isinstance(value, str):
        problem = "must be a string" if name in body else "is missing"
        raise APIError(400, f"'{name}' {problem}.")
    return value


def optional_string(body: JSONObject, name: str) -> str:
    """Return an optional string, "" if it is absent; APIError(400)."""
    return "" if body.get(name) in _ABSENT else string_field(body, name)


def keep_answer(
    exchange: Exchange, conversation: Conversation | None, call: Call
) -> JSONObject:
    """Keep the conversation for the next question; return the ask API's answer."""
    assert exchange.user and call.controller and call.request.ask
    kept, user_id = exchange.server.conversations, exchange.user.user_id
    question, conversation_id, parent_id = call.request.ask
    answer = as_object(read_json(call.content or b""))
    agent_id = call.controller.id if call.controller.keeps_conversations else ""
    try:
        text = content_text(answer["choices"][0]["message"]["content"])
    except (LookupError, TypeError):
        raise APIError(500, "The answer is not a chat.completion.") from None
    if agent_id and (conversation is None or conversation.agent_id is not None):
        response_id = answer["response_id"]  # the agent keeps the conversation
        conversation_id = answer["conversation_id"]
        if 0 < len(conversation_id) <= 200:  # a long one would fill the memory
            kept.add(user_id, conversation_id, agent_id)
    else:
        response_id = str(uuid.uuid4())
        conversation_id = conversation_id or str(uuid.uuid4())
        kept.add(user_id, conversation_id, None, response_id, parent_id, question, text)
    return {
        "id": "",
        "response_id": response_id,
        "conversation_id": conversation_id,
        "content": text,
        "error": "",
    }


# --- For agents


async def do_register(exchange: Exchange) -> None:
    """GET /client/register: an agent dials in and stays."""
    server, connection, user = exchange.server, exchange.connection, exchange.user
    credential = "anybody" if server.agents_auth == "open" else "this machine"
    if user is not None:
        credential = f"token of {user.user_id}"
    if len(server.agents) >= server.limits.agents:
        raise APIError(503, "There are too many agents.", retry_after=30)
    if server.draining:
        raise APIError(503, "The server is shutting down.", retry_after=5)
    fields = [(SERVER_ID_FIELD, server.id)]
    websocket = WebSocket.accept(connection, exchange.request, fields)
    exchange.reply.switch_protocols()
    exchange.log()
    id = str(uuid.uuid4())
    websocket.write(envelope(id, "Connection id"))
    first = await first_message(websocket)
    if first is None:
        return
    claimed_id, hello = first
    # Version 1 sends nothing here; unparsable data counts as nothing.
    about = as_object(read_json(hello))
    about = about if about.get("version") == 2 else {}
    kind = AgentController if about else TextAgent
    agent = kind(id, websocket, credential, about)
    agent.user = user
    agent.authorize = functools.partial(authorize, exchange, Access.AGENT, {})
    agent.debug = server.debug
    agent.on_drain = server.pool.remove
    server.register(agent, claimed_id)
    del first, claimed_id, hello, about  # may be large, and the agent stays
    server.report(f"agent {agent.name} joined from {connection.peer}")
    try:
        await agent.serve()
    finally:
        server.unregister(agent)
        how = f"{websocket.close_code} {_plain(websocket.close_reason)}".strip()
        server.report(f"agent {agent.name} left ({how})")


async def first_message(websocket: WebSocket) -> tuple[str, str] | None:
    """Return the id and the data of the peer's first message; None if none came."""
    loop = websocket.connection.loop
    timer = loop.call_later(FIRST_MESSAGE_TIMEOUT, websocket.close, 1008, "no id")
    try:
        while True:
            message = await websocket.receive()
            if message is None or websocket.closing:
                return None
            own_id, kind, data = open_envelope(message)
            if kind == "Connection id":
                return own_id, data
    finally:
        timer.cancel()


async def do_connections(exchange: Exchange) -> JSONObject:
    """GET /api/connections: the agents, as the original listed them."""
    connections = []
    for agent in exchange.server.agents.values():
        asked = rfc3339(agent.asked_at) if agent.asked_at else "0001-01-01T00:00:00Z"
        line = {"Ws": {}, "Id": agent.id, "Heartbeat": rfc3339(agent.heard_at)}
        connections.append({**line, "LastMessageTime": asked})
    return {"connections": connections}


# --- For the administrator


async def do_users(exchange: Exchange) -> None:
    """GET /admin/users; with ?from=0&count=100 some of them, and the total."""
    users, query = exchange.server.users.users, exchange.query
    lines, more = [], b""
    if "count" in query:
        first, count = query.get("from", "0"), query["count"]
        if not (count + first).isdecimal():
            raise APIError(400, "'from' and 'count' must be numbers.")
        more = b', "total": %d' % len(users)
        for user in users[int(first[:9]) :][: int(count[:9])]:  # for the page
            fields = json.loads(user.public_json())
            fields.pop("token", None)
            fields["limits"] = limits_left(exchange.server, user)
            lines.append(encode_json(fields))
    else:
        lines = [user.public_json() for user in users]
    exchange.reply.send(200, b'{"users": [' + b", ".join(lines) + b"]" + more + b"}")


def limits_left(server: Server, user: User) -> list[JSONObject]:
    """Return what a user has used of each limit, and when it resets."""
    limit = server.limit_of(user)
    return [
        {
            "limit": str(quota),
            "used": used,
            "maximum": quota.amount,
            "left": max(0, quota.amount - used),
            "reset": rfc3339(end),
        }
        for quota, used, end in (limit.state() if limit is not None else ())
    ]


async def do_users_add(exchange: Exchange, body: JSONObject) -> JSONObject:
    """POST /admin/users/add: answered when it is on disk."""
    user = await exchange.server.users.add(**body)
    exchange.server.report(f"user {user.label} added")
    return {"user_id": user.user_id, "token": user.token}


async def do_users_update(exchange: Exchange, body: JSONObject) -> JSONObject:
    """POST /admin/users/update: new settings or a new token."""
    user_id = string_field(body, "user_id")
    del body["user_id"]
    user = await exchange.server.users.update(user_id, body)
    exchange.server.dismiss_agents()
    exchange.server.report(f"user {user.label} changed")
    token = {"token": user.token} if user.token else {}
    return {"user_id": user.user_id, **token}


async def do_users_delete(exchange: Exchange, body: JSONObject) -> JSONObject:
    """POST /admin/users/delete: once answered, the token no longer works."""
    server, user_id = exchange.server, string_field(body, "user_id")
    await server.users.delete(user_id)
    server.dismiss_agents()
    server.report(f"user {user_id} deleted")
    return {"message": "User deleted"}


async def do_admin_status(exchange: Exchange) -> None:
    """GET /admin/status: what the page shows, for scripts too.

    One snapshot a second serves everybody, with an ETag.  Times are Unix seconds; but
    in a request all except "time" are seconds since it arrived:

    {"version", "started", "draining", "in_flight", "waiting",
     "agent_sha256": of /agent.py, or null,
     "activity": {"requests": [60 numbers], "failures": [...], "tokens": [...]},
         in slots of ten seconds, oldest first
     "controllers": [as in /admin/controllers, and {"id",
         "max_concurrency", "first_byte": median in seconds, or null,
         "user": whose token an agent used}],
     "requests": [{"request_id", "time", "user", "method", "path", "model",
         "controller": the one that answered, or "",
         "attempts": [{"controller", "asked", "reason": why it failed, or ""}],
         "first_byte": when the answer began, or null,
         "duration", "status": null while it runs,
         "failed": bool, "code", "error": why, or "",
         "input", "cached_input", "output": tokens,
         "address", "client": its User-Agent}],
         those running and the last 200, latest first}
    """
    content, etag = exchange.server.status(exchange.connection.loop.time())
    # The page itself keeps the ETag; a browser need not store anything.
    fields = [*_JSON_FIELDS, ("ETag", etag), ("Cache-Control", "no-store")]
    known = etag in exchange.request.headers.get("if-none-match", "")  # perhaps W/
    exchange.reply.send(304 if known else 200, content, fields)


async def do_cancel(exchange: Exchange, body: JSONObject) -> JSONObject:
    """POST /admin/requests/cancel: the client gets an error, the controller stops."""
    running = exchange.server.running_requests
    id = string_field(body, "request_id").replace(" ", "_")  # as Exchange has it
    found = [each for each in running if each.id == id]  # clients may reuse an id
    if not found:
        raise APIError(404, "Request not found")
    text = "The server's administrator cancelled this request."
    for each in found:
        each.cancel(APIError(503, text, code="cancelled", retry_after=math.inf))
    return {"message": "Request cancelled"}


async def do_controllers(exchange: Exchange) -> JSONObject:
    """GET /admin/controllers: state and counts; never a key."""
    now = exchange.connection.loop.time()
    controllers = exchange.server.pool.controllers
    return {"controllers": [c.describe(now) for c in controllers]}


async def do_switch(exchange: Exchange, body: JSONObject) -> JSONObject:
    """POST /admin/controllers/enable: it gets requests again at once.

    POST /admin/controllers/disable: it gets none until it is enabled.  An agent is
    paused: it is notified, and stays paused when it reconnects.
    """
    off = exchange.path == "/admin/controllers/disable"
    controller = exchange.server.pool.find(string_field(body, "name"))
    if controller is None:
        raise APIError(404, "Controller not found")
    controller.switched_off = off
    exchange.server.pause(controller.id, off)
    if not off:
        controller.health.reset()
        if controller.limit is not None and controller.limit.exceeded():
            controller.limit.reset()
    return {"message": f"Controller {'disabled' if off else 'enabled'}"}


async def do_agents_pause(exchange: Exchange, body: JSONObject) -> JSONObject:
    """POST /admin/agents/pause {"id", "paused"}: it stays connected, but idle.

    "id" may be its name, too.  "paused" is true by default; false ends the pause.
    """
    id, paused = body.get("id"), body.get("paused", True)
    if not isinstance(id, str) or not isinstance(paused, bool):
        raise APIError(400, "Expected an agent's 'id', and 'paused', true or false.")
    server = exchange.server
    named = server.pool.find(id)
    if not server.pause(id, paused) and not (named and server.pause(named.id, paused)):
        raise APIError(404, "Agent not found")
    return {"message": "Agent paused" if paused else "Agent resumed"}


async def do_usage(exchange: Exchange) -> JSONObject | None:
    """GET /admin/usage?from=&to=&by=day,user,model: sums, as JSON or CSV.

    GET /v1/usage: the user's own sums, and what is left of the limits.
    """
    user = None if exchange.path == "/admin/usage" else exchange.user
    query = exchange.query
    by = query.get("by", "day,user,model").split(",")
    days = query.get("from", ""), query.get("to", "9999")
    if not set(by) <= set(COLUMNS) or len(set(by)) < len(by):
        raise APIError(400, f"'by' must be one or more of {', '.join(COLUMNS)}.")
    for day in days:
        if day not in ("", "9999") and not re.fullmatch(r"\d{4}-\d\d-\d\d", day):
            raise APIError(400, "'from' and 'to' must be days such as 2026-11-01.")
    own = None if user is None else user.user_id or user.name
    report = exchange.server.ledger.report(by, *days, own)
    if query.get("format", "json") not in ("csv", "json"):
        raise APIError(400, "'format' must be csv or json.")
    accept = exchange.request.headers.get("accept", "")
    if query.get("format") == "csv" or "text/csv" in accept:
        content = usage_csv([*by, *COUNTS], report["data"])
        exchange.reply.send_text(content, "text/csv; charset=utf-8")
        return None
    if user is not None:
        report["limits"] = limits_left(exchange.server, user)
    return report


def usage_csv(columns: list[str], rows: list[JSONObject]) -> str:
    """Return rows as CSV (RFC 4180).

    A quote goes in front of "=" and its like, or a spreadsheet would run a formula.
    """
    import csv
    import io

    def plain(value: Any) -> str:
        text = str(value)
        return f"'{text}" if text[:1] in tuple("=+-@\t\r") else text

    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(columns)
    writer.writerows([plain(row[column]) for column in columns] for row in rows)
    return file.getvalue()


# --- For monitors and everybody


async def do_status(exchange: Exchange) -> JSONObject:
    """GET /status."""
    return {"status": "ok"}


async def do_health(exchange: Exchange) -> None:
    """GET /health."""
    exchange.reply.send_text("OK")


async def do_ready(exchange: Exchange) -> None:
    """GET /readyz: whether requests should be sent here; cooling does not matter."""
    server = exchange.server
    controllers = [c for c in server.pool.controllers if not c.by_name_only]
    reason = "shutting down\n" if server.draining else ""
    if not reason and all(c.switched_off or c.paused for c in controllers):
        reason = "no controller is available\n"
    exchange.reply.send_text(reason or "OK", status=503 if reason else 200)


async def do_metrics(exchange: Exchange) -> None:
    """GET /metrics, for Prometheus."""
    text = exchange.server.metrics.text(exchange.server.gauges())
    exchange.reply.send_text(text, "text/plain; version=0.0.4; charset=utf-8")


async def do_about(exchange: Exchange) -> None:
    """GET /: what this is, without data; for a browser, the page."""
    headers, connection = exchange.request.headers, exchange.connection
    if exchange.server.page and "text/html" in headers.get("accept", ""):
        exchange.reply.send(200, PAGE.encode(), PAGE_FIELDS)
        return
    scheme = "https" if connection.tls else "http"
    host = headers.get("host", "localhost")
    if is_loopback(connection.peer):  # a proxy on this machine; for display only
        scheme = headers.get("x-forwarded-proto", scheme)
        host = headers.get("x-forwarded-host", host)
    ws = scheme.replace("http", "ws")
    text = _ABOUT.format(version=__version__, scheme=scheme, ws=ws, host=host)
    fields = [("Content-Type", "text/plain; charset=utf-8"), ("Vary", "Accept")]
    exchange.reply.send(200, text.encode("utf-8", "replace"), fields)


@functools.lru_cache(maxsize=1)
def own_source() -> tuple[bytes, str]:
    """Return this file's bytes and their SHA-256, both empty if it cannot be read."""
    try:
        with open(__file__, "rb") as file:
            source = file.read()
    except (NameError, OSError):
        return b"", ""
    return source, hashlib.sha256(source).hexdigest()


async def do_source(exchange: Exchange) -> None:
    """GET /agent.py: the running program itself; it holds no secret."""
    source, _ = own_source()
    if not source:
        raise APIError(404, "The source is not available: it was piped into Python.")
    reply, fields = exchange.reply, {"Content-Type": "text/x-python"}
    if exchange.request.method == "HEAD":
        reply.send(200, source, fields.items())
        return
    reply.begin(200, fields)
    for end in range(PIECE_SIZE, len(source) + PIECE_SIZE, PIECE_SIZE):
        reply.write(source[end - PIECE_SIZE : end], last=end >= len(source))
        if not exchange.connection.writable:  # a stranger may never read it
            await exchange.connection.drain()


def do_preflight(exchange: Exchange) -> None:
    """OPTIONS: pages of any origin may send any header fields (CORS)."""
    fields = [("Allow", exchange.allowed)]
    if not exchange.path.startswith(_NO_CORS):
        headers = exchange.request.headers
        wanted = headers.get("access-control-request-headers", "*")
        fields += [
            ("Access-Control-Allow-Methods", exchange.allowed),
            ("Access-Control-Allow-Headers", wanted),
            ("Access-Control-Max-Age", "86400"),
        ]
    exchange.reply.send(204, b"", fields)


# --- The table


async def read_body(exchange: Exchange, max_size: float) -> JSONObject:
    """Read a request's JSON object, {} if there is no content."""
    content = await exchange.read_content(max_size)
    return parse_object(content) if content.strip() else {}


class Route(NamedTuple):
    """A route, and what is checked and read before it runs.

    method  HTTP method; GET serves HEAD too
    access  who may use it
    answer  sends the response, or returns the JSON to send
    reads   reads the request's content, raw or parsed; None: it takes none
    limit   name of the limit on the content's size
    """

    method: str
    access: Access
    answer: Callable[..., Coroutine[Any, Any, JSONObject | None]]
    reads: Callable[[Exchange, float], Coroutine[Any, Any, Any]] | None = None
    limit: str = "admin_content_size"


# By path; /v1/ and /v1/models/ stand for all paths below them.
ROUTES = {
    "/": Route("GET", Access.ANYBODY, do_about),
    "/agent.py": Route("GET", Access.ANYBODY, do_source),
    "/health": Route("GET", Access.ANYBODY, do_health),
    "/status": Route("GET", Access.ANYBODY, do_status),
    "/livez": Route("GET", Access.ANYBODY, do_health),
    "/readyz": Route("GET", Access.ANYBODY, do_ready),
    "/metrics": Route("GET", Access.MONITOR, do_metrics),
    "/client/register": Route("GET", Access.AGENT, do_register),
    "/api/connections": Route("GET", Access.LOCAL, do_connections),
    "/api/ask": Route("POST", Access.USER, do_ask, read_body, "ask_content_size"),
    "/admin/users": Route("GET", Access.ADMIN, do_users),
    "/admin/users/add": Route("POST", Access.ADMIN, do_users_add, read_body),
    "/admin/users/update": Route("POST", Access.ADMIN, do_users_update, read_body),
    "/admin/users/delete": Route("POST", Access.ADMIN, do_users_delete, read_body),
    "/admin/usage": Route("GET", Access.ADMIN, do_usage),
    "/admin/status": Route("GET", Access.ADMIN, do_admin_status),
    "/admin/requests/cancel": Route("POST", Access.ADMIN, do_cancel, read_body),
    "/admin/controllers": Route("GET", Access.ADMIN, do_controllers),
    "/admin/controllers/enable": Route("POST", Access.ADMIN, do_switch, read_body),
    "/admin/controllers/disable": Route("POST", Access.ADMIN, do_switch, read_body),
    "/admin/agents/pause": Route("POST", Access.ADMIN, do_agents_pause, read_body),
    "/v1/chat/completions": Route(
        "POST", Access.USER, do_chat_completions, Exchange.read_content, "content_size"
    ),
    "/v1/usage": Route("GET", Access.USER, do_usage),
    "/v1/models": Route("GET", Access.USER, do_models),
    "/v1/models/": Route("GET", Access.USER, do_model),
    "/v1/": Route("POST", Access.USER, do_api, Exchange.read_content, "content_size"),
}


def find_route(path: str) -> Route | None:
    """Return the route of a path, or None."""
    if path in ROUTES or not path.startswith("/v1/"):
        return ROUTES.get(path)
    if path.startswith("/v1/models/"):
        return ROUTES["/v1/models/"]
    if path.startswith(f"{CHAT_PATH}/") and path.endswith(_ENDPOINTS):
        return None  # the base URL has the endpoint in it
    # An upstream's key is only for paths below its base URL: no dot segment.  Two of
    # OpenAI's hand out keys of its account, which know none of our limits.
    steps = lenient_path(path).split("/")
    barred = {".", "..", "realtime", "chatkit"}
    return ROUTES["/v1/"] if barred.isdisjoint(steps) else None


def check_method(exchange: Exchange, route: Route | None) -> Route:
    """Return the route if it serves the method; APIError(404, 405, 426, 501)."""
    request, path = exchange.request, exchange.path
    method = "GET" if request.method == "HEAD" else request.method
    if route is not None and route.method == method:
        return route
    if route is not None and route is not ROUTES["/v1/"]:
        text = f"{request.method} is not allowed for {path}; use {route.method}."
        raise APIError(405, text)
    if path.startswith("/v1/realtime"):
        raise APIError(501, "The realtime API is not supported.")
    if request.method == "GET" and "websocket" in request.headers.tokens("upgrade"):
        # Codex then falls back to HTTP at once.
        raise APIError(426, f"Websockets are not supported here; use POST {path}.")
    hint = "" if route else " The base URL for API clients ends in /v1."
    raise APIError(404, f"There is nothing at {request.method} {path or '/'}.{hint}")


async def follow_route(exchange: Exchange) -> None:
    """Apply the policy of a request's route, then run the route."""
    found = find_route(exchange.path)
    is_post = found is not None and found.method == "POST"
    exchange.allowed = "POST, OPTIONS" if is_post else "GET, HEAD, OPTIONS"
    if exchange.request.method == "OPTIONS":  # a CORS preflight carries no key
        do_preflight(exchange)
        return
    route = check_method(exchange, found)
    arguments: list[Any] = []
    if route.access is not Access.ADMIN:  # its key may be in the content
        authorize(exchange, route.access, {})
    if route.reads is not None:
        limit = getattr(exchange.server.limits, route.limit)
        arguments.append(await route.reads(exchange, limit))
    if route.access is Access.ADMIN:
        authorize(exchange, route.access, arguments[0] if arguments else {})
    value = await route.answer(exchange, *arguments)
    if value is not None:
        exchange.reply.send(200, encode_json(value))


# -----------------------------------------------------------------------------
# Request handler: a connection's requests, one after the other
# -----------------------------------------------------------------------------
#
# It reads request heads, makes an Exchange for each, and answers the errors that a
# route raises.  It decides whether to keep the connection, and times out slow clients.

# Stands in for a request whose head could not be read.
_NO_REQUEST = Request("-", "", "HTTP/1.1", "", "", Headers(), None)


class RequestHandler:
    """Serves the requests of one connection."""

    exchange: Exchange | None = None  # in progress
    reading = False  # waiting for a request's head, or in the middle of one
    _served = 0

    def __init__(self, server: Server, connection: Connection) -> None:
        self.server = server
        self.connection = connection
        self._context = contextvars.copy_context()

    async def handle(self) -> None:
        """Serve requests until the connection ends."""
        connection, tls = self.connection, self.server.tls
        try:
            if tls is not None and not await self._start_tls(tls):
                return
            while (request := await self._read_request()) is not None:
                self._served += 1
                self.exchange = exchange = Exchange(self.server, connection, request)
                exchange.reply.close = (
                    not keeps_alive(request)
                    or self._served >= self.server.limits.keep_alive_requests
                    or self.server.draining
                )
                work: Awaitable[None] = self._respond(exchange)
                if contextvars.copy_context() != self._context:
                    # A function has set a ContextVar: it must not reach this request.
                    work = self._context.run(asyncio.ensure_future, work)
                await work
                # Drain now: a client that pipelines and never reads would fill the
                # memory, and close() waits only a moment for unsent bytes.
                while not connection.closing and (
                    connection.unsent
                    if exchange.reply.close
                    else not connection.writable
                ):
                    await exchange.drain()
                self.exchange = None
                if exchange.reply.close:
                    break
                if connection.buffer:
                    await asyncio.sleep(0)  # a long pipeline must not starve others
        except ConnectionError:
            connection.abort()
        finally:
            self.exchange = None
            connection.close()

    async def _start_tls(self, context: ssl.SSLContext) -> bool:
        """Do the TLS handshake; return whether it succeeded.

        Not left to asyncio, so that the connection limit and shutdown() cover it, and
        a failure is not logged as an error.
        """
        connection, server = self.connection, self.server
        try:
            await connection.start_tls(context)
        except (OSError, asyncio.TimeoutError) as error:
            peer = connection.peer
            if getattr(error, "reason", "") == "HTTP_REQUEST":
                server.report(f"{peer} sent http to an https port; use https://")
            else:
                server.debug(f"TLS handshake with {peer} failed: {error}")
            return False
        connection.set_deadline(connection.loop.time() + server.limits.head_timeout)
        return True

    async def _read_request(self) -> Request | None:
        """Read the next request's head; None if there will be none.

        One absolute deadline for the whole head: a byte now and then does not
        extend it.  A malformed or late head is answered here.
        """
        connection, limits = self.connection, self.server.limits
        loop = connection.loop
        if self._served:
            connection.set_deadline(loop.time() + limits.keep_alive_timeout)
        begun = not self._served
        self.reading = True
        try:
            while True:
                if connection.buffer:
                    request = parse_request_head(connection.buffer, limits.head_size)
                    if request is not None:
                        return request
                    if not begun:
                        begun = True
                        connection.set_deadline(loop.time() + limits.head_timeout)
                if not await connection.receive():
                    return None
        except asyncio.TimeoutError:
            if not connection.buffer:
                return None
            error = ProtocolError(408, "the request's head took too long")
        except ProtocolError as caught:
            error = caught
        finally:
            self.reading = False
        await self._refuse(error)
        return None

    async def _refuse(self, error: ProtocolError) -> None:
        """Answer broken HTTP once, and ignore all that follows it."""
        error.with_traceback(None)  # as in Call._explain()
        exchange = self.turn_away(APIError(error.status, f"Bad request: {error}."))
        exchange.log()
        peer = self.connection.peer or "a client"
        self.server.report(f"{peer} sent no valid request: {error}")
        await self.connection.linger()

    def turn_away(self, error: APIError) -> Exchange:
        """Send an error whatever the request is, and end the connection."""
        self.exchange = exchange = Exchange(self.server, self.connection, _NO_REQUEST)
        exchange.reply.close = True
        exchange.send_error(error)
        return exchange

    async def _respond(self, exchange: Exchange) -> None:
        """Answer one request, whatever happens, and log it."""
        reply = exchange.reply
        try:
            await follow_route(exchange)
        except APIError as error:
            exchange.fail(error)
        except ProtocolError as error:
            reply.close = True
            exchange.fail(APIError(error.status, f"Bad request: {error}."))
        except asyncio.TimeoutError:
            reply.close = True
            exchange.fail(APIError(408, "The request's content took too long."))
        except (ConnectionError, asyncio.CancelledError):
            exchange.outcome = "client left"
            if self.connection.stalled:
                seconds = self.server.limits.write_timeout
                line = f"disconnected a client that read nothing for {seconds:g} s"
                self.server.report(line)
            raise
        except Exception:
            logger.exception("request %s failed", exchange.id)
            reply.close = True
            text = f"Internal error; look for {exchange.id} in the log."
            exchange.fail(APIError(500, text))
        finally:
            exchange.end()
        if reply.content_left > len(self.connection.buffer):
            reply.close = True  # the request was refused before it was read
            await self.connection.linger()
        else:
            del self.connection.buffer[: int(reply.content_left)]


# -----------------------------------------------------------------------------
# Server
# -----------------------------------------------------------------------------
#
# Server holds what requests share: keys and limits, agents, conversations, memory.
# It opens the sockets and starts one task per connection.  It keeps track of all that
# it starts: after shutdown() no task and no socket is left.


def open_sockets(listen: str, port: int) -> list[socket.socket]:
    """Open the sockets that listen at an address or name; "" is this machine only.

    That is 127.0.0.1 and, where there is IPv6, ::1 on the same port; "::" takes
    both families.  Raise OSError.
    """
    if listen:
        try:
            found = socket.getaddrinfo(
                listen, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except OSError as error:
            reason = f"listen: {listen}: {error.strerror or error}; try 0.0.0.0 or ::"
            raise OSError(error.errno, reason) from None
        addresses = list(dict.fromkeys((item[0], str(item[4][0])) for item in found))
    else:
        addresses = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
    sockets: list[socket.socket] = []
    for family, address in addresses:
        same_port = sockets[0].getsockname()[1] if sockets else port
        place = (address, same_port)
        both = address == "::" and socket.has_dualstack_ipv6()
        try:
            sock = socket.create_server(place, family=family, dualstack_ipv6=both)
            sockets.append(sock)
        except OSError as error:
            in_use = error.errno == errno.EADDRINUSE
            if not listen and family == socket.AF_INET6 and not in_use:
                continue  # no IPv6 here
            for sock in sockets:
                sock.close()
            if sockets and port == 0:  # free in one family only: try another
                return open_sockets(listen, 0)
            reason = f"{address} port {same_port}: {os.strerror(error.errno or 0)}"
            if in_use:
                reason += "; choose another port, or stop the program that uses it"
            if error.errno == errno.EADDRNOTAVAIL:
                reason += "; this machine does not have that address"
            raise OSError(reason) from None
    return sockets


def connection_limit(limits: Limits) -> int:
    """Return how many connections the open-file limit allows; a stream takes two."""
    files = 8192
    if os.name == "posix":
        import resource

        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most = 4096 if files < 0 else max(16, (files - 32) // 2)  # below 0: unlimited
    return int(limits.connections) or min(4096, most)


async def cancel_tasks(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel tasks, and wait until they have cleaned up, 3 s at most."""
    running = set(tasks)
    # More than once: before Python 3.12 wait_for() loses cancellations, and a user's
    # function may swallow one.
    for _ in range(3):
        for task in running:
            task.cancel()
        if running:
            _, running = await asyncio.wait(running, timeout=1)


class Stoppable:
    """Runs until request_shutdown(): one call ends it gracefully, two at once."""

    _asked: asyncio.Future[None] | None = None  # done once a shutdown is requested
    _hurried = False

    def request_shutdown(self) -> None:
        """Make serve_forever() end: gracefully, or at once on a second call."""
        assert self._asked is not None
        if self._asked.done():
            self._hurried = True
        else:
            self._asked.set_result(None)

    @property
    def ending(self) -> bool:
        """Whether a shutdown has been requested."""
        return self._asked is not None and self._asked.done()

    async def _wait_while(self, running: Callable[[], object], seconds: float) -> None:
        """Wait while running(), until the time is up or shutdown is requested again."""
        end = time.monotonic() + seconds
        while running() and not self._hurried and time.monotonic() < end:
            await asyncio.sleep(0.01)


class Server(Stoppable):
    """The whole server.  Nothing happens before it is started.

        server = Server(api_key="secret", port=0)
        with server.running() as url: ...       # in a thread of its own
        async with server: ...                  # in the caller's event loop
        await server.serve_forever()            # until request_shutdown()

    api_key          the administrator's key, also a valid user token
    port             0 lets the system choose; see the attribute port
    listen           address; "" is this machine only, "0.0.0.0" and "::" are all
    users            path of users.json; written when a user is added
    tls_cert, tls_key  files for https and wss
    pool             "balanced", "random" or "least_busy"
    agents_auth      who may register an agent without a key: "local" (from this
                     machine), "key" (nobody) or "open" (anybody)
    upstream_errors  "map" (to 500) or "pass" (429 and 5xx as they are)
    affinity         a conversation stays with the controller that had it last
    page             serve browsers a page at "/"
    tape             "FILE" or "FILE:MODE" of a TapeController
    mocks            serve the mock models
    store            what is stored of new tokens: "token" or "sha256"
    usage            path of usage.jsonl; None: beside the users; "-": none
    default_limit    of users without one, as parse_quotas() takes it
    metrics_users    label /metrics by user, too
    limits           Limits
    log              a Log for lines and access lines; None: warnings go to logging
    verbose          log every connection, attempt and agent message, too

    Raise ValueError for invalid arguments; starting raises OSError if the port is
    taken, and ConfigurationError for a damaged users.json.
    """

    ADMIN_ID = ""  # no user in users.json can have it

    url = ""
    tls: ssl.SSLContext | None = None  # for https and wss
    draining = False
    content_size = 0  # bytes reserved for content
    _status = (-math.inf, b"", "")  # when it was made, content, ETag
    _max_connections = 0

    def __init__(
        self,
        api_key: str,
        *,
        port: int = 8080,
        listen: str = "",
        users: str = "users.json",
        tls_cert: str | None = None,
        tls_key: str | None = None,
        pool: str = "balanced",
        agents_auth: str | None = None,
        upstream_errors: str = "map",
        affinity: bool = True,
        page: bool = True,
        mocks: bool = True,
        tape: str | os.PathLike[str] | None = None,
        limits: Limits = DEFAULT_LIMITS,
        store: str = "token",
        usage: str | None = None,
        default_limit: Any = None,
        metrics_users: bool = False,
        log: Log | None = None,
        verbose: bool = False,
    ) -> None:
        if not api_key:
            raise ValueError("api_key must not be empty")
        if type(port) is not int or not 0 <= port <= 65535:
            raise ValueError("port must be a number from 0 to 65535")
        for argument, value, *words in (
            ("agents_auth", agents_auth or "local", "local", "key", "open"),
            ("upstream_errors", upstream_errors, "map", "pass"),
            ("store", store, "token", "sha256"),
        ):
            if value not in words:
                raise ValueError(f"{argument} must be one of {', '.join(words)}")
        self._key = api_key.encode()
        self.admin = User({"user_id": self.ADMIN_ID, "token": api_key, "name": "admin"})
        self.admin.quotas = []  # the default limit does not apply
        self.limits = limits
        self.listen = listen
        self.port = port
        report = logger.warning if log is None else log.report
        self.report = (lambda line: None) if log is None else report
        self.access = None if log is None else log.write
        self.debug = log.report if log is not None and verbose else lambda line: None
        self.id = random_id("server-")  # new in each run; agents compare it
        self.started = unix_time()
        self.users = UserStore(users, store=store, limits=limits, report=report)
        self.pool = Pool(
            pool, affinity=affinity, limits=limits, report=report, debug=self.debug
        )
        self._usage_is_wanted = usage not in (None, "-")
        beside = os.path.join(os.path.dirname(users), "usage.jsonl")
        self.ledger = Ledger(None if usage == "-" else usage or beside, report)
        self.metrics = Metrics(users=metrics_users)
        self.default_quotas = parse_quotas(default_limit) if default_limit else []
        self.keyless_agents = agents_auth
        self.upstream_errors = upstream_errors
        self.page = page
        if mocks:
            self.pool.add(MockController())
        if tape:
            arguments = tape_arguments(os.fspath(tape))
            self.pool.add(TapeController(**arguments, limits=limits))
        self.agents: dict[str, AgentController] = {}  # by id
        self.paused: set[str] = set()  # ids of agents, by the administrator
        self.conversations = Conversations(limits)
        self.journal = Journal()
        self.running_requests: dict[Exchange, None] = {}  # oldest first
        self._in_flight: dict[str, int] = {}  # how many of them, by user_id
        self._wanted_port = port
        self._certificate = (tls_cert, tls_key)
        self._handlers: dict[Connection, RequestHandler] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._listeners: list[asyncio.AbstractServer] = []

    # --- Controllers

    def add(self, controller: Controller) -> None:
        """Add a controller, from any thread; ValueError if its name is taken."""
        self.pool.add(controller)
        if controller.limit is not None:
            self.ledger.watch("controller", controller.name, controller.limit)
        if self._listeners and self._asked is not None:
            self._asked.get_loop().call_soon_threadsafe(
                lambda: self._spawn(self.pool.refresh_models(controller))
            )

    def model(self, name: str, **options: Any) -> Callable[[F], F]:
        """Decorate a function that answers for a model.

        options are FunctionController's.  Raise TypeError without a name in
        parentheses, ValueError for an empty one.
        """
        if not isinstance(name, str):
            raise TypeError('write @server.model("name")')
        if not name:
            raise ValueError("the model's name must not be empty")

        def decorate(function: F) -> F:
            self.add(FunctionController(function, name=name, models=[name], **options))
            return function

        return decorate

    # --- Start and stop

    async def start(self) -> None:
        """Open the sockets and serve requests from now on."""
        loop, limits, pool = asyncio.get_running_loop(), self.limits, self.pool
        if self._listeners:
            raise RuntimeError("the server has been started already")
        self.users.load()
        self.ledger.load()
        if pool.tape is not None:
            pool.tape.load()
        listeners: list[asyncio.AbstractServer] = []
        with contextlib.ExitStack() as opened:  # closed again if something fails
            sockets = open_sockets(self.listen, self._wanted_port)
            for sock in sockets:
                opened.callback(sock.close)
            self.load_certificate()
            self._max_connections = connection_limit(limits)
            self._asked, self._hurried = loop.create_future(), False
            self.draining = False
            for sock in sockets:
                new = functools.partial(Connection, limits, self._accepted, self._lost)
                listener = await loop.create_server(new, sock=sock, backlog=1024)
                listeners.append(listener)
                opened.callback(listener.close)
            opened.pop_all()
        self._listeners = listeners
        address, self.port = sockets[0].getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
        host = f"[{host}]" if ":" in host else host
        self.url = f"http{'s' if self.tls else ''}://{host}:{self.port}"
        self._spawn(self._repeat(self._poll_users, lambda: limits.users_poll_interval))
        self._spawn(self._exchange_usage())
        self._spawn(pool.refresh_models())
        self._spawn(self._repeat(pool.refresh_models, lambda: 60))

    def load_certificate(self) -> None:
        """Load the certificate from disk as it is now; OSError if it is unusable."""
        cert, key = self._certificate
        if cert is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            try:
                # An encrypted key is refused: nobody is there to enter its password.
                context.load_cert_chain(cert, key, password="")
            except ssl.SSLError as error:
                cure = "" if key else "; name the key's own file with --tls-key"
                text = f"{cert}: not a PEM certificate with its key{cure}"
                if error.reason == "KEY_VALUES_MISMATCH":
                    text = f"{key or cert}: not the private key of {cert}"
                raise OSError(text) from None
            except OSError as error:
                raise OSError(f"{cert}, {key}: {error.strerror}") from None
            self.tls = context

    async def __aenter__(self) -> Server:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.shutdown()

    async def serve_forever(self) -> None:
        """Start unless started, serve until request_shutdown(), shut down."""
        if not self._listeners:
            await self.start()
        assert self._asked is not None
        try:
            await self._asked
        finally:
            await self.shutdown()

    async def shutdown(self) -> None:
        """Stop accepting, give requests drain_timeout seconds to finish, then stop."""
        self.draining = True
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        for connection, handler in list(self._handlers.items()):
            if handler.exchange is not None:
                handler.exchange.reply.close = True
            elif not connection.unsent:
                connection.abort()
        seconds, count = self.limits.drain_timeout, self.requests_in_flight
        if count:
            self.report(f"waiting up to {seconds:.0f} s; requests in flight: {count}")
        await self._wait_while(lambda: self._serves(False), seconds)
        for agent in list(self.agents.values()):
            agent.websocket.close(1001, "the server is shutting down")
        await self._wait_while(lambda: self._serves(True), 1.0)
        for each in self.running_requests:
            each.cancel(APIError(503, "The server is shutting down.", retry_after=5))
        await cancel_tasks(self._tasks)
        self._tasks.clear()
        for connection in list(self._handlers):
            connection.abort()
        self.pool.close()
        await self._flush_usage()
        await self.users.aclose()
        await asyncio.sleep(0)  # transports close in the loop's next turn
        self.url = ""

    def _serves(self, websockets: bool) -> bool:
        """Whether any websocket, or else any other request, is in progress."""
        return any(
            connection.unsent and not websockets  # a reply to the last request
            if handler.exchange is None
            else (handler.exchange.reply.status == 101) == websockets
            for connection, handler in self._handlers.items()
        )

    @property
    def exchanges(self) -> list[Exchange]:
        """The requests in progress."""
        found = (handler.exchange for handler in self._handlers.values())
        return [exchange for exchange in found if exchange is not None]

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """Run in a thread with its own event loop; yield the URL."""
        started: Future[asyncio.AbstractEventLoop] = Future()

        async def serve() -> None:
            try:
                await self.start()
            except BaseException as error:
                started.set_exception(error)
                return
            started.set_result(asyncio.get_running_loop())
            await self.serve_forever()

        def run() -> None:
            # asyncio.run() would wait for a function that ignores its cancellation.
            own_loop = asyncio.new_event_loop()
            try:
                own_loop.run_until_complete(serve())
                own_loop.run_until_complete(cancel_tasks(asyncio.all_tasks(own_loop)))
                own_loop.run_until_complete(own_loop.shutdown_asyncgens())
                for task in asyncio.all_tasks(own_loop):
                    with contextlib.suppress(Exception):  # it may ignore this, too
                        task.get_coro().close()  # releases its slot
            finally:
                own_loop.close()

        thread = threading.Thread(target=run, name="server")
        thread.start()
        try:
            loop = started.result()
            yield self.url
        finally:
            if not started.exception():
                with contextlib.suppress(RuntimeError):  # it has ended by itself
                    loop.call_soon_threadsafe(self.request_shutdown)
            thread.join()

    # --- Access and usage

    def authenticate(self, token: str) -> User | None:
        """Return the user of a token, None for a wrong one."""
        # All wrong tokens take the same time: the key is compared in constant time,
        # and users are looked up by digest.
        if hmac.compare_digest(token.encode("utf-8", "surrogatepass"), self._key):
            return self.admin
        return self.users.find(token)

    @property
    def agents_auth(self) -> str:
        """Who may register an agent without a key; by default what is safe.

        On a port that others can reach, or that terminates TLS, anybody behind a
        forwarder looks like this machine's own user.
        """
        here = is_loopback(self.listen or "localhost") and self.tls is None
        return self.keyless_agents or ("local" if here else "key")

    @property
    def requests_in_flight(self) -> int:
        """Requests between begin_request() and end_request()."""
        return len(self.running_requests)

    def begin_request(self, exchange: Exchange, user: User) -> None:
        """Admit a user's request, counted until end_request(); APIError(429, 503)."""
        if len(self.running_requests) >= self.limits.requests_in_flight:
            raise APIError(503, "The server is too busy; try again.", retry_after=1)
        running = self._in_flight.get(user.user_id, 0)
        most = user.max_concurrency or self.limits.user_requests_in_flight
        if most and running >= most:
            text = f"Too many requests at once: you may have {most} in flight."
            raise APIError(429, text, code="user_limit_exceeded", retry_after=1)
        limit = exchange.reply.limit
        over = None if limit is None else limit.over(running)
        if over is not None:
            quota, used, end = over
            raise APIError(
                429,
                f"Your limit of {quota} is used up ({used:,} {quota.unit} used);"
                f" it resets at {rfc3339(end)}.",
                code="user_limit_exceeded",
                retry_after=max(0.0, end - unix_time()),
            )
        self._in_flight[user.user_id] = running + 1
        self.running_requests[exchange] = None

    def end_request(self, exchange: Exchange, user: User) -> None:
        """Count a user's request as no longer in flight."""
        del self.running_requests[exchange]
        left = self._in_flight.pop(user.user_id) - 1
        if left:
            self._in_flight[user.user_id] = left

    def limit_of(self, user: User) -> UsageLimit | None:
        """Return a user's limit, or None."""
        quotas = self.default_quotas if user.quotas is None else user.quotas
        most = self.limits.user_requests_per_minute
        if most:
            quotas = [*quotas, Quota(int(most), "requests", "minute")]
        name = user.user_id or user.name
        return self.ledger.limit_of(name, quotas) if quotas else None

    def count(self, record: RequestRecord, user: User | None) -> None:
        """Record a request that has ended; user is None if it was not admitted."""
        self.journal.add(record)
        path = record.path  # in /metrics, one of a few
        path = path if path in ROUTES or path in DIALECTS else "other"
        model = known = record.model
        for controller in self.pool.controllers:
            if controller.serves(model) == NAMED:
                break
        else:
            known = "other"
        self.metrics.observe(record, path, known)
        if user is not None:
            name = record.attempts[-1][0] if record.attempts else ""
            # Unknown names would fill the memory; their failures count as "other".
            model = known if record.failed else model
            user_id = user.user_id or user.name
            self.ledger.record(user_id, model, name, int(record.failed), record.usage)

    # --- Status and metrics

    def status(self, now: float) -> tuple[bytes, str]:
        """Return GET /admin/status's content and ETag, made at most once a second."""
        made_at, content, etag = self._status
        if now - made_at < 1:
            return content, etag
        first_bytes = self.journal.first_bytes()
        controllers = [controller.status(now) for controller in self.pool.controllers]
        for line in controllers:
            line["first_byte"] = first_bytes.get(line["name"])
        running = [exchange.record() for exchange in reversed(self.running_requests)]
        ended = self.journal.requests()
        status = {
            "version": __version__,
            "started": round(self.started, 3),
            "draining": self.draining,
            "in_flight": self.requests_in_flight,
            "waiting": self.pool.waiting,
            "activity": self.journal.activity(now),
            "agent_sha256": own_source()[1] or None,
            "controllers": controllers,
            "requests": [record.as_json() for record in (*running, *ended)],
        }
        new = encode_json(status)
        if new != content:
            content, etag = new, f'"{secrets.token_hex(8)}"'
        self._status = (now, content, etag)
        return content, etag

    def gauges(self) -> Iterator[tuple[str, str, str, float]]:
        """Yield the gauges of GET /metrics."""
        prefix, pool = Metrics.PREFIX, self.pool
        now = asyncio.get_running_loop().time()
        build = metric_labels(version=__version__)
        yield f"{prefix}build_info", "The running version.", build, 1
        yield f"{prefix}waiting", "Requests in the queue.", "", pool.waiting
        yield f"{prefix}agents_connected", "Connected agents.", "", len(self.agents)
        for c in pool.controllers:
            labels = metric_labels(controller=c.name)
            yield f"{prefix}in_flight", "Requests at a controller.", labels, c.in_flight
        for c in pool.controllers:
            state = c.describe(now)["state"]
            for each in ("ready", "busy", "cooling", "disabled", "paused"):
                labels = metric_labels(controller=c.name, state=each)
                help = "1 for the controller's current state."
                yield f"{prefix}controller_state", help, labels, int(each == state)
        help = "Unix time of the start."
        yield "process_start_time_seconds", help, "", self.started
        yield from process_gauges()

    # --- Agents

    def register(self, agent: AgentController, claimed_id: str) -> None:
        """Add an agent, with the id it claims if that is free or of its credential.

        The newer socket wins: the older one may be dead without anybody noticing.
        """
        current, named = self.agents.get(claimed_id), self.pool.find(claimed_id)
        usable = re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", claimed_id, re.ASCII)
        usable = usable if named is None or named.transient else None
        if usable and (current is None or current.credential == agent.credential):
            agent.id = claimed_id
            if current is not None:
                self.unregister(current)
                current.websocket.close(4000, "the agent has registered again")
        agent.name = agent.name or f"agent-{agent.id[:8]}"
        agent.switched_off = agent.id in self.paused
        self.agents[agent.id] = agent
        self.pool.add(agent)

    def pause(self, id: str, paused: bool) -> bool:
        """Pause or resume an agent, even one that is away; False for an unknown id."""
        agent = self.agents.get(id)
        if agent is None and id not in self.paused:
            return False
        changes = paused != (id in self.paused)
        (self.paused.add if paused else self.paused.discard)(id)
        if agent is not None and changes:
            agent.switched_off = paused
            agent.tell("Pause" if paused else "Resume")
        return True

    def unregister(self, agent: AgentController) -> None:
        """Remove an agent; another one may have its id by now."""
        if self.agents.get(agent.id) is agent:
            del self.agents[agent.id]
        self.pool.remove(agent)
        agent.lose_calls()

    def dismiss_agents(self) -> None:
        """Disconnect agents that would not be admitted now: they read prompts."""
        for agent in list(self.agents.values()):
            try:
                agent.authorize()
            except APIError:
                self.unregister(agent)
                agent.websocket.close(1008, "its key is no longer valid")

    # --- Tasks

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("a task failed", exc_info=task.exception())

    async def _repeat(self, work: Callable[[], Any], wait: Callable[[], float]) -> None:
        """Run work at intervals."""
        while True:
            await asyncio.sleep(wait())
            await work()

    async def _poll_users(self) -> None:
        """Apply changes that others made to users.json."""
        await self.users.refresh()
        self.dismiss_agents()

    async def _exchange_usage(self) -> None:
        """Share usage with the servers that write the same file."""
        for turn in itertools.count(1):
            await asyncio.sleep(USAGE_READ_INTERVAL)
            await self._flush_usage(write=turn % USAGE_WRITE_TURNS == 0)

    async def _flush_usage(self, write: bool = True) -> None:
        """Write and read usage.jsonl if it is wanted, or there is a user or a limit.

        An unneeded file would surprise people.
        """
        limits = any(c.limit is not None for c in self.pool.controllers)
        if self._usage_is_wanted or limits or self.users.users:
            await self.ledger.flush(write)

    # --- Connections

    def _accepted(self, connection: Connection) -> None:
        handler = RequestHandler(self, connection)
        self.debug(f"connection from {connection.peer}")
        if not self._make_room():
            if self.tls is None:
                handler.turn_away(APIError(503, "Too many connections.", retry_after=1))
            connection.close()
            return
        self._handlers[connection] = handler
        connection.on_hangup = self._spawn(handler.handle()).cancel

    def _make_room(self) -> bool:
        """Return whether one more connection is allowed; close an idle one for it."""
        if len(self._handlers) < self._max_connections:
            return True
        for other, handler in self._handlers.items():
            if handler.reading and not other.buffer:  # between two requests
                other.abort()
                del self._handlers[other]  # at once: more may come in this turn
                return True
        return False

    def _lost(self, connection: Connection) -> None:
        self._handlers.pop(connection, None)
        connection.on_hangup = None  # its task may hold an error, which holds frames
        self.debug(f"connection from {connection.peer} ended")


# -----------------------------------------------------------------------------
# Agent
# -----------------------------------------------------------------------------
#
# The mirror of RequestHandler: it dials out to a server, reads requests from a
# websocket and answers them from a pool of its own.  It trusts the server no
# further: a request reaches the API of the agent's upstreams and nothing else.  Each
# call has a task; the task that reads the socket waits for none of them.

# Seconds until an agent redials: random, up to a cap that doubles from FIRST to MAX;
# after a refused key MAX.  Unless refused, the cap is SOON for the first minute, so
# that a restarted server has its agents back quickly.
REDIAL_FIRST = 0.5
REDIAL_SOON = 2.0
REDIAL_SOON_TIME = 60.0
REDIAL_MAX = 30.0
# Seconds between reads of the upstreams' models, until one is found and afterwards.
LOOK_INTERVAL = 3.0
MODELS_INTERVAL = 30.0

# Default ports of common programs.
LOCAL_PORTS = {11434: "Ollama", 8080: "llama.cpp", 8000: "vLLM", 1234: "LM Studio"}
# Strict, as the server chooses the path: no leading dots, nothing encoded.
_SEGMENT = r"/[A-Za-z0-9_][A-Za-z0-9._~:@-]*"
_API_TARGET = re.compile(rf"/v1(?:{_SEGMENT})+(?:\?[A-Za-z0-9._~:@/?&=+,%-]*)?")
_API_FIELD = re.compile(r"[a-z0-9-]{1,64}:[\t\x20-\x7e\xa0-\xff]*")
SERVER_LOOK_UP_INTERVAL = 30.0  # seconds between DNS lookups of a server's name
SERVER_ADDRESSES = 64  # dialled at most, for each name
# A server refused for this long gets the next slot: another one that asks the moment
# a slot is free would leave it none.  It asks again every AGENT_FULL_PAUSE seconds.
AGENT_FULL_PATIENCE = 1.0
_HINTS = {
    **dict.fromkeys((401, 403), "it requires an agent's token; pass one with --key"),
    404: "there is no chatgpt_apiserver at this address; is its path right?",
    400: "it sees no websocket; does a proxy forward Upgrade, or is it https?",
    426: "it sees no websocket; does a proxy forward Upgrade, and is the path right?",
    **dict.fromkeys((301, 302, 307, 308), "it redirects; is it https?"),
}


def register_url(url: str) -> str:
    """Return where to register at a server: http, https, ws, wss or host:port.

    A path prefix (a proxy's, or /k/<token>) is kept, a client's /v1 is not.  Raise
    ValueError without repeating the URL.
    """
    whole = url if "://" in url else f"http://{url}"
    try:
        scheme, _, _, path = address = Address.of(whole)
        if not re.fullmatch("[!-~]+", whole) or set(whole) & set("?#@"):
            raise ValueError
    except ValueError:
        text = "expected the URL of a server, such as http://my-server:8080"
        raise ValueError(text) from None
    path = path.removesuffix("/client/register").removesuffix("/v1")
    return f"{scheme}://{address.authority}{path}/client/register"


def join_problem(server: str, error: Exception) -> str:
    """Return why a server could not be joined, and what to do about it."""
    if isinstance(error, ProtocolError):
        hint = _HINTS.get(error.status, str(error))
        return f"{server} refused this agent ({error.status}): {hint}"
    if isinstance(error, asyncio.TimeoutError):  # an OSError from 3.11 on
        return f"{server} does not answer"
    return f"{server} cannot be reached: {connection_problem(error)}"


class Link:
    """An agent's connection to one address of one server, redialled for ever.

    url        the server's URL
    address    an IP address of the server's name; "" for whichever answers
    id         what the server calls this agent
    joined_at  loop time at which the agent introduced itself; 0: not yet
    refused_since  loop time of the first call refused since one was taken
    refused_at     and of the last one
    calls      tasks of running calls, by id
    """

    def __init__(self, agent: Agent, url: str, address: str) -> None:
        self.agent = agent
        self.url = url
        self.address = address
        self.server = Address.of(url).authority  # for messages: holds no token
        if address not in ("", Address.of(url).host):
            self.server += f" ({address})"
        self.id = agent.id
        self.joined_at = 0.0
        self.refused_since = math.inf
        self.refused_at = -math.inf
        self.wanted = True  # the address still belongs to the server's name
        self.websocket: WebSocket | None = None
        self.calls: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # cancelled calls' as well
        self.task = asyncio.get_running_loop().create_task(self.run())
        self.task.add_done_callback(lambda task: agent.links.pop((url, address)))

    # --- Life

    async def run(self) -> None:
        """Dial and serve, again and again, until the address is unwanted."""
        loop = asyncio.get_running_loop()
        delay, lost_at = REDIAL_FIRST, loop.time()
        while self.wanted:
            joined_before, self.joined_at, status = bool(self.joined_at), 0.0, 0
            try:
                problem = await self._serve_connection()
            except (OSError, asyncio.TimeoutError, ProtocolError) as error:
                problem = join_problem(self.server, error)
                status = getattr(error, "status", 0)
            if self.agent.ending:
                return
            # Do not report an address that never worked while another one does: many
            # names have an IPv6 address that not every network can reach.
            links = (link for link in self.agent.links.values() if link.url == self.url)
            alone = not any(link.websocket for link in links)
            if problem and (self.joined_at or joined_before or alone):
                self.agent.report_problem(self.server, f"{problem} (redialling)")
            if self.joined_at:
                lost_at = loop.time()
                if lost_at - self.joined_at > delay:
                    delay = REDIAL_FIRST  # the connection was stable
            refused = 300 <= status < 500  # no restart, which is a proxy's 502 or 503
            soon = loop.time() - lost_at < REDIAL_SOON_TIME and not refused
            delay = min(delay, REDIAL_SOON if soon else REDIAL_MAX, REDIAL_MAX)
            # Full jitter: a thousand agents must not redial at the same moment.
            bad_key = status in (401, 403)
            await asyncio.sleep(REDIAL_MAX if bad_key else random.uniform(0, delay))
            delay *= 2

    # --- The connection

    async def _serve_connection(self) -> str:
        """Dial, serve until the connection ends, and return how it ended.

        Raise what WebSocket.connect() raises.
        """
        agent = self.agent
        websocket = await WebSocket.connect(
            self.url,
            fields=agent.fields,
            ca_file=agent.ca_file,
            max_size=int(agent.limits.agent_message_size),
            limits=agent.limits,
            resolve=(lambda *_: [self.address]) if self.address else look_up,
        )
        server_id = websocket.headers.get(SERVER_ID_FIELD, "")
        if server_id in agent.reached:  # through another of its addresses
            websocket.connection.close()
            while server_id in agent.reached:
                await asyncio.sleep(REDIAL_FIRST)
            return ""
        if server_id:
            agent.reached.add(server_id)
        self.websocket = websocket
        try:
            with contextlib.suppress(ConnectionError):
                if await first_message(websocket) and not agent.ending:
                    await self._introduce()
                async for message in websocket:
                    await self._handle(*open_envelope(message))
                    del message  # it may be large, and the next one far off
        finally:
            self.websocket = None
            agent.reached.discard(server_id)
            await cancel_tasks(self._tasks)
            websocket.connection.close()
        how = "was lost"
        if websocket.close_code != 1006:
            reason = f"{websocket.close_code} {_plain(websocket.close_reason)}".strip()
            how = f"ended ({reason})"
        return f"the connection to {self.server} {how}"

    async def send(self, id: str, message: str, data: str = "") -> None:
        """Send one message, waiting for a slow server.  Raise ConnectionError."""
        if self.websocket is None:
            raise ConnectionResetError("the server is gone")
        await self.websocket.send(envelope(id, message, data))

    async def _handle(self, id: str, kind: str, data: str) -> None:
        """Handle one message from the server."""
        rare = kind in ("Connection id", "Pause", "Resume")  # each may be a line
        if rare and self.websocket is not None and self.websocket.flooded():
            return
        if kind == "Connection id":
            self.id = id
            name = as_object(read_json(data)).get("name", self.agent.name)
            if name != self.agent.name:  # another agent has it
                self.agent.report(f"{self.server} calls this agent {_word(str(name))}")
        elif kind in ("Pause", "Resume"):
            self.agent.report(f"{kind.lower()}d by {self.server}")
        elif kind == "ApiCancel" and id in self.calls:
            self.calls.pop(id).cancel()  # popped here: the next call may follow at once
        elif kind == "ApiRequest" and id not in self.calls:
            # Twice as many tasks: cancelled ones may take a while to end.
            most = 2 * self.agent.max_concurrency
            if self.agent.is_full(self) or len(self._tasks) >= most:
                self.refused_at = asyncio.get_running_loop().time()
                self.refused_since = min(self.refused_since, self.refused_at)
                await self.send(id, "error", AGENT_FULL)
                return
            self.refused_since = math.inf
            task = asyncio.get_running_loop().create_task(self._call(id, data))
            self.calls[id] = task
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(lambda task: self.calls.pop(id, None))

    async def _introduce(self) -> None:
        """Tell the server what this agent is and serves."""
        agent = self.agent
        hello = {"version": 2, "name": agent.name, "models": agent.serves}
        hello.update(max_concurrency=agent.max_concurrency, paused=agent.paused)
        await self.send(self.id, "Connection id", _to_ascii(hello))
        self.joined_at = asyncio.get_running_loop().time()
        agent.report_problem(self.server, "")
        what = f"as {agent.name}, serving {agent.models_text()}"
        paused = "; paused" if agent.paused else ""
        agent.report(f"connected to {self.server} {what}{paused}")

    # --- Calls

    async def _call(self, id: str, data: str) -> None:
        """Answer one call, whatever happens, and log it."""
        began, outcome = time.monotonic(), "cancelled"
        try:
            outcome = await self._answer(id, data)
        except ConnectionError:
            outcome = "lost: the server is gone"
        except Exception:
            logger.exception("call %s failed", id)
            outcome = "failed: an internal error"
            with contextlib.suppress(ConnectionError):
                await self.send(id, "error", "an internal error of the agent")
        finally:
            milliseconds = (time.monotonic() - began) * 1e3
            self.agent.debug(f"call {_word(id)} {outcome}, {milliseconds:.0f} ms")

    async def _answer(self, id: str, data: str) -> str:
        """Pass an ApiRequest to the pool, send the answer, and return the outcome."""
        begun = False
        try:
            request = self._read_request(data)
            async with self.agent.pool.call(request) as call:
                begun = True
                await self._send_answer(id, call)
            outcome = f"{request.path} {request.model} {call.status}"
        except APIError as error:
            if begun:
                await self.send(id, "error", error.message[:4096])
                return f"failed: {error.reason}"
            await self._send_refusal(id, error)
            outcome = f"refused ({error.status}): {error.reason}"
        await self.send(id, "ApiEnd")  # only now: the slot is free for the next call
        return outcome

    async def _send_answer(self, id: str, call: Call) -> None:
        """Send an answer as it arrives."""
        if call.content is not None:
            await self._send_whole(id, call.status, call.headers, call.content)
            return
        headers = call.headers if call.is_raw else {"content-type": EVENTS_TYPE}
        await self._send_head(id, call.status, headers, call.is_raw)
        while not call.ended:
            await self._send_data(id, await call.read(), call.is_raw)

    async def _send_refusal(self, id: str, error: APIError) -> None:
        """Answer as an upstream would, so that the server may fail over."""
        passed = error.upstream_status or 0
        status = passed if passed == 429 or passed >= 500 else error.status
        seconds = error.retry_after
        headers = {} if seconds is None else {"retry-after": str(seconds)}
        content = encode_json({"error": error_object(error)})
        await self._send_whole(id, status, headers, content)

    async def _send_whole(
        self, id: str, status: int, headers: dict[str, str], content: bytes
    ) -> None:
        """Send a complete answer, as base64 unless it is text."""
        is_raw = False
        try:
            content.decode()
        except UnicodeDecodeError:
            is_raw = True
        await self._send_head(id, status, headers, is_raw)
        await self._send_data(id, content, is_raw)

    def _read_request(self, data: str) -> APIRequest:
        """Parse an ApiRequest.  Raise APIError(400) for what is not served."""
        fields = as_object(read_json(data))
        body, target = fields.get("body"), str(fields.get("path"))
        if fields.get("method") != "POST" or not _API_TARGET.fullmatch(target):
            raise APIError(400, "An agent accepts only POST to plain /v1/ paths.")
        path, _, query = target.partition("?")
        headers = {
            name: value
            for name, value in as_object(fields.get("headers")).items()
            if _API_FIELD.fullmatch(f"{name}:{value}")
            and isinstance(value, str)
            and name not in _PRIVATE_REQUEST_FIELDS
        }
        try:
            if isinstance(body, dict):
                headers["content-type"] = "application/json"
                request = APIRequest(path, encode_json(body), query=query, body=body)
            else:
                content = base64.b64decode(str(body))
                kind = headers.get("content-type", "")
                request = APIRequest(path, content, query=query, form=kind)
        except (ValueError, RecursionError):
            raise APIError(400, "The agent could not decode the request.") from None
        request.headers = headers
        if request.model is None and self.agent.pool.needs_model(request):
            raise APIError(400, "'model' is missing.", param="model")
        now = asyncio.get_running_loop().time()
        request.deadline = now + self.agent.limits.request_timeout
        return request

    async def _send_head(
        self, id: str, status: int, headers: dict[str, str], is_raw: bool
    ) -> None:
        usual = "application/octet-stream" if is_raw else "application/json"
        kind = headers.get("content-type", usual)
        head: JSONObject = {"status": status, "content_type": kind}
        retry_after = parse_retry_after(headers)
        if retry_after is not None:
            head["retry_after"] = retry_after
        if is_raw:
            head["encoding"] = "base64"
        await self.send(id, "ApiResponse", _to_ascii(head))

    async def _send_data(self, id: str, content: bytes, is_raw: bool) -> None:
        """Send a piece of an answer, split between characters (base64: fours)."""
        content = base64.b64encode(content) if is_raw else content
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for at in range(0, len(content), PIECE_SIZE):
            text = decoder.decode(content[at : at + PIECE_SIZE])
            await self.send(id, "ApiData", text)


def shortened(names: Iterable[str], most: int = 5) -> str:
    """Join the first names for people; "" if there are none."""
    names = list(names)
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])


class Agent(Stoppable):
    """The dial-in side: makes controllers on this machine part of servers' pools.

        agent = Agent("http://my-server:8080", key="...", controllers=[...])
        await agent.serve_forever()  # until request_shutdown()

    urls             servers, as register_url() accepts them; every address of a
                     name is dialled
    key              an agent's token or the server's API key; "" for none
    controllers      what answers; None: whatever appears on LOCAL_PORTS.  An
                     OpenAIController without models serves all that it lists
    models           of the listed models, serve only these; None: all
    name             a label for people; None: this machine's name
    max_concurrency  concurrent calls, of all servers together
    paused           connected, but given no calls until pause(False)
    ca_file          certificates to trust (PEM) in place of the system's
    log              a Log for lines to people; None: they go to logging

    id      its id at the servers, kept across connections
    serves  the models announced to the servers; None: any
    links   its connections, or attempts at them, by URL and address

    Raise ValueError for an invalid URL.
    """

    def __init__(
        self,
        *urls: str,
        key: str = "",
        controllers: Iterable[Controller] | None = None,
        models: Iterable[str] | None = None,
        name: str | None = None,
        max_concurrency: int = 8,
        paused: bool = False,
        ca_file: str | None = None,
        limits: Limits = DEFAULT_LIMITS,
        log: Log | None = None,
        verbose: bool = False,
    ) -> None:
        self.urls = list(dict.fromkeys(map(register_url, urls or [""])))
        self.name = name or socket.gethostname()
        self.max_concurrency = max_concurrency
        self.paused = paused
        self.limits = limits
        self.id = str(uuid.uuid4())
        self.serves: list[str] | None = []
        self.links: dict[tuple[str, str], Link] = {}
        self.reached: set[str] = set()  # ids of the servers it is connected to
        self.fields = [("Authorization", f"Bearer {key}")] if key else []
        self.ca_file = ca_file
        self.report = logger.info if log is None else log.report
        self.warn = logger.warning if log is None else log.report
        self.debug = log.report if log is not None and verbose else logger.debug
        self._allowed = list(models or ())
        self.pool = Pool(limits=limits, report=self.warn)
        for controller in self._local() if controllers is None else controllers:
            self.pool.add(controller)
        listing = [c for c in self.pool.controllers if c.lists_models]
        self._upstreams = [c for c in listing if c.models is None]
        for upstream in self._upstreams:  # see _watch_models()
            upstream.report = self.debug
        self._problems: dict[str, str] = {}  # reported and lasting, by their source

    def _local(self) -> list[Controller]:
        """Return controllers for LOCAL_PORTS, except the servers' own ports."""
        servers = map(Address.of, self.urls)
        taken = {server.port for server in servers if is_loopback(server.host)}
        return [
            OpenAIController(
                "",
                name=f"127.0.0.1:{port} ({program})",
                base_url=f"http://127.0.0.1:{port}/v1",
                limits=self.limits,
            )
            for port, program in LOCAL_PORTS.items()
            if port not in taken
        ]

    # --- Life

    async def serve_forever(self) -> None:
        """Serve until request_shutdown(), whatever happens to the servers."""
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()  # there is something to serve
        self._asked, self._hurried = loop.create_future(), False
        work = {loop.create_task(self._watch_models(ready))}
        work |= {loop.create_task(self._watch_server(url, ready)) for url in self.urls}
        try:
            ends = {*work, self._asked}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not self.ending:
                await asyncio.gather(*work)  # raises: a task ends only by a bug
            await self._drain()
        finally:
            await cancel_tasks(work | {link.task for link in self.links.values()})
            for controller in self.pool.controllers:
                controller.close()

    async def _drain(self) -> None:
        """Take no new calls, and give running ones drain_timeout seconds to finish."""
        self._broadcast("Drain")
        seconds = self.limits.drain_timeout
        running = self._running()
        if running:
            self.report(f"waiting {seconds:.0f} s at most for calls: {len(running)}")
        await self._wait_while(self._running, seconds)
        joined = [(x.task, x.websocket) for x in self.links.values() if x.websocket]
        for _, websocket in joined:
            websocket.close(1001, "the agent is shutting down")
        if joined:  # the servers answer with their own close
            await asyncio.wait({task for task, _ in joined}, timeout=1)

    # --- What it serves

    async def _watch_models(self, ready: asyncio.Event) -> None:
        """Read the upstreams' models regularly, and announce changes."""
        while True:
            await asyncio.gather(*(u.refresh_models() for u in self._upstreams))
            # Ollama lists "llama3.1" as "llama3.1:latest".
            allowed = {*self._allowed, *(f"{name}:latest" for name in self._allowed)}
            for u in self._upstreams:
                served = (m for m in u.listed if m in allowed or not allowed)
                u.models = models_table(served)
            tables = [controller.models for controller in self.pool.controllers]
            names = dict.fromkeys(name for table in tables for name in table or ())
            models = None if None in tables else list(names)
            changed, self.serves = models != self.serves, models
            if models == [] and not ready.is_set():
                why = "; ".join(map(self._why_not, self._upstreams))
                self.report_problem("", f"nothing to serve yet, still looking: {why}")
            elif changed and ready.is_set():
                self.report(f"now serving {self.models_text()}")
                self._broadcast("Models", _to_ascii(models))
            else:
                ready.set()
            await asyncio.sleep(MODELS_INTERVAL if ready.is_set() else LOOK_INTERVAL)

    def _why_not(self, upstream: Controller) -> str:
        """Return why no model of an upstream is served, for people."""
        others = f"{shortened(upstream.listed)}, but not {shortened(self._allowed)}"
        listed = f"it lists {others if upstream.listed else 'no models'}"
        return f"{upstream.name}: {upstream.list_problem or listed}"

    def models_text(self) -> str:
        """Return the models it serves, for people."""
        if self.serves is None:
            return "any model"
        return shortened(self.serves) or "no model"

    def report_problem(self, source: str, problem: str) -> None:
        """Report a problem once while it lasts; "" clears it."""
        if problem and problem != self._problems.get(source):
            self.warn(problem)
        self._problems[source] = problem

    # --- Calls and pauses

    def _running(self) -> list[asyncio.Task[None]]:
        return [task for link in self.links.values() for task in link.calls.values()]

    def is_full(self, link: Link) -> bool:
        """Whether it takes no more calls of a server: others may have waited longer."""
        then = asyncio.get_running_loop().time() - AGENT_FULL_PATIENCE
        latest, links = min(link.refused_since, then), self.links.values()
        first = [x for x in links if x.refused_since < latest and x.refused_at > then]
        return self.ending or len(self._running()) + len(first) >= self.max_concurrency

    def pause(self, paused: bool = True) -> None:
        """Stop the servers' calls, or resume them; running ones continue."""
        if paused != self.paused:
            self.paused = paused
            self.report("paused" if paused else "resumed")
            self._broadcast("Pause" if paused else "Resume")

    def _broadcast(self, message: str, data: str = "") -> None:
        for link in self.links.values():
            if link.joined_at and link.websocket is not None:
                with contextlib.suppress(ConnectionError):
                    link.websocket.write(envelope(link.id, message, data))

    # --- The servers

    async def _watch_server(self, url: str, ready: asyncio.Event) -> None:
        """Keep a link to each current address of a server's name."""
        await ready.wait()
        host = Address.of(url).host
        client = HTTPClient(url, limits=self.limits)
        while True:
            found = [address for server, address in self.links if server == url]
            pause = SERVER_LOOK_UP_INTERVAL
            try:  # localhost is one server, with IPv4 and IPv6
                found = [""] if is_loopback(host) else await client.addresses()
            except (OSError, asyncio.TimeoutError) as error:
                pause = REDIAL_SOON
                if not found:
                    self.report_problem(url, f"{join_problem(host, error)} (retrying)")
            for address in found[:SERVER_ADDRESSES]:
                if (url, address) not in self.links:
                    self.links[url, address] = Link(self, url, address)
            for link in self.links.values():
                if link.url == url:
                    link.wanted = link.address in found
                    if not link.wanted and link.websocket is None:
                        link.task.cancel()  # it may be waiting on another link
            await asyncio.sleep(pause)


def command_model(
    arguments: list[str], whole: bool = False
) -> Callable[[dict[str, Any]], AsyncGenerator[str, None]]:
    """Return a function for FunctionController that runs a program per request.

    The program reads the last user message (whole: the request's JSON), and its
    output is streamed as the answer.  If it fails, the end of its standard error is
    logged.  It is killed, with its children, if the call is cancelled.
    """
    import tempfile  # 5 ms that only this needs

    async def answer(request: dict[str, Any]) -> AsyncGenerator[str, None]:
        messages = [*map(as_object, as_list(request.get("messages")))]
        asked = [m.get("content") for m in messages if m.get("role") == "user"]
        last = content_text(asked[-1] if asked else "").encode("utf-8", "replace")
        # Files, as an unserved pipe would fill up and block the program.
        with tempfile.TemporaryFile() as question, tempfile.TemporaryFile() as errors:
            question.write(encode_json(request) if whole else last)
            question.seek(0)
            process = await asyncio.create_subprocess_exec(
                *arguments,
                stdin=question,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # no Ctrl-C, and _kill() reaches its children
            )
            assert process.stdout is not None
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            try:
                data = b"-"
                while data:
                    data = await process.stdout.read(PIECE_SIZE)
                    text = decoder.decode(data, not data)
                    if text:
                        yield text
                status = await process.wait()
            except BaseException:
                await _kill(process)
                raise
            if status:
                errors.seek(max(0, errors.seek(0, os.SEEK_END) - 2048))
                tail = errors.read().decode("utf-8", "replace").strip()
                reason = f"{os.path.basename(arguments[0])} exited with status {status}"
                logger.warning("%s: %s", reason, tail or "no output on standard error")
                raise ControllerError(reason, Failure.NONE, code="agent_error")

    return answer


async def _kill(process: asyncio.subprocess.Process) -> None:
    """Kill a program and its children, which may have outlived it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
    cast(Any, process)._transport.close()  # another group may hold its output
    await process.wait()


# -----------------------------------------------------------------------------
# Configuration and command line
# -----------------------------------------------------------------------------
#
# Arguments override the environment, the environment the file, and the file the
# defaults.  Everything is checked before anything starts.  A mistake is one line,
# FILE: controllers[1].config.api_key: expected ..., in a ConfigurationError.  It
# never repeats a value: any value may be a key in the wrong place.

HELP = """\
usage: chatgpt_apiserver.py <port> <API_KEY> [options]
       chatgpt_apiserver.py agent <URL> [options]   (see agent --help)

An OpenAI-compatible API, with keys and limits for its users, in front of other
APIs (OpenAI's, Ollama's, ...), agents that dial in, and Python functions.

try it with the built-in model mock/echo:
  python3 chatgpt_apiserver.py 8080 my-key
put OpenAI behind it, or the API at OPENAI_BASE_URL:
  OPENAI_API_KEY=sk-... python3 chatgpt_apiserver.py 8080 my-key
open it to the network, with TLS:
  python3 chatgpt_apiserver.py 8080 my-key --listen :: \\
    --tls-cert cert.pem --tls-key key.pem
give a colleague a key:
  curl localhost:8080/admin/users/add -d '{"admin_key":"my-key","name":"ada"}'
add another machine's models (run it there):
  python3 chatgpt_apiserver.py agent https://my-server:8080 --key TOKEN

  <port>              where clients connect (default: 8080; 0: any free one)
  <API_KEY>           the administrator's key, your choice; - reads it from the
                      environment variable API_KEY, so that ps does not show it

options, with one dash or two:
  --listen ADDR       0.0.0.0 or :: opens it to the network (default: this
                      machine only)
  --users FILE        users and their tokens (default: users.json)
  --usage FILE        who used what (default: usage.jsonl beside it; - for none)
  --tls-cert FILE     certificate for https and wss (default: http and ws)
  --tls-key FILE      its private key (default: in the certificate's file)
  --config_file FILE  the configuration (default: none is needed)
  --config_path DIR   folder of chatgpt-apiserver.json (default: the first with
                      one of . .config config /etc/chatgpt-apiserver)
  --tape FILE[:MODE]  record answers, or replay them; MODE is replay (default),
                      record or auto
  -v, --verbose       log connections, attempts, agents' messages (default: off)
  --version, --help   print the version, or this

environment: CHATGPT_APISERVER_PORT, _LISTEN, _API_KEY, _POOL_TYPE, _CONFIG_FILE
and _CONFIG_PATH; OPENAI_API_KEY and OPENAI_BASE_URL (an upstream, when the file
has none); https_proxy, no_proxy
"""

AGENT_HELP = """\
usage: chatgpt_apiserver.py agent <URL>... [options]

Makes what runs on this machine (Ollama, llama.cpp, vLLM, LM Studio, any other
OpenAI-compatible server, or a program) part of a chatgpt_apiserver elsewhere.
It dials out: no port is opened here.

serve what is found on the usual ports:
  python3 chatgpt_apiserver.py agent https://my-server:8080 --key TOKEN

  <URL>               a server: http, https, ws, wss or host:port; every address
                      of its name is dialled

options, with one dash or two:
  --key TOKEN         an agent's token or the server's API key (default: the
                      environment variable API_KEY, which ps does not show)
  --upstream URL      what to serve (default: what answers on the ports 11434,
                      8080, 8000 and 1234 of this machine)
  --upstream-key KEY  its key (default: none)
  --command 'PROG A'  serve a program: it reads the last message and prints the
                      answer; --json gives it the whole request
  --config_file FILE  serve the controllers of this configuration file
  --models A,B        the models (default: all found, or the program's name)
  --name NAME         a label for people (default: this machine's name)
  --max-concurrency N calls at once, of all servers together (default: 8)
  --pause             start paused: connected, but given no calls; the signal
                      USR1 pauses and resumes
  --ca-file FILE      certificates to trust (default: the system's)
  -v, --verbose       log each call (default: off)
  --version, --help   print the version, or this
"""


# An option with a value; HELP and AGENT_HELP list all that are accepted.
HELP_OPTION = re.compile("^  --([a-z_-]+) [A-Z']", re.MULTILINE)
Environ = Mapping[str, str]


class Config(SimpleNamespace):
    """The checked SETTINGS by name, with limits and controllers.

    Also path (of the file), notes (for the start screen) and verbose.  A reload
    leaves a controller alone if its dict is equal.
    """

    def __repr__(self) -> str:
        names = [controller["name"] for controller in self.controllers]
        where = f"path={self.path!r} listen={self.listen!r} port={self.port}"
        return f"<Config {where} controllers={names}>"


# --- What is valid


def is_address(value: str) -> bool:
    """Whether value is "", an IP address (also [::1]) or a possible host name."""
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(re.sub(r"^\[(.*)\]$", r"\1", value)))
    # A last label of digits is a mistyped address (256.0.0.1), not a name.
    name = r"|(?=.{1,253}$)([A-Za-z0-9_-]{1,63}\.)*(?![0-9]+$)[A-Za-z0-9_-]{1,63}"
    return re.fullmatch(name, value) is not None


def is_key(value: str) -> bool:
    """Whether a header can carry value, and it is not the placeholder."""
    return re.fullmatch("[!-~]+", value) is not None and value != "<API_KEY>"


def is_url(value: str) -> bool:
    """Whether value is an http or https URL of host, port and path only."""
    url = urllib.parse.urlsplit(value)  # ValueError: an unfinished [, a port of 99999
    known = url.scheme in ("http", "https") and url.port != 0
    clean = is_key(value) and not set(value) & set("?#@\\")
    return known and clean and is_address(url.hostname or "?")


def is_proxy(value: str) -> bool:
    """Whether value is http://host:port, with or without user:password@."""
    plain = re.sub("^http://[!-~]+@", "http://", value)
    return re.match(r"http://[^/?#\\]+/?$", value) is not None and is_url(plain)


def is_readable(path: str) -> bool:
    """Whether path is a file that we may read."""
    return path.isprintable() and os.access(path, os.R_OK) and not os.path.isdir(path)


def holds_certificate(path: str) -> bool:
    """Whether path is a file with a certificate in PEM form."""
    with contextlib.suppress(OSError, ValueError):
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
        return True
    return False


def models_shape(value: Any) -> Any:
    """Return the shape of "models": ["name", ...] or {"alias": "name", ...}."""
    if value and isinstance(value, (list, dict)) and "*" not in str([*value]):
        return [NAME] if isinstance(value, list) else dict.fromkeys(value, NAME)
    words = '["name"] or {"alias": "name"}, not empty, without patterns (*)'
    return Expected(words, lambda value: False, (list, dict))


NAME = Expected("printable text", lambda text: text != "" and text.isprintable())
# Relative to the folder of the server's file, even if written in another file.
PATH = Expected("the path of a file", NAME.test)
FILE = Expected("the path of a readable file", is_readable)
CA_FILE = Expected("the path of a file with a certificate (PEM)", holds_certificate)
NUMBER = Expected("a number from 0", lambda value: 0 <= value < 1e12, (int, float))
ABOVE_0 = Expected("seconds, above 0", lambda value: 0 < value < 1e12, (int, float))
PORT = Expected(
    "a port from 0 to 65535",
    lambda value: re.fullmatch("[0-9]{1,5}", str(value)) and int(value) <= 65535,
    (int, str),
)
ADDRESS = Expected("an address without a port, such as 0.0.0.0 or ::", is_address)
KEY = Expected(
    "a key of your own: printable ASCII, no space or newline, not <API_KEY>", is_key
)
TRUE_OR_FALSE = Expected("true or false", lambda value: True, bool)
# Limits that the file could set before they became constants: accepted and ignored.
RETIRED_LIMITS = frozenset(
    "request_line_size header_line_size header_count chunk_line_size"
    " chunk_extensions_size trailer_size trailer_count pipelined_size write_high_water"
    " write_low_water write_unsent_size linger_timeout linger_size"
    " wrong_keys_per_minute queue_size_per_controller queue_size_min queue_size_max"
    " agent_return_timeout agent_return_window message_fragments control_frame_rate"
    " control_frame_burst close_timeout agent_write_size response_head_size"
    " response_header_count interim_responses idle_upstream_connections"
    " content_rate_after connections_per_address first_message_timeout"
    " ask_answer_size redial_first redial_max look_interval models_interval".split()
)


# A shape is an object {key: shape}, a list [shape], an Expected, or a function from a
# value to its shape.
CONFIG_KEYS = {
    "api_key": Expected(
        'a key of printable ASCII without spaces or newlines, or "" for none',
        lambda value: value == "" or (is_key(value) and not value.startswith("env:")),
    ),
    "base_url": Expected("the http or https URL of an API", is_url),
    "proxy": Expected("a proxy such as http://host:port", is_proxy),
    "ca_file": CA_FILE,
    "verify": TRUE_OR_FALSE,
    "first_byte_timeout": ABOVE_0,
    "auth": one_of("bearer", "x-api-key"),
}
CONTROLLER_TYPES: dict[str, Callable[..., Controller]] = {
    "openai": OpenAIController,
    "anthropic": AnthropicController,
    "tape": TapeController,
}
UPSTREAM_URLS = {"openai": OPENAI_URL, "anthropic": ANTHROPIC_URL}
CONTROLLER_KEYS = {
    "type": one_of(*CONTROLLER_TYPES),
    "name": NAME,
    "weight": whole_number(0),
    "models": models_shape,
    "max_concurrency": whole_number(1),
    "limit": LIMIT,
    "account": NAME,
    "tier": whole_number(1),
    "config": CONFIG_KEYS,
    "config_file": FILE,
}
TAPE_KEYS = {
    "type": CONTROLLER_KEYS["type"],
    "name": NAME,
    "file": PATH,
    "mode": one_of(*TapeController.MODES),
    "speed": NUMBER,
    "ignore": [NAME],
}


def controller_shape(value: Any) -> dict[str, Any]:
    """Return the shape of a controller."""
    return TAPE_KEYS if as_object(value).get("type") == "tape" else CONTROLLER_KEYS


LIMIT_SHAPES = {  # by a limit's type, and whether it is above 0
    (int, False): whole_number(0),
    (int, True): whole_number(1),
    (float, False): NUMBER,
    (float, True): ABOVE_0,
}
LIMITS = {
    name: LIMIT_SHAPES[type(default), name in ABOVE_ZERO]
    for name, default in vars(Limits).items()
    if not name.startswith("_")
}
LIMITS.update(dict.fromkeys(RETIRED_LIMITS, NUMBER))


class Setting(NamedTuple):
    """One setting: its check, and where it may be set."""

    shape: Any
    variables: tuple[str, ...] = ()  # the first that is set and not empty counts
    place: str = ""  # in the file, such as "pool.type"; "": its name
    restart: bool = False  # only a restart changes it


# All settings, by the name of Server's argument, whose default counts.  A new one is a
# line here and, if it is an option, a line in HELP.
SETTINGS = {
    "port": Setting(PORT, ("CHATGPT_APISERVER_PORT",), restart=True),
    "listen": Setting(ADDRESS, ("CHATGPT_APISERVER_LISTEN",), restart=True),
    "api_key": Setting(KEY, ("CHATGPT_APISERVER_API_KEY", "API_KEY"), restart=True),
    "users": Setting(PATH, restart=True),
    "usage": Setting(PATH, restart=True),
    "store": Setting(one_of("token", "sha256")),
    "default_limit": Setting(LIMIT),
    "metrics_users": Setting(TRUE_OR_FALSE, place="metrics.users", restart=True),
    "tls_cert": Setting(FILE, restart=True),
    "tls_key": Setting(FILE, restart=True),
    "pool": Setting(one_of(*Pool.TYPES), ("CHATGPT_APISERVER_POOL_TYPE",), "pool.type"),
    "agents_auth": Setting(one_of("local", "key", "open"), place="agents.auth"),
    "upstream_errors": Setting(one_of("map", "pass")),
    "affinity": Setting(TRUE_OR_FALSE),
    "mocks": Setting(TRUE_OR_FALSE, restart=True),
    "tape": Setting(PATH),
    "page": Setting(TRUE_OR_FALSE),
}
# Where to find the file.
LOCATION_SETTINGS = {
    name: Setting(PATH, (f"CHATGPT_APISERVER_{name.upper()}", name.upper()))
    for name in ("config_file", "config_path")
}


def file_keys() -> dict[str, Any]:
    """Return the shape of chatgpt-apiserver.json."""
    keys: dict[str, Any] = {"limits": LIMITS, "controllers": [controller_shape]}
    for name, setting in SETTINGS.items():
        *outer, key = (setting.place or name).split(".")
        group = keys.setdefault(outer[0], {}) if outer else keys
        group[key] = setting.shape
    return keys


# --- Reading and checking

KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}


class Source(NamedTuple):
    """Where values come from: a file, the environment or the command line."""

    name: str  # begins each message; a file's is its path
    folder: str = ""  # the base of relative paths
    environ: Environ | None = None  # resolves "env:NAME"; None: not here

    def mistake(self, place: str, text: str) -> ConfigurationError:
        parts = [self.name, place.lstrip("."), text]
        return ConfigurationError(": ".join(filter(None, parts)))

    def read(self, shape: Any) -> Any:
        """Read and check the file."""
        try:
            with open(self.name, "rb") as file:
                content = load_json(file.read())
        except OSError as error:
            raise self.mistake("", f"cannot be read: {error.strerror}") from None
        except ConfigurationError as error:
            raise self.mistake("", str(error)) from None
        return self.check(content, shape)

    def check(self, value: Any, shape: Any, place: str = "") -> Any:
        """Return the value to use, or raise ConfigurationError."""
        if isinstance(value, str) and value.startswith("env:"):
            value = self.variable(value, place)
        if callable(shape):
            shape = shape(value)
        words = KINDS.get(type(shape)) or shape.words
        types = type(shape) if type(shape) in KINDS else shape.types
        if not has_type(value, types):
            kind = "null" if value is None else KINDS.get(type(value), "a number")
            hint = f'; write {{"{[*shape][0]}": ...}}' if words == KINDS[dict] else ""
            raise self.mistake(place, f"expected {words}, got {kind}{hint}")
        if isinstance(shape, list):
            return [
                self.check(item, shape[0], f"{place}[{index}]")
                for index, item in enumerate(value)
            ]
        if isinstance(shape, dict):
            return dict(self.check_items(value, shape, place))
        if shape in (PATH, FILE, CA_FILE) and value and value != "-":
            value = os.path.join(self.folder, os.path.expanduser(value))
        if not shape.fits(value):
            raise self.mistake(place, f"expected {shape.words}")
        return value

    def check_items(
        self, items: dict[Any, Any], shape: dict[str, Any], place: str
    ) -> Iterator[tuple[str, Any]]:
        for key, value in items.items():
            if key is None:  # see unique_keys()
                raise self.mistake(f"{place}.{quote_key(value)}", "duplicate key")
            inner = f"{place}.{quote_key(key)}"
            if key not in shape:
                homes = {json.dumps(name): shape[name] for name in shape}
                homes['"config"'] = CONFIG_KEYS
                homes['"controllers", beside "config"'] = CONTROLLER_KEYS
                homes["the outermost object"] = file_keys()
                home = next((n for n in homes if key in as_object(homes[n])), None)
                hint = f"; it belongs in {home}" if home else ""
                raise self.mistake(inner, f"unknown key{hint}")
            yield key, self.check(value, shape[key], inner)

    def variable(self, value: str, place: str) -> str:
        """Resolve "env:NAME"."""
        if self.environ is None:
            return value
        name = value[4:]
        if not self.environ.get(name):
            # Repeat only a usual name: "env:sk-..." is a key in the wrong place.
            name = name if re.fullmatch("[A-Z][A-Z0-9_]*", name) else "named here"
            raise self.mistake(place, f"the environment variable {name} is not set")
        return self.environ[name]


COMMAND_LINE = Source("command line")
ENVIRONMENT = Source("environment")


# --- Arguments


class CommandLine(argparse.ArgumentParser):
    """An ArgumentParser with our help text and one-line errors."""

    def format_help(self) -> str:
        return self.description or ""

    def error(self, message: str) -> NoReturn:
        # argparse quotes the argument, which may be a key.
        raise COMMAND_LINE.mistake("", message.partition(" '")[0])


def read_arguments(
    argv: list[str], help: str, flags: Iterable[str] = ()
) -> tuple[list[str], dict[str, Any]]:
    """Return a command line's words, and the options and flags given.

    Options may stand anywhere, with one dash (as in the originals, and in Go) or two.
    Raise ConfigurationError, which repeats no value, or SystemExit for --help.
    """
    parser = CommandLine(description=help, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    for option in HELP_OPTION.findall(help):
        name, dashed = option.replace("-", "_"), option.replace("_", "-")
        parser.add_argument(*{f"--{name}", f"--{dashed}"}, dest=name)
    for flag in flags:
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("-v", "--verbose", action="store_true")
    version = f"chatgpt_apiserver.py {__version__}"
    parser.add_argument("--version", action="version", version=version)
    end = argv.index("--") if "--" in argv else len(argv)
    arguments = [re.sub("^-(?=[a-z]{2})", "--", a) for a in argv[:end]] + argv[end:]
    # parse_args() would refuse KEY in "8080 --users FILE KEY".
    parsed, extra = parser.parse_known_intermixed_args(arguments)
    for option in (e.partition("=")[0] for e in extra if e.startswith("-")):
        usual = re.fullmatch("--?[a-z][a-z_-]{0,20}", option)  # it cannot be a key
        parser.error(f"unknown option{f' {option}' if usual else ''}; see --help")
    options = {k: v for k, v in vars(parsed).items() if v not in (None, False)}
    return options.pop("words"), options


def find_setting(
    name: str, options: JSONObject, environ: Environ, content: JSONObject | None = None
) -> Any:
    """Return a setting, checked, from options, environment or file; else None."""
    setting = SETTINGS.get(name) or LOCATION_SETTINGS[name]
    value = options.get(name)
    if name == "api_key" and value == "-":
        value = COMMAND_LINE._replace(environ=environ).variable("env:API_KEY", name)
    if value is not None:
        return COMMAND_LINE.check(value, setting.shape, name)
    for variable in filter(environ.get, setting.variables):
        return ENVIRONMENT.check(environ[variable], setting.shape, variable)
    found: Any = content
    for key in (setting.place or name).split("."):
        found = as_object(found).get(key)
    return found


# --- Putting it together


def load_config(argv: list[str], environ: Environ) -> Config:
    """Merge arguments, environment and file.  Raise ConfigurationError.

    Nothing is kept between calls, so a reload is another call.
    """
    words, options = read_arguments(argv, HELP)
    if len(words) > 2:
        raise COMMAND_LINE.mistake("", "expected no more than a port and a key")
    if words and not PORT.fits(words[0]):
        raise COMMAND_LINE.mistake("port", f"expected {PORT.words}, before the key")
    options.update(zip(("port", "api_key"), words))
    path = find_file(options, environ)
    file = Source(path or "", os.path.dirname(path or ""), environ)
    content = file.read(file_keys()) if path else {}
    if find_setting("tls_cert", options, environ):
        content.pop("tls_key", None)  # it belongs to the file's own certificate
    config = Config(path=path, notes=[], verbose="verbose" in options)
    defaults = Server.__init__.__kwdefaults__ or {}
    for name in SETTINGS:
        value = find_setting(name, options, environ, content)
        setattr(config, name, defaults.get(name) if value is None else value)
    config.port = int(config.port)
    config.listen = config.listen.strip("[]")
    retired = sorted(RETIRED_LIMITS & content.get("limits", {}).keys())
    if retired:
        config.notes.append(f"no longer settings, ignored: {', '.join(retired)}")
    config.limits = read_limits(content)
    entries = content.get("controllers", [])
    if config.tape:
        entries.append({"type": "tape", **tape_arguments(config.tape)})
        config.tape = None  # it is one of the controllers
    key = environ.get("OPENAI_API_KEY")
    if key and all(entry.get("type") == "tape" for entry in entries):
        upstream = upstream_from_environment(environ)
        entries.append({"name": "openai-1", "config": upstream})
        note = "controller openai-1 from OPENAI_API_KEY in the environment"
        config.notes.append(note)
    config.controllers = read_controllers(file, entries, environ)
    if key and all(c.get("api_key") != key for c in config.controllers):
        config.notes.append(f"OPENAI_API_KEY is not used: {path} has controllers")
    if config.tls_key and not config.tls_cert:
        raise ConfigurationError("tls_key: expected a tls_cert, too")
    if not config.api_key:
        raise ConfigurationError(
            "there is no API key: run python3 chatgpt_apiserver.py 8080 <your own key>,"
            ' set API_KEY, or write "api_key" into chatgpt-apiserver.json'
        )
    return config


def read_limits(content: JSONObject) -> Limits:
    """Return the limits in a configuration file's content."""
    limits = content.get("limits", {})
    return Limits(**{k: v for k, v in limits.items() if k not in RETIRED_LIMITS})


def find_file(options: dict[str, str], environ: Environ) -> str | None:
    """Find the configuration file: the one named, else the first in a folder."""
    name = "chatgpt-apiserver.json"
    path: str | None = find_setting("config_file", options, environ)
    folder = find_setting("config_path", options, environ)
    if folder and not os.path.isdir(folder):
        raise ConfigurationError("config_path: expected a folder that exists")
    if path and ("config_file" in options or "config_path" not in options):
        return path
    folders = [folder or ".", ".", ".config", "config", "/etc/chatgpt-apiserver"]
    paths = [os.path.normpath(os.path.join(folder, name)) for folder in folders]
    # A folder of that name counts, and fails to open: docker makes one if the file
    # to be mounted is missing.
    return next(filter(os.path.lexists, paths), None)


def read_controllers(
    file: Source, entries: list[Any], environ: Environ
) -> list[JSONObject]:
    """Return make_controller()'s arguments for each entry, with unique names."""
    result: dict[str, JSONObject] = {}
    for index, entry in enumerate(entries):
        place = f"controllers[{index}]"
        is_tape = entry.get("type") == "tape"
        name = entry.setdefault("name", "tape" if is_tape else f"openai-{index + 1}")
        if name == MockController.type:
            text = f'expected another name: "{name}" is reserved for the mock models'
            raise file.mistake(f"{place}.name", text)
        if name in result:
            text = f"controllers[{list(result).index(name)}] has the same name"
            raise file.mistake(f"{place}.name", text)
        if is_tape:
            if "file" not in entry:
                raise file.mistake(f"{place}.file", f"expected {PATH.words}")
            if any(other["type"] == "tape" for other in result.values()):
                raise file.mistake(place, "expected only one tape")
            result[name] = entry
        else:
            config = read_upstream(file, entry, place)
            result[name] = controller_arguments({**entry, **config}, environ)
    return list(result.values())


def read_upstream(file: Source, entry: dict[str, Any], place: str) -> dict[str, Any]:
    """Return a controller's "config", inline or from its "config_file"."""
    config = entry.pop("config", None)
    path = entry.pop("config_file", None)
    if (config is None) == (path is None):
        raise file.mistake(place, 'expected either "config" or "config_file"')
    place = f"{place}.config"
    if config is None:
        file, place = Source(path, file.folder, file.environ), ""
        config = file.read(CONFIG_KEYS)
    if "api_key" not in config:
        words = CONFIG_KEYS["api_key"].words
        raise file.mistake(f"{place}.api_key", f"expected {words}, got nothing")
    return dict(config)


def upstream_from_environment(environ: Environ) -> JSONObject:
    """Return the "config" from OPENAI_API_KEY and OPENAI_BASE_URL."""
    names = {"api_key": "OPENAI_API_KEY", "base_url": "OPENAI_BASE_URL"}
    return {
        key: ENVIRONMENT.check(environ[name], CONFIG_KEYS[key], name)
        for key, name in names.items()
        if environ.get(name)
    }


def controller_arguments(settings: JSONObject, environ: Environ) -> JSONObject:
    """Return make_controller()'s arguments, equal for equal settings."""
    arguments = {"type": "openai", **settings}
    url = arguments.get("base_url", UPSTREAM_URLS[arguments["type"]])
    proxy = arguments.get("proxy") or environment_proxy(url, environ)
    return {**arguments, "proxy": proxy and proxy.rstrip("/")}


def make_controller(arguments: dict[str, Any], limits: Limits) -> Controller:
    """Create the controller that read_controllers() describes."""
    options = {key: value for key, value in arguments.items() if key != "type"}
    return CONTROLLER_TYPES[arguments["type"]](**options, limits=limits)


def environment_proxy(url: str, environ: Environ) -> str | None:
    """Return the proxy of an https URL by https_proxy and no_proxy, as urllib does."""
    proxy = environ.get("https_proxy", environ.get("HTTPS_PROXY", ""))
    scheme, host = urllib.parse.urlsplit(url.lower())[:2]
    if not proxy or scheme != "https":
        return None
    without = environ.get("no_proxy", environ.get("NO_PROXY", "")).lower()
    names = [f".{host}", "." + re.sub(":[0-9]*$", "", host)]
    suffixes = [name.strip().lstrip(".") for name in without.split(",") if name.strip()]
    if without == "*" or any(n.endswith(f".{s}") for n in names for s in suffixes):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    return str(ENVIRONMENT.check(proxy, CONFIG_KEYS["proxy"], "https_proxy"))


# --- The agent's command line


def agent_controllers(
    options: dict[str, str], names: list[str], environ: Environ
) -> tuple[list[Controller] | None, Limits]:
    """Return what an agent serves, None for whatever runs here, and its limits."""
    limits = DEFAULT_LIMITS
    if len({"upstream", "command", "config_file"} & options.keys()) > 1:
        text = "expected only one of --upstream, --command and --config_file"
        raise COMMAND_LINE.mistake("", text)
    if "command" in options:
        import shlex
        import shutil

        arguments = shlex.split(options["command"])
        if not arguments or shutil.which(arguments[0]) is None:
            raise COMMAND_LINE.mistake("command", "there is no such program in PATH")
        name = os.path.basename(arguments[0])
        function = command_model(arguments, "json" in options)
        return [FunctionController(function, name=name, models=names or [name])], limits
    if "config_file" in options:
        path = COMMAND_LINE.check(options["config_file"], FILE, "config_file")
        file = Source(path, os.path.dirname(path), environ)
        content = file.read(file_keys())
        limits = read_limits(content)
        described = read_controllers(file, content.get("controllers", []), environ)
        if not described:
            raise file.mistake("controllers", "expected at least one")
    elif "upstream" in options:
        url = options["upstream"].rstrip("/")
        url = url if "://" in url else f"http://{url}"
        url = COMMAND_LINE.check(url, CONFIG_KEYS["base_url"], "upstream")
        parts = urllib.parse.urlsplit(url)
        settings = {"name": parts.netloc, "models": names or None}
        settings["base_url"] = url if parts.path else f"{url}/v1"
        settings["api_key"] = options.get("upstream_key", "")
        described = [controller_arguments(settings, environ)]
    else:
        return None, limits
    return [make_controller(arguments, limits) for arguments in described], limits


def build_agent(argv: list[str], environ: Environ, log: Log | None = None) -> Agent:
    """Create the agent of a command line.  Raise ConfigurationError."""
    urls, options = read_arguments(argv, AGENT_HELP, ("json", "pause"))
    concurrency = options.get("max_concurrency", "8")
    if not re.fullmatch("[1-9][0-9]{0,3}", concurrency):
        text = "expected a number from 1 to 9999"
        raise COMMAND_LINE.mistake("max-concurrency", text)
    key = options.get("key") or environ.get("API_KEY", "")
    if key and not is_key(key):
        text = "expected a token: printable ASCII, no space or newline"
        raise COMMAND_LINE.mistake("key", text)
    if any(not set(url) & set(":/.") for url in urls[1:]):
        text = "expected URLs, such as http://my-server:8080; a key goes after --key"
        raise COMMAND_LINE.mistake("", text)
    names = [n for name in options.get("models", "").split(",") if (n := name.strip())]
    checked = {
        name: COMMAND_LINE.check(options[name], shape, name.replace("_", "-"))
        for name, shape in (("name", NAME), ("ca_file", CA_FILE))
        if options.get(name)
    }
    try:
        controllers, limits = agent_controllers(options, names, environ)
        return Agent(
            *urls,
            key=key,
            paused="pause" in options,
            controllers=controllers,
            limits=limits,
            models=names or None,
            max_concurrency=int(concurrency),
            log=log,
            verbose="verbose" in options,
            **checked,
        )
    except ValueError as error:
        raise COMMAND_LINE.mistake("", str(error)) from None


# --- The program


TRY_TEXT = """

Try it:
  curl {url}/v1/chat/completions -H 'Authorization: Bearer <API_KEY>' \\
    -d '{{"model": "mock/echo", "messages": [{{"role": "user", "content": "Hello"}}]}}'
"""
JOIN_TEXT = """
To add {where} machine's models (Ollama, llama.cpp, vLLM, LM Studio), run on it:
  curl -fsS {url}/agent.py | python3 - agent {url} --key TOKEN
  (TOKEN: an agent's token, or the API key)
  (SHA-256 of agent.py: {digest})
"""


def start_screen(server: Server, config: Config) -> str:
    """Return the start screen: where it listens, and what to do next."""
    url = server.url
    kinds = [c for c in server.pool.controllers if not c.by_name_only]
    names = shortened((f"{c.name} (weight {c.weight:g})" for c in kinds), 20)
    away = url
    if config.listen in ("0.0.0.0", "::"):
        away = re.sub(r"//.*:", f"//{socket.gethostname()}:", url)
    opening = "   (this machine only; --listen 0.0.0.0 opens it)"
    if config.listen:
        opening = "" if away == url else f"   (from elsewhere: {away})"
    facts = {
        "Base URL": f"{url}/v1   for any OpenAI client",
        "Page": f"{url}   in a browser" if config.page else "",
        "Agents": f"{url.replace('http', 'ws', 1)}/client/register",
        "Controllers": names or "none yet: connect an agent, set OPENAI_API_KEY,",
        "": "" if names else "or write a chatgpt-apiserver.json",
        "Tape": server.pool.tape,
        "Users": f"the API key, and {len(server.users.users)} in {config.users}",
        "Settings": config.path,
    }
    lines = [
        f"chatgpt_apiserver {__version__} listens on {url}{opening}",
        "An OpenAI-compatible API in front of upstreams, agents and Python functions.",
        "",
        *(f"  {name:12} {fact}" for name, fact in facts.items() if fact),
        *(f"  Note         {note}" for note in config.notes),
        *(f"  WARNING      {warning}" for warning in warnings(config)),
    ]
    where, digest = "another" if config.listen else "this", own_source()[1]
    mocked = any(c.type == MockController.type for c in server.pool.reachable)
    try_it = TRY_TEXT.format(url=url) if mocked else "\n"
    join = JOIN_TEXT.format(where=where, url=away, digest=digest) if digest else ""
    return "\n".join(lines) + try_it + join


def warnings(config: Config) -> list[str]:
    """Return the dangers of a configuration."""
    is_open = not is_loopback(config.listen or "localhost")
    lines = []
    if is_open and not config.tls_cert:
        lines.append("KEYS AND PROMPTS TRAVEL UNENCRYPTED: use --tls-cert or a proxy")
    if is_open and config.agents_auth == "open":
        lines.append("ANYBODY CAN JOIN AS AGENT AND READ PROMPTS (agents.auth: open)")
    names = [c["name"] for c in config.controllers if not c.get("verify", True)]
    return [*lines, *(f"{n} ACCEPTS ANY CERTIFICATE (verify: false)" for n in names)]


def build_server(config: Config, log: Log) -> Server:
    """Create the server that a configuration describes."""
    settings = {name: getattr(config, name) for name in SETTINGS}
    server = Server(**settings, limits=config.limits, log=log, verbose=config.verbose)
    update_controllers(server, [], config)
    return server


def update_controllers(server: Server, old: list[Any], config: Config) -> None:
    """Replace the old controllers by a configuration's; equal ones stay."""
    gone = {each["name"] for each in old if each not in config.controllers}
    removed = [c for c in server.pool.controllers if c.name in gone]
    for controller in removed:
        server.pool.remove(controller)
        server.ledger.forget_controller(controller.name)
        controller.close()
    for arguments in config.controllers:
        if arguments not in old:
            controller = make_controller(arguments, config.limits)
            # The last one counts: that with the same name, if there is one.
            for known in sorted(removed, key=lambda c: c.name == controller.name):
                controller.inherit(known)
            server.add(controller)


class Program:
    """A server or an agent as a process, with its log and signals.

    signals  handlers, by the signal's name
    """

    def __init__(self, service: Server | Agent, log: Log) -> None:
        self._service = service
        self._log = log
        hang_up = getattr(signal, "SIGHUP", signal.SIGTERM)
        ignored = signal.getsignal(hang_up) is signal.SIG_IGN  # under nohup
        self.signals: dict[str, Callable[[], None]] = {
            name: functools.partial(self._stop, name)
            for name in ("SIGINT", "SIGTERM", *([] if ignored else ["SIGHUP"]))
        }

    async def run(self) -> None:
        """Serve until a signal ends it."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: self._log_error(**context))
        for number in signal.Signals:
            if number.name in self.signals:
                act = self.signals[number.name]
                try:
                    loop.add_signal_handler(number, act)
                except NotImplementedError:  # Windows
                    signal.signal(
                        number, lambda *_, act=act: loop.call_soon_threadsafe(act)
                    )
        handler = LogHandler(self._log)
        logger.addHandler(handler)
        logger.propagate = False
        try:
            await self._serve()
        finally:
            logger.removeHandler(handler)
            logger.propagate = True
        self._log.report("stopped")
        self._log.flush()

    async def _serve(self) -> None:
        await self._service.serve_forever()

    def _stop(self, name: str) -> None:
        if self._service.ending:
            self._log.report(f"ending at once ({name})")
        else:
            self._log.report(f"shutting down ({name}); a second signal ends it at once")
        self._service.request_shutdown()

    def _log_error(self, message: str, exception: Any = None, **_: Any) -> None:
        cause = f": {type(exception).__name__}" if exception else ""
        self._log.report(message + cause)


class ServerProgram(Program):
    """The server as a process, with its start screen and reloads."""

    def __init__(self, argv: list[str], log: Log) -> None:
        self._argv = argv
        self._config = config = load_config(argv, os.environ)
        self._fixed = fixed_settings(config)  # in force until the next start
        self._server = build_server(config, log)
        super().__init__(self._server, log)
        self._terminals = [fd for fd in (0, 2) if is_terminal(fd)]
        self.signals["SIGHUP"] = self._hang_up

    async def _serve(self) -> None:
        await self._server.start()
        for line in start_screen(self._server, self._config).split("\n"):
            self._log.write(line)
        await super()._serve()

    def _hang_up(self) -> None:
        """Reload on SIGHUP; shut down if it comes from a closed terminal."""
        if not all(map(is_terminal, self._terminals)):
            self._stop("SIGHUP")
            return
        try:
            self._reload()
        except ConfigurationError as error:
            self._log.report(f"configuration not reloaded: {error}")

    def _reload(self) -> None:
        """Read the configuration again, and apply what needs no restart.

        After a ConfigurationError nothing has changed.
        """
        new, old = load_config(self._argv, os.environ), self._config
        server = self._server
        if old.path and old.path != new.path and not os.path.lexists(old.path):
            # Do not fall back to a file in a later folder, or to none.
            raise ConfigurationError(f"{old.path} is not there")
        tape: TapeController | None = None  # a new one
        for arguments in new.controllers:
            if arguments["type"] == "tape" and arguments not in old.controllers:
                tape = cast(TapeController, make_controller(arguments, new.limits))
                tape.load()  # refused before anything changes
        try:
            server.load_certificate()
        except OSError as error:
            self._log.report(f"certificate not reloaded: {error}")
        fixed, limits = fixed_settings(new), vars(new.limits)
        # Everything shares one Limits object: change it in place.
        new.limits = old.limits
        vars(new.limits).clear()
        vars(new.limits).update(limits)
        server.keyless_agents = new.agents_auth
        server.upstream_errors = new.upstream_errors
        server.page = new.page
        server.users.store = new.store
        limit = new.default_limit
        server.default_quotas = parse_quotas(limit) if limit else []
        server.pool.type = new.pool
        server.pool.affinity = new.affinity
        update_controllers(server, old.controllers, new)
        if tape is not None and server.pool.tape is not None:
            server.pool.tape.listed = tape.listed  # it reads its file when asked
        self._config = new
        names = ", ".join(controller["name"] for controller in new.controllers)
        self._log.report(f"configuration reloaded; controllers: {names or 'none'}")
        later = [place for place in fixed if fixed[place] != self._fixed[place]]
        if later:
            self._log.report(f"only a restart changes {', '.join(later)}")


def fixed_settings(config: Config) -> dict[str, Any]:
    """Return what only a restart changes, by place in the file."""
    fixed = {s.place or n: getattr(config, n) for n, s in SETTINGS.items() if s.restart}
    return {**fixed, "limits.connections": config.limits.connections}


def is_terminal(fd: int) -> bool:
    """Whether a file descriptor is a terminal that still exists."""
    try:
        return os.isatty(fd) and os.ttyname(fd) != ""
    except (OSError, AttributeError):
        return False


def raise_file_limit() -> None:
    """Allow as many open files as the system permits: each connection is one."""
    if os.name == "posix":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        # macOS refuses its own hard limit.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def tune_garbage_collector() -> None:
    """Collect garbage less often: 5 % less CPU time for each request."""
    gc.freeze()  # what exists now stays for good: no full collection need look at it
    gc.set_threshold(5_000, 20, 20)


def main(argv: list[str] | None = None) -> int:
    """Run a command line.  Return 0 after a shutdown, 2 for a mistake, else 1."""
    try:
        arguments = sys.argv[1:] if argv is None else argv
        log = Log()
        if arguments[:1] == ["agent"]:
            agent = build_agent(arguments[1:], os.environ, log)
            program = Program(agent, log)
            program.signals["SIGUSR1"] = lambda: agent.pause(not agent.paused)
        else:
            program = ServerProgram(arguments, log)
        raise_file_limit()
        tune_garbage_collector()
        asyncio.run(program.run())
    except (ConfigurationError, OSError) as error:
        text = re.sub(r"^\[Errno -?[0-9]+\] ", "", str(error))
        print(f"chatgpt_apiserver: {text}", file=sys.stderr)
        return 2 if isinstance(error, ConfigurationError) else 1
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
