"""Console scripts that run the patched programs of llama.cpp: `superllama-cli` is `superllama/bin/llama-cli`.

Every flag goes through, `--model=FILE` as two words. A program that wants a model and gets none has the demo model.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

from ._backends import for_programs
from ._openmp import short_spin

# ---------------------------------------------------------------- which command lines name a model

# with one of these the program has a model, or knows where to get one
MODEL_OPTIONS = {
    *("-m", "--model", "-mu", "--model-url", "-dr", "--docker-repo"),
    *("-hf", "-hfr", "--hf-repo", "-hff", "--hf-file"),
    *("--models-dir", "--models-preset"),  # llama-server as a router
    "--server-base",  # llama-cli to a server elsewhere
    *("--embd-gemma-default", "--gpt-oss-20b-default", "--gpt-oss-120b-default"),
    *("--fim-qwen-1.5b-default", "--fim-qwen-3b-default", "--fim-qwen-7b-default"),
    *("--fim-qwen-7b-spec", "--fim-qwen-14b-spec", "--fim-qwen-30b-default"),
    *("--vision-gemma-4b-default", "--vision-gemma-12b-default"),
}
MODEL_VARIABLES = (
    "LLAMA_ARG_MODEL",
    "LLAMA_ARG_MODEL_URL",
    "LLAMA_ARG_DOCKER_REPO",
    "LLAMA_ARG_HF_REPO",
    "LLAMA_ARG_HF_FILE",
    "LLAMA_ARG_MODELS_DIR",
    "LLAMA_ARG_MODELS_PRESET",
)
# with one of these the program prints something and ends
PRINT_OPTIONS = {
    *("-h", "--help", "--usage", "--version", "--license"),
    *("--list-devices", "-cl", "--cache-list", "--completion-bash"),
}


def split_option(argument: str) -> tuple[str, str] | None:
    """The option and the value of `--model=FILE`, and of `-mFILE` if FILE looks like one; None if it is neither.

    llama.cpp's programs want the value as an argument of its own; run_with_model() hands it to them like that.
    """
    name, equals, value = argument.partition("=")
    if equals and name in MODEL_OPTIONS and value:
        return name, value
    # there are other options that begin with -m; none of them ends like a file
    if argument.startswith("-m") and argument.endswith(".gguf"):
        return "-m", argument[2:]
    return None


def separated(arguments: Sequence[str]) -> list[str]:
    """The arguments with every model option and its value apart."""
    return [part for argument in arguments for part in split_option(argument) or (argument,)]


def opposite(flag: str) -> str:
    """The name that switches it the other way, where there is one."""
    return "--" + flag[5:] if flag.startswith("--no-") else "--no-" + flag[2:]


def model_words(name: str) -> list[str]:
    """A model as words of a command line: a path, or a name as for -m, or hf:org/repo:quant."""
    return ["-hf", name[3:]] if name.startswith("hf:") else ["-m", name]


def names_model(arguments: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether the program needs no default model. Values are looked at too: one that reads like an option
    of these tables (a prompt "-m") costs a clear "no model" error of the program, nothing worse."""
    if any(environment.get(name) for name in MODEL_VARIABLES):
        return True
    return any(argument in MODEL_OPTIONS or argument in PRINT_OPTIONS for argument in separated(arguments))


def missing_model(arguments: Sequence[str]) -> str | None:
    """What is wrong with the file of `-m FILE`, None if nothing is, or if FILE is where a download goes. For arguments
    that are separated."""
    sources = [argument for argument in arguments if argument in MODEL_OPTIONS]
    if len(sources) != 1 or sources[0] not in ("-m", "--model") or arguments[-1] == sources[0]:
        return None
    from ._errors import ModelError
    from ._gguf import check_gguf

    try:
        check_gguf(arguments[arguments.index(sources[0]) + 1])
    except ModelError as e:
        return str(e)
    return None


NAME_OPTIONS = {"-m", "--model", "-md", "--model-draft", "--spec-draft-model"}  # whose value may be a model's name
# options that name files beside the model, in a list; after a colon comes a scale
FILE_OPTIONS = NAME_OPTIONS | {
    *("--lora", "--lora-scaled", "--control-vector", "--control-vector-scaled", "-mm", "--mmproj", "--prompt-cache"),
}


def with_paths(arguments: Sequence[str]) -> list[str]:
    """The arguments with the path of each model that is named, such as ollama:NAME; hf:NAME is fetched by the program.
    Ends the process where there is none."""
    from ._errors import ModelError
    from ._models import by_name

    found = list(arguments)
    for i, option in enumerate(arguments[:-1]):
        name = arguments[i + 1]
        if option in ("-m", "--model") and name.startswith("hf:"):
            found[i : i + 2] = model_words(name)
        elif option in NAME_OPTIONS:
            try:
                found[i + 1] = str(by_name(name))
            except ModelError as e:
                sys.exit(f"superllama: {e}")
    return found


def secret_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with the secret of RPC servers before all others: a program connects where it reads --rpc."""
    words = list(arguments)
    at = words.index("--rpc-secret") if "--rpc-secret" in words else len(words)
    return words[at : at + 2] + words[:at] + words[at + 2 :]


def odd_file(arguments: Sequence[str], *, positional: bool = False) -> str | None:
    """What is wrong with a path that is there and is no file, such as a FIFO, for which a program would wait; None if
    nothing is. `positional`: the program's files are arguments without an option."""
    from ._errors import ModelError
    from ._files import check_mode

    named = [value for option, value in pairwise(arguments) if option in FILE_OPTIONS]
    paths = [path for value in named for part in value.split(",") for path in (part, part.rpartition(":")[0])]
    for path in [*paths, *(arguments if positional else ())]:
        try:
            check_mode(path, os.stat(path).st_mode, ModelError)  # noqa: PTH116 - any text may be a path
        except (OSError, ValueError):
            continue  # the program says what it cannot open
        except ModelError as e:
            return str(e)
    return None


# ---------------------------------------------------------------- where the programs are


def find_bin_dir() -> Path | None:
    """The folder of the programs: beside the compiled module, also in an editable install."""
    spec = importlib.util.find_spec(f"{__package__}._ffi")
    folder = Path(spec.origin).parent / "bin" if spec and spec.origin else None
    return folder if folder and folder.is_dir() else None


def find_program(name: str) -> Path:
    """The path of a program of llama.cpp; ends the process with a message if it is not there."""
    folder = find_bin_dir()
    path = folder / (name + (".exe" if sys.platform == "win32" else "")) if folder else None
    if path is None or not path.is_file():
        sys.exit(
            f"superllama: {name} is not installed (looked in {folder or 'the package, which is not built'}); "
            "install superllama again: python -m pip install --force-reinstall superllama"
        )
    return path


# ---------------------------------------------------------------- run


def program_environment(program: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """What a program runs with: the caller's word first, and where its backends lie."""
    return {**short_spin(environment), **environment, **for_programs(environment, program.parents[1])}


def run(name: str, arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> NoReturn:
    """Become the program: same process on POSIX, so signals and the exit code are its own."""
    program = str(find_program(name))
    command = [program, *arguments]
    environment = program_environment(Path(program), environment)
    sys.stdout.flush()
    sys.stderr.flush()
    if sys.platform != "win32":
        os.execve(program, command, environment)
    process = subprocess.Popen(command, env=environment)
    while True:
        try:
            sys.exit(process.wait())
        except KeyboardInterrupt:
            continue  # Ctrl-C reaches the program too, which ends by itself


def run_with_model(name: str, arguments: Sequence[str] | None = None, *, reads_environment: bool = True) -> NoReturn:
    """Run with these arguments, or this process's; with the demo model if they (or the environment) name none."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--completion-bash" in arguments:  # upstream's is for commands of upstream's names
        from ._commands.shells import script

        print(script("bash"), end="")
        sys.exit()
    arguments = secret_first(with_paths(separated(arguments)))
    if not names_model(arguments, os.environ if reads_environment else {}):
        from ._demo import demo_model
        from ._errors import DownloadError

        find_program(name)  # before anything is downloaded for it
        try:
            model = demo_model()
        except DownloadError as e:
            sys.exit(f"superllama: no model given (-m FILE), and the default one cannot be fetched: {e}")
        arguments = [*arguments, "-m", str(model)]
    elif name != "llama-bench" and (problem := missing_model(arguments)):  # llama-bench takes lists of files
        sys.exit(f"superllama: {problem}")
    if problem := odd_file(arguments):
        sys.exit(f"superllama: {problem}")
    run(name, arguments)


def cli() -> NoReturn:
    """superllama-cli: chat in the terminal."""
    run_with_model("llama-cli")


def completion() -> NoReturn:
    """superllama-completion: continue a prompt."""
    run_with_model("llama-completion")


def server() -> NoReturn:
    """superllama-server: the HTTP server."""
    run_with_model("llama-server")


def bench() -> NoReturn:
    """superllama-bench: measure prompt and generation speed."""
    run_with_model("llama-bench", reads_environment=False)


def perplexity() -> NoReturn:
    """superllama-perplexity: measure a model on a text."""
    run_with_model("llama-perplexity")


def quantize() -> NoReturn:
    """superllama-quantize: make a smaller model file."""
    if problem := odd_file(sys.argv[1:], positional=True):
        sys.exit(f"superllama: {problem}")
    run("llama-quantize", sys.argv[1:])


# glibc's allocator in an RPC server: what a layer had goes back to the system at once, whatever was freed before;
# messages, a quarter MiB each, come from memory that stays
SERVER_MALLOC = "glibc.malloc.mmap_threshold=327680:glibc.malloc.trim_threshold=1048576"


def server_environment() -> dict[str, str]:
    """Of an RPC server, the user's own settings of the allocator left as they are."""
    return {"GLIBC_TUNABLES": SERVER_MALLOC} | os.environ


def rpc_server() -> NoReturn:
    """superllama-rpc-server: offer this machine's devices to others."""
    run("ggml-rpc-server", sys.argv[1:], server_environment())
