"""Addresses as people write them: `HOST:PORT`, and `HOST:PORT[:/SUBDIR]` for what is to be mounted."""

from __future__ import annotations

from dataclasses import dataclass

from mount.outcome import CommandError, Exit

DEFAULT_PORT = 7400
"""Port of the inode service when none is given; not registered for anything that is in use."""


@dataclass(frozen=True)
class Address:
    """Where a service listens."""

    host: str  # A name or an IP address, an IPv6 one without brackets.
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True)
class Target:
    """What is to be mounted."""

    address: Address
    subdirectory: bytes = b"/"  # Absolute, without "..", without a slash at the end (the root aside).

    def __str__(self) -> str:
        """As in the first column of /proc/mounts: `HOST:PORT:/SUBDIR`."""
        return f"{self.address}:{self.subdirectory.decode('utf-8', 'surrogateescape')}"


def parse_address(text: str, *, default_port: int | None = None) -> Address:
    """Read `HOST:PORT`, with IPv6 addresses in brackets.

    Raises:
        CommandError: it is not of that form (exit code 2); the sentence shows the form.
    """
    host, colon, port = text.rpartition(":")
    if (text.startswith("[") and text.endswith("]")) or not colon:
        host, port = text, "" if default_port is None else str(default_port)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise _malformed(text, "an IPv6 address goes in brackets: [::1]:7400")
    if not host or any(c.isspace() or c in "/[]" for c in host):
        raise _malformed(text, "it needs a host name or address: HOST:PORT")
    if not (port.isascii() and port.isdigit()) or not 1 <= int(port) <= 65535:
        raise _malformed(text, "it needs a port from 1 to 65535: HOST:PORT")
    return Address(host, int(port))


def parse_target(text: str) -> Target:
    """Read `HOST:PORT`, `HOST:PORT:/SUBDIR`, `HOST:/SUBDIR` (port 7400), with IPv6 addresses in brackets.

    Raises:
        CommandError: it is not of that form (exit code 2); the sentence shows the form.
    """
    address_text, colon, path = text.partition(":/")
    if not colon:
        return Target(parse_address(text, default_port=DEFAULT_PORT))
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise _malformed(text, "the directory after HOST:PORT: must not contain ..")
    subdirectory = ("/" + "/".join(parts)).encode("utf-8", "surrogateescape")
    if b"\0" in subdirectory:
        raise _malformed(text, "the directory contains a NUL byte")
    return Target(parse_address(address_text, default_port=DEFAULT_PORT), subdirectory)


def _malformed(text: str, why: str) -> CommandError:
    return CommandError(f"{text!r} is not an address of an inode service: {why}", Exit.USAGE)
