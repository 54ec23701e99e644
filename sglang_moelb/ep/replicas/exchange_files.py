"""Open files of every rank to every other rank of the host, through Unix sockets.

Shape letters: R ranks.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist

from sglang_moelb.ep.replicas.pages import MappingError

FILES_A_MESSAGE = 64  # the kernel takes 253
TIMEOUT_S = 60.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def exchange_files(
    files: Sequence[int], group: dist.ProcessGroup, take: Callable[[int, list[int]], None]
) -> None:
    """Send `files` to all other ranks of the gloo `group` and `take(rank, theirs)` what they send.

    Every rank sends as many. `files` are not closed; what is taken is the taker's to close.

    Raises:
        MappingError: ranks on several hosts, on all ranks alike; or a peer that cannot be reached
            or sends less.
    """
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        # No name in the file system, so nothing is left behind. Other users may see the name, so
        # who connects is asked for.
        address = f"\0moelb-{secrets.token_hex(8)}"
        listening.settimeout(TIMEOUT_S)
        listening.bind(address)
        listening.listen(num_ranks)
        addresses_R: list[tuple[str, str]] = [("", "")] * num_ranks
        dist.all_gather_object(addresses_R, (_host(), address), group=group)
        _check_one_host([host for host, _ in addresses_R])
        with ThreadPoolExecutor(1, "moelb-files") as sender:
            sent = sender.submit(_send_to_peers, listening, files, num_ranks - 1)
            for peer, (_, theirs) in enumerate(addresses_R):
                if peer != rank:
                    take(peer, _receive(peer, theirs, len(files)))
            sent.result()


def _host() -> str:
    return f"{socket.gethostname()} {BOOT_ID.read_text().strip() if BOOT_ID.exists() else ''}"


def _check_one_host(hosts_R: Sequence[str]) -> None:
    for rank, host in enumerate(hosts_R):
        if host != hosts_R[0]:
            raise MappingError(
                f"rank 0 is on host {hosts_R[0].split()[0]} and rank {rank} on {host.split()[0]}: "
                "only ranks of one host can read each other's experts; use one host"
            )


def _send_to_peers(listening: socket.socket, files: Sequence[int], num_peers: int) -> None:
    num_served = 0
    while num_served < num_peers:
        try:
            connection, _ = listening.accept()
        except TimeoutError as error:
            raise MappingError(
                f"{num_peers - num_served} of {num_peers} ranks have not come for this rank's "
                f"experts within {TIMEOUT_S:.0f} s; see their logs"
            ) from error
        except OSError as error:
            raise MappingError(f"no peer can be let in: {error}; see `ulimit -n`") from error
        with connection:
            if _user(connection) != os.getuid():
                continue
            _send(connection, files)
        num_served += 1


def _send(connection: socket.socket, files: Sequence[int]) -> None:
    connection.settimeout(TIMEOUT_S)  # an accepted socket does not take over the listening one's
    try:
        for start in range(0, len(files), FILES_A_MESSAGE):
            socket.send_fds(connection, [b"f"], files[start : start + FILES_A_MESSAGE])
    except OSError as error:
        raise MappingError(
            f"experts cannot be sent to a peer: {error}; see the log of the others and `ulimit -n`"
        ) from error


def _user(connection: socket.socket) -> int:
    size = struct.calcsize("3i")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    user: int = struct.unpack("3i", credentials)[1]
    return user


def _receive(peer: int, address: str, num_files: int) -> list[int]:
    found: list[int] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(TIMEOUT_S)
        try:
            connection.connect(address)
            while len(found) < num_files:
                told, files, _, _ = socket.recv_fds(connection, 1, FILES_A_MESSAGE)
                found += files
                if not told or not files:
                    break
        except OSError as error:
            raise MappingError(
                f"rank {peer} cannot be reached for its experts: {error}; ranks must share the "
                "host's network namespace"
            ) from error
    if len(found) != num_files:
        raise MappingError(
            f"rank {peer} sent {len(found)} of {num_files} open files; see its log and `ulimit -n`"
        )
    return found
