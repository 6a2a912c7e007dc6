"""The `superllama` command: plan, doctor, ps, budget, cache. What is printed is made elsewhere."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import Error, __version__
from ._words import as_flags

if TYPE_CHECKING:
    from ._cache import Entry


USES = ("generate", "completion", "embed", "perplexity", "server")  # of plan(), which takes a while to import


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main_parser = argparse.ArgumentParser(
        prog="superllama",
        description="Run language models larger than memory. The programs of llama.cpp are beside this command: "
        "superllama-cli, -completion, -server, -bench, -perplexity, -quantize, -rpc-server.",
    )
    main_parser.add_argument("--version", action="version", version=f"superllama {__version__}")
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    plan = commands.add_parser("plan", help="what a model would do here under a budget, before it is loaded")
    plan.add_argument("model", nargs="?", type=Path, help="a GGUF file (default: the demo model)")
    plan.add_argument("-m", "--model", dest="model_option", metavar="FILE", type=Path, help="the same")
    plan.add_argument("--mem-budget", metavar="SIZE", default="auto", help="8GiB, 512MiB, 60%%, auto (default: auto)")
    plan.add_argument("-c", "--ctx-size", metavar="N", type=int, help="tokens of context; 0 = the model's own")
    plan.add_argument("-ub", "--ubatch-size", metavar="N", type=int, help="tokens of a prompt computed at once")
    plan.add_argument("-t", "--threads", metavar="N", type=int, help="threads (default: the physical cores)")
    plan.add_argument("--for", dest="use", choices=USES, default="generate", help="what it is for (default: generate)")
    plan.add_argument("-np", "--parallel", metavar="N", type=int, help="sequences of a server (default: 4)")
    plan.add_argument("--no-repack", action="store_true", help="with the weights in the layout of the file")
    plan.add_argument("--json", action="store_true", help="for programs")

    doctor = commands.add_parser("doctor", help="what this machine and this build can do")
    doctor.add_argument(
        "path", nargs="?", type=Path, help="folder or file whose read speed is measured (default: the temporary folder)"
    )
    doctor.add_argument("--no-read", action="store_true", help="measure no read speed")
    doctor.add_argument("--json", action="store_true", help="for programs")

    ps = commands.add_parser("ps", help="what a server's memory is for now, and where its layers are")
    _names_server(ps)
    ps.add_argument("--watch", metavar="SECONDS", type=float, help="again and again, until Ctrl-C")
    ps.add_argument("--json", action="store_true", help="for programs")

    budget = commands.add_parser("budget", help="change the memory that a server may use, while it serves")
    budget.add_argument("mem_budget", nargs="?", metavar="SIZE", help="of the host: 8GiB, 60%%, auto")
    budget.add_argument("--vram", metavar="SIZE[,SIZE...]", help="of devices: one for all, or one for each")
    _names_server(budget)
    budget.add_argument("--json", action="store_true", help="for programs")

    models = commands.add_parser(
        "list", help="models of other programs on this machine: ollama, LM Studio, Hugging Face"
    )
    models.add_argument("--json", action="store_true", help="for programs")

    cache = commands.add_parser("cache", help="what superllama keeps on disk")
    actions = cache.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="show it")
    listing.add_argument("--json", action="store_true", help="for programs")
    prune = actions.add_parser("prune", help="remove it; what is needed again is fetched or made again")
    prune.add_argument(
        "name",
        nargs="*",
        help="as `cache list` names it, or a kind: `models`, `repacked`, `upstream` (default: everything)",
    )
    prune.add_argument("--older-than", metavar="DAYS", type=float, help="only what was not used for so long")
    prune.add_argument("--max-size", metavar="SIZE", help="keep this much of what was used last, e.g. 20GB")
    prune.add_argument("--dry-run", action="store_true", help="show what would be removed, and remove nothing")
    prune.add_argument("-y", "--yes", action="store_true", help="do not ask")
    prune.add_argument("--json", action="store_true", help="for programs")
    return main_parser


def _names_server(command: argparse.ArgumentParser) -> None:
    command.add_argument("--url", default="http://127.0.0.1:8080", help="of the server (default: %(default)s)")
    command.add_argument("--api-key", metavar="KEY", default=os.environ.get("LLAMA_API_KEY"), help="or LLAMA_API_KEY")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_args(arguments)
    try:
        if args.command == "plan":
            return _plan(args)
        if args.command == "doctor":
            return _doctor(args)
        if args.command == "ps":
            return _ps(args)
        if args.command == "list":
            return _list(args)
        if args.command == "budget":
            return _budget(args)
        return _cache(args)
    except BrokenPipeError:  # whoever read our output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (Error, OSError) as e:
        print(f"superllama: {as_flags(str(e))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _list(args: argparse.Namespace) -> int:
    from ._models import found_models
    from ._show import size

    found = found_models()
    if args.json:
        print(json.dumps([{"name": m.name, "path": str(m.path), "bytes": m.bytes} for m in found], indent=2))
        return 0
    for model in found:
        print(f"{size(model.bytes):>9}  {model.name}")
    if not found:
        print("no models of ollama, LM Studio or Hugging Face are on this machine", file=sys.stderr)
    return 0


def _ps(args: argparse.Namespace) -> int:
    from ._control import status
    from ._show_control import status_text

    while True:
        found = status(args.url, args.api_key)
        text = json.dumps(found) if args.json else status_text(found)
        clear = "\033[H\033[J" if args.watch is not None and sys.stdout.isatty() else ""
        print(clear + text, flush=True)
        if args.watch is None:
            return 0
        time.sleep(max(args.watch, 0.1))


def _budget(args: argparse.Namespace) -> int:
    from ._control import set_budget
    from ._show_control import status_text

    if args.mem_budget is None and args.vram is None:
        print("superllama budget: which one? SIZE, --vram SIZE, or both", file=sys.stderr)
        return 2
    named = {"mem_budget": args.mem_budget, "vram_budget": args.vram}
    found = set_budget(args.url, args.api_key, {name: size for name, size in named.items() if size is not None})
    print(json.dumps(found) if args.json else status_text(found))
    return 0


def _plan(args: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from ._demo import demo_model
    from ._plan import plan

    if args.model and args.model_option:
        print("superllama plan: one model at a time: MODEL, or -m MODEL", file=sys.stderr)
        return 2
    try:
        found = plan(
            args.model or args.model_option or demo_model(),
            mem_budget=args.mem_budget,
            n_ctx=args.ctx_size,
            n_ubatch=args.ubatch_size,
            n_threads=args.threads,
            repack=not args.no_repack,
            use=args.use,
            n_parallel=args.parallel,
        )
    except ValidationError as e:
        wrong = e.errors()[0]
        what = wrong["msg"].removeprefix("Value error, ")
        print(f"superllama plan: {as_flags(str(wrong['loc'][0]))} {wrong['input']}: {what}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        from ._show_plan import show_plan

        show_plan(found)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from ._doctor import report

    if args.path and not args.path.exists():
        print(f"superllama doctor: {args.path} does not exist", file=sys.stderr)
        return 2
    found = report(args.path, measure=not args.no_read)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        from ._show import show_report

        show_report(found)
    return 0


def _cache(args: argparse.Namespace) -> int:
    from ._cache import entries

    if args.action == "prune":
        return _prune(args)
    _show_cache(args, entries(), "kept")
    return 0


def _prune(args: argparse.Namespace) -> int:
    """Removes only what was shown and agreed to: by an answer, or by --yes."""
    from ._cache import chosen, remove

    try:
        found = chosen(args.name, older_than_days=args.older_than, max_bytes=_bytes(args.max_size))
    except ValueError as e:
        print(f"superllama cache: --max-size {args.max_size}: {e}", file=sys.stderr)
        return 2
    except KeyError as e:
        print(f"superllama cache: there is no {e.args[0]!r}; see superllama cache list", file=sys.stderr)
        return 2
    if found and not args.dry_run and not args.yes:
        if args.json or sys.stdin is None or not sys.stdin.isatty():
            print(
                "superllama cache: nothing was removed: there is nobody to ask; --yes removes, --dry-run shows what "
                "would go",
                file=sys.stderr,
            )
            return 2
        _show_cache(args, found, "to be removed")
        try:
            answer = input("remove it? [y/N] ")
        except EOFError:
            answer = ""
        if answer.strip().lower() not in ("y", "yes"):
            print("nothing was removed")
            return 1
    if not args.dry_run:
        remove(found)
    _show_cache(args, found, "to be removed" if args.dry_run else "removed")
    return 0


def _show_cache(args: argparse.Namespace, found: list[Entry], what: str) -> None:
    from ._cache import cache_dir

    if args.json:
        listed = [{"name": e.name, "path": str(e.path), "size_bytes": e.size_bytes} for e in found]
        print(json.dumps({"folder": str(cache_dir()), "entries": listed}, indent=2))
    else:
        from ._show import show_entries

        show_entries(cache_dir(), found, what)


def _bytes(size: str | None) -> int | None:
    """Bytes of a --max-size. Raises: ValueError for what is no size, or relates to memory."""
    if size is None:
        return None
    if size == "auto" or size.endswith("%"):
        raise ValueError("write a number with MB, GB, MiB or GiB")
    from ._sizes import size_bytes

    return size_bytes(size)
