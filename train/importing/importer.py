"""Import a model that another library trained: compare it with the original, and make a bundle.

Shapes: N records, K classes.
"""

import secrets
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx

from cluster import storage
from cluster.errors import UserError, error_line
from train import reports
from train.bundle import Bundle, BundleWriter, Manifest
from train.bundle.bundle import BASELINE, FEATURES
from train.bundle.engines import run_batches
from train.bundle.engines.onnx_runtime import OnnxRuntimeEngine
from train.bundle.manifest import ImportedModel, TensorMetadata
from train.compress import compress
from train.compress.benchmark import num_cores
from train.config import Config, validate_config
from train.data import dataset
from train.data.baseline import build_baseline
from train.data.data_report import PICTURE, REPORT
from train.data.reading.csv_files import CsvOptions
from train.data.reading.samples import sample_source
from train.data.reading.sources import check_columns, find_source
from train.importing import isolated
from train.importing.formats import FORMATS, ModelFile
from train.importing.graph import adapt_graph
from train.importing.onnx_file import read_model
from train.importing.sample import Sample
from train.importing.task import ImportedTask, define_imported_task
from train.nets.pretrained.checkpoints import TOKENIZER
from train.reports import plots
from train.tasks import ClassTarget, Columns, Numbers, Task, Texts, ValueTarget

# Records on which the imported model is compared with the original.
COMPARED = 100_000
# The same for texts, of which an encoder computes some tens per second.
COMPARED_TEXTS = 1_000
# Largest accepted difference from the original, of probabilities and of values in standard
# deviations of the target. Floats of 32 bits differ by about 1e-6.
MAX_DIFFERENCE = 1e-4
MOST_SHOWN = 3


def import_model(
    config: Config, file: ModelFile, classes: Sequence[str] = (), class_path: str | None = None
) -> Bundle:
    """Convert a model, compare it with the original on a sample, and return its bundle.

    config: data.train and target are the sample; training options have no effect. classes: names
    of the classes in the model's order, if it does not know them. class_path: class of a module of
    PyTorch, as package.module:Class; it is imported in the isolated process only.
    Raises UserError if the model cannot be converted, the sample does not fit it, or the converted
    model predicts otherwise than the original.
    """
    started = time.perf_counter()
    if (file.format == "torch") != (class_path is not None):
        raise UserError(
            f"'{file.source}' is of the format {FORMATS[file.format]}; weights in safetensors need "
            "--class-path package.module:Class, and other formats have no class."
        )
    data = config.data
    source = find_source(data.train)
    count = COMPARED_TEXTS if file.format == "transformers" else COMPARED
    columns = sample_source(source, count, CsvOptions(data.encoding, data.delimiter, data.quotes))
    check_columns(data.train, [config.target, *data.drop], list(columns))
    names = [name for name in columns if name not in (config.target, *data.drop)]
    with TemporaryDirectory(prefix="import-") as scratch:
        folder = Path(scratch)
        path = file.path
        if file.format == "onnx":
            path = folder / "original.onnx"
            onnx.save(read_model(file.path), path)
        sample = Sample.of(columns, names)
        sample.write(folder)
        try:
            options = {"class_path": class_path, "folder": str(Path.cwd())} if class_path else {}
            facts = isolated.run_isolated(path, file.format, names, folder, options)
        except UserError as error:
            raise UserError(str(error).replace(str(path), file.source)) from error
        with np.load(folder / isolated.ANSWERS, allow_pickle=False) as answers:
            original = dict(answers)
        tokenizer = file.path / TOKENIZER
        text = tokenizer.read_text() if file.format == "transformers" else ""
        found = define_imported_task(config, columns, sample, facts, original, classes, text)
        model = adapt_graph(
            read_model(folder / isolated.MODEL),
            found.task.features,
            found.task.target,
            layout=facts["layout"],
            columns=facts["columns"],
            texts=found.texts,
            output=facts["output"],
            kind=found.kind,
        )
        adapted = folder / "adapted.onnx"
        onnx.save(model, adapted)
        difference = _compare(adapted, found, columns, original, file)
        imported = ImportedModel(
            source=file.source,
            format=FORMATS[file.format],
            sha256=file.sha256,
            library=facts["library"],
            model=facts["model"],
            num_records=len(original["values"]),
            max_difference=difference,
        )
        location = _write(config, found.task, adapted, imported, started)
    return Bundle.load(location)


def _compare(
    path: Path,
    found: ImportedTask,
    columns: Columns,
    original: dict[str, np.ndarray],
    file: ModelFile,
) -> float:
    """Return the largest difference from the original. Raises UserError if it is too large."""
    task = found.task
    inputs = task.features.encode({name: columns[name] for name in task.features.columns})
    try:
        engine = OnnxRuntimeEngine.load(path, num_threads=num_cores())
        outputs = run_batches(engine.run, inputs)
    except Exception as error:  # ONNX Runtime raises many classes
        raise UserError(
            f"'{file.source}' was converted, but ONNX Runtime cannot run it: {error_line(error)}."
        ) from error
    decoded = task.target.decode(outputs)
    if isinstance(task.target, ValueTarget):
        ours_N, theirs_N = decoded["value"], original["values"].reshape(-1)
        differences_N = np.abs(ours_N - theirs_N) / task.target.scale
        shown = [(f"{one:g}", f"{other:g}") for one, other in zip(ours_N, theirs_N, strict=True)]
    else:
        assert isinstance(task.target, ClassTarget)
        chosen_N = decoded["probabilities"].argmax(axis=1)
        assert found.labels_N is not None
        assert found.probabilities_NK is not None
        wanted_N, probabilities_NK = found.labels_N, found.probabilities_NK
        differences_N = np.abs(decoded["probabilities"] - probabilities_NK).max(axis=1)
        best_N2 = np.sort(probabilities_NK, axis=1)[:, -2:]
        near_N = best_N2[:, 1] - best_N2[:, 0] <= MAX_DIFFERENCE
        # Where two classes are equally probable, rounding decides.
        differences_N[(chosen_N != wanted_N) & ~near_N] = 1.0
        names = task.target.classes
        shown = [(names[one], names[other]) for one, other in zip(chosen_N, wanted_N, strict=True)]
    wrong_N = np.flatnonzero(~(differences_N <= MAX_DIFFERENCE))
    if len(wrong_N):
        rows = "; ".join(
            f"row {row}: {shown[row][0]} instead of {shown[row][1]}, difference "
            f"{differences_N[row]:.2g}"
            for row in wrong_N[:MOST_SHOWN]
        )
        raise UserError(
            f"'{file.source}' predicts otherwise as ONNX in {len(wrong_N):,} of "
            f"{len(differences_N):,} records ({rows}); a difference of {MAX_DIFFERENCE:g} is "
            "accepted, so it was not imported."
        )
    return float(differences_N.max(initial=0.0))


def _write(config: Config, task: Task, path: Path, imported: ImportedModel, started: float) -> str:
    """Write the bundle of a converted model; return its location."""
    root = config.storage.root
    config = _completed(config, task)
    data = dataset.prepare_dataset(config, root, task).with_task(task)
    now = datetime.now(UTC)
    name = f"{config.name}-{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}-imported"
    location = storage.join_path(root, "bundles", name)
    with Bundle.create(location) as writer:
        _fill(writer, config, data, path, imported, now, started)
    return location


def _completed(config: Config, task: Task) -> Config:
    """Return the config with the features of the task."""
    kinds: dict[str, str] = {}
    for encoder in task.features.encoders:
        if isinstance(encoder, Numbers):
            kinds |= {each.column: each.kind for each in encoder.columns}
        else:
            kind = "text" if isinstance(encoder, Texts) else "category"
            kinds |= dict.fromkeys((field.name for field in encoder.fields), kind)
    values = config.model_dump(mode="json", exclude_unset=True)
    features = {column: {"kind": kind} for column, kind in kinds.items()}
    return validate_config(
        values | {"features": features, "task_type": task.target.to_dict()["kind"]}
    )


def _fill(
    writer: BundleWriter,
    config: Config,
    data: dataset.EncodedDataset,
    path: Path,
    imported: ImportedModel,
    now: datetime,
    started: float,
) -> None:
    task = data.task
    writer.json(FEATURES, task.to_dict())
    for name in (REPORT, PICTURE):
        shutil.copyfile(data.folder / name, writer.file(f"report/data{Path(name).suffix}"))
    made = compress(path, config, data, writer, config.storage.root)
    writer.json(BASELINE, build_baseline(data, made.outputs["valid"]))
    test = *data.open("test"), made.outputs["test"]
    plots.plot_predictions(task, *test, writer.file)
    manifest = Manifest(
        name=config.name,
        created=now.isoformat(timespec="seconds"),
        task=task.to_dict(),
        inputs=[TensorMetadata.of(spec) for spec in task.features.fields],
        outputs=[TensorMetadata.of(spec) for spec in task.target.outputs],
        files=writer.files(),
        seed=config.seed,
        data={"digest": data.summary["digest"], **data.summary["splits"]},
        config=config.model_dump(mode="json"),
        training_seconds=round(time.perf_counter() - started, 3),
        nullable=data.nullable,
        imported=imported,
        **made.fields,
    )
    writer.commit(reports.write_card(writer, manifest, *test), config.storage.signing_key)
    print(
        f"imported {imported.model} ({imported.library}); it predicts as the original on "
        f"{imported.num_records:,} records, with a difference of at most "
        f"{imported.max_difference:.2g}",
        file=sys.stderr,
    )
