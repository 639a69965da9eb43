"""``python -m benchmarks [host|model|shadow|vm]``: measure and print Markdown tables."""

from __future__ import annotations

import sys

from . import host, model, shadow, vm

PARTS = {"host": host.measure, "model": model.measure, "shadow": shadow.measure, "vm": vm.measure}


def main() -> int:
    wanted = sys.argv[1:] or list(PARTS)
    for name in wanted:
        for title, text in PARTS[name]():
            print(f"## {title}\n\n{text}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
