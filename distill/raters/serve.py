"""Serve the page of a study to raters, and keep what they answer.

    python -m distill questionnaire serve --study study/
    python -m distill questionnaire serve --study study/ --host 0.0.0.0 --port 9000

A rater opens http://HOST:PORT/, or http://HOST:PORT/?rater=07 with the name filled in. At the end the page sends one
JSON, which becomes STUDY/answers/NAME.json. Answers that are incomplete, of another study, or of a name that has
answered otherwise before, are refused. Ctrl-C ends the server. Others on the network reach it with --host alone; it
knows no passwords and no TLS, so put it behind what does before you open it to the internet.
"""

import json
import re
import sys
import threading
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import AF_INET, AF_INET6
from urllib.parse import unquote, urlsplit

from distill.raters.answers import parse
from distill.raters.study import ANSWERS, PAGE, Study, read_key
from distill.training.stage import Options, Stage
from engine.commands.stderr import say
from engine.files import whole_file
from engine.options import option

MOST_BYTES = 1 << 22  # of answers; 40 prompts of 9 models have 250 KB
TIMEOUT = 60.0  # seconds that a client may be silent
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".mp4": "video/mp4"}
# The page asks no other site for anything, and no other site shows it in a frame.
POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'"


@dataclass(frozen=True)
class ServeOptions(Options):
    study: Path = option(Path("study"), "folder that `questionnaire make` wrote", metavar="DIR")
    answers: Path | None = option(None, "folder for one JSON per rater (STUDY/answers)", metavar="DIR")
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 lets others in")
    port: int = option(8200, "port to listen on; 0 takes a free one")


class Refused(ValueError):
    """What a client hears of an answer that is not kept."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class Answered:
    """The folder of answers. One answer per name: another one of the same name is refused."""

    def __init__(self, folder: Path, study: Study) -> None:
        self.folder, self.study = folder, study
        self._one_at_a_time = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def keep(self, body: bytes) -> None:
        """Write the answers of a rater, whole or not at all. Refused says why they are not kept."""
        try:
            answers = parse(body, self.study, "answers")
            if missing := answers.missing(self.study):
                raise ValueError(f"answers: got none to {missing} of {len(self.study.prompts)} prompts, expected all")
        except ValueError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from None
        path = self.folder / f"{answers.rater}.json"
        with self._one_at_a_time:
            if path.exists():
                if path.read_bytes() == body:
                    return
                why = f"answers: got others of rater {answers.rater!r} before, expected a name that is new"
                raise Refused(HTTPStatus.CONFLICT, why)
            with whole_file(path) as part:
                part.write_bytes(body)
        say(f"stored {path.name} ({len(list(self.folder.glob('*.json')))} raters)")


class Handler(BaseHTTPRequestHandler):
    """Files of the page, in parts where a player asks for parts; POST /answers."""

    protocol_version = "HTTP/1.1"
    timeout = TIMEOUT

    def __init__(self, *connection: object, files: dict[str, Path], answered: Answered) -> None:
        self.files, self.answered = files, answered
        super().__init__(*connection)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        path = self.files.get(unquote(urlsplit(self.path).path))
        if path is None:
            self._say(HTTPStatus.NOT_FOUND, "got no such page, expected /")
            return
        with path.open("rb") as file:
            size = path.stat().st_size
            asked = self._range(size)
            if asked is not None and not asked:
                self._head(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, 0, {"Content-Range": f"bytes */{size}"})
                return
            part = range(size) if asked is None else asked
            more = {"Content-Type": TYPES[path.suffix], "Accept-Ranges": "bytes"}
            if asked:
                more["Content-Range"] = f"bytes {part[0]}-{part[-1]}/{size}"
            self._head(HTTPStatus.PARTIAL_CONTENT if asked else HTTPStatus.OK, len(part), more)
            if self.command != "HEAD":
                file.seek(part.start)
                self._copy(file, len(part))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        try:
            if urlsplit(self.path).path != "/answers":
                raise Refused(HTTPStatus.NOT_FOUND, "got no such page, expected /answers")
            self.answered.keep(self._body())
        except Refused as error:
            say(f"refused: {error}")
            self._say(error.status, str(error))
        except OSError as error:
            say(f"error: answers: got {error.strerror}, expected them to be written")
            self._say(HTTPStatus.INTERNAL_SERVER_ERROR, "answers: got an error of the disk, expected them written")
        else:
            self._say(HTTPStatus.OK, "stored")

    def _body(self) -> bytes:
        """The answers that a client sends. What is not read closes the connection."""
        self.close_connection = True
        if self.headers.get_content_type() != "application/json":  # forms of other sites cannot send it
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "answers: got no JSON, expected application/json")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,18}", length):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "answers: got no Content-Length, expected it")
        if int(length) > MOST_BYTES:
            why = f"answers: got {length} bytes, expected at most {MOST_BYTES}"
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, why)
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise Refused(HTTPStatus.BAD_REQUEST, f"answers: got {len(body)} of {length} bytes, expected all")
        return body

    def _range(self, size: int) -> range | None:
        """The bytes that are asked for, none where they lie beyond the end; None for all, also after nonsense."""
        found = re.fullmatch(r"bytes=([0-9]{0,18})-([0-9]{0,18})", self.headers.get("Range", "").strip())
        first, last = found.groups() if found else ("", "")
        if not first:
            return range(max(0, size - int(last)), size) if last else None
        if last and int(last) < int(first):
            return None
        return range(int(first), min(int(last) + 1 if last else size, size))

    def _head(self, status: HTTPStatus, length: int, more: dict[str, str]) -> None:
        self.send_response(status)
        always = {"Content-Length": str(length), "Cache-Control": "no-cache", "Content-Security-Policy": POLICY,
                  "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}  # fmt: skip
        for name, value in (always | more).items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def _say(self, status: HTTPStatus, message: str) -> None:
        body = json.dumps({"message": message}).encode()
        self._head(status, len(body), {"Content-Type": "application/json"})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _copy(self, file: object, count: int) -> None:
        while count and (piece := file.read(min(count, 1 << 16))):  # type: ignore[attr-defined]
            self.wfile.write(piece)
            count -= len(piece)

    def log_message(self, format: str, *values: object) -> None:
        """Nothing: only answers are worth a line."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, page: Path, answered: Answered) -> None:
        self.address_family = AF_INET6 if ":" in host else AF_INET
        files = {f"/{path.relative_to(page).as_posix()}": path for path in page.rglob("*") if path.suffix in TYPES}
        if "/index.html" not in files:
            raise FileNotFoundError(f"study: got no {page / 'index.html'}, expected the page that make wrote")
        handler = partial(Handler, files=files | {"/": files["/index.html"]}, answered=answered)
        try:
            super().__init__((host, port), handler)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise ValueError(f"host, port: got {host}, {port} ({why}), expected an address to listen on") from None

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that leaves is no error; anything else is one line."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError | TimeoutError):
            say(f"error: request: got {type(error).__name__}: {error}, expected an answer")


def run(options: ServeOptions) -> None:
    """Serve until Ctrl-C."""
    study = read_key(options.study)
    answered = Answered(options.answers or options.study / ANSWERS, study)
    with Server(options.host, options.port, options.study / PAGE, answered) as server:
        name = f"[{options.host}]" if ":" in options.host else options.host
        say(f"serving on http://{name}:{server.server_address[1]}/ ({len(study.prompts)} prompts); "
            f"answers go to {answered.folder}; Ctrl-C ends")  # fmt: skip
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say(f"ended; {len(list(answered.folder.glob('*.json')))} raters have answered")


STAGE = Stage(ServeOptions, run)
