"""Boot a guest under qemu, and end it: with KVM where that really boots, else with TCG."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.vm.image import Image
from tests.vm.port import PORTS, Ended, GuestError, Job, run

QEMU = "qemu-system-x86_64"
MEMORY_MIB = 3072
PROCESSORS = 2
BOOT_TIMEOUT_S = {"kvm": 90.0, "tcg": 300.0}
KVM_TIMEOUT_S = 10.0
"""Within this, a bare kernel comes to the point where it misses a disk; it takes one or two."""
STOP_TIMEOUT_S = 10.0
ACCELERATORS = {
    "kvm": ("-accel", "kvm", "-cpu", "host"),
    # Nothing is taken from it: without svm, qemu 7.2 has writes and mounts fail with EINVAL.
    "tcg": ("-accel", "tcg,thread=multi", "-cpu", "max"),
}
BARE = ("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot")
# A panic reboots and a reboot ends qemu, so a guest that crashes is seen at once.
KERNEL_LINE = "root=/dev/vda rw console=ttyS0 quiet loglevel=4 panic=-1"


def kvm_boots(kernel: Path) -> bool:
    """Tell whether KVM boots this kernel here: that /dev/kvm opens proves nothing."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    argv = [QEMU, *ACCELERATORS["kvm"], *BARE, "-m", "512", "-serial", "stdio"]
    argv += ["-kernel", str(kernel), "-append", "console=ttyS0 panic=-1"]
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=KVM_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    # No disk was given, so a kernel that works ends with this.
    return b"Unable to mount root fs" in done.stdout


class Machine:
    """A guest whose sockets, console and process id are files in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def console(self) -> Path:
        """What the guest's kernel and systemd wrote."""
        return self.folder / "console.log"

    @property
    def pid(self) -> int | None:
        """The process id of qemu, or None if this guest does not run."""
        with contextlib.suppress(OSError, ValueError):
            pid = int((self.folder / "qemu.pid").read_text())
            # A number may have been given to another process since.
            if os.fsencode(self.console) in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        return None

    def start(self, image: Image, accelerator: str, *, stays: bool) -> None:
        """Start qemu; a guest that does not stay ends with this process. Raises GuestError."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        argv = [QEMU, *ACCELERATORS[accelerator], *BARE]
        argv += ["-smp", str(PROCESSORS), "-m", str(MEMORY_MIB)]
        argv += ["-kernel", str(image.kernel), "-initrd", str(image.initrd)]
        argv += ["-append", KERNEL_LINE]
        # Written to a temporary file that is gone with qemu: an image stays as it was built.
        argv += ["-drive", f"file={image.disk},format=raw,if=none,id=root,snapshot=on"]
        argv += ["-device", "virtio-blk-pci,drive=root", "-device", "virtio-rng-pci"]
        argv += ["-serial", f"file:{self.console}", "-device", "virtio-serial-pci"]
        with contextlib.ExitStack() as stack:
            listening = [stack.enter_context(_listen(self.folder, n)) for n in range(PORTS)]
            for number, one in enumerate(listening):
                argv += ["-chardev", f"socket,id=c{number},fd={one.fileno()},server=on,wait=off"]
                argv += ["-device", f"virtserialport,chardev=c{number},name=agent.{number}"]
            _launch(argv, self.folder, [one.fileno() for one in listening], stays=stays)

    def boot(
        self, image: Image, accelerator: str, tell: Callable[[str], None], *, stays: bool
    ) -> None:
        """Start it and wait until it runs jobs; `auto` takes KVM where it works.

        Raises GuestError.
        """
        wanted = [accelerator]
        if accelerator == "auto":
            wanted = ["kvm", "tcg"] if kvm_boots(image.kernel) else ["tcg"]
        for choice in wanted:
            begin_s = time.monotonic()
            try:
                self.start(image, choice, stays=stays)
                self.wait(BOOT_TIMEOUT_S[choice])
            except GuestError as error:
                self.stop()
                if choice == wanted[-1]:
                    raise
                tell(f"not with {choice}: {error}")
            else:
                tell(f"boot with {choice}: {time.monotonic() - begin_s:.1f} s")
                return

    def wait(self, timeout_s: float) -> None:
        """Wait until the guest runs jobs; raises GuestError."""
        try:
            self.run(Job("root", ("true",), timeout_s=timeout_s))
        except GuestError as error:
            raise GuestError(f"{error}; the end of its console:\n{self.last_words()}") from error

    def last_words(self, lines: int = 30) -> str:
        """Give the end of the console."""
        try:
            return "\n".join(self.console.read_text("utf-8", "replace").splitlines()[-lines:])
        except FileNotFoundError:
            return "nothing"

    def run(self, job: Job) -> Ended:
        """Run a job to its end; raises GuestError."""
        return run(self.folder, job)

    def stop(self) -> bool:
        """End qemu at once: nothing that the guest holds is wanted any more. Tell if it ran."""
        pid = self.pid
        if pid is None:
            return False
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        try:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, number)
                if select.select([pidfd], [], [], STOP_TIMEOUT_S)[0]:
                    break
        finally:
            os.close(pidfd)
        return True


@contextlib.contextmanager
def _listen(folder: Path, number: int) -> Iterator[socket.socket]:
    """Listen before qemu runs: a client can connect from the first moment."""
    path = folder / f"port{number}"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listening:
        try:
            listening.bind(str(path))
        except OSError as error:
            raise GuestError(f"no socket at {path}: {error}; a shorter path may do") from error
        listening.listen()
        yield listening


def _launch(argv: list[str], folder: Path, fds: list[int], *, stays: bool) -> None:
    pid_file = folder / "qemu.pid"
    errors = folder / "qemu.log"
    try:
        with errors.open("w") as log:
            if stays:
                argv += ["-daemonize", "-pidfile", str(pid_file)]
                status = subprocess.run(
                    argv,
                    pass_fds=fds,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    check=False,
                ).returncode
                if status:
                    raise GuestError(f"{QEMU} ended with {status}: {errors.read_text()}")
                return
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *argv],
                pass_fds=fds, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
            pid_file.write_text(str(process.pid))
    except FileNotFoundError as error:
        raise GuestError(f"there is no {error.filename}; .ci/packages vm installs it") from error
