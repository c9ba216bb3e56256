"""The soak: nothing acknowledged is lost, whatever dies. ``python -m soak --help``; docs/crash-safety.md tells the why.

| part | what it is |
|---|---|
| ``load`` | clients that send until they are told, and send again when they are not |
| ``next_hop`` | where the mail ends up: keeps what it gets, is late, refuses, drops |
| ``moments`` | when to strike: at the k-th event of a kind, plus a fraction of a millisecond |
| ``victims`` | who is struck, how, and what has to happen then |
| ``ledger`` | what was sent, said and received, and whether it adds up |
| ``run`` | rounds of all that against the shipped relay, and the table |
"""
