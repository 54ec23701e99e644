"""Laws of open files sent between the ranks of a host."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest
import torch.distributed as dist

from sglang_moelb.ep.replicas import exchange_files as module
from sglang_moelb.ep.replicas.exchange_files import exchange_files
from sglang_moelb.ep.replicas.pages import MappingError

from .ranks import Ranks

pytestmark = pytest.mark.dist


def exchange(group: dist.ProcessGroup, rank: int, num_files: int) -> dict[int, list[bytes]]:
    files = [os.memfd_create("test") for _ in range(num_files)]
    for number, file in enumerate(files):
        os.write(file, f"{rank} {number}".encode())
    taken: dict[int, list[bytes]] = {}

    def take(peer: int, theirs: list[int]) -> None:
        taken[peer] = [os.pread(file, 20, 0) for file in theirs]
        for file in theirs:
            os.close(file)

    exchange_files(files, group, take)
    for file in files:
        os.close(file)
    return taken


@pytest.mark.parametrize("num_files", [0, 1, module.FILES_A_MESSAGE, 200])
def test_every_rank_gets_every_others_files_in_order(ranks: Ranks, num_files: int) -> None:
    for rank, taken in enumerate(ranks.run(exchange, [num_files] * 4)):
        assert taken == {
            peer: [f"{peer} {number}".encode() for number in range(num_files)]
            for peer in range(4)
            if peer != rank
        }


def lose_some(group: dist.ProcessGroup, rank: int, _: None) -> str:
    files = [os.memfd_create("test") for _ in range(3)]
    send = socket.send_fds
    if rank == 0:
        socket.send_fds = lambda to, told, some: send(to, told, some[:2])  # type: ignore
    try:
        exchange_files(files, group, lambda peer, theirs: None)
    except MappingError as error:
        return str(error)
    finally:
        socket.send_fds = send
    return ""


def test_a_rank_that_sends_less_is_named(ranks: Ranks) -> None:
    told = ranks.run(lose_some, [None] * 2)
    assert told[1].startswith("rank 0 sent 2 of 3 open files")


def gone_peer(group: dist.ProcessGroup, rank: int, _: None) -> str:
    files = [os.memfd_create("test")]
    send = socket.send_fds

    def broken(*args: Any) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    if rank == 0:
        socket.send_fds = broken
    try:
        exchange_files(files, group, lambda peer, theirs: None)
    except MappingError as error:
        return str(error)
    finally:
        socket.send_fds = send
    return ""


def test_a_peer_that_cannot_be_sent_to_is_an_error_of_mapping(ranks: Ranks) -> None:
    told = ranks.run(gone_peer, [None] * 2)
    assert told[0].startswith("experts cannot be sent to a peer: [Errno 32] Broken pipe")
    assert told[1].startswith("rank 0 sent 0 of 1 open files")


def stuck_peer(group: dist.ProcessGroup, rank: int, _: None) -> str:
    """Rank 1 connects and never reads; the files of rank 0 fill what lies between."""
    kept = module.TIMEOUT_S, module.FILES_A_MESSAGE, module._receive
    module.TIMEOUT_S, module.FILES_A_MESSAGE = 0.5, 1
    file, connection = os.memfd_create("test"), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def connect_only(peer: int, address: str, num_files: int) -> list[int]:
        if rank == 1:
            connection.connect(address)
        return []

    module._receive = connect_only
    try:
        exchange_files([file] * 5000, group, lambda peer, theirs: None)
    except MappingError as error:
        return str(error)
    finally:
        module.TIMEOUT_S, module.FILES_A_MESSAGE, module._receive = kept
        dist.barrier(group=group)
        os.close(file)
        connection.close()
    return ""


def test_a_peer_that_never_reads_ends_the_wait(ranks: Ranks) -> None:
    told = ranks.run(stuck_peer, [None] * 2)
    assert told[0].startswith("experts cannot be sent to a peer: ")


def strangers_first(group: dist.ProcessGroup, rank: int, _: None) -> dict[int, list[bytes]]:
    """A process of another user comes to rank 0 before its peers do."""
    user, num_asked = module._user, 0

    def asked(connection: socket.socket) -> int:
        nonlocal num_asked
        num_asked += 1
        return -1 if rank == 0 and num_asked == 1 else user(connection)

    gather = dist.all_gather_object

    def then_connect(addresses: list[Any], mine: Any, group: Any) -> None:
        gather(addresses, mine, group=group)
        if rank == 0:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
                stranger.connect(mine[1])
        dist.barrier(group=group)

    module._user, module.dist.all_gather_object = asked, then_connect
    try:
        return exchange(group, rank, 2)
    finally:
        module._user, module.dist.all_gather_object = user, gather


def test_another_users_process_gets_nothing(ranks: Ranks) -> None:
    assert ranks.run(strangers_first, [None] * 2) == [
        {1: [b"1 0", b"1 1"]},
        {0: [b"0 0", b"0 1"]},
    ]


def never_come(group: dist.ProcessGroup, rank: int, _: None) -> str:
    kept = module.TIMEOUT_S, module._receive
    module.TIMEOUT_S = 0.2
    if rank == 1:
        module._receive = lambda peer, address, num_files: []
    try:
        exchange_files([], group, lambda peer, theirs: None)
    except MappingError as error:
        return str(error)
    finally:
        module.TIMEOUT_S, module._receive = kept
    return ""


def test_a_rank_that_never_comes_ends_the_wait(ranks: Ranks) -> None:
    told = ranks.run(never_come, [None] * 2)
    assert told[0].startswith("1 of 1 ranks have not come for this rank's experts")
