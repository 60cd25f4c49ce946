"""A language model in this process on vLLM: continuous batches, cached prefixes.

    [judge]
    model = "vllm:Qwen/Qwen2.5-7B-Instruct"      # or a folder, or vllm:smollm2-135m

Asks go to the engine one by one, at most `concurrency` at once, and each answer comes as soon as it
is done, so a kill loses no more than those under way. The engine computes a shared beginning of
prompts once (https://docs.vllm.ai, automatic prefix caching); our templates put the question last
for that.
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
from aif.llm import Answer, Ask
from aif.llm.local import AskRefused, LocalLLM, Row, seed_of
from aif.llm.option_logprobs import BARE, Listed, Options, TokenLogprobs, begun, read_texts
from aif.models import vllm_engine
from aif.models.load import torch_dtype, usable_device

MOST_IDS = 128  # token ids with log-probabilities per place (vLLM's MAX_LOGPROB_TOKEN_IDS)


@dataclass(slots=True)
class UnderWay:
    """An ask that the engine has, and its samples so far."""

    row: Row
    outputs: dict[int, Any] = field(default_factory=dict)  # sample -> vllm's CompletionOutput


class VLLM(LocalLLM):
    """`LocalLLM`'s prompts, tokens and options, run by vLLM.

    Raises AifError if the engine does not start, and JudgeStopped if it ends, fails or is silent
    for `timeout_s`.
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
        """The `vllm.LLM`; started at first use."""
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
        """The longest prompt plus answer, in tokens; less than the model's if the engine's memory
        is short."""
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
                _ = self.engine  # the ask must fit its context
                try:
                    fresh[str(next(self._numbers))] = UnderWay(Row(ask, self._tokens(ask)))
                except AskRefused as refused:
                    fault, detail = refused.args
                    yield Answer(ask.key, fault=fault, detail=detail)
            under_way |= fresh
            if under_way:
                yield from self._turn(fresh, under_way)

    def _turn(self, fresh: dict[str, UnderWay], under_way: dict[str, UnderWay]) -> Iterator[Answer]:
        """Hand the fresh asks over, let the engine make a step, yield what that completes."""
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
            reason = shown(" ".join(str(error).split()) or type(error).__name__, 200)
            raise JudgeStopped(
                f"{self._named}: the engine failed ({reason}); the same command resumes"
            ) from error
        for number, why in refused.items():
            ask = under_way.pop(number).row.ask
            yield Answer(ask.key, fault="rejected", detail=why)
        for output in outputs:
            number, _, sample = output.request_id.partition("-")
            one = under_way.get(number)
            if one is None:  # from an earlier `answer` that was closed before its end
                continue
            one.outputs[int(sample)] = output.outputs[0]
            if len(one.outputs) == _samples(one.row.ask):
                del under_way[number]
                yield self._answered(one)

    def _step(self, fresh: dict[str, UnderWay]) -> tuple[dict[str, str], list[Any]]:
        """In the engine's thread: (why it refuses an ask, by number; the finished outputs)."""
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

        return SamplingParams(
            temperature=0.0 if _reads_one_token(ask) else ask.temperature,
            max_tokens=ask.max_tokens,
            seed=seed_of(ask, sample),
            stop=[stop for stop in ask.stop if stop],
            # Log-probabilities of just these tokens, normalised over the whole vocabulary.
            logprob_token_ids=self._read_ids(ask) if ask.options else None,
            structured_outputs=StructuredOutputsParams(json=ask.schema) if ask.schema else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _read_ids(self, ask: Ask) -> list[int]:
        """The tokens from whose log-probabilities the options are read."""
        read = [i for option in ask.options for i in self._option_ids(option)]
        for short in begun(ask.options):  # "0", which makes a 1 a 10
            rests = (option.removeprefix(short) for option in ask.options if option != short)
            read += [i for rest in rests for i in self._option_ids(rest) if rest]
        if ask.reads_the_end:
            options = {option.casefold() for option in ask.options}
            for text, ids in self._ids_by_text.items():
                read += ids if text.strip(BARE) in options else []
        return list(dict.fromkeys(read))[:MOST_IDS]

    def _answered(self, done: UnderWay) -> Answer:
        ask = done.row.ask
        outputs = [output for _, output in sorted(done.outputs.items())]
        usage = done.row.usage(sum(len(output.token_ids) for output in outputs))
        reasons = {output.finish_reason for output in outputs}
        if odd := reasons - {"stop", "length"}:
            return Answer(ask.key, fault="backend", detail=f"vLLM ended it: {odd}", usage=usage)
        logprobs, ends = self._options(ask, outputs)
        if any(value != value for one in filter(None, (logprobs, *ends)) for value in one.values()):
            return Answer(ask.key, fault="backend", detail="the logits are not numbers")
        finish = "stop" if reasons == {"stop"} and not _reads_one_token(ask) else "length"
        texts = tuple(output.text for output in outputs)
        return Answer(ask.key, texts, finish, logprobs, usage=usage, ends=ends).cut(ask)

    def _options(
        self, ask: Ask, outputs: list[Any]
    ) -> tuple[Options | None, tuple[Options | None, ...]]:
        """`Answer.logprobs` and `Answer.ends`."""
        if not ask.options:
            return None, ()
        if ask.reads_the_end or begun(ask.options):
            return read_texts(ask, [output.text for output in outputs], list(map(_tokens, outputs)))
        first = outputs[0].logprobs[0]
        return {
            option: min(0.0, _total([first[i].logprob for i in self._option_ids(option)]))
            for option in ask.options
        }, ()

    def close(self) -> None:
        """End the engine; one that hangs ends with the process."""
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
    """How many texts an ask wants; one if only its first token is read, which is not sampled."""
    return 1 if _reads_one_token(ask) else ask.samples


def _total(logprobs: list[float]) -> float:
    """The log-probability of one or another of these tokens."""
    return float(torch.tensor(logprobs, dtype=torch.float64).logsumexp(0))


def _tokens(output: Any) -> TokenLogprobs:
    """An output's tokens, each with the log-probabilities of `_read_ids` in its place."""
    texts = [
        listed[token].decoded_token
        for token, listed in zip(output.token_ids, output.logprobs, strict=True)
    ]

    def at(i: int) -> tuple[Listed, Listed]:
        return [(token.decoded_token, token.logprob) for token in output.logprobs[i].values()], []

    return TokenLogprobs(texts, at)


class Silent(AifError):
    """The engine did not answer in time."""


class EngineThread:
    """A thread for the engine, so that a wait for it can be broken off: signal handlers run, and a
    step that never ends is noticed."""

    def __init__(self) -> None:
        self.hangs = False
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        # A daemon: if it hangs, the process can end all the same.
        threading.Thread(target=self._work, daemon=True, name="vllm").start()

    def run(self, call: Callable[[], Any], timeout_s: float | None = None) -> Any:
        """What `call()` returns or raises there; raises Silent if it does neither in time."""
        future: Future[Any] = Future()
        self._calls.put((future, call))
        self.hangs = True  # until it answers
        try:
            error = future.exception(timeout_s)
        except TimeoutError:
            raise Silent(f"nothing in {timeout_s:g} s") from None
        self.hangs = False
        if error is not None:
            raise error
        return future.result()

    def end(self) -> None:
        """End after the calls that are waiting."""
        self._calls.put(None)

    def _work(self) -> None:
        # Ctrl-C reaches every process of a terminal. Those that the engine starts inherit this
        # mask, so the asks in flight still get their answers.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        while (item := self._calls.get()) is not None:
            future, call = item
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            del item, future, call  # they may hold the engine
