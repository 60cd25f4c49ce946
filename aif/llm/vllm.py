"""A language model in this process on vLLM: continuous batches, prefixes that are cached.

    [judge]
    model = "vllm:Qwen/Qwen2.5-7B-Instruct"      # or a folder, or vllm:smollm2-135m

Asks are handed over one by one, never more than `concurrency` at once, and each is answered as soon
as it is done, so that a kill loses those that were under way and no other. What prompts have in
common at their beginning is computed once, as the engine caches it (https://docs.vllm.ai, automatic
prefix caching); our templates put the question last for that.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count
from queue import SimpleQueue
from typing import Any

import torch

from aif.config.settings import LLMSettings
from aif.errors import AifError, InputError, JudgeStopped, shown
from aif.llm import Answer, Ask, ended
from aif.llm.local import LocalLLM, Refused, Row
from aif.llm.option_logprobs import BARE, Tokens, begun, read_options
from aif.models import vllm_engine
from aif.models.load import torch_dtype, usable_device
from aif.store.records import content_id

MOST_IDS = 128  # whose log-probabilities vLLM tells of one token (MAX_LOGPROB_TOKEN_IDS there)


@dataclass(slots=True)
class UnderWay:
    """An ask that the engine has, and what came of its samples so far."""

    row: Row
    outputs: dict[int, Any] = field(default_factory=dict)  # sample -> vllm's CompletionOutput


class VLLM(LocalLLM):
    """`LocalLLM`'s prompts, tokens and options, and vLLM to run them.

    Raises AifError where the engine does not start, and JudgeStopped when it ends, fails or says
    nothing for `timeout_s`.
    """

    def __init__(self, settings: LLMSettings, name: str):
        super().__init__(settings.model_copy(update={"model": name}))
        self._named = settings.model
        if settings.device != "auto":
            raise InputError(
                "device", "", got=shown(settings.device),
                expected="'auto', as vLLM was built for it (CUDA_VISIBLE_DEVICES picks one)",
            )  # fmt: skip
        self._numbers = count()  # an id of its own for every request
        self._thread: EngineThread | None = None

    @cached_property
    def engine(self) -> Any:
        """The `vllm.LLM`; started when first wanted."""
        kind = torch_dtype(self.settings.dtype, usable_device("auto"))
        self._thread = EngineThread()
        return self._thread.run(
            lambda: vllm_engine.start(
                self._named,
                self.settings.model,
                dtype=str(kind).removeprefix("torch."),
                memory=self.settings.vllm_memory,
                # As `head_in_float32`: bfloat16 logits would be multiples of 0.125.
                hf_overrides={"head_dtype": "float32"},
                disable_log_stats=False,
            )
        )

    @property
    def context(self) -> int:
        """The longest prompt plus answer, in tokens; less than the model's where the engine's
        memory is short."""
        started = vars(self).get("engine")
        longest = super().context
        return min(longest, started.model_config.max_model_len) if started else longest

    def answer(self, asks: Iterable[Ask]) -> Iterator[Answer]:
        asks, more = iter(asks), True
        under_way: dict[str, UnderWay] = {}
        while more or under_way:
            fresh: dict[str, UnderWay] = {}
            while more and len(under_way) + len(fresh) < self.settings.concurrency:
                ask = next(asks, None)
                more = ask is not None
                if ask is None:
                    break
                _ = self.engine  # whose context it has to fit
                try:
                    fresh[str(next(self._numbers))] = UnderWay(Row(ask, self._tokens(ask)))
                except Refused as refused:
                    fault, detail = refused.args
                    yield Answer(ask.key, fault=fault, detail=detail)
            under_way |= fresh
            if under_way:
                yield from self._turn(fresh, under_way)

    def _turn(self, fresh: dict[str, UnderWay], under_way: dict[str, UnderWay]) -> Iterator[Answer]:
        """Hand the fresh asks over, let the engine make a step, answer what that completes."""
        try:
            refused, outputs = self._thread.run(lambda: self._step(fresh), self.settings.timeout_s)
        except Silent:
            raise JudgeStopped(
                f"{self._named}: the engine has said nothing for {self.settings.timeout_s:g} s "
                "(judge.timeout_s); the same command resumes"
            ) from None
        except AifError:  # a signal's, while this waited
            raise
        except Exception as error:
            said = shown(" ".join(str(error).split()) or type(error).__name__, 200)
            raise JudgeStopped(
                f"{self._named}: the engine failed ({said}); the same command resumes"
            ) from error
        for number, why in refused.items():
            ask = under_way.pop(number).row.ask
            yield Answer(ask.key, fault="rejected", detail=why)
        for output in outputs:
            number, _, sample = output.request_id.partition("-")
            found = under_way.get(number)
            if found is None:  # of an earlier `answer` that was ended before its time
                continue
            found.outputs[int(sample)] = output.outputs[0]
            if len(found.outputs) == _samples(found.row.ask):
                del under_way[number]
                yield self._answered(found)

    def _step(self, fresh: dict[str, UnderWay]) -> tuple[dict[str, str], list[Any]]:
        """In the engine's thread: (why it refuses an ask, by number; the outputs that are done)."""
        from vllm.exceptions import VLLMClientError

        engine, refused = self.engine.llm_engine, {}
        for number, one in fresh.items():
            prompt = {"prompt_token_ids": list(one.row.ids)}
            try:
                for sample in range(_samples(one.row.ask)):
                    params = self._params(one.row.ask, sample)
                    engine.add_request(f"{number}-{sample}", prompt, params)
            except (ValueError, VLLMClientError) as error:  # as a temperature over 2
                refused[number] = shown(" ".join(str(error).split()), 200)
        outputs = engine.step() if engine.has_unfinished_requests() else []
        return refused, [output for output in outputs if output.finished]

    def _params(self, ask: Ask, sample: int) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

        seed = content_id("draw", ask.key if ask.seed is None else ask.seed, sample)
        return SamplingParams(
            temperature=0.0 if _reads_one_token(ask) else ask.temperature,
            max_tokens=ask.max_tokens,
            seed=int(seed[:15], 16),
            stop=[stop for stop in ask.stop if stop],
            # The log-probabilities of just these, whatever is likelier, over the whole vocabulary.
            logprob_token_ids=self._read_ids(ask) if ask.options else None,
            structured_outputs=StructuredOutputsParams(json=ask.schema) if ask.schema else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _read_ids(self, ask: Ask) -> list[int]:
        """The tokens whose log-probabilities the ask's options are read from."""
        found = [i for option in ask.options for i in self._option_ids(option)]
        for short in begun(ask.options):  # "0", which makes a 10 of a 1
            rests = (option.removeprefix(short) for option in ask.options if option != short)
            found += [i for rest in rests for i in self._option_ids(rest) if rest]
        if ask.reads_the_end:
            wanted = {option.casefold() for option in ask.options}
            for text, ids in self._ids_by_text.items():
                found += ids if text.strip(BARE) in wanted else []
        return list(dict.fromkeys(found))[:MOST_IDS]

    def _answered(self, done: UnderWay) -> Answer:
        ask = done.row.ask
        outputs = [output for _, output in sorted(done.outputs.items())]
        usage = {
            "prompt_tokens": len(done.row.ids),
            "completion_tokens": sum(len(output.token_ids) for output in outputs),
        }
        reasons = {output.finish_reason for output in outputs}
        if odd := reasons - {"stop", "length"}:
            return Answer(ask.key, fault="backend", detail=f"vLLM ended it: {odd}", usage=usage)
        logprobs, ends = self._options(ask, outputs)
        told = [*([logprobs] if logprobs else []), *filter(None, ends)]
        if any(value != value for one in told for value in one.values()):
            return Answer(ask.key, fault="backend", detail="the logits are not numbers")
        finish = "stop" if reasons == {"stop"} and not _reads_one_token(ask) else "length"
        texts = tuple(output.text for output in outputs)
        return ended(Answer(ask.key, texts, finish, logprobs, usage=usage, ends=ends), ask.stop)

    def _options(
        self, ask: Ask, outputs: list[Any]
    ) -> tuple[dict[str, float] | None, tuple[dict[str, float] | None, ...]]:
        """`Answer.logprobs` and `Answer.ends`."""
        if not ask.options:
            return None, ()
        if ask.reads_the_end:
            ends = [read_options(ask, output.text, _tokens(output)) for output in outputs]
            return None, tuple(ends) if any(ends) else ()
        if begun(ask.options):
            return read_options(ask, outputs[0].text, _tokens(outputs[0])), ()
        first = outputs[0].logprobs[0]
        return {
            option: min(0.0, _total([first[i].logprob for i in self._option_ids(option)]))
            for option in ask.options
        }, ()

    def close(self) -> None:
        """End the engine; one that hangs is left to the end of the process."""
        engine = vars(self).pop("engine", None)
        if engine is not None:
            if not self._thread.hangs:
                self._thread.run(partial(vllm_engine.shut_down, engine))
            self._thread.end()
            del engine
        super().close()


def _reads_one_token(ask: Ask) -> bool:
    return bool(ask.options) and ask.max_tokens == 1


def _samples(ask: Ask) -> int:
    """How many texts an ask wants; one where it is read at its first token, which is no draw."""
    return 1 if _reads_one_token(ask) else ask.samples


def _total(logprobs: list[float]) -> float:
    """The log-probability of one or another of these tokens."""
    return float(torch.tensor(logprobs, dtype=torch.float64).logsumexp(0))


def _tokens(output: Any) -> Tokens:
    """An output's tokens, each with the log-probabilities that were asked for in its place."""
    texts = [
        found[token].decoded_token
        for token, found in zip(output.token_ids, output.logprobs, strict=True)
    ]

    def at(i: int) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
        return [(found.decoded_token, found.logprob) for found in output.logprobs[i].values()], []

    return Tokens(texts, at)


class Silent(AifError):
    """The engine has said nothing for too long."""


class EngineThread:
    """Where the engine lives: a thread of its own, so that whoever waits for it can stop waiting
    (a signal's handler runs, and a step that never ends is noticed)."""

    def __init__(self) -> None:
        self.hangs = False
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        # A daemon: one that hangs does not keep the process from its end.
        threading.Thread(target=self._work, daemon=True, name="vllm").start()

    def run(self, call: Callable[[], Any], timeout_s: float | None = None) -> Any:
        """What `call()` returns or raises there; Silent where it does neither in time."""
        future: Future[Any] = Future()
        self._calls.put((future, call))
        self.hangs = True  # until it is heard of again
        try:
            found = future.exception(timeout_s)
        except TimeoutError:
            raise Silent(f"nothing in {timeout_s:g} s") from None
        self.hangs = False
        if found is not None:
            raise found
        return future.result()

    def end(self) -> None:
        """Make no call after those that are waiting."""
        self._calls.put(None)

    def _work(self) -> None:
        # Ctrl-C reaches every process of a terminal: those that the engine starts inherit this
        # mask, so that what is in flight comes in first.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        while (asked := self._calls.get()) is not None:
            future, call = asked
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            del asked, future, call  # which may hold the engine
