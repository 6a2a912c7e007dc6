"""A short run of the fuzzer of RPC messages."""

from __future__ import annotations

from pathlib import Path

from fuzz.rpc_messages import fuzz, hashes_in
from rpc_devices import rpc_server
from tiny_model import write_llama

N_MESSAGES = 300
SECRET = b"an orange and 3 lemons"


def test_broken_messages() -> None:
    with rpc_server() as server:
        assert fuzz(server, 1, lambda n: n < N_MESSAGES) >= N_MESSAGES


def test_broken_proofs(tmp_path: Path) -> None:
    """And what somebody sends who knows the secret, to a server that has files of its own."""
    (tmp_path / "secret").write_bytes(SECRET)
    write_llama(tmp_path / "model.gguf")
    flags = ("--rpc-secret", tmp_path / "secret", "--model-dir", tmp_path)
    with rpc_server(1, *flags, SUPERLLAMA_CACHE=str(tmp_path)) as server:
        hashes = hashes_in(tmp_path)
        assert hashes
        assert fuzz(server, 1, lambda n: n < N_MESSAGES, SECRET, hashes) >= N_MESSAGES
