"""Models in their own libraries, and their conversion to ONNX, in the isolated process."""
