"""The inspector at `/` and the reference at `/docs`, in a real browser against real servers."""

import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Dialog, Locator, Page, Request, expect, sync_playwright

from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.processes import ServeProcess
from tests.rpc.calls import TIMEOUT, append, new_session

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
NASTY = "<img src=x onerror=alert(1)></button><script>alert(2)</script>\"'<b>"

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium on this machine to look at the pages with"
)
expect.set_options(timeout=20_000)


class Watched:
    """A page of which everything is kept that must not happen."""

    def __init__(self, page: Page, origin: str) -> None:
        self.page = page
        self.origin = origin
        self.may_lose_connection = False
        """Whether the browser may say that something could not be loaded."""
        self._errors: list[str] = []
        self._foreign: list[str] = []
        page.on("console", self._said)
        page.on("pageerror", lambda error: self._errors.append(str(error)))
        page.on("dialog", self._asked)
        page.on("request", self._requested)

    def _said(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self._errors.append(message.text)

    def _asked(self, dialog: Dialog) -> None:
        self._errors.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _requested(self, request: Request) -> None:
        if not request.url.startswith((self.origin, "data:")):
            self._foreign.append(request.url)

    def open(self, address: str) -> Page:
        """Go to a page and return it."""
        response = self.page.goto(self.origin + address)
        assert response is not None
        assert response.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; ")
        return self.page

    def assert_all_is_well(self) -> None:
        """Assert that there was no error, nothing that the content security policy forbids, and no foreign request."""
        tolerated = "Failed to load resource" if self.may_lose_connection else "\0"
        assert not [error for error in self._errors if not error.startswith(tolerated)]
        assert not self._foreign


NewPage = Callable[..., Watched]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium. For this module only: while it runs, no other test could run an event loop."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture
def new_page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[NewPage]:
    """A function that returns a new page, by default of the shared server; all has to be well with it at the end."""
    pages: list[Watched] = []

    def make(
        server: ServeProcess | None = None, *, width: int = 1280, height: int = 800, scheme: Any = "light"
    ) -> Watched:
        server = server or request.getfixturevalue("server")
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        pages.append(Watched(context.new_page(), f"http://{server.http_address}"))
        return pages[-1]

    yield make
    for page in pages:
        page.page.context.close()
        page.assert_all_is_well()


def append_many(stub: CollabServiceStub, session_id: int, count: int) -> None:
    """Append so many events, in batches."""
    for start in range(0, count, 500):
        events = [pb.NewEvent(actor_id="ada", json='{"n": 1.0}') for _ in range(min(500, count - start))]
        stub.AppendEvents(pb.AppendEventsRequest(session_id=session_id, events=events), timeout=TIMEOUT)


def row(page: Page, number: int) -> Locator:
    """Return the line of an event."""
    return page.locator(f".event[data-seq='{number}']")


def numbers(page: Page) -> list[int]:
    """Return the numbers of the events that are listed, in the order in which they are."""
    listed: list[int] = page.locator("#events").evaluate(
        "list => [...list.querySelectorAll('.event')].map(row => Number(row.querySelector('.seq').textContent))"
    )
    return listed


def expect_state(page: Page, state: str) -> None:
    """Wait until the page says how it is with the connection."""
    expect(page.locator("#state")).to_have_text(state)


def focused(page: Page) -> str:
    """Return what has the focus: a session, an event, or the id of something else."""
    name: str = page.evaluate(
        """() => {
            const { dataset, id, parentElement } = document.activeElement;
            return dataset.session ?? (parentElement.dataset.seq ? "event " + parentElement.dataset.seq : id);
        }"""
    )
    return name


def test_sessions_are_listed_by_activity(new_page: NewPage, stub: CollabServiceStub) -> None:
    """The most recently active comes first, also when that changes while one looks; the focus stays where it is."""
    first, second, third = (new_session(stub, owner_id=f"owner {n} of pages") for n in range(3))
    page = new_page().open("/")
    links = page.locator("#session-list a")
    for index, session_id in enumerate((third, second, first)):
        expect(links.nth(index)).to_have_attribute("data-session", str(session_id))
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert focused(page) == str(second)
    append(stub, first)
    append(stub, second)
    for index, session_id in enumerate((second, first, third)):
        expect(links.nth(index)).to_have_attribute("data-session", str(session_id))
    expect(links.nth(0)).to_contain_text("1 event")
    assert focused(page) == str(second)


def test_sessions_are_found(new_page: NewPage, stub: CollabServiceStub) -> None:
    """Typing a number, a part of a room or of an owner leaves those; an owner's older sessions are asked for."""
    old = new_session(stub, owner_id="an owner of old")
    for _ in range(55):
        new_session(stub)
    by_room = new_session(stub, room="Pages: Where Is It")
    page = new_page().open("/")
    links = page.locator("#session-list a")
    expect(links).to_have_count(50)
    page.keyboard.press("/")
    for text, session_id in (("where is", by_room), ("an owner of old", old), (str(by_room), by_room)):
        page.locator("#filter").fill(text)
        expect(links).to_have_count(1)
        expect(links).to_have_attribute("data-session", str(session_id))
    page.keyboard.press("Escape")
    expect(links).to_have_count(50)
    page.get_by_role("button", name="More sessions").click()
    expect(page.locator(f"#session-list [data-session='{old}']")).to_be_visible()
    assert links.count() > 56
    page.locator("#filter").fill(str(old))
    page.keyboard.press("Enter")
    expect_state(page, "live")
    assert page.url.endswith(f"#{old}")


def test_events_are_shown_as_they_come(new_page: NewPage, stub: CollabServiceStub) -> None:
    """At first the newest 200, then each as it comes; with the head, the rate, and who follows."""
    session_id = new_session(stub, room="Pages: live")
    append_many(stub, session_id, 300)
    page = new_page().open(f"/#{session_id}")
    expect_state(page, "live")
    expect(row(page, 300)).to_be_in_viewport()
    assert numbers(page) == list(range(101, 301))
    expect(page.locator("#followers")).to_have_text("1")
    expect(page.locator("#rate")).to_have_text("0/s")
    for number in range(301, 311):
        append(stub, session_id, actor_id="bob", type="edit", json='{"text": "héllo"}')
        expect(row(page, number)).to_be_in_viewport()
    assert numbers(page) == list(range(101, 311))
    expect(row(page, 310)).to_contain_text(re.compile(r'310.*bob.*edit.*{"text": "héllo"}'))
    expect(page.locator("#head")).to_have_text("310")
    expect(page.locator("#rate")).to_have_text(re.compile(r"[1-9].*/s"))
    expect(page.locator("#about")).to_contain_text("Pages: live")


def test_a_server_that_is_killed_is_followed_on(new_page: NewPage, database_url: str, directory: Path) -> None:
    """When it is back, no event is missing or listed twice; of what is too much to show, it is said that it is not."""

    def serve(**environment: str) -> ServeProcess:
        return ServeProcess("--database-url", database_url, cwd=directory, **environment)

    with serve() as server, grpc.insecure_channel(server.grpc_address) as channel:
        address = server.http_address
        stub = CollabServiceStub(channel)
        session_id = new_session(stub)
        append_many(stub, session_id, 50)
        watched = new_page(server)
        watched.may_lose_connection = True
        page = watched.open(f"/#{session_id}")
        expect(row(page, 50)).to_be_visible()
        append_many(stub, session_id, 50)
        server.process.kill()
        server.wait()
        expect_state(page, "reconnecting …")
    with serve(COLLAB_HTTP_ADDRESS=address) as server, grpc.insecure_channel(server.grpc_address) as channel:
        stub = CollabServiceStub(channel)
        append_many(stub, session_id, 50)
        expect_state(page, "live")
        append_many(stub, session_id, 50)
        expect(row(page, 200)).to_be_in_viewport()
        assert numbers(page) == list(range(1, 201))
        page.route(f"**/api/collab/sessions/{session_id}", lambda route: route.abort())
        server.process.kill()
        server.wait()
        expect_state(page, "reconnecting …")
    with serve(COLLAB_HTTP_ADDRESS=address) as server, grpc.insecure_channel(server.grpc_address) as channel:
        append_many(CollabServiceStub(channel), session_id, 600)
        page.unroute_all()
        expect(row(page, 800)).to_be_in_viewport()
        assert numbers(page) == [*range(1, 201), *range(601, 801)]
        expect(page.locator(".gap")).to_have_text("400 events not shown")


def test_pause_and_resume(new_page: NewPage, stub: CollabServiceStub) -> None:
    """While it is paused nothing moves, and what comes is counted; so it is while an event is open or one scrolls."""
    session_id = new_session(stub)
    append_many(stub, session_id, 100)
    page = new_page().open(f"/#{session_id}")
    expect_state(page, "live")
    expect(row(page, 100)).to_be_visible()
    count = 100
    pauses: list[Callable[[], Any]] = [
        lambda: page.keyboard.press("Space"),
        lambda: page.get_by_role("button", name="Pause").click(),
        lambda: row(page, count).locator(".line").click(),
        lambda: page.locator("#scroller").evaluate("scroller => scroller.scrollBy(0, -100)"),
    ]
    for pause in pauses:
        pause()
        expect_state(page, "paused")
        append_many(stub, session_id, 7)
        expect(page.locator("#pause")).to_have_text("Resume 7 new")
        expect(page.locator("#head")).to_have_text(str(count + 7))
        assert numbers(page) == list(range(1, count + 1))
        page.get_by_role("button", name="Resume").click()
        expect_state(page, "live")
        count += 7
        expect(row(page, count)).to_be_in_viewport()
        assert numbers(page) == list(range(1, count + 1))


def test_jump_to_a_number(new_page: NewPage, stub: CollabServiceStub) -> None:
    """The events around a number are shown, from where one can go on or back to live; the address names the place."""
    session_id = new_session(stub)
    append_many(stub, session_id, 700)
    page = new_page().open(f"/#{session_id}")
    expect_state(page, "live")
    page.keyboard.press("g")
    page.keyboard.type("120")
    page.keyboard.press("Enter")
    expect(row(page, 120)).to_be_in_viewport()
    assert page.url.endswith(f"#{session_id}@120")
    assert numbers(page) == list(range(20, 221))
    page.reload()
    expect(row(page, 120)).to_be_in_viewport()
    expect_state(page, "paused")
    page.get_by_role("link", name="19 earlier").click()
    expect(row(page, 19)).to_be_in_viewport()
    assert numbers(page) == list(range(1, 120))
    page.get_by_role("link", name="581 later").click()
    expect(row(page, 120)).to_be_in_viewport()
    append(stub, session_id)
    expect(page.locator("#head")).to_have_text("701")
    page.keyboard.press("Escape")
    expect(row(page, 701)).to_be_in_viewport()
    expect_state(page, "live")
    page.locator("#jump").fill("99999999999999999")
    page.get_by_role("button", name="Go", exact=True).click()
    expect(row(page, 701)).to_have_class(re.compile("found"))
    assert numbers(page) == list(range(601, 702))


def test_the_end_of_a_session_is_told(new_page: NewPage, stub: CollabServiceStub) -> None:
    """When it is deleted the page says so, and keeps what it has; of one that never was it says that."""
    session_id = new_session(stub)
    append_many(stub, session_id, 3)
    watched = new_page()
    watched.may_lose_connection = True
    page = watched.open(f"/#{session_id}")
    expect(row(page, 3)).to_be_visible()
    stub.DeleteSession(pb.DeleteSessionRequest(session_id=session_id), timeout=TIMEOUT)
    expect_state(page, "ended: the session was deleted")
    assert numbers(page) == [1, 2, 3]
    expect(page.locator(f"[data-session='{session_id}']")).to_have_count(0)
    page.evaluate("location.hash = '#999999999999'")
    expect_state(page, "there is no such session")


def test_payloads_are_shown_as_they_are(new_page: NewPage, stub: CollabServiceStub) -> None:
    """In a line and indented, with every number, key and escape as it was written, also those given twice."""
    session_id = new_session(stub)
    payload = r'{"b":9007199254740993,"a":1.0,"a":[1.00,-0.0,1e400],"":"é\u00e9\"\\","c":{},"d":[ ],"e":[{"f":null}]}'
    append(stub, session_id, json=payload, client_seq=2**63 - 1)
    page = new_page().open(f"/#{session_id}")
    line = (
        r'{"b": 9007199254740993, "a": 1.0, "a": [1.00, -0.0, 1e400], "": "é\u00e9\"\\", "c": {}, "d": [], "e": [{"f": '
    )
    expect(row(page, 1).locator(".preview")).to_have_text(line + "null}]}")
    row(page, 1).locator(".line").click()
    expected = r"""{
  "b": 9007199254740993,
  "a": 1.0,
  "a": [
    1.00,
    -0.0,
    1e400
  ],
  "": "é\u00e9\"\\",
  "c": {},
  "d": [],
  "e": [
    {
      "f": null
    }
  ]
}"""
    assert row(page, 1).locator("pre").text_content() == expected
    expect(row(page, 1).locator(".fields")).to_contain_text("9223372036854775807")


def test_binary_payloads_are_shown(new_page: NewPage, stub: CollabServiceStub) -> None:
    """With their size, in hexadecimal beside the characters, or in base64; also when they are empty."""
    session_id = new_session(stub)
    append(stub, session_id, binary=b"\x00\x01\xffHello, <world>")
    append(stub, session_id, binary=b"")
    page = new_page().open(f"/#{session_id}")
    expect(row(page, 1).locator(".preview")).to_have_text(re.compile("binary, 17 bytes +00 01 ff 48"))
    expect(row(page, 2).locator(".preview")).to_have_text(re.compile("binary, 0 bytes"))
    row(page, 1).locator(".line").click()
    shown = row(page, 1).locator("pre")
    assert shown.text_content() == (
        "0000  00 01 ff 48 65 6c 6c 6f 2c 20 3c 77 6f 72 6c 64  ···Hello, <world\n"
        "0010  3e                                               >\n"
    )
    row(page, 1).get_by_role("button", name="Base64", exact=True).click()
    assert shown.text_content() == "AAH/SGVsbG8sIDx3b3JsZD4=\n"


def test_a_large_payload_is_shown_in_portions(new_page: NewPage, stub: CollabServiceStub) -> None:
    """A megabyte opens at once, with a button that brings more of it, to the end."""
    session_id = new_session(stub)
    append(stub, session_id, json='{"text": "' + "x" * 100_000 + '", "last": 1}')
    append(stub, session_id, json='{"numbers": [' + ",".join(["1.0"] * 250_000) + "]}")
    page = new_page().open(f"/#{session_id}")
    row(page, 2).locator(".line").click()
    shown = row(page, 2).locator("pre")
    assert 1_000 < len(shown.text_content() or "") < 50_000
    row(page, 2).locator(".line").click()
    row(page, 1).locator(".line").click()
    shown = row(page, 1).locator("pre")
    more = row(page, 1).get_by_role("button", name="Show more")
    for _ in range(5):
        more.click()
    expect(more).to_be_hidden()
    assert shown.text_content() == '{\n  "text": "' + "x" * 100_000 + '",\n  "last": 1\n}'


def test_nothing_an_author_wrote_is_run(new_page: NewPage, stub: CollabServiceStub) -> None:
    """Markup is shown as text, and characters that cannot be seen, or turn the text around them, by their codes."""
    session_id = new_session(stub, room=f"pages: {NASTY}", owner_id=NASTY)
    json = '{"<b>": "<img src=x onerror=alert(3)>", "turned": "a\u202eb\u200b\x9b"}'
    append(stub, session_id, actor_id=NASTY, type="\x1b[2J\u202etype", hash=NASTY, json=json)
    page = new_page().open(f"/#{session_id}")
    line = row(page, 1).locator(".line")
    expect(line.locator(".actor")).to_have_text(NASTY)
    expect(line.locator(".type")).to_have_text(r"\x1b[2J\u202etype")
    expect(line.locator(".preview")).to_have_text(
        r'{"<b>": "<img src=x onerror=alert(3)>", "turned": "a\u202eb\u200b\x9b"}'
    )
    line.click()
    expect(row(page, 1).locator("pre")).to_contain_text("<img src=x onerror=alert(3)>")
    expect(page.locator("#about")).to_contain_text(NASTY)
    expect(page.locator(f"[data-session='{session_id}']")).to_contain_text(NASTY)
    assert page.locator("main :is(img, script, b), #sessions :is(img, script, b)").count() == 0


def test_the_keyboard_is_enough(new_page: NewPage, stub: CollabServiceStub) -> None:
    """Everything can be reached with it, from the list into an event and back, and one sees where one is."""
    older, newer = new_session(stub), new_session(stub)
    append_many(stub, older, 30)
    append(stub, newer)
    page = new_page().open("/")
    press = page.keyboard.press
    expect(page.locator("#session-list a").first).to_have_attribute("data-session", str(newer))
    press("j")
    press("ArrowDown")
    assert focused(page) == str(older)
    assert page.locator("#session-list a:focus").evaluate("link => getComputedStyle(link).outlineStyle") == "solid"
    press("Enter")
    expect_state(page, "live")
    expect(row(page, 30)).to_be_visible()
    press("k")
    press("k")
    assert focused(page) == "event 29"
    expect_state(page, "paused")
    press("Enter")
    expect(row(page, 29).locator("pre")).to_be_visible()
    press("j")
    assert focused(page) == "event 30"
    press("Escape")
    expect(page.locator(".detail")).to_have_count(0)
    press("Escape")
    expect_state(page, "live")
    press("Space")
    expect_state(page, "paused")
    press("Space")
    expect_state(page, "live")
    press("g")
    assert focused(page) == "jump"
    press("Escape")
    press("?")
    expect(page.get_by_role("dialog", name="Keys")).to_be_visible()
    press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    press("Escape")
    expect(page.locator("#opened")).to_be_hidden()
    assert focused(page) == str(older)
    reached = set()
    for _ in range(12):
        press("Tab")
        reached.add(focused(page))
    assert {"filter", "keys"} <= reached


@pytest.mark.parametrize("name", ["inspector", "docs"])
def test_a_phone_is_wide_enough(new_page: NewPage, stub: CollabServiceStub, name: str) -> None:
    """At 375 pixels nothing is cut off or needs scrolling sideways; the list and the session take turns."""
    session_id = new_session(stub, room="pages:" + "very-long-" * 20, owner_id="o" * 255, language_id=2**63 - 1)
    append(stub, session_id, actor_id="a" * 255, type="t" * 255, hash="h" * 255, json='{"text": "' + "x" * 5000 + '"}')
    append(stub, session_id, binary=bytes(100), idempotency_key="k" * 255, signature=bytes(500))
    page = new_page(width=375, height=740).open("/docs" if name == "docs" else "/")
    if name == "docs":
        expect(page.locator("#remove_user")).to_be_attached()
        page.locator("#list_sessions button[type=submit]").click()
        expect(page.locator("#list_sessions .status")).to_have_text(re.compile("200"))
        assert_fits(page)
        return
    assert_fits(page)
    page.locator(f"[data-session='{session_id}']").click()
    expect_state(page, "live")
    expect(page.locator("#sessions")).to_be_hidden()
    expect(page.locator("#followers")).to_have_text("1")
    assert_fits(page)
    for number in (2, 1):
        row(page, number).locator(".line").click()
    append_many(stub, session_id, 1500)
    expect(page.locator("#pause")).to_have_text("Resume 1,500 new")
    assert_fits(page)
    page.get_by_role("link", name="Sessions").click()
    expect(page.locator("#sessions")).to_be_visible()
    expect(page.locator("#opened")).to_be_hidden()


def assert_fits(page: Page) -> None:
    """Assert that nothing reaches beyond the page's sides, but for what is scrolled or shortened within them."""
    beyond = page.evaluate(
        """() => [...document.querySelectorAll("body *")].filter((element) => {
            const { left, right, width } = element.getBoundingClientRect();
            return width && right > 0 && (left < 0 || right > innerWidth) && !element.closest("pre, .line, a");
        }).map((element) => element.outerHTML.slice(0, 200))"""
    )
    assert beyond == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read(new_page: NewPage, stub: CollabServiceStub, scheme: str) -> None:
    """In light and in dark, every text has a contrast of at least 4.5 to its ground (WCAG 2.2, 1.4.3)."""
    session_id = new_session(stub, room=f"pages: contrast in {scheme}")
    append(stub, session_id, actor_id="ada", json='{"text": "hello\u202e", "n": 1, "none": null}')
    append(stub, session_id, binary=bytes(40))
    page = new_page(scheme=scheme).open(f"/#{session_id}@1")
    expect(page.locator(".found")).to_be_visible()
    for number in (1, 2):
        row(page, number).locator(".line").click()
    append(stub, session_id)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    assert_contrast(page, at_least=60)
    for state in ("live", "reconnecting", "ended"):
        page.locator("#state").evaluate("(shown, state) => (shown.dataset.state = state)", state)
        assert_contrast(page, at_least=60)
    page.keyboard.press("?")
    assert_contrast(page, at_least=60)
    page.goto(page.url.partition("#")[0] + "docs")
    page.locator("#list_sessions button[type=submit]").click()
    expect(page.locator("#list_sessions .status")).to_have_text(re.compile("200"))
    assert_contrast(page, at_least=300)


def assert_contrast(page: Page, at_least: int) -> None:
    """Assert it for every text that is shown, which must be so many."""
    texts = page.evaluate(
        """() => {
            const luminance = (color) => {
                const [r, g, b] = color.map((part) => part / 255)
                    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const parts = (color) => color.match(/[\\d.]+/g).map(Number);
            const ground = (element) => {
                for (let at = element; at; at = at.parentElement) {
                    const color = parts(getComputedStyle(at).backgroundColor);
                    if (color[3] !== 0) return color.slice(0, 3);
                }
            };
            return [...document.querySelectorAll("body *")].filter((element) =>
                element.checkVisibility() && !element.disabled
                && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())
            ).map((element) => {
                const own = luminance(parts(getComputedStyle(element).color).slice(0, 3));
                const [dark, light] = [own, luminance(ground(element))].sort((one, other) => one - other);
                return [(light + 0.05) / (dark + 0.05), element.outerHTML.slice(0, 100)];
            });
        }"""
    )
    assert len(texts) >= at_least
    assert [text for text in texts if text[0] < 4.5] == []


def test_the_page_does_not_grow(new_page: NewPage, stub: CollabServiceStub) -> None:
    """After 5,000 events it shows the newest 500, in order and without a gap, and is no larger than after 1,000."""
    session_id = new_session(stub)
    page = new_page().open(f"/#{session_id}")
    expect_state(page, "live")
    sizes: list[int] = []
    for count in (1_000, 2_000, 2_000):
        append_many(stub, session_id, count)
        total = 1_000 + 2_000 * len(sizes)
        expect(page.locator(".event").last).to_have_attribute("data-seq", str(total))
        expect(row(page, total)).to_be_in_viewport()
        listed = numbers(page)
        assert len(listed) <= 500
        assert listed[-1] == total
        assert all(after == before + 1 for before, after in pairwise(listed))
        sizes.append(page.evaluate("document.querySelectorAll('*').length"))
    assert max(sizes) <= sizes[0] * 1.05
    expect(page.locator("#head")).to_have_text("5,000")


def test_the_reference_shows_every_call(new_page: NewPage) -> None:
    """Each operation of `/openapi.json`, its parameters and answers, and each shape; the pages link to each other."""
    page = new_page().open("/")
    page.get_by_role("link", name="API").click()
    expect(page.locator("section.shape").first).to_be_attached()
    document = page.request.get(page.url.replace("/docs", "/openapi.json")).json()
    error = document["paths"]["/api/collab/events"]["get"]["responses"]["400"]["content"]["application/json"]["schema"]
    name_of_errors = error["$ref"].rpartition("/")[2]
    expect(page.get_by_role("link", name="one shape")).to_have_attribute("href", f"#shape-{name_of_errors}")
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            section = page.locator(f"#{operation['operationId']}")
            expect(section.locator("h2")).to_have_text(f"{method.upper()} {path}")
            inputs = section.locator("input").evaluate_all("inputs => inputs.map(input => input.name)")
            assert inputs == [parameter["name"] for parameter in operation["parameters"]]
            assert section.locator("textarea").count() == int("requestBody" in operation)
            assert set(section.locator("dt").all_inner_texts()) == set(operation["responses"])
            assert section.locator(f"a[href='#shape-{name_of_errors}']").count() == 1
    assert page.locator("section.call").count() == sum(map(len, document["paths"].values()))
    for name, schema in document["components"]["schemas"].items():
        assert page.locator(f"#shape-{name} tbody tr").count() == len(schema["properties"])
    page.get_by_role("link", name="Inspector").click()
    expect(page.locator("#session-list")).to_be_attached()


def test_calls_can_be_tried(new_page: NewPage, stub: CollabServiceStub) -> None:
    """An answer is shown with status, headers and exact body, a stream as it comes; and the line for curl is right."""
    watched = new_page()
    watched.may_lose_connection = True  # as the browser calls an answer that is an error
    page = watched.open("/docs")
    creating, appending, listing = map(page.locator, ("#create_session", "#append_event", "#list_events"))
    creating.locator("textarea").fill('{"room": "pages: it\'s tried", "ownerId": null}')
    creating.get_by_role("button", name="Send").click()
    expect(creating.locator(".status")).to_have_text(re.compile("^201 Created, "))
    expect(creating.locator(".answer")).to_contain_text("x-request-id: ")
    expect(creating.locator(".answer .json")).to_contain_text('"room": "pages: it\'s tried"')
    arguments = shlex.split(creating.locator(".curl").inner_text().replace("\\\n", ""))
    assert arguments[:2] == ["curl", "-i"]
    assert arguments[2:] == [
        *("-X", "POST", f"{watched.origin}/api/collab/sessions", "-H", "Content-Type: application/json"),
        *("--data-raw", '{"room": "pages: it\'s tried", "ownerId": null}'),
    ]
    session_id = stub.GetSession(pb.GetSessionRequest(room="pages: it's tried"), timeout=TIMEOUT).session.id
    assert f'"sessionId": {session_id}' in appending.locator("textarea").input_value()
    appending.locator("textarea").fill(f'{{"sessionId": {session_id}, "payload": {{"n": 9007199254740993}}}}')
    appending.locator("[name=Idempotency-Key]").fill("schlüssel")
    for status in ("201 Created, ", "200 OK, "):
        appending.get_by_role("button", name="Send").click()
        expect(appending.locator(".status")).to_have_text(re.compile(f"^{status}"))
        expect(appending.locator(".answer .json")).to_contain_text('"n": 9007199254740993')
        expect(appending.locator(".answer .json")).to_contain_text('"idempotencyKey": "schlüssel"')
    listing.locator("select").select_option("text/event-stream")
    listing.get_by_role("button", name="Send").click()
    expect(listing.locator(".answer .json")).to_contain_text("event: caught-up")
    append(stub, session_id, type="while it follows")
    expect(listing.locator(".answer .json")).to_contain_text("while it follows")
    listing.get_by_role("button", name="Stop").click()
    expect(listing.locator(".status")).to_have_text(re.compile("stopped$"))
    listing.locator("[name=limit]").fill("-1")
    listing.locator("select").select_option(index=0)
    listing.get_by_role("button", name="Send").click()
    expect(listing.locator(".status")).to_have_text(re.compile("^400 Bad Request, "))
    expect(listing.locator(".answer .json")).to_contain_text('"field": "limit"')
