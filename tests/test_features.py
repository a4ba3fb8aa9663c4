"""The README's table of features says nothing that is not tested: beside each row stand the tests that hold it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ROWS = {
    "one port": (
        "test_gateway.py::test_the_events_of_a_stream",
        "test_protocol.py::test_sessions_are_shared_with_http",
        "interop/test_openai.py::test_a_whole_answer",
        "interop/test_websocket.py::test_a_conversation",
    ),
    "agents, sessions": (
        "test_brands.py::test_models",
        "test_brands.py::test_headers",
        "test_brands.py::test_session_keys",
        "test_brands.py::test_the_pages_curl",
        "test_chat_completions.py::test_session",
    ),
    "credentials": ("test_errors.py::test_credentials", "test_protocol.py::test_refused"),
    "too many wrong ones": ("test_errors.py::test_lockout", "test_protocol.py::test_too_many_failures"),
    "the conversation": ("test_gateway.py::test_what_the_upstream_is_asked", "test_chat_completions.py::test_messages"),
    "`usage`": (
        "test_errors.py::test_upstream_that_answers_in_its_own_way",
        "interop/test_openai.py::test_a_stream_with_its_usage",
    ),
    "images": (
        "test_config.py::test_images",
        "interop/test_openai_tools.py::test_images",
        "interop/test_another_upstream.py::test_images",
    ),
    "the client's tools": (
        "interop/test_openai_tools.py::test_a_round_trip",
        "interop/test_openai_tools.py::test_a_streamed_round_trip_in_a_session",
        "interop/test_another_upstream.py::test_a_round_trip_of_tools",
    ),
    "agents of your own": (
        "test_python_agents.py::test_an_agent_of_every_shape",
        "test_commands.py::test_text",
        "interop/test_another_upstream.py::test_a_round_trip_of_tools",
        "test_model_server.py::test_what_was_not_taken_is_asked_again",
        "test_gateway.py::test_fallbacks",
    ),
    "friends": (
        "test_friends.py::test_http_reaches_its_own_agents_alone",
        "test_friends.py::test_websocket_sees_and_reaches_its_own_alone",
        "test_friends.py::test_rate_limit",
        "test_friends.py::test_expiry",
        "test_friends.py::test_a_reload_revokes_at_once",
    ),
    "what was answered": (
        "test_program.py::test_kill_loses_nothing_that_was_answered",
        "test_sessions.py::test_an_acknowledged_turn_is_there_after_kill_9_and_none_half",
    ),
    "a client that leaves": (
        "test_leaving.py::test_leaving",
        "test_commands.py::test_a_cancel_ends_the_whole_group_within_100_ms",
    ),
    "failures": (
        "test_errors.py::test_upstream",
        "test_errors.py::test_bodies",
        "interop/test_openai.py::test_a_failure_before_the_first_word_is_a_status",
    ),
    "`GET /v1/models`": ("test_gateway.py::test_models", "interop/test_openai.py::test_the_models"),
}


def test_each_row_of_the_table_has_its_tests() -> None:
    readme = (TESTS.parent / "README.md").read_text(encoding="utf-8")
    (section,) = (text for text in readme.split("\n## ") if text.startswith("What it does\n"))
    _, _, *rows = (line for line in section.splitlines() if line.startswith("|"))
    assert [row.split("|")[1].strip() for row in rows] == list(ROWS)


@pytest.mark.parametrize("name", sorted({name for names in ROWS.values() for name in names}))
def test_there_is_such_a_test(name: str) -> None:
    file, _, function = name.partition("::")
    module = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    assert function in {node.name for node in module.body if isinstance(node, ast.FunctionDef)}
