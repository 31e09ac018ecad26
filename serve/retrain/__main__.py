"""Retraining of a model on labelled requests, if its requests drift or its errors increase.

`python -m serve.retrain --model NAME [--check] [--dry-run] [--force] [--option VALUE …]`

Training starts from the weights of the version in production and uses the earlier training records
and the labelled requests. The new version becomes the candidate, never production, and only if it
is better on held-out requests and not worse on the old test records.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet
import yaml
from pydantic import BeforeValidator, Field
from pydantic_settings import SettingsConfigDict

from cluster import commit, storage
from cluster.cli import CommandOptions, parse_options, run_command
from cluster.errors import CommandFailed, UserError
from serve.config import Names, StoragePath, set_bundle_policy
from serve.config.sections import PublicKeys
from serve.requestlog import files
from serve.requestlog.reader import read_labelled
from serve.retrain import launcher, lock
from serve.retrain.dataset import LabelledSplit, split_labelled, usable_rows
from serve.retrain.history import RetrainHistory
from serve.retrain.trigger import RetrainDecision, RetrainRules, decide_retrain
from serve.rollout import comparison
from serve.rollout.monitor_state import MonitorState
from train.bundle import Bundle, CorruptBundle, publishing, registry, signature
from train.data.reading import sources

MAX_GROUP_ROWS = 16_384

Read = Callable[[str, str], pa.Table]
Train = Callable[[str, str | None, float], dict[str, Any]]


class RetrainOptions(CommandOptions):
    """Retrain a model on labelled requests if its inputs drift or its error has increased."""

    model_config = SettingsConfigDict(cli_prog_name="python -m serve.retrain")

    model: Annotated[str, BeforeValidator(registry.name_in_production)] = Field(
        pattern=storage.MODEL_NAME,
        description="Name of the model in the registry, or models:/NAME@production.",
    )
    check: bool = Field(False, description="Retrain if due. This is also the default.")
    dry_run: bool = Field(False, description="Report what would be done without doing it.")
    force: bool = Field(False, description="Retrain if not due or within --cooldown-hours, too.")
    storage: StoragePath = Field(
        "runs",
        validate_default=True,
        description="Directory or URL of the storage that contains the registry and request log.",
    )
    plugins: Names = Field(
        (), description="Python modules from which models may import classes, such as my_package."
    )
    require_signature: PublicKeys = Field(
        (),
        description="Public keys, PEM files; only bundles signed by one of these keys are loaded. "
        "By default signatures are not checked.",
    )
    signing_key: str | None = Field(
        None,
        description="PEM file with an elliptic curve's private key, which signs the new version. "
        "By default the variable HALYARD_SIGNING_KEY, which is a path or the key itself.",
    )
    windows: int = Field(
        2, ge=1, le=50, description="Number of windows with drift alarms that make retraining due."
    )
    of: int = Field(5, ge=1, le=50, description="Number of most recent windows to look at.")
    max_drop: float = Field(
        0.02,
        ge=0,
        le=1,
        description="Tolerated loss: of the live metric against the test split, and of the new "
        "version against production on it. An RMSE is in standard deviations of the target.",
    )
    min_labelled: int = Field(200, ge=2, description="Minimum labelled records for retraining.")
    mix: float = Field(
        0.5, gt=0, le=0.95, description="Fraction of the training samples that are new records."
    )
    epochs: int | None = Field(
        None, ge=1, le=10_000, description="Epochs; default: a third of the first training's."
    )
    cooldown_hours: float = Field(24, ge=0, description="Minimum hours between two trainings.")
    lease_hours: float = Field(
        6, gt=0, le=720, description="Maximum hours of a training; then another command may start."
    )
    submit: str | None = Field(
        None,
        description="Address of a Ray dashboard, such as http://127.0.0.1:8265, to train there as "
        "a job. By default training is a child process, which joins the cluster at RAY_ADDRESS.",
    )


def parse(argv: Sequence[str]) -> RetrainOptions:
    """Return the options of a command line. Raises UserError, which names the invalid option."""
    return parse_options(RetrainOptions, argv)


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Run the command; return what it prints. Raises UserError and CommandFailed."""
    return retrain(parse(argv), read_labelled, launcher.run_training)


def retrain(options: RetrainOptions, read: Read, train: Train) -> dict[str, Any]:
    """Retrain a model if it is due; return what the command prints.

    read: see `read_labelled`. train: see `launcher.run_training`. Raises UserError if no version is
    in production or a key cannot be used, CommandFailed if training fails.
    """
    root = options.storage
    if not signature.has_key(options.signing_key) and options.require_signature:
        raise UserError("--require-signature needs --signing-key to sign the new version.")
    set_bundle_policy(options.plugins, options.storage, options.require_signature)
    production, version = _production(options.model, root)
    state = RetrainHistory(root, options.model)
    decision = _decision(options, root, production, version)
    if options.force and not decision.due:
        decision = RetrainDecision(True, f"--force was given ({decision.reason})")
    blocked = None if options.force else state.cooling(options.cooldown_hours)
    if not decision.due or blocked:
        return _told(options, decision, blocked or decision.reason)
    production.check_trainable()
    new = split_labelled(usable_rows(read(root, options.model), production.task), production.task)
    known = len(new.training) + len(new.held_out)
    if known < options.min_labelled or not (len(new.training) and len(new.held_out)):
        few = f"{known} labelled records are too few; {options.min_labelled} are needed"
        return _told(options, decision, few)
    if options.dry_run:
        where = f"as a job at {options.submit}" if options.submit else "here"
        words = (
            f"would train {where} for {_epochs(options, production)} epochs on {len(new.training)} "
            f"new and all earlier training records, and compare on {len(new.held_out)} held out"
        )
        return _told(options, decision, words)
    try:
        with lock.hold_lock(state.url("lease"), options.lease_hours) as own:
            return _retrain(options, root, decision, new, production, version, state, own, train)
    except lock.LockHeld as error:
        return _told(options, decision, f"another command is retraining: {error}")


def _told(options: RetrainOptions, decision: RetrainDecision, reason: str) -> dict[str, Any]:
    """Print why nothing is trained; return what the command prints."""
    state = f"is due ({decision.reason})" if decision.due else "is not due"
    print(f"{options.model}: retraining {state}: {reason}", file=sys.stderr)
    return {
        "model": options.model,
        "retrained": False,
        "due": decision.due,
        "reason": reason,
        "because": decision.reason,
    }


def _production(model: str, root: str) -> tuple[Bundle, str]:
    try:
        return registry.load_bundle(f"{registry.SCHEME}{model}@{registry.PRODUCTION}", root)
    except CorruptBundle as error:
        raise UserError(str(error)) from error


def _decision(
    options: RetrainOptions, root: str, production: Bundle, version: str
) -> RetrainDecision:
    rules = RetrainRules(
        options.windows, options.of, options.max_drop, comparison.error_unit(production.task)
    )
    return decide_retrain(MonitorState.read(root, options.model), version, rules)


def _epochs(options: RetrainOptions, production: Bundle) -> int:
    manifest = production.manifest
    first = manifest.lineage.get("init_epochs", manifest.config["optim"]["epochs"])
    return options.epochs or max(1, first // 3)


def _retrain(
    options: RetrainOptions,
    root: str,
    decision: RetrainDecision,
    new: LabelledSplit,
    production: Bundle,
    version: str,
    state: RetrainHistory,
    own: lock.FileLock,
    train: Train,
) -> dict[str, Any]:
    """Train, compare and register; record the outcome in the history, also of a failure."""
    began = datetime.now(UTC)
    print(f"{options.model}: retraining: {decision.reason}", file=sys.stderr)
    entry = {
        "began": began.isoformat(timespec="seconds"),
        "because": decision.reason,
        "from": version,
        "num_training": len(new.training),
        "num_held_out": len(new.held_out),
        "outcome": "began",
    }
    # Recorded before training, so that a training that is killed counts for the cooldown too.
    state.note(entry)
    try:
        config_url = _written(options, root, new.training, production, version, state, began)
        result = train(config_url, options.submit, options.lease_hours * 3600)
        candidate = Bundle.load(result["bundle"])
        verdict = comparison.comparison_outcome(
            production, candidate, new.held_out, options.max_drop
        )
        entry |= {"bundle": candidate.location, **verdict}
        own.check()
        if verdict["outcome"] == "registered":
            entry |= _registered(options.model, root, candidate, verdict)
    except Exception as error:
        state.note({**entry, "outcome": "failed", "reason": " ".join(str(error).split())[:300]})
        if isinstance(error, CorruptBundle):
            raise CommandFailed(str(error)) from error
        raise
    state.note(entry)
    print(f"{options.model}: {entry['outcome']}: {entry['reason']}", file=sys.stderr)
    return {"model": options.model, "retrained": True, "due": True, **entry}


def _written(
    options: RetrainOptions,
    root: str,
    training: pa.Table,
    production: Bundle,
    version: str,
    state: RetrainHistory,
    began: datetime,
) -> str:
    """Write the new records and the training config; return the config's path or URL."""
    name = f"{began:%Y%m%d-%H%M%S}"
    extra, config_url = state.url(f"{name}.parquet"), state.url(f"{name}.yaml")
    buffer = pa.BufferOutputStream()
    pa.parquet.write_table(training, buffer, row_group_size=MAX_GROUP_ROWS)
    config = training_config_of(options, root, production, version, extra)
    with storage.storage_errors(root):
        commit.write_atomic(extra, buffer.getvalue().to_pybytes(), files.PRIVATE)
        commit.write_atomic(config_url, yaml.safe_dump(config, allow_unicode=True).encode())
    return config_url


def training_config_of(
    options: RetrainOptions, root: str, production: Bundle, version: str, extra: str
) -> dict[str, Any]:
    """Return the options that production was trained with, changed for this training.

    version: of production. extra: path or URL of the new records.
    """
    config = production.manifest.config
    data = {
        name: _absolute(value) if name in ("train", "valid", "test") else value
        for name, value in config["data"].items()
    }
    return {
        **config,
        "plugins": list(options.plugins),
        "init": f"{registry.SCHEME}{options.model}/{version}",
        "resume": None,
        "profile": False,
        "data": {**data, "extra": extra, "extra_fraction": options.mix},
        "optim": {**config["optim"], "epochs": _epochs(options, production)},
        "registry": {**config["registry"], "enabled": False},
        "storage": {"path": root, "signing_key": _absolute(options.signing_key)},
    }


def _absolute(url: str | None) -> str | None:
    """Return a path as an absolute one, because a job runs in another directory."""
    if url is None or storage.is_url(url) or url == sources.DIGITS:
        return url
    return str(Path(url).absolute())


def _registered(
    model: str, root: str, candidate: Bundle, verdict: Mapping[str, Any]
) -> dict[str, Any]:
    """Register a bundle as candidate, with the figures of its epochs and of the comparison."""
    tags = {f"retrain.{key}": str(value) for key, value in verdict["figures"].items()}
    history = json.loads((candidate.path / "report" / "history.json").read_text())
    with publishing.RunRecorder(root, model, candidate.manifest.config) as recording:
        for row in history:
            recording.observe({"event": "epoch", **row})
        return publishing.publish(
            candidate, recording, root, None, candidate=verdict["reason"], tags=tags
        )


if __name__ == "__main__":
    run_command(main)
