"""python -m serve: bad input in one line before the model is loaded, ports, signals, a server that came back."""

import asyncio
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import uvicorn
from clients import OTHER, PROMPT, started
from serving import ROOT, serving

from engine.cli import main as greedy_stream
from serve.__main__ import _without_token, main, parser
from serve.build import make_server
from serve.options import Network, Sessions
from serve.web.app import make_app
from serve.web.ending import PoliteServer

BAD = {
    "--port 70000": "--port: got 70000, expected 0 to 65535",
    "--port x": "argument --port: got 'x', expected a valid integer",
    "--token short": "--token: got a text that is short, not ASCII or has spaces around it, expected at least",
    "--tls-cert x.pem": "--tls-cert: got only one of --tls-cert and --tls-key, expected both",
    "--sessions 0": "--sessions: got 0, expected 1 to 1000",
    "--lease -1": "--lease: got -1.0, expected a positive number",
    "--fps 0": "--fps: got 0.0, expected up to 1000",
    "--host 203.0.113.7": "--port: got 203.0.113.7:0 (Cannot assign requested address), expected a free address",
    "--model /nowhere": "got /nowhere, expected",
    "--preset nothing": "preset: got 'nothing', expected a .toml file or one of",
    "--nothing": "unrecognized arguments: --nothing",
    "--bundle /nowhere": "/nowhere",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line(words, capsys):
    try:
        status = main(["--port", "0", *words.split()])
    except SystemExit as error:
        status = error.code
    lines = capsys.readouterr().err.splitlines()
    assert status == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert BAD[words] in lines[0]


@pytest.mark.parametrize("token", ["short", "geheim-geh\u00e9im", " let me in! "])
def test_a_token_of_the_environment_is_checked_too(token, monkeypatch, capsys):
    monkeypatch.setenv("GREEDY_SERVE_TOKEN", token)
    assert main(["--port", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: GREEDY_SERVE_TOKEN: got a text that is short, not ASCII or")


def test_a_certificate_that_is_none_is_refused_before_the_model_is_loaded(tmp_path, capsys):
    file = tmp_path / "x.pem"
    file.write_text("no certificate")
    assert main(["--port", "0", "--tls-cert", str(file), "--tls-key", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --tls-cert: got {file} (")


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--port", str(port)]) == 2
    assert f"--port: got 127.0.0.1:{port} (Address already in use)" in capsys.readouterr().err


def test_help_names_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for option in ("--host", "--token", "--sessions", "--lease", "--model", "--bundle", "--precision", "--window"):
        assert option in text
    assert "(8000)" in text
    assert parser().prog == "python -m serve"
    with pytest.raises(SystemExit):
        greedy_stream(["serve", "--help"])
    assert "live sessions" in capsys.readouterr().out


@pytest.mark.slow
def test_without_its_packages_it_says_which_extra_has_them(tmp_path):
    (tmp_path / "uvicorn.py").write_text("raise ImportError('No module', name='uvicorn')")
    done = subprocess.run(
        [sys.executable, "-m", "serve"], capture_output=True, text=True, cwd=ROOT, timeout=60,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin"},
    )  # fmt: skip
    assert done.returncode == 2
    expected = "error: serve: got no package uvicorn, expected pip install 'greedy-stream[serve]'"
    assert done.stderr.splitlines() == [expected]


@pytest.mark.slow
def test_a_server_comes_back_and_a_video_goes_on():
    """SIGTERM tells its viewers; another server makes the same video from the next chunk on."""

    async def first(server):
        async with started(server.url, format="rgb", speed=4) as client:
            await client.until("video.chunk_metadata", generation_chunk_index=2)
            await client.interact("e", prompt=OTHER)
            chunk = await client.until("video.chunk_metadata", started_event_ids=["e"])
            server.process.send_signal(signal.SIGTERM)
            await client.rest()
            return client, chunk["generation_chunk_index"]

    async def second(server, **resume):
        async with started(server.url, format="rgb", speed=0, num_frames=49, resume=resume) as client:
            await client.rest()
            return client

    with serving() as server:
        client, at = asyncio.run(first(server))
        assert server.process.wait(30) == 0
        done = client.seen[-1]
        assert (done["type"], done["reason"], done["stopped"]) == ("session.done", "shutdown", True)
        assert "Traceback" not in server.output
    history = [{"chunk": at, "prompt": OTHER}]
    seen = len(client.chunks)
    with serving() as server:
        again = asyncio.run(second(server, chunk=seen, history=history))
        whole = asyncio.run(second(server, chunk=0, history=history))
        assert httpx.get(f"{server.url}/health").json()["sessions"] == 0
        assert server.stop(signal.SIGINT) == 0
    assert [c["data"] for c in client.chunks + again.chunks] == [c["data"] for c in whole.chunks]
    assert again.chunks[0]["generation_chunk_index"] == seen
    assert whole.seen[0]["config"]["prompt"] == PROMPT


def test_the_page_is_part_of_the_package():
    listed = (ROOT / "setup.py").read_text()
    assert '"serve": ["page/*"]' in listed
    assert (Path(ROOT) / "serve" / "page" / "index.html").is_file()


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_server_ends_on_each_loop_without_a_traceback(loop, forced, pipeline, caplog):
    """The extra has no uvloop: its servers run on asyncio's loop. `forced`: Ctrl-C twice."""
    pytest.importorskip(loop)
    server = make_server(pipeline, "tiny", Network(), Sessions(sessions=1))
    config = uvicorn.Config(make_app(server), loop=loop, log_config=None, timeout_graceful_shutdown=2)
    running, failed = PoliteServer(config, server), []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = "http://{}:{}/health".format(*listening.getsockname())

        def run():
            try:
                running.run(sockets=[listening])
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        while not running.started and thread.is_alive():
            time.sleep(0.01)
        assert httpx.get(url).status_code == 200
        running.should_exit, running.force_exit = True, forced
        thread.join(30)
    assert not thread.is_alive()
    assert failed == []
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


def test_no_log_shows_a_token():
    for text in ("/v1/models?token=let-me-in", "/v1/mjpeg?prompt=a&token=let-me-in&seed=1"):
        record = logging.LogRecord(
            "uvicorn.access", logging.INFO, "", 0, '%s - "%s %s" %d', ("a", "GET", text, 200), None
        )
        assert _without_token(record)
        assert record.getMessage() == f'a - "GET {text.replace("let-me-in", "...")}" 200'
