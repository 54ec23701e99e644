from __future__ import annotations

import base64
import io
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from sglang_moelb.ab.images import check_image, fit, png_uri, real_images
from sglang_moelb.ab.types import AbError
from sglang_moelb.ab.workload import demo_workload, warmup_of
from sglang_moelb.ab.workload_file import file_workload


def image_sizes(request_messages: tuple[dict[str, object], ...]) -> list[tuple[int, int]]:
    sizes = []
    for message in request_messages:
        content = message["content"]
        for part in content if isinstance(content, list) else []:
            if part["type"] == "image_url":
                payload = part["image_url"]["url"].partition(",")[2]
                with Image.open(io.BytesIO(base64.b64decode(payload))) as image:
                    sizes.append(image.size)
    return sizes


def write_lines(folder: Path, *values: object) -> Path:
    path = folder / "work.jsonl"
    path.write_text("\n".join(v if isinstance(v, str) else json.dumps(v) for v in values))
    return path


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def show(url: str) -> list[dict[str, object]]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


def test_equal_seeds_give_equal_workloads_and_others_do_not() -> None:
    assert demo_workload(20, seed=5) == demo_workload(20, seed=5)
    assert demo_workload(20, seed=5) != demo_workload(20, seed=6)


def test_of_ten_requests_eight_have_images_and_three_of_those_have_several() -> None:
    requests = demo_workload(40, seed=1)
    assert Counter(request.kind for request in requests) == {"image": 32, "text": 8}
    assert sum(request.num_images > 1 for request in requests) == 12
    for request in requests:
        assert len(image_sizes(request.messages)) == request.num_images


def test_no_image_is_larger_than_the_side_and_sizes_vary() -> None:
    sizes = [size for r in demo_workload(40, seed=1) for size in image_sizes(r.messages)]
    assert max(max(size) for size in sizes) <= 448
    assert len({max(size) for size in sizes}) == 4


def test_texts_have_several_lengths() -> None:
    lengths = {r.num_chars for r in demo_workload(40, seed=1) if r.kind == "text"}
    assert min(lengths) < 60
    assert max(lengths) > 400


def test_the_warm_up_meets_image_and_text() -> None:
    requests = demo_workload(30, seed=2)
    for num_warmup in (2, 8):
        warmup = warmup_of(requests, num_warmup)
        assert {request.kind for request in warmup} == {"image", "text"}
        assert len(set(map(id, warmup))) == num_warmup
    assert len(warmup_of(requests, 100)) == 30


def test_fit_keeps_the_proportion() -> None:
    assert fit(real_images()["rocket"], 160).size == (160, 107)


@pytest.mark.parametrize(("count", "side"), [(0, 256), (-1, 256), (5, 31)])
def test_a_count_or_a_side_that_cannot_be_is_refused(count: int, side: int) -> None:
    with pytest.raises(AbError, match=r"--num-requests|--image-side"):
        demo_workload(count, seed=0, image_side_px=side)


def test_a_file_may_hold_lists_and_objects_and_blank_lines(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    path = write_lines(tmp_path, say("one"), "", {"messages": show("a.png")}, say("three"))
    requests = file_workload(path)
    assert [request.kind for request in requests] == ["text", "image", "text"]
    assert requests[1].num_pixels == 200
    assert image_sizes(requests[1].messages) == [(20, 10)]
    assert file_workload(path, 2) == requests[:2]


def test_a_data_uri_is_an_image_and_an_address_is_left_to_the_server(tmp_path: Path) -> None:
    uri = png_uri(Image.new("RGB", (8, 8)))
    requests = file_workload(write_lines(tmp_path, show(uri), show("https://host/a.png")))
    assert requests[0].messages[0]["content"][0]["image_url"]["url"] == uri
    assert requests[1].messages[0]["content"][0]["image_url"]["url"] == "https://host/a.png"


def test_a_request_may_carry_its_answer_and_a_group(tmp_path: Path) -> None:
    judged = {"messages": say("2+2?"), "answer": "4", "group": "sum", "id": "of the user's own"}
    requests = file_workload(
        write_lines(tmp_path, judged, {"messages": say("x"), "answer": "y"}, say("z"))
    )
    assert [(r.answer, r.group) for r in requests] == [("4", "sum"), ("y", ""), (None, "")]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{oops", "not valid JSON"),
        ('"text"', "must be a messages list"),
        ([], "must be a messages list"),
        ({"prompt": "x"}, "must be a messages list"),
        ([{"content": "x"}], '"role"'),
        ([{"role": "robot", "content": "x"}], '"role"'),
        ([{"role": "user", "content": 5}], '"content" must be text'),
        ([{"role": "user", "content": [{"type": "video"}]}], "a part must be"),
        ({"messages": say("x"), "answer": 4}, r'"answer" must be text .* found 4'),
        ({"messages": say("x"), "answer": " "}, '"answer" must be text'),
        ({"messages": say("x"), "answer": "y", "group": 4}, '"group" must be a name'),
        ({"messages": say("x"), "answer": "y", "group": "all"}, '"group" must be a name'),
        ({"messages": say("x"), "group": "a"}, 'a "group" and no "answer"'),
        (say(""), "the prompt is empty"),
        (say(" \n "), "the prompt is empty"),
        (show("missing.png"), r"missing\.png cannot be read"),
        (show("not-an-image.png"), "is not an image that can be decoded"),
        (show("data:image/png;base64,!!!"), "not base64"),
        (show("data:image/png;base64,aGVsbG8="), "is not an image"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, line: object, problem: str) -> None:
    (tmp_path / "not-an-image.png").write_text("hello")
    path = write_lines(tmp_path, say("fine"), line)
    with pytest.raises(AbError, match=problem) as caught:
        file_workload(path)
    assert f"{path} line 2" in str(caught.value)


def test_a_cut_off_image_is_not_an_image() -> None:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, format="PNG")
    with pytest.raises(AbError, match="not an image that can be decoded"):
        check_image(buffer.getvalue()[:-800], "here")


def test_a_file_that_is_missing_or_empty_or_too_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AbError, match="cannot be read"):
        file_workload(tmp_path / "none.jsonl")
    with pytest.raises(AbError, match="has no requests"):
        file_workload(write_lines(tmp_path, "", ""))
    with pytest.raises(AbError, match="has only 1"):
        file_workload(write_lines(tmp_path, say("x")), 2)
