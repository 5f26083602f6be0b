"""The page in a real browser, against a real server: what a person sees and does."""

import json
import re
import shutil
import time

import pytest
from serving import free_port, start_server

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("fastapi", reason="the server's packages are not installed")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for path in map(shutil.which, BROWSERS) if path), None)
TOKEN = "a-token-of-tests"
GRAY = "a red circle moving right slowly on a gray background"
WHITE = "a blue square moving up quickly on a white background"
# Mean of all pixels' red, green and blue, 0 to 255.
BRIGHTNESS = """() => {
  const canvas = new OffscreenCanvas(8, 8), pen = canvas.getContext("2d");
  pen.drawImage(document.querySelector("#stage[data-still]") ? still : video, 0, 0, 8, 8);
  const values = pen.getImageData(0, 0, 8, 8).data.filter((_, i) => i % 4 < 3);
  return values.reduce((a, b) => a + b) / values.length;
}"""
FRAMES = "() => video.getVideoPlaybackQuality().totalVideoFrames"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]


class Restartable:
    """A server with a token and two places, on a port that stays the same when it starts again."""

    def __init__(self, folder):
        self.log = folder / "log"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self):
        options = ("--port", self.port, "--sessions", 2, "--rate", 100_000)
        self.running = start_server(*options, log=self.log, environment={"GREEDY_SERVE_TOKEN": TOKEN})

    def stop(self):
        self.running.stop()


@pytest.fixture(scope="module")
def restartable(tmp_path_factory):
    server = Restartable(tmp_path_factory.mktemp("page"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(restartable, browser):
    """Opens the page in a tab. Scripts throw nothing and ask no other site; sessions end with the test."""
    pages, thrown, asked = [], [], []

    def new(path=f"/?token={TOKEN}", ready=True, script=None, **options):
        context = browser.new_context(**options)
        context.set_default_timeout(20_000)
        page = context.new_page()
        pages.append(page)
        page.on("pageerror", lambda error: thrown.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        if script:
            page.add_init_script(script)
        page.goto(restartable.url + path)
        if ready:
            page.wait_for_selector("[data-example]", state="attached")
        return page

    yield new
    for page in pages:
        if page.locator("#stop").is_enabled():
            page.click("#stop", force=True)
        page.context.close()
    assert not thrown
    assert not [url for url in asked if not url.startswith((f"{restartable.url}/", "data:", "blob:"))]


def play(page, transport="socket", prompt=GRAY):
    page.click(f"#transport [value={transport}]")
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")
    page.wait_for_function("() => video.currentTime > 0.6")


def switch(page, prompt=WHITE):
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")
    page.wait_for_function(f"(prompt) => active.textContent === prompt && ({BRIGHTNESS})() > 170", arg=prompt)


def session_of(page):
    return page.get_attribute("#download", "href").split("/v1/sessions/")[1].split("/")[0]


@pytest.mark.parametrize("transport", ["socket", "webrtc"])
def test_a_video_plays_changes_stops_and_starts_again(opened, transport):
    page = opened()
    play(page, transport)
    assert page.inner_text("#status-link") == {"socket": "Socket", "webrtc": "WebRTC"}[transport]
    assert page.evaluate(BRIGHTNESS) < 150
    switch(page)
    page.wait_for_function("() => /^\\d+\\.\\d+ s$/.test(latency.textContent) && Number(fps.textContent) > 4")
    assert 0.02 < float(page.inner_text("#latency").split()[0]) < 5
    page.click("#pause")
    time.sleep(3)  # what is on its way may still show
    before = page.evaluate(FRAMES)
    time.sleep(1)
    assert page.evaluate(FRAMES) == before
    page.click("#pause")
    page.wait_for_function(f"(before) => ({FRAMES})() > before + 4", arg=before)
    page.click("#stop")
    assert page.inner_text("#status-text") == "Ready"
    assert page.evaluate(BRIGHTNESS) > 170, "the last picture stays"
    play(page, transport)
    page.wait_for_function(f"() => ({BRIGHTNESS})() < 150")


# No route at all, and a route that lets no packet through.
@pytest.mark.parametrize("script", ["", "RTCPeerConnection.prototype.setRemoteDescription = async () => {}"])
def test_without_webrtc_the_page_takes_the_socket_and_says_so(opened, script):
    page = opened(script=script)
    if not script:
        page.route("**/api/v1/webrtc/**", lambda route: route.abort())
    play(page, "auto")
    assert page.inner_text("#status-link") == "Socket"
    assert "socket" in page.inner_text("[data-testid=notice-transport]")


def test_without_h264_the_page_shows_jpegs(opened):
    page = opened(script="delete window.MediaSource; delete window.ManagedMediaSource")
    page.click("#transport [value=socket]")
    page.click(f"[data-example='{GRAY}']")
    page.wait_for_function(f"() => Number(fps.textContent) > 4 && ({BRIGHTNESS})() > 60")
    assert "JPEG" in page.inner_text("[data-testid=notice-note]")


def test_others_watch_by_link_and_a_third_waits_in_line(opened):
    owner, other = opened(), opened()
    play(owner)
    play(other, prompt=WHITE)
    third = opened()
    third.click("#transport [value=socket]")
    third.fill("#prompt", GRAY)
    third.press("#prompt", "Enter")
    third.wait_for_function("() => document.querySelector('#status-text').textContent === 'In line, place 1'")

    viewer = opened(f"/?watch={session_of(owner)}&token={TOKEN}")
    viewer.wait_for_function("(prompt) => video.currentTime > 0 && active.textContent === prompt", arg=GRAY)
    assert not viewer.locator("#prompt").is_visible()
    owner.wait_for_function("() => viewers.textContent === '2'")
    switch(owner)
    viewer.wait_for_function(f"(prompt) => active.textContent === prompt && ({BRIGHTNESS})() > 170", arg=WHITE)
    viewer.click("#transport [value=socket]")
    viewer.wait_for_function("() => document.querySelector('#status-link').textContent === 'Socket'")
    owner.click("#speed [value='2']")
    viewer.wait_for_function("() => video.playbackRate > 1.8")

    other.click("#stop")
    third.wait_for_function("() => video.currentTime > 0.6")


def test_the_download_is_the_video_so_far(opened, tmp_path):
    import av

    page = opened()
    play(page)
    page.wait_for_function("() => video.currentTime > 1.5")
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "video.mp4")
    with av.open(str(tmp_path / "video.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) >= 12


def test_a_stall_is_told_and_a_lost_connection_takes_the_session_over_again(opened):
    page = opened()
    sockets, held = [], []

    def between(route):
        sockets.append(route)
        server = route.connect_to_server()
        route.on_message(server.send)
        server.on_message(lambda data: held[0].append(data) if held else route.send(data))

    page.route_web_socket("**/v1/realtime/video*", between)
    play(page)
    before = session_of(page)
    held.append([])
    stall = page.wait_for_selector("[data-testid=notice-stall]").inner_text()
    assert re.match(r"No frame for \d s\. The server says that the session is playing\.", stall)
    for data in held.pop():
        sockets[0].send(data)
    page.wait_for_selector("[data-testid=notice-stall]", state="detached")
    sockets[0].close(code=4000)
    page.wait_for_selector("[data-testid=notice-connection]")
    page.wait_for_function("() => document.body.dataset.state === 'live' && video.currentTime > 0.6")
    assert session_of(page) == before
    switch(page)


def test_the_video_goes_on_after_a_restart_of_the_server(opened, restartable):
    page = opened()
    sent, got = [], []

    def listen(link):
        link.on("framesent", lambda data: sent.append(json.loads(data)))
        link.on("framereceived", lambda data: isinstance(data, str) and got.append(json.loads(data)))

    page.on("websocket", listen)
    play(page)
    switch(page)
    restartable.stop()
    page.wait_for_selector("[data-testid=notice-connection]")
    got.clear()
    restartable.start()
    page.wait_for_function("() => document.body.dataset.state === 'live' && video.currentTime > 0.6")
    resume = next(message for message in reversed(sent) if message["type"] == "session.start")["resume"]
    assert resume["chunk"] > 2
    assert [entry["prompt"] for entry in resume["history"]] == [WHITE]
    first = next(message for message in got if message["type"] == "video.chunk_metadata")
    assert first["generation_chunk_index"] == resume["chunk"]
    assert first["prompt"] == page.inner_text("#active") == WHITE
    assert page.evaluate(BRIGHTNESS) > 170


def test_a_wrong_token_is_asked_for_again(opened):
    page = opened("/?token=wrong-token", ready=False)
    page.wait_for_selector("#token-dialog[open]")
    assert "token" not in page.url
    page.fill("#token", TOKEN)
    page.press("#token", "Enter")
    page.wait_for_selector("[data-example]")
    play(page)


def test_errors_are_said_in_words(opened):
    page = opened()
    page.press("#prompt", "Enter")
    assert page.inner_text("[data-testid=notice-prompt] p") == "Write a prompt first."
    page.fill("#seed", "-1")
    page.fill("#prompt", GRAY)
    page.press("#prompt", "Enter")
    assert "whole number" in page.inner_text("[data-testid=notice-seed]")
    page.fill("#seed", "3")
    page.click("#transport [value=socket]")
    page.fill("#prompt", "x" * 30_000)
    page.press("#prompt", "Enter")
    assert "prompt" in page.inner_text("[data-testid=notice-error]").lower()
    assert page.inner_text("#go") == "Play"
    page.set_input_files("#picture-file", {"name": "p.png", "mimeType": "image/png", "buffer": b"no picture"})
    assert "p.png is not a picture" in page.inner_text("[data-testid=notice-picture]")


def test_a_phone_scrolls_only_down(opened):
    page = opened(viewport={"width": 360, "height": 740})
    wide = """() => [...document.querySelectorAll("button, input, textarea, a, dd, p")].filter((node) => {
      const box = node.getBoundingClientRect();
      return box.width && !node.closest("#examples") && (box.left < 0 || box.right > 360);
    }).map((node) => node.id || node.outerHTML)"""
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate(wide) == []
    play(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate(wide) == []
