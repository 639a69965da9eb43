"""vhost-bridge: one suspend/resume/save/load model for virtio devices over two transports.

Layout: ``backends`` holds the device model and the two transports (vhost-user, vhost-vdpa),
``bridge`` the daemon that serves a vhost-user front-end, ``native`` the C extension.
"""

__version__ = "0.1.0"
