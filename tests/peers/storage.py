"""qemu-storage-daemon: vhost-user-blk back-ends on raw image files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

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


def make_image(path: Path, size: int = 32 << 20) -> Path:
    """Make a raw image of that many bytes, all zero."""
    with path.open("wb") as file:
        file.truncate(size)
    return path
