"""What ``/init`` takes, refuses and sets; the state's defaults reach the processes."""

from __future__ import annotations

import base64
from datetime import UTC, datetime

import pytest

from atelier.guest_agent.control import Identity
from atelier.guest_agent.identity import hosts_with
from atelier.guest_agent.program import Options, parse_options
from atelier.guest_agent.running_process import end_event
from atelier.guest_protocol.connect import ConnectError

PRIVATE_KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA+/==\n-----END OPENSSH PRIVATE KEY-----\n"
PUBLIC_KEY = "ssh-ed25519 AAAA+/=="
NETWORK = {"address": "10.1.2.3", "prefixLength": 16, "gateway": "10.1.0.1", "nameserver": "10.1.0.1"}


def test_an_identity_holds_what_was_sent_and_nothing_else() -> None:
    empty = Identity({})
    assert [value for value in vars(empty).values() if value is not None] == []
    full = Identity(
        {
            "accessToken": "t",
            "envVars": {"A": "b"},
            "defaultUser": "root",
            "defaultWorkdir": "/srv",
            "hostname": "box-1",
            "machineId": "0123456789abcdef" * 2,
            "entropy": base64.b64encode(bytes(64)).decode(),
            "hostTimeNs": "1700000000000000001",
            "network": {
                "address": "10.1.2.3",
                "prefixLength": 16,
                "gateway": "10.1.0.1",
                "nameserver": "10.1.0.2",
            },
            "macAddress": "02:00:00:00:00:07",
            "hostKey": {"privateKey": PRIVATE_KEY, "publicKey": PUBLIC_KEY},
            "generation": "0190f9c3-0000-7000-8000-000000000001",
            "restored": True,
        }
    )
    assert full.network is not None
    assert (full.network.address, full.network.gateway) == (bytes([10, 1, 2, 3]), bytes([10, 1, 0, 1]))
    assert (full.network.prefix_length, full.mac_address) == (16, bytes([2, 0, 0, 0, 0, 7]))
    assert full.host_key is not None
    assert (full.host_key.private, full.host_key.public) == (PRIVATE_KEY, PUBLIC_KEY + "\n")
    assert (full.generation, full.is_restored) == ("0190f9c3-0000-7000-8000-000000000001", True)
    assert (full.token, full.environment, full.entropy) == ("t", {"A": "b"}, bytes(64))
    assert full.time_ns == 1_700_000_000_000_000_001


def test_e2b_s_timestamp_is_understood() -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, 678000, UTC)
    for text in ("2026-01-02T03:04:05.678Z", "2026-01-02T04:04:05.678+01:00"):
        assert Identity({"timestamp": text}).time_ns == round(moment.timestamp() * 1_000_000) * 1000


@pytest.mark.parametrize(
    "message",
    [
        {"accessToken": 1},
        {"network": 1},
        {"network": {}},
        {"network": {**NETWORK, "address": "10.1.2"}},
        {"network": {**NETWORK, "gateway": None}},
        {"network": {**NETWORK, "nameserver": "::1"}},
        {"network": {**NETWORK, "prefixLength": 0}},
        {"network": {**NETWORK, "prefixLength": 33}},
        {"network": {**NETWORK, "prefixLength": True}},
        {"macAddress": "02:00"},
        {"macAddress": "xyz"},
        {"macAddress": 2},
        {"macAddress": "03:00:00:00:00:07"},
        {"macAddress": "00:00:00:00:00:00"},
        {"restored": 1},
        {"restored": "true"},
        {"generation": ""},
        {"generation": "A"},
        {"generation": "0\n"},
        {"generation": "0" * 65},
        {"machineId": "0" * 32, "hostKey": 1},
        {"machineId": "0" * 32, "hostKey": {}},
        {"machineId": "0" * 32, "hostKey": {"privateKey": PRIVATE_KEY, "publicKey": f"{PUBLIC_KEY}\nssh-rsa A"}},
        {"machineId": "0" * 32, "hostKey": {"privateKey": PRIVATE_KEY, "publicKey": "ssh-rsa AAAA"}},
        {"machineId": "0" * 32, "hostKey": {"privateKey": f"x{PRIVATE_KEY}", "publicKey": PUBLIC_KEY}},
        {"machineId": "0" * 32, "hostKey": {"privateKey": PRIVATE_KEY.replace("A", "\0"), "publicKey": PUBLIC_KEY}},
        {"hostKey": {"privateKey": PRIVATE_KEY, "publicKey": PUBLIC_KEY}},
        {"envVars": []},
        {"envVars": {"A": 1}},
        {"envVars": {"A=B": "c"}},
        {"envVars": {"": "c"}},
        {"envVars": {"A": "c\0"}},
        {"hostname": ""},
        {"hostname": "a" * 64},
        {"hostname": "-a"},
        {"hostname": "a b"},
        {"hostname": "a\nb"},
        {"machineId": "xyz"},
        {"machineId": "0" * 31},
        {"machineId": "A" * 32},
        {"entropy": "!"},
        {"entropy": ""},
        {"entropy": base64.b64encode(bytes(5000)).decode()},
        {"hostTimeNs": "soon"},
        {"hostTimeNs": -1},
        {"hostTimeNs": True},
        {"hostTimeNs": 1.5},
        {"hostTimeNs": 2**63},
        {"timestamp": "yesterday"},
        {"timestamp": "2026-01-02T03:04:05"},
    ],
)
def test_a_bad_field_refuses_the_whole(message: dict[str, object]) -> None:
    with pytest.raises(ConnectError) as caught:
        Identity(message)
    assert caught.value.code == "invalid_argument"


def test_the_name_is_put_into_hosts_once() -> None:
    hosts = "127.0.0.1\tlocalhost\n127.0.1.1\told\n::1 localhost\n"
    changed = hosts_with(hosts, "new")
    assert changed == "127.0.0.1\tlocalhost\n::1 localhost\n127.0.1.1\tnew\n"
    assert hosts_with(changed, "new") == changed
    assert hosts_with("", "box") == "127.0.0.1\tlocalhost\n127.0.1.1\tbox\n"


def test_options() -> None:
    options = parse_options(["--listen", "127.0.0.1:0", "--no-system", "--default-user", "root"])
    assert (options.listen, options.touches_system, options.default_user) == ("127.0.0.1:0", False, "root")
    assert vars(parse_options([])) == vars(Options())
    for bad in (["--listen"], ["--what"], ["x"]):
        with pytest.raises(ValueError, match=r"needs a value|unknown option"):
            parse_options(bad)


def test_end_events_are_worded_as_go_does() -> None:
    assert end_event(0) == {"exitCode": 0, "exited": True, "status": "exit status 0"}
    assert end_event(3 << 8)["error"] == "exit status 3"
    assert end_event(9) == {
        "exitCode": -1,
        "exited": False,
        "status": "signal: killed",
        "error": "signal: killed",
        "signal": 9,
    }
    assert end_event(11 | 0x80)["status"] == "signal: segmentation fault (core dumped)"
