"""Opens HTML pages in a real Chromium and lists what a reader would see go wrong."""

import contextlib
import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
WIDTHS = (390, 1440)  # pixels: a phone and a wide screen
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")


@contextlib.contextmanager
def open_browser(profile: Path) -> Iterator:
    """Starts a headless Chromium with a new profile and yields playwright's browser context."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, headless=True, args=FLAGS
        )
        yield context
        context.close()


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serves a folder on a free port of this machine and yields its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def faults(context, address: str, root: str | None = None) -> list[str]:
    """Opens a page in windows of both widths and returns what is wrong with it.

    Args:
        root: beginning of the addresses from which the page may load something; by default it may
            load nothing but itself.
    """
    found: list[str] = []
    root = root or address
    tab = context.new_page()
    tab.on("console", lambda m: found.append(f"console: {m.text}") if m.type == "error" else None)
    tab.on("pageerror", lambda error: found.append(f"error: {error}"))
    tab.on("requestfailed", lambda request: found.append(f"not loaded: {request.url}"))

    def watch(request) -> None:
        if not request.url.startswith((root, "data:", "blob:")):
            found.append(f"fetched from outside: {request.url}")

    tab.on("request", watch)
    tab.goto(address, wait_until="load")
    for width in WIDTHS:
        tab.set_viewport_size({"width": width, "height": 900})
        inner, across = tab.evaluate("[innerWidth, document.documentElement.scrollWidth]")
        assert inner == width
        if across > inner:
            found.append(f"{across - inner} px wider than a window of {width} px")
    broken = "[...document.images].filter(i => !i.naturalWidth).map(i => i.outerHTML)"
    found += [f"picture: {html[:200]}" for html in tab.evaluate(broken)]
    tab.close()
    return found
