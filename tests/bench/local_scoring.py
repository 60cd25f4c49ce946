"""Does the shared-prefix scorer label at least 2.3 times as fast as full-prompt forward passes?

    python tests/bench/local_scoring.py --dtype float32 --pairs 6 --rounds 5

The work: pairs of texts in both orders, four questions of about 40 tokens after about 300 shared
ones; nothing else is shared, unless `--static` gives all prompts a common beginning. Baselines:
every full prompt alone, and every full prompt in length-sorted right-padded batches. Rounds are
interleaved (a, b, c, a, b, c, ...), each ends with an empty block store, medians are shown.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch

from aif.config.settings import LLMSettings
from aif.llm.local import LocalLLM
from aif.llm.prefix_scorer import PrefixScorer


def work(pairs: int, static: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Prompts of random tokens: what costs time is their number, not what they say."""
    rng = random.Random(0)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(100, vocabulary) for _ in range(rng.randint(low, high))]

    beginning = tokens(static, static)
    questions = [tokens(35, 45) for _ in range(4)]
    prompts = []
    for _ in range(pairs):
        share = (300 - static) // 2
        a, b = tokens(share - 30, share + 30), tokens(share - 30, share + 30)
        prompts += [tuple(beginning + x + q) for x in (a + b, b + a) for q in questions]
    rng.shuffle(prompts)
    return prompts


@torch.inference_mode()
def one_by_one(model, prompts):
    out = [model(torch.tensor([p], device=model.device), logits_to_keep=1) for p in prompts]
    return [o.logits[0, -1].float().log_softmax(-1) for o in out]


@torch.inference_mode()
def batched(model, prompts, rows=8):
    """Length-sorted batches, padded on the right; the head sees each row's last position only."""
    found = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), rows):
        part = order[start : start + rows]
        width = max(len(prompts[i]) for i in part)
        ids_BT = torch.tensor([prompts[i] + (0,) * (width - len(prompts[i])) for i in part])
        hidden_BTD = model.base_model(ids_BT.to(model.device)).last_hidden_state
        last_BD = hidden_BTD[range(len(part)), [len(prompts[i]) - 1 for i in part]]
        logits_BV = model.get_output_embeddings()(last_BD)
        found |= zip(part, logits_BV.float().log_softmax(-1), strict=True)
    return [found[i] for i in range(len(prompts))]


def shared(model, prompts):
    found = dict(PrefixScorer(model).next_logprobs(prompts))
    return [found[i] for i in range(len(prompts))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--pairs", type=int, default=6, help="each makes 8 prompts")
    parser.add_argument("--static", type=int, default=0, help="tokens that all prompts begin with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    llm = LocalLLM(LLMSettings(model=args.model, dtype=args.dtype, device=args.device))
    model = llm.model
    prompts = work(args.pairs, args.static, len(llm.tokenizer))
    tokens = sum(map(len, prompts)) / len(prompts)
    print(
        f"{args.model} {args.dtype} on {model.device}, {torch.get_num_threads()} threads: "
        f"{len(prompts)} prompts of {tokens:.0f} tokens"
    )
    ways = {"one by one": one_by_one, "batched": batched, "shared prefix": shared}
    results = {name: way(model, prompts[:8]) for name, way in ways.items()}  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            results[name] = way(model, prompts)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    report(seconds, results, len(prompts))


def report(seconds: dict[str, list[float]], results: dict[str, list], n: int) -> None:
    heads = ("labels/s", "min", "max", "x alone", "x batch", "max|dp|")
    print(" " * 14, *map("{:>8}".format, heads))
    exact = torch.stack(results["one by one"]).cpu().exp()
    for name, took in seconds.items():
        rates = sorted(n / s for s in took)
        gains = [
            statistics.median(b / s for b, s in zip(seconds[base], took, strict=True))
            for base in ("one by one", "batched")
        ]
        off = (torch.stack(results[name]).cpu().exp() - exact).abs().max()
        print(
            f"{name:14} {statistics.median(rates):8.2f} {rates[0]:8.2f} {rates[-1]:8.2f} "
            f"{gains[0]:8.2f} {gains[1]:8.2f} {off:8.1e}"
        )


if __name__ == "__main__":
    main()
