"""The teacher's client against a real server that misbehaves."""

import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from stub_teacher import StubTeacher, completion, send

from storm_vlm.construction.config import BuildConfig, TeacherConfig
from storm_vlm.construction.prompts import Keyframes, ReasoningPlan, VideoPrompt
from storm_vlm.construction.teacher import BudgetReached, TeacherClient
from storm_vlm.data.store import Store
from storm_vlm.errors import StormError
from storm_vlm.inference.client import EndpointError, UnansweredError

MESSAGES = [{"role": "user", "content": "which frames?"}]
GOOD = '{"selected": [3, 1]}'
Fault = Callable[[BaseHTTPRequestHandler], None]


class BadTeacher(StubTeacher):
    """Does what it is told, request by request: answer with a text, or misbehave; the last goes on for ever."""

    def __init__(self, *script: str | Fault) -> None:
        super().__init__()
        self.script = list(script)
        self.lock = threading.Lock()

    def respond(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        with self.lock:
            act = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        send(handler, 200, completion(act)) if isinstance(act, str) else act(handler)


def status(code: int, error: str = "", **headers: str) -> Fault:
    return lambda handler: send(handler, code, {"error": {"code": error}}, **headers)


def refusal(handler: BaseHTTPRequestHandler) -> None:
    send(handler, 200, completion(None, refusal="I will not."))


def reset(handler: BaseHTTPRequestHandler) -> None:
    """Close with a TCP reset."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def cut_off(handler: BaseHTTPRequestHandler) -> None:
    """Half of a response that promised more."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"id": "x", "choi')
    handler.close_connection = True


def truncated(handler: BaseHTTPRequestHandler) -> None:
    """A whole response that is half a JSON."""
    handler.send_response(200)
    handler.send_header("Content-Length", "17")
    handler.end_headers()
    handler.wfile.write(b'{"id": "x", "choi')


def slow(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(3)
    send(handler, 200, completion(GOOD))


def make(server: StubTeacher, folder: Path, **options: Any) -> TeacherClient:
    config = {"model": "m", "base_url": server.url, "timeout": 20, "retries": 2, **options}
    return TeacherClient(TeacherConfig.model_validate(config), Store(folder))


def ask(teacher: TeacherClient, messages: list[dict[str, Any]] = MESSAGES) -> Any:
    return teacher.ask(messages, Keyframes, candidates=8, most=4)


@pytest.mark.parametrize(
    "fault", [status(500), status(429, Retry_After="0.05"), reset, cut_off, truncated, slow]
)
def test_one_mishap_is_retried_and_one_answer_is_stored(fault: Fault, tmp_path: Path) -> None:
    with BadTeacher(fault, GOOD) as server:
        teacher = make(server, tmp_path, timeout=1.5 if fault is slow else 20)
        asked = ask(teacher)
        assert (asked.value.selected, asked.status) == ([1, 3], "ok")
        assert len(server.calls) == 2
        assert ask(teacher) == asked and len(server.calls) == 2  # from the store
        assert teacher.spent.totals(teacher.config)["calls"] == 1


def test_retry_after_is_obeyed(tmp_path: Path) -> None:
    with BadTeacher(status(429, Retry_After="1.2"), GOOD) as server:
        ask(make(server, tmp_path))
        first, second = server.calls
        assert second.began - first.began >= 1.2  # the client's own first backoff is at most 0.5 s


@pytest.mark.parametrize("fault", [status(500), status(429, Retry_After="0.01"), reset, truncated])
def test_lasting_trouble_leaves_the_row_for_later(fault: Fault, tmp_path: Path) -> None:
    with BadTeacher(fault) as server:
        with pytest.raises(UnansweredError):
            ask(make(server, tmp_path, retries=1))
        assert not list(Store(tmp_path).files("teacher"))
        server.script = [GOOD]
        assert ask(make(server, tmp_path)).status == "ok"


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ('{"selected": [8]}', "indices go from 0 to 7"),
        ('{"selected": [1, 1]}', "each frame once"),
        ('{"selected": []}', "select 1 to 4 frames"),
        ('{"selected": [0, 1, 2, 3, 4]}', "select 1 to 4 frames"),
        ('{"selected": [1, ', "Invalid JSON"),
        ("", "Invalid JSON"),
        ('{"frames": [1]}', "Field required"),
    ],
)
def test_an_answer_that_cannot_be_used_is_repaired(bad: str, told: str, tmp_path: Path) -> None:
    with BadTeacher(bad, GOOD) as server:
        asked = ask(make(server, tmp_path))
        assert (asked.value.selected, asked.status, len(asked.keys)) == ([1, 3], "repaired", 2)
        assert told in server.calls[1].body["messages"][-1]["content"]
        assert server.calls[1].body["messages"][-2] == {"role": "assistant", "content": bad}


def test_repairs_end_and_the_next_run_asks_anew(tmp_path: Path) -> None:
    """A teacher that was badly set up may have been mended; what it wrote before is told, and counts as paid."""
    with BadTeacher('{"selected": [9]}') as server:
        first = make(server, tmp_path, repairs=2)
        asked = ask(first)
        assert (asked.value, asked.status, len(asked.keys)) == (None, "invalid", 3)
        assert first.spent.totals(first.config)["calls"] == 3
        assert "no [9]" in asked.detail and '{"selected": [9]}' in asked.detail
        server.script = [GOOD]
        teacher = make(server, tmp_path, repairs=2)
        assert ask(teacher).status == "ok" and len(server.calls) == 4
        assert teacher.spent.totals(teacher.config)["calls"] == 4
        assert make(server, tmp_path).spent.totals(teacher.config)["calls"] == 4
        assert {p.stem for p in Store(tmp_path).files("teacher")} > set(asked.keys)


def test_a_refusal_is_not_argued_with(tmp_path: Path) -> None:
    with BadTeacher(refusal) as server:
        assert ask(make(server, tmp_path)).status == "refused"
        assert len(server.calls) == 1
        server.script = [status(400, "content_policy_violation")]
        other = [{"role": "user", "content": "other frames?"}]
        assert ask(make(server, tmp_path), other).status == "refused"


def test_a_wrong_key_stops_everything(tmp_path: Path) -> None:
    with BadTeacher(status(401)) as server, pytest.raises(StormError, match="refuses the request"):
        ask(make(server, tmp_path))


@pytest.mark.parametrize(
    ("code", "error"),
    [(429, "insufficient_quota"), (429, "billing_hard_limit"), (400, "Arrearage")],
)
def test_an_empty_account_is_no_rate_limit(code: int, error: str, tmp_path: Path) -> None:
    with BadTeacher(status(code, error, Retry_After="0.01")) as server:
        with pytest.raises(EndpointError, match=f"wants money.*{error}.*mend the account"):
            ask(make(server, tmp_path))
        server.script = [status(429, "rate_limit_exceeded", Retry_After="0.01"), GOOD]
        assert ask(make(server, tmp_path)).status == "ok"


def test_no_key_is_needed_but_for_the_default_endpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(StormError, match="set OPENAI_API_KEY"):
        ask(TeacherClient(TeacherConfig.model_validate({"model": "m"}), Store(tmp_path)))


def test_the_cost_is_told_and_bounded_over_runs(tmp_path: Path) -> None:
    prices = {"price_in": 2.0, "price_out": 10.0}  # 1,000 and 100 tokens: 0.003 a call
    with BadTeacher(GOOD) as server:
        for number in range(3):
            teacher = make(server, tmp_path, max_cost=0.005, **prices)
            messages = [{"role": "user", "content": str(number)}]
            if number < 2:
                ask(teacher, messages)
            else:
                with pytest.raises(BudgetReached):
                    ask(teacher, messages)
                ask(teacher, [{"role": "user", "content": "0"}])  # stored ones cost nothing
        totals = teacher.spent.totals(teacher.config)
        assert totals == {
            "calls": 2,
            "prompt_tokens": 2000,
            "completion_tokens": 200,
            "cost": 0.006,
        }
    with pytest.raises(ValueError, match="needs prices"):
        BuildConfig.model_validate({"teacher": {"model": "m", "max_cost": 1}})


def test_the_response_is_safe_before_it_is_used(tmp_path: Path) -> None:
    """Whatever becomes of the conversation after the last byte came in, the answer is not asked for again."""
    with BadTeacher('{"selected": "nonsense"}', status(500)) as server:
        with pytest.raises(UnansweredError):
            ask(make(server, tmp_path, retries=0))
        (path,) = Store(tmp_path).files("teacher")
        assert path.stem == server.calls[0].key
        assert json.loads(path.read_bytes()) == completion('{"selected": "nonsense"}')
        server.script = [GOOD]
        assert ask(make(server, tmp_path)).status == "repaired" and len(server.calls) == 3


def answer(content: Any, reason: str = "stop", **message: Any) -> Fault:
    """A chat completion of that content."""
    whole = completion("")
    whole["choices"][0]["message"] |= {"content": content, **message}
    whole["choices"][0]["finish_reason"] = reason
    return lambda handler: send(handler, 200, whole)


def without(**fields: Any) -> Fault:
    return lambda handler: send(handler, 200, {**completion(GOOD), **fields})


@pytest.mark.parametrize(
    "act",
    [
        answer(f'<think>{{"selected": [0]}} or maybe {{1, 2}}?</think>\n{GOOD}'),
        answer(f"The set {{a, b}}.\n```json\n{GOOD}\n```\nI left out {{c, d}}."),
        answer('{"reason": "it\nfalls", "selected": [3, 1]}'),
        answer([{"type": "thinking", "thinking": "{}"}, {"type": "text", "text": GOOD}]),
        answer('{"name": "answer", "arguments": {"selected": ["3", "1"]}}'),
        without(usage=None),
        without(usage={"prompt_tokens": None, "completion_tokens": None}),
    ],
)
def test_answers_as_real_models_write_them_are_read(act: Fault, tmp_path: Path) -> None:
    with BadTeacher(act) as server:
        asked = ask(make(server, tmp_path))
        assert (asked.value.selected, asked.status) == ([1, 3], "ok") and len(server.calls) == 1


@pytest.mark.parametrize(
    ("act", "reason", "detail"),
    [
        (answer(None, reasoning_content=f"I say {GOOD}"), "invalid", "reasoning_content.*I say"),
        (answer(GOOD[:9], "length"), "invalid", r"cut off at max_tokens=1024.*\{\"selecte"),
        (answer("", "content_filter"), "refused", "filtered"),
        (status(400, "data_inspection_failed"), "refused", "data_inspection_failed"),
        (status(400, "context_length_exceeded"), "refused", "context_length_exceeded"),
        (status(403, "moderation_blocked"), "refused", "moderation_blocked"),
        (status(413), "refused", "413"),
        (status(422), "refused", "422"),
    ],
)
def test_one_request_s_fate_is_told_and_not_final(
    act: Fault, reason: str, detail: str, tmp_path: Path
) -> None:
    with BadTeacher(act) as server:
        asked = ask(make(server, tmp_path))
        assert (asked.value, asked.status) == (None, reason)
        assert re.search(detail, asked.detail), asked.detail
        server.script = [GOOD]
        assert ask(make(server, tmp_path)).status == "ok"


@pytest.mark.parametrize("act", [without(choices=None), without(choices=[]), answer(None)])
def test_a_response_is_read_before_it_is_stored(act: Fault, tmp_path: Path) -> None:
    with BadTeacher(act, GOOD) as server:
        assert ask(make(server, tmp_path)).value.selected == [1, 3]
        assert len(server.calls) == 2


class Strict(StubTeacher):
    """Takes neither max_tokens, nor a temperature, nor a schema, as o-series models do."""

    def respond(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        mends = {
            "max_tokens": "use max_completion_tokens",
            "temperature": "",
            "response_format": "",
        }
        for name, mend in mends.items():
            if name in body:
                error = {"message": f"Unsupported parameter: '{name}' is not supported; {mend}"}
                send(handler, 400, {"error": error})
                return
        send(handler, 200, completion(GOOD))


def test_settings_that_a_model_refuses_are_left_out_from_then_on(tmp_path: Path) -> None:
    with Strict() as server:
        teacher = make(server, tmp_path)
        assert ask(teacher).status == "ok" and len(server.calls) == 4
        assert ask(teacher, [{"role": "user", "content": "others?"}]).status == "ok"
        assert len(server.calls) == 5
        assert server.calls[-1].body["max_completion_tokens"] == teacher.config.max_tokens


def test_a_limit_of_nothing_is_no_missing_limit() -> None:
    with pytest.raises(ValueError, match="max_cost"):
        TeacherConfig.model_validate({"max_cost": 0})


def test_many_threads_share_one_teacher(tmp_path: Path) -> None:
    with BadTeacher(GOOD) as server:
        server.latency = 0.5  # long enough for eight threads to start on a busy machine
        teacher = make(server, tmp_path)
        each = [[{"role": "user", "content": str(i)}] for i in range(16)]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda messages: ask(teacher, messages), each))
        assert all(asked.status == "ok" for asked in found) and len(server.calls) == 16
        began = sorted(call.began for call in server.calls)
        assert began[7] < min(call.sent or 0 for call in server.calls)  # eight under way at once


def test_what_a_video_prompt_may_say() -> None:
    def valid(text: str) -> bool:
        try:
            return bool(VideoPrompt.model_validate({"prompt": text}))
        except ValueError:
            return False

    assert valid("word " * 90)
    assert not valid("word " * 30) and not valid("word " * 200)
    assert not valid("word " * 45 + "\n" + "word " * 45)
    for letter in ("Option B", "(C)", "the answer is A", "so B. is it"):
        assert not valid("word " * 90 + letter + " ends")
    assert valid("word " * 90 + "A man walks; I see vitamin pills.")
    with pytest.raises(ValueError, match="words"):
        ReasoningPlan.model_validate({"plan": "no"})
