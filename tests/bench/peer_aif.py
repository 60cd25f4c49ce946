"""aif: every answer through the judge's client into the journal, durable at the end."""

from __future__ import annotations

import sys
from pathlib import Path

from peer_clock import MAX_TOKENS, MODEL, measure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from aif.config import LLMSettings
from aif.journal import Journal
from aif.llm import Ask
from aif.llm.api import ApiLLM
from aif.records import content_id


def run_aif(
    conversations: list[list[dict[str, str]]], base_url: str, in_flight: int, folder: str
) -> list[str | None]:
    settings = LLMSettings(model=f"openai:{MODEL}", base_url=base_url, concurrency=in_flight)
    asks = (
        Ask(content_id(messages), messages=messages, max_tokens=MAX_TOKENS)
        for messages in conversations
    )
    texts: dict[str, str | None] = {}
    with ApiLLM(settings, MODEL) as llm, Journal.open(Path(folder) / "journal.jsonl") as journal:
        for answer in llm.answer(asks):
            text = answer.texts[0] if answer.texts else None
            journal.append(
                {"id": answer.key, "fault": answer.fault, "text": text, "usage": answer.usage}
            )
            texts[answer.key] = text
        journal.commit()
    return list(texts.values())


if __name__ == "__main__":
    measure(run_aif)
