"""Conversion of parts of scikit-learn that skl2onnx does not convert, or not exactly.

They run in the isolated process.
"""

from typing import Any

import numpy as np
from onnx import TensorProto


def register_converters() -> None:
    """Let skl2onnx use the converters of this module."""
    from skl2onnx import update_registered_converter
    from skl2onnx.common import _container
    from skl2onnx.common._registration import get_shape_calculator
    from sklearn.impute import SimpleImputer
    from sklearn.preprocessing import OrdinalEncoder

    of_imputer = get_shape_calculator("SklearnSimpleImputer")

    def with_indicators(operator: Any) -> None:
        of_imputer(operator)
        imputer = operator.raw_operator
        if imputer.add_indicator:
            width = len(imputer.statistics_) + len(imputer.indicator_.features_)
            operator.outputs[0].type.shape = [None, width]

    for kind, converter, shapes in (
        (SimpleImputer, _imputer(), with_indicators),
        (OrdinalEncoder, _ordinals, get_shape_calculator("SklearnOrdinalEncoder")),
    ):
        update_registered_converter(
            kind, f"Sklearn{kind.__name__}", shapes, converter, overwrite=True
        )
    make_node = _container.make_node

    # skl2onnx passes booleans as integers, which protobuf refuses.
    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple) and any(isinstance(v, bool | np.bool_) for v in value):
            return [int(each) for each in value]
        return value

    def made(*arguments: Any, **attributes: Any) -> Any:
        return make_node(*arguments, **{key: plain(value) for key, value in attributes.items()})

    _container.make_node = made


def _imputer() -> Any:
    """Return the converter of SimpleImputer, in the precision of its input."""
    from skl2onnx.common.data_types import StringTensorType
    from skl2onnx.operator_converters.common import concatenate_variables
    from skl2onnx.operator_converters.imputer_op import convert_sklearn_imputer

    def convert(scope: Any, operator: Any, container: Any) -> None:
        imputer, kind = operator.raw_operator, operator.inputs[0].type
        if isinstance(kind, StringTensorType):
            convert_sklearn_imputer(scope, operator, container)
            return
        filled = np.asarray(imputer.statistics_, np.float64)
        if not np.isfinite(filled).all():
            raise NotImplementedError("SimpleImputer of a column without values")
        values = concatenate_variables(scope, operator.inputs, container)
        if isinstance(values, list):
            (values,) = values
        element = _element(kind)
        names = [scope.get_unique_variable_name(part) for part in ("filled", "missing")]
        container.add_initializer(names[0], element, [1, len(filled)], filled.tolist())
        given = imputer.missing_values
        if isinstance(given, float) and np.isnan(given):
            container.add_node("IsNaN", values, names[1], op_version=13)
        else:
            marker = scope.get_unique_variable_name("marker")
            container.add_initializer(marker, element, [1], [float(given)])
            container.add_node("Equal", [values, marker], names[1], op_version=13)
        output = operator.outputs[0].full_name
        if not imputer.add_indicator:
            container.add_node("Where", [names[1], names[0], values], output, op_version=16)
            return
        parts = [scope.get_unique_variable_name(part) for part in ("imputed", "chosen", "flags")]
        index = scope.get_unique_variable_name("index")
        features = imputer.indicator_.features_.tolist()
        container.add_initializer(index, TensorProto.INT64, [len(features)], features)
        container.add_node("Where", [names[1], names[0], values], parts[0], op_version=16)
        container.add_node("Gather", [names[1], index], parts[1], axis=1, op_version=13)
        container.add_node("Cast", parts[1], parts[2], to=element, op_version=13)
        container.add_node("Concat", [parts[0], parts[2]], output, axis=1, op_version=13)

    return convert


def _element(kind: Any) -> int:
    from skl2onnx.common.data_types import DoubleTensorType

    return int(TensorProto.DOUBLE if isinstance(kind, DoubleTensorType) else TensorProto.FLOAT)


def _ordinals(scope: Any, operator: Any, container: Any) -> None:
    """Convert an OrdinalEncoder: missing and unknown categories as scikit-learn encodes them."""
    from skl2onnx.common.data_types import StringTensorType

    encoder = operator.raw_operator
    if getattr(encoder, "_infrequent_enabled", False):
        raise NotImplementedError("OrdinalEncoder with infrequent categories")
    if not all(isinstance(each.type, StringTensorType) for each in operator.inputs):
        raise NotImplementedError("OrdinalEncoder of numbers")
    values = operator.inputs[0].full_name
    if len(operator.inputs) > 1:
        values = scope.get_unique_variable_name("columns")
        columns = [each.full_name for each in operator.inputs]
        container.add_node("Concat", columns, values, axis=1, op_version=13)
    unknown = np.nan if encoder.unknown_value is None else float(encoder.unknown_value)
    codes = []
    for place, categories in enumerate(encoder.categories_):
        index, column, code = (
            scope.get_unique_variable_name(name) for name in ("index", "column", "code")
        )
        container.add_initializer(index, TensorProto.INT64, [1], [place])
        container.add_node("Gather", [values, index], column, axis=1, op_version=13)
        # "" stands for a missing category, see `scikit_learn`.
        encoded = [
            float(encoder.encoded_missing_value) if text == "" else float(number)
            for number, text in enumerate(categories)
        ]
        container.add_node(
            "LabelEncoder",
            column,
            code,
            op_domain="ai.onnx.ml",
            op_version=2,
            keys_strings=[str(text) for text in categories],
            values_floats=encoded,
            default_float=unknown,
        )
        codes.append(code)
    joined = scope.get_unique_variable_name("codes")
    container.add_node("Concat", codes, joined, axis=1, op_version=13)
    element = _element(operator.outputs[0].type)
    container.add_node("Cast", joined, operator.outputs[0].full_name, to=element, op_version=13)
