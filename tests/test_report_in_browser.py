"""The report as a real browser shows it: light, dark, narrow, on paper, and fetching nothing.

The pictures are left in pytest's folder of the test, to be looked at.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from report_tools import HOSTILE, browser, look, make_job

from trbatch.reporting import make_report, write_report

DARK = "--blink-settings=preferredColorScheme=0"
Colour = tuple[int, int, int]
PAGE: dict[str, Colour] = {"light": (0xF6, 0xF7, 0xF9), "dark": (0x0F, 0x12, 0x16)}
CARD: dict[str, Colour] = {"light": (0xFF, 0xFF, 0xFF), "dark": (0x17, 0x1B, 0x21)}
BARS: dict[str, Colour] = {"light": (0x2F, 0x6F, 0xDE), "dark": (0x6E, 0xA3, 0xFF)}


@contextmanager
def listening() -> Iterator[tuple[int, list[bytes]]]:
    """A port of this host, and the beginning of all that was sent to it."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    heard.append(connection.recv(100))

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        yield server.getsockname()[1], heard
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)


@pytest.fixture(scope="module")
def port() -> Iterator[tuple[int, list[bytes]]]:
    browser()  # skip before anything is made
    with listening() as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, port: tuple[int, list[bytes]]) -> Path:
    """A page about rows that would like to take it over."""
    folder = tmp_path_factory.mktemp("page")
    url = f"http://127.0.0.1:{port[0]}"
    hostile = f'{HOSTILE}<img src="{url}/x"><link rel=stylesheet href="{url}/y">'
    job = make_job(folder, hostile=f"{hostile} {'w' * 200}")
    write_report(job, make_report(job, gpu_hour_price=2.5), str(folder / "page.html"))
    return folder / "page.html"


def opened(file: Path) -> Image.Image:
    with Image.open(file) as found:
        return found.convert("RGB")


def colours(picture: Image.Image) -> Counter[Colour]:
    found = picture.getcolors(1 << 24)
    assert found is not None
    return Counter({colour: count for count, colour in found})  # type: ignore[misc]


def assert_drawn(picture: Image.Image, scheme: str) -> None:
    """The page's own colours cover it, and the charts' marks are there."""
    found = colours(picture)
    share = (found[PAGE[scheme]] + found[CARD[scheme]]) / found.total()
    assert 0.6 < share < 0.98, "mostly page and cards, and something on them"
    assert found[BARS[scheme]] > 0.01 * found.total(), "bars of the charts"
    other = "dark" if scheme == "light" else "light"
    assert found[PAGE[other]] < 0.001 * found.total()


def assert_margins_are_free(picture: Image.Image, scheme: str) -> None:
    """Nothing is wider than the page: left and right of it nothing but its ground is seen."""
    width, height = picture.size
    for left in (0, width - 12):
        strip = colours(picture.crop((left, 0, left + 12, height)))
        assert set(strip) == {PAGE[scheme]}, strip.most_common(3)


def test_light_on_a_wide_screen(page: Path, port: tuple[int, list[bytes]], tmp_path: Path) -> None:
    picture = opened(look(page, tmp_path / "light.png", width=1200, height=3600))
    assert picture.size == (1200, 3600)
    assert_drawn(picture, "light")
    assert_margins_are_free(picture, "light")
    assert not port[1], "a row made the page fetch something"


def test_dark_and_400_pixels_wide(
    page: Path, port: tuple[int, list[bytes]], tmp_path: Path
) -> None:
    picture = opened(look(page, tmp_path / "narrow.png", DARK, width=400, height=6000))
    assert picture.size == (400, 6000)
    assert_drawn(picture, "dark")
    assert_margins_are_free(picture, "dark")
    assert not port[1]


@pytest.mark.long
def test_on_paper_it_is_light_and_ends_after_a_few_pages(page: Path, tmp_path: Path) -> None:
    file = look(page, tmp_path / "page.pdf", DARK)
    if shutil.which("pdftoppm") is None:
        pytest.skip("pdftoppm is absent")
    command = ["pdftoppm", "-r", "72", "-png", str(file), str(tmp_path / "print")]
    subprocess.run(command, check=True)
    pages = [opened(one) for one in sorted(tmp_path.glob("print-*.png"))]
    assert 2 <= len(pages) <= 8
    for picture in pages:
        found = colours(picture)
        assert found[255, 255, 255] > 0.6 * found.total(), "white paper"
        for left in (0, picture.width - 20):
            assert set(colours(picture.crop((left, 0, left + 20, picture.height)))) == {
                (255, 255, 255)
            }, "cut off at the edge"
    blue = sum(colours(picture)[BARS["light"]] for picture in pages)
    assert blue > 3000, "bars keep their colour on paper"


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 400, 760, 1600])
def test_whatever_the_width_nothing_sticks_out(
    page: Path, tmp_path: Path, scheme: str, width: int
) -> None:
    flags = [DARK] if scheme == "dark" else []
    picture = opened(look(page, tmp_path / "page.png", *flags, width=width, height=4000))
    assert_drawn(picture, scheme)
    assert_margins_are_free(picture, scheme)


@pytest.mark.long
def test_the_browser_finds_no_script_and_keeps_the_title(
    page: Path, port: tuple[int, list[bytes]], tmp_path: Path
) -> None:
    dom = look(page, tmp_path / "dom.html").read_text()
    assert "<title>nightly-2026-11-22 – trbatch report</title>" in dom
    assert "<script" not in dom and "<img" not in dom and "<link" not in dom
    assert "taken" in dom, "the text is there, as a text"
    assert not port[1]
