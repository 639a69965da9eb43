"""``python -m benchmarks [PART ...]``: measure, all or the parts named, and print tables."""

from __future__ import annotations

import sys

from . import host, hostile, migration, model, recovery, shadow, svq, switch, trace, vm

PARTS = {
    "host": host.measure,
    "hostile": hostile.measure,
    "migration": migration.measure,
    "model": model.measure,
    "recovery": recovery.measure,
    "shadow": shadow.measure,
    "svq": svq.measure,
    "switch": switch.measure,
    "trace": trace.measure,
    "vm": vm.measure,
}


def main() -> int:
    wanted = sys.argv[1:] or list(PARTS)
    for name in wanted:
        for title, text in PARTS[name]():
            print(f"## {title}\n\n{text}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
