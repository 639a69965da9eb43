"""Builds ``vhostbridge.native._native`` (cffi API mode): the compiler supplies every number."""

from pathlib import Path

from cffi import FFI

# Paths lead through the package folder, so that the sdist holds what the wheel is built from.
FOLDER = "vhostbridge/native"

ffi = FFI()
ffi.cdef(Path(FOLDER, "abi.cdef.h").read_text(encoding="utf-8"))
ffi.set_source(
    "vhostbridge.native._native",
    '#include "compat.h"\n#include "vb_native.h"\n',
    sources=[f"{FOLDER}/vb_native.c"],
    include_dirs=[FOLDER],
    extra_compile_args=["-Wall", "-Wextra", "-Wno-unused-parameter", "-O2"],
)

if __name__ == "__main__":
    ffi.compile(verbose=True)
