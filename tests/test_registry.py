"""Model versions and aliases, in a real MLflow."""

from dataclasses import replace

import pytest

from cluster.errors import UserError
from train.bundle import registry


def with_accuracy(bundle, value):
    """The bundle as if its default variant had another accuracy."""
    manifest = bundle.manifest
    name = manifest.default_variant
    variant = manifest.variants[name]
    changed = variant.model_copy(update={"metrics": {**variant.metrics, "valid_accuracy": value}})
    variants = {**manifest.variants, name: changed}
    return replace(bundle, manifest=manifest.model_copy(update={"variants": variants}))


def test_a_version_becomes_production_only_if_it_is_no_worse(bundle, tmp_path):
    root = str(tmp_path)
    published = [
        registry.publish(with_accuracy(bundle, value), root, "valid_accuracy")
        for value in (0.9, 0.8, 0.9, 0.95)
    ]
    assert [item["alias"] for item in published] == [
        "production",
        "candidate",
        "production",
        "production",
    ]
    assert [item["version"] for item in published] == [1, 2, 3, 4]
    assert registry.resolve("models:/digits@production", root)[1] == "4"
    assert registry.resolve("models:/digits@candidate", root)[1] == "2"
    location, version = registry.resolve("models:/digits/3", root)
    assert version == "3"
    assert type(bundle).load(location).manifest == bundle.manifest


def test_the_run_holds_options_curves_and_pictures(bundle, tmp_path):
    from mlflow import MlflowClient

    from cluster import storage

    published = registry.publish(bundle, str(tmp_path), "valid_accuracy")
    client = MlflowClient(storage.tracking_uri(str(tmp_path)))
    run = client.get_run(client.get_model_version("digits", str(published["version"])).run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.lr"] == "0.1"
    assert len(client.get_metric_history(run.info.run_id, "valid_accuracy")) == 8
    pictures = {file.path for file in client.list_artifacts(run.info.run_id, "report")}
    assert {"report/curves.png", "report/confusion.png", "report/variants.png"} <= pictures


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("models:/digits@production", ["models:/digits@production", "train/main.py"]),
        ("models:/digits/7", ["models:/digits/7"]),
        ("models:/digits", ["models:/NAME@ALIAS"]),
        ("models:/digits/x", ["models:/NAME/VERSION"]),
    ],
)
def test_a_model_that_is_not_there_is_said_in_one_line(uri, words, tmp_path):
    with pytest.raises(UserError) as caught:
        registry.resolve(uri, str(tmp_path))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_metric_names_the_known_ones(bundle, tmp_path):
    with pytest.raises(UserError, match=r"'valid_r2'; the model has .*valid_accuracy"):
        registry.publish(bundle, str(tmp_path), "valid_r2")
