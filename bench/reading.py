"""One reading of a directory, in a process that does nothing else; the figures as JSON. Used by bench/directory.py.

usage: bench/reading.py EXTENT CONFIG     EXTENT: everything or changes; CONFIG: a configuration as JSON
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from relay.config.schema import Config
from relay.directory.child import run, start
from relay.directory.connection import preload
from relay.directory.passwords import read_passwords
from relay.directory.sync import Extent, Purpose


def main() -> None:
    extent, file = sys.argv[1:]
    config = Config.model_validate_json(Path(file).read_text())
    passwords = read_passwords(config, os.environ)
    preload()
    began = time.monotonic()
    outcome = run(start(config, passwords, Purpose.ASKED, extent=Extent(extent)), config, lambda *_: None)
    wall = time.monotonic() - began
    assert not outcome.reason, outcome.why
    (reading,) = outcome.readings
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(json.dumps({
        "cpu": used.ru_utime + used.ru_stime, "wall": wall, "mb": used.ru_maxrss / 1024, "kind": reading["kind"],
        "changed": reading["changed"], "recipients": outcome.counts["recipients"],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
