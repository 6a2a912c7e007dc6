"""The `superllama` command: plan, doctor, ps, top, report, budget, cache. What is printed is made elsewhere."""

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
from ._cluster import command as cluster_command
from ._commands.front_doors import DOORS, add_to, enter
from ._control import default_url
from ._words import as_flags

if TYPE_CHECKING:
    from ._cache import Entry


_LIVES = {
    "pause": "give the memory of a server back, with its conversations on disk",
    "resume": "serve again, after pause or drain",
    "drain": "let a server finish what runs, and take nothing new",
}
SHELLS = ("bash", "zsh", "fish")
USES = ("generate", "llm", "completion", "embed", "perplexity", "server")  # of plan(), which takes a while to import


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main_parser = argparse.ArgumentParser(
        prog="superllama",
        description="Run language models larger than memory. The programs of llama.cpp are beside this command: "
        "superllama-cli, -completion, -server, -bench, -perplexity, -quantize, -rpc-server.",
    )
    main_parser.add_argument("--version", action="version", version=f"superllama {__version__}")
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    add_to(commands)

    plan = commands.add_parser("plan", help="what a model would do here under a budget, before it is loaded")
    plan.add_argument("model", nargs="?", help="a GGUF file, or a name of `superllama list` (default: the demo model)")
    plan.add_argument("-m", "--model", dest="model_option", metavar="FILE", help="the same")
    plan.add_argument("--mem-budget", metavar="SIZE", default="auto", help="8GiB, 512MiB, 60%%, auto (default: auto)")
    plan.add_argument("-c", "--ctx-size", metavar="N", type=int, help="tokens of context; 0 = the model's own")
    plan.add_argument("-ub", "--ubatch-size", metavar="N", type=int, help="tokens of a prompt computed at once")
    plan.add_argument("-t", "--threads", metavar="N", type=int, help="threads (default: the physical cores)")
    plan.add_argument("--for", dest="use", choices=USES, default="generate", help="what it is for (default: generate)")
    plan.add_argument("-np", "--parallel", metavar="N", type=int, help="sequences of an LLM or a server (default: 4)")
    plan.add_argument("-kvu", "--kv-unified", action="store_true", help="a server's sequences share the context")
    plan.add_argument("-mm", "--mmproj", metavar="FILE", help="the projector of images and sounds that goes with it")
    plan.add_argument("--no-repack", action="store_true", help="with the weights in the layout of the file")
    plan.add_argument("--nodes", metavar="SPEC.toml", type=Path, help="on several machines, which lend memory over RPC")
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

    top = commands.add_parser("top", help="live: where a running model's memory is, and why a token is slow; ? helps")
    source = top.add_mutually_exclusive_group()
    _names_server(top, source)
    source.add_argument("--pid", metavar="PID", type=int, help="a superllama-server on this machine, by its process")
    source.add_argument("--metrics", metavar="FILE", type=Path, help="what a program writes with --metrics-file")

    report = commands.add_parser("report", help="a run's metrics file as a page of pictures")
    report.add_argument("metrics", metavar="RUN.jsonl", type=Path, help="what a program wrote with --metrics-file")
    report.add_argument("-o", "--output", metavar="PAGE", type=Path, help="of the page (default: RUN.html beside it)")
    report.add_argument("--context", metavar="N", type=int, help="of several in the file (default: most tokens)")

    budget = commands.add_parser("budget", help="change the memory that a server may use, while it serves")
    budget.add_argument("mem_budget", nargs="?", metavar="SIZE", help="of the host: 8GiB, 60%%, auto")
    budget.add_argument("--vram", metavar="SIZE[,SIZE...]", help="of devices: one for all, or one for each")
    _names_server(budget)
    budget.add_argument("--json", action="store_true", help="for programs")

    for name, what in _LIVES.items():
        life = commands.add_parser(name, help=what)
        _names_server(life)
        life.add_argument("--json", action="store_true", help="for programs")

    cluster_command.add_to(commands)

    models = commands.add_parser(
        "list", help="models of other programs on this machine: ollama, LM Studio, Hugging Face"
    )
    models.add_argument("--json", action="store_true", help="for programs")

    completion = commands.add_parser("completion", help="print what makes a shell complete these commands")
    completion.add_argument("shell", choices=SHELLS, help="source <(superllama completion bash); fish: ... | source")

    pull = commands.add_parser("pull", help="fetch a model of Hugging Face, to be used as hf:ORG/REPO[:QUANT]")
    pull.add_argument("name", metavar="NAME", help="hf:ORG/REPO, or hf:ORG/REPO:QUANT (default: Q4_K_M)")
    pull.add_argument("--json", action="store_true", help="for programs")

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


def _names_server(command: argparse.ArgumentParser, one_of: argparse._MutuallyExclusiveGroup | None = None) -> None:
    (one_of or command).add_argument(
        "--url", default=default_url(), help="of the server, or HOST:PORT (default: %(default)s; LLAMA_ARG_PORT counts)"
    )
    command.add_argument("--model", dest="served", metavar="NAME", help="one of those that a router serves")
    command.add_argument("--api-key", metavar="KEY", default=os.environ.get("LLAMA_API_KEY"), help="or LLAMA_API_KEY")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["_complete"]:  # asked by a shell, which hides what goes wrong
        from ._commands.completion import answer

        print(answer(parser(), words[1:]))
        return 0
    words, flags = cluster_command.without_flags(words)
    args = parser().parse_args(words)
    try:
        if args.command == "plan":
            return _plan(args)
        if args.command == "doctor":
            return _doctor(args)
        if args.command == "ps":
            return _ps(args)
        if args.command == "top":
            return _top(args)
        if args.command == "report":
            return _report(args)
        if args.command == "list":
            return _list(args)
        if args.command == "budget":
            return _budget(args)
        if args.command in _LIVES:
            return _life(args)
        if args.command == "pull":
            return _pull(args)
        if args.command == "completion":
            return _completion(args)
        if args.command == "cluster":
            return cluster_command.run(args, flags)
        if args.command in DOORS:
            return enter(args.command, args.words)
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
    from ._look.amounts import size
    from ._models import found_models

    found = found_models()
    if args.json:
        print(json.dumps([{"name": m.name, "path": str(m.path), "bytes": m.bytes} for m in found], indent=2))
        return 0
    for model in found:
        print(f"{size(model.bytes):>9}  {model.name}")
    if not found:
        print("no models of ollama, LM Studio or Hugging Face are on this machine", file=sys.stderr)
    return 0


def _pull(args: argparse.Namespace) -> int:
    from ._commands.pull import pull
    from ._look.amounts import size

    pulled = pull(args.name)
    model = pulled.model
    if pulled.warning:
        print(f"superllama: it was here, and could not be compared: {pulled.warning}", file=sys.stderr)
    if args.json:
        print(json.dumps({"name": model.name, "path": str(model.path), "bytes": model.bytes}, indent=2))
    else:
        print(f"{size(model.bytes):>9}  {model.name}")
    return 0


def _completion(args: argparse.Namespace) -> int:
    from ._commands.shells import script

    print(script(args.shell), end="")
    return 0


def _ps(args: argparse.Namespace) -> int:
    from ._control import status
    from ._look.status import status_text

    while True:
        found = status(args.url, args.api_key, args.served)
        text = json.dumps(found) if args.json else status_text(found)
        clear = "\033[H\033[J" if args.watch is not None and sys.stdout.isatty() else ""
        print(clear + text, flush=True)
        if args.watch is None:
            return 0
        time.sleep(max(args.watch, 0.1))


def _top(args: argparse.Namespace) -> int:
    from ._top.listening import server_url
    from ._top.loop import top
    from ._top.sources import File, Server

    if args.metrics is not None:
        return top(File(args.metrics))
    return top(Server(args.url if args.pid is None else server_url(args.pid), args.api_key, args.served))


def _report(args: argparse.Namespace) -> int:
    from ._report.page import write_report

    print(f"wrote {write_report(args.metrics, args.output, args.context)}")
    return 0


def _life(args: argparse.Namespace) -> int:
    from . import _control
    from ._look.status import state_of, status_text

    change = {"pause": _control.pause, "resume": _control.resume, "drain": _control.drain}[args.command]
    found = change(args.url, args.api_key, args.served)
    while state_of(found) in ("pausing", "resuming", "released"):  # it waits for what runs
        found = change(args.url, args.api_key, args.served)
    print(json.dumps(found) if args.json else status_text(found))
    return 0


def _budget(args: argparse.Namespace) -> int:
    from ._control import set_budget
    from ._look.status import status_text

    if args.mem_budget is None and args.vram is None:
        print("superllama budget: which one? SIZE, --vram SIZE, or both", file=sys.stderr)
        return 2
    named = {"mem_budget": args.mem_budget, "vram_budget": args.vram}
    given = {name: size for name, size in named.items() if size is not None}
    found = set_budget(args.url, args.api_key, given, args.served)
    print(json.dumps(found) if args.json else status_text(found))
    return 0


def _plan(args: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from ._demo import demo_model
    from ._params import ContextParams
    from ._plan import plan
    from ._plan_nodes import NodesPlan, plan_nodes

    if args.model and args.model_option:
        print("superllama plan: one model at a time: MODEL, or -m MODEL", file=sys.stderr)
        return 2
    try:
        model = args.model or args.model_option or demo_model()
        asked = {
            "context_params": ContextParams(kv_unified=True) if args.kv_unified else None,
            "mem_budget": args.mem_budget,
            "n_ctx": args.ctx_size,
            "n_ubatch": args.ubatch_size,
            "n_threads": args.threads,
            "repack": not args.no_repack,
            "use": args.use,
            "n_parallel": args.parallel,
            "mmproj": args.mmproj,
        }
        found = plan(model, **asked) if args.nodes is None else plan_nodes(model, args.nodes, **asked)
    except ValidationError as e:
        wrong = e.errors()[0]
        what = wrong["msg"].removeprefix("Value error, ")
        print(f"superllama plan: {as_flags(str(wrong['loc'][0]))} {wrong['input']}: {what}", file=sys.stderr)
        return 2
    except ValueError as e:
        print(f"superllama plan: {as_flags(str(e))}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        from ._look.plan import show_nodes, show_plan

        if isinstance(found, NodesPlan):
            show_nodes(found)
        else:
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
        from ._look.tables import show_report

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
        from ._look.tables import show_entries

        show_entries(cache_dir(), found, what)


def _bytes(size: str | None) -> int | None:
    """Bytes of a --max-size. Raises: ValueError for what is no size, or relates to memory."""
    if size is None:
        return None
    if size == "auto" or size.endswith("%"):
        raise ValueError("write a number with MB, GB, MiB or GiB")
    from ._sizes import size_bytes

    return size_bytes(size)
