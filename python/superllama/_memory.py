"""What memory there is: of the machine, of this process and its limits, and of each device."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from typing import Literal

from ._errors import Error
from ._native import ffi, last_error, lib, text

DeviceKind = Literal["cpu", "gpu", "igpu", "accel", "meta"]

_KINDS: dict[int, DeviceKind] = {
    lib.GGML_BACKEND_DEVICE_TYPE_CPU: "cpu",
    lib.GGML_BACKEND_DEVICE_TYPE_GPU: "gpu",
    lib.GGML_BACKEND_DEVICE_TYPE_IGPU: "igpu",
    lib.GGML_BACKEND_DEVICE_TYPE_ACCEL: "accel",
    lib.GGML_BACKEND_DEVICE_TYPE_META: "meta",
}


@dataclasses.dataclass(frozen=True)
class Memory:
    """A sample of memory, in bytes unless the name says otherwise; 0 = not known on this system.

    Field by field the C struct superllama_memory: `host_*` is what this process may use (the machine's
    memory, or its cgroup's where that is tighter), `machine_*` is the whole machine.
    """

    host_total: int  # what this process may use
    host_available: int  # of that, what can be had without swapping
    machine_total: int  # of the whole machine
    machine_available: int  # of that, what can be had without swapping
    cgroup_limit: int  # the tightest one over this process's cgroup and its parents; 0 = none
    cgroup_used: int  # of that cgroup, without its page cache
    resident: int  # of this process, in memory now
    resident_anon: int  # of that, what no file backs
    resident_file: int  # of that, pages of files
    resident_peak: int  # the most that was resident
    locked_limit: int  # that this process may lock (RLIMIT_MEMLOCK); 2^64 - 1 = no limit
    swap_total: int  # of the machine
    swap_free: int  # of that, what is not used
    read_bytes: int  # that this process has read from storage, ever
    faults_minor: int  # a count: pages that were in memory already
    faults_major: int  # a count: pages that had to be read


@dataclasses.dataclass(frozen=True)
class Device:
    """A device of a backend; memory in bytes."""

    name: str  # as ModelParams(devices=) takes it
    description: str  # what its driver calls it
    kind: DeviceKind  # igpu: shares the host's memory
    backend: str  # the name of the backend that it belongs to
    memory_free: int  # as the device says; 0 = it does not
    memory_total: int  # the same


def memory() -> Memory:
    """The memory of this machine and process, now.

    Raises: Error if the system does not tell.
    """
    sample = ffi.new("struct superllama_memory *")
    if lib.superllama_memory(sample) < 0:
        raise Error(f"cannot read the memory of this machine: {last_error()}")
    return Memory(*(getattr(sample, field.name) for field in dataclasses.fields(Memory)))


def devices() -> list[Device]:
    """The devices of all loaded backends, CPU included."""
    return [_device(lib.ggml_backend_dev_get(i)) for i in range(lib.ggml_backend_dev_count())]


def _device(dev: object) -> Device:
    free, total = ffi.new("size_t *"), ffi.new("size_t *")
    lib.ggml_backend_dev_memory(dev, free, total)
    return Device(
        name=text(lib.ggml_backend_dev_name(dev)),
        description=text(lib.ggml_backend_dev_description(dev)),
        kind=_KINDS[lib.ggml_backend_dev_type(dev)],
        backend=text(lib.ggml_backend_reg_name(lib.ggml_backend_dev_backend_reg(dev))),
        memory_free=free[0],
        memory_total=total[0],
    )


def backends() -> list[str]:
    """The names of the loaded backends."""
    return [text(lib.ggml_backend_reg_name(lib.ggml_backend_reg_get(i))) for i in range(lib.ggml_backend_reg_count())]


def n_physical_cores() -> int:
    """The cores that this process may keep busy, counted once each however many threads they run: those that it may
    run on, and not more than the CPU quota of its cgroups lets it."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    siblings = set()
    for cpu in allowed:
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as f:  # noqa: PTH123
                siblings.add(f.read().strip())
        except OSError:
            siblings.clear()
            break
    n_logical = len(allowed) or os.cpu_count() or 4
    # what llama.cpp takes where it cannot count
    n = len(siblings) or (n_logical if n_logical <= 4 else n_logical // 2)
    return int(lib.superllama_usable_cores(n))


def add_rpc_server(endpoint: str, *, timeout: float = 5.0, rpc_secret: str | os.PathLike[str] | None = None) -> int:
    """Make the devices of an RPC server (superllama-rpc-server) at "host:port" known, for models loaded from now on;
    returns how many it has. `rpc_secret` is a file whose content, 16 to 4096 bytes, the server has too: each side
    proves to the other that it knows it. Nothing is encrypted: use it in a network of your own.

    Raises: Error if no RPC server of this version answers there within `timeout` seconds: nothing does, or something
    else, or a server that another client is using; if it offers no device; if only one side has a secret, or each
    has another one.
    """
    path = ffi.NULL if rpc_secret is None else os.fsencode(rpc_secret)
    if lib.superllama_rpc_secret(endpoint.encode(), path) != 0:
        raise Error(f"RPC server: {last_error()}")
    _ask_rpc_server(endpoint, timeout)
    n = int(lib.superllama_add_rpc_server(endpoint.encode()))
    if n < 0:
        raise Error(f"RPC server: {last_error()}")
    return n


def _ask_rpc_server(endpoint: str, timeout: float) -> None:
    """The library asks a server who it is, too, but with a time-out of its own, and hears no signal meanwhile."""
    host, _, port = endpoint.rpartition(":")
    end = time.monotonic() + timeout
    answer = b""
    try:
        with socket.create_connection((host, int(port)), timeout) as connection:
            connection.sendall(_RPC_HELLO)
            while len(answer) < 12:  # its length, then what it says of itself
                connection.settimeout(max(end - time.monotonic(), 0.001))
                more = connection.recv(64)
                if not more:
                    raise Error(f"{endpoint} closes the connection: it is no RPC server, or one of another version")
                answer += more
            if answer[11:12] and answer[11] & _RPC_SECRET:
                connection.sendall(_RPC_LEFT)  # and no proof: the library gives it
    except TimeoutError as e:
        raise Error(
            f"no RPC server answers at {endpoint!r} within {timeout:g} s; a superllama-rpc-server has one client at a "
            "time: is another one using it?"
        ) from e
    except (OSError, ValueError, OverflowError) as e:
        raise Error(f"no RPC server at {endpoint!r}: {e}; it takes host:port of a superllama-rpc-server") from e
    if answer.startswith(b"HTTP/"):
        raise Error(f"{endpoint} answers in HTTP: it is a web server, not a superllama-rpc-server")


# a command, the length of what follows, no capability
_RPC_SECRET = 2  # rpc_feature in src/io/rpc_meeting.h
_RPC_LEFT = bytes([201])
_RPC_HELLO = bytes([14]) + (24).to_bytes(8, "little") + bytes(24)
