"""`/moelb/status`, `/moelb/config` and the live view on SGLang's own HTTP server."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from sglang_moelb import config as configuration
from sglang_moelb import hot_config
from sglang_moelb.config import Config, ConfigError
from sglang_moelb.ep.live_routes import add_live_routes
from sglang_moelb.hot_config import KNOB_PREFIX

DEAD = (
    "the controller process is dead and the server serves in mode none; nothing was changed. "
    "Restart the server to use a lever again"
)
NO_CONTROLLER = "no rank answers with a controller; see the server's log"


class Routes:
    """The handlers; `tokenizer_manager` is SGLang's way to all schedulers."""

    def __init__(self, tokenizer_manager: Any, config: Config) -> None:
        self._manager = tokenizer_manager
        self._config = hot_config.as_started(config)
        self._one_at_a_time = asyncio.Lock()

    async def status(self) -> dict[str, Any]:
        """The leader's status, with the ranks that answered."""
        states = [s["moelb"] for s in await self._manager.get_internal_state() if "moelb" in s]
        leaders = [s for s in states if s["controller"]["state"] != "off"]
        if not leaders:
            return {"active": False, "reason": NO_CONTROLLER}
        return {**leaders[0], "ranks_answering": len(states)}

    async def change(self, body: bytes) -> tuple[int, dict[str, Any]]:
        """Apply a partial configuration; HTTP status and answer. A bad value changes nothing."""
        async with self._one_at_a_time:  # a change is laid over the one before, not beside it
            return await self._change(body)

    async def _change(self, body: bytes) -> tuple[int, dict[str, Any]]:
        status = await self.status()
        if "config" in status:  # a start may have gone without a lever that was to be ready
            self._config = configuration.parse(status["config"])
        try:
            changes = configuration.decode_object(body, "body of /moelb/config")
            wanted = configuration.merge(self._config, _with_kill_switch(changes))
            hot_config.refuse_change(self._config, wanted)
        except ConfigError as error:
            return 400, {"error": str(error)}
        state = status.get("controller", {}).get("state", "gone")
        if state in ("dead", "gone"):
            return 503, {"error": DEAD}
        numbers = {KNOB_PREFIX + k: v for k, v in hot_config.to_numbers(wanted).items()}
        if not await self._send(numbers):
            return 503, {"error": "not every rank took the change; see the server's log"}
        self._config = wanted
        return 200, {"config": msgspec.to_builtins(wanted)}

    async def _send(self, numbers: dict[str, int | float]) -> bool:
        from sglang.srt.managers.io_struct import SetInternalStateReq

        request = SetInternalStateReq(server_args=numbers)
        return all(await self._manager.set_internal_state(request))


def _with_kill_switch(changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` with `kill` read as mode `none`. Raises `ConfigError` unless it is true."""
    if "kill" not in changes:
        return changes
    others = {k: v for k, v in changes.items() if k != "kill"}
    if changes["kill"] is not True:
        raise ConfigError(f"moelb config: kill is {changes['kill']!r}; use true, or leave it out")
    return {**others, "mode": "none"}


def add_routes(app: Any, tokenizer_manager: Any, config: Config) -> None:
    """Mount the routes; `POST` needs SGLang's admin key where one is set."""
    from fastapi import Request
    from fastapi.responses import JSONResponse
    from sglang.srt.utils.auth import AuthLevel, auth_level

    routes = Routes(tokenizer_manager, config)

    async def get_status() -> JSONResponse:
        return JSONResponse(await routes.status())

    @auth_level(AuthLevel.ADMIN_OPTIONAL)  # type: ignore[untyped-decorator]
    async def post_config(request: Request) -> JSONResponse:
        code, answer = await routes.change(await request.body())
        return JSONResponse(answer, status_code=code)

    # FastAPI reads annotations by name in this module's globals, where Request is not imported.
    post_config.__annotations__ = {"request": Request, "return": None}
    app.add_api_route("/moelb/status", get_status, methods=["GET"], response_model=None)
    app.add_api_route("/moelb/config", post_config, methods=["POST"], response_model=None)
    add_live_routes(app, routes.status)
