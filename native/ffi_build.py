"""Builds ``vhostbridge.native._native`` (cffi API mode): the compiler supplies every number."""

from pathlib import Path

from cffi import FFI

# Paths lead through the package folder, so that the sdist holds what the wheel is built from.
FOLDER = "vhostbridge/native"
SOURCES = (
    *("vb_native", "eventfd", "spawn", "bus_error"),
    *("guest_ring", "guest_requests", "device_ring", "inflight", "inflight_packed"),
    *("shadow", "shadow_thread", "control", "control_guest"),
)


def declarations(header: str) -> str:
    """A header without its preprocessor lines, which cffi does not read."""
    lines = Path(FOLDER, header).read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith("#"))


ffi = FFI()
ffi.cdef(Path(FOLDER, "abi.cdef.h").read_text(encoding="utf-8"))
ffi.cdef(declarations("shadow.h"))
ffi.cdef(declarations("control.h"))
ffi.set_source(
    "vhostbridge.native._native",
    '#include "compat.h"\n#include "vb_native.h"\n#include "shadow.h"\n#include "control.h"\n',
    sources=[f"{FOLDER}/{name}.c" for name in SOURCES],
    include_dirs=[FOLDER],
    extra_compile_args=["-Wall", "-Wextra", "-Wno-unused-parameter", "-O2", "-pthread"],
    extra_link_args=["-pthread"],
)

if __name__ == "__main__":
    ffi.compile(verbose=True)
