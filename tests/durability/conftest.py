"""Owns: making the modules of this folder importable by name, for its tests and for those of the whole relay."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[2])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)
