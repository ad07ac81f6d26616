"""The playground page, in Debian's Chromium, in front of the real server.

Needs `apt-get install chromium` and `pip install playwright`.
`python tests/runtime/server/test_playground.py` makes the screenshot runtime/server/playground.png anew.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

try:
    from playwright.sync_api import expect, sync_playwright
except ModuleNotFoundError:
    pytest.skip("the playground's tests need playwright: pip install playwright", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[3]
IMAGES = ROOT / "tests" / "images"
HTML = ROOT / "runtime" / "server" / "playground.html"
SCREENSHOT = HTML.with_suffix(".png")
ARGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
KEY = "open-sesame"


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("the playground's tests need Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGS)
        yield browser
        browser.close()


@contextlib.contextmanager
def serving(bundle: Path, log: Path, **settings: str) -> Iterator[str]:
    """The server's own program; its address, once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k not in ("API_KEY", "HOST")}
    env |= {"CHECKPOINT_PATH": str(bundle), "START_PORT": str(port), **settings}
    url = f"http://127.0.0.1:{port}/"
    with open(log, "wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "rtp_llm.start_server"], env=env, stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(url + "health/ready", timeout=5):
                break
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(qwen_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(qwen_bundle, tmp_path_factory.mktemp("server") / "log") as url:
        yield url


@pytest.fixture(scope="module")
def locked(qwen_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that wants an API key."""
    with serving(qwen_bundle, tmp_path_factory.mktemp("locked") / "log", API_KEY=KEY) as url:
        yield url


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the page in a fresh browser profile. Afterwards: no request went elsewhere, nothing that the
    policy forbids was tried, no error was logged (but for the browser's own note of a status ≥ 400)."""
    contexts, complaints, requests = [], [], []

    def open_page(url: str, **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1100, "height": 800}} | options)
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.on("request", lambda r: requests.append((url, r.url)))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [c for c in complaints if not c.startswith("Failed to load resource")] == []
    assert requests
    assert [to for home, to in requests if not to.startswith((home, "data:", f"blob:{home}"))] == []


@pytest.fixture
def page(visit: Callable[..., Page], server: str) -> Page:
    """The page, set to greedy."""
    page = visit(server)
    greedy(page)
    return page


def greedy(page: Page) -> None:
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_role("button", name="Close settings").click()


def attach(page: Page, *names: str) -> None:
    tray = page.locator("#tray img")
    before = tray.count()
    page.locator("#files").set_input_files([IMAGES / name for name in names])
    expect(tray).to_have_count(before + len(names))


def ask(page: Page, question: str) -> Any:
    """Type, press Enter, wait for the end; the answer's element."""
    page.get_by_label("Your question").fill(question)
    page.keyboard.press("Enter")
    return answer(page)


def answer(page: Page) -> Any:
    last = page.get_by_role("article", name="Answer").last
    expect(last).to_have_attribute("aria-busy", "false")
    return last


def canned(page: Page, *deltas: str, usage: dict[str, Any] | None = None, end: bool = True) -> None:
    """The server's next answers, for what the sample never says."""
    chunks: list[Any] = [{"choices": [{"index": 0, "delta": {"content": d}}]} for d in deltas]
    if end:
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        chunks.append({"choices": [], "usage": usage})
    body = "".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + "data: [DONE]\n\n" * end
    refuse(page, 200, body, {"Content-Type": "text/event-stream"})


def refuse(page: Page, status: int, body: str, headers: dict[str, str] | None = None) -> None:
    page.route("**/chat/completions", lambda r: r.fulfill(status=status, body=body, headers=headers or {}))


def sent(page: Page) -> list[dict[str, Any]]:
    """The bodies of the chat requests from now on."""
    bodies: list[dict[str, Any]] = []
    page.on("request", lambda r: bodies.append(r.post_data_json) if r.method == "POST" else None)
    return bodies


# ------------------------------------------------------------------------------------ pictures, answers


def test_a_chosen_picture_is_answered_about(page: Page) -> None:
    expect(page.locator("h1")).to_have_text(re.compile("."))
    expect(page.get_by_role("status")).to_have_text("ready")
    attach(page, "red_circle.png")
    last = ask(page, "What is this?")
    expect(last.locator(".text")).to_have_text("a red circle")
    expect(last.locator(".stats")).to_have_text(
        re.compile(r"^\d+\.\d\d s to first token · \d[\d.]* tokens/s · 4 tokens")
    )
    expect(page.locator("#spoken")).to_have_text(re.compile("^a red circle"))  # for screen readers


def test_a_picture_is_pasted(page: Page) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate(
        """async (base64) => {
            const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
            const blob = new Blob([bytes], { type: "image/png" });
            await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
        }""",
        base64.b64encode((IMAGES / "red_circle.png").read_bytes()).decode(),
    )
    page.get_by_label("Your question").focus()
    page.keyboard.press("Control+V")
    expect(page.locator("#tray img")).to_have_count(1)
    expect(ask(page, "What is this?").locator(".text")).to_have_text("a red circle")


def test_pictures_are_dropped_and_removed(page: Page) -> None:
    names = ["blue_star.png", "red_circle.png"]
    files = page.evaluate_handle(
        """(files) => {
            const transfer = new DataTransfer();
            for (const [name, data] of files) {
                const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
                transfer.items.add(new File([bytes], name, { type: "image/png" }));
            }
            return transfer;
        }""",
        [[name, base64.b64encode((IMAGES / name).read_bytes()).decode()] for name in names],
    )
    page.dispatch_event("body", "dragover", {"dataTransfer": files})
    expect(page.locator("body")).to_have_class("dropping")
    page.dispatch_event("body", "drop", {"dataTransfer": files})
    expect(page.locator("body")).not_to_have_class("dropping")
    expect(page.locator("#tray img")).to_have_count(2)
    page.get_by_role("button", name="Remove blue_star.png").click()
    expect(ask(page, "What is this?").locator(".text")).to_have_text("a red circle")


def test_a_conversation_keeps_its_turns_and_their_pictures(page: Page) -> None:
    bodies = sent(page)
    attach(page, "red_circle.png")
    ask(page, "What is this?")
    attach(page, "blue_star.png")
    second = ask(page, "What is this?").locator(".text").inner_text()
    ask(page, "How many shapes are there?")
    uris = [
        "data:image/png;base64," + base64.b64encode((IMAGES / name).read_bytes()).decode()
        for name in ("red_circle.png", "blue_star.png")
    ]
    question = {"type": "text", "text": "What is this?"}
    pictures = [{"type": "image_url", "image_url": {"url": uri}} for uri in uris]
    assert bodies[-1]["messages"] == [
        {"role": "user", "content": [pictures[0], question]},
        {"role": "assistant", "content": "a red circle"},
        {"role": "user", "content": [pictures[1], question]},
        {"role": "assistant", "content": second},
        {"role": "user", "content": "How many shapes are there?"},
    ]
    assert bodies[-1]["stream"] is True and bodies[-1]["stream_options"] == {"include_usage": True}


def test_an_answer_is_made_again_and_a_question_edited(page: Page) -> None:
    bodies = sent(page)
    attach(page, "red_circle.png")
    ask(page, "What is this?")
    page.get_by_role("button", name="Answer again").click()
    expect(answer(page).locator(".text")).to_have_text("a red circle")
    assert len(bodies) == 2 and bodies[0] == bodies[1]
    expect(page.locator(".turn")).to_have_count(1)
    page.get_by_role("button", name="Edit the question").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.get_by_label("Your question")).to_have_value("What is this?")
    expect(page.locator("#tray img")).to_have_count(1)


def test_the_sample_drawing_is_answered_about(page: Page) -> None:
    page.get_by_role("button", name="Use a sample").click()
    expect(page.locator("#tray img")).to_have_count(1)
    page.get_by_role("button", name="How many shapes are there?").click()
    page.keyboard.press("Enter")
    expect(answer(page).locator(".text")).to_have_text("two")


def endless(route: Route) -> None:
    """The same request, but the sample, whose answers are short, goes on and on."""
    body = route.request.post_data_json
    route.continue_(post_data=json.dumps(body | {"ignore_eos": True, "max_tokens": 6000}))


def test_a_stream_is_stopped_on_the_server_too(page: Page, server: str) -> None:
    page.route("**/chat/completions", endless)
    attach(page, "red_circle.png")
    page.get_by_label("Your question").fill("What is this?")
    page.keyboard.press("Enter")
    last = page.get_by_role("article", name="Answer")
    expect(last.locator(".text")).to_have_text(re.compile("a red circle"))
    expect(page.get_by_role("status")).to_have_text("answering")
    page.get_by_role("button", name="Stop").click()
    expect(last.locator(".stats")).to_have_text(re.compile("^stopped · .* to first token"))
    expect(page.get_by_label("Your question")).to_be_focused()
    deadline = time.monotonic() + 5
    while True:
        with urllib.request.urlopen(server + "worker_status") as response:
            status = json.load(response)
        if status["running"] == 0 and status["waiting"] == 0:
            break
        assert time.monotonic() < deadline, status
    page.unroute("**/chat/completions")
    bodies = sent(page)
    ask(page, "What is this?")  # what had come by then is part of the conversation
    assert bodies[0]["messages"][1]["content"].startswith("a red circle")


# ------------------------------------------------------------------------------------------ grounding


def rectangle(page: Page, selector: str) -> np.ndarray:
    """[x1, y1, x2, y2] of an element, in shares of the picture that lies under it."""
    script = "(e) => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; }"
    box = np.array(page.locator(selector).evaluate(script))
    image = np.array(page.locator(".ground .canvas img").evaluate(script))
    size = image[2:] - image[:2]
    return (box - np.tile(image[:2], 2)) / np.tile(size, 2)


def test_a_box_is_drawn_where_the_circle_is(page: Page) -> None:
    attach(page, "red_circle.png")
    last = ask(page, "Locate the circle.")
    legend = last.get_by_role("list", name="Found in the picture").get_by_role("listitem")
    expect(legend).to_have_count(1)
    expect(legend.locator(".found")).to_have_text("the circle")
    written = np.array([int(n) for n in re.findall(r"\d+", legend.locator("small").inner_text())]) / 1000
    drawn = rectangle(page, ".ground .box")
    np.testing.assert_allclose(drawn, written, atol=0.02)
    pixels = np.asarray(Image.open(IMAGES / "red_circle.png").convert("RGB")).astype(int)
    ys, xs = np.nonzero(pixels[..., 0] > pixels[..., 2] + 60)  # red on blue
    height, width = pixels.shape[:2]
    true = np.array([xs.min() / width, ys.min() / height, (xs.max() + 1) / width, (ys.max() + 1) / height])
    shared = np.prod(np.minimum(drawn, true)[2:] - np.maximum(drawn, true)[:2])
    areas = [np.prod(b[2:] - b[:2]) for b in (drawn, true)]
    assert shared / (sum(areas) - shared) > 0.5
    page.get_by_role("button", name="Show what the model wrote").click()
    expect(last.locator(".text")).to_have_text(
        re.compile(r"^<ref>the circle</ref><box>\(\d+,\d+\),\(\d+,\d+\)</box>$")
    )


def test_every_shape_of_an_answer_is_drawn_and_what_is_malformed_is_text(page: Page) -> None:
    canned(
        page,
        "Here: <ref>two cats</ref><box>(100,500),(300,100)</box><box>(400,0),(1200,900)</box> and <ref>a ca",
        "n</ref><quad>(0,0),(1000,0),(1000,1000),(0,1000)</quad>, <box>(1,2)</box>",
        " nothing <ref>alone</ref> then <box>(500,500),(600,600)</box> <box>(7,",
    )
    attach(page, "red_circle.png")
    last = ask(page, "Where?")
    expect(last.locator(".legend .found")).to_have_text(["two cats", "two cats", "a can", "box 4"])
    expect(last.locator(".canvas .name")).to_have_text(["two cats", "two cats", "a can", "box 4"])
    shapes = last.locator(".canvas .box")
    assert [shapes.nth(i).get_attribute("points") for i in range(4)] == [
        "100,500 300,500 300,100 100,100",
        "400,0 1000,0 1000,900 400,900",  # kept inside the picture
        "0,0 1000,0 1000,1000 0,1000",
        "500,500 600,500 600,600 500,600",
    ]
    expect(last.locator(".text").first).to_have_text(
        "Here: two cats and a can, <box>(1,2)</box> nothing alone then box 4 <box>(7,"
    )


def test_boxes_go_on_the_latest_picture_or_the_one_that_is_picked(page: Page) -> None:
    attach(page, "blue_star.png", "red_circle.png")
    canned(page, "<ref>it</ref><box>(1,2),(300,400)</box>")
    last = ask(page, "Where?")
    picture = last.locator(".canvas img")
    expect(picture).to_have_attribute("alt", "red_circle.png")
    last.get_by_label("Picture that the boxes are drawn on").select_option("Picture 1")
    expect(picture).to_have_attribute("alt", "blue_star.png")
    last.get_by_role("button", name="Enlarge blue_star.png").click()
    expect(page.locator("#zoom .box")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(page.locator("#zoom")).to_be_hidden()


def test_boxes_lie_on_the_picture_as_the_model_saw_it_without_its_exif_rotation(page: Page) -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # show it turned by 90°
    Image.new("RGB", (400, 200), "teal").save(file, "JPEG", exif=exif)
    page.locator("#files").set_input_files(
        {"name": "phone.jpg", "mimeType": "image/jpeg", "buffer": file.getvalue()}
    )
    expect(page.locator("#tray img")).to_have_count(1)
    canned(page, "<box>(0,0),(500,500)</box>")
    image = ask(page, "Where?").locator(".canvas img")
    assert image.evaluate("(e) => e.clientWidth / e.clientHeight") == pytest.approx(2, abs=0.02)


# --------------------------------------------------------------------------------------------- errors


def test_a_server_that_wants_a_key_is_given_it_and_the_key_stays_in_the_tab(
    visit: Callable[..., Page], locked: str
) -> None:
    page = visit(locked)
    field = page.get_by_label("This server asks for an API key.")
    expect(field).to_be_focused()
    page.locator("#files").set_input_files(IMAGES / "red_circle.png")
    expect(page.locator("#tray img")).to_have_count(1)
    page.get_by_label("Temperature").evaluate("(e) => { e.value = '0'; }")
    expect(ask(page, "What is this?").get_by_role("alert")).to_contain_text("needs an API key")
    expect(page.get_by_role("status")).to_have_text("ready")
    field.fill("wrong")
    page.keyboard.press("Enter")
    field = page.get_by_label("This server does not accept that API key.")
    expect(field).to_be_focused()
    field.fill(KEY)
    page.keyboard.press("Enter")
    expect(answer(page).locator(".text")).to_have_text("a red circle")  # the question was asked again
    expect(field).to_be_hidden()
    assert page.evaluate("Object.values(localStorage).join()").find(KEY) < 0
    page.reload()
    expect(page.locator("h1")).not_to_have_text("Playground")  # the model's name, which needs the key
    expect(page.get_by_label(re.compile("API key"))).to_be_hidden()
    other = page.context.new_page()
    other.goto(locked)
    expect(other.get_by_label("This server asks for an API key.")).to_be_visible()


def test_files_that_are_no_pictures_are_named_and_left_out(page: Page) -> None:
    page.locator("#files").set_input_files(
        [
            {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"hello"},
            {"name": "broken.png", "mimeType": "image/png", "buffer": b"\x89PNG\r\n\x1a\n broken"},
        ]
    )
    notice = page.locator("#notice")
    expect(notice).to_contain_text("notes.txt is not a picture that can be sent: PNG, JPEG")
    expect(notice).to_contain_text("broken.png cannot be opened")
    expect(page.locator("#tray img")).to_have_count(0)
    attach(page, "red_circle.png")
    expect(notice).to_be_hidden()


def test_the_servers_own_words_are_shown_and_the_question_can_be_mended(page: Page) -> None:
    attach(page, "red_circle.png")
    alert = ask(page, "circle " * 9000).get_by_role("alert")
    expect(alert).to_contain_text("The server cannot answer this.")
    expect(alert).to_contain_text(re.compile(r"The prompt has \d+ tokens .* the limit is \d+\."))
    alert.get_by_role("button", name="Edit the question").click()
    expect(ask(page, "What is this?").locator(".text")).to_have_text("a red circle")


def test_a_server_that_is_gone_is_told_and_can_be_asked_again_when_it_is_back(page: Page) -> None:
    page.route("**/*", lambda route: route.abort("connectionrefused"))
    attach(page, "red_circle.png")
    alert = ask(page, "What is this?").get_by_role("alert")
    expect(alert).to_contain_text("The server cannot be reached.")
    expect(page.get_by_role("status")).to_have_text("not reachable")
    page.unroute("**/*")
    expect(page.get_by_role("status")).to_have_text("ready")  # it is asked until it is back
    alert.get_by_role("button", name="Try again").click()
    expect(answer(page).locator(".text")).to_have_text("a red circle")


def test_a_busy_server_may_be_asked_again_when_it_said(page: Page) -> None:
    body = json.dumps({"error": {"message": "128 requests are running"}})
    refuse(page, 429, body, {"Retry-After": "1", "Content-Type": "application/json"})
    alert = ask(page, "Hello").get_by_role("alert")
    expect(alert).to_contain_text("The server is busy.")
    expect(alert).to_contain_text("128 requests are running")
    expect(alert.get_by_role("button", name=re.compile("Try again in 1 s"))).to_be_disabled()
    expect(alert.get_by_role("button", name="Try again", exact=True)).to_be_enabled()


def test_every_failure_is_put_into_words(page: Page) -> None:
    for status, body, *words in (
        (
            413,
            '{"error": {"message": "the body has more than 64 MiB"}}',
            "too large",
            "The body has",
            "0.0 MB",
        ),
        (503, '{"error": {"message": "the server is shutting down"}}', "starting or shutting down"),
        (500, '{"error": {"message": "internal error"}}', "went wrong on the server", "Internal error."),
        (502, "<html><b>Bad gateway</b></html>", "went wrong on the server", "It said 502 Bad Gateway."),
        (200, 'data: {"choices": [{"delta": {"content": "half"}}]}\n\n', "broke off", "connection"),
        (200, 'data: {"error": {"message": "vision failed"}}\n\n', "broke off", "vision failed"),
        (200, "data: <html>\n\n", "cannot be understood"),
    ):
        refuse(page, status, body)
        last = ask(page, "Hello")
        for word in words:
            expect(last.get_by_role("alert")).to_contain_text(word)
        if "half" in body:
            expect(last.locator(".text").first).to_have_text("half")


def test_a_loading_server_is_waited_for(visit: Callable[..., Page], server: str) -> None:
    page = visit(server)
    page.route("**/health/ready", lambda r: r.fulfill(status=503, body='{"status": "loading"}'))
    page.reload()
    expect(page.get_by_role("status")).to_have_text("loading the model")
    page.unroute("**/health/ready")
    expect(page.get_by_role("status")).to_have_text("ready")


# ------------------------------------------------------------------------------------- hostile, policy


def test_hostile_text_and_file_names_stay_text(page: Page) -> None:
    evil = '<img src="https://example.com/x" onerror="window.hacked=1"><script>window.hacked=1</script>'
    name = "<img src=x onerror=window.hacked=1>.png"
    png = (IMAGES / "red_circle.png").read_bytes()
    page.locator("#files").set_input_files({"name": name, "mimeType": "image/png", "buffer": png})
    expect(page.locator("#tray img")).to_have_attribute("alt", name)
    canned(page, evil, f"<ref>{evil}</ref><box>(1,2),(300,400)</box>")
    last = ask(page, evil)
    expect(last.locator(".text").first).to_have_text(evil + evil)
    expect(last.locator(".name")).to_have_text(evil)
    expect(page.locator(".question .text")).to_have_text(evil)
    refuse(page, 400, json.dumps({"error": {"message": evil}}))
    expect(ask(page, "again").get_by_role("alert")).to_contain_text(evil)
    page.locator("#files").set_input_files({"name": name, "mimeType": "text/html", "buffer": b""})
    expect(page.locator("#notice")).to_contain_text(name)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img:not([src^='blob:'])").count() == 0


def hash_of(tag: str) -> str:
    """What a policy says of the page's one style or script."""
    [text] = re.findall(f"<{tag}>(.*?)</{tag}>", HTML.read_text(), re.S)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_the_policy_runs_this_script_only_and_lets_no_page_frame_it(page: Page, server: str) -> None:
    policy = page.request.get(server).headers["content-security-policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";") if " " in rule.strip())
    assert rules["default-src"] == "'none'" and rules["connect-src"] == "'self'"
    assert rules["script-src"] == hash_of("script") and rules["frame-ancestors"] == "'none'"
    assert set(rules["img-src"].split()) <= {"'self'", "data:", "blob:"}


def test_the_page_needs_no_more_than_the_hashes_of_its_script_and_style(page: Page, server: str) -> None:
    """A stricter policy than the server may send: no style attribute, no HTML from strings."""
    html = HTML.read_text()
    policy = (
        f"default-src 'none'; style-src {hash_of('style')}; script-src {hash_of('script')}; "
        "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    headers = {"Content-Type": "text/html", "Content-Security-Policy": policy}
    page.route(server, lambda r: r.fulfill(body=html, headers=headers))
    page.reload()
    attach(page, "red_circle.png")
    expect(ask(page, "Locate the circle.").locator(".box")).to_have_count(1)
    page.get_by_role("button", name="Enlarge").last.click()
    expect(page.locator("#zoom")).to_be_visible()


# ------------------------------------------------------------------------- settings, keyboard, screens


def test_the_end_stays_in_view_unless_the_reader_scrolled_up(page: Page) -> None:
    main = page.locator("main")

    def below() -> int:
        """Pixels of the conversation that lie below what is seen, after the next frames."""
        frames = "await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));"
        left = "e.scrollHeight - e.scrollTop - e.clientHeight"
        return main.evaluate(f"async (e) => {{ {frames} return {left}; }}")

    canned(page, *["line\n"] * 200)
    ask(page, "Hello")
    assert below() < 2
    page.locator("#files").set_input_files({"name": "a.txt", "mimeType": "text/plain", "buffer": b""})
    expect(page.locator("#notice")).to_be_visible()  # and takes room
    assert below() < 2
    main.evaluate("(e) => e.scrollBy(0, -1500)")
    assert below() > 1000
    page.get_by_role("button", name="Settings", exact=True).click()  # the page is laid out anew
    assert below() > 1000


def test_settings_are_sent_and_kept(page: Page) -> None:
    bodies = sent(page)
    fields = {"Top p": "0.5", "Top k": "7", "Max tokens": "3", "Seed": "11", "System prompt": "Be brief."}
    page.get_by_role("button", name="Settings", exact=True).click()
    for label, value in fields.items():
        page.get_by_label(label).fill(value)
    page.reload()
    page.get_by_role("button", name="Settings", exact=True).click()
    for label, value in fields.items():
        expect(page.get_by_label(label)).to_have_value(value)
    attach(page, "red_circle.png")
    expect(ask(page, "What is this?").locator(".stats")).to_contain_text("cut at the longest length")
    assert bodies[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    chosen = {k: v for k, v in bodies[0].items() if k not in ("messages", "stream", "stream_options")}
    assert chosen == {"temperature": 0, "top_p": 0.5, "top_k": 7, "max_tokens": 3, "seed": 11}
    page.get_by_role("button", name="Back to defaults").click()
    ask(page, "What is this?")
    assert set(bodies[1]) == {"messages", "stream", "stream_options"}
    page.get_by_label("Top p").fill("3")
    page.get_by_label("Your question").fill("Hello")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Top p")).to_be_focused()  # the browser says what is wrong with it
    assert len(bodies) == 2


def test_cached_tokens_are_told(page: Page) -> None:
    usage = {"prompt_tokens": 290, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 256}}
    canned(page, "yes", usage=usage)
    expect(ask(page, "Hello").locator(".stats")).to_contain_text("1 token · 256 of 290 prompt tokens cached")


def test_the_keyboard_does_everything(page: Page) -> None:
    page.on("filechooser", lambda _: None)  # early: Playwright does not wait until it catches them
    question = page.get_by_label("Your question")
    question.focus()
    page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("button", name="Add pictures")).to_be_focused()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(IMAGES / "red_circle.png")
    expect(page.locator("#tray img")).to_have_count(1)
    expect(question).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(question).to_have_value("one\ntwo")
    expect(page.locator(".turn")).to_have_count(0)
    page.route("**/chat/completions", endless)
    page.keyboard.press("Control+A")
    page.keyboard.type("What is this?")
    page.keyboard.press("Enter")
    last = page.get_by_role("article", name="Answer")
    expect(last.locator(".text")).to_have_text(re.compile("a red circle"))
    page.keyboard.press("Escape")
    expect(answer(page).locator(".stats")).to_contain_text("stopped")
    order = []
    page.evaluate("document.querySelector('#clear').focus()")
    for _ in range(3):
        order.append(page.evaluate("document.activeElement.id"))
        page.keyboard.press("Tab")
    assert order == ["clear", "theme", "tune"]
    page.locator("#tune").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_label("System prompt")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_label("System prompt")).to_be_hidden()
    expect(page.locator("#tune")).to_be_focused()
    page.locator("#clear").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".turn")).to_have_count(0)
    expect(question).to_be_focused()


def test_every_control_has_a_name(page: Page) -> None:
    attach(page, "red_circle.png")
    ask(page, "Locate the circle.")
    attach(page, "red_circle.png")
    page.get_by_role("button", name="Settings", exact=True).click()
    tree = page.locator("body").aria_snapshot()
    controls = re.findall(r"- (?:button|textbox|spinbutton|combobox|img|article)\b(.*)", tree)
    assert len(controls) > 20
    nameless = [c for c in controls if not c.startswith(' "')]
    assert nameless == []


def test_a_phone_of_360_pixels_needs_no_sideways_scrolling(visit: Callable[..., Page], server: str) -> None:
    page = visit(server, viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)

    def widths() -> list[int]:
        return page.evaluate(
            "[document.documentElement, ...document.querySelectorAll('main, #log, #settings, #composer')]"
            ".map((e) => e.scrollWidth - e.clientWidth)"
        )

    assert max(widths()) == 0
    attach(page, *["red_circle_blue_star_green_square.png"] * 6)
    greedy(page)
    ask(page, "Locate the circle." + "x" * 500)
    canned(page, "y" * 500, " <ref>" + "z" * 200 + "</ref><box>(900,10),(990,400)</box>")
    expect(ask(page, "Where?").locator(".box")).to_have_count(1)
    assert max(widths()) == 0
    page.locator("#tune").tap()
    assert max(widths()) == 0
    page.get_by_role("button", name="Close settings").tap()
    send = page.locator("#composer").bounding_box()
    assert send is not None and send["y"] + send["height"] <= 640


def test_dark_mode_follows_the_system_until_it_is_chosen(visit: Callable[..., Page], server: str) -> None:
    page = visit(server, color_scheme="dark")

    def brightness() -> int:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return max(int(n) for n in re.findall(r"\d+", colour)[:3])

    assert brightness() < 60
    page.get_by_role("button", name="Light or dark").click()
    assert brightness() > 200
    page.reload()
    assert brightness() > 200
    page.get_by_role("button", name="Light or dark").click()
    assert brightness() < 60


def test_nothing_moves_for_who_asked_for_less_motion(visit: Callable[..., Page], server: str) -> None:
    page = visit(server, reduced_motion="reduce")
    page.route("**/health/ready", lambda r: r.fulfill(status=503))
    page.reload()
    expect(page.get_by_role("status")).to_have_text("loading the model")
    dot = "getComputedStyle(document.querySelector('#status'), '::before').animationName"
    assert page.evaluate(dot) == "none"


# ----------------------------------------------------------------------------------------- screenshot


def screenshot(output: Path) -> None:
    """The README's picture: the page on a desk, light, and on a phone, dark."""
    from rtp_llm.export.exporter import export

    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        checkpoint = ROOT / "tests" / "checkpoints" / "qwen_vl_shapes"
        bundle = export(checkpoint, Path(folder) / "b", precision="fp32")
        shots = []
        with serving(bundle.path, Path(folder) / "log") as url:
            for scheme, width in (("light", 980), ("dark", 380)):
                viewport: Any = {"width": width, "height": 880}
                context = browser.new_context(color_scheme=scheme, viewport=viewport, is_mobile=width < 500)  # type: ignore[arg-type]
                page = context.new_page()
                page.goto(url)
                greedy(page)
                attach(page, "red_circle_blue_star_green_square.png")
                ask(page, "What is this?")
                ask(page, "Locate the circle.")
                page.get_by_label("Your question").focus()
                page.wait_for_timeout(300)  # transitions
                shots.append(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
        whole = Image.new("RGB", (sum(s.width for s in shots) + 20, shots[0].height), "white")
        whole.paste(shots[0], (0, 0))
        whole.paste(shots[1], (shots[0].width + 20, 0))
        whole.quantize(256, dither=Image.Dither.NONE).save(output, optimize=True)


if __name__ == "__main__":
    screenshot(SCREENSHOT)
