"""Signed bundles: which bundles load if a signature is required, and the errors for others."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from cluster import private
from cluster.doctor.machine import bundle_signatures
from cluster.errors import UserError
from serve.config import validate_options
from serve.offline import __main__ as offline
from serve.retrain import __main__ as retrain
from train.bundle import Bundle, CorruptBundle, signature
from train.bundle.bundle import BASELINE, WEIGHTS
from train.bundle.manifest import FILENAME


@pytest.fixture(autouse=True)
def _no_key_of_the_user(monkeypatch):
    """Each test starts and ends without a signing key and without required signatures."""
    monkeypatch.delenv(private.SIGNING_KEY, raising=False)
    monkeypatch.setattr(signature, "_trusted", ())


@pytest.fixture
def keys(tmp_path):
    """Our key pair and that of others, each as paths (private, public)."""
    return write_keys(tmp_path / "ours"), write_keys(tmp_path / "others")


def write_keys(folder, key=None, password=None):
    folder.mkdir()
    key = key or ec.generate_private_key(ec.SECP256R1())
    encryption = (
        serialization.BestAvailableEncryption(password)
        if password
        else serialization.NoEncryption()
    )
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "signing.key").touch(0o600)
    (folder / "signing.key").write_bytes(key.private_bytes(pem, pkcs8, encryption))
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "trusted.pub").write_bytes(public)
    return str(folder / "signing.key"), str(folder / "trusted.pub")


@pytest.fixture
def copy(bundle, tmp_path):
    """An unsigned copy of the bundle that a test may change."""
    path = tmp_path / "copy"
    shutil.copytree(bundle.path, path)
    return path


def test_only_a_bundle_signed_by_a_required_key_is_loaded(copy, keys):
    (ours, trusted), (others, other) = keys
    assert Bundle.load(str(copy))
    signature.require([trusted])
    with pytest.raises(CorruptBundle, match=r"copy' is not signed; .*ours/trusted\.pub"):
        Bundle.load(str(copy))
    signature.sign(copy, ours)
    assert Bundle.load(str(copy)).manifest.name == "digits"
    signature.require([other])
    with pytest.raises(CorruptBundle, match=r"signed by another key, .*others/trusted\.pub"):
        Bundle.load(str(copy))
    signature.require([other, trusted])
    assert Bundle.load(str(copy))
    signature.sign(copy, others)
    assert Bundle.load(str(copy))
    signature.require([])
    (copy / signature.SIGNATURE).unlink()
    assert Bundle.load(str(copy))


def with_digest(folder, name):
    """Write the digest of a changed file into the manifest, as an attacker could."""
    from train.bundle.bundle import BundleWriter

    manifest = json.loads((folder / FILENAME).read_bytes())
    manifest["files"][name] = BundleWriter(folder).files()[name].model_dump()
    (folder / FILENAME).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda path: (path / BASELINE).write_bytes(b"{}"), BASELINE),
        (lambda path: (path / BASELINE).unlink(), BASELINE),
        (lambda path: (path / "report" / "extra.json").write_text("{}"), "report/extra.json"),
        (lambda path: (path / "report" / "extra").symlink_to("/etc/passwd"), "extra"),
        (lambda path: (path / FILENAME).write_text("{}"), FILENAME),
        (
            lambda path: ((path / WEIGHTS).write_bytes(b"mine"), with_digest(path, WEIGHTS)),
            f"(?s){FILENAME}.*{WEIGHTS}|{WEIGHTS}.*{FILENAME}",
        ),
    ],
)
def test_the_error_names_a_file_changed_after_signing(copy, keys, change, named):
    (ours, trusted), _ = keys
    signature.sign(copy, ours)
    signature.require([trusted])
    change(copy)
    with pytest.raises(CorruptBundle, match=named):
        Bundle.load(str(copy))


@pytest.mark.parametrize("kept", [0, 10, 300])
def test_a_damaged_signature_is_refused(copy, keys, kept):
    (ours, trusted), _ = keys
    signature.sign(copy, ours)
    signature.require([trusted])
    file = copy / signature.SIGNATURE
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CorruptBundle, match="or its signature is damaged"):
        Bundle.load(str(copy))


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found["dsseEnvelope"].update(signatures=[]),
        lambda found: found.update(verificationMaterial={}),
        lambda found: found["verificationMaterial"].update(publicKey={"hint": None}),
        lambda found: found["dsseEnvelope"].update(payload="e30="),
        lambda found: found["dsseEnvelope"].update(payloadType="text/plain"),
        lambda found: found.clear(),
    ],
)
def test_a_forged_signature_is_refused(copy, keys, change):
    (_, trusted), (others, _) = keys
    signature.sign(copy, others)
    signature.require([trusted])
    file = copy / signature.SIGNATURE
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))
    with pytest.raises(CorruptBundle, match="or its signature is damaged"):
        Bundle.load(str(copy))


@pytest.mark.parametrize("remote", [False, True])
def test_a_bundle_is_signed_when_it_is_written(bundle, keys, tmp_path, monkeypatch, remote):
    (ours, trusted), _ = keys
    monkeypatch.setenv(private.SIGNING_KEY, ours)
    location = "memory://signed/bundle" if remote else str(tmp_path / "bundle")
    with Bundle.create(location) as writer:
        for name in bundle.manifest.files:
            shutil.copyfile(bundle.path / name, writer.file(name))
        writer.commit(bundle.manifest)
    signature.require([trusted])
    assert (Bundle.load(location).path / signature.SIGNATURE).is_file()


def test_the_openssf_command_verifies_and_signs_bundles(copy, keys):
    (ours, trusted), _ = keys
    signature.sign(copy, ours)
    command = [sys.executable, "-m", "model_signing"]
    where = [str(copy), "--signature", str(copy / signature.SIGNATURE)]
    subprocess.run([*command, "verify", "key", *where, "--public_key", trusted], check=True)
    (copy / signature.SIGNATURE).unlink()
    subprocess.run([*command, "sign", "key", *where, "--private_key", ours], check=True)
    signature.require([trusted])
    assert Bundle.load(str(copy))


@pytest.mark.parametrize("made", ["missing", "text", "rsa", "encrypted", "public"])
def test_an_unusable_key_is_refused_before_any_work(tmp_path, made):
    key = rsa.generate_private_key(65537, 2048) if made == "rsa" else None
    private_key, public_key = write_keys(
        tmp_path / "keys", key, b"secret" if made == "encrypted" else None
    )
    if made == "missing":
        private_key = public_key = str(tmp_path / "none")
    elif made == "text":
        Path(private_key).write_text("a")
        public_key = private_key
    elif made == "public":
        private_key, public_key = public_key, private_key
    with pytest.raises(UserError, match=r"cannot be used to sign bundles .*private key of an ell"):
        signature.has_key(private_key)
    if made != "encrypted":
        with pytest.raises(UserError, match=r"cannot be used to verify bundles .*public key of"):
            signature.require([public_key])


@pytest.mark.parametrize("form", ["option", "path", "secret"])
def test_the_private_key_is_read_from_option_path_or_secret(copy, keys, monkeypatch, form):
    (ours, trusted), _ = keys
    if form != "option":
        value = Path(ours).read_text() if form == "secret" else ours
        monkeypatch.setenv(private.SIGNING_KEY, value)
    given = ours if form == "option" else None
    assert signature.has_key(given)
    assert bundle_signatures().mark == ("optional" if form == "option" else "ok")
    signature.sign(copy, given)
    signature.require([trusted])
    assert Bundle.load(str(copy))


def test_relative_paths_of_public_keys_become_absolute(keys, monkeypatch):
    (ours, trusted), _ = keys
    monkeypatch.chdir(Path(ours).parent)
    config = validate_options({"security.require_signature": "trusted.pub,other.pub"})
    assert config.security.require_signature == (trusted, str(Path(ours).with_name("other.pub")))


def test_commands_refuse_an_unsigned_model(copy, keys, tmp_path):
    (_, trusted), _ = keys
    arguments = ["--model", str(copy), "--input", "digits", "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match="is not signed"):
        offline.main([*arguments, "--require-signature", trusted])
    with pytest.raises(UserError, match="--require-signature needs --signing-key"):
        retrain.main(
            ["--model", "digits", "--storage", str(tmp_path), "--require-signature", trusted]
        )


def test_the_doctor_reports_whether_bundles_are_signed(keys, monkeypatch):
    (ours, _), _ = keys
    assert (bundle_signatures().found, bundle_signatures().mark) == (
        "bundles are not signed",
        "optional",
    )
    monkeypatch.setenv(private.SIGNING_KEY, ours)
    Path(ours).chmod(0o644)
    assert "other users can read it" in bundle_signatures().remedy
    Path(ours).chmod(0o600)
    assert bundle_signatures().mark == "ok"
    monkeypatch.setenv(private.SIGNING_KEY, f"{ours}.none")
    assert bundle_signatures().mark == "missing"
