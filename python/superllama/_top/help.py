"""What `superllama top` says when it is asked what its picture means."""

from __future__ import annotations

HELP = (
    "token      the time from one token to the next, and what of it waits for reads",
    "layers     a character each: in memory, on a device, or on disk, which is read",
    "           for every token, the less of it the darker it is",
    "experts    how many were in memory when a router chose them",
    "KV pages   of a paged cache: those in memory, and those on disk",
    "generated, prompt   tokens a second, of the last seconds; beside it the last minute",
    "           or two, and the most of them",
    "reads      what comes from disk: weights, and KV pages",
    "stalled    the share of the time in which computing waits for reads",
    "memory     what of the budget is used; the rest is kept for the context's cells,",
    "           buffers and prompts",
    "             pinned    weights that stay         ring      weights that stream",
    "             experts   those used last           resident  never leaves memory",
    "             kv        cells of the context      compute, cpu_work   of graphs",
    "             staging   reading and converting    prompt_cache   kept prompts",
    "             projector   of images and sounds",
    "",
    "+ and -    10 % more or less budget on the host, while the server serves",
    "p          give the model's memory back; p again takes it",
    "space      hold the picture; what happens meanwhile is kept",
    "?          the picture again          q or Ctrl-C   leave",
)
