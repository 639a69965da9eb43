"""A daemon that is restarted: `vm1`, its one bridge, as the fixture `arguments` has it served."""

from __future__ import annotations

from pathlib import Path

from tests.peers.process import Process
from vhostbridge.bridge.control_client import ControlClient
from vhostbridge.bridge.status import BridgeStatus


def stop(daemon: Process) -> str:
    """End it as a restart does; it ends well and logs nothing bad."""
    assert daemon.terminate() == 0, daemon.output
    assert "Traceback" not in daemon.output and "Warning" not in daemon.output, daemon.output
    daemon.kill()
    return daemon.output


def status(tmp_path: Path) -> BridgeStatus:
    with ControlClient(tmp_path / "control") as client:
        return client.status("vm1")[0]
