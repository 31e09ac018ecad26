"""A model behind FastAPI in its own library, as many services are written.

Reads the model's file from MODEL and its kind from KIND; for `import_models.py`.
"""

import os
from typing import Any

import joblib
import numpy as np
import pandas as pd
from fastapi import FastAPI

PATH, KIND = os.environ["MODEL"], os.environ["KIND"]
app = FastAPI()

if KIND == "xgboost":
    import xgboost

    booster = xgboost.Booster(model_file=PATH)

    def probabilities(frame: pd.DataFrame) -> np.ndarray:
        second = booster.predict(xgboost.DMatrix(frame[booster.feature_names]))
        return np.stack([1 - second, second], axis=1)

elif KIND == "lightgbm":
    import lightgbm

    model = lightgbm.Booster(model_file=PATH)

    def probabilities(frame: pd.DataFrame) -> np.ndarray:
        second = np.asarray(model.predict(frame))
        return np.stack([1 - second, second], axis=1)

elif KIND == "onnx":
    import onnxruntime

    session = onnxruntime.InferenceSession(PATH)

    def probabilities(frame: pd.DataFrame) -> np.ndarray:
        return np.asarray(session.run(None, {"features": frame.to_numpy(np.float32)})[-1])

else:
    pipeline = joblib.load(PATH)

    def probabilities(frame: pd.DataFrame) -> np.ndarray:
        return np.asarray(pipeline.predict_proba(frame))


@app.post("/v1/models/{name}:predict")
def predict(name: str, request: dict[str, Any]) -> dict[str, Any]:
    found = probabilities(pd.DataFrame(request["instances"]))
    labels = found.argmax(axis=1)
    rows = [
        {"label": str(label), "probabilities": row.tolist()}
        for label, row in zip(labels, found, strict=True)
    ]
    return {"predictions": rows}


@app.get("/v2/health/ready")
def ready() -> dict[str, bool]:
    return {"ready": True}
