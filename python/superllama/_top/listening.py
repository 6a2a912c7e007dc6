"""Where a process listens, by what Linux tells in /proc."""

from __future__ import annotations

import contextlib
import ipaddress
import sys
from collections.abc import Iterator
from pathlib import Path

from .._errors import Error

PROC = Path("/proc")
LISTENING = "0A"  # the state of a socket, in the tables of the kernel


def server_url(pid: int, proc: Path = PROC) -> str:
    """The address at which a server answers. Raises: Error where its process listens nowhere, or on several ports."""
    process = proc / str(pid)
    try:
        sockets = set(_sockets(process / "fd"))
        found = sorted({_url(address) for address, inode in _listeners(process / "net") if inode in sockets})
    except FileNotFoundError as e:
        raise Error(f"--pid {pid}: there is no such process here; try --url http://HOST:PORT") from e
    except PermissionError as e:
        raise Error(f"--pid {pid}: it is another user's process; try --url http://HOST:PORT") from e
    if not found:
        raise Error(f"--pid {pid}: this process listens on no TCP port; a superllama-server does once it has begun")
    if len(found) > 1:
        raise Error(f"--pid {pid}: this process listens on {len(found)} ports; choose one: --url {' or '.join(found)}")
    return found[0]


def _sockets(descriptors: Path) -> Iterator[str]:
    """The inodes of a process's sockets."""
    for descriptor in descriptors.iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            kind, _, inode = str(descriptor.readlink()).partition(":")
            if kind == "socket":
                yield inode.strip("[]")


def _listeners(tables: Path) -> Iterator[tuple[str, str]]:
    """Address and inode of every socket that listens, in the network that the process sees."""
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            for line in (tables / name).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTENING:
                    yield fields[1], fields[9]


def _url(listener: str) -> str:
    """Of an address as the kernel writes it: words in the processor's order of bytes, a colon, the port."""
    words, port = listener.split(":")
    raw = b"".join(int(words[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(words), 8))
    address = ipaddress.ip_address(raw)
    if address.is_unspecified:  # it listens on every address, this one among them
        address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    host = f"[{address}]" if address.version == 6 else str(address)
    return f"http://{host}:{int(port, 16)}"
