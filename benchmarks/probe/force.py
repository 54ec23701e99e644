"""Ask a server the answers of a suite's items by teacher forcing: the answer lies in the prompt.

Every token is then prefilled and none decoded, so what a lever does to prefill is all there is; in
serving, the tokens of an answer are decoded and left alone. An item is right if the likeliest token
is the right one at every place of the answer, its end included.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import aiohttp

from benchmarks.probe.encode import IM_END, text_ids
from benchmarks.probe.item import Item, num_prompt_tokens
from benchmarks.probe.result import Graded
from benchmarks.probe.suite import ProbeError, Suite, digest, png_url
from benchmarks.probe.tasks import TASKS

IMAGE_MARKS = "<|vision_start|><|image_pad|><|vision_end|>"


async def ask_forced(url: str, suite: Suite, *, concurrency: int, timeout_s: float) -> list[Graded]:
    """Every item of `suite`, in order. Raises `ProbeError` where the server refuses one."""
    turn = asyncio.Semaphore(concurrency)
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(timeout=timeout) as http:

        async def one(place: int) -> Graded:
            async with turn:
                return await _ask(http, url, suite[place])

        return list(await asyncio.gather(*(one(place) for place in range(len(suite)))))


async def _ask(http: aiohttp.ClientSession, url: str, item: Item) -> Graded:
    start_s = time.monotonic()
    async with http.post(f"{url}/generate", json=body_of(item)) as response:
        answer = await response.json()
        if response.status != 200:
            raise ProbeError(f"{url}/generate: {response.status}, {answer}")
    return graded(item, answer["meta_info"], (time.monotonic() - start_s) * 1e3)


def body_of(item: Item) -> dict[str, Any]:
    """The request: the chat template's text with the answer, closed, at its end."""
    parts = [part if isinstance(part, str) else IMAGE_MARKS for part in item.parts]
    images = [png_url(part) for part in item.parts if not isinstance(part, str)]
    text = f"<|im_start|>user\n{''.join(parts)}<|im_end|>\n<|im_start|>assistant\n"
    body: dict[str, Any] = {
        "text": f"{text}{item.answer}<|im_end|>",
        "sampling_params": {"temperature": 0, "max_new_tokens": 1},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 1,
    }
    return body | ({"image_data": images} if images else {})


def graded(item: Item, told: dict[str, Any], latency_ms: float) -> Graded:
    """From a server's log-probabilities of the prompt.

    `token_ids` and `logprobs` are those of the right answer, whatever is likelier. Raises
    `ProbeError` where the prompt does not end with the answer.
    """
    right = (*text_ids(item.answer).tolist(), IM_END)
    logprobs, ids, _ = zip(*told["input_token_logprobs"][-len(right) :], strict=True)
    if ids != right:
        raise ProbeError(f"item {item.index} of {item.task}: the server reads {ids}, not {right}")
    likeliest = tuple(top[0][1] for top in told["input_top_logprobs"][-len(right) :])
    return Graded(
        task=item.task,
        modality=TASKS[item.task].modality,
        index=item.index,
        digest=digest(item),
        answer=item.answer,
        text="",
        is_correct=likeliest == right,
        num_prompt_tokens=num_prompt_tokens(item.parts) + len(right),
        latency_ms=latency_ms,
        token_ids=right,
        token_texts=(None,) * len(right),
        logprobs=logprobs,
    )
