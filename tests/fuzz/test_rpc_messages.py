"""A short run of the fuzzer of RPC messages."""

from __future__ import annotations

from fuzz.rpc_messages import fuzz
from rpc_devices import rpc_server

N_ROUNDS = 150


def test_broken_messages() -> None:
    with rpc_server() as server:
        assert fuzz(server, 1, lambda n: n < N_ROUNDS) == N_ROUNDS
