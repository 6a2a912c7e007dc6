"""What the fuzzers share: numbered cases and their outcomes, the memory of a process, the command line.

    python tests/fuzz/fuzz_http.py --minutes 60                          # as long as that, from seed 1
    python tests/fuzz/fuzz_http.py --seed 7 --only 1234                  # one case again
    python tests/fuzz/fuzz_http.py --seed 7 --only 1234 --keep folder    # and its files and logs are kept there

Case number N of a seed is always the same. What ends wrong is printed with its number and what was tried.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import multiprocessing
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

PATIENCE_S = 60  # a case takes milliseconds, and a busy machine is not a hundred times slower
WARM_UP = 100  # cases after which a process has its caches, and the allocator the heaps it keeps
GROWTH_MIB = 400  # threads keep heaps that large requests left
GIANT_MIB = 1000  # what a single case may take for a while


@dataclasses.dataclass
class Outcome:
    number: int
    verdict: str  # "ok": it was accepted, and works; "refused": an error that gives a reason; else it is wrong
    memory_mib: int
    milliseconds: int
    reason: str
    what: str

    @property
    def wrong(self) -> bool:
        return self.verdict not in ("ok", "refused")


class Fuzzer(Protocol):
    def run(self, number: int) -> Outcome: ...

    def close(self) -> None: ...


def generator(seed: int, number: int) -> random.Random:
    """The random numbers of a case."""
    return random.Random(seed * 1_000_003 + number)


def outcomes(fuzzer: Fuzzer, numbers: Iterable[int], seconds: float) -> Iterator[Outcome]:
    """Of these cases, until the time is over."""
    end = time.monotonic() + seconds
    for number in numbers:
        yield fuzzer.run(number)
        if time.monotonic() > end:
            return


def check(fuzzer: Fuzzer, n_cases: int, seconds: float) -> None:
    """What a test of a fuzzer is: nothing ends wrong, and there are inputs of both kinds."""
    try:
        tried = list(outcomes(fuzzer, range(n_cases), seconds))
    finally:
        fuzzer.close()
    wrong = [str(o)[:1000] for o in tried if o.wrong]
    assert not wrong, "\n".join([f"{len(wrong)} ended wrong:", *wrong[:10]])
    assert {o.verdict for o in tried} == {"ok", "refused"}, "one kind of answer only"


# ---------------------------------------------------------------- memory


class Memory:
    """What a process has of it, from case to case. Says nothing where there is no /proc."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")
        self._n_cases = 0
        self._first = self.resident_mib = 0

    def wrong(self) -> str | None:
        """After a case: whether it took too much, or all of them together did."""
        try:
            text = (self._folder / "status").read_text()
            (self._folder / "clear_refs").write_text("5")  # the peak begins anew
        except OSError:
            return None
        kib = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines() if line.startswith("Vm")}
        if "VmRSS" not in kib:
            return None
        before, self.resident_mib = self.resident_mib, kib["VmRSS"] >> 10
        self._n_cases += 1
        if self._n_cases > 1 and (kib["VmHWM"] >> 10) - before > GIANT_MIB:
            return f"giant: {kib['VmHWM'] >> 10} MiB after {before} MiB"
        if self._n_cases <= WARM_UP:
            self._first = max(self._first, self.resident_mib)
        elif self.resident_mib - self._first > GROWTH_MIB:
            return f"grew from {self._first} to {self.resident_mib} MiB in {self._n_cases} cases"
        return None


# ---------------------------------------------------------------- cases in a process of their own

Say = Callable[[str], None]
Cases = Callable[[random.Random, Say], tuple[str, str]]  # says what it tries; returns a verdict and a reason


def _serve(pipe: Connection, log: Path, make: Callable[..., Cases], arguments: tuple[Any, ...], seed: int) -> None:
    with log.open("wb", 0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    cases = make(*arguments)
    pipe.send(None)
    while (number := pipe.recv()) is not None:
        try:
            answer = cases(generator(seed, number), lambda what: pipe.send((what,)))
        except Exception as e:  # of a kind that the case does not expect
            answer = f"raised {type(e).__name__}", f"{e}\n{traceback.format_exc(limit=-3)}"
        pipe.send(answer)


class Isolated:
    """Runs cases in a Python process that may end: it is replaced then, and the case is to blame.

    `make` is a class, or a function at the top of a module: called there with `arguments`, it returns the cases.
    """

    def __init__(self, seed: int, folder: Path, make: Callable[..., Cases], *arguments: object) -> None:
        self.seed = seed
        self._log = folder / "process.log"
        self._make, self._arguments = make, arguments
        self._process: Any = None

    def run(self, number: int) -> Outcome:
        if self._process is None:
            self._start()
        begin, what = time.monotonic(), ""
        self._pipe.send(number)
        answer: Any = None
        while self._pipe.poll(PATIENCE_S):
            try:
                answer = self._pipe.recv()
            except EOFError:
                answer = self._ended()
            if len(answer) == 2:
                break
            what = answer[0]
        else:
            self._process.kill()
            answer = "hang", self._ended()[1]
        memory = 0
        if self._process is not None:
            wrong = self._memory.wrong()
            memory = self._memory.resident_mib
            if wrong:
                answer = "memory", wrong
                self.close()
        return Outcome(number, answer[0], memory, int(1000 * (time.monotonic() - begin)), answer[1], what)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit the libraries' threads, half of them
        self._pipe, other = context.Pipe()
        arguments = (other, self._log, self._make, self._arguments, self.seed)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        other.close()
        if not self._pipe.poll(10 * PATIENCE_S):
            raise RuntimeError("the process of the cases does not start")
        try:
            self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"the process of the cases ended: {self._ended()}") from None
        self._memory = Memory(self._process.pid)

    def _ended(self) -> tuple[str, str]:
        self._process.join()
        code = self._process.exitcode
        self._process = None
        return f"ended with {code}", last_lines(self._log)

    def close(self) -> None:
        if self._process is not None:
            self._pipe.send(None)
            self._process.join(PATIENCE_S)
            self._process.kill()
            self._process.join()
            self._process = None


def last_lines(log: Path, n: int = 400) -> str:
    """Where a process that ended says why: a failed assertion, the end of an exception."""
    text = log.read_text(errors="replace")
    at = text.rfind("GGML_ASSERT")
    at = at if at >= 0 else text.rfind("terminate called")
    return text[at : at + n] if at >= 0 else text[-n:]


# ---------------------------------------------------------------- command line


def command_line(description: str, make: Callable[[int, Path], Fuzzer]) -> int:
    """`make` gets a seed and a folder. Returns 1 where something ended wrong."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--cases", type=int, default=0, help="stop after so many, 0 for as many as there is time for")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, help="run this case, and print its outcome")
    parser.add_argument("--keep", type=Path, help="an empty folder for files and logs, which stay there")
    arguments = parser.parse_args()

    first, end = arguments.first, arguments.first + (arguments.cases or sys.maxsize >> 1)
    if arguments.only is not None:
        first, end = arguments.only, arguments.only + 1
    counts: collections.Counter[str] = collections.Counter()
    n_wrong = 0
    with contextlib.nullcontext(arguments.keep) if arguments.keep else scratch() as folder:
        folder.mkdir(parents=True, exist_ok=True)
        fuzzer = make(arguments.seed, folder)
        try:
            for outcome in outcomes(fuzzer, range(first, end), 60 * arguments.minutes):
                counts[outcome.verdict] += 1
                n_wrong += outcome.wrong
                if outcome.wrong or arguments.only is not None:
                    print(outcome, flush=True)
        finally:
            fuzzer.close()
    print(f"{counts.total()} cases of seed {arguments.seed}: {dict(counts)}; {n_wrong} ended wrong")
    return 1 if n_wrong else 0


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for a while, that is no disk where there is such a thing."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        yield Path(folder)
