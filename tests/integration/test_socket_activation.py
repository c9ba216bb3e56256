"""Sockets of a service manager are used where the configuration has their address, and refused where it has not."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bed.ports import free_port
from tests.bed.waiting import wait_for

pytestmark = pytest.mark.needs("systemd-socket-activate")


def configured(folder: Path, port: int) -> Path:
    path = folder / "relay.toml"
    path.write_text(
        f"""
[server]
hostname = "mx.example.com"
spool = "spool"
workers = 1
[process]
user = ""
hub_user = ""
[[listener]]
name = "mx"
address = "127.0.0.1:{port}"
"""
    )
    return path


def activated(folder: Path, listen: str, config: Path) -> subprocess.Popen[bytes]:
    command = ["systemd-socket-activate", "-l", listen, sys.executable, "-m", "relay", "serve", "--config", config]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, stderr=log, stdout=log, env=os.environ | {"PYTHONUNBUFFERED": "1"})


def greeting(port: int) -> bytes:
    try:
        with socket.create_connection(("127.0.0.1", port), 30) as client:
            client.settimeout(30)
            return client.recv(200)
    except OSError:
        return b""


def test_the_first_client_starts_the_relay_on_the_socket_it_came_to(tmp_path: Path) -> None:
    port = free_port()
    process = activated(tmp_path, f"127.0.0.1:{port}", configured(tmp_path, port))
    try:
        assert wait_for(lambda: greeting(port), "greeting").startswith(b"220 mx.example.com")
        # systemd-socket-activate becomes the relay: the process that it was is the supervisor.
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def test_a_socket_that_no_listener_has_is_an_error_that_names_it(tmp_path: Path) -> None:
    port, other = free_port(), free_port()
    process = activated(tmp_path, f"127.0.0.1:{other}", configured(tmp_path, port))
    try:
        wait_for(lambda: (greeting(other), process.poll() is not None)[1], "end")
        assert process.returncode == 2
        assert re.search(rf"socket 127.0.0.1:{other}: .*no listener has this address", (tmp_path / "log").read_text())
    finally:
        process.kill()
        process.wait()
