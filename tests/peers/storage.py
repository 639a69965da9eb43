"""qemu-storage-daemon: vhost-user-blk back-ends on raw image files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.rig.root import peer_argv

from .process import Process
from .qmp import Qmp


class StorageDaemon(Process):
    """Exports `image` on `socket` as a vhost-user-blk device; up once it is made.

    The block node is called "disk"; of `layers` on it the exported one is called "top". It serves
    one front-end at a time. Made anew on the same image after a kill it needs no cleaning up.
    """

    def __init__(
        self,
        image: Path,
        socket: Path,
        *,
        queues: int = 1,
        arguments: Sequence[str] = (),
        layers: Sequence[str] = (),
    ) -> None:
        self.image = image
        self.socket = socket
        self.qmp = Qmp()
        monitor = self.qmp.remote.fileno()
        top = "top" if layers else "disk"
        argv = [
            "qemu-storage-daemon",
            # Tests look into the image while it is open.
            *("--blockdev", f"driver=file,node-name=disk,filename={image},locking=off"),
            *(argument for layer in layers for argument in ("--blockdev", layer)),
            *("--export", f"{self.export_options(socket, top)},num-queues={queues}"),
            *arguments,
            *("--chardev", f"socket,id=monitor,fd={monitor}", "--monitor", "chardev=monitor"),
        ]
        command = peer_argv(argv, die_with_parent=True)
        super().__init__(command, name="qemu-storage-daemon", pass_fds=[monitor])
        try:
            self.qmp.start()  # the monitor comes after the export
        except BaseException as error:
            self.kill()
            error.add_note(self.output)
            raise

    @staticmethod
    def export_options(socket: Path, node: str = "disk") -> str:
        return (
            f"type=vhost-user-blk,id=export,node-name={node},writable=on,"
            f"addr.type=unix,addr.path={socket}"
        )

    def resize(self, size: int) -> None:
        """Change the capacity, which front-ends are told of."""
        self.qmp.execute("block_resize", **{"node-name": "disk", "size": size})

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.qmp.close()
        super().__exit__(kind, error, trace)


class RevivedStorage:
    """A storage daemon that is started again where it ended by a fault of its own, for a `with`
    block's length; ``make`` starts it.

    QEMU's (10.0) may end when its front-end is killed with requests in flight: it waits for these,
    and a kick that comes meanwhile fails an assertion.
    """

    FAULT = "vhost_user_server_inc_in_flight: Assertion `!server->wait_idle' failed"

    def __init__(self, make: Callable[[], StorageDaemon]) -> None:
        self._make = make
        self._daemon = make()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._daemon.__exit__(kind, error, trace)

    @property
    def socket(self) -> Path:
        """Where it listens for the next front-end, if need be again."""
        time.sleep(0.05)  # its end is near, if it comes
        if self._daemon.poll() is not None:
            assert self.FAULT in self._daemon.output, self._daemon.output
            self._daemon.__exit__(None, None, None)
            self._daemon = self._make()
        return self._daemon.socket

    def kill(self) -> None:
        self._daemon.kill()


def make_image(path: Path, size: int = 32 << 20) -> Path:
    """Make a raw image of that many bytes, all zero."""
    with path.open("wb") as file:
        file.truncate(size)
    return path
