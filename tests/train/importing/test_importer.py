"""Imported models predict as their own library does, for every kind of model and column.

The originals run in this process; the imported ones in ONNX Runtime, from records as clients send
them.
"""

import warnings

import numpy as np
import onnxruntime
import pandas as pd
import pytest
from sklearn.base import is_classifier
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.ensemble import (
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
    VotingClassifier,
)
from sklearn.impute import SimpleImputer
from sklearn.linear_model import (
    LinearRegression,
    LogisticRegression,
    Ridge,
    RidgeClassifier,
    SGDClassifier,
)
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import (
    KBinsDiscretizer,
    MinMaxScaler,
    OneHotEncoder,
    OrdinalEncoder,
    PolynomialFeatures,
    StandardScaler,
)
from sklearn.svm import SVC, LinearSVC

from cluster.errors import UserError
from train.bundle import Bundle, Predictor
from train.compress import export_edge
from train.compress.__main__ import main as compress_again
from train.config import validate_config
from train.data.warm_start import inherit_options
from train.importing.formats import find_model_file
from train.importing.importer import import_model
from train.tasks import InvalidRecord

joblib = pytest.importorskip("joblib")
pytest.importorskip("skl2onnx", reason="needs halyard[import]")

OPTIONS = {"compress": {"measure_seconds": 0.01, "qat_epochs": 0}, "registry": {"enabled": False}}


def imported(path, sample, target, folder, *, classes=(), class_path=None, **options):
    """Import a model; `sample` is a data frame."""
    source = folder / "sample.csv"
    sample.to_csv(source, index=False)
    config = validate_config(
        {
            "name": "model",
            "target": target,
            "data": {"train": str(source)},
            "storage": {"path": str(folder / "runs")},
            **OPTIONS,
            **options,
        }
    )
    file = find_model_file(str(path), config.storage.root, folder, allow_pickle=True)
    return import_model(config, file, classes, class_path)


def records(sample, target):
    """Return rows as a client sends them, without the target, null where a value is missing."""
    rows = sample.drop(columns=[target]).astype(object)
    return rows.where(rows.notna(), None).to_dict("records")


def check_predictions(bundle, model, sample, target, *, as_array=False):
    """Compare the imported model's predictions with those of the original."""
    features = sample.drop(columns=[target])
    inputs = features.to_numpy() if as_array else features
    found = Predictor.load(bundle, "fp32").predict(records(sample, target))
    if not is_classifier(model):
        wanted = np.asarray(model.predict(inputs)).reshape(-1)
        np.testing.assert_allclose(found["value"], wanted, rtol=0, atol=1e-5 * np.std(wanted))
        return
    labels = [
        str(label).lower() if isinstance(label, np.bool_) else str(label)
        for label in model.predict(inputs)
    ]
    assert found["label"].tolist() == labels
    if hasattr(model, "predict_proba"):
        wanted = model.predict_proba(inputs)
        np.testing.assert_allclose(found["probabilities"], wanted, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def passengers():
    """A table with numbers, whole numbers, texts and booleans, and with missing values."""
    rng = np.random.default_rng(0)
    count = 400
    frame = pd.DataFrame(
        {
            "grade": rng.integers(1, 4, count),
            "sex": rng.choice(["male", "female"], count),
            "age": np.round(rng.normal(35, 12, count) * 2) / 2,  # halves, where trees split
            "fare": np.round(rng.lognormal(3, 1, count), 4),
            "port": rng.choice([" S", "Cherbourg, FR", "Q"], count, p=[0.7, 0.2, 0.1]),
            "alone": rng.random(count) < 0.5,
        }
    )
    frame.loc[rng.random(count) < 0.2, "age"] = np.nan
    frame.loc[rng.random(count) < 0.1, "port"] = np.nan
    score = (frame["sex"] == "female") * 2 - frame["grade"] + frame["fare"] / 40
    frame["survived"] = np.where(score + rng.normal(0, 1, count) > -0.5, "yes", "no")
    return frame


NUMBERS, TEXTS = ["grade", "age", "fare"], ["sex", "port"]


def one_hot():
    return ColumnTransformer(
        [
            ("numbers", make_pipeline(SimpleImputer(strategy="median"), StandardScaler()), NUMBERS),
            (
                "texts",
                make_pipeline(
                    SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore")
                ),
                TEXTS,
            ),
        ]
    )


def ordinal():
    codes = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)
    return ColumnTransformer([("n", "passthrough", NUMBERS), ("t", codes, TEXTS)])


@pytest.mark.parametrize(
    ("steps", "model"),
    [
        (one_hot, LogisticRegression(max_iter=500)),
        (one_hot, RandomForestClassifier(40, random_state=0)),
        (one_hot, ExtraTreesClassifier(40, random_state=0)),
        (one_hot, GradientBoostingClassifier(n_estimators=40)),
        (one_hot, MLPClassifier((16,), max_iter=100, random_state=0)),
        (one_hot, KNeighborsClassifier(5)),
        (one_hot, SVC()),
        (ordinal, HistGradientBoostingClassifier(max_iter=40)),
    ],
    ids=lambda each: type(each).__name__ if not callable(each) else each.__name__,
)
def test_a_pipeline_of_mixed_columns(steps, model, passengers, tmp_path):
    pipeline = Pipeline([("columns", steps()), ("model", model)])
    train, sample = passengers[:200], passengers[200:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.fit(train.drop(columns=["survived"]), train["survived"])
    joblib.dump(pipeline, tmp_path / "model.joblib")
    bundle = imported(tmp_path / "model.joblib", sample, "survived", tmp_path)
    check_predictions(bundle, pipeline, sample, "survived")
    manifest = bundle.manifest
    assert manifest.imported.format == "pickle"
    assert manifest.imported.num_records == len(sample)
    assert manifest.imported.max_difference < 1e-5
    assert [each.name for each in manifest.inputs if each.datatype == "BYTES"] == TEXTS


@pytest.mark.parametrize(
    "model",
    [
        LogisticRegression(max_iter=5000),
        RandomForestClassifier(30, random_state=0),
        HistGradientBoostingClassifier(max_iter=30),
        make_pipeline(MinMaxScaler(), PolynomialFeatures(2), LogisticRegression(max_iter=500)),
        LinearSVC(max_iter=5000),
        SVC(),
        RidgeClassifier(),
        SGDClassifier(random_state=0),
        GaussianNB(),
    ],
    ids=lambda model: type(model).__name__,
)
@pytest.mark.parametrize(
    "load",
    [load_breast_cancer, pytest.param(load_wine, marks=pytest.mark.slow)],
    ids=["two", "three"],
)
def test_a_classifier_of_numbers(load, model, tmp_path):
    features, target = load(return_X_y=True, as_frame=True)
    sample = features.assign(target=target)[::2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(features[1::2].to_numpy(), target[1::2])
    joblib.dump(model, tmp_path / "model.pkl")
    bundle = imported(tmp_path / "model.pkl", sample, "target", tmp_path)
    check_predictions(bundle, model, sample, "target", as_array=True)


@pytest.mark.parametrize(
    "model",
    [
        LinearRegression(),
        make_pipeline(StandardScaler(), Ridge()),
        RandomForestRegressor(30, random_state=0),
        HistGradientBoostingRegressor(max_iter=30),
        HistGradientBoostingRegressor(max_iter=30, loss="poisson"),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_regression(model, tmp_path):
    features, target = load_diabetes(return_X_y=True, as_frame=True)
    # Columns of large numbers, of which float32 keeps seven digits.
    features = features.assign(age=1.7e9 + features["age"] * 1e6, bmi=features["bmi"] * 1e-6)
    sample = features.assign(progression=target)[::2]
    model.fit(features[1::2], target[1::2])
    joblib.dump(model, tmp_path / "model.joblib")
    bundle = imported(tmp_path / "model.joblib", sample, "progression", tmp_path)
    check_predictions(bundle, model, sample, "progression")


def test_a_difference_from_the_original_is_refused(tmp_path):
    lightgbm = pytest.importorskip("lightgbm")
    rng = np.random.default_rng(0)
    # Values that differ beyond the seventh digit, which the converted trees cannot tell apart.
    features = pd.DataFrame({"x": 1 + rng.integers(0, 50, 2000) * 1e-9, "y": rng.random(2000)})
    target = ((features["x"] - 1) * 1e9).round() % 2
    model = lightgbm.LGBMClassifier(n_estimators=30, verbose=-1).fit(features, target)
    model.booster_.save_model(tmp_path / "model.txt")
    sample = features.assign(target=target.astype(int))
    with pytest.raises(UserError, match=r"in [\d,]+ of 2,000 records \(row \d+: [01] instead of"):
        imported(tmp_path / "model.txt", sample, "target", tmp_path)
    assert not (tmp_path / "runs" / "bundles").exists()


@pytest.fixture(scope="module")
def survivors(passengers, tmp_path_factory):
    """A pipeline of mixed columns, its bundle, and the sample that it was imported with."""
    folder = tmp_path_factory.mktemp("survivors")
    pipeline = Pipeline([("columns", one_hot()), ("model", MLPClassifier((64,), max_iter=200))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.fit(passengers[:200].drop(columns=["survived"]), passengers[:200]["survived"])
    joblib.dump(pipeline, folder / "model.joblib")
    sample = passengers[200:]
    return pipeline, imported(folder / "model.joblib", sample, "survived", folder), sample


def test_names_that_only_the_model_knows_are_kept(passengers, tmp_path):
    pipeline = Pipeline([("columns", one_hot()), ("model", LogisticRegression(max_iter=500))])
    pipeline.fit(passengers[:200].drop(columns=["survived"]), passengers[:200]["survived"])
    joblib.dump(pipeline, tmp_path / "model.joblib")
    sample = passengers[200:]
    seldom = sample[sample["port"] != "Q"]
    bundle = imported(tmp_path / "model.joblib", seldom, "survived", tmp_path)
    # Names that neither knows count as unknown, as in the pipeline.
    unseen = sample.assign(port=sample["port"].where(sample.index % 2 == 0, "Oslo"))
    check_predictions(bundle, pipeline, sample, "survived")
    check_predictions(bundle, pipeline, unseen, "survived")


def test_an_imported_network_has_int8_variants(survivors):
    _, bundle, _ = survivors
    assert {"fp32", "int8_static", "int8_dynamic", "int8_weights"} == set(bundle.manifest.variants)


def test_the_card_describes_the_import(survivors):
    _, bundle, sample = survivors
    card = (bundle.path / "report" / "card.html").read_text()
    assert "Pipeline with MLPClassifier (scikit-learn" in card
    assert "compared with the original (scikit-learn" in card
    assert f"on {len(sample)} records" in card
    assert "0 epochs" not in card


def test_training_cannot_start_from_an_imported_model(survivors, tmp_path):
    _, bundle, sample = survivors
    sample.to_csv(tmp_path / "sample.csv", index=False)
    values = {"name": "model", "target": "survived", "init": bundle.location}
    config = validate_config({**values, "data": {"train": str(tmp_path / "sample.csv")}})
    with pytest.raises(UserError, match=r"was imported from '.*'; train it with its own library"):
        inherit_options(config)


def test_an_imported_model_is_compressed_again(survivors, ray_session):
    _, bundle, _ = survivors
    options = ["--compress.measure_seconds", "0.01", "--compress.variants", "[int8_weights]"]
    summary = compress_again(
        [bundle.location, "--storage.path", str(bundle.path.parents[1]), *options]
    )
    assert set(summary["variants"]) == {"fp32", "int8_weights"}
    again = Bundle.load(summary["bundle"])
    assert again.manifest.imported == bundle.manifest.imported
    assert again.weights_digest == bundle.weights_digest


def test_an_edge_export_takes_raw_columns(survivors, tmp_path):
    pipeline, bundle, sample = survivors
    export_edge.export_edge(bundle, "fp32", tmp_path / "edge")
    session = onnxruntime.InferenceSession(tmp_path / "edge" / "model.onnx")
    features = sample.drop(columns=["survived"])
    feed = {}
    for wanted in session.get_inputs():
        column = features[wanted.name]
        if "string" in wanted.type:  # names as the bundle has them, "" if missing
            feed[wanted.name] = column.str.strip().where(column.notna(), "").to_numpy(object)
        else:
            feed[wanted.name] = column.to_numpy(float)
    names = [each.name for each in session.get_outputs()]
    outputs = dict(zip(names, session.run(None, feed), strict=True))
    wanted = pipeline.predict_proba(features)
    np.testing.assert_allclose(outputs["probabilities"], wanted, rtol=0, atol=1e-5)


def test_values_that_the_original_refuses_are_refused(passengers, tmp_path):
    encoder = OneHotEncoder(sparse_output=False)  # refuses unknown names
    columns = ColumnTransformer([("n", StandardScaler(), ["fare"]), ("t", encoder, ["sex"])])
    pipeline = Pipeline([("columns", columns), ("model", LogisticRegression())])
    pipeline.fit(passengers[["fare", "sex"]], passengers["survived"])
    joblib.dump(pipeline, tmp_path / "model.joblib")
    sample = passengers[["fare", "sex", "survived"]]
    predictor = Predictor.load(imported(tmp_path / "model.joblib", sample, "survived", tmp_path))
    good = {"fare": 7.0, "sex": "male"}
    assert predictor.predict([good])["label"].shape == (1,)
    for changed, words in (
        ({"fare": None}, "field 'fare' is missing, and the model needs a value"),
        ({"sex": None}, "field 'sex' is missing; the model accepts only female, male"),
        ({"sex": "other"}, "field 'sex' is 'other'; the model accepts only female, male"),
    ):
        with pytest.raises(InvalidRecord, match=words) as raised:
            predictor.predict([good, good | changed])
        assert raised.value.row == 1
    assert Bundle.load(predictor.bundle.location).task == predictor.task


def test_values_that_the_original_accepts_are_accepted(survivors):
    pipeline, bundle, sample = survivors
    assert bundle.task.features.encoders[0].required == ()
    check_predictions(bundle, pipeline, sample.assign(age=np.nan, fare=np.nan), "survived")


def test_parts_that_need_another_form_are_converted(passengers, tmp_path):
    numbers = make_pipeline(SimpleImputer(add_indicator=True), StandardScaler())
    constant = SimpleImputer(strategy="constant", fill_value=-1)
    columns = ColumnTransformer(
        [
            ("n", numbers, ["age", "fare"]),
            ("c", constant, ["grade"]),
            ("b", KBinsDiscretizer(4, quantile_method="averaged_inverted_cdf"), ["fare"]),
            ("t", OneHotEncoder(handle_unknown="ignore"), TEXTS),
        ]
    )
    votes = VotingClassifier(
        [("a", LogisticRegression()), ("b", LogisticRegression(C=0.01))], voting="soft"
    )
    inner = Pipeline([("columns", columns), ("votes", Pipeline([("v", votes)]))])
    search = GridSearchCV(inner, {"votes__v__weights": [None, [1, 2]]}, cv=2)
    train, sample = passengers[:200], passengers[200:]
    search.fit(train.drop(columns=["survived"]), train["survived"])
    joblib.dump(search, tmp_path / "model.joblib")
    bundle = imported(tmp_path / "model.joblib", sample, "survived", tmp_path)
    check_predictions(bundle, search, sample, "survived")
