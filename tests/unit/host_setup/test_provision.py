"""Setting up a host, on a machine in a folder: what is made, what is not touched, what an interruption leaves, and that
nothing is left of it in the end."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.unit.host_setup.fake_machine import FakeMachine, Interrupted

from atelier.config.file import parse_config
from atelier.host_setup import surroundings
from atelier.host_setup.changes import UndoOptions
from atelier.host_setup.choosing import choose_plan
from atelier.host_setup.journal import Journal
from atelier.host_setup.plan import CONFIG
from atelier.host_setup.provision import Undone, apply, survey, undo_all
from atelier.model.errors import AtelierError, ConflictError, HostError, InvalidRequestError

WITH_DISK = '[storage]\nvolume_group = "fast"\n[host]\nstorage_device = "/dev/vdb"\n'
WITH_LOOP = '[storage]\nvolume_group = "trial"\n[host]\nloop_file = "/var/lib/pool.img"\nloop_size_gib = 2\n'
WITH_CADDY = '[server]\npublic_url = "https://atelier.example.org"\n[host]\ncaddy = true\ncaddy_tls = "tls-internal"\n'
ALL = UndoOptions(data=True, packages=True)


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """These hosts live for a second."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    (tmp_path / "root").mkdir()
    made = FakeMachine(tmp_path / "root")
    made.disks = {"/dev/vdb"}
    return made


def _write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "host.toml"
    file.write_text(text)
    return file


def init(machine: FakeMachine, given: Path | None = None) -> int:
    journal = Journal.open(machine)
    plan = choose_plan(machine, journal, given, None)
    areas = plan.areas()
    asyncio.run(survey(machine, journal, areas)).refuse_conflicts()
    with journal.lock():
        return asyncio.run(apply(machine, journal, areas, lambda area, what: None))


def look(machine: FakeMachine, given: Path | None = None) -> tuple[list[str], list[str]]:
    journal = Journal.open(machine)
    found = asyncio.run(survey(machine, journal, choose_plan(machine, journal, given, None).areas()))
    return [words for _, words in found.wanted], [each.words for each in found.conflicts]


def uninstall(machine: FakeMachine, options: UndoOptions = ALL) -> Undone:
    journal = Journal.open(machine)
    with journal.lock():
        done = asyncio.run(undo_all(machine, journal, options, lambda area, what: None))
    journal.close()
    return done


@pytest.mark.parametrize("text", ["", WITH_DISK, WITH_LOOP, WITH_CADDY], ids=["files", "disk", "loop", "caddy"])
def test_init_makes_a_host_and_uninstall_leaves_the_machine_as_it_was(
    machine: FakeMachine, tmp_path: Path, text: str
) -> None:
    before = machine.state()
    given = _write(tmp_path, text)
    assert init(machine, given) > 10
    assert "atelier:x:" in machine.read("/etc/passwd")
    assert machine.members("kvm") == {"atelier"}
    assert machine.read("/proc/sys/net/ipv4/ip_forward") == "1\n"
    assert stat.S_IMODE(machine.path("/etc/sudoers.d/atelier").stat().st_mode) == 0o440
    assert json.loads(machine.read("/etc/atelier/privileged.json"))["installation_id"] == "k3v2"
    assert stat.S_IMODE(machine.path(CONFIG).stat().st_mode) == 0o640
    assert {"atelier-network.service", "atelier-gateway.service", "atelier-manager.service"} <= set(machine.services)
    assert machine.state() != before
    done = uninstall(machine)
    assert (done.left, done.kept) == ([], [])
    assert machine.state() == before


@pytest.mark.parametrize("text", [WITH_DISK, WITH_LOOP, WITH_CADDY], ids=["disk", "loop", "caddy"])
def test_a_second_init_changes_nothing(machine: FakeMachine, tmp_path: Path, text: str) -> None:
    given = _write(tmp_path, text)
    init(machine, given)
    once = machine.state()
    assert look(machine) == ([], [])
    assert init(machine) == 0
    assert init(machine, given) == 0
    assert machine.state() == once


def test_check_shows_what_would_change_and_changes_nothing(machine: FakeMachine, tmp_path: Path) -> None:
    before = machine.state()
    wanted, conflicts = look(machine, _write(tmp_path, WITH_DISK))
    assert conflicts == []
    assert "make the user atelier" in wanted
    assert "make the thin pool fast/atelier" in wanted
    assert any(each.startswith("install ") and "lvm2" in each for each in wanted)
    assert machine.state() == before


@pytest.mark.parametrize("text", [WITH_DISK, WITH_LOOP, WITH_CADDY], ids=["disk", "loop", "caddy"])
def test_an_init_that_is_cut_off_anywhere_goes_on_and_can_be_taken_back(tmp_path: Path, text: str) -> None:
    given = _write(tmp_path, text)
    for cut in range(100):
        (tmp_path / str(cut)).mkdir()
        machine = FakeMachine(tmp_path / str(cut))
        machine.disks = {"/dev/vdb"}
        before = machine.state()
        machine.power_until = cut
        try:
            init(machine, given)
        except Interrupted:
            pass
        else:
            assert cut > 10
            return
        machine.power_until = None
        if cut % 2:
            # From half a host.
            uninstall(machine)
            assert machine.state() == before, cut
            continue
        init(machine, given)
        assert look(machine) == ([], [])
        assert all(each.is_done for each in Journal.open(machine).entries)
        uninstall(machine)
        assert machine.state() == before, cut
    raise AssertionError("init never came to its end")


def test_an_uninstall_that_is_cut_off_anywhere_goes_on(tmp_path: Path) -> None:
    given = _write(tmp_path, WITH_LOOP)
    for cut in range(100):
        (tmp_path / str(cut)).mkdir()
        machine = FakeMachine(tmp_path / str(cut))
        before = machine.state()
        init(machine, given)
        machine.power_until = cut
        try:
            uninstall(machine)
        except Interrupted:
            machine.power_until = None
            uninstall(machine)
            assert machine.state() == before, cut
        else:
            assert cut > 5
            return
    raise AssertionError("uninstall never came to its end")


def test_data_and_packages_are_kept_unless_asked_for_and_go_later(machine: FakeMachine, tmp_path: Path) -> None:
    before = machine.state()
    init(machine, _write(tmp_path, WITH_DISK))
    machine.volumes["fast/at-k3v2-volume-abcdefghijkl"] = "atelier"
    done = uninstall(machine, UndoOptions())
    assert machine.path("/var/lib/atelier/data/atelier.db").exists()
    assert machine.pools == {"fast/atelier"}
    assert "atelier:x:" in machine.read("/etc/passwd"), "who owns the data stays"
    assert "lvm2" in machine.packages
    assert machine.services == {}
    assert not machine.path("/etc/sudoers.d/atelier").exists()
    for kept in ("the thin pool fast/atelier", "the volume group fast", "/var/lib/atelier/data"):
        assert kept in done.kept
    assert any(each.startswith("the packages ") and "lvm2" in each for each in done.kept)
    uninstall(machine, ALL)
    assert machine.volumes == {}
    assert machine.state() == before


def test_a_host_of_kept_data_can_be_set_up_again(machine: FakeMachine, tmp_path: Path) -> None:
    given = _write(tmp_path, WITH_DISK)
    init(machine, given)
    uninstall(machine, UndoOptions())
    init(machine, given)
    assert look(machine, given) == ([], [])
    assert machine.path("/var/lib/atelier/data/atelier.db").exists()


FOREIGN = [
    ("user", lambda m: (m.root / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\natelier:x:1000:1000::/home/atelier:/bin/sh\n"),
     "the user atelier is there", "host.user|\\[host\\] user"),
    ("bridge", lambda m: m.links.update(br0=""), "a link br0 already", "bridge_name"),
    ("group", lambda m: (m.install_lvm(), m.groups.update(fast="/dev/vdz")),
     "a volume group fast already", "storage.volume_group"),
    ("disk", lambda m: m.signatures.update({"/dev/vdb": "ext4"}), r"/dev/vdb is not empty \(vdb ext4\)", "wipefs"),
    ("no disk", lambda m: m.disks.clear(), "/dev/vdb is no disk", "lsblk"),
    ("sudoers", lambda m: (m.root / "etc/sudoers.d/atelier").write_text("bob ALL=ALL\n"),
     "/etc/sudoers.d/atelier is there, and not of Atelier's making", "mv "),
    ("unit", lambda m: (m.root / "etc/systemd/system/atelier-manager.service").write_text("[Unit]\n"),
     "atelier-manager.service is there", "mv "),
    ("data", lambda m: (m.root / "var/lib/atelier/data").mkdir(parents=True), "the folder /var/lib/atelier/data is there", "mv "),
    ("port", lambda m: m.ports.update({2222: 'LISTEN 0 128 0.0.0.0:2222 0.0.0.0:* users:(("sshd",pid=77,fd=3))'}),
     r"sshd \(process 77\) serves port 2222", "ssh.listen"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "words", "remedy"), [each[1:] for each in FOREIGN], ids=[each[0] for each in FOREIGN])
def test_what_is_somebody_elses_is_said_and_nothing_is_changed(
    machine: FakeMachine, tmp_path: Path, make, words: str, remedy: str
) -> None:
    import re

    make(machine)
    before = machine.state()
    with pytest.raises(ConflictError, match=words) as refused:
        init(machine, _write(tmp_path, WITH_DISK))
    assert refused.value.code == "host_conflict"
    assert re.search(remedy, refused.value.hint)
    assert machine.state() == before


def test_all_that_is_in_the_way_is_said_at_once(machine: FakeMachine, tmp_path: Path) -> None:
    machine.links["br0"] = ""
    machine.signatures["/dev/vdb"] = "ext4"
    with pytest.raises(ConflictError) as refused:
        init(machine, _write(tmp_path, WITH_DISK))
    assert len(refused.value.hint.splitlines()) == 2


def test_another_bridge_name_or_ones_own_bridge_is_no_conflict(machine: FakeMachine, tmp_path: Path) -> None:
    machine.links["br0"] = ""
    init(machine, _write(tmp_path, '[network]\nbridgeName = "sandbr0"\n'))
    machine.links["sandbr0"] = "atelier k3v2"
    assert look(machine) == ([], [])


def test_a_caddy_of_the_hosts_own_is_not_touched(machine: FakeMachine, tmp_path: Path) -> None:
    machine.packages.add("caddy")
    before = machine.state()
    with pytest.raises(ConflictError, match="a Caddy of its own"):
        init(machine, _write(tmp_path, WITH_CADDY))
    assert machine.state() == before
    init(machine, _write(tmp_path, ""))
    uninstall(machine)
    assert machine.state() == before


def test_docker_is_said_and_its_forwarding_stays(machine: FakeMachine, tmp_path: Path) -> None:
    init(machine, _write(tmp_path, ""))
    (machine.root / "sys/class/net/docker0").mkdir()
    assert any("DOCKER-USER" in each for each in asyncio.run(surroundings.notes(machine)))
    done = uninstall(machine)
    assert done.left == ["net.ipv4.ip_forward stays 1: docker0 needs it, too"]
    assert machine.read("/proc/sys/net/ipv4/ip_forward") == "1\n"


def test_a_group_that_is_given_is_used_and_stays(machine: FakeMachine, tmp_path: Path) -> None:
    machine.install_lvm()
    machine.groups["admins"] = "/dev/vdc"
    before = machine.state()
    init(machine, _write(tmp_path, '[storage]\nvolume_group = "admins"\n'))
    assert machine.pools == {"admins/atelier"}
    uninstall(machine)
    assert machine.state() == before


def test_a_group_that_is_not_there_and_no_disk_for_it(machine: FakeMachine, tmp_path: Path) -> None:
    machine.install_lvm()
    with pytest.raises(ConflictError, match="this host has no volume group lost") as refused:
        init(machine, _write(tmp_path, '[storage]\nvolume_group = "lost"\n'))
    assert "vgcreate lost" in refused.value.hint


def test_volumes_of_others_in_our_group_keep_it(machine: FakeMachine, tmp_path: Path) -> None:
    init(machine, _write(tmp_path, WITH_DISK))
    machine.volumes["fast/database"] = ""
    done = uninstall(machine)
    assert done.kept[0] == "the volume group fast: others have volumes in it: database"
    assert "lvm2" in machine.packages, "without it they had nothing"
    assert machine.groups == {"fast": "/dev/vdb"}
    machine.volumes.clear()
    uninstall(machine)
    assert machine.groups == {}


def test_what_somebody_changed_since_is_said_and_left(machine: FakeMachine, tmp_path: Path) -> None:
    init(machine, _write(tmp_path, ""))
    unit = machine.path("/etc/systemd/system/atelier-manager.service")
    unit.write_text(unit.read_text() + "# mine\n")
    with pytest.raises(ConflictError, match="was changed since Atelier wrote it"):
        init(machine)
    done = uninstall(machine)
    assert any("atelier-manager.service was changed" in each for each in done.left)
    assert unit.read_text().endswith("# mine\n")


def test_a_newer_version_updates_its_own_files(
    machine: FakeMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from atelier.host_setup import access_changes

    init(machine, _write(tmp_path, ""))
    monkeypatch.setattr(access_changes, "program_text", lambda python: "#!/newer\n")
    wanted, conflicts = look(machine)
    assert (wanted, conflicts) == (["update /usr/local/sbin/atelier-privileged"], [])
    init(machine)
    assert machine.read("/usr/local/sbin/atelier-privileged") == "#!/newer\n"


def test_an_edited_configuration_is_what_counts(machine: FakeMachine, tmp_path: Path) -> None:
    init(machine, _write(tmp_path, ""))
    config = machine.path(CONFIG)
    config.write_text(config.read_text() + '\n[ssh]\nlisten = "off"\n')
    plan = choose_plan(machine, Journal.open(machine), None, None)
    assert plan.settings.ssh_listen is None
    init(machine)
    assert config.read_text().endswith('listen = "off"\n')
    config.write_text(config.read_text().replace("listen", "lisen"))
    with pytest.raises(InvalidRequestError, match=r"atelier\.toml:\d+: there is no setting ssh\.lisen"):
        init(machine)


def test_what_the_configuration_lacks_is_filled_in_and_the_rest_stays(machine: FakeMachine, tmp_path: Path) -> None:
    text = '# mine\n[server]  # the manager\nlisten = "127.0.0.1:7999"\n\n[host]\nuser = "sandboxes"\n'
    init(machine, _write(tmp_path, text))
    written = machine.read(CONFIG)
    assert "# mine\n[server]  # the manager\n" in written
    values = parse_config(written)
    assert values.get("server.data_dir") == "/var/lib/atelier/data"
    assert values.get("server.listen") == "127.0.0.1:7999"
    assert "User=sandboxes" in machine.read("/etc/systemd/system/atelier-manager.service")
    assert "sandboxes ALL=(root:root) NOPASSWD" in machine.read("/etc/sudoers.d/atelier")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[server]\nmode = "local"\n', "server.mode is not production"),
        ('[server]\ncompanions = "kept"\n', "server.companions is not services"),
        ('[network]\nhome = "private"\n', "network.home is not host"),
        ('[server]\nrun_dir = "/srv/run"\n', "server.run_dir is not /run/atelier"),
    ],
)
def test_what_no_production_host_can_have_is_refused(
    machine: FakeMachine, tmp_path: Path, text: str, words: str
) -> None:
    with pytest.raises(InvalidRequestError, match=words) as refused:
        init(machine, _write(tmp_path, text))
    assert refused.value.code == "not_production"


def test_a_service_that_does_not_start_is_told_with_its_last_words(machine: FakeMachine, tmp_path: Path) -> None:
    def refuse(words: Sequence[str]) -> None:
        if list(words[:4]) == ["systemctl", "enable", "--now", "atelier-gateway.service"]:
            from atelier.model.errors import CommandError

            raise CommandError("failed")

    machine.before_command = refuse
    with pytest.raises(HostError, match=r"the service atelier-gateway\.service does not start: its last words"):
        init(machine, _write(tmp_path, ""))
    machine.before_command = lambda words: None
    init(machine)
    assert look(machine) == ([], [])


def test_a_journal_that_is_damaged_is_not_guessed_at(machine: FakeMachine, tmp_path: Path) -> None:
    init(machine, _write(tmp_path, ""))
    machine.path("/var/lib/atelier/host-state.json").write_text("{")
    with pytest.raises(HostError) as refused:
        init(machine)
    assert refused.value.code == "host_state_damaged"


def test_a_closed_network_takes_no_holder(machine: FakeMachine, tmp_path: Path) -> None:
    init(machine, _write(tmp_path, '[network]\nkind = "closed"\n'))
    assert set(machine.services) == {"atelier-gateway.service", "atelier-manager.service"}
    assert machine.read("/proc/sys/net/ipv4/ip_forward") == "0\n"


def test_answers_of_a_person_make_the_configuration(machine: FakeMachine) -> None:
    said = {"volume group": "fast", "empty disk": "/dev/vdb", "bridge": "mybr"}
    asked: list[str] = []

    def ask(question: str, default: str) -> str:
        asked.append(question)
        return next((answer for words, answer in said.items() if words in question), default)

    plan = choose_plan(machine, Journal.open(machine), None, ask)
    assert len(asked) == 6
    assert plan.settings.bridge_name == "mybr"
    assert plan.settings.production.volume_group == "fast"
    assert plan.host.storage_device == Path("/dev/vdb")
    with pytest.raises(AtelierError):
        choose_plan(machine, Journal.open(machine), None, lambda question, default: "no name of anything")
