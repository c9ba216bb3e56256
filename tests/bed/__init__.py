"""The test bed: a real relay, a raw client, a next hop that fails on command, and real mail servers behind it.

| part | what it is |
|---|---|
| ``relay.RelayRunner`` | a relay of its own: folder, configuration, snapshot, process tree, log, metrics |
| ``client.Client`` | an SMTP dialogue on a socket, octet by octet if need be |
| ``next_hop.NextHop`` | an SMTP server whose every step can be scripted: refuse, hang, drop, be late |
| ``servers.SmtpSink``, ``servers.Postfix`` | other people's servers as next hops |
| ``certificates.Authority`` | certificates, good and bad |

The fixtures are in ``fixtures``. Nothing here sleeps for luck: every wait is for an event and has a deadline.
"""
