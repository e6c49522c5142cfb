"""What a client does not finish, hides, or makes too large. No model is needed for any of it."""

import contextlib
import json
import logging
import socket
import threading
import time

import httpx2
import pytest
from served import Served

from glm_jax.serving.connections import ConnectionLimits
from glm_jax.serving.guards import HostError, Hosts, check_proxies
from glm_jax.serving.keys import Keys

SHORT = ConnectionLimits(head_seconds=0.3, body_seconds=0.3, idle_seconds=0.3, stall_seconds=0.3)
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
BODY = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@contextlib.contextmanager
def _serving(**serving):
    may_load = threading.Event()
    served = Served(may_load.wait, **serving)
    try:
        yield served
    finally:
        served.drain()
        served.join()
        may_load.set()


@pytest.fixture(scope="module")
def served():
    limits = ConnectionLimits(idle_seconds=0.2)
    with _serving(connections=limits, cors_origins=["https://example.org"]) as served:
        yield served


def _connect(served):
    host, port = served.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def _rest(connection):
    """What comes until the server closes the connection."""
    pieces = []
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(1 << 16):
            pieces.append(piece)
    return b"".join(pieces)


def _answers_to(served, sent):
    with _connect(served) as connection:
        connection.sendall(sent)
        return _rest(connection)


def _status(response):
    return int(response.split(b" ", 2)[1])


def _error(response):
    return json.loads(response.split(b"\r\n\r\n", 1)[1])["error"]


def _drip(connection, piece):
    """Sends a piece again and again, as long as the server takes it."""
    with contextlib.suppress(OSError):
        while True:
            connection.sendall(piece)
            time.sleep(0.05)


def test_what_a_client_does_not_finish_is_given_up():
    chunked = BODY + b"Transfer-Encoding: chunked\r\n\r\n"
    cases = {
        "nothing": (b"", None, b""),
        "half a line": (b"GET /hea", None, 408),
        "headers without end": (b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"a: b\r\n", 408),
        "no body": (BODY + b"Content-Length: 9\r\n\r\n", None, 408),
        "half a body": (BODY + b"Content-Length: 999\r\n\r\n{", b" ", 408),
        "half a chunk": (chunked + b"5\r\n{", None, 408),
        "chunks without end": (chunked, b"1\r\n \r\n", 408),
        "a body that no one reads": (GET[:-2] + b"Content-Length: 999\r\n\r\n", b" ", 200),
        "no second request": (GET, None, 200),
        "half a second request": (GET + b"GET /", None, 200),
    }
    began = time.monotonic()
    with _serving(connections=SHORT) as served, contextlib.ExitStack() as stack:
        opened = {}
        for name, (sent, dripped, _) in cases.items():
            connection = opened[name] = stack.enter_context(_connect(served))
            connection.sendall(sent)
            if dripped:
                threading.Thread(target=_drip, args=(connection, dripped)).start()
        for name, (_, _, expected) in cases.items():
            answer = _rest(opened[name])
            if expected == b"":
                assert answer == b"", name
            elif answer or expected != 408:  # a reset may overtake it
                assert _status(answer) == expected, name
            if answer and expected == 408:
                assert "within 0.3 seconds" in _error(answer)["message"], name
    assert time.monotonic() - began < 15


def test_headers_are_limited(served):
    many = b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"a: %s\r\n" % (b"x" * 1000) * 20
    assert _status(_answers_to(served, many + b"\r\n")) == 431
    with _connect(served) as connection, contextlib.suppress(OSError):
        for _ in range(300):
            connection.sendall(b"a: %s\r\n" % (b"x" * 1000_000))
        pytest.fail("300 MB of headers were taken")


def test_new_connections_take_the_room_of_those_that_do_nothing(caplog):
    limits = ConnectionLimits(count=4)
    with _serving(connections=limits) as served, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(_connect(served)) for _ in range(12)]
        assert httpx2.get(served.url + "/health").status_code == 200
        assert all(_rest(connection) == b"" for connection in idle[:8])
        idle[-1].sendall(GET)
        assert idle[-1].recv(1 << 16).startswith(b"HTTP/1.1 200")
    lines = [record.getMessage() for record in caplog.records if "connections" in record.message]
    [line] = lines  # and not one for each
    assert line.startswith("more than 4 connections")
    assert "--max_connections" in line


HIDDEN = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(HIDDEN)
CHUNK = b"%x\r\n%s\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN)
UPGRADE = b"Connection: Upgrade\r\nUpgrade: "


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        # A body is a body, whatever is asked for beside.
        (
            BODY + UPGRADE + b"h2c\r\nHTTP2-Settings: AAMAAABk\r\n" + LENGTH + b"\r\n" + HIDDEN,
            [400],
        ),
        (BODY + UPGRADE + b"websocket\r\n" + LENGTH + b"\r\n" + HIDDEN + GET, [400, 200]),
        (BODY + UPGRADE + b"h2c\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNK + GET, [400, 200]),
        # Where a body ends is said once.
        (BODY + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN, [400]),
        (BODY + b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNK, [400]),
        (BODY + b"Content-Length: 0\r\n" + LENGTH + b"\r\n" + HIDDEN, [400]),
        (BODY + b"Content-Length: 0, 43\r\n\r\n" + HIDDEN, [400]),
        (BODY + b"Content-Length: +43\r\n\r\n" + HIDDEN, [400]),
        (BODY + b"Transfer-Encoding: chunked, identity\r\n\r\n" + CHUNK, [400]),
        (BODY + b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNK, [400]),
        (BODY + b"Transfer-Encoding : chunked\r\n\r\n" + CHUNK, [400]),
        (BODY + b"Transfer-Encoding: chunked\r\n\r\n0x2b\r\n" + CHUNK[4:], [400]),
        (BODY + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}XX0\r\n\r\n", [400]),
        # Requests in a row are answered in a row.
        (GET + BODY + LENGTH + b"\r\n" + HIDDEN + GET, [200, 400, 200]),
        (GET * 20, [200] * 20),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", [400]),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [404, 400]),
    ],
)
def test_no_request_hides_in_another(served, sent, statuses):
    answer = _answers_to(served, sent)
    assert [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]] == statuses
    assert b"glm_requests" not in answer


def _get(served, **headers):
    return httpx2.get(served.url + "/v1/models", headers=headers)


def test_requests_name_this_server_and_come_from_no_other_page(served):
    port = served.url.rpartition(":")[2]
    for host in (f"localhost:{port}", "LOCALHOST", "localhost.", "127.0.0.1:1", "[::1]:8000"):
        assert _get(served, host=host).status_code == 200, host
        assert _get(served, host=host, origin=f"http://{host}").status_code == 200, host
    for host in (
        "evil.example",
        "localhost.evil.example",
        "10.0.0.1",
        "localhost@evil.example",
        "evil.example@localhost",
        "localhost/evil.example",
        "localhost?evil.example",
        "[",
    ):
        refused = _get(served, host=host)
        assert refused.status_code == 403, host
        assert "--allowed_host" in refused.json()["error"]["message"]
    assert _get(served, origin="https://example.org").status_code == 200
    for origin in ("https://evil.example", "null", f"http://localhost:{int(port) - 1}"):
        refused = _get(served, host=f"localhost:{port}", origin=origin)
        assert refused.status_code == 403, origin
        assert "--cors_origin" in refused.json()["error"]["message"]
    two = [
        ("Host", "localhost"),
        ("Origin", "https://evil.example"),
        ("Origin", "http://localhost"),
    ]
    assert httpx2.get(served.url + "/v1/models", headers=two).status_code == 403
    assert _answers_to(served, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("host", "more", "known", "unknown"),
    [
        ("127.0.0.1", (), ["127.0.0.1", "localhost", "::1"], ["10.0.0.1", "glm.example"]),
        ("10.0.0.1", (), ["10.0.0.1"], ["localhost", "10.0.0.2"]),
        (
            "0.0.0.0",
            (),
            ["10.0.0.1", "localhost", "fe80::1", socket.gethostname()],
            ["glm.example"],
        ),
        ("::", ("glm.example",), ["::1", "GLM.example"], ["a.glm.example", ""]),
        (
            "glm.example",
            ("*.b.example",),
            ["glm.example", "a.b.example"],
            ["b.example", "ab.example"],
        ),
        ("127.0.0.1", ("*",), ["anything.example"], []),
    ],
)
def test_names_of_a_server(host, more, known, unknown):
    hosts = Hosts.of(host, more)
    bracketed = lambda name: f"[{name}]" if ":" in name else name
    for port in ("", ":8000"):
        assert all(hosts.has(bracketed(name) + port) for name in known)
        assert not any(hosts.has(bracketed(name) + port) for name in unknown)


@pytest.mark.parametrize("address", ["glm.example", "10.0.0.300", "10.0.0.1/8", "*"])
def test_what_is_no_address_of_a_proxy(address):
    with pytest.raises(HostError, match=r"--trusted_proxy=.*: expected an IP address or network"):
        check_proxies([address])


@pytest.mark.parametrize("name", ["http://glm.example", "glm.example:8000", "a/b"])
def test_what_is_no_name_of_a_server(name):
    with pytest.raises(HostError, match=f"--allowed_host={name}: expected a name"):
        Hosts.of("127.0.0.1", [name])


def test_head_is_get_without_the_body(served):
    for path in ("/health", "/ready", "/", "/page/page.js", "/v1/models", "/no", "/tokenize"):
        with_body, without = httpx2.get(served.url + path), httpx2.head(served.url + path)
        assert without.status_code == with_body.status_code, path
        assert with_body.content
        assert without.content == b""
        assert without.headers["content-length"] == with_body.headers["content-length"]


def test_keys_in_any_case_and_script():
    keys = Keys(["plain", "clé", "ключ"])
    with _serving(keys=keys, connections=ConnectionLimits(idle_seconds=0.01)) as served:
        for sent, status in (
            (b"bearer plain", 200),
            (b"BEARER   plain ", 200),
            ("Bearer clé".encode(), 200),
            ("Bearer clé".encode("latin-1"), 200),
            ("Bearer ключ".encode(), 200),
            (b"Bearer cl\xff", 401),
            (b"Bearer ", 401),
            (b"Bearer", 401),
            (b"plain", 401),
            (b"Bearerplain", 401),
        ):
            head = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: "
            assert _status(_answers_to(served, head + sent + b"\r\n\r\n")) == status, sent


def test_who_breaks_off_leaves_no_traceback(served, caplog):
    for sent in (BODY + b"Content-Length: 99\r\n\r\n{", GET[:9], BODY):
        with _connect(served) as connection:
            connection.sendall(sent)
    deadline = time.monotonic() + 10
    while served.connections and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_an_end_waits_for_no_unfinished_request():
    with contextlib.ExitStack() as stack:
        began = time.monotonic()
        with _serving(drain_seconds=60.0) as served:
            sent = (BODY + b"Content-Length: 99\r\n\r\n{", GET[:9], b"", GET)
            opened = [stack.enter_context(_connect(served)) for _ in sent]
            for connection, some in zip(opened, sent, strict=True):
                connection.sendall(some)
            assert opened[-1].recv(1 << 16).startswith(b"HTTP/1.1 200")
        assert time.monotonic() - began < 10
        answers = [_rest(connection) for connection in opened]
        assert _status(answers[0]) == 503
        assert answers[1:3] == [b"", b""]
