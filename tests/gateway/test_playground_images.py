"""The playground's image tab in headless Chromium, against a server that streams pictures as OpenAI's API does."""

from __future__ import annotations

import asyncio
import base64
import json
import time

import browser as chromium
import pytest
from gateway_fakes import FakeBackend, fake_gateway
from gateway_image_fakes import FakeImageBackend
from playground_server import IMAGE_MODELS, TEXT_MODELS, FakeServer, picture

from serve.gateway.server import GatewayServer
from serve.options import GatewayOptions
from serve.request import ImageRequest

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (chromium.CHROMIUM and chromium.CHROMEDRIVER), reason="needs chromium and chromedriver"),
]
PROMPT = "a red circle on a white background"
FINISHED = "document.querySelectorAll('.picture:not(.running):not(.stopped)').length"


def open_images(tab: chromium.Browser, server: FakeServer) -> None:
    tab.open(f"{server.url}/#images")
    tab.until("!document.querySelector('#size').disabled")


def draw(tab: chromium.Browser, prompt: str = PROMPT, count: int = 1) -> None:
    """Ask for pictures by keyboard; the prompt stays in its field, so it is replaced."""
    tab.run(f"document.querySelector('[name=count][value=\"{count}\"]').click()")
    tab.run("document.querySelector('#image-prompt').value = ''")
    tab.type("#image-prompt", prompt, "Enter")


def change(tab: chromium.Browser, selector: str, value: str) -> None:
    tab.run(
        f"const node = document.querySelector({selector!r}); node.value = {value!r};"
        "for (const name of ['input', 'change']) node.dispatchEvent(new Event(name, { bubbles: true }))"
    )


def focused(tab: chromium.Browser) -> str:
    return str(tab.run("return document.activeElement.id"))


def test_a_picture_sharpens_while_its_steps_are_counted(tab, server):
    server.steps_before_pause = 8
    open_images(tab, server)
    draw(tab)
    assert tab.until("document.querySelector('.count')?.innerText.includes('step 7') && true")
    bar = tab.run("const bar = document.querySelector('.progress'); return [bar.ariaValueNow, bar.ariaValueMax]")
    assert bar == ["7", "12"]
    blurred = tab.until("document.querySelector('.frame img:not([hidden])')?.src")
    assert blurred.startswith("data:image/png;base64,")
    assert tab.run("return document.querySelector('.frame').disabled")
    server.resume.set()
    tab.until(f"{FINISHED} === 1")
    assert tab.run("return document.querySelector('.frame img').src") != blurred
    tab.until("document.querySelector('.frame img').naturalWidth === 64")
    assert tab.run("return document.querySelector('.progress')") is None
    assert tab.text(".picture .prompt") == PROMPT
    assert tab.text(".picture .facts").startswith("12 steps · ")


def test_only_what_was_set_is_asked_for(tab, server):
    open_images(tab, server)
    draw(tab)
    tab.until(f"{FINISHED} === 1")
    plain = server.bodies[0]
    assert isinstance(plain.pop("seed"), int)
    assert plain == {
        "model": "tandem-image", "prompt": PROMPT, "n": 1, "size": "64x64", "partial_images": 3,
        "stream": True, "stream_progress": True,
    }  # fmt: skip
    wanted = {
        "negative_prompt": "a square", "num_inference_steps": 20, "guidance_scale": 3.5, "seed": 7,
        "scheduler": "heun", "output_format": "webp",
    }  # fmt: skip
    for name, value in {**wanted, "previews": 0}.items():
        change(tab, f"#image-setting-{name}", str(value))
    change(tab, "#size", "80x48")
    draw(tab, count=3)
    tab.until(f"{FINISHED} === 4")
    body = server.bodies[1]
    assert {name: body[name] for name in wanted} == wanted
    assert (body["n"], body["size"], body["partial_images"]) == (3, "80x48", 0)
    tab.until("document.querySelector('.frame img').naturalWidth === 80")
    open_images(tab, server)
    assert tab.run("return document.querySelector('#image-setting-num_inference_steps').value") == "20"
    tab.click("#reset-settings")
    assert tab.run("return document.querySelector('#image-setting-num_inference_steps').value") == ""


def test_another_size_is_two_numbers_on_the_model_s_grid(tab, server):
    open_images(tab, server)
    change(tab, "#size", "custom")
    change(tab, "#custom-width", "96")
    change(tab, "#custom-height", "33")
    draw(tab)
    assert server.bodies == []
    assert not tab.run("return document.querySelector('#custom-height').validity.valid")
    change(tab, "#custom-height", "32")
    draw(tab)
    tab.until(f"{FINISHED} === 1")
    assert server.bodies[0]["size"] == "96x32"


def test_a_model_offers_what_it_can_do(tab, server):
    open_images(tab, server)
    assert tab.run("return [...document.querySelectorAll('#model option')].map((o) => o.text)") == [
        "tandem-image",
        "class-image",
    ]
    sizes = "return [...document.querySelectorAll('#size option')].map((o) => o.value)"
    offered = tab.run(sizes)
    assert offered[0] == "64x64"
    assert offered[-1] == "custom"
    for width, height in (map(int, size.split("x")) for size in offered[:-1]):
        assert width % 16 == height % 16 == 0
        assert width * height <= 128 * 128
    assert "12 steps" in tab.text("#image-welcome-model")
    change(tab, "#model", "class-image")
    assert tab.run(sizes) == ["256x256"]
    assert tab.run("return document.querySelector('#image-setting-guidance_scale').disabled")
    assert "computes no guidance" in tab.text("#image-settings-form")
    open_images(tab, server)
    assert tab.run("return document.querySelector('#model').value") == "class-image"
    change(tab, "#model", "tandem-image")


def test_a_seed_is_shown_and_used_again_by_a_click(tab, server):
    open_images(tab, server)
    draw(tab, count=2)
    tab.until(f"{FINISHED} === 2")
    seeds = tab.run("return [...document.querySelectorAll('.picture .chip')].map((chip) => Number(chip.innerText))")
    first = server.bodies[0]["seed"]
    assert seeds == [first, first + 1]
    second = tab.run("return document.querySelectorAll('.frame img')[1].src")
    tab.click(".picture:last-child .chip")
    assert tab.text("#fixed-seed-value") == str(first + 1)
    draw(tab)
    tab.until(f"{FINISHED} === 3")
    assert server.bodies[1]["seed"] == first + 1
    assert tab.run("return document.querySelector('.frame img').src") == second
    tab.click("#fixed-seed")
    assert tab.run("return document.querySelector('#image-setting-seed').value") == ""
    assert tab.run("return document.querySelector('#fixed-seed').hidden")
    tab.click("[aria-label='Draw a seed']")
    assert tab.run("return document.querySelector('#image-setting-seed').value") != ""
    tab.click("#reset-settings")


@pytest.mark.parametrize("how", ["button", "key"])
def test_stopping_leaves_the_server_and_keeps_what_can_be_seen(tab, server, how):
    server.ending = "endless"
    open_images(tab, server)
    draw(tab)
    tab.until("document.querySelector('.count')?.innerText === 'decoding'")
    if how == "button":
        tab.click("#image-stop")
    else:
        tab.press("Escape")
    tab.until("document.querySelector('.picture.stopped .facts')?.innerText === 'stopped at step 12'")
    assert server.left.wait(5)
    assert tab.run("return document.querySelector('#image-stop').hidden")
    assert not tab.run("return document.querySelector('.frame img').hidden")
    server.ending = "stop"
    tab.click("[aria-label='Generate again']")
    tab.until(f"{FINISHED} === 1")
    assert server.bodies[1]["seed"] == server.bodies[0]["seed"]


def test_text_and_pictures_are_made_at_the_same_time(tab, server):
    server.steps_before_pause = 6
    server.pause_after = 3
    open_images(tab, server)
    draw(tab, count=2)
    tab.until("document.querySelector('.count')?.innerText.includes('step 5')")
    tab.click("#tab-text")
    tab.until("document.querySelector('#tab-image').classList.contains('busy')")
    tab.type("#prompt", "What is 47 + 38?", "Enter")
    tab.until("document.querySelector('.running .text')?.innerText.startsWith('The')")
    tab.click("#tab-image")
    tab.until("document.querySelector('#tab-text').classList.contains('busy')")
    server.resume.set()
    tab.until(f"{FINISHED} === 2")
    tab.until("document.querySelector('.turn-assistant:not(.running) .stats')?.textContent.includes('42 tokens')")
    tab.until("document.querySelector('#tab-text').classList.contains('news')")
    tab.click("#tab-text")
    assert not tab.run("return document.querySelector('#tab-text').classList.contains('news')")
    assert [body["model"] for body in server.bodies] == ["tandem-image", "tandem-text"]
    assert not server.left.is_set()


def test_several_requests_run_beside_each_other_but_leave_connections_free(tab, server):
    server.steps_before_pause = 2
    open_images(tab, server)
    for _ in range(5):
        draw(tab)
    tab.until("document.querySelectorAll('.picture.running').length === 4")
    assert tab.run("return document.querySelector('#generate').disabled")
    tab.until("[...document.querySelectorAll('.count')].every((count) => count.innerText.includes('step 1'))")
    server.resume.set()
    tab.until(f"{FINISHED} === 4")
    assert len(server.bodies) == 4
    assert not tab.run("return document.querySelector('#generate').disabled")


def test_the_newest_comes_first_and_deleting_moves_the_focus(tab, server):
    open_images(tab, server)
    for prompt in ("a red circle", "a blue square"):
        draw(tab, prompt)
        tab.until(f"document.querySelector('.picture:not(.running) .prompt')?.innerText === {prompt!r}")
    prompts = "return [...document.querySelectorAll('.picture .prompt')].map((node) => node.innerText)"
    assert tab.run(prompts) == ["a blue square", "a red circle"]
    tab.run("document.querySelector('.picture [aria-label=Delete]').focus()")
    tab.press("Enter")
    assert tab.run(prompts) == ["a red circle"]
    assert tab.run("return document.activeElement.ariaLabel") == "Enlarge a red circle"
    tab.click(".picture [aria-label='Delete']")
    assert tab.run("return !document.querySelector('#image-welcome').hidden")
    assert focused(tab) == "image-prompt"


def test_a_click_enlarges_and_the_keyboard_leads_through_the_pictures(tab, server):
    open_images(tab, server)
    draw(tab, count=3)
    tab.until(f"{FINISHED} === 3")
    tab.click(".frame")
    tab.until("document.querySelector('#viewer').open")
    seed = server.bodies[0]["seed"]
    facts = tab.text("#viewer-facts")
    assert all(shown in facts for shown in ("tandem-image", "64 × 64", str(seed), "12", "4.5", "euler"))
    assert tab.run("return document.querySelector('#viewer-previous').disabled")
    tab.press("Right", "Right", "Right")
    assert str(seed + 2) in tab.text("#viewer-facts")
    tab.click("#viewer-delete")
    assert str(seed + 1) in tab.text("#viewer-facts")
    tab.click("#viewer-reuse")
    assert tab.run("return document.querySelector('#image-setting-seed').value") == str(seed + 1)
    tab.click(".frame")
    tab.press("Escape")
    tab.until("!document.querySelector('#viewer').open")
    assert tab.run("return document.activeElement.className") == "frame"
    tab.click("#reset-settings")


def test_a_download_is_the_picture_named_after_prompt_and_seed(tab, server, tmp_path):
    tab.devtools("Page.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    open_images(tab, server)
    change(tab, "#image-setting-output_format", "jpeg")
    change(tab, "#image-setting-seed", "12")
    draw(tab, "Ein größerer Kreis, (rot)!", count=2)
    tab.until(f"{FINISHED} === 2")
    tab.click(".picture:last-child [aria-label='Download']")
    file = tmp_path / "ein-größerer-kreis-rot-13.jpg"
    deadline = time.monotonic() + 10
    while not file.exists():
        assert time.monotonic() < deadline, list(tmp_path.iterdir())
        tab.until("true")
    assert file.read_bytes() == base64.b64decode(picture(server.bodies[0], 1))
    tab.click("#reset-settings")


@pytest.mark.parametrize(
    ("ending", "message"),
    [("error", "the replica was lost"), ("cut", "The connection ended before the picture was complete.")],
)
def test_a_failure_stands_in_the_place_of_the_pictures(tab, server, ending, message):
    server.ending = ending
    open_images(tab, server)
    draw(tab, count=2)
    assert message in tab.until("document.querySelector('#gallery .error')?.innerText")
    assert tab.run("return document.querySelectorAll('.picture').length") == 0
    server.ending = "stop"
    tab.click("#gallery .error button")
    tab.until(f"{FINISHED} === 2")
    assert tab.run("return document.querySelector('#gallery .error')") is None


def test_a_refusal_shows_the_server_s_own_words_and_can_be_dismissed(tab, server):
    message = "guidance_scale is 20, more than 'tandem-image' takes; lower it"
    server.refusal = (400, {"message": message, "type": "invalid_request_error", "code": "invalid_value"})
    open_images(tab, server)
    draw(tab)
    shown = tab.until("document.querySelector('#gallery .error')?.innerText")
    assert message in shown
    assert "400 · invalid_value" in shown
    tab.click("#gallery .error button:last-child")
    assert tab.run("return !document.querySelector('#image-welcome').hidden")


def test_a_server_with_keys_is_asked_again_with_the_key(tab, server):
    server.key = "sk-secret"
    tab.open(f"{server.url}/#images")
    tab.until("document.querySelector('#key-dialog').open")
    tab.type("#key", "sk-secret", "Enter")
    tab.until("!document.querySelector('#size').disabled")
    server.key = "sk-other"
    draw(tab)
    tab.until("document.querySelector('#key-dialog').open")
    tab.run("document.querySelector('#key').value = ''")
    tab.type("#key", "sk-other", "Enter")
    tab.until(f"{FINISHED} === 1")
    assert tab.run("return document.querySelector('#gallery .error')") is None


def test_tabs_follow_the_arrow_keys_and_the_address(tab, server):
    tab.open(server.url)
    tab.until("!document.querySelector('#model').disabled")
    tab.run("document.querySelector('#tab-text').focus()")
    tab.press("Right")
    assert focused(tab) == "tab-image"
    assert tab.run("return location.hash") == "#images"
    states = "return [...document.querySelectorAll('[role=tab]')].map((tab) => [tab.ariaSelected, tab.tabIndex])"
    assert tab.run(states) == [["false", -1], ["true", 0]]
    assert tab.run("return document.querySelector('#panel-text').hidden")
    tab.press("Right")
    assert focused(tab) == "tab-text"
    tab.press("End")
    tab.run("location.reload()")
    tab.until("document.querySelector('#tab-image')?.ariaSelected === 'true'")
    tab.run("location.hash = '#chat'")
    tab.until("document.querySelector('#tab-text').ariaSelected === 'true'")


@pytest.mark.parametrize(
    ("served", "off", "on", "kind"),
    [(TEXT_MODELS, "image", "text", "image"), (IMAGE_MODELS, "text", "image", "text")],
)
def test_a_kind_that_is_not_served_says_so(tab, server, served, off, on, kind):
    server.served = served
    tab.open(f"{server.url}/#{'images' if off == 'image' else 'chat'}")
    tab.until(f"document.querySelector('#tab-{off}').ariaDisabled === 'true'")
    assert tab.run(f"return document.querySelector('#tab-{on}').ariaSelected") == "true"
    assert tab.text(f"#why-{off}") == ""  # shown on hover and focus only
    tab.run(f"document.querySelector('#tab-{on}').focus()")
    tab.press("Left")
    assert focused(tab) == f"tab-{off}"
    assert tab.text(f"#why-{off}") == f"This server has no {kind} model."
    tab.press("Enter")
    assert not tab.run(f"return document.querySelector('#panel-{on}').hidden")


def test_every_control_has_a_name_and_is_reached_by_the_keyboard(tab, server):
    open_images(tab, server)
    draw(tab)
    tab.until(f"{FINISHED} === 1")
    unlabelled = tab.run("""
        const name = (node) => node.innerText?.trim() || node.getAttribute("aria-label") || node.labels?.length;
        const controls = [...document.querySelectorAll("button, input, select, textarea")];
        return controls.filter((node) => !name(node)).map((node) => node.outerHTML);
    """)
    assert unlabelled == []
    tab.run("document.querySelector('#tab-image').focus()")
    reached = set()
    for _ in range(30):
        reached.add(tab.run("const node = document.activeElement; return node.id || node.ariaLabel || node.name"))
        tab.press("Tab")
    assert {"model", "image-prompt", "size", "count", "generate", "Download", "Delete", f"Enlarge {PROMPT}"} <= reached
    assert {"image-setting-seed", "Draw a seed", "image-setting-scheduler"} <= reached


@pytest.mark.parametrize("width", [320, 360, 768])
def test_nothing_is_wider_than_the_screen(tab, server, width):
    tab.screen(width, 640, is_phone=width < 500)
    open_images(tab, server)
    change(tab, "#image-setting-seed", str(2**53 - 1))
    change(tab, "#size", "custom")
    draw(tab, f"a red circle {'w' * 200}", count=2)
    tab.until(f"{FINISHED} === 2")
    overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert tab.run(overflow) == 0
    inside = "const box = document.querySelector('#gallery-scroller'); return box.scrollWidth - box.clientWidth"
    assert tab.run(inside) == 0
    tab.click(".frame")
    tab.until("document.querySelector('#viewer').open")
    assert tab.run(overflow) == 0
    assert tab.run("const box = document.querySelector('.viewer-side'); return box.scrollWidth - box.clientWidth") == 0
    tab.press("Escape")
    tab.click("#toggle-settings")
    assert tab.run(overflow) == 0
    tab.click("#reset-settings")


def test_the_page_asks_nobody_else_for_anything(tab, server):
    open_images(tab, server)
    draw(tab)
    tab.until(f"{FINISHED} === 1")
    asked = tab.run("return performance.getEntriesByType('resource').map(({ name }) => name)")
    own = [name for name in asked if not name.startswith("data:")]
    assert {name.removeprefix(server.url) for name in own} == {"/v1/models", "/v1/images/generations"}, json.dumps(own)


def test_the_gateway_serves_both_tabs(window):
    """Models of both kinds, the key, the stream and the errors of the gateway itself, over backends without a model."""

    def drawn(request: ImageRequest, index: int, step: int) -> bytes:
        body = {"prompt": request.prompt, "seed": request.seed, "size": f"{request.width}x{request.height}"}
        return base64.b64decode(picture(body, index, noise=1 - step / request.num_inference_steps))

    def drive(url: str) -> None:
        window.screen(1280, 800)
        window.open(f"{url}/#images")
        window.until("document.querySelector('#key-dialog').open")
        window.type("#key", "sk-real", "Enter")
        window.until("document.querySelector('#image-welcome-model').innerText === 'painter · 64 × 64 · 4 steps'")
        change(window, "#image-setting-seed", "5")
        draw(window, count=2)
        window.until(f"{FINISHED} === 2")
        window.until("document.querySelector('.frame img').naturalWidth === 64")
        window.click(".picture:last-child .frame")
        facts = window.text("#viewer-facts")
        assert all(shown in facts for shown in ("painter", "6", "3.5", "flow_match_euler"))
        window.press("Escape")
        change(window, "#image-setting-num_inference_steps", "0")
        draw(window)
        assert "num_inference_steps" in window.until("document.querySelector('#gallery .error')?.innerText")
        window.click("#reset-settings")
        window.click("#tab-text")
        window.type("#prompt", "Hello", "Enter")
        window.until("document.querySelector('.turn-assistant:not(.running) .text')?.innerText === 'Hello there!'")
        complaints = window.complaints()
        assert [entry for entry in complaints if "401" not in entry and "400" not in entry] == []

    async def scenario() -> None:
        options = {"api_key": ("sk-real",), "port": 0}
        async with fake_gateway(FakeBackend(), FakeImageBackend(picture=drawn), **options) as gateway:
            server = GatewayServer(gateway.app, GatewayOptions(**options), gateway.drain)
            _, port = await server.start()
            try:
                await asyncio.to_thread(drive, f"http://127.0.0.1:{port}")
            finally:
                await server.aclose()

    asyncio.run(scenario())
