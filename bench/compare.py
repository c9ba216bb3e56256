"""Throughput end to end (until the sink has every message) and CPU per message, interleaved between targets.

usage: compare.py --target NAME,HOST:PORT,PIDS,SINKPORT ... [--scenario S ...] [--reps N]

In every repetition each target runs once in turn, so that a noisy neighbour hits all of them. A server must keep the same
promise to be compared: 250 after fsync, or after the next hop has taken the message.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

import benchlib as b

SCENARIOS: Final = {
    "1k-conn-20": b.Load(sessions=20, messages=2000, octets=1_000, keep=False),
    "1k-conn-100": b.Load(sessions=100, messages=2000, octets=1_000, keep=False),
    "1k-keep-20": b.Load(sessions=20, messages=3000, octets=1_000, keep=True),
    "1k-keep-100": b.Load(sessions=100, messages=3000, octets=1_000, keep=True),
    "10k-keep-20": b.Load(sessions=20, messages=2000, octets=10_000, keep=True),
    "10k-conn-20": b.Load(sessions=20, messages=2000, octets=10_000, keep=False),
    "1m-keep-10": b.Load(sessions=10, messages=150, octets=1_000_000, keep=True),
}
TABLE: Final = ("1k-conn-20", "1k-keep-20", "10k-keep-20", "1m-keep-10")
"""The scenarios that have a wanted figure."""


def once(target: b.Target, load: b.Load) -> tuple[float, float]:
    """(messages/s end to end, CPU seconds per 1000 messages) of one run."""
    if target.sink is None:
        raise ValueError(f"{target.name} has no sink: nothing tells when its mail has arrived")
    before, cpu, start = target.sink.count(), b.cpu_seconds(target.roots), time.monotonic()
    b.send(target.host, target.port, load)
    end = target.sink.wait_for(before + load.messages, 240)
    return load.messages / (end - start), (b.cpu_seconds(target.roots) - cpu) / load.messages * 1000


def measure(targets: Sequence[b.Target], scenarios: Sequence[str], reps: int, seconds: float) -> Iterator[b.Figure]:
    """Rate and CPU of each scenario. ``seconds`` is the wanted length of a run; a warm-up tells how many messages it is."""
    for scenario in scenarios:
        load, loads = SCENARIOS[scenario], {}
        for target in targets:
            first = max(load.sessions, load.messages // 5)
            rate = once(target, replace(load, messages=first))[0]
            loads[target.name] = replace(load, messages=int(min(20 * load.messages, max(first, rate * seconds))))
        rates: list[dict[str, float]] = []
        cpus: list[dict[str, float]] = []
        for _ in range(reps):
            rate_of: dict[str, float] = {}
            cpu_of: dict[str, float] = {}
            try:
                for target in targets:
                    time.sleep(0.3)  # what the run before left over (log, sockets) is not this one's
                    rate_of[target.name], cpu_of[target.name] = once(target, loads[target.name])
            except (RuntimeError, TimeoutError, subprocess.TimeoutExpired) as problem:
                b.say(f"{scenario}: repetition dropped: {problem}")
                continue
            b.say(f"  {scenario}: " + "  ".join(f"{name} {rate:.0f}/s" for name, rate in rate_of.items()))
            rates.append(rate_of)
            cpus.append(cpu_of)
        yield b.figure(scenario, "msg/s", rates)
        yield b.figure(f"{scenario} CPU", "s/1000 msg", cpus)


def main() -> None:
    parser = b.command_line(__doc__)
    parser.add_argument("--scenario", action="append", choices=list(SCENARIOS))
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="wanted length of one run")
    options = parser.parse_args()
    targets = list(b.targets(options.target))
    try:
        for figure in measure(targets, options.scenario or TABLE, options.reps, options.seconds):
            print(figure, flush=True)
    finally:
        for target in targets:
            if target.sink:
                target.sink.close()


if __name__ == "__main__":
    main()
