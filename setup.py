"""Only what pyproject.toml cannot say: the cffi extension and its stable-ABI tag."""

from setuptools import setup

setup(
    cffi_modules=["vhostbridge/native/ffi_build.py:ffi"],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
