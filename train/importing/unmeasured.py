"""Import of an ONNX file without records: its tensors are those of requests. Shapes: N records.

Without records there is nothing to measure the model by: its bundle has no metrics, no reference
for drift, and self-test records that are random.
"""

import secrets
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, ValueInfoProto

from cluster import storage
from cluster.errors import UserError, error_line
from train.bundle import Bundle, BundleWriter, Manifest, feature_statistics
from train.bundle.bundle import BASELINE, FEATURES
from train.bundle.engines.onnx_runtime import OnnxRuntimeEngine
from train.bundle.manifest import ImportedModel, TensorMetadata, Variant
from train.compress import benchmark
from train.compress.benchmark import BenchmarkCase
from train.compress.variant_judge import NUM_GOLDEN, TOLERANCE
from train.config import Config
from train.importing.formats import FORMATS, ModelFile
from train.importing.onnx_file import model_inputs, read_model
from train.tasks import Arrays, Features, RawOutputs, Task, Tensors, TensorSpec
from train.values.records import DATATYPES

ENGINE = "onnxruntime"
REASON = "it was imported without records, so its accuracy is not known"
PACKAGES = ("onnx", "onnxruntime", "numpy")


def import_unmeasured(config: Config, file: ModelFile) -> Bundle:
    """Make a bundle of an ONNX file that is served with the tensors it has, and return it.

    Raises UserError if it is another file, a tensor has a free dimension besides the first, or the
    model does not run on random tensors.
    """
    if file.format != "onnx":
        raise UserError(
            f"'{file.source}' is of the format {FORMATS[file.format]}, which has no columns of its "
            "own; give records with --data and --target."
        )
    started = time.perf_counter()
    model = read_model(file.path)
    task = Task(
        Features((Tensors(_specs(model_inputs(model), file.source)),)),
        RawOutputs(_specs(list(model.graph.output), file.source)),
    )
    now = datetime.now(UTC)
    name = f"{config.name}-{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}-imported"
    location = storage.join_path(config.storage.root, "bundles", name)
    with TemporaryDirectory(prefix="import-") as scratch:
        path = Path(scratch) / "model.onnx"
        onnx.save(model, path)
        inputs = random_inputs(task, config.seed)
        outputs = _run(path, task, inputs, file.source)
        with Bundle.create(location) as writer:
            _fill(writer, config, task, model, inputs, outputs, file, now, started)
    print(f"{config.name}: {REASON}, and drift is not monitored", file=sys.stderr)
    return Bundle.load(location)


def _specs(values: list[ValueInfoProto], source: str) -> tuple[TensorSpec, ...]:
    """Return the tensors of a model without the first dimension, that of the batch."""
    found = []
    for value in values:
        kind = value.type.tensor_type
        sizes = [each.dim_value if each.HasField("dim_value") else None for each in kind.shape.dim]
        if not value.type.HasField("tensor_type") or not sizes:
            raise UserError(
                f"'{source}': '{value.name}' is not a tensor with a batch dimension; export the "
                "model with tensors only."
            )
        if sizes[0] is not None:
            raise UserError(
                f"'{source}': '{value.name}' has a fixed batch of {sizes[0]}; export the model "
                "with a free first dimension."
            )
        inner = [size for size in sizes[1:] if size is not None]
        if len(inner) < len(sizes) - 1:
            shown = ", ".join("?" if size is None else str(size) for size in sizes[1:])
            raise UserError(
                f"'{source}': '{value.name}' has the shape [batch, {shown}]; only the first "
                "dimension may be free."
            )
        texts = kind.elem_type == TensorProto.STRING
        dtype = np.dtype(object if texts else onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
        if dtype not in DATATYPES:
            raise UserError(f"'{source}': '{value.name}' has the type {dtype}, which is unknown.")
        found.append(TensorSpec(value.name, DATATYPES[dtype], tuple(inner)))
    return tuple(found)


def random_inputs(task: Task, seed: int) -> Arrays:
    """Return random tensors for a model, [N, …] by name.

    Integers are 0 or 1, which are valid as codes and as masks.
    """
    generator = np.random.default_rng(seed)
    arrays: Arrays = {}
    for spec in task.features.inputs:
        shape = (NUM_GOLDEN, *spec.shape)
        if spec.dtype.kind == "f":
            arrays[spec.name] = generator.standard_normal(shape).astype(spec.dtype)
        elif spec.dtype == np.uint8:
            arrays[spec.name] = generator.integers(0, 256, shape, np.uint8)
        elif spec.datatype == "BYTES":
            arrays[spec.name] = np.full(shape, "text", object)
        else:
            arrays[spec.name] = generator.integers(0, 2, shape).astype(spec.dtype)
    return arrays


def _run(path: Path, task: Task, inputs: Arrays, source: str) -> Arrays:
    try:
        outputs = OnnxRuntimeEngine.load(path, num_threads=1).run(inputs)
    except Exception as error:  # ONNX Runtime raises many classes
        raise UserError(
            f"'{source}' does not run on random tensors: {error_line(error)}; give records with "
            "--data and --target."
        ) from error
    for spec in task.target.outputs:
        if outputs[spec.name].shape != (NUM_GOLDEN, *spec.shape):
            raise UserError(
                f"'{source}': the output '{spec.name}' has the shape "
                f"{list(outputs[spec.name].shape)} for {NUM_GOLDEN} records."
            )
    return outputs


def _fill(
    writer: BundleWriter,
    config: Config,
    task: Task,
    model: ModelProto,
    inputs: Arrays,
    outputs: Arrays,
    file: ModelFile,
    now: datetime,
    started: float,
) -> None:
    path = writer.file("variants/fp32/model.onnx")
    onnx.save(model, path)
    writer.json(FEATURES, task.to_dict())
    writer.json(BASELINE, {"version": feature_statistics.VERSION, "quantities": {}})
    writer.file("report/unmeasured.txt").write_text(f"{config.name}: {REASON}.\n")
    # Texts cannot be stored without pickling, and their outputs cannot differ by rounding.
    texts = any(array.dtype == object for array in inputs.values())
    numbers = {key: each for key, each in outputs.items() if each.dtype != object}
    if texts or not numbers:
        raise UserError(
            f"'{file.source}' takes or returns texts only; give records with --data and --target."
        )
    writer.golden(inputs, {"fp32": numbers})
    engines = {
        BenchmarkCase("fp32", ENGINE, threads): OnnxRuntimeEngine.load(path, num_threads=threads)
        for threads in benchmark.thread_counts()
    }
    timings = benchmark.benchmark_variants(engines, inputs, config.compress.measure_seconds)
    variant = Variant(
        engine=ENGINE,
        file=path.relative_to(writer.path).as_posix(),
        recipe={},
        verdict="accepted",
        reason=REASON,
        metrics={},
        drop=[0.0, 0.0, 0.0],
        agreement=1.0,
        change=0.0,
        batch_difference=None,
        size_bytes=path.stat().st_size,
        profile=[timing for each in timings.values() for timing in each],
        golden_tolerance=TOLERANCE,
    )
    described = {ENGINE: next(iter(engines.values())).describe()}
    manifest = Manifest(
        name=config.name,
        created=now.isoformat(timespec="seconds"),
        task=task.to_dict(),
        inputs=[TensorMetadata.of(spec) for spec in task.features.fields],
        outputs=[TensorMetadata.of(spec) for spec in task.target.outputs],
        files=writer.files(),
        versions={package: version(package) for package in PACKAGES},
        seed=config.seed,
        data={},
        config=config.model_dump(mode="json"),
        metrics={},
        variants={"fp32": variant},
        skipped={},
        default_variant="fp32",
        optimize_for=config.compress.optimize_for,
        eager=[],
        host={**benchmark.describe_host(), "engines": described},
        training_seconds=round(time.perf_counter() - started, 3),
        imported=ImportedModel(
            source=file.source,
            format=FORMATS[file.format],
            sha256=file.sha256,
            library=f"ONNX Runtime {version('onnxruntime')}",
            model=model.producer_name or "ONNX",
            num_records=0,
            max_difference=0.0,
        ),
    )
    writer.commit(manifest, config.storage.signing_key)
