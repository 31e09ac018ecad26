"""`serve.deploy` starts the same server as `serve run serve.app`, and stops it."""

import numpy as np
import pytest

from cluster.errors import UserError
from serve import RequestFailed, deploy
from train.bundle import Predictor

pytestmark = [pytest.mark.ray, pytest.mark.slow]

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1)).astype(np.uint8)


def test_a_bundle_is_served_until_the_block_ends(bundle, tmp_path, capfd):
    expected = Predictor.load(bundle).predict([{"image": image} for image in IMAGES])
    with deploy(bundle, storage=str(tmp_path), limits={"max_rows": 2}) as server:
        client = server.client()
        assert list(client.predict(IMAGES[:2])["label"]) == list(expected["label"][:2])
        with pytest.raises(RequestFailed) as failed:
            client.predict(IMAGES)
        assert failed.value.status == 413
        assert server.running
        with pytest.raises(UserError, match="port 8000"):
            deploy(bundle)
    assert not server.running
    assert not client.ready()
    assert "stopping" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "models:/nothing@production"}, "no registry|not in the registry"),
        ({"replica": 2}, "unknown option 'replica'"),
        ({"threads": 0}, "threads=0"),
    ],
)
def test_impossible_options_raise_one_error(options, words, tmp_path):
    with pytest.raises(UserError, match=words):
        deploy(**options, storage=str(tmp_path))
