"""A whole loop of `openai-agents`: the model calls a function, reads its result, and answers."""

from __future__ import annotations

import asyncio
from typing import Literal

import pytest
from serving import quick_generator as tiny_generator  # noqa: F401
from serving import running

from qwen3fast.server.options import ServerOptions

agents = pytest.importorskip("agents")
openai = pytest.importorskip("openai")
pytest.importorskip("llguidance")


@pytest.fixture
def strict_address(tiny_generator):  # noqa: F811
    """Return the address of a server that refuses unknown fields, also in items that clients send back."""
    with running({"tiny": tiny_generator}, ServerOptions(strict=True)) as url:
        yield url


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_an_agent_calls_its_tool_and_answers(strict_address, api):
    called = []

    @agents.function_tool
    def weather(days: Literal[1, 2]) -> str:
        """Return the weather."""
        called.append(days)
        return "sunny"

    async def run() -> str:
        async with openai.AsyncOpenAI(base_url=f"{strict_address}/v1", api_key="none") as client:
            kinds = {"chat": agents.OpenAIChatCompletionsModel, "responses": agents.OpenAIResponsesModel}
            settings = agents.ModelSettings(
                tool_choice="required", temperature=0, max_tokens=60, reasoning={"effort": "none"}
            )
            model = kinds[api](model="tiny", openai_client=client)
            agent = agents.Agent(name="a", model=model, tools=[weather], model_settings=settings)
            result = await agents.Runner.run(agent, "How warm is it?", max_turns=4)
            return result.final_output

    agents.set_tracing_disabled(True)
    answer = asyncio.run(run())
    assert len(called) == 1 and called[0] in (1, 2)
    assert isinstance(answer, str)
