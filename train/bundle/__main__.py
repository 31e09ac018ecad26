"""python -m train.bundle import: make a bundle of a model that another library trained."""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import Field
from pydantic_settings import CliPositionalArg, CliUnknownArgs, SettingsConfigDict

from cluster.cli import CommandOptions, parse_options, run_command
from cluster.errors import UserError
from cluster.storage import MODEL_NAME
from train import cli
from train.bundle import publishing, signature
from train.config import Config, validate_config

# Sections of the training options that this command accepts in addition to its own options.
MAY_CHANGE = ("compress", "data", "registry", "seed", "storage", "task_type")
# Few records are needed to calibrate variants and to set the bins of drift detection.
SPLITS = {"valid_fraction": 0.4, "test_fraction": 0.4}


class ImportOptions(CommandOptions):
    """Make a bundle of a model that another library trained, and register it.

    The model is converted to ONNX and compared with the original on a sample of records; the sample
    also gives its metrics, the reference for drift, and the records to judge variants on.
    """

    model_config = SettingsConfigDict(
        cli_prog_name="python -m train.bundle import", cli_ignore_unknown_args=True
    )

    model: CliPositionalArg[str] = Field(
        description="File of a model of ONNX, scikit-learn, XGBoost or LightGBM; weights of a "
        "PyTorch module in safetensors; a folder of a text classifier of transformers, of MLflow, "
        "or of a model in Triton's repository; an archive of TorchServe (.mar) with an "
        "ONNX file; or models:/NAME/VERSION or runs:/ID/PATH in MLflow."
    )
    name: str = Field(
        pattern=MODEL_NAME,
        description="Name in the registry: lowercase letters, digits, - and _.",
    )
    data: str | None = Field(
        None,
        description="File or URL of records with the target, which the model was not trained on. "
        "Without records, an ONNX file is served with its own tensors and is not measured.",
    )
    target: str | None = Field(None, description="Column that the model predicts.")
    allow_pickle: bool = Field(
        False,
        description="Read a pickle, which runs the code in it, in a process of its own without "
        "network. Import only pickles from a source that you trust.",
    )
    classes: list[str] = Field(
        [], description="Names of the classes in the model's order, if it only numbers them."
    )
    class_path: str | None = Field(
        None,
        description="Class of a PyTorch module as package.module:Class, for weights in a "
        "safetensors file. Its constructor takes no arguments, and forward takes the columns as "
        "one tensor of numbers.",
    )
    training: CliUnknownArgs


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Run the command and return its summary, which the caller prints as JSON.

    Raises UserError for another command than import, and as `import_model` does.
    """
    match list(argv):
        case ["import", *rest]:
            return _import(parse_options(ImportOptions, rest))
        case ["-h" | "--help", *_]:
            return _import(parse_options(ImportOptions, ["--help"]))
        case _:
            raise UserError("expected 'python -m train.bundle import FILE --name NAME …'.")


def _import(options: ImportOptions) -> dict[str, Any]:
    from train.importing.formats import find_model_file
    from train.importing.importer import import_model
    from train.importing.unmeasured import import_unmeasured

    config = _config(options)
    root, metric = config.storage.root, config.registry.metric
    signature.has_key(config.storage.signing_key)
    if config.registry.enabled:
        publishing.check_publishable(root, metric)
    with TemporaryDirectory(prefix="import-") as scratch:
        pickles = options.allow_pickle
        file = find_model_file(options.model, root, Path(scratch), allow_pickle=pickles)
        if options.data is None:
            bundle = import_unmeasured(config, file)
        else:
            bundle = import_model(config, file, options.classes, options.class_path)
    if file.options:
        print(f"options for serve run serve.app: {' '.join(file.options)}", file=sys.stderr)
    summary = publishing.bundle_summary(bundle)
    if not config.registry.enabled:
        return summary
    from train.compress.scoring import validation_score

    with publishing.RunRecorder(root, config.name, bundle.manifest.config) as recording:
        completed = Config.model_validate(bundle.manifest.config)
        score = functools.partial(validation_score, completed)
        published = publishing.publish(bundle, recording, root, metric, score=score)
    return summary | published


def _config(options: ImportOptions) -> Config:
    given = cli.read_options(options.training)
    if wrong := sorted(given.keys() - set(MAY_CHANGE)):
        raise UserError(
            f"option --{wrong[0]} applies to training only; this command accepts options of "
            f"{', '.join(MAY_CHANGE)}."
        )
    if (options.data is None) != (options.target is None):
        raise UserError("--data and --target go together; give both, or neither for an ONNX file.")
    return validate_config(
        {
            **given,
            "name": options.name,
            "data": {
                **SPLITS,
                **given.get("data", {}),
                "train": _absolute(options.data or options.model),
            },
            **({"target": options.target} if options.target else {}),
            # Training again to quantize is not possible.
            "compress": {"qat_epochs": 0, **given.get("compress", {})},
        }
    )


def _absolute(path: str) -> str:
    return str(Path(path).absolute()) if Path(path).exists() else path


if __name__ == "__main__":
    run_command(main)
