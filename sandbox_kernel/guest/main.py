"""The guest: an interpreter that is a head or a child, and the verbs the kernel uses on it.

A head holds the committed state and runs nothing but `fork`. A child was forked from it, enters
a container, runs one request, and is thrown away or parks and is the head from then on. It is
the same process all along, so the same loop serves both.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import resource
import select
import signal
import socket
import sys
import traceback
from typing import Any, Callable, NoReturn

from sandbox_kernel.guest import enter, files, streams, tasks, threads
from sandbox_kernel.guest.link import Link, LinkClosed, hold_interrupts
from sandbox_kernel.guest.wire import Frame, WireError
from sandbox_kernel.linux import libc

LINK_FD = 3
_INTERRUPTED: dict[str, Any] = {
    "status": "error",
    "ename": "KeyboardInterrupt",
    "evalue": "",
    "traceback": ["KeyboardInterrupt"],
}
FDS_NEEDED = 16
"""How many descriptors it takes to fork a child and to enter a container, with some to spare."""


def main(link_fd: int, cell: tuple[int, int], head: tuple[int, int]) -> NoReturn:
    """Boot the first guest of a session and serve for ever.

    `cell` and `head` are the user and group ids of cells and of parked interpreters.
    """
    enter.drop_at_boot()
    libc.set_name("python")
    sys.argv = [""]
    hold_interrupts()
    link = Link(socket.socket(fileno=link_fd))
    requests = _make_requests(link)
    libc.flush_c_streams(by_line=True)
    gc.collect()
    # A collection would write to every object from here, and every fork would copy the pages.
    gc.freeze()
    # Only now: a json.py in the notebook's folder is for the notebook, not for us.
    sys.path.insert(0, "")
    enter.park(*head)
    type(requests.kernel).is_heard = True
    guest = Guest(link, requests, cell, head)
    link.send({"op": "parked", "threads": threads.quiesce()})
    guest.serve()


def _make_requests(link: Link) -> Any:
    """Load IPython and what goes with it; what keeps them from it is for the user to read."""
    try:
        from sandbox_kernel.guest.shell import Requests, make_kernel

        requests = Requests(make_kernel(link))
        requests.warm()
    except Exception as error:
        link.send({"op": "unable", "cause": f"{type(error).__name__}: {error}"})
        os._exit(1)
    return requests


class Guest:
    """One interpreter and its link."""

    def __init__(
        self, link: Link, requests: Any, cell: tuple[int, int], head: tuple[int, int]
    ) -> None:
        self._link = link
        self._cell, self._head = cell, head
        self._requests = requests
        self._children: dict[int, int] = {}
        self._files: dict[int, str] = {}
        """Where open files were at the end of the cell; in another root Linux cannot tell."""
        self._place = _current_folder()
        self._streams = {"stdout": sys.stdout, "stderr": sys.stderr}
        self._parked = True
        self._pid = os.getpid()

    def serve(self) -> NoReturn:
        """Do what the kernel asks until it closes the link."""
        while True:
            try:
                self._turn()
            except (LinkClosed, WireError):
                os._exit(0)
            except OSError as error:
                if error.errno in (errno.EBADF, errno.ENOTSOCK):
                    _wait_for_the_end()
                os._exit(0)
            except BaseException:  # what the cell has put in the place of our own code
                with contextlib.suppress(BaseException):
                    print(traceback.format_exc(), file=sys.__stderr__)
                os._exit(1)  # at once: nothing that runs at the end of an interpreter may hang

    def _turn(self) -> None:
        if self._children and not self._link.poll_frame():
            self._wait_for_children()
            return
        frame = self._link.receive()
        getattr(self, "_do_" + frame.op)(frame)

    def _wait_for_children(self) -> None:
        """Wait for a frame or the end of a child, whose exit status only its parent learns."""
        poll = select.poll()
        for fd in (self._link.fileno(), *self._children):
            poll.register(fd, select.POLLIN)
        for fd, _ in poll.poll():
            if fd in self._children:
                info = os.waitid(os.P_PIDFD, fd, os.WEXITED)
                number = self._children.pop(fd)
                os.close(fd)
                if info is not None:  # never without WNOHANG
                    code, status = info.si_code, info.si_status
                    body = {"op": "exited", "id": number, "code": code, "status": status}
                    self._link.send(body)

    def _do_fork(self, frame: Frame) -> None:
        """Fork a child that speaks over the descriptors that came along: link, stdout, stderr."""
        fds = [self._link.fds.pop(0) for _ in range(3)]
        if not self._parked:
            self._place = _current_folder()
            if not (frame.body["live"] or self._children):
                _reap()
        try:
            pid = threads.fork() if frame.body["live"] else libc.fork()
        except OSError:  # the child's link closes with the descriptors, which tells it
            for fd in fds:
                os.close(fd)
            return
        if pid == 0:
            self._become_child(fds)
            return
        for fd in fds:
            os.close(fd)
        self._children[os.pidfd_open(pid)] = frame.body["id"]

    def _become_child(self, fds: list[int]) -> None:
        self._parked = False
        self._pid = os.getpid()
        for pidfd in self._children:
            os.close(pidfd)
        self._children = {}
        self._link.sock.detach()
        for fd, number in zip(fds, (LINK_FD, 1, 2)):
            enter.adopt(fd, number)
        self._link.__init__(socket.socket(fileno=LINK_FD))  # type: ignore[misc]
        streams.forget_current()
        enter.new_session()
        self._link.send({"op": "hello"})

    def _do_enter(self, frame: Frame) -> None:
        """Step into a container and get ready for one request."""
        fds, self._link.fds = self._link.fds, []
        enter.enter(fds, *self._cell)
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")  # whoever runs out of memory: the cell, never a head
        self._link.send({"op": "ready", "notes": self._settle()})

    def _do_warm(self, frame: Frame) -> None:
        """Get ready for a request that is not there yet."""
        self._requests.warm()
        self._link.send({**self._answer_of({"status": "ok"}), "op": "warmed"})

    def _do_switch(self, frame: Frame) -> None:
        """Go on in a new root, which init has put in place of the one before."""
        while signal.SIGINT in signal.sigpending():  # meant for the cell before
            signal.sigwait({signal.SIGINT})
        self._link.send({"op": "ready", "notes": self._settle()})

    def _settle(self) -> list[str]:
        """Reopen files and return to the working folder, both by path in the new root."""
        notes = files.reopen(frozenset((LINK_FD,)), self._files)
        try:
            os.chdir(self._place)
        except OSError:
            os.chdir("/")
        return notes

    def _do_execute(self, frame: Frame) -> None:
        limit_open_files(frame.body["open_files"])
        self._answer(self._interruptible(self._execute, frame))

    def _do_comm(self, frame: Frame) -> None:
        limit_open_files(frame.body["open_files"])
        self._answer(self._interruptible(self._comm, frame))

    def _execute(self, frame: Frame) -> dict[str, Any]:
        return dict(self._requests.execute(frame.body))

    def _comm(self, frame: Frame) -> dict[str, Any]:
        self._requests.comm(frame.body, frame.buffers)
        return {"status": "ok"}

    def _interruptible(
        self, act: Callable[[Frame], dict[str, Any]], frame: Frame
    ) -> dict[str, Any]:
        """Run a request during which SIGINT may end the user code; give a reply all the same."""
        reply = dict(_INTERRUPTED)
        try:
            reply = act(frame)
        except KeyboardInterrupt:  # outside of what IPython guards: nobody has shown it yet
            hold_interrupts()
            content = {name: reply[name] for name in ("ename", "evalue", "traceback")}
            message = {"op": "message", "msg_type": "error", "content": content, "metadata": {}}
            if reply == _INTERRUPTED and os.getpid() == self._pid:
                self._link.publish(message)
        finally:
            hold_interrupts()
        streams.mend(self._streams)
        if os.getpid() != self._pid:  # a child that the cell forked, and that fell out of it
            os._exit(0)
        libc.flush_c_streams()  # or every fork would inherit what is in there, and write it too
        return reply

    def _answer(self, reply: dict[str, Any]) -> None:
        """Say that a request is done; a reply beyond the bounds of a frame is an error instead."""
        try:
            self._link.send(self._answer_of(reply))
        except WireError as error:
            text = str(error)
            told = {"ename": "WireError", "evalue": text, "traceback": [f"WireError: {text}"]}
            self._link.send(self._answer_of({"status": "error", **told}))

    def _do_prime(self, frame: Frame) -> None:
        """Load what completions need, once for all forks to come."""
        limit_open_files(frame.body["open_files"])
        self._requests.prime()
        self._answer({"status": "ok"})

    def _do_ask(self, frame: Frame) -> None:
        self._link.send({"op": "answer", "content": self._requests.ask(frame.body)})

    def _answer_of(self, reply: dict[str, Any]) -> dict[str, Any]:
        limit_open_files(None)
        left = threads.quiesce()
        self._files = files.places(frozenset((LINK_FD,)))
        return {
            "op": "done",
            "reply": _plain(reply),
            "comms": self._requests.comms(),
            "threads": left,
            "alone": tasks.count() == 1,
            "fragile": threads.unforkable(left) if left else [],
        }

    def _do_park(self, frame: Frame) -> None:
        """Become the head: out of the reach of the cells to come."""
        self._place = _current_folder()
        enter.park(*self._head)
        self._parked = True
        self._link.send({"op": "parked", "threads": []})

    def _do_dump(self, frame: Frame) -> None:
        """Write the user's variables, for a guest whose native pools are alive."""
        from sandbox_kernel.guest import rehydrate

        shell = self._requests.shell
        report = rehydrate.dump(shell.user_ns, self._link.fds.pop(0))
        self._link.send({"op": "dumped", "left_out": report.left_out_lines()})

    def _do_load(self, frame: Frame) -> None:
        """Read another guest's variables."""
        from sandbox_kernel.guest import rehydrate

        shell = self._requests.shell
        report = rehydrate.load(self._link.fds.pop(0), shell.user_ns)
        self._link.send({"op": "loaded", "left_out": report.left_out_lines()})


def limit_open_files(limit: int | None) -> None:
    """Set how many files may be open; None for the time when this module needs some itself.

    A cell may have raised it as far as the hard limit allows, which leaves no reserve: the cell
    cannot be gone on from then, and the kernel is told by our end.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit or hard, hard), hard))
    if limit is None:
        for fd in [os.dup(LINK_FD) for _ in range(FDS_NEEDED)]:
            os.close(fd)


def _wait_for_the_end() -> NoReturn:
    """Wait to be killed: the cell has closed the link, and the kernel has seen it.

    To exit would look like the cell's own exit.
    """
    while True:
        signal.pause()


def _reap() -> None:
    """Let go of what the cell has started, now killed: until then it counts as processes."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


def _current_folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # removed under us
        return "/workspace"


def _plain(reply: dict[str, Any]) -> dict[str, Any]:
    """Give a reply that is JSON, whatever a user's object put into it."""
    from ipykernel.jsonutil import json_clean

    try:
        return dict(json_clean(reply))
    except (TypeError, ValueError) as error:
        return {
            "status": "error",
            "ename": type(error).__name__,
            "evalue": str(error),
            "traceback": [],
        }
