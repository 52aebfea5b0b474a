"""The playground in headless Chromium, under the gateway's policy, against a server that speaks OpenAI's API."""

from __future__ import annotations

import asyncio

import browser as chromium
import pytest
from gateway_fakes import fake_gateway, ids
from playground_server import SHORT, FakeServer

from serve.gateway.server import GatewayServer
from serve.options import GatewayOptions

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (chromium.CHROMIUM and chromium.CHROMEDRIVER), reason="needs chromium and chromedriver"),
]


def open_page(tab: chromium.Browser, server: FakeServer) -> None:
    tab.open(server.url)
    tab.until("!document.querySelector('#model').disabled")


def ask(tab: chromium.Browser, text: str = "What is 47 + 38?") -> None:
    tab.type("#prompt", text, "Enter")


ENDED = "document.querySelector('.turn:last-child.turn-assistant:not(.running) .stats')?.innerText"


def test_an_answer_streams_and_its_speed_is_shown(tab, server):
    open_page(tab, server)
    server.pause_after = 3
    ask(tab)
    assert tab.until("document.querySelector('.running .text')?.innerText") in ("The", "The sum", "The sum of")
    tab.until("document.querySelector('.running .stats')?.innerText.includes('TTFT')")
    server.resume.set()
    stats = tab.until(ENDED)
    assert tab.text(".turn-user .text") == "What is 47 + 38?"
    assert tab.text(".turn-assistant .text p") == "The sum of 47 and 38 is 85."
    assert tab.text(".turn-assistant pre") == "print(47 + 38)  # <b>85</b>"
    assert "42 tokens" in stats
    assert "tokens/s" in stats
    assert "TTFT" in stats
    assert "prompt 23 (16 cached)" in stats
    body = server.bodies[0]
    assert body["model"] == "tandem-text"
    assert body["messages"] == [{"role": "user", "content": "What is 47 + 38?"}]
    assert body["stream"] is True
    assert body["stream_options"]["include_usage"] is True
    assert "temperature" not in body


def test_the_conversation_goes_on_and_can_be_changed(tab, server):
    open_page(tab, server)
    for text in ("one", "two"):
        ask(tab, text)
        tab.until(ENDED)
    assert [message["content"] for message in server.bodies[1]["messages"]] == ["one", SHORT, "two"]
    tab.click(".turn:last-child [aria-label='Generate again']")
    tab.until(f"{ENDED} && document.querySelectorAll('.turn').length === 4")
    assert server.bodies[2]["messages"] == server.bodies[1]["messages"]
    tab.run("document.querySelector('.turn-user [aria-label=\"Edit message\"]').click()")
    tab.type(".editor", " and a half", "Enter")
    tab.until(f"{ENDED} && document.querySelectorAll('.turn').length === 2")
    assert server.bodies[3]["messages"] == [{"role": "user", "content": "one and a half"}]
    tab.click("#new-chat")
    tab.until("!document.querySelector('#welcome').hidden")
    assert tab.run("return document.querySelectorAll('.turn').length") == 0


@pytest.mark.parametrize("how", ["button", "key"])
def test_stopping_keeps_what_came_and_leaves_the_server(tab, server, how):
    server.ending = "endless"
    open_page(tab, server)
    ask(tab)
    tab.until("document.querySelector('.turn-assistant .text')?.innerText.includes('on on on')")
    if how == "button":
        tab.click("#stop")
    else:
        tab.press("Escape")
    assert "stopped" in tab.until(ENDED)
    assert server.left.wait(5)
    assert "on on on" in tab.text(".turn-assistant .text")
    assert tab.run("return document.querySelector('#stop').hidden")
    assert tab.run("return document.activeElement.id") == "prompt"


def test_shift_enter_starts_a_line_and_the_keyboard_reaches_everything(tab, server):
    open_page(tab, server)
    assert tab.run("return document.activeElement.id") == "prompt"
    tab.type("#prompt", "first", "Shift+Enter", "second")
    assert tab.run("return document.querySelector('#prompt').value") == "first\nsecond"
    assert server.bodies == []
    tab.press("Enter")
    tab.until(ENDED)
    assert server.bodies[0]["messages"][0]["content"] == "first\nsecond"
    unlabelled = tab.run("""
        const name = (node) => node.innerText?.trim() || node.getAttribute("aria-label") || node.labels?.length;
        const controls = [...document.querySelectorAll("button, input, select, textarea")];
        return controls.filter((node) => !name(node)).map((node) => node.outerHTML);
    """)
    assert unlabelled == []
    tab.run("document.querySelector('#new-chat').focus()")
    reached = set()
    for _ in range(30):
        reached.add(tab.run("return document.activeElement.id"))
        tab.press("Tab")
    assert {"new-chat", "open-key", "toggle-settings", "prompt", "setting-temperature", "setting-seed"} <= reached


def test_settings_are_sent_and_kept(tab, server):
    open_page(tab, server)
    tab.type("#setting-system", "Be brief.")
    for name, value in {"temperature": "0.3", "top_p": "0.9", "top_k": "40", "max_tokens": "64", "seed": "7"}.items():
        tab.type(f"#setting-{name}", value)
    tab.run("const slider = document.querySelector('[aria-label=\"Presence penalty\"]'); slider.value = 0.5; "
            "slider.dispatchEvent(new Event('input', {bubbles: true}))")  # fmt: skip
    ask(tab)
    tab.until(ENDED)
    body = server.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    sent = {
        name: body.get(name) for name in ("temperature", "top_p", "top_k", "max_tokens", "seed", "presence_penalty")
    }
    assert sent == {
        "temperature": 0.3, "top_p": 0.9, "top_k": 40, "max_tokens": 64, "seed": 7, "presence_penalty": 0.5
    }  # fmt: skip
    assert "frequency_penalty" not in body
    open_page(tab, server)
    assert tab.run("return document.querySelector('#setting-top_k').value") == "40"
    tab.click("#reset-settings")
    assert tab.run("return document.querySelector('#setting-top_k').value") == ""


def test_the_picker_offers_the_models_of_this_kind_and_remembers(tab, server):
    open_page(tab, server)
    assert tab.run("return [...document.querySelectorAll('#model option')].map((o) => o.text)") == [
        "tandem-text",
        "other-text",
    ]
    tab.run(
        "const model = document.querySelector('#model'); model.value = 'other-text';"
        "model.dispatchEvent(new Event('change'))"
    )
    assert "32,768 tokens" in tab.text("#welcome-model")
    open_page(tab, server)
    ask(tab)
    tab.until(ENDED)
    assert server.bodies[0]["model"] == "other-text"


def test_a_server_with_keys_is_asked_again_with_the_key(tab, server):
    server.key = "sk-secret"
    tab.open(server.url)
    tab.until("document.querySelector('#key-dialog').open")
    assert tab.text("#key-reason") == "this server needs an API key"
    tab.type("#key", "sk-secret", "Enter")
    tab.until("!document.querySelector('#model').disabled")
    ask(tab)
    tab.until(ENDED)
    server.key = "sk-other"
    ask(tab, "and now?")
    tab.until("document.querySelector('#key-dialog').open")
    tab.run("document.querySelector('#key').value = ''")
    tab.type("#key", "sk-other", "Enter")
    tab.until(f"{ENDED}?.includes('42 tokens')")
    assert [len(body["messages"]) for body in server.bodies] == [1, 3]


@pytest.mark.parametrize(
    ("ending", "message"),
    [("error", "the replica was lost"), ("cut", "The connection ended before the answer was complete.")],
)
def test_a_failure_after_the_first_word_is_shown_below_it(tab, server, ending, message):
    server.ending = ending
    open_page(tab, server)
    ask(tab)
    assert message in tab.until("document.querySelector('.error:not([hidden])')?.innerText")
    assert "The sum" in tab.text(".turn-assistant .text")
    server.ending = "stop"
    tab.click(".error button")
    assert "42 tokens" in tab.until(ENDED)


def test_a_refusal_shows_the_server_s_own_words(tab, server):
    message = "the prompt has 3000 tokens, more than the 2048 positions of 'tandem-text'; shorten it"
    server.refusal = (400, {"message": message, "type": "invalid_request_error", "code": "context_length_exceeded"})
    open_page(tab, server)
    ask(tab)
    shown = tab.until("document.querySelector('.error:not([hidden])')?.innerText")
    assert message in shown
    assert "400 · context_length_exceeded" in shown
    server.refusal = None
    ask(tab, "shorter")
    assert "42 tokens" in tab.until(ENDED)
    assert server.bodies[1]["messages"] == [{"role": "user", "content": "shorter"}]


def test_markup_in_an_answer_stays_text(tab, server):
    server.answer = "<img src=x onerror=alert(1)> **<b>bold</b>** `<i>` \n- <script>1</script>\n- two"
    open_page(tab, server)
    ask(tab, "<u>hello</u>")
    tab.until(ENDED)
    assert tab.run("return document.querySelectorAll('.turn img, .turn b, .turn i, .turn u, .turn script').length") == 0
    assert tab.text(".turn-user .text") == "<u>hello</u>"
    assert tab.run("return document.querySelectorAll('.turn li').length") == 2


@pytest.mark.parametrize("width", [320, 360, 768])
def test_nothing_is_wider_than_the_screen(tab, server, width):
    server.answer = f"{SHORT}\n\n{'x' * 300}\n\n```\n{'y' * 300}\n```\n\nhttps://example.org/{'z' * 200}"
    tab.screen(width, 640, is_phone=width < 500)
    open_page(tab, server)
    overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert tab.run(overflow) == 0
    ask(tab, "w" * 200)
    tab.until(ENDED)
    assert tab.run(overflow) == 0
    assert tab.run("const box = document.querySelector('#scroller'); return box.scrollWidth - box.clientWidth") == 0
    tab.click("#toggle-settings")
    assert tab.run(overflow) == 0
    tab.click("#close-settings")
    assert tab.run("return document.querySelector('#settings').hidden")


def test_the_page_asks_nobody_else_for_anything(tab, server):
    open_page(tab, server)
    ask(tab)
    tab.until(ENDED)
    asked = tab.run("return performance.getEntriesByType('resource').map(({name}) => new URL(name).pathname)")
    assert set(asked) == {"/v1/models", "/v1/chat/completions"}


def test_the_gateway_serves_it(window):
    """The page, the models, the key and the stream of the gateway itself, over a backend without a model."""

    def drive(url: str) -> str:
        window.screen(1280, 800)
        window.open(url)
        window.until("document.querySelector('#key-dialog').open")
        window.type("#key", "sk-real", "Enter")
        window.until("document.querySelector('#welcome-model').innerText === 'tiny · 256 tokens of context'")
        ask(window)
        stats = str(window.until(ENDED))
        assert window.text(".turn-assistant .text") == "Hello there!"
        assert [entry for entry in window.complaints() if "401" not in entry] == []
        return stats

    async def scenario() -> str:
        options = {"api_key": ("sk-real",), "port": 0}
        async with fake_gateway(**options) as gateway:
            server = GatewayServer(gateway.app, GatewayOptions(**options), gateway.drain)
            _, port = await server.start()
            try:
                return await asyncio.to_thread(drive, f"http://127.0.0.1:{port}")
            finally:
                await server.aclose()

    stats = asyncio.run(scenario())
    assert f"{len(ids('Hello there!'))} tokens" in stats
    assert "TTFT" in stats
