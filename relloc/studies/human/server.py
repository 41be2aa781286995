"""Serves the page of questions on this machine alone, behind an address that nobody can guess.

The server listens on 127.0.0.1. The path of its address begins with random letters, so that other
users of the machine, and pages of other sites in the same browser, can't reach it. Requests for
another host name are refused: a site could have its own name point to 127.0.0.1.
"""

import base64
import contextlib
import dataclasses
import errno
import hmac
import http.server
import io
import json
import secrets
import socket
import threading
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from relloc.errors import UsageError
from relloc.studies.human.questions import Question
from relloc.studies.human.session import Session, WrongAnswer

HOST = "127.0.0.1"
_PAGE = Path(__file__).with_name("page.html")
_MOST_BYTES = 4096  # of what a page sends
# A browser may open connections in advance and send nothing.
_IDLE_S = 30
_LOOK_EVERY_S = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageTexts:
    """What the page says beside the question. `feedback`: whether it tells the right answer."""

    person: str
    images: str
    feedback: bool


class QuestionServer(http.server.ThreadingHTTPServer):
    """An HTTP server of one session; `over` is set when the last answer was confirmed."""

    daemon_threads = True

    def __init__(self, session: Session, texts: PageTexts, port: int) -> None:
        self.session = session
        self.texts = texts
        self.token = secrets.token_urlsafe(16)
        self.over = threading.Event()
        self._connections: set[socket.socket] = set()
        super().__init__((HOST, port), _Handler)

    @property
    def address(self) -> str:
        """The address of the page."""
        return f"http://{HOST}:{self.server_address[1]}/{self.token}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answers a connection in a thread of its own."""
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Ends a connection that was answered."""
        self._connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Ends the server, and connections that a browser opened in advance.

        Their threads would go on to take answers.
        """
        super().server_close()
        for connection in list(self._connections):
            # The browser may have ended it meanwhile.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of connections that a browser has dropped."""


@contextlib.contextmanager
def serving(
    session: Session, texts: PageTexts, port: int, setting: str
) -> Iterator[QuestionServer]:
    """Serves the page while the block runs; `setting` is the name of the port's setting.

    Raises:
        UsageError: the port is taken, or not allowed.
    """
    try:
        server = QuestionServer(session, texts, port)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise UsageError(
            f"{setting} is {port}, which can't be used ({error.strerror}): give {setting}=0 for "
            "any free one"
        ) from error
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def wait_until_over(server: QuestionServer) -> None:
    """Returns when the session is over; signals reach the waiting process meanwhile."""
    while not server.over.wait(_LOOK_EVERY_S):
        pass


class _Handler(http.server.BaseHTTPRequestHandler):
    server: QuestionServer  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = _IDLE_S

    def do_GET(self) -> None:
        asked = self._asked()
        if asked == "":
            self._send_page()
        elif asked == "state":
            self._send_json(HTTPStatus.OK, _state(self.server))
        elif asked is not None:
            self._refuse(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        asked = self._asked()
        if asked is None:
            return
        if asked not in ("answer", "finish"):
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        content = self._content()
        if content is None:
            return
        session = self.server.session
        reply: dict[str, Any] = {}
        try:
            if asked == "finish":
                session.finish()
            else:
                given = session.answer(*_answer_of(content))
                if self.server.texts.feedback:
                    reply = {"label": given.label, "answer": given.answer}
        except WrongAnswer as error:
            # The page shows what is asked now.
            problem = {"problem": str(error), **_state(self.server)}
            self._send_json(HTTPStatus.CONFLICT, problem)
        except OSError as error:
            problem = {"problem": f"the answer could not be saved ({error.strerror})"}
            self._send_json(HTTPStatus.INSUFFICIENT_STORAGE, problem)
        else:
            self._send_json(HTTPStatus.OK, {**reply, **_state(self.server)})
            # Only now, since the process may end as soon as the session is over.
            if session.is_over:
                self.server.over.set()

    def _asked(self) -> str | None:
        """Returns what follows the secret in the path; without it the request is refused."""
        port = self.server.server_address[1]
        host = self.headers.get("Host", "")
        if host not in (f"{HOST}:{port}", f"localhost:{port}"):
            self._refuse(HTTPStatus.FORBIDDEN)
            return None
        token, slash, asked = self.path.removeprefix("/").partition("/")
        is_right = hmac.compare_digest(token.encode(), self.server.token.encode())
        if not (is_right and slash):
            self._refuse(HTTPStatus.NOT_FOUND)
            return None
        return asked

    def _content(self) -> dict[str, Any] | None:
        """Returns the JSON object that was sent, or refuses the request."""
        length = self.headers.get("Content-Length", "")
        is_json = self.headers.get("Content-Type", "").startswith("application/json")
        is_short = length.isascii() and length.isdigit() and int(length) <= _MOST_BYTES
        content = None
        if is_json and is_short:
            with contextlib.suppress(ValueError, RecursionError):
                content = json.loads(self.rfile.read(int(length)))
        if not isinstance(content, dict):
            self._refuse(HTTPStatus.BAD_REQUEST)
            return None
        return content

    def _send_page(self) -> None:
        # The script of the page runs by this number alone, so that no other one could.
        nonce = secrets.token_urlsafe(16)
        page = _PAGE.read_text(encoding="utf-8").replace("{nonce}", nonce)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
            "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        )
        self._send(HTTPStatus.OK, page.encode(), "text/html; charset=utf-8", policy)

    def _send_json(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        # In ASCII: names of files may have bytes that are no UTF-8.
        self._send(status, json.dumps(content).encode("ascii"), "application/json")

    def _refuse(self, status: HTTPStatus) -> None:
        self._send(status, f"{status.phrase}\n".encode(), "text/plain")

    def _send(
        self, status: HTTPStatus, content: bytes, kind: str, policy: str = "default-src 'none'"
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", policy)
        self.send_header("Cache-Control", "no-store")
        # The address holds the secret.
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)

    def version_string(self) -> str:
        """Returns the name of the server, without versions."""
        return "relloc"

    def log_message(self, format: str, *args: Any) -> None:
        """Prints no line for each request."""


def _answer_of(content: dict[str, Any]) -> tuple[int, int, float]:
    """Returns number, answer and seconds that a page has sent. Raises `WrongAnswer`."""
    number = content.get("question")
    answer = content.get("answer")
    seconds = content.get("seconds")
    # true and false are numbers to Python.
    if any(isinstance(value, bool) for value in (number, answer, seconds)):
        raise WrongAnswer("this is no answer")
    if not isinstance(number, int) or not isinstance(answer, int):
        raise WrongAnswer("this is no answer")
    if not isinstance(seconds, int | float):
        raise WrongAnswer("this is no time in seconds")
    try:
        return number, answer, float(seconds)
    except OverflowError as error:
        raise WrongAnswer("this is no time in seconds") from error


def _state(server: QuestionServer) -> dict[str, Any]:
    """Returns what the page shows now; the right answer is no part of it."""
    session = server.session
    state: dict[str, Any] = {
        **dataclasses.asdict(server.texts),
        "answered": len(session.answers),
        "total": len(session.questions),
        "over": session.is_over,
    }
    question = session.current
    if question is not None and not session.is_over:
        state |= _pictures(question)
    return state


def _pictures(question: Question) -> dict[str, Any]:
    return {
        "question": question.number,
        "center": _as_url(question.center),
        "neighbor": _as_url(question.neighbor),
    }


def _as_url(patch: Tensor) -> str:
    """Returns a patch as a PNG within an address."""
    file = io.BytesIO()
    Image.fromarray(patch.permute(1, 2, 0).contiguous().numpy()).save(file, format="png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
