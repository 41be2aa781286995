import contextlib
import ctypes
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from relloc.pretext.stopping import WATCHED, Stopped, stop_request


@pytest.fixture
def handlers() -> Iterator[dict[int, object]]:
    """Sets handlers of its own, so that it shows if they are put back; and then pytest's again."""
    seen: list[int] = []
    before = {number: signal.getsignal(number) for number in WATCHED}
    ours = {number: lambda got, _frame: seen.append(got) for number in before}
    for number, handler in ours.items():
        signal.signal(number, handler)
    yield ours
    for number, handler in before.items():
        signal.signal(number, handler)
    assert seen == []


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def installed() -> dict[int, object]:
    return {number: signal.getsignal(number) for number in WATCHED}


@pytest.mark.parametrize(
    ("number", "code"),
    [
        *((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)),
        *((signal.SIGUSR1, 138), (signal.SIGUSR2, 140)),
    ],
)
def test_an_awaited_signal_becomes_a_request_with_the_shells_exit_code(
    handlers: dict[int, object], number: int, code: int
) -> None:
    with stop_request() as request:
        request.listen(awaited=True)
        assert not request
        assert request.signal is None
        send(number)
        assert request
        assert request.signal == number
        assert request.exit_code == code
        assert request.name == signal.Signals(number).name
    assert installed() == handlers


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138), (signal.SIGUSR2, 140)],
)
def test_a_signal_that_nobody_awaits_ends_the_run_at_once(
    handlers: dict[int, object], number: int, code: int
) -> None:
    with pytest.raises(Stopped) as stopped, stop_request():
        send(number)
    assert stopped.value.code == code
    assert installed() == handlers


def test_ctrl_c_that_nobody_awaits_interrupts(handlers: dict[int, object]) -> None:
    with pytest.raises(KeyboardInterrupt), stop_request():
        send(signal.SIGINT)
    assert installed() == handlers


@pytest.mark.parametrize(
    ("number", "ending"),
    [(signal.SIGTERM, Stopped), (signal.SIGUSR1, Stopped), (signal.SIGINT, KeyboardInterrupt)],
)
def test_a_stop_that_a_library_made_an_error_of_its_own_of_is_a_stop(
    handlers: dict[int, object], number: int, ending: type[BaseException]
) -> None:
    with pytest.raises(ending) as raised, stop_request() as request, request.reraised():
        try:
            send(number)
        except (KeyboardInterrupt, Stopped):
            raise ImportError("initialization failed") from None
    assert isinstance(raised.value.__cause__, ImportError)
    assert not isinstance(raised.value, Stopped) or raised.value.code == 128 + number
    assert installed() == handlers


@pytest.mark.parametrize(
    ("number", "ending"), [(signal.SIGTERM, Stopped), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_stop_is_heard_although_python_drops_what_it_raised(
    handlers: dict[int, object],
    capfd: pytest.CaptureFixture[str],
    number: int,
    ending: type[BaseException],
) -> None:
    class Dying:
        def __del__(self) -> None:
            send(number)

    before = sys.unraisablehook
    with pytest.raises(ending), stop_request() as request:
        dying = Dying()
        del dying
        assert request.signal == number
        select.select([], [], [], 120)  # the signal comes again, and ends the waiting
        pytest.fail("the stop was lost")
    assert "ignored" not in capfd.readouterr().err
    assert sys.unraisablehook is before
    assert installed() == handlers


def test_an_error_while_a_stop_is_awaited_stays_that_error(handlers: dict[int, object]) -> None:
    with pytest.raises(ZeroDivisionError), stop_request() as request, request.reraised():
        request.listen(awaited=True)
        send(signal.SIGTERM)
        raise ZeroDivisionError
    assert installed() == handlers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_handler_that_a_library_put_in_place_unseen_by_python_is_replaced(
    handlers: dict[int, object], number: int
) -> None:
    ignore = ctypes.c_void_p(1)  # SIG_IGN in C, as a handler of LLVM's would be
    libc = ctypes.CDLL(None)
    with stop_request() as request:
        request.listen(awaited=True)
        libc.signal(number, ignore)
        send(number)
        assert not request
        request.listen(awaited=True)
        send(number)
        assert request.signal == number
    assert installed() == handlers


def test_a_second_ctrl_c_interrupts_at_once(handlers: dict[int, object]) -> None:
    with stop_request() as request:
        request.listen(awaited=True)
        send(signal.SIGINT)
        assert request
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert installed() == handlers


def test_sigterm_never_interrupts_however_often_a_cluster_sends_it(
    handlers: dict[int, object],
) -> None:
    with stop_request() as request:
        request.listen(awaited=True)
        send(signal.SIGTERM)
        try:
            send(signal.SIGTERM)
        except KeyboardInterrupt:  # which pytest would take for a Ctrl-C of its own
            pytest.fail("the second SIGTERM interrupted")
        assert request.exit_code == 143
    assert installed() == handlers


def test_handlers_are_put_back_after_an_error(handlers: dict[int, object]) -> None:
    with contextlib.suppress(ZeroDivisionError), stop_request():
        assert installed() != handlers
        raise ZeroDivisionError
    assert installed() == handlers


def test_without_a_signal_nothing_is_requested(handlers: dict[int, object]) -> None:
    with stop_request() as request:
        pass
    assert not request
    assert installed() == handlers


def test_what_nohup_ignores_stays_ignored(handlers: dict[int, object]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_request() as request:
        request.listen(awaited=False)
        send(signal.SIGHUP)
        assert not request
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


ON_A_TERMINAL = """
import fcntl, sys, termios, time
from relloc import terminal
from relloc.pretext.stopping import stop_request
terminal.survive_closed_output()  # as every command does first
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
with stop_request() as request:
    request.listen(awaited=True)
    print("listens", flush=True)
    while not request:
        time.sleep(0.01)
    print("saved", flush=True)
    print("saved", file=sys.stderr, flush=True)
    sys.exit(request.exit_code)
"""


def test_a_closed_terminal_asks_to_stop_and_takes_no_more_words() -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    output = b""
    while b"listens" not in output:
        output += os.read(ours, 1000)
    os.close(ours)
    assert process.wait(120) == 129
