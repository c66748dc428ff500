"""The fake VMM's state: not started, running or paused, what was configured, and what Firecracker refuses when.

Source: Firecracker src/firecracker/swagger/firecracker.yaml; docs/snapshotting/snapshot-support.md.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fake_firecracker.guest import CountingGuest
from tests.fake_firecracker.vsock import VsockServer

_MIB = 1024 * 1024
_ELF = b"\x7fELF"
_BEFORE = "The requested operation is not supported before starting the microVM."
_AFTER = "The requested operation is not supported after starting the microVM."


class Refusal(Exception):
    """What becomes a 400 with these words."""


class FakeMachine:
    """``real`` finds a path of the machine's; ``link_is_up`` asks a TAP by name; ``guest_socket``: where a real guest
    agent listens, empty: an echo."""

    def __init__(
        self,
        machine_id: str,
        version: str,
        real: Callable[[str], Path],
        link_is_up: Callable[[str], bool],
        guest_socket: str,
    ) -> None:
        self._id = machine_id
        self._version = version
        self._real = real
        self._link_is_up = link_is_up
        self._guest_socket = guest_socket
        self._state = "Not started"
        self._config: dict[str, Any] = {
            "machine-config": {"vcpu_count": 1, "mem_size_mib": 128},
            "drives": {},
            "network-interfaces": {},
        }
        self._is_configured = False
        self._guest: CountingGuest | None = None
        self._vsock: VsockServer | None = None

    def handle(self, method: str, path: str, body: Any) -> dict[str, Any] | None:
        """The answer to what the document allows; None: 204. Raises Refusal."""
        kind, _, name = path.strip("/").partition("/")
        match method, kind:
            case "GET", "":
                return {
                    "app_name": "Firecracker", "id": self._id, "state": self._state, "vmm_version": self._version,
                }  # fmt: skip
            case "GET", "version":
                return {"firecracker_version": self._version}
            case "GET", "machine-config":
                return self._config["machine-config"]
            case "GET", "balloon" if name == "statistics":
                return self._balloon_statistics()
            case "PUT", "actions":
                self._act(body["action_type"])
            case "PUT", "metrics" | "logger":
                self._put_output(kind, body)
            case "PUT", "snapshot" if name == "load":
                self._load(body)
            case "PUT", "snapshot":
                self._save(body)
            case "PATCH", "vm":
                self._needs_start()
                self._set_state(body["state"])
            case "PATCH", "drives":
                self._needs_start()
                self._patch_drive(name, body)
            case "PATCH", "balloon":
                self._config["balloon"]["amount_mib"] = body["amount_mib"]
            case "PUT", _:
                self._put(kind, name, body)
            case _:
                raise Refusal(f"Invalid request method and/or path: {method} {path}.")
        return None

    def _needs_start(self) -> None:
        if self._state == "Not started":
            raise Refusal(_BEFORE)

    def _put(self, kind: str, name: str, body: dict[str, Any]) -> None:
        if self._state != "Not started":
            raise Refusal(_AFTER)
        for key in ("kernel_image_path", "initrd_path", "path_on_host"):
            if key in body:
                os.close(self._open(body[key], os.O_RDONLY if body.get("is_read_only", True) else os.O_RDWR))
        if kind in ("drives", "network-interfaces"):
            if body.get("drive_id", body.get("iface_id")) != name:
                raise Refusal("The id in the path does not match that in the body.")
            self._config[kind][name] = body
        else:
            self._config[kind] = body
        if kind == "vsock":
            self._vsock = VsockServer(self._real(body["uds_path"]), self._guest_socket)
        self._is_configured = True

    def _put_output(self, kind: str, body: dict[str, Any]) -> None:
        if kind in self._config:
            raise Refusal(f"The {kind} system was already initialized.")
        self._config[kind] = body
        os.close(self._open(body.get("metrics_path") or body["log_path"], os.O_WRONLY))

    def _act(self, action: str) -> None:
        match action:
            case "InstanceStart":
                self._start()
            case "FlushMetrics":
                self._needs_start()
                self._flush_metrics()
            case _:
                self._needs_start()

    def _start(self) -> None:
        if self._state != "Not started":
            raise Refusal(_AFTER)
        if "boot-source" not in self._config:
            raise Refusal("Cannot start microvm without kernel configuration.")
        descriptor = self._open(self._config["boot-source"]["kernel_image_path"], os.O_RDONLY)
        begin = os.read(descriptor, 4)
        os.close(descriptor)
        if begin != _ELF:
            raise Refusal(
                "Cannot load kernel due to invalid memory configuration or invalid kernel image: bad ELF magic"
            )
        self._begin_guest(None)
        self._set_state("Resumed")

    def _begin_guest(self, memory: dict[str, str] | None) -> None:
        root = next((each for each in self._config["drives"].values() if each["is_root_device"]), None)
        if root is None:
            raise Refusal("there is no root drive")
        taps = [each["host_dev_name"] for each in self._config["network-interfaces"].values()]
        disk = self._open(root["path_on_host"], os.O_RDWR)
        self._guest = CountingGuest(disk, lambda: all(map(self._link_is_up, taps)), memory)

    def _set_state(self, state: str) -> None:
        assert self._guest is not None
        if state == "Paused":
            self._guest.pause()
        else:
            self._guest.resume()
        self._state = "Paused" if state == "Paused" else "Running"

    def _patch_drive(self, name: str, body: dict[str, Any]) -> None:
        drive = self._config["drives"].get(name)
        if drive is None:
            raise Refusal(f"Unable to patch the block device: no drive {name}")
        drive |= body
        if "path_on_host" in body and drive["is_root_device"]:
            assert self._guest is not None
            self._guest.changed_disk(self._open(body["path_on_host"], os.O_RDWR))

    def _save(self, body: dict[str, Any]) -> None:
        self._needs_start()
        if self._state != "Paused":
            raise Refusal("Cannot create snapshot: the microVM is not paused")
        assert self._guest is not None
        size_bytes = self._config["machine-config"]["mem_size_mib"] * _MIB
        descriptor = self._open(body["mem_file_path"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.ftruncate(descriptor, size_bytes)
        os.write(descriptor, json.dumps(self._guest.memory).encode() + b"\n")
        os.close(descriptor)
        saved = json.dumps({"version": self._version, "config": self._config}).encode()
        descriptor = self._open(body["snapshot_path"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(descriptor, saved + zlib.crc32(saved).to_bytes(4, "little"))
        os.close(descriptor)
        if self._vsock is not None:
            self._vsock.reset()

    def _load(self, body: dict[str, Any]) -> None:
        if self._is_configured or self._state != "Not started":
            raise Refusal("Loading a microVM snapshot not allowed after configuring boot-specific resources.")
        if ("mem_backend" in body) == ("mem_file_path" in body):
            raise Refusal("exactly one of mem_backend and mem_file_path is to be given")
        content = self._read(body["snapshot_path"])
        if zlib.crc32(content[:-4]).to_bytes(4, "little") != content[-4:]:
            raise Refusal("Load snapshot error: Failed to restore from snapshot: CRC validation failed")
        saved = json.loads(content[:-4])
        if saved["version"] != self._version:
            raise Refusal(f"Load snapshot error: snapshot version {saved['version']} is not {self._version}")
        config: dict[str, Any] = saved["config"]
        for override in body.get("network_overrides", ()):
            if override["iface_id"] not in config["network-interfaces"]:
                raise Refusal(f"Load snapshot error: Unknown network device: {override['iface_id']}")
            config["network-interfaces"][override["iface_id"]]["host_dev_name"] = override["host_dev_name"]
        for drive in config["drives"].values():
            os.close(self._open(drive["path_on_host"], os.O_RDONLY if drive["is_read_only"] else os.O_RDWR))
        outputs = {name: self._config[name] for name in ("metrics", "logger") if name in self._config}
        self._config = {**config, **outputs}
        memory = self._map_memory(body["mem_backend"]["backend_path"], config["machine-config"]["mem_size_mib"] * _MIB)
        if "vsock" in config:
            self._vsock = VsockServer(self._real(config["vsock"]["uds_path"]), self._guest_socket)
        self._begin_guest(memory)
        self._state = "Paused"
        self._is_configured = True
        if body.get("resume_vm"):
            self._set_state("Resumed")

    def _map_memory(self, path: str, size_bytes: int) -> dict[str, str]:
        """As a private map would: as much as the machine has, whatever lies behind that."""
        descriptor = self._open(path, os.O_RDONLY)
        try:
            if os.fstat(descriptor).st_size < size_bytes:
                raise Refusal("Load snapshot error: Cannot create memory mappings: the file is past its end")
            return json.loads(os.pread(descriptor, 1 << 20, 0).partition(b"\n")[0])
        finally:
            os.close(descriptor)

    def _flush_metrics(self) -> None:
        if "metrics" not in self._config:
            raise Refusal("the metrics system was not initialized")
        descriptor = self._open(self._config["metrics"]["metrics_path"], os.O_WRONLY | os.O_APPEND)
        os.write(descriptor, json.dumps({"utc_timestamp_ms": 1, "api_server": {}, "balloon": {}}).encode() + b"\n")
        os.close(descriptor)

    def _balloon_statistics(self) -> dict[str, Any]:
        if "balloon" not in self._config:
            raise Refusal("Balloon device not configured")
        amount_mib = self._config["balloon"]["amount_mib"]
        return {"target_pages": amount_mib * 256, "actual_pages": 0, "target_mib": amount_mib, "actual_mib": 0}

    def _open(self, path: str, flags: int) -> int:
        try:
            return os.open(self._real(path), flags, 0o600)
        except OSError as error:
            raise Refusal(f"{os.strerror(error.errno)} (os error {error.errno}): {path}") from error

    def _read(self, path: str) -> bytes:
        descriptor = self._open(path, os.O_RDONLY)
        with os.fdopen(descriptor, "rb") as file:
            return file.read()
