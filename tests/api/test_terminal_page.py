"""The terminal's page in a real browser: typing, coming back to what was there, tabs, a connection that breaks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.running_manager import RunningManager

from .headless_browser import Browser, Page, headless_browser

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
    if api.get(f"/sandboxes/{sandbox}/terminal").status_code == 503:
        pytest.skip("the npm registry cannot be reached from here")
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
