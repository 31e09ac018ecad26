"""All options of a training run, with their bounds and descriptions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_settings import CliImplicitFlag

from cluster import storage
from cluster.errors import UserError
from cluster.storage import FILE_NAME, MODEL_NAME
from train.config.augmentation import Augment, Stage
from train.config.compression import Compress, Distill, Prune, Variant
from train.config.data import Column, Data, Text, kind_alone
from train.config.files import default_model_name, load_yaml
from train.config.net import Net, class_path_alone
from train.config.section import ColumnName, Section
from train.config.training import Checkpoint, DecisionRule, Optim, Stop, Workers
from train.config.validation import describe_error, validate_as
from train.metrics import LAST
from train.tasks import plugins
from train.tasks.plugins import code_of_config


class Registry(Section):
    """Options of the registration in MLflow."""

    enabled: bool = Field(
        True,
        description="Register the bundle as a new version of the model in MLflow; with false it is "
        "only kept under storage.path.",
    )
    metric: str | None = Field(
        None,
        description="Validation metric, such as valid_auc, in which a new version must not be "
        "worse than the one in production to replace it; by default the task's main metric.",
    )


class Storage(Section):
    """Options of the place where the results are kept."""

    path: str = Field(
        "runs",
        description="Directory or fsspec URL for runs, encoded data, bundles and the registry; "
        "--storage for short. All nodes of the cluster must reach it.",
    )
    signing_key: str | None = Field(
        None,
        description="PEM file with the private key of an elliptic curve, which signs bundles. By "
        "default the environment variable HALYARD_SIGNING_KEY, which is a path or the key itself; "
        "without either, bundles are not signed.",
    )

    @property
    def root(self) -> str:
        """`path` as a URL or an absolute path, relative to the current directory."""
        return storage.resolve_path(self.path)


class Config(Section):
    """Options of one training run."""

    name: str = Field(
        pattern=MODEL_NAME,
        description="Name of the model in the registry: lowercase letters, digits, - and _. By "
        "default it is derived from the name of the training file.",
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="Seed of initial weights, sample order, augmentation and dropout.",
    )
    target: ColumnName = Field("label", description="Column to predict.")
    task_type: Literal["classification", "multilabel", "regression"] | None = Field(
        None,
        description="What to predict: one class, any number of labels, or a number. By default it "
        "is inferred from the target column.",
    )
    quantile: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Quantile to predict in regression: 0.9 predicts a value that nine of ten "
        "records stay below. By default the loss is Huber's, which predicts a value between median "
        "and mean.",
    )
    features: dict[ColumnName, Annotated[Column, BeforeValidator(kind_alone)]] = Field(
        {},
        description="Input columns and their kinds, such as {age: number, city: category}. By "
        "default they are inferred from the records.",
    )
    task: str | None = Field(
        None,
        description="Custom task as package.module:Class, a subclass of train.tasks.Task; needs "
        "features. By default the task follows from task_type.",
    )
    init: str | None = Field(
        None,
        description="Model to start from: models:/NAME@ALIAS, models:/NAME/VERSION or the path of "
        "a bundle. Its weights, features and target are used. By default weights are random.",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Number format of training. auto is bf16 if the device supports it natively, "
        "otherwise fp32; tables and texts default to fp32.",
    )
    compile: bool = Field(
        False, description="Compile the model with torch.compile, which needs a C compiler."
    )
    activation_checkpointing: bool = Field(
        False,
        description="Recompute activations in the backward pass instead of storing them. Saves "
        "memory and costs time.",
    )
    profile: CliImplicitFlag[bool] = Field(
        False,
        description="Write a torch profiler trace of a few steps to the folder trace of the run.",
    )
    resume: str | None = Field(
        None,
        pattern=FILE_NAME,
        description="Name of a stopped run under storage.path to continue from its last "
        "checkpoint. By default a new run starts.",
    )
    plugins: tuple[str, ...] = Field(
        (),
        description="Python modules, such as my_package, from which bundles may import classes; "
        "their submodules are included. Modules that other options of this run name are added. "
        "Name only code that you trust.",
    )
    data: Data = Field(description="Where the records are, and how they are read and split.")
    text: Text = Field(Text(), description="Tokens of text columns.")
    net: Annotated[Net, BeforeValidator(class_path_alone)] = Field(
        Net(), description="Architecture of the network."
    )
    optim: Optim = Field(Optim(), description="Optimizer and learning rate.")
    augment: Augment = Field(Augment(), description="Augmentation of images.")
    stop: Stop = Field(Stop(), description="End of training before optim.epochs.")
    workers: Workers = Field(Workers(), description="Processes that train.")
    checkpoint: Checkpoint = Field(
        Checkpoint(), description="Checkpoints, which are also written after each epoch."
    )
    decision_rule: DecisionRule = Field(
        DecisionRule(),
        description="Choice of the class or labels. By default the most probable class, and labels "
        "with a probability of at least 0.5.",
    )
    compress: Compress = Field(Compress(), description="Smaller and faster variants of the model.")
    registry: Registry = Field(Registry(), description="Registration of the model in MLflow.")
    storage: Storage = Field(Storage(), description="Place of the results.")

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a YAML file of options. Raises UserError for the first one that is wrong."""
        config = validate_as(cls, load_yaml(path))
        allow_code(config)
        return config

    @model_validator(mode="before")
    @classmethod
    def _named_after_its_data(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or "name" in values:
            return values
        data = values.get("data")
        source = data.get("train") if isinstance(data, Mapping) else getattr(data, "train", None)
        return {**values, "name": default_model_name(source)} if source else values

    @model_validator(mode="after")
    def _target_is_no_feature(self) -> Self:
        if self.target in self.features:
            raise ValueError(f"features contain the target '{self.target}'; remove it")
        return self

    @property
    def epoch_metric(self) -> str | None:
        """Metric whose best epoch becomes the model; None stands for the task's main metric."""
        return self.checkpoint.metric or self.stop.metric

    @model_validator(mode="after")
    def _chooses_epochs_once(self) -> Self:
        if self.stop.folds and self.checkpoint.metric not in (None, LAST):
            raise ValueError(
                "stop.folds and checkpoint.metric both choose the epoch; give only one of them"
            )
        return self

    @model_validator(mode="after")
    def _chooses_by_unseen_records(self) -> Self:
        if self.data.train_on_valid and (self.checkpoint.metric != LAST or self.stop.metric):
            raise ValueError(
                "data.train_on_valid leaves no validation records to choose an epoch by; give "
                "--checkpoint.metric last and no stop.metric"
            )
        return self


def validate_config(values: Mapping[str, Any]) -> Config:
    """Validate a user's options, and allow this process to import the code that they name.

    Options that come from a bundle must go through `bundle_config` first, because a bundle must not
    allow its own code. Raises UserError for the first invalid field.
    """
    return allow_code(validate_as(Config, values))


def allow_code(config: Config) -> Config:
    """Allow this process to import the code that a user's options name.

    Returns the options with the modules of that code added to `plugins`, so that other processes of
    the run can allow them too.
    """
    named = [path.partition(":")[0] for path in code_of_config(config.model_dump())]
    allowed = tuple(sorted({*config.plugins, *named}))
    if allowed != config.plugins:
        config = config.model_copy(update={"plugins": allowed})
    allow_plugins(config)
    return config


def allow_plugins(config: Config) -> None:
    """Allow this process to import the modules in `plugins`, except below the storage path."""
    root = config.storage.root
    plugins.allow_modules(config.plugins, storage=None if storage.is_url(root) else root)


def portable_options(config: Config) -> dict[str, Any]:
    """Return the options as JSON values with absolute paths, for processes elsewhere."""
    values = config.model_dump(mode="json")
    values["storage"]["path"] = config.storage.root
    return values


def bundle_config(values: Mapping[str, Any], given: Sequence[str] = ()) -> dict[str, Any]:
    """Return a bundle's options, with `plugins` replaced by the modules that the user gave.

    Raises UserError if the options name code that the user has not allowed.
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
