"""What stood before each 250: a relay under strace takes mail, the calls its acknowledgements stand on are printed.

usage: fsync_evidence.py [--messages 60] [--show 2] [--keep FOLDER]    (root; strace; all on loopback)

Half of the messages are above 64 KB. Ends with 1 when an acknowledgement is not proved.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.bed.next_hop import NextHop  # noqa: E402
from tests.bed.relay import RelayRunner, children_of  # noqa: E402
from tests.bed.wire import letter  # noqa: E402
from tests.durability.load import QUEUED  # noqa: E402
from tests.durability.proof import Proof, acknowledgements, proofs  # noqa: E402
from tests.durability.trace import SYNCS, Call, attached, read, target_of  # noqa: E402

SESSIONS: Final = 6
LARGE: Final = b"a line of a body that lies in a file\r\n" * 2500


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=60)
    parser.add_argument(
        "--show", type=int, default=2, help="acknowledgements to print in full, small and large in turn"
    )
    parser.add_argument("--keep", type=Path, help="folder for the trace, as strace wrote it")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        kept = wanted.keep or folder
        kept.mkdir(parents=True, exist_ok=True)
        trace = kept / "trace"
        spool, threads = record(folder, trace, wanted.messages)
        calls = read(trace, threads)
    found = list(proofs(calls, spool, acknowledgements(calls, QUEUED)))
    large = [proof for proof in found if len(proof.steps) > 3]
    small = [proof for proof in found if len(proof.steps) <= 3]
    for proof in [one for pair in zip(small, large, strict=False) for one in pair][: wanted.show]:
        show(proof, spool, calls)
    problems = [f"{proof.told.id.decode()}: {proof.problem}" for proof in found if proof.problem]
    print(*problems, sep="\n", end="\n" if problems else "")
    syncs = sum(call.name in SYNCS and call.path.startswith(str(spool)) for call in calls)
    print(f"{len(found)} acknowledgements, {len(large)} with a body file, {len(problems)} not proved; {syncs} syncs")
    return 1 if problems or len(found) != wanted.messages else 0


def record(folder: Path, trace: Path, messages: int) -> tuple[Path, dict[int, int]]:
    """Run the relay, two workers, without express; its spool, and which thread was whose."""
    hop = NextHop()
    relay = RelayRunner(folder, hop.route, config={"server": {"workers": 2}, "delivery": {"express": False}})

    def session(numbers: range) -> None:
        with relay.client() as client:
            client.open()
            for number in numbers:
                octets = letter(f"number {number}", LARGE if number % 2 else b"small\r\n")
                client.deliver("sender@example.net", "user@example.com", octets)

    try:
        relay.start()
        with attached([relay.supervisor, *children_of(relay.supervisor)], trace) as threads:
            with ThreadPoolExecutor(SESSIONS) as pool:
                list(pool.map(session, [range(first, messages, SESSIONS) for first in range(SESSIONS)]))
            hop.wait_for_accepted(messages)
            relay.stop()
    finally:
        relay.close()
        hop.close()
    return relay.spool, threads


def show(proof: Proof, spool: Path, calls: list[Call]) -> None:
    """One acknowledgement: the calls it stands on, and the write that told the client."""
    told = next(call for call in calls if call.begin == proof.told.line)
    print(f"{'from line':>9} {'to':>6} {'thread':>7}  what for, and the call")
    for what, call in [*proof.steps, ("the client is told", told)]:
        print(f"{call.begin + 1:>9} {call.end + 1:>6} {call.thread:>7}  {what + ':':<36} {words(call, spool)}")
    print()


def words(call: Call, spool: Path) -> str:
    """A call as a person reads it."""
    path = call.path.replace(str(spool / "queue") + "/", "")
    match call.name:
        case "pwrite64":
            return f"pwrite64({path}, {len(call.data)} octets at {call.number}) = {call.result}"
        case "linkat":
            return f"linkat({call.strings[0].decode()}, {target_of(call).replace(str(spool / 'queue') + '/', '')}) = 0"
        case "write" if call.path.startswith("socket:"):
            return f"write({path}, {call.data.decode('ascii')!r})"
        case "write":
            return f"write({path}, {len(call.data)} octets)"
        case _:
            return f"{call.name}({path}) = {call.result}"


if __name__ == "__main__":
    sys.exit(main())
