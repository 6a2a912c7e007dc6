"""Examples in Markdown pages and notebooks: found, and run as a reader would, from the first to the last.

A page is run in a folder of its own. Its Python blocks share one interpreter, its shell blocks one working directory.
What a reader has and a test has not is stood in for: `model.gguf` is the demo model with a template that shows tools,
`embedding.gguf`, `reranker.gguf` and the projector `mmproj.gguf` are tiny random ones, `photo.png` and `speech.wav` are
there, ollama has pulled llama3.2:3b, and the ports that the page names are free ones.

A comment in the line before a block says what is special about it:

    <!-- serves: 8080 -->                                     runs on in the background, until the page ends
    <!-- needs: openai -->                                    is run where that Python package is
    <!-- not run: needs a card -->                            is not run; the reason is one of REASONS
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

from rpc_devices import free_port, listens
from serving import healthy

REASONS = (
    "needs the network",
    "needs a compiler, and minutes",
    "needs a card",
    "needs a second machine",
    "needs several models",
)
RUN = ("python", "sh")
SHOWN = ("text", "json", "xml", "yaml", "ini", "toml")
TIMEOUT_S = 120
PORTS = ("8080", "50052")  # that pages name

_MARK = r"<!-- (?P<mark>[^:\n]+): (?P<word>.*?) -->\n"
_PORT = re.compile(rf"\b(?:{'|'.join(PORTS)})\b")
_BLOCK = re.compile(rf"^(?:{_MARK})?```(?P<language>.*)\n(?P<code>(?s:.*?))^```$", re.MULTILINE)
# a program that reads blocks, and says when each has run
_INTERPRETER = """
import json, sys
names = {"__name__": "__main__"}
for line in sys.stdin:
    code, where = json.loads(line)
    exec(compile(code, where, "exec"), names)
    print("\\0done", flush=True)
"""


@dataclasses.dataclass(frozen=True)
class Block:
    """One block of code; `mark` and `word` are those of the comment before it, if there is one."""

    where: str
    language: str
    code: str
    mark: str | None = None
    word: str = ""


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order, or the cells of a notebook that hold code."""
    if page.suffix == ".ipynb":
        cells = json.loads(page.read_text())["cells"]
        return [
            Block(f"{page.name}, cell {i}", "python", "".join(cell["source"]))
            for i, cell in enumerate(cells)
            if cell["cell_type"] == "code"
        ]
    text = page.read_text()
    return [
        Block(
            f"{page.name}:{text.count(chr(10), 0, match.start('language')) + 1}",
            match["language"],
            match["code"],
            match["mark"],
            match["word"] or "",
        )
        for match in _BLOCK.finditer(text)
    ]


def skipped(block: Block) -> bool:
    """Whether this block is not for this machine."""
    if block.language not in RUN or block.mark == "not run":
        return True
    return block.mark == "needs" and importlib.util.find_spec(block.word) is None


class Page:
    """Runs the blocks of one page; what it started ends with it."""

    def __init__(self, folder: Path, models: Mapping[str, Path], **environment: object) -> None:
        self.folder = folder
        for name, path in models.items():
            (folder / name).symlink_to(path)
        commands = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = {**os.environ, "PATH": commands, **{name: str(value) for name, value in environment.items()}}
        self._ports: dict[str, int] = {}
        self._servers: dict[str, subprocess.Popen[bytes]] = {}
        self._python: subprocess.Popen[str] | None = None
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 # as long as the page runs

    def __enter__(self) -> Page:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.ExitStack() as ended:
            ended.callback(self._errors.close)
            for process in [*self._servers.values(), *([self._python] if self._python else [])]:
                ended.callback(process.wait)
                ended.callback(process.kill)

    def run(self, block: Block) -> str:
        """What the block prints. Raises: AssertionError with its output where it fails."""
        code = self._with_ports(block)
        if block.language == "python":
            return self._run_python(code, block.where)
        if block.mark == "serves":
            self._serve(code, block)
            return ""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, f"{block.where}: {code}\n{done.stdout[-3000:]}"
        return done.stdout

    # ---------------------------------------------------------------- Python

    def _run_python(self, code: str, where: str) -> str:
        if self._python is None:
            self._python = subprocess.Popen(
                [sys.executable, "-c", _INTERPRETER],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
        assert self._python.stdin and self._python.stdout
        self._python.stdin.write(json.dumps([code, where]) + "\n")
        self._python.stdin.flush()
        printed = []
        too_long = threading.Timer(TIMEOUT_S, self._python.kill)
        too_long.start()
        while (line := self._python.stdout.readline()) and not line.endswith("\0done\n"):
            printed.append(line)
        too_long.cancel()
        printed.append(line.removesuffix("\0done\n"))
        self._errors.seek(0)
        errors = self._errors.read()
        assert line and not errors, f"{where}:\n{''.join(printed)}\n{errors[-3000:]}"
        return "".join(printed)

    # ---------------------------------------------------------------- servers

    def _with_ports(self, block: Block) -> str:
        """The code with free ports for those that it names."""
        for port in _PORT.findall(block.code):
            self._ports.setdefault(port, free_port())
        return _PORT.sub(lambda match: str(self._ports[match[0]]), block.code)

    def _serve(self, code: str, block: Block) -> None:
        """Start a program that goes on; one that had the port before ends. Ready when it answers there."""
        if before := self._servers.pop(block.word, None):
            before.kill()
            before.wait()
        log = self.folder / f"log-{block.word}"
        with log.open("wb") as out:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {code}"], cwd=self.folder, env=self.environment, stdout=out, stderr=out
            )
        self._servers[block.word] = process
        until = time.monotonic() + TIMEOUT_S
        port, http = self._ports[block.word], "superllama-server" in code
        while not (healthy(port) if http else listens(port)):
            assert process.poll() is None and time.monotonic() < until, (
                f"{block.where}: {code}\n{log.read_text()[-3000:]}"
            )
            time.sleep(0.05)


def missing_programs(blocks: list[Block]) -> list[str]:
    """Programs that blocks of a shell use and that are no part of superllama, as far as they are not here."""
    used = {name for block in blocks if block.language == "sh" for name in ("curl",) if name in block.code}
    return [name for name in used if shutil.which(name) is None]
