"""Options of serving, which must mean the same in every process of an application."""

from serve.config import ServeConfig, validate_options


def test_a_relative_storage_path_means_the_same_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = validate_options({"storage": "runs"})
    default = validate_options({})
    monkeypatch.chdir("/")
    assert config.storage == default.storage == str(tmp_path / "runs")
    assert ServeConfig.model_validate(config.model_dump()).storage == str(tmp_path / "runs")


def test_a_storage_url_is_kept():
    assert validate_options({"storage": "s3://bucket/runs/"}).storage == "s3://bucket/runs"
