"""The kernel's vhost ABI as the compiler sees it, and the few calls that need C.

``lib`` holds the constants of ``linux/vhost.h`` and the ``vb_*`` functions, ``ffi`` the structs.
Every ``vb_*`` function releases the GIL and returns a negative errno on failure.
"""

from ._native import ffi, lib

__all__ = ["ffi", "lib"]
