"""The `openai` package as a competent user would write it: aiohttp below, a semaphore, gather."""

from __future__ import annotations

import asyncio

import openai
from peer_clock import MAX_TOKENS, MODEL, measure


async def ask_all(
    conversations: list[list[dict[str, str]]], base_url: str, in_flight: int
) -> list[str | None]:
    places = asyncio.Semaphore(in_flight)
    async with openai.AsyncOpenAI(
        base_url=base_url, api_key="none", http_client=openai.DefaultAioHttpClient()
    ) as client:

        async def one(messages: list[dict[str, str]]) -> str | None:
            async with places:
                answer = await client.chat.completions.create(
                    model=MODEL, messages=messages, max_tokens=MAX_TOKENS, temperature=0.0
                )
            return answer.choices[0].message.content

        return await asyncio.gather(*map(one, conversations))


def run_bare(
    conversations: list[list[dict[str, str]]], base_url: str, in_flight: int, folder: str
) -> list[str | None]:
    return asyncio.run(ask_all(conversations, base_url, in_flight))


if __name__ == "__main__":
    measure(run_bare)
