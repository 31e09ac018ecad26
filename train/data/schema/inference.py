"""Inference of a run's config: task type, kinds of columns, and training defaults for them.

Only options that the config does not set are filled in. Shapes: N records, K classes or labels.
"""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cluster import commit, storage
from cluster.errors import UserError
from train.config import Augment, Config, validate_config
from train.data import fitting, warm_start
from train.data.reading import sources
from train.data.reading.csv_files import CsvOptions
from train.data.reading.folders import split_folders
from train.data.reading.samples import check_names, sample_source
from train.data.schema.columns import InferredColumn, infer_column
from train.data.schema.defaults import suited_defaults
from train.data.schema.styles import FileStyle, infer_style
from train.data.schema.target_type import infer_task_type
from train.data.warm_start import CompletedConfig, fill_missing
from train.nets.pretrained.checkpoints import PretrainedCheckpoint
from train.nets.pretrained.hub import find_checkpoint
from train.tasks import TARGETS, Images, InvalidRecord, ValueTarget
from train.values.records import is_missing

# Number of first records that inference examines.
LOOKED_AT = 10_000
# A table of this size has some hundred thousand records.
LARGE_BYTES = 32 << 20


def check_source(config: Config) -> None:
    """Check, before Ray starts, that the training source exists and has the configured columns.

    Also that a pretrained encoder is there. Raises UserError that names the missing source, column
    or file.
    """
    data = config.data
    if config.net.pretrained is not None and config.net.checkpoint is None:
        find_checkpoint(config.net.pretrained)
    # With init, the columns come from the bundle.
    wanted = [config.target, *config.features, *data.drop] if config.init is None else []
    check_names(data.train, wanted, CsvOptions(data.encoding, data.delimiter, data.quotes))


def complete_config(config: Config) -> CompletedConfig:
    """Fill in the options that are not set: features, task type, and training defaults for them.

    With `init`, features and task type come from the bundle. Raises UserError if an option cannot
    be inferred from the records or conflicts with the bundle.
    """
    if config.init is None:
        return CompletedConfig(_inferred(config))
    config, bundle = warm_start.inherit_options(config)
    return CompletedConfig(_inferred(config), bundle)


def _inferred(config: Config) -> Config:
    """Return the config with unset options inferred from the training records."""
    if config.task is not None and not config.features:
        raise UserError(
            f"task is '{config.task}', but features are not given; list them for a custom task."
        )
    config = _with_split_folders(_with_checkpoint(config))
    if config.features and config.task_type is not None and _is_settled(config):
        return config
    source = sources.find_source(config.data.train)
    csv = CsvOptions(config.data.encoding, config.data.delimiter, config.data.quotes)
    looked_at = sample_source(source, LOOKED_AT, csv)
    wanted = [config.target, *config.data.drop, *config.features]
    sources.check_columns(config.data.train, wanted, list(looked_at))
    found: dict[str, Any] = {}
    decisions = []
    style = FileStyle(config.data.decimal) if config.data.decimal else infer_style(looked_at)
    task_type: str | None = config.task_type
    if task_type is None:
        task_type, why = infer_task_type(looked_at[config.target], style.decimal)
        found["task_type"] = task_type
        if task_type == ValueTarget.kind and style.decimal:
            found["data"] = {"decimal": style.decimal}
        decisions.append(InferredColumn(config.target, f"target: {task_type}", why))
    if not config.features:
        columns = {name: values for name, values in looked_at.items() if name != config.target}
        targets_N = _target_numbers(config.target, looked_at[config.target], task_type, style)
        chosen = [
            InferredColumn(name, None, "data.drop")
            if name in config.data.drop
            else InferredColumn(name, None, "data.split_key")
            if name == config.data.split_key
            else infer_column(name, values, style=style, targets_N=targets_N)
            for name, values in columns.items()
        ]
        found["features"] = {
            each.column: {"kind": each.kind, **each.options} for each in chosen if each.kind
        }
        decisions += chosen
        if not found["features"]:
            raise UserError(
                f"'{config.data.train}' has no column to predict '{config.target}' from: "
                + ("; ".join(f"{each.column}: {each.why}" for each in chosen) or "no other columns")
            )
    if decisions:
        _show(decisions)
    given = config.model_dump(mode="json", exclude_unset=True)
    features = _features_for_encoder(config, found.get("features") or given["features"])
    found["features"] = features
    kinds = {feature["kind"] for feature in features.values()}
    num_known = len(looked_at[config.target])
    suited = suited_defaults(
        kinds,
        num_known,
        is_large=source.size_bytes > LARGE_BYTES,
        train_on_valid=config.data.train_on_valid,
        net=config.net,
    )
    if Images.kind in kinds and config.augment != Augment() and "stop" in suited:
        suited["stop"]["folds"] = 0  # each fold would run the encoder again in every epoch
    if config.checkpoint.metric is not None:  # a configured metric chooses an epoch of a single run
        suited.get("stop", {}).pop("folds", None)
    return validate_config(fill_missing(given, {**suited, **found}))


def _with_checkpoint(config: Config) -> Config:
    """Fill in what the files of a pretrained encoder say: architecture, tokenizer, positions."""
    if config.net.pretrained is None or config.net.checkpoint is not None:
        return config
    checkpoint = find_checkpoint(config.net.pretrained)
    if checkpoint.licence is None:
        print(f"'{checkpoint.name}' names no licence; check it before use.", file=sys.stderr)
    given = config.model_dump(mode="json", exclude_unset=True)
    known: dict[str, Any] = {"net": {"checkpoint": checkpoint.facts}}
    if checkpoint.kind == "image":
        return validate_config(fill_missing(given, known))
    most = checkpoint.max_tokens
    if most and config.text.max_tokens > most and "max_tokens" in config.text.model_fields_set:
        raise UserError(
            f"text.max_tokens is {config.text.max_tokens}, and '{checkpoint.name}' has positions "
            f"for {most} tokens; give at most {most}."
        )
    known["text"] = {"tokenizer": _stored_tokenizer(config, checkpoint)}
    if most:
        known["text"]["max_tokens"] = min(config.text.max_tokens, most)
    return validate_config(fill_missing(given, known))


def _stored_tokenizer(config: Config, checkpoint: PretrainedCheckpoint) -> str:
    """Copy a checkpoint's tokenizer to the run's storage, where every later step finds it."""
    content = checkpoint.tokenizer.read_bytes()
    name = f"tokenizer-{hashlib.sha256(content).hexdigest()[:20]}.json"
    url = storage.join_path(config.storage.root, "data", name)
    if not storage.exists(url):
        commit.write_atomic(url, content)
    return url


def _features_for_encoder(config: Config, features: Mapping[str, Any]) -> dict[str, Any]:
    """Return the features with the image size that the pretrained encoder was trained on.

    Raises UserError if no feature is of the encoder's kind.
    """
    known = config.net.checkpoint
    if known is None:
        return dict(features)
    columns = [name for name, feature in features.items() if feature["kind"] == known["kind"]]
    if not columns:
        raise UserError(
            f"net.pretrained is '{config.net.pretrained}', an encoder of the kind {known['kind']}, "
            "and no feature is of this kind."
        )
    if known["kind"] == Images.kind:
        size = {"size": known["image"]["size"]}
        return {
            name: {**size, **feature} if name in columns else feature
            for name, feature in features.items()
        }
    return dict(features)


def _with_split_folders(config: Config) -> Config:
    """Set data.train, valid and test to the split folders of an image folder, if it has any."""
    found, others = split_folders(config.data.train)
    given = {name: getattr(config.data, name) for name in ("valid", "test")}
    if "train" not in found or any(given.values()):
        return config
    print(
        f"'{config.data.train}' has a folder for each split: {', '.join(found.values())}.",
        file=sys.stderr,
    )
    if others:
        print(
            f"Ignored because they are not splits with class folders: {', '.join(others)}.",
            file=sys.stderr,
        )
    data = config.model_dump(mode="json", exclude_unset=True)
    data["data"] |= found
    return validate_config(data)


def _is_settled(config: Config) -> bool:
    """Return whether the config sets all options that `suited_defaults` would fill in."""
    kinds = {feature.kind for feature in config.features.values()}
    given = config.model_dump(mode="json", exclude_unset=True)
    suited = suited_defaults(
        kinds, LOOKED_AT, train_on_valid=config.data.train_on_valid, net=config.net
    )
    features = _features_for_encoder(config, given["features"])
    return fill_missing(given, {**suited, "features": features}) == given


def _target_numbers(
    column: str, values: Sequence[Any] | np.ndarray, task_type: str, style: FileStyle
) -> np.ndarray | None:
    """Return the target as numbers [N] or 0/1 indicators [N, K], NaN where it is missing."""
    known_N = np.array([not is_missing(value) for value in values], bool)
    known = [value for value, is_known in zip(values, known_N, strict=True) if is_known]
    options = {"decimal": style.decimal} if task_type == ValueTarget.kind else {}
    try:
        target = TARGETS[task_type](column, **options).fit(known)  # type: ignore[call-arg]
        numbers_N = fitting.target_numbers(target, known)
    except InvalidRecord:  # reported when the target is fitted to all records
        return None
    if numbers_N is None:
        return None
    found_N = np.full((len(values), *numbers_N.shape[1:]), np.nan)
    found_N[known_N] = numbers_N
    return found_N


def _show(decisions: Sequence[InferredColumn]) -> None:
    table = Table("column", "used as", "reason", box=None, header_style="bold")
    for each in decisions:
        table.add_row(each.column, each.kind or "not used", each.why)
    Console(stderr=True).print(table)
