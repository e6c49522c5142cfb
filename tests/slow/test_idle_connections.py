"""Hundreds of connections that do nothing, and clients who ask meanwhile."""

import contextlib
import os
import signal
import socket
import time

import httpx2
from running import ServerProcess, save_tiny


def test_connections_that_do_nothing_shut_no_one_out(tmp_path, tokenizer):
    save_tiny(tmp_path / "small", tokenizer)
    server = ServerProcess(
        f"--checkpoint={tmp_path}/small", "--slots=4", "--max_beams=1", "--max_connections=100"
    )
    try:
        server.wait_ready()
        host, port = server.url.removeprefix("http://").split(":")
        asked = {"model": "small", "prompt": "a", "max_tokens": 4}
        with contextlib.ExitStack() as stack:
            for number in range(400):
                connection = socket.create_connection((host, int(port)))
                stack.enter_context(connection)
                # A reset says that it was closed already.
                with contextlib.suppress(OSError):
                    connection.sendall(b"GET / HTTP/1.1\r\n" if number % 2 else b"G")
            for _ in range(5):
                began = time.monotonic()
                answered = httpx2.post(server.url + "/v1/completions", json=asked, timeout=60)
                assert answered.status_code == 200
                assert time.monotonic() - began < 10
            assert len(os.listdir(f"/proc/{server.process.pid}/fd")) < 250
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(30) == 0
            assert time.monotonic() - began < 20
        lines = [x for x in server.process.stderr.read().splitlines() if "connections" in x]
        assert "more than 100 connections" in lines[0]
        assert len(lines) < 5
    finally:
        server.process.kill()
