"""bench/serve: its options become an ordinary configuration, and nothing is rebuilt without need."""

from __future__ import annotations

import importlib.util
import tomllib
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

from relay.config.schema import Config, Mode, Role

SCRIPT = Path(__file__).parents[2] / "bench" / "serve.py"


@pytest.fixture(scope="module")
def serve() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_serve", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def recipients(tmp_path: Path) -> Path:
    path = tmp_path / "recipients"
    path.write_text("ann@example.com\nBob@Example.ORG\n\n")
    return path


def options(serve: ModuleType, tmp_path: Path, recipients: Path, *more: str) -> Namespace:
    needed = ["--state", str(tmp_path), "--listen-25", "127.0.0.1:2525", "--recipients", str(recipients)]
    needed += ["--next-hop", "127.0.0.1:2601", "--pidfile", str(tmp_path / "pid")]
    return serve.parser().parse_args([*needed, *more])


def configuration(serve: ModuleType, given: Namespace) -> Config:
    domains = given.domains or serve.domains_of(given.recipients)
    return Config.model_validate(tomllib.loads(serve.configuration(given, domains)))


def test_without_more_options_the_stated_defaults_hold(serve, tmp_path, recipients):
    config = configuration(serve, options(serve, tmp_path, recipients))
    limits = config.limits
    assert config.delivery.express
    assert config.server.workers == 0
    assert (limits.message_octets, limits.recipients) == (50 * 1024 * 1024, 1000)
    assert (limits.sessions_per_client, limits.errors) == (50, 20)
    assert [(x.role, x.address) for x in config.listener] == [(Role.MX, "127.0.0.1:2525")]
    assert config.domain[0].names == ["example.com", "example.org"]
    assert [route.next_hops for route in config.route] == [["smtp:[127.0.0.1]:2601"]]
    assert config.log.file == tmp_path / "relay.log"
    assert config.server.spool == tmp_path / "spool"
    assert config.web.listen is None


def test_checks_stay_as_they_are_shipped(serve, tmp_path, recipients):
    """A benchmark of a relay with its checks switched off would tell nothing."""
    config = configuration(serve, options(serve, tmp_path, recipients))
    assert config.recipients.unknown is Mode.ENFORCE
    assert config.senders.restricted is Mode.ENFORCE
    assert config.content.header_firewall is Mode.ENFORCE
    assert config.queue == Config.model_fields["queue"].default


def test_every_option_arrives(serve, tmp_path, recipients):
    restricted = tmp_path / "restricted"
    restricted.write_text("eve@example.com\n")
    given = options(
        serve, tmp_path, recipients,
        "--listen-587", "127.0.0.1:2587", "--listen-465", "[::1]:2465", "--domains", "Example.net",
        "--restricted", str(restricted), "--default-next-hop", "[::1]:2602", "--next-hop-timeout-s", "2.5",
        "--express", "off", "--workers", "3", "--retry-s", "0.5", "--size-limit", "100000", "--max-recipients", "150",
        "--sessions-per-client", "7", "--error-budget", "off", "--spool", str(tmp_path / "s"),
        "--log", str(tmp_path / "l"), "--metrics", "127.0.0.1:9100",
    )  # fmt: skip
    config = configuration(serve, given)
    assert [(x.role, x.address) for x in config.listener] == [
        (Role.MX, "127.0.0.1:2525"),
        (Role.SUBMISSION, "127.0.0.1:2587"),
        (Role.SUBMISSIONS, "[::1]:2465"),
    ]
    assert {tuple(route.domains): route.next_hops for route in config.route} == {
        ("example.net",): ["smtp:[127.0.0.1]:2601"],
        ("*",): ["smtp:[::1]:2602"],
    }
    assert [(source.type, source.path) for source in config.directory.sources] == [
        ("list", recipients),
        ("restricted", restricted),
    ]
    delivery = config.delivery
    assert (delivery.connect_timeout_s, delivery.command_timeout_s, delivery.final_reply_timeout_s) == (2.5, 2.5, 2.5)
    assert not delivery.express
    assert (config.queue.retry_s, config.queue.retry_jitter) == ([0.5], 0)
    limits = config.limits
    assert (limits.message_octets, limits.recipients, limits.sessions_per_client, limits.errors) == (100000, 150, 7, 0)
    assert config.server.workers == 3
    assert (config.server.spool, config.log.file) == (tmp_path / "s", tmp_path / "l")
    assert config.web.listen == "127.0.0.1:9100"


def test_the_lease_outlasts_a_long_wait_for_the_final_reply(serve, tmp_path, recipients):
    config = configuration(serve, options(serve, tmp_path, recipients, "--next-hop-timeout-s", "1200"))
    assert config.queue.lease_s > 1200


@pytest.mark.parametrize("text", ["0", "-1", "many", ""])
def test_an_error_budget_is_a_number_above_zero_or_off(serve, tmp_path, recipients, text, capsys):
    with pytest.raises(SystemExit):
        options(serve, tmp_path, recipients, f"--error-budget={text}")
    assert "neither a number above 0 nor off" in capsys.readouterr().err


def test_the_snapshot_is_due_again_when_an_input_changes_and_only_then(serve, tmp_path, recipients):
    given = options(serve, tmp_path, recipients)
    first = serve.fingerprint(given, ["example.com"])
    assert serve.fingerprint(options(serve, tmp_path, recipients, "--workers", "2"), ["example.com"]) == first
    assert serve.fingerprint(given, ["example.org"]) != first
    recipients.write_text("carl@example.com\n")
    assert serve.fingerprint(given, ["example.com"]) != first
