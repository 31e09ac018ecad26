"""Every knob of a training run: bounded, documented, strict."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_settings import CliImplicitFlag

from cluster import storage
from cluster.errors import UserError
from cluster.storage import FILE_NAME, MODEL_NAME
from train.tasks import plugins
from train.tasks.features import KINDS
from train.tasks.plugins import code_of_config

AnyModel = TypeVar("AnyModel", bound=BaseModel)
# As `checkpoint.best`: no epoch is chosen, the last one counts.
LAST = "last"

Count = Annotated[int, Field(ge=1, le=4096)]


def _span(value: Any) -> Any:
    """Take one count as least and most alike."""
    if isinstance(value, list | tuple) and len(value) == 2:
        return sorted(value) if all(type(item) is int for item in value) else value
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    return [value, value]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Part):
    train: str = Field(
        description="Training records: path, folder, glob or URL of CSV, Parquet, JSON lines, "
        "Arrow or image folders; or sklearn:digits."
    )
    valid: str | None = Field(
        None, description="Validation records; split off the training records when not given."
    )
    test: str | None = Field(
        None, description="Test records; split off the training records when not given."
    )
    extra: str | None = Field(
        None,
        description="Further labelled records to train on; validation and test stay as they are "
        "without them.",
    )
    extra_share: float | None = Field(
        None,
        gt=0,
        le=0.95,
        description="Share of the training samples that are extra records, repeated or drawn by "
        "the seed of the splits; each once by default.",
    )
    valid_fraction: float = Field(
        0.1, gt=0, lt=0.5, description="Share of the training records held out to choose by."
    )
    test_fraction: float = Field(
        0.2, gt=0, lt=0.5, description="Share split off for the test when data.test is not given."
    )
    train_on_valid: bool = Field(
        False,
        description="Train on the validation records too, once all is chosen; needs "
        "checkpoint.best: last. The gate then compares on records that were learned from.",
    )
    split_seed: int = Field(
        0, ge=0, description="Seed of the splits; the same whatever the run's own seed."
    )
    split_key: str | None = Field(
        None, description="Column whose equal values stay in one split, such as a customer."
    )
    split_time: str | None = Field(
        None, description="Column with a date; the latest records become the test split."
    )
    drop: tuple[str, ...] = Field(
        (), description="Columns to leave out where features are not listed, as they leak."
    )
    encoding: str = Field("utf-8", description="Of CSV files.")
    bad_records: Literal["refuse", "drop"] = Field(
        "refuse", description="A record that cannot be encoded ends the run, or is left out, told."
    )

    @model_validator(mode="after")
    def _a_share_is_of_something(self) -> Self:
        if self.extra is None and self.extra_share is not None:
            raise ValueError("extra_share is for data.extra, which is not given; give both")
        return self


def _kind_alone(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


def _known_kind(kind: str) -> str:
    if kind not in KINDS and ":" not in kind:
        raise ValueError(f"expected one of {', '.join(KINDS)}, or package.module:Class")
    return kind


class Column(Part):
    """What a column of the records is."""

    kind: Annotated[str, AfterValidator(_known_kind)] = Field(
        description=f"{', '.join(KINDS)}, or package.module:Class."
    )
    format: str | None = Field(
        None, description="Of a date, as strptime reads it; ISO 8601 by default."
    )
    size: tuple[Count, Count] | None = Field(
        None, description="Height and width to bring images to; the first image's by default."
    )
    channels: Literal[1, 3] | None = Field(
        None, description="1 for grey, 3 for colour images; as the first image by default."
    )
    crop: bool | None = Field(
        None, description="Cut images to the size's shape before resizing, not squeeze them."
    )

    @model_validator(mode="after")
    def _only_what_suits(self) -> Self:
        """Refuse what a column of this kind has no use for."""
        suits = {"date": {"format"}, "image": {"size", "channels", "crop"}}.get(self.kind, set())
        given = {name for name, value in self if value is not None} - {"kind"}
        if wrong := sorted(given - suits):
            raise ValueError(f"{wrong[0]} is not for columns of kind {self.kind}")
        return self


class Text(Part):
    max_tokens: int = Field(
        256, ge=1, le=65_536, description="Tokens of a record's texts together; more are cut."
    )
    vocabulary: int = Field(
        20_000, ge=100, le=1_000_000, description="Most tokens of the trained vocabulary."
    )
    tokenizer: str | None = Field(
        None, description="Path or URL of a Tokenizers JSON; trained on the records by default."
    )


class Net(Part):
    own: str | None = Field(
        None, description="package.module:Class of a net of your own, in place of all below."
    )
    widths: list[Count] = Field(
        [64, 128, 128], min_length=1, description="Channels of each block, which halves the image."
    )
    text: Literal["bag", "transformer"] = Field(
        "bag", description="Mean of the words' vectors, or a small transformer encoder."
    )
    text_width: Count = Field(128, description="Size of a word's vector.")
    text_layers: int = Field(2, ge=1, le=48, description="Layers of the transformer.")
    text_dropout: float = Field(0.2, ge=0, lt=1, description="Share of words left out in training.")
    hidden: list[Count] = Field(
        [128, 128], description="Hidden layers over numbers, categories and all inputs together."
    )
    bins: int = Field(
        16, ge=2, le=256, description="Pieces of a number's range, each with a weight of its own."
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="Share of hidden values left out.")
    activation: Literal["relu", "gelu"] = Field(
        "relu", description="gelu learns a little faster; relu runs faster in int8."
    )
    whiten: bool = Field(
        True, description="Start with a fixed convolution that whitens 2×2 patches."
    )


def _own_alone(value: Any) -> Any:
    return {"own": value} if isinstance(value, str) else value


class Optim(Part):
    name: Literal["muon", "sgd", "adamw"] = Field(
        "muon", description="Muon turns convolutions and matrices; the rest follows by SGD."
    )
    lr: float = Field(0.1, gt=0, le=10, description="Peak learning rate, after warm-up.")
    vector_lr: float = Field(
        0.02, gt=0, le=10, description="Peak rate of biases and norms, with muon."
    )
    head_lr: float = Field(0.01, gt=0, le=10, description="Peak rate of the last layer, with muon.")
    momentum: float = Field(0.6, ge=0, lt=1, description="Nesterov momentum of muon and sgd.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="For weights, not biases or norms.")
    epochs: int = Field(8, ge=1, le=10_000, description="Passes over the training records.")
    batch_size: int = Field(
        500, ge=1, le=65_536, description="Samples per step in all, whatever the workers."
    )
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        description="Most samples a worker computes at once; a larger share is accumulated.",
    )
    schedule: Literal["linear", "cosine", "one_cycle", "constant"] = Field(
        "linear", description="How the rate falls after warm-up."
    )
    warmup_fraction: float = Field(
        0.0, ge=0, lt=1, description="Share of all steps in which the rate rises."
    )
    clip_norm: float | None = Field(
        None, gt=0, description="Largest norm of the whole gradient; larger ones are scaled down."
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Keep and use an exponential moving average of the weights, by step.",
    )
    label_smoothing: float = Field(
        0.1, ge=0, lt=1, description="Share of the target spread evenly over all classes."
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="balanced: rare classes count as much in all as frequent ones."
    )


class Stage(Part):
    until: float = Field(1.0, gt=0, le=1, description="Share of all steps at which it ends.")
    scale: float = Field(
        1.0, ge=0.05, le=1, description="Shrink images to this share of their height and width."
    )
    crop: float = Field(
        1.0, ge=0.05, le=1, description="Cut out this share of the height and width, anywhere."
    )

    @property
    def side(self) -> float:
        """Share of height and width that the net sees."""
        return self.scale * self.crop


def _last_to_the_end(stages: Sequence[Stage]) -> Sequence[Stage]:
    ends = [stage.until for stage in stages]
    if ends != sorted(set(ends)) or ends[-1] != 1:
        raise ValueError("stages end one after the other, the last at 1")
    return stages


class Augment(Part):
    stages: Annotated[tuple[Stage, ...], AfterValidator(_last_to_the_end)] = Field(
        (Stage(),),
        min_length=1,
        description="Smaller images for a part of the run, which takes less time; whole ones are "
        "evaluated.",
    )
    flip: bool = Field(False, description="Mirror left and right, alternating by epoch.")
    translate: int = Field(0, ge=0, le=64, description="Shift by up to this many pixels.")
    crop_area: float | None = Field(
        None, gt=0, le=1, description="Zoom into a random crop of at least this share of the area."
    )
    cutout: int = Field(0, ge=0, le=256, description="Grey out a square of this many pixels.")
    mixup: float = Field(
        0, ge=0, le=10, description="Blend pairs of images; the alpha of the share's Beta."
    )
    cutmix: float = Field(
        0, ge=0, le=10, description="Paste boxes between pairs; the alpha of the share's Beta."
    )


class Stop(Part):
    metric: str | None = Field(
        None, description="End the run early when this metric of an epoch no longer gets better."
    )
    patience: int = Field(3, ge=1, le=10_000, description="Epochs without a better value.")


class Workers(Part):
    num: Annotated[tuple[Count, Count], BeforeValidator(_span)] = Field(
        (2, 2),
        description="Training workers, one process each; [least, most] grows and shrinks with "
        "the cluster.",
    )
    gpu: bool = Field(False, description="One GPU for each worker.")
    cpus: float = Field(1, gt=0, le=1024, description="Cores for each worker.")
    lanes: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="Parts that every global batch is divided into, so most workers that can "
        "share it; fixed for the run. The most workers by default.",
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="A whole copy of the net in each worker, or (fsdp) a shard of it."
    )
    max_failures: int = Field(
        3, ge=0, le=1000, description="Failures of workers after which the run gives up."
    )

    @property
    def most(self) -> int:
        return self.num[1]

    @property
    def all_cpus(self) -> int:
        """Cores for the most workers."""
        return math.ceil(self.most * self.cpus)


class Checkpoint(Part):
    every_steps: int | None = Field(
        None, ge=1, description="Steps between checkpoints within an epoch; by time alone if none."
    )
    every_minutes: float = Field(
        5, gt=0, le=1440, description="Minutes between checkpoints within an epoch."
    )
    keep: int = Field(2, ge=1, le=1000, description="Latest checkpoints to keep, besides the best.")
    best: str | None = Field(
        None,
        description="Metric whose best epoch becomes the model, or last; the task's own metric by "
        "default.",
    )


Variant = Literal[
    "fp32",
    "bf16",
    "fp16",
    "int8",
    "fp8",
    "int8_static",
    "int8_dynamic",
    "int8_weights",
    "pruned",
    "pruned_int8",
    "distilled",
    "distilled_int8",
]


class Prune(Part):
    """Whole channels removed, those first that matter least; then trained on."""

    share: float = Field(
        0.25,
        gt=0,
        le=0.9,
        description="Share of channels removed in each layer; the rest is rounded down to blocks "
        "of 16.",
    )
    epochs: int = Field(6, ge=1, le=10_000, description="Epochs of training afterwards.")
    rate: float = Field(
        0.5, gt=0, le=10, description="Peak rates afterwards, as a share of those in optim."
    )


class Distill(Part):
    """A smaller net that learns from the outputs of the trained one."""

    net: Annotated[Net | None, BeforeValidator(_own_alone)] = Field(
        None, description="The student; by default the same net with half the widths."
    )
    epochs: int | None = Field(
        None, ge=1, le=10_000, description="Epochs of the student; optim.epochs by default."
    )
    share: float = Field(
        0.9, ge=0, le=1, description="Share of the loss that is the teacher's; when pruned too."
    )
    temperature: float = Field(
        2.0, gt=0, le=100, description="Softens the teacher's probabilities; when pruned too."
    )


class Compress(Part):
    variants: tuple[Variant, ...] = Field(
        ("int8_static", "int8_dynamic", "int8_weights"),
        description="Variants to make besides fp32. pruned… and distilled… train again.",
    )
    max_accuracy_drop: float = Field(
        0.005,
        ge=0,
        le=1,
        description="Largest accepted loss of a variant on held-out records, in the task's metric; "
        "of errors in standard deviations of the target.",
    )
    max_change: float = Field(
        0.03,
        ge=0,
        le=10,
        description="Largest accepted mean change of the probabilities (half the sum of the "
        "differences), or of values in deviations, by forms of the same net.",
    )
    strict: bool = Field(
        False,
        description="Accept only what is within even at the far end of the confidence interval, "
        "for which a drop of 0.005 takes thousands of validation records.",
    )
    optimize_for: Literal["throughput", "latency", "size"] = Field(
        "throughput", description="What the default variant is best in, of those accepted."
    )
    calibration_records: int = Field(
        512, ge=2, le=100_000, description="Training records to measure activation ranges on."
    )
    calibration: tuple[Literal["minmax", "percentile", "entropy"], ...] = Field(
        ("minmax", "percentile", "entropy"),
        min_length=1,
        description="Ways to choose activation ranges; the one that changes outputs least is kept.",
    )
    aware_epochs: int = Field(
        2,
        ge=0,
        le=10_000,
        description="Epochs of quantization-aware training where static int8 is not accepted.",
    )
    measure_seconds: float = Field(
        10,
        gt=0,
        le=3600,
        description="Rounds of measuring latencies begin for so long; there are at least five.",
    )
    prune: Prune = Prune()
    distill: Distill = Distill()


class Registry(Part):
    enabled: bool = Field(True, description="Register the bundle as a model version in MLflow.")
    metric: str | None = Field(
        None,
        description="What a version must not be worse in to become production; the task's own "
        "metric on the validation split by default.",
    )


class Storage(Part):
    path: str = Field("runs", description="Directory or URL for runs, data shards and registry.")


class Config(Part):
    """One training run."""

    name: str = Field(pattern=MODEL_NAME, description="The model's name in the registry.")
    seed: int = Field(0, ge=0, lt=2**32, description="Of initial weights, order, augmentation.")
    target: str = Field("label", description="The column to predict.")
    learn: Literal["class", "labels", "value"] | None = Field(
        None,
        description="Whether the target is one class, any number of labels, or a number; found "
        "by looking at it by default.",
    )
    features: dict[str, Annotated[Column, BeforeValidator(_kind_alone)]] = Field(
        {},
        description="What each column to predict from is; found by looking at the records by "
        "default.",
    )
    task: str | None = Field(
        None, description="package.module:Class of a task of your own, a train.tasks.Task."
    )
    init: str | None = Field(
        None,
        description="models:/NAME@ALIAS, models:/NAME/VERSION or a bundle, whose weights, features "
        "and target to begin with.",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto is bf16 where the device computes in it, else fp32."
    )
    compile: bool = Field(
        False, description="Compile the net by torch.compile; needs a C compiler."
    )
    activation_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass, to save memory."
    )
    profile: CliImplicitFlag[bool] = Field(
        False, description="Write a torch profiler trace of some steps beside the checkpoints."
    )
    resume: str | None = Field(
        None,
        pattern=FILE_NAME,
        description="Name of a run under storage.path to continue where it stopped.",
    )
    plugins: tuple[str, ...] = Field(
        (),
        description="Modules whose classes a bundle may name: my_package, and what is below it. "
        "The modules of classes that these options themselves name are among them.",
    )
    data: Data
    text: Text = Text()
    net: Annotated[Net, BeforeValidator(_own_alone)] = Net()
    optim: Optim = Optim()
    augment: Augment = Augment()
    stop: Stop = Stop()
    workers: Workers = Workers()
    checkpoint: Checkpoint = Checkpoint()
    compress: Compress = Compress()
    registry: Registry = Registry()
    storage: Storage = Storage()

    @model_validator(mode="after")
    def _target_is_no_feature(self) -> Self:
        if self.target in self.features:
            raise ValueError(f"features hold the target '{self.target}'; leave it out of them")
        return self

    @model_validator(mode="after")
    def _chooses_by_unseen_records(self) -> Self:
        if self.data.train_on_valid and (self.checkpoint.best != LAST or self.stop.metric):
            raise ValueError(
                "data.train_on_valid leaves no records to choose an epoch by; give "
                "--checkpoint.best last, and no stop.metric"
            )
        return self


def validate(values: Mapping[str, Any]) -> Config:
    """Return the options of a user; the code that they name may be imported from here on.

    Options that come from a bundle are no user's own, and pass `of_bundle` first.
    Raises UserError for the first field that is wrong.
    """
    return allow_code(validate_as(Config, values))


def allow_code(config: Config) -> Config:
    """Let this process import the code that a user's own options name.

    Returns them with the modules of that code among `plugins`, for other processes of the run.
    """
    named = [path.partition(":")[0] for path in code_of_config(config.model_dump())]
    allowed = tuple(sorted({*config.plugins, *named}))
    if allowed != config.plugins:
        config = config.model_copy(update={"plugins": allowed})
    allow_plugins(config)
    return config


def allow_plugins(config: Config) -> None:
    """Let this process import the code of `plugins`; nothing that lies below the storage path."""
    path = storage.resolve(config.storage.path)
    plugins.allow(config.plugins, storage=None if storage.is_url(path) else path)


def of_bundle(values: Mapping[str, Any], given: Sequence[str] = ()) -> dict[str, Any]:
    """Return a bundle's options with the plugins that a user gave, and no others.

    Raises UserError where they name code that is not among these.
    """
    try:
        plugins.check(code_of_config(values), "the options of the bundle")
    except plugins.NotAllowed as error:
        raise UserError(str(error)) from error
    return {**values, "plugins": list(given)}


def validate_as(model: type[AnyModel], values: Mapping[str, Any]) -> AnyModel:
    """Raises UserError for the first field that is wrong."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(describe(error, model)) from error


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """Say in one line which field is wrong, what came and what is accepted."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    where = ".".join(path)
    if first["type"] == "extra_forbidden":
        return f"unknown option '{where}'; accepted are {', '.join(_fields(model, path[:-1]))}."
    if first["type"] == "missing":
        return f"option '{where}' is missing; give --{where} VALUE or add it to the config file."
    message = first["msg"].removeprefix("Value error, ")
    if not where:  # of several options together
        return f"{message}."
    message = message[0].lower() + message[1:]
    return f"option '{where}' is {first['input']!r}; {message}."


def _fields(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        annotation = model.model_fields[part].annotation
        kinds = [annotation, *get_args(annotation)]
        model = next(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
    return list(model.model_fields)
