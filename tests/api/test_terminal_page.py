"""The terminal's page in a real browser: typing, coming back to what was there, tabs, a connection that breaks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.running_manager import RunningManager

from .headless_browser import Browser, Page, headless_browser, skip_without_packages

_TEXT = "Array.from({length: screen.buffer.active.length}, (_, y) => screen.buffer.active.getLine(y).translateToString(true)).join('\\n')"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with headless_browser() as started:
        yield started


def show(page: Page, manager: RunningManager, sandbox: str) -> None:
    page.call("Network.setExtraHTTPHeaders", headers={"X-API-Key": manager.key})
    page.call("Page.navigate", url=f"{manager.url}/sandboxes/{sandbox}/terminal")
    page.wait("document.getElementById('state')?.textContent === 'connected' && !isReplaying")


def test_a_terminal_is_there_again(
    manager: RunningManager, api: httpx.Client, sandbox: str, browser: Browser, tmp_path: Path
) -> None:
    skip_without_packages(api.get(f"/sandboxes/{sandbox}/terminal"))
    with browser.page() as page:
        show(page, manager, sandbox)
        page.evaluate("screen.focus()")
        page.type("echo typed-by-hand\n")
        page.wait(f"({_TEXT}).includes('\\ntyped-by-hand')")
        assert page.complaints == []
    with browser.page() as page:
        show(page, manager, sandbox)
        assert "\ntyped-by-hand" in page.evaluate(_TEXT), "what was there before is shown again"
        page.evaluate("document.getElementById('new').click()")
        page.wait("document.querySelectorAll('#tabs button').length === 2")
        page.wait("document.getElementById('state').textContent === 'connected' && !isReplaying")
        page.evaluate("document.querySelectorAll('#tabs button')[0].click()")
        page.wait(f"({_TEXT}).includes('\\ntyped-by-hand')")
        page.evaluate("socket.close()")
        page.wait("document.getElementById('state').dataset.kind === 'broken'")
        page.wait(
            f"document.getElementById('state').textContent === 'connected' && ({_TEXT}).includes('\\ntyped-by-hand')"
        )
        page.screenshot(Path(os.environ.get("ATELIER_SCREENSHOTS", tmp_path)) / "terminal.png")
        assert page.complaints == []


def test_an_open_page_lets_a_paused_sandbox_be_and_goes_on_after_it(
    manager: RunningManager, api: httpx.Client, sandbox: str, browser: Browser
) -> None:
    skip_without_packages(api.get(f"/sandboxes/{sandbox}/terminal"))
    with browser.page() as page:
        show(page, manager, sandbox)
        page.evaluate("screen.focus()")
        page.type("echo before-the-pause\n")
        page.wait(f"({_TEXT}).includes('\\nbefore-the-pause')")
        assert api.post(f"/api/v1/sandboxes/{sandbox}/pause?wait=true").json()["state"] == "paused"
        page.wait("failures >= 2 && document.getElementById('state').dataset.kind === 'broken'")
        assert api.get(f"/api/v1/sandboxes/{sandbox}").json()["state"] == "paused"
        # Who opens it wakes it, and the page that was open all the time comes back.
        with browser.page() as late:
            show(late, manager, sandbox)
            for each in (page, late):
                each.wait("document.getElementById('state').textContent === 'connected' && !isReplaying")
                each.wait(f"({_TEXT}).includes('\\nbefore-the-pause')")


def test_a_page_begins_when_its_sandbox_runs(
    manager: RunningManager, api: httpx.Client, sandbox: str, browser: Browser
) -> None:
    skip_without_packages(api.get(f"/sandboxes/{sandbox}/terminal"))
    api.post(f"/api/v1/sandboxes/{sandbox}/stop?wait=true")
    with browser.page() as page:
        page.call("Network.setExtraHTTPHeaders", headers={"X-API-Key": manager.key})
        page.call("Page.navigate", url=f"{manager.url}/sandboxes/{sandbox}/terminal")
        page.wait("document.getElementById('state')?.textContent.includes('is stopped')")
        api.post(f"/api/v1/sandboxes/{sandbox}/start?wait=true")
        page.wait("document.getElementById('state').textContent === 'connected' && !isReplaying")


def test_who_is_signed_out_meanwhile_is_sent_to_sign_in(
    manager: RunningManager, api: httpx.Client, sandbox: str, browser: Browser
) -> None:
    skip_without_packages(api.get(f"/sandboxes/{sandbox}/terminal"))
    with browser.page() as page:
        show(page, manager, sandbox)
        page.call("Network.setExtraHTTPHeaders", headers={})
        page.wait("location.pathname === '/sign-in'")
