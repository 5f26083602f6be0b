"""python -m serve: streams over a network, to a page, sockets, WebRTC and jobs."""

from __future__ import annotations

import logging
import re
import signal
import socket
import ssl
import sys
import threading
import warnings
import webbrowser

from engine.commands.stderr import is_bad_input, line_of, say
from engine.options import Parser, options_of
from engine.program import SIGNALS, cleanly
from serve.options import TOKEN, Network

EXAMPLES = """\
examples:
  python -m serve                      # the embedded model; open the printed address in a browser
  python -m serve --model Wan2.1-T2V-1.3B --checkpoint self_forcing_dmd.pt --preset self-forcing --precision fp8
  python -m serve --bundle sprites.bundle --backend native
  GREEDY_SERVE_TOKEN=... python -m serve --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem
"""
_GRACE = 5  # seconds for requests that run when the server is told to end


def parser() -> Parser:
    """The command line."""
    from serve.build import add_server_options

    made = Parser(prog="python -m serve", description=__doc__, epilog=EXAMPLES)
    add_server_options(made)
    made.add_argument("--debug", action="store_true", help="show tracebacks, and log every request")
    return made


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 after a signal, 2 bad input, 1 a failure."""
    args = None
    try:
        with cleanly():
            try:
                import uvicorn

                from serve.build import build
                from serve.web.app import make_app
                from serve.web.ending import PoliteServer
            except ImportError as error:
                raise ImportError(
                    f"serve: got no package {error.name}, expected pip install 'greedy-stream[serve]'"
                ) from None
            args = parser().parse_args(argv)
            logging.basicConfig(
                format="%(levelname)s: %(message)s", level=logging.INFO if args.debug else logging.WARNING
            )
            network = options_of(args, Network)
            _check_certificate(network)
            listening = _listen(network.host, network.port)
            server = build(args)
    except Exception as error:
        if getattr(args, "debug", False):
            raise
        say(f"error: {line_of(error)}")
        return 2 if is_bad_input(error) else 1
    room = server.house.room
    warnings.simplefilter("ignore")  # sessions tell their viewers what concerns them
    for note in server.pipeline.notes:
        say(f"note: {note}")
    cert, key = (str(file) if file else None for file in (network.tls_cert, network.tls_key))
    host, port = listening.getsockname()[:2]
    name = "localhost" if host in ("127.0.0.1", "0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    address = f"http{'s' if cert else ''}://{name}:{port}/"
    if not network.local and not network.secret:
        say(f"note: everyone who reaches {host} can use this server; --token or ${TOKEN} asks for a token")
    say(
        f"{server.name}: {server.pipeline.width}x{server.pipeline.height} at {server.pipeline.fps:g} fps, "
        f"{1e3 * server.chunk_seconds:.0f} ms a chunk, {room.sessions} live sessions, {room.waiting} may wait"
    )
    config = uvicorn.Config(
        make_app(server, network.local), log_level="info" if args.debug else "warning", access_log=args.debug,
        ws_max_size=network.upload_mb << 20, timeout_graceful_shutdown=_GRACE, ssl_certfile=cert, ssl_keyfile=key,
        ws_per_message_deflate=False,  # video is compressed already: deflate takes time and saves nothing
    )  # fmt: skip
    for log in ("uvicorn.access", "uvicorn.error"):
        logging.getLogger(log).addFilter(_without_token)
    running = PoliteServer(config, server)
    if network.open:
        threading.Timer(0.5, webbrowser.open, (address,)).start()
    print(f"serving on {address}", flush=True)
    for number in SIGNALS:  # uvicorn has its own handlers; it raises the signal again that made it end
        signal.signal(number, signal.SIG_IGN)
    running.run(sockets=[listening])
    return 0


def _without_token(record: logging.LogRecord) -> bool:
    """Take the token of an address out of a line of the log."""
    if isinstance(record.args, tuple):
        record.args = tuple(
            re.sub(r"(?<=[?&]token=)[^&\s]+", "...", arg) if isinstance(arg, str) else arg for arg in record.args
        )
    return True


def _check_certificate(network: Network) -> None:
    """ValueError for a certificate and a key that do not fit, before the model is loaded."""
    if network.tls_cert is None or network.tls_key is None:
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(network.tls_cert, network.tls_key, password="")  # never asks for one at the terminal
    except (ssl.SSLError, OSError, ValueError) as error:
        expected = "a certificate in PEM and its key, without a password"
        raise ValueError(f"--tls-cert: got {network.tls_cert} ({error}), expected {expected}") from None


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, before the model is loaded. ValueError for an address that is taken or not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen(128)
    except OSError as error:
        made.close()
        raise ValueError(f"--port: got {host}:{port} ({error.strerror or error}), expected a free address") from None
    return made


if __name__ == "__main__":
    sys.exit(main())
