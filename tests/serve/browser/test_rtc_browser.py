"""WebRTC in a real browser: a page of a few lines offers, and shows the video."""

import shutil

import pytest

pytest.importorskip("aiortc", reason="the server's packages are not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)
CIRCLE = "a red circle moving right slowly on a gray background"
SQUARE = "a blue square moving up quickly on a white background"
CONNECT = """async ([codec, prompt]) => {
  document.body.innerHTML = "<video id=video autoplay muted playsinline></video>";
  const pc = window.pc = new RTCPeerConnection(), candidates = [];
  window.messages = [];
  pc.onicecandidate = ({candidate}) => candidate && candidates.push(candidate.toJSON());
  pc.ontrack = ({streams}) => { video.srcObject = streams[0]; };
  const transceiver = pc.addTransceiver("video", {direction: "recvonly"});
  if (codec) {
    const known = RTCRtpReceiver.getCapabilities("video").codecs;
    transceiver.setCodecPreferences(known.filter(({mimeType}) => mimeType === codec));
  }
  window.channel = pc.createDataChannel("parameters");
  channel.onmessage = ({data}) => messages.push(JSON.parse(data));
  await pc.setLocalDescription(await pc.createOffer());
  const ask = (method, path, body) => fetch(`/api/v1/webrtc/offer${path}`, {method, body: JSON.stringify(body)});
  const initialParameters = {prompts: [{text: prompt, weight: 1}], seed: 5};
  const answer = await (await ask("POST", "", {...pc.localDescription.toJSON(), initialParameters})).json();
  await pc.setRemoteDescription({sdp: answer.sdp, type: answer.type});
  return (await ask("PATCH", `/${answer.sessionId}`, {candidates})).status;
}"""
STATS = """async () => {
  const found = {};
  for (const one of (await pc.getStats()).values())
    if (one.type === "codec" || one.type === "inbound-rtp") Object.assign(found, one);
  return found;
}"""
# The most frequent colour, and the reddest one.
COLOURS = """() => {
  const pen = new OffscreenCanvas(video.videoWidth, video.videoHeight).getContext("2d");
  pen.drawImage(video, 0, 0);
  const data = pen.getImageData(0, 0, video.videoWidth, video.videoHeight).data, count = {};
  let red = [0, 0, 0];
  for (let i = 0; i < data.length; i += 4) {
    const pixel = [...data.slice(i, i + 3)];
    count[pixel] = (count[pixel] || 0) + 1;
    if (pixel[0] - pixel[1] > red[0] - red[1]) red = pixel;
  }
  return [Object.entries(count).sort((a, b) => b[1] - a[1])[0][0].split(",").map(Number), red];
}"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]


@pytest.fixture(scope="module")
def page():
    from serving import app_on_a_thread

    import engine
    from serve.build import make_server
    from serve.options import Network, Sessions
    from serve.web.app import make_app

    server = make_server(engine.load(), "sprites", Network(), Sessions(sessions=3))
    with app_on_a_thread(make_app(server)) as url, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(url)
        yield page
        browser.close()


@pytest.mark.parametrize("codec", ["", "video/VP8"])
def test_a_browser_shows_the_video(page, codec):
    assert page.evaluate(CONNECT, [codec, CIRCLE]) == 204
    page.wait_for_function("video.getVideoPlaybackQuality().totalVideoFrames >= 8", timeout=20_000)
    stats = page.evaluate(STATS)
    assert stats["mimeType"] == (codec or "video/H264")
    assert stats["framesDecoded"] >= 8
    assert stats["jitterBufferDelay"] / stats["jitterBufferEmittedCount"] < 0.5  # seconds
    ground, red = page.evaluate(COLOURS)
    # The engine's own colours; taken in another standard's, the circle is 15 and 21 away.
    assert ground == pytest.approx([125, 125, 125], abs=4)
    assert red == pytest.approx([225, 33, 36], abs=11)
    page.evaluate("prompt => channel.send(JSON.stringify({prompts: [{text: prompt, weight: 1}]}))", SQUARE)
    page.wait_for_function(f"({COLOURS})()[0].every(value => value > 225)", timeout=20_000)
    assert page.evaluate("messages.map(message => message.type)")[0] == "video.start"
    page.evaluate("channel.send(JSON.stringify({type: 'session.stop'}))")
    page.wait_for_function("messages.some(one => one.type === 'stream_stopped' && one.error_message === null)")
    page.evaluate("pc.close()")
