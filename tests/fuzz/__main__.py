"""``make fuzz``: a million command lines and 100,000 bodies, and what came of them."""

from __future__ import annotations

import argparse
import asyncio
import time

from tests.fuzz.run import bodies, commands


async def main() -> None:
    """Both runs."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--commands", type=int, default=1_000_000)
    parser.add_argument("--bodies", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    print(f"seed {options.seed}")
    started = time.monotonic()
    taken = await commands(options.commands, options.seed)
    print(f"{options.commands} command lines in {time.monotonic() - started:.0f} s; {taken} messages came of them")
    started = time.monotonic()
    proper = await bodies(options.bodies, options.seed)
    print(
        f"{options.bodies} bodies in {time.monotonic() - started:.0f} s: {proper} with proper line ends arrived octet for octet, "
        f"{options.bodies - proper} by the listener's rule"
    )


asyncio.run(main())
