"""The page in a real browser: `make test-browser`. Debian has it: chromium and chromium-driver."""

import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image
from selenium.webdriver import ActionChains, Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from ctmsr.image import decode, encode_png
from ctmsr.model.inference import upscale
from ctmsr.model.network import ConsistencyModel
from pipelines.serve.application import Arguments, find
from pipelines.serve.run import serving
from tests.support.registering import register_model, tiny_model
from tests.support.servers.ray_nodes import free_port

pytestmark = pytest.mark.tier

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1000,900"
)
PHOTO = skimage.data.astronaut()[:96, 160:288]


@pytest.fixture(scope="module")
def model() -> ConsistencyModel:
    return tiny_model()


@pytest.fixture(scope="module")
def url(
    model: ConsistencyModel, tmp_path_factory: pytest.TempPathFactory, ray_session: None
) -> Iterator[str]:
    uri = register_model(model, tmp_path_factory.mktemp("registry"))
    served = Arguments(model="models:/toy/1", tracking_uri=uri)
    with serving(served, find(served), host="127.0.0.1", port=free_port()) as url:
        yield url


@pytest.fixture
def page(url: str, tmp_path: Path) -> Iterator[Chrome]:
    """A new browser that shows the page and stores downloads in `tmp_path`."""
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    assert all(programs.values()), "apt-get install --no-install-recommends chromium chromium-driver"
    options = ChromeOptions()
    options.binary_location = str(programs["chromium"])
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = Chrome(options, ChromeService(str(programs["chromedriver"])))
    try:
        behaviour = {"behavior": "allow", "downloadPath": str(tmp_path)}
        browser.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
        browser.get(url)
        yield browser
    finally:
        browser.quit()


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def choose(page: Chrome, path: str) -> None:
    page.find_element(By.ID, "file").send_keys(path)


def drop(page: Chrome, path: str) -> None:
    """A file from outside the browser, dropped in the middle of the page."""
    data = {"items": [], "files": [path], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        page.execute_cdp_cmd("Input.dispatchDragEvent", {"type": kind, "x": 500, "y": 450, "data": data})


def shown(page: Chrome, identity: str) -> str:
    """Waits until a part of the page is shown; its text."""
    element = page.find_element(By.ID, identity)
    WebDriverWait(page, 60).until(lambda _: element.is_displayed())
    return str(element.text)


@pytest.mark.parametrize("give", [choose, drop])
def test_a_picture_is_upscaled_compared_and_downloaded(
    page: Chrome, tmp_path: Path, model: ConsistencyModel, give: Callable[[Chrome, str], None]
) -> None:
    give(page, write(tmp_path / "me.png", encode_png(PHOTO)))
    shown(page, "result")
    assert re.findall(r"\d+", shown(page, "sizes")) == ["128", "96", "512", "384"]
    assert "Done in" in shown(page, "status")
    before, after = (page.find_element(By.ID, name).rect for name in ("before", "after"))
    assert before == pytest.approx(after, abs=1)

    slider = page.find_element(By.ID, "slider")
    slider.send_keys(Keys.HOME)
    assert clip(page) == "0%"
    without = page.find_element(By.ID, "compare").screenshot_as_png
    slider.send_keys(Keys.END)
    assert clip(page) == "100%"
    assert page.find_element(By.ID, "compare").screenshot_as_png != without

    page.find_element(By.ID, "download").click()
    target = tmp_path / "me_x4.png"
    WebDriverWait(page, 20).until(lambda _: target.exists())
    made = decode(target.read_bytes(), name="me_x4.png")
    assert np.array_equal(made, upscale(model, PHOTO, sigma_max=0.9))
    assert page.get_log("browser") == []


def clip(page: Chrome) -> str:
    return str(
        page.execute_script("return document.getElementById('compare').style.getPropertyValue('--cut')")
    )


def test_a_text_file_gets_a_clear_message_and_the_next_picture_is_taken(page: Chrome, tmp_path: Path) -> None:
    drop(page, write(tmp_path / "notes.txt", b"A recipe for bread.\n"))
    assert shown(page, "error") == "This is not a picture: only PNG and JPEG files are accepted."
    assert not page.find_element(By.ID, "result").is_displayed()
    choose(page, write(tmp_path / "me.png", encode_png(PHOTO)))
    shown(page, "result")
    assert not page.find_element(By.ID, "error").is_displayed()


def test_a_hundred_megapixels_get_a_clear_message(page: Chrome, tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    Image.new("1", (10_000, 10_000)).save(path)
    started = time.monotonic()
    choose(page, str(path))
    assert shown(page, "error") == (
        "The picture has 10000 x 10000 pixels, 100 megapixels; at most 2 megapixels are accepted. "
        "Make it smaller, or crop it."
    )
    assert time.monotonic() - started < 20


def test_a_file_that_is_too_large_is_not_sent(page: Chrome, tmp_path: Path) -> None:
    choose(page, write(tmp_path / "large.png", bytes(40 * 2**20)))
    assert shown(page, "error") == "The file has 40 MB; at most 32 MB are accepted."


def test_the_keyboard_reaches_everything(page: Chrome, tmp_path: Path) -> None:
    choose(page, write(tmp_path / "me.png", encode_png(PHOTO)))
    shown(page, "result")
    page.execute_script("document.getElementById('file').focus()")
    reached = []
    for _ in range(3):
        ActionChains(page).send_keys(Keys.TAB).perform()  # not to the element: a file input takes paths
        reached.append(page.switch_to.active_element.get_attribute("id"))
    assert reached == ["slider", "download", "size"]
    page.switch_to.active_element.send_keys(Keys.ENTER)
    assert page.find_element(By.ID, "size").get_attribute("aria-pressed") == "true"
