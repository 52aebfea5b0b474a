"""What comes is what was asked for, or it is said."""

from __future__ import annotations

import asyncio
import base64
import io
import json

import pytest
from loads import answered, image_ask, text_ask
from PIL import Image

from loadtest.measure.checks import Report, check_counts, check_images, check_texts
from loadtest.measure.driver import Ending, Run
from loadtest.measure.outcome import Outcome
from loadtest.measure.verdict import verdict
from loadtest.targets.target import Failed, Spool


def png(size: tuple[int, int] = (8, 8), *, corner: int = 255, is_blank: bool = False) -> bytes:
    image = Image.new("RGB", size, (9, 9, 9))
    if not is_blank:
        image.putpixel((0, 0), (corner, 0, 0))
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def seen(*answers: tuple[dict[str, int], bytes]) -> tuple[list[Outcome], Report]:
    """Image requests with these fields that were answered with these files, checked."""
    spool, outcomes, report = Spool(), [], Report()
    for fields, data in answers:
        body = {"data": [{"b64_json": base64.b64encode(data).decode()}], "num_inference_steps": 7}
        outcomes.append(answered(0.0, [], 1.0, image_ask(**fields), pictures=[spool.put(json.dumps(body).encode())]))
    check_images(outcomes, report, spool)
    return outcomes, report


def test_a_good_image_has_its_size_and_steps_noted_and_no_flaw():
    [one], report = seen(({}, png()))
    assert (one.flaw, one.size, one.num_steps, len(one.pictures)) == ("", (8, 8), 7, 1)
    assert (report.images, report.num_wrong) == (1, 0)


@pytest.mark.parametrize(
    ("data", "flaw", "count"),
    [
        (b"no picture", "cannot be decoded", "undecodable"),
        (png()[:60], "cannot be decoded", "undecodable"),
        (png((8, 4)), "8x4 where 8x8", "wrong_size"),
        (png(is_blank=True), "blank", "blank"),
    ],
)
def test_what_is_wrong_with_an_image_is_said(data, flaw, count):
    [one], report = seen(({}, data))
    assert flaw in one.flaw and getattr(report, count) == 1 and report.num_wrong == 1


def test_the_same_request_gives_the_same_picture():
    _, report = seen(({"seed": 1}, png()), ({"seed": 2}, png(corner=7)), ({"seed": 1}, png()))
    assert (report.repeated, report.different_hash, report.num_wrong) == (1, 0, 0)
    outcomes, report = seen(({"seed": 1}, png()), ({"seed": 1}, png(corner=200)))
    assert (report.different_hash, report.largest_difference, report.num_wrong) == (1, 55, 1)
    assert "another image" in outcomes[1].flaw


def test_the_last_bit_of_a_float_may_move_a_pixel_by_a_level_and_is_told():
    _, report = seen(({"seed": 1}, png()), ({"seed": 1}, png(corner=254)))
    assert (report.different_hash, report.largest_difference, report.num_wrong) == (1, 1, 0)


def test_events_and_plain_files_are_pictures_too():
    spool, report = Spool(), Report()
    event = json.dumps({"type": "image_generation.completed", "b64_json": base64.b64encode(png()).decode()})
    places = [spool.put(event.encode()), spool.put(png())]
    one = answered(0.0, [], 1.0, image_ask(), pictures=places)
    check_images([one], report, spool)
    assert report.images == 2 and not one.flaw


def test_an_answer_without_an_image_is_flawed():
    spool = Spool()
    one = answered(0.0, [], 1.0, image_ask(), pictures=[spool.put(b'{"data": [{"url": "http://x"}]}')])
    check_images([one], (report := Report()), spool)
    assert one.flaw and "URLs" in report.notes[0]


def test_lengths_are_exact_where_the_end_token_is_ignored_and_a_limit_elsewhere():
    def flaws(is_eos_ignored: bool) -> list[bool]:
        ones = [answered(0.0, [0.1], 1.0, text_ask(num_output=4), tokens=(10, number)) for number in (3, 4, 5)]
        check_texts(ones, Report(), is_eos_ignored=is_eos_ignored)
        return [bool(one.flaw) for one in ones]

    assert flaws(True) == [True, False, True] and flaws(False) == [False, False, True]


def test_counts_of_a_server_are_compared_with_a_tokenizer():
    async def count(text: str) -> int:
        return len(text.split())

    async def scenario() -> Report:
        ones = [answered(0.0, [0.1], 1.0, text_ask(prompt="a b c d"), tokens=(5, 2), text=["x ", "y z"])] * 3
        await check_counts(ones, report := Report(), count, count)
        return report

    report = asyncio.run(scenario())
    assert (report.counted, report.prompt_tokens_off, report.output_tokens_off) == (3, 0.2, 0.5)


def test_a_server_that_does_not_count_is_noted():
    async def count(text: str) -> int:
        raise Failed("/tokenize: 404")

    report = Report()
    asyncio.run(check_counts([answered(0.0, [0.1], 1.0)], report, count, count))
    assert report.counted == 0 and "404" in report.notes[0]


@pytest.mark.parametrize(
    ("change", "status", "name"),
    [
        ({}, 0, "ok"),
        ({"ending": Ending.LOST, "last_error": "connect: refused"}, 3, "server_lost"),
        ({"ending": Ending.INTERRUPTED}, 130, "interrupted"),
        ({"outcomes": []}, 1, "nothing_measured"),
        ({"client_cores": 0.9}, 0, "slow_client"),
    ],
)
def test_verdicts_have_a_status_each(change, status, name):
    run = Run(0.0, outcomes=[answered(0.0, [0.1], 1.0)])
    for field, value in change.items():
        setattr(run, field, value)
    found = verdict(run, Report(), 1.0, None, True)
    assert (found.status, found.name) == (status, name) and found.reason


def test_wrong_answers_and_missed_objectives_are_verdicts_too():
    run = Run(0.0, outcomes=[answered(0.0, [0.1], 1.0)])
    assert verdict(run, Report(blank=1), 1.0, None, True).status == 4
    assert verdict(run, Report(), 0.98, 0.99, True).status == 5
    assert verdict(run, Report(), 1.0, None, False).status == 3
