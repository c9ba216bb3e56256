"""``relay firewall`` lists every connection that the configuration asks for; the Kubernetes manifests let these through."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy/kubernetes"

WIDE = """\
[server]
hostname = "mx.example.com"
[[listener]]
name = "mx"
address = "0.0.0.0:25"
[[listener]]
name = "balanced"
address = "[2001:db8::5]:2525"
proxy_protocol = ["192.0.2.7/32"]
[[listener]]
name = "inside"
address = "127.0.0.1:10025"
[[domain]]
names = ["example.com"]
recipients = "any"
[[route]]
domains = ["example.com"]
next_hops = ["smtp:[192.0.2.20]:25", "smtp:[192.0.2.21]:2526"]
[[route]]
domains = ["box.example"]
next_hops = ["lmtp:[192.0.2.30]"]
[[route]]
domains = ["*"]
next_hops = ["smtp:"]
[dns]
servers = ["192.0.2.53", "192.0.2.54:5353"]
[directory]
next_hops = ["smtp:[192.0.2.40]:25"]
[[directory.ldap]]
name = "ad"
preset = "active-directory"
servers = ["ldaps://192.0.2.50", "ldap://192.0.2.51"]
base = "DC=example,DC=com"
bind = "CN=relay,DC=example,DC=com"
password_file = "secret"
[web]
listen = "127.0.0.1:9125"
"""
LISTED = {
    "in anywhere relay 25/tcp",
    "in 192.0.2.7/32 2001:db8::5 2525/tcp",
    *(
        f"out relay {server}/{protocol}"
        for server in ("192.0.2.53 53", "192.0.2.54 5353")
        for protocol in ("udp", "tcp")
    ),
    "out relay 192.0.2.20 25/tcp",
    "out relay 192.0.2.21 2526/tcp",
    "out relay 192.0.2.30 24/tcp",
    "out relay anywhere 25/tcp",
    "out relay 192.0.2.40 25/tcp",
    "out relay 192.0.2.50 636/tcp",
    "out relay 192.0.2.51 389/tcp",
}
HERE = {"in anywhere 127.0.0.1 10025/tcp", "in monitoring 127.0.0.1 9125/tcp"}


def firewall(config: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "relay", "firewall", "--config", str(config), *arguments],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if not key.startswith("DMZ_RELAY")},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def short(flow: dict[str, Any]) -> str:
    return "{direction} {source} {destination} {port}/{protocol}".format(**flow)


def test_every_connection_is_listed_once_and_what_stays_on_the_machine_on_request(tmp_path: Path) -> None:
    config = tmp_path / "relay.toml"
    config.write_text(WIDE)
    flows = json.loads(firewall(config, "--json"))
    assert sorted(map(short, flows)) == sorted(LISTED)
    assert sorted(map(short, json.loads(firewall(config, "--json", "--all")))) == sorted(LISTED | HERE)
    by_way = {short(flow): (flow["why"], flow["key"]) for flow in flows}
    assert by_way["in 192.0.2.7/32 2001:db8::5 2525/tcp"] == ("balancer, PROXY protocol", "listener[1].address")
    assert by_way["out relay 192.0.2.50 636/tcp"] == ("recipients and logins", "directory.ldap ad")
    table = firewall(config).splitlines()
    assert len(table) == len(LISTED) + 1
    assert re.search(r"^out +relay +192\.0\.2\.30 +24/tcp +mail, LMTP +route$", "\n".join(table), re.MULTILINE)


# --- the manifests -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifests() -> dict[str, dict[str, Any]]:
    named = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
    return {one["kind"]: one for name in named for one in yaml.safe_load_all((KUBERNETES / name).read_text())}


def ports(rules: list[dict[str, Any]]) -> set[str]:
    return {f"{port['port']}/{port['protocol'].lower()}" for rule in rules for port in rule["ports"]}


def test_the_network_policy_lets_through_what_the_relay_lists_and_nothing_else(
    manifests: dict[str, dict[str, Any]],
) -> None:
    flows = json.loads(firewall(KUBERNETES / "relay.toml", "--json", "--all"))
    for direction, rules in (("in", "ingress"), ("out", "egress")):
        wanted = {f"{flow['port']}/{flow['protocol']}" for flow in flows if flow["direction"] == direction}
        assert ports(manifests["NetworkPolicy"]["spec"][rules]) == wanted
    [container] = manifests["StatefulSet"]["spec"]["template"]["spec"]["containers"]
    named = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert set(named.values()) == {flow["port"] for flow in flows if flow["direction"] == "in"}
    assert {named[port["targetPort"]] for port in manifests["Service"]["spec"]["ports"]} == {25}
    assert all(
        container[probe]["httpGet"]["port"] in named for probe in ("startupProbe", "livenessProbe", "readinessProbe")
    )


def test_the_pod_runs_as_the_image_says_without_root_and_writes_to_spool_and_tmp_alone(
    manifests: dict[str, dict[str, Any]],
) -> None:
    pod = manifests["StatefulSet"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    image = (ROOT / "Dockerfile").read_text()
    assert f"--uid {pod['securityContext']['runAsUser']} " in image
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"/var/spool/dmz-relay", "/tmp"}
    there = {volume["name"] for volume in pod["volumes"]}
    there |= {claim["metadata"]["name"] for claim in manifests["StatefulSet"]["spec"]["volumeClaimTemplates"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == there
    drain = re.search(r"drain_timeout_s = ([\d.]+)", (KUBERNETES / "relay.toml").read_text())
    assert drain is not None
    assert pod["terminationGracePeriodSeconds"] > float(drain[1])
