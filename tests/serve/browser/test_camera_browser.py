"""The page's camera button in a real browser, whose camera is Chromium's own test picture."""

import shutil

import pytest

pytest.importorskip("aiortc", reason="the server's packages are not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)
SQUARE = "a blue square moving up quickly on a white background"
FAKE = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]


@pytest.fixture(scope="module")
def server():
    import engine
    from serve.build import make_server
    from serve.options import Network, Sessions

    return make_server(engine.load(), "sprites", Network(), Sessions(sessions=3))


@pytest.fixture(scope="module")
def url(server):
    from serving import app_on_a_thread

    from serve.web.app import make_app

    with app_on_a_thread(make_app(server)) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FAKE)
        yield browser
        browser.close()


@pytest.fixture
def page(url, browser):
    page, thrown = browser.new_page(), []
    page.set_default_timeout(20_000)
    page.on("pageerror", lambda error: thrown.append(str(error)))
    page.goto(url)
    page.wait_for_selector("[data-testid=camera]")
    yield page
    page.close()
    assert not thrown


def session_of(page, server):
    name = page.get_attribute("#download", "href").split("/v1/sessions/")[1].split("/")[0]
    return server.house.get(name)


@pytest.mark.parametrize("transport", ["webrtc", "socket"])
def test_the_video_follows_the_camera(page, server, transport, monkeypatch):
    from engine.media.live import LiveFrames

    given, put = [], LiveFrames.put
    monkeypatch.setattr(LiveFrames, "put", lambda self, frame, at: (given.append(frame), put(self, frame, at)))
    page.click(f"#transport [value={transport}]")
    page.click("[data-testid=camera]")
    page.wait_for_function("document.querySelector('#camera video').videoWidth > 0")
    page.fill("#prompt", SQUARE)
    page.press("#prompt", "Enter")
    page.wait_for_function("video.getVideoPlaybackQuality().totalVideoFrames >= 9")
    session = session_of(page, server)
    assert session.input.taken >= 9
    assert page.inner_text("#status-link") == ("WebRTC" if transport == "webrtc" else "Socket")
    page.click("[data-testid=stop]")
    assert session.join(20)
    assert session.reason == "stopped"
    # Chromium's test picture is green, with a pie that turns.
    frame = given[-1].astype(int)
    assert (frame[..., 1] > frame[..., 0] + 30).mean() > 0.3
    assert any((frame != other).any() for other in given)
    assert page.locator(".notice[data-tone=error]").count() == 0


def test_without_its_camera_the_next_video_follows_nothing(page, server):
    page.click("[data-testid=camera]")
    page.wait_for_function("document.querySelector('#camera video').videoWidth > 0")
    page.click("[data-testid=camera]")
    assert page.evaluate("document.querySelector('#camera video').srcObject") is None
    page.fill("#prompt", SQUARE)
    page.press("#prompt", "Enter")
    page.wait_for_function("video.getVideoPlaybackQuality().totalVideoFrames >= 5")
    assert session_of(page, server).input is None
    page.click("[data-testid=stop]")


def test_a_camera_that_is_refused(url, browser):
    page = browser.new_page()
    page.add_init_script("navigator.mediaDevices.getUserMedia = async () => { throw new Error('Permission denied'); }")
    page.goto(url)
    page.wait_for_selector("[data-testid=camera]")
    page.click("[data-testid=camera]")
    assert page.inner_text("[data-testid=notice-camera] p") == "The camera did not open: Permission denied"
    assert page.get_attribute("[data-testid=camera]", "aria-pressed") == "false"
    page.close()
