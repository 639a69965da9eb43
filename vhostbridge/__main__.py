"""``python -m vhostbridge`` is the ``vhost-bridge`` command."""

from vhostbridge.cli import main

main()
