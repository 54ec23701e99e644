"""Drive one ready server: a warm-up that is not counted, then the timed rounds."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import aiohttp
import msgspec

from sglang_moelb.ab.client import Target, failed, send_all
from sglang_moelb.ab.status import Follower, StatusError, read_status
from sglang_moelb.ab.types import Outcome, Plan, Request, RoundTime, Session
from sglang_moelb.ab.workload import warmup_of

WATCH_S = 0.5
LATE_DEATH_S = 3.0


@dataclass(slots=True)
class _Log:
    """What has come back so far; kept when the server dies on the way."""

    outcomes: list[Outcome] = field(default_factory=list)
    rounds: list[RoundTime] = field(default_factory=list)
    follower: Follower | None = None
    status_error: str = ""


def drive(
    plan: Plan,
    url: str,
    *,
    first_round: int,
    start_s: float,
    on_done: Callable[[], None],
    death: Callable[[], str],
) -> Session:
    """Warm up and run `plan.rounds` rounds against `url`.

    `death` is asked every half second and says why the server is gone, or "": then the requests
    not answered yet are marked failed, and what came before is kept. `on_done` is called once a
    request, warm-up included.
    """
    log = _Log()
    failure = asyncio.run(_guarded(plan, url, first_round, log, on_done, death))
    if failure:
        _mark_missing(plan, log, first_round, failure.splitlines()[0])
    return Session(
        outcomes=tuple(sorted(log.outcomes, key=lambda o: (o.round, o.request_id))),
        rounds=tuple(log.rounds),
        observed=log.follower.observed() if log.follower else None,
        start_s=start_s,
        failure=failure,
        status_error=log.status_error,
    )


async def _guarded(
    plan: Plan,
    url: str,
    first_round: int,
    log: _Log,
    on_done: Callable[[], None],
    death: Callable[[], str],
) -> str:
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
    # A connection that is used twice may be closed by the server just then, when idle for long.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(
        timeout=timeout, connector=connector, read_bufsize=2**20
    ) as http:
        work = asyncio.create_task(_rounds(http, plan, url, first_round, log, on_done))
        watch = asyncio.create_task(_watch(death))
        await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            if log.outcomes and log.outcomes[-1].error:
                # The connections of a dying server close a moment before its process is gone.
                await asyncio.wait((watch,), timeout=LATE_DEATH_S)
            await _cancel(watch)
            try:
                work.result()
            except (aiohttp.ClientError, ConnectionError) as error:
                return death() or f"no connection to {url}: {error}"
            return death()
        await _cancel(work)
        return watch.result()


async def _rounds(
    http: aiohttp.ClientSession,
    plan: Plan,
    url: str,
    first_round: int,
    log: _Log,
    on_done: Callable[[], None],
) -> None:
    target = Target(
        url=url,
        model=await _model_name(http, url, plan.model),
        max_tokens=plan.max_tokens,
        timeout_s=plan.request_timeout_s,
    )

    async def run(requests: Sequence[Request], round_: int, keep: bool) -> None:
        def done(outcome: Outcome) -> None:
            if keep:
                log.outcomes.append(outcome)
            on_done()

        await send_all(
            http, target, requests, round_=round_, concurrency=plan.concurrency, on_done=done
        )

    await run(warmup_of(plan.requests, plan.num_warmup), -1, keep=False)
    async with _following(http, url, log):
        for round_ in range(first_round, first_round + plan.rounds):
            start_s = time.monotonic()
            await run(plan.requests, round_, keep=True)
            log.rounds.append(RoundTime(round=round_, wall_s=time.monotonic() - start_s))


@contextlib.asynccontextmanager
async def _following(http: aiohttp.ClientSession, url: str, log: _Log) -> AsyncIterator[None]:
    try:
        first = await read_status(http, url)
    except StatusError as error:
        log.status_error = str(error)
        first = None
    if first is None:
        yield
        return
    log.follower = Follower(first)
    polling = asyncio.create_task(log.follower.poll(http, url))
    try:
        yield
        await log.follower.read(http, url)
    finally:
        await _cancel(polling)


async def _watch(death: Callable[[], str]) -> str:
    while not (reason := death()):
        await asyncio.sleep(WATCH_S)
    return reason


async def _cancel(task: asyncio.Task[object]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _model_name(http: aiohttp.ClientSession, url: str, default: str) -> str:
    async with http.get(f"{url}/v1/models") as answer:
        if answer.status != 200:
            return default
        models = msgspec.json.decode(await answer.read()).get("data", ())
    return str(models[0]["id"]) if models else default


def _mark_missing(plan: Plan, log: _Log, first_round: int, reason: str) -> None:
    done = {(outcome.round, outcome.request_id) for outcome in log.outcomes}
    now_s = time.monotonic()
    for round_ in range(first_round, first_round + plan.rounds):
        log.outcomes += [
            failed(request, round_, now_s, reason)
            for request in plan.requests
            if (round_, request.request_id) not in done
        ]
