"""Every option of a training run: bounded, documented, strict."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_settings import CliImplicitFlag

from cluster import storage
from cluster.errors import UserError
from cluster.storage import FILE_NAME, MODEL_NAME
from train.config.compression import Compress, Distill, Prune, Variant
from train.config.data import Column, Data, Text, kind_alone
from train.config.net import Net, class_path_alone
from train.config.section import ColumnName, Section
from train.config.training import (
    Augment,
    Checkpoint,
    DecisionRule,
    Optim,
    Stage,
    Stop,
    Workers,
)
from train.config.validation import describe_error, validate_as
from train.metrics import LAST
from train.tasks import plugins
from train.tasks.plugins import code_of_config


class Registry(Section):
    enabled: bool = Field(True, description="Register the bundle as a model version in MLflow.")
    metric: str | None = Field(
        None,
        description="What a version must not be worse in to become production; the task's own "
        "metric on the validation split by default.",
    )


class Storage(Section):
    path: str = Field(
        "runs", description="Directory or URL for runs, data shards and registry; also --storage."
    )
    signing_key: str | None = Field(
        None,
        description="Private key, a PEM file of an elliptic curve, that signs bundles; by default "
        "the one that HALYARD_SIGNING_KEY names or holds, or none.",
    )

    @property
    def root(self) -> str:
        """`path` as a URL or an absolute path, for this process's current directory."""
        return storage.resolve_path(self.path)


class Config(Section):
    """One training run."""

    name: str = Field(pattern=MODEL_NAME, description="The model's name in the registry.")
    seed: int = Field(0, ge=0, lt=2**32, description="Of initial weights, order, augmentation.")
    target: ColumnName = Field("label", description="The column to predict.")
    task_type: Literal["classification", "multilabel", "regression"] | None = Field(
        None,
        description="One class, any number of labels, or a number to predict; inferred from the "
        "target by default.",
    )
    quantile: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Predict this quantile of a number, 0.9 say, in place of its middle.",
    )
    features: dict[ColumnName, Annotated[Column, BeforeValidator(kind_alone)]] = Field(
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
    net: Annotated[Net, BeforeValidator(class_path_alone)] = Net()
    optim: Optim = Optim()
    augment: Augment = Augment()
    stop: Stop = Stop()
    workers: Workers = Workers()
    checkpoint: Checkpoint = Checkpoint()
    decision_rule: DecisionRule = DecisionRule()
    compress: Compress = Compress()
    registry: Registry = Registry()
    storage: Storage = Storage()

    @model_validator(mode="after")
    def _target_is_no_feature(self) -> Self:
        if self.target in self.features:
            raise ValueError(f"features hold the target '{self.target}'; leave it out of them")
        return self

    @property
    def epoch_metric(self) -> str | None:
        """The metric whose best epoch becomes the model; None for the task's own."""
        return self.checkpoint.metric or self.stop.metric

    @model_validator(mode="after")
    def _chooses_epochs_once(self) -> Self:
        if self.stop.folds and self.checkpoint.metric not in (None, LAST):
            raise ValueError(
                "stop.folds chooses the number of epochs, and checkpoint.metric one of them; give "
                "one"
            )
        return self

    @model_validator(mode="after")
    def _chooses_by_unseen_records(self) -> Self:
        if self.data.train_on_valid and (self.checkpoint.metric != LAST or self.stop.metric):
            raise ValueError(
                "data.train_on_valid leaves no records to choose an epoch by; give "
                "--checkpoint.metric last, and no stop.metric"
            )
        return self


def validate_config(values: Mapping[str, Any]) -> Config:
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
    root = config.storage.root
    plugins.allow_modules(config.plugins, storage=None if storage.is_url(root) else root)


def portable_options(config: Config) -> dict[str, Any]:
    """The options for a process whose current directory may be another: its paths are absolute."""
    values = config.model_dump(mode="json")
    values["storage"]["path"] = config.storage.root
    return values


def bundle_config(values: Mapping[str, Any], given: Sequence[str] = ()) -> dict[str, Any]:
    """Return a bundle's options with the plugins that a user gave, and no others.

    Raises UserError where they name code that is not among these.
    """
    try:
        plugins.check_allowed(code_of_config(values), "the options of the bundle")
    except plugins.NotAllowed as error:
        raise UserError(str(error)) from error
    return {**values, "plugins": list(given)}


__all__ = [
    "LAST",
    "Augment",
    "Checkpoint",
    "Column",
    "Compress",
    "Config",
    "Data",
    "DecisionRule",
    "Distill",
    "Net",
    "Optim",
    "Prune",
    "Registry",
    "Section",
    "Stage",
    "Stop",
    "Storage",
    "Text",
    "Variant",
    "Workers",
    "allow_code",
    "allow_plugins",
    "bundle_config",
    "describe_error",
    "portable_options",
    "validate_as",
    "validate_config",
]
