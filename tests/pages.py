"""An HTML page as tests look at it: its tags, its visible text, and a screenshot of it in a headless browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

VOID = {"meta", "link", "br", "input", "img", "hr"}
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)


class Page(HTMLParser):
    """Tags with their attributes, the visible text, and whether every tag is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data.replace("\xa0", " ") + "\n"

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag == name]

    @property
    def charts(self) -> list[dict[str, str | None]]:
        """Pictures that say something, which need a text alternative."""
        return [attrs for attrs in self.all("svg") if attrs.get("aria-hidden") != "true"]


def assert_fetches_nothing(html: str) -> None:
    assert not re.search(r"https?:|url\(|@import|<script|<iframe|<img", html)
    assert [attrs["href"] for attrs in Page(html).all("link")] == ["data:,"]


def screenshot(path: Path, *, width: int, dark: bool) -> Any:
    """Pixels [height, width, 3] from 0 to 1 of the page's top; skips without a browser, fails on complaints."""
    if CHROMIUM is None:
        pytest.skip("needs chromium, which is not installed")
    image = pytest.importorskip("matplotlib.image")
    shot = path.with_suffix(".png")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--no-first-run", "--hide-scrollbars",
        "--enable-logging=stderr", f"--user-data-dir={path.parent / 'profile'}", f"--window-size={width},1400",
        f"--screenshot={shot}",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []),
        path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert shot.exists(), done.stderr
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    pixels = image.imread(shot)[..., :3]
    assert pixels.shape[1] == width
    return pixels


def colours(pixels: Any) -> int:
    """How many different colours a sample of the pixels has."""
    return len({tuple(p) for p in pixels[::3, ::3].reshape(-1, 3).round(2)})
