"""Block events from text: blkparse's default output and the kernel's own trace format, to one table.

blkparse (%D %2c %8s %5T.%9t %5p %2a %3d, then sector + count [comm]):

    254,0    1       42     0.001234567  4711  D  RA 123456 + 1024 [probe]
    254,0    1       43     0.002345678     0  C  RA 123456 + 1024 [0]

tracefs (block:block_rq_issue and block:block_rq_complete):

    probe-4711  [001] .....  8812.001234: block_rq_issue: 254,0 RA 524288 () 123456 + 1024 none,0,0 [probe]
    <idle>-0    [001] ..s1.  8812.002345: block_rq_complete: 254,0 RA () 123456 + 1024 none,0,0 [0]
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

SECTOR = 512

_BLKPARSE = re.compile(
    r"\s*(?P<dev>\d+,\d+)\s+\d+\s+\d+\s+(?P<time>\d+\.\d+)\s+(?P<pid>\d+)\s+(?P<action>[A-Z]+)\s+(?P<rwbs>[A-Z]+)"
    r"\s+(?P<sector>\d+) \+ (?P<count>\d+)"
)
_TRACEFS = re.compile(
    r".*?-(?P<pid>\d+)\s+\[\d+\]\s+\S+\s+(?P<time>\d+\.\d+): block_rq_(?P<action>issue|complete|requeue): "
    r"(?P<dev>\d+,\d+) (?P<rwbs>[A-Z]+) (?:\d+ )?\(.*?\) (?P<sector>\d+) \+ (?P<count>\d+)"
)
_ACTIONS = {"D": "issue", "C": "complete", "R": "requeue"}


@dataclass
class Request:
    """One read as the block layer sent it to the disk. Times are seconds on the trace's clock."""

    issued: float
    done: float | None  # None: its completion was not seen
    offset: int  # bytes on the disk
    n_bytes: int
    pid: int  # who issued it: the reader, or a kernel thread on its behalf
    rwbs: str  # R, RA (read-ahead), RM (metadata), ...


@dataclass
class Requests:
    """Reads in order of issue, each with its completion."""

    reads: list[Request]
    requeued_bytes: int = 0  # issued, refused by the full device, issued again: counting issues counts them twice
    lost: int = 0  # events that the tracer dropped; then the trace is a sample and no count of bytes


def parse(lines: Iterable[str], device: str | None = None) -> Requests:
    """device: "254,0", None = all. Lines that are no event of a read are skipped."""
    requests: list[Request] = []
    requeued = 0
    open_at: dict[int, deque[Request]] = {}
    for line in lines:
        match = _BLKPARSE.match(line) or _TRACEFS.match(line)
        action = _ACTIONS.get(match["action"], match["action"]) if match else ""
        if match is None or action not in ("issue", "complete", "requeue"):
            continue
        if "R" not in match["rwbs"] or (device is not None and match["dev"] != device):
            continue
        time, sector, count = float(match["time"]), int(match["sector"]), int(match["count"])
        waiting = open_at.setdefault(sector, deque())
        if action == "issue":
            waiting.append(Request(time, None, sector * SECTOR, count * SECTOR, int(match["pid"]), match["rwbs"]))
            requests.append(waiting[-1])
        elif action == "complete" and waiting:
            waiting.popleft().done = time
        elif action == "requeue" and waiting:
            refused = waiting.pop()
            requeued += refused.n_bytes
            refused.offset = -1
    return Requests(sorted((r for r in requests if r.offset >= 0), key=lambda r: r.issued), requeued)


def lost_events(lines: Iterable[str]) -> int:
    """How many events the tracer says that it dropped."""
    lost = 0
    for line in lines:
        match = re.search(r"LOST (\d+) EVENTS|Skips: .*?\((\d+)|(?:overrun|dropped events): (\d+)", line)
        if match:
            lost += int(next(g for g in match.groups() if g))
    return lost
