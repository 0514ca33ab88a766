"""The page of a report in a browser: it opens, is drawn, and nothing is said on the console."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from report_records import full  # noqa: F401 - a fixture

# ruff: noqa: F811 - the fixture that tests take

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    return found


def browse(browser, folder, *options, size="1100,2400"):
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--window-size={size}",
    ]
    command += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--v=0", *options]
    command.append((folder / "report" / "index.html").as_uri())
    environment = {**os.environ, "HOME": str(folder)}
    return subprocess.run(command, capture_output=True, timeout=180, check=True, env=environment)


def test_page_opens_in_a_browser_and_says_nothing_on_its_console(full, browser):
    folder, _ = full
    done = browse(browser, folder, "--dump-dom")
    dom = done.stdout.decode()
    assert dom.count("<svg") == len(list((folder / "report").glob("*.png"))) >= 12
    assert "DID NOT PASS" in dom
    assert "CONSOLE" not in done.stderr.decode(errors="replace")


@pytest.mark.parametrize("size", ["1100,2400", "400,2400"])
def test_page_is_drawn_in_a_browser(full, browser, size):
    import matplotlib.image

    folder, _ = full
    picture = folder / "page.png"
    browse(browser, folder, f"--screenshot={picture}", "--hide-scrollbars", size=size)
    pixels = matplotlib.image.imread(picture)[..., :3]
    assert pixels.shape[0] == 2400
    plain = (abs(pixels - pixels[2, 2]) < 0.02).all(axis=-1)
    assert 0.03 < 1 - plain.mean() < 0.9
    blue = (pixels[..., 2] - pixels[..., 0] > 0.4).mean()  # the colour of links and of the first line
    assert blue > 0.0005


def test_console_of_a_browser_is_watched(full, browser, tmp_path):
    folder, text = full
    (tmp_path / "report").mkdir()
    broken = text.replace("<h1>", '<h1><img src="http://localhost:9/x.png">', 1)
    assert broken != text
    (tmp_path / "report" / "index.html").write_text(broken)
    assert "CONSOLE" in browse(browser, tmp_path, "--dump-dom").stderr.decode(errors="replace")
    assert Path(folder).exists()
