"""Images in requests: whatever they are given as, the model gets the same; what cannot work is said before."""

from __future__ import annotations

import asyncio
import base64
import http.server
import io
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_projector
from PIL import Image
from tiny_projector import IMAGE_TOKENS

import superllama
from superllama import compat
from superllama._engine import media_files
from superllama._engine.calls import Call
from superllama._engine.text import generate_calls

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": 6, "logprobs": 3}
FRESH = GREEDY | {"cache_prompt": False}


def pixels(seed: int, width: int = 40, height: int = 30) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(seed)).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def user(*parts: Any) -> list[dict[str, Any]]:
    """A message of texts and images."""
    return [{"role": "user", "content": [p if isinstance(p, dict) else text_or_image(p) for p in parts]}]


def text_or_image(part: str | bytes) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image_url", "image_url": {"url": data_url(part)}}


def seen(llm: superllama.LLM, messages: Any, **request: Any) -> tuple[Any, int]:
    """What the model answers, to the last bit, and how long the prompt was."""
    answer = llm.chat(messages, **(FRESH | request))
    return answer.logprobs, answer.usage.prompt_tokens


# ---------------------------------------------------------------- what images are given as


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that has the image."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/image.png"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(png(1) if found else b"no")

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


FORMS: dict[str, Callable[[Path, str], Any]] = {
    "data URL": lambda file, web: {"type": "image_url", "image_url": {"url": data_url(file.read_bytes())}},
    "data URL with lines": lambda file, web: {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.encodebytes(file.read_bytes()).decode()}"},
    },
    "URL of the web": lambda file, web: {"type": "image_url", "image_url": {"url": f"{web}/image.png"}},
    "URL of a file": lambda file, web: {"type": "image_url", "image_url": {"url": file.as_uri()}},
    "no mapping": lambda file, web: {"type": "image_url", "image_url": data_url(file.read_bytes())},
    "with detail": lambda file, web: {"type": "image_url", "image_url": {"url": str(file), "detail": "low"}},
    "path": lambda file, web: {"type": "image_url", "image_url": {"url": file}},
    "bytes": lambda file, web: {"type": "image", "image": file.read_bytes()},
    "base64": lambda file, web: {"type": "image", "image": base64.b64encode(file.read_bytes()).decode()},
    "transformers": lambda file, web: {"type": "image", "path": str(file)},
    "PIL.Image": lambda file, web: {"type": "image", "image": Image.open(file)},
    "PIL.Image with alpha": lambda file, web: {"type": "image", "image": Image.open(file).convert("RGBA")},
    "array": lambda file, web: {"type": "image", "image": pixels(1)},
    "a part of an array": lambda file, web: {"type": "image", "image": np.pad(pixels(1), 1)[1:-1, 1:-1, 1:-1]},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_image(form: str, seeing: superllama.LLM, tmp_path: Path, web: str) -> None:
    file = tmp_path / "an image.png"
    file.write_bytes(png(1))
    assert seen(seeing, user("the", FORMS[form](file, web), "a")) == seen(seeing, user("the", png(1), "a"))


@pytest.mark.parametrize("kind", ["BMP", "GIF", "PPM", "PNG"])
def test_kinds_of_files(kind: str, seeing: superllama.LLM) -> None:
    image = Image.fromarray(pixels(1)).quantize(16)  # no more colours than a GIF has
    file = io.BytesIO()
    image.convert("P" if kind == "GIF" else "RGB").save(file, kind)
    whole = io.BytesIO()
    image.convert("RGB").save(whole, "PNG")
    assert seen(seeing, user("the", {"type": "image", "image": file.getvalue()})) == seen(
        seeing, user("the", whole.getvalue())
    )


def test_jpeg(seeing: superllama.LLM) -> None:
    file = io.BytesIO()
    Image.fromarray(pixels(1)).save(file, "JPEG", quality=95)
    assert media_files._size_of(file.getvalue(), "jpeg") == (40, 30)
    found, n_tokens = seen(seeing, user("the", {"type": "image", "image": file.getvalue()}))
    assert found and n_tokens == seen(seeing, user("the", png(1)))[1]


def test_images_of_a_message_as_ollama_has_them(seeing: superllama.LLM, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(png(1))
    message = {"role": "user", "content": "the", "images": [tmp_path / "1.png", png(2)]}
    assert seen(seeing, [message]) == seen(seeing, user(png(1), png(2), "the"))
    assert seen(seeing, [{"role": "user", "content": "the", "images": []}]) == seen(seeing, "the")
    assert set(message) == {"role", "content", "images"}  # the caller's stays what it is


# ---------------------------------------------------------------- what the model makes of them


def test_images_are_seen_where_they_stand(seeing: superllama.LLM) -> None:
    conversations = [
        user("the"),
        user("the", png(1)),
        user("the", png(2)),
        user(png(1), "the"),
        user("the", png(1), png(2)),
        user("the", png(2), png(1)),
        [*user("the", png(1)), {"role": "assistant", "content": "a"}, *user("the")],
        [*user("the"), {"role": "assistant", "content": "a"}, *user("the", png(1))],
    ]
    found = [seen(seeing, messages) for messages in conversations]
    for i, (logprobs, _) in enumerate(found):
        assert all(logprobs != other for other, _ in found[:i]), i
    assert found == [seen(seeing, messages) for messages in conversations]


def test_tokens_of_images_count(seeing: superllama.LLM) -> None:
    images = [png(i) for i in range(4)]
    chats = [seeing.chat(user("the", *images[:n]), **FRESH).usage.prompt_tokens for n in (1, 2, 3)]
    assert [n - chats[0] for n in chats] == [0, IMAGE_TOKENS, 2 * IMAGE_TOKENS]
    for n in (1, 4):
        answer = seeing.generate({"prompt": "<__media__>" * n + "the", "images": images[:n]}, **FRESH)
        assert answer.usage.prompt_tokens == len(seeing.tokenize("the")) + n * IMAGE_TOKENS


def test_the_same_image_again_is_not_computed(seeing: superllama.LLM) -> None:
    messages = user("the", png(11), "a")
    first = seeing.chat(messages, **FRESH).usage
    again = seeing.chat(messages, **GREEDY).usage
    assert again.prompt_tokens == first.prompt_tokens and again.cached_tokens == first.prompt_tokens - 1
    head = len(seeing.tokenize(seeing.apply_chat_template(user("the")).partition("the")[0] + "the"))
    longer = [*messages, {"role": "assistant", "content": "a"}, *user("it")]
    assert seeing.chat(longer, **GREEDY).usage.cached_tokens > head + IMAGE_TOKENS
    other = seeing.chat(user("the", png(12), "a"), **GREEDY)  # of which nobody has asked before
    assert other.usage.cached_tokens == head
    assert other.text == seeing.chat(user("the", png(12), "a"), **FRESH).text


@pytest.mark.parametrize(
    "options",
    [
        {"dynamic_layers": True, "mem_budget": "36MiB"},
        {"paged_kv": True, "kv_page_size": 16, "kv_budget": "2MiB"},
        {"speculative": "ngram"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_how_memory_moves_changes_nothing(
    options: dict[str, Any], seeing: superllama.LLM, tiny_model: Path, projector: Path
) -> None:
    messages = user("the", png(1), "a", png(2), "it")
    with superllama.LLM(
        tiny_model, mmproj=projector, n_ctx=512, n_parallel=1, n_threads=1, chat_template="chatml", **options
    ) as llm:
        assert seen(llm, messages) == seen(seeing, messages)


def test_images_of_a_slot_survive_a_file_and_a_pause(tiny_model: Path, projector: Path, tmp_path: Path) -> None:
    messages = user("the", png(1), "a")
    with superllama.LLM(
        tiny_model, mmproj=projector, n_ctx=512, n_parallel=1, n_threads=1, chat_template="chatml",
        slot_save_path=tmp_path, mem_budget="64MiB",
    ) as llm:  # fmt: skip
        first = llm.chat(messages, slot=0, **GREEDY)
        for move in (
            lambda: (llm.save_slot("s"), llm.erase_slot(), llm.restore_slot("s")),
            lambda: (llm.pause(), llm.resume()),
        ):
            move()
            again = llm.chat(messages, slot=0, **GREEDY)
            assert again.usage.cached_tokens == first.usage.prompt_tokens - 1
            assert again.text == first.text


# ---------------------------------------------------------------- prompts without a template


def test_prompts_with_images(seeing: superllama.LLM, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(png(1))
    text = "the <__media__> a"
    forms: list[dict[str, Any]] = [
        {"prompt": text, "images": [png(1)]},
        {"prompt": text, "images": tmp_path / "1.png"},
        {"prompt": text, "multi_modal_data": {"image": Image.open(tmp_path / "1.png")}},
        {"prompt": text, "multi_modal_data": {"image": [pixels(1)]}},
        {"prompt_string": text, "multimodal_data": [base64.b64encode(png(1)).decode()]},
    ]
    found = seeing.generate(forms, **FRESH)
    assert all(answer.logprobs == found[0].logprobs for answer in found)
    other = seeing.generate({"prompt": text, "images": [png(2)]}, **FRESH)
    assert other.logprobs != found[0].logprobs
    assert seeing.generate({"prompt": "the"}, **FRESH).logprobs == seeing.generate("the", **FRESH).logprobs
    streamed = "".join(chunk.text for chunk in seeing.stream(forms[0], **FRESH))
    assert streamed == found[0].text
    several = seeing.generate([forms[0], "the", {"prompt": text, "images": [png(2)]}], **FRESH)
    assert [several[0].logprobs, several[2].logprobs] == [found[0].logprobs, other.logprobs]


def test_a_template_by_hand(seeing: superllama.LLM) -> None:
    messages = user("the", png(1), "a")
    prompt = seeing.apply_chat_template(messages)
    generated = seeing.generate({"prompt": prompt, "images": [png(1)]}, **FRESH)
    assert (generated.logprobs, generated.usage.prompt_tokens) == seen(seeing, messages)


# ---------------------------------------------------------------- other ways in


def test_async(tiny_model: Path, projector: Path, seeing: superllama.LLM) -> None:
    async def main() -> list[Any]:
        options: dict[str, Any] = {"n_ctx": 512, "n_parallel": 1, "n_threads": 1, "chat_template": "chatml"}
        async with await superllama.AsyncLLM.load(tiny_model, mmproj=projector, **options) as llm:
            chat = await llm.chat(user("the", png(1)), **FRESH)
            chunks = [chunk async for chunk in llm.chat_stream(user("the", png(1)), **FRESH)]
            text = await llm.generate({"prompt": "<__media__> a", "images": [png(1)]}, **FRESH)
            assert "".join(chunk.text for chunk in chunks) == chat.text
            return [chat.logprobs, text.logprobs]

    expected = seeing.generate({"prompt": "<__media__> a", "images": [png(1)]}, **FRESH)
    assert asyncio.run(main()) == [seen(seeing, user("the", png(1)))[0], expected.logprobs]


@pytest.mark.parametrize("handler", [False, True])
def test_llama_cpp_python(handler: bool, tiny_model: Path, projector: Path, seeing: superllama.LLM) -> None:
    if handler:
        handlers: Any = compat.llama_chat_format
        options: dict[str, Any] = {"chat_handler": handlers.Llava15ChatHandler(clip_model_path=str(projector))}
    else:
        options = {"mmproj": projector}
    with compat.Llama(str(tiny_model), n_ctx=512, n_threads=1, chat_format="chatml", **options) as llama:
        found = llama.create_chat_completion(user("the", png(1)), temperature=0, max_tokens=6, min_p=0)
        expected = seeing.chat(user("the", png(1)), temperature=0, max_tokens=6)
        assert found["choices"][0]["message"]["content"] == expected.text
        assert found["usage"]["prompt_tokens"] == expected.usage.prompt_tokens


def test_handlers_are_found_where_that_package_has_them(run_python: Any) -> None:
    done = run_python(
        "import superllama.compat; superllama.compat.install()\n"
        "from llama_cpp.llama_chat_format import Qwen25VLChatHandler\n"
        "print(Qwen25VLChatHandler('a.gguf', verbose=False).clip_model_path)"
    )
    assert done.stdout == "a.gguf\n", done.stderr


def test_clients_of_a_server(tiny_model: Path, projector: Path, seeing: superllama.LLM) -> None:
    openai = pytest.importorskip("openai")
    expected = seeing.chat(user("the", png(1)), temperature=0, max_tokens=6)
    with superllama.Server(
        tiny_model, mmproj=projector, n_threads=1, n_ctx=512, n_parallel=1, chat_template="chatml"
    ) as server:
        client = openai.OpenAI(base_url=server.url, api_key=server.api_key)
        found = client.chat.completions.create(
            model="any",
            messages=user("the", png(1)),
            temperature=0,
            max_tokens=6,  # type: ignore[arg-type]
        )
        assert found.choices[0].message.content == expected.text
        assert found.usage and found.usage.prompt_tokens == expected.usage.prompt_tokens
        with pytest.raises(openai.BadRequestError, match="media"):
            refused: Any = user({"type": "image_url", "image_url": {"url": "file:///etc/hostname"}})
            client.chat.completions.create(model="any", messages=refused)


# ---------------------------------------------------------------- what cannot work


def header(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


WRONG: dict[str, tuple[Any, str]] = {
    "no file": ("there is none.png", "no such file"),
    "no path": (Path("there is none.png"), "cannot read there is none.png: No such file"),
    "a folder": (Path(), "is a folder"),
    "text": (b"a text that is no image", "no image and no sound .* begins with b'a text that"),
    "a sound": (b"RIFF\0\0\0\0WAVEfmt ", "wrong kind: sound .wav., not image"),
    "no base64": ("data:image/png,abc", "without base64"),
    "nothing": (None, "not NoneType"),
    "an empty file": (b"", "begins with b''"),
    "a number": (7, "not int"),
    "pixels with fractions": (np.zeros((4, 4, 3)), "uint8"),
    "too large": (header(20_000, 20_000), "20000 x 20000 pixels; at most 100 million"),
    "another scheme": ("ftp://example.org/a.png", "no such file, and it is no URL"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_image(what: str, seeing: superllama.LLM) -> None:
    value, why = WRONG[what]
    with pytest.raises(superllama.PromptError, match=f"message 0, part 1,? .*{why}|{why}"):
        seeing.chat(user("the", {"type": "image", "image": value}))
    with pytest.raises(superllama.PromptError, match=why):
        seeing.generate({"prompt": "<__media__> a", "images": [value]})


def test_a_file_that_is_too_large(seeing: superllama.LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_files, "MOST_BYTES", 1 << 20)
    (tmp_path / "a.bmp").write_bytes(b"BM" + bytes(2 << 20))
    with pytest.raises(superllama.PromptError, match="more than 1 MiB"):
        seeing.chat(user({"type": "image", "image": tmp_path / "a.bmp"}))


@pytest.mark.parametrize("value", [png(1)[:200], b"\xff\xd8\xff" + bytes(100), b"BM" + bytes(100)])
def test_damaged_files(value: bytes, seeing: superllama.LLM) -> None:
    with pytest.raises(superllama.PromptError, match="damaged"):
        seeing.chat(user("the", value))
    assert seen(seeing, user("the", png(1)))[0]


def test_what_the_web_has_not(seeing: superllama.LLM, web: str) -> None:
    for url in (f"{web}/none.png", "http://127.0.0.1:9/a.png"):
        with pytest.raises(superllama.PromptError, match="could not be fetched"):
            seeing.chat(user({"type": "image_url", "image_url": {"url": url}}))


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ({"prompt": "the", "images": [b""]}, "1 images and sounds, and 0 times <__media__>"),
        ({"prompt": "<__media__> <__media__> a", "images": [png(1)]}, "and 2 times"),
        ({"prompt": "the <__media__>", "images": [png(1)]}, "ends with an image"),
        ({"prompt": "<__media__> a", "images": ["http://127.0.0.1:9/a.png"]}, "no such file"),
        ({"prompt": "<__media__> a", "image": [png(1)]}, "has 'image'; there are prompt, images"),
        ({"prompt": "<__media__> a", "multi_modal_data": {"video": png(1)}}, "has 'video'"),
        ({"prompt": "<__media__> a", "images": [png(1)], "audio": [png(1)]}, "in their order"),
        ({"images": [png(1)]}, "no text under 'prompt'"),
        ({"prompt": ""}, "is empty"),
    ],
)
def test_wrong_prompts(prompt: dict[str, Any], why: str, seeing: superllama.LLM) -> None:
    with pytest.raises(superllama.PromptError, match=why):
        seeing.generate(prompt)


def test_more_images_than_the_context_has_room_for(seeing: superllama.LLM) -> None:
    with pytest.raises(superllama.PromptTooLongError) as error:
        seeing.chat(user("the", *(png(i) for i in range(64))))
    assert error.value.n_tokens > 64 * IMAGE_TOKENS and error.value.n_room == 512


def test_models_that_see_nothing(llm: superllama.LLM, tiny_model: Path, tmp_path: Path) -> None:
    for ask in (
        lambda: llm.chat(user("the", png(1))),
        lambda: llm.chat([{"role": "user", "content": "the", "images": [png(1)]}]),
        lambda: llm.generate({"prompt": "<__media__> a", "images": [png(1)]}),
    ):
        with pytest.raises(superllama.ModelError, match=r"without a projector.* mmproj="):
            ask()
    deaf = tiny_projector.write_projector(tmp_path / "hears.gguf", sees=False)
    with (
        superllama.LLM(tiny_model, mmproj=deaf, n_ctx=256, n_threads=1, chat_template="chatml") as hearing,
        pytest.raises(superllama.ModelError, match="takes sounds, and no images"),
    ):
        hearing.chat(user("the", png(1)))


def test_files_that_are_no_projector(tiny_model: Path, tmp_path: Path) -> None:
    other = tiny_projector.write_projector(tmp_path / "other.gguf", n_embd=32)
    (tmp_path / "text.gguf").write_text("a text that is no model")
    for file, why in (
        (tmp_path / "none.gguf", "does not exist"),
        (tiny_model, r"is a model \(llama\), not a projector"),
        (tmp_path / "text.gguf", "not a GGUF file"),
        (other, "projector of another model"),
    ):
        with pytest.raises(superllama.ModelError, match=why):
            superllama.LLM(tiny_model, mmproj=file, n_ctx=256)


# ---------------------------------------------------------------- a context that is full


def album(n: int) -> dict[str, Any]:
    return {"prompt": "the" + "<__media__>" * n + "a", "images": [png(i) for i in range(n)]}


@pytest.fixture(scope="module")
def shared(tiny_model: Path, projector: Path) -> Iterator[superllama.LLM]:
    """Two sequences, which share the cells."""
    with superllama.LLM(tiny_model, mmproj=projector, n_ctx=512, n_parallel=2, n_threads=1) as engine:
        yield engine


def test_who_does_not_fit_beside_others_is_refused_and_they_go_on(shared: superllama.LLM) -> None:
    begun, refused = threading.Event(), threading.Event()

    def wait(ids: Any, scores: Any) -> Any:
        begun.set()
        refused.wait(0.1)  # so that it holds its cells meanwhile
        return scores

    found: list[superllama.Completion] = []

    def first() -> None:
        request = {"max_tokens": 60, "temperature": 0, "ignore_eos": True, "slot": 0}
        found.append(shared.generate(album(20), logits_processor=wait, **request))

    thread = threading.Thread(target=first)
    thread.start()
    begun.wait()
    call = generate_calls(album(12), 1, {"max_tokens": 2, "slot": 1}, shared._senses)
    assert isinstance(call, Call)
    with shared._engine.submit("POST", call.path, call.body) as request:
        b"".join(request.pieces())
        status = request.status
    with pytest.raises(superllama.PreemptedError, match=r"context is full: .* 1 other "):
        shared._engine.ask("POST", call.path, call.body)
    refused.set()
    thread.join()
    assert status == 503
    assert len(found[0].tokens) == 60
    assert len(shared.generate(album(12), max_tokens=2, ignore_eos=True, slot=1).tokens) == 2  # and now there is room


def test_what_is_only_kept_makes_room(shared: superllama.LLM) -> None:
    for slot in (0, 1, 0):
        found = shared.generate(album(20), max_tokens=4, ignore_eos=True, slot=slot)
        assert len(found.tokens) == 4


def test_more_than_fit_together_are_computed_in_turn(shared: superllama.LLM) -> None:
    found = shared.generate([album(n) for n in (18, 19, 20, 17)], max_tokens=12, temperature=0, ignore_eos=True)
    assert [len(one.tokens) for one in found] == [12] * 4
