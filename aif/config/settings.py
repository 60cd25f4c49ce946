"""Settings: defaults, then run.toml, then the command line; an unknown key is an error.

[judge]
model = "openai:gpt-4.1-mini"
base_url = "http://localhost:8000/v1"

[label]
pairs = "pairs.jsonl"
constitution = "constitutions/warm.toml"
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit, urlunsplit

from pydantic import AfterValidator, Field, field_validator

from aif.config.price import checked_price
from aif.config.toml import Strict, checked, put, read_toml
from aif.config.versions import use_new_names
from aif.store import fingerprint

BUNDLED = "smollm2-135m"
VLLM = "vllm:"  # before the name of a model that vLLM is to run
Budget = Annotated[float | None, Field(gt=0, allow_inf_nan=False)]  # dollars


class LLMSettings(Strict):
    """A model and how to ask it."""

    model: str = Field(BUNDLED, min_length=1)
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"  # the key's name; the key itself is never in a file
    form: Literal["auto", "chat", "text"] = "auto"
    temperature: float = Field(0.0, ge=0, le=5)
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)  # None: what the stage needs
    samples: int = Field(1, ge=1, le=256)
    logprobs: bool = True
    structured: bool = False  # ask for JSON, where the server has response_format
    check_model: bool = True
    concurrency: int = Field(64, ge=1, le=10_000)
    timeout_s: float = Field(120, gt=0)
    attempts: int = Field(6, ge=1, le=100)
    max_wait_s: float = Field(60, gt=0)
    poll_s: float = Field(60, gt=0)  # seconds between two looks at a batch, at most
    # Dollars a million tokens of prompt/completion, as "0.15/0.60"; None: not known.
    price: Annotated[str | None, AfterValidator(checked_price)] = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    # Share of the device's memory for vLLM; None: 0.9 of a GPU's, 0.3 of a CPU's.
    vllm_memory: float | None = Field(None, gt=0, lt=1)

    @property
    def weights(self) -> str:
        """The model by its weights, whichever engine runs them."""
        return self.model.removeprefix(VLLM)

    def of_weights(self, name: str) -> Self:
        """The same with other weights, run by the same engine."""
        engine = VLLM if self.model.startswith(VLLM) else ""
        return self.of_model(engine + name)

    def identity(self) -> dict[str, Any]:
        """What an answer depends on, without secrets and tuning; it enters every verdict's id.

        A folder counts by its files: a model that was trained again is another one, and a folder
        that was moved is the same.
        """
        keys = {"model", "temperature", "max_tokens", "samples", "logprobs", "dtype"}
        parts = self.model_dump(include=keys) | {"base_url": without_secrets(self.base_url)}
        if self.structured:
            parts["structured"] = True
        weights = fingerprint.of_model(self.weights)
        engine, name = self.model.removesuffix(self.weights), Path(self.weights).name
        return parts | ({"model": engine + name, "weights": weights} if weights else {})

    def of_model(self, model: str) -> Self:
        """The same for another model, without the price if the name differs."""
        price = self.price if model == self.model else None
        return self.model_copy(update={"model": model, "price": price})

    @property
    def shown_form(self) -> Literal["chat", "text"]:
        """The form of its examples: the bundled model continues a text but follows no request."""
        if self.form != "auto":
            return self.form
        return "text" if self.weights == BUNDLED else "chat"

    @property
    def response_tokens(self) -> int:
        return self.max_tokens or 256


class PolicySettings(LLMSettings):
    """The model that is sampled from."""

    temperature: float = Field(1.0, ge=0, le=5)


class RespondSettings(Strict):
    """Sampling responses to prompts."""

    prompts: str | None = None
    few_shot: str | None = None  # solved examples, put before each prompt and not kept with it
    samples: int = Field(2, ge=1, le=1000)
    sft_samples: int | None = Field(None, ge=1, le=1000)  # by `aif resample`; None: samples
    seed: int = 0
    limit: int | None = Field(None, ge=1)


class ReviseSettings(Strict):
    """Critique and revision of responses, round by round."""

    constitution: str | None = None  # None: label.constitution
    rounds: int = Field(4, ge=1, le=64)
    template: str | None = None
    keep_refusals: bool = False  # a revision that declines is a fault, unless this is set
    max_fault_rate: float = Field(0.05, ge=0, le=1)  # of calls; a bad revision is no fault here
    seed: int = 0
    limit: int | None = Field(None, ge=1)


class FilterSettings(Strict):
    """Only revisions that the judge prefers to their responses are kept."""

    threshold: float = Field(0.5, ge=0, lt=1)  # kept above this probability


class VoteSettings(Strict):
    """Majority votes over the final answers of sampled responses."""

    answer: str | None = None  # a regex whose first group is the answer; None: the usual phrases
    min_share: float = Field(0.0, ge=0, le=1)  # share of a prompt's responses that an answer needs
    per_prompt: int | None = Field(None, ge=1)  # voted responses to keep per prompt; None: all


class LoraSettings(Strict):
    """Low-rank adapters in place of full fine-tuning (Hu et al. 2021, 2106.09685)."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: str | list[str] = "all-linear"


class TrainSettings(Strict):
    """Settings that all training stages have. The weights that learn stay float32."""

    FULL_RATE: ClassVar[float] = 2e-5
    LORA_RATE: ClassVar[float] = 2e-4  # adapters begin at zero and take about ten times the rate
    model: str | None = None  # None: the policy
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1)  # of the optimizer; None: by epochs
    batch_size: int = Field(32, ge=1)  # sequences per optimizer step, over all devices
    micro_tokens: int | None = Field(None, ge=1)  # per forward pass; None: 16,384, on a CPU 2,048
    learning_rate: float | None = Field(None, ge=0)  # None: 2e-5, with LoRA 2e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0)  # 0: gradients are not clipped
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products
    device: str = "auto"
    gradient_checkpointing: bool = False  # less memory for a third more time
    eval_fraction: float = Field(0.05, ge=0, lt=1)  # of the prompts, held out; 0: none
    eval_every: int | None = Field(None, ge=1)  # steps; None: once an epoch
    load_best: bool = True  # end with the weights of the lowest eval loss
    save_every: int | None = Field(None, ge=1)  # steps between checkpoints; None: ten minutes
    keep_checkpoints: int = Field(2, ge=1)  # the newest ones; the best is also kept
    seed: int = 0
    lora: LoraSettings | None = None


class SFTSettings(TrainSettings):
    """Supervised fine-tuning. `data` maps a source to how often an epoch shows each row of it."""

    objective: Literal["response", "lm"] = "response"  # lm: plain text, every token of it
    data: dict[str, Annotated[float, Field(gt=0)]] = Field({"revisions": 1.0})
    revisions: Literal["last", "first", "all"] = "all"
    filtered: bool = False  # only revisions that `aif filter` kept
    loss_on: Literal["response", "assistant"] = "response"  # the last turn, or every assistant's
    max_tokens: int = Field(1024, ge=8)  # of an example
    packing: bool | None = None  # no padding; None: if the attention allows it


class RequireAudit(Strict):
    """What RUN/audit.json must show of a judge before a reward model learns from its labels."""

    agreement: float | None = Field(None, ge=0, le=1)  # with people, at least
    position_bias: float | None = Field(None, ge=0, le=1)  # to either side, at most
    fault_rate: float | None = Field(None, ge=0, le=1)  # of its calls, at most


class RewardSettings(TrainSettings):
    """The reward model. `data` maps a source to how often an epoch shows each prompt of it."""

    model: str | None = None  # None: RUN/sft if it exists, else the policy
    objective: Literal["pairs", "ranking", "grades"] = "pairs"
    head: Literal["random", "fitted"] = "random"  # fitted: to the body's features, before training
    data: dict[str, Annotated[float, Field(gt=0)]] = Field({"labels": 1.0})
    batch_size: int = Field(16, ge=1)  # prompts per optimizer step, each with all its comparisons
    eval_fraction: float = Field(0.1, ge=0, lt=1)  # of the prompts, held out
    max_tokens: int = Field(1024, ge=8)  # of a prompt and one response
    hard: bool = False  # learn who won, not by how much
    confidence_weights: bool = False  # weigh a comparison by |2p - 1|
    margin: float = Field(0.0, ge=0)  # between two scores, if the label is certain
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    centering: float = Field(0.0, ge=0)  # pulls the mean score of a pair to zero
    share_prompt: bool | None = None  # run a prompt once; None: if the attention allows it
    members: int = Field(1, ge=1, le=16)  # models in the ensemble, of seeds seed, seed + 1, ...
    combine: Literal["mean", "min", "lower"] = "mean"  # lower: mean less one standard deviation
    curve: list[Annotated[float, Field(gt=0, lt=1)]] = Field([])  # also train on these shares
    require_audit: RequireAudit | None = None


class PPOSettings(TrainSettings):
    """Reinforcement learning of the policy. `reward` maps a source of reward to its weight."""

    FULL_RATE: ClassVar[float] = 3e-6
    LORA_RATE: ClassVar[float] = 1e-4
    model: str | None = None  # None: RUN/sft if it exists, else the policy
    algorithm: Literal["ppo", "rloo", "reinforce"] = "ppo"  # rloo and reinforce have no critic
    prompts: str | None = None  # None: the run's own
    reward: dict[str, float] = Field({"model": 1.0})  # model, judge, MODULE:FUNCTION
    reward_model: str | None = None  # None: RUN/reward
    critic: str | None = None  # None: the reward model if it is a reward, else the policy
    batch_size: int = Field(32, ge=1)  # prompts per step
    samples: int = Field(1, ge=1)  # responses per prompt
    ppo_epochs: int = Field(4, ge=1)  # passes over a step's responses
    minibatches: int = Field(1, ge=1)  # optimizer steps per pass
    response_tokens: int | None = Field(None, ge=1)  # None: as policy.max_tokens
    temperature: float | None = Field(None, gt=0)  # None: as policy.temperature
    kl_coef: float = Field(0.05, ge=0)
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_target: float | None = Field(None, gt=0)  # nats per response; None: kl_coef stays
    kl_horizon: int = Field(10_000, ge=1)  # responses over which kl_coef adapts
    gamma: float = Field(1.0, gt=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    cliprange: float = Field(0.2, gt=0)
    cliprange_value: float = Field(0.2, gt=0)
    vf_coef: float = Field(0.1, ge=0)
    entropy_coef: float = Field(0.0, ge=0)
    target_kl: float | None = Field(None, gt=0)  # approxkl that ends a step's passes
    # zero: at first it predicts the mean; reward: the reward model's head, trained on last tokens
    critic_head: Literal["zero", "reward"] = "zero"
    critic_learning_rate: float | None = Field(None, ge=0)  # None: the policy's
    critic_warmup: int = Field(0, ge=0)  # steps in which only the critic learns
    normalise: bool = True  # the reward model's scores, by its reference mean and std
    scale_scores: bool = False  # by the running standard deviation
    score_clip: float | None = Field(None, gt=0)  # scores are kept in +-score_clip
    missing_eos_penalty: float = Field(1.0, ge=0)  # subtracted for a response without an end
    whiten_rewards: bool = False
    rollouts: Literal["transformers", "vllm"] = "transformers"  # what samples responses
    vllm_memory: float = Field(0.3, gt=0, lt=1)  # share of a GPU's memory for vLLM
    ptx: dict[str, Annotated[float, Field(gt=0)]] = Field({})  # as sft.data, mixed into each step
    ptx_coef: float = Field(1.0, gt=0)  # weight of its loss
    gold: str | None = None  # judge or MODULE:FUNCTION, watched and never trained on
    stop_when_gold_falls: int | None = Field(None, ge=1)  # evaluations in a row below its best
    trackers: list[str] = Field([])  # of accelerate: tensorboard, wandb, ...
    learning_rate: float | None = Field(None, ge=0)  # None: 3e-6, with LoRA 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    adam_epsilon: float = Field(1e-5, gt=0)
    eval_fraction: float = Field(0.1, ge=0, lt=1)  # of the prompts, held out to watch
    eval_every: int | None = Field(None, ge=1)  # steps; None: a tenth of them
    max_tokens: int = Field(1024, ge=8)  # of a prompt and its response
    share_prompt: bool | None = None  # run a prompt once for its samples; None: if attention can
    load_best: bool = False  # end with the weights of the highest gold, or held-out score


class CompareSettings(Strict):
    """Which pairs of a prompt's responses are compared."""

    per_prompt: int | None = Field(None, ge=1)  # None: every pair
    seed: int = 0


class LabelSettings(Strict):
    """Judging comparisons under a constitution."""

    pairs: str | None = None
    constitution: str | None = None  # None: revise.constitution
    protocol: Literal["auto", "pairwise", "reasoned", "pointwise", "rating"] = "auto"
    clamp: list[float] | None = None  # bounds of a verdict's p; None: for `reasoned` [0.4, 0.6]
    template: str | None = None
    seed: int = 0
    limit: int | None = Field(None, ge=1)
    quorum: float = Field(1.0, gt=0, le=1)
    max_fault_rate: float = Field(0.05, ge=0, le=1)
    budget: Budget = None  # for all labelling of the run, earlier commands included
    consensus: Literal["mean", "majority", "unanimous"] = "mean"  # of the judge and its panel
    judge_weights: dict[str, Annotated[float, Field(ge=0)]] = Field({})  # 1 for a judge without one
    weights_from: str | None = None  # an audit.json; judge_weights go before its weights
    escalate_below: float | None = Field(None, ge=0, le=1)  # more calls if |2p - 1| is below it
    escalate: Literal["orders", "panel", "reasoned"] = "orders"  # the calls to add then

    @field_validator("clamp")
    @classmethod
    def _clamp_holds_even(cls, clamp: list[float] | None) -> list[float] | None:
        if clamp is not None and not (len(clamp) == 2 and 0 <= clamp[0] <= 0.5 <= clamp[1] <= 1):
            raise ValueError("[low, high] with low in 0 to 0.5 and high in 0.5 to 1")
        return clamp


class AuditSettings(Strict):
    """Judges compared with people."""

    pairs: str | None = None  # with people's choices; None: label.pairs, or the runs' own
    judges: list[str] = Field([])  # by name; recorded:COLUMN is one whose verdicts the pairs have
    runs: list[str] = Field([])  # labelled run folders; without runs and judges: this run
    canaries: int = Field(0, ge=0)  # pairs to attack, each in every way
    calibrate: bool = False  # fit a temperature on half of the prompts
    resamples: int = Field(1000, ge=100)  # of the pairs, for an interval
    seed: int = 0


class EvaluateSettings(Strict):
    """Policies are compared on prompts that they did not learn from."""

    policies: list[str] = Field([])  # by name; none: all that the run has
    against: str | None = None  # None: sft if it exists, else base
    prompts: str | None = None  # None: those that `aif ppo` held out
    human: str | None = None  # pairs with people's choices, to check the judge
    all_pairs: bool = False  # each policy against each, not only against one
    tie_margin: float = Field(0.0, ge=0, lt=0.5)  # p this close to 0.5 is a tie
    resamples: int = Field(1000, ge=100)  # of the prompts, for an interval
    seed: int = 0
    limit: int | None = Field(None, ge=1)


class PipelineSettings(Strict):
    """What `aif run` does."""

    stages: list[str] = Field([])  # by name, in their order; none: all that the settings need
    iterations: int = Field(1, ge=1, le=20)  # of sampling, labelling and training
    budget: Budget = None  # for all calls of the run, in every stage


class Settings(Strict):
    """All settings of a run, table by table."""

    pipeline: PipelineSettings = PipelineSettings()
    policy: PolicySettings = PolicySettings()
    reviser: PolicySettings | None = None  # None: the policy itself
    judge: LLMSettings = LLMSettings()
    panel: list[LLMSettings] = Field([])  # the judges beside the first
    respond: RespondSettings = RespondSettings()
    revise: ReviseSettings = ReviseSettings()
    filter: FilterSettings = FilterSettings()
    vote: VoteSettings = VoteSettings()
    sft: SFTSettings = SFTSettings()
    reward: RewardSettings = RewardSettings()
    ppo: PPOSettings = PPOSettings()
    compare: CompareSettings = CompareSettings()
    label: LabelSettings = LabelSettings()
    audit: AuditSettings = AuditSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    @property
    def reviser_model(self) -> PolicySettings:
        """The model that revises: `[reviser]`, or else the policy."""
        return self.reviser or self.policy

    def to_keep(self) -> dict[str, Any]:
        """The tables of run.toml: what differs from the defaults, without secrets and limits."""
        tables = self.model_dump(exclude_defaults=True, exclude_none=True)
        for value in tables.values():
            for table in value if isinstance(value, list) else [value]:
                table.pop("limit", None)  # it is for one command
                if "base_url" in table:
                    table["base_url"] = without_secrets(table["base_url"])
        return tables


def without_secrets(url: str | None) -> str | None:
    """A URL without its user, password, query and fragment, which may hold keys."""
    if url is None:
        return None
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def load_settings(path: Path, overrides: dict[str, Any]) -> Settings:
    """Defaults < `path` (if it exists) < `overrides` (dotted keys, None: not given)."""
    tables = read_toml(path) if path.exists() else {}
    use_new_names(tables, path)
    checked(Settings, tables, path)  # so that an error names the file, not the command line
    for name in ("judge", "policy", "reviser"):
        model = overrides.get(f"{name}.model")
        if model is not None and model != tables.get(name, {}).get("model"):
            tables.get(name, {}).pop("price", None)  # it was the other model's
    overrides = {key: value for key, value in overrides.items() if value is not None}
    use_new_names(overrides, "command line")
    for key, value in overrides.items():
        put(tables, key, value)
    return checked(Settings, tables, "command line")
