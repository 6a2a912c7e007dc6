"""The address of a server, by the number of its process."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

from superllama import cli
from superllama._top.listening import server_url

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")

LISTENER = """
import socket, sys
sockets = []
for host in sys.argv[1:]:
    sockets.append(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
    sockets[-1].bind((host, 0))
    sockets[-1].listen()
print(*(s.getsockname()[1] for s in sockets), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("127.0.0.2", "127.0.0.2"), ("::1", "[::1]")],
)
def test_the_port_of_a_process(host: str, url: str) -> None:
    with listening(host) as process:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        if not port and ":" in host:
            pytest.skip("there is no IPv6 here")
        assert server_url(process.pid) == f"http://{url}:{port}"


def test_a_process_without_a_port_or_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    with listening() as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert cli.main(["top", "--pid", str(process.pid)]) == 1
        assert "listens on no TCP port" in capsys.readouterr().err
    with listening("127.0.0.1", "127.0.0.1") as process:
        assert process.stdout is not None
        ports = process.stdout.readline().split()
        assert cli.main(["top", "--pid", str(process.pid)]) == 1
        err = capsys.readouterr().err
        assert "listens on 2 ports" in err and all(f"http://127.0.0.1:{port}" in err for port in ports)
    assert cli.main(["top", "--pid", str(process.pid)]) == 1
    assert "no such process" in capsys.readouterr().err


@contextlib.contextmanager
def listening(*hosts: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", LISTENER, *hosts]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()
