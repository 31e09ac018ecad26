"""The lines that `python -m serve.environment` prints."""

import pytest

from cluster.errors import UserError
from cluster.ingress import certificates
from serve import environment
from tests.authority import Authority


@pytest.fixture
def files(tmp_path):
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    return cert, key, authority.file


def test_certificates_are_printed_with_absolute_paths(files, monkeypatch, capsys):
    cert, key, authority = files
    monkeypatch.chdir(cert.parent)
    arguments = ["--tls-cert", cert.name, "--tls-key", key.name]
    environment.main([*arguments, "--tls-client-ca", authority.name])
    lines = capsys.readouterr().out.splitlines()
    for name, path in zip(certificates.VARIABLES, files, strict=True):
        assert f"export {name}={path}" in lines
    environment.main([])
    assert certificates.CERT not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["--tls-cert"], "--tls-cert and --tls-key must be given together"),
        (["--tls-client-ca"], "--tls-cert and --tls-key must be given together"),
        (["--tls-cert", "--tls-key"], "does not belong to the certificate"),
    ],
)
def test_wrong_certificates_are_refused_before_ray_starts(files, names, words):
    other = Authority(files[0].parent).issue("other")
    paths = {"--tls-cert": files[0], "--tls-key": other[1], "--tls-client-ca": files[2]}
    with pytest.raises(UserError, match=words):
        environment.main([part for name in names for part in (name, str(paths[name]))])
